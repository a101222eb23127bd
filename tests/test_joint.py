"""Joint training: donors, and regions of the tracks that the trunk was pretrained on, in one loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

import seqgraft.train
from builders import tiny_coverage, tiny_pretrained
from seqgraft.adapters import FullFineTune, LinearProbe, LoRA
from seqgraft.data import prepare_source
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset, open_dataset
from seqgraft.data.folds import Folds
from seqgraft.errors import ConfigError, ModelError, RunError
from seqgraft.evaluate import EvaluateConfig
from seqgraft.experiment import Experiment, parse_experiment, settings_of, write_yaml
from seqgraft.export import export_run
from seqgraft.joint import Joint, JointConfig, regions_apart
from seqgraft.losses import MaskedTokens, MeanSquaredError, Poisson
from seqgraft.models.base import undo_link
from seqgraft.models.weights import ModelConfig, build_pretrained
from seqgraft.plan import plan_run
from seqgraft.predict import predict
from seqgraft.run import build_run, evaluate_run, fit_run, objective_of, open_run
from seqgraft.train import TrainConfig
from test_personal import source_of, write_cohort
from test_train import command, finished, log_of, same, started, tensors

TRACKS = ("old+", "old-", "mark")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("cohort")
    source = source_of(write_cohort(folder), gene_folds=Folds(by="random", test=0.25, seed=3))
    return prepare_source(source, folder / "data")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Of another genome; in the units of the model."""
    folder = tmp_path_factory.mktemp("reference") / "data"
    frame = tiny_coverage(folder, 18, TRACKS).tracks.to_frame().assign(scale=1.0)
    frame.to_parquet(folder / "tracks.parquet")
    return open_dataset(folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(str(tiny_pretrained(tmp_path_factory.mktemp("model") / "tiny", TRACKS)), centre=4)


def experiment_of(cohort: Dataset, reference: Dataset, start: ModelConfig, **changes: Any) -> Experiment:
    plain = Experiment(
        data=cohort.folder,
        model=start,
        adapter=LoRA(rank=2, dropout=0.1),
        train=TrainConfig(epochs=2, batch_size=32, head_lr=1e-2, augment=Augmentation(shift=1), save_minutes=0.0),
        evaluate=EvaluateConfig(draws=20, linearity=0),
        joint=JointConfig(reference.folder, weight=0.5, every=4),
    )
    return replace(plain, **changes)


def joint_of(experiment: Experiment, cohort: Dataset) -> Joint:
    objective = objective_of(experiment, cohort)
    assert isinstance(objective, Joint)
    return objective


def test_heads_beside_start_as_pretrained_and_change_no_prediction(
    cohort: Dataset, reference: Dataset, start: ModelConfig
) -> None:
    experiment = experiment_of(cohort, reference, start)
    model, alone = (build_run(one)[0].eval() for one in (experiment, replace(experiment, joint=None)))
    rows = cohort.rows("test")[:8]
    np.testing.assert_array_equal(predict(model, cohort, rows), predict(alone, cohort, rows))
    assert model.beside is not None
    pretrained = build_pretrained(start, reference.info)
    assert pretrained is not None
    regions = np.arange(4)
    sample = joint_of(experiment, cohort).sample(regions, 0, 0)
    with torch.no_grad():
        values = model(replace(sample, codes=reference.sample(regions).codes))
    columns = [pretrained.tracks.names.index(name) for name in reference.tracks.names]
    expected = undo_link(torch.from_numpy(predict(pretrained, reference, regions)), "softplus")
    torch.testing.assert_close(values, expected[:, columns], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(predict(model, cohort, rows), predict(alone, cohort, rows))  # crops are back


def test_terms_are_those_of_both_with_the_weight(cohort: Dataset, reference: Dataset, start: ModelConfig) -> None:
    loss = {"old": MeanSquaredError(), "mark": Poisson()}
    experiment = experiment_of(cohort, reference, start)
    experiment = replace(experiment, joint=JointConfig(reference.folder, weight=0.5, loss=loss))
    joint, model = joint_of(experiment, cohort), build_run(experiment)[0].eval()
    sample = joint.draw(cohort.sample(cohort.rows("train")[:6]), 1, 0)
    assert sample.beside is not None
    assert len(sample.beside) == 6
    assert joint.terms == ["expression", "joint old", "joint mark"]
    with torch.no_grad():
        found, weights = joint(model, sample), joint.weigh(sample)
        values, other = model(sample), softplus(model(sample.beside))
    squares = (other[:, :2] - sample.beside.targets[:, :2]) ** 2
    assert float(found[1]) == pytest.approx(0.5 * float(squares.sum()), rel=1e-5)
    assert weights.tolist() == [6, squares.numel(), sample.beside.targets[:, 2].numel()]
    torch.testing.assert_close(found[:1], joint.main(_Given(values), sample))
    assert joint(model, replace(sample, beside=None))[1:].tolist() == [0, 0]


class _Given(nn.Module):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, sample: object) -> torch.Tensor:
        return self.values


def test_which_regions_come_follows_from_seed_and_epoch(
    cohort: Dataset, reference: Dataset, start: ModelConfig
) -> None:
    joint, rows = joint_of(experiment_of(cohort, reference, start), cohort), cohort.rows("train")

    def brought(parts: list[np.ndarray], seed: int, epoch: int) -> list[int]:
        samples = [joint.draw(cohort.sample(part), seed, epoch) for part in parts]
        return [row for sample in samples if sample.beside is not None for row in sample.beside.row.tolist()]

    order = joint.batches(rows, 16, 1, 0)
    first = brought(order, 1, 0)
    again = brought([half for batch in order for half in np.array_split(batch, 3)], 1, 0)
    assert first == again  # however batches are divided
    assert len(first) == -(-len(rows) // 4)
    known = reference.rows("train")
    for part in np.array_split(first, np.arange(len(known), len(first), len(known))):
        assert len(set(part.tolist())) == len(part)  # all regions before any comes again
    assert set(first) == set(known.tolist())
    assert brought(order, 1, 1) != first
    assert brought(order, 2, 0) != first
    for batch in order:
        assert -(-len(batch) // 4) - 1 <= len(brought([batch], 1, 0)) <= -(-len(batch) // 4) + 1


def test_held_out_windows_are_left_out(cohort: Dataset, reference: Dataset) -> None:
    assert cohort.donors is not None
    assert len(regions_apart(reference, cohort)) == len(reference.rows("train"))  # of another genome
    genes = cohort.donors.genes
    places = pd.DataFrame({"chrom": genes["chrom"], "start": genes["tss"] + 150, "end": genes["tss"] + 342})
    moved = reference.regions.iloc[: len(genes)].assign(**places.to_dict("list"), fold="train")
    same_genome = replace(reference, genome=cohort.genome, regions=moved)
    found = regions_apart(same_genome, cohort)
    assert found.tolist() == np.flatnonzero(genes["fold"] == "train").tolist()
    away = replace(same_genome, regions=moved.assign(start=moved["start"] + 500, end=moved["end"] + 500))
    assert len(regions_apart(away, cohort)) == len(genes)
    held = replace(same_genome, regions=moved[(genes["fold"] == "test").to_numpy()].reset_index(drop=True))
    with pytest.raises(ConfigError, match="all of its training regions touch windows that are held out"):
        regions_apart(held, cohort)


class Stop(BaseException):
    """An interruption that nothing may catch."""


@pytest.mark.parametrize("cache", ["off", "float32"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    cohort: Dataset, reference: Dataset, start: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    experiment = experiment_of(cohort, reference, start)
    experiment = replace(experiment, train=replace(experiment.train, cache=cache))
    fit_run(experiment, tmp_path / "whole")
    step, taken = seqgraft.train._step, 0

    def interrupted(*args: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 8:
            raise Stop
        return step(*args)

    monkeypatch.setattr(seqgraft.train, "_step", interrupted)
    with pytest.raises(Stop):
        fit_run(experiment, tmp_path / "run")
    monkeypatch.undo()
    fit_run(experiment, tmp_path / "run", resume=True)
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    whole, run = (open_run(tmp_path / name).model for name in ("whole", "run"))
    assert same(tensors(whole), tensors(run))
    untrained = build_run(experiment)[0]
    assert whole.beside is not None
    assert untrained.beside is not None
    assert not same(tensors(whole.beside.heads), tensors(untrained.beside.heads))
    changed = JointConfig(reference.folder, weight=0.25, every=4)
    with pytest.raises(RunError, match=r"other settings.*joint"):
        fit_run(replace(experiment, joint=changed), tmp_path / "run", resume=True)


def test_the_cache_changes_nothing(cohort: Dataset, reference: Dataset, start: ModelConfig, tmp_path: Path) -> None:
    experiment = experiment_of(cohort, reference, start, adapter=LinearProbe())
    for cache in ("off", "float32"):
        fit_run(replace(experiment, train=replace(experiment.train, cache=cache)), tmp_path / cache)  # type: ignore[arg-type]
    for left, right in zip(log_of(tmp_path / "off"), log_of(tmp_path / "float32"), strict=True):
        assert float(left["train_loss"]) == pytest.approx(float(right["train_loss"]), rel=1e-4)
    result = json.loads((tmp_path / "float32" / "environment.json").read_text())["result"]
    assert "float32" in result["cache"]


def test_two_processes_are_one_with_twice_the_batch(
    cohort: Dataset, reference: Dataset, start: ModelConfig, tmp_path: Path
) -> None:
    """With so few regions that some batches of a process bring none."""
    experiment = experiment_of(cohort, reference, start, adapter=FullFineTune())
    train = replace(experiment.train, epochs=1, lr=1e-3, batch_size=6, accumulate=2)
    experiment = replace(experiment, train=train, joint=JointConfig(reference.folder, weight=0.5, every=9))
    write_yaml(tmp_path / "experiment.yaml", settings_of(experiment))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    arguments = command(tmp_path / "experiment.yaml", tmp_path / "two", "--set", "train.accumulate=1")
    two = started([arguments[0], *torchrun, *arguments[2:]], tmp_path / "two.log")
    fit_run(experiment, tmp_path / "one")
    finished(two, tmp_path / "two.log")
    for left, right in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("train_loss", "valid_loss"):
            assert float(left[name]) == pytest.approx(float(right[name]), rel=1e-4), name
        assert left["step"] == right["step"]


def test_forgetting_is_that_of_the_heads_that_trained_along(
    cohort: Dataset, reference: Dataset, start: ModelConfig, tmp_path: Path
) -> None:
    experiment = experiment_of(cohort, reference, start)
    fit_run(experiment, tmp_path / "run")
    found = evaluate_run(tmp_path / "run").metrics
    rows = found[found["metric"].isin(["original_pearson", "forgetting"])]
    assert set(rows["model"]) == {"pretrained, before", experiment.adapter.label}
    run = open_run(tmp_path / "run")
    assert run.model.beside is not None
    regions = reference.rows("test")
    with torch.no_grad():
        after = softplus(run.model(replace(reference.sample(regions), of_beside=True))).numpy()
    truth = reference.squashed_targets(regions)
    own = rows[(rows["model"] == experiment.adapter.label) & (rows["metric"] == "original_pearson")]
    expected = np.corrcoef(truth[:, 2].ravel(), after[:, 2].ravel())[0, 1]
    assert own[own["group"] == "mark"]["value"].iloc[0] == pytest.approx(expected, abs=1e-4)


def test_an_exported_model_has_the_heads_that_trained_along(
    cohort: Dataset, reference: Dataset, start: ModelConfig, tmp_path: Path
) -> None:
    experiment = experiment_of(cohort, reference, start, adapter=LoRA(rank=2))
    fit_run(experiment, tmp_path / "run")
    run, regions = open_run(tmp_path / "run"), reference.rows("test")
    with torch.no_grad():
        expected = softplus(run.model(replace(reference.sample(regions), of_beside=True)))
    export_run(tmp_path / "run", tmp_path / "model", name="grown")
    exported = build_pretrained(ModelConfig(str(tmp_path / "model")), reference.info)
    assert exported is not None
    assert exported.tracks.names == reference.tracks.names
    np.testing.assert_allclose(predict(exported, reference, regions), expected, rtol=1e-4, atol=1e-5)


def test_a_plan_says_what_trains_along_and_what_it_takes(
    cohort: Dataset, reference: Dataset, start: ModelConfig
) -> None:
    experiment = experiment_of(cohort, reference, start)
    with_it, without = plan_run(experiment), plan_run(replace(experiment, joint=None))
    assert with_it.would_start
    known = len(reference.rows("train"))
    assert with_it.facts["joint"].startswith(f"{known} of {known} regions of {reference.folder}, one for 4 examples")
    assert with_it.cost is not None
    assert without.cost is not None
    assert with_it.cost.bytes_per_row > without.cost.bytes_per_row
    assert "joint" not in without.facts


def test_what_cannot_train_along(cohort: Dataset, reference: Dataset, start: ModelConfig, tmp_path: Path) -> None:
    experiment = experiment_of(cohort, reference, start)
    with pytest.raises(ModelError, match="joint: tracks can train along on a pretrained model alone: 'convnet'"):
        build_run(replace(experiment, model=ModelConfig()))
    others = tiny_coverage(tmp_path / "others", 12, ("new+", "new-"))
    with pytest.raises(ModelError, match="the pretrained heads have no tracks of these names"):
        build_run(replace(experiment, joint=JointConfig(others.folder)))
    units = tiny_coverage(tmp_path / "units", 12, TRACKS)
    with pytest.raises(ModelError, match="has another scale than in the pretrained model"):
        build_run(replace(experiment, joint=JointConfig(units.folder)))
    with pytest.raises(ConfigError, match="masked tokens are the whole loss"):
        objective_of(replace(experiment, loss=MaskedTokens()), cohort)
    with pytest.raises(ConfigError, match=r"joint\.weight: must be above 0"):
        parse_experiment({"data": "x", "joint": {"data": "y", "weight": 0}})
    with pytest.raises(ConfigError, match=r"joint\.every: must be 1 or more"):
        parse_experiment({"data": "x", "joint": {"data": "y", "every": 0}})
    parsed = parse_experiment({"data": "x", "joint": {"data": "y", "loss": {"kind": "mse"}}})
    assert parse_experiment(settings_of(parsed)) == parsed
