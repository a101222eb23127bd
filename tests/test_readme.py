"""What the README shows is run, and the design has the tree and the layers that the package has.

Every fenced block of code has a comment before it that says what it is:

    <!-- install -->             one command, which .ci/run runs in a fresh environment
    <!-- run -->                 Python or shell, run here, in order, in one folder that starts empty
    <!-- file: NAME -->          written to that folder under its name
    <!-- not run: REASON -->     shown only; its commands must exist
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from test_architecture import LAYERS, SOURCE

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(
    r"^(?:<!-- *(?P<marker>[^>]*?) *-->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `marker` is the text of the comment on the line before it."""

    language: str
    marker: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(found["language"], found["marker"] or "", found["code"], text.count("\n", 0, found.start()) + 1)
        for found in FENCE.finditer(text)
    ]


README = [block for block in blocks((ROOT / "README.md").read_text()) if block.language]


def test_every_block_says_what_it_is() -> None:
    assert README
    unclear = [
        f"line {block.line}"
        for block in README
        if not re.fullmatch(r"install|run|file: [\w./-]+|not run: .+", block.marker)
    ]
    assert not unclear, f"Put one of the comments that {Path(__file__).name} lists before the block: {unclear}"


def test_ci_runs_the_install_commands() -> None:
    commands = [block.code.strip() for block in README if block.marker == "install"]
    script = (ROOT / ".ci" / "run").read_text()
    assert len(commands) == 2
    for command in commands:
        assert "\n" not in command
        assert f'"{command}"' in script, f".ci/run does not run {command}"


def test_blocks_run(tmp_path: Path) -> None:
    """In order and in one folder, so that a later block may use what an earlier one made."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in README:
        if block.marker.startswith("file: "):
            target = tmp_path / block.marker.removeprefix("file: ")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.code)
        elif block.marker == "run":
            command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
            done = subprocess.run(
                [*command, block.code],
                cwd=tmp_path,
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                timeout=280,
                check=False,
            )
            assert done.returncode == 0, f"README line {block.line}:\n{done.stdout}{done.stderr}"
            promised = re.findall(r"^print\(.*\)  # (.+)$", block.code, re.MULTILINE)
            assert [line for line in promised if line not in done.stdout.splitlines()] == []


@pytest.mark.parametrize("block", README, ids=lambda block: f"line {block.line}")
def test_block_is_well_formed(block: Block) -> None:
    if block.language == "python":
        compile(block.code, "README.md", "exec")
    elif block.language == "yaml":
        assert isinstance(yaml.safe_load(block.code), dict)
    else:
        assert block.language == "sh"
        subprocess.run(["bash", "-n", "-c", block.code], check=True)


def test_commands_exist() -> None:
    lines = [line for block in README if block.language == "sh" for line in block.code.splitlines()]
    used = {
        words[words.index("seqgraft") + 1]
        for line in lines
        if "seqgraft" in (words := shlex.split(line, comments=True))
    }
    shown = subprocess.run(
        [sys.executable, "-m", "seqgraft", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert not [command for command in used if not re.search(rf"\b{re.escape(command)}\b", shown)]


# ---- docs/design.md ----

DESIGN = (ROOT / "docs" / "design.md").read_text()


def test_the_tree_of_the_design_is_the_package() -> None:
    tree = DESIGN.partition("## 3. Tree")[2].partition("*Planned* files")[0]
    named = set(re.findall(r"\b(\w+\.(?:py|json|html|css|js))\b", tree))
    names = {path.name for path in SOURCE.rglob("*") if path.suffix in (".py", ".html", ".css", ".js")}
    names |= {path.name for path in (SOURCE / "data").glob("*.json")}
    names.discard("__init__.py")
    assert named == names


def test_the_layers_of_the_design_are_those_that_are_checked() -> None:
    """Every module stands in a row of the table, and the rows come in the order of LAYERS."""
    rows = re.findall(r"^\| (\d) \| (.+) \|$", DESIGN.partition("## 4.")[0], re.MULTILINE)
    assert [number for number, _ in rows] == [str(number) for number in range(len(rows))]
    row_of: dict[str, int] = {}
    for number, modules in rows:
        written = re.sub(r"\([^)]*\*planned\*\)", "", modules)
        row_of |= {word: int(number) for word in re.findall(r"[a-z_]+", written) if word not in ("then",)}
    ranked = [[name for name in row if name] for row in LAYERS]
    flat = [(name.partition(".")[0], rank) for rank, row in enumerate(ranked) for name in row]
    assert {name for name, _ in flat} == set(row_of)
    for (before, low), (after, high) in pairwise(flat):
        assert low == high or row_of[before] <= row_of[after], (before, after)
