"""What a model is: a trunk (an ordered chain of stages) and heads.

A trunk author writes stages and a spec; freezing, adapters, caches, dry runs and local recomputation follow from them.
The reading example is ``convnet.py``.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from seqgraft.errors import ModelError
from seqgraft.sample import Sample
from seqgraft.sequence import ONE_HOT, PAD
from seqgraft.tracks import TrackTable

__all__ = [
    "Halfway",
    "Head",
    "SequenceModel",
    "Span",
    "Stage",
    "State",
    "Step",
    "Trunk",
    "TrunkSpec",
    "one_hot",
    "trainable_state",
    "weight_hash",
]

Span = tuple[int, int]  # positions [start, stop) of one tensor of the state


@dataclass(frozen=True, slots=True)
class State:
    """What flows from stage to stage.

    Attributes:
        x: ``(batch, channels, positions)``.
        skips: named tensors ``(batch, channels, positions)`` that a later stage reads.
        valid: bool ``(batch, positions)``, False where ``x`` is padding; None where everything is valid.
    """

    x: Tensor
    skips: Mapping[str, Tensor] = field(default_factory=dict)
    valid: Tensor | None = None

    def masked(self, fill: float = 0.0) -> Tensor:
        """``x`` with ``fill`` in the padding, so that a convolution sees there what it sees beyond an edge."""
        return self.x if self.valid is None else self.x.masked_fill(~self.valid[:, None], fill)

    def to(self, device: torch.device | str) -> State:
        return State(
            self.x.to(device),
            {name: skip.to(device) for name, skip in self.skips.items()},
            None if self.valid is None else self.valid.to(device),
        )


@dataclass(frozen=True, slots=True)
class Halfway:
    """A state on its way through a trunk, and the stage that comes next: None past the last one."""

    state: State
    start: str | None

    def to(self, device: torch.device | str) -> Halfway:
        return Halfway(self.state.to(device), self.start)


@dataclass(frozen=True, slots=True)
class Step:
    """One operation along the positions, of ``size``: centred convolution, pooling, nearest upsampling or cropping."""

    kind: Literal["conv", "pool", "up", "crop"]
    size: int

    def touched(self, span: Span) -> Span:
        """Output positions that depend on the input positions ``span``."""
        start, stop = span
        if self.kind == "conv":
            return start - self.size // 2, stop + self.size // 2
        if self.kind == "pool":
            return start // self.size, -(-stop // self.size)
        if self.kind == "crop":
            return start - self.size, stop - self.size
        return start * self.size, stop * self.size

    def needed(self, span: Span) -> Span:
        """Input positions that the output positions ``span`` depend on."""
        start, stop = span
        if self.kind == "conv":
            return start - self.size // 2, stop + self.size // 2
        if self.kind == "pool":
            return start * self.size, stop * self.size
        if self.kind == "crop":
            return start + self.size, stop + self.size
        return start // self.size, -(-stop // self.size)


class Stage(nn.Module):
    """One link of the chain; ``forward`` maps a state to a state.

    Attributes:
        steps: what it does along the positions, in order and the same at every one; None if every output can depend on
            every input (global).
        writes: skip name -> after how many steps it is kept.
        reads: skip name -> after how many steps it joins (and leaves the state).
        ragged: how many positions its state has follows from more than the length of the input: nothing stores it.
    """

    steps: tuple[Step, ...] | None = None
    writes: Mapping[str, int] = {}
    reads: Mapping[str, int] = {}
    ragged: bool = False

    def forward(self, state: State) -> State:
        raise NotImplementedError

    def at(self, state: State, span: Span) -> State:
        """``forward``, and of its ``x`` the positions ``span`` alone.

        A global stage that keeps the number of positions, and neither writes nor reads skips, says here how that is
        less work; ``local.Recompute`` then asks it.
        """
        state = self(state)
        valid = None if state.valid is None else state.valid[:, slice(*span)]
        return State(state.x[..., slice(*span)], state.skips, valid)

    @property
    def local(self) -> bool:
        return self.steps is not None

    def touched(self, spans: Mapping[str, Span]) -> dict[str, Span]:
        """Which positions of each output tensor ("x" or a skip) an edit of the given input positions can change.

        Raises:
            ModelError: the stage is global.
        """
        steps = self._local_steps()
        out = {name: span for name, span in spans.items() if name != "x" and name not in self.reads}
        span = spans.get("x")
        for done in range(len(steps) + 1):
            joining = [spans[name] for name, after in self.reads.items() if after == done and name in spans]
            span = _union([*([span] if span else []), *joining])
            out.update({name: span for name, after in self.writes.items() if after == done and span})
            if done < len(steps) and span:
                span = steps[done].touched(span)
        return out | ({"x": span} if span else {})

    def needed(self, spans: Mapping[str, Span]) -> dict[str, Span]:
        """Which positions of each input tensor the given output positions are computed from.

        Raises:
            ModelError: the stage is global.
        """
        steps = self._local_steps()
        out = {name: span for name, span in spans.items() if name != "x" and name not in self.writes}
        span = spans.get("x")
        for done in range(len(steps), -1, -1):
            if done < len(steps) and span:
                span = steps[done].needed(span)
            wanted = [spans[name] for name, after in self.writes.items() if after == done and name in spans]
            span = _union([*([span] if span else []), *wanted])
            out.update({name: span for name, after in self.reads.items() if after == done and span})
        return out | ({"x": span} if span else {})

    def _local_steps(self) -> tuple[Step, ...]:
        if self.steps is None:
            raise ModelError("a global stage cannot say which positions it touches", type(self).__name__)
        return self.steps


def _union(spans: list[Span]) -> Span | None:
    return (min(s for s, _ in spans), max(e for _, e in spans)) if spans else None


@dataclass(frozen=True)
class TrunkSpec:
    """Facts about a trunk.

    Attributes:
        name: the name it is asked for by.
        channels: features per bin that a head sees.
        bin_size: bp per bin of its output.
        length: input length in bp, or None if any will do.
        bins: bins of its output after cropping, or None if that follows from the input.
        sites: "attention", "feedforward", "conv", "norm" -> names of the modules there, relative to the trunk; parts
            of them by role: "attention.query", ".key", ".value", ".output" and "feedforward.up", ".down".
        folds: key of the regions that the weights were trained on, or None.
        weights: where the weights come from, or None for random ones.
        licence, citation: of the weights.
    """

    name: str
    channels: int
    bin_size: int
    length: int | None = None
    bins: int | None = None
    sites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folds: str | None = None
    weights: str | None = None
    licence: str = ""
    citation: str = ""


_ONE_HOT = torch.from_numpy(ONE_HOT)


def one_hot(codes: Tensor) -> Tensor:
    """One-hot float32 ``(batch, 4, length)`` of base codes ``(batch, length)``: zeros for N and PAD."""
    return _ONE_HOT.to(codes.device)[codes.long()].transpose(1, 2).contiguous()


class _StaysFrozen(nn.Module):
    """Modules marked ``frozen`` stay in eval mode whatever ``train`` says: their BatchNorm statistics never move."""

    def train(self, mode: bool = True) -> _StaysFrozen:
        super().train(mode)
        for module in self.modules():
            if getattr(module, "frozen", False):
                module.training = False
        return self


class Trunk(_StaysFrozen):
    """An ordered chain of stages from base codes to features ``(batch, channels, bins)``.

    The constructor takes its settings, all with defaults, plus ``bin_size`` and ``crop``.
    """

    spec: TrunkSpec
    stages: nn.ModuleDict
    #: What ``build`` needs to make this trunk again: plain values, as they stand in ``model.json`` and YAML.
    settings: Mapping[str, Any]
    #: bp per bin where the data do not ask for a size: labels, whose bins are pooled. 0: one bin, the mean over all bp.
    label_bin_size: ClassVar[int] = 16
    #: Whether its weights are good for bins of any size.
    any_bin_size: ClassVar[bool] = False
    #: Where the weights that ``build`` gives come from; None: they are random.
    pretrained: ClassVar[str | None] = None
    #: Bins that the stages drop at each end, those of crop stages left out.
    drops: int = 0
    #: Input lengths are padded to a multiple of this many bp.
    stride: int = 1
    #: bp of the longest input that it takes; None: any, or the input's bases decide.
    longest: int | None = None
    #: Recompute each stage in the backward pass instead of keeping its activations.
    checkpointing: bool = False

    @classmethod
    def build(cls, settings: Mapping[str, Any], *, bin_size: int, crop: int) -> Self:
        """A trunk with random weights from its settings.

        Args:
            settings: of the architecture; what is left out has its default.
            bin_size: bp per bin of the output.
            crop: bins dropped at each end.

        Raises:
            ModelError: settings that make no trunk.
            TypeError: one that is not among ``defaults``.
        """
        return cls(**settings, bin_size=bin_size, crop=crop)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The settings that ``build`` takes, with their defaults."""
        parameters = inspect.signature(cls).parameters
        return {name: p.default for name, p in parameters.items() if name not in ("bin_size", "crop")}

    def encode(self, codes: Tensor, lengths: Tensor | None = None) -> State:
        """One-hot ``(batch, 4, length)`` as the first state, padded to a multiple of ``stride``.

        Positions at or beyond ``lengths`` are padding; without ``lengths`` those of the PAD codes at the right are.
        """
        length = codes.shape[1]
        lengths = (codes != PAD).sum(1) if lengths is None else lengths
        padded = -(-length // self.stride) * self.stride
        if padded != length:
            codes = nn.functional.pad(codes, (0, padded - length), value=PAD)
        whole = padded == length and bool((lengths == length).all())
        valid = None if whole else torch.arange(padded, device=codes.device)[None] < lengths[:, None]
        return State(one_hot(codes), valid=valid)

    def run(self, state: State, start: str | None = None, stop: str | None = None) -> State:
        """Runs a contiguous slice of the chain: from stage ``start`` (included) to stage ``stop`` (excluded)."""
        names = list(self.stages)
        first = names.index(start) if start is not None else 0
        last = names.index(stop) if stop is not None else len(names)
        for name in names[first:last]:
            stage = self.stages[name]
            if self.checkpointing and torch.is_grad_enabled():
                state = checkpoint(stage, state, use_reentrant=False, context_fn=partial(_recompute, stage))
            else:
                state = stage(state)
        return state

    def forward(self, codes: Tensor, lengths: Tensor | None = None) -> State:
        """Base codes uint8 ``(batch, length)`` to the last state; its ``x`` is ``(batch, channels, bins)``."""
        return self.run(self.encode(codes, lengths))


def _recompute(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a checkpointed stage's two forward passes: BatchNorm counts each batch once."""
    return nullcontext(), _statistics_kept(stage)


@contextmanager
def _statistics_kept(stage: nn.Module) -> Iterator[None]:
    moving = [m for m in stage.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [(m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in moving]
    for module in moving:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, (momentum, count) in zip(moving, before, strict=True):
            module.momentum = momentum
            if module.num_batches_tracked is not None and count is not None:
                module.num_batches_tracked.copy_(count)


def mean_of_valid(state: State) -> Tensor:
    """Mean of ``x`` over the valid positions, ``(batch, channels, 1)``; float32 at least: bf16 cannot count."""
    x = state.x.to(torch.promote_types(state.x.dtype, torch.float32))
    if state.valid is None:
        return x.mean(-1, keepdim=True)
    known = state.valid[:, None].to(x.dtype)
    return (x * known).sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)


class Head(nn.Module):
    """Features to values before the link, for the tracks of one group: a linear layer per bin.

    Args:
        tracks: the tracks, all of one group.
        channels: features per bin.
        pool: "none" keeps the bins; "mean" or "max" pools the valid bins into one, for labels; "attention" takes their
            mean with weights ``softmax(a x)`` over the bins, a learned and zero at first.
        covariates: how many covariates per example join the features.
    """

    def __init__(
        self,
        tracks: TrackTable,
        channels: int,
        pool: Literal["none", "mean", "max", "attention"] = "none",
        covariates: int = 0,
    ) -> None:
        super().__init__()
        self.tracks = tracks
        self.pool: str = pool
        self.link = str(tracks.frame["link"].iloc[0])
        self.out = nn.Conv1d(channels, len(tracks), 1)
        self.attend = nn.Conv1d(channels, 1, 1, bias=False) if pool == "attention" else None
        if self.attend is not None:
            nn.init.zeros_(self.attend.weight)
        self.covariates = nn.Linear(covariates, len(tracks), bias=False) if covariates else None
        if self.covariates is not None:
            nn.init.zeros_(self.covariates.weight)

    def forward(self, state: State, sample: Sample) -> Tensor:
        """``(batch, tracks, bins)`` before the link."""
        x = state.x
        if self.pool == "mean":
            x = mean_of_valid(state)
        elif self.pool == "max":
            x = state.masked(float("-inf")).amax(-1, keepdim=True)
        elif self.attend is not None:
            scores = self.attend(x)
            if state.valid is not None:
                scores = scores.masked_fill(~state.valid[:, None], float("-inf"))
            x = (x * scores.softmax(-1)).sum(-1, keepdim=True)
        values: Tensor = self.out(x)
        if self.covariates is not None:
            if "covariates" not in sample.covariates:
                raise ModelError(
                    "the head was built with covariates and the batch has none",
                    remedy="Use the dataset that the run was prepared with",
                )
            values = values + self.covariates(sample.covariates["covariates"])[:, :, None]
        return values

    @torch.no_grad()
    def start_at(self, means: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
        """Sets the bias so that the untrained head predicts the mean target ``(tracks,)`` of the training data."""
        mean = torch.as_tensor(means, dtype=torch.float64)
        if self.link == "softplus":
            value = torch.log(torch.expm1(mean.clamp(min=1e-3, max=30)))
        elif self.link == "sigmoid":
            value = torch.logit(mean.clamp(1e-3, 1 - 1e-3))
        elif self.link == "softmax":
            value = torch.log(mean.clamp(min=1e-3))
        else:
            value = mean
        self.out.bias.copy_(value)  # type: ignore[union-attr]


def apply_link(values: Tensor, link: str) -> Tensor:
    """Values before the link ``(batch, tracks of one group, bins)`` to predictions on the model's scale."""
    if link == "softplus":
        return nn.functional.softplus(values)
    if link == "sigmoid":
        return values.sigmoid()
    return values.softmax(dim=1) if link == "softmax" else values


def undo_link(predictions: Tensor, link: str) -> Tensor:
    """The inverse of ``apply_link``, up to a constant for a softmax."""
    if link == "softplus":
        return predictions + torch.log(-torch.expm1(-predictions.clamp(min=1e-12)))
    if link == "sigmoid":
        return torch.logit(predictions, eps=1e-7)
    return torch.log(predictions.clamp(min=1e-12)) if link == "softmax" else predictions


def mean_of_haplotypes(values: Tensor, haplotypes: Tensor | None) -> Tensor:
    """The mean over each example's haplotypes, ``(batch, ...)``, of values of distinct ones, ``(sequences, ...)``.

    Args:
        haplotypes: ``Sample.haplotypes``; None where every example is one sequence.
    """
    if haplotypes is None:
        return values
    there = (haplotypes >= 0).to(values.dtype)
    weights = (there / there.sum(1, keepdim=True))[..., *[None] * (values.dim() - 1)]
    return (values[haplotypes.clamp(min=0)] * weights).sum(1)


class SequenceModel(_StaysFrozen):
    """A trunk and its heads.

    ``tracks`` lists the outputs in order: those of the new data first, then pretrained ones that are kept beside them.
    """

    #: Left here by ``adapters.adapt``: the adapter, and what was recorded of the model (``adapters.Adapted``).
    adapter: Any = None
    adapted: Any = None

    def __init__(self, trunk: Trunk, heads: Mapping[str, Head], tracks: TrackTable) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict(dict(heads))
        self.tracks = tracks
        #: Heads of other data that train along.
        self.beside: Beside | None = None
        made = [name for head in heads.values() for name in head.tracks.names]
        self._order = [made.index(name) for name in tracks.names]
        self._in_order = self._order == list(range(len(made)))

    def forward(self, sample: Sample) -> Tensor:
        """Values before the link, ``(batch, tracks, bins)``; a sample that is halfway starts from there."""
        if sample.of_beside:
            assert self.beside is not None  # whose samples they are
            return self.beside(self.trunk, sample)  # type: ignore[no-any-return]
        if sample.halfway is None:
            return self.read(self.trunk(sample.codes, sample.lengths), sample)
        state: State = sample.halfway.state
        if sample.halfway.start is not None:
            state = self.trunk.run(state, start=sample.halfway.start)
        return self.read(state, sample)

    def read(self, state: State, sample: Sample) -> Tensor:
        """The heads on the trunk's last state: values before the link ``(batch, tracks, bins)``."""
        values = [head(state, sample) for head in self.heads.values()]
        joined = values[0] if len(values) == 1 else torch.cat(values, dim=1)
        ordered = joined if self._in_order else joined[:, self._order]
        haplotypes = getattr(sample, "haplotypes", None)  # heads without covariates need no sample
        return ordered if haplotypes is None else self._of_donors(ordered, haplotypes)

    def _of_donors(self, values: Tensor, haplotypes: Tensor) -> Tensor:
        """A donor's prediction is the mean of those of its haplotypes, after the link; here as values before it."""
        links = self.tracks.links
        if set(links) == {"identity"}:
            return mean_of_haplotypes(values, haplotypes)
        mean = mean_of_haplotypes(self.link(values), haplotypes)
        parts = torch.empty_like(mean)
        for index in self.tracks.groups.values():
            parts[:, index] = undo_link(mean[:, index], links[index[0]])
        return parts

    def link(self, values: Tensor) -> Tensor:
        """Predictions on the model's (squashed) scale, ``(batch, tracks, bins)``; computed in float32."""
        values = values.float()
        groups = self.tracks.groups
        links = self.tracks.links
        if len({links[index[0]] for index in groups.values()}) == 1 and links[0] != "softmax":
            return apply_link(values, links[0])
        out = torch.empty_like(values)
        for index in groups.values():
            out[:, index] = apply_link(values[:, index], links[index[0]])
        return out

    def predict(self, sample: Sample) -> Tensor:
        return self.link(self(sample))


class Beside(nn.Module):
    """Heads of other data on the trunk of a model, and the stages that crop it for them.

    Args:
        model: made for the other data; stages with parameters are those of the trunk that is given to ``forward``.
    """

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.heads, self.tracks = model.heads, model.tracks
        stages = model.trunk.stages.items()
        self.crops = nn.ModuleDict({name: stage for name, stage in stages if next(stage.parameters(), None) is None})

    @contextmanager
    def cropping(self, trunk: Trunk) -> Iterator[SequenceModel]:
        """The model of the other data on a trunk, which gives features for it meanwhile."""
        own = {name: trunk.stages[name] for name in self.crops}
        trunk.stages.update(dict(self.crops.items()))
        try:
            yield SequenceModel(trunk, dict(self.heads.items()), self.tracks)  # type: ignore[arg-type]
        finally:
            trunk.stages.update(own)

    def forward(self, trunk: Trunk, sample: Sample) -> Tensor:
        """Values before the link, ``(batch, tracks, bins)``."""
        with self.cropping(trunk) as model:
            return model.read(trunk(sample.codes, sample.lengths), sample)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Exactly what training can change: parameters that take a gradient, and buffers of modules that are not frozen."""
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if not getattr(module, "frozen", False):
            persistent = {
                k: b for k, b in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set
            }
            state |= {f"{prefix}.{name}" if prefix else name: buffer for name, buffer in persistent.items()}
    return {name: state[name].detach() for name in sorted(state)}


def weight_hash(module: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of all weights and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
        digest.update(
            values.view(torch.uint8).numpy().tobytes()
            if values.ndim
            else values.reshape(1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def with_spec(trunk: Trunk, **changes: object) -> None:
    """Replaces facts of a trunk's spec, such as where its weights come from."""
    trunk.spec = replace(trunk.spec, **changes)  # type: ignore[arg-type]
