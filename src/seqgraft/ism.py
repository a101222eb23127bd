"""What each variant does to what a run of donors predicts: in-silico mutagenesis of reference haplotypes.

The effect of a variant on a gene is the prediction for the reference around the gene's transcription start with the
alternate allele alone, minus that for the reference itself. Windows are those of the donors: indels leave the start
where it is (``data.haplotypes``).

A donor's prediction is the mean over its haplotypes. If what variants do added up, it would be, with a variant's
dosage (alternate alleles that the donor carries)::

    reference + sum over variants of effect * dosage / ploidy

which is what a linear model of dosage can tell of the network (Rastogi et al. 2026 find that it tells nearly all).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import stats

from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset
from seqgraft.data.donors import Donors, shown
from seqgraft.data.genotypes import Numbers
from seqgraft.errors import ConfigError
from seqgraft.local import Recompute
from seqgraft.metrics import pearson_within
from seqgraft.models.base import SequenceModel
from seqgraft.predict import FORWARD_ONLY
from seqgraft.progress import progress

__all__ = ["Driver", "Effects", "donors_of", "find_drivers", "select_drivers", "variant_effects"]

Floats = npt.NDArray[np.float64]

#: A driver raises the correlation with the predictions by so much, and is alone correlated with them at this p-value
#: after Bonferroni's correction for the gene's variants (Rastogi et al. 2026).
LEAST_GAIN, LARGEST_P = 0.05, 0.01
_ROUNDING = 1e-6  # predictions that differ by less than this share of them are the same


@dataclass(frozen=True)
class Effects:
    """Effects of variants on genes, gene by gene.

    Attributes:
        donors: whose genes and variants they are.
        table: a row per gene and variant: gene, chrom, position (1-based), ref, alt, effect_z (in the unit of the
            targets), effect (in the unit of expression), and of the training donors dosage_mean, dosage_variance.
        gene, variant: int64 ``(rows,)``: the row of each in ``donors.genes`` and in ``donors.genotypes``.
        reference: prediction for the reference haplotype of each gene in the order of ``genes``, in z.
        genes: int64: the rows of ``donors.genes`` that were asked for; some may have no variant.
        in_words: what was computed for each alternate.
    """

    donors: Donors
    table: pd.DataFrame
    gene: Numbers
    variant: Numbers
    reference: Floats
    genes: Numbers
    in_words: str

    def rows(self, gene: int) -> slice:
        """The rows of a gene, in the order of ``donors.dosage(gene)``."""
        first, last = np.searchsorted(self.gene, (gene, gene + 1))
        return slice(int(first), int(last))

    def added_up(self, gene: int) -> Floats:
        """The prediction for every donor if effects added up, ``(donors,)``, in z."""
        effects = self.table["effect_z"].to_numpy(np.float64)[self.rows(gene)]
        reference = float(self.reference[np.searchsorted(self.genes, gene)])
        added: Floats = reference + carried_share(self.donors, gene) @ effects
        return added


def donors_of(dataset: Dataset) -> Donors:
    """The donors of a dataset.

    Raises:
        ConfigError: it has none.
    """
    if dataset.donors is None:
        remedy = "Use 'seqgraft variants' for runs of other data"
        raise ConfigError("the run's data have no donors", dataset.info.kind, where=dataset.folder, remedy=remedy)
    return dataset.donors


def carried_share(donors: Donors, gene: int) -> Floats:
    """Which share of its haplotypes has each variant of a gene's window, ``(donors, variants)``: dosage / ploidy."""
    dosage, _ = donors.dosage(gene)
    share: Floats = dosage / donors.ploidy_of(gene)[:, None]
    return share


def variant_effects(
    model: SequenceModel,
    dataset: Dataset,
    genes: Sequence[int] | None = None,
    *,
    ensemble: Augmentation = FORWARD_ONLY,
    batch_size: int = 16,
    local: bool = True,
) -> Effects:
    """Effects of all variants in the windows of genes, on the model's first track.

    Args:
        genes: rows of the table of genes; None for all.
        ensemble: views to average over, as predictions of donors are.
        batch_size: alternates per forward pass.
        local: compute only what a variant can change, where the model allows; the same to rounding.

    Raises:
        ConfigError: a dataset without donors; shifts beyond those of donors' sequences.
    """
    donors = donors_of(dataset)
    chosen = np.arange(len(donors.genes)) if genes is None else np.unique(np.asarray(genes, dtype=np.int64))
    engine = Recompute(model, local=local)
    training = np.flatnonzero(donors.donors["fold"] == "train")
    reference, tables, numbers, variants = [], [], [], []
    for gene in progress(chosen.tolist(), "effects of variants", total=len(chosen)):
        dosage, rows = donors.dosage(gene)
        known, values = _effects(engine, donors, gene, ensemble, batch_size)
        reference.append(known)
        tables.append(_table(donors, gene, rows, values, dosage[training].astype(np.float64)))
        numbers.append(np.full(len(rows), gene))
        variants.append(rows)
    table = pd.concat(tables, ignore_index=True)
    number, variant = (np.concatenate(parts).astype(np.int64) for parts in (numbers, variants))
    return Effects(donors, table, number, variant, np.array(reference), chosen, engine.in_words)


def _effects(
    engine: Recompute, donors: Donors, gene: int, ensemble: Augmentation, batch_size: int
) -> tuple[float, Floats]:
    """The prediction for the reference, and what each variant changes of it, means over the views."""
    wide = donors.alone(gene)
    views, total, changes = ensemble.views(), 0.0, np.zeros(len(wide) - 1)
    for view in views:
        windows = shown(wide, view, donors.window)
        base, edited = windows[-1], windows[:-1]
        known = engine.reference(torch.from_numpy(base))
        value = float(engine.predict_reference(known)[0, 0])
        differs = np.flatnonzero((edited != base).any(1))
        for first in range(0, len(differs), batch_size):
            batch = differs[first : first + batch_size]
            found = engine.predict(known, torch.from_numpy(edited[batch]))[:, 0, 0]
            changes[batch] += found.double().cpu().numpy() - value
        total += value
    return total / len(views), changes / len(views)


def _table(donors: Donors, gene: int, rows: Numbers, effects: Floats, dosage: Floats) -> pd.DataFrame:
    variants = [donors.genotypes.variant(int(row), donors.genome) for row in rows]
    place = donors.genes.iloc[gene]
    return pd.DataFrame(
        {
            "gene": pd.Series([str(place["gene"])] * len(rows), dtype=object),
            "chrom": pd.Series([variant.chrom for variant in variants], dtype=object),
            "position": np.array([variant.position for variant in variants], dtype=np.int64),
            "ref": pd.Series([variant.ref for variant in variants], dtype=object),
            "alt": pd.Series([variant.alt for variant in variants], dtype=object),
            "effect_z": effects,
            "effect": effects * float(place["sd"]),
            "dosage_mean": dosage.mean(0),
            "dosage_variance": dosage.var(0, ddof=1),
        }
    )


# ---- drivers ----


@dataclass(frozen=True)
class Driver:
    """A variant that explains predictions.

    Attributes:
        variant: its number.
        r: correlation with the predictions of this driver and those before it together.
        alone: of this one alone; ``p`` of that, after Bonferroni's correction for all variants of the gene.
    """

    variant: int
    r: float
    alone: float
    p: float


def select_drivers(share: Floats, effects: Floats, predictions: Floats) -> list[Driver]:
    """The few variants that explain the predictions of a gene, by forward selection.

    Variants are tried from the largest effect to the smallest. One is kept if the sum over those kept and itself
    correlates with the predictions by ``LEAST_GAIN`` more than without it, and if alone it correlates positively, with
    a p-value of at most ``LARGEST_P`` times the number of variants.

    Args:
        share: ``(donors, variants)`` as of dosage, in any unit.
        effects: ``(variants,)``; predictions: ``(donors,)``.
    """
    kept: list[Driver] = []
    if len(predictions) < 3 or np.ptp(predictions) <= _ROUNDING * np.abs(predictions).max():
        return kept
    best, partial = 0.0, np.zeros(len(predictions))
    for variant in np.argsort(-np.abs(effects), kind="stable").tolist():
        own = share[:, variant] * effects[variant]
        if np.ptp(own) == 0 or np.ptp(partial + own) == 0:
            continue
        r = float(stats.pearsonr(partial + own, predictions)[0])
        if r < best + LEAST_GAIN:
            continue
        alone, p = (float(value) for value in stats.pearsonr(own, predictions))
        p = min(1.0, p * len(effects))
        if alone < 0 or p > LARGEST_P:
            continue
        kept.append(Driver(variant, r, alone, p))
        best, partial = r, partial + own
    return kept


def find_drivers(
    effects: Effects, rows: Numbers, dataset: Dataset, predictions: Floats
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Drivers of every gene, and what effects that are added up tell.

    Args:
        rows: of the dataset: the donors among whom predictions are explained; predictions: of these rows, in z.

    Returns:
        * drivers: gene, rank (from 1), chrom, position, ref, alt, distance (bp from the transcription start, in its
          direction), effect_z, effect, r (of the drivers up to this one with the predictions), r_alone, p.
        * genes: gene, fold, variants, donors, drivers, reference_z; linear: the correlation of added-up effects with
          the predictions; pearson, p: with the expression that was measured (one-sided, for above 0). Correlations of
          constants are 0.
    """
    donors, found, summary = effects.donors, [], []
    truth = dataset.raw_targets(rows)[:, 0, 0].astype(np.float64)
    gene_of = donors.gene[rows]
    for number, gene in enumerate(effects.genes.tolist()):
        here, part = np.flatnonzero(gene_of == gene), effects.table.iloc[effects.rows(gene)]
        who = donors.donor[rows[here]]
        place = donors.genes.iloc[gene]
        chosen = select_drivers(carried_share(donors, gene)[who], part["effect_z"].to_numpy(), predictions[here])
        if chosen:
            kept = part.iloc[[driver.variant for driver in chosen]]
            kept = kept.drop(columns=["dosage_mean", "dosage_variance"]).reset_index(drop=True)
            kept.insert(1, "rank", np.arange(1, len(kept) + 1))
            away = kept["position"] - 1 - int(place["tss"])
            kept.insert(6, "distance", -away if place["strand"] == "-" else away)
            numbers = [(driver.r, driver.alone, driver.p) for driver in chosen]
            found.append(kept.assign(**dict(zip(("r", "r_alone", "p"), np.array(numbers).T, strict=True))))
        added = effects.added_up(gene)[who]
        pearson, p = _above_zero(truth[here], added)
        summary.append(
            {
                "gene": str(place["gene"]),
                "fold": str(place["fold"]),
                "variants": len(part),
                "donors": len(here),
                "drivers": len(chosen),
                "reference_z": effects.reference[number],
                "linear": _pearson(predictions[here], added),
                "pearson": pearson,
                "p": p,
            }
        )
    columns = [*effects.table.columns[:1], "rank", *effects.table.columns[1:5], "distance", "effect_z", "effect"]
    empty = pd.DataFrame(columns=[*columns, "r", "r_alone", "p"])
    return pd.concat(found, ignore_index=True) if found else empty, pd.DataFrame(summary)


def _pearson(truth: Floats, predicted: Floats) -> float:
    """0 of constants and of fewer than three."""
    return float(pearson_within(truth, predicted, np.zeros(len(truth), dtype=np.int64))[0]) if len(truth) else 0.0


def _above_zero(truth: Floats, predicted: Floats) -> tuple[float, float]:
    """The correlation, and the p-value of a correlation of at least so much where there is none."""
    r = _pearson(truth, predicted)
    if r == 0:
        return 0.0, 1.0
    t = r * np.sqrt((len(truth) - 2) / max(1 - r * r, 1e-300))
    return r, float(stats.t.sf(t, len(truth) - 2))
