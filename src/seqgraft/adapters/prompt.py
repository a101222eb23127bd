"""Prompts: trained vectors that stand before the tokens of every sequence, in trunks that read tokens.

Lester et al. 2021, "The power of scale for parameter-efficient prompt tuning". The vectors join after the embeddings
and leave before the last stage, so that they are no part of any bin; in between, every token sees them. They change the
output from the start, so that the guard of the identity cannot hold here (``starts_as_identity``), and they are no
weight that could be merged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqgraft.adapters.base import Adapter
from seqgraft.errors import ConfigError, ModelError
from seqgraft.models.base import SequenceModel, Stage, State, Trunk, one_hot

__all__ = ["Prompt"]

_BASES = 64  # of the random sequences whose tokens' vectors a prompt starts from


@dataclass(frozen=True)
class Prompt(Adapter):
    """Trained vectors before the tokens.

    Args:
        tokens: how many. Where later stages number the positions, a sequence has room for as many fewer.
    """

    kind: ClassVar[str] = "prompt"
    mergeable: ClassVar[bool] = False
    starts_as_identity: ClassVar[bool] = False
    tokens: int = 20

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError("a prompt has at least one token", self.tokens, where="adapter prompt")

    @property
    def label(self) -> str:
        return f"prompt of {self.tokens}"

    @property
    def method(self) -> str:
        return "prompt"

    @property
    def size(self) -> int:
        return self.tokens

    def modules(self, trunk: Trunk) -> tuple[str, ...]:
        _token_stages(trunk, self.label)
        return ()

    def apply(self, model: SequenceModel) -> None:
        trunk = model.trunk
        first, last = _token_stages(trunk, self.label)
        embeddings: Any = trunk.stages[first]
        vectors = _start(trunk, embeddings, self.tokens)
        words = embeddings.tokeniser.vocabulary
        if getattr(embeddings, "positions_later", False) and words.limit is not None:
            shorter = replace(words, limit=words.limit - self.tokens)
            embeddings.tokeniser = replace(embeddings.tokeniser, vocabulary=shorter)
            trunk.longest = embeddings.tokeniser.longest
        inner: Any = trunk.stages[last]
        trunk.stages[first] = Prompted(embeddings, vectors)
        trunk.stages[last] = Unprompted(inner, self.tokens)


class Prompted(Stage):
    """Puts the prompt ``(tokens, channels)`` before the tokens that the embeddings make."""

    def __init__(self, base_layer: Stage, vectors: Tensor) -> None:
        super().__init__()
        self.base_layer, self.prompt = base_layer, nn.Parameter(vectors)
        self.writes, self.reads = base_layer.writes, base_layer.reads

    @property
    def tokeniser(self) -> Any:
        return self.base_layer.tokeniser

    def forward(self, state: State) -> State:
        state = self.base_layer(state)
        prompt = self.prompt.T.to(state.x.dtype).expand(len(state.x), -1, -1)
        valid = state.valid
        if valid is not None:
            valid = torch.cat([valid.new_ones(len(valid), prompt.shape[-1]), valid], 1)
        return State(torch.cat([prompt, state.x], -1), state.skips, valid)


class Unprompted(Stage):
    """Drops the prompt after the last stage that sees tokens."""

    def __init__(self, base_layer: Stage, tokens: int) -> None:
        super().__init__()
        self.base_layer, self.tokens = base_layer, tokens

    def forward(self, state: State) -> State:
        state = self.base_layer(state)
        valid = None if state.valid is None else state.valid[:, self.tokens :]
        return State(state.x[..., self.tokens :], state.skips, valid)


def _token_stages(trunk: Trunk, label: str) -> tuple[str, str]:
    """Names of the stage that makes vectors of tokens, and of the last one before tokens become bins.

    Raises:
        ModelError: the trunk reads no tokens.
    """
    names = list(trunk.stages)
    writes, reads = ([n for n in names if "tokens" in getattr(trunk.stages[n], what)] for what in ("writes", "reads"))
    if not writes or not reads or names.index(reads[0]) - names.index(writes[0]) < 2:
        remedy = "Use it on a language model, or choose another adapter"
        raise ModelError("the trunk reads no tokens that a prompt could stand before", trunk.spec.name, where=label,
                         remedy=remedy)  # fmt: skip
    return writes[0], names[names.index(reads[0]) - 1]


@torch.no_grad()
def _start(trunk: Trunk, embeddings: Stage, tokens: int) -> Tensor:
    """``(tokens, channels)``: vectors of tokens of random bases, from which prompts train best (Lester et al. 2021)."""
    like = next(embeddings.parameters())
    if like.is_meta:  # shapes alone are asked for
        return like.new_empty(tokens, trunk.spec.channels)
    length = -(-_BASES // trunk.stride) * trunk.stride
    codes = torch.randint(0, 4, (tokens, length), dtype=torch.uint8).to(like.device)
    state = embeddings(State(one_hot(codes)))
    stands = state.skips["tokens"][:, 1] > 0  # for bases, and is no special token
    chosen = (torch.rand(stands.shape, device=like.device) * stands).argmax(1)
    vectors: Tensor = state.x[torch.arange(tokens, device=like.device), :, chosen]
    return vectors.clone()
