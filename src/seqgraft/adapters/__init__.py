"""Adapters: what a fine-tuned model trains, beside its heads.

To add one, write a frozen dataclass that derives from ``Adapter`` and list it in ``ADAPTERS``; the contract tests run
on every entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqgraft.adapters.base import (
    Adapted,
    Adapter,
    Counts,
    adapt,
    check_gradients,
    merge,
    parameter_groups,
)
from seqgraft.adapters.bottleneck import Houlsby
from seqgraft.adapters.files import SavedAdapter, read_adapter, restore, save_adapter
from seqgraft.adapters.freeze import FullFineTune, LinearProbe
from seqgraft.adapters.lora import IA3, LoRA, Peft
from seqgraft.adapters.prompt import Prompt
from seqgraft.errors import ModelError
from seqgraft.models.base import SequenceModel

__all__ = [
    "ADAPTERS",
    "IA3",
    "Adapted",
    "Adapter",
    "Counts",
    "FullFineTune",
    "Houlsby",
    "LinearProbe",
    "LoRA",
    "Peft",
    "Prompt",
    "SavedAdapter",
    "adapt",
    "check_gradients",
    "load_adapter",
    "make_adapter",
    "merge",
    "parameter_groups",
    "read_adapter",
    "save_adapter",
]

#: Kind, as written in configurations and files -> adapter.
ADAPTERS: dict[str, type[Adapter]] = {
    adapter.kind: adapter for adapter in (LinearProbe, FullFineTune, LoRA, IA3, Houlsby, Peft, Prompt)
}


def make_adapter(kind: str, settings: Mapping[str, Any]) -> Adapter:
    """An adapter from what ``adapter.json`` says of it.

    Raises:
        ModelError: an unknown kind or setting.
    """
    if kind not in ADAPTERS:
        raise ModelError("there is no adapter of this kind", kind, remedy=f"The kinds are {', '.join(ADAPTERS)}")
    try:
        return ADAPTERS[kind](**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})
    except TypeError as error:
        what = f"the adapter {kind!r} cannot be made from these settings ({error})"
        raise ModelError(what, dict(settings)) from error


def load_adapter(model: SequenceModel, folder: Path | str) -> Counts:
    """Applies a saved adapter to a freshly built model, heads included; ends in eval mode.

    Raises:
        ModelError: no adapter there, a damaged one, or one for other base weights, tracks or shapes.
    """
    saved = read_adapter(folder)
    return restore(model, make_adapter(saved.kind, saved.settings), saved)
