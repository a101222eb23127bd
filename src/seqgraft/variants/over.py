"""What scorers read ("over"): in which window, which bins of it, and which tracks.

All are frozen dataclasses that YAML names by ``kind``. Over genes and regions the window is centred on the gene or
region, whatever the variant, and a variant has one row for each of those whose window it lies in, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from seqgraft.errors import ConfigError, DataError
from seqgraft.genome import Variant, match_chroms, read_bed_on, read_gtf
from seqgraft.variants.place import Layout, Site

__all__ = ["OVERS", "Centre", "Genes", "Over", "Regions", "Sites", "Window"]

#: From a variant to where it is read; a variant may have several sites, or none.
Sites = Callable[[Variant], Sequence[Site]]
Ints = npt.NDArray[np.int64]


class Over(Protocol):
    """What is read; ``columns`` name its further columns of the table ("gene", say), ``files`` what it depends on."""

    kind: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    @property
    def files(self) -> tuple[Path, ...]: ...

    def sites(self, layout: Layout) -> Sites:
        """Where variants are read.

        Raises:
            ConfigError: it does not suit what the model predicts.
            DataError: one of the files is wrong, or does not fit the genome.
        """


@dataclass(frozen=True)
class Centre:
    """The bins that ``width`` bp around the variant's first base touch, in the nearest window of a grid.

    501 bp is what AlphaGenome reads for accessibility. Variants that lie close together share a window.
    """

    width: int = 501
    kind: ClassVar[str] = "centre"
    columns: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[Path, ...]] = ()

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError("must be 1 or more", self.width, where="over: width", remedy="Give a width in bp")

    def sites(self, layout: Layout) -> Sites:
        _needs_bins(layout, self.kind)
        most = layout.target - layout.step - 4 * layout.bin_size
        if self.width > most:
            remedy = f"Give at most {most} bp, or over: {{kind: window}}"
            raise ConfigError("the model's bins do not reach so far", self.width, where="over: width", remedy=remedy)
        size, before = layout.bin_size, (self.width - 1) // 2
        count = -(-(self.width - 1) // size) + 1
        all_but_last, every = np.ones(count), np.ones(count)
        all_but_last[-1] = 0

        def sites(variant: Variant) -> Sequence[Site]:
            start = layout.on_grid(variant)
            left = variant.position - 1 - before - start - layout.margin
            first, last = left // size, (left + self.width - 1) // size
            return [Site(start, (first, first + count), every if last == first + count - 1 else all_but_last)]

        return sites


@dataclass(frozen=True)
class Window:
    """All bins of the window that is centred on the variant; the one bin of a label."""

    kind: ClassVar[str] = "window"
    columns: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[Path, ...]] = ()

    def sites(self, layout: Layout) -> Sites:
        bins, weights = (0, layout.bins), np.ones(layout.bins)
        return lambda variant: [Site(layout.centred(variant), bins, weights)]


@dataclass(frozen=True)
class Genes:
    """The exons of genes: each bin counts by the share of it that exons of the gene cover.

    The window is centred on the gene from its first exon to its last; on its 5' end if that is longer than what the
    model predicts, and then exons beyond do not count. Tracks of a strand pair are read for genes of their
    strand, and are NaN for others (a pair whose names do not tell the strands is read for all). Exons that genes share
    count for each. Genes with exons on several chromosomes or strands are left out, as are those of chromosomes that
    the FASTA lacks.
    """

    gtf: Path
    rename: Mapping[str, str] = field(default_factory=dict)
    kind: ClassVar[str] = "genes"
    columns: ClassVar[tuple[str, ...]] = ("gene",)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.gtf,)

    def sites(self, layout: Layout) -> Sites:
        _needs_bins(layout, self.kind)
        exons = read_gtf(self.gtf, rename=self.rename)
        match_chroms(exons["chrom"].unique(), layout.genome, self.gtf, more=True)
        places = exons.groupby("gene_id")[["chrom", "strand"]].nunique().max(axis=1)
        one = exons["gene_id"].map(places == 1) & exons["chrom"].isin(list(layout.genome.chroms))
        found: list[tuple[str, Site]] = []
        strands = np.array(layout.tracks.strands)
        read = {strand: ~np.isin(strands, list({"+", "-"} - {strand})) for strand in "+-"}
        read["."] = np.ones(len(strands), dtype=np.bool_)
        for gene, rows in exons[one].groupby("gene_id", sort=False):
            spans, strand = rows[["start", "end"]].to_numpy(np.int64), str(rows["strand"].iloc[0])
            start, end = int(spans[:, 0].min()), int(spans[:, 1].max())
            middle = (start + end) // 2 if end - start <= layout.target else (end - 1 if strand == "-" else start)
            site = _site(layout, middle, spans, (str(gene),), read[strand])
            if site is not None:
                found.append((str(rows["chrom"].iloc[0]), site))
        return _looked_up(found, layout)


@dataclass(frozen=True)
class Regions:
    """The intervals of a BED file: each bin counts by the share of it that the interval covers.

    The window is centred on the interval. Its name is the BED's fourth column, or ``chrom:start-end`` (0-based).
    """

    bed: Path
    kind: ClassVar[str] = "regions"
    columns: ClassVar[tuple[str, ...]] = ("region",)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.bed,)

    def sites(self, layout: Layout) -> Sites:
        _needs_bins(layout, self.kind)
        table = read_bed_on(self.bed, layout.genome)
        found = []
        for row in table.to_dict("records"):
            chrom, start, end = str(row["chrom"]), int(row["start"]), int(row["end"])
            name = str(row["name"]) if row["name"] != "." else f"{chrom}:{start}-{end}"
            if end - start > layout.target:
                remedy = f"Give intervals of at most {layout.target} bp"
                raise DataError(
                    "the interval is longer than what the model predicts", name, where=self.bed, remedy=remedy
                )
            site = _site(layout, (start + end) // 2, np.array([[start, end]]), (name,))
            assert site is not None
            found.append((chrom, site))
        return _looked_up(found, layout)


def _needs_bins(layout: Layout, kind: str) -> None:
    if layout.bins == 1:
        remedy = "Leave 'over' out, or give {kind: window}"
        raise ConfigError("a label has no bins to choose from", kind, where="over", remedy=remedy)


def _site(
    layout: Layout,
    middle: int,
    spans: Ints,
    names: tuple[str, ...],
    tracks: npt.NDArray[np.bool_] | None = None,
) -> Site | None:
    """The reading of base pairs in the window whose target is centred on ``middle``; None if no bin has any."""
    first = middle - layout.target // 2
    counted = np.zeros(layout.target + 1)
    inside = np.clip(spans - first, 0, layout.target)
    np.add.at(counted, inside[:, 0], 1)
    np.add.at(counted, inside[:, 1], -1)
    covered = np.cumsum(counted[:-1]) > 0  # a base that two transcripts have counts once
    weights = covered.reshape(layout.bins, layout.bin_size).mean(1)
    read = np.flatnonzero(weights)
    if not len(read):
        return None
    start, stop = int(read[0]), int(read[-1]) + 1
    return Site(first - layout.margin, (start, stop), weights[start:stop], names, tracks)


def _looked_up(found: Sequence[tuple[str, Site]], layout: Layout) -> Sites:
    """The sites whose window holds a variant's first base, in the order of their windows."""
    by_chrom: dict[str, list[Site]] = {}
    for chrom, site in sorted(found, key=lambda item: (item[0], item[1].start)):
        by_chrom.setdefault(chrom, []).append(site)
    starts = {chrom: np.array([site.start for site in sites], np.int64) for chrom, sites in by_chrom.items()}

    def sites(variant: Variant) -> Sequence[Site]:
        if variant.chrom not in starts:
            return ()
        at = variant.position - 1
        bounds = np.searchsorted(starts[variant.chrom], [at - layout.window, at], side="right")
        return by_chrom[variant.chrom][bounds[0] : bounds[1]]

    return sites


#: Kind, as written in configurations -> what is read.
OVERS: dict[str, type[Over]] = {over.kind: over for over in (Centre, Window, Genes, Regions)}
