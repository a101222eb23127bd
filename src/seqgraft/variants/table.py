"""Scores on disk: parts that survive a kill, then one Parquet table or an annotated VCF.

::

    OUT.parts/
      manifest.json     what must be equal to continue: run, VCF, genome, settings, shard
      000000.parquet    scores of one chunk of variants, in file order; each appears when it is whole
      joined            the output while it is put together

The table has one row per variant, scorer and, where it is read over genes or regions, each of them: chrom, position,
ref, alt, id, scorer, the further columns, then one column per track, and for each group of tracks with several
conditions which of these the variant affects most (``Mark``). The VCF is the one that was read, with one more
INFO field per scorer: for each ALT the values of all tracks, joined by ``|`` ("." for an ALT that was skipped); over
genes or regions ``NAME:values`` joined by ``&``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from seqgraft.data.dataset import hash_file, write_json
from seqgraft.errors import ConfigError, DataError, RunError, SeqgraftError
from seqgraft.genome import Variant, vcf_text, write_vcf
from seqgraft.models.base import SequenceModel
from seqgraft.models.masked import MaskedModel
from seqgraft.progress import progress, steps
from seqgraft.variants.alleles import AlleleCheck, Checked, check_vcf
from seqgraft.variants.likelihood import LikelihoodScorer
from seqgraft.variants.marks import Mark, marks_of
from seqgraft.variants.place import Layout
from seqgraft.variants.score import Scores, VariantConfig, VariantScorer

__all__ = ["Parts", "Scored", "Table", "check_output", "score_vcf", "skipped_path"]

FORMAT_VERSION = 1
LARGEST_CHUNK = 1024  # variants per part, fewer where the windows are long

_SUFFIXES = (".parquet", ".vcf.gz")
_COLUMNS = ("chrom", "position", "ref", "alt", "id", "scorer")
_PLACES = ("row", "allele")  # of the record in the file; in the parts only
_AFFECTED = ("_most_affected", "_margin")  # ends of the INFO fields and columns of marks


def check_output(out: Path) -> None:
    """Finds what is wrong with the name of an output.

    Raises:
        ConfigError: neither Parquet nor bgzipped VCF.
    """
    if not out.name.lower().endswith(_SUFFIXES):
        remedy = f"End its name in {' or '.join(_SUFFIXES)}"
        raise ConfigError("the format of the output is unknown", out.name, remedy=remedy)


def skipped_path(out: Path) -> Path:
    """``NAME.skipped.tsv`` beside the output."""
    suffix = next((s for s in _SUFFIXES if out.name.lower().endswith(s)), "")
    return out.with_name(f"{out.name.removesuffix(out.name[len(out.name) - len(suffix) :])}.skipped.tsv")


@dataclass(frozen=True)
class Table:
    """What the rows hold.

    Attributes:
        scorers: their labels, in order.
        columns: further columns, such as "gene".
        tracks: names, one column each.
        calibrated: each has another column, ``NAME_percentile``.
        marks: groups of tracks of several conditions, with two columns each.

    Raises:
        ConfigError: a track has the name of another column.
    """

    scorers: tuple[str, ...]
    columns: tuple[str, ...]
    tracks: tuple[str, ...]
    calibrated: bool = False
    marks: tuple[Mark, ...] = ()

    def __post_init__(self) -> None:
        others = {*_COLUMNS, *_PLACES, *self.columns, *self.percentiles}
        others |= {column for mark in self.marks for column in mark.columns}
        taken = {name for name in self.tracks if name in others or self.tracks.count(name) > 1}
        if taken:
            remedy = "Rename it in the track table and prepare the data again"
            raise ConfigError("a track has the name of another column of the table", sorted(taken), remedy=remedy)

    @property
    def percentiles(self) -> tuple[str, ...]:
        """Names of the columns of percentiles."""
        return tuple(f"{track}_percentile" for track in self.tracks) if self.calibrated else ()

    @property
    def infos(self) -> tuple[str, ...]:
        """INFO fields of a VCF."""
        endings = ("", *(["_percentile"] if self.calibrated else []), *(_AFFECTED if self.marks else ()))
        return tuple(f"{scorer}{ending}" for ending in endings for scorer in self.scorers)

    @property
    def schema(self) -> pa.Schema:
        """Of the parts; the table lacks the first two columns."""
        types = dict.fromkeys(_PLACES, pa.int64()) | {"position": pa.int64()}
        names = (*_PLACES, *_COLUMNS, *self.columns)
        fields = [(name, types.get(name, pa.string())) for name in names]
        fields += [(track, pa.float32()) for track in (*self.tracks, *self.percentiles)]
        kinds = (pa.string(), pa.float32())
        return pa.schema([*fields, *(pair for mark in self.marks for pair in zip(mark.columns, kinds, strict=True))])

    def rows(
        self, variants: Sequence[Checked], scores: Scores, percentiles: npt.NDArray[np.float32] | None = None
    ) -> pa.Table:
        """Rows of a chunk: variants in order, in each the sites, in each the scorers; ``percentiles`` like values."""
        count = len(self.scorers)
        number = np.repeat(scores.variant, count).tolist()
        chosen = [variants[i] for i in number]
        values = scores.values.reshape(-1, len(self.tracks))
        arrays: list[Any] = [
            [v.row for v in chosen],
            [v.allele for v in chosen],
            [v.name for v in chosen],
            [v.variant.position for v in chosen],
            [v.variant.ref for v in chosen],
            [v.variant.alt for v in chosen],
            [v.variant.id for v in chosen],
            list(self.scorers) * len(scores.variant),
            *([names[i] for names in scores.names for _ in range(count)] for i in range(len(self.columns))),
            *np.ascontiguousarray(values.T),
            *(() if percentiles is None else np.ascontiguousarray(percentiles.reshape(values.shape).T)),
            *(column for mark in self.marks for column in mark.most_affected(values)),
        ]
        schema = self.schema
        return pa.table([pa.array(a, type=f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)


class Parts:
    """The folder ``OUT.parts``, and the output that it becomes.

    Args:
        manifest: what must be equal to continue.

    Raises:
        RunError: the output exists, a scoring was interrupted and ``resume`` is off, or it was of something else.
    """

    def __init__(self, out: Path, manifest: Mapping[str, Any], table: Table, *, resume: bool) -> None:
        self.out, self.table = out, table
        self.folder = out.with_name(f"{out.name}.parts")
        manifest = json.loads(json.dumps(manifest, default=str))
        path = self.folder / "manifest.json"
        if self.folder.exists() and not resume:
            remedy = f"Continue it with --resume, or remove {self.folder}"
            raise RunError("an interrupted scoring is in the way", str(self.folder), remedy=remedy)
        if path.exists() or any(self.folder.glob("*.parquet")):
            self._check_same(manifest, path)
        elif out.exists():
            raise RunError("the output exists already", str(out), remedy="Choose another name or remove it first")
        else:
            with self._writing():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(path, manifest)

    def _check_same(self, manifest: Mapping[str, Any], path: Path) -> None:
        try:
            before = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            remedy = f"Remove {self.folder} and start again"
            raise RunError(f"the manifest cannot be read ({error})", str(path), remedy=remedy) from error
        changed = [key for key in manifest if manifest[key] != before.get(key)] if isinstance(before, dict) else ["all"]
        if changed:
            what = f"the interrupted scoring differs in {', '.join(changed)}"
            remedy = f"Resume it as it was started, or remove {self.folder} and start again"
            raise RunError(what, str(self.folder), remedy=remedy)

    def discard_empty(self) -> None:
        """Removes the folder if no part was written: whatever failed left nothing worth continuing."""
        if self.folder.exists() and not any(self.folder.glob("*.parquet")):
            shutil.rmtree(self.folder)

    def has(self, number: int) -> bool:
        """Whether the part is there, whole."""
        return self._part(number).exists()

    def write(self, number: int, rows: pa.Table, counts: Mapping[str, int]) -> None:
        """Writes a part, with counts that ``counts`` gives back; a kill leaves it whole or not at all.

        Raises:
            RunError: the disk is full or not writable.
        """
        part = self.folder / f"{number:06}.part"
        with self._writing():
            pq.write_table(rows.replace_schema_metadata({name: str(count) for name, count in counts.items()}), part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, self._part(number))

    def counts(self, number: int) -> Counter[str]:
        """How many rows a part has, and the counts that it was written with."""
        found = pq.read_metadata(self._part(number))
        written = {name.decode(): int(count) for name, count in found.metadata.items() if count.isdigit()}
        return Counter(written | {"rows": int(found.num_rows)})

    def publish(self, count: int, vcf: Path, rows: tuple[int, int], notes: Mapping[str, str]) -> None:
        """Joins the parts to the output and removes their folder.

        Args:
            count: how many parts there are.
            vcf: the file that was scored, for a VCF output.
            rows: its records ``[first, last)`` that were to be scored.
            notes: kept in the output's header.

        Raises:
            RunError: the disk is full or not writable.
        """
        joined = self.folder / "joined"
        index = joined.with_name(f"{joined.name}.tbi")
        with self._writing():
            if not self.out.exists():  # a kill may have come after the rename
                if self.out.name.lower().endswith(".parquet"):
                    self._join(count, joined, notes)
                else:
                    published = self.out.with_name(f"{self.out.name}.tbi")
                    published.unlink(missing_ok=True)  # of an output that was removed
                    if write_vcf(joined, self._annotated(count, vcf, rows, notes)):
                        os.replace(index, published)  # first: once the output is there, a kill leaves nothing to do
                os.replace(joined, self.out)
            shutil.rmtree(self.folder)

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:06}.parquet"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "Free some disk space or check permissions, then continue with --resume"
            what = f"the scores could not be written ({error.strerror or error})"
            raise RunError(what, str(self.out), remedy=remedy) from error

    def _join(self, count: int, path: Path, notes: Mapping[str, str]) -> None:
        metadata = {f"seqgraft.{name}": value for name, value in notes.items()}
        schema = pa.schema(list(self.table.schema)[len(_PLACES) :], metadata=metadata)
        with pq.ParquetWriter(path, schema) as writer:
            for number in range(count):
                rows = pq.read_table(self._part(number)).drop_columns(list(_PLACES))
                writer.write_table(rows.replace_schema_metadata(schema.metadata))

    def _annotated(self, count: int, vcf: Path, rows: tuple[int, int], notes: Mapping[str, str]) -> Iterator[str]:
        """Lines of the VCF with the INFO fields; of the records in ``rows`` only."""
        scored = self._of_records(count)
        row, values = next(scored, (0, {}))
        number = 0
        for line in vcf_text(vcf):
            if line.startswith("##"):
                yield line
            elif line.startswith("#"):
                yield from self._header(notes)
                yield line
            else:
                number += 1
                if number == row:
                    line = self._with_info(line, values)
                    row, values = next(scored, (0, {}))
                if rows[0] <= number < rows[1]:
                    yield line

    def _header(self, notes: Mapping[str, str]) -> Iterator[str]:
        form = "values of the tracks joined by |" + (
            f", as {'/'.join(self.table.columns)}:values joined by &" if self.table.columns else ""
        )
        for info in self.table.infos:
            of = form.replace("tracks", "groups of tracks", 1) if info.endswith(_AFFECTED) else form
            yield f'##INFO=<ID={info},Number=A,Type=String,Description="seqgraft {info}: for each ALT {of}">'
        yield f"##seqgraft_tracks={'|'.join(self.table.tracks)}"
        if self.table.marks:
            yield f"##seqgraft_groups={'|'.join(mark.group for mark in self.table.marks)}"
        yield from (f"##seqgraft_{name}={value}" for name, value in notes.items())

    def _of_records(self, count: int) -> Iterator[tuple[int, dict[str, dict[int, str]]]]:
        """Record number -> scorer -> ALT number -> its entry."""

        def lines() -> Iterator[tuple[int, int, str, str]]:
            for number in range(count):
                rows = pq.read_table(self._part(number))
                texts = self._texts(rows)
                names = [rows[column].to_pylist() for column in self.table.columns]
                columns = [rows[name].to_pylist() for name in (*_PLACES, "scorer")]
                for i, (row, allele, scorer) in enumerate(zip(*columns, strict=True)):
                    own = "/".join(_plain(of[i]) for of in names)
                    for ending, part in texts.items():
                        entry = "|".join("." if text in ("nan", "") else text for text in part[i])
                        yield row, allele, f"{scorer}{ending}", f"{own}:{entry}" if own else entry

        for row, group in groupby(lines(), key=lambda line: line[0]):
            found: dict[str, dict[int, str]] = {}
            for _, allele, scorer, entry in group:
                of = found.setdefault(scorer, {})
                of[allele] = f"{of[allele]}&{entry}" if allele in of else entry
            yield row, found

    def _texts(self, rows: pa.Table) -> dict[str, list[list[str]]]:
        """What the INFO fields of each row say, by the end of their names."""
        table = self.table
        parts = {"": table.tracks, "_percentile": table.percentiles, "_margin": [m.columns[1] for m in table.marks]}
        texts = {
            ending: np.char.mod("%.6g", np.stack([rows[name].to_numpy() for name in part], axis=1)).tolist()
            for ending, part in parts.items()
            if part
        }
        if table.marks:
            affected = [map(_plain, rows[mark.columns[0]].to_pylist()) for mark in table.marks]
            texts["_most_affected"] = [list(names) for names in zip(*affected, strict=True)]
        return texts

    def _with_info(self, line: str, values: Mapping[str, Mapping[int, str]]) -> str:
        fields = line.split("\t")
        alleles = range(1, fields[4].count(",") + 2)
        added = [f"{s}={','.join(values[s].get(a, '.') for a in alleles)}" for s in self.table.infos if s in values]
        fields[7] = ";".join([*([fields[7]] if fields[7] != "." else []), *added])
        return "\t".join(fields)


def _plain(name: str) -> str:
    """A name without what means something else in an INFO field."""
    return re.sub(r"[\s,;=&:|]", "_", name)


@dataclass(frozen=True)
class Scored:
    """What became of a file.

    Attributes:
        files: that were written: the output, its index if there is one, the list of skipped variants.
        variants: how many were scored.
        skipped: reason -> how many were not; of the whole file.
        rows: of the table.
        padded: rows whose window reaches beyond its contig, where the model saw N.
        unread: variants without a row: they lie in the window of none of the genes or regions.
        in_words: how they were computed.
        notes: what the calibration says of them, in words.
    """

    files: tuple[Path, ...]
    variants: int
    skipped: Mapping[str, int]
    rows: int
    padded: int
    unread: int
    in_words: str
    notes: tuple[str, ...] = ()


class Percentiles(Protocol):
    """What scores are compared with (``calibrate.Calibration``)."""

    @property
    def identity(self) -> str:
        """Hash of what they are compared with."""

    def percentiles(self, variants: Sequence[Variant], scores: Scores) -> npt.NDArray[np.float32]:
        """Of each score among those of the background, 0 to 100; NaN where there is nothing to compare with."""

    def notes(self, variants: Iterable[Variant]) -> tuple[str, ...]:
        """What is to be known of the percentiles of these variants, in words."""


def score_vcf(
    model: SequenceModel,
    layout: Layout,
    config: VariantConfig,
    vcf: Path,
    out: Path,
    *,
    identity: Mapping[str, Any],
    resume: bool = False,
    shard: tuple[int, int] = (1, 1),
    chunk: int | None = None,
    calibration: Percentiles | None = None,
    replicates: Sequence[SequenceModel] = (),
) -> Scored:
    """Scores the variants of a VCF into a table or an annotated VCF, in chunks that are kept if it is interrupted.

    Args:
        identity: names what the scores depend on beside the VCF; must be equal to continue.
        shard: ``(i, n)``: score the i-th of n stretches of the file's records.
        chunk: variants per part; by default fewer for longer windows. Memory grows with it.
        calibration: adds percentiles.
        replicates: further models of the same tracks, whose scores are averaged with the first one's.

    Raises:
        ConfigError: settings that do not suit the model; an unknown suffix.
        DataError: the VCF does not fit the genome (``alleles.check_vcf``).
        ModelError: predictions that are not finite.
        RunError: the output exists or cannot be written; an interrupted scoring of something else.
    """
    check_output(out)
    scorers = [
        LikelihoodScorer(each, layout, config) if isinstance(each, MaskedModel) else VariantScorer(each, layout, config)
        for each in (model, *replicates)
    ]
    scorer = scorers[0]
    config, labels = scorer.config, scorer.labels
    over = () if config.over is None else config.over.columns
    marks = () if isinstance(scorer, LikelihoodScorer) else marks_of(layout.tracks, scorer.config.merge_strands)
    table = Table(labels, tuple(over), scorer.columns, calibration is not None, marks)
    chunk = chunk or min(LARGEST_CHUNK, max(64, (1 << 25) // layout.window))
    about = {"format": "seqgraft-variants", "format_version": FORMAT_VERSION, "chunk": chunk, "shard": list(shard)}
    notes = {"run": str(identity.get("run", "")), "genome": layout.genome.hash}
    if calibration is not None:
        notes["calibration"] = calibration.identity
        about["calibration"] = calibration.identity
    if marks:
        about["marks"] = [mark.group for mark in marks]
    manifest = about | dict(identity) | {"VCF": _hash(vcf), "genome": layout.genome.hash}
    if out.name.lower().endswith(".vcf.gz"):
        _check_header(vcf, table.infos)
    parts = Parts(out, manifest, table, resume=resume)
    try:
        single = isinstance(scorer, LikelihoodScorer)
        check = AlleleCheck(layout.genome, layout.window, layout.target, config.rename, single)
        checked = check_vcf(vcf, check, skipped_path(out), allow_skipped=config.allow_skipped)
        records = checked.rows_of(shard)
        if shard != (1, 1):
            checked.write_skipped(skipped_path(out), records)
        total = checked.count(records)
        count = -(-total // chunk)
        counted: Counter[str] = Counter()
        chunks = _chunks(checked.variants(records), chunk)
        for number, variants in enumerate(progress(chunks, "variants", total=count)):
            if not parts.has(number):
                scores = _averaged([each([v.variant for v in variants]) for each in steps(scorers)])
                percentiles = calibration.percentiles([v.variant for v in variants], scores) if calibration else None
                unread = len(variants) - len(np.unique(scores.variant))
                counts = {"padded": scores.padded * len(labels), "unread": unread}
                parts.write(number, table.rows(variants, scores, percentiles), counts)
            counted.update(parts.counts(number))
        said = calibration.notes(v.variant for v in checked.variants(records)) if calibration else ()
        parts.publish(count, vcf, records, notes)
    except SeqgraftError:
        parts.discard_empty()
        raise
    index = out.with_name(f"{out.name}.tbi")
    files = (out, *([index] if index.exists() else []), skipped_path(out))
    rows, padded, unread = (counted[name] for name in ("rows", "padded", "unread"))
    return Scored(files, total, checked.skipped, rows, padded, unread, scorer.in_words, said)


def _averaged(each: Sequence[Scores]) -> Scores:
    """The scores of one model, or the mean of those of several, whose rows are the same."""
    return replace(each[0], values=np.mean([scores.values for scores in each], axis=0)) if len(each) > 1 else each[0]


def _check_header(vcf: Path, labels: Sequence[str]) -> None:
    """Refuses to write an INFO field that the file has already."""
    header = takewhile(lambda line: line.startswith("##"), vcf_text(vcf))
    taken = {found[1] for line in header if (found := re.match(r"##INFO=<ID=([^,>]+)", line))}
    if again := sorted(taken & set(labels)):
        remedy = "Write .parquet, or remove them, as 'bcftools annotate -x' does"
        raise DataError("the VCF has INFO fields of these scorers already", again, where=vcf, remedy=remedy)


def _chunks(variants: Iterator[Checked], size: int) -> Iterator[list[Checked]]:
    while chunk := list(islice(variants, size)):
        yield chunk


def _hash(path: Path) -> str:
    if not path.is_file():
        raise DataError("the VCF file does not exist", where=path, remedy="Check the path")
    return str(hash_file(path)["sha256"])
