"""Predictions to files, read back; and what to predict: intervals and sequences."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch

from seqgraft.data.covariates import SENSE_CODONS
from seqgraft.data.dataset import Dataset, DatasetInfo
from seqgraft.data.labelled import LabelledFile, LabelledSource, prepare_labelled
from seqgraft.errors import ConfigError, DataError, RunError, SeqgraftError
from seqgraft.genome import Genome, Interval
from seqgraft.models.base import Head, SequenceModel
from seqgraft.models.convnet import ConvNet
from seqgraft.output import write_embeddings, write_predictions
from seqgraft.predict import embed, predict, predict_batches
from seqgraft.regions import regions_for_prediction
from seqgraft.sequence import PAD, decode, encode
from seqgraft.tracks import TrackTable, open_bigwig, read_bases, read_bins, squash, unsquash

CONTIGS = {"chrB": 700, "chrA": 530, "chrC": 64}  # the genome's order is not the alphabet's
COVERAGE = DatasetInfo(kind="coverage", window=128, bins=4, bin_size=16)
LABELS = DatasetInfo(kind="labelled", window=32, bins=1, bin_size=32)
TRACKS = TrackTable.build(
    [
        {"name": "rna+", "squash": "sqrt", "scale": 0.5},
        {"name": "rna-", "squash": "sqrt", "scale": 0.5},
        {"name": "atac/x y", "statistic": "mean", "squash": "exp75", "soft_clip": 3.0},
    ]
)
CLASSES = TrackTable.build([{"name": name, "group": "label", "link": "softmax"} for name in ("yes", "no")])
BED = (
    "chrC\t0\t64\tlast\nchrB\t100\t101\tpoint\t0\t-\nchrA\t466\t530\tend\nchrB\t0\t40\tstart\nchrB\t121\t161\toverlap\n"
)

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    rng = np.random.default_rng(0)
    path.write_text("".join(f">{name}\n{''.join(rng.choice(list('ACGT'), n))}\n" for name, n in CONTIGS.items()))
    return Genome.open(path)


@pytest.fixture
def bed(tmp_path: Path) -> Path:
    path = tmp_path / "regions.bed"
    path.write_text(BED)
    return path


@pytest.fixture
def coverage(bed: Path, genome: Genome) -> Dataset:
    return regions_for_prediction(bed, COVERAGE, TRACKS, genome)


def labels(tmp_path: Path, info: DatasetInfo = LABELS) -> Dataset:
    path = tmp_path / "sequences.csv"
    path.write_text(f"name,sequence\nlong,{'ACGT' * 8}\nshort,GGGTTT\n")
    return regions_for_prediction(path, info, CLASSES)


def raw_values(dataset: Dataset, tracks: TrackTable, seed: int = 0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).gamma(1, 5, (len(dataset), len(tracks), dataset.info.bins))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def batches(dataset: Dataset, raw: npt.NDArray[np.float64], size: int = 2) -> list[Batch]:
    squashed = np.asarray(squash(raw, TRACKS, dataset.info.bin_size), np.float32)
    rows = np.arange(len(dataset))
    return [(rows[i : i + size], squashed[i : i + size]) for i in range(0, len(dataset), size)]


# ---- regions ----


def test_bed_regions_are_centred_target_intervals(coverage: Dataset, genome: Genome) -> None:
    assert coverage.regions[["start", "end"]].to_numpy().tolist()[1:3] == [[68, 132], [466, 530]]
    assert (coverage.regions["end"] - coverage.regions["start"] == 64).all()
    assert coverage.regions[["bed_start", "bed_end"]].iloc[1].tolist() == [100, 101]
    assert set(coverage.regions["strand"]) == {"."}, "coverage is in the direction of the genome"
    codes, lengths = coverage.sequences([1])
    assert lengths.tolist() == [128]
    assert decode(codes[0]) == decode(genome.codes(Interval("chrB", 36, 164)))
    sample = coverage.sample([0, 1])
    assert not sample.mask.any()
    assert sample.targets.shape == (2, 3, 4)


def test_strand_turns_labelled_sequences(bed: Path, genome: Genome) -> None:
    dataset = regions_for_prediction(bed, LABELS, CLASSES, genome)
    centre = genome.codes(Interval("chrB", 84, 116))  # as Interval(100, 101).resize(32)
    assert Interval("chrB", 100, 101).resize(32).start == 84
    assert (dataset.sequences([1])[0][0] == 3 - centre[::-1]).all()


def test_sequences_are_padded_and_keep_their_lengths(tmp_path: Path) -> None:
    dataset = labels(tmp_path)
    assert dataset.lengths is not None
    assert dataset.lengths.tolist() == [32, 6]
    codes, _ = dataset.sequences([0, 1])
    assert (codes[1, 6:] == PAD).all()
    assert dataset.regions["name"].tolist() == ["long", "short"]


@pytest.mark.parametrize("suffix", [".fa", ".fasta.gz", ".tsv", ".parquet", ".csv"])
def test_every_format_of_sequences_gives_the_same(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"sequences{suffix}"
    sequences = {"a": "ACGTN", "b": "ttga"}
    frame = pd.DataFrame({"name": sequences.keys(), "sequence": sequences.values()})
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif "fa" in suffix:
        text = ">a first\nACG\nTN\n\n>b\nttga\n"
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    else:
        frame.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    dataset = regions_for_prediction(path, replace(LABELS, window=0), CLASSES)
    assert dataset.regions["name"].tolist() == ["a", "b"]
    assert dataset.codes is not None
    assert dataset.codes[0].tolist() == encode("ACGTN").tolist()
    assert decode(dataset.codes[1]) == "TTGA."


def test_covariates_come_from_the_table(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("sequence,codons,gc\nACGT,1,0.5\nAC,2,0.25\n")
    sample = regions_for_prediction(path, LABELS, CLASSES, covariates=["gc", "codons"]).sample([0, 1])
    assert sample.covariates["covariates"].tolist() == [[0.5, 1], [0.25, 2]]
    path.write_text("sequence,gc\nACGT,x\n")
    with pytest.raises(DataError, match=r"sequence 1, column 'gc': this is not a finite number: 'x'"):
        regions_for_prediction(path, LABELS, CLASSES, covariates=["gc"])
    with pytest.raises(ConfigError, match="covariates"):
        regions_for_prediction(tmp_path / "s.fa", LABELS, CLASSES, covariates=["gc"])


def test_covariates_are_computed_and_scaled_as_in_training(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codons = [codon for codon in SENSE_CODONS if rng.random() < 0.5]
    table = pd.DataFrame(
        {
            "sequence": [decode(row) for row in rng.integers(0, 4, (10, 8)).astype(np.uint8)],
            "label": [0, 1] * 5,
            "gc": rng.random(10),
            "cds": ["ATG" + "".join(rng.choice(codons, size)) + "TAA" for size in range(5, 15)],
            "fold": ["train"] * 6 + ["valid"] * 2 + ["test"] * 2,
        }
    )
    table.to_csv(tmp_path / "data.csv", index=False)
    source = LabelledSource(
        (LabelledFile(tmp_path / "data.csv"),), covariates=("gc",), codons="cds", lengths=("cds", "sequence")
    )
    dataset = prepare_labelled(source, tmp_path / "out")
    assert dataset.covariates is not None
    assert dataset.covariates.shape == (10, 1 + 61 + 2)
    again = regions_for_prediction(
        tmp_path / "data.csv", dataset.info, dataset.tracks, covariates=list(dataset.covariates)
    )
    pd.testing.assert_frame_equal(again.covariates, dataset.covariates)
    table.drop(columns="cds").to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(DataError, match="no column: 'cds'"):
        regions_for_prediction(tmp_path / "less.csv", dataset.info, dataset.tracks, covariates=list(dataset.covariates))


BAD_REGIONS = [
    ("r.bed", "", "no intervals"),
    ("r.bed", "chrX\t0\t10\n", "no chromosome: 'chrX'"),
    ("r.bed", "A\t0\t10\n", "no chromosome: 'A'"),
    ("r.bed", "chrC\t0\t65\nchrC\t70\t80\n", "2 problems"),
    ("r.txt", "ACGT\n", "format of the regions"),
    ("s.csv", "seq\nACGT\n", "no column: 'sequence'"),
    ("s.csv", "sequence\n", "no sequences"),
    ("s.csv", "", "cannot be read"),
    ("s.parquet", "no", "cannot be read"),
    ("s.csv", f'sequence\n{"A" * 129}\nAC-T\n""\n', "3 problems"),
    ("s.csv", f"sequence\n{'A' * 127}\n", "exactly 128 bp"),
    ("s.fa", "ACGT\n", "does not start with '>'"),
    ("s.fa", "", "no sequences"),
    ("s.fa", ">a\n>b\nACGT\n", "sequence is empty"),
    ("s.fa.gz", ">a\nACGT\n", "cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_REGIONS)
def test_bad_regions(tmp_path: Path, genome: Genome, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(SeqgraftError, match=message):
        regions_for_prediction(path, COVERAGE, TRACKS, genome)


def test_regions_that_do_not_suit_the_model(tmp_path: Path, bed: Path, genome: Genome) -> None:
    with pytest.raises(ConfigError, match="need a genome"):
        regions_for_prediction(bed, COVERAGE, TRACKS)
    with pytest.raises(ConfigError, match="no window"):
        regions_for_prediction(bed, replace(LABELS, window=0), CLASSES, genome)
    with pytest.raises(DataError, match="does not exist"):
        regions_for_prediction(tmp_path / "absent.bed", COVERAGE, TRACKS, genome)


# ---- with a model ----


def test_a_model_predicts_and_embeds_them(coverage: Dataset, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trunk = ConvNet(channels=16, depth=2, blocks=1, bin_size=16, crop=2)
    model = SequenceModel(trunk, {"tracks": Head(TRACKS, 16)}, TRACKS).eval()
    rows = np.arange(len(coverage))
    write_predictions(tmp_path / "p.parquet", coverage, predict_batches(model, coverage, rows, batch_size=2), TRACKS)
    table = pd.read_parquet(tmp_path / "p.parquet")
    expected = unsquash(predict(model, coverage, rows).astype(np.float64), TRACKS, 16)
    np.testing.assert_allclose(table["value"].to_numpy().reshape(5, 3, 4), expected, rtol=1e-4, atol=1e-5)
    features = embed(model, coverage, rows)
    for name in ("e.parquet", "e.npz"):
        write_embeddings(tmp_path / name, coverage, rows, features)
    frame = pd.read_parquet(tmp_path / "e.parquet")
    np.testing.assert_array_equal(frame[[f"e{i}" for i in range(16)]].to_numpy(), features)
    assert frame["chrom"].tolist() == coverage.regions["chrom"].tolist()
    with np.load(tmp_path / "e.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["embeddings"], features)
        assert file["name"].tolist() == coverage.regions["name"].tolist()
        assert file["start"].tolist() == coverage.regions["start"].tolist()


# ---- tables ----


@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.tsv"])
def test_tables_have_a_row_per_region_track_and_bin(tmp_path: Path, coverage: Dataset, name: str) -> None:
    raw, out = raw_values(coverage, TRACKS), tmp_path / "deep" / name
    assert write_predictions(out, coverage, iter(batches(coverage, raw)), TRACKS) == [out]
    table = (
        pd.read_parquet(out)
        if name.endswith("parquet")
        else pd.read_csv(out, sep="\t" if name.endswith("tsv") else ",")
    )
    assert list(table.columns) == ["region", "name", "chrom", "start", "end", "track", "value"]
    assert len(table) == 5 * 3 * 4
    np.testing.assert_allclose(table["value"], raw.ravel(), rtol=1e-4, atol=1e-4)
    third = table[(table["region"] == 2) & (table["track"] == "rna-")]
    assert third["start"].tolist() == [466, 482, 498, 514]
    assert third["end"].tolist() == [482, 498, 514, 530]
    assert set(third["name"]) == {"end"}
    assert [path.name for path in out.parent.iterdir()] == [name]


def test_labels_are_written_as_they_are(tmp_path: Path) -> None:
    dataset, out = labels(tmp_path), tmp_path / "p.csv"
    probabilities = np.array([[[0.9], [0.1]], [[0.25], [0.75]]], dtype=np.float32)
    write_predictions(out, dataset, [(np.arange(2), probabilities)], CLASSES)
    assert pd.read_csv(out).to_numpy().tolist() == [
        [0, "long", "yes", 0.9], [0, "long", "no", 0.1], [1, "short", "yes", 0.25], [1, "short", "no", 0.75],
    ]  # fmt: skip


# ---- zarr ----


def test_zarr(tmp_path: Path, coverage: Dataset) -> None:
    zarr = pytest.importorskip("zarr")
    raw, out = raw_values(coverage, TRACKS), tmp_path / "p.zarr"
    write_predictions(out, coverage, batches(coverage, raw)[::-1], TRACKS)  # in any order
    group = zarr.open_group(out, mode="r")
    order = group["region"][:]
    np.testing.assert_allclose(group["values"][:], raw[order], rtol=1e-4, atol=1e-4)
    assert group.attrs["tracks"] == TRACKS.names
    assert group.attrs["unit"] == "raw sum per bin"
    assert [group.attrs["chroms"][c] for c in group["chrom"][:]] == coverage.regions["chrom"].iloc[order].tolist()
    assert group["start"][:].tolist() == coverage.regions["start"].iloc[order].tolist()


def test_zarr_missing_names_the_extra(tmp_path: Path, coverage: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"seqgraft\[zarr\]"):
        write_predictions(tmp_path / "p.zarr", coverage, [], TRACKS)


# ---- bigWig ----


def test_bigwigs_give_the_raw_bins_back(tmp_path: Path, genome: Genome) -> None:
    """Disjoint regions, in any order: summing the bases of the file over the bins gives what the model predicted."""
    path, out = tmp_path / "r.bed", tmp_path / "p.bw"
    path.write_text("chrC\t0\t64\nchrB\t300\t364\nchrA\t466\t530\nchrB\t3\t67\n")
    dataset = regions_for_prediction(path, COVERAGE, TRACKS, genome)
    raw = raw_values(dataset, TRACKS)
    files = write_predictions(out, dataset, iter(batches(dataset, raw)), TRACKS)
    assert files == [out / "rna+.bw", out / "rna-.bw", out / "atac_x_y.bw"]
    assert names(tmp_path) == ["p.bw", "r.bed"]
    for track, file in enumerate(files):
        with open_bigwig(file) as reader:
            assert reader.chroms() == CONTIGS
        for row, region in dataset.regions.iterrows():
            interval = Interval(region["chrom"], region["start"], region["end"])
            np.testing.assert_allclose(read_bins(file, interval, 16), raw[row, track], rtol=1e-4, atol=1e-3)
        assert not read_bases(file, Interval("chrB", 67, 300)).any()


def test_overlapping_regions_are_averaged(tmp_path: Path, coverage: Dataset, genome: Genome) -> None:
    """Against the plain way: every base of every region added up, divided by how many regions it has."""
    one = TrackTable.build([{"name": "rna"}])
    rng = np.random.default_rng(1)
    starts = rng.integers(-30, 720, 60)
    regions = pd.DataFrame({"chrom": rng.choice(["chrA", "chrB"], 60), "start": starts, "end": starts + 64})
    dataset = replace(coverage, tracks=one, regions=regions.assign(strand=".", name="", fold="predict"))
    values = rng.gamma(1, 5, (60, 1, 4)).astype(np.float32)
    out = tmp_path / "p.bigWig"
    assert write_predictions(out, dataset, [(np.arange(60), values)], one) == [out]
    for chrom in ("chrA", "chrB"):
        total, count = np.zeros(1000), np.zeros(1000)
        for row in np.flatnonzero(regions["chrom"] == chrom):
            place = slice(starts[row] + 100, starts[row] + 164)  # 100: regions may begin before the contig
            total[place] += np.repeat(values[row, 0], 16) / 16
            count[place] += 1
        mean = (total / np.maximum(count, 1))[100 : 100 + CONTIGS[chrom]]
        np.testing.assert_allclose(read_bases(out, Interval(chrom, 0, CONTIGS[chrom])), mean, rtol=1e-4, atol=1e-4)


def test_labels_on_a_genome_keep_their_value(tmp_path: Path, bed: Path, genome: Genome) -> None:
    dataset = regions_for_prediction(bed, LABELS, CLASSES, genome)
    values = np.full((5, 2, 1), 0.25, dtype=np.float32)
    files = write_predictions(tmp_path / "p.bw", dataset, [(np.arange(5), values)], CLASSES)
    assert read_bases(files[0], Interval("chrC", 16, 48)).tolist() == [0.25] * 32


def test_names_that_collide_as_files(tmp_path: Path, coverage: Dataset) -> None:
    tracks = TrackTable.build([{"name": name} for name in ("a b", "a/b", "A_B", "../x")])
    files = write_predictions(tmp_path / "p.bw", coverage, [(np.arange(5), np.ones((5, 4, 4), np.float32))], tracks)
    assert [path.name for path in files] == ["a_b.bw", "a_b_2.bw", "A_B_3.bw", "_x.bw"]


def test_sequences_cannot_be_a_bigwig(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without a place"):
        write_predictions(tmp_path / "p.bw", labels(tmp_path), [], CLASSES)


# ---- failures ----


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".zarr", ".bw"])
def test_nothing_is_left_of_a_prediction_that_fails(tmp_path: Path, coverage: Dataset, bed: Path, suffix: str) -> None:
    def failing():  # type: ignore[no-untyped-def]
        yield batches(coverage, raw_values(coverage, TRACKS))[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(tmp_path / f"p{suffix}", coverage, failing(), TRACKS)
    assert names(tmp_path) == [bed.name]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".bw"])
def test_a_full_disk(
    tmp_path: Path, coverage: Dataset, bed: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqgraft.output._parquet", full)
    monkeypatch.setattr("pandas.DataFrame.to_csv", full)
    monkeypatch.setattr("numpy.memmap", full)
    with pytest.raises(RunError, match="No space left on device") as caught:
        write_predictions(tmp_path / f"p{suffix}", coverage, batches(coverage, raw_values(coverage, TRACKS)), TRACKS)
    assert "Free some disk space" in str(caught.value)
    assert names(tmp_path) == [bed.name]


def test_outputs_that_cannot_be(tmp_path: Path, coverage: Dataset) -> None:
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        write_predictions(tmp_path / "there.csv", coverage, [], TRACKS)
    assert (tmp_path / "there.csv").read_text() == "mine"
    with pytest.raises(ConfigError, match="format of the output"):
        write_predictions(tmp_path / "p.xls", coverage, [], TRACKS)
    with pytest.raises(RunError, match="cannot be written there"):
        write_predictions(tmp_path / "there.csv" / "p.csv", coverage, [], TRACKS)
    with pytest.raises(ConfigError, match="format of the embeddings"):
        write_embeddings(tmp_path / "e.csv", coverage, np.arange(1), np.ones((1, 2), np.float32))
