"""What all sources of binned signal share: regions with their folds, limits on artefacts, checks of the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.dataset import DatasetInfo, hash_file
from seqgraft.data.duplicates import (
    DuplicatePolicy,
    copied_rows,
    duplicate_links,
    find_duplicates,
    resolve_duplicates,
)
from seqgraft.data.folds import FoldPlaces, Folds, assign_folds
from seqgraft.data.tiles import Spans, covered_bins, read_placed_bed, read_spans, tile_regions
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.genome import Genome, match_chroms
from seqgraft.sequence import N
from seqgraft.tracks import TrackTable, coarsen

__all__ = [
    "BinnedSource",
    "Places",
    "binned_info",
    "check_binned",
    "check_signal",
    "limited_bins",
    "place_regions",
    "stretches",
]

BLACKLIST_MARGIN = 20  # bp on either side, as in Baskerville
UNMAPPABLE_SHARE = 0.5  # a window with as many unmappable bins, or unknown bases, is left out
SKIPPED_SHARE = 0.01  # more skipped regions than this are an error
SPAN = 1 << 24  # bases read at once

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class BinnedSource(Protocol):
    """The settings of a source that say where the bins are; ``CoverageSource`` says what each means."""

    @property
    def fasta(self) -> Path: ...
    @property
    def window(self) -> int: ...
    @property
    def target_length(self) -> int: ...
    @property
    def bin_size(self) -> int: ...
    @property
    def folds(self) -> Folds: ...
    @property
    def stride(self) -> int | None: ...
    @property
    def regions(self) -> Path | None: ...
    @property
    def exclude_chroms(self) -> tuple[str, ...]: ...
    @property
    def rename(self) -> dict[str, str]: ...
    @property
    def blacklist(self) -> Path | None: ...
    @property
    def unmappable(self) -> Path | None: ...
    @property
    def gaps(self) -> Path | None: ...
    @property
    def duplicates(self) -> DuplicatePolicy: ...


def check_binned(source: BinnedSource, where: str) -> None:
    """Checks the settings that need no file.

    Raises:
        ConfigError: lengths that cannot be, or settings that exclude each other.
    """
    problems = Problems(ConfigError)
    for name in ("window", "target_length", "bin_size", "stride"):
        value = getattr(source, name)
        if value is not None and value < 1:
            problems.add(f"{name} must be a positive number of base pairs", value, where=where)
    problems.raise_if_any()
    if source.target_length % source.bin_size:
        problems.add(
            f"target_length is not a multiple of bin_size ({source.bin_size})",
            source.target_length,
            where=where,
            remedy=f"Use {source.target_length // source.bin_size * source.bin_size or source.bin_size}",
        )
    if source.window < source.target_length:
        problems.add(
            f"window is smaller than target_length ({source.target_length})",
            source.window,
            where=where,
            remedy="The model must see at least what it predicts: enlarge window or shrink target_length",
        )
    if source.regions is not None and (source.stride or source.gaps or source.exclude_chroms):
        what = "stride, gaps and exclude_chroms are for tiling, but regions are given"
        problems.add(what, str(source.regions), where=where, remedy="Leave these three out, or regions")
    problems.raise_if_any()


@dataclass(frozen=True)
class Places:
    """Where the bins are.

    Attributes:
        genome: the FASTA.
        regions: ``chrom, start, end, strand, name, fold`` of the target intervals.
        unmappable: bins to mask, ``(regions, bins)``; None if nothing is said about them.
        blacklist: spans whose signal is limited.
        notes: what was found on the way.
    """

    genome: Genome
    regions: pd.DataFrame
    unmappable: Bools | None
    blacklist: Spans
    notes: dict[str, Any]


def place_regions(source: BinnedSource, folder: Path) -> Places:
    """The regions of a source with their folds, without copies across folds if that is asked for.

    Raises:
        ConfigError: folds that cannot be.
        DataError: BED files that do not fit the genome, no region left, copies across folds where they are refused.
    """
    genome = Genome.open(source.fasta)
    regions, unmappable, notes = _regions(source, genome)
    places = zip(regions["chrom"], regions["start"], regions["end"], strict=True)
    # views of the memory map where they lie inside their contig
    views = [genome.chrom_codes(chrom)[max(0, start) : end] for chrom, start, end in places]
    links = duplicate_links(views) if source.duplicates == "group" else None
    margin = -(-(source.window - source.target_length) // 2)
    fold_places = FoldPlaces(genome, margin, source.rename, notes)
    regions = regions.assign(fold=assign_folds(regions, source.folds, together=links, places=fold_places))
    report = find_duplicates(views, regions["fold"])
    names = [f"{c}:{s}-{e}" for c, s, e in zip(regions["chrom"], regions["start"], regions["end"], strict=True)]
    listing = Path(folder).with_name(f"{Path(folder).name}.duplicates.tsv")
    kept = resolve_duplicates(report, source.duplicates, len(regions), names, listing)
    regions = regions[kept].assign(copied=copied_rows(report, kept)).reset_index(drop=True)
    unmappable = unmappable[kept] if unmappable is not None else None
    notes |= {"duplicates": report.summary(), "duplicates_dropped": int((~kept).sum())}
    blacklist = read_spans(source.blacklist, genome, source.rename, BLACKLIST_MARGIN)
    return Places(genome, regions, unmappable, blacklist, notes)


def binned_info(
    kind: str, source: BinnedSource, genome: Genome, files: Sequence[Path], notes: dict[str, Any]
) -> DatasetInfo:
    """What ``dataset.json`` says of a source; ``files`` are those it reads beside the FASTA and the BED files."""
    beds = [path for path in (source.regions, source.blacklist, source.unmappable, source.gaps) if path is not None]
    return DatasetInfo(
        kind=kind,
        window=source.window,
        bins=source.target_length // source.bin_size,
        bin_size=source.bin_size,
        genome={"path": str(genome.path), "hash": genome.hash},
        sources=[hash_file(path) for path in [source.fasta, *beds, *files]],
        settings=asdict(source),  # type: ignore[call-overload]  # every source is a dataclass
        notes=notes,
    )


def _regions(source: BinnedSource, genome: Genome) -> tuple[pd.DataFrame, Bools | None, dict[str, Any]]:
    """The regions, their unmappable bins ``(regions, bins)``, and what was found on the way."""
    notes: dict[str, Any] = {"ambiguous_bases": genome.ambiguous}
    match_chroms(source.rename.values(), genome, "rename")
    if source.regions is not None:
        regions = _given_regions(source, genome, notes)
    else:
        match_chroms(source.exclude_chroms, genome, "exclude_chroms")
        gaps = read_spans(source.gaps, genome, source.rename)
        stride = source.stride or source.target_length
        regions = tile_regions(genome, source.target_length, stride, source.exclude_chroms, gaps).assign(name="")
        if regions.empty:
            remedy = f"The longest contig has {max(genome.chroms.values())} bp; use a smaller target_length"
            raise DataError("no region fits into the genome", source.target_length, where=source.fasta, remedy=remedy)
    unmappable = None
    if source.unmappable is not None:
        unmappable = covered_bins(regions, read_spans(source.unmappable, genome, source.rename), source.bin_size)
    if source.regions is None:
        regions, unmappable = _drop(regions, unmappable, genome, notes)
    notes["regions"] = len(regions)
    if unmappable is not None:
        notes["unmappable_bins"] = int(unmappable.sum())
    return regions.assign(strand=".").reset_index(drop=True), unmappable, notes


def _given_regions(source: BinnedSource, genome: Genome, notes: dict[str, Any]) -> pd.DataFrame:
    assert source.regions is not None
    table = read_placed_bed(source.regions, genome, source.rename)
    match_chroms(table["chrom"].unique(), genome, source.regions)
    start = table["start"] + (table["end"] - table["start"] - source.target_length) // 2
    end = start + source.target_length
    notes["resized_regions"] = int((start != table["start"]).sum())
    inside = (start >= 0) & (end <= table["chrom"].map(genome.chroms))
    skipped = table[~inside]
    reason = f"{source.target_length} bp about its centre reach beyond the contig"
    notes["skipped"] = [
        {"region": f"{chrom}:{left}-{right}", "reason": reason}
        for chrom, left, right in skipped[["chrom", "start", "end"]].itertuples(index=False, name=None)
    ]
    if len(skipped) > SKIPPED_SHARE * len(table):
        raise DataError(
            f"{len(skipped)} of {len(table)} regions must be skipped: {reason}; the first is",
            notes["skipped"][0]["region"],
            where=source.regions,
            remedy="Remove them, or use a smaller target_length",
        )
    regions = pd.DataFrame({"chrom": table["chrom"], "start": start, "end": end, "name": table["name"]})
    return regions.assign(source_row=np.arange(len(table)))[inside]


def _drop(
    regions: pd.DataFrame, unmappable: Bools | None, genome: Genome, notes: dict[str, Any]
) -> tuple[pd.DataFrame, Bools | None]:
    """Leave out tiles where half of the bins are unmappable or half of the bases unknown."""
    places = regions[["chrom", "start", "end"]].itertuples(index=False, name=None)
    unknown = np.array([np.mean(genome.chrom_codes(c)[s:e] == N) for c, s, e in places]) >= UNMAPPABLE_SHARE
    lost = np.zeros(len(regions), dtype=bool) if unmappable is None else unmappable.mean(axis=1) >= UNMAPPABLE_SHARE
    notes["dropped_tiles"] = {"unmappable": int(lost.sum()), "unknown_bases": int((unknown & ~lost).sum())}
    kept = ~(unknown | lost)
    if not kept.any():
        remedy = "Check the file of unmappable regions and the FASTA"
        raise DataError("every tile is unmappable or of unknown bases", len(regions), where=genome.path, remedy=remedy)
    return regions[kept], None if unmappable is None else unmappable[kept]


def stretches(rows: pd.DataFrame) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Regions of one contig in stretches of limited length: first base, last base, ``(row number, start)`` of each."""
    ordered = rows.sort_values("start")
    chunk: list[tuple[int, int]] = []
    last = 0
    for row, start, end in zip(ordered.index, ordered["start"], ordered["end"], strict=True):
        if chunk and end - chunk[0][1] > SPAN:
            yield chunk[0][1], last, chunk
            chunk = []
        chunk.append((int(row), int(start)))
        last = int(end)
    yield chunk[0][1], last, chunk


def limited_bins(signal: Floats, blacklisted: Sequence[tuple[int, int]], bin_size: int) -> Floats:
    """Summed bins of a region's bases; bases of ``blacklisted`` parts are limited to the region's median."""
    if blacklisted:
        signal, baseline = signal.copy(), abs(float(np.median(signal)))
        for left, right in blacklisted:
            signal[left:right] = np.clip(signal[left:right], -baseline, baseline)
    return coarsen(signal, bin_size)


def check_signal(
    targets: npt.NDArray[np.float32], position: int, tracks: TrackTable, bin_size: int, regions: pd.DataFrame,
    problems: Problems,
) -> None:  # fmt: skip
    """The track has signal, and none that its squash or link cannot take."""
    settings = tracks.frame.iloc[position]
    where = f"track {settings['name']} ({settings['file']})"
    needs_positive = settings["squash"] != "none" or settings["link"] == "softplus"
    sign = 1.0 if str(settings["squash"]).endswith("_legacy") else float(np.sign(settings["scale"]))
    center = float(settings["center"]) * (bin_size if settings["statistic"] == "mean" else 1)
    empty = True
    for first in range(0, len(targets), 256):
        bins = targets[first : first + 256, position]
        empty = empty and not bins.any()
        if needs_positive and (negative := (bins - center) * sign < 0).any():
            row, at = np.argwhere(negative)[0].tolist()
            start = int(regions["start"].iloc[first + row]) + at * bin_size
            place = f"{regions['chrom'].iloc[first + row]}:{start}-{start + bin_size}"
            what = f"squash {settings['squash']!r} with link {settings['link']!r} cannot take a negative signal"
            remedy = (
                "Set absolute if minus strands are stored as negative numbers, or use squash none and link identity"
            )
            problems.add(what, float(bins[row, at]), where=f"{where} {place}", remedy=remedy)
            break
    if empty:
        problems.add("the track has no signal in any region", where=where, remedy="Check the file, or remove the track")
