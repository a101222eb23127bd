"""Figures of variants: what both alleles are predicted to do in every cell type, of those that a table has scored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from seqgraft.cell_plots import VariantPanel, variant_panel
from seqgraft.data.dataset import check_new_folder, new_folder
from seqgraft.errors import ConfigError
from seqgraft.genes import signal_table
from seqgraft.genome import Variant
from seqgraft.models.base import SequenceModel
from seqgraft.plots import styled
from seqgraft.progress import progress, steps
from seqgraft.variants.marks import marks_of
from seqgraft.variants.over import Window
from seqgraft.variants.place import Layout
from seqgraft.variants.score import VariantConfig, VariantScorer

__all__ = ["SHOWN", "Panels", "Profile", "check_panels", "draw_panels", "in_words", "profile_of"]

SHOWN = 64  # bins around the variant
MAX_ROWS = 24  # cell types

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Panels:
    """Which variants are drawn, and where to.

    Attributes:
        folder: new, for a figure each.
        top: so many with the largest score of the first scorer in any track.
        named: those with these IDs instead.
        suffix: of the figures, ``.png`` or ``.svg``.
    """

    folder: Path
    top: int = 10
    named: tuple[str, ...] = ()
    suffix: str = ".png"

    def __post_init__(self) -> None:
        if self.suffix not in (".png", ".svg"):
            remedy = "Choose .png or .svg"
            raise ConfigError("figures of this format are not drawn", self.suffix, remedy=remedy)
        if self.top < 1:
            raise ConfigError("must be 1 or more", self.top, where="--top", remedy="Give a positive number")


@dataclass(frozen=True, eq=False)
class Profile:
    """Predictions of both alleles around a variant.

    Attributes:
        start: of the first bin, 0-based.
        reference, alternate: raw values ``(tracks, bins)``, the alternate's beside those of the reference.
    """

    start: int
    reference: Floats
    alternate: Floats


def profile_of(scorers: Sequence[VariantScorer], layout: Layout, variant: Variant) -> Profile:
    """64 bins around a variant, or all there are; the mean over ``scorers``, which read ``Window()``.

    Raises:
        ModelError: predictions that are not finite.
    """
    each = [next(scorer.profiles(variant)) for scorer in steps(scorers)]
    first_base = each[0][0].start + layout.margin
    shown = min(SHOWN, layout.bins)
    at = (variant.position - 1 - first_base) // layout.bin_size - shown // 2
    at = min(max(0, at), layout.bins - shown)
    alleles = [ref for _, ref, _ in each], [alt for _, _, alt in each]
    reference, alternate = (np.mean(parts, axis=0)[:, at : at + shown] for parts in alleles)
    return Profile(first_base + at * layout.bin_size, reference, alternate)


def check_panels(panels: Panels, layout: Layout, out: Path) -> None:
    """Finds what stands in the way of the figures before anything is scored.

    Raises:
        ConfigError: labels, which have no bins to draw; scores that go into a VCF.
        RunError: the folder exists already or cannot be written.
    """
    if layout.bins == 1:
        raise ConfigError("a label has no bins to draw", where="--plots", remedy="Leave it out")
    if not out.name.lower().endswith(".parquet"):
        remedy = "End the output in .parquet"
        raise ConfigError("variants are drawn from a table of scores", out.name, where="--plots", remedy=remedy)
    check_new_folder(panels.folder)


def draw_panels(
    models: Sequence[SequenceModel], layout: Layout, config: VariantConfig, table: Path, panels: Panels
) -> list[Path]:
    """Draws some variants of a table of scores.

    Args:
        models: whose predictions are averaged.
        config: as the table was made; the figures show 64 bins around each variant, whatever was scored.

    Returns:
        The figures, the largest effects (or the IDs in the order of the table) first.

    Raises:
        ConfigError: an ID is not in the table.
        RunError: the folder cannot be written.
    """
    columns = [*VariantScorer(models[0], layout, config).columns]
    config = config.resolved(layout)
    chosen = _chosen(table, columns, config.scorers[0].label, panels)
    scorers = [VariantScorer(model, layout, replace(config, over=Window())) for model in models]
    with new_folder(panels.folder) as building:
        for number, (variant, scores) in enumerate(progress(chosen, "Drawing variants")):
            title = f"{in_words(variant)}: {_finding(layout, config, scores)}"
            figure = variant_panel(_panel(scorers, layout, variant, title))
            name = re.sub(r"[^A-Za-z0-9_.-]+", "_", variant.id or str(variant)).strip("._")[:60]
            path = building / f"{number:04d}_{name}{panels.suffix}"
            metadata = {"Date": None} if panels.suffix == ".svg" else None
            with styled():
                figure.savefig(path, dpi=150, facecolor="white", metadata=metadata)
    return sorted(panels.folder.iterdir())


def _chosen(table: Path, columns: Sequence[str], scorer: str, panels: Panels) -> list[tuple[Variant, Floats]]:
    """Variants with their scores ``(columns,)``; of several rows of one (genes, regions) that with the largest."""
    found: dict[Variant, Floats] = {}
    wanted = set(panels.named)
    for rows in _rows(table, columns, scorer):
        kept = rows[rows["id"].isin(wanted)] if wanted else rows
        scores = kept[list(columns)].to_numpy(np.float64)
        places = kept[["chrom", "position", "ref", "alt", "id"]].itertuples(index=False, name=None)
        for place, values in zip(places, scores, strict=True):
            variant = Variant(*place)
            if variant not in found or _size(values) > _size(found[variant]):
                found[variant] = values
        if not wanted:
            found = dict(nlargest(panels.top, found.items(), key=lambda item: _size(item[1])))
    if absent := sorted(wanted - {variant.id for variant in found}):
        remedy = "Name variants by the ID column of the VCF"
        raise ConfigError("no scored variant has this ID", absent, where="--named", remedy=remedy)
    return list(found.items())


def _rows(table: Path, columns: Sequence[str], scorer: str) -> Iterator[pd.DataFrame]:
    names = ["chrom", "position", "ref", "alt", "id", "scorer", *columns]
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(columns=names):
            rows = batch.to_pandas()
            yield rows[rows["scorer"] == scorer]


def _size(values: Floats) -> float:
    return float(np.nanmax(np.abs(values), initial=-1.0))


def in_words(variant: Variant) -> str:
    """A variant with its name, long alleles shortened."""
    ref, alt = (text if len(text) <= 10 else f"{text[:8]}… ({len(text)} bases)" for text in (variant.ref, variant.alt))
    name = f"{variant.id}, " if variant.id not in ("", ".") else ""
    return f"{name}{variant.chrom}:{variant.position:,} {ref}>{alt}"


def _finding(layout: Layout, config: VariantConfig, scores: Floats) -> str:
    """Which cell type it affects most, of the mark where that is clearest."""
    label = config.scorers[0].label.replace("_", " ")
    found = []
    for mark in marks_of(layout.tracks, config.merge_strands):
        (name,), (margin,) = mark.most_affected(scores[None])
        if name and np.isfinite(margin):
            value = float(np.nanmean(scores[list(mark.conditions[name])]))
            found.append((float(margin), mark.group, name, value))
    if not found:
        return f"{label} of {_size(scores):.2f} at most"
    margin, group, name, value = max(found)
    return f"most in {name} ({group}), {label} {value:+.2f}, {margin:.2f} beyond the next cell type"


def _panel(scorers: Sequence[VariantScorer], layout: Layout, variant: Variant, title: str) -> VariantPanel:
    profile = profile_of(scorers, layout, variant)
    signals = signal_table(layout.tracks)
    names = [condition or name for condition, name in zip(signals["condition"], signals["name"], strict=True)]
    rows, columns = list(dict.fromkeys(names)), list(dict.fromkeys(signals["group"]))
    stranded = bool((signals["plus"] != signals["minus"]).any())
    shape = (len(rows), len(columns), 1 + stranded, profile.reference.shape[-1])
    both = [np.full(shape, np.nan), np.full(shape, np.nan)]
    for row, column in np.ndindex(len(rows), len(columns)):
        own = signals[(np.array(names) == rows[row]) & (signals["group"] == columns[column]).to_numpy()]
        for strand, side in enumerate(("plus", "minus")[: 1 + stranded]):
            places = own.loc[own["plus"] != own["minus"], side] if strand else own[side]
            if len(places):
                for into, values in zip(both, (profile.reference, profile.alternate), strict=True):
                    into[row, column, strand] = values[places.to_numpy()].mean(axis=0)
    return VariantPanel(
        title=title,
        chrom=variant.chrom,
        start=profile.start,
        bin_size=layout.bin_size,
        changed=(variant.position - 1, variant.position - 1 + len(variant.ref)),
        rows=rows[:MAX_ROWS],
        columns=columns,
        reference=both[0][:MAX_ROWS],
        alternate=both[1][:MAX_ROWS],
    )
