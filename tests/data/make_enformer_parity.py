"""Writes enformer_parity.npz: what enformer-pytorch 0.8.11 answers, for weights and sequences that a recipe makes.

Run once, with the peer in a folder of its own beside the test environment::

    pip install --target /tmp/peer --no-deps enformer-pytorch==0.8.11 einops polars polars-runtime-32 pyfaidx \
        discrete-key-value-bottleneck-pytorch vector-quantize-pytorch einx torch-einops-utils torchmetrics \
        lightning-utilities frozendict loguru
    PYTHONPATH=/tmp/peer python tests/data/make_enformer_parity.py

The tests use `weights` and `sequence` of this file, and never the peer.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).parent / "enformer_parity.npz"
HEADS = {"human": 3, "mouse": 2}
#: name -> config of the peer, window in bp, and every how many bins are kept.
CASES: dict[str, tuple[dict[str, object], int, int]] = {
    "small": ({"dim": 96, "depth": 2, "heads": 4, "dim_divisible_by": 12, "target_length": 24}, 4096, 1),
    "odd": ({"dim": 96, "depth": 2, "heads": 4, "dim_divisible_by": 12, "target_length": 5}, 13 * 128, 1),
    # 192 position features and 1,536 positions as published, with the features of the TensorFlow original.
    "published": (
        {"dim": 192, "depth": 2, "heads": 1, "dim_divisible_by": 32, "target_length": 896, "use_tf_gamma": True},
        196_608,
        64,
    ),
}
#: Whose gradients of sum(output * direction) are kept, for "small".
GRADIENTS = (
    "stem.2.to_attn_logits.weight",
    "conv_tower.5.0.2.bias",
    "transformer.0.0.fn.1.rel_content_bias",
    "transformer.0.0.fn.1.rel_pos_bias",
    "transformer.1.0.fn.1.to_rel_k.weight",
    "final_pointwise.1.0.weight",
)


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
        return ((name.endswith("weight") and not name.startswith("stem.0")) + 0.2 * normal).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    scaled = normal * (2.0 if "to_rel_k" in name or "to_q" in name else 1.0) / np.sqrt(fan_in)
    if name.endswith("to_attn_logits.weight"):
        scaled = scaled + 2 * np.eye(shape[0]).reshape(shape)
    return scaled.astype(np.float32)


def sequence(length: int) -> np.ndarray:
    """Base codes of two sequences (one if long), unknown bases among them."""
    random = np.random.RandomState(length)
    return random.choice(5, (2 if length < 100_000 else 1, length), p=[0.24, 0.24, 0.24, 0.24, 0.04]).astype(np.uint8)


def direction(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(1).standard_normal(shape).astype(np.float32)


def main() -> None:
    from enformer_pytorch import Enformer

    kept: dict[str, np.ndarray] = {}
    for case, (config, window, every) in CASES.items():
        peer = Enformer.from_hparams(**config, output_heads=HEADS).eval()
        state = peer.state_dict()
        names = [name for name in state if not name.startswith("_trunk.")]
        for name in names:
            state[name].copy_(torch.from_numpy(weights(name, tuple(state[name].shape))))
        codes = torch.from_numpy(sequence(window)).long()
        x = torch.nn.functional.one_hot(codes, 5)[..., :4].float()
        heads, embedding = peer(x, return_embeddings=True)
        kept[f"{case}/config"] = np.array(json.dumps(config | {"output_heads": HEADS}))
        kept[f"{case}/shapes"] = np.array(json.dumps({name: list(state[name].shape) for name in names}))
        kept[f"{case}/embedding"] = embedding.detach().numpy()[:, ::every]
        for head, values in heads.items():
            kept[f"{case}/{head}"] = values.detach().numpy()[:, ::every]
        if case == "small":
            exact = peer.double()(x.double(), return_only_embeddings=True)  # in float32 the small ones cancel
            (exact * torch.from_numpy(direction(tuple(exact.shape)))).sum().backward()
            parameters = dict(peer.named_parameters())
            for name in GRADIENTS:
                kept[f"{case}/gradient/{name}"] = parameters[name].grad.float().numpy()
    peer = Enformer.from_hparams(output_heads={"human": 5313, "mouse": 1643})
    heads_alone = sum(p.numel() for p in peer._heads.parameters())
    kept["parameters"] = np.array([sum(p.numel() for p in peer.parameters()) - heads_alone, heads_alone])
    np.savez_compressed(FILE, **kept)
    print(FILE, FILE.stat().st_size, "bytes;", "parameters of the published trunk and heads:", kept["parameters"])


if __name__ == "__main__":
    main()
