"""Trunks keep what their stages claim; model folders are read strictly; heads old and new stand side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from builders import (
    BIN_SIZE,
    BINS,
    BLOCKS,
    FLASHZOI,
    WINDOW,
    settled_borzoi,
    settled_trunk,
    tiny_coverage,
    tiny_enformer,
    tiny_labels,
    tiny_language,
    tiny_llama,
    tiny_pretrained,
)
from seqgraft.adapters import FullFineTune, LinearProbe, LoRA, adapt, load_adapter, save_adapter
from seqgraft.data.dataset import Dataset, DatasetInfo
from seqgraft.errors import ConfigError, ModelError, SeqgraftError
from seqgraft.models.base import Head, Stage, State, Step, Trunk, mean_of_valid, one_hot, weight_hash
from seqgraft.models.convnet import ConvNet
from seqgraft.models.folders import TRUNKS, bundled_models, find_model, save_model
from seqgraft.models.weights import ModelConfig, build_masked, build_model, build_pretrained
from seqgraft.objectives import Elementwise
from seqgraft.sequence import PAD
from seqgraft.tracks import TrackTable
from seqgraft.train import TrainConfig, fit

#: Small instances of every registered trunk, by its name and what is special.
SMALL: dict[str, Callable[[], Trunk]] = {
    "convnet": lambda: settled_trunk(1, channels=16, depth=3, blocks=2),
    "convnet: bins of 4 bp": lambda: settled_trunk(2, channels=16, depth=2, blocks=1, bin_size=4, crop=8),
    "borzoi": lambda: settled_borzoi(1),
    "borzoi: bins of 8 bp, no last convolution": lambda: settled_borzoi(
        2, bin_size=8, crop=4, blocks=2, final=0, upsample_conv=False, gelu="exact"
    ),
    "borzoi: rotary attention": lambda: settled_borzoi(5, **FLASHZOI),
    "enformer": lambda: tiny_enformer(3),
    "enformer: bins of 32 bp": lambda: tiny_enformer(4, bin_size=32, crop=1, depth=2, gamma_per_position=True),
    "language": lambda: tiny_language(6, k=1, before=2),  # of longer k-mers, sequences that are shorter are refused
    "language: blocks": lambda: tiny_language(7, bin_size=32, crop=1, **BLOCKS),
    "transformers": lambda: tiny_llama(8),
}


def test_every_registered_trunk_is_tested() -> None:
    assert {name.partition(":")[0] for name in SMALL} == TRUNKS.keys()


@pytest.fixture(params=sorted(SMALL))
def trunk(request: pytest.FixtureRequest) -> Trunk:
    return SMALL[request.param]().eval()


@pytest.fixture(scope="module")
def coverage(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_coverage(tmp_path_factory.mktemp("coverage") / "data")


def random_codes(size: int = 2, length: int = WINDOW, seed: int = 0) -> Tensor:
    return torch.randint(0, 4, (size, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- stages ----


def states(trunk: Trunk, codes: Tensor) -> list[tuple[str, Stage, State]]:
    """Each stage with the state that enters it."""
    found, state = [], trunk.encode(codes)
    for name, stage in trunk.stages.items():
        assert isinstance(stage, Stage)
        found.append((name, stage, state))
        state = stage(state)
    return found


def parts(state: State) -> dict[str, Tensor]:
    return {"x": state.x, **state.skips}


def changed_span(before: Tensor, after: Tensor) -> tuple[int, int] | None:
    """First and last position (exclusive) that differ by so much as a bit."""
    moved = (before != after).any(0).any(0).nonzero()
    return (int(moved.min()), int(moved.max()) + 1) if len(moved) else None


def clipped(span: tuple[int, int], length: int) -> tuple[int, int]:
    return max(0, span[0]), min(length, span[1])


def repeated(state: State, times: int) -> State:
    """Contiguous copies: other strides would round otherwise."""
    return State(state.x.repeat(times, 1, 1), {name: value.repeat(times, 1, 1) for name, value in state.skips.items()})


def perturbed(state: State, part: str, span: tuple[int, int], draws: int) -> State:
    """The state with one tensor redrawn within the span, ``draws`` different ways along the batch."""
    generator = torch.Generator().manual_seed(draws)
    tensors = parts(repeated(state, draws))
    tensors[part][..., span[0] : span[1]] = 3 * torch.randn(
        tensors[part][..., span[0] : span[1]].shape, generator=generator
    )
    return State(tensors.pop("x"), tensors)


@torch.no_grad()
def test_stages_touch_what_they_say_and_nothing_else(trunk: Trunk) -> None:
    tight = 0
    for name, stage, state in states(trunk, random_codes(1)):
        if not stage.local:
            with pytest.raises(ModelError, match="global"):
                stage.touched({"x": (0, 1)})
            with pytest.raises(ModelError, match="global"):
                stage.needed({"x": (0, 1)})
            continue
        for part, tensor in parts(state).items():
            length = tensor.shape[-1]
            for span in [
                (0, 1),
                (length // 2, length // 2 + 1),
                (5, 8),
                (length - 3, length),
                (length // 3, length // 2),
            ]:
                span = clipped(span, length)
                if span[0] >= span[1]:
                    continue
                claims = stage.touched({part: span})
                inputs = perturbed(state, part, span, draws=8)
                plain = repeated(state, 8)
                before, after = parts(stage(plain)), parts(stage(inputs))
                for output in before:
                    found = changed_span(before[output], after[output])
                    claim = clipped(claims.get(output, (0, 0)), before[output].shape[-1])
                    if claim[0] >= claim[1]:
                        assert found is None, (name, part, span, output)
                        continue
                    assert found is not None, (name, part, span, output)
                    assert claim[0] <= found[0], (name, part, span, output)
                    assert found[1] <= claim[1], (name, part, span, output)
                    assert found == claim, f"{name}: the claim {claim} for {output} is wider than {found}"
                    tight += 1
    only_crops = all(step.kind == "crop" for stage in trunk.stages.values() for step in stage.steps or ())
    assert tight > (3 if only_crops else 20)


@torch.no_grad()
def test_stages_need_what_they_say_and_nothing_else(trunk: Trunk) -> None:
    """Everything outside the needed span is redrawn: the outputs asked for stay. And each end of it matters."""
    for name, stage, state in states(trunk, random_codes(1)):
        if not stage.local:
            continue
        plain = repeated(state, 8)
        before = parts(stage(plain))
        for output, tensor in before.items():
            length = tensor.shape[-1]
            for span in [(0, 2), (length // 2, length // 2 + 1), (length - 1, length), (1, min(length, 6))]:
                needs = stage.needed({output: span})
                for part, value in parts(state).items():
                    whole = value.shape[-1]
                    keep = clipped(needs.get(part, (0, 0)), whole)
                    inputs = parts(perturbed(state, part, (0, whole), draws=8))
                    if keep[0] < keep[1]:
                        inputs[part][..., keep[0] : keep[1]] = value[..., keep[0] : keep[1]]
                    after = parts(stage(State(inputs.pop("x"), inputs)))[output]
                    assert torch.equal(after[..., span[0] : span[1]], tensor[..., span[0] : span[1]]), (name, output)
                    for edge in {keep[0], keep[1] - 1} if keep[0] < keep[1] else ():
                        inputs = parts(perturbed(state, part, (edge, edge + 1), draws=8))
                        after = parts(stage(State(inputs.pop("x"), inputs)))[output]
                        assert changed_span(tensor[..., slice(*span)], after[..., slice(*span)]), (name, output, edge)


def test_steps_are_inverse_where_they_can_be() -> None:
    for step in (Step("conv", 5), Step("pool", 4), Step("up", 2), Step("crop", 3)):
        for start in range(20):
            for stop in range(start + 1, 22):
                low, high = step.touched(step.needed((start, stop)))
                assert low <= start
                assert high >= stop
    assert Step("pool", 4).touched((3, 5)) == (0, 2)
    assert Step("up", 2).needed((3, 4)) == (1, 2)


def test_a_stage_passes_spans_of_skips_that_it_does_not_read(trunk: Trunk) -> None:
    stage = next(s for s in trunk.stages.values() if isinstance(s, Stage) and s.local)
    assert stage.touched({"other": (3, 4)}) == {"other": (3, 4)}
    assert stage.needed({"other": (3, 4)}) == {"other": (3, 4)}


@torch.no_grad()
def test_slices_compose_to_forward(trunk: Trunk) -> None:
    codes = random_codes()
    whole = trunk(codes)
    for name in trunk.stages:
        part = trunk.run(trunk.run(trunk.encode(codes), stop=name), start=name)
        assert torch.equal(part.x, whole.x)
    assert not whole.skips
    assert whole.x.shape == (2, trunk.spec.channels, BINS * BIN_SIZE // trunk.spec.bin_size)


# ---- size, padding, other windows ----


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        ({"channels": 64, "depth": 4, "blocks": 2}, 0.19),
        ({}, 0.43),
        ({"channels": 128, "depth": 5, "blocks": 4}, 1.17),
        ({"channels": 160, "depth": 5, "blocks": 5}, 2.03),
    ],
)
def test_sizes(settings: dict[str, int], millions: float) -> None:
    count = sum(p.numel() for p in ConvNet(**settings).parameters()) / 1e6
    assert 0.19 <= count <= 2.1
    assert count == pytest.approx(millions, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 97, 127, 150])
def test_padding_changes_nothing(trunk: Trunk, length: int) -> None:
    trunk.stages["crop"] = nn.Identity()
    codes = random_codes(1, length)
    alone = trunk(codes, torch.tensor([length]))
    for longer in (length + 1, length + 64, 256):
        batch = torch.cat([nn.functional.pad(codes, (0, longer - length), value=PAD), random_codes(1, longer, seed=3)])
        together = trunk(batch, torch.tensor([length, longer]))
        bins = alone.x.shape[-1]
        valid = torch.ones(bins, dtype=torch.bool) if alone.valid is None else alone.valid[0]
        held = together.valid[0] if together.valid is not None else torch.ones(bins, dtype=torch.bool)
        assert int(held.sum()) == int(valid.sum()) >= math.ceil(length / trunk.spec.bin_size)
        difference = (together.x[0, :, :bins] - alone.x[0])[:, valid].abs().max()
        assert float(difference) <= 1e-5
        assert torch.allclose(mean_of_valid(together)[0], mean_of_valid(alone)[0], atol=1e-5)
        assert torch.equal(trunk(batch).x, together.x), "lengths follow from PAD"


@torch.no_grad()
def test_only_padding_at_the_right_end_is_ignored_but_unknown_bases_are_seen(trunk: Trunk) -> None:
    codes = random_codes(1)
    unknown = codes.clone()
    unknown[:, 200:] = 4
    assert torch.equal(one_hot(torch.tensor([[4, PAD]], dtype=torch.uint8)), torch.zeros(1, 4, 2))
    assert one_hot(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8))[0].equal(torch.eye(4))
    assert one_hot(torch.tensor([[6]], dtype=torch.uint8)).flatten().tolist() == [0.5, 0.5, 0, 0]
    assert not torch.equal(trunk(unknown).x, trunk(codes).x)
    assert trunk.encode(unknown).valid is None


@torch.no_grad()
@pytest.mark.parametrize("bases", [32, 64, 160])
def test_what_is_seen_depends_on_relative_positions_only(trunk: Trunk, bases: int) -> None:
    """The same sequence further right in a longer window, with padding around it, gives the same features there."""
    trunk.stages["crop"] = nn.Identity()
    state = trunk.encode(random_codes(2, 256))
    inside = torch.zeros(2, 256 + 2 * bases, dtype=torch.bool)
    inside[:, bases : bases + 256] = True
    shifted = trunk.run(State(nn.functional.pad(state.x, (bases, bases)), valid=inside))
    bins, here = bases // trunk.spec.bin_size, 256 // trunk.spec.bin_size
    assert torch.allclose(shifted.x[..., bins : bins + here], trunk.run(state).x, atol=1e-5)


@torch.no_grad()
def test_attention_is_the_formula() -> None:
    """softmax((q k + q r(j - i)) / sqrt(width)) v, written out pair by pair, for two lengths."""
    trunk = settled_trunk(2, channels=32)
    block = trunk.stages["transformer_0"]
    for n in (1, 5, 300):
        x = torch.randn(1, n, 32, generator=torch.Generator().manual_seed(n))
        q, k, v = (layer(x)[0].view(n, 2, 16) for layer in (block.query, block.key, block.value))
        distance = torch.arange(n)[None] - torch.arange(n)[:, None]
        widths = 2 ** torch.arange(8)
        within = (distance.abs()[..., None] < widths).float()
        features = torch.cat([within, within * distance.sign()[..., None]], -1)
        relative = block.position(features).view(n, n, 2, 16)
        scores = (torch.einsum("ihc,jhc->hij", q, k) + torch.einsum("ihc,ijhc->hij", q, relative)) / 4
        expected = block.output(torch.einsum("hij,jhc->ihc", scores.softmax(-1), v).reshape(n, 32))
        assert torch.allclose(block._attend(x, None)[0], expected, atol=1e-5)


def test_checkpointing_changes_no_gradient_and_no_statistic() -> None:
    """Also in training mode, where BatchNorm must count the recomputed batch once."""
    results = []
    for on in (False, True):
        trunk = settled_trunk(3).train()
        trunk.checkpointing = on
        trunk(random_codes(4, 250)).x.square().mean().backward()
        results.append(({n: p.grad for n, p in trunk.named_parameters()}, dict(trunk.named_buffers())))
    (gradients, buffers), (gradients_on, buffers_on) = results
    assert all(torch.equal(gradients[name], gradients_on[name]) for name in gradients)  # type: ignore[arg-type]
    assert all(torch.equal(buffers[name], buffers_on[name]) for name in buffers)
    assert int(buffers_on["stages.final.norm.num_batches_tracked"]) == 1
    assert trunk.stages["final"].norm.momentum == 0.1


@pytest.mark.parametrize("settings", [{"bin_size": 12}, {"bin_size": 256}, {"channels": 20}, {"channels": 0}])
def test_trunks_that_cannot_be(settings: dict[str, int]) -> None:
    with pytest.raises(ModelError):
        ConvNet(**settings)


# ---- heads ----


def test_heads_pool_valid_bins_only_and_start_at_the_mean() -> None:
    table = TrackTable.build([{"name": "a", "link": "sigmoid"}, {"name": "b", "link": "sigmoid"}])
    x = torch.randn(2, 8, 6)
    state = State(x, valid=torch.tensor([[True] * 6, [True] * 2 + [False] * 4]))
    sample = tiny_sample()
    for pool, expected in (("mean", x[1, :, :2].mean(-1)), ("max", x[1, :, :2].amax(-1))):
        head = Head(table, 8, pool)  # type: ignore[arg-type]
        assert torch.allclose(head(state, sample)[1, :, 0], head.out(expected[:, None])[:, 0], atol=1e-6)
    for link, mean in (("sigmoid", 0.3), ("softplus", 2.5), ("identity", -1.5)):
        head = Head(table.replace(link=link), 8)
        nn.init.zeros_(head.out.weight)
        head.start_at(np.array([mean, mean]))
        model_table = table.replace(link=link)
        from seqgraft.models.base import apply_link

        assert torch.allclose(apply_link(head(State(x), sample), str(model_table.frame["link"][0])), torch.tensor(mean))


def tiny_sample() -> object:
    return type("Nothing", (), {"covariates": {}})()


def test_mean_of_valid_counts_in_float32() -> None:
    x = torch.ones(1, 1, 300, dtype=torch.bfloat16)
    state = State(x, valid=torch.ones(1, 300, dtype=torch.bool))
    assert mean_of_valid(state).dtype == torch.float32
    assert float(mean_of_valid(state)) == 1.0


# ---- model folders ----


def test_every_link_of_its_group(coverage: Dataset, tmp_path: Path) -> None:
    mixed = tiny_coverage(
        tmp_path / "mixed", tracks=("a", "b", "c"), links=("softplus", "identity", "softplus"), groups=("x", "y", "x")
    )
    model = build_model(ModelConfig(settings={"channels": 16, "depth": 3, "blocks": 1}), mixed.tracks, mixed.info)
    sample = mixed.sample([0, 1])
    values = model(sample)
    features = model.trunk(sample.codes, sample.lengths)
    assert torch.equal(values[:, 1:2], model.heads["new_y"](features, sample))  # order of the table, not of the heads
    assert torch.equal(values[:, [0, 2]], model.heads["new_x"](features, sample))
    linked = model.link(values)
    assert torch.equal(linked[:, 1], values[:, 1])
    assert torch.allclose(linked[:, 2], nn.functional.softplus(values[:, 2]))


def test_classes_are_a_softmax_over_their_group(tmp_path: Path) -> None:
    labels = tiny_labels(tmp_path / "labels", "softmax")
    model = build_model(ModelConfig(settings={"channels": 16, "depth": 2, "blocks": 1}), labels.tracks, labels.info)
    assert torch.allclose(model.predict(labels.sample([0, 1, 2])).sum(1), torch.ones(3, 1))


def test_save_and_build_again(tmp_path: Path, coverage: Dataset) -> None:
    folder = tiny_pretrained(tmp_path / "model", trained_on=coverage)
    model = build_pretrained(ModelConfig(name=str(folder)), coverage.info)
    assert model is not None
    assert weight_hash(model.trunk) == json.loads((folder / "model.json").read_text())["weights_sha256"]
    assert model.trunk.spec.folds == "tiny"
    assert model.trunk.spec.licence == "CC0"
    assert (folder / "trained_on.bed").read_text().count("\n") == 16
    # once more, from a model that has pretrained heads
    save_model(
        model, tmp_path / "again", name="again", info=coverage.info, licence="", citation="", trained_on=None, card=""
    )
    again = build_pretrained(ModelConfig(name=str(tmp_path / "again")), coverage.info)
    sample = coverage.sample([0])
    assert again is not None
    assert torch.equal(again(sample), model(sample))
    assert not list(tmp_path.glob(".*"))


def test_random_init_keeps_the_architecture_alone(tmp_path: Path, coverage: Dataset) -> None:
    folder = tiny_pretrained(tmp_path / "model")
    config = ModelConfig(name=str(folder), init="random")
    torch.manual_seed(1)
    model = build_model(config, coverage.tracks, coverage.info)
    assert weight_hash(model.trunk) != find_model(str(folder)).content["weights_sha256"]  # type: ignore[union-attr]
    assert model.trunk.spec.weights is None
    assert build_pretrained(config, coverage.info) is None
    with pytest.raises(ConfigError, match="random weights"):
        build_model(replace(config, head="extend"), coverage.tracks, coverage.info)


@torch.no_grad()
def outputs(model: nn.Module, dataset: Dataset) -> Tensor:
    values: Tensor = model.eval()(dataset.sample([0, 3, 5]))
    return values


def trained(model_config: ModelConfig, dataset: Dataset, folder: Path, adapter: object) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(model_config, dataset.tracks, dataset.info)
    adapt(model, adapter)  # type: ignore[arg-type]
    folder.mkdir()
    fit(model, dataset, Elementwise(dataset.tracks), TrainConfig(epochs=2, batch_size=4, lr=1e-2), folder)
    return model


def test_extend_keeps_pretrained_outputs_to_the_bit(tmp_path: Path, coverage: Dataset) -> None:
    config = ModelConfig(name=str(tiny_pretrained(tmp_path / "model")), head="extend")
    reference = build_pretrained(config, coverage.info)
    assert reference is not None
    expected = outputs(reference, coverage)
    before = build_model(config, coverage.tracks, coverage.info)
    model = trained(config, coverage, tmp_path / "run", LinearProbe())
    assert model.tracks.names == ["rna+", "rna-", "atac", "old+", "old-", "mark"]
    assert torch.equal(outputs(before, coverage)[:, 3:], expected)
    assert torch.equal(outputs(model, coverage)[:, 3:], expected)
    assert (outputs(model, coverage)[:, :3] != outputs(before, coverage)[:, :3]).any(-1).any(0).all()
    old = {name: value for name, value in before.state_dict().items() if name.startswith("heads.pretrained_")}
    assert len(old) == 4
    for adapter in (LoRA(rank=2), FullFineTune()):
        changed = trained(config, coverage, tmp_path / adapter.kind, adapter)
        assert not torch.equal(outputs(changed, coverage)[:, 3:], expected), "the trunk below them moves"
        assert all(torch.equal(changed.state_dict()[name], value) for name, value in old.items())


def test_pretrained_heads_train_on_for_tracks_of_the_same_names(tmp_path: Path, coverage: Dataset) -> None:
    """The data have one strand pair of two; the mark and the others stay as they are, in one head with trained rows."""
    reference_tracks = ("atac", "rna-", "rna+", "other+", "other-")
    folder = tiny_pretrained(tmp_path / "model", reference_tracks)
    content = json.loads((folder / "model.json").read_text())
    for row in content["tracks"]:
        row["scale"] = 0.25
    (folder / "model.json").write_text(json.dumps(content))
    config = ModelConfig(name=str(folder), head="pretrained")
    reference = build_pretrained(config, coverage.info)
    start = build_model(config, coverage.tracks, coverage.info)
    assert reference is not None
    assert start.tracks.names == ["rna+", "rna-", "atac", "other+", "other-"]
    order = [reference.tracks.names.index(name) for name in start.tracks.names]
    expected = outputs(reference, coverage)[:, order]
    assert torch.allclose(outputs(start, coverage), expected, atol=1e-6)
    model = trained(config, coverage, tmp_path / "run", LinearProbe())
    after = outputs(model, coverage)
    assert torch.equal(after[:, 3:], outputs(start, coverage)[:, 3:])
    assert ((after - expected)[:, :3].abs() > 1e-3).any(-1).any(0).all()
    save_adapter(model, tmp_path / "adapter", {"name": "tiny"})  # type: ignore[arg-type]
    load_adapter(start, tmp_path / "adapter")
    assert torch.equal(outputs(start, coverage), after)


def test_part_of_a_pretrained_group_trains(tmp_path: Path) -> None:
    """Two of the four tracks of one head: only their rows move, weight decay included."""
    folder = tiny_pretrained(tmp_path / "model", ("a", "b", "c", "d"))
    content = json.loads((folder / "model.json").read_text())
    tensors = load_file(folder / "weights.safetensors")
    for part in ("weight", "bias"):
        tensors[f"heads.all.out.{part}"] = torch.cat([tensors.pop(f"heads.{name}.out.{part}") for name in "abcd"])
    content["heads"] = {"all": ["a", "b", "c", "d"]}
    for row in content["tracks"]:
        row |= {"group": "all", "scale": 0.25}
    save_file(tensors, folder / "weights.safetensors")
    (folder / "model.json").write_text(json.dumps(content))
    data = tiny_coverage(tmp_path / "data", tracks=("d", "b"), groups=("all", "all"))
    config = ModelConfig(name=str(folder), head="pretrained")
    model = trained(config, data, tmp_path / "run", LinearProbe())
    assert model.tracks.names == ["d", "b", "a", "c"]
    before, after = outputs(build_model(config, data.tracks, data.info), data), outputs(model, data)
    assert torch.equal(before[:, 2:], after[:, 2:])
    assert (before[:, :2] != after[:, :2]).any(-1).any(0).all()


def damage(folder: Path, what: str) -> None:
    weights, description = folder / "weights.safetensors", folder / "model.json"
    content, tensors = json.loads(description.read_text()), load_file(weights)
    if what == "missing":
        del tensors["trunk.stages.stem.conv.weight"]
    elif what == "missing head":
        del tensors["heads.mark.out.bias"]
    elif what == "extra":
        tensors["trunk.stages.tower_9.conv.weight"] = torch.zeros(3)
    elif what == "misshapen":
        tensors["trunk.stages.stem.conv.bias"] = torch.zeros(3)
    elif what == "misshapen head":
        tensors["heads.old.out.weight"] = torch.zeros(1, 16, 1)
    elif what == "changed":
        tensors["trunk.stages.stem.conv.bias"] += 1
    elif what == "architecture":
        content["architecture"] = "resnet"
    elif what == "version":
        content["format_version"] = 99
    elif what == "entry":
        del content["tracks"]
    elif what == "settings":
        content["settings"]["colour"] = 3
    elif what == "value":
        content["settings"]["channels"] = "x"
    elif what in ("window", "heads"):
        content[what] = ["x"]
    save_file(tensors, weights)
    description.write_text("[]" if what == "list" else "{" if what == "json" else json.dumps(content))
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "empty":
        weights.write_bytes(b"")
    elif what == "absent":
        weights.unlink()


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("missing", ModelError, r"'missing': \['trunk.stages.stem.conv.weight'\]"),
        ("missing head", ModelError, "heads.mark.out.bias"),
        ("extra", ModelError, r"'unexpected': \['trunk.stages.tower_9.conv.weight'\]"),
        ("misshapen", ModelError, r"trunk.stages.stem.conv.bias: \(3,\) instead of \(16,\)"),
        ("misshapen head", ModelError, r"heads.old.out.weight: \(1, 16, 1\) instead of \(2, 16, 1\)"),
        ("changed", ModelError, "not those that model.json describes"),
        ("architecture", ModelError, r"unknown architecture: 'resnet'. Known are \['borzoi', 'convnet'"),
        ("version", ConfigError, "format or version"),
        ("entry", ConfigError, r"lacks entries: \['tracks'\]"),
        ("settings", ConfigError, r"architecture does not take: \{'colour': 3\}"),
        ("value", ConfigError, r"architecture does not take: \{'channels': 'x'\}"),
        ("window", ConfigError, r"values of another kind: \{'window': \['x'\]\}"),
        ("heads", ConfigError, r"values of another kind: \{'heads': \['x'\]\}"),
        ("list", ConfigError, "does not describe a model"),
        ("json", ConfigError, "not valid JSON"),
        ("truncated", ModelError, "cannot be read"),
        ("empty", ModelError, "cannot be read"),
        ("absent", ModelError, "weights are missing"),
    ],
)
def test_damaged_models_are_refused(
    tmp_path: Path, coverage: Dataset, what: str, kind: type[SeqgraftError], message: str
) -> None:
    folder = tiny_pretrained(tmp_path / "model")
    damage(folder, what)
    with pytest.raises(kind, match=message):
        build_model(ModelConfig(name=str(folder), head="extend"), coverage.tracks, coverage.info)


@pytest.mark.parametrize(
    ("config", "info", "tracks", "kind", "message"),
    [
        ({"name": "nothing"}, {}, None, ConfigError, "no such model"),
        ({"settings": {"channels": 32}}, {}, None, ConfigError, "brings its own settings"),
        ({}, {"bin_size": 8, "bins": 24}, None, ModelError, "bins of 16 bp .* dataset has bins of: 8"),
        ({}, {"bins": 11}, None, ModelError, "whole number of bins"),
        ({}, {"bins": 18}, None, ModelError, "whole number of bins"),
        ({}, {"window": 240, "bins": 11}, None, ModelError, "multiple of the trunk's stride"),
        ({"head": "extend"}, {}, ["old+", "old-"], ModelError, r"share names: \['old\+', 'old-'\]"),
        ({"head": "pretrained"}, {}, ["new"], ModelError, r"no tracks of these names: \['new'\]"),
        ({"head": "pretrained"}, {}, ["mark"], ModelError, "'mark' has another scale than .* 1.0"),
        ({"head": "extend"}, {"bins": 1, "bin_size": 140, "window": 140}, None, ModelError, "tracks with bins"),
        ({"name": "convnet", "head": "extend", "settings": {"depth": 3}}, {}, None, ModelError, "needs a pretrained"),
        ({"name": "convnet", "settings": {"width": 3}}, {}, None, ConfigError, "does not take these settings"),
    ],
)
def test_models_that_do_not_fit(
    tmp_path: Path,
    config: dict[str, object],
    info: dict[str, int],
    tracks: list[str] | None,
    kind: type[SeqgraftError],
    message: str,
) -> None:
    folder = tiny_pretrained(tmp_path / "model")
    rows = [{"name": name, "scale": 0.5} for name in tracks or ["new"]]
    asked = ModelConfig(**({"name": str(folder)} | config))  # type: ignore[arg-type]
    shape = DatasetInfo(**({"kind": "coverage", "window": WINDOW, "bins": BINS, "bin_size": BIN_SIZE} | info))  # type: ignore[arg-type]
    with pytest.raises(kind, match=message):
        build_model(asked, TrackTable.build(rows), shape)


def test_bundled_models_load() -> None:
    for name, model in bundled_models().items():
        content = model.content
        info = DatasetInfo("coverage", content["window"], content["bins"], content["bin_size"])
        lm = bool(content["settings"].get("lm_head"))
        built = build_masked(ModelConfig(name), info) if lm else build_pretrained(ModelConfig(name), info)
        assert built is not None
        assert built.trunk.spec.weights == content["weights_sha256"]
