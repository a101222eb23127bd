"""Donors of a prepared dataset: the sequences that their haplotypes have around genes, each distinct one once.

::

    NAME/
      genes.parquet       gene, chrom, tss (0-based), strand, fold, and what turns targets back into expression
      donors.parquet      donor, fold, and the columns of the table of donors
      sequences.parquet   one row per distinct sequence: gene, and a donor and slot that have it
      haplotypes.npy      int32 (genes, donors, ploidy): which sequence each haplotype is, -1 where there is none
      variants.parquet    position, ref_length, alt_start, trim_left, trim_right of every variant; alt_codes.npy
      alleles.npy         the bits of ``Genotypes``; ploidy.npy; genotypes.json

Sequences are built when they are asked for. They are distinct in the window and ``MARGIN`` bp more on both sides, so
that shifts, up to that, show the same ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.augment import View
from seqgraft.data.genotypes import GenotypeReport, Genotypes, Numbers
from seqgraft.data.haplotypes import Haplotypes
from seqgraft.errors import ConfigError
from seqgraft.genome import Genome, Interval
from seqgraft.sequence import Codes, reverse_complement

__all__ = ["MARGIN", "MEAN", "Arranged", "Donors", "find_sequences", "open_donors", "save_donors", "shown"]

#: bp of shift that a stored sequence allows on both sides.
MARGIN = 16
#: The track, and its group, of what genes are expressed on average, beside "expression", how donors differ from that.
MEAN = "mean"


@dataclass(frozen=True)
class Arranged:
    """The distinct sequences of a batch.

    Attributes:
        sequences: int64 ``(sequences,)``, which stored ones.
        views: of each.
        haplotypes: int64 ``(rows, ploidy)``, which of them each example's haplotypes are; -1: none.
    """

    sequences: Numbers
    views: tuple[View, ...]
    haplotypes: Numbers


@dataclass(frozen=True)
class Donors:
    """See the module. Rows of a dataset, in its order, are pairs of ``gene`` and ``donor``, int ``(rows,)``."""

    genome: Genome
    genotypes: Genotypes
    genes: pd.DataFrame
    donors: pd.DataFrame
    sequences: pd.DataFrame
    haplotypes: npt.NDArray[np.int32]
    gene: Numbers
    donor: Numbers
    window: int

    @cached_property
    def _built(self) -> Haplotypes:
        return Haplotypes(self.genome, self.genotypes)

    @cached_property
    def _owners(self) -> tuple[Numbers, Numbers]:
        """The gene of each sequence, and the pair of donor and slot that has it."""
        table = self.sequences
        return table["gene"].to_numpy(np.int64), table[["donor", "slot"]].to_numpy(np.int64)

    def arrange(self, rows: Numbers, views: Sequence[View]) -> Arranged:
        """The sequences that examples need, in their views, each once; they stand in the order of the store."""
        found = self.haplotypes_of(rows)
        known = list(dict.fromkeys(views))
        keys = found * len(known) + np.array([known.index(view) for view in views], dtype=np.int64)[:, None]
        there = found >= 0
        distinct, place = np.unique(keys[there], return_inverse=True)
        haplotypes = np.full(found.shape, -1, dtype=np.int64)
        haplotypes[there] = place
        return Arranged(distinct // len(known), tuple(known[i] for i in distinct % len(known)), haplotypes)

    def codes(self, sequences: Numbers, views: Sequence[View], window: int | None = None) -> Codes:
        """Base codes ``(sequences, window)`` around the transcription starts, on the forward strand of the genome.

        A view's shift moves the window to the right; its other strand is the reverse complement.

        Raises:
            ConfigError: a shift beyond ``MARGIN``, or another window than the dataset's.
        """
        length = window or self.window
        if length > self.window:
            what, remedy = "donors have no sequence beyond the window of the dataset", f"Use {self.window} bp at most"
            raise ConfigError(what, length, remedy=remedy)
        genes, owners = self._owners
        out = np.empty((len(sequences), length), dtype=np.uint8)
        known = list(dict.fromkeys(views))
        view_of = np.array([known.index(view) for view in views], dtype=np.int64)
        of_gene = genes[sequences]
        for gene in np.unique(of_gene):
            here = np.flatnonzero(of_gene == gene)
            chrom, tss = self._starts[gene]
            wide = self._built.codes(chrom, tss, self.window + 2 * MARGIN, owners[sequences[here]])
            for number in np.unique(view_of[here]):
                some = view_of[here] == number
                out[here[some]] = shown(wide[some], known[number], length)
        return out

    def alone(self, gene: int, variants: Numbers | None = None) -> Codes:
        """The reference around a gene with one alternate allele each, and last the reference itself.

        Args:
            variants: which of the gene's window, in the order of ``dosage``; None for all.

        Returns:
            Base codes ``(variants + 1, window + 2 MARGIN)``; ``shown`` cuts the window of a view out of them.
        """
        chrom, tss = self._starts[gene]
        rows = self.genotypes.rows(self._interval(gene))
        chosen = np.arange(len(rows)) if variants is None else variants
        made = Haplotypes(self.genome, self.genotypes.singly(chrom, rows))
        donors = np.append(chosen, len(rows))
        return made.codes(chrom, tss, self.window + 2 * MARGIN, np.stack([donors, 0 * donors], axis=1))

    @cached_property
    def _starts(self) -> list[tuple[str, int]]:
        """Contig and transcription start of each gene."""
        return list(zip(self.genes["chrom"].tolist(), self.genes["tss"].tolist(), strict=True))

    def _interval(self, gene: int) -> Interval:
        chrom, tss = self._starts[gene]
        return Interval(chrom, tss - self.window // 2, tss - self.window // 2 + self.window)

    def dosage(self, gene: int) -> tuple[npt.NDArray[np.uint8], Numbers]:
        """Alternate alleles ``(donors, variants)`` of the variants in a gene's window; their rows in ``genotypes``."""
        return self.genotypes.dosage(self._interval(gene))

    def ploidy_of(self, gene: int) -> Numbers:
        """Haplotypes of each donor on a gene's contig, int64 ``(donors,)``."""
        return self.genotypes.ploidy_on(self._starts[gene][0]).astype(np.int64)

    @cached_property
    def identity(self) -> str:
        """Names every sequence that is stored."""
        variants = self.genotypes
        facts = [self.genome.hash, self.window, variants.encoding, variants.contigs]
        digest = hashlib.sha256(f"donors {facts}\n".encode())
        for table in (self.sequences, self.genes[["chrom", "tss"]]):
            digest.update(table.to_csv().encode())
        alleles = variants.alt_start, variants.alt_codes, variants.trim
        for array in (variants.bits, variants.position, variants.ref_length, *alleles):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def ploidy(self) -> int:
        """The most haplotypes that a donor has anywhere."""
        return int(self.genotypes.ploidy.max())

    def of_rows(self, rows: Numbers) -> Numbers:
        """The distinct sequences of examples, in order."""
        found = np.unique(self.haplotypes_of(rows))
        return found[found >= 0]

    def haplotypes_of(self, rows: Numbers) -> Numbers:
        """Which sequences an example's haplotypes are, int64 ``(rows, ploidy)``; -1: none."""
        return np.asarray(self.haplotypes[self.gene[rows], self.donor[rows]], dtype=np.int64)


def shown(wide: Codes, view: View, window: int) -> Codes:
    """What a view shows of sequences ``(n, window + 2 MARGIN)`` around an anchor: ``(n, window)``.

    Raises:
        ConfigError: a shift beyond ``MARGIN``.
    """
    if abs(view.shift) > MARGIN:
        what, remedy = f"sequences of donors can be shifted by {MARGIN} bp at most", "Use a smaller shift"
        raise ConfigError(what, view.shift, where="train.augment or evaluate.ensemble", remedy=remedy)
    start = wide.shape[1] // 2 - window // 2 + view.shift
    cut = wide[:, start : start + window]  # a slice: an index of single bases would cost more than building them
    return np.ascontiguousarray(reverse_complement(cut) if view.reverse else cut)


def find_sequences(
    genome: Genome, genotypes: Genotypes, genes: pd.DataFrame, window: int
) -> tuple[pd.DataFrame, npt.NDArray[np.int32]]:
    """The table of distinct sequences, and which of them each haplotype is, int32 ``(genes, donors, ploidy)``.

    Args:
        genes: with ``chrom`` and ``tss`` (0-based).

    Raises:
        DataError: a start beyond its contig, or a contig without variants.
    """
    made = Haplotypes(genome, genotypes)
    found, tables, count = [], [], 0
    for gene, (chrom, tss) in enumerate(zip(genes["chrom"], genes["tss"], strict=True)):
        codes, index = made.distinct(chrom, int(tss), window + 2 * MARGIN)
        flat = index.ravel()
        _, first = np.unique(flat, return_index=True)
        owners = np.column_stack(np.unravel_index(first[flat[first] >= 0], index.shape))
        tables.append(pd.DataFrame({"gene": gene, "donor": owners[:, 0], "slot": owners[:, 1]}))
        found.append(np.where(index >= 0, index + count, -1))
        count += len(codes)
    most = max(index.shape[1] for index in found)
    padded = [np.pad(index, ((0, 0), (0, most - index.shape[1])), constant_values=-1) for index in found]
    return pd.concat(tables, ignore_index=True), np.stack(padded).astype(np.int32)


_ARRAYS = ("alleles", "ploidy", "alt_codes", "haplotypes")
_TABLES = ("genes", "donors", "sequences", "variants")


def save_donors(
    folder: Path,
    genotypes: Genotypes,
    genes: pd.DataFrame,
    donors: pd.DataFrame,
    sequences: pd.DataFrame,
    haplotypes: npt.NDArray[np.int32],
) -> None:
    """Writes the files beside those of a dataset."""
    variants = pd.DataFrame(
        {
            "position": genotypes.position,
            "ref_length": genotypes.ref_length,
            "alt_start": genotypes.alt_start[:-1],
            "trim_left": genotypes.trim[:, 0],
            "trim_right": genotypes.trim[:, 1],
        }
    )
    tables = {"genes": genes, "donors": donors, "sequences": sequences, "variants": variants}
    for name, table in tables.items():
        table.reset_index(drop=True).to_parquet(folder / f"{name}.parquet")
    arrays: dict[str, npt.NDArray[Any]] = {
        "alleles": genotypes.bits,
        "ploidy": genotypes.ploidy,
        "alt_codes": np.asarray(genotypes.alt_codes),
        "haplotypes": haplotypes,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    about = {
        "contigs": {name: list(span) for name, span in genotypes.contigs.items()},
        "encoding": genotypes.encoding,
        "genome": genotypes.genome,
        "report": asdict(genotypes.report),
    }
    (folder / "genotypes.json").write_text(json.dumps(about, indent=2) + "\n")


def open_donors(folder: Path, genome: Genome, gene: Numbers, donor: Numbers, window: int) -> Donors:
    """Reads what ``save_donors`` wrote; arrays are memory-mapped.

    Raises:
        OSError, ValueError, KeyError: a part is missing or damaged.
    """
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in _TABLES}
    about = json.loads((folder / "genotypes.json").read_text())
    variants = tables["variants"]
    report = about["report"]
    ploidy = {contig: {int(n): m for n, m in counts.items()} for contig, counts in report["ploidy"].items()}
    left_out = {name: tuple(report[name]) for name in ("only_in_file", "only_asked")}
    genotypes = Genotypes(
        donors=tuple(tables["donors"]["donor"]),
        contigs={name: (int(span[0]), int(span[1])) for name, span in about["contigs"].items()},
        ploidy=arrays["ploidy"],
        position=variants["position"].to_numpy(np.int64),
        ref_length=variants["ref_length"].to_numpy(np.int32),
        alt_start=np.append(variants["alt_start"].to_numpy(np.int64), len(arrays["alt_codes"])),
        alt_codes=np.asarray(arrays["alt_codes"]),
        trim=variants[["trim_left", "trim_right"]].to_numpy(np.int32),
        bits=arrays["alleles"],
        encoding=about["encoding"],
        genome=about["genome"],
        report=GenotypeReport(**{**report, "ploidy": ploidy, **left_out}),
    )
    return Donors(
        genome,
        genotypes,
        tables["genes"],
        tables["donors"],
        tables["sequences"],
        arrays["haplotypes"],
        gene,
        donor,
        window,
    )
