"""Where variants are read: windows, alternate sequences, and bins of an alternate beside those of the reference.

**Windows.** A *centred* window has the variant's first base at index ``length // 2 - 1``, as Baskerville places it. A
window *on the grid* is one of those whose target interval starts at a multiple of an eighth of the target's length
(rounded down to whole bins): the one whose target is centred nearest to the variant. So neighbours share a window and
its reference pass, and a variant's score depends on nothing else in the file. Bases beyond a contig's ends are N.

**Indels.** The alternate keeps the left side of its window; bases leave or come in at the right end. With
``k = round((len(alt) - len(ref)) / bin_size)``, ``v`` the bin of the first base that differs, and bins of the reference
on the left of each line:

* ``i < v``: the alternate's bin ``i``;
* ``i = v``: its bins ``v .. v + k`` summed for an insertion, its bin ``v`` otherwise;
* ``v < i <= v - k`` of a deletion: 0, the bases are gone;
* further right: its bin ``i + k``; the reference's own where that lies beyond the window, so that it tells no change.

Bins to the right are up to half a bin out of step with the reference's, which moves signal between neighbours. With
``stitch`` a second alternate, which keeps the right side, gives all bins right of ``v``, in step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqgraft.genome import Genome, Variant
from seqgraft.sequence import Codes, apply_variants, encode
from seqgraft.tracks import TrackTable

__all__ = ["Alignment", "Layout", "Site", "Span", "align", "alternate", "shifted_bins"]

Span = tuple[int, int]  # bins [start, stop) of a window's target


@dataclass(frozen=True)
class Layout:
    """What the model sees and predicts, and where.

    Attributes:
        window: bp of sequence.
        bins: bins of ``bin_size`` bp that it predicts, in the middle of the window; 1 for labels.
        tracks: of the model's outputs.
        genome: which the variants are on.
    """

    window: int
    bins: int
    bin_size: int
    tracks: TrackTable
    genome: Genome

    @property
    def target(self) -> int:
        """bp that the bins cover."""
        return self.bins * self.bin_size

    @property
    def margin(self) -> int:
        """bp of the window left of the first bin (as ``Interval.resize`` centres it)."""
        return -((self.target - self.window) // 2)

    @property
    def step(self) -> int:
        """bp from one window of the grid to the next."""
        return max(1, self.bins // 8) * self.bin_size

    def centred(self, variant: Variant) -> int:
        """First position (0-based, perhaps negative) of the window around a variant."""
        return variant.position - 1 - (self.window // 2 - 1)

    def on_grid(self, variant: Variant) -> int:
        """First position (0-based, perhaps negative) of the window of the grid nearest to a variant."""
        number = (variant.position - 1 - self.target // 2 + self.step // 2) // self.step
        return number * self.step - self.margin


@dataclass(frozen=True, slots=True)
class Site:
    """One reading of a variant.

    Attributes:
        start: first position of the window on the contig, 0-based; it may lie before the contig or end beyond it.
        bins: which bins of the window's target are read.
        weights: float64 ``(stop - start,)``: how much of each counts, 0 to 1.
        names: what it is read over, one for each of the ``columns`` of the kind: a gene, a region.
        tracks: bool ``(tracks,)``, which are read; None for all.
    """

    start: int
    bins: Span
    weights: npt.NDArray[np.float64]
    names: tuple[str, ...] = ()
    tracks: npt.NDArray[np.bool_] | None = None


def alternate(codes: Codes, offset: int, variant: Variant, window: int, reserve: int, *, right: bool = False) -> Codes:
    """The alternate ``(window,)`` of a window that stands in ``codes`` with ``reserve`` more bases at either side.

    Args:
        offset: of the variant's first base in the window; one that starts outside it changes nothing.
        reserve: at least as many bases as ``ref`` has.
        right: keep the right side of the window instead of the left.
    """
    if not 0 <= offset < window:
        return codes[reserve : reserve + window]
    ref, alt = encode(variant.ref), encode(variant.alt)
    edited = apply_variants(codes, [(reserve + offset, ref, alt)])
    start = len(edited) - reserve - window if right else reserve
    return edited[start : start + window]


def shifted_bins(variant: Variant, bin_size: int) -> int:
    """``k``: by how many bins an insertion moves what is right of it; negative for a deletion."""
    return round((len(variant.alt) - len(variant.ref)) / bin_size)


@dataclass(frozen=True, slots=True)
class Alignment:
    """How the alternate's bins stand beside the reference's; ``at`` and ``shift`` are ``v`` and ``k`` of the rule."""

    at: int
    shift: int

    @classmethod
    def of(cls, variant: Variant, start: int, layout: Layout) -> Alignment:
        """Of a variant in the window that starts at ``start``."""
        same = 0
        while same < min(len(variant.ref), len(variant.alt)) and variant.ref[same] == variant.alt[same]:
            same += 1
        first = variant.position - 1 + same
        return cls((first - start - layout.margin) // layout.bin_size, shifted_bins(variant, layout.bin_size))

    def needed(self, bins: Span, total: int) -> Span:
        """Bins of the alternate that stand beside ``bins`` of the reference."""
        return max(0, bins[0] + min(self.shift, 0)), min(total, bins[1] + max(self.shift, 0))


def align(
    alignment: Alignment,
    bins: Span,
    reference: Tensor,
    left: Tensor,
    first: int,
    right: Tensor | None = None,
    right_first: int = 0,
) -> Tensor:
    """The alternate's values beside those of the reference.

    Args:
        bins: which bins of the reference, ``[start, stop)``.
        reference: raw values ``(tracks, stop - start)`` there.
        left: raw values ``(tracks, any)`` of the alternate that keeps its left side, from bin ``first`` on.
        right: of the one that keeps its right side, from bin ``right_first`` on; for ``stitch``.

    Returns:
        ``(tracks, stop - start)``.
    """
    v, k = alignment.at, alignment.shift
    i = torch.arange(*bins, device=left.device)
    after = i > v
    source = torch.where(after, i + k, i) - first
    inside = (source >= 0) & (source < left.shape[-1])
    aligned = torch.where(inside, left[..., source.clamp(0, left.shape[-1] - 1)], reference)
    if k > 0 and bins[0] <= v < bins[1]:
        aligned[..., v - bins[0]] = left[..., v - first : v - first + k + 1].sum(-1)
    if right is not None:
        aligned = torch.where(after, right[..., (i - right_first).clamp(0, right.shape[-1] - 1)], aligned)
    gone = after & (i <= v - k)
    return torch.where(gone, torch.zeros_like(aligned), aligned)
