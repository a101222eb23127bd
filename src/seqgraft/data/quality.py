"""What pseudobulk tracks are worth: depth, enrichment at transcription starts, split halves of cells, soft clips."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.pseudobulk import UNITS, Layout, Tally
from seqgraft.data.spill import Marks
from seqgraft.genome import match_chroms, read_gtf
from seqgraft.intervals import spearman_brown
from seqgraft.tracks import TrackTable, squash

__all__ = ["QC_COLUMNS", "SHALLOW", "Quality", "TssSites", "new_qualities", "quality_table", "tss_sites"]

FLANK = 2000  # bp on either side of a transcription start
EDGE = 100  # bp at either end whose mean is the background
CENTRE = 10  # bp on either side of the start that are averaged
CLIP_QUANTILE = 0.999  # of the bins that are not zero
SHALLOW = 0.25  # a track of less reliability is mostly noise
LARGEST = 1 << 20  # bins above it count as it does, for the quantile

QC_COLUMNS = (
    *("track", "assay", "group", "unit", "cells", "fragments", "fragments_per_cell", "depth", "tss_enrichment"),
    *("split_half", "reliability", "ceiling", "soft_clip", "shallow"),
)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
#: Chromosome -> positions of transcription starts, sorted, and whether each is on the minus strand.
TssSites = Mapping[str, tuple[Ints, npt.NDArray[np.bool_]]]


def tss_sites(gtf: Path, rename: Mapping[str, str], lengths: Mapping[str, int]) -> TssSites:
    """The 5' ends of all transcripts of a GTF, each place and strand once.

    Raises:
        DataError: as ``read_gtf``, or its chromosomes are not those of the genome.
    """
    exons = read_gtf(gtf, rename=rename)
    match_chroms(exons["chrom"].unique(), lengths, gtf, more=True)
    ends = exons.groupby(["chrom", "strand", "gene_id", "transcript_id"], sort=False).agg(
        {"start": "min", "end": "max"}
    )
    ends = ends.reset_index()
    minus = (ends["strand"] == "-").to_numpy()
    sites = ends.assign(minus=minus, site=np.where(minus, ends["end"] - 1, ends["start"]))
    found = {}
    for chrom, rows in sites.drop_duplicates(["chrom", "site", "minus"]).sort_values("site").groupby("chrom"):
        found[str(chrom)] = rows["site"].to_numpy(np.int64), rows["minus"].to_numpy(bool)
    return found


@dataclass
class Quality:
    """What is gathered of one track, stretch by stretch.

    Attributes:
        tracks: the table of this track alone.
        moments: number, sums, squares and product of the squashed bins of both halves, by region ``(regions, 6)``.
        depths: of each half.
        values: how often each raw bin above zero occurs, ``(LARGEST + 1,)``, shared by the tracks of an assay.
        profile: marks by distance to the nearest starts, ``(2 * FLANK,)``.
    """

    tracks: TrackTable
    moments: Floats
    values: Ints
    depths: list[float] = field(default_factory=lambda: [0.0, 0.0])
    profile: Ints = field(default_factory=lambda: np.zeros(2 * FLANK, np.int64))

    def add_bins(self, rows: Ints, halves: Sequence[Floats], usable: npt.NDArray[np.bool_], bin_size: int) -> None:
        """Raw bins ``(rows, bins)`` of each half; ``usable`` says which of them may be compared."""
        a, b = halves
        some = usable & (a + b > 0)  # zeros stay zeros, and add to the number alone
        row, a, b = np.nonzero(some)[0], a[some], b[some]
        counts = np.bincount(np.minimum(a + b, LARGEST).astype(np.int64))
        self.values[: len(counts)] += counts
        a, b = (np.asarray(squash(half[None], self.tracks, bin_size))[0] for half in (a, b))
        sums = [np.bincount(row, part, minlength=len(rows)) for part in (a, b, a * a, b * b, a * b)]
        self.moments[rows] = np.stack([usable.sum(axis=1), *sums], axis=1)

    def add_marks(self, pieces: Iterable[Marks], sites: tuple[Ints, npt.NDArray[np.bool_]]) -> None:
        """Marks of one chromosome around its transcription starts; of spans, both ends."""
        position, minus = sites
        for marks in pieces:
            points = marks if marks.ndim == 1 else np.concatenate([marks[:, 0], marks[:, 1] - 1])
            points = np.sort(points).astype(np.int64)
            first, last = np.searchsorted(points, position - FLANK), np.searchsorted(points, position + FLANK, "right")
            count = last - first
            place = np.repeat(first - np.concatenate([[0], np.cumsum(count)[:-1]]), count) + np.arange(count.sum())
            distance = points[place] - np.repeat(position, count)
            distance = np.where(np.repeat(minus, count), -distance, distance) + FLANK
            distance = distance[(distance >= 0) & (distance < 2 * FLANK)]
            self.profile += np.bincount(distance, minlength=2 * FLANK)

    def split_half(self, regions: npt.NDArray[np.bool_]) -> tuple[float, float]:
        """Pearson between the halves over the bins of some regions, and the reliability of both together."""
        n, a, b, aa, bb, ab = self.moments[regions].sum(axis=0)
        if n < 2 or min(n * aa - a * a, n * bb - b * b) <= 0 or min(self.depths) <= 0:
            return float("nan"), float("nan")
        r = float((n * ab - a * b) / np.sqrt((n * aa - a * a) * (n * bb - b * b)))
        return r, spearman_brown(r, (self.depths[0], self.depths[1]))

    @property
    def tss_enrichment(self) -> float:
        """Signal at transcription starts over that at 1,900 to 2,000 bp from them; NaN where there is none.

        ENCODE's (encodeproject.org/data-standards/terms, "Transcription Start Site (TSS) Enrichment"): the aggregate
        over all starts, 2,000 bp to either side, divided by the mean of the 100 bp at either end, at its centre; here
        the mean of the central 20 bp, because one base of a small group is noise.
        """
        background = (self.profile[:EDGE].sum() + self.profile[-EDGE:].sum()) / (2 * EDGE)
        centre = self.profile[FLANK - CENTRE : FLANK + CENTRE].mean()
        return float(centre / background) if background else float("nan")


def suggested_clip(values: Ints, tracks: TrackTable, bin_size: int) -> float:
    """The 99.9th percentile of the bins that are not zero, on the model's scale without clips; NaN if all are zero."""
    if not values.any():
        return float("nan")
    raw = int(np.searchsorted(np.cumsum(values), CLIP_QUANTILE * values.sum()))
    plain = tracks.replace(soft_clip=np.nan, clip=np.nan)
    return float(squash(np.full((1, 1), float(raw)), plain, bin_size)[0, 0])


def quality_table(
    layout: Layout, names: Sequence[str], tallies: Sequence[Tally], qualities: Sequence[Quality], bin_size: int
) -> pd.DataFrame:
    """One row per track, with the columns ``QC_COLUMNS``; NaN where nothing can be said.

    ``split_half`` is the Pearson correlation, over all bins and on the model's scale, between two random halves of the
    group's cells; ``reliability`` its Spearman-Brown correction, the expected correlation with an equal experiment;
    ``ceiling`` the root of that, the highest Pearson that a prediction without noise could have. ``shallow`` tracks
    have a reliability below 0.25, or none. ``soft_clip`` is a suggestion, the same for all tracks of an assay.
    """
    rows: list[dict[str, Any]] = []
    for assay, tally in zip(layout.assays, tallies, strict=True):
        positions = layout.positions(assay)
        clip = suggested_clip(qualities[positions[0]].values, qualities[positions[0]].tracks, bin_size)
        for number, position in enumerate(positions):
            group = number // len(assay.strands)
            found, quality = _cells(tally, group), qualities[position]
            r, reliability = quality.split_half(np.ones(len(quality.moments), dtype=bool))
            enrichment = quality.tss_enrichment if len(assay.strands) == 1 else float("nan")
            shallow = not reliability >= SHALLOW
            counted = (int(found.size), int(tally.fragments[number]), float(np.median(found)) if found.size else 0.0)
            scores = (sum(quality.depths), enrichment, r, reliability, float(np.sqrt(reliability)), clip, shallow)
            row = (names[position], assay.name, layout.groups[group], UNITS[assay.count], *counted, *scores)
            rows.append(dict(zip(QC_COLUMNS, row, strict=True)))
    return pd.DataFrame(rows)


def _cells(tally: Tally, group: int) -> Ints:
    """Fragments of each cell of a group that has some."""
    counts = np.concatenate([counts[groups == group] for groups, counts in tally.per_cell])
    return counts[counts > 0]


def new_qualities(layout: Layout, tracks: TrackTable, regions: int) -> list[Quality]:
    """Empty ones for all tracks, in their order."""
    found = []
    for assay in layout.assays:
        values = np.zeros(LARGEST + 1, np.int64)
        for position in layout.positions(assay):
            alone = TrackTable.of(tracks.frame.iloc[[position]].assign(strand_pair=tracks.names[position]))
            found.append(Quality(alone, np.zeros((regions, 6)), values))
    return found
