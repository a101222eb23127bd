"""What the sequences of a dataset are as tokens: counted before training, and refused where a model would miss some.

The tokens of a sequence follow from its bases alone, so a dataset that passes stops no run later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seqgraft.cache import views_of
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset
from seqgraft.errors import DataError, Problems
from seqgraft.models.base import Trunk
from seqgraft.models.tokens import Tokeniser
from seqgraft.predict import FORWARD_ONLY

__all__ = ["FoldTokens", "TokenCounts", "count_tokens"]

Rows = npt.NDArray[np.int64]
_AT_ONCE = 2**21  # bases


@dataclass(frozen=True)
class FoldTokens:
    """The tokens of the sequences of a fold.

    Attributes:
        rows, bases: sequences, and what they have together.
        median, most: tokens of a sequence, special ones included.
        tokens: that stand for bases.
        unknown: of these, what the model's vocabulary does not have.
        truncated: bases that no token stands for, in the view of each sequence that loses most.
        truncated_rows: sequences that have such bases.
    """

    rows: int
    bases: int
    median: float
    most: int
    tokens: int
    unknown: int
    truncated: int
    truncated_rows: int


@dataclass(frozen=True)
class TokenCounts:
    """Tokens by fold; none for a model that reads bases.

    Attributes:
        limit: how many tokens the model takes; None: any number.
        problems: why training would be refused.
    """

    folds: Mapping[str, FoldTokens]
    limit: int | None
    problems: Problems

    @property
    def facts(self) -> dict[str, str]:
        """For ``plan`` and the report."""
        if not self.folds:
            return {}
        name, first = next(iter(self.folds.items()))
        of = "" if self.limit is None else f" of the {self.limit:,} that the model takes"
        unknown = [
            f"{name} {fold.unknown:,} of {fold.tokens:,} ({fold.unknown / fold.tokens:.2%})"
            for name, fold in self.folds.items()
            if fold.unknown
        ]
        truncated = [
            f"{name} {fold.truncated:,} of {fold.bases:,}, in {fold.truncated_rows:,} of {fold.rows:,} sequences"
            for name, fold in self.folds.items()
            if fold.truncated
        ]
        return {
            "tokens": f"median {first.median:g} per sequence of fold {name!r}, "
            f"at most {max(fold.most for fold in self.folds.values()):,}{of}",
            "unknown tokens": "; ".join(unknown) or "none",
            "truncated bases": "; ".join(truncated) or "none",
        }

    def record(self) -> dict[str, Any]:
        """For ``environment.json``."""
        return {**self.facts, "folds": {name: asdict(fold) for name, fold in self.folds.items()}}


def count_tokens(
    trunk: Trunk, dataset: Dataset, folds: Mapping[str, tuple[Rows, Augmentation]], most_unknown: float
) -> TokenCounts:
    """Tokens of rows of a dataset, by fold; of donors, those of their distinct haplotypes.

    Args:
        folds: name -> rows, and the views that they will be seen in.
        most_unknown: largest share of a fold's tokens that the model may not know.
    """
    stages: Any = trunk.stages.values()
    tokeniser: Tokeniser | None = next((stage.tokeniser for stage in stages if hasattr(stage, "tokeniser")), None)
    problems = Problems(DataError)
    if tokeniser is None:
        return TokenCounts({}, None, problems)
    counts = {
        name: _of_fold(
            tokeniser, dataset, f"fold {name!r}" if name else None, dataset.stored(rows), views, most_unknown, problems
        )
        for name, (rows, views) in folds.items()
    }
    return TokenCounts(counts, tokeniser.vocabulary.limit, problems)


def _of_fold(
    tokeniser: Tokeniser,
    dataset: Dataset,
    where: str | None,
    rows: Rows,
    augment: Augmentation,
    most_unknown: float,
    problems: Problems,
) -> FoldTokens:
    bases, tokens, standing, unknown, truncated = _count(tokeniser, dataset, rows, augment)
    counts = FoldTokens(
        rows=len(rows),
        bases=int(bases.sum()),
        median=float(np.median(tokens)),
        most=int(tokens.max()),
        tokens=int(standing.sum()),
        unknown=int(unknown.sum()),
        truncated=int(truncated.sum()),
        truncated_rows=int((truncated > 0).sum()),
    )
    short, cut = standing == 0, (truncated > 0) & (standing > 0)
    if short.any():
        shortest = np.flatnonzero(short)[bases[short].argmin()]
        problems.add(
            f"{int(short.sum())} of {len(rows)} sequences are too short for a token; "
            f"the bases of the shortest, {_name(dataset, rows[shortest])}",
            int(bases[shortest]),
            where=where,
            remedy="Leave them out of the table, prepare a longer window, or use a model of shorter tokens",
        )
    if cut.any() and not tokeniser.truncate:
        worst = int(np.where(cut, bases, -1).argmax())
        room = tokeniser.longest
        most = "" if room is None else f"The model takes up to {room:,} bp. "
        problems.add(
            f"{int(cut.sum())} of {len(rows)} sequences have bases that no token of the model stands for; "
            f"those of the longest, {_name(dataset, rows[worst])} of {bases[worst]} bp",
            int(truncated[worst]),
            where=where,
            remedy=f"{most}Set model.truncate: true to drop and count them, prepare a shorter window "
            "(max_length and keep cut stored sequences), or use a model with more positions",
        )
    if counts.unknown > most_unknown * counts.tokens:
        worst = int(unknown.argmax())
        problems.add(
            f"{counts.unknown} of {counts.tokens} tokens are not in the model's vocabulary, {unknown[worst]} of them "
            f"in {_name(dataset, rows[worst])}; model.unknown allows {most_unknown:g}, and this is",
            round(counts.unknown / counts.tokens, 4),
            where=where,
            remedy="Leave out sequences with many N, as there are beyond the ends of a contig, or raise model.unknown",
        )
    return counts


def _count(
    tokeniser: Tokeniser, dataset: Dataset, rows: Rows, augment: Augmentation
) -> tuple[npt.NDArray[np.int64], ...]:
    """Of each row its bases, all tokens, those that stand for bases, unknown ones, and bases without a token.

    The last two are of the view with most of each, the one before them of that with fewest tokens; views matter only
    where the order of the bases does.
    """
    views = views_of(dataset, FORWARD_ONLY if tokeniser.fixed else augment)
    count, window = dataset.sequence_count, dataset.info.window
    lengths = np.full(count, window) if dataset.lengths is None else np.asarray(dataset.lengths)
    counting: Any = replace(tokeniser, truncate=True)  # type: ignore[type-var]
    out = np.zeros((5, len(rows)), dtype=np.int64)
    order = np.argsort(lengths[rows], kind="stable")
    step = max(1, _AT_ONCE // max(1, int(lengths[rows].max(initial=1))))
    for start in range(0, len(rows), step):
        here = order[start : start + step]
        found = []
        for view in views:
            codes, sizes = dataset.sequences(rows[here], [view] * len(here))
            tokens = counting.encode(torch.from_numpy(np.ascontiguousarray(codes)), torch.from_numpy(sizes))
            standing = (tokens.stop > tokens.start).sum(1)
            found.append(torch.stack([tokens.mask.sum(1), standing, tokens.unknown, tokens.truncated]).numpy())
        every = np.stack(found)
        out[0, here], out[1, here], out[2, here] = sizes, every[:, 0].max(0), every[:, 1].min(0)
        out[3:, here] = every[:, 2:].max(0)
    return tuple(out)


def _name(dataset: Dataset, row: int) -> str:
    """A row by its number, its name and its place, as far as it has them; a haplotype by its gene alone."""
    if dataset.donors is not None:
        gene = int(dataset.donors.sequences["gene"].iloc[row])
        return f"a haplotype of {dataset.donors.genes['gene'].iloc[gene]}"
    name = str(dataset.regions["name"].iloc[row]).strip(".")
    if dataset.genome is not None:
        at = dataset.interval(int(row))
        name = f"{name} {at.chrom}:{at.start}-{at.end}".strip()
    return f"row {row} ({name})" if name else f"row {row}"
