"""Bootstrap intervals over blocks of neighbouring regions, and what replicates allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from seqgraft.errors import DataError
from seqgraft.metrics import Statistics

__all__ = [
    "Estimate",
    "bootstrap_interval",
    "paired_bootstrap",
    "replicate_ceiling",
    "segment_blocks",
    "spearman_brown",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric (or a difference of two models) per track and its mean over tracks, with 95 % percentile intervals.

    Arrays are ``(tracks,)``; NaN where the metric is undefined, which the mean skips and ``undefined`` counts.
    Intervals are NaN where there are fewer than two blocks.
    """

    value: Floats
    low: Floats
    high: Floats
    mean: float
    mean_low: float
    mean_high: float
    undefined: int


def segment_blocks(chrom: Sequence[str], start: Array, end: Array, size: int | None = None) -> Ints:
    """Block number of each region: neighbours whose midpoints fall in one segment of ``size`` bp share a block.

    Without ``size``: 50 kb, or twice the longest region. A region without coordinates (chromosome "") is its own block.
    """
    start, end = np.asarray(start, np.int64), np.asarray(end, np.int64)
    length = size or max(50_000, 2 * int((end - start).max(initial=0)))
    keys: dict[tuple[str, int], int] = {}
    middles = ((start + end) // 2 // length).tolist()
    named = [(name, middle if name else row) for row, (name, middle) in enumerate(zip(chrom, middles, strict=True))]
    return np.array([keys.setdefault(key, len(keys)) for key in named], np.int64)


def _draws(blocks: Array, draws: int, seed: int) -> Iterator[Floats]:
    """Region weights ``(part, regions)``: how often each region's block was drawn, in parts that bound the memory."""
    _, block = np.unique(blocks, return_inverse=True)
    count = int(block.max()) + 1
    generator = np.random.default_rng(seed)
    for begin in range(0, draws, 100):
        part = min(100, draws - begin)
        yield generator.multinomial(count, np.full(count, 1 / count), size=part).astype(np.float64)[:, block]


def _estimate(value: Floats, compute: Callable[[Floats], Floats], blocks: Array, draws: int, seed: int) -> Estimate:
    value = np.where(np.isfinite(value), value, np.nan)
    defined = np.isfinite(value)
    bounds, mean_bounds = np.full((2, len(value)), np.nan), np.full(2, np.nan)
    if len(np.unique(blocks)) > 1 and defined.any():
        drawn = np.concatenate([compute(weights)[:, defined] for weights in _draws(blocks, draws, seed)])
        finite = np.isfinite(drawn)
        columns = zip(drawn.T, finite.T, strict=True)
        bounds[:, defined] = np.array([_quantiles(column[keep]) for column, keep in columns]).T
        means = np.where(finite, drawn, 0).sum(1) / np.maximum(finite.sum(1), 1)
        mean_bounds = _quantiles(means[finite.any(1)])
    mean = float(value[defined].mean()) if defined.any() else float("nan")
    low, high = (float(bound) for bound in mean_bounds)
    return Estimate(value, bounds[0], bounds[1], mean, low, high, int((~defined).sum()))


def _quantiles(drawn: Floats) -> Floats:
    return np.quantile(drawn, [0.025, 0.975]) if len(drawn) else np.full(2, np.nan)


def bootstrap_interval(
    statistics: Statistics, metric: str, blocks: Array, *, draws: int = 1000, seed: int = 0
) -> Estimate:
    """95 % interval of a metric by drawing whole blocks of regions with replacement; ``blocks`` ``(regions,)``.

    Every ``seed`` gives one fixed set of draws.
    """
    _aligned(blocks, statistics)
    return _estimate(
        statistics.compute(metric), lambda weights: statistics.compute(metric, weights), blocks, draws, seed
    )


def paired_bootstrap(
    first: Statistics, second: Statistics, metric: str, blocks: Array, *, draws: int = 1000, seed: int = 0
) -> Estimate:
    """Difference ``first - second`` of two models on the same regions and tracks, both from the same draws."""
    _aligned(blocks, first, second)
    return _estimate(
        first.compute(metric) - second.compute(metric),
        lambda weights: first.compute(metric, weights) - second.compute(metric, weights),
        blocks,
        draws,
        seed,
    )


def _aligned(blocks: Array, *statistics: Statistics) -> None:
    for entry in statistics:
        if len(blocks) != len(entry.rows):
            what = f"there are {len(entry.rows)} scored regions but {len(blocks)} block numbers"
            raise DataError(what, where="bootstrap", remedy="Give one block number per scored region, in their order")
        if not np.array_equal(entry.rows, statistics[0].rows):
            raise DataError("the two models were scored on different regions", where="bootstrap")


def spearman_brown(r: float, parts: tuple[float, float] = (1.0, 1.0)) -> float:
    """Reliability of the merged data from the correlation ``r`` of its two disjoint parts.

    Reliability is the expected correlation with an equal, independent experiment. For equal parts it is
    ``2 r / (1 + r)``; otherwise ``parts`` are their sizes (replicates or depth): with a signal-to-noise ratio s per
    unit of size, ``r^2 = (a s / (a s + 1)) (b s / (b s + 1))`` gives s, and the merged data have
    ``(a + b) s / ((a + b) s + 1)``.
    """
    if r <= 0 or r >= 1:
        return float(r) if r >= 1 or np.isnan(r) else 0.0
    a, b = parts
    square, linear, constant = a * b * (1 - r**2), -(r**2) * (a + b), -(r**2)
    ratio = (-linear + (linear**2 - 4 * square * constant) ** 0.5) / (2 * square)
    return float((a + b) * ratio / ((a + b) * ratio + 1))


def replicate_ceiling(r: float, parts: tuple[float, float] = (1.0, 1.0)) -> float:
    """The highest correlation of a noise-free prediction with the merged data: the root of their reliability."""
    return float(np.sqrt(spearman_brown(r, parts)))
