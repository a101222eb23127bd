"""Exact and near duplicates between folds, on both strands.

Two sequences are *exact* duplicates when they, or one and the reverse complement of the other, are identical. They are
*near* duplicates when the Jaccard index of their sets of canonical k-mers (a k-mer and its reverse complement count as
one) reaches ``similarity``: shared / (shared + only in one).

Near duplicates are found by a prefix join: order all k-mers from rare to common; two sets of Jaccard index >= t must
share one of the first ``n - ceil(t n) + 1`` k-mers of each. Every pair that does is then compared in full, so that
nothing is missed and nothing is invented. Where the sequences hold more than 16 million k-mers and are long, only
k-mers of small hash are kept (a fixed 1 in ``sampled``, the same in every sequence), and the similarity is an estimate
with a standard error of about ``sqrt(J (1 - J) sampled / k-mers)``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from seqgraft.data.dataset import Dataset
from seqgraft.errors import DataError
from seqgraft.sequence import Codes, reverse_complement

__all__ = [
    "DuplicatePolicy",
    "DuplicateReport",
    "copied_rows",
    "copies_in_earlier_folds",
    "duplicate_links",
    "duplicates_in_words",
    "find_duplicates",
    "resolve_duplicates",
]

DuplicatePolicy = Literal["refuse", "report", "drop", "group"]
"""``refuse``: an exact copy in another fold is an error. ``report``: counted and listed. ``drop``: exact and near
copies leave the training rows (and the validation rows, where the other copy is a test row). ``group``: copies are put
into one fold, which only a split by random, kfold or cluster can do. Whatever stays is scored with and without."""

SIMILARITY = 0.7
UNUSED = "unused"
Key = TypeVar("Key", np.uint64, np.int64)
_LONG = 150  # bp; below, one substitution in a 15-mer set already costs a Jaccard index of 0.3
_ELEMENTS = 16_000_000  # k-mers held in memory
_COMPARED = 100_000_000  # k-mers compared pair by pair before a family of near copies counts as too large
_CHUNK = 1 << 16
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_PAIR_COLUMNS = ["row_a", "row_b", "fold_a", "fold_b"]


@dataclass(frozen=True, slots=True)
class DuplicateReport:
    """Copies across folds.

    ``exact`` has columns row_a, row_b, fold_a, fold_b, strand ("-" where one is the other's reverse complement, else
    "+"); every row that has a copy in another fold appears with at least one of them. ``near`` has row_a, row_b,
    fold_a, fold_b, similarity and lists every pair, unless ``complete`` is false (families of near copies too large to
    compare in full). fold_a comes before fold_b in the order train, valid, test, others. ``within`` counts, per fold,
    the rows that repeat an earlier row of the same fold.
    """

    exact: pd.DataFrame
    near: pd.DataFrame
    within: dict[str, int]
    k: int
    similarity: float
    sampled: int
    complete: bool

    def summary(self) -> dict[str, Any]:
        """Counts per pair of folds, as stored in dataset.json."""
        return {
            "exact": _counts(self.exact),
            "near": _counts(self.near),
            "within_fold": self.within,
            "k": self.k,
            "similarity": self.similarity,
            "sampled": self.sampled,
            "near_complete": self.complete,
        }


def duplicates_in_words(summary: Mapping[str, Any]) -> str:
    """One line from :meth:`DuplicateReport.summary`, as stored in ``dataset.json``."""
    parts = []
    for kind in ("exact", "near"):
        pairs = [f"{folds} {counts['pairs']}" for folds, counts in summary[kind].items()]
        near = f" (a {summary['k']}-mer similarity of {summary['similarity']} or more)" if kind == "near" else ""
        if pairs:
            parts.append(f"pairs of {kind} copies across folds{near}: {', '.join(pairs)}")
    return "; ".join(parts) or "none across folds, exact or near"


def find_duplicates(
    sequences: Sequence[Codes], fold: ArrayLike, *, k: int | None = None, similarity: float = SIMILARITY
) -> DuplicateReport:
    """Find the copies across folds of ``sequences`` (base codes without padding; memory-mapped views are fine).

    ``fold`` holds one name per sequence; rows of fold "unused" are not compared. ``k`` is 11 for sequences of up to
    150 bp (mean) and 15 for longer ones; at most 16. Rows without any known base are not compared.
    """
    names = np.asarray(fold, dtype=str)
    used = np.flatnonzero(names != UNUSED)
    chosen = [sequences[int(row)] for row in used]
    order = sorted(set(names[used]), key=_fold_order)
    partition = np.array([order.index(name) for name in names[used]], dtype=np.int64)
    identity, flipped = _identities(chosen)
    sketch = _Sketch.of(chosen, k)
    near, complete = _near_pairs(sketch, similarity, identity, partition)
    rows_a, rows_b, strands = _exact_pairs(identity, flipped, partition)
    labels = np.array(order, dtype=object)

    def frame(a: NDArray[np.int64], b: NDArray[np.int64], **more: Any) -> pd.DataFrame:
        swap = partition[a] > partition[b]
        a, b = np.where(swap, b, a), np.where(swap, a, b)
        columns = {"row_a": used[a], "row_b": used[b], "fold_a": labels[partition[a]], "fold_b": labels[partition[b]]}
        return pd.DataFrame({**columns, **more}).sort_values(["row_b", "row_a"], ignore_index=True)

    within = {}
    for index, name in enumerate(order):
        mine = identity[(partition == index) & (identity >= 0)]
        within[str(name)] = int(mine.size - np.unique(mine).size)
    return DuplicateReport(
        exact=frame(rows_a, rows_b, strand=np.where(strands, "-", "+")),
        near=frame(near.a, near.b, similarity=near.similarity),
        within=within,
        k=sketch.k,
        similarity=similarity,
        sampled=sketch.sampled,
        complete=complete,
    )


def duplicate_links(
    sequences: Sequence[Codes], *, k: int | None = None, similarity: float = SIMILARITY
) -> NDArray[np.int64]:
    """Pairs of rows ``(pairs, 2)`` that connect all exact and near duplicates, whatever their folds."""
    identity, _ = _identities(sequences)
    near, _ = _near_pairs(_Sketch.of(sequences, k), similarity, identity, None)
    known = np.flatnonzero(identity >= 0)
    _, first, inverse = np.unique(identity[known], return_index=True, return_inverse=True)
    exact = np.stack([known[first[inverse]], known], axis=1)
    return np.concatenate([exact[exact[:, 0] != exact[:, 1]], np.stack([near.a, near.b], axis=1)])


def resolve_duplicates(
    report: DuplicateReport, policy: DuplicatePolicy, count: int, names: Sequence[str], listing: Path
) -> NDArray[np.bool_]:
    """Apply ``policy``; return which of the ``count`` rows stay.

    ``names`` says where each row came from ("test.csv row 12"). Whatever was found is written to the file ``listing``,
    one line per pair, tab-separated.

    Raises:
        DataError: exact copies sit in different folds, under ``refuse`` or ``group``.
    """
    listing.unlink(missing_ok=True)
    if len(report.exact) + len(report.near):
        _write_listing(report, names, listing)
    keep = np.ones(count, dtype=bool)
    if policy == "refuse" and len(report.exact):
        raise DataError(**_refusal(report, names, listing))
    if policy == "group" and len(report.exact):
        raise DataError(
            f"{len(report.exact)} pairs of identical sequences stay in different folds",
            where="duplicates: group",
            remedy="Grouping needs folds by random, kfold or cluster. Use duplicates: drop for a fixed split",
        )
    if policy == "drop":
        keep[report.exact["row_a"]] = False
        keep[report.near["row_a"]] = False
    return keep


def copied_rows(report: DuplicateReport, keep: NDArray[np.bool_]) -> NDArray[np.object_]:
    """What sources store as the column ``copied`` of the regions: "exact", "near" or "", for each of the rows kept.

    A row is copied if an earlier fold, in the order train, valid, test, holds a copy that was kept.
    """
    copied = np.full(len(keep), "", dtype=object)
    for kind, pairs in (("near", report.near), ("exact", report.exact)):
        copied[pairs["row_b"][keep[pairs["row_a"]]]] = kind
    return copied[keep]


def copies_in_earlier_folds(dataset: Dataset) -> NDArray[np.object_]:
    """:func:`copied_rows` of a prepared dataset: as stored, or, where it was prepared without, found again."""
    if "copied" in dataset.regions:
        return dataset.regions["copied"].to_numpy(dtype=object)
    everything = np.ones(len(dataset), dtype=bool)
    if dataset.info.kind == "personal":  # donors share haplotypes, and folds are of donors and genes
        return np.full(len(dataset), "", dtype=object)
    summary = dataset.info.notes.get("duplicates")
    if summary and not summary["exact"] and not summary["near"]:
        return np.full(len(dataset), "", dtype=object)
    sequences: list[Codes]
    if dataset.codes is not None and dataset.lengths is not None:
        sequences = [codes[:length] for codes, length in zip(dataset.codes, dataset.lengths, strict=True)]
    else:
        assert dataset.genome is not None  # open_dataset checks that one of the two is there
        places = zip(*(dataset.regions[name].tolist() for name in ("chrom", "start", "end")), strict=True)
        sequences = [dataset.genome.chrom_codes(chrom)[max(0, start) : end] for chrom, start, end in places]
    return copied_rows(find_duplicates(sequences, dataset.regions["fold"]), everything)


def _refusal(report: DuplicateReport, names: Sequence[str], listing: Path) -> dict[str, Any]:
    exact = report.exact
    parts = []
    for (fold_a, fold_b), pairs in exact.groupby(["fold_a", "fold_b"], sort=False):
        leaked = pairs.drop_duplicates("row_b")
        shown = ", ".join(f"{names[b]} = {names[a]}" for a, b in leaked[["row_a", "row_b"]].head(5).to_numpy())
        more = f", and {len(leaked) - 5} more" if len(leaked) > 5 else ""
        noun = "sequence is" if len(leaked) == 1 else "sequences are"
        parts.append(f"{len(leaked)} {fold_b} {noun} identical to {fold_a} sequences ({shown}{more})")
    reverse = int((exact["strand"] == "-").sum())
    strands = f"; {reverse} of the pairs are reverse complements" if reverse else ""
    return {
        "what": "; ".join(parts) + strands,
        "where": "duplicates across folds",
        "remedy": f"All pairs are listed in {listing}. Use duplicates: drop to take the copies out of the training "
        "rows, duplicates: group with a random or cluster split to keep them together, or duplicates: report to "
        "keep them where they are",
    }


def _write_listing(report: DuplicateReport, names: Sequence[str], listing: Path) -> None:
    table = pd.concat(
        [report.exact.assign(kind="exact", similarity=1.0), report.near.assign(kind="near", strand=".")],
        ignore_index=True,
    )
    table["source_a"] = [names[row] for row in table["row_a"]]
    table["source_b"] = [names[row] for row in table["row_b"]]
    columns = ["kind", "fold_a", "source_a", "fold_b", "source_b", "strand", "similarity"]
    listing.parent.mkdir(parents=True, exist_ok=True)
    table[columns].to_csv(listing, sep="\t", index=False, float_format="%.4f")


def _counts(pairs: pd.DataFrame) -> dict[str, dict[str, int]]:
    return {
        f"{a}/{b}": {"pairs": len(part), str(a): part["row_a"].nunique(), str(b): part["row_b"].nunique()}
        for (a, b), part in pairs.groupby(["fold_a", "fold_b"], sort=False)
    }


def _fold_order(name: str) -> tuple[int, str]:
    known = ("train", "valid", "test")
    return (known.index(name) if name in known else len(known), name)


# Exact copies


def _identities(sequences: Sequence[Codes]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Number identical sequences alike (-1: no known base) and say which were turned over to be compared."""
    seen: dict[bytes, int] = {}
    identity = np.full(len(sequences), -1, dtype=np.int64)
    flipped = np.zeros(len(sequences), dtype=bool)
    for row, codes in enumerate(sequences):
        if not codes.size or codes.min() >= 4:
            continue
        forward, backward = codes.tobytes(), np.asarray(reverse_complement(codes)).tobytes()
        flipped[row] = backward < forward
        digest = hashlib.blake2b(min(forward, backward), digest_size=16).digest()
        identity[row] = seen.setdefault(digest, len(seen))
    return identity, flipped


def _exact_pairs(
    identity: NDArray[np.int64], flipped: NDArray[np.bool_], partition: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Pair the rows of each identity across folds; the shorter side repeats, so a large family stays linear in size."""
    repeated = np.flatnonzero(identity >= 0)
    repeated = repeated[np.bincount(identity[repeated])[identity[repeated]] > 1] if repeated.size else repeated
    order = repeated[np.lexsort((partition[repeated], identity[repeated]))]
    pairs: list[tuple[int, int]] = []
    for family in np.split(order, np.flatnonzero(np.diff(identity[order])) + 1):
        sides = np.split(family, np.flatnonzero(np.diff(partition[family])) + 1)
        for i, left in enumerate(sides):
            for right in sides[i + 1 :]:
                longest = max(left.size, right.size)
                pairs.extend(zip(np.resize(left, longest).tolist(), np.resize(right, longest).tolist(), strict=True))
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    a, b = found[:, 0], found[:, 1]
    return a, b, flipped[a] != flipped[b]


# Near copies


@dataclass(frozen=True, slots=True)
class _Sketch:
    """The set of canonical k-mers of each sequence, as ranks from rare to common.

    The set of row r is ``rank[start[r]:start[r + 1]]``, sorted.
    """

    k: int
    sampled: int
    rank: NDArray[np.int64]
    start: NDArray[np.int64]
    copies: NDArray[np.int64]  # in how many rows each rank occurs

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.diff(self.start)

    @classmethod
    def of(cls, sequences: Sequence[Codes], k: int | None) -> _Sketch:
        total = sum(codes.size for codes in sequences)
        mean = total / max(len(sequences), 1)
        k = k or (11 if mean <= _LONG else 15)
        if not 1 <= k <= 16:
            raise DataError("k-mers of this length do not fit in 32 bits", k, remedy="Use k from 1 to 16")
        sampled = max(1, math.ceil(min(mean / 2000, total / _ELEMENTS)))
        keys = [_kmer_keys(rows, flat, k, sampled) for rows, flat in _chunks(sequences, k)]
        # a long sequence spans chunks, so repeats are removed again over all of them
        by_value = _distinct(np.concatenate(keys)) if keys else np.zeros(0, dtype=np.uint64)
        first = np.ones(by_value.size, dtype=bool)
        first[1:] = (by_value[1:] >> _HALF) != (by_value[:-1] >> _HALF)
        copies = np.diff(np.append(np.flatnonzero(first), by_value.size))
        # 16 bits sort by radix; among k-mers as common as that, any fixed order will do
        rare_first = np.argsort(np.minimum(copies, 65535).astype(np.uint16), kind="stable")
        rank_of = np.empty(copies.size, dtype=np.uint64)
        rank_of[rare_first] = np.arange(copies.size, dtype=np.uint64)
        key = np.sort((by_value << _HALF) | rank_of[np.cumsum(first) - 1])
        start = np.searchsorted(key, np.arange(len(sequences) + 1, dtype=np.uint64) << _HALF)
        rank = (key & _LOW).astype(np.int64)
        return cls(k, sampled, rank, start.astype(np.int64), copies[rare_first])


def _chunks(sequences: Sequence[Codes], k: int) -> Iterator[tuple[NDArray[np.int64], Codes]]:
    """Cut or join the sequences into stretches of about 2^16 bases, an unknown base after each piece."""
    gap = np.full(1, 4, dtype=np.uint8)
    pieces: list[Codes] = []
    rows: list[int] = []
    held = 0
    for row, codes in enumerate(sequences):
        for begin in range(0, max(codes.size - k + 1, 0), _CHUNK):
            piece = codes[begin : begin + _CHUNK + k - 1]
            pieces += [piece, gap]
            rows.append(row)
            held += piece.size
            if held >= _CHUNK:
                yield _joined(rows, pieces)
                pieces, rows, held = [], [], 0
    if pieces:
        yield _joined(rows, pieces)


def _joined(rows: list[int], pieces: list[Codes]) -> tuple[NDArray[np.int64], Codes]:
    sizes = [piece.size + 1 for piece in pieces[::2]]
    return np.repeat(np.array(rows, dtype=np.int64), sizes), np.concatenate(pieces)


def _kmer_keys(rows: NDArray[np.int64], flat: Codes, k: int, sampled: int) -> NDArray[np.uint64]:
    """Distinct ``hash << 32 | row`` of the canonical k-mers of known bases; the hash is a bijection of 32 bits."""
    count = flat.size - k + 1
    forward, reverse = _kmers((flat & 3).astype(np.uint32), k)
    value = np.minimum(forward, reverse)
    value ^= np.uint32(0x5BD1E995)
    for factor in (0x7FEB352D, 0x846CA68B):
        value ^= value >> np.uint32(16)
        value *= np.uint32(factor)
    wanted = value < np.uint32((1 << 32) // sampled) if sampled > 1 else np.ones(count, dtype=bool)
    touched = np.flatnonzero(flat > 3)[:, None] - np.arange(k)
    wanted[touched[(touched >= 0) & (touched < count)]] = False
    picked = rows[:count][wanted].astype(np.uint64)
    return _distinct((value[wanted].astype(np.uint64) << _HALF) | picked)


def _distinct(key: NDArray[Key]) -> NDArray[Key]:
    """Sorted, without repeats; much faster than numpy.unique, which hashes."""
    key = np.sort(key)
    keep = np.ones(key.size, dtype=bool)
    keep[1:] = key[1:] != key[:-1]
    return key[keep]


_Strands = tuple[NDArray[np.uint32], NDArray[np.uint32]]


def _kmers(base: NDArray[np.uint32], k: int) -> _Strands:
    """Two-bit codes of the k-mer at each position and of its reverse complement, by joining powers of two."""
    power, width = (base, base ^ np.uint32(3)), 1
    done: _Strands | None = None
    length = 0
    while True:
        if k & width:
            done = power if done is None else _join(done, length, power, width)
            length += width
        if 2 * width > k:
            return done or power
        power, width = _join(power, width, power, width), 2 * width


def _join(left: _Strands, a: int, right: _Strands, b: int) -> _Strands:
    count = right[0].size - a
    forward = (left[0][:count] << np.uint32(2 * b)) | right[0][a:]
    reverse = (right[1][a:] << np.uint32(2 * a)) | left[1][:count]
    return forward, reverse


@dataclass(frozen=True, slots=True)
class _Pairs:
    a: NDArray[np.int64]
    b: NDArray[np.int64]
    similarity: NDArray[np.float64]


def _near_pairs(
    sketch: _Sketch, similarity: float, identity: NDArray[np.int64], partition: NDArray[np.int64] | None
) -> tuple[_Pairs, bool]:
    """Pairs of different sequences of Jaccard index >= similarity, in different partitions where these are given."""
    pairs, complete = _candidates(sketch, similarity, identity, partition)
    a, b = pairs >> 32, pairs & 0xFFFFFFFF
    sizes = sketch.sizes
    shared = np.zeros(a.size, dtype=np.int64)
    ends = np.cumsum(sizes[a] + sizes[b])
    bounds = np.searchsorted(ends, np.arange(0, ends[-1] if ends.size else 0, 4_000_000)[1:])
    for part in np.split(np.arange(a.size), bounds):
        if part.size:
            shared[part] = _shared(sketch, a[part], b[part])
    value = shared / np.maximum(sizes[a] + sizes[b] - shared, 1)
    near = value >= similarity
    return _Pairs(a[near], b[near], value[near]), complete


def _candidates(
    sketch: _Sketch, similarity: float, identity: NDArray[np.int64], partition: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], bool]:
    """Pairs ``a << 32 | b`` (a < b) that share a k-mer of their prefixes, and whether that is all of them."""
    sizes = sketch.sizes
    row = np.repeat(np.arange(sizes.size), sizes)
    prefix = sizes - np.ceil(similarity * sizes - 1e-9).astype(np.int64) + 1
    place = np.arange(row.size) - sketch.start[row]
    wanted = (place < prefix[row]) & (sketch.copies[sketch.rank] > 1)
    # rows are shuffled so that neighbours within a large family come from all folds
    shuffled = np.random.default_rng(0).permutation(sizes.size)
    unshuffled = np.argsort(shuffled)
    key = np.sort((sketch.rank[wanted] << 32) | shuffled[row[wanted]])
    kmer, member = key >> 32, unshuffled[key & 0xFFFFFFFF]
    found = np.zeros(0, dtype=np.int64)
    cost, apart = 0, 1
    live = np.arange(key.size)
    while True:
        live = live[live + apart < key.size]
        live = live[kmer[live] == kmer[live + apart]]
        if not live.size:
            return found, True
        if cost > _COMPARED:
            return found, False
        a, b = member[live], member[live + apart]
        good = identity[a] != identity[b]
        good &= np.minimum(sizes[a], sizes[b]) >= similarity * np.maximum(sizes[a], sizes[b])
        if partition is not None:
            good &= partition[a] != partition[b]
        a, b = a[good], b[good]
        found = _distinct(np.concatenate([found, (np.minimum(a, b) << 32) | np.maximum(a, b)]))
        cost = int((sizes[found >> 32] + sizes[found & 0xFFFFFFFF]).sum())
        apart += 1


def _shared(sketch: _Sketch, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many k-mers each pair shares."""
    rows = np.stack([a, b], axis=1).reshape(-1)
    sizes = sketch.sizes[rows]
    pair = np.repeat(np.repeat(np.arange(a.size), 2), sizes)
    offset = np.cumsum(sizes) - sizes
    take = np.arange(pair.size) + np.repeat(sketch.start[rows] - offset, sizes)
    key = np.sort((pair << 32) | sketch.rank[take])
    same = key[1:] == key[:-1]
    return np.bincount(key[1:][same] >> 32, minlength=a.size).astype(np.int64)
