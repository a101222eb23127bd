"""Windows of a genome without tracks: sequences alone, for language models that train on masked tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seqgraft.data.dataset import Dataset, DatasetInfo, hash_file, open_dataset, write_dataset
from seqgraft.data.duplicates import DuplicatePolicy, duplicate_links, find_duplicates, resolve_duplicates
from seqgraft.data.folds import FoldPlaces, Folds, assign_folds
from seqgraft.data.tiles import read_spans, tile_regions
from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.genome import Genome, match_chroms
from seqgraft.sequence import Codes, N
from seqgraft.tracks import TrackTable

__all__ = ["WindowSource", "prepare_windows"]


@dataclass(frozen=True)
class WindowSource:
    """Which windows of which genome.

    Attributes:
        fasta: the genome, plain or compressed.
        window: bp of each.
        folds: which windows are for training, validation and test: by chromosome, by cluster, or by the regions of a
            BED file (``{by: trunk, trunk: regions.bed}``).
        stride: bp from one window to the next; by default ``window``.
        exclude_chroms: contigs that are left out, such as chrM.
        gaps: BED of places that are left out.
        rename: names of contigs in BED files -> names in the FASTA.
        unknown: largest share of unknown bases of a window; those with more are left out and counted.
        duplicates: what to do with windows that stand in two folds, exactly or nearly, on either strand; they are
            always counted and listed in ``NAME.duplicates.tsv``.
    """

    fasta: Path
    window: int
    folds: Folds
    stride: int | None = None
    exclude_chroms: tuple[str, ...] = ()
    gaps: Path | None = None
    rename: dict[str, str] = field(default_factory=dict)
    unknown: float = 0.01
    duplicates: DuplicatePolicy = "report"

    def __post_init__(self) -> None:
        problems = Problems(ConfigError)
        for name in ("window", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.add(f"{name} must be a positive number of base pairs", value, where="windows source")
        if not 0 <= self.unknown < 1:
            problems.add("unknown must be a share of the bases, from 0 to 1", self.unknown, where="windows source")
        problems.raise_if_any()


def prepare_windows(source: WindowSource, folder: Path) -> Dataset:
    """Tiles a genome into a new prepared dataset: one region per window, and no tracks.

    Raises:
        ConfigError: settings or folds that cannot be.
        DataError: files that are missing, broken or do not fit the genome; no window is left.
        RunError: the folder exists or cannot be written.
    """
    genome = Genome.open(source.fasta)
    match_chroms(source.rename.values(), genome, "rename")
    match_chroms(source.exclude_chroms, genome, "exclude_chroms")
    notes: dict[str, Any] = {"ambiguous_bases": genome.ambiguous}
    gaps = read_spans(source.gaps, genome, source.rename)
    stride = source.stride or source.window
    regions = tile_regions(genome, source.window, stride, source.exclude_chroms, gaps)
    known = np.array([np.mean(codes == N) <= source.unknown for codes in _codes(genome, regions)], dtype=bool)
    notes["dropped_windows"] = {"unknown_bases": int((~known).sum())}
    if not known.any():
        remedy = f"The longest contig has {max(genome.chroms.values())} bp; use a smaller window, or a larger unknown"
        raise DataError("no window fits into the genome", source.window, where=source.fasta, remedy=remedy)
    regions = regions[known].reset_index(drop=True).assign(name="", strand=".")
    views = _codes(genome, regions)
    links = duplicate_links(views) if source.duplicates == "group" else None
    places = FoldPlaces(genome, 0, source.rename, notes)
    regions = regions.assign(fold=assign_folds(regions, source.folds, together=links, places=places))
    report = find_duplicates(views, regions["fold"])
    names = [f"{c}:{s}-{e}" for c, s, e in zip(regions["chrom"], regions["start"], regions["end"], strict=True)]
    listing = Path(folder).with_name(f"{Path(folder).name}.duplicates.tsv")
    kept = resolve_duplicates(report, source.duplicates, len(regions), names, listing)
    regions = regions[kept].reset_index(drop=True)
    notes |= {"duplicates": report.summary(), "duplicates_dropped": int((~kept).sum()), "regions": len(regions)}
    info = DatasetInfo(
        kind="windows",
        window=source.window,
        bins=1,
        bin_size=source.window,
        genome={"path": str(genome.path), "hash": genome.hash},
        sources=[hash_file(path) for path in (source.fasta, source.gaps) if path is not None],
        settings=asdict(source),
        notes=notes,
    )
    with write_dataset(folder, (len(regions), 0, 1)) as writer:
        writer.finish(info, regions, TrackTable.none())
    return open_dataset(folder)


def _codes(genome: Genome, regions: pd.DataFrame) -> list[Codes]:
    """The windows' sequences, as views of the memory map."""
    places = zip(regions["chrom"], regions["start"], regions["end"], strict=True)
    return [genome.chrom_codes(chrom)[start:end] for chrom, start, end in places]
