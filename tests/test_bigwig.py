from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pybigtools
import pytest

from seqgraft.bigwig import Value, runs, write_bigwig
from seqgraft.errors import DataError, RunError

LENGTHS = {"chr2": 20_000, "chr1": 50, "chr10": 7}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts, fine = rng.poisson(0.5, 1000).astype(np.float64), rng.random(50)
    path = tmp_path / "track.bw"
    write_bigwig(path, LENGTHS, chain(runs("chr1", fine), runs("chr2", counts, 16)))
    reader = pybigtools.open(str(path))
    assert reader.chroms() == LENGTHS
    np.testing.assert_array_equal(reader.values("chr2", 0, 16_000, fillna=0), np.repeat(counts, 16))
    np.testing.assert_allclose(reader.values("chr1", 0, 50, fillna=0), fine, rtol=1e-6)
    assert np.isnan(reader.values("chr2", 16_000, 16_010, fillna=None)).all()
    assert [p.name for p in tmp_path.iterdir()] == ["track.bw"]


def test_runs_are_merged(tmp_path: Path) -> None:
    assert list(runs("chr1", np.array([1.0, 1.0, 2.0]), 4, 8)) == [("chr1", 8, 16, 1.0), ("chr1", 16, 20, 2.0)]
    assert list(runs("chr1", np.array([]))) == []
    write_bigwig(tmp_path / "a.bw", LENGTHS, (("chr2", i, i + 1, 3.0) for i in range(100)))
    assert list(pybigtools.open(str(tmp_path / "a.bw")).records("chr2")) == [(0, 100, 3.0)]


@pytest.mark.parametrize(
    "values",
    [
        [("chr2", 0, 4, 1.0), ("chr2", 3, 5, 1.0)],
        [("chr2", 8, 9, 1.0), ("chr2", 3, 5, 1.0)],
        [("chr2", 0, 4, float("nan"))],
        [("chr2", 0, 4, float("inf"))],
        [("chr3", 0, 4, 1.0)],
        [("chr1", 0, 51, 1.0)],
        [("chr1", 5, 5, 1.0)],
        [("chr1", -1, 5, 1.0)],
        [("chr1", 0, 5, 1.0), ("chr2", 0, 1, 1.0), ("chr1", 6, 7, 1.0)],
    ],
)
def test_bad_values_leave_nothing(tmp_path: Path, values: list[Value]) -> None:
    with pytest.raises(DataError):
        write_bigwig(tmp_path / "bad.bw", LENGTHS, values)
    assert list(tmp_path.iterdir()) == []


def test_the_callers_error_arrives(tmp_path: Path) -> None:
    def broken() -> Iterator[Value]:
        yield "chr2", 0, 4, 1.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bigwig(tmp_path / "bad.bw", LENGTHS, broken())
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        write_bigwig(tmp_path / "missing" / "a.bw", LENGTHS, [])
    with pytest.raises(DataError):
        write_bigwig(tmp_path / "a.bw", {}, [])
