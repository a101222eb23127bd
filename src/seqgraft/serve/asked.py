"""What a page asks for: variants pasted or in a VCF, or a region, read from untrusted bytes.

A variant is a line. These are the same one::

    chr1-1000-A-G
    chr1:1000:A>G
    chr1<TAB>1000<TAB>rs7<TAB>A<TAB>G      (a row of a VCF; several ALT are several variants)

Every line that cannot be scored is one problem with its number, the value and what to do; the others are kept.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seqgraft.errors import ConfigError, DataError
from seqgraft.genome import Interval, Variant, check_assembly
from seqgraft.sequence import decode
from seqgraft.variants import SCORERS, VariantConfig
from seqgraft.variants.alleles import REASONS, AlleleCheck
from seqgraft.variants.over import Centre, Window
from seqgraft.variants.place import Layout

__all__ = [
    "Choice",
    "Limits",
    "Problem",
    "Variants",
    "plain_text",
    "read_region",
    "read_variants",
    "write_vcf_of",
]

_SHOWN = 60  # characters of a value in a message
_LONGEST = 20_000  # characters of a line that is looked at
_DASHED = re.compile(
    r"(?P<chrom>\S+?)[-:_ ](?P<position>[0-9][0-9,]{0,14})[-:_ ]?(?P<ref>[A-Za-z]+)[-:>/ ](?P<alt>[A-Za-z*]+)"
)
_RS = re.compile(r"rs[0-9]+", re.IGNORECASE)
_REGION = re.compile(r"(?P<chrom>\S+?):(?P<start>[0-9][0-9,]{0,14})(?:-|\.\.)(?P<end>[0-9][0-9,]{0,14})")
_HOW = "Write chrom-pos-ref-alt, as in chr1-1000-A-G"

#: What to do about each of ``alleles.REASONS``; two of them say what the FASTA has.
REMEDIES: dict[str, str] = {
    REASONS[1]: "The genome has {chroms}",
    REASONS[2]: _HOW,
    REASONS[3]: "Write its bases out",
    REASONS[4]: "Score the deletion that its own record describes",
    REASONS[5]: "Write the alleles in A, C, G and T",
    REASONS[6]: "Give two different alleles",
    REASONS[7]: "{chrom} has {length:,} bases: check position and assembly",
    REASONS[8]: "Give alleles of at most {most:,} bases",
    REASONS[9]: "Choose a variant on a longer one",
    REASONS[10]: "Choose another place",
    REASONS[11]: "The FASTA has {found} there: check position and assembly",
    REASONS[12]: "Write {found} as the reference; the sign of the effect depends on it",
    REASONS[13]: "It has a row already",
    REASONS[14]: "Give a substitution, such as A>G",
}


@dataclass(frozen=True)
class Limits:
    """What one request, one client and the whole server may take.

    Attributes:
        variants: of a request.
        body: bytes of a request.
        text: bytes of an upload once it is decompressed.
        waiting: requests in the queue.
        rate: requests of one client per minute.
        kept: results; the one that was not asked for longest goes first.
        kept_bytes: of all results.
    """

    variants: int = 1000
    body: int = 10_000_000
    text: int = 50_000_000
    waiting: int = 20
    rate: int = 120
    kept: int = 100
    kept_bytes: int = 500_000_000


@dataclass(frozen=True)
class Choice:
    """What the page lets its reader choose; what is None or empty is as the server was started.

    Attributes:
        scorers: kinds.
        over: what is read; over genes and regions only what the server was started with.
        width: bp, of ``centre``.
    """

    scorers: tuple[str, ...] = ()
    over: Literal["", "centre", "window"] = ""
    width: int | None = None
    reverse_complement: bool | None = None
    merge_strands: bool | None = None
    stitch: bool | None = None

    def on(self, config: VariantConfig) -> VariantConfig:
        """The settings with what was chosen.

        Raises:
            ConfigError: an unknown scorer; a width that is none.
        """
        given = {scorer.kind: scorer for scorer in config.scorers}
        if unknown := [kind for kind in self.scorers if kind not in SCORERS]:
            remedy = f"Choose from {', '.join(SCORERS)}"
            raise ConfigError("there is no such scorer", unknown[0][:60], where="scorers", remedy=remedy)
        changed: dict[str, Any] = {}
        if self.scorers:
            changed["scorers"] = tuple(given.get(kind) or SCORERS[kind]() for kind in dict.fromkeys(self.scorers))
        if self.over:
            changed["over"] = Centre(self.width or Centre.width) if self.over == "centre" else Window()
        if self.reverse_complement is not None:
            changed["ensemble"] = replace(config.ensemble, reverse_complement=self.reverse_complement)
        for name in ("merge_strands", "stitch"):
            if getattr(self, name) is not None:
                changed[name] = getattr(self, name)
        return replace(config, **changed)


@dataclass(frozen=True)
class Problem:
    """A line that cannot be scored, in one sentence and a remedy."""

    line: int
    value: str
    text: str

    @classmethod
    def of(cls, line: int, what: str, value: str, remedy: str) -> Problem:
        shown = value if len(value) <= _SHOWN else f"{value[: _SHOWN - 1]}…"
        return cls(line, shown, str(DataError(what, shown, where=f"line {line}", remedy=remedy)))

    @property
    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Variants:
    """The variants of a request that can be scored, as they were written, and what was wrong with the others."""

    variants: tuple[Variant, ...]
    problems: tuple[Problem, ...]


def plain_text(body: bytes, limits: Limits) -> str:
    """The text of a body, which may be gzipped, in one or several members (as bgzip writes them).

    Raises:
        DataError: it is larger than the limit once it is decompressed, truncated, a BCF, or not text.
    """
    if body[:2] == b"\x1f\x8b":
        body = b"".join(_decompressed(body, limits.text))
    if body[:3] == b"BCF":
        remedy = "Write it as VCF with 'bcftools view', or use 'seqgraft variants', which reads BCF"
        raise DataError("this is a BCF file", remedy=remedy)
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        remedy = "Give a VCF, plain or gzipped, or paste the variants"
        raise DataError("the upload is not text", remedy=remedy) from error


def _decompressed(body: bytes, most: int) -> Iterator[bytes]:
    total = 0
    try:
        while body:
            member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            part = member.decompress(body, most - total + 1)
            total += len(part)
            if total > most:
                remedy = "Split it, or use 'seqgraft variants'"
                raise DataError(f"the file has more than {most:,} bytes once it is decompressed", remedy=remedy)
            if not member.eof:
                raise DataError("the gzipped file is truncated", remedy="Copy it again")
            yield part
            body = member.unused_data
    except zlib.error as error:
        raise DataError(f"the file cannot be decompressed ({error})", remedy="Copy it again") from error


def read_variants(text: str, check: AlleleCheck, limits: Limits) -> Variants:
    """The variants of a text, each held against the genome.

    Raises:
        DataError: no variants; more than ``limits.variants``; most REF alleles are of another assembly.
    """
    contigs = check.contigs()
    good: list[Variant] = []
    problems: list[Problem] = []
    seen: set[tuple[str, int, str, str]] = set()
    counts = np.zeros(len(REASONS), dtype=np.int64)
    number = 0
    for line, value, found in _lines(text):
        number += 1
        if number > limits.variants:
            remedy = "Split them, or use 'seqgraft variants', which has no limit"
            raise DataError(f"a request may hold {limits.variants:,} variants, and there are more", remedy=remedy)
        if isinstance(found, str):
            problems.append(Problem.of(line, found, value, _RS_REMEDY if _RS.fullmatch(value) else _HOW))
            continue
        variant = check.named(found)
        reason = check.reason(variant, contigs)
        key = (variant.chrom, variant.position, variant.ref, variant.alt)
        reason = 13 if not reason and key in seen else reason
        counts[reason] += 1
        if reason:
            problems.append(Problem.of(line, REASONS[reason], str(found), _remedy(reason, variant, check)))
        else:
            seen.add(key)
            good.append(found)
    if not number:
        raise DataError("there is no variant", remedy=_HOW)
    wrong, swapped = int(counts[11] + counts[12]), int(counts[12])
    check_assembly(Path("the request"), check.genome, int(counts[0]) + wrong, wrong, swapped)
    return Variants(tuple(good), tuple(problems))


_RS_REMEDY = "An rs number has no alleles: write chrom-pos-ref-alt"


def _lines(text: str) -> Iterator[tuple[int, str, Variant | str]]:
    """Line number, value, and the variant or what is wrong with it; one for each ALT of a VCF row."""
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if len(line) > _LONGEST and "\t" not in line:
            yield number, line, "the line is too long for a variant"
            continue
        fields = line.split("\t", 5) if "\t" in line else line.split(None, 5)
        if len(fields) >= 5 and fields[1].isascii() and fields[1].isdigit() and len(fields[1]) <= 12:
            chrom, position, name, ref, alts = fields[:5]
            for alt in alts.split(","):
                yield number, line, Variant(chrom, int(position), ref, alt, name or ".")
        elif found := _DASHED.fullmatch(" ".join(line.split())):
            position = found["position"].replace(",", "")
            yield number, line, Variant(found["chrom"], int(position), found["ref"], found["alt"])
        else:
            yield number, line, "this is no variant"


def _remedy(reason: int, variant: Variant, check: AlleleCheck) -> str:
    genome = check.genome
    chroms, length = list(genome.chroms), genome.chroms.get(variant.chrom, 0)
    twin = variant.chrom.removeprefix("chr") if variant.chrom.startswith("chr") else f"chr{variant.chrom}"
    if reason == 1 and twin in genome.chroms:
        return f"The genome names it {twin!r}"
    start = variant.position - 1
    there = Interval(variant.chrom, start, start + min(len(variant.ref), 20))
    return REMEDIES[REASONS[reason]].format(
        chroms=", ".join(chroms[:5]) + (", ..." if len(chroms) > 5 else ""),
        chrom=variant.chrom,
        length=length,
        most=check.target // 4,
        found=repr(decode(genome.codes(there))) if 0 <= start < length else "nothing",
    )


def read_region(text: str, layout: Layout, rename: dict[str, str]) -> Interval:
    """A region as genome browsers write it: ``chr1:1,001-2,000``, both ends included, from 1.

    Raises:
        DataError: it is none; it lies beyond its chromosome; it is longer than what the model predicts.
    """
    found, how = _REGION.fullmatch(text.strip()), "Write it as chr1:1,001-2,000, both ends included"
    if found is None:
        raise DataError("this is no region", text.strip()[:_SHOWN], remedy=how)
    chrom = rename.get(found["chrom"], found["chrom"])
    start, end = (int(found[side].replace(",", "")) for side in ("start", "end"))
    where, length = f"region {text.strip()[:_SHOWN]}", layout.genome.chroms.get(chrom)
    if length is None:
        names = list(layout.genome.chroms)
        remedy = f"The genome has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        raise DataError(REASONS[1], chrom[:_SHOWN], where=where, remedy=remedy)
    if not 1 <= start <= end <= length:
        remedy = f"Give a start and a later end within 1 to {length:,}"
        raise DataError("the region is not on the chromosome", f"{start}-{end}", where=where, remedy=remedy)
    if end - start + 1 > layout.target:
        remedy = f"Give at most {layout.target:,} bp, which is what the model predicts at once"
        raise DataError("the region is too long", end - start + 1, where=where, remedy=remedy)
    return Interval(chrom, start - 1, end)


def write_vcf_of(variants: tuple[Variant, ...], path: Path) -> None:
    """A VCF of variants that were checked, one per row; names that would not fit into a row are left out."""
    chroms = [chrom for chrom in dict.fromkeys(v.chrom for v in variants) if re.fullmatch(r"[\w.:*+-]+", chrom)]
    lines = ["##fileformat=VCFv4.2", *(f"##contig=<ID={chrom}>" for chrom in chroms)]
    lines.append("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO")
    for v in variants:
        name = v.id if re.fullmatch(r"[!-~]{1,200}", v.id) else "."
        lines.append(f"{v.chrom}\t{v.position}\t{name}\t{v.ref}\t{v.alt}\t.\t.\t.")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
