"""Tiles of donors' haplotypes: what is put together from them is what the whole windows give, and each is made once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seqgraft.adapters import FullFineTune, LinearProbe, LoRA, adapt
from seqgraft.adapters.base import freeze
from seqgraft.cache import ActivationCache, CacheSettings, Choice, choose
from seqgraft.cache_tiles import Tiling, find_tiling
from seqgraft.data import prepare_source
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError
from seqgraft.evaluate import EvaluateConfig
from seqgraft.experiment import Experiment
from seqgraft.models.base import SequenceModel, State
from seqgraft.models.enformer import Enformer
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.plan import plan_run
from seqgraft.run import fit_run
from seqgraft.train import TrainConfig
from test_personal import source_of, write_cohort
from test_train import log_of

WINDOW = 1024
CONVNET = ModelConfig(settings={"channels": 16, "depth": 3, "blocks": 1}, centre=4)
ENFORMER = ModelConfig(
    "enformer", settings={"channels": 48, "depth": 1, "heads": 2, "key_size": 4, "divisible_by": 4}, centre=4
)
ATTENTION = LoRA(rank=2, where=("attention",))
FORWARD_ONLY = Augmentation(reverse_complement=False)
ALL_VIEWS = Augmentation(reverse_complement=True, shift=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("cohort")
    return prepare_source(source_of(write_cohort(folder), window=WINDOW), folder / "data")


@pytest.fixture(scope="module")
def unphased(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Without indels, and nobody knows which allele is on which haplotype: codes 6 to 11."""
    folder = tmp_path_factory.mktemp("unphased")
    files = write_cohort(folder)
    lines = files["c.vcf"].read_text().splitlines()
    kept = [line.replace("|", "/") for line in lines if line.startswith("#") or len(line.split("\t")[4]) == 1]
    files["c.vcf"].write_text("\n".join(kept) + "\n")
    return prepare_source(source_of(files, window=WINDOW, unphased="dosage"), folder / "data")


@pytest.fixture(autouse=True)
def activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_num_threads(1)
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "activations"


def make(dataset: Dataset, config: ModelConfig = CONVNET, adapter: Any = ATTENTION) -> SequenceModel:
    torch.manual_seed(0)
    model = build_model(config, dataset.tracks, dataset.info)
    adapt(model, adapter)
    return model.eval()


def choice_of(
    model: SequenceModel, dataset: Dataset, augment: Augmentation = FORWARD_ONLY, mode: Any = "float32", **changes: Any
) -> Choice:
    settings = replace(CacheSettings(mode, 1.0, 8, "float32", augment), **changes)
    return choose(model, dataset, dataset.rows("train"), dataset.rows("valid"), settings)


def open_cache(model: SequenceModel, dataset: Dataset, augment: Augmentation = FORWARD_ONLY) -> ActivationCache:
    return ActivationCache.open(model, dataset, choice_of(model, dataset, augment), "float32", augment)


def batches(dataset: Dataset, augment: Augmentation) -> Iterator[Any]:
    """Rows of two genes at a time, in views that differ between batches and within."""
    views = augment.views()
    for number, rows in enumerate(np.array_split(dataset.rows("train"), 6)):
        yield dataset.sample(rows, [views[(number + i // 7) % len(views)] for i in range(len(rows))])


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


# ---- exact ----


@pytest.mark.parametrize("config", [CONVNET, ENFORMER], ids=lambda config: config.name)
@pytest.mark.parametrize("data", ["cohort", "unphased"])
@pytest.mark.parametrize("augment", [FORWARD_ONLY, ALL_VIEWS], ids=["one view", "six views"])
def test_a_model_on_tiles_is_the_model(
    request: pytest.FixtureRequest, config: ModelConfig, data: str, augment: Augmentation
) -> None:
    dataset: Dataset = request.getfixturevalue(data)
    model = make(dataset, config)
    choice = choice_of(model, dataset, augment)
    assert choice.cut == "transformer_0"
    assert choice.tiling is not None
    cache = ActivationCache.open(model, dataset, choice, "float32", augment)
    codes = set()
    for _ in range(2):
        for sample in batches(dataset, augment):
            codes |= set(sample.codes.unique().tolist())
            attached = cache.attach(sample)
            state: State = attached.halfway.state
            with torch.no_grad():
                exact = model.trunk.run(model.trunk.encode(sample.codes), stop=choice.cut)
                assert apart(model(attached), model(sample)) <= 1e-6
            assert apart(state.x, exact.x) <= 1e-6
            assert all(apart(skip, exact.skips[name]) <= 1e-6 for name, skip in state.skips.items())
            assert (state.skips.keys() == {"tower_2"}) == (config is CONVNET)  # the way up reads it
    assert (max(codes) > 5) == (data == "unphased")
    assert 0 < cache.filled <= choice.tiles


def test_later_stages_may_train_whole(cohort: Dataset) -> None:
    model = make(cohort, ENFORMER, FullFineTune())
    freeze(model.trunk)
    for name in ("transformer_0", "final"):
        for parameter in model.trunk.stages[name].parameters():
            parameter.requires_grad_(True)
    cache = open_cache(model, cohort)
    sample = cohort.sample(cohort.rows("train")[:30])
    with torch.no_grad():
        assert apart(model(cache.attach(sample)), model(sample)) <= 1e-6
    model(cache.attach(sample)).square().sum().backward()
    assert model.trunk.stages["transformer_0"].query.weight.grad is not None  # type: ignore[union-attr]


def test_float16_rounds_to_eleven_digits(cohort: Dataset) -> None:
    model = make(cohort)
    choice = choice_of(model, cohort, mode="float16")
    cache = ActivationCache.open(model, cohort, choice, "float32", FORWARD_ONLY)
    sample = cohort.sample(cohort.rows("train")[:30])
    kept = cache.attach(sample).halfway.state.x
    with torch.no_grad():
        exact = model.trunk.run(model.trunk.encode(sample.codes), stop=choice.cut).x
    assert bool(((kept - exact).abs() <= (exact.abs() * 2**-11).clamp(min=2**-25) + 1e-6).all())
    assert apart(kept, exact) > 1e-5


# ---- each once ----


def stretches(dataset: Dataset, tiling: Tiling, augment: Augmentation) -> set[tuple[object, ...]]:
    """What tiles may depend on: bases within reach, and the window's ends where they are."""
    found: set[tuple[object, ...]] = set()
    for rows, views in ((dataset.rows("train"), augment.views()), (dataset.rows("valid"), augment.views()[:1])):
        stored = dataset.stored(rows)
        for view in views:
            codes, _ = dataset.sequences(stored, [view] * len(stored))
            for start in range(0, WINDOW, tiling.size * tiling.unit):
                first, last = start - tiling.before, start + tiling.size * tiling.unit + tiling.after
                edges = min(0, first), max(0, last - WINDOW)
                found |= {(edges, row[max(0, first) : last].tobytes()) for row in codes}
    return found


@pytest.mark.parametrize("augment", [FORWARD_ONLY, ALL_VIEWS], ids=["one view", "six views"])
def test_each_distinct_stretch_is_computed_once(cohort: Dataset, augment: Augmentation) -> None:
    model = make(cohort)
    choice = choice_of(model, cohort, augment)
    assert choice.tiling is not None
    assert choice.tiles == len(stretches(cohort, choice.tiling, augment))
    cache = ActivationCache.open(model, cohort, choice, "float32", augment)
    bases = 0

    def counting(module: object, inputs: tuple[State]) -> None:
        nonlocal bases
        bases += inputs[0].x.shape[0] * inputs[0].x.shape[2]

    model.trunk.stages["stem"].register_forward_pre_hook(counting)
    for rows, views in ((cohort.rows("train"), augment.views()), (cohort.rows("valid"), augment.views()[:1])):
        for view in views:
            for part in np.array_split(rows, 5):
                cache.attach(cohort.sample(part, [view] * len(part)))
    assert cache.filled == choice.tiles
    assert bases <= choice.tiles * choice.tiling.bases
    trained, validated = (len(cohort.stored(cohort.rows(fold))) for fold in ("train", "valid"))
    assert bases < 0.7 * WINDOW * (trained * len(augment.views()) + validated)
    assert choice.size <= 0.5 * choice.whole


def test_the_reach_of_a_tile_is_that_of_the_stages() -> None:
    """Enformer's stem sees 7 bp on either side, its tower two positions of 2, 4, ... 64 bp, 252 in all."""
    trunk = Enformer(channels=48, depth=1, heads=2, key_size=4, divisible_by=4)
    local = [name for name in trunk.stages if name.startswith(("stem", "tower"))]
    found = find_tiling(trunk, local, 1024, {"x": (8, (1, 8))})
    assert found == Tiling(unit=128, units=8, first=1, last=8, before=259, after=259, size=1)
    tiling = replace(found, size=3)
    assert [tiling.tile(column) for column in range(tiling.columns)] == [(1, 4), (4, 7), (7, 8)]
    assert [tiling.reach(column) for column in range(tiling.columns)] == [(0, 771), (253, 1024), (637, 1024)]
    assert [tiling.crop(column) for column in range(tiling.columns)] == [(0, 7), (1, 8), (4, 8)]
    assert tiling.bases == 9 * 128
    assert find_tiling(trunk, [*local, "transformer_0"], 1024, {"x": (8, (0, 8))}) is None
    assert find_tiling(trunk, local, 1000, {"x": (8, (0, 8))}) is None


# ---- the same store ----


def test_two_runs_fill_one_store(cohort: Dataset, activations: Path) -> None:
    model, rows = make(cohort), cohort.rows("train")
    one, two = (open_cache(model, cohort) for _ in range(2))
    assert len(list(activations.glob("*/manifest.json"))) == 1
    one.attach(cohort.sample(rows[:40]))
    two.attach(cohort.sample(rows[20:60]))
    alone = open_cache(make(cohort, adapter=LoRA(rank=1, where=("attention",))), cohort)
    alone.attach(cohort.sample(rows[:60]))
    assert alone.filled == 0
    assert two.filled > 0


def test_a_kill_costs_the_tiles_that_were_being_written(cohort: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = make(cohort), cohort.sample(cohort.rows("train")[:40])
    cache = open_cache(model, cohort)
    cache.attach(cohort.sample(cohort.rows("train")[:5]))
    before = cache.filled
    write = ActivationCache._write

    def dying(self: ActivationCache, name: str, slots: Any, rows: Any) -> None:
        if name == "done":
            raise KeyboardInterrupt
        write(self, name, slots[:3], rows[:3] * 0)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationCache, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            cache.attach(sample)
    again = open_cache(model, cohort)
    with torch.no_grad():
        assert apart(model(again.attach(sample)), model(sample)) <= 1e-6
    fresh = len(np.unique(again._arrays["places"][sample.shown[:, 0].numpy()]))  # type: ignore[index]
    assert again.filled == fresh - before


@pytest.mark.parametrize("damage", ["places", "count", "x"])
def test_a_damaged_store_is_made_anew(cohort: Dataset, activations: Path, damage: str) -> None:
    model, sample = make(cohort), cohort.sample(cohort.rows("train")[:10])
    filled = open_cache(model, cohort)
    filled.attach(sample)
    (store,) = (path.parent for path in activations.glob("*/manifest.json"))
    if damage == "count":
        text = (store / "manifest.json").read_text()
        (store / "manifest.json").write_text(re.sub(r'"count": \d+', '"count": "7"', text))
    else:
        os.truncate(store / f"{damage}.npy", (store / f"{damage}.npy").stat().st_size - 4)
    again = open_cache(model, cohort)
    with torch.no_grad():
        assert apart(model(again.attach(sample)), model(sample)) <= 1e-6
    assert again.filled == filled.filled


# ---- the choice ----


def test_a_whole_trunk_is_kept_per_haplotype(cohort: Dataset) -> None:
    """The pooled bins of a probe are fewer numbers than any tiles."""
    choice = choice_of(make(cohort, adapter=LinearProbe()), cohort)
    assert (choice.cut, choice.tiling) == ("", None)


def test_tiles_that_save_little_are_not_used(tmp_path: Path) -> None:
    """Where most of the window is in reach of the variants, whole rows stay."""
    small = prepare_source(source_of(write_cohort(tmp_path), window=256), tmp_path / "data")
    assert choice_of(make(small), small).tiling is None


def test_a_stage_that_looks_where_it_is(cohort: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(cohort)
    tower = model.trunk.stages["tower_1"]
    forward: Callable[[State], State] = tower.forward

    def placed(state: State) -> State:
        state = forward(state)
        return replace(state, x=state.x + torch.linspace(0, 1, state.x.shape[-1]))

    monkeypatch.setattr(tower, "forward", placed)
    assert choice_of(model, cohort).tiling is None


def test_a_window_that_the_trunk_would_pad(tmp_path: Path) -> None:
    odd = prepare_source(source_of(write_cohort(tmp_path), window=WINDOW + 16), tmp_path / "data")
    model = make(odd, replace(CONVNET, settings={"channels": 16, "depth": 3, "blocks": 1}, centre=None))
    choice = choice_of(model, odd)
    assert choice.used
    assert choice.tiling is None


def test_auto_counts_tiles(cohort: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import seqgraft.cache

    monkeypatch.setattr(seqgraft.cache, "_disk_speed", lambda _: (0.0, 0.0))
    model = make(cohort)
    tiled = choice_of(model, cohort, mode="auto")
    assert tiled.tiling is not None
    assert tiled.identity == f"float32 transformer_0 in tiles of {tiled.tiling.size}"
    rows, valid = cohort.rows("train"), cohort.rows("valid")
    resumed = choose(model, cohort, rows, valid, CacheSettings("auto", 1.0, 8, "float32", FORWARD_ONLY), tiled.identity)
    assert resumed.tiling == tiled.tiling
    tight = (tiled.size + tiled.whole) / 2 / 2**30
    assert choice_of(model, cohort, gigabytes=tight).tiling == tiled.tiling
    with pytest.raises(ConfigError, match=r"than train.cache_gb allows"):
        choice_of(model, cohort, gigabytes=tiled.size / 2**31)


# ---- a run ----


def test_a_run_with_tiles_is_the_run_without(cohort: Dataset, tmp_path: Path) -> None:
    def experiment(mode: Any) -> Experiment:
        return Experiment(
            data=cohort.folder,
            model=replace(CONVNET, init="random"),
            adapter=ATTENTION,
            train=TrainConfig(epochs=2, batch_size=16, cache=mode, augment=Augmentation(), precision="float32"),
            evaluate=EvaluateConfig(draws=20),
        )

    plan = plan_run(experiment("float32"))
    assert re.search(r"in \d+ distinct tiles of \d+ bp \([\d.]+x less\)", plan.facts["cache"])
    for mode in ("off", "float32"):
        fit_run(experiment(mode), tmp_path / mode)
    for plain, tiled in zip(log_of(tmp_path / "off"), log_of(tmp_path / "float32"), strict=True):
        for key, value in plain.items():
            assert float(tiled[key]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), key
