"""Folds: which rows train, which validate, which test."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from seqgraft.data.dataset import hash_file
from seqgraft.data.seen import ROLES, TRUNK_FOLDS, seen_by, touched, touched_folds, trunk_folds
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.genome import Genome

__all__ = ["TRUNK_FOLDS", "FoldPlaces", "Folds", "assign_folds", "fold_overlaps", "trunk_folds"]

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

    ``{by: kfold, k: 10, fold: 0, valid: 0.1, group: gene}``: rows (or groups) are dealt into ``k`` parts of nearly one
    size, the same for one ``seed``; part ``fold`` is for testing, and ``valid`` is a share of the others.

    ``{by: cluster, distance: 50000, valid: 0.1, test: 0.1}``: as random, and regions less than ``distance`` bp apart
    stay together.

    ``{by: trunk, trunk: borzoi, bed: sequences_human.bed.gz}``: the split of a pretrained trunk, so that nothing it was
    trained on is tested on. ``trunk`` is a published one (``TRUNK_FOLDS``), a bundled model, a model folder or a BED
    file; ``bed`` the published file, unless it lies in the cache; ``bed: download`` fetches it there. A row belongs to
    the fold that its window touches, where the trunk's input windows count and not only what it predicted there; a
    row that touches several is unused. One that touches none is a training row: nobody can say that the trunk saw
    nothing like it, and training rows need no such proof. Only where the trunk's list has no test regions, it is what
    the list leaves out that was held out: those rows are for testing, and ``valid`` is a share of the training rows.
    """

    by: Literal["chromosome", "column", "random", "kfold", "cluster", "trunk"] = "column"
    train: tuple[str, ...] = ()
    valid: tuple[str, ...] | float = ()
    test: tuple[str, ...] | float = ()
    column: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    distance: int = 0
    seed: int = 0
    k: int | None = None
    fold: int | None = None
    trunk: str | None = None
    bed: Path | None = None

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
            "kfold": {"group", "k", "fold"},
            "cluster": {"group", "distance"},
            "trunk": {"group", "trunk", "bed"},
        }
        if self.by not in allowed:
            problems.add("folds cannot be made by", self.by, where="folds.by", remedy=f"Use {', '.join(allowed)}")
        for name in ("train", "column", "names", "group", "distance", "k", "fold", "trunk", "bed"):
            if getattr(self, name) and name not in allowed.get(self.by, {name}):
                fitting = ", ".join(by for by, names in allowed.items() if name in names)
                remedy = f"Leave it out, or use it with by: {fitting}"
                problems.add(f"the setting has no meaning with by: {self.by}", where=f"folds.{name}", remedy=remedy)
        if self.by == "trunk" and not self.trunk:
            remedy = f"Name one of {', '.join(TRUNK_FOLDS)}, a bundled model, or the path of a model folder or BED file"
            problems.add("folds by trunk need the trunk", where="folds.trunk", remedy=remedy)
        if self.by == "kfold" and not (self.k is not None and self.fold is not None and 2 <= self.k > self.fold >= 0):
            remedy = "Give both, as in k: 10, fold: 0 (from 0 to k - 1)"
            problems.add("folds by kfold need k of 2 or more and one of its parts", where="folds.k", remedy=remedy)
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
        if self.by in ("column", "trunk", "kfold") and isinstance(self.test, float | int) and self.test:
            remedy = f"The {self.by} says which rows are for testing; only valid can be a share"
            problems.add(f"folds by {self.by} take no share of test rows", self.test, where="folds.test", remedy=remedy)

    def share(self, fold: Literal["valid", "test"]) -> float:
        """The share of rows asked for, 0 where names were given."""
        value: tuple[str, ...] | float = getattr(self, fold)
        return float(value) if isinstance(value, float | int) else 0.0


@dataclass
class FoldPlaces:
    """What folds by trunk need to know of the rows, and what they tell about them.

    Attributes:
        genome: that the rows lie in; None for sequences.
        margin: bp that a model sees on either side of a row.
        rename: names of chromosomes in BED files -> in the genome.
        notes: gets an entry "trunk_folds": the files with their hashes, and how many rows were treated how.
    """

    genome: Genome | None
    margin: int = 0
    rename: Mapping[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def assign_folds(
    regions: pd.DataFrame,
    folds: Folds,
    *,
    together: NDArray[np.int64] | None = None,
    places: FoldPlaces | None = None,
) -> pd.Series[str]:
    """The fold of every row: "train", "valid", "test" or "unused".

    ``regions`` has chrom, start, end (0-based, half-open; chrom "" where there is no genome) and the columns that
    ``folds`` names. ``together``, pairs of rows (pairs, 2), stay in one fold where folds are shares of the rows.
    ``places`` is for folds by trunk.

    Raises:
        DataError: a column or chromosome is missing, a value is not a fold, a fold is empty, regions of different
            folds overlap in the genome, or the trunk's regions are not at hand or of another genome.
    """
    if not len(regions):
        raise DataError("there are no rows to make folds of", where="folds", remedy="Check the source files")
    if folds.by == "chromosome":
        named = _by_chromosome(regions, folds)
    elif folds.by == "column":
        named = _by_column(regions, folds, together)
    elif folds.by == "trunk":
        named = _by_trunk(regions, folds, places or FoldPlaces(None), together)
    elif folds.by == "kfold":
        named = _by_kfold(_groups(regions, folds, together), folds)
    else:
        groups = _groups(regions, folds, together)
        named = _draw(groups, np.full(len(regions), "train", dtype=object), folds, ("test", "valid"))
    problems = Problems(DataError)
    for fold in ("train", "valid", "test"):
        asked = fold == "train" or folds.by == "trunk" or bool(getattr(folds, fold))
        asked |= fold == "test" and folds.by == "kfold"
        if asked and not (named == fold).any():
            remedy = "Check the names, or give larger shares and smaller groups"
            if folds.by == "trunk":
                remedy = "Add regions where the trunk has this fold"
                remedy += ", or take a share of the training rows, as in valid: 0.1" if fold == "valid" else ""
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


def _by_kfold(groups: NDArray[np.int64], folds: Folds) -> NDArray[np.object_]:
    """Deal the groups in random order, each to the part with the fewest rows so far; one part is for testing."""
    assert folds.k is not None
    keys, sizes = np.unique(groups, return_counts=True)
    held, part_of = np.zeros(folds.k, dtype=np.int64), np.zeros(keys.size, dtype=np.int64)
    for index in np.random.default_rng(folds.seed).permutation(keys.size):
        part_of[index] = held.argmin()
        held[part_of[index]] += sizes[index]
    test = part_of[np.searchsorted(keys, groups)] == folds.fold
    return _draw(groups, np.where(test, "test", "train").astype(object), folds, ("valid",))


def _by_trunk(
    regions: pd.DataFrame, folds: Folds, places: FoldPlaces, together: NDArray[np.int64] | None
) -> NDArray[np.object_]:
    """The folds of a trunk; of rows that overlap across folds, training gives way to validation, and that to test."""
    if places.genome is None or (regions["chrom"] == "").any():
        remedy = "Give intervals and a genome, or use another way to make folds"
        raise DataError("the rows have no place in a genome", where="folds.by: trunk", remedy=remedy)
    seen = seen_by(str(folds.trunk), folds.bed)
    theirs = seen.on(places.genome, places.rename)
    windows = regions[["chrom", "start", "end"]].assign(
        start=regions["start"] - places.margin, end=regions["end"] + places.margin
    )
    hits = touched_folds(windows, theirs)
    count = hits.sum(axis=1)
    outside = "train" if (theirs["fold"] == "test").any() else "test"
    named = np.where(count == 1, np.array(ROLES, dtype=object)[hits.argmax(axis=1)], "unused")
    named[count == 0] = outside
    beside = np.zeros(len(regions), dtype=bool)
    pairs = fold_overlaps(regions, named)  # row_a is of the fold that gives way
    beside[pairs["row_a"].to_numpy(dtype=np.int64)] = True
    named[beside] = "unused"
    places.notes["trunk_folds"] = {
        "trunk": folds.trunk,
        "assembly": seen.assembly,
        "files": [hash_file(path) for path in seen.files],
        "unused_in_several_folds": int((count > 1).sum()),
        "unused_beside_held_out_rows": int(beside.sum()),
        f"{outside}_in_no_fold": int(((count == 0) & ~beside).sum()),
    }
    return _draw(_groups(regions, folds, together), named, folds, ("valid",)) if folds.share("valid") else named


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
    if folds.by in ("cluster", "trunk"):
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
            partner = touched(regions.iloc[rows_a], regions.iloc[rows_b])
            hit = partner >= 0
            pair = {"row_a": rows_a[hit], "row_b": rows_b[partner[hit]], "fold_a": a, "fold_b": b}
            parts.append(pd.DataFrame(pair))
    columns = ["row_a", "row_b", "fold_a", "fold_b"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
