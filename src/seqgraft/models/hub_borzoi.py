"""Borzoi's and Flashzoi's weights in the Hugging Face layout of borzoi-pytorch, such as ``johahi/borzoi-replicate-0``,
``johahi/borzoi-replicate-0-mouse`` and ``johahi/flashzoi-replicate-0``.

``config.json`` names the sizes of the transformer, the heads and the crop. The widths of the convolutions and the
numbers of tracks are those of the weights. Flashzoi's attention packs queries, keys and values in one layer; here they
are three.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqgraft.errors import ModelError
from seqgraft.models.base import with_spec
from seqgraft.models.borzoi import Borzoi, bucket_rows, mask_widths
from seqgraft.models.huggingface import Loaded, Tracks, find_folder, make_heads, read_config, read_weights
from seqgraft.models.reading import LoadReport, Place, file_sha256, fill
from seqgraft.models.stages import rotary_frequencies

__all__ = ["load_borzoi"]

CITATION = (
    "Linder et al., Predicting RNA-seq coverage from DNA sequence as a unifying model of gene regulation, "
    "Nature Genetics 57, 2025, doi 10.1038/s41588-024-02053-6"
)
FLASHZOI_CITATION = (
    "Hingerl, Karollus & Gagneur, Flashzoi: an enhanced Borzoi model for accelerated genomic analysis, "
    "bioRxiv 2024, doi 10.1101/2024.12.18.629121"
)
#: What config.json means where it lacks an entry: later versions of the layout have more of them.
_DEFAULTS: Mapping[str, Any] = {
    "dim": 1536,
    "depth": 8,
    "heads": 8,
    "attn_dim_key": 64,
    "attn_dim_value": 192,
    "dropout_rate": 0.2,
    "attn_dropout": 0.05,
    "pos_dropout": 0.01,
    "return_center_bins_only": True,
    "bins_to_return": 6144,
    "enable_human_head": True,
    "enable_mouse_head": False,
    "flashed": False,
}
_ROTATED = 128  # of a head's queries and keys, in Flashzoi

# Our modules and theirs, by kind of stage; the numbers of the stages are those of `_module`.
_TOWER = [f"res_tower.{2 * i}" for i in range(5)] + ["unet1.1"]
_BLOCK = {
    "attention_norm": "0.fn.0",
    "attention.query": "0.fn.1.to_q",
    "attention.key": "0.fn.1.to_k",
    "attention.value": "0.fn.1.to_v",
    "attention.position": "0.fn.1.to_rel_k",
    "attention.output": "0.fn.1.to_out",
    "attention.content_bias": "0.fn.1.rel_content_bias",
    "attention.position_bias": "0.fn.1.rel_pos_bias",
    "feedforward_norm": "1.fn.0",
    "up": "1.fn.1",
    "down": "1.fn.4",
}
_PACKED, _OUTPUT = "0.fn.1.mha.Wqkv", "0.fn.1.mha.out_proj"
_UP = {
    "norm": "upsampling_unet{0}.0.norm",
    "below": "upsampling_unet{0}.0.conv_layer",
    "lateral_norm": "horizontal_conv{0}.norm",
    "lateral": "horizontal_conv{0}.conv_layer",
    "depthwise": "separable{0}.conv_layer.0",
    "pointwise": "separable{0}.conv_layer.1",
}


def load_borzoi(
    source: str | Path, *, revision: str | None = None, positions: int = 4096, tracks: Tracks = None
) -> Loaded:
    """Borzoi's or Flashzoi's trunk and heads from a folder or a hub id.

    Args:
        source, revision: see ``find_folder``.
        positions: of 128 bp in the training window.
        tracks: the tracks of each head. None: tracks named "human_0" and so on, whose units are unknown.

    Raises:
        ConfigError: see ``find_folder``.
        ModelError: files that are missing, truncated or of another model; tensors that do not fit.
    """
    folder = find_folder(source, revision)
    config = _read_config(folder)
    path, tensors = read_weights(folder)
    settings = {
        **_widths(tensors, path),
        "blocks": config["depth"],
        "heads": config["heads"],
        "positions": positions,
        "dropout": config["dropout_rate"],
        "attention_dropout": config["attn_dropout"],
        "position_dropout": config["pos_dropout"],
        **(_rotary(config) if config["flashed"] else {"key_size": config["attn_dim_key"]}),
    }
    if settings["tower"][-1] != config["dim"]:
        what = f"the weights are of another width than config.json says, {config['dim']}"
        raise ModelError(what, settings["tower"][-1], where=folder, remedy="Copy both files again, from one place")
    crop = _crop(config, positions, folder)
    names = {name: f"{name}_head" for name in ("human", "mouse") if config[f"enable_{name}_head"]}
    counts = {name: len(tensors[f"{head}.bias"]) for name, head in names.items() if f"{head}.bias" in tensors}
    if absent := sorted(set(names) - set(counts)):
        raise ModelError("the weights lack heads that config.json names", absent, where=path, remedy="Copy both again")
    with torch.device("meta"):  # memory and time for the weights once
        trunk = Borzoi(**settings, bin_size=32, crop=crop)
        heads, places = make_heads(counts, trunk.spec.channels, names, 3, tracks)
    places |= _places(trunk)
    tensors, left = _without_tables(tensors, trunk, path)
    matched = fill({"trunk.": trunk, **{f"heads.{key}.": head for key, head in heads.items()}}, places, tensors, path)
    citation = f"{FLASHZOI_CITATION}; {CITATION}" if config["flashed"] else CITATION
    with_spec(trunk, citation=citation, folds="borzoi" if "human" in names else "borzoi_mouse")
    for module in (trunk, *heads.values()):
        module.eval()
    window = positions * trunk.stride
    report = LoadReport(path, file_sha256(path), matched, left=left)
    return Loaded(trunk, heads, report, window, window // 32 - 2 * crop)


def _read_config(folder: Path) -> dict[str, Any]:
    config = {**_DEFAULTS, **read_config(folder, "borzoi")}
    wrong = {
        key: config[key]
        for key, default in _DEFAULTS.items()
        if not (type(config[key]) is type(default) or (isinstance(default, float) and type(config[key]) is int))
    }
    if wrong:
        expected = {key: _DEFAULTS[key] for key in wrong}
        remedy = f"Copy the file again; values are such as {expected}"
        what = "these entries have values of another kind"
        raise ModelError(what, wrong, where=folder / "config.json", remedy=remedy)
    if config["heads"] < 1 or config["dim"] % config["heads"]:
        what = "dim must be a multiple of heads"
        raise ModelError(what, (config["dim"], config["heads"]), where=folder / "config.json")
    if not config["flashed"] and config["attn_dim_value"] * config["heads"] != config["dim"]:
        what = f"values of another width than dim / heads, {config['dim'] // config['heads']}, are not supported"
        raise ModelError(what, config["attn_dim_value"], where=folder / "config.json")
    return config


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of Flashzoi's attention, which are fixed in its code: half as many heads of keys as of queries."""
    return {
        "attention": "rotary",
        "key_size": config["dim"] // config["heads"],
        "key_heads": max(config["heads"] // 2, 1),
        "rotary_size": _ROTATED,
    }


def _widths(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The channels of the convolutions, which config.json does not name."""
    stem, *tower = (f"{name}.weight" for name in ("conv_dna.conv_layer", *(f"{at}.conv_layer" for at in _TOWER)))
    final = "final_joined_convs.0.conv_layer.weight"
    if missing := sorted({stem, *tower, final} - set(tensors)):
        remedy = "Copy or download the file again"
        raise ModelError("the weights lack convolutions of Borzoi", missing, where=path, remedy=remedy)
    return {
        "stem": len(tensors[stem]),
        "tower": [len(tensors[name]) for name in tower],
        "final": len(tensors[final]),
    }


def _crop(config: Mapping[str, Any], positions: int, folder: Path) -> int:
    """Bins that are dropped at each end: down to those asked for, or 16, of each end; -1 asks for all."""
    made = 4 * positions
    asked = config["bins_to_return"] if config["return_center_bins_only"] else made - 32
    crop, odd = divmod(made - (made if asked == -1 else asked), 2)
    if odd or crop < 0 or 2 * crop >= made:
        what, remedy = f"{made} bins cannot be cropped evenly to", "Give the positions of the training window"
        raise ModelError(what, asked, where=folder, remedy=remedy)
    return crop


def _places(trunk: Borzoi) -> dict[str, Place]:
    """Where every tensor of the trunk stands there, ``trunk.stages.STAGE.MODULE.PARAMETER`` here."""
    found = {}
    for name, tensor in trunk.state_dict().items():
        stage, rest = name.removeprefix("stages.").split(".", 1)
        kind, _, number = stage.partition("_")
        module, _, parameter = rest.rpartition(".")
        shape = tuple(tensor.shape)
        place = Place(f"{_module(kind, int(number or 0), module)}.{parameter}", shape)
        if kind == "transformer" and rest in _BLOCK:  # a parameter of the attention itself
            place = Place(f"transformer.{number}.{_BLOCK[rest]}", shape)
        elif kind == "transformer" and trunk.settings["attention"] == "rotary" and module.startswith("attention."):
            place = _packed(trunk, int(number), module.removeprefix("attention."), parameter, shape)
        found[f"trunk.{name}"] = place
    return found


def _module(kind: str, number: int, module: str) -> str:
    """The name there of a module of a stage."""
    layer = "conv_layer" if module == "conv" else module
    if kind == "stem":
        return f"conv_dna.{layer}"
    if kind == "tower":
        return f"{_TOWER[number]}.{layer}"
    if kind == "transformer":
        return f"transformer.{number}.{_BLOCK.get(module, module)}"
    if kind == "upsample":
        return _UP[module].format(1 - number)
    return f"final_joined_convs.0.{layer}"


def _packed(trunk: Borzoi, block: int, layer: str, parameter: str, shape: tuple[int, ...]) -> Place:
    """Queries, keys and values are rows of one layer, in this order, each head by head."""
    at = f"transformer.{block}."
    if layer == "output":
        return Place(f"{at}{_OUTPUT}.{parameter}", shape)
    attention = trunk.get_submodule(f"stages.transformer_{block}.attention")
    sizes = [len(getattr(attention, name).bias) for name in ("query", "key", "value")]
    number = ("query", "key", "value").index(layer)
    first = sum(sizes[:number])
    return Place(f"{at}{_PACKED}.{parameter}", (sum(sizes), *shape[1:]), range(first, first + sizes[number]))


def _without_tables(
    tensors: Mapping[str, Tensor], trunk: Borzoi, path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors without tables of positions, which some versions store and which are computed here: they must agree.

    ``positions``: features of each distance, ``(2n - 1, features)``; ``inv_freq``: radians per position.
    """
    left = tuple(name for name in tensors if name.endswith((".fn.1.positions", ".rotary_emb.inv_freq")))
    for name in left:
        table = tensors[name].float()
        if name.endswith("inv_freq"):
            expected = rotary_frequencies(int(trunk.settings["rotary_size"]), float(trunk.settings["rotary_base"]))
        else:
            widths = mask_widths(int(trunk.settings["position_features"]) // 2, int(trunk.settings["positions"]))
            features, rows = bucket_rows((len(table) + 1) // 2, widths, torch.device("cpu"))
            expected = features[rows]
        if table.shape != expected.shape or not torch.allclose(table, expected, rtol=1e-3, atol=0):
            what = "the file has a table of positions that is not the one its model computes"
            raise ModelError(what, name, where=path, remedy="Take the weights from their publisher")
    return {name: value for name, value in tensors.items() if name not in left}, left
