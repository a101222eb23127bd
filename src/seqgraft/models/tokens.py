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

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from seqgraft.errors import ConfigError, DataError, ModelError
from seqgraft.sequence import N

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "Blocks",
    "BytePairs",
    "Overlapping",
    "Tokeniser",
    "Tokens",
    "Vocabulary",
    "characters",
    "dnabert",
    "nucleotide_transformer",
    "read_vocabulary",
    "refuse_unknown",
    "to_bins",
]

_BASES = "ACGTN"  # in the order of their codes
_LETTERS = np.frombuffer(_BASES.encode(), dtype=np.uint8)
_PUBLISHED = "ATCG"  # the order in which DNABERT and the Nucleotide Transformer number their k-mers
_NO_LIMIT = 10**9  # files write 1e30 where any length will do
_USUAL = {  # names of special tokens, for files that do not give them
    "cls_token": ("[CLS]", "<cls>"),
    "sep_token": ("[SEP]", "<sep>"),
    "eos_token": ("<eos>",),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
}


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

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode(self, codes: Tensor, lengths: Tensor) -> Tokens:
        """Tokens of base codes uint8 ``(batch, length)``, of which the first ``lengths`` ``(batch,)`` are sequence.

        Codes other than A, C, G and T are N.

        Raises:
            DataError: bases that no token stands for, unless the tokeniser truncates.
        """
        ...


@dataclass(frozen=True)
class Vocabulary:
    """Which id a token has, and what is put around those of a sequence.

    Attributes:
        ids: token -> id.
        unknown, padding: ids of the tokens for what is not in the vocabulary, and for filling a batch.
        before, after: ids of the special tokens at the two ends of a sequence.
        left: whether batches are padded on the left.
        limit: how many tokens the model takes, special ones included. None: any number.
    """

    ids: Mapping[str, int]
    unknown: int
    padding: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    left: bool = False
    limit: int | None = None

    @classmethod
    def of(
        cls,
        tokens: Iterable[str],
        before: Sequence[str] = (),
        after: Sequence[str] = (),
        left: bool = False,
        limit: int | None = None,
    ) -> Self:
        """A vocabulary whose ids count its tokens, among them an unknown and a padding token of a usual name."""
        ids = {token: i for i, token in enumerate(tokens)}
        unknown, padding = (next(ids[t] for t in _USUAL[role] if t in ids) for role in ("unk_token", "pad_token"))
        return cls(ids, unknown, padding, tuple(ids[t] for t in before), tuple(ids[t] for t in after), left, limit)

    @property
    def k(self) -> int:
        """The length of its longest tokens of bases alone; 0 if it has none."""
        return max((len(token) for token in self.ids if set(token.upper()) <= set(_BASES)), default=0)

    @property
    def species(self) -> tuple[str, ...]:
        """Tokens that are neither bases nor, by their brackets, special ones, in alphabetical order."""
        return tuple(sorted(t for t in self.ids if t[:1] not in ("[", "<") and not set(t.upper()) <= set(_BASES)))

    def table(self, k: int) -> Tensor:
        """Ids of all k-mers over A C G T N, int64 ``(5**k,)``, in the order of their numbers to base five."""
        kmers = ("".join(letters) for letters in product(_BASES, repeat=k))
        return torch.tensor([self.ids.get(kmer, self.ids.get(kmer.lower(), self.unknown)) for kmer in kmers])

    def check_kmers(self, k: int, where: object = None) -> None:
        """That it has every k-mer of A, C, G and T.

        Raises:
            ModelError: some are missing.
        """
        missing = [
            m for m in map("".join, product("ACGT", repeat=k)) if m not in self.ids and m.lower() not in self.ids
        ]
        if missing or not k:
            remedy = f"{len(missing)} of {4**k} are missing: check that the folder is of a model of k-mers"
            raise ModelError(f"the vocabulary lacks k-mers of {k} bases", missing[:3], where=where, remedy=remedy)


def dnabert(k: int) -> Vocabulary:
    """The vocabulary of DNABERT: five special tokens, then the k-mers in the order A T C G (its ``vocab.txt``)."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map("".join, product(_PUBLISHED, repeat=k))]
    return Vocabulary.of(tokens, ["[CLS]"], ["[SEP]"], limit=512)


def nucleotide_transformer(version: int = 1) -> Vocabulary:
    """The vocabulary of the Nucleotide Transformer: 4,105 tokens, 4,107 in version 2, which uses none of its two more.

    Special tokens, the 6-mers in the order A T C G, single bases, N (``tokenizers.py`` of its publication); the class
    token stands before a sequence and nothing after it. Version 1 takes 1,000 tokens, version 2 takes 2,048.
    """
    special = ["<unk>", "<pad>", "<mask>", "<cls>", *(["<eos>", "<bos>"] if version == 2 else [])]
    tokens = [*special, *map("".join, product(_PUBLISHED, repeat=6)), *_PUBLISHED, "N"]
    return Vocabulary.of(tokens, ["<cls>"], limit=2048 if version == 2 else 1000)


def characters(limit: int | None = None) -> Vocabulary:
    """The vocabulary of HyenaDNA and Caduceus, which is in their code and in no file; for ``Overlapping`` with k = 1.

    Seven special tokens, then A, C, G, T and N from 7 on; a separator after the sequence, and padding on the left.
    """
    special = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"]
    return Vocabulary.of([*special, *_BASES], after=["[SEP]"], left=True, limit=limit)


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
        return cls(_with_species(vocabulary, species, folder), vocabulary.k, truncate)

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
        made = cls(read_vocabulary(folder, (), (), limit), path.read_text(encoding="utf-8"), truncate)
        framed = made._tokenizer.encode("A")
        bodies = [i for i, special in enumerate(framed.special_tokens_mask) if not special]
        if not bodies:
            raise ModelError("the tokens have none for the base", "A", where=path, remedy="It is no model of DNA")
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
        letters = _LETTERS[codes.clamp(max=N).cpu().numpy()]
        texts = [row[:n].tobytes().decode() for row, n in zip(letters, lengths.tolist(), strict=True)]
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        listed = [
            (row, column, token, *span)
            for row, one in enumerate(found)
            for column, (token, span) in enumerate(zip(one.ids, one.offsets, strict=True))
        ]
        pieces = torch.tensor(listed, dtype=torch.int64).reshape(-1, 5).T.to(codes.device)
        return _assemble(self.vocabulary, self.truncate, pieces, lengths, codes.shape[1])


def read_vocabulary(folder: Path, before: Sequence[str], after: Sequence[str], limit: int | None = None) -> Vocabulary:
    """The vocabulary of a checkpoint, from those of its files that it has.

    Tokens come from ``vocab.txt``, ``tokenizer.json`` and ``added_tokens.json``; what the special ones are called comes
    from ``tokenizer_config.json`` and ``special_tokens_map.json``. Of these the second counts, or the first if it lists
    added tokens, as in transformers.

    Args:
        before, after: which special tokens stand around a sequence, by their keys there, such as ``cls_token``;
            those that the files set to null are left out.
        limit: of tokens, where the files give none or another.

    Raises:
        ModelError: no vocabulary, no unknown or padding token, a file that is no JSON, or two that contradict.
    """
    config, special = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "special_tokens_map.json")
    names = special | config if "added_tokens_decoder" in config else config | special
    ids = _read_ids(folder, config)
    unknown, padding = (_role(role, names, ids) for role in ("unk_token", "pad_token"))
    if unknown is None or padding is None:
        remedy = "Name both in tokenizer_config.json, as tokens of the vocabulary"
        found = {"unk_token": unknown, "pad_token": padding}
        raise ModelError("the vocabulary lacks the unknown or the padding token", found, where=folder, remedy=remedy)
    most = config.get("model_max_length")
    if limit is None and most is not None and most < _NO_LIMIT:
        limit = int(most)
    ends = [tuple(i for role in roles if (i := _role(role, names, ids)) is not None) for roles in (before, after)]
    return Vocabulary(ids, unknown, padding, ends[0], ends[1], config.get("padding_side") == "left", limit)


def _read_ids(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, from all files that list any."""
    found: list[tuple[str, int]] = []
    if (path := folder / "vocab.txt").exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [(line.strip(), i) for i, line in enumerate(lines) if line.strip()]
    described = _read_json(folder / "tokenizer.json")
    if described:
        vocabulary = described.get("model", {}).get("vocab")
        if not isinstance(vocabulary, dict):
            remedy = "Its model needs a vocabulary of tokens with their ids"
            raise ModelError("the tokens cannot be read", where=folder / "tokenizer.json", remedy=remedy)
        found += [
            *vocabulary.items(),
            *((token["content"], token["id"]) for token in described.get("added_tokens", ())),
        ]
    found += _read_json(folder / "added_tokens.json").items()
    found += [(token["content"], int(i)) for i, token in config.get("added_tokens_decoder", {}).items()]
    if not found:
        remedy = "Copy the whole folder, with vocab.txt or tokenizer.json"
        raise ModelError("there is no vocabulary", str(folder), remedy=remedy)
    ids = dict(found)
    if twice := sorted({token for token, i in found if ids[token] != i}):
        raise ModelError("the files give a token two ids", twice[:5], where=folder, remedy="Copy all from one place")
    return ids


def _role(role: str, names: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
    """The id of the special token of this role; None if the files set it to null, or none has a usual name."""
    if role not in names:
        return next((ids[name] for name in _USUAL[role] if name in ids), None)
    name = names[role]["content"] if isinstance(names[role], dict) else names[role]
    return None if name is None else ids.get(name)


def _read_json(path: Path) -> dict[str, Any]:
    """What a file holds, nothing if it is not there."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        remedy = "Copy or download it again"
        raise ModelError(f"the file is not valid JSON ({error})", where=path, remedy=remedy) from error
    if not isinstance(content, dict):
        raise ModelError("the file holds no table", type(content).__name__, where=path, remedy="Copy it again")
    return content


def _with_species(vocabulary: Vocabulary, species: str | None, folder: Path) -> Vocabulary:
    """The vocabulary with the species' token after the others before a sequence."""
    known = vocabulary.species
    if species is None and not known:
        return vocabulary
    if species not in known:
        close = get_close_matches(species or "", known, 5)
        listed = [*close, *(name for name in known if name not in close)]
        more = f", and {len(listed) - 20} more" if len(listed) > 20 else ""
        what = "the model has no token for the species" if species else "the model needs the token of a species"
        remedy = f"Known: {', '.join(listed[:20])}{more}" if known else "It has none at all: leave the species out"
        raise ConfigError(what, species, where=folder, remedy=remedy)
    return replace(vocabulary, before=(*vocabulary.before, vocabulary.ids[species]))


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


def to_bins(hidden: Tensor, tokens: Tokens, bin_size: int) -> Tensor:
    """What a model made of tokens, ``(batch, tokens, channels)``, as bins of the sequence, ``(batch, channels, bins)``.

    Each base gets the mean of the tokens that cover it, each bin the mean of its bases; bases that no token covers do
    not count, and a bin without others is zero. The last bin may be part of one: there are
    ``ceil(length / bin_size)``. Sums are of float32 at least, whatever the type of ``hidden``.
    """
    batch, _, channels = hidden.shape
    bins = -(-tokens.length // bin_size)
    edges = torch.zeros(batch, bins * bin_size + 1, dtype=torch.int64, device=hidden.device)
    some = tokens.stop > tokens.start
    edges.scatter_add_(1, tokens.start, some.long()).scatter_add_(1, tokens.stop, -some.long())
    cover = edges.cumsum(1)[:, :-1]  # how many tokens each base has
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
