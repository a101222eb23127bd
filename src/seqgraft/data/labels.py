"""Label columns: texts -> tracks with one bin.

==================  ===============================================================================================
task                tracks
==================  ===============================================================================================
classification      two classes: one sigmoid track, 1 for the second class; more: one softmax track per class
multilabel          one sigmoid track per class, any number of which may be 1
regression          one identity track per column, standardised (center, scale) on the training rows
==================  ===============================================================================================

Empty cells and NA are missing labels: NaN in the targets, ignored by losses and metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from seqgraft.errors import ConfigError, DataError, Problems
from seqgraft.tracks import TrackTable

__all__ = ["MISSING", "Label", "Target", "class_weights", "read_label", "read_numbers", "track_table"]

Task = Literal["classification", "multilabel", "regression"]
MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "None"})
MOST_CLASSES = 100  # more distinct texts than that are names, not classes, unless the classes are listed


@dataclass(frozen=True, slots=True)
class Label:
    """What to predict: one column, or several that share a head.

    The task is inferred only where there is no doubt: texts or 0/1 are classes, fractions are measurements. ``classes``
    sets their order (the last of two is the positive one). A single ``multilabel`` column lists its classes between
    ``separator``; several are 0/1 each. ``transform: log2`` is applied to measurements before they are stored.
    """

    column: str | tuple[str, ...] = "label"
    task: Task | None = None
    classes: tuple[str, ...] = ()
    transform: Literal["none", "log2"] = "none"
    separator: str = ";"

    def __post_init__(self) -> None:
        problems = Problems(ConfigError)
        where = f"labels, column {self.column!r}"
        if not self.column:
            problems.add("a label needs a column", where="labels", remedy="Name it, as in column: label")
        if self.transform != "none" and self.task not in (None, "regression"):
            problems.add(f"{self.task} takes no transform", self.transform, where=where, remedy="Leave it out")
        if self.classes and self.task == "regression":
            problems.add("a regression has no classes", list(self.classes), where=where, remedy="Leave them out")
        if len(set(self.classes)) != len(self.classes):
            problems.add("a class is listed twice", list(self.classes), where=where, remedy="List every class once")
        if len(self.columns) > 1 and (self.task is None or self.task == "classification"):
            remedy = "Use task: multilabel or task: regression, or one label per column"
            problems.add("several columns need a task that they can share", self.task, where=where, remedy=remedy)
        problems.raise_if_any()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns, also where there is one."""
        return (self.column,) if isinstance(self.column, str) else tuple(self.column)

    @property
    def group(self) -> str:
        """The name of the head."""
        return "+".join(self.columns)


@dataclass(frozen=True, slots=True)
class Target:
    """A label with its task and classes resolved: track names and values ``(rows, tracks)``, NaN where missing.

    ``conditions``, if there are any, say what each track is a measurement of.
    """

    label: Label
    names: list[str]
    values: NDArray[np.float32]
    conditions: Sequence[str] = ()

    @property
    def link(self) -> str:
        if self.label.task == "regression":
            return "identity"
        return "softmax" if self.label.task == "classification" and len(self.names) > 1 else "sigmoid"


def read_label(table: pd.DataFrame, label: Label, places: Sequence[str], problems: Problems) -> Target:
    """The values of a label and its tracks; ``places`` says where each row came from, for messages."""
    columns = [table[column].astype(str).str.strip() for column in label.columns]
    for column in columns:
        if column.isin(MISSING).all():
            remedy = "Check the column, or leave the label out"
            problems.add("no row has a label", where=f"column {column.name!r}", remedy=remedy)
    label = replace(label, task=label.task or _infer_task(columns[0], label))
    if label.task == "regression":
        return _read_measurements(columns, label, places, problems)
    if len(columns) > 1:
        return _read_flags(columns, label, places, problems)
    texts = _whole_numbers(columns[0])
    known = [frozenset(_split(text, label)) if text not in MISSING else None for text in texts]
    found = Counter(name for names in known if names is not None for name in names)
    classes = label.classes or tuple(sorted(found, key=_numeric_order))
    if len(classes) < (2 if label.task == "classification" else 1):
        remedy = "Give rows of a second class, or leave the label out"
        problems.add("there is only one class", list(classes), where=f"column {label.group!r}", remedy=remedy)
    for name in sorted(set(found) - set(classes)):
        first = next(place for place, names in zip(places, known, strict=True) if names is not None and name in names)
        remedy = f"Correct it, or add it to classes: {list(classes)}"
        where = f"{first}, column {label.group!r}"
        problems.add(f"{found[name]} rows have a class that is not listed", name, where=where, remedy=remedy)
    binary = label.task == "classification" and len(classes) == 2
    shown = classes[1:] if binary else classes
    values = np.full((len(texts), len(shown)), np.nan, dtype=np.float32)
    for row, names in enumerate(known):
        if names is not None:
            values[row] = [name in names for name in shown]
    plain = binary and classes == ("0", "1")
    tracks = [label.group if plain else f"{label.group}={name}" for name in shown]
    return Target(replace(label, classes=classes), tracks, values)


def _split(text: str, label: Label) -> list[str]:
    return [part.strip() for part in text.split(label.separator)] if label.task == "multilabel" else [text]


def _infer_task(column: pd.Series[str], label: Label) -> Task:
    if label.classes:
        return "classification"
    if label.transform != "none":
        return "regression"
    known = column[~column.isin(MISSING)]
    numbers = pd.to_numeric(known, errors="coerce")
    distinct = known.nunique()
    if numbers.isna().any():
        if numbers.isna().all() and distinct <= MOST_CLASSES:
            return "classification"
    elif set(numbers) <= {0.0, 1.0}:
        return "classification"
    elif (numbers % 1 != 0).any():
        return "regression"
    raise DataError(
        f"{distinct} distinct values may be classes or measurements; the first are",
        known.unique()[:5].tolist(),
        where=f"column {column.name!r}",
        remedy="Say task: classification, multilabel or regression",
    )


def _whole_numbers(column: pd.Series[str]) -> list[str]:
    """1.0 and 1 are one class where all values are whole numbers."""
    known = ~column.isin(MISSING)
    numbers = pd.to_numeric(column[known], errors="coerce")
    if numbers.isna().any() or not np.isfinite(numbers).all() or (numbers % 1 != 0).any():
        return column.tolist()
    return column.mask(known, numbers.astype(np.int64).astype(str)).tolist()


def _numeric_order(name: str) -> tuple[float, str]:
    return (float(name), name) if name.lstrip("-").isdecimal() else (float("inf"), name)


def _read_flags(columns: Sequence[pd.Series[str]], label: Label, places: Sequence[str], problems: Problems) -> Target:
    flags = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}
    values = np.full((len(places), len(columns)), np.nan, dtype=np.float32)
    for index, column in enumerate(columns):
        for row, text in enumerate(column):
            if text in MISSING:
                continue
            if text.lower() not in flags:
                where = f"{places[row]}, column {column.name!r}"
                problems.add("a multilabel column holds 0 or 1", text, where=where, remedy="Write 0, 1 or nothing")
                continue
            values[row, index] = flags[text.lower()]
    return Target(replace(label, classes=label.columns), list(label.columns), values)


def _read_measurements(
    columns: Sequence[pd.Series[str]], label: Label, places: Sequence[str], problems: Problems
) -> Target:
    parsed = [read_numbers(column, places, problems) for column in columns]
    if label.transform == "log2":
        for column, numbers in zip(columns, parsed, strict=True):
            for row in np.flatnonzero(numbers <= 0).tolist():
                where = f"{places[row]}, column {column.name!r}"
                remedy = "Leave the row out, or use transform: none"
                problems.add("log2 needs a positive number", float(numbers[row]), where=where, remedy=remedy)
        parsed = [np.log2(np.where(numbers > 0, numbers, np.nan)) for numbers in parsed]
    names = [f"log2({name})" if label.transform == "log2" else name for name in label.columns]
    return Target(label, names, np.stack(parsed, axis=1).astype(np.float32))


def read_numbers(column: pd.Series[str], places: Sequence[str], problems: Problems) -> NDArray[np.float64]:
    """Finite numbers; NaN where missing."""
    missing = column.isin(MISSING).to_numpy()
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, copy=True)
    for row in np.flatnonzero(~np.isfinite(numbers) & ~missing).tolist():
        where = f"{places[row]}, column {column.name!r}"
        problems.add("this is not a finite number", column.iloc[row], where=where, remedy="Write a number or nothing")
    numbers[missing] = np.nan
    return numbers


def track_table(targets: Sequence[Target], train: NDArray[np.int64]) -> TrackTable:
    """The track table; checks that every class and every spread is there to be learned."""
    problems = Problems(DataError)
    rows: list[dict[str, Any]] = []
    for target in targets:
        conditions = target.conditions or [""] * len(target.names)
        columns = zip(target.names, conditions, target.values[train].T.astype(np.float64), strict=True)
        for name, condition, values in columns:
            known = values[~np.isnan(values)]
            row: dict[str, Any] = {"name": name, "group": target.label.group, "link": target.link, "strand_pair": name}
            row["condition"] = condition
            if known.size < 2 or known.min() == known.max():
                value = "nothing" if not known.size else float(known[0])
                remedy = "Check the folds, or leave the label out"
                problems.add("all training rows have the same label", value, where=f"label {name!r}", remedy=remedy)
            elif target.label.task == "regression":
                row |= {"center": float(known.mean()), "scale": float(1 / known.std())}
            rows.append(row)
    problems.raise_if_any()
    return TrackTable.build(rows)


def class_weights(targets: Sequence[Target], train: NDArray[np.int64]) -> dict[str, float]:
    """Balanced weights counted on training rows: negatives / positives, or rows / (classes * rows of the class)."""
    weights: dict[str, float] = {}
    for target in targets:
        for name, values in zip(target.names, target.values[train].T, strict=True):
            known, positive = int((~np.isnan(values)).sum()), int(np.nansum(values))
            if target.link == "sigmoid":
                weights[name] = (known - positive) / positive
            elif target.link == "softmax":
                weights[name] = known / (len(target.names) * positive)
    return weights
