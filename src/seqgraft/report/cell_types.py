"""The panel of cell types: what each has of its own, as a share of its ceiling, and which is taken for which."""

from __future__ import annotations

import pandas as pd

from seqgraft.cell_plots import confusion_matrix
from seqgraft.plots import metric_dots, svg
from seqgraft.report.page import Cell, Chart, RunFiles, Section, Table
from seqgraft.report.scores import Key, Scores, intervals_in_words, words
from seqgraft.specificity import ACROSS, DIFFERENTIAL, OF_CEILING, RECOGNISED

__all__ = ["cells_section", "is_of_cells"]


def is_of_cells(key: Key) -> bool:
    """Is it about telling cell types apart, or beside a ceiling?"""
    return key.metric in (DIFFERENTIAL, RECOGNISED) or key.metric.endswith(OF_CEILING)


def cells_section(run: RunFiles) -> Section | None:
    """Specificity, shares of ceilings and confusion of cell types, of the rows without copies where some have them."""
    if run.scores is None:
        return None
    main = run.scores.main(run.label)
    keys = [key for key in run.scores.keys() if key.fold == main.fold]  # noqa: SIM118  # it is no mapping
    of_cells = [key for key in keys if is_of_cells(key)]
    if not of_cells:
        return None
    several = {key.group for key in of_cells}
    own = [key for key in keys if key.metric == ACROSS and key.group in several]
    charts = []
    for number_, key in enumerate(key for key in of_cells if key.metric.endswith(ACROSS + OF_CEILING)):
        charts.append(_share_chart(run, run.scores, key, f"share{number_}"))
    table = run.confusion
    if table is not None and {"model", "fold", "group", "observed", "predicted", "pearson", "best"} <= set(table):
        mine = table[(table["model"] == run.label) & (table["fold"] == main.fold)]
        for number_, (group, part) in enumerate(mine.groupby("group", sort=False)):
            charts.append(_confusion_chart(run, str(group), part, f"confusion{number_}"))
    return Section("Does it tell cell types apart?", (_cells_table(run, run.scores, [*own, *of_cells]), *charts))


def _cells_table(run: RunFiles, scores: Scores, keys: list[Key]) -> Table:
    """A row per measure and group of tracks, a column per model: of both there are many."""
    models = [run.label, *(model for model in scores.models if model != run.label)]
    ordered = sorted(keys, key=lambda key: list(dict.fromkeys(other.group for other in keys)).index(key.group))
    found = [[scores.get(model, key) for model in models] for key in ordered]
    rows = tuple(
        (Cell(key.group), Cell(key.axis), *map(Cell.score, row)) for key, row in zip(ordered, found, strict=True)
    )
    lows = (score.low for row in found for score in row if score)
    intervals = intervals_in_words(lows, "95 % bootstrap intervals in brackets")
    caption = (
        "Every track divided by its mean and centred across the tracks of its group, so that what is left is its own:"
        f" means over tracks, fold {keys[0].fold}; {intervals}."
    )
    return Table(caption, ("group", "measure", *map(words, models)), rows)


def _share_chart(run: RunFiles, scores: Scores, key: Key, name: str) -> Chart:
    own = scores.get(run.label, key)
    rows = scores.rows(key)
    mine = rows[(rows["model"] == run.label) & (rows["track"] != "")]
    above, undefined = int((mine["value"] >= 1).sum()), int(mine["value"].isna().sum())
    title = f"{run.label[:1].upper()}{run.label[1:]}: " + (f"{own.value:.0%} of the ceiling" if own else "no ceiling")
    title += f" of what cell types have of their own{', ' + key.group if key.group else ''}"
    title += f"; {above} of {len(mine)} tracks at or above it" if above else ""
    title += f"; {undefined} without a ceiling" if undefined else ""
    figure = metric_dots(rows, title=title, xlabel="share of the split-half ceiling", highlight=run.label)
    caption = (
        "The ceiling is an estimate itself, from two random halves of each group's cells, so that a share can exceed 1."
    )
    return Chart(svg(figure, name, title), f"{caption} Lines are 95 % bootstrap intervals of both.")


def _confusion_chart(run: RunFiles, group: str, part: pd.DataFrame, name: str) -> Chart:
    count, right = part["observed"].nunique(), int((part["best"] & (part["observed"] == part["predicted"])).sum())
    title = f"{right} of {count} cell types are recognised by {run.label}: {group}"
    caption = (
        "Pearson of observed and predicted signal after levelling and centring across cell types; framed is the"
        " prediction that correlates best with each observed cell type."
    )
    return Chart(svg(confusion_matrix(part, title=title), name, title), caption)
