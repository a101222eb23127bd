"""Bytes from shapes alone are the bytes of the real step, and a card says what is known of a model."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import seqgraft.card
from builders import BORZOI, SETTINGS, tiny_coverage, tiny_pretrained
from seqgraft.adapters import Adapter, FullFineTune, LinearProbe, LoRA, adapt, save_adapter
from seqgraft.card import PUBLISHED, adapter_costs, facts_of, model_card, write_card
from seqgraft.cli import app
from seqgraft.data.seen import TRUNK_FOLDS
from seqgraft.errors import ConfigError
from seqgraft.experiment import Experiment, parse_experiment
from seqgraft.memory import bytes_per_row, bytes_without_computing
from seqgraft.models.base import Head, SequenceModel, Stage, State
from seqgraft.models.folders import TRUNKS
from seqgraft.models.hub import licence_of
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.objectives import Elementwise
from seqgraft.plan import measure_cost, plan_run
from seqgraft.predict import Precision
from seqgraft.run import build_run
from seqgraft.sample import Sample
from seqgraft.tracks import TrackTable

ENFORMER = {"channels": 48, "depth": 1, "heads": 2, "key_size": 8, "divisible_by": 4, "positions": 64}
TINY: dict[str, tuple[Mapping[str, Any], int]] = {  # settings and window
    "convnet": (SETTINGS, 512),
    "borzoi": (BORZOI, 32 * 640),  # 640 positions in the transformer: attention in two chunks
    "enformer": (ENFORMER, 4096),
}


def model_of(name: str, adapter: Adapter) -> SequenceModel:
    torch.manual_seed(0)
    trunk = TRUNKS[name].build(TINY[name][0], bin_size=16, crop=2)
    tracks = TrackTable.build([{"name": "track"}])
    model = SequenceModel(trunk, {"new_track": Head(tracks, trunk.spec.channels)}, tracks)
    adapt(model, adapter)
    return model.train()


def regions(window: int, bins: int) -> list[Sample]:
    targets = [torch.ones(size, 1, bins) for size in (1, 2)]
    codes = [torch.zeros(size, window, dtype=torch.uint8) for size in (1, 2)]
    return [
        Sample(code, torch.full((len(code),), window), torch.arange(len(code)), target, target > 0)
        for code, target in zip(codes, targets, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "adapter", "checkpointing", "precision"),
    [
        ("convnet", LinearProbe(), False, "float32"),
        ("convnet", FullFineTune(), False, "bf16"),
        ("convnet", FullFineTune(), True, "float32"),
        ("borzoi", LoRA(rank=2), False, "float32"),
        ("borzoi", LoRA(rank=2), True, "float32"),
        ("enformer", FullFineTune(), False, "float32"),
        ("enformer", LoRA(rank=2), False, "bf16"),
    ],
)
def test_shapes_alone_give_the_bytes_of_the_real_step(
    name: str, adapter: Adapter, checkpointing: bool, precision: Precision
) -> None:
    """A little apart in bf16: the kernels of norms keep their statistics in float32, their descriptions do not."""
    model = model_of(name, adapter)
    model.trunk.checkpointing = checkpointing
    window = TINY[name][1]
    objective, samples = Elementwise(model.tracks), regions(window, window // 16 - 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    counted = bytes_without_computing(model, objective, samples, precision)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    bytes_per_row(model, objective, samples, precision)  # tables that are made once are no part of a step
    real = bytes_per_row(model, objective, samples, precision)
    assert real > 10_000
    assert counted == pytest.approx(real, rel=1e-4 if precision == "float32" else 5e-3)


def test_counting_leaves_no_hollow_tables_behind() -> None:
    """Enformer keeps its position features for the next call: they must have numbers in them."""
    model = model_of("enformer", LinearProbe()).eval()
    sample = regions(2048, 124)[0]
    assert bytes_without_computing(model, Elementwise(model.tracks), regions(2048, 124), "float32")
    with torch.inference_mode():
        values = model(sample)
    assert type(values) is torch.Tensor
    assert np.isfinite(values.numpy()).all()


class LooksAtValues(Stage):
    def forward(self, state: State) -> State:
        return State(state.x * float(state.x.abs().max().item()), state.skips, state.valid)


def test_where_shapes_do_not_say_it() -> None:
    model = model_of("convnet", FullFineTune())
    objective, samples = Elementwise(model.tracks), regions(512, 28)
    assert bytes_without_computing(model, objective, samples, "float32") is not None
    model.trunk.stages["odd"] = LooksAtValues()
    assert bytes_without_computing(model, objective, samples, "float32") is None
    pytest.importorskip("bitsandbytes")
    quantised = model_of("convnet", LoRA(rank=2, quantize="nf4"))
    assert bytes_without_computing(quantised, objective, samples, "float32") is None


# ---- plan ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    data = tiny_coverage(folder / "data")
    tiny_pretrained(folder / "model", trained_on=data)
    return folder


def experiment(folder: Path, **sections: Any) -> Experiment:
    model = {"name": "convnet", "settings": SETTINGS}
    return parse_experiment({"data": str(folder / "data"), "model": model} | sections)


def test_plan_of_a_long_step_runs_none_and_claims_no_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = experiment(folder, adapter={"kind": "full"})
    here = plan_run(planned, memory=2**33).cost
    assert here is not None
    assert here.seconds_per_row is not None
    monkeypatch.setattr("seqgraft.plan._LONG", 1.0)  # every step would take long
    long = plan_run(planned)
    assert long.would_start
    assert long.cost is not None
    assert long.cost.bytes_per_row == here.bytes_per_row
    assert long.cost.seconds_per_row is None
    assert long.facts["time"].startswith("not measured")
    assert "not measured" in long.facts["cache"]


def test_a_step_that_shapes_do_not_tell_is_run(folder: Path) -> None:
    planned = experiment(folder)
    model, dataset = build_run(planned)
    model.trunk.stages["odd"] = LooksAtValues()
    adapt(model, planned.adapter)
    assert measure_cost(planned, model, dataset, run_step=False).seconds_per_row is not None


# ---- cards ----


def test_costs_are_those_of_the_adapted_model(folder: Path, tmp_path: Path) -> None:
    facts = facts_of(str(folder / "model"))
    adapters: tuple[Adapter, ...] = (LoRA(), FullFineTune())
    for adapter, cost in zip(adapters, adapter_costs(facts, adapters), strict=True):
        data = tiny_coverage(tmp_path / adapter.kind, tracks=["one"])
        model = build_model(ModelConfig(str(folder / "model")), data.tracks, data.info)
        counts = adapt(model, adapter)
        assert cost.label == adapter.label
        assert cost.trains == counts.adapter + counts.trunk
        save_adapter(model, tmp_path / "saved", {"name": "x"}, replace_existing=True)
        assert 0 <= (tmp_path / "saved" / "weights.safetensors").stat().st_size - cost.file <= 10_000  # names
        model.train()
        samples = [data.sample([0] * size) for size in (1, 2)]
        for precision, counted in cost.per_region.items():
            real = bytes_per_row(model, Elementwise(data.tracks), samples, precision)
            assert counted == pytest.approx(real, rel=0.02)


def test_adapters_without_a_site_are_left_out() -> None:
    facts = facts_of("sim-mini")
    assert adapter_costs(facts, (LoRA(where=("nose",)),)) == []


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards with two adapters, to save time."""
    assert len(seqgraft.card._SHOWN) == 7
    monkeypatch.setattr(seqgraft.card, "_SHOWN", (LinearProbe(), FullFineTune()))


@pytest.mark.usefixtures("_few")
def test_a_card_says_what_is_known() -> None:
    card = model_card(facts_of("sim-mini"))
    assert card.startswith("# sim-mini")
    for part in ("| licence | Apache-2.0 |", "5,120 bp", "256 bins of 16 bp", "attention (8)", "trained_on.bed"):
        assert part in card
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d.]+ k?M?B) \|", card, re.MULTILINE)
    assert [row[:2] for row in rows] == [("linear probe", "0"), ("full fine-tuning", "192,768")]


@pytest.mark.usefixtures("_few")
def test_writing_a_card_keeps_what_its_makers_wrote(folder: Path) -> None:
    path = folder / "model" / "card.md"
    path.write_text("# Mine\n\nGrown in a pot.\n")
    assert write_card(folder / "model") == path
    first = path.read_text()
    assert first.startswith("# Mine\n\nGrown in a pot.\n")
    assert "| full fine-tuning |" in first
    write_card(folder / "model")
    assert path.read_text() == first


def test_published_weights() -> None:
    for name, facts in PUBLISHED.items():
        assert facts.name == name
        assert facts.licence
        assert "doi" in facts.citation
        language = facts.architecture == "language"
        assert language != any(f"'{key}'" in facts.folds for key in TRUNK_FOLDS)
        if not (stated := licence_of(name)).startswith("not stated"):
            assert facts.licence == stated
        with torch.device("meta"):
            trunk = facts.trunk()
        assert trunk.spec.bin_size == facts.bin_size
        assert facts.window % trunk.stride == 0
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in PUBLISHED[name].trunk().parameters())
            for name, facts in PUBLISHED.items()
            if facts.architecture != "borzoi" or name == "johahi/borzoi-replicate-0"
        }
    assert sizes["johahi/borzoi-replicate-0"] == 171_271_968
    assert sizes["EleutherAI/enformer-official-rough"] == 229_845_504
    assert sizes["zhihan1996/DNA_bert_6"] == 88_599_552
    # What the hub counts of version 2: with a table of positions that nothing reads, two more tokens, and the head.
    for size, channels, millions in (("50m", 512, 55.9), ("100m", 512, 97.9), ("250m", 768, 235.1)):
        more = channels * (2050 + 2 + channels + 3 + 4107) + 4107
        name = f"InstaDeepAI/nucleotide-transformer-v2-{size}-multi-species"
        assert round((sizes[name] + more) / 1e6, 1) == millions


@pytest.mark.slow
def test_half_a_megabase_is_counted_in_seconds() -> None:
    """LoRA of full-size Borzoi at 524,288 bp; a step of it takes minutes."""
    began = time.process_time()
    (cost,) = adapter_costs(PUBLISHED["johahi/borzoi-replicate-0"], (LoRA(),))
    assert time.process_time() - began < 30
    assert cost.trains == 655_360
    full, half = (cost.per_region[precision] for precision in ("float32", "bf16"))  # type: ignore[index]
    assert full is not None
    assert half is not None
    assert 2**30 < half < full < 4 * 2**30


@pytest.mark.usefixtures("_few")
def test_models_prints_lists_and_cards(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["models"])
    assert shown.exit_code == 0
    for name in ("sim-mini", "johahi/flashzoi-replicate-0", "CC-BY-4.0", "convnet"):
        assert name in shown.output
    card = CliRunner().invoke(app, ["models", str(folder / "model")])
    assert card.exit_code == 0
    assert card.output.rstrip() == model_card(facts_of(str(folder / "model"))).rstrip()
    cases = {
        "nothing": "no such model",
        "convnet": "no card before it is trained",
        "owner/name": "nothing is known of a hub id.*seqgraft convert",
    }
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            facts_of(name)
