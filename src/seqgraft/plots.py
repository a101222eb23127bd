"""Figures: each function takes a table or arrays and returns a matplotlib figure whose title states the finding.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and every series also has its own marker or line
style. Figures are drawn without a display. :func:`svg` turns one into text to put into a page, where its colours follow
the page's (light or dark). This module and ``logos``, which draws sequences, are the only doors to matplotlib.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from seqgraft.errors import DataError

__all__ = [
    "THEME",
    "Examples",
    "canvas",
    "legend",
    "metric_dots",
    "model_dots",
    "paired_scatter",
    "short_name",
    "styled",
    "svg",
    "tracks_panel",
    "training_curve",
]

Floats = npt.NDArray[np.float64]

INK, FAINT, GRID, AREA = "#1b1f24", "#5f6771", "#d8dce1", "#b4bcc5"
#: Okabe and Ito: blue, orange, green, vermilion, purple, sky blue.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
#: Colour in a figure -> CSS variable in a page.
THEME = {
    INK: "--ink",
    FAINT: "--faint",
    GRID: "--grid",
    AREA: "--area",
    **{c: f"--c{n}" for n, c in enumerate(COLOURS, 1)},
}

WIDTH = 4.8  # inches: text stays readable when a phone shrinks it
MAX_TRACKS = 24
_LEGEND = 48  # letters of a name in a legend
_STYLE: Any = {  # matplotlib types each key
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9.5,
    "text.parse_math": False,  # a dollar sign in a track's name is a dollar sign
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.formatter.useoffset": False,  # whole numbers at the ticks: a "+0.9998" below them falls on other text
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "seqgraft",
}


@contextmanager
def styled() -> Iterator[None]:
    """What is drawn within has the style of all figures here."""
    with mpl.rc_context(_STYLE):
        yield


@dataclass(frozen=True)
class Examples:
    """A few test regions to look at (``evaluation/examples.npz``).

    Attributes:
        tracks: names, ``(tracks,)``.
        chrom, start: where each target interval begins (0-based); chrom "" for sequences without a genome.
        bin_size: bp per bin.
        observed, predicted, baseline: ``(regions, tracks, bins)``, all on one scale; NaN where not measured.
        unit: of the values.
        baseline_name: which baseline it is; "" for none (then ``baseline`` is all NaN).
    """

    tracks: Sequence[str]
    chrom: Sequence[str]
    start: Sequence[int]
    bin_size: int
    observed: npt.NDArray[np.floating]
    predicted: npt.NDArray[np.floating]
    baseline: npt.NDArray[np.floating]
    unit: str = "signal per bin (squashed)"
    baseline_name: str = ""

    def __post_init__(self) -> None:
        shape = (len(self.chrom), len(self.tracks), self.observed.shape[-1])
        shapes = {self.observed.shape, self.predicted.shape, self.baseline.shape}
        if shapes != {shape} or len(self.start) != len(self.chrom):
            raise DataError(f"the examples need the shape (regions, tracks, bins) = {shape}", sorted(shapes))

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Reads ``examples.npz``: arrays named as the attributes, the baseline optional; None if there is no example.

        Raises:
            DataError: it is not such a file, or is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                content = {name: file[name] for name in file.files}
            if not content:
                return None
            observed = content["observed"]
            nothing = np.full(observed.shape, np.nan)
            texts = {name: str(content[name]) for name in ("unit", "baseline_name") if name in content}
            return cls(
                tracks=content["tracks"].tolist(),
                chrom=content["chrom"].tolist(),
                start=content["start"].tolist(),
                bin_size=int(content["bin_size"]),
                observed=observed,
                predicted=content["predicted"],
                baseline=content.get("baseline", nothing),
                unit=texts.get("unit", cls.unit),
                baseline_name=texts.get("baseline_name", ""),
            )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"the examples cannot be read ({error})", where=path, remedy="Evaluate it again") from error


def metric_dots(frame: pd.DataFrame, *, title: str, xlabel: str, highlight: str) -> Figure:
    """One row per track, one dot with its 95 % interval per model, the mean over tracks on top.

    With more than 24 tracks the best and the worst of ``highlight`` are shown, which the axis says.

    Args:
        frame: rows of one metric: model, track ("" is the mean over tracks), value, low, high.
        title: the finding.
        xlabel: metric and unit.
        highlight: the model in the strongest colour, drawn first; the others follow in their order.
    """
    models = [highlight, *(m for m in dict.fromkeys(frame["model"]) if m != highlight)]
    named = frame[frame["track"] != ""]
    own = named[named["model"] == highlight].sort_values("value", ascending=False)
    tracks = [*own["track"], *(t for t in dict.fromkeys(named["track"]) if t not in set(own["track"]))]
    shown, note = tracks, ""
    if len(tracks) > MAX_TRACKS:
        half = MAX_TRACKS // 2
        shown, note = [*tracks[:half], *tracks[-half:]], f"the {half} best and {half} worst of {len(tracks)} tracks"
    rows = ([""] if (frame["track"] == "").any() else []) + shown
    with styled():
        spread = min(0.12 * len(models), 0.62)
        labels = [short_name(track) if track else "mean over tracks" for track in rows]
        height = (0.14 + 0.1 * len(models)) * len(rows) + 0.2
        xlabel += f"\n{note}" if note else ""
        figure, axes, top = canvas(title, height, xlabel=xlabel, legend=models, left=_margin(labels))
        for number, model in enumerate(models):
            offset = (number - (len(models) - 1) / 2) * spread / max(len(models) - 1, 1)
            part = frame[frame["model"] == model].drop_duplicates("track").set_index("track").reindex(rows)
            _dots(axes, part, np.arange(len(rows), dtype=np.float64) + offset, number, model)
        axes.set_yticks(range(len(rows)), labels)
        if rows and rows[0] == "":
            axes.get_yticklabels()[0].set_fontweight("bold")
            axes.axhline(0.5, color=GRID, linewidth=0.8)
        _finish(axes, len(rows), xlabel)
        legend(figure, axes, top)
    return figure


def model_dots(frame: pd.DataFrame, *, title: str, xlabel: str, groups: Sequence[str]) -> Figure:
    """One row per model with its 95 % interval, best on top; groups differ in colour and marker.

    Args:
        frame: model, value, low, high, group; one row per model, in the order from top to bottom.
        title: the finding.
        xlabel: metric and unit.
        groups: names of the groups, for the legend.
    """
    with styled():
        labels = [short_name(_words(str(model))) for model in frame["model"]]
        figure, axes, top = canvas(title, 0.27 * len(frame) + 0.2, legend=groups, left=_margin(labels))
        indexed = frame.reset_index(drop=True)
        for number, group in enumerate(groups):
            part = indexed[indexed["group"] == group]
            _dots(axes, part, part.index.to_numpy(np.float64), number, group)
        axes.set_yticks(range(len(indexed)), labels)
        _finish(axes, len(indexed), xlabel)
        legend(figure, axes, top)
    return figure


def paired_scatter(points: Mapping[str, Floats], *, title: str, xlabel: str, ylabel: str, diagonal: bool) -> Figure:
    """Panels beside each other with the same axes: dots ``(dots, 2)`` of x and y, by the panel's name.

    Args:
        diagonal: with the line where both are equal, and the same range on both axes; else lines at zero.
    """
    with styled():
        lines = textwrap.wrap(title, 78)
        height = 2.5 + 0.2 * len(lines)
        figure = Figure(figsize=(1.5 * WIDTH, height))
        figure.text(0.02, 1 - 0.05 / height, "\n".join(lines), va="top", fontsize=10.5, fontweight="bold")
        edges = {"left": 0.09, "right": 0.98, "top": 1 - (0.2 * len(lines) + 0.5) / height, "bottom": 0.5 / height}
        panels = figure.add_gridspec(1, len(points), wspace=0.12, **edges).subplots(
            sharex=True, sharey=True, squeeze=False
        )
        every = np.concatenate(list(points.values()))
        ends = (float(np.nanmin(every)), float(np.nanmax(every)))
        for number, (axes, (name, dots)) in enumerate(zip(panels[0], points.items(), strict=True)):
            if diagonal:
                axes.plot(ends, ends, color=GRID, linewidth=1, zorder=0)
            else:
                axes.axhline(0, color=GRID, linewidth=1, zorder=0)
                axes.axvline(0, color=GRID, linewidth=1, zorder=0)
            axes.plot(dots[:, 0], dots[:, 1], "o", markersize=2.5, alpha=0.6, color=COLOURS[number % len(COLOURS)])
            axes.set_title(f"{name}\n{len(dots)} genes", fontsize=8)
            axes.set_xlabel(xlabel)
        panels[0, 0].set_ylabel(ylabel)
    return figure


def quality_dots(frame: pd.DataFrame) -> Figure:
    """Depth, enrichment at transcription starts and ceiling of pseudobulk tracks, a row per track, deepest on top.

    Of more than 48 tracks those of the 24 largest and 24 smallest depths are shown.

    Args:
        frame: track, assay, depth, tss_enrichment, ceiling, shallow.
    """
    ordered = frame.sort_values("depth", ascending=False, ignore_index=True)
    shown = ordered if len(ordered) <= 2 * MAX_TRACKS else pd.concat([ordered[:MAX_TRACKS], ordered[-MAX_TRACKS:]])
    shown = shown.reset_index(drop=True)
    shallow = int(frame["shallow"].sum())
    title = f"{len(frame) - shallow} of {len(frame)} tracks are deep enough to learn"
    title += f"; {shallow} mostly noise (hollow)" if shallow else ""
    title += f"; {len(shown)} shown" if len(shown) < len(frame) else ""
    panels = {"depth": "depth, counts", "tss_enrichment": "TSS enrichment", "ceiling": "ceiling (Pearson)"}
    panels = {column: label for column, label in panels.items() if shown[column].notna().any()}
    assays = list(dict.fromkeys(shown["assay"]))
    with styled():
        height = 0.2 * len(shown) + 1.4
        figure = Figure(figsize=(1.5 * WIDTH, height))
        figure.text(0.02, 1 - 0.05 / height, title, va="top", fontsize=10.5, fontweight="bold")
        labels = [short_name(str(track)) for track in shown["track"]]
        edges = {"left": _margin(labels) / 1.4, "right": 0.97, "top": 1 - 0.7 / height, "bottom": 0.5 / height}
        grid = figure.add_gridspec(1, len(panels), wspace=0.15, **edges)
        for column, (name, label) in enumerate(panels.items()):
            axes = figure.add_subplot(grid[column])
            for number, assay in enumerate(assays):
                part = shown[shown["assay"] == assay]
                dots = pd.DataFrame(dict.fromkeys(("value", "low", "high"), part[name]))
                _dots(axes, dots, part.index.to_numpy(np.float64), number, str(assay))
                hollow = part[part["shallow"]]
                axes.plot(
                    hollow[name], hollow.index, linestyle="none", marker=MARKERS[number % len(MARKERS)], markersize=3,
                    color="white",
                )  # fmt: skip
            axes.set_yticks(range(len(shown)), labels if column == 0 else [""] * len(labels))
            _finish(axes, len(shown), label)
            if name == "depth" and (shown["depth"] > 0).any():
                axes.set_xscale("log")
            else:
                axes.xaxis.set_major_locator(MaxNLocator(3))
            if name == "ceiling":
                axes.set_xlim(-0.05, 1.05)
        legend(figure, figure.axes[0], 1 - 0.3 / height)
    return figure


def training_curve(frame: pd.DataFrame, *, score: str = "score") -> Figure:
    """Loss of training and validation, and the validation score with its best epoch marked.

    Args:
        frame: ``log.csv``: epoch, train_loss, valid_loss, and one more column ``valid_...`` (higher is better).
        score: what that column is.
    """
    frame = frame.sort_values("epoch", ignore_index=True)
    column = next((c for c in frame.columns if c.startswith("valid_") and c != "valid_loss"), None)
    scores = frame[column] if column else pd.Series(dtype=float)
    known = scores.notna().any()
    title = "Loss during training"
    if known:
        best = int(np.nanargmax(scores))
        epochs = frame["epoch"].to_numpy(np.int64)
        epoch, last = int(epochs[best]), int(epochs[-1])
        when = "in the last epoch: more may help" if epoch == last and last > 1 else f"in epoch {epoch} of {last}"
        title = f"Validation {score} is best, {scores[best]:.3f}, {when}"
    with styled():
        height, count = (3.0, 2) if known else (2.0, 1)
        figure, upper, top = canvas(title, height, legend=("training", "validation"), panels=count, gap=0.15)
        panels = figure.axes
        for number, (name, label) in enumerate([("train_loss", "training"), ("valid_loss", "validation")]):
            if name in frame:
                line = frame[["epoch", name]].dropna()
                colour, marker, dashes = COLOURS[1 - number], MARKERS[1 - number], ("--", "-")[number]
                values = line[name].to_numpy(np.float64)
                upper.plot(
                    line["epoch"], values, color=colour, marker=marker, linestyle=dashes, markersize=3.5, label=label
                )
        upper.set_ylabel("loss")
        if known:
            panels[1].plot(frame["epoch"], scores, color=COLOURS[0], marker="o", markersize=3.5)
            panels[1].plot(
                epoch, scores[best], marker="o", markersize=9, color=COLOURS[3], fillstyle="none", label="best"
            )
            panels[1].annotate("best", (epoch, scores[best]), xytext=(0, -14), textcoords="offset points", ha="center")
            panels[1].margins(y=0.25)
            panels[1].set_ylabel(score)
            upper.tick_params(labelbottom=False)
        for axes in panels:
            axes.grid(axis="y", color=GRID, linewidth=0.7)
            axes.set_xlim(frame["epoch"].min() - 0.5, frame["epoch"].max() + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[-1].set_xlabel("epoch")
        figure.align_ylabels()
        legend(figure, upper, top)
    return figure


def tracks_panel(examples: Examples, region: int, max_tracks: int = 6) -> Figure:
    """One region as browser tracks: observed filled, predicted and baseline as lines, one panel per track."""
    parts = [array[region] for array in (examples.observed, examples.predicted, examples.baseline)]
    observed, predicted, baseline = (np.asarray(part, dtype=np.float64) for part in parts)
    count = min(len(examples.tracks), max_tracks)
    start, bins = int(examples.start[region]), observed.shape[-1]
    chrom = str(examples.chrom[region]) or "sequence"
    place = f"{chrom}:{start + 1:,}-{start + bins * examples.bin_size:,}"
    title = f"{place}: " + _agreement(observed, predicted, baseline, examples.baseline_name)
    edges = (start + np.arange(bins + 1) * examples.bin_size) / 1000
    with styled():
        named = f"baseline: {_words(examples.baseline_name)}" if examples.baseline_name else "baseline"
        labels = ["observed", "predicted", *([named] if np.isfinite(baseline).any() else [])]
        figure, _, top = canvas(title, 0.9 * count, legend=labels, panels=count, left=0.15, gap=0.55, below_legend=0.2)
        for track, axes in enumerate(figure.axes):
            axes.stairs(np.nan_to_num(observed[track]), edges, fill=True, color=AREA, label="observed")
            axes.stairs(predicted[track], edges, color=COLOURS[0], linewidth=1.3, baseline=None, label="predicted")
            if np.isfinite(baseline[track]).any():
                axes.stairs(
                    baseline[track], edges, color=COLOURS[3], linewidth=1.1, linestyle=(0, (3, 2)), baseline=None,
                    label=named,
                )  # fmt: skip
            axes.set_title(short_name(str(examples.tracks[track]), 60), fontsize=9, fontweight="normal", pad=2)
            axes.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2))
            axes.tick_params(labelbottom=track == count - 1)
            axes.set_xlim(edges[0], edges[-1])
        figure.supylabel(examples.unit, x=0.02, fontsize=9.5)
        more = f"  ({count} of {len(examples.tracks)} tracks)" if count < len(examples.tracks) else ""
        figure.axes[-1].set_xlabel(f"position on {chrom}, kb{more}")
        figure.axes[-1].xaxis.set_major_locator(MaxNLocator(5))
        figure.axes[-1].ticklabel_format(axis="x", useOffset=False)
        legend(figure, figure.axes[0], top)
    return figure


def svg(figure: Figure, name: str, alt: str) -> str:
    """A figure as an ``<svg>`` element for a page; ids start with ``name``, colours are the page's variables.

    It is as much larger than the figure as labels reach beyond that, so that none is cut.
    """
    buffer = io.StringIO()
    with styled():
        whole = Bbox.union([figure.bbox_inches, figure.get_tightbbox().padded(0.04)])
        plain = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=plain, bbox_inches=whole)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # it would style the whole page
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None  # matplotlib always writes one
    label = f'role="img" aria-label="{html.escape(alt)}"'
    return f'<svg {box[0]} {label} xmlns:xlink="http://www.w3.org/1999/xlink">' + text[text.index(">") + 1 :]


def canvas(
    title: str,
    height: float,
    *,
    xlabel: str = "",
    legend: Sequence[str] = (),
    panels: int = 1,
    left: float = 0.13,
    gap: float = 0.0,
    below_legend: float = 0.0,
) -> tuple[Figure, Axes, float]:
    """A figure with its wrapped title above panels that share the x axis; also where the title ends, in figure units.

    ``height`` is that of all panels and ``below_legend`` a space above them, in inches; ``left`` is a share of the
    width and ``gap`` one of a panel's height.
    """
    lines = textwrap.wrap(title, 50) or [""]
    title_height, below = 0.2 * len(lines) + 0.1, 0.34 + 0.17 * (1 + xlabel.count("\n"))
    rows = math.ceil(len(legend) / _columns(legend)) if len(legend) > 1 else 0
    above = title_height + 0.2 * rows + (0.08 if rows else 0.0) + below_legend
    figure = Figure(figsize=(WIDTH, height + above + below))
    total = float(figure.get_size_inches()[1])
    figure.text(0.02, 1 - 0.05 / total, "\n".join(lines), va="top", fontsize=10.5, fontweight="bold", linespacing=1.25)
    place = {"left": left, "right": 0.955, "top": 1 - above / total, "bottom": (below - 0.02) / total}
    grid = figure.add_gridspec(panels, 1, hspace=gap, **place)
    first = figure.add_subplot(grid[0])
    for number in range(1, panels):
        figure.add_subplot(grid[number], sharex=first)
    return figure, first, 1 - title_height / total


def _columns(labels: Sequence[str]) -> int:
    """How many columns of a legend fit beside each other."""
    return max(1, min(3, 60 // (max(map(len, labels)) + 5), len(labels)))


def _margin(labels: Sequence[str]) -> float:
    """Share of the width that the longest label of the y axis takes, in a wide font."""
    return min(0.05 + 0.0185 * max(map(len, labels), default=0), 0.5)


def legend(figure: Figure, axes: Axes, top: float) -> None:
    """The legend of a figure's labels, below its title, which ends at ``top``."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.01, top), ncols=_columns(labels),
            fontsize=9, handletextpad=0.4, columnspacing=1.2, borderaxespad=0,
        )  # fmt: skip


def _dots(axes: Axes, part: pd.DataFrame, y: Floats, number: int, label: str) -> None:
    value = part["value"].to_numpy(np.float64)
    low, high = (part[side].to_numpy(np.float64) for side in ("low", "high"))
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    axes.hlines(y, low, high, color=colour, linewidth=1.4)
    filled = "full" if number < len(COLOURS) else "none"
    style: Any = {"linestyle": "none", "marker": marker, "markersize": 5.5, "fillstyle": filled}
    axes.plot(value, y, color=colour, label=short_name(_words(label), _LEGEND), **style)


def _finish(axes: Axes, rows: int, xlabel: str) -> None:
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    widest = max(map(len, axes.xaxis.get_major_formatter().format_ticks(list(axes.get_xticks()))))
    if widest > 5:  # labels such as 0.99985 would run into each other
        axes.xaxis.set_major_locator(MaxNLocator(3 if widest < 8 else 2))


def _agreement(observed: Floats, predicted: Floats, baseline: Floats, name: str) -> str:
    scores = [_mean_pearson(observed, other) for other in (predicted, baseline)]
    if not np.isfinite(scores[0]):
        return "observed and predicted"
    text = f"prediction follows the signal with Pearson {scores[0]:z.2f}"
    return f"{text}, {_words(name) or 'the baseline'} with {scores[1]:z.2f}" if np.isfinite(scores[1]) else text


def _mean_pearson(observed: Floats, other: Floats) -> float:
    """Mean over tracks of the Pearson correlation along the bins, of tracks where it is defined."""
    found = []
    for x, y in zip(observed, other, strict=True):
        both = np.isfinite(x) & np.isfinite(y)
        if both.sum() > 2 and np.ptp(x[both]) > 0 and np.ptp(y[both]) > 0:
            found.append(float(np.corrcoef(x[both], y[both])[0, 1]))
    return float(np.mean(found)) if found else float("nan")


def _words(name: str) -> str:
    return name.replace("_", " ")


def short_name(name: str, limit: int = 26) -> str:
    """A name without its middle, if it is too long for a figure."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"
