"""How well a language model tells hidden tokens, beside what simple models of the training windows do.

The same tokens are hidden at every evaluation, whatever the run. Scores are ``bits_per_base`` (cross-entropy over the
bases that no visible token tells, comparable between kinds of tokens), ``cross_entropy`` (nats per token),
``perplexity`` (its exponential) and ``token_accuracy``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch.nn import functional

from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError
from seqgraft.evaluate import EvaluateConfig, Evaluation
from seqgraft.intervals import bootstrap_interval, paired_bootstrap, segment_blocks
from seqgraft.markov import Markov
from seqgraft.metrics import Score
from seqgraft.models.masked import Hidden, MaskedModel, token_counts
from seqgraft.models.tokens import Blocks, Overlapping, Tokens
from seqgraft.objectives import MaskedTokens
from seqgraft.predict import FORWARD_ONLY
from seqgraft.progress import progress
from seqgraft.sequence import Codes

__all__ = ["METRICS", "TokenSums", "evaluate_masked"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: The leading one first.
METRICS = ("bits_per_base", "cross_entropy", "perplexity", "token_accuracy")
ORDERS = range(7)  # of the Markov models
BEFORE = "before adaptation"  # the pretrained model as it came
LONGEST = 8  # bases of a token of which all 4**k are compared
UNIT = "hidden tokens"


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Of each region ``sums`` ``(4, regions)``: nats, hidden tokens, hidden bases, tokens that were told right."""

    rows: Ints
    sums: Floats

    kind: ClassVar[Literal["moments", "confusion", "values"]] = "values"

    def select(self, index: Ints) -> Self:
        return type(self)(self.rows[index], self.sums[:, index])

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        return cls(np.concatenate([p.rows for p in parts]), np.concatenate([p.sums for p in parts], axis=1))

    def compute(self, metric: str, weights: Floats | None = None) -> Floats:
        """``(1,)``, or ``(draws, 1)`` with weights ``(draws, regions)``."""
        nats, tokens, bases, right = (self.sums.sum(1) if weights is None else weights @ self.sums.T).T[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            values = {
                "bits_per_base": nats / bases / math.log(2),
                "cross_entropy": nats / tokens,
                "perplexity": np.exp(nats / tokens),
                "token_accuracy": right / tokens,
            }
        return np.asarray(values[metric])

    def scores(self, metric: str) -> list[Score]:
        return [Score(float(self.compute(metric)[0]), int(self.sums[1].sum()))]


def evaluate_masked(
    model: MaskedModel,
    dataset: Dataset,
    config: EvaluateConfig,
    label: str,
    objective: MaskedTokens,
    *,
    fold: str | None = None,
    pretrained: MaskedModel | None = None,
) -> Evaluation:
    """Scores a language model and its baselines on the hidden tokens of a fold.

    The baselines are ``pretrained`` (the model before it was adapted), the frequencies of the tokens, and Markov models
    of order 0 to 6 (``markov.Markov``), all of the training windows, on both strands; a Markov model is told all bases
    but those that are hidden in the token, also those of other hidden tokens. There are none of these where tokens may
    be longer than 8 bases, as byte pairs.

    Raises:
        ConfigError: the fold is empty, or settings that are for tracks.
    """
    fold = fold or config.fold
    if config.ensemble != FORWARD_ONLY or config.genes is not None or config.original is not None or config.baselines:
        remedy = "Leave ensemble, genes and original out; baselines may be [] for none"
        raise ConfigError("hidden tokens have no tracks that these settings are for", where="evaluate", remedy=remedy)
    rows = dataset.rows(fold)
    frequencies, chain = (None, None) if config.baselines == () else _fit(dataset, objective)
    models = {label: model} | ({} if pretrained is None else {BEFORE: pretrained})
    parts: dict[str, list[TokenSums]] = {}
    starts = range(0, len(rows), config.batch_size)
    for start in progress(starts, f"predict {fold}", total=len(starts)):
        chosen = rows[start : start + config.batch_size]
        for name, found in _batch(models, dataset, chosen, objective, frequencies, chain):
            parts.setdefault(name, []).append(found)
    regions = dataset.regions.iloc[rows]
    places = regions["chrom"].tolist(), regions["start"].to_numpy(), regions["end"].to_numpy()
    blocks = segment_blocks(*places, config.block)
    sums = {name: TokenSums.concat(found) for name, found in parts.items()}
    return Evaluation(
        metrics=_table(sums, fold, blocks, config.draws),
        differences=_differences(sums, label, blocks, config.draws),
        genes=None,
        moments={"rows": rows, "sums": sums[label].sums, "blocks": blocks, "tracks": np.array([], dtype=str)},
        examples={},
    )


def _fit(dataset: Dataset, objective: MaskedTokens) -> tuple[Floats, Markov | None]:
    """Logarithms of the tokens' frequencies ``(vocabulary,)``, and the chain of the highest order if it is feasible."""
    words, rows = objective.tokeniser.vocabulary, dataset.rows("train")
    counts = np.ones(len(words.ids))

    def sequences() -> Iterator[Codes]:
        for start in range(0, len(rows), 64):
            codes, lengths = dataset.sequences(rows[start : start + 64])
            np.add(counts, token_counts(objective.tokeniser, codes, lengths), out=counts)
            yield from (row[:length] for row, length in zip(codes, lengths, strict=True))

    feasible = isinstance(objective.tokeniser, Overlapping | Blocks) and objective.tokeniser.k <= LONGEST
    chain = Markov.fit(sequences(), max(ORDERS))
    return np.log(counts / counts.sum()), chain if feasible else None


def _batch(
    models: Mapping[str, MaskedModel],
    dataset: Dataset,
    rows: Ints,
    objective: MaskedTokens,
    frequencies: Floats | None,
    chain: Markov | None,
) -> Iterator[tuple[str, TokenSums]]:
    """The sums of some regions: of each model and each baseline, by name."""
    sample = objective.scored(dataset.sample(rows))
    hidden: Hidden = sample.hidden
    truth, row = hidden.truth.numpy(), hidden.row.numpy()
    tokens = objective.tokeniser.encode(sample.codes, sample.lengths)
    start, stop = _unknown(tokens, hidden)

    def sums(nats: Floats, right: npt.NDArray[np.bool_]) -> TokenSums:
        each = (nats, np.ones(len(nats)), (stop - start).astype(np.float64), right.astype(np.float64))
        return TokenSums(rows, np.stack([np.bincount(row, values, len(rows)) for values in each]))

    for name, model in models.items():
        with torch.inference_mode():
            logits = model(sample.to(next(model.parameters()).device)).float().cpu()
        nats = functional.cross_entropy(logits, hidden.truth, reduction="none").double().numpy()
        yield name, sums(nats, logits.argmax(1).numpy() == truth)
    if frequencies is None:
        return
    yield "token frequencies", sums(-frequencies[truth], truth == frequencies.argmax())
    if chain is None:
        return
    codes = sample.codes.numpy()
    for order in ORDERS:
        found, right = np.zeros(len(truth)), np.zeros(len(truth), dtype=bool)
        for width in np.unique(stop - start).tolist():
            of = np.flatnonzero(stop - start == width)
            logs = chain.below(order).hidden(codes, row[of], start[of], width)
            true = _number(codes, row[of], start[of], width)
            found[of], right[of] = -logs[np.arange(len(of)), true], logs.argmax(1) == true
        yield f"Markov model, order {order}", sums(found, right)


def _unknown(tokens: Tokens, hidden: Hidden) -> tuple[Ints, Ints]:
    """Of each hidden token the bases ``[start, stop)`` that no visible token covers; they are neighbours."""
    visible = (hidden.given < 0) & (tokens.stop > tokens.start)
    edges = torch.zeros(len(tokens.ids), tokens.length + 1, dtype=torch.int64)
    edges.scatter_add_(1, tokens.start, visible.long()).scatter_add_(1, tokens.stop, -visible.long())
    seen = torch.nn.functional.pad((edges.cumsum(1)[:, :-1] > 0).long().cumsum(1), (1, 0))
    first, last = tokens.start[hidden.row, hidden.column], tokens.stop[hidden.row, hidden.column]
    left = torch.zeros_like(first)
    for place in range(int((last - first).max()) if len(first) else 0):  # visible bases at the token's left end
        at = first + place
        left += (at < last) & (seen[hidden.row, at.clamp(max=tokens.length - 1) + 1] - seen[hidden.row, first] > place)
    total = seen[hidden.row, last] - seen[hidden.row, first]
    return (first + left).numpy(), (last - (total - left)).numpy()


def _number(codes: Codes, row: Ints, start: Ints, width: int) -> Ints:
    """The bases ``[start, start + width)`` of rows as numbers to base four."""
    bases = codes[row[:, None], start[:, None] + np.arange(width)].astype(np.int64)
    return np.asarray(bases @ 4 ** np.arange(width)[::-1])


def _table(sums: Mapping[str, TokenSums], fold: str, blocks: Ints, draws: int) -> pd.DataFrame:
    found = []
    for name, each in sums.items():
        for metric in METRICS:
            estimate = bootstrap_interval(each, metric, blocks, draws=draws)
            found.append(
                {
                    "model": name, "fold": fold, "group": "tokens", "track": "", "metric": metric,
                    "value": estimate.mean, "low": estimate.mean_low, "high": estimate.mean_high,
                    "n": int(each.sums[1].sum()), "unit": UNIT, "note": "",
                }
            )  # fmt: skip
    return pd.DataFrame(found)


def _differences(sums: Mapping[str, TokenSums], label: str, blocks: Ints, draws: int) -> pd.DataFrame:
    found = []
    for name, each in sums.items():
        if name != label:
            estimate = paired_bootstrap(sums[label], each, METRICS[0], blocks, draws=draws)
            value, low, high = estimate.mean, estimate.mean_low, estimate.mean_high
            found.append(
                {
                    "baseline": name, "group": "tokens", "track": "", "metric": METRICS[0],
                    "value": value, "low": low, "high": high, "unit": UNIT,
                }
            )  # fmt: skip
    return pd.DataFrame(found)
