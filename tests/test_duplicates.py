"""Exact and near duplicates: against brute force, both strands, every policy, and within seconds."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from seqgraft.data.duplicates import (
    DuplicatePolicy,
    copied_rows,
    duplicate_links,
    duplicates_in_words,
    find_duplicates,
    resolve_duplicates,
)
from seqgraft.errors import DataError
from seqgraft.sequence import Codes, encode, reverse_complement


def random_codes(rng: np.random.Generator, length: int) -> Codes:
    return rng.integers(0, 4, length).astype(np.uint8)


def kmers(codes: Codes, k: int) -> set[bytes]:
    found = set()
    for at in range(codes.size - k + 1):
        word = codes[at : at + k]
        if word.max() < 4:
            found.add(min(word.tobytes(), reverse_complement(word).tobytes()))
    return found


def families(seed: int) -> list[Codes]:
    """300 mutated, sometimes reversed copies of 40 sequences of 5 to 140 bp, a few unknown bases among them."""
    rng = np.random.default_rng(seed)
    ancestors = [random_codes(rng, int(rng.integers(5, 140))) for _ in range(40)]
    sequences = []
    for _ in range(300):
        codes = ancestors[rng.integers(40)].copy()
        changed = rng.random(codes.size) < rng.choice([0, 0.01, 0.03])
        codes[changed] = rng.integers(0, 5, changed.sum())
        sequences.append(reverse_complement(codes) if rng.random() < 0.5 else codes)
    return sequences


@pytest.mark.parametrize("k", [3, 8, 11, 15, 16])
def test_near_duplicates_equal_brute_force(k: int) -> None:
    sequences = families(seed=k)
    fold = np.random.default_rng(k).choice(["train", "test", "unused"], len(sequences))
    report = find_duplicates(sequences, fold, k=k)
    sets = [kmers(codes, k) for codes in sequences]
    expected = {}
    for a in np.flatnonzero(fold == "train"):
        for b in np.flatnonzero(fold == "test"):
            same = sequences[a].tobytes() in (sequences[b].tobytes(), reverse_complement(sequences[b]).tobytes())
            if sets[a] and sets[b] and not same:
                similarity = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
                if similarity >= 0.7:
                    expected[int(a), int(b)] = similarity
    near = report.near
    assert report.complete
    assert expected
    assert dict(zip(zip(near["row_a"], near["row_b"], strict=True), near["similarity"], strict=True)) == pytest.approx(
        expected
    )


def test_exact_duplicates_on_both_strands() -> None:
    rng = np.random.default_rng(0)
    sequences = [random_codes(rng, 60) for _ in range(6)]
    sequences[4] = reverse_complement(sequences[1])
    sequences[5] = sequences[0].copy()
    report = find_duplicates(sequences, ["train", "train", "train", "valid", "test", "test"])
    rows = report.exact[["row_a", "row_b", "fold_a", "fold_b", "strand"]].to_numpy().tolist()
    assert rows == [[1, 4, "train", "test", "-"], [0, 5, "train", "test", "+"]]
    assert report.summary()["exact"] == {"train/test": {"pairs": 2, "train": 2, "test": 2}}
    assert report.near.empty
    assert duplicates_in_words(report.summary()) == "pairs of exact copies across folds: train/test 2"
    apart = find_duplicates(sequences[:4], ["train", "train", "train", "valid"])
    assert duplicates_in_words(apart.summary()) == "none across folds, exact or near"


def test_every_leaked_row_of_a_large_family_is_listed() -> None:
    codes = random_codes(np.random.default_rng(0), 50)
    report = find_duplicates([codes] * 30, ["train"] * 20 + ["valid"] * 3 + ["test"] * 7)
    pairs = report.exact.groupby(["fold_a", "fold_b"])
    assert pairs["row_a"].nunique().to_dict() == {("train", "valid"): 20, ("train", "test"): 20, ("valid", "test"): 3}
    assert pairs["row_b"].nunique().to_dict() == {("train", "valid"): 3, ("train", "test"): 7, ("valid", "test"): 7}
    assert report.within == {"train": 19, "valid": 2, "test": 6}


def test_unknown_and_unused_rows_are_not_compared() -> None:
    unknown = np.full(40, 4, dtype=np.uint8)
    codes = random_codes(np.random.default_rng(0), 40)
    report = find_duplicates([unknown, unknown, codes, codes], ["train", "test", "train", "unused"])
    assert report.exact.empty
    assert report.near.empty


def test_short_and_empty_sequences() -> None:
    report = find_duplicates([encode("ACGTTG"), encode("CAACGT"), encode("")], ["train", "test", "test"])
    assert report.exact["strand"].tolist() == ["-"]
    assert find_duplicates([], []).exact.empty


def test_long_windows_are_sampled_and_shifted_copies_found() -> None:
    rng = np.random.default_rng(1)
    genome = random_codes(rng, 17_000_000)
    windows = [genome[at : at + 200_000] for at in range(0, 16_600_000, 200_000)]
    windows.append(reverse_complement(genome[20_000:220_000]))
    report = find_duplicates(windows, ["train"] * (len(windows) - 1) + ["test"])
    assert report.sampled > 1
    assert report.near[["row_a", "row_b"]].to_numpy().tolist() == [[0, len(windows) - 1]]
    assert report.near["similarity"].iloc[0] == pytest.approx(180 / 220, abs=0.02)


def test_a_family_too_large_to_compare_says_so() -> None:
    rng = np.random.default_rng(2)
    copies = np.tile(random_codes(rng, 100), (10_000, 1))
    changed = rng.random(copies.shape) < 0.01
    copies[changed] ^= 1
    began = time.perf_counter()
    report = find_duplicates(list(copies), ["train"] * 8_000 + ["test"] * 2_000)
    assert time.perf_counter() - began < 60
    assert not report.complete
    assert report.near["row_b"].nunique() > 1_500


def test_the_audit_takes_seconds() -> None:
    rng = np.random.default_rng(3)
    sequences = list(rng.integers(0, 4, (35_000, 100)).astype(np.uint8))
    began = time.perf_counter()
    report = find_duplicates(sequences, ["train"] * 33_000 + ["test"] * 2_000)
    assert time.perf_counter() - began < 20
    assert report.complete


def test_links_connect_families() -> None:
    rng = np.random.default_rng(4)
    a, b = random_codes(rng, 100), random_codes(rng, 100)
    near = a.copy()
    near[50] ^= 1
    links = duplicate_links([a, b, reverse_complement(a), near])
    assert {frozenset(pair) for pair in links.tolist()} >= {frozenset((0, 2))}
    assert 1 not in links
    assert 3 in links


def test_policies(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    sequences = [random_codes(rng, 100) for _ in range(4)]
    near = sequences[1].copy()
    near[50] ^= 1
    sequences += [sequences[0], near]
    report = find_duplicates(sequences, ["train", "train", "train", "valid", "test", "test"])
    names = [f"data.csv row {row}" for row in range(1, 7)]
    listing = tmp_path / "made" / "data.duplicates.tsv"

    def resolve(policy: DuplicatePolicy) -> list[bool]:
        return [bool(kept) for kept in resolve_duplicates(report, policy, 6, names, listing)]

    assert resolve("report") == [True] * 6
    assert resolve("drop") == [False, False, True, True, True, True]
    table = pd.read_csv(listing, sep="\t")
    assert table["kind"].tolist() == ["exact", "near"]
    assert table["source_b"].tolist() == ["data.csv row 5", "data.csv row 6"]
    with pytest.raises(DataError, match=r"1 test sequence is identical .*data.csv row 5 = data.csv row 1") as caught:
        resolve("refuse")
    assert str(listing) in str(caught.value)
    with pytest.raises(DataError, match="stay in different folds"):
        resolve("group")
    kept = {policy: copied_rows(report, np.array(resolve(policy))).tolist() for policy in ("report", "drop")}
    assert kept == {"report": ["", "", "", "", "exact", "near"], "drop": [""] * 4}
    clean = find_duplicates(sequences[:4], ["train", "train", "train", "valid"])
    assert resolve_duplicates(clean, "refuse", 4, names, listing).all()
    assert not listing.exists()
