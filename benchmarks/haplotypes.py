"""Windows of donors' sequences served per second, beside GenVarLoader.

Ours: ``distinct`` builds each distinct haplotype of a window once and says which one every donor has; ``codes`` gives
every haplotype of a batch a row. The peer reads batches of donors. All count the same: donors x ploidy windows, shared
ones included. Numbers are CPU seconds of the process on one thread, the median of the rounds. Where the peer runs,
haplotypes of both are compared before its times are printed: its windows begin where ours (``align: left``) do.

The peer has an environment of its own, whose Python ``GENVARLOADER_PYTHON`` names. "human" needs the folder of real
data (``SEQGRAFT_SHARED``); "simulated" draws every allele by itself, so that nearly all haplotypes are distinct.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._genvarloader import INSTALL
from seqgraft.data.calls import read_genotypes
from seqgraft.data.haplotypes import Haplotypes
from seqgraft.genome import Genome, write_vcf
from seqgraft.sequence import decode

BATCHES = (1, 32)  # donors that the peer reads at once
_HUMAN = "data/personal/human_chr20"


@dataclass(frozen=True)
class Case:
    """``regions`` windows of ``length`` bp; ``human``: 300 phased people on 1 Mb, else as many made up."""

    length: int
    regions: int = 16
    human: bool = True
    donors: int = 300
    span: int = 1_000_000
    rounds: int = 3


CASES = {
    "human": Case(49_152),
    "human-long": Case(196_608),
    "simulated": Case(49_152, human=False),
    "toy": Case(1024, regions=2, human=False, donors=4, span=20_000, rounds=1),
}


def run(cases: Sequence[Case] = (CASES["human"], CASES["human-long"], CASES["simulated"])) -> Iterator[str]:
    """Some lines per case."""
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            yield from _compare(case, Path(folder))


def _compare(case: Case, folder: Path) -> Iterator[str]:
    shared = Path(os.environ.get("SEQGRAFT_SHARED", "../shared"))
    if case.human and not (shared / _HUMAN).is_dir():
        yield f"human, {case.length:,} bp: left out, there is no {shared / _HUMAN}; set SEQGRAFT_SHARED"
        return
    fasta, vcf = _copied(shared / _HUMAN, folder) if case.human else _simulated(case, folder)
    genome = Genome.open(fasta)
    began = time.process_time()
    genotypes = read_genotypes(vcf, genome)
    reading = time.process_time() - began
    chrom, haplotypes = next(iter(genome.chroms)), Haplotypes(genome, genotypes)
    room = case.length // 2 + 5000
    anchors = np.linspace(room, genome.chroms[chrom] - room, case.regions).astype(int).tolist()
    pairs = genotypes.haplotypes(chrom)
    donors = len(genotypes.donors)
    distinct = [len(haplotypes.distinct(chrom, anchor, case.length)[0]) for anchor in anchors]
    name, mean = "human" if case.human else "simulated", statistics.mean(distinct)
    yield (
        f"{name}, {donors} donors, {len(genotypes):,} variants, {len(anchors)} windows of {case.length:,} bp, "
        f"{mean:.0f} of {len(pairs)} haplotypes distinct"
    )

    def in_batches(batch: int) -> Callable[[int], None]:
        groups = [pairs[(first <= pairs[:, 0]) & (pairs[:, 0] < first + batch)] for first in range(0, donors, batch)]

        def serve(anchor: int) -> None:
            for group in groups:
                haplotypes.codes(chrom, anchor, case.length, group)

        return serve

    served = len(anchors) * len(pairs)
    once = _timed(case, served, anchors, lambda anchor: haplotypes.distinct(chrom, anchor, case.length))
    own = {str(batch): _timed(case, served, anchors, in_batches(batch)) for batch in BATCHES}
    yield f"  ours: the VCF read in {reading:.2f} CPU s; distinct {1 / once:,.0f} haplotypes a CPU s"
    python = os.environ.get("GENVARLOADER_PYTHON")
    theirs: dict[str, float] = {}
    if python:
        starts = [anchor - case.length // 2 for anchor in anchors]
        peer = _peer(python, case, folder, fasta, vcf, [(chrom, start) for start in starts])
        same = _same(Haplotypes(genome, genotypes, "left"), chrom, starts, case.length, peer["digests"])
        yield f"  GenVarLoader {peer['version']}: its dataset in {peer['write']:.2f} CPU s; {same} haplotypes are equal"
        theirs = peer["each"]
    else:
        yield f"  GenVarLoader left out: {INSTALL}"
    for batch, seconds in own.items():
        line = f"  in batches of {batch:>2s} donors: codes {1 / seconds:,.0f} haplotypes a CPU s"
        if batch in theirs:
            line += f", peer {1 / theirs[batch]:,.0f}, peer / codes {theirs[batch] / seconds:.2f}x"
            line += f", peer / distinct {theirs[batch] / once:.2f}x"
        yield line


def _timed(case: Case, served: int, anchors: Sequence[int], serve: Callable[[int], object]) -> float:
    """CPU seconds for each haplotype."""
    rounds = []
    for _ in range(case.rounds):
        began = time.process_time()
        for anchor in anchors:
            serve(anchor)
        rounds.append((time.process_time() - began) / served)
    return statistics.median(rounds)


def _peer(
    python: str, case: Case, folder: Path, fasta: Path, vcf: Path, regions: Sequence[tuple[str, int]]
) -> dict[str, Any]:
    job = {
        "folder": str(folder),
        "fasta": str(fasta),
        "vcf": str(vcf),
        "length": case.length,
        "regions": regions,
        "batches": BATCHES,
        "rounds": case.rounds,
    }
    one = dict.fromkeys(("RAYON_NUM_THREADS", "NUMBA_NUM_THREADS", "POLARS_MAX_THREADS", "OMP_NUM_THREADS"), "1")
    script = Path(__file__).with_name("_genvarloader.py")
    done = subprocess.run(
        [python, str(script), json.dumps(job)], env={**os.environ, **one}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"GenVarLoader did not run ({done.stderr.strip().splitlines()[-1]}); {INSTALL}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _same(haplotypes: Haplotypes, chrom: str, starts: Sequence[int], length: int, digests: dict[str, list[str]]) -> int:
    for name, theirs in digests.items():
        region, donor = name.split()
        pairs = np.array([[haplotypes.genotypes.donors.index(donor), slot] for slot in range(len(theirs))])
        codes = haplotypes.codes(chrom, starts[int(region)], length, pairs)
        ours = [hashlib.sha256(decode(row).encode()).hexdigest() for row in codes]
        if ours != theirs:
            raise SystemExit(f"The two packages make other haplotypes of donor {donor}; their times mean nothing.")
    return sum(len(theirs) for theirs in digests.values())


def _copied(source: Path, folder: Path) -> tuple[Path, Path]:
    """FASTA and VCF where the peer may write its indexes."""
    for path in source.iterdir():
        shutil.copy(path, folder / path.name)
    return next(folder.glob("*.fa.gz")), folder / "phased300.vcf.gz"


def _simulated(case: Case, folder: Path) -> tuple[Path, Path]:
    """A contig with a variant in about 130 bp, one in twenty an indel; frequencies as of neutral alleles, 1 / x."""
    rng = np.random.default_rng(0)
    letters = rng.choice(np.frombuffer(b"ACGT", dtype="S1"), case.span)
    places = np.sort(rng.choice(np.arange(100, case.span - 100, 8), case.span // 130, replace=False))
    fasta, vcf = folder / "simulated.fa", folder / "simulated.vcf.gz"
    fasta.write_bytes(b">chr1\n" + letters.tobytes() + b"\n")
    names = "\t".join(f"donor{number:04d}" for number in range(case.donors))
    lines = ["##fileformat=VCFv4.2", f"##contig=<ID=chr1,length={case.span}>"]
    lines.append('##FORMAT=<ID=GT,Number=1,Type=String,Description="genotype">')
    lines.append(f"#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t{names}")
    for place in places.tolist():
        kind, size = rng.random(), int(rng.integers(1, 6))
        ref = letters[place : place + (1 + size if kind < 0.025 else 1)].tobytes().decode()
        other = "".join(rng.choice([base for base in "ACGT" if base != ref[0]], size))
        alt = ref[0] if kind < 0.025 else ref + other if kind < 0.05 else other[0]
        frequency = (1 / (2 * case.donors)) ** rng.random()
        has = (rng.random((case.donors, 2)) < frequency).astype(int)
        calls = "\t".join(f"{left}|{right}" for left, right in has.tolist())
        lines.append(f"chr1\t{place + 1}\t.\t{ref}\t{alt}\t.\tPASS\t.\tGT\t{calls}")
    write_vcf(vcf, lines)
    return fasta, vcf
