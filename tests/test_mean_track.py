"""Two outputs of donors' expression: the means of genes, and how donors differ from them; what each part weighs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from seqgraft.adapters.freeze import LinearProbe
from seqgraft.data import prepare_source
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset
from seqgraft.data.folds import Folds
from seqgraft.data.personal import Expression
from seqgraft.errors import ConfigError, DataError, RunError
from seqgraft.evaluate import EvaluateConfig
from seqgraft.experiment import Experiment
from seqgraft.losses import AllPairs, Huber, MaskedTokens, MeanSquaredError, Pairs
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.objectives import Elementwise, OfGenes
from seqgraft.predict import predict
from seqgraft.report import write_report
from seqgraft.run import evaluate_run, fit_run, objective_of, open_run
from seqgraft.train import TrainConfig
from test_personal import TINY, source_of, write_cohort

GENE_FOLDS = Folds(by="random", test=0.4, seed=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_cohort(tmp_path_factory.mktemp("cohort"), missing=True)


@pytest.fixture(scope="module")
def cohort(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    source = source_of(files, gene_folds=GENE_FOLDS, mean_track=True)
    return prepare_source(source, tmp_path_factory.mktemp("prepared") / "cohort")


def experiment_of(cohort: Dataset, **changes: object) -> Experiment:
    plain = Experiment(
        data=cohort.folder,
        model=ModelConfig(settings=TINY, init="random", centre=12),
        adapter=LinearProbe(),
        train=TrainConfig(epochs=2, batch_size=8, augment=Augmentation(reverse_complement=False)),
        evaluate=EvaluateConfig(draws=50, linearity=0),
        loss_weights={"mean": 1.0, "expression": 10.0},
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_means_are_those_of_training_donors_and_standardised_over_training_genes(
    cohort: Dataset, files: dict[str, Path], tmp_path: Path
) -> None:
    donors = cohort.donors
    assert donors is not None
    assert cohort.tracks.names == ["expression", "mean"]
    level = donors.genes["mean"].to_numpy()
    known = level[(donors.genes["fold"] == "train").to_numpy()]
    targets = cohort.raw_targets(np.arange(len(cohort)))[:, :, 0]
    np.testing.assert_allclose(targets[:, 1], ((level - known.mean()) / known.std())[donors.gene], atol=1e-6)
    assert {"train", "test"} == set(donors.genes["fold"])
    assert cohort.info.notes["mean_track"] == pytest.approx({"center": known.mean(), "spread": known.std()})
    plain = prepare_source(source_of(files, gene_folds=GENE_FOLDS), tmp_path / "plain")
    assert plain.tracks.names == ["expression"]
    np.testing.assert_array_equal(plain.raw_targets(np.arange(len(plain)))[:, 0], targets[:, :1])


def test_means_that_do_not_differ(files: dict[str, Path], tmp_path: Path) -> None:
    table = pd.read_csv(files["e.tsv"], sep="\t", index_col=0).iloc[1:2]
    table.to_csv(tmp_path / "one.tsv", sep="\t")
    source = source_of(files, expression=Expression(tmp_path / "one.tsv"), mean_track=True)
    with pytest.raises(DataError, match="enes for training do not differ in their means: 1"):
        prepare_source(source, tmp_path / "out")


def test_each_part_has_its_loss_and_its_weight(cohort: Dataset) -> None:
    model = build_model(ModelConfig(settings=TINY, centre=4), cohort.tracks, cohort.info).eval()
    sample = cohort.sample(cohort.rows("train")[:10])
    objective = objective_of(experiment_of(cohort, loss=Pairs()), cohort)
    assert isinstance(objective, OfGenes)
    with torch.no_grad():
        values = model(sample)
        found = objective(model, sample) / objective.weigh(sample)
    genes = torch.from_numpy(objective.genes[sample.row.numpy()])
    parts = {"y_true": sample.targets[:, :1], "y_pred": values[:, :1], "mask": sample.mask[:, :1]}
    total, weight = Pairs().of_genes(**parts, genes=genes)
    squares = ((values - sample.targets)[:, 1] ** 2).mean()  # a loss for all is for how donors differ
    torch.testing.assert_close(found, torch.stack([10 * total / weight, squares]))
    assert objective.terms == ["expression", "mean"]
    plain = OfGenes(cohort.tracks, {"mean": Huber()}, objective.genes, 8)
    assert [type(part[2]) for part in plain._parts] == [AllPairs, Huber]


def test_weights_and_losses_that_mean_nothing(cohort: Dataset) -> None:
    for changes, message in (
        ({"loss_weights": {"means": 2.0}}, r"loss_weights: names groups of tracks that do not exist: \['means'\]"),
        ({"loss_weights": {"mean": 0.0}}, "loss_weights: a weight must be above 0"),
        ({"loss": {"mean": AllPairs()}}, "loss.mean: donors of a gene do not differ in its mean: 'AllPairs'"),
        ({"loss": MaskedTokens()}, "masked tokens are the whole loss"),
    ):
        with pytest.raises(ConfigError, match=message):
            objective_of(experiment_of(cohort, **changes), cohort)
    with pytest.raises(ConfigError, match="a weight must be above 0"):
        Elementwise(cohort.tracks, {"expression": MeanSquaredError()}, shares={"mean": float("nan")})


def test_a_run_is_scored_across_genes_and_within_them(cohort: Dataset, tmp_path: Path) -> None:
    experiment = experiment_of(cohort)
    fit_run(experiment, tmp_path / "run")
    run, label = open_run(tmp_path / "run"), "linear probe on random weights"
    found = evaluate_run(tmp_path / "run").metrics
    across = found[found["metric"] == "pearson_across_genes"].set_index(["model", "fold"])
    assert set(across["group"]) == {"mean"}
    assert across.loc[(label, "test"), "note"] == "genes that were trained on"
    assert cohort.donors is not None
    for fold in ("test", "unseen_genes", "unseen_both"):
        rows = cohort.rows(fold)
        table = pd.DataFrame({"gene": cohort.donors.gene[rows], "y": cohort.raw_targets(rows)[:, 1, 0]})
        means = table.assign(x=predict(run.model, cohort, rows)[:, 1, 0]).groupby("gene").mean()
        expected = means.corr().loc["x", "y"] if len(means) > 2 else np.nan
        assert across.loc[(label, fold), "value"] == pytest.approx(expected, abs=1e-4, nan_ok=True)
        assert across.loc[(label, fold), "n"] == len(means)
    assert np.isfinite(across.loc[(label, "unseen_genes"), "value"])
    within = found[(found["metric"] == "pearson_within_genes") & (found["model"] == label)]
    assert set(within["group"]) == {"expression"}
    assert "Pearson of means across genes" in write_report(tmp_path / "run").read_text()
    with pytest.raises(RunError, match=r"other settings.*loss_weights"):
        fit_run(replace(experiment, loss_weights={}), tmp_path / "run", resume=True)
