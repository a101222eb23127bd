"""The tables of a sweep: one row per cell, a summary over seeds, and tests between methods on the same test items."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.cells import read_cell
from seqgraft.data.dataset import Dataset, open_dataset
from seqgraft.experiment import Experiment
from seqgraft.intervals import combine_p, hierarchical_draws, hierarchical_estimate, holm, mcnemar
from seqgraft.metrics import METRICS, Confusion, Moments, Values
from seqgraft.run import label_of
from seqgraft.scoring import METRICS_OF_LINK, Card, Scorecard, default_metric

__all__ = ["SETTING", "Entry", "Tables", "make_tables", "method_of"]

Array = npt.NDArray[Any]

#: What tells the settings of a data set apart; cells that differ in their seed alone share all of it.
SETTING = ["dataset", "role", "model", "method", "rank", "lr", "batch_size", "settings"]
_COSTS = ["trainable", "total", "adapter_bytes", "memory_bytes", "seconds", "seconds_per_epoch", "merged_difference"]
#: Where a metric ends, if not at -1 and 1.
_BOUNDS = {
    **dict.fromkeys(("auroc", "auprc", "accuracy", "f1", "class_accuracy", "class_f1"), (0.0, 1.0)),
    "r2": (-np.inf, 1.0),
    "mse": (0.0, np.inf),
}
#: An adjusted p-value below this tells two methods apart.
LEVEL = 0.05


@dataclass(frozen=True)
class Entry:
    """A cell in the tables.

    Attributes:
        role: "run" is tested, "control" is the same with random weights, "trial" was only tuned.
        dataset, model: names in tables; ``settings`` what else varies within the method, in words.
    """

    folder: Path
    experiment: Experiment
    role: str
    dataset: str
    model: str
    settings: str = ""

    @property
    def row(self) -> dict[str, Any]:
        train, adapter = self.experiment.train, self.experiment.adapter
        return {
            "cell": self.folder.name,
            "role": self.role,
            "dataset": self.dataset,
            "model": self.model,
            "method": method_of(self.experiment),
            "label": label_of(self.experiment),
            "rank": np.nan if adapter.size is None else adapter.size,
            "lr": train.lr,
            "batch_size": train.batch_size * train.accumulate,
            "seed": train.seed,
            "settings": self.settings,
        }


def method_of(experiment: Experiment) -> str:
    """The run's name in tables without the rank or width of its adapter."""
    return label_of(experiment).replace(experiment.adapter.label, experiment.adapter.method)


@dataclass(frozen=True)
class Tables:
    """``results`` has a row per cell (and group of tracks), ``summary`` one per setting, ``tests`` one per pair."""

    results: pd.DataFrame
    summary: pd.DataFrame
    tests: pd.DataFrame

    def save(self, folder: Path) -> None:
        """Writes each as Parquet and CSV."""
        for name in ("results", "summary", "tests"):
            frame: pd.DataFrame = getattr(self, name)
            for suffix, write in ((".parquet", frame.to_parquet), (".csv", frame.to_csv)):
                part = folder / f".{name}.part"
                write(part, index=False)
                part.replace(folder / f"{name}{suffix}")


@dataclass(frozen=True)
class _Contender:
    """What is compared: the runs of a setting, or a baseline.

    Attributes:
        cards: of each seed, the leading metric of one group of tracks; a baseline has one.
        drawn: the mean over seeds under each draw of the bootstrap.
    """

    role: str
    model: str
    method: str
    cards: Mapping[int, Card]
    blocks: Array
    drawn: Array = field(default_factory=lambda: np.empty((0, 1)))

    @property
    def metric(self) -> str:
        return next(iter(self.cards.values())).metric

    @property
    def each(self) -> dict[int, Array]:
        """The metric of each unit, by seed."""
        return {seed: card.statistics.compute(self.metric) for seed, card in self.cards.items()}

    @property
    def values(self) -> Array:
        """The metric of each unit, the mean over seeds."""
        return np.asarray(np.mean(list(self.each.values()), axis=0))


def make_tables(entries: Sequence[Entry], baselines: Mapping[str, Path], draws: int = 1000) -> Tables:
    """Reads what the cells left and compares them.

    Args:
        baselines: name of a data set -> ``.npz`` of the baselines' predictions for its evaluation fold.
        draws: of the bootstrap, at least; with many pairs more are taken, so that a small p-value can be seen.
    """
    results = pd.DataFrame([row for entry in entries for row in _rows(entry)])
    folders = {entry.folder.name: entry for entry in entries}
    scored = results[results["score"].notna()]
    settings, tests = [], []
    for (dataset, group), part in scored.groupby(["dataset", "group"], sort=False):
        chosen = _chosen(part)
        contenders: list[_Contender] = []
        count = int(chosen.sum()) + 4
        more = max(draws, 100 * count * (count - 1) // 2)
        for key, runs in part.groupby(SETTING, sort=False, dropna=False):
            entry = folders[runs["cell"].iloc[0]]
            contender = _contender(entry, runs, folders, str(group), more)
            is_chosen = bool(chosen[runs.index].any()) or entry.role == "control"
            settings.append(dict(zip(SETTING, key, strict=True)) | _summary(runs, contender, is_chosen))
            if is_chosen and contender is not None:
                contenders.append(contender)
        for floor in _floors(folders[part["cell"].iloc[0]], baselines.get(str(dataset)), str(group), more):
            place = {"dataset": dataset, "role": "baseline", "model": "", "method": floor.method, "settings": ""}
            settings.append(place | {"group": group, "chosen": True} | _score(floor))
            contenders.append(floor)
        tests += [{"dataset": dataset, "group": group, **test} for test in _tests(contenders)]
    columns = [*SETTING[:4], "group", *SETTING[4:], "metric", "score", "low", "high", "seed_sd", "seeds", "n"]
    columns += ["valid_score", "chosen", *_COSTS]
    summary = pd.DataFrame(settings).reindex(columns=columns)
    return Tables(results, summary, pd.DataFrame(tests, columns=_TEST_COLUMNS))


# ---- one row per cell ----


def _rows(entry: Entry) -> Iterator[dict[str, Any]]:
    found = read_cell(entry.folder)
    environment = _json(entry.folder / "environment.json")
    counts, result = environment.get("counts", {}), environment.get("result", {})
    trained = sum(counts[part] for part in ("adapter", "head", "trunk")) if counts else np.nan
    files = [entry.folder / "adapter" / name for name in ("adapter.json", "weights.safetensors")]
    facts = {
        "valid_score": result.get("best_score", np.nan),
        "best_epoch": result.get("best_epoch", np.nan),
        "epochs": result.get("epochs", np.nan),
        "trainable": trained,
        "total": counts.get("total", np.nan),
        "trainable_percent": 100 * trained / counts["total"] if counts else np.nan,
        "adapter_bytes": sum(file.stat().st_size for file in files if file.is_file()) or np.nan,
        **{name: _number(found.get(name)) for name in ("memory_bytes", "process_peak_bytes")},
        "memory_how": found.get("memory_how", ""),
        **{name: _number(found.get(name)) for name in ("seconds", "seconds_per_epoch", "merged_difference")},
        "merged_note": found.get("merged_note", ""),
        "status": found["status"],
        "message": found["message"],
    }
    nothing = {"fold": "", "group": "", "metric": "", "score": np.nan, "low": np.nan, "high": np.nan, "n": np.nan}
    scores: list[Any] = [nothing]
    table = entry.folder / "evaluation" / "metrics.parquet"
    if entry.role != "trial" and found["status"] == "done" and table.is_file():
        metrics = pd.read_parquet(table)
        means = metrics[(metrics["model"] == label_of(entry.experiment)) & (metrics["track"] == "")]
        leading = means.drop_duplicates("group").rename(columns={"value": "score"})
        leading = leading[~leading["note"].str.contains("original tracks", regex=False)]
        scores = leading[list(nothing)].to_dict("records")
    for score in scores:
        yield {**entry.row, **score, **facts}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _number(value: float | None) -> float:
    return np.nan if value is None else value


# ---- what is compared ----


def _chosen(part: pd.DataFrame) -> pd.Series[bool]:
    """The rows of each method's setting with the best validation score, never a test score, over most seeds."""
    chosen = pd.Series(False, index=part.index)
    for _, method in part[part["role"] == "run"].groupby(["model", "method"], sort=False):
        by = method.groupby(SETTING, sort=False, dropna=False)["valid_score"].agg(["count", "mean"])
        best = by.sort_values(["count", "mean"], ascending=False, kind="stable").index[0]
        same = [_same(method[name], value) for name, value in zip(SETTING, best, strict=True)]
        chosen[method.index[np.logical_and.reduce(same)]] = True
    return chosen


def _same(column: pd.Series[Any], value: Any) -> Array:
    return np.asarray(column.isna() if value != value else column == value)


def _contender(
    entry: Entry, runs: pd.DataFrame, folders: Mapping[str, Entry], group: str, draws: int
) -> _Contender | None:
    dataset = open_dataset(entry.experiment.data)
    cards, blocks = {}, np.zeros(0, np.int64)
    for row in runs.sort_values("seed").to_dict("records"):
        card, blocks = _card(folders[row["cell"]].folder, dataset, group)
        if card is None:
            return None
        cards[int(row["seed"])] = card
    statistics = [card.statistics for card in cards.values()]
    metric = next(iter(cards.values())).metric
    drawn = hierarchical_draws(statistics, metric, blocks, draws=draws)
    return _Contender(entry.role, entry.model, method_of(entry.experiment), cards, blocks, drawn)


def _card(folder: Path, dataset: Dataset, group: str) -> tuple[Card | None, Array]:
    """The leading metric of a group per test item, from what ``evaluate`` stored of each.

    A region of one bin has its target and its prediction there; of several bins, moments, which are enough for Pearson.
    """
    with np.load(folder / "evaluation" / "moments.npz", allow_pickle=False) as arrays:
        if not {"moments", "rows", "blocks"} <= set(arrays.files) or group not in dataset.tracks.groups:
            return None, np.zeros(0, np.int64)  # scores of tokens or of donors, which are not those of regions
        sums, rows, blocks = arrays["moments"], arrays["rows"], arrays["blocks"]
    index = dataset.tracks.groups[group]
    metric = _metric_of(dataset, group)
    if dataset.info.bins == 1:
        truth, predicted = np.where(sums[0] > 0, sums[1], np.nan)[..., None], sums[2][..., None]
        return _leading(dataset, truth, predicted, rows)[group], blocks
    if METRICS[metric].statistic != "moments":
        return None, blocks
    return Card(group, metric, [dataset.tracks.names[i] for i in index], Moments(rows, sums[:, :, index])), blocks


def _metric_of(dataset: Dataset, group: str) -> str:
    return METRICS_OF_LINK[dataset.tracks.frame["link"].tolist()[dataset.tracks.groups[group][0]]][0]


def _leading(dataset: Dataset, truth: Array, predicted: Array, rows: Array) -> dict[str, Card]:
    card = Scorecard(dataset.tracks, sorted({default_metric(link) for link in dataset.tracks.frame["link"]}))
    card.update(truth, predicted, rows)
    return {found.group: found for found in card.result()}


def _floors(entry: Entry, stored: Path | None, group: str, draws: int) -> Iterator[_Contender]:
    """The baselines of a data set as contenders with one run."""
    if stored is None:  # the runs have baselines of another kind
        return
    dataset = open_dataset(entry.experiment.data)
    with np.load(entry.folder / "evaluation" / "moments.npz", allow_pickle=False) as arrays:
        rows, blocks = arrays["rows"], arrays["blocks"]  # those without copies in the training data
    truth, scored = dataset.squashed_targets(rows), np.isin(dataset.rows(entry.experiment.evaluate.fold), rows)
    with np.load(stored, allow_pickle=False) as arrays:
        for name in arrays.files:
            card = _leading(dataset, truth, arrays[name][scored], rows)[group]
            drawn = hierarchical_draws([card.statistics], card.metric, blocks, draws=draws)
            yield _Contender("baseline", "", name, {0: card}, blocks, drawn)


# ---- the summary, and the tests ----


def _score(contender: _Contender) -> dict[str, Any]:
    seeds = np.array([_mean(each) for each in contender.each.values()])
    found, _ = hierarchical_estimate(contender.values, contender.drawn, seeds, contender.blocks)
    lowest, highest = _BOUNDS.get(contender.metric, (-1.0, 1.0))
    return {
        "metric": contender.metric,
        "score": found.mean,
        "low": np.maximum(found.mean_low, lowest),
        "high": np.minimum(found.mean_high, highest),
        "seeds": len(contender.cards),
        "n": len(contender.blocks),
    }


def _summary(runs: pd.DataFrame, contender: _Contender | None, chosen: bool) -> dict[str, Any]:
    score = {name: runs[name].iloc[0] for name in ("metric", "n")}
    score |= {"score": runs["score"].mean(), "seeds": len(runs)} if contender is None else _score(contender)
    return {
        "group": runs["group"].iloc[0],
        **score,
        "seed_sd": runs["score"].std(),
        "valid_score": runs["valid_score"].mean(),
        "chosen": chosen,
        **{name: runs[name].mean() for name in _COSTS},
    }


_TEST_COLUMNS = [
    *("dataset", "group", "family", "first_model", "first", "second_model", "second", "metric"),
    *("difference", "low", "high", "p", "p_holm", "only_first_right", "only_second_right", "p_mcnemar"),
    *("p_mcnemar_holm", "seeds", "n", "told_apart"),
]


def _tests(contenders: Sequence[_Contender]) -> list[dict[str, Any]]:
    """Every pair of methods, then every method against every floor: two families, each corrected for its size."""
    runs = [each for each in contenders if each.role == "run"]
    floors = [each for each in contenders if each.role != "run"]
    families = {
        "methods": list(combinations(runs, 2)),
        "floors": [(run, floor) for run in runs for floor in floors],
    }
    rows = []
    for family, pairs in families.items():
        found = [{"family": family, **_test(first, second)} for first, second in pairs]
        for p, adjusted in (("p", "p_holm"), ("p_mcnemar", "p_mcnemar_holm")):
            for row, value in zip(found, holm([row[p] for row in found]), strict=True):
                row[adjusted] = value
        rows += [row | {"told_apart": bool(row["p_holm"] < LEVEL)} for row in found]
    return rows


def _test(first: _Contender, second: _Contender) -> dict[str, Any]:
    """Paired bootstrap of the difference, and McNemar's test of each seed, of the same test items."""
    drawn = first.drawn - second.drawn
    seeds = _differences(first.each, second.each)
    found, p = hierarchical_estimate(first.values - second.values, drawn, seeds, first.blocks)
    pairs = _paired(first.cards, second.cards)
    right = [(_right(a), _right(b)) for a, b in pairs]
    counts = [mcnemar(a, b) for a, b in right if a is not None and b is not None]
    return {
        "first_model": first.model,
        "first": first.method,
        "second_model": second.model,
        "second": second.method,
        "metric": first.metric,
        "difference": found.mean,
        "low": found.mean_low,
        "high": found.mean_high,
        "p": p,
        "only_first_right": float(np.mean([count[0] for count in counts])) if counts else np.nan,
        "only_second_right": float(np.mean([count[1] for count in counts])) if counts else np.nan,
        "p_mcnemar": combine_p([count[2] for count in counts]),
        "seeds": len(pairs),
        "n": len(first.blocks),
    }


def _differences(first: Mapping[int, Array], second: Mapping[int, Array]) -> Array:
    """The difference of each seed that both have; from a baseline, which has none, of each seed of the first."""
    if len(second) == 1 and len(first) > 1:
        (only,) = second.values()
        return np.array([_mean(each - only) for each in first.values()])
    common = [seed for seed in first if seed in second]
    return np.array([_mean(first[seed] - second[seed]) for seed in common] or [0.0])


def _mean(values: Array) -> float:
    """Over the tracks where it is defined."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _paired(first: Mapping[int, Card], second: Mapping[int, Card]) -> list[tuple[Card, Card]]:
    """The runs of the same seed; a baseline, which has none, with every run."""
    if len(second) == 1 and len(first) > 1:
        return [(card, other) for card in first.values() for other in second.values()]
    return [(first[seed], second[seed]) for seed in first if seed in second] or [
        (next(iter(first.values())), next(iter(second.values())))
    ]


def _right(card: Card) -> Array | None:
    """Whether each item is given its class, of one label only."""
    found = card.statistics
    if isinstance(found, Confusion) and found.counts.shape[1] == 1:
        counts = found.counts[:, 0]
        return np.asarray(np.trace(counts, axis1=1, axis2=2)[counts.sum((1, 2)) > 0] > 0)
    if isinstance(found, Values) and METRICS[card.metric].task == "binary" and found.y_true.shape[1:] == (1, 1):
        known = np.isfinite(found.y_true[:, 0, 0])
        return np.asarray((found.y_true[known, 0, 0] >= 0.5) == (found.y_pred[known, 0, 0] >= 0.5))
    return None
