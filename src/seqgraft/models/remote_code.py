"""Code that comes with a checkpoint: run only where the user has named its commit, kept whole, and known by its hash.

A ``config.json`` with an ``auto_map`` names classes in Python files beside it. Nothing here runs them unless the commit
that the user allows (``model.remote_code``) is the one that they are recorded under; files of a model cannot allow it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from seqgraft.data.dataset import new_folder
from seqgraft.errors import ConfigError, ModelError, RunError
from seqgraft.genome import cache_folder

__all__ = ["allowing", "check_commit", "class_of", "read_code"]

_AGAIN = "Copy the model again"
_allowed: ContextVar[str | None] = ContextVar("allowed", default=None)


@contextmanager
def allowing(commit: str | None) -> Iterator[None]:
    """Within it, code that is recorded under this commit may run; None: no code.

    Raises:
        ConfigError: it is no full commit.
    """
    check_commit(commit)
    before = _allowed.set(commit)
    try:
        yield
    finally:
        _allowed.reset(before)


def check_commit(commit: str | None) -> None:
    """That it is a full commit, which stays the same, and no branch, which does not.

    Raises:
        ConfigError: it is not.
    """
    if commit is not None and not re.fullmatch(r"[0-9a-f]{40}", commit):
        remedy = "Give the 40 digits of the commit whose code you have read: a branch or a tag can change"
        raise ConfigError("must be a full commit", commit, where="model.remote_code", remedy=remedy)


def read_code(folder: Path, auto_map: Mapping[str, Any], repository: str, commit: str) -> dict[str, Any]:
    """The Python files of a folder as a value for the settings of a trunk; nothing is run.

    Args:
        auto_map: of ``config.json``: "AutoModel" and, where the type is not native, "AutoConfig" -> "MODULE.CLASS".
        repository, commit: where the files come from, for the record.

    Raises:
        ModelError: no class for "AutoModel", or one whose file is not there.
    """
    named = {role: str(auto_map[role]).rpartition("--")[2] for role in ("AutoConfig", "AutoModel") if role in auto_map}
    if "AutoModel" not in named:
        remedy = "Models for one task alone are not supported"
        raise ModelError("the code names no class for AutoModel", sorted(auto_map), where=folder, remedy=remedy)
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    if absent := [name for name in named.values() if f"{name.partition('.')[0]}.py" not in files]:
        raise ModelError("the code is missing", absent, where=folder, remedy="Copy the whole folder")
    return {
        "repository": repository,
        "commit": commit,
        "sha256": _sha256(files),
        "config": named.get("AutoConfig", ""),
        "model": named["AutoModel"],
        "files": files,
    }


def class_of(code: Mapping[str, Any], role: str) -> type[Any]:
    """The class that the code has for "config" or "model": runs the code.

    Raises:
        ConfigError: the user has not allowed this commit.
        ModelError: the files are not those of the hash, or cannot be imported.
    """
    commit, found = code["commit"], _sha256(code["files"])
    if commit != _allowed.get():
        remedy = (
            f"Read it, and if you trust it set model.remote_code: {commit} (--remote-code for commands);"
            " it then runs with your rights"
        )
        what = f"the model is made by Python code of {code['repository']}, which is not run unless you allow its commit"
        raise ConfigError(what, _allowed.get(), where="model.remote_code", remedy=remedy)
    odd = [name for name in code["files"] if not re.fullmatch(r"\w+\.py", name)]
    if found != code["sha256"] or odd:
        raise ModelError("the code is not that of its hash", odd or found, where=code["repository"], remedy=_AGAIN)
    folder = _written(code["files"], found)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        made: type[Any] = get_class_from_dynamic_module(code[role], str(folder))
    except (ImportError, AttributeError, SyntaxError, OSError, ValueError) as error:
        remedy = "It may need packages that are not installed, or another version of transformers"
        what = f"the code cannot be imported ({type(error).__name__}: {error})"
        raise ModelError(what, code[role], where=code["repository"], remedy=remedy) from error
    return made


def _sha256(files: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(files.items()):
        digest.update(f"{len(name)} {name} {len(text)} {text}".encode())
    return digest.hexdigest()


def _written(files: Mapping[str, str], sha256: str) -> Path:
    """A folder of the cache that has these files and no others."""
    folder = cache_folder() / "code" / sha256[:32]
    if not folder.exists():
        try:
            with new_folder(folder) as building:
                for name, text in files.items():
                    (building / name).write_text(text, encoding="utf-8")
        except RunError:
            if not folder.exists():  # else another process was faster, with the same files
                raise
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}
    if there != dict(files):
        raise ModelError("files of the cache were changed", str(folder), remedy="Remove the folder")
    return folder
