"""What a VCF of genotypes may hold, one rule for each: refused with a message, or counted and applied as it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pysam
import pytest

from seqgraft.data.calls import read_genotypes
from seqgraft.data.genotypes import COUNTED, Genotypes, trimmed
from seqgraft.data.haplotypes import Haplotypes
from seqgraft.errors import DataError
from seqgraft.genome import Genome, Interval, Variant
from seqgraft.sequence import decode

#            1         2         3         4
#   1234567890123456789012345678901234567890
SEQUENCE = "ACGTTGCAACGGTACCATGGNACGTTGCAACTTAGCATCA"
Row = tuple[int, str, str, str]  # position, REF, ALT, genotypes with spaces between


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text(f">chr1\n{SEQUENCE}\n>chr2\n{SEQUENCE[::-1]}\n")
    return Genome.open(path)


def vcf(path: Path, rows: Sequence[Row], donors: str = "a b", chrom: str = "chr1", text: str = "") -> Path:
    """A VCF of rows on one contig, calls such as ``0|1:7`` with a phase set; ``text`` is put after them as it is."""
    header = ["##fileformat=VCFv4.2", f"##contig=<ID={chrom}>", '##FORMAT=<ID=GT,Number=1,Type=String,Description="">']
    header += ['##FORMAT=<ID=PS,Number=1,Type=Integer,Description="">'] if any(":" in row[3] for row in rows) else []
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *donors.split()]
    facts = [([chrom, str(p), ".", ref, alt, ".", "PASS", "."], calls) for p, ref, alt, calls in rows]
    lines = [[*fields, "GT:PS" if ":" in calls else "GT", *calls.split()] for fields, calls in facts]
    path.write_text("\n".join([*header, *("\t".join(line) for line in [columns, *lines])]) + "\n" + text)
    return path


def whole(genome: Genome, genotypes: Genotypes, donor: str, slot: int = 0, chrom: str = "chr1") -> str:
    """A contig's haplotype, with N for what deletions leave at the end."""
    pair = np.array([[genotypes.donors.index(donor), slot]])
    return decode(Haplotypes(genome, genotypes, "left").codes(chrom, 0, 40, pair)[0]).rstrip("N")


def edited(*edits: tuple[int, str, str]) -> str:
    """The sequence with ``(position, REF, ALT)`` in place, cut to 40 bases."""
    text = SEQUENCE
    for position, ref, alt in sorted(edits, reverse=True):
        assert text[position - 1 :].startswith(ref)
        text = text[: position - 1] + alt + text[position - 1 + len(ref) :]
    return text[:40].rstrip("N")


@dataclass(frozen=True)
class Case:
    """Rows, and what becomes of them: counts and sequences of ``donor:slot``, or the words of an error."""

    rows: Sequence[Row]
    counts: Mapping[str, int] = field(default_factory=dict)
    donors: str = "a b"
    options: Mapping[str, Any] = field(default_factory=dict)
    sequences: Mapping[str, Sequence[tuple[int, str, str]]] = field(default_factory=dict)
    error: str = ""


SNV = (2, "C", "T", "0|1 0|0")
SKIP = {"allow_skipped": True}
CASES = {
    "phased": Case([SNV], sequences={"a:0": [], "a:1": [(2, "C", "T")], "b:1": []}),
    "letters in lower case": Case([(2, "c", "t", "0|1 0|0")], sequences={"a:1": [(2, "C", "T")]}),
    "unphased": Case([SNV, (3, "G", "A", "0/1 0|0")], error=r"1 heterozygous calls.*'chr1:3, a'.*random.*dosage"),
    "unphased, but the same on both": Case([SNV, (3, "G", "A", "1/1 0/0")], sequences={"a:0": [(3, "G", "A")]}),
    "unphased, at random": Case([(3, "G", "A", "0/1 0|0")], {"unphased": 1}, options={"unphased": "random"}),
    "unphased, dosage": Case(
        [(3, "G", "A", "0/1 1|1")],
        {"unphased": 1},
        options={"unphased": "dosage"},
        sequences={"a:0": [(3, "G", "R")], "b:0": [(3, "G", "A")]},
    ),
    "two other bases, dosage": Case(
        [(3, "G", "A,C", "1/2 0|2")],
        {"several": 1, "unphased": 1},
        options={"unphased": "dosage"},
        sequences={"a:0": [(3, "G", "M")], "b:0": [(3, "G", "S")]},
    ),
    "an indel, dosage": Case(
        [SNV, (4, "TT", "T", "0/1 0|0")],
        {"not_snv": 1, "unphased": 1},
        options={"unphased": "dosage"},
        sequences={"a:0": [(2, "C", "Y")]},
    ),
    "three haplotypes, dosage": Case(
        [(2, "C", "T", "0|1|1 0|0|0")], options={"unphased": "dosage"}, error="two hapl.*3"
    ),
    "one phase set": Case(
        [(2, "C", "T", "0|1:7 0|0:."), (3, "G", "A", "1|0:7 0|1:9"), (4, "T", "C", "1|1:. 1|1")],
        sequences={"a:0": [(3, "G", "A"), (4, "T", "C")], "b:1": [(3, "G", "A"), (4, "T", "C")]},
    ),
    "two phase sets": Case(
        [(2, "C", "T", "0|1:7 0|0"), (3, "G", "A", "1|0:9 0|1:9")], error=r"1 het.*phased apart.*'chr1:3, a'.*random"
    ),
    "a phase set beside none": Case([SNV, (3, "G", "A", "1|0:9 0|1:9")], error="phased apart.*'chr1:3, a'"),
    "two phase sets in two windows": Case(
        [(2, "C", "T", "0|1:7 0|0"), (9, "A", "C", "1|0:9 0|1:9")],
        options={"within": [Interval("chr1", 0, 3), Interval("chr1", 5, 9)]},
        sequences={"a:0": [(9, "A", "C")], "a:1": [(2, "C", "T")]},
    ),
    "two phase sets, at random": Case(
        [(2, "C", "T", "0|1:7 0|0"), (3, "G", "A", "1|0:9 0|1:9")], {"phase_sets": 1}, options={"unphased": "random"}
    ),
    "two phase sets, dosage": Case(
        [(2, "C", "T", "0|1:7 0|0"), (3, "G", "A", "1|0:9 0|1:9")],
        {"phase_sets": 1},
        options={"unphased": "dosage"},
        sequences={"a:0": [(2, "C", "Y"), (3, "G", "R")]},
    ),
    "missing": Case([SNV, (3, "G", "A", "./. 0|1")], error=r"1 calls have a missing.*'chr1:3, a'.*reference or major"),
    "missing, the reference": Case(
        [(3, "G", "A", "./. 1|1")], {"missing": 1}, options={"missing": "reference"}, sequences={"a:0": [], "a:1": []}
    ),
    "missing, the most frequent": Case(
        [(3, "G", "A", "./. 1|1 0|1")],
        {"missing": 1},
        "a b c",
        {"missing": "major"},
        {"a:0": [(3, "G", "A")], "a:1": [(3, "G", "A")], "c:0": []},
    ),
    "half missing": Case(
        [(3, "G", "A", ".|1 0|0")],
        {"missing": 1},
        options={"missing": "reference"},
        sequences={"a:0": [], "a:1": [(3, "G", "A")]},
    ),
    "missing before the ploidy is known": Case(
        [(3, "G", "A", ". 1"), (4, "T", "C", "1 0")],
        {"missing": 1},
        options={"missing": "major"},
        sequences={"a:0": [(3, "G", "A"), (4, "T", "C")]},
    ),
    "missing with fewer slots than called": Case(
        [(3, "G", "A", ". 1"), (4, "T", "C", "0|1 0")],
        {"missing": 1},
        options={"missing": "major"},
        sequences={"a:0": [(3, "G", "A")], "a:1": [(3, "G", "A"), (4, "T", "C")]},
    ),
    "haploid": Case([(3, "G", "A", "1 0")], sequences={"a:0": [(3, "G", "A")], "b:0": []}),
    "haploid beside diploid": Case(
        [(3, "G", "A", "1 0|1")], sequences={"a:0": [(3, "G", "A")], "b:0": [], "b:1": [(3, "G", "A")]}
    ),
    "triploid": Case(
        [(3, "G", "A", "0|1|1 0|0|0")], sequences={"a:0": [], "a:1": [(3, "G", "A")], "a:2": [(3, "G", "A")]}
    ),
    "the ploidy changes": Case(
        [SNV, (3, "G", "A", "1 0|0")], error=r"ploidy of a changes on chr1: '1 at chr1:3, 2 before'"
    ),
    "several alleles": Case(
        [(3, "G", "A,GTT", "1|2 0|2")], {"several": 1}, sequences={"a:0": [(3, "G", "A")], "a:1": [(3, "G", "GTT")]}
    ),
    "an allele that is not there": Case([(3, "G", "A", "0|2 0|0")], error="allele without ALT: 2"),
    "a star": Case(
        [(3, "GTT", "G", "0|1 0|0"), (4, "T", "C,*", "1|2 0|0")],
        {"several": 1, "star": 1},
        sequences={"a:0": [(4, "T", "C")], "a:1": [(3, "GTT", "G")]},
    ),
    "symbolic": Case(
        [SNV, (3, "G", "<DEL>", "0|1 0|0")], {"symbolic": 1}, options=SKIP, sequences={"a:1": [(2, "C", "T")]}
    ),
    "symbolic, too many": Case([SNV, (3, "G", "<DEL>", "0|1 0|0")], error=r"more than 1 %.*2 alleles.*symbolic"),
    "symbolic, nobody's": Case([SNV, (3, "G", "<NON_REF>", "0|0 0|0")], {"uncarried": 1}),
    "a breakend": Case([SNV, (3, "G", "G[chr2:9[", "0|1 0|0")], {"symbolic": 1}, options=SKIP),
    "other letters": Case([SNV, (3, "G", "R", "0|1 0|0")], {"letters": 1}, options=SKIP),
    "an empty allele": Case([SNV, (3, "G", "A,", "0|2 0|1")], {"several": 1, "letters": 1}, options=SKIP),
    "the same as REF": Case([SNV, (3, "G", "g", "0|1 0|0")], {"same": 1}, options=SKIP),
    "N in the FASTA": Case([SNV, (21, "A", "C", "0|1 0|0")], {"unknown": 1}, options=SKIP),
    "REF is another": Case(
        [SNV, (3, "T", "A", "0|1 0|0")], error=r"chr1:3: REF does not match the FASTA: 'T'. The FASTA has G"
    ),
    "REF beyond the contig": Case([SNV, (40, "AC", "A", "0|1 0|0")], error=r"chr1:40: REF does not match.*has A there"),
    "another assembly": Case([(p, "A", "C", "0|1 0|0") for p in range(1, 21)], error="of another assembly: '15 of 20'"),
    "REF and ALT swapped": Case(
        [(p, "A" if base == "C" else "C", base, "0|1 0|0") for p, base in enumerate(SEQUENCE[:12], start=1)],
        error="REF and ALT are swapped.*'12 of 12'",
    ),
    "overlapping": Case(
        [(3, "GTT", "G", "1|0 0|0"), (4, "T", "C", "1|1 0|0")],
        {"overlapping": 1},
        sequences={"a:0": [(3, "GTT", "G")], "a:1": [(4, "T", "C")]},
    ),
    "overlapping deletions": Case(
        [(3, "GTT", "G", "1|0 0|0"), (4, "TT", "T", "1|1 0|0")],
        {"overlapping": 1},
        sequences={"a:0": [(3, "GTT", "G")], "a:1": [(4, "TT", "T")]},
    ),
    "an indel after its own first base": Case(
        [(3, "G", "A", "1|0 0|0"), (3, "G", "GCC", "1|0 0|0")], sequences={"a:0": [(3, "G", "ACC")]}
    ),
    "a record twice": Case([SNV, SNV], {"repeated": 1}, sequences={"a:1": [(2, "C", "T")]}),
    "a record twice, in other words": Case(
        [SNV, (2, "C", "T", "1|0 0|0")], error="chr1:2: a variant is there twice.*'T'"
    ),
    "out of order": Case(
        [(9, "A", "C", "1|0 0|0"), (3, "GTT", "G", "1|1 0|0")],
        {"unsorted": 1},
        sequences={"a:0": [(3, "GTT", "G"), (9, "A", "C")], "a:1": [(3, "GTT", "G")]},
    ),
    "an indel that takes a base in use": Case(
        [(3, "G", "A", "1|0 0|0"), (3, "GT", "T", "1|0 0|0")], {"overlapping": 1}, sequences={"a:0": [(3, "G", "A")]}
    ),
    "nobody carries it": Case([SNV, (5, "T", "A", "0|0 0|0")], {"uncarried": 1}),
    "nobody carries any": Case([(5, "T", "A", "0|0 0|0")], error="no donor carries a variant"),
    "no variation": Case([SNV, (5, "T", ".", "0|0 0|0")]),
    "an allele beyond counting": Case([(5, "T", "A", "70000|0 0|0")], error="this is no genotype: '70000|0'"),
    "slots beyond counting": Case([(5, "T", "A", "|".join("0" * 200) + " 0|0")], error="this is no genotype: '0|0"),
    "no genotype": Case([(5, "T", "A", "x 0|0")], error="this is no genotype: 'x'"),
    "a donor twice": Case([SNV], donors="a a", error="a donor is there twice: 'a'"),
    "a donor asked for twice": Case([SNV], options={"donors": ["a", "a"]}, error="donors: a donor is there twice"),
    "no donor of the file": Case([SNV], options={"donors": ["x"]}, error="none of the donors.*'x'.*a, b"),
    "outside": Case(
        [SNV, (9, "A", "C", "0|1 0|0")],
        {"outside": 1},
        options={"within": [Interval("chr1", 0, 5), Interval("chr1", 2, 8)]},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_rule(case: Case, genome: Genome, tmp_path: Path) -> None:
    path = vcf(tmp_path / "in.vcf", case.rows, case.donors)
    if case.error:
        with pytest.raises(DataError, match=f"(?s){case.error}"):
            read_genotypes(path, genome, **case.options)
        return
    genotypes = read_genotypes(path, genome, **case.options)
    assert genotypes.report.counts == case.counts
    assert genotypes.report.records == len(case.rows)
    assert genotypes.report.variants == len(genotypes)
    for name, edits in case.sequences.items():
        donor, slot = name.split(":")
        assert whole(genome, genotypes, donor, int(slot)) == edited(*edits)


def test_every_count_has_a_case() -> None:
    covered = {key for case in CASES.values() for key in case.counts}
    assert COUNTED.keys() - covered == {"contig", "filtered"}  # below


def test_a_haploid_donor_has_one_haplotype(genome: Genome, tmp_path: Path) -> None:
    genotypes = read_genotypes(vcf(tmp_path / "in.vcf", [(3, "G", "A", "1 0|1")]), genome)
    assert genotypes.report.ploidy == {"chr1": {1: 1, 2: 1}}
    assert genotypes.haplotypes("chr1").tolist() == [[0, 0], [1, 0], [1, 1]]
    for slot in (1, -1):
        with pytest.raises(
            DataError, match=rf"a, chr1: the donor has no such haplotype: {slot}\. Its slots are 0 to 0"
        ):
            whole(genome, genotypes, "a", slot)


def test_a_missing_call_fills_no_slot_that_is_not_there(genome: Genome, tmp_path: Path) -> None:
    path = vcf(tmp_path / "in.vcf", [(3, "G", "A", ". 1|1"), (4, "T", "C", "1 0|1")])
    genotypes = read_genotypes(path, genome, missing="major")
    assert genotypes.dosage(Interval("chr1", 0, 40))[0].tolist() == [[1, 1], [2, 1]]


def test_names_of_contigs(genome: Genome, tmp_path: Path) -> None:
    path = vcf(tmp_path / "in.vcf", [SNV], chrom="1")
    with pytest.raises(DataError, match=r"no chromosome: '1'.*rename: {'1': 'chr1'}"):
        read_genotypes(path, genome)
    genotypes = read_genotypes(path, genome, rename={"1": "chr1"})
    assert genotypes.contigs == {"chr1": (0, 1)}
    with pytest.raises(DataError, match=r"no variants on the contig: 'chr2'. They are on chr1"):
        genotypes.haplotypes("chr2")
    with pytest.raises(DataError, match="no chromosome: 'patch'"):
        read_genotypes(vcf(tmp_path / "other.vcf", [SNV], chrom="patch"), genome)
    more = "\t".join(["patch", "5", ".", "A", "G", ".", "LowQual", ".", "GT", "0|1", "0|0"])
    filtered = more.replace("patch", "chr2").replace("\tA\t", f"\t{SEQUENCE[::-1][4]}\t")
    last = 38, "T", "G", "0|1 0|0"
    genotypes = read_genotypes(vcf(tmp_path / "more.vcf", [last], text=f"{more}\n{filtered}\n"), genome)
    assert genotypes.report.counts == {"contig": 1, "filtered": 1}
    assert genotypes.contigs == {"chr1": (0, 1), "chr2": (1, 2)}
    assert genotypes.variant(1, genome) == Variant("chr2", 5, SEQUENCE[::-1][4], "G")


def test_donors_of_one_side(genome: Genome, tmp_path: Path) -> None:
    path = vcf(tmp_path / "in.vcf", [(2, "C", "T", "0|1 1|1 0|0")], "a b c")
    genotypes = read_genotypes(path, genome, donors=["x", "b", "a"])
    assert genotypes.donors == ("b", "a")
    assert genotypes.report.only_in_file == ("c",)
    assert genotypes.report.only_asked == ("x",)
    assert genotypes.dosage(Interval("chr1", 0, 40))[0].tolist() == [[2], [1]]
    said = genotypes.report.in_words
    assert said == ["1 records, 1 variants", "1 donors in the VCF alone, left out", "1 donors not in the VCF, left out"]


def test_a_random_phase_depends_on_donor_place_and_seed_alone(genome: Genome, tmp_path: Path) -> None:
    places = [p for p, base in enumerate(SEQUENCE, start=1) if base == "A"]
    rows = [(p, "A", "C", "0/1 0/1") for p in places]
    path = vcf(tmp_path / "in.vcf", rows)
    both = read_genotypes(path, genome, unphased="random")
    phase = both.alleles(slice(None))
    assert (phase.sum(axis=1) == 1).all()
    assert 0 < phase[:, 0].sum() < phase[:, 0].size
    alone = read_genotypes(vcf(tmp_path / "b.vcf", rows[3:]), genome, unphased="random", donors=["b"])
    assert np.array_equal(alone.alleles(slice(None))[:, :, 0], phase[3:, :, 1])
    other = read_genotypes(path, genome, unphased="random", seed=1)
    assert not np.array_equal(other.alleles(slice(None)), phase)
    assert "phase drawn at random" in both.report.in_words[1]


def test_three_slots_are_shuffled_and_phased_calls_are_not(genome: Genome, tmp_path: Path) -> None:
    rows = [(p, "A", "C", "0/0/1 0|0|1") for p, base in enumerate(SEQUENCE, start=1) if base == "A"]
    found = read_genotypes(vcf(tmp_path / "in.vcf", rows), genome, unphased="random").alleles(slice(None))
    assert (found.sum(axis=1) == 1).all()
    assert found[:, 2, 1].all()
    assert found[:, :, 0].any(axis=0).all()


def test_a_phase_set_is_turned_as_a_whole(genome: Genome, tmp_path: Path) -> None:
    places = [p for p, base in enumerate(SEQUENCE, start=1) if base == "A"]
    sets = [place // 8 for place in places]
    first = np.array([number % 2 for number in range(len(places))])  # slot of the alternate allele in the file
    rows = [
        (p, "A", "C", f"{'1|0' if not slot else '0|1'}:{s} 0|1") for p, s, slot in zip(places, sets, first, strict=True)
    ]
    genotypes = read_genotypes(vcf(tmp_path / "in.vcf", rows), genome, unphased="random")
    found = genotypes.alleles(slice(None))
    assert genotypes.report.counts["phase_sets"] == len(set(sets)) - 1
    turned = found[:, 1, 0] != first
    each = [set(turned[np.array(sets) == s].tolist()) for s in sorted(set(sets))]
    assert all(len(one) == 1 for one in each)
    assert set.union(*each) == {False, True}
    assert found[:, 1, 1].all()  # calls without a set stand as they are
    assert "each set on haplotypes drawn at random" in genotypes.report.in_words[1]


def test_everything_is_said_at_once(genome: Genome, tmp_path: Path) -> None:
    rows = [(2, "C", "T", "0/1 0|0"), (3, "G", "A", "./. 0|1"), (4, "A", "C", "0|1 0|0"), (5, "T", "<DEL>", "1 0|0")]
    with pytest.raises(DataError) as caught:
        read_genotypes(vcf(tmp_path / "in.vcf", rows), genome)
    assert len(caught.value.parts) == 5


@pytest.mark.parametrize("form", ["vcf.gz", "bcf"])
def test_compressed_forms(form: str, genome: Genome, tmp_path: Path) -> None:
    plain = vcf(tmp_path / "in.vcf", [SNV, (9, "A", "AT", "1|1 0|1")])
    packed = tmp_path / f"in.{form}"
    with pysam.VariantFile(str(plain)) as source, pysam.VariantFile(str(packed), "w", header=source.header) as out:
        for record in source:
            out.write(record)
    assert np.array_equal(read_genotypes(packed, genome).bits, read_genotypes(plain, genome).bits)
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(DataError, match="truncated"):
        read_genotypes(packed, genome)


def test_files_that_are_none(genome: Genome, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_genotypes(tmp_path / "no.vcf", genome)
    with pytest.raises(DataError, match="the VCF has no records"):
        read_genotypes(vcf(tmp_path / "empty.vcf", []), genome)
    with pytest.raises(DataError, match="the VCF has no donors"):
        read_genotypes(vcf(tmp_path / "sites.vcf", [], donors=""), genome)
    with pytest.raises(DataError, match=r"record 2: this is not a record.*Give 11 columns"):
        read_genotypes(vcf(tmp_path / "short.vcf", [SNV], text="chr1\t5\n"), genome)
    path = vcf(tmp_path / "depth.vcf", [SNV])
    path.write_text(path.read_text().replace("\tGT\t", "\tDP\t"))
    with pytest.raises(DataError, match="no genotypes: 'DP'"):
        read_genotypes(path, genome)
    path.write_text(path.read_text().replace("\tDP\t", "\tGT:DP\t").replace("0|1", "0|1:7").replace("0|0", "0|0:9"))
    assert read_genotypes(path, genome).alleles(slice(None))[0].tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(
    ("ref", "alt", "shared"),
    [
        ("A", "C", (0, 0)),
        ("AA", "A", (1, 0)),
        ("AAT", "AT", (1, 1)),
        ("GA", "A", (0, 1)),
        ("ACG", "ATG", (1, 1)),
        ("A", "ATA", (1, 0)),
    ],
)
def test_shared_bases(ref: str, alt: str, shared: tuple[int, int]) -> None:
    assert trimmed(ref, alt) == shared
