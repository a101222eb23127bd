"""The web application: one static page and the requests that it makes. The only door to FastAPI.

::

    GET    /                            the page; /page.js, /page.css, /report.css
    GET    /about                       facts of the run
    POST   /jobs?scorers=...            body: variants or a VCF, plain or gzipped; or ?region=chr1:1-2000 without one
    GET    /jobs/ID                     state, place in the queue, progress; problems and columns of what is done
    DELETE /jobs/ID                     cancels
    GET    /jobs/ID/table?column=0      the rows, with the values of some columns; /jobs/ID/table.tsv has all
    GET    /jobs/ID/ranked?row=0        the columns that are affected most
    POST   /jobs/ID/looks?what=signal   another job: the signal of both alleles of a row, or logos
    GET    /jobs/ID/figures?column=0    SVGs of signal or logos

A browser lets other sites send requests here, and names of other sites can be made to point here. So the Host must be
one of ours, and whatever is no GET must come from a page of ours (Origin). Nothing of a request is run as code; what
must be a file lies in a private folder until the answer is there.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from seqgraft.errors import ConfigError, DataError, RunError, SeqgraftError
from seqgraft.serve.answers import Logo, Scores, Signal
from seqgraft.serve.asked import Choice, Limits, Variants, plain_text, read_region, read_variants
from seqgraft.serve.jobs import BusyError, Job, Queue, Rate
from seqgraft.serve.served import Served

__all__ = ["ANY_ADDRESS", "LOOPBACK", "make_app"]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
#: Among hosts: any address in digits, which no name can be made to point to.
ANY_ADDRESS = "*"

Answer = Scores | Signal | Logo
Columns = Annotated[list[int], Query(max_length=200)]

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_FILES = {
    "/": ("serve", "page.html", "text/html"),
    "/page.js": ("serve", "page.js", "text/javascript"),
    "/page.css": ("serve", "page.css", "text/css"),
    "/report.css": ("report", "page.css", "text/css"),
}
_RANKED = 40  # tracks in the list of those that are affected most


class _MissingError(RunError):
    """What is asked for is not there."""


def make_app(served: Served, limits: Limits | None = None, hosts: Collection[str] = LOOPBACK) -> FastAPI:
    """The application that answers for a run.

    Args:
        hosts: names and addresses by which it may be asked; ``ANY_ADDRESS`` allows all addresses in digits.
    """
    limits = limits or Limits()
    queue: Queue[Answer] = Queue(limits.waiting, limits.kept, limits.kept_bytes)
    rate = Rate(limits.rate)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.queue = queue
    _guard(app, hosts)
    _errors(app)
    for address, (package, name, kind) in _FILES.items():
        _static(app, address, files(f"seqgraft.{package}").joinpath(name).read_bytes(), kind)

    def job_of(number: str) -> Job[Answer]:
        job = queue.get(number)
        if job is None:
            raise _MissingError("this result is no longer kept", remedy="Ask again")
        return job

    def result_of(number: str) -> Answer:
        job = job_of(number)
        if job.result is None:
            raise _MissingError("there is no result", job.state, remedy="Wait until it is done, or ask again")
        return job.result

    def scores_of(number: str, row: int = 0) -> Scores:
        found = result_of(number)
        if not isinstance(found, Scores) or not 0 <= row < len(found.frame):
            raise _MissingError("there is no such row", row, remedy="Choose one of the table")
        return found

    @app.get("/about")
    def about() -> JSONResponse:
        return JSONResponse(served.facts() | {"most_variants": limits.variants, "most_bytes": limits.body})

    @app.post("/jobs")
    async def ask(
        request: Request,
        region: Annotated[str, Query(max_length=200)] = "",
        scorers: Annotated[list[str], Query(max_length=20)] = [],  # noqa: B006
        over: Literal["", "centre", "window"] = "",
        width: Annotated[int | None, Query(ge=1, le=10_000_000)] = None,
        reverse_complement: bool | None = None,
        merge_strands: bool | None = None,
        stitch: bool | None = None,
    ) -> JSONResponse:
        rate.count(_client(request))
        choice = Choice(tuple(scorers), over, width, reverse_complement, merge_strands, stitch)
        choice.on(served.config)  # refuses what does not exist
        body = await _body(request, limits.body)
        if region:
            place = read_region(region, served.layout, dict(served.config.rename))
            job = queue.add((place, choice), lambda: served.region(place, choice))
            return JSONResponse({"id": job.id, "problems": []}, 202)
        asked = await run_in_threadpool(_read, body, served, limits)
        problems = [problem.record for problem in asked.problems]
        if not asked.variants:
            message = "None of the variants can be scored."
            return JSONResponse({"message": message, "problems": problems}, 422)
        key = (hashlib.sha256(body).hexdigest(), choice)
        job = queue.add(key, lambda: served.scores(asked, choice))
        return JSONResponse({"id": job.id, "problems": problems}, 202)

    @app.get("/jobs/{number}")
    def state(number: str) -> JSONResponse:
        job = job_of(number)
        about = {"state": job.state, "before": queue.before(job), "progress": job.progress, "message": job.message}
        return JSONResponse(about | _about(job.result))

    @app.delete("/jobs/{number}")
    def cancel(number: str) -> JSONResponse:
        queue.cancel(job_of(number))
        return JSONResponse({})

    @app.get("/jobs/{number}/table")
    def table(number: str, column: Columns = []) -> JSONResponse:  # noqa: B006
        found = scores_of(number)
        return JSONResponse({"rows": found.rows(_chosen(found, column))})

    @app.get("/jobs/{number}/table.tsv")
    def download(number: str) -> StreamingResponse:
        found = scores_of(number)
        headers = {"Content-Disposition": 'attachment; filename="effects.tsv"'}
        return StreamingResponse(found.text(), media_type="text/tab-separated-values", headers=headers)

    @app.get("/jobs/{number}/ranked")
    def ranked(number: str, row: int = 0) -> JSONResponse:
        found = result_of(number)
        if isinstance(found, Signal):
            return JSONResponse({"title": found.title, "ranked": found.ranked(_RANKED)})
        scores = scores_of(number, row)
        return JSONResponse({"title": scores.title(row), "ranked": scores.ranked(row, _RANKED)})

    @app.post("/jobs/{number}/looks")
    def look(
        request: Request, number: str, what: Literal["signal", "logo"], row: int = 0, column: int = 0
    ) -> JSONResponse:
        rate.count(_client(request))
        found = result_of(number)
        if isinstance(found, Signal) and found.asked is not None and what == "logo":
            (region, choice), chosen = found.asked, found.columns[_chosen(found, [column])[0]]
            key = (number, what, column if served.by_gradient(region) else None)
            job = queue.add(key, lambda: served.region_logo(region, choice, chosen))
        else:
            scores = scores_of(number, row)
            make = served.alleles if what == "signal" else served.allele_logos
            job = queue.add((number, what, row), lambda: make(scores, row))
        return JSONResponse({"id": job.id}, 202)

    @app.get("/jobs/{number}/figures")
    def figures(number: str, column: Columns = []) -> JSONResponse:  # noqa: B006
        found = result_of(number)
        if isinstance(found, Scores):
            raise _MissingError("a table has no figures", remedy="Ask for the signal or the logo of a row")
        return JSONResponse({"figures": found.figures(_chosen(found, column))})

    return app


def _guard(app: FastAPI, hosts: Collection[str]) -> None:
    """Refuses what comes by another name or from another site, and adds the headers that every answer has."""

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        response: Response
        if not _is_known(host, hosts):
            message = "This address is not one that the server is known by. Open the one that it printed."
            response = JSONResponse({"message": message}, 403)
        elif request.method not in ("GET", "HEAD") and not _is_own(request, origin, host):
            response = JSONResponse({"message": "Only the page of this server may send requests to it."}, 403)
        else:
            response = await answer(request)
        response.headers.update(_HEADERS)
        return response


def _is_known(host: str, hosts: Collection[str]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name in hosts:
            return True
        ipaddress.ip_address(name)
    except ValueError:  # of urlsplit, or no address in digits
        return False
    return ANY_ADDRESS in hosts


def _is_own(request: Request, origin: str | None, host: str) -> bool:
    """Whether a page of ours sent it, or a program that is no browser: those send no Origin and no Sec-Fetch-Site."""
    if origin is None:
        return "sec-fetch-site" not in request.headers
    return origin == f"http://{host}"


def _errors(app: FastAPI) -> None:
    """Turns errors into ``{"message": ...}``."""

    @app.exception_handler(SeqgraftError)
    def ours(_: Request, error: SeqgraftError) -> JSONResponse:
        status = 429 if isinstance(error, BusyError) else 404 if isinstance(error, _MissingError) else 422
        return JSONResponse({"message": str(error)}, status)

    @app.exception_handler(RequestValidationError)
    def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name, value = str(first["loc"][-1]), str(first.get("input"))[:60]
        message = str(ConfigError(str(first["msg"]).lower(), value, where=name[:60], remedy="Correct the request"))
        return JSONResponse({"message": message}, 422)


def _static(app: FastAPI, address: str, content: bytes, kind: str) -> None:
    @app.get(address)
    def static() -> Response:
        return Response(content, media_type=kind)


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


async def _body(request: Request, most: int) -> bytes:
    """The body, read no further than the limit."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            remedy = "Split it, or use 'seqgraft variants'"
            raise DataError(f"a request may have {most:,} bytes, and this one has more", remedy=remedy)
        parts.append(part)
    return b"".join(parts)


def _read(body: bytes, served: Served, limits: Limits) -> Variants:
    return read_variants(plain_text(body, limits), served.check, limits)


def _about(found: Answer | None) -> dict[str, object]:
    """What the page needs to know of a result."""
    if found is None:
        return {}
    columns: dict[str, object] = {"columns": [column.record for column in found.columns]}
    if not isinstance(found, Scores):
        return columns
    problems = [problem.record for problem in found.problems]
    return columns | {"problems": problems, "notes": found.notes, "over": found.over, "rows": len(found.frame)}


def _chosen(found: Answer, wanted: Sequence[int]) -> list[int]:
    if any(not 0 <= number < len(found.columns) for number in wanted):
        raise _MissingError("there is no such track", list(wanted)[:5], remedy="Choose one of the list")
    return list(wanted)
