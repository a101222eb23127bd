"""The panel of genes in held-out regions: expression, what each signal has of its own, and fold changes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from seqgraft.plots import metric_dots, svg
from seqgraft.report.page import Cell, Chart, RunFiles, Section, Table
from seqgraft.report.scores import words

__all__ = ["genes_section"]

#: Level of a gene score -> what it is called.
_LEVELS = {
    "genes": "expression",
    "genes_specific": "what a signal has of its own",
    "genes_marker": "the same, marker genes alone",
    "genes_fold_change": "fold change",
}
_NEEDED = {"model", "level", "metric", "track", "value", "low", "high", "count"}


def genes_section(run: RunFiles) -> Section | None:
    """Charts of the expression and of the fold changes, and a table of both; None where genes were not scored."""
    genes = run.genes
    if genes is None or genes.empty or not set(genes) >= _NEEDED:
        return None
    pearson = genes[(genes["metric"] == "pearson") & genes["level"].isin(list(_LEVELS))]
    levels = {"genes": "Expression of {} held-out genes", "genes_fold_change": "Fold changes of {} held-out genes"}
    charts = [
        _chart(run.label, rows, title.format(f"{int(rows['count'].max()):,}"), f"genes{place}")
        for place, (level, title) in enumerate(levels.items())
        if len(rows := pearson[pearson["level"] == level]) and (rows["model"] == run.label).any()
    ]
    return Section("And genes?", (*charts, _table(run.label, pearson)))


def _chart(label: str, rows: pd.DataFrame, what: str, name: str) -> Chart:
    means = rows.groupby("model", sort=False)["value"].mean().dropna()
    others = means.drop(label, errors="ignore")
    signals = rows["track"].nunique()
    title = f"{what}: {label} reaches Pearson {means.get(label, float('nan')):.2f}"
    title += f" (mean of {signals} signals)" if signals > 1 else ""
    title += f"; the best baseline, {words(str(others.idxmax()))}, {others.max():z.2f}" if len(others) else ""
    known = rows[rows["model"].isin(list(means.index))]
    figure = metric_dots(known, title=title, xlabel="Pearson across genes", highlight=label)
    fold_change = rows["level"].iloc[0] == "genes_fold_change"
    how = "log2 of one condition over the other" if fold_change else "log2 of the signal in a gene's exons or window"
    caption = f"Across genes: {how}, predicted against observed. Lines are 95 % bootstrap intervals over genes."
    return Chart(svg(figure, name, title), caption)


def _table(label: str, rows: pd.DataFrame) -> Table:
    models = [label, *(model for model in dict.fromkeys(rows["model"]) if model != label)]
    found = {(row["model"], row["level"], row["track"]): row for row in rows.to_dict("records")}
    lines = []
    for level, track in dict.fromkeys(zip(rows["level"], rows["track"], strict=True)):
        each = [found.get((model, level, track)) for model in models]
        count = next(row["count"] for row in each if row is not None)
        lines.append((Cell(_LEVELS[level]), Cell(str(track)), Cell.of(int(count)), *map(_cell, each)))
    caption = (
        "Pearson across genes of held-out regions; 95 % intervals in brackets. What a signal has of its own: after the "
        "mean over all signals of its group is taken out. Marker genes: those that one condition has most of."
    )
    return Table(caption, ("what", "signal", "genes", *map(words, models)), tuple(lines))


def _cell(row: Mapping[Hashable, Any] | None) -> Cell:
    if row is None or row["value"] != row["value"]:
        return Cell.of(None)
    return Cell(f"{row['value']:z.3f} ({row['low']:z.3f} to {row['high']:z.3f})", row["value"])
