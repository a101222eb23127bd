"""Sweeps: one experiment over grids of its keys and over seeds, each method tuned with the same budget.

::

    runs/sweep/
      sweep.yaml           what was asked for
      cells/NAME-HASH/     one run directory per cell, with cell.json; HASH is of settings, data and pretrained weights
      baselines/           predictions of the baselines, one file per data set, fold and settings
      results, summary, tests   .parquet and .csv
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqgraft.cells import Job, is_done, on_ray, read_cell, run_cell, run_in_processes
from seqgraft.data.dataset import Dataset, open_dataset
from seqgraft.errors import ConfigError, RunError, SeqgraftError
from seqgraft.evaluate import fold_baselines
from seqgraft.experiment import Experiment, settings_of, write_yaml
from seqgraft.grids import Method, SweepConfig, canonical, methods_of, proposals
from seqgraft.losses import MaskedTokens
from seqgraft.models.weights import is_random, pretrained_of
from seqgraft.plan import plan_run
from seqgraft.progress import progress
from seqgraft.results import Entry, Tables, make_tables, method_of
from seqgraft.run import label_of

__all__ = ["SweepPlan", "Swept", "plan_sweep", "run_sweep"]


class _Sweep:
    """A configuration with its folder: what its cells are called, and where they lie."""

    def __init__(self, config: SweepConfig, folder: Path) -> None:
        self.config, self.folder = config, Path(folder)
        self.methods = methods_of(config)
        self._datasets: dict[Path, Dataset] = {}
        self._weights: dict[str, str] = {}

    def dataset(self, experiment: Experiment) -> Dataset:
        if experiment.data not in self._datasets:
            self._datasets[experiment.data] = open_dataset(experiment.data)
        return self._datasets[experiment.data]

    def weights(self, experiment: Experiment) -> str:
        """Hash of the pretrained weights: a model folder may be made again under its name. Empty if there are none."""
        key = canonical(experiment.model)
        if key not in self._weights:
            try:
                found = pretrained_of(experiment.model)
            except SeqgraftError:  # its cells fail by it, each with this message, and the others are run
                found = None
            self._weights[key] = "" if found is None else str(found.content["weights_sha256"])
        return self._weights[key]

    def job(self, experiment: Experiment, *, tested: bool) -> Job:
        """How a cell is scored does not change its name, so that it may be scored again."""
        settings = {k: v for k, v in settings_of(experiment).items() if k not in ("data", "evaluate")}
        made_of = [settings, self.dataset(experiment).hash, self.weights(experiment)]
        if experiment.joint is not None:
            made_of.append(open_dataset(experiment.joint.data).hash)
        text = json.dumps(made_of, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        label = re.sub(r"[^a-z0-9]+", "-", label_of(experiment).lower()).strip("-")[:40]
        name = f"{label}-s{experiment.train.seed}-{digest}"
        return Job(self.folder / "cells" / name, experiment, tested)

    def jobs(self, method: Method, *, tested: bool = True) -> list[Job]:
        return [self.job(method.experiment(seed), tested=tested) for seed in self.config.seeds]

    def trial(self, method: Method) -> Job:
        return self.job(method.experiment(self.config.seeds[0]), tested=False)

    # ---- baselines, once per data set ----

    def with_baselines(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs with the file of their baselines, which is written where it is not there yet."""
        return [replace(job, baselines=self.baselines(job.experiment)) for job in jobs]

    def baselines(self, experiment: Experiment) -> Path | None:
        """The file; None where a run has baselines of another kind, and makes them itself."""
        dataset, config = self.dataset(experiment), experiment.evaluate
        if isinstance(experiment.loss, MaskedTokens) or dataset.donors is not None:
            return None
        named = {name: settings_of(getattr(config, name)) for name in ("fold", "ensemble", "baselines", "kmers")}
        if dataset.info.bins > 1 or "random_trunk" in (config.baselines or ()):  # then they are made with the model
            named["model"] = settings_of(experiment.model)
        text = json.dumps([named, dataset.hash], sort_keys=True, default=str)
        path = self.folder / "baselines" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.npz"
        if not path.exists():
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            found = fold_baselines(dataset, config, experiment.model, config.fold, device)
            path.parent.mkdir(parents=True, exist_ok=True)
            building = path.with_name(f".{path.stem}.part.npz")
            np.savez(building, **found)  # type: ignore[arg-type]
            os.replace(building, path)
        return path


# ---- running ----


@dataclass(frozen=True)
class Swept:
    """What a sweep left: its tables, and how many cells were run now, were there before, and failed."""

    tables: Tables
    ran: int
    found: int
    failed: int


def run_sweep(
    config: SweepConfig,
    folder: Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Swept:
    """Runs the cells that are not done yet, then writes the tables.

    Args:
        workers: cells at a time; from 2 on each in a process of its own.
        ray: address of a Ray cluster to run them on instead.
        tell: is told of every cell that ends.

    Raises:
        ConfigError: the sweep, or an experiment in it, is wrong; ray or Optuna is not there.
        RunError: the folder cannot be written, or the sweep was interrupted.
    """
    if workers < 1:
        raise ConfigError("must be 1 or more", workers, where="--workers")
    sweep = _Sweep(config, folder)
    _write(sweep.folder, config)
    runner = _Runner(sweep.folder, workers, ray, tell)
    try:
        entries = _run_all(sweep, runner)
    except KeyboardInterrupt as error:
        remedy = "Run the same command again: it goes on where it stopped"
        raise RunError("the sweep was interrupted", str(folder), remedy=remedy) from error
    files = {entry.dataset: sweep.baselines(entry.experiment) for entry in reversed(entries) if entry.role != "trial"}
    sets = {name: path for name, path in files.items() if path is not None}
    tables = make_tables(entries, sets, config.draws)
    tables.save(sweep.folder)
    return Swept(tables, len(runner.ran), len(runner.found - runner.ran), runner.failed)


def _run_all(sweep: _Sweep, runner: _Runner) -> list[Entry]:
    """All cells in their order: trials of each method, the chosen settings with every seed, the controls."""
    trials: list[Job] = []
    methods = sweep.methods
    if sweep.config.search is not None:
        methods, trials = _tuned(sweep, runner)
    tested = [job for method in methods for job in sweep.jobs(method)]
    runner(sweep.with_baselines(tested), "cells")
    controls = (
        [job for method in _controls(sweep, methods) for job in sweep.jobs(method)] if sweep.config.controls else []
    )
    runner(sweep.with_baselines(controls), "controls")
    known = {job.folder for job in tested}
    roles = [("run", job) for job in tested] + [("control", job) for job in controls]
    roles += [("trial", job) for job in {job.folder: job for job in trials}.values() if job.folder not in known]
    return _entries(roles)


def _tuned(sweep: _Sweep, runner: _Runner) -> tuple[list[Method], list[Job]]:
    """The setting of each method with the best validation score, and all trials; a method that never ended has none."""
    search = sweep.config.search
    assert search is not None
    asking, jobs = proposals(search, sweep.methods), list[Job]()
    best: dict[int, tuple[float, Method]] = {}
    rounds = search.trials if search.strategy == "tpe" else 1
    scores: dict[int, float | None] = dict.fromkeys(range(len(asking)))
    for number in range(rounds):
        asked = {
            which: [proposal.send(scores[which])] if rounds > 1 else list(proposal)
            for which, proposal in enumerate(asking)
        }
        now = {which: [(method, sweep.trial(method)) for method in tried] for which, tried in asked.items()}
        jobs += [job for pairs in now.values() for _, job in pairs]
        runner([job for pairs in now.values() for _, job in pairs], f"trials, round {number + 1} of {rounds}")
        for which, pairs in now.items():
            for method, job in pairs:
                score = _validation_score(job)
                scores[which] = score
                if np.isfinite(score) and (which not in best or score > best[which][0]):
                    best[which] = score, method
    return [best[which][1] for which in sorted(best)], jobs


def _validation_score(job: Job) -> float:
    if read_cell(job.folder)["status"] != "done":
        return float("nan")
    environment = json.loads((job.folder / "environment.json").read_text(encoding="utf-8"))
    return float(environment["result"]["best_score"])


def _controls(sweep: _Sweep, methods: Sequence[Method]) -> list[Method]:
    """Of each data set and model with weights, its best setting by validation, on random weights."""
    best: dict[str, tuple[float, Method]] = {}
    for method in methods:
        experiment = method.experiment(sweep.config.seeds[0])
        if is_random(experiment.model):
            continue
        found = [score for job in sweep.jobs(method) if np.isfinite(score := _validation_score(job))]
        place = f"{experiment.data} {canonical(experiment.model)}"
        if found and (place not in best or np.mean(found) > best[place][0]):
            best[place] = float(np.mean(found)), method.with_settings({"model.init": "random"})
    return [method for _, method in best.values()]


class _Runner:
    """Runs jobs that are not done, here, in processes or on a cluster, and counts them."""

    def __init__(self, folder: Path, workers: int, ray: str | None, tell: Callable[[str], None]) -> None:
        self._folder, self._workers, self._ray, self._tell = folder, workers, ray, tell
        self.ran: set[Path] = set()
        self.found: set[Path] = set()
        self.failed = 0

    def __call__(self, jobs: Sequence[Job], what: str) -> None:
        unique = list({job.folder: job for job in jobs}.values())
        waiting = [job for job in unique if not is_done(job)]
        self.found |= {job.folder for job in unique} - {job.folder for job in waiting}
        apart = self._workers > 1 or self._ray is not None  # else the bars of the cells themselves are seen
        ended = progress(self._run(waiting), what, len(waiting)) if apart else self._run(waiting)
        for number, job in enumerate(ended, 1):
            self.ran.add(job.folder)
            found = read_cell(job.folder)
            self.failed += found["status"] != "done"
            outcome = f"failed: {found['message']}" if found["status"] != "done" else "done"
            self._tell(f"{what}: {number} of {len(waiting)}, {job.folder.name}: {outcome}")

    def _run(self, jobs: Sequence[Job]) -> Iterator[Job]:
        if not jobs:
            return
        if self._ray is not None:
            yield from on_ray([_absolute(job) for job in jobs], self._ray)
        elif self._workers > 1:
            yield from run_in_processes(jobs, self._workers)
        else:
            for job in jobs:
                run_cell(job)
                yield job


def _absolute(job: Job) -> Job:
    """The job for a process in another folder."""
    baselines = None if job.baselines is None else job.baselines.resolve()
    experiment = replace(job.experiment, data=job.experiment.data.resolve())
    return replace(job, folder=job.folder.resolve(), experiment=experiment, baselines=baselines)


def _write(folder: Path, config: SweepConfig) -> None:
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        write_yaml(folder / "sweep.yaml", settings_of(config))
    except OSError as error:
        remedy = "Choose a folder that you can write to"
        raise RunError(
            f"the sweep's folder cannot be written ({error.strerror})", str(folder), remedy=remedy
        ) from error


# ---- names in tables ----


def _entries(roles: Sequence[tuple[str, Job]]) -> list[Entry]:
    """Jobs with names: of data sets and models by their folders, and what else varies within a method in words."""
    datasets = _short_names([str(job.experiment.data) for _, job in roles])
    models = _short_names([job.experiment.model.name for _, job in roles])
    flat = [_flat(job.experiment) for _, job in roles]
    groups = [(d, m, method_of(job.experiment)) for d, m, (_, job) in zip(datasets, models, roles, strict=True)]
    values: dict[tuple[Any, str], set[str]] = {}
    for group, settings in zip(groups, flat, strict=True):
        for key, value in settings.items():
            values.setdefault((group, key), set()).add(value)
    entries = []
    for (role, job), group, settings in zip(roles, groups, flat, strict=True):
        varying = [f"{key} {value}" for key, value in settings.items() if len(values[group, key]) > 1]
        entries.append(Entry(job.folder, job.experiment, role, group[0], group[1], ", ".join(varying)))
    return entries


def _short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, or all of it where two would be the same."""
    last = Counter(Path(name).name for name in set(names))
    return [Path(name).name if last[Path(name).name] == 1 else name for name in names]


_OWN_COLUMN = ("data", "model.name", "model.init", "train.seed", "train.lr", "train.batch_size", "train.accumulate")


def _flat(experiment: Experiment) -> dict[str, str]:
    """Dotted key -> value, without those that have a column of their own."""
    found: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif prefix not in _OWN_COLUMN:
            found[prefix] = str(value)

    walk("", settings_of(experiment))
    for sized in ("adapter.rank", "adapter.bottleneck"):  # the rank has a column
        found.pop(sized, None)
    return {key.removeprefix("adapter.").removeprefix("train."): value for key, value in found.items()}


# ---- the plan ----


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would cost; ``problems`` is empty if every cell would start."""

    facts: dict[str, str]
    problems: list[SeqgraftError]


def plan_sweep(config: SweepConfig, folder: Path, workers: int = 1) -> SweepPlan:
    """Counts the cells and measures one step of each kind; nothing is written.

    A search is counted at its full budget, with the grid's own settings standing for those that it will try.
    """
    sweep = _Sweep(config, folder)
    trials = 0 if config.search is None else config.search.trials
    if config.search is not None and config.search.strategy != "tpe":
        proposals(config.search, sweep.methods)
    later = len(config.seeds) if not trials else trials + len(config.seeds) - 1
    seconds, most, unmeasured = 0.0, 0, 0
    problems: list[SeqgraftError] = []
    costs: dict[str, Any] = {}
    for method in sweep.methods:
        experiment = method.experiment(config.seeds[0])
        key = canonical(replace(experiment, train=replace(experiment.train, lr=1.0)))
        found = costs[key] = costs.get(key) or plan_run(experiment)
        problems += [problem for problem in found.problems if str(problem) not in map(str, problems)]
        if found.cost is None:
            continue
        most = max(most, found.cost.peak_bytes(experiment.train.batch_size))
        if found.cost.seconds_per_row is None:
            unmeasured += 1
            continue
        dataset = sweep.dataset(experiment)
        epoch = (len(dataset.rows("train")) + len(dataset.rows("valid")) / 3) * found.cost.seconds_per_row
        seconds += later * epoch * experiment.train.epochs
    methods, cells = len(sweep.methods), len(sweep.methods) * later
    done = sum(is_done(job) for method in sweep.methods for job in sweep.jobs(method)) if not trials else 0
    made = f"{methods} combinations, {len(config.seeds)} seed{'s' * (len(config.seeds) != 1)}"
    tuned = f", {trials} trial{'s' * (trials != 1)} of each ({config.search.strategy})" if config.search else ""
    slow = f"; {unmeasured} combinations were not measured" if unmeasured else ""
    facts = {
        "cells": f"at most {cells} ({made}{tuned})" + (f", {done} of them done" if done else ""),
        "controls": "one more setting with every seed per data set and model" if config.controls else "none",
        "time": f"at most {_duration(seconds / workers)} of training with {workers} at a time, "
        f"each in all its epochs; scoring comes on top{slow}",
        "memory": f"{_size(most)} for the largest cell" + (f", {_size(most * workers)} for {workers}" * (workers > 1)),
    }
    return SweepPlan(facts, problems)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
