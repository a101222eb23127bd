"""Coverage tracks: bigWigs and a FASTA -> a prepared dataset.

What belongs where: everything that needs single bases (the blacklist, the sign of a minus strand) happens here, once;
scale, clip and squash apply on read, so :func:`retrack_dataset` changes them without the bigWigs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.binned import (
    Places,
    binned_info,
    check_binned,
    check_signal,
    limited_bins,
    place_regions,
    stretches,
)
from seqgraft.data.dataset import FORMAT_VERSION, Dataset, DatasetInfo, open_dataset, write_dataset, write_json
from seqgraft.data.duplicates import DuplicatePolicy
from seqgraft.data.folds import Folds
from seqgraft.data.tables import read_track_table
from seqgraft.data.tiles import Spans, overlapping
from seqgraft.errors import DataError, Problems
from seqgraft.genome import Genome
from seqgraft.progress import progress
from seqgraft.tracks import TrackTable, open_bigwig, read_chrom, squash, unsquash

__all__ = ["CoverageSource", "prepare_coverage", "retrack_dataset"]

TRACK_QUANTILE = 0.9999999  # Baskerville's limit of a whole track
WINDOW_QUANTILE = 0.5  # Baskerville's limit of unmappable bins within their window

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CoverageSource:
    """Which signal, over which regions of which genome.

    Attributes:
        fasta: the genome, plain or compressed.
        tracks: a CSV, TSV or Baskerville ``targets.txt`` file, or the rows themselves: the columns of a track table
            with ``name`` and ``file`` (a bigWig; relative to the table). Everything else has a default.
        window: bp of sequence that a model sees, N beyond the ends of a contig.
        target_length: bp covered by bins, centred in the window; a multiple of ``bin_size``.
        bin_size: bp per bin.
        folds: which regions are for training, validation and test.
        stride: bp from one region to the next when tiling; by default ``target_length``.
        regions: BED of target regions to use instead of tiling; each is brought to ``target_length`` about its centre.
        exclude_chroms: contigs that are not tiled, such as chrM.
        rename: names in bigWigs and BED files -> names in the FASTA.
        blacklist: BED of regions with artefacts: their signal (and that of 20 bp around them) is limited to the
            median of the region it lies in.
        unmappable: BED of regions where reads do not map: their bins are masked, and tiles with half or more of
            their bins in them left out.
        gaps: BED of assembly gaps, which are not tiled. Tiles with half or more unknown bases are left out anyhow.
        absolute: bigWigs of minus strands may hold negative numbers; take their absolute value.
        transform_old: read the ``sum_stat`` column of ``targets.txt`` as the Borzoi paper did (Baskerville's option of
            this name).
        duplicates: what to do with target sequences that stand in two folds, exactly or nearly, on either strand;
            they are always counted and listed in ``NAME.duplicates.tsv``.
        reference_compatible: make the numbers Baskerville makes, where those differ: bases rounded to float16, bins
            limited to the track's 0.9999999 quantile, unmappable bins limited to the median of their region instead
            of masked. The last two depend on scale, clip and squash at the time of preparation.
    """

    fasta: Path
    tracks: Path | list[dict[str, Any]]
    window: int
    target_length: int
    bin_size: int
    folds: Folds
    stride: int | None = None
    regions: Path | None = None
    exclude_chroms: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)
    blacklist: Path | None = None
    unmappable: Path | None = None
    gaps: Path | None = None
    absolute: bool = False
    transform_old: bool = False
    duplicates: DuplicatePolicy = "report"
    reference_compatible: bool = False

    def __post_init__(self) -> None:
        check_binned(self, "coverage source")


def prepare_coverage(source: CoverageSource, folder: Path) -> Dataset:
    """Bin the bigWigs of a source into a new prepared dataset: one pass per file, a stretch of a contig at a time.

    Raises:
        ConfigError: settings or folds that cannot be.
        DataError: files that are missing, broken or do not fit the genome, signal that cannot be squashed; all at once.
        RunError: the folder exists or cannot be written.
    """
    tracks = read_track_table(source.tracks, transform_old=source.transform_old)
    problems = Problems(DataError)
    for row in tracks.to_frame().to_dict("records"):
        if not row["file"]:
            problems.add("the track has no file", where=f"track {row['name']}", remedy="Give the path of its bigWig")
        elif not Path(row["file"]).is_file():
            remedy = "Check the path; paths are relative to the track table"
            problems.add("the bigWig does not exist", row["file"], where=f"track {row['name']}", remedy=remedy)
    problems.raise_if_any()
    places = place_regions(source, folder)
    genome, regions, unmappable = places.genome, places.regions, places.unmappable
    files = _files(tracks)
    for file, positions in files.items():
        _check_contigs(file, [tracks.names[p] for p in positions], regions, genome, source.rename, problems)
    problems.raise_if_any()
    bins = source.target_length // source.bin_size
    with write_dataset(folder, (len(regions), len(tracks), bins)) as writer:
        depth = np.zeros(len(tracks))
        for file, positions in progress(files.items(), "Reading bigWigs", total=len(files)):
            try:
                depth[positions] = _read_file(file, positions, regions, places.blacklist, source, writer.targets)
            except DataError as error:
                problems.found.append(error)
                continue
            for position in positions:
                check_signal(writer.targets, position, tracks, source.bin_size, regions, problems)
        problems.raise_if_any()
        if source.reference_compatible:
            _limit(writer.targets, tracks, source.bin_size, unmappable)
        tracks = tracks.replace(depth=depth)
        mask = None
        if unmappable is not None and not source.reference_compatible:
            mask = np.broadcast_to(~unmappable[:, None, :], writer.targets.shape)
        writer.finish(_info(source, tracks, places), regions, tracks, mask=mask)
    return open_dataset(folder)


def _info(source: CoverageSource, tracks: TrackTable, places: Places) -> DatasetInfo:
    table = [source.tracks] if isinstance(source.tracks, Path) else []
    info = binned_info("coverage", source, places.genome, [*table, *map(Path, _files(tracks))], places.notes)
    return replace(info, settings={**info.settings, "tracks": _settings(tracks)})


def _settings(tracks: TrackTable) -> list[dict[str, Any]]:
    rows: list[dict[Any, Any]] = tracks.frame.to_dict("records")
    return [{c: None if isinstance(v, float) and np.isnan(v) else v for c, v in row.items()} for row in rows]


def _files(tracks: TrackTable) -> dict[str, list[int]]:
    """bigWig -> positions of the tracks that are made of it."""
    files: dict[str, list[int]] = {}
    for position, file in enumerate(tracks.frame["file"]):
        files.setdefault(str(file), []).append(position)
    return files


def retrack_dataset(folder: Path, tracks: TrackTable | Path | Sequence[Mapping[str, Any]]) -> Dataset:
    """Give a prepared dataset another track table (scale, clip, squash, groups, ...) without reading any bigWig.

    The table must list the same names, in any order; depth and file stay as they were prepared.

    Raises:
        DataError: other names, or a squash that the prepared signal does not allow.
    """
    folder = Path(folder)
    dataset = open_dataset(folder)
    table = tracks if isinstance(tracks, TrackTable) else read_track_table(tracks)
    if set(table.names) != set(dataset.tracks.names):
        other = sorted(set(table.names) ^ set(dataset.tracks.names))
        remedy = "The names must be those of the dataset; prepare another one to add tracks"
        raise DataError("the track table and the dataset differ in tracks", other, where=folder, remedy=remedy)
    kept = dataset.tracks.frame
    table = table.select(dataset.tracks.names).replace(depth=kept["depth"].to_numpy(), file=kept["file"].to_numpy())
    problems = Problems(DataError)
    for position in range(len(table)):
        check_signal(dataset.targets, position, table, dataset.info.bin_size, dataset.regions, problems)
    problems.raise_if_any()
    content = {"format": "seqgraft-dataset", "format_version": FORMAT_VERSION, **asdict(dataset.info)}
    content["settings"] = {**dataset.info.settings, "tracks": _settings(table)}
    part = folder / ".tracks.parquet.part"
    table.to_frame().to_parquet(part)
    part.replace(folder / "tracks.parquet")
    write_json(folder / "dataset.json", content)
    return open_dataset(folder)


# Signal


def _check_contigs(
    file: str, names: list[str], regions: pd.DataFrame, genome: Genome, rename: Mapping[str, str], problems: Problems
) -> None:
    """The bigWig opens, and has every contig of the regions at the length it has in the genome."""
    where = f"track {', '.join(names)} ({file})"
    try:
        with open_bigwig(Path(file)) as reader:
            lengths = {rename.get(name, name): length for name, length in reader.chroms().items()}
    except DataError as error:
        problems.found.append(error)
        return
    missing = [chrom for chrom in regions["chrom"].unique() if chrom not in lengths]
    if missing:
        twins = {
            twin: chrom for chrom in missing for twin in (chrom.removeprefix("chr"), f"chr{chrom}") if twin in lengths
        }
        remedy = "Leave them out with exclude_chroms, or use a bigWig that covers them"
        if twins:
            twin, chrom = next(iter(twins.items()))
            remedy = f"It has {twin!r}: use names that match the FASTA, or pass rename: {{{twin!r}: {chrom!r}}}"
        shown = missing[0] if len(missing) == 1 else missing
        problems.add("the bigWig has no chromosome", shown, where=where, remedy=remedy)
    for chrom in regions["chrom"].unique():
        if lengths.get(chrom, genome.chroms[chrom]) != genome.chroms[chrom]:
            relation = "shorter" if lengths[chrom] < genome.chroms[chrom] else "longer"
            what = f"{chrom} is {relation} in the bigWig than in the FASTA ({genome.chroms[chrom]} bp)"
            remedy = "They are of different assemblies: use a FASTA and bigWigs of the same one"
            problems.add(what, lengths[chrom], where=where, remedy=remedy)


def _read_file(
    file: str, positions: list[int], regions: pd.DataFrame, blacklist: Spans, source: CoverageSource,
    targets: npt.NDArray[np.float32],
) -> float:  # fmt: skip
    """Bins one bigWig into its tracks; the total signal on the regions' contigs."""
    depth = 0.0
    with open_bigwig(Path(file)) as reader:
        own_names = {source.rename.get(name, name): name for name in reader.chroms()}
        summary = reader.info()["summary"]
        if np.isnan(summary["sum"]) or np.isinf([summary["min"], summary["max"]]).any():
            raise _not_finite(reader, file)
        if source.absolute and summary["min"] < 0 < summary["max"]:
            remedy = "The setting absolute is for minus strands that are stored as negative numbers"
            raise DataError("the bigWig has both negative and positive values", where=file, remedy=remedy)
        for chrom, rows in regions.groupby("chrom", sort=False):
            own_name = own_names[str(chrom)]
            for first, last, chunk in stretches(rows):
                bases = read_chrom(reader, own_name, file, first, last)
                for row, start in chunk:
                    end = start + source.target_length
                    blacklisted = list(overlapping(blacklist, str(chrom), start, end))
                    targets[row, positions] = _bin(bases[start - first : end - first], blacklisted, source)
            size = reader.chroms()[own_name]
            depth += float(reader.values(own_name, 0, size, bins=1, summary="sum", exact=True, fillna=0.0)[0])
    return abs(depth)


def _bin(signal: Floats, blacklisted: list[tuple[int, int]], source: CoverageSource) -> Floats:
    """Summed bins of a region's bases; blacklisted bases are limited to the region's median."""
    if source.absolute:
        signal = np.abs(signal)
    if source.reference_compatible:
        limit = float(np.finfo(np.float16).max)
        signal = np.clip(signal, -limit, limit).astype(np.float16).astype(np.float64)
    return limited_bins(signal, blacklisted, source.bin_size)


def _not_finite(reader: Any, file: str) -> DataError:
    for chrom in reader.chroms():
        for start, end, value in reader.records(chrom):
            if not np.isfinite(value):
                remedy = "Remove such intervals, or write 0 where there is no signal"
                return DataError(
                    "the bigWig has a value that is no number",
                    value,
                    where=f"{file} {chrom}:{start}-{end}",
                    remedy=remedy,
                )
    return DataError("the bigWig's summary is not a number", where=file, remedy="Make the file again")


# Baskerville's limits, which depend on the squash


def _limit(
    targets: npt.NDArray[np.float32], tracks: TrackTable, bin_size: int, unmappable: npt.NDArray[np.bool_] | None
) -> None:
    """Limit a track to its 0.9999999 quantile and unmappable bins to the median of their region, both when squashed."""
    for position, name in enumerate(tracks.names):
        table = TrackTable.of(tracks.frame.iloc[[position]].assign(strand_pair=name))
        squashed = squash(targets[:, [position]], table, bin_size)[:, 0].astype(np.float16)
        limited = np.minimum(squashed, np.quantile(squashed, TRACK_QUANTILE))
        if unmappable is not None:
            for row in np.flatnonzero(unmappable.any(axis=1)):
                median = np.quantile(limited[row], WINDOW_QUANTILE)
                limited[row, unmappable[row]] = np.minimum(limited[row, unmappable[row]], median)
        changed = limited < squashed
        raw = unsquash(limited[:, None].astype(np.float32), table, bin_size)[:, 0]
        for row in np.flatnonzero(changed.any(axis=1)):
            targets[row, position, changed[row]] = raw[row, changed[row]]
