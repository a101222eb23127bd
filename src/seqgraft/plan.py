"""``plan``: every check that needs no accelerator, and what the run will cost, before hours of compute."""

from __future__ import annotations

import os
import re
import shutil
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqgraft.adapters import Counts, adapt
from seqgraft.cache import Choice
from seqgraft.data.dataset import Dataset
from seqgraft.data.duplicates import duplicates_in_words
from seqgraft.data.folds import exposure, read_trunk_folds
from seqgraft.errors import ConfigError, DataError, RunError, SeqgraftError
from seqgraft.experiment import Experiment
from seqgraft.models.base import SequenceModel
from seqgraft.models.weights import find_model
from seqgraft.predict import autocast
from seqgraft.run import build_run, label_of, objective_of
from seqgraft.scoring import Scorecard
from seqgraft.train import cache_choice, parameter_groups

__all__ = ["MAX_EXPOSURE", "Cost", "Plan", "parse_memory", "plan_run", "test_exposure"]

#: Test windows that overlap the trunk's own training regions, above which ``fit`` refuses unless told.
MAX_EXPOSURE = 0.05


@dataclass(frozen=True)
class Cost:
    """What a step needs, measured on this machine.

    Attributes:
        fixed_bytes: weights, gradients, optimiser and buffers.
        bytes_per_row: activations and their gradients at the worst moment, per region of a batch.
        seconds_per_row: forward and backward pass of one region, on this machine.
    """

    fixed_bytes: int
    bytes_per_row: int
    seconds_per_row: float

    def peak_bytes(self, batch_size: int) -> int:
        return self.fixed_bytes + batch_size * self.bytes_per_row

    def largest_batch(self, memory: int) -> int:
        """Rows that fit into ``memory`` bytes, with a fifth kept free for the allocator and workspaces."""
        return max(0, int((0.8 * memory - self.fixed_bytes) // max(1, self.bytes_per_row)))


@dataclass(frozen=True)
class Plan:
    """One screen; ``problems`` is empty if ``fit`` would start."""

    experiment: Experiment
    problems: list[SeqgraftError]
    facts: dict[str, str] = field(default_factory=dict)
    cost: Cost | None = None

    @property
    def would_start(self) -> bool:
        return not self.problems


def plan_run(experiment: Experiment, folder: Path | None = None, memory: int | None = None) -> Plan:
    """Checks an experiment and measures one small training step.

    Args:
        folder: where the run would be written; checked for room.
        memory: bytes of a card that may not be here; None for this machine.
    """
    problems: list[SeqgraftError] = []
    facts: dict[str, str] = {}
    try:
        model, dataset = build_run(experiment)
        objective_of(experiment, dataset)
        counts = adapt(model, experiment.adapter)
        for fold in ("train", "valid", experiment.evaluate.fold):
            dataset.rows(fold)
        Scorecard(dataset.tracks, [experiment.train.metric] if experiment.train.metric else None)
    except SeqgraftError as error:
        return Plan(experiment, [error])
    facts |= _describe(experiment, dataset, model, counts)
    share, note = test_exposure(experiment, dataset)
    facts["leak exposure"] = note
    if share > MAX_EXPOSURE and not experiment.allow_exposure:
        problems.append(
            DataError(
                f"{share:.1%} of the windows of fold {experiment.evaluate.fold!r} overlap regions that the trunk "
                "was pretrained on",
                where=str(experiment.data),
                remedy="Choose test regions that the trunk has not seen, or set allow_exposure: true and say so where "
                "you report the result",
            )
        )
    if folder is not None:
        problems += _check_folder(folder, counts)
    try:
        cost = measure_cost(experiment, model, dataset)
    except SeqgraftError as error:  # a loss that does not suit the targets shows in the first step
        return Plan(experiment, [*problems, error], facts)
    facts |= _describe_cost(experiment, dataset, cost, memory)
    try:
        facts["cache"] = _describe_cache(experiment, dataset, model, cost)
    except SeqgraftError as error:
        problems.append(error)
    if memory is not None and cost.largest_batch(memory) < experiment.train.batch_size:
        fits = cost.largest_batch(memory)
        remedy = (
            f"Use train.batch_size: {fits} with train.accumulate"
            if fits
            else "Use train.checkpointing: true, a smaller window, or a smaller model"
        )
        problems.append(
            ConfigError(
                f"the batch does not fit into {_size(memory)}",
                experiment.train.batch_size,
                where="train.batch_size",
                remedy=remedy,
            )
        )
    return Plan(experiment, problems, facts, cost)


def test_exposure(experiment: Experiment, dataset: Dataset) -> tuple[float, str]:
    """Share of test windows that touch regions the trunk was trained on, and a sentence about it."""
    pretrained = find_model(experiment.model.name)
    if pretrained is None or experiment.model.init == "random":
        return 0.0, "none: the trunk has random weights"
    if pretrained.trained_on is None:
        return 0.0, "unknown: the model does not say which regions it was trained on"
    if dataset.genome is None:
        return 0.0, "unknown: the sequences have no positions in a genome"
    if dataset.genome.hash != pretrained.content.get("genome"):
        return 0.0, "none by position: the trunk was trained on another genome"
    rows = dataset.rows(experiment.evaluate.fold)
    margin = (dataset.info.window - dataset.info.bins * dataset.info.bin_size) // 2
    windows = dataset.regions.iloc[rows][["chrom", "start", "end"]].copy()
    windows["start"], windows["end"] = windows["start"] - margin, windows["end"] + margin
    share = exposure(windows, read_trunk_folds(pretrained.trained_on))
    return (
        share,
        f"{share:.1%} of the {len(rows)} windows of fold {experiment.evaluate.fold!r} overlap the "
        "trunk's training regions",
    )


# pytest would take the name for a test
test_exposure.__test__ = False  # type: ignore[attr-defined]


def _describe(experiment: Experiment, dataset: Dataset, model: SequenceModel, counts: Counts) -> dict[str, str]:
    info = dataset.info
    folds = dataset.regions["fold"].value_counts()
    trainable = counts.trainable / max(1, counts.total)
    duplicates = info.notes.get("duplicates") if isinstance(info.notes, dict) else None
    return {
        "run": label_of(experiment),
        "data": f"{len(dataset)} regions ({', '.join(f'{fold} {count}' for fold, count in folds.items())}), "
        f"{len(dataset.tracks)} tracks, {info.in_words}",
        "model": f"{experiment.model.name} ({'random' if model.trunk.spec.weights is None else 'pretrained'} weights), "
        f"{sum(p.numel() for p in model.trunk.parameters()) - counts.adapter:,} parameters"
        + (f", licence {model.trunk.spec.licence}" if model.trunk.spec.licence else ""),
        "trains": f"{counts.trainable:,} of {counts.total:,} numbers ({trainable:.2%}): "
        f"adapter {counts.adapter:,}, head {counts.head:,}, trunk {counts.trunk:,}",
        "stages": ", ".join(
            f"{name} ({'local' if stage.local else 'global'})" for name, stage in model.trunk.stages.items()
        ),
        **({"duplicates": duplicates_in_words(duplicates)} if duplicates else {}),
    }


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations make, as long as they live; ``peak`` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, key, storage.nbytes()).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def measure_cost(experiment: Experiment, model: SequenceModel, dataset: Dataset) -> Cost:
    """One step on one and on two copies of the longest region: what the second adds to the peak, and the time."""
    config = experiment.train
    objective = objective_of(experiment, dataset)
    rows = dataset.rows("train")
    longest = rows[0] if dataset.lengths is None else rows[np.argmax(dataset.lengths[rows])]
    device = next(model.parameters()).device
    model.train()
    model.trunk.checkpointing = config.checkpointing
    for parameter in model.parameters():  # here already, so that they are no part of what is measured
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    live = _LiveBytes()

    def step(size: int) -> int:
        """Trains on copies of the region and returns the bytes that wait for the backward pass."""
        sample = dataset.sample(np.repeat(longest, size)).to(device)
        with autocast(config.precision, device):
            totals = objective(model, sample)
        loss = (totals / objective.weigh(sample).clamp(min=1e-12)).sum()
        kept = live.now
        loss.backward()  # type: ignore[no-untyped-call]
        return kept

    kept, peaks = [], []
    for size in (1, 2):
        with (live := _LiveBytes()):
            kept.append(step(size))
        peaks.append(live.peak)
    began = time.perf_counter()
    step(2)
    seconds = (time.perf_counter() - began) / 2
    model.zero_grad(set_to_none=True)
    model.eval()
    # where the gradient of one weight matrix is the larger, the peak grows less than the activations do
    per_row = max(kept[1] - kept[0], peaks[1] - peaks[0])
    stored = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    trained = sum(p.numel() * p.element_size() for group in parameter_groups(model, config) for p in group["params"])
    return Cost(fixed_bytes=stored + 3 * trained, bytes_per_row=per_row, seconds_per_row=seconds)


def _describe_cost(experiment: Experiment, dataset: Dataset, cost: Cost, memory: int | None) -> dict[str, str]:
    config = experiment.train
    epoch = len(dataset.rows("train")) * cost.seconds_per_row + len(dataset.rows("valid")) * cost.seconds_per_row / 3
    facts = {
        "memory": f"{_size(cost.peak_bytes(config.batch_size))} for batches of {config.batch_size} "
        f"(weights and optimiser {_size(cost.fixed_bytes)}, activations {_size(cost.bytes_per_row)} per region)",
        "time": f"about {_duration(epoch)} per epoch on this machine, "
        f"at most {_duration(epoch * config.epochs)} for {config.epochs} epochs",
    }
    if memory is not None:
        facts["device"] = (
            f"a card of {_size(memory)} takes batches of up to {cost.largest_batch(memory)} (a fifth kept free); "
            "time there was not measured"
        )
    return facts


def _describe_cache(experiment: Experiment, dataset: Dataset, model: SequenceModel, cost: Cost) -> str:
    """What ``train.cache`` will do; where it is off, what it could."""
    config, rows, valid = experiment.train, dataset.rows("train"), dataset.rows("valid")
    if config.cache != "off":
        choice = cache_choice(model, dataset, config, rows, valid)
        return choice.in_words + _gain(choice, cost, len(rows), len(valid))
    possible = cache_choice(model, dataset, replace(config, cache="float16", cache_gb=1e9), rows, valid)
    if not possible.used:
        return f"off, and there is nothing to keep: {possible.reason}"
    return f"off; train.cache could keep {possible.in_words}{_gain(possible, cost, len(rows), len(valid))}"


def _gain(choice: Choice, cost: Cost, rows: int, valid: int) -> str:
    """How much shorter an epoch is when all of its views are kept; a validation row takes a third of a training row."""
    if not choice.used:
        return ""
    before = (rows + valid / 3) * cost.seconds_per_row
    after = before - rows * choice.seconds - valid * min(choice.seconds, cost.seconds_per_row / 3)
    times = before / after if after > before / 20 else 20
    return f"; an epoch that finds all of them takes {'' if times < 20 else 'more than '}{times:.1f} times less time"


def _check_folder(folder: Path, counts: Counts) -> list[SeqgraftError]:
    """A run needs its adapter, the best weights, and the last with two optimiser moments: five times what trains."""
    if (folder / "experiment.yaml").exists():
        remedy = "Continue it with 'seqgraft fit ... --resume', or choose another name"
        return [RunError("the run directory holds a run already", str(folder), remedy=remedy)]
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        remedy = "Choose a folder that you can write to"
        return [RunError("the run directory cannot be written", str(folder), remedy=remedy)]
    needed = 5 * 4 * counts.trainable + 10_000_000
    free = shutil.disk_usage(parent).free
    if free < needed:
        return [
            ConfigError(
                f"the disk has {_size(free)} left and the run needs",
                _size(needed),
                where=str(folder),
                remedy="Free some space or choose another folder",
            )
        ]
    return []


def parse_memory(text: str) -> int:
    """Bytes of "24 GB", "80GiB" and the like; GB counts as GiB, as card makers do.

    Raises:
        ConfigError: not an amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])i?B\s*", text, flags=re.IGNORECASE)
    if not match:
        raise ConfigError("this is not an amount of memory", text, where="--device", remedy="Write it like '24 GB'")
    return int(float(match[1]) * (2**30 if match[2].upper() == "G" else 2**20))


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
