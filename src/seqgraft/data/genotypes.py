"""Genotypes of many donors: a VCF against the FASTA, one rule for whatever a file may hold, bits for the rest.

What is refused ends in one error that names all of it; what is tolerated is counted in the :class:`GenotypeReport`.

==========================================  ==========================================================================
in the file                                 rule
==========================================  ==========================================================================
contig that the FASTA lacks                 refused if only "chr" is in the way, or if all of them lack; else counted
REF that is not the FASTA's                 refused; told apart: swapped alleles, another assembly
FASTA has N there; letters beside ACGT      the allele is skipped and counted
several ALT                                 one variant for each
``*``                                       nothing to apply: the deletion is another record's; counted
symbolic, breakend                          the allele is skipped and counted
ALT that no donor carries                   left out and counted; no rule above but REF's is asked of it
a record twice                              the second is left out and counted; refused if the genotypes differ
records out of order                        sorted and counted
``0/1``                                     ``unphased``: refuse, random phase, or dosage
``0/0``, ``1/1``                            the same whatever the phase
phase sets (``PS``)                         fine where a donor's heterozygous ``0|1`` of a window are of one set, those
                                            without a set being one; else ``unphased``: refuse, each set on haplotypes
                                            drawn at random, or dosage; counted
``./.``, ``.``, ``.|1``                     ``missing``: refuse, the reference allele, or the record's most frequent
``1``                                       a haploid donor has one haplotype; ``0|1|1`` has three
another ploidy on the same contig           refused (sex chromosomes: leave the pseudo-autosomal regions out)
two alleles that overlap on one haplotype   the first one is applied, as ``bcftools consensus`` does; counted
a donor twice                               refused
a donor not asked for, or not there         left out, listed and counted
==========================================  ==========================================================================

Skipped alleles (symbolic, letters, N) that are more than 1 % of those that donors carry are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from seqgraft.errors import DataError
from seqgraft.genome import Genome, Interval, Variant
from seqgraft.sequence import Codes, decode

__all__ = [
    "COUNTED",
    "SKIPPED",
    "Bits",
    "Flags",
    "GenotypeReport",
    "Genotypes",
    "Missing",
    "Numbers",
    "Unphased",
    "first_wins",
    "trimmed",
]

Unphased = Literal["refuse", "random", "dosage"]
Missing = Literal["refuse", "reference", "major"]
Bits = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

#: What is counted -> what it says.
COUNTED: Mapping[str, str] = {
    "contig": "records on contigs that the FASTA lacks",
    "outside": "records outside the intervals that are asked for",
    "filtered": "records whose FILTER is not PASS, used like the others",
    "unsorted": "records that come after one further right, sorted",
    "several": "records with several ALT alleles, taken apart",
    "repeated": "variants that stand in the file before, left out",
    "uncarried": "alleles that no donor carries, left out",
    "star": "alleles *, the place of another record's deletion",
    "symbolic": "symbolic alleles and breakends that donors carry, skipped",
    "letters": "alleles with letters other than A, C, G, T, skipped",
    "same": "alleles that are the same as REF, skipped",
    "unknown": "alleles where the FASTA has an unknown base, skipped",
    "not_snv": "alleles that are no substitution of one base, skipped because dosage has no place for them",
    "unphased": "heterozygous calls without phase",
    "phase_sets": "heterozygous calls of another phase set than the donor's one before in the window",
    "missing": "calls with a missing allele",
    "overlapping": "alleles not applied because they overlap an earlier one of their haplotype",
}
SKIPPED = ("symbolic", "letters", "same", "unknown")


@dataclass(frozen=True)
class GenotypeReport:
    """What a file held and what was done about it.

    Attributes:
        records: in the file.
        variants: alternative alleles that are kept.
        counts: key of ``COUNTED`` -> how often, where that is not 0.
        unphased, missing: the rules that were chosen.
        ploidy: contig -> ploidy -> donors.
        only_in_file, only_asked: donors of one side alone.
    """

    records: int
    variants: int
    counts: Mapping[str, int]
    unphased: Unphased
    missing: Missing
    ploidy: Mapping[str, Mapping[int, int]]
    only_in_file: tuple[str, ...] = ()
    only_asked: tuple[str, ...] = ()

    @property
    def in_words(self) -> list[str]:
        """A line for each fact; no donor is named."""
        lines = [f"{self.records} records, {self.variants} variants"]
        lines += [f"{number} {COUNTED[key]}{self._rule(key)}" for key, number in self.counts.items()]
        donors = {"in the VCF alone": self.only_in_file, "not in the VCF": self.only_asked}
        return lines + [f"{len(names)} donors {where}, left out" for where, names in donors.items() if names]

    def _rule(self, key: str) -> str:
        words = {
            ("unphased", "random"): ", their phase drawn at random",
            ("unphased", "dosage"): ", encoded as half of each base",
            ("phase_sets", "random"): ", each set on haplotypes drawn at random",
            ("phase_sets", "dosage"): ", all phase forgotten",
            ("missing", "reference"): ", taken for the reference allele",
            ("missing", "major"): ", taken for the record's most frequent allele",
        }
        rules = {"unphased": self.unphased, "phase_sets": self.unphased, "missing": self.missing}
        return words.get((key, rules.get(key, "")), "")


@dataclass(frozen=True)
class Genotypes:
    """Which haplotype has which alternative alleles: a bit for each, sorted by contig and position.

    On no haplotype do two alleles overlap. A haplotype is a pair ``(donor, slot)``: slot 0 is the left one of ``0|1``.

    Attributes:
        donors: their names, in the order of ``bits``.
        contigs: contig -> its rows ``[first, last)``.
        ploidy: int8 ``(contigs, donors)``: haplotypes of each donor on each contig.
        position: int64 ``(variants,)``, 0-based, of the first base of REF.
        ref_length: int32 ``(variants,)``; REF itself stands in the genome.
        alt_start: int64 ``(variants + 1,)`` into ``alt_codes``, the base codes of all ALT one after another.
        trim: int32 ``(variants, 2)``: bases that REF and ALT share on the left and, of the rest, on the right.
        bits: uint8 ``(variants, slots, donors / 8)``: as of ``numpy.packbits`` over donors.
        encoding: "haplotypes", or "dosage": slots in no order, SNVs alone.
        genome: sha256 of the FASTA.
        report: what the file held.
    """

    donors: tuple[str, ...]
    contigs: Mapping[str, tuple[int, int]]
    ploidy: npt.NDArray[np.int8]
    position: Numbers
    ref_length: npt.NDArray[np.int32]
    alt_start: Numbers
    alt_codes: Codes
    trim: npt.NDArray[np.int32]
    bits: Bits
    encoding: Literal["haplotypes", "dosage"]
    genome: str
    report: GenotypeReport

    def __len__(self) -> int:
        return len(self.position)

    def span(self, chrom: str) -> tuple[int, int]:
        """Rows ``[first, last)`` of a contig.

        Raises:
            DataError: it has no variants, so that all donors would silently be the reference.
        """
        if chrom not in self.contigs:
            some = ", ".join(list(self.contigs)[:5])
            remedy = f"They are on {some}: use regions there" if some else "The file has none at all"
            raise DataError("the genotypes have no variants on the contig", chrom, remedy=remedy)
        return self.contigs[chrom]

    def ploidy_on(self, chrom: str) -> npt.NDArray[np.int8]:
        """Haplotypes of each donor, int8 ``(donors,)``."""
        self.span(chrom)
        ploidy: npt.NDArray[np.int8] = self.ploidy[list(self.contigs).index(chrom)]
        return ploidy

    def haplotypes(self, chrom: str) -> Numbers:
        """All haplotypes of a contig, ``(haplotypes, 2)`` pairs of donor and slot, donor by donor."""
        return np.argwhere(np.arange(self.bits.shape[1]) < self.ploidy_on(chrom)[:, None])

    def alleles(self, rows: slice | Numbers) -> Flags:
        """Whether each haplotype has each variant, bool ``(variants, slots, donors)``."""
        found: Flags = np.unpackbits(self.bits[rows], axis=-1, count=len(self.donors)).view(np.bool_)
        return found

    def carried(self, rows: slice, haplotypes: Numbers) -> Flags:
        """Which variants some haplotypes, ``(n, 2)`` pairs of donor and slot, have: bool ``(n, variants)``."""
        donor, slot = haplotypes.T
        packed = self.bits[rows].transpose(1, 2, 0)[slot, donor >> 3]
        found: Flags = (packed & (128 >> (donor & 7)).astype(np.uint8)[:, None]) != 0
        return found

    def rows(self, interval: Interval) -> Numbers:
        """Rows of the variants that start in an interval (0-based, half-open), in order."""
        first, last = self.span(interval.chrom)
        found = np.searchsorted(self.position[first:last], (interval.start, interval.end))
        return np.arange(first + found[0], first + found[1])

    def dosage(self, interval: Interval) -> tuple[Bits, Numbers]:
        """Alternative alleles per donor, uint8 ``(donors, variants)``, of the variants in an interval, and their rows.

        0 to the donor's ploidy; missing alleles as ``missing`` filled them. For linear baselines.
        """
        rows = self.rows(interval)
        return self.alleles(rows).sum(axis=1, dtype=np.uint8).T, rows

    def singly(self, chrom: str, rows: Numbers) -> Genotypes:
        """Haploid donors who carry one variant each, of neighbouring rows of a contig; the last one carries none."""
        first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        each = slice(first, last)
        alt_start = self.alt_start[first : last + 1]
        return replace(
            self,
            donors=tuple(map(str, range(len(rows) + 1))),
            contigs={chrom: (0, len(rows))},
            ploidy=np.ones((1, len(rows) + 1), dtype=np.int8),
            position=self.position[each],
            ref_length=self.ref_length[each],
            alt_start=alt_start - alt_start[0],
            alt_codes=self.alt_codes[alt_start[0] : alt_start[-1]],
            trim=self.trim[each],
            bits=np.packbits(np.eye(len(rows), len(rows) + 1, dtype=np.bool_), axis=-1)[:, None],
            encoding="haplotypes",
        )

    def variant(self, row: int, genome: Genome) -> Variant:
        """A variant as VCF writes it (1-based)."""
        chrom = next(name for name, (first, last) in self.contigs.items() if first <= row < last)
        start = int(self.position[row])
        ref = decode(genome.codes(Interval(chrom, start, start + int(self.ref_length[row]))))
        return Variant(chrom, start + 1, ref, decode(self.alt_codes[self.alt_start[row] : self.alt_start[row + 1]]))


def trimmed(ref: str, alt: str) -> tuple[int, int]:
    """Bases that two alleles share: on the left, and on the right of what is left.

    The first base of an indel goes to the left before anything else: it is the one before the event, and an earlier
    variant may change it.
    """
    shorter = min(len(ref), len(alt))
    left = int(len(ref) != len(alt) and ref[0] == alt[0])
    right = 0
    while right < shorter - left and ref[-1 - right] == alt[-1 - right]:
        right += 1
    while left < shorter - right and ref[left] == alt[left]:
        left += 1
    return left, right


def first_wins(place: Numbers, lengths: Numbers, trim: npt.NDArray[np.int32], bits: Bits, donors: int) -> int:
    """Takes alleles out of ``bits`` that overlap an earlier one of their haplotype; how many.

    The rule of ``bcftools consensus`` (consensus.c of release 1.16): an allele uses all bases of its REF, but for an
    indel whose first base is the last one in use and which follows no insertion there.

    Args:
        place: ``(variants, 3)``: contig, position, bases of REF; sorted.
        lengths: ``(variants,)``, of ALT.
        trim: ``(variants, 2)``, as of :func:`trimmed`.
    """
    contig, start, size = place.T
    end = start + size
    offset = contig * (1 << 40)  # so that no contig reaches into the next
    reach = np.maximum.accumulate(offset + end)
    clashing = np.flatnonzero(offset[1:] + start[1:] < reach[:-1]) + 1
    core = trim.sum(axis=1)
    follows = (trim[:, 0] > 0) & ((size == core) | (lengths == core)) & (size != lengths)
    dropped = 0
    for group in np.split(clashing, np.flatnonzero(np.diff(clashing) > 1) + 1):
        if not len(group):
            continue
        rows = slice(group[0] - 1, group[-1] + 1)
        alleles = np.unpackbits(bits[rows], axis=-1, count=donors).view(np.bool_)
        used = np.full(alleles.shape[1:], -1, dtype=np.int64)  # last base in use on each haplotype
        inserted = np.zeros(alleles.shape[1:], dtype=np.bool_)
        for row, has in zip(range(rows.start, rows.stop), alleles, strict=True):
            clash = has & (start[row] <= used)
            if follows[row]:
                clash &= (start[row] != used) | inserted
            dropped += int(clash.sum())
            has &= ~clash
            used[has], inserted[has] = end[row] - 1, lengths[row] > size[row]
        bits[rows] = np.packbits(alleles, axis=-1)
    return dropped
