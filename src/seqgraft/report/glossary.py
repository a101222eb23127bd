"""What the words of a page mean: only those that it uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from seqgraft.report.page import Chart, Facts, Section, Table

__all__ = ["words_section"]

#: Term, what to look for on the page (a regular expression), and what it means.
_WORDS = Path(__file__).with_name("words.tsv")


def words_section(title: str, sections: Sequence[Section]) -> Section | None:
    """The words of the page and what they mean; None if it uses none of them."""
    text = "\n".join([title, *(part for section in sections for part in _texts(section))])
    lines = (line.split("\t") for line in _WORDS.read_text(encoding="utf-8").splitlines()[1:])
    found = [(term, meaning) for term, pattern, meaning in lines if re.search(pattern, text)]
    return Section("What do the words mean?", (Facts.of(*found, wide=True),)) if found else None


def _texts(section: Section) -> Iterator[str]:
    """What a reader sees without opening anything; figures by their title, which holds their finding."""
    yield section.title
    if section.folded:
        return
    for block in section.blocks:
        if isinstance(block, Table):
            yield from (block.caption, *block.columns, *(cell.text for row in block.rows for cell in row))
        elif isinstance(block, Chart):
            label = re.search(r'aria-label="([^"]*)"', block.svg)
            yield from (block.caption, label[1] if label else "")
        elif isinstance(block, Facts):
            yield from (text for pair in block.pairs for text in pair)
