"""Figures of predicted values against observed ones: dots with their trend, and how often classes come as predicted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seqgraft.plots import AREA, COLOURS, FAINT, GRID, canvas, legend, styled

__all__ = ["calibration_error", "reliability", "tenths", "value_scatter", "wilson"]

Floats = npt.NDArray[np.float64]

MAX_DOTS = 500  # an SVG holds each of them
_BINS = 10
_HEIGHT = 2.9  # inches


def value_scatter(values: Floats, *, title: str, xlabel: str, ylabel: str) -> Figure:
    """Dots of predicted and observed values ``(regions, 2)``, none of them NaN; a line joins the means of tenths.

    The line is calibration: where it lies on the diagonal, predictions are right on average. Of more than 500 regions
    evenly spread ones are drawn, and all are in the line.
    """
    ordered = values[np.argsort(values[:, 0], kind="stable")]
    shown = ordered[np.linspace(0, len(ordered) - 1, min(len(ordered), MAX_DOTS)).astype(int)]
    means, ends = tenths(values), (float(values.min()), float(values.max()))
    with styled():
        figure, axes, top = canvas(title, _HEIGHT, legend=("a region", "equal", "mean of a tenth"), left=0.15)
        axes.plot(shown[:, 0], shown[:, 1], "o", markersize=2.8, alpha=0.5, color=COLOURS[0], label="a region")
        _diagonal(axes, ends)
        style = {"marker": "D", "markersize": 4.5, "linewidth": 1.4, "label": "mean of a tenth"}
        axes.plot(means[:, 0], means[:, 1], color=COLOURS[3], **style)  # type: ignore[arg-type]
        _label(axes, xlabel, ylabel)
        legend(figure, axes, top)
    return figure


def reliability(values: Floats, *, title: str, ylabel: str) -> Figure:
    """How often a class is there against how probable it was said to be: ``(items, 2)`` of probability and 0 or 1.

    A dot is a tenth of the range of probabilities with its 95 % interval (:func:`wilson`); bars show where items are.
    """
    predicted, share, low, high, counts = _binned(values)
    there = counts > 0
    with styled():
        figure, axes, top = canvas(title, _HEIGHT, legend=("items", "equal", "observed share"), left=0.15)
        edges = np.linspace(0, 1, _BINS + 1)
        axes.stairs(0.25 * counts / counts.max(), edges, fill=True, color=AREA, label="items")
        _diagonal(axes, (0, 1))
        axes.vlines(predicted[there], low[there], high[there], color=COLOURS[0], linewidth=1.4)
        axes.plot(
            predicted[there],
            share[there],
            color=COLOURS[0],
            marker="o",
            linestyle="none",
            markersize=5,
            label="observed share",
        )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        _label(axes, "predicted probability", ylabel)
        legend(figure, axes, top)
    return figure


def calibration_error(values: Floats) -> float:
    """Mean distance of observed shares from predicted probabilities over tenths of the range, weighted by their items.

    The expected calibration error of Naeini, Cooper and Hauskrecht 2015.
    """
    predicted, share, _, _, counts = _binned(values)
    there = counts > 0
    return float((np.abs(share - predicted)[there] * counts[there]).sum() / counts.sum())


def tenths(values: Floats) -> Floats:
    """Mean predicted and mean observed value of tenths of the rows ``(rows, 2)`` in the order of the prediction."""
    ordered = values[np.argsort(values[:, 0], kind="stable")]
    return np.array([part.mean(axis=0) for part in np.array_split(ordered, min(_BINS, len(ordered)))])


def wilson(hits: Floats, items: Floats) -> tuple[Floats, Floats]:
    """Wilson's 95 % interval of a share, ``hits`` of ``items`` (Wilson 1927, with z = 1.96)."""
    z = 1.959964
    share, spread = hits / items, z**2 / items
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt(share * (1 - share) / items + spread / (4 * items))
    return centre - half, centre + half


def _binned(values: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Mean probability, observed share, its interval, items of tenths of the range; NaN where there are no items."""
    place = np.clip((values[:, 0] * _BINS).astype(int), 0, _BINS - 1)
    counts = np.bincount(place, minlength=_BINS).astype(np.float64)
    items = np.where(counts > 0, counts, np.nan)
    predicted, hits = (np.bincount(place, values[:, column], _BINS).astype(np.float64) for column in (0, 1))
    return predicted / items, hits / items, *wilson(hits, items), counts


def _diagonal(axes: Axes, ends: tuple[float, float]) -> None:
    axes.plot(ends, ends, color=FAINT, linewidth=1, linestyle=(0, (3, 2)), label="equal")


def _label(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
