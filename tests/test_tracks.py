from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pybigtools
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqgraft.errors import DataError
from seqgraft.genome import Interval
from seqgraft.tracks import SQUASHES, TrackTable, coarsen, open_bigwig, read_bases, read_bins, squash, unsquash


def settings_of_a_track() -> st.SearchStrategy[dict[str, object]]:
    limit = st.one_of(st.none(), st.floats(1, 400))
    return st.fixed_dictionaries(
        {
            "squash": st.sampled_from(SQUASHES),
            "statistic": st.sampled_from(["sum", "mean"]),
            "scale": st.floats(0.01, 10),
            "soft_clip": limit,
        }
    )


def table_of(settings: list[dict[str, object]]) -> TrackTable:
    return TrackTable.build([{"name": f"t{number}", **row} for number, row in enumerate(settings)])


@given(st.lists(settings_of_a_track(), min_size=1, max_size=4), st.integers(0, 2**32 - 1), st.sampled_from([1, 32]))
def test_unsquash_is_the_inverse(settings: list[dict[str, object]], seed: int, bin_size: int) -> None:
    tracks = table_of(settings)
    raw = np.random.default_rng(seed).gamma(0.3, 2000, size=(2, len(tracks), 9))
    model_scale = squash(raw, tracks, bin_size)
    assert model_scale.shape == raw.shape
    np.testing.assert_allclose(unsquash(model_scale, tracks, bin_size), raw, rtol=1e-9, atol=1e-6)


@given(st.lists(settings_of_a_track(), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_squash_never_turns_the_order_round(settings: list[dict[str, object]], seed: int) -> None:
    tracks = table_of(settings)
    raw = np.sort(np.random.default_rng(seed).gamma(0.3, 2000, size=(len(tracks), 50)), axis=-1)
    model_scale = squash(raw, tracks, 16)
    assert (np.diff(model_scale, axis=-1) >= 0).all()
    assert (model_scale[raw == 0] == 0).all()


@given(st.lists(settings_of_a_track(), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_torch_and_numpy_agree(settings: list[dict[str, object]], seed: int) -> None:
    tracks = table_of([{**row, "clip": 50.0} for row in settings])
    raw = np.random.default_rng(seed).gamma(0.3, 2000, size=(2, len(tracks), 5))
    expected = squash(raw, tracks, 8)
    tensor = squash(torch.from_numpy(raw), tracks, 8)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(unsquash(tensor, tracks, 8).numpy(), unsquash(expected, tracks, 8), rtol=1e-12)


def test_formulas() -> None:
    rows = [
        {"name": "sqrt", "squash": "sqrt", "scale": 0.3, "soft_clip": 10, "clip": 20},
        {"name": "exp75", "squash": "exp75", "scale": 0.5},
        {"name": "mean", "statistic": "mean", "scale": 2, "soft_clip": 3},
        {"name": "legacy", "squash": "power75_legacy", "scale": 0.5, "soft_clip": 10, "clip": 12},
        {"name": "label", "group": "labels", "link": "identity", "center": 4.0, "scale": 0.5},
    ]
    tracks = TrackTable.build(rows)
    raw = np.full((5, 1), 1000.0)
    sqrt = np.sqrt(301) - 1
    expected = [
        10 - 1 + np.sqrt(sqrt - 10 + 1),
        501**0.75 - 1,
        3 - 1 + np.sqrt(1000 / 10 * 2 - 3 + 1),
        12 * 0.5,  # 10 + sqrt(1000^0.75 - 10) = 22.9 is above the hard clip
        (1000 - 4) * 0.5,
    ]
    np.testing.assert_allclose(squash(raw, tracks, 10)[:, 0], expected)


def test_missing_stays_missing_and_float32_stays_float32() -> None:
    tracks = TrackTable.build(
        [{"name": n, "squash": s, "soft_clip": 3} for n, s in zip("abcde", SQUASHES, strict=True)]
    )
    raw = np.full((5, 3), np.nan, dtype=np.float32)
    raw[:, 1] = 7
    for values in (squash(raw, tracks, 4), unsquash(raw, tracks, 4), squash(torch.from_numpy(raw), tracks, 4).numpy()):
        assert values.dtype == np.float32
        assert np.isnan(values[:, [0, 2]]).all()
        assert np.isfinite(values[:, 1]).all()


@pytest.mark.parametrize("kind", SQUASHES)
def test_unsquash_has_finite_gradients(kind: str) -> None:
    tracks = TrackTable.build([{"name": "a", "squash": kind, "soft_clip": 5}, {"name": "b", "squash": kind}])
    values = torch.linspace(0, 20, 9).repeat(2, 1).requires_grad_()
    unsquash(values, tracks, 4).sum().backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()
    assert (values.grad[:, 1:] > 0).all()


def test_below_the_range_is_the_lowest_raw_value() -> None:
    tracks = TrackTable.build([{"name": "a", "squash": "sqrt"}, {"name": "b", "squash": "exp75"}])
    np.testing.assert_array_equal(unsquash(np.array([[-3.0], [-3.0]]), tracks, 4), [[-1.0], [-1.0]])


def test_the_track_axis_is_checked() -> None:
    tracks = TrackTable.build([{"name": "a"}])
    with pytest.raises(DataError, match=r"1 tracks, bins.*\(2, 3\)"):
        squash(np.zeros((2, 3)), tracks, 4)


def test_coarsen() -> None:
    np.testing.assert_array_equal(coarsen(np.arange(12).reshape(2, 6), 3), [[3, 12], [21, 30]])
    assert coarsen(torch.ones(2, 4), 2).tolist() == [[2, 2], [2, 2]]
    with pytest.raises(DataError, match="6 bins cannot be joined"):
        coarsen(np.zeros(6), 4)


# The table


def test_strand_pairs_in_any_row_order() -> None:
    names = ["a+", "x_minus", "b.fwd", "a-", "atac", "x_plus", "b.rev", "CD4+"]
    rows = [{"name": name, "strand_pair": name if name == "CD4+" else None} for name in names]
    tracks = TrackTable.build(rows)
    assert tracks.permutation.tolist() == [3, 5, 6, 0, 4, 1, 2, 7]
    assert tracks.permutation[tracks.permutation].tolist() == list(range(8))


def test_groups_select_and_concat() -> None:
    tracks = TrackTable.build(
        [{"name": "a", "group": "rna"}, {"name": "b", "group": "atac"}, {"name": "c", "group": "rna"}]
    )
    assert tracks.groups == {"rna": [0, 2], "atac": [1]}
    assert tracks.select(["c", "a"]).names == ["c", "a"]
    both = tracks.concat(TrackTable.build([{"name": "d"}]))
    assert both.names == ["a", "b", "c", "d"]
    assert both.permutation.tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"no track: \['z'\]. Choose from a, b, c"):
        tracks.select(["a", "z"])
    with pytest.raises(DataError, match="more than once: 'a'"):
        tracks.concat(tracks.select(["a"]))


def test_selecting_one_strand_is_an_error() -> None:
    tracks = TrackTable.build([{"name": "a+"}, {"name": "a-"}])
    with pytest.raises(DataError, match="strand partner is not in the table: 'a-'"):
        tracks.select(["a+"])


def test_the_table_survives_parquet(tmp_path: Path) -> None:
    tracks = TrackTable.build([{"name": "a+", "clip": 3, "condition": "x"}, {"name": "a-", "clip": 3, "depth": 7}])
    tracks.to_frame().to_parquet(tmp_path / "tracks.parquet")
    assert TrackTable.of(pd.read_parquet(tmp_path / "tracks.parquet")) == tracks


def test_the_frame_that_was_given_is_not_shared() -> None:
    frame = TrackTable.build([{"name": "a"}]).to_frame()
    tracks = TrackTable.of(frame)
    frame.loc[0, "name"] = "other"
    copy = tracks.to_frame()
    copy.loc[0, "name"] = "another"
    assert tracks.names == ["a"]
    assert tracks.frame["name"].tolist() == ["a"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"name": "a", "sclae": 2}], r"unknown columns: \['sclae'\]. The columns are name, group"),
        ([{"name": "a"}, {"name": "a"}], "more than once: 'a'. Give every track its own name"),
        ([{"group": "a"}], "row 0 .*has no name"),
        ([{"name": "a+"}], "row 0: the strand 'a\\+' has no partner: 'a-'. Add the other strand"),
        ([{"name": "a+"}, {"name": "a-", "scale": 2}], r"differ in scale: \(1.0, 2.0\)"),
        (
            [{"name": "a", "strand_pair": "b"}, {"name": "b", "strand_pair": "b"}],
            "track a: its strand partner is 'b', whose own partner is: 'b'",
        ),
        ([{"name": "a", "strand_pair": "c"}], "not in the table: 'c'"),
        ([{"name": "a", "link": "relu"}], "link is unknown: 'relu'. Choose from identity, softplus"),
        ([{"name": "a", "statistic": "median"}], "statistic is unknown: 'median'"),
        ([{"name": "a", "squash": "log"}], "squash is unknown: 'log'"),
        ([{"name": "a", "scale": 0}], "scale must be a finite number other than 0: 0.0"),
        ([{"name": "a", "scale": "much"}], "column scale is not a number: 'much'"),
        ([{"name": "a", "clip": -1}], "clip must be positive: -1.0"),
        ([{"name": "a", "soft_clip": float("inf")}], "soft_clip must be positive: inf"),
        ([{"name": "a", "loss_weight": -1}], "loss_weight must be 0 or more"),
        ([{"name": "a", "center": 1, "squash": "power75_legacy"}], "center must be a number, 0 with a legacy squash"),
        (
            [{"name": "a", "link": "sigmoid"}, {"name": "b"}],
            r"group 'tracks' have different links: \['sigmoid', 'softplus'\]",
        ),
        ([], "has no rows"),
    ],
)
def test_bad_tables(rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TrackTable.build(rows)


def test_problems_come_together() -> None:
    with pytest.raises(DataError, match="3 problems were found") as caught:
        TrackTable.build([{"name": "a", "clip": -1}, {"name": "b", "link": "x"}])
    assert caught.value.exit_code == 3


def test_missing_and_unknown_columns_of_a_frame() -> None:
    frame = TrackTable.build([{"name": "a"}]).to_frame().drop(columns="scale").assign(colour="red")
    with pytest.raises(DataError, match=r"(?s)lacks the column: 'scale'.*unknown column: 'colour'"):
        TrackTable.of(frame)


# bigWigs


@pytest.fixture(scope="module")
def bigwig(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bigwig") / "a.bw"
    pybigtools.open(str(path), "w").write({"chr1": 100}, [("chr1", 10, 20, 1.5), ("chr1", 90, 100, 2.0)])
    return path


def test_bases_beyond_the_contig_are_zero(bigwig: Path) -> None:
    bases = read_bases(bigwig, Interval("chr1", -5, 115))
    assert bases.shape == (120,)
    assert bases.sum() == 35
    assert bases[15:25].tolist() == [1.5] * 10
    assert not read_bases(bigwig, Interval("chr1", 200, 210)).any()


def test_bins_are_sums(bigwig: Path) -> None:
    assert read_bins(bigwig, Interval("chr1", 0, 100), 25).tolist() == [15, 0, 0, 20]
    with pytest.raises(DataError, match="not a whole number of bins"):
        read_bins(bigwig, Interval("chr1", 0, 100), 30)


@given(st.integers(-50, 150), st.integers(1, 12), st.integers(1, 9))
def test_bins_of_any_interval(bigwig: Path, start: int, count: int, size: int) -> None:
    whole = np.zeros(600)
    whole[260:270], whole[340:350] = 1.5, 2.0  # the file above, 250 bp to the right
    expected = whole[start + 250 : start + 250 + count * size].reshape(count, size).sum(1)
    np.testing.assert_allclose(read_bins(bigwig, Interval("chr1", start, start + count * size), size), expected)


def test_unknown_contig(bigwig: Path) -> None:
    with pytest.raises(DataError, match=r"a.bw: the bigWig has no chromosome: 'chr2'. It has chr1"):
        read_bases(bigwig, Interval("chr2", 0, 10))


def test_broken_bigwigs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"), open_bigwig(tmp_path / "none.bw"):
        pass
    text = tmp_path / "text.bw"
    text.write_text("chr1\t1\t2\t3\n" * 100)
    with pytest.raises(DataError, match=r"cannot be opened.*truncated or not a bigWig"), open_bigwig(text):
        pass
