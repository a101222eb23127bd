"""One batch, as data yields it and models take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Sample"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A batch of examples.

    Attributes:
        codes: base codes, uint8 ``(batch, length)``, padded at the right with PAD.
        lengths: true lengths, int64 ``(batch,)``.
        row: which region each example is, int64 ``(batch,)``.
        targets: squashed targets, float32 ``(batch, tracks, bins)``; zero where the mask is False.
        mask: bool, same shape as ``targets``: True where a target is known.
        covariates: named values that a head may use, float32 ``(batch, values)``.
        halfway: what the frozen stages make of the codes (``models.base.Halfway``), or None; a model starts from there.
            Whoever changes the codes of a sample drops it.
        shown: what each of ``codes`` is, int64 ``(sequences, 3)``: which stored sequence (a region, or a distinct
            haplotype), whether reversed, and its shift; None where nobody keeps what is computed of it.
        haplotypes: of donors, int64 ``(batch, ploidy)``: which of ``codes`` each example's haplotypes are, -1 for none.
            ``codes`` and ``lengths`` then have a row per distinct haplotype, not per example.
        hidden: which tokens are hidden and to be predicted (``models.masked.Hidden``), or None.
        beside: regions of other data that train along (``joint.Joint``), or None.
        of_beside: whether it is one of these, which the heads beside read.
    """

    codes: Tensor
    lengths: Tensor
    row: Tensor
    targets: Tensor
    mask: Tensor
    covariates: Mapping[str, Tensor] = field(default_factory=dict)
    halfway: Any = None
    shown: Tensor | None = None
    haplotypes: Tensor | None = None
    hidden: Any = None
    beside: Sample | None = None
    of_beside: bool = False

    def __len__(self) -> int:
        return int(self.row.shape[0])

    def to(self, device: torch.device | str) -> Sample:
        return replace(
            self,
            codes=self.codes.to(device),
            lengths=self.lengths.to(device),
            row=self.row.to(device),
            targets=self.targets.to(device),
            mask=self.mask.to(device),
            covariates={name: values.to(device) for name, values in self.covariates.items()},
            halfway=None if self.halfway is None else self.halfway.to(device),
            haplotypes=None if self.haplotypes is None else self.haplotypes.to(device),
            hidden=None if self.hidden is None else self.hidden.to(device),
            beside=None if self.beside is None else self.beside.to(device),
        )

    def without_targets(self) -> Sample:
        """The same examples, none of which counts."""
        hidden = None if self.hidden is None else self.hidden.none()
        beside = None if self.beside is None else self.beside.without_targets()
        return replace(self, mask=self.mask.new_zeros(self.mask.shape), hidden=hidden, beside=beside)
