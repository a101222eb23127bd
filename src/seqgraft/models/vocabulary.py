"""Vocabularies of DNA language models: from the files of a checkpoint, or by a published rule."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from seqgraft.errors import ConfigError, ModelError

__all__ = [
    "BASES",
    "Vocabulary",
    "characters",
    "dnabert",
    "nucleotide_transformer",
    "read_vocabulary",
    "with_species",
]

BASES = "ACGTN"  # in the order of their codes
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
    def room(self) -> int | None:
        """How many tokens that stand for bases the model takes; None: any number."""
        return None if self.limit is None else self.limit - len(self.before) - len(self.after)

    @property
    def k(self) -> int:
        """The length of its longest tokens of bases alone; 0 if it has none."""
        return max((len(token) for token in self.ids if set(token.upper()) <= set(BASES)), default=0)

    @property
    def species(self) -> tuple[str, ...]:
        """Tokens that are neither bases nor, by their brackets, special ones, in alphabetical order."""
        return tuple(sorted(t for t in self.ids if t[:1] not in ("[", "<") and not set(t.upper()) <= set(BASES)))

    def table(self, k: int) -> Tensor:
        """Ids of all k-mers over A C G T N, int64 ``(5**k,)``, in the order of their numbers to base five."""
        kmers = ("".join(letters) for letters in product(BASES, repeat=k))
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
    return Vocabulary.of([*special, *BASES], after=["[SEP]"], left=True, limit=limit)


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


def with_species(vocabulary: Vocabulary, species: str | None, folder: Path) -> Vocabulary:
    """The vocabulary with the species' token after the others before a sequence."""
    known = vocabulary.species
    if species is None and not known:
        return vocabulary
    if species not in known:
        close = get_close_matches(species or "", known, 5)
        listed = [*close, *(name for name in known if name not in close)]
        more = f", and {len(listed) - 20} more" if len(listed) > 20 else ""
        what = (
            "the model has no token for the species"
            if species
            else "the model needs the token of a species (model.species)"
        )
        remedy = f"Known: {', '.join(listed[:20])}{more}" if known else "It has none at all: leave the species out"
        raise ConfigError(what, species, where=folder, remedy=remedy)
    return replace(vocabulary, before=(*vocabulary.before, vocabulary.ids[species]))
