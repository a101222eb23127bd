"""The cells of a sweep: each an experiment in a run directory of its own, run here, in processes or on a Ray cluster.

What became of a cell stands in its ``cell.json``; nothing else passes between processes. A cell that is done is not run
again, one that was interrupted goes on from its checkpoint, and one that failed is tried again by the next sweep.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from seqgraft.adapters import merge
from seqgraft.data.dataset import write_json
from seqgraft.errors import ConfigError, ModelError, RunError, SeqgraftError
from seqgraft.experiment import Experiment, settings_of, write_yaml
from seqgraft.plan import plan_run
from seqgraft.run import evaluate_run, fit_run, open_run

__all__ = ["COUNTED", "Job", "is_done", "on_ray", "read_cell", "run_cell", "run_in_processes"]

COUNTED = "torch's counted bytes of a training step"
ON_CARD = "most bytes that torch held on the card"


@dataclass(frozen=True)
class Job:
    """A cell to run.

    Attributes:
        folder: its run directory.
        tested: whether it is scored on the evaluation fold, or fitted only.
        baselines: ``.npz`` of the baselines' predictions for that fold; computed by the cell itself if None.
        threads: of torch; None leaves them as they are.
        alone: whether it has a process of its own, whose peak memory is its own.
    """

    folder: Path
    experiment: Experiment
    tested: bool
    baselines: Path | None = None
    threads: int | None = None
    alone: bool = False


def read_cell(folder: Path) -> dict[str, Any]:
    """What became of a cell: its ``cell.json``, or that it has not begun or not ended."""
    try:
        content = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"status": "interrupted" if folder.exists() else "waiting", "message": ""}
    except (OSError, ValueError) as error:
        return {"status": "failed", "message": f"cell.json cannot be read ({error})"}
    return cast("dict[str, Any]", content)


def is_done(job: Job) -> bool:
    """Whether all that the job asks for is there."""
    found = read_cell(job.folder)
    return found["status"] == "done" and (not job.tested or found.get("evaluated") == _scoring(job))


def run_cell(job: Job) -> None:
    """Fits a cell, scores it if it is tested, and writes ``cell.json``; whatever a user can cause is recorded there."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    record = {name: value for name, value in read_cell(job.folder).items() if name not in ("status", "message")}
    try:
        with _locked(job.folder):
            if not _is_fitted(job.folder):
                record |= _fit(job)
            if job.tested and record.get("evaluated") != _scoring(job):
                record |= _test(job)
    except (SeqgraftError, MemoryError, torch.OutOfMemoryError) as error:
        record_failure(job, str(error) or type(error).__name__, record)
    else:
        write_json(job.folder / "cell.json", {**record, "status": "done", "message": ""})


def record_failure(job: Job, message: str, record: Mapping[str, Any] | None = None) -> None:
    """Writes that a cell failed, and why."""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / "cell.json", {**(record or {}), "status": "failed", "message": message})


def _fit(job: Job) -> dict[str, Any]:
    begun = (job.folder / "experiment.yaml").exists()
    plan = plan_run(job.experiment, None if begun else job.folder)
    if plan.problems:
        raise plan.problems[0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result = fit_run(job.experiment, job.folder, resume=begun)
    counted = None if plan.cost is None else plan.cost.peak_bytes(job.experiment.train.batch_size)
    on_card = torch.cuda.is_available()
    return {
        "seconds": result.seconds,
        "seconds_per_epoch": result.seconds / max(1, result.epochs),
        "memory_bytes": result.peak_memory_bytes if on_card else counted,
        "memory_how": ON_CARD if on_card else COUNTED,
        "process_peak_bytes": _peak_of_process() if job.alone else None,
    }


def _test(job: Job) -> dict[str, Any]:
    """Scores a fitted cell on the fold of its ``evaluate`` section, and compares the merged trunk with the adapted."""
    settings = settings_of(job.experiment)
    written = settings_of(open_run(job.folder).experiment)
    if written["evaluate"] != settings["evaluate"]:  # how a run is scored may change
        write_yaml(job.folder / "experiment.yaml", {**written, "evaluate": settings["evaluate"]})
    baselines = None
    if job.baselines is not None:
        with np.load(job.baselines, allow_pickle=False) as arrays:
            baselines = dict(arrays)
    evaluate_run(job.folder, baselines=baselines)
    model, difference, note = open_run(job.folder).model, None, "cannot be merged"
    if job.experiment.adapter.mergeable:
        try:
            difference, note = merge(model), ""
        except ModelError as error:  # the scores are those of the adapter, and right
            note = str(error)
    return {"evaluated": _scoring(job), "merged_difference": difference, "merged_note": note}


def _scoring(job: Job) -> Any:
    return json.loads(json.dumps(settings_of(job.experiment.evaluate), default=str))


def _is_fitted(folder: Path) -> bool:
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "result" in environment and "seconds" in read_cell(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: a sweep that was killed may have left one that still runs.

    Raises:
        RunError: another process has the cell, or the folder cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        remedy = "Choose a folder that you can write to"
        raise RunError(f"the cell cannot be written ({error.strerror})", str(folder), remedy=remedy) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError("another process runs this cell", str(folder), remedy="Wait until it ends") from error
        yield


def _peak_of_process() -> int | None:
    """Most bytes of memory that this process has held; getrusage would count what its parent held before it began."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.partition(":")[::2] for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


# ---- where cells run ----


def run_in_processes(jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    """Runs every job in a process of its own, ``workers`` at a time, and yields it when it has ended.

    A process that dies takes its own cell with it and no other. What a cell prints goes to ``output.txt``.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    waiting = [replace(job, threads=threads, alone=True) for job in reversed(jobs)]
    running: dict[int, tuple[Any, Job]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                process = context.Process(target=_in_own_process, args=(job,))
                process.start()
                running[process.sentinel] = (process, job)
            for sentinel in wait(list(running)):
                process, job = running.pop(cast("int", sentinel))
                process.join()
                if process.exitcode:
                    record_failure(job, f"{_death(process.exitcode)}; see {job.folder / 'output.txt'}")
                yield job
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _in_own_process(job: Job) -> None:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    building = job.folder.with_name(f".{job.folder.name}.txt")
    with building.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            run_cell(job)
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            if (failure := sys.exc_info()[1]) is not None:
                traceback.print_exception(failure)
            if job.folder.exists():
                os.replace(building, job.folder / "output.txt")


def _death(code: int) -> str:
    if code == -9:
        return "the process of the cell was killed, perhaps for want of memory"
    return (
        f"the process of the cell died by signal {-code}" if code < 0 else f"the process of the cell ended with {code}"
    )


def on_ray(jobs: Sequence[Job], address: str) -> Iterator[Job]:
    """Runs the jobs on a Ray cluster that is there already and sees the same folders; yields each when it has ended.

    Raises:
        ConfigError: ray is not installed, or no cluster is there.
    """
    try:
        import ray
    except ImportError as error:
        remedy = "Install ray in the cluster's version, or use --workers"
        raise ConfigError("ray is not installed", address, where="--ray", remedy=remedy) from error
    try:
        ray.init(address=address, ignore_reinit_error=True)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers ({error})", address, where="--ray") from error
    remote = ray.remote(max_calls=1, max_retries=0)(run_cell)  # one process per cell, as with workers
    pending = {remote.remote(replace(job, alone=True)): job for job in jobs}
    try:
        while pending:
            for reference in ray.wait(list(pending), num_returns=1)[0]:
                job = pending.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    record_failure(job, f"the cell's task died on the cluster: {str(error).splitlines()[0]}")
                yield job
    finally:
        for reference in pending:
            ray.cancel(reference)
