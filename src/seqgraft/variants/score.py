"""Scores of checked variants: reference and alternate windows through the model, read by scorers.

Variants are sorted by the window that they are read in, so that those of one window share its reference pass; scores
come back in the order of the variants. What a variant scores depends on itself, the model and the settings alone, but
for the rounding of sums, which differs between batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqgraft.data.augment import Augmentation, View
from seqgraft.errors import ConfigError, ModelError
from seqgraft.genes import signal_table
from seqgraft.genome import Interval, Variant
from seqgraft.local import Recompute
from seqgraft.models.base import SequenceModel
from seqgraft.predict import FORWARD_ONLY, Precision, autocast
from seqgraft.progress import steps
from seqgraft.sample import Sample
from seqgraft.sequence import Codes, reverse_complement
from seqgraft.tracks import unsquash
from seqgraft.variants.over import Centre, Over, Window
from seqgraft.variants.place import Alignment, Layout, Site, Span, align, alternate
from seqgraft.variants.scorers import Difference, Log2FoldChange, Scorer, effects, scaled

__all__ = ["Scores", "VariantConfig", "VariantScorer"]


@dataclass(frozen=True)
class VariantConfig:
    """How variants are scored.

    Attributes:
        scorers: one or more; by default the log2 fold change, for labels the difference.
        over: what they read; by default the bins around the variant, for labels the window.
        ensemble: views to average over: both strands, shifts.
        average: "raw" averages the views' predictions in raw units; "baskerville" does as Baskerville's scripts: the
            strands on the model's scale, then the scores of the shifts.
        batch_size: alternates per forward pass.
        merge_strands: one score for the two strands of a pair, which ``scorer.strands`` says how to add up.
        stitch: keep the bins right of an indel in step, with a second alternate.
        local: compute only what a variant can change; False runs whole windows.
        rename: chromosome in the VCF -> name in the FASTA.
        allow_skipped: score the rest of a file of which more than 1 % cannot be scored.
    """

    scorers: tuple[Scorer, ...] = ()
    over: Over | None = None
    ensemble: Augmentation = FORWARD_ONLY
    average: Literal["raw", "baskerville"] = "raw"
    batch_size: int = 16
    merge_strands: bool = False
    stitch: bool = False
    local: bool = True
    rename: Mapping[str, str] = field(default_factory=dict)
    allow_skipped: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError("must be 1 or more", self.batch_size, where="batch_size", remedy="Give a positive number")
        labels = [scorer.label for scorer in self.scorers]
        if len(set(labels)) < len(labels):
            raise ConfigError("two scorers have one name", labels, where="scorers", remedy="Keep one of them")

    def resolved(self, layout: Layout) -> VariantConfig:
        """With the defaults that suit what the model predicts."""
        label = layout.bins == 1
        scorers: tuple[Scorer, ...] = (Difference() if label else Log2FoldChange(),)
        return replace(self, scorers=self.scorers or scorers, over=self.over or (Window() if label else Centre()))


class _Predictor(Protocol):
    """Predictions on the model's squashed scale of windows and of their alternates."""

    @property
    def in_words(self) -> str:
        """What is computed of an alternate."""

    def references(self, codes: Tensor) -> Sequence[Any]:
        """What is kept of each of ``(windows, length)`` base codes."""

    def read(self, reference: Any, bins: Span) -> Tensor:
        """``(tracks, stop - start)`` of a window."""

    def alternates(self, references: Sequence[Any], codes: Tensor, bins: Sequence[Span]) -> Tensor:
        """``(n, tracks, width)`` of ``(n, length)`` alternates, each of its reference, read at spans of one width."""


class _Whole:
    """Every window and alternate is computed whole, in batches."""

    in_words = "everything"

    def __init__(self, model: SequenceModel) -> None:
        self.model = model

    def _predict(self, codes: Tensor) -> Tensor:
        count, length = codes.shape
        none = torch.zeros((count, 0, 0), device=codes.device)
        row = torch.zeros(count, dtype=torch.int64, device=codes.device)
        return self.model.predict(Sample(codes, torch.full_like(row, length), row, none, none.bool()))

    def references(self, codes: Tensor) -> Sequence[Tensor]:
        return self._predict(codes).unbind()

    def read(self, reference: Tensor, bins: Span) -> Tensor:
        return reference[:, slice(*bins)]

    def alternates(self, references: Sequence[Any], codes: Tensor, bins: Sequence[Span]) -> Tensor:  # noqa: ARG002
        values = self._predict(codes)
        return torch.stack([v[:, slice(*span)] for v, span in zip(values, bins, strict=True)])


class _Local:
    """What an edit cannot change is computed once, with the reference (``seqgraft.local``)."""

    def __init__(self, model: SequenceModel) -> None:
        self.recompute = Recompute(model)
        self.in_words = self.recompute.in_words

    def references(self, codes: Tensor) -> Sequence[Any]:
        return [self.recompute.reference(window) for window in codes]

    def read(self, reference: Any, bins: Span) -> Tensor:
        return self.recompute.predict_reference(reference, bins)

    def alternates(self, references: Sequence[Any], codes: Tensor, bins: Sequence[Span]) -> Tensor:
        parts, start = [], 0
        for stop in range(1, len(references) + 1):
            if stop == len(references) or references[stop] is not references[start]:
                parts.append(self.recompute.predict(references[start], codes[start:stop], bins[start:stop]))
                start = stop
        return torch.cat(parts)


@dataclass(frozen=True)
class Scores:
    """Scores of a list of variants, in its order and, within a variant, in that of its sites.

    Attributes:
        variant: int64 ``(rows,)``: position in the list.
        names: ``(rows,)`` of what was read (``Site.names``).
        values: float32 ``(rows, scorers, columns)``; NaN for tracks that are not read.
        padded: how many rows have a window that reaches beyond its contig.
    """

    variant: npt.NDArray[np.int64]
    names: list[tuple[str, ...]]
    values: npt.NDArray[np.float32]
    padded: int


@dataclass(frozen=True, slots=True)
class _Job:
    """A variant at a site; ``index`` is its row."""

    index: int
    variant: Variant
    site: Site

    @property
    def window(self) -> tuple[str, int]:
        return self.variant.chrom, self.site.start


class VariantScorer:
    """Scores variants that were checked against the genome (``alleles.check_vcf``).

    Args:
        model: with its adapter, wherever it is.
        layout: what it sees and predicts.
        config: the settings.

    Attributes:
        columns: names of what is scored: the tracks, or the signals whose strands are merged.
        labels: names of the scorers.

    Raises:
        ConfigError: settings that do not suit what the model predicts.
        DataError: files that they name are wrong; strand pairs whose names do not tell which strand is which.
    """

    def __init__(self, model: SequenceModel, layout: Layout, config: VariantConfig) -> None:
        self.model, self.layout, self.config = model.eval(), layout, config.resolved(layout)
        assert self.config.over is not None
        self.sites = self.config.over.sites(layout)
        self.columns: tuple[str, ...] = tuple(layout.tracks.names)
        self.labels = tuple(scorer.label for scorer in self.config.scorers)
        self.device = next(model.parameters()).device
        self._predictor: _Predictor = _Local(model) if config.local else _Whole(model)
        self._signals = self._pairs() if config.merge_strands else None
        self._swap = torch.as_tensor(layout.tracks.permutation, device=self.device)
        self._kept: dict[View, dict[tuple[str, int], Any]] = {}  # references of the last batch

    @property
    def in_words(self) -> str:
        """What is computed of each alternate."""
        return self._predictor.in_words

    def __call__(self, variants: Sequence[Variant]) -> Scores:
        """Scores of variants in any order.

        Raises:
            ModelError: predictions that are not finite.
        """
        sites = [(number, variant, site) for number, variant in enumerate(variants) for site in self.sites(variant)]
        jobs = [_Job(index, variant, site) for index, (_, variant, site) in enumerate(sites)]
        values = np.empty((len(jobs), len(self.config.scorers), len(self.columns)), dtype=np.float32)
        jobs.sort(key=lambda job: (*job.window, job.site.bins, job.variant.position))
        size = self.config.batch_size
        for start in steps(range(0, len(jobs), size)):
            batch = jobs[start : start + size]
            values[[job.index for job in batch]] = self._score(batch)
        lengths, window = self.layout.genome.chroms, self.layout.window
        padded = sum(job.site.start < 0 or job.site.start + window > lengths[job.variant.chrom] for job in jobs)
        number = np.array([number for number, _, _ in sites], dtype=np.int64)
        return Scores(number, [site.names for _, _, site in sites], values, padded)

    def profiles(self, variant: Variant) -> Iterator[tuple[Site, npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """What its scores are made of: each site with the raw values ``(tracks, bins)`` of reference and alternate.

        Raises:
            ModelError: predictions that are not finite.
        """
        for site in self.sites(variant):
            pairs = self._predict([_Job(0, variant, site)])
            ref, alt = (torch.cat(parts).mean(0).cpu().numpy() for parts in zip(*pairs, strict=True))
            yield site, ref, alt

    def _score(self, jobs: Sequence[_Job]) -> npt.NDArray[np.float32]:
        """``(jobs, scorers, columns)``; jobs of one width of bins at a time."""
        widths = {job.site.bins[1] - job.site.bins[0] for job in jobs}
        out = np.empty((len(jobs), len(self.config.scorers), len(self.columns)), dtype=np.float32)
        for width in widths:
            index = [i for i, job in enumerate(jobs) if job.site.bins[1] - job.site.bins[0] == width]
            chosen = [jobs[i] for i in index]
            predictions = self._predict(chosen)
            weights = torch.from_numpy(np.stack([job.site.weights for job in chosen]))[:, None].to(self.device)
            every = np.ones(len(self.layout.tracks), dtype=np.bool_)
            masks = [every if job.site.tracks is None else job.site.tracks for job in chosen]
            read = torch.from_numpy(np.stack(masks)).to(self.device)
            scores = [self._effects(scorer, predictions, weights, read) for scorer in self.config.scorers]
            out[index] = torch.stack(scores, dim=1).float().cpu().numpy()
        return out

    def _effects(
        self, scorer: Scorer, predictions: Sequence[tuple[Tensor, Tensor]], weights: Tensor, read: Tensor
    ) -> Tensor:
        """``(jobs, columns)`` of raw predictions; NaN where no track is ``read``."""
        if scorer.units == "scaled":
            tracks, size = self.layout.tracks, self.layout.bin_size
            predictions = [(scaled(ref, tracks, size), scaled(alt, tracks, size)) for ref, alt in predictions]
        return effects(scorer, predictions, weights, read, self._signals)

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Which tracks make up each signal."""
        table = signal_table(self.layout.tracks)
        self.columns = tuple(table["name"])
        plus, minus = (torch.tensor(table[side].to_numpy(), device=self.device) for side in ("plus", "minus"))
        return plus, minus

    def _predict(self, jobs: Sequence[_Job]) -> list[tuple[Tensor, Tensor]]:
        """Raw values ``(jobs, tracks, width)`` of references and aligned alternates: their mean over the views, or one
        of each shift whose scores are to be averaged."""
        views = self.config.ensemble.views()
        with torch.inference_mode(), autocast(self.config.precision, self.device):
            if self.config.average == "baskerville":
                by_shift = [[v for v in views if v.shift == shift] for shift in dict.fromkeys(v.shift for v in views)]
                pairs = [self._views(jobs, group) for group in by_shift]
            else:
                each = [self._views(jobs, [view]) for view in views]
                pairs = [(torch.stack([ref for ref, _ in each]).mean(0), torch.stack([alt for _, alt in each]).mean(0))]
        if not all(values.isfinite().all() for pair in pairs for values in pair):
            where = f"{jobs[0].variant} to {jobs[-1].variant}"
            remedy = "Train with a lower learning rate, or score in float32"
            raise ModelError("the model predicts values that are not finite", where=where, remedy=remedy)
        return pairs

    def _views(self, jobs: Sequence[_Job], views: Sequence[View]) -> tuple[Tensor, Tensor]:
        """Raw references and aligned alternates of views of one shift, averaged on the model's scale."""
        layout, bins, shift = self.layout, self.layout.bins, views[0].shift
        reserve = max(len(job.variant.ref) for job in jobs)
        windows = {job.window: self._codes(*job.window, shift, reserve) for job in jobs}
        references = {view: self._references(windows, view, reserve) for view in views}
        reads = [job.site.bins for job in jobs]
        reference = self._raw([self._reference_values(jobs, references[view], view) for view in views])
        # one alternate for each job, and a second that keeps the right side where an indel is stitched
        alignments = [Alignment.of(job.variant, job.site.start, layout) for job in jobs]
        changed = [len(job.variant.ref) != len(job.variant.alt) for job in jobs]
        sides = [(i, False) for i in range(len(jobs))]
        sides += [(i, True) for i in range(len(jobs)) if changed[i] and self.config.stitch]
        sides.sort()
        needed = [reads[i] if right else alignments[i].needed(reads[i], bins) for i, right in sides]
        spans = _shared_spans(needed, bins)
        codes = np.stack([self._alternate(jobs[i], windows, shift, reserve, right) for i, right in sides])
        each = []
        for view in views:
            own = [references[view][jobs[i].window] for i, _ in sides]
            turned = [self._turned(span, view) for span in spans]
            each.append(self._forward(self._predictor.alternates(own, self._tensor(codes, view), turned), view))
        found = self._raw(each)
        aligned = []
        rows = {side: row for row, side in enumerate(sides)}
        for i, span in enumerate(reads):
            row, other = rows[i, False], rows.get((i, True))
            first = spans[row][0]
            if not changed[i]:
                aligned.append(found[row][:, span[0] - first : span[1] - first])
                continue
            right = (found[other], spans[other][0]) if other is not None else (None, 0)
            aligned.append(align(alignments[i], span, reference[i], found[row], first, *right))
        return reference, torch.stack(aligned)

    def _codes(self, chrom: str, start: int, shift: int, reserve: int) -> Codes:
        """Base codes of a window with ``reserve`` bases more at either side."""
        first = start + shift - reserve
        return self.layout.genome.codes(Interval(chrom, first, first + self.layout.window + 2 * reserve))

    def _references(
        self, windows: Mapping[tuple[str, int], Codes], view: View, reserve: int
    ) -> dict[tuple[str, int], Any]:
        """The reference of each window; those of the batch before are not computed again."""
        known = self._kept.get(view, {})
        new = [window for window in windows if window not in known]
        found = {window: known[window] for window in windows if window in known}
        if new:
            codes = np.stack([windows[window][reserve : reserve + self.layout.window] for window in new])
            found |= dict(zip(new, self._predictor.references(self._tensor(codes, view)), strict=True))
        self._kept[view] = found
        return found

    def _reference_values(self, jobs: Sequence[_Job], references: Mapping[tuple[str, int], Any], view: View) -> Tensor:
        """Predictions ``(jobs, tracks, width)`` of the references; each window is read once, where its jobs read it."""
        spans: dict[tuple[str, int], Span] = {}
        for job in jobs:
            start, stop = spans.get(job.window, job.site.bins)
            spans[job.window] = min(start, job.site.bins[0]), max(stop, job.site.bins[1])
        widest = max(stop - start for start, stop in spans.values())
        firsts = {window: min(start, self.layout.bins - widest) for window, (start, _) in spans.items()}
        turned = {window: self._turned((first, first + widest), view) for window, first in firsts.items()}
        read = [self._predictor.read(references[window], span) for window, span in turned.items()]
        values = dict(zip(spans, self._forward(torch.stack(read), view), strict=True))
        cuts = [(job.window, job.site.bins[0] - firsts[job.window]) for job in jobs]
        width = jobs[0].site.bins[1] - jobs[0].site.bins[0]
        return torch.stack([values[window][:, first : first + width] for window, first in cuts])

    def _alternate(
        self, job: _Job, windows: Mapping[tuple[str, int], Codes], shift: int, reserve: int, right: bool
    ) -> Codes:
        variant, codes, window = job.variant, windows[job.window], self.layout.window
        offset = variant.position - 1 - job.site.start - shift
        return alternate(codes, offset, variant, window, reserve, right=right)

    def _tensor(self, codes: Codes, view: View) -> Tensor:
        codes = reverse_complement(codes) if view.reverse else codes
        return torch.from_numpy(np.ascontiguousarray(codes)).to(self.device)

    def _turned(self, bins: Span, view: View) -> Span:
        """Where the model has these bins when it sees the other strand."""
        return (self.layout.bins - bins[1], self.layout.bins - bins[0]) if view.reverse else bins

    def _forward(self, values: Tensor, view: View) -> Tensor:
        """Predictions ``(n, tracks, bins)`` of a view as those of the forward strand, float64."""
        return (values.flip(-1)[:, self._swap] if view.reverse else values).double()

    def _raw(self, values: Sequence[Tensor]) -> Tensor:
        """Raw values of the mean of squashed predictions."""
        return unsquash(torch.stack(list(values)).mean(0), self.layout.tracks, self.layout.bin_size)


def _shared_spans(needed: Sequence[Span], bins: int) -> list[Span]:
    """Spans of one width that hold those that are needed: up to twice as wide, so that neighbours have the same.

    Alternates that are read at the same bins pass the last stages together, which saves more than the bins cost.
    """
    step = max(stop - start for start, stop in needed)
    width = min(2 * step - 1, bins)
    starts = [min(start // step * step, bins - width) for start, _ in needed]
    return [(start, start + width) for start in starts]
