"""Preparing pseudobulk tracks from fragments: CPU seconds and memory, also beside SnapATAC2.

Fragments are simulated: 5,000 cells of 6 groups, half of the fragments in 2,000 peaks, on a genome of four random
chromosomes of 10 Mb, bgzipped. Every measurement is a process of its own on one thread: "read" parses, matches barcodes
and keeps insertions by group; "prepare" is the whole way to a prepared dataset with its QC table, without the regions
and folds, which no fragment changes. Memory is the most that the process held above what it held before (libraries
loaded, nothing read). SnapATAC2's way is ``import_fragments`` and ``export_coverage`` of insertions into bigWigs of
32-bp bins.
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pysam

LENGTHS = {f"chr{number}": 10_000_000 for number in range(1, 5)}
GROUPS, PEAKS = 6, 2000
PART = 500_000  # fragments written at once
INSTALL = "pip install snapatac2"


@dataclass(frozen=True)
class Case:
    """So many fragments, and what is done with them."""

    fragments: int
    steps: tuple[Literal["read", "prepare", "snapatac2"], ...] = ("read", "prepare")
    lengths: tuple[tuple[str, int], ...] = tuple(LENGTHS.items())
    cells: int = 5000


#: The last are not part of a run without names: minutes, and another package.
CASES = {"3M": Case(3_000_000), "30M": Case(30_000_000), "snapatac2": Case(3_000_000, ("snapatac2",))}


def run(cases: Iterable[Case] = (CASES["3M"],)) -> Iterator[str]:
    """One line per step of each case."""
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            simulate(Path(folder), case)
            for step in case.steps:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    yield pool.submit(measure, Path(folder), case, step).result()


def simulate(folder: Path, case: Case) -> None:
    """Writes ``genome.fa``, ``fragments.tsv.gz`` and ``cells.csv``."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACGT", np.uint8)
    with (folder / "genome.fa").open("wb") as file:
        for chrom, size in case.lengths:
            file.write(f">{chrom}\n".encode() + letters[rng.integers(0, 4, size)].tobytes() + b"\n")
    names = ["".join(rng.choice(list("ACGT"), 16)) + "-1" for _ in range(case.cells)]
    rows = "".join(f"{name},type{number % GROUPS}\n" for number, name in enumerate(names))
    (folder / "cells.csv").write_text("barcode,type\n" + rows)
    options = pc.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with pysam.BGZFile(str(folder / "fragments.tsv.gz"), "wb", None) as file:
        for chrom, size in case.lengths:
            number = case.fragments // len(case.lengths)
            peaks = rng.integers(1000, size - 2000, PEAKS)
            start = np.concatenate([rng.integers(0, size - 1000, number // 2), rng.choice(peaks, number - number // 2)])
            start[number // 2 :] += rng.integers(0, 500, number - number // 2)
            start.sort()
            for first in range(0, number, PART):
                part = start[first : first + PART]
                table = {
                    "chrom": pa.DictionaryArray.from_arrays(np.zeros(len(part), np.int32), [chrom]).cast(pa.string()),
                    "start": part,
                    "end": part + rng.integers(40, 600, len(part)),
                    "barcode": pa.array(names).take(pa.array(rng.integers(0, case.cells, len(part)))),
                    "count": rng.integers(1, 4, len(part)),
                }
                text = pa.BufferOutputStream()
                pc.write_csv(pa.table(table), text, options)
                file.write(text.getvalue().to_pybytes())


def measure(folder: Path, case: Case, step: str) -> str:
    """One step, in this process."""
    os.environ["SEQGRAFT_CACHE"] = str(folder / "cache")
    work = {"read": _read, "prepare": _prepare, "snapatac2": _snapatac2}[step](folder, case)
    next(work)  # what is not measured
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began, clock = _status("VmRSS"), time.process_time(), time.monotonic()
    next(work, None)
    seconds, wall = time.process_time() - began, time.monotonic() - clock
    peak = (_status("VmHWM") - before) / 2**20
    rate = case.fragments / seconds / 1e6
    return (
        f"{case.fragments:>12,} fragments  {step:<10} {seconds:8.2f} CPU s ({wall:.2f} s), "
        f"{rate:5.2f} M/s, {peak:6.0f} MiB above {before / 2**20:.0f}"
    )


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _read(folder: Path, case: Case) -> Iterator[None]:
    from seqgraft.data.barcodes import CellLabels, read_cells
    from seqgraft.data.fragment_files import FragmentFile
    from seqgraft.data.pseudobulk import Assay, Contigs, Layout, count_assay
    from seqgraft.data.spill import Spill

    cells = read_cells(CellLabels(folder / "cells.csv", "type"), {}, ())
    assay = Assay("atac", "insertions", (FragmentFile(folder / "fragments.tsv.gz"),))
    lengths = dict(case.lengths)
    contigs = Contigs(lengths, {}, set(lengths), set(lengths))
    with Spill(folder) as spill:
        yield
        tally = count_assay(assay, Layout([assay], cells.groups), cells, contigs, spill)
    assert tally.fragments.sum() == case.fragments // len(lengths) * len(lengths)


def _prepare(folder: Path, case: Case) -> Iterator[None]:
    import seqgraft.plots  # noqa: F401 - of the QC figure
    from seqgraft.data import fragments
    from seqgraft.data.barcodes import CellLabels
    from seqgraft.data.binned import place_regions
    from seqgraft.data.folds import Folds
    from seqgraft.data.fragment_files import FragmentFile
    from seqgraft.data.pseudobulk import Assay

    chroms = [chrom for chrom, _ in case.lengths]
    source = fragments.FragmentSource(
        fasta=folder / "genome.fa",
        assays=(Assay("atac", "insertions", (FragmentFile(folder / "fragments.tsv.gz"),)),),
        labels=CellLabels(folder / "cells.csv", "type"),
        window=196_608,
        target_length=131_072,
        bin_size=32,
        folds=Folds(by="chromosome", valid=(chroms[-2],), test=(chroms[-1],)),
    )
    places = place_regions(source, folder / "data")
    yield
    with mock.patch.object(fragments, "place_regions", return_value=places):
        fragments.prepare_fragments(source, folder / "data")


def _snapatac2(folder: Path, case: Case) -> Iterator[None]:
    os.environ["RAYON_NUM_THREADS"] = "1"
    try:
        snap = importlib.import_module("snapatac2")
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}; to compare with it: {INSTALL}") from error
    group = dict(line.split(",") for line in (folder / "cells.csv").read_text().split())
    yield
    settings = {"sorted_by_barcode": False, "min_num_fragments": 0, "n_jobs": 1, "tempdir": folder}
    data = snap.pp.import_fragments(folder / "fragments.tsv.gz", dict(case.lengths), **settings)
    groups = [group[name] for name in data.obs_names]
    out = {"bin_size": 32, "normalization": None, "counting_strategy": "insertion", "out_dir": folder / "bw"}
    snap.ex.export_coverage(data, groups, **out, n_jobs=1, tempdir=folder)
