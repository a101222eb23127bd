"""The tidy metric table of an evaluation, asked the questions that a report has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import pandas as pd

from seqgraft.metrics import METRICS
from seqgraft.scoring import clean_fold, whole_fold

__all__ = ["Key", "Score", "Scores", "intervals_in_words", "metric_name", "number", "words"]

COLUMNS = ("model", "fold", "group", "track", "metric", "value", "low", "high", "n", "unit", "note")
TEXTS = ("model", "fold", "group", "track", "metric", "unit", "note")
ORIGINAL = "original tracks"  # in the note of scores on the trunk's own tracks, before and after adaptation
#: Parts of model names that say: nothing can be better than this, so it is no baseline.
CEILINGS = ("oracle", "ceiling", "replicate")
NO_INTERVALS = "no intervals: too few test rows are independent of each other"
_NAMES = {
    "pearson": "Pearson", "spearman": "Spearman", "r2": "R²", "mse": "MSE", "auroc": "AUROC", "auprc": "AUPRC",
    "mcc": "MCC", "f1": "F1", "class_mcc": "MCC of classes", "class_f1": "F1 of classes",
    "pearson_of_ceiling": "Pearson", "pearson_across_tracks_of_ceiling": "Pearson of what a track has of its own",
    "pearson_within_genes": "Pearson within genes", "spearman_within_genes": "Spearman within genes",
    "r2_within_genes": "R² within genes", "haplotype_effect": "Pearson of haplotypes' effects across genes",
    "pearson_across_genes": "Pearson of means across genes",
    "pearson_across_regions": "Pearson across regions", "original_pearson": "Pearson",
    "forgetting": "change in Pearson", "agreement": "agreement with before",
    "pearson_across_tracks": "Pearson of what a track has of its own",
    "pearson_across_tracks_differential": "the same where cell types differ most",
    "pearson_across_tracks_differential_of_ceiling": "the same where cell types differ most",
}  # fmt: skip
_LOWER = ("mse", "mae", "loss", "error", "bits_per_base", "cross_entropy", "perplexity")  # ends of metrics' names
_UNITS = {"squashed": "squashed scale", "raw": "raw signal", "label": "", "hidden tokens": ""}


@dataclass(frozen=True)
class Key:
    """What is measured: a metric of a group of tracks in a fold, on a scale.

    Attributes:
        unit: "squashed" (the model's scale), "raw" (signal), "label" or any other text.
        about: "original tracks" for what became of the tracks that the trunk was pretrained on; else "".
        track: "" is the mean over tracks.
    """

    fold: str
    group: str
    metric: str
    unit: str
    about: str
    track: str = ""

    @property
    def is_clean(self) -> bool:
        """Whether it is of rows without copies in the training data, in a fold that has such copies."""
        return self.fold != whole_fold(self.fold)

    @property
    def text(self) -> str:
        """The metric's name."""
        return metric_name(self.metric)

    @property
    def axis(self) -> str:
        """The metric's name and its scale."""
        unit = _UNITS.get(self.unit, self.unit)
        return f"{self.text} ({unit})" if unit else self.text

    def column_of(self, scale: str) -> str:
        """What heads a column where the caption says the group and that scores are on ``scale``."""
        return ", ".join(filter(None, [self.text if self.unit == scale else self.axis, self.track]))

    @property
    def column(self) -> str:
        """What heads a column of scores."""
        return ", ".join(filter(None, [self.axis, self.about or self.group, self.track]))


def intervals_in_words(lows: Iterable[float], known: str) -> str:
    """``known``, which says what the intervals are; or, where no score has one, why."""
    return known if any(math.isfinite(low) for low in lows) else NO_INTERVALS


@dataclass(frozen=True)
class Score:
    """A value and its 95 % interval (NaN if there is none)."""

    value: float
    low: float
    high: float
    higher_better: bool
    is_ceiling: bool

    @property
    def rank(self) -> float:
        """Smaller is better."""
        return -self.value if self.higher_better else self.value

    @property
    def short(self) -> str:
        known = math.isfinite(self.low) and math.isfinite(self.high)
        return f"{self.value:z.2f}" + (f" ({self.low:z.2f} to {self.high:z.2f})" if known else "")

    @property
    def long(self) -> str:
        # one number of decimals within a column reads better than significant digits
        form = ".3f" if abs(self.value) < 10 else ".4g"
        known = math.isfinite(self.low) and math.isfinite(self.high)
        return f"{self.value:z{form}}" + (f" ({self.low:z{form}} to {self.high:z{form}})" if known else "")


@dataclass(frozen=True)
class Scores:
    """``evaluation/metrics.parquet``: one row per model, fold, track and metric."""

    frame: pd.DataFrame

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Self:
        """Checks and completes the table.

        Raises:
            ValueError: it lacks a column that nothing goes without, or has no rows.
        """
        absent = [column for column in ("model", "metric", "value") if column not in frame]
        if absent or frame.empty:
            raise ValueError(f"it lacks the columns {absent}" if absent else "it has no rows")
        numbers = {column: float("nan") for column in ("low", "high", "n")}
        defaults = {column: numbers.get(column, "") for column in COLUMNS}
        filled = frame.assign(**{column: defaults[column] for column in defaults if column not in frame})
        for column in TEXTS:
            filled[column] = filled[column].fillna("").astype(str)
        if filled["group"].nunique() == 1:
            filled["group"] = ""  # there is nothing to tell apart
        return cls(filled.reset_index(drop=True)[[*COLUMNS, *(c for c in filled if c not in COLUMNS)]])

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(self.frame["model"]))

    @property
    def _about(self) -> pd.Series[str]:
        return self.frame["note"].str.contains(ORIGINAL, regex=False).map({True: ORIGINAL, False: ""})

    def has_copies(self, fold: str) -> bool:
        """Whether rows of the fold have copies in the training data, so that there are scores without them as well."""
        return bool((self.frame["fold"] == clean_fold(fold)).any())

    def keys(self) -> list[Key]:
        """All measures of the mean over tracks, in the order of the table; of the tracks where there is no mean.

        Those of rows without copies in the training data come before those of all rows of a fold.
        """
        frame = self.frame.assign(about=self._about)
        means = frame[frame["track"] == ""]
        part = frame if means.empty else means
        rows = part[["fold", "group", "metric", "unit", "about", "track"]].drop_duplicates()
        found = [Key(*row) for row in rows.itertuples(index=False, name=None)]
        return sorted(found, key=lambda key: not key.is_clean)

    def leading(self) -> list[Key]:
        """The first measure of each group of tracks."""
        first: dict[tuple[str, str], Key] = {}
        for key in self.keys():
            first.setdefault((key.group, key.about), key)
        return list(first.values())

    def main(self, model: str) -> Key:
        """What the title speaks of: the model's first measure that is defined."""
        for key in self.keys():
            if self.get(model, key) is not None:
                return key
        return self.keys()[0]

    def get(self, model: str, key: Key) -> Score | None:
        """The score of a model, None where there is none or it is undefined."""
        frame = self.rows(key)
        found = frame[(frame["model"] == model) & (frame["track"] == key.track)]
        if found.empty or not math.isfinite(found["value"].iloc[0]):
            return None
        value, low, high = (float(found[column].iloc[0]) for column in ("value", "low", "high"))
        known = METRICS.get(key.metric)
        better = known.higher_better if known else not key.metric.endswith(_LOWER)
        return Score(value, low, high, better, any(part in model.lower() for part in CEILINGS))

    def others(self, model: str, key: Key) -> Mapping[str, Score]:
        """The scores of all other models: baselines, controls and ceilings."""
        found = {other: self.get(other, key) for other in self.models if other != model}
        return {other: score for other, score in found.items() if score is not None}

    def notes(self, key: Key) -> Mapping[str, list[str]]:
        """What is said of models in a measure -> their names, such as that a baseline has seen what it is tested on."""
        found: dict[str, list[str]] = {}
        for model, note in self.rows(key)[["model", "note"]].drop_duplicates().itertuples(index=False, name=None):
            if note and ORIGINAL not in note:
                found.setdefault(note, []).append(model)
        return found

    def rows(self, key: Key) -> pd.DataFrame:
        """The rows of one measure: every model, every track and the mean."""
        keep = self._about == key.about
        for column in ("fold", "group", "metric", "unit"):
            keep &= self.frame[column] == getattr(key, column)
        return self.frame[keep]


def metric_name(metric: str) -> str:
    """A metric's name as people write it."""
    return _NAMES.get(metric, words(metric))


def number(value: float) -> str:
    """Three significant digits, or all of a whole number."""
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:z.3f}" if 0.01 <= abs(value) < 100 else f"{value:.3g}"


def words(name: str) -> str:
    """``mean_track`` as people write it."""
    return name.replace("_", " ")
