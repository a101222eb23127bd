"""The leak guard: which of the windows that a run is tested on has its trunk seen already?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seqgraft.data.dataset import Dataset
from seqgraft.data.seen import TRUNK_FOLDS, exposure, read_trunk_folds, seen_of
from seqgraft.errors import DataError, SeqgraftError
from seqgraft.experiment import Experiment
from seqgraft.models.weights import ModelConfig, is_random, pretrained_of

__all__ = ["MAX_EXPOSURE", "Exposure", "inherited", "test_exposure"]

#: Test windows that overlap the trunk's own training regions, above which ``fit`` refuses unless told.
MAX_EXPOSURE = 0.05
_OR_ALLOW = "or set allow_exposure: true and say so where you report the result"


@dataclass(frozen=True)
class Exposure:
    """What the trunk has seen of the windows of a fold.

    Attributes:
        fold: which windows.
        note: a sentence.
        counts: windows that touch the trunk's training regions, "train"; others that touch "valid"; others "test";
            "nothing". Empty where it cannot be told by position.
        problem: why ``fit`` refuses unless ``allow_exposure``; None if it does not.
        allowed: whether ``allow_exposure`` is set.
    """

    fold: str
    note: str
    counts: Mapping[str, int] = field(default_factory=dict)
    problem: SeqgraftError | None = None
    allowed: bool = False

    @property
    def share(self) -> float:
        """Of the windows, those that touch training regions."""
        return self.counts["train"] / sum(self.counts.values()) if self.counts else 0.0

    @property
    def facts(self) -> dict[str, str]:
        """For ``plan``."""
        if not self.counts:
            return {"leak exposure": self.note}
        train, valid, test, nothing = (self.counts[name] for name in ("train", "valid", "test", "nothing"))
        counted = f"{train} its training, {valid} its validation, {test} only its test regions, {nothing} nothing"
        return {"leak exposure": self.note, "the trunk saw": f"of the windows of fold {self.fold!r}: {counted}"}

    def record(self) -> dict[str, Any]:
        """For ``environment.json``."""
        problem = None if self.problem is None else self.problem.what
        return {
            "fold": self.fold,
            "note": self.note,
            "counts": dict(self.counts),
            "share": self.share,
            "problem": problem,
            "allowed": self.allowed,
        }


def test_exposure(experiment: Experiment, dataset: Dataset) -> Exposure:
    """Which test windows touch windows that the trunk was trained on.

    Both are whole input windows: a trunk that was published with a list of what it predicted has read further than
    that on both sides. A trunk of this package names the genome by its hash; published ones are compared by the names
    of chromosomes. A trunk that names its split but not where its regions are is a problem; one that says nothing is
    not, because there is nothing that could be looked up.
    """
    fold, allowed = experiment.evaluate.fold, experiment.allow_exposure

    def without_counts(note: str, problem: SeqgraftError | None = None) -> Exposure:
        return Exposure(fold, note, problem=problem, allowed=allowed)

    if is_random(experiment.model):
        return without_counts("none: the trunk has random weights")
    key, genome, own, bed = _told(experiment.model)
    if not (key or own or bed):
        return without_counts("unknown: the model does not say which regions it was trained on")
    if dataset.genome is None:
        return without_counts("unknown: the sequences have no positions in a genome")
    if dataset.donors is not None:  # of other folds donors are held out, and no trunk has seen them
        fold = "unseen_genes"
        if not (dataset.regions["fold"] == fold).any():
            return without_counts("none: the genes are those of training, and what is held out are donors")
    rows = np.flatnonzero(dataset.regions["fold"] == fold)
    if not rows.size:
        return without_counts(f"unknown: no region is in the fold {fold!r}")
    try:
        seen = seen_of(key, genome, own, bed, where=f"model {experiment.model.name}")
        if seen.is_of_another_genome(dataset.genome):
            return without_counts("none by position: the trunk was trained on another genome")
        regions = seen.on(dataset.genome, dataset.info.settings.get("rename") or {})
    except DataError as error:
        remedy = f"{(error.remedy or 'Correct the file').rstrip('.')}, {_OR_ALLOW}"
        unknown = DataError(error.what, error.value, where=error.where, remedy=remedy)
        return without_counts(f"unknown: {error}", unknown)
    margin = -(-(dataset.info.window - dataset.info.bins * dataset.info.bin_size) // 2)
    windows = dataset.regions.iloc[rows][["chrom", "start", "end"]].copy()
    if dataset.donors is not None:
        windows = windows.drop_duplicates()
    windows["start"], windows["end"] = windows["start"] - margin, windows["end"] + margin
    counts = exposure(windows, regions)
    share = counts["train"] / len(windows)
    what = f"{share:.1%} of the {len(windows)} windows of fold {fold!r} overlap the trunk's training regions"
    if seen.genome is None:
        what += f", assuming that the genome is {seen.assembly or 'the one that they refer to'}"
    problem = None
    if share > MAX_EXPOSURE:
        problem = DataError(
            f"{share:.1%} of the windows of fold {fold!r} overlap regions that the trunk was pretrained on",
            where=str(experiment.data),
            remedy=f"Choose test regions that the trunk has not seen, as folds: {{by: trunk}} does, {_OR_ALLOW}",
        )
    return Exposure(fold, what, counts, problem, allowed)


# pytest would take the name for a test
test_exposure.__test__ = False  # type: ignore[attr-defined]


def inherited(config: ModelConfig, dataset: Dataset) -> tuple[str | None, pd.DataFrame | None]:
    """What a model fitted to a dataset has from its trunk: the key of a published split, and windows beside that.

    Raises:
        DataError: the file of the windows is wrong.
    """
    key, genome, own, bed = (None,) * 4 if is_random(config) else _told(config)
    if key:
        return key, read_trunk_folds(own) if own and genome else None
    if dataset.genome is None or not (own or bed):
        return None, None
    seen = seen_of(None, genome, own, bed, where=f"model {config.name}")
    if seen.is_of_another_genome(dataset.genome):
        return None, None  # places of another genome say nothing about this one
    return None, seen.on(dataset.genome, dataset.info.settings.get("rename") or {})


def _told(config: ModelConfig) -> tuple[str | None, str | None, Path | None, Path | None]:
    """What there is about the regions that a trunk saw, as ``seen_of`` takes it."""
    pretrained, bed = pretrained_of(config), config.trained_on
    key, genome, own = None, None, None
    if pretrained is not None:
        key, genome, own = pretrained.folds, pretrained.content.get("genome"), pretrained.trained_on
    return (str(bed), genome, own, None) if str(bed) in TRUNK_FOLDS else (key, genome, own, bed)
