"""Markov models of bases: what a language model's guess of a hidden base has to beat.

A chain of order k says of a base what the k bases before it do. Of hidden bases whose neighbours on *both* sides are
known, the chain has an exact conditional: proportional to the product of its probabilities over all bases that the
hidden ones take part in. That is what it is asked here, since a model of masked tokens reads both sides too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from seqgraft.sequence import Codes, N, reverse_complement

__all__ = ["Markov"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SMOOTHING = 4.0  # how many bases the next lower order counts for, one per letter
_AT_ONCE = 1 << 22  # numbers


@dataclass(frozen=True, eq=False)
class Markov:
    """A chain of order ``len(tables) - 1`` with those of all lower orders, which stand in where less is known.

    Attributes:
        tables: of order m the logarithms of the probabilities, ``(4**m, 4)``: of the base (last) after the m before it,
            whose number to base four is the first axis.
    """

    tables: tuple[Floats, ...]

    @property
    def order(self) -> int:
        return len(self.tables) - 1

    @classmethod
    def fit(cls, sequences: Iterable[Codes], order: int) -> Markov:
        """From both strands of sequences ``(length,)`` of base codes.

        The probabilities of order m are ``(n(context, base) + 4 p(base)) / (n(context) + 4)`` with p those of order
        m - 1 (MacKay and Peto 1995), and uniform below order 0. What holds an unknown base is not counted.
        """
        counts = np.zeros(4 ** (order + 1))
        for codes in sequences:
            for strand in (codes, reverse_complement(codes[None])[0]):
                kmers, known = _kmers(strand[None], order + 1)
                counts += np.bincount(kmers[known], minlength=len(counts))
        tables: list[Floats] = []
        below = np.full((1, 4), 0.25)
        for m in range(order + 1):
            found = counts.reshape(4 ** (order - m), 4**m, 4).sum(0)
            lower = np.tile(below, (len(found) // len(below), 1))
            below = (found + SMOOTHING * lower) / (found.sum(1, keepdims=True) + SMOOTHING)
            tables.append(np.log(below))
        return cls(tuple(tables))

    def below(self, order: int) -> Markov:
        """The chain of a lower order."""
        return Markov(self.tables[: order + 1])

    def hidden(self, codes: Codes, row: Ints, start: Ints, width: int) -> Floats:
        """Logarithms of the probabilities of hidden bases given all others, ``(places, 4**width)``.

        Args:
            codes: ``(rows, length)``.
            row, start: ``(places,)``: the bases ``[start, start + width)`` of a row are hidden.

        Returns:
            For every sequence of ``width`` bases, in the order of their numbers to base four.
        """
        k = self.order
        padded = np.pad(np.minimum(codes, N), ((0, 0), (k, k)), constant_values=N)
        out = np.empty((len(row), 4**width))
        step = max(1, _AT_ONCE // 4**width)
        for first in range(0, len(row), step):
            part = slice(first, first + step)
            around = padded[row[part, None], start[part, None] + np.arange(2 * k + width)].astype(np.int64)
            around[:, k : k + width] = 0
            total = self._joint(around, width)
            total -= total.max(1, keepdims=True)
            out[part] = total - np.log(np.exp(total).sum(1, keepdims=True))
        return out

    def _joint(self, around: Ints, width: int) -> Floats:
        """``hidden`` before it is normalised, of ``(places, order + width + order)`` bases, the middle ones hidden.

        The chain's factor of a base is of known bases, hidden ones and again known ones: a slice of a table, which
        counts for all sequences that have these hidden bases.
        """
        k = self.order
        known = around < N
        total = np.zeros((len(around), 4**width))
        for j in range(k, 2 * k + width):
            run = np.logical_and.accumulate(known[:, j - k : j][:, ::-1], axis=1).sum(1)  # known bases before it
            for m in np.unique(run[known[:, j]]).tolist():
                low, high = max(j - m, k), min(j + 1, k + width)  # hidden ones among those that it depends on
                if low >= high:
                    continue  # the same for all sequences
                of = np.flatnonzero(known[:, j] & (run == m))
                before, after = _number(around[of, j - m : low]), _number(around[of, high : j + 1])
                table = self.tables[m].reshape(4 ** max(0, low - j + m), 4 ** (high - low), 4 ** (j + 1 - high))
                shape = (len(of), 4 ** (low - k), 4 ** (high - low), 4 ** (k + width - high))
                total[of] += np.broadcast_to(table[before, :, after][:, None, :, None], shape).reshape(len(of), -1)
        return total


def _number(bases: Ints) -> Ints:
    """Sequences of known bases ``(n, length)`` as numbers to base four."""
    return np.asarray(bases @ 4 ** np.arange(bases.shape[1])[::-1])


def _kmers(codes: Codes, k: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Numbers to base four of the k-mers of each row, and which of them have no unknown base."""
    windows = np.lib.stride_tricks.sliding_window_view(codes, k, axis=1)
    known = np.asarray((windows < N).all(-1))
    return np.where(known, windows @ 4 ** np.arange(k)[::-1], 0), known
