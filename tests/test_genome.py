from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pysam
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqgraft.errors import DataError, RunError
from seqgraft.genome import Genome, Interval, Variant, match_chroms, read_bed, read_bed_table, read_gtf, read_vcf
from seqgraft.sequence import decode

FASTA = ">one some words\nACGTN\nacgtn\n>two\nRYGG\r\n\nTT\n"
positions = st.integers(-(10**6), 10**9)
lengths = st.integers(0, 10**6)


# Intervals


@given(positions, lengths, lengths)
def test_resize_keeps_the_centre(start: int, length: int, wanted: int) -> None:
    interval = Interval("chr1", start, start + length, "-")
    resized = interval.resize(wanted)
    assert resized.length == wanted
    assert resized.strand == "-"
    assert 0 <= (interval.start + interval.end) - (resized.start + resized.end) <= 1
    if (wanted - length) % 2 == 0:
        assert resized.resize(length) == interval


@given(positions, lengths, st.integers(-1000, 1000))
def test_shift_comes_back(start: int, length: int, bases: int) -> None:
    interval = Interval("chr1", start, start + length)
    assert interval.shift(bases).length == length
    assert interval.shift(bases).shift(-bases) == interval


@given(*[st.integers(0, 30)] * 4)
def test_overlap_is_a_shared_base(a: int, b: int, c: int, d: int) -> None:
    first, second = Interval("chr1", min(a, b), max(a, b)), Interval("chr1", min(c, d), max(c, d))
    shared = set(range(first.start, first.end)) & set(range(second.start, second.end))
    assert first.overlaps(second) == second.overlaps(first) == bool(shared)
    assert not first.overlaps(Interval("chr2", second.start, second.end))


def test_bad_intervals() -> None:
    with pytest.raises(DataError, match="chr1:5-4: the interval ends before it starts"):
        Interval("chr1", 5, 4)
    with pytest.raises(DataError, match="strand is unknown: 'x'"):
        Interval("chr1", 1, 4, "x")
    assert str(Interval("chr1", 1, 4, "-")) == "chr1:1-4(-)"


# Genomes


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    return write(tmp_path / "a.fa", FASTA)


def test_fasta(fasta: Path, tmp_path: Path) -> None:
    genome = Genome.open(fasta, tmp_path / "cache")
    assert genome.chroms == {"one": 10, "two": 6}
    assert decode(genome.chrom_codes("one")) == "ACGTNACGTN"  # lower case is the same base
    assert decode(genome.chrom_codes("two")) == "NNGGTT"
    assert genome.ambiguous == 2
    assert isinstance(genome.chrom_codes("two"), np.memmap)
    assert not genome.chrom_codes("two").flags.writeable


def test_beyond_the_contig_is_n(fasta: Path) -> None:
    genome = Genome.open(fasta)
    assert decode(genome.codes(Interval("two", -2, 8))) == "NNNNGGTTNN"
    assert decode(genome.codes(Interval("two", 20, 23))) == "NNN"
    assert genome.codes(Interval("two", 3, 3)).size == 0


@pytest.mark.parametrize("compress", ["bgzip", "gzip"])
def test_compressed_is_the_same(compress: str, tmp_path: Path, fasta: Path) -> None:
    path = tmp_path / "a.fa.gz"
    if compress == "bgzip":
        pysam.tabix_compress(str(fasta), str(path))
    else:
        path.write_bytes(gzip.compress(FASTA.encode()))
    packed, plain = Genome.open(path), Genome.open(fasta)
    assert packed.chroms == plain.chroms
    assert (packed.chrom_codes("one") == plain.chrom_codes("one")).all()


def test_built_once(fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = Genome.open(fasta, cache)
    monkeypatch.setattr("seqgraft.genome._build", None)
    assert Genome.open(fasta, cache) == first
    copy = write(tmp_path / "copy.fa", FASTA)
    assert Genome.open(copy, cache).hash == first.hash
    assert len(list(cache.glob("*.npy"))) == 1
    assert not list(cache.glob(".*"))


def test_changed_content_is_another_genome(fasta: Path) -> None:
    before = Genome.open(fasta)
    fasta.write_text(FASTA + "A\n")
    after = Genome.open(fasta)
    assert after.hash != before.hash
    assert after.chroms["two"] == 7


def test_pickle_is_small(fasta: Path) -> None:
    genome = Genome.open(fasta)
    assert len(pickle.dumps(genome)) < 1000
    assert pickle.loads(pickle.dumps(genome)) == genome


def test_long_contigs_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    expected = {f"c{i}": "".join(rng.choice(list("ACGTN"), size)) for i, size in enumerate([1, 997, 60, 3001])}
    lines = [f">{name}\n" + "\n".join(s[k : k + 61] for k in range(0, len(s), 61)) for name, s in expected.items()]
    path = write(tmp_path / "long.fa", "\n".join(lines))
    import seqgraft.genome as module

    read = module.read_lines
    for chunk in (1, 7, 62, 500):
        monkeypatch.setattr(module, "read_lines", lambda p, _, chunk=chunk: read(p, chunk))
        genome = Genome.open(path, tmp_path / f"cache{chunk}")
        assert {name: decode(genome.chrom_codes(name)) for name in genome.chroms} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the FASTA file is empty"),
        ("ACGT\n", "does not start with '>': 'ACGT'"),
        (">a\nAC\n>a\nAC\n", "in the file twice: 'a'"),
        (">a\n>b\nAC\n", "has no bases: 'a'"),
        (">a\nAC\n>b\n", "has no bases: 'b'. Remove it; the file may be truncated"),
        (">\nAC\n", "a contig has no name"),
        (">a\nACGT\nAC*T\n", "contig a, base 7: .*not a base: '\\*'"),
    ],
)
def test_bad_fasta(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.fa", text)
    with pytest.raises(DataError, match=message) as caught:
        Genome.open(path, tmp_path / "cache")
    assert "bad.fa" in str(caught.value)
    assert not list((tmp_path / "cache").glob("*codes*"))


@pytest.mark.parametrize("compress", ["bgzip", "gzip"])
def test_truncated_fasta(compress: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain = write(tmp_path / "a.fa", ">a\n" + "".join(rng.choice(list("ACGT"), 200_000)) + "\n")
    path = tmp_path / "a.fa.gz"
    if compress == "bgzip":
        pysam.tabix_compress(str(plain), str(path))
        content = path.read_bytes()[:-28]  # whole blocks, but no end marker
    else:
        content = gzip.compress(plain.read_bytes())[:-100]
    path.write_bytes(content)
    with pytest.raises(DataError, match="compressed file is truncated"):
        Genome.open(path)


def test_truncated_plain_fasta_does_not_fit_its_index(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fa", ">a\nACGT\n>b\nACGTACGT\n")
    pysam.faidx(str(path))
    Genome.open(path)
    path.write_text(">a\nACGT\n>b\nACG\n")
    with pytest.raises(DataError, match=r"contig 'b' has 3 bp, but its index a.fa.fai says: 8. .*truncated"):
        Genome.open(path)


def test_missing_fasta_and_cache(tmp_path: Path, fasta: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Genome.open(tmp_path / "none.fa")
    blocked = write(tmp_path / "file", "")
    with pytest.raises(RunError, match="Set SEQGRAFT_CACHE"):
        Genome.open(fasta, blocked / "cache")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fasta: Path) -> None:
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "own"))
    Genome.open(fasta)
    assert len(list((tmp_path / "own" / "genomes").glob("*.codes.npy"))) == 1
    monkeypatch.delenv("SEQGRAFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    Genome.open(fasta)
    if os.name == "posix":
        assert list((tmp_path / "xdg" / "seqgraft" / "genomes").glob("*.json"))


def test_a_file_may_have_contigs_that_the_genome_lacks() -> None:
    genome = {"chr1": 5, "chr2": 5}
    match_chroms(["chr1", "scaffold_7"], genome, "genes.gtf", more=True)
    with pytest.raises(DataError, match="scaffold_7"):
        match_chroms(["chr1", "scaffold_7"], genome, "genes.gtf")
    with pytest.raises(DataError, match="scaffold_7"):
        match_chroms(["scaffold_7"], genome, "genes.gtf", more=True)
    with pytest.raises(DataError, match=r"no chromosome: '1'.*pass rename: \{'1': 'chr1', '2': 'chr2'\}"):
        match_chroms(["1", "scaffold_7", "2", "1"], {"chr1": 9, "chr2": 9}, "genes.gtf")
    with pytest.raises(DataError, match=r"'2'.*rename: \{'2': 'chr2'\}"):
        match_chroms(["chr1", "2"], genome, "genes.gtf", more=True)


def test_match_chroms() -> None:
    match_chroms(["chr1", "chrM"], {"chr1": 5, "chrM": 5}, "here")
    with pytest.raises(DataError, match=r"a.bed: the genome has no chromosome: '8'.*rename: \{'8': 'chr8'\}"):
        match_chroms(["8"], {"chr8": 5}, "a.bed")
    with pytest.raises(DataError, match=r"rename: \{'chr8': '8'\}"):
        match_chroms(["chr8"], {"8": 5}, "a.bed")
    with pytest.raises(
        DataError, match=r"'chrQ'. Use names that match the FASTA \(chr1, chr2, chr3, chr4, chr5, \.\.\.\)"
    ):
        match_chroms(["chrQ"], {f"chr{i}": 5 for i in range(1, 9)}, "a.bed")


# BED, GTF, VCF


def test_bed(tmp_path: Path) -> None:
    text = "track name=x\n# note\nchr1\t5\t9\n\nchr2\t0\t3\tpeak\t7.5\t-\textra\nchr1 4 8 . . +\n"
    path = write(tmp_path / "a.bed", text)
    assert read_bed(path) == [Interval("chr1", 5, 9), Interval("chr2", 0, 3, "-"), Interval("chr1", 4, 8, "+")]
    table = read_bed_table(path)
    assert table.columns.tolist() == ["chrom", "start", "end", "name", "score", "strand"]
    assert table["name"].tolist() == [".", "peak", "."]
    assert table["score"].tolist()[1] == 7.5
    assert table["score"].isna().tolist() == [True, False, True]
    packed = tmp_path / "a.bed.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_bed(packed) == read_bed(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the BED file has no intervals. Check the file"),
        ("# only a comment\n", "the BED file has no intervals"),
        ("chr1\t5\n", "line 1: this is not a BED row: "),
        ("chr1\t5\tx\n", "line 1: this is not a BED row"),
        ("chr1\t-5\t5\n", "line 1: this is not a BED row"),
        ("chr1\t1\t2\nchr1\t9\t9\n", "line 2: the interval has no bases: '9-9'"),
        ("chr1\t1\t2\ta\t0\tplus\n", "strand is unknown: 'plus'"),
        ("chr1\t5\n" * 30, "30 problems were found"),
    ],
)
def test_bad_bed(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_bed_table(write(tmp_path / "a.bed", text))


def test_bed_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.bed"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="not text"):
        read_bed(path)
    with pytest.raises(DataError, match="does not exist"):
        read_bed(tmp_path / "none.bed")


GTF = (
    "#!genome-build R64\n"
    'I\tx\texon\t101\t200\t.\t+\t.\tgene_id "G1"; transcript_id "T1"; gene_name "ABC"; gene_biotype "protein_coding";\n'
    'I\tx\tCDS\t101\t190\t.\t+\t0\tgene_id "G1";\n'
    'II\tx\texon\t1\t5\t.\t-\t.\tgene_id "G2"; note "a; gene_name";\n'
)


def test_gtf(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gtf", GTF)
    table = read_gtf(path, rename={"I": "chrI", "II": "chrII"})
    assert table["chrom"].tolist() == ["chrI", "chrII"]
    assert table["start"].tolist() == [100, 0]
    assert table["end"].tolist() == [200, 5]
    assert table["gene_name"].tolist() == ["ABC", "G2"]
    assert table["transcript_id"].tolist() == ["T1", ""]
    assert table["gene_biotype"].tolist() == ["protein_coding", ""]
    assert len(read_gtf(path, "CDS")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows of the feature: 'exon'"),
        ("I\tx\texon\t1\t5\n", "line 1: this is not a GTF row"),
        ("I\tx\texon\t1\t5\t.\t-\t.\tID=gene1;Name=x\n", "a row has no gene_id.*rather than GFF"),
    ],
)
def test_bad_gtf(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_gtf(write(tmp_path / "a.gtf", text))


HEADER = "##fileformat=VCFv4.2\n##contig=<ID=chr1>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def test_vcf(tmp_path: Path) -> None:
    rows = "chr1\t5\t.\tA\tC,<DEL>\t.\t.\t.\nchr1\t6\trs1\tA\t.\t.\t.\t.\nchr1\t9\trs2\tAC\tA\t.\t.\t.\n"
    path = write(tmp_path / "a.vcf", HEADER + rows)
    assert list(read_vcf(path)) == [
        Variant("chr1", 5, "A", "C"),
        Variant("chr1", 5, "A", "<DEL>"),
        Variant("chr1", 9, "AC", "A", "rs2"),
    ]
    assert str(Variant("chr1", 9, "AC", "A", "rs2")) == "chr1:9:AC>A"


def test_a_header_without_contigs_is_no_matter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    columns = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    (found,) = read_vcf(write(tmp_path / "a.vcf", columns + "chr1\t5\tv\tA\tC\t.\t.\t.\n"))
    assert found == Variant("chr1", 5, "A", "C", "v")
    assert capfd.readouterr().err == ""


def test_bad_vcf(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list(read_vcf(tmp_path / "none.vcf"))
    with pytest.raises(
        DataError, match=r"text.vcf: .*cannot be read \(no header of VCF\)\. It may be truncated or not VCF"
    ):
        list(read_vcf(write(tmp_path / "text.vcf", "chr1\t5\n")))
    with pytest.raises(DataError, match="the VCF file is empty, without even a header"):
        list(read_vcf(write(tmp_path / "zero.vcf", "")))
    broken = HEADER + "chr1\t5\t.\tA\tC\t.\t.\t.\nchr1\tx\t.\tA\tC\t.\t.\t.\n"
    (tmp_path / "plain.vcf.gz").write_bytes(gzip.compress((HEADER + "chr1\t5\t.\tA\tC\t.\t.\t.\n").encode()))
    with pytest.raises(DataError, match=r"gzipped, but not with bgzip\. .*compress it with bgzip"):
        list(read_vcf(tmp_path / "plain.vcf.gz"))
    with pytest.raises(DataError, match="look after chr1:5"):
        list(read_vcf(write(tmp_path / "row.vcf", broken)))


# Real files


def test_yeast(shared: Path) -> None:
    path = shared / "data" / "yeast" / "sacCer3.fa.gz"
    genome = Genome.open(path)
    with pysam.FastaFile(str(path)) as reference:
        assert genome.chroms == dict(zip(reference.references, reference.lengths, strict=True))
        for chrom in ("chrI", "chrXVI", "chrM"):
            assert decode(genome.chrom_codes(chrom)) == reference.fetch(chrom).upper()


def test_yeast_genes_have_other_names(shared: Path) -> None:
    folder = shared / "data" / "yeast"
    genome = Genome.open(folder / "sacCer3.fa.gz")
    gtf = folder / "Saccharomyces_cerevisiae.R64-1-1.81.gtf.gz"
    names = read_gtf(gtf)["chrom"].unique()
    with pytest.raises(DataError, match=r"rename: \{'IV': 'chrIV', '"):
        match_chroms(names, genome, gtf)
    rename = {chrom.removeprefix("chr"): chrom for chrom in genome.chroms} | {"Mito": "chrM"}
    exons = read_gtf(gtf, rename=rename)
    match_chroms(exons["chrom"].unique(), genome, gtf)
    assert exons["gene_id"].nunique() == 7126
    assert (exons["end"] <= exons["chrom"].map(genome.chroms)).all()
