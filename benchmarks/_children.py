"""One network on one side in a process of its own: CPU seconds, and the most memory above what is resident before.

Memory is that of the process (VmHWM less VmRSS before), so what the libraries take beside tensors counts; Linux only.
Every process draws the same weights and the same sequence.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks._peers import SETTINGS, peer_of
from seqgraft.adapters import LoRA, adapt
from seqgraft.models.base import Head, SequenceModel, State, Trunk, one_hot
from seqgraft.models.borzoi import FLASHZOI
from seqgraft.models.folders import TRUNKS
from seqgraft.sample import Sample
from seqgraft.tracks import TrackTable

TRACKS = 16
#: Name -> trunk, settings, bp per bin.
NETWORKS: dict[str, tuple[str, Mapping[str, object], int]] = {
    "borzoi": ("borzoi", SETTINGS["borzoi"], 32),
    "enformer": ("enformer", SETTINGS["enformer"], 128),
    "flashzoi": ("borzoi", {**SETTINGS["borzoi"], **FLASHZOI}, 32),
}


@dataclass(frozen=True)
class Task:
    """A forward pass of the trunk, or one training step (LoRA, stages recomputed) of ours."""

    network: str
    window: int
    precision: Literal["float32", "bf16"]
    what: Literal["forward", "LoRA step"] = "forward"
    settings: Mapping[str, object] | None = None  # instead of those of the full size


@dataclass(frozen=True)
class Result:
    """CPU seconds, bytes above the resident ones, and some of the values for a comparison."""

    seconds: float
    peak: int
    values: npt.NDArray[np.float32]


def in_child(task: Task, side: str) -> Result:
    """``side``: "ours" or "peer"."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, task, side).result()


def measure(task: Task, side: str) -> Result:
    torch.set_num_threads(1)
    run = prepared(task, side)
    before = _fresh_peak()
    began = time.process_time()
    values = run()
    seconds = time.process_time() - began
    return Result(seconds, _status("VmHWM") - before, values)


def prepared(task: Task, side: str) -> Callable[[], npt.NDArray[np.float32]]:
    """What is measured, with weights and input in memory; it returns some of the values."""
    kind, settings, bin_size = NETWORKS[task.network]
    torch.manual_seed(0)
    trunk = TRUNKS[kind].build(settings if task.settings is None else task.settings, bin_size=bin_size, crop=0)
    _settle(trunk)
    codes = torch.randint(0, 4, (1, task.window), dtype=torch.uint8)
    if task.what == "LoRA step":
        return _training_step(trunk, codes, task.precision)
    model: Any = trunk.eval() if side == "ours" else peer_of(task.network, trunk)
    x = one_hot(codes)

    def forward() -> npt.NDArray[np.float32]:
        with torch.inference_mode(), _autocast(task.precision):
            found: Tensor = model.run(State(x)).x if side == "ours" else model.features(x)
        return np.asarray(found[0, ::31, ::7].float())

    return forward


def _training_step(trunk: Trunk, codes: Tensor, precision: str) -> Callable[[], npt.NDArray[np.float32]]:
    tracks = TrackTable.build({"name": f"track{i}", "group": "signal", "link": "softplus"} for i in range(TRACKS))
    model = SequenceModel(trunk, {"new": Head(tracks, trunk.spec.channels)}, tracks)
    adapt(model, LoRA(rank=8, where=("attention.query", "attention.value")))
    trunk.checkpointing = True
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    empty = torch.zeros(1, TRACKS, 1)
    sample = Sample(codes, torch.tensor([codes.shape[1]]), torch.zeros(1, dtype=torch.int64), empty, empty > 0)
    model.train()

    def step() -> npt.NDArray[np.float32]:
        with _autocast(precision):
            rate = model.link(model(sample))
        loss = nn.functional.poisson_nll_loss(rate, torch.ones_like(rate), log_input=False)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return np.array([loss.item()], dtype=np.float32)

    return step


@torch.no_grad()
def _settle(trunk: Trunk) -> None:
    """Statistics of BatchNorm that a mistake in the weights' order would show."""
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm1d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


def _autocast(precision: str) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def _fresh_peak() -> int:
    """Gives back what the allocator kept, starts the peak anew and returns the resident bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
