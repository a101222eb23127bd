"""A progress bar for what takes longer than two seconds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

__all__ = ["progress"]

PATIENCE = 2.0  # seconds

Item = TypeVar("Item")


def progress(iterable: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items as they are; after two seconds a bar on stderr says how many of ``total`` are done.

    Nothing is shown unless stderr is a terminal or ``SEQGRAFT_PROGRESS=1``.
    """
    if not (sys.stderr.isatty() or _forced()):
        yield from iterable
        return
    items = iter(iterable)
    began, done = time.monotonic(), 0
    for item in items:
        yield item
        done += 1
        if time.monotonic() - began > PATIENCE:
            break
    else:
        return
    yield from _with_bar(items, what, total if total is not None else _length(iterable), done)


def _forced() -> bool:
    return os.environ.get("SEQGRAFT_PROGRESS") == "1"


def _length(iterable: Iterable[Item]) -> int | None:
    return len(iterable) if isinstance(iterable, Sized) else None


def _with_bar(items: Iterator[Item], what: str, total: int | None, done: int) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, force_terminal=_forced() or None), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)
