"""``plan``: every check that needs no accelerator, and what the run will cost, before hours of compute."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from seqgraft.adapters import Counts, adapt
from seqgraft.cache import Choice, size_in_words
from seqgraft.data.dataset import Dataset
from seqgraft.data.duplicates import duplicates_in_words
from seqgraft.errors import ConfigError, RunError, SeqgraftError
from seqgraft.experiment import Experiment
from seqgraft.exposure import MAX_EXPOSURE, test_exposure
from seqgraft.joint import Joint
from seqgraft.memory import (
    FrozenBytes,
    bytes_per_row,
    bytes_without_computing,
    storage_bytes,
    tensors_of,
    training_step,
)
from seqgraft.models.base import SequenceModel
from seqgraft.models.masked import MaskedModel
from seqgraft.objectives import Objective
from seqgraft.predict import BF16_PARAMETERS, Precision, has_bf16, resolve_precision
from seqgraft.run import build_run, label_of, objective_of, tokens_of, with_precision
from seqgraft.sample import Sample
from seqgraft.scoring import Scorecard
from seqgraft.train import TrainConfig, cache_choice, parameter_groups

__all__ = ["MAX_EXPOSURE", "Cost", "Plan", "parse_memory", "plan_run", "test_exposure"]


#: Parameters of the trunk times bp of a region above which no step is run only to be measured: from about there on, it
#: takes ten seconds of a core.
_LONG = 5e12
_BATCHES = 100  # of donors, in which distinct haplotypes are counted


@dataclass(frozen=True)
class Cost:
    """What a step needs.

    Attributes:
        fixed_bytes: weights, gradients, optimiser and buffers.
        bytes_per_row: activations and their gradients at the worst moment, per region of a batch.
        seconds_per_row: forward and backward pass of one region, measured on this machine; None if none was run.
        distinct: of donors, which share haplotypes, what a region of a batch takes of what it takes alone; both numbers
            above are of a region in a batch.
    """

    fixed_bytes: int
    bytes_per_row: int
    seconds_per_row: float | None
    distinct: float = 1.0

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
    """Checks an experiment and measures one small training step; a long one is counted and not run.

    Args:
        folder: where the run would be written; checked for room.
        memory: bytes of a card that may not be here: does the batch fit it? What a step takes is what it takes here.
    """
    problems: list[SeqgraftError] = []
    facts: dict[str, str] = {}
    try:
        model, dataset = build_run(experiment)
        objective = objective_of(experiment, dataset, model)
        counts = adapt(model, experiment.adapter)
        for fold in ("train", "valid", experiment.evaluate.fold):
            dataset.rows(fold)
        if not isinstance(model, MaskedModel):
            Scorecard(dataset.tracks, [experiment.train.metric] if experiment.train.metric else None)
    except SeqgraftError as error:
        return Plan(experiment, [error])
    wanted = experiment.train.precision
    experiment = with_precision(experiment, model)
    facts |= _describe(experiment, dataset, model, counts)
    if isinstance(objective, Joint):
        facts["joint"] = objective.in_words
    facts["precision"] = _describe_precision(experiment.train.precision, wanted)
    tokens = tokens_of(experiment, model, dataset)
    facts |= tokens.facts
    problems += tokens.problems.found
    exposed = test_exposure(experiment, dataset)
    facts |= exposed.facts
    if exposed.problem is not None and not exposed.allowed:
        problems.append(exposed.problem)
    if folder is not None:
        problems += _check_folder(folder, counts)
    if tokens.problems.found:  # no step can be run
        return Plan(experiment, problems, facts)
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
                f"the batch does not fit into {size_in_words(memory)}",
                experiment.train.batch_size,
                where="train.batch_size",
                remedy=remedy,
            )
        )
    return Plan(experiment, problems, facts, cost)


def _describe(experiment: Experiment, dataset: Dataset, model: SequenceModel, counts: Counts) -> dict[str, str]:
    info = dataset.info
    trainable = counts.trainable / max(1, counts.total)
    species = getattr(model.trunk, "settings", {}).get("species")
    duplicates = info.notes.get("duplicates") if isinstance(info.notes, dict) else None
    held = FrozenBytes.of(model)
    quantised = f"frozen weights {size_in_words(held.now)}, {size_in_words(held.before)} before"
    return {
        "run": label_of(experiment),
        "data": dataset.in_words,
        "model": f"{experiment.model.name} ({'random' if model.trunk.spec.weights is None else 'pretrained'} weights), "
        f"{sum(p.numel() for p in model.trunk.parameters()) - counts.adapter:,} parameters"
        + (f", species {species}" if species else "")
        + (f", licence {model.trunk.spec.licence}" if model.trunk.spec.licence else ""),
        "trains": f"{counts.trainable:,} of {counts.total:,} numbers ({trainable:.2%}): "
        f"adapter {counts.adapter:,}, head {counts.head:,}, trunk {counts.trunk:,}",
        **({"quantised": quantised} if held.quantised else {}),
        "stages": ", ".join(
            f"{name} ({'local' if stage.local else 'global'})" for name, stage in model.trunk.stages.items()
        ),
        **({"duplicates": duplicates_in_words(duplicates)} if duplicates else {}),
    }


def measure_cost(
    experiment: Experiment, model: SequenceModel, dataset: Dataset, *, run_step: bool | None = None
) -> Cost:
    """One step on one and on two copies of the longest region: what the second adds to the peak, and the time.

    Of donors, two that share as few haplotypes as there are, times what batches leave of those after sharing.

    Args:
        run_step: False counts the bytes without computing, and measures no time, wherever that can be; None does so
            for steps that would take long: those of large models without a card.
    """
    config = experiment.train
    objective = objective_of(experiment, dataset, model)
    rows = dataset.rows("train")
    pair, distinct = _costliest(dataset, rows, objective, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    model.trunk.checkpointing = config.checkpointing
    precision = resolve_precision(config.precision, model)
    joint, main = (objective, objective.main) if isinstance(objective, Joint) else (None, objective)
    samples = [main.draw(dataset.sample(pair[:size]), config.seed, 0) for size in (1, 2)]
    if run_step is None:
        size = sum(p.numel() for p in model.trunk.parameters()) * samples[0].codes.shape[1]
        run_step = device.type == "cuda" or size <= _LONG
    per_row, seconds = _step_of(model, main, samples, precision, run_step)
    per_row, seconds = math.ceil(per_row * distinct), None if seconds is None else seconds * distinct
    if joint is not None:
        regions = [joint.sample(joint.regions[[0] * size], config.seed, 0) for size in (1, 2)]
        more, longer = _step_of(model, joint.other, regions, precision, run_step)
        per_row += math.ceil(more / joint.every)
        seconds = None if seconds is None or longer is None else seconds + longer / joint.every
    model.zero_grad(set_to_none=True)
    model.eval()
    stored = storage_bytes(tensors_of(model))
    trained = sum(p.numel() * p.element_size() for group in parameter_groups(model, config) for p in group["params"])
    return Cost(stored + 3 * trained, per_row, seconds, distinct)


def _step_of(
    model: SequenceModel, objective: Objective, samples: list[Sample], precision: Precision, run_step: bool
) -> tuple[int, float | None]:
    """Bytes that the second of two rows adds, and seconds of one; no time where no step was run."""
    per_row = None if run_step else bytes_without_computing(model, objective, samples, precision)
    seconds, device = None, next(model.parameters()).device
    if per_row is None:
        samples = [sample.to(device) for sample in samples]
        per_row = bytes_per_row(model, objective, samples, precision)
        began = time.perf_counter()
        training_step(model, objective, samples[1], precision).backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - began) / 2
    return per_row, seconds


def _costliest(
    dataset: Dataset, rows: npt.NDArray[np.int64], objective: Objective, config: TrainConfig
) -> tuple[npt.NDArray[np.int64], float]:
    """Two rows that take most, and what the fullest of some batches takes of its rows one by one."""
    if dataset.donors is None:
        longest = rows[0] if dataset.lengths is None else rows[np.argmax(dataset.lengths[rows])]
        return np.repeat(longest, 2), 1.0
    found = np.sort(dataset.donors.haplotypes_of(rows), axis=1)
    own = 1 + (np.diff(found, axis=1) > 0).sum(1) - (found[:, 0] < 0)
    first = int(own.argmax())
    second = int((own - np.isin(found, found[first][found[first] >= 0]).sum(1)).argmax())
    batches = objective.batches(rows, config.batch_size, config.seed, 0)[:_BATCHES]
    fullest = max(len(dataset.stored(batch)) / len(batch) for batch in batches)
    return rows[[first, second]], fullest / float(own[first])


def _describe_precision(precision: str, wanted: str) -> str:
    if wanted != "auto":
        return f"{precision}, as asked for"
    has = "has bf16" if has_bf16() else "does not compute in bf16"
    return f"{precision} (auto: this machine {has}; it pays in trunks of more than {BF16_PARAMETERS:,} parameters)"


def _describe_cost(experiment: Experiment, dataset: Dataset, cost: Cost, memory: int | None) -> dict[str, str]:
    config = experiment.train
    duration = "not measured: no step was run here, its memory was counted from shapes alone"
    if cost.seconds_per_row is not None:
        epoch = (len(dataset.rows("train")) + len(dataset.rows("valid")) / 3) * cost.seconds_per_row
        most = f"at most {_duration(epoch * config.epochs)} for {config.epochs} epoch{'s' * (config.epochs != 1)}"
        duration = f"about {_duration(epoch)} per epoch on this machine, {most}"
    facts = {
        "memory": f"{size_in_words(cost.peak_bytes(config.batch_size))} for batches of {config.batch_size} "
        f"(weights and optimiser {size_in_words(cost.fixed_bytes)}, "
        f"activations {size_in_words(cost.bytes_per_row)} per region)",
        "time": duration,
    }
    if memory is not None:
        facts["device"] = (
            f"a card of {size_in_words(memory)} takes batches of up to {cost.largest_batch(memory)} "
            "(a fifth kept free); time there was not measured"
        )
    return facts


def _describe_cache(experiment: Experiment, dataset: Dataset, model: SequenceModel, cost: Cost) -> str:
    """What ``train.cache`` will do; where it is off, what it could."""
    config, rows, valid = experiment.train, dataset.rows("train"), dataset.rows("valid")
    if isinstance(model, MaskedModel):
        return cache_choice(model, dataset, config, rows, valid).in_words
    if cost.seconds_per_row is None:  # sizing it runs the trunk too
        return f"{config.cache}; what it would keep was not measured: no step was run here"
    if config.cache != "off":
        choice = cache_choice(model, dataset, config, rows, valid)
        return choice.in_words + _gain(choice, cost, len(rows), len(valid))
    possible = cache_choice(model, dataset, replace(config, cache="float16", cache_gb=1e9), rows, valid)
    if not possible.used:
        return f"off, and there is nothing to keep: {possible.reason}"
    return f"off; train.cache could keep {possible.in_words}{_gain(possible, cost, len(rows), len(valid))}"


def _gain(choice: Choice, cost: Cost, rows: int, valid: int) -> str:
    """How much shorter an epoch is when all of its views are kept; a validation row takes a third of a training row."""
    if not choice.used or cost.seconds_per_row is None:
        return ""
    before = (rows + valid / 3) * cost.seconds_per_row
    kept = choice.seconds * cost.distinct
    after = before - rows * kept - valid * min(kept, cost.seconds_per_row / 3)
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
                f"the disk has {size_in_words(free)} left and the run needs",
                size_in_words(needed),
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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
