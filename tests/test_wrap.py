"""Any module as a trunk: it keeps the contracts of trunks and adapters, and a dry run finds what does not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import test_adapters as adapters
import test_models as trunks
from builders import settle, tiny_coverage, tiny_labels
from seqgraft.adapters import LoRA, adapt
from seqgraft.apply import predict_run
from seqgraft.cache import frozen_prefix
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError, ModelError
from seqgraft.experiment import parse_experiment
from seqgraft.export import export_run
from seqgraft.models.base import Head, SequenceModel, Step, Trunk, weight_hash
from seqgraft.models.folders import TRUNKS, register, save_model
from seqgraft.models.weights import ModelConfig, build_model, build_pretrained, is_random
from seqgraft.models.wrap import ModuleSpec, WrappedTrunk, describe, redraw, wrap
from seqgraft.plan import plan_run
from seqgraft.predict import predict
from seqgraft.run import evaluate_run, fit_run, label_of, open_run
from seqgraft.sequence import PAD
from seqgraft.tracks import TrackTable
from test_readme import blocks

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "guides" / "own-model.md"


class Attention(nn.Module):
    """Attention and feed-forward over positions, as a user would write them; global."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        y = self.norm1(x)
        query, key, value = self.q_proj(y), self.k_proj(y), self.v_proj(y)
        x = x + self.out_proj((query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1) @ value)
        return (x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))).transpose(1, 2)


def network(width: int = 16, *, drops: bool = False, attention: bool = True) -> nn.Sequential:
    """16 bp per bin; with ``drops`` one bin less at each end."""
    parts: list[nn.Module] = [
        nn.Conv1d(4, width, 7, padding=3),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool1d(8),
        nn.Conv1d(width, width, 5, padding=4, dilation=2),
        nn.Upsample(scale_factor=2),
        nn.AvgPool1d(4),
        nn.Conv1d(width, width, 3, padding=0 if drops else 1),
    ]
    made = nn.Sequential(*parts, *([Attention(width)] if attention else []), nn.GELU())
    settle(made)  # type: ignore[arg-type]
    return made


SPEC = ModuleSpec("mine", channels=16, bin_size=16, licence="CC0", citation="me")


def small(seed: int = 0, *, drops: bool = False, attention: bool = True, crop: int = 2) -> WrappedTrunk:
    torch.manual_seed(seed)
    spec = ModuleSpec("mine", 16, 16, drops=int(drops))
    return WrappedTrunk(network(drops=drops, attention=attention), spec, crop)


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    """``register``, undone afterwards."""
    before = dict(TRUNKS)
    yield register
    TRUNKS.clear()
    TRUNKS.update(before)


@pytest.fixture(scope="module")
def coverage(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_coverage(tmp_path_factory.mktemp("wrap") / "data", regions=12)


# ---- the contract of trunks ----


@pytest.mark.parametrize("drops", [False, True], ids=["", "drops"])
def test_stages_are_measured(drops: bool) -> None:
    trunk = small(drops=drops)
    last = (Step("conv", 3), Step("crop", 1)) if drops else (Step("conv", 3),)
    assert [stage.steps for stage in trunk.stages.values()] == [
        (Step("conv", 7),),
        (Step("conv", 1),),
        (Step("conv", 1),),
        (Step("conv", 1), Step("pool", 8)),
        (Step("conv", 9),),
        (Step("up", 2), Step("conv", 1)),
        (Step("conv", 1), Step("pool", 4)),
        last,
        None,
        (Step("conv", 1),),
        (Step("crop", 1 if drops else 2),),
    ]
    trunks.test_slices_compose_to_forward(trunk)


def test_stages_touch_and_need_what_was_measured() -> None:
    for drops in (False, True):
        trunk = small(drops=drops, attention=False).eval()
        trunks.test_stages_touch_what_they_say_and_nothing_else(trunk)
        trunks.test_stages_need_what_they_say_and_nothing_else(trunk)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 97, 150])
def test_padding_changes_nothing(length: int) -> None:
    for made in (small(), WrappedTrunk(_Whole(), SPEC)):
        trunks.test_padding_changes_nothing(made.eval(), length)


class _Whole(nn.Module):
    """No Sequential, so one stage, which is global."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


@torch.no_grad()
def test_padding_changes_nothing_where_bins_are_dropped() -> None:
    trunk = small(drops=True, crop=1).eval()
    codes = trunks.random_codes(1, 100)
    alone = trunk(codes)
    longer = torch.cat([functional.pad(codes, (0, 156), value=PAD), trunks.random_codes(1, 256, seed=3)])
    together = trunk(longer)
    assert alone.x.shape[-1] == 112 // 16 - 2
    assert together.x.shape[-1] == 256 // 16 - 2
    assert together.valid is not None
    assert together.valid.sum(1).tolist() == [5, 14]
    assert torch.allclose(together.x[0, :, :5], alone.x[0, :, :5], atol=1e-6)
    assert torch.allclose(together.x[1], trunk(longer[1:]).x[0], atol=1e-6)
    with pytest.raises(ModelError, match="shorter than what the module drops"):
        trunk(functional.pad(trunks.random_codes(1, 20), (0, 60), value=PAD))


def test_one_stage_and_mappings_and_declared_steps() -> None:
    one = WrappedTrunk(_Whole(), SPEC)
    assert [(name, stage.local) for name, stage in one.stages.items()] == [("module", False), ("crop", True)]
    layers = network(attention=False)
    parts = {"first": layers[:5], "second": layers[5:]}
    mapped = wrap(parts, SPEC)
    assert list(mapped.stages) == ["first", "second", "crop"]
    assert mapped.stages["first"].steps == (Step("conv", 7 + 8 * 8), Step("pool", 8))
    wide = (Step("conv", 101), Step("pool", 8))
    assert wrap(parts, ModuleSpec("mine", 16, 16, steps={"first": wide, "second": None})).stages["first"].steps == wide
    with pytest.raises(ModelError, match="and it reaches"):
        wrap(parts, ModuleSpec("mine", 16, 16, steps={"first": (Step("conv", 7), Step("pool", 8))}))
    with pytest.raises(ModelError, match="reaches as far as the ends"):
        wrap(_Whole(), ModuleSpec("mine", 16, 16, steps={"module": (Step("conv", 7), Step("pool", 16))}))
    with pytest.raises(ModelError, match="no stages of these names"):
        wrap(parts, ModuleSpec("mine", 16, 16, steps={"third": None}))


def test_the_reach_is_that_of_the_structure_and_not_of_the_weights() -> None:
    """A kernel of zeros and a ReLU that is never open do not shorten what a stage can see."""
    conv = nn.Conv1d(4, 16, 31, padding=15)
    nn.init.zeros_(conv.weight)
    nn.init.constant_(conv.bias, -1)
    trunk = wrap({"conv": nn.Sequential(conv, nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1))}, ModuleSpec("dead", 16))
    assert trunk.stages["conv"].steps == (Step("conv", 33),)


def test_a_window_of_one_length_and_a_call() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(4, 8, 5), nn.Linear(8 * 60, 24)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": self.out(self.conv(x).relu().flatten(1))}

    spec = ModuleSpec("pooled", 24, 64, window=64, call=lambda m, x: m(x)["features"][..., None])
    trunk = wrap(Pooled(), spec)
    assert trunk.spec.length == trunk.stride == 64
    assert trunk(trunks.random_codes(3, 64)).x.shape == (3, 24, 1)
    assert trunk(trunks.random_codes(3, 50)).x.shape == (3, 24, 1)  # padded to the window
    with pytest.raises(ModelError, match="takes sequences of 64 bp, and here they have: 65"):
        trunk(trunks.random_codes(3, 65))
    assert describe(trunk)["sites"].tolist() == ["conv", "linear"]
    model = SequenceModel(trunk, {"new_a": Head(_one(), 24)}, _one())
    adapt(model, LoRA(where=("conv", "linear"), rank=2))


def _one() -> TrackTable:
    return TrackTable.build([{"name": "a"}])


# ---- sites ----


def test_sites_are_found_and_shown() -> None:
    trunk = small()
    table = describe(trunk).set_index("module")["sites"]
    assert table["stages.0.inner"] == table["stages.4.inner"] == "conv"
    assert table["stages.1.inner"] == table["stages.8.inner.norm1"] == "norm"
    assert table["stages.8.inner.q_proj"] == "attention, attention.query"
    assert table["stages.8.inner.out_proj"] == "attention, attention.output"
    assert table["stages.8.inner.fc2"] == "feedforward, feedforward.down"
    assert set(trunk.spec.sites) == {
        *("conv", "norm", "attention", "attention.query", "attention.key", "attention.value", "attention.output"),
        *("feedforward", "feedforward.up", "feedforward.down"),
    }


def test_what_no_adapter_can_reach_is_no_site_and_says_why() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 16, 3, padding=1)
            self.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=4)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.read = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.grouped(self.conv(x)).transpose(1, 2)
            x = x + self.attention(x, x, x)[0]
            return functional.linear(x, self.read.weight, self.read.bias).transpose(1, 2)

    trunk = wrap(Hidden(), ModuleSpec("hidden", 16))
    notes = describe(trunk).set_index("module")
    assert trunk.spec.sites == {"conv": ("stages.module.inner.conv",)}
    assert notes.loc["stages.module.inner.grouped", "note"] == "a grouped convolution"
    unreached = ("attention.out_proj", "read")
    for name in unreached:
        assert "read elsewhere" in notes.loc[f"stages.module.inner.{name}", "note"]
        with pytest.raises(ModelError, match="never called"):
            wrap(Hidden(), ModuleSpec("hidden", 16, sites={"attention": (name,)}))


@torch.no_grad()
def test_layers_of_torch_that_bypass_their_parts_in_eval_mode_do_not() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 16, 3, padding=1)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(self.conv(x).transpose(1, 2)).transpose(1, 2)
            return y

    trunk = wrap(Encoder(), ModuleSpec("encoder", 16))
    assert len(trunk.spec.sites["feedforward.down"]) == 2
    assert set(trunk.spec.sites) == {"conv", "norm", "feedforward", "feedforward.up", "feedforward.down"}
    model = SequenceModel(trunk, {"new_a": Head(_one(), 16)}, _one())
    adapt(model, LoRA(where=("feedforward",), rank=2))
    codes = trunks.random_codes(1, 64)
    before = trunk.eval()(codes).x
    for name, parameter in trunk.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    assert float((trunk(codes).x - before).abs().max()) > 0.01


def test_sites_can_be_given() -> None:
    spec = ModuleSpec("mine", 16, 16, sites={"conv": ("0", "7"), "attention": ("8.q_proj",)})
    trunk = wrap(network(), spec)
    assert trunk.spec.sites == {
        "conv": ("stages.0.inner", "stages.7.inner"),
        "attention": ("stages.8.inner.q_proj",),
    }
    assert wrap(_Whole(), ModuleSpec("mine", 16, 16, sites={"conv": ("layers.0",)})).spec.sites["conv"] == (
        "stages.module.inner.layers.0",
    )
    with pytest.raises(ModelError, match=r"there is not: '9\.q'"):
        wrap(network(), ModuleSpec("mine", 16, 16, sites={"attention": ("9.q",)}))
    with pytest.raises(ModelError, match="no modules"):
        wrap(network(), ModuleSpec("mine", 16, 16, sites={"conv": ()}))


# ---- what the dry run finds ----


class Bad(nn.Module):
    """A network of one convolution, and then something."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.then = nn.Conv1d(4, 16, 3, padding=1), then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.conv(x))


class InPlace(Bad):
    def forward(self, x: Tensor) -> Any:
        return self.conv(x.mul_(2))


class Unused(Bad):
    def __init__(self) -> None:
        super().__init__(lambda y: y)
        self.head = nn.Linear(16, 3)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Bad(lambda y: y[:, :8]), "gives 8 channels and the spec says: 16"),
        (Bad(lambda y: functional.avg_pool1d(y, 2)), "gives 128 bins, .* it would be: 256"),
        (Bad(lambda y: y[..., 5:-5]), "gives 246 bins"),
        (Bad(lambda y: y[..., : y.shape[-1] // 100 * 100]), "bins"),
        (Bad(lambda y: y.mean(-1)), r"no tensor \(batch, channels, bins\): \(2, 16\)"),
        (Bad(lambda y: (y, y)), r"no tensor \(batch, channels, bins\): 'tuple'"),
        (Bad(lambda y: y / 0), "not finite"),
        (Bad(functional.dropout), "run again"),
        (Bad(lambda y: functional.batch_norm(y, None, None, training=True)), "depends on the batch"),
        (Bad(nn.BatchNorm1d(16, track_running_stats=False)), "depends on the batch"),
        (Bad(lambda y: y - y.mean(0, keepdim=True)), "depends on the batch"),
        (Bad(lambda y: y.detach()), "no effect on the output"),
        (Unused(), r"no effect on the output: \['module\.inner\.head\.weight'"),
        (InPlace(lambda y: y), "changes its input in place"),
        (Bad(nn.Linear(7, 7)), "stops at a sequence of 256 bp"),
        (nn.Identity(), "no parameters"),
        ({"crop": nn.Conv1d(4, 16, 1)}, "cannot have this name"),
        ({"keys": nn.Conv1d(4, 16, 1)}, "cannot have this name"),
    ],
)
def test_what_does_not_fit_is_found(module: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        wrap(module, ModuleSpec("bad", 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_type_are_told(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.MaxPool1d(4)).to(dtype)
    with pytest.raises(ModelError, match=rf"weights that are not float32: \['{dtype}'\].*module\.float"):
        wrap(module, ModuleSpec("typed", 8, 4))


def test_specs_that_cannot_be() -> None:
    for settings in ({"channels": 0}, {"bin_size": 0}, {"drops": -1}, {"bin_size": 8, "stride": 12}, {"window": 0}):
        with pytest.raises(ModelError):
            ModuleSpec("bad", **({"channels": 4} | settings))
    with pytest.raises(ModelError, match="'call' is for one module"):
        wrap({"a": nn.Conv1d(4, 16, 1)}, ModuleSpec("bad", 16, call=lambda m, x: m(x)))


# ---- the contract of adapters ----


CONTRACT = [
    *("linear probe", "full", "full, moving statistics", "lora everywhere", "locon", "dora everywhere", "ia3"),
    *("ia3 conv", "houlsby squeeze-excite", "loha", "norms"),
]


def adapted_network(seed: int = 0, *, extended: bool = False) -> SequenceModel:
    """As ``test_adapters.build``, on a wrapped module: 8 bp per bin, one bin cropped."""
    del extended
    torch.manual_seed(seed)
    width = adapters.CHANNELS
    layers = nn.Sequential(
        *(nn.Conv1d(4, width, 7, padding=3), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(8)),
        *(nn.Conv1d(width, width, 3, padding=1), Attention(width), nn.Conv1d(width, width, 1)),
    )
    settle(layers)  # type: ignore[arg-type]
    trunk = WrappedTrunk(layers, ModuleSpec("mine", width, 8), crop=1)
    plain = BUILD(seed)
    return SequenceModel(trunk, dict(plain.heads.items()), plain.tracks)  # type: ignore[arg-type]


BUILD = adapters.build


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.filterwarnings("ignore:Merge lora module")
@pytest.mark.parametrize("variant", CONTRACT)
def test_adapters_keep_their_contract(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "build", adapted_network)
    adapters.test_starts_as_the_identity(variant)
    adapters.test_only_what_should_train_trains(variant)
    model = adapted_network()
    adapt(model, adapters.VARIANTS[variant])
    adapters.train(model)
    adapters.test_every_trainable_tensor_moves_and_belongs_to_a_group(model)
    adapters.test_padding_changes_nothing(model)
    adapters.test_reload_equals_live(model, variant, tmp_path)
    adapters.test_merged_equals_unmerged(model, variant)


def test_statistics_stay_frozen_and_prefixes_are_cached() -> None:
    model = adapted_network()
    adapt(model, LoRA(where=("conv",), rank=2, last=1))
    model.train()
    assert frozen_prefix(model.trunk)[0] == ["0", "1", "2", "3", "4", "5"]
    before = model.trunk.stages["1"].inner.running_mean.clone()
    adapters.train(model)
    assert torch.equal(model.trunk.stages["1"].inner.running_mean, before)


def test_changed_code_is_told_apart() -> None:
    """Weights, settings and files may be the same where a notebook has redefined a class."""

    def made(then: Callable[[Tensor], Tensor]) -> Any:
        torch.manual_seed(0)
        return wrap(Bad(then), ModuleSpec("mine", 16)).stages["module"]

    assert made(torch.relu).fingerprint == made(torch.relu).fingerprint != made(torch.tanh).fingerprint


# ---- by name ----


def settings_for(data: Path, **model: Any) -> Any:
    return parse_experiment(
        {
            "data": str(data),
            "model": {"name": "my-net", **model},
            "adapter": {"kind": "lora", "rank": 2, "where": ["conv", "attention"]},
            "train": {"epochs": 1, "batch_size": 4, "lr": 0.003},
            "evaluate": {"draws": 20, "block": 400},
        }
    )


def make(width: int = 16) -> nn.Module:
    torch.manual_seed(5)
    return network(width, drops=True)


NAMED = ModuleSpec("my-net", 16, 16, drops=1, weights="made up", licence="CC0", citation="me")


def test_the_whole_way(coverage: Dataset, tmp_path: Path, registered: Callable[..., None]) -> None:
    registered("my-net", make, NAMED)
    experiment = settings_for(coverage.folder)
    assert plan_run(experiment, tmp_path / "run").problems == []
    assert label_of(experiment) == "LoRA r=2 (conv, attention)"
    fit_run(experiment, tmp_path / "run")
    run = open_run(tmp_path / "run")
    metrics = evaluate_run(tmp_path / "run").metrics
    assert np.isfinite(metrics.query("model == @label_of(@experiment) and track == ''")["value"]).all()
    bed = tmp_path / "regions.bed"
    bed.write_text("".join(f"chr1\t{s}\t{s + 192}\n" for s in (64, 640)))
    assert predict_run(tmp_path / "run", bed, tmp_path / "out.csv")
    # a folder, and from there
    assert export_run(tmp_path / "run", tmp_path / "model", name="mine-2") <= 1e-5
    again = build_pretrained(ModelConfig(str(tmp_path / "model")), run.dataset.info)
    assert again is not None
    assert again.trunk.spec.licence == "CC0"
    rows = run.dataset.rows("test")
    difference = predict(again, run.dataset, rows) - predict(run.model, run.dataset, rows)
    assert np.abs(difference).max() <= 1e-4
    # only where the name is registered
    del TRUNKS["my-net"]
    with pytest.raises(ModelError, match="register a module of your own first"):
        build_pretrained(ModelConfig(str(tmp_path / "model")), run.dataset.info)
    with pytest.raises(ConfigError, match="no such model"):
        open_run(tmp_path / "run")


def test_files_run_nothing(coverage: Dataset, tmp_path: Path, registered: Callable[..., None]) -> None:
    """A name in YAML is looked up and never imported, whatever it looks like."""
    (tmp_path / "evil.py").write_text("open('touched', 'w')\n")
    config = tmp_path / "e.yaml"
    config.write_text(f"data: {coverage.folder}\nmodel: {{name: 'evil:make'}}\nadapter: {{kind: linear_probe}}\n")
    command = [sys.executable, "-m", "seqgraft", "plan", "e.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "no such model" in done.stderr
    assert not (tmp_path / "touched").exists()


def test_labels_of_any_length(tmp_path: Path, registered: Callable[..., None]) -> None:
    registered("my-net", make, NAMED)
    labels = tiny_labels(tmp_path / "labels")
    experiment = settings_for(labels.folder)
    fit_run(experiment, tmp_path / "run")
    assert np.isfinite(evaluate_run(tmp_path / "run").metrics.query("model == 'majority'")["value"]).any()


def test_random_weights_are_drawn_by_the_modules(coverage: Dataset, registered: Callable[..., None]) -> None:
    registered("my-net", make, NAMED)

    def trunk(**config: Any) -> Trunk:
        torch.manual_seed(1)
        return build_model(ModelConfig("my-net", **config), coverage.tracks, coverage.info).trunk

    plain, random = trunk(), trunk(init="random")
    assert (plain.spec.weights, random.spec.weights) == ("made up", None)
    assert weight_hash(plain) == weight_hash(trunk()) != weight_hash(random) == weight_hash(trunk(init="random"))
    assert float(random.stages["1"].inner.running_mean.abs().max()) == 0.0
    assert not is_random(ModelConfig("my-net"))
    assert is_random(ModelConfig("my-net", init="random"))
    assert label_of(settings_for(Path("x"), init="random")).endswith("on random weights")
    registered("my-net", make, ModuleSpec("my-net", 16, 16, drops=1))
    assert is_random(ModelConfig("my-net"))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(ModelError, match=r"cannot draw new weights: 'stages\.module\.inner'"):
        redraw(wrap(Own(), ModuleSpec("own", 4)))


def test_settings_and_names(coverage: Dataset, tmp_path: Path, registered: Callable[..., None]) -> None:
    registered("my-net", make, NAMED)
    with pytest.raises(ConfigError, match="width has a value of another kind"):
        ModelConfig("my-net", settings={"width": "wide"})
    with pytest.raises(ConfigError, match="does not take these settings"):
        build_model(ModelConfig("my-net", settings={"deep": 2}), coverage.tracks, coverage.info)
    with pytest.raises(ModelError, match="gives 32 channels"):
        build_model(ModelConfig("my-net", settings={"width": 32}), coverage.tracks, coverage.info)
    for name in ("convnet", "yeast-mini"):
        with pytest.raises(ModelError, match="belongs to a model of the package"):
            registered(name, make, NAMED)
    with pytest.raises(ModelError, match="without a default"):
        registered("other", lambda *, width: make(width), NAMED)
    with pytest.raises(ModelError, match="gives 16 channels"):
        registered("other", make, ModuleSpec("other", 8, 16, drops=1))
    assert "other" not in TRUNKS
    registered("my-net", lambda: nn.Sequential(network(), _Trim(3)), ModuleSpec("my-net", 16, 16, drops=3))
    with pytest.raises(ModelError, match="drops 3 bins at each end, and the data leave: 2"):
        build_model(ModelConfig("my-net"), coverage.tracks, coverage.info)
    model = SequenceModel(small(), {"new_a": Head(_one(), 16)}, _one())
    with pytest.raises(ModelError, match="Only a registered trunk"):
        save_model(
            model, tmp_path / "m", name="m", info=coverage.info, licence="", citation="", trained_on=None, card=""
        )


class _Trim(nn.Module):
    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.bins : -self.bins]


# ---- the guide ----


def test_the_guide_runs(tmp_path: Path) -> None:
    found = [block for block in blocks(GUIDE.read_text()) if block.language]
    assert found
    assert all(block.marker == "run" or block.marker.startswith("not run: ") for block in found)
    code = "\n".join(block.code for block in found if block.marker == "run")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
