"""The frozen stem and tower of an Enformer on the haplotypes of 300 donors: every one, each distinct one, and tiles.

The trunk has random weights and a sixteenth of the published width (the bases that reach a bin are the published ones),
and LoRA on its attention: stem and tower are frozen. Timed is what they make of all haplotypes of a window, from base
codes in memory to the state before the transformer in memory, and then the stages after them, which no tile can save.
With tiles this is counted: naming them (``index``), running the trunk on those that are new, writing and flushing them,
and putting the state of each distinct haplotype together from the store. Every haplotype costs what a distinct one
costs, whose time is multiplied; so is the time of the later stages, measured on some. The numbers are CPU seconds of
the process on one thread. States of all distinct haplotypes, and answers, are compared before anything is printed.

"human" needs the folder of real data (``SEQGRAFT_SHARED``).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from benchmarks.haplotypes import _HUMAN, _copied, _simulated
from benchmarks.haplotypes import Case as Cohort
from seqgraft.adapters import LoRA, adapt
from seqgraft.cache import ActivationCache, CacheSettings, choose
from seqgraft.cache_tiles import index_tiles
from seqgraft.data import prepare_source
from seqgraft.data.augment import FORWARD, Augmentation
from seqgraft.data.calls import read_genotypes
from seqgraft.data.dataset import Dataset
from seqgraft.data.expression import Expression
from seqgraft.data.folds import Folds
from seqgraft.data.personal import GeneTable, PersonalSource
from seqgraft.genome import Genome
from seqgraft.models.base import Head, SequenceModel, State
from seqgraft.models.enformer import Enformer
from seqgraft.sample import Sample

CENTRE = 10  # bins that the head reads
LATER = 40  # haplotypes of a gene that go through the later stages
BATCH = 2  # windows: larger ones leave the processor's caches


@dataclass(frozen=True)
class Case:
    """``genes`` anchors spread over the variants; ``cohort``: whose, and the window."""

    cohort: Cohort
    genes: int
    settings: Mapping[str, Any]


ENFORMER = {"channels": 96, "depth": 11, "heads": 4, "key_size": 16, "divisible_by": 8}
TOY = {"channels": 48, "depth": 1, "heads": 2, "key_size": 4, "divisible_by": 4, "bin_size": 16}
CASES = {
    "human": Case(Cohort(49_152), 3, ENFORMER),
    "toy": Case(Cohort(4096, human=False, donors=24, span=20_000), 2, TOY),
}


def run(cases: Sequence[Case] = (CASES["human"],)) -> Iterator[str]:
    """Some lines per case."""
    torch.set_num_threads(1)
    for case in cases:
        shared = Path(os.environ.get("SEQGRAFT_SHARED", "../shared"))
        if case.cohort.human and not (shared / _HUMAN).is_dir():
            yield f"human: left out, there is no {shared / _HUMAN}; set SEQGRAFT_SHARED"
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["SEQGRAFT_CACHE"] = str(folder / "cache")
            files = _copied(shared / _HUMAN, folder) if case.cohort.human else _simulated(case.cohort, folder)
            yield from _compare(_dataset(case, *files, folder), case)


class _Clock:
    """CPU seconds by name, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.process_time()

    def begin(self) -> None:
        self._began = time.process_time()

    def note(self, name: str) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - self._began
        self._began = time.process_time()


def _compare(dataset: Dataset, case: Case) -> Iterator[str]:
    assert dataset.donors is not None
    torch.manual_seed(0)
    trunk = Enformer(**case.settings, crop=(case.cohort.length // case.settings.get("bin_size", 128) - CENTRE) // 2)
    head = Head(dataset.tracks, trunk.spec.channels, "mean")
    model = SequenceModel(trunk, {"expression": head}, dataset.tracks)
    adapt(model, LoRA(rank=8, where=("attention",)))
    model.eval()
    forward, clock = Augmentation(reverse_complement=False), _Clock()
    settings = CacheSettings("float32", 1000.0, 2, "float32", forward)
    choice = choose(model, dataset, dataset.rows("train"), dataset.rows("valid"), settings)
    assert choice.tiling is not None, "the tiles save less than half"
    clock.begin()
    index_tiles(choice.tiling, dataset, [FORWARD])
    clock.note("index")
    cache = ActivationCache.open(model, dataset, choice, "float32", forward)
    haplotypes = distinct = later = 0
    differences = []
    for gene in range(len(dataset.donors.genes)):
        sample = dataset.sample(np.flatnonzero(dataset.donors.gene == gene))
        differences += _measure(model, cache, sample, str(choice.cut), clock)
        assert sample.haplotypes is not None
        haplotypes, distinct = haplotypes + int((sample.haplotypes >= 0).sum()), distinct + len(sample.codes)
        later += min(LATER, len(sample.codes))
    assert cache.filled == choice.tiles, (cache.filled, choice.tiles)
    if max(differences) > 1e-6:
        raise SystemExit(f"Tiles give other states ({max(differences):.1e}); the times mean nothing.")
    yield from _lines(case, choice.in_words, haplotypes, distinct, choice.whole / distinct * haplotypes / choice.size)
    seconds = clock.seconds
    once, then, more = seconds["distinct"], seconds["later"] / later * distinct, haplotypes / distinct
    tiles, read = seconds["index"] + seconds["first"], seconds["read"]
    yield (
        f"  stem and tower, CPU s: every haplotype {more * once:.1f}, distinct {once:.1f}, tiles {tiles:.2f} (index "
        f"{seconds['index']:.2f}, new tiles {seconds['first'] - read:.2f}, put together {read:.2f}); every / tiles "
        f"{more * once / tiles:.1f}x, distinct / tiles {once / tiles:.1f}x; from the second epoch on every / tiles "
        f"{more * once / read:.0f}x"
    )
    yield (
        f"  whole trunk, forward: every haplotype {more * (once + then):.1f} ({more * then:.1f} of it after the "
        f"tower), distinct {once + then:.1f}, tiles {tiles + then:.1f} ({then:.1f}); every / tiles "
        f"{more * (once + then) / (tiles + then):.1f}x, distinct / tiles {(once + then) / (tiles + then):.1f}x"
    )
    yield f"  largest difference of states and answers {max(differences):.1e}"


def _lines(case: Case, words: str, haplotypes: int, distinct: int, times: float) -> Iterator[str]:
    name = "human" if case.cohort.human else "simulated"
    yield (
        f"{name}, {case.cohort.donors} donors, {case.genes} windows of {case.cohort.length:,} bp, {distinct:,} of "
        f"{haplotypes:,} haplotypes distinct; Enformer {dict(case.settings)}"
    )
    yield f"  {words.partition(' GB;')[0]} GB; {times:.0f} times less than of every haplotype"


@torch.no_grad()
def _measure(model: SequenceModel, cache: ActivationCache, sample: Sample, cut: str, clock: _Clock) -> list[float]:
    """Both ways for the donors of one gene; differences of the tiles' states and of the answers."""
    clock.begin()
    exact = _prefix(model, sample.codes, cut)
    clock.note("distinct")
    cache.attach(sample)
    clock.note("first")
    state = cache.attach(sample).halfway.state
    clock.note("read")
    features = [model.trunk.run(State(part), start=cut).x for part in torch.split(state.x[:LATER], BATCH)]
    clock.note("later")
    few = Sample(sample.codes[:BATCH], sample.lengths[:BATCH], sample.row, sample.targets, sample.mask)
    answers = model.read(State(features[0]), few)
    return [float((state.x - exact).abs().max()), float((answers - model(few)).abs().max())]


def _prefix(model: SequenceModel, codes: Tensor, cut: str) -> Tensor:
    return torch.cat([model.trunk.run(model.trunk.encode(part), stop=cut).x for part in torch.split(codes, BATCH)])


def _dataset(case: Case, fasta: Path, vcf: Path, folder: Path) -> Dataset:
    """All donors, with expression that means nothing."""
    rng = np.random.default_rng(0)
    genome = Genome.open(fasta)
    chrom, donors = next(iter(genome.chroms)), read_genotypes(vcf, genome).donors
    room = case.cohort.length // 2 + 2000
    names = [f"gene{number}" for number in range(case.genes)]
    starts: npt.NDArray[np.int64] = np.linspace(room, genome.chroms[chrom] - room, case.genes).astype(np.int64)
    values = pd.DataFrame(rng.normal(size=(case.genes, len(donors))), names, donors).rename_axis("gene")
    values.to_csv(folder / "expression.tsv", sep="\t")
    table = pd.DataFrame({"gene": names, "chrom": chrom, "tss": starts + 1, "strand": "+"})
    table.to_csv(folder / "genes.tsv", sep="\t", index=False)
    source = PersonalSource(
        genome=fasta,
        vcf=vcf,
        expression=Expression(folder / "expression.tsv"),
        genes=GeneTable(folder / "genes.tsv"),
        window=case.cohort.length,
        donor_folds=Folds(by="random", valid=0.2, test=0.0),
    )
    return prepare_source(source, folder / "data")
