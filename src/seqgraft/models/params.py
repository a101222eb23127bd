"""What Baskerville's ``params.json`` says of a network of the Borzoi family, as settings of the trunk ``borzoi``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqgraft.errors import ConfigError, Problems

__all__ = ["Network", "read_params"]


@dataclass(frozen=True)
class Network:
    """What ``params.json`` says of a network.

    Attributes:
        settings: of the trunk ``borzoi``.
        bin_size: bp per bin. crop: bins dropped at each end. window: bp of the input.
        heads: name ("human", "mouse") -> tracks.
    """

    settings: Mapping[str, Any]
    bin_size: int
    crop: int
    window: int
    heads: Mapping[str, int]

    @property
    def bins(self) -> int:
        return self.window // self.bin_size - 2 * self.crop


_IGNORED = {"l2_scale", "mha_l2_scale", "kernel_initializer", "mha_initializer", "bn_momentum", "name"}  # of training
_MODEL = {"seq_length", "augment_rc", "augment_shift", "activation", "norm_type", "trunk", "verbose"}
_ADAPTER = {"adapter", "adapter_latent", "conv_select", "conv_latent", "se_rank"}
#: Block -> its keys: a default (None: needed), or in a tuple the values without which it is another family.
_BLOCKS: dict[str, dict[str, Any]] = {
    "conv_dna": {
        "filters": None,
        "kernel_size": None,
        "norm_type": (None,),
        "activation": ("linear",),
        "pool_size": (2,),
    },
    "res_tower": {
        "filters_init": None,
        "filters_end": None,
        "divisible_by": 1,
        "kernel_size": 1,
        "num_convs": (1,),
        "pool_size": (2,),
        "repeat": 1,
    },
    "transformer_tower": {
        "key_size": None,
        "heads": None,
        "num_position_features": None,
        "dropout": 0.0,
        "repeat": 1,
        "attention_dropout": 0.05,
        "position_dropout": 0.01,
        "seqlen_train": 0,
    },
    "unet_conv": {"kernel_size": 1, "upsample_conv": False},
    "Cropping1D": {"cropping": None},
    "conv_nac": {"filters": None, "kernel_size": (1,), "dropout": 0.0},
}
_ORDER = re.compile(r"conv_dna,res_tower,transformer_tower,(unet_conv,)*(Cropping1D,)?(conv_nac,)?")
#: What a key with needed values means where it is absent.
_ABSENT = {"num_convs": 1, "kernel_size": 1}


def read_params(params: Path | str | Mapping[str, Any]) -> Network:
    """The network that a ``params.json`` of Baskerville describes.

    Raises:
        ConfigError: no such file, not JSON, or a network of another family; all problems at once.
    """
    where = params if isinstance(params, str | Path) else "params.json"
    content = _json(Path(params)) if isinstance(params, str | Path) else params
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(model.get("trunk"), list):
        raise ConfigError(
            "the file describes no model with a trunk", where=where, remedy="Take Baskerville's params.json"
        )
    problems = Problems(ConfigError)
    heads = {key.removeprefix("head_"): value for key, value in model.items() if re.match("head(_|$)", key)}
    if unknown := sorted(set(model) - _MODEL - _IGNORED - _ADAPTER - {k for k in model if re.match("head(_|$)", k)}):
        problems.add("the model has settings that are not known here", unknown, where=where)
    for key, allowed in (("activation", ("gelu",)), ("norm_type", ("batch", "batch-sync"))):
        if model.get(key) not in allowed:
            problems.add(f"{key} must be one of {allowed}", model.get(key), where=where)
    for name, head in heads.items():
        if head.get("activation") != "softplus":
            problems.add(f"the head {name!r} must end in softplus", head.get("activation"), where=where)
    names = [str(block.get("name")) for block in model["trunk"]]
    if not _ORDER.fullmatch("".join(f"{name}," for name in names)):
        what = "the blocks of the trunk are not those of the Borzoi family"
        problems.add(what, names, where=where, remedy=f"They are, in this order, {', '.join(_BLOCKS)}")
        problems.raise_if_any()
    blocks = [_block(block, problems, where) for block in model["trunk"]]
    unets = [block for name, block in zip(names, blocks, strict=True) if name == "unet_conv"]
    if any(unet != unets[0] for unet in unets):
        problems.add("the unet_conv blocks must be alike", unets, where=where)
    problems.raise_if_any()
    by_name = dict(zip(names, blocks, strict=True))
    dna, tower, attend = (by_name[name] for name in ("conv_dna", "res_tower", "transformer_tower"))
    final = by_name.get("conv_nac", {"filters": 0, "dropout": 0.0})
    unet = unets[0] if unets else {"kernel_size": 3, "upsample_conv": False}
    resolution, window = 2 ** (1 + tower["repeat"]), int(model["seq_length"])
    settings = {
        "stem": dna["filters"],
        "stem_kernel": dna["kernel_size"],
        "tower": _filters(tower),
        "tower_kernel": tower["kernel_size"],
        "blocks": attend["repeat"],
        "heads": attend["heads"],
        "key_size": attend["key_size"],
        "position_features": attend["num_position_features"],
        "positions": attend["seqlen_train"] or window // resolution,
        "upsample_kernel": unet["kernel_size"],
        "upsample_conv": unet["upsample_conv"],
        "final": final["filters"],
        "dropout": attend["dropout"],
        "attention_dropout": attend["attention_dropout"],
        "position_dropout": attend["position_dropout"],
        "final_dropout": final["dropout"],
    }
    crop = int(by_name.get("Cropping1D", {"cropping": 0})["cropping"])
    sizes = {name: int(head["units"]) for name, head in heads.items()}
    return Network(settings, resolution // 2 ** len(unets), crop, window, sizes)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError("the file does not exist", where=path, remedy="Check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file is not valid JSON ({error})", where=path) from error


def _block(block: Mapping[str, Any], problems: Problems, where: object) -> dict[str, Any]:
    name = str(block["name"])
    known, where = _BLOCKS[name], f"{where}, {name}"
    if unknown := sorted(set(block) - set(known) - _IGNORED):
        problems.add("the block has settings that are not known here", unknown, where=where)
    found = {}
    for key, rule in known.items():
        needed = isinstance(rule, tuple)
        found[key] = block.get(key, _ABSENT.get(key) if needed else rule)
        if needed and found[key] not in rule:
            problems.add(f"{key} must be {rule[0]!r}", found[key], where=where)
        elif rule is None and found[key] is None:
            problems.add("the block needs", key, where=where)
    return found


def _filters(tower: Mapping[str, Any]) -> list[int]:
    """From ``filters_init`` to ``filters_end`` in equal ratios, each rounded to a multiple of ``divisible_by``."""
    first, last, steps, unit = (tower[key] for key in ("filters_init", "filters_end", "repeat", "divisible_by"))
    ratio = (last / first) ** (1 / (steps - 1)) if steps > 1 else 1.0
    return [round(first * ratio**step / unit) * unit for step in range(steps)]
