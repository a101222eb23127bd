"""Enformer (Avsec et al., Nature Methods 2021, doi 10.1038/s41592-021-01252-x) as a chain of stages.

::

    bases (b, 4, L) -> stem /2 -> tower_0 /2 ... tower_5 /2 -> transformer_0..10 -> crop -> final (b, 2 channels, bins)

The defaults are the published network: 196,608 bp, 1,536 positions of 128 bp, of which 320 are cropped at each end.

Attention pooling weighs the two positions of a pair, e and o, by the softmax of logits W e and W o. A softmax of two is
a sigmoid of their difference, so it is computed as ``e + sigmoid(W (o - e)) * (o - e)``: half the multiplications.

Relative positions have three kinds of features (exponential, central mask, gamma density), and each of them times the
sign of the distance. Their widths are scaled to a number of positions. The published network saw one only, 1,536; here
that number is a setting, so that a distance means the same in every window. Gamma densities are divided by their
maximum over the positions, as the published weights were trained; dividing at each position by the maximum over the
features is another function (they differ by up to 1), which enformer-pytorch computes unless given a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from seqgraft.errors import ModelError
from seqgraft.models.base import Span, Stage, State, Step, Trunk, TrunkSpec
from seqgraft.models.stages import Crop

__all__ = ["Enformer"]

#: Queries whose attention is computed at a time on a CPU: their scores stay in its cache, and fewer distances occur.
_CHUNK = 256
_KINDS = 6  # of position features: three functions, with and without the sign of the distance


class Enformer(Trunk):
    """The trunk of Enformer; its features are ``2 * channels`` wide.

    Args:
        channels: width of the transformer; the stem has half of it, and the tower grows geometrically between.
        depth: transformer blocks.
        heads: attention heads; a value has ``channels / heads`` numbers, and so many are the position features.
        key_size: numbers of a query or key, per head.
        divisible_by: widths of the tower are rounded to a multiple of it.
        positions: how many positions the relative features are scaled to, in any window: those of the training
            window. 0: the window's own, which gives a distance another meaning in each window.
        gamma_per_position: normalise the gamma features at each position rather than over all, as enformer-pytorch
            does without its TensorFlow table. For weights that were trained so.
        dropout, attention_dropout, position_dropout: rates while training.
        eps: of BatchNorm (LayerNorm has 1e-5); the published weights have 1e-5 in both.
        bin_size: bp per output bin, a power of two: one pooling by 2 in the stem, the rest in the tower.
        crop: bins dropped at each end of the output.

    Raises:
        ModelError: sizes that do not divide.
    """

    def __init__(
        self,
        channels: int = 1536,
        depth: int = 11,
        heads: int = 8,
        key_size: int = 64,
        divisible_by: int = 128,
        positions: int = 1536,
        gamma_per_position: bool = False,
        dropout: float = 0.4,
        attention_dropout: float = 0.05,
        position_dropout: float = 0.01,
        eps: float = 1e-5,
        bin_size: int = 128,
        crop: int = 0,
    ) -> None:
        super().__init__()
        self.settings: Mapping[str, Any] = {
            "channels": channels,
            "depth": depth,
            "heads": heads,
            "key_size": key_size,
            "divisible_by": divisible_by,
            "positions": positions,
            "gamma_per_position": gamma_per_position,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "position_dropout": position_dropout,
            "eps": eps,
        }
        widths = _tower_widths(channels, heads, divisible_by, bin_size)
        self.stride = bin_size
        stages: dict[str, Stage] = {"stem": _Stem(channels // 2, eps)}
        for i, (before, after) in enumerate(zip([channels // 2, *widths], widths, strict=False)):
            stages[f"tower_{i}"] = _Tower(before, after, eps)
        for i in range(depth):
            stages[f"transformer_{i}"] = _Block(
                channels,
                heads,
                key_size,
                _Positions(channels // heads, positions, gamma_per_position),
                (dropout, attention_dropout, position_dropout),
            )
        stages["crop"] = Crop(crop)
        stages["final"] = _Final(channels, dropout / 8, eps)
        self.stages = nn.ModuleDict(stages)
        self.spec = TrunkSpec(name="enformer", channels=2 * channels, bin_size=bin_size, sites=self._sites())

    def _sites(self) -> dict[str, tuple[str, ...]]:
        ends = {
            "attention": (".query", ".key", ".value", ".output"),
            "feedforward": (".up", ".down"),
            "conv": (".conv", ".mix"),
            "norm": (".norm", ".mix_norm", ".attention_norm", ".feedforward_norm"),
        }
        ends |= {f"{site}{end}": (end,) for site in ("attention", "feedforward") for end in ends[site]}
        return {
            site: tuple(name for name, _ in self.named_modules() if name.endswith(end)) for site, end in ends.items()
        }


def _tower_widths(channels: int, heads: int, divisible_by: int, bin_size: int) -> list[int]:
    """Widths of the tower's stages: geometric from half the channels to all of them, rounded.

    Raises:
        ModelError: sizes that do not divide.
    """
    if bin_size < 4 or bin_size & (bin_size - 1):
        what, remedy = "the trunk cannot give bins of this size", "Choose a power of two, 4 or more; 128 as published"
        raise ModelError(what, bin_size, where="enformer", remedy=remedy)
    if channels < 2 or channels % 2 or channels % divisible_by or heads < 1 or channels % (_KINDS * heads):
        raise ModelError(
            f"the channels must be even and divide by {divisible_by} (divisible_by) and by {_KINDS} * heads",
            f"{channels} channels, {heads} heads",
            where="enformer",
        )
    stages = bin_size.bit_length() - 2
    if stages == 1:
        return [channels]
    widths = [round(channels / 2 * 2 ** (i / (stages - 1)) / divisible_by) * divisible_by for i in range(stages)]
    if 0 in widths:
        raise ModelError("the tower's widths round to nothing", divisible_by, where="enformer: divisible_by")
    return widths


def _gelu(x: Tensor) -> Tensor:
    """The approximation that Enformer was trained with."""
    return torch.sigmoid(1.702 * x) * x


class _Pool(nn.Module):
    """Attention pooling by 2, per channel; padding has no weight. An odd last position stands alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.logits = nn.Conv1d(channels, channels, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Twice the identity, nearly a maximum, as published."""
        with torch.no_grad():
            self.logits.weight.copy_(2 * torch.eye(len(self.logits.weight))[:, :, None])

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``(batch, channels, n)`` and ``(batch, n)`` to half the positions, rounded up."""
        whole = valid is None
        if x.shape[-1] % 2:
            valid = torch.ones_like(x[:, 0], dtype=torch.bool) if valid is None else valid
            x, valid = functional.pad(x, (0, 1)), functional.pad(valid, (0, 1))
        first, second = x[..., ::2], x[..., 1::2]
        if valid is None:
            difference = second - first
            return first + torch.sigmoid(self.logits(difference)) * difference, None
        here, there = valid[:, None, ::2], valid[:, None, 1::2]
        first = torch.where(here, first, second)  # of a pair with one valid position, that one
        difference = torch.where(there, second - first, 0.0)
        pooled = first + torch.sigmoid(self.logits(difference)) * difference
        valid = (here | there)[:, 0]
        pooled = pooled.masked_fill(~valid[:, None], 0.0)
        return pooled, None if whole else valid


class _Stem(Stage):
    """A wide convolution on the bases, a residual 1x1 convolution, attention pooling by 2."""

    steps = (Step("conv", 15), Step("pool", 2))

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, channels, 15, padding=7)
        self.mix_norm = nn.BatchNorm1d(channels, eps=eps)
        self.mix = nn.Conv1d(channels, channels, 1)
        self.pool = _Pool(channels)

    def forward(self, state: State) -> State:
        x = self.conv(state.masked())
        x = x + self.mix(_gelu(self.mix_norm(x)))
        x, valid = self.pool(x, state.valid)
        return State(x, state.skips, valid)


class _Tower(Stage):
    """BatchNorm, GELU, a convolution of 5; a residual 1x1 convolution after its own; attention pooling by 2."""

    steps = (Step("conv", 5), Step("pool", 2))

    def __init__(self, before: int, after: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(before, eps=eps)
        self.conv = nn.Conv1d(before, after, 5, padding=2)
        self.mix_norm = nn.BatchNorm1d(after, eps=eps)
        self.mix = nn.Conv1d(after, after, 1)
        self.pool = _Pool(after)

    def forward(self, state: State) -> State:
        x = self.conv(State(_gelu(self.norm(state.x)), valid=state.valid).masked())
        x = x + self.mix(_gelu(self.mix_norm(x)))
        x, valid = self.pool(x, state.valid)
        return State(x, state.skips, valid)


class _Positions:
    """The features of relative positions that a block's keys are linear in.

    Args:
        features: how many in all, a multiple of 6.
        scale: positions that they are scaled to; 0: those of the window.
        gamma_per_position: see ``Enformer``.
    """

    def __init__(self, features: int, scale: int, gamma_per_position: bool) -> None:
        self.features, self.scale, self.gamma_per_position = features, scale, gamma_per_position

    def __call__(self, n: int, like: Tensor) -> Tensor:
        """``(2n - 1, features)`` for distances j - i = -(n-1)..n-1, of the type and on the device of ``like``."""
        return _features(n, self.features, self.scale or n, self.gamma_per_position, like.device, like.dtype)


@lru_cache(maxsize=8)  # all blocks and all batches ask for the same ones
def _features(
    n: int, features: int, scale: int, per_position: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):  # real numbers
        within = _magnitudes(n, features // _KINDS, scale, per_position)
        both = torch.cat([within[1:].flip(0), within])
        sign = torch.arange(1 - n, n).sign()[:, None]
        return torch.cat([both, sign * both], dim=1).to(device, dtype)


def _magnitudes(n: int, count: int, scale: int, per_position: bool) -> Tensor:
    """``(n, 3 * count)``: exponential, central mask and gamma features of the distances 0..n-1.

    In float32, in which the weights were trained: the exponent of the gamma density is a difference of numbers of the
    order of 1e4, which leaves 2e-3 of the features to rounding.
    """
    known = torch.arange(max(n, scale), dtype=torch.float32)[:, None]
    half_life = 2 ** torch.linspace(3.0, math.log(scale) / math.log(2.0), count)
    exponential = torch.exp(-math.log(2.0) / half_life * known)
    central = (2 ** torch.arange(1, count + 1).float() - 1 > known).float()
    mean, deviation = torch.linspace(scale / count, scale, count), scale / (2 * count)
    shape, rate = (mean / deviation) ** 2, mean / deviation**2
    exponent = torch.xlogy(shape - 1.0, known) - rate * known - (torch.lgamma(shape) - shape * torch.log(rate))
    density = torch.exp(exponent) + 1e-8
    gamma = density / (density.amax(1, keepdim=True) if per_position else density[:scale].amax(0))
    return torch.cat([exponential, central, gamma], dim=1)[:n]


class _Block(Stage):
    """A pre-norm transformer block with relative positions; global."""

    def __init__(
        self, channels: int, heads: int, key_size: int, positions: _Positions, rates: tuple[float, float, float]
    ) -> None:
        super().__init__()
        self.heads, self.positions = heads, positions
        dropout, attention_dropout, position_dropout = rates
        self.attention_norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, heads * key_size, bias=False)
        self.key = nn.Linear(channels, heads * key_size, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.position = nn.Linear(positions.features, heads * key_size, bias=False)
        self.content_bias = nn.Parameter(torch.empty(heads, 1, key_size))
        self.position_bias = nn.Parameter(torch.empty(heads, 1, key_size))
        self.output = nn.Linear(channels, channels)
        self.feedforward_norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 2 * channels)
        self.down = nn.Linear(2 * channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.attention_dropout, self.position_dropout = nn.Dropout(attention_dropout), nn.Dropout(position_dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.content_bias)
        nn.init.normal_(self.position_bias)

    def forward(self, state: State) -> State:
        return self.at(state, (0, state.x.shape[-1]))

    def at(self, state: State, span: Span) -> State:
        """The queries ``span`` on all keys."""
        x = state.x.transpose(1, 2).contiguous()  # once: the blocks after it find it so
        x = x[:, slice(*span)] + self.dropout(self._attend(self.attention_norm(x), state.valid, span))
        hidden = functional.relu(self.dropout(self.up(self.feedforward_norm(x))))
        x = x + self.dropout(self.down(hidden))
        return State(x.transpose(1, 2), state.skips, None if state.valid is None else state.valid[:, slice(*span)])

    def _attend(self, x: Tensor, valid: Tensor | None, span: Span | None = None) -> Tensor:
        """softmax((q + u) k(j) + (q + w) r(j - i)) v of the queries ``span``, or all: q scaled, r linear in features.

        ``x`` is ``(batch, n, channels)``.
        """
        batch, n, channels = x.shape
        start, stop = span or (0, n)
        query, key, value = (
            layer(y).view(batch, y.shape[1], self.heads, -1).transpose(1, 2)
            for layer, y in ((self.query, x[:, start:stop]), (self.key, x), (self.value, x))
        )
        query = query / math.sqrt(query.shape[-1])
        features = self.position_dropout(self.positions(n, self.position.weight)[n - stop : 2 * n - 1 - start])
        relative = self.position(features).view(len(features), self.heads, -1).permute(1, 2, 0)
        content, position = ((query + bias).to(key.dtype) for bias in (self.content_bias, self.position_bias))
        count = stop - start
        size = _CHUNK if x.device.type == "cpu" else count
        parts = []
        for at in range(0, count, size):
            last = min(at + size, count)
            bias = _by_distance(position[:, :, at:last] @ relative[..., count - last : count + n - 1 - at])
            if valid is not None:
                bias = bias.masked_fill(~valid[:, None, None, :], float("-inf"))
            parts.append(
                functional.scaled_dot_product_attention(
                    content[:, :, at:last],
                    key,
                    value,
                    attn_mask=bias.to(key.dtype),
                    dropout_p=self.attention_dropout.p if self.attention_dropout.training else 0.0,
                    scale=1.0,
                )
            )
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        attended: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, stop - start, channels))
        return attended


def _by_distance(scores: Tensor) -> Tensor:
    """Scores of m queries in a row for the distances to n keys, as ``(..., m, n)`` for each key.

    They are ``(..., m, n + m - 1)``, from the least distance of the last query to the greatest of the first. Row i
    wants its n columns from m - 1 - i on; in memory they begin at every (n + m - 2)th number from m - 1 on: a view.
    """
    m, n = scores.shape[-2], scores.shape[-1] - scores.shape[-2] + 1
    if m == 1:
        return scores
    flat = scores.flatten(-2)[..., m - 1 : m - 1 + m * (n + m - 2)]
    return flat.view(*flat.shape[:-1], m, n + m - 2)[..., :n]


class _Final(Stage):
    """BatchNorm, GELU, a 1x1 convolution to twice the channels, dropout, GELU."""

    steps = (Step("conv", 1),)

    def __init__(self, channels: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, eps=eps)
        self.conv = nn.Conv1d(channels, 2 * channels, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: State) -> State:
        return State(_gelu(self.dropout(self.conv(_gelu(self.norm(state.x))))), state.skips, state.valid)
