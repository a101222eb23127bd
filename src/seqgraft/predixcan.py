"""Effects of variants as a PrediXcan model: a table of weights that scores genotypes without the network.

::

    NAME.db       SQLite: ``weights`` (gene, rsid, varID, ref_allele, eff_allele, weight) and ``extra`` (gene,
                  genename, n.snps.in.model, pred.perf.R2, pred.perf.pval, pred.perf.qval)
    NAME.txt.gz   covariances of dosage: GENE RSID1 RSID2 VALUE, every pair of a gene's variants once, and itself

as PrediXcan, S-PrediXcan and their relatives read them (Gamazon et al. 2015, Barbeira et al. 2018; MetaXcan's
``PredictionModel`` and ``MatrixManager``). A weight is the change of expression per alternate allele of a donor: the
effect of the variant on a haplotype, divided by the ploidy. Predictions lack the network's value for the reference,
which is the same for all donors. Where donors differ in ploidy, as on sex chromosomes, the fewer alleles of the others
count as if doubled (0 or 2), here as in the covariances.
"""

from __future__ import annotations

import gzip
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from seqgraft.data.donors import Donors
from seqgraft.errors import ConfigError, DataError
from seqgraft.genome import read_vcf
from seqgraft.ism import Effects, carried_share

__all__ = ["PrediXcan", "read_ids", "write_predixcan"]

Floats = npt.NDArray[np.float64]

_TABLES = (
    "CREATE TABLE weights (gene TEXT, rsid TEXT, varID TEXT, ref_allele TEXT, eff_allele TEXT, weight DOUBLE)",
    "CREATE TABLE extra (gene TEXT, genename TEXT, `n.snps.in.model` INTEGER, `pred.perf.R2` DOUBLE,"
    " `pred.perf.pval` DOUBLE, `pred.perf.qval` DOUBLE)",
)
_INDEXES = (
    "CREATE INDEX weights_gene ON weights (gene)",
    "CREATE INDEX weights_rsid ON weights (rsid)",
    "CREATE INDEX weights_rsid_gene ON weights (rsid, gene)",
    "CREATE INDEX extra_gene ON extra (gene)",
)


@dataclass(frozen=True)
class PrediXcan:
    """How variants are named, and how many are kept.

    Attributes:
        ids: a VCF whose column ID names variants (rsid); None, and where it has none: CHROM_POSITION_REF_ALT.
        build: what ends a varID, such as "b38".
        most: variants per gene at most, those that matter most to the training donors (|weight| times the standard
            deviation of dosage); None for all whose effect is not 0.
    """

    ids: Path | None = None
    build: str = ""
    most: int | None = None

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise ConfigError("must be 1 or more", self.most, where="predixcan.most", remedy="Leave it out for all")


def read_ids(path: Path, effects: Effects, rename: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variant (chrom_position_ref_alt) -> its ID in a VCF, of those that have one of their own.

    Raises:
        DataError: no such file, or it cannot be read as VCF.
    """
    wanted = set(_names(effects.table))
    found: dict[str, str] = {}
    for variant in read_vcf(path):
        chrom = (rename or {}).get(variant.chrom, variant.chrom)
        name = f"{chrom}_{variant.position}_{variant.ref.upper()}_{variant.alt.upper()}"
        if name in wanted and variant.id not in ("", "."):
            found[name] = variant.id
    count = pd.Series(list(found.values()), dtype=object).value_counts()
    return {name: rsid for name, rsid in found.items() if count[rsid] == 1}  # alternates of one record share theirs


def write_predixcan(
    folder: Path,
    name: str,
    effects: Effects,
    genes: pd.DataFrame,
    settings: PrediXcan,
    ids: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Writes ``NAME.db`` and ``NAME.txt.gz`` into a folder; how many genes, variants and ids there are.

    Genes without a variant of any effect are left out.

    Args:
        genes: of the same genes: gene, and pearson and p of added-up effects with the expression of held-out donors
            (``ism.find_drivers``). A correlation below 0 has R2 0; q-values are Benjamini and Hochberg's.
        ids: as of ``read_ids``.

    Raises:
        DataError: a gene's name has a space, which the file of covariances has no place for.
    """
    donors, training = effects.donors, np.flatnonzero(effects.donors.donors["fold"] == "train")
    if spaced := [gene for gene in genes["gene"] if not gene or any(letter.isspace() for letter in gene)]:
        remedy = "Prepare the data with names without spaces"
        raise DataError("PrediXcan's files have no place for spaces in names of genes", spaced[:5], remedy=remedy)
    weights: list[tuple[str, str, str, str, str, float]] = []
    kept: dict[str, int] = {}
    with gzip.open(folder / f"{name}.txt.gz", "wt", encoding="ascii") as file:
        file.write("GENE RSID1 RSID2 VALUE\n")
        for gene in effects.genes.tolist():
            part, dosage = effects.table.iloc[effects.rows(gene)], _dosage(donors, gene)
            weight = part["effect"].to_numpy(np.float64) / _ploidy(donors, gene)
            chosen = _largest(weight, dosage[training], settings.most)
            if not len(chosen):
                continue
            part = part.iloc[chosen]
            names = _names(part)
            var_ids = [f"{each}_{settings.build}" if settings.build else each for each in names]
            rsids = [(ids or {}).get(each, var_id) for each, var_id in zip(names, var_ids, strict=True)]
            columns = (part["gene"], rsids, var_ids, part["ref"], part["alt"], weight[chosen].tolist())
            weights += zip(*columns, strict=True)
            kept[str(part["gene"].iloc[0])] = len(chosen)
            covariance = np.atleast_2d(np.cov(dosage[training][:, chosen], rowvar=False))
            for i, j in zip(*np.triu_indices(len(chosen)), strict=True):
                file.write(f"{part['gene'].iloc[0]} {rsids[i]} {rsids[j]} {covariance[i, j]:.9g}\n")
    _write_database(folder / f"{name}.db", weights, _extra(genes, kept))
    return {"genes": len(kept), "weights": len(weights), "ids": sum(row[1] != row[2] for row in weights)}


def _names(table: pd.DataFrame) -> list[str]:
    columns = (table["chrom"], table["position"], table["ref"], table["alt"])
    return ["_".join(map(str, variant)) for variant in zip(*columns, strict=True)]


def _ploidy(donors: Donors, gene: int) -> int:
    return int(donors.genotypes.ploidy_on(donors.genes["chrom"].iloc[gene]).max())


def _dosage(donors: Donors, gene: int) -> Floats:
    """Alternate alleles ``(donors, variants)``, as if all donors had the highest ploidy."""
    return carried_share(donors, gene) * _ploidy(donors, gene)


def _largest(weight: Floats, dosage: Floats, most: int | None) -> npt.NDArray[np.int64]:
    """The variants to keep, in their order."""
    there = np.flatnonzero(weight)
    if most is None or len(there) <= most:
        return there
    matter = np.abs(weight[there]) * dosage[:, there].std(0)
    return np.sort(there[np.argsort(-matter, kind="stable")[:most]])


def _extra(genes: pd.DataFrame, kept: Mapping[str, int]) -> list[tuple[str, str, int, float, float, float]]:
    part = genes[genes["gene"].isin(list(kept))]
    p = part["p"].to_numpy(np.float64)
    q = stats.false_discovery_control(p) if len(p) else p
    r2 = np.maximum(part["pearson"].to_numpy(np.float64), 0) ** 2
    names = part["gene"].tolist()
    return list(zip(names, names, (kept[n] for n in names), r2.tolist(), p.tolist(), q.tolist(), strict=True))


def _write_database(
    path: Path,
    weights: list[tuple[str, str, str, str, str, float]],
    extra: list[tuple[str, str, int, float, float, float]],
) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        for statement in _TABLES:
            database.execute(statement)
        database.executemany("INSERT INTO weights VALUES (?, ?, ?, ?, ?, ?)", weights)
        database.executemany("INSERT INTO extra VALUES (?, ?, ?, ?, ?, ?)", extra)
        for statement in _INDEXES:
            database.execute(statement)
