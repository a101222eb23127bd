"""What one training step minimises. ``fit`` knows none of these.

An objective gives sums and the weights to divide them by, separately, so that the mean over micro-batches and devices
is exact: the weights follow from the sample alone and are known before the first forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from seqgraft.errors import ConfigError
from seqgraft.losses import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError, PoissonMultinomial
from seqgraft.models.base import apply_link
from seqgraft.sample import Sample
from seqgraft.tracks import TrackTable

__all__ = ["Elementwise", "Objective", "default_loss"]


class Objective(Protocol):
    """One training step, in parts.

    Attributes:
        terms: names of the terms; the loss is the sum over terms of (sum / weight).
    """

    @property
    def terms(self) -> Sequence[str]: ...

    def batches(self, rows: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
        """The rows of each optimiser step of an epoch, a function of its arguments alone."""
        ...

    def weigh(self, sample: Sample) -> Tensor:
        """Weight of each term ``(terms,)``, from the sample alone."""
        ...

    def __call__(self, model: nn.Module, sample: Sample) -> Tensor:
        """Sum of each term ``(terms,)``, float32, with a gradient."""
        ...


def default_loss(link: str) -> Loss:
    """The usual loss of a link: Poisson-multinomial with total weight 0.2 for coverage, as Borzoi was trained."""
    usual: dict[str, Loss] = {
        "softplus": PoissonMultinomial(total_weight=0.2),
        "sigmoid": BinaryCrossEntropy(),
        "softmax": CrossEntropy(),
        "identity": MeanSquaredError(),
    }
    return usual[link]


class Elementwise:
    """Each group's loss on its own tracks; a term per group.

    Args:
        tracks: the dataset's tracks: the first outputs of the model. Pretrained outputs beside them are not trained on.
        losses: group -> loss; groups that are not named take the usual loss of their link.
        class_weights: track -> how much its positives (sigmoid) or its class (softmax) count; others count once.

    Raises:
        ConfigError: a loss for a group that does not exist.
    """

    def __init__(
        self,
        tracks: TrackTable,
        losses: Mapping[str, Loss] | None = None,
        class_weights: Mapping[str, float] | None = None,
    ) -> None:
        losses = losses or {}
        unknown = sorted(set(losses) - set(tracks.groups))
        if unknown:
            raise ConfigError(
                "the loss names groups of tracks that do not exist",
                unknown,
                where="loss",
                remedy=f"The groups are {list(tracks.groups)}",
            )
        links = tracks.frame["link"].tolist()
        self.terms = list(tracks.groups)
        self._parts: list[tuple[list[int], str, Loss, Tensor]] = []
        for group, index in tracks.groups.items():
            link, weights = links[index[0]], tracks.column("loss_weight")[index]
            classes = [float((class_weights or {}).get(tracks.names[i], 1.0)) for i in index]
            loss = losses.get(group) or default_loss(link)
            if link == "sigmoid" and loss == BinaryCrossEntropy():
                loss = BinaryCrossEntropy(pos_weight=tuple(classes))
            elif link == "softmax":
                weights = weights * np.array(classes)
            self._parts.append((index, link, loss, torch.tensor(weights, dtype=torch.float32)))

    def batches(self, rows: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Shuffled rows in batches of ``size``; the last one may be smaller."""
        shuffled = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, 2**63])).permutation(rows)
        return [shuffled[start : start + size] for start in range(0, len(shuffled), size)]

    def weigh(self, sample: Sample) -> Tensor:
        with torch.no_grad():
            return torch.stack([self._term(part, torch.zeros_like(sample.targets), sample)[1] for part in self._parts])

    def __call__(self, model: nn.Module, sample: Sample) -> Tensor:
        values = model(sample)
        return torch.stack([self._term(part, values, sample)[0] for part in self._parts])

    @staticmethod
    def _term(part: tuple[list[int], str, Loss, Tensor], values: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
        index, link, loss, weight = part
        chosen = values[:, index].float()
        predicted = apply_link(chosen, link) if loss.on == "rate" else chosen
        return loss(
            y_true=sample.targets[:, index],
            y_pred=predicted,
            mask=sample.mask[:, index],
            weight=weight.to(values.device),
        )
