"""Predictions of edited windows: only what an edit can change is computed again.

::

    bases -> stem, tower ------> transformer ------> upsampling, crop, final -> heads
             the prefix:         whole, per          the tail: the positions under
             patches of edits    alternate           the bins that are asked for

A convolution sees a few hundred bases, so that an edit changes a few positions of the tower's output. The reference
window passes the tower once; of an alternate only a patch does, and is put in place. From the first global stage on
everything changes; after the last one, only what the asked bins are computed from is. A chain without a global stage
computes the bins that an edit reaches. All of it is exact, to the rounding of float32.

What an interval touches and needs is what the stages say (``Stage.touched``, ``Stage.needed``). A slice of a window
gives what the window gives because local stages do the same at every position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seqgraft.adapters.bottleneck import SqueezeExcite
from seqgraft.errors import ModelError
from seqgraft.models.base import Head, SequenceModel, Span, Stage, State, Step, Trunk
from seqgraft.sample import Sample
from seqgraft.sequence import PAD

__all__ = ["Recompute", "Reference"]

#: Of the largest value: how much a stage on a slice of random bases may differ from the stage on all of them.
_TOLERANCE = 1e-4


@dataclass(eq=False, slots=True)
class Reference:
    """A window, and what predictions of its alternates start from.

    Attributes:
        codes: uint8 ``(length,)``.
        state: after the prefix, batch 1, what later stages read of it; None where everything is computed again.
        after: after the last global stage, once it was needed; without the skips that are in ``state``.
        values: predictions of all bins ``(tracks, bins)``, once they were needed, where no stage is global.
    """

    codes: Tensor
    state: State | None
    after: State | None = field(default=None, repr=False)
    values: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class _Edited:
    """A tensor ``(channels, positions)`` with a patch over it from ``start`` on; copied where it is read, only."""

    base: Tensor
    start: int = 0
    patch: Tensor | None = None

    def laid_over(self, row: Tensor, span: Span) -> None:
        """Writes the patch over ``row``, a copy of the positions ``span``."""
        if self.patch is None:
            return
        first, last = max(span[0], self.start), min(span[1], self.start + self.patch.shape[-1])
        if first < last:
            row[:, first - span[0] : last - span[0]] = self.patch[:, first - self.start : last - self.start]


def _read(tensors: Sequence[_Edited], span: Span | None = None) -> Tensor:
    """``(batch, channels, positions)`` within the span, or all."""
    span = span or (0, tensors[0].base.shape[-1])
    stacked = torch.stack([tensor.base[:, slice(*span)] for tensor in tensors])
    for row, tensor in zip(stacked, tensors, strict=True):
        tensor.laid_over(row, span)
    return stacked


class Recompute:
    """Predictions of windows and of their alternates, exact to rounding, on the model's squashed scale.

    The chain is cut once: the *prefix*, local stages before the first global one or crop; the *tail*, the stages at
    the end that convolve, upsample, read skips and crop; what is between runs whole. The model runs in eval mode,
    without gradients, where it is; it keeps its mode.

    Args:
        local: False computes everything again, as ``model.predict`` does.

    Attributes:
        in_words: what is computed of an alternate, or why everything is.
    """

    def __init__(self, model: SequenceModel, *, local: bool = True) -> None:
        self.model = model
        stages: list[tuple[str, Stage]] = list(model.trunk.stages.items())  # type: ignore[arg-type]
        first = next((i for i, (_, s) in enumerate(stages) if not s.local or _has(s, "crop")), len(stages))
        last = max([first, *(i + 1 for i, (_, s) in enumerate(stages) if i >= first and not _in_tail(s))])
        chain = [stage for _, stage in stages]
        self._prefix, self._middle, self._tail = chain[:first], chain[first:last], chain[last:]
        self._per_bin = all(type(head) is Head and head.pool == "none" for head in model.heads.values())
        pools = [step.size for stage in self._prefix for step in stage.steps or () if step.kind == "pool"]
        self._align = math.lcm(model.trunk.stride, math.prod(pools))
        reason = "it was asked for" if not local else _not_a_chain(model)
        if not reason and (placed := self._placed()):
            reason = f"{placed} does not do the same at every position"
        self._whole = bool(reason)
        self.in_words = f"everything, because {reason}" if reason else _in_words(stages, first, last, self._per_bin)

    def reference(self, codes: Tensor) -> Reference:
        """Runs the prefix on a window, uint8 ``(length,)``."""
        codes = codes.to(next(self.model.parameters()).device)
        if self._whole or len(codes) % self._align or (codes == PAD).any():
            return Reference(codes, None)
        with self._running():
            state = _run(self._prefix, self.model.trunk.encode(codes[None]))
        return Reference(codes, State(state.x, _only(state.skips, self._middle + self._tail)))

    def predict_reference(self, reference: Reference, bins: Span | None = None) -> Tensor:
        """Predictions of the window, ``(tracks, bins)``; ``bins`` of the model's output, all if None."""
        with self._running():
            if reference.state is None or not self._middle:
                return _within(self._known(reference), bins).clone()
            if reference.after is None:
                skips = _only(reference.state.skips, self._middle)
                reference.after = _run(self._middle, State(reference.state.x, skips))
            x, skips = reference.after.x, {**reference.state.skips, **reference.after.skips}
            return self._predictions(x, 0, x.shape[-1], [_plain(skips, 0)], bins)[0]

    def predict(self, reference: Reference, codes: Tensor, bins: Sequence[Span] | None = None) -> Tensor:
        """Predictions of alternates of the window, ``(n, tracks, width)``; memory is that of a batch of ``n``.

        Args:
            codes: uint8 ``(n, length)``. An edit is whatever differs from the reference, from the first position that
                does to the last: substitutions, indels (whose right side moves), haplotypes.
            bins: of the model's output, one span per alternate, all equally wide; all bins if None.

        Raises:
            ModelError: windows of another length; spans of unequal widths, beyond the output, or too few.
        """
        codes = codes.to(reference.codes.device)
        if codes.dim() != 2 or not len(codes) or codes.shape[1] != len(reference.codes):
            what = f"alternates must be one or more windows of {len(reference.codes)} bp, as their reference is"
            raise ModelError(what, tuple(codes.shape))
        if bins is not None and (len(bins) != len(codes) or len({stop - start for start, stop in bins}) > 1):
            raise ModelError(f"{len(codes)} alternates need as many spans of bins, all equally wide", list(bins))
        asked = [None] * len(codes) if bins is None else list(bins)
        with self._running():
            if self._whole or reference.state is None or (codes == PAD).any():
                values = self.model.predict(_sample(codes))
                return torch.stack([_within(row, span) for row, span in zip(values, asked, strict=True)])
            edits = [_edit(reference.codes, row) for row in codes]
            edited = self._edited(reference.state, codes, edits)
            if self._middle:
                return self._later(edited, asked)
            return self._reached(self._known(reference), edited, edits, asked)

    # ---- the prefix ----

    def _edited(self, state: State, codes: Tensor, edits: Sequence[Span]) -> list[dict[str, _Edited]]:
        """The tensors after the prefix of each alternate: the reference's, and a patch over what the edit touches."""
        tensors, length = {"x": state.x[0], **{name: skip[0] for name, skip in state.skips.items()}}, codes.shape[1]
        touched, crops = [], []
        for edit in edits:
            spans = {name: span for name, span in _touched(self._prefix, edit).items() if name in tensors}
            touched.append({name: _clip(span, tensors[name].shape[-1]) for name, span in spans.items()})
            start, stop = _clip(_needed(self._prefix, touched[-1])["x"], length)
            crops.append((start // self._align * self._align, -(-stop // self._align) * self._align))
        edited: list[dict[str, _Edited]] = [{} for _ in edits]
        for members in _of_like_width(crops):
            width = max(crops[i][1] - crops[i][0] for i in members)
            starts = [min(crops[i][0], length - width) for i in members]
            cut = torch.stack([codes[i, at : at + width] for i, at in zip(members, starts, strict=True)])
            patches = _run(self._prefix, self.model.trunk.encode(cut))
            for row, (i, at) in enumerate(zip(members, starts, strict=True)):
                for name, base in tensors.items():
                    start, stop = touched[i][name]
                    origin = at * base.shape[-1] // length  # of the crop, in this tensor's positions
                    patch = (patches.x if name == "x" else patches.skips[name])[row, :, start - origin : stop - origin]
                    edited[i][name] = _Edited(base, start, patch)
        return edited

    def _placed(self) -> str:
        """The stage that runs on slices and depends on where it is, such as by embeddings of absolute positions, or "".

        Tried on random bases, all stages but crops.
        """
        encode, chain = self.model.trunk.encode, self._prefix + self._middle + self._tail
        start, stop = _needed(self._prefix, _touched(self._prefix, (0, 1)))["x"]
        length = -(-max(4 * (stop - start), 256, 8 * self._align) // self._align) * self._align
        codes = torch.randint(0, 4, (1, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        with self._running():
            state = encode(codes.to(next(self.model.parameters()).device))
            if state.x.shape[-1] != length:
                return "encoding"
            for name, stage in zip(self.model.trunk.stages, chain, strict=True):
                if _has(stage, "crop") and _in_tail(stage):
                    continue
                after = stage(state)
                if stage not in self._middle and not _same_in_slices(stage, state, after):
                    return name
                state = after
        return ""

    # ---- the middle and the tail ----

    def _later(self, edited: Sequence[Mapping[str, _Edited]], asked: Sequence[Span | None]) -> Tensor:
        """Predictions where a stage is global: all of it, and then what each span of bins needs."""
        names = ["x", *{name for stage in self._middle for name in stage.reads} & edited[0].keys()]
        whole = {name: _read([tensors[name] for tensors in edited]) for name in names}
        last = self._middle[-1]
        narrows = type(last).at is not Stage.at
        state = _run(self._middle[:-1] if narrows else self._middle, State(whole.pop("x"), whole))
        length = state.x.shape[-1]
        rows: dict[int, Tensor] = {}
        for bins in dict.fromkeys(asked):
            members = [i for i, span in enumerate(asked) if span == bins]
            x, start = state.x if len(members) == len(asked) else state.x[members], 0
            if narrows:
                start, stop = self._needs(bins, length)
                x = last.at(State(x), (start, stop)).x
            skips = [{**edited[i], **_plain(state.skips, i)} for i in members]
            rows |= zip(members, self._predictions(x, start, length, skips, bins), strict=True)
        return torch.stack([rows[i] for i in range(len(asked))])

    def _reached(
        self, known: Tensor, edited: Sequence[dict[str, _Edited]], edits: Sequence[Span], asked: Sequence[Span | None]
    ) -> Tensor:
        """Predictions where every stage is local: the reference's ``known`` ones, but for bins that an edit reaches."""
        rows = []
        for tensors, edit, bins in zip(edited, edits, asked, strict=True):
            row, (first, last) = _within(known, bins).clone(), bins or (0, known.shape[-1])
            reached = _touched([*self._prefix, *self._tail], edit)["x"] if self._per_bin else (first, last)
            start, stop = max(first, reached[0]), min(last, reached[1])
            if start < stop:
                length = tensors["x"].base.shape[-1]
                needs = self._needs((start, stop), length)
                x = _read([tensors["x"]], needs)
                part = self._predictions(x, needs[0], length, [tensors], (start, stop))[0]
                row[:, start - first : stop - first] = part
            rows.append(row)
        return torch.stack(rows)

    def _known(self, reference: Reference) -> Tensor:
        """Predictions of all bins of a reference, which it keeps."""
        if reference.values is None:
            sample = _sample(reference.codes[None])
            state = None if reference.state is None else _run(self._tail, reference.state)
            link, model = self.model.link, self.model
            reference.values = (model.predict(sample) if state is None else link(model.read(state, sample)))[0]
        return reference.values

    def _features(self, bins: Span | None, length: int) -> Span:
        """Bins of the trunk's output that the heads read for the asked ones, from ``length`` positions at the tail."""
        for stage in self._tail:
            crops = sum(step.size for step in _steps(stage) if step.kind == "crop")
            length = _moved(stage, (0, length))[1] - 2 * crops
        return (0, length) if bins is None or not self._per_bin else _checked(bins, length)

    def _needs(self, bins: Span | None, length: int) -> Span:
        """Positions at the tail's start, of ``length``, that the asked bins are computed from."""
        return _clip(_needed(self._tail, {"x": self._features(bins, length)})["x"], length)

    def _predictions(
        self, x: Tensor, start: int, length: int, skips: Sequence[Mapping[str, _Edited]], bins: Span | None
    ) -> Tensor:
        """Tail and heads for the asked bins, ``(batch, tracks, width)``.

        Args:
            x: what is needed at the tail's start, or more, from position ``start`` on of ``length``.
            skips: of each alternate, whole.
        """
        span, where = self._features(bins, length), self._needs(bins, length)
        x = x[..., where[0] - start : where[1] - start]
        for stage in self._tail:
            if _has(stage, "crop"):
                for step in _steps(stage):
                    kept = max(where[0], step.size), min(where[1], length - step.size)
                    x = x[..., kept[0] - where[0] : kept[1] - where[0]]
                    where, length = (kept[0] - step.size, kept[1] - step.size), length - 2 * step.size
            else:
                joined = {
                    name: _read([one[name] for one in skips], _moved(stage, where, after))
                    for name, after in stage.reads.items()
                }
                x = stage(State(x, joined)).x
                where, length = _moved(stage, where), _moved(stage, (0, length))[1]
        x = x[..., span[0] - where[0] : span[1] - where[0]]
        values = self.model.link(self.model.read(State(x), _sample(torch.empty(len(x), 0, device=x.device))))
        return values if self._per_bin else _within(values, bins)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """In eval mode and without gradients."""
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if was_training:
                self.model.train()


# ---- the chain ----


def _steps(stage: Stage) -> tuple[Step, ...]:
    assert stage.steps is not None
    return stage.steps


def _has(stage: Stage, *kinds: str) -> bool:
    return any(step.kind in kinds for step in stage.steps or ())


def _in_tail(stage: Stage) -> bool:
    """Can it run on a slice whose place is followed through it? It crops and does nothing else, or does not crop."""
    if not stage.local or stage.writes or _has(stage, "pool"):
        return False
    return not _has(stage, "crop") or (not _has(stage, "conv", "up") and not stage.reads)


def _moved(stage: Stage, span: Span, steps: int | None = None) -> Span:
    """Where a slice lies after the first ``steps`` steps of a stage that does not crop, or all of them.

    Its ends must be multiples of what the stage pools.
    """
    start, stop = span
    for step in _steps(stage)[:steps]:
        if step.kind == "up":
            start, stop = start * step.size, stop * step.size
        elif step.kind == "pool":
            start, stop = start // step.size, stop // step.size
    return start, stop


def _same_in_slices(stage: Stage, before: State, after: State) -> bool:
    """Does a local stage give, on a slice from the middle of its input, what it gives there on all of it?"""
    wanted = {"x": after.x, **{name: after.skips[name] for name in stage.writes}}
    spans = {name: (tensor.shape[-1] // 2, tensor.shape[-1] // 2 + 1) for name, tensor in wanted.items()}
    pools = math.prod(step.size for step in _steps(stage) if step.kind == "pool")
    start, stop = _clip(stage.needed(spans)["x"], before.x.shape[-1])
    where = start // pools * pools, -(-stop // pools) * pools
    read = {name: before.skips[name][..., slice(*_moved(stage, where, n))] for name, n in stage.reads.items()}
    part = stage(State(before.x[..., slice(*where)], read))
    for name, tensor in wanted.items():
        first = _moved(stage, where, stage.writes.get(name))[0]
        found = (part.x if name == "x" else part.skips[name])[..., spans[name][0] - first : spans[name][1] - first]
        if not (found - tensor[..., slice(*spans[name])]).abs().max() <= _TOLERANCE * tensor.abs().max():
            return False
    return True


def _touched(stages: Sequence[Stage], edit: Span) -> dict[str, Span]:
    spans = {"x": edit}
    for stage in stages:
        spans = stage.touched(spans)
    return spans


def _needed(stages: Sequence[Stage], spans: Mapping[str, Span]) -> dict[str, Span]:
    found = dict(spans)
    for stage in reversed(stages):
        found = stage.needed(found)
    return found


def _run(stages: Sequence[Stage], state: State) -> State:
    for stage in stages:
        state = stage(state)
    return state


def _only(skips: Mapping[str, Tensor], stages: Sequence[Stage]) -> dict[str, Tensor]:
    """The skips that the stages read."""
    read = {name for stage in stages for name in stage.reads}
    return {name: skip for name, skip in skips.items() if name in read}


def _not_a_chain(model: SequenceModel) -> str:
    """Why slices of a window cannot be run, if so."""
    if type(model.trunk).forward is not Trunk.forward or type(model.trunk).run is not Trunk.run:
        return "the trunk does not run as a plain chain of stages"
    if any(getattr(type(model), name) is not getattr(SequenceModel, name) for name in ("forward", "read", "predict")):
        return "the model does more than its trunk and heads"
    if model.trunk.spec.length is not None:
        return f"the trunk takes windows of {model.trunk.spec.length} bp only"
    return ""


def _in_words(stages: Sequence[tuple[str, Stage]], first: int, last: int, per_bin: bool) -> str:
    names = [name for name, _ in stages]
    parts = [f"{_range(names[:first])} on patches around edits"] if first else []
    if first < last:
        parts.append(f"{_range(names[first:last])} whole")
        if any(isinstance(module, SqueezeExcite) for module in stages[first][1].modules()):
            parts[-1] += f" (squeeze-excitation in {names[first]} reads the whole window)"
    after = f"{_range(names[last:])} and the heads" if last < len(stages) else "the heads"
    where = "what the bins asked for need" if first < last else "the bins that edits reach"
    parts.append(f"{after} on {where if per_bin else 'all bins, which a head pools'}")
    return "; ".join(parts)


def _range(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


# ---- windows and spans ----


def _sample(codes: Tensor) -> Sample:
    lengths = (codes != PAD).sum(-1)
    nothing = torch.zeros(len(codes), 0, 0, device=codes.device)
    return Sample(codes, lengths, lengths, nothing, nothing)


def _edit(before: Tensor, after: Tensor) -> Span:
    """From the first position that differs to the last; the first base if none does."""
    where = (before != after).nonzero()
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 1)


def _clip(span: Span, length: int) -> Span:
    return max(0, span[0]), min(length, span[1])


def _checked(bins: Span, total: int) -> Span:
    if not 0 <= bins[0] < bins[1] <= total:
        raise ModelError(f"the bins are not among the {total} that the model gives", bins)
    return bins


def _within(values: Tensor, bins: Span | None) -> Tensor:
    """The asked bins of the last axis."""
    return values if bins is None else values[..., slice(*_checked(bins, values.shape[-1]))]


def _of_like_width(crops: Sequence[Span]) -> list[list[int]]:
    """Which crops run together: those whose widths have as many binary digits, so that none doubles."""
    groups: dict[int, list[int]] = {}
    for i, (start, stop) in enumerate(crops):
        groups.setdefault((stop - start - 1).bit_length(), []).append(i)
    return list(groups.values())


def _plain(skips: Mapping[str, Tensor], row: int) -> dict[str, _Edited]:
    return {name: _Edited(skip[row]) for name, skip in skips.items()}
