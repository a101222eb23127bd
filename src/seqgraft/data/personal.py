"""Personal genomes: genotypes and expression of many donors -> a prepared dataset.

An example is a gene of a donor: the target is the donor's expression of it, as a z-score of the training donors; the
sequences are those of the donor's haplotypes around the gene's transcription start. Donors and genes have folds of
their own:

=================  =================================  ==========================================
fold               donors                             genes
=================  =================================  ==========================================
``train``          of training                        of training
``valid``          of validation                      of training
``test``           of testing                         of training
``unseen_genes``   of training                        of testing
``unseen_both``    of testing                         of testing
=================  =================================  ==========================================

All other pairs are "unused"; without donors for validation, training donors with genes for validation are "valid". What
is fitted to expression (corrections, means and spreads, the choice of genes) is fitted to the training donors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.calls import read_genotypes
from seqgraft.data.dataset import Dataset, DatasetInfo, hash_file, open_dataset, write_dataset
from seqgraft.data.donors import MEAN, find_sequences, save_donors
from seqgraft.data.expression import Expression, correct, read_expression, read_text_table
from seqgraft.data.folds import Folds, assign_folds
from seqgraft.data.gene_starts import GeneTable, read_gene_starts
from seqgraft.data.genotypes import Genotypes, Missing, Unphased
from seqgraft.dosage import heritability
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.genome import Genome, Interval
from seqgraft.progress import progress
from seqgraft.tracks import TrackTable

__all__ = ["DonorTable", "Expression", "GeneTable", "PersonalSource", "Selection", "prepare_personal"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DonorTable:
    """What is known of donors: a table with one row per donor.

    Attributes:
        donor: the column with the name that expression uses.
        genotypes: the column with the name that the VCF uses, where that is another.
    """

    file: Path
    donor: str = "donor"
    genotypes: str | None = None


@dataclass(frozen=True)
class Selection:
    """Which genes to keep: the most heritable ones, judged on the training donors alone.

    Attributes:
        most: how many at most.
        p: of the likelihood ratio test against no heritability, at most.
    """

    most: int | None = None
    p: float = 1.0


@dataclass(frozen=True)
class PersonalSource:
    """Settings of ``kind: personal``.

    Attributes:
        genome, vcf: the FASTA, and the VCF or BCF of all donors.
        window: bp around the transcription start.
        donor_folds, gene_folds: as everywhere; columns are those of the tables of donors and genes. Without
            ``gene_folds`` all genes are for training.
        unphased, missing: what becomes of such calls; see ``seqgraft.data.genotypes``.
        allow_skipped: also with more than 1 % of the alleles skipped.
        rename: names of contigs in the tables and the VCF -> those of the FASTA.
        select: which genes.
        mean_track: a second track "mean": what the training donors express of a gene on average, standardised over
            the genes for training. "expression" is then how donors differ from it (SAGE-net's two outputs).
    """

    genome: Path
    vcf: Path
    expression: Expression
    donor_folds: Folds
    genes: GeneTable = field(default_factory=GeneTable)
    donors: DonorTable | None = None
    window: int = 49_152
    gene_folds: Folds | None = None
    unphased: Unphased = "refuse"
    missing: Missing = "refuse"
    allow_skipped: bool = False
    rename: Mapping[str, str] = field(default_factory=dict)
    select: Selection = field(default_factory=Selection)
    mean_track: bool = False

    def __post_init__(self) -> None:
        problems = Problems(ConfigError)
        if self.window < 2 or self.window % 2:
            problems.add("the window must be an even number of bp", self.window, where="window")
        given = [name for name in ("file", "gtf") if getattr(self.genes, name) is not None]
        if len(given) > 1 or (not given and self.expression.kind == "matrix"):
            remedy = "Give genes: {file: ...} or {gtf: ...}, or expression as a BED"
            problems.add("where genes start must be said once", given or None, where="genes", remedy=remedy)
        if self.expression.covariates and self.donors is None:
            remedy = "Add donors: {file: ...} with these columns"
            problems.add("there is no table with covariates", list(self.expression.covariates), remedy=remedy)
        problems.raise_if_any()


def prepare_personal(source: PersonalSource, folder: Path) -> Dataset:
    """Read, check, correct and write a prepared dataset of donors.

    Raises:
        DataError: files that do not fit together, bad rows, genotypes that are refused (see ``read_genotypes``).
    """
    folder = Path(folder)
    genome = Genome.open(source.genome)
    values, places = read_expression(source.expression)
    genes = read_gene_starts(source.genes, genome, source.rename, (places, source.expression.file))
    table = _read_donors(source.donors, list(values.columns))
    notes: dict[str, Any] = {
        "genes_without_a_start": int((~values.index.isin(genes["gene"])).sum()),
        "genes_without_expression": int((~genes["gene"].isin(values.index)).sum()),
        "donors_without_a_row_in_their_table": values.shape[1] - len(table),
    }
    genes = genes[genes["gene"].isin(values.index)].reset_index(drop=True)
    if genes.empty or table.empty:
        what = "no gene" if genes.empty else "no donor"
        raise DataError(f"{what} is in both tables", where=source.expression.file, remedy="Use the same names in both")
    half = source.window // 2
    within = [
        Interval(chrom, max(0, tss - half - 4096), tss + half + 4096)
        for chrom, tss in zip(genes["chrom"], genes["tss"], strict=True)
    ]
    genotypes = read_genotypes(
        source.vcf,
        genome,
        donors=table["genotypes"].tolist(),
        unphased=source.unphased,
        missing=source.missing,
        within=within,
        rename=source.rename,
        allow_skipped=source.allow_skipped,
    )
    notes["genotypes"] = genotypes.report.in_words
    table = table.set_index("genotypes").loc[list(genotypes.donors)].reset_index()
    lacking = ~genes["chrom"].isin(genotypes.contigs)
    notes["genes_on_contigs_without_variants"] = int(lacking.sum())
    genes = genes[~lacking].reset_index(drop=True)
    if genes.empty:
        remedy = "Check that VCF and genes are of the same genome"
        raise DataError("no gene is on a contig that has variants", where=source.vcf, remedy=remedy)
    starts = genes["tss"] - half
    sizes = genes["chrom"].map(genome.chroms)
    notes["windows_beyond_their_contig"] = int(((starts < 0) | (starts + source.window > sizes)).sum())

    table["fold"] = assign_folds(_as_regions(table), source.donor_folds)
    expression = values.loc[genes["gene"], table["donor"]].to_numpy(np.float64)
    training = np.flatnonzero(table["fold"] == "train")
    fitted = np.arange(len(table)) if source.expression.paper_compatible else training
    expression, kept = correct(source.expression, expression, fitted, table, genotypes)
    notes["genes_left_out_as_zero_constant_or_unknown"] = int((~kept).sum())
    genes, expression = genes[kept].reset_index(drop=True), expression[kept]
    if genes.empty:
        remedy = "Look at the values, at expression.zeros, and at how many donors are for training"
        raise DataError(
            "no gene is left: all are zero, constant or unknown", where=source.expression.file, remedy=remedy
        )
    genes, expression = _select(source, genes, expression, training, genotypes, notes)
    genes["fold"] = "train"
    if source.gene_folds is not None:
        placed = genes.assign(start=genes["tss"] - half, end=genes["tss"] + half)
        genes["fold"] = assign_folds(placed, source.gene_folds)
    mean, sd = np.nanmean(expression[:, fitted], axis=1), np.nanstd(expression[:, fitted], axis=1)
    genes["mean"], genes["sd"] = mean, sd
    scores = {"expression": (expression - mean[:, None]) / sd[:, None]}
    if source.mean_track:
        scores[MEAN] = np.where(np.isfinite(expression), _levels(genes, notes)[:, None], np.nan)
    _write(source, folder, genome, genotypes, genes, table, scores, notes)
    return open_dataset(folder)


def _levels(genes: pd.DataFrame, notes: dict[str, Any]) -> Floats:
    """The genes' means with mean 0 and spread 1 over those for training.

    Raises:
        DataError: these do not differ.
    """
    level = genes["mean"].to_numpy(np.float64)
    known = level[(genes["fold"] == "train").to_numpy()]
    if not known.size or np.ptp(known) == 0:
        remedy = "Use more genes for training, or leave mean_track out"
        raise DataError("genes for training do not differ in their means", len(known), remedy=remedy)
    notes["mean_track"] = {"center": float(known.mean()), "spread": float(known.std())}
    return np.asarray((level - known.mean()) / known.std())


def _write(
    source: PersonalSource,
    folder: Path,
    genome: Genome,
    genotypes: Genotypes,
    genes: pd.DataFrame,
    table: pd.DataFrame,
    scores: Mapping[str, Floats],
    notes: dict[str, Any],
) -> None:
    """The rows: known expression alone, gene by gene; ``scores`` of each track are ``(genes, donors)``."""
    sequences, haplotypes = find_sequences(genome, genotypes, genes, source.window)
    known = np.isfinite(scores["expression"])
    gene, donor = np.nonzero(known)
    fold = _cross(genes["fold"].to_numpy(str), table["fold"].to_numpy(str))[gene, donor]
    half = source.window // 2
    tss = genes["tss"].to_numpy(np.int64)[gene]
    regions = pd.DataFrame(
        {
            "chrom": genes["chrom"].to_numpy(str)[gene],
            "start": tss - half,
            "end": tss + half,
            "strand": genes["strand"].to_numpy(str)[gene],
            "name": genes["gene"].to_numpy(str)[gene],
            "fold": fold,
            "gene": gene.astype(np.int32),
            "donor": donor.astype(np.int32),
        }
    )
    shared = haplotypes[haplotypes >= 0]
    notes |= {
        "donors": {fold: int(n) for fold, n in table["fold"].value_counts().items()},
        "genes": {fold: int(n) for fold, n in genes["fold"].value_counts().items()},
        "haplotypes": int(shared.size),
        "distinct_haplotypes": len(sequences),
        "unknown_expression": int((~known).sum()),
    }
    info = DatasetInfo(
        kind="personal",
        window=source.window,
        bins=1,
        bin_size=source.window,
        genome={"path": str(genome.path), "hash": genome.hash},
        sources=[hash_file(path) for path in _files(source)],
        settings=asdict(source),
        notes=notes,
    )
    tracks = TrackTable.build([{"name": name, "group": name, "link": "identity"} for name in scores])
    with write_dataset(folder, (len(regions), len(tracks), 1)) as writer:
        for number, of_track in enumerate(scores.values()):
            writer.targets[:, number, 0] = of_track[gene, donor]
        save_donors(writer.folder, genotypes, genes, table, sequences, haplotypes)
        writer.finish(info, regions, tracks)


def _files(source: PersonalSource) -> list[Path]:
    tables = [source.genes.file, source.genes.gtf, source.donors.file if source.donors else None]
    return [source.vcf, source.expression.file, *(path for path in tables if path is not None)]


def _cross(genes: npt.NDArray[np.str_], donors: npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
    """The fold of every pair, ``(genes, donors)``; see the module."""
    names = {
        ("train", "train"): "train",
        ("train", "valid"): "valid",
        ("train", "test"): "test",
        ("test", "train"): "unseen_genes",
        ("test", "test"): "unseen_both",
    }
    if "valid" not in donors:
        names["valid", "train"] = "valid"
    out = np.full((len(genes), len(donors)), "unused", dtype="U12")
    for (of_gene, of_donor), name in names.items():
        out[np.ix_(genes == of_gene, donors == of_donor)] = name
    return out


# ---- reading ----


def _read_donors(settings: DonorTable | None, names: list[str]) -> pd.DataFrame:
    """donor, genotypes (the name in the VCF) and what the table says; those with expression."""
    if settings is None:
        return pd.DataFrame({"donor": names, "genotypes": names})
    table = read_text_table(settings.file, "table of donors")
    wanted = [settings.donor, settings.genotypes or settings.donor]
    if lacking := [name for name in dict.fromkeys(wanted) if name not in table]:
        remedy = f"It has {', '.join(table.columns)}: name them under donors"
        raise DataError("the table of donors lacks columns", lacking, where=settings.file, remedy=remedy)
    for name in dict.fromkeys(wanted):
        if (twice := table[name][table[name].duplicated()]).size:
            raise DataError("a donor is there twice", twice.iloc[0], where=settings.file, remedy="Keep one row")
    table = table.assign(genotypes=table[wanted[1]]).rename(columns={settings.donor: "donor"})
    return table[table["donor"].isin(names)].reset_index(drop=True)


def _as_regions(donors: pd.DataFrame) -> pd.DataFrame:
    """Donors as rows without a place, for those who draw folds."""
    return donors.assign(chrom="", start=0, end=0)


def _select(
    source: PersonalSource,
    genes: pd.DataFrame,
    expression: Floats,
    training: npt.NDArray[np.int64],
    genotypes: Genotypes,
    notes: dict[str, Any],
) -> tuple[pd.DataFrame, Floats]:
    """The most heritable genes of the training donors, in the order of the table."""
    settings = source.select
    if settings.most is None and settings.p >= 1:
        return genes, expression
    half, ploidy = source.window // 2, int(genotypes.ploidy.max())
    found = []
    for number, (chrom, tss) in progress(
        list(enumerate(zip(genes["chrom"], genes["tss"], strict=True))), "heritability", total=len(genes)
    ):
        dosage, _ = genotypes.dosage(Interval(chrom, tss - half, tss + half))
        found.append(heritability(dosage.astype(np.float64), expression[number], training, ploidy=ploidy))
    genes = genes.assign(heritability=[h.value for h in found], p=[h.p for h in found])
    passing = np.flatnonzero(genes["p"] <= settings.p)
    order = passing[np.lexsort((-genes["heritability"].to_numpy()[passing], genes["p"].to_numpy()[passing]))]
    chosen = np.sort(order[: settings.most])
    if not len(chosen):
        raise DataError("no gene is as heritable as asked", settings.p, where="select.p", remedy="Raise it")
    notes["genes_not_selected"] = len(genes) - len(chosen)
    return genes.iloc[chosen].reset_index(drop=True), expression[chosen]
