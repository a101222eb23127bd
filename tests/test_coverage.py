from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pybigtools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqgraft.data import binned, coverage
from seqgraft.data.coverage import CoverageSource, prepare_coverage, retrack_dataset
from seqgraft.data.dataset import open_dataset
from seqgraft.data.folds import Folds
from seqgraft.data.tables import read_track_table
from seqgraft.data.tiles import overlapping, tile_regions
from seqgraft.errors import ConfigError, DataError, RunError, SeqgraftError
from seqgraft.genome import Genome, Interval
from seqgraft.tracks import read_bins, squash

LENGTHS = {"chr1": 2000, "chr2": 1010, "chr3": 900}
FOLDS = Folds(by="chromosome", valid=("chr2",), test=("chr3",))

Signal = dict[str, np.ndarray]


def write_bigwig(path: Path, signal: Signal) -> Path:
    """A bigWig of dense arrays; bases of value 0 stay uncovered."""
    records = [(c, int(i), int(i) + 1, float(v[i])) for c, v in signal.items() for i in np.flatnonzero(v)]
    pybigtools.open(str(path), "w").write({chrom: len(values) for chrom, values in signal.items()}, records)
    return path


def make_signal(seed: int, lengths: dict[str, int] = LENGTHS) -> Signal:
    rng = np.random.default_rng(seed)
    return {chrom: rng.poisson(0.7, size).astype(np.float64) for chrom, size in lengths.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small genome and three bigWigs, made once: read only."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    text = "".join(f">{chrom}\n{''.join(rng.choice(list('ACGT'), size))}\n" for chrom, size in LENGTHS.items())
    (folder / "genome.fa").write_text(text)
    for number, name in enumerate(["rna+", "rna-", "atac"]):
        write_bigwig(folder / f"{name}.bw", make_signal(number))
    return folder


def rows_of(files: Path) -> list[dict[str, Any]]:
    return [{"name": name, "file": str(files / f"{name}.bw"), "squash": "sqrt"} for name in ("rna+", "rna-", "atac")]


def source_of(files: Path, **changes: Any) -> CoverageSource:
    settings: dict[str, Any] = {
        "fasta": files / "genome.fa",
        "tracks": rows_of(files),
        "window": 300,
        "target_length": 200,
        "bin_size": 20,
        "folds": FOLDS,
    }
    return CoverageSource(**{**settings, **changes})


def bed(path: Path, *rows: tuple[str, int, int]) -> Path:
    path.write_text("".join(f"{chrom}\t{start}\t{end}\n" for chrom, start, end in rows))
    return path


def test_tiles_and_bins(files: Path, tmp_path: Path) -> None:
    dataset = prepare_coverage(source_of(files), tmp_path / "data")
    assert len(dataset) == 10 + 5 + 4
    assert dataset.regions.groupby("fold").size().to_dict() == {"train": 10, "valid": 5, "test": 4}
    assert dataset.regions["end"].max() == 2000
    assert dataset.targets.shape == (19, 3, 10)
    assert dataset.targets.dtype == np.float32
    for row, region in dataset.regions.iterrows():
        for position, name in enumerate(dataset.tracks.names):
            place = Interval(region["chrom"], region["start"], region["end"])
            np.testing.assert_allclose(dataset.targets[row, position], read_bins(files / f"{name}.bw", place, 20))
    assert dataset.mask is None
    assert dataset.tracks.permutation.tolist() == [1, 0, 2]
    totals = [sum(values.sum() for values in make_signal(seed).values()) for seed in range(3)]
    assert dataset.tracks.frame["depth"].tolist() == totals


def test_what_is_recorded(files: Path, tmp_path: Path) -> None:
    dataset = prepare_coverage(source_of(files), tmp_path / "data")
    content = json.loads((tmp_path / "data" / "dataset.json").read_text(), parse_constant=pytest.fail)
    assert content["kind"] == "coverage"
    assert (content["window"], content["bins"], content["bin_size"]) == (300, 10, 20)
    assert [Path(s["path"]).name for s in content["sources"]] == ["genome.fa", "rna+.bw", "rna-.bw", "atac.bw"]
    assert content["settings"]["tracks"][2]["clip"] is None
    assert content["settings"]["folds"]["valid"] == ["chr2"]
    assert content["notes"]["regions"] == 19
    assert dataset.info.genome == {"path": str(files / "genome.fa"), "hash": Genome.open(files / "genome.fa").hash}


def test_windows_reach_beyond_the_contig_and_targets_do_not(files: Path, tmp_path: Path) -> None:
    dataset = prepare_coverage(source_of(files, window=1000), tmp_path / "data")
    codes, lengths = dataset.sequences([0])
    assert lengths.tolist() == [1000]
    assert (codes[0, :400] == 4).all()
    assert (codes[0, 400:] != 4).all()


def test_one_file_may_be_several_tracks(files: Path, tmp_path: Path) -> None:
    file = str(files / "atac.bw")
    rows = [{"name": "a", "file": file}, {"name": "b", "file": file, "squash": "exp75", "statistic": "mean"}]
    dataset = prepare_coverage(source_of(files, tracks=rows), tmp_path / "data")
    np.testing.assert_array_equal(dataset.targets[:, 0], dataset.targets[:, 1])
    assert len(dataset.info.sources) == 2


def test_long_stretches_are_read_in_pieces(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(files, stride=70)
    whole = prepare_coverage(source, tmp_path / "whole")
    monkeypatch.setattr(binned, "SPAN", 450)
    pieces = prepare_coverage(source, tmp_path / "pieces")
    np.testing.assert_array_equal(whole.targets, pieces.targets)


@given(
    st.integers(1, 400), st.integers(1, 300), st.lists(st.tuples(st.integers(0, 1999), st.integers(1, 300)), max_size=4)
)
def test_tiles_lie_inside_contigs_and_outside_gaps(length: int, stride: int, cuts: list[tuple[int, int]]) -> None:
    genome = Genome(Path("a.fa"), "", LENGTHS, 0, {}, np.zeros(0, np.uint8))
    merged: list[list[int]] = []
    for start, size in sorted(cuts):
        end = min(start + size, 2000)
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    gaps = {"chr1": np.array(merged, dtype=np.int64).reshape(-1, 2)}
    tiles = tile_regions(genome, length, stride, ["chr3"], gaps)
    assert (tiles["end"] - tiles["start"] == length).all()
    assert not len(tiles) or tiles["start"].min() >= 0
    assert (tiles["end"] <= tiles["chrom"].map(LENGTHS)).all()
    assert "chr3" not in set(tiles["chrom"])
    for left, right in merged:
        first = tiles[tiles["chrom"] == "chr1"]
        assert ((first["end"] <= left) | (first["start"] >= right)).all()
    assert (tiles["chrom"] == "chr2").sum() == max(0, (1010 - length) // stride + 1)


def test_given_regions(files: Path, tmp_path: Path) -> None:
    path = bed(tmp_path / "r.bed", ("chr2", 400, 600), ("chr1", 500, 510), ("chr3", 0, 201), ("chr1", 500, 700))
    dataset = prepare_coverage(source_of(files, regions=path), tmp_path / "data")
    assert dataset.regions["start"].tolist() == [400, 405, 0, 500]
    assert (dataset.regions["end"] - dataset.regions["start"] == 200).all()
    assert dataset.regions["source_row"].tolist() == [0, 1, 2, 3]
    assert dataset.info.notes["resized_regions"] == 1
    np.testing.assert_allclose(dataset.targets[1, 2], read_bins(files / "atac.bw", Interval("chr1", 405, 605), 20))


def test_a_region_at_the_end_is_skipped_and_listed(files: Path, tmp_path: Path) -> None:
    good = [(chrom, start, start + 200) for chrom in LENGTHS for start in range(300, 660, 10)]
    path = bed(tmp_path / "r.bed", *good, ("chr2", 980, 1000))
    dataset = prepare_coverage(source_of(files, regions=path), tmp_path / "data")
    assert len(dataset) == len(good)
    assert dataset.info.notes["skipped"][0]["region"] == "chr2:980-1000"
    assert "beyond the contig" in dataset.info.notes["skipped"][0]["reason"]
    few = bed(tmp_path / "few.bed", *good[:5], ("chr2", 980, 1000))
    with pytest.raises(DataError, match=r"1 of 6 regions must be skipped.*'chr2:980-1000'"):
        prepare_coverage(source_of(files, regions=few), tmp_path / "other")


def test_unmappable_bins_are_masked_and_bad_tiles_left_out(files: Path, tmp_path: Path) -> None:
    rows = [("chr1", 0, 100), ("chr1", 239, 261), ("chr1", 410, 411), ("chr1", 630, 632)]
    source = source_of(files, unmappable=bed(tmp_path / "u.bed", *rows))
    dataset = prepare_coverage(source, tmp_path / "data")
    assert dataset.regions["start"].tolist()[:3] == [200, 400, 600]  # half of the first tile is unmappable
    assert dataset.mask is not None
    masked = [np.flatnonzero(~dataset.mask[row, 0]).tolist() for row in range(3)]
    assert masked == [[2], [], [1]]  # a bin with less than a tenth of it unmappable is mappable
    assert (dataset.mask == dataset.mask[:, :1]).all()
    assert dataset.info.notes["dropped_tiles"] == {"unmappable": 1, "unknown_bases": 0}
    assert dataset.targets[0, 0, 2] > 0  # the signal is kept below the mask
    assert np.isnan(dataset.squashed_targets([0])[0, :, 2]).all()


def test_unknown_bases_are_left_out(files: Path, tmp_path: Path) -> None:
    letters = np.array(list((files / "genome.fa").read_text()))
    letters[6 + 400 : 6 + 700] = "N"
    (tmp_path / "n.fa").write_text("".join(letters))
    dataset = prepare_coverage(source_of(files, fasta=tmp_path / "n.fa"), tmp_path / "data")
    assert dataset.regions["start"].tolist()[:4] == [0, 200, 800, 1000]
    assert dataset.info.notes["dropped_tiles"] == {"unmappable": 0, "unknown_bases": 2}


@given(
    st.lists(st.tuples(st.integers(0, 1980), st.integers(1, 150)), min_size=1, max_size=4),
    st.integers(0, 1800),
    st.integers(0, 100),
)
def test_blacklisted_bases_are_limited_to_the_median(spans: list[tuple[int, int]], start: int, seed: int) -> None:
    signal = np.random.default_rng(seed).gamma(1, 5, 2000)
    expected = signal[start : start + 200].copy()
    covered = np.zeros(2000, dtype=bool)
    for left, size in spans:
        covered[max(left - 20, 0) : left + size + 20] = True
    inside = covered[start : start + 200]
    expected[inside] = np.minimum(expected[inside], np.median(expected))

    merged: list[list[int]] = []  # as a BED file gives them
    for left, size in sorted(spans):
        if merged and left - 20 <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], left + size + 20)
        else:
            merged.append([left - 20, left + size + 20])
    found = list(overlapping({"c": np.array(merged)}, "c", start, start + 200))
    source = CoverageSource(Path("a"), [], 200, 200, 20, FOLDS)
    found_bins = coverage._bin(signal[start : start + 200], found, source)
    np.testing.assert_allclose(found_bins, expected.reshape(10, 20).sum(1))


def test_blacklist(files: Path, tmp_path: Path) -> None:
    plain = prepare_coverage(source_of(files), tmp_path / "plain")
    rows = [("chr1", 225, 255), ("chr2", 1000, 1010), ("chrUn", 1, 5)]  # contigs of other assemblies do no harm
    dataset = prepare_coverage(source_of(files, blacklist=bed(tmp_path / "b.bed", *rows)), tmp_path / "data")
    changed = np.argwhere((dataset.targets != plain.targets).any(axis=1))
    assert {tuple(place) for place in changed.tolist()} <= {(1, 0), (1, 1), (1, 2), (1, 3), (14, 9)}
    assert len(changed)
    assert (dataset.targets <= plain.targets).all()


def test_rename(files: Path, tmp_path: Path) -> None:
    signal = {chrom.removeprefix("chr"): values for chrom, values in make_signal(2).items()}
    file = write_bigwig(tmp_path / "a.bw", signal)
    rows = [{"name": "atac", "file": str(file)}]
    with pytest.raises(
        DataError, match=r"no chromosome: \['chr1', 'chr2', 'chr3'\].*pass rename: \{'1': 'chr1'\}"
    ) as caught:
        prepare_coverage(source_of(files, tracks=rows), tmp_path / "data")
    assert "track atac (" in str(caught.value)
    rename = {"1": "chr1", "2": "chr2", "3": "chr3"}
    blacklist = bed(tmp_path / "b.bed", ("1", 100, 150))
    with pytest.raises(DataError, match=r"b.bed: the genome has no chromosome: '1'"):
        prepare_coverage(source_of(files, blacklist=blacklist), tmp_path / "data")
    dataset = prepare_coverage(source_of(files, tracks=rows, rename=rename, blacklist=blacklist), tmp_path / "data")
    whole = prepare_coverage(source_of(files), tmp_path / "whole")
    np.testing.assert_array_equal(dataset.targets[1:, 0], whole.targets[1:, 2])
    with pytest.raises(DataError, match="rename: the genome has no chromosome: 'chr9'"):
        prepare_coverage(source_of(files, rename={"9": "chr9"}), tmp_path / "other")


def test_absolute(files: Path, tmp_path: Path) -> None:
    minus = {chrom: -values for chrom, values in make_signal(2).items()}
    rows = [{"name": "minus", "file": str(write_bigwig(tmp_path / "minus.bw", minus)), "squash": "sqrt"}]
    with pytest.raises(DataError, match=r"cannot take a negative signal: -\d.*Set absolute if minus strands"):
        prepare_coverage(source_of(files, tracks=rows), tmp_path / "data")
    dataset = prepare_coverage(source_of(files, tracks=rows, absolute=True), tmp_path / "data")
    whole = prepare_coverage(source_of(files), tmp_path / "whole")
    np.testing.assert_array_equal(dataset.targets[:, 0], whole.targets[:, 2])
    assert dataset.tracks.frame["depth"].tolist() == whole.tracks.frame["depth"].tolist()[2:]
    mixed = make_signal(2) | {"chr3": -make_signal(2)["chr3"]}
    rows = [{"name": "mixed", "file": str(write_bigwig(tmp_path / "mixed.bw", mixed))}]
    with pytest.raises(DataError, match="both negative and positive values"):
        prepare_coverage(source_of(files, tracks=rows, absolute=True), tmp_path / "other")


def test_signed_signal_with_an_identity_link(files: Path, tmp_path: Path) -> None:
    signal = {chrom: values - 0.5 for chrom, values in make_signal(2).items()}
    rows = [{"name": "ratio", "file": str(write_bigwig(tmp_path / "a.bw", signal)), "link": "identity"}]
    dataset = prepare_coverage(source_of(files, tracks=rows), tmp_path / "data")
    assert dataset.targets.min() < 0


# Track tables


def test_tables_in_files(files: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name,file,scale,clip\nrna+,x/a.bw,2,\nrna-,/y/b.bw,2,\n")
    tracks = read_track_table(tmp_path / "a.csv")
    assert tracks.frame["file"].tolist() == [str(tmp_path / "x" / "a.bw"), "/y/b.bw"]
    assert tracks.frame["scale"].tolist() == [2, 2]
    assert tracks.frame["clip"].isna().all()
    (tmp_path / "a.tsv").write_text("name\tfile\nrna+\tx/a.bw\nrna-\t/y/b.bw\n")
    assert read_track_table(tmp_path / "a.tsv").permutation.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "cannot be read"),
        ("a.csv", "name,file,sclae\na,b,1\n", r"unknown columns: \['sclae'\]"),
        ("a.tsv", "name,file\na,b\n", "unknown columns"),
        ("t.txt", "\tidentifier\tfile\tsum_stat\n0\ta\tb\tmedian\n", "row 0: sum_stat is unknown: 'median'"),
        ("t.txt", "\tidentifier\tfile\tsum_stat\tstrand_pair\n0\ta\tb\tsum\t7\n", "strand_pair is not a row: '7'"),
    ],
)
def test_bad_table_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_track_table(tmp_path / name)
    with pytest.raises(DataError, match="the track table does not exist"):
        read_track_table(tmp_path / "none.csv")


# Changing the track table afterwards


def test_retrack_needs_no_bigwig(files: Path, tmp_path: Path) -> None:
    file = write_bigwig(tmp_path / "gone.bw", make_signal(2))
    rows = [{"name": "a", "file": str(file)}, {"name": "b", "file": str(file), "squash": "sqrt"}]
    before = prepare_coverage(source_of(files, tracks=rows), tmp_path / "data")
    targets = np.array(before.targets)
    file.unlink()
    changed = [
        {"name": "b", "squash": "exp75", "scale": 0.5, "clip": 3},
        {"name": "a", "group": "other", "soft_clip": 2},
    ]
    after = retrack_dataset(tmp_path / "data", changed)
    assert after.tracks.names == ["a", "b"]
    np.testing.assert_array_equal(after.targets, targets)
    np.testing.assert_array_equal(after.squashed_targets([3]), squash(targets[[3]], after.tracks, 20))
    assert after.squashed_targets(range(len(after)))[:, 1].max() <= 3
    assert after.tracks.frame["depth"].tolist() == before.tracks.frame["depth"].tolist()
    assert after.tracks.frame["file"].tolist() == [str(file)] * 2
    assert after.info.settings["tracks"][1]["squash"] == "exp75"
    assert after.hash != before.hash
    assert open_dataset(tmp_path / "data").tracks == after.tracks


def test_retrack_refuses_other_tracks(files: Path, tmp_path: Path) -> None:
    prepare_coverage(source_of(files), tmp_path / "data")
    with pytest.raises(DataError, match=r"differ in tracks: \['atac', 'rna\+', 'rna-', 'x'\]"):
        retrack_dataset(tmp_path / "data", [{"name": "x"}])
    with pytest.raises(DataError, match="negative"):
        retrack_dataset(tmp_path / "data", [{"name": r["name"], "squash": "sqrt", "scale": -1} for r in rows_of(files)])
    assert open_dataset(tmp_path / "data").tracks.frame["scale"].tolist() == [1, 1, 1]


# What is refused


Change = Callable[[Path, Path], dict[str, Any]]


def with_bigwig(make: Callable[[Path], Path]) -> Change:
    return lambda files, folder: {"tracks": [{"name": "t", "file": str(make(folder / "t.bw"))}]}


def with_bed(name: str, *rows: tuple[str, int, int]) -> Change:
    return lambda files, folder: {name: bed(folder / "x.bed", *rows)}


def truncated(path: Path) -> Path:
    signal = make_signal(0, dict.fromkeys(LENGTHS, 50_000))
    content = write_bigwig(path, {chrom: values[: LENGTHS[chrom]] for chrom, values in signal.items()}).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def with_record(value: float) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        records = [("chr1", 5, 10, 1.0), ("chr1", 30, 40, value), ("chr2", 0, 5, 1.0), ("chr3", 0, 5, 1.0)]
        pybigtools.open(str(path), "w").write(LENGTHS, records)
        return path

    return make


REFUSED: dict[str, tuple[Change, type[SeqgraftError], str]] = {
    "missing FASTA": (lambda f, _: {"fasta": f / "none.fa"}, DataError, "none.fa: the FASTA file does not exist"),
    "missing bigWig": (
        lambda f, _: {"tracks": [{"name": "a", "file": "none.bw"}, {"name": "b", "file": "none2.bw"}]},
        DataError,
        r"(?s)2 problems.*track a: the bigWig does not exist: 'none.bw'.*none2.bw",
    ),
    "no file": (lambda f, _: {"tracks": [{"name": "a"}]}, DataError, "track a: the track has no file"),
    "duplicated name": (lambda f, _: {"tracks": rows_of(f) + rows_of(f)}, DataError, "more than once: 'atac'"),
    "unpaired strand": (lambda f, _: {"tracks": rows_of(f)[1:]}, DataError, r"'rna-' has no partner: 'rna\+'"),
    "truncated bigWig": (with_bigwig(truncated), DataError, r"t.bw: the bigWig cannot be .*truncated"),
    "missing chromosome": (
        with_bigwig(lambda p: write_bigwig(p, make_signal(0, {"chr1": 2000, "chr2": 1010}))),
        DataError,
        r"track t \(.*t.bw\): the bigWig has no chromosome: 'chr3'. Leave them out",
    ),
    "shorter than the FASTA": (
        with_bigwig(lambda p: write_bigwig(p, make_signal(0, {**LENGTHS, "chr2": 1000}))),
        DataError,
        r"chr2 is shorter in the bigWig than in the FASTA \(1010 bp\): 1000. They are of different assemblies",
    ),
    "longer than the FASTA": (
        with_bigwig(lambda p: write_bigwig(p, make_signal(0, {**LENGTHS, "chr2": 1011}))),
        DataError,
        "chr2 is longer in the bigWig",
    ),
    "NaN": (with_bigwig(with_record(float("nan"))), DataError, r"t.bw chr1:30-40: .* no number: nan"),
    "infinite": (with_bigwig(with_record(float("inf"))), DataError, r"t.bw chr1:30-40: .* no number: inf"),
    "negative": (
        with_bigwig(with_record(-9.0)),
        DataError,
        r"chr1:20-40: squash 'none' with link 'softplus' .*: -90.0",
    ),
    "not a bigWig": (
        lambda f, folder: {"tracks": [{"name": "t", "file": str(f / "genome.fa")}]},
        DataError,
        "cannot be opened",
    ),
    "empty BED": (with_bed("regions"), DataError, "x.bed: the BED file has no intervals"),
    "empty blacklist": (with_bed("blacklist"), DataError, "x.bed: the BED file has no intervals"),
    "beyond the contig": (
        with_bed("regions", ("chr1", 100, 2001), ("chr2", 5, 5000)),
        DataError,
        r"(?s)2 problems.*end of its contig \(2000 bp\): 'chr1:100-2001'.*'chr2:5-5000'",
    ),
    "unknown contig": (with_bed("regions", ("chr9", 1, 2)), DataError, "x.bed: the genome has no chromosome: 'chr9'"),
    "unknown excluded contig": (
        lambda f, _: {"exclude_chroms": ("M",)},
        DataError,
        "exclude_chroms: the genome has no chromosome: 'M'",
    ),
    "no fold": (
        lambda f, _: {"folds": Folds(by="chromosome", test=("chrQ",))},
        DataError,
        "no row is on the chromosome: 'chrQ'",
    ),
    "overlapping folds": (
        lambda f, _: {"folds": Folds(by="random", test=0.3, valid=0.3, seed=1), "stride": 50},
        DataError,
        "regions of different folds overlap",
    ),
    "no room": (
        lambda f, _: {"target_length": 3000, "window": 3000},
        DataError,
        "no region fits into the genome: 3000. The longest contig has 2000 bp",
    ),
    "all unmappable": (
        with_bed("unmappable", *[(chrom, 0, size) for chrom, size in LENGTHS.items()]),
        DataError,
        "every tile is unmappable or of unknown bases",
    ),
    "small window": (
        lambda f, _: {"window": 100},
        ConfigError,
        r"coverage source: window is smaller than target_length \(200\): 100",
    ),
    "no whole bins": (
        lambda f, _: {"bin_size": 32},
        ConfigError,
        r"target_length is not a multiple of bin_size \(32\): 200. Use 192",
    ),
    "negative stride": (lambda f, _: {"stride": -1}, ConfigError, "stride must be a positive number of base pairs: -1"),
    "tiling and regions": (
        lambda f, _: {"regions": Path("x.bed"), "stride": 10},
        ConfigError,
        "are for tiling, but regions are given: 'x.bed'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, files: Path, tmp_path: Path) -> None:
    change, kind, message = REFUSED[case]
    work = tmp_path / "out"
    work.mkdir()
    with pytest.raises(kind, match=message) as caught:
        prepare_coverage(source_of(files, **change(files, tmp_path)), work / "data")
    assert str(caught.value).endswith(".")
    assert not list(work.iterdir())  # nothing half-written


def test_a_track_without_signal(files: Path, tmp_path: Path) -> None:
    records = [("chr1", 5, 10, 0.0), ("chr2", 0, 5, 0.0), ("chr3", 0, 5, 0.0)]
    pybigtools.open(str(tmp_path / "zero.bw"), "w").write(LENGTHS, records)
    rows = [*rows_of(files), {"name": "zero", "file": str(tmp_path / "zero.bw")}]
    with pytest.raises(DataError, match=r"track zero \(.*zero.bw\): the track has no signal in any region"):
        prepare_coverage(source_of(files, tracks=rows), tmp_path / "data")


def test_problems_of_all_files_come_together(files: Path, tmp_path: Path) -> None:
    paths = [with_record(value)(tmp_path / f"{number}.bw") for number, value in enumerate([np.nan, np.inf, -9.0])]
    rows = [{"name": path.stem, "file": str(path)} for path in paths]
    with pytest.raises(DataError, match="3 problems were found"):
        prepare_coverage(source_of(files, tracks=rows), tmp_path / "data")


def test_an_existing_folder_is_not_touched(files: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(RunError, match="exists already"):
        prepare_coverage(source_of(files), tmp_path / "data")


def test_reference_limits_do_not_mask(files: Path, tmp_path: Path) -> None:
    source = source_of(files, unmappable=bed(tmp_path / "u.bed", ("chr1", 40, 60)))
    limited = prepare_coverage(replace(source, reference_compatible=True), tmp_path / "limited")
    assert limited.mask is None
    values = limited.squashed_targets([0])[0]
    assert (values[:, 2] <= np.median(values, axis=1) + 1e-3).all()


# Real data


def test_yeast(shared: Path, tmp_path: Path) -> None:
    yeast = shared / "data" / "yeast"
    names = ["stripe_diamide_plus", "stripe_diamide_minus", "mnase_dyad"]
    source = CoverageSource(
        fasta=yeast / "sacCer3.fa.gz",
        tracks=[{"name": name, "file": str(yeast / "tracks" / f"{name}.bw"), "squash": "sqrt"} for name in names],
        window=8192,
        target_length=4096,
        bin_size=16,
        folds=Folds(by="chromosome", valid=("chrX",), test=("chrXIV", "chrXVI")),
        exclude_chroms=("chrM",),
    )
    dataset = prepare_coverage(source, tmp_path / "data")
    assert len(dataset) == 2940
    assert dataset.tracks.permutation.tolist() == [1, 0, 2]
    np.testing.assert_allclose(dataset.tracks.frame["depth"], [943_324, 998_625, 6_236_025])
    tiled = dataset.targets.sum(axis=(0, 2), dtype=np.float64)
    assert (tiled <= dataset.tracks.frame["depth"]).all()
    assert (tiled > 0.97 * dataset.tracks.frame["depth"]).all()
    row = 1234
    region = dataset.regions.iloc[row]
    with pybigtools.open(str(yeast / "tracks" / "mnase_dyad.bw")) as reader:
        where = (region["chrom"], int(region["start"]), int(region["end"]))
        expected = reader.values(*where, bins=256, summary="sum", exact=True, fillna=0.0)
    np.testing.assert_allclose(dataset.targets[row, 2], expected)


def test_a_bigwig_of_three_chromosomes(shared: Path, tmp_path: Path) -> None:
    yeast = shared / "data" / "yeast"
    genome = Genome.open(yeast / "sacCer3.fa.gz")
    covered = {"II": "chrII", "IV": "chrIV", "XVI": "chrXVI"}
    source = CoverageSource(
        fasta=yeast / "sacCer3.fa.gz",
        tracks=[{"name": "polII", "file": str(yeast / "tracks" / "tidy3chr_PolII.bw")}],
        window=4096,
        target_length=4096,
        bin_size=32,
        folds=Folds(by="chromosome", valid=("chrII",), test=("chrXVI",)),
        rename=covered,
    )
    with pytest.raises(DataError, match="Leave them out with exclude_chroms"):
        prepare_coverage(source, tmp_path / "data")
    others = tuple(chrom for chrom in genome.chroms if chrom not in covered.values())
    dataset = prepare_coverage(replace(source, exclude_chroms=others), tmp_path / "data")
    assert set(dataset.regions["chrom"]) == set(covered.values())
    assert pd.notna(dataset.targets).all()
