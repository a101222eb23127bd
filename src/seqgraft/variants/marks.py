"""Which group of cells a variant affects most, of each group of tracks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.genes import signal_table
from seqgraft.tracks import TrackTable

__all__ = ["Mark", "marks_of"]


@dataclass(frozen=True)
class Mark:
    """A group of tracks (an assay) of several conditions (cell types).

    Attributes:
        group: its name in the track table.
        conditions: condition -> positions of its tracks among the scored columns.
    """

    group: str
    conditions: Mapping[str, tuple[int, ...]]

    @property
    def columns(self) -> tuple[str, str]:
        """Names of what :meth:`most_affected` gives."""
        return f"{self.group}_most_affected", f"{self.group}_margin"

    def most_affected(self, values: npt.NDArray[np.floating[Any]]) -> tuple[list[str], npt.NDArray[np.float32]]:
        """The condition with the largest effect in each row, and by how much it exceeds the next one.

        A condition's effect is the mean over its tracks (strands, replicates) of the absolute scores; the margin is in
        units of the scorer. Conditions without a score are left out: "" where none is left, a margin of NaN where only
        one is. Of equal effects the first in the track table is named, with a margin of 0.

        Args:
            values: scores ``(rows, columns)``, NaN for tracks that are not read.
        """
        each = np.full((len(values), len(self.conditions)), -np.inf)
        for number, places in enumerate(self.conditions.values()):
            scores = np.abs(values[:, list(places)].astype(np.float64))
            known = np.isfinite(scores)
            total, count = np.where(known, scores, 0.0).sum(axis=1), known.sum(axis=1)
            each[count > 0, number] = total[count > 0] / count[count > 0]
        first, ordered = each.argmax(axis=1), np.sort(each, axis=1)
        names = list(self.conditions)
        chosen = [names[i] if np.isfinite(largest) else "" for i, largest in zip(first, ordered[:, -1], strict=True)]
        several = np.isfinite(ordered[:, -2])
        margin = np.full(len(values), np.nan, dtype=np.float32)
        margin[several] = ordered[several, -1] - ordered[several, -2]
        return chosen, margin


def marks_of(tracks: TrackTable, merged: bool) -> tuple[Mark, ...]:
    """The groups of tracks with several conditions, in the order of the table.

    Args:
        merged: the columns are signals whose strands are merged (``signal_table``), and not tracks.
    """
    columns: pd.DataFrame = signal_table(tracks) if merged else tracks.frame
    marks = []
    for group in dict.fromkeys(columns["group"]):
        own = np.flatnonzero((columns["group"] == group) & (columns["condition"] != ""))
        found: dict[str, tuple[int, ...]] = {}
        for place in own.tolist():
            name = str(columns["condition"].iloc[place])
            found[name] = (*found.get(name, ()), place)
        if len(found) > 1:
            marks.append(Mark(str(group), found))
    return tuple(marks)
