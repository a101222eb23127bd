"""What each cell type has of its own: correlation after centring, at differential regions, confusion, ceilings.

A *mark* is the tracks of one group (an assay) and strand; its cell types are their conditions. Every track of a mark is
divided by its mean over the scored bins, predictions by theirs, because depth is no property of cells; then the mean
over the tracks is subtracted at every position. Ceilings come from random halves of each group's cells, treated alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.dataset import Dataset
from seqgraft.intervals import Estimate, bootstrap_of, reliability
from seqgraft.metrics import Moments, centre_tracks
from seqgraft.scoring import METRICS_OF_LINK, Card, card_rows
from seqgraft.tracks import TrackTable

__all__ = [
    "ACROSS",
    "CEILING",
    "DIFFERENTIAL",
    "OF_CEILING",
    "RECOGNISED",
    "Ceilings",
    "across_cards",
    "confusion_table",
    "differential_bins",
    "recognised_rows",
]

ACROSS = "pearson_across_tracks"
DIFFERENTIAL = "pearson_across_tracks_differential"
OF_CEILING = "_of_ceiling"  # ends a metric's name that was divided by its ceiling
RECOGNISED = "cell_types_recognised"
CEILING = "split-half ceiling"  # stands where a model does in tables

PIECE = 1000  # bp that are differential together, or not
SHARE = 0.1  # of the pieces of a fold that count as differential
FEWEST = 10  # pieces, if there are as many
ABOVE = "at or above the ceiling, which is an estimate itself"
WITHOUT = "no ceiling: the halves of its cells do not agree"

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


# ---- what tracks have of their own ----


def _marks(tracks: TrackTable, group: str) -> list[list[int]]:
    """Positions of the tracks of a group, by strand, of strands with several."""
    index, strands = tracks.groups[group], tracks.strands
    alike = [[i for i in index if strands[i] == strand] for strand in "+-."]
    return [some for some in alike if len(some) > 1]


def _of_cell_types(tracks: TrackTable, group: str) -> list[list[int]]:
    """The same, of the tracks that have a condition, if these have several."""
    conditions = tracks.frame["condition"].tolist()
    named = [[i for i in some if conditions[i]] for some in _marks(tracks, group)]
    return [some for some in named if len({conditions[i] for i in some}) > 1]


def _levelled(values: Array, known: Bools, tracks: TrackTable, index: Sequence[int]) -> Floats:
    """Some tracks divided by their means over the known bins, ``(rows, len(index), bins)``; NaN where not known.

    Only signal that cannot be negative has a level; other tracks stay as they are, as do those without signal.
    """
    chosen = np.where(known[:, index], values[:, index], np.nan).astype(np.float64)
    mean = np.nansum(chosen, axis=(0, 2)) / np.maximum(known[:, index].sum(axis=(0, 2)), 1)
    positive = np.array([tracks.links[i] == "softplus" for i in index]) & (mean > 0)
    return np.asarray(chosen / np.where(positive, mean, 1.0)[:, None])


def differential_bins(tracks: TrackTable, truth: Array, bin_size: int) -> dict[str, Bools]:
    """Where the observed cell types of each group that has some differ most, bool ``(rows, bins)``.

    Regions are cut into pieces of about 1,000 bp (whole bins). Of each piece and cell type the mean of the levelled
    signal is taken, and its variance across cell types, added up over strands. The tenth of the pieces with the largest
    variance count, and at least ten. The same data choose and score them: noise that chose a piece is in its scores.
    """
    marks = {group: _of_cell_types(tracks, group) for group in tracks.groups}
    return {group: _differential(tracks, some, truth, bin_size) for group, some in marks.items() if some}


def _differential(tracks: TrackTable, marks: Sequence[Sequence[int]], truth: Array, bin_size: int) -> Bools:
    rows, _, bins = truth.shape
    size = min(bins, max(1, round(PIECE / bin_size)))
    edges = np.arange(0, bins, size)
    variance = np.zeros((rows, len(edges)))
    conditions = np.array(tracks.frame["condition"].tolist())
    for index in marks:
        levelled = _levelled(truth, np.isfinite(truth), tracks, index)
        known = np.isfinite(levelled).all(axis=1, keepdims=True)
        total = np.add.reduceat(np.where(known, levelled, 0.0), edges, axis=2)
        count = np.add.reduceat(known.astype(np.float64), edges, axis=2)
        means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        each = [means[:, conditions[index] == name].mean(axis=1) for name in dict.fromkeys(conditions[index])]
        variance += np.nan_to_num(np.var(each, axis=0), nan=-1.0)
    wanted = min(variance.size, max(FEWEST, round(SHARE * variance.size)))
    least = max(0.0, float(np.sort(variance, axis=None)[-wanted]))
    return np.asarray(np.repeat(variance >= least, size, axis=1)[:, :bins])


def across_cards(
    tracks: TrackTable,
    truth: Array,
    predicted: Array,
    rows: npt.NDArray[np.int64],
    differential: Mapping[str, Bools],
) -> list[Card]:
    """Statistics of what tracks have of their own: of all groups with several tracks, and where cell types differ.

    Args:
        truth, predicted: squashed ``(rows, tracks, bins)``; missing targets are NaN.
        differential: of each group with cell types, from :func:`differential_bins`.
    """
    cards = []
    known = np.isfinite(truth)
    for group in tracks.groups:
        marks = _marks(tracks, group)
        if not marks or "pearson" not in METRICS_OF_LINK[tracks.links[marks[0][0]]]:
            continue
        index = [i for some in marks for i in some]
        true, pred = (
            np.concatenate([centre_tracks(_levelled(values, known, tracks, some)) for some in marks], axis=1)
            for values in (truth, predicted)
        )
        cards.append(Card(group, ACROSS, [tracks.names[i] for i in index], Moments.of(true, pred, None, rows)))
        named = {i for some in _of_cell_types(tracks, group) for i in some}
        if named:
            places = [place for place, i in enumerate(index) if i in named]
            found = Moments.of(true[:, places], pred[:, places], differential[group][:, None], rows)
            cards.append(Card(group, DIFFERENTIAL, [tracks.names[index[place]] for place in places], found))
    return cards


# ---- confusion ----


def confusion_table(tracks: TrackTable, truth: Array, predicted: Array) -> pd.DataFrame:
    """Pearson of every observed cell type with every predicted one, after levelling and centring across cell types.

    Tracks of one cell type (replicates) are averaged, and strands stand one after the other. An observed cell type is
    recognised if its own prediction correlates best with it.

    Args:
        truth, predicted: squashed ``(rows, tracks, bins)``; missing targets are NaN.

    Returns:
        group, observed, predicted, pearson, best (of its observed cell type), n (bins); no rows without cell types.
    """
    tables = []
    known = np.isfinite(truth)
    conditions = np.array(tracks.frame["condition"].tolist())
    for group in tracks.groups:
        marks = _of_cell_types(tracks, group)
        shared = [name for name in dict.fromkeys(conditions) if marks and all(name in conditions[m] for m in marks)]
        if len(shared) < 2:
            continue
        both = []
        for values in (truth, predicted):
            parts = []
            for some in marks:
                levelled = _levelled(values, known, tracks, some)
                each = [levelled[:, conditions[some] == name].mean(axis=1) for name in shared]
                parts.append(centre_tracks(np.stack(each, axis=1)).transpose(1, 0, 2).reshape(len(shared), -1))
            both.append(np.concatenate(parts, axis=1))
        used = np.isfinite(both[0]).all(axis=0)
        true, pred = (values[:, used] - values[:, used].mean(axis=1, keepdims=True) for values in both)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = true @ pred.T / np.sqrt((true**2).sum(1)[:, None] * (pred**2).sum(1))
        best = r == np.fmax.reduce(r, axis=1, keepdims=True)
        names = np.array(shared, dtype=object)
        content = {"observed": np.repeat(names, len(names)), "predicted": np.tile(names, len(names))}
        found = pd.DataFrame({"group": group, **content, "pearson": r.ravel(), "best": best.ravel()})
        tables.append(found.assign(n=int(used.sum())))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def recognised_rows(confusion: pd.DataFrame, n: int) -> pd.DataFrame:
    """Of each model, fold and group the share of cell types that are recognised, as rows of the metric table.

    Args:
        n: regions.
    """
    rows = []
    for (model, fold, group), part in confusion.groupby(["model", "fold", "group"], sort=False):
        own = part[part["observed"] == part["predicted"]]
        right = int(own["best"].sum())
        row = {"model": model, "fold": fold, "group": group, "track": "", "metric": RECOGNISED}
        row |= {"value": right / len(own), "low": np.nan, "high": np.nan, "n": n, "unit": "share of cell types"}
        rows.append(row | {"note": f"{right} of {len(own)}"})
    return pd.DataFrame(rows)


# ---- ceilings ----


@dataclass(frozen=True, eq=False)
class Ceilings:
    """What random halves of each group's cells allow on some rows, by group and metric.

    Attributes:
        cards: of one half against the other: "pearson", and those of :func:`across_cards`.
        parts: depth of both halves of each track in these rows, ``(2, tracks)``.
        confusion: of one half with the other, as :func:`confusion_table` has it.
        tracks: names.
    """

    cards: Mapping[tuple[str, str], Card]
    parts: Floats
    confusion: pd.DataFrame
    tracks: Sequence[str]

    @classmethod
    def of(cls, dataset: Dataset, rows: npt.NDArray[np.int64], differential: Mapping[str, Bools]) -> Ceilings | None:
        """Of the rows of a dataset; None if it keeps no halves of them.

        Args:
            differential: bins of each group where the whole data differ most: the halves are compared there.
        """
        found = dataset.squashed_halves(rows)
        if found is None:
            return None
        tracks, (first, second), parts = dataset.tracks, *found
        cards = {}
        for group, index in tracks.groups.items():
            whole = Moments.of(first[:, index], second[:, index], None, rows)
            cards[group, "pearson"] = Card(group, "pearson", [tracks.names[i] for i in index], whole)
        for card in across_cards(tracks, first, second, rows, differential):
            cards[card.group, card.metric] = card
        ways = [confusion_table(tracks, *pair) for pair in ((first, second), (second, first))]
        return cls(cards, parts, _mean_confusion(*ways), tracks.names)

    def compute(self, card: Card, weights: Floats | None = None) -> Floats:
        """The highest Pearson that a noise-free prediction could have, of each track; NaN where there is none.

        The root of the reliability, which Spearman and Brown's formula makes of the correlation of the halves.
        """
        r = card.statistics.compute("pearson", weights)
        a, b = self.parts[:, [self.tracks.index(name) for name in card.units]]
        ceiling = np.sqrt(reliability(r, a, b))
        return np.where(ceiling > 0, ceiling, np.nan)

    def rows(self, fold: str, blocks: Array, draws: int) -> list[pd.DataFrame]:
        """The ceilings as rows of the metric table, where a model's scores would be."""
        tables = []
        for card in self.cards.values():
            estimate = bootstrap_of(lambda weights, card=card: self.compute(card, weights), blocks, draws=draws)  # type: ignore[misc]
            table = card_rows(CEILING, fold, "squashed", card, estimate, blocks)
            table.loc[table["value"].isna(), "note"] = WITHOUT
            tables.append(table)
        return tables

    def shares(self, model: str, fold: str, cards: Iterable[Card], blocks: Array, draws: int) -> list[pd.DataFrame]:
        """Scores of a model divided by their ceilings, drawn together; those at or above say so."""
        tables = []
        for card in cards:
            of_halves = self.cards.get((card.group, card.metric))
            if of_halves is None:
                continue

            def share(weights: Floats | None, card: Card = card, of_halves: Card = of_halves) -> Floats:
                return card.statistics.compute("pearson", weights) / self.compute(of_halves, weights)

            tables.append(_shares(model, fold, card, bootstrap_of(share, blocks, draws=draws), blocks))
        return tables


def _shares(model: str, fold: str, card: Card, estimate: Estimate, blocks: Array) -> pd.DataFrame:
    named = Card(card.group, card.metric + OF_CEILING, card.units, card.statistics)
    table = card_rows(model, fold, "share of the ceiling", named, estimate, blocks)
    own = table["track"] != ""
    table.loc[own & table["value"].isna() & (table["note"] == ""), "note"] = WITHOUT
    above = own & (table["value"] >= 1)
    table.loc[above, "note"] = ABOVE
    if above.any():
        note = f"{int(above.sum())} of {int(own.sum())} tracks {ABOVE}"
        table.loc[~own, "note"] = ["; ".join(filter(None, [note, before])) for before in table.loc[~own, "note"]]
    return table


def _mean_confusion(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """One table of both ways to call a half the observed one."""
    if first.empty:
        return first
    mean = first.assign(pearson=(first["pearson"] + second["pearson"]) / 2)
    largest = mean.groupby(["group", "observed"], sort=False)["pearson"].transform("max")
    return mean.assign(best=mean["pearson"] == largest)
