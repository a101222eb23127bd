"""What cell types have of their own: by hand, against a known truth, and what halves of the cells allow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from scipy.special import expit

from builders import BIN_SIZE, SETTINGS
from seqgraft.adapters import LinearProbe, adapt
from seqgraft.data.dataset import Dataset, DatasetInfo, open_dataset, write_dataset
from seqgraft.evaluate import EvaluateConfig, Evaluation, evaluate_model
from seqgraft.genome import Genome
from seqgraft.intervals import reliability, spearman_brown
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.scoring import METRICS_OF_LINK
from seqgraft.sequence import decode
from seqgraft.specificity import (
    ABOVE,
    ACROSS,
    CEILING,
    DIFFERENTIAL,
    OF_CEILING,
    RECOGNISED,
    WITHOUT,
    Ceilings,
    across_cards,
    confusion_table,
    differential_bins,
)
from seqgraft.tracks import TrackTable

Array = npt.NDArray[Any]
REGIONS, BINS, WINDOW = 60, 32, 576
TYPES = ("B", "NK", "T")
DEPTH = {"B": 4.0, "NK": 1.0, "T": 16.0}
START = ModelConfig("convnet", settings=SETTINGS)
CONFIG = EvaluateConfig(draws=30, block=2000, baselines=("mean_profile",))


def rates(seed: int = 0) -> Array:
    """Expected signal of each cell type ``(regions, types, bins)``: much in common, some its own, unequal depth."""
    rng = np.random.default_rng(seed)
    common = rng.gamma(0.5, 1, (REGIONS, 1, BINS))
    own = rng.gamma(0.3, 1, (REGIONS, len(TYPES), BINS)) * (rng.random((REGIONS, len(TYPES), 1)) < 0.3)
    return np.asarray((common + 2 * own) * np.array(list(DEPTH.values()))[:, None])


def cells(folder: Path, *, halves: bool = True, assays: tuple[str, ...] = ("atac",), test: int = 40) -> Dataset:
    """Poisson counts of two halves of the cells of three groups; the first regions are for training and validation."""
    rng, target = np.random.default_rng(1), BINS * BIN_SIZE
    codes = rng.integers(0, 4, WINDOW + REGIONS * target, dtype=np.uint8)
    fasta = folder.with_suffix(".fa")
    fasta.write_text(f">chr1\n{decode(codes)}\n")
    fold = np.array(["test"] * REGIONS, dtype=object)
    fold[: REGIONS - test] = ["train", "valid"] * ((REGIONS - test) // 2)
    starts = 32 + target * np.arange(REGIONS)
    regions = pd.DataFrame({"chrom": "chr1", "start": starts, "end": starts + target, "strand": ".", "name": ""})
    names = [{"name": f"{t}_{a}", "group": a, "condition": t} for a in assays for t in TYPES]
    expected = np.concatenate([rates(seed) for seed, _ in enumerate(assays)], axis=1)
    parts = [rng.poisson(expected / 2).astype(np.float32) for _ in range(2)]
    with write_dataset(folder, (REGIONS, len(names), BINS)) as writer:
        writer.targets[:] = parts[0] + parts[1]
        if halves:
            writer.new_halves(int((fold != "train").sum()))[:] = parts[0][fold != "train"]
        recorded = {"path": str(fasta), "hash": Genome.open(fasta).hash}
        info = DatasetInfo("fragments", WINDOW, BINS, BIN_SIZE, recorded)
        writer.finish(info, regions.assign(fold=fold), TrackTable.build(names))
    return open_dataset(folder)


def evaluated(dataset: Dataset, extra: dict[str, Array] | None = None) -> Evaluation:
    model = build_model(START, dataset.tracks, dataset.info)
    adapt(model, LinearProbe())
    return evaluate_model(model, dataset, CONFIG, "run", START, extra=extra)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return cells(tmp_path_factory.mktemp("cells") / "data")


@pytest.fixture(scope="module")
def found(dataset: Dataset) -> Evaluation:
    """With three more predictions: the expected signal, that of the wrong cell types, and the same for all of them."""
    truth = rates()[dataset.rows("test")].astype(np.float32)
    flat = np.repeat(truth.mean(1, keepdims=True), len(TYPES), axis=1)
    noise = np.random.default_rng(2).gamma(9, 1 / 9, flat.shape).astype(np.float32)
    return evaluated(dataset, {"oracle": truth, "turned": truth[:, [2, 0, 1]], "alike": flat * noise})


def values(table: pd.DataFrame, model: str, metric: str) -> pd.Series[float]:
    some = table[(table["model"] == model) & (table["metric"] == metric) & (table["unit"] != "raw")]
    return some.set_index("track")["value"]


def test_levels_are_divided_out_before_centring(dataset: Dataset, found: Evaluation) -> None:
    """By hand; and without it, a deep track's own signal would be nearly all of its signal."""
    rows = dataset.rows("test")
    observed, expected = dataset.raw_targets(rows).astype(np.float64), rates()[rows]
    own = [v / v.mean((0, 2))[:, None] for v in (observed, expected)]
    own = [v - v.mean(1, keepdims=True) for v in own]
    scores = values(found.metrics, "oracle", ACROSS)
    for i, name in enumerate(TYPES):
        assert scores[f"{name}_atac"] == pytest.approx(np.corrcoef(own[0][:, i].ravel(), own[1][:, i].ravel())[0, 1])
    assert scores[""] > 0.6
    alike, plain = (values(found.metrics, "alike", metric) for metric in (ACROSS, "pearson"))
    assert abs(alike[""]) < 0.1
    assert plain[""] > 0.5  # what all have in common


def test_differential_bins_are_where_variance_is_largest(dataset: Dataset, found: Evaluation) -> None:
    rows, size = dataset.rows("test"), BINS  # 16 bp: 62 bins are a piece, so a region is one
    truth = dataset.squashed_targets(rows)
    chosen = differential_bins(dataset.tracks, truth, BIN_SIZE)["atac"]
    assert chosen.shape == (len(rows), size)
    assert (chosen.all(1) == chosen.any(1)).all()
    means = (truth / truth.mean((0, 2))[:, None]).mean(2)
    assert set(np.flatnonzero(chosen[:, 0])) == set(np.argsort(-means.var(axis=1))[:10])
    fine = differential_bins(dataset.tracks, truth, 125)["atac"]  # pieces of 8 bins
    pieces = fine.reshape(len(rows), 4, 8)
    assert (pieces.all(-1) == pieces.any(-1)).all()
    assert pieces.any(-1).sum() == round(0.1 * pieces.shape[0] * 4)
    masked = truth.copy()
    masked[:5] = np.nan
    assert not differential_bins(dataset.tracks, masked, BIN_SIZE)["atac"][:5].any()
    (_, card) = across_cards(dataset.tracks, truth, rates()[rows], rows, {"atac": chosen})
    assert card.metric == DIFFERENTIAL
    assert card.statistics.scores("pearson")[0].count == chosen.sum()
    scores = values(found.metrics, "oracle", DIFFERENTIAL)
    assert scores[""] > values(found.metrics, "oracle", ACROSS)[""]


def test_ceilings_are_what_the_expected_signal_reaches(dataset: Dataset, found: Evaluation) -> None:
    """The oracle has no noise: its score is the ceiling, for deep and shallow groups, of all signal and its own."""
    rows = dataset.rows("test")
    for metric, room in (("pearson", 0.04), (ACROSS, 0.06), (DIFFERENTIAL, 0.12)):
        ceiling, oracle = (values(found.metrics, model, metric) for model in (CEILING, "oracle"))
        np.testing.assert_allclose(ceiling, oracle.reindex(ceiling.index), rtol=room)
        share = values(found.metrics, "oracle", metric + OF_CEILING)
        np.testing.assert_allclose(share.drop(""), (oracle / ceiling).drop(""), rtol=1e-9)
        assert share[""] == pytest.approx(share.drop("").mean())
    kept = dataset.squashed_halves(rows)
    assert kept is not None
    (first, second), depths = kept
    np.testing.assert_array_equal(first + second, dataset.raw_targets(rows))
    by_hand = spearman_brown(np.corrcoef(first[:, 1].ravel(), second[:, 1].ravel())[0, 1], tuple(depths[:, 1]))
    assert values(found.metrics, CEILING, "pearson")["NK_atac"] == pytest.approx(by_hand**0.5)
    drawn = found.metrics.query("model == @CEILING and metric == 'pearson' and track != ''")
    assert (drawn["low"] < drawn["value"]).all()
    assert (drawn["value"] < drawn["high"]).all()


def test_shares_at_or_above_the_ceiling_say_so(dataset: Dataset) -> None:
    rows = dataset.rows("test")
    found = evaluated(dataset, {"copy": dataset.squashed_targets(rows)}).metrics
    shares = found[(found["model"] == "copy") & (found["metric"] == "pearson" + OF_CEILING)].set_index("track")
    assert (shares["value"] > 1).all()
    assert (shares["note"].drop("") == ABOVE).all()
    assert shares["note"][""].startswith(f"3 of 3 tracks {ABOVE}")
    assert set(shares["unit"]) == {"share of the ceiling"}
    own = found[(found["model"] == "run") & (found["metric"] == "pearson" + OF_CEILING)]
    assert not own["note"].str.contains(ABOVE).any()


def test_halves_that_do_not_agree_have_no_ceiling(tmp_path: Path) -> None:
    dataset = cells(tmp_path / "data")
    array = np.load(dataset.folder / "halves.npy", allow_pickle=False)
    targets = dataset.targets[dataset.regions["fold"] != "train"]
    array[:, 1] = targets[:, 1] * (np.arange(BINS) % 2)  # one half has the odd bins, the other one the even ones
    np.save(dataset.folder / "halves.npy", array)
    found = evaluated(open_dataset(dataset.folder)).metrics
    for model, metric in ((CEILING, "pearson"), ("run", "pearson" + OF_CEILING)):
        rows = found[(found["model"] == model) & (found["metric"] == metric)].set_index("track")
        assert np.isnan(rows["value"]["NK_atac"])
        assert rows["note"]["NK_atac"] == WITHOUT
        assert rows["note"][""].startswith("1 of 3 tracks undefined")


def test_without_halves_there_are_no_ceilings(tmp_path: Path) -> None:
    found = evaluated(cells(tmp_path / "data", halves=False))
    assert CEILING not in set(found.metrics["model"])
    assert not found.metrics["metric"].str.contains(OF_CEILING).any()
    assert {ACROSS, DIFFERENTIAL, RECOGNISED} <= set(found.metrics["metric"])
    assert found.confusion is not None


def test_rows_for_training_have_no_halves(dataset: Dataset) -> None:
    assert dataset.squashed_halves(dataset.rows("train")) is None
    assert Ceilings.of(dataset, dataset.rows("train"), {}) is None
    mixed = dataset.rows("valid")[:3]
    kept = dataset.squashed_halves(mixed)
    assert kept is not None
    np.testing.assert_array_equal(sum(kept[0]), dataset.raw_targets(mixed))
    turned = dataset.select_tracks(dataset.tracks.select(["T_atac", "B_atac"])).squashed_halves(mixed)
    assert turned is not None
    np.testing.assert_array_equal(turned[0][0], kept[0][0][:, [2, 0]])


def test_confusion_tells_which_cell_type_is_taken_for_which(found: Evaluation) -> None:
    table = found.confusion
    assert table is not None
    assert table.columns.tolist() == ["group", "observed", "predicted", "pearson", "best", "n", "fold", "model"]
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    documented = text.partition("<!-- columns: confusion -->")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", documented, re.MULTILINE) == table.columns.tolist()
    best = table[table["best"]].set_index(["model", "observed"])["predicted"]
    assert best["oracle"].to_dict() == {name: name for name in TYPES}
    assert best["turned"].to_dict() == {"B": "NK", "NK": "T", "T": "B"}
    assert best[CEILING].to_dict() == {name: name for name in TYPES}
    share = found.metrics[found.metrics["metric"] == RECOGNISED].set_index("model")
    assert share["value"][["oracle", "turned", CEILING]].tolist() == [1, 0, 1]
    assert share["note"]["turned"] == "0 of 3"


def test_confusion_averages_replicates_and_joins_strands() -> None:
    """By hand, with two replicates of one cell type and strands."""
    rng = np.random.default_rng(0)
    names = [f"{name}{strand}" for name in ("a1", "a2", "b", "c") for strand in "+-"]
    conditions = [name[0] for name in names]
    tracks = TrackTable.build(
        [{"name": n, "group": "rna", "condition": c} for n, c in zip(names, conditions, strict=True)]
    )
    truth, predicted = (rng.gamma(1, 1, (5, 8, 7)) * np.arange(1, 9)[:, None] for _ in range(2))
    truth[2, 3, 4] = np.nan  # of a2-
    table = confusion_table(tracks, truth, predicted)
    both = []
    for array in (truth, predicted):
        level = np.where(np.isfinite(truth), array, np.nan)
        level = level / np.nanmean(level, axis=(0, 2))[:, None]
        strands = []
        for offset in (0, 1):
            each = np.stack([(level[:, offset] + level[:, 2 + offset]) / 2, level[:, 4 + offset], level[:, 6 + offset]])
            strands.append((each - each.mean(0)).reshape(3, -1))
        both.append(np.concatenate(strands, axis=1))
    used = np.isfinite(both[0]).all(0)
    assert set(table["n"]) == {used.sum()} == {2 * 5 * 7 - 1}
    expected = np.corrcoef(both[0][:, used], both[1][:, used])[:3, 3:]
    np.testing.assert_allclose(table["pearson"].to_numpy().reshape(3, 3), expected)
    assert table["best"].to_numpy().reshape(3, 3).tolist() == (expected == expected.max(1, keepdims=True)).tolist()


def test_each_assay_is_a_mark_of_its_own(tmp_path: Path) -> None:
    found = evaluated(cells(tmp_path / "data", assays=("atac", "mark")))
    assert found.confusion is not None
    assert found.confusion.groupby(["model", "group"]).size().unique().tolist() == [9]
    assert set(found.confusion["group"]) == {"atac", "mark"}
    some = found.metrics[found.metrics["metric"] == ACROSS]
    assert set(some["group"]) == {"atac", "mark"}


def test_the_table_is_saved(found: Evaluation, tmp_path: Path) -> None:
    found.save(tmp_path / "evaluation")
    assert found.confusion is not None
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "evaluation" / "confusion.parquet"), found.confusion)


def test_labels_and_classes_have_no_level() -> None:
    tracks = TrackTable.build([{"name": name, "link": "identity", "condition": name} for name in "ab"])
    assert "pearson" in METRICS_OF_LINK["identity"]
    truth = np.random.default_rng(0).normal(0, 1, (20, 2, 3)) + np.array([[100.0], [-3.0]])
    (card, _) = across_cards(tracks, truth, truth, np.arange(20), differential_bins(tracks, truth, 1))
    own = truth - truth.mean(1, keepdims=True)
    assert card.statistics.sums[3].sum(0) == pytest.approx(((own - own.mean(2, keepdims=True)) ** 2).sum((0, 2)))


def test_reliability_of_arrays_is_that_of_numbers() -> None:
    r = expit(np.random.default_rng(0).normal(0, 3, (4, 5)))
    a, b = np.arange(1.0, 6), np.arange(2.0, 7)
    expected = [[spearman_brown(r[i, j], (a[j], b[j])) for j in range(5)] for i in range(4)]
    np.testing.assert_allclose(reliability(r, a, b), expected)
    edges = np.array([-0.5, 0.0, 1.0, np.nan])
    np.testing.assert_array_equal(reliability(edges, np.ones(4), np.ones(4)), [0, 0, 1, np.nan])
