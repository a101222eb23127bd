"""Reading a VCF and checking it against the FASTA, before anything is scored.

The whole file is looked at first, with a few bytes of memory per variant. A file of another assembly or with other
chromosome names is told as such. A variant that cannot be scored is skipped, counted and listed with its reason in
``OUT.skipped.tsv``; more than 1 % of them is an error unless it is allowed.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from seqgraft.errors import DataError, RunError
from seqgraft.genome import Genome, Variant, check_assembly, match_chroms, read_vcf_rows
from seqgraft.sequence import Codes, N, encode

__all__ = ["MAX_SKIPPED", "REASONS", "AlleleCheck", "Checked", "CheckedFile", "check_vcf"]

#: Share of skipped variants above which a file is refused.
MAX_SKIPPED = 0.01

#: Why a variant is skipped; what is counted and listed. The first is no reason: it is scored.
REASONS: Final = (
    "",
    "the chromosome is not in the FASTA",
    "the record has no alternative allele",
    "the allele is symbolic or a breakend",
    "the allele is *, the place of another record's deletion",
    "an allele has letters other than A, C, G, T",
    "REF and ALT are the same",
    "it lies beyond the end of its chromosome",
    "an allele is longer than a quarter of what the model predicts",
    "the chromosome is shorter than a quarter of the model's window",
    "the FASTA has an unknown base there",
    "REF does not match the FASTA",
    "the alleles are swapped: ALT matches the FASTA, REF does not",
    "it stands in the file before",
    "the model scores single-base substitutions only",
)
_SCORED, _CHROM, _NONE, _SYMBOLIC, _STAR, _LETTERS, _SAME = range(7)
_BEYOND, _LONG, _SHORT, _UNKNOWN, _MISMATCH, _SWAPPED, _DUPLICATE, _NO_SNV = range(7, 15)


@dataclass(frozen=True, slots=True)
class Checked:
    """A variant that will be scored, with its alleles in upper case and its chromosome named as in the FASTA.

    Attributes:
        row: number of its record in the file, from 1.
        allele: number of its ALT in the record, from 1.
        name: the chromosome as the file writes it.
    """

    row: int
    allele: int
    variant: Variant
    name: str


@dataclass(frozen=True)
class AlleleCheck:
    """What stands in the way of scoring one variant.

    Attributes:
        genome: of the model.
        window: bp that the model sees.
        target: bp that it predicts; an allele may have a quarter of them.
        rename: chromosome in the VCF -> name in the FASTA.
        single: only substitutions of one base can be scored.
    """

    genome: Genome
    window: int
    target: int
    rename: Mapping[str, str]
    single: bool = False

    def contigs(self) -> dict[str, Codes]:
        """Base codes of all contigs by name; views of the memory map."""
        return {chrom: self.genome.chrom_codes(chrom).view(np.ndarray) for chrom in self.genome.chroms}

    def named(self, variant: Variant) -> Variant:
        """The variant as the FASTA names its chromosome, in upper case."""
        chrom = self.rename.get(variant.chrom, variant.chrom)
        ref, alt = variant.ref.upper(), variant.alt.upper()
        if (chrom, ref, alt) == (variant.chrom, variant.ref, variant.alt):
            return variant
        return replace(variant, chrom=chrom, ref=ref, alt=alt)

    def reason(self, variant: Variant, contigs: Mapping[str, Codes]) -> int:
        """Which of ``REASONS`` holds for a variant as the FASTA names it (repeats are seen by their file alone)."""
        contig, ref, alt = contigs.get(variant.chrom), variant.ref, variant.alt
        if contig is None:
            return _CHROM
        if alt in (".", ""):
            return _NONE
        if alt == "*":
            return _STAR
        if alt[0] in "<." or alt[-1] == "." or "[" in alt or "]" in alt:
            return _SYMBOLIC
        if not ref or set(ref) - _BASES or set(alt) - _BASES:
            return _LETTERS
        if ref == alt:
            return _SAME
        start = variant.position - 1
        if start < 0 or start + len(ref) > len(contig):
            return _BEYOND
        if 4 * max(len(ref), len(alt)) > self.target:
            return _LONG
        if 4 * len(contig) < self.window:
            return _SHORT
        if self.single and (len(ref), len(alt)) != (1, 1):
            return _NO_SNV
        found = contig[start : start + len(ref)]
        if len(ref) == 1:
            if found[0] == _CODE[ref]:
                return _SCORED
        elif np.array_equal(found, encode(ref)):
            return _SCORED
        if (found == N).any():
            return _UNKNOWN
        swapped = np.array_equal(contig[start : start + len(alt)], encode(alt))
        return _SWAPPED if swapped else _MISMATCH


_BASES = frozenset("ACGT")
_CODE = {letter: code for code, letter in enumerate("ACGT")}


@dataclass(frozen=True)
class CheckedFile:
    """A VCF whose variants were all looked at.

    Attributes:
        path: the file.
        check: what was asked of each.
        reasons: uint8 ``(variants,)``, one per ALT in file order: position in ``REASONS``, 0 where it is scored.
        records: how many records the file has.
    """

    path: Path
    check: AlleleCheck
    reasons: npt.NDArray[np.uint8]
    records: int

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> how many variants are skipped for it."""
        return _counted(self.reasons)

    def rows_of(self, shard: tuple[int, int]) -> tuple[int, int]:
        """The records ``[first, last)``, from 1, of shard ``i`` of ``n``: stretches of about equal length."""
        number, shards = shard
        return self.records * (number - 1) // shards + 1, self.records * number // shards + 1

    def variants(self, rows: tuple[int, int] | None = None) -> Iterator[Checked]:
        """The variants that are scored, in file order; with ``rows`` of the records ``[first, last)`` only."""
        first, last = rows or (1, self.records + 1)
        for reason, (row, allele, variant) in zip(self.reasons, read_vcf_rows(self.path), strict=True):
            if row >= last:
                return
            if row >= first and reason == _SCORED:
                yield Checked(row, allele, self.check.named(variant), variant.chrom)

    def count(self, rows: tuple[int, int]) -> int:
        """How many variants of the records ``[first, last)`` are scored."""
        if rows == (1, self.records + 1):
            return int(np.count_nonzero(self.reasons == _SCORED))
        return sum(1 for _ in self.variants(rows))

    def write_skipped(self, path: Path, rows: tuple[int, int] | None = None) -> None:
        """Writes row, variant and reason of every skipped variant, tab separated, by rename.

        Raises:
            RunError: it cannot be written.
        """
        first, last = rows or (1, self.records + 1)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("w") as file:
                file.write("row\tchrom\tposition\tref\talt\tid\treason\n")
                pairs = zip(self.reasons, read_vcf_rows(self.path), strict=True) if self.reasons.any() else ()
                for reason, (row, _, v) in pairs:
                    if reason and first <= row < last:
                        text = REASONS[reason]
                        file.write(f"{row}\t{v.chrom}\t{v.position}\t{v.ref}\t{v.alt}\t{v.id}\t{text}\n")
            os.replace(part, path)
        except OSError as error:
            remedy = "Free some disk space or choose a folder that you can write to"
            what = f"the list of skipped variants could not be written ({error.strerror or error})"
            raise RunError(what, str(path), remedy=remedy) from error
        finally:
            part.unlink(missing_ok=True)


def check_vcf(path: Path, check: AlleleCheck, skipped: Path, *, allow_skipped: bool = False) -> CheckedFile:
    """Looks at every variant of a file; memory grows by 17 bytes per variant.

    Args:
        path: VCF or BCF, plain or compressed.
        skipped: where the skipped variants are listed, also when the file is refused for them.
        allow_skipped: score the rest, however many are skipped.

    Raises:
        DataError: no variants; chromosome names or REF alleles of another assembly; more than 1 % of the variants
            cannot be scored.
        RunError: the list cannot be written.
    """
    contigs = check.contigs()
    reasons, digests, unknown, records = bytearray(), bytearray(), Counter[str](), 0
    for row, _, written in read_vcf_rows(path):
        variant = check.named(written)
        reason = check.reason(variant, contigs)
        if reason == _CHROM:
            unknown[written.chrom] += 1
        text = f"{variant.chrom}\t{variant.position}\t{variant.ref}\t{variant.alt}"
        digests += hashlib.blake2b(text.encode(), digest_size=16).digest()
        reasons.append(reason)
        records = row
    if not reasons:
        raise DataError("the VCF has no variants", where=path, remedy="Check that it is not empty or only a header")
    found = np.frombuffer(bytes(reasons), dtype=np.uint8).copy()
    _diagnose(path, check, found, unknown)
    repeated = _repeats(np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2))
    found[repeated & (found == _SCORED)] = _DUPLICATE
    checked = CheckedFile(path, check, found, records)
    checked.write_skipped(skipped)
    count = int(np.count_nonzero(found))
    if count == len(found) or (count > MAX_SKIPPED * len(found) and not allow_skipped):
        reasons_in_words = "; ".join(f"{number}: {reason}" for reason, number in checked.skipped.items())
        many = "none of its variants" if count == len(found) else f"only {len(found) - count} of {len(found)} variants"
        remedy = f"They are listed in {skipped}; correct the file" + (
            "" if count == len(found) else ", or set allow_skipped: true"
        )
        raise DataError(f"{many} can be scored ({reasons_in_words})", where=path, remedy=remedy)
    return checked


def _counted(reasons: npt.NDArray[np.uint8]) -> dict[str, int]:
    counts = np.bincount(reasons, minlength=len(REASONS))
    return {REASONS[i]: int(counts[i]) for i in range(1, len(REASONS)) if counts[i]}


def _repeats(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether each row of ``(n, 2)`` is equal to an earlier one."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the first of equals comes first
    same = np.concatenate([[False], (digests[order][1:] == digests[order][:-1]).all(axis=1)])
    repeated = np.zeros(len(digests), dtype=np.bool_)
    repeated[order] = same
    return repeated


def _diagnose(path: Path, check: AlleleCheck, reasons: npt.NDArray[np.uint8], unknown: Counter[str]) -> None:
    """What is wrong with the file as a whole: chromosome names, assembly, the order of the alleles."""
    if 2 * sum(unknown.values()) > len(reasons):
        names = [name for name, _ in unknown.most_common()]
        twins = [n for n in names if {n.removeprefix("chr"), f"chr{n}"} & check.genome.chroms.keys()]
        match_chroms(twins[:1] or names, check.genome, path)
    compared = np.isin(reasons, (_SCORED, _MISMATCH, _SWAPPED))
    wrong, swapped = (int(np.isin(reasons, of).sum()) for of in ((_MISMATCH, _SWAPPED), (_SWAPPED,)))
    check_assembly(path, check.genome, int(compared.sum()), wrong, swapped)
