"""Coverage tracks: bigWigs and a FASTA -> a prepared dataset.

What belongs where: everything that needs single bases (the blacklist, the sign of a minus strand) happens here, once;
scale, clip and squash apply on read, so :func:`retrack_dataset` changes them without the bigWigs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.dataset import (
    FORMAT_VERSION,
    Dataset,
    DatasetInfo,
    hash_file,
    open_dataset,
    write_dataset,
    write_json,
)
from seqgraft.data.duplicates import DuplicatePolicy, duplicate_links, find_duplicates, resolve_duplicates
from seqgraft.data.folds import FoldPlaces, Folds, assign_folds
from seqgraft.data.tables import read_track_table
from seqgraft.data.tiles import Spans, covered_bins, overlapping, read_placed_bed, read_spans, tile_regions
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.genome import Genome, match_chroms
from seqgraft.progress import progress
from seqgraft.sequence import Codes, N
from seqgraft.tracks import TrackTable, coarsen, open_bigwig, read_chrom, squash, unsquash

__all__ = ["CoverageSource", "prepare_coverage", "retrack_dataset"]

BLACKLIST_MARGIN = 20  # bp on either side, as in Baskerville
UNMAPPABLE_SHARE = 0.5  # a window with as many unmappable bins, or unknown bases, is left out
SKIPPED_SHARE = 0.01  # more skipped regions than this are an error
TRACK_QUANTILE = 0.9999999  # Baskerville's limit of a whole track
WINDOW_QUANTILE = 0.5  # Baskerville's limit of unmappable bins within their window
SPAN = 1 << 24  # bases read at once

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
        problems = Problems(ConfigError)
        for name in ("window", "target_length", "bin_size", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.add(f"{name} must be a positive number of base pairs", value, where="coverage source")
        problems.raise_if_any()
        if self.target_length % self.bin_size:
            problems.add(
                f"target_length is not a multiple of bin_size ({self.bin_size})",
                self.target_length,
                where="coverage source",
                remedy=f"Use {self.target_length // self.bin_size * self.bin_size or self.bin_size}",
            )
        if self.window < self.target_length:
            problems.add(
                f"window is smaller than target_length ({self.target_length})",
                self.window,
                where="coverage source",
                remedy="The model must see at least what it predicts: enlarge window or shrink target_length",
            )
        if self.regions is not None and (self.stride or self.gaps or self.exclude_chroms):
            what = "stride, gaps and exclude_chroms are for tiling, but regions are given"
            problems.add(what, str(self.regions), where="coverage source", remedy="Leave these three out, or regions")
        problems.raise_if_any()


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
    genome = Genome.open(source.fasta)
    regions, unmappable, notes = _regions(source, genome)
    views = _target_codes(genome, regions)
    links = duplicate_links(views) if source.duplicates == "group" else None
    margin = -(-(source.window - source.target_length) // 2)
    places = FoldPlaces(genome, margin, source.rename, notes)
    regions = regions.assign(fold=assign_folds(regions, source.folds, together=links, places=places))
    report = find_duplicates(views, regions["fold"])
    names = [f"{c}:{s}-{e}" for c, s, e in zip(regions["chrom"], regions["start"], regions["end"], strict=True)]
    listing = Path(folder).with_name(f"{Path(folder).name}.duplicates.tsv")
    kept = resolve_duplicates(report, source.duplicates, len(regions), names, listing)
    regions = regions[kept].reset_index(drop=True)
    unmappable = unmappable[kept] if unmappable is not None else None
    notes |= {"duplicates": report.summary(), "duplicates_dropped": int((~kept).sum())}
    files = _files(tracks)
    for file, positions in files.items():
        _check_contigs(file, [tracks.names[p] for p in positions], regions, genome, source.rename, problems)
    problems.raise_if_any()
    bins = source.target_length // source.bin_size
    blacklist = read_spans(source.blacklist, genome, source.rename, BLACKLIST_MARGIN)
    with write_dataset(folder, (len(regions), len(tracks), bins)) as writer:
        depth = np.zeros(len(tracks))
        for file, positions in progress(files.items(), "Reading bigWigs", total=len(files)):
            try:
                depth[positions] = _read_file(file, positions, regions, blacklist, source, writer.targets)
            except DataError as error:
                problems.found.append(error)
                continue
            for position in positions:
                _check_signal(writer.targets, position, tracks, source.bin_size, regions, problems)
        problems.raise_if_any()
        if source.reference_compatible:
            _limit(writer.targets, tracks, source.bin_size, unmappable)
        tracks = tracks.replace(depth=depth)
        mask = None
        if unmappable is not None and not source.reference_compatible:
            mask = np.broadcast_to(~unmappable[:, None, :], writer.targets.shape)
        writer.finish(_info(source, tracks, genome, notes), regions, tracks, mask=mask)
    return open_dataset(folder)


def _target_codes(genome: Genome, regions: pd.DataFrame) -> list[Codes]:
    """The target intervals' sequences, as views of the memory map where they lie inside their contig."""
    places = zip(regions["chrom"], regions["start"], regions["end"], strict=True)
    return [genome.chrom_codes(chrom)[max(0, start) : end] for chrom, start, end in places]


def _info(source: CoverageSource, tracks: TrackTable, genome: Genome, notes: dict[str, Any]) -> DatasetInfo:
    beds = [path for path in (source.regions, source.blacklist, source.unmappable, source.gaps) if path is not None]
    table = [source.tracks] if isinstance(source.tracks, Path) else []
    return DatasetInfo(
        kind="coverage",
        window=source.window,
        bins=source.target_length // source.bin_size,
        bin_size=source.bin_size,
        genome={"path": str(genome.path), "hash": genome.hash},
        sources=[hash_file(path) for path in [source.fasta, *table, *beds, *map(Path, _files(tracks))]],
        settings={**asdict(source), "tracks": _settings(tracks)},
        notes=notes,
    )


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
        _check_signal(dataset.targets, position, table, dataset.info.bin_size, dataset.regions, problems)
    problems.raise_if_any()
    content = {"format": "seqgraft-dataset", "format_version": FORMAT_VERSION, **asdict(dataset.info)}
    content["settings"] = {**dataset.info.settings, "tracks": _settings(table)}
    part = folder / ".tracks.parquet.part"
    table.to_frame().to_parquet(part)
    part.replace(folder / "tracks.parquet")
    write_json(folder / "dataset.json", content)
    return open_dataset(folder)


# Regions


def _regions(
    source: CoverageSource, genome: Genome
) -> tuple[pd.DataFrame, npt.NDArray[np.bool_] | None, dict[str, Any]]:
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


def _given_regions(source: CoverageSource, genome: Genome, notes: dict[str, Any]) -> pd.DataFrame:
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
    regions: pd.DataFrame, unmappable: npt.NDArray[np.bool_] | None, genome: Genome, notes: dict[str, Any]
) -> tuple[pd.DataFrame, npt.NDArray[np.bool_] | None]:
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
            for first, last, chunk in _chunks(rows):
                bases = read_chrom(reader, own_name, file, first, last)
                for row, start in chunk:
                    end = start + source.target_length
                    blacklisted = list(overlapping(blacklist, str(chrom), start, end))
                    targets[row, positions] = _bin(bases[start - first : end - first], blacklisted, source)
            size = reader.chroms()[own_name]
            depth += float(reader.values(own_name, 0, size, bins=1, summary="sum", exact=True, fillna=0.0)[0])
    return abs(depth)


def _chunks(rows: pd.DataFrame) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
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


def _bin(signal: Floats, blacklisted: list[tuple[int, int]], source: CoverageSource) -> Floats:
    """Summed bins of a region's bases; blacklisted bases are limited to the region's median."""
    if source.absolute:
        signal = np.abs(signal)
    if source.reference_compatible:
        limit = float(np.finfo(np.float16).max)
        signal = np.clip(signal, -limit, limit).astype(np.float16).astype(np.float64)
    if blacklisted:
        signal, baseline = signal.copy(), abs(float(np.median(signal)))
        for left, right in blacklisted:
            signal[left:right] = np.clip(signal[left:right], -baseline, baseline)
    return coarsen(signal, source.bin_size)


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


def _check_signal(
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
