"""The dry run of a module: what does not fit is found, and what its stages do to positions is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from seqgraft.errors import ModelError, Problems
from seqgraft.models.base import Step
from seqgraft.models.module import ModuleSpec, Sizes, WrappedStage

__all__ = ["Chain", "dry_run", "shapes_alone"]

#: What a module may raise on an input that does not suit it.
_RAISED = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
_SHORTEST = 256  # bp of the dry run, at least
_REACH = (1024, 4096)  # bp in which the reach of a stage is looked for: the second if the first is too short
_ROWS = 16  # sequences at a time while measuring
_TENSORS = 100_000  # of a model, at most: each costs memory, however small it is


class Chain(nn.ModuleDict):
    """The wrapped stages of a trunk, in their order."""

    def items(self) -> Iterable[tuple[str, WrappedStage]]:  # type: ignore[override]
        return super().items()  # type: ignore[return-value]

    def values(self) -> Iterable[WrappedStage]:  # type: ignore[override]
        return super().values()  # type: ignore[return-value]


def dry_run(chain: Chain, spec: ModuleSpec) -> set[str]:
    """Runs the chain, fills in what each stage does to positions, and returns which modules were called.

    Raises:
        ModelError: everything that is wrong with the output, or the first thing that stops the module.
    """
    shortest = max(_SHORTEST, 8 * spec.multiple) + 2 * spec.drops * spec.bin_size
    first = ceil(shortest / spec.multiple) * spec.multiple
    lengths = [spec.window] if spec.window else [first, first + spec.multiple, 2 * first]
    called: set[str] = set()
    hooks = [m.register_forward_pre_hook(lambda *_, n=n: called.add(n)) for n, m in chain.named_modules()]
    try:
        passes = [_states(chain, _sequences(chain, length), spec) for length in lengths]
    finally:
        for hook in hooks:
            hook.remove()
    problems = Problems(ModelError)
    for length, tensors in zip(lengths, passes, strict=True):
        _check_output(tensors[-1], length, spec, problems)
    problems.raise_if_any()
    _check_same(chain, lengths[0], passes[0][-1], spec)
    _check_gradients(chain, lengths[0], spec)
    _set_sizes(chain, lengths, passes, spec)
    if unknown := sorted(set(spec.steps) - set(chain)):
        remedy = f"The stages are {', '.join(chain)}"
        raise ModelError("there are no stages of these names", unknown, where=spec.name, remedy=remedy)
    for name, stage in chain.items():
        stage.steps = _steps(chain, name, stage, spec)
    return called


def _sequences(chain: Chain, length: int, rows: int = 2) -> Tensor:
    """One-hot ``(rows, 4, length)``, always the same."""
    codes = torch.randint(0, 4, (rows, length), generator=torch.Generator().manual_seed(0))
    device = next(chain.parameters()).device
    return nn.functional.one_hot(codes, 4).float().transpose(1, 2).contiguous().to(device)


@torch.no_grad()
def _states(chain: Chain, x: Tensor, spec: ModuleSpec) -> list[Tensor]:
    """The tensors between the stages, the input first."""
    tensors = [x]
    for name, stage in chain.items():
        given = tensors[-1].clone()
        try:
            y: object = stage.features(tensors[-1])
        except _RAISED as error:
            what = f"the module stops at a sequence of {x.shape[-1]} bp ({type(error).__name__}: {error})"
            remedy = "It gets one-hot (batch, 4, length): see ModuleSpec.call, stride and window"
            raise ModelError(what, name, where=spec.name, remedy=remedy) from error
        if not isinstance(y, Tensor) or y.dim() != 3 or len(y) != len(x):
            shown = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            remedy = "Say with ModuleSpec.call how to get (batch, channels, bins) from it"
            raise ModelError(
                "the module gives no tensor (batch, channels, bins)", shown, where=spec.name, remedy=remedy
            )
        if not torch.equal(given, tensors[-1]):
            remedy = "Let it write to a copy"
            raise ModelError("the module changes its input in place", name, where=spec.name, remedy=remedy)
        tensors.append(y)
    return tensors


def _check_output(y: Tensor, length: int, spec: ModuleSpec, problems: Problems) -> None:
    where = f"{spec.name}, {length} bp"
    _, channels, bins = y.shape
    if channels != spec.channels:
        problems.add(
            f"the module gives {channels} channels and the spec says", spec.channels, where=where, remedy="Correct one"
        )
    expected = length // spec.bin_size - 2 * spec.drops
    if bins != expected:
        what = f"the module gives {bins} bins, and with bin_size {spec.bin_size} and drops {spec.drops} it would be"
        problems.add(what, expected, where=where, remedy="Correct bin_size, drops, stride or window")
    if not torch.isfinite(y).all():
        problems.add("the module gives values that are not finite", where=where, remedy="Check its weights")


@torch.no_grad()
def _check_same(chain: Chain, length: int, y: Tensor, spec: ModuleSpec) -> None:
    """The same again, and alone the same as in a batch."""
    x = _sequences(chain, length)
    scale = y.abs().max().clamp(min=torch.finfo(y.dtype).tiny)
    again = _states(chain, x, spec)[-1]
    if float((again - y).abs().max() / scale) > 1e-6:
        remedy = "In eval mode nothing may be random: use nn.Dropout, not functional.dropout without 'training'"
        raise ModelError("the module gives something else when it is run again", where=spec.name, remedy=remedy)
    alone = torch.cat([_states(chain, row[None], spec)[-1] for row in x])
    if (change := float((alone - y).abs().max() / scale)) > 1e-4:
        remedy = "In eval mode nothing may be computed across a batch: BatchNorm needs its running statistics"
        what = "what a sequence gives depends on the batch that it is in, by a fraction of"
        raise ModelError(what, change, where=spec.name, remedy=remedy)


def _check_gradients(chain: Chain, length: int, spec: ModuleSpec) -> None:
    """Every parameter takes part: what does not cannot be trained, and is most likely a head that was left on."""
    parameters = dict(chain.named_parameters())
    wanted = {name: p.requires_grad for name, p in parameters.items()}
    chain.requires_grad_(True)
    try:
        with torch.enable_grad():
            x = _sequences(chain, length, rows=1)
            for stage in chain.values():
                x = stage.features(x)
            gradients = (
                torch.autograd.grad(x.sum(), list(parameters.values()), allow_unused=True)
                if x.requires_grad
                else [None] * len(parameters)
            )
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
    if unused := [n for n, g in zip(parameters, gradients, strict=True) if g is None]:
        remedy = "Take out what comes after the features (module.head = None), and let gradients through"
        raise ModelError("these parameters have no effect on the output", unused[:10], where=spec.name, remedy=remedy)


def _set_sizes(chain: Chain, lengths: list[int], passes: list[list[Tensor]], spec: ModuleSpec) -> None:
    """How many positions each tensor of the chain has, from three inputs; of one input if only that length is taken."""
    sizes: list[Sizes] = []
    for i in range(len(chain) + 1):
        found = [tensors[i].shape[-1] for tensors in passes]
        if len(lengths) == 1:
            sizes.append(Sizes(Fraction(found[0], lengths[0]), 0))
            continue
        scale = Fraction(found[1] - found[0], lengths[1] - lengths[0])
        size = Sizes(scale, int(scale * lengths[0]) - found[0])
        if not scale or any(size.of(n) != m for n, m in zip(lengths, found, strict=True)):
            what = f"its positions do not follow from the length ({lengths} bp give {found})"
            raise ModelError(what, list(chain)[i - 1], where=spec.name, remedy="Correct stride, or give window")
        sizes.append(size)
    for i, stage in enumerate(chain.values()):
        stage.before, stage.after = sizes[i], sizes[i + 1]
        values = passes[0][i + 1].detach().float().cpu().contiguous().numpy().tobytes()
        stage.fingerprint = hashlib.sha256(values).hexdigest()


# ---- what a stage does along the positions ----


def _steps(chain: Chain, name: str, stage: WrappedStage, spec: ModuleSpec) -> tuple[Step, ...] | None:
    """The steps that the spec declares, checked; else measured: None for what is global or reaches too far to say."""
    given = spec.steps.get(name)
    if name in spec.steps and given is None:
        return None
    spans: dict[int, tuple[int, int]] | None = None
    for window in [spec.window] if spec.window else _REACH:
        length = ceil((window + 2 * spec.drops * spec.bin_size) / spec.multiple) * spec.multiple
        x = _states(chain, _sequences(chain, length, rows=1), spec)[list(chain).index(name)]
        if (spans := _spans(stage, x)) is not None:
            break
    if given is not None:
        _check_steps(name, given, spans, spec)
        return given
    return _fitted(stage, spans) if spans else None


@torch.no_grad()
def _spans(stage: WrappedStage, x: Tensor) -> dict[int, tuple[int, int]] | None:
    """Input position -> output positions that it reaches; None if that is as far as an end, or none at all.

    Not a number in one position spreads to all that is computed from it, whatever weights and ReLUs make of the rest;
    what compares instead of computing stops it, so that noise is tried as well.
    """
    middle, length = x.shape[-1] // 2, x.shape[-1]
    places = range(middle, min(length, middle + max(1, (stage.before.scale / stage.after.scale).numerator)))
    plain = stage.features(x)
    noise = 3 * torch.randn(x.shape[1], generator=torch.Generator().manual_seed(1)).to(x.device)
    found: dict[int, tuple[int, int]] = {}
    for start in range(0, len(places), _ROWS):
        chunk = places[start : start + _ROWS]
        for value in (torch.full_like(noise, float("nan")), noise):
            inputs = x.repeat(len(chunk), 1, 1)
            for row, place in enumerate(chunk):
                inputs[row, :, place] = value
            y = stage.features(inputs)
            moved = (y.isnan() | ((y - plain).abs() > 1e-5 * plain.abs().max())).any(1)
            for row, place in enumerate(chunk):
                if len(hit := moved[row].nonzero()):
                    low, high = found.get(place, (y.shape[-1], 0))
                    found[place] = min(low, int(hit.min())), max(high, int(hit.max()) + 1)
    if len(found) < len(places):
        return None
    edge = any(low == 0 or high == plain.shape[-1] for low, high in found.values())
    return None if edge else found


def _fitted(stage: WrappedStage, spans: Mapping[int, tuple[int, int]]) -> tuple[Step, ...] | None:
    """Convolution, pooling and crop, or upsampling, convolution and crop, no wider than what was found."""
    ratio = stage.after.scale / stage.before.scale
    up, pool = ratio.numerator, ratio.denominator
    dropped = stage.after.drops - stage.before.drops * ratio
    crop, odd = divmod(dropped, 2)
    if (up > 1 and pool > 1) or odd or crop < 0:
        return None
    radius = 0
    for place, (low, high) in spans.items():
        if pool > 1 or up == 1:
            radius = max(radius, place - (low + crop + 1) * pool + 1, (high + crop - 1) * pool - place)
        else:
            radius = max(radius, place * up - low - crop, high + crop - (place + 1) * up)
    conv = (Step("conv", 2 * radius + 1),)
    steps = (*conv, Step("pool", pool)) if pool > 1 else (Step("up", up), *conv) if up > 1 else conv
    return (*steps, Step("crop", int(crop))) if crop else steps


def _check_steps(
    name: str, steps: tuple[Step, ...], spans: Mapping[int, tuple[int, int]] | None, spec: ModuleSpec
) -> None:
    if spans is None:
        remedy = "Leave it out, and it is measured, or declare None"
        raise ModelError(
            "the stage reaches as far as the ends, and steps are declared", name, where=spec.name, remedy=remedy
        )
    for place, (low, high) in spans.items():
        claim = place, place + 1
        for step in steps:
            claim = step.touched(claim)
        if not (claim[0] <= low and high <= claim[1]):
            what = f"the steps of the stage {name!r} say that position {place} reaches {claim}, and it reaches"
            raise ModelError(what, (low, high), where=spec.name, remedy="Correct the steps, or leave them out")


@contextmanager
def shapes_alone(most: int, where: object) -> Iterator[None]:
    """Modules that are built within have shapes and no numbers; building ends where they would have too many.

    Args:
        most: numbers of all tensors together.
        where: what asks for the modules, for the message.

    Raises:
        ModelError: too many, or settings of which no module can be built.
    """
    numbers, tensors = 0, 0

    def count(_: nn.Module, __: str, tensor: Tensor | None) -> None:
        nonlocal numbers, tensors
        numbers, tensors = numbers + (0 if tensor is None else tensor.numel()), tensors + 1
        if numbers > most or tensors > _TENSORS:
            what = f"its settings ask for a model of more than {most:,} numbers or {_TENSORS:,} tensors"
            raise ModelError(what, where=where, remedy="Do not use it; ask who made it")

    hooks = register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    except (*_RAISED, ArithmeticError) as error:
        what, remedy = f"no model can be built of its settings ({error})", "Ask who made it"
        raise ModelError(what, where=where, remedy=remedy) from error
    finally:
        for hook in hooks:
            hook.remove()
