"""Which precision a run trains in: a rule, decided once, kept by a resumed run, and said wherever the run is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import seqgraft.predict
import seqgraft.train
from builders import SETTINGS, tiny_coverage
from seqgraft.adapters import adapt
from seqgraft.errors import ConfigError, RunError
from seqgraft.evaluate import EvaluateConfig
from seqgraft.experiment import Experiment, parse_experiment, read_experiment
from seqgraft.plan import plan_run
from seqgraft.predict import BF16_PARAMETERS, automatic_precision, has_bf16
from seqgraft.report import write_report
from seqgraft.run import build_run, fit_run, objective_of, open_run
from seqgraft.train import fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    tiny_coverage(folder / "data")
    return folder


def experiment(folder: Path, **train: Any) -> Experiment:
    content = {
        "data": str(folder / "data"),
        "model": {"name": "convnet", "settings": SETTINGS},
        "train": {"epochs": 3, "batch_size": 4, "lr": 1e-2, "patience": 0} | train,
    }
    return parse_experiment(content)


def machine(monkeypatch: pytest.MonkeyPatch, *, native: bool) -> None:
    """A machine with bfloat16 or without, on which a tiny trunk is large."""
    monkeypatch.setattr(seqgraft.predict, "has_bf16", lambda: native)
    monkeypatch.setattr(seqgraft.predict, "BF16_PARAMETERS", 1)


def test_the_rule() -> None:
    assert automatic_precision(BF16_PARAMETERS + 1, native=True) == "bf16"
    assert automatic_precision(BF16_PARAMETERS, native=True) == "float32"
    assert automatic_precision(BF16_PARAMETERS + 1, native=False) == "float32"
    assert automatic_precision(171_000_000, native=True) == "bf16"  # Borzoi
    assert automatic_precision(400_000, native=True) == "float32"  # the bundled trunks


@pytest.mark.parametrize(("avx", "amx"), [(True, False), (False, True), (False, False)])
def test_the_processor_is_asked(monkeypatch: pytest.MonkeyPatch, avx: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bf16() is (avx or amx)


@pytest.mark.parametrize("native", [True, False])
def test_a_card_is_asked_before_the_processor(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not native)
    assert has_bf16() is native
    assert asked == [False]


def test_float16_is_refused_with_the_reason(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision: is not offered: .*60 times slower.*Use bf16"):
        experiment(folder, precision="float16")
    with pytest.raises(ConfigError, match=r"no such precision: 'half'.*Use auto, bf16 or float32"):
        experiment(folder, precision="half")


def test_plan_says_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_run(experiment(folder)).facts["precision"].startswith("float32 (auto")  # it is tiny
    assert plan_run(experiment(folder, precision="bf16")).facts["precision"] == "bf16, as asked for"
    machine(monkeypatch, native=True)
    found = plan_run(experiment(folder))
    assert found.facts["precision"].startswith("bf16 (auto")
    assert found.experiment.train.precision == "bf16"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in open_run(run).model.state_dict().items()}


def test_a_resumed_run_keeps_what_it_began_with(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun where bf16 is native, continued where it is not: bit for bit the uninterrupted run."""
    machine(monkeypatch, native=True)
    fit_run(experiment(folder), tmp_path / "whole")
    fit_run(experiment(folder, precision="float32"), tmp_path / "float32")
    save = seqgraft.train._save_checkpoint

    def killed(path: Path, model: Any, optimizer: Any, identity: Any, state: Any) -> None:
        save(path, model, optimizer, identity, state)
        if state.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(seqgraft.train, "_save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_run(experiment(folder), tmp_path / "run")
    assert read_experiment(tmp_path / "run" / "experiment.yaml").train.precision == "bf16"

    machine(monkeypatch, native=False)
    with pytest.raises(RunError, match=r"other settings: \['train\.precision'\]"):
        fit_run(experiment(folder, precision="float32"), tmp_path / "run", resume=True)
    fit_run(experiment(folder), tmp_path / "run", resume=True)
    whole, resumed, other = (weights(tmp_path / name) for name in ("whole", "run", "float32"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["precision"] == "bf16"
    page = write_report(tmp_path / "run").read_text()
    assert "precision of training" in page


def test_fit_alone_keeps_it_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a run directory's experiment, the checkpoint says what the run began with."""
    planned = experiment(folder)

    def train(name: str, epochs: int, *, resume: bool = False) -> dict[str, torch.Tensor]:
        model, dataset = build_run(planned)
        adapt(model, planned.adapter)
        config = replace(planned.train, epochs=epochs, schedule="constant", warmup=0.0)
        (tmp_path / name).mkdir(exist_ok=True)
        fit(model, dataset, objective_of(planned, dataset), config, tmp_path / name, resume=resume)
        return dict(model.state_dict())

    machine(monkeypatch, native=True)
    train("run", 2)
    machine(monkeypatch, native=False)
    with pytest.raises(RunError, match="differ in train"):  # other epochs: it read the checkpoint all the same
        train("run", 3, resume=True)
    begun = train("run", 2, resume=True)
    machine(monkeypatch, native=True)
    whole = train("whole", 2)
    assert all(torch.equal(whole[name], begun[name]) for name in whole)


def test_predictions_are_in_float32(folder: Path, tmp_path: Path) -> None:
    """Whatever a run trained in: evaluation has no precision of its own."""
    fit_run(experiment(folder, precision="bf16", epochs=1), tmp_path / "run")
    run = open_run(tmp_path / "run")
    rows = run.dataset.rows("test")
    as_run, full, half = (
        seqgraft.predict.predict(run.model, run.dataset, rows, **options)
        for options in ({}, {"precision": "float32"}, {"precision": "bf16"})
    )
    assert (as_run == full).all()
    assert (full != half).any()
    assert "precision" not in EvaluateConfig.__dataclass_fields__
