"""examples/setting_the_bar: budgets are equal, folds and overlaps are right, and its path from data to tables works."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from seqgraft.data import open_dataset, prepare_source
from seqgraft.data.labelled import LabelledSource
from seqgraft.experiment import build, parse_source, read_yaml
from seqgraft.grids import SweepConfig, methods_of, proposals, read_sweep
from seqgraft.sequence import decode, encode, reverse_complement
from seqgraft.sweep import run_sweep

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "setting_the_bar"
COMPARISONS = ("bar.yaml", "species-lm.yaml", "dnabert-2.yaml")
BASES = np.array(list("ACGT"))


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("setting_the_bar", EXAMPLE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setting_the_bar", module)
        patch.setenv("SEQGRAFT_SHARED", os.environ.get("SEQGRAFT_SHARED", "shared"))
        patch.setenv("REPORTER_TABLE", "reporter.csv")
        patch.setenv("SPECIESLM_COMMIT", "0" * 40)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize("name", COMPARISONS)
def test_every_method_has_the_same_budget(name: str) -> None:
    config = read_sweep(EXAMPLE / name)
    methods = methods_of(config)
    assert config.search is not None
    budgets = [len(list(asked)) for asked in proposals(config.search, methods)]
    assert set(budgets) == {config.search.trials}
    assert 2 <= config.search.trials <= 4
    assert len(config.seeds) >= 3
    assert config.controls
    assert len(methods) == len(config.grid["data"]) * len(config.grid["adapter"])


def test_every_sweep_reads_data_of_this_folder(script: ModuleType) -> None:
    for path in [EXAMPLE / f"{name}.yaml" for name in script.SWEEPS] + [EXAMPLE / name for name in COMPARISONS]:
        used = {Path(method.experiment(1).data) for method in methods_of(read_sweep(path))}
        assert {folder.parent for folder in used} == {Path("data")}
        assert all((EXAMPLE / f"{folder.name}.data.yaml").is_file() for folder in used)
    for name in script.DATA:
        assert isinstance(parse_source(read_yaml(EXAMPLE / f"{name}.data.yaml")), LabelledSource)


def test_files_of_the_data_are_there(script: ModuleType, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQGRAFT_SHARED", str(shared))
    for name in script.DATA:
        source = parse_source(read_yaml(EXAMPLE / f"{name}.data.yaml"))
        assert isinstance(source, LabelledSource)
        assert [str(file.path) for file in source.files if not file.path.is_file()] == []


def test_designs_of_a_block_stay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reporter's table has a row per design, and mutants of a native sequence share its block."""
    draw = np.random.default_rng(1)
    rows = []
    for block in range(40):
        native = draw.choice(BASES, 102)
        for design in range(3):
            changed = native.copy()
            changed[20 * design : 20 * design + 15] = draw.choice(BASES, 15)
            rows.append(
                {
                    "design": f"{block}.{design}",
                    "block": block,
                    "variable": "".join(changed),
                    "expression": 2.0 + design,
                }
            )
    table = pd.DataFrame(rows)
    table.to_csv(tmp_path / "reporter.csv", index=False)
    monkeypatch.setenv("REPORTER_TABLE", str(tmp_path / "reporter.csv"))
    tested = []
    for fold in (0, 1):
        source = parse_source(read_yaml(EXAMPLE / "reporter.data.yaml", [f"folds.fold={fold}"]))
        regions = prepare_source(source, tmp_path / f"reporter-{fold}").regions
        assert regions.groupby("block")["fold"].nunique().max() == 1
        assert set(regions["fold"]) == {"train", "valid", "test"}
        tested.append(set(regions.loc[regions["fold"] == "test", "block"]))
    assert not tested[0] & tested[1]


# ---- the path from data to tables, small ----


def simulated(folder: Path, seed: int, motif: str = "TGACTCA") -> str:
    """150 sequences of 60 bp, half of them with a motif; returns a chromosome in which some of the test ones stand."""
    draw = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(150):
        letters = draw.choice(BASES, 60)
        if number % 2:
            at = draw.integers(0, 53)
            letters[at : at + 7] = list(motif)
        fold = "train" if number < 60 else "valid" if number < 80 else "test"
        rows.append({"sequence": "".join(letters), "label": number % 2, "fold": fold})
    table = folder.with_suffix(".csv")
    pd.DataFrame(rows).to_csv(table, index=False)
    made = {
        "kind": "labelled",
        "files": [{"path": str(table)}],
        "labels": [{"column": "label", "task": "classification"}],
    }
    prepare_source(parse_source(made), folder)
    own, other = rows[80]["sequence"], decode(reverse_complement(encode(rows[81]["sequence"])))
    return "A" * 50 + "".join(row["sequence"] for row in rows[82:115]) + own + other


def small(name: str, **changes: Any) -> SweepConfig:
    """A sweep of the example with fewer cells."""
    content = read_yaml(EXAMPLE / f"{name}.yaml")
    content["experiment"]["train"] |= {"epochs": 1, "batch_size": 32}
    content["experiment"]["evaluate"]["draws"] = 20
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    return build(SweepConfig, {**content, "draws": 100}, name)


def test_from_data_to_tables(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    chromosome = simulated(Path("data/h3"), seed=1)
    monkeypatch.setattr(script, "training_genome", lambda: {"chrI": chromosome.encode()})
    adapters = [{"kind": "linear_probe"}, {"kind": "prompt", "tokens": 4}]
    search = {"space": {"train.lr": [3e-3, 1e-2]}, "trials": 2}
    config = small("bar", grid={"data": ["data/h3"], "adapter": adapters}, search=search, seeds=[1, 2])
    swept = run_sweep(config, Path("runs/bar"))
    assert swept.failed == 0
    assert swept.tables.results["role"].value_counts().to_dict() == {"run": 4, "trial": 2, "control": 2}
    run_sweep(
        small("rank", experiment={"data": "data/h3"}, grid={"adapter.rank": [2, 4]}, seeds=[1]), Path("runs/rank")
    )
    script.write_figures(["rank"])
    tables = script.make_tables(["rank"])
    assert list(tables) == ["findings", "scores", "costs", "overlap"]
    text = "\n".join(tables.values())
    assert "| linear probe | 0." in text
    assert "| k-mer regression | " in text
    assert "| the best, on random weights | " in text
    inside, outside = (
        pd.DataFrame([line.split(" | ") for line in text.splitlines() if f" | {place} | " in line])
        for place in ("inside", "outside")
    )
    assert set(inside[2]) == {"35"}  # 33 as they are, one more, and one as its reverse complement
    assert set(outside[2]) == {"35"}
    assert len(inside) == len(outside) == 2
    for name in ("methods-h3", "seconds-per-epoch-h3", "trainable-h3", "loss-h3", "by-rank"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<svg "), name
    page = tmp_path / "page" / "bar.md"
    page.parent.mkdir()
    page.write_text("# Bar\n\n<!-- scores -->\nold\n<!-- end of scores -->\n\n![which](bar-by-rank.svg)\n\nlast\n")
    for _ in range(2):  # the second time changes nothing
        script.publish(page, tables)
        assert page.read_text() == (
            f"# Bar\n\n<!-- scores -->\n\n{tables['scores']}\n<!-- end of scores -->\n\n"
            "![which](bar-by-rank.svg)\n\nlast\n"
        )
    assert (page.parent / "bar-by-rank.svg").read_bytes() == (tmp_path / "by-rank.svg").read_bytes()


def test_overlap_is_of_whole_sequences(script: ModuleType, tmp_path: Path) -> None:
    chromosome = simulated(tmp_path / "h3", seed=2)
    dataset = open_dataset(tmp_path / "h3")
    rows = dataset.rows("test")
    assert script.overlap(dataset, rows, {"chrI": chromosome.encode()}).sum() == 35
    assert not script.overlap(dataset, rows, {"chrI": chromosome[:108].encode()}).any()
    assert script.overlap(dataset, rows, {"chrI": b"A", "chrII": chromosome[:110].encode()}).tolist() == [
        number == 2 for number in range(70)
    ]
