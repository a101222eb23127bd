"""The table of scores: what is in it, and that its numbers are those that one computes by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from builders import BIN_SIZE, BINS, SETTINGS, WINDOW, settled_trunk, tiny_coverage, tiny_labels, tiny_pretrained
from seqgraft.adapters import Adapter, FullFineTune, LinearProbe, LoRA, adapt
from seqgraft.baselines import KmerSettings
from seqgraft.cli import _print_metrics
from seqgraft.data.augment import Augmentation, View
from seqgraft.data.dataset import Dataset, DatasetInfo, open_dataset, write_dataset
from seqgraft.errors import ConfigError, DataError
from seqgraft.evaluate import EvaluateConfig, Evaluation, GenesConfig, compare_runs, evaluate_model
from seqgraft.genes import GeneSettings
from seqgraft.intervals import segment_blocks
from seqgraft.models.base import SequenceModel
from seqgraft.models.folders import save_model
from seqgraft.models.weights import ModelConfig, build_model, build_pretrained
from seqgraft.predict import predict
from seqgraft.sequence import encode, reverse_complement
from seqgraft.tracks import TrackTable, unsquash

COLUMNS = ["model", "fold", "group", "track", "metric", "value", "low", "high", "n", "unit", "note"]
QUICK = EvaluateConfig(draws=30, block=500)
ARCHITECTURE = ModelConfig("convnet", settings=SETTINGS)
NAMES = ["rna+", "rna-", "atac"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pretrained(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def coverage(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_coverage(tmp_path_factory.mktemp("data") / "coverage", regions=36, missing=0.05)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """What the pretrained tracks look like."""
    return tiny_coverage(tmp_path_factory.mktemp("data") / "original", regions=36, tracks=("old+", "old-", "mark"))


def model_of(start: ModelConfig, dataset: Dataset, adapter: Adapter, move: float = 0.0) -> SequenceModel:
    """An adapted model whose trainable tensors were moved at random, as training would."""
    torch.manual_seed(0)
    model = build_model(start, dataset.tracks, dataset.info)
    adapt(model, adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(move * torch.randn_like(parameter))
    return model.eval()


def evaluate(
    start: ModelConfig, dataset: Dataset, config: EvaluateConfig = QUICK, adapter: Adapter | None = None, **more: Any
) -> tuple[SequenceModel, Evaluation]:
    model = model_of(start, dataset, adapter or LoRA(rank=2), 0.1)
    return model, evaluate_model(model, dataset, config, "run", start, **more)


def cell(table: pd.DataFrame, **where: str) -> pd.Series[Any]:
    found = table[np.logical_and.reduce([table[column] == value for column, value in where.items()])]
    assert len(found) == 1, found
    return found.iloc[0]


def pearson(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    return float(np.corrcoef(a[known].ravel().astype(np.float64), b[known].ravel().astype(np.float64))[0, 1])


# The table


def test_columns_units_and_baselines(coverage: Dataset, pretrained: Path) -> None:
    model, found = evaluate(ModelConfig(str(pretrained)), coverage)
    table = found.metrics
    assert table.columns.tolist() == COLUMNS
    baselines = ["mean track", "nearest pretrained track", "mean profile", "3-mer ridge"]
    assert table["model"].drop_duplicates().tolist() == ["run", *baselines]
    scored = table[table["metric"] != "agreement"]
    assert {(unit, metric) for unit, metric in zip(scored["unit"], scored["metric"], strict=True)} == {
        *(("squashed", metric) for metric in ("pearson", "spearman", "r2", "mse", "pearson_across_regions")),
        ("raw", "pearson"),
    }
    # every model: 2 groups with their mean, 3 tracks, 6 measures
    assert scored.groupby("model").size().to_dict() == dict.fromkeys(["run", *baselines], 6 * (2 + 3))
    assert set(table["fold"]) == {"test"}
    rows = coverage.rows("test")
    assert set(table["n"]) == {len(rows)}
    assert found.differences["baseline"].drop_duplicates().tolist() == baselines
    assert found.genes is None

    values = predict(model, coverage, rows)
    truth = coverage.squashed_targets(rows)
    raw = unsquash(values.astype(np.float64), coverage.tracks, BIN_SIZE)
    for track, name in enumerate(NAMES):
        squashed = cell(table, model="run", track=name, metric="pearson", unit="squashed")
        assert squashed["value"] == pytest.approx(pearson(truth[:, track], values[:, track]))
        assert squashed["low"] < squashed["value"] < squashed["high"]
        in_raw = cell(table, model="run", track=name, metric="pearson", unit="raw")
        assert in_raw["value"] == pytest.approx(pearson(coverage.raw_targets(rows)[:, track], raw[:, track]))
    both = [cell(table, model="run", track=n, metric="pearson", unit="squashed")["value"] for n in ("rna+", "rna-")]
    mean = cell(table, model="run", track="", group="rna", metric="pearson", unit="squashed")
    assert mean["value"] == pytest.approx(np.mean(both))


def test_across_regions_and_across_tracks_by_hand(tmp_path: Path, pretrained: Path) -> None:
    names = ("a+", "a-", "b-", "b+", "c")
    groups = ("x", "x", "x", "x", "c")
    dataset = tiny_coverage(tmp_path / "data", regions=36, tracks=names, groups=groups, missing=0.05)
    model, found = evaluate(ModelConfig(str(pretrained)), dataset)
    rows = dataset.rows("test")
    truth = dataset.squashed_targets(rows).astype(np.float64)
    values = predict(model, dataset, rows)[:, : len(names)].astype(np.float64)
    known = np.where(np.isfinite(truth), values, np.nan)
    for track, name in enumerate(names):
        group = dataset.tracks.frame["group"].iloc[track]
        across = cell(found.metrics, model="run", metric="pearson_across_regions", track=name, group=group)
        means = np.nanmean(truth[:, track], -1), np.nanmean(known[:, track], -1)
        assert across["value"] == pytest.approx(pearson(*means), abs=1e-6)
        assert across["unit"] == "squashed"
    plus = [0, 3]
    levels = [values_[:, plus] / np.nanmean(values_[:, plus], axis=(0, 2))[:, None] for values_ in (truth, known)]
    own = [level[:, 0] - level.mean(1) for level in levels]
    both = np.isfinite(own[0])
    specific = cell(found.metrics, model="run", metric="pearson_across_tracks", track="a+")
    assert specific["value"] == pytest.approx(pearson(own[0][both], own[1][both]), abs=1e-6)
    lone = found.metrics.query("metric == 'pearson_across_tracks' and track == 'c'")
    assert lone.empty  # no other unstranded track to tell it from


def test_differences_are_those_of_the_scores(coverage: Dataset, pretrained: Path) -> None:
    _, found = evaluate(ModelConfig(str(pretrained)), coverage)
    assert set(found.differences["metric"]) == {"pearson"}
    assert set(found.differences["unit"]) == {"squashed"}
    defined = found.differences.dropna()
    assert len(defined) >= 10
    for row in defined.to_dict("records"):
        where = {"group": row["group"], "track": row["track"], "metric": "pearson", "unit": "squashed"}
        own, other = (cell(found.metrics, model=name, **where)["value"] for name in ("run", row["baseline"]))
        assert row["value"] == pytest.approx(own - other)
        assert row["low"] <= row["high"]


def test_paired_intervals_are_narrower_than_separate_ones(coverage: Dataset, pretrained: Path) -> None:
    """A prediction and the same with a little noise: the difference is known better than either score."""
    rows = coverage.rows("test")
    start = ModelConfig(str(pretrained))
    model = model_of(start, coverage, LinearProbe(), 0.1)
    noisy = predict(model, coverage, rows) + np.random.default_rng(0).normal(0, 1e-3, (len(rows), 3, BINS))
    found = evaluate_model(model, coverage, QUICK, "run", start, extra={"noisy": noisy.astype(np.float32)})
    score = cell(found.metrics, model="run", track="rna+", metric="pearson", unit="squashed")
    difference = cell(found.differences, baseline="noisy", track="rna+")
    assert difference["high"] - difference["low"] < 0.2 * (score["high"] - score["low"])


def test_extra_predictions_stand_beside_the_run(coverage: Dataset, pretrained: Path) -> None:
    rows = coverage.rows("test")
    oracle = np.nan_to_num(coverage.squashed_targets(rows))
    _, found = evaluate(ModelConfig(str(pretrained)), coverage, extra={"oracle": oracle})
    perfect = found.metrics[(found.metrics["model"] == "oracle") & (found.metrics["metric"] == "pearson")]
    assert len(perfect) == 2 * (2 + 3)
    np.testing.assert_allclose(perfect["value"], 1, atol=1e-6)


def test_baselines_that_are_asked_for(coverage: Dataset, pretrained: Path) -> None:
    start = ModelConfig(str(pretrained))
    _, found = evaluate(start, coverage, replace(QUICK, baselines=("mean_profile", "random_trunk")))
    assert set(found.metrics["model"]) == {"run", "mean profile", "random trunk"}
    _, none = evaluate(start, coverage, replace(QUICK, baselines=()))
    assert set(none.metrics["model"]) == {"run"}
    assert none.differences.empty
    with pytest.raises(ConfigError, match=r"evaluate.baselines.*kmer.*mean_track"):
        evaluate(start, coverage, replace(QUICK, baselines=("kmer",)))


def test_the_fold_that_is_asked_for(coverage: Dataset, pretrained: Path) -> None:
    start = ModelConfig(str(pretrained))
    _, found = evaluate(start, coverage, replace(QUICK, fold="valid"))
    assert set(found.metrics["fold"]) == {"valid"}
    assert found.moments["rows"].tolist() == coverage.rows("valid").tolist()
    _, found = evaluate(start, coverage, replace(QUICK, fold="valid"), fold="train")
    assert set(found.metrics["fold"]) == {"train"}
    with pytest.raises(ConfigError, match=r"'tset'.*'test'"):
        evaluate(start, coverage, fold="tset")


def test_blocks_follow_the_setting(coverage: Dataset, pretrained: Path) -> None:
    rows = coverage.rows("test")
    start, end = (coverage.regions[name].to_numpy()[rows] for name in ("start", "end"))
    _, found = evaluate(ModelConfig(str(pretrained)), coverage, replace(QUICK, block=2500))
    expected = segment_blocks(["chr1"] * len(rows), start, end, 2500)
    assert 1 < len(set(expected.tolist())) < len(rows)
    np.testing.assert_array_equal(found.moments["blocks"], expected)
    _, whole = evaluate(ModelConfig(str(pretrained)), coverage, replace(QUICK, block=None))  # one block of 50 kb
    assert whole.metrics["value"].notna().any()
    assert whole.metrics["low"].isna().all()


def test_a_constant_track_gives_a_reason_and_leaves_the_mean(tmp_path: Path, pretrained: Path) -> None:
    folder = tmp_path / "data"
    tiny_coverage(folder, regions=36, tracks=("a", "b", "c"), groups=("all",) * 3)
    targets = np.load(folder / "targets.npy", allow_pickle=False)
    targets[:, 1] = 3.0
    np.save(folder / "targets.npy", targets)
    _, found = evaluate(ModelConfig(str(pretrained)), open_dataset(folder))
    where = {"model": "run", "metric": "pearson", "unit": "squashed"}
    broken = cell(found.metrics, track="b", **where)
    assert np.isnan(broken["value"])
    assert "constant" in broken["note"]
    mean = cell(found.metrics, track="", **where)
    fine = [cell(found.metrics, track=name, **where)["value"] for name in ("a", "c")]
    assert mean["value"] == pytest.approx(np.mean(fine))
    assert mean["low"] <= mean["value"] <= mean["high"]
    left_out, rough = mean["note"].split("; ")
    assert left_out == "1 of 3 tracks undefined and left out"
    assert re.fullmatch(r"rough interval, from \d blocks of regions", rough)
    difference = cell(found.differences, baseline="mean profile", track="")
    assert np.isfinite(difference["value"])


def test_ensembles_average_both_strands(coverage: Dataset, pretrained: Path) -> None:
    both = Augmentation(reverse_complement=True, shift=0)
    model, found = evaluate(ModelConfig(str(pretrained)), coverage, replace(QUICK, ensemble=both, baselines=()))
    rows = coverage.rows("test")
    truth = coverage.squashed_targets(rows)
    with torch.inference_mode():
        forward = model.predict(coverage.sample(rows)).numpy()
        turned = model.predict(coverage.sample(rows, [View(reverse=True)] * len(rows))).numpy()
    mean = (forward + turned[:, [1, 0, 2], ::-1]) / 2  # rna+ and rna- change places
    for track, name in enumerate(NAMES):
        value = cell(found.metrics, model="run", track=name, metric="pearson", unit="squashed")["value"]
        assert value == pytest.approx(pearson(truth[:, track], mean[:, track]))
        assert value != pytest.approx(pearson(truth[:, track], forward[:, track]), abs=1e-6)


def test_saved_tables_are_those_of_the_evaluation(coverage: Dataset, pretrained: Path, tmp_path: Path) -> None:
    _, found = evaluate(ModelConfig(str(pretrained)), coverage)
    for _ in range(2):  # again, over the first
        found.save(tmp_path / "evaluation")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "evaluation" / "metrics.parquet"), found.metrics)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "evaluation" / "differences.parquet"), found.differences)
    with np.load(tmp_path / "evaluation" / "examples.npz", allow_pickle=False) as examples:
        assert examples["observed"].shape == examples["predicted"].shape == (3, 3, BINS)
        assert str(examples["baseline_name"]) == "nearest pretrained track"
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation"]


# Two runs


def saved(folder: Path, dataset: Dataset, pretrained: Path, config: EvaluateConfig, move: float) -> Path:
    start = ModelConfig(str(pretrained))
    model = model_of(start, dataset, LoRA(rank=2), move)
    evaluate_model(model, dataset, config, "run", start).save(folder / "evaluation")
    return folder


def test_two_runs_are_compared_by_hand(coverage: Dataset, pretrained: Path, tmp_path: Path) -> None:
    quick = replace(QUICK, baselines=())
    moves = {"first": 0.1, "second": 0.3}
    for name, move in moves.items():
        saved(tmp_path / name, coverage, pretrained, quick, move)
    found = compare_runs(tmp_path / "first", tmp_path / "second", draws=50)
    rows = coverage.rows("test")
    truth = coverage.squashed_targets(rows)
    models = [model_of(ModelConfig(str(pretrained)), coverage, LoRA(rank=2), move) for move in moves.values()]
    first, second = (predict(model, coverage, rows) for model in models)
    expected = [
        pearson(truth[:, track], first[:, track]) - pearson(truth[:, track], second[:, track]) for track in range(3)
    ]
    np.testing.assert_allclose(found.value, expected, rtol=1e-9)
    assert found.mean == pytest.approx(np.mean(expected))
    assert (found.low <= found.high).all()
    back = compare_runs(tmp_path / "second", tmp_path / "first", draws=50)
    np.testing.assert_allclose(back.value, -found.value)
    same = compare_runs(tmp_path / "first", tmp_path / "first", draws=50)
    assert same.value.tolist() == same.low.tolist() == same.high.tolist() == [0, 0, 0]
    with pytest.raises(DataError, match=r"'spearman'.*pearson"):
        compare_runs(tmp_path / "first", tmp_path / "second", metric="spearman")


def test_runs_on_other_rows_are_not_compared(coverage: Dataset, pretrained: Path, tmp_path: Path) -> None:
    quick = replace(QUICK, baselines=())
    saved(tmp_path / "test", coverage, pretrained, quick, 0.1)
    saved(tmp_path / "valid", coverage, pretrained, replace(quick, fold="valid"), 0.1)
    saved(tmp_path / "blocks", coverage, pretrained, replace(quick, block=2500), 0.1)
    for other in ("valid", "blocks"):
        with pytest.raises(ConfigError, match="different regions or tracks"):
            compare_runs(tmp_path / "test", tmp_path / other)
    with pytest.raises(ConfigError, match=r"not evaluated.*none.*seqgraft evaluate"):
        compare_runs(tmp_path / "test", tmp_path / "none")
    (tmp_path / "test" / "evaluation" / "moments.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ConfigError, match=r"moments.npz: the file cannot be read"):
        compare_runs(tmp_path / "test", tmp_path / "valid")


# Forgetting


def original_rows(found: Evaluation) -> pd.DataFrame:
    return found.metrics[found.metrics["metric"].isin(["original_pearson", "forgetting", "agreement"])]


@pytest.mark.parametrize("adapter", [LinearProbe(), LoRA(rank=2), FullFineTune()], ids=lambda a: a.label)
def test_forgetting_is_the_change_on_the_original_tracks(
    adapter: Adapter, coverage: Dataset, original: Dataset, pretrained: Path
) -> None:
    start = ModelConfig(str(pretrained))
    model, found = evaluate(start, coverage, replace(QUICK, original=original.folder, baselines=()), adapter)
    rows = original.rows("test")
    truth = original.squashed_targets(rows)
    reference = build_pretrained(start, original.info)
    assert reference is not None
    before = predict(reference, original, rows)
    adapted = SequenceModel(model.trunk, dict(reference.heads.items()), reference.tracks)  # type: ignore[arg-type]
    after = predict(adapted, original, rows)
    for track, (group, name) in enumerate((("old", "old+"), ("old", "old-"), ("mark", "mark"))):
        first, second = (pearson(truth[:, track], values[:, track]) for values in (before, after))
        where = {"group": group, "track": name}
        table = original_rows(found)
        scored = table[table["metric"] == "original_pearson"]
        assert cell(scored, model="pretrained, before", **where)["value"] == pytest.approx(first)
        assert cell(scored, model="run", **where)["value"] == pytest.approx(second)
        change = cell(table, metric="forgetting", **where)
        assert change["value"] == pytest.approx(second - first)
        if isinstance(adapter, LinearProbe):
            assert change["value"] == change["low"] == change["high"] == 0
        else:
            assert change["value"] != 0
            assert change["low"] < change["high"]
    assert set(original_rows(found)["group"]) == {"old", "mark"}
    # the model is left as it was
    np.testing.assert_array_equal(
        predict(model, coverage, rows), predict(model_of(start, coverage, adapter, 0.1), coverage, rows)
    )


def test_without_their_data_before_and_after_are_compared(coverage: Dataset, pretrained: Path) -> None:
    start = ModelConfig(str(pretrained))
    model, found = evaluate(start, coverage, replace(QUICK, baselines=()))
    agreement = original_rows(found)
    assert set(agreement["metric"]) == {"agreement"}
    rows = coverage.rows("test")
    reference = build_pretrained(start, coverage.info)
    assert reference is not None
    adapted = SequenceModel(model.trunk, dict(reference.heads.items()), reference.tracks)  # type: ignore[arg-type]
    before, after = (predict(m, coverage, rows) for m in (reference, adapted))
    for track, name in enumerate(("old+", "old-", "mark")):
        value = cell(agreement, track=name)["value"]
        assert value == pytest.approx(pearson(before[:, track], after[:, track]))
        assert value < 1
    _, frozen = evaluate(start, coverage, replace(QUICK, baselines=()), LinearProbe())
    assert original_rows(frozen).empty  # nothing can be forgotten


def test_the_original_data_may_have_another_window(coverage: Dataset, pretrained: Path, tmp_path: Path) -> None:
    """Then the trunk is cropped otherwise there; the run's own trunk stays as it is."""
    start = ModelConfig(str(pretrained))
    wide = _wide_original(tmp_path / "wide")
    assert wide.info.window - wide.info.bins * BIN_SIZE != WINDOW - BINS * BIN_SIZE
    model, found = evaluate(start, coverage, replace(QUICK, original=wide.folder, baselines=()))
    reference = build_pretrained(start, wide.info)
    assert reference is not None
    rows = wide.rows("test")
    before = predict(reference, wide, rows)
    truth = wide.squashed_targets(rows)
    scored = original_rows(found)
    value = cell(scored, model="pretrained, before", track="mark", metric="original_pearson")["value"]
    assert value == pytest.approx(pearson(truth[:, 2], before[:, 2]))
    assert np.isfinite(cell(scored, metric="forgetting", track="mark")["value"])
    assert predict(model, coverage, coverage.rows("test")).shape[-1] == BINS


def test_forgetting_of_a_labelled_run(original: Dataset, pretrained: Path, tmp_path: Path) -> None:
    labels = tiny_labels(tmp_path / "labels")
    start = ModelConfig(str(pretrained))
    _, found = evaluate(start, labels, replace(QUICK, original=original.folder, baselines=()))
    assert set(original_rows(found)["group"]) == {"old", "mark"}
    assert np.isfinite(cell(found.metrics, metric="forgetting", track="old+")["value"])


def test_forgetting_needs_tracks_of_the_model(coverage: Dataset, original: Dataset, pretrained: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.original.*none of the tracks.*'old\+'"):
        evaluate(ModelConfig(str(pretrained)), coverage, replace(QUICK, original=coverage.folder))
    with pytest.raises(ConfigError, match=r"evaluate.original.*'convnet'"):
        evaluate(ARCHITECTURE, coverage, replace(QUICK, original=original.folder))


def _wide_original(folder: Path) -> Dataset:
    narrow = tiny_coverage(folder.parent / "narrow", regions=36, tracks=("old+", "old-", "mark"))
    bins = BINS - 4
    regions = narrow.regions.assign(start=narrow.regions["start"] + 32, end=narrow.regions["end"] - 32)
    with write_dataset(folder, (len(regions), 3, bins)) as writer:
        writer.targets[:] = narrow.targets[:, :, 2:-2]
        writer.finish(replace(narrow.info, bins=bins), regions, narrow.tracks)
    return open_dataset(folder)


# Genes


def _gtf(folder: Path, dataset: Dataset) -> Path:
    """A gene of two exons in every region of the dataset."""
    rows = []
    for number, region in enumerate(dataset.regions.to_dict("records")):
        for left, right in ((10, 60), (100, 150)):
            place = f"{region['start'] + left + 1}\t{region['start'] + right}"
            rows.append(f'1\tx\texon\t{place}\t.\t+\t.\tgene_id "g{number}"; gene_name "G{number}";\n')
    (folder / "genes.gtf").write_text("".join(rows))
    return folder / "genes.gtf"


def test_genes_of_two_conditions_with_replicates(tmp_path: Path, pretrained: Path) -> None:
    names = ("hot1", "hot2", "cold1", "cold2")
    plain = tiny_coverage(tmp_path / "data", regions=60, tracks=names, groups=("rna",) * 4)
    conditions = {"condition": [n[:-1] for n in names], "replicate": [n[-1] for n in names]}
    dataset = plain.select_tracks(plain.tracks.replace(**conditions))
    rows = dataset.rows("test")
    genes = GenesConfig(
        gtf=_gtf(tmp_path, dataset),
        rename={"1": "chr1"},
        settings=GeneSettings(pseudocount=0.1, min_expression=0.1),
        contrasts=(("hot", "cold"),),
    )
    oracle = dataset.squashed_targets(rows)
    swapped = oracle[:, [2, 3, 0, 1]]
    _, found = evaluate(
        ModelConfig(str(pretrained)),
        dataset,
        replace(QUICK, genes=genes, baselines=("mean_profile",)),
        extra={"oracle": oracle, "swapped": swapped},
    )
    table = found.genes
    assert table is not None
    assert set(table["model"]) == {"run", "mean profile", "oracle", "swapped"}
    assert set(table["fold"]) == {"test"}
    change = table[(table["track"] == "hot/cold") & (table["metric"] == "pearson")].set_index("model")
    assert change.loc["oracle", "value"] == pytest.approx(1)
    assert change.loc["swapped", "value"] == pytest.approx(-1)
    assert abs(change.loc["run", "value"]) < 1
    assert (change["count"] == len(rows)).all()
    levels = table[(table["track"] != "hot/cold") & (table["model"] == "oracle") & (table["metric"] == "pearson")]
    assert set(names) <= set(levels["track"])
    np.testing.assert_allclose(levels["value"].dropna(), 1, atol=1e-6)


def test_genes_need_coverage(tmp_path: Path) -> None:
    labels = tiny_labels(tmp_path / "labels")
    with pytest.raises(ConfigError, match=r"evaluate.genes.*coverage.*genes.gtf"):
        evaluate(ARCHITECTURE, labels, replace(QUICK, genes=GenesConfig(gtf=Path("genes.gtf"))))


def test_the_chromosomes_of_genes_are_checked(coverage: Dataset, pretrained: Path, tmp_path: Path) -> None:
    genes = GenesConfig(gtf=_gtf(tmp_path, coverage))
    with pytest.raises(DataError, match=r"genes.gtf.*'1'.*rename: \{'1': 'chr1'\}"):
        evaluate(ModelConfig(str(pretrained)), coverage, replace(QUICK, genes=genes))


# Labels


def _planted(folder: Path, motif: str, rows: int = 240) -> Dataset:
    """Random sequences; half of them have the motif."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 4, (rows, 80)).astype(np.uint8)
    labels = np.arange(rows) % 2
    for row in np.flatnonzero(labels):
        at = int(rng.integers(0, 80 - len(motif)))
        codes[row, at : at + len(motif)] = encode(motif)
    folds = [("train", "train", "valid", "test")[row // 2 % 4] for row in range(rows)]
    places: dict[str, Any] = {"chrom": "", "start": 0, "end": 0, "strand": "."}
    with write_dataset(folder, (rows, 1, 1)) as writer:
        writer.targets[:, 0, 0] = labels
        writer.finish(
            DatasetInfo("labelled", 80, 1, 80),
            pd.DataFrame({**places, "name": [f"s{row}" for row in range(rows)], "fold": folds}),
            TrackTable.build([{"name": "motif", "group": "motif", "link": "sigmoid"}]),
            codes=codes,
            lengths=np.full(rows, 80),
        )
    return open_dataset(folder)


def test_kmer_baseline_finds_a_planted_motif(tmp_path: Path) -> None:
    dataset = _planted(tmp_path / "motif", "TATAAATA")
    _, found = evaluate(ARCHITECTURE, dataset)
    assert set(found.metrics["unit"]) == {"label"}
    assert set(found.metrics["metric"]) == {"auroc", "auprc", "mcc", "f1", "accuracy"}
    assert cell(found.metrics, model="k-mer regression", track="motif", metric="auroc")["value"] > 0.9
    shown = cell(found.metrics, model="majority", track="motif", metric="auroc")
    assert shown["value"] == 0.5 or (np.isnan(shown["value"]) and shown["note"])
    assert cell(found.metrics, model="majority", track="motif", metric="accuracy")["value"] <= 0.6
    assert cell(found.differences, baseline="k-mer regression", track="motif")["value"] < 0
    assert found.examples == {}


@pytest.mark.parametrize(
    ("link", "metrics", "tracks"),
    [
        ("softmax", {"class_mcc", "class_f1", "class_accuracy"}, ["label", ""]),
        ("identity", {"pearson", "spearman", "r2", "mse"}, ["gc", "purine", ""]),
        ("sigmoid", {"auroc", "auprc", "mcc", "f1", "accuracy"}, ["gc", "purine", ""]),
    ],
)
def test_labels_of_every_kind(link: str, metrics: set[str], tracks: Sequence[str], tmp_path: Path) -> None:
    dataset = tiny_labels(tmp_path / "labels", link, rows=72)
    model, found = evaluate(ARCHITECTURE, dataset)
    table = found.metrics
    assert set(table["metric"]) == metrics
    assert table["track"].drop_duplicates().tolist() == list(tracks)
    assert set(table["model"]) == {"run", "k-mer regression", "majority"}
    rows = dataset.rows("test")
    values, truth = predict(model, dataset, rows)[:, :, 0], dataset.squashed_targets(rows)[:, :, 0]
    if link == "softmax":
        np.testing.assert_allclose(values.sum(1), 1, rtol=1e-5)
        expected = float((values.argmax(1) == truth.argmax(1)).mean())
        assert cell(table, model="run", track="label", metric="class_accuracy")["value"] == pytest.approx(expected)
        kmer = cell(table, model="k-mer regression", track="label", metric="class_accuracy")["value"]
        guess = cell(table, model="majority", track="label", metric="class_accuracy")["value"]
        assert kmer > guess
    elif link == "sigmoid":
        expected = float(((values[:, 0] >= 0.5) == (truth[:, 0] >= 0.5)).mean())
        assert cell(table, model="run", track="gc", metric="accuracy")["value"] == pytest.approx(expected)
    else:
        expected = pearson(truth[:, 0], values[:, 0])
        assert cell(table, model="run", track="gc", metric="pearson")["value"] == pytest.approx(expected)
        assert cell(table, model="k-mer regression", track="gc", metric="pearson")["value"] > 0.8


def test_covariates_have_baselines_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What covariates explain is told from what the sequence does."""
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    quick = replace(QUICK, kmers=KmerSettings(sizes=(2,), strengths=(1.0, 100.0)))
    plain = tiny_labels(tmp_path / "labels", "identity", rows=120)
    told = plain.squashed_targets(np.arange(120))[:, :1, 0] + 0.01 * np.random.default_rng(0).normal(size=(120, 1))
    other = np.random.default_rng(1).normal(size=(120, 1))
    dataset = replace(plain, covariates=pd.DataFrame(np.hstack([told, other]), columns=["told", "other"]))
    model = build_model(ARCHITECTURE, dataset.tracks, dataset.info, 2).eval()
    found = evaluate_model(model, dataset, quick, "run", ARCHITECTURE).metrics
    baselines = ["k-mer regression", "k-mers and covariates", "covariate regression", "majority"]
    assert found["model"].drop_duplicates().tolist() == ["run", *baselines]

    def of(table: pd.DataFrame, model: str, track: str) -> float:
        return float(cell(table, model=model, track=track, metric="r2")["value"])

    assert of(found, "covariate regression", "gc") > 0.99
    assert of(found, "k-mers and covariates", "gc") > 0.99
    assert all(of(found, name, "purine") > 0.9 for name in ("k-mer regression", "k-mers and covariates"))
    assert of(found, "covariate regression", "purine") < 0.5
    model = build_model(ARCHITECTURE, plain.tracks, plain.info).eval()
    without = evaluate_model(model, plain, quick, "run", ARCHITECTURE).metrics
    assert set(without["model"]) == {"run", "k-mer regression", "majority"}
    assert of(without, "k-mer regression", "gc") == of(found, "k-mer regression", "gc")
    assert len(list((tmp_path / "cache" / "baselines").iterdir())) == 3  # the k-mer regression was fitted once
    with pytest.raises(ConfigError, match=r"'covariates'.*Choose from kmer, majority"):
        evaluate(ARCHITECTURE, plain, replace(QUICK, baselines=("covariates",)))
    short = replace(QUICK, baselines=("kmer",), kmers=KmerSettings(sizes=(1,), strengths=(1.0, 100.0)))
    _, fewer = evaluate(ARCHITECTURE, plain, short)
    assert of(fewer.metrics, "k-mer regression", "gc") != of(without, "k-mer regression", "gc")


# Copies of training data


def _leaked(folder: Path, link: str = "sigmoid") -> tuple[Dataset, list[int]]:
    """Labels of which a third of the test rows are training rows, every second of them on the other strand."""
    tiny_labels(folder, link, rows=72, lengths=(100, 100))
    codes = np.load(folder / "codes.npy", allow_pickle=False)
    train, test = (open_dataset(folder).rows(fold) for fold in ("train", "test"))
    for number, row in enumerate(test[::3]):
        codes[row] = reverse_complement(codes[train[number]]) if number % 2 else codes[train[number]]
    np.save(folder / "codes.npy", codes)
    return open_dataset(folder), test[::3].tolist()


def test_rows_without_copies_are_scored_on_their_own_and_first(tmp_path: Path) -> None:
    dataset, leaked = _leaked(tmp_path / "labels")
    model, found = evaluate(ARCHITECTURE, dataset)
    rows = dataset.rows("test")
    clean = ~np.isin(rows, leaked)
    assert found.metrics["fold"].drop_duplicates().tolist() == ["test without copies", "test"]
    counted = found.metrics.groupby("fold")["n"].unique().map(list).to_dict()
    assert counted == {"test without copies": [clean.sum()], "test": [len(rows)]}
    names = {"run", "k-mer regression", "majority"}
    assert all(set(part["model"]) == names for _, part in found.metrics.groupby("fold"))
    values, truth = predict(model, dataset, rows)[:, 0, 0], dataset.squashed_targets(rows)[:, 0, 0]
    for fold, some in (("test", np.ones(len(rows), bool)), ("test without copies", clean)):
        expected = float(((values >= 0.5) == (truth >= 0.5))[some].mean())
        row = cell(found.metrics, model="run", track="gc", metric="accuracy", fold=fold)
        assert row["value"] == pytest.approx(expected)
    assert row["note"] == f"{clean.sum()} of {len(rows)}, those without copies"
    whole = cell(found.metrics, model="run", track="gc", metric="accuracy", fold="test")
    assert whole["note"] == f"{len(leaked)} of {len(rows)} have copies in earlier folds ({len(leaked)} exact, 0 near)"
    assert set(found.differences["fold"]) == {"test without copies", "test"}
    assert found.moments["rows"].tolist() == rows[clean].tolist()  # what runs are compared by


def test_the_command_prints_both_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, leaked = _leaked(tmp_path / "labels")
    _print_metrics(evaluate(ARCHITECTURE, dataset)[1].metrics)
    lines = capsys.readouterr().out.splitlines()
    clean = [line for line in lines if "fold test without copies" in line]
    assert lines[: len(clean)] == clean  # first
    assert len(clean) == 3
    assert sum(f"{len(leaked)} of 12 have copies" in line for line in lines) == len(lines) - 3 == 3


@pytest.mark.parametrize("link", ["identity", "softmax"])
def test_labels_of_every_kind_are_scored_without_copies(link: str, tmp_path: Path) -> None:
    dataset, leaked = _leaked(tmp_path / "labels", link)
    _, found = evaluate(ARCHITECTURE, dataset)
    counted = found.metrics.groupby("fold")["n"].unique().map(list).to_dict()
    assert counted == {"test without copies": [12 - len(leaked)], "test": [12]}


def test_nothing_gives_the_leaky_score_alone(tmp_path: Path) -> None:
    """Whether the copies were stored with the dataset or not, and whatever is asked of the evaluation."""
    dataset, leaked = _leaked(tmp_path / "labels")
    folds = {"test without copies", "test"}
    for config in (QUICK, replace(QUICK, baselines=()), replace(QUICK, fold="valid")):
        _, found = evaluate(ARCHITECTURE, dataset, config, fold="test")
        assert set(found.metrics["fold"]) == folds
    copied = np.isin(np.arange(len(dataset)), leaked)
    stored = replace(dataset, regions=dataset.regions.assign(copied=np.where(copied, "near", "")))
    _, found = evaluate(ARCHITECTURE, stored)
    assert found.metrics["note"].str.contains(rf"\(0 exact, {len(leaked)} near\)").any()
    counts = {"test/train": {"pairs": len(leaked)}}
    noted = replace(dataset, info=replace(dataset.info, notes={"duplicates": {"exact": counts, "near": {}}}))
    assert set(evaluate(ARCHITECTURE, noted)[1].metrics["fold"]) == folds
    _, found = evaluate(ARCHITECTURE, dataset, fold="train")  # nothing is copied from an earlier fold than this one
    assert set(found.metrics["fold"]) == {"train"}


def test_a_fold_of_copies_alone_has_no_score_without_them(tmp_path: Path) -> None:
    dataset, _ = _leaked(tmp_path / "labels")
    every = replace(dataset, regions=dataset.regions.assign(copied="exact"))
    _, found = evaluate(ARCHITECTURE, every)
    clean = found.metrics[found.metrics["fold"] == "test without copies"]
    assert clean["value"].isna().all()
    assert set(clean["n"]) == {0}
    assert clean["note"].str.startswith("0 of 12, those without copies").all()


def test_coverage_is_scored_without_copies(coverage: Dataset, pretrained: Path) -> None:
    rows = coverage.rows("test")
    copied = np.isin(np.arange(len(coverage)), rows[:2])
    stored = replace(coverage, regions=coverage.regions.assign(copied=np.where(copied, "exact", "")))
    model, found = evaluate(ModelConfig(str(pretrained)), stored)
    truth, values = coverage.squashed_targets(rows[2:]), predict(model, coverage, rows[2:])
    where = {"model": "run", "track": "atac", "metric": "pearson", "fold": "test without copies"}
    squashed = cell(found.metrics, unit="squashed", **where)
    assert squashed["value"] == pytest.approx(pearson(truth[:, 2], values[:, 2]))
    assert np.isfinite(cell(found.metrics, unit="raw", **where)["value"])
    measured = found.metrics[~found.metrics["metric"].isin(["agreement"])].groupby("fold").size()
    assert measured["test"] == measured["test without copies"]


def test_coverage_with_a_sigmoid_link_has_no_raw_pearson(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    tiny_coverage(folder, regions=36, tracks=("open",), link="sigmoid")
    targets = np.load(folder / "targets.npy", allow_pickle=False)
    np.save(folder / "targets.npy", (targets > np.median(targets)).astype(np.float32))
    dataset = open_dataset(folder)
    dataset = dataset.select_tracks(dataset.tracks.replace(scale=1.0))
    _, found = evaluate(ARCHITECTURE, dataset)
    assert set(found.metrics["unit"]) == {"squashed"}
    assert "auroc" in set(found.metrics["metric"])


def test_pretrained_folder_of_the_builders_is_what_it_says(pretrained: Path, coverage: Dataset, tmp_path: Path) -> None:
    """A model saved again has the same predictions: the baselines above rest on it."""
    model = build_pretrained(ModelConfig(str(pretrained)), coverage.info)
    assert model is not None
    assert settled_trunk().spec.bin_size == BIN_SIZE
    save_model(
        model, tmp_path / "again", name="a", info=coverage.info, licence="", citation="", trained_on=None, card=""
    )
    again = build_pretrained(ModelConfig(str(tmp_path / "again")), coverage.info)
    assert again is not None
    rows = coverage.rows("test")
    np.testing.assert_array_equal(predict(model, coverage, rows), predict(again, coverage, rows))
