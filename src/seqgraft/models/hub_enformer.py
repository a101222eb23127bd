"""Enformer's weights in the Hugging Face layout of ``EleutherAI/enformer-official-rough``, that of enformer-pytorch.

The tensors are ``stem.*, conv_tower.*, transformer.*, final_pointwise.*, _heads.NAME.*``. Every one is accounted for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqgraft.errors import ModelError
from seqgraft.models.base import with_spec
from seqgraft.models.enformer import Enformer
from seqgraft.models.huggingface import Loaded, Tracks, find_folder, make_heads, read_config, read_weights
from seqgraft.models.reading import LoadReport, Place, file_sha256, fill

__all__ = ["PUBLISHED", "load_enformer"]

PUBLISHED = "EleutherAI/enformer-official-rough"
CITATION = (
    "Avsec et al., Effective gene expression prediction from sequence by integrating long-range interactions, "
    "Nature Methods 18, 2021, doi 10.1038/s41592-021-01252-x"
)

# Where our stages and their modules stand there.
_STAGES = {"stem": "stem", "tower": "conv_tower", "transformer": "transformer", "final": "final_pointwise"}
_RESIDUAL = {"mix_norm": "1.fn.0", "mix": "1.fn.2", "pool.logits": "2.to_attn_logits"}
_MODULES = {
    "stem": {"conv": "0", **_RESIDUAL},
    "tower": {"norm": "0.0", "conv": "0.2", **_RESIDUAL},
    "transformer": {
        "attention_norm": "0.fn.0",
        "query": "0.fn.1.to_q",
        "key": "0.fn.1.to_k",
        "value": "0.fn.1.to_v",
        "output": "0.fn.1.to_out",
        "position": "0.fn.1.to_rel_k",
        "content_bias": "0.fn.1.rel_content_bias",
        "position_bias": "0.fn.1.rel_pos_bias",
        "feedforward_norm": "1.fn.0",
        "up": "1.fn.1",
        "down": "1.fn.4",
    },
    "final": {"norm": "1.0", "conv": "1.2"},
}
# The same tensors under a second name, of which a file may have either or both.
_ALIASES = {
    "_trunk.1.": "stem.",
    "_trunk.2.": "conv_tower.",
    "_trunk.4.": "transformer.",
    "_trunk.6.": "final_pointwise.",
}
# Settings of the trunk and their keys in config.json.
_SETTINGS = {
    "channels": "dim",
    "depth": "depth",
    "heads": "heads",
    "key_size": "attn_dim_key",
    "divisible_by": "dim_divisible_by",
    "dropout": "dropout_rate",
    "attention_dropout": "attn_dropout",
    "position_dropout": "pos_dropout",
}
_RATES = ("dropout_rate", "attn_dropout", "pos_dropout")
_OTHERS = ("num_downsamples", "target_length", "output_heads")


def load_enformer(
    source: str | Path,
    *,
    revision: str | None = None,
    tensorflow_gamma: bool | None = None,
    positions: int = 1536,
    tracks: Tracks = None,
) -> Loaded:
    """Enformer's trunk and heads from a folder or a hub id.

    Args:
        source, revision: see ``find_folder``.
        tensorflow_gamma: which gamma features the weights were trained with: True for the published ones, False for
            those that enformer-pytorch trained without its table. None: as ``config.json`` says (``use_tf_gamma``).
        positions: of 128 bp (of the model's bin size) in the training window.
        tracks: the tracks of each head. None: tracks named "human_0" and so on, whose units are unknown.

    Raises:
        ConfigError: see ``find_folder``.
        ModelError: files that are missing, truncated or of another model; tensors that do not fit.
    """
    folder = find_folder(source, revision)
    config = _read_config(folder)
    if tensorflow_gamma is None:
        tensorflow_gamma = True if str(source) == PUBLISHED else config.get("use_tf_gamma")
    if tensorflow_gamma is None:
        raise ModelError(
            "config.json does not say which gamma features the weights were trained with (use_tf_gamma)",
            where=folder,
            remedy=f'Add "use_tf_gamma": true to it for copies of {PUBLISHED}, false for weights of '
            "enformer-pytorch's own, or pass tensorflow_gamma",
        )
    bins = config["target_length"] if config["target_length"] != -1 else positions
    crop, odd = divmod(positions - bins, 2)
    if odd or crop < 0:
        what = f"{positions} positions cannot be cropped evenly to"
        raise ModelError(what, bins, where=folder, remedy="Give the positions of the training window")
    settings = {ours: config[theirs] for ours, theirs in _SETTINGS.items()}
    with torch.device("meta"):  # memory and time for the weights once
        trunk = Enformer(
            **settings,
            positions=positions,
            gamma_per_position=not tensorflow_gamma,
            bin_size=2 ** config["num_downsamples"],
            crop=crop,
        )
        names = {name: f"_heads.{name}.0" for name in config["output_heads"]}
        heads, places = make_heads(config["output_heads"], trunk.spec.channels, names, 2, tracks)
    path, tensors = read_weights(folder)
    tensors, left = _without_aliases(tensors, path)
    places |= {f"trunk.{name}": _place(name, tuple(t.shape)) for name, t in trunk.state_dict().items()}
    matched = fill({"trunk.": trunk, **{f"heads.{key}.": head for key, head in heads.items()}}, places, tensors, path)
    with_spec(trunk, citation=CITATION, folds="enformer")
    for module in (trunk, *heads.values()):
        module.eval()
    report = LoadReport(path, file_sha256(path), matched, left=left)
    return Loaded(trunk, heads, report, positions * trunk.spec.bin_size, bins)


def _read_config(folder: Path) -> dict[str, Any]:
    config, path = read_config(folder, "enformer"), folder / "config.json"
    if absent := [key for key in (*_SETTINGS.values(), *_OTHERS) if key not in config]:
        raise ModelError("the model's description lacks entries", absent, where=path, remedy="Copy the file again")
    counts = config["output_heads"]
    whole = [key for key in (*_SETTINGS.values(), *_OTHERS[:2]) if key not in _RATES]
    wrong = [key for key in whole if type(config[key]) is not int]
    if not isinstance(counts, dict) or not counts or any(type(n) is not int or n < 1 for n in counts.values()):
        wrong.append("output_heads")
    if wrong:
        raise ModelError("these entries are not whole numbers", {key: config[key] for key in wrong}, where=path)
    if config.get("use_convnext"):
        raise ModelError("a variant with ConvNeXt blocks is not supported", "use_convnext: true", where=path)
    return config


def _without_aliases(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors by their first names, and the second names that were left because the first is there too."""
    found, left, differ = dict(tensors), [], []
    for name in tensors:
        prefix = next((alias for alias in _ALIASES if name.startswith(alias)), None)
        if prefix is None:
            continue
        first = _ALIASES[prefix] + name.removeprefix(prefix)
        value = found.pop(name)
        if first not in tensors:
            found[first] = value
            continue
        left.append(name)
        if not torch.equal(tensors[first], value):
            differ.append((first, name))
    if differ:
        raise ModelError("tensors that should be the same differ", differ[:5], where=path)
    return found, tuple(left)


def _place(name: str, shape: tuple[int, ...]) -> Place:
    """Where a tensor of the trunk stands there, ``stages.STAGE.MODULE.PARAMETER`` here."""
    _, stage, rest = name.split(".", 2)
    kind, _, number = stage.partition("_")
    modules = _MODULES[kind]
    at = f"{_STAGES[kind]}.{number}." if number else f"{_STAGES[kind]}."
    if rest in modules:  # a parameter of the block itself
        return Place(at + modules[rest], (1, *shape))
    module, _, parameter = rest.rpartition(".")
    return Place(f"{at}{modules[module]}.{parameter}", (*shape, 1) if module == "pool.logits" else shape)
