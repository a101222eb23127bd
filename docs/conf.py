"""Sphinx: MyST pages, furo, and the API from docstrings. Built with warnings as errors (see .ci/run)."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import seqgraft

project = "seqgraft"
author = "seqgraft contributors"
copyright = "seqgraft contributors, Apache-2.0"
release = version = seqgraft.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"seqgraft {release}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]
# design.md shows YAML with placeholders and plain-text trees; both are shown as they are.
suppress_warnings = ["misc.highlighting_failure"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}

SOURCE = Path(seqgraft.__file__).parent
NOT_API = {"__init__", "__main__", "cli"}


def add_modules(app: object, docname: str, source: list[str]) -> None:
    """Appends one section per public module to api.md, so that the page lists what exists and nothing else."""
    if docname != "api":
        return
    files = sorted(path for path in SOURCE.rglob("*.py") if path.stem not in NOT_API)
    for path in files:
        name = ".".join(("seqgraft", *path.relative_to(SOURCE).with_suffix("").parts))
        source[0] += f"\n## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"


def plain_docstring(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: paragraphs are prose with ``code``; indented or listed ones stay as they are."""
    paragraphs = re.split(r"\n\s*\n", textwrap.dedent("\n".join(lines)).strip("\n"))
    shown: list[str] = []
    for paragraph in paragraphs:
        text = paragraph.split("\n")
        if text == ["::"]:
            continue
        if any(re.match(r"\s|[-*+] |\d+[.)] |\|", line) for line in text):
            shown += ["::", "", *(f"    {line}" for line in text), ""]
        else:
            shown += [*(escape(line) for line in text), ""]
    lines[:] = shown


def escape(line: str) -> str:
    """Keeps ``code`` and takes every other mark literally."""
    parts = re.split(r"(``[^`]+``)", line.removesuffix("::") + (":" if line.endswith("::") else ""))
    return "".join(part if part.startswith("``") else re.sub(r"([*_|`\\])", r"\\\1", part) for part in parts)


def setup(app: object) -> None:
    app.connect("source-read", add_modules)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", plain_docstring)  # type: ignore[attr-defined]
