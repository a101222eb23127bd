"""Writing bigWig files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pybigtools

from seqgraft.errors import DataError, RunError

__all__ = ["Value", "runs", "write_bigwig"]

#: Chromosome, start, end (0-based, half-open) and the value of every base in between.
Value = tuple[str, int, int, float]


def runs(chrom: str, values: npt.NDArray[np.floating], step: int = 1, start: int = 0) -> Iterator[Value]:
    """Runs of equal values of a dense array ``(n,)``; element ``i`` covers ``step`` bases from ``start + i * step``."""
    if values.size == 0:
        return
    different = (values[1:] != values[:-1]) & ~(np.isnan(values[1:]) & np.isnan(values[:-1]))
    edges = np.concatenate([[0], np.flatnonzero(different) + 1, [values.size]])
    bounds = (start + edges * step).tolist()
    for left, right, value in zip(bounds[:-1], bounds[1:], values[edges[:-1]].tolist(), strict=True):
        yield chrom, left, right, value


def write_bigwig(path: Path | str, lengths: Mapping[str, int], values: Iterable[Value]) -> None:
    """Write ``values`` as a bigWig with the chromosomes ``lengths``; the file appears only when it is complete.

    Neighbouring intervals of equal value become one. Chromosomes come one after the other in any order, intervals of a
    chromosome sorted and disjoint. Bases without a value stay without one; a chromosome without any gets one zero
    base, because the format cannot name a chromosome that has no data.

    Raises:
        DataError: an unsorted or overlapping interval, one outside its chromosome, a value that is not finite.
        RunError: the file cannot be written.
    """
    path = Path(path)
    if not lengths:
        raise DataError("a bigWig needs at least one chromosome", where=path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.bw")
    source = _Source(_checked(path, lengths, values))
    try:
        temporary.touch()
        pybigtools.open(str(temporary), "w").write(dict(lengths), iter(source))
        if source.error is not None:
            raise source.error
        # Its own write errors are only printed: an iterator that was left, or a file that does not open, shows them.
        if not source.finished:
            raise RunError("the bigWig could not be written to its end", where=path, remedy="Free some disk space")
        pybigtools.open(str(temporary)).close()
        os.replace(temporary, path)
    except (OSError, pybigtools.BBIReadError) as error:
        if error is source.error:
            raise
        raise RunError("the bigWig cannot be written", str(error), where=path) from error
    finally:
        if temporary.exists():
            temporary.unlink()


class _Source:
    """An iterator that keeps its error: pybigtools prints what its iterator raises and writes a shorter file."""

    def __init__(self, values: Iterator[Value]) -> None:
        self.values = values
        self.error: BaseException | None = None
        self.finished = False

    def __iter__(self) -> Iterator[Value]:
        with self:
            yield from self.values
            self.finished = True

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, GeneratorExit):
            return False
        self.error = error
        return True


def _checked(path: Path, lengths: Mapping[str, int], values: Iterable[Value]) -> Iterator[Value]:
    """The same intervals with runs merged, each one checked."""
    done: set[str] = set()
    chrom, start, end, last = "", 0, 0, 0.0
    for name, left, right, value in values:
        if name != chrom:
            if chrom:
                yield chrom, start, end, last
                done.add(chrom)
            if name in done:
                raise DataError("the values of a chromosome are not together", name, where=path)
            if name not in lengths:
                raise DataError("there is no chromosome of this name", name, where=path)
            chrom, start, end, last = name, left, left, value
            length = lengths[name]
        if left < end or left < 0 or right <= left or right > length:
            what = "intervals must be sorted, disjoint, not empty and inside their chromosome"
            remedy = f"The one before ends at {end} of {length}"
            raise DataError(what, f"{name}:{left}-{right}", where=path, remedy=remedy)
        if not math.isfinite(value):
            raise DataError("a value is not finite", value, where=f"{path}, {name}:{left}-{right}")
        if left > end or value != last:
            if end > start:
                yield chrom, start, end, last
            start, last = left, value
        end = right
    if chrom:
        yield chrom, start, end, last
        done.add(chrom)
    for name in lengths:
        if name not in done:
            yield name, 0, 1, 0.0
