"""What variants do to the genes of a run of donors, as tables: effects, drivers, agreement, PrediXcan's files.

::

    OUT/
      effects.parquet     a row per gene and variant
      genes.parquet       a row per gene: what added-up effects tell of held-out donors
      drivers.parquet     the few variants of each gene that explain the predictions
      agreement.parquet   beside measured effects, if there are any; pairs.parquet: what is compared
      NAME.db NAME.txt.gz if asked for: PrediXcan's weights and covariances, NAME the folder's
      donors.parquet      if asked for: a row per gene and donor

No other file, and nothing that is printed, names a donor or tells the genotype of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.agreement import Agreement, Measured, agreement, read_measured
from seqgraft.data.dataset import Dataset, check_new_folder, new_folder
from seqgraft.errors import ConfigError
from seqgraft.evaluate import EvaluateConfig
from seqgraft.ism import Effects, donors_of, find_drivers, variant_effects
from seqgraft.models.base import SequenceModel
from seqgraft.predict import predict
from seqgraft.predixcan import PrediXcan, read_ids, write_predixcan

__all__ = ["EffectsConfig", "Found", "with_extras", "write_effects"]

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EffectsConfig:
    """Which effects, and what is made of them.

    Attributes:
        genes: a text file with one gene per line: no others.
        measured: a table of measured effects to compare with.
        predixcan: write PrediXcan's files.
        donors: write predictions for every donor, by name.
        local: compute only what a variant can change, where the model allows; the same to rounding.
    """

    genes: Path | None = None
    measured: Measured | None = None
    predixcan: PrediXcan | None = None
    donors: bool = False
    local: bool = True


@dataclass(frozen=True)
class Found:
    """What :func:`write_effects` made.

    Attributes:
        effects, genes, drivers: the tables; see the module.
        fold: of the donors that ``genes`` and ``drivers`` are about: "test", or what there is instead.
        agreement: beside measured effects, or None.
        predixcan: how many genes, weights and ids its files have, or None.
        files: all that were written.
    """

    effects: Effects
    genes: pd.DataFrame
    drivers: pd.DataFrame
    fold: str
    agreement: Agreement | None
    predixcan: Mapping[str, int] | None
    files: tuple[Path, ...]


def write_effects(
    model: SequenceModel, dataset: Dataset, out: Path, scored: EvaluateConfig, config: EffectsConfig | None = None
) -> Found:
    """Effects of all variants in the windows of a run's genes, and what follows from them, into a new folder.

    Args:
        scored: how the run is scored: views, batch size, bootstrap.

    Raises:
        ConfigError: a dataset without donors, or genes that it does not have.
        DataError: a table or VCF that cannot be read; measured effects of other variants.
        RunError: the folder exists or cannot be written.
    """
    out, config, donors = Path(out), config or EffectsConfig(), donors_of(dataset)
    check_new_folder(out)
    genes = _genes(config.genes, donors.genes["gene"].tolist())
    rename = dataset.info.settings.get("rename") or {}
    measured = None if config.measured is None else read_measured(config.measured, rename)
    if config.predixcan is not None and config.predixcan.ids is not None and not config.predixcan.ids.is_file():
        raise ConfigError("the file does not exist", str(config.predixcan.ids), where="predixcan.ids")
    effects = variant_effects(
        model, dataset, genes, ensemble=scored.ensemble, batch_size=scored.batch_size, local=config.local
    )
    folds = donors.donors["fold"].to_numpy(str)
    fold = next((name for name in ("test", "valid") if (folds == name).any()), "train")
    of_genes = np.isin(donors.gene, effects.genes)
    wanted = np.flatnonzero(of_genes & (config.donors | (folds == fold)[donors.donor]))
    predicted = predict(
        model, dataset, wanted, ensemble=scored.ensemble, batch_size=scored.batch_size, what="predict donors"
    )[:, 0, 0].astype(np.float64)
    held_out = (folds == fold)[donors.donor[wanted]]
    drivers, summary = find_drivers(effects, wanted[held_out], dataset, predicted[held_out])
    tables = {"effects": effects.table, "genes": summary, "drivers": drivers}
    agreed = None
    if measured is not None:
        agreed = agreement(effects, dataset, measured, draws=scored.draws, block=scored.block)
        tables |= {"agreement": agreed.table, "pairs": agreed.pairs}
    if config.donors:
        tables["donors"] = _donor_table(effects, dataset, wanted, predicted)
    counts = None
    with new_folder(out) as building:
        for name, table in tables.items():
            table.to_parquet(building / f"{name}.parquet", index=False)
        if config.predixcan is not None:
            settings = config.predixcan
            ids = None if settings.ids is None else read_ids(settings.ids, effects, rename)
            counts = write_predixcan(building, out.name, effects, summary, settings, ids)
    return Found(effects, summary, drivers, fold, agreed, counts, tuple(sorted(out.iterdir())))


def _genes(listed: Path | None, names: list[str]) -> list[int] | None:
    if listed is None:
        return None
    try:
        wanted = listed.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Give a text file with one gene per line"
        raise ConfigError(f"the list of genes cannot be read ({error})", where="genes", remedy=remedy) from error
    number = {name: row for row, name in enumerate(names)}
    if unknown := [name for name in wanted if name not in number] or ([] if wanted else [""]):
        remedy = f"The data have {len(names)}, such as {', '.join(names[:3])}"
        raise ConfigError("the data have no such genes", unknown[:5], where=listed, remedy=remedy)
    return [number[name] for name in wanted]


def _donor_table(effects: Effects, dataset: Dataset, rows: Numbers, predicted: Floats) -> pd.DataFrame:
    """gene, donor, fold (of the pair), predicted_z, added_up_z (from effects and dosage), predicted, measured."""
    donors = effects.donors
    gene, donor = donors.gene[rows], donors.donor[rows]
    added = np.empty(len(rows))
    for each in effects.genes.tolist():
        here = gene == each
        added[here] = effects.added_up(each)[donor[here]]
    mean, sd = (donors.genes[name].to_numpy(np.float64)[gene] for name in ("mean", "sd"))
    return pd.DataFrame(
        {
            "gene": donors.genes["gene"].to_numpy(str)[gene],
            "donor": donors.donors["donor"].to_numpy(str)[donor],
            "fold": dataset.regions["fold"].to_numpy(str)[rows],
            "predicted_z": predicted,
            "added_up_z": added,
            "predicted": mean + sd * predicted,
            "measured": mean + sd * dataset.raw_targets(rows)[:, 0, 0].astype(np.float64),
        }
    )


def with_extras(config: EffectsConfig, *, genes: Path | None, predixcan: bool, donors: bool) -> EffectsConfig:
    """The settings with what the command line adds."""
    asked = config.predixcan or (PrediXcan() if predixcan else None)
    return replace(config, genes=genes or config.genes, predixcan=asked, donors=donors or config.donors)
