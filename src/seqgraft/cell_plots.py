"""Figures of cell types: which is taken for which, and what a variant does in each, as a genome browser shows it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seqgraft.plots import AREA, COLOURS, FAINT, INK, WIDTH, legend, short_name, styled

__all__ = ["VariantPanel", "confusion_matrix", "variant_panel"]

Floats = npt.NDArray[np.float64]


def confusion_matrix(frame: pd.DataFrame, *, title: str) -> Figure:
    """Correlation of observed cell types (rows) with predicted ones (columns), the best of each row framed.

    Args:
        frame: observed, predicted, pearson, best; of one model, fold and group of tracks.
        title: the finding.
    """
    names = list(dict.fromkeys(frame["observed"]))
    table = frame.pivot(index="observed", columns="predicted", values="pearson").loc[names, names]
    values, best = table.to_numpy(np.float64), frame[frame["best"]]
    labels = [short_name(str(name), 18) for name in names]
    size, side = len(names), min(0.62, 5.2 / len(names))
    left, lines = 0.4 + 0.085 * max(map(len, labels)), textwrap.wrap(title, 46)
    below, above = 0.25 + 0.075 * max(map(len, labels)), 0.2 * len(lines) + 0.2
    width, height = max(WIDTH, left + size * side + 0.3), size * side + below + 0.3 + above
    with styled():
        figure = Figure(figsize=(width, height))
        figure.text(0.02, 1 - 0.05 / height, "\n".join(lines), va="top", fontsize=10.5, fontweight="bold")
        place = (left / width, (below + 0.3) / height, size * side / width, size * side / height)
        axes = figure.add_axes(place)
        for i, j in np.ndindex(values.shape):
            strength = float(np.clip(values[i, j], 0, 1)) if np.isfinite(values[i, j]) else 0.0
            axes.fill([j, j + 1, j + 1, j], [i, i, i + 1, i + 1], color=COLOURS[0], alpha=0.85 * strength, linewidth=0)
            if size <= 12:
                text = f"{values[i, j]:z.2f}" if np.isfinite(values[i, j]) else "–"
                colour = "white" if strength > 0.75 else INK
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8.5, color=colour)
        for observed, predicted in zip(best["observed"], best["predicted"], strict=True):
            i, j = names.index(observed), names.index(predicted)
            x, y = [j, j + 1, j + 1, j, j], [i, i, i + 1, i + 1, i]
            axes.plot(x, y, color=INK if i == j else COLOURS[3], linewidth=1.8, clip_on=False)
        axes.set(xlim=(0, size), ylim=(size, 0), xlabel="predicted", ylabel="observed")
        axes.set_xticks(np.arange(size) + 0.5, labels, rotation=90)
        axes.set_yticks(np.arange(size) + 0.5, labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


@dataclass(frozen=True)
class VariantPanel:
    """Predictions of both alleles around a variant, or of the reference alone.

    Attributes:
        title: the finding.
        chrom: where it is.
        start: of the first bin, 0-based.
        bin_size: bp.
        changed: first base and end of what the variant replaces, 0-based and half-open; None where nothing is.
        rows, columns: names of cell types and marks.
        reference, alternate: raw values ``(rows, columns, strands, bins)``; NaN where there is no such track. Of two
            strands the second one is drawn downwards. Without an alternate the reference stands alone.
    """

    title: str
    chrom: str
    start: int
    bin_size: int
    changed: tuple[int, int] | None
    rows: Sequence[str]
    columns: Sequence[str]
    reference: Floats
    alternate: Floats | None


def variant_panel(panel: VariantPanel) -> Figure:
    """A row per cell type and a column per mark: the reference filled, the alternate as a line, the variant marked.

    Every panel has its own scale, because cell types differ in depth.
    """
    rows, columns = len(panel.rows), len(panel.columns)
    width = max(WIDTH, 1.1 + 2.3 * columns)
    lines = textwrap.wrap(panel.title, int(50 * width / WIDTH))
    above, below = 0.2 * len(lines) + 0.65, 0.55
    height = 0.62 * rows + above + below
    with styled():
        figure = Figure(figsize=(width, height))
        figure.text(0.02, 1 - 0.05 / height, "\n".join(lines), va="top", fontsize=10.5, fontweight="bold")
        labels = [_in_two_lines(name, 16) for name in panel.rows]
        left = (0.65 + 0.085 * max(len(line) for label in labels for line in label.split("\n"))) / width
        edges = {"left": left, "right": 1 - 0.15 / width, "top": 1 - above / height, "bottom": below / height}
        grid = figure.add_gridspec(rows, columns, wspace=0.22, hspace=0.25, **edges)
        for row, column in np.ndindex(rows, columns):
            axes = figure.add_subplot(grid[row, column])
            if np.isfinite(panel.reference[row, column]).any():
                _alleles(axes, panel, row, column)
            else:
                axes.set_axis_off()  # no such track
            axes.tick_params(labelbottom=row == rows - 1)
            if row == 0:
                axes.set_title(short_name(panel.columns[column], 22), fontsize=9.5, fontweight="normal", pad=3)
            if column == 0:
                middle = sum(axes.get_position().intervaly) / 2
                figure.text(left - 0.5 / width, middle, labels[row], ha="right", va="center")
        figure.supxlabel(f"position on {panel.chrom}, kb (raw signal per bin, each panel on its own scale)", fontsize=9)
        drawn = next(axes for axes in figure.axes if axes.axison)
        legend(figure, drawn, 1 - (0.2 * len(lines) + 0.14) / height)
    return figure


def _in_two_lines(name: str, width: int) -> str:
    """A name that is too long for one line, broken where a mark parts its words, if no part is too long then."""
    if len(name) <= width:
        return name
    places = [at + 1 for at, letter in enumerate(name[:width]) if letter in " _-.:/" and len(name) - at - 1 <= width]
    at = places[-1] if places else width
    return f"{name[:at].rstrip()}\n{short_name(name[at:], width)}"


def _alleles(axes: Axes, panel: VariantPanel, row: int, column: int) -> None:
    bins = panel.reference.shape[-1]
    edges = (panel.start + np.arange(bins + 1) * panel.bin_size) / 1000
    highest, lowest = 0.0, 0.0
    for strand, sign in zip(range(panel.reference.shape[2]), (1, -1), strict=False):
        alleles = [part for part in (panel.reference, panel.alternate) if part is not None]
        values: Any = [sign * part[row, column, strand] for part in alleles]
        if not np.isfinite(values[0]).any():
            continue
        only = panel.alternate is None
        names = ("predicted" if only else "reference", "alternate") if strand == 0 else ("", "")
        axes.stairs(values[0], edges, fill=True, color=AREA, label=names[0])
        for alternate in values[1:]:
            axes.stairs(alternate, edges, color=COLOURS[3], linewidth=1.2, baseline=None, label=names[1])
        highest, lowest = max(highest, *np.ravel(values)), min(lowest, *np.ravel(values))
    if panel.changed is not None:
        begin, end = (place / 1000 for place in panel.changed)
        shade, label = (0.35, "") if panel.alternate is not None else (0.18, "region")
        axes.axvspan(begin, end, color=COLOURS[0], alpha=shade, linewidth=0, label=label)
        if panel.alternate is not None:
            axes.axvline(begin, color=COLOURS[0], linewidth=0.9, linestyle=(0, (2, 2)), label="variant")
    axes.axhline(0, color=FAINT, linewidth=0.6)
    room = 0.06 * (highest - lowest) or 1.0
    axes.set(xlim=(edges[0], edges[-1]), ylim=(lowest - room if lowest else 0.0, highest + room))
    axes.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.tick_params(labelsize=8)
