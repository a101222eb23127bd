"""Training with the frozen-prefix cache, beside the same without it and beside the other packages.

All train one network on the same regions in one process on one thread; the numbers are process CPU seconds, so that
other load on the machine matters little. An epoch counts with all that belongs to it: reading, steps, validation,
checkpoint; a step is from one batch to the next; the sum over the epochs has also what comes before the first: hashes,
profile, folders. A peer trains between our epochs, one epoch at a time, with everything it reads already in memory.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from benchmarks._peers import SETTINGS, PeerTraining, peer_of
from seqgraft.adapters import Adapter, LinearProbe, LoRA, adapt
from seqgraft.cache import CacheMode
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset, DatasetInfo, open_dataset, write_dataset
from seqgraft.genome import Genome
from seqgraft.models.base import SequenceModel, one_hot
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.objectives import Elementwise
from seqgraft.sample import Sample
from seqgraft.sequence import decode
from seqgraft.tracks import TrackTable
from seqgraft.train import TrainConfig, fit

TRACKS = 16
ADAPTERS: dict[str, Adapter] = {
    "linear probe": LinearProbe(),
    "LoRA r=8, q+v": LoRA(rank=8, where=("attention.query", "attention.value")),
}


@dataclass(frozen=True)
class Case:
    """What is trained: random weights, one validation region for every eight that train, at least one."""

    method: str
    model: ModelConfig
    window: int
    bins: int
    bin_size: int
    regions: int
    epochs: int
    batch_size: int = 1
    peer: str = ""
    peer_epochs: int = 1000  # that the peer trains for at most: its steps are all alike
    modes: tuple[CacheMode, ...] = ("off", "float16")


YEAST_MINI = ModelConfig(settings={"channels": 96, "depth": 4, "blocks": 2})
BORZOI = ModelConfig("borzoi", settings=SETTINGS["borzoi"])
ENFORMER = ModelConfig("enformer", settings=SETTINGS["enformer"])
PROBE, LORA = ADAPTERS
CASES = {
    "yeast-mini-probe": Case(PROBE, YEAST_MINI, 4096, 192, 16, 32, 5, 4),
    "yeast-mini-lora": Case(LORA, YEAST_MINI, 4096, 192, 16, 32, 5, 4),
    "borzoi-probe": Case(PROBE, BORZOI, 65536, 2048, 32, 4, 20, peer="borzoi", peer_epochs=2, modes=("float16",)),
    "borzoi-lora": Case(LORA, BORZOI, 65536, 2048, 32, 2, 10, peer="borzoi", modes=("float16",)),
    "enformer-probe": Case(PROBE, ENFORMER, 32768, 256, 128, 4, 20, peer="enformer", peer_epochs=2, modes=("float16",)),
    "enformer-lora": Case(LORA, ENFORMER, 32768, 256, 128, 2, 10, peer="enformer", modes=("float16",)),
}


def run(cases: Iterable[Case] = CASES.values()) -> Iterator[str]:
    """Some lines per case."""
    torch.set_num_threads(1)
    for case in cases:
        yield (
            f"{case.method}: {case.regions} training regions of {case.window} bp, {case.epochs} epochs; "
            f"{case.model.name} {dict(case.model.settings)}"
        )
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["SEQGRAFT_CACHE"] = str(folder / "cache")
            yield from _compare(_dataset(folder / "data", case), folder, case)


class _Marking(Elementwise):
    """Notes when each epoch begins, and when each batch of it has been read; runs ``between`` before each epoch."""

    def __init__(self, tracks: TrackTable, between: Callable[[], None]) -> None:
        super().__init__(tracks)
        self._between, self._asked = between, False
        self.epochs: list[list[float]] = []
        self.outside = 0.0

    def batches(self, rows: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
        if self._asked:  # fit counts the batches once before it begins
            self.epochs.append([time.process_time()])  # the end of the epoch before
            self._between()
            self.outside += time.process_time() - self.epochs[-1][0]
            self.epochs[-1].append(time.process_time())
        self._asked, self._steps = True, -(-len(rows) // size)
        return super().batches(rows, size, seed, epoch)

    def weigh(self, sample: Sample) -> Tensor:
        self.epochs[-1].append(time.process_time())
        return super().weigh(sample)

    def results(self) -> tuple[list[float], list[float]]:
        """Seconds of each epoch, and of the median step of each: from one batch that has been read to the next."""
        ends = [*(epoch[0] for epoch in self.epochs[1:]), time.process_time()]
        steps = [statistics.median(np.diff(epoch[2 : self._steps + 2])) for epoch in self.epochs]
        return [end - epoch[1] for epoch, end in zip(self.epochs, ends, strict=True)], steps


@dataclass(frozen=True)
class _Times:
    step: float
    epoch: float
    first: float
    total: float
    cache: str = ""


def _compare(dataset: Dataset, folder: Path, case: Case) -> Iterator[str]:
    times: dict[str, _Times] = {}
    for mode in case.modes:
        model = build_model(case.model, dataset.tracks, dataset.info)
        peer = _peer(case, model, dataset) if case.peer else None
        times[mode] = _train(dataset, folder / mode, model, case, mode, peer)
        if peer:
            middle, epoch = statistics.median(peer.steps), statistics.median(peer.epochs)
            times[case.peer] = _Times(middle, epoch, peer.epochs[0], sum(peer.epochs) * case.epochs / len(peer.epochs))
    for name, found in times.items():
        yield (
            f"  {name:9s} CPU ms a step {1e3 * found.step:9.2f}, CPU s an epoch {found.epoch:7.3f}, "
            f"the first {found.first:7.2f}, all {case.epochs} and what is before {found.total:7.2f}"
        )
    for name, other in times.items():
        if name in ("off", case.peer):
            for mode in case.modes:
                if mode != "off":
                    ours = times[mode]
                    yield (
                        f"  {mode} against {name}: a step {other.step / ours.step:7.2f}x, an epoch "
                        f"{other.epoch / ours.epoch:7.2f}x, all {case.epochs} {other.total / ours.total:5.2f}x"
                    )
    yield f"  {ours.cache}"


def _train(
    dataset: Dataset,
    folder: Path,
    model: SequenceModel,
    case: Case,
    mode: CacheMode,
    peer: PeerTraining | None,
) -> _Times:
    adapt(model, ADAPTERS[case.method])
    folder.mkdir()
    forward = Augmentation(reverse_complement=False)
    config = TrainConfig(
        epochs=case.epochs, batch_size=case.batch_size, patience=0, augment=forward, precision="float32", cache=mode
    )

    def between() -> None:
        if peer and len(peer.epochs) < case.peer_epochs:
            peer.epoch()

    objective = _Marking(dataset.tracks, between)
    began = time.process_time()
    result = fit(model, dataset, objective, config, folder)
    total = time.process_time() - began - objective.outside
    epochs, steps = objective.results()
    return _Times(statistics.median(steps[1:]), statistics.median(epochs[1:]), epochs[0], total, result.cache)


def _peer(case: Case, model: SequenceModel, dataset: Dataset) -> PeerTraining:
    """The peer on our weights, which answers as our trunk does; and its data."""

    def pairs(fold: str) -> list[tuple[Tensor, Tensor]]:
        samples = [dataset.sample([row]) for row in dataset.rows(fold)]
        return [(one_hot(sample.codes), sample.targets) for sample in samples]

    peer = peer_of(case.peer, model.trunk, TRACKS)
    train = pairs("train")
    with torch.no_grad():
        expected, found = peer.features(train[0][0]), model.trunk.eval()(dataset.sample([0]).codes).x
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference < 1e-4, difference
    return PeerTraining(peer, case.method == LORA, train, pairs("valid"))


def _dataset(folder: Path, case: Case) -> Dataset:
    rng = np.random.default_rng(0)
    train, valid = case.regions, max(1, case.regions // 8)
    regions, target = train + valid, case.bins * case.bin_size
    margin = (case.window - target) // 2
    codes = rng.integers(0, 4, 2 * margin + regions * target, dtype=np.uint8)
    fasta = folder.with_suffix(".fa")
    fasta.write_text(f">chr1\n{decode(codes)}\n")
    starts = margin + target * np.arange(regions)
    with write_dataset(folder, (regions, TRACKS, case.bins)) as writer:
        writer.targets[:] = rng.gamma(1.0, 4.0, writer.targets.shape)
        writer.finish(
            DatasetInfo(
                "coverage",
                case.window,
                case.bins,
                case.bin_size,
                {"path": str(fasta), "hash": Genome.open(fasta).hash},
            ),
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
