"""Plan finds what would stop a run, and its numbers hold."""

from __future__ import annotations

import collections
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pybigtools
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import seqgraft.memory
import seqgraft.models.folders
import seqgraft.plan
from builders import SETTINGS, tiny_coverage, tiny_labels, tiny_pretrained
from seqgraft.adapters import adapt
from seqgraft.cli import app
from seqgraft.data import prepare_source
from seqgraft.data.dataset import open_dataset
from seqgraft.data.seen import TRUNK_FOLDS, TrunkFolds
from seqgraft.errors import ConfigError, DataError, RunError
from seqgraft.experiment import Experiment, parse_experiment, parse_source, settings_of, write_yaml
from seqgraft.export import export_run
from seqgraft.plan import MAX_EXPOSURE, Cost, measure_cost, parse_memory, plan_run
from seqgraft.run import build_run, fit_run, objective_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, labels, and a trunk that has seen the dataset's training regions."""
    folder = tmp_path_factory.mktemp("plan")
    data = tiny_coverage(folder / "data")
    tiny_labels(folder / "labels")
    tiny_pretrained(folder / "model", trained_on=data)
    return folder


def experiment(folder: Path, data: str = "data", **sections: Any) -> Experiment:
    content = {"data": str(folder / data), "model": {"name": "convnet", "settings": SETTINGS}, "train": {"epochs": 1}}
    return parse_experiment(content | sections)


def cost_of(planned: Experiment) -> Cost:
    model, dataset = build_run(planned)
    adapt(model, planned.adapter)
    return measure_cost(planned, model, dataset)


# ---- would it start ----


@pytest.mark.parametrize("data", ["data", "labels"])
def test_a_plan_without_problems_starts(folder: Path, tmp_path: Path, data: str) -> None:
    planned = experiment(folder, data)
    found = plan_run(planned, tmp_path / "run")
    assert found.would_start, found.problems
    assert found.cost is not None
    assert {"run", "data", "model", "trains", "stages", "leak exposure", "memory", "time"} <= found.facts.keys()
    assert "transformer_0 (global)" in found.facts["stages"]
    assert not (tmp_path / "run").exists()
    fit_run(planned, tmp_path / "run")
    again = plan_run(planned, tmp_path / "run")
    assert not again.would_start
    assert isinstance(again.problems[0], RunError)


@pytest.mark.parametrize(
    ("sections", "code", "message"),
    [
        ({}, 0, ""),
        ({"data": "nowhere"}, 2, "not a prepared dataset"),
        ({"model": {"name": "enformer9"}}, 2, "no such model"),
        ({"evaluate": {"fold": "dev"}}, 2, "no region is in the fold"),
        ({"loss": {"marks": {"kind": "mse"}}}, 2, "groups of tracks that do not exist"),
        ({"train": {"metric": "auroc"}}, 2, "does not suit these tracks"),
        ({"adapter": {"kind": "lora", "where": ["nose"]}}, 4, "no module at the site"),
        ({"loss": {"kind": "bce", "pos_weight": [1, 2, 3]}}, 2, "3 values for 2 tracks"),
    ],
)
def test_exit_codes(folder: Path, tmp_path: Path, sections: dict[str, Any], code: int, message: str) -> None:
    content = settings_of(experiment(folder)) | sections
    write_yaml(tmp_path / "experiment.yaml", content)
    for command in (
        ["plan", str(tmp_path / "experiment.yaml")],
        ["fit", str(tmp_path / "experiment.yaml"), str(tmp_path / "run")],
    ):
        if command[0] == "fit" and not code:
            continue
        result = CliRunner().invoke(app, command)
        if isinstance(result.exception, SystemExit) or result.exception is None:
            assert result.exit_code == code
            said = result.output
        else:  # a file that cannot be read is reported by __main__
            assert result.exception.exit_code == code  # type: ignore[union-attr]
            said = str(result.exception)
        assert message in said
        if command[0] == "plan" and "such" not in said and not isinstance(result.exception, ConfigError):
            assert ("fit would start." in said) is (code == 0)
    assert not (tmp_path / "run").exists()


# ---- exposure ----


def test_a_trunk_that_has_seen_the_test_windows_is_refused(folder: Path) -> None:
    """Test targets lie beside training targets, so their windows overlap."""
    sections = {"model": {"name": str(folder / "model")}}
    found = plan_run(experiment(folder, **sections))
    assert [type(problem) for problem in found.problems] == [DataError]
    assert "allow_exposure" in str(found.problems[0])
    assert found.facts["leak exposure"].startswith("100.0%")
    allowed = plan_run(experiment(folder, **sections, allow_exposure=True))
    assert allowed.would_start
    assert allowed.facts["leak exposure"] == found.facts["leak exposure"]


def test_exposure_is_a_share_of_windows(folder: Path, tmp_path: Path) -> None:
    """Only what overlaps counts; at the limit a run still starts."""
    shutil.copytree(folder / "model", tmp_path / "model")
    data = open_dataset(folder / "data")
    test = data.regions.iloc[data.rows("test")]
    planned = experiment(folder, model={"name": str(tmp_path / "model")})

    def share(*regions: tuple[int, int]) -> float:
        lines = "".join(f"chr1\t{start}\t{end}\ttrain\n" for start, end in regions)
        (tmp_path / "model" / "trained_on.bed").write_text(lines or "chr2\t0\t5\ttrain\n")
        return seqgraft.plan.test_exposure(planned, data).share

    first = test.iloc[0]
    assert share() == 0
    assert share((first["start"] - 40, first["start"] - 32)) == 0
    assert share((first["start"] - 40, first["start"] - 31)) == 1 / len(test)  # the window is 32 bp wider on each side
    assert share((first["end"] + 31, first["end"] + 40)) == 1 / len(test)
    assert share((first["end"] + 32, first["end"] + 40)) == 0
    assert len(test) == 4
    assert 1 / len(test) > MAX_EXPOSURE


def test_windows_are_counted_by_the_trunks_folds(folder: Path, tmp_path: Path) -> None:
    """Only what the trunk was trained on counts as exposed; validation is told apart."""
    shutil.copytree(folder / "model", tmp_path / "model")
    data = open_dataset(folder / "data")
    starts = data.regions.iloc[data.rows("test")]["start"].tolist()
    lines = [(starts[0], "train"), (starts[0], "test"), (starts[1], "valid"), (starts[1], "test"), (starts[2], "test")]
    bed = "".join(f"chr1\t{start}\t{start + 9}\t{fold}\n" for start, fold in lines)
    (tmp_path / "model" / "trained_on.bed").write_text(bed)
    found = plan_run(experiment(folder, model={"name": str(tmp_path / "model")}))
    assert [type(problem) for problem in found.problems] == [DataError]
    assert found.facts["leak exposure"] == "25.0% of the 4 windows of fold 'test' overlap the trunk's training regions"
    counted = "1 its training, 1 its validation, 1 only its test regions, 1 nothing"
    assert found.facts["the trunk saw"] == f"of the windows of fold 'test': {counted}"
    (tmp_path / "model" / "trained_on.bed").write_text(bed.replace("train", "valid"))
    assert plan_run(experiment(folder, model={"name": str(tmp_path / "model")})).would_start


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"init": "random"}, "none: the trunk has random weights"),
        ("other genome", "none by position"),
        ("no record", "unknown: the model does not say"),
        ("labels", "unknown: the sequences have no positions"),
    ],
)
def test_exposure_that_cannot_be_known_is_said(folder: Path, tmp_path: Path, change: Any, note: str) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    content = json.loads((tmp_path / "model" / "model.json").read_text())
    if change == "other genome":
        content["genome"] = "0" * 64
    if change == "no record":
        (tmp_path / "model" / "trained_on.bed").unlink()
    (tmp_path / "model" / "model.json").write_text(json.dumps(content))
    model = {"name": str(tmp_path / "model")} | (change if isinstance(change, dict) else {})
    found = plan_run(experiment(folder, "labels" if change == "labels" else "data", model=model))
    assert found.would_start
    assert found.facts["leak exposure"].startswith(note)


# ---- exposure to a published trunk ----


@pytest.fixture
def published(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model converted from a published trunk, "toy": it names its split, and has neither regions nor a genome."""
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    names = {"fold0": "train", "fold3": "test", "fold4": "valid"}
    facts = TrunkFolds("toy1", names, 64, "https://example.org/toy.bed.gz", "", "", "")
    monkeypatch.setitem(TRUNK_FOLDS, "toy", facts)
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "trained_on.bed").unlink()
    describe(tmp_path / "model", genome=None, folds="toy")
    return tmp_path / "model"


def describe(model: Path, **entries: object) -> None:
    content = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(content | entries))


def toy_list(folder: Path, path: Path, *, shift: int, chrom: str = "chr1") -> Path:
    """The start of each test window in fold0, "shift" bp before it; 30 bp, of which the trunk saw 17 more on a side."""
    data = open_dataset(folder / "data")
    starts = data.regions.iloc[data.rows("test")]["start"] - 32 - 30 - shift
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{chrom}\t{start}\t{start + 30}\tfold0\n" for start in starts))
    return path


@pytest.mark.parametrize("where", ["the folder", "the setting", "the cache", "the setting names the split"])
def test_the_regions_of_a_published_trunk(folder: Path, tmp_path: Path, published: Path, where: str) -> None:
    model: dict[str, Any] = {"name": str(published)}
    path = {"the folder": published / "trained_on.bed", "the setting": tmp_path / "list.bed"}.get(where)
    path = path or tmp_path / "cache" / "folds" / "toy.bed.gz"
    if where == "the setting":
        model["trained_on"] = str(path)
    if where == "the setting names the split":
        describe(published, folds=None)
        model["trained_on"] = "toy"
    for shift, share in ((17, 0.0), (16, 1.0)):
        toy_list(folder, path, shift=shift)
        found = plan_run(experiment(folder, model=model))
        assert found.would_start is (share == 0)
        wanted = f"{share:.1%} of the 4 windows of fold 'test' overlap the trunk's training regions"
        assert found.facts["leak exposure"] == f"{wanted}, assuming that the genome is toy1"


def test_a_published_trunk_without_its_regions_is_refused(folder: Path, tmp_path: Path, published: Path) -> None:
    found = plan_run(experiment(folder, model={"name": str(published)}))
    (problem,) = found.problems
    for words in ("the published regions are not here", "https://example.org/toy.bed.gz", "model.trained_on", "allow"):
        assert words in str(problem)
    assert found.facts["leak exposure"].startswith("unknown: folds of toy: the published regions are not here")
    assert plan_run(experiment(folder, model={"name": str(published)}, allow_exposure=True)).would_start
    missing = plan_run(experiment(folder, model={"name": str(published), "trained_on": "nowhere.bed"}))
    assert "nowhere.bed: the file does not exist" in str(missing.problems[0])


@pytest.mark.parametrize(
    ("chrom", "words"), [("1", "no chromosome: '1'. The FASTA has 'chr1'"), ("chrX", "no chromosome: 'chrX'")]
)
def test_a_published_trunk_of_other_chromosomes(
    folder: Path, tmp_path: Path, published: Path, chrom: str, words: str
) -> None:
    toy_list(folder, published / "trained_on.bed", shift=0, chrom=chrom)
    found = plan_run(experiment(folder, model={"name": str(published)}))
    assert words in str(found.problems[0])
    assert not plan_run(experiment(folder, model={"name": str(published)}, allow_exposure=True)).problems


def test_a_model_of_the_hub_names_its_split(folder: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    found = {("someone/toy", commit): published}
    monkeypatch.setattr(seqgraft.models.folders, "_converted", lambda name, revision, *_: found[name, revision])
    planned = experiment(folder, model={"name": "someone/toy", "revision": commit})
    assert "folds of toy: the published regions are not here" in str(plan_run(planned).problems[0])


def test_a_split_that_nobody_knows(folder: Path, tmp_path: Path, published: Path) -> None:
    describe(published, folds="mine")
    assert "does not say which regions it was trained on: 'mine'" in str(
        plan_run(experiment(folder, model={"name": str(published)})).problems[0]
    )
    path = tmp_path / "list.bed"
    path.write_text("chr1\t0\t5\ttrain\n")
    assert plan_run(experiment(folder, model={"name": str(published), "trained_on": str(path)})).would_start


def test_the_split_of_the_trunk_has_no_exposure(tmp_path: Path, published: Path) -> None:
    """Prepared with folds by trunk, the same windows that plan looks at are clear of what the trunk saw."""
    rng = np.random.default_rng(0)
    (tmp_path / "genome.fa").write_text(f">chr1\n{''.join(rng.choice(list('ACGT'), 12_000))}\n")
    signal = [("chr1", start, start + 10, float(rng.integers(1, 9))) for start in range(0, 12_000, 10)]
    pybigtools.open(str(tmp_path / "atac.bw"), "w").write({"chr1": 12_000}, signal)
    bed = tmp_path / "list.bed"
    # borders where tiles of 192 bp begin: only what the window has beside the tile crosses them
    bed.write_text("chr1\t0\t4032\tfold4\nchr1\t4032\t8064\tfold0\nchr1\t8064\t12000\tfold3\n")

    def prepared(name: str, folds: dict[str, Any]) -> Experiment:
        source = {"kind": "coverage", "fasta": "genome.fa", "window": 256, "target_length": 192, "bin_size": 16}
        content = source | {"folds": folds, "tracks": [{"name": "atac", "file": str(tmp_path / "atac.bw")}]}
        source = parse_source(content | {"fasta": str(tmp_path / "genome.fa")})
        data = prepare_source(source, tmp_path / name)
        model = {"name": str(published), "trained_on": str(bed)}
        assert ("trunk_folds" in data.info.notes) is (folds["by"] == "trunk")
        return parse_experiment({"data": str(tmp_path / name), "model": model})

    found = plan_run(prepared("clean", {"by": "trunk", "trunk": "toy", "bed": str(bed)}))
    assert found.would_start
    assert found.facts["leak exposure"].startswith("0.0% of the 19 windows of fold 'test'")
    assert "0 its training, 0 its validation, 19 only its test regions, 0 nothing" in found.facts["the trunk saw"]
    leaky = plan_run(prepared("leaky", {"by": "cluster", "valid": 0.2, "test": 0.2}))
    assert "overlap regions that the trunk was pretrained on" in str(leaky.problems[0])


def test_a_run_and_its_export_remember_what_the_trunk_saw(folder: Path, tmp_path: Path, published: Path) -> None:
    bed = toy_list(folder, tmp_path / "list.bed", shift=0)
    model = {"name": str(published), "trained_on": str(bed)}
    fit_run(experiment(folder, model=model, allow_exposure=True), tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["exposure"]
    assert recorded["counts"] == {"train": 4, "valid": 0, "test": 0, "nothing": 0}
    assert (recorded["share"], recorded["allowed"], recorded["fold"]) == (1.0, True, "test")
    assert recorded["problem"].startswith("100.0% of the windows")
    export_run(tmp_path / "run", tmp_path / "grown", name="grown")
    assert json.loads((tmp_path / "grown" / "model.json").read_text())["folds"] == "toy"
    grown = plan_run(experiment(folder, model={"name": str(tmp_path / "grown")}))
    assert "folds of toy: the published regions are not here" in str(grown.problems[0])
    known = plan_run(experiment(folder, model={"name": str(tmp_path / "grown"), "trained_on": str(bed)}))
    assert known.facts["leak exposure"].startswith("100.0%")


# ---- memory ----


def saved_bytes(planned: Experiment, size: int) -> int:
    """What autograd keeps for the backward pass of a batch, weights apart: measured another way than plan does."""
    model, dataset = build_run(planned)
    adapt(model, planned.adapter)
    model.train()
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    sample = dataset.sample(dataset.rows("train")[:size])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective_of(planned, dataset)(model, sample).sum()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("channels", [16, 64])
def test_activations_are_what_autograd_keeps(folder: Path, channels: int) -> None:
    """Also where the weights (0.9 MB with 64 channels) outweigh them: the weights are no part of it."""
    planned = experiment(folder, model={"settings": SETTINGS | {"channels": channels}}, adapter={"kind": "full"})
    cost = cost_of(planned)
    per_row = (saved_bytes(planned, 4) - saved_bytes(planned, 2)) / 2
    assert 0.9 * per_row <= cost.bytes_per_row <= 2 * per_row


class Chain(nn.Module):
    """Known by hand: a chain of element-wise squares, each of which keeps its input."""

    def __init__(self, length: int, weights: int) -> None:
        super().__init__()
        self.length, self.weight = length, nn.Parameter(torch.ones(weights))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.length):
            x = (x * self.weight.sum()).square()
        return x


def test_live_bytes_counts_what_lives() -> None:
    """Five squares of 4000 bytes keep their inputs; what is freed on the way does not count."""
    chain, x = Chain(5, 100_000), torch.ones(1000)
    with seqgraft.memory.LiveBytes() as live:
        y = chain(x)
        kept = live.now
        with torch.no_grad():
            for _ in range(50):
                (x + 1).sum()
        assert live.now == kept
        peak = live.peak
    # each step keeps the product (for the square) and the square (for the next product)
    assert 10 * 4000 <= kept <= 10 * 4000 + 200
    assert peak <= kept + 4000 + 200
    del y
    assert live.now == 0


def test_memory_grows_with_the_batch_and_with_what_trains(folder: Path) -> None:
    full = cost_of(experiment(folder, adapter={"kind": "full"}))
    probe = cost_of(experiment(folder))
    less = cost_of(experiment(folder, adapter={"kind": "full"}, train={"checkpointing": True}))
    assert full.peak_bytes(4) - full.peak_bytes(2) == 2 * full.bytes_per_row > 0
    assert probe.bytes_per_row < full.bytes_per_row
    assert probe.bytes_per_row > 0
    assert probe.fixed_bytes < full.fixed_bytes
    assert 0 < less.bytes_per_row < full.bytes_per_row
    count = sum(p.numel() for p in build_run(experiment(folder))[0].parameters())
    assert full.fixed_bytes >= 4 * 4 * count
    assert full.seconds_per_row > 0


def test_the_longest_sequence_counts(folder: Path) -> None:
    planned = experiment(folder, "labels", adapter={"kind": "full"})
    model, dataset = build_run(planned)
    adapt(model, planned.adapter)
    rows = dataset.rows("train")
    assert dataset.lengths is not None
    lengths = dataset.lengths[rows]
    assert lengths[0] <= 96 < lengths.max()  # 32 bp more than the stride takes
    found = measure_cost(planned, model, dataset)
    for row, same in ((rows[np.argmax(lengths)], True), (rows[np.argmin(lengths)], False)):
        alone = dataset.regions["fold"].where(dataset.regions["fold"] != "train", "unused")
        alone.iloc[int(row)] = "train"
        cost = measure_cost(planned, model, replace(dataset, regions=dataset.regions.assign(fold=alone)))
        assert (cost.bytes_per_row == found.bytes_per_row) is same


def test_largest_batch() -> None:
    cost = Cost(fixed_bytes=1000, bytes_per_row=100, seconds_per_row=1.0)
    assert cost.largest_batch(10_000) == 70
    assert cost.peak_bytes(70) <= 0.8 * 10_000
    assert cost.largest_batch(1000) == 0
    assert Cost(1000, 0, 1.0).largest_batch(10_000) == 7000


@pytest.mark.parametrize(
    ("text", "count"), [("24 GB", 24 * 2**30), ("80GiB", 80 * 2**30), ("1.5 gb", 3 * 2**29), (" 512 MB ", 2**29)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "24", "GB", "24 TB", "-3 GB", "24 GB of memory", "1,5 GB", "nan GB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="--device: this is not an amount of memory"):
        parse_memory(text)


def test_a_card_that_is_too_small(folder: Path) -> None:
    planned = experiment(folder, adapter={"kind": "full"}, train={"batch_size": 64})
    assert plan_run(planned, memory=2**33).would_start
    cost = plan_run(planned, memory=2**33).cost
    assert cost is not None
    between = int((cost.fixed_bytes + 10.5 * cost.bytes_per_row) / 0.8)
    (problem,) = plan_run(planned, memory=between).problems
    assert "Use train.batch_size: 1" in str(problem)
    assert "batches of up to" in plan_run(planned, memory=between).facts["device"]
    (problem,) = plan_run(planned, memory=1000).problems
    assert "train.checkpointing" in str(problem)


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**6, 10**6))
    (problem,) = plan_run(experiment(folder), tmp_path / "deep" / "run").problems
    assert "the disk has 976.6 kB left" in str(problem)


def test_a_folder_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (problem,) = plan_run(experiment(folder), tmp_path / "file" / "run").problems
    assert isinstance(problem, RunError)


def test_planning_leaves_a_model_that_fits(folder: Path) -> None:
    planned = experiment(folder, adapter={"kind": "lora", "rank": 2})
    model, dataset = build_run(planned)
    adapt(model, planned.adapter)
    measure_cost(planned, model, dataset)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
