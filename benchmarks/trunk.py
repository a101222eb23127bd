"""Forward passes of whole trunks beside the other packages, and training steps that fit into memory.

The networks have their full size and the same random weights on both sides, and their answers are compared. Numbers
are CPU seconds of one thread. At short windows they are the medians of rounds in one process, every other one in the
opposite order; at full length one pass each. Memory is what a process of its own takes above its resident weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from benchmarks._children import Task, in_child, prepared


@dataclass(frozen=True)
class Case:
    """A task in some precisions; ``rounds`` 0 takes the time of the process whose memory is measured."""

    network: str
    window: int
    what: Literal["forward", "LoRA step"] = "forward"
    rounds: int = 0
    peer: bool = True
    precisions: tuple[Literal["float32", "bf16"], ...] = ("float32", "bf16")
    settings: Mapping[str, object] | None = None


CASES = {
    "borzoi-65k": Case("borzoi", 65_536, rounds=3),
    "enformer-32k": Case("enformer", 32_768, rounds=3),
    "borzoi-524k": Case("borzoi", 524_288),
    "enformer-196k": Case("enformer", 196_608),
    "flashzoi-524k": Case("flashzoi", 524_288, peer=False),
    "borzoi-524k-lora": Case("borzoi", 524_288, "LoRA step", peer=False),
}


def run(cases: Iterable[Case] = CASES.values()) -> Iterator[str]:
    """A line per case and precision."""
    torch.set_num_threads(1)
    for case in cases:
        for precision in case.precisions:
            task = Task(case.network, case.window, precision, case.what, case.settings)
            sides = ("ours", "peer") if case.peer else ("ours",)
            results = {side: in_child(task, side) for side in sides}
            times = _times(task, sides, case.rounds) if case.rounds else {s: r.seconds for s, r in results.items()}
            ours = results["ours"]
            line = (
                f"{case.network:9s} {case.what} {case.window:7d} bp {precision:7s} "
                f"{times['ours']:7.2f} CPU s, {ours.peak / 2**20:6.0f} MiB"
            )
            if case.peer:
                peer = results["peer"]
                scale = float(np.abs(peer.values).max())
                line += (
                    f"; the peer {times['peer']:7.2f} CPU s, {peer.peak / 2**20:6.0f} MiB: "
                    f"{times['peer'] / times['ours']:5.2f}x the time, {peer.peak / ours.peak:5.2f}x the memory, "
                    f"largest difference {float(np.abs(ours.values - peer.values).max()) / scale:.1e}"
                )
            yield line


def _times(task: Task, sides: tuple[str, ...], rounds: int) -> dict[str, float]:
    runs = {side: prepared(task, side) for side in sides}
    found: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 else reversed(sides):
            began = time.process_time()
            runs[side]()
            found[side].append(time.process_time() - began)
    return {side: statistics.median(values) for side, values in found.items()}
