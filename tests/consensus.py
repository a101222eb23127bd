"""Windows of donors' sequences as bcftools makes them, and the samples that are kept of them.

``python tests/consensus.py`` writes ``tests/data/consensus.json``: sha256 of each window, no sequence and no genotype.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqgraft.genome import Genome, Interval
from seqgraft.sequence import decode

STORED = Path(__file__).parent / "data" / "consensus.json"
FILES = {  # FASTA and VCF below the folder of real data
    "human": ("personal/human_chr20/chr20_1000001_2000000.hg19.fa.gz", "personal/human_chr20/phased300.vcf.gz"),
    "yeast": ("yeast/sacCer3.fa.gz", "personal/yeast_segregants/segregants112.vcf.gz"),
}
SLACK = 2000  # more bases than the deletions of a window take


@dataclass(frozen=True)
class Sample:
    """A window with the anchor, 0-based, in the middle; donor and slot as the VCF counts them, from 0."""

    data: str
    chrom: str
    anchor: int
    length: int
    donor: int
    slot: int


def samples() -> list[Sample]:
    """200 of the human set (25 anchors) and 60 of the yeast one (15 anchors on all of its chromosomes' lengths)."""
    rng = np.random.default_rng(20)
    chosen = []
    for anchor in rng.integers(30_000, 970_000, 25).tolist():
        for donor in rng.choice(300, 8, replace=False).tolist():
            chosen.append(Sample("human", "chr20sub", anchor, 49_152, donor, int(rng.integers(2))))
    for chrom in ("chrII", "chrIV", "chrXII"):
        for anchor in rng.integers(20_000, 780_000, 5).tolist():
            for donor in rng.choice(112, 4, replace=False).tolist():
                chosen.append(Sample("yeast", chrom, anchor, 16_385, donor, 0))
    return chosen


def digest(codes: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> str:
    return hashlib.sha256(decode(codes).encode()).hexdigest()


def consensus(genome: Genome, vcf: Path, interval: Interval, donor: str, slot: int) -> str:
    """What ``samtools faidx | bcftools consensus`` writes of an interval."""
    start, end = max(interval.start, 0), min(interval.end, genome.chroms[interval.chrom])
    sequence = decode(genome.codes(Interval(interval.chrom, start, end)))
    command = [bcftools(), "consensus", "-s", donor, "-H", str(slot + 1), str(vcf)]
    text = f">{interval.chrom}:{start + 1}-{end}\n{sequence}\n"
    found = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return "".join(found.stdout.splitlines()[1:])


def window(genome: Genome, vcf: Path, sample: Sample, donor: str) -> str:
    """The bases left of the anchor end one consensus, those from it on begin another."""
    half = sample.length // 2
    left = Interval(sample.chrom, sample.anchor - half - SLACK, sample.anchor)
    right = Interval(sample.chrom, sample.anchor, sample.anchor + sample.length - half + SLACK)
    before = consensus(genome, vcf, left, donor, sample.slot)[-half:]
    return before + consensus(genome, vcf, right, donor, sample.slot)[: sample.length - half]


def bcftools() -> str:
    return shutil.which("bcftools") or ""


def main() -> None:
    data = Path(os.environ["SEQGRAFT_SHARED"]) / "data"
    genomes = {name: Genome.open(data / fasta) for name, (fasta, _) in FILES.items()}
    answers = []
    for sample in samples():
        vcf = data / FILES[sample.data][1]
        names = subprocess.run([bcftools(), "query", "-l", str(vcf)], capture_output=True, text=True, check=True)
        text = window(genomes[sample.data], vcf, sample, names.stdout.split()[sample.donor])
        assert len(text) == sample.length
        answers.append(hashlib.sha256(text.encode()).hexdigest())
    version = subprocess.run([bcftools(), "--version"], capture_output=True, text=True, check=True).stdout
    STORED.write_text(json.dumps({"made_by": version.splitlines()[0], "sha256": answers}, indent=0) + "\n")


if __name__ == "__main__":
    main()
