"""First-order scores of every possible SNV of regions, and how far they can be trusted.

Regions are cut into *pieces* of at most ``width`` bp. A piece is read in the window that is centred on it: ``S_t`` is
the raw prediction of track ``t``, summed over the bins that the piece touches, and ``f_t`` is
``log2(S_t + pseudocount)`` (``score: log2_fold_change``) or ``S_t`` (``difference``). The value of a group of tracks is
the mean of its ``f_t``; one backward pass gives its gradient ``g`` by the one-hot sequence, ``(4, length)``. The score
of base ``b`` at position ``i``, where the reference has ``a``, is

    g[b, i] - g[a, i]

the first-order Taylor term of what the scorer of that name gives for the SNV over these bins, averaged over the group's
tracks. A window costs one forward pass and as many backward passes as there are groups, for all its SNVs.

What that is worth is measured: the exact scorer runs on the SNVs with the largest scores of each group and on a random
sample. On the sample stand Spearman's correlation of both scores, with an interval from drawing pieces, and the recall:
of the tenth of SNVs whose exact score is largest in absolute value, the share that the first order puts in its largest
tenth (chance: 0.1).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from seqgraft.data.augment import Augmentation
from seqgraft.errors import ConfigError, DataError, ModelError, RunError
from seqgraft.genome import Interval, Variant, read_bed_on
from seqgraft.intervals import bootstrap_interval
from seqgraft.metrics import Values
from seqgraft.models.base import SequenceModel, Trunk
from seqgraft.predict import FORWARD_ONLY
from seqgraft.progress import progress
from seqgraft.sample import Sample
from seqgraft.sequence import reverse_complement
from seqgraft.tracks import unsquash
from seqgraft.variants.place import Layout, Site
from seqgraft.variants.score import VariantConfig, VariantScorer
from seqgraft.variants.scorers import Difference, Log2FoldChange, Scorer

__all__ = ["Gradients", "Piece", "ScreenConfig", "Screened", "cut", "screen"]

_ROWS = 1 << 17  # of a row group
_SHARE = 10  # recall is of one part in so many
_PLACE = ("chrom", "position", "ref", "alt")
_LETTERS = np.array(list("ACGT"))
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScreenConfig:
    """How SNVs are screened.

    Attributes:
        score: what the first order is of; for labels "difference" suits.
        pseudocount: of "log2_fold_change".
        width: bp of a piece, at most (or what the model predicts); the sum over the bins that it touches is read.
        ensemble: views to average over, in raw units.
        batch_size: windows per pass.
        top: for so many SNVs of each group, those with the largest first-order scores, the exact scorer runs.
        sample: and for so many drawn at random, on which the agreement is measured.
        seed: of the sample.
    """

    score: Literal["log2_fold_change", "difference"] = "log2_fold_change"
    pseudocount: float = 1.0
    width: int = 512
    ensemble: Augmentation = FORWARD_ONLY
    batch_size: int = 4
    top: int = 100
    sample: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("batch_size", 1), ("top", 0), ("sample", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"must be {least} or more", getattr(self, name), where=f"screen: {name}")

    @property
    def scorer(self) -> Scorer:
        """What is approximated."""
        return Difference() if self.score == "difference" else Log2FoldChange(self.pseudocount)


@dataclass(frozen=True)
class Piece:
    """A stretch ``[start, end)`` of a contig, 0-based, and the reading of it."""

    chrom: str
    start: int
    end: int
    site: Site


@dataclass(frozen=True)
class Screened:
    """What became of the regions.

    Attributes:
        snvs: how many were scored.
        unknown: bases without a known letter, which have none.
        windows: how many the model saw.
        agreement: per group: ``n``, ``spearman``, ``low``, ``high``, ``recall`` on the random sample, and
            ``top_spearman`` on the largest of the group.
        files: the table of all SNVs and, if there are any, that of exact scores.
    """

    snvs: int
    unknown: int
    windows: int
    agreement: pd.DataFrame
    files: tuple[Path, ...]


def cut(regions: pd.DataFrame, layout: Layout, width: int) -> list[Piece]:
    """The pieces of regions (chrom, start, end), each base once, in the order of the contigs.

    They have at most ``width`` bp, and never more than what the model predicts.
    """
    width = min(width, layout.target)
    pieces = []
    for chrom, rows in regions.groupby("chrom", sort=False):
        length, reach = layout.genome.chroms[str(chrom)], 0
        for start, end in sorted(zip(rows["start"].tolist(), rows["end"].tolist(), strict=True)):
            start, end = max(start, reach), min(end, length)
            reach = max(reach, end)
            count = -(-(end - start) // width)
            for number in range(max(count, 0)):
                ends = [start + (end - start) * i // count for i in (number, number + 1)]
                pieces.append(_piece(str(chrom), ends[0], ends[1], layout))
    return pieces


def _piece(chrom: str, start: int, end: int, layout: Layout) -> Piece:
    first = (start + end) // 2 - layout.target // 2
    last = layout.bins - 1
    bins = (max(0, (start - first) // layout.bin_size), min(last, (end - 1 - first) // layout.bin_size) + 1)
    return Piece(chrom, start, end, Site(first - layout.margin, bins, np.ones(bins[1] - bins[0])))


@dataclass(frozen=True)
class _OverPieces:
    """Reads an SNV where its piece is read."""

    pieces: Sequence[Piece]
    kind: ClassVar[str] = "pieces"
    columns: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[Path, ...]] = ()

    def sites(self, layout: Layout) -> Any:  # noqa: ARG002
        order = sorted(self.pieces, key=lambda piece: (piece.chrom, piece.start))
        by_chrom: dict[str, list[Piece]] = {}
        for piece in order:
            by_chrom.setdefault(piece.chrom, []).append(piece)
        starts = {chrom: np.array([piece.start for piece in of]) for chrom, of in by_chrom.items()}

        def sites(variant: Variant) -> Sequence[Site]:
            number = int(np.searchsorted(starts[variant.chrom], variant.position - 1, side="right")) - 1
            return [by_chrom[variant.chrom][number].site]

        return sites


class Gradients:
    """First-order scores of all substitutions of pieces.

    Raises:
        ModelError: a trunk that does not start from one-hot bases, through which no gradient leads.
    """

    def __init__(self, model: SequenceModel, layout: Layout, config: ScreenConfig) -> None:
        self.model, self.layout, self.config = model.eval(), layout, config
        if type(model.trunk).forward is not Trunk.forward:
            raise ModelError("the trunk does not run as a plain chain from one-hot bases", remedy="Score with a VCF")
        self.device = next(model.parameters()).device
        self.groups = layout.tracks.groups
        self._swap = torch.as_tensor(layout.tracks.permutation, device=self.device)

    def __call__(self, pieces: Sequence[Piece]) -> list[tuple[npt.NDArray[np.uint8], Floats]]:
        """Of each piece its base codes ``(bp,)`` and scores ``(groups, bp, 4)``; 0 for the reference base."""
        layout, shift = self.layout, self.config.ensemble.shift
        starts = [piece.site.start for piece in pieces]
        spans = [
            Interval(p.chrom, at - shift, at + layout.window + shift) for p, at in zip(pieces, starts, strict=True)
        ]
        codes = np.stack([np.asarray(layout.genome.codes(span)) for span in spans])
        known = torch.from_numpy(codes).to(self.device)
        letters = torch.arange(4, dtype=torch.uint8, device=self.device)[None, :, None]
        leaf = (known[:, None] == letters).float().requires_grad_()
        with torch.enable_grad():
            values = self._values(leaf, codes, pieces)
            found = []
            for number in range(len(self.groups)):
                last = number == len(self.groups) - 1
                (gradient,) = torch.autograd.grad(values[:, number].sum(), leaf, retain_graph=not last)
                found.append(gradient - (gradient * leaf.detach()).sum(1, keepdim=True))
        scores = torch.stack(found, dim=1).transpose(2, 3).float().cpu().numpy()  # (pieces, groups, length, 4)
        if not np.isfinite(scores).all():
            remedy = "Train with a lower learning rate, or take score: difference"
            raise ModelError("the gradients are not finite", f"{pieces[0].chrom}:{pieces[0].start}", remedy=remedy)
        cuts = [slice(p.start - at + shift, p.end - at + shift) for p, at in zip(pieces, starts, strict=True)]
        return [(c[own], s[:, own]) for c, s, own in zip(codes, scores, cuts, strict=True)]

    def _values(self, leaf: Tensor, codes: npt.NDArray[np.uint8], pieces: Sequence[Piece]) -> Tensor:
        """The value of each group, ``(pieces, groups)``, float64."""
        layout, config = self.layout, self.config
        views = config.ensemble.views()
        raw = torch.stack([self._raw(leaf, codes, view.reverse, config.ensemble.shift + view.shift) for view in views])
        weights = torch.zeros((len(pieces), 1, layout.bins), dtype=torch.float64)
        for row, piece in enumerate(pieces):
            weights[row, 0, slice(*piece.site.bins)] = torch.from_numpy(piece.site.weights)
        sums = (raw.mean(0) * weights.to(self.device)).sum(-1)
        values = sums if config.score == "difference" else torch.log2(sums + config.pseudocount)
        return torch.stack([values[:, index].mean(1) for index in self.groups.values()], dim=1)

    def _raw(self, leaf: Tensor, codes: npt.NDArray[np.uint8], reverse: bool, first: int) -> Tensor:
        """Raw predictions ``(pieces, tracks, bins)`` of one view, of the forward strand."""
        layout, own = self.layout, slice(first, first + self.layout.window)
        x, seen = leaf[:, :, own], codes[:, own]
        if reverse:
            x, seen = x.flip(1, 2), reverse_complement(seen)
        known = torch.from_numpy(np.ascontiguousarray(seen)).to(self.device)
        state = self.model.trunk.encode(known)
        x = torch.nn.functional.pad(x, (0, state.x.shape[-1] - layout.window))
        if not torch.equal(state.x, x):
            raise ModelError("the trunk does not start from one-hot bases", remedy="Score with a VCF")
        none = torch.zeros((len(x), 0, 0), device=self.device)
        lengths = torch.full((len(x),), layout.window, device=self.device)
        sample = Sample(known, lengths, lengths, none, none.bool())
        values = self.model.link(self.model.read(self.model.trunk.run(replace(state, x=x)), sample))
        values = values.flip(-1)[:, self._swap] if reverse else values
        return unsquash(values.double(), layout.tracks, layout.bin_size)


@dataclass(eq=False)
class _Kept:
    """Rows of SNVs: the piece, 0-based position, codes of both bases, scores ``(rows, groups)``, and a random key."""

    piece: Ints
    position: Ints
    ref: Ints
    alt: Ints
    scores: Floats
    key: npt.NDArray[np.float64]

    def select(self, index: Ints) -> _Kept:
        return _Kept(*(values[index] for values in self.columns))

    @property
    def columns(self) -> tuple[npt.NDArray[Any], ...]:
        return self.piece, self.position, self.ref, self.alt, self.scores, self.key

    def joined(self, other: _Kept) -> _Kept:
        pairs = zip(self.columns, other.columns, strict=True)
        return _Kept(*(np.concatenate(pair) for pair in pairs))

    def variants(self, pieces: Sequence[Piece]) -> list[Variant]:
        columns = (self.piece.tolist(), self.position.tolist(), self.ref.tolist(), self.alt.tolist())
        rows = zip(*columns, strict=True)
        return [Variant(pieces[n].chrom, at + 1, "ACGT"[ref], "ACGT"[alt], ".") for n, at, ref, alt in rows]


def _rows(number: int, piece: Piece, codes: npt.NDArray[np.uint8], scores: Floats, rng: np.random.Generator) -> _Kept:
    """The SNVs of a piece, by position and then by alternative."""
    at, alt = np.nonzero((codes[:, None] < 4) & (codes[:, None] != np.arange(4)))
    ref = codes[at].astype(np.int64)
    return _Kept(np.full(len(at), number), piece.start + at, ref, alt, scores[:, at, alt].T, rng.random(len(at)))


def _largest(rows: _Kept, count: int, by: npt.NDArray[Any]) -> _Kept:
    if len(by) <= count:
        return rows
    return rows.select(np.argpartition(-by, count - 1)[:count] if count else np.zeros(0, np.int64))


def screen(model: SequenceModel, layout: Layout, config: ScreenConfig, bed: Path, out: Path) -> Screened:
    """Writes the first-order scores of all SNVs of the regions of a BED file, and exact scores of some of them.

    Args:
        out: ``NAME.parquet``: chrom, position (1-based), ref, alt, one float32 column per group. ``NAME.exact.parquet``
            has the SNVs that were scored exactly: the same columns, ``GROUP_exact`` and ``drawn`` ("random", or the
            group of which it is one of the largest). Both keep settings and agreement in their metadata.

    Raises:
        ConfigError: an output that is not Parquet.
        DataError: the regions do not fit the genome, or hold no known base; groups named like a column.
        ModelError: no gradient leads to the bases, or it is not finite.
        RunError: the output exists or cannot be written.
    """
    exact_path = out.with_name(f"{out.name.removesuffix('.parquet')}.exact.parquet")
    _check(out, exact_path, layout)
    table = read_bed_on(bed, layout.genome)
    pieces = cut(table, layout, config.width)
    groups = list(layout.tracks.groups)
    part, exact_part = (path.with_name(f".{path.name}.{os.getpid()}.part") for path in (out, exact_path))
    schema = pa.schema([("chrom", pa.string()), ("position", pa.int64()), ("ref", pa.string()), ("alt", pa.string())])
    schema = pa.schema([*schema, *((group, pa.float32()) for group in groups)])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(part, schema) as writer:
            snvs, unknown, largest, sample = _stream(model, layout, config, pieces, groups, writer, schema)
            if not snvs:
                raise DataError("the regions hold no known base", where=bed, remedy="Check the places and the FASTA")
            exact, agreement = _exact(model, layout, config, pieces, groups, largest, sample)
            notes = {"settings": _json(config), "agreement": agreement.to_json(orient="records")}
            writer.add_key_value_metadata({f"seqgraft.{name}": text for name, text in notes.items()})
        if len(exact):
            rows = pa.Table.from_pandas(exact, preserve_index=False)
            pq.write_table(rows.replace_schema_metadata({f"seqgraft.{k}": v for k, v in notes.items()}), exact_part)
            os.replace(exact_part, exact_path)
        os.replace(part, out)
    except OSError as error:
        what = f"the scores could not be written ({error.strerror or error})"
        raise RunError(what, str(out), remedy="Free some disk space or check permissions") from error
    finally:
        part.unlink(missing_ok=True)
        exact_part.unlink(missing_ok=True)
    return Screened(snvs, unknown, len(pieces), agreement, (out, exact_path) if len(exact) else (out,))


def _json(config: ScreenConfig) -> str:
    return json.dumps({name: str(getattr(config, name)) for name in config.__dataclass_fields__})


def _check(out: Path, exact: Path, layout: Layout) -> None:
    if out.suffix != ".parquet":
        raise ConfigError("the format of the output is unknown", out.name, remedy="End its name in .parquet")
    for path in (out, exact):
        if path.exists():
            raise RunError("the output exists already", str(path), remedy="Choose another name or remove it first")
    taken = sorted(set(layout.tracks.groups) & {*_PLACE, "drawn", "random"})
    if taken:
        raise DataError("a group has the name of a column of the table", taken, remedy="Rename it in the track table")


def _stream(
    model: SequenceModel,
    layout: Layout,
    config: ScreenConfig,
    pieces: Sequence[Piece],
    groups: Sequence[str],
    writer: pq.ParquetWriter,
    schema: pa.Schema,
) -> tuple[int, int, Mapping[str, _Kept], _Kept]:
    """Writes all SNVs; returns their number, that of unknown bases, each group's largest, and a random sample."""
    gradients, rng = Gradients(model, layout, config), np.random.default_rng(config.seed)
    chroms = np.array([piece.chrom for piece in pieces], dtype=object)
    none = np.zeros(0, np.int64)
    empty = _Kept(none, none, none, none, np.zeros((0, len(groups)), np.float32), np.zeros(0))
    largest, sample = dict.fromkeys(groups, empty), empty
    snvs = 0
    for block in _blocks(gradients, pieces, config.batch_size, rng):
        names = (chroms[block.piece], block.position + 1, _LETTERS[block.ref], _LETTERS[block.alt])
        writer.write_table(pa.table([*map(pa.array, names), *map(pa.array, block.scores.T.copy())], schema=schema))
        for column, group in enumerate(groups):
            joined = largest[group].joined(block)
            largest[group] = _largest(joined, config.top, np.abs(joined.scores[:, column]))
        joined = sample.joined(block)
        sample = _largest(joined, config.sample, joined.key)
        snvs += len(block.piece)
    unknown = sum(piece.end - piece.start for piece in pieces) - snvs // 3
    return snvs, unknown, largest, sample


def _blocks(gradients: Gradients, pieces: Sequence[Piece], size: int, rng: np.random.Generator) -> Iterator[_Kept]:
    """The SNVs of all pieces, a row group at a time."""
    waiting: list[_Kept] = []
    starts = range(0, len(pieces), size)
    for start in progress(starts, "windows", total=len(starts)):
        chosen = pieces[start : start + size]
        for number, (piece, (codes, scores)) in enumerate(zip(chosen, gradients(chosen), strict=True), start=start):
            waiting.append(_rows(number, piece, codes, scores, rng))
        if sum(len(rows.piece) for rows in waiting) >= _ROWS:
            yield _all(waiting)
            waiting = []
    if waiting:
        yield _all(waiting)


def _all(parts: Sequence[_Kept]) -> _Kept:
    return _Kept(*(np.concatenate(columns) for columns in zip(*(part.columns for part in parts), strict=True)))


def _exact(
    model: SequenceModel,
    layout: Layout,
    config: ScreenConfig,
    pieces: Sequence[Piece],
    groups: Sequence[str],
    largest: Mapping[str, _Kept],
    sample: _Kept,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Exact scores of the largest and of the sample, and how well the first order agrees with them."""
    drawn = {"random": sample, **{group: largest[group] for group in groups}}
    rows = _all(list(drawn.values()))
    names = np.repeat(list(drawn), [len(part.piece) for part in drawn.values()])
    if not len(names):
        return pd.DataFrame(), pd.DataFrame({"group": groups})
    variants = rows.variants(pieces)
    unique = list(dict.fromkeys(variants))
    settings = VariantConfig(scorers=(config.scorer,), over=_OverPieces(pieces), ensemble=config.ensemble)
    scores = VariantScorer(model, layout, settings)(unique).values[:, 0]
    means = np.stack([scores[:, index].mean(1) for index in layout.tracks.groups.values()], axis=1)
    number = {variant: row for row, variant in enumerate(unique)}
    exact = means[[number[variant] for variant in variants]]
    table = pd.DataFrame({name: [getattr(v, name) for v in variants] for name in _PLACE})
    for column, group in enumerate(groups):
        table[group], table[f"{group}_exact"] = rows.scores[:, column], exact[:, column]
    table["drawn"] = names
    agreement = [
        {"group": group, **_agreement(rows.scores[:, column], exact[:, column], rows.piece, names, group)}
        for column, group in enumerate(groups)
    ]
    return table, pd.DataFrame(agreement)


def _agreement(first: Floats, exact: Floats, piece: Ints, drawn: npt.NDArray[np.str_], group: str) -> dict[str, float]:
    """Spearman with its interval and recall on the random sample; Spearman on the group's largest."""
    nan = float("nan")
    found = {"n": 0.0, "spearman": nan, "low": nan, "high": nan, "recall": nan, "top_spearman": nan}
    random, top = ((drawn == name) & np.isfinite(exact) for name in ("random", group))
    if random.sum() > 1:
        values = Values.of(exact[random, None, None], first[random, None, None])
        estimate = bootstrap_interval(values, "spearman", piece[random])
        count = -(-int(random.sum()) // _SHARE)
        wanted, given = (set(np.argsort(-np.abs(v[random]), kind="stable")[:count].tolist()) for v in (exact, first))
        found |= {"n": float(random.sum()), "spearman": estimate.mean, "low": estimate.mean_low}
        found |= {"high": estimate.mean_high, "recall": len(wanted & given) / count}
    if top.sum() > 1:
        values = Values.of(exact[top, None, None], first[top, None, None])
        found["top_spearman"] = float(values.compute("spearman")[0])
    return found
