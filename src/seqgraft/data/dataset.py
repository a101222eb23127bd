"""The prepared dataset: one format that every source ends in and every model reads.

::

    NAME/
      dataset.json       format version, kind, window, bins, bin size, genome, sources with hashes, settings, notes
      regions.parquet    one row per region: chrom, start, end (target interval, 0-based half-open), strand, name, fold
      tracks.parquet     the track table
      targets.npy        float32 (regions, tracks, bins): raw sums per bin, before scale, clip and squash
      mask.npy           bool, the same shape, where labels are missing or masked
      halves.npy         float32 (regions not for training, tracks, bins): what a random half of the cells adds to them
      codes.npy          uint8 (regions, window), and lengths.npy, for sequences without a genome
      covariates.parquet one row per region

Scale, clip and squash live in the track table and apply on read, so changing them never touches the targets.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from safetensors import SafetensorError

from seqgraft.data.augment import FORWARD, View
from seqgraft.data.donors import Donors, open_donors
from seqgraft.errors import ConfigError, DataError, Problems, RunError
from seqgraft.genome import Genome, Interval
from seqgraft.sample import Sample
from seqgraft.sequence import Codes, reverse_complement
from seqgraft.tracks import TrackTable, squash

__all__ = [
    "FORMAT_VERSION",
    "Dataset",
    "DatasetInfo",
    "check_new_folder",
    "hash_file",
    "new_folder",
    "open_dataset",
    "write_dataset",
]

FORMAT_VERSION = 1
REGION_COLUMNS = ("chrom", "start", "end", "strand", "name", "fold")


@dataclass(frozen=True)
class DatasetInfo:
    """What ``dataset.json`` says.

    Attributes:
        kind: the source that made it ("coverage", "labelled", ...).
        window: length in bp of the sequence a model sees, centred on the target interval.
        bins: bins per region; ``bins * bin_size`` is the length of the target interval.
        bin_size: bp per bin (for labels: the window, since a label is a track with one bin).
        genome: ``{"path", "hash"}`` of the FASTA, or None where sequences are stored in ``codes.npy``.
        sources: one ``{"path", "sha256", "bytes"}`` per file read.
        settings: the resolved configuration of the source.
        notes: what preparation found: skipped regions with reasons, the duplicate report, unknown bases, ...
    """

    kind: str
    window: int
    bins: int
    bin_size: int
    genome: Mapping[str, str] | None = None
    sources: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_words(self) -> str:
        """What an example looks like."""
        window = f"{self.window} bp" if self.window else "any length"
        if self.kind == "windows":
            return f"sequences of {window}"
        if self.kind == "personal":
            return f"haplotypes of {window} around starts of genes"
        if self.bins == 1:
            return f"one label per sequence of {window}"
        return f"windows of {window}, {self.bins} bins of {self.bin_size} bp"


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset, open for reading; arrays are memory-mapped."""

    folder: Path
    info: DatasetInfo
    tracks: TrackTable
    regions: pd.DataFrame
    targets: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_] | None
    genome: Genome | None
    codes: Codes | None
    lengths: npt.NDArray[np.int64] | None
    covariates: pd.DataFrame | None
    donors: Donors | None = None
    halves: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.regions)

    @property
    def hash(self) -> str:
        """Identifies the content: what was read, how, and into which regions and tracks."""
        text = (self.folder / "dataset.json").read_bytes() + self.tracks.to_frame().to_csv().encode()
        return hashlib.sha256(text).hexdigest()

    @property
    def in_words(self) -> str:
        """How many examples it has, in which folds, and what one looks like."""
        folds = ", ".join(f"{fold} {count}" for fold, count in self.regions["fold"].value_counts().items())
        if self.donors is not None:
            what = f"pairs of {len(self.donors.genes)} genes and {len(self.donors.donors)} donors"
            return f"{len(self)} {what} ({folds}), {self.info.in_words}"
        tracks = f"{len(self.tracks)} track{'' if len(self.tracks) == 1 else 's'}"
        return f"{len(self)} regions ({folds}), {tracks}, {self.info.in_words}"

    def rows(self, fold: str) -> npt.NDArray[np.int64]:
        """Row numbers of a fold, in the order of the regions.

        Raises:
            ConfigError: the dataset has no such fold.
        """
        found = np.flatnonzero(self.regions["fold"].to_numpy() == fold)
        if not found.size:
            raise ConfigError(
                "no region is in the fold",
                fold,
                where=self.folder,
                remedy=f"This dataset has the folds {sorted(set(self.regions['fold']))}",
            )
        return found

    def length_order(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The order of rows by the lengths of their sequences, so that batches of them have little padding."""
        return np.arange(len(rows)) if self.lengths is None else np.argsort(self.lengths[rows], kind="stable")

    def select_tracks(self, tracks: TrackTable) -> Dataset:
        """The same data with another track table of the same names (a subset, another scale, clip or squash)."""
        names = list(self.tracks.names)
        index = [names.index(name) for name in tracks.names]
        whole = index == list(range(len(names)))
        return replace(
            self,
            tracks=tracks,
            targets=self.targets if whole else self.targets[:, index],
            mask=self.mask if whole or self.mask is None else self.mask[:, index],
            halves=self.halves if whole or self.halves is None else self.halves[:, index],
        )

    @cached_property
    def _places(self) -> list[tuple[str, int, int, str]]:
        """Chromosome, start, end and strand of each region: a table takes a tenth of a millisecond for a row."""
        columns = (self.regions[name].tolist() for name in ("chrom", "start", "end", "strand"))
        return list(zip(*columns, strict=True))

    def interval(self, row: int, window: int | None = None) -> Interval:
        """The sequence window of a region: ``window`` bp centred on its target interval."""
        chrom, start, end, _ = self._places[row]
        return Interval(chrom, start, end).resize(window or self.info.window)

    def sequences(
        self,
        rows: Sequence[int] | npt.NDArray[np.int64],
        views: Sequence[View] | None = None,
        window: int | None = None,
    ) -> tuple[Codes, npt.NDArray[np.int64]]:
        """Base codes ``(rows, length)`` and true lengths ``(rows,)`` of regions, each in its view.

        Of donors the rows are stored sequences (``stored``), of which several regions may share one.
        """
        views = views or [FORWARD] * len(rows)
        if self.donors is not None:
            codes = self.donors.codes(np.asarray(rows, dtype=np.int64), views, window)
            return codes, np.full(len(codes), codes.shape[1], dtype=np.int64)
        if self.codes is not None and self.lengths is not None:
            lengths = np.asarray(self.lengths[rows], dtype=np.int64)
            codes = np.asarray(self.codes[rows])[:, : int(lengths.max(initial=1))]
        else:
            assert self.genome is not None  # one of the two is always there: open_dataset checks it
            intervals = [
                self.interval(int(row), window).shift(view.shift) for row, view in zip(rows, views, strict=True)
            ]
            codes = np.stack([self.genome.codes(interval) for interval in intervals])
            lengths = np.full(len(codes), codes.shape[1], dtype=np.int64)
            minus = np.array([self._places[row][3] == "-" for row in rows])
            codes[minus] = reverse_complement(codes[minus])
        reverse = np.array([view.reverse for view in views])
        if reverse.any():
            codes = codes.copy()
            codes[reverse] = reverse_complement(codes[reverse], lengths[reverse])
        return codes, lengths

    def stored_sample(self, stored: npt.NDArray[np.int64], views: Sequence[View]) -> Sample:
        """A batch of stored sequences: regions, or distinct haplotypes of donors, which alone have no targets."""
        if self.donors is None:
            return self.sample(stored, views)
        import torch

        codes, lengths = self.sequences(stored, views)
        nothing = torch.zeros(len(stored), len(self.tracks), self.info.bins)
        return Sample(
            torch.from_numpy(codes), torch.from_numpy(lengths), torch.from_numpy(stored), nothing, nothing > 0
        )

    @property
    def sequence_count(self) -> int:
        """How many sequences are stored: one per region, or the distinct haplotypes of donors."""
        return len(self) if self.donors is None else len(self.donors.sequences)

    def stored(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The stored sequences that regions are made of, each once."""
        return rows if self.donors is None else self.donors.of_rows(rows)

    def view_index(self, row: int) -> int:
        """What the drawing of views depends on: the region, of donors the gene, so that haplotypes are shared."""
        return row if self.donors is None else int(self.donors.gene[row])

    def raw_targets(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Raw sums per bin ``(rows, tracks, bins)``; NaN where missing or masked."""
        raw = np.array(self.targets[rows], dtype=np.float32)
        if self.mask is not None:
            raw[~np.asarray(self.mask[rows])] = np.nan
        return raw

    def squashed_targets(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Targets as the model sees them ``(rows, tracks, bins)``; NaN where missing or masked."""
        raw = self.raw_targets(rows)
        return np.asarray(squash(raw, self.tracks, self.info.bin_size), dtype=np.float32) if len(self.tracks) else raw

    def squashed_halves(
        self, rows: npt.NDArray[np.int64]
    ) -> tuple[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]], npt.NDArray[np.float64]] | None:
        """The signal of two random halves of the cells as a model would see each, and their depths in these rows.

        Returns:
            Both ``(rows, tracks, bins)``, NaN where missing, masked or not to be compared, and ``(2, tracks)``; None
            where they were not kept: other data, or rows for training.
        """
        held_out = (self.regions["fold"] != "train").to_numpy()
        if self.halves is None or not held_out[rows].all():
            return None
        first = np.asarray(self.halves[(np.cumsum(held_out) - 1)[rows]], dtype=np.float64)
        second = self.raw_targets(rows) - first
        first[np.isnan(second)] = np.nan
        depths = np.stack([np.nansum(half, axis=(0, 2)) for half in (first, second)])
        return (squash(first, self.tracks, self.info.bin_size), squash(second, self.tracks, self.info.bin_size)), depths

    def sample(
        self,
        rows: Sequence[int] | npt.NDArray[np.int64],
        views: Sequence[View] | None = None,
        window: int | None = None,
    ) -> Sample:
        """A batch of torch tensors; on the other strand the bins turn round and the strand pairs change places."""
        import torch

        rows = np.asarray(rows, dtype=np.int64)
        stored, seen, haplotypes = rows, tuple(views or [FORWARD] * len(rows)), None
        if self.donors is not None:
            arranged = self.donors.arrange(rows, seen)
            stored, seen, haplotypes = arranged.sequences, arranged.views, torch.from_numpy(arranged.haplotypes)
        codes, lengths = self.sequences(stored, seen, window)
        shown = np.column_stack([stored, [[view.reverse, view.shift] for view in seen]]).astype(np.int64)
        targets = self.squashed_targets(rows)
        if views is not None:
            reverse = np.array([view.reverse for view in views])
            targets[reverse] = targets[reverse][:, self.tracks.permutation, ::-1]
        known = ~np.isnan(targets)
        covariates: dict[str, torch.Tensor] = {}
        if self.covariates is not None:
            values = self.covariates.iloc[rows].to_numpy(dtype=np.float32, copy=True)
            covariates["covariates"] = torch.from_numpy(values)
        return Sample(
            codes=torch.from_numpy(np.ascontiguousarray(codes)),
            lengths=torch.from_numpy(lengths),
            row=torch.from_numpy(rows),
            targets=torch.from_numpy(np.where(known, targets, np.float32(0))),
            mask=torch.from_numpy(known),
            covariates=covariates,
            shown=torch.from_numpy(shown),
            haplotypes=haplotypes,
        )


def hash_file(path: Path) -> dict[str, Any]:
    """``{"path", "sha256", "bytes"}`` of a source file, as recorded in ``dataset.json``."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path.resolve()), "sha256": digest, "bytes": path.stat().st_size}


def check_new_folder(folder: Path) -> None:
    """Finds what would stop :func:`new_folder`, before anything is computed.

    Raises:
        RunError: the folder exists already or cannot be written.
    """
    if folder.exists():
        raise RunError("the output folder exists already", str(folder), remedy="Choose another name or remove it first")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what, remedy = f"the output folder cannot be made in {parent}", "Choose a folder that you can write to"
        raise RunError(what, str(folder), remedy=remedy)


@contextmanager
def new_folder(folder: Path, *, replace_existing: bool = False) -> Iterator[Path]:
    """Builds a folder in a hidden temporary sibling and publishes it by rename: nobody ever sees a half-written one.

    Raises:
        RunError: the folder exists (unless ``replace_existing``), cannot be written, or the disk is full.
    """
    folder = Path(folder)
    if not replace_existing:
        check_new_folder(folder)
    new_parents = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise RunError(
            f"the output folder cannot be made ({error.strerror})",
            str(folder),
            remedy="Choose a folder that you can write to",
        ) from error
    try:
        yield building
        # mkdtemp and safetensors keep files to their owner; a published folder is as open as any other new file
        for path in (building, *building.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        if folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            folder.rename(retired / "old")
            building.rename(folder)
            shutil.rmtree(retired)
        else:
            building.rename(folder)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the output could not be written ({getattr(error, 'strerror', None) or error})",
            str(folder),
            remedy="Free some disk space or check permissions; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        for parent in new_parents if not folder.exists() else ():
            with suppress(OSError):  # something else may be there by now
                parent.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def write_dataset(folder: Path, shape: tuple[int, int, int]) -> Iterator[DatasetWriter]:
    """Writes a prepared dataset of ``shape`` (regions, tracks, bins); nothing is left behind if it fails."""
    with new_folder(folder) as building:
        yield DatasetWriter(building, _new_array(building / "targets.npy", shape))


def _new_array(path: Path, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a sparse file on a full disk would kill the process at some later write
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


@dataclass(frozen=True)
class DatasetWriter:
    """Targets to fill (a memory map of raw sums), then one call of ``finish``."""

    folder: Path
    targets: npt.NDArray[np.float32]

    def new_halves(self, regions: int) -> npt.NDArray[np.float32]:
        """To fill for the regions that are not for training, in their order: sums of a random half of the cells."""
        return _new_array(self.folder / "halves.npy", (regions, *self.targets.shape[1:]))

    def finish(
        self,
        info: DatasetInfo,
        regions: pd.DataFrame,
        tracks: TrackTable,
        *,
        mask: npt.NDArray[np.bool_] | None = None,
        codes: Codes | None = None,
        lengths: npt.NDArray[np.int64] | None = None,
        covariates: pd.DataFrame | None = None,
    ) -> None:
        """Writes the tables beside the targets. NaN targets need no mask: they are missing."""
        missing = [column for column in REGION_COLUMNS if column not in regions]
        assert not missing, f"regions lack the columns {missing}"
        assert self.targets.shape == (len(regions), len(tracks), info.bins)
        if isinstance(self.targets, np.memmap):
            self.targets.flush()
        regions.reset_index(drop=True).to_parquet(self.folder / "regions.parquet")
        tracks.to_frame().to_parquet(self.folder / "tracks.parquet")
        if mask is not None and not mask.all():
            np.save(self.folder / "mask.npy", mask)
        if codes is not None and lengths is not None:
            np.save(self.folder / "codes.npy", codes)
            np.save(self.folder / "lengths.npy", np.asarray(lengths, dtype=np.int64))
        if covariates is not None:
            covariates.reset_index(drop=True).to_parquet(self.folder / "covariates.parquet")
        write_json(
            self.folder / "dataset.json",
            {"format": "seqgraft-dataset", "format_version": FORMAT_VERSION, **asdict(info)},
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes readable JSON by rename."""
    building = path.with_name(f".{path.name}.part")
    try:
        building.write_text(json.dumps(content, indent=2, default=str) + "\n")
        os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)


def open_dataset(folder: Path | str) -> Dataset:
    """Opens a prepared dataset and checks that its parts belong together.

    Raises:
        ConfigError: not a prepared dataset, or one of another format version.
        DataError: a part is missing, truncated or of another shape; the genome has changed.
    """
    folder = Path(folder)
    info, content = _read_info(folder)
    problems = Problems(DataError)
    arrays: dict[str, Any] = {}
    for name in ("targets", "mask", "codes", "lengths", "halves"):
        path = folder / f"{name}.npy"
        if path.exists():
            try:
                with path.open("rb") as file:  # np.load would also open a zip archive
                    np.lib.format.read_magic(file)
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                problems.add(
                    f"the array cannot be read ({error})", path.name, where=folder, remedy="Prepare the dataset again"
                )
        elif name == "targets":
            problems.add("the dataset has no targets", path.name, where=folder, remedy="Prepare the dataset again")
    tables: dict[str, pd.DataFrame] = {}
    for name in ("regions", "tracks", "covariates"):
        path = folder / f"{name}.parquet"
        if path.exists():
            try:
                tables[name] = pd.read_parquet(path)
            except (ValueError, OSError) as error:
                problems.add(
                    f"the table cannot be read ({error})", path.name, where=folder, remedy="Prepare the dataset again"
                )
        elif name != "covariates":
            problems.add("the dataset lacks a table", path.name, where=folder, remedy="Prepare the dataset again")
    problems.raise_if_any()
    tracks = TrackTable.none() if tables["tracks"].empty else TrackTable.of(tables["tracks"])
    whole = (len(tables["regions"]), len(tracks), info.bins)
    held_out = (int((tables["regions"]["fold"] != "train").sum()), *whole[1:])
    for name, expected in (("targets", whole), ("mask", whole), ("halves", held_out)):
        if name in arrays and arrays[name].shape != expected:
            problems.add(
                f"{name}.npy has another shape than the tables say, {expected}",
                arrays[name].shape,
                where=folder,
                remedy="Prepare the dataset again",
            )
    if info.genome is None and not {"codes", "lengths"} <= arrays.keys():
        problems.add(
            "the dataset has neither a genome nor stored sequences", where=folder, remedy="Prepare the dataset again"
        )
    problems.raise_if_any()
    genome = _open_genome(folder, content["genome"])
    return Dataset(
        folder=folder,
        info=info,
        tracks=tracks,
        regions=tables["regions"],
        targets=arrays["targets"],
        mask=arrays.get("mask"),
        genome=genome,
        codes=arrays.get("codes"),
        lengths=arrays.get("lengths"),
        covariates=tables.get("covariates"),
        donors=_open_donors(folder, info, tables["regions"], genome) if info.kind == "personal" else None,
        halves=arrays.get("halves"),
    )


def _open_donors(folder: Path, info: DatasetInfo, regions: pd.DataFrame, genome: Genome | None) -> Donors:
    try:
        assert genome is not None
        gene, donor = (regions[name].to_numpy(np.int64) for name in ("gene", "donor"))
        return open_donors(folder, genome, gene, donor, info.window)
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Prepare the dataset again"
        raise DataError(f"the donors of the dataset cannot be read ({error})", where=folder, remedy=remedy) from error


def _read_info(folder: Path) -> tuple[DatasetInfo, dict[str, Any]]:
    path = folder / "dataset.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            "this is not a prepared dataset", str(folder), remedy="Make one with 'seqgraft prepare data.yaml FOLDER'"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the file is not valid JSON ({error})", where=path, remedy="Prepare the dataset again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != "seqgraft-dataset":
        remedy = "Give a folder that 'seqgraft prepare' wrote"
        raise ConfigError("the file does not describe a prepared dataset", where=path, remedy=remedy)
    if content.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"the dataset has another format version than this seqgraft reads ({FORMAT_VERSION})",
            content.get("format_version"),
            where=path,
            remedy="Prepare it again with this version, or use the version that made it",
        )
    names = DatasetInfo.__dataclass_fields__
    return DatasetInfo(**{name: content[name] for name in names if name in content}), content


def _open_genome(folder: Path, recorded: Mapping[str, str] | None) -> Genome | None:
    if recorded is None:
        return None
    path = Path(recorded["path"])
    if not path.exists():
        raise DataError(
            "the genome that the dataset was prepared with is gone",
            str(path),
            where=folder / "dataset.json",
            remedy="Restore the FASTA file there, or prepare the dataset again",
        )
    genome = Genome.open(path)
    if genome.hash != recorded["hash"]:
        raise DataError(
            "the genome has changed since the dataset was prepared",
            str(path),
            where=folder / "dataset.json",
            remedy="Prepare the dataset again",
        )
    return genome
