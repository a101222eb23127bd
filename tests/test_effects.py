"""Effects of variants on genes of donors: exact, added up, drivers, beside measured ones, as PrediXcan's files."""

from __future__ import annotations

import gzip
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from seqgraft.adapters.freeze import LinearProbe
from seqgraft.agreement import NETWORK, Measured, agreement, read_measured
from seqgraft.cli import app
from seqgraft.data import prepare_source
from seqgraft.data.augment import Augmentation
from seqgraft.data.calls import read_genotypes
from seqgraft.data.dataset import Dataset
from seqgraft.data.folds import Folds
from seqgraft.data.haplotypes import Haplotypes
from seqgraft.data.personal import Expression, GeneTable
from seqgraft.dosage import dosage_baselines
from seqgraft.effects import EffectsConfig
from seqgraft.errors import ConfigError, DataError, RunError
from seqgraft.evaluate import EvaluateConfig
from seqgraft.experiment import Experiment, build
from seqgraft.genome import Genome, Interval
from seqgraft.ism import Effects, find_drivers, select_drivers, variant_effects
from seqgraft.models.base import SequenceModel
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.predict import predict
from seqgraft.predixcan import PrediXcan, write_predixcan
from seqgraft.run import fit_run
from seqgraft.sample import Sample
from seqgraft.sequence import decode, encode, reverse_complement
from seqgraft.train import TrainConfig
from test_personal import TINY, WINDOW, source_of, write_cohort

FORWARD = Augmentation(reverse_complement=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_cohort(tmp_path_factory.mktemp("cohort"), seed=1)


@pytest.fixture(scope="module")
def cohort(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    source = source_of(files, gene_folds=Folds(by="random", test=0.25, seed=3))
    return prepare_source(source, tmp_path_factory.mktemp("prepared") / "cohort")


def model_of(cohort: Dataset, blocks: int = 0) -> SequenceModel:
    torch.manual_seed(0)
    settings = {**TINY, "blocks": blocks}
    model = build_model(ModelConfig(settings=settings, pool="attention", centre=12), cohort.tracks, cohort.info).eval()
    torch.nn.init.normal_(model.heads["new_expression"].attend.weight)  # type: ignore[union-attr,operator]
    torch.nn.init.normal_(model.heads["new_expression"].out.weight)  # type: ignore[union-attr,operator]
    return model


@pytest.fixture(scope="module")
def effects(cohort: Dataset) -> Effects:
    return variant_effects(model_of(cohort), cohort)


def plain(model: SequenceModel, text: str) -> float:
    """The prediction for one sequence."""
    codes = torch.from_numpy(encode(text))[None]
    lengths, nothing = torch.tensor([codes.shape[1]]), torch.zeros(1, 0, 0)
    with torch.no_grad():
        return float(model.predict(Sample(codes, lengths, torch.zeros(1), nothing, nothing))[0, 0, 0])


# ---- effects ----


@pytest.mark.parametrize(("blocks", "local"), [(0, True), (1, True), (1, False)])
def test_effects_are_differences_of_two_plain_predictions(cohort: Dataset, blocks: int, local: bool) -> None:
    assert cohort.donors is not None
    assert cohort.genome is not None
    model, ensemble = model_of(cohort, blocks), Augmentation(reverse_complement=True, shift=1)
    found = variant_effects(model, cohort, [1, 4], ensemble=ensemble, batch_size=2, local=local)
    assert found.in_words.startswith("everything") is not local
    assert len(found.table) == 6  # two SNVs and an insertion each
    sizes = []
    for row, (gene, variant) in enumerate(zip(found.gene, found.table.to_dict("records"), strict=True)):
        place = cohort.donors.genes.iloc[gene]
        assert variant["gene"] == place["gene"]
        chrom, tss = place["chrom"], int(place["tss"])
        around = decode(cohort.genome.codes(Interval(chrom, tss - WINDOW, tss + WINDOW)))
        at = variant["position"] - 1 - (tss - WINDOW)
        assert around[at : at + len(variant["ref"])] == variant["ref"]
        changed = around[:at] + variant["alt"] + around[at + len(variant["ref"]) :]  # all indels are right of the start
        values = []
        for shift in (0, -1, 1):
            for text in (around, changed):
                part = text[WINDOW // 2 + shift : WINDOW // 2 + shift + WINDOW]
                other = decode(reverse_complement(encode(part)))
                values.append((plain(model, part) + plain(model, other)) / 2)
        expected = np.mean(values[1::2]) - np.mean(values[::2])
        sizes.append(abs(expected))
        assert found.table["effect_z"][row] == pytest.approx(expected, abs=2e-6)
        assert found.table["effect"][row] == pytest.approx(expected * place["sd"], abs=1e-5)
        assert found.reference[[1, 4].index(int(gene))] == pytest.approx(np.mean(values[::2]), abs=2e-6)
    assert min(sizes) > 1e-3


def test_dosage_is_that_of_training_donors(cohort: Dataset, effects: Effects, files: dict[str, Path]) -> None:
    assert cohort.donors is not None
    lines = [line.split("\t") for line in files["c.vcf"].read_text().splitlines() if not line.startswith("##")]
    training = set(cohort.donors.donors.loc[cohort.donors.donors["fold"] == "train", "donor"])
    columns = [i for i, name in enumerate(lines[0]) if name in training]
    counts = {tuple(f[i] for i in (0, 1, 3, 4)): [f[i].count("1") for i in columns] for f in lines[1:]}
    assert len(effects.table) == len(counts) == 24
    for row in effects.table.to_dict("records"):
        dosage = counts[row["chrom"], str(row["position"]), row["ref"], row["alt"]]
        assert row["dosage_mean"] == pytest.approx(np.mean(dosage))
        assert row["dosage_variance"] == pytest.approx(np.var(dosage, ddof=1))


def test_one_variant_alone_is_the_haplotype_that_carries_it_alone(tmp_path: Path) -> None:
    """Indels on both sides of the anchor, over it, and at the window's edges."""
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("ACGT"), 400))
    (tmp_path / "g.fa").write_text(f">c\n{text}\n")
    places = [
        (150, 1, "ACC"),
        (165, 6, ""),
        (180, 1, "snv"),
        (196, 9, ""),
        (205, 4, ""),
        (230, 1, "GGTT"),
        (249, 3, ""),
    ]
    header = "##fileformat=VCFv4.2\n##contig=<ID=c,length=400>\n"
    lines = [header + "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t" + "\t".join(f"s{i}" for i in range(7))]
    for number, (start, size, more) in enumerate(places):
        ref = text[start : start + size]
        alt = "ACGT"[("ACGT".index(ref) + 1) % 4] if more == "snv" else ref[0] + more
        calls = "\t".join(str(int(i == number)) for i in range(7))
        lines.append(f"c\t{start + 1}\t.\t{ref}\t{alt}\t.\tPASS\t.\tGT\t{calls}")
    (tmp_path / "c.vcf").write_text("\n".join(lines) + "\n")
    genome = Genome.open(tmp_path / "g.fa")
    genotypes = read_genotypes(tmp_path / "c.vcf", genome)
    alone = Haplotypes(genome, genotypes.singly("c", np.arange(7)))
    pairs = np.column_stack([np.arange(8), np.zeros(8, np.int64)])
    found = alone.codes("c", 200, 100, pairs)
    np.testing.assert_array_equal(found[:7], Haplotypes(genome, genotypes).codes("c", 200, 100, pairs[:7]))
    assert decode(found[7]) == text[150:250]
    assert decode(found[1]) == text[145:166] + text[171:250]  # deleted before the start: more of the left
    assert decode(found[5]) == text[150:231] + "GGTT" + text[231:246]


def test_donors_with_one_variant_get_its_effect(cohort: Dataset, effects: Effects) -> None:
    """Where a donor carries one variant only, effects that are added up are the prediction itself."""
    assert cohort.donors is not None
    donors, checked = cohort.donors, 0
    predicted = predict(model_of(cohort), cohort, np.arange(len(cohort)))[:, 0, 0]
    for gene in range(len(donors.genes)):
        added, dosage = effects.added_up(gene), donors.dosage(gene)[0]
        for row in np.flatnonzero(donors.gene == gene):
            donor = donors.donor[row]
            if (dosage[donor] > 0).sum() <= 1:
                assert added[donor] == pytest.approx(predicted[row], abs=3e-6)
                checked += int(dosage[donor].any())
            own = effects.table["effect_z"].to_numpy()[effects.rows(gene)]
            assert added[donor] == pytest.approx(effects.reference[gene] + dosage[donor] @ own / 2)
    assert checked > 20


def test_effects_need_donors(tmp_path: Path) -> None:
    from builders import tiny_labels

    labels = tiny_labels(tmp_path / "labels")
    model = build_model(ModelConfig(settings=TINY), labels.tracks, labels.info)
    with pytest.raises(ConfigError, match=r"the run's data have no donors: 'labelled'\. Use 'seqgraft variants'"):
        variant_effects(model, labels)


# ---- drivers ----


def published(share: np.ndarray, effects: np.ndarray, predictions: np.ndarray) -> list[int]:
    """The forward selection written out (Rastogi et al. 2026)."""
    kept: list[int] = []
    best = 0.0
    for variant in np.argsort(-abs(effects), kind="stable"):
        together = stats.pearsonr(share[:, [*kept, variant]] @ effects[[*kept, variant]], predictions)[0]
        r, p = stats.pearsonr(share[:, variant] * effects[variant], predictions)
        if together >= best + 0.05 and r > 0 and p * len(effects) <= 0.01:
            kept.append(variant)
            best = together
    return kept


def test_drivers_are_those_of_the_published_selection() -> None:
    rng, counts = np.random.default_rng(0), []
    for trial in range(40):
        share = rng.binomial(2, rng.uniform(0.1, 0.5, 12), (60, 12)) / 2
        effects = rng.normal(size=12) * rng.choice([0.1, 1, 3], 12)
        noise = rng.normal(size=60) * (trial % 4)
        predictions = share @ (effects * (rng.random(12) < 0.5)) + noise
        found = select_drivers(share, effects, predictions)
        assert [driver.variant for driver in found] == published(share, effects, predictions)
        counts.append(len(found))
    assert {0, 1, 2, 3} <= set(counts)
    two = share[:, [3, 7]] @ [2.0, -1.0]
    found = select_drivers(share, np.where(np.arange(12) == 3, 2.0, np.where(np.arange(12) == 7, -1.0, 1e-3)), two)
    assert [driver.variant for driver in found] == [3, 7]
    assert found[-1].r == pytest.approx(1, abs=1e-3)
    assert select_drivers(share, effects, np.full(60, 0.3)) == []


def test_drivers_of_genes(cohort: Dataset, effects: Effects) -> None:
    assert cohort.donors is not None
    rows = np.concatenate([cohort.rows(fold) for fold in ("train", "test", "unseen_both")])
    who, gene = cohort.donors.donor[rows], cohort.donors.gene[rows]
    dosage = np.stack([cohort.donors.dosage(g)[0][d] for g, d in zip(gene, who, strict=True)])
    first = effects.table["effect_z"].to_numpy().reshape(8, 3)[gene, 0]
    drivers, genes = find_drivers(effects, rows, cohort, dosage[:, 0] * first / 2)  # the first variant, 40 bp before
    assert genes["gene"].tolist() == cohort.donors.genes["gene"].tolist()
    assert genes["drivers"].sum() == len(drivers) > 4
    assert (drivers["rank"] == 1).all()
    ours = effects.table[effects.table["gene"] == drivers["gene"][0]].iloc[0]
    assert drivers.iloc[0][["chrom", "position", "ref", "alt"]].tolist() == ours[list(ours.index[1:5])].tolist()
    strand = cohort.donors.genes.set_index("gene")["strand"][drivers["gene"]].to_numpy()
    np.testing.assert_array_equal(drivers["distance"], np.where(strand == "-", 40, -40))
    np.testing.assert_allclose(drivers["r"], 1)
    truth = cohort.raw_targets(rows)[:, 0, 0]
    here = gene == 2
    r, p = stats.pearsonr(truth[here], effects.added_up(2)[who[here]], alternative="greater")
    assert genes["pearson"][2] == pytest.approx(r)
    assert genes["p"][2] == pytest.approx(p)
    assert genes["linear"][2] == pytest.approx(
        stats.pearsonr(dosage[here, 0] * first[here], effects.added_up(2)[who[here]])[0]
    )


# ---- beside measured effects ----


def measured_of(effects: Effects, noise: float = 0.0) -> pd.DataFrame:
    """What an assay would tell, every other variant with its alleles the other way round."""
    table = effects.table[["gene", "chrom", "position", "ref", "alt"]].copy()
    rng = np.random.default_rng(0)
    table["logFC"] = effects.table["effect"] + noise * rng.normal(size=len(table))
    table["p"] = np.where(np.abs(effects.table["effect"]) > effects.table["effect"].abs().median(), 0.01, 0.5)
    odd = np.arange(len(table)) % 2 == 1
    table.loc[odd, ["ref", "alt"]] = table.loc[odd, ["alt", "ref"]].to_numpy()
    table.loc[odd, "logFC"] *= -1
    return table.sample(frac=1, random_state=0)


COLUMNS: dict[str, Any] = {"effect": "logFC", "significant": "p", "below": 0.05, "gene": "gene"}


def test_agreement_matches_alleles_and_turns_swapped_ones(cohort: Dataset, effects: Effects, tmp_path: Path) -> None:
    table = measured_of(effects)
    table = pd.concat([table, table.iloc[:2].assign(position=9), table.iloc[:1]])  # two elsewhere, one twice
    table.to_csv(tmp_path / "m.tsv", sep="\t", index=False)
    found = agreement(effects, cohort, read_measured(Measured(tmp_path / "m.tsv", **COLUMNS)), draws=20)
    swapped = int(((table.index % 2 == 1) & (table["position"] != 9)).sum())
    assert found.counts == {"measured": 27, "matched": 25, "swapped": swapped, "elsewhere": 2, "pairs": 24}
    np.testing.assert_allclose(found.pairs["measured"], effects.table["effect"], rtol=1e-6)
    np.testing.assert_allclose(found.pairs[NETWORK], effects.table["effect"])
    scores = found.table.set_index(["model", "fold", "variants", "metric"])["value"]
    for metric in ("pearson", "spearman", "sign_agreement"):
        assert scores[NETWORK, "all", "all", metric] == pytest.approx(1, abs=1e-6)
        assert scores[NETWORK, "all", "significant", metric] == pytest.approx(1, abs=1e-6)
    assert scores[NETWORK, "all", "all", "auroc"] == 1


def test_agreement_scores_linear_models_on_the_same_variants(cohort: Dataset, effects: Effects, tmp_path: Path) -> None:
    assert cohort.donors is not None
    measured_of(effects, noise=0.3).to_csv(tmp_path / "m.csv", index=False)
    found = agreement(effects, cohort, read_measured(Measured(tmp_path / "m.csv", **COLUMNS)), draws=50)
    training = np.flatnonzero(cohort.donors.donors["fold"] == "train")
    truth, weights = cohort.raw_targets(range(len(cohort)))[:, 0, 0], []
    for gene in range(8):
        y = np.full(len(cohort.donors.donors), np.nan)
        y[cohort.donors.donor[cohort.donors.gene == gene]] = truth[cohort.donors.gene == gene]
        dosage = cohort.donors.dosage(gene)[0].astype(float)
        fitted = dosage_baselines(dosage, y, training, ["ridge on dosage (BLUP)"])["ridge on dosage (BLUP)"]
        weights.append(fitted.weights * 2 * cohort.donors.genes["sd"][gene])
    np.testing.assert_allclose(found.pairs["ridge on dosage (BLUP)"], np.concatenate(weights))
    table = found.table.set_index(["model", "fold", "variants", "metric"])
    for model in (NETWORK, "ridge on dosage (BLUP)", "top SNP"):
        x, y = found.pairs[model], found.pairs["measured"]
        row = table.loc[(model, "all", "all", "spearman")]
        assert row["value"] == pytest.approx(stats.spearmanr(x, y)[0])
        assert row["low"] <= row["value"] <= row["high"]
        assert (row["n"], row["genes"]) == (24, 8)
        assert table.loc[(model, "all", "all", "pearson"), "value"] == pytest.approx(stats.pearsonr(x, y)[0])
        signs = (np.sign(x) * np.sign(y) + 1) / 2
        assert table.loc[(model, "all", "all", "sign_agreement"), "value"] == pytest.approx(signs.mean())
        matter = found.pairs["significant"].to_numpy()
        ranks = stats.mannwhitneyu(np.abs(x[matter]), np.abs(x[~matter])).statistic / matter.sum() / (~matter).sum()
        assert table.loc[(model, "all", "all", "auroc"), "value"] == pytest.approx(ranks)
        within = np.abs(x).groupby(effects.gene).rank()
        ranks = stats.mannwhitneyu(within[matter], within[~matter]).statistic / matter.sum() / (~matter).sum()
        assert table.loc[(model, "all", "all", "auroc_within_genes"), "value"] == pytest.approx(ranks)
    own, theirs = (table.loc[(m, "all", "all", "spearman")] for m in (NETWORK, "top SNP"))
    assert theirs["minus"] == pytest.approx(own["value"] - theirs["value"])
    assert np.isnan(own["minus"])
    assert set(found.table["fold"]) == {"all", "train"}  # two genes for testing have six pairs: too few


def test_variants_without_a_gene_are_compared_on_the_nearest(cohort: Dataset, effects: Effects, tmp_path: Path) -> None:
    table = measured_of(effects).drop(columns="gene")
    table.to_csv(tmp_path / "m.tsv", sep="\t", index=False)
    settings = Measured(tmp_path / "m.tsv", **{**COLUMNS, "gene": None})
    moved = effects.table.copy()  # as if gene2, further away, had the variants of gene0 in its window
    columns = ["chrom", "position", "ref", "alt"]
    moved.loc[effects.gene == 2, columns] = moved.loc[effects.gene == 0, columns].to_numpy()
    twice = replace(effects, table=moved)
    found = agreement(twice, cohort, read_measured(settings), draws=10)
    assert found.pairs["gene"].value_counts().to_dict() == {f"gene{i}": 3 for i in range(8) if i != 2}
    assert found.counts["elsewhere"] == 3


@pytest.mark.parametrize("words", [True, False])
def test_fine_mapped_variants_have_no_effect(cohort: Dataset, effects: Effects, tmp_path: Path, words: bool) -> None:
    """Only which of them matter is compared: said by words, or by a posterior probability."""
    table = measured_of(effects).drop(columns=["logFC", "gene"])
    table["p"] = (table["p"] < 0.05).map({True: "True", False: "no"}) if words else 1 - table["p"]
    table.to_csv(tmp_path / "m.tsv", sep="\t", index=False)
    settings: dict[str, Any] = {"file": str(tmp_path / "m.tsv"), "effect": None, "significant": "p"}
    config = build(EffectsConfig, {"measured": settings if words else settings | {"above": 0.9}}, "config")
    assert config.measured is not None
    found = agreement(effects, cohort, read_measured(config.measured), draws=10).table
    assert set(found["metric"]) == {"auroc", "auroc_within_genes"}
    assert found.set_index(["model", "fold", "metric"]).loc[(NETWORK, "all", "auroc"), "value"] == 1


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (
            "chrom\tposition\tref\talt\nc1\t1\tA\tC\n",
            {},
            r"lacks columns: \['effect'\]. It has chrom, position, ref, alt",
        ),
        ("chrom\tposition\tref\talt\teffect\nc1\tx\tA\tC\t1\n", {}, "row 1, column position: this is no number: 'x'"),
        (
            "chrom\tposition\tref\talt\teffect\ts\nc1\t1\tA\tC\t1\tmaybe\n",
            {"significant": "s"},
            "this is neither true nor false: 'maybe'",
        ),
        (
            "chrom\tposition\tref\talt\teffect\nchr1\t1\tA\tC\t1\n",
            {},
            "no measured variant is among those of the genes",
        ),
    ],
)
def test_bad_measurements(
    cohort: Dataset, effects: Effects, tmp_path: Path, text: str, columns: dict[str, Any], message: str
) -> None:
    (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        agreement(effects, cohort, read_measured(Measured(tmp_path / "m.tsv", **columns)))


def test_settings_of_measurements() -> None:
    with pytest.raises(ConfigError, match="there is nothing to compare with"):
        Measured(Path("m"), effect=None)
    with pytest.raises(ConfigError, match="variants matter by one bound of one column"):
        Measured(Path("m"), significant="p", below=0.1, above=0.2)
    with pytest.raises(ConfigError, match="must be 1 or more: 0"):
        PrediXcan(most=0)


# ---- PrediXcan ----


def summary_of(effects: Effects, cohort: Dataset) -> pd.DataFrame:
    assert cohort.donors is not None
    rows = np.flatnonzero(cohort.donors.donors["fold"].to_numpy(str)[cohort.donors.donor] == "test")
    return find_drivers(effects, rows, cohort, np.random.default_rng(0).normal(size=len(rows)))[1]


def read_back(folder: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    with closing(sqlite3.connect(folder / f"{name}.db")) as database:
        weights = pd.read_sql_query("SELECT rsid, gene, weight, ref_allele, eff_allele, varID FROM weights", database)
        columns = "gene, genename, `n.snps.in.model`, `pred.perf.R2`, `pred.perf.pval`, `pred.perf.qval`"
        extra = pd.read_sql_query(f"SELECT {columns} FROM extra", database)
    return weights, extra, pd.read_csv(folder / f"{name}.txt.gz", sep=r"\s+")


def test_predixcan_predicts_donors_from_dosage(cohort: Dataset, effects: Effects, tmp_path: Path) -> None:
    assert cohort.donors is not None
    summary = summary_of(effects, cohort)
    counts = write_predixcan(tmp_path, "w", effects, summary, PrediXcan(build="b1"))
    weights, extra, covariances = read_back(tmp_path, "w")
    assert counts == {"genes": 8, "weights": 24, "ids": 0}
    training = np.flatnonzero(cohort.donors.donors["fold"] == "train")
    for gene, place in cohort.donors.genes.iterrows():
        part = weights[weights["gene"] == place["gene"]]
        dosage = cohort.donors.dosage(int(gene))[0]
        expected = place["mean"] + place["sd"] * effects.added_up(int(gene))
        constant = place["mean"] + place["sd"] * effects.reference[int(gene)]
        np.testing.assert_allclose(constant + dosage @ part["weight"].to_numpy(), expected, rtol=1e-9)
        names = effects.table[effects.table["gene"] == place["gene"]]
        parts = zip(names["chrom"], names["position"], names["ref"], names["alt"], strict=True)
        assert part["varID"].tolist() == [f"{c}_{p}_{r}_{a}_b1" for c, p, r, a in parts] == part["rsid"].tolist()
        assert part["eff_allele"].tolist() == names["alt"].tolist()
        mine = covariances[covariances["GENE"] == place["gene"]]
        matrix = mine.pivot(index="RSID1", columns="RSID2", values="VALUE").loc[part["rsid"], part["rsid"]].to_numpy()
        full = np.cov(dosage[training].astype(float), rowvar=False)
        np.testing.assert_allclose(matrix[np.triu_indices(3)], full[np.triu_indices(3)], rtol=1e-7)
        assert np.isnan(matrix[np.tril_indices(3, -1)]).all()  # each pair once
    r2 = np.maximum(summary["pearson"], 0) ** 2
    np.testing.assert_allclose(extra["pred.perf.R2"], r2)
    np.testing.assert_allclose(extra["pred.perf.qval"], stats.false_discovery_control(summary["p"]))
    assert (extra["n.snps.in.model"] == 3).all()
    assert (covariances["GENE"].ne(covariances["GENE"].shift()).sum(), len(covariances)) == (8, 48)  # contiguous


def test_predixcan_names_and_fewest_variants(cohort: Dataset, effects: Effects, tmp_path: Path) -> None:
    ids = {
        "_".join(map(str, row)): f"rs{i}" for i, row in enumerate(effects.table.iloc[:5, 1:5].itertuples(index=False))
    }
    write_predixcan(tmp_path, "w", effects, summary_of(effects, cohort), PrediXcan(most=1), ids)
    weights, extra, covariances = read_back(tmp_path, "w")
    assert len(weights) == len(extra) == len(covariances) == 8
    weight = effects.table["effect"] / 2
    matter = weight.abs() * np.sqrt(effects.table["dosage_variance"])
    best = matter.groupby(effects.gene).idxmax()
    np.testing.assert_allclose(weights["weight"], weight[best])
    assert [name.startswith("rs") for name in weights["rsid"]] == (best < 5).tolist()
    with pytest.raises(DataError, match="no place for spaces in names of genes"):
        write_predixcan(tmp_path, "x", effects, summary_of(effects, cohort).assign(gene="a b"), PrediXcan())


def test_haploid_donors_count_as_if_doubled(files: dict[str, Path], tmp_path: Path) -> None:
    """On c2 every fourth donor has one haplotype: its one allele is what two are to others."""
    lines = []
    for line in files["c.vcf"].read_text().splitlines():
        fields = line.split("\t")
        if fields[0] == "c2":
            fields[9:] = [call[0] if i % 4 == 0 else call for i, call in enumerate(fields[9:])]
        lines.append("\t".join(fields))
    (tmp_path / "c.vcf").write_text("\n".join(lines) + "\n")
    cohort = prepare_source(source_of(files, vcf=tmp_path / "c.vcf"), tmp_path / "cohort")
    assert cohort.donors is not None
    model = model_of(cohort)
    effects = variant_effects(model, cohort)
    predicted = predict(model, cohort, np.arange(len(cohort)))[:, 0, 0]
    gene, donor = cohort.donors.gene, cohort.donors.donor
    checked = 0
    for row in np.flatnonzero((donor % 4 == 0) & (gene % 2 == 1)):
        dosage = cohort.donors.dosage(int(gene[row]))[0][donor[row]]
        assert dosage.max() <= 1
        if dosage.sum() == 1:
            whole = (
                effects.reference[gene[row]] + effects.table["effect_z"].to_numpy()[effects.rows(gene[row])] @ dosage
            )
            assert effects.added_up(int(gene[row]))[donor[row]] == pytest.approx(whole)
            assert whole == pytest.approx(predicted[row], abs=3e-6)
            checked += 1
    assert checked > 5
    rows = np.flatnonzero(cohort.donors.donors["fold"].to_numpy(str)[donor] == "test")
    summary = find_drivers(effects, rows, cohort, predicted[rows].astype(float))[1]
    write_predixcan(tmp_path, "w", effects, summary, PrediXcan())
    weights, _, covariances = read_back(tmp_path, "w")
    doubled = cohort.donors.dosage(1)[0] * np.where(np.arange(40) % 4 == 0, 2.0, 1.0)[:, None]
    place, mine = cohort.donors.genes.iloc[1], weights[weights["gene"] == "gene1"]["weight"].to_numpy()
    expected = (effects.added_up(1) - effects.reference[1]) * place["sd"]
    np.testing.assert_allclose(doubled @ mine, expected, atol=1e-9)
    training = np.flatnonzero(cohort.donors.donors["fold"] == "train")
    first = covariances[covariances["GENE"] == "gene1"]["VALUE"].iloc[0]
    assert first == pytest.approx(doubled[training, 0].var(ddof=1))


# ---- a run ----


@pytest.fixture(scope="module")
def run(cohort: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    experiment = Experiment(
        data=cohort.folder,
        model=ModelConfig(settings=TINY, init="random", centre=12),
        adapter=LinearProbe(),
        train=TrainConfig(epochs=1, batch_size=8, cache="float32", augment=FORWARD),
        evaluate=EvaluateConfig(draws=20),
    )
    fit_run(experiment, folder := tmp_path_factory.mktemp("runs") / "run")
    return folder


def text_of(folder: Path) -> dict[str, str]:
    """All that the files of a folder say."""
    out = {}
    for path in folder.iterdir():
        if path.suffix == ".parquet":
            out[path.name] = pd.read_parquet(path).to_csv()
        else:
            raw = path.read_bytes()
            out[path.name] = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("latin-1")
    return out


def test_no_donor_is_named_unless_asked_for(
    cohort: Dataset, effects: Effects, run: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    assert cohort.donors is not None
    measured_of(effects).to_csv(tmp_path / "m.tsv", sep="\t", index=False)
    settings = [f"measured.{name}={value}" for name, value in {"file": tmp_path / "m.tsv", **COLUMNS}.items()]
    settings.append(f"predixcan.ids={files['c.vcf']}")
    everything = ["--predixcan", *(part for each in settings for part in ("--set", each))]
    names = cohort.donors.donors["donor"].tolist()
    said: dict[str, str] = {}
    for out, asked, made in (
        (tmp_path / "all", everything, {"effects", "genes", "drivers", "agreement", "pairs"}),
        (tmp_path / "named", ["--donors"], {"effects", "genes", "drivers", "donors"}),
    ):
        done = CliRunner().invoke(app, ["effects", str(run), str(out), *asked], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        said[out.name] = done.output
        found = text_of(out)
        database = {"all.db", "all.txt.gz"} if out.name == "all" else set()
        assert found.keys() == {f"{name}.parquet" for name in made} | database
        naming = {name for name, text in found.items() if any(donor in text for donor in names)}
        assert naming == {"donors.parquet"} & found.keys()
        assert not any(donor in done.output for donor in names)
    assert "24 effects on 8 genes" in said["all"]
    assert "spearman, all 24 pairs of 8 genes: network " in said["all"]
    assert "PrediXcan's files: 8 genes, 24 weights, 0 with an ID" in said["all"]
    table = pd.read_parquet(out / "donors.parquet")
    assert len(table) == len(cohort)
    row = table.iloc[100]
    region = cohort.regions.iloc[100]
    assert (row["gene"], row["fold"]) == (region["name"], region["fold"])
    assert row["donor"] == names[region["donor"]]
    place = cohort.donors.genes.set_index("gene").loc[row["gene"]]
    assert row["measured"] == pytest.approx(place["mean"] + place["sd"] * cohort.raw_targets([100])[0, 0, 0])
    linear = pd.read_parquet(out / "genes.parquet").set_index("gene")["linear"]
    assert linear.mean() > 0.8
    with pytest.raises(RunError, match="The output folder exists already"):
        CliRunner().invoke(app, ["effects", str(run), str(out)], catch_exceptions=False)


def test_chosen_genes(run: Path, tmp_path: Path) -> None:
    from seqgraft.apply import effects_run

    (tmp_path / "genes.txt").write_text("gene5\ngene2\n")
    found = effects_run(run, tmp_path / "out", EffectsConfig(genes=tmp_path / "genes.txt"))
    assert pd.unique(found.effects.table["gene"]).tolist() == ["gene2", "gene5"]
    assert found.genes["gene"].tolist() == ["gene2", "gene5"]
    assert found.fold == "test"
    (tmp_path / "genes.txt").write_text("gene5\nother\n")
    with pytest.raises(ConfigError, match=r"the data have no such genes: \['other'\]"):
        effects_run(run, tmp_path / "none", EffectsConfig(genes=tmp_path / "genes.txt"))
    assert not (tmp_path / "none").exists()


def test_genes_without_variants_have_no_effects(files: dict[str, Path], tmp_path: Path) -> None:
    genes, expression = (pd.read_csv(files[name], sep="\t") for name in ("genes.tsv", "e.tsv"))
    more = genes.iloc[:1].assign(gene="bare", tss=18_500)
    pd.concat([more, genes]).to_csv(tmp_path / "genes.tsv", sep="\t", index=False)
    pd.concat([expression, expression.iloc[:1].assign(gene="bare")]).to_csv(tmp_path / "e.tsv", sep="\t", index=False)
    source = source_of(files, genes=GeneTable(tmp_path / "genes.tsv"), expression=Expression(tmp_path / "e.tsv"))
    cohort = prepare_source(source, tmp_path / "cohort")
    effects = variant_effects(model_of(cohort), cohort)
    assert cohort.donors is not None
    assert cohort.donors.genes["gene"][0] == "bare"
    assert len(effects.table) == 24
    np.testing.assert_array_equal(effects.added_up(0), np.full(40, effects.reference[0]))
    summary = summary_of(effects, cohort)
    assert summary.loc[0, ["variants", "drivers", "linear", "pearson", "p"]].tolist() == [0, 0, 0, 0, 1]
    assert write_predixcan(tmp_path, "w", effects, summary, PrediXcan())["genes"] == 8
    assert "bare" not in read_back(tmp_path, "w")[1]["gene"].tolist()
