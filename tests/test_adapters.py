"""The contract of every registered adapter: identity, only its tensors train, merge and reload change nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from seqgraft.adapters import (
    ADAPTERS,
    IA3,
    Adapter,
    FullFineTune,
    Houlsby,
    LinearProbe,
    LoRA,
    Peft,
    Prompt,
    adapt,
    check_gradients,
    load_adapter,
    merge,
    parameter_groups,
    read_adapter,
    save_adapter,
)
from seqgraft.adapters.base import check_frozen
from seqgraft.errors import ConfigError, ModelError
from seqgraft.models.base import Head, SequenceModel, trainable_state, weight_hash
from seqgraft.models.convnet import ConvNet
from seqgraft.sample import Sample
from seqgraft.tracks import TrackTable

CHANNELS = 32
EVERYWHERE = ("attention", "feedforward", "conv")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

VARIANTS: dict[str, Adapter] = {
    "linear probe": LinearProbe(),
    "full": FullFineTune(),
    "full, moving statistics": FullFineTune(statistics="batch"),
    "lora": LoRA(),
    "lora everywhere": LoRA(rank=4, alpha=3.0, where=EVERYWHERE, rslora=True),
    "lora q v": LoRA(where=("attention.query", "attention.value")),
    "locon": LoRA(rank=4, alpha=1, where=("conv",), last=2),
    "lora dropout": LoRA(where=("attention", "conv"), dropout=0.2),
    "dora": LoRA(dora=True),
    "dora everywhere": LoRA(rank=4, dora=True, where=EVERYWHERE),
    "dora dropout": LoRA(dora=True, where=("attention", "conv"), dropout=0.2),
    "qlora nf4": LoRA(quantize="nf4"),
    "qlora int8": LoRA(quantize="int8"),
    "qdora nf4": LoRA(quantize="nf4", dora=True),
    "ia3": IA3(),
    "ia3 conv": IA3(where=EVERYWHERE),
    "ia3 conv alone": IA3(where=("conv",)),
    "ia3 queries": IA3(where=("attention.query", "feedforward.up")),
    "houlsby": Houlsby(),
    "houlsby without norms": Houlsby(bottleneck=4, norms=False),
    "houlsby squeeze-excite": Houlsby(squeeze_excite=8, last=3),
    "vera": Peft(),
    "loha": Peft(type="loha", where=("attention", "conv")),
    "lokr": Peft(type="lokr", where=("conv",)),
    "oft": Peft(type="oft", settings={"oft_block_size": 4}),
    "norms": Peft(type="ln_tuning", where=("norm",)),
}
# Those that divide by a norm, or solve for a rotation, round once.
ROUNDS = {"dora", "dora everywhere", "dora dropout", "qdora nf4", "oft"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:Merge lora module"),
]


def build(seed: int = 0, *, extended: bool = False) -> SequenceModel:
    """A small trunk whose BatchNorm statistics are not those of an untrained one, and heads for two groups."""
    torch.manual_seed(seed)
    trunk = ConvNet(channels=CHANNELS, depth=2, blocks=2, bin_size=8, crop=1)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    rna = TrackTable.build([{"name": "rna+", "group": "rna"}, {"name": "rna-", "group": "rna"}])
    mark = TrackTable.build([{"name": "mark", "group": "mark", "clip": 30.0}])
    heads = {"new_rna": Head(rna, CHANNELS), "new_mark": Head(mark, CHANNELS)}
    tracks = rna.concat(mark)
    if extended:
        old = TrackTable.build([{"name": "old", "group": "old"}])
        heads["pretrained_old"] = Head(old, CHANNELS)
        tracks = tracks.concat(old)
    return SequenceModel(trunk, heads, tracks)


def batch(seed: int = 1, size: int = 3, length: int = 128, tracks: int = 3) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand((size, tracks, length // 8 - 2), generator=generator)
    return Sample(
        codes=torch.randint(0, 4, (size, length), dtype=torch.uint8, generator=generator),
        lengths=torch.full((size,), length),
        row=torch.arange(size),
        targets=targets,
        mask=torch.ones_like(targets, dtype=torch.bool),
    )


def train(model: SequenceModel, steps: int = 4, lr: float = 1e-2) -> None:
    """A few real steps in training mode, with the check that the loop makes."""
    torch.manual_seed(7)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    alive: set[str] = set()
    for step in range(steps):
        sample = batch(seed=step)
        loss = (model.predict(sample)[:, :3] - sample.targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        alive = check_gradients(model, alive, last=step == steps - 1)
        optimizer.step()


@torch.no_grad()
def outputs(model: SequenceModel) -> Tensor:
    model.eval()
    values: Tensor = model(batch(seed=99))
    return values


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


@pytest.fixture(
    params=[pytest.param(name, marks=needs_bitsandbytes if name.startswith("q") else ()) for name in VARIANTS]
)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def trained(variant: str) -> SequenceModel:
    model = build()
    adapt(model, VARIANTS[variant])
    train(model)
    return model


def test_every_adapter_is_tried() -> None:
    tried = {type(adapter) for adapter in VARIANTS.values()}
    assert tried | {Prompt} == set(ADAPTERS.values())  # prompts need tokens: test_automodel.py
    assert all(cls.kind == kind for kind, cls in ADAPTERS.items())


def test_labels_tell_variants_apart() -> None:
    plain = {name: adapter for name, adapter in VARIANTS.items() if not name.endswith("dropout")}
    labels = [adapter.label for adapter in plain.values()]
    assert len(set(labels)) >= len(labels) - 2  # settings that are not in the label, such as norms, alpha
    assert LoRA(where=("conv",), rank=4).label == "LoCon r=4"
    assert LoRA(dora=True).label == "DoRA r=8 (attention)"
    assert LoRA(quantize="nf4").label == "QLoRA nf4 r=8 (attention)"
    assert Houlsby(squeeze_excite=16).label == "Houlsby 8 + squeeze-excite 16"


def test_starts_as_the_identity(variant: str) -> None:
    model = build()
    adapter = VARIANTS[variant]
    before = outputs(model)
    adapt(model, adapter)
    quantised = getattr(adapter, "quantize", None) is not None
    change = float((outputs(model) - before).abs().max() / before.abs().max())
    if variant in ROUNDS:
        assert model.adapted.identity <= 1e-6
        assert quantised or change <= 1e-6
    else:
        assert model.adapted.identity == 0.0
        assert quantised or change == 0.0


def test_only_what_should_train_trains(variant: str) -> None:
    model = build()
    adapt(model, VARIANTS[variant])
    before = tensors(model)
    train(model)
    after = tensors(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(trainable_state(model)) - {n for n in before if "vera_A" in n or "vera_B" in n}
    check_frozen(model)


def test_every_trainable_tensor_moves_and_belongs_to_a_group(trained: SequenceModel) -> None:
    groups = parameter_groups(trained)
    counts = trained.adapted.counts
    for name in ("adapter", "head", "trunk"):
        assert sum(p.numel() for p in groups[name]) == getattr(counts, name)
    assert counts.head == 3 * CHANNELS + 3
    assert counts.trainable == sum(p.numel() for p in trained.parameters() if p.requires_grad)


def test_reload_equals_live(trained: SequenceModel, variant: str, tmp_path: Path) -> None:
    save_adapter(trained, tmp_path / "adapter", {"name": "tiny"}, {"train": ["a"]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    written = load_file(tmp_path / "adapter" / "weights.safetensors")
    assert set(written) == set(trainable_state(trained))
    fresh = build()
    torch.manual_seed(12345)  # other random numbers than when it was made
    counts = load_adapter(fresh, tmp_path / "adapter")
    assert counts == trained.adapted.counts
    assert float((outputs(fresh) - outputs(trained)).abs().max()) == 0.0
    assert not fresh.training
    saved = read_adapter(tmp_path / "adapter")
    assert fresh.adapter == trained.adapter == VARIANTS[variant]
    assert saved.base["name"] == "tiny"
    assert saved.base["trunk"] == weight_hash(build().trunk)
    assert saved.tracks == trained.tracks
    assert saved.folds == {"train": ["a"]}
    # and it can go on training
    train(fresh)


def test_merged_equals_unmerged(trained: SequenceModel, variant: str) -> None:
    adapter = VARIANTS[variant]
    plain = {name: type(module) for name, module in build().named_modules()}
    live = outputs(trained)
    if not adapter.mergeable:
        with pytest.raises(ModelError, match="cannot be merged"):
            merge(trained)
        return
    reported = merge(trained)
    difference = float((outputs(trained) - live).abs().max() / live.abs().max())
    if getattr(adapter, "quantize", None):
        assert 0 < reported < 0.5
        assert difference < 0.5
    else:
        assert reported <= 1e-5
        assert difference <= 1e-5
    assert {name: type(module) for name, module in trained.named_modules()} == plain
    assert set(trained.state_dict()) == set(build().state_dict())
    assert trained.adapter is None
    adapt(trained, LinearProbe())  # a plain model again


def test_padding_changes_nothing(trained: SequenceModel) -> None:
    """The squeeze must not average over padding, nor anything else look at it."""
    sample = batch(length=64)
    padded = Sample(
        codes=nn.functional.pad(sample.codes, (0, 48), value=5),
        lengths=sample.lengths,
        row=sample.row,
        targets=sample.targets,
        mask=sample.mask,
    )
    trained.eval()
    with torch.no_grad():
        alone, together = trained(sample), trained(padded)
    inside = alone.shape[-1]
    assert float((together[..., :inside] - alone).abs().max() / alone.abs().max()) < 1e-5


def test_counts() -> None:
    def count(adapter: Adapter) -> tuple[int, int]:
        counts = adapt(build(), adapter)
        return counts.adapter, counts.trunk

    c, blocks, convs = CHANNELS, 2, 5  # stem, two of the tower, one on the way up, final
    trunk = sum(p.numel() for p in build().trunk.parameters())
    assert count(LinearProbe()) == (0, 0)
    assert count(FullFineTune()) == (0, trunk)
    assert count(LoRA(rank=8)) == (blocks * 4 * 2 * 8 * c, 0)
    assert count(LoRA(rank=8, dora=True)) == (blocks * 4 * (2 * 8 * c + c), 0)
    assert count(LoRA(where=("attention.query", "attention.value"))) == (blocks * 2 * 2 * 8 * c, 0)
    assert count(LoRA(rank=4, where=("conv",), last=1)) == (4 * c + 4 * c, 0)
    assert count(IA3()) == (blocks * (2 * c + 2 * c), 0)
    assert count(IA3(where=("conv",))) == (convs * c, 0)
    bottlenecks = blocks * 2 * (2 * 8 * c + 8 + c)
    assert count(Houlsby()) == (bottlenecks, blocks * 4 * c)
    assert count(Houlsby(norms=False, squeeze_excite=4, last=2)) == (bottlenecks + 2 * 2 * 4 * c, 0)
    assert adapt(build(), LoRA()).total == sum(p.numel() for p in build().parameters()) + blocks * 4 * 2 * 8 * c


def test_the_field_names_scale_the_change() -> None:
    model = build()
    adapt(model, LoRA(rank=8))
    assert model.trunk.stages["transformer_0"].query.scaling["default"] == 2.0
    model = build()
    adapt(model, LoRA(rank=4, alpha=1, where=("conv",)))
    assert model.trunk.stages["final"].conv.scaling["default"] == 0.25


def test_squeeze_excite_makes_its_stages_global() -> None:
    local = {name: stage.local for name, stage in build().trunk.stages.items()}
    model = build()
    adapt(model, LoRA(where=("conv", "attention")))
    assert {name: stage.local for name, stage in model.trunk.stages.items()} == local
    model = build()
    adapt(model, Houlsby(squeeze_excite=4, last=2))
    changed = {name for name, stage in model.trunk.stages.items() if stage.local != local[name]}
    assert changed == {"upsample_0", "final"}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"dilation": 2, "padding": "same"},
        {"dilation": 2, "padding": 4},
        {"padding": 2, "padding_mode": "reflect"},
        {"dilation": 3, "padding": "same", "padding_mode": "circular"},
    ],
)
def test_low_rank_on_dilated_and_otherwise_padded_convolutions(settings: dict[str, object], dora: bool) -> None:
    def other() -> SequenceModel:
        model = build()
        model.trunk.stages["tower_0"].conv = nn.Conv1d(CHANNELS, CHANNELS, 5, **settings)
        return model

    model = other()
    adapt(model, LoRA(where=("conv",), dora=dora))
    train(model)
    live = outputs(model)
    assert merge(model) <= 1e-6
    assert float((outputs(model) - live).abs().max() / live.abs().max()) <= 1e-6


@needs_bitsandbytes
def test_quantised_base_merges_into_full_precision() -> None:
    model = build()
    adapt(model, LoRA(quantize="nf4"))
    query = model.trunk.stages["transformer_0"].query
    assert type(query.base_layer).__name__ == "Linear4bit"
    assert query.base_layer.frozen
    assert type(model.trunk.stages["transformer_0"].up).__name__ == "Linear4bit"
    train(model)
    change = 2 * query.lora_B["default"].weight @ query.lora_A["default"].weight
    merge(model)
    merged = model.trunk.stages["transformer_0"].query.weight
    base = build().trunk.stages["transformer_0"].query.weight
    assert torch.allclose(merged, base + change, atol=1e-6)
    assert torch.equal(model.trunk.stages["transformer_0"].up.weight, build().trunk.stages["transformer_0"].up.weight)


@pytest.mark.parametrize("adapter", [LoRA(where=EVERYWHERE), FullFineTune(), Houlsby()], ids=lambda a: a.kind)
def test_pretrained_heads_stay_beside_the_new_ones(adapter: Adapter) -> None:
    model = build(extended=True)
    before = tensors(model.heads["pretrained_old"])
    counts = adapt(model, adapter)
    train(model)
    after = tensors(model.heads["pretrained_old"])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert counts.head == 3 * CHANNELS + 3
    assert not any("pretrained" in name for name in trainable_state(model))


def test_pretrained_tracks_are_bit_identical_on_a_frozen_trunk() -> None:
    model = build(extended=True)
    before = outputs(model)[:, 3]
    adapt(model, LinearProbe())
    train(model)
    assert torch.equal(outputs(model)[:, 3], before)


def test_statistics_move_only_when_asked() -> None:
    for statistics, moves in (("frozen", False), ("batch", True)):
        model = build()
        before = model.trunk.stages["tower_0"].norm.running_mean.clone()
        adapt(model, FullFineTune(statistics=statistics))  # type: ignore[arg-type]
        train(model)
        assert torch.equal(model.trunk.stages["tower_0"].norm.running_mean, before) is not moves


def test_training_from_scratch_reloads_on_any_base(tmp_path: Path) -> None:
    model = build(seed=1)
    adapt(model, FullFineTune(statistics="batch"))
    train(model)
    save_adapter(model, tmp_path / "a", {"name": "scratch"})
    fresh = build(seed=2)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(outputs(fresh), outputs(model))


def test_importing_adapters_is_light() -> None:
    probe = "import sys, seqgraft.adapters; print({'peft', 'transformers', 'bitsandbytes'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=0), "rank"),
        (lambda: LoRA(dropout=1.0), "dropout"),
        (lambda: LoRA(quantize="int4"), "quantize"),
        (lambda: LoRA(quantize="int8", dora=True), "8-bit"),
        (lambda: FullFineTune(statistics="moving"), "statistics"),
        (lambda: Houlsby(bottleneck=0), "bottleneck"),
        (lambda: Houlsby(last=2), "squeeze_excite"),
        (lambda: Peft(type="lora"), "adapter lora"),
        (lambda: Peft(type="AdaLora"), "training loop"),
    ],
)
def test_bad_settings(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
