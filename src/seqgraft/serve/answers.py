"""What the page shows, as values that draw themselves: scores of variants, signal of both alleles, logos."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.attribute import Attributions
from seqgraft.cell_plots import VariantPanel, variant_panel
from seqgraft.errors import ConfigError
from seqgraft.genome import Interval, Variant
from seqgraft.logos import attribution_figure
from seqgraft.plots import svg
from seqgraft.serve.asked import Choice, Problem
from seqgraft.variants import VariantConfig
from seqgraft.variants.marks import Mark
from seqgraft.variants.panels import in_words

__all__ = ["Column", "Logo", "Scores", "Signal"]

MOST_DRAWN = 12  # tracks in a figure

Floats = npt.NDArray[np.float64]

_DRAWING = threading.Lock()  # matplotlib's style is one for the whole process


@dataclass(frozen=True)
class Column:
    """Something that has scores: a track, or the two strands of a pair as one."""

    name: str
    group: str
    condition: str
    tracks: tuple[str, ...]

    @property
    def record(self) -> dict[str, str]:
        return {"name": self.name, "group": self.group, "condition": self.condition}


@dataclass(frozen=True, eq=False)
class Scores:
    """The table that ``seqgraft variants`` writes, of the variants of one request."""

    frame: pd.DataFrame
    columns: tuple[Column, ...]
    over: tuple[str, ...]
    marks: tuple[Mark, ...]
    config: VariantConfig
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        return int(self.frame.memory_usage(deep=True).sum())

    @cached_property
    def values(self) -> npt.NDArray[np.float32]:
        """``(rows, columns)``."""
        return self.frame[[column.name for column in self.columns]].to_numpy(np.float32)

    def text(self) -> Iterator[str]:
        """The table as tab-separated text."""
        for first in range(0, max(len(self.frame), 1), 100):
            yield self.frame.iloc[first : first + 100].to_csv(sep="\t", index=False, header=first == 0)

    def variant(self, row: int) -> Variant:
        """The variant of a row, its chromosome as it was written."""
        place = self.frame.iloc[row]
        return Variant(*(str(place["chrom"]), int(place["position"])), *(str(place[n]) for n in ("ref", "alt", "id")))

    def rows(self, chosen: Sequence[int]) -> list[dict[str, Any]]:
        """The rows with the values of the chosen columns, for JSON: NaN is None, float32 its shortest decimal."""
        strongest, found = _strongest(self.values), []
        plain = ["chrom", "position", "ref", "alt", "id", "scorer"]
        needed = [*plain, *self.over, *(name for mark in self.marks for name in mark.columns)]
        for row, record in enumerate(self.frame[needed].to_dict("records")):
            top = int(strongest[row])
            entry = {name: record[name] for name in plain}
            entry["variant"] = in_words(self.variant(row))
            entry["over"] = [str(record[name]) for name in self.over]
            entry["values"] = [_number(self.values[row, column]) for column in chosen]
            entry["marks"] = [
                {"group": mark.group, "name": record[mark.columns[0]], "margin": _number(record[mark.columns[1]])}
                for mark in self.marks
            ]
            known = top >= 0
            entry["top"] = {"name": self.columns[top].name, "value": _number(self.values[row, top])} if known else None
            found.append(entry)
        return found

    def ranked(self, row: int, most: int) -> list[dict[str, Any]]:
        """The columns with the largest absolute scores in a row, with percentiles where there are any."""
        order = [i for i in np.argsort(-np.abs(self.values[row]), kind="stable") if not np.isnan(self.values[row, i])]
        found = []
        for i in order[:most]:
            name = f"{self.columns[i].name}_percentile"
            percentile = _number(self.frame.loc[row, name]) if name in self.frame else None
            found.append(self.columns[i].record | {"value": _number(self.values[row, i]), "percentile": percentile})
        return found

    def title(self, row: int) -> str:
        """What a row says, in a sentence."""
        top = int(_strongest(self.values[row : row + 1])[0])
        scorer = str(self.frame.loc[row, "scorer"]).replace("_", " ")
        if top < 0:
            return f"{in_words(self.variant(row))}: no score"
        return f"{in_words(self.variant(row))}: {scorer} {self.values[row, top]:+.3g} in {self.columns[top].name}"


@dataclass(frozen=True, eq=False)
class Signal:
    """Predictions of both alleles around a variant, or of a region: raw values ``(columns, bins)``."""

    title: str
    chrom: str
    start: int
    bin_size: int
    changed: tuple[int, int] | None
    columns: tuple[Column, ...]
    reference: Floats
    alternate: Floats | None
    totals: Floats | None = None  # (columns,) of a region
    asked: tuple[Interval, Choice] | None = None  # of a region

    @property
    def size(self) -> int:
        return self.reference.nbytes * (1 if self.alternate is None else 2)

    def ranked(self, most: int) -> list[dict[str, Any]]:
        """The columns with the most signal in the region."""
        if self.totals is None:
            return []
        order = np.argsort(-np.abs(self.totals), kind="stable")[:most]
        return [self.columns[i].record | {"value": float(self.totals[i]), "percentile": None} for i in order]

    def figures(self, chosen: Sequence[int]) -> list[str]:
        """One SVG of the chosen columns, one below the other."""
        chosen = list(chosen)[:MOST_DRAWN]
        parts = [None if part is None else part[chosen][:, None, None] for part in (self.reference, self.alternate)]
        reference, other = parts
        assert reference is not None
        names = [self.columns[i].name for i in chosen]
        panel = VariantPanel(
            self.title, self.chrom, self.start, self.bin_size, self.changed, names, [""], reference, other
        )
        what = "predicted signal" if other is None else "predicted signal of the reference and the alternative allele"
        with _DRAWING:
            return [svg(variant_panel(panel), _name(), f"{self.title}; {what} in {', '.join(names)}")]


@dataclass(frozen=True, eq=False)
class Logo:
    """Attributions of one or two sequences: of both alleles, or of a region."""

    found: Attributions
    columns: tuple[Column, ...]
    names: tuple[str, ...]
    marked: tuple[tuple[int, int] | None, ...]

    @property
    def size(self) -> int:
        return self.found.hypothetical.nbytes

    def figures(self, chosen: Sequence[int]) -> list[str]:
        """An SVG per sequence, of the first of the chosen columns."""
        column = self.columns[next(iter(chosen), 0)]
        if absent := set(column.tracks) - set(self.found.names):
            remedy = "Ask for the logo of this track"
            raise ConfigError("the logo is one of another track than", sorted(absent), remedy=remedy)
        number = [self.found.names.index(track) for track in column.tracks]
        drawn = []
        for row, (name, marked) in enumerate(zip(self.names, self.marked, strict=True)):
            place = self.found.regions.iloc[row]
            with _DRAWING:
                figure = attribution_figure(
                    self.found.hypothetical[row, number].mean(axis=0), self.found.codes[row],
                    chrom=str(place["chrom"]), start=int(place["start"]), number=column.name,
                    method=self.found.method, name=name, marked=marked,
                )  # fmt: skip
                alt = f"{f'{name}: ' if name else ''}what each base does to {column.name}"
                drawn.append(svg(figure, _name(), alt))
        return drawn


def _strongest(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Which column has the largest absolute score in each row; -1 where none has one."""
    size = np.where(np.isnan(values), -1.0, np.abs(values))
    return np.where(size.max(axis=1) < 0, -1, size.argmax(axis=1))


def _number(value: Any) -> float | None:
    """A float32 as the shortest decimal that is the same float32; None for NaN and infinities, which JSON lacks."""
    return float(str(np.float32(value))) if np.isfinite(value) else None


def _name() -> str:
    return f"f{secrets.token_hex(4)}"
