"""Writes borzoi_parity.npz: what borzoi-pytorch 0.5.1 answers, for weights and sequences that a recipe makes.

Run once, with the peer in an environment of its own beside the test environment::

    pip install --no-deps borzoi-pytorch==0.5.1 einops intervaltree sortedcontainers transformers
    python tests/data/make_borzoi_parity.py

The peer's widths are fixed in its classes, so its convolutions are replaced by narrower ones of the same class; its
attention, its chain of layers and its forward pass are run as they are.

Flashzoi's attention is flash_attn's MHA, which needs a GPU. A module of that name stands in for it here, written in
plain torch from what flash_attn documents: one packed layer of queries, then keys, then values, each head by head;
head h of the queries reads head h // (heads / key heads) of keys and values; the first ``rotary_emb_dim`` numbers of
queries and keys are rotated in planes (i, i + rotary_emb_dim / 2), not interleaved; no mask. flash_attn itself computes
in half precision; the stand-in computes in the precision of its input.

The tests use `weights`, `sequence` and `direction` of this file, and never the peer.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FILE = Path(__file__).parent / "borzoi_parity.npz"
HEADS = {"human": 3, "mouse": 2}
SMALL = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_key": 16, "attn_dim_value": 16}
FLASH = {"dim": 576, "depth": 2, "heads": 4, "flashed": True}  # 128 numbers of 144 are rotated
#: name -> config of the peer, window in bp, and every how many bins are kept. The peer scales positions to 4,096 ever.
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "borzoi": (SMALL | {"bins_to_return": 6144, "enable_mouse_head": True}, 524_288, 64),
    "short": (SMALL | {"bins_to_return": 320, "enable_human_head": False, "enable_mouse_head": True}, 16_384, 4),
    "flashzoi": (FLASH | {"bins_to_return": 320, "enable_mouse_head": True}, 16_384, 4),
    "long flashzoi": (
        FLASH | {"dim": 288, "depth": 1, "heads": 2, "return_center_bins_only": False, "enable_mouse_head": False},
        524_288,
        128,
    ),
}
#: Whose gradients of sum(output * direction) are kept.
GRADIENTS = {
    "short": (
        "conv_dna.conv_layer.weight",
        "res_tower.4.norm.weight",
        "transformer.0.0.fn.1.rel_content_bias",
        "transformer.0.0.fn.1.rel_pos_bias",
        "transformer.1.0.fn.1.to_rel_k.weight",
        "separable1.conv_layer.0.weight",
        "horizontal_conv0.conv_layer.weight",
    ),
    "flashzoi": ("conv_dna.conv_layer.weight", "transformer.0.0.fn.1.mha.Wqkv.bias", "unet1.1.norm.bias"),
}


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of that name, the same everywhere: numpy never changes what RandomState draws."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.array(7, dtype=np.int64)
    if name.endswith("running_var"):
        return random.uniform(0.5, 2, shape).astype(np.float32)
    normal = random.standard_normal(shape)
    if name.endswith("running_mean"):
        return (0.3 * normal).astype(np.float32)
    if name.endswith(("rel_content_bias", "rel_pos_bias")):
        return normal.astype(np.float32)
    if len(shape) < 2:  # biases, and the scales of normalisations
        norm = "norm." in name or ".fn.0." in name
        return ((norm and name.endswith("weight")) + 0.2 * normal).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    sharp = 2.0 if "to_rel_k" in name or "to_q" in name or "Wqkv" in name else 1.0
    return (normal * sharp / np.sqrt(fan_in)).astype(np.float32)


def sequence(length: int) -> np.ndarray:
    """Base codes of two sequences (one if long), unknown bases among them."""
    random = np.random.RandomState(length)
    return random.choice(5, (2 if length < 100_000 else 1, length), p=[0.24, 0.24, 0.24, 0.24, 0.04]).astype(np.uint8)


def direction(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(1).standard_normal(shape).astype(np.float32)


class MHA(nn.Module):
    """What flash_attn.modules.mha.MHA computes for self-attention with grouped heads and rotary positions."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int,
        softmax_scale: float,
        rotary_emb_dim: int,
        rotary_emb_base: float,
        **others: object,
    ) -> None:
        super().__init__()
        expected = {"use_flash_attn": True, "qkv_proj_bias": True, "out_proj_bias": True, "causal": False}
        assert {key: others[key] for key in expected} == expected
        assert others["rotary_emb_scale_base"] is None
        self.heads, self.key_heads, self.scale = num_heads, num_heads_kv, softmax_scale
        self.rotary, self.base = rotary_emb_dim, rotary_emb_base
        self.head_dim = embed_dim // num_heads
        self.Wqkv = nn.Linear(embed_dim, self.head_dim * (num_heads + 2 * num_heads_kv))
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        packed = self.Wqkv(x).unflatten(-1, (self.heads + 2 * self.key_heads, self.head_dim))
        query, key, value = packed.split([self.heads, self.key_heads, self.key_heads], dim=2)
        inverse = 1.0 / (self.base ** (torch.arange(0, self.rotary, 2, dtype=torch.float32) / self.rotary))
        angle = torch.outer(torch.arange(n, dtype=torch.float32), inverse)
        cos, sin = (torch.cat([f(angle)] * 2, dim=-1)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))

        def rotate(t: Tensor) -> Tensor:
            inside, outside = t[..., : self.rotary], t[..., self.rotary :]
            low, high = inside.chunk(2, dim=-1)
            return torch.cat([inside * cos + torch.cat([-high, low], dim=-1) * sin, outside], dim=-1)

        query, key = rotate(query), rotate(key)
        mixed = torch.empty_like(query)
        for head in range(self.heads):
            shared = head // (self.heads // self.key_heads)
            scores = query[:, :, head] @ key[:, :, shared].transpose(1, 2) * self.scale
            mixed[:, :, head] = scores.softmax(-1) @ value[:, :, shared]
        return self.out_proj(mixed.flatten(2))


def peer_of(config: dict[str, Any]) -> nn.Module:
    """The peer with narrow convolutions."""
    from borzoi_pytorch.config_borzoi import BorzoiConfig
    from borzoi_pytorch.pytorch_borzoi_model import Borzoi, ConvBlock

    peer = Borzoi(BorzoiConfig(**config)).eval()
    narrow = (8, 8, 8, 12, 12, 16, config["dim"])
    peer.conv_dna.conv_layer = nn.Conv1d(4, narrow[0], 15, padding="same")
    for i in range(5):
        peer.res_tower[2 * i] = ConvBlock(narrow[i], narrow[i + 1], 5)
    peer.unet1[1] = ConvBlock(narrow[5], config["dim"], 5)
    peer.horizontal_conv0 = ConvBlock(narrow[5], config["dim"], 1)
    peer.final_joined_convs[0] = ConvBlock(config["dim"], 24, 1)
    for head, tracks in HEADS.items():
        if hasattr(peer, f"{head}_head"):
            setattr(peer, f"{head}_head", nn.Conv1d(24, tracks, 1))
    state = peer.state_dict()
    for name, tensor in state.items():
        tensor.copy_(torch.from_numpy(weights(name, tuple(tensor.shape))))
    return peer.eval()


def main() -> None:
    from borzoi_pytorch.config_borzoi import BorzoiConfig
    from borzoi_pytorch.pytorch_borzoi_model import Borzoi

    stand_in = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.modules", "flash_attn.modules.mha")}
    stand_in["flash_attn.modules.mha"].MHA = MHA  # type: ignore[attr-defined]
    sys.modules.update(stand_in)  # after transformers has looked for the real one
    kept: dict[str, np.ndarray] = {}
    for case, (config, window, every) in CASES.items():
        peer = peer_of(config)
        codes = torch.from_numpy(sequence(window)).long()
        x = nn.functional.one_hot(codes, 5)[..., :4].float().transpose(1, 2)
        heads = [head for head in HEADS if hasattr(peer, f"{head}_head")]
        with torch.no_grad():
            for head in heads:
                values, features = peer(x, is_human=head == "human", return_embeddings=True)
                kept[f"{case}/{head}"] = values.numpy()[..., ::every]
            kept[f"{case}/embedding"] = features.numpy()[..., ::every]
        kept[f"{case}/config"] = np.array(peer.config.to_json_string(use_diff=True))
        kept[f"{case}/shapes"] = np.array(json.dumps({n: list(t.shape) for n, t in peer.state_dict().items()}))
        if case in GRADIENTS:
            for module in peer.modules():
                if hasattr(module, "positions"):
                    module.positions = module.positions.double()
            exact = peer.double().final_joined_convs(peer.get_embs_after_crop(x.double()))
            (exact * torch.from_numpy(direction(tuple(exact.shape)))).sum().backward()
            parameters = dict(peer.named_parameters())
            for name in GRADIENTS[case]:
                kept[f"{case}/gradient/{name}"] = parameters[name].grad.float().numpy()
    with torch.device("meta"):
        for name in ("borzoi", "flashzoi"):
            peer = Borzoi(BorzoiConfig(flashed=name == "flashzoi", enable_mouse_head=True))
            kept[f"{name}/parameters"] = np.array(sum(p.numel() for p in peer.parameters()))
            kept[f"{name}/names"] = np.array(json.dumps({n: list(t.shape) for n, t in peer.state_dict().items()}))
    np.savez_compressed(FILE, **kept)
    print(FILE, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
