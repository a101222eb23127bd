"""Single-cell fragments and labels of cells -> a prepared dataset with one track per group of cells and assay.

Signal is counted straight into the bins of the regions: what bigWigs of the same counts would give, bit for bit,
without writing any. Regions, folds and limits on artefacts are those of coverage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.bigwig import Value, runs, write_bigwig
from seqgraft.data.barcodes import CellLabels, Cells, read_cells
from seqgraft.data.binned import (
    SPAN,
    Places,
    binned_info,
    check_binned,
    check_signal,
    limited_bins,
    place_regions,
    stretches,
)
from seqgraft.data.dataset import Dataset, DatasetWriter, open_dataset, write_dataset
from seqgraft.data.duplicates import DuplicatePolicy
from seqgraft.data.folds import Folds
from seqgraft.data.pseudobulk import Assay, Contigs, Layout, Tally, count_assay
from seqgraft.data.quality import Quality, new_qualities, quality_table, tss_sites
from seqgraft.data.spill import Spill, base_signal, bin_signal, layers_of
from seqgraft.data.tiles import overlapping
from seqgraft.errors import ConfigError, DataError, Problems, RunError
from seqgraft.progress import progress
from seqgraft.tracks import TrackTable

__all__ = ["FragmentSource", "depth_weights", "prepare_fragments"]

WHERE = "fragments source"


@dataclass(frozen=True)
class FragmentSource:
    """Which fragments, of which cells, over which regions of which genome.

    A track is a group of cells in an assay: ``GROUP_ASSAY`` (``GROUP`` if there is one assay), with ``+`` and ``-``
    where the files of the assay have strands. The group of the track table is the assay, the condition the group of
    cells.

    Attributes:
        fasta: the genome, plain or compressed.
        assays: what was measured, in which files.
        window, target_length, bin_size, folds: as of coverage.
        labels: the table of cells with their groups; needed unless every file names its group.
        merge: new group -> groups of the table that it is made of.
        drop: groups of the table to leave out.
        max_absent: largest share of the table's cells without a fragment in any file.
        weights: ``depth``: a track counts in the loss by the root of its depth, not by its depth (``depth_weights``).
        gtf: genes, for enrichment at transcription starts in the QC table.
        write_bigwigs: folder for a bigWig of single bases of each track.
        stride, regions, exclude_chroms, rename, blacklist, unmappable, gaps, duplicates: as of coverage; ``rename`` is
            for fragments and the GTF as well.
    """

    fasta: Path
    assays: tuple[Assay, ...]
    window: int
    target_length: int
    bin_size: int
    folds: Folds
    labels: CellLabels | None = None
    merge: dict[str, tuple[str, ...]] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    max_absent: float = 0.1
    weights: Literal["equal", "depth"] = "equal"
    gtf: Path | None = None
    write_bigwigs: Path | None = None
    stride: int | None = None
    regions: Path | None = None
    exclude_chroms: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)
    blacklist: Path | None = None
    unmappable: Path | None = None
    gaps: Path | None = None
    duplicates: DuplicatePolicy = "report"

    def __post_init__(self) -> None:
        check_binned(self, WHERE)
        problems = Problems(ConfigError)
        names = [assay.name for assay in self.assays]
        if not names:
            problems.add("there are no assays", where=WHERE, remedy="List at least one, with its files")
        if len(set(names)) < len(names):
            problems.add("two assays have one name", names, where=WHERE, remedy="Give each its own name")
        unnamed = [str(file.path) for assay in self.assays for file in assay.files if file.group is None]
        if unnamed and self.labels is None:
            remedy = "Give the table of cells (labels), or the group of each file"
            problems.add("nothing says of which group the cells of a file are", unnamed[0], where=WHERE, remedy=remedy)
        if self.labels is None and (self.merge or self.drop):
            problems.add("merge and drop are for the groups of a table", where=WHERE, remedy="Give labels")
        if not 0 <= self.max_absent <= 1:
            remedy = "Give a number from 0 to 1"
            problems.add("max_absent must be a share", self.max_absent, where=WHERE, remedy=remedy)
        if self.weights not in ("equal", "depth"):
            problems.add("weights are unknown", self.weights, where=WHERE, remedy="Choose from equal, depth")
        problems.raise_if_any()


def prepare_fragments(source: FragmentSource, folder: Path) -> Dataset:
    """Count fragments into a new prepared dataset, reading every file once, in constant memory.

    Beside the dataset, ``NAME.qc.tsv`` has a row per track and ``NAME.qc.png`` shows it.

    Raises:
        ConfigError: settings or folds that cannot be.
        DataError: files that are missing, broken, unsorted or do not fit the genome or the labels; all at once.
        RunError: the folder or a bigWig exists, or cannot be written.
    """
    _check_files(source)
    cells = None if source.labels is None else read_cells(source.labels, source.merge, source.drop)
    named = {file.group for assay in source.assays for file in assay.files if file.group is not None}
    layout = Layout(source.assays, sorted(named | set(cells.groups if cells else ())))
    if cells is not None:
        places_of = np.array([layout.groups.index(name) for name in cells.groups], dtype=np.int64)
        cells = replace(cells, group=places_of[cells.group], groups=layout.groups)
    tracks = TrackTable.build(layout.rows())
    bigwigs = _bigwigs(source, tracks)
    places = place_regions(source, folder)
    lengths = places.genome.chroms
    sites = {} if source.gtf is None else tss_sites(source.gtf, source.rename, lengths)
    used = set(places.regions["chrom"])
    contigs = Contigs(lengths, source.rename, used, set(lengths) if bigwigs else used)
    bins = source.target_length // source.bin_size
    shape = (len(places.regions), len(tracks), bins)
    with ExitStack() as undone, write_dataset(folder, shape) as writer, Spill(writer.folder) as spill:
        tallies = _read(source, layout, cells, contigs, spill)
        halves = _Halves.of(places, writer)
        qualities = new_qualities(layout, tracks, len(places.regions))
        for position, quality in enumerate(progress(qualities, "Counting bins")):
            _bin_track(position, quality, source, places, spill, writer.targets, halves)
            for chrom in used & sites.keys():
                for half in (0, 1):
                    quality.add_marks(spill.pieces(chrom, 2 * position + half), sites[chrom])
        table = quality_table(layout, tracks.names, tallies, qualities, source.bin_size)
        tracks = _finished(source, tracks, table, bigwigs)
        problems = Problems(DataError)
        for position in range(len(tracks)):
            check_signal(writer.targets, position, tracks, source.bin_size, places.regions, problems)
        problems.raise_if_any()
        read = [file.path for assay in source.assays for file in assay.files]
        read += [path for path in (source.labels and source.labels.path, source.gtf) if path]
        notes = _notes(places, tallies, table, qualities, cells)
        mask = None
        if places.unmappable is not None:
            mask = np.broadcast_to(~places.unmappable[:, None, :], writer.targets.shape)
        info = binned_info("fragments", source, places.genome, read, notes)
        writer.finish(info, places.regions, tracks, mask=mask)
        for position, path in enumerate(progress(bigwigs, "Writing bigWigs")):
            write_bigwig(path, lengths, _values(position, lengths, spill))
            undone.callback(path.unlink)
        undone.pop_all()
    _write_quality(table, folder)
    return open_dataset(folder)


def _check_files(source: FragmentSource) -> None:
    problems = Problems(DataError)
    for assay in source.assays:
        for file in assay.files:
            if not file.path.is_file():
                where = f"assay {assay.name}"
                problems.add("the fragment file does not exist", str(file.path), where=where, remedy="Check the path")
    problems.raise_if_any()


def _bigwigs(source: FragmentSource, tracks: TrackTable) -> list[Path]:
    """Where the bigWig of each track goes; nothing if none are asked for."""
    folder = source.write_bigwigs
    if folder is None:
        return []
    paths = [folder / f"{re.sub(r'[^A-Za-z0-9._+-]', '_', name)}.bw" for name in tracks.names]
    if len(set(paths)) < len(paths):
        remedy = "Names of groups may differ by more than spaces and signs: merge or rename some"
        raise DataError("two tracks would have one bigWig", tracks.names, where="write_bigwigs", remedy=remedy)
    for path in paths:
        if path.exists():
            raise RunError("the bigWig exists already", str(path), remedy="Choose another folder or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "Choose a folder that you can write to"
        raise RunError(f"the folder cannot be made ({error.strerror})", str(folder), remedy=remedy) from error
    return paths


def _read(source: FragmentSource, layout: Layout, cells: Cells | None, contigs: Contigs, spill: Spill) -> list[Tally]:
    problems, tallies = Problems(DataError), []
    for assay in source.assays:
        try:
            tallies.append(count_assay(assay, layout, cells, contigs, spill))
        except DataError as error:
            problems.extend(error)
    problems.raise_if_any()
    expected = set().union(*(tally.expected for tally in tallies))
    absent = sorted(expected - set().union(*(tally.cells for tally in tallies)))
    if cells is not None and len(absent) > source.max_absent * len(expected):
        what = f"{len(absent)} of {len(expected)} cells of the table have no fragment in any file; the first is"
        remedy = "Use the table of these files, name the sample of each, or raise max_absent"
        raise DataError(what, cells.barcode[absent[0]], where=cells.where, remedy=remedy)
    return tallies


@dataclass(frozen=True)
class _Halves:
    """The first halves of the regions that are not for training.

    Attributes:
        held_out: bool ``(regions,)``.
        values: ``(held-out regions, tracks, bins)``.
    """

    held_out: npt.NDArray[np.bool_]
    values: npt.NDArray[np.float32]

    @classmethod
    def of(cls, places: Places, writer: DatasetWriter) -> _Halves:
        held_out = (places.regions["fold"] != "train").to_numpy()
        empty = np.zeros((0, *writer.targets.shape[1:]), np.float32)  # which cannot be mapped
        return cls(held_out, writer.new_halves(int(held_out.sum())) if held_out.any() else empty)

    def add(self, row: npt.NDArray[np.int64], position: int, half: npt.NDArray[np.float64]) -> None:
        """Signal ``(rows, bins)`` of one track."""
        some = self.held_out[row]
        self.values[(np.cumsum(self.held_out) - 1)[row[some]], position] = half[some]


def _bin_track(
    position: int, quality: Quality, source: FragmentSource, places: Places, spill: Spill, targets: Any, kept: _Halves
) -> None:
    """Fills the targets of one track, and what is gathered and kept of its two halves."""
    bins, length = source.target_length // source.bin_size, source.target_length
    for chrom, rows in places.regions.groupby("chrom", sort=False):
        for half in (0, 1):
            quality.depths[half] += spill.total(str(chrom), 2 * position + half)
        for first, last, chunk in stretches(rows):
            numbers, starts = np.array(chunk, dtype=np.int64).T
            for layer in layers_of(starts, length):
                row, start = numbers[layer], starts[layer]
                marks = [spill.read(str(chrom), [2 * position + half], first, last) for half in (0, 1)]
                halves = [bin_signal(part, start, bins, source.bin_size) for part in marks]
                targets[row, position] = halves[0] + halves[1]
                usable = np.ones(halves[0].shape, dtype=bool)
                if places.unmappable is not None:
                    usable = ~places.unmappable[row]
                for number, (at, left) in enumerate(zip(row.tolist(), start.tolist(), strict=True)):
                    spans = list(overlapping(places.blacklist, str(chrom), left, left + length))
                    if spans:
                        keys = [2 * position, 2 * position + 1]
                        signal = base_signal(spill.read(str(chrom), keys, left, left + length), left, left + length)
                        targets[at, position] = limited_bins(signal, spans, source.bin_size)
                        usable[number] = False  # an artefact is in both halves
                quality.add_bins(row, halves, usable, source.bin_size)
                kept.add(row, position, np.where(usable, halves[0], np.nan))


def _finished(source: FragmentSource, tracks: TrackTable, table: pd.DataFrame, bigwigs: list[Path]) -> TrackTable:
    """The track table with depths, files and the soft clips that were asked for."""
    asked = [assay.name for assay in source.assays if assay.soft_clip == "suggested"]
    chosen = np.where(table["assay"].isin(asked), table["soft_clip"], tracks.column("soft_clip"))
    files = [str(path) for path in bigwigs] or [""] * len(tracks)
    tracks = tracks.replace(depth=table["depth"].to_numpy(), soft_clip=chosen, file=files)
    return tracks.replace(loss_weight=depth_weights(tracks)) if source.weights == "depth" else tracks


def depth_weights(tracks: TrackTable) -> npt.NDArray[np.float64]:
    """Weights of the tracks in the loss ``(tracks,)``: ``sqrt(m / d)``, limited to 0.1 to 10.

    ``d`` is a track's depth, of a strand pair the mean of both, and ``m`` the median of ``d`` in its group.
    Likelihoods of counts grow with depth, so that the deepest groups of cells decide what a shared trunk learns; this
    is halfway, on a logarithmic scale, from there to the same say for all. A track without counts has weight 1.
    """
    depth = tracks.column("depth")
    depth = (depth + depth[tracks.permutation]) / 2
    weights = np.ones(len(tracks))
    for index in tracks.groups.values():
        own = depth[index]
        median = np.median(own[own > 0]) if (own > 0).any() else 1.0
        weights[index] = np.where(own > 0, np.sqrt(median / np.where(own > 0, own, 1.0)), 1.0)
    return np.clip(weights, 0.1, 10.0)


def _notes(
    places: Places, tallies: list[Tally], table: pd.DataFrame, qualities: list[Quality], cells: Cells | None
) -> dict[str, Any]:
    """What ``dataset.json`` says beside the settings: files, and the QC table with the ceilings of each fold."""
    folds = places.regions["fold"]
    by_fold = {str(fold): (folds == fold).to_numpy() for fold in folds.unique()}
    tracks = {}
    for row, gathered in zip(table.to_dict("records"), qualities, strict=True):
        ceilings = {fold: _plain(np.sqrt(gathered.split_half(rows)[1])) for fold, rows in by_fold.items()}
        plain = {str(name): _plain(value) for name, value in row.items() if name != "track"}
        tracks[str(row["track"])] = plain | {"ceilings": ceilings}
    return places.notes | {
        "fragments": {file["path"]: _in_words(file) for tally in tallies for file in tally.files},
        "fragment_files": [file for tally in tallies for file in tally.files],
        "cells_left_out": 0 if cells is None else cells.left_out,
        "tracks": tracks,
        "shallow": table.loc[table["shallow"], "track"].tolist(),
    }


def _in_words(file: dict[str, Any]) -> str:
    """What a command says about a file."""
    share = f"{file['counted']:,} of {file['fragments']:,} count"
    if "matched" in file:
        share += f" ({file['matched']:,} of {file['barcodes']:,} barcodes have a label"
        share += f", {file['labels_not_in_the_file']:,} labels are of other cells)"
    return f"{share}; {file['repeated']:,} repeated, {sum(file['not_in_the_fasta'].values()):,} on unknown contigs"


def _plain(value: Any) -> Any:
    """A value of a table as JSON has it; None for NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value


def _values(position: int, lengths: dict[str, int], spill: Spill) -> Iterator[Value]:
    """The counts of every base of a track, in runs; bases of none are left out."""
    keys = [2 * position, 2 * position + 1]
    for chrom, length in lengths.items():
        for first in range(0, length, SPAN):
            last = min(first + SPAN, length)
            dense = base_signal(spill.read(chrom, keys, first, last), first, last)
            yield from (value for value in runs(chrom, dense, start=first) if value[3])


def _write_quality(table: pd.DataFrame, folder: Path) -> None:
    from seqgraft.plots import quality_dots

    folder = Path(folder)
    try:
        table.to_csv(folder.with_name(f"{folder.name}.qc.tsv"), sep="\t", index=False)
        quality_dots(table).savefig(folder.with_name(f"{folder.name}.qc.png"), dpi=150, facecolor="white")
    except OSError as error:
        remedy = "Free some disk space; the dataset itself is complete"
        raise RunError(f"the QC table cannot be written ({error.strerror})", str(folder), remedy=remedy) from error
