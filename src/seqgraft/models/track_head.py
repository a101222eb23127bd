"""A track that came with the weights as the head for labels: what it predicts around the middle is the label."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from seqgraft.models.base import Head, SequenceModel, State, apply_link
from seqgraft.sample import Sample
from seqgraft.tracks import TrackTable, unsquash

__all__ = ["TrackHead", "start_track_heads"]


class TrackHead(Head):
    """``scale * log(1 + s) + bias`` for each of the tracks, s a pretrained track's raw signal, summed over the bins.

    The logarithm, since expression and activities are compared by ratios. All of it trains: the track's own weights,
    scales and biases. A stranded track counts with its partner, so that s is the same on both strands.

    Args:
        tracks: of the labels, all of one group.
        channels: features per bin.
        source: the pretrained track, or the two of a strand pair.
        bin_size: bp per bin.
    """

    def __init__(self, tracks: TrackTable, channels: int, source: TrackTable, bin_size: int) -> None:
        super().__init__(source, channels)
        self.source, self.source_link, self.bin_size = source, self.link, bin_size
        self.tracks, self.pool, self.link = tracks, "sum", str(tracks.frame["link"].iloc[0])
        self.scale = nn.Parameter(torch.ones(len(tracks)))
        self.bias = nn.Parameter(torch.zeros(len(tracks)))

    def forward(self, state: State, sample: Sample) -> Tensor:  # noqa: ARG002  (called like other heads)
        """``(batch, tracks, 1)`` before the link."""
        values = apply_link(self.out(state.x).float(), self.source_link)
        signal = unsquash(values, self.source, self.bin_size).clamp(min=0)
        if state.valid is not None:
            signal = signal * state.valid[:, None]
        level = torch.log1p(signal.sum((1, 2)))
        return (level[:, None] * self.scale + self.bias)[..., None]


@torch.no_grad()
def start_track_heads(model: SequenceModel, samples: Iterable[Sample]) -> None:
    """Sets scales and biases so that means and spreads of the values are those of the targets, over some samples.

    Where a link follows, values get mean 0 and spread 1. A spread of 0 leaves the scale at 1.
    """
    heads = [head for head in model.heads.values() if isinstance(head, TrackHead)]
    if not heads:
        return
    training, device = model.training, next(model.parameters()).device
    model.eval()
    values, targets, known = [], [], []
    for sample in samples:
        values.append(model(sample.to(device))[..., 0].double().cpu())
        targets.append(sample.targets[..., 0].double())
        known.append(sample.mask[..., 0])
    level, truth, there = (torch.cat(parts) for parts in (values, targets, known))
    names = list(model.tracks.names)
    for head in heads:
        for row, name in enumerate(head.tracks.names):
            at = names.index(name)
            own, wanted = level[:, at], truth[there[:, at], at]
            mean, spread = (wanted.mean(), wanted.std(correction=0)) if head.link == "identity" else (0.0, 1.0)
            own_spread = own.std(correction=0)
            scale = float(spread / own_spread) if own_spread > 0 and spread > 0 else 1.0
            head.scale[row] = scale
            head.bias[row] = float(mean - scale * own.mean()) if len(wanted) else 0.0
    model.train(training)
