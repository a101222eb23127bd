"""Baselines and controls as predictions for the rows of a fold: what a run is compared with.

Regressions on labels are kept in ``$SEQGRAFT_CACHE/baselines``, so that the second run on the same data fits none.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seqgraft import baselines
from seqgraft.baselines import (
    Examples,
    KmerSettings,
    covariate_regression,
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
from seqgraft.genome import cache_folder
from seqgraft.models.weights import ModelConfig, build_model, build_pretrained
from seqgraft.predict import features, predict
from seqgraft.tracks import TrackTable

__all__ = ["COVERAGE_BASELINES", "LABEL_BASELINES", "RANDOM_TRUNK", "baseline_predictions"]

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

COVERAGE_BASELINES = ("mean_track", "nearest_track", "mean_profile", "sequence_ridge")
LABEL_BASELINES = ("kmer", "kmer_covariates", "covariates", "majority")
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
    kmers: KmerSettings | None = None,
) -> dict[str, Array]:
    """Squashed predictions ``(rows, tracks, bins)`` by the baseline's name in tables.

    Args:
        start: the model that a run was adapted from; its own tracks, and its architecture, serve as baselines.
        wanted: which; None for all that suit the data.
        kmers: of the regressions on labels.

    Raises:
        ConfigError: a baseline that does not suit the data.
    """
    labels = dataset.info.bins == 1
    suited = _suited(dataset)
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
        found = _label_baselines(dataset, wanted, rows, kmers or KmerSettings())
    else:
        found = _coverage_baselines(dataset, rows, start, wanted, ensemble, batch_size, device)
    if RANDOM_TRUNK in wanted:
        found["random trunk"] = _random_trunk(dataset, rows, start, batch_size, device)
    return found


def _suited(dataset: Dataset) -> tuple[str, ...]:
    if dataset.info.bins > 1:
        return COVERAGE_BASELINES
    without = () if dataset.covariates is not None else ("kmer_covariates", "covariates")
    return tuple(name for name in LABEL_BASELINES if name not in without)


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


def stored_predictions(
    fit: Callable[[Examples, Examples, Examples, TrackTable, KmerSettings], Array],
    train: Examples,
    valid: Examples,
    test: Examples,
    tracks: TrackTable,
    settings: KmerSettings,
) -> Array:
    """What ``fit`` predicts for the test rows, from the store where the same was asked for before.

    The key is the hash of all that the numbers follow from: every array, tracks and settings, the code of the baselines
    and the versions of what they compute with. A file is written beside its place and moved there, so processes may
    share the store, and a kill leaves nothing that is read. One that cannot be read counts as absent.
    """
    digest = hashlib.sha256(Path(baselines.__file__).read_bytes())
    libraries = [f"{name} {version(name)}" for name in ("numpy", "scipy", "scikit-learn")]
    digest.update(repr([fit.__name__, settings, libraries, tracks.to_frame().to_csv()]).encode())
    for array in [part for rows in (train, valid, test) for part in (rows.codes, rows.targets, rows.covariates)]:
        found = np.zeros(0) if array is None else np.ascontiguousarray(array)
        digest.update(repr((array is None, found.dtype.str, found.shape)).encode())
        digest.update(found.tobytes())
    path = cache_folder() / "baselines" / f"{digest.hexdigest()}.npy"
    with suppress(OSError, ValueError, EOFError):
        stored: Array = np.load(path, allow_pickle=False)
        if stored.shape == test.targets.shape:
            return stored
    predictions = fit(train, valid, test, tracks, settings)
    with suppress(OSError):  # nothing depends on the store: without room for it, the next run fits again
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, building = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.save(file, predictions)
            os.replace(building, path)
        finally:
            Path(building).unlink(missing_ok=True)
    return predictions


def _label_baselines(dataset: Dataset, wanted: Sequence[str], rows: Rows, settings: KmerSettings) -> dict[str, Array]:
    """Where there are covariates, what they give alone, beside the sequence, and what the sequence gives without."""
    whole = [_examples_of(dataset, r) for r in (dataset.rows("train"), dataset.rows("valid"), rows)]
    alone = [replace(part, covariates=None) for part in whole]
    regressions = {
        "kmer": ("k-mer regression", kmer_regression, alone),
        "kmer_covariates": ("k-mers and covariates", kmer_regression, whole),
        "covariates": ("covariate regression", covariate_regression, whole),
    }
    found: dict[str, Array] = {}
    for key, (name, fit, (train, valid, test)) in regressions.items():
        if key in wanted:
            found[name] = stored_predictions(fit, train, valid, test, dataset.tracks, settings)
    if "majority" in wanted:
        found["majority"] = majority(whole[0], len(rows))
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
