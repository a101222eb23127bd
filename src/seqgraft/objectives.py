"""What one training step minimises. ``fit`` knows none of these.

An objective gives sums and the weights to divide them by, separately, so that the mean over micro-batches and devices
is exact: the weights follow from the sample alone and are known before the first forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from seqgraft.data.donors import MEAN
from seqgraft.errors import ConfigError
from seqgraft.losses import (
    AllPairs,
    BinaryCrossEntropy,
    CrossEntropy,
    Loss,
    MeanSquaredError,
    PairLoss,
    PoissonMultinomial,
)
from seqgraft.models.base import apply_link
from seqgraft.models.masked import mask_tokens, span_of
from seqgraft.models.tokens import Tokeniser
from seqgraft.sample import Sample
from seqgraft.tracks import TrackTable

__all__ = ["Elementwise", "MaskedTokens", "Objective", "OfGenes", "default_loss"]


_SORTED = 50  # batches that are sorted by length together


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

    def draw(self, sample: Sample, seed: int, epoch: int) -> Sample:
        """What this draw asks of the sample, a function of (seed, epoch, rows) alone; nothing for most."""
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
        lengths: of the sequences of all rows, so that a batch has some of like length; None: whatever their lengths.
        shares: group -> what its term is multiplied by; 1 if not named.

    Raises:
        ConfigError: a loss or a share for a group that does not exist; a share that is not above 0.
    """

    def __init__(
        self,
        tracks: TrackTable,
        losses: Mapping[str, Loss] | None = None,
        class_weights: Mapping[str, float] | None = None,
        lengths: npt.NDArray[np.int64] | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        self.lengths = lengths
        losses, shares = losses or {}, shares or {}
        for where, named in (("loss", losses), ("loss_weights", shares)):
            if unknown := sorted(set(named) - set(tracks.groups)):
                what, remedy = "names groups of tracks that do not exist", f"The groups are {list(tracks.groups)}"
                raise ConfigError(what, unknown, where=where, remedy=remedy)
        if wrong := {group: share for group, share in shares.items() if not 0 < share < np.inf}:
            remedy = "Leave a group out of the data that is not to train"
            raise ConfigError("a weight must be above 0", wrong, where="loss_weights", remedy=remedy)
        self.shares = torch.tensor([float(shares.get(group, 1.0)) for group in tracks.groups])
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
        """Shuffled rows in batches of ``size``, one of which may be smaller; of like length where lengths are known."""
        return _shuffled(rows, size, seed, epoch, self.lengths)

    def draw(self, sample: Sample, seed: int, epoch: int) -> Sample:  # noqa: ARG002  (all is in the dataset)
        return sample

    def weigh(self, sample: Sample) -> Tensor:
        with torch.no_grad():
            return torch.stack([self._term(part, torch.zeros_like(sample.targets), sample)[1] for part in self._parts])

    def __call__(self, model: nn.Module, sample: Sample) -> Tensor:
        values = model(sample)
        totals = torch.stack([self._term(part, values, sample)[0] for part in self._parts])
        return totals * self.shares.to(totals)

    def _term(self, part: tuple[list[int], str, Loss, Tensor], values: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
        index, link, loss, weight = part
        chosen = values[:, index].float()
        predicted = apply_link(chosen, link) if loss.on == "rate" else chosen
        return loss(
            y_true=sample.targets[:, index],
            y_pred=predicted,
            mask=sample.mask[:, index],
            weight=weight.to(values.device),
        )


class OfGenes(Elementwise):
    """Losses of how donors of one gene differ, beside elementwise ones; a term per group of tracks.

    A batch holds blocks of donors of one gene: all donors of a gene are dealt into blocks of nearly one size, and the
    blocks shuffled.

    Args:
        losses: group -> loss; "expression" takes ``AllPairs`` if it is not named.
        genes: of all rows.
        block: donors of one gene in a batch, at most; batches are as many blocks as fit.
        shares: see ``Elementwise``.

    Raises:
        ConfigError: as ``Elementwise``; a loss of how donors differ for the means of genes, in which they do not.
    """

    def __init__(
        self,
        tracks: TrackTable,
        losses: Mapping[str, Loss | PairLoss],
        genes: npt.NDArray[np.int64],
        block: int,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        if hasattr(losses.get(MEAN), "of_genes"):
            what, remedy = "donors of a gene do not differ in its mean", "Use mse or huber"
            raise ConfigError(what, type(losses[MEAN]).__name__, where=f"loss.{MEAN}", remedy=remedy)
        usual: dict[str, Loss | PairLoss] = {group: AllPairs() for group in tracks.groups if group == "expression"}
        named = cast("Mapping[str, Loss]", {**usual, **losses})  # ``_term`` tells them apart
        super().__init__(tracks, named, shares=shares)
        self.genes, self.block = genes, block

    def batches(self, rows: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Blocks of donors of one gene, ``size // block`` of them in a batch."""
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, 2**63]))
        shuffled = random.permutation(rows)
        ordered = shuffled[np.argsort(self.genes[shuffled], kind="stable")]
        of_gene = np.split(ordered, np.flatnonzero(np.diff(self.genes[ordered])) + 1)
        blocks = [block for gene in of_gene for block in np.array_split(gene, -(-len(gene) // self.block))]
        drawn = [blocks[i] for i in random.permutation(len(blocks))]
        each = max(1, size // self.block)
        return [np.concatenate(drawn[start : start + each]) for start in range(0, len(drawn), each)]

    def _term(self, part: tuple[list[int], str, Loss, Tensor], values: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
        index, _, loss, _ = part
        if not hasattr(loss, "of_genes"):
            return super()._term(part, values, sample)
        genes = torch.from_numpy(self.genes[sample.row.cpu().numpy()]).to(values.device)
        found: tuple[Tensor, Tensor] = loss.of_genes(
            y_true=sample.targets[:, index], y_pred=values[:, index].float(), mask=sample.mask[:, index], genes=genes
        )
        return found


class MaskedTokens:
    """Cross-entropy of hidden tokens, in nats; its weight is how many there are.

    Args:
        tokeniser: the trunk's.
        share: of the tokens, how many are hidden (see ``models.masked.mask_tokens``).
        lengths: see ``Elementwise``.
    """

    terms = ("masked_tokens",)

    def __init__(self, tokeniser: Tokeniser, share: float, lengths: npt.NDArray[np.int64] | None = None) -> None:
        self.tokeniser, self.share, self.lengths = tokeniser, share, lengths

    def batches(self, rows: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Shuffled rows in batches of ``size``, one of which may be smaller; of like length where lengths are known."""
        return _shuffled(rows, size, seed, epoch, self.lengths)

    def draw(self, sample: Sample, seed: int, epoch: int) -> Sample:
        """The sample with some of its tokens hidden."""
        return self._hide(sample, seed, epoch, plain=False)

    def scored(self, sample: Sample) -> Sample:
        """The sample with those of its tokens hidden that scores are of: the same whatever the run, all masked."""
        return self._hide(sample, 0, 2**63, plain=True)

    def _hide(self, sample: Sample, seed: int, step: int, plain: bool) -> Sample:
        hidden = mask_tokens(
            self.tokeniser.encode(sample.codes, sample.lengths),
            self.tokeniser.vocabulary,
            span=span_of(self.tokeniser),
            share=self.share,
            seed=seed,
            step=step,
            rows=sample.row.tolist(),
            plain=plain,
        )
        return replace(sample, hidden=hidden)

    def weigh(self, sample: Sample) -> Tensor:
        return torch.full((1,), float(len(sample.hidden)), device=sample.codes.device)

    def __call__(self, model: nn.Module, sample: Sample) -> Tensor:
        return functional.cross_entropy(model(sample).float(), sample.hidden.truth, reduction="sum")[None]


def _shuffled(
    rows: npt.NDArray[np.int64], size: int, seed: int, epoch: int, lengths: npt.NDArray[np.int64] | None
) -> list[npt.NDArray[np.int64]]:
    """Batches of shuffled rows. Where lengths differ, every ``_SORTED`` batches are sorted by length before they are
    cut, and all batches shuffled: little of a batch is padding then, and who is with whom is still drawn."""
    random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, 2**63]))
    shuffled = random.permutation(rows)
    differ = lengths is not None and len(rows) > 0 and bool((lengths[rows] != lengths[rows[0]]).any())
    if differ:
        assert lengths is not None
        parts = (shuffled[start : start + _SORTED * size] for start in range(0, len(shuffled), _SORTED * size))
        shuffled = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    batches = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    return [batches[i] for i in random.permutation(len(batches))] if differ else batches
