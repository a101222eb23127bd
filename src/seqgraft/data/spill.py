"""Where fragments lie, kept on disk by chromosome and track, and the bins that they add up to.

Memory stays the same however many fragments there are: positions go to a file without a name as they are read, and come
back a stretch of a chromosome and a track at a time. All sums are of whole numbers, so they are exact, and bins are
the same whether they are counted here or summed from the single bases of a bigWig.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from seqgraft.errors import RunError

__all__ = ["Spill", "base_signal", "bin_signal", "layers_of"]

BATCH = 1 << 20  # marks counted at once

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
#: Positions ``(n,)``, each a count of one, or starts and ends ``(n, 2)``, each base between them a count of one.
Marks = npt.NDArray[np.int32]


@dataclass
class Spill:
    """Marks by chromosome and key (a whole number: track and half).

    Attributes:
        folder: on a disk with room for 4 bytes per number.
    """

    folder: Path
    _file: IO[bytes] = field(init=False)
    _pieces: dict[tuple[str, int], list[tuple[int, tuple[int, ...], int, int]]] = field(default_factory=dict)
    _totals: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __enter__(self) -> Spill:
        self._file = tempfile.TemporaryFile(dir=self.folder, prefix=".fragments.")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, chrom: str, keys: Ints, marks: npt.NDArray[Any]) -> None:
        """Keeps marks ``(n,)`` or ``(n, 2)`` of one chromosome, each under its key.

        Raises:
            RunError: the disk is full.
        """
        if not keys.size:
            return
        order = np.argsort(keys.astype(np.int16 if keys.max() < 1 << 15 else np.int64), kind="stable")
        keys, marks = keys[order], np.ascontiguousarray(marks[order], dtype=np.int32)
        edges = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
        for left, right in pairwise(edges.tolist()):
            part = marks[left:right]
            piece = (self._file.tell(), part.shape, int(part.min()), int(part.max()) + 1)
            self._pieces.setdefault((chrom, int(keys[left])), []).append(piece)
            self._totals[chrom, int(keys[left])] += (
                len(part) if part.ndim == 1 else int(np.diff(part).sum(dtype=np.int64))
            )
            try:
                self._file.write(part.tobytes())
            except OSError as error:
                what = f"positions of fragments cannot be kept on disk ({error.strerror})"
                raise RunError(what, str(self.folder), remedy="Free some disk space") from error

    def total(self, chrom: str, key: int) -> int:
        """Counts of a chromosome and key: positions, or bases of spans."""
        return self._totals[chrom, key]

    def pieces(self, chrom: str, key: int, first: int = 0, last: int = 1 << 31) -> Iterator[Marks]:
        """The pieces that have marks in ``first..last``; they may have others too."""
        self._file.flush()
        for offset, shape, lowest, highest in self._pieces.get((chrom, key), []):
            if lowest < last and highest > first:
                data = os.pread(self._file.fileno(), 4 * int(np.prod(shape)), offset)
                yield np.frombuffer(data, dtype=np.int32).reshape(shape)

    def read(self, chrom: str, keys: Iterable[int], first: int, last: int) -> Iterator[Marks]:
        """All marks of some keys in ``first..last``, and some others, about a million at a time."""
        found: list[Marks] = []
        for piece in chain.from_iterable(self.pieces(chrom, key, first, last) for key in keys):
            found.append(piece)
            if sum(map(len, found)) >= BATCH:
                yield np.concatenate(found)
                found = []
        if found:
            yield np.concatenate(found)


def base_signal(batches: Iterable[Marks], first: int, last: int) -> Floats:
    """Counts of each base of ``first..last``."""
    signal = np.zeros(last - first, dtype=np.int64)
    for marks in batches:
        if marks.ndim == 1:
            inside = marks[(marks >= first) & (marks < last)]
            signal += np.bincount(inside - first, minlength=len(signal))
        else:
            inside = marks[(marks[:, 1] > first) & (marks[:, 0] < last)].clip(first, last) - first
            begun, ended = (np.bincount(inside[:, column], minlength=len(signal) + 1) for column in (0, 1))
            signal += np.cumsum(begun - ended)[:-1]
    return signal.astype(np.float64)


def layers_of(starts: Ints, length: int) -> list[Ints]:
    """Regions of one length, sorted by start, in as few sets as possible of which each has none that overlap."""
    ends: list[int] = []
    layers: list[list[int]] = []
    for number, start in enumerate(starts.tolist()):
        free = next((layer for layer, end in enumerate(ends) if end <= start), len(ends))
        if free == len(ends):
            ends.append(0)
            layers.append([])
        ends[free] = start + length
        layers[free].append(number)
    return [np.array(layer, dtype=np.int64) for layer in layers]


def bin_signal(batches: Iterable[Marks], starts: Ints, bins: int, bin_size: int) -> Floats:
    """Summed bins ``(regions, bins)`` of disjoint regions that begin at ``starts``, sorted.

    A span adds to a bin the bases that it has there. With the change w of coverage at an event (1 at a start, -1 at
    an end), a bin is its size times the sum of all w before it, plus for each w within it the bases to its right.
    """
    slots = bins + 1  # the last is whatever follows a region; one more in front of the first
    size = len(starts) * slots + 1
    count, change = np.zeros(size), np.zeros(size)

    def places(positions: Marks) -> tuple[Ints, Ints]:
        region = np.searchsorted(starts, positions, "right") - 1
        offset = positions - starts[region]  # of what lies before the first region: anything
        return np.where(region < 0, 0, 1 + region * slots + np.minimum(offset // bin_size, bins)), offset

    for marks in batches:
        if marks.ndim == 1:
            count += np.bincount(places(marks)[0], minlength=size)
            continue
        for column, sign in ((0, 1), (1, -1)):
            slot, offset = places(marks[:, column])
            change += sign * np.bincount(slot, minlength=size)
            count += sign * np.bincount(slot, (bin_size - offset % bin_size).astype(np.float64), minlength=size)
    count += bin_size * (np.cumsum(change) - change)
    return count[1:].reshape(len(starts), slots)[:, :bins]
