"""Run directories: what a run reads, makes and leaves behind.

::

    runs/NAME/
      experiment.yaml     resolved: every default written out
      environment.json    versions, command, dataset, model, counts, cost
      log.csv             one row per epoch
      checkpoints/        last.safetensors (to resume), best.safetensors
      adapter/            adapter.json, weights.safetensors
      evaluation/         metrics.parquet, differences.parquet, genes.parquet, moments.npz, examples.npz
      report.html
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from seqgraft import __version__, objectives
from seqgraft.adapters import Counts, adapt, load_adapter, save_adapter
from seqgraft.data import prepare_source
from seqgraft.data.dataset import (
    Dataset,
    open_dataset,
    write_json,
)
from seqgraft.data.donors import MEAN
from seqgraft.donor_scores import evaluate_donors
from seqgraft.errors import ConfigError, RunError
from seqgraft.evaluate import Evaluation, evaluate_model
from seqgraft.experiment import Experiment, parse_source, read_experiment, read_yaml, settings_of, write_yaml
from seqgraft.exposure import test_exposure
from seqgraft.joint import Joint
from seqgraft.losses import Loss, MaskedTokens
from seqgraft.memory import FrozenBytes
from seqgraft.models.base import Head, SequenceModel
from seqgraft.models.masked import MaskedModel, token_counts, tokeniser_of
from seqgraft.models.track_head import start_track_heads
from seqgraft.models.weights import build_beside, build_masked, build_model, is_random
from seqgraft.objectives import Elementwise, Objective, OfGenes
from seqgraft.perplexity import evaluate_masked
from seqgraft.predict import FORWARD_ONLY, resolve_precision
from seqgraft.scoring import default_metric
from seqgraft.token_counts import TokenCounts, count_tokens
from seqgraft.tracks import TrackTable
from seqgraft.train import FitResult, TrainConfig, fit

__all__ = [
    "Run",
    "build_run",
    "evaluate_run",
    "fit_run",
    "label_of",
    "objective_of",
    "open_run",
    "prepare",
    "seeded_model",
    "tokens_of",
    "with_precision",
]


_STARTING = 32  # training examples that set where a pretrained track begins as a head


@dataclass(frozen=True)
class Run:
    """A finished run: its settings, its data and its model with the adapter in place."""

    folder: Path
    experiment: Experiment
    dataset: Dataset
    model: SequenceModel


def prepare(source: Path, folder: Path, overrides: tuple[str, ...] = ()) -> Dataset:
    """Prepares the dataset that a YAML file describes.

    Raises:
        ConfigError: the file is wrong.
        DataError: the data are wrong.
        RunError: the folder exists or cannot be written.
    """
    settings = parse_source(read_yaml(source, overrides), str(source))
    return prepare_source(settings, Path(folder))


def label_of(experiment: Experiment) -> str:
    """The run's name in tables: its adapter, or "from scratch" for a trunk with random weights that trains."""
    if not is_random(experiment.model):
        return experiment.adapter.label
    return "from scratch" if experiment.adapter.kind == "full" else f"{experiment.adapter.label} on random weights"


def objective_of(experiment: Experiment, dataset: Dataset, model: SequenceModel | None = None) -> Objective:
    """The objective that the experiment's loss means for these tracks, or for the tokens of this model."""
    joint, more = experiment.joint, [name for name in ("loss_weights", "joint") if getattr(experiment, name)]
    if isinstance(experiment.loss, MaskedTokens) and more:
        raise ConfigError("masked tokens are the whole loss", more, where="loss", remedy="Leave these keys out")
    objective = _main_objective(experiment, dataset, model)
    if joint is None:
        return objective
    beside = open_dataset(joint.data)
    if experiment.evaluate.original is None:
        beside.rows(experiment.evaluate.fold)  # what is forgotten will be measured on it
    return Joint(objective, dataset.rows("train"), dataset, beside, joint, experiment.train.augment)


def _main_objective(experiment: Experiment, dataset: Dataset, model: SequenceModel | None) -> Objective:
    loss, lengths = experiment.loss, dataset.lengths if experiment.train.buckets else None
    shares = experiment.loss_weights
    if isinstance(loss, MaskedTokens):
        assert model is not None  # whose tokens they are
        return objectives.MaskedTokens(tokeniser_of(model.trunk), loss.share, lengths)
    losses = loss if isinstance(loss, Mapping) else dict.fromkeys(dataset.tracks.groups, loss) if loss else None
    if dataset.donors is not None:
        if losses is not None and hasattr(loss, "of_genes"):  # one for all is for the group in which donors differ
            losses = {group: one for group, one in losses.items() if group != MEAN}
        return OfGenes(dataset.tracks, losses or {}, dataset.donors.gene, experiment.train.batch_size, shares)
    if wrong := [group for group, one in (losses or {}).items() if hasattr(one, "of_genes")]:
        what, remedy = "the loss compares donors, and the data have none", "Use another loss, or data of kind: personal"
        raise ConfigError(what, wrong, where="loss", remedy=remedy)
    return Elementwise(
        dataset.tracks, cast("Mapping[str, Loss] | None", losses), dataset.info.settings.get("class_weights"), lengths,
        shares,
    )  # fmt: skip


def build_run(experiment: Experiment, dataset: Dataset | None = None) -> tuple[SequenceModel, Dataset]:
    """Model (without its adapter) and dataset of an experiment; new heads start at the training means.

    The same seed gives the same model.
    """
    dataset = dataset or _open_data(experiment)
    model = seeded_model(experiment, dataset)
    rows = dataset.rows("train")
    if isinstance(model, MaskedModel):
        if is_random(experiment.model):
            _start_masked(model, dataset, rows)
        return model, dataset
    means = np.nanmean(dataset.squashed_targets(rows[:: max(1, len(rows) // 512)]).astype(np.float64), axis=(0, 2))
    names = list(dataset.tracks.names)
    for name, head in model.heads.items():
        if name.startswith("new_") and isinstance(head, Head):
            head.start_at(np.nan_to_num(means[[names.index(track) for track in head.tracks.names]]))
    return model, dataset


def _start_masked(model: MaskedModel, dataset: Dataset, rows: npt.NDArray[np.int64]) -> None:
    """An untrained head for masked tokens starts at the frequencies of the tokens in some of the training windows."""
    tokeniser, some = tokeniser_of(model.trunk), rows[:: max(1, len(rows) // 8192)]
    parts = np.array_split(some, len(some) // 64 + 1)
    counts = sum(token_counts(tokeniser, *dataset.sequences(part)) for part in parts)
    head: Any = model.trunk.lm
    head.start_at(torch.as_tensor(counts))


def _open_data(experiment: Experiment) -> Dataset:
    """The dataset of an experiment, without its tracks where these play no part."""
    dataset = open_dataset(experiment.data)
    if isinstance(experiment.loss, MaskedTokens):
        if dataset.donors is not None:
            what, remedy = "donors have no masked tokens", "Use kind: windows of the same genome, or another loss"
            raise ConfigError(what, "masked_tokens", where="loss", remedy=remedy)
        return replace(dataset.select_tracks(TrackTable.none()), covariates=None)
    return dataset


def with_precision(experiment: Experiment, model: SequenceModel) -> Experiment:
    """The experiment with the precision that "auto" means for this model on this machine."""
    return _in_precision(experiment, resolve_precision(experiment.train.precision, model))


def _in_precision(experiment: Experiment, precision: str) -> Experiment:
    return replace(experiment, train=replace(experiment.train, precision=precision))


def seeded_model(experiment: Experiment, dataset: Dataset) -> SequenceModel:
    """The model of an experiment before training and without its adapter, as the seed draws it."""
    torch.manual_seed(experiment.train.seed)
    if isinstance(experiment.loss, MaskedTokens):
        return build_masked(experiment.model, dataset.info)
    covariates = 0 if dataset.covariates is None else dataset.covariates.shape[1]
    joint = experiment.joint
    model = build_model(experiment.model, dataset.tracks, dataset.info, covariates, own_bins=joint is not None)
    if joint is not None:
        beside = open_dataset(joint.data)
        model.beside = build_beside(experiment.model, beside.tracks, beside.info)
    return model


def tokens_of(experiment: Experiment, model: SequenceModel, dataset: Dataset) -> TokenCounts:
    """The tokens of the folds that a run reads, in the views that it draws."""
    folds = {"train": experiment.train.augment, "valid": FORWARD_ONLY}
    folds |= {experiment.evaluate.fold: experiment.evaluate.ensemble}
    known = set(dataset.regions["fold"])
    present = {name: (dataset.rows(name), views) for name, views in folds.items() if name in known}
    return count_tokens(model.trunk, dataset, present, experiment.model.unknown)


def fit_run(experiment: Experiment, folder: Path, *, resume: bool = False) -> FitResult:
    """Trains an experiment into a run directory; ``plan`` should have found nothing wrong.

    Raises:
        RunError: the directory holds a run already and ``resume`` is off.
        SeqgraftError: whatever else stands in the way, before or while training.
    """
    folder = Path(folder)
    main = not _other_process()
    if main and not resume and (folder / "experiment.yaml").exists():
        raise RunError(
            "the run directory holds a run already",
            str(folder),
            remedy="Continue it with --resume, or choose another name",
        )
    if resume and (folder / "experiment.yaml").exists():
        before = read_experiment(folder / "experiment.yaml")
        if experiment.train.precision == "auto":  # which was decided when the run began
            experiment = _in_precision(experiment, before.train.precision)
        _check_resumed(experiment, before, folder)
    model, dataset = build_run(experiment)
    experiment = with_precision(experiment, model)
    if experiment.model.track is not None:
        rows = dataset.rows("train")
        some = rows[:: max(1, len(rows) // _STARTING)]
        start_track_heads(model, (dataset.sample(part) for part in np.array_split(some, -(-len(some) // 4))))
    objective = objective_of(experiment, dataset, model)
    counts = adapt(model, experiment.adapter)
    tokens = tokens_of(experiment, model, dataset)
    tokens.problems.raise_if_any()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if main:
            write_yaml(folder / "experiment.yaml", settings_of(experiment))
            beside = {"joint": objective.in_words} if isinstance(objective, Joint) else {}
            facts = _environment(experiment, dataset, model, counts, tokens) | beside
            write_json(folder / "environment.json", facts)
    except OSError as error:
        raise RunError(
            f"the run directory cannot be written ({error.strerror})",
            str(folder),
            remedy="Choose a folder that you can write to",
        ) from error
    result = fit(model, dataset, objective, experiment.train, folder, resume=resume)
    if main:
        base = {"name": experiment.model.name, "init": experiment.model.init}
        save_adapter(model, folder / "adapter", base, folds=_fold_counts(dataset), replace_existing=True)
        environment = _environment(experiment, dataset, model, counts, tokens) | beside
        write_json(
            folder / "environment.json",
            environment
            | {"result": asdict(result), "seconds": result.seconds, "peak_memory_bytes": result.peak_memory_bytes},
        )
    return result


def _check_resumed(experiment: Experiment, before: Experiment, folder: Path) -> None:
    """A run goes on as it began; only how it is scored, and what does not change the result, may be another."""
    free = {"patience", "save_minutes", "tracker", "cache_gb"}
    parts = ("model", "adapter", "loss", "loss_weights", "joint")
    named = [(name, getattr(experiment, name), getattr(before, name)) for name in parts]
    for name in sorted(TrainConfig.__dataclass_fields__.keys() - free):
        named.append((f"train.{name}", getattr(experiment.train, name), getattr(before.train, name)))
    if changed := [name for name, now, then in named if now != then]:
        raise RunError(
            "the run was started with other settings",
            changed,
            where=folder,
            remedy=f"Resume it with {folder / 'experiment.yaml'}, or start a new run",
        )


def _other_process() -> bool:
    import os

    return int(os.environ.get("RANK", "0")) > 0


def open_run(folder: Path) -> Run:
    """A finished run, ready to predict.

    Raises:
        RunError: there is no finished run.
        ModelError: the adapter and the weights below it do not belong together.
    """
    folder = Path(folder)
    if not (folder / "experiment.yaml").exists():
        raise RunError("this is not a run directory", str(folder), remedy="Give the folder that 'seqgraft fit' wrote")
    if not (folder / "adapter").exists():
        raise RunError("the run was not finished", str(folder), remedy="Continue it with 'seqgraft fit ... --resume'")
    experiment = read_experiment(folder / "experiment.yaml")
    if (folder / "data" / "dataset.json").exists():  # a pulled run brings what it needs of its data
        experiment = replace(experiment, data=folder / "data")
    dataset = _open_data(experiment)
    model = seeded_model(experiment, dataset)
    load_adapter(model, folder / "adapter")
    if torch.cuda.is_available():
        model.to("cuda")
    return Run(folder, experiment, dataset, model.eval())


def evaluate_run(
    folder: Path,
    fold: str | None = None,
    *,
    extra: Mapping[str, npt.NDArray[np.float32]] | None = None,
    baselines: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Evaluation:
    """Scores a run and its baselines and writes ``evaluation/``.

    Args:
        extra: predictions to score beside them, squashed, ``(rows of the fold, tracks, bins)``, by name.
        baselines: those of the baselines, where they are known already; computed if None.
    """
    run = open_run(folder)
    config, joint = run.experiment.evaluate, run.experiment.joint
    if joint is not None and config.original is None:
        config = replace(config, original=joint.data)
    if not len(run.dataset):
        remedy = "Pull it with --data and a prepared dataset of the same tracks"
        raise ConfigError("a pulled run has no data to be scored on", str(folder), remedy=remedy)
    if isinstance(run.model, MaskedModel):
        return _evaluate_masked(run, run.model, fold)
    if run.dataset.donors is not None:
        label = label_of(run.experiment)
        evaluation = evaluate_donors(run.model, run.dataset, config, label, run.experiment.model, extra=extra)
        evaluation.save(run.folder / "evaluation")
        return evaluation
    evaluation = evaluate_model(
        run.model, run.dataset, config, label_of(run.experiment), run.experiment.model,
        fold=fold, extra=extra, baselines=baselines,
    )  # fmt: skip
    evaluation.save(run.folder / "evaluation")
    return evaluation


def _evaluate_masked(run: Run, model: MaskedModel, fold: str | None) -> Evaluation:
    loss = run.experiment.loss
    assert isinstance(loss, MaskedTokens)  # as the model says
    objective, label = objectives.MaskedTokens(tokeniser_of(model.trunk), loss.share), label_of(run.experiment)
    before = None
    if model.trunk.spec.weights is not None and run.experiment.evaluate.baselines != ():
        before = build_masked(run.experiment.model, run.dataset.info).to(next(model.parameters()).device).eval()
    evaluation = evaluate_masked(
        model, run.dataset, run.experiment.evaluate, label, objective, fold=fold, pretrained=before
    )
    evaluation.save(run.folder / "evaluation")
    return evaluation


def _fold_counts(dataset: Dataset) -> dict[str, int]:
    return {str(fold): int(count) for fold, count in dataset.regions["fold"].value_counts().items()}


def _fold_chroms(dataset: Dataset) -> dict[str, list[str]]:
    return {
        str(fold): sorted(set(part["chrom"])) for fold, part in dataset.regions.groupby("fold") if part["chrom"].any()
    }


def _metric(experiment: Experiment, dataset: Dataset) -> str:
    if isinstance(experiment.loss, MaskedTokens):
        return "cross_entropy"
    return experiment.train.metric or default_metric(str(dataset.tracks.frame["link"].iloc[0]))


def _code(model: SequenceModel) -> dict[str, Any]:
    """Which code of a repository makes the trunk, if any does."""
    code = getattr(model.trunk, "settings", {}).get("code")
    return {"code": {name: code[name] for name in ("repository", "commit", "sha256")}} if code else {}


def _environment(
    experiment: Experiment, dataset: Dataset, model: SequenceModel, counts: Counts, tokens: TokenCounts
) -> dict[str, Any]:
    info = dataset.info
    return {
        "versions": {
            "seqgraft": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "peft", "accelerate", "transformers")},
        },
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "label": label_of(experiment),
        "precision": experiment.train.precision,
        "metric": _metric(experiment, dataset),
        "dataset": {
            "folder": str(dataset.folder),
            "hash": dataset.hash,
            "kind": info.kind,
            "window": info.window,
            "bins": info.bins,
            "bin_size": info.bin_size,
            "folds": _fold_counts(dataset),
            "chroms": _fold_chroms(dataset),
            "tracks": dataset.tracks.names,
            "notes": info.notes,
        },
        "model": {
            "name": experiment.model.name,
            "init": experiment.model.init,
            "licence": model.trunk.spec.licence,
            "citation": model.trunk.spec.citation,
            "weights": model.trunk.spec.weights,
            "species": getattr(model.trunk, "settings", {}).get("species", ""),
            **_code(model),
            "parameters": sum(p.numel() for p in model.trunk.parameters()) - counts.adapter,
        },
        "exposure": test_exposure(experiment, dataset).record(),
        "counts": asdict(counts),
        "frozen_bytes": asdict(FrozenBytes.of(model)),
        **({"tokens": tokens.record()} if tokens.folds else {}),
    }
