"""A module as a stage of a chain: what has to be said of it, and how padding is kept from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor, nn

from seqgraft.errors import ModelError, Problems
from seqgraft.models.base import Stage, State, Step

__all__ = ["ModuleSpec", "Sizes", "WrappedStage"]

Call = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class ModuleSpec:
    """What cannot be seen in a module, and what it is checked against.

    Attributes:
        name: of the trunk.
        channels: features per bin.
        bin_size: bp per bin of its output.
        drops: bins that the module itself drops at each end.
        stride: input lengths are multiples of this many bp; ``bin_size`` if None.
        window: the only input length that the module takes, in bp; None if any multiple of ``stride`` will do.
        call: how to get features ``(batch, channels, bins)`` from the module and one-hot ``(batch, 4, length)``; the
            module itself if None. With it the module is one stage.
        sites: site -> names of modules, relative to the module; None: found by type and name.
        steps: stage -> what it does along the positions, None for a global stage; stages left out are measured.
        weights: where the module's weights come from; None if they are random.
        licence, citation: of the weights.
    """

    name: str
    channels: int
    bin_size: int = 1
    drops: int = 0
    stride: int | None = None
    window: int | None = None
    call: Call | None = None
    sites: Mapping[str, tuple[str, ...]] | None = None
    steps: Mapping[str, tuple[Step, ...] | None] = field(default_factory=dict)
    weights: str | None = None
    licence: str = ""
    citation: str = ""

    @property
    def multiple(self) -> int:
        """Input lengths are padded to a multiple of this many bp."""
        return self.window or self.stride or self.bin_size

    def __post_init__(self) -> None:
        problems = Problems(ModelError)
        for name in ("channels", "bin_size", "stride", "window"):
            if (value := getattr(self, name)) is not None and value < 1:
                problems.add(f"{name} must be at least 1", value, where=self.name)
        if self.drops < 0:
            problems.add("drops must be at least 0", self.drops, where=self.name)
        problems.raise_if_any()
        if self.multiple % self.bin_size:
            remedy = "Input lengths must hold whole bins"
            raise ModelError(
                f"stride or window is no multiple of the {self.bin_size} bp of a bin",
                self.multiple,
                where=self.name,
                remedy=remedy,
            )


@dataclass(frozen=True)
class Sizes:
    """Positions of a tensor of the chain, for an input of n bp: ``scale * n - drops``."""

    scale: Fraction
    drops: int

    def of(self, length: int) -> int:
        return int(self.scale * length) - self.drops


class WrappedStage(Stage):
    """A module on the state's ``x``. Padding is cut off, so that each sequence gives what it gives alone."""

    def __init__(self, inner: nn.Module, call: Call | None, stride: int) -> None:
        super().__init__()
        self.inner, self.call, self.stride = inner, call, stride
        self.before = self.after = Sizes(Fraction(1), 0)
        #: What it makes of the dry run's sequence: tells changed code apart, which weights and settings do not.
        self.fingerprint = ""

    def features(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) if self.call is None else self.call(self.inner, x)
        return y

    def forward(self, state: State) -> State:
        if state.valid is None:
            self._known(state.x.shape[-1])
            return State(self.features(state.x))
        counts = state.valid.sum(1)
        lengths: list[int] = sorted(set(counts.tolist()))
        self._known(lengths[0])
        if len(lengths) > 1 or self._alone(lengths[0]) != state.x.shape[-1]:
            return self._by_length(state, counts, lengths)
        x = self.features(state.x)
        return State(x, valid=torch.arange(x.shape[-1], device=x.device).expand(len(x), -1) < self._known(lengths[0]))

    def _by_length(self, state: State, counts: Tensor, lengths: list[int]) -> State:
        """Sequences of one length at a time, without what is beyond them; what is missing at the end is padding."""
        positions = self.after.of(int((state.x.shape[-1] + self.before.drops) / self.before.scale))
        whole: State | None = None
        for length in lengths:
            rows = counts == length
            alone = self._alone(length)
            assert state.valid is not None
            part = self(State(state.x[rows, :, :alone], valid=state.valid[rows, :alone]))
            if whole is None:
                x = part.x.new_zeros(len(counts), part.x.shape[1], positions)
                whole = State(x, valid=torch.zeros(len(counts), positions, dtype=torch.bool, device=x.device))
            assert whole.valid is not None
            whole.x[rows, :, : part.x.shape[-1]] = part.x
            whole.valid[rows, : part.x.shape[-1]] = part.valid
        assert whole is not None
        return whole

    def _alone(self, count: int) -> int:
        """Positions that a sequence with so many valid ones has in a batch of its own: padded to the stride."""
        of_bases = ceil((count + self.before.drops) / (self.before.scale * self.stride)) * self.stride
        return self.before.of(of_bases)

    def _known(self, count: int) -> int:
        """Valid positions of the output."""
        known = ceil((count + self.before.drops) * self.after.scale / self.before.scale) - self.after.drops
        if known < 1:
            remedy = "Leave such sequences out"
            raise ModelError("a sequence is shorter than what the module drops at its ends", count, remedy=remedy)
        return known
