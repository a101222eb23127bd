"""Tokens of DNA language models, made from base codes: k-mers, single bases and byte pairs.

Every kind is a frozen value with one method, ``encode``, which says of each token the bases that it stands for;
``to_bins`` takes what a model makes of the tokens back to positions of the sequence. The reverse complement is made of
the base codes, before. Vocabularies are read from the files of a checkpoint, or follow from a published rule:

=================  ================================  ============================================================
kind               models                            tokens
=================  ================================  ============================================================
``Overlapping``    DNABERT 3-6, SpeciesLM            k-mers, one base apart; before them a token for the species
``Overlapping``    HyenaDNA, Caduceus (k = 1)        single bases
``Blocks``         Nucleotide Transformer, AgroNT    k-mers side by side; N, and what is left before it, as single bases
``BytePairs``      DNABERT-2, GROVER, GENA-LM        what ``tokenizer.json`` says
=================  ================================  ============================================================

No base is lost in silence: where a model takes fewer tokens than a sequence has, or a sequence is shorter than a k-mer,
``encode`` refuses, or counts if it is told to truncate. Tokens that the vocabulary does not have are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from seqgraft.errors import DataError, ModelError
from seqgraft.models.vocabulary import BASES, Vocabulary, read_vocabulary, with_species
from seqgraft.sequence import N

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Blocks", "BytePairs", "Overlapping", "Tokeniser", "Tokens", "refuse_unknown", "to_bins"]

_LETTERS = np.frombuffer(BASES.encode(), dtype=np.uint8)


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch of sequences.

    Attributes:
        ids: int64 ``(batch, tokens)``.
        mask: bool ``(batch, tokens)``, False where there is only padding.
        start, stop: int64 ``(batch, tokens)``, the bases ``[start, stop)`` that each token stands for, 0-based; special
            tokens and padding stand for none, ``start == stop``.
        unknown: int64 ``(batch,)``, how many tokens that stand for bases the vocabulary does not have.
        truncated: int64 ``(batch,)``, how many bases no token stands for.
        length: bases of the longest sequence that the batch has room for.
    """

    ids: Tensor
    mask: Tensor
    start: Tensor
    stop: Tensor
    unknown: Tensor
    truncated: Tensor
    length: int


class Tokeniser(Protocol):
    """What every kind of tokens offers."""

    #: Whether the length of a sequence alone says how many tokens it has.
    fixed: ClassVar[bool]

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def truncate(self) -> bool: ...

    @property
    def longest(self) -> int | None:
        """Bases of the longest sequence without N that fits; None if any length does, or its bases decide."""
        ...

    def encode(self, codes: Tensor, lengths: Tensor) -> Tokens:
        """Tokens of base codes uint8 ``(batch, length)``, of which the first ``lengths`` ``(batch,)`` are sequence.

        Codes other than A, C, G and T are N.

        Raises:
            DataError: bases that no token stands for, unless the tokeniser truncates.
        """
        ...


@dataclass(frozen=True)
class Overlapping:
    """All k-mers of a sequence, one base apart. A k-mer with an N is unknown, unless the vocabulary has it.

    Attributes:
        k: bases of a token.
        truncate: drop and count bases that no token stands for.
    """

    vocabulary: Vocabulary
    k: int
    truncate: bool = False
    fixed = True

    @classmethod
    def read(
        cls, folder: Path, *, species: str | None = None, limit: int | None = None, truncate: bool = False
    ) -> Self:
        """From the files of a checkpoint: k-mers between a class token and a separator.

        Args:
            species: the token that follows the class token, for models that have such tokens (SpeciesLM).
            limit: of tokens, where the files give none or another.

        Raises:
            ConfigError: the model has no token for this species, or needs one and none is given.
            ModelError: the files are missing, unreadable or of another kind of model.
        """
        vocabulary = read_vocabulary(folder, ("cls_token",), ("sep_token",), limit)
        vocabulary.check_kmers(vocabulary.k, folder)
        return cls(with_species(vocabulary, species, folder), vocabulary.k, truncate)

    @property
    def longest(self) -> int | None:
        """See ``Tokeniser``."""
        room = self.vocabulary.room
        return None if room is None else room + self.k - 1

    @cached_property
    def _ids(self) -> Tensor:
        return self.vocabulary.table(self.k)

    def encode(self, codes: Tensor, lengths: Tensor) -> Tokens:
        """See ``Tokeniser``."""
        begins = torch.arange(codes.shape[1], device=codes.device)[None] + self.k <= lengths.to(codes.device)[:, None]
        ids = self._ids.to(codes.device)[_number(codes, self.k)]
        return _assemble(
            self.vocabulary, self.truncate, _pieces(begins, torch.full_like(ids, self.k), ids), lengths, codes.shape[1]
        )


@dataclass(frozen=True)
class Blocks:
    """K-mers side by side, from the first base and again after every N.

    Each N is a token of its own, and so is each of the fewer than k bases that are left before an N or the end.

    Attributes:
        k: bases of a token.
        truncate: drop and count bases that no token stands for.
    """

    vocabulary: Vocabulary
    k: int = 6
    truncate: bool = False
    fixed = False

    @classmethod
    def read(cls, folder: Path, *, limit: int | None = None, truncate: bool = False) -> Self:
        """From the files of a checkpoint: a class token, k-mers and single bases, an end token if the files name one.

        Args:
            limit: of tokens, where the files give none or another.

        Raises:
            ModelError: the files are missing, unreadable or of another kind of model.
        """
        vocabulary = read_vocabulary(folder, ("cls_token",), ("eos_token",), limit)
        for k in (1, vocabulary.k):
            vocabulary.check_kmers(k, folder)
        return cls(vocabulary, vocabulary.k, truncate)

    @property
    def longest(self) -> int | None:
        """See ``Tokeniser``."""
        room = self.vocabulary.room
        return None if room is None else room * self.k

    @cached_property
    def _ids(self) -> tuple[Tensor, Tensor]:
        return self.vocabulary.table(1), self.vocabulary.table(self.k)

    def encode(self, codes: Tensor, lengths: Tensor) -> Tokens:
        """See ``Tokeniser``."""
        length, device = codes.shape[1], codes.device
        at = torch.arange(length, device=device).expand(codes.shape)
        inside = at < lengths.to(device)[:, None]
        gap = (codes >= N) | ~inside
        first = torch.where(gap, at + 1, 0).cummax(1).values  # of the stretch without N that a base is in
        end = torch.where(gap, at, length).flip(1).cummin(1).values.flip(1)
        whole = first + (end - first) // self.k * self.k  # up to here in k-mers
        single = gap | (at >= whole)
        begins = inside & (single | ((at - first) % self.k == 0))
        alone, together = (table.to(device) for table in self._ids)
        ids = torch.where(single, alone[_number(codes, 1)], together[_number(codes, self.k)])
        return _assemble(
            self.vocabulary, self.truncate, _pieces(begins, torch.where(single, 1, self.k), ids), lengths, length
        )


@dataclass(frozen=True)
class BytePairs:
    """Whatever ``tokenizer.json`` describes, above all byte pairs: through the ``tokenizers`` package.

    Attributes:
        text: of that file.
        truncate: drop and count bases that no token stands for.
    """

    vocabulary: Vocabulary
    text: str
    truncate: bool = False
    fixed = False
    longest = None

    @classmethod
    def read(cls, folder: Path, *, limit: int | None = None, truncate: bool = False) -> Self:
        """From the files of a checkpoint; the special tokens around a sequence are those that ``tokenizer.json`` adds.

        Args:
            limit: of tokens, where the files give none or another.

        Raises:
            ModelError: the files are missing or unreadable.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelError("the description of the tokens is missing", str(path), remedy="Copy the whole folder")
        return cls.of(read_vocabulary(folder, (), (), limit), path.read_text(encoding="utf-8"), truncate)

    @classmethod
    def of(cls, vocabulary: Vocabulary, text: str, truncate: bool = False) -> Self:
        """The tokens of a text, with the special ones around a sequence that it adds.

        Raises:
            ModelError: it has no token for a base.
        """
        made = cls(vocabulary, text, truncate)
        framed = made._tokenizer.encode("A")
        bodies = [i for i, special in enumerate(framed.special_tokens_mask) if not special]
        if not bodies:
            raise ModelError("the tokens have none for the base", "A", remedy="It is no model of DNA")
        before, after = framed.ids[: bodies[0]], framed.ids[bodies[-1] + 1 :]
        return replace(made, vocabulary=replace(made.vocabulary, before=tuple(before), after=tuple(after)))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        made = Tokenizer.from_str(self.text)
        made.no_truncation()
        made.no_padding()
        return made

    def encode(self, codes: Tensor, lengths: Tensor) -> Tokens:
        """See ``Tokeniser``."""
        sizes = lengths.tolist()  # first: where there are shapes alone, torch says here that it takes values
        letters = _LETTERS[codes.clamp(max=N).cpu().numpy()]
        texts = [row[:n].tobytes().decode() for row, n in zip(letters, sizes, strict=True)]
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        listed = [
            (row, column, token, *span)
            for row, one in enumerate(found)
            for column, (token, span) in enumerate(zip(one.ids, one.offsets, strict=True))
        ]
        pieces = torch.tensor(listed, dtype=torch.int64).reshape(-1, 5).T.to(codes.device)
        return _assemble(self.vocabulary, self.truncate, pieces, lengths, codes.shape[1])


def _number(codes: Tensor, k: int) -> Tensor:
    """Of the k-mer that begins at each base its number to base five, ``(batch, length)``; beyond the end is N."""
    padded = pad(codes.clamp(max=N).long(), (0, k - 1), value=N)
    number = torch.zeros(codes.shape, dtype=torch.int64, device=codes.device)
    for i in range(k):
        number = number * 5 + padded[:, i : i + codes.shape[1]]
    return number


def _pieces(begins: Tensor, widths: Tensor, ids: Tensor) -> Tensor:
    """Row, column, id, start and stop of every token, ``(5, tokens)``, from where in ``(batch, length)`` one begins."""
    row, start = begins.nonzero(as_tuple=True)
    return torch.stack([row, begins.cumsum(1)[row, start] - 1, ids[row, start], start, start + widths[row, start]])


def _assemble(words: Vocabulary, truncate: bool, pieces: Tensor, lengths: Tensor, length: int) -> Tokens:
    """The batch of the tokens: cut to the limit, between special tokens, padded to the longest."""
    device, batch = pieces.device, len(lengths)
    around = len(words.before) + len(words.after)
    if words.limit is not None:
        pieces = pieces[:, pieces[1] < words.limit - around]
    row, column, ids, start, stop = pieces

    def count(values: Tensor) -> Tensor:
        return torch.zeros(batch, dtype=torch.int64, device=device).index_add(0, row, values)

    reached = torch.where(column > 0, stop.roll(1), 0)  # tokens may overlap: a base counts once
    truncated = lengths.to(device) - count(stop - torch.maximum(start, reached))
    if not truncate and bool(truncated.any()):
        many = int((truncated > 0).sum())
        raise DataError(
            f"{many} of {batch} sequences have bases that no token stands for, at most",
            int(truncated.max()),
            remedy=f"The model takes {words.limit or 'any number of'} tokens, {around} of them special:"
            " give sequences of a length that fits, or set truncate",
        )
    total = count(torch.ones_like(row)) + around
    width = int(total.max()) if batch else 0
    offset = width - total if words.left else torch.zeros_like(total)
    at = torch.arange(width, device=device)[None]
    mask = (at >= offset[:, None]) & (at < (offset + total)[:, None])
    out = torch.full((batch, width), words.padding, dtype=torch.int64, device=device)
    for i, token in enumerate(words.before):
        out.scatter_(1, (offset + i)[:, None], token)
    for i, token in enumerate(reversed(words.after), start=1):
        out.scatter_(1, (offset + total - i)[:, None], token)
    place = (row, offset[row] + len(words.before) + column)
    out[place] = ids
    spans = torch.zeros((2, batch, width), dtype=torch.int64, device=device)
    spans[0][place], spans[1][place] = start, stop
    return Tokens(out, mask, spans[0], spans[1], count((ids == words.unknown).long()), truncated, length)


def refuse_unknown(tokens: Tokens, share: float) -> None:
    """That no more than this share of the tokens that stand for bases is unknown.

    An N makes k overlapping k-mers unknown; if almost all are, the vocabulary is another model's.

    Raises:
        DataError: more are.
    """
    standing, unknown = int((tokens.stop > tokens.start).sum()), int(tokens.unknown.sum())
    if unknown > share * standing:
        remedy = (
            f"Up to {share:.0%} are allowed: check that the sequences have few N, and that the tokens are the model's"
        )
        raise DataError(
            f"{unknown} of {standing} tokens are unknown to the model", round(unknown / standing, 4), remedy=remedy
        )


def known_bins(tokens: Tokens, bin_size: int) -> Tensor:
    """Which bins, bool ``(batch, bins)``, have a base that a token covers: the others are zero in ``to_bins``."""
    bins = -(-tokens.length // bin_size)
    return (_cover(tokens, bins * bin_size) > 0).reshape(len(tokens.start), bins, bin_size).any(2)


def _cover(tokens: Tokens, length: int) -> Tensor:
    """How many tokens each base has, ``(batch, length)``."""
    edges = torch.zeros(len(tokens.start), length + 1, dtype=torch.int64, device=tokens.start.device)
    some = (tokens.stop > tokens.start).long()
    edges.scatter_add_(1, tokens.start, some).scatter_add_(1, tokens.stop, -some)
    return edges.cumsum(1)[:, :-1]


def to_bins(hidden: Tensor, tokens: Tokens, bin_size: int) -> Tensor:
    """What a model made of tokens, ``(batch, tokens, channels)``, as bins of the sequence, ``(batch, channels, bins)``.

    Each base gets the mean of the tokens that cover it, each bin the mean of its bases; bases that no token covers do
    not count, and a bin without others is zero. The last bin may be part of one: there are
    ``ceil(length / bin_size)``. Sums are of float32 at least, whatever the type of ``hidden``.
    """
    batch, _, channels = hidden.shape
    bins = -(-tokens.length // bin_size)
    some = tokens.stop > tokens.start
    cover = _cover(tokens, bins * bin_size)
    known = (cover > 0).reshape(batch, bins, bin_size).sum(2).repeat_interleave(bin_size, 1)
    share = torch.where(cover > 0, 1 / (cover * known).double(), 0.0)  # of a base's one token in the mean of its bin
    upto = pad(share.cumsum(1), (1, 0))

    x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    out = x.new_zeros(batch * bins, channels)
    first, last = tokens.start // bin_size, (tokens.stop - 1) // bin_size
    for i in range(int(((last - first) * some).max()) + 1 if some.any() else 0):
        at = (first + i).clamp(max=bins - 1)
        low, high = torch.maximum(tokens.start, at * bin_size), torch.minimum(tokens.stop, (at + 1) * bin_size)
        here = some & (first + i <= last)
        weight = torch.where(here, upto.gather(1, high) - upto.gather(1, low), 0.0).to(x.dtype)
        rows = at + bins * torch.arange(batch, device=hidden.device)[:, None]
        out = out.index_add(0, rows.flatten(), (x * weight[..., None]).flatten(0, 1))
    return out.reshape(batch, bins, channels).transpose(1, 2).to(hidden.dtype)
