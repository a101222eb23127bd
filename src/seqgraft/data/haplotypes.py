"""The sequences of donors in windows around an anchor, built when they are asked for and each one once.

**Anchor.** With ``align`` "centre" the anchor's base (a transcription start) stands at index ``length // 2`` of every
haplotype, whatever its indels: the window grows from the anchor to both sides, into more of the reference where bases
are deleted and less where they are inserted. Bases that are inserted before the anchor's lie on its left. Where an
allele replaces the anchor's base, its bases stand in for those of REF one by one from the left; where none is left for
the anchor, it is deleted, and the first base after the deletion takes its place. Beyond a contig's ends stand N.

With ``align`` "left" the anchor stands at index 0, and alleles whose REF starts before it are not applied: the start of
what ``samtools faidx FASTA CHROM:ANCHOR- | bcftools consensus -s DONOR -H SLOT`` writes.

**Distinct haplotypes.** Haplotypes with the same alleles in reach of the window have the same sequence, so that each
pattern of alleles is built once; whoever computes something of sequences computes it once for each.

**Dosage.** Genotypes whose encoding is "dosage" have one sequence per donor: heterozygous SNVs are the base codes 6-11.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from seqgraft.data.genotypes import Flags, Genotypes, Numbers
from seqgraft.errors import DataError
from seqgraft.genome import Genome, Interval
from seqgraft.sequence import ONE_HOT, PAD, Codes, N

__all__ = ["Haplotypes"]


@dataclass(frozen=True)
class Haplotypes:
    """Windows of donors' sequences; cheap to make, holds no sequence.

    Raises:
        DataError: the genotypes were read against another FASTA.
    """

    genome: Genome
    genotypes: Genotypes
    align: Literal["centre", "left"] = "centre"

    def __post_init__(self) -> None:
        if self.genotypes.genome != self.genome.hash:
            remedy = "Read the VCF against this FASTA"
            raise DataError("the genotypes were read against another FASTA", self.genome.path.name, remedy=remedy)

    def codes(self, chrom: str, anchor: int, length: int, haplotypes: Numbers) -> Codes:
        """Base codes ``(n, length)`` around an anchor.

        Args:
            anchor: 0-based, on the contig.
            length: bp.
            haplotypes: ``(n, 2)`` pairs of donor and slot; under dosage the slot means nothing.

        Raises:
            DataError: no variants on the contig, an anchor outside it, or a slot that the donor does not have.
        """
        pairs = np.asarray(haplotypes, dtype=np.int64).reshape(-1, 2)
        lacking = (pairs[:, 1] < 0) | (pairs[:, 1] >= self.genotypes.ploidy_on(chrom)[pairs[:, 0]])
        if lacking.any():
            donor, slot = pairs[lacking.argmax()]
            remedy = f"Its slots are 0 to {self.genotypes.ploidy_on(chrom)[donor] - 1}"
            where = f"{self.genotypes.donors[donor]}, {chrom}"
            raise DataError("the donor has no such haplotype", int(slot), where=where, remedy=remedy)
        distinct, index = self._distinct(chrom, anchor, length, pairs)
        return distinct if len(distinct) == len(pairs) else distinct[index]

    def distinct(self, chrom: str, anchor: int, length: int) -> tuple[Codes, npt.NDArray[np.int32]]:
        """The distinct windows ``(distinct, length)`` of all donors, and which one each haplotype is.

        The index is int32 ``(donors, ploidy)``, -1 where a donor has fewer haplotypes than others; ``(donors, 1)``
        under dosage. Errors as :meth:`codes`.
        """
        pairs = self.genotypes.haplotypes(chrom)
        if self.genotypes.encoding == "dosage":
            pairs = pairs[pairs[:, 1] == 0]
        codes, found = self._distinct(chrom, anchor, length, pairs)
        index = np.full((len(self.genotypes.donors), int(pairs[:, 1].max()) + 1), -1, dtype=np.int32)
        index[pairs[:, 0], pairs[:, 1]] = found
        return codes, index

    def _distinct(self, chrom: str, anchor: int, length: int, pairs: Numbers) -> tuple[Codes, npt.NDArray[np.intp]]:
        """The distinct windows of some haplotypes, and which one each is."""
        if not 0 <= anchor < self.genome.chroms[chrom]:
            remedy = f"{chrom} has {self.genome.chroms[chrom]} bp; is the table of genes of the same assembly?"
            raise DataError("the anchor lies beyond its contig", anchor, where=chrom, remedy=remedy)
        index = length // 2 if self.align == "centre" else 0
        if self.genotypes.encoding == "dosage":
            return self._dosage(Interval(chrom, anchor - index, anchor - index + length), pairs[:, 0])
        rows, reach = self._reach(chrom, anchor, index, length)
        alleles = self.genotypes.carried(rows, pairs)
        cores, reference = self._cores.rows(rows), self.genome.codes(reach)
        window = _Window(anchor, index, length, self.align, cores, reference, reach.start, self.genotypes.alt_codes)
        return window.build(alleles)

    @cached_property
    def _cores(self) -> _Cores:
        return _Cores.of(self.genotypes)

    def _reach(self, chrom: str, anchor: int, index: int, length: int) -> tuple[slice, Interval]:
        """Rows that may change a window, and the stretch of the reference that holds it whatever is deleted."""
        first, last = self.genotypes.span(chrom)
        cores, position = self._cores.rows(slice(first, last)), self.genotypes.position[first:last]
        lost = np.maximum(-cores.delta, 0)
        left = right = 0
        while True:
            reach = Interval(chrom, anchor - index - left, anchor - index + length + right)
            if self.align == "left":
                start = int(np.searchsorted(position, anchor))
            else:
                start = int(np.searchsorted(cores.reach, reach.start, side="right"))
            rows = slice(start, max(start, int(np.searchsorted(position, reach.end))))
            before, after = cores.start[rows] < anchor, cores.end[rows] > anchor
            needed = int(lost[rows][before].sum()), int(lost[rows][after].sum())
            if needed == (left, right):
                return slice(first + rows.start, first + rows.stop), reach
            left, right = needed

    def _dosage(self, window: Interval, donors: Numbers) -> tuple[Codes, npt.NDArray[np.intp]]:
        rows = self.genotypes.rows(window)
        alleles = self.genotypes.alleles(rows)[:, :, donors]
        sites, site = np.unique(self.genotypes.position[rows] - window.start, return_inverse=True)
        reference = self.genome.codes(window)
        bases = np.tile(reference[sites], (2, len(donors), 1))
        for slot in range(alleles.shape[1]):
            row, donor = np.nonzero(alleles[:, slot])
            bases[slot, donor, site[row]] = self.genotypes.alt_codes[self.genotypes.alt_start[rows[row]]]
        haploid = self.genotypes.ploidy_on(window.chrom)[donors] == 1
        bases[1, haploid] = bases[0, haploid]
        calls = _BOTH[bases[0], bases[1]]
        first, found = _distinct_rows(calls)
        codes = np.tile(reference, (len(first), 1))
        codes[:, sites] = calls[first]
        return codes, found


#: Base code of two bases in no order, ``(5, 5)``.
_BOTH: Codes = np.full((5, 5), N, dtype=np.uint8)
_BOTH[range(4), range(4)] = range(4)
for _code in range(PAD + 1, len(ONE_HOT)):
    _one, _other = np.flatnonzero(ONE_HOT[_code])
    _BOTH[_one, _other] = _BOTH[_other, _one] = _code


@dataclass(frozen=True)
class _Cores:
    """What each variant changes without the bases that REF and ALT share: REF ``[start, end)`` for ``size`` bases.

    Attributes:
        at: where these bases begin in the genotypes' ``alt_codes``.
        delta: by how many bases it makes a haplotype longer.
        reach: the furthest end of REF of this variant and of those before it on the contig.
    """

    start: Numbers
    end: Numbers
    at: Numbers
    size: Numbers
    delta: Numbers
    reach: Numbers

    @classmethod
    def of(cls, genotypes: Genotypes) -> _Cores:
        left, right = genotypes.trim.T.astype(np.int64)
        ends = genotypes.position + genotypes.ref_length
        start, end = genotypes.position + left, ends - right
        size = np.diff(genotypes.alt_start) - left - right
        reach = np.concatenate([np.maximum.accumulate(ends[slice(*span)]) for span in genotypes.contigs.values()])
        return cls(start, end, genotypes.alt_start[:-1] + left, size, size - (end - start), reach)

    def rows(self, rows: slice) -> _Cores:
        return _Cores(*(getattr(self, each.name)[rows] for each in fields(self)))


@dataclass(frozen=True)
class _Window:
    """A window of ``length`` bp with the anchor at ``index``.

    Attributes:
        cores: of the variants that may change it.
        reference: base codes from position ``offset`` of the contig on, as many as any haplotype needs.
        alt_codes: of the genotypes.
    """

    anchor: int
    index: int
    length: int
    align: Literal["centre", "left"]
    cores: _Cores
    reference: Codes
    offset: int
    alt_codes: Codes

    def build(self, alleles: Flags) -> tuple[Codes, npt.NDArray[np.intp]]:
        """The distinct windows of haplotypes with ``alleles`` ``(haplotypes, variants)``, and which one each is."""
        haplotype, row, out, fixed = self._edits(alleles)
        reaches = (out < self.length) & ((out + self.cores.size[row] > 0) | fixed)
        alleles[haplotype[~reaches], row[~reaches]] = False
        first, found = _distinct_rows(np.packbits(alleles, axis=1))
        number = np.full(len(alleles), -1, dtype=np.intp)
        number[first] = np.arange(len(first))
        kept = reaches & (number[haplotype] >= 0)
        haplotype, row, out = number[haplotype[kept]], row[kept], out[kept]
        built = np.empty((len(first), self.length), dtype=np.uint8)
        self._copy_reference(built, haplotype, row, out)
        self._write_alleles(built, haplotype, row, out)
        return built, found

    def _edits(self, alleles: Flags) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Numbers, Flags]:
        """Haplotype and row of each allele, where its bases begin in the window, whether it counts even at its edge.

        An allele begins where its REF does, moved by the lengths of those between it and the anchor.
        """
        cores, anchor = self.cores, self.anchor
        gone = (cores.start <= anchor) & (anchor < cores.end) & (anchor - cores.start >= cores.size)
        # How far an allele moves the anchor; one that deletes it gives its place to the first base after.
        moves = np.where(cores.end <= anchor, cores.delta, np.where(gone, cores.start + cores.size - anchor, 0))
        if self.align == "left":
            gone, moves = np.ones_like(gone), np.zeros_like(moves)
        haplotype, row = np.nonzero(alleles)
        stops = np.cumsum(np.bincount(haplotype, minlength=len(alleles)))
        starts = np.concatenate([[0], stops[:-1]])
        moved, grown = _sums(moves[row]), _sums(cores.delta[row])
        shift = self.index - anchor - (moved[stops] - moved[starts]) - grown[starts]
        return haplotype, row, cores.start[row] + grown[:-1] + shift[haplotype], gone[row]

    def _copy_reference(
        self, built: Codes, haplotype: npt.NDArray[np.intp], row: npt.NDArray[np.intp], out: Numbers
    ) -> None:
        """All that stands between indels; substitutions are written over it."""
        indel = self.cores.delta[row] != 0
        haplotype, row, out = haplotype[indel], row[indel], out[indel]
        after = out + self.cores.size[row]
        until = np.searchsorted(haplotype, np.arange(len(built)), side="right").tolist()
        # From a place of the window to its place in `reference`: left of each indel, and right of it.
        left = (self.cores.start[row] - out - self.offset).tolist()
        right = (self.cores.end[row] - after - self.offset).tolist()
        starts, ends = out.tolist(), np.maximum(after, 0).tolist()
        edit, reference, length = 0, self.reference, self.length
        for window, stop in zip(built, until, strict=True):
            at, ahead = 0, self.anchor - self.index - self.offset
            while edit < stop:
                start, ahead = starts[edit], right[edit]
                if at < start:
                    window[at:start] = reference[at + left[edit] : start + left[edit]]
                at = ends[edit]
                edit += 1
            if at < length:
                window[at:] = reference[at + ahead : length + ahead]

    def _write_alleles(
        self, built: Codes, haplotype: npt.NDArray[np.intp], row: npt.NDArray[np.intp], out: Numbers
    ) -> None:
        size = self.cores.size[row]
        edit = np.repeat(np.arange(len(row)), size)
        number = np.arange(len(edit)) - np.repeat(_sums(size)[:-1], size)  # of each base in its allele
        place = out[edit] + number
        inside = (place >= 0) & (place < self.length)
        edit, number, place = edit[inside], number[inside], place[inside]
        built[haplotype[edit], place] = self.alt_codes[self.cores.at[row[edit]] + number]


def _sums(numbers: Numbers) -> Numbers:
    """Sums of the first 0, 1, ... numbers."""
    return np.concatenate([[0], np.cumsum(numbers)])


def _distinct_rows(table: Codes) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The first of each kind of row in a table of bytes, in order, and of which kind each row is."""
    padded = np.zeros((len(table), table.shape[1] + 1), dtype=np.uint8)  # rows without bytes could not be compared
    padded[:, :-1] = table
    _, first, found = np.unique(padded.view(f"V{padded.shape[1]}")[:, 0], return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[found]
