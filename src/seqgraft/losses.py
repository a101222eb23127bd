"""Losses as frozen values: ``loss(y_true=, y_pred=, mask=) -> (total, weight)``.

All tensors are ``(batch, tracks, bins)`` of one head group; ``mask`` is broadcastable to that shape and False where a
target is missing. ``total`` is the weighted sum over the loss's units and ``weight`` the sum of their weights, so that
``sum(total) / sum(weight)`` is the exact mean over accumulation steps and devices. A unit is one bin, or one
(row, track) for the multinomial loss, or one (row, bin) for the cross-entropy. A unit without targets weighs nothing:
a fully masked batch gives ``(0, 0)`` and zero gradients. Arithmetic is float32, or float64 if ``y_pred`` is.

``weight`` (optional), ``(tracks,)`` or ``(batch, tracks)``, multiplies units. ``loss.on`` says whether ``y_pred`` is
the value after the head's link ("rate") or before it ("logits").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from seqgraft.errors import ConfigError, DataError

__all__ = ["LOSSES", "BinaryCrossEntropy", "CrossEntropy", "Huber", "Loss", "MeanSquaredError", "Poisson"]
__all__ += ["PAIR_LOSSES", "TOKEN_LOSSES", "AllPairs", "MaskedTokens", "PairClassification", "PairLoss", "Pairs"]
__all__ += ["PoissonMultinomial"]

# Keeps log(0) finite. The value is part of the published Borzoi loss, so it is not a setting.
EPSILON = 1e-7


class Loss(Protocol):
    """What an objective needs of a loss; see the module's text for shapes."""

    on: ClassVar[Literal["rate", "logits"]]

    def __call__(
        self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


def _prepare(y_true: Tensor, y_pred: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Targets with missing values set to 0, predictions in full precision, and the mask expanded to their shape."""
    if y_true.shape != y_pred.shape:
        shapes = f"{tuple(y_true.shape)} and {tuple(y_pred.shape)}"
        raise DataError("targets and predictions differ in shape (batch, tracks, bins)", shapes, where="loss")
    y_pred = y_pred if y_pred.dtype == torch.float64 else y_pred.float()
    valid = torch.ones_like(y_true, dtype=torch.bool) if mask is None else mask.bool().expand(y_true.shape)
    # Selecting, not multiplying: 0 * NaN is NaN.
    zero = y_pred.new_zeros(())
    return torch.where(valid, y_true.to(y_pred.dtype), zero), torch.where(valid, y_pred, zero), valid


def _weighted(elements: Tensor, valid: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over valid bins of ``(batch, tracks, bins)`` values, and the sum of their weights."""
    units = valid.to(elements.dtype)
    if weight is not None:
        units = units * weight.to(units)[..., None]
    return (elements * units).sum(), units.sum()


@dataclass(frozen=True)
class Poisson:
    """``rate - y log(rate)`` per bin: the Poisson negative log-likelihood without its constant."""

    on: ClassVar[Literal["rate", "logits"]] = "rate"

    def __call__(
        self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y_true, y_pred, valid = _prepare(y_true, y_pred, mask)
        return _weighted(y_pred - y_true * torch.log(y_pred + EPSILON), valid, weight)


@dataclass(frozen=True)
class PoissonMultinomial:
    """How much signal a region has (Poisson, weighted by ``total_weight``) and where it lies (multinomial).

    Per (row, track), over its L unmasked bins with S = sum y and P = sum p (Baskerville's ``poisson_mn``):
    ``[-sum (y + e) log((p + e) / P) + total_weight (P - S log(P + e))] / L``, e = 1e-7. With ``total_weight`` 1 it is
    the Poisson loss. ``weight_range`` above 1 lets bins count less towards the window's ends: both signals are first
    multiplied by ``exp(-(d / sigma) ** weight_exp)``, d bins from the centre, which falls to ``1 / weight_range``
    at the outermost bins, and L is the sum of those factors.
    """

    total_weight: float = 1.0
    weight_range: float = 1.0
    weight_exp: int = 4

    on: ClassVar[Literal["rate", "logits"]] = "rate"

    def __post_init__(self) -> None:
        if not self.total_weight >= 0:
            raise ConfigError("must not be negative", self.total_weight, where="loss.total_weight")
        if not self.weight_range >= 1:
            raise ConfigError("must be 1 (all bins equal) or more", self.weight_range, where="loss.weight_range")

    def position_weights(self, like: Tensor) -> Tensor:
        """Factors ``(bins,)`` for the last axis of ``like``."""
        bins = like.shape[-1]
        if self.weight_range == 1 or bins == 1:
            return like.new_ones(bins)
        half = (bins - 1) / 2
        sigma = half / math.log(self.weight_range) ** (1 / self.weight_exp)
        distance = torch.arange(bins, dtype=torch.float64, device=like.device) - half
        return torch.exp(-((distance / sigma).abs() ** self.weight_exp)).to(like.dtype)

    def __call__(
        self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y_true, y_pred, valid = _prepare(y_true, y_pred, mask)
        position = self.position_weights(y_pred) * valid
        y_true, y_pred = y_true * position, y_pred * position
        length = position.sum(-1)
        total_true, total_pred = y_true.sum(-1), y_pred.sum(-1)
        # P underflows to 0 where every logit is very low, and is 0 where all is masked.
        share = torch.log(y_pred + EPSILON) - torch.log(total_pred.clamp_min(EPSILON))[..., None]
        where = -((y_true + EPSILON) * share * valid).sum(-1)
        amount = total_pred - total_true * torch.log(total_pred + EPSILON)
        units = (where + self.total_weight * amount) / length.clamp_min(EPSILON)
        return _weighted(units[..., None], valid.any(-1, keepdim=True), weight)


@dataclass(frozen=True)
class MeanSquaredError:
    """``(y - p) ** 2`` per bin."""

    on: ClassVar[Literal["rate", "logits"]] = "rate"

    def __call__(
        self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y_true, y_pred, valid = _prepare(y_true, y_pred, mask)
        return _weighted((y_true - y_pred) ** 2, valid, weight)


@dataclass(frozen=True)
class Huber:
    """``(y - p) ** 2 / 2`` up to a difference of ``delta``, linear beyond, per bin."""

    delta: float = 1.0

    on: ClassVar[Literal["rate", "logits"]] = "rate"

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ConfigError("must be above 0", self.delta, where="loss.delta")

    def __call__(
        self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y_true, y_pred, valid = _prepare(y_true, y_pred, mask)
        return _weighted(F.huber_loss(y_pred, y_true, reduction="none", delta=self.delta), valid, weight)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Each track is its own yes-or-no label. ``pos_weight`` multiplies positives: one number, or one per track."""

    pos_weight: float | tuple[float, ...] = 1.0

    on: ClassVar[Literal["rate", "logits"]] = "logits"

    def __post_init__(self) -> None:
        weights = self.pos_weight if isinstance(self.pos_weight, tuple) else (self.pos_weight,)
        if not all(value > 0 for value in weights):
            raise ConfigError("must be above 0", self.pos_weight, where="loss.pos_weight")

    def __call__(
        self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y_true, y_pred, valid = _prepare(y_true, y_pred, mask)
        positive = y_pred.new_tensor(self.pos_weight)
        if positive.ndim and len(positive) != y_pred.shape[1]:
            what = f"has {len(positive)} values for {y_pred.shape[1]} tracks"
            raise ConfigError(what, where="loss.pos_weight", remedy="Give one number, or one per track of the group")
        positive = positive[:, None] if positive.ndim else positive
        elements = F.binary_cross_entropy_with_logits(y_pred, y_true, pos_weight=positive, reduction="none")
        return _weighted(elements, valid, weight)


@dataclass(frozen=True)
class CrossEntropy:
    """The tracks of the group are the classes; targets are one-hot or probabilities over them.

    A (row, bin) counts if all its classes are unmasked. ``weight`` per track is a class weight: a unit weighs what its
    true class weighs.
    """

    on: ClassVar[Literal["rate", "logits"]] = "logits"

    def __call__(
        self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y_true, y_pred, valid = _prepare(y_true, y_pred, mask)
        units = valid.all(1).to(y_pred.dtype)
        weights = y_true if weight is None else y_true * weight.to(y_true)[..., None]
        elements = -weights * F.log_softmax(y_pred, dim=1)
        return (elements.sum(1) * units).sum(), (weights.sum(1) * units).sum()


@dataclass(frozen=True)
class MaskedTokens:
    """Cross-entropy of a language model's tokens that were hidden from it; tracks play no part.

    The objective of this name (``seqgraft.objectives``) hides them and computes it.

    Attributes:
        share: of the tokens, how many are hidden (Devlin et al. 2019: 0.15).
    """

    share: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError("must be a share of the tokens, above 0 and below 1", self.share, where="loss.share")


class PairLoss(Protocol):
    """A loss of how examples of one gene differ; ``genes`` int ``(batch,)`` says which are of one.

    All other tensors are ``(batch, tracks, 1)``; the weight is the number of pairs, or of what stands for them.
    """

    def of_genes(self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Pairs:
    """``((s1 - s2) - (y1 - y2))^2`` of disjoint pairs of donors: pairwise regression (Rastogi et al. 2026).

    Neighbours in the batch are a pair: a donor is in one pair at most, and which pairs there are is drawn every epoch.
    """

    on: ClassVar[Literal["rate", "logits"]] = "logits"

    def of_genes(self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
        y_true, y_pred, valid = _prepare(y_true, y_pred, mask)
        first, second = _neighbours(genes)
        both = (valid[first] & valid[second]).to(y_pred.dtype)
        error = (y_pred[first] - y_pred[second]) - (y_true[first] - y_true[second])
        return (error**2 * both).sum(), both.sum()


@dataclass(frozen=True)
class PairClassification:
    """Cross-entropy of which of two donors has more: ``p = Phi((s1 - s2) / sqrt(2))`` (Thurstone's law of comparison).

    Pairs as of ``Pairs``. Rastogi et al. put Anscombe's ``2 sqrt(s + 3/8)`` before the difference, which makes
    scores that are counts of one variance; scores of a new head are on that scale from the start.

    Attributes:
        least: pairs whose targets differ by less than this (in standard deviations of the gene) do not count: their
            order is mostly noise. Rastogi et al. leave out pairs within 25 percentiles, about 0.65 of a normal one.
    """

    least: float = 0.65
    on: ClassVar[Literal["rate", "logits"]] = "logits"

    def of_genes(self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
        y_true, y_pred, valid = _prepare(y_true, y_pred, mask)
        first, second = _neighbours(genes)
        apart = y_true[first] - y_true[second]
        counts = (valid[first] & valid[second] & (apart.abs() >= self.least)).to(y_pred.dtype)
        towards = torch.where(apart >= 0, 1.0, -1.0)  # log Phi(-x) = log(1 - Phi(x))
        chance = torch.special.log_ndtr(towards * (y_pred[first] - y_pred[second]) / math.sqrt(2))
        return -(chance * counts).sum(), counts.sum()


@dataclass(frozen=True)
class AllPairs:
    """``alpha`` times the squared error, and ``1 - alpha`` times that of the differences of all pairs of a gene.

    The mean of ``((s_i - s_j) - (y_i - y_j))^2`` over the pairs of n donors is twice the sample variance of the errors
    ``e = s - y``: ``2 / (n - 1) sum (e_i - mean e)^2``. So n passes give n (n - 1) / 2 pairs (as in Variformer, with
    alpha 0.5). With alpha 0 nothing is asked of a gene's mean. The weight is the number of donors.
    """

    alpha: float = 0.5
    on: ClassVar[Literal["rate", "logits"]] = "logits"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError("must be from 0 to 1", self.alpha, where="loss.alpha")

    def of_genes(self, *, y_true: Tensor, y_pred: Tensor, mask: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
        y_true, y_pred, valid = _prepare(y_true, y_pred, mask)
        error, known = (y_pred - y_true)[:, :, 0], valid[:, :, 0].to(y_pred.dtype)
        group = torch.unique(genes, return_inverse=True)[1]
        shape = (int(group.max()) + 1, error.shape[1])
        count = error.new_zeros(shape).index_add(0, group, known)
        mean = error.new_zeros(shape).index_add(0, group, error * known) / count.clamp(min=1)
        apart = (error - mean[group]) ** 2 * known
        pairs = (2 * count / (count - 1).clamp(min=1))[group] * apart  # n times the mean over the pairs of n donors
        return (self.alpha * error**2 * known + (1 - self.alpha) * pairs).sum(), known.sum()


def _neighbours(genes: Tensor) -> tuple[Tensor, Tensor]:
    """Examples 0 and 1, 2 and 3, ... of every run of one gene."""
    new = torch.ones_like(genes, dtype=torch.bool)
    new[1:] = genes[1:] != genes[:-1]
    at = torch.arange(len(genes), device=genes.device)
    place = at - torch.where(new, at, 0).cummax(0).values
    first = at[:-1][(place[:-1] % 2 == 0) & ~new[1:]]
    return first, first + 1


LOSSES: dict[str, type] = {
    "poisson": Poisson,
    "poisson_multinomial": PoissonMultinomial,
    "mse": MeanSquaredError,
    "huber": Huber,
    "bce": BinaryCrossEntropy,
    "cross_entropy": CrossEntropy,
}
#: Those of donors, which compare examples of one gene.
PAIR_LOSSES: dict[str, type] = {"pairs": Pairs, "pair_classification": PairClassification, "all_pairs": AllPairs}
#: Those of the sequences themselves, whatever the tracks.
TOKEN_LOSSES: dict[str, type] = {"masked_tokens": MaskedTokens}
