"""Genomes and the files that speak about places on them: FASTA, BED, GTF, VCF.

Positions are 0-based and half-open everywhere, except ``Variant.position``, which is 1-based as in VCF.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pandas as pd

from seqgraft.errors import DataError, Problems, RunError
from seqgraft.sequence import Codes, N, encode

__all__ = [
    "Genome",
    "Interval",
    "Variant",
    "cache_folder",
    "check_assembly",
    "match_chroms",
    "read_alignments",
    "read_bed",
    "read_bed_on",
    "read_bed_table",
    "read_gtf",
    "read_lines",
    "read_vcf",
    "read_vcf_rows",
    "vcf_text",
    "write_vcf",
]


@dataclass(frozen=True, slots=True)
class Interval:
    """A stretch of a contig, 0-based and half-open; it may reach beyond the contig's ends.

    Raises:
        DataError: the end lies before the start, or the strand is not ``+``, ``-`` or ``.``.
    """

    chrom: str
    start: int
    end: int
    strand: str = "."

    def __post_init__(self) -> None:
        if self.end < self.start:
            where = f"{self.chrom}:{self.start}-{self.end}"
            raise DataError("the interval ends before it starts", where=where, remedy="Swap start and end")
        if self.strand not in ("+", "-", "."):
            raise DataError("the strand is unknown", self.strand, remedy="Use '+', '-' or '.'")

    def __str__(self) -> str:
        return f"{self.chrom}:{self.start}-{self.end}" + ("" if self.strand == "." else f"({self.strand})")

    @property
    def length(self) -> int:
        """Length in bp."""
        return self.end - self.start

    def resize(self, length: int) -> Interval:
        """An interval of ``length`` bp around the same centre (an odd difference puts the extra base on the left)."""
        start = self.start + (self.length - length) // 2
        return Interval(self.chrom, start, start + length, self.strand)

    def shift(self, bases: int) -> Interval:
        """The interval ``bases`` bp to the right (on the forward strand)."""
        return Interval(self.chrom, self.start + bases, self.end + bases, self.strand)

    def overlaps(self, other: Interval) -> bool:
        """Whether they share at least one base, on any strand."""
        return self.chrom == other.chrom and max(self.start, other.start) < min(self.end, other.end)


@dataclass(frozen=True, slots=True)
class Variant:
    """One alternative allele: ``ref`` at the 1-based ``position`` becomes ``alt``; symbolic alleles keep their text."""

    chrom: str
    position: int
    ref: str
    alt: str
    id: str = "."

    def __str__(self) -> str:
        return f"{self.chrom}:{self.position}:{self.ref}>{self.alt}"


@dataclass(frozen=True)
class Genome:
    """A FASTA file as one memory map of base codes, built once and kept in the cache; cheap to pickle.

    Attributes:
        path: the FASTA file.
        hash: sha256 of that file.
        chroms: contig name -> length in bp, in file order.
        ambiguous: how many IUPAC letters other than N were read as N.
    """

    path: Path
    hash: str
    chroms: dict[str, int]
    ambiguous: int
    _offsets: dict[str, int] = field(repr=False)
    _codes: Codes = field(repr=False, compare=False)
    _cache: Path | None = field(repr=False, compare=False, default=None)

    @classmethod
    def open(cls, fasta: Path | str, cache: Path | None = None) -> Genome:
        """Open a FASTA file, plain or compressed (bgzip, gzip); the first time its base codes are written to the cache.

        The cache is ``cache``, ``$SEQGRAFT_CACHE/genomes`` or the user's cache folder, keyed by the file's content.

        Raises:
            DataError: no such file, not FASTA, truncated, a duplicated or empty contig, a letter that is not a base.
            RunError: the cache cannot be written.
        """
        path = Path(fasta).absolute()
        if not path.is_file():
            raise DataError("the FASTA file does not exist", where=path, remedy="Check the path")
        folder = cache if cache is not None else cache_folder() / "genomes"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            key = _content_hash(path, folder)
            index = folder / f"{key}.json"
            if not index.exists():
                _build(path, folder / f"{key}.codes.npy", index)
        except OSError as error:
            raise RunError(
                f"the genome cache cannot be written ({error.strerror})",
                str(folder),
                where=path,
                remedy="Set SEQGRAFT_CACHE to a folder with free space that you can write to",
            ) from error
        content = json.loads(index.read_text())
        codes = np.load(folder / f"{key}.codes.npy", mmap_mode="r", allow_pickle=False)
        chroms: dict[str, int] = content["chroms"]
        ends = np.cumsum(list(chroms.values())).tolist()
        offsets = dict(zip(chroms, [0, *ends[:-1]], strict=True))
        return cls(path, key, chroms, content["ambiguous"], offsets, codes, cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return Genome.open, (self.path, self._cache)

    def chrom_codes(self, chrom: str) -> Codes:
        """Base codes of a whole contig, a read-only view of the memory map.

        Raises:
            DataError: the genome has no such contig.
        """
        match_chroms([chrom], self, self.path)
        start = self._offsets[chrom]
        return self._codes[start : start + self.chroms[chrom]]

    def codes(self, interval: Interval) -> Codes:
        """Base codes ``(interval.length,)`` of the forward strand; N beyond the ends of the contig.

        Raises:
            DataError: the genome has no such contig.
        """
        contig = self.chrom_codes(interval.chrom)
        codes = np.full(interval.length, N, dtype=np.uint8)
        start, end = max(interval.start, 0), min(interval.end, len(contig))
        if start < end:
            codes[start - interval.start : end - interval.start] = contig[start:end]
        return codes


def match_chroms(
    names: Iterable[str], genome: Genome | Mapping[str, int], where: object, *, more: bool = False
) -> None:
    """Check that every name is a contig of the genome.

    Args:
        more: the file may have contigs that the genome lacks (patches, scaffolds), as long as some are shared and it
            is not only "chr" that is in the way.

    Raises:
        DataError: names the first one that is not, and how to rename all of those that only "chr" keeps apart.
    """
    chroms = genome.chroms if isinstance(genome, Genome) else genome
    names = list(names)
    if more and any(name in chroms for name in names):
        names = [name for name in names if {name.removeprefix("chr"), f"chr{name}"} & chroms.keys()]
    absent = [name for name in dict.fromkeys(names) if name not in chroms]
    if not absent:
        return
    some = ", ".join(list(chroms)[:5]) + (", ..." if len(chroms) > 5 else "")
    remedy = f"Use names that match the FASTA ({some})"
    twins = {name: name.removeprefix("chr") if name.startswith("chr") else f"chr{name}" for name in absent}
    if twins[absent[0]] in chroms:
        pairs = ", ".join(f"{name!r}: {twin!r}" for name, twin in twins.items() if twin in chroms)
        remedy = f"The FASTA has {twins[absent[0]]!r}: use names that match the FASTA, or pass rename: {{{pairs}}}"
    raise DataError("the genome has no chromosome", absent[0], where=where, remedy=remedy)


_ENOUGH = 10  # variants from which a share says something about the whole file


def check_assembly(path: Path, genome: Genome, compared: int, wrong: int, swapped: int) -> None:
    """What the REF alleles of a whole VCF say about it.

    Args:
        compared: alleles whose REF was held against the FASTA.
        wrong: of those, REF is not what stands there.
        swapped: of those, ALT is.

    Raises:
        DataError: more than a quarter are wrong: alleles are swapped, or the file is of another assembly.
    """
    if compared < _ENOUGH or 4 * wrong <= compared:
        return
    if 10 * swapped > 9 * wrong:
        remedy = "Write the reference base as REF, as 'bcftools norm --check-ref s' does; signs depend on it"
        what = "REF and ALT are swapped in many variants"
        raise DataError(what, f"{swapped} of {compared}", where=path, remedy=remedy)
    remedy = f"The FASTA is {genome.path.name}: use variants of that assembly, or lift them over"
    what = "REF differs from the FASTA in many variants: the VCF is of another assembly"
    raise DataError(what, f"{wrong} of {compared}", where=path, remedy=remedy)


def cache_folder() -> Path:
    """``$SEQGRAFT_CACHE``, or the user's cache folder."""
    if own := os.environ.get("SEQGRAFT_CACHE"):
        return Path(own)
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "seqgraft"


def _content_hash(path: Path, folder: Path) -> str:
    """sha256 of a file, remembered under its path, size and time, so that a large one is read once."""
    stat = path.stat()
    seen = [str(path), stat.st_size, stat.st_mtime_ns]
    memo = folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.seen.json"
    if memo.exists():
        known = json.loads(memo.read_text())
        if known["file"] == seen:
            return str(known["sha256"])
    with path.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()
    with _published(memo) as part:
        part.write(json.dumps({"file": seen, "sha256": key}).encode())
    return key


@contextmanager
def _published(path: Path) -> Iterator[IO[bytes]]:
    """A temporary sibling to write, which takes the path's name when all went well."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w+b") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _build(path: Path, codes_path: Path, index: Path) -> None:
    chroms: dict[str, int] = {}
    ambiguous, name = 0, ""
    with _published(codes_path) as file:
        _write_header(file, 0)
        for header, letters in _read_fasta(path):
            if header is not None:
                name = _new_contig(header, name, chroms, path)
                continue
            file.write(_encode(letters, f"{path}, contig {name}", chroms[name]).tobytes())
            chroms[name] += len(letters)
            ambiguous += len(letters.translate(None, b"ACGTUNacgtun"))
        _check_not_empty(name, chroms, path)
        _check_fai(chroms, path)
        _write_header(file, sum(chroms.values()))
    with _published(index) as file:
        content = {"format": "seqgraft-genome", "format_version": 1, "chroms": chroms, "ambiguous": ambiguous}
        file.write(json.dumps(content).encode())


def _write_header(file: IO[bytes], length: int) -> None:
    # numpy leaves room for the first axis to grow, so that the header's size does not depend on the length
    file.seek(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _new_contig(header: bytes, last: str, chroms: dict[str, int], path: Path) -> str:
    _check_not_empty(last, chroms, path)
    name = header.split()[0].decode("utf-8", "replace") if header.split() else ""
    if not name:
        raise DataError("a contig has no name", where=path, remedy="Write a name after every '>'")
    if name in chroms:
        raise DataError("the contig is in the file twice", name, where=path, remedy="Remove or rename one of them")
    chroms[name] = 0
    return name


def _check_not_empty(name: str, chroms: dict[str, int], path: Path) -> None:
    if name and not chroms[name]:
        raise DataError("the contig has no bases", name, where=path, remedy="Remove it; the file may be truncated")


def _check_fai(chroms: dict[str, int], path: Path) -> None:
    index = path.with_name(path.name + ".fai")
    if not index.is_file():
        return
    rows = [line.split("\t") for line in index.read_text().splitlines() if line.strip()]
    indexed = {row[0]: int(row[1]) for row in rows if len(row) > 1}
    if indexed != chroms:
        unequal = next(name for name in [*indexed, *chroms] if indexed.get(name) != chroms.get(name))
        raise DataError(
            f"contig {unequal!r} has {chroms.get(unequal, 0)} bp, but its index {index.name} says",
            indexed.get(unequal, 0),
            where=path,
            remedy="The FASTA may be truncated: copy it again; or make the index again with samtools faidx",
        )


def _encode(letters: bytes, where: str, before: int) -> Codes:
    try:
        return encode(letters)
    except DataError as error:
        at = letters.index(str(error.value).encode("latin-1"))
        raise DataError(
            error.what, error.value, where=f"{where}, base {before + at + 1}", remedy=error.remedy
        ) from error


def _read_fasta(path: Path, chunk: int = 1 << 24) -> Iterator[tuple[bytes | None, bytes]]:
    """``(header, b"")`` for each contig, then ``(None, letters)`` for the pieces of its sequence."""
    started = False
    for text in read_lines(path, chunk):
        position = 0
        while position < len(text):
            if text[position : position + 1] == b">":
                end = text.find(b"\n", position)
                end = len(text) if end < 0 else end
                started = True
                yield text[position + 1 : end], b""
            else:
                end = text.find(b"\n>", position)
                end = len(text) if end < 0 else end
                letters = text[position:end].translate(None, b" \t\r\n")
                if letters and not started:
                    shown = letters[:20].decode("ascii", "replace")
                    raise DataError("the file does not start with '>'", shown, where=path, remedy="Give a FASTA file")
                if letters:
                    yield None, letters
            position = end + 1
    if not started:
        raise DataError("the FASTA file is empty", where=path, remedy="Check the file")


_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def read_lines(path: Path, chunk: int) -> Iterator[bytes]:
    """Pieces of ``chunk`` bytes or a line more of a plain or gzipped file, each of whole lines.

    Raises:
        DataError: the file is truncated; of a bgzipped one, that is said before anything is read.
    """
    with path.open("rb") as raw:
        start = raw.read(18)
        raw.seek(0)
        if not start.startswith(b"\x1f\x8b"):
            while text := raw.read(chunk):
                yield text + raw.readline()
            return
        broken = DataError("the compressed file is truncated", where=path, remedy="Copy or download it again")
        if start[12:14] == b"BC":  # bgzip: every block is complete in itself, only the end marker tells
            raw.seek(0, os.SEEK_END)
            raw.seek(max(raw.tell() - len(_BGZF_END), 0))
            if raw.read() != _BGZF_END:
                raise broken
            raw.seek(0)
        try:
            with gzip.open(raw) as file:
                while text := file.read(chunk):
                    yield text + file.readline()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise broken from error


def read_bed_table(path: Path | str) -> pd.DataFrame:
    """A BED file (plain or gzipped, 3 columns or more) as ``chrom, start, end, name, score, strand`` in file order.

    Raises:
        DataError: no such file, no intervals in it, or rows that are not BED; all rows at once.
    """
    path = Path(path)
    rows, problems = [], Problems(DataError)
    for number, line in enumerate(_text_lines(path), start=1):
        if not line.strip() or line.startswith(("#", "track", "browser")):
            continue
        fields = line.rstrip("\r\n").split("\t" if "\t" in line else None)
        where = f"{path} line {number}"
        if len(fields) < 3 or not fields[1].isdecimal() or not fields[2].isdecimal():
            remedy = "Give chromosome, start and end, 0-based, separated by tabs"
            problems.add("this is not a BED row", line.strip()[:60], where=where, remedy=remedy)
            continue
        start, end, strand = int(fields[1]), int(fields[2]), fields[5] if len(fields) > 5 else "."
        if end <= start:
            problems.add(
                "the interval has no bases", f"{start}-{end}", where=where, remedy="The end must exceed the start"
            )
        if strand not in ("+", "-", "."):
            problems.add("the strand is unknown", strand, where=where, remedy="Use '+', '-' or '.'")
        score = _number(fields[4]) if len(fields) > 4 else float("nan")
        rows.append((fields[0], start, end, fields[3] if len(fields) > 3 else ".", score, strand))
    problems.raise_if_any()
    if not rows:
        raise DataError("the BED file has no intervals", where=path, remedy="Check the file, or leave the setting out")
    return pd.DataFrame(rows, columns=["chrom", "start", "end", "name", "score", "strand"])


def read_bed_on(path: Path | str, genome: Genome) -> pd.DataFrame:
    """:func:`read_bed_table` of intervals that lie on a genome.

    Raises:
        DataError: as there; chromosomes that the genome lacks; intervals beyond a chromosome's end, all at once.
    """
    table, problems = read_bed_table(path), Problems(DataError)
    match_chroms(table["chrom"].unique(), genome, path)
    outside = table["end"] > table["chrom"].map(genome.chroms)
    for row in table[outside].itertuples():
        place = f"{row.chrom}:{row.start}-{row.end}"
        remedy = f"{row.chrom} has {genome.chroms[str(row.chrom)]} bp; is it the same assembly?"
        problems.add("the interval reaches beyond its chromosome", place, where=path, remedy=remedy)
    problems.raise_if_any()
    return table


def read_bed(path: Path | str) -> list[Interval]:
    """The intervals of a BED file in file order; errors as :func:`read_bed_table`."""
    table = read_bed_table(path)
    return [Interval(*row) for row in table[["chrom", "start", "end", "strand"]].itertuples(index=False, name=None)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _text_lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise DataError("the file does not exist", where=path, remedy="Check the path")
    try:
        for text in read_lines(path, 1 << 22):
            yield from (line.decode() for line in text.splitlines())  # not at form feeds, as of str
    except UnicodeDecodeError as error:
        raise DataError("the file is not text", where=path, remedy="Give a plain or gzipped text file") from error


_GTF = ["chrom", "source", "feature", "start", "end", "score", "strand", "frame", "attributes"]


def read_gtf(path: Path | str, feature: str = "exon", rename: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Rows of one feature of a GTF file (plain or gzipped), in file order.

    Columns: ``chrom`` (after ``rename``: name in the file -> name in the FASTA), ``start`` and ``end`` (0-based,
    half-open), ``strand``, ``gene_id``, ``gene_name`` (the id where there is none), ``gene_biotype`` (or ""),
    ``transcript_id`` (or "").

    Raises:
        DataError: no such file, rows that are not GTF, no row of the feature, or rows without gene_id.
    """
    path = Path(path)
    rows = []
    for number, line in enumerate(_text_lines(path), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) < 9 or not (fields[3].isdecimal() and fields[4].isdecimal()):
            where = f"{path} line {number}"
            raise DataError(
                "this is not a GTF row", line[:60], where=where, remedy="GTF has nine columns, tab separated"
            )
        if fields[2] == feature:
            rows.append(fields[:9])
    if not rows:
        raise DataError(
            "the GTF file has no rows of the feature", feature, where=path, remedy="Look at its third column"
        )
    table = pd.DataFrame(rows, columns=_GTF)
    attributes = table["attributes"]
    genes = pd.DataFrame(
        {
            "chrom": table["chrom"].replace(dict(rename or {})),
            "start": table["start"].astype(np.int64) - 1,
            "end": table["end"].astype(np.int64),
            "strand": table["strand"],
            "gene_id": _attribute(attributes, "gene_id"),
            "gene_name": _attribute(attributes, "gene_name"),
            "gene_biotype": _attribute(attributes, "gene_(?:bio)?type").fillna(""),
            "transcript_id": _attribute(attributes, "transcript_id").fillna(""),
        }
    )
    if genes["gene_id"].isna().any():
        row = attributes[genes["gene_id"].isna()].iloc[0]
        raise DataError(
            "a row has no gene_id", row[:60], where=path, remedy='Give GTF, with gene_id "...", rather than GFF'
        )
    genes["gene_name"] = genes["gene_name"].fillna(genes["gene_id"])
    return genes


def _attribute(attributes: pd.Series[str], name: str) -> pd.Series[str]:
    return cast("pd.Series[str]", attributes.str.extract(rf'(?:^|;)\s*{name}\s+"([^"]*)"', expand=False))


def read_vcf(path: Path | str) -> Iterator[Variant]:
    """The variants of a VCF or BCF file (plain or bgzip), one for each ALT; symbolic alleles as they are written.

    Raises:
        DataError: no such file, or it cannot be read as VCF.
    """
    return (variant for _, _, variant in read_vcf_rows(path) if variant.alt != ".")


def read_vcf_rows(path: Path | str) -> Iterator[tuple[int, int, Variant]]:
    """``(row, allele, variant)``: the record's number in the file and the ALT's in the record, both from 1.

    A record without an ALT yields one variant whose ``alt`` is ".". Errors as :func:`read_vcf`.
    """
    import pysam  # cyvcf2 ends quietly at a row that it cannot parse

    path = Path(path)
    if not path.is_file():
        raise DataError("the VCF file does not exist", where=path, remedy="Check the path")
    if path.stat().st_size == 0:
        raise DataError("the VCF file is empty, without even a header", where=path, remedy="Write it again")
    last = "its header"
    pysam.set_verbosity(1)  # htslib warns of headers without contigs, which changes nothing here
    try:
        with pysam.VariantFile(str(path), drop_samples=True) as file:
            for row, record in enumerate(file, start=1):
                chrom, position, ref, name = record.chrom, record.pos, record.ref or "", record.id or "."
                for allele, alt in enumerate(record.alts or (".",), start=1):
                    yield row, allele, Variant(chrom, position, ref, alt, name)
                last = f"{chrom}:{position}"
    except NotImplementedError as error:  # pysam's word for it
        remedy = "Decompress it, or compress it with bgzip"
        raise DataError("the VCF file is gzipped, but not with bgzip", where=path, remedy=remedy) from error
    except (OSError, ValueError) as error:
        remedy = f"It may be truncated or not VCF; look after {last}"
        told = str(error) if "VCF/BCF format" not in str(error) else "no header of VCF"  # with the path as bytes
        raise DataError(f"the VCF file cannot be read ({told})", where=path, remedy=remedy) from error


def read_alignments(
    path: Path | str, tag: str, skipped: Counter[str]
) -> Iterator[tuple[str, bool, str | None, list[tuple[int, int]]]]:
    """Reads of a BAM or CRAM file: chromosome, whether on the reverse strand, value of ``tag``, aligned blocks.

    Blocks are 0-based and half-open; introns and deletions lie between them. Left out, and counted in ``skipped``, are
    reads that are unmapped, secondary or supplementary, that failed quality checks, and duplicates: flagged ones and,
    where reads have the tag ``xf`` of Cell Ranger, all but the one read (bit 8) that stands for a molecule.

    Raises:
        DataError: no such file, it cannot be read or is truncated, or its reads are pairs.
    """
    import pysam

    path = Path(path)
    if not path.is_file():
        raise DataError("the BAM file does not exist", where=path, remedy="Check the path")
    try:
        with pysam.AlignmentFile(str(path), check_sq=False) as file:
            for read in file:
                if read.is_paired:
                    remedy = "Write a fragment file of it (sinto, SnapATAC2), which says where pairs begin and end"
                    raise DataError("the reads of the BAM file are pairs", read.query_name, where=path, remedy=remedy)
                if read.is_unmapped or read.is_secondary or read.is_supplementary or read.is_qcfail:
                    skipped["unmapped, secondary or failed"] += 1
                elif read.is_duplicate or (read.has_tag("xf") and not int(read.get_tag("xf")) & 8):
                    skipped["duplicates"] += 1
                else:
                    barcode = str(read.get_tag(tag)) if read.has_tag(tag) else None
                    yield str(read.reference_name), read.is_reverse, barcode, read.get_blocks()
    except (OSError, ValueError) as error:
        remedy = "It may be truncated or no BAM: copy it again"
        raise DataError(f"the BAM file cannot be read ({error})", where=path, remedy=remedy) from error


def vcf_text(path: Path | str) -> Iterator[str]:
    """The lines of a VCF (plain or gzipped; as they are) or BCF file, without line ends: first the header's."""
    import pysam

    path = Path(path)
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        binary = file.read(3) == b"BCF"
    if not binary:
        yield from (line for line in _text_lines(path) if line)
        return
    with pysam.VariantFile(str(path)) as records:
        yield from str(records.header).splitlines()
        yield from (str(record).rstrip("\n") for record in records)


def write_bgzip(path: Path | str, pieces: Iterable[str]) -> None:
    """Writes text, bgzipped.

    Raises:
        OSError: it cannot be written.
    """
    import pysam

    with pysam.BGZFile(str(path), "wb", None) as file:
        for piece in pieces:
            file.write(piece.encode())


def write_vcf(path: Path | str, lines: Iterable[str]) -> bool:
    """Writes lines as a bgzipped VCF, with an index (``.tbi``) beside it where its records are sorted; says which.

    Raises:
        OSError: it cannot be written.
    """
    import pysam

    seen: set[str] = set()
    last, is_sorted, largest = ("", 0), True, 0
    with pysam.BGZFile(str(path), "wb", None) as file:
        for line in lines:
            file.write(line.encode() + b"\n")
            if line.startswith("#"):
                continue
            chrom, text, _ = line.split("\t", 2)
            position = int(text)
            if chrom != last[0]:
                is_sorted &= chrom not in seen
                seen.add(chrom)
            else:
                is_sorted &= position >= last[1]
            last, largest = (chrom, position), max(largest, position)
    is_sorted &= largest < 1 << 29  # what a .tbi can say
    if is_sorted and seen:
        pysam.tabix_index(str(path), preset="vcf", force=True)
    return is_sorted and bool(seen)
