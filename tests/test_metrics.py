"""Metrics against scipy and scikit-learn, streaming against whole arrays, and the bootstrap's promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from seqgraft.errors import DataError
from seqgraft.intervals import bootstrap_interval, paired_bootstrap, replicate_ceiling, segment_blocks, spearman_brown
from seqgraft.metrics import METRICS, Accumulator, Confusion, Moments, Values, centre_tracks, mean_score, region_means

OF = {"moments": Moments.of, "values": Values.of, "confusion": Confusion.of_tracks}
REFERENCE = {
    "pearson": lambda y, p, w: np.cov(y, p, aweights=w)[0, 1] / np.sqrt(np.diag(np.cov(y, p, aweights=w)).prod()),
    "r2": lambda y, p, w: reference.r2_score(y, p, sample_weight=w),
    "mse": lambda y, p, w: reference.mean_squared_error(y, p, sample_weight=w),
    "spearman": lambda y, p, w: stats.spearmanr(np.repeat(y, w), np.repeat(p, w))[0],
    "auroc": lambda y, p, w: reference.roc_auc_score(y, p, sample_weight=w),
    "auprc": lambda y, p, w: reference.average_precision_score(y, p, sample_weight=w),
    "accuracy": lambda y, p, w: reference.accuracy_score(y, p >= 0.5, sample_weight=w),
    "f1": lambda y, p, w: reference.f1_score(y, p >= 0.5, sample_weight=w),
    "mcc": lambda y, p, w: reference.matthews_corrcoef(y, p >= 0.5, sample_weight=w),
    "class_accuracy": lambda y, p, w: reference.accuracy_score(y, p, sample_weight=w),
    "class_f1": lambda y, p, w: reference.f1_score(y, p, sample_weight=w, average="macro"),
    "class_mcc": lambda y, p, w: reference.matthews_corrcoef(y, p, sample_weight=w),
}


def example(task: str, n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if task == "multiclass":
        y = rng.integers(0, 4, n)
        return y, np.where(rng.random(n) < 0.6, y, rng.integers(0, 4, n))
    noise = rng.normal(size=n)
    if task == "binary":
        y = rng.integers(0, 2, n)
        return y, np.round(1 / (1 + np.exp(-(y - 0.5) * 2 - noise)), 2)  # rounded: ties
    y = np.round(rng.gamma(1.0, 2.0, n), 1)
    return y, np.round(y + noise, 1)


@pytest.mark.parametrize("name", METRICS)
def test_equals_the_reference_with_weights(name: str) -> None:
    y, p = example(METRICS[name].task)
    weight = np.random.default_rng(1).integers(1, 5, len(y))
    assert METRICS[name].function(y, p, weight) == pytest.approx(REFERENCE[name](y, p, weight), abs=1e-12)
    assert METRICS[name].function(y, p) == pytest.approx(REFERENCE[name](y, p, np.ones(len(y), int)), abs=1e-12)
    repeated = METRICS[name].function(np.repeat(y, weight), np.repeat(p, weight))
    assert repeated == pytest.approx(METRICS[name].function(y, p, weight), abs=1e-12)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.task != "multiclass"])
def test_streaming_equals_whole(name: str) -> None:
    metric = METRICS[name]
    y, p = (part.reshape(10, 3, 10) for part in example(metric.task))
    mask = np.random.default_rng(2).random(y.shape) < 0.8
    y = np.where(mask, y, np.nan)
    first, second = Accumulator(OF[metric.statistic]), Accumulator(OF[metric.statistic])
    first.update(y[5:], p[5:], mask[5:], rows=np.arange(5, 10))
    second.update(y[:6], p[:6], mask[:6], rows=np.arange(6))  # region 5 twice, as padding does
    first.merge(second)
    result = first.result()
    assert result.rows.tolist() == list(range(10))
    for track, score in enumerate(result.scores(name)):
        flat = metric.function(y[:, track].ravel(), p[:, track].ravel())
        assert score.value == pytest.approx(flat, abs=1e-12)
        assert score.count == mask[:, track].sum()
        assert score.reason == ""


def test_classes_are_tracks_of_a_group() -> None:
    y, p = example("multiclass")
    one_hot, probabilities = np.eye(4)[y][..., None], np.eye(4)[p][..., None] * 0.4 + 0.1
    one_hot[0, 2] = np.nan
    scores = Confusion.of_classes(one_hot, probabilities).scores("class_mcc")
    assert len(scores) == 1
    assert scores[0].value == pytest.approx(reference.matthews_corrcoef(y[1:], p[1:]))
    assert scores[0].count == len(y) - 1


def test_moments_are_exact_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=(50, 1, 200))
    p = y + rng.normal(size=y.shape)
    near = Moments.of(y, p).compute("pearson")[0]
    assert near == pytest.approx(stats.pearsonr(y.ravel(), p.ravel())[0], abs=1e-12)
    assert Moments.of(y + 1e6, p - 1e6).compute("pearson")[0] == pytest.approx(near, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "y", "p", "reason"),
    [
        ("pearson", [0.1] * 4, [1, 2, 3, 4], "constant target"),
        ("pearson", [1, 2, 3, 4], [0.1] * 4, "constant prediction"),
        ("r2", [0.1] * 4, [1, 2, 3, 4], "constant target"),
        ("pearson", [np.nan] * 4, [1, 2, 3, 4], "no values"),
        ("pearson", [1, np.nan, np.nan, np.nan], [1, 2, 3, 4], "one value only"),
        ("mse", [1, 2, 3, 4], [1, 2, np.nan, 4], "prediction not finite"),
        ("spearman", [1, 2, 3, 4], [5] * 4, "constant prediction"),
        ("spearman", [1, 2, 3, 4], [5, np.inf, 1, 1], "prediction not finite"),
        ("auroc", [1] * 4, [0.1, 0.2, 0.3, 0.4], "constant target"),
        ("auprc", [0] * 4, [0.1, 0.2, 0.3, 0.4], "constant target"),
        ("mcc", [1] * 4, [0.1, 0.2, 0.9, 0.4], "constant target"),
        ("mcc", [1, 0, 1, 0], [0.1, 0.2, np.nan, 0.4], "prediction not finite"),
        ("accuracy", [np.nan] * 4, [0.1, 0.2, 0.9, 0.4], "no values"),
        ("f1", [0] * 4, [0.1] * 4, "no positives"),
    ],
)
def test_undefined_metrics_have_a_reason(name: str, y: list[float], p: list[float], reason: str) -> None:
    true, pred = np.array(y, float), np.array(p, float)
    good = [0.0, 1.0, 0.0, 1.0], [0.1, 0.9, 0.2, 0.8]
    statistics = OF[METRICS[name].statistic](
        np.stack([true, good[0]])[None].repeat(2, 0)[:1], np.stack([pred, good[1]])[None]
    )
    bad, fine = statistics.scores(name)
    assert np.isnan(bad.value)
    assert bad.reason == reason
    assert np.isnan(METRICS[name].function(true, pred))
    mean = mean_score([bad, fine])
    assert mean.value == pytest.approx(fine.value)
    assert mean.reason == f"1 of 2 tracks undefined ({reason})"
    estimate = bootstrap_interval(statistics, name, np.zeros(1))
    assert estimate.undefined == 1
    assert estimate.mean == pytest.approx(fine.value)


def test_a_constant_prediction_has_mcc_zero() -> None:
    assert METRICS["mcc"].function([0, 1, 1], [0.7, 0.7, 0.7]) == 0.0
    assert METRICS["auroc"].function([0, 1, 1], [0.7, 0.7, 0.7]) == 0.5


@pytest.mark.parametrize("name", ["pearson", "mcc", "auroc", "spearman"])
def test_bootstrap_equals_resampling_regions(name: str) -> None:
    """The weighted statistics of a draw are what one gets from stacking the drawn regions."""
    metric = METRICS[name]
    y, p = (part.reshape(30, 2, 5) for part in example(metric.task))
    statistics = OF[metric.statistic](y, p)
    picked = np.random.default_rng(3).integers(0, 30, 30)
    weights = np.bincount(picked, minlength=30).astype(float)[None]
    drawn = statistics.compute(name, weights)[0]
    assert drawn == pytest.approx(OF[metric.statistic](y[picked], p[picked]).compute(name), abs=1e-12)
    assert drawn == pytest.approx(statistics.select(picked).compute(name), abs=1e-12)


def test_intervals_are_repeatable_ordered_and_wider_for_blocks() -> None:
    rng = np.random.default_rng(0)
    level = np.repeat(rng.normal(size=(20, 1, 1)), 10, axis=0)  # ten neighbours share their error
    y = rng.normal(size=(200, 2, 8))
    statistics = Moments.of(y, y + 3 * level * rng.normal(size=y.shape))
    alone = bootstrap_interval(statistics, "pearson", np.arange(200), seed=1)
    blocked = bootstrap_interval(statistics, "pearson", np.arange(200) // 10, seed=1)
    again = bootstrap_interval(statistics, "pearson", np.arange(200) // 10, seed=1)
    assert np.array_equal(blocked.low, again.low)
    assert np.all(blocked.low < blocked.value)
    assert np.all(blocked.value < blocked.high)
    assert blocked.mean_low < blocked.mean < blocked.mean_high
    assert np.all(blocked.high - blocked.low > 1.3 * (alone.high - alone.low))
    assert np.isnan(bootstrap_interval(statistics, "pearson", np.zeros(200)).low).all()


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(60):
        y = rng.normal(size=(60, 1, 4))
        p = 0.6 * y + 0.8 * rng.normal(size=y.shape)
        estimate = bootstrap_interval(Moments.of(y, p), "pearson", np.arange(60), draws=300, seed=seed)
        hits += int(estimate.low[0] <= 0.6 <= estimate.high[0])
    assert 50 <= hits <= 60


@pytest.mark.parametrize("name", ["pearson", "auroc", "mcc"])
def test_paired_bootstrap(name: str) -> None:
    metric = METRICS[name]
    y, p = (part.reshape(60, 1, 5) for part in example(metric.task))
    of = OF[metric.statistic]
    good, bad = of(y, p), of(y, p[np.random.default_rng(0).permutation(60)])
    difference = paired_bootstrap(good, bad, name, np.arange(60), draws=300)
    assert difference.value[0] == pytest.approx(good.compute(name)[0] - bad.compute(name)[0])
    assert difference.mean_low > 0
    same = paired_bootstrap(good, good, name, np.arange(60), draws=50)
    assert (same.low[0], same.high[0]) == (0, 0)
    with pytest.raises(DataError, match="different regions"):
        paired_bootstrap(good, bad.select(np.arange(60)[::-1]), name, np.arange(60))
    with pytest.raises(DataError, match="60 scored regions but 3"):
        bootstrap_interval(good, name, np.arange(3))


def test_segment_blocks() -> None:
    start = np.array([0, 10_000, 60_000, 0, 0, 0])
    chrom = ["a", "a", "a", "b", "", ""]
    assert segment_blocks(chrom, start, start + 4096).tolist() == [0, 0, 1, 2, 3, 4]
    assert segment_blocks(chrom[:3], start[:3], start[:3] + 60_000).tolist() == [0, 0, 0]


def test_across_regions_and_tracks() -> None:
    y = np.array([[[1.0, 3.0], [2.0, np.nan]]])
    assert region_means(y)[..., 0].tolist() == [[2.0, 2.0]]
    assert np.isnan(region_means(y, np.zeros_like(y, bool))).all()
    assert centre_tracks(np.array([[[1.0], [3.0]]]))[..., 0].tolist() == [[-1.0, 1.0]]


def test_wrong_statistics_or_shapes_are_refused() -> None:
    y = np.ones((2, 1, 3))
    with pytest.raises(DataError, match="They compute pearson, r2, mse"):
        Moments.of(y, y).compute("auroc")
    with pytest.raises(DataError, match="both be"):
        Moments.of(y, y[:, :, :2])
    with pytest.raises(DataError, match="one length"):
        METRICS["mse"].function([1, 2], [1])
    with pytest.raises(DataError, match="no region was scored"):
        Accumulator(Moments.of).result()


def test_spearman_brown() -> None:
    assert spearman_brown(0.5) == pytest.approx(2 / 3)
    assert replicate_ceiling(0.5) == pytest.approx((2 / 3) ** 0.5)
    assert spearman_brown(-0.1) == 0
    assert spearman_brown(1.0) == 1
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200_000)
    one, two = truth + rng.normal(size=truth.size), truth + rng.normal(size=truth.size) / 2**0.5  # depths 1 and 2
    merged, twin = (truth + rng.normal(size=truth.size) / 3**0.5 for _ in range(2))
    r = np.corrcoef(one, two)[0, 1]
    assert spearman_brown(r, (1, 2)) == pytest.approx(np.corrcoef(merged, twin)[0, 1], abs=0.01)
    assert replicate_ceiling(r, (1, 2)) == pytest.approx(np.corrcoef(merged, truth)[0, 1], abs=0.01)
