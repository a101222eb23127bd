"""The one training loop: for every model, adapter and objective, on one or many devices.

Two promises shape it. A run that is killed and resumed gives the result of an uninterrupted one (bit for bit on CPU):
the order of the rows and their augmentation are functions of (seed, epoch, index), and a checkpoint holds everything
else. And N processes give the loss curve of one process with N times the batch: sums are divided by the weight of the
whole step.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from seqgraft.adapters.base import adapted_of, check_frozen, check_gradients
from seqgraft.adapters.base import parameter_groups as adapter_groups
from seqgraft.cache import ActivationCache, CacheMode, CacheSettings, Choice, choose
from seqgraft.data.augment import FORWARD, Augmentation
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError, ModelError, RunError
from seqgraft.memory import LiveBytes, storage_bytes, tensors_of
from seqgraft.metrics import pearson_within
from seqgraft.models.base import SequenceModel, trainable_state
from seqgraft.models.masked import MaskedModel
from seqgraft.objectives import MaskedTokens, Objective
from seqgraft.predict import autocast, resolve_precision
from seqgraft.progress import progress
from seqgraft.sample import Sample
from seqgraft.scoring import Scorecard, default_metric

_GRADIENT_CHECKS = 4  # optimiser steps

__all__ = ["FitResult", "TrainConfig", "fit", "parameter_groups", "validate"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: passes over the training regions at most.
        batch_size: regions per forward pass and process.
        accumulate: forward passes per optimiser step.
        lr: learning rate of the adapter's parameters.
        head_lr, trunk_lr: of the heads, and of the trunk's own parameters where they train; ``lr`` if not given.
        weight_decay: of AdamW, on matrices only.
        buckets: where sequences differ in length, make batches of some of like length: less padding, less time.
        schedule: "cosine" to zero over all epochs, or "constant", after a linear warm-up.
        warmup: share of all steps.
        clip: largest norm of the gradient.
        patience: epochs without a better validation score before training stops; 0 never stops.
        metric: that picks the best checkpoint; None for the usual one of the tracks.
        precision: "bf16" runs forward and backward in bfloat16 where that is safe, "float32" never; "auto" does for
            trunks of more than 10 million parameters on processors that have it. A run keeps what it began with.
        checkpointing: recompute stages in the backward pass: less memory, a fifth more time.
        augment: views drawn for training.
        seed: of everything random.
        save_minutes: how often a checkpoint is written within an epoch.
        tracker: "tensorboard", "wandb" or any other that accelerate knows, beside log.csv.
        cache: keep on disk what the frozen stages before the first that trains make of each region and view: "off",
            "float16" or "float32" for the storage, "auto" to measure whether it pays. One process only.
        cache_gb: most disk space for that, in GB of 2**30 bytes.
    """

    epochs: int = 20
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-3
    head_lr: float | None = None
    trunk_lr: float | None = None
    weight_decay: float = 0.01
    buckets: bool = True
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    patience: int = 5
    metric: str | None = None
    precision: str = "auto"
    checkpointing: bool = False
    augment: Augmentation = field(default_factory=lambda: Augmentation(shift=3))
    seed: int = 1
    save_minutes: float = 5.0
    tracker: str | None = None
    cache: CacheMode = "off"
    cache_gb: float = 50.0

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("patience", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"must be {low} or more", getattr(self, name), where=f"train.{name}")
        for name in ("weight_decay", "save_minutes", "cache_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError("must be 0 or more", getattr(self, name), where=f"train.{name}")
        for name in ("lr", "head_lr", "trunk_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError("must be above 0", value, where=f"train.{name}")
        if not 0 <= self.warmup < 1:
            raise ConfigError("must be a share of the steps, 0 or more and below 1", self.warmup, where="train.warmup")
        if self.precision == "float16":
            what = "is not offered: CPUs compute it some 60 times slower, and it overflows above 65504, bf16 does not"
            raise ConfigError(what, self.precision, where="train.precision", remedy="Use bf16, auto or float32")
        if self.precision not in ("auto", "bf16", "float32"):
            remedy = "Use auto, bf16 or float32"
            raise ConfigError("there is no such precision", self.precision, where="train.precision", remedy=remedy)


@dataclass(frozen=True)
class FitResult:
    """What training ended with; the model holds the best weights.

    ``cache`` says what became of ``train.cache``; ``step_bytes`` is what all tensors held at the worst moment of the
    first step, weights and optimiser included; 0 of several processes.
    """

    best_score: float
    best_epoch: int
    epochs: int
    steps: int
    seconds: float
    peak_memory_bytes: int
    cache: str = ""
    step_bytes: int = 0


@dataclass
class _Progress:
    """Where training stands; all of it is in a checkpoint."""

    epoch: int = 0
    step: int = 0  # within the epoch
    total_steps: int = 0
    loss: float = 0.0  # sum over the epoch's steps
    best_score: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    step_bytes: int = 0
    log: list[dict[str, float]] = field(default_factory=list)

    def end_epoch(self, steps: int, valid_loss: float, score: float, lr: float) -> bool:
        """Writes the epoch's line and turns to the next one; whether this one is the best so far."""
        self.log.append(
            {
                "epoch": self.epoch + 1,
                "step": self.total_steps,
                "train_loss": self.loss / steps,
                "valid_loss": valid_loss,
                "valid_score": score,
                "lr": lr,
                "seconds": self.seconds,
            }
        )
        better = score > self.best_score or self.best_epoch < 0
        if better:
            self.best_score, self.best_epoch = score, self.epoch + 1
        self.epoch, self.step, self.loss = self.epoch + 1, 0, 0.0
        return better


class _GradientGuard:
    """Looks at the gradients of the first optimiser steps; later on units may have died, which is no mistake."""

    def __init__(self, model: SequenceModel, done: bool) -> None:
        self._model, self._checks = model, _GRADIENT_CHECKS if done else 0
        # the gradient of a bias may be zero for good, as in a difference of two predictions
        self._alive = {name for name, _ in model.named_parameters() if name.endswith("bias")}

    def check(self, weights: Tensor) -> None:
        """After a backward pass whose terms had these weights: a head without targets has no gradient."""
        if self._checks < _GRADIENT_CHECKS and bool((weights > 0).all()):
            self._checks += 1
            self._alive = check_gradients(self._model, self._alive, last=self._checks == _GRADIENT_CHECKS)


def fit(
    model: SequenceModel,
    dataset: Dataset,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    train_fold: str = "train",
    valid_fold: str = "valid",
) -> FitResult:
    """Trains what ``adapt`` left trainable, writes ``log.csv`` and ``checkpoints/``, and loads the best weights.

    Args:
        folder: the run directory; it exists.
        resume: continue from ``checkpoints/last.safetensors`` if there is one.

    Raises:
        ConfigError: a fold is empty, the metric does not suit the tracks, or the cache is too small.
        ModelError: a trainable tensor gets no gradient, or the loss is not finite.
        RunError: the checkpoint belongs to another experiment, or cannot be written.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=config.tracker, project_dir=str(folder))
    if config.tracker:
        accelerator.init_trackers("seqgraft", config={})
    device = accelerator.device
    model.to(device)
    rows, valid_rows = dataset.rows(train_fold), dataset.rows(valid_fold)
    world, rank = accelerator.num_processes, accelerator.process_index
    step_rows = config.batch_size * config.accumulate * world
    steps_per_epoch = len(objective.batches(rows, step_rows, config.seed, 0))
    last = folder / "checkpoints" / "last.safetensors"
    before = _identity_before(last) if resume else {}
    if config.precision == "auto":
        precision = before.get("train", {}).get("precision", resolve_precision("auto", model))
        config = replace(config, precision=precision)
    choice = cache_choice(model, dataset, config, rows, valid_rows, world, str(before["cache"]) if before else None)
    precision = resolve_precision(config.precision, model)
    cache = ActivationCache.open(model, dataset, choice, precision, config.augment) if choice.used else None
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    _start_optimizer(optimizer)
    state = _Progress()
    torch.manual_seed(config.seed)
    checkpoints = _new_checkpoints(folder)
    identity = _identity(model, objective, config, dataset, world) | {"cache": choice.identity}
    if resume and last.exists():
        state = _load_checkpoint(last, model, optimizer, identity)
        if accelerator.is_main_process and state.log:  # a kill may have come between the checkpoint and its line
            _write_log(folder / "log.csv", state.log)
    model.trunk.checkpointing = config.checkpointing
    wrapped = accelerator.prepare_model(model) if world > 1 else model
    guard = _GradientGuard(model, done=state.epoch > 0 or state.step >= _GRADIENT_CHECKS)
    held = [*tensors_of(model), *_optimizer_tensors(optimizer).values()]
    live = LiveBytes(beside=held)
    began, saved = time.monotonic() - state.seconds, time.monotonic()
    while state.epoch < config.epochs and not _out_of_patience(state, config):
        batches = objective.batches(rows, step_rows, config.seed, state.epoch)
        wrapped.train()
        bar = progress(
            range(state.step, len(batches)),
            f"epoch {state.epoch + 1} of {config.epochs}",
            total=len(batches) - state.step,
        )
        for number in bar:
            _set_learning_rates(optimizer, config, state.total_steps, steps_per_epoch * config.epochs)
            draw = partial(objective.draw, seed=config.seed, epoch=state.epoch)
            micro = list(
                _micro_batches(dataset, batches[number], config, state.epoch, world, rank, device, cache, draw)
            )
            with nullcontext() if state.step_bytes or world > 1 else live:  # which takes time: the first step only
                loss, weights = _step(accelerator, wrapped, model, optimizer, objective, micro, config)
            if live.peak:
                state.step_bytes = storage_bytes(held) + live.peak
            if not math.isfinite(loss):
                where, remedy = (
                    f"epoch {state.epoch + 1}, step {number + 1}",
                    "Lower train.lr, or use precision: float32",
                )
                raise ModelError("the loss is not finite", loss, where=where, remedy=remedy)
            guard.check(weights)
            optimizer.step()
            state.step, state.total_steps, state.loss = number + 1, state.total_steps + 1, state.loss + loss
            due = time.monotonic() - saved > 60 * config.save_minutes and state.step < len(batches)
            if due and accelerator.is_main_process:
                state.seconds, saved = time.monotonic() - began, time.monotonic()
                _save_checkpoint(last, model, optimizer, identity, state)
        if accelerator.is_main_process:
            valid_loss, score = validate(model, dataset, valid_rows, objective, config, cache)
        else:
            valid_loss = score = 0.0
        valid_loss, score = _from_main(accelerator, valid_loss, score)
        state.seconds = time.monotonic() - began
        better = state.end_epoch(len(batches), valid_loss, score, float(optimizer.param_groups[-1]["lr"]))
        accelerator.log(state.log[-1], step=state.total_steps)
        if accelerator.is_main_process:
            if better:
                _write_tensors(checkpoints / "best.safetensors", trainable_state(model), {"epoch": state.best_epoch})
            _save_checkpoint(last, model, optimizer, identity, state)
            saved = time.monotonic()
            _write_log(folder / "log.csv", state.log)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    check_frozen(model)
    best, _ = _read_tensors(checkpoints / "best.safetensors")
    _copy_tensors(trainable_state(model), best, checkpoints / "best.safetensors")
    model.eval()
    return FitResult(
        state.best_score,
        state.best_epoch,
        state.epoch,
        state.total_steps,
        state.seconds,
        _peak_memory(device),
        choice.in_words,
        state.step_bytes,
    )


def cache_choice(
    model: SequenceModel,
    dataset: Dataset,
    config: TrainConfig,
    rows: npt.NDArray[np.int64],
    valid_rows: npt.NDArray[np.int64],
    world: int = 1,
    before: str | None = None,
) -> Choice:
    """What ``config.cache`` means for an adapted model; ``before`` is what the run that is resumed began with.

    Raises:
        ConfigError: a storage type was asked for and there are several processes, or too little of ``cache_gb``.
    """
    if isinstance(model, MaskedModel):
        if config.cache in ("float16", "float32"):
            what, remedy = "which tokens are hidden is drawn anew each time: nothing can be kept", "Use off"
            raise ConfigError(what, config.cache, where="train.cache", remedy=remedy)
        return Choice(None, reason="which tokens are hidden is drawn anew each time")
    if world > 1 and config.cache in ("float16", "float32"):
        remedy = "Use train.cache: off, or train in one process"
        raise ConfigError(
            "the cache is filled by one process, and there are", world, where="train.cache", remedy=remedy
        )
    if world > 1 and config.cache == "auto":
        return Choice(None, reason=f"there are {world} processes")
    precision = resolve_precision(config.precision, model)
    settings = CacheSettings(config.cache, config.cache_gb, config.epochs, precision, config.augment)
    return choose(model, dataset, rows, valid_rows, settings, before)


def parameter_groups(model: SequenceModel, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups: trunk, adapter and head, each with its own learning rate, vectors without weight decay."""
    rates = {"trunk": config.trunk_lr or config.lr, "adapter": config.lr, "head": config.head_lr or config.lr}
    return [
        {
            "params": chosen,
            "lr": rates[part],
            "base_lr": rates[part],
            "weight_decay": config.weight_decay if matrices else 0.0,
        }
        for part, parameters in adapter_groups(model).items()
        for matrices in (True, False)
        if (chosen := [p for p in parameters if (p.ndim > 1) == matrices])
    ]


def validate(
    model: SequenceModel,
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    objective: Objective,
    config: TrainConfig,
    cache: ActivationCache | None = None,
) -> tuple[float, float]:
    """Loss and score (higher is better) of ``rows``; the model's mode is left as it was.

    Of donors the score is the mean over genes of the Pearson correlation across donors.

    Raises:
        ModelError: the score is undefined for every track, so that no checkpoint could be the best.
    """
    was_training = model.training
    model.eval()
    if isinstance(objective, MaskedTokens):
        loss = _masked_loss(model, dataset, rows, objective, config)
        model.train(was_training)
        return loss, -loss
    links = dataset.tracks.frame["link"].unique()
    card = Scorecard(dataset.tracks, [config.metric] if config.metric else [default_metric(link) for link in links])
    device = next(model.parameters()).device
    count = len(dataset.tracks)
    total = weight = torch.zeros(len(objective.terms), device=device)
    rows = rows[dataset.length_order(rows)]
    parts: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = []
    with torch.inference_mode():
        for start in range(0, len(rows), config.batch_size):
            chosen = rows[start : start + config.batch_size]
            sample = dataset.sample(chosen).to(device)
            if cache is not None:
                sample = cache.attach(sample)
            with autocast(resolve_precision(config.precision, model), device):
                values = model(sample)
            total = total + objective(_Given(values), sample)
            weight = weight + objective.weigh(sample)
            predicted = model.link(values)[:, :count].cpu().numpy()
            truth = np.where(sample.mask.cpu().numpy(), sample.targets.cpu().numpy(), np.nan)
            card.update(truth, predicted, chosen)
            if dataset.donors is not None:  # of other data this would keep every target and prediction
                parts.append((truth[:, 0, 0], predicted[:, 0, 0]))
    model.train(was_training)
    if dataset.donors is not None:
        found, known = (np.concatenate(values) for values in zip(*parts, strict=True))
        within = pearson_within(found, known, dataset.donors.gene[rows])
        return float((total / weight.clamp(min=1e-12)).sum()), float(within.mean())
    leading = card.leading()
    if math.isnan(leading.value):
        raise ModelError(
            "the validation score is undefined for every track",
            leading.reason,
            remedy="Check that the validation fold has signal, or choose another train.metric",
        )
    return float((total / weight.clamp(min=1e-12)).sum()), leading.value


def _masked_loss(
    model: SequenceModel, dataset: Dataset, rows: npt.NDArray[np.int64], objective: MaskedTokens, config: TrainConfig
) -> float:
    """Nats per hidden token; the same tokens are hidden at every evaluation."""
    device = next(model.parameters()).device
    total, weight = 0.0, 0.0
    for start in range(0, len(rows), config.batch_size):
        sample = objective.scored(dataset.sample(rows[start : start + config.batch_size])).to(device)
        with torch.inference_mode(), autocast(resolve_precision(config.precision, model), device):
            total += float(objective(model, sample))
        weight += float(objective.weigh(sample))
    return total / max(weight, 1.0)


class _Given(nn.Module):
    """Stands for a model whose outputs are known already."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, sample: Sample) -> Tensor:  # noqa: ARG002  (called like a model)
        return self.values


def _step(
    accelerator: Accelerator,
    wrapped: nn.Module,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    micro: list[Sample],
    config: TrainConfig,
) -> tuple[float, Tensor]:
    """Gradients of one optimiser step, clipped; returns its loss and the weight of each term over all processes."""
    weights = accelerator.reduce(torch.stack([objective.weigh(sample) for sample in micro]).sum(0))
    divisors = weights.clamp(min=1e-12)
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros_like(divisors)
    for number, sample in enumerate(micro):
        last = number == len(micro) - 1
        with nullcontext() if last or wrapped is model else accelerator.no_sync(wrapped):
            with autocast(resolve_precision(config.precision, model), accelerator.device):
                totals = objective(wrapped, sample)
            # gradients of processes are averaged, so the sum over processes is N times that
            (accelerator.num_processes * (totals / divisors).sum()).backward()
        sums += totals.detach()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], config.clip)
    return float((accelerator.reduce(sums) / divisors).sum()), weights


def _micro_batches(
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    config: TrainConfig,
    epoch: int,
    world: int,
    rank: int,
    device: torch.device,
    cache: ActivationCache | None = None,
    draw: Callable[[Sample], Sample] = lambda sample: sample,
) -> Iterator[Sample]:
    """This process's share of a step's rows in micro-batches, as many on every process and none above ``batch_size``.

    A micro-batch without rows takes part with weight zero.
    """
    shares = np.array_split(rows, world)
    count = max(-(-len(share) // config.batch_size) for share in shares)
    for part in np.array_split(shares[rank], count):
        empty = not len(part)
        chosen = rows[:1] if empty else part
        views = (
            [config.augment.draw(config.seed, epoch, dataset.view_index(int(row))) for row in chosen]
            if config.augment.views() != [FORWARD]
            else None
        )
        sample = draw(dataset.sample(chosen, views)).to(device)
        if empty:
            sample = sample.without_targets()
        yield cache.attach(sample) if cache is not None else sample


def _set_learning_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps: int) -> None:
    warm = max(1, round(config.warmup * steps))
    factor = min(1.0, (step + 1) / warm)
    if config.schedule == "cosine" and step >= warm:
        factor = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _out_of_patience(state: _Progress, config: TrainConfig) -> bool:
    return config.patience > 0 and state.epoch - state.best_epoch >= config.patience and state.best_epoch > 0


def _from_main(accelerator: Accelerator, *values: float) -> tuple[float, ...]:
    """The main process's numbers, on every process."""
    if accelerator.num_processes == 1:
        return values
    mine = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return tuple(accelerator.reduce(mine).tolist())  # the others hold zeros


def _write_log(path: Path, log: list[dict[str, float]]) -> None:
    building = path.with_name(".log.csv.part")
    try:
        pd.DataFrame(log).to_csv(building, index=False)
        os.replace(building, path)
    except OSError as error:
        raise RunError(
            f"the log could not be written ({error.strerror})",
            str(path),
            remedy="Free some disk space, then continue with --resume",
        ) from error


# ---- checkpoints: one safetensors file each, replaced in one move, so that a kill leaves the old or the new ----


def _new_checkpoints(folder: Path) -> Path:
    try:
        (folder / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the checkpoints cannot be written ({error.strerror})",
            str(folder),
            remedy="Choose a folder that you can write to",
        ) from error
    return folder / "checkpoints"


def _start_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Creates AdamW's state now, so that a checkpoint always has the same tensors."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"optimizer.{i}.{key}": value for i, p in enumerate(parameters) for key, value in optimizer.state[p].items()
    }


def _identity(
    model: SequenceModel, objective: Objective, config: TrainConfig, dataset: Dataset, world: int
) -> dict[str, Any]:
    """What must be equal for a run to be continued."""
    adapted = adapted_of(model)
    free = ("save_minutes", "tracker", "patience", "cache", "cache_gb")  # what the cache became is apart
    return {
        "train": {k: v for k, v in asdict(config).items() if k not in free},
        "dataset": dataset.hash,
        "adapter": repr(adapted.adapter),
        "weights": dict(adapted.base),
        "objective": [type(objective).__name__, *objective.terms, *getattr(objective, "identity", ())],
        "processes": world,
    }


def _identity_before(last: Path) -> dict[str, Any]:
    """The identity in a checkpoint; empty where there is no checkpoint, or none that can be read."""
    try:
        with safe_open(last, framework="pt") as file:
            identity = json.loads(json.loads((file.metadata() or {})["identity"]))
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError):
        return {}  # loading it says what is wrong
    return {"cache": "off", **identity}


def _save_checkpoint(
    path: Path,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    state: _Progress,
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in trainable_state(model).items()} | _optimizer_tensors(
        optimizer
    )
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    _write_tensors(path, tensors, {"progress": asdict(state), "identity": json.dumps(identity)})


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    building = path.with_name(f".{path.name}.part")
    metadata = {key: json.dumps(value) for key, value in facts.items()} | {"format_version": "1"}
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            building,
            metadata=metadata,
        )
        os.replace(building, path)
    except (OSError, SafetensorError) as error:
        building.unlink(missing_ok=True)
        raise RunError(
            f"the checkpoint could not be written ({error})",
            str(path),
            remedy="Free some disk space, then continue with --resume",
        ) from error


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"the checkpoint cannot be read ({error})", str(path), remedy="Remove the folder and start again"
        ) from error


def _copy_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    differing = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if differing:
        raise RunError(
            "the checkpoint holds other tensors than this model trains",
            differing[:5],
            where=path,
            remedy="Resume with the same adapter and model",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _load_checkpoint(
    path: Path, model: SequenceModel, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]
) -> _Progress:
    tensors, facts = _read_tensors(path)
    if not {"identity", "progress"} <= facts.keys():
        raise RunError("this is not a checkpoint of a run", str(path), remedy="Remove the folder and start again")
    now = json.loads(json.dumps(identity))
    if differing := [key for key, value in json.loads(facts["identity"]).items() if now.get(key) != value]:
        raise RunError(
            f"the checkpoint belongs to other settings or data (they differ in {', '.join(differing)})",
            str(path),
            remedy="Resume with the experiment and dataset that it was started with, or start a new run",
        )
    own = {f"model.{name}": tensor for name, tensor in trainable_state(model).items()} | _optimizer_tensors(optimizer)
    _copy_tensors(own, {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}, path)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return _Progress(**facts["progress"])


def _peak_memory(device: torch.device) -> int:
    """Most memory held, in bytes: of the card, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
