"""Every error that a user can cause.

    SeqgraftError
    ├── ConfigError   a file or setting that cannot be read or understood   (exit code 2)
    ├── DataError     data that contradict themselves or the genome         (exit code 3)
    ├── ModelError    a model or adapter that does not fit                  (exit code 4)
    └── RunError      a run that cannot start, continue or be written       (exit code 5)

Anything else that escapes is a bug (exit code 1, with its traceback).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

__all__ = ["ConfigError", "DataError", "ModelError", "Problems", "RunError", "SeqgraftError"]


class SeqgraftError(Exception):
    """A message of four parts: where, what is wrong, the value, what to do.

    ``DataError("the file has no chromosome", "chr8", where="tracks.csv row 14", remedy="Use the FASTA's names")``
    reads ``tracks.csv row 14: the file has no chromosome: 'chr8'. Use the FASTA's names.``
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, value: object = None, *, where: object = None, remedy: str | None = None) -> None:
        self.what, self.value, self.where, self.remedy = what, value, where, remedy
        self.parts: tuple[SeqgraftError, ...] = ()  # the problems that it gathers, if it is more than one
        text = what.rstrip(".")
        if value is not None:
            text += f": {value!r}"
        text = f"{where}: {text}" if where is not None else text[:1].upper() + text[1:]
        asked = (remedy or "").rstrip(".")
        super().__init__(f"{text}. {asked}{'' if asked.endswith('?') else '.'}" if asked else f"{text}.")


class ConfigError(SeqgraftError):
    """A file or setting that cannot be read or understood."""

    exit_code = 2


class DataError(SeqgraftError):
    """Data that contradict themselves, the genome or the request."""

    exit_code = 3


class ModelError(SeqgraftError):
    """A model, adapter or checkpoint that does not fit."""

    exit_code = 4


class RunError(SeqgraftError):
    """A run that cannot start, continue or be written."""

    exit_code = 5


@dataclass
class Problems:
    """Gathers problems so that a user sees all of them at once."""

    kind: type[SeqgraftError]
    found: list[SeqgraftError] = field(default_factory=list)

    def add(self, what: str, value: object = None, *, where: object = None, remedy: str | None = None) -> None:
        self.found.append(self.kind(what, value, where=where, remedy=remedy))

    def extend(self, error: SeqgraftError) -> None:
        """Adds an error that was raised, or each of those that it gathers."""
        self.found += error.parts or (error,)

    def raise_if_any(self) -> None:
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            shown = [f"  - {problem}" for problem in self.found[:20]]
            if len(self.found) > 20:
                shown.append(f"  - and {len(self.found) - 20} more.")
            message = "\n".join([f"{len(self.found)} problems were found:", *shown])
            error = self.kind(message)
            error.args, error.parts = (message,), tuple(self.found)
            raise error
