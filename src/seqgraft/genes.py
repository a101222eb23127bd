"""Expression of genes from bins: held-out genes' levels, specificity and fold changes between conditions.

A gene's signal is its track's mean density over the gene's counted base pairs times their number. Counted are the exons
(overlapping exons of a gene's transcripts once), or a window around its 5' end (:attr:`GeneSettings.around`: assays of
transcription starts have no signal over exons), without base pairs that another gene counts on the same strand.
Every base pair is read from one region only, so that overlapping regions count nothing twice. A gene is used if at
least ``min_covered`` of its counted base pairs lie in the regions; the others are listed with their reason.

Of a strand pair, a gene takes the track of its own strand, so that the pair is one *signal*. Signals with a ``depth``
(the sum over both strands) are divided to a million. Log values are ``log2(signal + pseudocount)``. All arrays are raw:
unsquashed summed bins ``(regions, tracks, bins)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.errors import ConfigError, DataError
from seqgraft.intervals import bootstrap_interval, replicate_ceiling, spearman_brown
from seqgraft.metrics import Moments, Values
from seqgraft.tracks import STRAND_ENDINGS, TrackTable

__all__ = [
    "Ceiling",
    "GeneBins",
    "GeneSettings",
    "expressed",
    "fold_change",
    "fold_change_ceiling",
    "fold_change_scores",
    "gene_bins",
    "gene_scores",
    "gene_signal",
    "read_fold_changes",
    "rest_of_merged",
    "signal_table",
]

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


# How the name of a pair's forward strand ends.
FORWARD = tuple(forward for forward, _ in STRAND_ENDINGS)
MARKERS = 50  # genes of each condition
MARKER_MARGIN = 1.0  # log2 over the next condition


@dataclass(frozen=True)
class GeneSettings:
    """What counts as a gene's signal, and how it is compared.

    ``around`` "exons" counts exons; "start" counts ``[start - upstream, start + downstream)`` along the gene's strand
    around its 5' end. ``pseudocount`` and ``min_expression`` are in units of the signal: per million where the tracks
    have a depth. Fold changes and specificity look at genes whose mean observed signal is ``min_expression`` or more.
    """

    around: Literal["exons", "start"] = "exons"
    upstream: int = 250
    downstream: int = 250
    min_covered: float = 0.95
    pseudocount: float = 1.0
    min_expression: float = 1.0

    def __post_init__(self) -> None:
        if self.around not in ("exons", "start"):
            raise ConfigError("is neither 'exons' nor 'start'", self.around, where="genes.around")
        if self.around == "start" and self.upstream + self.downstream <= 0:
            raise ConfigError("the window around the gene's start is empty", where="genes.upstream")
        if not 0 < self.min_covered <= 1:
            raise ConfigError("must be above 0 and at most 1", self.min_covered, where="genes.min_covered")
        if not self.pseudocount > 0:
            raise ConfigError("must be above 0", self.pseudocount, where="genes.pseudocount")


@dataclass(frozen=True, eq=False)
class GeneBins:
    """Which bins make up which gene.

    ``genes`` has gene_id, gene_name, chrom, strand, length (counted bp) and covered (their share in the regions). Entry
    i says that gene ``gene[i]`` (row of ``genes``, sorted) has the share ``fraction[i]`` of bin ``bin[i]`` of
    region ``row[i]``. ``skipped`` has gene_id and reason.
    """

    genes: pd.DataFrame
    gene: Ints
    row: Ints
    bin: Ints
    fraction: npt.NDArray[np.float64]
    skipped: pd.DataFrame

    def of(self, gene_id: str) -> list[tuple[int, int, float]]:
        """The (row, bin, fraction) of one gene."""
        index = np.flatnonzero(self.genes["gene_id"] == gene_id)
        entries = np.flatnonzero(np.isin(self.gene, index))
        columns = (self.row[entries], self.bin[entries], self.fraction[entries])
        return list(zip(*(column.tolist() for column in columns), strict=True))


def gene_bins(
    exons: pd.DataFrame, regions: pd.DataFrame, bins: int, bin_size: int, settings: GeneSettings | None = None
) -> GeneBins:
    """Find the bins of every gene.

    Args:
        exons: ``read_gtf`` rows (chrom, start, end, strand, gene_id, gene_name), named like the regions.
        regions: chrom, start and end of the target intervals, one row per row of the arrays to be read; each spans
            ``bins * bin_size`` bp.

    Raises:
        DataError: no gene lies in the regions.
    """
    settings = settings or GeneSettings()
    span = bins * bin_size
    if not (regions["end"] - regions["start"] == span).all():
        raise DataError(f"the regions are not all {bins} bins of {bin_size} bp", where="genes")
    counted, skipped = _counted(exons, set(regions["chrom"]), settings)
    parts = _disjoint(regions, span)
    position = {str(gene): number for number, gene in enumerate(counted["gene_id"].unique())}
    pieces: list[tuple[int, int, int, int]] = []  # gene, region, start and end within the region
    for chrom, rows in counted.groupby("chrom", sort=False):
        if chrom not in parts:
            continue
        row, start, end, origin = parts[chrom]
        first, last = np.searchsorted(end, rows["start"], "right"), np.searchsorted(start, rows["end"], "left")
        columns = zip(rows["gene_id"], rows["start"], rows["end"], first, last, strict=True)
        for gene_id, left, right, begin, stop in columns:
            for part in range(begin, stop):
                inside = max(left, start[part]) - origin[part], min(right, end[part]) - origin[part]
                pieces.append((position[gene_id], row[part], *inside))
    genes = counted.groupby("gene_id", sort=False).agg(
        gene_name=("gene_name", "first"), chrom=("chrom", "first"), strand=("strand", "first"), length=("length", "sum")
    )
    gene, region, left, right = np.array(sorted(pieces), np.int64).reshape(-1, 4).T
    covered = np.bincount(gene, right - left, len(genes)) / genes["length"].to_numpy()
    genes = genes.reset_index().assign(covered=covered)
    keep = covered >= settings.min_covered
    partly = f"less than {settings.min_covered:.0%} in the regions"
    outside = genes[~keep].assign(reason=np.where(covered[~keep] == 0, "outside the regions", partly))
    skipped = pd.concat([skipped, outside[["gene_id", "reason"]]], ignore_index=True)
    if not keep.any():
        reasons = skipped["reason"].value_counts().to_dict()
        remedy = "Give regions that tile the genes, use the names of the FASTA, or lower min_covered"
        raise DataError("no gene lies in the regions", reasons, where="genes", remedy=remedy)
    used = keep[gene]
    entries = _bins(np.cumsum(keep)[gene[used]] - 1, region[used], left[used], right[used], bin_size)
    return GeneBins(genes[keep].reset_index(drop=True), *entries, skipped)


def _counted(exons: pd.DataFrame, chroms: set[str], settings: GeneSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Disjoint intervals of each gene of the contigs that no other gene of its strand counts; genes without any."""
    places = exons.groupby("gene_id")[["chrom", "strand"]].nunique().max(axis=1)
    scattered = places.index[places > 1]
    skipped = [(gene, "several chromosomes or strands") for gene in scattered]
    elsewhere = exons.loc[~exons["chrom"].isin(chroms) & ~exons["gene_id"].isin(scattered), "gene_id"].unique()
    skipped += [(gene, "outside the regions") for gene in elsewhere]
    exons = exons[exons["chrom"].isin(chroms) & ~exons["gene_id"].isin(scattered)]
    if settings.around == "start":
        exons = _start_windows(exons, settings)
    columns = ["chrom", "strand", "gene_id", "gene_name", "start", "end"]
    kept: list[tuple[Any, ...]] = []
    for (chrom, strand), rows in exons[columns].groupby(["chrom", "strand"], sort=False):
        unions = {key: _union(intervals) for key, intervals in _by_gene(rows)}
        shared = _overlaps(np.concatenate(list(unions.values())))
        for (gene, name), union in unions.items():
            kept.extend((chrom, strand, gene, name, *piece) for piece in _subtract(union, shared))
    counted = pd.DataFrame(kept, columns=columns)
    counted = counted.assign(length=counted["end"] - counted["start"])
    lost = sorted(set(exons["gene_id"]) - set(counted["gene_id"]))
    skipped += [(gene, "shared with other genes of its strand") for gene in lost]
    return counted, pd.DataFrame(skipped, columns=["gene_id", "reason"], dtype=object)


def _by_gene(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str], Ints]]:
    """((gene_id, gene_name), intervals) in order of appearance, without the cost of one groupby part per gene."""
    number, genes = pd.factorize(rows["gene_id"])
    order = np.argsort(number, kind="stable")
    edges = np.searchsorted(number[order], np.arange(len(genes) + 1))
    intervals, names = rows[["start", "end"]].to_numpy(np.int64)[order], rows["gene_name"].to_numpy()[order]
    for gene, (first, last) in zip(genes, pairwise(edges.tolist()), strict=True):
        yield (gene, names[first]), intervals[first:last]


def _start_windows(exons: pd.DataFrame, settings: GeneSettings) -> pd.DataFrame:
    genes = exons.groupby("gene_id", sort=False).agg(
        chrom=("chrom", "first"), strand=("strand", "first"), gene_name=("gene_name", "first"),
        start=("start", "min"), end=("end", "max"),
    ).reset_index()  # fmt: skip
    reverse = genes["strand"] == "-"
    begin = np.where(reverse, genes["end"] - settings.downstream, genes["start"] - settings.upstream)
    return genes.assign(start=begin, end=begin + settings.upstream + settings.downstream)


def _union(intervals: Ints) -> Ints:
    """Disjoint sorted intervals ``(n, 2)`` that cover the same base pairs."""
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(intervals[:, 1])
    first = np.concatenate([[True], intervals[1:, 0] > reach[:-1]])
    return np.stack([intervals[first, 0], reach[np.append(np.flatnonzero(first)[1:] - 1, len(reach) - 1)]], axis=1)


def _overlaps(intervals: Ints) -> Ints:
    """Disjoint sorted stretches ``(n, 2)`` that two or more of the intervals cover."""
    edges = np.concatenate([intervals[:, 0], intervals[:, 1]])
    steps = np.repeat([1, -1], len(intervals))
    order = np.lexsort((steps, edges))  # an interval that ends where another starts does not overlap it
    depth, edges = np.cumsum(steps[order]), edges[order]
    deep = (depth[:-1] >= 2) & (edges[1:] > edges[:-1])
    found = np.stack([edges[:-1][deep], edges[1:][deep]], axis=1)
    return _union(found) if len(found) else found


def _subtract(intervals: Ints, holes: Ints) -> list[tuple[int, int]]:
    """What is left of disjoint intervals without the disjoint sorted holes."""
    left: list[tuple[int, int]] = []
    for start, end in intervals.tolist():
        first, last = np.searchsorted(holes[:, 1], start, "right"), np.searchsorted(holes[:, 0], end, "left")
        cuts = [start, *holes[first:last].ravel().tolist(), end]
        left.extend((a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=True) if a < b)
    return left


def _disjoint(regions: pd.DataFrame, span: int) -> dict[Any, tuple[Ints, Ints, Ints, Ints]]:
    """Per contig the row, first and last position that each region answers for, and its origin, sorted by position."""
    parts = {}
    table = pd.DataFrame({"chrom": regions["chrom"].to_numpy(), "start": regions["start"].to_numpy(np.int64)})
    for chrom, rows in table.groupby("chrom", sort=False):
        origin = np.sort(rows["start"].to_numpy())
        row = rows.index.to_numpy()[np.argsort(rows["start"].to_numpy(), kind="stable")]
        start = np.maximum(origin, np.concatenate([origin[:1], origin[:-1] + span]))
        fresh = start < origin + span  # a repeated region answers for nothing
        parts[chrom] = (row[fresh], start[fresh], (origin + span)[fresh], origin[fresh])
    return parts


def _bins(gene: Ints, region: Ints, left: Ints, right: Ints, size: int) -> tuple[Ints, Ints, Ints, Array]:
    """Expand pieces ``[left, right)`` of regions to (gene, row, bin, fraction), each bin of a gene once."""
    first = left // size
    number = (right - 1) // size - first + 1
    piece = np.repeat(np.arange(len(gene)), number)
    bins = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number) + first[piece]
    overlap = np.minimum(right[piece], (bins + 1) * size) - np.maximum(left[piece], bins * size)
    keys = np.stack([gene[piece], region[piece], bins])
    (genes, rows, bins), inverse = np.unique(keys, axis=1, return_inverse=True)
    return genes, rows, bins, np.bincount(inverse.ravel(), overlap) / size


def signal_table(tracks: TrackTable) -> pd.DataFrame:
    """One row per unstranded track or strand pair, with name, group, condition, replicate, depth, plus, minus.

    ``plus`` and ``minus`` are positions on the track axis; ``depth`` is the sum over both strands.

    Raises:
        DataError: a strand pair whose names do not tell which strand is which.
    """
    position = {name: number for number, name in enumerate(tracks.names)}
    rows: list[dict[str, Any]] = []
    for track in tracks.frame.to_dict("records"):
        name, partner = track["name"], track["strand_pair"]
        facts = {key: track[key] for key in ("group", "condition", "replicate")}
        if name == partner:
            rows.append(
                {"name": name, **facts, "depth": track["depth"], "plus": position[name], "minus": position[name]}
            )
            continue
        ends = [suffix for suffix in FORWARD if name.endswith(suffix)]
        if ends:
            depth = track["depth"] + tracks.frame["depth"].iloc[position[partner]]
            both = {"depth": depth, "plus": position[name], "minus": position[partner]}
            rows.append({"name": name.removesuffix(ends[0]).rstrip("_."), **facts, **both})
        elif not any(partner.endswith(suffix) for suffix in FORWARD):
            remedy = f"Let the forward strand's name end in one of {', '.join(FORWARD)}"
            raise DataError(
                "the names do not tell which strand is which", (name, partner), where="tracks", remedy=remedy
            )
    return pd.DataFrame(rows)


def gene_signal(bins: GeneBins, raw: Array, signals: pd.DataFrame, valid: Array | None = None) -> pd.DataFrame:
    """Signal of each gene: a frame of genes (index gene_id) and signals (columns), per million where depth is known.

    Args:
        raw: unsquashed summed bins ``(regions, tracks, bins)``, observed or predicted.
        valid: False where the target is missing, same shape; give predictions the mask of their targets. Missing bins
            take the gene's mean density; a gene that misses more than 5 % of a track's counted bp is NaN there.

    Raises:
        DataError: some signals have a depth and others do not.
    """
    depth = signals["depth"].to_numpy(np.float64)
    if np.isnan(depth).any() and not np.isnan(depth).all():
        remedy = "Give every track its depth, or none"
        lacking = signals["name"][np.isnan(depth)].tolist()
        raise DataError("these tracks have no depth while others do", lacking, where="tracks", remedy=remedy)
    edges = np.searchsorted(bins.gene, np.arange(len(bins.genes) + 1))
    forward, reverse = (signals[strand].to_numpy(np.int64) for strand in ("plus", "minus"))
    signal = np.full((len(bins.genes), len(signals)), np.nan)
    for number, (strand, covered) in enumerate(zip(bins.genes["strand"], bins.genes["covered"], strict=True)):
        part = slice(edges[number], edges[number + 1])
        index = bins.row[part, None], reverse if strand == "-" else forward, bins.bin[part, None]
        values, share = np.asarray(raw[index], np.float64), bins.fraction[part, None]
        known = np.isfinite(values) if valid is None else np.asarray(valid[index])
        weight, total = (share * known).sum(0), (share * np.where(known, values, 0.0)).sum(0)
        enough = weight >= 0.95 * share.sum()
        signal[number, enough] = total[enough] / weight[enough] * share.sum() / covered
    scale = np.where(np.isnan(depth), 1.0, 1e6 / depth)
    index_of = pd.Index(bins.genes["gene_id"], name="gene_id")
    return pd.DataFrame(signal * scale, index=index_of, columns=pd.Index(signals["name"]))


# ---- scores ----


def gene_scores(
    observed: pd.DataFrame,
    predicted: pd.DataFrame,
    signals: pd.DataFrame,
    settings: GeneSettings | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How well levels and specificity of genes are predicted; the inputs are frames of :func:`gene_signal`.

    Level "genes": Pearson, Spearman and R2 of log values across all genes, per signal. Level "genes_specific": Pearson
    per signal across expressed genes of what remains of the log values after quantile normalisation across the signals
    of a group and subtraction of the gene's mean over the group; groups of one signal have none. Level "genes_marker":
    the same across the marker genes of the group's conditions alone: up to 50 of each condition, those whose observed
    value, with the signals' median differences taken out, exceeds the next condition's most, and at least twofold. The
    same data choose and score them.

    Returns:
        Columns level, metric, track, value, low, high (95 % bootstrap over genes), count (genes), reason.
    """
    settings = settings or GeneSettings()
    _aligned(observed, predicted)
    true, pred = _log(observed, settings), _log(predicted, settings)
    tables = [_scored("genes", true, pred, ("pearson", "spearman", "r2"), draws, seed)]
    for _, rows in signals.groupby("group", sort=False):
        names = rows["name"].tolist()
        known = true[names].notna().all(axis=1) & (observed[names].mean(axis=1) >= settings.min_expression)
        if len(names) > 1 and known.any():
            parts = _specific(true.loc[known, names]), _specific(pred.loc[known, names])
            tables.append(_scored("genes_specific", parts[0], parts[1], ("pearson",), draws, seed))
            markers = _markers(true.loc[known, names], rows["condition"].tolist())
            if len(markers) > 2:
                chosen = parts[0].loc[markers], parts[1].loc[markers]
                tables.append(_scored("genes_marker", *chosen, ("pearson",), draws, seed))
    return pd.concat(tables, ignore_index=True)


def _aligned(observed: pd.DataFrame, predicted: pd.DataFrame) -> None:
    if not (observed.index.equals(predicted.index) and observed.columns.equals(predicted.columns)):
        raise DataError("observed and predicted signals have different genes or tracks", where="genes")


def _log(signal: pd.DataFrame, settings: GeneSettings) -> pd.DataFrame:
    logs = np.log2(np.maximum(signal.to_numpy(np.float64), 0) + settings.pseudocount)
    return pd.DataFrame(logs, index=signal.index, columns=signal.columns)


def _specific(values: pd.DataFrame) -> pd.DataFrame:
    """Give all columns the same distribution (the mean of their sorted values), then centre each gene."""
    common = np.sort(values.to_numpy(), axis=0).mean(axis=1)
    ranks = values.rank(axis=0, method="average").to_numpy()
    normalised = np.interp(ranks, np.arange(1, len(common) + 1), common)
    return pd.DataFrame(normalised - normalised.mean(axis=1, keepdims=True), index=values.index, columns=values.columns)


def _markers(logs: pd.DataFrame, conditions: Sequence[str]) -> list[str]:
    """Genes that one condition has most of; none where the signals (columns) do not have several conditions.

    Signals are first made level: the median over genes of a signal's difference from the gene's mean is taken out.
    Quantile normalisation would not do, because it distorts the highest values.
    """
    names = [name for name in dict.fromkeys(conditions) if name]
    if len(names) < 2:
        return []
    differences = logs.sub(logs.mean(axis=1), axis=0)
    level = differences - differences.median()
    each = pd.DataFrame({name: level.loc[:, [c == name for c in conditions]].mean(axis=1) for name in names})
    ordered = np.sort(each.to_numpy(), axis=1)
    margin = pd.Series(ordered[:, -1] - ordered[:, -2], index=each.index)
    margin = margin[margin >= MARKER_MARGIN].sort_values(ascending=False)
    chosen = margin.groupby(each.idxmax(axis=1)[margin.index], sort=False).head(MARKERS).index
    return [gene for gene in logs.index if gene in chosen]


def _scored(
    level: str, true: pd.DataFrame, pred: pd.DataFrame, metrics: Sequence[str], draws: int, seed: int
) -> pd.DataFrame:
    y_true, y_pred = (frame.to_numpy(np.float64)[:, :, None] for frame in (true, pred))
    rows = []
    for metric in metrics:
        statistics = Values.of(y_true, y_pred) if metric == "spearman" else Moments.of(y_true, y_pred)
        estimate = bootstrap_interval(statistics, metric, np.arange(len(true)), draws=draws, seed=seed)
        columns = zip(true.columns, statistics.scores(metric), estimate.low, estimate.high, strict=True)
        rows += [(level, metric, name, s.value, low, high, s.count, s.reason) for name, s, low, high in columns]
    return pd.DataFrame(rows, columns=["level", "metric", "track", "value", "low", "high", "count", "reason"])


def fold_change(
    signal: pd.DataFrame,
    signals: pd.DataFrame,
    numerator: str,
    denominator: str,
    settings: GeneSettings | None = None,
    replicates: Sequence[str] | None = None,
) -> pd.Series[float]:
    """Log2 of condition ``numerator`` over ``denominator`` per gene, each the mean over its signals (replicates).

    ``replicates`` keeps some of them; needed where merged data stand beside their own replicates.

    Raises:
        DataError: a condition has no signal, or its signals belong to several groups.
    """
    settings = settings or GeneSettings()
    names = (numerator, denominator)
    logs = _log(pd.DataFrame({name: _condition(signal, signals, name, replicates) for name in names}), settings)
    change: pd.Series[float] = logs[numerator] - logs[denominator]
    return change.rename(f"{numerator}/{denominator}")


def _condition(
    signal: pd.DataFrame, signals: pd.DataFrame, name: str, replicates: Sequence[str] | None
) -> pd.Series[float]:
    chosen = signals[signals["condition"] == name]
    if replicates is not None:
        chosen = chosen[chosen["replicate"].isin(list(replicates))]
    if chosen.empty:
        known = sorted(set(zip(signals["condition"], signals["replicate"], strict=True)))
        remedy = f"The tracks' (condition, replicate) are {known}"
        raise DataError("no track has the condition", (name, replicates), where="tracks", remedy=remedy)
    if chosen["group"].nunique() > 1:
        remedy = "Pass the signals of one group"
        raise DataError("the condition's tracks are of several groups", name, where="tracks", remedy=remedy)
    mean: pd.Series[float] = signal[chosen["name"].tolist()].mean(axis=1, skipna=False)
    return mean


def expressed(
    observed: pd.DataFrame,
    signals: pd.DataFrame,
    conditions: tuple[str, str],
    settings: GeneSettings | None = None,
    replicates: Sequence[str] | None = None,
) -> pd.Series[bool]:
    """Whether the mean of the two conditions' observed signals is ``min_expression`` or more, per gene."""
    settings = settings or GeneSettings()
    first, second = (_condition(observed, signals, name, replicates) for name in conditions)
    return (first + second) / 2 >= settings.min_expression


def fold_change_scores(
    truth: pd.Series[float], predicted: pd.Series[float], *, name: str = "", draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Pearson and Spearman of log2 fold changes over the genes of both; columns as in :func:`gene_scores`.

    ``truth`` is observed in the tracks (of expressed genes), or read by :func:`read_fold_changes`.

    Raises:
        DataError: the two have no gene in common.
    """
    genes = truth.dropna().index.intersection(predicted.dropna().index)
    if genes.empty:
        some = [*truth.index[:1], *predicted.index[:1]]
        remedy = "Use the gene_id of the GTF in both"
        raise DataError("the fold changes have no gene in common", some, where="genes", remedy=remedy)
    column = name or str(predicted.name)
    true, pred = (pd.DataFrame({column: values.loc[genes]}) for values in (truth, predicted))
    return _scored("genes_fold_change", true, pred, ("pearson", "spearman"), draws, seed)


def read_fold_changes(path: Path | str) -> pd.Series[float]:
    """Log2 fold change per gene of a DESeq2 (``log2FoldChange``) or edgeR (``logFC``) table; CSV, or TSV otherwise.

    The genes are a column gene_id, gene or id, or the unnamed first column that R writes. Genes that the program
    gave no fold change (NA) are left out.

    Raises:
        DataError: no such file, column or gene, or a gene twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("the table of fold changes does not exist", where=path, remedy="Check the path")
    table = pd.read_csv(path, sep="," if path.name.removesuffix(".gz").endswith(".csv") else "\t")
    values = [column for column in ("log2FoldChange", "logFC") if column in table.columns]
    if not values:
        remedy = "DESeq2 writes log2FoldChange, edgeR writes logFC"
        raise DataError("the table has no column of fold changes", list(table.columns), where=path, remedy=remedy)
    if not isinstance(table.index, pd.RangeIndex):
        genes = table.index.astype(str)
    else:
        keys = [column for column in table.columns if str(column).lower() in ("gene_id", "gene", "id")]
        genes = pd.Index(table[keys[0] if keys else table.columns[0]].astype(str))
    repeated = genes[genes.duplicated()]
    if len(repeated):
        raise DataError("the gene is listed more than once", repeated[0], where=path, remedy="Keep one row per gene")
    changes = pd.Series(table[values[0]].to_numpy(np.float64), index=genes.rename("gene_id"), name=path.stem).dropna()
    if changes.empty:
        raise DataError("no gene has a fold change", where=path, remedy="Check the column's numbers")
    return changes


@dataclass(frozen=True)
class Ceiling:
    """What replicates allow. ``replicates``: Pearson of the two parts' fold changes over ``genes`` genes.

    ``reliability``: Spearman-Brown, the expected Pearson between the merged data and an equal experiment.
    ``perfect``: its root, the highest Pearson that a noise-free prediction could have with the merged data.
    """

    replicates: float
    reliability: float
    perfect: float
    genes: int


def fold_change_ceiling(
    first: pd.Series[float], second: pd.Series[float], parts: tuple[float, float] = (1.0, 1.0)
) -> Ceiling:
    """Ceiling for fold changes of the merged data, from the same fold changes in two disjoint parts of them.

    Args:
        first, second: :func:`fold_change` of, say, replicate 1 and the other replicates (see :func:`rest_of_merged`).
        parts: sizes of the two parts, such as numbers of replicates or depths, where they are not equal.
    """
    genes = first.dropna().index.intersection(second.dropna().index)
    both = (values.loc[genes].to_numpy(np.float64)[:, None, None] for values in (first, second))
    r = float(Moments.of(*both).compute("pearson")[0])
    return Ceiling(r, spearman_brown(r, parts), replicate_ceiling(r, parts), len(genes))


def rest_of_merged(merged: Array, replicate: Array) -> Array:
    """Raw signal of the other replicates, where merged counts are the sum over replicates.

    Raises:
        DataError: the replicate exceeds the merged data somewhere, so that they are not its sum.
    """
    rest = np.asarray(merged, np.float64) - np.asarray(replicate, np.float64)
    excess = rest < -1e-3 * np.maximum(1.0, np.abs(merged))
    if excess.any():
        remedy = "Use two separate replicates for the ceiling, or check that the merged signal is a sum and not a mean"
        what = "the replicate exceeds the merged signal in this share of bins"
        raise DataError(what, f"{excess.mean():.2%}", where="genes", remedy=remedy)
    return np.maximum(rest, 0.0)
