"""What a report is made of, as plain values: the files of a run, and a page of sections with four kinds of block.

Nothing here is HTML, apart from the SVG of a chart.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.errors import DataError
from seqgraft.plots import Examples
from seqgraft.report.scores import Score, Scores, metric_name, number, words
from seqgraft.scoring import whole_fold

__all__ = [
    "Cell",
    "Chart",
    "Code",
    "Facts",
    "Page",
    "RunFiles",
    "Section",
    "Table",
    "Values",
    "frame_table",
    "held_out",
    "is_run",
    "join",
    "read_run",
]

#: File of a run -> what its absence means, and what to do.
EXPECTED = {
    "experiment.yaml": "the settings are not known",
    "environment.json": "data, model, cost and versions are not known",
    "log.csv": "no epoch of training was finished; continue with 'seqgraft fit --resume'",
    "adapter/adapter.json": "training was not finished; continue with 'seqgraft fit --resume'",
    "evaluation/metrics.parquet": "the run was not evaluated; run 'seqgraft evaluate'",
}
#: Folders of a run into which 'seqgraft variants' and 'seqgraft attribute' may write for its report.
VARIANTS, ATTRIBUTIONS = "variants", "attributions"
UNKNOWN = "–"
MAX_ROWS = 2000


@dataclass(frozen=True, eq=False)
class Values:
    """Of each region that was tested and each track: the mean over its bins, observed and predicted.

    ``(regions, tracks)``, on the model's scale, NaN where nothing was measured. Labels have one bin, so that these are
    the labels and the predictions themselves.
    """

    tracks: tuple[str, ...]
    observed: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.float64]

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """From the statistics in ``evaluation/moments.npz`` (``metrics.Moments``); None where there is none of tracks.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if "moments" not in file.files:
                    return None
                sums, tracks = file["moments"], tuple(file["tracks"].tolist())
        except (EOFError, zipfile.BadZipFile) as error:
            raise ValueError(str(error)) from error
        if sums.ndim != 3 or sums.shape[::2] != (6, len(tracks)):
            raise ValueError("it holds no statistics of these tracks")
        known = np.where(sums[0] > 0, 1.0, np.nan)
        return cls(tracks, sums[1] * known, sums[2] * known)


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds; a file that is missing or damaged is None (or empty) and stands in ``missing``."""

    folder: Path
    label: str
    experiment: str
    environment: Mapping[str, Any]
    adapter_bytes: int
    log: pd.DataFrame | None
    scores: Scores | None
    differences: pd.DataFrame | None
    genes: pd.DataFrame | None
    confusion: pd.DataFrame | None
    examples: Examples | None
    values: Values | None
    variants: Mapping[str, pd.DataFrame]
    attributions: Mapping[str, Any]
    missing: tuple[str, ...]

    def part(self, name: str) -> Mapping[str, Any]:
        """A section of ``environment.json``: "dataset", "model", "tokens", "exposure", "counts", "versions", ..."""
        found = self.environment.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def trained(self) -> int | None:
        """How many numbers were trained, None if not known."""
        counts = self.part("counts")
        return sum(counts.get(part, 0) for part in ("adapter", "head", "trunk")) if counts else None


@dataclass(frozen=True)
class Cell:
    """Text, and what it sorts by."""

    text: str
    sort: float | None = None

    @classmethod
    def of(cls, value: object) -> Self:
        """Any value of a table; numbers with three digits."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return cls(UNKNOWN)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return cls(str(value))
        return cls(number(value), float(value))

    @classmethod
    def score(cls, score: Score | None) -> Self:
        """A score with its interval."""
        return cls(UNKNOWN) if score is None else cls(score.long, score.value)

    @classmethod
    def duration(cls, seconds: float | None) -> Self:
        """Hours, minutes and seconds."""
        if seconds is None:
            return cls(UNKNOWN)
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        text = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
        return cls(text, float(seconds))

    @classmethod
    def size(cls, size: float | None) -> Self:
        """Bytes; 0 is not known."""
        if not size:
            return cls(UNKNOWN)
        power = min(int(math.log(size, 1000)), 4)
        return cls(f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}", float(size))


@dataclass(frozen=True)
class Table:
    """Rows of cells; ``strong`` are the numbers of rows that stand out."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Chart:
    """A figure as SVG, with the words for who wants to know how to read it; a wide one has the page's width."""

    svg: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Facts:
    """Terms and what they are, with a heading of their own if need be."""

    pairs: tuple[tuple[str, str], ...]
    title: str = ""
    wide: bool = False

    @classmethod
    def of(cls, *pairs: tuple[str, object], title: str = "", wide: bool = False) -> Self:
        """The pairs whose value is known."""
        known = tuple((term, str(value)) for term, value in pairs if value not in (None, "", UNKNOWN, {}, []))
        return cls(known, title, wide)


@dataclass(frozen=True)
class Code:
    """Something to copy."""

    caption: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page; a folded one opens on demand."""

    title: str
    blocks: tuple[Table | Chart | Facts | Code, ...]
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    lead: str
    missing: tuple[str, ...]
    sections: tuple[Section, ...]


def is_run(folder: Path) -> bool:
    """Whether the folder looks like a run directory, finished or not."""
    return any((folder / name).is_file() for name in EXPECTED)


def read_run(folder: Path) -> RunFiles:
    """Reads what there is; a file that is missing, truncated or not what its name says is listed, never an error."""
    there = {name for name in EXPECTED if (folder / name).is_file()}
    missing = [f"{name} is missing: {means}." for name, means in EXPECTED.items() if name not in there]
    if there == {"experiment.yaml", "adapter/adapter.json"} and (folder / "README.md").is_file():  # of 'seqgraft pull'
        missing = ["The run was pulled: README.md, its card, has its data, training and scores."]

    def read(name: str, reader: Callable[[Path], Any]) -> Any:
        path = folder / name
        if not path.is_file():
            return None
        try:
            return reader(path)
        except (OSError, ValueError, KeyError, DataError) as error:
            missing.append(f"{name} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]}).")
            return None

    def read_all(kind: str, ending: str, reader: Callable[[Path], Any]) -> dict[str, Any]:
        paths = sorted((folder / kind).glob(f"*{ending}"))
        found = {path.name.removesuffix(ending): read(f"{kind}/{path.name}", reader) for path in paths}
        return {name: value for name, value in found.items() if value is not None}

    environment = read("environment.json", _read_json) or {}
    adapter = read("adapter/adapter.json", _read_json) or {}
    scores = read("evaluation/metrics.parquet", lambda path: Scores.of(pd.read_parquet(path)))
    first = scores.models[0] if scores is not None else folder.resolve().name
    weights = folder / "adapter" / "weights.safetensors"
    return RunFiles(
        folder=folder,
        label=str(environment.get("label") or adapter.get("label") or first),
        experiment=read("experiment.yaml", lambda path: path.read_text(encoding="utf-8")) or "",
        environment=environment,
        adapter_bytes=weights.stat().st_size if weights.is_file() else 0,
        log=read("log.csv", _read_log),
        scores=scores,
        differences=read("evaluation/differences.parquet", pd.read_parquet),
        genes=read("evaluation/genes.parquet", pd.read_parquet),
        confusion=read("evaluation/confusion.parquet", pd.read_parquet),
        examples=read("evaluation/examples.npz", Examples.load),
        values=read("evaluation/moments.npz", Values.load),
        variants=read_all(VARIANTS, ".parquet", pd.read_parquet),
        attributions=read_all(ATTRIBUTIONS, ".npz", _read_attributions),
        missing=tuple(missing),
    )


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _read_attributions(path: Path) -> Any:
    from seqgraft.attribute import Attributions  # it loads torch, which most reports do without

    return Attributions.load(path)


def _read_log(path: Path) -> pd.DataFrame:
    log = pd.read_csv(path)
    if "epoch" not in log or not pd.api.types.is_numeric_dtype(log["epoch"]) or log["epoch"].isna().any():
        raise ValueError("it has no column of epochs")
    return log


#: Folds of donors and genes, as the end of a sentence.
DONOR_PLACES = {
    "test": " on genes of training in held-out donors",
    "unseen_genes": " on genes that were never trained on",
    "unseen_both": " on genes that were never trained on in held-out donors",
}


def held_out(run: RunFiles, fold: str) -> str:
    """Where the scores come from: " on held-out chrXIV and chrXVI", with the chromosomes if they are few and known.

    Regions that the trunk has seen, or may have, are not called held out, nor are copies of what the run has seen.
    """
    if fold != whole_fold(fold):
        return f"{_place(run, whole_fold(fold))} without copies in the training data"
    if run.scores is not None and run.scores.has_copies(fold):
        return f" on all {fold} regions, copies of training data included"
    return _place(run, fold)


def _place(run: RunFiles, fold: str) -> str:
    chroms = run.part("dataset").get("chroms")
    named = chroms.get(fold, []) if isinstance(chroms, dict) else []
    if run.part("dataset").get("kind") == "personal":
        return DONOR_PLACES.get(fold, f" in the fold {fold}")
    if fold == "test" and run.part("exposure").get("problem"):  # held out from the run, and not from its trunk
        return f" on {join(named)}" if 0 < len(named) <= 4 else " on test regions"
    if 0 < len(named) <= 4:
        return f" on held-out {join(named)}"
    return {"test": " on held-out test regions", "valid": " on validation regions"}.get(fold, f" on the fold {fold}")


def join(names: list[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def frame_table(frame: pd.DataFrame, caption: str, source: str) -> Table:
    """Any table; ``low`` and ``high`` become one column, empty columns go, "" among the tracks is their mean."""
    shown = frame.head(MAX_ROWS)
    empty = [column for column in shown if shown[column].isin(["", None]).all()]
    rows, columns = [], [column for column in shown if column not in (*empty, "high")]
    for row in shown.to_dict("records"):
        cells = {str(name): Cell.of(value) for name, value in row.items()}
        if {"low", "high"} <= cells.keys() and cells["low"].sort is not None:
            cells["low"] = Cell(f"{cells['low'].text} to {cells['high'].text}", cells["low"].sort)
        if row.get("track") == "":
            cells["track"] = Cell("mean over tracks")
        if "metric" in row:
            cells["metric"] = Cell(metric_name(str(row["metric"])))
        rows.append(tuple(cells[str(column)] for column in columns))
    more = f" (the first {MAX_ROWS:,} of {len(frame):,} rows in {source})" if len(frame) > MAX_ROWS else ""
    names = ("95 % interval" if column == "low" else words(str(column)) for column in columns)
    return Table(f"{caption}{more}.", tuple(names), tuple(rows))
