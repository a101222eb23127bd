"""Masked tokens of language models: the head that predicts them, which tokens are hidden, and a model that does so.

::

    embeddings (some tokens hidden) -> layer_0 ... layer_(depth-1) -> norm of the last stage -> MaskedHead: logits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from seqgraft.errors import ModelError
from seqgraft.models.base import SequenceModel, Trunk
from seqgraft.models.tokens import Overlapping, Tokeniser, Tokens
from seqgraft.models.vocabulary import Vocabulary
from seqgraft.sample import Sample
from seqgraft.sequence import Codes, reverse_complement
from seqgraft.tracks import TrackTable

__all__ = [
    "HIDDEN",
    "Hidden",
    "MaskedHead",
    "MaskedModel",
    "mask_tokens",
    "span_of",
    "token_counts",
    "tokeniser_of",
    "with_hidden",
]

HIDDEN = "hidden"  # the skip that tells the embeddings what stands in the place of hidden tokens
MASK = "[MASK]"
_STREAM = 1  # of the random numbers; views and the order of rows are drawn from stream 0
_MASKED, _RANDOM = 0.8, 0.9  # below the first the mask token stands there, below the second a random one


class MaskedHead(nn.Module):
    """Logits over the vocabulary for each token: dense, gelu, norm, decoder with a bias.

    It is the head of both BERT (``cls.predictions``, Devlin et al. 2019) and ESM (``lm_head``, Rives et al. 2021). The
    decoder has weights of its own; where a checkpoint shares them with its table of tokens, they are a copy.

    Args:
        channels: of the trunk.
        vocabulary: how many tokens the trunk has.
        eps: of the norm.
    """

    def __init__(self, channels: int, vocabulary: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels, eps=eps)
        self.decoder = nn.Linear(channels, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., channels)``, after the last layer and its norm, to ``(..., vocabulary)``."""
        logits: Tensor = self.decoder(self.norm(functional.gelu(self.dense(x))))
        return logits

    @torch.no_grad()
    def start_at(self, counts: Tensor) -> None:
        """Sets the bias so that the untrained head predicts tokens about as often as they were counted, plus one."""
        self.decoder.bias.copy_(torch.log((counts + 1) / (counts.sum() + len(counts))))


@dataclass(frozen=True)
class Hidden:
    """Which tokens of a batch are hidden; it stands in ``Sample.hidden``.

    Attributes:
        given: int64 ``(batch, tokens)``, the token that stands there instead, -1 where nothing is changed.
        row, column: int64 ``(hidden,)``, the places of the tokens to predict.
        truth: int64 ``(hidden,)``, what they are.
    """

    given: Tensor
    row: Tensor
    column: Tensor
    truth: Tensor

    def __len__(self) -> int:
        return len(self.truth)

    def to(self, device: torch.device | str) -> Hidden:
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def none(self) -> Hidden:
        """The same batch with nothing to predict."""
        return replace(self, row=self.row[:0], column=self.column[:0], truth=self.truth[:0])


def mask_tokens(
    tokens: Tokens,
    words: Vocabulary,
    *,
    span: int,
    share: float,
    seed: int,
    step: int,
    rows: Sequence[int],
    plain: bool = False,
) -> Hidden:
    """Hides some of the tokens that stand for known bases: a function of (seed, step, row) and the tokens alone.

    As BERT was trained (Devlin et al. 2019, 3.1): of the chosen tokens 80 % are replaced by the mask token, 10 % by a
    random one and 10 % are left as they are, and all of them are to be predicted. Overlapping k-mers are chosen in
    spans of k that begin at random (DNABERT, Ji et al. 2021), so that the neighbours of a span do not tell the base
    that all of its tokens have; what becomes of a span is drawn for all of its tokens at once, for the same reason.

    Args:
        span: tokens that are hidden together.
        share: of the tokens that stand for known bases; at least one span of a sequence that has one.
        step: the epoch, or another number of the draw.
        rows: a number for each sequence.
        plain: the mask token stands for all of them, as scores need it: a token that is left as it is tells itself.
    """
    ids, width = tokens.ids.cpu().numpy(), (tokens.stop - tokens.start).cpu().numpy()
    unknown = [words.unknown, *(i for name, i in words.ids.items() if name == "N")]
    known = (width > 0) & ~np.isin(ids, unknown)
    usual = np.array([i for name, i in words.ids.items() if set(name) <= set("ACGT")])
    given = np.full(ids.shape, -1, dtype=np.int64)
    for number, row in enumerate(rows):
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, _STREAM, step, int(row)]))
        chosen, fate = _spans(known[number], span, share, generator)
        random = usual[generator.integers(len(usual), size=len(chosen))]
        mask = np.full(len(chosen), words.ids[MASK])
        choices = [(fate < _MASKED) | plain, fate < _RANDOM]
        given[number, chosen] = np.select(choices, [mask, random], ids[number, chosen])
    where = torch.from_numpy(given).to(tokens.ids.device)
    places, columns = (where >= 0).nonzero(as_tuple=True)
    return Hidden(where, places, columns, tokens.ids[places, columns])


def _spans(
    known: npt.NDArray[np.bool_], span: int, share: float, generator: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens of randomly chosen spans, in order, and a number of [0, 1) for each, the same within a span."""
    whole = np.convolve(known, np.ones(span, dtype=np.int64), "valid") == span if len(known) >= span else known[:0]
    starts = np.flatnonzero(whole)
    count = min(len(starts), max(1, round(share * int(known.sum()) / span)))
    begin = generator.permutation(starts)[:count]
    tokens = (begin[:, None] + np.arange(span)).ravel()
    fate = np.repeat(generator.random(len(begin)), span)
    chosen, first = np.unique(tokens, return_index=True)
    return chosen, fate[first]


def token_counts(tokeniser: Tokeniser, codes: Codes, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each token of the vocabulary stands for bases of some sequences, on both strands."""
    counts = np.zeros(len(tokeniser.vocabulary.ids), dtype=np.int64)
    for strand in (codes, reverse_complement(codes, lengths)):
        found = tokeniser.encode(torch.from_numpy(np.ascontiguousarray(strand)), torch.from_numpy(lengths))
        counts += np.bincount(found.ids[found.stop > found.start].numpy(), minlength=len(counts))
    return counts


def with_hidden(ids: Tensor, hidden: Tensor | None) -> Tensor:
    """Token ids ``(batch, tokens)`` with what stands in the place of some of them, ``(batch, 1, tokens or fewer)``."""
    if hidden is None:
        return ids
    given = functional.pad(hidden[:, 0], (0, ids.shape[1] - hidden.shape[-1]), value=-1)
    return torch.where(given >= 0, given, ids)


def tokeniser_of(trunk: Trunk) -> Tokeniser:
    """The tokens of a trunk that can predict masked ones.

    Raises:
        ModelError: it has no such head.
    """
    if getattr(trunk, "lm", None) is None:
        remedy = "Use a language model whose checkpoint has one, or one with random weights and lm_head: true"
        raise ModelError("the model has no head for masked tokens", trunk.spec.name, where="model", remedy=remedy)
    tokeniser: Tokeniser = trunk.stages["embeddings"].tokeniser  # type: ignore[assignment]
    return tokeniser


def span_of(tokeniser: Tokeniser) -> int:
    """How many tokens are hidden together: as many as cover a base."""
    return tokeniser.k if isinstance(tokeniser, Overlapping) else 1


class MaskedModel(SequenceModel):
    """A language trunk and its own head for masked tokens; there are no tracks."""

    def __init__(self, trunk: Trunk) -> None:
        tokeniser_of(trunk)
        super().__init__(trunk, {}, TrackTable.none())

    def forward(self, sample: Sample) -> Tensor:
        """Logits of the tokens of ``sample.hidden``, ``(hidden, vocabulary)``."""
        hidden: Hidden = sample.hidden
        state = self.trunk.encode(sample.codes, sample.lengths)
        state = replace(state, skips={**state.skips, HIDDEN: hidden.given[:, None]})
        x = self.trunk.run(state, stop="final").x.transpose(1, 2)[hidden.row, hidden.column]
        norm: Any = self.trunk.stages["final"].norm
        head: Any = self.trunk.lm
        logits: Tensor = head(x if norm is None else norm(x))
        return logits
