"""Run directories to one self-contained HTML page: no network, no third-party script, every name escaped."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from seqgraft.errors import ConfigError, RunError
from seqgraft.report.comparison import comparison_page
from seqgraft.report.page import Page, is_run, read_run
from seqgraft.report.run import run_page
from seqgraft.report.sweep import is_sweep, sweep_page

__all__ = ["write_comparison", "write_report"]

_HERE = Path(__file__).parent


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes ``report.html`` of a run directory, a sweep, or a folder of run directories (one table and plot for all).

    An unfinished run gets a report too, which says what is missing.

    Returns:
        The page's path; ``out``, or ``report.html`` in the folder.

    Raises:
        ConfigError: the folder holds neither a run nor runs.
        RunError: the page cannot be written, or a sweep has no tables yet.
    """
    run = Path(run)
    out = Path(out) if out is not None else run / "report.html"
    if is_sweep(run):
        return _write(sweep_page(run), out)
    if is_run(run):
        return _write(run_page(read_run(run)), out)
    runs = sorted(folder for folder in run.iterdir() if folder.is_dir() and is_run(folder)) if run.is_dir() else []
    if not runs:
        remedy = "Give a folder that 'seqgraft fit' wrote, or one with several of these"
        raise ConfigError("there is no run in the folder", str(run), remedy=remedy)
    return write_comparison(runs, out)


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Writes one page that compares run directories, with the baselines of all of them.

    Raises:
        ConfigError: no runs, or a folder that is none.
        RunError: the page cannot be written.
    """
    strangers = [str(run) for run in runs if not is_run(Path(run))]
    if strangers or not runs:
        raise ConfigError("these are not run directories", strangers, remedy="Give folders that 'seqgraft fit' wrote")
    return _write(comparison_page([read_run(Path(run)) for run in runs]), Path(out))


def render(page: Page) -> str:
    """The HTML of a page."""
    loader = FileSystemLoader(_HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["parts"] = _parts
    style, script = (_HERE.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("template.html").render(page=page, style=style, script=script, digest=digest)


def _parts(text: str) -> tuple[str, str]:
    """``0.76 (0.74 to 0.78)`` as the value and its interval, which is "" where there is none."""
    found = re.fullmatch(r"(\S+) (\(\S+ to \S+\))", text)
    return (found[1], found[2]) if found else (text, "")


def _write(page: Page, out: Path) -> Path:
    text = render(page)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        remedy = "Choose another place for it, or free some disk space"
        raise RunError(f"the report cannot be written ({error.strerror})", str(out), remedy=remedy) from error
    finally:
        if part.exists():
            part.unlink()
    return out
