"""The Borzoi family: Borzoi, Borzoi-lite and every network that Baskerville's ``params.json`` describes in those terms.

::

    bases (b, 4, L) -> stem /2 -> tower_0 /2 ... tower_(n-1) /2 -> transformer_* -> upsample_* x2 -> crop -> final
                                     |___________ skips, before pooling _____________|

Linder, Srivastava, Yuan, Agarwal & Kelley 2025, "Predicting RNA-seq coverage from DNA sequence as a unifying model of
gene regulation". Written from the specification in section 3 of the project's facts page on Baskerville, and
compared with its outputs. Where the whole window is sequence, this is that network; where it ends in padding, the
padding is masked in convolutions, pooling and attention, which the original does not know.

Flashzoi (Hingerl, Karollus & Gagneur 2024, "Flashzoi: an enhanced Borzoi model for accelerated genomic analysis") is
the same network with rotary positions in attention, the settings ``FLASHZOI``. Without padding it runs whatever kernel
torch's ``scaled_dot_product_attention`` chooses: on a GPU in half precision that is flash attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from seqgraft.errors import ModelError
from seqgraft.models.base import Span, Stage, State, Step, Trunk, TrunkSpec
from seqgraft.models.stages import Crop, max_pool, rotary_frequencies, rotated

__all__ = ["FLASHZOI", "Borzoi", "bucket_rows", "relative_attention"]

_NORM_EPSILON = 1e-3
#: Queries whose attention is computed at a time: memory is this many times the positions, not their square.
_CHUNK = 512
#: The same on a CPU, whose cache then holds their scores: twice as fast.
_CPU_CHUNK = 128
_TOWER = (608, 736, 896, 1056, 1280, 1536)
#: The settings in which Flashzoi differs from Borzoi.
FLASHZOI: Mapping[str, Any] = {"attention": "rotary", "key_heads": 4, "key_size": 192}


class Borzoi(Trunk):
    """A trunk of the Borzoi family; the defaults are Borzoi itself, of 171 million parameters.

    Args:
        stem: channels of the first convolution.
        stem_kernel: its width.
        tower: channels of each stage of the tower; the transformer works at ``2**(1 + len(tower))`` bp.
        tower_kernel: width of their convolutions.
        blocks: transformer blocks.
        heads: of their attention; the width of a head's values is ``tower[-1] / heads``.
        key_size: width of a head's queries and keys.
        key_heads: heads of keys and values, each of which serves ``heads / key_heads`` heads of queries (grouped-query
            attention), with rotary attention. 0: as many as ``heads``.
        attention: "relative", learned relative positions; or "rotary", rotations of queries and keys, and biases.
        rotary_size: how many numbers of a head's queries and keys are rotated, an even number.
        rotary_base: ratio of the longest wavelength to the shortest, nearly.
        position_features: central masks of the relative positions, and as many again that have a sign: an even number.
        positions: positions of the transformer in the window of training. They fix the widths of the central masks, so
            that other windows keep the scale of positions. Rotations are functions of the distance in bp as they are.
        upsample_kernel: width of the convolutions of the way up.
        upsample_conv: whether the lower resolution passes a dense layer before it is joined with the skip.
        final: channels of the last convolution, or 0 for none.
        gelu: "tanh", as Borzoi was trained; or "exact", as Baskerville's networks with Houlsby, LoCon and IA3 adapters.
        dropout: after attention and inside the feed-forward layers, in training.
        attention_dropout: of the weights of attention. position_dropout: of the features of each distinct relation.
        final_dropout: after the last convolution.
        bin_size: bp per output bin, a power of two from the tower's first resolution on.
        crop: bins dropped at each end.

    Raises:
        ModelError: sizes that make no network.
    """

    label_bin_size: ClassVar[int] = 32

    def __init__(
        self,
        stem: int = 512,
        stem_kernel: int = 15,
        tower: Sequence[int] = _TOWER,
        tower_kernel: int = 5,
        blocks: int = 8,
        heads: int = 8,
        key_size: int = 64,
        key_heads: int = 0,
        attention: Literal["relative", "rotary"] = "relative",
        rotary_size: int = 128,
        rotary_base: float = 20000.0,
        position_features: int = 32,
        positions: int = 4096,
        upsample_kernel: int = 3,
        upsample_conv: bool = True,
        final: int = 1920,
        gelu: Literal["tanh", "exact"] = "tanh",
        dropout: float = 0.2,
        attention_dropout: float = 0.05,
        position_dropout: float = 0.01,
        final_dropout: float = 0.1,
        bin_size: int = 32,
        crop: int = 0,
    ) -> None:
        super().__init__()
        self.settings = {
            name: list(value) if name == "tower" else value
            for name, value in locals().items()
            if name in self.defaults()
        }
        tower, width = tuple(tower), tower[-1] if tower else 0
        resolutions = [2 ** (i + 2) for i in range(len(tower))]
        _check(self.settings, resolutions, bin_size)
        self.stride = resolutions[-1]
        ups = len(resolutions) - 1 - resolutions.index(bin_size)
        first = len(tower) - ups  # of the stages of the tower whose convolutions the way up reads
        stages: dict[str, Stage] = {"stem": _Stem(stem, stem_kernel)}
        for i, (before, after) in enumerate(zip((stem, *tower), tower, strict=False)):
            stages[f"tower_{i}"] = _Tower(before, after, tower_kernel, gelu, f"tower_{i}" if i >= first else None)
        for i in range(blocks):
            stages[f"transformer_{i}"] = _Block(
                width,
                _Attention(width, heads, key_size, position_features, positions, attention_dropout, position_dropout)
                if attention == "relative"
                else _Rotary(width, heads, key_heads or heads, key_size, rotary_size, rotary_base, attention_dropout),
                dropout,
            )
        for i in range(ups):
            skip = len(tower) - 1 - i
            stages[f"upsample_{i}"] = _Upsample(
                width, tower[skip], upsample_kernel, upsample_conv, gelu, f"tower_{skip}"
            )
        stages["crop"] = Crop(crop)
        stages["final"] = _Final(width, final, gelu, final_dropout)
        self.stages = nn.ModuleDict(stages)
        self.spec = TrunkSpec(name="borzoi", channels=final or width, bin_size=bin_size, sites=self._sites())
        self._initialise()

    def _sites(self) -> dict[str, tuple[str, ...]]:
        """ "conv" is what Baskerville adapts as such: its Conv1D layers; those of the way up are "upsample"."""
        ends = {
            "attention": (".query", ".key", ".value", ".output"),
            "feedforward": (".up", ".down"),
            "conv": (".conv",),
            "upsample": (".below", ".lateral", ".pointwise"),
            "norm": (".norm", ".lateral_norm", ".attention_norm", ".feedforward_norm"),
        }
        ends |= {f"{site}{end}": (end,) for site in ("attention", "feedforward") for end in ends[site]}
        return {
            site: tuple(name for name, _ in self.named_modules() if name.endswith(end)) for site, end in ends.items()
        }

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights of variance 1 / inputs in convolutions and 2 / inputs in the transformer, zero biases.

        The original starts the attention's output at zero; here it starts as any other layer does, so that adapters of
        a random trunk have gradients.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                gain = 2.0 if isinstance(module, nn.Linear) else 1.0
                nn.init.normal_(module.weight, std=math.sqrt(gain / module.weight[0].numel()))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, _Attention):
                for bias in (module.content_bias, module.position_bias):
                    nn.init.normal_(bias, std=math.sqrt(1 / bias.shape[-1]))


def _check(settings: dict[str, Any], resolutions: list[int], bin_size: int) -> None:
    if not resolutions or bin_size not in resolutions:
        remedy = f"Choose one of {resolutions}" if resolutions else "Give the channels of at least one stage"
        raise ModelError("the trunk cannot give bins of this size", bin_size, where="borzoi", remedy=remedy)
    if settings["tower"][-1] % settings["heads"]:
        what = "the channels of the last stage of the tower must be a multiple of the heads"
        raise ModelError(what, (settings["tower"][-1], settings["heads"]), where="borzoi")
    if settings["attention"] not in ("relative", "rotary"):
        raise ModelError("attention must be 'relative' or 'rotary'", settings["attention"], where="borzoi")
    if settings["attention"] == "relative" and settings["key_heads"] not in (0, settings["heads"]):
        what = "relative attention has as many heads of keys as of queries"
        raise ModelError(what, settings["key_heads"], where="borzoi", remedy="Leave key_heads out")
    if settings["heads"] % (settings["key_heads"] or settings["heads"]):
        what = "the heads must be a multiple of the heads of keys and values"
        raise ModelError(what, (settings["heads"], settings["key_heads"]), where="borzoi")
    turned = settings["rotary_size"]
    if settings["attention"] == "rotary" and (turned % 2 or not 2 <= turned <= settings["key_size"]):
        remedy = f"It is at most key_size, {settings['key_size']}"
        raise ModelError("rotary_size must be even and fit the keys", turned, where="borzoi", remedy=remedy)
    if settings["position_features"] % 2 or settings["position_features"] < 2:
        raise ModelError("position_features must be even", settings["position_features"], where="borzoi")
    if settings["gelu"] not in ("tanh", "exact"):
        raise ModelError("gelu must be 'tanh' or 'exact'", settings["gelu"], where="borzoi")
    for name in ("stem_kernel", "tower_kernel", "upsample_kernel"):
        if settings[name] % 2 == 0:
            raise ModelError(f"{name} must be odd", settings[name], where="borzoi")


class _Gelu(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.approximate = "tanh" if kind == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x, approximate=self.approximate)


def _norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=_NORM_EPSILON)


class _Stem(Stage):
    """A wide convolution on the bases, then max pooling by 2."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, channels, kernel, padding=kernel // 2)
        self.steps = (Step("conv", kernel), Step("pool", 2))

    def forward(self, state: State) -> State:
        return max_pool(State(self.conv(state.masked()), state.skips, state.valid), 2)


class _Tower(Stage):
    """BatchNorm, GELU, convolution; kept for the way up if ``skip`` names it; max pooling by 2."""

    def __init__(self, before: int, after: int, kernel: int, gelu: str, skip: str | None) -> None:
        super().__init__()
        self.norm, self.gelu = _norm(before), _Gelu(gelu)
        self.conv = nn.Conv1d(before, after, kernel, padding=kernel // 2)
        self.steps = (Step("conv", kernel), Step("pool", 2))
        self.skip = skip
        self.writes = {skip: 1} if skip else {}

    def forward(self, state: State) -> State:
        x = self.conv(State(self.gelu(self.norm(state.x)), valid=state.valid).masked())
        skips = {**state.skips, self.skip: x} if self.skip else state.skips
        return max_pool(State(x, skips, state.valid), 2)


class _Block(Stage):
    """A pre-norm transformer block, with ReLU between the feed-forward layers; global."""

    def __init__(self, channels: int, attention: _Attention | _Rotary, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(channels, eps=_NORM_EPSILON)
        self.attention = attention
        self.feedforward_norm = nn.LayerNorm(channels, eps=_NORM_EPSILON)
        self.up = nn.Linear(channels, 2 * channels)
        self.down = nn.Linear(2 * channels, channels)

    def forward(self, state: State) -> State:
        return self.at(state, (0, state.x.shape[-1]))

    def at(self, state: State, span: Span) -> State:
        """The queries ``span`` on all keys."""
        drop = partial(functional.dropout, p=self.dropout, training=self.training)
        x = state.x.transpose(1, 2).contiguous()  # once: the blocks after it find it so
        x = x[:, slice(*span)] + drop(self.attention(self.attention_norm(x), state.valid, span))
        x = x + drop(self.down(drop(functional.relu(self.up(self.feedforward_norm(x))))))
        return State(x.transpose(1, 2), state.skips, None if state.valid is None else state.valid[:, slice(*span)])


class _Attention(nn.Module):
    """softmax(((q + u) k + (q + v) r(j - i))) v, with q scaled, r linear in position features, u and v learned."""

    def __init__(
        self,
        channels: int,
        heads: int,
        key_size: int,
        features: int,
        positions: int,
        attention_dropout: float,
        position_dropout: float,
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.position_dropout = heads, attention_dropout, position_dropout
        self.widths = mask_widths(features // 2, positions)
        self.query = nn.Linear(channels, heads * key_size, bias=False)
        self.key = nn.Linear(channels, heads * key_size, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.position = nn.Linear(features, heads * key_size, bias=False)
        self.output = nn.Linear(channels, channels)
        self.content_bias = nn.Parameter(torch.zeros(1, heads, 1, key_size))
        self.position_bias = nn.Parameter(torch.zeros(1, heads, 1, key_size))

    def forward(self, x: Tensor, valid: Tensor | None, span: Span) -> Tensor:
        """``(batch, n, channels)`` to the positions ``span`` of the same."""
        batch, n, channels = x.shape
        start, stop = span
        query, key, value = (
            layer(y).view(batch, y.shape[1], self.heads, -1).transpose(1, 2)
            for layer, y in ((self.query, x[:, start:stop]), (self.key, x), (self.value, x))
        )
        query = query * query.shape[-1] ** -0.5
        features, rows = bucket_rows(n, self.widths, x.device)
        features = functional.dropout(features.to(x.dtype), self.position_dropout, self.training)
        relative = self.position(features).view(len(features), self.heads, -1).permute(1, 2, 0)
        dropout = self.dropout if self.training else 0.0
        pairs = (query + self.content_bias, query + self.position_bias)
        mixed = relative_attention(*pairs, key, value, relative, rows, valid, dropout, start)
        attended: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, stop - start, channels))
        return attended


class _Rotary(nn.Module):
    """softmax(q k / sqrt(key size)) v, q and k rotated by angles proportional to their positions; all with biases.

    Keys and values have fewer heads: head h of the queries reads head ``h // (heads / key_heads)`` of them. They are
    repeated rather than left to the kernel to share, which not every one of them can.
    """

    def __init__(
        self, channels: int, heads: int, key_heads: int, key_size: int, turned: int, base: float, dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.key_heads, self.dropout = heads, key_heads, dropout
        self.turned, self.base = turned, base
        self.query = nn.Linear(channels, heads * key_size)
        self.key = nn.Linear(channels, key_heads * key_size)
        self.value = nn.Linear(channels, key_heads * (channels // heads))
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor, valid: Tensor | None, span: Span) -> Tensor:
        """``(batch, n, channels)`` to the positions ``span`` of the same."""
        batch, n, channels = x.shape
        start, stop = span
        query, key, value = (
            layer(y).view(batch, y.shape[1], heads, -1).transpose(1, 2)
            for layer, heads, y in (
                (self.query, self.heads, x[:, start:stop]),
                (self.key, self.key_heads, x),
                (self.value, self.key_heads, x),
            )
        )
        positions = torch.arange(n, device=x.device, dtype=torch.float32)
        angles = torch.outer(positions, rotary_frequencies(self.turned, self.base, x.device))
        query, key = rotated(query, angles[start:stop]), rotated(key, angles)
        key, value = (each.repeat_interleave(self.heads // self.key_heads, dim=1) for each in (key, value))
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if valid is None else valid[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, stop - start, channels))
        return attended


def mask_widths(count: int, positions: int) -> tuple[float, ...]:
    """Widths r^i - 1, i = 1..count, of the central masks, in float32, with r = (positions + 1)^(1 / count)."""
    ratio = np.exp(np.log(np.float64(positions + 1)) / count).astype(np.float32)
    widths = ratio ** np.arange(1, count + 1, dtype=np.float32) - np.float32(1)
    return tuple(float(width) for width in widths)


def bucket_rows(n: int, widths: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """The distinct rows of the position features, and which of them each distance has.

    The features of a distance d = j - i are whether each width exceeds abs(d), and that times the sign of d. So they
    depend on the sign and on how many widths do not exceed abs(d) alone: 2 (widths + 1) + 1 rows for any window.

    Returns:
        Features ``(rows, 2 * widths)``, and the row ``(2n - 1,)`` of the distances -(n-1)..n-1.
    """
    count = len(widths)
    distance = torch.arange(1 - n, n, device=device)
    passed = torch.searchsorted(torch.tensor(widths, device=device), distance.abs().float(), right=True)
    rows = torch.where(distance == 0, 0, 1 + 2 * passed + (distance > 0))
    exceeding = torch.arange(count, device=device) >= torch.arange(count + 1, device=device)[:, None]
    masks = torch.cat([torch.ones(1, count, device=device), exceeding.float().repeat_interleave(2, dim=0)])
    sign = torch.cat([torch.zeros(1, device=device), torch.tensor([-1.0, 1.0], device=device).repeat(count + 1)])
    return torch.cat([masks, sign[:, None] * masks], dim=1), rows


def relative_attention(
    content: Tensor,
    position: Tensor,
    key: Tensor,
    value: Tensor,
    relative: Tensor,
    rows: Tensor,
    valid: Tensor | None = None,
    dropout: float = 0.0,
    first: int = 0,
) -> Tensor:
    """softmax(content key + position relative[row of j - i]) value, exactly, a few hundred queries at a time.

    Each chunk is computed again in the backward pass instead of being kept, if there are several.

    Args:
        content, position: queries for the two terms, ``(batch, heads, m, key size)``.
        key, value: ``(batch, heads, n, size)``.
        relative: ``(heads, key size, rows)``.
        rows: the row of each distance j - i = -(n-1)..n-1, ``(2n - 1,)``.
        valid: ``(batch, n)``, False for keys that are padding.
        dropout: of the weights.
        first: position of the first query.

    Returns:
        ``(batch, heads, m, value size)``.
    """
    n = key.shape[2]
    which = rows.unfold(0, n, 1)  # (n, n): row n - 1 - i has the distances to query i
    transposed = key.transpose(2, 3)

    def chunk(
        content: Tensor, position: Tensor, transposed: Tensor, value: Tensor, relative: Tensor, at: int
    ) -> Tensor:
        size = content.shape[2]
        # The last query first, as the rows of `which` are: so it stays a view of 2n - 1 numbers, which a cache holds.
        index = which[n - first - at - size : n - first - at].expand(*content.shape[:2], size, n)
        logits = content.flip(2) @ transposed + (position.flip(2) @ relative).gather(-1, index)
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None, :], torch.finfo(logits.dtype).min)
        return (functional.dropout(logits.softmax(-1), dropout) @ value).flip(2)

    again = torch.is_grad_enabled() and n > _CHUNK
    run = partial(checkpoint, chunk, use_reentrant=False) if again else chunk
    step = min(_CHUNK, _CPU_CHUNK) if key.device.type == "cpu" else _CHUNK
    parts = [
        run(content[:, :, at : at + step], position[:, :, at : at + step], transposed, value, relative, at)
        for at in range(0, content.shape[2], step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _Upsample(Stage):
    """Nearest-neighbour upsampling by 2, joined by the tower's tensor of that size, then a separable convolution."""

    def __init__(self, channels: int, lateral: int, kernel: int, dense: bool, gelu: str, skip: str) -> None:
        super().__init__()
        self.skip, self.reads = skip, {skip: 1}
        self.steps = (Step("up", 2), Step("conv", kernel))
        self.norm, self.lateral_norm, self.gelu = _norm(channels), _norm(lateral), _Gelu(gelu)
        self.below = nn.Conv1d(channels, channels, 1) if dense else None
        self.lateral = nn.Conv1d(lateral, channels, 1)
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.pointwise = nn.Conv1d(channels, channels, 1)

    def forward(self, state: State) -> State:
        valid = None if state.valid is None else state.valid.repeat_interleave(2, dim=1)
        x = self.gelu(self.norm(state.x))
        x = x if self.below is None else self.below(x)
        x = x.repeat_interleave(2, dim=2) + self.lateral(self.gelu(self.lateral_norm(state.skips[self.skip])))
        x = self.pointwise(self.depthwise(State(x, valid=valid).masked()))
        return State(x, {name: value for name, value in state.skips.items() if name != self.skip}, valid)


class _Final(Stage):
    """BatchNorm, GELU and a convolution of width 1, unless it has no channels; then a GELU."""

    steps = (Step("conv", 1),)

    def __init__(self, before: int, channels: int, gelu: str, dropout: float) -> None:
        super().__init__()
        self.dropout, self.gelu = dropout, _Gelu(gelu)
        self.norm = _norm(before) if channels else None
        self.conv = nn.Conv1d(before, channels, 1) if channels else None

    def forward(self, state: State) -> State:
        x = state.x
        if self.norm is not None and self.conv is not None:
            x = functional.dropout(self.conv(self.gelu(self.norm(x))), self.dropout, self.training)
        return State(self.gelu(x), state.skips, state.valid)
