"""The panel of expression in donors: gene by gene beside the best linear model, and the effects of haplotypes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from seqgraft.plots import paired_scatter, short_name, svg
from seqgraft.report.page import Cell, Chart, RunFiles, Section, Table
from seqgraft.report.scores import Key, number, words

__all__ = ["donors_section", "is_of_donors", "is_of_genes"]

_SCORE = "pearson_within_genes"
_DONORS = "these donors"  # the model's name in tables for what is true whatever the model
_SHORT = {
    "test": "seen genes, unseen donors",
    "unseen_genes": "unseen genes, seen donors",
    "unseen_both": "both unseen",
}


#: Measures of strata of donors and of linearity, which stand in a table of their own.
_STRATA = {
    "pearson_unseen_alleles": "Pearson, donors with alleles that no training donor has",
    "pearson_rare_alleles": "Pearson, other donors with rare alleles",
    "pearson_common_alleles": "Pearson, donors with common alleles alone",
    "unseen_alleles": "share of variants with alleles that no training donor has",
    "linearity": "share of the predictions that is linear in dosage (sums of single effects)",
    "linearity_fitted": "the same, by regression on held-out haplotypes",
}


def is_of_donors(key: Key) -> bool:
    """Is it about strata of donors, or about how linear predictions are?"""
    return key.metric in _STRATA or key.metric.startswith("pearson_population")


def is_of_genes(key: Key) -> bool:
    """Is it a mean over genes?"""
    return key.metric.endswith("_within_genes") or key.metric == "haplotype_effect"


def donors_section(run: RunFiles) -> Section:
    """Figures and tables from ``genes`` and ``differences`` of an evaluation of donors."""
    genes = run.genes
    assert genes is not None
    blocks: list[Chart | Table] = []
    folds = [fold for fold in _SHORT if (genes["fold"] == fold).any()]
    rival = _rival(genes, run.label)
    if rival is not None:
        pairs = {_SHORT[fold]: _beside(genes[genes["fold"] == fold], run.label, rival) for fold in folds}
        ahead = {fold: int((points[:, 1] > points[:, 0]).sum()) for fold, points in pairs.items()}
        first = next(iter(pairs))
        title = f"{run.label} is ahead of {rival} in {ahead[first]} of {len(pairs[first])} genes ({first})"
        figure = paired_scatter(
            pairs, title=title, xlabel=f"r of {rival}", ylabel=f"r of {short_name(run.label, 22)}", diagonal=True
        )
        caption = (
            "A dot is a gene: correlation of prediction and expression across donors. 0 where all donors get one value."
        )
        blocks.append(Chart(svg(figure, "donors0", title), caption, wide=True))
    own = genes[genes["model"] == run.label]
    effects = {
        _SHORT[fold]: found
        for fold in folds
        if len(found := own.loc[own["fold"] == fold, ["effect", "predicted_effect"]].dropna().to_numpy()) > 2
    }
    if effects:
        title = "Effects of haplotypes: " + "; ".join(
            f"r = {np.corrcoef(points.T)[0, 1]:.2f} ({name})"
            for name, points in effects.items()
            if np.ptp(points[:, 1]) > 0
        )
        figure = paired_scatter(
            effects, title=title, xlabel="observed effect", ylabel="predicted effect", diagonal=False
        )
        caption = (
            "A dot is a gene: difference, in standard deviations, between the donors who carry the one and those who "
            "carry the other of the two most frequent haplotypes of its window."
        )
        blocks.append(Chart(svg(figure, "donors1", title), caption, wide=True))
    if run.differences is not None and not run.differences.empty:
        blocks.append(_differences(run.differences, run.label))
    strata = _strata(run, folds)
    blocks += [] if strata is None else [strata]
    return Section("Gene by gene", tuple(blocks))


def _strata(run: RunFiles, folds: list[str]) -> Table | None:
    """Scores of strata of donors, and linearity; where a data set cannot tell, why."""
    frame = run.scores.frame if run.scores is not None else pd.DataFrame({"metric": []})
    own = frame[frame["metric"].map(lambda name: name in _STRATA or str(name).startswith("pearson_population"))]
    own = own[own["model"].isin([run.label, _DONORS])]
    if own.empty:
        return None
    found = {(row["metric"], row["fold"]): row for row in own.to_dict("records")}
    rows = tuple(
        (Cell(_stratum(metric)), *(_or_reason(found.get((metric, fold))) for fold in folds))
        for metric in dict.fromkeys(own["metric"])
    )
    caption = "Which donors are predicted, and is the model more than a sum of single variants? Means over genes."
    return Table(caption, ("measure", *(_SHORT[fold] for fold in folds)), rows)


def _stratum(metric: str) -> str:
    population = metric.removeprefix("pearson_population_")
    return _STRATA.get(metric) or f"Pearson, donors of the population {words(population)}"


def _or_reason(row: Mapping[Hashable, Any] | None) -> Cell:
    if row is None:
        return Cell.of(None)
    if row["value"] != row["value"]:
        return Cell(str(row["note"]).removeprefix("cannot be tested on this set: ") or "–")
    interval = f" ({row['low']:z.3f} to {row['high']:z.3f})" if row["low"] == row["low"] else ""
    return Cell(f"{row['value']:z.3f}{interval}", row["value"])


def _rival(genes: pd.DataFrame, label: str) -> str | None:
    """The other model with the best mean over the genes of training."""
    others = genes[(genes["model"] != label) & (genes["fold"] == genes["fold"].iloc[0])]
    means = others.groupby("model")[_SCORE].mean()
    return str(means.idxmax()) if len(means) else None


def _beside(genes: pd.DataFrame, label: str, rival: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """``(genes, 2)``: score of the rival and of the run."""
    table = genes.pivot(index="gene", columns="model", values=_SCORE)
    return table[[rival, label]].to_numpy(np.float64)


def _differences(frame: pd.DataFrame, label: str) -> Table:
    rows = []
    for row in frame.to_dict("records"):
        interval = f"{row['value']:z.3f}"
        if row["low"] == row["low"]:  # one block of genes has none
            interval += f" ({row['low']:z.3f} to {row['high']:z.3f})"
        cells = [Cell(str(row["baseline"])), Cell(_SHORT.get(str(row["fold"]), str(row["fold"])))]
        cells += [Cell(interval, row["value"]), Cell(f"{row['better']} of {row['n']}", row["better"])]
        rows.append((*cells, Cell(number(row["p"]), row["p"])))
    caption = (
        f"{label} minus each baseline: mean difference of r over genes with its 95 % interval, genes where it is "
        "ahead, and the p-value of Wilcoxon's signed rank test over genes. On unseen genes linear models were fitted "
        "to other donors of these very genes, or to the same donors."
    )
    return Table(caption, ("baseline", "genes and donors", "difference", "ahead in", "p"), tuple(rows))
