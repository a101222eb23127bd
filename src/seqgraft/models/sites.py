"""Where adapters can go in a module that says nothing about itself: by the type and the name of each part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from seqgraft.errors import ModelError, Problems
from seqgraft.models.base import Trunk

__all__ = ["Found", "find_sites"]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
#: Last part of the name of a linear layer -> its role in attention or feed-forward.
_ROLES = {
    "attention.query": r"q|query|q_proj|query_proj|to_q|w_?q|q_lin",
    "attention.key": r"k|key|k_proj|key_proj|to_k|w_?k|k_lin",
    "attention.value": r"v|value|v_proj|value_proj|to_v|w_?v|v_lin",
    "attention": r"qkv|w_?qkv|to_qkv|qkv_proj|in_proj|to_kv",
    "feedforward.up": r"up|up_proj|gate_proj|fc1|linear1|lin1|w1",
    "feedforward.down": r"down|down_proj|fc2|linear2|lin2|w2",
}
_OUTPUTS = r"o|out|output|o_proj|out_proj|to_out|proj|w_?o|out_lin|dense"
_AROUND = {
    "attention": r"attn|attention|self_?attn|mha|self_?attention",
    "feedforward": r"mlp|ffn?|feed_?forward",
}


@dataclass(frozen=True)
class Found:
    """A module with weights of its own: its name in the trunk, its class, its sites, and why it has none."""

    name: str
    layer: str
    sites: tuple[str, ...]
    note: str = ""


def find_sites(
    trunk: Trunk, given: Mapping[str, tuple[str, ...]] | None, called: set[str], where: str
) -> tuple[Found, ...]:
    """The modules with weights, in the order of the trunk, and their sites.

    Args:
        given: site -> names relative to the wrapped module, instead of what type and name say.
        called: the names in the trunk of the modules that run as modules.

    Raises:
        ModelError: a given site that matches nothing, or a module there that is not called or has no weights.
    """
    wanted = None if given is None else _given(trunk, given, called, where)
    siblings: dict[str, set[str]] = {}
    for name, _ in trunk.named_modules():
        siblings.setdefault(name.rpartition(".")[0], set()).add(name.rpartition(".")[2].lower())
    found = []
    for name, module in trunk.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        sites, note = _by_type(name, module, siblings[name.rpartition(".")[0]])
        if name not in called:
            sites, note = (), "never called: its weights are read elsewhere"
        if wanted is not None:
            sites = tuple(site for site, names in wanted.items() if name in names)
            note = "" if sites else note or "not among the sites given"
        found.append(Found(name, type(module).__name__, sites, note))
    return tuple(found)


def _given(
    trunk: Trunk, given: Mapping[str, Sequence[str]], called: set[str], where: str
) -> dict[str, tuple[str, ...]]:
    modules = dict(trunk.named_modules())
    problems = Problems(ModelError)
    sites: dict[str, tuple[str, ...]] = {}
    for site, names in given.items():
        if not names:
            problems.add("a site has no modules", site, where=where, remedy="Leave the site out")
        sites[site] = tuple(next((m for m in _in_trunk(trunk, name) if m in modules), name) for name in names)
        for name, there in zip(names, sites[site], strict=True):
            if there not in modules:
                problems.add(f"the site {site!r} names a module that there is not", name, where=where)
            elif there not in called:
                what = f"the site {site!r} names a module that is never called: its weights are read elsewhere"
                problems.add(what, name, where=where, remedy="Leave it out")
    problems.raise_if_any()
    return sites


def _in_trunk(trunk: Trunk, name: str) -> list[str]:
    """Where a module of the user's is in the trunk: in the one stage, or in the stage that its name starts with."""
    first, _, rest = name.partition(".")
    inside = f"stages.{first}.inner.{rest}" if rest else f"stages.{first}.inner"
    return [inside, f"stages.module.inner.{name}"] if "module" in trunk.stages else [inside]


def _by_type(name: str, module: nn.Module, siblings: set[str]) -> tuple[tuple[str, ...], str]:
    """Sites and, where there are none, the reason."""
    if isinstance(module, _NORMS):
        return ("norm",), ""
    if type(module) is nn.Conv1d:
        return (("conv",), "") if module.groups == 1 else ((), "a grouped convolution")
    if type(module) is nn.Linear:
        return _linear(name, siblings), ""
    return (), "adapters take Conv1d, Linear and norms, and no subclass of them"


def _linear(name: str, siblings: set[str]) -> tuple[str, ...]:
    *path, last = name.lower().split(".")
    around = next((site for site, words in _AROUND.items() if any(re.fullmatch(words, part) for part in path)), None)
    if around is None and any(re.fullmatch(_ROLES["attention.query"], sibling) for sibling in siblings):
        around = "attention"
    role = next((role for role, words in _ROLES.items() if re.fullmatch(words, last)), None)
    if around == "attention" and re.fullmatch(_OUTPUTS, last):
        role = "attention.output"
    if role is not None and not (around == "feedforward" and role.startswith("attention")):
        return (role.partition(".")[0], role) if "." in role else (role,)
    return (around,) if around else ("linear",)
