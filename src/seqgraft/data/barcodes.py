"""Which cell is of which group: tables of labels, and the barcodes of fragment files matched to them.

A barcode is looked up in three steps, and the first that finds a cell decides:

1. as it is written;
2. without the name of its sample, on both sides: ``sample#``, ``sample_``, ``sample:``, ``sample-`` or ``sample.``
   before it, or the same after it (``_sample``). The sample is what the file's ``sample`` says, else the one prefix or
   suffix that all barcodes of the table share;
3. also without a number after a hyphen (``-1``), on both sides.

A form that stands for several cells finds none. How many were found by which step, and what was found on one side only,
is in the notes of the dataset.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.h5ad_files import MISSING, check_column, open_h5ad
from seqgraft.errors import ConfigError, DataError, Problems

__all__ = ["CellLabels", "Cells", "Matcher", "half_of", "read_cells", "rename_groups"]

STEPS = ("as written", "without the sample", "without the number")
SEPARATORS = "#_:-."

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CellLabels:
    """Where the groups of cells are written.

    Attributes:
        path: CSV, TSV or Parquet with a header, or the ``.h5ad`` of an AnnData, whose ``obs`` is read.
        group: column of the group (cell type, cluster); cells without one are left out.
        barcode: column of the barcodes; by default the first column, or the index of ``obs``.
        sample: column that says of which sample a cell is; files are then matched to cells of their ``sample`` only.
    """

    path: Path
    group: str
    barcode: str | None = None
    sample: str | None = None


@dataclass(frozen=True)
class Cells:
    """Cells with a group, in the order of their table.

    Attributes:
        barcode: as the table writes them, ``(cells,)``.
        group: position in ``groups``, ``(cells,)``.
        groups: their names, sorted.
        sample: of each cell; None if the table does not say.
        where: the table.
        left_out: cells without a group, and those of dropped groups.
    """

    barcode: list[str]
    group: Ints
    groups: list[str]
    sample: list[str] | None
    where: str
    left_out: int = 0

    @cached_property
    def half(self) -> Ints:
        """The random half of each cell, ``(cells,)``."""
        return np.array([half_of(name) for name in self.barcode], dtype=np.int64)


def half_of(barcode: str) -> int:
    """0 or 1: a random half of all cells, which depends on the barcode alone."""
    return hashlib.sha256(barcode.encode()).digest()[0] & 1


def read_cells(labels: CellLabels, merge: Mapping[str, Sequence[str]], drop: Sequence[str]) -> Cells:
    """The cells of a table with their groups, after merging and dropping.

    Args:
        merge: new group -> the groups of the table that it is made of.
        drop: groups of the table to leave out.

    Raises:
        ConfigError: groups that are named twice.
        DataError: no such file or column, groups that the table lacks, a barcode with two groups, no cell left.
    """
    table = _table(labels)
    known = table["group"] != ""
    new_name = rename_groups(sorted(set(table.loc[known, "group"])), merge, drop)
    group = table["group"].map(new_name)  # missing where there is none, or it is dropped
    kept = table[group.notna()].assign(group=group.dropna())
    keys = ["barcode", "sample"] if labels.sample else ["barcode"]
    twice = kept[kept.duplicated(keys, keep=False)]
    if len(twice):
        name = twice["barcode"].iloc[0]
        groups = sorted(set(twice.loc[twice["barcode"] == name, "group"]))
        remedy = "Keep one row per cell; where samples share barcodes, name the column that says the sample"
        raise DataError(f"the barcode {name!r} is there more than once, as", groups, where=labels.path, remedy=remedy)
    if kept.empty:
        remedy = "Choose the column that has the groups"
        raise DataError("no cell has a group in the column", labels.group, where=labels.path, remedy=remedy)
    names = sorted(set(kept["group"]))
    position = {name: number for number, name in enumerate(names)}
    return Cells(
        barcode=kept["barcode"].tolist(),
        group=kept["group"].map(position).to_numpy(np.int64),
        groups=names,
        sample=kept["sample"].tolist() if labels.sample else None,
        where=str(labels.path),
        left_out=len(table) - len(kept),
    )


def rename_groups(names: Sequence[str], merge: Mapping[str, Sequence[str]], drop: Sequence[str]) -> dict[str, str]:
    """Group of the table -> group of the dataset; dropped ones are not in it.

    Raises:
        ConfigError: groups that are named twice.
        DataError: groups that the table lacks.
    """
    problems = Problems(DataError)
    listed = [(f"merge.{new}", old) for new, olds in merge.items() for old in olds] + [("drop", old) for old in drop]
    for where, old in listed:
        if old not in names:
            problems.add("no cell is of the group", old, where=where, remedy=f"The table has {', '.join(names)}")
    problems.raise_if_any()
    olds = [old for _, old in listed]
    if len(olds) != len(set(olds)):
        again = next(old for old in olds if olds.count(old) > 1)
        raise ConfigError("the group is named twice", again, where="merge, drop", remedy="Name it once")
    merged = {old: new for new, parts in merge.items() for old in parts}
    for new in merge:
        if new in names and new not in olds:
            remedy = "List it among the groups that are merged, or choose another name"
            raise ConfigError("a group of this name is there already", new, where="merge", remedy=remedy)
    return {name: merged.get(name, name) for name in names if name not in drop}


def _table(labels: CellLabels) -> pd.DataFrame:
    """Text columns ``barcode``, ``group`` and, if asked for, ``sample``; "" where nothing is written."""
    path = labels.path
    if not path.is_file():
        raise DataError("the table of cell labels does not exist", where=path, remedy="Check the path")
    wanted = {"group": labels.group, "barcode": labels.barcode, "sample": labels.sample}
    if path.suffix == ".h5ad":
        kept = {name: column for name, column in wanted.items() if column is not None or name == "barcode"}
        with open_h5ad(path) as file:
            columns = file.columns("obs", kept)
    else:
        table = _read_text(path)
        wanted["barcode"] = labels.barcode or str(table.columns[0])
        columns = {}
        for name, column in wanted.items():
            if column is not None:
                check_column(column, [str(c) for c in table.columns], path)
                columns[name] = table[column].fillna("").astype(str).tolist()
    frame = pd.DataFrame(columns)
    frame["group"] = frame["group"].replace(dict.fromkeys(MISSING, ""))
    return frame


def _read_text(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            return table if isinstance(table.index, pd.RangeIndex) else table.reset_index()
        comma = path.name.removesuffix(".gz").endswith(".csv")
        return pd.read_csv(path, sep="," if comma else "\t", dtype=str, keep_default_na=False, index_col=False)
    except (ValueError, OSError) as error:  # what pandas and pyarrow raise derives from these
        remedy = "Give .csv with commas, .tsv with tabs, .parquet or .h5ad"
        raise DataError(f"the table of cell labels cannot be read ({error})", where=path, remedy=remedy) from error


# Barcodes


@dataclass
class Matcher:
    """Finds the cells of one file's barcodes; see the top of this module for how.

    Attributes:
        cells: of the table.
        sample: of the file, or None.
        where: the file, for messages.
    """

    cells: Cells
    sample: str | None
    where: str
    expected: Ints = field(init=False)  # cells of the table that could be in the file
    found: dict[str, int] = field(default_factory=dict)  # barcode of the file -> cell, -1 for none
    _step: dict[str, int] = field(default_factory=dict)
    _levels: list[dict[str, int]] = field(init=False)

    def __post_init__(self) -> None:
        names = self.cells.barcode
        chosen = np.arange(len(names))
        if self.sample is not None and self.cells.sample is not None:
            chosen = np.flatnonzero(np.array(self.cells.sample) == self.sample)
            if not chosen.size:
                remedy = f"The table has {', '.join(sorted(set(self.cells.sample))[:10])}"
                raise DataError("no cell of the table is of the sample", self.sample, where=self.where, remedy=remedy)
        elif self.sample is not None:
            named = np.array([_bare(name, self.sample) != name for name in names])
            chosen = np.flatnonzero(named) if named.any() else chosen
        elif self.cells.sample is None:
            self.sample = _shared_sample(names)
        self.expected = chosen
        forms = [self._forms(names[cell]) for cell in chosen.tolist()]
        self._levels = [_unique([form[step] for form in forms], chosen) for step in range(len(STEPS))]

    def find(self, barcodes: Sequence[str]) -> Ints:
        """The cell of each barcode, -1 where there is none.

        Raises:
            DataError: two barcodes of the file are one cell of the table.
        """
        cells = []
        for barcode in barcodes:
            cell = self.found.get(barcode)
            if cell is None:
                cell = self.found[barcode] = self._look_up(barcode)
            cells.append(cell)
        return np.array(cells, dtype=np.int64)

    def _forms(self, name: str) -> tuple[str, str, str]:
        bare = _bare(name, self.sample)
        return name, bare, re.sub(r"-\d+$", "", bare)

    def _look_up(self, barcode: str) -> int:
        for step, (level, form) in enumerate(zip(self._levels, self._forms(barcode), strict=True)):
            cell = level.get(form)
            if cell is not None:
                self._step[barcode] = step
                return cell
        return -1

    def check(self) -> None:
        """To be called when the file is read.

        Raises:
            DataError: no barcode of the file is in the table, or two of them are one cell.
        """
        matched = [(cell, barcode) for barcode, cell in self.found.items() if cell >= 0]
        if not matched:
            names = self.cells.barcode
            remedy = f"The table has {names[self.expected[0]]!r}; name the sample that its barcodes have in front"
            prefixes = sorted({name.rpartition(s)[0] for name in names for s in "#_" if s in name})
            if prefixes:
                remedy += f", such as sample: {prefixes[0]}"
            raise DataError(
                f"none of the file's {len(self.found)} barcodes is in the table of cell labels ({self.cells.where}); "
                "the first is",
                next(iter(self.found), None),
                where=self.where,
                remedy=remedy,
            )
        matched.sort()
        for (cell, one), (other, two) in pairwise(matched):
            if cell == other:
                what = f"two barcodes are one cell of the table ({self.cells.barcode[cell]!r})"
                remedy = "Number them in the table as in the file, or name the sample of each file"
                raise DataError(what, (one, two), where=self.where, remedy=remedy)

    def report(self) -> dict[str, Any]:
        """Counts of barcodes: of the file, matched, by step; of the table, of which none is in the file."""
        cells = [cell for cell in self.found.values() if cell >= 0]
        return {
            "barcodes": len(self.found),
            "matched": len(cells),
            "unmatched": len(self.found) - len(cells),
            "by_step": {name: list(self._step.values()).count(step) for step, name in enumerate(STEPS)},
            "labels": len(self.expected),
            "labels_not_in_the_file": len(self.expected) - len(set(cells)),
        }


def _bare(name: str, sample: str | None) -> str:
    """A barcode without the name of its sample before or after it."""
    if not sample:
        return name
    for separator in SEPARATORS:
        if name.startswith(sample + separator):
            return name[len(sample) + 1 :]
        if name.endswith(separator + sample):
            return name[: -len(sample) - 1]
    return name


def _shared_sample(names: Sequence[str]) -> str | None:
    """The one thing that all barcodes have before their last ``#`` or ``_``, or after their last ``_``."""
    for separator, part in (("#", 0), ("_", 0), ("_", 2)):
        found = {name.rpartition(separator)[part] for name in names}
        if len(found) == 1 and (only := found.pop()) and all(separator in name for name in names):
            return only
    return None


def _unique(forms: Sequence[str], cells: Ints) -> dict[str, int]:
    """Form -> cell, without those of several cells."""
    table = dict(zip(forms, cells.tolist(), strict=True))
    seen: set[str] = set()
    for form in forms:
        if form in seen:
            table.pop(form, None)
        seen.add(form)
    return table
