"""Places of a genome: tiles, spans read from BED files, and the bins that they cover."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.errors import DataError, Problems
from seqgraft.genome import Genome, match_chroms, read_bed_table
from seqgraft.tracks import coarsen

__all__ = ["Spans", "covered_bins", "overlapping", "read_placed_bed", "read_spans", "tile_regions"]

EDGE_SHARE = 0.1  # a bin with less of it covered does not count, as in Baskerville

#: contig -> ``(spans, 2)``: disjoint starts and ends, left to right.
Spans = Mapping[str, npt.NDArray[np.int64]]


def tile_regions(
    genome: Genome, length: int, stride: int, exclude: Sequence[str] = (), gaps: Spans | None = None
) -> pd.DataFrame:
    """Regions ``chrom, start, end`` of ``length`` bp inside the contigs and outside the gaps, left to right."""
    rows = []
    for chrom, size in genome.chroms.items():
        if chrom in exclude:
            continue
        edges = [(0, 0), *(gaps or {}).get(chrom, np.empty((0, 2), dtype=np.int64)).tolist(), (size, size)]
        for (_, left), (right, _) in itertools.pairwise(edges):
            rows += [(chrom, start, start + length) for start in range(left, min(right, size) - length + 1, stride)]
    return pd.DataFrame(rows, columns=["chrom", "start", "end"])


def read_placed_bed(path: Path, genome: Genome, rename: Mapping[str, str]) -> pd.DataFrame:
    """A BED file with its contigs renamed to those of the genome.

    Raises:
        DataError: not a BED file, or intervals that reach beyond the end of their contig, all at once.
    """
    table = read_bed_table(path)
    table["chrom"] = table["chrom"].replace(dict(rename))
    problems = Problems(DataError)
    size = table["chrom"].map(genome.chroms)
    for chrom, start, end in table.loc[table["end"] > size, ["chrom", "start", "end"]].itertuples(
        index=False, name=None
    ):
        what = f"the interval reaches beyond the end of its contig ({genome.chroms[chrom]} bp)"
        remedy = "Use a BED file of the same assembly as the FASTA"
        problems.add(what, f"{chrom}:{start}-{end}", where=path, remedy=remedy)
    problems.raise_if_any()
    return table


def read_spans(path: Path | None, genome: Genome, rename: Mapping[str, str], margin: int = 0) -> Spans:
    """The merged intervals of a BED file, each grown by a margin; nothing if there is no file.

    Contigs that the genome does not have are passed over.

    Raises:
        DataError: as :func:`read_placed_bed`, or all contigs are unknown, or only "chr" is in the way of some.
    """
    if path is None:
        return {}
    table = read_placed_bed(path, genome, rename)
    match_chroms(sorted(set(table["chrom"])), genome, path, more=True)
    spans = {}
    for chrom, rows in table.groupby("chrom", sort=False):
        merged: list[list[int]] = []
        for start, end in rows[["start", "end"]].sort_values("start").itertuples(index=False, name=None):
            if merged and start - margin <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end + margin)
            else:
                merged.append([start - margin, end + margin])
        spans[str(chrom)] = np.array(merged, dtype=np.int64)
    return spans


def overlapping(spans: Spans, chrom: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of the spans within ``start..end``, relative to ``start``."""
    found = spans.get(chrom)
    if found is None:
        return
    first, last = np.searchsorted(found[:, 1], start, "right"), np.searchsorted(found[:, 0], end, "left")
    for left, right in found[first:last].tolist():
        yield max(left, start) - start, min(right, end) - start


def covered_bins(regions: pd.DataFrame, spans: Spans, bin_size: int) -> npt.NDArray[np.bool_]:
    """Which bins ``(regions, bins)`` of regions of one length are covered, by a tenth or more, by spans."""
    length = int(regions["end"].iloc[0] - regions["start"].iloc[0])
    found = np.zeros((len(regions), length // bin_size), dtype=bool)
    for row, (chrom, start, end) in enumerate(regions[["chrom", "start", "end"]].itertuples(index=False, name=None)):
        bases = np.zeros(length, dtype=bool)
        for left, right in overlapping(spans, chrom, start, end):
            bases[left:right] = True
        found[row] = coarsen(bases, bin_size) >= EDGE_SHARE * bin_size
    return found
