"""Metrics in float64: plain functions, and streaming statistics per region that a bootstrap can weigh.

A metric is a function ``metric(y_true, y_pred, weight=None) -> float`` of flat arrays, listed in :data:`METRICS`.
Streaming works on *statistics per region*, enough to compute a metric under any weighting of the regions, which is
what a bootstrap needs: :class:`Moments` (Pearson, R2, MSE), :class:`Confusion` (accuracy, F1, MCC) and
:class:`Values` (Spearman, AUROC, AUPRC: the values themselves). An :class:`Accumulator` builds them batch by batch.

An undefined metric (a constant track, a single class) is NaN and has a reason; means over tracks skip it and say how
many they skipped. Arrays are ``(regions, tracks, bins)``; a target counts if it is unmasked and finite. Predictions
are values after the link; a binary prediction is a yes from 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from seqgraft.errors import DataError

__all__ = [
    "METRICS",
    "Accumulator",
    "Confusion",
    "Metric",
    "Moments",
    "Score",
    "Statistics",
    "Values",
    "centre_tracks",
    "mean_score",
    "pearson_within",
    "region_means",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

# A spread below this share of the mean is float32 rounding of a constant.
CONSTANT = 1e-7


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric and what it needs. ``statistic`` is the class of region statistics that can compute it.

    For task "multiclass", ``function`` takes class numbers ``(n,)``; streaming takes the classes as tracks.
    """

    name: str
    task: Literal["regression", "binary", "multiclass"]
    statistic: Literal["moments", "confusion", "values"]
    function: Callable[..., float]
    higher_better: bool = True


@dataclass(frozen=True, slots=True)
class Score:
    """A metric of one track from ``count`` values; NaN if undefined, and then ``reason`` says why."""

    value: float
    count: int
    reason: str = ""


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean over tracks where the metric is defined; ``reason`` counts the others."""
    defined = [score.value for score in scores if not score.reason]
    reasons = sorted({score.reason for score in scores if score.reason})
    skipped = f"{len(scores) - len(defined)} of {len(scores)} tracks undefined ({', '.join(reasons)})"
    value = float(np.mean(defined)) if defined else float("nan")
    return Score(value, sum(score.count for score in scores), skipped if reasons else "")


# ---- formulas: arrays (..., tracks) in, one value per track out ----


def _moments_value(metric: str, moments: Floats) -> Floats:
    """``moments`` ``(6, ...)``: weight n, mean y, mean p, and the centred sums yy, pp, yp."""
    n, mean_true, mean_pred, true, pred, both = moments
    with np.errstate(divide="ignore", invalid="ignore"):
        residual = true + pred - 2 * both + n * (mean_true - mean_pred) ** 2
        if metric == "mse":
            return np.where(n > 0, residual / n, np.nan)
        constant = _is_constant(n, mean_true, true)
        if metric == "r2":
            return np.where(constant, np.nan, 1 - residual / true)
        constant |= _is_constant(n, mean_pred, pred)
        return np.where(constant, np.nan, np.clip(both / np.sqrt(true * pred), -1, 1))


def _is_constant(n: Floats, mean: Floats, centred: Floats) -> npt.NDArray[np.bool_]:
    return np.asarray(centred <= n * (CONSTANT * mean) ** 2)


def _confusion_value(metric: str, counts: Floats) -> Floats:
    """``counts`` ``(..., K, K)``: how much weight each (true class, predicted class) has."""
    total, right = counts.sum((-2, -1)), np.trace(counts, axis1=-2, axis2=-1)
    true, pred = counts.sum(-1), counts.sum(-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        if metric.endswith("accuracy"):
            return np.asarray(right / total)
        if metric == "class_f1":  # mean over the classes that occur in targets or predictions
            each = 2 * np.diagonal(counts, axis1=-2, axis2=-1) / (true + pred)
            return np.asarray(np.nansum(each, -1) / np.sum(true + pred > 0, -1))
        if metric == "f1":
            return np.asarray(2 * counts[..., 1, 1] / (true + pred)[..., 1])
        spread_true, spread_pred = total**2 - (true**2).sum(-1), total**2 - (pred**2).sum(-1)
        mcc = (right * total - (true * pred).sum(-1)) / np.sqrt(spread_true * spread_pred)
        # By convention a constant prediction has MCC 0; constant targets leave it undefined.
        return np.where(spread_true == 0, np.nan, np.where(spread_pred == 0, 0.0, mcc))


def _values_value(metric: str, true: Ints, pred: Ints, weight: Floats) -> float:
    """``true`` and ``pred`` are dense ranks (equal values, equal rank), so that no draw of a bootstrap sorts again."""
    if metric == "spearman":
        moments = _weighted_moments(_midranks(true, weight), _midranks(pred, weight), weight)
        return float(_moments_value("pearson", moments))
    size = int(pred.max(initial=0)) + 1
    positive = np.bincount(pred, weight * true, size)
    negative = np.bincount(pred, weight * (1 - true), size)
    positives, negatives = positive.sum(), negative.sum()
    if positives == 0 or negatives == 0:
        return float("nan")
    if metric == "auroc":
        return float(positive @ (np.cumsum(negative) - negative / 2) / (positives * negatives))
    hits, calls = np.cumsum(positive[::-1]), np.cumsum((positive + negative)[::-1])
    return float(positive[::-1] @ np.divide(hits, calls, out=np.zeros_like(hits), where=calls > 0) / positives)


def _midranks(ranks: Ints, weight: Floats) -> Floats:
    amount = np.bincount(ranks, weight)
    return np.asarray((np.cumsum(amount) - amount / 2)[ranks])


def _dense(metric: str, y_true: Array, y_pred: Array) -> tuple[Ints, Ints]:
    true = np.unique(y_true, return_inverse=True)[1] if metric == "spearman" else (y_true >= 0.5)
    return true.astype(np.int64), np.unique(y_pred, return_inverse=True)[1].astype(np.int64)


def _weighted_moments(y_true: Array, y_pred: Array, weight: Floats) -> Floats:
    n = weight.sum()
    mean_true, mean_pred = (weight @ y_true / n, weight @ y_pred / n) if n > 0 else (0.0, 0.0)
    true, pred = y_true - mean_true, y_pred - mean_pred
    return np.array([n, mean_true, mean_pred, weight @ true**2, weight @ pred**2, weight @ (true * pred)])


# ---- plain functions ----


def _metric(name: str, task: Literal["regression", "binary", "multiclass"], statistic: Any, up: bool = True) -> Metric:
    def function(y_true: npt.ArrayLike, y_pred: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> float:
        true, pred = np.asarray(y_true, np.float64), np.asarray(y_pred, np.float64)
        if true.ndim != 1 or true.shape != pred.shape:
            raise DataError("a metric needs two flat arrays of one length", (true.shape, pred.shape), where=name)
        weights = np.ones(len(true)) if weight is None else np.asarray(weight, np.float64)
        keep = np.isfinite(true) & (weights > 0)
        true, pred, weights = true[keep], pred[keep], weights[keep]
        if not len(true) or not np.isfinite(pred).all():
            return float("nan")
        if statistic == "moments":
            return float(_moments_value(name, _weighted_moments(true, pred, weights)))
        if statistic == "values":
            return _values_value(name, *_dense(name, true, pred), weights)
        classes = (true >= 0.5, pred >= 0.5) if task == "binary" else (true, pred)
        first, second = (part.astype(np.int64) for part in classes)
        size = 2 if task == "binary" else int(max(first.max(), second.max())) + 1
        counts = np.bincount(first * size + second, weights, size * size).reshape(size, size).astype(np.float64)
        return float(_confusion_value(name, counts))

    function.__name__ = name
    return Metric(name, task, statistic, function, up)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _metric("pearson", "regression", "moments"),
        _metric("r2", "regression", "moments"),
        _metric("mse", "regression", "moments", up=False),
        _metric("spearman", "regression", "values"),
        _metric("auroc", "binary", "values"),
        _metric("auprc", "binary", "values"),
        _metric("accuracy", "binary", "confusion"),
        _metric("f1", "binary", "confusion"),
        _metric("mcc", "binary", "confusion"),
        _metric("class_accuracy", "multiclass", "confusion"),
        _metric("class_f1", "multiclass", "confusion"),
        _metric("class_mcc", "multiclass", "confusion"),
    )
}


# ---- statistics per region ----


class Statistics(Protocol):
    """Statistics of each region and track; ``rows`` ``(regions,)`` says which regions of the dataset they are."""

    kind: ClassVar[Literal["moments", "confusion", "values"]]

    @property
    def rows(self) -> Ints: ...

    def select(self, index: Ints) -> Self:
        """The regions at these positions."""
        ...

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """All regions of the parts, in their order."""
        ...

    def compute(self, metric: str, weights: Floats | None = None) -> Floats:
        """The metric of each track ``(tracks,)``, or ``(draws, tracks)`` with region weights ``(draws, regions)``."""
        ...

    def scores(self, metric: str) -> list[Score]:
        """The metric of each track over all regions, with counts and reasons."""
        ...


def _checked(y_true: Array, y_pred: Array, mask: Array | None, rows: Array | None) -> tuple[Array, Ints]:
    if y_true.shape != y_pred.shape or y_true.ndim != 3:
        what = "targets and predictions must both be (regions, tracks, bins)"
        raise DataError(what, (y_true.shape, y_pred.shape), where="metrics")
    valid = np.isfinite(y_true) if mask is None else np.isfinite(y_true) & np.broadcast_to(mask, y_true.shape)
    return valid, np.arange(len(y_true)) if rows is None else np.asarray(rows, np.int64)


def _require(metric: str, kind: str) -> None:
    if metric not in METRICS or METRICS[metric].statistic != kind:
        names = ", ".join(name for name, entry in METRICS.items() if entry.statistic == kind)
        raise DataError("no such metric for these statistics", metric, where="metrics", remedy=f"They compute {names}")


@dataclass(frozen=True, slots=True)
class Moments:
    """``sums`` ``(6, regions, tracks)``: count, mean y, mean p and the centred sums yy, pp, yp over a region's bins.

    Regions are joined by the parallel-variance update, so that neither large means nor many bins cost precision.
    """

    rows: Ints
    sums: Floats

    kind: ClassVar[Literal["moments", "confusion", "values"]] = "moments"

    @classmethod
    def of(cls, y_true: Array, y_pred: Array, mask: Array | None = None, rows: Array | None = None) -> Self:
        valid, number = _checked(y_true, y_pred, mask, rows)
        true, pred = (np.where(valid, part, 0.0).astype(np.float64) for part in (y_true, y_pred))
        n = valid.sum(-1).astype(np.float64)
        mean_true, mean_pred = (part.sum(-1) / np.maximum(n, 1) for part in (true, pred))
        true = np.where(valid, true - mean_true[..., None], 0.0)
        pred = np.where(valid, pred - mean_pred[..., None], 0.0)
        centred = (true**2).sum(-1), (pred**2).sum(-1), (true * pred).sum(-1)
        return cls(number, np.stack([n, mean_true, mean_pred, *centred]))

    def select(self, index: Ints) -> Self:
        return type(self)(self.rows[index], self.sums[:, index])

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        return cls(np.concatenate([p.rows for p in parts]), np.concatenate([p.sums for p in parts], axis=1))

    def pooled(self, weights: Floats) -> Floats:
        """Moments over regions weighted by ``(draws, regions)``: ``(6, draws, tracks)``."""
        n, mean_true, mean_pred, true, pred, both = self.sums
        count = np.maximum(n.sum(0), 1)
        centre_true, centre_pred = (n * mean_true).sum(0) / count, (n * mean_pred).sum(0) / count
        shift_true, shift_pred = mean_true - centre_true, mean_pred - centre_pred
        total = weights @ n
        safe = np.where(total > 0, total, 1.0)
        off_true, off_pred = weights @ (n * shift_true) / safe, weights @ (n * shift_pred) / safe
        return np.stack([
            total,
            centre_true + off_true,
            centre_pred + off_pred,
            np.maximum(weights @ (true + n * shift_true**2) - total * off_true**2, 0),
            np.maximum(weights @ (pred + n * shift_pred**2) - total * off_pred**2, 0),
            weights @ (both + n * shift_true * shift_pred) - total * off_true * off_pred,
        ])  # fmt: skip

    def compute(self, metric: str, weights: Floats | None = None) -> Floats:
        _require(metric, self.kind)
        if weights is None:
            return np.asarray(_moments_value(metric, self.pooled(np.ones((1, len(self.rows)))))[0])
        return _moments_value(metric, self.pooled(weights))

    def scores(self, metric: str) -> list[Score]:
        pooled = self.pooled(np.ones((1, len(self.rows))))[:, 0].T
        return [
            Score(float(value), int(moments[0]), "" if np.isfinite(value) else self._reason(moments))
            for value, moments in zip(self.compute(metric), pooled, strict=True)
        ]

    @staticmethod
    def _reason(moments: Floats) -> str:
        n, mean_true, mean_pred, true, _, _ = moments
        if n < 2:
            return "no values" if n == 0 else "one value only"
        if not np.isfinite(mean_pred):
            return "prediction not finite"
        return "constant target" if _is_constant(n, mean_true, true) else "constant prediction"


@dataclass(frozen=True, slots=True)
class Confusion:
    """``counts`` ``(regions, units, K, K)`` of (true class, predicted class); a unit is a track or a softmax group."""

    rows: Ints
    counts: Floats

    kind: ClassVar[Literal["moments", "confusion", "values"]] = "confusion"

    @classmethod
    def of_tracks(cls, y_true: Array, y_pred: Array, mask: Array | None = None, rows: Array | None = None) -> Self:
        """Every track is a yes-or-no label, its prediction a probability."""
        valid, number = _checked(y_true, y_pred, mask, rows)
        finite = np.isfinite(y_pred) | ~valid
        return cls(number, _count(y_true >= 0.5, y_pred >= 0.5, valid, finite, 2))

    @classmethod
    def of_classes(cls, y_true: Array, y_pred: Array, mask: Array | None = None, rows: Array | None = None) -> Self:
        """The tracks are the classes of one label; the largest is the class. All of them must be unmasked."""
        valid, number = _checked(y_true, y_pred, mask, rows)
        finite: Array = np.all(np.isfinite(y_pred) | ~valid, axis=1, keepdims=True)
        complete: Array = np.all(valid, axis=1, keepdims=True)
        true, pred = (part.argmax(1)[:, None] for part in (y_true, y_pred))
        return cls(number, _count(true, pred, complete, finite, y_true.shape[1]))

    def select(self, index: Ints) -> Self:
        return type(self)(self.rows[index], self.counts[index])

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        return cls(np.concatenate([p.rows for p in parts]), np.concatenate([p.counts for p in parts]))

    def compute(self, metric: str, weights: Floats | None = None) -> Floats:
        _require(metric, self.kind)
        if weights is None:
            return _confusion_value(metric, self.counts.sum(0))
        return _confusion_value(metric, np.tensordot(weights, self.counts, axes=1))

    def scores(self, metric: str) -> list[Score]:
        return [
            Score(float(value), int(np.nansum(counts)), "" if np.isfinite(value) else self._reason(metric, counts))
            for value, counts in zip(self.compute(metric), self.counts.sum(0), strict=True)
        ]

    @staticmethod
    def _reason(metric: str, counts: Floats) -> str:
        if not np.isfinite(counts).all():
            return "prediction not finite"
        if not counts.any():
            return "no values"
        return "no positives" if metric == "f1" else "constant target"


def _count(true: Array, pred: Array, valid: Array, finite: Array, classes: int) -> Floats:
    """Counts ``(regions, units, K, K)``; NaN where a prediction is not finite."""
    regions, units, _ = true.shape
    unit = np.arange(regions * units).reshape(regions, units, 1)
    index = (unit * classes + true.astype(np.int64)) * classes + pred.astype(np.int64)
    counts = np.bincount(index[valid], minlength=regions * units * classes**2).astype(np.float64)
    counts = counts.reshape(regions, units, classes, classes)
    counts[~finite.all(-1)] = np.nan
    return counts


@dataclass(frozen=True, slots=True)
class Values:
    """The values themselves, ``(regions, tracks, bins)``; a target that does not count is NaN."""

    rows: Ints
    y_true: Array
    y_pred: Array

    kind: ClassVar[Literal["moments", "confusion", "values"]] = "values"

    @classmethod
    def of(cls, y_true: Array, y_pred: Array, mask: Array | None = None, rows: Array | None = None) -> Self:
        valid, number = _checked(y_true, y_pred, mask, rows)
        return cls(number, np.where(valid, y_true, np.float32(np.nan)), np.array(y_pred))

    def select(self, index: Ints) -> Self:
        return type(self)(self.rows[index], self.y_true[index], self.y_pred[index])

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        rows, true, pred = zip(*((part.rows, part.y_true, part.y_pred) for part in parts), strict=True)
        return cls(np.concatenate(rows), np.concatenate(true), np.concatenate(pred))

    def compute(self, metric: str, weights: Floats | None = None) -> Floats:
        _require(metric, self.kind)
        draws = np.ones((1, len(self.rows))) if weights is None else weights
        values = np.full((len(draws), self.y_true.shape[1]), np.nan)
        for track in range(values.shape[1]):
            valid = np.isfinite(self.y_true[:, track])
            true, pred = self.y_true[:, track][valid], self.y_pred[:, track][valid]
            if not len(true) or not np.isfinite(pred).all():
                continue
            ranks, region = _dense(metric, true, pred), np.nonzero(valid)[0]
            values[:, track] = [_values_value(metric, *ranks, draw[region]) for draw in draws]
        return values[0] if weights is None else values

    def scores(self, metric: str) -> list[Score]:
        scores = []
        for track, value in enumerate(self.compute(metric)):
            valid = np.isfinite(self.y_true[:, track])
            true, pred = self.y_true[:, track][valid], self.y_pred[:, track][valid]
            reason = "" if np.isfinite(value) else self._reason(metric, true, pred)
            scores.append(Score(float(value), len(true), reason))
        return scores

    @staticmethod
    def _reason(metric: str, true: Array, pred: Array) -> str:
        if len(true) < 2:
            return "one value only" if len(true) else "no values"
        if not np.isfinite(pred).all():
            return "prediction not finite"
        constant = np.ptp(true) == 0 if metric == "spearman" else len(np.unique(true >= 0.5)) == 1
        return "constant target" if constant else "constant prediction"


S = TypeVar("S", bound=Statistics)


class Accumulator(Generic[S]):
    """Builds statistics batch by batch: ``Accumulator(Moments.of)``, then ``update``, ``merge``, ``result``.

    ``rows`` are the regions' numbers in the dataset: the result is sorted by them, and a region that came twice (the
    padding of the last batch on several devices) counts once. Without ``rows``, regions are numbered as they come.
    """

    def __init__(self, of: Callable[..., S]) -> None:
        self._of = of
        self._parts: list[S] = []
        self._seen = 0

    def update(self, y_true: Array, y_pred: Array, mask: Array | None = None, rows: Array | None = None) -> None:
        numbers = np.arange(self._seen, self._seen + len(y_true)) if rows is None else rows
        self._parts.append(self._of(y_true, y_pred, mask, numbers))
        self._seen += len(y_true)

    def merge(self, other: Accumulator[S]) -> None:
        """Take over another accumulator's regions (another device's, say); both need ``rows``."""
        self._parts.extend(other._parts)
        self._seen += other._seen

    def result(self) -> S:
        if not self._parts:
            raise DataError("no region was scored", where="metrics", remedy="Choose a fold that has regions")
        joined = type(self._parts[0]).concat(self._parts)
        return joined.select(np.unique(joined.rows, return_index=True)[1])


def region_means(values: Array, mask: Array | None = None) -> Floats:
    """Mean over the unmasked finite bins: ``(regions, tracks, 1)``; NaN without any. For metrics across regions.

    Pass predictions the mask of their targets' finite bins, so that both are means over the same bins.
    """
    valid = np.isfinite(values) if mask is None else np.isfinite(values) & np.broadcast_to(mask, values.shape)
    total, n = np.where(valid, values, 0.0).sum(-1, keepdims=True, dtype=np.float64), valid.sum(-1, keepdims=True)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def centre_tracks(values: Array) -> Floats:
    """Subtract from ``(rows, tracks, bins)`` each row and bin's mean over the tracks: the rest is track-specific."""
    return np.asarray(values - np.mean(values, axis=1, keepdims=True, dtype=np.float64), np.float64)


def pearson_within(
    truth: npt.NDArray[np.floating], predicted: npt.NDArray[np.floating], groups: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """Pearson correlation within each group, in the order of the groups' numbers: of a gene across donors, say.

    All arrays are ``(examples,)``; examples with a missing truth are left out. A constant prediction, or truth, tells
    nothing about who has more: its correlation is 0, not undefined, and so is that of fewer than three examples.
    """
    known = np.isfinite(truth)
    names, group = np.unique(groups, return_inverse=True)
    group, x, y = group[known], truth[known].astype(np.float64), predicted[known].astype(np.float64)

    def sums(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(group, values, minlength=len(names)).astype(np.float64)

    count = np.bincount(group, minlength=len(names))
    x, y = (v - (sums(v) / np.maximum(count, 1))[group] for v in (x, y))
    across, of_x, of_y = sums(x * y), sums(x * x), sums(y * y)
    size = sums(np.abs(predicted[known]).astype(np.float64)) / np.maximum(count, 1)
    told = (count > 2) & (of_x > 0) & (of_y > count * (1e-7 * size) ** 2)  # more than float32's rounding
    return np.where(told, across / np.sqrt(np.where(told, of_x * of_y, 1.0)), 0.0)
