"""Folds: which rows train, which validate, which test, and what a published trunk has already seen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.genome import Interval

__all__ = ["Folds", "assign_folds", "exposure", "fold_overlaps", "read_trunk_folds"]

FOLDS = ("train", "valid", "test", "unused")


@dataclass(frozen=True, slots=True)
class Folds:
    """How rows become folds. Rows that nothing names are training rows.

    ``{by: chromosome, valid: [chrX], test: [chrXIV, chrXVI]}``: whole chromosomes (or whatever ``column`` names).
    Naming ``train`` as well leaves the rest "unused".

    ``{by: column, column: split, names: {dev: valid}}``: a column that says it; ``names`` translates its values. With
    ``valid: 0.1`` a part of the training rows becomes validation rows, for data that come with train and test only.

    ``{by: random, valid: 0.1, test: 0.1, group: gene, seed: 1}``: shares of the rows; rows with the same ``group`` stay
    together.

    ``{by: cluster, distance: 50000, valid: 0.1, test: 0.1}``: as random, and regions less than ``distance`` bp apart
    stay together.
    """

    by: Literal["chromosome", "column", "random", "cluster"] = "column"
    train: tuple[str, ...] = ()
    valid: tuple[str, ...] | float = ()
    test: tuple[str, ...] | float = ()
    column: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    distance: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems(ConfigError)
        if self.by == "chromosome":
            self._check_chromosomes(problems)
        else:
            self._check_shares(problems)
        allowed = {
            "chromosome": {"train", "column"},
            "column": {"column", "names", "group"},
            "random": {"group"},
            "cluster": {"group", "distance"},
        }
        if self.by not in allowed:
            problems.add("folds cannot be made by", self.by, where="folds.by", remedy=f"Use {', '.join(allowed)}")
        for name in ("train", "column", "names", "group", "distance"):
            if getattr(self, name) and name not in allowed.get(self.by, {name}):
                fitting = ", ".join(by for by, names in allowed.items() if name in names)
                remedy = f"Leave it out, or use it with by: {fitting}"
                problems.add(f"the setting has no meaning with by: {self.by}", where=f"folds.{name}", remedy=remedy)
        if self.distance < 0:
            remedy = "Give base pairs, 0 or more"
            problems.add("the distance is negative", self.distance, where="folds.distance", remedy=remedy)
        for value, fold in self.names.items():
            if fold not in FOLDS:
                remedy = f"Translate it to one of {', '.join(FOLDS)}"
                problems.add("this is not a fold", fold, where=f"folds.names.{value}", remedy=remedy)
        problems.raise_if_any()

    def _check_chromosomes(self, problems: Problems) -> None:
        named: dict[str, str] = {}
        for fold in ("train", "valid", "test"):
            value = getattr(self, fold)
            if isinstance(value, float | int):
                remedy = f"List them, as in {fold}: [chr8], or use by: cluster for shares of the regions"
                problems.add("folds by chromosome need names", value, where=f"folds.{fold}", remedy=remedy)
                continue
            for chrom in value:
                if chrom in named:
                    where, remedy = f"folds.{fold}", "Name every chromosome once"
                    problems.add(f"the chromosome is in {named[chrom]} already", chrom, where=where, remedy=remedy)
                named[chrom] = fold
        if not (self.valid or self.test):
            remedy = "Name them, as in valid: [chr9], test: [chr8]"
            problems.add("no chromosome is held out", where="folds", remedy=remedy)

    def _check_shares(self, problems: Problems) -> None:
        total = 0.0
        for fold in ("valid", "test"):
            value = getattr(self, fold)
            if isinstance(value, float | int):
                total += value
                if not 0 <= value < 1:
                    remedy = "Give a number from 0 to 1, as in 0.1"
                    problems.add("this is not a share of the rows", value, where=f"folds.{fold}", remedy=remedy)
            elif value:
                remedy = "Give a share, as in 0.1, or use by: chromosome"
                problems.add(f"folds by {self.by} take no names", list(value), where=f"folds.{fold}", remedy=remedy)
        if total >= 1:
            problems.add("the shares leave no training rows", total, where="folds", remedy="Lower valid and test")
        if self.by in ("random", "cluster") and not total:
            problems.add("no rows are held out", where="folds", remedy="Give shares, as in valid: 0.1, test: 0.1")
        if self.by == "column" and isinstance(self.test, float | int) and self.test:
            remedy = "Take the test rows from the column; only valid can be a share"
            problems.add("folds by column take no share of test rows", self.test, where="folds.test", remedy=remedy)

    def share(self, fold: Literal["valid", "test"]) -> float:
        """The share of rows asked for, 0 where names were given."""
        value: tuple[str, ...] | float = getattr(self, fold)
        return float(value) if isinstance(value, float | int) else 0.0


def assign_folds(regions: pd.DataFrame, folds: Folds, *, together: NDArray[np.int64] | None = None) -> pd.Series[str]:
    """The fold of every row: "train", "valid", "test" or "unused".

    ``regions`` has chrom, start, end (0-based, half-open; chrom "" where there is no genome) and the columns that
    ``folds`` names. ``together``, pairs of rows (pairs, 2), stay in one fold where folds are shares of the rows.

    Raises:
        DataError: a column or chromosome is missing, a value is not a fold, a fold is empty, or regions of different
            folds overlap in the genome.
    """
    if not len(regions):
        raise DataError("there are no rows to make folds of", where="folds", remedy="Check the source files")
    if folds.by == "chromosome":
        named = _by_chromosome(regions, folds)
    elif folds.by == "column":
        named = _by_column(regions, folds, together)
    else:
        groups = _groups(regions, folds, together)
        named = _draw(groups, np.full(len(regions), "train", dtype=object), folds, ("test", "valid"))
    problems = Problems(DataError)
    for fold in ("train", "valid", "test"):
        asked = fold == "train" or bool(getattr(folds, fold))
        if asked and not (named == fold).any():
            remedy = "Check the names, or give larger shares and smaller groups"
            problems.add("the fold has no rows", fold, where="folds", remedy=remedy)
    problems.raise_if_any()
    result = pd.Series(named, index=regions.index, name="fold", dtype="str")
    _refuse_overlaps(regions, result, folds)
    return result


def _by_chromosome(regions: pd.DataFrame, folds: Folds) -> NDArray[np.object_]:
    column = _column(regions, folds.column or "chrom", "folds.column").astype(str)
    fold_of = {chrom: fold for fold in ("train", "valid", "test") for chrom in getattr(folds, fold)}
    present = set(column)
    problems = Problems(DataError)
    for chrom, fold in fold_of.items():
        if chrom not in present:
            other = chrom.removeprefix("chr") if chrom.startswith("chr") else f"chr{chrom}"
            hint = f"The data have {other if other in present else ', '.join(sorted(present)[:30])}"
            problems.add("no row is on the chromosome", chrom, where=f"folds.{fold}", remedy=hint)
    problems.raise_if_any()
    rest = "unused" if folds.train else "train"
    return np.array([fold_of.get(chrom, rest) for chrom in column], dtype=object)


def _by_column(regions: pd.DataFrame, folds: Folds, together: NDArray[np.int64] | None) -> NDArray[np.object_]:
    name = folds.column or "fold"
    column = _column(regions, name, "folds.column")
    values = ["" if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)]
    named = np.array([folds.names.get(value, value) for value in values], dtype=object)
    problems = Problems(DataError)
    for value, count in Counter(named[~np.isin(named.astype(str), FOLDS)]).items():
        remedy = f"Translate it with names: {{{value or '...'}: train}}, or to valid, test, unused"
        problems.add(f"{count} rows have a value that is not a fold", value, where=f"column {name!r}", remedy=remedy)
    problems.raise_if_any()
    return _draw(_groups(regions, folds, together), named, folds, ("valid",))


def _column(regions: pd.DataFrame, name: str, where: str) -> pd.Series[str]:
    if name not in regions:
        remedy = f"They have {', '.join(map(str, regions.columns))}"
        raise DataError("the data have no column", name, where=where, remedy=remedy)
    return regions[name]


def _groups(regions: pd.DataFrame, folds: Folds, together: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """A number per row; rows that must stay together share it."""
    rows = np.arange(len(regions), dtype=np.int64)
    labels = []
    if folds.group is not None:
        column = _column(regions, folds.group, "folds.group")
        missing = int(column.isna().sum())
        if missing:
            remedy = "Fill it in: rows without a group cannot be kept together"
            raise DataError(f"{missing} rows have no value", where=f"column {folds.group!r}", remedy=remedy)
        labels.append(pd.factorize(column)[0])
    if folds.by == "cluster":
        labels.append(_clusters(regions, folds.distance))
    links = [] if together is None else [together]
    for label in labels:
        _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
        links.append(np.stack([rows, rows[first[inverse]]], axis=1))
    return _connect(len(rows), np.concatenate(links)) if links else rows


def _connect(count: int, links: NDArray[np.int64]) -> NDArray[np.int64]:
    """Connected components of ``count`` nodes under ``links`` (pairs, 2), each named by its smallest member."""
    label = np.arange(count, dtype=np.int64)
    a, b = links[:, 0], links[:, 1]
    while True:
        before = label.copy()
        low = np.minimum(label[a], label[b])
        np.minimum.at(label, before[a], low)
        np.minimum.at(label, before[b], low)
        label = label[label]
        if np.array_equal(before, label):
            return label


def _clusters(regions: pd.DataFrame, distance: int) -> NDArray[np.int64]:
    """Runs of regions on one chromosome with gaps of less than ``distance`` bp (overlapping ones always)."""
    chrom = pd.factorize(regions["chrom"])[0]
    if (regions["chrom"] == "").any():
        remedy = "Use by: random, or give intervals and a genome"
        raise DataError("the rows have no place in a genome", where="folds.by: cluster", remedy=remedy)
    start, end = regions["start"].to_numpy(), regions["end"].to_numpy()
    order = np.lexsort((start, chrom))
    label = np.zeros(len(regions), dtype=np.int64)
    reach, current, last = -math.inf, -1, -1
    for row in order:
        if chrom[row] != last or start[row] >= reach + max(distance, 0):
            current, reach, last = current + 1, -math.inf, chrom[row]
        reach = max(reach, end[row])
        label[row] = current
    return label


def _draw(
    groups: NDArray[np.int64], named: NDArray[np.object_], folds: Folds, drawn: Sequence[Literal["valid", "test"]]
) -> NDArray[np.object_]:
    """Move whole groups of training rows, in random order, into each fold of ``drawn`` until it has its share."""
    named = named.copy()
    available = np.flatnonzero(named == "train")
    wanted = {fold: round(folds.share(fold) * available.size) for fold in drawn}
    keys, sizes = np.unique(groups[available], return_counts=True)
    fold_of: dict[int, str] = {}
    for index in np.random.default_rng(folds.seed).permutation(keys.size):
        for fold in drawn:
            # a group larger than what is left goes elsewhere: a share is never exceeded
            if sizes[index] <= wanted[fold]:
                wanted[fold] -= int(sizes[index])
                fold_of[int(keys[index])] = fold
                break
    named[available] = [fold_of.get(int(group), "train") for group in groups[available]]
    return named


def _refuse_overlaps(regions: pd.DataFrame, fold: pd.Series[str], folds: Folds) -> None:
    pairs = fold_overlaps(regions, fold)
    if not len(pairs):
        return
    first = [
        f"{name} {regions['chrom'].iloc[row]}:{regions['start'].iloc[row]}-{regions['end'].iloc[row]}"
        for name, row in (
            (pairs["fold_a"].iloc[0], pairs["row_a"].iloc[0]),
            (pairs["fold_b"].iloc[0], pairs["row_b"].iloc[0]),
        )
    ]
    counts = (pairs["fold_a"] + "/" + pairs["fold_b"]).value_counts()
    listed = ", ".join(f"{count} {which}" for which, count in counts.items())
    raise DataError(
        f"regions of different folds overlap ({listed} pairs; the first is {' and '.join(first)})",
        where=f"folds by {folds.by}",
        remedy="Use by: chromosome or by: cluster, which keep neighbours together",
    )


def fold_overlaps(regions: pd.DataFrame, fold: ArrayLike) -> pd.DataFrame:
    """Regions of different folds that share bases: columns row_a, row_b, fold_a, fold_b (row positions).

    Each region appears with one partner per other fold, the one that reaches furthest. "unused" and regions without a
    chromosome are left out.
    """
    names = np.asarray(fold, dtype=object).astype(str)
    present = [name for name in (*FOLDS[:3], *sorted(set(names) - set(FOLDS))) if name in names]
    placed = (regions["chrom"] != "").to_numpy()
    parts = []
    for i, a in enumerate(present):
        for b in present[i + 1 :]:
            rows_a, rows_b = np.flatnonzero((names == a) & placed), np.flatnonzero((names == b) & placed)
            partner = _touched(regions.iloc[rows_a], regions.iloc[rows_b])
            hit = partner >= 0
            pair = {"row_a": rows_a[hit], "row_b": rows_b[partner[hit]], "fold_a": a, "fold_b": b}
            parts.append(pd.DataFrame(pair))
    columns = ["row_a", "row_b", "fold_a", "fold_b"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _touched(queries: pd.DataFrame, targets: pd.DataFrame) -> NDArray[np.int64]:
    """For each query interval, the position of an overlapping target, or -1."""
    found = np.full(len(queries), -1, dtype=np.int64)
    query_chrom, target_chrom = queries["chrom"].to_numpy(dtype=str), targets["chrom"].to_numpy(dtype=str)
    starts, ends = targets["start"].to_numpy(), targets["end"].to_numpy()
    for chrom in np.intersect1d(query_chrom, target_chrom):
        mine, theirs = np.flatnonzero(query_chrom == chrom), np.flatnonzero(target_chrom == chrom)
        theirs = theirs[np.argsort(starts[theirs], kind="stable")]
        furthest = np.maximum.accumulate(ends[theirs])
        # the first target that reaches as far as any target up to here
        holder = np.searchsorted(furthest, furthest, side="left")
        before = np.searchsorted(starts[theirs], queries["end"].to_numpy()[mine], side="left") - 1
        hit = (before >= 0) & (furthest[np.maximum(before, 0)] > queries["start"].to_numpy()[mine])
        found[mine[hit]] = theirs[holder[before[hit]]]
    return found


def read_trunk_folds(path: Path) -> pd.DataFrame:
    """Read the split stored with a trunk: BED with the fold in column 4 -> chrom, start, end, fold."""
    try:
        table = pd.read_csv(path, sep="\t", header=None, usecols=[0, 1, 2, 3], comment="#")
    except (OSError, ValueError) as error:
        remedy = "It needs chrom, start, end, fold"
        raise DataError("this is not a BED file with folds", where=path, remedy=remedy) from error
    table.columns = pd.Index(["chrom", "start", "end", "fold"])
    return table.astype({"chrom": str, "start": np.int64, "end": np.int64, "fold": str})


def exposure(regions: pd.DataFrame, trained_on: pd.DataFrame | Sequence[Interval]) -> float:
    """Share of ``regions`` (windows: chrom, start, end) that touch an interval a trunk was trained on."""
    if not isinstance(trained_on, pd.DataFrame):
        rows = [(interval.chrom, interval.start, interval.end) for interval in trained_on]
        trained_on = pd.DataFrame(rows, columns=["chrom", "start", "end"])
    if not len(regions) or not len(trained_on):
        return 0.0
    return float((_touched(regions, trained_on) >= 0).mean())
