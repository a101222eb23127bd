"""Variants are checked against the FASTA before anything is scored: what is skipped, why, and what refuses a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pysam
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqgraft.errors import DataError
from seqgraft.genome import Genome, Variant, read_vcf, read_vcf_rows, vcf_text, write_vcf
from seqgraft.sequence import apply_variants, decode, encode
from seqgraft.variants.alleles import REASONS, AlleleCheck, CheckedFile, check_vcf

SEQUENCE = "ACGTTGCAAC" * 4 + "acgtn" + "RYACG" + "TTGCA" * 10  # 100 bases; N at 44, 45 and 46 from 0
WINDOW, TARGET = 64, 48


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text(f">chr1 text\n{SEQUENCE}\n>chr2\n{SEQUENCE[::-1]}\n>short\nACGTACGT\n")
    return Genome.open(path)


def vcf(path: Path, rows: Sequence[tuple[str, int, str, str]], contigs: Sequence[str] = ("chr1", "chr2")) -> Path:
    """A VCF of (chromosome, position, REF, ALT) rows with IDs v1, v2, ..."""
    header = ["##fileformat=VCFv4.2", *(f"##contig=<ID={c}>" for c in dict.fromkeys([*contigs, *(r[0] for r in rows)]))]
    header.append('##INFO=<ID=X,Number=1,Type=Integer,Description="which">')
    header.append("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO")
    lines = [f"{c}\t{p}\tv{i}\t{r}\t{a}\t.\tPASS\tX={i}" for i, (c, p, r, a) in enumerate(rows, start=1)]
    path.write_text("\n".join([*header, *lines]) + "\n")
    return path


def snv(position: int, chrom: str = "chr1") -> tuple[str, int, str, str]:
    """A transition that fits the FASTA."""
    letters = (SEQUENCE if chrom == "chr1" else SEQUENCE[::-1]).upper()
    ref = letters[position - 1]
    return chrom, position, ref, {"A": "G", "G": "A", "C": "T", "T": "C"}[ref]


GOOD = [snv(p, c) for c in ("chr1", "chr2") for p in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 99, 100)]


def check(genome: Genome, path: Path, *, allow: bool = True, **rename: str) -> CheckedFile:
    asked = AlleleCheck(genome, WINDOW, TARGET, rename)
    return check_vcf(path, asked, path.with_suffix(".skipped.tsv"), allow_skipped=allow)


BAD = [
    (("chr9", 5, "A", "G"), "the chromosome is not in the FASTA"),
    (("chr1", 5, "T", "."), "the record has no alternative allele"),
    (("chr1", 5, "T", "<DEL>"), "the allele is symbolic or a breakend"),
    (("chr1", 5, "T", "T[chr2:9["), "the allele is symbolic or a breakend"),
    (("chr1", 5, "T", ".A"), "the allele is symbolic or a breakend"),
    (("chr1", 5, "T", "*"), "the allele is *, the place of another record's deletion"),
    (("chr1", 5, "T", "N"), "an allele has letters other than A, C, G, T"),
    (("chr1", 5, "T", "t"), "REF and ALT are the same"),
    (("chr1", 100, "AC", "A"), "it lies beyond the end of its chromosome"),
    (("chr1", 101, "A", "C"), "it lies beyond the end of its chromosome"),
    (("chr1", 0, "A", "C"), "it lies beyond the end of its chromosome"),
    (("chr1", 5, "T", "T" * 13), "an allele is longer than a quarter of what the model predicts"),
    (("short", 2, "C", "A"), "the chromosome is shorter than a quarter of the model's window"),
    (("chr1", 45, "A", "C"), "the FASTA has an unknown base there"),
    (("chr1", 43, "GTA", "C"), "the FASTA has an unknown base there"),
    (("chr1", 5, "G", "C"), "REF does not match the FASTA"),
    (("chr1", 5, "C", "T"), "the alleles are swapped: ALT matches the FASTA, REF does not"),
    (snv(1), "it stands in the file before"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[f"{row} {reason[:20]}" for row, reason in BAD])
def test_every_reason(row: tuple[str, int, str, str], reason: str, genome: Genome, tmp_path: Path) -> None:
    path = vcf(tmp_path / "in.vcf", [*GOOD, row])
    found = check(genome, path)
    assert found.skipped == {reason: 1}
    listed = pd.read_csv(tmp_path / "in.skipped.tsv", sep="\t", keep_default_na=False)
    assert listed.iloc[0].tolist() == [len(GOOD) + 1, *row, f"v{len(GOOD) + 1}", reason]
    assert [(v.variant.chrom, v.variant.position, v.variant.ref, v.variant.alt) for v in found.variants()] == GOOD
    with pytest.raises(DataError, match=r"only 24 of 25 variants can be scored \(1: .*in.skipped.tsv.*allow_skipped"):
        check(genome, path, allow=False)


def test_every_reason_is_tested() -> None:
    elsewhere = {"the model scores single-base substitutions only"}  # test_masked.py
    assert {reason for _, reason in BAD} | elsewhere == set(REASONS[1:])


def test_lower_case_is_no_mismatch(genome: Genome, tmp_path: Path) -> None:
    """Neither in the FASTA (41 to 44) nor in the VCF."""
    found = check(
        genome, vcf(tmp_path / "in.vcf", [*GOOD, ("chr1", 41, "A", "g"), ("chr1", 42, "cg", "t")]), allow=False
    )
    assert [str(v.variant) for v in found.variants()][-2:] == ["chr1:41:A>G", "chr1:42:CG>T"]


def test_every_allele_of_a_record_is_checked(genome: Genome, tmp_path: Path) -> None:
    path = vcf(tmp_path / "in.vcf", [*GOOD, ("chr1", 5, "T", "A,<DEL>,G,TA"), ("chr1", 6, "G", "T")])
    found = [v for v in check(genome, path).variants() if v.row > len(GOOD)]
    assert [(v.row, v.allele, v.variant.alt) for v in found] == [
        (25, 1, "A"),
        (25, 3, "G"),
        (25, 4, "TA"),
        (26, 1, "T"),
    ]


def test_one_in_a_hundred_may_be_skipped(genome: Genome, tmp_path: Path) -> None:
    rows = [snv(p) for p in range(1, 41)] + [snv(p, "chr2") for p in range(1, 51)]
    rows += [(c, p, r, r + a) for c, p, r, a in rows[:10]]
    check(genome, vcf(tmp_path / "in.vcf", [*rows[:99], ("chr1", 5, "T", "*")]), allow=False)
    with pytest.raises(DataError, match="only 97 of 99"):
        check(genome, vcf(tmp_path / "in.vcf", [*rows[:97], ("chr1", 5, "T", "*"), ("chr1", 5, "T", "*")]), allow=False)


def test_a_repeat_is_scored_once(genome: Genome, tmp_path: Path) -> None:
    """Also far from the first, in another case and under another name of the chromosome; another ALT is no repeat."""
    path = vcf(tmp_path / "in.vcf", [("1", *snv(1)[1:]), *GOOD[1:], ("chr1", 1, "a", "g"), ("chr1", 1, "A", "C")])
    found = check(genome, path, **{"1": "chr1"})
    assert found.skipped == {"it stands in the file before": 1}
    assert found.reasons[-2:].tolist() == [REASONS.index("it stands in the file before"), 0]
    first = next(found.variants())
    assert (first.name, first.variant.chrom) == ("1", "chr1")


def test_the_whole_file_is_diagnosed_first(genome: Genome, tmp_path: Path) -> None:
    """With ``allow_skipped`` too: nothing of such a file is right."""
    for name, rows, words in (
        (
            "names",
            [(c.removeprefix("chr"), p, r, a) for c, p, r, a in GOOD],
            r"no chromosome: '1'.*rename: \{'1': 'chr1'",
        ),
        ("others", [("scaffold_7", p, r, a) for c, p, r, a in GOOD], r"no chromosome: 'scaffold_7'.*chr1, chr2"),
        ("assembly", [(c, p + 37, r, a) for c, p, r, a in GOOD[:10]] + GOOD[:9], "another assembly.*genome.fa"),
        ("swapped", [(c, p, a, r) for c, p, r, a in GOOD], "swapped in many variants: '24 of 24'.*bcftools"),
    ):
        with pytest.raises(DataError, match=words):
            check(genome, vcf(tmp_path / f"{name}.vcf", rows))
        assert not (tmp_path / f"{name}.skipped.tsv").exists()
    names = [(c.removeprefix("chr"), p, r, a) for c, p, r, a in GOOD]
    assert len(list(check(genome, vcf(tmp_path / "a.vcf", names), **{"1": "chr1", "2": "chr2"}).variants())) == 24
    with pytest.raises(DataError, match="has no variants"):
        check(genome, vcf(tmp_path / "empty.vcf", []))
    with pytest.raises(DataError, match="none of its variants can be scored"):
        check(genome, vcf(tmp_path / "none.vcf", [("chr1", 5, "T", "*")]))


def test_shards_are_the_file(genome: Genome, tmp_path: Path) -> None:
    rows = [*GOOD, ("chr1", 5, "T", "A,*,G"), ("chr1", 12, "C", "*")]
    found = check(genome, vcf(tmp_path / "in.vcf", rows))
    whole = list(found.variants())
    for shards in (1, 3, 7, 40):
        parts = [found.rows_of((i, shards)) for i in range(1, shards + 1)]
        assert [v for rows in parts for v in found.variants(rows)] == whole
        assert sum(found.count(rows) for rows in parts) == len(whole)
    found.write_skipped(tmp_path / "last.tsv", found.rows_of((3, 3)))
    assert pd.read_csv(tmp_path / "last.tsv", sep="\t")["row"].tolist() == [25, 26]


# VCF files


def test_rows_number_records_and_alleles(tmp_path: Path) -> None:
    path = vcf(tmp_path / "in.vcf", [("chr1", 5, "T", "A,G"), ("chr1", 6, "G", "."), ("chr1", 7, "C", "T")])
    found = [(row, allele, variant.alt) for row, allele, variant in read_vcf_rows(path)]
    assert found == [(1, 1, "A"), (1, 2, "G"), (2, 1, "."), (3, 1, "T")]
    assert [v.alt for v in read_vcf(path)] == ["A", "G", "T"]


def test_text_of_a_vcf_is_kept(tmp_path: Path) -> None:
    """Compressed with an index where it is sorted; BCF is read too."""
    path = vcf(tmp_path / "in.vcf", GOOD)
    lines = path.read_text().splitlines()
    assert list(vcf_text(path)) == lines
    assert write_vcf(tmp_path / "a.vcf.gz", lines)
    assert list(vcf_text(tmp_path / "a.vcf.gz")) == lines
    with pysam.VariantFile(str(tmp_path / "a.vcf.gz")) as file:
        assert [record.pos for record in file.fetch("chr2", 90, 100)] == [99, 100]
    assert not write_vcf(tmp_path / "b.vcf.gz", lines[:-2] + lines[-1:] + lines[-2:-1])
    assert not (tmp_path / "b.vcf.gz.tbi").exists()
    with (
        pysam.VariantFile(str(path)) as file,
        pysam.VariantFile(str(tmp_path / "c.bcf"), "wb", header=file.header) as out,
    ):
        for record in file:
            out.write(record)
    assert [line for line in vcf_text(tmp_path / "c.bcf") if line[0] != "#"] == [
        line for line in lines if line[0] != "#"
    ]


# Haplotypes


def slowly(text: str, edits: list[tuple[int, str, str]]) -> str:
    """The haplotype, edit by edit from the right."""
    for offset, ref, alt in sorted(edits, reverse=True):
        assert text[offset : offset + len(ref)] == ref
        text = text[:offset] + alt + text[offset + len(ref) :]
    return text


@st.composite
def haplotypes(draw: st.DrawFn) -> tuple[str, list[tuple[int, str, str]]]:
    text = draw(st.text("ACGT", min_size=1, max_size=40))
    edits, at = [], 0
    while at < len(text) and draw(st.booleans()):
        offset = draw(st.integers(at, len(text) - 1))
        size = draw(st.integers(1, min(6, len(text) - offset)))
        edits.append((offset, text[offset : offset + size], draw(st.text("ACGT", max_size=6))))
        at = offset + size
    return text, edits


@given(haplotypes(), st.randoms())
def test_haplotypes(case: tuple[str, list[tuple[int, str, str]]], random: np.random.Generator) -> None:
    text, edits = case
    expected = slowly(text, edits)
    random.shuffle(edits)  # type: ignore[arg-type]
    found = apply_variants(encode(text), [(offset, encode(ref), encode(alt)) for offset, ref, alt in edits])
    assert decode(found) == expected


def test_edits_that_do_not_fit() -> None:
    codes = encode("ACGTACGT")
    for edits, words in (
        ([(2, "GT", "A"), (3, "T", "A")], "Two edits overlap: 3"),
        ([(7, "TA", "A")], "reaches beyond the sequence: 7"),
        ([(-1, "A", "C")], "reaches beyond"),
        ([(0, "C", "A")], "reference allele is another: 'C'. The sequence has A there"),
    ):
        with pytest.raises(DataError, match=words):
            apply_variants(codes, [(offset, encode(ref), encode(alt)) for offset, ref, alt in edits])


def test_a_variant_names_itself() -> None:
    assert str(Variant("chr1", 5, "T", "TA")) == "chr1:5:T>TA"
