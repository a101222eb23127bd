"""Predictions and embeddings to files: tables, zarr, bigWig.

Predictions leave on the *raw* scale (unsquashed): the sum of the signal over a bin, as ``targets.npy`` has it; for
labels the value itself (a probability, or the unit of the label). A bigWig holds the raw sum divided by the bin size
on every base of the bin, so that summing its bases over the same bins gives the raw sums back, whatever the track's
statistic; where regions overlap it holds the mean of their predictions. Every output appears only when complete.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from seqgraft.bigwig import Value, runs, write_bigwig
from seqgraft.data.dataset import Dataset, new_folder
from seqgraft.errors import ConfigError, Problems, RunError
from seqgraft.tracks import TrackTable, unsquash

__all__ = [
    "Batches",
    "check_arrays",
    "check_embeddings",
    "check_output",
    "write_arrays",
    "write_embeddings",
    "write_predictions",
]

#: What ``predict_batches`` yields: row numbers, and values ``(rows, tracks, bins)`` on the model's scale.
Batches = Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]
Raw = Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]

_BIGWIG = (".bw", ".bigwig")
_TABLES = (".parquet", ".csv", ".tsv")
FORMATS = (*_TABLES, ".zarr", *_BIGWIG)


def check_output(out: Path, dataset: Dataset) -> None:
    """Finds what would stop :func:`write_predictions`, before anything is computed; all problems at once.

    Raises:
        ConfigError: an unknown suffix, or a bigWig for sequences that have no place on a genome.
        RunError: the output exists already, its folder cannot be written, or zarr is not installed.
    """
    out = Path(out)
    suffix = out.suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(
            "the format of the output is unknown", out.name, remedy=f"End its name in {', '.join(FORMATS)}"
        )
    if suffix in _BIGWIG and (dataset.genome is None or not dataset.regions["chrom"].all()):
        raise ConfigError(
            "sequences without a place on a genome cannot be written as bigWig",
            out.name,
            remedy="Write .parquet, .csv or .zarr, or give the regions as BED",
        )
    problems = Problems(RunError)
    if suffix == ".zarr" and importlib.util.find_spec("zarr") is None:
        problems.add("writing zarr needs a package that is not installed", "zarr", remedy="Install 'seqgraft[zarr]'")
    _check_place(out, problems)
    problems.raise_if_any()


def write_predictions(out: Path, dataset: Dataset, batches: Batches, tracks: TrackTable) -> list[Path]:
    """Writes predictions as they come, in the format that the suffix of ``out`` names; returns the files.

    * ``.parquet``, ``.csv``, ``.tsv``: long form, one row per region, track and bin (a label is one bin): region (its
      row number), name, chrom, start, end (of the bin; without a genome these three are left out), track, value.
    * ``.zarr``: ``values`` (regions, tracks, bins) with the arrays ``region``, ``start`` and ``end`` (target intervals)
      and ``chrom`` (a number: position in the attribute "chroms"); names of tracks and regions are attributes.
    * ``.bw``: one bigWig, or a folder ``out.bw/`` with one ``NAME.bw`` per track where there are several. The raw
      values wait in a temporary file of 4 bytes per region, track and bin, so that regions may come in any order.

    Args:
        dataset: where the rows of ``batches`` are; also :func:`seqgraft.regions.regions_for_prediction`.
        batches: from :func:`seqgraft.predict.predict_batches`: ``(rows, values)`` on the model's scale.
        tracks: the axis of the values, ``model.tracks``.

    Raises:
        ConfigError, RunError: as :func:`check_output`; the disk is full.
    """
    out = Path(out)
    check_output(out, dataset)
    raw = ((rows, unsquash(np.asarray(v, np.float64), tracks, dataset.info.bin_size)) for rows, v in batches)
    suffix = out.suffix.lower()
    if suffix in _TABLES:
        return _write_table(out, (_long(dataset, tracks, rows, values) for rows, values in raw))
    if suffix == ".zarr":
        return _write_zarr(out, dataset, raw, tracks)
    return _write_bigwigs(out, dataset, raw, tracks)


def check_embeddings(out: Path) -> None:
    """Finds what would stop :func:`write_embeddings`, before anything is computed; errors as there."""
    out = Path(out)
    if out.suffix not in (".parquet", ".npz"):
        raise ConfigError(
            "the format of the embeddings is unknown", out.name, remedy="End its name in .parquet or .npz"
        )
    problems = Problems(RunError)
    _check_place(out, problems)
    problems.raise_if_any()


def write_embeddings(out: Path, dataset: Dataset, rows: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> Path:
    """Writes trunk features ``(rows, channels)`` beside their regions: ``.parquet`` (columns e0, e1, ...) or ``.npz``.

    Raises:
        ConfigError: another suffix.
        RunError: the output exists already or cannot be written.
    """
    out = Path(out)
    check_embeddings(out)
    table = _regions(dataset, rows)
    with _published(out) as part:
        if out.suffix == ".parquet":
            features = pd.DataFrame(values, columns=[f"e{channel}" for channel in range(values.shape[1])])
            pd.concat([table, features], axis=1).to_parquet(part, index=False)
        else:
            places = {str(c): table[c].to_numpy(np.int64 if table[c].dtype.kind in "iu" else str) for c in table}
            with part.open("wb") as file:
                np.savez(file, allow_pickle=False, embeddings=values, **places)
    return out


def check_arrays(out: Path) -> None:
    """Finds what would stop :func:`write_arrays`, before anything is computed; errors as there."""
    if Path(out).suffix != ".npz":
        raise ConfigError("the format of the output is unknown", Path(out).name, remedy="End its name in .npz")
    problems = Problems(RunError)
    _check_place(Path(out), problems)
    problems.raise_if_any()


def write_arrays(out: Path, write: Callable[[Path], None]) -> Path:
    """Lets ``write`` make an ``.npz``, which appears only when it is complete.

    Raises:
        ConfigError: another suffix.
        RunError: the output exists already or cannot be written.
    """
    check_arrays(out)
    with _published(Path(out)) as part:
        write(part)
    return Path(out)


def _check_place(out: Path, problems: Problems) -> None:
    if out.exists():
        problems.add("the output exists already", str(out), remedy="Choose another name or remove it first")
        return
    folder = next((parent for parent in out.absolute().parents if parent.exists()), Path("/"))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        problems.add("the output cannot be written there", str(out), remedy="Choose a folder that you can write to")


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A temporary sibling to write, which takes the name ``out`` when all went well and is removed when not."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        part.unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> RunError:
    remedy = "Free some disk space or check permissions; nothing was left behind"
    return RunError(f"the output could not be written ({error.strerror or error})", str(out), remedy=remedy)


def _regions(dataset: Dataset, rows: npt.NDArray[np.int64]) -> pd.DataFrame:
    """Row number, name and, where there is one, place of regions."""
    columns = ["name", "chrom", "start", "end"] if dataset.genome is not None else ["name"]
    table = dataset.regions.iloc[rows][columns].reset_index(drop=True)
    table.insert(0, "region", rows)
    return table


def _long(
    dataset: Dataset, tracks: TrackTable, rows: npt.NDArray[np.int64], values: npt.NDArray[np.float64]
) -> pd.DataFrame:
    regions, bins = _regions(dataset, rows), values.shape[-1]
    table = regions.loc[regions.index.repeat(len(tracks) * bins)].reset_index(drop=True)
    if dataset.genome is not None:
        size = dataset.info.bin_size
        table["start"] += np.tile(np.arange(bins) * size, len(rows) * len(tracks))
        table["end"] = table["start"] + size
    table["track"] = np.tile(np.repeat(np.array(tracks.names, dtype=object), bins), len(rows))
    table["value"] = values.astype(np.float32).ravel()
    return table


def _write_table(out: Path, frames: Iterator[pd.DataFrame]) -> list[Path]:
    with _published(out) as part:
        if out.suffix == ".parquet":
            _parquet(part, frames)
        else:
            with part.open("w", newline="") as file:
                for number, frame in enumerate(frames):
                    frame.to_csv(file, sep="," if out.suffix == ".csv" else "\t", index=False, header=number == 0)
    return [out]


def _parquet(part: Path, frames: Iterator[pd.DataFrame]) -> None:
    writer: pq.ParquetWriter | None = None
    try:
        for frame in frames:
            table = pa.Table.from_pandas(frame, preserve_index=False)
            writer = writer or pq.ParquetWriter(part, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _write_zarr(out: Path, dataset: Dataset, raw: Raw, tracks: TrackTable) -> list[Path]:
    import zarr

    chroms = sorted(set(dataset.regions["chrom"])) if dataset.genome is None else list(dataset.genome.chroms)
    attributes = {
        "format": "seqgraft-predictions",
        "format_version": 1,
        "tracks": tracks.names,
        "unit": "raw sum per bin" if dataset.info.bins > 1 else "raw value",
        "bin_size": dataset.info.bin_size,
        "chroms": chroms,
    }
    shape = (len(tracks), dataset.info.bins)
    with new_folder(out) as building:
        group = zarr.create_group(building, attributes=attributes)
        target = group.create_array("values", shape=(0, *shape), chunks=(_chunk(*shape), *shape), dtype="float32")
        seen: list[npt.NDArray[np.int64]] = []
        for rows, values in raw:
            target.append(values.astype(np.float32))
            seen.append(rows)
        regions = dataset.regions.iloc[np.concatenate(seen) if seen else []]
        numbers = {chrom: number for number, chrom in enumerate(chroms)}
        columns = regions.assign(region=regions.index, chrom=regions["chrom"].map(numbers))
        for name, column in columns[["region", "chrom", "start", "end"]].items():
            group.create_array(str(name), data=np.asarray(column, dtype=np.int64))
        group.attrs["names"] = regions["name"].tolist()
    return [out]


def _chunk(tracks: int, bins: int) -> int:
    """Regions per chunk of about a megabyte."""
    return max(1, (1 << 18) // (tracks * bins))


def _write_bigwigs(out: Path, dataset: Dataset, raw: Raw, tracks: TrackTable) -> list[Path]:
    assert dataset.genome is not None  # check_output saw to it
    lengths = dataset.genome.chroms
    scale = 1.0 if dataset.info.kind == "labelled" else 1.0 / dataset.info.bin_size
    with _spooled(out, dataset, raw, len(tracks)) as (regions, spool):
        signals = [
            _signal(regions, spool, track, scale, dataset.info.bin_size, lengths) for track in range(len(tracks))
        ]
        if len(tracks) == 1:
            write_bigwig(out, lengths, signals[0])
            return [out]
        names = _file_names(tracks)
        with new_folder(out) as building:
            for name, signal in zip(names, signals, strict=True):
                write_bigwig(building / name, lengths, signal)
        return [out / name for name in names]


@contextmanager
def _spooled(
    out: Path, dataset: Dataset, raw: Raw, tracks: int
) -> Iterator[tuple[pd.DataFrame, npt.NDArray[np.float32]]]:
    """All values in a temporary file ``(regions, tracks, bins)`` and their regions, in the order of the genome."""
    assert dataset.genome is not None
    shape = (tracks, dataset.info.bins)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            path, seen = Path(folder) / "values", []
            with path.open("wb") as file:
                for rows, values in raw:
                    file.write(np.ascontiguousarray(values, dtype=np.float32).tobytes())
                    seen.append(rows)
            regions = dataset.regions.iloc[np.concatenate(seen) if seen else []].reset_index(drop=True)
            order = {chrom: number for number, chrom in enumerate(dataset.genome.chroms)}
            keys = [regions["start"].to_numpy(np.int64), regions["chrom"].map(order).to_numpy()]
            regions = regions.iloc[np.lexsort(keys)]
            empty = np.zeros((0, *shape), dtype=np.float32)
            yield regions, np.memmap(path, dtype=np.float32, mode="r", shape=(len(regions), *shape)) if seen else empty
    except OSError as error:
        raise _unwritable(out, error) from error


def _signal(
    regions: pd.DataFrame,
    values: npt.NDArray[np.float32],
    track: int,
    scale: float,
    bin_size: int,
    lengths: Mapping[str, int],
) -> Iterator[Value]:
    """Signal per base of one track: sorted regions ``(chrom, start)`` to runs, the mean where regions overlap.

    Only the stretch that a later region can still reach is held: one region's length, in steps of the common grid.
    """
    for chrom, block in regions.groupby("chrom", sort=False):
        starts = block["start"].to_numpy(np.int64)
        step = math.gcd(bin_size, *(starts - starts[0]).tolist())
        fine = bin_size // step
        width = values.shape[-1] * fine
        total, count = np.zeros(width), np.zeros(width)
        origin = int(starts[0])
        for start, index in zip(starts.tolist(), block.index.tolist(), strict=True):
            done = min((start - origin) // step, width)
            if done:
                yield from _runs(str(chrom), total[:done], count[:done], step, origin, lengths[str(chrom)])
                for array in (total, count):
                    array[: -done or None] = array[done:]
                    array[width - done :] = 0
                origin = start
            total += np.repeat(values[index, track].astype(np.float64) * scale, fine)
            count += 1
        yield from _runs(str(chrom), total, count, step, origin, lengths[str(chrom)])


def _runs(
    chrom: str, total: npt.NDArray[np.float64], count: npt.NDArray[np.float64], step: int, start: int, length: int
) -> Iterator[Value]:
    mean = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    for _, left, right, value in runs(chrom, mean, step, start):
        left, right = max(left, 0), min(right, length)
        if left < right and not math.isnan(value):
            yield chrom, left, right, value


def _file_names(tracks: TrackTable) -> list[str]:
    """``NAME.bw`` for each track; characters that a file name should not have become ``_``."""
    names: list[str] = []
    for name in tracks.names:
        safe = re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "track"
        taken = {other.lower() for other in names}
        number = 1
        while f"{safe}.bw".lower() in taken:
            number += 1
            safe = f"{safe.removesuffix(f'_{number - 1}')}_{number}"
        names.append(f"{safe}.bw")
    return names
