"""Baselines: what is reached without the model, scored by the same code.

Every function takes arrays and returns predictions ``(rows, tracks, bins)`` for the test rows, after the link (labels:
probabilities), in the scale of the targets that it was given.

Labels: :func:`majority`, :func:`kmer_regression` and :func:`covariate_regression`. Coverage, from what a position's
*other* tracks look like (``reference``: the pretrained model's own outputs, or observed tracks if one says so):
:func:`mean_track` and :func:`nearest_track`. Coverage, from position in the window or sequence alone:
:func:`mean_profile` and :func:`sequence_ridge`. A per-track constant is no baseline for Pearson, which it leaves
undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from seqgraft.errors import ConfigError, DataError
from seqgraft.tracks import TrackTable

__all__ = [
    "Examples",
    "KmerSettings",
    "Nearest",
    "covariate_regression",
    "kmer_counts",
    "kmer_regression",
    "majority",
    "mean_profile",
    "mean_track",
    "nearest_track",
    "sequence_ridge",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Examples:
    """Sequences with labels or coverage: codes ``(rows, length)``, targets ``(rows, tracks, bins)``, NaN if missing.

    ``covariates`` ``(rows, n)`` are further numbers about each row, for regression on labels.
    """

    codes: npt.NDArray[np.uint8]
    targets: Array
    covariates: Array | None = None


# ---- labels ----


def majority(train: Examples, rows: int) -> Floats:
    """Each track's training mean for every row: the share of each class, so that the majority class wins."""
    means = np.array([_mean(column) for column in np.moveaxis(train.targets, 1, 0)])
    return np.broadcast_to(means[None, :, None], (rows, len(means), train.targets.shape[2])).copy()


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean(dtype=np.float64)) if known.size else 0.0


@dataclass(frozen=True)
class KmerSettings:
    """Regressions on labels: k-mers of these ``sizes``, and how strongly coefficients may move.

    Attributes:
        sizes: of the k-mers.
        both_strands: counts a k-mer and its reverse complement as one.
        strengths: tried on the validation rows: C of the logistic regression; for the ridge, 1 / alpha.
    """

    sizes: tuple[int, ...] = (3, 4, 5, 6)
    both_strands: bool = False
    strengths: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0)

    def __post_init__(self) -> None:
        if not self.sizes or not all(1 <= size <= 8 for size in self.sizes):
            raise ConfigError("k-mer sizes must lie between 1 and 8", self.sizes, where="evaluate.kmers.sizes")
        if not self.strengths or not all(strength > 0 for strength in self.strengths):
            raise ConfigError("must all be above 0", self.strengths, where="evaluate.kmers.strengths")


def kmer_counts(codes: npt.NDArray[np.uint8], size: int, both_strands: bool = False) -> sparse.csr_array:
    """Counts ``(rows, 4**size)`` of k-mers without N, padding or heterozygous sites."""
    number, known = _kmer_numbers(codes, size)
    if both_strands:
        number = np.minimum(number, _reverse_numbers(size)[number])
    row, column = np.nonzero(known)
    table = sparse.coo_array((np.ones(len(row)), (row, number[row, column])), shape=(len(codes), 4**size))
    return table.tocsr()


def _kmer_numbers(codes: npt.NDArray[np.uint8], size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The number in base 4 of the k-mer that starts at each position, and whether all its bases are known."""
    width = max(codes.shape[1] - size + 1, 0)
    number, known = np.zeros((len(codes), width), np.int64), np.ones((len(codes), width), bool)
    for offset in range(size):
        base = codes[:, offset : offset + width]
        number = number * 4 + np.minimum(base, 3)
        known &= base < 4
    return number, known


def _reverse_numbers(size: int) -> npt.NDArray[np.int64]:
    number, reverse = np.arange(4**size), np.zeros(4**size, np.int64)
    for _ in range(size):
        reverse, number = reverse * 4 + 3 - number % 4, number // 4
    return reverse


def kmer_regression(
    train: Examples, valid: Examples, test: Examples, tracks: TrackTable, settings: KmerSettings | None = None
) -> Floats:
    """Logistic or ridge regression on tf-idf k-mer counts, and on the covariates where the examples have them.

    Sigmoid tracks are fitted one by one, a softmax group as one label of several classes (all of it must be there),
    other tracks by ridge regression, which also gets the length and base composition. The strength is the one of the
    lowest log loss or squared error on the validation rows, per label. A label with one class only in training is
    predicted as its share.

    Returns:
        Predictions ``(test rows, tracks, 1)``.

    Raises:
        DataError: targets with more than one bin, or no training rows.
    """
    settings = settings or KmerSettings()
    parts = (train, valid, test)
    _check_labels(train, "k-mer baseline")
    kmers = _tf_idf([_all_counts(part.codes, settings) for part in parts])
    dense = _standardised([_composition(part) for part in parts])
    both = [_beside([a, sparse.csr_array(b)]) for a, b in zip(kmers, dense, strict=True)]
    if train.covariates is not None:
        more = [sparse.csr_array(values) for values in _standardised([_covariates(part) for part in parts])]
        kmers, both = ([_beside([a, b]) for a, b in zip(table, more, strict=True)] for table in (kmers, both))
    return _regression(kmers, both, train, valid, tracks, settings)


def covariate_regression(
    train: Examples, valid: Examples, test: Examples, tracks: TrackTable, settings: KmerSettings | None = None
) -> Floats:
    """Logistic or ridge regression on the covariates alone; all else as in :func:`kmer_regression`."""
    _check_labels(train, "covariate baseline")
    dense = _standardised([_covariates(part) for part in (train, valid, test)])
    return _regression(dense, dense, train, valid, tracks, settings or KmerSettings())


def _check_labels(train: Examples, where: str) -> None:
    if train.targets.shape[2] != 1:
        remedy = "Use mean_profile or sequence_ridge for coverage"
        raise DataError("regression needs labels of one bin", train.targets.shape[2], where=where, remedy=remedy)
    if not len(train.codes):
        raise DataError("there are no training rows", where=where, remedy="Choose folds that have rows")


def _regression(
    logistic: Sequence[Any],
    ridge: Sequence[Any],
    train: Examples,
    valid: Examples,
    tracks: TrackTable,
    settings: KmerSettings,
) -> Floats:
    """Predictions of every label, from the features of the train, valid and test rows."""
    predictions = majority(train, ridge[2].shape[0])
    for index in tracks.groups.values():
        link = tracks.frame["link"].iloc[index[0]]
        for label in [index] if link == "softmax" else [[track] for track in index]:
            y_train, y_valid = (part.targets[:, label, 0] for part in (train, valid))
            if link in ("sigmoid", "softmax"):
                fitted = _logistic(logistic, y_train, y_valid, settings)
            else:
                fitted = _ridge(ridge, y_train, y_valid, settings)
            if fitted is not None:
                predictions[:, label, 0] = fitted
    return predictions


def _all_counts(codes: npt.NDArray[np.uint8], settings: KmerSettings) -> sparse.csr_array:
    return _beside([kmer_counts(codes, size, settings.both_strands) for size in settings.sizes])


def _beside(tables: Sequence[sparse.csr_array]) -> sparse.csr_array:
    return sparse.csr_array(sparse.hstack(tables))


def _tf_idf(counts: Sequence[sparse.csr_array]) -> list[sparse.csr_array]:
    """Weigh k-mers by how few training rows have them (``1 + ln((1 + n) / (1 + df))``), then norm each row to 1."""
    document = np.bincount(counts[0].indices, minlength=counts[0].shape[1])
    weight = 1 + np.log((1 + counts[0].shape[0]) / (1 + document))
    weighted = [part @ sparse.diags_array(weight, format="csr") for part in counts]
    norms = [np.sqrt(part.power(2).sum(axis=1)) for part in weighted]
    scales = [sparse.diags_array(1 / np.maximum(norm, 1e-12)) for norm in norms]
    return [sparse.csr_array(scale @ part) for scale, part in zip(scales, weighted, strict=True)]


def _composition(part: Examples) -> Floats:
    bases = np.stack([(part.codes == base).sum(1) for base in range(4)], axis=1).astype(np.float64)
    length = bases.sum(1, keepdims=True)
    return np.concatenate([bases / np.maximum(length, 1), np.log(np.maximum(length, 1))], axis=1)


def _covariates(part: Examples) -> Floats:
    assert part.covariates is not None  # all parts have them or none has
    return np.asarray(part.covariates, np.float64)


def _standardised(parts: Sequence[Floats]) -> list[Floats]:
    mean, deviation = parts[0].mean(0), parts[0].std(0)
    return [(part - mean) / np.where(deviation > 1e-12, deviation, 1.0) for part in parts]


def _classes(targets: Array) -> Floats:
    """Class number of each row ``(rows, K)``, of one yes-or-no track (K = 1) or of K classes; NaN if missing."""
    known = np.isfinite(targets).all(1)
    number = targets.argmax(1) if targets.shape[1] > 1 else targets[:, 0] >= 0.5
    return np.where(known, number, np.nan)


def _best(strengths: Sequence[float], fit: Callable[[float], tuple[float, Array]]) -> Array:
    """The predictions of the strength with the lowest validation loss."""
    return min((fit(strength) for strength in strengths), key=lambda result: result[0])[1]


def _logistic(parts: Sequence[Any], y_train: Array, y_valid: Array, settings: KmerSettings) -> Array | None:
    """Probabilities ``(test rows, K)`` of targets ``(rows, K)``; None if training has one class only."""
    from sklearn.linear_model import LogisticRegression  # slow to import, and for labels alone

    true, check = _classes(y_train), _classes(y_valid)
    present = np.unique(true[np.isfinite(true)])
    if len(present) < 2:
        return None
    rows, checks = np.isfinite(true), np.isin(check, present)
    chosen = np.searchsorted(present, check[checks])

    def fit(strength: float) -> tuple[float, Array]:
        model = LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(parts[0][rows], true[rows])
        loss = 0.0
        if checks.any():
            with np.errstate(divide="ignore"):  # a class ruled out has an infinite loss
                loss = -float(model.predict_log_proba(parts[1][checks])[np.arange(len(chosen)), chosen].mean())
        return loss, model.predict_proba(parts[2])

    probabilities = np.zeros((parts[2].shape[0], max(2, y_train.shape[1])))
    probabilities[:, present.astype(int)] = _best(settings.strengths if checks.any() else (1.0,), fit)
    return probabilities if y_train.shape[1] > 1 else probabilities[:, 1:]


def _ridge(parts: Sequence[Any], y_train: Array, y_valid: Array, settings: KmerSettings) -> Array | None:
    """Predictions ``(test rows, 1)`` of one track ``(rows, 1)``; None with fewer than two training rows."""
    from sklearn.linear_model import Ridge  # slow to import, and for labels alone

    rows, checks = np.isfinite(y_train[:, 0]), np.isfinite(y_valid[:, 0])
    if rows.sum() < 2:
        return None

    def fit(strength: float) -> tuple[float, Array]:
        model = Ridge(alpha=1 / strength, solver="sparse_cg", tol=1e-4).fit(parts[0][rows], y_train[rows, 0])
        loss = float(np.square(y_valid[checks, 0] - model.predict(parts[1][checks])).mean()) if checks.any() else 0.0
        return loss, model.predict(parts[2])[:, None]

    return _best(settings.strengths if checks.any() else (1.0,), fit)


# ---- coverage ----


def mean_profile(train_targets: Array, rows: int) -> Floats:
    """Each track's mean training signal at each bin of the window, for every test row."""
    known = np.isfinite(train_targets)
    total = np.where(known, train_targets, 0).sum(0, dtype=np.float64)
    profile = total / np.maximum(known.sum(0), 1)
    return np.broadcast_to(profile[None], (rows, *profile.shape)).copy()


def mean_track(
    train_targets: Array, train_reference: Array, test_reference: Array, matches: npt.NDArray[np.bool_] | None = None
) -> Floats:
    """The mean over reference tracks at the same position, brought to each target track's training mean.

    Every reference track is first divided by its own mean in training, so that deep ones do not drown the others.

    Args:
        train_targets: ``(rows, tracks, bins)``, NaN where missing.
        train_reference, test_reference: ``(rows, references, bins)`` of the training and the test rows.
        matches: ``(tracks, references)``, which references a track averages (those of its strand, say); default all.
    """
    tracks, references = train_targets.shape[1], test_reference.shape[1]
    if matches is None:
        matches = np.ones((tracks, references), bool)
    if not matches.any(1).all():
        raise DataError("a track has no reference track to average", where="mean_track", remedy="Widen the matches")
    scale = np.array([_mean(train_reference[:, number]) for number in range(references)])
    level = np.array([_mean(train_targets[:, number]) for number in range(tracks)])
    weights = matches / matches.sum(1, keepdims=True) / np.where(scale > 0, scale, 1.0) * level[:, None]
    return np.asarray(np.matmul(weights, test_reference), np.float64)


@dataclass(frozen=True, eq=False)
class Nearest:
    """Predictions of :func:`nearest_track`, the reference chosen for each track, and their Pearson in training."""

    predictions: Floats
    reference: npt.NDArray[np.int64]
    pearson: Floats


def nearest_track(train_targets: Array, train_reference: Array, test_reference: Array) -> Nearest:
    """For each track the one reference track that correlates best with it in training, by a straight line.

    Shapes as in :func:`mean_track`. The line (least squares in training) changes no Pearson, but makes R2 and squared
    errors fair. References that are constant in training are never chosen.
    """
    centre = np.array([_mean(train_reference[:, number]) for number in range(train_reference.shape[1])])
    n, y, yy = (np.zeros((train_targets.shape[1], 1)) for _ in range(3))
    x, xx, xy = (np.zeros((train_targets.shape[1], train_reference.shape[1])) for _ in range(3))
    for part in _chunks(len(train_targets)):
        target, inputs = _by_track(train_targets[part]), _by_track(train_reference[part]) - centre[:, None]
        known = np.isfinite(target)
        target, weight = np.where(known, target, 0.0), known.astype(np.float64)
        n += weight.sum(1, keepdims=True)
        y += target.sum(1, keepdims=True)
        yy += (target**2).sum(1, keepdims=True)
        x += weight @ inputs.T
        xx += weight @ (inputs**2).T
        xy += target @ inputs.T
    n = np.maximum(n, 1)
    spread, shared = xx - x**2 / n, xy - x * y / n
    usable = spread > 1e-12 * np.maximum(xx, 1e-300)
    size = np.sqrt(np.where(usable, spread, 1.0) * np.maximum(yy - y**2 / n, 1e-300))
    pearson = np.where(usable, shared / size, -np.inf)
    best, track = pearson.argmax(1), np.arange(len(n))
    slope = np.where(usable, shared, 0.0)[track, best] / np.where(usable, spread, 1.0)[track, best]
    offset = (y[:, 0] - slope * x[track, best]) / n[:, 0] - slope * centre[best]
    predictions = test_reference[:, best] * slope[:, None] + offset[:, None]
    return Nearest(predictions, best, pearson[track, best])


def _by_track(values: Array) -> Floats:
    return np.moveaxis(np.asarray(values, np.float64), 1, 0).reshape(values.shape[1], -1)


def _chunks(rows: int, size: int = 64) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def sequence_ridge(
    train: Examples,
    valid: Examples,
    test: Examples,
    bin_size: int,
    offset: int = 0,
    *,
    reach: int = 100,
    penalties: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
) -> Floats:
    """Ridge regression of each bin on the 3-mer frequencies (GC content included) of ``reach`` bp to either side.

    Args:
        train, valid, test: codes ``(rows, length)`` of the windows, and their targets ``(rows, tracks, bins)``.
        offset: where in a window the first target bin starts; sequence beyond the bins is used as far as it goes.
        penalties: tried on the validation rows, per track; 1 weighs a standardised coefficient as much as all data.

    Raises:
        DataError: the bins reach beyond the codes, or there is no training bin.
    """
    bins, tracks = train.targets.shape[2], train.targets.shape[1]
    if offset + bins * bin_size > train.codes.shape[1]:
        what = f"{bins} bins of {bin_size} bp from {offset} reach beyond the sequence"
        raise DataError(what, train.codes.shape[1], where="sequence_ridge")

    def features(codes: npt.NDArray[np.uint8]) -> Floats:
        return _frequencies(codes, bins, bin_size, offset, reach)

    fitted, checked = (_gram(part, features) for part in (train, valid))
    n = fitted[0][-1, -1]
    if n == 0:
        raise DataError("there are no training bins", where="sequence_ridge", remedy="Choose folds that have rows")
    mean = fitted[0][-1] / n
    scale = np.append(np.diagonal(fitted[0])[:-1] / n - mean[:-1] ** 2, 0.0)  # the intercept is not penalised
    coefficients = np.stack([np.linalg.lstsq(fitted[0] + n * p * np.diag(scale), fitted[1])[0] for p in penalties])
    # Squared error on the validation rows without its constant, from their products alone.
    losses = np.einsum("pft,fg,pgt->pt", coefficients, checked[0], coefficients)
    losses -= 2 * np.einsum("pft,ft->pt", coefficients, checked[1])
    chosen = coefficients[losses.argmin(0), :, np.arange(tracks)].T
    parts = [features(test.codes[part]) @ chosen for part in _chunks(len(test.codes))]
    return np.moveaxis(np.concatenate(parts) if parts else np.empty((0, bins, tracks)), 1, 2)


def _gram(part: Examples, features: Callable[[npt.NDArray[np.uint8]], Floats]) -> tuple[Floats, Floats]:
    """Products features x features and features x targets over the bins where every track is known."""
    inputs: Floats = np.zeros((65, 65))
    outputs: Floats = np.zeros((65, part.targets.shape[1]))
    for rows in _chunks(len(part.codes)):
        target = np.moveaxis(np.asarray(part.targets[rows], np.float64), 1, 2)
        known = np.isfinite(target).all(-1)
        x = features(part.codes[rows])[known]
        inputs += x.T @ x
        outputs += x.T @ target[known]
    return inputs, outputs


def _frequencies(codes: npt.NDArray[np.uint8], bins: int, bin_size: int, offset: int, reach: int) -> Floats:
    """3-mer frequencies around each bin, and a last feature 1: ``(rows, bins, 65)``."""
    pad = -(-reach // bin_size)
    number, known = _kmer_numbers(codes, 3)
    place = (np.arange(number.shape[1]) + 1 - offset) // bin_size + pad  # of the middle base
    known = known & (place >= 0) & (place < bins + 2 * pad)
    row, column = np.nonzero(known)
    cell = (row * (bins + 2 * pad) + place[column]) * 64 + number[row, column]
    counts = np.bincount(cell, minlength=len(codes) * (bins + 2 * pad) * 64).reshape(len(codes), -1, 64)
    running = np.concatenate([np.zeros((len(codes), 1, 64), np.int64), np.cumsum(counts, axis=1)], axis=1)
    around = running[:, 2 * pad + 1 :] - running[:, :bins]
    frequency = around / np.maximum(around.sum(-1, keepdims=True), 1)
    return np.concatenate([frequency, np.ones((*frequency.shape[:2], 1))], axis=-1)
