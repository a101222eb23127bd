"""The frozen-prefix cache gives what the run without it gives, is never trusted half-written, and fits nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import seqgraft.cache
import seqgraft.train
from builders import SETTINGS, tiny_coverage, tiny_labels, tiny_pretrained
from seqgraft.adapters import Adapter, FullFineTune, Houlsby, LinearProbe, LoRA, adapt
from seqgraft.adapters.base import freeze
from seqgraft.cache import ActivationCache, Choice, frozen_prefix, views_of
from seqgraft.data.augment import FORWARD, Augmentation, View
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError, ModelError, RunError
from seqgraft.experiment import parse_experiment
from seqgraft.models.base import Head, SequenceModel, State
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.plan import plan_run
from seqgraft.predict import resolve_precision
from seqgraft.run import fit_run
from seqgraft.train import TrainConfig, cache_choice
from test_contract import TRUNK_SETTINGS
from test_models import SMALL
from test_train import PLAIN, log_of, make, run, same, tensors

STRANDS = Augmentation(reverse_complement=True, shift=0)
FAST = TrainConfig(epochs=3, batch_size=4, lr=1e-2, augment=PLAIN)
OTHER = replace(FAST, augment=Augmentation(shift=3))
ATTENTION = LoRA(rank=2, where=("attention",))
LAST = LoRA(rank=2, where=("conv",), last=1)


@pytest.fixture(scope="module")
def coverage(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_coverage(tmp_path_factory.mktemp("coverage") / "data")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_labels(tmp_path_factory.mktemp("labels") / "data")


@pytest.fixture(autouse=True)
def activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for every test."""
    torch.set_num_threads(1)
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "activations"


def open_cache(model: SequenceModel, dataset: Dataset, config: TrainConfig) -> ActivationCache:
    choice = cache_choice(model, dataset, config, dataset.rows("train"), dataset.rows("valid"))
    return ActivationCache.open(model, dataset, choice, resolve_precision(config.precision, model), config.augment)


def stores(activations: Path) -> list[Path]:
    return sorted(path.parent for path in activations.glob("*/manifest.json"))


def count_calls(model: SequenceModel) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, stage in model.trunk.stages.items():
        stage.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def largest_difference(a: SequenceModel, b: SequenceModel) -> float:
    ours, theirs = tensors(a), tensors(b)
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def assert_same_log(one: Path, other: Path, within: float) -> None:
    for a, b in zip(log_of(one), log_of(other), strict=True):
        for key, value in a.items():
            assert float(value) == pytest.approx(float(b[key]), rel=within, abs=within), key


# ---- the run with a cache is the run without ----


@pytest.mark.parametrize(
    ("adapter", "cut"),
    [(LinearProbe(), ""), (ATTENTION, "transformer_0"), (LAST, "final"), (Houlsby(bottleneck=4), "transformer_0")],
    ids=["linear_probe", "attention", "last conv", "houlsby"],
)
@pytest.mark.parametrize("augment", [PLAIN, Augmentation(shift=1)], ids=["one view", "six views"])
def test_float32_is_the_uncached_run(
    coverage: Dataset, tmp_path: Path, adapter: Adapter, cut: str, augment: Augmentation
) -> None:
    config = replace(FAST, augment=augment)
    plain, expected = run(coverage, tmp_path / "plain", config, adapter)
    cached, result = run(coverage, tmp_path / "cached", replace(config, cache="float32"), adapter)
    assert_same_log(tmp_path / "plain", tmp_path / "cached", 1e-6)
    assert largest_difference(plain, cached) <= 1e-6
    assert result.best_score == pytest.approx(expected.best_score, abs=1e-6)
    assert (f"up to the stage {cut} " if cut else "of the whole trunk") in result.cache
    assert expected.cache == "not used: train.cache is off"


@pytest.mark.parametrize("adapter", [LinearProbe(), ATTENTION], ids=["linear_probe", "attention"])
def test_sequences_of_different_lengths(labels: Dataset, tmp_path: Path, adapter: Adapter) -> None:
    config = replace(FAST, augment=STRANDS)
    plain, _ = run(labels, tmp_path / "plain", config, adapter)
    cached, _ = run(labels, tmp_path / "cached", replace(config, cache="float32"), adapter)
    assert_same_log(tmp_path / "plain", tmp_path / "cached", 1e-5)
    assert largest_difference(plain, cached) <= 1e-5  # the prefix saw other padding, which regroups its sums


@pytest.mark.parametrize("change", [{"checkpointing": True}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_other_ways_to_train(coverage: Dataset, tmp_path: Path, change: dict[str, object]) -> None:
    config = replace(FAST, **change)  # type: ignore[arg-type]
    plain, _ = run(coverage, tmp_path / "plain", config, ATTENTION)
    cached, _ = run(coverage, tmp_path / "cached", replace(config, cache="float32"), ATTENTION)
    assert_same_log(tmp_path / "plain", tmp_path / "cached", 1e-6)
    assert largest_difference(plain, cached) <= 1e-6


def test_a_trunk_that_trains_has_nothing_to_keep(coverage: Dataset, tmp_path: Path, activations: Path) -> None:
    plain, _ = run(coverage, tmp_path / "plain", OTHER)
    cached, result = run(coverage, tmp_path / "cached", replace(OTHER, cache="float32"))
    assert result.cache == "not used: the first stage, stem, trains"
    assert same(tensors(plain), tensors(cached))
    assert not activations.exists()


def test_off_writes_nothing(coverage: Dataset, tmp_path: Path, activations: Path) -> None:
    run(coverage, tmp_path / "run", FAST, LinearProbe())
    assert not activations.exists()


# ---- rounding ----


def test_float16_rounds_to_eleven_digits(coverage: Dataset, tmp_path: Path) -> None:
    """The relative error of each stored value is at most 2^-11, in the first epoch as in every other."""
    model = make(coverage, ATTENTION)
    cache = open_cache(model, coverage, replace(FAST, cache="float16"))
    sample = coverage.sample([0, 1, 2])
    exact = model.trunk.run(model.trunk.encode(sample.codes), stop="transformer_0")
    first, again = (cache.attach(sample).halfway.state for _ in range(2))
    assert cache.filled == 3
    for name, value in {"x": exact.x, **exact.skips}.items():
        kept = first.x if name == "x" else first.skips[name]
        assert torch.equal(kept, again.x if name == "x" else again.skips[name])
        assert not torch.equal(kept, value)
        bound = (value.abs() * 2**-11).clamp(min=2**-25)
        assert bool(((kept - value).abs() <= bound).all())
    run(coverage, tmp_path / "plain", FAST, ATTENTION)
    run(coverage, tmp_path / "cached", replace(FAST, cache="float16"), ATTENTION)
    assert_same_log(tmp_path / "plain", tmp_path / "cached", 2e-3)


def test_bf16_values_fit_into_float16(coverage: Dataset) -> None:
    model = make(coverage, LAST)
    cache = open_cache(model, coverage, replace(FAST, cache="float16", precision="bf16"))
    state = cache.attach(coverage.sample([0])).halfway.state
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        exact = model.trunk.run(model.trunk.encode(coverage.sample([0]).codes), stop="final")
    assert state.x.dtype == exact.x.dtype == torch.bfloat16
    kept = slice(2, -2)
    assert torch.allclose(state.x[..., kept].float(), exact.x[..., kept].float(), rtol=0, atol=2**-24)


def test_a_value_beyond_float16_is_an_error(coverage: Dataset) -> None:
    model = make(coverage, ATTENTION)
    with torch.no_grad():
        model.trunk.stages["tower_2"].conv.weight.mul_(1e6)
    cache = open_cache(model, coverage, replace(FAST, cache="float16"))
    with pytest.raises(ModelError, match=r"too large to be stored as float16.*float32"):
        cache.attach(coverage.sample([0]))
    assert cache.filled == 0


# ---- what is stored ----


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_cut_of_every_trunk(coverage: Dataset, name: str) -> None:
    """From each stage on the model gives what it gives from the start."""
    trunk = SMALL[name]()
    freeze(trunk)
    for stage in list(trunk.stages.values())[::-1]:
        model = SequenceModel(trunk, {"new": Head(coverage.tracks, trunk.spec.channels)}, coverage.tracks).eval()
        for parameter in stage.parameters():
            parameter.requires_grad_(True)
        if not frozen_prefix(trunk)[0]:
            break
        cache = open_cache(model, coverage, replace(FAST, cache="float32", augment=STRANDS))
        views = [View(reverse=True), FORWARD, View(reverse=True)]
        sample = coverage.sample([1, 2, 9], views)
        with torch.no_grad():
            expected, found = model(sample), model(cache.attach(sample))
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())), cache.folder


@pytest.mark.parametrize("name", sorted(TRUNK_SETTINGS))
@pytest.mark.parametrize("adapter", [LinearProbe(), LoRA(rank=2, where=("attention",))], ids=lambda a: a.kind)
def test_padding_in_every_trunk(labels: Dataset, name: str, adapter: Adapter) -> None:
    model = build_model(ModelConfig(name, settings=TRUNK_SETTINGS[name]), labels.tracks, labels.info).eval()
    adapt(model, adapter)
    cache = open_cache(model, labels, replace(FAST, cache="float32"))
    for rows in ([3, 4, 7], [5], [0, 4]):
        sample = labels.sample(rows)
        with torch.no_grad():
            expected, found = model(sample), model(cache.attach(sample))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_each_view_has_its_own_row(coverage: Dataset) -> None:
    model = make(coverage, ATTENTION)
    augment = Augmentation(shift=1)
    cache = open_cache(model, coverage, replace(FAST, cache="float32", augment=augment))
    for view in [*augment.views(), *augment.views()]:
        sample = coverage.sample([3, 7], [view, FORWARD])
        state = cache.attach(sample).halfway.state
        with torch.no_grad():
            exact = model.trunk.run(model.trunk.encode(sample.codes), stop="transformer_0")
        assert torch.allclose(state.x, exact.x, atol=1e-6)
        assert state.skips.keys() == exact.skips.keys() == {"tower_2"}  # the way up reads it
        assert torch.allclose(state.skips["tower_2"], exact.skips["tower_2"], atol=1e-6)
    assert cache.filled == 6 + 1


def test_stored_sequences_are_not_shifted(labels: Dataset, coverage: Dataset) -> None:
    augment = Augmentation(shift=3)
    assert views_of(labels, augment) == [View(), View(reverse=True)]
    assert len(views_of(coverage, augment)) == 14
    cache = open_cache(make(labels, LinearProbe()), labels, replace(FAST, cache="float32", augment=augment))
    views = [View(shift=2), View(reverse=True, shift=-3)]
    for _ in range(2):
        cache.attach(labels.sample([0, 1], views))
        cache.attach(labels.sample([0]))
    assert cache.filled == 2


@pytest.mark.parametrize("rows", [[2, 3, 5], [0], [4, 4]], ids=str)
def test_padding_is_that_of_the_batch(labels: Dataset, rows: list[int]) -> None:
    model = make(labels, ATTENTION)
    cache = open_cache(model, labels, replace(FAST, cache="float32"))
    sample = labels.sample(rows)
    state = cache.attach(sample).halfway.state
    with torch.no_grad():
        exact = model.trunk.run(model.trunk.encode(sample.codes, sample.lengths), stop="transformer_0")
    assert state.x.shape == exact.x.shape
    assert torch.allclose(state.x, exact.x, atol=1e-5)
    everywhere = torch.ones_like(exact.x[:, 0], dtype=torch.bool)
    assert torch.equal(*(everywhere if valid is None else valid for valid in (state.valid, exact.valid)))


def test_only_what_later_stages_see_is_kept(coverage: Dataset, activations: Path) -> None:
    """Before the final convolution and the crop of two bins at each end, 12 of 16 positions matter."""
    model = make(coverage, LAST)
    cache = open_cache(model, coverage, replace(FAST, cache="float32"))
    sample = coverage.sample([1])
    assert np.load(stores(activations)[0] / "x.npy", mmap_mode="r").shape == (24, 16, 12)
    attached = cache.attach(sample).to("cpu")
    assert attached.halfway.state.x.shape[-1] == 16
    with torch.no_grad():
        assert torch.allclose(model(attached), model(sample), atol=1e-6)


def test_a_linear_probe_runs_the_trunk_in_the_first_epoch_only(
    coverage: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Counter[str]] = []
    validate = seqgraft.train.validate

    def counting(model: SequenceModel, *rest: object) -> object:
        done = validate(model, *rest)  # type: ignore[arg-type]
        calls.append(Counter(seen))
        return done

    monkeypatch.setattr(seqgraft.train, "validate", counting)
    for adapter, running in ((LinearProbe(), set()), (ATTENTION, {"transformer_0", "upsample_0", "final", "crop"})):
        calls.clear()
        model = make(coverage, adapter)
        seen = count_calls(model)
        config = replace(FAST, cache="float32")
        (tmp_path / adapter.kind).mkdir()
        seqgraft.train.fit(model, coverage, objective(coverage), config, tmp_path / adapter.kind)
        assert min(calls[0].values()) > 0
        assert {name for name in seen if calls[-1][name] > calls[0][name]} == {
            name for name in running if name in model.trunk.stages
        }


def objective(dataset: Dataset) -> seqgraft.train.Objective:
    from seqgraft.objectives import Elementwise

    return Elementwise(dataset.tracks)


def test_runs_share_a_store(coverage: Dataset, tmp_path: Path, activations: Path) -> None:
    config = replace(FAST, cache="float32")
    run(coverage, tmp_path / "one", config, ATTENTION)
    run(coverage, tmp_path / "two", replace(config, seed=5), LoRA(rank=4, where=("attention",)))
    assert len(stores(activations)) == 1
    cache = open_cache(make(coverage, ATTENTION), coverage, config)
    for start in range(0, 16, 4):
        cache.attach(coverage.sample(coverage.rows("train")[start : start + 4]))
    assert cache.filled == 0


# ---- never trusted half-written ----


class Killed(BaseException):
    """Stands for a kill."""


def test_a_resumed_run_is_the_uninterrupted_one(
    coverage: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, wherever the filling stops, and also when the store is lost in between."""
    config = replace(FAST, cache="float16", augment=STRANDS, save_minutes=0)
    whole, _ = run(coverage, tmp_path / "whole", config, ATTENTION)
    write = ActivationCache._write
    for stop in (1, 2, 3, 8, 11):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        left = stop

        def dying(self: ActivationCache, name: str, slots: object, rows: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                write(self, name, slots[:1], rows[:1] * 0)  # type: ignore[index, operator, arg-type]
                raise Killed
            write(self, name, slots, rows)  # type: ignore[arg-type]

        folder = tmp_path / f"killed {stop}"
        with monkeypatch.context() as patch:
            patch.setattr(ActivationCache, "_write", dying)
            with pytest.raises(Killed):
                run(coverage, folder, config, ATTENTION)
        resumed, _ = run(coverage, folder, config, ATTENTION, resume=True)
        assert log_of(folder) == log_of(tmp_path / "whole"), stop
        assert same(tensors(resumed), tensors(whole)), stop


def test_a_killed_process_leaves_a_store_that_goes_on(coverage: Dataset, activations: Path) -> None:
    """The process dies without warning while it flushes its third batch."""
    config = replace(FAST, cache="float32")
    model = make(coverage, ATTENTION)
    rows = coverage.rows("train")
    batches = [rows[start : start + 4] for start in range(0, 16, 4)]
    expected = [open_cache(model, coverage, config).attach(coverage.sample(batch)).halfway.state.x for batch in batches]
    shutil.rmtree(activations)
    child = os.fork()
    if child == 0:
        flushes = iter(range(8))
        os.fsync = lambda _: os._exit(9) if next(flushes) == 7 else None  # type: ignore[assignment]
        cache = open_cache(model, coverage, config)
        for batch in batches:
            cache.attach(coverage.sample(batch))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    cache = open_cache(model, coverage, config)
    states = [cache.attach(coverage.sample(batch)).halfway.state.x for batch in batches]
    assert cache.filled == 8
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))


def test_a_store_that_is_removed_meanwhile(coverage: Dataset, activations: Path) -> None:
    """The run goes on with its own files, also when another makes the folder again."""
    config = replace(FAST, cache="float32")
    model = make(coverage, ATTENTION)
    cache = open_cache(model, coverage, config)
    shutil.rmtree(activations)
    activations.mkdir()
    other = open_cache(model, coverage, config)
    sample = coverage.sample([0, 1])
    first, second = (store.attach(sample).halfway.state.x for store in (cache, other))
    assert torch.equal(first, second)
    assert bool(first.any())
    assert (cache.filled, other.filled) == (2, 2)


def test_two_runs_fill_one_store(coverage: Dataset) -> None:
    config = replace(FAST, cache="float32")
    model = make(coverage, ATTENTION)
    one, two = (open_cache(model, coverage, config) for _ in range(2))
    one.attach(coverage.sample([0, 1]))
    two.attach(coverage.sample([1, 4]))
    one.attach(coverage.sample([4, 0]))
    assert (one.filled, two.filled) == (2, 1)


@pytest.mark.parametrize("damage", ["truncate", "lose", "manifest", "garbage", "shape"])
def test_a_damaged_store_is_made_anew(coverage: Dataset, activations: Path, damage: str) -> None:
    config = replace(FAST, cache="float32")
    model = make(coverage, ATTENTION)
    sample = coverage.sample([0, 1])
    expected = open_cache(model, coverage, config).attach(sample).halfway.state.x
    (store,) = stores(activations)
    if damage == "truncate":
        os.truncate(store / "skip_0.npy", (store / "skip_0.npy").stat().st_size - 4)
    elif damage == "lose":
        (store / "done.npy").unlink()
    elif damage == "manifest":
        content = json.loads((store / "manifest.json").read_text())
        (store / "manifest.json").write_text(json.dumps(content | {"weights": "0" * 64}))
    elif damage == "garbage":
        (store / "manifest.json").write_text('{"format"')
    else:
        np.save(store / "x.npy", np.zeros((3, 2), dtype=np.float32))
    cache = open_cache(model, coverage, config)
    assert torch.equal(cache.attach(sample).halfway.state.x, expected)
    assert cache.filled == 2
    assert [path.name for path in activations.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk(coverage: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops the run with what to do, and the run goes on to the same end once there is room."""
    config = replace(FAST, cache="float32")
    whole, _ = run(coverage, tmp_path / "whole", config, ATTENTION)
    shutil.rmtree(tmp_path / "cache")
    flushes = iter(range(100))

    def full(_: int) -> None:
        if next(flushes) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"activation cache cannot be written \(No space left.*--resume"):
            run(coverage, tmp_path / "full", config, ATTENTION)
    resumed, _ = run(coverage, tmp_path / "full", config, ATTENTION, resume=True)
    assert same(tensors(resumed), tensors(whole))


def test_no_room_is_found_before_training(
    coverage: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RunError, match=r"the disk has .* left and the activation cache needs"):
        run(coverage, tmp_path / "run", replace(FAST, cache="float32"), ATTENTION)
    assert stores(activations) == []


def test_a_cache_folder_that_cannot_be_made(coverage: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match="SEQGRAFT_CACHE"):
        run(coverage, tmp_path / "run", replace(FAST, cache="float32"), ATTENTION)


# ---- nothing is served for anything else ----


def key_of(model: SequenceModel, dataset: Dataset, **changes: object) -> str:
    config = replace(FAST, **({"cache": "float32"} | changes))  # type: ignore[arg-type]
    return open_cache(model, dataset, config).folder.name


def test_the_key_names_all_that_matters(coverage: Dataset, labels: Dataset, tmp_path: Path) -> None:
    model = make(coverage, ATTENTION)
    keys = {"as it is": key_of(model, coverage)}
    keys["views"] = key_of(model, coverage, augment=STRANDS)
    keys["shifts"] = key_of(model, coverage, augment=Augmentation(shift=1))
    keys["precision"] = key_of(model, coverage, precision="bf16")
    keys["storage"] = key_of(model, coverage, cache="float16")
    keys["cut"] = key_of(make(coverage, LinearProbe()), coverage)
    keys["window"] = key_of(model, replace(coverage, info=replace(coverage.info, window=288)))
    keys["genome"] = key_of(model, tiny_coverage(tmp_path / "other", seed=3))
    keys["regions"] = key_of(model, tiny_coverage(tmp_path / "more" / "data", regions=23))
    keys["sequences"] = key_of(model, labels)
    other = replace(labels, codes=labels.codes.copy())  # type: ignore[union-attr]
    other.codes[0, 0] = (other.codes[0, 0] + 1) % 4  # type: ignore[index]
    keys["one base"] = key_of(model, other)
    keys["another trunk"] = key_of(make(coverage, ATTENTION, seed=1), coverage)
    for name in ("stem.conv.weight", "tower_1.conv.bias", "tower_0.norm.running_mean", "tower_2.norm.running_var"):
        changed = make(coverage, ATTENTION)
        tensor: Tensor = changed.trunk.stages.state_dict()[name]
        tensor.view(-1)[0] += 1e-6 * (1 + tensor.view(-1)[0].abs())
        keys[name] = key_of(changed, coverage)
    setting = make(coverage, ATTENTION)
    setting.trunk.stages["tower_0"].norm.eps = 1e-4
    keys["a setting that is no weight"] = key_of(setting, coverage)
    hidden = make(coverage, ATTENTION)
    hidden.trunk.stages["stem"].register_buffer("table", torch.ones(2), persistent=False)
    keys["a buffer that is not saved"] = key_of(hidden, coverage)
    assert len(set(keys.values())) == len(keys), keys


def test_the_key_leaves_out_what_does_not(coverage: Dataset) -> None:
    key = key_of(make(coverage, ATTENTION), coverage)
    assert key_of(make(coverage, LoRA(rank=4, where=("attention",))), coverage, lr=1.0, epochs=9, batch_size=3) == key
    assert key_of(make(coverage, ATTENTION).train(), coverage.select_tracks(coverage.tracks.select(["atac"]))) == key
    later = make(coverage, ATTENTION)
    with torch.no_grad():
        later.trunk.stages["final"].conv.weight.add_(1)
    assert key_of(later, coverage) == key


def test_the_key_names_the_code(coverage: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(coverage, ATTENTION)
    key = key_of(model, coverage)
    hashes = seqgraft.cache._source_hashes
    assert set(hashes({type(model.trunk)})) >= {"seqgraft.models.convnet", "seqgraft.models.base"}
    monkeypatch.setattr(seqgraft.cache, "_source_hashes", lambda kinds: hashes(kinds) | {"seqgraft.models.base": ""})
    assert key_of(model, coverage) != key


def test_other_weights_get_their_own_states(coverage: Dataset, tmp_path: Path) -> None:
    """A second pretrained trunk in the same cache folder trains as it does alone."""
    results = []
    for fresh in (True, False):
        model = make(coverage, ATTENTION)
        cache = open_cache(model, coverage, replace(FAST, cache="float32"))
        if not fresh:
            with torch.no_grad():
                model.trunk.stages["tower_0"].norm.running_mean[0] += 0.1
            cache = open_cache(model, coverage, replace(FAST, cache="float32"))
        results.append(cache.attach(coverage.sample([0])).halfway.state.x)
        with torch.no_grad():
            exact: State = model.trunk.run(model.trunk.encode(coverage.sample([0]).codes), stop="transformer_0")
        assert torch.allclose(results[-1], exact.x, atol=1e-6)
    assert not torch.allclose(*results, atol=1e-6)


@pytest.mark.parametrize("change", [{"cache": "off"}, {"cache": "float16"}], ids=str)
def test_a_run_goes_on_with_its_own_cache(coverage: Dataset, tmp_path: Path, change: dict[str, object]) -> None:
    config = replace(FAST, cache="float32", epochs=1)
    run(coverage, tmp_path / "run", config, ATTENTION)
    with pytest.raises(RunError, match="differ in cache"):
        run(coverage, tmp_path / "run", replace(config, **change), ATTENTION, resume=True)  # type: ignore[arg-type]


# ---- where to cut ----


def test_the_prefix_is_what_is_frozen(coverage: Dataset) -> None:
    def prefix(adapter: Adapter) -> Sequence[str]:
        return frozen_prefix(make(coverage, adapter).trunk)[0]

    stages = list(make(coverage, LinearProbe()).trunk.stages)
    assert prefix(LinearProbe()) == stages
    assert prefix(ATTENTION) == stages[: stages.index("transformer_0")]
    assert prefix(LAST) == stages[: stages.index("final")]
    assert prefix(LoRA(rank=2, where=("conv",))) == []
    assert prefix(Houlsby(bottleneck=4, squeeze_excite=2)) == []
    assert prefix(FullFineTune()) == []
    thawed = make(coverage, LinearProbe()).trunk
    thawed.stages["tower_1"].norm.frozen = False  # its statistics would move
    assert frozen_prefix(thawed)[0] == ["stem", "tower_0"]
    outside = make(coverage, LinearProbe()).trunk
    outside.scale = torch.nn.Parameter(torch.ones(1))
    assert frozen_prefix(outside) == ([], "the trunk trains parameters that are in no stage")


# ---- the choice ----


def choice_of(dataset: Dataset, adapter: Adapter = ATTENTION, before: str | None = None, **changes: object) -> Choice:
    config = replace(FAST, cache="auto", **changes)  # type: ignore[arg-type]
    return cache_choice(
        make(dataset, adapter), dataset, config, dataset.rows("train"), dataset.rows("valid"), 1, before
    )


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqgraft.cache, "_disk_speed", lambda _: (0.0, 0.0))


@pytest.mark.usefixtures("fast_disk")
def test_auto(coverage: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = choice_of(coverage)
    assert (kept.cut, kept.storage, kept.views) == ("transformer_0", "float32", 1)
    # x and the skip that the way up reads, for 16 training and 4 validation regions
    assert kept.size == 20 * 4 * (16 * 8 + 16 * 16)
    assert kept.saved == pytest.approx(2 / 3)
    assert choice_of(coverage, precision="bf16").storage == "float16"
    assert "not pay within 1 epoch of" in choice_of(coverage, epochs=1).reason  # nothing is seen twice
    assert "above train.cache_gb" in choice_of(coverage, cache_gb=1e-6).reason
    assert choice_of(coverage, FullFineTune()).reason == "the first stage, stem, trains"
    assert choice_of(coverage, before="off").reason == "the run began without"
    assert choice_of(coverage, LinearProbe(), before="float16 transformer_0").identity == "float16 transformer_0"
    monkeypatch.setattr(seqgraft.cache, "_disk_speed", lambda _: (1.0, 1.0))
    assert "not pay" in choice_of(coverage).reason


@pytest.mark.usefixtures("fast_disk")
def test_auto_cuts_earlier_where_the_budget_asks(coverage: Dataset) -> None:
    """The state after the transformer is a skip and 8 positions; the last one 12 positions alone, the smallest."""
    whole = choice_of(coverage, LinearProbe())
    assert whole.cut == ""
    assert whole.size == 20 * 4 * 16 * 12
    less = choice_of(coverage, LoRA(rank=2, where=("feedforward",)), cache_gb=20 * 4 * 16 * 24 / 2**30)
    assert less.cut == "transformer_0"


@pytest.mark.usefixtures("fast_disk")
def test_auto_decides_once(coverage: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(FAST, cache="auto")
    whole, result = run(coverage, tmp_path / "whole", config, ATTENTION)
    assert "up to the stage transformer_0 as float32" in result.cache
    steps = iter(range(100))
    step = seqgraft.train._step

    def dying(*args: object) -> object:
        if next(steps) == 6:
            raise Killed
        return step(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(seqgraft.train, "_step", dying)
        with pytest.raises(Killed):
            run(coverage, tmp_path / "run", config, ATTENTION)
    monkeypatch.setattr(seqgraft.cache, "_disk_speed", lambda _: (1.0, 1.0))  # now it would decide otherwise
    resumed, again = run(coverage, tmp_path / "run", config, ATTENTION, resume=True)
    assert again.cache.partition(";")[0] == result.cache.partition(";")[0]
    assert same(tensors(resumed), tensors(whole))


def test_several_processes(coverage: Dataset) -> None:
    model, rows = make(coverage, ATTENTION), coverage.rows("train")
    with pytest.raises(ConfigError, match=r"train.cache.*one process"):
        cache_choice(model, coverage, replace(FAST, cache="float16"), rows, rows, world=2)
    assert not cache_choice(model, coverage, replace(FAST, cache="auto"), rows, rows, world=2).used


def test_too_small_a_budget(coverage: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"in 14 views take more than train.cache_gb allows"):
        run(
            coverage,
            tmp_path / "run",
            replace(FAST, cache="float16", cache_gb=1e-5, augment=Augmentation(shift=3)),
            LAST,
        )


# ---- plan and run ----


def test_plan_says_what_it_would_keep(coverage: Dataset, tmp_path: Path) -> None:
    def planned(adapter: str, **train: object) -> tuple[str, list[str]]:
        content = {
            "data": str(coverage.folder),
            "model": {"name": str(folder)},
            "adapter": {"kind": adapter},
            "train": {"epochs": 9, "augment": {"reverse_complement": True}, **train},
        }
        found = plan_run(parse_experiment(content))
        return found.facts.get("cache", ""), [str(problem) for problem in found.problems]

    folder = tiny_pretrained(tmp_path / "model")
    text, problems = planned("linear_probe", cache="float16")
    assert problems == []
    assert text.startswith("activations of the whole trunk as float16, 2 views of a training region, at most ")
    assert "of these stages' runs are saved" in text
    assert "times less time" in text
    assert planned("linear_probe")[0].startswith(
        "off; train.cache could keep activations of the whole trunk as float16"
    )
    assert planned("full")[0] == "off, and there is nothing to keep: the first stage, stem, trains"
    assert planned("full", cache="auto") == ("not used: the first stage, stem, trains", [])
    text, (problem,) = planned("linear_probe", cache="float16", cache_gb=1e-6)
    assert text == ""
    assert "train.cache_gb" in problem


def test_a_run_records_what_became_of_it(coverage: Dataset, tmp_path: Path) -> None:
    content = {
        "data": str(coverage.folder),
        "model": {"name": "convnet", "settings": SETTINGS},
        "train": {"epochs": 1, "cache": "float32", "augment": {"reverse_complement": False}},
    }
    fit_run(parse_experiment(content), tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["result"]["cache"].startswith("activations of the whole trunk as float32, one view")
    changed = parse_experiment(content | {"train": content["train"] | {"cache": "off"}})  # type: ignore[operator]
    with pytest.raises(RunError, match=r"train\.cache"):
        fit_run(changed, tmp_path / "run", resume=True)
