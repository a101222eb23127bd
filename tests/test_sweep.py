"""Sweeps: which cells there are, that each is an ordinary run, what is tested against what, and the report."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from builders import tiny_labels, tiny_pretrained
from seqgraft import cells, evaluate, train
from seqgraft.__main__ import main
from seqgraft.data.dataset import open_dataset
from seqgraft.errors import ConfigError, RunError, SeqgraftError
from seqgraft.experiment import build, parse_experiment, read_yaml, write_yaml
from seqgraft.grids import SweepConfig, read_sweep
from seqgraft.intervals import _draws, bootstrap_p, combine_p, hierarchical_draws, hierarchical_estimate, holm, mcnemar
from seqgraft.metrics import METRICS, Moments
from seqgraft.report import write_report
from seqgraft.report.sweep import _Slice, _title, findings
from seqgraft.run import evaluate_run, fit_run
from seqgraft.sweep import Swept, plan_sweep, run_sweep
from seqgraft.trends import cost_dots, epoch_curves, setting_lines

ROOT = Path(__file__).resolve().parents[1]
PROBE, IA3, LORA = {"kind": "linear_probe"}, {"kind": "ia3"}, {"kind": "lora"}
BROKEN = {"kind": "ia3", "where": ["nowhere"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An experiment on 20 test sequences of three classes, trained in a fraction of a second."""
    folder = tmp_path_factory.mktemp("sweeps")
    tiny_labels(folder / "classes", "softmax", rows=120, lengths=(40, 60), seed=1)
    model = tiny_pretrained(folder / "tiny")
    return {
        "data": str(folder / "classes"),
        "model": {"name": str(model)},
        "train": {"epochs": 2, "batch_size": 32, "lr": 1e-2},
        "evaluate": {"draws": 20},
    }


def config_of(base: Mapping[str, Any], **settings: Any) -> SweepConfig:
    return build(SweepConfig, {"experiment": base, "draws": 200, **settings}, "sweep")


GRID = {"adapter": [PROBE, LORA, IA3, BROKEN], "adapter.rank": [2, 4]}


#: Its folder, its configuration, what it found, and how often the baselines were made.
Made = tuple[Path, SweepConfig, Swept, int]


@pytest.fixture(scope="module")
def swept(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Three methods, one of two ranks, and one that fails, with two seeds and a control."""
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    config = config_of(base, grid=GRID, seeds=[1, 2], controls=True)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        compute = evaluate.baseline_predictions
        patch.setattr(evaluate, "baseline_predictions", lambda *given: made.append(given) or compute(*given))  # type: ignore[func-returns-value]
        yield folder, config, run_sweep(config, folder), len(made)


def weights(folder: Path) -> dict[str, bytes]:
    """Cell -> the file of its adapter."""
    return {
        path.parents[1].name: path.read_bytes() for path in sorted(folder.glob("cells/*/adapter/weights.safetensors"))
    }


# The cells


def test_settings_that_a_method_does_not_have_are_one_cell(swept: Made) -> None:
    folder, _, found, _ = swept
    results = found.tables.results
    runs = results[results["role"] == "run"]
    assert runs.groupby("label", sort=False)["seed"].apply(list).to_dict() == {
        "linear probe": [1, 2],
        "LoRA r=2 (attention)": [1, 2],
        "LoRA r=4 (attention)": [1, 2],
        "IA3 (attention, feedforward)": [1, 2],
        "IA3 (nowhere)": [1, 2],
    }
    assert runs["rank"].tolist() == pytest.approx([np.nan] * 2 + [2, 2, 4, 4] + [np.nan] * 4, nan_ok=True)
    assert set(runs["method"]) >= {"LoRA (attention)", "linear probe"}
    assert results["cell"].is_unique
    assert {path.name for path in (folder / "cells").iterdir()} == set(results["cell"])
    controls = results[results["role"] == "control"]
    assert controls["seed"].tolist() == [1, 2]
    (method,) = {name.removesuffix(" on random weights") for name in controls["method"]}
    tuned = found.tables.summary.query("role == 'run'")
    assert tuned.loc[tuned["method"] == method, "valid_score"].max() == tuned["valid_score"].max()


def test_a_failed_cell_says_why_and_stops_no_other(swept: Made) -> None:
    results = swept[2].tables.results
    failed = results[results["status"] != "done"]
    assert swept[2].failed == len(failed) == 2
    assert set(failed["label"]) == {"IA3 (nowhere)"}
    assert failed["message"].str.contains("no module at the site: 'nowhere'").all()
    assert failed["score"].isna().all()
    assert results.drop(failed.index)["score"].notna().all()


def test_a_cell_is_the_single_run(swept: Made, base: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, baselines included, although these were computed once for all cells."""
    folder, _, found, made = swept
    assert made == 1
    row = found.tables.results.query("label == 'LoRA r=4 (attention)' and seed == 2").iloc[0]
    single = parse_experiment({**base, "adapter": LORA | {"rank": 4}, "train": {**base["train"], "seed": 2}})
    fit_run(single, tmp_path / "single")
    metrics = evaluate_run(tmp_path / "single").metrics
    cell = folder / "cells" / row["cell"]
    for name in ("adapter/weights.safetensors", "evaluation/metrics.parquet", "evaluation/differences.parquet"):
        assert (cell / name).read_bytes() == (tmp_path / "single" / name).read_bytes(), name
    score = metrics[(metrics["model"] == "LoRA r=4 (attention)") & (metrics["track"] == "")].iloc[0]
    assert (
        row[["metric", "score", "low", "high", "n"]].tolist() == score[["metric", "value", "low", "high", "n"]].tolist()
    )
    environment = json.loads((cell / "environment.json").read_text())
    counts = environment["counts"]
    assert row["trainable"] == counts["adapter"] + counts["head"] + counts["trunk"]
    assert row["trainable_percent"] == pytest.approx(100 * row["trainable"] / counts["total"])
    assert row["adapter_bytes"] == sum(path.stat().st_size for path in (cell / "adapter").iterdir())
    assert (row["valid_score"], row["seconds"]) == (environment["result"]["best_score"], environment["seconds"])
    assert row["memory_how"] == cells.COUNTED
    assert row["memory_bytes"] > 4 * counts["total"]
    assert 0 <= row["merged_difference"] < 1e-5


def test_done_cells_are_not_run_again(swept: Made) -> None:
    folder, config, found, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/*/*")}
    again = run_sweep(config, folder)
    assert (again.ran, again.found, again.failed) == (2, 10, 2)  # the failed ones are tried again
    assert {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/*/*")} == before
    pd.testing.assert_frame_equal(again.tables.summary, found.tables.summary)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "tests.parquet"), found.tables.tests)
    assert len(pd.read_csv(folder / "results.csv")) == len(found.tables.results)


def test_the_command_ends_in_an_error_if_cells_failed(
    base: dict[str, Any],
    swept: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = {"experiment": base, "draws": 200, "grid": GRID, "seeds": [1, 2], "controls": True}
    write_yaml(tmp_path / "sweep.yaml", content)
    monkeypatch.setattr(sys, "argv", ["seqgraft", "sweep", str(tmp_path / "sweep.yaml"), str(swept[0])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == RunError.exit_code
    assert "2 cells were run, 10 were there already, 2 failed." in capsys.readouterr().out


def test_other_scoring_is_no_other_cell(base: dict[str, Any], tmp_path: Path) -> None:
    run_sweep(config_of(base, grid={"adapter": [PROBE]}), tmp_path)
    before = weights(tmp_path)
    again = run_sweep(
        config_of(base | {"evaluate": {"draws": 20, "fold": "valid"}}, grid={"adapter": [PROBE]}), tmp_path
    )
    assert weights(tmp_path) == before
    assert again.ran == 1
    assert again.tables.results["n"].tolist() == [len(open_dataset(base["data"]).rows("valid"))]


def test_an_interrupted_sweep_goes_on(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first epoch of the second cell; the result is that of the sweep that was not stopped."""
    config = config_of(base, grid={"adapter": [PROBE, LORA]})
    run_sweep(config, tmp_path / "whole")
    save, saved = train._save_checkpoint, []

    def stop(*given: Any) -> None:
        save(*given)
        saved.append(given)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "_save_checkpoint", stop)
        with pytest.raises(RunError, match=r"interrupted.*Run the same command again"):
            run_sweep(config, tmp_path / "parts")
    began = next(path for path in (tmp_path / "parts" / "cells").iterdir() if not (path / "cell.json").exists())
    assert (began / "checkpoints" / "last.safetensors").exists()
    resumed = run_sweep(config, tmp_path / "parts")
    assert (resumed.ran, resumed.found) == (1, 1)
    assert len(saved) == 3
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def die_or_run(job: cells.Job) -> None:
    if "ia3" in job.folder.name:
        os.kill(os.getpid(), signal.SIGKILL)
    cells._in_own_process(job)


def test_processes(base: dict[str, Any], swept: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time give what one after the other gives; one that dies takes no other along."""
    config = config_of(base, grid={"adapter": [PROBE, IA3]})
    with monkeypatch.context() as patch:
        patch.setattr(cells, "_in_own_process", die_or_run)
        found = run_sweep(config, tmp_path / "apart", workers=2)
    results = found.tables.results.set_index("method")
    assert found.failed == 1
    assert "killed" in results.loc["IA3 (attention, feedforward)", "message"]
    assert results.loc["linear probe", "process_peak_bytes"] > 50e6
    assert len(weights(tmp_path / "apart")) == 1
    assert weights(tmp_path / "apart").items() <= weights(swept[0]).items()


def test_a_cell_is_run_by_one_process(base: dict[str, Any], tmp_path: Path) -> None:
    job = cells.Job(tmp_path / "cell", parse_experiment(base), tested=False)
    with cells._locked(job.folder):
        cells.run_cell(job)
    assert "Another process runs this cell" in cells.read_cell(job.folder)["message"]


def test_ray(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ray with the calls that are made of it: its tasks get absolute paths, and one of them dies."""
    asked: list[Any] = []

    class RayError(RuntimeError):
        pass

    class Task:
        def __init__(self, function: Callable[[cells.Job], None]) -> None:
            self.function = function

        def remote(self, job: cells.Job) -> str:
            asked.append(job)
            if "ia3" not in job.folder.name:
                self.function(job)
            return job.folder.name

    def get(reference: str) -> None:
        if "ia3" in reference:
            raise RayError("the node went away\nmore")

    ray = types.ModuleType("ray")
    vars(ray).update(
        init=lambda **given: asked.append(given), remote=lambda **_: Task, get=get, cancel=asked.append,
        wait=lambda pending, num_returns: (pending[:1], pending[1:]),
        exceptions=types.SimpleNamespace(RayError=RayError),
    )  # fmt: skip
    config = config_of(base, grid={"adapter": [PROBE, IA3]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", ray)
    found = run_sweep(config, Path("sweep"), ray="auto")
    assert asked[0]["address"] == "auto"
    assert all(job.folder.is_absolute() and job.experiment.data.is_absolute() for job in asked[1:])
    assert found.tables.results.set_index("method")["message"].to_dict() == {
        "linear probe": "",
        "IA3 (attention, feedforward)": "the cell's task died on the cluster: the node went away",
    }
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="ray is not installed"):
        run_sweep(config, Path("sweep"), ray="auto")


# Tuning


def test_cells_of_other_weights_are_run_again(base: dict[str, Any], tmp_path: Path) -> None:
    """A model folder that was made again under its name is another model: nothing of the old one is taken for it."""
    model, config = tmp_path / "tiny", config_of(base | {"model": {"name": str(tmp_path / "tiny")}})
    tiny_pretrained(model)
    assert run_sweep(config, tmp_path / "sweep").ran == 1
    assert run_sweep(config, tmp_path / "sweep").ran == 0
    shutil.rmtree(model)
    tiny_pretrained(model, seed=1)
    again = run_sweep(config, tmp_path / "sweep")
    assert (again.ran, len(again.tables.results)) == (1, 1)
    assert len(list((tmp_path / "sweep" / "cells").iterdir())) == 2


def test_the_findings_of_many_data_sets_stand_in_a_table(base: dict[str, Any], tmp_path: Path) -> None:
    places = ["one", "two", "three"]
    for name in places:
        (tmp_path / name).symlink_to(base["data"])
    run_sweep(config_of(base, grid={"data": [str(tmp_path / name) for name in places]}), tmp_path / "sweep")
    found = findings(tmp_path / "sweep")
    assert list(found) == places
    text = write_report(tmp_path / "sweep").read_text()
    assert "<h1>In 0 of 3 data sets one method is told apart from all others" in text
    assert text.index("What was found?") < text.index("Which method?")


def test_every_method_gets_the_same_budget(base: dict[str, Any], tmp_path: Path) -> None:
    """Each tries as many settings, the validation score of the first seed chooses, and only the chosen are tested."""
    search = {"space": {"train.lr": {"low": 1e-4, "high": 1e-1}, "adapter.rank": [2, 4]}, "trials": 3}
    config = config_of(base, grid={"adapter": [PROBE, LORA]}, seeds=[5, 6], search=search)
    found = run_sweep(config, tmp_path)
    results = found.tables.results
    tried = results[results["seed"] == 5]
    assert tried.groupby("method").size().to_dict() == {"linear probe": 3, "LoRA (attention)": 3}
    for method, part in tried.groupby("method"):
        chosen = part.loc[part["valid_score"].idxmax()]
        runs = results[(results["method"] == method) & (results["role"] == "run")]
        assert runs["seed"].tolist() == [5, 6]
        assert runs["lr"].tolist() == [chosen["lr"]] * 2
        assert runs["rank"].tolist() == pytest.approx([chosen["rank"]] * 2, nan_ok=True)
    trials = results[results["role"] == "trial"]
    assert len(trials) == 4
    assert trials["score"].isna().all()
    assert [name for name in trials["cell"] if (tmp_path / "cells" / name / "evaluation").exists()] == []
    assert run_sweep(config, tmp_path).ran == 0
    title = write_report(tmp_path).read_text()
    assert "Trials by learning rate" in title


def test_unequal_budgets_are_refused(base: dict[str, Any], tmp_path: Path) -> None:
    search = {"space": {"train.lr": [1e-3, 1e-2], "adapter.rank": [2, 4]}, "trials": 4}
    for strategy in ("grid", "random"):
        config = config_of(base, grid={"adapter": [PROBE, LORA]}, search=search | {"strategy": strategy})
        with pytest.raises(ConfigError, match=r"linear probe has another number of settings than trials \(4\): 2"):
            run_sweep(config, tmp_path)
    assert not list(tmp_path.glob("cells/*"))


def test_optuna_proposes_the_same_again(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    space = {
        "train.lr": {"low": 1e-4, "high": 1e-1},
        "adapter.rank": [2, 4],
        "train.batch_size": {"low": 8, "high": 32},
    }
    search = {"space": space, "trials": 3, "strategy": "tpe"}
    config = config_of(base, grid={"adapter": [PROBE, LORA]}, search=search)
    found = run_sweep(config, tmp_path)
    assert found.ran == 6
    assert found.tables.results.groupby("method")["lr"].nunique().tolist() == [3, 3]
    assert run_sweep(config, tmp_path).ran == 0
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="Optuna is not installed"):
        run_sweep(config, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": {"train.lrr": [1]}}, "no such key: 'lrr'"),
        ({"grid": {"adapter": [PROBE], "adapter.rank": [2]}}, "no adapter of the sweep has this key: 'adapter.rank'"),
        ({"grid": {"train.lr": 1e-3}}, "must be a list of values"),
        ({"grid": {"train.seed": [1, 2]}}, "Seeds have a key of their own"),
        ({"seeds": [1, 1]}, "must be different numbers"),
        ({"grid": {"adapter.rank": [0], "adapter": [LORA]}}, "rank must be at least 1"),
        (
            {"grid": {"train.lr": [1]}, "search": {"space": {"train.lr": [1]}, "trials": 1}},
            "in the grid and in the search",
        ),
        ({"search": {"space": {"train.lr": {"low": 0, "high": 1}}, "trials": 1}}, "from a smaller to a larger number"),
        ({"search": {"space": {}, "trials": 0}}, "must be 1 or more"),
        ({"experiment": {}}, "the experiment is empty"),
        ({"experimint": {}}, "Did you mean 'experiment'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    settings: dict[str, Any], message: str, base: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SeqgraftError, match=re.escape(message)):
        run_sweep(config_of(base, **settings), tmp_path)
    assert not list(tmp_path.iterdir())


def test_plan(base: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(base, grid=GRID, seeds=[1, 2, 3])
    found = plan_sweep(config, tmp_path, workers=2)
    assert found.facts["cells"].startswith("at most 15 (5 combinations, 3 seeds)")
    assert "2 at a time" in found.facts["time"]
    assert re.match(r"\d+ MB", found.facts["memory"])
    assert ["nowhere" in str(problem) for problem in found.problems] == [True]
    assert not list(tmp_path.iterdir())


# Statistics


def test_mcnemar_is_exact() -> None:
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.8):
        first, second = rng.random(40) < 0.7, rng.random(40) < share
        b, c, p = mcnemar(first, second)
        assert (b, c) == (sum(x and not y for x, y in zip(first, second, strict=True)), int((second & ~first).sum()))
        # the probability of all splits that are at most as likely as the one seen
        chances = [comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
        assert p == pytest.approx(sum(chance for chance in chances if chance <= chances[b] * (1 + 1e-9)))
    assert mcnemar(np.array([True]), np.array([True])) == (0, 0, 1.0)


def test_holm_and_combined_p() -> None:
    values = [0.01, np.nan, 0.04, 0.03, 0.5]
    adjusted = holm(values)
    assert adjusted == pytest.approx([0.04, np.nan, 0.09, 0.09, 0.5], nan_ok=True)
    assert combine_p([0.02]) == 0.02
    assert combine_p([0.5, 0.02]) == pytest.approx(0.04)
    assert combine_p([0.9, 0.02, 0.04]) == pytest.approx(0.06)
    assert np.isnan(combine_p([]))
    # p of independent nulls: at most as many below 0.05 as promised
    drawn = np.random.default_rng(0).random((4000, 5))
    assert np.mean([combine_p(row) < 0.05 for row in drawn]) <= 0.05


def test_hierarchical_draws_are_what_loops_give() -> None:
    """Items are repeated as often as their block was drawn, runs as often as they were, and the mean is over those."""
    rng = np.random.default_rng(1)
    blocks = np.repeat(np.arange(10), 3)
    truth = rng.normal(size=(30, 2, 1))
    predictions = [truth + rng.normal(scale=scale, size=truth.shape) for scale in (0.5, 1.0, 2.0)]
    runs = [Moments.of(truth, predicted) for predicted in predictions]
    found = hierarchical_draws(runs, "pearson", blocks, draws=50, seed=3)
    generator = np.random.default_rng([3, 3])
    (weights,) = _draws(blocks, 50, 3)
    taken = generator.multinomial(2, [1 / 3] * 3, size=50)
    for draw in range(50):
        items = np.repeat(np.arange(30), weights[draw].astype(int))
        for track in range(2):
            each = [
                METRICS["pearson"].function(truth[items, track, 0], predicted[items, track, 0])
                for predicted, times in zip(predictions, taken[draw], strict=True)
                for _ in range(times)
            ]
            assert found[draw, track] == pytest.approx(np.mean(each))
    assert hierarchical_draws(runs, "pearson", np.zeros(30, np.int64)).shape == (0, 2)


def test_the_spread_between_seeds_is_unbiased() -> None:
    """Where items do not differ, the draws' variance is that of a mean of n seeds: s2 / n with s2 over n - 1."""
    errors = np.array([0.1, 0.4, 0.9])
    truth = np.random.default_rng(0).normal(size=(20, 1, 1))
    runs = [Moments.of(truth, truth + np.sqrt(error)) for error in errors]
    drawn = hierarchical_draws(runs, "mse", np.arange(20), draws=20_000)
    assert drawn.mean() == pytest.approx(errors.mean(), rel=0.02)
    assert drawn.var() == pytest.approx(errors.var(ddof=1) / 3, rel=0.03)
    single = hierarchical_draws(runs[:1], "mse", np.arange(20), draws=100)
    assert single.var() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_methods_that_are_alike_are_rarely_told_apart(seeds: int) -> None:
    """In about 5 % of comparisons (two seeds: 9 %), not in a fifth of them as with a bootstrap of two that agree."""
    rng = np.random.default_rng(seeds)
    blocks, found, plain = np.arange(50), [], []
    for _ in range(400):
        of_seeds = rng.normal(size=seeds) * (seeds > 1)
        mean = of_seeds.mean() + rng.normal(scale=0.2)
        taken = rng.multinomial(max(seeds - 1, 1), np.full(seeds, 1 / seeds), size=400) / max(seeds - 1, 1)
        drawn = (mean + (taken @ of_seeds - of_seeds.mean()) + rng.normal(scale=0.2, size=400))[:, None]
        estimate, p = hierarchical_estimate(np.array([mean]), drawn, of_seeds, blocks)
        found.append(p < 0.05)
        plain.append(bootstrap_p(drawn) < 0.05)
        assert estimate.mean_low <= mean <= estimate.mean_high
    assert np.mean(found) < (0.13 if seeds == 2 else 0.09)  # three standard errors above
    if seeds == 2:
        assert np.mean(plain) > 0.18


def test_p_of_the_bootstrap() -> None:
    assert bootstrap_p(np.linspace(1, 2, 99)[:, None]) == pytest.approx(2 / 100)
    assert bootstrap_p(np.linspace(-1, 1, 99)[:, None]) == 1.0
    assert np.isnan(bootstrap_p(np.empty((0, 1))))


def test_the_tables_compare_what_was_stored(swept: Made) -> None:
    folder, _, found, _ = swept
    results, summary, tests = found.tables.results, found.tables.summary, found.tables.tests
    scored = results[results["score"].notna()]
    for label, part in scored.groupby("label"):
        rank = part["rank"].iloc[0]
        same = summary["rank"].isna() if rank != rank else summary["rank"] == rank
        row = summary[(summary["method"] == part["method"].iloc[0]) & same].iloc[0]
        assert row["score"] == pytest.approx(part["score"].mean()), label
        assert row["seed_sd"] == pytest.approx(part["score"].std())
        assert row["low"] < row["score"] < row["high"]
    lora = summary[summary["method"] == "LoRA (attention)"]
    assert lora["chosen"].sum() == 1
    assert lora.loc[lora["chosen"], "valid_score"].iloc[0] == lora["valid_score"].max()
    floors = summary[summary["role"] == "baseline"]
    assert floors["method"].tolist() == ["k-mer regression", "majority"]
    cell = folder / "cells" / scored["cell"].iloc[0] / "evaluation"
    metrics = (
        pd.read_parquet(cell / "metrics.parquet").query("metric == 'class_mcc' and track == ''").set_index("model")
    )
    for row in floors.to_dict("records"):
        assert row["score"] == pytest.approx(metrics.loc[row["method"], "value"])
    score = {row["method"]: row["score"] for row in summary[summary["chosen"]].to_dict("records")}
    names = ["linear probe", "LoRA (attention)", "IA3 (attention, feedforward)"]
    pairs = [tuple(pair) for pair in tests.query("family == 'methods'")[["first", "second"]].to_numpy()]
    assert pairs == list(combinations(names, 2))
    for row in tests.to_dict("records"):
        assert row["difference"] == pytest.approx(score[row["first"]] - score[row["second"]])
        assert row["p_holm"] >= row["p"]
        assert row["told_apart"] == (row["p_holm"] < 0.05)
    first = tests.iloc[0]
    right = {}
    for method in names[:2]:
        rank = summary[summary["chosen"] & (summary["method"] == method)]["rank"].iloc[0]
        rows = scored[(scored["method"] == method) & ((scored["rank"] == rank) | scored["rank"].isna())]
        for entry in rows.to_dict("records"):
            with np.load(folder / "cells" / entry["cell"] / "evaluation" / "moments.npz", allow_pickle=False) as arrays:
                sums = arrays["moments"]
            right[method, entry["seed"]] = sums[1].argmax(1) == sums[2].argmax(1)
    each = [mcnemar(right[names[0], seed], right[names[1], seed]) for seed in (1, 2)]
    assert first["p_mcnemar"] == pytest.approx(min(1, 2 * min(p for _, _, p in each)))
    assert first["only_first_right"] == np.mean([b for b, _, _ in each])


def test_copies_of_training_rows_count_for_no_method(base: dict[str, Any], tmp_path: Path) -> None:
    """Two test sequences stand in training too: runs, baselines and pairs are scored on the other 18."""
    dataset = tiny_labels(tmp_path / "copied", "softmax", rows=120, lengths=(40, 60), seed=1)
    train_rows, test_rows = (dataset.rows(fold) for fold in ("train", "test"))
    for name in ("codes", "lengths"):
        values = np.array(getattr(dataset, name))
        values[test_rows[:2]] = values[train_rows[:2]]
        np.save(tmp_path / "copied" / f"{name}.npy", values)
    config = config_of(base | {"data": str(tmp_path / "copied")}, grid={"adapter": [PROBE, IA3]})
    tables = run_sweep(config, tmp_path).tables
    assert tables.results["fold"].tolist() == ["test without copies"] * 2
    assert set(tables.results["n"]) == set(tables.summary["n"]) == set(tables.tests["n"]) == {18}
    summary = tables.summary.set_index("method")["score"]
    assert tables.results.set_index("method")["score"].to_dict() == pytest.approx(summary.iloc[:2].to_dict())
    cell = tmp_path / "cells" / tables.results["cell"].iloc[0] / "evaluation" / "metrics.parquet"
    metrics = pd.read_parquet(cell).query("track == ''").drop_duplicates("model").set_index("model")
    assert metrics.loc["k-mer regression", "value"] == pytest.approx(summary["k-mer regression"])


def test_every_column_is_documented(swept: Made) -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    for name in ("results", "summary", "tests"):
        table = re.search(rf"^<!-- columns: {name} -->\n((?:\|.*\n)+)", text, re.MULTILINE)
        assert table
        named = [key for line in table[1].splitlines()[2:] for key in re.findall(r"`(\w+)`", line.split("|")[1])]
        assert set(named) == set(getattr(swept[2].tables, name).columns), name


# The report


def part(scores: Mapping[str, float], apart: set[frozenset[str]], floor: float = 0.5) -> _Slice:
    """The part of a report with these scores, where these pairs are told apart."""
    rows = [("run", name, value) for name, value in scores.items()] + [("baseline", "k-mer regression", floor)]
    summary = pd.DataFrame(rows, columns=["role", "method", "score"]).assign(
        dataset="d", group="g", model="m", metric="auroc", low=0.4, high=0.9, chosen=True
    )
    summary.loc[summary["role"] == "baseline", "model"] = ""
    pairs = [("methods", *pair) for pair in combinations(scores, 2)]
    pairs += [("floors", name, "k-mer regression") for name in scores]
    tests = pd.DataFrame(pairs, columns=["family", "first", "second"])
    value = {**scores, "k-mer regression": floor}
    tests["difference"] = [value[a] - value[b] for a, b in tests[["first", "second"]].to_numpy()]
    tests["told_apart"] = [frozenset(pair) in apart for pair in tests[["first", "second"]].to_numpy()]
    tests = tests.assign(dataset="d", group="g", first_model="m", second_model="m")
    tests["p"] = 0.01
    results = pd.DataFrame({"dataset": ["d"], "group": ["g"], "method": [next(iter(scores))]})
    return _Slice(Path(), results, summary, tests)


def finding(scores: Mapping[str, float], apart: set[frozenset[str]]) -> str:
    return part(scores, apart).finding


@pytest.mark.parametrize("draw", [epoch_curves, setting_lines, cost_dots], ids=lambda draw: draw.__name__)
def test_no_two_of_many_methods_look_alike(draw: Callable[..., Any]) -> None:
    methods = [f"method {number}" for number in range(10)]
    rows = [
        {"method": name, "run": name, "epoch": x, "x": x, "value": 0.5, "low": 0.4, "high": 0.6}
        for name in methods
        for x in (1, 2)
    ]
    labels = {} if draw is epoch_curves else {"xlabel": "x"}
    (axes,) = draw(pd.DataFrame(rows), title="t", ylabel="y", methods=methods, **labels).axes
    looks = {
        (line.get_color(), line.get_marker(), line.get_fillstyle())
        for line in axes.lines
        if line.get_label() in methods
    }
    assert len(looks) == len(methods)


def test_the_title_counts_many_data_sets() -> None:
    """The findings of one or two are the title, those of more stand in a table."""
    scores, pair = {"LoRA": 0.7, "IA3": 0.6}, frozenset(["LoRA", "IA3"])
    over = {frozenset(["LoRA", "k-mer regression"])}
    level, clear, beyond = part(scores, set()), part(scores, {pair}), part(scores, over)
    below, alone = part(scores, over, floor=0.8), part({"LoRA": 0.7}, set())
    assert _title([level]) == level.finding
    assert _title([level, clear]) == f"d: {level.finding}. d: {clear.finding}"
    assert _title([level, clear, beyond, below, alone]) == (
        "In 1 of 5 data sets one method is told apart from all others; in 1 of 5 one is above the best baseline"
    )


def test_the_title_ranks_nothing_that_is_not_told_apart() -> None:
    kmer = "k-mer regression"
    scores = {"linear probe": 0.6, "LoRA": 0.7, "DoRA": 0.71}
    both = {frozenset([name, kmer]) for name in scores}
    assert finding(scores, set()) == f"Linear probe, LoRA and DoRA are not told apart by AUROC; none is above {kmer}"
    assert finding(scores, both) == f"Linear probe, LoRA and DoRA are not told apart by AUROC; all are above {kmer}"
    two = {frozenset(["linear probe", "DoRA"]), frozenset(["DoRA", kmer])}
    assert finding(scores, two) == (
        f"LoRA and DoRA are not told apart by AUROC; linear probe is below DoRA; only DoRA is above {kmer}"
    )
    best = {frozenset(["DoRA", "LoRA"]), frozenset(["linear probe", "DoRA"])}
    assert finding(scores, best | both).startswith("DoRA has a higher AUROC than linear probe and LoRA; all are above")
    assert (
        finding({"LoRA": 0.4}, {frozenset(["LoRA", kmer])})
        == f"LoRA reaches AUROC 0.40 (0.40 to 0.90); it is below {kmer}"
    )


def test_the_report_of_a_sweep(swept: Made) -> None:
    folder = swept[0]
    text = write_report(folder).read_text(encoding="utf-8")
    for words in (
        "2 of 12 cells have no result", "no module at the site: &#39;nowhere&#39;", "k-mer regression", "McNemar",
        "Are they told apart?", "Rank (or width)", "peak memory of training", "on random weights",
        cells.COUNTED.split()[-1],
    ):  # fmt: skip
        assert words in text, words
    assert "nan" not in re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL).lower().replace("finance", "")
    assert "mathdefault" not in text


def test_an_unfinished_sweep_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    write_yaml(tmp_path / "sweep.yaml", {})
    with pytest.raises(RunError, match="Run 'seqgraft sweep' again"):
        write_report(tmp_path)


# The command, as the guide has it


def test_the_guide(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_readme import blocks

    found = {block.marker: block.code for block in blocks((ROOT / "docs" / "guides" / "sweep.md").read_text())}
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(found["file: sweep.yaml"])
    assert len(read_sweep(Path("sweep.yaml")).seeds) == 3
    Path("data").mkdir()
    Path("data/promoters").symlink_to(base["data"])
    smaller = [
        "seeds=[1]",
        "search.trials=1",
        "experiment.train.epochs=1",
        f"experiment.model={{name: '{base['model']['name']}'}}",
    ]
    for line in found["run"].splitlines():
        words = shlex.split(line)
        words += [word for setting in smaller for word in ("--set", setting)] if words[1] == "sweep" else []
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    said = capsys.readouterr().out
    assert "cells     at most 4 (4 combinations, 1 seed, 1 trial of each (random))" in said
    assert "5 cells were run, 0 were there already, 0 failed." in said
    assert Path("runs/sweep/report.html").is_file()
    write_yaml(Path("sweep.yaml"), read_yaml(Path("sweep.yaml"), smaller))
    names: dict[str, Any] = {}
    exec(compile(found["run: after the commands"], "sweep.md", "exec"), names)
    assert (names["swept"].ran, names["swept"].found) == (0, 5)
    assert names["summary"]["chosen"].any()
