"""Every benchmark runs, at toy size and without the other packages, and says how to get them."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import benchmarks
import pytest
import torch
from benchmarks import _children, _grelu, _peers, cache, fragments, haplotypes, lm, tiles, trunk

from seqgraft.adapters import LinearProbe
from seqgraft.models.base import Head
from seqgraft.models.folders import TRUNKS
from seqgraft.models.weights import ModelConfig
from seqgraft.tracks import TrackTable

ROOT = Path(__file__).parent.parent
TRACKS = TrackTable.build([{"name": "track", "group": "head", "link": "identity"}])
TINY = {
    "borzoi": {"stem": 16, "tower": [16, 16, 16, 16, 24, 24], "blocks": 1, "heads": 2, "key_size": 4, "final": 24},
    "enformer": {"channels": 96, "depth": 1, "heads": 2, "key_size": 4, "divisible_by": 4},
}


def test_each_is_found_by_name() -> None:
    names = {found.name for found in pkgutil.iter_modules(benchmarks.__path__) if not found.name.startswith("_")}
    assert {"cache", "trunk"} <= names
    for name in names:
        assert callable(importlib.import_module(f"benchmarks.{name}").run)
    command = [sys.executable, "-m", "benchmarks", "nothing"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert f"there are {', '.join(sorted(names))}" in found.stderr


def test_training_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQGRAFT_CACHE", "")
    model = ModelConfig(settings={"channels": 16, "depth": 2, "blocks": 1})
    cases = [
        replace(cache.CASES[name], model=model, window=256, bins=8, regions=4, epochs=3, batch_size=2)
        for name in ("yeast-mini-probe", "yeast-mini-lora")
    ]
    lines = list(cache.run(cases))
    assert sum("float16 against off: a step" in line for line in lines) == 2
    assert all(float(ratio) > 0 for line in lines for ratio in re.findall(r"(\S+)x", line))
    assert "activations of the whole trunk as float16" in lines[4]


def test_trunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "in_child", _children.measure)  # a process of its own takes seconds to begin
    cases = [
        trunk.Case("borzoi", 1024, rounds=2, peer=False, settings=TINY["borzoi"]),
        trunk.Case("enformer", 1024, peer=False, settings=TINY["enformer"]),
        trunk.Case("borzoi", 1024, "LoRA step", peer=False, settings=TINY["borzoi"]),
    ]
    lines = list(trunk.run(cases))
    assert [line.split()[0] for line in lines] == ["borzoi", "borzoi", "enformer", "enformer", "borzoi", "borzoi"]
    assert all(re.search(r"\d CPU s, +\d+ MiB$", line) for line in lines)


def test_haplotypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENVARLOADER_PYTHON", raising=False)
    monkeypatch.setenv("SEQGRAFT_SHARED", "nowhere")
    lines = list(haplotypes.run([haplotypes.CASES["toy"], haplotypes.CASES["human"]]))
    assert re.search(r"4 donors, \d+ variants, 2 windows of 1,024 bp, \d of 8 haplotypes distinct", lines[0])
    assert re.search(r"distinct [\d,]+ haplotypes a CPU s", lines[1])
    assert "GenVarLoader left out: pip install genvarloader" in lines[2]
    assert "left out, there is no nowhere" in lines[-1]


def test_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQGRAFT_CACHE", "")
    monkeypatch.setenv("SEQGRAFT_SHARED", "nowhere")
    lines = list(tiles.run([tiles.CASES["toy"], tiles.CASES["human"]]))
    assert re.search(r"24 donors, 2 windows of 4,096 bp, \d+ of 96 haplotypes distinct", lines[0])
    assert re.search(r"in \d+ distinct tiles of \d+ bp \([\d.]+x less\)", lines[1])
    assert all(float(ratio) > 0 for line in lines[2:4] for ratio in re.findall(r"(\d\S*)x", line))
    assert float(lines[4].rpartition(" ")[2]) <= 1e-6
    assert "left out, there is no nowhere" in lines[-1]


def test_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQGRAFT_CACHE", "")
    case = fragments.Case(4000, lengths=tuple((f"chr{number}", 150_000) for number in range(4)), cells=40)
    fragments.simulate(tmp_path, case)
    lines = [fragments.measure(tmp_path, case, step) for step in case.steps]
    assert [line.split()[2] for line in lines] == ["read", "prepare"]
    assert all(re.search(r"\d M/s, +\d+ MiB above \d+$", line) for line in lines)
    monkeypatch.setitem(sys.modules, "snapatac2", None)
    with pytest.raises(SystemExit, match="pip install snapatac2"):
        fragments.measure(tmp_path, case, "snapatac2")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_language_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQGRAFT_CACHE", "")
    tiny = lm.Bert(k=3, channels=16, depth=2, heads=2, hidden=32)
    cases: list[lm.Case] = [
        lm.Probe(tiny, sequences=16, length=60, our_epochs=3),
        lm.Buckets(tiny, sequences=24, lengths=(50, 200), batch_size=4),
        lm.Adapters(tiny, length=40, batch_size=2, steps=2),
    ]
    if find_spec("bitsandbytes") is not None:
        cases.append(lm.Quantised(tiny, length=40, batch_size=2, steps=2))
    lines = list(lm.run(cases))
    differences = [float(found) for line in lines for found in re.findall(r"states differ by (\S+) of", line)]
    assert len(differences) == 5
    assert max(differences) < 1e-5
    assert sum("after 2 epochs: ours" in line for line in lines) == 1
    padded = [float(found) for line in lines for found in re.findall(r"([\d.]+)% of the positions", line)]
    assert padded[0] < padded[1]
    assert all(any(line.startswith(f"  {name}: ours") for line in lines) for name in ("LoRA", "DoRA", "IA3"))


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    tiny = lm.Bert(k=3, channels=16, depth=1, heads=2, hidden=32)
    body = tiny.save(tmp_path / "bert")
    dataset = lm.labelled(tmp_path / "data", 8, (40, 40))
    model = lm.our_model(tmp_path / "bert", dataset, LinearProbe())
    assert "differ by" in lm.same_states(model, body, tiny, dataset)
    torch.nn.init.normal_(body.encoder.layer[0].output.dense.weight)
    with pytest.raises(AssertionError):
        lm.same_states(model, body, tiny, dataset)


def test_sides_take_turns() -> None:
    order = []

    def side(name: str, steps: int) -> Iterator[object]:
        for _ in range(steps):
            order.append(name)
            yield None

    found = lm.in_turn({"a": side("a", 3), "b": side("b", 2)})
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 2}
    assert order == ["a", "b", "b", "a", "a"]


@pytest.mark.parametrize("network", ["borzoi", "enformer"])
def test_the_other_packages_are_asked_for_by_their_names(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *args: object, **kwargs: object) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(SystemExit, match=f"{network}_pytorch.*pip install borzoi-pytorch enformer-pytorch"):
        _peers.peer_of(network, TRUNKS[network](**TINY[network]))
    with pytest.raises(SystemExit, match=r"grelu\.lightning.*pip install gReLU"):
        _grelu.Grelu(TRUNKS["borzoi"](**TINY["borzoi"]), Head(TRACKS, TINY["borzoi"]["final"]), 1024, 0)


@pytest.mark.parametrize(("network", "package"), [("borzoi", "borzoi"), ("enformer", "enformer"), ("borzoi", "grelu")])
def test_every_tensor_has_a_name_there(network: str, package: str) -> None:
    """A full-size trunk without memory for its weights: no two of its tensors become one."""
    with torch.device("meta"):
        names = list(TRUNKS[network]().state_dict())
    theirs = [_peers._name(package, name) for name in names]
    assert len(set(theirs)) == len(names)
    assert all("stages" not in name for name in theirs)
