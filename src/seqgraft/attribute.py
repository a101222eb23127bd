"""Attributions: what each base of a window does to a number that is read from the predictions.

Two methods, one result. *Gradient*: the derivative of the number with respect to the one-hot sequence, less its mean
over the four bases, which says what another base would do to first order. *Mutagenesis* ("ism"): the change of the
number when a base is another one, measured for all three others, less the mean over the four bases (the base itself:
0). Both give **hypothetical** attributions, one number per position and base with mean zero over the bases; the one of
the base that is there is the **attribution** (for gradients "gradient times input"). Unknown bases have zero.

Views (both strands, shifts) are turned back before they are averaged; a base that a shifted view does not see has no
effect in it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from seqgraft.data.augment import Augmentation, View
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError, DataError, ModelError
from seqgraft.local import Recompute
from seqgraft.models.base import SequenceModel, Span, State
from seqgraft.predict import FORWARD_ONLY
from seqgraft.progress import progress, steps
from seqgraft.sample import Sample
from seqgraft.sequence import PAD, Codes
from seqgraft.target import Site, Target, sites_of
from seqgraft.tracks import TrackTable, unsquash

__all__ = ["AttributeConfig", "Attributions", "Target", "attribute", "raw_values"]

FORMAT_VERSION = 1
Ints = npt.NDArray[np.int64]
_COLUMNS = ("region", "name", "chrom", "start", "end", "strand")


@dataclass(frozen=True)
class AttributeConfig:
    """How attributions are made.

    Attributes:
        target: the number that is explained.
        method: gradient, or ism: every other base at every position is tried.
        width: bp around the centre of each window that are written; 0 for all.
        genes: a GTF. The regions' names (BED, column 4) are then its genes: the exon bins count, and of strand pairs
            the gene's strand. Without it, the bins that the interval in the file touches count; of sequences all do.
        rename: chromosome in the GTF -> name in the FASTA.
        ensemble: views to average over.
        batch_size: windows (gradient) or alternates (ism) per pass.
        local: by ism, compute only what a base can change; False runs whole windows.
    """

    target: Target = field(default_factory=Target)
    method: Literal["gradient", "ism"] = "gradient"
    width: int = 0
    genes: Path | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    ensemble: Augmentation = FORWARD_ONLY
    batch_size: int = 8
    local: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError("must be 1 or more", self.batch_size, where="batch_size", remedy="Give a positive number")
        if self.width < 0:
            raise ConfigError("must be 0 or more", self.width, where="width", remedy="Give a width in bp, or 0 for all")
        if self.method == "ism" and self.target.statistic == "logits":
            remedy = "Use method: gradient, or statistic: sum"
            raise ConfigError(
                "mutagenesis reads predictions, not values before the link", where="target: statistic", remedy=remedy
            )


@dataclass(frozen=True, eq=False)
class Attributions:
    """Attributions of regions, all on the strand that the model saw: the forward one, for labels the region's own.

    Attributes:
        hypothetical: float32 ``(regions, numbers, 4, width)``, mean zero over the bases A C G T.
        codes: uint8 ``(regions, width)``.
        values: float64 ``(regions, numbers)``: the numbers themselves, means over the views.
        names: of the numbers.
        regions: region (row of the file), name, chrom, start, end (0-based, of what is written), strand.
        method: gradient or ism.
        in_words: what was computed of each alternate; "" for gradients.
    """

    hypothetical: npt.NDArray[np.float32]
    codes: Codes
    values: npt.NDArray[np.float64]
    names: tuple[str, ...]
    regions: pd.DataFrame
    method: str
    in_words: str = ""

    @property
    def attributions(self) -> npt.NDArray[np.float32]:
        """``(regions, numbers, width)``: of the base that is there; 0 where it is unknown."""
        index = np.minimum(self.codes, 3)[:, None, None].astype(np.int64)
        found = np.take_along_axis(self.hypothetical, index.repeat(len(self.names), axis=1), axis=2)[:, :, 0]
        return np.where(self.codes[:, None] < 4, found, np.float32(0))

    def write(self, path: Path) -> None:
        """An ``.npz`` with every attribute, the property ``attributions`` and the columns of the regions."""
        about = {"format_version": FORMAT_VERSION, "method": self.method, "in_words": self.in_words}
        arrays: dict[str, Any] = {
            "about": np.array(json.dumps(about)),
            "names": np.array(self.names),
            "values": self.values,
            "hypothetical": self.hypothetical,
            "attributions": self.attributions,
            "codes": self.codes,
        }
        for name in _COLUMNS:
            arrays[name] = self.regions[name].to_numpy(np.int64 if self.regions[name].dtype.kind in "iu" else str)
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads what :meth:`write` wrote.

        Raises:
            DataError: it is not such a file, is damaged, or of another format version.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                if about["format_version"] != FORMAT_VERSION:
                    remedy = f"This version reads {FORMAT_VERSION}"
                    raise DataError(
                        "the attributions have another format", about["format_version"], where=path, remedy=remedy
                    )
                regions = pd.DataFrame({name: file[name] for name in _COLUMNS})
                return cls(
                    file["hypothetical"], file["codes"], file["values"], tuple(file["names"].tolist()), regions,
                    about["method"], about["in_words"],
                )  # fmt: skip
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"the attributions cannot be read ({error})", where=path, remedy="Make them again"
            ) from error


def attribute(
    model: SequenceModel, dataset: Dataset, config: AttributeConfig, exons: pd.DataFrame | None = None
) -> Attributions:
    """Attributions of all regions of a dataset (``regions_for_prediction`` makes one of a file).

    Args:
        exons: ``read_gtf`` rows, if the regions' names are genes.

    Raises:
        ConfigError: an unknown track; settings that do not suit the model or the data.
        DataError: a region that is no gene, or whose gene is not in it.
        ModelError: predictions or gradients that are not finite.
    """
    sites = sites_of(dataset, model.tracks, config.target, exons)
    first, width = _written(dataset, config)
    numbers = len(sites[0].reader.names)
    hypothetical = np.zeros((len(dataset), numbers, 4, width), dtype=np.float32)
    values = np.zeros((len(dataset), numbers))
    views = config.ensemble.views()
    span = (first, first + width)
    in_words = ""
    if config.method == "ism" and dataset.covariates is not None:
        remedy = "Use method: gradient"
        raise ConfigError(
            "mutagenesis has no covariates for the model's heads", list(dataset.covariates), remedy=remedy
        )
    with _evaluating(model):
        if config.method == "ism":
            recompute = Recompute(model, local=config.local)
            in_words = recompute.in_words
            for row in progress(range(len(dataset)), "attribute", total=len(dataset)):
                for view in steps(views):
                    value, effects = _mutagenesis(recompute, dataset, row, view, sites[row], span, config.batch_size)
                    values[row] += value / len(views)
                    hypothetical[row] += effects / len(views)
        else:
            starts = range(0, len(dataset), config.batch_size)
            for start in progress(starts, "attribute", total=len(starts)):
                rows = np.arange(start, min(start + config.batch_size, len(dataset)))
                for view in views:
                    found, gradients = _gradients(model, dataset, rows, view, [sites[row] for row in rows], span)
                    values[rows] += found / len(views)
                    hypothetical[rows] += gradients / len(views)
    codes = _codes(dataset, span)
    hypothetical -= hypothetical.mean(axis=2, keepdims=True)
    hypothetical *= (codes < 4)[:, None, None]
    if not (np.isfinite(hypothetical).all() and np.isfinite(values).all()):
        row = int((~(np.isfinite(values).all(1) & np.isfinite(hypothetical).all((1, 2, 3)))).argmax())
        remedy = "Add a target.pseudocount, or train with a lower learning rate"
        raise ModelError("the attributions are not finite", where=f"region {row}", remedy=remedy)
    names = _common_names(sites)
    return Attributions(hypothetical, codes, values, names, _places(dataset, span), config.method, in_words)


def raw_values(model: SequenceModel, state: State, sample: Sample, bin_size: int, *, logits: bool = False) -> Tensor:
    """Raw predictions float64 ``(batch, tracks, bins)`` of the trunk's first state, or the values before the link.

    Gradients flow from them to ``state.x``, the one-hot sequence.
    """
    values = model.read(model.trunk.run(state), sample)
    return values.double() if logits else unsquash(model.link(values).double(), model.tracks, bin_size)


# ---- the two methods ----


def _gradients(
    model: SequenceModel, dataset: Dataset, rows: Ints, view: View, sites: Sequence[Site], span: Span
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Numbers ``(rows, numbers)`` and their derivatives ``(rows, numbers, 4, stop - start)`` within the span.

    Both are of the forward strand's positions and bases.
    """
    device = next(model.parameters()).device
    sample = dataset.sample(rows, [view] * len(rows)).to(device)
    with torch.enable_grad():
        state = model.trunk.encode(sample.codes, sample.lengths)
        x = state.x.detach().requires_grad_()
        logits = sites[0].reader.statistic == "logits"
        values = raw_values(model, State(x, state.skips, state.valid), sample, dataset.info.bin_size, logits=logits)
        values = _forward_strand(values, model.tracks, view)
        pairs = zip(sites, values, strict=True)
        numbers = torch.stack([site.reader(value, site.weights.to(device)) for site, value in pairs])
        count = numbers.shape[1]
        parts = [torch.autograd.grad(numbers[:, i].sum(), x, retain_graph=i + 1 < count)[0] for i in range(count)]
    found = torch.stack(parts, dim=1).float().cpu().numpy()
    out = np.zeros((*found.shape[:-1], span[1] - span[0]), dtype=np.float32)
    positions = np.arange(*span)
    for row, (gradient, length) in enumerate(zip(found, sample.lengths.tolist(), strict=True)):
        at = _seen_at(positions, dataset, int(rows[row]), view, length)
        seen = (at >= 0) & (at < length)
        gradient = gradient[:, ::-1] if view.reverse else gradient
        out[row][..., seen] = gradient[..., at[seen]]
    return numbers.detach().cpu().numpy(), out


def _mutagenesis(
    recompute: Recompute, dataset: Dataset, row: int, view: View, site: Site, span: Span, batch_size: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Numbers ``(numbers,)`` of a window, and their change ``(numbers, 4, stop - start)`` by every base of the span.

    Both are of the forward strand's positions and bases; unknown bases, and those that the view does not see, change
    nothing.
    """
    model, info = recompute.model, dataset.info
    found, lengths = dataset.sequences([row], [view])
    codes = torch.from_numpy(np.ascontiguousarray(found[0, : lengths[0]]))
    bins = site.bins
    read = (info.bins - bins[1], info.bins - bins[0]) if view.reverse else bins
    weights = site.weights[slice(*bins)]

    def numbers(values: Tensor) -> npt.NDArray[np.float64]:
        raw = unsquash(_forward_strand(values.double().cpu(), model.tracks, view), model.tracks, info.bin_size)
        return site.reader(raw, weights).numpy()

    reference = recompute.reference(codes)
    before = numbers(recompute.predict_reference(reference, read)[None])[0]
    effects = np.zeros((len(before), 4, span[1] - span[0]))
    places = _seen_at(np.arange(*span), dataset, row, view, len(codes)).tolist()
    edits = [
        (base, column, at)
        for column, at in enumerate(places)
        if 0 <= at < len(codes) and codes[at] < 4
        for base in range(4)
        if (3 - base if view.reverse else base) != codes[at]
    ]
    for start in steps(range(0, len(edits), batch_size)):
        batch = edits[start : start + batch_size]
        alternates = codes.repeat(len(batch), 1)
        for alternate, (base, _, at) in zip(alternates, batch, strict=True):
            alternate[at] = 3 - base if view.reverse else base
        change = numbers(recompute.predict(reference, alternates, [read] * len(batch))) - before
        for (base, column, _), difference in zip(batch, change, strict=True):
            effects[:, base, column] = difference
    return before, effects


def _seen_at(positions: Ints, dataset: Dataset, row: int, view: View, length: int) -> Ints:
    """Where a view has the bases at ``positions`` of the region's window, which may be beyond its ends."""
    minus = dataset.genome is not None and dataset.regions["strand"].iloc[row] == "-"  # shifts are the genome's
    at = positions + view.shift if minus else positions - view.shift
    return length - 1 - at if view.reverse else at


def _forward_strand(values: Tensor, tracks: TrackTable, view: View) -> Tensor:
    """Predictions ``(batch, tracks, bins)`` of a view as those of the forward strand."""
    return values.flip(-1)[:, torch.as_tensor(tracks.permutation, device=values.device)] if view.reverse else values


@contextmanager
def _evaluating(model: SequenceModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---- what is written ----


def _written(dataset: Dataset, config: AttributeConfig) -> Span:
    """Where in the windows what is written begins, and how wide it is."""
    window = dataset.info.window or int(np.asarray(dataset.lengths).max())
    if config.width > window or (config.width and not dataset.info.window):
        what = f"the windows are of {window} bp" if dataset.info.window else "the sequences differ in length"
        raise ConfigError(what, config.width, where="width", remedy="Leave width out to write all of each sequence")
    if config.ensemble.shift and dataset.genome is None:
        remedy = "Set ensemble.shift to 0"
        raise ConfigError(
            "sequences without a genome cannot be shifted",
            config.ensemble.shift,
            where="ensemble: shift",
            remedy=remedy,
        )
    width = config.width or window
    return (window - width) // 2, width


def _codes(dataset: Dataset, span: Span) -> Codes:
    """Base codes ``(regions, stop - start)``, padding where a sequence is shorter."""
    codes, lengths = dataset.sequences(np.arange(len(dataset)))
    codes = np.pad(codes, ((0, 0), (0, max(0, span[1] - codes.shape[1]))), constant_values=PAD)
    codes[np.arange(codes.shape[1]) >= lengths[:, None]] = PAD
    return codes[:, slice(*span)]


def _common_names(sites: Sequence[Site]) -> tuple[str, ...]:
    """Names of the numbers; where genes of both strands are read, their tracks are named beside each other."""
    kinds = dict.fromkeys(site.reader.names for site in sites)
    return tuple(" | ".join(dict.fromkeys(parts)) for parts in zip(*kinds, strict=True))


def _places(dataset: Dataset, span: Span) -> pd.DataFrame:
    table = dataset.regions[["name", "chrom", "start", "end", "strand"]].reset_index(drop=True)
    table.insert(0, "region", np.arange(len(table)))
    if dataset.genome is not None:
        windows = [dataset.interval(row) for row in range(len(table))]
        minus = (table["strand"] == "-").to_numpy()
        left = np.where(minus, dataset.info.window - span[1], span[0])
        table["start"] = [window.start for window in windows] + left
        table["end"] = table["start"] + span[1] - span[0]
    return table
