"""What a training step holds in memory: bytes counted while it runs, or without computing anything.

Without computing, every tensor is a shape and a type without data (torch's fake tensors). Allocation follows from
shapes alone, so the count is that of the real step, in seconds also for half a megabase.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqgraft.adapters.base import adapted_of
from seqgraft.models.base import SequenceModel, State
from seqgraft.objectives import Objective
from seqgraft.predict import Precision, autocast
from seqgraft.sample import Sample

__all__ = [
    "FrozenBytes",
    "LiveBytes",
    "bytes_per_row",
    "bytes_without_computing",
    "storage_bytes",
    "tensors_of",
    "training_step",
]

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations make, as long as they live; ``peak`` is the most at one time.

    Args:
        beside: tensors that are there already: views of them are nothing new.
    """

    def __init__(self, beside: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in beside}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, key, storage.nbytes()).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class FrozenBytes:
    """What the frozen tensors of an adapted trunk hold, all of them counted, and what they held before quantisation."""

    now: int
    before: int

    @classmethod
    def of(cls, model: SequenceModel) -> FrozenBytes:
        adapted = adapted_of(model)
        trains = {name for name, group in adapted.groups.items() if group != "adapter"}  # a head for tokens is inside
        own = sum(p.nbytes for name, p in model.trunk.named_parameters("trunk") if name in trains)
        now = storage_bytes(tensor for tensor in tensors_of(model.trunk) if not tensor.requires_grad)
        return cls(now, adapted.trunk_bytes - own)

    @property
    def quantised(self) -> bool:
        return self.now < self.before


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and what quantised weights have beside them: scales, tables of values, other views."""
    yield from module.parameters()
    yield from module.buffers()
    for inner in module.modules():
        if _is_quantiser(inner):
            yield from _beside(inner)
            yield from _beside(inner.weight)


def _is_quantiser(thing: object) -> bool:
    return type(thing).__module__.startswith("bitsandbytes.")


def _beside(thing: object) -> Iterator[Tensor]:
    for value in vars(thing).values():
        if isinstance(value, Tensor):
            yield value
        elif _is_quantiser(value) and not isinstance(value, nn.Module):
            yield from _beside(value)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, those that share memory counted once."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def training_step(model: SequenceModel, objective: Objective, sample: Sample, precision: Precision) -> Tensor:
    """The loss of one step; its ``backward`` is the other half."""
    with autocast(precision, sample.codes.device):
        totals = objective(model, sample)
    return (totals / objective.weigh(sample).clamp(min=1e-12)).sum()


def bytes_per_row(model: SequenceModel, objective: Objective, samples: Sequence[Sample], precision: Precision) -> int:
    """What the second region of a batch adds to the bytes of a training step: activations and their gradients.

    Args:
        samples: one region, and two copies of it.
    """
    for parameter in model.parameters():  # here already, so that they are no part of what is counted
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    kept, peaks = [], []
    for sample in samples:
        with (live := LiveBytes()):
            loss = training_step(model, objective, sample, precision)
            kept.append(live.now)  # waits for the backward pass
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
        peaks.append(live.peak)
    model.zero_grad(set_to_none=True)
    # where the gradient of one weight matrix is the larger, the peak grows less than the activations do
    return max(kept[1] - kept[0], peaks[1] - peaks[0])


def bytes_without_computing(
    model: SequenceModel, objective: Objective, samples: Sequence[Sample], precision: Precision
) -> int | None:
    """``bytes_per_row`` of a model on CPU or on the meta device from shapes alone; the model stays as it is.

    Args:
        samples: with real base codes, on CPU: one region, and two copies of it.

    Returns:
        None where shapes do not say it: a module looks at values, or weights are more than a tensor (packed ones of a
        quantised base).
    """
    if any(type(parameter) is not nn.Parameter for parameter in model.parameters()):
        return None
    states = [model.trunk.encode(sample.codes, sample.lengths) for sample in samples]
    with FakeTensorMode(allow_non_fake_inputs=True):
        memo = {id(tensor): _shaped(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        hollow = copy.deepcopy(model, memo)
        first = {len(state.x): state for state in states}

        def encode(codes: Tensor, lengths: Tensor | None = None) -> State:  # noqa: ARG001  (whether it is padding is data)
            state = first[len(codes)]
            skips = {name: _shaped(skip) for name, skip in state.skips.items()}
            return State(_shaped(state.x), skips, None if state.valid is None else _shaped(state.valid))

        hollow.trunk.encode = encode  # type: ignore[method-assign]
        try:
            return bytes_per_row(hollow, objective, [_shaped_sample(sample) for sample in samples], precision)
        except _NEEDS_VALUES:
            return None


def _shaped(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type on CPU, without data where it is made under ``FakeTensorMode``."""
    made = torch.empty_like(tensor, device="cpu", requires_grad=False)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _shaped_sample(sample: Sample) -> Sample:
    def shaped(values: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: _shaped(value) for name, value in values.items()}

    tensors = {name: getattr(sample, name) for name in ("codes", "lengths", "row", "targets", "mask")}
    hidden = None if sample.hidden is None else replace(sample.hidden, **shaped(vars(sample.hidden)))
    return replace(sample, **shaped(tensors), covariates=shaped(sample.covariates), hidden=hidden)
