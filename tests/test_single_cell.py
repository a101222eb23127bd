"""The single-cell guide as it stands, the example at its smallest size, and at full size what it must reach."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from seqgraft.__main__ import main
from seqgraft.data import open_dataset
from seqgraft.data.simulate import Truth, open_truth
from seqgraft.data.simulated_cells import cell_tracks
from test_readme import blocks

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "guides" / "single-cell.md"
EXAMPLE = ROOT / "examples" / "single_cell"
DEEP = ("bcell", "mono", "tcell")
ASSAYS = ("atac", "k27ac", "k4me3", "rna")

#: The commands of examples/README.md in a size that takes seconds.
SMALLEST = {
    "simulate": [
        "chromosomes=3",
        "chromosome_length=24576",
        "variants=6",
        "cells={bcell: 60, mono: 50, nk: 9, tcell: 60}",
    ],
    "prepare": ["folds.valid=[chr2]", "folds.test=[chr3]"],
    "fit": ["train.epochs=1", "evaluate.draws=50"],
}


def seqgraft(line: str, more: dict[str, list[str]] | None = None) -> None:
    """Runs a command of a page in this process."""
    words = shlex.split(line, comments=True)
    assert words[0] == "seqgraft", line
    words += [word for setting in (more or {}).get(words[1], ()) for word in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code, line


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    found = [block for block in blocks(GUIDE.read_text()) if block.language]
    assert {block.marker.partition(":")[0] for block in found} == {"run", "file"}
    for block in found:
        if block.marker != "run":
            Path(block.marker.removeprefix("file: ")).write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, GUIDE.name, "exec"), names)
        else:
            for line in block.code.splitlines():
                seqgraft(line)
    said = capsys.readouterr().out
    assert "192 of 211 barcodes have a label" in said
    effects, types = names["effects"], ("bcell", "mono", "nk")
    assert set(cell_tracks(types)) <= set(effects.columns)
    for assay in ASSAYS:
        assert set(effects[f"{assay}_most_affected"]) <= set(types)
    assert len(list(Path("figures").iterdir())) == 2
    assert {"split-half ceiling", "mean track"} <= set(names["specific"]["model"])
    assert set(names["confusion"]["observed"]) == set(types)
    assert Path("runs/lora/report.html").stat().st_size > 10_000
    assert open_dataset("data/deep").tracks.names == ["bcell", "mono"]


def run_example(folder: Path, settings: dict[str, list[str]]) -> Truth:
    """The commands of examples/README.md, in the folder."""
    page = (ROOT / "examples" / "README.md").read_text()
    (block,) = [block.code for block in blocks(page) if "data/cells" in block.code]
    for line in block.splitlines():
        seqgraft(line, settings)
    return open_truth(folder / "sim")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(EXAMPLE, tmp_path / "single_cell"))
    monkeypatch.chdir(folder)
    return folder


def test_the_example_at_its_smallest(example: Path) -> None:
    truth = run_example(example, SMALLEST)
    dataset = open_dataset("data/cells")
    assert dataset.tracks.names == cell_tracks(truth.simulation.conditions)
    depth = dataset.tracks.frame.set_index("name")["depth"]
    assert all(depth[f"nk_{assay}"] < 0.4 * depth[f"bcell_{assay}"] for assay in ("atac", "k27ac", "k4me3"))
    effects = pd.read_parquet("effects.parquet")
    assert len(effects) == len(truth.cell_variants())
    assert Path("runs/lora/report.html").is_file()
    specific = of_ceiling("runs/lora")
    assert set(specific.index.get_level_values("group")) == set(ASSAYS)


# ---- at full size ----


def of_ceiling(run: str) -> pd.Series:
    """Share of the split-half ceiling that the specificity of each (group, track) reaches."""
    metrics = pd.read_parquet(Path(run) / "evaluation" / "metrics.parquet")
    own = metrics.query("metric == 'pearson_across_tracks_of_ceiling' and track != '' and fold == 'test'")
    found: pd.Series = own.set_index(["group", "track"])["value"]
    return found


def right_types(truth: pd.DataFrame, effects: pd.DataFrame, assay: str, types: list[str]) -> np.ndarray:
    """Whether strong specific variants of an assay are given to their cell type.

    Strong: a log2 fold change of 0.5 or more of the expected signal in one cell type; specific: twice that of others.
    """
    columns = [[name for name in cell_tracks(types) if name.rstrip("+-") == f"{one}_{assay}"] for one in types]
    size = np.stack([truth[own].abs().mean(axis=1) for own in columns], axis=1)
    first, ordered = size.argmax(axis=1), np.sort(size, axis=1)
    chosen = (truth["kind"] == "causal").to_numpy() & (ordered[:, -1] >= 0.5) & (ordered[:, -1] >= 2 * ordered[:, -2])
    true = np.array(types)[first]
    right: np.ndarray = (effects[f"{assay}_most_affected"].to_numpy() == true)[chosen]
    return right
