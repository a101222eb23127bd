"""Bottleneck adapters after the sublayers of a transformer, and squeeze-excitation after convolutions.

They compute something that no single weight does, so they cannot be merged.

Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP"; with squeeze-excite as Baskerville places it.
There, both kernels start near zero (standard deviation 1e-3); here the last one starts at zero, so that the adapted
model begins as the pretrained one exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from seqgraft.adapters.base import Adapter, check_types, modules_at
from seqgraft.errors import ConfigError, ModelError
from seqgraft.models.base import SequenceModel, Stage, State, Trunk

__all__ = ["Bottleneck", "Houlsby", "SqueezeExcite"]

_SUBLAYERS = ("attention.output", "feedforward.down")


class Bottleneck(nn.Module):
    """y + up(relu(down(y))) on the output y ``(..., features)`` of a linear layer."""

    def __init__(self, base_layer: nn.Linear, size: int) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.out_features, size, **like)
        self.up = nn.Linear(size, base_layer.out_features, **like)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        change: Tensor = self.up(torch.relu(self.down(y)))
        return y + change


class SqueezeExcite(nn.Module):
    """y + y tanh(W2 relu(W1 mean(y))) on the output y ``(batch, channels, positions)`` of a convolution.

    The mean is over the valid positions of the window, so every output depends on the whole of it.
    """

    def __init__(self, base_layer: nn.Conv1d, rank: int) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype, "bias": False}
        self.base_layer = base_layer
        self.squeeze = nn.Linear(base_layer.out_channels, rank, **like)
        self.excite = nn.Linear(rank, base_layer.out_channels, **like)
        nn.init.zeros_(self.excite.weight)
        self.valid: Tensor | None = None  # of the stage's input, set by _tell_valid

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        gate = torch.tanh(self.excite(torch.relu(self.squeeze(self._mean(y)))))
        return y + y * gate[..., None]

    def _mean(self, y: Tensor) -> Tensor:
        """``(batch, channels)`` over the valid positions, whatever the resolution of ``y`` is to that of the input."""
        if self.valid is None:
            return y.mean(-1)
        valid = nn.functional.adaptive_max_pool1d(self.valid[:, None].to(y.dtype), y.shape[-1])
        return (y * valid).sum(-1) / valid.sum(-1).clamp(min=1)


def _tell_valid(stage: nn.Module, args: tuple[State, ...]) -> None:
    for module in stage.modules():
        if isinstance(module, SqueezeExcite):
            module.valid = args[0].valid


@dataclass(frozen=True)
class Houlsby(Adapter):
    """Bottlenecks after attention and feed-forward, with the transformer's layer norms trainable.

    Args:
        bottleneck: width of the bottlenecks.
        squeeze_excite: rank of squeeze-excitation after the convolutions of the site "conv", or None. It makes their
            stages global.
        last: only after the last so many convolutions.
        norms: train the weights of the layer norms too (those of BatchNorm stay frozen).
    """

    kind: ClassVar[str] = "houlsby"
    mergeable: ClassVar[bool] = False
    bottleneck: int = 8
    squeeze_excite: int | None = None
    last: int | None = None
    norms: bool = True

    @classmethod
    def baskerville(cls, convs: int = 0) -> Houlsby:
        """Baskerville's "houlsby", and with ``convs=4`` its "houlsby_se": with squeeze-excitation of rank 16."""
        return cls(8, squeeze_excite=16, last=convs) if convs else cls(8)

    def __post_init__(self) -> None:
        if self.bottleneck < 1 or (self.squeeze_excite is not None and self.squeeze_excite < 1):
            sizes = (self.bottleneck, self.squeeze_excite)
            raise ConfigError("bottleneck and squeeze_excite must be at least 1", sizes, where="adapter houlsby")
        if self.last is not None and self.squeeze_excite is None:
            what = "'last' chooses convolutions for squeeze_excite, which is not set"
            raise ConfigError(what, self.last, where="adapter houlsby")

    @property
    def label(self) -> str:
        return self.method.replace("Houlsby", f"Houlsby {self.bottleneck}")

    @property
    def method(self) -> str:
        return "Houlsby" + ("" if self.squeeze_excite is None else f" + squeeze-excite {self.squeeze_excite}")

    @property
    def size(self) -> int:
        return self.bottleneck

    def modules(self, trunk: Trunk) -> tuple[str, ...]:
        sublayers, convs = modules_at(trunk, _SUBLAYERS), self._convs(trunk)
        check_types(trunk, sublayers, self.label, nn.Linear)
        check_types(trunk, convs, self.label, nn.Conv1d)
        self._norms(trunk)
        return sublayers + convs

    def apply(self, model: SequenceModel) -> None:
        trunk = model.trunk
        for norm in self._norms(trunk):
            norm.requires_grad_(True)
        for name in modules_at(trunk, _SUBLAYERS):
            linear = trunk.get_submodule(name)
            assert isinstance(linear, nn.Linear)  # checked by `modules`
            trunk.set_submodule(name, Bottleneck(linear, self.bottleneck))
        for name in self._convs(trunk):
            conv = trunk.get_submodule(name)
            assert isinstance(conv, nn.Conv1d)
            assert self.squeeze_excite is not None
            trunk.set_submodule(name, SqueezeExcite(conv, self.squeeze_excite))
        for stage in trunk.stages.values():
            if any(isinstance(module, SqueezeExcite) for module in stage.modules()):
                assert isinstance(stage, Stage)
                stage.steps = None
                stage.register_forward_pre_hook(_tell_valid)

    def _convs(self, trunk: Trunk) -> tuple[str, ...]:
        return () if self.squeeze_excite is None else modules_at(trunk, ("conv",), self.last)

    def _norms(self, trunk: Trunk) -> list[nn.Module]:
        if not self.norms:
            return []
        found = [trunk.get_submodule(name) for name in modules_at(trunk, ("norm",))]
        layer_norms = [module for module in found if not isinstance(module, _NormBase)]
        if not layer_norms:
            what = f"the trunk {trunk.spec.name!r} has no layer norm to train"
            raise ModelError(what, where=self.label, remedy="Set norms: false")
        return layer_norms
