"""Adapters that Baskerville trained, put onto the trunk that came with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seqgraft.adapters import IA3, Adapter, Counts, Houlsby, LoRA, adapt
from seqgraft.errors import ModelError
from seqgraft.models.base import SequenceModel
from seqgraft.models.baskerville import Baskerville

__all__ = ["adapter_of", "load_baskerville_adapter"]

#: Their tensor -> ours, below the module that is wrapped.
_TENSORS = {
    "lora_a/kernel": "lora_A.default.weight",
    "lora_b/kernel": "lora_B.default.weight",
    "locon_down/kernel": "lora_A.default.weight",
    "locon_up/kernel": "lora_B.default.weight",
    "ia3/kernel": "ia3_l.default",
    "ia3_ff/kernel": "ia3_l.default",
    "adapter_down/kernel": "down.weight",
    "adapter_down/bias": "down.bias",
    "adapter_up/kernel": "up.weight",
    "adapter_up/bias": "up.bias",
    "dense/kernel": "squeeze.weight",
    "dense_1/kernel": "excite.weight",
}


def load_baskerville_adapter(
    model: SequenceModel, loaded: Baskerville, *, alpha: float = 16.0, conv_alpha: float = 1.0
) -> Counts:
    """Applies the adapter of a file to the model of that file (``loaded.model()``), with its trained tensors.

    Args:
        alpha, conv_alpha: ``lora_alpha`` and ``locon_alpha`` of the training, which the file does not tell.

    Raises:
        ModelError: no adapter in the file, or one that is on other modules than ours of that kind.
    """
    counts = adapt(model, adapter_of(loaded.adapter, alpha=alpha, conv_alpha=conv_alpha))
    own = dict(model.trunk.named_parameters())
    unset = {name for name in own if model.adapted.groups.get(f"trunk.{name}") == "adapter"}
    problems: list[str] = []
    with torch.no_grad():
        for key, tensor in loaded.adapter.items():
            module, _, part = key.partition(":")
            name = f"{module}.{_TENSORS.get(part, part)}"
            if name not in unset or own[name].numel() != tensor.numel():
                problems.append(f"{key} {tuple(tensor.shape)} has no place")
                continue
            own[name].copy_(tensor.reshape(own[name].shape))
            unset.remove(name)
    problems += [f"{name} is not in the file" for name in sorted(unset)]
    if problems:
        remedy = "Load the merged weights, *.mergeW.h5, instead"
        raise ModelError(
            "the adapter of the file does not fit ours", problems, where=model.adapter.label, remedy=remedy
        )
    return counts


def adapter_of(tensors: Mapping[str, Tensor], *, alpha: float = 16.0, conv_alpha: float = 1.0) -> Adapter:
    """The adapter that these tensors of a file are of (``Baskerville.adapter``).

    Raises:
        ModelError: none, or one that has no equal here.
    """
    at: dict[str, dict[str, Tensor]] = {}  # part -> module -> tensor
    for key, tensor in tensors.items():
        module, _, part = key.partition(":")
        at.setdefault(part, {})[module] = tensor
    attention = tuple(
        f"attention.{role}"
        for role in ("query", "key", "value", "output")
        if any(module.endswith(f".{role}") for part in ("lora_a/kernel", "ia3/kernel") for module in at.get(part, ()))
    )
    if "adapter_down/kernel" in at:
        excited = at.get("dense/kernel", {})
        rank = len(next(iter(excited.values()))) if excited else None
        width = len(next(iter(at["adapter_down/kernel"].values())))
        return Houlsby(width, squeeze_excite=rank, last=len(excited) or None)
    if "lora_a/kernel" in at:
        rank = len(next(iter(at["lora_a/kernel"].values())))
        if not (convs := at.get("locon_down/kernel", {})):
            return LoRA(rank, alpha, attention)
        conv_rank = len(next(iter(convs.values())))
        return LoRA(rank, alpha, (*attention, "conv"), last=len(convs), conv_rank=conv_rank, conv_alpha=conv_alpha)
    if "ia3/kernel" in at:
        inputs = ("feedforward.down",) if "ia3_ff/kernel" in at else ()
        return IA3((*attention, *inputs))
    raise ModelError(
        "the file has no adapter that is known here", sorted(at), remedy="Load it as a plain model, or merge it first"
    )
