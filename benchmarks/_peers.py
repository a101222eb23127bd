"""The same networks in borzoi-pytorch and enformer-pytorch, on the weights of ours, and a plain loop that trains them.

They are imported only when they are asked for. Weights are shared, not copied, so a comparison holds them once.

borzoi-pytorch makes its table of relative positions at its first window and keeps it (releases before 0.5 have that of
524,288 bp only), so every length gets a peer of its own, whose table is of that length. enformer-pytorch scales its
features to each window, as ours does with ``positions: 0`` and ``gamma_per_position: true``.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from seqgraft.models.base import Trunk

INSTALL = "pip install borzoi-pytorch enformer-pytorch peft"
#: Settings of ours with which both are one network; without dropout both train the same function.
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "borzoi": {"dropout": 0.0, "attention_dropout": 0.0, "position_dropout": 0.0, "final_dropout": 0.0},
    "enformer": {
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "position_dropout": 0.0,
        "positions": 0,
        "gamma_per_position": True,
    },
}
_BLOCK = {
    "attention_norm": "0.fn.0",
    "attention.query": "0.fn.1.to_q",
    "attention.key": "0.fn.1.to_k",
    "attention.value": "0.fn.1.to_v",
    "attention.output": "0.fn.1.to_out",
    "attention.position": "0.fn.1.to_rel_k",
    "attention.content_bias": "0.fn.1.rel_content_bias",
    "attention.position_bias": "0.fn.1.rel_pos_bias",
    "feedforward_norm": "1.fn.0",
    "up": "1.fn.1",
    "down": "1.fn.4",
}
_RESIDUAL = {"mix_norm": "1.fn.0", "mix": "1.fn.2", "pool.logits": "2.to_attn_logits"}
_ENFORMER = {
    "stem.conv": "stem.0",
    **{f"stem.{ours}": f"stem.{theirs}" for ours, theirs in _RESIDUAL.items()},
    **{
        f"tower_{i}.{ours}": f"conv_tower.{i}.{theirs}"
        for i in range(6)
        for ours, theirs in {"norm": "0.0", "conv": "0.2", **_RESIDUAL}.items()
    },
    **{
        f"transformer_{i}.{ours.removeprefix('attention.')}": f"transformer.{i}.{theirs}"
        for i in range(11)
        for ours, theirs in _BLOCK.items()
    },
    "final.norm": "final_pointwise.1.0",
    "final.conv": "final_pointwise.1.2",
}
_BORZOI = {
    "stem.conv": "conv_dna.conv_layer",
    **{
        f"tower_{i}.{ours}": f"{place}.{theirs}"
        for i, place in enumerate([*(f"res_tower.{2 * i}" for i in range(5)), "unet1.1"])
        for ours, theirs in (("norm", "norm"), ("conv", "conv_layer"))
    },
    **{f"transformer_{i}.{ours}": f"transformer.{i}.{theirs}" for i in range(8) for ours, theirs in _BLOCK.items()},
    **{
        f"upsample_{1 - i}.{ours}": theirs
        for i in (0, 1)
        for ours, theirs in {
            "norm": f"upsampling_unet{i}.0.norm",
            "below": f"upsampling_unet{i}.0.conv_layer",
            "lateral_norm": f"horizontal_conv{i}.norm",
            "lateral": f"horizontal_conv{i}.conv_layer",
            "depthwise": f"separable{i}.conv_layer.0",
            "pointwise": f"separable{i}.conv_layer.1",
        }.items()
    },
    "final.norm": "final_joined_convs.0.norm",
    "final.conv": "final_joined_convs.0.conv_layer",
}
_GRELU_BLOCK = {
    "attention_norm": "norm.layer",
    "attention.query": "mha.to_q",
    "attention.key": "mha.to_k",
    "attention.value": "mha.to_v",
    "attention.output": "mha.to_out",
    "attention.position": "mha.to_pos_k",
    "attention.content_bias": "mha.rel_content_bias",
    "attention.position_bias": "mha.rel_pos_bias",
    "feedforward_norm": "ffn.dense1.norm.layer",
    "up": "ffn.dense1.linear",
    "down": "ffn.dense2.linear",
}
_GRELU_UPSAMPLE = {
    "norm": "conv.norm.layer",
    "below": "conv.conv",
    "lateral_norm": "channel_transform.norm.layer",
    "lateral": "channel_transform.conv.layer",
    "depthwise": "sconv.depthwise",
    "pointwise": "sconv.pointwise",
}
_GRELU = {
    "stem.conv": "conv_tower.blocks.0.conv",
    **{
        f"tower_{i}.{ours}": f"conv_tower.blocks.{i + 1}.{theirs}"
        for i in range(6)
        for ours, theirs in (("norm", "norm.layer"), ("conv", "conv"))
    },
    **{
        f"{stage}_{i}.{ours}": f"{tower}.blocks.{i}.{theirs}"
        for stage, tower, count, names in (
            ("transformer", "transformer_tower", 8, _GRELU_BLOCK),
            ("upsample", "unet_tower", 2, _GRELU_UPSAMPLE),
        )
        for i in range(count)
        for ours, theirs in names.items()
    },
    "final.norm": "pointwise_conv.norm.layer",
    "final.conv": "pointwise_conv.conv",
}


def peer_of(name: str, trunk: Trunk, tracks: int = 0) -> Peer:
    """The network of our trunk as the other package has it, in eval mode, with a head of its own if it has tracks.

    Raises:
        SystemExit: the package is not installed.
    """
    weights = {_name(name, ours): tensor for ours, tensor in trunk.state_dict().items()}
    package = _import(f"{name}_pytorch")
    if name == "borzoi":
        net = package.Borzoi.from_hparams(enable_human_head=False, dropout_rate=0.0, attn_dropout=0.0, pos_dropout=0.0)
        net.crop.target_length = -1
    else:
        net = package.Enformer.from_hparams(
            target_length=-1, output_heads={}, use_tf_gamma=False, dropout_rate=0.0, attn_dropout=0.0, pos_dropout=0.0
        )
        shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
        weights = {name: tensor.reshape(shapes[name]) for name, tensor in weights.items()}
    missing, unknown = net.load_state_dict(weights, strict=False, assign=True)
    assert not unknown, unknown
    assert all(name.startswith("_trunk.") for name in missing), missing  # second names
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Peer(name, net, trunk.spec.channels, tracks).eval()


def _name(name: str, ours: str) -> str:
    places = {"borzoi": _BORZOI, "enformer": _ENFORMER, "grelu": _GRELU}[name]
    place = ours.removeprefix("stages.")
    if place in places:  # a parameter of the block itself
        return places[place]
    module, _, parameter = place.rpartition(".")
    return f"{places[module]}.{parameter}"


def _import(package: str, install: str = INSTALL) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}; to compare with the other packages: {install}") from error


class Peer(nn.Module):
    """One-hot ``(batch, 4, length)`` to features ``(batch, channels, bins)``, and to the values of a head."""

    def __init__(self, name: str, net: nn.Module, channels: int, tracks: int) -> None:
        super().__init__()
        self.name, self.net = name, net
        self.head = nn.Conv1d(channels, tracks, 1) if tracks else None

    def features(self, x: Tensor) -> Tensor:
        net: Any = self.net
        if self.name == "borzoi":
            return net.final_joined_convs(net.get_embs_after_crop(x))  # type: ignore[no-any-return]
        return net(x.transpose(1, 2), return_only_embeddings=True).transpose(1, 2)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        assert self.head is not None
        values: Tensor = self.head(self.features(x))
        return values

    def train_only(self, lora: bool) -> list[nn.Parameter]:
        """Freezes the trunk but for LoRA of rank 8 on queries and values, with peft; what trains."""
        self.net.requires_grad_(False)
        if lora:
            peft = _import("peft")
            peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_v"]), self.net)
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


@dataclass
class PeerTraining:
    """The loop that one writes: forward, loss, backward, AdamW on a frozen trunk in eval mode, all data in memory."""

    peer: Peer
    lora: bool
    train: Sequence[tuple[Tensor, Tensor]]  # one-hot and targets of each region
    valid: Sequence[tuple[Tensor, Tensor]]
    steps: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        parameters = self.peer.train_only(self.lora)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def epoch(self) -> None:
        """Trains and validates once; CPU seconds of each step and of all."""
        began = time.process_time()
        for x, y in self.train:
            mark = time.process_time()
            self.optimizer.zero_grad()
            loss = nn.functional.poisson_nll_loss(nn.functional.softplus(self.peer(x)), y, log_input=False)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.steps.append(time.process_time() - mark)
        with torch.no_grad():
            for x, y in self.valid:
                nn.functional.poisson_nll_loss(nn.functional.softplus(self.peer(x)), y, log_input=False)
        self.epochs.append(time.process_time() - began)
