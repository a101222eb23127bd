"""Fragments of single cells: against slow references, against bigWigs, and everything that can be wrong with them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pysam
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqgraft.data import fragment_files, fragments, spill
from seqgraft.data.barcodes import CellLabels, Cells, Matcher, half_of, read_cells
from seqgraft.data.coverage import CoverageSource, prepare_coverage
from seqgraft.data.folds import Folds
from seqgraft.data.fragment_files import FragmentFile, FragmentReader
from seqgraft.data.fragments import FragmentSource, depth_weights, prepare_fragments
from seqgraft.data.pseudobulk import Assay, Contigs, Layout, count_assay
from seqgraft.data.quality import Quality
from seqgraft.data.spill import Spill, base_signal, bin_signal, layers_of
from seqgraft.errors import ConfigError, DataError, RunError, SeqgraftError
from seqgraft.genome import Interval
from seqgraft.intervals import spearman_brown
from seqgraft.tracks import TrackTable, read_bases

LENGTHS = {"chr1": 2000, "chr2": 1010, "chr3": 900}
FOLDS = Folds(by="chromosome", valid=("chr2",), test=("chr3",))
CELLS = [f"{letters}-1" for letters in ("AACC", "AAGG", "AATT", "CCAA", "CCGG", "CCTT", "GGAA", "GGCC")]
TYPES = ["B", "B", "B", "T", "T", "T", "T", "NK"]

Row = tuple[str, int, int, str]


def make_rows(seed: int, number: int = 600, cells: Sequence[str] = CELLS) -> list[Row]:
    """Sorted fragments; some cells have no label, and some rows are twice."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for chrom, size in LENGTHS.items():
        starts = np.sort(rng.integers(0, size - 1, number * size // 2000)).tolist()
        ends = [min(size, start + int(rng.integers(1, 120))) for start in starts]
        names = rng.choice([*cells, "TTTT-1"], len(starts)).tolist()
        rows += [
            row
            for row in zip([chrom] * len(starts), starts, ends, names, strict=True)
            for _ in range(1 + (row[1] % 50 == 0))
        ]
    return rows


def write_rows(path: Path, rows: Sequence[Sequence[object]], header: str = "# id=a\n# b\n", more: str = "\t3") -> Path:
    text = header + "".join("\t".join(map(str, row)) + more + "\n" for row in rows)
    if path.suffix == ".gz":
        with pysam.BGZFile(str(path), "wb", None) as file:
            file.write(text.encode())
    else:
        path.write_text(text)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small genome, two fragment files of one assay, one of another, and labels: read only."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    text = "".join(f">{chrom}\n{''.join(rng.choice(list('ACGT'), size))}\n" for chrom, size in LENGTHS.items())
    (folder / "genome.fa").write_text(text)
    write_rows(folder / "one.tsv.gz", make_rows(1))
    write_rows(folder / "two.tsv.gz", [("chrUn", 1, 5, CELLS[0]), *make_rows(2)])
    write_rows(folder / "mark.tsv", make_rows(3), header="", more="")
    pd.DataFrame({"barcode": CELLS, "type": TYPES}).to_csv(folder / "cells.csv", index=False)
    return folder


def source_of(files: Path, **changes: Any) -> FragmentSource:
    settings: dict[str, Any] = {
        "fasta": files / "genome.fa",
        "assays": (
            Assay("atac", "insertions", (FragmentFile(files / "one.tsv.gz"), FragmentFile(files / "two.tsv.gz"))),
            Assay("mark", "midpoints", (FragmentFile(files / "mark.tsv"),)),
            Assay("cover", "fragments", (FragmentFile(files / "one.tsv.gz"),)),
        ),
        "labels": CellLabels(files / "cells.csv", "type"),
        "window": 300,
        "target_length": 200,
        "bin_size": 20,
        "folds": FOLDS,
    }
    return FragmentSource(**{**settings, **changes})


def slow_signal(rows: Sequence[Row], count: str, wanted: set[str]) -> dict[str, np.ndarray]:
    """Base by base, the plainest way."""
    signal = {chrom: np.zeros(size) for chrom, size in LENGTHS.items()}
    for chrom, start, end, cell in rows:
        if cell not in wanted or chrom not in signal:
            continue
        if count == "insertions":
            signal[chrom][start] += 1
            signal[chrom][end - 1] += 1
        elif count == "midpoints":
            signal[chrom][(start + end) // 2] += 1
        else:
            for base in range(start, end):
                signal[chrom][base] += 1
    return signal


def test_halves_of_the_cells_are_kept_for_regions_that_are_not_for_training(files: Path, tmp_path: Path) -> None:
    """Against a slow reference; regions that the blacklist touches are not compared."""
    (tmp_path / "black.bed").write_text("chr3\t10\t20\n")
    source = source_of(files, stride=70, blacklist=tmp_path / "black.bed")
    dataset = prepare_fragments(source, tmp_path / "data")
    rows = np.flatnonzero(dataset.regions["fold"] != "train")
    kept = dataset.squashed_halves(rows)
    assert kept is not None
    (first, second), depths = kept
    hit = (dataset.regions["chrom"] == "chr3").to_numpy()[rows] & (dataset.regions["start"] < 40).to_numpy()[rows]
    assert hit.any()
    assert np.isnan(first[hit]).all()
    np.testing.assert_array_equal((first + second)[~hit], dataset.targets[rows][~hit])
    cells = {name for name, own in zip(CELLS, TYPES, strict=True) if own == "T" and half_of(name) == 0}
    assert 0 < len(cells) < 4
    signal = slow_signal(make_rows(3), "midpoints", cells)
    position = dataset.tracks.names.index("T_mark")
    for number in np.flatnonzero(~hit):
        region = dataset.regions.iloc[rows[number]]
        expected = signal[region["chrom"]][region["start"] : region["end"]].reshape(10, 20).sum(1)
        np.testing.assert_array_equal(first[number, position], expected)
    np.testing.assert_allclose(depths.sum(0), dataset.targets[rows][~hit].sum((0, 2)))


def test_weights_by_depth(files: Path, tmp_path: Path) -> None:
    plain = prepare_fragments(source_of(files), tmp_path / "plain").tracks
    assert set(plain.frame["loss_weight"]) == {1.0}
    tracks = prepare_fragments(source_of(files, weights="depth"), tmp_path / "data").tracks
    for index in tracks.groups.values():
        depth, weight = tracks.column("depth")[index], tracks.column("loss_weight")[index]
        np.testing.assert_allclose(weight, np.sqrt(np.median(depth) / depth))
    assert plain.column("depth").tolist() == tracks.column("depth").tolist()
    deep = {"depth": 9000.0, "group": "rna"}
    table = TrackTable.build(
        [{"name": "a+", **deep}, {"name": "a-", **deep | {"depth": 1000.0}}]
        + [{"name": f"b{s}", **deep | {"depth": d}} for s, d in zip("+-", (20.0, 20.0), strict=True)]
        + [{"name": f"c{s}", **deep | {"depth": 0.0}} for s in "+-"]
    )
    median = (5000 + 20) / 2
    expected = np.sqrt([median / 5000, median / 20]).clip(0.1, 10)
    np.testing.assert_allclose(depth_weights(table), [expected[0]] * 2 + [expected[1]] * 2 + [1, 1])
    with pytest.raises(ConfigError, match="weights are unknown: 'deep'"):
        source_of(files, weights="deep")


def test_targets_are_those_of_a_slow_reference(files: Path, tmp_path: Path) -> None:
    dataset = prepare_fragments(source_of(files, stride=70), tmp_path / "data")
    assert dataset.tracks.names == [
        f"{group}_{assay}" for assay in ("atac", "mark", "cover") for group in ("B", "NK", "T")
    ]
    assert dataset.tracks.frame["condition"].tolist() == ["B", "NK", "T"] * 3
    assert list(dataset.tracks.groups) == ["atac", "mark", "cover"]
    rows = {"atac": make_rows(1) + make_rows(2), "mark": make_rows(3), "cover": make_rows(1)}
    counts = {"atac": "insertions", "mark": "midpoints", "cover": "fragments"}
    for position, name in enumerate(dataset.tracks.names):
        group, assay = name.split("_")
        wanted = {cell for cell, own in zip(CELLS, TYPES, strict=True) if own == group}
        signal = slow_signal(rows[assay], counts[assay], wanted)
        for row, region in dataset.regions.iterrows():
            expected = signal[region["chrom"]][region["start"] : region["end"]].reshape(10, 20).sum(1)
            np.testing.assert_array_equal(dataset.targets[row, position], expected)
        total = sum(values.sum() for values in signal.values())
        assert dataset.tracks.frame["depth"].iloc[position] == total
    units = {track["assay"]: track["unit"] for track in dataset.info.notes["tracks"].values()}
    assert units == {
        "atac": "insertions (both ends of each fragment)",
        "mark": "midpoints of fragments",
        "cover": "bases covered by fragments",
    }


def test_targets_are_those_of_the_bigwigs_bit_for_bit(files: Path, tmp_path: Path) -> None:
    (tmp_path / "black.bed").write_text("chr1\t225\t255\nchr2\t1000\t1010\nchr1\t900\t1100\n")
    (tmp_path / "lost.bed").write_text("chr1\t239\t261\n")
    places = {"stride": 70, "blacklist": tmp_path / "black.bed", "unmappable": tmp_path / "lost.bed"}
    direct = prepare_fragments(source_of(files, **places, write_bigwigs=tmp_path / "bw"), tmp_path / "data")
    rows = [{"name": name, "file": str(tmp_path / "bw" / f"{name}.bw")} for name in direct.tracks.names]
    coverage = CoverageSource(files / "genome.fa", rows, 300, 200, 20, FOLDS, **places)
    through = prepare_coverage(coverage, tmp_path / "coverage")
    assert (tmp_path / "data" / "targets.npy").read_bytes() == (tmp_path / "coverage" / "targets.npy").read_bytes()
    assert (tmp_path / "data" / "mask.npy").read_bytes() == (tmp_path / "coverage" / "mask.npy").read_bytes()
    assert direct.tracks.frame["depth"].tolist() == through.tracks.frame["depth"].tolist()
    assert direct.regions.equals(through.regions)
    plain = prepare_fragments(source_of(files, stride=70), tmp_path / "plain")
    assert (plain.targets[: len(direct)] != direct.targets[: len(plain)]).any()  # the blacklist does something
    with pytest.raises(RunError, match=r"[Tt]he bigWig exists already: '.*B_atac.bw'"):
        prepare_fragments(source_of(files, write_bigwigs=tmp_path / "bw"), tmp_path / "again")


spans = st.lists(st.tuples(st.integers(0, 380), st.integers(1, 60)), max_size=30)


@given(spans, st.lists(st.integers(0, 360), min_size=1, max_size=6), st.sampled_from([1, 4, 10]), st.booleans())
def test_bins_are_sums_of_bases(parts: list[tuple[int, int]], starts: list[int], size: int, points: bool) -> None:
    pairs = np.array([(left, left + length) for left, length in parts], dtype=np.int32).reshape(-1, 2)
    marks = pairs[:, 0] if points else pairs
    bases = np.zeros(500)
    for left, right in pairs.tolist():
        bases[left : left + 1 if points else right] += 1
    np.testing.assert_array_equal(base_signal([marks[:7], marks[7:]], 30, 410), bases[30:410])
    ordered = np.sort(np.array(starts))
    layers = layers_of(ordered, 40)
    assert sorted(np.concatenate(layers).tolist()) == list(range(len(ordered)))
    for layer in layers:
        begins = ordered[layer]
        assert (np.diff(begins) >= 40).all()
        expected = np.stack([bases[at : at + 40].reshape(-1, size).sum(1) for at in begins])
        np.testing.assert_array_equal(bin_signal([marks[:9], marks[9:]], begins, 40 // size, size), expected)


def test_small_pieces_of_a_file_change_nothing(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare_fragments(source_of(files), tmp_path / "whole")
    monkeypatch.setattr(fragment_files, "CHUNK", 64)
    monkeypatch.setattr(spill, "BATCH", 7)
    pieces = prepare_fragments(source_of(files), tmp_path / "pieces")
    np.testing.assert_array_equal(whole.targets, pieces.targets)
    assert whole.info.notes["fragment_files"] == pieces.info.notes["fragment_files"]


def test_what_is_counted_of_a_file(files: Path, tmp_path: Path) -> None:
    dataset = prepare_fragments(source_of(files), tmp_path / "data")
    one, two, *_ = dataset.info.notes["fragment_files"]
    rows = make_rows(1)
    known = [row for row in rows if row[3] in CELLS]
    assert one["fragments"] == len(rows)
    assert one["counted"] == len(known)
    assert one["repeated"] == sum(n - 1 for n in Counter(known).values()) > 0
    assert (one["barcodes"], one["matched"], one["unmatched"], one["labels_not_in_the_file"]) == (9, 8, 1, 0)
    assert one["by_step"] == {"as written": 8, "without the sample": 0, "without the number": 0}
    assert two["not_in_the_fasta"] == {"chrUn": 1}
    json.loads((tmp_path / "data" / "dataset.json").read_text(), parse_constant=pytest.fail)


def test_real_cells(shared: Path) -> None:
    """PBMCs on two chromosomes of hg19; the labels have the sample in front of the barcode."""
    folder = shared / "data" / "single_cell"
    path = folder / "pbmc_atac_hg19_chr5_chr11.fragments.tsv.gz"
    lengths = {"chr5": 180915260, "chr11": 135006516}
    cells = read_cells(CellLabels(folder / "pbmc_atac_cell_labels.tsv", "predictedGroup_Un"), {}, ())
    assert cells.barcode[0].startswith("PBSmall#")
    assay = Assay("atac", "insertions", (FragmentFile(path, sample="PBSmall"),))
    layout = Layout([assay], cells.groups)
    table = pd.read_csv(folder / "pbmc_atac_cell_labels.tsv", sep="\t", index_col=0)
    group_of = table["predictedGroup_Un"].rename(lambda name: name.removeprefix("PBSmall#")).to_dict()
    rows = pd.read_csv(path, sep="\t", header=None)
    with Spill(Path("/tmp")) as kept:
        tally = count_assay(assay, layout, cells, Contigs(lengths, {}, set(lengths), set(lengths)), kept)
        for chrom, size in lengths.items():
            bins = size // 500
            for group, name in enumerate(cells.groups):
                marks = kept.read(chrom, [2 * group, 2 * group + 1], 0, size)
                found = bin_signal(marks, np.array([0]), bins, 500)[0]
                expected = np.zeros(bins + 1)
                for _, start, end, barcode, _ in rows[rows[0] == chrom].itertuples(index=False):
                    if group_of.get(barcode) == name:
                        expected[start // 500] += 1
                        expected[(end - 1) // 500] += 1
                np.testing.assert_array_equal(found, expected[:-1])
    (report,) = tally.files
    assert report["by_step"]["without the sample"] == report["matched"] == len(tally.cells) > 100
    assert report["fragments"] == len(rows) == 29399
    assert tally.fragments.sum() == rows[3].isin(set(group_of)).sum() == report["counted"]


# Labels and barcodes


def cells_of(names: Sequence[str], sample: Sequence[str] | None = None) -> Cells:
    return Cells(list(names), np.zeros(len(names), np.int64), ["a"], sample and list(sample), "cells.csv")


@pytest.mark.parametrize(
    ("table", "sample", "file", "found"),
    [
        (["AA-1", "CC-1"], None, ["CC-1", "GG-1", "AA-1"], [1, -1, 0]),
        (["s1#AA-1", "s1#CC-1"], None, ["CC-1", "AA-1"], [1, 0]),  # the prefix that all share
        (["s1#AA-1", "s2#AA-1"], "s2", ["AA-1"], [1]),
        (["s1_AA-1", "s2_AA-1"], "s1", ["AA-1"], [0]),
        (["AA-1_1", "AA-1_2"], "2", ["AA-1"], [1]),  # Seurat
        (["AA-1-x", "AA-1-y"], "y", ["AA-1"], [1]),  # scanpy
        (["AA", "CC"], None, ["CC-1", "AA-1"], [1, 0]),
        (["AA-1", "CC-1"], None, ["CC", "AA"], [1, 0]),
        (["s#AA-1", "s#CC-1"], None, ["s#CC-1"], [1]),
        (["AA", "CC"], "s", ["s#CC", "s#AA"], [1, 0]),  # the prefix is in the file
        (["AA-1", "AA-2"], None, ["AA"], [-1]),  # two cells without their numbers
        (["a_b_c", "a_b_d"], None, ["a_b_d"], [1]),  # barcodes that have the separator inside
    ],
)
def test_barcodes_are_matched(table: list[str], sample: str | None, file: list[str], found: list[int]) -> None:
    matcher = Matcher(cells_of(table), sample, "file")
    assert matcher.find(file).tolist() == found
    assert matcher.find(file).tolist() == found


def test_a_column_of_samples() -> None:
    cells = cells_of(["AA", "AA", "CC"], ["s1", "s2", "s2"])
    matcher = Matcher(cells, "s2", "file")
    assert matcher.find(["AA-1", "CC-1"]).tolist() == [1, 2]
    assert matcher.report()["labels_not_in_the_file"] == 0
    with pytest.raises(DataError, match=r"file: no cell of the table is of the sample: 's3'. The table has s1, s2"):
        Matcher(cells, "s3", "file")


def test_barcodes_that_cannot_be() -> None:
    matcher = Matcher(cells_of(["s1#AA", "s2#CC"]), None, "f.tsv")
    matcher.find(["GG"])
    message = r"f.tsv: none of the file's 1 barcodes is in the table.*'GG'. The table has 's1#AA'; .*sample: s1"
    with pytest.raises(DataError, match=message):
        matcher.check()
    matcher = Matcher(cells_of(["AA", "CC"]), None, "f.tsv")
    matcher.find(["AA-1", "AA-2"])
    with pytest.raises(DataError, match=r"two barcodes are one cell of the table \('AA'\): \('AA-1', 'AA-2'\)"):
        matcher.check()


def write_h5ad(path: Path, legacy: bool = False) -> Path:
    with h5py.File(path, "w") as file:
        obs = file.create_group("obs")
        obs.attrs["_index"] = "_index"
        obs["_index"] = np.array(CELLS, dtype=object)
        names = sorted(set(TYPES))
        codes = np.array([names.index(name) for name in TYPES], dtype=np.int8)
        codes[0] = -1
        if legacy:
            obs["type"] = codes
            obs.create_group("__categories")["type"] = np.array(names, dtype=object)
        else:
            column = obs.create_group("type")
            column["codes"], column["categories"] = codes, np.array(names, dtype=object)
        obs["leiden"] = np.arange(len(CELLS)) % 2
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_labels_of_an_anndata(tmp_path: Path, legacy: bool) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", legacy)
    cells = read_cells(CellLabels(path, "type"), {}, ())
    assert cells.barcode == CELLS[1:]
    assert [cells.groups[group] for group in cells.group] == TYPES[1:]
    assert cells.left_out == 1
    assert read_cells(CellLabels(path, "leiden"), {}, ()).groups == ["0", "1"]
    with pytest.raises(DataError, match=r"no column: 'cell_type'. Choose from"):
        read_cells(CellLabels(path, "cell_type"), {}, ())
    with h5py.File(path, "a") as file:
        file["obs"]["other"] = h5py.ExternalLink("b.h5", "/x")
    with pytest.raises(DataError, match="links to another place, which is not followed: 'other'"):
        read_cells(CellLabels(path, "other"), {}, ())
    (tmp_path / "b.h5ad").write_bytes(b"no")
    with pytest.raises(DataError, match=r"the .h5ad cannot be read"):
        read_cells(CellLabels(tmp_path / "b.h5ad", "type"), {}, ())


def test_groups_are_merged_and_dropped(files: Path, tmp_path: Path) -> None:
    whole = prepare_fragments(source_of(files), tmp_path / "whole")
    merged = prepare_fragments(source_of(files, merge={"lymph": ("B", "T")}, drop=("NK",)), tmp_path / "merged")
    assert merged.tracks.names == ["lymph_atac", "lymph_mark", "lymph_cover"]
    np.testing.assert_array_equal(merged.targets[:, 0], whole.targets[:, 0] + whole.targets[:, 2])
    assert merged.info.notes["cells_left_out"] == 1
    labels = CellLabels(files / "cells.csv", "type")
    with pytest.raises(DataError, match=r"merge.x: no cell is of the group: 'C'. The table has B, NK, T"):
        read_cells(labels, {"x": ["C"]}, ())
    with pytest.raises(ConfigError, match="the group is named twice: 'B'"):
        read_cells(labels, {"x": ["B"]}, ["B"])
    with pytest.raises(ConfigError, match="a group of this name is there already: 'T'"):
        read_cells(labels, {"T": ["B"]}, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("barcode,type\nAA,B\nAA,T\n", r"the barcode 'AA' is there more than once, as: \['B', 'T'\]"),
        ("barcode,kind\nAA,B\n", "no column: 'type'. Choose from barcode, kind"),
        ("barcode,type\nAA,\nCC,NA\n", "no cell has a group in the column: 'type'"),
        ("", "cannot be read"),
    ],
)
def test_labels_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_cells(CellLabels(tmp_path / "c.csv", "type"), {}, ())


# What can be wrong with a file


def read_all(path: Path, **settings: Any) -> list[Any]:
    return list(FragmentReader(FragmentFile(path, **settings), LENGTHS, {}).read())


@pytest.mark.parametrize("chunk", [1 << 20, 20])
@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        ("chr1\t5\t9\tA\t1\nchr1\tx\t9\tA\t1\n", 2, "start or end is not a whole number: 'x'"),
        ("chr1\t5\t9\tA\t1\nchr1\t9\t9\tA\t1\n", 2, "the fragment has no bases: '9-9'"),
        ("# c\nchr1\t-5\t9\tA\t1\n", 2, "start or end is not a whole number: '-5'"),
        ("chr1\t5\t9\tA\t1\nchr1\t4\t9\tA\t1\n", 2, r"not sorted: the row before is at chr1:5: 'chr1:4'.*sort -k1,1"),
        ("chr1\t5\t9\tA\nchr2\t4\t9\tA\n#x\nchr1\t8\t9\tA\n", 4, "not sorted: the row before is at chr2:4: 'chr1:8'"),
        ("chr1\t5\t9\tA\t1\nchr1\t6\t9\tA\n", 2, "a row has 4 columns where others have 5"),
        ("chr1 5 9 A\n", 1, "this is not a fragment"),
        ("chr2\t1000\t1011\tA\n", 1, r"beyond its chromosome, which has 1010 bp in the FASTA: .*another assembly"),
    ],
)
def test_rows_that_cannot_be(
    tmp_path: Path, lines: str, line: int, message: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fragment_files, "CHUNK", chunk)
    (tmp_path / "f.tsv").write_text(lines)
    with pytest.raises(DataError, match=f"f.tsv line {line}: .*{message}"):
        read_all(tmp_path / "f.tsv")


def test_a_truncated_file(files: Path, tmp_path: Path) -> None:
    whole = (files / "one.tsv.gz").read_bytes()
    (tmp_path / "f.tsv.gz").write_bytes(whole[:-28])  # complete blocks, without the end
    with pytest.raises(DataError, match=r"f.tsv.gz: the compressed file is truncated"):
        read_all(tmp_path / "f.tsv.gz")
    (tmp_path / "e.tsv").write_text("# nothing\n")
    with pytest.raises(DataError, match="the file has no fragments"):
        read_all(tmp_path / "e.tsv")
    with pytest.raises(DataError, match="the fragment file does not exist"):
        read_all(tmp_path / "none.tsv")


def test_names_of_chromosomes(tmp_path: Path) -> None:
    (tmp_path / "f.tsv").write_text("1\t5\t9\tA\n")
    with pytest.raises(DataError, match=r"no chromosome: '1'.*rename: \{'1': 'chr1'\}"):
        read_all(tmp_path / "f.tsv")
    renamed = FragmentReader(FragmentFile(tmp_path / "f.tsv"), LENGTHS, {"1": "chr1"})
    assert [part.chrom for part in renamed.read()] == ["chr1"]
    (tmp_path / "g.tsv").write_text("scaffold\t5\t9\tA\n")
    with pytest.raises(DataError, match="no chromosome: 'scaffold'"):
        read_all(tmp_path / "g.tsv")


def test_cells_without_fragments_and_files_without_cells(files: Path, tmp_path: Path) -> None:
    more = pd.DataFrame({"barcode": [*CELLS, "GGTT-1"], "type": [*TYPES, "B"]})
    more.to_csv(tmp_path / "more.csv", index=False)
    labels = CellLabels(tmp_path / "more.csv", "type")
    with pytest.raises(DataError, match=r"1 of 9 cells of the table have no fragment.*'GGTT-1'.*raise max_absent"):
        prepare_fragments(source_of(files, labels=labels), tmp_path / "data")
    prepare_fragments(source_of(files, labels=labels, max_absent=0.2), tmp_path / "data")
    more.assign(barcode=[f"x{n}" for n in range(9)]).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(DataError, match="4 problems were found") as caught:
        prepare_fragments(source_of(files, labels=CellLabels(tmp_path / "other.csv", "type")), tmp_path / "other")
    assert str(caught.value).count("none of the file's 9 barcodes is in the table") == 4
    assert not list(tmp_path.glob("*other*/")), "something is left behind"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"assays": ()}, "there are no assays"),
        ({"labels": None}, "nothing says of which group the cells of a file are"),
        ({"max_absent": 2.0}, "max_absent must be a share: 2.0"),
        ({"window": 100}, "fragments source: window is smaller than target_length"),
        ({"assays": (Assay("a", "fragments", (FragmentFile(Path("f")),)),) * 2}, "two assays have one name"),
    ],
)
def test_settings_that_cannot_be(files: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source_of(files, **changes)


def test_assays_that_cannot_be() -> None:
    one, plus = FragmentFile(Path("f.tsv")), FragmentFile(Path("g.tsv"), strand="+")
    for settings, message in (
        ({"count": "reads"}, "assay a: cannot count: 'reads'"),
        ({"count": "fragments", "shift": (4, -5)}, "a shift has no meaning with count: fragments"),
        ({"count": "fragments", "files": (one, plus)}, "some files have a strand and others do not: 'f.tsv'"),
        ({"count": "fragments", "files": ()}, "the assay has no files"),
    ):
        with pytest.raises(ConfigError, match=message):
            Assay(**{"name": "a", "files": (one,), **settings})
    with pytest.raises(ConfigError, match="the strand is unknown: 'plus'"):
        FragmentFile(Path("f"), strand="plus")  # type: ignore[arg-type]


def test_files_sorted_by_barcode(files: Path, tmp_path: Path) -> None:
    """As SnapATAC2 writes them."""
    by_barcode = write_rows(tmp_path / "b.tsv.gz", sorted(make_rows(1), key=lambda row: (row[3], row[:3])))
    with pytest.raises(DataError, match=r"not sorted: .*sorted: false if it is sorted by barcode"):
        read_all(by_barcode)
    found = [
        prepare_fragments(source_of(files, assays=(Assay("atac", "insertions", (file,)),)), tmp_path / name)
        for name, file in (
            ("place", FragmentFile(files / "one.tsv.gz")),
            ("barcode", FragmentFile(by_barcode, sorted=False)),
        )
    ]
    np.testing.assert_array_equal(found[0].targets, found[1].targets)
    first, second = (dataset.info.notes["fragment_files"][0] for dataset in found)
    assert first | {"path": ""} == second | {"path": ""}


def test_a_real_file_sorted_by_barcode(shared: Path) -> None:
    path = shared / "data" / "single_cell" / "pbmc_atac_hg38_chr22.fragments.tsv.gz"
    with pytest.raises(DataError, match="line 835: the file is not sorted"):
        list(FragmentReader(FragmentFile(path), {"chr22": 50818468}, {}).read())
    reader = FragmentReader(FragmentFile(path, sorted=False), {"chr22": 50818468}, {})
    assert sum(len(part.start) for part in reader.read()) == reader.rows == 57115


# Strands, shifts, whole files


def test_strands_of_files_and_columns(files: Path, tmp_path: Path) -> None:
    rows = make_rows(5)
    signs = ["+-"[number % 3 == 0] for number in range(len(rows))]
    for sign, name in (("+", "plus"), ("-", "minus")):
        own = [row for row, strand in zip(rows, signs, strict=True) if strand == sign]
        write_rows(tmp_path / f"{name}.tsv.gz", own)
    both = [(*row, 1, sign) for row, sign in zip(rows, signs, strict=True)]
    write_rows(tmp_path / "both.tsv", both, more="")
    per_file = (FragmentFile(tmp_path / "plus.tsv.gz", strand="+"), FragmentFile(tmp_path / "minus.tsv.gz", strand="-"))
    found = {}
    for name, chosen in (
        ("files", per_file),
        ("forward", (FragmentFile(tmp_path / "both.tsv", strand="forward"),)),
        ("reverse", (FragmentFile(tmp_path / "both.tsv", strand="reverse"),)),
    ):
        assays = (Assay("rna", "fragments", chosen, squash="sqrt"),)
        found[name] = prepare_fragments(source_of(files, assays=assays), tmp_path / name)
    assert found["files"].tracks.names == ["B+", "B-", "NK+", "NK-", "T+", "T-"]
    assert found["files"].tracks.permutation.tolist() == [1, 0, 3, 2, 5, 4]
    np.testing.assert_array_equal(found["files"].targets, found["forward"].targets)
    np.testing.assert_array_equal(
        found["files"].targets, found["reverse"].targets[:, found["files"].tracks.permutation]
    )
    wanted = {cell for cell, own in zip(CELLS, TYPES, strict=True) if own == "B"}
    minus = [row for row, sign in zip(rows, signs, strict=True) if sign == "-"]
    np.testing.assert_array_equal(
        found["files"].targets[0, 1], slow_signal(minus, "fragments", wanted)["chr1"][:200].reshape(10, 20).sum(1)
    )


def write_bam(path: Path, reads: Sequence[tuple[str, int, str, int, dict[str, object]]]) -> Path:
    """Reads: chromosome, start, CIGAR, flag, tags."""
    header = {"HD": {"VN": "1.6", "SO": "coordinate"}, "SQ": [{"SN": c, "LN": n} for c, n in LENGTHS.items()]}
    with pysam.AlignmentFile(str(path), "wb", header=header) as file:
        for number, (chrom, start, cigar, flag, tags) in enumerate(reads):
            read = pysam.AlignedSegment(file.header)
            read.query_name, read.flag, read.reference_start = f"r{number}", flag, start
            read.reference_id, read.cigarstring = list(LENGTHS).index(chrom), cigar
            read.query_sequence = "A" * (read.infer_query_length() or 0)
            for tag, value in tags.items():
                read.set_tag(tag, value)
            file.write(read)
    return path


def test_reads_of_a_bam_file(files: Path, tmp_path: Path) -> None:
    """Introns are not covered, and what is no molecule of a cell does not count."""
    cell = {"CB": CELLS[0]}
    reads = [
        ("chr1", 10, "20M50N10M", 0, cell),
        ("chr1", 20, "10M", 16, cell),
        ("chr1", 20, "10M", 1024, cell),  # a duplicate
        ("chr1", 20, "10M", 256, cell),  # secondary
        ("chr1", 20, "10M", 0, {}),  # of no cell
        ("chr1", 20, "10M", 0, cell | {"xf": 17}),  # not the read of its molecule
        ("chr1", 20, "10M", 0, cell | {"xf": 25}),
        ("chr2", 5, "30M", 16, {"CB": CELLS[3]}),
    ]
    (tmp_path / "cells.csv").write_text(f"barcode,type\n{CELLS[0]},B\n{CELLS[3]},T\n")
    path = write_bam(tmp_path / "rna.bam", reads)
    assays = (Assay("rna", "fragments", (FragmentFile(path, strand="forward"),)),)
    cells = read_cells(CellLabels(tmp_path / "cells.csv", "type"), {}, ())
    layout = Layout(assays, cells.groups)
    with Spill(tmp_path) as kept:
        tally = count_assay(assays[0], layout, cells, Contigs(LENGTHS, {}, set(LENGTHS), set(LENGTHS)), kept)
        plus = base_signal(kept.read("chr1", [0, 1], 0, 2000), 0, 100)
        minus = base_signal(kept.read("chr1", [2, 3], 0, 2000), 0, 100)
    expected = np.zeros(100)
    expected[10:30] += 1
    expected[80:90] += 1
    expected[20:30] += 1
    np.testing.assert_array_equal(plus, expected)
    assert (minus.sum(), np.flatnonzero(minus).tolist()) == (10, list(range(20, 30)))
    assert tally.fragments.tolist() == [2, 1, 0, 1]  # reads, not their blocks
    (report,) = tally.files
    assert report["skipped_reads"] == {"duplicates": 2, "unmapped, secondary or failed": 1}
    for bad, message in (
        ([reads[1], reads[0]], "the BAM file is not sorted: 'chr1:10'"),
        ([("chr1", 10, "10M", 1, cell)], "the reads of the BAM file are pairs: 'r0'"),
        ([("chr2", 1005, "10M", 0, cell)], "the read ends beyond its chromosome"),
    ):
        with pytest.raises(DataError, match=message):
            read_all(write_bam(tmp_path / "bad.bam", bad))
    (tmp_path / "cut.bam").write_bytes(path.read_bytes()[:-28])
    with pytest.raises(DataError, match="the BAM file cannot be read"):
        read_all(tmp_path / "cut.bam")


def test_a_shift_of_insertions(files: Path, tmp_path: Path) -> None:
    rows = [("chr1", 0, 60, CELLS[0]), ("chr1", 10, 1999, CELLS[0]), ("chr1", 100, 160, CELLS[0])]
    path = write_rows(tmp_path / "f.tsv", rows)
    (tmp_path / "cells.csv").write_text(f"barcode,type\n{CELLS[0]},B\n")
    assay = Assay("atac", "insertions", (FragmentFile(path),), shift=(-4, 5))
    cells = read_cells(CellLabels(tmp_path / "cells.csv", "type"), {}, ())
    with Spill(tmp_path) as kept:
        tally = count_assay(assay, Layout([assay], ["B"]), cells, Contigs(LENGTHS, {}, {"chr1"}, {"chr1"}), kept)
        assert sorted(np.concatenate(list(kept.read("chr1", [0, 1], 0, 2000))).tolist()) == [6, 64, 96, 164]
    assert tally.files[0]["outside_after_shift"] == 2


def test_files_that_are_groups(files: Path, tmp_path: Path) -> None:
    """Without a table of cells; files of three columns have no cells, and so no halves."""
    write_rows(tmp_path / "bare.tsv", [row[:3] for row in make_rows(6)], more="")
    chosen = (FragmentFile(files / "one.tsv.gz", group="young"), FragmentFile(tmp_path / "bare.tsv", group="old"))
    source = source_of(files, assays=(Assay("atac", "insertions", chosen),), labels=None)
    dataset = prepare_fragments(source, tmp_path / "data")
    assert dataset.tracks.names == ["old", "young"]
    everyone = slow_signal(make_rows(1), "insertions", {*CELLS, "TTTT-1"})
    np.testing.assert_array_equal(dataset.targets[0, 1], everyone["chr1"][:200].reshape(10, 20).sum(1))
    table = pd.read_csv(tmp_path / "data.qc.tsv", sep="\t").set_index("track")
    assert table.loc["young", "cells"] == 9
    assert np.isnan(table.loc["old", "reliability"])
    assert table.loc["old", "shallow"]
    (tmp_path / "cells.tsv").write_text(f"barcode\ttype\n{CELLS[0]}\told\n")
    mixed = (*chosen, FragmentFile(files / "two.tsv.gz"))
    labels = CellLabels(tmp_path / "cells.tsv", "type")
    both = prepare_fragments(
        source_of(files, assays=(Assay("atac", "insertions", mixed),), labels=labels), tmp_path / "both"
    )
    one_cell = slow_signal(make_rows(2), "insertions", {CELLS[0]})["chr1"][:200].reshape(10, 20).sum(1)
    np.testing.assert_array_equal(both.targets[0, 0], dataset.targets[0, 0] + one_cell)


# Quality


def test_the_quality_table(files: Path, tmp_path: Path) -> None:
    exons = [("chr1", 301, 500, "+", "g1"), ("chr1", 900, 1400, "-", "g2"), ("chr2", 500, 600, "+", "g3")]
    (tmp_path / "genes.gtf").write_text(
        "".join(f'{c}\tx\texon\t{s}\t{e}\t.\t{d}\t.\tgene_id "{g}"; transcript_id "{g}";\n' for c, s, e, d, g in exons)
    )
    source = source_of(files, gtf=tmp_path / "genes.gtf")
    dataset = prepare_fragments(source, tmp_path / "data")
    table = pd.read_csv(tmp_path / "data.qc.tsv", sep="\t").set_index("track")
    assert table.index.tolist() == dataset.tracks.names
    assert (tmp_path / "data.qc.png").read_bytes().startswith(b"\x89PNG")
    rows = make_rows(1) + make_rows(2)
    wanted = [cell for cell, own in zip(CELLS, TYPES, strict=True) if own == "T"]
    per_cell = Counter(row[3] for row in rows if row[3] in wanted)
    track = table.loc["T_atac"]
    assert (track["cells"], track["fragments"]) == (4, sum(per_cell.values()))
    assert track["fragments_per_cell"] == np.median(list(per_cell.values()))
    halves = [slow_signal(rows, "insertions", {cell for cell in wanted if half_of(cell) == half}) for half in (0, 1)]
    bins = [
        np.concatenate([half[c][: n // 200 * 200].reshape(-1, 20).sum(1) for c, n in LENGTHS.items()])
        for half in halves
    ]
    r = np.corrcoef(*bins)[0, 1]
    assert track["split_half"] == pytest.approx(r)
    sizes = [sum(values.sum() for values in half.values()) for half in halves]
    assert min(sizes) > 0
    assert track["reliability"] == pytest.approx(spearman_brown(r, (sizes[0], sizes[1])))
    assert track["ceiling"] == pytest.approx(track["reliability"] ** 0.5)
    assert track["shallow"] == (track["reliability"] < 0.25)
    notes = dataset.info.notes["tracks"]["T_atac"]
    assert set(notes["ceilings"]) == {"train", "valid", "test"}
    assert notes["ceiling"] == pytest.approx(track["ceiling"])
    atac = dataset.targets[:, :3]
    assert track["soft_clip"] == np.quantile(atac[atac > 0], 0.999, method="inverted_cdf")
    assert table.loc["NK_atac", "soft_clip"] == track["soft_clip"] != table.loc["NK_mark", "soft_clip"]
    assert dataset.tracks.frame["soft_clip"].isna().all()  # suggested, not taken


def test_a_suggested_soft_clip_is_taken_when_asked_for(files: Path, tmp_path: Path) -> None:
    assays = (Assay("atac", "insertions", (FragmentFile(files / "one.tsv.gz"),), squash="sqrt", soft_clip="suggested"),)
    dataset = prepare_fragments(source_of(files, assays=assays), tmp_path / "data")
    raw = np.quantile(dataset.targets[dataset.targets > 0], 0.999, method="inverted_cdf")
    assert dataset.tracks.names == ["B", "NK", "T"]
    assert dataset.tracks.frame["soft_clip"].tolist() == pytest.approx([np.sqrt(1 + raw) - 1] * 3)


def quality_of(regions: int) -> Quality:
    return Quality(TrackTable.build([{"name": "a"}]), np.zeros((regions, 6)), np.zeros((1 << 20) + 1, np.int64))


def test_enrichment_at_transcription_starts() -> None:
    """Against a count of every pair of a mark and a start."""
    rng = np.random.default_rng(0)
    position, minus = np.sort(rng.integers(0, 20000, 40)), rng.random(40) < 0.5
    near = (position[rng.integers(0, 40, 900)] + rng.integers(-50, 50, 900)).clip(0)
    marks = np.concatenate([rng.integers(0, 20000, 4000), near]).astype(np.int32)
    profile = np.zeros(4000)
    for site, reverse in zip(position.tolist(), minus.tolist(), strict=True):
        for mark in marks.tolist():
            distance = (site - mark if reverse else mark - site) + 2000
            if 0 <= distance < 4000:
                profile[distance] += 1
    quality = quality_of(1)
    quality.add_marks([marks[:1000], marks[1000:]], (position, minus))
    np.testing.assert_array_equal(quality.profile, profile)
    flanks = np.concatenate([profile[:100], profile[-100:]]).mean()
    assert quality.tss_enrichment == pytest.approx(profile[1990:2010].mean() / flanks)
    assert quality.tss_enrichment > 2
    assert np.isnan(quality_of(1).tss_enrichment)


def test_split_halves_tell_signal_from_noise() -> None:
    """The ceiling of simulated cells is what a prediction of the true rates reaches."""
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.5, 4.0, (50, 40))
    halves = [rng.poisson(rate).astype(float) for _ in range(2)]
    quality = quality_of(50)
    usable = np.ones((50, 40), dtype=bool)
    usable[0] = False
    quality.add_bins(np.arange(50), halves, usable, 20)
    quality.depths = [half.sum() for half in halves]
    r, reliability = quality.split_half(np.ones(50, dtype=bool))
    assert r == pytest.approx(np.corrcoef(halves[0][1:].ravel(), halves[1][1:].ravel())[0, 1])
    truth = np.corrcoef(rate[1:].ravel(), (halves[0] + halves[1])[1:].ravel())[0, 1]
    assert reliability**0.5 == pytest.approx(truth, abs=0.01)
    noise = quality_of(50)
    noise.add_bins(np.arange(50), [rng.poisson(1.0, (50, 40)).astype(float) for _ in range(2)], usable, 20)
    noise.depths = [1.0, 1.0]
    assert noise.split_half(np.ones(50, dtype=bool))[1] < 0.1


def test_signs_in_names_of_groups(files: Path, tmp_path: Path) -> None:
    """CD4+ and CD8- are groups, not strands; their bigWigs have names that files can have."""
    names = {"B": "CD4+ naive", "T": "CD8-", "NK": "NK/other"}
    table = pd.DataFrame({"barcode": CELLS, "type": [names[own] for own in TYPES]})
    table.to_csv(tmp_path / "cells.tsv", sep="\t", index=False)
    assays = (Assay("atac", "insertions", (FragmentFile(files / "one.tsv.gz"),)),)
    source = source_of(
        files, assays=assays, labels=CellLabels(tmp_path / "cells.tsv", "type"), write_bigwigs=tmp_path / "bw"
    )
    dataset = prepare_fragments(source, tmp_path / "data")
    assert dataset.tracks.names == ["CD4+ naive", "CD8-", "NK/other"]
    assert dataset.tracks.strands == [".", ".", "."]
    assert sorted(path.name for path in (tmp_path / "bw").iterdir()) == ["CD4+_naive.bw", "CD8-.bw", "NK_other.bw"]


def test_contigs_without_regions(files: Path, tmp_path: Path) -> None:
    """They are in the bigWigs, and in no table: with and without bigWigs the tables are the same."""
    (tmp_path / "r.bed").write_text("chr1\t0\t200\nchr1\t400\t600\nchr2\t0\t200\n")
    settings = {"regions": tmp_path / "r.bed", "folds": Folds(by="chromosome", test=("chr2",))}
    plain = prepare_fragments(source_of(files, **settings), tmp_path / "plain")
    written = prepare_fragments(source_of(files, **settings, write_bigwigs=tmp_path / "bw"), tmp_path / "written")
    assert (tmp_path / "plain.qc.tsv").read_text() == (tmp_path / "written.qc.tsv").read_text()
    assert plain.info.notes["fragment_files"] == written.info.notes["fragment_files"]
    assert plain.info.notes["fragment_files"][0]["on_unused_contigs"] > 0
    signal = slow_signal(
        make_rows(1), "fragments", {cell for cell, own in zip(CELLS, TYPES, strict=True) if own == "T"}
    )
    whole = read_bases(tmp_path / "bw" / "T_cover.bw", Interval("chr3", 0, 900))
    np.testing.assert_array_equal(whole, signal["chr3"])


def test_bigwigs_of_a_failed_preparation_are_removed(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        if path.name.startswith("T"):
            raise RunError("the bigWig could not be written to its end", where=path)
        path.touch()

    monkeypatch.setattr(fragments, "write_bigwig", full)
    with pytest.raises(RunError, match="could not be written to its end"):
        prepare_fragments(source_of(files, write_bigwigs=tmp_path / "bw"), tmp_path / "data")
    assert not list((tmp_path / "bw").iterdir())
    assert not list(tmp_path.glob("*data*/"))


def test_all_that_is_wrong_is_said_at_once(files: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.tsv").write_text("chr1\t9\t5\tA\n")
    bad = (FragmentFile(tmp_path / "bad.tsv"), FragmentFile(files / "one.tsv.gz"), FragmentFile(tmp_path / "bad.tsv"))
    with pytest.raises(SeqgraftError, match="2 problems were found"):
        prepare_fragments(source_of(files, assays=(Assay("a", "insertions", bad),)), tmp_path / "data")
    missing = (FragmentFile(tmp_path / "no.tsv"), FragmentFile(tmp_path / "none.tsv"))
    with pytest.raises(SeqgraftError, match="2 problems were found"):
        prepare_fragments(source_of(files, assays=(Assay("a", "insertions", missing),)), tmp_path / "data")
    assert not (tmp_path / "data").exists()
