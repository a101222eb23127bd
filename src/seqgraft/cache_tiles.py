"""Tiles: what a frozen convolutional prefix makes of donors' haplotypes, each distinct stretch once.

Haplotypes of a window differ in few places, and a position after stem and tower sees some hundred bases. So the states
at the cut are kept as blocks of a few positions, named by the bases that can reach them (``Stage.needed``): haplotypes
that agree there share the block, wherever else they differ. Computed on crops, blocks are what the whole window gives,
to the rounding of float32, because local stages do the same at every position; at the window's ends the crops end too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqgraft.data.augment import View
from seqgraft.data.dataset import Dataset
from seqgraft.models.base import Span, Stage, State, Trunk
from seqgraft.sequence import Codes

__all__ = ["Divided", "Tiling", "divide", "find_tiling", "index_tiles", "run_tiles"]

_SIZES = (1, 2, 4, 8, 16, 32)  # units
_TOLERANCE = 1e-4  # of the largest value
_GENES = 4  # that the size of tiles is chosen by

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tiling:
    """How the window's positions at the cut are divided, in units of which every tensor has whole positions.

    Attributes:
        unit: bp.
        units: of the window.
        first, last: the units that are kept.
        before, after: bp on either side of a tile that can reach it.
        size: units of a tile; the last one may be smaller.
    """

    unit: int
    units: int
    first: int
    last: int
    before: int
    after: int
    size: int

    @property
    def columns(self) -> int:
        """Tiles of a window."""
        return -(-(self.last - self.first) // self.size)

    def tile(self, column: int) -> Span:
        start = self.first + column * self.size
        return start, min(start + self.size, self.last)

    def reach(self, column: int) -> Span:
        """The bp that a tile depends on: none beyond the window, whose ends are true edges."""
        start, stop = self.tile(column)
        return max(0, start * self.unit - self.before), min(self.units * self.unit, stop * self.unit + self.after)

    def crop(self, column: int) -> Span:
        """The units that a tile is computed from."""
        start, stop = self.reach(column)
        return start // self.unit, -(-stop // self.unit)

    @property
    def bases(self) -> int:
        """bp that a tile is computed from, where the window's ends are far."""
        return (-(-self.before // self.unit) + self.size + -(-self.after // self.unit)) * self.unit


def find_tiling(
    trunk: Trunk, prefix: Sequence[str], length: int, spans: Mapping[str, tuple[int, Span]]
) -> Tiling | None:
    """The tiles of one unit of a prefix; None where a stage is global or crops, or nothing divides the window.

    Args:
        spans: of each tensor that is kept, its positions and which of them are.
    """
    stages: list[Stage] = [trunk.stages[name] for name in prefix]  # type: ignore[misc]
    steps = [step for stage in stages for step in stage.steps or ()]
    if not all(stage.local for stage in stages) or any(step.kind == "crop" for step in steps):
        return None
    unit = math.lcm(trunk.stride, math.prod(step.size for step in steps if step.kind == "pool"))
    units = length // unit
    if length % unit or any(positions % units for positions, _ in spans.values()):
        return None
    each = {name: positions // units for name, (positions, _) in spans.items()}
    first = min(start // each[name] for name, (_, (start, _)) in spans.items())
    last = max(-(-stop // each[name]) for name, (_, (_, stop)) in spans.items())
    needed: dict[str, Span] = {name: (0, count) for name, count in each.items()}  # of the window's first unit
    for stage in reversed(stages):
        needed = stage.needed(needed)
    start, stop = needed["x"]
    return Tiling(unit, units, first, last, -start, stop - unit, 1)


@dataclass(frozen=True)
class Divided:
    """How many distinct tiles some sequences have, and the bytes of the index of all sequences."""

    tiling: Tiling
    count: int
    index_bytes: int

    @property
    def bases(self) -> int:
        """bp that the prefix runs on for all of them."""
        return self.count * self.tiling.bases


def divide(
    trunk: Trunk, stop: str | None, tiling: Tiling, dataset: Dataset, shown: Sequence[tuple[Numbers, Sequence[View]]]
) -> Divided | None:
    """The tiles of stored sequences, each in some views; None where the prefix gives something else on crops.

    Their size is the one with which the prefix runs on the fewest bases, judged on a few genes.

    Args:
        tiling: of one unit a tile.
    """
    groups = _by_gene(dataset, shown[0][0])
    few = [dataset.sequences(groups[i])[0] for i in np.unique(np.linspace(0, len(groups) - 1, _GENES).astype(int))]
    sizes = [replace(tiling, size=size) for size in _SIZES if size <= tiling.last - tiling.first]
    tiling = min(sizes, key=lambda each: _count(each, few) * each.bases)
    device = next(trunk.parameters()).device
    if not _same_in_tiles(trunk, stop, tiling, torch.from_numpy(few[0][:1]).to(device)):
        return None
    seen = (
        dataset.sequences(group, [view] * len(group))[0]
        for part, views in shown
        for group in _by_gene(dataset, part)
        for view in views
    )
    index_bytes = 4 * tiling.columns * dataset.sequence_count * max(len(views) for _, views in shown)
    return Divided(tiling, _count(tiling, seen), index_bytes)


def _count(tiling: Tiling, windows: Iterable[Codes]) -> int:
    known: dict[bytes, int] = {}
    for codes in windows:
        _places(tiling, codes, known)
    return len(known)


def index_tiles(tiling: Tiling, dataset: Dataset, views: Sequence[View]) -> npt.NDArray[np.int32]:
    """Which tiles make up each stored sequence in each view, ``(sequences * views, columns)``: numbers from 0 on."""
    known: dict[bytes, int] = {}
    places = np.empty((dataset.sequence_count, len(views), tiling.columns), dtype=np.int32)
    for group in _by_gene(dataset, np.arange(dataset.sequence_count)):
        for number, view in enumerate(views):
            codes, _ = dataset.sequences(group, [view] * len(group))
            places[group, number] = _places(tiling, codes, known)
    return places.reshape(-1, tiling.columns)


def run_tiles(
    trunk: Trunk, stop: str | None, tiling: Tiling, codes: Tensor, rows: Numbers, columns: Numbers
) -> Iterator[tuple[npt.NDArray[np.intp], State]]:
    """Runs the prefix on the crops of some tiles: which of them, and the state in them.

    No batch has more bases than one window: a processor's caches hold it.

    Args:
        codes: base codes ``(sequences, length)``.
        rows, columns: of each tile, the sequence that it is taken from and where.
    """
    shapes: dict[tuple[int, int, int], list[int]] = {}
    for number, column in enumerate(columns.tolist()):
        (start, end), (first, last) = tiling.tile(column), tiling.crop(column)
        shapes.setdefault((start - first, end - start, last - end), []).append(number)
    for (before, width, after), members in shapes.items():
        count = max(1, tiling.units // (before + width + after))
        for at in range(0, len(members), count):
            chosen = np.array(members[at : at + count])
            crops = []
            for row, column in zip(rows[chosen].tolist(), columns[chosen].tolist(), strict=True):
                first, last = tiling.crop(column)
                crops.append(codes[row, first * tiling.unit : last * tiling.unit])
            state = trunk.run(trunk.encode(torch.stack(crops)), stop=stop)
            kept = {
                name: value[..., before * each : (before + width) * each]
                for name, value in {"x": state.x, **state.skips}.items()
                for each in [value.shape[-1] // (before + width + after)]
            }
            yield chosen, State(kept.pop("x"), kept)


@torch.no_grad()
def _same_in_tiles(trunk: Trunk, stop: str | None, tiling: Tiling, codes: Tensor) -> bool:
    """Whether a prefix gives on crops what it gives on one window ``(1, length)``: it may look at where it is."""
    whole = trunk.run(trunk.encode(codes), stop=stop)
    columns = np.arange(tiling.columns)
    for chosen, state in run_tiles(trunk, stop, tiling, codes, np.zeros_like(columns), columns):
        for value, wanted in ((state.x, whole.x), *((skip, whole.skips[name]) for name, skip in state.skips.items())):
            each, most = wanted.shape[-1] // tiling.units, _TOLERANCE * wanted.abs().max()
            for part, column in zip(value, columns[chosen].tolist(), strict=True):
                start, last = (each * place for place in tiling.tile(column))
                if not (part - wanted[0, :, start:last]).abs().max() <= most:
                    return False
    return True


def _by_gene(dataset: Dataset, stored: Numbers) -> list[Numbers]:
    assert dataset.donors is not None
    gene = dataset.donors.sequences["gene"].to_numpy()[stored]
    return [stored[gene == number] for number in np.unique(gene)]


def _places(tiling: Tiling, codes: Codes, known: dict[bytes, int]) -> npt.NDArray[np.int32]:
    """The numbers ``(sequences, columns)`` of tiles; new ones get the next number and are added to ``known``.

    A tile's name is the sha256 of the bases that can reach it, and of how many there are on both sides.
    """
    places = np.empty((len(codes), tiling.columns), dtype=np.int32)
    for column in range(tiling.columns):
        (start, stop), (first, last) = tiling.tile(column), tiling.reach(column)
        seen = np.ascontiguousarray(codes[:, first:last])
        _, kinds, found = np.unique(seen.view(f"V{last - first}")[:, 0], return_index=True, return_inverse=True)
        edges = f"{start * tiling.unit - first} {last - stop * tiling.unit} ".encode()
        names = [hashlib.sha256(edges + seen[kind].tobytes()).digest() for kind in kinds]
        places[:, column] = np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int32)[found]
    return places
