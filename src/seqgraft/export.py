"""A finished run as a model folder, and the windows that its weights have seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from seqgraft import __version__
from seqgraft.adapters import merge
from seqgraft.data.dataset import (
    Dataset,
    DatasetInfo,
    open_dataset,
)
from seqgraft.data.seen import read_trunk_folds
from seqgraft.exposure import inherited
from seqgraft.models.base import Head, SequenceModel
from seqgraft.models.folders import save_model
from seqgraft.run import Run, open_run
from seqgraft.tracks import TrackTable

__all__ = [
    "export_run",
    "trained_windows",
]


def export_run(
    folder: Path,
    out: Path,
    *,
    name: str,
    licence: str = "",
    citation: str = "",
    card: str = "",
    half: bool = False,
) -> float:
    """Merges the run's adapter and writes a model folder that ``model.name`` accepts.

    Heads of tracks with bins go along. Those of labels stay in the run: a model folder has no place for how they pool
    the bins, nor for covariates; heads that trained along stand in for them, beside tracks with bins they stay in the
    run. Places of training sequences that have none in a genome cannot be listed.

    Args:
        half: round the weights to bfloat16 and store them so, in half the space.

    Returns:
        The largest relative difference that merging made.

    Raises:
        ModelError: the adapter cannot be merged.
    """
    run = open_run(folder)
    difference = merge(run.model)
    model, info, beside, joint = run.model, run.dataset.info, run.model.beside, run.experiment.joint
    model.beside = None
    if _has_labels(model):
        model, info, card = SequenceModel(model.trunk, {}, TrackTable.none()), _info_of_trunk(run), _card(run, card)
        if beside is not None and joint is not None:
            model = SequenceModel(model.trunk, dict(beside.heads.items()), beside.tracks)  # type: ignore[arg-type]
            info = open_dataset(joint.data).info
    parameters = sum(p.numel() for p in run.model.trunk.parameters())
    folds, _ = inherited(run.experiment.model, run.dataset)
    save_model(
        model,
        Path(out),
        name=name,
        info=info,
        licence=licence or run.model.trunk.spec.licence,
        citation=citation or run.model.trunk.spec.citation,
        trained_on=trained_windows(run),
        card=card,
        half=half,
        parameters=parameters,
        folds=folds,
        seqgraft=__version__,
    )
    return difference


def _has_labels(model: SequenceModel) -> bool:
    """Whether heads pool the bins of a sequence into one."""
    return any(head.pool != "none" for head in model.heads.values() if isinstance(head, Head))


def _info_of_trunk(run: Run) -> DatasetInfo:
    """Window and bins of the trunk alone, as long as the longest sequence of the run's labels."""
    dataset, trunk = run.dataset, run.model.trunk
    longest = dataset.info.window or int(np.max(np.asarray(dataset.lengths)))
    window = -(-longest // trunk.stride) * trunk.stride
    size = trunk.spec.bin_size or window
    bins = max(1, window // size - 2 * type(trunk).drops)
    return replace(dataset.info, window=window, bins=bins, bin_size=size)


def _card(run: Run, text: str) -> str:
    """The card, and what the folder of a run of labels does not hold."""
    names = ", ".join(run.model.tracks.names)
    more = f"The trunk of a run on labels ({names}). Their heads are not part of it."
    if run.dataset.genome is None:
        more += " Its training sequences have no places in a genome, so no leak check finds them."
    return f"{text.rstrip()}\n\n{more}\n".lstrip()


def trained_windows(run: Run) -> pd.DataFrame | None:
    """The windows that the weights were fitted to: chrom, start, end, fold; None where none is known.

    Those of this run, and those of the model it started from; of a pulled run, what it brought.
    """
    if (run.folder / "trained_on.bed").exists():
        return read_trunk_folds(run.folder / "trained_on.bed")
    joint, (_, before) = run.experiment.joint, inherited(run.experiment.model, run.dataset)
    if run.dataset.genome is None:
        return before
    fitted = [_training_windows(run.dataset)]
    if joint is not None and (beside := open_dataset(joint.data)).genome is not None:
        fitted += [_training_windows(beside)] if beside.genome.hash == run.dataset.genome.hash else []
    joined = _joined(pd.concat(fitted))
    return joined if before is None else pd.concat([before, joined], ignore_index=True)


def _training_windows(dataset: Dataset) -> pd.DataFrame:
    info, regions = dataset.info, dataset.regions
    fitted = regions[regions["fold"] == "train"][["chrom", "start", "end", "fold"]].copy()
    margin = (info.window - info.bins * info.bin_size) // 2
    fitted["start"], fitted["end"] = (fitted["start"] - margin).clip(lower=0), fitted["end"] + margin
    return fitted


def _joined(regions: pd.DataFrame) -> pd.DataFrame:
    """Overlapping or touching regions of a chromosome and fold as one."""
    regions = regions.sort_values(["fold", "chrom", "start"])
    same = (regions["chrom"] == regions["chrom"].shift()) & (regions["fold"] == regions["fold"].shift())
    reach = regions.groupby(["fold", "chrom"])["end"].cummax().shift()
    piece = (~(same & (regions["start"] <= reach))).cumsum()
    return regions.groupby(piece).agg({"chrom": "first", "start": "min", "end": "max", "fold": "first"})
