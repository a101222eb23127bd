"""The number that an attribution explains: which tracks, which bins, and how they become one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from seqgraft.data.dataset import Dataset, DatasetInfo
from seqgraft.errors import ConfigError, DataError
from seqgraft.genes import gene_bins
from seqgraft.models.base import Span
from seqgraft.tracks import TrackTable

__all__ = ["Reader", "Site", "Target", "sites_of"]

_TINY = 1e-6  # added below the logarithm beside the pseudocount, as Baskerville does


@dataclass(frozen=True)
class Target:
    """The number that is explained, of the predictions of one window.

    With r the raw (unsquashed) predictions and s the sum of r over the bins that count:

    * "log": ``log(mean over tracks of s + pseudocount + 1e-6)``, Baskerville's formula for genes. With ``minus``, the
      mean over ``tracks`` of ``log(s + pseudocount + 1e-6)`` less the same mean over ``minus``.
    * "sum": the mean over tracks of s, less that over ``minus``; for labels the predicted label.
    * "logits": as "sum", of the values before the link, which do not saturate; by gradients only.
    * "auto": "log" for coverage, "sum" for labels.

    Attributes:
        tracks: names; ``*`` stands for any letters.
        minus: names of the tracks to contrast them with.
        each: every track is a number of its own, rather than their mean.
    """

    tracks: tuple[str, ...] = ("*",)
    minus: tuple[str, ...] = ()
    each: bool = False
    statistic: Literal["auto", "log", "sum", "logits"] = "auto"
    pseudocount: float = 0.0

    def __post_init__(self) -> None:
        if not self.tracks:
            raise ConfigError("names no track", where="target: tracks", remedy="Leave it out for all of them")
        if self.each and self.minus:
            remedy = "Ask for one contrast, or for each track"
            raise ConfigError("a contrast is one number", list(self.minus), where="target: each", remedy=remedy)
        if not self.pseudocount >= 0:
            raise ConfigError("must be 0 or more", self.pseudocount, where="target: pseudocount")

    def reader(self, tracks: TrackTable, bins: int, strand: str = ".") -> Reader:
        """What reads the number; on the ``strand`` of a gene the strand pairs count with their track of that strand.

        Raises:
            ConfigError: a name that no track has; a logarithm of labels.
        """
        chosen = [
            _matching(names, tracks, strand, key) for key, names in (("tracks", self.tracks), ("minus", self.minus))
        ]
        statistic = self.statistic if self.statistic != "auto" else "sum" if bins == 1 else "log"
        links = {str(tracks.frame["link"].iloc[i]) for part in chosen for i in part}
        if statistic == "log" and "identity" in links:
            remedy = "Set target.statistic to sum"
            raise ConfigError("values of the link identity may be negative", statistic, where="target", remedy=remedy)
        names = tracks.names
        if self.each:
            return Reader(
                tuple(names[i] for i in chosen[0]), tuple((i,) for i in chosen[0]), (), statistic, self.pseudocount
            )
        sides = [_few([names[i] for i in part]) for part in chosen if part]
        return Reader((" - ".join(sides),), (tuple(chosen[0]),), tuple(chosen[1]), statistic, self.pseudocount)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, ..., {names[-1]} ({len(names)} tracks)"


def _matching(patterns: Sequence[str], tracks: TrackTable, strand: str, key: str) -> list[int]:
    found: list[int] = []
    for pattern in patterns:
        named = [i for i, name in enumerate(tracks.names) if name == pattern or fnmatchcase(name, pattern)]
        if not named:
            remedy = f"The tracks are {', '.join(tracks.names)}"
            raise ConfigError("no track has the name", pattern, where=f"target: {key}", remedy=remedy)
        found += [i for i in named if i not in found]
    if strand in "+-":
        found = [i for i in found if tracks.strands[i] in (strand, ".")]
        if patterns and not found:
            remedy = "Name the tracks of both strands; each gene reads those of its own"
            raise ConfigError(
                f"no track is of the strand {strand} of a gene", list(patterns), where=f"target: {key}", remedy=remedy
            )
    return found


@dataclass(frozen=True)
class Reader:
    """Numbers of a window: ``names``, the tracks whose mean each is, and those that the only one is contrasted with."""

    names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    minus: tuple[int, ...]
    statistic: str
    pseudocount: float

    def __call__(self, values: Tensor, weights: Tensor, log: Callable[[Tensor], Tensor] = torch.log) -> Tensor:
        """``(..., numbers)`` of raw values (or those before the link) ``(..., tracks, bins)``; weights ``(bins,)``."""
        sums, added = (values * weights).sum(-1), self.pseudocount + _TINY
        if self.statistic == "log" and self.minus:
            sums = log(sums + added)
        means = torch.stack([sums[..., list(group)].mean(-1) for group in self.groups], dim=-1)
        if self.minus:
            return means - sums[..., list(self.minus)].mean(-1, keepdim=True)
        return log(means + added) if self.statistic == "log" else means


@dataclass(frozen=True)
class Site:
    """What is read of a region: the number, and the share of each bin that counts, float64 ``(bins,)``."""

    reader: Reader
    weights: Tensor

    @property
    def bins(self) -> Span:
        """From the first bin that counts to the last."""
        where = self.weights.nonzero()
        return int(where[0]), int(where[-1]) + 1


def sites_of(dataset: Dataset, tracks: TrackTable, target: Target, exons: pd.DataFrame | None = None) -> list[Site]:
    """What is read of each region: the exon bins of its gene, the bins that its interval touches, or all.

    Raises:
        ConfigError: an unknown track; genes for data that have no bins of a genome.
        DataError: a region that is no gene, or whose gene is not in it.
    """
    info, regions = dataset.info, dataset.regions
    if exons is not None:
        if dataset.genome is None or info.bins == 1:
            remedy = "Give regions of a genome to a run of coverage, or leave genes out"
            raise ConfigError("only coverage of a genome has genes' bins", where="genes", remedy=remedy)
        weights, strands = zip(*[_gene(exons, regions.iloc[row], info) for row in range(len(regions))], strict=True)
        readers = {strand: target.reader(tracks, info.bins, strand) for strand in set(strands)}
        return [Site(readers[s], torch.from_numpy(w)) for s, w in zip(strands, weights, strict=True)]
    reader = target.reader(tracks, info.bins)
    if info.bins == 1 or "bed_start" not in regions:
        return [Site(reader, torch.ones(info.bins, dtype=torch.float64))] * len(regions)
    edges = regions["start"].to_numpy()[:, None] + np.arange(info.bins) * info.bin_size
    touched = (edges < regions["bed_end"].to_numpy()[:, None]) & (
        edges + info.bin_size > regions["bed_start"].to_numpy()[:, None]
    )
    return [Site(reader, torch.from_numpy(row.astype(np.float64))) for row in touched]


def _gene(exons: pd.DataFrame, region: pd.Series[str], info: DatasetInfo) -> tuple[npt.NDArray[np.float64], str]:
    """The share of each bin of a region that its gene counts, and the gene's strand."""
    name, where = str(region["name"]), f"region {region['name']}"
    known = exons.loc[(exons["gene_id"] == name) | (exons["gene_name"] == name), "gene_id"].unique()
    if len(known) != 1:
        what = "the region's name is no gene of the GTF" if not len(known) else "several genes have the region's name"
        raise DataError(what, name, where=where, remedy="Put the gene_id into column 4 of the BED")
    spans = exons.groupby("gene_id").agg(chrom=("chrom", "first"), start=("start", "min"), end=("end", "max"))
    near = (spans["chrom"] == region["chrom"]) & (spans["start"] < region["end"]) & (spans["end"] > region["start"])
    if not near[known[0]]:
        remedy = "Centre the region on the gene"
        raise DataError("the gene lies outside the region's bins", name, where=where, remedy=remedy)
    found = gene_bins(exons[exons["gene_id"].isin(near.index[near])], region.to_frame().T, info.bins, info.bin_size)
    weights = np.zeros(info.bins)
    for _, index, share in found.of(str(known[0])):
        weights[index] = share
    if not weights.any():
        skipped = found.skipped.set_index("gene_id")["reason"]
        remedy = "Centre the region on the gene, or use a run with longer windows"
        raise DataError(f"the gene's exons cannot be read: {skipped[known[0]]}", name, where=where, remedy=remedy)
    genes = found.genes.set_index("gene_id")
    return weights, str(genes.loc[known[0], "strand"])
