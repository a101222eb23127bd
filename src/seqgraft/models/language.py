"""DNA language models as trunks: DNABERT, SpeciesLM, DNABERT-2 and the Nucleotide Transformers.

The layers are our own (``encoder.py``), so that padding, adapters and freezing work as in every other trunk; their
numbers are those of the published models, whose checkpoints ``hub_language.py`` reads.

::

    bases (b, 4, L) -> embeddings -> layer_0 ... layer_(depth-1) -> final: bins (b, channels, L / bin_size) -> crop
                           |________ tokens, bins (skips) _____________|

Between embeddings and final, positions are tokens. Vocabularies are brought into one order when weights are read, so
that the settings of a trunk say everything about its tokens; byte pairs keep the order of their ``tokenizer.json``,
whose text is a setting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqgraft.errors import ModelError, Problems
from seqgraft.models.base import Stage, State, Trunk, TrunkSpec
from seqgraft.models.encoder import FAMILIES, Layer
from seqgraft.models.masked import HIDDEN, MaskedHead, with_hidden
from seqgraft.models.stages import Crop
from seqgraft.models.tokens import Blocks, BytePairs, Overlapping, Tokens, known_bins, to_bins
from seqgraft.models.vocabulary import Vocabulary
from seqgraft.sequence import PAD, N

__all__ = ["KINDS", "Language", "ToBins", "bases_of", "beside_tokens", "most_tokens", "pieces"]

KINDS = ("overlapping", "blocks", "byte_pairs")
_BESIDE = {"tokens": 0, "bins": 0}  # what the last stage reads of the first


class Language(Trunk):
    """A transformer encoder on tokens of bases.

    Args:
        family: of its layers, see ``encoder.FAMILIES``: "bert", "esm", "mosaic" or "esm_rotary".
        tokens: "overlapping" k-mers, one base apart, "blocks" of them side by side, or "byte_pairs".
        k: bases of a token; of byte pairs, about how many it has.
        before, after: how many special tokens stand at the two ends of a sequence.
        channels, depth, heads, hidden: width, layers, attention heads, width inside the feed-forward part.
        positions: how many tokens it takes, special ones included; where positions are not learned, how many it was
            trained with, and any number will do.
        embedding_norm: normalise the sum of token and position vectors.
        embedding_scale: of the token vectors; if it is not 1, hidden tokens are zeros, as if dropped, and the others
            are scaled to make up for them (ESM's token dropout).
        dropout, attention_dropout: rates while training.
        eps: of the layer norms.
        species: whose token stands before each sequence, for the record.
        truncate: drop bases that no token stands for, instead of refusing them.
        bin_size: bp per bin of the output: any; 0 makes one bin of the whole sequence, the mean over its bases.
        crop: bins dropped at each end of the output.
        lm_head: with a head that predicts masked tokens (``lm``), which stands beside the chain of stages.
        tokenizer: text of the ``tokenizer.json`` of byte pairs.

    Raises:
        ModelError: an unknown family or kind of tokens, or sizes that do not divide.
    """

    any_bin_size = True
    label_bin_size = 0

    def __init__(
        self,
        family: str = "bert",
        tokens: str = "overlapping",
        k: int = 6,
        before: int = 1,
        after: int = 1,
        channels: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        positions: int = 512,
        embedding_norm: bool = True,
        embedding_scale: float = 1.0,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        eps: float = 1e-12,
        species: str = "",
        truncate: bool = False,
        lm_head: bool = False,
        tokenizer: str = "",
        bin_size: int = 16,
        crop: int = 0,
    ) -> None:
        super().__init__()
        self.settings: Mapping[str, Any] = {
            "family": family,
            "tokens": tokens,
            "k": k,
            "before": before,
            "after": after,
            "channels": channels,
            "depth": depth,
            "heads": heads,
            "hidden": hidden,
            "positions": positions,
            "embedding_norm": embedding_norm,
            "embedding_scale": embedding_scale,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "eps": eps,
            "species": species,
            "truncate": truncate,
            "lm_head": lm_head,
            "tokenizer": tokenizer,
        }
        _check(self.settings, bin_size)
        self.stride = max(1, bin_size)
        facts = FAMILIES[family]
        tokeniser = _tokeniser(self.settings, positions if facts.positions == "learned" else None)
        self.longest = tokeniser.longest
        embeddings = _Embeddings(tokeniser, channels, bin_size, embedding_scale)
        embeddings.positions = nn.Embedding(positions, channels) if facts.positions == "learned" else None
        embeddings.segment = None if facts.norm_first else nn.Embedding(1, channels)
        embeddings.norm = nn.LayerNorm(channels, eps=eps) if embedding_norm else None
        embeddings.dropout = nn.Dropout(0.0 if facts.norm_first else dropout)
        embeddings.reset_parameters()
        stages: dict[str, Stage] = {"embeddings": embeddings}
        for i in range(depth):
            stages[f"layer_{i}"] = Layer(family, channels, heads, hidden, (dropout, attention_dropout), eps)
        for stage in stages.values():
            stage.ragged = tokens == "byte_pairs"
        stages["final"] = ToBins(bin_size, nn.LayerNorm(channels, eps=eps) if facts.norm_first else None)
        stages["crop"] = Crop(crop)
        self.stages = nn.ModuleDict(stages)
        self.spec = TrunkSpec(name="language", channels=channels, bin_size=bin_size, sites=self._sites())
        self.lm = MaskedHead(channels, len(tokeniser.vocabulary.ids), eps) if lm_head else None

    def _sites(self) -> dict[str, tuple[str, ...]]:
        ends = {
            "attention": (".query", ".key", ".value", ".output"),
            "feedforward": (".up", ".down"),
            "norm": (".norm", ".attention_norm", ".feedforward_norm"),
        }
        ends |= {f"{site}{end}": (end,) for site in ("attention", "feedforward") for end in ends[site]}
        names = [f"stages.{name}" for name, _ in self.stages.named_modules()]  # the head for masked tokens has none
        return {site: tuple(name for name in names if name.endswith(end)) for site, end in ends.items()}


def _check(settings: Mapping[str, Any], bin_size: int) -> None:
    problems = Problems(ModelError)
    for name, known in (("family", tuple(FAMILIES)), ("tokens", KINDS)):
        if settings[name] not in known:
            problems.add(f"there is no such {name}", settings[name], where="language", remedy=f"Choose one of {known}")
    for name in ("k", "channels", "depth", "heads", "hidden", "positions"):
        if settings[name] < 1:
            problems.add(f"{name} must be 1 or more", settings[name], where="language")
    if bin_size < 0:
        problems.add("bins must be 1 bp or more, or 0 for one", bin_size, where="language")
    if settings["heads"] > 0 and settings["channels"] % settings["heads"]:
        what = f"the channels must be a multiple of the heads, {settings['heads']}"
        problems.add(what, settings["channels"], where="language")
    if (settings["tokens"] == "byte_pairs") != bool(settings["tokenizer"]):
        what = "byte pairs, and no other tokens, need the text of a tokenizer.json as tokenizer"
        problems.add(what, settings["tokens"], where="language")
    problems.raise_if_any()


def _tokeniser(settings: Mapping[str, Any], limit: int | None) -> Overlapping | Blocks | BytePairs:
    if settings["tokens"] == "byte_pairs":
        return BytePairs.of(_byte_pairs(settings["tokenizer"], limit), settings["tokenizer"], settings["truncate"])
    kind: type[Overlapping] | type[Blocks] = Overlapping if settings["tokens"] == "overlapping" else Blocks
    words = _vocabulary(settings["tokens"], settings["k"], settings["before"], settings["after"], limit)
    return kind(words, settings["k"], settings["truncate"])


def _vocabulary(tokens: str, k: int, before: int, after: int, limit: int | None) -> Vocabulary:
    """The one order: unknown, padding, special tokens of the two ends, mask, k-mers; of blocks also single bases, N."""
    special = ["[UNK]", "[PAD]", *(f"[BEFORE {i}]" for i in range(before)), *(f"[AFTER {i}]" for i in range(after))]
    names = [*special, "[MASK]", *pieces(tokens, k)]
    first, last = tuple(range(2, 2 + before)), tuple(range(2 + before, len(special)))
    return Vocabulary({name: i for i, name in enumerate(names)}, 0, 1, first, last, limit=limit)


def _byte_pairs(text: str, limit: int | None) -> Vocabulary:
    """The tokens of a ``tokenizer.json`` in the order of their ids; the one for what is hidden is called [MASK].

    Raises:
        ModelError: it is no such file, or lacks tokens that are needed.
    """
    remedy = "Give the whole text of a tokenizer.json with a vocabulary, added tokens included"
    try:
        described = json.loads(text)
        found = dict(described["model"]["vocab"]) | {t["content"]: t["id"] for t in described.get("added_tokens", ())}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError("the tokens cannot be read", text[:40], where="language.tokenizer", remedy=remedy) from error
    names = ["[MASK]" if name == "<mask>" else name for name in sorted(found, key=lambda name: int(found[name]))]
    if sorted(found.values()) != list(range(len(found))):
        raise ModelError("the ids of the tokens have gaps", len(found), where="language.tokenizer", remedy=remedy)
    for role in (("[UNK]", "<unk>"), ("[PAD]", "<pad>"), ("[MASK]",)):
        if not set(role) & set(names):
            raise ModelError("the tokens lack a special one", role[0], where="language.tokenizer", remedy=remedy)
    return Vocabulary.of(names, limit=limit)


def pieces(tokens: str, k: int) -> list[str]:
    """Tokens of bases. Blocks are of one base too, wherever k of them do not fit."""
    kmers = ["".join(letters) for letters in product("ACGT", repeat=k)]
    return kmers if tokens == "overlapping" else [*kmers, *(base for base in "ACGTN" if base not in kmers)]


class _Embeddings(Stage):
    """Bases to tokens, and tokens to vectors. Which bases each token stands for goes on to the last stage.

    Gradients do not reach the bases: which token stands somewhere is no smooth function of them.
    """

    writes = _BESIDE
    reads = {HIDDEN: 0}
    positions: nn.Embedding | None
    segment: nn.Embedding | None  # what BERT adds to all tokens of one segment
    norm: nn.LayerNorm | None
    dropout: nn.Dropout

    def __init__(self, tokeniser: Overlapping | Blocks | BytePairs, channels: int, bin_size: int, scale: float) -> None:
        super().__init__()
        self.tokeniser, self.bin_size, self.scale = tokeniser, bin_size, scale
        self.tokens = nn.Embedding(len(tokeniser.vocabulary.ids), channels)

    def reset_parameters(self) -> None:
        """Normal with a standard deviation of 0.02, as BERT begins (Devlin et al. 2019)."""
        for table in (self.tokens, self.positions, self.segment):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, state: State) -> State:
        codes, lengths, first = bases_of(state)
        found = self.tokeniser.encode(codes, lengths)
        more = max(0, self._usual(codes.shape[1]) - found.ids.shape[1])  # so that the shape says how many there are
        ids = functional.pad(found.ids, (0, more), value=self.tokeniser.vocabulary.padding)
        ids = with_hidden(ids, state.skips.get(HIDDEN))
        x = self._vectors(ids, found.mask.sum(1))
        skips = {name: skip for name, skip in state.skips.items() if name not in self.reads}
        skips |= beside_tokens(state, found, first, more, self.bin_size)
        return State(x.transpose(1, 2), skips, functional.pad(found.mask, (0, more)))

    def _vectors(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Vectors ``(batch, tokens, channels)`` of token ids, of which the first ``counts`` ``(batch,)`` are there."""
        x = self.tokens(ids)
        if self.scale != 1:
            hidden = ids == self.tokeniser.vocabulary.ids["[MASK]"]
            scale = self.scale / (1 - hidden.sum(1) / counts.clamp(min=1))
            x = x.masked_fill(hidden[..., None], 0.0) * scale[:, None, None]
        if self.segment is not None:
            x = x + self.segment.weight
        if self.positions is not None:
            place = torch.arange(ids.shape[1], device=ids.device)
            x = x + self.positions(place.clamp(max=self.positions.num_embeddings - 1))
        vectors: Tensor = self.dropout(x if self.norm is None else self.norm(x))
        return vectors

    def _usual(self, length: int) -> int:
        """How many tokens a sequence without N has at most; 0 of byte pairs, for which the length says little."""
        if isinstance(self.tokeniser, BytePairs):
            return 0
        return most_tokens(self.tokeniser, length)


def most_tokens(tokeniser: Overlapping | Blocks | BytePairs, length: int) -> int:
    """How many tokens a sequence can have, special ones included; of k-mers, one without N."""
    words = tokeniser.vocabulary
    if isinstance(tokeniser, Blocks):
        most = length // tokeniser.k + min(length, tokeniser.k - 1)
    else:
        most = length if isinstance(tokeniser, BytePairs) else length - tokeniser.k + 1
    most = len(words.before) + len(words.after) + max(0, most)
    return most if words.limit is None else min(most, words.limit)


def beside_tokens(state: State, found: Tokens, first: Tensor, more: int, bin_size: int) -> dict[str, Tensor]:
    """What goes on to the last stage: which bases each token stands for, and how much of each bin is there.

    Args:
        state: of the bases; ``first`` is where each sequence begins in it.
        more: tokens of padding beside those of ``found``.

    Returns:
        "tokens" ``(batch, 2, tokens)``: by how many bases each begins after the one before, and how many it covers;
        "bins" ``(batch, 1, bins)``: how many bases of each bin are there, as a fraction.
    """
    width = found.stop - found.start
    start = torch.where(width > 0, found.start + first[:, None], 0).cummax(1).values
    advance = start.diff(dim=1, prepend=torch.zeros_like(start[:, :1]))  # half precision has few whole numbers
    covered = functional.pad(torch.stack([advance, width], 1), (0, more)).float()
    there = torch.ones_like(state.x[:, :1]) if state.valid is None else state.valid[:, None].float()
    return {"tokens": covered, "bins": functional.avg_pool1d(there, bin_size or there.shape[-1])}


def bases_of(state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Base codes and lengths of one-hot sequences, padded at the right alone, and where each began.

    Raises:
        ModelError: something that is no first state, or a gradient by the bases is wanted.
    """
    x = state.x
    if x.requires_grad:
        what = "a language model has no gradient by the bases, which it reads as tokens"
        raise ModelError(what, remedy="Use mutagenesis (method: ism)")
    codes = torch.where(x.amax(1) == 1, x.argmax(1), N).to(torch.uint8)
    if state.valid is None:
        lengths = torch.full((len(x),), x.shape[-1], device=x.device)
        return codes, lengths, torch.zeros_like(lengths)
    first = state.valid.int().argmax(1)
    at = (torch.arange(x.shape[-1], device=x.device)[None] + first[:, None]) % x.shape[-1]
    return codes.masked_fill(~state.valid, PAD).gather(1, at), state.valid.sum(1), first


class ToBins(Stage):
    """Tokens to bins: each base has the mean of the tokens that cover it, each bin the mean of its bases. Global."""

    reads = _BESIDE

    def __init__(self, bin_size: int, norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.bin_size, self.norm = bin_size, norm

    def forward(self, state: State) -> State:
        x = state.x.transpose(1, 2)
        x = x if self.norm is None else self.norm(x)
        bins = state.skips["bins"].shape[-1]
        advance, width = state.skips["tokens"].long().unbind(1)
        start = advance.cumsum(1)
        none = start.new_zeros(len(start))
        size = self.bin_size or max(1, int((start + width).max()))
        tokens = Tokens(none, none, start, start + width, none, none, bins * size)  # ids and counts play no part
        skips = {name: skip for name, skip in state.skips.items() if name not in self.reads}
        return State(to_bins(x, tokens, size), skips, known_bins(tokens, size))
