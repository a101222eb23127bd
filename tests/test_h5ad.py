"""Matrices of single cells: sums over groups in every layout, places of peaks and genes, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from builders import write_h5ad
from seqgraft.data import h5ad_files, prepare_source
from seqgraft.data.dataset import Dataset
from seqgraft.data.folds import Folds
from seqgraft.data.gene_starts import GeneTable
from seqgraft.data.h5ad import H5adSource
from seqgraft.errors import ConfigError, DataError
from seqgraft.sequence import decode

PEAKS = [f"chr{c}:{start}-{start + 60}" for c in (1, 2, 3) for start in range(100, 900, 200)]
TYPES = ["B", "T", "B", "", "T", "NK", "B", "T", "NK", "B"]
COUNTS = np.random.default_rng(0).poisson(1.5, (len(TYPES), len(PEAKS))).astype(np.float32)
FOLDS = Folds(by="chromosome", valid=("chr2",), test=("chr3",))


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    contigs = "".join(f">chr{c}\n{decode(rng.integers(0, 4, 1000).astype(np.uint8))}\n" for c in (1, 2, 3))
    (tmp_path / "genome.fa").write_text(contigs)
    return tmp_path / "genome.fa"


def source_of(genome: Path, **settings: Any) -> H5adSource:
    given = {"path": genome.with_name("a.h5ad"), "group": "type", "genome": genome, "window": 40, "folds": FOLDS}
    return H5adSource(**(given | settings))


def prepare(
    genome: Path, counts: Any = COUNTS, features: Any = PEAKS, *, source: Any = None, **written: Any
) -> Dataset:
    write_h5ad(genome.with_name("a.h5ad"), counts, features, TYPES, **written)
    folder = genome.with_name(f"out{len(list(genome.parent.iterdir()))}")
    return prepare_source(source_of(genome, **(source or {})), folder)


def targets(data: Dataset) -> pd.DataFrame:
    return pd.DataFrame(data.raw_targets(np.arange(len(data)))[:, :, 0], data.regions["name"], data.tracks.names)


def slow(counts: Any = COUNTS) -> pd.DataFrame:
    """The same with pandas."""
    sums = pd.DataFrame(counts, columns=PEAKS).groupby(np.array(TYPES)).sum().drop(index="")
    return np.log1p(1e6 * sums.div(sums.sum(axis=1), axis=0)).T


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_every_layout_is_the_sum_over_groups(genome: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h5ad_files, "PIECE", piece)
    counts = COUNTS.copy()
    counts[2] = counts[:, 3] = 0  # an empty cell, and a peak without counts
    found = [
        targets(prepare(genome, counts, layout=layout, legacy=legacy, layer=layer, source={"layer": layer}))
        for layout, legacy, layer in (
            *(("dense", False, None), ("csr", False, None), ("csc", False, None)),
            *(("csr", True, None), ("csc", True, "counts"), ("dense", False, "counts")),
        )
    ]
    expected = slow(counts)
    assert list(found[0].columns) == ["B", "NK", "T"]
    for table in found:
        pd.testing.assert_frame_equal(table, found[0], check_exact=True)
        np.testing.assert_allclose(table.to_numpy(), expected.to_numpy(), rtol=1e-6)


def test_regions_are_windows_around_the_middle(genome: Path) -> None:
    data = prepare(genome)
    assert data.info.kind == "labelled"
    assert data.info.window == 40
    assert data.regions[["chrom", "start", "end"]].iloc[0].tolist() == ["chr1", 110, 150]
    assert data.regions["fold"].tolist() == ["train"] * 4 + ["valid"] * 4 + ["test"] * 4
    assert data.tracks.frame["condition"].tolist() == ["B", "NK", "T"]
    assert data.tracks.groups == {"cells": [0, 1, 2]}
    assert data.info.notes["cells_left_out"] == 1
    group = data.info.notes["groups"]["T"]
    assert (group["cells"], group["counts"]) == (3, COUNTS[[1, 4, 7]].sum())
    assert group["ceiling"] is None or 0 < group["ceiling"] <= 1
    with pytest.raises(DataError, match="no column: 'kind'"):
        prepare(genome, source={"group": "kind"})


def test_places_from_names_and_columns(genome: Path) -> None:
    expected = prepare(genome).regions[["chrom", "start", "end", "strand"]]
    dashes = prepare(genome, features=[name.replace(":", "-") for name in PEAKS])
    pd.testing.assert_frame_equal(dashes.regions[expected.columns], expected)
    parts = [name.replace(":", "-").split("-") for name in PEAKS]
    var = {"seq": [p[0][3:] for p in parts], "from": [int(p[1]) for p in parts], "to": [float(p[2]) for p in parts]}
    var["side"] = ["-"] * len(parts)
    settings = {"interval": ("seq", "from", "to", "side"), "rename": {"1": "chr1", "2": "chr2", "3": "chr3"}}
    columns = prepare(genome, features=[f"p{i}" for i in range(len(parts))], var=var, source=settings)
    pd.testing.assert_frame_equal(columns.regions[expected.columns], expected.assign(strand="-"))
    by_column = {"folds": Folds(by="column", column="split")}
    splits = prepare(genome, var={"split": ["train"] * 6 + ["valid"] * 3 + ["test"] * 3}, source=by_column)
    assert splits.regions["fold"].value_counts().to_dict() == {"train": 6, "valid": 3, "test": 3}


def test_genes_start_where_the_gtf_says(genome: Path) -> None:
    rows = []
    for number, place in enumerate(PEAKS):
        chrom, _, span = place.partition(":")
        start, end = map(int, span.split("-"))
        side = "+-"[number % 2]
        attributes = f'gene_id "G{number}"; gene_name "N{number}";'
        rows.append(f"{chrom}\ts\texon\t{start + 1}\t{end}\t.\t{side}\t.\t{attributes}\n")
    gtf = genome.with_name("genes.gtf")
    gtf.write_text("".join(rows))
    features = [f"{'GN'[number % 3 == 0]}{number}" for number in range(len(PEAKS))]
    data = prepare(genome, features=features, source={"genes": GeneTable(gtf=gtf)})
    assert data.regions["name"].tolist() == features
    assert data.regions["strand"].tolist() == ["+", "-"] * 6
    assert (data.regions["start"] + 20).tolist()[:2] == [100, 359]  # first and last base of the exon
    absent = [*features[:-1], "other"]
    with pytest.raises(DataError, match=r"1 of 12 features are not on the genome.*no such gene.*'other'"):
        prepare(genome, features=absent, source={"genes": GeneTable(gtf=gtf)})
    fewer = prepare(genome, features=absent, source={"genes": GeneTable(gtf=gtf), "max_skipped": 0.1})
    assert len(fewer) == 11
    assert fewer.info.notes["skipped"] == [{"name": "other", "reason": "no such gene in the table of genes"}]


def test_groups_are_merged_dropped_and_taken_as_they_are(genome: Path) -> None:
    data = prepare(genome, source={"merge": {"lymph": ("B", "T")}, "drop": ("NK",), "normalise": "none",
                                   "transform": "none"})  # fmt: skip
    found = targets(data)
    assert list(found) == ["lymph"]
    np.testing.assert_array_equal(found["lymph"], COUNTS[[0, 1, 2, 4, 6, 7, 9]].sum(axis=0))
    each = prepare(genome, source={"group": "_index", "normalise": "none", "transform": "none"})
    np.testing.assert_array_equal(targets(each).to_numpy(), COUNTS.T)
    with pytest.raises(DataError, match="no cell is of the group: 'mono'"):
        prepare(genome, source={"drop": ("mono",)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, r"cell 2, feature 3 is not a count: -1\.0\. Give counts"),
        (np.nan, r"a.h5ad, X: cell 2, feature 3 is not a count: nan"),
        (0.5, r"values are not whole numbers: they may be logarithms: 1\. Name the layer"),
    ],
)
def test_values_that_are_no_counts(genome: Path, value: float, message: str) -> None:
    counts = COUNTS.copy()
    counts[1, 2] = value
    for layout in ("dense", "csr", "csc"):
        with pytest.raises(DataError, match=message):
            prepare(genome, counts, layout=layout)
    if value == 0.5:
        np.testing.assert_allclose(
            targets(prepare(genome, counts, source={"fractions": True})), slow(counts), rtol=1e-6
        )


def test_groups_and_features_that_are_refused(genome: Path) -> None:
    empty = COUNTS.copy()
    empty[[5, 8]] = 0
    with pytest.raises(DataError, match=r"the cells of the group have no counts: 'NK'. Add drop: \[NK\]"):
        prepare(genome, empty)
    with pytest.raises(DataError, match=r"12 of 12 features have no place; the first is: 'gene0'. Give names such as"):
        prepare(genome, features=[f"gene{i}" for i in range(12)])
    with pytest.raises(DataError, match=r"the genome has no chromosome: '1'.*rename: \{'1': 'chr1'"):
        prepare(genome, features=[name.removeprefix("chr") for name in PEAKS])
    with pytest.raises(DataError, match=r"1 of 12 features are not on the genome.*chromosome.*'chrUn:1-9'"):
        prepare(genome, features=[*PEAKS[:-1], "chrUn:1-9"])
    with pytest.raises(DataError, match=r"1 features reach beyond the end.*'chr3:990-1100.*same assembly"):
        prepare(genome, features=[*PEAKS[:-1], "chr3:990-1100"])
    with pytest.raises(DataError, match=r"1 features have the name of another, such as: 'chr1:100-160'"):
        prepare(genome, features=[*PEAKS[:-1], PEAKS[0]])
    with pytest.raises(DataError, match=r"has no layer: 'counts'. It has raw"):
        prepare(genome, layer="raw", source={"layer": "counts"})


def test_a_category_without_a_cell(genome: Path) -> None:
    import h5py

    path = write_h5ad(genome.with_name("a.h5ad"), COUNTS, PEAKS, TYPES)
    with h5py.File(path, "a") as file:
        del file["obs/type/categories"]
        file["obs/type/categories"] = np.array(["B", "NK", "T", "mono"], dtype=object)
    with pytest.raises(DataError, match=r"no cell is of the group: 'mono'. Leave it out with drop: \[mono\]"):
        prepare_source(source_of(genome), genome.with_name("one"))
    assert len(prepare_source(source_of(genome, drop=("mono",)), genome.with_name("two")).tracks) == 3


def test_files_that_are_damaged(genome: Path) -> None:
    path = write_h5ad(genome.with_name("a.h5ad"), COUNTS, PEAKS, TYPES)
    whole = path.read_bytes()
    for content in (b"no HDF5", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.h5ad: the .h5ad cannot be read .*truncated"):
            prepare_source(source_of(genome), genome.with_name("out"))
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        prepare_source(source_of(genome), genome.with_name("out"))
    import h5py

    write_h5ad(path, COUNTS, PEAKS, TYPES)
    with h5py.File(path, "a") as file:
        file["X/indices"][0] = len(PEAKS)
    with pytest.raises(DataError, match="an index that is too large"):
        prepare_source(source_of(genome), genome.with_name("out"))
    with h5py.File(path, "a") as file:
        file["X/indptr"][1] = 10_000
    with pytest.raises(DataError, match="its parts disagree"):
        prepare_source(source_of(genome), genome.with_name("out"))
    assert not genome.with_name("out").exists()


def test_settings_that_cannot_be(genome: Path) -> None:
    for settings, message in (
        ({"interval": ("chrom", "start", "end"), "genes": GeneTable(gtf=Path("g"))}, "intervals or genes"),
        ({"interval": ("chrom",)}, "three or four columns"),
        ({"genes": GeneTable()}, "must be said once"),
        ({"window": 0}, "not positive"),
        ({"max_skipped": 1.0}, "not a share"),
    ):
        with pytest.raises(ConfigError, match=message):
            source_of(genome, **settings)
