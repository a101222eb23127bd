"""The loop: what is frozen stays, seeds decide everything, and an interrupted run ends as an uninterrupted one."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import seqgraft.train
from builders import SETTINGS, settled_trunk, tiny_coverage, tiny_labels, tiny_pretrained, track_table
from seqgraft.adapters import Adapter, FullFineTune, LinearProbe, LoRA, adapt
from seqgraft.data.augment import FORWARD, Augmentation, View
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError, ModelError, RunError
from seqgraft.experiment import parse_experiment, read_experiment
from seqgraft.losses import MeanSquaredError, Poisson
from seqgraft.models.base import Head, SequenceModel
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.objectives import Elementwise, Objective
from seqgraft.run import fit_run, objective_of
from seqgraft.sample import Sample
from seqgraft.sequence import reverse_complement
from seqgraft.train import FitResult, TrainConfig, fit, parameter_groups, validate

PLAIN = Augmentation(reverse_complement=False, shift=0)
FAST = TrainConfig(epochs=2, batch_size=4, lr=1e-2)


@pytest.fixture(scope="module")
def coverage(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_coverage(tmp_path_factory.mktemp("coverage") / "data")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Fifteen training regions, a third of the bins masked."""
    return tiny_coverage(tmp_path_factory.mktemp("masked") / "data", regions=22, missing=0.3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(dataset: Dataset, adapter: Adapter, seed: int = 0) -> SequenceModel:
    """A tiny model with BatchNorm statistics of its own, adapted."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(settings=SETTINGS), dataset.tracks, dataset.info)
    crop = model.trunk.stages["crop"].bins
    model.trunk = settled_trunk(seed, crop=crop)
    adapt(model, adapter)
    return model


def run(
    dataset: Dataset,
    folder: Path,
    config: TrainConfig = FAST,
    adapter: Adapter | None = None,
    objective: Objective | None = None,
    *,
    resume: bool = False,
) -> tuple[SequenceModel, FitResult]:
    model = make(dataset, adapter or FullFineTune())
    torch.seed()  # what was drawn before must not matter
    folder.mkdir(exist_ok=True)
    result = fit(model, dataset, objective or Elementwise(dataset.tracks), config, folder, resume=resume)
    return model, result


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(folder: Path) -> list[dict[str, str]]:
    """``log.csv`` without the seconds."""
    with (folder / "log.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


# ---- settings ----


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"patience": -1},
        {"seed": -1},
        {"lr": 0.0},
        {"lr": math.inf},
        {"head_lr": -1.0},
        {"clip": 0.0},
        {"warmup": 1.0},
        {"weight_decay": -0.1},
        {"save_minutes": math.nan},
    ],
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"train.{next(iter(wrong))}"):
        TrainConfig(**wrong)  # type: ignore[arg-type]


# ---- frozen means frozen ----


@pytest.mark.parametrize("adapter", [LinearProbe(), LoRA(rank=2)], ids=lambda a: a.kind)
def test_a_frozen_trunk_does_not_move(coverage: Dataset, tmp_path: Path, adapter: Adapter) -> None:
    model, _ = run(coverage, tmp_path / "run", adapter=adapter)
    after, before = tensors(model.trunk), tensors(settled_trunk(0))
    old = {name.replace(".base_layer", ""): value for name, value in after.items() if "lora_" not in name}
    assert same(old, before)
    assert any("running_mean" in name for name in old)
    assert not any(module.training for module in model.modules())


def test_a_frozen_tensor_that_moves_is_found(
    coverage: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = seqgraft.train._step

    def careless(accelerator: object, wrapped: object, model: SequenceModel, *rest: object) -> object:
        model.trunk.stages["tower_0"].norm.running_mean += 1e-6
        return step(accelerator, wrapped, model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(seqgraft.train, "_step", careless)
    with pytest.raises(ModelError, match="frozen tensors have changed"):
        run(coverage, tmp_path / "run", adapter=LinearProbe())


@pytest.mark.parametrize(("statistics", "moves"), [("frozen", False), ("batch", True)])
def test_statistics_of_a_trunk_that_trains(coverage: Dataset, tmp_path: Path, statistics: str, moves: bool) -> None:
    model, _ = run(coverage, tmp_path / "run", adapter=FullFineTune(statistics=statistics))  # type: ignore[arg-type]
    before, after = tensors(settled_trunk(0)), tensors(model.trunk)
    for name in before:
        weights_or_moving = moves or "running" not in name
        if "num_batches" not in name:
            assert torch.equal(before[name], after[name]) is not weights_or_moving, name


# ---- the same seed ----


def test_a_seed_decides_everything(coverage: Dataset, tmp_path: Path) -> None:
    first, result = run(coverage, tmp_path / "first", adapter=LoRA(rank=2, dropout=0.2))
    torch.rand(7)
    again, repeated = run(coverage, tmp_path / "again", adapter=LoRA(rank=2, dropout=0.2))
    other, _ = run(coverage, tmp_path / "other", replace(FAST, seed=2), adapter=LoRA(rank=2, dropout=0.2))
    assert same(tensors(first), tensors(again))
    assert not same(tensors(first), tensors(other))
    assert replace(result, seconds=0, peak_memory_bytes=0) == replace(repeated, seconds=0, peak_memory_bytes=0)
    assert log_of(tmp_path / "first") == log_of(tmp_path / "again")


def test_log_and_result_agree(coverage: Dataset, tmp_path: Path) -> None:
    model, result = run(coverage, tmp_path / "run", replace(FAST, epochs=4, lr=3e-3))
    log = log_of(tmp_path / "run")
    assert [int(row["epoch"]) for row in log] == [1, 2, 3, 4]
    assert [int(row["step"]) for row in log] == [4, 8, 12, 16]
    assert result.steps == 16
    scores = [float(row["valid_score"]) for row in log]
    assert result.best_score == max(scores)
    assert result.best_epoch == 1 + scores.index(max(scores))
    assert float(log[-1]["train_loss"]) < float(log[0]["train_loss"])
    # the model holds the best weights, and they give that score
    loss, score = validate(model, coverage, coverage.rows("valid"), Elementwise(coverage.tracks), FAST)
    assert score == result.best_score
    assert loss == float(log[result.best_epoch - 1]["valid_loss"])
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == [
        "best.safetensors",
        "checkpoints",
        "last.safetensors",
        "log.csv",
    ]


def test_the_logged_loss_is_the_mean_over_the_steps(coverage: Dataset, tmp_path: Path) -> None:
    """With a learning rate that moves nothing, it can be computed from outside."""
    config = replace(FAST, lr=1e-12, epochs=1, augment=PLAIN, batch_size=5)
    model, _ = run(coverage, tmp_path / "run", config, LinearProbe())
    objective = Elementwise(coverage.tracks)
    losses = []
    for rows in objective.batches(coverage.rows("train"), 5, config.seed, 0):
        sample = coverage.sample(rows)
        losses.append(float((objective(model, sample) / objective.weigh(sample)).sum().detach()))
    assert float(log_of(tmp_path / "run")[0]["train_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_batches_are_all_rows_once_in_an_order_of_their_own(coverage: Dataset) -> None:
    objective = Elementwise(coverage.tracks)
    rows = coverage.rows("train")
    batches = objective.batches(rows, 5, seed=1, epoch=0)
    assert [len(batch) for batch in batches] == [5, 5, 5, 1]
    assert sorted(np.concatenate(batches)) == sorted(rows)
    assert np.array_equal(np.concatenate(batches), np.concatenate(objective.batches(rows, 3, seed=1, epoch=0)))
    others = [objective.batches(rows, 16, seed, epoch)[0] for seed, epoch in ((1, 1), (2, 0), (2, 1))]
    assert len({tuple(order) for order in [np.concatenate(batches), *others]}) == 4


def test_batches_have_sequences_of_like_length(coverage: Dataset) -> None:
    """Every row once, padding a tenth of what it was, batches in no order of length, and other ones each epoch."""
    lengths = np.random.default_rng(0).integers(50, 501, 5000)
    rows = np.random.default_rng(1).permutation(5000)[:4003]
    plain, sorted_ = (Elementwise(coverage.tracks, lengths=given) for given in (None, lengths))

    def padding(batches: list[npt.NDArray[np.int64]]) -> float:
        return 1 - lengths[np.concatenate(batches)].sum() / sum(len(b) * lengths[b].max() for b in batches)

    batches = sorted_.batches(rows, 32, seed=1, epoch=0)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.sort(rows))
    assert sorted(len(batch) for batch in batches) == sorted(len(batch) for batch in plain.batches(rows, 32, 1, 0))
    assert padding(batches) < 0.1 * padding(plain.batches(rows, 32, 1, 0))
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3
    again, later, other = (sorted_.batches(rows, 32, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0)))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    together = [{frozenset(batch.tolist()) for batch in each} for each in (batches, later, other)]
    assert not together[0] & together[1]
    assert not together[0] & together[2]


def test_batches_of_equal_lengths_are_as_without(coverage: Dataset) -> None:
    rows = np.arange(3, 100)
    lengths = np.full(100, 70)
    lengths[:3] = 50  # of other rows
    plain, same = (Elementwise(coverage.tracks, lengths=given).batches(rows, 8, 1, 2) for given in (None, lengths))
    assert all(np.array_equal(a, b) for a, b in zip(plain, same, strict=True))
    assert Elementwise(coverage.tracks, lengths=lengths).batches(rows[:0], 8, 1, 2) == []


@pytest.mark.parametrize("buckets", [True, False])
def test_a_run_reads_the_lengths_of_its_data(tmp_path: Path, buckets: bool) -> None:
    data = tiny_labels(tmp_path / "data", rows=60)
    experiment = parse_experiment({"data": str(data.folder), "train": {"buckets": buckets}})
    batches = objective_of(experiment, data).batches(data.rows("train"), 8, 1, 0)
    spread = max(int(np.ptp(data.lengths[batch])) for batch in batches)  # type: ignore[index]
    assert (spread < 25) == buckets


# ---- augmentation ----


def test_augmentation_is_a_function_of_seed_epoch_and_index() -> None:
    augmentation = Augmentation(shift=2)
    draws = {(s, e, i): augmentation.draw(s, e, i) for s in (1, 2) for e in (0, 1) for i in range(40)}
    assert all(augmentation.draw(*key) == draws[key] for key in reversed(draws))
    assert set(draws.values()) == set(augmentation.views())
    assert len(augmentation.views()) == 10
    assert augmentation.views()[0] == FORWARD
    by_epoch = [[draws[s, e, i] for i in range(40)] for s in (1, 2) for e in (0, 1)]
    assert len({tuple(views) for views in by_epoch}) == 4


def test_a_shift_moves_the_sequence_and_not_the_targets(coverage: Dataset) -> None:
    plain, shifted = coverage.sample([3]), coverage.sample([3], [View(shift=2)])
    assert torch.equal(shifted.codes[0, :-2], plain.codes[0, 2:])
    assert torch.equal(shifted.targets, plain.targets)


def test_the_other_strand(coverage: Dataset) -> None:
    """Bases turn round, bins turn round, + and - change places: on data that count A and T the truth still holds."""
    plain, turned = coverage.sample([3, 4]), coverage.sample([3, 4], [View(reverse=True), FORWARD])
    assert np.array_equal(turned.codes[0].numpy(), reverse_complement(plain.codes[:1].numpy())[0])
    assert torch.equal(turned.targets[0], plain.targets[0][[1, 0, 2]].flip(-1))
    assert torch.equal(turned.targets[1], plain.targets[1])
    inside = turned.codes[0, 32:-32].view(12, 16)
    for track, bases in enumerate(((0,), (3,), (1, 2))):
        counted = sum((inside == base).sum(-1) for base in bases)
        assert torch.allclose(turned.targets[0, track] / 0.25, counted.float(), atol=0.5)  # type: ignore[union-attr]


def test_a_sample_does_not_depend_on_its_batch(masked: Dataset, tmp_path: Path) -> None:
    for dataset in (masked, tiny_labels(tmp_path / "labels")):
        views = [View(reverse=True), FORWARD, View(reverse=True, shift=1)]
        together = dataset.sample([5, 2, 9], views)
        for place, row in enumerate((5, 2, 9)):
            alone = dataset.sample([row], [views[place]])
            assert torch.equal(together.codes[place, : alone.codes.shape[1]], alone.codes[0])
            assert torch.equal(together.targets[place], alone.targets[0])
            assert torch.equal(together.mask[place], alone.mask[0])


# ---- learning rates ----


def test_each_part_has_its_learning_rate(coverage: Dataset) -> None:
    config = TrainConfig(lr=1e-3, head_lr=1e-2, trunk_lr=1e-5, weight_decay=0.1)
    for adapter, parts in ((LinearProbe(), {1e-2}), (LoRA(rank=2), {1e-3, 1e-2}), (FullFineTune(), {1e-5, 1e-2})):
        groups = parameter_groups(make(coverage, adapter), config)
        assert {group["lr"] for group in groups} == parts
        for group in groups:
            assert group["base_lr"] == group["lr"]
            assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    assert {group["lr"] for group in parameter_groups(make(coverage, FullFineTune()), TrainConfig(lr=0.5))} == {0.5}


def test_learning_rates_move_each_part_by_its_own(coverage: Dataset, tmp_path: Path) -> None:
    config = replace(FAST, lr=1e-3, head_lr=1e-2, trunk_lr=1e-4, warmup=0, schedule="constant", epochs=1, batch_size=16)
    model, _ = run(coverage, tmp_path / "run", config)
    start = make(coverage, FullFineTune())
    changes = {
        n: float((p - q).detach().abs().max())
        for (n, p), q in zip(model.named_parameters(), start.parameters(), strict=True)
    }
    assert max(v for n, v in changes.items() if n.startswith("heads")) == pytest.approx(1e-2, rel=0.05)
    assert max(v for n, v in changes.items() if n.startswith("trunk")) == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5, 99: 0.5 * (1 + math.cos(math.pi * 89 / 90))}),
        ("constant", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 1.0, 99: 1.0}),
    ],
)
def test_warmup_and_schedule(schedule: str, expected: dict[int, float]) -> None:
    config = TrainConfig(lr=1.0, warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], "base_lr": 2.0}])
    for step, factor in expected.items():
        seqgraft.train._set_learning_rates(optimizer, config, step, 100)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * factor)


# ---- accumulation ----


@pytest.mark.parametrize("link", ["softplus", "identity"])
def test_accumulation_is_a_larger_batch(masked: Dataset, tmp_path: Path, link: str) -> None:
    """Masked targets weigh the micro-batches differently, and 15 rows leave an uneven last step of 7."""
    dataset = masked.select_tracks(masked.tracks.replace(link=link))
    objective = Elementwise(dataset.tracks)
    assert len(dataset.rows("train")) == 15
    runs = {}
    for batch, accumulate in ((8, 1), (4, 2), (3, 3), (2, 4), (1, 8)):
        config = replace(FAST, batch_size=batch, accumulate=accumulate, lr=1e-3)
        folder = tmp_path / f"{batch}x{accumulate}"
        runs[batch * accumulate, batch] = tensors(run(dataset, folder, config, objective=objective)[0]), log_of(folder)
    whole, log = runs[8, 8]
    for other, lines in (runs[8, 4], runs[8, 2], runs[8, 1]):
        assert all(torch.allclose(whole[name], other[name], atol=1e-4, rtol=0) for name in whole)
        for line, expected in zip(lines, log, strict=True):
            assert float(line["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=1e-6)


def test_gradients_of_micro_batches_add_up(masked: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Tensor]] = []
    check = seqgraft.train.check_gradients

    def keep(model: SequenceModel, *args: object, **kwargs: object) -> object:
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return check(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(seqgraft.train, "check_gradients", keep)
    first = []
    for batch, accumulate in ((8, 1), (4, 2), (3, 3)):
        size = replace(FAST, batch_size=batch, accumulate=accumulate, epochs=1, clip=1e9)
        run(masked, tmp_path / f"{batch}", size)
        first.append(found[0])
        found.clear()
    assert all(torch.allclose(first[0][name], first[1][name], atol=1e-6, rtol=1e-5) for name in first[0])
    assert not torch.allclose(first[0]["heads.new_atac.out.bias"], first[2]["heads.new_atac.out.bias"], atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_has_as_many_micro_batches(coverage: Dataset, size: int, world: int) -> None:
    rows = coverage.rows("train")[:size]
    config = replace(FAST, batch_size=3, accumulate=2, augment=PLAIN)
    micro = [
        list(seqgraft.train._micro_batches(coverage, rows, config, 0, world, rank, torch.device("cpu")))
        for rank in range(world)
    ]
    if size > 6 * world:
        return  # more than a step takes
    assert len({len(samples) for samples in micro}) == 1
    assert all(1 <= len(sample) <= 3 for samples in micro for sample in samples)
    counted = [int(row) for samples in micro for s in samples if s.mask.any() for row in s.row]
    assert sorted(counted) == sorted(rows)


# ---- stopping ----


def score_sequence(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> None:
    left = iter(scores)
    monkeypatch.setattr(seqgraft.train, "validate", lambda *_: (1.0, next(left)))


@pytest.mark.parametrize(
    ("patience", "scores", "epochs", "best"),
    [
        (2, [0.1, 0.3, 0.2, 0.3, 0.9], 4, 2),
        (1, [0.1, 0.1, 0.9], 2, 1),
        (0, [0.5, 0.4, 0.3, 0.2, 0.1], 5, 1),
        (3, [-3.0, -2.0, -2.5, -1.0, -4.0], 5, 4),
    ],
)
def test_patience(
    coverage: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patience: int,
    scores: list[float],
    epochs: int,
    best: int,
) -> None:
    score_sequence(monkeypatch, scores)
    config = replace(FAST, epochs=5, patience=patience)
    model, result = run(coverage, tmp_path / "run", config, LinearProbe())
    assert (result.epochs, result.best_epoch, result.best_score) == (epochs, best, scores[best - 1])
    monkeypatch.undo()
    score_sequence(monkeypatch, [*scores[: best - 1], 1e9, -1e9, -1e9, -1e9, -1e9])
    again, _ = run(coverage, tmp_path / "again", replace(config, patience=5), LinearProbe())
    assert same(tensors(model.heads), tensors(again.heads)), "the best epoch's weights are loaded"


# ---- resume ----


class Stop(BaseException):
    """An interruption that nothing may catch."""


@pytest.mark.parametrize("after", [1, 3, 4, 6, 7, 8])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    masked: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Within an epoch, at its end and in the last one; with dropout, moving statistics and two interruptions."""
    adapter = FullFineTune(statistics="batch") if after % 2 else LoRA(rank=2, dropout=0.3)
    config = replace(FAST, save_minutes=0.0)
    whole, result = run(masked, tmp_path / "whole", config, adapter)
    step = seqgraft.train._step
    for stop in (after, 2):
        taken = 0

        def interrupted(*args: object, stop: int = stop) -> object:
            nonlocal taken
            if taken == stop:
                raise Stop
            taken += 1
            return step(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(seqgraft.train, "_step", interrupted)
        try:
            run(masked, tmp_path / "run", config, adapter, resume=True)
        except Stop:
            torch.rand(5)
    monkeypatch.undo()
    resumed, again = run(masked, tmp_path / "run", config, adapter, resume=True)
    assert same(tensors(whole), tensors(resumed))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    assert replace(result, seconds=0, peak_memory_bytes=0) == replace(again, seconds=0, peak_memory_bytes=0)


@pytest.mark.parametrize("write", ["last", "best", "log"])
def test_a_kill_between_two_files(
    coverage: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    """At the end of an epoch best, last and the log are written one after the other."""
    run(coverage, tmp_path / "whole", FAST, LinearProbe())
    replaced = os.replace
    seen = 0

    def killed(source: Path, target: Path) -> None:
        nonlocal seen
        if Path(target).name.startswith(write):
            seen += 1
            if seen == 2:
                raise Stop
        replaced(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Stop):
        run(coverage, tmp_path / "run", FAST, LinearProbe())
    monkeypatch.undo()
    run(coverage, tmp_path / "run", FAST, LinearProbe(), resume=True)
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    best = [load_file(tmp_path / name / "checkpoints" / "best.safetensors") for name in ("run", "whole")]
    assert same(*best)


def test_resuming_a_finished_run_trains_no_more(coverage: Dataset, tmp_path: Path) -> None:
    model, result = run(coverage, tmp_path / "run", adapter=LinearProbe())
    again, repeated = run(coverage, tmp_path / "run", adapter=LinearProbe(), resume=True)
    assert repeated.steps == result.steps
    assert same(tensors(model), tensors(again))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": replace(FAST, lr=1e-4)}, "train"),
        ({"config": replace(FAST, seed=3)}, "train"),
        ({"adapter": LoRA(rank=4)}, "adapter"),
        ({"adapter": LoRA(rank=2, alpha=7)}, "adapter"),
        ({"objective": "toy"}, "objective"),
        ({"dataset": "other"}, "dataset"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    coverage: Dataset, masked: Dataset, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    run(coverage, tmp_path / "run", replace(FAST, epochs=1), LoRA(rank=2))
    settings: dict[str, object] = {"config": replace(FAST, epochs=1), "adapter": LoRA(rank=2)} | change
    dataset = masked if settings.pop("dataset", None) else coverage
    objective = PairDifference() if settings.pop("objective", None) else None
    with pytest.raises(RunError, match=f"other settings or data .*{named}"):
        run(dataset, tmp_path / "run", objective=objective, resume=True, **settings)  # type: ignore[arg-type]


def test_a_trunk_with_other_weights_is_refused(coverage: Dataset, tmp_path: Path) -> None:
    run(coverage, tmp_path / "run", adapter=LinearProbe())
    model = make(coverage, LinearProbe(), seed=5)
    with pytest.raises(RunError, match="weights"):
        fit(model, coverage, Elementwise(coverage.tracks), FAST, tmp_path / "run", resume=True)


def test_what_may_change_on_resume(coverage: Dataset, tmp_path: Path) -> None:
    run(coverage, tmp_path / "run", replace(FAST, patience=1), LinearProbe())
    run(coverage, tmp_path / "run", replace(FAST, patience=4, save_minutes=1), LinearProbe(), resume=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "foreign", "tensors"])
def test_damaged_checkpoints_are_refused(coverage: Dataset, tmp_path: Path, damage: str) -> None:
    run(coverage, tmp_path / "run", adapter=LinearProbe())
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    content = last.read_bytes()
    if damage == "truncated":
        last.write_bytes(content[:-40])
    elif damage == "empty":
        last.write_bytes(b"")
    elif damage == "noise":
        last.write_bytes(np.random.default_rng(0).bytes(500))
    elif damage == "foreign":
        save_file({"x": torch.zeros(2)}, last)
    else:
        from safetensors import safe_open

        with safe_open(last, framework="pt") as file:
            facts = file.metadata()
        save_file({**load_file(last), "model.heads.new_rna.out.bias": torch.zeros(7)}, last, metadata=facts)
    with pytest.raises(RunError) as caught:
        run(coverage, tmp_path / "run", adapter=LinearProbe(), resume=True)
    assert "last.safetensors" in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_checkpoint_that_cannot_be_written(
    coverage: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seqgraft.train, "save_file", full)
    with pytest.raises(RunError, match=r"No space left.*--resume"):
        run(coverage, tmp_path / "run", adapter=LinearProbe())
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# ---- numbers that are none ----


def test_a_loss_that_is_not_finite(coverage: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Elementwise):
        def __call__(self, model: nn.Module, sample: Sample) -> Tensor:
            return super().__call__(model, sample) * math.nan

    with pytest.raises(ModelError, match="epoch 1, step 1: the loss is not finite: nan"):
        run(coverage, tmp_path / "run", objective=Broken(coverage.tracks))


def test_a_score_that_is_undefined(coverage: Dataset, tmp_path: Path) -> None:
    flat = replace(coverage, targets=np.ones_like(coverage.targets))
    with pytest.raises(ModelError, match="undefined for every track"):
        run(flat, tmp_path / "run", adapter=LinearProbe())


def test_a_metric_that_does_not_suit(coverage: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not suit"):
        run(coverage, tmp_path / "run", replace(FAST, metric="auroc"), LinearProbe())


def test_a_lower_is_better_metric_picks_the_lowest(coverage: Dataset, tmp_path: Path) -> None:
    _, result = run(coverage, tmp_path / "run", replace(FAST, metric="mse", epochs=3), LinearProbe())
    scores = [float(row["valid_score"]) for row in log_of(tmp_path / "run")]
    assert all(score < 0 for score in scores)
    assert result.best_score == max(scores)


def test_a_fold_without_regions(coverage: Dataset, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    model = make(coverage, LinearProbe())
    with pytest.raises(ConfigError, match="no region is in the fold"):
        fit(model, coverage, Elementwise(coverage.tracks), FAST, tmp_path / "run", valid_fold="dev")


def test_a_group_without_labels_in_the_first_steps_is_no_error(tmp_path: Path) -> None:
    """The guard against dead tensors must not take missing labels for one; a head that nothing uses is one."""
    data = tiny_coverage(tmp_path / "data", tracks=("a", "b"), link="identity")
    known = np.ones(data.targets.shape, dtype=bool)
    order = np.concatenate(Elementwise(data.tracks).batches(data.rows("train"), 2, FAST.seed, 0))
    known[order[:14], 1] = False
    sparse = replace(data, mask=known)
    run(sparse, tmp_path / "run", replace(FAST, batch_size=2, epochs=1))

    class OneGroup(Elementwise):
        def __call__(self, model: nn.Module, sample: Sample) -> Tensor:
            return super().__call__(model, sample) * torch.tensor([1.0, 0.0])

    with pytest.raises(ModelError, match=r"always zero.*heads.new_b"):
        run(data, tmp_path / "dead", replace(FAST, batch_size=2), objective=OneGroup(data.tracks))


# ---- precision, trackers, objectives, groups ----


def test_bf16_is_close(coverage: Dataset, tmp_path: Path) -> None:
    config = replace(FAST, epochs=3, lr=1e-3)
    _, full = run(coverage, tmp_path / "full", config)
    model, half = run(coverage, tmp_path / "half", replace(config, precision="bf16"))
    assert all(p.dtype == torch.float32 and bool(torch.isfinite(p).all()) for p in model.parameters())
    losses = [[float(row["train_loss"]) for row in log_of(tmp_path / name)] for name in ("full", "half")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert half.best_score == pytest.approx(full.best_score, abs=0.1)


def test_checkpointing_trains_the_same(coverage: Dataset, tmp_path: Path) -> None:
    for number, adapter in enumerate((FullFineTune(statistics="batch"), LoRA(rank=2, dropout=0.2))):
        plain, _ = run(coverage, tmp_path / f"plain{number}", FAST, adapter)
        less, _ = run(coverage, tmp_path / f"less{number}", replace(FAST, checkpointing=True), adapter)
        assert same(tensors(plain), tensors(less))


def test_tensorboard(coverage: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(coverage, tmp_path / "run", replace(FAST, tracker="tensorboard"), LinearProbe())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = [EventAccumulator(str(path)).Reload() for path in (tmp_path / "run").rglob("events.out.tfevents.*")]
    (found,) = (events for events in files if {"train_loss", "valid_score"} <= set(events.Tags()["scalars"]))
    logged = [event.value for event in found.Scalars("train_loss")]
    assert logged == pytest.approx([float(row["train_loss"]) for row in log_of(tmp_path / "run")])


class PairDifference:
    """A custom objective: neighbours in a batch, and the difference of their means."""

    terms = ("difference",)

    def batches(self, rows: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        order = order[: len(order) // 2 * 2]
        return [order[start : start + size] for start in range(0, len(order), size)]

    @staticmethod
    def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
        even = len(values) // 2 * 2
        return values[0:even:2].mean(-1), values[1:even:2].mean(-1)

    def draw(self, sample: Sample, seed: int, epoch: int) -> Sample:
        return sample

    def weigh(self, sample: Sample) -> Tensor:
        first, second = self._halves(sample.mask.float())
        return (first * second).sum()[None]

    def __call__(self, model: nn.Module, sample: Sample) -> Tensor:
        (a, b), (c, d) = self._halves(model(sample).float()), self._halves(sample.targets)
        first, second = self._halves(sample.mask.float())
        return (((a - b) - (c - d)).square() * first * second).sum()[None]


def test_an_objective_of_ones_own(coverage: Dataset, tmp_path: Path) -> None:
    config = replace(FAST, epochs=10, lr=1e-2, augment=PLAIN, patience=0)
    dataset = coverage.select_tracks(coverage.tracks.replace(link="identity"))
    run(dataset, tmp_path / "run", config, objective=PairDifference())
    losses = [float(row["train_loss"]) for row in log_of(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]


def test_groups_with_links_and_losses_of_their_own(tmp_path: Path) -> None:
    data = tiny_coverage(
        tmp_path / "data", tracks=("rna", "score"), links=("softplus", "identity"), groups=("counts", "scores")
    )
    objective = Elementwise(data.tracks, {"scores": MeanSquaredError(), "counts": Poisson()})
    assert objective.terms == ["counts", "scores"]
    sample = data.sample(data.rows("train")[:3])
    model = make(data, LinearProbe())
    values = model(sample)
    totals, weights = objective(model, sample), objective.weigh(sample)
    rate = nn.functional.softplus(values[:, 0])
    expected = [
        (rate - sample.targets[:, 0] * (rate + 1e-7).log()).sum(),
        (values[:, 1] - sample.targets[:, 1]).square().sum(),
    ]
    assert totals.tolist() == pytest.approx([float(value.detach()) for value in expected], rel=1e-5)
    assert weights.tolist() == [36, 36]
    _, result = run(data, tmp_path / "run", replace(FAST, epochs=4), objective=objective)
    losses = [float(row["train_loss"]) for row in log_of(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert math.isfinite(result.best_score)
    with pytest.raises(ConfigError, match="groups of tracks that do not exist"):
        Elementwise(data.tracks, {"marks": Poisson()})


@pytest.mark.parametrize("link", ["sigmoid", "identity", "softmax"])
def test_labels_of_different_lengths_train(tmp_path: Path, link: str) -> None:
    data = tiny_labels(tmp_path / "data", link, missing=0.1 if link != "softmax" else 0)
    run(data, tmp_path / "run", replace(FAST, epochs=4, lr=3e-3, patience=0))
    losses = [float(row["train_loss"]) for row in log_of(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_a_loss_on_logits_gets_logits(tmp_path: Path) -> None:
    data = tiny_labels(tmp_path / "data", missing=0.2)
    model, sample, objective = make(data, LinearProbe()), data.sample(np.arange(9)), Elementwise(data.tracks)
    each = nn.functional.binary_cross_entropy_with_logits(model(sample), sample.targets, reduction="none")
    assert float((objective(model, sample) - each[sample.mask].sum()).detach()) == pytest.approx(0, abs=1e-4)
    assert objective.weigh(sample).tolist() == [int(sample.mask.sum())]


def test_pretrained_tracks_beside_are_not_trained_on(coverage: Dataset) -> None:
    old = track_table(["old"])
    model = make(coverage, LinearProbe())
    both = SequenceModel(model.trunk, {**model.heads, "pretrained_old": Head(old, 16)}, coverage.tracks.concat(old))  # type: ignore[arg-type]
    sample = coverage.sample([0, 1])
    objective = Elementwise(coverage.tracks)
    assert torch.allclose(objective(both, sample), objective(model, sample))


# ---- from outside: kill -9, torchrun ----


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment on disk: 15 training regions and a pretrained trunk."""
    folder = tmp_path_factory.mktemp("outside")
    tiny_coverage(folder / "data", regions=22, missing=0.2)
    tiny_pretrained(folder / "model")
    (folder / "experiment.yaml").write_text(
        f"data: {folder / 'data'}\nmodel: {{name: {folder / 'model'}}}\n"
        "adapter: {kind: lora, rank: 2, dropout: 0.1}\n"
        "train: {epochs: 3, batch_size: 2, lr: 1e-2, save_minutes: 0, patience: 0}\n"
    )
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "seqgraft", "fit", *map(str, arguments)]


def started(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finished(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.wait(timeout=200) == 0, log.read_text()


#: Runs ``seqgraft fit`` in a process that a test can meet in the middle of an epoch: each step waits a little.
SLOW = """
import sys, time, seqgraft.train, seqgraft.__main__
step = seqgraft.train._step
seqgraft.train._step = lambda *a: (time.sleep(0.15), step(*a))[1]
sys.argv[0] = "seqgraft"
seqgraft.__main__.main()
"""


def test_kill_and_resume(prepared: Path, tmp_path: Path) -> None:
    experiment = prepared / "experiment.yaml"
    killed = started(
        [sys.executable, "-c", SLOW, "fit", str(experiment), str(tmp_path / "run")], tmp_path / "killed.log"
    )
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    deadline = time.monotonic() + 120
    while not (last.exists() and (tmp_path / "run" / "log.csv").exists()) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.4)  # into the second epoch
    assert killed.poll() is None, (tmp_path / "killed.log").read_text()
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "adapter").exists()
    assert len(log_of(tmp_path / "run")) < 3
    resumed = started(command(experiment, tmp_path / "run", "--resume"), tmp_path / "resumed.log")
    fit_run(read_experiment(experiment), tmp_path / "whole")
    finished(resumed, tmp_path / "resumed.log")
    adapters = [load_file(tmp_path / name / "adapter" / "weights.safetensors") for name in ("whole", "run")]
    assert same(*adapters)
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["result"]["steps"] == 24


def test_two_processes_are_one_with_twice_the_batch(prepared: Path, tmp_path: Path) -> None:
    """15 rows: batches of 7 leave one row for two processes in the last step."""
    experiment = prepared / "experiment.yaml"
    settings = ["adapter={kind: full}", "train.epochs=2", "train.lr=1e-3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    given = [text for setting in (*settings, "train.batch_size=7") for text in ("--set", setting)]
    two = started([*torchrun, *command(experiment, tmp_path / "two", *given)[2:]], tmp_path / "two.log")
    fit_run(read_experiment(experiment, [*settings, "train.batch_size=14"]), tmp_path / "one")
    finished(two, tmp_path / "two.log")
    for left, right in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("train_loss", "valid_loss"):
            assert float(left[name]) == pytest.approx(float(right[name]), rel=1e-5), name
        assert float(left["valid_score"]) == pytest.approx(float(right["valid_score"]), abs=1e-4)
        assert left["step"] == right["step"]
