"""Fragments of cells -> counts of groups: which track each belongs to, and what is found on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from seqgraft.data.barcodes import Cells, Matcher, half_of
from seqgraft.data.fragment_files import FragmentFile, FragmentReader, count_repeats
from seqgraft.data.spill import Spill
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.progress import progress

__all__ = ["UNITS", "Assay", "Contigs", "Layout", "Tally", "count_assay"]

#: What is counted -> the unit of its tracks.
UNITS = {
    "insertions": "insertions (both ends of each fragment)",
    "fragments": "bases covered by fragments",
    "midpoints": "midpoints of fragments",
}

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Assay:
    """What was measured, in which files, and what of it is counted.

    Attributes:
        name: of the assay or mark; the group of its tracks.
        count: ``insertions``, both ends of each fragment (its first and its last base), for ATAC; ``fragments``, every
            base of it (for RNA: of its aligned blocks); ``midpoints``, the base at ``(start + end) // 2``, for CUT&Tag.
        files: of fragments, one for each sample or strand.
        shift: bp added to the first and the last base of a fragment before they count as insertions. Fragments of Cell
            Ranger, SnapATAC2, ArchR and sinto are shifted already, so the default is none; ``[4, -5]`` is for ends of
            alignments.
        squash, scale, soft_clip, clip: of its tracks; ``soft_clip: suggested`` takes the suggestion of the QC table.
    """

    name: str
    count: Literal["insertions", "fragments", "midpoints"]
    files: tuple[FragmentFile, ...]
    shift: tuple[int, int] = (0, 0)
    squash: str = "none"
    scale: float = 1.0
    soft_clip: float | Literal["suggested"] | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        problems, where = Problems(ConfigError), f"assay {self.name}"
        if self.count not in UNITS:
            problems.add("cannot count", self.count, where=where, remedy=f"Choose from {', '.join(UNITS)}")
        if self.count != "insertions" and tuple(self.shift) != (0, 0):
            remedy = "Leave shift out, or count insertions"
            problems.add(f"a shift has no meaning with count: {self.count}", self.shift, where=where, remedy=remedy)
        if not self.files:
            problems.add("the assay has no files", where=where, remedy="List at least one")
        without = [str(file.path) for file in self.files if file.strand is None]
        if without and len(without) < len(self.files):
            remedy = "Say the strand of every file of the assay: +, -, forward or reverse"
            problems.add("some files have a strand and others do not", without[0], where=where, remedy=remedy)
        problems.raise_if_any()

    @property
    def strands(self) -> tuple[str, ...]:
        """Endings of the names of its tracks."""
        return ("",) if self.files[0].strand is None else ("+", "-")


@dataclass(frozen=True)
class Layout:
    """Position of every track: assays in their order, in each the groups, of each its strands.

    A key of the spill is twice the position, plus the half of the cells.
    """

    assays: Sequence[Assay]
    groups: list[str]

    def positions(self, assay: Assay) -> list[int]:
        """Of the tracks of an assay."""
        before = self.assays[: [a.name for a in self.assays].index(assay.name)]
        first = len(self.groups) * sum(len(a.strands) for a in before)
        return list(range(first, first + len(self.groups) * len(assay.strands)))

    def rows(self) -> list[dict[str, Any]]:
        """Of a track table: name, group (the assay), condition (the group of cells), strand partner, scale."""
        several, rows = len(self.assays) > 1, []
        for assay in self.assays:
            for group in self.groups:
                name = f"{group}_{assay.name}" if several else group
                for strand, other in zip(assay.strands, reversed(assay.strands), strict=True):
                    row = {"name": name + strand, "group": assay.name, "strand_pair": name + other, "condition": group}
                    soft = None if assay.soft_clip == "suggested" else assay.soft_clip
                    settings = {"squash": assay.squash, "scale": assay.scale, "soft_clip": soft, "clip": assay.clip}
                    rows.append(row | settings)
        return rows


@dataclass(frozen=True)
class Contigs:
    """The chromosomes of the genome.

    Attributes:
        lengths: of all.
        rename: name in a file -> name in the genome.
        used: those of the regions, which count in tables.
        kept: those whose positions are kept.
    """

    lengths: Mapping[str, int]
    rename: Mapping[str, str]
    used: set[str]
    kept: set[str]


@dataclass
class Tally:
    """What was found in the files of an assay.

    Attributes:
        fragments: of each group and strand, on the contigs that are used, ``(groups * strands,)``.
        per_cell: group and number of fragments of every cell that has some.
        files: one report per file.
        cells: of the table, that were found.
        expected: of the table, that should be there.
    """

    fragments: Ints
    per_cell: list[tuple[Ints, Ints]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    cells: set[int] = field(default_factory=set)
    expected: set[int] = field(default_factory=set)


class _Found(Protocol):
    """The cells of one file: numbers for barcodes, the group and half of each number."""

    def find(self, barcodes: Sequence[str]) -> Ints: ...
    def check(self) -> None: ...
    def report(self) -> dict[str, Any]: ...
    def groups(self) -> Ints: ...
    def halves(self) -> Ints: ...


class _OfTable(Matcher):
    """Cells that a table names."""

    def groups(self) -> Ints:
        return self.cells.group

    def halves(self) -> Ints:
        return self.cells.half


@dataclass
class _OfFile:
    """Every barcode is a cell of the one group of its file."""

    group: int
    found: dict[str, int] = field(default_factory=dict)

    def find(self, barcodes: Sequence[str]) -> Ints:
        return np.array([self.found.setdefault(name, len(self.found)) for name in barcodes], dtype=np.int64)

    def check(self) -> None:
        pass

    def report(self) -> dict[str, Any]:
        return {"barcodes": len(self.found)}

    def groups(self) -> Ints:
        return np.full(len(self.found), self.group, dtype=np.int64)

    def halves(self) -> Ints:
        return np.array([half_of(name) for name in self.found], dtype=np.int64)


def count_assay(assay: Assay, layout: Layout, cells: Cells | None, contigs: Contigs, spill: Spill) -> Tally:
    """Reads the files of an assay once and keeps what each fragment counts.

    Args:
        cells: of the table of labels, with the groups of the layout; None if every file is a group.

    Raises:
        DataError: what is wrong with any of the files, all at once.
    """
    tally, problems = Tally(np.zeros(len(layout.positions(assay)), np.int64)), Problems(DataError)
    in_table = np.zeros(0 if cells is None else len(cells.barcode), np.int64)
    for file in assay.files:
        try:
            if file.group is not None:
                own = _OfFile(layout.groups.index(file.group))
                counts = _count_file(file, own, assay, layout, contigs, spill, tally)
                tally.per_cell.append((own.groups(), counts))
            else:
                assert cells is not None  # the source has checked it
                found = _OfTable(cells, file.sample, str(file.path))
                tally.expected |= set(found.expected.tolist())
                in_table += _count_file(file, found, assay, layout, contigs, spill, tally)
        except DataError as error:
            problems.extend(error)
    problems.raise_if_any()
    if cells is not None:
        tally.cells = set(np.flatnonzero(in_table).tolist())
        tally.per_cell.append((cells.group, in_table))
    return tally


def _count_file(
    file: FragmentFile, found: _Found, assay: Assay, layout: Layout, contigs: Contigs, spill: Spill, tally: Tally
) -> Ints:
    """Adds the fragments of a file to spill and tally; fragments of each cell."""
    reader, notes = FragmentReader(file, contigs.lengths, contigs.rename), Counter[str]()
    repeats, per_cell = _Repeats(), np.zeros(0, np.int64)
    for part in progress(reader.read(), f"Reading {file.path.name}"):
        cell = np.append(found.find(part.barcodes), -1)[part.code]
        kept = cell >= 0
        cell, start, end = cell[kept], part.start[kept], part.end[kept]
        strand = np.zeros(len(cell), np.int64) if part.minus is None else part.minus[kept].astype(np.int64)
        whole = np.ones(len(cell), dtype=bool) if part.first is None else part.first[kept]
        notes["counted"] += int(whole.sum())
        if part.first is None:
            notes["repeated"] += repeats.more(part.chrom, start, end, cell, strand)
        per_cell = np.append(per_cell, np.zeros(len(found.groups()) - len(per_cell), np.int64))
        if part.chrom not in contigs.used:
            notes["on_unused_contigs"] += int(whole.sum())
        track = found.groups()[cell] * len(assay.strands) + strand
        if part.chrom in contigs.used:
            tally.fragments += np.bincount(track[whole], minlength=len(tally.fragments))
            per_cell += np.bincount(cell[whole], minlength=len(per_cell))
        if part.chrom in contigs.kept:
            key = 2 * (track + layout.positions(assay)[0]) + found.halves()[cell]
            length = contigs.lengths[part.chrom]
            notes["outside_after_shift"] += _keep(assay, part.chrom, start, end, key, length, spill)
    found.check()
    report = {"path": str(file.path), "assay": assay.name, "sample": file.sample, "fragments": reader.rows}
    foreign = dict(reader.foreign.most_common())
    counts = {name: notes[name] for name in ("counted", "repeated", "on_unused_contigs", "outside_after_shift")}
    unlisted = {"not_in_the_fasta": foreign, "skipped_reads": dict(reader.skipped)}
    tally.files.append(report | counts | unlisted | found.report())
    return per_cell


def _keep(assay: Assay, chrom: str, start: Ints, end: Ints, key: Ints, length: int, spill: Spill) -> int:
    """Adds what fragments count; how many insertions fell outside of the chromosome after their shift."""
    if assay.count == "fragments":
        spill.add(chrom, key, np.stack([start, end], axis=1))
        return 0
    if assay.count == "midpoints":
        spill.add(chrom, key, (start + end) // 2)
        return 0
    points = np.concatenate([start + assay.shift[0], end - 1 + assay.shift[1]])
    inside = (points >= 0) & (points < length)
    spill.add(chrom, np.concatenate([key, key])[inside], points[inside])
    return int((~inside).sum())


@dataclass
class _Repeats:
    """Counts repeated rows over parts of a file, of which one may go on at the start where the last ended."""

    chrom: str = ""
    rows: Ints = field(default_factory=lambda: np.zeros((4, 0), np.int64))

    def more(self, chrom: str, start: Ints, end: Ints, cell: Ints, strand: Ints) -> int:
        """How many rows of this part are equal to one before."""
        rows = np.stack([start, end, cell, strand])
        before = self.rows if chrom == self.chrom else self.rows[:, :0]
        rows = np.concatenate([before, rows], axis=1)
        known = count_repeats(before)
        if rows.size:
            self.chrom, self.rows = chrom, rows[:, rows[0] == rows[0, -1]]
        return count_repeats(rows) - known
