"""Figures of attributions: along a region, as a sequence logo, and as a heat map of what every other base would do."""

from __future__ import annotations

import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.path import Path as OutlinePath
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Affine2D

from seqgraft.plots import AREA, COLOURS, FAINT, styled

__all__ = ["attribution_figure", "save_figure", "strongest_stretch"]

Floats = npt.NDArray[np.floating]

STRETCH = 80  # letters that stay readable beside each other
_SITE = 12  # bp: about a motif
_BASES = "ACGT"
_DOT = "#1c2025"  # on the white of the heat map, which stays white on a dark page: no colour of the theme
_LETTERS = (COLOURS[2], COLOURS[0], COLOURS[1], COLOURS[3])
_WIDTH, _LEFT, _RIGHT = 9.0, 0.09, 0.90


def attribution_figure(
    hypothetical: Floats,
    codes: npt.NDArray[np.uint8],
    *,
    chrom: str,
    start: int,
    number: str,
    method: str,
    name: str = "",
    marked: tuple[int, int] | None = None,
) -> Figure:
    """The attributions of one region: all of them, a logo of its strongest stretch, and a heat map of that stretch.

    The heat map shows what every other base would do: for mutagenesis what it did, for gradients to first order.

    Args:
        hypothetical: ``(4, width)``, mean zero over the bases.
        codes: uint8 ``(width,)``.
        chrom, start: the place of the first base (0-based); chrom "" for a sequence of one's own.
        number: what is explained.
        method: gradient or ism.
        name: of the region.
        marked: first position and end of a stretch to shade, such as a variant's.
    """
    known = codes < 4
    there = np.where(known, np.take_along_axis(hypothetical, np.minimum(codes, 3)[None].astype(np.int64), 0)[0], 0.0)
    first, last = strongest_stretch(there, STRETCH)
    whole = len(codes) <= STRETCH
    heights = [1.5, 0.95] if whole else [1.0, 1.5, 0.95]
    title = "\n".join(textwrap.wrap(_finding(there, (first, last), chrom, start, name), 95))
    above = 0.5 + 0.2 * title.count("\n")
    gaps = [0.5] * (len(heights) - 2) + [0.12, 0.62]  # the logo and the heat map share their positions
    total = sum(heights) + above + sum(gaps)
    with styled():
        figure = Figure(figsize=(_WIDTH, total))
        figure.text(0.015, 1 - 0.08 / total, title, va="top", fontsize=10.5, fontweight="bold")
        panels, top = [], total - above
        for height, gap in zip(heights, gaps, strict=True):
            panels.append(figure.add_axes((_LEFT, (top - height) / total, _RIGHT - _LEFT, height / total)))
            top -= height + gap
        if not whole:
            _overview(panels[0], there, start, (first, last))
        part = slice(first, last)
        _logo(panels[-2], there[part], codes[part], start + first)
        _heat(figure, panels[-1], hypothetical[:, part], codes[part], start + first)
        if marked is not None and first <= marked[0] < last:
            panels[-2].axvspan(marked[0] - first, min(marked[1], last) - first, color=AREA, alpha=0.5, linewidth=0)
        panels[-2].set_ylabel("attribution")
        panels[-2].tick_params(labelbottom=False)
        word = "change when it is this base" + ("" if method == "ism" else " (first order)")
        where = f"position on {chrom}" if chrom else "position in the sequence"
        panels[-1].set_xlabel(f"{where}   (rows: {word})")
        by = f", by {'mutagenesis' if method == 'ism' else 'gradient'}"
        shown = textwrap.shorten(number, 95, placeholder=" ...") + by
        panels[0].set_title(shown, fontsize=9, fontweight="normal", pad=4)
    return figure


def strongest_stretch(attributions: Floats, length: int) -> tuple[int, int]:
    """The stretch of ``length`` positions, or all there are, with the largest sum of absolute attributions."""
    length = min(length, len(attributions))
    sums = np.concatenate([[0.0], np.cumsum(np.abs(attributions), dtype=np.float64)])
    first = int((sums[length:] - sums[:-length]).argmax())
    return first, first + length


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure on white, as the suffix says (.png, .svg)."""
    with styled():
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)


def _finding(attributions: Floats, shown: tuple[int, int], chrom: str, start: int, name: str) -> str:
    """The strongest site of the stretch whose letters are shown, so that it can be seen."""
    first, last = (shown[0] + at for at in strongest_stretch(attributions[slice(*shown)], _SITE))
    total = np.abs(attributions).sum()
    share = np.abs(attributions[first:last]).sum() / total if total > 0 else 0.0
    place = f"{chrom}:{start + first + 1:,}-{start + last:,}" if chrom else f"positions {first + 1} to {last}"
    return f"{name + ': ' if name else ''}{share:.0%} of all attribution is at {place}"


def _overview(axes: Axes, attributions: Floats, start: int, shown: tuple[int, int]) -> None:
    positions = start + np.arange(len(attributions) + 1)
    axes.axvspan(start + shown[0], start + shown[1], color=AREA, alpha=0.5, linewidth=0)
    axes.stairs(attributions, positions, color=COLOURS[0], linewidth=0.8, fill=len(attributions) <= 4000)
    axes.axhline(0, color=FAINT, linewidth=0.6)
    axes.set_xlim(positions[0], positions[-1])
    axes.set_ylabel("all")
    _ticks(axes, 6)


def _logo(axes: Axes, attributions: Floats, codes: npt.NDArray[np.uint8], start: int) -> None:
    for base, colour in enumerate(_LETTERS):
        patches = [
            PathPatch(_letter(_BASES[base]).transformed(Affine2D().scale(0.94, height).translate(at + 0.03, 0)))
            for at, height in enumerate(attributions)
            if codes[at] == base and height
        ]
        axes.add_collection(PatchCollection(patches, facecolor=colour, edgecolor="none"))
    for at in np.flatnonzero(codes >= 4):
        axes.text(at + 0.5, 0, "n", ha="center", va="center", fontsize=6, color=FAINT)
    low, high = min(0.0, float(attributions.min())), max(0.0, float(attributions.max()))
    room = 0.05 * (high - low or 1.0)
    axes.set_ylim(low - room, high + room)
    axes.axhline(0, color=FAINT, linewidth=0.6)
    _places(axes, start, len(codes))


def _heat(figure: Figure, axes: Axes, hypothetical: Floats, codes: npt.NDArray[np.uint8], start: int) -> None:
    known = codes < 4
    base = np.minimum(codes, 3).astype(np.int64)
    change = np.where(known, hypothetical - np.take_along_axis(hypothetical, base[None], 0), np.nan)
    limit = float(np.nanmax(np.abs(change))) if known.any() and np.nanmax(np.abs(change)) > 0 else 1.0
    colours = LinearSegmentedColormap.from_list("change", [COLOURS[3], "#ffffff", COLOURS[0]])
    axes.set_facecolor(AREA)  # where the base is unknown
    image = axes.imshow(
        change, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest",
        extent=(0.0, float(len(codes)), 4.0, 0.0),
    )  # fmt: skip
    axes.plot(np.flatnonzero(known) + 0.5, base[known] + 0.5, linestyle="none", marker=".", markersize=2.5, color=_DOT)
    axes.set_yticks(np.arange(4) + 0.5, list(_BASES))
    axes.tick_params(axis="y", length=0)
    _places(axes, start, len(codes))
    box = axes.get_position()
    bar = figure.colorbar(image, cax=figure.add_axes((_RIGHT + 0.012, box.y0, 0.012, box.height)), ticks=MaxNLocator(3))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=2)


def _places(axes: Axes, start: int, width: int) -> None:
    """Ticks at round positions of the genome (1-based), whose bases lie half a step right of their left edge."""
    step = next(step for step in (1, 2, 5, 10, 20) if width / step <= 9)
    first = -(-(start + 1) // step) * step
    places = np.arange(first, start + width + 1, step)
    axes.set_xlim(0, width)
    axes.set_xticks(places - start - 0.5, [f"{place:,}" for place in places])
    axes.tick_params(labelsize=8)


def _ticks(axes: Axes, count: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(count, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelsize=8)


@cache
def _letter(base: str) -> OutlinePath:
    """The letter as an outline that fills a square of side 1."""
    path = TextPath((0, 0), base, size=1, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    box = path.get_extents()
    return path.transformed(Affine2D().translate(-box.x0, -box.y0).scale(1 / box.width, 1 / box.height))
