"""One test per guard of the adapters: take the guard away and its test fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqgraft.adapters import (
    IA3,
    Adapter,
    Houlsby,
    LinearProbe,
    LoRA,
    Peft,
    adapt,
    check_gradients,
    files,
    load_adapter,
    make_adapter,
    merge,
    save_adapter,
)
from seqgraft.adapters.base import check_frozen
from seqgraft.errors import ModelError
from seqgraft.models.base import SequenceModel
from test_adapters import CHANNELS, batch, build, outputs, train


def backward(model: SequenceModel) -> None:
    model.train()
    model.zero_grad()
    sample = batch()
    (model.predict(sample)[:, :3] - sample.targets).square().mean().backward()


def saved(folder: Path, adapter: Adapter | None = None) -> Path:
    model = build()
    adapt(model, adapter or LoRA())
    train(model)
    save_adapter(model, folder / "adapter", {"name": "tiny"})
    return folder / "adapter"


class ReadsWeight(nn.Linear):
    """A layer that a trunk does not call."""


class FusedOutput(nn.Module):
    """Stands where a linear layer was and reads its weight, as fused kernels do."""

    def __init__(self, linear: nn.Linear, *, only_in_training: bool) -> None:
        super().__init__()
        self.linear, self.only_in_training = linear, only_in_training

    def forward(self, x: Tensor) -> Tensor:
        if self.only_in_training and not torch.is_grad_enabled():
            called: Tensor = self.linear(x)
            return called
        weight = getattr(self.linear, "base_layer", self.linear).weight
        return nn.functional.linear(x, weight, self.linear.bias)


def fused(*, only_in_training: bool) -> SequenceModel:
    model = build()
    trunk = model.trunk
    trunk.stages["transformer_0"].output = FusedOutput(
        trunk.stages["transformer_0"].output, only_in_training=only_in_training
    )
    name = "stages.transformer_0.output.linear"
    trunk.spec.sites["attention"] = (name,)  # type: ignore[index]
    return model


# Frozen things stay.


def test_guard_batchnorm_statistics_do_not_drift() -> None:
    model = build()
    adapt(model, LoRA())
    norms = [module for module in model.trunk.modules() if isinstance(module, nn.BatchNorm1d)]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    train(model)
    model.train()
    assert norms
    assert not any(norm.training for norm in norms)
    for norm, (mean, variance) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.running_var, variance)


def test_guard_frozen_module_in_training_mode() -> None:
    model = build()
    adapt(model, LoRA())
    backward(model)
    model.trunk.stages["tower_0"].norm.train()
    with pytest.raises(ModelError, match=r"training mode.*tower_0\.norm"):
        check_gradients(model, set())


def test_guard_trunk_stays_frozen() -> None:
    model = build()
    adapt(model, LoRA())
    model.trunk.stages["stem"].requires_grad_(True)
    backward(model)
    with pytest.raises(ModelError, match=r"train although they were frozen.*stem\.conv\.weight"):
        check_gradients(model, set())


def test_guard_gradient_of_a_frozen_tensor() -> None:
    model = build()
    adapt(model, LoRA())
    backward(model)
    weight = model.trunk.stages["stem"].conv.weight
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ModelError, match=r"frozen tensors have a gradient.*stem\.conv\.weight"):
        check_gradients(model, set())


@pytest.mark.parametrize("name", ["stages.stem.conv.weight", "stages.tower_1.norm.running_var"])
def test_guard_moved_tensor_is_not_saved_over(name: str, tmp_path: Path) -> None:
    model = build()
    adapt(model, LoRA())
    check_frozen(model)
    model.trunk.state_dict()[name][1] += 0.125
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        save_adapter(model, tmp_path / "adapter", {"name": "tiny"})
    assert not list(tmp_path.iterdir())


# The adapter is where it says.


@pytest.mark.parametrize(
    "adapter",
    [LoRA(where=("attentoin",)), IA3(where=("key",)), Peft(where=("attention", "nope")), LoRA(where=("conv", "head"))],
    ids=lambda adapter: adapter.label,
)
def test_guard_unmatched_site(adapter: Adapter) -> None:
    with pytest.raises(ModelError, match=r"no module at the site.*attention.*conv.*feedforward"):
        adapt(build(), adapter)


def test_guard_trunk_without_the_site() -> None:
    model = build()
    model.trunk.spec.sites["attention.output"] = ()  # type: ignore[index]
    with pytest.raises(ModelError, match=r"no module at the site: 'attention\.output'"):
        adapt(model, Houlsby())


def test_guard_spec_names_what_is_not_there() -> None:
    model = build()
    model.trunk.spec.sites["attention"] = ("stages.transformer_9.query",)  # type: ignore[index]
    with pytest.raises(ModelError, match="does not have"):
        adapt(model, LoRA())


@pytest.mark.parametrize("last", [0, 6])
def test_guard_last_asks_for_more_than_there_is(last: int) -> None:
    with pytest.raises(ModelError, match="between 1 and the 5"):
        adapt(build(), LoRA(where=("conv",), last=last))


@pytest.mark.parametrize("adapter", [LoRA(), LoRA(dora=True), Peft()], ids=lambda adapter: adapter.label)
def test_guard_bypassed_forward(adapter: Adapter) -> None:
    with pytest.raises(ModelError, match=r"never calls.*transformer_0\.output\.linear"):
        adapt(fused(only_in_training=False), adapter)


def test_guard_no_gradient() -> None:
    """A kernel that is used in training only: nothing to see when the adapter is put in."""
    model = fused(only_in_training=True)
    adapt(model, LoRA())
    backward(model)
    with pytest.raises(ModelError, match=r"get no gradient.*output\.linear\.lora_A"):
        check_gradients(model, set())


def test_guard_gradient_always_zero() -> None:
    model = build()
    adapt(model, LoRA())
    alive: set[str] = set()
    for _ in range(3):  # B never moves, so A never learns
        backward(model)
        alive = check_gradients(model, alive)
    with pytest.raises(ModelError, match=r"always zero.*lora_A"):
        check_gradients(model, alive, last=True)


def test_guard_gradient_not_finite() -> None:
    model = build()
    adapt(model, LoRA())
    backward(model)
    model.heads["new_mark"].out.bias.grad.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"not finite.*new_mark\.out\.bias"):
        check_gradients(model, set())


@pytest.mark.parametrize(
    "adapter",
    [
        LoRA(rank=CHANNELS, where=("conv",)),
        IA3(where=("conv",)),
        Houlsby(squeeze_excite=4),
        Peft(type="loha", where=("conv",)),
    ],
    ids=lambda adapter: adapter.label,
)
def test_guard_depthwise_convolution(adapter: Adapter) -> None:
    model = build()
    model.trunk.stages["tower_0"].conv = nn.Conv1d(CHANNELS, CHANNELS, 5, padding=2, groups=CHANNELS)
    with pytest.raises(ModelError, match=r"grouped.*tower_0|tower_0.*grouped"):
        adapt(model, adapter)


def test_guard_padding_that_peft_gets_wrong() -> None:
    for adapter in (Peft(type="loha", where=("conv",)), LoRA(where=("conv",), dora=True, dropout=0.1)):
        model = build()
        model.trunk.stages["tower_0"].conv = nn.Conv1d(CHANNELS, CHANNELS, 5, padding=2, padding_mode="reflect")
        with pytest.raises(ModelError, match="padded with zeros"):
            adapt(model, adapter)


def test_guard_subclass_that_may_compute_something_else() -> None:
    for adapter in (LoRA(), IA3(), Houlsby()):
        model = build()
        for name in ("value", "output"):
            setattr(model.trunk.stages["transformer_0"], name, ReadsWeight(CHANNELS, CHANNELS))
        with pytest.raises(ModelError, match="ReadsWeight"):
            adapt(model, adapter)


def test_guard_method_that_cannot_reach_a_convolution() -> None:
    with pytest.raises(ModelError, match="peft cannot adapt these modules"):
        adapt(build(), Peft(type="vera", where=("conv",)))
    with pytest.raises(ModelError, match="no method of this name"):
        adapt(build(), Peft(type="verra"))
    with pytest.raises(ModelError, match="refuses these settings"):
        adapt(build(), Peft(settings={"rnak": 8}))


# It starts as the identity, and merges to the same function.


def test_guard_method_that_is_not_the_identity() -> None:
    for adapter in (
        Peft(type="fourierft", settings={"n_frequency": 16}),
        Peft(type="vblora", settings={"vector_length": 16, "num_vectors": 8}),
        Peft(type="loha", settings={"init_weights": False}),
    ):
        with pytest.raises(ModelError, match="does not start as the identity"):
            adapt(build(), adapter)


def test_guard_output_that_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(self: LinearProbe, model: SequenceModel) -> None:
        model.trunk.stages["final"].norm.running_mean.fill_(float("nan"))

    monkeypatch.setattr(LinearProbe, "apply", spoil)
    with pytest.raises(ModelError, match="does not start as the identity"):
        adapt(build(), LinearProbe())


def test_guard_merged_model_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    model = build()
    adapt(model, LoRA())
    train(model)
    monkeypatch.setattr(Linear, "merge", lambda self, safe_merge: None)
    with pytest.raises(ModelError, match="merged trunk differs"):
        merge(model)


def test_guard_merge_of_what_is_no_weight() -> None:
    model = build()
    adapt(model, Houlsby())
    with pytest.raises(ModelError, match="Houlsby 8 cannot be merged"):
        merge(model)


def test_guard_one_adapter_at_a_time() -> None:
    model = build()
    for verb in (merge, lambda m: save_adapter(m, Path("never"), {}), check_frozen):
        with pytest.raises(ModelError, match="no adapter"):
            verb(model)
    adapt(model, LoRA())
    with pytest.raises(ModelError, match="has an adapter already"):
        adapt(model, IA3())


def test_guard_nothing_to_train() -> None:
    model = build()
    model.heads = nn.ModuleDict({f"pretrained_{name}": head for name, head in model.heads.items()})
    with pytest.raises(ModelError, match="Nothing would train"):
        adapt(model, LinearProbe())


def test_guard_bitsandbytes_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"seqgraft\[quant\]"):
        adapt(build(), LoRA(quantize="nf4"))


# What is read back is what was written, and it fits.


def test_guard_other_base_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(ModelError, match="other base weights"):
        load_adapter(build(seed=5), folder)
    other = build()
    other.trunk.stages["tower_0"].norm.running_mean[0] += 1e-3
    with pytest.raises(ModelError, match="other base weights"):
        load_adapter(other, folder)


def test_guard_other_pretrained_heads(tmp_path: Path) -> None:
    model = build(extended=True)
    adapt(model, LoRA())
    save_adapter(model, tmp_path / "adapter", {"name": "tiny"})
    load_adapter(build(extended=True), tmp_path / "adapter")
    other = build(extended=True)
    with torch.no_grad():
        other.heads["pretrained_old"].out.bias += 1
    with pytest.raises(ModelError, match=r"other base weights \(heads\.pretrained_old"):
        load_adapter(other, tmp_path / "adapter")


def test_guard_reload_after_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(tensors, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    model = build()
    adapt(model, LoRA())
    monkeypatch.setattr(files, "save_file", lossy)
    with pytest.raises(ModelError, match="differ from the model's"):
        save_adapter(model, tmp_path / "adapter", {"name": "tiny"})
    assert not list(tmp_path.iterdir())


def rewrite(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "weights.safetensors")
        change(tensors)
        save_file(tensors, folder / "weights.safetensors")

    return damage


def describe(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "adapter.json").read_text())
        kept = {key: value for key, value in (content | changes).items() if value != "absent"}
        (folder / "adapter.json").write_text(json.dumps(kept))

    return damage


def truncate(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


BIAS = "heads.new_mark.out.bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "adapter.json").unlink(), "holds no adapter"),
        (lambda folder: (folder / "adapter.json").write_text('{"format'), "not valid JSON"),
        (rewrite(lambda tensors: tensors.pop(BIAS)), f"lacks the tensor: '{BIAS}'"),
        (rewrite(lambda tensors: tensors.update(other=torch.ones(1))), "a tensor too many: 'other'"),
        (rewrite(lambda tensors: tensors.update({BIAS: torch.ones(2)})), "another shape"),
        (rewrite(lambda tensors: tensors.update({BIAS: torch.ones(1, dtype=torch.float64)})), "another type"),
        (describe(format="other"), "does not describe an adapter"),
        (describe(format_version=2), "another format version"),
        (describe(kind="lokon"), "no adapter of this kind: 'lokon'"),
        (describe(settings={"rnak": 8}), "cannot be made from these settings"),
        (describe(settings="absent"), "lacks an entry: 'settings'"),
        (describe(tracks=[{"name": "a"}]), "tracks differ"),
        (describe(tracks=[{"name": "a", "colour": "red"}]), "track table is damaged"),
    ],
)
def test_guard_damaged_adapter(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    damage(folder)
    with pytest.raises(ModelError, match=message.replace("(", r"\(")) as caught:
        load_adapter(build(), folder)
    assert caught.value.exit_code == 4


def test_guard_all_problems_at_once(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rewrite(lambda tensors: (tensors.pop(BIAS), tensors.update(other=torch.ones(1))))(folder)
    with pytest.raises(ModelError, match=r"(?s)other base weights.*lacks the tensor.*tensor too many"):
        load_adapter(build(seed=5), folder)


def test_settings_survive_the_file() -> None:
    adapter = LoRA(rank=3, where=("conv", "attention"), last=2)
    assert make_adapter("lora", {"rank": 3, "where": ["conv", "attention"], "last": 2}) == adapter


def test_probe_leaves_no_trace() -> None:
    model = build()
    model.train()
    before = outputs(build())
    adapt(model, LinearProbe())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(outputs(model), before)
