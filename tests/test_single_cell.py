"""The single-cell guide as it stands, the example at its smallest size, and at full size what it must reach."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from guides import run_guide, seqgraft
from seqgraft.data import open_dataset
from seqgraft.data.dataset import Dataset
from seqgraft.data.simulate import Truth, open_truth
from seqgraft.data.simulated_cells import cell_tracks
from seqgraft.specificity import ACROSS, Ceilings, across_cards, differential_bins
from seqgraft.tracks import squash
from test_readme import blocks

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "single_cell"
DEEP = ("bcell", "mono", "tcell")
ASSAYS = ("atac", "k27ac", "k4me3", "rna")

#: Share of the ceiling that the specificity of every deep group reaches at least in every assay, strands averaged.
LEAST = 0.85

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


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_guide("single-cell")
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
    assert Path("runs/full/report.html").is_file()
    specific = of_ceiling("runs/full")
    assert set(specific.index.get_level_values("group")) == set(ASSAYS)


# ---- at full size ----


def of_ceiling(run: str) -> pd.Series:
    """Share of the split-half ceiling that the specificity of each (group, track) reaches."""
    metrics = pd.read_parquet(Path(run) / "evaluation" / "metrics.parquet")
    metrics = metrics[metrics["model"].str.startswith("full") & (metrics["fold"] == "test") & (metrics["track"] != "")]
    own = metrics[metrics["metric"] == "pearson_across_tracks_of_ceiling"]
    found: pd.Series = own.set_index(["group", "track"])["value"]
    return found


def of_ceiling_by_truth(truth: Truth, dataset: Dataset) -> pd.Series:
    """The same share for the expected signal itself, which no model can do better than, on the test fold."""
    rows, names = dataset.rows("test"), dataset.tracks.names
    rates = truth.cell_rates().set_index(["chrom", "start"])[names].sort_index()
    expected = [
        rates.loc[chrom].loc[start : end - 1].to_numpy().T
        for chrom, start, end in dataset.regions.iloc[rows][["chrom", "start", "end"]].itertuples(index=False)
    ]
    predicted = squash(np.stack(expected), dataset.tracks, dataset.info.bin_size)
    observed = dataset.squashed_targets(rows)
    differential = differential_bins(dataset.tracks, observed, dataset.info.bin_size)
    ceilings = Ceilings.of(dataset, rows, differential)
    assert ceilings is not None
    found = {}
    for card in across_cards(dataset.tracks, observed, predicted, rows, differential):
        if card.metric == ACROSS:
            ceiling = ceilings.compute(ceilings.cards[card.group, ACROSS])
            shares = card.statistics.compute("pearson") / ceiling
            found |= {(card.group, name): share for name, share in zip(card.units, shares, strict=True)}
    return pd.Series(found)


def right_types(truth: pd.DataFrame, effects: pd.DataFrame, types: tuple[str, ...]) -> pd.Series:
    """Whether the track that changes most is of the right cell type, of strong specific causal variants, by their id.

    Strong: a log2 fold change of 0.5 or more of the expected signal in one cell type; specific: twice that of others.
    """

    def sizes(table: pd.DataFrame) -> np.ndarray:
        """The largest mean over strands of the changes in any assay, ``(variants, types)``."""
        changes = {
            name: table[[n for n in cell_tracks(types) if n.rstrip("+-") == name]].abs().mean(axis=1)
            for name in (f"{one}_{assay}" for one in types for assay in ASSAYS)
        }
        return np.stack([np.max([changes[f"{one}_{a}"] for a in ASSAYS], axis=0) for one in types], axis=1)

    truth, effects = truth.set_index("id"), effects.set_index("id").loc[truth["id"]]
    true, predicted = sizes(truth), sizes(effects)
    ordered = np.sort(true, axis=1)
    chosen = (truth["kind"] == "causal") & (ordered[:, -1] >= 0.5) & (ordered[:, -1] >= 2 * ordered[:, -2])
    return pd.Series(true.argmax(axis=1) == predicted.argmax(axis=1), index=truth.index)[chosen]


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_the_example_in_full(example: Path) -> None:
    """What is reached of the split-half ceiling by the deep groups, and which cell types variants are given to."""
    truth = run_example(example, {})
    types = truth.simulation.conditions
    reached, by_truth = of_ceiling("runs/full"), of_ceiling_by_truth(truth, open_dataset("data/cells"))
    for assay, one in product(ASSAYS, DEEP):
        own = [(assay, name) for name in cell_tracks(types) if name.rstrip("+-") == f"{one}_{assay}"]
        assert by_truth[own].between(0.95, 1.06).all(), by_truth[own]
        assert reached[own].mean() >= LEAST, reached[own]
    quality = pd.read_csv("data/cells.qc.tsv", sep="\t").set_index("track")
    assert (quality.loc[[name for name in cell_tracks(DEEP) if "rna" not in name], "reliability"] > 0.75).all()
    right = right_types(truth.cell_variants(), pd.read_parquet("effects.parquet"), types)
    assert len(right) >= 40
    assert right.mean() >= 0.85
