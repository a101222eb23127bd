"""Linear models on dosage: what a gene's own variants say about its expression without any sequence model.

For every gene a model of its own, fitted on the training donors alone: expression is linear in how many alternate
alleles a donor carries of each variant in the window. These are the baselines of expression prediction from genotypes
(PrediXcan, FUSION), and what they explain of the training donors estimates the heritability.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNetCV, LassoCV

from seqgraft.errors import ConfigError, DataError

__all__ = ["DOSAGE_BASELINES", "Heritability", "Linear", "dosage_baselines", "fit_gene", "heritability"]

Floats = npt.NDArray[np.float64]

_GRID = np.arange(1, 100) / 100  # of heritabilities; the best is refined between its neighbours
_FEWEST = 10  # training donors
_FREQUENCY, _FOLDS = 0.05, 5  # of the rarer allele at least; of cross-validation


@dataclass(frozen=True)
class Linear:
    """A linear model of one gene.

    Attributes:
        predictions: of all donors ``(donors,)``, in the unit of the expression.
        weights: change of expression per alternate allele ``(variants,)``; 0 where a variant plays no part.
        intercept: expression of a donor with no alternate allele.
    """

    predictions: Floats
    weights: Floats
    intercept: float


@dataclass(frozen=True)
class Heritability:
    """Share of the variance of expression that the window's variants explain, with its standard error.

    By restricted maximum likelihood (REML) of ``y = mean + g + e`` with ``g ~ N(0, h2 K)``, ``e ~ N(0, (1 - h2) I)``,
    K the relatedness ``Z Z' / variants`` of standardised dosage (Yang et al. 2011, GCTA), within 0 and 1. ``p`` is of
    the likelihood ratio against none: half a chi-square with one degree of freedom and half a point at zero.
    """

    value: float
    error: float
    p: float


@dataclass(frozen=True)
class _Fold:
    """Standardised dosage: ``z`` ``(donors, used)``, of the ``used`` variants of ``(variants,)``."""

    z: Floats
    used: npt.NDArray[np.int64]
    mean: Floats
    sd: Floats
    train: npt.NDArray[np.int64]
    y: Floats
    centre: float

    @property
    def x(self) -> Floats:
        return self.z[self.train]

    @cached_property
    def reml(self) -> _Reml:
        return _reml(self)

    def linear(self, weights: Floats, variants: int) -> Linear:
        """From weights of the standardised dosage ``(used,)``."""
        out = np.zeros(variants)
        out[self.used] = weights / self.sd
        return Linear(self.centre + self.z @ weights, out, float(self.centre - self.mean @ out[self.used]))


def dosage_baselines(
    dosage: npt.NDArray[np.floating],
    expression: npt.NDArray[np.floating],
    train: npt.NDArray[np.int64],
    wanted: Sequence[str] | None = None,
    *,
    ploidy: int = 2,
    frequency: float = _FREQUENCY,
    folds: int = _FOLDS,
    seed: int = 0,
) -> dict[str, Linear]:
    """Linear models of one gene by their names in tables.

    Args:
        dosage: alternate alleles ``(donors, variants)``; NaN where a genotype is missing: the training mean stands in.
        expression: ``(donors,)``; NaN where it is unknown.
        train: which donors are fitted.
        wanted: names of ``DOSAGE_BASELINES``; None for all.
        ploidy: the most alternate alleles that a donor can carry.
        frequency: variants whose rarer allele is less frequent among the training donors are left out.
        folds: of the cross-validation within the training donors that picks the penalties of lasso and elastic net.

    Raises:
        ConfigError: an unknown name.
        DataError: too few training donors with known expression.
    """
    wanted = tuple(DOSAGE_BASELINES) if wanted is None else tuple(wanted)
    if unknown := [name for name in wanted if name not in DOSAGE_BASELINES]:
        remedy = f"Choose from {', '.join(DOSAGE_BASELINES)}"
        raise ConfigError("there is no such baseline on dosage", unknown, remedy=remedy)
    data = _prepare(dosage, expression, train, ploidy, frequency)
    return {name: data.linear(DOSAGE_BASELINES[name](data, folds, seed), dosage.shape[1]) for name in wanted}


def heritability(
    dosage: npt.NDArray[np.floating],
    expression: npt.NDArray[np.floating],
    train: npt.NDArray[np.int64],
    *,
    ploidy: int = 2,
    frequency: float = _FREQUENCY,
) -> Heritability:
    """The heritability of one gene's expression by the variants of its window; arguments as of ``dosage_baselines``."""
    return _heritability(_prepare(dosage, expression, train, ploidy, frequency))


def fit_gene(
    dosage: npt.NDArray[np.floating],
    expression: npt.NDArray[np.floating],
    train: npt.NDArray[np.int64],
    *,
    ploidy: int = 2,
) -> tuple[dict[str, Linear], Heritability]:
    """All that ``dosage_baselines`` and ``heritability`` say of one gene, whose relatedness is decomposed once."""
    data = _prepare(dosage, expression, train, ploidy, _FREQUENCY)
    models = {name: data.linear(fit(data, _FOLDS, 0), dosage.shape[1]) for name, fit in DOSAGE_BASELINES.items()}
    return models, _heritability(data)


def _heritability(data: _Fold) -> Heritability:
    if not data.used.size:
        return Heritability(0.0, 0.0, 1.0)
    found = data.reml
    at_zero, curvature = found.likelihood(0.0), found.curvature()
    ratio = max(0.0, 2 * (found.likelihood(found.value) - at_zero))
    p = 1.0 if ratio == 0 else 0.5 * float(stats.chi2.sf(ratio, 1))
    return Heritability(found.value, float(1 / np.sqrt(curvature)) if curvature > 0 else np.nan, p)


def _prepare(
    dosage: npt.NDArray[np.floating],
    expression: npt.NDArray[np.floating],
    train: npt.NDArray[np.int64],
    ploidy: int,
    frequency: float,
) -> _Fold:
    known = train[np.isfinite(expression[train])]
    if len(known) < _FEWEST:
        remedy = "Use more donors for training, or leave the gene out"
        raise DataError(f"fewer than {_FEWEST} training donors have known expression", len(known), remedy=remedy)
    fitted = np.asarray(dosage[known], dtype=np.float64)
    there = np.isfinite(fitted)
    count = np.maximum(there.sum(0), 1)
    mean = np.where(there, fitted, 0).sum(0) / count
    sd = np.sqrt(np.where(there, (fitted - mean) ** 2, 0).sum(0) / count)
    rarer = np.minimum(mean, ploidy - mean) / ploidy
    used = np.flatnonzero((sd > 0) & (rarer >= frequency) & there.any(0))
    values = np.asarray(dosage[:, used], dtype=np.float64)
    z = np.where(np.isfinite(values), (values - mean[used]) / np.where(sd[used] > 0, sd[used], 1), 0.0)
    y = np.asarray(expression[known], dtype=np.float64)
    return _Fold(z, used, mean[used], sd[used], known, y - y.mean(), float(y.mean()))


#: Weights of the standardised dosage ``(used,)``; folds and seed of a cross-validation.
Fit = Callable[[_Fold, int, int], Floats]


def _top(data: _Fold, folds: int, seed: int) -> Floats:  # noqa: ARG001  (nothing to choose)
    """The one variant that correlates most."""
    weights = np.zeros(len(data.used))
    if len(weights):
        covariance = data.x.T @ data.y / len(data.y)
        best = int(np.argmax(np.abs(covariance) / np.maximum(data.x.std(0), 1e-12)))
        weights[best] = covariance[best] / data.x[:, best].var()
    return weights


def _blup(data: _Fold, folds: int, seed: int) -> Floats:  # noqa: ARG001
    """Ridge regression with the penalty that REML gives: the best linear unbiased prediction (GBLUP)."""
    if not len(data.used):
        return np.zeros(0)
    found = data.reml
    ratio = found.value / max(1 - found.value, 1e-6)
    # cov(g) / var(e) = ratio K: weights = Z' (K + I / ratio)^-1 y / variants
    solved = found.vectors @ ((found.vectors.T @ data.y) * ratio / (1 + ratio * found.values))
    weights: Floats = data.x.T @ solved / len(data.used)
    return weights


def _penalised(make: Callable[..., LassoCV | ElasticNetCV]) -> Fit:
    def fit(data: _Fold, folds: int, seed: int) -> Floats:
        weights = np.zeros(len(data.used))
        if len(weights) and data.y.std() > 0:
            # variants in complete linkage are one column; the first of them gets the weight
            columns, first = np.unique(data.x, axis=1, return_index=True)
            order = np.argsort(first)
            columns, first = np.asfortranarray(columns[:, order]), first[order]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # of penalties that are not chosen
                model = make(cv=folds, random_state=seed).fit(columns, data.y)
            weights[first] = model.coef_
        return weights

    return fit


def _lasso(**settings: object) -> LassoCV:
    return LassoCV(fit_intercept=True, max_iter=5000, **settings)


def _elastic_net(**settings: object) -> ElasticNetCV:
    return ElasticNetCV(l1_ratio=0.5, fit_intercept=True, max_iter=5000, **settings)  # 0.5 as in PrediXcan


#: Name in tables -> how it is fitted: the models of FUSION and PrediXcan (Gusev et al. 2016, Gamazon et al. 2015).
DOSAGE_BASELINES: Mapping[str, Fit] = {
    "top SNP": _top,
    "ridge on dosage (BLUP)": _blup,
    "lasso on dosage": _penalised(_lasso),
    "elastic net on dosage": _penalised(_elastic_net),
}


@dataclass(frozen=True)
class _Reml:
    """Eigenvalues ``(n,)`` and vectors ``(n, n)`` of the relatedness, and the heritability of largest likelihood."""

    values: Floats
    vectors: Floats
    turned: Floats
    ones: Floats
    value: float

    def likelihood(self, h2: float) -> float:
        return _restricted(np.array([h2]), self.values, self.turned, self.ones)[0]

    def curvature(self, step: float = 1e-3) -> float:
        """Minus the second derivative of the log likelihood at its maximum, 0 at the bounds."""
        if not step < self.value < 1 - step:
            return 0.0
        low, here, high = (self.likelihood(self.value + d) for d in (-step, 0.0, step))
        return -(low - 2 * here + high) / step**2


def _restricted(h2: Floats, values: Floats, turned: Floats, ones: Floats) -> list[float]:
    """The restricted log likelihood with mean and variance at their best, of each heritability.

    With V = h2 K + (1 - h2) I diagonal in the eigenvectors of K (Kang et al. 2008, EMMA)::

        l = -1/2 [ (n - 1) log(r' V^-1 r) + log|V| + log(1' V^-1 1) ],   r = y - 1 m,  m = 1' V^-1 y / 1' V^-1 1
    """
    found = []
    for share in h2:
        variance = np.maximum(share * values + (1 - share), 1e-9)
        weight = float((ones**2 / variance).sum())
        residual = turned - ones * float((ones * turned / variance).sum()) / weight
        squares = max(float((residual**2 / variance).sum()), 1e-300)
        found.append(-0.5 * ((len(turned) - 1) * np.log(squares) + float(np.log(variance).sum()) + np.log(weight)))
    return found


def _reml(data: _Fold) -> _Reml:
    values, vectors = np.linalg.eigh(data.x @ data.x.T / len(data.used))
    values = np.maximum(values, 0.0)
    turned, ones = vectors.T @ data.y, vectors.T @ np.ones(len(data.y))
    grid = np.concatenate([[0.0], _GRID])
    if data.y.std() == 0:
        return _Reml(values, vectors, turned, ones, 0.0)
    for width in (0.01, 0.001):
        best = float(grid[int(np.argmax(_restricted(grid, values, turned, ones)))])
        grid = np.clip(best + width * np.linspace(-1, 1, 21), 0.0, 0.999)
    best = float(grid[int(np.argmax(_restricted(grid, values, turned, ones)))])
    return _Reml(values, vectors, turned, ones, best)
