"""Peaks and the negatives drawn for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seqgraft.data.folds import Folds
from seqgraft.data.peaks import PeakSource, prepare_peaks
from seqgraft.errors import ConfigError, DataError
from seqgraft.sequence import decode

FOLDS = Folds(by="chromosome", test=("chr2",))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PeakSource:
    """Two chromosomes of 60 kb whose GC content rises from 20 to 80 %; 40 peaks, all in the GC-rich half."""
    folder = tmp_path_factory.mktemp("peaks")
    rng = np.random.default_rng(0)
    gc = np.linspace(0.2, 0.8, 60_000)
    rows = []
    with (folder / "genome.fa").open("w") as fasta:
        for chrom in ("chr1", "chr2"):
            codes = np.where(rng.random(gc.size) < gc, rng.integers(1, 3, gc.size), rng.choice([0, 3], gc.size))
            fasta.write(f">{chrom}\n{decode(codes.astype(np.uint8))}\n")
            for start in rng.choice(np.arange(30_000, 58_000, 500), 20, replace=False):
                rows.append(f"{chrom}\t{start}\t{start + 150}\t.\t0\t.\t9\t9\t9\t40")
    (folder / "atac.narrowPeak").write_text("\n".join(rows) + "\n")
    return PeakSource(folder / "atac.narrowPeak", folder / "genome.fa", window=100, folds=FOLDS, distance=50)


def test_negatives_match_and_stay_away(source: PeakSource, tmp_path: Path) -> None:
    repeats, exclude = tmp_path / "repeats.bed", tmp_path / "exclude.bed"
    repeats.write_text("chr1\t100\t200\nchr1\t150\t400\n")
    exclude.write_text("chr1\t40000\t45000\n")
    data = prepare_peaks(replace(source, ratio=1.5, repeats=repeats, exclude=exclude), tmp_path / "out")
    labels = data.raw_targets(np.arange(len(data)))[:, 0, 0]
    peaks, negatives = data.regions[labels == 1], data.regions[labels == 0]
    assert len(peaks) == 40
    assert len(negatives) == 60
    assert data.tracks.frame["link"].tolist() == ["sigmoid"]
    assert (peaks["end"] - peaks["start"] == 100).all()
    for chrom, found in negatives.groupby("chrom"):
        mine = peaks[peaks["chrom"] == chrom]
        starts = np.sort(found["start"].to_numpy())
        assert (np.diff(starts) >= 100).all()
        # peak intervals are 150 bp and the summit is at 40: the window starts 10 bp before the interval
        gaps = [max(peak - 10 - (start + 100), start - (peak + 150)) for start in starts for peak in mine["start"] + 10]
        assert min(gaps) >= 50
        assert len(found) == 30
    on_first = negatives[negatives["chrom"] == "chr1"]
    assert not ((on_first["end"] > 40_000) & (on_first["start"] < 45_000)).any()
    codes, _ = data.sequences(np.arange(len(data)))
    gc = ((codes == 1) | (codes == 2)).mean(axis=1)
    assert gc[labels == 0].mean() == pytest.approx(gc[labels == 1].mean(), abs=0.01)
    assert set(data.regions.groupby("chrom")["fold"].first()) == {"train", "test"}


def test_the_seed_decides(source: PeakSource, tmp_path: Path) -> None:
    first, again, other = (
        prepare_peaks(replace(source, seed=seed), tmp_path / name).regions
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.equals(again)
    assert not first.equals(other)


def test_windows_beyond_the_chromosome(source: PeakSource, tmp_path: Path) -> None:
    bed = tmp_path / "few.bed"
    bed.write_text("chr1\t10\t20\tedge\nchr1\t5000\t5010\nchr1\t5001\t5009\nchr2\t900\t910\n")
    few = replace(source, peaks=bed)
    with pytest.raises(DataError, match=r"1 of 4 windows reach beyond their chromosome.*'edge'"):
        prepare_peaks(few, tmp_path / "out")
    data = prepare_peaks(replace(few, max_skipped=0.5), tmp_path / "out")
    reasons = [entry["reason"] for entry in data.info.notes["skipped"]]
    assert reasons == ["reaches beyond the chromosome", "same window as another peak"]
    assert len(data) == 4


def test_negatives_that_are_not_there(source: PeakSource, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="negatives that match the peaks were not found") as caught:
        prepare_peaks(replace(source, distance=100_000), tmp_path / "out")
    assert "chr1: 20" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_copies_in_another_chromosome_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    text = decode(rng.integers(0, 4, 5_000).astype(np.uint8))
    (tmp_path / "g.fa").write_text(f">chr1\n{text}\n>chr2\n{text}\n")
    (tmp_path / "p.bed").write_text("chr1\t1000\t1010\nchr2\t1000\t1010\n")
    source = PeakSource(tmp_path / "p.bed", tmp_path / "g.fa", 200, FOLDS)
    with pytest.raises(DataError, match=r"identical to train sequences.*peak2 chr2:905-1105 = peak1 chr1:905-1105"):
        prepare_peaks(source, tmp_path / "out")


def test_bad_files_and_settings(source: PeakSource, tmp_path: Path) -> None:
    (tmp_path / "bad.narrowPeak").write_text("chr1\t1000\t1100\t.\t0\t.\n")
    with pytest.raises(DataError, match="1 rows have no summit"):
        prepare_peaks(replace(source, peaks=tmp_path / "bad.narrowPeak"), tmp_path / "out")
    (tmp_path / "named.bed").write_text("1\t1000\t1100\n2\t1000\t1100\n")
    named = replace(source, peaks=tmp_path / "named.bed")
    with pytest.raises(DataError, match="no chromosome: '1'"):
        prepare_peaks(named, tmp_path / "out")
    assert len(prepare_peaks(replace(named, rename={"1": "chr1", "2": "chr2"}), tmp_path / "out")) == 4
    with pytest.raises(ConfigError, match=r"(?s)window.*ratio.*distance.*max_skipped"):
        replace(source, window=0, ratio=0, distance=-1, max_skipped=2)


def test_yeast(shared: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bed = tmp_path / "sites.bed"
    sites = [(chrom, at) for chrom in ("chrII", "chrIV", "chrXIV") for at in rng.integers(1_000, 700_000, 300)]
    bed.write_text("".join(f"{chrom}\t{at}\t{at + 50}\n" for chrom, at in sites))
    folds = Folds(by="chromosome", test=("chrXIV",))
    fasta = shared / "data/yeast/sacCer3.fa.gz"
    source = PeakSource(bed, fasta, 200, folds, distance=100, duplicates="drop")
    data = prepare_peaks(source, tmp_path / "out")
    labels = data.raw_targets(np.arange(len(data)))[:, 0, 0]
    codes, _ = data.sequences(np.arange(len(data)))
    gc = ((codes == 1) | (codes == 2)).mean(axis=1)
    assert (labels == 0).sum() == pytest.approx(900, abs=20)
    assert np.quantile(gc[labels == 0], [0.1, 0.5, 0.9]) == pytest.approx(
        np.quantile(gc[labels == 1], [0.1, 0.5, 0.9]), abs=0.015
    )
