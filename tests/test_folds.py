"""Folds: each way to make them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from seqgraft.data.folds import FoldPlaces, Folds, assign_folds, fold_overlaps
from seqgraft.errors import ConfigError, DataError
from seqgraft.genome import Genome, Interval


def regions(*rows: tuple[str, int, int], **columns: Any) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=["chrom", "start", "end"]).assign(**columns)


def unplaced(count: int, **columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"chrom": [""] * count, "start": 0, "end": 0}).assign(**columns)


THREE = regions(("chr1", 0, 10), ("chr2", 0, 10), ("chr3", 0, 10))


def test_chromosomes_name_held_out_folds_and_the_rest_trains() -> None:
    assert assign_folds(THREE, Folds(by="chromosome", valid=("chr2",), test=("chr3",))).tolist() == [
        "train",
        "valid",
        "test",
    ]


def test_naming_train_leaves_the_rest_unused() -> None:
    folds = Folds(by="chromosome", train=("chr1",), test=("chr3",))
    assert assign_folds(THREE, folds).tolist() == ["train", "unused", "test"]


def test_chromosomes_from_another_column() -> None:
    table = unplaced(3, chr=["I", "II", "III"])
    folds = Folds(by="chromosome", column="chr", test=("III",))
    assert assign_folds(table, folds).tolist() == ["train", "train", "test"]


def test_column_with_names() -> None:
    table = unplaced(4, split=["train", "dev", "test", "none"])
    folds = Folds(column="split", names={"dev": "valid", "none": "unused"})
    assert assign_folds(table, folds).tolist() == ["train", "valid", "test", "unused"]


def test_column_with_a_share_for_validation() -> None:
    table = unplaced(100, fold=["train"] * 80 + ["test"] * 20)
    fold = assign_folds(table, Folds(valid=0.1, seed=3))
    assert fold.value_counts().to_dict() == {"train": 72, "test": 20, "valid": 8}
    assert (fold[80:] == "test").all()


def test_kfold_deals_every_row_into_one_test_part() -> None:
    table = unplaced(103, gene=[f"g{row // 3}" for row in range(103)])
    parts = [assign_folds(table, Folds(by="kfold", k=5, fold=fold, valid=0.1, seed=2)) for fold in range(5)]
    tested = np.stack([part == "test" for part in parts])
    assert (tested.sum(0) == 1).all()
    assert sorted(tested.sum(1).tolist()) == [20, 20, 21, 21, 21]
    assert all((part == "valid").sum() == 8 for part in parts)
    grouped = [assign_folds(table, Folds(by="kfold", k=5, fold=fold, group="gene")) for fold in range(5)]
    assert (np.stack([part == "test" for part in grouped]).sum(0) == 1).all()
    assert all(part.groupby(table["gene"]).nunique().eq(1).all() for part in grouped)
    other = assign_folds(table, Folds(by="kfold", k=5, fold=0, valid=0.1, seed=3))
    assert other.tolist() != parts[0].tolist()


def test_kfold_needs_its_part() -> None:
    for settings in ({}, {"k": 10}, {"fold": 1}, {"k": 1, "fold": 0}, {"k": 5, "fold": 5}, {"k": 5, "fold": -1}):
        with pytest.raises(ConfigError, match=r"folds\.k: folds by kfold need k"):
            Folds(by="kfold", **settings)
    with pytest.raises(ConfigError, match="take no share of test rows"):
        Folds(by="kfold", k=5, fold=0, test=0.2)
    with pytest.raises(ConfigError, match=r"folds\.k: the setting has no meaning with by: random.*kfold"):
        Folds(by="random", test=0.2, k=5)


def test_random_folds_have_their_shares_and_keep_groups_together() -> None:
    group = np.random.default_rng(0).integers(0, 200, 1000)
    folds = Folds(by="random", valid=0.1, test=0.2, group="gene", seed=1)
    fold = assign_folds(unplaced(1000, gene=group), folds)
    assert pd.Series(fold.to_numpy()).groupby(group).nunique().max() == 1
    counts = fold.value_counts()
    assert counts["valid"] == pytest.approx(100, abs=10)
    assert counts["test"] == pytest.approx(200, abs=10)
    assert fold.equals(assign_folds(unplaced(1000, gene=group), folds))


def test_linked_rows_and_groups_stay_together() -> None:
    links = np.array([[0, 50], [50, 99], [3, 4]])
    group = np.arange(100)
    group[4] = group[7]
    for seed in range(10):
        folds = Folds(by="random", test=0.3, group="gene", seed=seed)
        fold = assign_folds(unplaced(100, gene=group), folds, together=links)
        assert fold[0] == fold[50] == fold[99]
        assert fold[3] == fold[4] == fold[7]


def test_clusters_keep_neighbours_together() -> None:
    starts = [0, 90, 300, 1000, 1100, 5000]
    table = regions(*[(chrom, start, start + 100) for chrom in ("chr1", "chr2") for start in starts])
    for seed in range(10):
        fold = assign_folds(table, Folds(by="cluster", distance=200, valid=0.2, test=0.3, seed=seed))
        for first in (0, 6):
            assert fold[first : first + 2].nunique() == 1
            assert fold[first + 3 : first + 4].nunique() == 1
    assert assign_folds(table.iloc[::-1], Folds(by="cluster", distance=111, test=0.3)).index[0] == 11


def test_a_gap_of_the_distance_separates() -> None:
    others = [(f"chr{number}", 0, 10) for number in range(2, 6)]
    table = regions(("chr1", 0, 10), ("chr1", 60, 70), ("chr1", 119, 130), *others)
    together = {
        distance: [
            assign_folds(table, Folds(by="cluster", distance=distance, test=0.5, seed=seed)).tolist()
            for seed in range(30)
        ]
        for distance in (50, 51)
    }
    assert any(fold[0] != fold[1] for fold in together[50])
    assert all(fold[0] == fold[1] for fold in together[51])
    assert all(fold[1] == fold[2] for fold in together[50])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "chromosome", "valid": ("chr1",), "test": ("chr1",)}, "in valid already: 'chr1'"),
        ({"by": "chromosome", "valid": 0.1}, "need names"),
        ({"by": "chromosome"}, "held out"),
        ({"by": "random", "valid": ("chr1",)}, "take no names"),
        ({"by": "random", "valid": 0.6, "test": 0.6}, "no training rows"),
        ({"by": "random", "valid": -0.1, "test": 0.5}, "not a share"),
        ({"by": "random"}, "held out"),
        ({"by": "random", "test": 0.1, "column": "split"}, "no meaning with by: random"),
        ({"by": "cluster", "test": 0.1, "distance": -1}, "negative"),
        ({"by": "column", "test": 0.1}, "no share of test"),
        ({"by": "column", "names": {"dev": "validation"}}, "not a fold: 'validation'"),
        ({"by": "trunk"}, "folds.trunk: folds by trunk need the trunk. Name one of borzoi"),
        ({"by": "trunk", "trunk": "borzoi", "test": 0.1}, "folds by trunk take no share of test rows: 0.1"),
        ({"by": "trunk", "trunk": "borzoi", "test": ("chr1",)}, "folds by trunk take no names"),
        ({"by": "trunk", "trunk": "borzoi", "distance": 5}, "no meaning with by: trunk"),
        ({"by": "random", "test": 0.1, "trunk": "borzoi"}, "folds.trunk: the setting has no meaning with by: random"),
        ({"by": "moon"}, "cannot be made by: 'moon'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Folds(**settings)


def test_bad_data() -> None:
    with pytest.raises(DataError, match=r"no row is on the chromosome: '3'.*The data have chr3"):
        assign_folds(THREE, Folds(by="chromosome", test=("3",)))
    with pytest.raises(DataError, match=r"2 rows have a value that is not a fold: 'dev'.*names: \{dev: train\}"):
        assign_folds(unplaced(3, fold=["train", "dev", "dev"]), Folds())
    with pytest.raises(DataError, match="no column: 'split'"):
        assign_folds(THREE, Folds(column="split"))
    with pytest.raises(DataError, match="no rows: 'train'"):
        assign_folds(THREE, Folds(by="chromosome", test=("chr1", "chr2", "chr3")))
    with pytest.raises(DataError, match="no rows: 'test'"):
        assign_folds(unplaced(3, gene=[1, 1, 1]), Folds(by="random", test=0.4, group="gene"))
    with pytest.raises(DataError, match="1 rows have no value"):
        assign_folds(unplaced(2, gene=[1, None]), Folds(by="random", test=0.5, group="gene"))
    with pytest.raises(DataError, match="no place in a genome"):
        assign_folds(unplaced(9), Folds(by="cluster", test=0.3))
    with pytest.raises(DataError, match="no rows to make folds"):
        assign_folds(unplaced(0), Folds())


def test_overlapping_folds_are_refused() -> None:
    table = regions(("chr1", 0, 100), ("chr1", 90, 190), ("chr2", 0, 100), fold=["train", "test", "test"])
    with pytest.raises(DataError, match=r"1 train/test pairs; the first is train chr1:0-100 and test chr1:90-190"):
        assign_folds(table, Folds())


def test_overlaps_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    start = rng.integers(0, 3000, 200)
    chrom = rng.choice(["chr1", "chr2"], 200)
    table = pd.DataFrame({"chrom": chrom, "start": start, "end": start + rng.integers(1, 60, 200)})
    fold = rng.choice(["train", "test", "unused"], 200)
    pairs = fold_overlaps(table, fold)
    intervals = [Interval(*row) for row in table.itertuples(index=False, name=None)]
    expected = {
        a
        for a in np.flatnonzero(fold == "train").tolist()
        if any(intervals[a].overlaps(intervals[b]) for b in np.flatnonzero(fold == "test"))
    }
    assert set(pairs["row_a"]) == expected
    assert all(intervals[a].overlaps(intervals[b]) for a, b in zip(pairs["row_a"], pairs["row_b"], strict=True))


# The split of a trunk


@pytest.fixture
def places(tmp_path: Path) -> FoldPlaces:
    (tmp_path / "genome.fa").write_text("".join(f">{chrom}\n{'ACGT' * 250}\n" for chrom in ("chr1", "chr2", "chr3")))
    return FoldPlaces(Genome.open(tmp_path / "genome.fa"))


def bed(folder: Path, *rows: tuple[str, int, int, str]) -> Path:
    path = folder / "trunk.bed"
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


SPLIT = (("chr1", 0, 300, "train"), ("chr1", 300, 600, "valid"), ("chr1", 600, 1000, "test"), ("chr2", 0, 100, "test"))


def by_trunk(path: Path, **settings: Any) -> Folds:
    return Folds(by="trunk", trunk=str(path), **settings)


def test_rows_take_the_fold_of_the_trunk(tmp_path: Path, places: FoldPlaces) -> None:
    """Of one fold: that one; of several: unused; of none: training."""
    table = regions(
        *(("chr1", 0, 100), ("chr1", 250, 350), ("chr1", 400, 500), ("chr1", 590, 610), ("chr1", 900, 1000)),
        *(("chr2", 50, 150), ("chr2", 500, 600), ("chr3", 0, 100)),
    )
    fold = assign_folds(table, by_trunk(bed(tmp_path, *SPLIT)), places=places)
    assert fold.tolist() == ["train", "unused", "valid", "unused", "test", "test", "train", "train"]
    notes = places.notes["trunk_folds"]
    assert notes["files"][0]["path"] == str(tmp_path / "trunk.bed")
    assert notes["unused_in_several_folds"] == 2
    assert notes["unused_beside_held_out_rows"] == 0
    assert notes["train_in_no_fold"] == 2


def test_what_a_model_sees_beside_a_row_counts(tmp_path: Path, places: FoldPlaces) -> None:
    table = regions(("chr1", 0, 100), ("chr1", 150, 250), ("chr1", 350, 450), ("chr1", 700, 900))
    folds = by_trunk(bed(tmp_path, *SPLIT))
    assert assign_folds(table, folds, places=places).tolist() == ["train", "train", "valid", "test"]
    for margin, expected in ((50, ["train", "train", "valid", "test"]), (51, ["train", "unused", "unused", "test"])):
        if expected.count("valid"):
            assert assign_folds(table, folds, places=FoldPlaces(places.genome, margin)).tolist() == expected
        else:
            with pytest.raises(
                DataError, match=r"no rows: 'valid'. Add regions where the trunk has this fold, or take"
            ):
                assign_folds(table, folds, places=FoldPlaces(places.genome, margin))


def test_rows_beside_held_out_ones_give_way(tmp_path: Path, places: FoldPlaces) -> None:
    """In a gap of the trunk's list, rows of two folds can overlap though each touches one fold or none."""
    split = (
        ("chr1", 0, 100, "train"),
        ("chr1", 160, 260, "test"),
        ("chr2", 0, 100, "valid"),
        ("chr2", 160, 260, "test"),
    )
    table = regions(
        *(("chr1", 0, 90), ("chr1", 80, 140), ("chr1", 130, 170), ("chr1", 200, 260), ("chr1", 250, 300)),
        *(("chr2", 0, 50), ("chr2", 50, 150), ("chr2", 140, 200), ("chr2", 190, 300), ("chr2", 290, 400)),
    )
    fold = assign_folds(table, by_trunk(bed(tmp_path, *split)), places=places)
    assert fold.tolist() == [
        *("train", "unused", "test", "test", "test"),
        *("valid", "unused", "test", "test", "unused"),
    ]
    assert places.notes["trunk_folds"]["unused_beside_held_out_rows"] == 3


def test_a_list_of_training_regions_leaves_the_rest_for_testing(tmp_path: Path, places: FoldPlaces) -> None:
    rows = [(chrom, start, start + 100) for chrom in ("chr1", "chr2") for start in range(0, 1000, 100)]
    path = bed(tmp_path, ("chr1", 0, 1000, "train"))
    with pytest.raises(DataError, match=r"no rows: 'valid'.*or take a share of the training rows, as in valid: 0.1"):
        assign_folds(regions(*rows), by_trunk(path), places=places)
    fold = assign_folds(regions(*rows), by_trunk(path, valid=0.2), places=places)
    assert fold[:10].value_counts().to_dict() == {"train": 8, "valid": 2}
    assert set(fold[10:]) == {"test"}
    assert places.notes["trunk_folds"]["test_in_no_fold"] == 10


def test_a_trunk_without_what_is_needed(tmp_path: Path, places: FoldPlaces) -> None:
    path = bed(tmp_path, *SPLIT)
    with pytest.raises(DataError, match=r"folds.by: trunk: the rows have no place in a genome. Give intervals"):
        assign_folds(unplaced(3), by_trunk(path), places=FoldPlaces(None))
    table = regions(("chr1", 0, 100), ("chr1", 400, 500))
    with pytest.raises(DataError, match=r"no rows: 'test'. Add regions where the trunk has this fold\.$"):
        assign_folds(table, by_trunk(path), places=places)
    path.write_text(path.read_text().replace("chr", ""))
    with pytest.raises(DataError, match=r"no chromosome: '1'.*rename: \{'1': 'chr1'"):
        assign_folds(THREE, by_trunk(path), places=places)
    whole = regions(("chr1", 0, 100), ("chr1", 400, 500), ("chr1", 700, 800))
    renamed = FoldPlaces(places.genome, rename={"1": "chr1", "2": "chr2"})
    assert assign_folds(whole, by_trunk(path), places=renamed).tolist() == ["train", "valid", "test"]
