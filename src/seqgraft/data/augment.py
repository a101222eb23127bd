"""Augmentation as a pure function: the view of an example depends on (seed, epoch, index) and on nothing else.

So it does not depend on batch size, worker count or device count, and a resumed run sees what an uninterrupted one
would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seqgraft.errors import ConfigError

__all__ = ["FORWARD", "Augmentation", "View"]


@dataclass(frozen=True, slots=True)
class View:
    """How an example is seen: ``shift`` bp to the right on the genome, then the other strand if ``reverse``."""

    reverse: bool = False
    shift: int = 0


FORWARD = View()


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The finite set of views that training draws from: both strands, shifts of up to ``shift`` bp either way.

    A shift moves the sequence and not the targets, as in Baskerville (3 bp there): it must be small beside a bin.
    """

    reverse_complement: bool = True
    shift: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ConfigError("a shift is a number of base pairs, zero or more", self.shift, where="augment.shift")

    def views(self) -> Sequence[View]:
        """All views, the forward one first."""
        shifts = sorted(range(-self.shift, self.shift + 1), key=lambda s: (abs(s), s))
        return [View(reverse, s) for reverse in ([False, True] if self.reverse_complement else [False]) for s in shifts]

    def draw(self, seed: int, epoch: int, index: int) -> View:
        """The view of example ``index`` in ``epoch``."""
        views = self.views()
        # A counter-based generator: any example can be drawn without drawing those before it.
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, index]))
        return views[int(generator.integers(len(views)))]
