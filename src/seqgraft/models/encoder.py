"""Layers of the transformers that DNA language models are made of: four families, one class.

==============  ============================  ====================  ================  ================================
family          models                        norms                 positions         feed-forward
==============  ============================  ====================  ================  ================================
``bert``        DNABERT, SpeciesLM            after each sublayer   learned vectors   GELU
``esm``         Nucleotide Transformer 1      before each sublayer  learned vectors   GELU
``mosaic``      DNABERT-2, DNABERT-S          after each sublayer   ALiBi             gated by GELU, ``up`` unbiased
``esm_rotary``  Nucleotide Transformer 2      before each sublayer  rotations         gated by SiLU, without biases
==============  ============================  ====================  ================  ================================

BERT: Devlin et al. 2019. ESM: Rives et al. 2021. ALiBi: Press et al. 2022, "Train short, test long". Rotations: Su et
al. 2021, "RoFormer". Gates: Shazeer 2020, "GLU variants improve transformer".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqgraft.models.base import Span, Stage, State
from seqgraft.models.stages import rotary_frequencies, rotated

__all__ = ["FAMILIES", "Family", "Layer", "alibi_slopes"]


@dataclass(frozen=True)
class Family:
    """How the layers of a family differ.

    Attributes:
        norm_first: sublayers are normalised before them, and the last layer's output once more; else each sublayer is
            normalised after it, with its input added.
        positions: "learned" vectors are added to those of the tokens; "alibi" takes from the scores of attention in
            proportion to the distance; "rotary" turns queries and keys. The last two are computed for any length.
        activation: of the feed-forward part.
        gated: ``up`` is twice as wide, and the activation of its first half is multiplied with its second.
        up_bias, down_bias: whether the layers of the feed-forward part have biases.
        drop_inside: dropout stands before ``down``, not after it.
    """

    norm_first: bool
    positions: Literal["learned", "alibi", "rotary"] = "learned"
    activation: Callable[[Tensor], Tensor] = functional.gelu
    gated: bool = False
    up_bias: bool = True
    down_bias: bool = True
    drop_inside: bool = False


FAMILIES: Mapping[str, Family] = {
    "bert": Family(norm_first=False),
    "esm": Family(norm_first=True),
    "mosaic": Family(norm_first=False, positions="alibi", gated=True, up_bias=False, drop_inside=True),
    "esm_rotary": Family(True, "rotary", functional.silu, gated=True, up_bias=False, down_bias=False),
}
_ROTARY_BASE = 10_000.0


class Layer(Stage):
    """A layer of the transformer: attention, then the feed-forward part. Global.

    Args:
        family: see ``FAMILIES``.
        channels, heads, hidden: width, attention heads, width inside the feed-forward part.
        rates: of dropout, and of dropout in attention.
        eps: of the layer norms.
    """

    def __init__(
        self, family: str, channels: int, heads: int, hidden: int, rates: tuple[float, float], eps: float
    ) -> None:
        super().__init__()
        self.heads, self.family = heads, FAMILIES[family]
        self.slopes = alibi_slopes(heads) if self.family.positions == "alibi" else ()
        self.attention_norm = nn.LayerNorm(channels, eps=eps)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.feedforward_norm = nn.LayerNorm(channels, eps=eps)
        self.up = nn.Linear(channels, hidden * (2 if self.family.gated else 1), bias=self.family.up_bias)
        self.down = nn.Linear(hidden, channels, bias=self.family.down_bias)
        self.dropout, self.attention_dropout = (nn.Dropout(rate) for rate in rates)

    def forward(self, state: State) -> State:
        return self.at(state, (0, state.x.shape[-1]))

    def at(self, state: State, span: Span) -> State:
        """The queries ``span`` on all keys."""
        within, x = slice(*span), state.x.transpose(1, 2)
        if self.family.norm_first:
            x = x[:, within] + self._attend(self.attention_norm(x), state.valid, span)
            x = x + self._feed(self.feedforward_norm(x))
        else:
            x = self.attention_norm(x[:, within] + self._attend(x, state.valid, span))
            x = self.feedforward_norm(x + self._feed(x))
        return State(x.transpose(1, 2), state.skips, None if state.valid is None else state.valid[:, within])

    def _attend(self, x: Tensor, valid: Tensor | None, span: Span) -> Tensor:
        """softmax(q k / sqrt(width) - slope * distance) v of the queries ``span``; ``x``: ``(batch, n, channels)``."""
        batch, n, channels = x.shape
        within = slice(*span)
        query, key, value = (
            layer(y).view(batch, -1, self.heads, channels // self.heads).transpose(1, 2)
            for layer, y in ((self.query, x[:, within]), (self.key, x), (self.value, x))
        )
        if self.family.positions == "rotary":
            positions = torch.arange(n, device=x.device, dtype=torch.float32)
            frequencies = rotary_frequencies(channels // self.heads, _ROTARY_BASE, x.device)
            angles = torch.outer(positions, frequencies)
            query, key = rotated(query, angles[within]), rotated(key, angles)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self._mask(n, valid, span, query),
            dropout_p=self.attention_dropout.p if self.attention_dropout.training else 0.0,
        )
        attended: Tensor = self.dropout(self.output(mixed.transpose(1, 2).reshape(batch, -1, channels)))
        return attended

    def _mask(self, n: int, valid: Tensor | None, span: Span, like: Tensor) -> Tensor | None:
        """What is added to the scores, or which keys are there: ``(batch or 1, heads or 1, queries or 1, n)``."""
        keys = None if valid is None else valid[:, None, None, :]
        if not self.slopes:
            return keys
        at = torch.arange(n, device=like.device)
        distance = (at[slice(*span), None] - at[None]).abs()
        bias = torch.tensor(self.slopes, device=like.device)[:, None, None] * -distance
        bias = bias.to(like.dtype)[None]
        return bias if keys is None else bias.masked_fill(~keys, float("-inf"))

    def _feed(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if not self.family.gated:
            inner = self.family.activation(x)
        else:
            first, second = x.chunk(2, dim=-1)
            inner = self.family.activation(first) * second
        inside = self.family.drop_inside
        fed: Tensor = self.down(self.dropout(inner)) if inside else self.dropout(self.down(inner))
        return fed


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Of each head: 2^(-8 i / heads), i = 1..heads, for a power of two.

    Other numbers have those of the next lower power of two, and then the first, third, ... of twice that power, as in
    the code of Press et al. 2022.
    """
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)]
    between = [2.0 ** (-4 * i / whole) for i in range(1, 2 * whole + 1, 2)]
    return tuple([*slopes, *between][:heads])
