"""Scores beside baselines, with intervals: one tidy table.

Every number stands beside what simple methods reach on the same rows, with a 95 % bootstrap interval over regions
(drawn in blocks of neighbours), and names its unit: "squashed" (the model's scale), "raw" (signal units) or "label".
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from seqgraft.baselines import KmerSettings
from seqgraft.controls import COVERAGE_BASELINES, LABEL_BASELINES, RANDOM_TRUNK, baseline_predictions
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset, new_folder, open_dataset
from seqgraft.data.duplicates import copies_in_earlier_folds
from seqgraft.errors import ConfigError
from seqgraft.genes import (
    GeneSettings,
    expressed,
    fold_change,
    fold_change_scores,
    gene_bins,
    gene_scores,
    gene_signal,
    read_fold_changes,
    signal_table,
)
from seqgraft.genome import match_chroms, read_gtf
from seqgraft.intervals import Estimate, bootstrap_interval, paired_bootstrap, segment_blocks
from seqgraft.metrics import METRICS, Moments, region_means
from seqgraft.models.base import Beside, SequenceModel
from seqgraft.models.weights import ModelConfig, build_pretrained
from seqgraft.predict import FORWARD_ONLY, predict
from seqgraft.scoring import METRICS_OF_LINK, Card, Scorecard, card_rows, clean_fold
from seqgraft.specificity import (
    CEILING,
    Ceilings,
    across_cards,
    confusion_table,
    differential_bins,
    recognised_rows,
)
from seqgraft.tracks import TrackTable, unsquash

__all__ = ["EvaluateConfig", "Evaluation", "GenesConfig", "compare_runs", "evaluate_model", "fold_baselines"]
__all__ += ["forgetting"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GenesConfig:
    """Gene-level scores from coverage.

    Attributes:
        gtf: genes; ``rename`` maps its chromosome names to the genome's.
        contrasts: (condition, reference) pairs whose fold changes are compared.
        truth: a DESeq2 or edgeR table to take as the truth of the first contrast, instead of the observed tracks.
    """

    gtf: Path
    rename: Mapping[str, str] = field(default_factory=dict)
    settings: GeneSettings = field(default_factory=GeneSettings)
    contrasts: tuple[tuple[str, str], ...] = ()
    truth: Path | None = None


@dataclass(frozen=True)
class EvaluateConfig:
    """How a run is scored.

    Attributes:
        fold: which regions.
        ensemble: views to average over: both strands, shifts.
        baselines: which; None for all that suit the data.
        kmers: of the regressions on labels among them.
        draws: bootstrap draws.
        block: bp of neighbouring regions that are drawn together; None for 50 kb or two regions, whichever is more.
        genes: gene-level scores, if asked.
        linearity: of how many genes it is asked whether a model of donors is linear in dosage; 0 for none.
        original: a prepared dataset with the tracks that the trunk was pretrained on: how much of them was forgotten.
        batch_size: regions per forward pass.
    """

    fold: str = "test"
    ensemble: Augmentation = FORWARD_ONLY
    baselines: tuple[str, ...] | None = None
    kmers: KmerSettings = field(default_factory=KmerSettings)
    draws: int = 1000
    block: int | None = None
    genes: GenesConfig | None = None
    linearity: int = 20
    original: Path | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        known = (*COVERAGE_BASELINES, *LABEL_BASELINES, RANDOM_TRUNK)
        unknown = [name for name in self.baselines or () if name not in known]
        if unknown:
            raise ConfigError(
                "there is no such baseline",
                unknown,
                where="evaluate.baselines",
                remedy=f"Choose from {', '.join(known)}",
            )
        for name in ("draws", "batch_size", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("must be 1 or more", value, where=f"evaluate.{name}", remedy="Give a positive number")


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        metrics: model, fold, group, track ("" for the mean over tracks), metric, value, low, high, n, unit, note.
        differences: the run minus each baseline in the leading metric, by paired bootstrap: baseline, track, metric,
            value, low, high, unit, fold.
        genes: gene-level scores, or None.
        moments: statistics of the run per region without copies, for paired comparisons with other runs.
        examples: arrays of a few regions for figures.
        confusion: which cell types are taken for which (``specificity.confusion_table``, and model, fold), or None.
    """

    metrics: pd.DataFrame
    differences: pd.DataFrame
    genes: pd.DataFrame | None
    moments: Mapping[str, Array]
    examples: Mapping[str, Array]
    confusion: pd.DataFrame | None = None

    def save(self, folder: Path) -> None:
        """Writes the tables; nothing is left half-written."""
        with new_folder(folder, replace_existing=True) as building:
            self.metrics.to_parquet(building / "metrics.parquet")
            self.differences.to_parquet(building / "differences.parquet")
            if self.genes is not None:
                self.genes.to_parquet(building / "genes.parquet")
            if self.confusion is not None:
                self.confusion.to_parquet(building / "confusion.parquet")
            np.savez(building / "moments.npz", **self.moments)  # type: ignore[arg-type]
            np.savez_compressed(building / "examples.npz", **self.examples)  # type: ignore[arg-type]


def evaluate_model(
    model: SequenceModel,
    dataset: Dataset,
    config: EvaluateConfig,
    label: str,
    start: ModelConfig,
    *,
    fold: str | None = None,
    extra: Mapping[str, Array] | None = None,
    baselines: Mapping[str, Array] | None = None,
) -> Evaluation:
    """Scores a model and its baselines on a fold.

    Where rows of the fold have exact or near copies in an earlier one (train, valid, test), the scores of the rows
    without come first, as the fold "test without copies"; paired comparisons of runs are of these rows alone.

    Args:
        label: the model's name in the tables.
        start: the model it was adapted from; its own tracks serve as baselines.
        extra: further predictions to score, squashed, ``(rows of the fold, tracks, bins)``, by name.
        baselines: what :func:`fold_baselines` gave for this fold; computed if None.

    Raises:
        ConfigError: the fold is empty, or a baseline does not suit the data.
    """
    fold = fold or config.fold
    rows = dataset.rows(fold)
    tracks = dataset.tracks
    truth = dataset.squashed_targets(rows)
    own = predict(model, dataset, rows, ensemble=config.ensemble, batch_size=config.batch_size, what=f"predict {fold}")[
        :, : len(tracks)
    ]
    device = next(model.parameters()).device
    if baselines is None:
        baselines = fold_baselines(dataset, config, start, fold, device)
    predictions: dict[str, Array] = {label: own, **baselines, **(extra or {})}
    whole = _Rows(fold, "", rows, truth, predictions, _blocks(dataset, rows, config))
    parts = _parts(whole, dataset)
    tables, differences, confusion = zip(*(_score(part, dataset, config, label) for part in parts), strict=True)
    forgotten = forgetting(model, dataset, config, start, label, fold)
    clean, clean_confusion = parts[0], pd.concat(confusion, ignore_index=True)
    return Evaluation(
        metrics=pd.concat([*tables, *forgotten], ignore_index=True),
        differences=pd.concat(differences, ignore_index=True),
        genes=_genes(dataset, rows, predictions, config, fold) if config.genes else None,
        moments=_moments(tracks, clean.truth, clean.predictions[label], clean.rows, clean.blocks),
        examples=_examples(dataset, rows, truth, predictions, label),
        confusion=None if clean_confusion.empty else clean_confusion,
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a fold that are scored together, and what tables say of them."""

    fold: str
    note: str
    rows: npt.NDArray[np.int64]
    truth: Array
    predictions: Mapping[str, Array]
    blocks: Array

    def select(self, keep: npt.NDArray[np.bool_], fold: str, note: str) -> _Rows:
        predictions = {name: values[keep] for name, values in self.predictions.items()}
        return _Rows(fold, note, self.rows[keep], self.truth[keep], predictions, self.blocks[keep])


def _parts(whole: _Rows, dataset: Dataset) -> list[_Rows]:
    """First the rows without copies in earlier folds, if others have some; then all."""
    copied = copies_in_earlier_folds(dataset)[whole.rows]
    exact, near, rows = int((copied == "exact").sum()), int((copied == "near").sum()), len(copied)
    if not exact + near:
        return [whole]
    left = rows - exact - near
    summary = dataset.info.notes.get("duplicates") or {}
    more = "" if summary.get("near_complete", True) else "; there may be more near ones"
    note = f"{exact + near} of {rows} have copies in earlier folds ({exact} exact, {near} near){more}"
    clean = whole.select(copied == "", clean_fold(whole.fold), f"{left} of {rows}, those without copies{more}")
    return [clean, replace(whole, note=note)]


def _score(
    part: _Rows, dataset: Dataset, config: EvaluateConfig, label: str
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The scores of every model on these rows, by how much the run differs from the others, and confusion."""
    tracks, rows, blocks, confusion = dataset.tracks, part.rows, part.blocks, pd.DataFrame()
    unit = "label" if dataset.info.bins == 1 else "squashed"
    cards = {name: _cards(tracks, part.truth, values, rows) for name, values in part.predictions.items()}
    tables = [_table(name, part.fold, unit, found, blocks, config) for name, found in cards.items()]
    if unit == "squashed" and any("pearson" in METRICS_OF_LINK[link] for link in tracks.frame["link"]):
        raw_truth = dataset.raw_targets(rows)
        for name, values in part.predictions.items():
            raw = _cards(
                tracks, raw_truth, unsquash(values.astype(np.float64), tracks, dataset.info.bin_size), rows, ["pearson"]
            )
            tables.append(_table(name, part.fold, "raw", raw, blocks, config))
        differential = differential_bins(tracks, part.truth, dataset.info.bin_size)
        ceilings = Ceilings.of(dataset, rows, differential)
        for name in part.predictions:
            tables += _across(name, part, dataset, config, ceilings, differential)
        tables += [] if ceilings is None else ceilings.rows(part.fold, blocks, config.draws)
        confusion = _confusion(part, dataset, ceilings)
        tables += [] if confusion.empty else [recognised_rows(confusion, len(rows))]
    table = pd.concat(tables, ignore_index=True)
    if part.note:
        table["note"] = ["; ".join(filter(None, [part.note, note])) for note in table["note"]]
    leading = {name: _leading(found) for name, found in cards.items()}
    differences = [
        _difference(leading[label], found, name, blocks, unit, config).assign(fold=part.fold)
        for name, found in leading.items()
        if name != label
    ]
    return table, pd.concat(differences, ignore_index=True) if differences else pd.DataFrame(), confusion


def fold_baselines(
    dataset: Dataset, config: EvaluateConfig, start: ModelConfig, fold: str, device: torch.device
) -> dict[str, Array]:
    """The predictions of the baselines that ``config`` asks for, squashed, ``(rows of the fold, tracks, bins)``.

    Raises:
        ConfigError: the fold is empty, or a baseline does not suit the data.
    """
    return baseline_predictions(
        dataset, dataset.rows(fold), start, config.baselines, config.ensemble, config.batch_size, device, config.kmers
    )


def _blocks(dataset: Dataset, rows: npt.NDArray[np.int64], config: EvaluateConfig) -> Array:
    """The bootstrap's block of each row."""
    regions = dataset.regions.iloc[rows]
    return segment_blocks(
        regions["chrom"].tolist(), regions["start"].to_numpy(), regions["end"].to_numpy(), config.block
    )


# ---- forgetting ----


def forgetting(
    model: SequenceModel, dataset: Dataset, config: EvaluateConfig, start: ModelConfig, label: str, fold: str
) -> list[pd.DataFrame]:
    """How much of the pretrained tracks an adapter that moves the trunk's function has cost.

    On their own data (``original``) they are scored before and after. Without those, before and after are compared with
    each other: metric "agreement", 1 if nothing was forgotten. Heads of these tracks that trained along are those that
    are scored after.
    """
    moved = model.adapted is not None and model.adapted.counts.adapter + model.adapted.counts.trunk > 0
    if not moved and config.original is None:
        return []
    data = dataset if config.original is None else open_dataset(config.original)
    reference = build_pretrained(start, data.info)
    if reference is None:
        if config.original is None:
            return []
        what, remedy = "forgetting can only be measured for a pretrained trunk with heads", "Leave it out"
        raise ConfigError(what, start.name, where="evaluate.original", remedy=remedy)
    rows = data.rows(fold)
    before = predict(
        reference.to(next(model.parameters()).device), data, rows, batch_size=config.batch_size, what="original tracks"
    )
    after = _under_pretrained_heads(model, reference, data, rows, config)
    blocks = _blocks(data, rows, config)
    if config.original is None:
        note = "original tracks, after adaptation against before"
        cards = _pearson_cards(reference.tracks, before, after, rows)
        return [_original(label, fold, "agreement", card, None, blocks, note, config) for card in cards]
    ours = reference.tracks if model.beside is None else model.beside.tracks
    known = [name for name in reference.tracks.names if name in data.tracks.names and name in ours.names]
    if not known:
        raise ConfigError(
            "the dataset has none of the tracks that the model was pretrained on",
            reference.tracks.names,
            where=f"evaluate.original ({config.original})",
            remedy="Give a dataset with tracks of these names",
        )
    # the heads were fitted to the model's own scale and squash, whatever the dataset's table says
    tracks = reference.tracks.select(known)
    truth = data.select_tracks(tracks).squashed_targets(rows)
    first, second = (
        _pearson_cards(tracks, truth, values[:, [table.names.index(name) for name in known]], rows)
        for values, table in ((before, reference.tracks), (after, ours))
    )
    nothing: Sequence[Card | None] = [None] * len(first)
    return [
        _original(name, fold, metric, card, other, blocks, note, config)
        for name, metric, cards, others, note in (
            ("pretrained, before", "original_pearson", first, nothing, "original tracks"),
            (label, "original_pearson", second, nothing, "original tracks, after adaptation"),
            (label, "forgetting", second, first, "change in Pearson of the original tracks"),
        )
        for card, other in zip(cards, others, strict=True)
    ]


def _under_pretrained_heads(
    model: SequenceModel, reference: SequenceModel, data: Dataset, rows: npt.NDArray[np.int64], config: EvaluateConfig
) -> Array:
    """What the pretrained heads, or those that trained along, make of the adapted trunk, cropped for these data."""
    beside = Beside(reference)
    if model.beside is not None and config.original is not None:
        beside.heads, beside.tracks = model.beside.heads, model.beside.tracks
    with beside.cropping(model.trunk) as adapted:
        return predict(adapted, data, rows, batch_size=config.batch_size, what="original tracks, adapted")


def _pearson_cards(tracks: TrackTable, truth: Array, predicted: Array, rows: npt.NDArray[np.int64]) -> list[Card]:
    return [
        Card(
            group,
            "pearson",
            [tracks.names[i] for i in index],
            Moments.of(truth[:, index].astype(np.float64), predicted[:, index].astype(np.float64), None, rows),
        )
        for group, index in tracks.groups.items()
    ]


def _original(
    model: str,
    fold: str,
    metric: str,
    card: Card,
    other: Card | None,
    blocks: Array,
    note: str,
    config: EvaluateConfig,
) -> pd.DataFrame:
    """The Pearson of a group of original tracks, or its difference from another's."""
    if other is None:
        estimate = bootstrap_interval(card.statistics, "pearson", blocks, draws=config.draws)
    else:
        estimate = paired_bootstrap(card.statistics, other.statistics, "pearson", blocks, draws=config.draws)
    return card_rows(model, fold, "squashed", replace(card, metric=metric), estimate, blocks, note)


# ---- tables ----


def _cards(
    tracks: TrackTable,
    truth: Array,
    predicted: Array,
    rows: npt.NDArray[np.int64],
    metrics: Sequence[str] | None = None,
) -> list[Card]:
    card = Scorecard(tracks, metrics)
    card.update(truth, predicted, rows)
    return card.result()


def _table(
    model: str, fold: str, unit: str, cards: Sequence[Card], blocks: Array, config: EvaluateConfig
) -> pd.DataFrame:
    parts = []
    for card in cards:
        # rank metrics need all values for every draw: fewer draws, the same interval to two digits
        draws = config.draws if METRICS[card.metric].statistic != "values" else min(config.draws, 200)
        if METRICS[card.metric].statistic == "values" and unit != "label":
            parts.append(card_rows(model, fold, unit, card, _without_interval(card), blocks))
        else:
            parts.append(
                card_rows(
                    model,
                    fold,
                    unit,
                    card,
                    bootstrap_interval(card.statistics, card.metric, blocks, draws=draws),
                    blocks,
                )
            )
    return pd.concat(parts, ignore_index=True)


def _across(
    model: str, part: _Rows, dataset: Dataset, config: EvaluateConfig, ceilings: Ceilings | None,
    differential: Mapping[str, Array],
) -> list[pd.DataFrame]:  # fmt: skip
    """More Pearsons of each track: of region means, across regions; of what it has of its own; and shares of ceilings.

    What a track has of its own is told in :mod:`seqgraft.specificity`.
    """
    tracks, predicted = dataset.tracks, part.predictions[model]
    cards, whole = [], []
    for group, index in tracks.groups.items():
        if "pearson" not in METRICS_OF_LINK[tracks.links[index[0]]]:
            continue
        true, names = part.truth[:, index], [tracks.names[i] for i in index]
        means = region_means(true), region_means(predicted[:, index], np.isfinite(true))
        cards.append(Card(group, "pearson_across_regions", names, Moments.of(*means, None, part.rows)))
        if ceilings is not None:
            whole.append(Card(group, "pearson", names, Moments.of(true, predicted[:, index], None, part.rows)))
    own = across_cards(tracks, part.truth, predicted, part.rows, differential)
    tables = []
    for card in [*cards, *own]:
        estimate = bootstrap_interval(card.statistics, "pearson", part.blocks, draws=config.draws)
        tables.append(card_rows(model, part.fold, "squashed", card, estimate, part.blocks))
    shares = [] if ceilings is None else ceilings.shares(model, part.fold, [*whole, *own], part.blocks, config.draws)
    return tables + shares


def _confusion(part: _Rows, dataset: Dataset, ceilings: Ceilings | None) -> pd.DataFrame:
    """Of every model, and of the halves of the cells, which cell types are taken for which; no rows without any."""
    found = {name: confusion_table(dataset.tracks, part.truth, values) for name, values in part.predictions.items()}
    if ceilings is not None:
        found[CEILING] = ceilings.confusion
    tables = [table.assign(fold=part.fold, model=name) for name, table in found.items() if not table.empty]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _without_interval(card: Card) -> Estimate:
    values = np.array([score.value for score in card.scores()])
    nothing = np.full(len(values), np.nan)
    defined = np.isfinite(values)
    mean = float(values[defined].mean()) if defined.any() else float("nan")
    return Estimate(values, nothing, nothing, mean, float("nan"), float("nan"), int((~defined).sum()))


def _leading(cards: Sequence[Card]) -> list[Card]:
    """The leading card of each group."""
    first: dict[str, Card] = {}
    for card in cards:
        first.setdefault(card.group, card)
    return list(first.values())


def _difference(
    run: Sequence[Card], baseline: Sequence[Card], name: str, blocks: Array, unit: str, config: EvaluateConfig
) -> pd.DataFrame:
    parts = []
    for ours, theirs in zip(run, baseline, strict=True):
        draws = config.draws if METRICS[ours.metric].statistic != "values" else min(config.draws, 200)
        estimate = paired_bootstrap(ours.statistics, theirs.statistics, ours.metric, blocks, draws=draws)
        values = [
            *zip(ours.units, estimate.value, estimate.low, estimate.high, strict=True),
            ("", estimate.mean, estimate.mean_low, estimate.mean_high),
        ]
        parts.append(
            pd.DataFrame(
                [
                    {
                        "baseline": name,
                        "group": ours.group,
                        "track": t,
                        "metric": ours.metric,
                        "value": v,
                        "low": lo,
                        "high": hi,
                        "unit": unit,
                    }
                    for t, v, lo, hi in values
                ]
            )
        )
    return pd.concat(parts, ignore_index=True)


def _moments(
    tracks: TrackTable, truth: Array, predicted: Array, rows: npt.NDArray[np.int64], blocks: Array
) -> dict[str, Array]:
    found = Moments.of(truth.astype(np.float64), predicted.astype(np.float64), None, rows)
    return {"rows": found.rows, "moments": found.sums, "blocks": blocks, "tracks": np.array(tracks.names)}


def compare_runs(
    first: Path, second: Path, *, metric: str = "pearson", draws: int = 1000, tracks: Sequence[str] | None = None
) -> Estimate:
    """``first - second`` of two evaluated runs on the same rows and (some) tracks, by paired block bootstrap.

    Raises:
        ConfigError: a run was not evaluated, or they were scored on different rows or tracks.
        DataError: a metric that needs more than the stored moments (those of Pearson, R2 and squared error).
    """
    loaded = []
    for run in (first, second):
        path = Path(run) / "evaluation" / "moments.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                loaded.append(dict(arrays))
        except FileNotFoundError as error:
            raise ConfigError(
                "the run was not evaluated", str(run), remedy="Run 'seqgraft evaluate' on it first"
            ) from error
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ConfigError(
                f"the file cannot be read ({error})", where=path, remedy="Run 'seqgraft evaluate' again"
            ) from error
    if not all("moments" in part for part in loaded):
        what, remedy = "a run has no statistics of tracks to compare", "Compare runs of coverage or labels"
        raise ConfigError(what, [str(first), str(second)], remedy=remedy)
    same = all(np.array_equal(loaded[0][key], loaded[1][key]) for key in ("rows", "tracks", "blocks"))
    if not same:
        raise ConfigError(
            "the runs were scored on different regions or tracks",
            [str(first), str(second)],
            remedy="Evaluate both on the same dataset and fold",
        )
    known = loaded[0]["tracks"].tolist()
    chosen = [known.index(name) for name in tracks] if tracks else slice(None)
    ours, theirs = (Moments(part["rows"], part["moments"][:, :, chosen]) for part in loaded)
    return paired_bootstrap(ours, theirs, metric, loaded[0]["blocks"], draws=draws)


def _examples(
    dataset: Dataset, rows: npt.NDArray[np.int64], truth: Array, predictions: Mapping[str, Array], label: str
) -> dict[str, Array]:
    """The three regions with most signal, at different places in the fold, for figures."""
    if dataset.info.bins == 1:
        return {}
    order = np.argsort(-np.nansum(truth, axis=(1, 2)))
    chosen = np.sort(order[np.linspace(0, min(len(order) - 1, max(3, len(order) // 10)), 3).astype(int)])
    regions = dataset.regions.iloc[rows[chosen]]
    others = [name for name in predictions if name != label]
    best = next(
        (name for name in ("nearest pretrained track", "mean track") if name in others), others[0] if others else None
    )
    return {
        "chrom": regions["chrom"].to_numpy(dtype=str),
        "start": regions["start"].to_numpy(),
        "bin_size": np.array(dataset.info.bin_size),
        "tracks": np.array(dataset.tracks.names),
        "observed": truth[chosen],
        "predicted": predictions[label][chosen].astype(np.float32),
        "model": np.array(label),
        **({"baseline": predictions[best][chosen].astype(np.float32), "baseline_name": np.array(best)} if best else {}),
    }


# ---- genes ----


def _genes(
    dataset: Dataset, rows: npt.NDArray[np.int64], predictions: Mapping[str, Array], config: EvaluateConfig, fold: str
) -> pd.DataFrame:
    """Levels, specificity and fold changes of the genes in the fold's regions, for every model."""
    genes = config.genes
    assert genes is not None
    if dataset.genome is None or dataset.info.bins == 1:
        raise ConfigError("gene-level scores need coverage over a genome", str(genes.gtf), where="evaluate.genes")
    exons = read_gtf(genes.gtf, rename=genes.rename)
    match_chroms(exons["chrom"].unique(), dataset.genome, genes.gtf, more=True)
    info, settings = dataset.info, genes.settings
    found = gene_bins(exons, dataset.regions.iloc[rows], info.bins, info.bin_size, settings)
    signals = signal_table(dataset.tracks)
    raw = dataset.raw_targets(rows)
    valid = np.isfinite(raw)
    observed = gene_signal(found, raw, signals, valid)
    tables = []
    for name, values in predictions.items():
        predicted = gene_signal(
            found, unsquash(values.astype(np.float64), dataset.tracks, info.bin_size), signals, valid
        )
        parts = [gene_scores(observed, predicted, signals, settings, draws=config.draws)]
        for number, (condition, reference) in enumerate(genes.contrasts):
            for group, some in _contrasted(signals, condition, reference):
                high = expressed(observed, some, (condition, reference), settings)
                truth = (
                    read_fold_changes(genes.truth)
                    if genes.truth and number == 0
                    else fold_change(observed, some, condition, reference, settings)[high]
                )
                change = fold_change(predicted, some, condition, reference, settings)
                title = f"{condition}/{reference}{group}"
                parts.append(fold_change_scores(truth, change, name=title, draws=config.draws))
        tables.append(pd.concat(parts, ignore_index=True).assign(model=name, fold=fold))
    return pd.concat(tables, ignore_index=True)


def _contrasted(signals: pd.DataFrame, condition: str, reference: str) -> list[tuple[str, pd.DataFrame]]:
    """The signals of each group that has both conditions; all of them where each condition is a group of its own."""
    groups = signals.groupby("group", sort=False)["condition"].agg(set)
    both = [group for group, found in groups.items() if {condition, reference} <= found]
    if not both:
        return [("", signals)]
    return [(f" ({group})" if len(both) > 1 else "", signals[signals["group"] == group]) for group in both]
