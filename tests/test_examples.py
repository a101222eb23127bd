"""The examples run, and docs/formats.md names every key, column and small file as the code has them."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from seqgraft.adapters import ADAPTERS
from seqgraft.agreement import Measured
from seqgraft.apply import attribute_run, predict_run
from seqgraft.attribute import AttributeConfig
from seqgraft.baselines import KmerSettings
from seqgraft.data import SOURCES, open_dataset, prepare_source
from seqgraft.data.augment import Augmentation
from seqgraft.data.barcodes import CellLabels
from seqgraft.data.coverage import CoverageSource
from seqgraft.data.expression import Expression
from seqgraft.data.folds import Folds
from seqgraft.data.fragment_files import FragmentFile
from seqgraft.data.labelled import LabelledFile
from seqgraft.data.labels import Label
from seqgraft.data.personal import DonorTable, GeneTable, Selection
from seqgraft.data.pseudobulk import Assay
from seqgraft.data.quality import QC_COLUMNS
from seqgraft.data.simulate import Simulation, simulate
from seqgraft.data.tables import read_track_table
from seqgraft.effects import EffectsConfig
from seqgraft.evaluate import EvaluateConfig, GenesConfig
from seqgraft.experiment import (
    Experiment,
    build,
    parse_experiment,
    parse_source,
    read_experiment,
    read_yaml,
    settings_of,
)
from seqgraft.genes import GeneSettings, read_fold_changes
from seqgraft.genome import Genome, Interval, read_bed_table, read_gtf, read_vcf
from seqgraft.grids import Range, Search, SweepConfig, methods_of, read_sweep
from seqgraft.losses import LOSSES, PAIR_LOSSES, TOKEN_LOSSES
from seqgraft.models.weights import ModelConfig
from seqgraft.oracle import grammar
from seqgraft.plan import plan_run
from seqgraft.predixcan import PrediXcan
from seqgraft.report import write_report
from seqgraft.run import evaluate_run, fit_run, prepare
from seqgraft.sequence import decode
from seqgraft.target import Target
from seqgraft.tracks import TrackTable
from seqgraft.train import TrainConfig
from seqgraft.variants import OVERS, SCORERS, ScreenConfig, VariantConfig
from seqgraft.variants.scorers import Baskerville

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
FORMATS = (ROOT / "docs" / "formats.md").read_text()
YAMLS = sorted(EXAMPLES.glob("*/*.yaml"))

CONFIGURED: list[type] = [
    *(source for source, _ in SOURCES.values()),
    *ADAPTERS.values(),
    *(*LOSSES.values(), *PAIR_LOSSES.values(), *TOKEN_LOSSES.values()),
    *(Experiment, ModelConfig, TrainConfig, Augmentation, EvaluateConfig, KmerSettings, GenesConfig, GeneSettings),
    *(Folds, Label, LabelledFile, Simulation),
    *(Assay, FragmentFile, CellLabels),
    *(Expression, GeneTable, DonorTable, Selection),
    *(VariantConfig, ScreenConfig, *OVERS.values()),
    *(scorer for scorer in SCORERS.values() if not issubclass(scorer, Baskerville)),  # which have no keys
    *(AttributeConfig, Target),
    *(EffectsConfig, Measured, PrediXcan),
    *(SweepConfig, Search, Range),
]


# ---- formats.md ----


def documented(kind: str, name: str) -> dict[str, list[str]]:
    """First cell -> the other cells of the table after the comment ``<!-- kind: name -->``."""
    found = re.search(rf"^<!-- {kind}: {name} -->\n((?:\|.*\n)+)", FORMATS, re.MULTILINE)
    assert found, f"docs/formats.md has no table after <!-- {kind}: {name} -->"
    rows: dict[str, list[str]] = {}
    for line in found[1].splitlines()[2:]:
        first, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        keys = re.findall(r"`([^`]+)`", first)
        assert keys, line
        rows.update(dict.fromkeys(keys, cells))
    return rows


@pytest.mark.parametrize("cls", CONFIGURED, ids=lambda cls: cls.__name__)
def test_every_key_and_default_is_documented(cls: type) -> None:
    rows = documented("fields", cls.__name__)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    assert list(rows) == list(fields)
    for name, field in fields.items():
        shown = rows[name][0]
        made: Any = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if made is dataclasses.MISSING:
            assert shown == "needed", name
        elif shown == "its defaults":
            assert made == type(made)(), name
        else:
            value = None if shown == "none" else yaml.safe_load(shown.strip("`"))
            assert value == settings_of(made), (name, shown)


def test_every_registered_class_is_in_the_list() -> None:
    """A section of an experiment that is a dataclass of its own must be documented too."""
    nested = {
        type(made)
        for cls in CONFIGURED
        for field in dataclasses.fields(cls)
        if field.default_factory is not dataclasses.MISSING
        and dataclasses.is_dataclass(made := field.default_factory())
    }
    assert nested <= set(CONFIGURED)


def test_every_column_of_a_track_table_is_documented() -> None:
    table = TrackTable.build([{"name": "a"}]).to_frame()
    rows = documented("fields", "TrackTable")
    assert list(rows) == ["name", "group", "link", "strand_pair", *list(table.columns)[4:]]
    assert set(rows) == set(table.columns)
    for name, (shown, _) in rows.items():
        value = table[name].iloc[0]
        if shown.startswith("`"):
            assert str(value) == shown.strip("`"), name
        elif shown in ("none", "empty"):
            assert value in ("",) or value != value, name


def test_the_small_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in re.finditer(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", FORMATS, re.MULTILINE | re.DOTALL):
        (tmp_path / found[1]).write_text(found[2])
    monkeypatch.chdir(tmp_path)
    genome = Genome.open("genome.fa")
    assert genome.chroms == {"chr1": 28}
    assert len(read_bed_table("regions.bed")) == 2
    assert read_track_table("tracks.csv").permutation.tolist() == [1, 0, 2]
    assert read_gtf("genes.gtf")["gene_name"].tolist() == ["G1"]
    assert read_fold_changes("deseq2.csv")["g1"] == -1.25
    (variant,) = read_vcf("variants.vcf")
    assert str(variant) == "chr1:9:G>A"
    assert decode(genome.codes(Interval("chr1", 8, 9))) == variant.ref
    assert len(read_bed_table("peaks.narrowPeak")) == 1
    assert build(Simulation, read_yaml(Path("sim.yaml")), "sim.yaml").chromosomes == 4
    text = dict(re.findall(r"^<!-- yaml: (\w+) -->\n```yaml\n(.*?)^```$", FORMATS, re.MULTILINE | re.DOTALL))
    others = {"experiment", "variants", "effects", "attribute", "sweep"}
    assert {"coverage", "fragments", "h5ad", "labelled", "peaks", "personal", "windows"} | others == set(text)
    assert len(build(SweepConfig, yaml.safe_load(text["sweep"]), "sweep").grid["adapter"]) == 3
    assert len(build(VariantConfig, yaml.safe_load(text["variants"]), "variants").scorers) == 2
    assert build(EffectsConfig, yaml.safe_load(text["effects"]), "effects").measured == Measured(
        Path("mpra.tsv"), effect="log_fold_change", gene="gene", significant="fdr", below=0.05
    )
    assert build(AttributeConfig, yaml.safe_load(text["attribute"]), "attribute").target.minus == ("rna_naive_*",)
    sources = {kind: parse_source(yaml.safe_load(text[kind])) for kind in SOURCES}
    assert parse_experiment(yaml.safe_load(text["experiment"])).evaluate.ensemble == Augmentation(True, 0)
    fragments = prepare_source(sources["fragments"], tmp_path / "fragments")
    assert fragments.tracks.names == ["B", "T"]
    assert fragments.targets.sum() == 12  # two of 14 insertions lie behind the last tile
    assert tuple(documented("columns", "quality")) == QC_COLUMNS
    windows = prepare_source(sources["windows"], tmp_path / "windows")
    assert sorted(windows.regions["fold"]) == ["test", "train", "train"]  # the first window has unknown bases
    cohort = prepare_source(sources["personal"], tmp_path / "cohort")
    assert len(cohort) == 16
    assert cohort.sequence_count == 2  # with and without the variant
    labelled = prepare_source(sources["labelled"], tmp_path / "labelled")
    assert labelled.tracks.names == ["bound", "open"]
    assert labelled.regions["fold"].tolist() == ["train", "train", "train", "valid", "test"]
    placed = {
        "kind": "labelled",
        "files": [{"path": "intervals.csv"}],
        "labels": [{"column": "activity", "task": "regression"}],
        "genome": "genome.fa",
        "interval": ["chrom", "start", "end", "strand"],
    }
    assert len(prepare_source(parse_source(placed), tmp_path / "placed")) == 3
    records = {"kind": "labelled", "files": [{"path": "labels.fa", "fold": "train"}]}
    assert prepare_source(parse_source(records), tmp_path / "records").tracks.names == ["label"]


# ---- examples that need nothing ----


@pytest.fixture(scope="module")
def coverage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """examples/coverage as its README runs it, in a copy."""
    yield from _inside(_copy(tmp_path_factory, "coverage"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from _inside(_copy(tmp_path_factory, "labelled"))


def _copy(factory: pytest.TempPathFactory, name: str) -> Path:
    return Path(shutil.copytree(EXAMPLES / name, factory.mktemp("examples") / name))


def _inside(folder: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def _fit_and_evaluate(name: str) -> pd.DataFrame:
    experiment, folder = read_experiment(Path(f"{name}.yaml")), Path("runs") / name
    assert plan_run(experiment, folder).problems == []
    fit_run(experiment, folder)
    return evaluate_run(folder).metrics


def _mean(metrics: pd.DataFrame, model: str, group: str, metric: str) -> float:
    chosen = metrics.query("model == @model and group == @group and metric == @metric and track == ''")
    return float(chosen["value"].iloc[0])


def test_coverage(coverage: Path) -> None:
    simulate(build(Simulation, read_yaml(Path("sim.yaml")), "sim.yaml"), Path("sim"))
    prepare(Path("data.yaml"), Path("data/sim"))
    for name, label in (("linear-probe", "linear probe"), ("lora", "LoRA r=8 (attention, conv)")):
        metrics = _fit_and_evaluate(name)
        assert _mean(metrics, label, "rna", "pearson") > _mean(metrics, "mean track", "rna", "pearson")
    assert _mean(metrics, label, "atac", "pearson") > 0.5
    assert "agreement" in set(metrics["metric"])
    write_report(Path("runs"))
    assert (coverage / "runs" / "report.html").stat().st_size > 10_000
    for table in ("metrics", "differences", "genes"):
        written = pd.read_parquet(Path("runs/lora/evaluation") / f"{table}.parquet")
        assert set(documented("columns", table)) == set(written.columns), table


def test_regulators(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The motifs that act in one condition only are those where the contrast's attribution is."""
    monkeypatch.chdir(_copy(tmp_path_factory, "regulators"))
    simulate(build(Simulation, read_yaml(Path("sim.yaml")), "sim.yaml"), Path("sim"))
    prepare(Path("data.yaml"), Path("data/sim"))
    fit_run(read_experiment(Path("lora.yaml")), Path("runs/lora"))
    runpy.run_path("regions.py", run_name="__main__")
    config = build(AttributeConfig, read_yaml(Path("contrast.yaml")), "contrast.yaml")
    tops = {}
    for name, sign in (("up", "+"), ("down", "-")):
        attribute_run(Path("runs/lora"), Path(f"{name}.bed"), Path(f"{name}.npz"), config)
        monkeypatch.setattr(sys, "argv", ["enrich.py", f"{name}.npz", sign])
        runpy.run_path("enrich.py", run_name="__main__")
        tops[name] = pd.read_csv(f"{name}.motifs.csv")
    activity = {m.name: dict(zip(grammar().conditions, m.activity, strict=True)) for m in grammar().motifs}
    change = {name: acts["activated"] - acts["naive"] for name, acts in activity.items()}
    for name, sign in (("up", 1), ("down", -1)):
        first = tops[name].head(2)
        assert (first["p"] < 1e-3).all()
        assert all(sign * change[motif] >= 0.7 for motif in first["motif"]), first
        decoys = tops[name].query("role == 'decoy'")
        assert (decoys["p"] > 0.01).all()
    assert "windows of 25 bp" in capsys.readouterr().out


def test_labelled(labelled: Path) -> None:
    subprocess.run([sys.executable, "simulate.py"], check=True, timeout=120)
    for name in ("promoters", "peaks"):
        prepare(Path(f"{name}.data.yaml"), Path("data") / name)
    metrics = _fit_and_evaluate("promoters")
    assert _mean(metrics, "IA3 (attention, feedforward, conv)", "promoter", "auroc") > 0.8
    assert "k-mer regression" in set(metrics["model"])
    predict_run(Path("runs/promoters"), Path("new.fa"), Path("predicted.csv"))
    predicted = pd.read_csv("predicted.csv")
    assert predicted.groupby("name").size().tolist() == [3] * 5
    metrics = _fit_and_evaluate("peaks")
    assert _mean(metrics, "Houlsby 4", "peak", "auroc") > 0.6


# ---- examples on real data ----


def test_every_example_is_here() -> None:
    names = {path.parent.name for path in YAMLS}
    readme = (EXAMPLES / "README.md").read_text()
    assert names == set(re.findall(r"^\| `(\w+)/`", readme, re.MULTILINE))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_yaml_is_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQGRAFT_SHARED", os.environ.get("SEQGRAFT_SHARED", "shared"))
    monkeypatch.setenv("REPORTER_TABLE", "reporter.csv")  # what a user names, of setting_the_bar
    monkeypatch.setenv("SPECIESLM_COMMIT", "0" * 40)
    if path.name.endswith("data.yaml"):
        parse_source(read_yaml(path), str(path))
    elif "grid" in read_yaml(path):
        assert methods_of(read_sweep(path))
    elif "sim" in path.suffixes[0] or path.name == "sim.yaml":
        build(Simulation, read_yaml(path), str(path))
    elif path.name == "contrast.yaml":
        build(AttributeConfig, read_yaml(path), str(path))
    else:
        assert read_experiment(path).model.name in ("sim-mini", "yeast-mini", "convnet", "language", "trunk")


def test_half_life(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQGRAFT_SHARED", str(shared))
    dataset = prepare(EXAMPLES / "labels" / "half-life.data.yaml", tmp_path / "half-life")
    assert dataset.regions["fold"].value_counts().to_dict() == {"train": 3474, "test": 656, "valid": 258}
    assert open_dataset(tmp_path / "half-life").tracks.names == ["log2(hlt.wt)"]


def test_leaked_benchmark_is_refused(shared: Path, tmp_path: Path) -> None:
    """All 100 strong enhancers of the test set are in the training set; they are named, and nothing is written."""
    command = [sys.executable, "-m", "seqgraft", "prepare", str(EXAMPLES / "labels" / "enhancers.data.yaml")]
    done = subprocess.run(
        [*command, str(tmp_path / "enhancers")],
        env={**os.environ, "SEQGRAFT_SHARED": str(shared)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "100 test sequences are identical to train sequences" in done.stderr
    listed = pd.read_csv(tmp_path / "enhancers.duplicates.tsv", sep="\t")
    rows = {f"layer1_test_enhancers.fa row {number}" for number in range(1, 201)}
    exact = listed[listed["kind"] == "exact"]
    assert exact["source_b"].nunique() == 100
    assert set(exact["source_b"]) <= rows
    assert not (tmp_path / "enhancers").exists()


def test_coverage_examples_name_files_that_exist(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQGRAFT_SHARED", str(shared))
    for path in (EXAMPLES / "trunks" / "yeast-mini.data.yaml", EXAMPLES / "yeast_diamide" / "data.yaml"):
        source = parse_source(read_yaml(path), str(path))
        assert isinstance(source, CoverageSource)
        table = read_track_table(source.tracks).frame
        assert [name for name in [str(source.fasta), *table["file"]] if not Path(name).is_file()] == []
