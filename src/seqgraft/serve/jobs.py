"""One worker and the requests that wait for it: their order, progress, cancelling, and the results that are kept."""

from __future__ import annotations

import secrets
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Generic, Literal, NoReturn, Protocol, TypeVar

from seqgraft.errors import RunError, SeqgraftError
from seqgraft.progress import listening

__all__ = ["BusyError", "Job", "Queue", "Rate", "Sized"]

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Sized(Protocol):
    """A result that knows its bytes."""

    @property
    def size(self) -> int: ...


Result = TypeVar("Result", bound=Sized)


class BusyError(RunError):
    """The queue is full, or a client asks too often."""


class _StopError(Exception):
    """Ends a job at its next step."""


@dataclass(eq=False)
class Job(Generic[Result]):
    """A request, from when it was made to when its result is forgotten.

    Attributes:
        number: in the order in which they came.
        key: of what is asked for: the same again finds the same job.
        progress: share that is done, 0 to 1.
        message: why it failed.
    """

    id: str
    number: int
    key: Hashable
    work: Callable[[], Result]
    state: State = "waiting"
    progress: float = 0.0
    message: str = ""
    result: Result | None = None
    stopped: bool = False
    future: Future[Result] | None = field(default=None, repr=False)


class Queue(Generic[Result]):
    """Requests in the order in which they came, one at a time in one thread, which alone uses the model.

    Args:
        waiting: most requests that may wait.
        kept: most results that are kept; the one that was not asked for longest goes first.
        kept_bytes: most bytes of all results that are kept, but for the newest.
    """

    def __init__(self, waiting: int, kept: int, kept_bytes: int) -> None:
        self._waiting, self._kept, self._kept_bytes = waiting, kept, kept_bytes
        self._jobs: OrderedDict[str, Job[Result]] = OrderedDict()  # not asked for longest first
        self._numbers = count()
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="seqgraft-serve")

    def add(self, key: Hashable, work: Callable[[], Result]) -> Job[Result]:
        """A job for the work, or the one of the same key that is there and has not failed.

        Raises:
            BusyError: too many are waiting.
        """
        with self._lock:
            for job in self._jobs.values():
                if job.key == key and job.state in ("waiting", "running", "done") and not job.stopped:
                    self._jobs.move_to_end(job.id)
                    return job
            if sum(job.state == "waiting" for job in self._jobs.values()) >= self._waiting:
                remedy = "Wait until one is done, or cancel one"
                raise BusyError(f"{self._waiting} requests are waiting already", remedy=remedy)
            job = Job(secrets.token_urlsafe(12), next(self._numbers), key, work)
            self._jobs[job.id] = job
            job.future = self._pool.submit(self._run, job)
        job.future.add_done_callback(lambda future: self._finish(job, future))
        return job

    def get(self, number: str) -> Job[Result] | None:
        """The job, or None if it is unknown or its result is no longer kept."""
        with self._lock:
            if number in self._jobs:
                self._jobs.move_to_end(number)
            return self._jobs.get(number)

    def before(self, job: Job[Result]) -> int:
        """How many requests come before a job that waits, the one that runs included."""
        with self._lock:
            active = [other for other in self._jobs.values() if other.state in ("waiting", "running")]
            return sum(other.number < job.number for other in active)

    def cancel(self, job: Job[Result]) -> None:
        """Takes a job out of the queue, or ends it at its next step."""
        job.stopped = True
        if (future := job.future) is not None:  # the worker may finish it meanwhile
            future.cancel()

    def close(self) -> None:
        """Ends everything."""
        with self._lock:
            for job in self._jobs.values():
                job.stopped = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: Job[Result]) -> Result:
        def hear(share: float) -> None:
            if job.stopped:
                raise _StopError
            job.progress = share

        job.state = "running"
        with listening(hear):
            return job.work()

    def _finish(self, job: Job[Result], future: Future[Result]) -> None:
        with self._lock:
            job.work = _forgotten
            error = None if future.cancelled() else future.exception()
            if future.cancelled() or isinstance(error, _StopError):
                job.state = "cancelled"
            elif error is None:
                job.result, job.progress, job.state = future.result(), 1.0, "done"
            else:
                job.message, job.state = _in_words(error), "failed"
            job.future = None
            if job.id in self._jobs:
                self._jobs.move_to_end(job.id)
            self._forget()

    def _forget(self) -> None:
        finished = deque(job for job in self._jobs.values() if job.state not in ("waiting", "running"))
        size = sum(job.result.size for job in finished if job.result is not None)
        while len(finished) > 1 and (len(finished) > self._kept or size > self._kept_bytes):
            oldest = finished.popleft()
            size -= 0 if oldest.result is None else oldest.result.size
            del self._jobs[oldest.id]


class Rate:
    """How often each client may ask: so many times in any 60 seconds."""

    def __init__(self, most: int, clock: Callable[[], float] = monotonic) -> None:
        self._most, self._clock = most, clock
        self._times: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def count(self, client: str) -> None:
        """Counts a request of a client.

        Raises:
            BusyError: it is one too many.
        """
        with self._lock:
            now = self._clock()
            self._times = {name: times for name, times in self._times.items() if times[-1] > now - 60}
            times = self._times.setdefault(client, deque())
            while times and times[0] <= now - 60:
                times.popleft()
            if len(times) >= self._most:
                raise BusyError(f"more than {self._most} requests in a minute", remedy="Wait a minute")
            times.append(now)


def _forgotten() -> NoReturn:
    """Stands where the work of a finished job was, with what it held."""
    raise AssertionError("the job has run")


def _in_words(error: BaseException) -> str:
    """What the page says of an error; of a bug, which is printed here, only that there was one."""
    if isinstance(error, SeqgraftError):
        return str(error)
    traceback.print_exception(error)
    if isinstance(error, MemoryError):
        return "The memory of this machine is full. Ask for fewer variants or a shorter region."
    return "This is a bug of seqgraft. The terminal in which it runs shows the traceback."
