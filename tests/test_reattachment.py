"""examples/reattachment: its dataset and models are the published network's, and its path from data to table works."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from seqgraft.adapters import ADAPTERS, Houlsby, LoRA
from seqgraft.data import Dataset, open_dataset
from seqgraft.data.tables import read_track_table
from seqgraft.evaluate import EvaluateConfig, evaluate_model
from seqgraft.experiment import parse_experiment, read_yaml
from seqgraft.models.baskerville import load_baskerville
from seqgraft.models.folders import find_model
from seqgraft.models.weights import ModelConfig, build_model, build_pretrained
from seqgraft.run import evaluate_run

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "reattachment"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reattachment", EXAMPLE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


example = _load()


@dataclass(frozen=True)
class Built:
    """What the script prepares before it trains."""

    out: Path
    held: Dataset
    kept: Dataset


@pytest.fixture(scope="module")
def files(shared: Path) -> Iterator[Path]:
    before = os.environ.get("SEQGRAFT_SHARED")
    os.environ["SEQGRAFT_SHARED"] = str(shared)
    yield shared / "reference" / "parity" / "trained_0.6M"
    if before is None:
        del os.environ["SEQGRAFT_SHARED"]
    else:
        os.environ["SEQGRAFT_SHARED"] = before


@pytest.fixture(scope="module")
def built(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("reattachment")
    table = read_track_table(files / "targets.txt")
    names = example.held_out(table)
    held = example.build_dataset(out / "data" / "held-out", names)
    kept = example.build_dataset(out / "data" / "kept", [name for name in table.names if name not in names])
    example.build_models(out, kept)
    return Built(out, held, kept)


# ---- without data ----


def test_every_method_is_there_and_the_presets_are_baskervilles() -> None:
    base = read_yaml(EXAMPLE / "experiment.yaml")
    adapters = {name: parse_experiment(base | settings).adapter for name, (settings, _) in example.METHODS.items()}
    assert {adapter.kind for adapter in adapters.values()} == set(ADAPTERS) - {"peft", "prompt"}
    assert adapters["LoRA (Baskerville)"] == LoRA.baskerville()
    assert adapters["LoCon4 (Baskerville)"] == LoRA.baskerville(convs=4)
    assert adapters["Houlsby"] == Houlsby.baskerville()
    assert adapters["Houlsby + SE4"] == Houlsby.baskerville(convs=4)


def test_the_figure_is_a_file_of_its_own() -> None:
    models = [example.PROBE, "full", example.SCRATCH, "mean profile", example.PUBLISHED]
    groups = ["graft", "graft", "control", "baseline", "reference"]
    frame = pd.DataFrame({"model": models, "value": 0.5, "low": 0.4, "high": 0.6, "group": groups})
    text = example.draw(frame)
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(--" not in text


# ---- on the published network ----


def test_a_quarter_of_each_assay_is_held_out(built: Built) -> None:
    assert {group: len(index) for group, index in built.held.tracks.groups.items()} == {
        "CAGE": 6, "DNASE": 3, "RNA": 6, "RNA3": 2,
    }  # fmt: skip
    assert len(built.held.tracks) + len(built.kept.tracks) == 74
    assert not set(built.held.tracks.names) & set(built.kept.tracks.names)


def test_the_dataset_gives_the_stored_targets_back(built: Built, files: Path) -> None:
    names = read_track_table(files / "targets.txt").names
    assert built.held.regions["fold"].value_counts().to_dict() == {"train": 45, "valid": 10, "test": 10}
    with np.load(files / "tiny_hg38_valid.npz") as stored:
        expected = stored["targets"].transpose(0, 2, 1).astype(np.float32)
        for dataset in (built.held, built.kept):
            index = [names.index(name) for name in dataset.tracks.names]
            found = dataset.squashed_targets(dataset.rows("valid"))
            np.testing.assert_allclose(found, expected[:, index], rtol=1e-5, atol=1e-5)
            codes, lengths = dataset.sequences(dataset.rows("valid"))
            np.testing.assert_array_equal(codes, stored["seq_index"])
            assert set(lengths) == {131072}


def test_the_trunk_is_the_published_one_without_the_held_out_tracks(built: Built, files: Path) -> None:
    found = find_model(str(built.out / "trunk"))
    assert found is not None
    assert found.tracks.names == built.kept.tracks.names
    model = build_pretrained(ModelConfig(str(built.out / "trunk")), built.held.info)
    assert model is not None
    whole = load_baskerville(files / "model.h5", files / "params.json", files / "targets.txt")
    expected = whole.trunk.state_dict()
    for name, tensor in model.trunk.state_dict().items():
        assert (tensor == expected[name]).all(), name
    for name, head in model.heads.items():
        theirs = whole.heads[name.removeprefix("pretrained_")]
        rows = [theirs.tracks.names.index(track) for track in head.tracks.names]
        assert (head.out.weight == theirs.out.weight[rows]).all()
        assert (head.out.bias == theirs.out.bias[rows]).all()


def test_evaluation_gives_the_published_accuracy(built: Built, files: Path) -> None:
    """Pearson of every held-out track under the published head, over all bins of the test windows."""
    start = ModelConfig(str(built.out / "published"), head="pretrained")
    model = build_model(start, built.held.tracks, built.held.info)
    metrics = evaluate_model(model, built.held, EvaluateConfig(baselines=(), draws=10), "published", start).metrics
    rows = metrics.query("unit == 'squashed' and track != ''")
    expected = pd.read_csv(files / "eval_test_acc.txt", sep="\t").set_index("identifier")
    for metric, column in (("pearson", "pearsonr"), ("r2", "r2")):
        found = rows[rows["metric"] == metric].set_index("track")["value"]
        assert set(found.index) == set(built.held.tracks.names)
        assert (found - expected[column].reindex(found.index)).abs().max() < 1e-3


def test_a_few_windows_from_data_to_table(built: Built, tmp_path: Path) -> None:
    """A linear probe on three windows is above the mean profile, and the table names what it trained."""
    shutil.copytree(built.out / "trunk", tmp_path / "trunk")
    shutil.copytree(built.out / "published", tmp_path / "published")
    for name in ("held-out", "kept"):
        folder = shutil.copytree(built.out / "data" / name, tmp_path / "data" / name)
        regions = pd.read_parquet(folder / "regions.parquet")
        number = regions.groupby("fold").cumcount()
        regions["fold"] = regions["fold"].where(number < regions["fold"].map({"train": 3, "valid": 1, "test": 2}), "-")
        regions.to_parquet(folder / "regions.parquet")
    dataset = open_dataset(tmp_path / "data" / "held-out")
    run = example.train(tmp_path, example.PROBE, 1e-2, 1e-2)
    evaluate_run(run.folder)
    table, assays, dots = example.tables(tmp_path, dataset, {example.PROBE: run})
    value = dots.set_index("model")["value"]
    assert value[example.PROBE] > value["mean profile"] + 0.1
    assert value[example.PUBLISHED] > value["mean profile"] + 0.1
    first = table.iloc[0]
    assert (first["method"], first["trains"], first["merged"]) == (example.PROBE, f"{17 * 129:,}", "")
    assert float(first["other tracks"]) == 0  # a probe leaves the trunk as it was
    assert list(assays.columns) == ["method", "CAGE (6)", "DNASE (3)", "RNA (6)", "RNA3 (2)"]
