"""Adapters without new parameters: train the heads alone, or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.nn.modules.batchnorm import _NormBase

from seqgraft.adapters.base import Adapter
from seqgraft.errors import ConfigError
from seqgraft.models.base import SequenceModel

__all__ = ["FullFineTune", "LinearProbe"]


@dataclass(frozen=True)
class LinearProbe(Adapter):
    """Trains the heads on the frozen trunk."""

    kind: ClassVar[str] = "linear_probe"

    @property
    def label(self) -> str:
        return "linear probe"

    def apply(self, model: SequenceModel) -> None:
        """Nothing: the trunk is frozen already."""


@dataclass(frozen=True)
class FullFineTune(Adapter):
    """Trains the trunk and the heads.

    Args:
        statistics: "frozen" keeps the running statistics of BatchNorm (its weights train); "batch" lets them move,
            for training from scratch with batches large enough.
    """

    kind: ClassVar[str] = "full"
    statistics: Literal["frozen", "batch"] = "frozen"

    def __post_init__(self) -> None:
        if self.statistics not in ("frozen", "batch"):
            raise ConfigError("statistics must be 'frozen' or 'batch'", self.statistics, where="adapter full")

    @property
    def label(self) -> str:
        return "full fine-tuning" if self.statistics == "frozen" else "full training"

    def apply(self, model: SequenceModel) -> None:
        """Unfreezes the trunk; pretrained heads beside the new ones stay as they are."""
        model.trunk.requires_grad_(True)
        for module in model.trunk.modules():
            keeps_statistics = isinstance(module, _NormBase) and self.statistics == "frozen"
            module.frozen = keeps_statistics  # type: ignore[assignment]  # a flag that models.base reads
