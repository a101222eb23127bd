"""Reading fragment files: text in chunks, BAM read by read, in constant memory.

A row is a fragment: chromosome, start, end (0-based, half-open), barcode, and a count of reads behind it that is never
read, because a fragment is one fragment however often it was sequenced; a sixth column is the strand. Lines that begin
with ``#`` are comments. Rows are sorted within each chromosome, and the rows of a chromosome are together, unless the
file is said to have another order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pc

from seqgraft.errors import ConfigError, DataError
from seqgraft.genome import match_chroms, read_alignments, read_lines

__all__ = ["FragmentFile", "FragmentReader", "Fragments", "count_repeats"]

CHUNK = 1 << 23  # bytes of text parsed at once
READS = 1 << 17  # reads of a BAM file gathered at once
COLUMNS = ("chrom", "start", "end", "barcode", "count", "strand")

Ints = npt.NDArray[np.int64]
Strand = Literal["+", "-", "forward", "reverse"]


@dataclass(frozen=True)
class FragmentFile:
    """One file of fragments.

    Attributes:
        path: fragments as text, best bgzipped; or ``.bam`` of single-end reads.
        sample: of the file; see ``seqgraft.data.barcodes`` for how barcodes are matched with it.
        group: all fragments of the file are of this group, whatever their barcodes; no table of labels is needed.
        strand: ``+`` or ``-`` of all its fragments; ``forward``: as column 6 (or the read of a BAM file) says;
            ``reverse``: the opposite. By default the assay has no strands.
        tag: of the cell's barcode in a BAM file.
        sorted: by place, which is checked: a lost order is the sign of files put together by mistake. ``false`` is
            for files sorted by barcode, as SnapATAC2 writes them.
    """

    path: Path
    sample: str | None = None
    group: str | None = None
    strand: Strand | None = None
    tag: str = "CB"
    sorted: bool = True

    def __post_init__(self) -> None:
        if self.strand not in (None, "+", "-", "forward", "reverse"):
            remedy = "Use +, -, forward or reverse"
            raise ConfigError("the strand is unknown", self.strand, where=f"fragments {self.path}", remedy=remedy)
        if self.group is not None and self.sample is not None:
            remedy = "A file that is one group needs no sample"
            raise ConfigError("group and sample exclude each other", where=f"fragments {self.path}", remedy=remedy)

    @property
    def is_bam(self) -> bool:
        """Whether it holds reads rather than text."""
        return self.path.suffix in (".bam", ".cram")


@dataclass(frozen=True)
class Fragments:
    """A part of a file on one chromosome, in its order.

    Attributes:
        chrom: as in the genome.
        start, end: ``(n,)``; of a BAM file those of aligned blocks.
        code: position in ``barcodes`` of each, -1 without one, ``(n,)``.
        barcodes: those of this part.
        minus: whether on the minus strand, ``(n,)``; None without strands.
        first: whether it is the first block of its read, ``(n,)``; None if all are.
    """

    chrom: str
    start: Ints
    end: Ints
    code: Ints
    barcodes: list[str]
    minus: npt.NDArray[np.bool_] | None
    first: npt.NDArray[np.bool_] | None = None


@dataclass
class FragmentReader:
    """Reads one file once, checking every row, and counts what it passes over.

    Attributes:
        file: which.
        lengths: of the chromosomes.
        rename: name in the file -> name in the genome.
        rows: fragments (reads) so far, comments not counted.
        foreign: chromosomes that the genome lacks -> rows.
        skipped: reads of a BAM file that do not count -> how many.
    """

    file: FragmentFile
    lengths: Mapping[str, int]
    rename: Mapping[str, str]
    rows: int = 0
    foreign: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    _seen: dict[str, int] = field(default_factory=dict)  # chromosome of the file -> last start
    _line: int = 0

    def read(self) -> Iterator[Fragments]:
        """The fragments on chromosomes of the genome.

        Raises:
            DataError: the file is missing, truncated, unsorted, or has a row that cannot be; it says which.
        """
        path = self.file.path
        if not path.is_file():
            raise DataError("the fragment file does not exist", where=path, remedy="Check the path")
        yield from self._read_bam() if self.file.is_bam else self._read_text()
        if not self.rows:
            raise DataError("the file has no fragments", where=path, remedy="Check the file")
        match_chroms(self._seen_names(), self.lengths, path, more=True)

    def _seen_names(self) -> list[str]:
        return [self.rename.get(chrom, chrom) for chrom in self._seen]

    def _read_text(self) -> Iterator[Fragments]:
        width = 0
        for text in read_lines(self.file.path, CHUNK):
            lines = text
            if text.startswith(b"#") or b"\n#" in text:
                lines = b"".join(line for line in text.splitlines(keepends=True) if not line.startswith(b"#"))
            if lines.strip():
                width = width or lines.partition(b"\n")[0].count(b"\t") + 1
                if width < 3 or (self.file.strand in ("forward", "reverse") and width < 6):
                    self._complain(text, width)
                yield from self._parts(text, self._parse(lines, text, width), width)
            self._line += text.count(b"\n")

    def _parse(self, lines: bytes, text: bytes, width: int) -> pa.Table:
        names = [*COLUMNS, *(f"more{n}" for n in range(width))][:width]
        word = pa.dictionary(pa.int32(), pa.string())
        types = {"chrom": word, "start": pa.int64(), "end": pa.int64(), "barcode": word, "strand": word}
        wanted = [name for name in names if name in types and (name != "strand" or self.file.strand is not None)]
        try:
            return pc.read_csv(
                pa.py_buffer(lines),
                read_options=pc.ReadOptions(column_names=names, use_threads=False, block_size=len(lines) + 1),
                parse_options=pc.ParseOptions(delimiter="\t", quote_char=False),
                convert_options=pc.ConvertOptions(column_types=types, include_columns=wanted, null_values=[]),
            )
        except pa.ArrowInvalid:
            self._complain(text, width)

    def _parts(self, text: bytes, table: pa.Table, width: int) -> Iterator[Fragments]:
        chrom, names = _words(table, "chrom")
        start, end = (table[name].to_numpy() for name in ("start", "end"))
        code, barcodes = _words(table, "barcode") if width > 3 else (np.zeros(len(start), np.int64), [""])
        minus = self._minus(table, len(start))
        if not self.file.sorted:  # rows of a chunk are brought together, so that there are few parts
            order = np.lexsort((start, chrom))
            chrom, start, end, code = chrom[order], start[order], end[order], code[order]
            minus = None if minus is None else minus[order]
        edges = np.flatnonzero(np.concatenate([[True], chrom[1:] != chrom[:-1], [True]]))
        sizes = np.array([self.lengths.get(self.rename.get(name, name), np.iinfo(np.int64).max) for name in names])
        wrong = (start < 0) | (end <= start) | (end > sizes[chrom])
        down = start[1:] < start[:-1]
        down[edges[1:-1] - 1] = False
        again = self.file.sorted and any(
            names[chrom[edge]] in self._seen and (edge > 0 or not self._goes_on(names[chrom[0]], int(start[0])))
            for edge in edges[:-1]
        )
        if wrong.any() or down.any() or again or len(edges) - 1 > len(names):
            self._complain(text, width)
        self.rows += len(start)
        for left, right in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            own = names[chrom[left]]
            self._seen.pop(own, None)
            self._seen[own] = int(start[right - 1])  # the newest is the last
            if name := self._known(own, right - left):
                part = slice(left, right)
                strands = None if minus is None else minus[part]
                yield Fragments(name, start[part], end[part], code[part], barcodes, strands)

    def _known(self, own: str, rows: int) -> str | None:
        """Its name in the genome; rows of others are counted, unless only "chr" is in the way."""
        name = self.rename.get(own, own)
        if name in self.lengths:
            return name
        if name.removeprefix("chr") in self.lengths or f"chr{name}" in self.lengths:
            match_chroms([name], self.lengths, self.file.path)
        self.foreign[own] += rows
        return None

    def _goes_on(self, chrom: str, start: int) -> bool:
        """Whether a chunk that begins here follows the one before."""
        last = next(reversed(self._seen), None)
        return last == chrom and start >= self._seen[chrom]

    def _minus(self, table: pa.Table, rows: int) -> npt.NDArray[np.bool_] | None:
        if self.file.strand is None:
            return None
        if self.file.strand in ("+", "-"):
            return np.full(rows, self.file.strand == "-")
        code, words = _words(table, "strand")
        if unknown := sorted(set(words) - {"+", "-"}):
            remedy = "Give + or - in column 6, or the strand of the whole file"
            raise DataError("the strand of a fragment is unknown", unknown[0], where=self.file.path, remedy=remedy)
        found: npt.NDArray[np.bool_] = np.array([word == "-" for word in words])[code]
        return found if self.file.strand == "forward" else ~found

    def _complain(self, text: bytes, width: int) -> NoReturn:
        """Goes through the lines of a chunk that cannot be, and says which and why."""
        seen = dict(self._seen)
        for number, line in enumerate(text.splitlines(), start=self._line + 1):
            if line.startswith(b"#") or not line.strip():
                continue
            fields = line.decode("utf-8", "replace").split("\t")
            problem = _row_problem(fields, width, self.file.strand in ("forward", "reverse")) or self._misplaced(
                fields, seen
            )
            if problem:
                what, value, remedy = problem
                raise DataError(what, value, where=f"{self.file.path} line {number}", remedy=remedy)
            seen.pop(fields[0], None)
            seen[fields[0]] = int(fields[1])
        last = self._line + len(text.splitlines())
        lines = f"{self.file.path} lines {self._line + 1} to {last}"
        raise DataError("these lines cannot be read as fragments", where=lines, remedy="Check that they are plain text")

    def _misplaced(self, fields: list[str], seen: dict[str, int]) -> tuple[str, object, str] | None:
        own, start, end = fields[0], int(fields[1]), int(fields[2])
        name = self.rename.get(own, own)
        if end > self.lengths.get(name, end):
            what = f"the fragment ends beyond its chromosome, which has {self.lengths[name]} bp in the FASTA"
            remedy = "The fragments are of another assembly: use the FASTA that the reads were aligned to"
            return what, f"{own}:{start}-{end}", remedy
        last = next(reversed(seen), None)
        if self.file.sorted and own in seen and (own != last or start < seen[own]):
            what = "the file is not sorted: the row before is at " + f"{last}:{seen[str(last)]}"
            remedy = "Sort it (sort -k1,1 -k2,2n, then bgzip), or set sorted: false if it is sorted by barcode"
            return what, f"{own}:{start}", remedy
        return None

    def _read_bam(self) -> Iterator[Fragments]:
        """Blocks of reads, as fragments."""
        path, last = self.file.path, ("", 0)
        codes: dict[str, int] = {}
        rows: list[tuple[int, int, int, bool, bool]] = []
        for chrom, reverse, barcode, blocks in read_alignments(path, self.file.tag, self.skipped):
            start = blocks[0][0]
            misplaced = start < last[1] if chrom == last[0] else chrom in self._seen
            if self.file.sorted and misplaced:
                remedy = "Sort it: samtools sort"
                raise DataError("the BAM file is not sorted", f"{chrom}:{start}", where=path, remedy=remedy)
            if rows and (chrom != last[0] or len(rows) >= READS):
                yield from self._blocks(last[0], rows, codes)
                rows, codes = [], {}
            last = (chrom, start)
            self._seen[chrom] = start
            self.rows += 1
            code = -1 if barcode is None else codes.setdefault(barcode, len(codes))
            minus = reverse != (self.file.strand == "reverse")
            rows += [(left, right, code, minus, number == 0) for number, (left, right) in enumerate(blocks)]
        if rows:
            yield from self._blocks(last[0], rows, codes)

    def _blocks(
        self, own: str, rows: list[tuple[int, int, int, bool, bool]], codes: Mapping[str, int]
    ) -> Iterator[Fragments]:
        table = np.array(rows, dtype=np.int64)
        name = self._known(own, int(table[:, 4].sum()))
        if name is None:
            return
        if (table[:, 1] > self.lengths[name]).any():
            row = table[table[:, 1] > self.lengths[name]][0]
            what = f"the read ends beyond its chromosome, which has {self.lengths[name]} bp in the FASTA"
            remedy = "The reads are of another assembly: use the FASTA that they were aligned to"
            raise DataError(what, f"{own}:{row[0]}-{row[1]}", where=self.file.path, remedy=remedy)
        minus: npt.NDArray[np.bool_] | None = table[:, 3].astype(bool)
        if self.file.strand in ("+", "-"):
            minus = np.full(len(table), self.file.strand == "-")
        elif self.file.strand is None:
            minus = None
        yield Fragments(name, table[:, 0], table[:, 1], table[:, 2], list(codes), minus, table[:, 4].astype(bool))


def _words(table: pa.Table, column: str) -> tuple[Ints, list[str]]:
    """A column of text as codes and the words that they stand for."""
    chunks = table[column].combine_chunks()
    array = chunks.chunk(0) if isinstance(chunks, pa.ChunkedArray) else chunks
    return array.indices.to_numpy(zero_copy_only=False).astype(np.int64), array.dictionary.to_pylist()


def _row_problem(fields: list[str], width: int, stranded: bool) -> tuple[str, object, str] | None:
    """What is wrong with a row in itself: what, value, remedy."""
    form = "Give chromosome, start, end and barcode, separated by tabs"
    if len(fields) < 3:
        return "this is not a fragment", "\t".join(fields)[:60], form
    if stranded and len(fields) < 6:
        return "a row has no strand in column 6", "\t".join(fields)[:60], "Say the strand of the whole file: + or -"
    if len(fields) != width:
        return f"a row has {len(fields)} columns where others have {width}", "\t".join(fields)[:60], form
    for text in fields[1:3]:
        if not (text.isascii() and text.isdigit() and len(text) < 18):
            return "start or end is not a whole number", text, form
    if int(fields[2]) <= int(fields[1]):
        return "the fragment has no bases", f"{fields[1]}-{fields[2]}", "The end must exceed the start"
    return None


def count_repeats(rows: Ints) -> int:
    """How many columns of ``rows`` (start, end, cell, strand; sorted by start) are equal to one before.

    Columns of one start are compared by a 64-bit mix: two different ones are taken for equal once in 10^19 pairs.
    """
    alike = rows[0, 1:] == rows[0, :-1]
    near = np.flatnonzero(np.concatenate([alike, [False]]) | np.concatenate([[False], alike]))
    if near.size < 2:
        return 0
    mixed = np.zeros(len(near), dtype=np.uint64)
    for part in rows[:, near]:
        mixed = (mixed ^ part.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    mixed.sort()
    return int((mixed[1:] == mixed[:-1]).sum())
