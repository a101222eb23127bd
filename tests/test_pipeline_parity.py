"""Binning, blacklist, unmappable bins and both transforms against outputs of the reference pipeline (Baskerville)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from seqgraft.data.coverage import CoverageSource, prepare_coverage
from seqgraft.data.dataset import Dataset
from seqgraft.data.folds import Folds
from seqgraft.data.tables import read_track_table
from seqgraft.data.tiles import tile_regions
from seqgraft.genome import Genome, Interval, read_bed
from seqgraft.tracks import read_bases, squash

BIN, TARGET, WINDOW = 32, 12_288, 16_384
FOLDS = {"fold0": "train", "fold1": "train", "fold2": "valid", "fold3": "test"}


@pytest.fixture(scope="module")
def parity(shared: Path) -> Path:
    return shared / "reference" / "parity"


def reference(parity: Path, old: bool) -> dict[str, np.ndarray]:
    with np.load(parity / "pipeline" / f"reference_out{'_old' if old else ''}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def prepared(parity: Path, folder: Path, old: bool, **settings: Any) -> Dataset:
    """The reference's regions, prepared by us; its table names intermediate .w5 files of the same bigWigs."""
    pipeline = parity / "pipeline"
    table = pd.read_csv(pipeline / f"targets{'_old' if old else ''}.txt", sep="\t", index_col=0)
    table["file"] = [str(pipeline / Path(name).with_suffix(".bw")) for name in table["file"]]
    table.to_csv(folder / "targets.txt", sep="\t")
    arrays = reference(parity, old)
    bed = pd.DataFrame({name: arrays[name] for name in ("chrom", "start", "end", "fold")})
    bed.to_csv(folder / "regions.bed", sep="\t", header=False, index=False)
    source = CoverageSource(
        fasta=parity / "hg38_1m.fa.gz",
        tracks=folder / "targets.txt",
        window=WINDOW,
        target_length=TARGET,
        bin_size=BIN,
        folds=Folds(by="column", column="name", names=FOLDS),
        regions=folder / "regions.bed",
        blacklist=pipeline / "blacklist.bed",
        unmappable=pipeline / "umap.bed",
        transform_old=old,
        **settings,
    )
    return prepare_coverage(source, folder / "dataset")


def written(values: np.ndarray) -> np.ndarray:
    """As the reference writes them: float16, then two decimals."""
    rounded: np.ndarray = np.round(values.astype(np.float16).astype(np.float32), 2).astype(np.float16)
    return rounded


@pytest.mark.parametrize("old", [False, True], ids=["new", "legacy"])
def test_targets_are_the_reference(old: bool, parity: Path, tmp_path: Path) -> None:
    arrays = reference(parity, old)
    dataset = prepared(parity, tmp_path, old, reference_compatible=True)
    ours = written(dataset.squashed_targets(np.arange(len(dataset)))).transpose(0, 2, 1)
    theirs = arrays["targets"]
    assert ours.shape == theirs.shape
    assert dataset.tracks.names == ["A+", "A-", "B", "Bs"] + ([] if old else ["Be"])
    np.testing.assert_array_equal(ours[..., :4], theirs[..., :4])  # to the last bit
    np.testing.assert_array_equal(dataset.sequences(np.arange(len(dataset)))[0], arrays["seq_index"])
    assert dataset.regions["fold"].tolist() == [FOLDS[name] for name in arrays["fold"]]


def test_a_track_that_the_reference_reads_from_a_bigwig(parity: Path, tmp_path: Path) -> None:
    """Equal, but for blacklisted bases: the reference takes the median of a region with uncovered bases for zero."""
    arrays = reference(parity, old=False)
    dataset = prepared(parity, tmp_path, False, reference_compatible=True)
    ours = written(dataset.squashed_targets(np.arange(len(dataset))))[:, 4]
    theirs = arrays["targets"][..., 4]
    assert 0 < (ours != theirs).sum() < 50
    track = dataset.tracks.select(["Be"])
    spans = [(interval.start - 20, interval.end + 20) for interval in read_bed(parity / "pipeline" / "blacklist.bed")]
    for row in np.flatnonzero((ours != theirs).any(axis=1)):
        place = Interval("chr1", int(arrays["start"][row]), int(arrays["end"][row]))
        bases = read_bases(parity / "pipeline" / "B.bw", place).astype(np.float16).astype(np.float32)
        for start, end in spans:
            bases[max(start - place.start, 0) : max(end - place.start, 0)] = 0
        bins = squash(bases.reshape(1, -1, BIN).sum(-1), track, BIN)[0].astype(np.float16)
        unmappable = arrays["unmap"][row]
        bins[unmappable] = np.minimum(bins[unmappable], np.median(bins))
        np.testing.assert_array_equal(written(bins), theirs[row])


@pytest.mark.parametrize("old", [False, True], ids=["new", "legacy"])
def test_by_default_unmappable_bins_are_masked(old: bool, parity: Path, tmp_path: Path) -> None:
    arrays = reference(parity, old)
    dataset = prepared(parity, tmp_path, old)
    ours = dataset.squashed_targets(np.arange(len(dataset)))
    assert dataset.mask is not None
    np.testing.assert_array_equal(np.isnan(ours), np.broadcast_to(arrays["unmap"][:, None, :], ours.shape))
    assert dataset.info.notes["unmappable_bins"] == arrays["unmap"].sum()
    theirs = arrays["targets"].transpose(0, 2, 1)[:, :4]
    np.testing.assert_allclose(np.where(np.isnan(ours[:, :4]), theirs, ours[:, :4]), theirs, atol=0.04)


def test_windows(parity: Path) -> None:
    """The reference cuts contigs at gaps, then into pieces; within a piece its windows are ours."""
    arrays = reference(parity, old=False)
    genome = Genome.open(parity / "hg38_1m.fa.gz")
    gaps = np.array([(gap.start, gap.end) for gap in read_bed(parity / "pipeline" / "gaps.bed")])
    tiles = tile_regions(genome, TARGET, TARGET, gaps={"chr1": gaps})
    starts = np.array(tiles["start"])
    assert all(((starts + TARGET <= left) | (starts >= right)).all() for left, right in gaps)
    pieces = {10_000: 4, 257_666: 3, 347_968: 3, 585_988: 4}  # first base after each gap: windows before the next cut
    for start, count in pieces.items():
        theirs = sorted(s for s in arrays["start"] if start <= s < start + count * TARGET)
        assert theirs == [s for s in starts if start <= s < start + count * TARGET]
        assert len(theirs) == count


def test_the_table(parity: Path) -> None:
    tracks = read_track_table(parity / "pipeline" / "targets.txt")
    assert tracks.frame["squash"].tolist() == ["sqrt", "sqrt", "none", "none", "exp75"]
    assert tracks.frame["statistic"].tolist() == ["sum", "sum", "mean", "sum", "sum"]
    assert tracks.permutation.tolist() == [1, 0, 2, 3, 4]
    assert list(tracks.groups) == ["RNA", "DNASE", "CAGE"]
    old = read_track_table(parity / "pipeline" / "targets_old.txt", transform_old=True)
    assert old.frame["squash"].tolist() == ["power75_legacy", "power75_legacy", "none_legacy", "none_legacy"]
