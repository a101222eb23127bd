"""Panels of what was asked of a finished run: the variants with the largest effects, and what bases do (logos)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from seqgraft.logos import attribution_figure
from seqgraft.plots import svg
from seqgraft.report.page import Cell, Chart, RunFiles, Section, Table
from seqgraft.report.scores import number, words

__all__ = ["attributions_section", "variants_section"]

_TOP = 20  # variants of a table
_REGIONS = 3  # of a file of attributions
_PLACE = ("chrom", "position", "ref", "alt", "scorer")


def variants_section(run: RunFiles) -> Section | None:
    """The variants with the largest scores of each table in the run's folder ``variants``; None where there is none."""
    tables = [table for name, frame in run.variants.items() for table in _top(run, name, frame)]
    return Section("Which variants matter most?", tuple(tables)) if tables else None


def _top(run: RunFiles, name: str, frame: pd.DataFrame) -> Iterator[Table]:
    tracks = [str(track) for track in run.part("dataset").get("tracks", []) if track in frame]
    if not tracks or not set(_PLACE) <= set(frame):
        return
    marks = [column for column in frame if str(column).endswith("_most_affected")]
    genes = [column for column in ("gene", "region") if column in frame]
    for scorer, part in frame.groupby("scorer", sort=False):
        scores = part[tracks].to_numpy(np.float64)
        sizes = np.abs(np.nan_to_num(scores))
        order = np.argsort(-sizes.max(axis=1), kind="stable")[:_TOP]
        rows = []
        for row, place in zip(part.iloc[order].to_dict("records"), order, strict=True):
            best = int(sizes[place].argmax())
            score = float(scores[place, best])
            variant = f"{row['chrom']}:{row['position']:,} {_short(row['ref'])}>{_short(row['alt'])}"
            cells = [Cell(variant, float(place)), Cell.of(row.get("id") or None), Cell(number(score), abs(score))]
            cells += [Cell(tracks[best]), *(Cell.of(row[column] or None) for column in (*genes, *marks))]
            rows.append(tuple(cells))
        caption = (
            f"variants/{name}.parquet: of {len(part):,} variants the {len(order)} with the largest change of any track "
            f"by {words(str(scorer))}, above 0 where the alternative allele has more."
        )
        heads = ("variant", "ID", "largest change", "in the track", *map(words, (*genes, *map(str, marks))))
        yield Table(caption, heads, tuple(rows))


def _short(allele: str) -> str:
    return allele if len(allele) <= 12 else f"{allele[:5]}…{len(allele)} bp"


def attributions_section(run: RunFiles) -> Section | None:
    """Logos of the first regions of each file in the run's folder ``attributions``; None where there is none."""
    charts = [chart for name, found in run.attributions.items() for chart in _logos(name, found)]
    return Section("Which bases does it look at?", tuple(charts)) if charts else None


def _logos(name: str, found: Any) -> Iterator[Chart]:
    """``found``: an ``attribute.Attributions``."""
    for number_, row in enumerate(found.regions.head(_REGIONS).to_dict("records")):
        figure = attribution_figure(
            found.hypothetical[number_, 0], found.codes[number_], chrom=row["chrom"], start=row["start"],
            number=found.names[0], method=found.method, name=row["name"],
        )  # fmt: skip
        title = figure.texts[0].get_text().replace("\n", " ")
        more = f" (the first {_REGIONS} of {len(found.regions)} regions)" if len(found.regions) > _REGIONS else ""
        caption = (
            f"attributions/{name}.npz{more}. Above: every base of the region. Letters: the stretch where most happens, "
            "as high as the base adds to the prediction, or takes from it. Below: what every other base would do there."
        )
        ident = "".join(c if c.isalnum() else "_" for c in name)
        yield Chart(svg(figure, f"logo_{ident}_{number_}", title), caption, wide=True)
