"""Tracks: what each output channel means, how raw bins become model-scale targets, and back.

A track is one signal: a strand of an RNA-seq experiment, a chromatin mark, a label column. Raw values are *summed*
bins (a label is one bin). Model-scale ("squashed") values are what heads are trained on. The axis order of every
array is ``(..., tracks, bins)``.

This module is the only door through which bigWigs are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

from seqgraft.errors import DataError, Problems
from seqgraft.genome import Interval

if TYPE_CHECKING:
    import pybigtools
    from numpy.typing import NDArray

__all__ = [
    "LINKS",
    "SQUASHES",
    "STATISTICS",
    "STRAND_ENDINGS",
    "TrackTable",
    "coarsen",
    "open_bigwig",
    "read_bases",
    "read_bins",
    "read_chrom",
    "squash",
    "unsquash",
]

LINKS = ("identity", "softplus", "sigmoid", "softmax")
STATISTICS = ("sum", "mean")
SQUASHES = ("none", "sqrt", "exp75", "none_legacy", "power75_legacy")

#: How the names of the two strands of a pair end.
STRAND_ENDINGS = (("+", "-"), ("_plus", "_minus"), (".plus", ".minus"), ("_fwd", "_rev"), (".fwd", ".rev"))
_NAN = float("nan")
_DEFAULTS: dict[str, Any] = {
    "name": None,
    "group": "tracks",
    "link": "softplus",
    "strand_pair": None,
    "statistic": "sum",
    "scale": 1.0,
    "center": 0.0,
    "squash": "none",
    "soft_clip": _NAN,
    "clip": _NAN,
    "condition": "",
    "replicate": "",
    "depth": _NAN,
    "file": "",
    "loss_weight": 1.0,
}
_NUMBERS = ("scale", "center", "soft_clip", "clip", "depth", "loss_weight")
_TEXTS = tuple(column for column in _DEFAULTS if column not in _NUMBERS)
_CHOICES = {"link": LINKS, "statistic": STATISTICS, "squash": SQUASHES}
_SHARED_BY_STRANDS = ("group", "link", "statistic", "scale", "center", "squash", "soft_clip", "clip", "loss_weight")


@dataclass(frozen=True, eq=False)
class TrackTable:
    """One row per track, in the order of the track axis.

    Columns: ``name`` (unique), ``group`` (tracks with one head, link and loss), ``link``, ``strand_pair`` (the
    partner's name; its own name if unstranded), ``statistic``, ``scale``, ``center``, ``squash``, ``soft_clip``,
    ``clip`` (NaN: none), ``condition``, ``replicate``, ``depth`` (total raw signal, NaN if unknown), ``file``,
    ``loss_weight``. Make one with :meth:`build` (fills in defaults) or :meth:`of` (every column is there).
    """

    frame: pd.DataFrame

    @classmethod
    def build(cls, rows: Iterable[Mapping[str, Any]]) -> TrackTable:
        """A table from ``{column: value}`` rows; missing values take their defaults.

        Strand pairs that are not given follow from names that end in ``+``/``-``, ``_plus``/``_minus``,
        ``.fwd``/``.rev`` and the like, in any row order.

        Raises:
            DataError: unknown columns or values, duplicated names, unpaired strands; all of them at once.
        """
        listed = [dict(row) for row in rows]
        unknown = sorted({key for row in listed for key in row} - set(_DEFAULTS))
        if unknown:
            raise DataError(
                "the track table has unknown columns", unknown, remedy=f"The columns are {', '.join(_DEFAULTS)}"
            )
        filled = [{c: default if _absent(row.get(c)) else row[c] for c, default in _DEFAULTS.items()} for row in listed]
        names = {str(row["name"]) for row in filled if row["name"] is not None}
        problems = Problems(DataError)
        for number, row in enumerate(filled):
            if row["name"] is not None and row["strand_pair"] is None:
                row["strand_pair"] = _derive_pair(str(row["name"]), names, f"track table row {number}", problems)
        return cls._checked(pd.DataFrame(filled, columns=list(_DEFAULTS)), problems)

    @classmethod
    def none(cls) -> TrackTable:
        """A table without rows, of a trunk without heads."""
        return cls(pd.DataFrame(columns=list(_DEFAULTS)))

    @classmethod
    def of(cls, frame: pd.DataFrame) -> TrackTable:
        """A table from a frame with every column, such as ``tracks.parquet``.

        Raises:
            DataError: unknown or missing columns, bad values, duplicated names, broken pairs; all of them at once.
        """
        problems = Problems(DataError)
        for column in _DEFAULTS:
            if column not in frame.columns:
                problems.add("the track table lacks the column", column, remedy="TrackTable.build fills in defaults")
        for column in frame.columns:
            if column not in _DEFAULTS:
                remedy = f"The columns are {', '.join(_DEFAULTS)}"
                problems.add("the track table has an unknown column", str(column), remedy=remedy)
        problems.raise_if_any()
        return cls._checked(frame.loc[:, list(_DEFAULTS)].reset_index(drop=True), problems)

    @classmethod
    def _checked(cls, frame: pd.DataFrame, problems: Problems) -> TrackTable:
        if frame.empty:
            problems.add("the track table has no rows", remedy="List at least one track")
        problems.raise_if_any()
        for column in _NUMBERS:
            frame[column] = _numbers(frame[column], column, problems)
        for column in _TEXTS:
            frame[column] = ["" if _absent(value) else str(value) for value in frame[column]]
        for number, row in enumerate(frame.to_dict("records")):
            _check_row(row, f"track table row {number} ({row['name']})", problems)
        repeated = frame["name"][frame["name"].duplicated() & (frame["name"] != "")].unique()
        for name in repeated:
            problems.add("the track name is used more than once", str(name), remedy="Give every track its own name")
        if not len(repeated):
            _check_pairs(frame, problems)
        for group, rows in frame.groupby("group", sort=False):
            links = sorted(set(rows["link"]))
            if len(links) > 1:
                problems.add(
                    f"the tracks of group {str(group)!r} have different links",
                    links,
                    remedy="One group has one head and one link; split the group",
                )
        problems.raise_if_any()
        return cls(frame)

    def __len__(self) -> int:
        return len(self.frame)

    def __eq__(self, other: object) -> bool:
        return self.frame.equals(other.frame) if isinstance(other, TrackTable) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def names(self) -> list[str]:
        """Track names in axis order."""
        return [str(name) for name in self.frame["name"]]

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """Group name -> positions on the track axis, both in order of appearance."""
        groups: dict[str, list[int]] = {}
        for position, group in enumerate(self.frame["group"]):
            groups.setdefault(str(group), []).append(position)
        return groups

    @cached_property
    def permutation(self) -> NDArray[np.intp]:
        """``values[..., permutation, ::-1]`` is what the tracks look like on the other strand."""
        position = {name: index for index, name in enumerate(self.names)}
        return np.array([position[pair] for pair in self.frame["strand_pair"]], dtype=np.intp)

    @cached_property
    def strands(self) -> list[str]:
        """Strand of each track: "+" or "-" by the ending of a paired track's name, "." without a partner, else "?"."""
        found = []
        for name, pair in zip(self.frame["name"], self.frame["strand_pair"], strict=True):
            ends = [sign for ends in STRAND_ENDINGS for end, sign in zip(ends, "+-", strict=True) if name.endswith(end)]
            found.append("." if name == pair else ends[0] if ends else "?")
        return found

    @cached_property
    def links(self) -> list[str]:
        """The link of each track."""
        return [str(link) for link in self.frame["link"]]

    @cached_property
    def _is_mean(self) -> NDArray[np.bool_]:
        """Whether the statistic of each track is the mean."""
        return (self.frame["statistic"] == "mean").to_numpy(dtype=np.bool_)

    @cached_property
    def _parts(self) -> list[tuple[str, list[int]]]:
        """(squash, positions): tracks that share one squashing formula."""
        parts: dict[str, list[int]] = {}
        for position, kind in enumerate(self.frame["squash"]):
            parts.setdefault(str(kind), []).append(position)
        return list(parts.items())

    def column(self, name: str) -> NDArray[np.float64]:
        """A numeric column as float64 ``(tracks,)``."""
        return self.frame[name].to_numpy(dtype=np.float64)

    def select(self, names: Sequence[str]) -> TrackTable:
        """The named tracks, in the given order; both strands of a pair or none.

        Raises:
            DataError: a name is not in the table, or a strand partner is left out.
        """
        position = {name: index for index, name in enumerate(self.names)}
        absent = [name for name in names if name not in position]
        if absent:
            raise DataError("the track table has no track", absent, remedy=f"Choose from {', '.join(self.names)}")
        return TrackTable.of(self.frame.iloc[[position[name] for name in names]])

    def concat(self, other: TrackTable) -> TrackTable:
        """These tracks followed by the other's.

        Raises:
            DataError: a name is in both, or a group has two links.
        """
        return TrackTable.of(pd.concat([self.frame, other.frame], ignore_index=True))

    def replace(self, **columns: Any) -> TrackTable:
        """A copy with whole columns replaced, checked again."""
        return TrackTable.of(self.frame.assign(**columns))

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()


def _absent(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and np.isnan(value)) or value is pd.NA


def _numbers(column: pd.Series[Any], name: str, problems: Problems) -> NDArray[np.float64]:
    numbers = np.full(len(column), np.nan)
    for number, value in enumerate(column):
        if _absent(value):
            continue
        try:
            numbers[number] = float(value)
        except (TypeError, ValueError):
            where = f"track table row {number}"
            problems.add(f"column {name} is not a number", value, where=where, remedy="Write a plain number")
    return numbers


def _derive_pair(name: str, names: set[str], where: str, problems: Problems) -> str:
    for forward, reverse in STRAND_ENDINGS:
        for own, partner in ((forward, reverse), (reverse, forward)):
            if not name.endswith(own):
                continue
            pair = name.removesuffix(own) + partner
            if pair in names:
                return pair
            problems.add(
                f"the strand {name!r} has no partner",
                pair,
                where=where,
                remedy="Add the other strand, or set strand_pair to the track's own name if it has no strands",
            )
    return name


def _check_row(row: Mapping[Any, Any], where: str, problems: Problems) -> None:
    if not row["name"]:
        problems.add("the track has no name", where=where, remedy="Give every track its own name")
    if not row["group"]:
        problems.add("the track has no group", where=where, remedy="Name the group, or leave the column out")
    for column, choices in _CHOICES.items():
        if row[column] not in choices:
            problems.add(f"{column} is unknown", row[column], where=where, remedy=f"Choose from {', '.join(choices)}")
    if not np.isfinite(row["scale"]) or row["scale"] == 0:
        problems.add("scale must be a finite number other than 0", row["scale"], where=where, remedy="Use 1 for none")
    if not np.isfinite(row["center"]) or (row["center"] != 0 and str(row["squash"]).endswith("_legacy")):
        problems.add(
            "center must be a number, 0 with a legacy squash", row["center"], where=where, remedy="Use 0 for none"
        )
    for column in ("soft_clip", "clip"):
        if row[column] <= 0 or np.isinf(row[column]):
            problems.add(f"{column} must be positive", row[column], where=where, remedy="Leave it empty for none")
    if not (np.isfinite(row["loss_weight"]) and row["loss_weight"] >= 0):
        problems.add("loss_weight must be 0 or more", row["loss_weight"], where=where, remedy="Use 1 for the usual")


def _check_pairs(frame: pd.DataFrame, problems: Problems) -> None:
    rows = {row["name"]: row for row in frame.to_dict("records")}
    for name, row in rows.items():
        where, pair = f"track {name}", row["strand_pair"]
        partner = rows.get(pair)
        if partner is None:
            problems.add(
                "the strand partner is not in the table",
                pair,
                where=where,
                remedy="Add it, or set strand_pair to the track's own name",
            )
        elif partner["strand_pair"] != name:
            problems.add(
                f"its strand partner is {pair!r}, whose own partner is",
                partner["strand_pair"],
                where=where,
                remedy="Strand partners must name each other",
            )
        elif name < pair:
            for column in _SHARED_BY_STRANDS:
                if not (row[column] == partner[column] or (_absent(row[column]) and _absent(partner[column]))):
                    problems.add(
                        f"the two strands {name!r} and {pair!r} differ in {column}",
                        (row[column], partner[column]),
                        where=where,
                        remedy="Both strands of a pair need the same settings",
                    )


Array = TypeVar("Array")
_Formula = Callable[[Any, str, Callable[[str], Any], Any, Any], Any]


def _door(values: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The array library of ``values`` and a function that turns a float64 constant into its kind of array."""
    if isinstance(values, np.ndarray):
        return np, lambda constant: np.asarray(constant, dtype=values.dtype)
    import torch

    return torch, lambda constant: torch.as_tensor(constant, dtype=values.dtype, device=values.device)


def _by_squash(values: Any, tracks: TrackTable, formula: _Formula) -> Any:
    """Apply ``formula(values, kind, column, zero, xp)`` to each set of tracks that share a squash."""
    xp, constant = _door(values)
    results = []
    for kind, rows in tracks._parts:

        def column(name: str, rows: list[int] = rows) -> Any:
            return constant(tracks.column(name)[rows][:, None])

        part = values if len(tracks._parts) == 1 else values[..., rows, :]
        results.append(formula(part, kind, column, constant(0.0), xp))
    if len(results) == 1:
        return results[0]
    order = np.argsort(np.concatenate([rows for _, rows in tracks._parts])).tolist()
    return xp.concatenate(results, axis=-2)[..., order, :]


def _per_bin(values: Any, tracks: TrackTable, bin_size: int) -> Any:
    """What divides a sum to give each track's statistic, ``(tracks, 1)``; checks the axes."""
    shape = tuple(values.shape)
    if len(shape) < 2 or shape[-2] != len(tracks):
        raise DataError(f"the values need the shape (..., {len(tracks)} tracks, bins)", shape, remedy="Check the axes")
    return _door(values)[1](np.where(tracks._is_mean, float(bin_size), 1.0)[:, None])


def squash(bins: Array, tracks: TrackTable, bin_size: int) -> Array:
    """Raw summed bins -> model scale; floating numpy array or torch tensor ``(..., tracks, bins)``; NaN stays NaN.

    ``x`` is the sum, or the mean over ``bin_size`` base pairs. With ``y = (x - center) * scale``: ``sqrt`` is
    ``sqrt(1 + y) - 1``, ``exp75`` is ``(1 + y)^0.75 - 1``; then the soft clip ``y > c: c - 1 + sqrt(y - c + 1)``,
    then the hard clip to ``[-clip, clip]`` (Baskerville's formulas). The legacy order of the Borzoi paper is
    ``x^0.75`` (``none_legacy``: ``x``), soft clip ``c + sqrt(x - c)``, hard clip, and the scale last.

    Raises:
        DataError: the track axis does not fit the table.
    """
    summed: Any = bins
    squashed: Array = _by_squash(summed / _per_bin(bins, tracks, bin_size), tracks, _squash_part)
    return squashed


def _squash_part(x: Any, kind: str, column: Callable[[str], Any], zero: Any, xp: Any) -> Any:
    legacy = kind.endswith("_legacy")
    soft, hard = _no_limit(column("soft_clip"), xp), _no_limit(column("clip"), xp)
    y = x if legacy else (x - column("center")) * column("scale")
    if kind == "sqrt":
        y = xp.sqrt(1 + y) - 1
    elif kind == "exp75":
        y = (1 + y) ** 0.75 - 1
    elif kind == "power75_legacy":
        y = y**0.75
    above = xp.maximum(y - soft, zero)
    y = xp.where(y > soft, soft + xp.sqrt(above) if legacy else soft - 1 + xp.sqrt(above + 1), y)
    y = xp.maximum(xp.minimum(y, hard), -hard)
    return y * column("scale") if legacy else y


def unsquash(values: Array, tracks: TrackTable, bin_size: int) -> Array:
    """Model scale -> raw summed bins: the exact inverse of :func:`squash` below the hard clip; numpy or torch.

    Values below the range of a squash (a prediction under -1, say) map to the lowest raw value it knows.

    Raises:
        DataError: the track axis does not fit the table.
    """
    per_bin = _per_bin(values, tracks, bin_size)
    raw: Array = _by_squash(values, tracks, _unsquash_part) * per_bin
    return raw


def _unsquash_part(y: Any, kind: str, column: Callable[[str], Any], zero: Any, xp: Any) -> Any:
    legacy = kind.endswith("_legacy")
    scale, soft = column("scale"), _no_limit(column("soft_clip"), xp)
    y = y / scale if legacy else y
    above = xp.maximum(y - soft, zero)
    y = xp.where(y > soft, soft + above**2 if legacy else soft - 1 + (above + 1) ** 2, y)
    if kind == "sqrt":
        y = xp.maximum(1 + y, zero) ** 2 - 1
    elif kind == "exp75":
        y = xp.maximum(1 + y, zero) ** (4 / 3) - 1
    elif kind == "power75_legacy":
        y = xp.maximum(y, zero) ** (4 / 3)
    return y if legacy else y / scale + column("center")


def _no_limit(limit: Any, xp: Any) -> Any:
    return xp.where(xp.isnan(limit), xp.full_like(limit, float("inf")), limit)


def coarsen(bins: Array, factor: int) -> Array:
    """Sum neighbouring raw bins: ``(..., bins)`` -> ``(..., bins / factor)``; numpy or torch.

    Raises:
        DataError: the number of bins is not a multiple of ``factor``.
    """
    fine: Any = bins
    shape = tuple(fine.shape)
    if factor < 1 or shape[-1] % factor:
        raise DataError(f"{shape[-1]} bins cannot be joined by", factor, remedy="Use a divisor of the number of bins")
    coarse: Array = fine.reshape(*shape[:-1], shape[-1] // factor, factor).sum(-1)
    return coarse


@contextmanager
def open_bigwig(path: Path) -> Iterator[pybigtools.BBIReader]:
    """An open bigWig. Handles do not pickle: open one per process.

    Raises:
        DataError: the file is missing, is not a bigWig, or is truncated.
    """
    import pybigtools

    if not Path(path).is_file():
        raise DataError("the bigWig does not exist", where=path, remedy="Check the path in the track table")
    try:
        reader = pybigtools.open(str(path))
    except (pybigtools.BBIFileClosed, pybigtools.BBIReadError, ValueError, OSError) as error:
        raise DataError(f"the bigWig cannot be opened ({error})", where=path, remedy=_BROKEN) from error
    with reader:
        if not reader.is_bigwig:
            raise DataError("the file is a bigBed, not a bigWig", where=path, remedy="Give the signal as a bigWig")
        yield reader


_BROKEN = "The file may be truncated or not a bigWig; copy or make it again"


def read_chrom(
    reader: pybigtools.BBIReader, chrom: str, where: object, start: int = 0, end: int | None = None
) -> NDArray[np.float64]:
    """Signal of each base of a contig, or of ``start..end`` within it; uncovered bases are 0.

    Raises:
        DataError: the contig is not in the file, or the file is truncated.
    """
    import pybigtools

    chroms = reader.chroms()
    if chrom not in chroms:
        raise DataError("the bigWig has no chromosome", chrom, where=where, remedy=f"It has {', '.join(chroms)}")
    end = chroms[chrom] if end is None else end
    try:
        values: NDArray[np.float64] = reader.values(chrom, start, end, fillna=0.0)
    except (pybigtools.BBIReadError, ValueError, OSError) as error:
        raise DataError(f"the bigWig cannot be read on {chrom} ({error})", where=where, remedy=_BROKEN) from error
    return values


def read_bases(path: Path, interval: Interval) -> NDArray[np.float64]:
    """Signal of each base of an interval, float64; uncovered bases and those beyond the contig are 0.

    Raises:
        DataError: the contig is not in the file, or the file cannot be read.
    """
    bases = np.zeros(interval.length)
    with open_bigwig(path) as reader:
        size = reader.chroms().get(interval.chrom, interval.end)
        start, end = max(interval.start, 0), min(interval.end, size)
        if start < end:
            signal = read_chrom(reader, interval.chrom, path, start, end)
            bases[start - interval.start : end - interval.start] = signal
    return bases


def read_bins(path: Path, interval: Interval, bin_size: int) -> NDArray[np.float64]:
    """Summed signal of each bin of an interval, float64 ``(bins,)``; see :func:`read_bases`.

    Raises:
        DataError: as :func:`read_bases`, or the interval is not a whole number of bins.
    """
    if interval.length % bin_size:
        raise DataError(f"an interval of {interval.length} bp is not a whole number of bins of", bin_size)
    return coarsen(read_bases(path, interval), bin_size)
