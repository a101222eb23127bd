"""Expression of genes in donors: reading it, and correcting it by what is fitted to some donors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.genotypes import Genotypes
from seqgraft.errors import ConfigError, DataError, Problems

__all__ = ["FEWEST", "Expression", "correct", "read_expression", "read_text_table"]

Floats = npt.NDArray[np.float64]
#: Training donors with known expression that a gene needs.
FEWEST = 10
_ROUNDS = 20  # of filling missing values by the components, and finding the components
_COMPONENT_VARIANTS = 20_000  # at most, evenly spaced, for components of the genotypes


@dataclass(frozen=True)
class Expression:
    """Expression of genes in donors, and how it is corrected.

    Attributes:
        file: genes x donors, tab-separated, the first column the gene ("matrix"), or a phenotype BED as tensorQTL takes
            it: chr, start, end, gene, then donors ("bed").
        log: natural logarithm of the values plus this; None where they are logarithms already.
        zeros: genes that are zero in more than this share of the training donors are left out (where ``log`` is given).
        covariates: columns of the table of donors whose linear effect is taken out; text becomes categories.
        genotype_components: principal components of the genotypes whose linear effect is taken out.
        components: principal components of the expression itself that are taken out, as PEER factors would be.
        paper_compatible: fit all this, and the z-scores, on all donors, those for testing included, as published
            comparisons do; scores are then too good.
    """

    file: Path
    kind: Literal["matrix", "bed"] = "matrix"
    log: float | None = None
    zeros: float = 0.5
    covariates: tuple[str, ...] = ()
    genotype_components: int = 0
    components: int = 0
    paper_compatible: bool = False


def read_text_table(path: Path, what: str) -> pd.DataFrame:
    """A table with a header, every cell as text: tab-separated, or a .csv; plain or compressed.

    Raises:
        DataError: there is no such file, or it is no table; ``what`` names it.
    """
    if not path.is_file():
        raise DataError(f"the {what} does not exist", where=path, remedy="Check the path")
    try:
        comma = ".csv" in path.suffixes
        return pd.read_csv(path, sep="," if comma else "\t", dtype=str, keep_default_na=False)
    except (ValueError, OSError, EOFError) as error:
        remedy = "Give a tab-separated table with a header, or a .csv"
        raise DataError(f"the {what} cannot be read ({error})", where=path, remedy=remedy) from error


def read_expression(settings: Expression) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Values, genes x donors, NaN where unknown; and for a BED the starts of the genes."""
    path = settings.file
    table = read_text_table(path, "table of expression")
    first = 4 if settings.kind == "bed" else 1
    if table.shape[1] <= first:
        raise DataError("the table of expression has no donors", table.shape[1], where=path)
    problems = Problems(DataError)
    gene = table.columns[first - 1]
    for names, what in ((table[gene], "gene"), (pd.Series(table.columns[first:]), "donor")):
        for name in names[names.duplicated()].unique()[:5]:
            problems.add(f"a {what} is there twice", name, where=path, remedy="Keep one of them")
    text = table.iloc[:, first:]
    numbers = text.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64, copy=True)
    empty = text.isin(["", "NA", "NaN", "nan"]).to_numpy()
    for row, column in np.argwhere(~np.isfinite(numbers) & ~empty)[:20]:
        where = f"{path}, gene {table[gene].iloc[row]}, donor {text.columns[column]}"
        problems.add("this is not a number", text.iloc[row, column], where=where, remedy="Write a number or NA")
    if settings.log is not None:
        low = np.argwhere(numbers + settings.log <= 0)
        for row, column in low[:20]:
            where = f"{path}, gene {table[gene].iloc[row]}, donor {text.columns[column]}"
            problems.add("the value has no logarithm", numbers[row, column], where=where, remedy="Raise expression.log")
    problems.raise_if_any()
    values = pd.DataFrame(numbers, index=table[gene].to_numpy(str), columns=text.columns)
    starts = pd.DataFrame()
    if settings.kind == "bed":
        begin = pd.to_numeric(table.iloc[:, 1], errors="coerce")
        if begin.isna().any():
            row = int(begin.isna().argmax())
            where = f"{path} row {row + 1}, column {table.columns[1]}"
            raise DataError("this is no position", table.iloc[row, 1], where=where, remedy="Write the 0-based start")
        columns = {"gene": table[gene], "chrom": table.iloc[:, 0], "tss": begin.astype(np.int64), "strand": "+"}
        starts = pd.DataFrame(columns)
    return values, starts


def correct(
    settings: Expression, values: Floats, fitted: npt.NDArray[np.int64], donors: pd.DataFrame, genotypes: Genotypes
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Expression in the unit that is learned, and which genes are left; everything is fitted on ``fitted`` donors.

    Raises:
        DataError: covariates that the table of donors lacks, or that are numbers for some donors alone.
        ConfigError: more components than there are.
    """
    kept = np.ones(len(values), dtype=np.bool_)
    if settings.log is not None:
        kept &= (values[:, fitted] == 0).mean(axis=1) <= settings.zeros
        values = np.log(values + settings.log)
    known = np.isfinite(values[:, fitted]).sum(axis=1)
    spread = np.nanstd(np.where(known[:, None] > 1, values[:, fitted], 0.0), axis=1)
    kept &= (known >= FEWEST) & (spread > 1e-12)
    if lacking := [name for name in settings.covariates if name not in donors]:
        there = [str(name) for name in donors if name not in ("genotypes", "fold")]
        remedy = f"The table of donors has {', '.join(there)}"
        raise DataError("there is no such covariate", lacking, where="expression.covariates", remedy=remedy)
    factors = [_categories(donors[name]) for name in settings.covariates]
    if settings.genotype_components:
        factors.append(_genotype_components(genotypes, fitted, settings.genotype_components))
    if factors:
        values = _without(values, np.column_stack(factors), fitted)
    if settings.components:
        values = _without_components(values, kept, fitted, settings.components)
    return values, kept


def _categories(column: pd.Series[str]) -> Floats:
    """Numbers as they are, text as one column per category but the first."""
    numbers = pd.to_numeric(column, errors="coerce")
    if not numbers.isna().any():
        return numbers.to_numpy(np.float64)[:, None]
    if not numbers.isna().all():
        bad = column[numbers.isna()].iloc[0]
        remedy = "Write a number for every donor, or a name for every donor"
        raise DataError("the covariate is no number for some donors", bad, where=f"column {column.name}", remedy=remedy)
    return pd.get_dummies(column, drop_first=True).to_numpy(np.float64)


def _genotype_components(genotypes: Genotypes, fitted: npt.NDArray[np.int64], count: int) -> Floats:
    """Scores of all donors on the principal components of the fitted donors' standardised dosage."""
    rows = np.unique(np.linspace(0, len(genotypes) - 1, min(len(genotypes), _COMPONENT_VARIANTS)).astype(np.int64))
    dosage = genotypes.alleles(rows).sum(axis=1).T.astype(np.float64)
    mean, sd = dosage[fitted].mean(0), dosage[fitted].std(0)
    z = (dosage - mean)[:, sd > 0] / sd[sd > 0]
    _, _, axes = np.linalg.svd(z[fitted], full_matrices=False)
    if count > len(axes):
        where, remedy = "expression.genotype_components", f"Use {len(axes)} at most"
        raise ConfigError("there are not so many components", count, where=where, remedy=remedy)
    return np.asarray(z @ axes[:count].T)


def _without(values: Floats, factors: Floats, fitted: npt.NDArray[np.int64]) -> Floats:
    """Least squares residuals of each gene on factors, plus its mean; fitted on the known values of some donors."""
    centred = factors - factors[fitted].mean(0)
    design = np.column_stack([np.ones(len(centred)), centred])
    out = values.copy()
    for row, gene in enumerate(values):
        use = fitted[np.isfinite(gene[fitted])]
        if len(use) > design.shape[1]:
            weights, *_ = np.linalg.lstsq(design[use], gene[use], rcond=None)
            out[row] = gene - centred @ weights[1:]
    return out


def _without_components(
    values: Floats, kept: npt.NDArray[np.bool_], fitted: npt.NDArray[np.int64], count: int
) -> Floats:
    """Without the leading principal components of standardised expression; those of other donors are projections."""
    mean = np.nanmean(values[kept][:, fitted], axis=1, keepdims=True)
    sd = np.nanstd(values[kept][:, fitted], axis=1, keepdims=True)
    z = (values[kept] - mean) / sd
    known = np.isfinite(z)
    filled = np.where(known, z, 0.0)
    for _ in range(1 if known.all() else _ROUNDS):
        axes, sizes, _ = np.linalg.svd(filled[:, fitted], full_matrices=False)
        if count > (sizes > 0).sum():
            where, remedy = "expression.components", f"Use {int((sizes > 0).sum())} at most"
            raise ConfigError("there are not so many components", count, where=where, remedy=remedy)
        part = axes[:, :count] @ (axes[:, :count].T @ filled)
        filled = np.where(known, z, part)  # what is missing would otherwise pull its gene away from the component
    out = values.copy()
    out[kept] = (z - part) * sd + mean
    return out
