"""The saved form, the same for all adapters.

::

    NAME/
      adapter.json          kind, settings, base model and hashes of its weights, track table, folds, format version
      weights.safetensors   exactly the trainable tensors and the changed buffers, heads included
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqgraft.adapters.base import Adapter, Counts, adapt, adapted_of, check_frozen
from seqgraft.data.dataset import new_folder, write_json
from seqgraft.errors import DataError, ModelError, Problems
from seqgraft.models.base import SequenceModel, trainable_state
from seqgraft.tracks import TrackTable

__all__ = ["SavedAdapter", "read_adapter", "restore", "save_adapter"]

FORMAT, FORMAT_VERSION = "seqgraft-adapter", 1
#: What ``adapter.json`` says -> its type.
_SMALL = 4096  # what every setting may be, whatever the tensors
_ENTRIES: Mapping[str, type] = {"kind": str, "settings": dict, "label": str, "base": dict, "tracks": list}


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's folder holds."""

    kind: str
    settings: Mapping[str, Any]
    label: str
    base: Mapping[str, str]
    tracks: TrackTable
    folds: Any
    tensors: Mapping[str, Tensor]


def save_adapter(
    model: SequenceModel,
    folder: Path,
    base: Mapping[str, str],
    folds: object = None,
    *,
    replace_existing: bool = False,
) -> None:
    """Writes ``adapter.json`` and ``weights.safetensors`` with exactly the trainable tensors and changed buffers.

    The folder appears by rename after its tensors were read back and found equal.

    Args:
        base: how to build the model below: at least its "name".
        folds: which regions it was trained, validated and tested on; kept as it is.

    Raises:
        ModelError: a frozen tensor has moved, or the tensors read back differ from the model's.
        RunError: the folder exists or cannot be written.
    """
    adapted = adapted_of(model)
    check_frozen(model)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in trainable_state(model).items()}
    rows = model.tracks.to_frame().astype(object)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": adapted.adapter.kind,
        "label": adapted.adapter.label,
        "settings": asdict(adapted.adapter),  # type: ignore[call-overload]  # every adapter is a dataclass
        "base": {**base, **adapted.base},
        "folds": folds,
        "tracks": rows.where(rows.notna(), None).to_dict("records"),
    }
    with new_folder(Path(folder), replace_existing=replace_existing) as building:
        write_json(building / "adapter.json", content)
        save_file(tensors, building / "weights.safetensors")
        written = _read_tensors(building / "weights.safetensors")
        names = sorted(tensors.keys() | written.keys())
        if differing := [name for name in names if not _same(tensors.get(name), written.get(name))]:
            what = "the tensors read back from disk differ from the model's"
            raise ModelError(what, differing, where=folder, remedy="Check the disk; nothing was kept")


def read_adapter(folder: Path | str) -> SavedAdapter:
    """Reads a saved adapter.

    Raises:
        ModelError: not an adapter, one of another format version, or damaged.
    """
    path = Path(folder) / "adapter.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        remedy = "Give the folder that has adapter.json"
        raise ModelError("this folder holds no adapter", str(folder), remedy=remedy) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"the file is not valid JSON ({error})", where=path) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError("the file does not describe an adapter", where=path)
    if content.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"the adapter has another format version than this seqgraft reads ({FORMAT_VERSION})",
            content.get("format_version"),
            where=path,
            remedy="Use the version that made it",
        )
    odd = [key for key, kind in _ENTRIES.items() if key in content and not isinstance(content[key], kind)]
    if not odd and not all(isinstance(row, dict) for row in content.get("tracks", [])):
        odd = ["tracks"]
    if odd:
        raise ModelError("these entries have values of another kind", odd, where=path, remedy="Copy the folder again")
    try:
        return SavedAdapter(
            kind=content["kind"],
            settings=content["settings"],
            label=content["label"],
            base=content["base"],
            tracks=TrackTable.build(content["tracks"]) if content["tracks"] else TrackTable.none(),
            folds=content["folds"],
            tensors=_read_tensors(Path(folder) / "weights.safetensors"),
        )
    except KeyError as error:
        raise ModelError("the adapter's description lacks an entry", error.args[0], where=path) from error
    except DataError as error:
        raise ModelError(f"the adapter's track table is damaged ({error})", where=path) from error


def restore(model: SequenceModel, adapter: Adapter, saved: SavedAdapter) -> Counts:
    """Adapts a freshly built model and gives it the saved tensors; ends in eval mode.

    Raises:
        ModelError: other base weights or tracks than the adapter was trained on; tensors that are missing, left over or
            misshaped; settings that ask for larger ones.
    """
    _check_settings(saved)
    counts = adapt(model, adapter)
    problems = Problems(ModelError)
    if adapted_of(model).frozen:  # where everything is saved, what was below does not matter
        for part, found in adapted_of(model).base.items():
            if saved.base.get(part) != found:
                problems.add(
                    f"the adapter was trained on other base weights ({part} {saved.base.get(part)}) than the model has",
                    found,
                    where=saved.label,
                    remedy="Build the model from the weights that the adapter names",
                )
    if model.tracks.names != saved.tracks.names:
        remedy = "Build the heads from the adapter's track table"
        problems.add(
            "the adapter's tracks differ from the model's", saved.tracks.names, where=saved.label, remedy=remedy
        )
    state = trainable_state(model)
    for name in sorted(state.keys() | saved.tensors.keys()):
        if name not in saved.tensors:
            problems.add("the adapter lacks the tensor", name, where=saved.label)
        elif name not in state:
            problems.add("the adapter has a tensor too many", name, where=saved.label)
        elif (found := _form(saved.tensors[name])) != (expected := _form(state[name])):
            what = f"the tensor {name!r} has another shape or another type than in the model, {expected}"
            problems.add(what, found, where=saved.label)
    problems.raise_if_any()
    with torch.no_grad():
        for name, tensor in saved.tensors.items():
            state[name].copy_(tensor)
    model.eval()
    return counts


def _check_settings(saved: SavedAdapter) -> None:
    """Refuses ranks, widths and lengths beyond all sizes of the tensors, before memory is asked for them."""
    most = max([_SMALL, *(size for tensor in saved.tensors.values() for size in tensor.shape)])
    parts: list[Any] = [saved.settings]
    while parts:
        part = parts.pop()
        if isinstance(part, (Mapping, list)):
            parts += part.values() if isinstance(part, Mapping) else part
        elif isinstance(part, int) and part > most:
            what, remedy = "a setting is larger than any size of the adapter's tensors", "Copy the folder again"
            raise ModelError(what, part, where=saved.label, remedy=remedy)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and _form(a) == _form(b) and _bytes(a) == _bytes(b)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ModelError("the adapter has no weights", path.name, where=path.parent) from error
    except SafetensorError as error:
        remedy = "The file is truncated or damaged; save the adapter again"
        raise ModelError(
            f"the weights cannot be read ({error})", path.name, where=path.parent, remedy=remedy
        ) from error
