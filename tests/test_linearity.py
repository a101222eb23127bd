"""The share of a model's predictions that is linear in dosage: functions with a known one, the oracle, a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from seqgraft.data import prepare_source
from seqgraft.data.cohort import Cohort, drive
from seqgraft.data.dataset import Dataset
from seqgraft.data.donors import Donors
from seqgraft.data.simulate import Simulation, simulate
from seqgraft.linearity import GeneLinearity, Values, fold_linearity, gene_linearity, values_of
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.sequence import ONE_HOT, Codes
from test_cohort import WINDOW, prepare
from test_personal import DONORS, source_of, write_cohort

Floats = npt.NDArray[np.float64]
ALL = np.arange(DONORS)
TINY = {"channels": 16, "depth": 3, "blocks": 0}


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> Donors:
    """Substitutions 40 bp before and 30 bp after every start, an insertion behind them."""
    folder = tmp_path_factory.mktemp("cohort")
    found = prepare_source(source_of(write_cohort(folder)), folder / "data").donors
    assert found is not None
    return found


def of_sites(donors: Donors, gene: int, both: Any) -> Values:
    """``both`` of whether each of the two substitutions is there."""

    def values(reference: Codes, codes: Codes) -> Floats:
        middle = codes.shape[1] // 2
        there = [codes[:, middle + at] != reference[middle + at] for at in (-40, 30)]
        return np.asarray(both(*(each.astype(np.float64) for each in there)))

    return values


def test_sums_of_effects_are_linear_and_products_are_not(donors: Donors) -> None:
    for gene in range(3):
        dosage = donors.dosage(gene)[0].astype(np.float64)
        found = gene_linearity(donors, gene, ALL, of_sites(donors, gene, lambda a, b: 3 + 2 * a - b))
        assert found == GeneLinearity(pytest.approx(1), pytest.approx(np.nan, nan_ok=True), 3, found.haplotypes)
        assert found.haplotypes <= 8  # too few for a regression
        apart = gene_linearity(donors, gene, ALL, of_sites(donors, gene, lambda a, b: a - b + 4 * a * b))
        alleles = donors.genotypes.alleles(donors.dosage(gene)[1])[:2].astype(np.float64)
        truth = (alleles[0] - alleles[1] + 4 * alleles[0] * alleles[1]).mean(0)
        alone = (dosage[:, 0] - dosage[:, 1]) / 2
        assert apart.linearity == pytest.approx(max(0, 1 - (truth - alone).var() / truth.var()))
        assert apart.linearity < 0.8


def test_predictions_that_do_not_differ_have_no_share(donors: Donors) -> None:
    found = gene_linearity(donors, 0, ALL, lambda reference, codes: np.full(len(codes), 3.0))
    assert np.isnan(found.linearity)


def test_donors_without_phase(tmp_path: Path) -> None:
    files = write_cohort(tmp_path)
    files["c.vcf"].write_text(files["c.vcf"].read_text().replace("0|1", "0/1").replace("1|0", "0/1"))
    donors = prepare_source(source_of(files, unphased="dosage", allow_skipped=True), tmp_path / "data").donors
    assert donors is not None
    weights = np.random.default_rng(0).normal(size=(donors.window, 4))

    def linear(reference: Codes, codes: Codes) -> Floats:
        return np.asarray((ONE_HOT[codes] * weights).sum((1, 2)))

    assert gene_linearity(donors, 1, ALL, linear).linearity == pytest.approx(1)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("simulated")
    simulation = Simulation(
        seed=11, conditions=("activated",), chromosomes=1, chromosome_length=32_000, variants=0, donors=Cohort(120)
    )
    return prepare(simulate(simulation, folder / "sim"), folder)


def test_the_oracle_is_linear_and_a_function_with_an_optimum_is_not(simulated: Dataset) -> None:
    """The logarithm of the oracle's count is nearly additive over variants; its square around the mean is not."""
    donors = simulated.donors
    assert donors is not None
    chosen = np.flatnonzero(donors.donors["fold"] == "test")
    plain, optimum = [], []
    for gene, strand in enumerate(donors.genes["strand"]):

        def oracle(reference: Codes, codes: Codes, strand: str = strand) -> Floats:
            return drive(codes, "activated", strand)

        def best_in_the_middle(reference: Codes, codes: Codes, strand: str = strand) -> Floats:
            driven = drive(codes, "activated", strand)
            return np.asarray(-((driven - driven.mean()) ** 2))

        plain.append(gene_linearity(donors, gene, chosen, oracle))
        optimum.append(gene_linearity(donors, gene, chosen, best_in_the_middle))
    shares = [np.array([[one.linearity, one.linearity_fitted] for one in found]) for found in (plain, optimum)]
    assert np.isfinite(shares[0][:, 0]).sum() > 10
    assert np.nanmean(shares[0], axis=0) == pytest.approx([1, 0.95], abs=0.06)
    assert (np.nanmean(shares[1], axis=0) < [0.5, 0.85]).all()


def test_a_networks_values_are_its_predictions(simulated: Dataset) -> None:
    donors = simulated.donors
    assert donors is not None
    torch.manual_seed(0)
    model = build_model(ModelConfig(settings=TINY, centre=8), simulated.tracks, simulated.info).eval()
    sample = simulated.sample(simulated.rows("test")[:4])
    found = values_of(model, batch_size=3)(sample.codes[0].numpy(), sample.codes.numpy())
    assert sample.haplotypes is not None
    with torch.no_grad():
        expected = model.predict(sample)[:, 0, 0].numpy()
    np.testing.assert_allclose(found[sample.haplotypes.numpy()].mean(1), expected, atol=1e-5)


def test_some_genes_of_a_fold(simulated: Dataset) -> None:
    def length_of_a(reference: Codes, codes: Codes) -> Floats:
        return np.asarray((codes == 0).sum(1), dtype=np.float64)

    table = fold_linearity(simulated, "test", length_of_a, 5)
    assert simulated.donors is not None
    assert len(table) == 5
    assert table["gene"].iloc[[0, -1]].tolist() == [0, len(simulated.donors.genes) - 1]
    assert (table["haplotypes"] > 5).all()
    assert simulated.info.window == WINDOW
