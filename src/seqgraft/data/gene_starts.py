"""Where genes start: a table or a GTF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from seqgraft.data.expression import read_text_table
from seqgraft.errors import DataError, Problems
from seqgraft.genome import Genome, match_chroms, read_gtf

__all__ = ["GeneTable", "read_gene_starts"]


@dataclass(frozen=True)
class GeneTable:
    """Where genes start: a table, a GTF, or nothing where expression is a BED.

    Attributes:
        file: tab- or comma-separated, with the columns that the next four name; ``tss`` is 1-based.
        gtf: instead of a table: genes start at the first base of their exons, on the minus strand at the last.
        keep: a text file with one gene per line: no others.
    """

    file: Path | None = None
    gene: str = "gene"
    chrom: str = "chrom"
    tss: str = "tss"
    strand: str = "strand"
    gtf: Path | None = None
    keep: Path | None = None


def read_gene_starts(
    settings: GeneTable,
    genome: Genome,
    rename: Mapping[str, str],
    otherwise: tuple[pd.DataFrame, Path] | None = None,
) -> pd.DataFrame:
    """gene, chrom, tss (0-based), strand, and further columns of the table; of a GTF, gene_name.

    Genes on chromosomes that the genome lacks are left out.

    Args:
        rename: names of chromosomes in the file -> in the genome.
        otherwise: genes and the file that has them, where the settings name neither a table nor a GTF.

    Raises:
        DataError: no such file, columns that it lacks, rows that are no place, chromosomes or places of another
            assembly.
    """
    if settings.gtf is not None:
        exons = read_gtf(settings.gtf, rename=rename)
        grouped = exons.groupby("gene_id", sort=False)
        genes = grouped.agg(
            gene_name=("gene_name", "first"), chrom=("chrom", "first"), strand=("strand", "first"),
            low=("start", "min"), high=("end", "max"),
        )  # fmt: skip
        genes["tss"] = np.where(genes["strand"] == "-", genes["high"] - 1, genes["low"])
        genes = genes.rename_axis("gene").reset_index().drop(columns=["low", "high"])
        path: Path = settings.gtf
    elif settings.file is not None:
        genes, path = _gene_table(settings), settings.file
    else:
        assert otherwise is not None
        genes, path = otherwise[0].copy(), otherwise[1]
    genes["chrom"] = genes["chrom"].map(lambda name: rename.get(name, name))
    if settings.keep is not None:
        genes = genes[genes["gene"].isin(_listed(settings.keep, genes["gene"]))]
    match_chroms(genes["chrom"].unique(), genome, path, more=True)
    genes = genes[genes["chrom"].isin(genome.chroms)].reset_index(drop=True)
    sizes = genes["chrom"].map(genome.chroms)
    beyond = genes[(genes["tss"] < 0) | (genes["tss"] >= sizes)]
    if len(beyond):
        row = beyond.iloc[0]
        remedy = "Is the table of genes of the same assembly?"
        what = f"{len(beyond)} genes start beyond their contig, such as {row['gene']} at"
        raise DataError(what, f"{row['chrom']}:{row['tss'] + 1}", where=path, remedy=remedy)
    return genes


def _listed(path: Path, known: pd.Series[str]) -> list[str]:
    """The genes of a text file, of which at least one is known."""
    try:
        listed = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Give a text file with a gene per line"
        raise DataError(f"the list of genes cannot be read ({error})", where=path, remedy=remedy) from error
    if not known.isin(listed).any():
        remedy = f"They are called as {known.iloc[0]!r} is" if len(known) else "It has none"
        raise DataError("the table of genes has none of those listed", listed[:3], where=path, remedy=remedy)
    return listed


def _gene_table(settings: GeneTable) -> pd.DataFrame:
    assert settings.file is not None
    table = read_text_table(settings.file, "table of genes")
    wanted = {settings.gene: "gene", settings.chrom: "chrom", settings.tss: "tss", settings.strand: "strand"}
    if lacking := [name for name in wanted if name not in table]:
        remedy = f"It has {', '.join(table.columns)}: name them under genes"
        raise DataError("the table of genes lacks columns", lacking, where=settings.file, remedy=remedy)
    problems = Problems(DataError)
    for name in table[settings.gene][table[settings.gene].duplicated()].unique()[:5]:
        problems.add("a gene is there twice", name, where=settings.file, remedy="Keep one of them")
    tss = pd.to_numeric(table[settings.tss], errors="coerce")
    for row in np.flatnonzero(tss.isna() | (tss < 1) | (tss % 1 != 0))[:20]:
        where = f"{settings.file} row {row + 1}, column {settings.tss}"
        problems.add("this is no position", table[settings.tss].iloc[row], where=where, remedy="Write it 1-based")
    for row in np.flatnonzero(~table[settings.strand].isin(["+", "-", "."]))[:20]:
        where = f"{settings.file} row {row + 1}, column {settings.strand}"
        problems.add("this is no strand", table[settings.strand].iloc[row], where=where, remedy="Write +, - or .")
    problems.raise_if_any()
    return table.rename(columns=wanted).assign(tss=tss.astype(np.int64) - 1)
