"""DNA language models: trunks of transformers' BERT (DNABERT, SpeciesLM) and ESM (Nucleotide Transformer v1) families.

The layers are written out here, so that padding, adapters and freezing work as in every other trunk; their numbers are
those of transformers' own models, whose checkpoints ``hub_language.py`` reads.

::

    bases (b, 4, L) -> embeddings -> layer_0 ... layer_(depth-1) -> final: bins (b, channels, L / bin_size) -> crop
                           |________ tokens, bins (skips) _____________|

Between embeddings and final, positions are tokens. Vocabularies are brought into one order when weights are read, so
that the settings of a trunk say everything about its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqgraft.errors import ModelError, Problems
from seqgraft.models.base import Span, Stage, State, Trunk, TrunkSpec
from seqgraft.models.stages import Crop
from seqgraft.models.tokens import Blocks, Overlapping, Tokens, Vocabulary, to_bins
from seqgraft.sequence import PAD, N

__all__ = ["FAMILIES", "Language", "pieces"]

FAMILIES = ("bert", "esm")
_KINDS: Mapping[str, type[Overlapping] | type[Blocks]] = {"overlapping": Overlapping, "blocks": Blocks}
_BESIDE = {"tokens": 0, "bins": 0}  # what the last stage reads of the first


class Language(Trunk):
    """A transformer encoder on tokens of bases, with learned absolute positions.

    Args:
        family: "bert", which normalises after each sublayer, or "esm", which does before.
        tokens: "overlapping" k-mers, one base apart, or "blocks" of them side by side.
        k: bases of a token.
        before, after: how many special tokens stand at the two ends of a sequence.
        channels, depth, heads, hidden: width, layers, attention heads, width inside the feed-forward part.
        positions: how many tokens it takes, special ones included.
        embedding_norm: normalise the sum of token and position vectors.
        embedding_scale: of the token vectors.
        dropout, attention_dropout: rates while training.
        eps: of the layer norms.
        bin_size: bp per bin of the output: any.
        crop: bins dropped at each end of the output.

    Raises:
        ModelError: an unknown family or kind of tokens, or sizes that do not divide.
    """

    any_bin_size = True

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
        }
        _check(self.settings, bin_size)
        self.stride = bin_size
        tokeniser = _KINDS[tokens](_vocabulary(tokens, k, before, after, positions), k)
        bert = family == "bert"
        embeddings = _Embeddings(tokeniser, channels, positions, bin_size, embedding_scale)
        embeddings.segment = nn.Embedding(1, channels) if bert else None
        embeddings.norm = nn.LayerNorm(channels, eps=eps) if embedding_norm else None
        embeddings.dropout = nn.Dropout(dropout if bert else 0.0)
        embeddings.reset_parameters()
        stages: dict[str, Stage] = {"embeddings": embeddings}
        for i in range(depth):
            stages[f"layer_{i}"] = _Layer(channels, heads, hidden, not bert, (dropout, attention_dropout), eps)
        stages["final"] = _Final(bin_size, None if bert else nn.LayerNorm(channels, eps=eps))
        stages["crop"] = Crop(crop)
        self.stages = nn.ModuleDict(stages)
        self.spec = TrunkSpec(name="language", channels=channels, bin_size=bin_size, sites=self._sites())

    def _sites(self) -> dict[str, tuple[str, ...]]:
        ends = {
            "attention": (".query", ".key", ".value", ".output"),
            "feedforward": (".up", ".down"),
            "norm": (".norm", ".attention_norm", ".feedforward_norm"),
        }
        ends |= {f"{site}{end}": (end,) for site in ("attention", "feedforward") for end in ends[site]}
        return {
            site: tuple(name for name, _ in self.named_modules() if name.endswith(end)) for site, end in ends.items()
        }


def _check(settings: Mapping[str, Any], bin_size: int) -> None:
    problems = Problems(ModelError)
    for name, known in (("family", FAMILIES), ("tokens", tuple(_KINDS))):
        if settings[name] not in known:
            problems.add(f"there is no such {name}", settings[name], where="language", remedy=f"Choose one of {known}")
    for name in ("k", "channels", "depth", "heads", "hidden", "positions"):
        if settings[name] < 1:
            problems.add(f"{name} must be 1 or more", settings[name], where="language")
    if bin_size < 1:
        problems.add("bins must be 1 bp or more", bin_size, where="language")
    if settings["heads"] > 0 and settings["channels"] % settings["heads"]:
        what = f"the channels must be a multiple of the heads, {settings['heads']}"
        problems.add(what, settings["channels"], where="language")
    problems.raise_if_any()


def _vocabulary(tokens: str, k: int, before: int, after: int, limit: int) -> Vocabulary:
    """The one order: unknown, padding, special tokens of the two ends, k-mers, and of blocks the single bases and N."""
    special = ["[UNK]", "[PAD]", *(f"[BEFORE {i}]" for i in range(before)), *(f"[AFTER {i}]" for i in range(after))]
    names = [*special, *pieces(tokens, k)]
    first, last = tuple(range(2, 2 + before)), tuple(range(2 + before, len(special)))
    return Vocabulary({name: i for i, name in enumerate(names)}, 0, 1, first, last, limit=limit)


def pieces(tokens: str, k: int) -> list[str]:
    """Tokens of bases. Blocks are of one base too, wherever k of them do not fit."""
    kmers = ["".join(letters) for letters in product("ACGT", repeat=k)]
    return kmers if tokens == "overlapping" else [*kmers, *(base for base in "ACGTN" if base not in kmers)]


class _Embeddings(Stage):
    """Bases to tokens, and tokens to vectors. Which bases each token stands for goes on to the last stage.

    Gradients do not reach the bases: which token stands somewhere is no smooth function of them.
    """

    writes = _BESIDE
    segment: nn.Embedding | None  # what BERT adds to all tokens of one segment
    norm: nn.LayerNorm | None
    dropout: nn.Dropout

    def __init__(
        self, tokeniser: Overlapping | Blocks, channels: int, positions: int, bin_size: int, scale: float
    ) -> None:
        super().__init__()
        self.tokeniser, self.bin_size, self.scale = tokeniser, bin_size, scale
        self.tokens = nn.Embedding(len(tokeniser.vocabulary.ids), channels)
        self.positions = nn.Embedding(positions, channels)

    def reset_parameters(self) -> None:
        """Normal with a standard deviation of 0.02, as BERT begins (Devlin et al. 2019)."""
        for table in (self.tokens, self.positions, self.segment):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, state: State) -> State:
        codes, lengths, first = _bases(state)
        found = self.tokeniser.encode(codes, lengths)
        more = max(0, self._usual(codes.shape[1]) - found.ids.shape[1])  # so that the shape says how many there are
        ids = functional.pad(found.ids, (0, more), value=self.tokeniser.vocabulary.padding)
        place = torch.arange(ids.shape[1], device=ids.device).clamp(max=self.positions.num_embeddings - 1)
        x = self.tokens(ids)
        if self.scale != 1:
            x = x * self.scale
        if self.segment is not None:
            x = x + self.segment.weight
        x = x + self.positions(place)
        x = self.dropout(x if self.norm is None else self.norm(x))
        width = found.stop - found.start
        start = torch.where(width > 0, found.start + first[:, None], 0).cummax(1).values
        advance = start.diff(dim=1, prepend=torch.zeros_like(start[:, :1]))  # half precision has few whole numbers
        covered = functional.pad(torch.stack([advance, width], 1), (0, more))
        skips = {"tokens": covered.float(), "bins": self._bins(state)}
        return State(x.transpose(1, 2), {**state.skips, **skips}, functional.pad(found.mask, (0, more)))

    def _usual(self, length: int) -> int:
        """How many tokens a sequence without N has at most."""
        words, k = self.tokeniser.vocabulary, self.tokeniser.k
        kmers = length - k + 1 if isinstance(self.tokeniser, Overlapping) else length // k + min(length, k - 1)
        return min(len(words.before) + len(words.after) + max(0, kmers), self.positions.num_embeddings)

    def _bins(self, state: State) -> Tensor:
        """``(batch, 1, bins)``: how many bases of each bin are there, as a fraction."""
        there = torch.ones_like(state.x[:, :1]) if state.valid is None else state.valid[:, None].float()
        return functional.avg_pool1d(there, self.bin_size)


def _bases(state: State) -> tuple[Tensor, Tensor, Tensor]:
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


class _Layer(Stage):
    """A layer of the transformer: each sublayer is normalised before it or, with its input added, after it. Global."""

    def __init__(
        self, channels: int, heads: int, hidden: int, norm_first: bool, rates: tuple[float, float], eps: float
    ) -> None:
        super().__init__()
        self.heads, self.norm_first = heads, norm_first
        self.attention_norm = nn.LayerNorm(channels, eps=eps)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.feedforward_norm = nn.LayerNorm(channels, eps=eps)
        self.up = nn.Linear(channels, hidden)
        self.down = nn.Linear(hidden, channels)
        self.dropout, self.attention_dropout = (nn.Dropout(rate) for rate in rates)

    def forward(self, state: State) -> State:
        return self.at(state, (0, state.x.shape[-1]))

    def at(self, state: State, span: Span) -> State:
        """The queries ``span`` on all keys."""
        within, x = slice(*span), state.x.transpose(1, 2)
        if self.norm_first:
            x = x[:, within] + self._attend(self.attention_norm(x), state.valid, within)
            x = x + self._feed(self.feedforward_norm(x))
        else:
            x = self.attention_norm(x[:, within] + self._attend(x, state.valid, within))
            x = self.feedforward_norm(x + self._feed(x))
        return State(x.transpose(1, 2), state.skips, None if state.valid is None else state.valid[:, within])

    def _attend(self, x: Tensor, valid: Tensor | None, within: slice) -> Tensor:
        """softmax(q k / sqrt(width)) v of the queries ``within``; ``x`` is ``(batch, n, channels)``."""
        batch, _, channels = x.shape
        query, key, value = (
            layer(y).view(batch, -1, self.heads, channels // self.heads).transpose(1, 2)
            for layer, y in ((self.query, x[:, within]), (self.key, x), (self.value, x))
        )
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if valid is None else valid[:, None, None, :],
            dropout_p=self.attention_dropout.p if self.attention_dropout.training else 0.0,
        )
        attended: Tensor = self.dropout(self.output(mixed.transpose(1, 2).reshape(batch, -1, channels)))
        return attended

    def _feed(self, x: Tensor) -> Tensor:
        fed: Tensor = self.dropout(self.down(functional.gelu(self.up(x))))
        return fed


class _Final(Stage):
    """Tokens to bins: each base has the mean of the tokens that cover it, each bin the mean of its bases. Global."""

    reads = _BESIDE

    def __init__(self, bin_size: int, norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.bin_size, self.norm = bin_size, norm

    def forward(self, state: State) -> State:
        x = state.x.transpose(1, 2)
        x = x if self.norm is None else self.norm(x)
        there = state.skips["bins"]
        advance, width = state.skips["tokens"].long().unbind(1)
        start = advance.cumsum(1)
        none = start.new_zeros(len(start))
        length = there.shape[-1] * self.bin_size
        tokens = Tokens(none, none, start, start + width, none, none, length)  # ids and counts play no part
        skips = {name: skip for name, skip in state.skips.items() if name not in self.reads}
        return State(to_bins(x, tokens, self.bin_size), skips, there[:, 0] > 0)
