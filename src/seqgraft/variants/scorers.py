"""What a variant's effect is: scorers.

A scorer maps the predictions of the reference and the alternate to one number per track. All are frozen dataclasses
that YAML names by ``kind``; registering one is all it needs. Those in capitals are Baskerville's, by its names, which
are there to reproduce and continue published scores; the others are in raw units, which mean the same in every track.

A score that is not defined is NaN (``.`` in a VCF): the logarithm of a sum that is not positive (with its pseudocount),
the root of a negative value, the shape of a signal whose sum is not positive, an infinite divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from seqgraft.errors import ConfigError
from seqgraft.tracks import TrackTable

__all__ = [
    "L2",
    "SCORERS",
    "Baskerville",
    "Difference",
    "JensenShannon",
    "Log2FoldChange",
    "MaxAbs",
    "Scorer",
    "Strands",
    "Units",
    "effects",
    "scaled",
]

#: "raw": as ``predict`` writes them. "scaled": the track's statistic (sum or mean over a bin) times its scale, which is
#: what Baskerville reads: it undoes the squash and the soft clip, and neither the scale nor the mean.
Units = Literal["raw", "scaled"]
#: What merging the strands of a pair adds up: their values before the scorer, or scores: plainly, or as squares.
Strands = Literal["values", "scores", "squares"]


class Scorer(Protocol):
    """The effect on each track.

    ``ref`` and ``alt`` are predictions in ``units`` (of labels after the link), float64 ``(..., tracks, bins)``;
    ``weights``, float64 and broadcastable to that shape, say how much of each bin counts, 0 to 1. The result is
    ``(..., tracks)``. ``label`` names the scorer in tables and VCF: letters, digits and underscores.
    """

    kind: ClassVar[str]
    units: ClassVar[Units]
    strands: ClassVar[Strands]

    @property
    def label(self) -> str: ...

    def __call__(self, ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor: ...


def scaled(values: Tensor, tracks: TrackTable, bin_size: int) -> Tensor:
    """Raw values ``(..., tracks, bins)`` in the units "scaled"."""
    per_bin = np.where(tracks.frame["statistic"] == "mean", float(bin_size), 1.0)
    center, scale, per = (
        torch.tensor(column, dtype=values.dtype, device=values.device)[:, None]
        for column in (tracks.column("center"), tracks.column("scale"), per_bin)
    )
    return (values / per - center) * scale


def effects(
    scorer: Scorer,
    predictions: Sequence[tuple[Tensor, Tensor]],
    weights: Tensor,
    read: Tensor,
    signals: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Scores of variants, ``(jobs, tracks)`` or, with merged strands, ``(jobs, signals)``; NaN where nothing is read.

    Args:
        predictions: of references and alternates ``(jobs, tracks, bins)`` in the scorer's units; of several, the mean
            of their scores counts.
        weights: of the bins, ``(jobs, 1, bins)``.
        read: bool ``(jobs, tracks)``.
        signals: position of each signal's forward and reverse strand on the track axis, equal where it is one track;
            None keeps the strands apart.
    """
    if signals is None:
        return torch.where(read, _mean([scorer(ref, alt, weights) for ref, alt in predictions]), torch.nan)
    plus, minus = signals
    first, second = read[:, plus], read[:, minus] & (plus != minus)

    def add(values: Tensor) -> Tensor:
        one, two = (mask.reshape(*mask.shape, *[1] * (values.ndim - 2)) for mask in (first, second))
        return torch.where(one, values[:, plus], 0) + torch.where(two, values[:, minus], 0)

    if scorer.strands == "values":
        scores = _mean([scorer(add(ref), add(alt), weights) for ref, alt in predictions])
    else:
        each = _mean([scorer(ref, alt, weights) for ref, alt in predictions])
        scores = add(each.square()).sqrt() if scorer.strands == "squares" else add(each)
    return torch.where(first | second, scores, torch.nan)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


@dataclass(frozen=True)
class _Plain:
    """What the scorers in raw units share."""

    kind: ClassVar[str]
    units: ClassVar[Units] = "raw"
    strands: ClassVar[Strands] = "values"

    @property
    def label(self) -> str:
        return self.kind


@dataclass(frozen=True)
class Log2FoldChange(_Plain):
    """``log2((sum of alt + pseudocount) / (sum of ref + pseudocount))``, in raw units, over the weighted bins.

    NaN where a sum with the pseudocount is not positive.

    Raises:
        ConfigError: a pseudocount that is not positive.
    """

    pseudocount: float = 1.0
    kind: ClassVar[str] = "log2_fold_change"

    def __post_init__(self) -> None:
        if not self.pseudocount > 0:
            raise ConfigError("must be above 0", self.pseudocount, where="scorers: pseudocount")

    def __call__(self, ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
        return _log2((alt * weights).sum(-1) + self.pseudocount) - _log2((ref * weights).sum(-1) + self.pseudocount)


@dataclass(frozen=True)
class Difference(_Plain):
    """Sum of alt minus sum of ref over the weighted bins; for a label its change."""

    kind: ClassVar[str] = "difference"

    def __call__(self, ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
        return ((alt - ref) * weights).sum(-1)


@dataclass(frozen=True)
class L2(_Plain):
    """Root of the weighted sum of the squared differences of the bins; never negative."""

    kind: ClassVar[str] = "l2"

    def __call__(self, ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
        return ((alt - ref).square() * weights).sum(-1).sqrt()


@dataclass(frozen=True)
class MaxAbs(_Plain):
    """The largest absolute difference of a bin, times its weight; never negative."""

    kind: ClassVar[str] = "max_abs"

    def __call__(self, ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
        return ((alt - ref).abs() * weights).amax(-1)


@dataclass(frozen=True)
class JensenShannon(_Plain):
    """Jensen-Shannon divergence in bits, 0 to 1, of the shapes of alt and ref over the weighted bins (Lin 1991).

    With p and q the values divided by their sum and m their mean: ``KL(p, m) / 2 + KL(q, m) / 2``. It does not see how
    much signal there is. Negative bins count as 0. NaN where a sum is not positive: nothing has no shape.
    """

    kind: ClassVar[str] = "jensen_shannon"

    def __call__(self, ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
        p, q = (_shape(values.clamp_min(0) * weights) for values in (ref, alt))
        mean = (p + q) / 2
        return (_divergence(p, mean) + _divergence(q, mean)).clamp_min(0) / (2 * math.log(2))


def _log2(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.nan).log2()


def _shape(values: Tensor) -> Tensor:
    """Divided by their sum; NaN where that is not positive."""
    total = values.sum(-1, keepdim=True)
    return values / torch.where(total > 0, total, torch.nan)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the last axis in nats; NaN where it is infinite."""
    total = (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
    return torch.where(total.isfinite(), total, torch.nan)


# ---- Baskerville's ----


def _same(values: Tensor) -> Tensor:
    return values


def _log2_of_one_more(values: Tensor) -> Tensor:
    return _log2(values + 1)


def _root(values: Tensor) -> Tensor:
    return torch.where(values >= 0, values, torch.nan).sqrt()


def _sum(ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
    return ((alt - ref) * weights).sum(-1)


def _log_of_sums(ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
    return _log2((alt * weights).sum(-1) + 1) - _log2((ref * weights).sum(-1) + 1)


def _largest(ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
    difference = (alt - ref) * weights
    return difference.gather(-1, difference.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _absolute(ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
    return ((alt - ref).abs() * weights).sum(-1)


def _squared(ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
    return ((alt - ref).square() * weights).sum(-1).sqrt()


def _both_divergences(ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
    read = (weights > 0).expand_as(ref)
    pseudocount = _quarter(ref, read)
    p, q = (_shape(torch.where(read, values + pseudocount, 0) * weights) for values in (ref, alt))
    return (_divergence(p, q) + _divergence(q, p)) / 2


def _quarter(values: Tensor, read: Tensor) -> Tensor:
    """The 25 % quantile of the bins that are read, linear between values, ``(..., tracks, 1)``."""
    ordered = torch.where(read, values, torch.inf).sort(-1).values
    place = 0.25 * (read.sum(-1, keepdim=True) - 1).clamp_min(0)
    low, high = (ordered.gather(-1, index.long()) for index in (place.floor(), place.ceil()))
    return torch.where(place.frac() > 0, low + (high - low) * place.frac(), low)


@dataclass(frozen=True)
class Baskerville(_Plain):
    """One of the statistics of Baskerville's ``hound_snp`` (Linder et al. 2025, calico/baskerville), by its name.

    With r and a the bins of reference and alternate in the units "scaled", t a transform of each bin (none,
    log2(x + 1) or sqrt(x)), and sums over the weighted bins: see ``SCORERS`` in ``docs/formats.md``. Strands are merged
    as there: scores add up, of D2 as squares. A name that Baskerville does not know makes it write zeros; here it is an
    error.
    """

    units: ClassVar[Units] = "scaled"
    strands: ClassVar[Strands] = "scores"
    transform: ClassVar[Callable[[Tensor], Tensor]]
    reduce: ClassVar[Callable[[Tensor, Tensor, Tensor], Tensor]]

    def __call__(self, ref: Tensor, alt: Tensor, weights: Tensor) -> Tensor:
        transform, reduce = type(self).transform, type(self).reduce
        return reduce(transform(ref), transform(alt), weights)


#: Name -> transform of each bin, statistic of the transformed bins.
_STATISTICS = {
    "SUM": (_same, _sum),
    "logSUM": (_log2_of_one_more, _sum),
    "sqrtSUM": (_root, _sum),
    "logSED": (_same, _log_of_sums),
    "SAX": (_same, _largest),
    "D1": (_same, _absolute),
    "logD1": (_log2_of_one_more, _absolute),
    "sqrtD1": (_root, _absolute),
    "D2": (_same, _squared),
    "logD2": (_log2_of_one_more, _squared),
    "sqrtD2": (_root, _squared),
    "JS": (_same, _both_divergences),
}


def _named(name: str) -> type[Scorer]:
    transform, reduce = _STATISTICS[name]
    content = {
        "kind": name,
        "transform": staticmethod(transform),
        "reduce": staticmethod(reduce),
        "strands": "squares" if name.endswith("D2") else "scores",
        "__module__": __name__,
    }
    return dataclass(frozen=True)(type(name, (Baskerville,), content))


_OURS: tuple[type[Scorer], ...] = (Log2FoldChange, Difference, L2, MaxAbs, JensenShannon)

#: Kind, as written in configurations -> scorer.
SCORERS: dict[str, type[Scorer]] = {
    **{scorer.kind: scorer for scorer in _OURS},
    **{name: _named(name) for name in _STATISTICS},
}
