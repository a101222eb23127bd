"""Is a model linear in dosage? What it predicts of donors, beside sums over their variants.

A linear model of genotypes gives every allele one effect, whatever else its haplotype carries. Of a gene, two shares of
the variance of a model's predictions across donors are like that:

* ``linearity``: 1 - Var(v - s) / Var(v), where v is what the model predicts of the donors and s the sum over variants
  of dosage times what the model says of the variant alone on the reference haplotype, over the ploidy. Nothing is
  fitted: 1 means that in-silico mutagenesis of the reference says all that the model does.
* ``linearity_fitted``: 1 - squared error / variance of the ridge regression of the model's own predictions on the
  alleles of haplotypes, every haplotype predicted from others. It finds linear models that effects on the reference
  are not, and is a lower bound: alleles that one haplotype alone carries cannot be learned from others.

Both are 0 at least, and NaN where predictions do not differ; the latter also where haplotypes are few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from seqgraft.data.augment import FORWARD
from seqgraft.data.dataset import Dataset
from seqgraft.data.donors import Donors, shown
from seqgraft.data.genotypes import Numbers
from seqgraft.local import Recompute
from seqgraft.models.base import SequenceModel
from seqgraft.progress import progress
from seqgraft.sequence import Codes

__all__ = ["GeneLinearity", "Values", "fold_linearity", "gene_linearity", "values_of"]

Floats = npt.NDArray[np.float64]
#: From a reference window ``(length,)`` and windows ``(n, length)`` to what a model predicts of the latter, ``(n,)``.
Values = Callable[[Codes, Codes], Floats]
_FOLDS = 5
_FEWEST = 3 * _FOLDS  # haplotypes with different alleles, for a regression
_PENALTIES = 10.0 ** np.arange(-4, 3)  # times the mean variance of a haplotype


@dataclass(frozen=True)
class GeneLinearity:
    """See the module.

    Attributes:
        variants: that differ among the donors.
        haplotypes: that differ in these.
    """

    linearity: float
    linearity_fitted: float
    variants: int
    haplotypes: int


def values_of(model: SequenceModel, batch_size: int = 16) -> Values:
    """The first output of a model of one bin, after the link, on the forward strand; only what edits change is run."""
    recompute = Recompute(model)

    def values(reference: Codes, codes: Codes) -> Floats:
        start = recompute.reference(torch.from_numpy(reference))
        parts = torch.split(torch.from_numpy(codes), batch_size)
        return np.concatenate([recompute.predict(start, part)[:, 0, 0].double().cpu().numpy() for part in parts])

    return values


def fold_linearity(dataset: Dataset, fold: str, values: Values, most: int) -> pd.DataFrame:
    """A row per gene of a fold, ``most`` evenly spaced ones: gene, and the fields of ``GeneLinearity``."""
    donors, rows = dataset.donors, dataset.rows(fold)
    assert donors is not None
    gene, donor = donors.gene[rows], donors.donor[rows]
    genes = np.unique(gene)
    genes = genes[np.unique(np.linspace(0, len(genes) - 1, min(most, len(genes))).round().astype(np.int64))]
    found = [
        {"gene": each, **asdict(gene_linearity(donors, int(each), donor[gene == each], values))}
        for each in progress(genes, f"linearity {fold}", total=len(genes))
    ]
    return pd.DataFrame(found)


def gene_linearity(donors: Donors, gene: int, chosen: Numbers, values: Values) -> GeneLinearity:
    """How linear a model is across some donors ``(n,)`` of a gene; both are numbers of ``donors``."""
    dosage, rows = donors.dosage(gene)
    share = dosage[chosen] / donors.ploidy_of(gene)[chosen, None]
    differing = np.flatnonzero(np.ptp(share, axis=0) > 0)
    carried = np.asarray(donors.haplotypes[gene, chosen], dtype=np.int64)
    there = carried >= 0
    sequences, first, place = np.unique(carried[there], return_index=True, return_inverse=True)

    single = shown(donors.alone(gene, differing), FORWARD, donors.window)
    whole = donors.codes(sequences, [FORWARD] * len(sequences))
    found = values(single[-1], np.concatenate([single, whole]))
    effects = found[: len(differing)] - found[len(differing)]

    def of_donors(of_sequences: Floats) -> Floats:
        filled = np.zeros(carried.shape)
        filled[there] = of_sequences[place]
        return np.asarray(filled.sum(1) / there.sum(1))

    predicted = of_donors(found[len(differing) + 1 :])
    if donors.genotypes.encoding == "dosage":
        alleles = share[np.nonzero(there)[0][first]][:, differing]
    else:
        owners = np.argwhere(there)[first]
        owners[:, 0] = chosen[owners[:, 0]]
        span = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)
        alleles = donors.genotypes.carried(span, owners)[:, differing].astype(np.float64)
    patterns, pattern = np.unique(alleles, axis=0, return_inverse=True)
    fitted = np.nan
    if len(patterns) >= _FEWEST:
        count = np.bincount(pattern[place], minlength=len(patterns)).astype(np.float64)
        total = np.bincount(pattern[place], found[len(differing) + 1 :][place], minlength=len(patterns))
        fitted = _explained(predicted, of_donors(_from_others(patterns, total / count, count)[pattern]))
    linear = _explained(predicted, share[:, differing] @ effects)
    return GeneLinearity(linear, fitted, len(differing), len(patterns))


def _explained(values: Floats, by: Floats) -> float:
    """The share of the variance, 0 at least; NaN where values differ by no more than float32's rounding."""
    if values.std() <= 1e-6 * np.abs(values).mean() + 1e-9:
        return np.nan
    return float(max(0.0, 1 - (values - by).var() / values.var()))


def _from_others(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Ridge predictions of every row from rows of other folds, by the penalty that predicts best."""
    fold = np.random.default_rng(0).permutation(len(x)) % _FOLDS
    found = np.zeros((len(_PENALTIES), len(x)))
    for held in range(_FOLDS):
        use, out = fold != held, fold == held
        share = weights[use] / weights[use].sum()
        mean, middle = share @ x[use], float(share @ y[use])
        root = np.sqrt(share)[:, None]
        left, size, right = np.linalg.svd((x[use] - mean) * root, full_matrices=False)
        turned = left.T @ ((y[use] - middle) * root[:, 0])
        mean_square = max(float((size**2).sum()), 1e-12) / max(len(size), 1)
        for row, penalty in zip(found, _PENALTIES, strict=True):
            row[out] = middle + (x[out] - mean) @ (right.T @ (turned * size / (size**2 + penalty * mean_square)))
    error = (weights * (found - y) ** 2).sum(1)
    return np.asarray(found[int(np.argmin(error))])
