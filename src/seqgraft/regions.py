"""What to predict: intervals of a genome, or sequences of one's own, as a dataset in memory without targets."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.covariates import Covariates, scale
from seqgraft.data.dataset import Dataset, DatasetInfo
from seqgraft.data.tables import fasta_records
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.genome import Genome, read_bed_on
from seqgraft.sequence import PAD, Codes, encode
from seqgraft.tracks import TrackTable

__all__ = ["regions_for_prediction"]

_FASTA = (".fa", ".fasta", ".fna")
_TABLES = (".csv", ".tsv", ".parquet")


def regions_for_prediction(
    path: Path, info: DatasetInfo, tracks: TrackTable, genome: Genome | None = None, covariates: Sequence[str] = ()
) -> Dataset:
    """The rows of a file as a dataset that :func:`seqgraft.predict.predict_batches` reads; every target is missing.

    * BED (``.bed``, ``.narrowPeak``; also gzipped) with ``genome``: each region's target interval has the model's
      length, ``bins * bin_size`` bp, around the centre of the BED interval, whatever that one's length. Its ``strand``
      turns the sequence for labels; coverage is predicted on the forward strand always. The interval as it was given
      stays in the columns ``bed_start`` and ``bed_end``.
    * Sequences: FASTA, or a CSV, TSV or Parquet table with a column ``sequence`` (and ``name``, if there is one).
      Coverage needs sequences of exactly ``info.window`` bp; labels take shorter ones too, and of any length if the
      window is 0 (variable).

    Args:
        path: the file; its suffix tells the format.
        info: of the dataset that the model was fitted to: window, bins, bin size, kind; and, in its settings, what
            covariates are read or computed from, and how they are scaled.
        tracks: ``model.tracks``.
        genome: for BED.
        covariates: names of those that the model's heads need, in their order.

    Raises:
        ConfigError: an unknown suffix, a BED without a genome, covariates that the file cannot have.
        DataError: no such file, no rows, unknown chromosomes, intervals outside their contig, letters that are not
            bases, sequences of a length that does not fit; all rows at once.
    """
    path = Path(path)
    suffix = path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if suffix not in (".bed", ".narrowpeak", *_FASTA, *_TABLES):
        known = ", ".join((".bed", ".narrowPeak", *_FASTA, *_TABLES))
        raise ConfigError("the format of the regions is unknown", path.name, remedy=f"End its name in {known}")
    if covariates and suffix not in _TABLES:
        raise ConfigError(
            "the model needs covariates, which only a table of sequences can have",
            _columns(info, covariates).columns,
            where=path,
            remedy="Give a CSV with a column 'sequence' and these columns",
        )
    if not path.is_file():
        raise DataError("the file does not exist", where=path, remedy="Check the path")
    if suffix in (".bed", ".narrowpeak"):
        if genome is None:
            raise ConfigError(
                "intervals need a genome", where=path, remedy="Give the FASTA that they refer to, or sequences"
            )
        return _of_bed(path, info, tracks, genome)
    if suffix in _FASTA:
        return _of_sequences(path, pd.DataFrame(_read_fasta(path), columns=["name", "sequence"]), info, tracks, ())
    return _of_sequences(path, _read_table(path, suffix), info, tracks, covariates)


def _of_bed(path: Path, info: DatasetInfo, tracks: TrackTable, genome: Genome) -> Dataset:
    if not info.window:
        remedy = "Give sequences instead: FASTA, or a CSV with a column 'sequence'"
        raise ConfigError(
            "the model takes sequences of any length, so intervals have no window", where=path, remedy=remedy
        )
    table = read_bed_on(path, genome)
    length = info.bins * info.bin_size
    start = table["start"] + (table["end"] - table["start"] - length) // 2  # as Interval.resize
    strand = table["strand"] if info.kind == "labelled" else "."
    regions = pd.DataFrame(
        {"chrom": table["chrom"], "start": start, "end": start + length, "strand": strand, "name": table["name"]}
    ).assign(fold="predict", bed_start=table["start"], bed_end=table["end"])
    recorded = {"path": str(genome.path), "hash": genome.hash}
    return _dataset(path, replace(info, genome=recorded), tracks, regions, genome=genome)


def _read_fasta(path: Path) -> list[tuple[str, str]]:
    records = enumerate(fasta_records(_lines(path), path), start=1)
    return [(header.split()[0] if header else f"sequence_{number}", letters) for number, (header, letters) in records]


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt") if path.suffix.lower() == ".gz" else path.open() as file:
            for line in file:
                yield line.strip()
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"the file cannot be read ({error})", where=path, remedy="Copy it again; it may be truncated"
        ) from error


def _read_table(path: Path, suffix: str) -> pd.DataFrame:
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, sep="," if suffix == ".csv" else "\t", keep_default_na=False)
    except (ValueError, OSError) as error:
        raise DataError(f"the table cannot be read ({error})", where=path, remedy="Give CSV, TSV or Parquet") from error


def _of_sequences(
    path: Path, table: pd.DataFrame, info: DatasetInfo, tracks: TrackTable, covariates: Sequence[str]
) -> Dataset:
    problems = Problems(DataError)
    for column in ("sequence", *_columns(info, covariates).columns):
        if column not in table:
            problems.add(
                "the table has no column", column, where=path, remedy=f"It has {', '.join(map(str, table.columns))}"
            )
    problems.raise_if_any()
    if table.empty:
        raise DataError("the file has no sequences", where=path, remedy="Give at least one")
    encoded: list[Codes] = []
    exact = info.kind != "labelled"
    for number, sequence in enumerate(table["sequence"], start=1):
        where = f"{path} sequence {number}"
        try:
            codes = encode(sequence.strip() if isinstance(sequence, str) else "")
        except DataError as error:
            problems.add(error.what, error.value, where=f"{where}, {error.where}", remedy=error.remedy)
            continue
        if not len(codes):
            problems.add("the sequence is empty", where=where, remedy="Remove the row")
        elif info.window and (len(codes) > info.window or (exact and len(codes) != info.window)):
            what = f"the model takes {'exactly' if exact else 'at most'} {info.window} bp, and this sequence has"
            problems.add(
                what, len(codes), where=where, remedy="Cut it to that length" if not exact else "Cut or extend it"
            )
        encoded.append(codes)
    values = _covariates(table, covariates, info, path, problems)
    problems.raise_if_any()
    lengths = np.array([len(codes) for codes in encoded], dtype=np.int64)
    padded = np.full((len(encoded), max(info.window, int(lengths.max()))), PAD, dtype=np.uint8)
    for row, codes in zip(padded, encoded, strict=True):
        row[: len(codes)] = codes
    names = table["name"].astype(str) if "name" in table else [f"sequence_{n}" for n in range(1, len(table) + 1)]
    regions = pd.DataFrame({"chrom": "", "start": 0, "end": 0, "strand": "+", "name": names, "fold": "predict"})
    dataset = _dataset(path, replace(info, genome=None), tracks, regions)
    return replace(dataset, codes=padded, lengths=lengths, covariates=values)


def _columns(info: DatasetInfo, covariates: Sequence[str]) -> Covariates:
    """What the covariates are read or computed from."""
    known = "covariate_scaling" in info.settings and covariates
    return Covariates.of(info.settings) if known else Covariates(tuple(covariates))


def _covariates(
    table: pd.DataFrame, covariates: Sequence[str], info: DatasetInfo, path: Path, problems: Problems
) -> pd.DataFrame | None:
    if not covariates:
        return None
    places = [f"{path} sequence {number}" for number in range(1, len(table) + 1)]
    values, _ = _columns(info, covariates).read(table, places, problems)
    scaling = info.settings.get("covariate_scaling")
    return (scale(values, scaling) if scaling else values)[list(covariates)]


def _dataset(
    path: Path, info: DatasetInfo, tracks: TrackTable, regions: pd.DataFrame, genome: Genome | None = None
) -> Dataset:
    shape = (len(regions), len(tracks), info.bins)
    missing: npt.NDArray[np.float32] = np.broadcast_to(np.float32(np.nan), shape)  # takes no memory
    return Dataset(path, info, tracks, regions, missing, None, genome, None, None, None)
