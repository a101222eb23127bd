"""AnnData's ``.h5ad`` files, read through HDF5 alone: columns of ``obs`` and ``var``, sums of the matrix over cells.

Read are the layouts of AnnData 0.7 and later. Nothing outside the file is followed, and the matrix comes in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from seqgraft.errors import DataError

__all__ = ["MISSING", "AnnData", "check_column", "open_h5ad"]

MISSING = ("", "NA", "NaN", "nan", "None")  # cells of no group
PIECE = 1 << 20  # entries of the matrix that are in memory at once

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AnnData:
    """An open file; made by :func:`open_h5ad`.

    Attributes:
        path: of the file, for messages.
        root: the file as HDF5.
    """

    path: Path
    root: Any

    def columns(self, frame: str, wanted: Mapping[str, str | None]) -> dict[str, list[str]]:
        """Columns of ``obs`` or ``var`` as text, "" where a value is missing.

        Args:
            wanted: name in the result -> column of the file; None for the index.

        Raises:
            DataError: there is no such column.
        """
        table, index, names = self._frame(frame)
        for column in wanted.values():
            check_column(column or index, names, f"{self.path}, {frame}")
        return {name: self._texts_of(table, column or index) for name, column in wanted.items()}

    def groups(self, column: str) -> tuple[Ints, list[str]]:
        """The group of each cell, -1 without one, and the groups' names: categories (also those without a cell), or
        the distinct values, sorted.

        Raises:
            DataError: there is no such column of ``obs``.
        """
        obs, _, names = self._frame("obs")
        check_column(column, names, f"{self.path}, obs")
        found = self._categories(obs, column)
        if found is None:
            texts = self._texts_of(obs, column)
            categories = sorted(set(texts))
            number = {name: code for code, name in enumerate(categories)}
            codes = np.array([number[text] for text in texts], dtype=np.int64)
        else:
            codes, categories = found
        known = [name for name in categories if name not in MISSING]
        place = {name: number for number, name in enumerate(known)}
        new = np.array([*(place.get(name, -1) for name in categories), -1], dtype=np.int64)
        return new[codes], known

    def sums(self, layer: str | None, row: Ints, rows: int, features: int) -> tuple[Floats, int]:
        """Sums over cells ``(rows, features)``, and how many of the values are not whole numbers.

        The matrix is read in pieces of about a million entries, so that memory does not grow with the cells.

        Args:
            layer: name in ``layers``; None for ``X``.
            row: of the result, to which each cell adds; -1 for none.

        Raises:
            DataError: no such layer, another shape, values that are negative or not finite, indices that are damaged.
        """
        node = self._matrix(layer)
        where = f"{self.path}, {'X' if layer is None else f'layers/{layer}'}"
        shape, kind = _layout(node, where)
        if shape != (row.size, features):
            remedy = "The file contradicts itself: write it again"
            raise DataError(
                f"the matrix is not {row.size} cells x {features} features", shape, where=where, remedy=remedy
            )
        sums = np.zeros(rows * features)
        fractions = 0
        pieces = _dense(node, shape) if kind == "dense" else self._sparse(node, shape, kind, where)
        for cell, feature, values in pieces:
            wrong = ~(np.isfinite(values) & (values >= 0))
            if wrong.any():
                at = int(wrong.argmax())
                what = f"cell {cell[at] + 1}, feature {feature[at] + 1} is not a count"
                remedy = "Give counts: not scaled or centred values, and no missing ones"
                raise DataError(what, float(values[at]), where=where, remedy=remedy)
            fractions += int((values % 1 != 0).sum())
            of = row[cell]
            np.add.at(sums, of[of >= 0] * features + feature[of >= 0], values[of >= 0])
        return sums.reshape(rows, features), fractions

    def _frame(self, name: str) -> tuple[Any, str, list[str]]:
        """``obs`` or ``var``, the name of its index, and all its columns."""
        frame = _node(self.root, name, self.path)
        return frame, str(frame.attrs["_index"]), [str(column) for column in frame if column != "__categories"]

    def _texts_of(self, frame: Any, name: str) -> list[str]:
        found = self._categories(frame, name)
        if found is not None:
            return ["" if code < 0 else found[1][code] for code in found[0].tolist()]
        node = _node(frame, name, self.path)
        if hasattr(node, "dtype"):
            return _texts(node)
        values, mask = (_node(node, part, self.path) for part in ("values", "mask"))  # a nullable column
        return ["" if missing else value for value, missing in zip(_texts(values), mask[()], strict=True)]

    def _categories(self, frame: Any, name: str) -> tuple[Ints, list[str]] | None:
        """Codes, -1 where missing, and the names of categories; None of another column."""
        node = _node(frame, name, self.path)
        if not hasattr(node, "dtype") and "categories" in node:  # a group
            codes, categories = _node(node, "codes", self.path)[()], _node(node, "categories", self.path)
        elif "__categories" in frame and name in (old := _node(frame, "__categories", self.path)):  # AnnData 0.7
            codes, categories = node[()], _node(old, name, self.path)
        else:
            return None
        names = _texts(categories)
        if codes.size and not -1 <= codes.min() <= codes.max() < len(names):
            what = f"a code of the column {name!r} has no category"
            raise DataError(what, int(codes.max()), where=self.path, remedy="The file is damaged: write it again")
        return codes.astype(np.int64), names

    def _matrix(self, layer: str | None) -> Any:
        if layer is None:
            return _node(self.root, "X", self.path)
        layers = _node(self.root, "layers", self.path)
        if layer not in list(layers):
            remedy = f"It has {', '.join(layers) or 'none'}; leave layer out for X"
            raise DataError("the .h5ad has no layer", layer, where=self.path, remedy=remedy)
        return _node(layers, layer, self.path)

    def _sparse(self, node: Any, shape: tuple[int, int], kind: str, where: str) -> Iterator[tuple[Ints, Ints, Floats]]:
        """Cells, features and values of pieces of a CSR (cells one after the other) or CSC (features) matrix."""
        data, indices = (_node(node, name, self.path) for name in ("data", "indices"))
        starts = _node(node, "indptr", self.path)[()].astype(np.int64)
        outer, inner = shape if kind == "csr" else shape[::-1]
        sound = starts.size == outer + 1 and starts[0] == 0 and (np.diff(starts) >= 0).all()
        if not (sound and starts[-1] == data.size == indices.size):
            raise DataError("the sparse matrix is damaged: its parts disagree", where=where, remedy="Write it again")
        for first in range(0, int(data.size), PIECE):
            last = min(first + PIECE, int(data.size))
            low, high = np.searchsorted(starts, [first, last], side="left")
            low = max(int(low) - 1, 0)
            edges = np.clip(starts[low : int(high) + 1], first, last)
            major = low + np.repeat(np.arange(edges.size - 1), np.diff(edges))
            minor = indices[first:last].astype(np.int64)
            if minor.min() < 0 or minor.max() >= inner:
                raise DataError(
                    "the sparse matrix has an index that is too large", where=where, remedy="Write it again"
                )
            values = data[first:last].astype(np.float64)
            yield (major, minor, values) if kind == "csr" else (minor, major, values)


def check_column(column: str, columns: list[str], where: object) -> None:
    """Refuses a column that is not there."""
    if column not in columns:
        remedy = f"Choose from {', '.join(columns)}"
        raise DataError("the table has no column", column, where=where, remedy=remedy)


@contextmanager
def open_h5ad(path: Path) -> Iterator[AnnData]:
    """Opens a file for reading.

    Raises:
        DataError: there is no such file, it is no HDF5, is truncated or of another layout (also while it is read), or
            h5py is not installed.
    """
    if not path.is_file():
        raise DataError("the .h5ad does not exist", where=path, remedy="Check the path")
    try:
        import h5py
    except ImportError as error:
        what = "reading .h5ad files needs the package h5py, which is not installed"
        raise DataError(what, str(path), remedy="pip install 'seqgraft[h5]'") from error
    try:
        with h5py.File(path, "r") as file:
            yield AnnData(path, file)
    except (OSError, RuntimeError, KeyError) as error:
        remedy = "The file may be truncated, or written by an AnnData before 0.7: write it again"
        raise DataError(f"the .h5ad cannot be read ({error})", where=path, remedy=remedy) from error


def _node(parent: Any, name: str, path: Path) -> Any:
    """A member of a group; nothing outside the file is followed."""
    if type(parent.get(name, getlink=True)).__name__ != "HardLink":
        raise DataError("the .h5ad lacks this, or links to another place, which is not followed", name, where=path)
    node = parent[name]
    if hasattr(node, "dtype") and (node.external or node.is_virtual):
        raise DataError("a column lies in another file, which is not read", name, where=path)
    return node


def _texts(node: Any) -> list[str]:
    values = node.asstr()[()] if node.dtype.kind in "OS" else node[()]
    return [str(value) for value in values.tolist()]


def _layout(node: Any, where: str) -> tuple[tuple[int, ...], str]:
    """Shape, and "dense", "csr" or "csc"."""
    if hasattr(node, "dtype"):
        shape, kind = node.shape, "dense"
    else:
        written = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", ""))
        kind = str(written).removesuffix("_matrix")
        shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape", ()))
    values = node if kind == "dense" else node.get("data")
    if kind not in ("dense", "csr", "csc") or getattr(values, "dtype", np.dtype("O")).kind not in "biuf":
        remedy = "Write it as a dense, CSR or CSC matrix"
        raise DataError("this is no matrix of numbers", kind, where=where, remedy=remedy)
    return tuple(int(size) for size in shape), kind


def _dense(node: Any, shape: tuple[int, ...]) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Cells, features and values of a dense matrix, without its zeros."""
    step = max(1, PIECE // max(shape[1], 1))
    for first in range(0, shape[0], step):
        block = node[first : first + step].astype(np.float64)
        cell, feature = np.nonzero(block)
        yield cell + first, feature, block[cell, feature]
