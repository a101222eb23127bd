"""The local page of a finished run: effects of variants, signal of both alleles, logos. The only door to uvicorn."""

from __future__ import annotations

import ipaddress
import socket
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

from seqgraft.errors import ConfigError, RunError
from seqgraft.run import open_run
from seqgraft.serve.asked import Limits
from seqgraft.serve.served import Served
from seqgraft.variants import VariantConfig

__all__ = ["Limits", "Served", "serve_run"]


def serve_run(
    folder: Path,
    config: VariantConfig | None = None,
    *,
    replicates: Sequence[Path] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    show: bool = False,
    tell: Callable[[str], None] = print,
) -> None:
    """Answers for a finished run at ``http://host:port`` until it is interrupted.

    Args:
        folder: of the run.
        config: how variants are scored unless the page says otherwise.
        replicates: further runs of the same tracks, whose scores and predictions are averaged with its own.
        host: where it listens; whoever can reach it can use the run.
        port: 0 takes a free one.
        show: open the page in the browser.
        tell: is given the address, and a warning where others can reach it.

    Raises:
        ConfigError: FastAPI or uvicorn are not installed; a run that has no place for a variant (``Served``).
        ModelError: the run's adapter and weights do not belong together.
        RunError: the run is not finished; the port is taken.
    """
    try:
        import uvicorn

        from seqgraft.serve.app import ANY_ADDRESS, LOOPBACK, make_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        remedy = "pip install 'seqgraft[serve]'"
        raise ConfigError("a package of the page is not installed", error.name, where="serve", remedy=remedy) from error
    served = Served(open_run(Path(folder)), [open_run(Path(other)) for other in replicates], config)
    listening = _listen(host, port)
    with listening:
        number = listening.getsockname()[1]
        host = listening.getsockname()[0] if ":" in host else host.lower()  # an address as browsers write it
        every = host in ("0.0.0.0", "::")  # noqa: S104
        hosts = {*LOOPBACK, host, *({ANY_ADDRESS, socket.gethostname().lower()} if every else ())}
        near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        shown = f"[{near}]" if ":" in near else near
        if not _is_loopback(host):
            tell(
                f"Whoever can reach {host} can use this run, without a password and unencrypted. "
                "To use it from another machine, an SSH tunnel (ssh -L) to 127.0.0.1 is safer."
            )
        tell(f"The page of {folder} is at http://{shown}:{number} (Ctrl-C ends it).")
        settings = uvicorn.Config(
            make_app(served, hosts=hosts), log_level="warning", server_header=False, limit_concurrency=100,
            timeout_keep_alive=5, timeout_graceful_shutdown=3, proxy_headers=False,  # which a client can write itself
        )  # fmt: skip
        if show:
            webbrowser.open(f"http://{shown}:{number}")
        uvicorn.Server(settings).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        remedy = "Choose another --port (0 takes a free one), or another --host"
        what = f"the page cannot be offered there ({getattr(error, 'strerror', None) or error})"
        raise RunError(what, f"{host}:{port}", remedy=remedy) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
