"""Stages, and parts of them, that several trunks share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from seqgraft.models.base import Stage, State, Step

__all__ = ["Crop", "max_pool", "rotary_frequencies", "rotated"]


class Crop(Stage):
    """Drops bins at both ends."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.steps = (Step("crop", bins),)

    def forward(self, state: State) -> State:
        kept = slice(self.bins, state.x.shape[-1] - self.bins)
        return State(state.x[..., kept], state.skips, None if state.valid is None else state.valid[:, kept])


def max_pool(state: State, size: int) -> State:
    """Max pooling that ignores padding; a position is valid if any base under it is."""
    if state.valid is None:
        return State(functional.max_pool1d(state.x, size), state.skips)
    pooled = functional.max_pool1d(state.masked(float("-inf")), size)
    valid = functional.max_pool1d(state.valid[:, None].float(), size)[:, 0] > 0
    return State(pooled.masked_fill(~valid[:, None], 0.0), state.skips, valid)


def rotary_frequencies(size: int, base: float, device: torch.device | None = None) -> Tensor:
    """Radians per position ``base ** (-2i / size)``, i = 0..size/2 - 1, of the planes that are rotated, in float32.

    Su et al. 2021, "RoFormer: enhanced transformer with rotary position embedding", section 3.2.2.
    """
    return 1.0 / base ** (torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """``x`` ``(..., n, size)`` with plane i of position p, its numbers i and i + planes, turned by ``angles[p, i]``.

    As flash-attention's rotary embedding that does not interleave: in float32 or better, and what exceeds the
    planes stays. ``angles``: ``(n, planes)``.
    """
    planes = angles.shape[-1]
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x[..., :planes], x[..., planes : 2 * planes], x[..., 2 * planes :]
    turned = [first * cos - second * sin, first * sin + second * cos]
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)
