"""Baselines: known answers on made-up data, and the published k-mer figure on real labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from seqgraft.baselines import (
    Examples,
    KmerSettings,
    covariate_regression,
    kmer_counts,
    kmer_regression,
    majority,
    mean_profile,
    mean_track,
    nearest_track,
    sequence_ridge,
)
from seqgraft.controls import stored_predictions
from seqgraft.errors import ConfigError, DataError
from seqgraft.metrics import METRICS, Moments
from seqgraft.sequence import PAD, encode, reverse_complement
from seqgraft.tracks import TrackTable

QUICK = KmerSettings(sizes=(2, 3), strengths=(1.0, 100.0))


def padded(sequences: list[str]) -> np.ndarray:
    codes = np.full((len(sequences), max(map(len, sequences))), PAD, np.uint8)
    for row, sequence in enumerate(sequences):
        codes[row, : len(sequence)] = encode(sequence)
    return codes


def labelled(rows: int, seed: int, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Codes (rows, 60); rows of class c > 0 have the motif c three times."""
    rng = np.random.default_rng(seed)
    codes, label = rng.integers(0, 4, (rows, 60)).astype(np.uint8), rng.integers(0, classes, rows)
    for row, motif in enumerate(label):
        for start in (5, 20, 40) if motif else ():
            codes[row, start : start + 4] = encode(["GATA", "CCGC", "TTTT"][motif - 1])
    return codes, label


def test_kmer_counts() -> None:
    counts = kmer_counts(padded(["ACGTACNAC", "TT"]), 2).toarray()
    assert counts[0, [1, 6, 11, 12]].tolist() == [3, 1, 1, 1]  # AC, CG, GT, TA
    assert counts.sum(1).tolist() == [6, 1]
    codes = padded(["ACGTTGCAGGA"])
    both = kmer_counts(codes, 3, both_strands=True)
    assert np.array_equal(both.toarray(), kmer_counts(reverse_complement(codes), 3, both_strands=True).toarray())
    assert kmer_counts(padded(["AC"]), 3).shape == (1, 64)


def test_binary_and_multi_label() -> None:
    tracks = TrackTable.build([{"name": "motif", "link": "sigmoid"}, {"name": "never", "link": "sigmoid"}])
    parts = []
    for seed, rows in enumerate((600, 100, 200)):
        codes, label = labelled(rows, seed)
        targets = np.stack([label, np.zeros(rows)], axis=1)[..., None].astype(float)
        targets[::7, 0] = np.nan
        parts.append(Examples(codes, targets))
    predicted = kmer_regression(*parts, tracks, QUICK)
    assert predicted.shape == (200, 2, 1)
    assert METRICS["auroc"].function(parts[2].targets[:, 0, 0], predicted[:, 0, 0]) > 0.9
    assert not predicted[:, 1].any()  # one class only
    constant = majority(parts[0], 200)
    assert constant[0, 0, 0] == pytest.approx(np.nanmean(parts[0].targets[:, 0]))
    assert METRICS["mcc"].function(parts[2].targets[:, 0, 0], constant[:, 0, 0]) == 0


def test_classes_keep_their_places() -> None:
    tracks = TrackTable.build([{"name": f"c{k}", "link": "softmax"} for k in range(5)])
    parts = []
    for seed, rows in enumerate((900, 100, 200)):
        codes, label = labelled(rows, seed, classes=4)
        parts.append(Examples(codes, np.eye(5)[np.where(label > 0, label + 1, 0)][..., None]))  # class 1 never occurs
    predicted = kmer_regression(*parts, tracks, QUICK)[..., 0]
    assert predicted.sum(1) == pytest.approx(np.ones(200))
    assert not predicted[:, 1].any()
    accuracy = METRICS["class_accuracy"].function(parts[2].targets[..., 0].argmax(1), predicted.argmax(1))
    assert accuracy > 0.7


def test_regression_uses_covariates_and_refuses_bins() -> None:
    rng = np.random.default_rng(0)
    tracks = TrackTable.build([{"name": "y", "link": "identity"}])
    parts = []
    for rows in (300, 80, 80):
        codes, covariate = rng.integers(0, 4, (rows, 40)).astype(np.uint8), rng.normal(size=(rows, 1))
        target = 5 + 3 * covariate[:, 0] + (codes == 2).sum(1) / 5 + rng.normal(size=rows) / 5
        parts.append(Examples(codes, target[:, None, None], covariate))
    predicted = kmer_regression(*parts, tracks, QUICK)
    assert METRICS["r2"].function(parts[2].targets.ravel(), predicted.ravel()) > 0.95
    with pytest.raises(DataError, match="labels of one bin"):
        kmer_regression(*[Examples(p.codes, np.repeat(p.targets, 2, 2)) for p in parts], tracks)
    with pytest.raises(DataError, match="no training rows"):
        kmer_regression(Examples(parts[0].codes[:0], parts[0].targets[:0]), *parts[1:], tracks)
    without_checks = Examples(parts[1].codes[:0], parts[1].targets[:0], parts[1].covariates[:0])
    assert np.isfinite(kmer_regression(parts[0], without_checks, parts[2], tracks, QUICK)).all()
    for settings in ({"sizes": (9,)}, {"sizes": ()}, {"strengths": (0.0,)}):
        with pytest.raises(ConfigError, match=r"evaluate\.kmers"):
            KmerSettings(**settings)


def test_covariates_alone_beside_the_sequence_and_without() -> None:
    """Classes that follow from the motif or from a covariate: each regression knows what it was given."""
    tracks = TrackTable.build([{"name": name, "link": "sigmoid"} for name in ("motif", "covariate")])
    rng = np.random.default_rng(0)
    parts = []
    for seed, rows in enumerate((600, 100, 300)):
        codes, motif = labelled(rows, seed)
        covariate = 7 + 3 * rng.normal(size=(rows, 1))
        targets = np.stack([motif, covariate[:, 0] > 7], axis=1)[..., None].astype(float)
        parts.append(Examples(codes, targets, covariate))
    without = [replace(part, covariates=None) for part in parts]
    predicted = {
        "sequence": kmer_regression(*without, tracks, QUICK),
        "both": kmer_regression(*parts, tracks, QUICK),
        "covariates": covariate_regression(*parts, tracks, QUICK),
    }
    auroc = {
        name: [METRICS["auroc"].function(parts[2].targets[:, track, 0], values[:, track, 0]) for track in range(2)]
        for name, values in predicted.items()
    }
    assert min(auroc["both"]) > 0.9
    assert auroc["sequence"][0] > 0.9 > 0.7 > auroc["sequence"][1]
    assert auroc["covariates"][1] > 0.9 > 0.7 > auroc["covariates"][0]
    with pytest.raises(DataError, match="covariate baseline: there are no training rows"):
        covariate_regression(Examples(parts[0].codes[:0], parts[0].targets[:0]), *parts[1:], tracks)


def test_the_second_run_on_the_same_data_fits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path))
    tracks = TrackTable.build([{"name": "motif", "link": "sigmoid"}])
    parts = []
    for seed, rows in enumerate((120, 40, 40)):
        codes, label = labelled(rows, seed)
        parts.append(Examples(codes, label[:, None, None].astype(float)))
    calls = []

    def fit(*rows_and_tracks: Any) -> np.ndarray:
        calls.append(1)
        return kmer_regression(*rows_and_tracks)

    first = stored_predictions(fit, *parts, tracks, QUICK)
    again = stored_predictions(fit, *parts, tracks, QUICK)
    assert len(calls) == 1
    assert (again.dtype, again.tobytes()) == (first.dtype, first.tobytes())
    assert first.tobytes() == kmer_regression(*parts, tracks, QUICK).tobytes()
    (stored,) = (tmp_path / "baselines").iterdir()
    assert stored.suffix == ".npy"  # nothing half-written beside it

    changed = parts[0].targets.copy()
    changed[0] = 1 - changed[0]
    others: list[tuple[Any, ...]] = [
        (Examples(parts[0].codes, changed), *parts[1:], tracks, QUICK),
        (*parts[:2], Examples(parts[2].codes[::-1], parts[2].targets), tracks, QUICK),
        (parts[0], Examples(parts[1].codes[:-1], parts[1].targets[:-1]), parts[2], tracks, QUICK),
        (*[replace(part, covariates=np.ones((len(part.codes), 1))) for part in parts], tracks, QUICK),
        (*parts, TrackTable.build([{"name": "other", "link": "sigmoid"}]), QUICK),
        (*parts, tracks, KmerSettings(sizes=(2,))),
    ]
    for number, other in enumerate(others, start=2):
        stored_predictions(fit, *other)
        assert len(calls) == number

    stored.write_bytes(stored.read_bytes()[:100])  # cut off
    assert stored_predictions(fit, *parts, tracks, QUICK).tobytes() == first.tobytes()
    assert len(calls) == len(others) + 2
    assert np.load(stored, allow_pickle=False).tobytes() == first.tobytes()


def test_a_store_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "file"))
    tracks = TrackTable.build([{"name": "motif", "link": "sigmoid"}])
    codes, label = labelled(60, 0)
    part = Examples(codes, label[:, None, None].astype(float))
    found = stored_predictions(lambda *_: np.ones((60, 1, 1)), part, part, part, tracks, QUICK)
    assert found.shape == (60, 1, 1)


def test_nearest_track_is_the_best_line() -> None:
    rng = np.random.default_rng(0)
    reference = rng.gamma(1.0, 2.0, (150, 4, 16)) + 50
    reference[:, 3] = 1.0
    noise = rng.normal(size=(150, 2, 16))
    target = np.stack([2 * reference[:, 2] + 3, 0.5 * reference[:, 0] - 7], axis=1) + 0.1 * noise
    target[rng.random(target.shape) < 0.2] = np.nan
    found = nearest_track(target[:100], reference[:100], reference[100:])
    assert found.reference.tolist() == [2, 0]
    known = np.isfinite(target[:100, 0])
    exact = np.corrcoef(target[:100, 0][known], reference[:100, 2][known])[0, 1]
    assert found.pearson[0] == pytest.approx(exact, abs=1e-9)
    assert (Moments.of(target[100:], found.predictions).compute("r2") > 0.98).all()


def test_mean_track_weighs_references_equally() -> None:
    rng = np.random.default_rng(0)
    reference = rng.random((10, 3, 4)) * np.array([1.0, 1000.0, 1.0])[:, None]
    target = rng.random((10, 2, 4)) + np.array([1.0, 5.0])[:, None]
    predicted = mean_track(target, reference, reference)
    assert predicted.mean((0, 2)) == pytest.approx(target.mean((0, 2)))
    first = mean_track(target, reference, reference, np.array([[True, False, False], [False, True, True]]))
    assert first[:, 0] == pytest.approx(reference[:, 0] / reference[:, 0].mean() * target[:, 0].mean())
    with pytest.raises(DataError, match="no reference track to average"):
        mean_track(target, reference, reference, np.zeros((2, 3), bool))


def test_mean_profile() -> None:
    target = np.array([[[1.0, 2.0]], [[3.0, np.nan]]])
    assert mean_profile(target, 3)[:, 0].tolist() == [[2.0, 2.0]] * 3


def test_sequence_ridge_recovers_composition() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for rows in (40, 10, 10):
        gc = np.repeat(rng.random((rows, 15)), 40, axis=1)  # 600 bp
        strong = rng.random(gc.shape) < gc
        codes = np.where(strong, rng.integers(1, 3, gc.shape), 3 * rng.integers(0, 2, gc.shape)).astype(np.uint8)
        share = np.stack([(codes[:, 84 + b * 8 : 300 + b * 8] % 3 > 0).mean(1) for b in range(35)], axis=1)
        target = np.stack([share, 4 - 2 * share], axis=1)
        parts.append(Examples(codes, target))
    parts[0].targets[0, 0] = np.nan
    predicted = sequence_ridge(*parts, bin_size=8, offset=188)
    assert predicted.shape == parts[2].targets.shape
    assert (Moments.of(parts[2].targets, predicted).compute("r2") > 0.9).all()
    shifted = sequence_ridge(*parts, bin_size=8, offset=0)
    assert (Moments.of(parts[2].targets, shifted).compute("r2") < 0.6).all()
    with pytest.raises(DataError, match="reach beyond the sequence"):
        sequence_ridge(*parts, bin_size=16, offset=188)


def test_published_kmer_figure(shared: Path) -> None:
    """A 3- to 6-mer logistic regression reaches MCC 0.655 on the first human transcription-factor task."""
    parts = []
    for name in ("train", "dev", "test"):
        table = pd.read_csv(shared / f"data/labelled/gue_human_tf0/{name}.csv.gz")
        parts.append(Examples(padded(table["sequence"].tolist()), table["label"].to_numpy(float)[:, None, None]))
    predicted = kmer_regression(*parts, TrackTable.build([{"name": "bound", "link": "sigmoid"}]))
    mcc = METRICS["mcc"].function(parts[2].targets[:, 0, 0], predicted[:, 0, 0])
    assert mcc == pytest.approx(0.655, abs=0.02)
