"""Personal genomes end to end on a small cohort: preparing, sequences of donors, losses of pairs, training, scores."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from seqgraft.adapters import adapt
from seqgraft.adapters.freeze import LinearProbe
from seqgraft.adapters.lora import LoRA
from seqgraft.cache import ActivationCache, CacheSettings, choose
from seqgraft.data import prepare_source
from seqgraft.data.augment import FORWARD, Augmentation, View
from seqgraft.data.dataset import Dataset
from seqgraft.data.donors import MARGIN
from seqgraft.data.folds import Folds
from seqgraft.data.personal import DonorTable, Expression, GeneTable, PersonalSource, Selection
from seqgraft.errors import ConfigError, DataError
from seqgraft.evaluate import EvaluateConfig
from seqgraft.experiment import Experiment
from seqgraft.genome import Interval
from seqgraft.losses import AllPairs, PairClassification, Pairs
from seqgraft.metrics import pearson_within
from seqgraft.models.base import Head, SequenceModel, State, undo_link
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.objectives import OfGenes
from seqgraft.predict import predict
from seqgraft.report import write_report
from seqgraft.run import evaluate_run, fit_run
from seqgraft.tracks import TrackTable
from seqgraft.train import TrainConfig

LENGTH, GENES, DONORS, WINDOW = 20_000, 8, 40, 256
TINY = {"channels": 16, "depth": 3, "blocks": 0}


def write_cohort(folder: Path, *, seed: int = 0, missing: bool = False) -> dict[str, Path]:
    """Two contigs, eight genes, forty diploid donors; expression follows two variants beside each gene."""
    rng = np.random.default_rng(seed)
    files = {name: folder / name for name in ("g.fa", "c.vcf", "e.tsv", "genes.tsv", "donors.tsv")}
    contigs = {name: "".join(rng.choice(list("ACGT"), LENGTH)) for name in ("c1", "c2")}
    files["g.fa"].write_text("".join(f">{name}\n{text}\n" for name, text in contigs.items()))
    donors = [f"d{i:02d}" for i in range(DONORS)]
    header = "##fileformat=VCFv4.2\n" + "".join(f"##contig=<ID={c},length={LENGTH}>\n" for c in contigs)
    header += '##FORMAT=<ID=GT,Number=1,Type=String,Description="">\n'
    lines = [header + "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t" + "\t".join(donors)]
    genes, expression = [], []
    for number in range(GENES):
        chrom, tss = ("c1", "c2")[number % 2], 2000 + 2000 * number
        genes.append((f"gene{number}", chrom, tss + 1, "+-"[number % 2]))
        level = np.zeros(DONORS)
        for offset, effect in ((-40, 1.0), (30, -0.5), (60, 0.0)):
            ref = contigs[chrom][tss + offset]
            alt = "ACGT"[("ACGT".index(ref) + 1) % 4] if offset != 60 else ref + "ACG"
            alleles = rng.random((DONORS, 2)) < 0.4
            level += effect * alleles.sum(1)
            calls = ["|".join(map(str, pair.astype(int))) for pair in alleles]
            lines.append("\t".join([chrom, str(tss + offset + 1), ".", ref, alt, ".", "PASS", ".", "GT", *calls]))
        expression.append(level + 5 + number + 0.3 * rng.normal(size=DONORS))
    files["c.vcf"].write_text("\n".join(sorted(lines, key=lambda l: ("#" not in l[:1], *_place(l)))) + "\n")
    table = pd.DataFrame(expression, index=[g[0] for g in genes], columns=donors)
    if missing:
        table.iloc[0, 3] = np.nan
    table.rename_axis("gene").to_csv(files["e.tsv"], sep="\t", na_rep="NA")
    pd.DataFrame(genes, columns=["gene", "chrom", "tss", "strand"]).to_csv(files["genes.tsv"], sep="\t", index=False)
    people = pd.DataFrame({"donor": donors, "family": [f"f{i // 2}" for i in range(DONORS)]})
    people["population"] = ["one" if i < 30 else "two" for i in range(DONORS)]
    people["sex"] = ["m" if i % 2 else "f" for i in range(DONORS)]
    people.to_csv(files["donors.tsv"], sep="\t", index=False)
    return files


def _place(line: str) -> tuple[str, int]:
    fields = line.split("\t")
    return ("", 0) if line.startswith("#") else (fields[0], int(fields[1]))


def source_of(files: dict[str, Path], **changes: Any) -> PersonalSource:
    settings: dict[str, Any] = {
        "genome": files["g.fa"],
        "vcf": files["c.vcf"],
        "expression": Expression(files["e.tsv"]),
        "genes": GeneTable(files["genes.tsv"]),
        "donors": DonorTable(files["donors.tsv"]),
        "window": WINDOW,
    }
    settings["donor_folds"] = Folds(by="random", valid=0.2, test=0.2, group="family")
    return PersonalSource(**{**settings, **changes})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_cohort(tmp_path_factory.mktemp("cohort"), missing=True)


@pytest.fixture(scope="module")
def cohort(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    source = source_of(files, gene_folds=Folds(by="random", test=0.25, seed=3))
    return prepare_source(source, tmp_path_factory.mktemp("prepared") / "cohort")


def test_rows_are_known_pairs_and_folds_cross(cohort: Dataset) -> None:
    donors = cohort.donors
    assert donors is not None
    assert len(cohort) == GENES * DONORS - 1  # one expression is unknown
    of_gene, of_donor = donors.genes["fold"].to_numpy(), donors.donors["fold"].to_numpy()
    expected = {
        ("train", "train"): "train",
        ("train", "valid"): "valid",
        ("train", "test"): "test",
        ("test", "train"): "unseen_genes",
        ("test", "test"): "unseen_both",
    }
    for row, fold in enumerate(cohort.regions["fold"]):
        assert fold == expected.get((of_gene[donors.gene[row]], of_donor[donors.donor[row]]), "unused")
    families = donors.donors.groupby("family")["fold"].nunique()
    assert (families == 1).all()


def test_targets_are_z_scores_of_training_donors(cohort: Dataset, files: dict[str, Path]) -> None:
    donors = cohort.donors
    assert donors is not None
    table = pd.read_csv(files["e.tsv"], sep="\t", index_col=0)
    train = donors.donors.loc[donors.donors["fold"] == "train", "donor"]
    for row in range(0, len(cohort), 17):
        values = table.loc[cohort.regions["name"][row]]
        expected = (values[donors.donors["donor"][donors.donor[row]]] - values[train].mean()) / values[train].std(
            ddof=0
        )
        assert cohort.raw_targets([row])[0, 0, 0] == pytest.approx(expected, abs=1e-5)
    gene = donors.genes.iloc[0]
    assert gene["mean"] == pytest.approx(table.loc[gene["gene"], train].mean())


def test_a_sample_holds_each_distinct_haplotype_once(cohort: Dataset) -> None:
    donors = cohort.donors
    assert donors is not None
    rows = cohort.rows("train")[:20]
    sample = cohort.sample(rows)
    assert sample.haplotypes is not None
    assert sample.shown is not None
    assert len(sample) == 20
    assert sample.haplotypes.shape == (20, 2)
    assert len(sample.codes) == len(np.unique(donors.haplotypes[donors.gene[rows], donors.donor[rows]])) < 40
    for row, pair in zip(rows, sample.haplotypes.tolist(), strict=True):
        gene, donor = donors.gene[row], donors.donor[row]
        place = donors.genes.iloc[gene]
        for slot, which in enumerate(pair):
            expected = donors._built.codes(place["chrom"], place["tss"], WINDOW, np.array([[donor, slot]]))[0]
            np.testing.assert_array_equal(sample.codes[which].numpy(), expected)
    window = Interval(place["chrom"], place["tss"] - WINDOW // 2, place["tss"] + WINDOW // 2)
    assert cohort.genome is not None
    assert sample.codes[which][WINDOW // 2] == cohort.genome.codes(window)[WINDOW // 2]  # the start stays where it is


def test_what_names_the_sequences_knows_how_long_deletions_are(cohort: Dataset) -> None:
    donors = cohort.donors
    assert donors is not None
    longer = replace(donors.genotypes, ref_length=donors.genotypes.ref_length + 1)
    assert replace(donors).identity == donors.identity
    assert replace(donors, genotypes=longer).identity != donors.identity


def test_views_move_and_turn_the_same_haplotypes(cohort: Dataset) -> None:
    rows = cohort.rows("train")[:3]
    plain, moved = cohort.sample(rows), cohort.sample(rows, [View(True, 5), FORWARD, View(False, -2)])
    assert plain.haplotypes is not None
    assert moved.haplotypes is not None
    assert moved.shown is not None
    one, other = plain.codes[plain.haplotypes[0, 0]], moved.codes[moved.haplotypes[0, 0]]
    assert torch.equal(3 - other.flip(0)[:-5].int(), one[5:].int())
    one, other = plain.codes[plain.haplotypes[2, 1]], moved.codes[moved.haplotypes[2, 1]]
    assert torch.equal(other[2:], one[:-2])
    assert moved.shown[moved.haplotypes[0, 0]].tolist()[1:] == [1, 5]
    with pytest.raises(ConfigError, match=f"shifted by {MARGIN} bp at most"):
        cohort.sample(rows[:1], [View(False, MARGIN + 1)])


def naive(model: SequenceModel, cohort: Dataset, rows: np.ndarray) -> torch.Tensor:
    """Every haplotype of every donor through the model by itself; the mean after the link."""
    out = []
    for row in rows:
        sample = cohort.sample([row])
        assert sample.haplotypes is not None
        codes = sample.codes[sample.haplotypes[0]]
        alone = replace(sample, codes=codes, lengths=sample.lengths[:1].expand(len(codes)), haplotypes=None)
        out.append(model.link(model(alone)).mean(0))
    return torch.stack(out)


@pytest.mark.parametrize("link", ["identity", "softplus"])
@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_a_donor_is_the_mean_of_its_haplotypes_after_the_link(cohort: Dataset, link: str, pool: Any) -> None:
    tracks = TrackTable.build([{"name": "expression", "group": "expression", "link": link}])
    torch.manual_seed(0)
    model = build_model(ModelConfig(settings=TINY, pool=pool, centre=4), tracks, cohort.info).eval()
    if pool == "attention":
        torch.nn.init.normal_(model.heads["new_expression"].attend.weight)  # type: ignore[union-attr,operator]
    rows = cohort.rows("train")[:12]
    with torch.no_grad():
        expected = naive(model, cohort, rows)
        np.testing.assert_allclose(model.predict(cohort.sample(rows)), expected, rtol=1e-5, atol=1e-6)
    for size in (1, 5):
        found = predict(model, cohort, rows, batch_size=size)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("link", ["identity", "softplus", "sigmoid"])
def test_undo_link(link: str) -> None:
    from seqgraft.models.base import apply_link

    values = torch.linspace(-6, 6, 25, dtype=torch.float64)[None, None]
    torch.testing.assert_close(undo_link(apply_link(values, link), link), values)


def test_attention_pooling_starts_as_the_mean_and_sees_no_padding() -> None:
    tracks = TrackTable.build([{"name": "a", "group": "a", "link": "identity"}])
    head = Head(tracks, 3, "attention")
    x = torch.randn(2, 3, 5)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    mean = torch.stack([x[0].mean(1), x[1, :, :3].mean(1)])
    out = torch.nn.functional.conv1d(mean[..., None], head.out.weight, head.out.bias)
    torch.testing.assert_close(head(State(x, valid=valid), None), out)  # type: ignore[arg-type]


def test_the_centre_is_the_middle_of_the_sequence(cohort: Dataset) -> None:
    wide = build_model(ModelConfig(settings=TINY), cohort.tracks, cohort.info).eval()
    narrow = build_model(ModelConfig(settings=TINY, centre=4), cohort.tracks, cohort.info).eval()
    narrow.load_state_dict(wide.state_dict())
    sample = cohort.sample(cohort.rows("train")[:2])
    bins = WINDOW // wide.trunk.spec.bin_size
    with torch.no_grad():
        whole, middle = (m.trunk(sample.codes, sample.lengths).x for m in (wide, narrow))
    torch.testing.assert_close(middle, whole[..., bins // 2 - 2 : bins // 2 + 2])
    with pytest.raises(Exception, match="cannot see the middle of 16 bins of 16 bp alone: 5"):
        build_model(ModelConfig(settings=TINY, centre=5), cohort.tracks, cohort.info)


@pytest.mark.parametrize("adapter", [LinearProbe(), LoRA(rank=2, where=("conv",), last=1)], ids=["probe", "lora"])
def test_frozen_work_is_done_once_per_distinct_haplotype(cohort: Dataset, adapter: Any) -> None:
    model = build_model(ModelConfig(settings=TINY, pool="attention", centre=4), cohort.tracks, cohort.info).eval()
    adapt(model, adapter)
    augment = Augmentation(reverse_complement=True)
    settings = CacheSettings("float32", 1.0, 2, "float32", augment)
    rows, valid = cohort.rows("train"), cohort.rows("valid")
    choice = choose(model, cohort, rows, valid, settings)
    cache = ActivationCache.open(model, cohort, choice, "float32", augment)
    for _ in range(2):
        for start in range(0, len(rows), 16):
            sample = cohort.sample(rows[start : start + 16])
            with torch.no_grad():
                torch.testing.assert_close(model(cache.attach(sample)), model(sample), rtol=1e-6, atol=1e-6)
    assert cache.filled == len(cohort.stored(rows)) < 2 * len(rows)


# ---- losses ----


def _batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y, s = (torch.randn(9, 1, 1, generator=generator) for _ in range(2))
    mask = torch.ones(9, 1, 1, dtype=torch.bool)
    return {"y_true": y, "y_pred": s, "mask": mask, "genes": torch.tensor([4, 4, 4, 4, 4, 1, 1, 1, 7])}


def test_pairs_are_disjoint_neighbours_of_one_gene() -> None:
    batch = _batch()
    y, s = batch["y_true"].flatten(), batch["y_pred"].flatten()
    pairs = [(0, 1), (2, 3), (5, 6)]
    total, weight = Pairs().of_genes(**batch)
    assert weight == 3
    torch.testing.assert_close(total, sum(((s[i] - s[j]) - (y[i] - y[j])) ** 2 for i, j in pairs))
    batch["mask"][3] = False
    assert Pairs().of_genes(**batch)[1] == 2


def test_pair_classification_is_thurstones() -> None:
    batch = _batch()
    y, s = batch["y_true"].flatten().numpy(), batch["y_pred"].flatten().numpy()
    total, weight = PairClassification(least=0.0).of_genes(**batch)
    p = [stats.norm.cdf((s[i] - s[j]) / np.sqrt(2)) for i, j in [(0, 1), (2, 3), (5, 6)]]
    more = [y[i] >= y[j] for i, j in [(0, 1), (2, 3), (5, 6)]]
    expected = -sum(np.log(a if b else 1 - a) for a, b in zip(p, more, strict=True))
    assert weight == 3
    assert float(total) == pytest.approx(expected, rel=1e-5)
    apart = sorted(abs(y[i] - y[j]) for i, j in [(0, 1), (2, 3), (5, 6)])
    assert PairClassification(least=float(np.mean(apart[:2]))).of_genes(**batch)[1] == 2


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_all_pairs_are_those_written_out(alpha: float) -> None:
    batch = _batch()
    error = (batch["y_pred"] - batch["y_true"]).flatten()
    expected = alpha * (error**2).sum()
    for members in ([0, 1, 2, 3, 4], [5, 6, 7]):
        each = torch.stack([(error[i] - error[j]) ** 2 for i, j in combinations(members, 2)])
        expected = expected + (1 - alpha) * len(members) * each.mean()
    total, weight = AllPairs(alpha).of_genes(**batch)
    assert weight == 9
    torch.testing.assert_close(total, expected)


def test_batches_are_blocks_of_one_gene(cohort: Dataset) -> None:
    assert cohort.donors is not None
    objective = OfGenes(cohort.tracks, {}, cohort.donors.gene, block=6)
    rows = cohort.rows("train")
    first, again, other = (objective.batches(rows, 12, seed, epoch) for seed, epoch in ((1, 0), (1, 0), (1, 1)))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert sorted(np.concatenate(first)) == sorted(rows)
    for batch in first:
        runs = np.flatnonzero(np.diff(cohort.donors.gene[batch])) + 1
        assert len(runs) <= 1
        assert max(map(len, np.split(batch, runs))) <= 12  # two blocks, of two genes or of one


def test_correlation_within_groups_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat([3, 1, 9, 4, 5], [10, 7, 8, 2, 6])
    x, y = rng.normal(size=(2, len(groups)))
    y[groups == 9] = 0.1  # constant: tells nothing
    x[0] = np.nan
    found = pearson_within(x, y, groups)
    ok = (groups == 3) & np.isfinite(x)
    assert found[1] == pytest.approx(stats.pearsonr(x[ok], y[ok])[0])
    assert found[0] == pytest.approx(stats.pearsonr(x[groups == 1], y[groups == 1])[0])
    assert found[2] == 0
    assert found[4] == 0  # two examples; constant


# ---- expression ----


def test_nothing_is_fitted_to_held_out_donors(files: dict[str, Path], tmp_path: Path) -> None:
    """Other expression of the donors for testing changes no training target, and no chosen gene."""
    settings = {"covariates": ("sex",), "genotype_components": 1, "components": 1}
    select = Selection(most=5)
    first = prepare_source(
        source_of(files, expression=Expression(files["e.tsv"], **settings), select=select), tmp_path / "a"
    )
    assert first.donors is not None
    held_out = first.donors.donors.loc[first.donors.donors["fold"] == "test", "donor"]
    table = pd.read_csv(files["e.tsv"], sep="\t", index_col=0)
    table[held_out] = np.random.default_rng(0).normal(9, 5, table[held_out].shape)
    table.to_csv(tmp_path / "other.tsv", sep="\t", na_rep="NA")
    changed = Expression(tmp_path / "other.tsv", **settings)
    second = prepare_source(source_of(files, expression=changed, select=select), tmp_path / "b")
    assert second.donors is not None
    assert first.donors.genes["gene"].tolist() == second.donors.genes["gene"].tolist()
    train = first.rows("train")
    np.testing.assert_allclose(first.raw_targets(train), second.raw_targets(train), atol=1e-6)
    paper = prepare_source(
        source_of(files, expression=replace(changed, paper_compatible=True), select=select), tmp_path / "c"
    )
    assert not np.allclose(paper.raw_targets(train), second.raw_targets(train), atol=1e-2)


def test_covariates_and_components_are_taken_out(files: dict[str, Path], tmp_path: Path) -> None:
    table = pd.read_csv(files["e.tsv"], sep="\t", index_col=0)
    sex = np.array([1.0 if i % 2 else 0.0 for i in range(DONORS)])
    hidden = np.random.default_rng(1).normal(size=DONORS)
    (table + 3 * sex).to_csv(tmp_path / "sex.tsv", sep="\t", na_rep="NA")
    (table + np.outer(np.linspace(20, 30, GENES) * np.tile([1, -1], GENES // 2), hidden)).to_csv(
        tmp_path / "hidden.tsv", sep="\t", na_rep="NA"
    )
    out = {}
    for name, settings in (("sex", {"covariates": ("sex",)}), ("hidden", {"components": 1})):
        expression = Expression(tmp_path / f"{name}.tsv", **settings)  # type: ignore[arg-type]
        dataset = prepare_source(source_of(files, expression=expression), tmp_path / name)
        assert dataset.donors is not None
        train = dataset.rows("train")
        values = dataset.raw_targets(train)[:, 0, 0]
        factor = (sex if name == "sex" else hidden)[dataset.donors.donor[train]]
        out[name] = np.abs(pearson_within(values, factor, dataset.donors.gene[train])).max()
    assert out["sex"] < 1e-5
    assert out["hidden"] < 0.3


def test_a_bed_of_phenotypes_needs_no_table_of_genes(files: dict[str, Path], tmp_path: Path) -> None:
    table = pd.read_csv(files["e.tsv"], sep="\t")
    genes = pd.read_csv(files["genes.tsv"], sep="\t")
    bed = pd.DataFrame({"#chr": genes["chrom"], "start": genes["tss"] - 1, "end": genes["tss"]}).join(table)
    bed.to_csv(tmp_path / "e.bed", sep="\t", index=False, na_rep="NA")
    source = source_of(files, expression=Expression(tmp_path / "e.bed", kind="bed"), genes=GeneTable())
    one, other = prepare_source(source, tmp_path / "bed"), prepare_source(source_of(files), tmp_path / "matrix")
    np.testing.assert_array_equal(one.raw_targets(range(len(one))), other.raw_targets(range(len(other))))
    assert one.donors is not None
    assert other.donors is not None
    assert one.donors.genes["tss"].tolist() == other.donors.genes["tss"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(d01="x"), "gene gene0, donor d01: this is not a number: 'x'"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "a gene is there twice: 'gene0'"),
        (lambda t: t.rename(index=lambda name: f"other{name}"), "no gene is in both tables"),
        (lambda t: t.rename(columns=lambda name: f"x{name}"), "no donor is in both tables"),
    ],
)
def test_bad_expression(files: dict[str, Path], tmp_path: Path, change: Any, message: str) -> None:
    table = change(pd.read_csv(files["e.tsv"], sep="\t", index_col=0))
    table.rename_axis("gene").to_csv(tmp_path / "bad.tsv", sep="\t", na_rep="NA")
    with pytest.raises(DataError, match=message):
        prepare_source(source_of(files, expression=Expression(tmp_path / "bad.tsv")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_genes_beyond_their_contig_and_counts_without_a_logarithm(files: dict[str, Path], tmp_path: Path) -> None:
    genes = pd.read_csv(files["genes.tsv"], sep="\t")
    genes.loc[2, "tss"] = LENGTH + 1
    genes.to_csv(tmp_path / "genes.tsv", sep="\t", index=False)
    with pytest.raises(DataError, match=f"1 genes start beyond their contig, such as gene2 at: 'c1:{LENGTH + 1}'"):
        prepare_source(source_of(files, genes=GeneTable(tmp_path / "genes.tsv")), tmp_path / "out")
    with pytest.raises(DataError, match="the value has no logarithm"):
        prepare_source(source_of(files, expression=Expression(files["e.tsv"], log=-100.0)), tmp_path / "out")


def test_no_gene_left(files: dict[str, Path], tmp_path: Path) -> None:
    table = pd.read_csv(files["e.tsv"], sep="\t", index_col=0)
    (table * 0).to_csv(tmp_path / "zero.tsv", sep="\t")
    with pytest.raises(DataError, match="no gene is left: all are zero, constant or unknown"):
        prepare_source(source_of(files, expression=Expression(tmp_path / "zero.tsv")), tmp_path / "out")


# ---- a run ----


def test_a_run_learns_and_is_scored_beside_linear_models(cohort: Dataset, tmp_path: Path) -> None:
    experiment = Experiment(
        data=cohort.folder,
        model=ModelConfig(settings=TINY, init="random", centre=12),
        adapter=LinearProbe(),
        train=TrainConfig(epochs=2, batch_size=8, cache="float32", augment=Augmentation(reverse_complement=False)),
        evaluate=EvaluateConfig(draws=50),
    )
    fit_run(experiment, tmp_path / "run")
    found = evaluate_run(tmp_path / "run")
    metrics = found.metrics.set_index(["model", "fold", "metric"])
    ridge = metrics.loc["ridge on dosage (BLUP)", "test", "pearson_within_genes"]
    assert ridge["value"] > 0.8
    assert ridge["low"] < ridge["value"] < ridge["high"]
    assert set(found.differences["fold"]) == {"test", "unseen_genes", "unseen_both"}
    assert found.genes is not None
    test = found.genes[(found.genes["fold"] == "test") & (found.genes["model"] == "linear probe on random weights")]
    own = metrics.loc["linear probe on random weights", "test", "pearson_within_genes"]["value"]
    assert own == pytest.approx(test["pearson_within_genes"].mean())
    page = write_report(tmp_path / "run").read_text()
    assert "Gene by gene" in page
    assert "on genes of training in held-out donors" in page
    assert not re.search(r"\bd\d\d\b", page + found.genes.to_csv())  # donors are not named


def test_losses_of_pairs_need_donors(cohort: Dataset, tmp_path: Path) -> None:
    from builders import tiny_labels
    from seqgraft.run import objective_of

    labels = tiny_labels(tmp_path / "labels")
    experiment = Experiment(data=labels.folder, loss=AllPairs())
    with pytest.raises(ConfigError, match="the loss compares donors, and the data have none"):
        objective_of(experiment, labels)
