"""Peaks: windows around the peaks of a narrowPeak or BED file, and negatives drawn to match them.

A negative lies on the same chromosome as its peak, at least ``distance`` bp away from every peak and off ``exclude``,
overlaps no other negative, and falls into the same bin of GC content, of unknown bases and, where ``repeats`` are
given, of the share of the window that they cover. So a classifier cannot win by composition alone.
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from seqgraft.data.dataset import Dataset, DatasetInfo, hash_file, open_dataset, write_dataset
from seqgraft.data.duplicates import (
    DuplicatePolicy,
    copied_rows,
    duplicate_links,
    find_duplicates,
    resolve_duplicates,
)
from seqgraft.data.folds import FoldPlaces, Folds, assign_folds
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.genome import Genome, match_chroms, read_bed_table
from seqgraft.progress import progress
from seqgraft.tracks import TrackTable

__all__ = ["PeakSource", "prepare_peaks"]

GC_BIN = 0.02
UNKNOWN_BIN = 0.05
REPEAT_BIN = 0.1
_DRAWS = 50  # candidates per missing negative and round
_ROUNDS = 20
_BATCH = 1 << 22  # bases looked at at once


@dataclass(frozen=True, slots=True)
class PeakSource:
    """Where peaks come from.

    Windows of ``window`` bp are centred on the summit (column 10 of narrowPeak) or on the middle of the interval.
    ``ratio`` negatives are drawn per peak. ``distance`` is what must lie between a negative's window and a peak.
    ``repeats`` and ``exclude`` are BED files. More than the share ``max_skipped`` of windows that reach beyond their
    chromosome, or of negatives that cannot be found, is an error. ``name`` is that of the track: 1 for a peak.
    """

    peaks: Path
    genome: Path
    window: int
    folds: Folds
    name: str = "peak"
    ratio: float = 1.0
    distance: int = 0
    repeats: Path | None = None
    exclude: Path | None = None
    rename: dict[str, str] = field(default_factory=dict)
    duplicates: DuplicatePolicy = "refuse"
    max_skipped: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems(ConfigError)
        if self.window < 1:
            problems.add("the length is not positive", self.window, where="window", remedy="Give base pairs, 1 or more")
        if not self.ratio > 0:
            problems.add("no negatives would be drawn", self.ratio, where="ratio", remedy="Give negatives per peak")
        if self.distance < 0:
            problems.add("the distance is negative", self.distance, where="distance", remedy="Give base pairs")
        if not 0 <= self.max_skipped < 1:
            remedy = "Give a number from 0 to 1, as in 0.01"
            problems.add("this is not a share", self.max_skipped, where="max_skipped", remedy=remedy)
        problems.raise_if_any()


def prepare_peaks(source: PeakSource, folder: Path) -> Dataset:
    """Read peaks, draw negatives, audit for duplicates and write a prepared dataset of genome regions.

    Raises:
        DataError: chromosomes that the genome lacks, too few windows or negatives, folds that overlap, or copies across
            folds.
    """
    folder = Path(folder)
    genome = Genome.open(source.genome)
    peaks = _read_peaks(source, genome)
    windows, skipped = _windows(peaks, source, genome)
    negatives, missing = _draw_negatives(windows, peaks, source, genome)
    regions = pd.concat([windows.assign(label=1.0), negatives.assign(label=0.0)], ignore_index=True)
    views = [genome.chrom_codes(chrom)[start:end] for chrom, start, end in _places(regions)]
    links = duplicate_links(views) if source.duplicates == "group" else None
    places = FoldPlaces(genome, rename=source.rename)
    regions["fold"] = assign_folds(regions, source.folds, together=links, places=places)
    report = find_duplicates(views, regions["fold"])
    names = [
        f"{name} {chrom}:{start}-{end}"
        for name, (chrom, start, end) in zip(regions["name"], _places(regions), strict=True)
    ]
    listing = folder.with_name(f"{folder.name}.duplicates.tsv")
    kept = resolve_duplicates(report, source.duplicates, len(regions), names, listing)
    regions = regions[kept].assign(copied=copied_rows(report, kept)).reset_index(drop=True)
    files = [path for path in (source.peaks, source.repeats, source.exclude) if path is not None]
    info = DatasetInfo(
        kind="labelled",
        window=source.window,
        bins=1,
        bin_size=source.window,
        genome={"path": str(genome.path), "hash": genome.hash},
        sources=[hash_file(path) for path in files],
        settings={"kind": "peaks", **asdict(source)},
        notes={
            "skipped": skipped,
            "negatives_not_found": missing,
            "duplicates": report.summary(),
            "duplicates_dropped": int((~kept).sum()),
            **places.notes,
        },
    )
    tracks = TrackTable.build(
        [{"name": source.name, "group": source.name, "link": "sigmoid", "strand_pair": source.name}]
    )
    with write_dataset(folder, (len(regions), 1, 1)) as writer:
        writer.targets[:, 0, 0] = regions.pop("label")
        writer.finish(info, regions, tracks)
    return open_dataset(folder)


def _places(table: pd.DataFrame) -> list[tuple[str, int, int]]:
    return list(zip(table["chrom"].tolist(), table["start"].tolist(), table["end"].tolist(), strict=True))


def _read_peaks(source: PeakSource, genome: Genome) -> pd.DataFrame:
    """chrom, start, end, name and centre of every peak."""
    table = _read_places(source.peaks, source, genome)
    table["centre"] = (table["start"] + table["end"]) // 2
    if ".narrowpeak" in source.peaks.name.lower():
        summit = _read_summits(source.peaks)
        if len(summit) != len(table):
            remedy = "Correct those rows, or rename the file to .bed to use the middle of every interval"
            where = f"{source.peaks}, column 10"
            raise DataError(f"{len(table) - len(summit)} rows have no summit", where=where, remedy=remedy)
        table["centre"] = np.where(summit >= 0, table["start"] + summit, table["centre"])
    plain = table["name"].isin(["", "."])
    table.loc[plain, "name"] = [f"peak{row + 1}" for row in np.flatnonzero(plain)]
    return table


def _read_places(path: Path, source: PeakSource, genome: Genome) -> pd.DataFrame:
    table = read_bed_table(path)
    table = table.assign(chrom=[source.rename.get(chrom, chrom) for chrom in table["chrom"]])
    match_chroms(table["chrom"].unique(), genome, path)
    return table


def _read_summits(path: Path) -> NDArray[np.int64]:
    """Column 10 of the rows that have it: the summit's distance from the start, or -1."""
    table = pd.read_csv(path, sep="\t", header=None, comment="#", dtype=str, names=range(10))
    table = table[~table[0].str.startswith(("track", "browser"))]
    return pd.to_numeric(table[9], errors="coerce").dropna().to_numpy(dtype=np.int64)


def _windows(peaks: pd.DataFrame, source: PeakSource, genome: Genome) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """The window of every peak, once each, and those left out with their reason."""
    start = peaks["centre"] - source.window // 2
    windows = peaks[["chrom", "name"]].assign(start=start, end=start + source.window, strand="+")
    outside = (start < 0) | (windows["end"] > windows["chrom"].map(genome.chroms))
    repeated = windows.duplicated(["chrom", "start"]) & ~outside
    reasons = np.select([outside, repeated], ["reaches beyond the chromosome", "same window as another peak"], "")
    skipped = [{"name": name, "reason": reason} for name, reason in zip(peaks["name"], reasons, strict=True) if reason]
    if outside.sum() > source.max_skipped * len(peaks):
        raise DataError(
            f"{outside.sum()} of {len(peaks)} windows reach beyond their chromosome; the first is that of",
            str(peaks["name"][outside].iloc[0]),
            where=source.peaks,
            remedy="Use a shorter window, or raise max_skipped to leave them out",
        )
    return windows[reasons == ""].reset_index(drop=True), skipped


# Negatives


def _draw_negatives(
    windows: pd.DataFrame, peaks: pd.DataFrame, source: PeakSource, genome: Genome
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Negatives (chrom, start, end, strand, name) and how many were not found on each chromosome."""
    away = pd.concat([peaks[["chrom", "start", "end"]], windows[["chrom", "start", "end"]]])
    away = away.assign(start=away["start"] - source.distance, end=away["end"] + source.distance)
    if source.exclude is not None:
        away = pd.concat([away, _read_places(source.exclude, source, genome)[["chrom", "start", "end"]]])
    repeats = _read_places(source.repeats, source, genome) if source.repeats is not None else None
    rng = np.random.default_rng(source.seed)
    starts, missing = {}, {}
    for chrom, part in progress(windows.groupby("chrom", sort=True), "negatives", windows["chrom"].nunique()):
        name = str(chrom)
        cover = _Cover.of(repeats, name)
        codes = genome.chrom_codes(name)
        wanted = _bins(codes, part["start"].to_numpy(), source.window, cover)
        counts = Counter({key: round(count * source.ratio) for key, count in Counter(wanted.tolist()).items()})
        # rounding per bin would lose or add some: the difference goes to the fullest bins
        short = round(len(part) * source.ratio) - counts.total()
        for key, _ in counts.most_common(abs(short)):
            counts[key] += int(np.sign(short))
        starts[name] = _draw(codes, counts, source.window, _Cover.of(away, name), cover, rng)
        if counts.total():
            missing[name] = counts.total()
    found = pd.DataFrame(
        [(chrom, start) for chrom, chosen in starts.items() for start in chosen], columns=["chrom", "start"]
    )
    total = sum(missing.values())
    if total > source.max_skipped * (total + len(found)):
        listed = ", ".join(f"{chrom}: {count}" for chrom, count in missing.items())
        raise DataError(
            f"{total} of {total + len(found)} negatives that match the peaks were not found ({listed})",
            where=source.peaks,
            remedy="Lower ratio, distance or window, or raise max_skipped",
        )
    names = [f"negative{row + 1}" for row in range(len(found))]
    return found.assign(end=found["start"] + source.window, strand="+", name=names), missing


@dataclass(frozen=True, slots=True)
class _Cover:
    """Intervals of one chromosome, merged; ``before[i]`` bases lie in the first i of them."""

    start: NDArray[np.int64]
    end: NDArray[np.int64]
    before: NDArray[np.int64]

    @classmethod
    def of(cls, table: pd.DataFrame | None, chrom: str) -> _Cover:
        mine = table[table["chrom"] == chrom] if table is not None else pd.DataFrame({"start": [], "end": []})
        start, end = (mine[column].to_numpy(dtype=np.int64) for column in ("start", "end"))
        order = np.argsort(start, kind="stable")
        start, reach = start[order], np.maximum.accumulate(end[order])
        first = np.ones(start.size, dtype=bool)
        first[1:] = start[1:] > reach[:-1]
        last = np.append(first[1:], True)[: start.size]
        start, end = start[first], reach[last]
        return cls(start, end, np.concatenate([[0], np.cumsum(end - start)]).astype(np.int64))

    def covered(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many bases of each interval are covered."""
        return self._up_to(end) - self._up_to(start)

    def _up_to(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.start.size:
            return np.zeros(position.size, dtype=np.int64)
        index = np.searchsorted(self.start, position, side="left")
        inside = np.minimum(position, self.end[np.maximum(index - 1, 0)]) - self.start[np.maximum(index - 1, 0)]
        return np.where(index > 0, self.before[np.maximum(index - 1, 0)] + inside, 0)


def _bins(codes: NDArray[np.uint8], starts: NDArray[np.int64], window: int, repeats: _Cover) -> NDArray[np.int64]:
    """One number per window for its bin of GC content (of known bases), unknown bases and repeats."""
    gc, unknown = np.zeros(starts.size), np.zeros(starts.size)
    step = max(1, _BATCH // window)
    for at in range(0, starts.size, step):
        taken = codes[starts[at : at + step, None] + np.arange(window)]
        gc[at : at + step] = ((taken == 1) | (taken == 2)).sum(axis=1)
        unknown[at : at + step] = (taken > 3).sum(axis=1)
    gc_bin = (gc / np.maximum(window - unknown, 1) / GC_BIN).astype(np.int64)
    repeat = repeats.covered(starts, starts + window) / window
    bins: NDArray[np.int64] = (gc_bin * 100 + (unknown / window / UNKNOWN_BIN).astype(np.int64)) * 100
    return bins + (repeat / REPEAT_BIN).astype(np.int64)


def _draw(
    codes: NDArray[np.uint8],
    counts: Counter[int],
    window: int,
    away: _Cover,
    repeats: _Cover,
    rng: np.random.Generator,
) -> list[int]:
    """Starts of windows that fill ``counts`` (bin -> how many, taken down as they are found), in genome order."""
    chosen: list[int] = []
    if codes.size < window:
        return chosen
    for _ in range(_ROUNDS):
        if not counts.total():
            break
        starts = rng.integers(0, codes.size - window + 1, size=max(1000, _DRAWS * counts.total()))
        starts = starts[away.covered(starts, starts + window) == 0]
        bins = _bins(codes, starts, window, repeats)
        needed = np.isin(bins, [key for key, count in counts.items() if count])
        for start, key in zip(starts[needed].tolist(), bins[needed].tolist(), strict=True):
            at = bisect.bisect_left(chosen, start)
            clear = (at == 0 or chosen[at - 1] + window <= start) and (
                at == len(chosen) or start + window <= chosen[at]
            )
            if clear and counts[key]:
                chosen.insert(at, start)
                counts[key] -= 1
    return chosen
