"""Windows of donors' sequences: beside a plain construction, beside bcftools, and each distinct one once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pysam
import pysam.bcftools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consensus import FILES, STORED, bcftools, consensus, digest, samples, window
from seqgraft.data.calls import read_genotypes
from seqgraft.data.genotypes import Genotypes
from seqgraft.data.haplotypes import Haplotypes
from seqgraft.errors import DataError
from seqgraft.genome import Genome, Interval
from seqgraft.sequence import decode

LENGTH = 60  # bp of the contig of generated files
DONORS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generated")


def generated(folder: Path, seed: int, ploidy: int = 2) -> tuple[Genome, Path]:
    """A contig, and a VCF of substitutions, insertions, deletions and both, some in one place or overlapping."""
    rng = np.random.default_rng(seed)
    sequence = "".join(rng.choice(list("ACGT"), LENGTH))
    fasta, path = folder / f"{seed}.fa", folder / f"{seed}.{ploidy}.vcf"
    fasta.write_text(f">c\n{sequence}\n")
    records: dict[tuple[int, str], list[str]] = {}
    for start in sorted(rng.integers(0, LENGTH - 4, rng.integers(3, 14)).tolist()):
        ref = sequence[start : start + int(rng.choice([1, 1, 1, 2, 3, 4]))]
        some = "".join(rng.choice(list("ACGT"), rng.integers(1, 4)))
        alts = [some[0] + ref[1:], ref[0] + some, ref[0], ref[0] + some + ref[1:]]
        chosen = {str(alt) for alt in rng.choice(alts, 2)} - {ref}
        if chosen:
            records[start, ref] = sorted(chosen)
    header = (
        f'##fileformat=VCFv4.2\n##contig=<ID=c,length={LENGTH}>\n##FORMAT=<ID=GT,Number=1,Type=String,Description="">\n'
    )
    lines = ["#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t" + "\t".join(f"d{n}" for n in range(DONORS))]
    for (start, ref), alts in records.items():
        calls = ["|".join(map(str, rng.integers(0, len(alts) + 1, ploidy))) for _ in range(DONORS)]
        calls[0] = "|".join(["1"] * ploidy)
        lines.append("\t".join(["c", str(start + 1), ".", ref, ",".join(alts), ".", "PASS", ".", "GT", *calls]))
    path.write_text(header + "\n".join(lines) + "\n")
    return Genome.open(fasta), path


def plain(genome: Genome, genotypes: Genotypes, donor: int, slot: int, anchor: int, length: int) -> str:
    """Base by base: the sequence with where each base comes from, cut around the anchor's."""
    sequence = decode(genome.codes(Interval("c", 0, LENGTH)))
    bases: list[tuple[str, int]] = []  # and the base of the reference that it stands for, -1 for none
    at = 0
    has = genotypes.alleles(slice(None))[:, slot, donor]
    for row in np.flatnonzero(has):
        variant = genotypes.variant(int(row), genome)
        left, right = genotypes.trim[row]
        start, end = variant.position - 1 + left, variant.position - 1 + len(variant.ref) - right
        new = variant.alt[left : len(variant.alt) - right]
        bases += [(sequence[i], i) for i in range(at, start)]
        bases += [(base, start + i if start + i < end else -1) for i, base in enumerate(new)]
        at = end
    bases += [(sequence[i], i) for i in range(at, LENGTH)]
    origins = [origin for _, origin in bases]
    middle = next((origins.index(i) for i in range(anchor, LENGTH) if i in origins), len(bases))
    first = middle - length // 2
    return "".join(bases[i][0] if 0 <= i < len(bases) else "N" for i in range(first, first + length))


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(0, LENGTH - 1), st.integers(1, 80))
def test_the_anchor_stands_in_the_middle(folder: Path, seed: int, ploidy: int, anchor: int, length: int) -> None:
    genome, path = generated(folder, seed, ploidy)
    genotypes = read_genotypes(path, genome)
    haplotypes = Haplotypes(genome, genotypes)
    codes, index = haplotypes.distinct("c", anchor, length)
    assert index.shape == (DONORS, ploidy)
    found = {(d, s): decode(codes[index[d, s]]) for d in range(DONORS) for s in range(ploidy)}
    assert found == {pair: plain(genome, genotypes, *pair, anchor, length) for pair in found}
    assert len(codes) <= len(set(found)) == DONORS * ploidy
    assert sorted(set(index.ravel().tolist())) == list(range(len(codes)))
    pairs = genotypes.haplotypes("c")[::-1]
    assert np.array_equal(haplotypes.codes("c", anchor, length, pairs), codes[index[pairs[:, 0], pairs[:, 1]]])


@pytest.mark.parametrize("seed", range(12))
def test_whole_contigs_are_those_of_bcftools(folder: Path, seed: int) -> None:
    """The bcftools within pysam; overlapping records, and several at one place, are applied or skipped as it does."""
    genome, path = generated(folder, seed)
    genotypes = read_genotypes(path, genome)
    haplotypes = Haplotypes(genome, genotypes, "left")
    packed = f"{path}.gz"
    pysam.tabix_compress(str(path), packed, force=True)
    pysam.tabix_index(packed, preset="vcf", force=True)
    for donor in range(DONORS):
        for slot in range(2):
            command = ("-s", f"d{donor}", "-H", str(slot + 1), "-f", str(genome.path), packed)
            whole = "".join(pysam.bcftools.consensus(*command).splitlines()[1:])
            assert decode(haplotypes.codes("c", 0, len(whole), np.array([[donor, slot]]))[0]) == whole


def test_some_generated_records_overlap(folder: Path) -> None:
    reports = [read_genotypes(path, genome).report for genome, path in (generated(folder, seed) for seed in range(12))]
    assert sum(report.counts.get("overlapping", 0) for report in reports) > 20


def small(folder: Path, *rows: str, unphased: str = "refuse", donors: int = 2) -> Haplotypes:
    """Haplotypes of ``position REF ALT calls...`` on a contig of 40 bases."""
    folder.mkdir(exist_ok=True)
    (folder / "g.fa").write_text(">c\nACGTTGCAACGGTACCATGGTACGTTGCAACTTAGCATCA\n")
    names = "\t".join(f"d{n}" for n in range(donors))
    lines = [f"##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t{names}"]
    for row in rows:
        position, ref, alt, *calls = row.split()
        lines.append("\t".join(["c", position, ".", ref, alt, ".", "PASS", ".", "GT", *calls]))
    (folder / "g.vcf").write_text("\n".join(lines) + "\n")
    genome = Genome.open(folder / "g.fa")
    return Haplotypes(genome, read_genotypes(folder / "g.vcf", genome, unphased=unphased))  # type: ignore[arg-type]


def test_the_rule_for_an_anchor_that_is_deleted(tmp_path: Path) -> None:
    # positions 11 to 16 from 1 are GGTACC; the anchor, 12 from 0, is the T
    found = {}
    rows = {"deleted": "11 GGTA G 1 0", "replaced": "12 GTA CC 1 0", "before": "12 G GAA 1 0", "at": "13 T TAA 1 0"}
    for name, row in rows.items():
        codes, index = small(tmp_path / name, row).distinct("c", 12, 8)
        found[name] = decode(codes[index[0, 0]])
        assert decode(codes[index[1, 0]]) == "ACGGTACC"
    assert found["deleted"] == "AACGCCAT"
    assert found["replaced"] == "ACGCCCCA"
    assert found["before"] == "GGAATACC"
    assert found["at"] == "ACGGTAAA"


def test_only_what_is_in_reach_makes_a_haplotype_distinct(tmp_path: Path) -> None:
    haplotypes = small(tmp_path, "3 G A 0|1 0|0", "13 T C 0|1 0|1", "36 C G 0|0 1|0", donors=2)
    codes, index = haplotypes.distinct("c", 12, 6)
    assert index.tolist() == [[0, 1], [0, 1]]
    assert [decode(row) for row in codes] == ["CGGTAC", "CGGCAC"]
    assert len(haplotypes.distinct("c", 12, 50)[0]) == 4
    codes, index = haplotypes.distinct("c", 20, 4)
    assert len(codes) == 1
    assert not index.any()


@pytest.mark.parametrize(("position", "count"), [(9, 1), (10, 2), (15, 2), (16, 1)])
def test_the_first_and_the_last_base_of_a_window(tmp_path: Path, position: int, count: int) -> None:
    sequence = "ACGTTGCAACGGTACCATGG"
    ref, alt = sequence[position - 1], "A" if sequence[position - 1] != "A" else "C"
    codes, _ = small(tmp_path, f"{position} {ref} {alt} 1 0").distinct("c", 12, 6)
    assert len(codes) == count


def test_what_a_deletion_alone_brings_into_reach(tmp_path: Path) -> None:
    rows = "13 TAC T 1|1 0|0", "16 C A 0|1 0|1"  # the second stands at the end of the first donor's windows only
    codes, index = small(tmp_path, *rows).distinct("c", 12, 6)
    assert [decode(row) for row in codes] == ["CGGTCA", "CGGTAA", "CGGTAC"]
    assert index.tolist() == [[0, 1], [2, 2]]


def test_a_deletion_that_begins_far_outside(tmp_path: Path) -> None:
    rows = "2 CGTTGCAACGGTACCATGGTA C 1 0", *(f"{p} {ref} A 0 1" for p, ref in ((4, "T"), (6, "G"), (10, "C")))
    codes, index = small(tmp_path, *rows).distinct("c", 24, 10)
    assert [decode(codes[i]) for i in index[:, 0]] == ["NACCGTTGCA", "GTACGTTGCA"]


def test_an_anchor_at_the_first_index(tmp_path: Path) -> None:
    assert decode(small(tmp_path / "one", "11 GGTA G 1 0").distinct("c", 12, 1)[0][0]) == "C"
    for name, row, whole in (
        ("gone", "12 GT T 1 0", "TACC"),
        ("new", "12 G AG 1 0", "AGTA"),
        ("over", "11 GGT G 1 0", "GTAC"),
    ):
        made = small(tmp_path / name, row)
        left = Haplotypes(made.genome, made.genotypes, "left")
        assert decode(left.codes("c", 11, 4, np.array([[0, 0]]))[0]) == whole


def test_windows_reach_beyond_the_contig(tmp_path: Path) -> None:
    haplotypes = small(tmp_path, "2 CGT C 1 0")
    codes, index = haplotypes.distinct("c", 4, 12)
    assert [decode(codes[i]) for i in index[:, 0]] == ["NNNNACTGCAAC", "NNACGTTGCAAC"]
    for anchor in (-1, 40):
        with pytest.raises(DataError, match=rf"c: the anchor lies beyond its contig: {anchor}. c has 40 bp"):
            haplotypes.distinct("c", anchor, 12)


def test_donors_with_other_ploidies(tmp_path: Path) -> None:
    codes, index = small(tmp_path, "13 T C 1 0|1").distinct("c", 12, 4)
    assert index.tolist() == [[0, -1], [1, 0]]
    assert [decode(row) for row in codes] == ["GGCA", "GGTA"]


def test_dosage_has_one_sequence_for_each_donor(tmp_path: Path) -> None:
    rows = "13 T C 0/1 1|0 1|1 1", "14 A G 0|0 0|0 0|1 0", "20 GT G 1|0 0|0 0|0 1"
    haplotypes = small(tmp_path, *rows, unphased="dosage", donors=4)
    assert haplotypes.genotypes.encoding == "dosage"
    assert haplotypes.genotypes.report.counts["not_snv"] == 1
    codes, index = haplotypes.distinct("c", 12, 4)
    assert [decode(row) for row in codes] == ["GGYA", "GGCR", "GGCA"]
    assert index.tolist() == [[0], [0], [1], [2]]
    assert np.array_equal(haplotypes.codes("c", 12, 4, np.array([[2, 0]])), codes[[1]])


def test_dosage_of_a_window(tmp_path: Path) -> None:
    genotypes = small(tmp_path, "3 G A 0|1 0|0", "13 T C 1|1 0|1", "20 GT G 0|1 0|0").genotypes
    dosage, rows = genotypes.dosage(Interval("c", 5, 20))
    assert dosage.tolist() == [[2, 1], [1, 0]]
    assert dosage.dtype == np.uint8
    assert rows.tolist() == [1, 2]


def test_genotypes_belong_to_their_fasta(tmp_path: Path) -> None:
    haplotypes = small(tmp_path, "3 G A 0|1 0|0")
    (tmp_path / "other.fa").write_text(">c\nACGT\n")
    with pytest.raises(DataError, match="read against another FASTA"):
        Haplotypes(Genome.open(tmp_path / "other.fa"), haplotypes.genotypes)


@pytest.fixture(scope="module")
def real(shared: Path) -> dict[str, Haplotypes]:
    genomes = {name: Genome.open(shared / "data" / fasta) for name, (fasta, _) in FILES.items()}
    return {
        name: Haplotypes(genomes[name], read_genotypes(shared / "data" / vcf, genomes[name]))
        for name, (_, vcf) in FILES.items()
    }


def test_real_windows_are_those_of_bcftools(real: dict[str, Haplotypes]) -> None:
    """200 of phased people and 60 of haploid segregants, byte for byte, beside what bcftools 1.16 made of them."""
    stored = json.loads(STORED.read_text())["sha256"]
    moved = 0
    for sample, answer in zip(samples(), stored, strict=True):
        haplotypes, half = real[sample.data], sample.length // 2
        pair = np.array([[sample.donor, sample.slot]])
        codes = haplotypes.codes(sample.chrom, sample.anchor, sample.length, pair)[0]
        assert digest(codes) == answer, sample
        start = Interval(sample.chrom, sample.anchor - half, sample.anchor - half + 200)
        moved += (codes[:200] != haplotypes.genome.codes(start)).sum() > 100
    assert moved > 100  # windows whose left end indels have moved


def test_distinct_real_windows(real: dict[str, Haplotypes]) -> None:
    haplotypes = real["human"]
    codes, index = haplotypes.distinct("chr20sub", 500_000, 49_152)
    assert index.shape == (300, 2)
    assert 150 < len(codes) < 450
    assert len({row.tobytes() for row in codes}) == len(codes)
    pairs = np.argwhere(index >= 0)[::37]
    assert np.array_equal(haplotypes.codes("chr20sub", 500_000, 49_152, pairs), codes[index[pairs[:, 0], pairs[:, 1]]])


@pytest.mark.slow
def test_real_windows_beside_bcftools_itself(real: dict[str, Haplotypes], shared: Path) -> None:
    if not bcftools():
        pytest.skip("There is no bcftools; it is in Debian's package of that name.")
    for sample in samples():
        haplotypes, vcf = real[sample.data], shared / "data" / FILES[sample.data][1]
        donor = haplotypes.genotypes.donors[sample.donor]
        pair = np.array([[sample.donor, sample.slot]])
        codes = haplotypes.codes(sample.chrom, sample.anchor, sample.length, pair)[0]
        assert decode(codes) == window(haplotypes.genome, vcf, sample, donor), sample
        left = Haplotypes(haplotypes.genome, haplotypes.genotypes, "left")
        interval = Interval(sample.chrom, sample.anchor, sample.anchor + sample.length + 1000)
        whole = consensus(haplotypes.genome, vcf, interval, donor, sample.slot)
        if interval.end >= haplotypes.genome.chroms[sample.chrom]:
            whole += "N" * sample.length
        assert decode(left.codes(sample.chrom, sample.anchor, sample.length, pair)[0]) == whole[: sample.length]
