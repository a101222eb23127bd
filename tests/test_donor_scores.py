"""Strata of donors: who carries unseen or rare alleles, populations, and what a data set cannot tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from seqgraft.data import prepare_source
from seqgraft.data.dataset import Dataset, open_dataset
from seqgraft.data.folds import Folds
from seqgraft.donor_scores import _alleles, _strata
from seqgraft.evaluate import EvaluateConfig
from seqgraft.metrics import pearson_within
from test_personal import DONORS, GENES, source_of, write_cohort

CONFIG = EvaluateConfig(draws=20)


def prepared(folder: Path, edit: str = "") -> Dataset:
    """Donors 0 to 19 for training, the others, of two populations, for testing. ``edit``: what becomes of the VCF."""
    files = write_cohort(folder)
    header, *records = files["c.vcf"].read_text().split("#CHROM")[1].splitlines()
    start = files["c.vcf"].read_text().split("#CHROM")[0]
    changed = []
    for record in records:
        fields = record.split("\t")
        first = fields[0] == "c1" and int(fields[1]) < 2000
        if first and edit == "unseen":  # twelve donors for testing alone carry it
            fields[9:] = ["0|1" if donor >= DONORS - 12 else "0|0" for donor in range(DONORS)]
        elif first and edit == "rare":  # one training donor of twenty does as well, on one haplotype
            fields[9:] = ["0|1" if donor >= DONORS - 12 or donor == 3 else "0|0" for donor in range(DONORS)]
        changed.append("\t".join(fields))
    files["c.vcf"].write_text(start + "#CHROM" + "\n".join([header, *changed]) + "\n")
    table = pd.read_csv(files["donors.tsv"], sep="\t").assign(split=["train"] * 20 + ["test"] * (DONORS - 20))
    table.to_csv(files["donors.tsv"], sep="\t", index=False)
    source = source_of(files, donor_folds=Folds(by="column", column="split"))
    return prepare_source(source, folder / "data")


def strata(dataset: Dataset) -> tuple[pd.DataFrame, np.ndarray]:
    """The table, and a prediction of every row that it is of."""
    values = np.random.default_rng(0).normal(size=len(dataset))
    return _strata(dataset, "test", {"ours": values}, CONFIG).set_index("metric"), values


@pytest.mark.parametrize(("edit", "share"), [("unseen", 1 / 3), ("rare", 0.0)])
def test_carriers_are_scored_apart(tmp_path: Path, edit: str, share: float) -> None:
    dataset = prepared(tmp_path, edit)
    donors, rows = dataset.donors, dataset.rows("test")
    assert donors is not None
    kinds, alleles = _alleles(dataset, rows)
    carriers = (donors.gene[rows] == 0) & (donors.donor[rows] >= DONORS - 12)
    np.testing.assert_array_equal(kinds == edit, carriers)
    assert alleles["unseen"].tolist() == pytest.approx([share] + [0] * (GENES - 1))
    table, values = strata(dataset)
    truth = dataset.raw_targets(rows)[:, 0, 0]
    expected = np.corrcoef(truth[carriers], values[rows[carriers]])[0, 1]
    found = table.loc[f"pearson_{edit}_alleles"]
    assert (found["n"], found["value"]) == (1, pytest.approx(expected))
    assert table.loc["unseen_alleles", "value"] == pytest.approx(share / GENES)
    common = kinds == "common"
    gene = donors.gene[rows[common]]
    assert table.loc["pearson_common_alleles", "n"] == GENES - 1  # eight such donors of the first gene are too few
    scores = pearson_within(truth[common], values[rows[common]], gene)[1:]
    assert table.loc["pearson_common_alleles", "value"] == pytest.approx(scores.mean())


def test_populations_are_scored_apart(tmp_path: Path) -> None:
    dataset = prepared(tmp_path)
    table, values = strata(dataset)
    donors, rows = dataset.donors, dataset.rows("test")
    assert donors is not None
    here = rows[donors.donors["population"].to_numpy()[donors.donor[rows]] == "two"]
    expected = pearson_within(dataset.raw_targets(here)[:, 0, 0], values[here], donors.gene[here]).mean()
    assert table.loc["pearson_population_two", "value"] == pytest.approx(expected)
    assert table.loc["pearson_population_two", "n"] == GENES


def test_what_a_set_cannot_tell_is_said(tmp_path: Path) -> None:
    dataset = prepared(tmp_path)
    table, _ = strata(dataset)
    assert (
        table.loc["pearson_unseen_alleles", "note"] == "cannot be tested on this set: training donors have all alleles"
    )
    common = "cannot be tested on this set: all alleles are common among training donors"
    assert table.loc["pearson_rare_alleles", "note"] == common
    assert table.loc["pearson_common_alleles", "note"] == common
    assert table.loc["pearson_common_alleles", "model"] == "these donors"
    assert np.isnan(table.loc["pearson_rare_alleles", "value"])
    assert dataset.donors is not None
    people = dataset.donors.donors
    for changed, why in (
        (people.assign(population="one"), "there is one population"),
        (people.drop(columns="population"), "the table of donors has no column population"),
    ):
        changed.to_parquet(dataset.folder / "donors.parquet")
        table, _ = strata(open_dataset(dataset.folder))
        assert table.loc["pearson_population", "note"] == f"cannot be tested on this set: {why}"
