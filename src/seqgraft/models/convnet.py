"""The native trunk: a small convolutional tower, a relative-position transformer and a U-net-like way back up.

Sized by three numbers. It is also the example to read before writing a trunk: a chain of stages, each of which says
whether it is local, and a spec that names the sites where adapters can go.

::

    bases (b, 4, L) -> stem /4 -> tower_0 /2 ... tower_(depth-1) /2 -> transformer_* -> upsample_* x2 -> final -> crop
                                     |___________ skips _________________________________|

Local stages come first, so an edit of the sequence changes few positions before the transformer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqgraft.errors import ModelError
from seqgraft.models.base import Span, Stage, State, Step, Trunk, TrunkSpec
from seqgraft.models.stages import Crop, max_pool

__all__ = ["ConvNet"]

_STEM_POOL = 4


class ConvNet(Trunk):
    """A trunk of 0.2 to 2 million parameters.

    Args:
        channels: width of every layer.
        depth: stages of the tower; the transformer works at ``4 * 2**depth`` bp.
        blocks: transformer blocks.
        bin_size: bp per output bin: 4 times a power of two, at most the transformer's resolution.
        crop: bins dropped at each end of the output, so that each kept bin has context.

    Raises:
        ModelError: a bin size that the tower cannot give.
    """

    def __init__(self, channels: int = 96, depth: int = 4, blocks: int = 2, bin_size: int = 16, crop: int = 0) -> None:
        super().__init__()
        resolutions = [_STEM_POOL * 2**i for i in range(depth + 1)]
        if bin_size not in resolutions:
            raise ModelError(
                "the trunk cannot give bins of this size",
                bin_size,
                where="convnet",
                remedy=f"Choose one of {resolutions}",
            )
        if channels % 16 or channels < 16:
            raise ModelError("the number of channels must be a multiple of 16, 16 or more", channels, where="convnet")
        self.settings = {"channels": channels, "depth": depth, "blocks": blocks}
        self.stride = resolutions[-1]
        ups = depth - resolutions.index(bin_size)
        stages: dict[str, Stage] = {"stem": _Stem(channels)}
        for i in range(depth):
            stages[f"tower_{i}"] = _Tower(channels, skip=f"tower_{i}" if i >= depth - ups else None)
        for i in range(blocks):
            stages[f"transformer_{i}"] = _Block(channels, heads=channels // 16)
        for i in range(ups):
            stages[f"upsample_{i}"] = _Upsample(channels, skip=f"tower_{depth - 1 - i}")
        stages["final"] = _Final(channels)
        stages["crop"] = Crop(crop)
        self.stages = nn.ModuleDict(stages)
        self.spec = TrunkSpec(name="convnet", channels=channels, bin_size=bin_size, sites=self._sites())

    def _sites(self) -> dict[str, tuple[str, ...]]:
        ends = {
            "attention": (".query", ".key", ".value", ".output"),
            "feedforward": (".up", ".down"),
            "conv": (".conv",),
            "norm": (".norm", ".attention_norm", ".feedforward_norm"),
        }
        ends |= {f"{site}{end}": (end,) for site in ("attention", "feedforward") for end in ends[site]}
        return {
            site: tuple(name for name, _ in self.named_modules() if name.endswith(end)) for site, end in ends.items()
        }


class _Stem(Stage):
    """A wide convolution on the bases, then max pooling by 4."""

    steps = (Step("conv", 15), Step("pool", _STEM_POOL))

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, channels, 15, padding=7)

    def forward(self, state: State) -> State:
        return max_pool(State(self.conv(state.masked()), state.skips, state.valid), _STEM_POOL)


class _Tower(Stage):
    """BatchNorm, GELU, convolution, added to its input; kept for the way up if ``skip`` names it; max pooling by 2."""

    steps = (Step("conv", 5), Step("pool", 2))

    def __init__(self, channels: int, skip: str | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.conv = nn.Conv1d(channels, channels, 5, padding=2)
        self.skip = skip
        self.writes = {skip: 1} if skip else {}

    def forward(self, state: State) -> State:
        x = functional.gelu(self.norm(state.x))
        x = state.x + self.conv(State(x, valid=state.valid).masked())
        skips = {**state.skips, self.skip: x} if self.skip else state.skips
        return max_pool(State(x, skips, state.valid), 2)


class _Block(Stage):
    """A pre-norm transformer block with relative positions; global."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.position = nn.Linear(_POSITION_FEATURES, channels, bias=False)
        self.output = nn.Linear(channels, channels)
        self.feedforward_norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 2 * channels)
        self.down = nn.Linear(2 * channels, channels)

    def forward(self, state: State) -> State:
        return self.at(state, (0, state.x.shape[-1]))

    def at(self, state: State, span: Span) -> State:
        """The queries ``span`` on all keys."""
        within, x = slice(*span), state.x.transpose(1, 2)
        x = x[:, within] + self._attend(self.attention_norm(x), state.valid, within)
        x = x + self.down(functional.gelu(self.up(self.feedforward_norm(x))))
        return State(x.transpose(1, 2), state.skips, None if state.valid is None else state.valid[:, within])

    def _attend(self, x: Tensor, valid: Tensor | None, within: slice = slice(None)) -> Tensor:
        """softmax((q k + q r(j - i)) / sqrt(width)) v, with r linear in position features, of the queries ``within``.

        ``x`` is ``(batch, n, channels)``.
        """
        batch, n, channels = x.shape
        query, key, value = (
            layer(y).view(batch, -1, self.heads, channels // self.heads).transpose(1, 2)
            for layer, y in ((self.query, x[:, within]), (self.key, x), (self.value, x))
        )
        scale = 1 / math.sqrt(query.shape[-1])
        relative = self.position(_position_features(n, x)).view(2 * n - 1, self.heads, -1).permute(1, 2, 0)
        distance = torch.arange(n, device=x.device)
        index = (distance[None, :] - distance[within, None] + n - 1).expand(batch, self.heads, -1, n)
        bias = (query @ relative).gather(-1, index) * scale
        if valid is not None:
            bias = bias.masked_fill(~valid[:, None, None, :], float("-inf"))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        attended: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, -1, channels))
        return attended


_POSITION_FEATURES = 16


def _position_features(n: int, like: Tensor) -> Tensor:
    """``(2n - 1, 16)`` for distances j - i = -(n-1)..n-1: whether within 2**k - 1 positions, and that times the sign.

    A function of the distance alone, so that any window length is right.
    """
    distance = torch.arange(1 - n, n, device=like.device)
    widths = 2 ** torch.arange(_POSITION_FEATURES // 2, device=like.device)
    within = (distance.abs()[:, None] < widths).to(like.dtype)
    return torch.cat([within, within * distance.sign()[:, None]], dim=1)


class _Upsample(Stage):
    """Nearest-neighbour upsampling by 2, joined by the tower's tensor of that resolution, then a convolution."""

    steps = (Step("up", 2), Step("conv", 3))

    def __init__(self, channels: int, skip: str) -> None:
        super().__init__()
        self.skip, self.reads = skip, {skip: 1}
        self.norm = nn.BatchNorm1d(channels)
        self.lateral = nn.Conv1d(channels, channels, 1)
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, state: State) -> State:
        skip = state.skips[self.skip]
        valid = None if state.valid is None else state.valid.repeat_interleave(2, dim=1)
        x = state.x.repeat_interleave(2, dim=2) + self.lateral(functional.gelu(self.norm(skip)))
        x = x + self.conv(State(functional.gelu(x), valid=valid).masked())
        return State(x, {name: value for name, value in state.skips.items() if name != self.skip}, valid)


class _Final(Stage):
    """BatchNorm, GELU and a last mixing of channels per bin."""

    steps = (Step("conv", 1),)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.conv = nn.Conv1d(channels, channels, 1)

    def forward(self, state: State) -> State:
        return State(functional.gelu(self.conv(functional.gelu(self.norm(state.x)))), state.skips, state.valid)
