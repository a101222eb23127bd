"""Runs a guide as its reader would: files are written, Python and commands run, in order, in one folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from seqgraft.__main__ import main
from test_readme import ROOT, blocks


def seqgraft(line: str, more: Mapping[str, Sequence[str]] | None = None) -> None:
    """Runs a command in this process, with more settings for those that are named; it must succeed."""
    words = shlex.split(line, comments=True)
    assert words[0] == "seqgraft", line
    words += [word for setting in (more or {}).get(words[1], ()) for word in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code, line


def run_guide(name: str) -> dict[str, Any]:
    """Everything on `docs/guides/NAME.md`, in the current folder; what its Python has named."""
    path, names = ROOT / "docs" / "guides" / f"{name}.md", {}
    found = [block for block in blocks(path.read_text()) if block.language]
    assert {block.marker.partition(":")[0] for block in found} <= {"run", "file", "not run"}
    for block in found:
        if block.marker.startswith("not run"):
            continue
        if block.marker != "run":
            Path(block.marker.removeprefix("file: ")).write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, path.name, "exec"), names)
        else:
            for line in block.code.splitlines():
                seqgraft(line)
    return names
