"""Which metrics suit which tracks, and the statistics they need, collected batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.errors import ConfigError
from seqgraft.intervals import Estimate
from seqgraft.metrics import METRICS, Accumulator, Confusion, Moments, Score, Statistics, Values, mean_score
from seqgraft.tracks import TrackTable

__all__ = ["METRICS_OF_LINK", "Card", "Scorecard", "card_rows", "clean_fold", "default_metric", "whole_fold"]

_CLEAN = " without copies"

#: With fewer blocks than this, a bootstrap interval is a rough one, and says so.
FEW_BLOCKS = 10

#: Link -> metrics that are reported, the leading one first: it also picks the best checkpoint.
METRICS_OF_LINK: dict[str, tuple[str, ...]] = {
    "softplus": ("pearson", "spearman", "r2", "mse"),
    "identity": ("pearson", "spearman", "r2", "mse"),
    "sigmoid": ("auroc", "auprc", "mcc", "f1", "accuracy"),
    "softmax": ("class_mcc", "class_f1", "class_accuracy"),
}


def default_metric(link: str) -> str:
    """The leading metric of tracks with this link."""
    return METRICS_OF_LINK[link][0]


def clean_fold(fold: str) -> str:
    """What tables of scores call the rows of a fold that have no exact or near copy in an earlier fold."""
    return fold + _CLEAN


def whole_fold(fold: str) -> str:
    """The fold of whose rows these are all or the clean ones."""
    return fold.removesuffix(_CLEAN)


@dataclass(frozen=True)
class Card:
    """One metric of one group.

    Attributes:
        units: names of what is scored: the group's tracks, or the group itself if its tracks are classes.
        statistics: per region, in the order of their rows.
    """

    group: str
    metric: str
    units: Sequence[str]
    statistics: Statistics

    def scores(self) -> list[Score]:
        return self.statistics.scores(self.metric)


def card_rows(
    model: str, fold: str, unit: str, card: Card, estimate: Estimate, blocks: npt.NDArray[Any], note: str = ""
) -> pd.DataFrame:
    """A row per unit, then their mean with track ""; undefined values say why."""
    shared = {"model": model, "fold": fold, "group": card.group, "metric": card.metric, "n": len(blocks), "unit": unit}
    # "forgetting", "pearson_across_regions" and the like are Pearsons of something else
    scores = card.statistics.scores(card.metric if card.metric in METRICS else "pearson")
    rows = [
        {
            **shared,
            "track": unit_name,
            "value": value,
            "low": low,
            "high": high,
            "note": note or score.reason,
        }
        for unit_name, value, low, high, score in zip(
            card.units, estimate.value, estimate.low, estimate.high, scores, strict=True
        )
    ]
    skipped = f"{estimate.undefined} of {len(card.units)} tracks undefined and left out" if estimate.undefined else ""
    drawn = len(np.unique(blocks))
    if drawn < FEW_BLOCKS and np.isfinite(estimate.mean_low):
        skipped = "; ".join(filter(None, [skipped, f"rough interval, from {drawn} blocks of regions"]))
    rows.append(
        {
            **shared,
            "track": "",
            "value": estimate.mean,
            "low": estimate.mean_low,
            "high": estimate.mean_high,
            "note": note or skipped,
        }
    )
    return pd.DataFrame(rows)[
        ["model", "fold", "group", "track", "metric", "value", "low", "high", "n", "unit", "note"]
    ]


class Scorecard:
    """Collects statistics for the metrics of every group of tracks.

    Args:
        tracks: the track axis of what will be scored.
        metrics: the metrics wanted; None for all that suit each group. A metric that suits no group is an error.

    Raises:
        ConfigError: an unknown metric, or one that suits none of the tracks.
    """

    def __init__(self, tracks: TrackTable, metrics: Sequence[str] | None = None) -> None:
        links = tracks.frame["link"].tolist()
        self._index = dict(tracks.groups)
        suited = {group: METRICS_OF_LINK[links[index[0]]] for group, index in self._index.items()}
        for metric in metrics or ():
            if metric not in METRICS or not any(metric in names for names in suited.values()):
                possible = sorted({name for names in suited.values() for name in names})
                raise ConfigError(
                    "the metric does not suit these tracks",
                    metric,
                    where="metric",
                    remedy=f"Choose from {', '.join(possible)}",
                )
        self._metrics = {
            group: [name for name in names if metrics is None or name in metrics] for group, names in suited.items()
        }
        self._units = {
            group: [group] if links[index[0]] == "softmax" else [tracks.names[i] for i in index]
            for group, index in self._index.items()
        }
        self._parts: dict[tuple[str, str], Accumulator[Any]] = {
            (group, METRICS[name].statistic): Accumulator(_builder(name))
            for group, names in self._metrics.items()
            for name in names
        }

    def update(self, y_true: npt.NDArray[Any], y_pred: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> None:
        """Adds regions: ``(regions, tracks, bins)``, predictions after the link; missing targets are NaN."""
        for (group, _), accumulator in self._parts.items():
            index = self._index[group]
            accumulator.update(y_true[:, index], y_pred[:, index], None, rows)

    def result(self) -> list[Card]:
        done = {key: accumulator.result() for key, accumulator in self._parts.items()}
        return [
            Card(group, name, self._units[group], done[group, METRICS[name].statistic])
            for group, names in self._metrics.items()
            for name in names
        ]

    def leading(self) -> Score:
        """Each group's leading metric, averaged over all units; lower-is-better metrics with a minus sign."""
        scores: list[Score] = []
        seen: set[str] = set()
        for card in self.result():
            if card.group not in seen:
                seen.add(card.group)
                sign = 1 if METRICS[card.metric].higher_better else -1
                scores += [Score(sign * score.value, score.count, score.reason) for score in card.scores()]
        return mean_score(scores)


def _builder(metric: str) -> Callable[..., Statistics]:
    entry = METRICS[metric]
    if entry.statistic == "confusion":
        return Confusion.of_classes if entry.task == "multiclass" else Confusion.of_tracks
    builders: Mapping[str, Callable[..., Statistics]] = {"moments": Moments.of, "values": Values.of}
    return builders[entry.statistic]
