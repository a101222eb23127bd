"""Language models on a quantised base: trained, saved, reloaded, merged, and what they hold in memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import types
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from builders import BLOCKS, MOSAIC, ROTARY, tiny_labels, tiny_language
from seqgraft.adapters import LinearProbe, LoRA, adapt, load_adapter, merge, save_adapter
from seqgraft.adapters.base import check_gradients
from seqgraft.data.dataset import Dataset
from seqgraft.errors import RunError
from seqgraft.experiment import parse_experiment
from seqgraft.memory import FrozenBytes, LiveBytes, training_step
from seqgraft.models.base import Head, SequenceModel
from seqgraft.models.tokens import Overlapping
from seqgraft.objectives import Elementwise
from seqgraft.plan import plan_run
from seqgraft.report import write_report
from seqgraft.run import fit_run, open_run
from seqgraft.train import fit

FAMILIES: dict[str, dict[str, Any]] = {"bert": {}, "esm": BLOCKS, "mosaic": MOSAIC, "esm_rotary": ROTARY}
WIDE = {"channels": 64, "heads": 2, "hidden": 128, "crop": 0}
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:Merge lora module")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_labels(tmp_path_factory.mktemp("labels") / "data")


def build(labels: Dataset, family: str = "bert") -> SequenceModel:
    trunk = tiny_language(1, **{**FAMILIES[family], **WIDE})
    torch.manual_seed(2)
    return SequenceModel(trunk, {"new_label": Head(labels.tracks, trunk.spec.channels, "mean")}, labels.tracks)


def train(model: SequenceModel, labels: Dataset, steps: int = 12) -> list[float]:
    torch.manual_seed(3)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    objective, sample = Elementwise(labels.tracks), labels.sample(labels.rows("train"))
    alive: set[str] = set()
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = training_step(model, objective, sample, "float32")
        loss.backward()
        alive = check_gradients(model, alive, last=step == steps - 1)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def outputs(model: SequenceModel, labels: Dataset) -> Tensor:
    values: Tensor = model.eval()(labels.sample(labels.rows("valid")))
    return values


def held(module: nn.Module) -> int:
    """Bytes of every tensor that a module leads to, by whatever attribute, as the garbage collector sees it."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    ask: list[Any] = [module]
    while ask:
        thing = ask.pop()
        elsewhere = isinstance(thing, type | types.ModuleType | types.FunctionType | types.MethodType | Overlapping)
        if id(thing) in seen or elsewhere:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        ask += gc.get_referents(thing)
    return sum(storages.values())


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_reloads_and_merges(labels: Dataset, tmp_path: Path, family: str, kind: Any) -> None:
    adapter = LoRA(rank=2, where=("attention", "feedforward"), quantize=kind)
    model, plain = build(labels, family), build(labels, family)
    full = outputs(model, labels)
    adapt(model, adapter)
    quantised = outputs(model, labels)
    assert 0 < float((quantised - full).abs().max()) < 0.3 * float(full.abs().max())
    losses = train(model, labels)
    assert losses[-1] < 0.9 * losses[0]
    live = outputs(model, labels)
    save_adapter(model, tmp_path / "adapter", {"name": "tiny"})
    again = build(labels, family)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(outputs(again, labels), live)

    changes = {
        name: 2 * module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()
        for name, module in model.trunk.named_modules()
        if hasattr(module, "lora_B")
    }
    assert len(changes) == 12
    difference = merge(model)
    assert 0 < difference < 0.3
    base = plain.trunk.state_dict()
    merged = model.trunk.state_dict()
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        change = changes.get(name.removesuffix(".weight"), 0.0) if name.endswith(".weight") else 0.0
        assert torch.allclose(tensor, base[name] + change, atol=1e-6), name
    assert all(type(module) is nn.Linear for module in model.trunk.modules() if isinstance(module, nn.Linear))


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.3), ("int8", 0.4)])
def test_bytes_are_those_of_all_tensors(labels: Dataset, kind: Any, share: float) -> None:
    """Scales and tables of the quantised layers count, full-precision copies are not in memory."""
    model = build(labels)
    linear = sum(p.nbytes for m in model.trunk.modules() if isinstance(m, nn.Linear) for p in m.parameters())
    before = held(model.trunk)
    adapt(model, LoRA(quantize=kind))
    for _ in range(2):
        trains = [p for p in model.trunk.parameters() if p.requires_grad]
        found = FrozenBytes.of(model)
        assert found.before == before
        assert found.now == held(model.trunk) - sum(p.nbytes for p in trains)
        assert found.now < before - (1 - share) * linear
        outputs(model, labels)  # the first pass of 8-bit layers moves their scales


def test_nothing_was_quantised(labels: Dataset) -> None:
    for adapter in (LoRA(), LinearProbe()):
        model = build(labels)
        adapt(model, adapter)
        found = FrozenBytes.of(model)
        assert not found.quantised
        assert found.now == found.before == sum(p.nbytes for p in model.trunk.parameters() if not p.requires_grad)


def test_what_is_there_already_is_not_counted() -> None:
    weight, x = torch.ones(64, 32), torch.ones(8, 32)
    for beside, expected in (([weight, x], 8 * 64 * 4), ([x], 8 * 64 * 4 + weight.nbytes)):
        with LiveBytes(beside) as live:
            kept = x @ weight.T
        assert live.peak == expected
        del kept


@needs_bitsandbytes
def test_a_full_disk_is_told(labels: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(RunError, match=r"cannot be kept on disk.*SEQGRAFT_CACHE"):
        adapt(build(labels), LoRA(quantize="nf4"))


# ---- runs ----


def checkpoint(folder: Path, task: str) -> Path:
    """What transformers saves of a tiny BERT: with a pooling layer and a classifier, or with neither."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *("".join(kmer) for kmer in product("ACGT", repeat=3))]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=200, **sizes)
    getattr(transformers, task)(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    return folder


_PREDICT = """
import sys
import numpy as np, torch
from seqgraft.run import open_run
torch.manual_seed(1234)
for folder in sys.argv[1:]:
    run = open_run(folder)
    with torch.no_grad():
        np.save(folder + "/again.npy", run.model(run.dataset.sample(run.dataset.rows("valid"))).numpy())
"""


@needs_bitsandbytes
def test_runs_measure_and_reload(labels: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing random that is not saved: another process gives the same numbers, with or without a pooling layer."""
    live: dict[str, Tensor] = {}

    def fit_and_keep(model: SequenceModel, *args: Any, **kwargs: Any) -> Any:
        result = fit(model, *args, **kwargs)
        live[str(args[3])] = outputs(model, labels)
        return result

    monkeypatch.setattr("seqgraft.run.fit", fit_and_keep)
    environments = {}
    kinds = {"nf4": "BertForMaskedLM", None: "BertForMaskedLM", "int8": "BertForSequenceClassification"}
    for quantize, task in kinds.items():
        folder = tmp_path / f"{task}-{quantize}"
        experiment = parse_experiment(
            {
                "data": str(labels.folder),
                "model": {"name": str(checkpoint(tmp_path / task, task))},
                "adapter": {"kind": "lora", "quantize": quantize},
                "train": {"epochs": 1, "batch_size": 4, "augment": {"shift": 0}},
            }
        )
        plan = plan_run(experiment)
        assert plan.would_start, plan.problems
        fit_run(experiment, folder)
        environment = environments[quantize] = json.loads((folder / "environment.json").read_text())
        model = open_run(folder).model
        counts, frozen = environment["counts"], environment["frozen_bytes"]
        assert frozen["now"] == held(model.trunk) - 4 * counts["adapter"]
        assert plan.cost is not None
        # the gradients and two moments of AdamW are as large as what trains
        assert plan.cost.fixed_bytes == held(model) + 3 * 4 * (counts["adapter"] + counts["head"])
        states = 3 * 4 * 70 * 64 * 4  # the embeddings' and two layers' of four sequences of 70 tokens or more
        assert environment["result"]["step_bytes"] > plan.cost.fixed_bytes + states
        page = write_report(folder).read_text()
        assert ("before quantising" in page) == (quantize is not None)
        assert ("quantised" in plan.facts) == (quantize is not None)
    assert environments[None]["frozen_bytes"]["now"] == environments["nf4"]["frozen_bytes"]["before"]
    subprocess.run([sys.executable, "-c", _PREDICT, *live], check=True, timeout=600)
    for folder, expected in live.items():
        assert np.array_equal(np.load(f"{folder}/again.npy"), expected.numpy())
