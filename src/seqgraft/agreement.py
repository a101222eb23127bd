"""Effects that a run of donors predicts, beside effects that were measured: reporter assays, fine-mapped variants.

Linear models on dosage stand beside the network: their weights are what they say about the same variants. All are
effects of a haplotype with the alternate allele instead of the reference one, in the unit of expression.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.dataset import Dataset
from seqgraft.data.expression import read_text_table
from seqgraft.dosage import dosage_baselines
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.intervals import Estimate, bootstrap_interval, bootstrap_of_means, paired_bootstrap, segment_blocks
from seqgraft.ism import Effects
from seqgraft.metrics import Moments, Values
from seqgraft.progress import progress

__all__ = ["Agreement", "Measured", "agreement", "read_measured"]

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

#: The network's name in tables.
NETWORK = "network"
_FEWEST = 10  # pairs, for a score
_YES, _NO = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"})


@dataclass(frozen=True)
class Measured:
    """A table of measured effects of variants, and its columns.

    Attributes:
        file: tab- or comma-separated, with a header.
        chrom, position, ref, alt: of the variant, as in a VCF (1-based).
        effect: of the alternate allele; None if it only says which variants matter.
        gene: whose expression was measured; None: each variant is compared on the gene that starts nearest.
        significant: which variants matter: true or false, or with ``below`` or ``above`` a number.
        below: they matter if the number is less, as p-values.
        above: they matter if the number is more, as posterior probabilities.
    """

    file: Path
    chrom: str = "chrom"
    position: str = "position"
    ref: str = "ref"
    alt: str = "alt"
    effect: str | None = "effect"
    gene: str | None = None
    significant: str | None = None
    below: float | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        problems = Problems(ConfigError)
        if self.effect is None and self.significant is None:
            remedy = "Name a column under effect, significant or both"
            problems.add("there is nothing to compare with", where="measured", remedy=remedy)
        bounds = [name for name in ("below", "above") if getattr(self, name) is not None]
        if len(bounds) > 1 or (bounds and self.significant is None):
            remedy = "Give one of them, with significant: COLUMN"
            problems.add("variants matter by one bound of one column", bounds, where="measured", remedy=remedy)
        problems.raise_if_any()


@dataclass(frozen=True)
class Agreement:
    """What was found.

    Attributes:
        table: model, fold (of the genes: "all", "train", "test"), variants ("all", "significant"), metric, value, low,
            high, n (pairs of variant and gene), genes (how many), and minus, minus_low, minus_high: the network's score
            less this one's.
        pairs: a row per measured variant and gene: gene, chrom, position, ref, alt, measured, significant, swapped, and
            a column per model with what it predicts.
        counts: what became of the measured variants.
    """

    table: pd.DataFrame
    pairs: pd.DataFrame
    counts: Mapping[str, int]


def read_measured(settings: Measured, rename: Mapping[str, str] | None = None) -> pd.DataFrame:
    """chrom, position, ref, alt, and where they are known measured, significant, gene.

    Args:
        rename: names of chromosomes in the table -> those of the genome.

    Raises:
        DataError: no such file or column, or cells that are no numbers; all at once.
    """
    table = read_text_table(settings.file, "table of measured effects")
    named = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("file", "below", "above")}
    wanted = {name: column for name, column in named.items() if column is not None}
    if lacking := [column for column in wanted.values() if column not in table]:
        remedy = f"It has {', '.join(table.columns)}: name them under measured"
        raise DataError("the table of measured effects lacks columns", lacking, where=settings.file, remedy=remedy)
    problems = Problems(DataError)
    found = pd.DataFrame({name: table[column] for name, column in wanted.items()})
    found["chrom"] = found["chrom"].map(lambda name: (rename or {}).get(name, name))
    for name in ("ref", "alt"):
        found[name] = found[name].str.upper()
    found["position"] = _numbers(found["position"], settings, "position", problems)
    if settings.effect is not None:
        found["measured"] = _numbers(found.pop("effect"), settings, "effect", problems)
    if settings.significant is not None:
        found["significant"] = _significant(found["significant"], settings, problems)
    problems.raise_if_any()
    kept = found["position"].notna()
    if settings.effect is not None:
        kept &= found["measured"].notna()
    return found[kept].astype({"position": np.int64}).reset_index(drop=True)


def _numbers(text: pd.Series[str], settings: Measured, name: str, problems: Problems) -> pd.Series[float]:
    """NaN for empty cells and NA."""
    numbers = pd.to_numeric(text, errors="coerce")
    bad = numbers.isna() & ~text.isin(["", "NA", "NaN", "nan"])
    for row in np.flatnonzero(bad)[:5]:
        where = f"{settings.file} row {row + 1}, column {getattr(settings, name)}"
        problems.add("this is no number", text.iloc[row], where=where, remedy="Write a number or NA")
    return numbers


def _significant(text: pd.Series[str], settings: Measured, problems: Problems) -> pd.Series[bool]:
    if settings.below is not None:
        return _numbers(text, settings, "significant", problems) < settings.below
    if settings.above is not None:
        return _numbers(text, settings, "significant", problems) > settings.above
    words = text.str.lower()
    for row in np.flatnonzero(~words.isin(_YES | _NO))[:5]:
        where = f"{settings.file} row {row + 1}, column {settings.significant}"
        remedy = "Write true or false, or give measured.below or measured.above"
        problems.add("this is neither true nor false", text.iloc[row], where=where, remedy=remedy)
    return words.isin(_YES)


def agreement(
    effects: Effects, dataset: Dataset, measured: pd.DataFrame, *, draws: int = 1000, block: int | None = None
) -> Agreement:
    """How predicted effects agree with measured ones (``read_measured``), for the network and for linear models.

    A variant is the same one if place and alleles are; where the table has REF and ALT the other way round, the
    measured effect is turned. Several measurements of one variant on one gene become their mean, and are significant if
    any of them is.

    Metrics, over pairs of variant and gene: Pearson and Spearman correlation of predicted and measured effects; the
    share whose signs agree (a prediction of 0 counts half); the area under the ROC curve of significant variants by the
    absolute predicted effect, and by its rank among all variants of the gene's window. Intervals are 95 % bootstrap
    intervals over genes, neighbours within 50 kb (or ``block``) drawn together. What has fewer than ten pairs is left
    out.

    Linear models cannot tell variants apart that all training donors carry together: these share their weight equally.

    Raises:
        DataError: no measured variant is in the windows.
    """
    pairs, counts = _match(effects, measured)
    if pairs.empty:
        remedy = "Check chromosome names, assembly and the names of genes"
        what = "no measured variant is among those of the genes' windows"
        raise DataError(what, len(measured), where="measured", remedy=remedy)
    models = {NETWORK: effects.table["effect"].to_numpy(np.float64), **_weights(effects, dataset, pairs["gene_row"])}
    predicted = {name: values[pairs["row"]] for name, values in models.items()}
    ranked = {name: _ranks(np.abs(values), effects.gene)[pairs["row"]] for name, values in models.items()}
    place = effects.donors.genes.iloc[pairs["gene_row"]]
    tss, half = place["tss"].to_numpy(np.int64), effects.donors.window // 2
    blocks = segment_blocks(place["chrom"].tolist(), tss - half, tss + half, block)
    folds = place["fold"].to_numpy(str)
    tables = []
    for fold in ("all", *(fold for fold in ("train", "test") if 0 < (folds == fold).sum() < len(folds))):
        here = np.full(len(pairs), True) if fold == "all" else folds == fold
        if here.sum() >= _FEWEST:
            tables += _compare(pairs, predicted, ranked, blocks, here, fold, draws)
    table = pd.DataFrame(tables, columns=_COLUMNS)
    return Agreement(table, pairs.drop(columns=["row", "gene_row"]).assign(**predicted), counts)


_COLUMNS = (
    *("model", "fold", "variants", "metric", "value", "low", "high"),
    *("minus", "minus_low", "minus_high", "n", "genes"),
)
_KEY = ["chrom", "position", "ref", "alt"]


def _match(effects: Effects, measured: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Pairs of variant and gene with what was measured, in the order of the effects; ``row`` is that of the effects."""
    ours = effects.table[["gene", *_KEY]].assign(row=np.arange(len(effects.table)), gene_row=effects.gene)
    keys = ["gene", *_KEY] if "gene" in measured else _KEY
    if "gene" not in measured:
        tss = effects.donors.genes["tss"].to_numpy(np.int64)[effects.gene]
        away = np.abs(effects.table["position"] - 1 - tss)
        ours = ours.assign(away=away).sort_values(["away", "row"], kind="stable")
        ours = ours.drop_duplicates(_KEY).sort_values("row").drop(columns="away")
    turned = measured.rename(columns={"ref": "alt", "alt": "ref"})
    if "measured" in turned:
        turned = turned.assign(measured=-turned["measured"])
    both = pd.concat([measured.assign(swapped=False), turned.assign(swapped=True)], keys=("as is", "turned"))
    both = both.assign(source=np.tile(np.arange(len(measured)), 2)).reset_index(drop=True)
    found = ours.merge(both, on=keys, how="inner")
    of_source = found.drop_duplicates("source")
    counts = {
        "measured": len(measured),
        "matched": len(of_source),
        "swapped": int(of_source["swapped"].sum()),
        "elsewhere": len(measured) - len(of_source),
    }
    rules = {"measured": "mean", "significant": "any", "swapped": "any"}
    how = {name: rule for name, rule in rules.items() if name in found}
    pairs = found.groupby(["row", "gene_row"], as_index=False).agg(how)
    counts["pairs"] = len(pairs)
    return ours[["gene", *_KEY, "row"]].merge(pairs, on="row"), counts


def _weights(effects: Effects, dataset: Dataset, genes: pd.Series[int]) -> dict[str, Floats]:
    """Of linear models on dosage of the training donors: for each row of the effects, NaN for other genes."""
    donors = effects.donors
    training = np.flatnonzero(donors.donors["fold"] == "train")
    truth = dataset.raw_targets(np.arange(len(dataset)))[:, 0, 0].astype(np.float64)
    out: dict[str, Floats] = {}
    wanted = np.unique(genes)
    for gene in progress(wanted.tolist(), "linear models", total=len(wanted)):
        expression = np.full(len(donors.donors), np.nan)
        of_gene = donors.gene == gene
        expression[donors.donor[of_gene]] = truth[of_gene]
        dosage = donors.dosage(gene)[0].astype(np.float64)
        place = donors.genes.iloc[gene]
        ploidy = int(donors.genotypes.ploidy_on(place["chrom"]).max())
        together = np.unique(dosage[training], axis=1, return_inverse=True)[1]
        for name, model in dosage_baselines(dosage, expression, training, ploidy=ploidy).items():
            shared = np.bincount(together, model.weights) / np.bincount(together)
            weights = shared[together] * float(place["sd"]) * ploidy
            out.setdefault(name, np.full(len(effects.table), np.nan))[effects.rows(gene)] = weights
    return out


def _ranks(sizes: Floats, genes: npt.NDArray[np.int64]) -> Floats:
    """Rank within the gene as a share of its variants, from the smallest."""
    return np.asarray(pd.Series(sizes).groupby(genes).rank(pct=True).to_numpy(np.float64))


# ---- scores ----


def _compare(
    pairs: pd.DataFrame,
    predicted: Mapping[str, Floats],
    ranked: Mapping[str, Floats],
    blocks: npt.NDArray[np.int64],
    here: Flags,
    fold: str,
    draws: int,
) -> list[tuple[Any, ...]]:
    """Rows of the table for the pairs ``here``."""
    rows: list[tuple[Any, ...]] = []
    matter = here & pairs["significant"].to_numpy(bool) if "significant" in pairs else here & ~here
    gene = pairs["gene_row"].to_numpy()

    def score(metric: str, kind: Any, truth: Floats, values: Mapping[str, Floats], chosen: Flags, name: str) -> None:
        counts = int(chosen.sum()), len(np.unique(gene[chosen]))
        made = {model: _made(kind, truth[chosen], one[chosen]) for model, one in values.items()}
        for model, found, apart in _scores(made, kind, metric, blocks[chosen], draws):
            label = "auroc_within_genes" if values is ranked else metric
            rows.append((model, fold, name, label, *_bounds(found), *_bounds(apart), *counts))

    if "measured" in pairs:
        truth = pairs["measured"].to_numpy(np.float64)
        for name, chosen in (("all", here), ("significant", matter)):
            if chosen.sum() >= _FEWEST:
                score("pearson", Moments, truth, predicted, chosen, name)
                score("spearman", Values, truth, predicted, chosen, name)
                score("sign_agreement", None, truth, predicted, chosen, name)
    if 0 < matter.sum() < here.sum():
        sizes = {model: np.abs(values) for model, values in predicted.items()}
        for values in (sizes, ranked):
            score("auroc", Values, matter.astype(np.float64), values, here, "all")
    return rows


def _made(kind: Any, truth: Floats, values: Floats) -> Any:
    """Statistics to score, or for signs 1 where they agree, 0 where they do not, half where one is 0."""
    if kind is None:
        return ((np.sign(truth) * np.sign(values) + 1) / 2)[:, None]
    return kind.of(truth[:, None, None], values[:, None, None])


def _scores(
    made: Mapping[str, Any], kind: Any, metric: str, blocks: npt.NDArray[np.int64], draws: int
) -> Iterator[tuple[str, Estimate, Estimate | None]]:
    """Of each model its score, and what the network's is more."""
    ours = made[NETWORK]
    for model, theirs in made.items():
        if kind is None:
            found = bootstrap_of_means(theirs, blocks, draws=draws)
            apart = None if model == NETWORK else bootstrap_of_means(ours - theirs, blocks, draws=draws)
        else:
            found = bootstrap_interval(theirs, metric, blocks, draws=draws)
            apart = None if model == NETWORK else paired_bootstrap(ours, theirs, metric, blocks, draws=draws)
        yield model, found, apart


def _bounds(found: Estimate | None) -> tuple[float, float, float]:
    return (np.nan,) * 3 if found is None else (float(found.value[0]), float(found.low[0]), float(found.high[0]))
