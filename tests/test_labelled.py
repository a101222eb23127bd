"""Labelled sequences: formats, tasks, sequences, what is refused, and the real data."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from seqgraft.baselines import Examples, KmerSettings, covariate_regression, kmer_regression
from seqgraft.data.covariates import SENSE_CODONS
from seqgraft.data.dataset import Dataset
from seqgraft.data.duplicates import copies_in_earlier_folds
from seqgraft.data.folds import Folds
from seqgraft.data.labelled import LabelledFile, LabelledSource, prepare_labelled
from seqgraft.data.labels import Label
from seqgraft.errors import ConfigError, DataError, SeqgraftError
from seqgraft.evaluate import EvaluateConfig, evaluate_model
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.sequence import decode

Prepare = Callable[..., Dataset]
FOLDS = ["train"] * 6 + ["valid"] * 2 + ["test"] * 2


def sequences(count: int = 10, length: int = 30, seed: int = 0) -> list[str]:
    codes = np.random.default_rng(seed).integers(0, 4, (count, length)).astype(np.uint8)
    return [decode(row) for row in codes]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """Write ten rows with these columns as data.csv (sequence and fold are filled in) and prepare them."""

    def run(columns: dict[str, Any], **settings: Any) -> Dataset:
        table = pd.DataFrame({"sequence": sequences(), "fold": FOLDS, **columns})
        table.to_csv(tmp_path / "data.csv", index=False)
        return prepare_labelled(LabelledSource((LabelledFile(tmp_path / "data.csv"),), **settings), tmp_path / "out")

    return run


def targets(data: Dataset) -> np.ndarray[Any, Any]:
    return data.raw_targets(np.arange(len(data)))[:, :, 0]


# Tasks


def test_two_classes_are_one_sigmoid_track(prepare: Prepare) -> None:
    data = prepare({"label": [0, 1] * 5})
    assert data.tracks.names == ["label"]
    assert data.tracks.frame["link"].tolist() == ["sigmoid"]
    assert targets(data)[:, 0].tolist() == [0, 1] * 5
    assert data.info.window == data.info.bin_size == 30
    assert data.regions["name"].tolist()[:2] == ["data.csv:1", "data.csv:2"]
    assert data.rows("test").tolist() == [8, 9]
    assert data.info.settings["labels"][0]["classes"] == ["0", "1"]


def test_the_last_of_two_classes_is_the_positive_one(prepare: Prepare) -> None:
    data = prepare({"label": ["weak", "strong"] * 5}, labels=(Label(classes=("weak", "strong")),))
    assert data.tracks.names == ["label=strong"]
    assert targets(data)[:, 0].tolist() == [0, 1] * 5


def test_more_classes_are_softmax_tracks(prepare: Prepare) -> None:
    data = prepare(
        {"label": ["a", "b", "c", "a", "b", "c", "NA", "a", "b", "c"]}, class_weights="balanced", duplicates="report"
    )
    assert data.tracks.names == ["label=a", "label=b", "label=c"]
    assert set(data.tracks.frame["link"]) == {"softmax"}
    values = targets(data)
    assert values[1].tolist() == [0, 1, 0]
    assert np.isnan(values[6]).all()
    assert not data.sample([6]).mask.any()
    assert data.info.settings["class_weights"] == pytest.approx(dict.fromkeys(data.tracks.names, 1))
    assert data.info.notes["rows_without_labels"] == 1


def test_integer_classes_when_said(prepare: Prepare) -> None:
    data = prepare({"label": [10, 2, 2.0, 1, 10, 1, 1, 2, 10, 1]}, labels=(Label(task="classification"),))
    assert data.tracks.names == ["label=1", "label=2", "label=10"]


def test_weights_of_positives_are_counted_on_training_rows(prepare: Prepare) -> None:
    data = prepare({"label": [1, 0, 0, 0, None, 0, 1, 1, 1, 1]}, class_weights="balanced")
    assert data.info.settings["class_weights"] == {"label": 4.0}


def test_regression_is_standardised_on_training_rows(prepare: Prepare) -> None:
    values = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 1e6, 1e6, 1e6, None]
    data = prepare({"label": values}, labels=(Label(transform="log2"),))
    assert data.tracks.names == ["log2(label)"]
    assert targets(data)[:6, 0].tolist() == [-1, 0, 1, 2, 3, 4]
    scaled = data.squashed_targets(data.rows("train"))
    assert scaled.mean() == pytest.approx(0, abs=1e-6)
    assert scaled.std() == pytest.approx(1)
    assert np.isnan(targets(data)[9, 0])


def test_multilabel_from_a_list_and_from_columns(prepare: Prepare, tmp_path: Path) -> None:
    marks = ["a;b", "a", "b", "a;c", "c", "", "a", "b", "c", "a; b;c"]
    listed = prepare({"marks": marks}, labels=(Label("marks", task="multilabel"),))
    assert listed.tracks.names == ["marks=a", "marks=b", "marks=c"]
    assert set(listed.tracks.frame["link"]) == {"sigmoid"}
    assert targets(listed)[0].tolist() == [1, 1, 0]
    assert targets(listed)[9].tolist() == [1, 1, 1]
    assert np.isnan(targets(listed)[5]).all()
    table = pd.DataFrame(targets(listed), columns=["a", "b", "c"]).assign(sequence=sequences(), fold=FOLDS)
    table.to_csv(tmp_path / "flags.csv", index=False)
    source = LabelledSource(
        (LabelledFile(tmp_path / "flags.csv"),), labels=(Label(("a", "b", "c"), task="multilabel"),)
    )
    flags = prepare_labelled(source, tmp_path / "flags")
    np.testing.assert_array_equal(targets(flags), targets(listed))
    assert len(flags.tracks.groups) == 1


def test_several_labels_are_several_heads(prepare: Prepare) -> None:
    data = prepare({"bound": [0, 1] * 5, "rate": np.linspace(0.1, 2, 10)}, labels=(Label("bound"), Label("rate")))
    assert data.tracks.groups == {"bound": [0], "rate": [1]}
    assert data.tracks.frame["link"].tolist() == ["sigmoid", "identity"]


def test_covariates_are_standardised_and_recorded(prepare: Prepare) -> None:
    data = prepare({"label": [0, 1] * 5, "gc": np.arange(10.0), "cds": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]},
                   covariates=("gc", "cds"))  # fmt: skip
    assert data.covariates is not None
    train = data.covariates.iloc[data.rows("train")]
    assert train.mean().tolist() == pytest.approx([0, 0])
    assert train.std(ddof=0).tolist() == pytest.approx([1, 1])
    assert data.info.settings["covariate_scaling"]["gc"]["mean"] == 2.5
    assert data.sample([0, 1]).covariates["covariates"].shape == (2, 2)


def test_codons_and_lengths_are_computed_from_sequences(prepare: Prepare) -> None:
    coding = ["ATGGCC" + "GAT" * row + "taa" for row in range(10)]
    utr = ["A" * (10 * row + 1) for row in range(10)]
    data = prepare({"label": [0, 1] * 5, "cds": coding, "utr": utr}, codons="cds", lengths=("utr", "cds"))
    assert data.covariates is not None
    assert list(data.covariates) == [f"codon {c}" for c in SENSE_CODONS] + [
        "log10 length of utr",
        "log10 length of cds",
    ]
    scaling = data.info.settings["covariate_scaling"]
    back = pd.DataFrame({name: data.covariates[name] * of["std"] + of["mean"] for name, of in scaling.items()})
    np.testing.assert_allclose(back["codon GAT"], np.arange(10) / np.arange(2, 12), atol=1e-12)
    np.testing.assert_allclose(back["codon ATG"], 1 / np.arange(2, 12))
    np.testing.assert_allclose(back[[f"codon {c}" for c in SENSE_CODONS]].sum(axis=1), 1)  # the stop is not counted
    np.testing.assert_allclose(back["log10 length of utr"], np.log10(np.arange(10) * 10 + 1), atol=1e-12)
    train = data.covariates.iloc[data.rows("train")]
    assert train["codon GAT"].std(ddof=0) == pytest.approx(1)
    assert (data.covariates["codon CCC"] == 0).all()  # constant, and no reason to stop
    assert data.sample([0]).covariates["covariates"].shape == (1, 63)
    assert "irregular_coding_sequences" not in data.info.notes


def test_irregular_coding_sequences_are_counted_and_refused_above_one_percent(tmp_path: Path) -> None:
    rows = 300
    table = pd.DataFrame({"sequence": sequences(rows), "label": [0, 1] * 150, "cds": ["ATGGATGCCTAA"] * rows})
    table["fold"] = ["train", "train", "test"] * 100
    table.loc[[7, 9, 11], "cds"] = ["ATGTAAGATTA", "ATGNATGCC", "ATGGATGCCTGA"]  # the last one is regular
    table.to_csv(tmp_path / "data.csv", index=False)
    source = LabelledSource((LabelledFile(tmp_path / "data.csv"),), codons="cds")
    data = prepare_labelled(source, tmp_path / "out")
    found = data.info.notes["irregular_coding_sequences"]
    assert found == {"rows": 2, "length_no_multiple_of_3": 1, "stop_codon_inside": 1, "unknown_bases": 1}
    table.loc[[20, 21], "cds"] = "ATGTA"
    table.to_csv(tmp_path / "data.csv", index=False)
    with pytest.raises(DataError, match=r"4 of 300 coding sequences are irregular \(length .* 3 3, .*data.csv row 8'"):
        prepare_labelled(source, tmp_path / "other")
    table.loc[[20, 21], "cds"] = ["", "ATGX"]
    table.to_csv(tmp_path / "data.csv", index=False)
    with pytest.raises(DataError, match=r"(?s)2 problems.*row 21, column 'cds': 1 rows have no value.*row 22.*'X'"):
        prepare_labelled(source, tmp_path / "other")


# Files and sequences


def test_every_format_gives_the_same(tmp_path: Path) -> None:
    table = pd.DataFrame({"sequence": sequences(), "label": [0, 1] * 5, "fold": FOLDS})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.csv.gz", index=False)
    table.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    table.assign(label=table["label"].astype(float)).to_parquet(tmp_path / "a.parquet")
    results = []
    for name in ("a.csv", "a.csv.gz", "a.tsv", "a.parquet"):
        data = prepare_labelled(LabelledSource((LabelledFile(tmp_path / name),)), tmp_path / f"out_{name}")
        results.append((data.tracks.names, targets(data).tolist(), data.sequences(range(10))[0].tolist()))
    for fold in ("train", "valid", "test"):
        part = table[table["fold"] == fold]
        table[table["fold"] == fold].drop(columns="fold").to_csv(tmp_path / f"{fold}.csv", index=False)
        with gzip.open(tmp_path / f"{fold}.fa.gz", "wt") as fasta:
            rows = zip(part["sequence"], part["label"], strict=True)
            fasta.writelines(f">r{i}|{label}\n{s[:20]}\n{s[20:]}\n" for i, (s, label) in enumerate(rows))
    for suffix in ("csv", "fa.gz"):
        files = tuple(LabelledFile(tmp_path / f"{fold}.{suffix}", fold=fold) for fold in ("train", "valid", "test"))
        data = prepare_labelled(LabelledSource(files), tmp_path / f"out_{suffix}")
        results.append((data.tracks.names, targets(data).tolist(), data.sequences(range(10))[0].tolist()))
    assert all(result == results[0] for result in results)


def test_fasta_files_with_a_label_each(tmp_path: Path) -> None:
    files = []
    for seed, (label, fold) in enumerate([("off", "train"), ("on", "train"), ("off", "test"), ("on", "test")]):
        path = tmp_path / f"{fold}_{label}.fa"
        path.write_text("".join(f">s{i} any words\n{s}\n" for i, s in enumerate(sequences(5, seed=seed))))
        files.append(LabelledFile(path, label=label, fold=fold))
    data = prepare_labelled(LabelledSource(tuple(files), folds=Folds(valid=0.2)), tmp_path / "out")
    assert data.tracks.names == ["label=on"]
    assert targets(data)[:, 0].tolist() == [0] * 5 + [1] * 5 + [0] * 5 + [1] * 5
    assert data.regions["fold"].value_counts().to_dict() == {"train": 8, "valid": 2, "test": 10}
    assert data.regions["name"].tolist()[:2] == ["s0", "s1"]


def test_some_rows_of_a_large_file(tmp_path: Path) -> None:
    """Each row once, in the file's order and under its own number; the same for a seed, and all if there are fewer."""
    pd.DataFrame({"sequence": sequences(40), "label": [0, 1] * 20}).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame({"sequence": sequences(6, seed=1), "label": [0, 1] * 3}).to_csv(tmp_path / "test.csv", index=False)
    rows = []
    for number, seed in enumerate([1, 1, 2]):
        files = (
            LabelledFile(tmp_path / "train.csv", fold="train", rows=12),
            LabelledFile(tmp_path / "test.csv", fold="test", rows=12),
        )
        source = LabelledSource(files, folds=Folds(valid=0.25, seed=seed))
        regions = prepare_labelled(source, tmp_path / f"out{number}").regions
        assert regions["fold"].value_counts().to_dict() == {"train": 9, "valid": 3, "test": 6}
        rows.append(regions.loc[regions["fold"] != "test", "source_row"].tolist())
    assert rows[0] == rows[1] == sorted(set(rows[0]))
    assert rows[0] != rows[2]
    assert max(rows[0]) > 12
    with pytest.raises(ConfigError, match="at least one row"):
        LabelledFile(tmp_path / "train.csv", rows=0)


def test_columns_join_and_lengths_vary(prepare: Prepare) -> None:
    ends = [f"{'ACGT' * 3}"[: 1 + row] for row in range(10)]
    data = prepare({"label": [0, 1] * 5, "utr": ends}, sequence=("sequence", "utr"))
    codes, lengths = data.sequences([0, 9])
    assert lengths.tolist() == [31, 40]
    assert data.info.window == 0
    assert decode(codes[0]) == sequences()[0] + "A" + "." * 9
    assert decode(codes[1]) == sequences()[9] + "ACGTACGTAC"


@pytest.mark.parametrize(("keep", "part"), [("start", slice(0, 20)), ("centre", slice(5, 25)), ("end", slice(10, 30))])
def test_truncation_is_asked_for_and_counted(prepare: Prepare, keep: Any, part: slice) -> None:
    with pytest.raises(DataError, match=r"10 sequences are longer than max_length, 20 bp; .*keep"):
        prepare({"label": [0, 1] * 5}, max_length=20)
    data = prepare({"label": [0, 1] * 5}, max_length=20, keep=keep)
    assert decode(data.sequences([3])[0][0]) == sequences()[3][part]
    assert data.info.notes["truncated_sequences"] == 10


def test_unknown_bases_are_counted_and_limited(prepare: Prepare) -> None:
    texts = sequences()
    texts[2] = texts[2][:10].lower() + "NNR" + texts[2][13:]
    assert prepare({"label": [0, 1] * 5, "sequence": texts}).info.notes["unknown_bases"] == 3
    texts[4] = texts[4][:10] + "Y" + texts[4][11:]
    with pytest.raises(DataError, match=r"4 of 300 bases \(1.3%\) are N .*'data.csv row 3'.*max_unknown"):
        prepare({"label": [0, 1] * 5, "sequence": texts})


def test_intervals_with_a_genome(tmp_path: Path) -> None:
    chroms = {f"chr{i}": text for i, text in enumerate(sequences(3, 5000), start=1)}
    (tmp_path / "g.fa").write_text("".join(f">{name}\n{text}\n" for name, text in chroms.items()))
    rows = [(f"chr{i}", at, at + 100 + i, "-" if at == 1000 else "+") for i in (1, 2, 3) for at in (1000, 2000, 3000)]
    table = pd.DataFrame(rows, columns=["c", "s", "e", "strand"]).assign(label=[0, 1, 0, 1, 0, 1, 0, 1, 0])
    table.to_csv(tmp_path / "sites.tsv", sep="\t", index=False)
    source = LabelledSource(
        (LabelledFile(tmp_path / "sites.tsv"),),
        genome=tmp_path / "g.fa",
        interval=("c", "s", "e", "strand"),
        window=60,
        folds=Folds(by="chromosome", valid=("chr2",), test=("chr3",)),
    )
    data = prepare_labelled(source, tmp_path / "out")
    assert data.info.window == 60
    assert data.regions[["start", "end"]].iloc[1].tolist() == [2020, 2080]
    assert decode(data.sequences([1])[0][0]) == chroms["chr1"][2020:2080]
    turned = chroms["chr1"][1020:1080][::-1].translate(str.maketrans("ACGT", "TGCA"))
    assert decode(data.sequences([0])[0][0]) == turned
    with pytest.raises(DataError, match=r"different lengths, from 101 to 103 bp.*window"):
        prepare_labelled(replace(source, window=None), tmp_path / "other")
    with pytest.raises(DataError, match="no chromosome: 'nowhere'"):
        prepare_labelled(replace(source, rename={"chr2": "nowhere"}), tmp_path / "other")


def test_chromosome_folds_from_a_column_without_a_genome(prepare: Prepare) -> None:
    chrom = ["I"] * 6 + ["II"] * 2 + ["III"] * 2
    for column in ("chr", "chrom"):
        folds = Folds(by="chromosome", column=None if column == "chrom" else column, valid=("II",), test=("III",))
        data = prepare({"label": [0, 1] * 5, column: chrom}, folds=folds)
        assert data.regions["fold"].tolist() == FOLDS
        assert set(data.regions["chrom"]) == {""}
        data.folder.rename(data.folder.with_name(column))


# Duplicates


def test_a_leak_is_refused_dropped_reported_or_grouped(prepare: Prepare, tmp_path: Path) -> None:
    texts = sequences()
    texts[8] = texts[1]
    columns = {"label": [0, 1] * 5, "sequence": texts}
    with pytest.raises(DataError, match=r"1 test sequence is identical .*data.csv row 9 = data.csv row 2"):
        prepare(columns)
    assert not (tmp_path / "out").exists()
    assert len(pd.read_csv(tmp_path / "out.duplicates.tsv", sep="\t")) == 1
    dropped = prepare(columns, duplicates="drop")
    assert dropped.regions["source_row"].tolist() == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert dropped.info.notes["duplicates"]["exact"] == {"train/test": {"pairs": 1, "train": 1, "test": 1}}
    dropped.folder.rename(tmp_path / "dropped")
    reported = prepare(columns, duplicates="report")
    assert reported.regions["copied"].tolist() == [""] * 8 + ["exact", ""]
    assert set(dropped.regions["copied"]) == {""}
    (tmp_path / "out").rename(tmp_path / "reported")
    for seed in range(5):
        grouped = prepare(columns, duplicates="group", folds=Folds(by="random", test=0.4, seed=seed))
        assert grouped.regions["fold"][1] == grouped.regions["fold"][8]
        grouped.folder.rename(tmp_path / f"grouped{seed}")


# What is refused


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "the file has no column: 'label'.*It has sequence, fold"),
    ({"label": [0, 1, "x", *[1] * 7]}, {}, "may be classes or measurements"),
    ({"label": [1, 2, 3, 4, 5] * 2}, {}, "may be classes or measurements.*Say task"),
    ({"label": [0, 1] * 5}, {"labels": (Label(classes=("0", "2")),)}, "data.csv row 2.*5 rows .* not listed: '1'"),
    ({"label": ["a"] * 10}, {}, "only one class"),
    ({"label": [""] * 10}, {}, "no row has a label"),
    ({"label": [1, 1, 1, 1, 1, 1, 0, 0, 0, 1]}, {}, "all training rows have the same label: 1.0"),
    ({"label": [0.5] * 9 + ["inf"]}, {"labels": (Label(task="regression"),)}, "row 10, column 'label'.*'inf'"),
    ({"label": [0.5] * 9 + ["?"]}, {"labels": (Label(task="regression"),)}, "not a finite number: '[?]'"),
    ({"label": [0.5] * 9 + [0]}, {"labels": (Label(transform="log2"),)}, "row 10.*positive number: 0.0"),
    ({"a": [0, 1] * 5, "b": [2] * 10}, {"labels": (Label(("a", "b"), task="multilabel"),)}, "holds 0 or 1: '2'"),
    ({"label": [0, 1] * 5, "fold": ["train", "dev"] * 5}, {}, "not a fold: 'dev'"),
    ({"label": [0, 1] * 5, "sequence": ["ACGX"] * 10}, {}, "row 1, column 'sequence', position 4.*'X'"),
    ({"label": [0, 1] * 5, "sequence": ["", *sequences(9)]}, {}, "row 1: the sequence is empty"),
    ({"label": [0, 1] * 5, "gc": [None, *range(9)]}, {"covariates": ("gc",)}, "no value of a covariate"),
    ({"label": [0, 1] * 5, "gc": [1] * 10}, {"covariates": ("gc",)}, "covariate is constant"),
]


@pytest.mark.parametrize(("columns", "settings", "message"), BAD)
def test_bad_rows(
    prepare: Prepare, tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(columns, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"data.csv"}


def test_problems_are_gathered(prepare: Prepare) -> None:
    texts = ["ACGX", "AC-T", *sequences(8)]
    with pytest.raises(DataError, match=r"(?s)2 problems.*row 1, column.*row 2, column"):
        prepare({"label": [0, 1] * 5, "sequence": texts})
    with pytest.raises(DataError, match=r"(?s)2 problems.*'a'.*'b'"):
        prepare({}, labels=(Label("a"), Label("b")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "no column"),
        ("a.csv", b"sequence,label,fold\n", "no rows"),
        ("a.csv", b"sequence,label,fold\nACGT,1\n", "row 1: the row has another number of columns: 2"),
        ("a.csv", b"sequence,label,fold\nACGT,1,train,9,9\nA,1\n", "(?s)2 problems.*columns: 5.*columns: 2"),
        ("a.csv", b"sequence,label,label,fold\nACGT,1,1,train\n", "two columns have one name: 'label'"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read"),
        ("a.csv.gz", gzip.compress(b"sequence,label,fold\nACGT,1,train\n" * 99, mtime=0)[:60], "cannot be read"),
        ("a.csv.gz", b"sequence,label,fold\n", "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.fa", b">one\nACGT\n", "row 1: the header has no label: 'one'"),
        ("a.fa", b"ACGT\n", "does not start with '>'"),
        ("a.xlsx", b"", "kind of file is unknown"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SeqgraftError, match=message):
        prepare_labelled(LabelledSource((LabelledFile(tmp_path / name),)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_a_doubled_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        prepare_labelled(LabelledSource((LabelledFile(tmp_path / "no.csv"),)), tmp_path / "out")
    pd.DataFrame({"sequence": sequences(), "label": [0, 1] * 5}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match="has a column 'label' already"):
        prepare_labelled(LabelledSource((LabelledFile(tmp_path / "a.csv", label="1", fold="train"),)), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": ()}, "list is empty"),
        ({"interval": ("chrom",)}, "three or four columns"),
        ({"window": 100}, "need a genome"),
        ({"genome": Path("g.fa"), "max_length": 9}, "not truncated"),
        ({"max_length": 0}, "not positive"),
        ({"max_unknown": 2}, "not a share"),
        ({"duplicates": "group", "folds": Folds(by="chromosome", test=("chr1",))}, "cannot be split"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelledSource(**{"files": (LabelledFile(Path("a.csv")),), **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"column": ""}, "needs a column"),
        ({"column": ("a", "b")}, "need a task"),
        ({"task": "classification", "transform": "log2"}, "takes no transform"),
        ({"task": "regression", "classes": ("a", "b")}, "no classes"),
        ({"classes": ("a", "a")}, "listed twice"),
    ],
)
def test_bad_labels(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Label(**settings)


# Real data


def test_ienhancer_is_stopped_by_its_leak(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/labelled/ienhancer"
    files = tuple(
        LabelledFile(folder / f"layer2_{fold}_{label}_enhancers.fa", label=label, fold=fold)
        for fold in ("train", "test")
        for label in ("weak", "strong")
    )
    source = LabelledSource(files, labels=(Label(classes=("weak", "strong")),))
    with pytest.raises(DataError, match="100 test sequences are identical to train sequences") as caught:
        prepare_labelled(source, tmp_path / "enhancers")
    listing = tmp_path / "enhancers.duplicates.tsv"
    assert str(listing) in str(caught.value)
    leaked = pd.read_csv(listing, sep="\t")["source_b"]
    assert set(leaked) == {f"layer2_test_strong_enhancers.fa row {row}" for row in range(1, 101)}
    clean = prepare_labelled(replace(source, duplicates="drop"), tmp_path / "clean")
    assert clean.regions["fold"].value_counts().to_dict() == {"train": 1384, "test": 200}


@pytest.mark.parametrize("valid", [(), 0.1])
def test_ienhancer_has_300_clean_test_rows(shared: Path, tmp_path: Path, valid: Any) -> None:
    """Whether their copies are in training or, by a drawn share, in validation."""
    folder = shared / "data/labelled/ienhancer"
    files = tuple(
        LabelledFile(folder / f"layer1_{fold}_{label}.fa", label=label, fold=fold)
        for fold in ("train", "test")
        for label in ("nonenhancers", "enhancers")
    )
    labels = (Label(classes=("nonenhancers", "enhancers")),)
    data = prepare_labelled(
        LabelledSource(files, labels=labels, folds=Folds(valid=valid), duplicates="report"), tmp_path / "enhancers"
    )
    rows = data.rows("test")
    copied = data.regions["copied"].to_numpy()[rows]
    assert [int((copied == kind).sum()) for kind in ("", "near", "exact")] == [300, 0, 100]
    assert targets(data)[rows][copied == "exact"].all()  # they are the strong enhancers
    without = replace(data, regions=data.regions.drop(columns="copied"))  # as prepared before there was this column
    assert copies_in_earlier_folds(without).tolist() == data.regions["copied"].tolist()


def test_ienhancer_is_never_scored_by_its_leak_alone(shared: Path, tmp_path: Path) -> None:
    """A 3- to 6-mer regression: accuracy 0.77 and MCC 0.55 on all 400, 0.72 and 0.39 on those without copies."""
    folder = shared / "data/labelled/ienhancer"
    files = tuple(
        LabelledFile(folder / f"layer1_{fold}_{label}.fa", label=label, fold=fold)
        for fold in ("train", "test")
        for label in ("nonenhancers", "enhancers")
    )
    labels = (Label(classes=("nonenhancers", "enhancers")),)
    source = LabelledSource(files, labels=labels, folds=Folds(valid=0.1), duplicates="report")
    data = prepare_labelled(source, tmp_path / "enhancers")
    start = ModelConfig("convnet", settings={"channels": 16, "depth": 2, "blocks": 1})
    model = build_model(start, data.tracks, data.info).eval()
    found = evaluate_model(model, data, EvaluateConfig(draws=50, batch_size=64), "run", start).metrics
    assert found["fold"].drop_duplicates().tolist() == ["test without copies", "test"]
    assert found.groupby("fold")["n"].unique().map(list).to_dict() == {"test without copies": [300], "test": [400]}
    assert (found.groupby("fold")["model"].unique().map(set) == {"run", "k-mer regression", "majority"}).all()
    kmer = found[(found["model"] == "k-mer regression") & (found["track"] == "")].set_index(["fold", "metric"])["value"]
    assert kmer["test", "accuracy"] == pytest.approx(0.772, abs=0.03)
    assert kmer["test", "mcc"] == pytest.approx(0.545, abs=0.05)
    assert kmer["test without copies", "accuracy"] == pytest.approx(0.72, abs=0.03)
    assert kmer["test without copies", "mcc"] == pytest.approx(0.386, abs=0.06)


@pytest.mark.slow
def test_half_life_follows_from_codons(shared: Path, tmp_path: Path) -> None:
    """Ten folds, squared Pearson: 0.56 from codons, 0.58 with lengths and 3-mers of 3' UTRs, 0.08 from these alone."""
    source = LabelledSource(
        (LabelledFile(shared / "data/labelled/halflife_yeast/scer_halflife_sequences.csv.gz"),),
        labels=(Label("hlt.wt", transform="log2"),),
        sequence=("UTR3_seq",),
        codons="CDS_seq",
        lengths=("UTR5_seq", "CDS_seq", "UTR3_seq"),
        duplicates="report",
    )
    settings, squared = KmerSettings(sizes=(3,)), []
    for fold in range(10):
        folds = Folds(by="kfold", k=10, fold=fold, valid=0.1)
        data = prepare_labelled(replace(source, folds=folds), tmp_path / str(fold))
        rows = [data.rows(name) for name in ("train", "valid", "test")]
        assert data.covariates is not None
        codons = data.covariates.iloc[:, :61].to_numpy()
        everything = [
            Examples(data.sequences(r)[0], data.squashed_targets(r), data.covariates.iloc[r].to_numpy()) for r in rows
        ]
        only_codons = [replace(part, covariates=codons[r]) for part, r in zip(everything, rows, strict=True)]
        only_sequence = [replace(part, covariates=None) for part in everything]
        predicted = (
            covariate_regression(*only_codons, data.tracks, settings),
            kmer_regression(*everything, data.tracks, settings),
            kmer_regression(*only_sequence, data.tracks, settings),
        )
        truth = everything[2].targets.ravel()
        squared.append([float(np.corrcoef(truth, values.ravel())[0, 1]) ** 2 for values in predicted])
    assert np.mean(squared, axis=0) == pytest.approx([0.56, 0.58, 0.081], abs=0.015)


def test_human_tf(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/labelled/gue_human_tf0"
    names = {"train": "train", "dev": "valid", "test": "test"}
    files = tuple(LabelledFile(folder / f"{name}.csv.gz", fold=fold) for name, fold in names.items())
    with pytest.raises(DataError, match=r"1 valid sequence is identical .*dev.csv.gz row 393 = train.csv.gz row 8485"):
        prepare_labelled(LabelledSource(files), tmp_path / "tf")
    data = prepare_labelled(LabelledSource(files, duplicates="drop"), tmp_path / "tf")
    assert data.regions["fold"].value_counts().to_dict() == {"train": 32318, "test": 1000, "valid": 998}
    assert data.info.window == 101
    assert data.info.notes["duplicates"]["near"]["train/test"] == {"pairs": 26, "train": 25, "test": 12}


def test_yeast_half_lives(shared: Path, tmp_path: Path) -> None:
    source = LabelledSource(
        (LabelledFile(shared / "data/labelled/halflife_yeast/scer_halflife_sequences.csv.gz"),),
        labels=(Label("hlt.wt", transform="log2"),),
        sequence=("UTR3_seq",),
        name="genename",
        folds=Folds(by="chromosome", column="chr", valid=("II",), test=("XIV", "XVI")),
    )
    data = prepare_labelled(source, tmp_path / "half_life")
    assert data.regions["fold"].value_counts().to_dict() == {"train": 3424, "test": 656, "valid": 308}
    assert data.regions["name"][0] == "YAL002W"
    assert targets(data)[0, 0] == pytest.approx(np.log2(7.971214941687093))
    assert data.squashed_targets(data.rows("train")).std() == pytest.approx(1, abs=1e-5)
