"""Matrices of single cells (``.h5ad``): peaks or genes x groups of cells -> a prepared dataset, one bin per region.

The counts of the cells of a group are added up (pseudobulk) and brought to a million; a group is a track, a feature a
row. The sequence of a peak is the window around its middle, that of a gene the window around its start, on its strand.
Everything behind the table is that of labelled sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.barcodes import half_of, rename_groups
from seqgraft.data.dataset import Dataset
from seqgraft.data.duplicates import DuplicatePolicy
from seqgraft.data.folds import Folds
from seqgraft.data.gene_starts import GeneTable, read_gene_starts
from seqgraft.data.h5ad_files import AnnData, open_h5ad
from seqgraft.data.labelled import LabelledFile, LabelledRows, LabelledSource, write_labelled
from seqgraft.data.labels import Label, Target
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.genome import Genome, match_chroms
from seqgraft.intervals import spearman_brown

__all__ = ["H5adSource", "prepare_h5ad"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PLACE = r"^(.+)[:_-](\d+)[_-](\d+)$"
PLACED = ["chrom", "start", "end", "strand"]


@dataclass(frozen=True)
class H5adSource:
    """Where a matrix of cells x features comes from, and what is made of it.

    Attributes:
        path: the ``.h5ad``.
        group: column of ``obs`` with the group of each cell; cells without one are left out. Where every row is a group
            already, the name of the index of ``obs``.
        genome: FASTA.
        window: bp around the middle of a feature, or the start of a gene.
        folds: as everywhere; columns are those of ``var``.
        layer: matrix in ``layers``; ``X`` if not given.
        interval: columns of ``var``: chrom, start, end (0-based, half-open) and optionally strand; without them, names
            such as ``chr1:100-600`` or ``chr1-100-600`` say it.
        genes: features are genes; where those start.
        feature: column of ``var`` with the names of the features; its index if not given.
        merge: new group -> groups that it is made of.
        drop: groups to leave out.
        normalise: ``cpm`` divides a group's sums by their total over all features, and multiplies by a million.
        transform: ``log1p`` takes the natural logarithm of one more.
        fractions: whether values may be other than whole numbers.
        name: of the head.
        rename: chromosome in the file (or the table of genes) -> in the FASTA.
        duplicates, max_unknown: as for labelled sequences.
        max_skipped: largest share of features without a place in the genome, which are listed in the notes.
    """

    path: Path
    group: str
    genome: Path
    window: int
    folds: Folds
    layer: str | None = None
    interval: tuple[str, ...] = ()
    genes: GeneTable | None = None
    feature: str | None = None
    merge: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    normalise: Literal["cpm", "none"] = "cpm"
    transform: Literal["log1p", "none"] = "log1p"
    fractions: bool = False
    name: str = "cells"
    rename: Mapping[str, str] = field(default_factory=dict)
    duplicates: DuplicatePolicy = "refuse"
    max_unknown: float = 0.01
    max_skipped: float = 0.01

    def __post_init__(self) -> None:
        problems = Problems(ConfigError)
        if self.interval and self.genes is not None:
            remedy = "Leave one of them out"
            problems.add("features are intervals or genes", where="interval, genes", remedy=remedy)
        if len(self.interval) not in (0, 3, 4):
            remedy = "Name the columns of chrom, start, end and, if there is one, strand"
            problems.add("an interval has three or four columns", list(self.interval), where="interval", remedy=remedy)
        if self.genes is not None and (self.genes.file is None) == (self.genes.gtf is None):
            remedy = "Give genes: {gtf: ...} or genes: {file: ...}"
            problems.add("where genes start must be said once", where="genes", remedy=remedy)
        if not 0 <= self.max_skipped < 1:
            remedy = "Give a number from 0 to 1, as in 0.01"
            problems.add("this is not a share", self.max_skipped, where="max_skipped", remedy=remedy)
        try:
            self.labelled()
        except ConfigError as error:  # window, max_unknown, duplicates with the folds
            problems.extend(error)
        problems.raise_if_any()

    def labelled(self) -> LabelledSource:
        """The settings that labelled sequences have too."""
        genes = [] if self.genes is None else [self.genes.file or self.genes.gtf, self.genes.keep]
        return LabelledSource(
            files=tuple(LabelledFile(path) for path in (self.path, *genes) if path is not None),
            labels=(Label(self.name, task="regression"),),
            genome=self.genome,
            interval=tuple(PLACED),
            window=self.window,
            rename=self.rename,
            folds=self.folds,
            duplicates=self.duplicates,
            max_unknown=self.max_unknown,
        )


def prepare_h5ad(source: H5adSource, folder: Path) -> Dataset:
    """Add up, place, audit and write a prepared dataset of features x groups.

    Raises:
        DataError: a file that cannot be read, columns or groups that it lacks, values that are no counts, features
            without a place in the genome, and all that :func:`~seqgraft.data.labelled.prepare_labelled` refuses.
    """
    with open_h5ad(source.path) as file:
        features = _read_features(file, source)
        names, sums, notes = _add_up(file, source, len(features))
    genome = Genome.open(source.genome)
    placed = _genes(features, source, genome) if source.genes is not None else _intervals(features, source)
    kept, skipped = _on_genome(placed, source, genome)
    values = _values(sums.sum(axis=1), source)
    notes["groups"] = _quality(sums, names, notes.pop("cells"), source)
    table = placed[kept].assign(source=source.path.name).reset_index(drop=True)
    targets = [Target(Label(source.name, task="regression"), names, values.T[kept].astype(np.float32), tuple(names))]
    rows = LabelledRows(
        table=table,
        places=[f"{source.path.name} feature {name}" for name in table["name"]],
        targets=targets,
        covariates=pd.DataFrame(index=table.index),
        notes={**notes, "skipped": skipped},
        settings={"kind": "h5ad", **asdict(source)},
    )
    return write_labelled(rows, source.labelled(), Path(folder), Problems(DataError))


# Counts


def _add_up(file: AnnData, source: H5adSource, features: int) -> tuple[list[str], Floats, dict[str, Any]]:
    """Names of the groups, sums ``(groups, halves of the cells, features)``, and notes."""
    group, written = file.groups(source.group)
    new_name = rename_groups(written, source.merge, source.drop)
    names = sorted(set(new_name.values()))
    number = {name: position for position, name in enumerate(names)}
    new = np.array([*(number.get(new_name.get(name, ""), -1) for name in written), -1], dtype=np.int64)
    group = new[group]
    cells = np.bincount(group[group >= 0], minlength=len(names))
    problems = Problems(DataError)
    where = f"{source.path}, obs column {source.group!r}"
    if not names:
        problems.add("no cell has a group in the column", source.group, where=where, remedy="Choose another column")
    for name in np.array(names)[cells == 0].tolist():
        remedy = f"Leave it out with drop: [{name}], or choose another column"
        problems.add("no cell is of the group", name, where=where, remedy=remedy)
    problems.raise_if_any()
    barcodes = file.columns("obs", {"name": None})["name"]
    half = np.array([half_of(name) for name in barcodes], dtype=np.int64)
    sums, fractions = file.sums(source.layer, np.where(group < 0, -1, 2 * group + half), 2 * len(names), features)
    sums = sums.reshape(len(names), 2, features)
    where = f"{source.path}, {source.layer or 'X'}"
    if fractions and not source.fractions:
        remedy = "Name the layer that holds counts, or set fractions: true if these are counts that were corrected"
        problems.add("values are not whole numbers: they may be logarithms", fractions, where=where, remedy=remedy)
    for name in np.array(names)[sums.sum(axis=(1, 2)) == 0].tolist():
        problems.add("the cells of the group have no counts", name, where=where, remedy=f"Add drop: [{name}]")
    problems.raise_if_any()
    left_out = int((group < 0).sum())
    return names, sums, {"cells": cells, "cells_left_out": left_out, "values_not_whole": fractions}


def _values(sums: Floats, source: H5adSource) -> Floats:
    """Sums over the last axis, the features, as the settings have them."""
    if source.normalise == "cpm":
        total = sums.sum(axis=-1, keepdims=True)
        sums = sums / np.where(total > 0, total, 1) * 1e6
    return np.log1p(sums) if source.transform == "log1p" else sums


def _quality(sums: Floats, names: list[str], cells: Ints, source: H5adSource) -> dict[str, dict[str, float | None]]:
    """Of each group: cells, counts, the correlation of random halves of its cells over the features, the reliability
    of both together (Spearman and Brown), and its root, the highest Pearson of a prediction without noise."""
    halves = _values(sums, source)
    found: dict[str, dict[str, float | None]] = {}
    for number, name in enumerate(names):
        known = bool((halves[number].std(axis=1) > 0).all())
        r = float(np.corrcoef(halves[number])[0, 1]) if known else float("nan")
        reliability = spearman_brown(r) if r > 0 else float("nan")
        scores = {"split_half": r, "reliability": reliability, "ceiling": float(np.sqrt(reliability))}
        counts = {"cells": int(cells[number]), "counts": float(sums[number].sum())}
        found[name] = {**counts, **{key: value if np.isfinite(value) else None for key, value in scores.items()}}
    return found


# Places


def _read_features(file: AnnData, source: H5adSource) -> pd.DataFrame:
    """name, source_row (from 1), the columns of the interval and those that folds name; all but the row as text."""
    more = [name for name in source.labelled().fold_columns if name not in (*PLACED, "name")]
    columns = file.columns("var", {"name": source.feature, **{name: name for name in (*source.interval, *more)}})
    features = pd.DataFrame(columns, dtype=str)
    twice = features["name"][features["name"].duplicated()]
    if len(twice):
        remedy = "Name a column of unique names, as in feature: gene_ids, or keep one row of each"
        where = f"{source.path}, var"
        raise DataError(
            f"{len(twice)} features have the name of another, such as", twice.iloc[0], where=where, remedy=remedy
        )
    return features.assign(source_row=np.arange(1, len(features) + 1))


def _intervals(features: pd.DataFrame, source: H5adSource) -> pd.DataFrame:
    """The features with their places, from their names or columns."""
    where = f"{source.path}, var"
    if source.interval:
        chrom, start, end = (features[name] for name in source.interval[:3])
        strand = features[source.interval[3]] if len(source.interval) > 3 else "."
        remedy = "Give 0-based start, larger end, and strand +, - or ."
    else:
        parts = features["name"].str.extract(PLACE)
        chrom, start, end, strand = parts[0].fillna(""), parts[1], parts[2], "."
        remedy = "Give names such as chr1:100-600, name columns in interval, or say where genes start in genes"
    first, last = (pd.to_numeric(column, errors="coerce") for column in (start, end))
    placed = features.assign(chrom=chrom, strand=strand)
    good = (first >= 0) & (last > first) & (first % 1 == 0) & (last % 1 == 0) & (placed["chrom"] != "")
    good &= placed["strand"].isin(["+", "-", "."])
    if not good.all():
        what = f"{(~good).sum()} of {len(good)} features have no place; the first is"
        raise DataError(what, str(features["name"][~good].iloc[0]), where=where, remedy=remedy)
    return placed.assign(start=first.astype(np.int64), end=last.astype(np.int64))


def _genes(features: pd.DataFrame, source: H5adSource, genome: Genome) -> pd.DataFrame:
    """The features with the first base of their genes; chrom "" where the table has no such gene.

    A gene is looked up by its identifier, then, in a GTF, by its name, if only one gene has that.
    """
    assert source.genes is not None
    genes = read_gene_starts(source.genes, genome, source.rename).set_index("gene")
    found = features["name"].where(features["name"].isin(genes.index), "")
    if "gene_name" in genes:
        named = genes["gene_name"][~genes["gene_name"].duplicated(keep=False)]
        by_name = features["name"].map(dict(zip(named, named.index, strict=True))).fillna("")
        found = found.where((found != "") | by_name.isin(found), by_name)
    places = genes[["chrom", "tss", "strand"]].reindex(found)
    start = places["tss"].fillna(0).to_numpy(np.int64)
    chrom, strand = places["chrom"].fillna("").to_numpy(str), places["strand"].fillna(".").to_numpy(str)
    return features.assign(chrom=chrom, start=start, end=start + 1, strand=strand)


def _on_genome(
    placed: pd.DataFrame, source: H5adSource, genome: Genome
) -> tuple[npt.NDArray[np.bool_], list[dict[str, str]]]:
    """Which features lie on the genome, and those that do not with the reason."""
    chrom = placed["chrom"].replace(dict(source.rename))
    unknown = chrom == ""
    match_chroms(sorted(set(chrom[~unknown])), genome, source.path, more=True)
    absent = ~unknown & ~chrom.isin(genome.chroms)
    reasons = np.select(
        [unknown, absent], ["no such gene in the table of genes", "no such chromosome in the genome"], ""
    )
    skipped = [{"name": n, "reason": reason} for n, reason in zip(placed["name"], reasons, strict=True) if reason]
    if len(skipped) > source.max_skipped * len(placed):
        what = f"{len(skipped)} of {len(placed)} features are not on the genome; the first ({skipped[0]['reason']}) is"
        remedy = "Use the same names in both, or raise max_skipped to leave them out"
        raise DataError(what, skipped[0]["name"], where=source.path, remedy=remedy)
    beyond = placed[placed["end"] > chrom.map(genome.chroms)]
    if len(beyond):
        what = f"{len(beyond)} features reach beyond the end of their chromosome; the first is"
        value = "{name} ({chrom}:{start}-{end})".format(**beyond.iloc[0])
        raise DataError(what, value, where=source.path, remedy="Is the FASTA of the same assembly?")
    return (reasons == ""), skipped
