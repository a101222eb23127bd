"""Reading genotypes: a VCF or BCF, record by record, into bits, by the rules of :mod:`seqgraft.data.genotypes`."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from seqgraft.data.genotypes import (
    COUNTED,
    SKIPPED,
    Bits,
    Flags,
    GenotypeReport,
    Genotypes,
    Missing,
    Numbers,
    Unphased,
    first_wins,
    trimmed,
)
from seqgraft.errors import DataError, Problems
from seqgraft.genome import Genome, Interval, check_assembly, match_chroms, vcf_text
from seqgraft.sequence import Codes, decode, encode

__all__ = ["MAX_SKIPPED", "read_genotypes"]

#: Share of the alleles that donors carry above which skipping them refuses the file.
MAX_SKIPPED = 0.01

_MISSING, _ABSENT = -1, -2  # an allele that is not known; a slot that the call does not have
_BASES = frozenset("ACGT")
_DIGITS, _MOST_SLOTS = 4, 100  # of the number of an allele; of a call
_SHOWN = 5  # donors or places that a message names


def read_genotypes(
    path: Path | str,
    genome: Genome,
    *,
    donors: Sequence[str] | None = None,
    unphased: Unphased = "refuse",
    missing: Missing = "refuse",
    within: Sequence[Interval] | None = None,
    rename: Mapping[str, str] | None = None,
    allow_skipped: bool = False,
    seed: int = 0,
) -> Genotypes:
    """The genotypes of a VCF or BCF (plain or compressed, no index needed), read as a stream.

    Args:
        genome: the FASTA that REF is compared with.
        donors: those to read, in this order; all of the file, in its order, if None.
        unphased: what to do about heterozygous calls without phase: "refuse"; "random" gives each a phase that depends
            on the seed, the donor's name and the place alone; "dosage" forgets all phase and keeps SNVs alone. Where a
            donor's calls in one of ``within`` are of several phase sets, "random" turns each set as a whole.
        missing: what to do about missing alleles: "refuse", "reference", or "major" (the most frequent among the
            donors read; the lowest number of equally frequent ones).
        within: keep only variants that start in one of these intervals.
        rename: contig in the VCF -> name in the FASTA.
        allow_skipped: also with more than 1 % of the alleles skipped.

    Raises:
        DataError: what the table of :mod:`seqgraft.data.genotypes` says is refused, all of it at once; no such file, no
            VCF, or nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("the VCF file does not exist", where=path, remedy="Check the path")
    lines = _lines(path)
    header, with_sets = "", False
    for header in lines:
        with_sets |= header.startswith("##FORMAT=<ID=PS,")
        if not header.startswith("##"):
            break
    names = header.split("\t")[9:]
    if not header.startswith("#CHROM") or not names:
        remedy = "Give a VCF with a column of genotypes (GT) for each donor"
        raise DataError("the VCF has no donors", header[:60] or None, where=path, remedy=remedy)
    chosen = list(names if donors is None else donors)
    _check_unique(names, path)
    _check_unique(chosen, "donors")
    common = [name for name in chosen if name in frozenset(names)]
    if not common:
        remedy = f"The VCF has {', '.join(names[:_SHOWN])}: use its names"
        raise DataError("none of the donors is in the VCF", chosen[0], where=path, remedy=remedy)
    reader = _Reader(path, common, unphased, missing, seed, _merged(within), _Reference(genome), with_sets)
    columns = [names.index(name) + 9 for name in common]
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) != len(names) + 9 or not fields[1].isdecimal():
            where, remedy = f"{path} record {number}", f"Give {len(names) + 9} columns, the second a position"
            raise DataError("this is not a record of the VCF", line[:60], where=where, remedy=remedy)
        chrom = (rename or {}).get(fields[0], fields[0])
        reader.read(chrom, int(fields[1]) - 1, fields, [fields[column] for column in columns])
    reader.refuse(allow_skipped)
    asked, there = set(chosen), set(names)
    return reader.genotypes(tuple(n for n in names if n not in asked), tuple(n for n in chosen if n not in there))


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from vcf_text(path)
    except (OSError, ValueError, EOFError) as error:
        remedy = "It may be truncated or not VCF"
        raise DataError(f"the VCF file cannot be read ({error})", where=path, remedy=remedy) from error


def _check_unique(names: Sequence[str], where: object) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        remedy = "Give every donor one column" + (f" ({len(repeated)} are repeated)" if len(repeated) > 1 else "")
        raise DataError("a donor is there twice", repeated[0], where=where, remedy=remedy)


def _merged(within: Sequence[Interval] | None) -> dict[str, tuple[list[int], list[int]]] | None:
    """Contig -> starts and ends of the intervals without overlaps."""
    if within is None:
        return None
    spans: dict[str, tuple[list[int], list[int]]] = {}
    for interval in sorted(within, key=lambda each: (each.chrom, each.start)):
        starts, ends = spans.setdefault(interval.chrom, ([], []))
        if ends and interval.start <= ends[-1]:
            ends[-1] = max(ends[-1], interval.end)
        else:
            starts.append(interval.start)
            ends.append(interval.end)
    return spans


class _Calls(dict[str, int]):
    """Text of a call -> its row in the tables, which grow with every new text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.alleles: npt.NDArray[np.int16] = np.empty((0, 1), dtype=np.int16)  # (texts, slots)
        self.slots: npt.NDArray[np.int8] = np.empty(0, dtype=np.int8)  # below 0 where nothing is called
        self.loose: Flags = np.empty(0, dtype=np.bool_)  # heterozygous without phase
        self.phased: Flags = np.empty(0, dtype=np.bool_)  # heterozygous with phase
        self.gaps: Flags = np.empty(0, dtype=np.bool_)  # with a missing allele

    def __missing__(self, text: str) -> int:
        parts = text.lstrip("|/").replace("|", "/").split("/")
        known = all(part == "." or (part.isdecimal() and len(part) <= _DIGITS) for part in parts)
        if not known or len(parts) > _MOST_SLOTS:
            remedy = "Write calls as 0|1, 0/1, 1 or ./."
            raise DataError("this is no genotype", text[:60], where=self.path, remedy=remedy)
        alleles = [_MISSING if part == "." else int(part) for part in parts]
        table = np.full((len(self) + 1, max(self.alleles.shape[1], len(alleles))), _ABSENT, dtype=np.int16)
        table[:-1, : self.alleles.shape[1]] = self.alleles
        table[-1, : len(alleles)] = alleles
        self.alleles = table
        nothing = set(alleles) == {_MISSING}
        self.slots = np.append(self.slots, np.int8(-len(alleles) if nothing else len(alleles)))
        loose = "/" in text.lstrip("|/")
        self.loose = np.append(self.loose, loose and len(set(alleles)) > 1)
        self.phased = np.append(self.phased, not loose and len(set(alleles)) > 1)
        self.gaps = np.append(self.gaps, _MISSING in alleles)
        self[text] = len(self)
        return self[text]

    def rows(self, texts: Iterable[str], donors: int) -> npt.NDArray[np.intp]:
        return np.fromiter(map(self.__getitem__, texts), dtype=np.intp, count=donors)


@dataclass
class _Reference:
    """REF of every record beside the FASTA."""

    genome: Genome
    compared: int = 0
    swapped: int = 0
    wrong: list[tuple[str, str, str]] = field(default_factory=list)  # place, REF, the FASTA's
    codes: dict[str, Codes] = field(default_factory=dict)

    def knows(self, chrom: str, path: Path) -> bool:
        """Whether the FASTA has the contig.

        Raises:
            DataError: only "chr" is in the way.
        """
        if chrom not in self.codes:
            if chrom not in self.genome.chroms:
                if {chrom.removeprefix("chr"), f"chr{chrom}"} & self.genome.chroms.keys():
                    match_chroms([chrom], self.genome, path)
                return False
            self.codes[chrom] = self.genome.chrom_codes(chrom).view(np.ndarray)
        return True

    def compare(self, chrom: str, start: int, ref: str, alts: Sequence[str]) -> Literal["equal", "unknown", "wrong"]:
        contig, first = self.codes[chrom], max(start, 0)
        found = decode(contig[first : start + len(ref)])
        if "N" in found and len(found) == len(ref):
            return "unknown"
        self.compared += 1
        if ref and found == ref:
            return "equal"
        self.swapped += bool(alts) and decode(contig[first : start + len(alts[0])]) == alts[0]
        self.wrong.append((f"{chrom}:{start + 1}", ref, found))
        return "wrong"


@dataclass
class _Reader:
    """What is known after the records so far."""

    path: Path
    donors: list[str]
    unphased: Unphased
    missing: Missing
    seed: int
    within: dict[str, tuple[list[int], list[int]]] | None
    reference: _Reference
    with_sets: bool  # the header says that there are phase sets
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # what may be refused -> its first place
    records: int = 0
    carried: int = 0
    absent: Counter[str] = field(default_factory=Counter)  # contigs that the FASTA lacks
    ploidy: dict[str, npt.NDArray[np.int8]] = field(default_factory=dict)  # of called genotypes, 0 before the first
    written: dict[str, npt.NDArray[np.int8]] = field(default_factory=dict)  # most slots of any
    other_ploidy: dict[tuple[str, str], str] = field(default_factory=dict)  # contig, donor -> where
    place: list[tuple[int, int, int]] = field(default_factory=list)  # contig in the FASTA, position, bases of REF
    alts: list[str] = field(default_factory=list)
    trims: list[tuple[int, int]] = field(default_factory=list)
    bits: list[Bits] = field(default_factory=list)  # (slots, bytes) of each variant
    fills: list[tuple[int, Bits]] = field(default_factory=list)  # variant, donors that have it for want of a call
    set_number: dict[str, int] = field(default_factory=lambda: {"": 0})  # of phase sets, in the order of their coming
    sets: dict[tuple[str, int], npt.NDArray[np.int32]] = field(default_factory=dict)  # contig, interval: donors' last
    last: tuple[str, int] = ("", 0)

    def __post_init__(self) -> None:
        self.calls = _Calls(self.path)
        digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in self.donors]
        self.keys = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
        self.number = {chrom: number for number, chrom in enumerate(self.reference.genome.chroms)}

    def read(self, chrom: str, start: int, fields: Sequence[str], calls: Sequence[str]) -> None:
        """One record; ``calls`` are the donors' columns."""
        self.records += 1
        if not self.reference.knows(chrom, self.path):
            self.absent[chrom] += 1
            self.counts["contig"] += 1
            return
        self.counts["unsorted"] += self.last[0] == chrom and start < self.last[1]
        self.last = chrom, start
        piece = 0 if self.within is None else _piece(self.within, chrom, start)
        if piece is None:
            self.counts["outside"] += 1
            return
        ref, alts = fields[3].upper(), [] if fields[4] == "." else fields[4].upper().split(",")
        found = self.reference.compare(chrom, start, ref, alts)
        self.counts["several"] += len(alts) > 1
        self.counts["filtered"] += fields[6] not in ("PASS", ".")
        if not alts or found == "wrong":
            return
        where = f"{self.path}, {chrom}:{start + 1}"
        tags = fields[8].split(":")
        if tags[0] != "GT":
            raise DataError(
                "the record has no genotypes", fields[8], where=where, remedy="GT must come first in FORMAT"
            )
        rows = self.calls.rows((call.partition(":")[0] for call in calls) if len(tags) > 1 else calls, len(calls))
        called, nothing, filler = self._called(rows, chrom, start)
        if self.with_sets or "PS" in tags:
            self._turn_sets(called, self.calls.phased[rows], _phase_sets(tags, calls), (chrom, start, piece))
        if called.max() > len(alts):
            remedy = f"The record has {len(alts)} ALT"
            raise DataError("a call has an allele without ALT", int(called.max()), where=where, remedy=remedy)
        for allele, alt in enumerate(alts, start=1):
            has = called == allele
            reason = self._reason(ref, alt, found == "equal") if has.any() else "uncarried"
            self.carried += reason not in ("uncarried", "star")
            if reason:
                self.counts[reason] += 1
                continue
            if filler == allele and nothing.any():
                self.fills.append((len(self.bits), np.packbits(nothing)))
            self.place.append((self.number[chrom], start, len(ref)))
            self.alts.append(alt)
            self.trims.append(trimmed(ref, alt))
            self.bits.append(np.packbits(has.T, axis=1))

    def _reason(self, ref: str, alt: str, known: bool) -> str:
        """Why an allele that donors carry is not used; "" if it is."""
        if alt == "*":
            return "star"
        if alt[:1] in ("<", ".") or alt[-1:] == "." or "[" in alt or "]" in alt:
            return "symbolic"
        if not alt or set(alt) - _BASES:
            return "letters"
        if ref == alt:
            return "same"
        if not known:
            return "unknown"
        return "not_snv" if self.unphased == "dosage" and not len(ref) == len(alt) == 1 else ""

    def _called(self, rows: npt.NDArray[np.intp], chrom: str, start: int) -> tuple[Numbers, Flags, int]:
        """Allele of each slot ``(donors, slots)``; which donors have no call at all, and the allele they are given."""
        where = f"{chrom}:{start + 1}"
        slots = self.calls.slots[rows]
        self._note_ploidy(slots, chrom, where)
        alleles = self.calls.alleles[rows].astype(np.int64)
        nothing, filler = slots < 0, 0
        gaps, loose = self.calls.gaps[rows], self.calls.loose[rows]
        if gaps.any():
            self._note("missing", gaps, where)
            if self.missing == "major":
                filler = int(np.bincount(alleles[alleles >= 0], minlength=1).argmax())
            alleles[alleles == _MISSING] = filler
            alleles[nothing] = _ABSENT  # how many slots these donors have is known at the end
        if loose.any():
            self._note("unphased", loose, where)
            if self.unphased == "random":
                alleles[loose] = _shuffled(alleles[loose], self.keys[loose], f"{self.seed} {chrom} {start}")
        return alleles, nothing, filler

    def _turn_sets(self, alleles: Numbers, phased: Flags, sets: Sequence[str], where: tuple[str, int, int]) -> None:
        """Notes where phase sets change; at random, all calls of a set change their slots alike.

        Args:
            phased: which donors' calls are heterozygous and phased; ``sets``: of each donor, "" for none.
            where: contig, start, number of the interval.
        """
        chrom, start, piece = where
        number = np.array([self.set_number.setdefault(name, len(self.set_number)) for name in sets], dtype=np.int32)
        last = self.sets.setdefault((chrom, piece), np.full_like(number, -1))
        changed = phased & (last >= 0) & (last != number)
        last[phased] = number[phased]
        if changed.any():
            self._note("phase_sets", changed, f"{chrom}:{start + 1}")
        if self.unphased == "random":
            for name in {sets[donor] for donor in np.flatnonzero(phased).tolist()} - {""}:
                of_set = phased & (number == self.set_number[name])
                alleles[of_set] = _shuffled(alleles[of_set], self.keys[of_set], f"{self.seed} {chrom} set {name}")

    def _note(self, what: str, donors: Flags, where: str) -> None:
        self.counts[what] += int(donors.sum())
        self.first.setdefault(what, f"{where}, {self.donors[int(donors.argmax())]}")

    def _note_ploidy(self, slots: npt.NDArray[np.int8], chrom: str, where: str) -> None:
        if chrom not in self.ploidy:
            self.ploidy[chrom], self.written[chrom] = np.zeros_like(slots), np.zeros_like(slots)
        ploidy = self.ploidy[chrom]
        np.maximum(self.written[chrom], np.abs(slots), out=self.written[chrom])
        other = (slots > 0) & (ploidy != slots)
        if not other.any():
            return
        for donor in np.flatnonzero(other & (ploidy > 0)):
            text = f"{slots[donor]} at {where}, {ploidy[donor]} before"
            self.other_ploidy.setdefault((chrom, self.donors[donor]), text)
        new = other & (ploidy == 0)
        ploidy[new] = slots[new]

    def refuse(self, allow_skipped: bool) -> None:
        """Raises what is refused, all of it at once."""
        reference, path = self.reference, self.path
        if not self.records:
            raise DataError("the VCF has no records", where=path, remedy="Check that it is not only a header")
        if self.absent.total() == self.records:
            match_chroms(self.absent, reference.genome, path)
        check_assembly(path, reference.genome, reference.compared, len(reference.wrong), reference.swapped)
        problems = Problems(DataError)
        for where, ref, found in reference.wrong:
            remedy = f"The FASTA has {found or 'no bases'} there: is it the same assembly?"
            problems.add("REF does not match the FASTA", ref, where=f"{path}, {where}", remedy=remedy)
        for (chrom, donor), text in self.other_ploidy.items():
            remedy = "Leave the pseudo-autosomal regions out, or write haploid calls as haploid throughout"
            problems.add(f"the ploidy of {donor} changes on {chrom}", text, where=path, remedy=remedy)
        if self.unphased == "refuse" and self.counts["unphased"]:
            what = f"{self.counts['unphased']} heterozygous calls have no phase; the first is"
            remedy = "Phase them, or choose unphased: random (a phase drawn at random) or dosage (half of each base)"
            problems.add(what, self.first["unphased"], where=path, remedy=remedy)
        if self.unphased == "refuse" and self.counts["phase_sets"]:
            what = f"{self.counts['phase_sets']} heterozygous calls are phased apart from others near by; the first is"
            remedy = "Phase the whole file, or choose unphased: random (sets on haplotypes drawn at random) or dosage"
            problems.add(what, self.first["phase_sets"], where=path, remedy=remedy)
        if self.missing == "refuse" and self.counts["missing"]:
            what = f"{self.counts['missing']} calls have a missing allele; the first is"
            remedy = "Impute them, or choose missing: reference or major (the most frequent allele)"
            problems.add(what, self.first["missing"], where=path, remedy=remedy)
        skipped = {COUNTED[key]: self.counts[key] for key in SKIPPED if self.counts[key]}
        if sum(skipped.values()) > MAX_SKIPPED * self.carried and not allow_skipped:
            what = f"more than 1 % of the {self.carried} alleles that donors carry cannot be applied"
            problems.add(what, skipped, where=path, remedy="Correct or filter the file, or allow_skipped: true")
        problems.raise_if_any()
        if not self.bits:
            remedy = "Check the file, the donors and the intervals"
            raise DataError("no donor carries a variant that can be applied", where=path, remedy=remedy)

    def genotypes(self, only_in_file: tuple[str, ...], only_asked: tuple[str, ...]) -> Genotypes:
        """All of the file, sorted."""
        names = [chrom for chrom in self.number if chrom in self.ploidy]
        ploidy = np.stack([np.where(self.ploidy[c], self.ploidy[c], self.written[c]) for c in names])
        if self.unphased == "dosage" and ploidy.max() > 2:
            what = "dosage can be encoded of one or two haplotypes, but a donor has"
            raise DataError(what, int(ploidy.max()), where=self.path, remedy="Choose unphased: random")
        place = np.array(self.place, dtype=np.int64)
        place[:, 0] = np.searchsorted([self.number[chrom] for chrom in names], place[:, 0])
        bits = np.zeros((len(place), int(ploidy.max()), (len(self.donors) + 7) // 8), dtype=np.uint8)
        for row, each in enumerate(self.bits):
            bits[row, : len(each)] = each[: bits.shape[1]]
        exists = np.packbits(np.arange(bits.shape[1])[:, None] < ploidy[:, None, :], axis=-1)  # (contigs, slots, bytes)
        for row, donors in self.fills:
            bits[row] |= donors & exists[place[row, 0]]
        order = np.lexsort((place[:, 1], place[:, 0]))  # stable: in the file's order at one place
        order = order[~self._repeated(place[order], [self.alts[row] for row in order], bits[order], names)]
        place, bits, alts = place[order], bits[order], [self.alts[row] for row in order]
        lengths = np.array([len(alt) for alt in alts], dtype=np.int64)
        trim = np.array(self.trims, dtype=np.int32)[order]
        self.counts["overlapping"] = first_wins(place, lengths, trim, bits, len(self.donors))
        ends = np.searchsorted(place[:, 0], np.arange(len(names)), side="right").tolist()
        return Genotypes(
            donors=tuple(self.donors),
            contigs=dict(zip(names, zip([0, *ends[:-1]], ends, strict=True), strict=True)),
            ploidy=ploidy,
            position=place[:, 1].copy(),
            ref_length=place[:, 2].astype(np.int32),
            alt_start=np.concatenate([[0], np.cumsum(lengths)]),
            alt_codes=encode("".join(alts)),
            trim=trim,
            bits=bits,
            encoding="dosage" if self.unphased == "dosage" else "haplotypes",
            genome=self.reference.genome.hash,
            report=GenotypeReport(
                self.records,
                len(place),
                {key: self.counts[key] for key in COUNTED if self.counts[key]},
                self.unphased,
                self.missing,
                {c: dict(sorted(Counter(p.tolist()).items())) for c, p in zip(names, ploidy, strict=True)},
                only_in_file,
                only_asked,
            ),
        )

    def _repeated(self, place: Numbers, alts: Sequence[str], bits: Bits, names: Sequence[str]) -> Flags:
        """Which variants, sorted, stand there before."""
        repeated = np.zeros(len(place), dtype=np.bool_)
        seen: dict[tuple[int, int, int, str], int] = {}
        problems = Problems(DataError)
        near = np.flatnonzero((place[1:, :2] == place[:-1, :2]).all(axis=1))
        for row in np.unique(np.concatenate([near, near + 1])).tolist():
            contig, start, length = place[row].tolist()
            earlier = seen.setdefault((contig, start, length, alts[row]), row)
            repeated[row] = earlier != row
            if not np.array_equal(bits[earlier], bits[row]):
                where, remedy = f"{self.path}, {names[contig]}:{start + 1}", "Remove one of them"
                problems.add("a variant is there twice, with other genotypes", alts[row], where=where, remedy=remedy)
        problems.raise_if_any()
        self.counts["repeated"] = int(repeated.sum())
        return repeated


def _piece(within: Mapping[str, tuple[list[int], list[int]]], chrom: str, start: int) -> int | None:
    """Which of the contig's intervals a place is in."""
    starts, ends = within.get(chrom, ([], []))
    at = bisect_right(starts, start) - 1
    return at if at >= 0 and start < ends[at] else None


def _phase_sets(tags: Sequence[str], calls: Sequence[str]) -> list[str]:
    """The phase set of each donor's call; "" where it has none."""
    if "PS" not in tags:
        return [""] * len(calls)
    at = tags.index("PS")
    parts = (call.split(":") for call in calls)
    return ["" if len(part) <= at or part[at] == "." else part[at] for part in parts]


def _shuffled(alleles: Numbers, keys: npt.NDArray[np.uint64], place: str) -> Numbers:
    """Each row in an order drawn from its key and the place; slots that are absent stay last."""
    drawn = np.uint64(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little"))
    slot = np.arange(1, alleles.shape[1] + 1).astype(np.uint64)
    mixed = np.bitwise_xor(keys, drawn)[:, None] + slot * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64 (Steele et al. 2014)
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    order = np.argsort(np.where(alleles == _ABSENT, np.uint64(2**64 - 1), mixed), axis=1, kind="stable")
    return np.take_along_axis(alleles, order, axis=1)
