"""docs/troubleshooting.md quotes messages that the code has, and the quickstart's table has every command."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from seqgraft.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("|") and "---" not in line]
#: What is quoted as a message: code of three words or more in the first column.
QUOTED = [text for row in ROWS for text in re.findall(r"`([^`]+)`", row[0]) if len(text.split()) > 2]


@cache
def templates() -> list[tuple[re.Pattern[str], int]]:
    """Every text of the code as a pattern, any text where it has a value; and how many letters are its own."""
    found: dict[str, int] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else None for p in parts]
            if any(texts):
                pattern = "".join(".+" if text is None else re.escape(text) for text in texts)
                pattern += ".+" if pattern.endswith("\\ ") else ""  # something is added to it
                found[pattern] = sum(len(text or "") for text in texts)
    return [(re.compile(pattern), own) for pattern, own in found.items() if own >= 12]


def is_real(message: str) -> bool:
    """Whether the code has the text, with or without the value that follows it."""
    forms = {message, message.partition(": ")[0]}
    return any(
        pattern.fullmatch(form) and own >= 0.4 * len(form)
        for form in forms
        if len(form) > 9
        for pattern, own in templates()
    )


@pytest.mark.parametrize("message", QUOTED)
def test_messages_are_real(message: str) -> None:
    assert is_real(message), message


def test_what_is_not_said_is_not_real() -> None:
    assert len(QUOTED) > 60
    for message in (
        "the bigWig has no chromosomes",
        "the file is not in order",
        "the loss is infinite",
        "this is a message",
    ):
        assert not is_real(message), message


def test_every_row_has_a_cause_and_a_change() -> None:
    assert all(len(row) == 3 and all(row) for row in ROWS)


def test_the_quickstart_has_every_command() -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text()
    listed = re.findall(r"^\| `seqgraft (\w+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(command.name or command.callback.__name__ for command in app.registered_commands)
