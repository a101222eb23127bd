"""Variant effects of a fine-tuned run on simulated data, beside the truth of the simulation.

The targets, fixed before anything was measured: on a chromosome that is held out, causal variants among look-alikes,
decoys and background at AUROC 0.9, and the sign of nine strong effects in ten (heads that were not trained reach the
first, since the trunk knows the sites, and neither the second nor the conditions). Which condition a condition-specific
variant belongs to has no such target: it must be far from guessing. The width that is read is chosen on the validation
chromosome, for each question by its own score.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from seqgraft.apply import score_run
from seqgraft.data import prepare_source
from seqgraft.data.dataset import DatasetInfo
from seqgraft.data.simulate import Simulation, Truth, simulate
from seqgraft.experiment import parse_experiment, parse_source
from seqgraft.genome import Genome
from seqgraft.metrics import METRICS
from seqgraft.models.weights import ModelConfig, build_pretrained
from seqgraft.oracle import track_names
from seqgraft.run import fit_run
from seqgraft.variants import Layout, VariantConfig
from seqgraft.variants.over import Centre

VALID, TEST = "chr4", "chr5"
WIDTHS = (257, 501, 1025)
STRONG = 0.5  # log2 fold change of the track that changes most
SPECIFIC = 4  # a variant is specific if one condition changes at least so many times as much as the other
CONDITIONS = Simulation().conditions
TRACKS = track_names(CONDITIONS)
OF_CONDITION = np.array([[f"_{condition}" in name for name in TRACKS] for condition in CONDITIONS])
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fitted:
    """A run on simulated data, and the truth of its variants."""

    truth: Truth
    run: Path
    folder: Path

    def scores(self, chrom: str, width: int) -> tuple[pd.DataFrame, Floats]:
        """The variants of a chromosome with their true effects, and scores ``(variants, tracks)``."""
        vcf, out = self.folder / f"{chrom}.vcf", self.folder / f"{chrom}-{width}.parquet"
        lines = (self.truth.folder / "variants.vcf").read_text().splitlines(keepends=True)
        vcf.write_text("".join(line for line in lines if line.startswith(("#", f"{chrom}\t"))))
        if not out.exists():
            score_run(self.run, vcf, out, VariantConfig(over=Centre(width)))
        scored = pd.read_parquet(out).set_index("id")
        variants = self.truth.variants().set_index("id")
        variants = variants[variants["chrom"] == chrom]
        assert set(scored.index) == set(variants.index)
        return variants, scored.loc[variants.index, TRACKS].to_numpy(np.float64)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """LoRA on sim-mini, with the demo's settings on a genome of five chromosomes, for fewer epochs."""
    folder = tmp_path_factory.mktemp("known-truth")
    truth = simulate(Simulation(seed=1, chromosomes=5, variants=250), folder / "sim")
    source: dict[str, Any] = {
        "kind": "coverage",
        "fasta": str(folder / "sim" / "genome.fa"),
        "tracks": str(folder / "sim" / "tracks.csv"),
        "window": 5120,
        "target_length": 4096,
        "bin_size": 16,
        "folds": {"by": "chromosome", "valid": [VALID], "test": [TEST]},
    }
    prepare_source(parse_source(source), folder / "data")
    experiment: dict[str, Any] = {
        "data": str(folder / "data"),
        "model": {"name": "sim-mini"},
        "adapter": {"kind": "lora", "rank": 8, "where": ["attention", "conv"]},
        "train": {"lr": 3e-3, "batch_size": 8, "epochs": 5, "patience": 0, "augment": {"shift": 3}},
    }
    fit_run(parse_experiment(experiment), folder / "run")
    return Fitted(truth, folder / "run", folder)


def auroc(variants: pd.DataFrame, scores: Floats) -> float:
    """Causal variants against all others, by the largest change of any track."""
    causal = (variants["kind"] == "causal").to_numpy(np.float64)
    return float(METRICS["auroc"].function(causal, np.abs(scores).max(axis=1)))


def strong_signs(variants: pd.DataFrame, scores: Floats) -> npt.NDArray[np.bool_]:
    """Whether each strong effect has the right sign, in the track that truly changes most."""
    true = variants[TRACKS].to_numpy(np.float64)
    most = np.abs(true).argmax(axis=1, keepdims=True)
    true, scores = (np.take_along_axis(values, most, axis=1)[:, 0] for values in (true, scores))
    right: npt.NDArray[np.bool_] = (np.sign(scores) == np.sign(true))[np.abs(true) >= STRONG]
    return right


def right_conditions(variants: pd.DataFrame, scores: Floats) -> npt.NDArray[np.bool_]:
    """Whether each specific variant is given to its condition: the one of the track that changes most."""

    def of_conditions(effects: Floats) -> Floats:
        return np.stack([np.abs(effects)[:, own].max(axis=1) for own in OF_CONDITION], axis=1)

    true, predicted = of_conditions(variants[TRACKS].to_numpy(np.float64)), of_conditions(scores)
    specific = (variants["kind"] == "causal").to_numpy() & (true.max(axis=1) >= SPECIFIC * true.min(axis=1))
    right: npt.NDArray[np.bool_] = (true.argmax(axis=1) == predicted.argmax(axis=1))[specific]
    return right


def held_out(fitted: Fitted, question: Callable[[pd.DataFrame, Floats], float]) -> tuple[pd.DataFrame, Floats]:
    """Variants and scores of the test chromosome, read at the width that suits the validation chromosome best."""
    return fitted.scores(TEST, max(WIDTHS, key=lambda width: question(*fitted.scores(VALID, width))))


def test_causal_variants_are_found(fitted: Fitted) -> None:
    variants, scores = held_out(fitted, auroc)
    counts = variants["kind"].value_counts()
    assert counts["causal"] >= 30
    assert counts.sum() - counts["causal"] >= 100
    assert auroc(variants, scores) >= 0.9


def test_strong_effects_have_the_right_sign(fitted: Fitted) -> None:
    variants, scores = held_out(fitted, auroc)
    right = strong_signs(variants, scores)
    assert len(right) >= 20
    assert set(np.sign(variants[TRACKS].to_numpy()).ravel()) == {-1, 0, 1}
    assert right.mean() >= 0.9


def test_specific_variants_are_given_to_their_condition(fitted: Fitted) -> None:
    """Of 40 variants, 30 are right by guessing once in a thousand times."""
    right = right_conditions(*held_out(fitted, lambda *of: float(right_conditions(*of).mean())))
    assert len(right) >= 40
    assert right.mean() >= 0.75


# ---- a reporter assay ----


@pytest.fixture(scope="module")
def mpra(shared: Path) -> Iterator[ModuleType]:
    """examples/mpra/run.py."""
    spec = importlib.util.spec_from_file_location(
        "mpra_run", Path(__file__).resolve().parents[1] / "examples" / "mpra" / "run.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQGRAFT_SHARED", str(shared))
        patch.setitem(sys.modules, "mpra_run", module)
        spec.loader.exec_module(module)
        yield module


def test_measured_effects_are_of_the_alternative_allele(mpra: ModuleType) -> None:
    """The assay's authors name two known effects: C at SFA1 and A at OLE1 are the higher alleles."""
    table = mpra.read_effects()
    genome = Genome.open(mpra.shared() / "yeast" / "sacCer3.fa.gz")
    reference, alternate = mpra.fragments(table, genome)
    letters = np.array(list("ACGT"))
    snv = (table["ref"].str.len() == 1) & (table["alt"].str.len() == 1)
    middle = mpra.OLIGO // 2
    assert (letters[reference[snv, middle]] == table["ref"][snv]).all()
    assert (letters[alternate[snv, middle]] == table["alt"][snv]).all()
    assert (reference[~snv] != alternate[~snv]).any(axis=1).all()
    effects = table.set_index("id")["effect"]
    assert (effects.loc[["chrIV_159428_T_C"]] > 0.5).all()
    assert (effects.loc[["chrVII_398081_A_G"]] < -0.4).all()
    assert len(table) > 5900
    assert table["significant"].sum() > 400


def test_scores_are_of_the_own_gene_and_its_strand(mpra: ModuleType, tmp_path: Path) -> None:
    table = mpra.read_effects()
    table = table[table["id"].isin(table["id"].drop_duplicates().iloc[::1000])].reset_index(drop=True)
    assert set(table["side"]) == {"+", "-"}
    mpra.write_inputs(table, tmp_path)
    genome = Genome.open(mpra.shared() / "yeast" / "sacCer3.fa.gz")
    model = build_pretrained(ModelConfig("yeast-mini"), DatasetInfo("coverage", 5120, 256, 16))
    assert model is not None
    layout = Layout(5120, 256, 16, model.tracks, genome)
    found = mpra.score(model, layout, mpra.overs(table, tmp_path)["gene"], table, tmp_path / "gene.parquet")
    raw = pd.read_parquet(tmp_path / "gene.parquet").set_index(["id", "region"])
    for row, value in zip(table.itertuples(), found, strict=True):
        own = raw.loc[(row.id, row.gene)]
        assert value == pytest.approx((own[f"tif_tss_ypd{row.side}"] + own[f"stripe_ypd{row.side}"]) / 2)
    assert len(raw) == len(table.drop_duplicates(["id", "gene"]))


def test_the_ridge_has_not_seen_the_effects_that_it_predicts(mpra: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpra, "STRENGTHS", (1e3,))
    table = mpra.read_effects().iloc[::5].reset_index(drop=True)
    pair = mpra.fragments(table, Genome.open(mpra.shared() / "yeast" / "sacCer3.fa.gz"))
    first = pd.factorize(table["chrom"])[0] % 4 == 0
    before = mpra.kmer_ridge(table, pair)
    after = mpra.kmer_ridge(table.assign(effect=table["effect"].where(~first, -table["effect"])), pair)
    np.testing.assert_array_equal(after[first], before[first])
    assert (after[~first] != before[~first]).any()
