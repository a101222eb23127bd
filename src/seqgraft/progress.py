"""A progress bar for what takes longer than two seconds, and for who listens how far a piece of work has come."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["listening", "progress", "steps"]

PATIENCE = 2.0  # seconds

Item = TypeVar("Item")


@dataclass
class _Listener:
    hear: Callable[[float], None]
    start: float = 0.0  # the loop that runs now began here, as a share of the whole,
    width: float = 1.0  # and is so much of it


_LISTENER: ContextVar[_Listener | None] = ContextVar("_LISTENER", default=None)


@contextmanager
def listening(hear: Callable[[float], None]) -> Iterator[None]:
    """Calls ``hear`` with the share that is done, 0 to 1, before each step of the loops within; it may raise to stop.

    Loops count that run in this thread over :func:`steps` or :func:`progress`; one inside another fills its step.
    """
    token = _LISTENER.set(_Listener(hear))
    try:
        yield
    finally:
        _LISTENER.reset(token)


def steps(iterable: Iterable[Item], total: int | None = None) -> Iterator[Item]:
    """The items as they are; whoever is :func:`listening` hears how many of ``total`` are done. There is no bar."""
    listener, total = _LISTENER.get(), total if total is not None else _length(iterable)
    if listener is None or not total:
        yield from iterable
        return
    start, width = listener.start, listener.width
    try:
        for number, item in enumerate(iterable):
            listener.start, listener.width = start + width * min(number / total, 1.0), width / total
            listener.hear(listener.start)
            yield item
    finally:
        listener.start, listener.width = start, width


def progress(iterable: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items as they are; after two seconds a bar on stderr says how many of ``total`` are done.

    Nothing is shown unless stderr is a terminal or ``SEQGRAFT_PROGRESS=1``.
    """
    total = total if total is not None else _length(iterable)
    iterable = steps(iterable, total)
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
    yield from _with_bar(items, what, total, done)


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
