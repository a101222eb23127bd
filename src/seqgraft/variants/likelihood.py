"""What a model of masked tokens says of alleles: no labels, no tracks, only which base it expects.

The score of a single-base substitution is ``log P(alt) - log P(ref)``, in nats, where the tokens that hold the base are
masked and everything else is the reference: the masked marginal of Meier et al. 2021 (ESM-1v), used on genomes by
Benegas et al. 2023 (GPN). Below 0 the alternative is less expected than the reference.

One token holds a base, alone or with others (characters, blocks of k-mers): P is its probability, of the tokens that
agree with its other bases. With overlapping k-mers k tokens hold it, which are masked together; the score is the mean
over them of ``log P_i(alt) - log P_i(ref)``, each of the tokens that agree with the other bases. What those have in
common cancels, so that differences of logits are all that is needed. Scores of the two strands are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqgraft.errors import ConfigError, ModelError
from seqgraft.genome import Interval, Variant
from seqgraft.models.masked import Hidden, MaskedModel, tokeniser_of
from seqgraft.models.tokens import Blocks, Overlapping
from seqgraft.predict import autocast
from seqgraft.progress import steps
from seqgraft.sample import Sample
from seqgraft.sequence import Codes, encode, reverse_complement
from seqgraft.variants.place import Layout
from seqgraft.variants.score import Scores, VariantConfig

__all__ = ["LikelihoodScorer"]


class LikelihoodScorer:
    """Scores single-base substitutions with a masked language model.

    Raises:
        ConfigError: settings that are for tracks.
        ModelError: tokens whose places depend on the allele.
    """

    labels = ("masked_likelihood",)
    columns = ("log_likelihood_ratio",)

    def __init__(self, model: MaskedModel, layout: Layout, config: VariantConfig) -> None:
        tokeniser = tokeniser_of(model.trunk)
        if not isinstance(tokeniser, Overlapping | Blocks):
            what = "an allele changes where the model's tokens begin: their likelihoods cannot be compared"
            raise ModelError(what, type(tokeniser).__name__, where="variants", remedy="Use a model of k-mers or bases")
        _check(config)
        self.model, self.layout, self.tokeniser, self.config = model, layout, tokeniser, config
        self.in_words = f"windows of {layout.window} bp on both strands, with the tokens of the base masked"

    def __call__(self, variants: Sequence[Variant]) -> Scores:
        """Scores of checked substitutions, in their order."""
        values = np.empty(len(variants))
        padded = 0
        for first in steps(range(0, len(variants), self.config.batch_size)):
            some = variants[first : first + self.config.batch_size]
            starts = [self.layout.centred(variant) for variant in some]
            ends = [self.layout.genome.chroms[variant.chrom] for variant in some]
            places = zip(some, starts, strict=True)
            windows = [Interval(v.chrom, start, start + self.layout.window) for v, start in places]
            ref = np.stack([self.layout.genome.codes(window) for window in windows])
            at = np.array([v.position - 1 - start for v, start in zip(some, starts, strict=True)])
            alt = ref.copy()
            alt[np.arange(len(some)), at] = [encode(variant.alt)[0] for variant in some]
            both = self._ratios(ref, alt, at), self._ratios(*_turned(ref, alt, at))
            values[first : first + len(some)] = (both[0] + both[1]) / 2
            over = (s < 0 or s + self.layout.window > end for s, end in zip(starts, ends, strict=True))
            padded += sum(over)
        return Scores(np.arange(len(variants)), [()] * len(variants), values[:, None, None].astype(np.float32), padded)

    def _ratios(self, ref: Codes, alt: Codes, at: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """``log P(alt) - log P(ref)`` of ``(variants, window)`` sequences that differ at ``at``; NaN: no token."""
        device = next(self.model.parameters()).device
        lengths = torch.full((len(ref),), ref.shape[1])
        codes = torch.from_numpy(np.ascontiguousarray(ref))
        tokens = self.tokeniser.encode(codes, lengths)
        other = self.tokeniser.encode(torch.from_numpy(np.ascontiguousarray(alt)), lengths).ids
        place = torch.from_numpy(at)[:, None]
        words = self.tokeniser.vocabulary
        holds = (tokens.start <= place) & (place < tokens.stop) & (tokens.ids != words.unknown)
        row, column = holds.nonzero(as_tuple=True)
        given = torch.where(holds, words.ids["[MASK]"], -1)
        hidden = Hidden(given, row, column, tokens.ids[row, column])
        none = torch.zeros((len(ref), 0, 0))
        sample = Sample(codes, lengths, torch.zeros_like(lengths), none, none.bool(), hidden=hidden).to(device)
        with torch.inference_mode(), autocast(self.config.precision, device):
            logits = self.model(sample).double().cpu()
        ratio = _at(logits, other[row, column]) - _at(logits, hidden.truth)
        total = torch.zeros(len(ref), dtype=torch.float64).index_add(0, row, ratio)
        return np.asarray((total / holds.sum(1)).numpy())


def _at(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(1, ids[:, None])[:, 0]


def _turned(ref: Codes, alt: Codes, at: npt.NDArray[np.int64]) -> tuple[Codes, Codes, npt.NDArray[np.int64]]:
    return reverse_complement(ref), reverse_complement(alt), ref.shape[1] - 1 - at


def _check(config: VariantConfig) -> None:
    usual = VariantConfig()
    settings = {field.name for field in fields(config)} - {"batch_size", "rename", "allow_skipped", "precision"}
    if other := sorted(name for name in settings if getattr(config, name) != getattr(usual, name)):
        what = "a model of masked tokens has no tracks, which these settings are for"
        remedy = "Leave them out: variants are scored by masked_likelihood"
        raise ConfigError(what, other, where="variants", remedy=remedy)
