"""Epochs with and without the frozen-prefix cache.

They train the same model on the same regions, one after the other in one process on one thread; the numbers are ratios
of process CPU time, so that other load on the machine matters little. An epoch counts with all that belongs to it:
reading, steps, validation, checkpoint; a step is from one batch to the next. The trunk has the size of yeast-mini.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from seqgraft.adapters import Adapter, LinearProbe, LoRA, adapt
from seqgraft.cache import CacheMode
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset, DatasetInfo, open_dataset, write_dataset
from seqgraft.genome import Genome
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.objectives import Elementwise
from seqgraft.sample import Sample
from seqgraft.sequence import decode
from seqgraft.tracks import TrackTable
from seqgraft.train import TrainConfig, fit

TRACKS = 4
YEAST_MINI = ModelConfig(settings={"channels": 96, "depth": 4, "blocks": 2})
CASES: dict[str, Adapter] = {"linear probe": LinearProbe(), "LoRA attention": LoRA(rank=8, where=("attention",))}


def run(
    model: ModelConfig = YEAST_MINI,
    window: int = 4096,
    bins: int = 192,
    bin_size: int = 16,
    regions: int = 32,
    epochs: int = 5,
    batch_size: int = 4,
) -> Iterator[str]:
    """One line per result."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SEQGRAFT_CACHE"] = str(folder / "cache")
        dataset = _dataset(folder / "data", regions, max(1, regions // 8), window, bins, bin_size)
        forward = Augmentation(reverse_complement=False)
        config = TrainConfig(epochs=epochs, batch_size=batch_size, patience=0, augment=forward)
        yield f"{regions} training regions of {window} bp, {epochs} epochs, one view, one thread; {model}"
        for label, adapter in CASES.items():
            yield from _compare(dataset, folder, label, adapter, config, model)


class _Marking(Elementwise):
    """Notes when each epoch begins, and when each batch of it has been read."""

    def __init__(self, tracks: TrackTable) -> None:
        super().__init__(tracks)
        self.epochs: list[list[float]] = []

    def batches(self, rows: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
        self.epochs.append([time.process_time()])
        self.steps = -(-len(rows) // size)
        return super().batches(rows, size, seed, epoch)

    def weigh(self, sample: Sample) -> Tensor:
        self.epochs[-1].append(time.process_time())
        return super().weigh(sample)

    def results(self) -> tuple[list[float], list[float]]:
        """Seconds of each epoch, and of the median step of each: from one batch that has been read to the next."""
        marks = [*self.epochs[1:], [time.process_time()]]  # fit counts the batches once before it begins
        steps = [statistics.median(np.diff(epoch[1 : self.steps + 1])) for epoch in marks[:-1]]
        return [after[0] - before[0] for before, after in pairwise(marks)], steps


def _compare(
    dataset: Dataset, folder: Path, label: str, adapter: Adapter, config: TrainConfig, model_config: ModelConfig
) -> Iterator[str]:
    epochs: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {}
    modes: tuple[CacheMode, ...] = ("off", "float32", "float16")
    for mode in modes:
        model = build_model(model_config, dataset.tracks, dataset.info)
        adapt(model, adapter)
        run_folder = folder / f"{label} {mode}"
        run_folder.mkdir()
        objective = _Marking(dataset.tracks)
        result = fit(model, dataset, objective, replace(config, cache=mode), run_folder)
        epochs[mode], steps[mode] = objective.results()
    whole, step = statistics.median(epochs["off"]), statistics.median(steps["off"])
    for mode in modes[1:]:
        yield (
            f"{label:14s} {mode}: a step from it {step / statistics.median(steps[mode][1:]):6.1f}x, "
            f"an epoch {whole / statistics.median(epochs[mode][1:]):6.1f}x, "
            f"the epoch that fills it {whole / epochs[mode][0]:4.2f}x, "
            f"all {config.epochs} epochs {sum(epochs['off']) / sum(epochs[mode]):4.2f}x"
        )
    yield f"  {result.cache}"


def _dataset(folder: Path, train: int, valid: int, window: int, bins: int, bin_size: int) -> Dataset:
    rng = np.random.default_rng(0)
    regions, target = train + valid, bins * bin_size
    margin = (window - target) // 2
    codes = rng.integers(0, 4, 2 * margin + regions * target, dtype=np.uint8)
    fasta = folder.with_suffix(".fa")
    fasta.write_text(f">chr1\n{decode(codes)}\n")
    starts = margin + target * np.arange(regions)
    with write_dataset(folder, (regions, TRACKS, bins)) as writer:
        writer.targets[:] = rng.gamma(1.0, 4.0, writer.targets.shape)
        writer.finish(
            DatasetInfo("coverage", window, bins, bin_size, {"path": str(fasta), "hash": Genome.open(fasta).hash}),
            pd.DataFrame(
                {
                    "chrom": "chr1",
                    "start": starts,
                    "end": starts + target,
                    "strand": ".",
                    "name": [f"region{i}" for i in range(regions)],
                    "fold": ["train"] * train + ["valid"] * valid,
                }
            ),
            TrackTable.build({"name": f"track{i}", "group": "signal", "link": "softplus"} for i in range(TRACKS)),
        )
    return open_dataset(folder)
