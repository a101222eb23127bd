"""Folders of the Hugging Face layout: the door to huggingface_hub, and to pickled weights, of which nothing is run.

::

    FOLDER/
      config.json                              model_type and sizes
      model.safetensors or pytorch_model.bin   the weights

What the tensors of a model type are called is in ``hub_borzoi.py``, ``hub_enformer.py`` and ``hub_language.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqgraft.errors import ConfigError, ModelError
from seqgraft.models.base import Head, Trunk
from seqgraft.models.reading import LoadReport, Place, read_tensors
from seqgraft.tracks import TrackTable

__all__ = [
    "WEIGHTS",
    "Loaded",
    "Tracks",
    "find_code",
    "find_folder",
    "is_hub_id",
    "make_heads",
    "read_config",
    "read_weights",
    "refusals",
]

#: Files of weights, of which the first that is there is read.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

#: Tables of tracks by the name of their head; "" names the only one. None: tracks without names or units.
Tracks = Mapping[str, TrackTable] | None


@dataclass(frozen=True)
class Loaded:
    """Trunk and heads with their weights, both in float32 and eval mode.

    Attributes:
        heads: by group of tracks: "human" and "mouse", or "human_CAGE" and so on where tables of tracks were given.
        window: input length in bp that the output bins belong to.
    """

    trunk: Trunk
    heads: Mapping[str, Head]
    report: LoadReport
    window: int
    bins: int


def is_hub_id(source: str) -> bool:
    """Whether it is written as the id of a repository, ``OWNER/NAME``."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", source) is not None


def find_folder(source: str | Path, revision: str | None = None, more: Sequence[str] = ()) -> Path:
    """A local folder as it is, or the snapshot of a Hugging Face repository in the local cache, downloaded if need be.

    Args:
        source: the path of a folder, or a hub id such as ``EleutherAI/enformer-official-rough``.
        revision: the full commit of the repository; needed for a hub id, so that the weights stay the same.
        more: files that are wanted beside ``config.json`` and the weights, where the repository has them.

    Raises:
        ConfigError: a hub id without a commit, or a folder with one.
        ModelError: it is neither, or it cannot be downloaded.
    """
    if Path(source).is_dir():
        if revision is not None:
            what = "only a hub id has a revision, and this is a folder"
            raise ConfigError(what, revision, where=str(source), remedy="Leave it out")
        return Path(source)
    if not is_hub_id(str(source)):
        raise ModelError("there is no such folder", str(source), remedy="Give a folder with a config.json, or a hub id")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        remedy = "Give the 40 digits of a commit, from the repository's history on the hub"
        raise ConfigError("a hub id needs the commit that is meant", revision, where=str(source), remedy=remedy)
    for weights in WEIGHTS:  # one of them, where a repository has both
        folder = _download(str(source), revision, ["config.json", weights, *more])
        if (folder / weights).exists():
            break
    return folder


def find_code(repository: str, commit: str) -> Path:
    """The snapshot of a repository's Python files in the local cache, downloaded if need be; none is run.

    Raises:
        ModelError: it cannot be downloaded.
    """
    return _download(repository, commit, ["*.py"])


def _download(repository: str, commit: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repository, revision=commit, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(
            f"the repository cannot be downloaded ({type(error).__name__}: {error})",
            where=repository,
            remedy="Check name, commit and network, or copy the files into a folder and give its path",
        ) from error


def refusals() -> tuple[type[Exception], ...]:
    """What classes of transformers raise where a description makes no model."""
    from huggingface_hub.errors import StrictDataclassError

    return (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError)


def read_config(folder: Path, *model_types: str) -> dict[str, Any]:
    """What ``config.json`` says, of a model of one of the given types, or of any if none is given.

    Raises:
        ModelError: no such file, not JSON, or a model of another type.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ModelError("the description of the model is missing", str(path), remedy="Copy the whole folder")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"the file is not valid JSON ({error})", where=path, remedy="Copy or download it again"
        ) from error
    if isinstance(config, dict) and "alibi_starting_size" in config:  # DNABERT-2, whose description has no type
        config.setdefault("model_type", "bert")
    if not isinstance(config, dict) or (model_types and config.get("model_type") not in model_types):
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        remedy = f"model_type must be {' or '.join(model_types)}"
        raise ModelError("the folder holds another model", found, where=path, remedy=remedy)
    return config


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of the weights, safetensors before others, and what is in it.

    Raises:
        ModelError: none is there; it is truncated, or holds more than tensors.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise ModelError("the weights are missing", list(WEIGHTS), where=folder, remedy="Copy the whole folder")
    if path.suffix == ".safetensors":
        return path, read_tensors(path)
    again = "The file may be truncated: copy or download it again"
    try:
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            remedy = "Do not open it with other tools; take the weights from their publisher"
            raise ModelError(
                "the weights hold more than tensors, which could run code", unsafe, where=path, remedy=remedy
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        first = str(error).partition("\n")[0]
        raise ModelError(f"the weights cannot be read ({first})", str(path), remedy=again) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError("the file is no table of tensors", type(content).__name__, where=path, remedy=again)
    return path, {str(name): value for name, value in content.items()}


def make_heads(
    counts: Mapping[str, int], channels: int, names: Mapping[str, str], ndim: int, tracks: Tracks
) -> tuple[dict[str, Head], dict[str, Place]]:
    """Heads by group of tracks, and where their tensors stand in the file, whose heads have all groups in one.

    Args:
        counts: name of a head in the file -> its tracks.
        channels: that it reads.
        names: name of a head -> that of its module in the file.
        ndim: axes of its weight there: 2 for a linear layer, 3 for a convolution of width 1.

    Raises:
        ModelError: a table for a head that is not there, none for one that is, or one of another size.
    """
    tables = dict(tracks) if tracks is not None else {name: _unnamed(name, count) for name, count in counts.items()}
    if len(counts) == 1 and set(tables) == {""}:
        tables = {next(iter(counts)): tables[""]}
    given = {name: len(table) for name, table in tables.items()}
    if given != dict(counts):
        what = f"the heads and their numbers of tracks are {dict(counts)}, and the tables have"
        raise ModelError(what, given, where="tracks", remedy="Give one table for each head, and none for others")
    heads: dict[str, Head] = {}
    places: dict[str, Place] = {}
    for name, table in tables.items():
        shape = (counts[name], channels, 1)[:ndim]
        for group, index in table.groups.items():
            key = name if group in ("", name) else f"{name}_{group}".replace(".", "_")
            chosen = table.select([table.names[i] for i in index])
            heads[key] = Head(chosen.replace(link="softplus", group=key), channels)
            rows = [int(i) for i in index]
            places[f"heads.{key}.out.weight"] = Place(f"{names[name]}.weight", shape, rows)
            places[f"heads.{key}.out.bias"] = Place(f"{names[name]}.bias", shape[:1], rows)
    return heads, places


def _unnamed(head: str, count: int) -> TrackTable:
    return TrackTable.build({"name": f"{head}_{i}", "group": head, "link": "softplus"} for i in range(count))
