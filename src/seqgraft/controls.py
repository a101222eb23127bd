"""Baselines and controls as predictions for the rows of a fold: what a run is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seqgraft.baselines import (
    Examples,
    kmer_regression,
    majority,
    mean_profile,
    mean_track,
    nearest_track,
    sequence_ridge,
)
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError
from seqgraft.models.weights import ModelConfig, build_model, build_pretrained
from seqgraft.predict import features, predict

__all__ = ["COVERAGE_BASELINES", "LABEL_BASELINES", "RANDOM_TRUNK", "baseline_predictions"]

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

COVERAGE_BASELINES = ("mean_track", "nearest_track", "mean_profile", "sequence_ridge")
LABEL_BASELINES = ("kmer", "majority")
#: Only when asked: it costs a pass of the whole trunk.
RANDOM_TRUNK = "random_trunk"


def baseline_predictions(
    dataset: Dataset,
    rows: Rows,
    start: ModelConfig,
    wanted: Sequence[str] | None,
    ensemble: Augmentation,
    batch_size: int,
    device: torch.device,
) -> dict[str, Array]:
    """Squashed predictions ``(rows, tracks, bins)`` by the baseline's name in tables.

    Args:
        start: the model that a run was adapted from; its own tracks, and its architecture, serve as baselines.
        wanted: which; None for all that suit the data.

    Raises:
        ConfigError: a baseline that does not suit the data.
    """
    labels = dataset.info.bins == 1
    suited = LABEL_BASELINES if labels else COVERAGE_BASELINES
    wanted = suited if wanted is None else wanted
    wrong = [name for name in wanted if name not in (*suited, RANDOM_TRUNK)]
    if wrong:
        raise ConfigError(
            "the baseline does not suit this kind of data",
            wrong,
            where="evaluate.baselines",
            remedy=f"Choose from {', '.join((*suited, RANDOM_TRUNK))}",
        )
    if labels:
        found = _label_baselines(dataset, wanted, rows)
    else:
        found = _coverage_baselines(dataset, rows, start, wanted, ensemble, batch_size, device)
    if RANDOM_TRUNK in wanted:
        found["random trunk"] = _random_trunk(dataset, rows, start, batch_size, device)
    return found


def _random_trunk(dataset: Dataset, rows: Rows, start: ModelConfig, batch_size: int, device: torch.device) -> Array:
    """Ridge regression on the features of the trunk with random weights: what the architecture gives for nothing."""
    torch.manual_seed(0)
    covariates = 0 if dataset.covariates is None else dataset.covariates.shape[1]
    control = build_model(replace(start, init="random", head="new"), dataset.tracks, dataset.info, covariates).to(
        device
    )
    channels, tracks = control.trunk.spec.channels, len(dataset.tracks)
    gram, moment = np.zeros((channels + 1, channels + 1)), np.zeros((channels + 1, tracks))
    train = dataset.rows("train")
    for chosen, values in features(control, dataset, train[:: max(1, len(train) // 512)], batch_size=batch_size):
        x = _with_constant(values)
        targets = np.moveaxis(dataset.squashed_targets(chosen), 1, 2).astype(np.float64)
        known = np.isfinite(targets).all(-1)
        gram += x[known].T @ x[known]
        moment += x[known].T @ targets[known]
    penalty = 1e-3 * np.diag(gram).mean() * np.eye(channels + 1)
    weights = np.linalg.solve(gram + penalty, moment)
    parts = [_with_constant(values) @ weights for _, values in features(control, dataset, rows, batch_size=batch_size)]
    return np.moveaxis(np.concatenate(parts), 1, 2).astype(np.float32)


def _with_constant(values: Array) -> Array:
    """Features ``(rows, channels, bins)`` as ``(rows, bins, channels + 1)``, the last one 1."""
    turned = np.moveaxis(values, 1, 2).astype(np.float64)
    return np.concatenate([turned, np.ones((*turned.shape[:2], 1))], axis=-1)


def _examples_of(dataset: Dataset, rows: Rows) -> Examples:
    codes, _ = dataset.sequences(rows)
    covariates = None if dataset.covariates is None else dataset.covariates.iloc[rows].to_numpy()
    return Examples(codes, dataset.squashed_targets(rows), covariates)


def _label_baselines(dataset: Dataset, wanted: Sequence[str], rows: Rows) -> dict[str, Array]:
    train, valid, test = (_examples_of(dataset, r) for r in (dataset.rows("train"), dataset.rows("valid"), rows))
    found: dict[str, Array] = {}
    if "kmer" in wanted:
        found["k-mer regression"] = kmer_regression(train, valid, test, dataset.tracks)
    if "majority" in wanted:
        found["majority"] = majority(train, len(rows))
    return found


def _coverage_baselines(
    dataset: Dataset,
    rows: Rows,
    start: ModelConfig,
    wanted: Sequence[str],
    ensemble: Augmentation,
    batch_size: int,
    device: torch.device,
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    train = dataset.rows("train")
    some = train[:: max(1, len(train) // 512)]
    targets = dataset.squashed_targets(some)
    reference = build_pretrained(start, dataset.info)
    if reference is not None and {"mean_track", "nearest_track"} & set(wanted):
        reference.to(device)
        before, after = (
            predict(reference, dataset, r, ensemble=ensemble, batch_size=batch_size, what="pretrained tracks")
            for r in (some, rows)
        )
        if "mean_track" in wanted:
            found["mean track"] = mean_track(targets, before, after)
        if "nearest_track" in wanted:
            found["nearest pretrained track"] = nearest_track(targets, before, after).predictions
    if "mean_profile" in wanted:
        found["mean profile"] = mean_profile(targets, len(rows))
    if "sequence_ridge" in wanted:
        fitted, checked, here = (_examples_of(dataset, r) for r in (some, dataset.rows("valid")[:256], rows))
        margin = (dataset.info.window - dataset.info.bins * dataset.info.bin_size) // 2
        found["3-mer ridge"] = sequence_ridge(fitted, checked, here, dataset.info.bin_size, margin)
    return {name: np.asarray(values, np.float32) for name, values in found.items()}
