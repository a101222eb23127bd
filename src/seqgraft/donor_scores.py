"""Scores of expression in donors: within each gene, across the donors who were held out; beside linear models.

A gene's score is the correlation, across donors, of prediction and expression; a fold's is its mean over genes. A model
that gives all donors of a gene one value tells nothing about them: its correlation is 0 there, not left out. Intervals
are 95 % bootstrap intervals over genes, neighbours within 50 kb or two windows drawn together, because genes that share
variants share their scores.

Strata of donors are scored alike, where 10 donors of a gene are in them: ``pearson_unseen_alleles`` of those who carry
an allele in the window that no training donor has, ``pearson_rare_alleles`` of those of the others who carry one that
is rarer than 5 % among training donors, ``pearson_common_alleles`` of the rest; and ``pearson_population_NAME``. What a
data set cannot tell stands there with the reason. ``unseen_alleles`` is the share of the variants in the window of
which the fold's donors have an allele that no training donor has.

Where the data have the track "mean", ``pearson_across_genes`` is the correlation, across genes, of their standardised
means with predictions of these, averaged over the fold's donors; of the trunk's own track, of the logarithm.

``linearity`` and ``linearity_fitted`` say what share of the run's own predictions is linear in dosage
(``seqgraft.linearity``).

Linear models on dosage (``seqgraft.dosage``) are fitted to the training donors of every gene, genes for testing
included: on these, networks that have never seen the gene stand beside models that were fitted to it, as the note says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from seqgraft.data.dataset import Dataset
from seqgraft.data.donors import MEAN
from seqgraft.dosage import fit_gene
from seqgraft.errors import ConfigError
from seqgraft.evaluate import EvaluateConfig, Evaluation, forgetting
from seqgraft.intervals import Estimate, bootstrap_of_means, segment_blocks
from seqgraft.linearity import fold_linearity, values_of
from seqgraft.metrics import pearson_within
from seqgraft.models.base import SequenceModel
from seqgraft.models.weights import ModelConfig, build_pretrained
from seqgraft.predict import predict
from seqgraft.progress import progress
from seqgraft.tracks import unsquash

__all__ = ["DONOR_FOLDS", "evaluate_donors"]

Floats = npt.NDArray[np.float64]
#: Folds of donors and genes, as a report lists them.
DONOR_FOLDS = ("test", "unseen_genes", "unseen_both")
_FEWEST_CARRIERS = 3  # donors of a haplotype, for its effect
_METRICS = ("pearson_within_genes", "spearman_within_genes", "r2_within_genes")
_IN_SAMPLE = "fitted to these donors"
_FITTED = "fitted to other donors of these genes, which the network has never seen"
_UNTUNED = "pretrained track"
_RARE = 0.05  # frequency among training donors
_FEWEST_DONORS = 10  # of a stratum, for a gene's correlation
_DONORS = "these donors"  # the model's name for what is true whatever the model


def evaluate_donors(
    model: SequenceModel,
    dataset: Dataset,
    config: EvaluateConfig,
    label: str,
    start: ModelConfig,
    *,
    extra: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Evaluation:
    """Scores a model, the trunk's own tracks and linear models on all held-out folds of donors and genes.

    Metrics, within genes: Pearson, Spearman, and R2 (1 - squared error / variance, of z-scores). ``haplotype_effect``
    is across genes: of the two haplotypes that most donors of the fold carry, the difference of mean expression and
    that of predictions, correlated; where a gene has few haplotypes, as in a cross, that is what there is to predict.

    Args:
        label: the model's name in the tables.
        start: the model it was adapted from; its own tracks serve as a baseline.
        extra: further predictions to score by name, ``(rows of the dataset,)``.

    Returns:
        ``genes`` has a row per model, fold and gene; ``differences`` the run minus each baseline over the same genes,
        with the p-value of Wilcoxon's signed rank test.

    Raises:
        ConfigError: there are no held-out donors or genes.
    """
    folds = [fold for fold in DONOR_FOLDS if (dataset.regions["fold"] == fold).any()]
    if not folds:
        what, remedy = "the dataset holds out neither donors nor genes", "Prepare it with shares or names for testing"
        raise ConfigError(what, where=dataset.folder, remedy=remedy)
    rows = np.concatenate([dataset.rows(fold) for fold in ("train", *folds)])
    rows.sort()  # gene by gene, so that donors of a batch share haplotypes
    known = np.full(len(dataset), np.nan)
    own = predict(model, dataset, rows, ensemble=config.ensemble, batch_size=config.batch_size, what="predict donors")
    known[rows] = own[:, 0, 0]
    predictions: dict[str, Floats] = {label: known}
    untuned = _untuned(dataset, rows, start, config, model)
    if untuned is not None:
        predictions[_UNTUNED] = untuned
    levels = {} if MEAN not in dataset.tracks.names else _levels(dataset, rows, own, label, untuned)
    linear, h2 = _linear(dataset)
    predictions |= linear
    predictions |= {name: np.asarray(values, np.float64) for name, values in (extra or {}).items()}
    genes = pd.concat([_of_fold(dataset, fold, predictions) for fold in folds], ignore_index=True)
    genes["heritability"] = h2[genes["gene"].to_numpy()]
    tables, differences = [], []
    for fold in folds:
        here = genes[genes["fold"] == fold]
        for name in predictions:
            tables.append(_summary(dataset, here[here["model"] == name], name, fold, config, list(linear)))
        tables.append(_ceiling(dataset, here[here["model"] == label], fold, config))
        tables.append(_strata(dataset, fold, predictions, config))
        tables.append(pd.DataFrame([_across(dataset, name, values, fold, config) for name, values in levels.items()]))
        if config.linearity:
            tables.append(_linearity(dataset, model, fold, label, config))
        differences += [_difference(dataset, here, label, name, fold, config) for name in predictions if name != label]
    if config.original is not None:
        tables += forgetting(model, dataset, config, start, label, config.fold)
    genes["name"] = dataset.donors.genes["gene"].to_numpy(str)[genes["gene"]] if dataset.donors else ""
    return Evaluation(
        metrics=pd.concat(tables, ignore_index=True),
        differences=pd.concat(differences, ignore_index=True) if differences else pd.DataFrame(),
        genes=genes,
        moments={},
        examples={},
    )


def _linear(dataset: Dataset) -> tuple[dict[str, Floats], Floats]:
    """Predictions of every row by linear models of its gene's training donors, and the heritability of every gene."""
    donors = dataset.donors
    assert donors is not None
    truth = dataset.raw_targets(np.arange(len(dataset)))[:, 0, 0].astype(np.float64)
    training = np.flatnonzero(donors.donors["fold"] == "train")
    found: dict[str, Floats] = {}
    h2 = np.full(len(donors.genes), np.nan)
    order = np.argsort(donors.gene, kind="stable")
    bounds = np.searchsorted(donors.gene[order], np.arange(len(donors.genes) + 1))
    for gene in progress(range(len(donors.genes)), "linear models", total=len(donors.genes)):
        here = order[bounds[gene] : bounds[gene + 1]]
        expression = np.full(len(donors.donors), np.nan)
        expression[donors.donor[here]] = truth[here]
        dosage = donors.dosage(gene)[0].astype(np.float64)
        models, share = fit_gene(dosage, expression, training, ploidy=donors.ploidy)
        for name, model in models.items():
            found.setdefault(name, np.full(len(dataset), np.nan))[here] = model.predictions[donors.donor[here]]
        h2[gene] = share.value
    return found, h2


def _untuned(
    dataset: Dataset, rows: npt.NDArray[np.int64], start: ModelConfig, config: EvaluateConfig, model: SequenceModel
) -> Floats | None:
    """The one of the trunk's own tracks that serves training donors best, summed over the bins that heads see.

    Raw units, mean over haplotypes; of a strand pair, the gene's own strand is one track and the other strand another.
    None for a trunk without tracks of its own.
    """
    reference = build_pretrained(start, dataset.info, of_labels=True)
    if reference is None:
        return None
    reference.to(next(model.parameters()).device)
    donors = dataset.donors
    assert donors is not None
    values = predict(reference, dataset, rows, batch_size=config.batch_size, what="pretrained tracks")
    bin_size = reference.trunk.spec.bin_size
    raw = unsquash(values.astype(np.float64), reference.tracks, bin_size).sum(-1)
    minus = (dataset.regions["strand"] == "-").to_numpy()[rows]
    raw[minus] = raw[minus][:, reference.tracks.permutation]
    train = np.flatnonzero((dataset.regions["fold"] == "train").to_numpy()[rows])
    truth = dataset.raw_targets(rows[train])[:, 0, 0]
    scores = [pearson_within(truth, column[train], donors.gene[rows[train]]).mean() for column in raw.T]
    out = np.full(len(dataset), np.nan)
    out[rows] = raw[:, int(np.argmax(scores))]
    return out


def _of_fold(dataset: Dataset, fold: str, predictions: Mapping[str, Floats]) -> pd.DataFrame:
    """A row per model and gene of a fold: its scores, and the effect of the haplotypes that most donors carry."""
    donors = dataset.donors
    assert donors is not None
    rows = dataset.rows(fold)
    gene = donors.gene[rows]
    truth = dataset.raw_targets(rows)[:, 0, 0].astype(np.float64)
    numbers, count = np.unique(gene, return_counts=True)
    carried = donors.haplotypes[gene, donors.donor[rows]]
    tables = []
    for name, values in predictions.items():
        predicted = values[rows]
        ranks = [pd.Series(v).groupby(gene).rank().to_numpy(np.float64) for v in (truth, predicted)]
        r2 = np.full(len(numbers), np.nan) if name == _UNTUNED else _r2_within(truth, predicted, gene)  # another unit
        effects = [_effect(carried[gene == g], truth[gene == g], predicted[gene == g]) for g in numbers]
        table = pd.DataFrame(
            {
                "model": name,
                "fold": fold,
                "gene": numbers,
                "donors": count,
                "pearson_within_genes": pearson_within(truth, predicted, gene),
                "spearman_within_genes": pearson_within(ranks[0], ranks[1], gene),
                "r2_within_genes": r2,
                "effect": [observed for observed, _ in effects],
                "predicted_effect": [expected for _, expected in effects],
            }
        )
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _r2_within(truth: Floats, predicted: Floats, gene: npt.NDArray[np.int64]) -> Floats:
    """1 - squared error / squared deviations from the gene's own mean in the fold."""
    _, group = np.unique(gene, return_inverse=True)
    count = np.bincount(group)
    mean = np.bincount(group, truth) / count
    error = np.bincount(group, (truth - predicted) ** 2)
    return 1 - error / np.maximum(np.bincount(group, (truth - mean[group]) ** 2), 1e-12)


def _effect(carried: npt.NDArray[np.integer], truth: Floats, predicted: Floats) -> tuple[float, float]:
    """Mean of those who carry the one, minus of those who carry the other of the two most frequent haplotypes."""
    there = carried[carried >= 0]
    names, count = np.unique(there, return_counts=True)
    if len(names) < 2:
        return np.nan, np.nan
    one, other = np.sort(names[np.argsort(-count, kind="stable")[:2]])
    dosage = (carried == one).sum(1) - (carried == other).sum(1)
    low, high = dosage < 0, dosage > 0
    if min(low.sum(), high.sum()) < _FEWEST_CARRIERS:
        return np.nan, np.nan
    return float(truth[high].mean() - truth[low].mean()), float(predicted[high].mean() - predicted[low].mean())


# ---- tables ----


def _blocks(dataset: Dataset, genes: npt.NDArray[np.int64], config: EvaluateConfig) -> npt.NDArray[np.int64]:
    assert dataset.donors is not None
    table, half = dataset.donors.genes.iloc[genes], dataset.info.window // 2
    starts = table["tss"].to_numpy(np.int64) - half
    return segment_blocks(table["chrom"].tolist(), starts, starts + dataset.info.window, config.block)


def _summary(
    dataset: Dataset, genes: pd.DataFrame, name: str, fold: str, config: EvaluateConfig, linear: list[str]
) -> pd.DataFrame:
    """Means over genes with intervals, and the correlation of haplotype effects across genes."""
    blocks = _blocks(dataset, genes["gene"].to_numpy(), config)
    note = ""
    if name in linear:
        note = {"unseen_genes": _IN_SAMPLE, "unseen_both": _FITTED}.get(fold, "")
    metrics = [metric for metric in _METRICS if metric != "r2_within_genes" or name != _UNTUNED]
    found = bootstrap_of_means(genes[metrics].to_numpy(np.float64), blocks, draws=config.draws)
    rows = [
        _row(name, fold, metric, (found.value[i], found.low[i], found.high[i]), len(genes), note)
        for i, metric in enumerate(metrics)
    ]
    rows.append(_effects(genes, blocks, name, fold, note, config))
    return pd.DataFrame(rows)


def _effects(
    genes: pd.DataFrame, blocks: npt.NDArray[np.int64], name: str, fold: str, note: str, config: EvaluateConfig
) -> dict[str, Any]:
    known = genes["effect"].notna().to_numpy()
    x, y = (genes[column].to_numpy(np.float64)[known] for column in ("effect", "predicted_effect"))
    if known.sum() < 3 or y.std() == 0:
        reason = "fewer than three genes have two haplotypes with enough donors" if known.sum() < 3 else "constant"
        return _row(name, fold, "haplotype_effect", (np.nan, np.nan, np.nan), int(known.sum()), reason)
    return _row(name, fold, "haplotype_effect", _correlated(x, y, blocks[known], config), int(known.sum()), note)


def _levels(
    dataset: Dataset, rows: npt.NDArray[np.int64], own: npt.NDArray[np.floating], label: str, untuned: Floats | None
) -> dict[str, Floats]:
    """Predictions ``(rows of the dataset,)`` of the track of means, by model; ``own`` are those of ``rows``."""
    values = np.full(len(dataset), np.nan)
    values[rows] = own[:, dataset.tracks.names.index(MEAN), 0]
    return {label: values} | ({} if untuned is None else {_UNTUNED: np.log1p(np.maximum(untuned, 0))})


def _across(dataset: Dataset, name: str, values: Floats, fold: str, config: EvaluateConfig) -> dict[str, Any]:
    """How well the means of a fold's genes are predicted, across genes."""
    rows, metric = dataset.rows(fold), "pearson_across_genes"
    assert dataset.donors is not None
    genes, group = np.unique(dataset.donors.gene[rows], return_inverse=True)
    truth = dataset.raw_targets(rows)[:, dataset.tracks.names.index(MEAN), 0]
    x, y = (np.bincount(group, each) / np.bincount(group) for each in (truth, values[rows]))
    if len(genes) < 3 or y.std() == 0 or x.std() == 0:
        reason = "fewer than three genes" if len(genes) < 3 else "constant"
        return _row(name, fold, metric, (np.nan, np.nan, np.nan), len(genes), reason, MEAN)
    note = "genes that were trained on" if fold == "test" else ""
    bounds = _correlated(x, y, _blocks(dataset, genes, config), config)
    return _row(name, fold, metric, bounds, len(genes), note, MEAN)


def _correlated(
    x: Floats, y: Floats, blocks: npt.NDArray[np.int64], config: EvaluateConfig
) -> tuple[float, float, float]:
    """Pearson across genes, and its interval."""
    products = np.column_stack([x, y, x * x, y * y, x * y])

    def correlation(means: Floats) -> Floats:
        a, b, aa, bb, ab = np.moveaxis(means, -1, 0)
        scale = np.maximum((aa - a * a) * (bb - b * b), 1e-30)
        return np.asarray((ab - a * b) / np.sqrt(scale))[..., None]

    found = bootstrap_of_means(products, blocks, draws=config.draws, of=correlation)
    return float(found.value[0]), float(found.low[0]), float(found.high[0])


def _ceiling(dataset: Dataset, genes: pd.DataFrame, fold: str, config: EvaluateConfig) -> pd.DataFrame:
    """The square root of heritability: what the best linear model of this window's variants could reach."""
    root = np.sqrt(genes["heritability"].to_numpy(np.float64))[:, None]
    found = bootstrap_of_means(root, _blocks(dataset, genes["gene"].to_numpy(), config), draws=config.draws)
    note = "square root of the heritability of training donors (REML)"
    bounds = (found.value[0], found.low[0], found.high[0])
    return pd.DataFrame([_row("ceiling of linear models", fold, "pearson_within_genes", bounds, len(genes), note)])


def _linearity(dataset: Dataset, model: SequenceModel, fold: str, label: str, config: EvaluateConfig) -> pd.DataFrame:
    """Means over genes of the shares of the model's variance across donors that are linear in dosage."""
    genes = fold_linearity(dataset, fold, values_of(model, config.batch_size), config.linearity)
    why = {
        "linearity": "the model's predictions do not differ",
        "linearity_fitted": "no gene has enough haplotypes for a regression",
    }
    return pd.DataFrame(
        [_mean(dataset, genes["gene"], genes[metric], label, fold, metric, config, why[metric]) for metric in why]
    )


# ---- strata ----


def _strata(dataset: Dataset, fold: str, predictions: Mapping[str, Floats], config: EvaluateConfig) -> pd.DataFrame:
    """Correlations within genes among donors of one kind; a stratum that the data do not have is one row with why."""
    donors, rows = dataset.donors, dataset.rows(fold)
    assert donors is not None
    alleles, unseen = _alleles(dataset, rows)
    common = "all alleles are common among training donors" if not set(alleles) & {"rare", "unseen"} else ""
    seen = "training donors have all alleles" if "unseen" not in alleles else ""
    strata = {
        f"pearson_{kind}_alleles": (alleles == kind, why)
        for kind, why in (("unseen", seen), ("rare", common), ("common", common))
    }
    table = donors.donors
    names = table["population"].to_numpy(str) if "population" in table else np.full(len(table), "")
    known = np.unique(names)
    for name in known if len(known) > 1 else ():
        strata[f"pearson_population_{name}"] = (names[donors.donor[rows]] == name, "")
    if len(known) == 1:
        why = "there is one population" if known[0] else "the table of donors has no column population"
        strata["pearson_population"] = (np.zeros(len(rows), dtype=np.bool_), why)
    found = []
    for metric, (among, why) in strata.items():
        chosen = rows[among]
        numbers, count = np.unique(donors.gene[chosen], return_counts=True)
        chosen = chosen[np.isin(donors.gene[chosen], numbers[count >= _FEWEST_DONORS])]
        if why or not len(chosen):
            reason = f"cannot be tested on this set: {why or f'no gene has {_FEWEST_DONORS} such donors'}"
            found.append(_row(_DONORS, fold, metric, (np.nan, np.nan, np.nan), 0, reason))
            continue
        truth, gene = dataset.raw_targets(chosen)[:, 0, 0], donors.gene[chosen]
        for model, values in predictions.items():
            scores = pd.Series(pearson_within(truth, values[chosen], gene))
            found.append(_mean(dataset, pd.Series(np.unique(gene)), scores, model, fold, metric, config))
    found.append(_mean(dataset, unseen["gene"], unseen["unseen"], _DONORS, fold, "unseen_alleles", config))
    return pd.DataFrame(found)


def _alleles(dataset: Dataset, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.str_], pd.DataFrame]:
    """Whether the rarest allele that each row's donor carries is unseen, rare or common among training donors.

    And per gene the share of variants of which these donors have an allele, REF or ALT, that is unseen.
    """
    donors = dataset.donors
    assert donors is not None
    training = np.flatnonzero(donors.donors["fold"] == "train")
    kinds, shares = np.full(len(rows), "common", dtype="U6"), []
    for gene in np.unique(donors.gene[rows]):
        at = np.flatnonzero(donors.gene[rows] == gene)
        dosage = donors.dosage(int(gene))[0].astype(np.int64)
        ploidy = donors.ploidy_of(int(gene))
        frequency = dosage[training].sum(0) / ploidy[training].sum()
        here = donors.donor[rows[at]]
        carried = np.stack([dosage[here] > 0, dosage[here] < ploidy[here, None]])
        each = np.where(carried, np.stack([frequency, 1 - frequency])[:, None], 1.0)
        rarest = each.min((0, 2), initial=1.0)
        kinds[at] = np.where(rarest <= 0, "unseen", np.where(rarest < _RARE, "rare", "common"))
        shares.append({"gene": gene, "unseen": (each.min((0, 1)) <= 0).mean() if len(frequency) else np.nan})
    return kinds, pd.DataFrame(shares)


def _mean(
    dataset: Dataset,
    genes: pd.Series[int],
    values: pd.Series[float],
    model: str,
    fold: str,
    metric: str,
    config: EvaluateConfig,
    why: str = "no gene has a value",
) -> dict[str, Any]:
    """A row with the mean over genes that have a value, and its interval."""
    known = values.notna().to_numpy()
    if not known.any():
        return _row(model, fold, metric, (np.nan, np.nan, np.nan), 0, f"cannot be tested on this set: {why}")
    blocks = _blocks(dataset, np.asarray(genes, dtype=np.int64)[known], config)
    found = bootstrap_of_means(values.to_numpy(np.float64)[known][:, None], blocks, draws=config.draws)
    left = f"{int((~known).sum())} genes without a value left out" if not known.all() else ""
    return _row(model, fold, metric, (found.value[0], found.low[0], found.high[0]), int(known.sum()), left)


def _difference(
    dataset: Dataset, genes: pd.DataFrame, label: str, name: str, fold: str, config: EvaluateConfig
) -> pd.DataFrame:
    metric = "pearson_within_genes"
    ours, theirs = (genes[genes["model"] == model].set_index("gene")[metric] for model in (label, name))
    apart = (ours - theirs).to_numpy(np.float64)
    blocks = _blocks(dataset, ours.index.to_numpy(), config)
    found: Estimate = bootstrap_of_means(apart[:, None], blocks, draws=config.draws)
    differ = bool((apart != 0).any())
    return pd.DataFrame(
        {
            "baseline": [name],
            "fold": fold,
            "group": "expression",
            "track": "",
            "metric": metric,
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "unit": "label",
            "better": int((apart > 0).sum()),
            "n": len(apart),
            "p": float(stats.wilcoxon(apart).pvalue) if differ else 1.0,
        }
    )


def _row(
    model: str,
    fold: str,
    metric: str,
    bounds: tuple[float, float, float],
    n: int,
    note: str,
    group: str = "expression",
) -> dict[str, Any]:
    value, low, high = bounds
    return {
        "model": model,
        "fold": fold,
        "group": group,
        "track": "",
        "metric": metric,
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "unit": "label",
        "note": note,
    }
