"""Linear models on dosage: against scikit-learn and slow formulas, on simulated genotypes, and on real segregants."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize
from sklearn.linear_model import ElasticNetCV, Ridge

from seqgraft.dosage import DOSAGE_BASELINES, dosage_baselines, fit_gene, heritability
from seqgraft.errors import ConfigError, DataError


def _people(n: int = 200, variants: int = 40, share: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    dosage = rng.binomial(2, rng.uniform(0.1, 0.5, variants), (n, variants)).astype(float)
    genetic = ((dosage - dosage.mean(0)) / dosage.std(0)) @ rng.normal(size=variants)
    noise = rng.normal(size=n) * np.sqrt((1 - share) / share) * genetic.std()
    return dosage, 3 + genetic + noise


TRAIN = np.arange(150)


def test_blup_is_ridge_with_the_penalty_of_reml() -> None:
    dosage, y = _people()
    h2 = heritability(dosage, y, TRAIN).value
    found = dosage_baselines(dosage, y, TRAIN, ["ridge on dosage (BLUP)"])["ridge on dosage (BLUP)"]
    mean, sd = dosage[TRAIN].mean(0), dosage[TRAIN].std(0)
    ridge = Ridge(alpha=dosage.shape[1] * (1 - h2) / h2).fit((dosage[TRAIN] - mean) / sd, y[TRAIN])
    np.testing.assert_allclose(found.predictions, ridge.predict((dosage - mean) / sd), rtol=1e-6)
    np.testing.assert_allclose(found.intercept + dosage @ found.weights, found.predictions, rtol=1e-9)


def test_reml_maximises_the_restricted_likelihood_written_out() -> None:
    dosage, y = _people(n=80, variants=15)
    train = np.arange(80)
    z = (dosage - dosage.mean(0)) / dosage.std(0)
    relatedness = z @ z.T / z.shape[1]

    def minus(h2: float) -> float:
        v = h2 * relatedness + (1 - h2) * np.eye(80)
        inverse, ones = np.linalg.inv(v), np.ones(80)
        r = y - (ones @ inverse @ y) / (ones @ inverse @ ones)
        return 79 * np.log(r @ inverse @ r) + np.linalg.slogdet(v)[1] + np.log(ones @ inverse @ ones)

    best = optimize.minimize_scalar(minus, bounds=(0, 0.999), method="bounded").x
    assert heritability(dosage, y, train).value == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_heritability_is_recovered_on_average(share: float) -> None:
    found = []
    for seed in range(30):
        dosage, y = _people(share=max(share, 1e-6), seed=seed)
        found.append(heritability(dosage, y, np.arange(200)))
    assert np.mean([f.value for f in found]) == pytest.approx(share, abs=0.08)
    significant = np.mean([f.p < 0.05 for f in found])
    assert significant > 0.9 if share else significant < 0.2


def test_elastic_net_is_that_of_scikit_learn() -> None:
    dosage, y = _people()
    mean, sd = dosage[TRAIN].mean(0), dosage[TRAIN].std(0)
    z = (dosage - mean) / sd
    theirs = ElasticNetCV(l1_ratio=0.5, cv=5, random_state=0, max_iter=5000).fit(z[TRAIN], y[TRAIN] - y[TRAIN].mean())
    found = dosage_baselines(dosage, y, TRAIN)["elastic net on dosage"]
    np.testing.assert_allclose(found.predictions, theirs.predict(z) + y[TRAIN].mean(), atol=1e-3)


def test_top_snp_finds_the_one_causal_variant_and_its_effect() -> None:
    dosage, _ = _people()
    y = 1 + 0.5 * dosage[:, 7] + 0.05 * np.random.default_rng(1).normal(size=200)
    top = dosage_baselines(dosage, y, TRAIN, ["top SNP"])["top SNP"]
    assert np.flatnonzero(top.weights).tolist() == [7]
    assert top.weights[7] == pytest.approx(0.5, abs=0.02)
    assert top.intercept == pytest.approx(1.0, abs=0.03)


def test_only_training_donors_decide() -> None:
    dosage, y = _people()
    other = y.copy()
    other[150:] = 1e6
    for name in DOSAGE_BASELINES:
        a, b = (dosage_baselines(dosage, values, TRAIN, [name])[name] for values in (y, other))
        np.testing.assert_array_equal(a.predictions, b.predictions)


def test_rare_variants_missing_genotypes_and_unknown_expression() -> None:
    dosage, y = _people()
    dosage[:, 0] = 0.0
    dosage[5, 0] = 1.0  # below 5 %
    dosage[3, 1] = np.nan
    y[4] = np.nan
    for name, model in dosage_baselines(dosage, y, TRAIN).items():
        assert model.weights[0] == 0, name
        assert np.isfinite(model.predictions).all(), name


def test_a_window_without_variants_predicts_the_mean() -> None:
    y = np.random.default_rng(0).normal(size=200)
    for model in dosage_baselines(np.zeros((200, 3)), y, TRAIN).values():
        np.testing.assert_allclose(model.predictions, y[TRAIN].mean())
    assert heritability(np.zeros((200, 0)), y, TRAIN).p == 1.0


def test_refusals() -> None:
    dosage, y = _people()
    with pytest.raises(ConfigError, match="no such baseline on dosage"):
        dosage_baselines(dosage, y, TRAIN, ["bslmm"])
    with pytest.raises(DataError, match="Fewer than 10 training donors"):
        heritability(dosage, y, np.arange(5))


def test_one_decomposition_gives_the_models_and_the_heritability(monkeypatch: pytest.MonkeyPatch) -> None:
    dosage, y = _people()
    expected, share = dosage_baselines(dosage, y, TRAIN), heritability(dosage, y, TRAIN)
    calls, eigh = [], np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    models, found = fit_gene(dosage, y, TRAIN)
    assert len(calls) == 1
    assert found == share
    assert models.keys() == expected.keys()
    for name, model in models.items():
        np.testing.assert_array_equal(model.predictions, expected[name].predictions)
