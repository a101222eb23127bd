"""Enformer answers what the published network answers, in its window and in others; its weights are read strictly.

``data/enformer_parity.npz`` holds the answers of enformer-pytorch 0.8.11, and the script beside it made them.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from builders import tiny_enformer
from seqgraft.errors import ConfigError, ModelError, SeqgraftError
from seqgraft.models import enformer
from seqgraft.models.base import SequenceModel, State, apply_link, one_hot
from seqgraft.models.enformer import Enformer
from seqgraft.models.folders import convert_published, find_model
from seqgraft.models.hub_enformer import PUBLISHED, load_enformer
from seqgraft.models.huggingface import Loaded, find_folder
from seqgraft.models.weights import ModelConfig, build_pretrained
from seqgraft.tracks import TrackTable

DATA = Path(__file__).parent / "data"
_spec = importlib.util.spec_from_file_location("make_enformer_parity", DATA / "make_enformer_parity.py")
assert _spec is not None
assert _spec.loader is not None
RECIPE = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(RECIPE)
PARITY = np.load(DATA / "enformer_parity.npz", allow_pickle=False)

CONFIG = {
    "model_type": "enformer",
    "attn_dim_key": 64,
    "dropout_rate": 0.4,
    "attn_dropout": 0.05,
    "pos_dropout": 0.01,
    "num_downsamples": 7,
    "use_checkpointing": False,
}


def tensors_of(case: str) -> dict[str, Tensor]:
    shapes = json.loads(str(PARITY[f"{case}/shapes"]))
    return {name: torch.from_numpy(RECIPE.weights(name, tuple(shape))) for name, shape in shapes.items()}


def hub_folder(folder: Path, case: str = "small", *, binary: bool = False, **changes: object) -> Path:
    """A folder as the hub has it, with the weights of a parity case."""
    folder.mkdir()
    config = CONFIG | json.loads(str(PARITY[f"{case}/config"])) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if binary:
        torch.save(tensors_of(case), folder / "pytorch_model.bin")
    else:
        save_file(tensors_of(case), folder / "model.safetensors")
    return folder


def loaded(tmp_path: Path, case: str = "small") -> tuple[Loaded, Tensor]:
    """The model of a parity case, and its sequences."""
    _, window, _ = RECIPE.CASES[case]
    folder = hub_folder(tmp_path / case, case)
    found = load_enformer(folder, tensorflow_gamma=case == "published", positions=window // 128)
    return found, torch.from_numpy(RECIPE.sequence(window))


def difference(found: Tensor, expected: np.ndarray | Tensor) -> float:
    """The largest difference, as a fraction of the largest expected value."""
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# ---- the published network ----


@torch.no_grad()
@pytest.mark.parametrize("case", RECIPE.CASES)
def test_features_and_heads_are_those_of_enformer_pytorch(case: str, tmp_path: Path) -> None:
    model, codes = loaded(tmp_path, case)
    state = model.trunk(codes)
    every = RECIPE.CASES[case][2]
    assert state.x.shape[-1] == model.bins == json.loads(str(PARITY[f"{case}/config"]))["target_length"]
    assert difference(state.x.transpose(1, 2)[:, ::every], PARITY[f"{case}/embedding"]) <= 1e-5
    for name, head in model.heads.items():
        values = apply_link(head(state, SimpleNamespace(covariates={})), "softplus")
        assert difference(values.transpose(1, 2)[:, ::every], PARITY[f"{case}/{name}"]) <= 1e-5


def test_gradients_are_those_of_enformer_pytorch(tmp_path: Path) -> None:
    model, codes = loaded(tmp_path)
    trunk = model.trunk.double()  # as the peer's were computed: in float32 the sums over softmax gradients cancel
    x = trunk.run(State(one_hot(codes).double())).x.transpose(1, 2)
    (x * torch.from_numpy(RECIPE.direction(tuple(x.shape)))).sum().backward()
    ours = {theirs: name for name, theirs in model.report.matched.items()}
    parameters = dict(trunk.named_parameters())
    for name in RECIPE.GRADIENTS:
        expected = PARITY[f"small/gradient/{name}"]
        gradient = parameters[ours[name].removeprefix("trunk.")].grad
        assert gradient is not None
        assert difference(gradient.reshape(expected.shape), expected) <= 1e-5, name


def test_the_published_size() -> None:
    """251.2 million parameters with heads for human and mouse, 229.8 without; the peer's count to the last one."""
    with torch.device("meta"):
        trunk = Enformer(crop=320)
        state = trunk.eval().run(State(torch.empty(1, 4, 196_608)))
    count = sum(p.numel() for p in trunk.parameters())
    assert count == PARITY["parameters"][0] == 229_845_504
    heads = (5313 + 1643) * (trunk.spec.channels + 1)
    assert heads == PARITY["parameters"][1]
    assert count + heads == 251_221_292
    assert state.x.shape == (1, 3072, 896)
    assert [stage.conv.out_channels for name, stage in trunk.stages.items() if "tower" in name] == [
        *(768, 896, 1024, 1152, 1280, 1536)
    ]
    assert len(trunk.spec.sites["attention.query"]) == 11
    assert len(trunk.spec.sites["conv"]) == 15
    assert len(trunk.spec.sites["norm"]) == 2 * 11 + 14


# ---- the slow, obvious reference ----


def slow_pool(x: Tensor, weight: Tensor) -> Tensor:
    """Softmax over the one or two positions of each pair, channel by channel."""
    pooled = []
    for start in range(0, x.shape[-1], 2):
        pair = x[..., start : start + 2]
        logits = torch.einsum("dc,bcp->bdp", weight, pair)
        pooled.append((pair * logits.softmax(-1)).sum(-1))
    return torch.stack(pooled, -1)


def slow_features(distance: int, count: int, scale: int, per_position: bool) -> list[float]:
    """The features of one distance, from their definitions."""
    near = abs(distance)
    halves = [2 ** (3 + i * (math.log2(scale) - 3) / (count - 1)) for i in range(count)]
    values = [0.5 ** (near / half) for half in halves] + [float(2**k - 1 > near) for k in range(1, count + 1)]

    def density(x: int, mean: float) -> float:
        deviation = scale / (2 * count)
        shape, rate = (mean / deviation) ** 2, mean / deviation**2
        if x == 0:
            return 1e-8
        return math.exp((shape - 1) * math.log(x) - rate * x - math.lgamma(shape) + shape * math.log(rate)) + 1e-8

    means = [scale / count + i * (scale - scale / count) / (count - 1) for i in range(count)]
    if per_position:
        largest = [max(density(near, mean) for mean in means)] * count
    else:
        largest = [max(density(x, mean) for x in range(scale)) for mean in means]
    values += [density(near, mean) / top for mean, top in zip(means, largest, strict=True)]
    sign = (distance > 0) - (distance < 0)
    return [*values, *(sign * value for value in values)]


def slow_attention(block: nn.Module, x: Tensor, scale: int, per_position: bool) -> Tensor:
    """Query by query, key by key."""
    n, heads = x.shape[1], block.heads
    q, k, v = (layer(x).unflatten(-1, (heads, -1)) for layer in (block.query, block.key, block.value))
    q = q / math.sqrt(q.shape[-1])
    count = block.position.in_features // 6
    table = {d: slow_features(d, count, scale, per_position) for d in range(1 - n, n)}
    out = torch.empty_like(v)
    for i in range(n):
        scores = torch.empty(len(x), heads, n)
        for j in range(n):
            relative = block.position(torch.tensor(table[j - i])).unflatten(-1, (heads, -1))
            content = (q[:, i] + block.content_bias[:, 0]) * k[:, j]
            scores[..., j] = (content + (q[:, i] + block.position_bias[:, 0]) * relative).sum(-1)
        out[:, i] = torch.einsum("bhj,bjhc->bhc", scores.softmax(-1), v)
    return block.output(out.flatten(-2))


def slow_norm(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    per_channel = (t[:, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    mean, variance, weight, bias = per_channel
    x = (x - mean) / (variance + 1e-5).sqrt() * weight + bias
    return x / (1 + torch.exp(-1.702 * x))


def slow_trunk(trunk: Enformer, codes: Tensor, scale: int, per_position: bool = False) -> Tensor:
    """The network as the paper draws it, for a whole number of bins."""
    x = one_hot(codes)
    crop = 0
    for name, stage in trunk.stages.items():
        kind = name.partition("_")[0]
        if kind == "crop":
            crop = stage.bins
        elif kind == "final":
            x = x[..., crop : x.shape[-1] - crop]
            x = stage.conv(slow_norm(stage.norm, x))
            x = x / (1 + torch.exp(-1.702 * x))
        elif kind == "transformer":
            y = x.transpose(1, 2)
            y = y + slow_attention(stage, stage.attention_norm(y), scale, per_position)
            y = y + stage.down(stage.up(stage.feedforward_norm(y)).clamp(min=0))
            x = y.transpose(1, 2)
        else:
            x = stage.conv(x if kind == "stem" else slow_norm(stage.norm, x))
            x = x + stage.mix(slow_norm(stage.mix_norm, x))
            x = slow_pool(x, stage.pool.logits.weight[..., 0])
    return x


@torch.no_grad()
@pytest.mark.parametrize("bins", [7, 24])
@pytest.mark.parametrize(("positions", "per_position"), [(16, False), (16, True), (0, False)])
def test_other_windows_are_those_of_the_slow_reference(bins: int, positions: int, per_position: bool) -> None:
    """Shorter and longer than the 16 positions that the features are scaled to."""
    trunk = tiny_enformer(5, depth=2, positions=positions, gamma_per_position=per_position).eval()
    codes = torch.randint(0, 5, (2, bins * 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(bins))
    expected = slow_trunk(trunk, codes, positions or bins, per_position)
    assert difference(trunk(codes).x, expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 5, 8, 31])
def test_pooling_is_the_softmax_over_pairs_and_padding_has_no_weight(n: int) -> None:
    torch.manual_seed(n)
    pool = enformer._Pool(6)
    nn.init.normal_(pool.logits.weight)
    x = 3 * torch.randn(2, 6, n)
    expected = slow_pool(x, pool.logits.weight[..., 0])
    plain, valid = pool(x, None)
    assert valid is None
    assert torch.allclose(plain, expected, atol=1e-5)
    for left, right in ((0, 1), (0, 4), (2, 3), (1, 0)):
        inside = nn.functional.pad(torch.ones(2, n, dtype=torch.bool), (left, right))
        padded, valid = pool(nn.functional.pad(x, (left, right), value=7.0), inside)
        assert valid is not None
        if left % 2:  # the pairs are others, and the first position stands alone
            assert torch.allclose(padded[..., 0], x[..., 0])
            continue
        here = slice(left // 2, left // 2 + expected.shape[-1])
        assert torch.allclose(padded[..., here], expected, atol=1e-5)
        assert valid[0].nonzero()[:, 0].tolist() == list(range(here.start, here.stop))
        assert not padded.masked_fill(valid[:, None], 0).any()


@torch.no_grad()
def test_attention_of_one_position_and_of_a_padded_batch() -> None:
    block = tiny_enformer(6).eval().stages["transformer_0"]
    for n in (1, 2, 9):
        x = torch.randn(1, n, 24, generator=torch.Generator().manual_seed(n))
        expected = slow_attention(block, x, 16, False)
        assert torch.allclose(block._attend(x, None), expected, atol=1e-5)
        padded = nn.functional.pad(x, (0, 0, 0, 3), value=5.0)
        inside = torch.arange(n + 3)[None] < n
        assert torch.allclose(block._attend(padded, inside)[:, :n], expected, atol=1e-5)


@pytest.mark.parametrize("per_position", [False, True])
def test_features_are_functions_of_the_distance_alone(per_position: bool) -> None:
    like = torch.zeros(())
    long, short, exact = (enformer._Positions(192, 1536, per_position)(n, like) for n in (1700, 40, 1536))
    assert torch.equal(long[1700 - 40 : 1700 + 39], short)
    assert torch.equal(long[1700 - 1536 : 1700 + 1535], exact)
    assert short.shape == (79, 192)
    assert torch.isfinite(long).all()
    window = enformer._Positions(24, 0, per_position)(40, like)
    assert torch.equal(window, enformer._Positions(24, 40, per_position)(40, like))
    for distance in (-39, -1, 0, 7):
        expected = torch.tensor(slow_features(distance, 4, 40, per_position))
        assert torch.allclose(window[distance + 39], expected, atol=1e-4)


def test_features_are_computed_once_per_length() -> None:
    """Not in every block of every forward pass; and what inference computed can be trained on."""
    enformer._features.cache_clear()
    trunk = tiny_enformer(7, depth=3)
    codes = torch.zeros(1, 160, dtype=torch.uint8)
    with torch.inference_mode():
        trunk.eval()(codes)
    trunk.train()(codes).x.sum().backward()
    assert enformer._features.cache_info().misses == 1
    assert trunk.stages["transformer_2"].position.weight.grad is not None


def test_dropout_is_for_training() -> None:
    trunk = tiny_enformer(8, dropout=0.5, attention_dropout=0.5, position_dropout=0.5)
    codes = torch.randint(0, 4, (1, 256), dtype=torch.uint8)
    assert not torch.equal(trunk.train()(codes).x, trunk(codes).x)
    assert torch.equal(trunk.eval()(codes).x, trunk(codes).x)


@torch.no_grad()
def test_bf16() -> None:
    trunk = tiny_enformer(9, depth=2).eval()
    codes = torch.randint(0, 4, (2, 256), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        half = trunk(codes).x
    assert difference(half.float(), trunk(codes).x) < 0.05


@pytest.mark.parametrize(
    "settings",
    [{"bin_size": 12}, {"bin_size": 2}, {"channels": 26}, {"heads": 3}, {"heads": 0}, {"divisible_by": 5}],
)
def test_trunks_that_cannot_be(settings: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="enformer"):
        tiny_enformer(**settings)


def test_two_poolings_make_bins_of_4() -> None:
    assert tiny_enformer(bin_size=4, crop=0)(torch.zeros(1, 20, dtype=torch.uint8)).x.shape == (1, 48, 5)


# ---- weights ----


def test_the_report_accounts_for_every_tensor(tmp_path: Path) -> None:
    model, _ = loaded(tmp_path)
    assert sorted(model.report.matched.values()) == sorted(tensors_of("small"))
    assert set(model.report.matched) == {
        *(f"trunk.{name}" for name in model.trunk.state_dict()),
        *(f"heads.{head}.{name}" for head, module in model.heads.items() for name in module.state_dict()),
    }
    assert model.report.left == ()
    assert len(model.report.sha256) == 64
    assert str(model.report).endswith("model.safetensors: 143 tensors matched, 0 new, 0 left")
    assert not any(tensor.is_meta for tensor in (*model.trunk.state_dict().values(), *model.trunk.parameters()))
    assert all(p.requires_grad for p in model.trunk.parameters())


@torch.no_grad()
def test_a_pickled_file_and_second_names_give_the_same(tmp_path: Path) -> None:
    model, codes = loaded(tmp_path)
    expected = model.trunk(codes).x
    binary = hub_folder(tmp_path / "binary", binary=True, use_tf_gamma=False)
    assert torch.equal(load_enformer(binary, positions=32).trunk(codes).x, expected)
    second = {
        first: name
        for name, first in (("_trunk.1.", "stem."), ("_trunk.2.", "conv_tower."), ("_trunk.4.", "transformer."))
    }
    tensors = tensors_of("small")
    renamed = {
        next((second[first] + name.removeprefix(first) for first in second if name.startswith(first)), name): value
        for name, value in tensors.items()
    }
    assert sum(name.startswith("_trunk") for name in renamed) > 100
    (binary / "pytorch_model.bin").unlink()
    save_file(renamed, binary / "model.safetensors")
    again = load_enformer(binary, positions=32)
    assert torch.equal(again.trunk(codes).x, expected)
    assert again.report.left == ()
    save_file(renamed | {name: value.clone() for name, value in tensors.items()}, binary / "model.safetensors")
    both = load_enformer(binary, positions=32)
    assert len(both.report.left) == sum(name.startswith("_trunk") for name in renamed)
    save_file(renamed | {name: value + 1 for name, value in tensors.items()}, binary / "model.safetensors")
    with pytest.raises(ModelError, match="should be the same differ"):
        load_enformer(binary, positions=32)


@torch.no_grad()
def test_converted_weights_are_a_model_folder(tmp_path: Path) -> None:
    model, codes = loaded(tmp_path)
    convert_published(model, tmp_path / "folder", name="tiny-enformer", licence="CC-BY-4.0", source="here")
    pretrained = find_model(str(tmp_path / "folder"))
    assert pretrained is not None
    content = pretrained.content
    assert (content["architecture"], content["window"], content["bins"], content["bin_size"]) == (
        *("enformer", 4096, 24, 128),
    )
    assert content["converted_from"]["sha256"] == model.report.sha256
    assert content["heads"] == {"human": ["human_0", "human_1", "human_2"], "mouse": ["mouse_0", "mouse_1"]}
    assert "CC-BY-4.0" in (tmp_path / "folder" / "card.md").read_text()
    info = SimpleNamespace(window=4096, bins=24, bin_size=128)
    again = build_pretrained(ModelConfig(name=str(tmp_path / "folder")), info)  # type: ignore[arg-type]
    assert isinstance(again, SequenceModel)
    assert torch.equal(again.trunk(codes).x, model.trunk(codes).x)
    assert again.trunk.settings == model.trunk.settings
    assert torch.equal(again.heads["pretrained_mouse"].out.weight, model.heads["mouse"].out.weight)
    wide = SimpleNamespace(window=8192, bins=40, bin_size=128)
    other = build_pretrained(ModelConfig(name=str(tmp_path / "folder")), wide)  # type: ignore[arg-type]
    assert other is not None
    assert other.trunk(torch.zeros(1, 8192, dtype=torch.uint8)).x.shape[-1] == 40


def test_heads_take_the_users_tracks(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", use_tf_gamma=False)
    tables = {
        name: TrackTable.build([{"name": f"{name}-{i}", "group": name, "link": "softplus"} for i in range(count)])
        for name, count in RECIPE.HEADS.items()
    }
    model = load_enformer(folder, positions=32, tracks=tables)
    assert model.heads["mouse"].tracks.names == ["mouse-0", "mouse-1"]
    with pytest.raises(ModelError, match=r"tracks: the heads .*{'human': 3, 'mouse': 2}.*{'human': 2}"):
        load_enformer(folder, positions=32, tracks={"human": tables["mouse"]})


def _drop(folder: Path) -> None:
    tensors = tensors_of("small")
    del tensors["transformer.0.0.fn.1.to_q.weight"], tensors["_heads.mouse.0.bias"]
    tensors["surplus"] = torch.zeros(1)
    tensors["final_pointwise.1.2.bias"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")


def _truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        if name.endswith(".bin"):
            (folder / "model.safetensors").unlink()
            torch.save(tensors_of("small"), folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return damage


def _code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"stem.0.weight": Path("/")}, folder / "pytorch_model.bin")


def _no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": {"stem.0.weight": torch.zeros(1)}}, folder / "pytorch_model.bin")


def _config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensors": (
        _drop,
        r"(?s)missing.*mouse.0.bias.*to_q.weight.*unexpected.*surplus.*misshapen.*2.bias: \(3,\) instead",
    ),
    "truncated safetensors": (_truncate("model.safetensors"), "cannot be read.*truncated"),
    "truncated pickle": (_truncate("pytorch_model.bin"), "cannot be read.*truncated"),
    "code": (_code, "more than tensors, which could run code.*pathlib"),
    "nested": (_no_tensors, "no table of tensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "weights are missing"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "description of the model is missing"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "another model": (_config(model_type="borzoi"), "another model: 'borzoi'"),
    "an entry short": (_config(attn_dim_key=None), "lacks entries.*attn_dim_key"),
    "words": (_config(depth="two", output_heads=[1]), "not whole numbers.*depth.*output_heads"),
    "convnext": (_config(use_convnext=True), "ConvNeXt"),
    "another size": (_config(depth=3), "missing.*transformer.2"),
    "gamma unsaid": (_config(use_tf_gamma=None), 'does not say which gamma.*"use_tf_gamma": true.*tensorflow_gamma'),
    "crop": (_config(target_length=33), "cropped evenly to: 33"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", use_tf_gamma=False)
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelError, match=message):
        load_enformer(folder, positions=32)


@pytest.mark.parametrize(
    ("source", "revision", "error", "message"),
    [
        ("nowhere", None, ModelError, "no such folder"),
        ("../some/where", None, ModelError, "no such folder"),
        (PUBLISHED, None, ConfigError, "needs the commit"),
        (PUBLISHED, "main", ConfigError, "needs the commit.*'main'"),
        (PUBLISHED, "a" * 40, ModelError, "cannot be downloaded"),
    ],
)
def test_sources_that_cannot_be_found(
    source: str, revision: str | None, error: type[SeqgraftError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        find_folder(source, revision)


def test_a_hub_id_is_a_snapshot_of_that_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published name needs no word on gamma features, and only the files that are read are fetched."""
    import huggingface_hub

    folder = hub_folder(tmp_path / "hub")
    asked: list[dict[str, object]] = []

    def snapshot(name: str, **arguments: object) -> str:
        asked.append({"name": name, **arguments})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = load_enformer(PUBLISHED, revision="a" * 40, positions=32)
    assert model.trunk.settings["gamma_per_position"] is False
    pinned = {"name": PUBLISHED, "revision": "a" * 40}
    assert asked == [{**pinned, "allow_patterns": ["config.json", "model.safetensors"]}]
    (folder / "model.safetensors").unlink()
    assert find_folder(PUBLISHED, "a" * 40) == folder
    assert asked[-1] == {**pinned, "allow_patterns": ["config.json", "pytorch_model.bin"]}
