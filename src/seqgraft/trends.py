"""Figures of one quantity against another: scores against a setting or a cost, and over epochs.

Each function returns a matplotlib figure in the style of :mod:`seqgraft.plots`; a method has one colour and one marker
in all of them, by its place in ``methods``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from seqgraft.plots import COLOURS, FAINT, GRID, MARKERS, canvas, legend, styled

__all__ = ["cost_dots", "epoch_curves", "setting_lines"]

_DASHES = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 3)))
#: With more values than this, an axis is of numbers and no longer of places.
_PLACES = 8


def setting_lines(
    frame: pd.DataFrame,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    methods: Sequence[str],
    floors: Mapping[str, float] | None = None,
) -> Figure:
    """A line per method over the values of a setting, with 95 % intervals where they are known.

    Args:
        frame: method, x, value, low, high.
        floors: name -> score of what is drawn as a dashed line.
    """
    shown = [method for method in methods if method in set(frame["method"])]
    values = sorted(frame["x"].unique())
    floors = floors or {}
    with styled():
        figure, axes, top = canvas(title, 2.3, legend=[*shown, *floors], left=0.15)
        in_places = len(values) <= _PLACES
        for number, method in enumerate(shown):
            part = frame[frame["method"] == method].sort_values("x")
            x = part["x"].to_numpy(np.float64)
            if in_places:
                x = np.searchsorted(values, x) + 0.12 * (number - (len(shown) - 1) / 2)
            _points(axes, x, part, methods.index(method), method, joined=in_places)
        if in_places:
            axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
            axes.set_xlim(-0.5, len(values) - 0.5)
        else:
            _log(axes, frame["x"])
        _lines(axes, floors)
        axes.set_ylabel(ylabel)
        axes.set_xlabel(xlabel)
        _grid(axes)
        legend(figure, axes, top)
    return figure


def cost_dots(
    frame: pd.DataFrame,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    methods: Sequence[str],
    floors: Mapping[str, float] | None = None,
) -> Figure:
    """One dot per method: its score, with the 95 % interval, against what it costs (``x``)."""
    floors = floors or {}
    shown = [method for method in methods if method in set(frame["method"])]
    with styled():
        figure, axes, top = canvas(title, 2.3, legend=[*shown, *floors], left=0.15)
        for method in shown:
            part = frame[frame["method"] == method]
            _points(axes, part["x"].to_numpy(np.float64), part, methods.index(method), method, joined=False)
        _log(axes, frame["x"])
        _lines(axes, floors)
        axes.set_ylabel(ylabel)
        axes.set_xlabel(xlabel)
        _grid(axes)
        legend(figure, axes, top)
    return figure


def epoch_curves(frame: pd.DataFrame, *, title: str, ylabel: str, methods: Sequence[str]) -> Figure:
    """A thin line per run over its epochs, in the colour of its method.

    Args:
        frame: method, run, epoch, value.
    """
    shown = [method for method in methods if method in set(frame["method"])]
    with styled():
        figure, axes, top = canvas(title, 2.3, legend=shown, left=0.15)
        for method in shown:
            number = methods.index(method)
            for position, (_, run) in enumerate(frame[frame["method"] == method].groupby("run", sort=False)):
                axes.plot(
                    run["epoch"], run["value"], color=COLOURS[number % len(COLOURS)], linewidth=1.1,
                    marker=MARKERS[number % len(MARKERS)], markersize=3, label=None if position else method,
                    fillstyle=_fill(number), linestyle="-" if number < len(COLOURS) else "--",
                )  # fmt: skip
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _grid(axes)
        legend(figure, axes, top)
    return figure


def _points(
    axes: Axes, x: npt.NDArray[np.float64], part: pd.DataFrame, number: int, label: str, *, joined: bool
) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    value, low, high = (part[name].to_numpy(np.float64) for name in ("value", "low", "high"))
    axes.vlines(x, low, high, color=colour, linewidth=1.3)
    line = "-" if joined else "none"
    axes.plot(
        x, value, color=colour, linestyle=line, linewidth=1, marker=marker, markersize=5, fillstyle=_fill(number),
        label=label,
    )  # fmt: skip


def _fill(number: int) -> Literal["full", "none"]:
    """Hollow markers where colours begin again."""
    return "full" if number < len(COLOURS) else "none"


def _lines(axes: Axes, floors: Mapping[str, float]) -> None:
    for (name, value), dashes in zip(floors.items(), (*_DASHES, *(_DASHES[-1:] * len(floors))), strict=False):
        axes.axhline(value, color=FAINT, linewidth=1, linestyle=dashes, label=name)


def _log(axes: Axes, values: pd.Series[float]) -> None:
    """A logarithmic axis where the values span more than a factor of five."""
    if values.min() > 0 and values.max() > 5 * values.min():
        axes.set_xscale("log")
        many = values.max() > 100 * values.min()
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0), numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.1)


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
