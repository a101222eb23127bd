"""Labelled sequences: tables and FASTA files with classes or measurements -> a prepared dataset, one bin per region."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import pandas as pd

from seqgraft.data.covariates import Covariates, standardise
from seqgraft.data.dataset import Dataset, DatasetInfo, hash_file, open_dataset, write_dataset
from seqgraft.data.duplicates import (
    DuplicatePolicy,
    copied_rows,
    duplicate_links,
    find_duplicates,
    resolve_duplicates,
)
from seqgraft.data.folds import FoldPlaces, Folds, assign_folds
from seqgraft.data.labels import Label, Target, class_weights, read_label, track_table
from seqgraft.data.tables import fasta_records
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.genome import Genome, Interval, match_chroms
from seqgraft.progress import progress
from seqgraft.sequence import PAD, Codes, count_unknown, encode, reverse_complement

__all__ = ["LabelledFile", "LabelledRows", "LabelledSource", "prepare_labelled", "write_labelled"]


@dataclass(frozen=True, slots=True)
class LabelledFile:
    """One file: .csv, .tsv, .parquet or FASTA, plain or gzipped; every row may get the same ``label`` or ``fold``.

    FASTA headers are ``>name label`` or ``>name|label``, or only a name where ``label`` is given here. Of a large file,
    ``rows`` takes so many rows at most, drawn without replacement with the seed of the folds.
    """

    path: Path
    label: str | None = None
    fold: str | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise ConfigError("a file gives at least one row", self.rows, where="files.rows", remedy="Leave it out")


@dataclass(frozen=True, slots=True)
class LabelledSource:
    """Where labelled sequences come from.

    Sequences are the joined texts of the columns ``sequence``; or, with a ``genome``, the places in the columns
    ``interval`` (chrom, start, end and optionally strand; 0-based, half-open), resized around their centre to
    ``window`` bp. Sequences longer than ``max_length`` are an error unless ``keep`` says which part of them stays.
    More than ``max_unknown`` (a share) of N and IUPAC letters is an error. What the heads see beside the sequence are
    the numbers in the columns ``covariates``, the shares of the 61 sense codons in the coding sequences of the column
    ``codons`` and log10 of the lengths of the sequences in the columns ``lengths``. ``class_weights: balanced`` records
    a weight for the positives of every sigmoid track (negatives / positives) and for every softmax class (rows /
    classes / rows of the class), counted on training rows.
    """

    files: tuple[LabelledFile, ...]
    labels: tuple[Label, ...] = (Label(),)
    sequence: tuple[str, ...] = ("sequence",)
    genome: Path | None = None
    interval: tuple[str, ...] = ("chrom", "start", "end")
    window: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    covariates: tuple[str, ...] = ()
    codons: str | None = None
    lengths: tuple[str, ...] = ()
    folds: Folds = field(default_factory=Folds)
    duplicates: DuplicatePolicy = "refuse"
    max_length: int | None = None
    keep: Literal["start", "centre", "end"] | None = None
    max_unknown: float = 0.01
    class_weights: Literal["none", "balanced"] = "none"

    def __post_init__(self) -> None:
        problems = Problems(ConfigError)
        for setting in ("files", "labels", "sequence"):
            if not getattr(self, setting):
                problems.add("the list is empty", where=setting, remedy="Name at least one")
        if len(self.interval) not in (3, 4):
            remedy = "Name the columns of chrom, start, end and, if there is one, strand"
            problems.add("an interval has three or four columns", list(self.interval), where="interval", remedy=remedy)
        if self.genome is None and (self.window is not None or self.rename):
            remedy = "Add genome: genome.fa, or leave window and rename out"
            problems.add("windows and renamed chromosomes need a genome", where="window, rename", remedy=remedy)
        if self.genome is not None and (self.max_length or self.keep):
            remedy = "Use window: for sequences from a genome"
            problems.add("intervals are not truncated", where="max_length, keep", remedy=remedy)
        for setting in ("window", "max_length"):
            value = getattr(self, setting)
            if value is not None and value < 1:
                problems.add("the length is not positive", value, where=setting, remedy="Give base pairs, 1 or more")
        if not 0 <= self.max_unknown <= 1:
            remedy = "Give a number from 0 to 1"
            problems.add("this is not a share of the bases", self.max_unknown, where="max_unknown", remedy=remedy)
        if self.duplicates == "group" and self.folds.by in ("chromosome", "trunk"):
            remedy = "Use duplicates: drop, or folds by random, kfold or cluster"
            what = f"folds by {self.folds.by} cannot be split to group duplicates"
            problems.add(what, where="duplicates", remedy=remedy)
        problems.raise_if_any()

    @property
    def columns(self) -> list[str]:
        """Every column that is read, once each; the columns label and fold may come from the file's own entry."""
        place = self.sequence if self.genome is None else self.interval
        labels = (column for label in self.labels for column in label.columns)
        named = [*place, *labels, *self.covariate_columns.columns]
        extra = [*self.fold_columns, *([self.name] if self.name is not None else [])]
        return list(dict.fromkeys([*named, *extra]))

    @property
    def covariate_columns(self) -> Covariates:
        """What the heads see beside the sequence."""
        return Covariates(self.covariates, self.codons, self.lengths)

    @property
    def fold_columns(self) -> list[str]:
        """The columns that folds are made of; with a genome, the chromosomes come from the intervals."""
        folds = self.folds
        default = {"chromosome": "chrom" if self.genome is None else None, "column": "fold"}.get(folds.by)
        return [column for column in (folds.column or default, folds.group) if column is not None]


def prepare_labelled(source: LabelledSource, folder: Path) -> Dataset:
    """Read, check, audit and write a prepared dataset.

    The duplicates that were found are listed beside ``folder``, in ``NAME.duplicates.tsv``.

    Raises:
        DataError: bad rows (all of them at once), folds that overlap or are empty, or copies across folds.
    """
    table = _read_files(source)
    places = [f"{name} row {row}" for name, row in zip(table["source"], table["source_row"], strict=True)]
    problems = Problems(DataError)
    targets = [read_label(table, label, places, problems) for label in source.labels]
    covariates, irregular = source.covariate_columns.read(table, places, problems)
    settings = {**asdict(source), "labels": [asdict(target.label) for target in targets]}
    rows = LabelledRows(table, places, targets, covariates, irregular, settings)
    return write_labelled(rows, source, folder, problems)


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """What sources of labelled sequences end in.

    Attributes:
        table: the columns of sequences or intervals and those that folds name, with name, source and source_row.
        places: where each row was read, for messages.
        targets: with values ``(rows, tracks)``.
        covariates: a column for each, or none.
        notes: what is worth telling.
        settings: to be recorded.
    """

    table: pd.DataFrame
    places: Sequence[str]
    targets: Sequence[Target]
    covariates: pd.DataFrame
    notes: Mapping[str, Any]
    settings: Mapping[str, Any]


def write_labelled(rows: LabelledRows, source: LabelledSource, folder: Path, problems: Problems) -> Dataset:
    """Place, audit and write rows that were read; ``problems`` are those found so far.

    Raises:
        DataError: as :func:`prepare_labelled`.
    """
    folder = Path(folder)
    table, places = rows.table, rows.places
    genome = Genome.open(source.genome) if source.genome is not None else None
    regions = _regions(table, source, genome, places, problems)
    problems.raise_if_any()
    sequences, notes = _read_sequences(table, regions, source, genome, places)
    links = duplicate_links(sequences) if source.duplicates == "group" else None
    fold_columns = [column for column in source.fold_columns if column in table]
    foldable = regions.drop(columns=fold_columns, errors="ignore").join(table[fold_columns])
    in_genome = FoldPlaces(genome, rename=source.rename, notes=notes)
    regions["fold"] = assign_folds(foldable, source.folds, together=links, places=in_genome)
    report = find_duplicates(sequences, regions["fold"])
    listing = folder.with_name(f"{folder.name}.duplicates.tsv")
    keep = resolve_duplicates(report, source.duplicates, len(regions), places, listing)
    kept = np.flatnonzero(keep)
    notes |= {**rows.notes, "duplicates": report.summary(), "duplicates_dropped": len(regions) - len(kept)}
    regions = regions.iloc[kept].assign(copied=copied_rows(report, keep)).reset_index(drop=True)
    targets = [replace(target, values=target.values[kept]) for target in rows.targets]
    train = np.flatnonzero(regions["fold"] == "train")
    tracks = track_table(targets, train)
    values = np.concatenate([target.values for target in targets], axis=1)
    notes["rows_without_labels"] = int(np.isnan(values).all(axis=1).sum())
    scaled, scaling = standardise(rows.covariates.iloc[kept], train, source.covariates)
    settings = {
        **rows.settings,
        "class_weights": class_weights(targets, train) if source.class_weights == "balanced" else {},
        "covariate_scaling": scaling,
    }
    lengths = np.array([sequences[row].size for row in kept], dtype=np.int64)
    width = int(lengths.max()) if (lengths == lengths.max()).all() else 0
    info = DatasetInfo(
        kind="labelled",
        window=width,
        bins=1,
        bin_size=width,
        genome={"path": str(genome.path), "hash": genome.hash} if genome is not None else None,
        sources=[hash_file(file.path) for file in source.files],
        settings=settings,
        notes=notes,
    )
    with write_dataset(folder, (len(kept), len(tracks), 1)) as writer:
        writer.targets[:, :, 0] = values
        more = scaled if len(scaled.columns) else None
        if genome is None:
            codes = _pad([sequences[row] for row in kept], int(lengths.max()))
            writer.finish(info, regions, tracks, codes=codes, lengths=lengths, covariates=more)
        else:
            writer.finish(info, regions, tracks, covariates=more)
    return open_dataset(folder)


# Files


def _read_files(source: LabelledSource) -> pd.DataFrame:
    """All rows as text (missing ones as they stand), with source (file name), source_row (from 1) and name."""
    problems = Problems(DataError)
    tables = []
    for file in source.files:
        table = _read_table(file)
        given = {name: value for name, value in (("label", file.label), ("fold", file.fold)) if value is not None}
        for name, value in given.items():
            if name in table:
                remedy = f"Leave {name}: out of the file's entry, or drop the column"
                problems.add(f"the file has a column {name!r} already", where=file.path, remedy=remedy)
            table[name] = value
        for column in source.columns:
            if column not in table:
                remedy = f"It has {', '.join(map(str, table.columns))}"
                problems.add("the file has no column", column, where=file.path, remedy=remedy)
        if not len(table):
            problems.add("the file has no rows", where=file.path, remedy="Check the file, or leave it out")
        named = table.get(source.name or "name")
        rows = np.arange(1, len(table) + 1)
        table = table.reindex(columns=source.columns)
        table["name"] = [f"{file.path.name}:{row}" for row in rows] if named is None else named
        table["source"], table["source_row"] = file.path.name, rows
        if file.rows is not None and file.rows < len(table):
            drawn = np.random.default_rng(source.folds.seed).choice(len(table), file.rows, replace=False)
            table = table.iloc[np.sort(drawn)]
        tables.append(table)
    problems.raise_if_any()
    return pd.concat(tables, ignore_index=True)


def _read_table(file: LabelledFile) -> pd.DataFrame:
    path = file.path
    suffix = path.with_suffix("").suffix if path.suffix in (".gz", ".bgz") else path.suffix
    readers: dict[str, Callable[[], pd.DataFrame]] = {
        **dict.fromkeys([".csv"], lambda: _read_delimited(path, ",")),
        **dict.fromkeys([".tsv", ".txt", ".tab"], lambda: _read_delimited(path, "\t")),
        **dict.fromkeys([".fa", ".fasta", ".fna"], lambda: _read_fasta(file)),
        **dict.fromkeys([".parquet", ".pq"], lambda: _as_text(pd.read_parquet(path))),
    }
    if suffix not in readers:
        raise ConfigError("the kind of file is unknown", path.name, where="files", remedy=f"Use {', '.join(readers)}")
    if not path.is_file():
        raise DataError("the file does not exist", where=path, remedy="Check the path")
    try:
        return readers[suffix]()
    except (ValueError, OSError, EOFError, zlib.error, csv.Error) as error:
        remedy = "It may be truncated or of another kind than its name says; copy or write it again"
        raise DataError(f"the file cannot be read ({error})", where=path, remedy=remedy) from error


def _read_delimited(path: Path, separator: str) -> pd.DataFrame:
    problems = Problems(DataError)
    csv.field_size_limit(1 << 30)  # a cell may hold a chromosome
    with _open_text(path) as lines:
        header, *rows = [row for row in csv.reader(lines, delimiter=separator, skipinitialspace=True) if row] or [[]]
    for name in sorted({name for name in header if header.count(name) > 1}):
        problems.add("two columns have one name", name, where=path, remedy="Rename one of them")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            remedy = f"Write all {len(header)} columns in every row; leave a missing value empty"
            problems.add("the row has another number of columns", len(row), where=f"{path} row {number}", remedy=remedy)
    problems.raise_if_any()
    return pd.DataFrame(rows, columns=pd.Index(header), dtype=str)


def _open_text(path: Path) -> IO[str]:
    opener = gzip.open if path.suffix in (".gz", ".bgz") else open
    return cast("IO[str]", opener(path, "rt", encoding="utf-8-sig", newline=""))


def _as_text(table: pd.DataFrame) -> pd.DataFrame:
    """Whole numbers lose their point (a column of integers with gaps is read as floats), gaps become empty."""
    texts = {}
    for column in table:
        values = table[column]
        if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
            values = values.astype("Int64")
        texts[column] = values.astype(str).where(values.notna(), "")
    return pd.DataFrame(texts, dtype=str)


def _read_fasta(file: LabelledFile) -> pd.DataFrame:
    """Columns name, sequence and, unless the file's entry has it, label."""
    with _open_text(file.path) as lines:
        records = list(fasta_records(lines, file.path))
    rows = []
    for number, (header, sequence) in enumerate(records, start=1):
        if file.label is not None:
            rows.append({"name": header.split()[0] if header.split() else "", "sequence": sequence})
            continue
        name, _, label = header.rpartition("|") if "|" in header else header.partition(" ")
        if not label.strip():
            remedy = "Write '>name label' or '>name|label', or give the file a label: in its entry"
            raise DataError("the header has no label", header, where=f"{file.path} row {number}", remedy=remedy)
        rows.append({"name": name.strip(), "sequence": sequence, "label": label.strip()})
    return pd.DataFrame(rows, columns=["name", "sequence"] if file.label is not None else ["name", "sequence", "label"])


# Sequences


def _regions(
    table: pd.DataFrame, source: LabelledSource, genome: Genome | None, places: Sequence[str], problems: Problems
) -> pd.DataFrame:
    """chrom, start, end, strand, name, source, source_row and the columns that folds are made of."""
    reserved = ["chrom", "start", "end", "strand", "name", "source", "source_row"]
    more = [column for column in source.fold_columns if column not in reserved]
    regions = table[["name", "source", "source_row", *more]].copy()
    if genome is None:
        return regions.assign(chrom="", start=0, end=0, strand="+")
    chrom, start, end, *strand = (table[column] for column in source.interval)
    rows = []
    for values in zip(places, chrom, start, end, strand[0] if strand else ["+"] * len(table), strict=True):
        place, name, first, last, side = (str(value).strip() for value in values)
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)) or side not in ("+", "-", "."):
            remedy = "Give 0-based start, larger end, and strand +, - or ."
            problems.add("this is not an interval", f"{name}:{first}-{last} {side}", where=place, remedy=remedy)
            continue
        interval = Interval(source.rename.get(name, name), int(first), int(last), side)
        rows.append(interval.resize(source.window) if source.window else interval)
    problems.raise_if_any()
    match_chroms((interval.chrom for interval in rows), genome, "interval")
    widths = {interval.length for interval in rows}
    if len(widths) > 1:
        problems.add(
            f"intervals have different lengths, from {min(widths)} to {max(widths)} bp",
            where=f"columns {', '.join(source.interval)}",
            remedy="Set window: to give all of them one length around their centres",
        )
    placed = pd.DataFrame([asdict(interval) for interval in rows])
    return regions.join(placed)


def _read_sequences(
    table: pd.DataFrame, regions: pd.DataFrame, source: LabelledSource, genome: Genome | None, places: Sequence[str]
) -> tuple[list[Codes], dict[str, Any]]:
    """The base codes of every row, and what was done to them."""
    problems = Problems(DataError)
    sequences: list[Codes] = []
    if genome is None:
        columns = [table[column].tolist() for column in source.sequence]
        for place, *texts in progress(zip(places, *columns, strict=True), "sequences", len(table)):
            sequences.append(_encode_row(texts, source.sequence, place, problems))
    else:
        for chrom, start, end, strand in regions[["chrom", "start", "end", "strand"]].itertuples(index=False):
            codes = genome.codes(Interval(chrom, start, end))
            sequences.append(reverse_complement(codes) if strand == "-" else codes)
    problems.raise_if_any()
    truncated = 0
    if source.max_length is not None:
        sequences, truncated = _truncate(sequences, source.max_length, source.keep, places)
    unknown = np.array([count_unknown(codes) for codes in sequences])
    total = sum(codes.size for codes in sequences)
    if unknown.sum() > source.max_unknown * total:
        worst = int(unknown.argmax())
        raise DataError(
            f"{unknown.sum()} of {total} bases ({unknown.sum() / total:.1%}) are N or other IUPAC letters; "
            f"the most, {unknown[worst]}, are in",
            places[worst],
            where="sequences",
            remedy=f"Leave such sequences out, or raise max_unknown (now {source.max_unknown})",
        )
    return sequences, {"bases": total, "unknown_bases": int(unknown.sum()), "truncated_sequences": truncated}


def _encode_row(texts: Sequence[str], columns: Sequence[str], place: str, problems: Problems) -> Codes:
    parts = []
    for text, column in zip(texts, columns, strict=True):
        try:
            parts.append(encode(text.strip()))
        except DataError as error:
            where = f"{place}, column {column!r}, {str(error).partition(':')[0]}"
            problems.add(error.what, error.value, where=where, remedy=error.remedy)
    codes: Codes = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
    if not codes.size and len(parts) == len(columns):
        problems.add("the sequence is empty", where=place, remedy="Fill it in or leave the row out")
    return codes


def _truncate(
    sequences: list[Codes], longest: int, keep: Literal["start", "centre", "end"] | None, places: Sequence[str]
) -> tuple[list[Codes], int]:
    lengths = np.array([codes.size for codes in sequences])
    over = int((lengths > longest).sum())
    if over and keep is None:
        raise DataError(
            f"{over} sequences are longer than max_length, {longest} bp; the longest ({lengths.max()} bp) is",
            places[int(lengths.argmax())],
            where="sequences",
            remedy="Set keep: start, centre or end to truncate them, or raise max_length",
        )
    first = {"start": 0 * lengths, "centre": (lengths - longest) // 2, "end": lengths - longest, None: 0 * lengths}[
        keep
    ]
    first = np.maximum(first, 0)
    return [codes[at : at + longest] for codes, at in zip(sequences, first, strict=True)], over


def _pad(sequences: Sequence[Codes], width: int) -> Codes:
    padded = np.full((len(sequences), width), PAD, dtype=np.uint8)
    for row, codes in enumerate(sequences):
        padded[row, : codes.size] = codes
    return padded
