"""The YAML file is the constructor: every kind there and back, everything that is wrong with a file at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import SETTINGS, tiny_coverage
from seqgraft.adapters import ADAPTERS, IA3, FullFineTune, Houlsby, LinearProbe, LoRA, Peft
from seqgraft.adapters.prompt import Prompt
from seqgraft.baselines import KmerSettings
from seqgraft.data import SOURCES
from seqgraft.data.augment import Augmentation
from seqgraft.data.barcodes import CellLabels
from seqgraft.data.coverage import CoverageSource
from seqgraft.data.expression import Expression
from seqgraft.data.folds import Folds
from seqgraft.data.fragment_files import FragmentFile
from seqgraft.data.fragments import FragmentSource
from seqgraft.data.h5ad import H5adSource
from seqgraft.data.labelled import LabelledFile, LabelledSource
from seqgraft.data.labels import Label
from seqgraft.data.peaks import PeakSource
from seqgraft.data.personal import DonorTable, GeneTable, PersonalSource, Selection
from seqgraft.data.pseudobulk import Assay
from seqgraft.data.windows import WindowSource
from seqgraft.errors import ConfigError
from seqgraft.evaluate import EvaluateConfig, GenesConfig
from seqgraft.experiment import (
    Experiment,
    build,
    parse_experiment,
    parse_source,
    read_experiment,
    read_yaml,
    settings_of,
    write_yaml,
)
from seqgraft.genes import GeneSettings
from seqgraft.losses import (
    LOSSES,
    PAIR_LOSSES,
    AllPairs,
    BinaryCrossEntropy,
    CrossEntropy,
    Huber,
    MeanSquaredError,
    PairClassification,
    Pairs,
    Poisson,
    PoissonMultinomial,
)
from seqgraft.models.weights import ModelConfig
from seqgraft.run import objective_of
from seqgraft.train import TrainConfig

BY_CHROMOSOME = Folds(by="chromosome", train=("chr1",), valid=("chr2",), test=("chr3",))

#: At least one value of every registered kind with settings that are not the defaults. A new kind must come here.
VALUES: list[Any] = [
    LinearProbe(),
    FullFineTune(statistics="batch"),
    LoRA(rank=4, alpha=2.5, where=("attention", "conv"), dora=True, last=2, dropout=0.1, rslora=True),
    LoRA(quantize="nf4"),
    IA3(where=("conv",)),
    Houlsby(bottleneck=3, squeeze_excite=5, last=1, norms=False),
    Peft(type="loha", where=("feedforward",), settings={"r": 2, "alpha": 4.0}),
    Poisson(),
    PoissonMultinomial(total_weight=0.5, weight_range=2.0, weight_exp=2),
    MeanSquaredError(),
    BinaryCrossEntropy(),
    CrossEntropy(),
    Huber(),
    Pairs(),
    PairClassification(least=0.5),
    AllPairs(alpha=0.25),
    Prompt(tokens=3),
    WindowSource(
        fasta=Path("genome.fa"), window=64, folds=BY_CHROMOSOME, stride=32, gaps=Path("gaps.bed"), unknown=0.1
    ),
    FragmentSource(
        fasta=Path("genome.fa"),
        assays=(Assay("atac", "insertions", (FragmentFile(Path("a.tsv.gz"), sample="s1"),)),),
        labels=CellLabels(Path("cells.csv"), "group"),
        window=64,
        target_length=64,
        bin_size=16,
        folds=BY_CHROMOSOME,
    ),
    H5adSource(
        path=Path("cells.h5ad"),
        group="cell_type",
        genome=Path("genome.fa"),
        window=64,
        folds=BY_CHROMOSOME,
        layer="counts",
        genes=GeneTable(gtf=Path("genes.gtf")),
        merge={"lymph": ("B", "T")},
        drop=("NK",),
        normalise="none",
    ),
    PersonalSource(
        genome=Path("genome.fa"),
        vcf=Path("cohort.vcf.gz"),
        expression=Expression(Path("e.tsv"), log=0.01, covariates=("sex",), components=2),
        donor_folds=Folds(by="random", valid=0.1, test=0.2, group="family"),
        genes=GeneTable(Path("genes.tsv"), tss="start"),
        donors=DonorTable(Path("donors.tsv"), genotypes="vcf_name"),
        window=1024,
        gene_folds=BY_CHROMOSOME,
        unphased="dosage",
        missing="major",
        rename={"1": "chr1"},
        select=Selection(most=10, p=0.05),
    ),
    CoverageSource(
        fasta=Path("genome.fa"),
        tracks=Path("tracks.csv"),
        window=1024,
        target_length=512,
        bin_size=16,
        folds=BY_CHROMOSOME,
        stride=256,
        exclude_chroms=("chrM",),
        rename={"1": "chr1"},
        blacklist=Path("blacklist.bed"),
        absolute=True,
    ),
    CoverageSource(
        fasta=Path("genome.fa"),
        tracks=[{"name": "a", "file": "a.bw", "scale": 0.5}],
        window=64,
        target_length=64,
        bin_size=16,
        folds=Folds(by="cluster", valid=0.1, test=0.2, distance=100, seed=3),
        regions=Path("regions.bed"),
    ),
    LabelledSource(
        files=(LabelledFile(Path("a.csv"), fold="train"), LabelledFile(Path("b.fa"), label="1", fold="test")),
        labels=(Label(column=("x", "y"), task="regression", transform="log2"), Label("kind", classes=("a", "b"))),
        sequence=("left", "right"),
        folds=Folds(by="column", column="split", names={"dev": "valid"}),
        duplicates="drop",
        max_length=100,
        keep="centre",
        covariates=("length",),
        codons="cds",
        lengths=("utr5", "cds"),
        class_weights="balanced",
    ),
    PeakSource(
        peaks=Path("a.narrowPeak"),
        genome=Path("genome.fa"),
        window=200,
        folds=Folds(by="trunk", trunk="borzoi", bed=Path("download"), valid=0.1),
        ratio=2.0,
        repeats=Path("repeats.bed"),
        rename={"1": "chr1"},
        seed=7,
    ),
]

EXPERIMENT = Experiment(
    data=Path("data/tiny"),
    model=ModelConfig(name="convnet", init="random", pool="max", settings={"channels": 32}, trained_on=Path("a.bed")),
    adapter=LoRA(rank=2, where=("conv",)),
    loss={"rna": Poisson(), "atac": MeanSquaredError()},
    train=TrainConfig(lr=1e-4, head_lr=1e-2, metric="r2", augment=Augmentation(reverse_complement=False, shift=2)),
    evaluate=EvaluateConfig(
        fold="valid",
        ensemble=Augmentation(reverse_complement=True, shift=1),
        baselines=("mean_profile",),
        kmers=KmerSettings(sizes=(3,), both_strands=True),
        block=1000,
        genes=GenesConfig(
            gtf=Path("genes.gtf"),
            rename={"1": "chr1"},
            settings=GeneSettings(around="start", pseudocount=0.5),
            contrasts=(("hot", "cold"), ("wet", "dry")),
            truth=Path("deseq2.csv"),
        ),
        original=Path("data/original"),
    ),
    allow_exposure=True,
)


def registered() -> dict[str, type]:
    return {**ADAPTERS, **LOSSES, **PAIR_LOSSES, **{kind: source for kind, (source, _) in SOURCES.items()}}


def write(folder: Path, text: str) -> Path:
    (folder / "experiment.yaml").write_text(text)
    return folder / "experiment.yaml"


# There and back


def test_every_registered_kind_has_a_value_here() -> None:
    assert {type(value) for value in VALUES} == set(registered().values())


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_settings_of_is_the_inverse_of_build(value: Any, tmp_path: Path) -> None:
    settings = settings_of(value)
    write_yaml(tmp_path / "value.yaml", settings)
    read = read_yaml(tmp_path / "value.yaml")
    assert read == settings
    kind = read.pop("kind")
    assert registered()[kind] is type(value)
    assert set(read) == {field.name for field in dataclasses.fields(value)}
    assert build(type(value), read, "value.yaml") == value


@pytest.mark.parametrize("value", [v for v in VALUES if type(v) in ADAPTERS.values()], ids=lambda v: v.label)
def test_an_experiment_comes_back_with_every_adapter(value: Any, tmp_path: Path) -> None:
    write_yaml(tmp_path / "e.yaml", settings_of(Experiment(data=Path("d"), adapter=value)))
    assert read_experiment(tmp_path / "e.yaml").adapter == value


def test_a_whole_experiment_comes_back(tmp_path: Path) -> None:
    write_yaml(tmp_path / "e.yaml", settings_of(EXPERIMENT))
    assert read_experiment(tmp_path / "e.yaml") == EXPERIMENT


def test_sources_are_parsed_by_kind() -> None:
    for value in VALUES:
        if type(value) in {source for source, _ in SOURCES.values()}:
            assert parse_source(settings_of(value)) == value


def test_defaults_are_written_out(tmp_path: Path) -> None:
    settings = settings_of(read_experiment(write(tmp_path, "data: d\nmodel: {name: convnet}\n")))
    assert settings["adapter"] == {"kind": "linear_probe"}
    assert settings["train"]["epochs"] == TrainConfig().epochs
    assert settings["train"]["augment"] == {"reverse_complement": True, "shift": TrainConfig().augment.shift}
    assert settings["evaluate"]["fold"] == "test"
    assert settings["evaluate"]["genes"] is None
    assert settings["loss"] is None
    assert settings["allow_exposure"] is False
    assert parse_experiment(settings) == Experiment(data=Path("d"))


# Values


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    path = write(tmp_path, "data: d\ntrain: {lr: 1e-4, head_lr: 3E-3, weight_decay: 0, epochs: 7}\n")
    assert yaml.safe_load("1e-4") == "1e-4"
    train = read_experiment(path).train
    assert (train.lr, train.head_lr, train.weight_decay, train.epochs) == (1e-4, 3e-3, 0.0, 7)
    assert isinstance(train.lr, float)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "data: d\ntrain: {lr: 1e-4, seed: 2}\nevaluate:\n")
    found = read_experiment(
        path, ["train.lr=3e-5", "adapter.kind=lora", "adapter.where=[conv]", "evaluate.fold=valid", "data=other"]
    )
    assert found.train.lr == 3e-5
    assert found.train.seed == 2
    assert found.adapter == LoRA(where=("conv",))
    assert found.evaluate.fold == "valid"
    assert found.data == Path("other")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr", ["--set", "'train.lr'", "train.lr=3e-5"]),
        ("data.x=1", ["--set data.x=1", "'data'", "not a section"]),
        ("train.lr=[1", ["--set train.lr=[1", "not valid YAML"]),
        ("train.lrr=1", ["'lrr'", "Did you mean 'lr'?"]),
    ],
)
def test_bad_overrides(override: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_experiment(write(tmp_path, "data: d\n"), [override])
    for word in words:
        assert word in str(caught.value)


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQGRAFT_TEST_DATA", "/somewhere")
    monkeypatch.delenv("SEQGRAFT_TEST_NOT_SET", raising=False)
    text = "data: ${SEQGRAFT_TEST_DATA}/tiny\nevaluate: {baselines: ['mean_profile'], original: $HOME}\n"
    found = read_experiment(write(tmp_path, text))
    assert found.data == Path("/somewhere/tiny")
    assert found.evaluate.original == Path("$HOME")  # only ${NAME} is taken
    with pytest.raises(ConfigError, match=r"experiment.yaml: .*\$\{SEQGRAFT_TEST_NOT_SET\}/x.*Set it"):
        read_experiment(write(tmp_path, "data: ${SEQGRAFT_TEST_NOT_SET}/x\n"))


def test_one_loss_or_one_per_group(tmp_path: Path) -> None:
    dataset = tiny_coverage(tmp_path / "data")
    one = parse_experiment({"data": "d", "loss": {"kind": "mse"}})
    assert one.loss == MeanSquaredError()
    assert objective_of(one, dataset).terms == ["rna", "atac"]
    each = parse_experiment({"data": "d", "loss": {"rna": {"kind": "poisson"}}})
    assert each.loss == {"rna": Poisson()}
    losses = {name: part[2] for name, part in zip(["rna", "atac"], objective_of(each, dataset)._parts, strict=True)}
    assert losses == {"rna": Poisson(), "atac": PoissonMultinomial(total_weight=0.2)}
    wrong = parse_experiment({"data": "d", "loss": {"cage": {"kind": "poisson"}}})
    with pytest.raises(ConfigError, match=r"loss.*'cage'.*\['rna', 'atac'\]"):
        objective_of(wrong, dataset)


# What is wrong


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    text = """
model: {name: convnet, head: bigger}
adapter: {kind: lora, rank: many, wher: [conv]}
train: {epoch: 3, lr: fast, seed: true}
evaluate: {fold: [test]}
los: {kind: mse}
"""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_experiment(path)
    message = str(caught.value)
    lines = message.splitlines()
    assert lines[0] == "9 problems were found:"
    assert len(lines) == 10  # those of a section are not nested
    assert all(line.startswith(f"  - {path}") and line.endswith((".", "?")) for line in lines[1:]), message
    for words in (
        ("model.head", "'bigger'", "'extend'"),
        ("adapter.rank", "'many'", "a whole number"),
        ("adapter: there is no such key: 'wher'", "Did you mean 'where'?"),
        ("train: there is no such key: 'epoch'", "Did you mean 'epochs'?"),
        ("train.lr", "'fast'", "a number"),
        ("train.seed", "True", "a whole number"),
        ("evaluate.fold", "['test']", "text"),
        ("no such key: 'los'", "Did you mean 'loss'?"),
        ("a key is missing: 'data'", "'data: ...'"),
    ):
        assert any(all(word in line for word in words) for line in lines), (words, message)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: d\nadapter: {kind: loral}\n", ["adapter", "'loral'", "linear_probe"]),
        ("data: d\nadapter: {rank: 3}\n", ["adapter", "kind"]),
        ("data: d\nadapter: {kind: [lora]}\n", ["adapter", "['lora']", "linear_probe"]),
        ("data: d\nadapter: lora\n", ["adapter", "'lora'", "kind"]),
        ("data: d\ntrain: 3\n", ["train", "3", "key: value"]),
        ("data: d\nevaluate: {genes: genes.gtf}\n", ["evaluate.genes", "genes.gtf", "key: value"]),
        ("data: d\ntrain: {lr: -1}\n", ["train.lr", "-1", "above 0"]),
        ("data: d\nevaluate: {baselines: [mean]}\n", ["evaluate.baselines", "mean", "mean_track"]),
        ("data: d\nevaluate: {draws: 0}\n", ["evaluate.draws", "0"]),
        ("data: d\nevaluate: {batch_size: 0}\n", ["evaluate.batch_size", "0"]),
        ("data: d\ntrain: {lr: 1}\ntrain: {seed: 3}\n", ["line 3", "'train'", "twice"]),
        ("- a\n- b\n", ["list", "key: value"]),
        ("", ["key: value", "Write lines"]),
        (
            "data: d\nadapter: {kind: lora, where: attention}\n",
            ["adapter.where: should be a list", "as in [attention]"],
        ),
        ("data: d\nadapter: {kind: lora, where: 3}\n", ["adapter.where: should be a list: 3. Give a list."]),
        ("data: d\nmodel: {settings: [3]}\n", ["model.settings: should be a section: [3]. Give a section of 'key"]),
        ("data: 3\n", ["data: is not a path: 3. Give a path."]),
        ("data: !!binary aGk=\n", ["data: must not be binary: b'hi'. Give a path, without !!binary."]),
        (
            "data: d\nmodel: {name: !!binary aGk=}\n",
            ["model.name: must not be binary", "Give text (in quotes), without"],
        ),
        ("data: [a\nb: 2\n", ["not valid YAML (line 2, column 2: expected ',' or ']', but got ':')"]),
        ("data: d\ntrain: {lr: fast}\n", ["train.lr: should be a valid number: 'fast'. Give a number"]),
        ("data: &a [*a]\n", ["holds itself"]),
        ("data: !!python/object/apply:os.system [true]\n", ["not valid YAML"]),
        ("data: d\nmodel: {settings: {channels: wide}}\n", ["model.settings", "wide"]),
    ],
)
def test_messages(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_experiment(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value), str(caught.value)


# Files


def test_inline_tracks_name_files_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every other path of a YAML file; those in a track table are relative to the table."""
    from seqgraft.data.tables import read_track_table

    monkeypatch.chdir(tmp_path)
    source = parse_source(
        {
            **settings_of(next(v for v in VALUES if isinstance(v, CoverageSource))),
            "tracks": [{"name": "a", "file": "signal/a.bw"}],
        }
    )
    assert read_track_table(source.tracks).frame["file"].tolist() == ["signal/a.bw"]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "tracks.csv").write_text("name,file\na,signal/a.bw\n")
    table = read_track_table(Path("tables/tracks.csv"))
    assert table.frame["file"].tolist() == ["tables/signal/a.bw"]


def test_a_trunk_takes_its_settings_from_the_file(tmp_path: Path) -> None:
    from seqgraft.models.weights import build_model

    dataset = tiny_coverage(tmp_path / "data")
    config = parse_experiment({"data": "d", "model": {"name": "convnet", "settings": SETTINGS}}).model
    assert build_model(config, dataset.tracks, dataset.info).trunk.spec.channels == SETTINGS["channels"]
