"""Stages that several trunks share."""

from __future__ import annotations

from torch.nn import functional

from seqgraft.models.base import Stage, State, Step

__all__ = ["Crop", "max_pool"]


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
