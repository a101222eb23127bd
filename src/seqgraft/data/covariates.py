"""Covariates: numbers about each row, from columns of numbers or computed from columns of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from seqgraft.data.labels import MISSING, read_numbers
from seqgraft.errors import DataError, Problems
from seqgraft.sequence import Codes, encode

__all__ = ["SENSE_CODONS", "Covariates", "scale", "standardise"]

STOPS = ("TAA", "TAG", "TGA")
_CODONS = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT"]
#: The 61 codons that stand for an amino acid in the standard genetic code.
SENSE_CODONS = tuple(codon for codon in _CODONS if codon not in STOPS)
_SENSE = np.array([codon in SENSE_CODONS for codon in _CODONS])
#: Largest share of coding sequences that may be irregular.
MAX_IRREGULAR = 0.01


@dataclass(frozen=True, slots=True)
class Covariates:
    """Which numbers about each row the heads see.

    Attributes:
        numbers: columns of numbers.
        codons: a column of coding sequences, read in frame from their first base: the shares of the 61 sense codons.
        lengths: columns of sequences: log10 of their lengths in bp.
    """

    numbers: tuple[str, ...] = ()
    codons: str | None = None
    lengths: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """From the settings in ``dataset.json``."""
        numbers, lengths = (tuple(settings.get(name) or ()) for name in ("covariates", "lengths"))
        return cls(numbers, settings.get("codons"), lengths)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, once each."""
        codons = () if self.codons is None else (self.codons,)
        return tuple(dict.fromkeys([*self.numbers, *codons, *self.lengths]))

    def read(
        self, table: pd.DataFrame, places: Sequence[str], problems: Problems
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        """The numbers of each row, unscaled, and notes of what was irregular; ``places`` says where rows came from.

        Columns are named as those of numbers, "codon ATG" and "log10 length of COLUMN". A coding sequence is irregular
        if its length is no multiple of 3, a stop codon comes before its last codon, or it has N or other IUPAC letters.
        What can be counted of it is; more than 1 % of such rows, gaps and texts that are no bases join ``problems``.
        """
        texts = {column: table[column].astype(str).str.strip() for column in self.columns}
        for column, values in texts.items():
            if missing := np.flatnonzero(values.isin(MISSING)).tolist():
                where, remedy = f"{places[missing[0]]}, column {column!r}", "Fill it in, or leave the covariate out"
                problems.add(f"{len(missing)} rows have no value of a covariate", where=where, remedy=remedy)
        found = {column: read_numbers(texts[column], places, problems) for column in self.numbers}
        codes = {
            column: _encoded(texts[column], places, problems) for column in self.columns if column not in self.numbers
        }
        notes: dict[str, Any] = {}
        if self.codons is not None:
            shares, notes = _codon_shares(codes[self.codons], self.codons, places, problems)
            found |= {f"codon {codon}": values for codon, values in zip(SENSE_CODONS, shares.T, strict=True)}
        for column in self.lengths:
            sizes = np.array([sequence.size for sequence in codes[column]])
            found[f"log10 length of {column}"] = np.log10(np.maximum(sizes, 1))
        return pd.DataFrame(found, index=table.index), notes


def _encoded(texts: pd.Series[str], places: Sequence[str], problems: Problems) -> list[Codes]:
    """Base codes of every row; none of a row that has no text or one that is no sequence."""
    found = []
    for text, place in zip(texts, places, strict=True):
        codes: Codes = np.zeros(0, dtype=np.uint8)
        try:
            codes = encode("" if text in MISSING else text)
        except DataError as error:
            where = f"{place}, column {texts.name!r}, {error.where}"
            problems.add(error.what, error.value, where=where, remedy=error.remedy)
        found.append(codes)
    return found


def _codon_shares(
    sequences: Sequence[Codes], column: str, places: Sequence[str], problems: Problems
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Shares ``(rows, 61)`` of the sense codons among those counted, and how many rows were irregular in which way."""
    counts, kinds = np.zeros((len(sequences), 64)), np.zeros((len(sequences), 3), dtype=bool)
    for row, codes in enumerate(sequences):
        triplets = codes[: codes.size // 3 * 3].reshape(-1, 3).astype(np.int64)
        known = (triplets < 4).all(axis=1)
        number = triplets @ np.array([16, 4, 1])
        counts[row] = np.bincount(number[known], minlength=64)
        stops = known & ~_SENSE[np.where(known, number, 0)]
        kinds[row] = codes.size % 3 != 0, stops[:-1].any(), (codes > 3).any()
    irregular = np.flatnonzero(kinds.any(axis=1))
    names = ("length_no_multiple_of_3", "stop_codon_inside", "unknown_bases")
    found = {name: int(count) for name, count in zip(names, kinds.sum(axis=0), strict=True) if count}
    if irregular.size > MAX_IRREGULAR * len(sequences):
        listed = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in found.items())
        what = f"{irregular.size} of {len(sequences)} coding sequences are irregular ({listed}); the first is"
        remedy = (
            f"Give whole coding sequences, in frame from the first base; up to {MAX_IRREGULAR:.0%} may be irregular"
        )
        problems.add(what, places[int(irregular[0])], where=f"codons, column {column!r}", remedy=remedy)
    sense = counts[:, _SENSE]
    notes = {"irregular_coding_sequences": {"rows": int(irregular.size), **found}} if irregular.size else {}
    return sense / np.maximum(sense.sum(axis=1, keepdims=True), 1), notes


def standardise(
    covariates: pd.DataFrame, train: NDArray[np.int64], numbers: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """Mean 0 and standard deviation 1 over the training rows, and what that took.

    One of the columns ``numbers`` that is constant in training is an error; a computed one, as a codon that no
    training row has, is only centred.
    """
    problems = Problems(DataError)
    scaling = {}
    for column in covariates:
        values = covariates[column].to_numpy()[train]
        constant = values.min() == values.max()
        scaling[str(column)] = {"mean": float(values.mean()), "std": 1.0 if constant else float(values.std())}
        if constant and column in numbers:
            remedy = "Leave it out"
            problems.add("a covariate is constant in training", values[0], where=f"column {column!r}", remedy=remedy)
    problems.raise_if_any()
    return scale(covariates, scaling), scaling


def scale(covariates: pd.DataFrame, scaling: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """The columns of ``scaling`` as the heads see them."""
    scaled = {name: (covariates[name] - of["mean"]) / of["std"] for name, of in scaling.items()}
    return pd.DataFrame(scaled, index=covariates.index)
