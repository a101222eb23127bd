"""Joint training: regions of another dataset, of tracks that the trunk was pretrained on, train along with examples.

One example in ``every`` of an epoch brings a region: which ones, and which region, follows from the seed and the epoch
alone, so that a resumed run and one of several processes see the same. The region goes through the same trunk, cropped
for its own window and bins, to the pretrained heads of its tracks, which train too (``models.base.Beside``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from seqgraft.data.augment import FORWARD, Augmentation
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError
from seqgraft.genome import Interval
from seqgraft.losses import Loss
from seqgraft.objectives import Elementwise, Objective
from seqgraft.sample import Sample

__all__ = ["Joint", "JointConfig", "regions_apart"]


@dataclass(frozen=True)
class JointConfig:
    """What trains along.

    Attributes:
        data: folder of a prepared dataset of tracks that the model was pretrained on; its fold "train" is used.
        weight: what its loss is multiplied by.
        every: one of its regions for so many examples.
        loss: one for all groups of its tracks, or group -> loss; the usual one of each link if not given.
    """

    data: Path
    weight: float = 1.0
    every: int = 1
    loss: Loss | Mapping[str, Loss] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < np.inf:
            raise ConfigError("must be above 0", self.weight, where="joint.weight", remedy="Leave joint out for none")
        if self.every < 1:
            raise ConfigError("must be 1 or more", self.every, where="joint.every")


class Joint:
    """An objective, and a term per group of the tracks that train along.

    Args:
        main: of the examples.
        rows: the examples for training, rows of ``dataset``.
        dataset: of the examples.
        beside: the other dataset.
        augment: views of its regions.
    """

    def __init__(
        self,
        main: Objective,
        rows: npt.NDArray[np.int64],
        dataset: Dataset,
        beside: Dataset,
        config: JointConfig,
        augment: Augmentation,
    ) -> None:
        loss = config.loss
        losses = loss if isinstance(loss, Mapping) else dict.fromkeys(beside.tracks.groups, loss) if loss else None
        shares = dict.fromkeys(beside.tracks.groups, config.weight)
        self.main = main
        self.other = Elementwise(beside.tracks, losses, shares=shares)
        self.terms = [*main.terms, *(f"joint {group}" for group in self.other.terms)]
        #: What must be equal for a run to be continued, beside the terms.
        self.identity = [beside.hash, config.weight, config.every]
        self.regions = regions_apart(beside, dataset)
        self.every = config.every
        self._rows, self._beside, self._augment, self._count = rows, beside, augment, len(dataset)
        self._drawn: tuple[tuple[int, int], npt.NDArray[np.int64]] | None = None

    @property
    def in_words(self) -> str:
        """What trains along."""
        known = len(self._beside.rows("train"))
        left = f" (the other {known - len(self.regions)} touch held-out windows)" if known > len(self.regions) else ""
        regions = f"{len(self.regions)} of {known} regions{left} of {self._beside.folder}"
        often = "each example" if self.every == 1 else f"{self.every} examples"
        return f"{regions}, one for {often}, weight {self.identity[1]:g}"

    def batches(self, rows: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Those of the examples."""
        return self.main.batches(rows, size, seed, epoch)

    def draw(self, sample: Sample, seed: int, epoch: int) -> Sample:
        """The sample with the regions that its examples bring."""
        sample = self.main.draw(sample, seed, epoch)
        brought = self._brought(seed, epoch)[sample.row.numpy()]
        regions = brought[brought >= 0]
        if regions.size:
            return replace(sample, beside=self.sample(regions, seed, epoch))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # every process must use every parameter: one region that does not count
            return replace(sample, beside=self.sample(self.regions[:1], seed, epoch).without_targets())
        return sample

    def sample(self, regions: npt.NDArray[np.int64], seed: int, epoch: int) -> Sample:
        """Regions of the other dataset, in their views."""
        views = [self._augment.draw(seed, epoch, int(region)) for region in regions]
        drawn = self._beside.sample(regions, views if self._augment.views() != [FORWARD] else None)
        return replace(drawn, of_beside=True)

    def _brought(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The region that each row of the dataset brings, -1 for none: a function of (seed, epoch)."""
        if self._drawn is None or self._drawn[0] != (seed, epoch):
            order = np.concatenate(self.main.batches(self._rows, len(self._rows), seed, epoch))[:: self.every]
            random = np.random.Generator(np.random.Philox(key=seed, counter=[1, 0, epoch, 2**63]))
            rounds = -(-len(order) // len(self.regions))
            found = np.full(self._count, -1, dtype=np.int64)
            found[order] = np.concatenate([random.permutation(self.regions) for _ in range(rounds)])[: len(order)]
            self._drawn = (seed, epoch), found
        return self._drawn[1]

    def weigh(self, sample: Sample) -> Tensor:
        main = self.main.weigh(sample)
        other = main.new_zeros(len(self.other.terms)) if sample.beside is None else self.other.weigh(sample.beside)
        return torch.cat([main, other])

    def __call__(self, model: nn.Module, sample: Sample) -> Tensor:
        main = self.main(model, sample)
        other = main.new_zeros(len(self.other.terms)) if sample.beside is None else self.other(model, sample.beside)
        return torch.cat([main, other])


def regions_apart(beside: Dataset, dataset: Dataset) -> npt.NDArray[np.int64]:
    """The training regions of ``beside`` whose windows touch no held-out window of ``dataset`` (rows).

    A window that training examples have as well, of other donors, is not held out. On another genome all are apart.

    Raises:
        ConfigError: none is left.
    """
    rows = beside.rows("train")
    if dataset.genome is not None and beside.genome is not None and dataset.genome.hash == beside.genome.hash:
        places = [(window.chrom, window.start, window.end) for window in map(dataset.interval, range(len(dataset)))]
        folds = dataset.regions["fold"].tolist()
        seen = {place for place, fold in zip(places, folds, strict=True) if fold == "train"}
        held = pd.DataFrame(
            sorted({place for place, fold in zip(places, folds, strict=True) if fold != "unused"} - seen),
            columns=["chrom", "start", "end"],
        )
        spans = {str(chrom): part[["start", "end"]].to_numpy().T for chrom, part in held.groupby("chrom")}
        windows = [beside.interval(row) for row in rows.tolist()]
        none = np.empty((2, 0), dtype=np.int64)
        free = [not _touches(window, *spans.get(window.chrom, none)) for window in windows]
        rows = rows[np.array(free, dtype=np.bool_)]
    if not rows.size:
        what, remedy = "all of its training regions touch windows that are held out", "Give others"
        raise ConfigError(what, where=f"joint.data ({beside.folder})", remedy=remedy)
    return rows


def _touches(window: Interval, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> bool:
    return bool(((starts < window.end) & (window.start < ends)).any())
