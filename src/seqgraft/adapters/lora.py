"""Low-rank and scaling adapters: the only door to peft and to bitsandbytes, both imported when one is applied.

Modules are named exactly, never by a pattern that may match more or less than meant. peft builds the low-rank
convolution without the dilation and the padding mode of its base; a subclass here sets them.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from seqgraft.adapters.base import Adapter, check_types, explained, freeze, modules_at
from seqgraft.errors import ConfigError, ModelError, Problems, RunError
from seqgraft.genome import cache_folder
from seqgraft.models.base import SequenceModel, Trunk

# They warn that an optional kernel was not fetched from the hub, and at every product that it is one of float16.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)

__all__ = ["IA3", "LoRA", "Peft", "ScaledConv"]


@dataclass(frozen=True)
class LoRA(Adapter):
    """W + (alpha / rank) B A on linear layers and convolutions (Hu et al. 2021); with B = 0 it starts as the identity.

    A convolution's A has its kernel size and B is 1 wide, so the receptive field stays.

    Args:
        rank: of the change.
        alpha: its scale is alpha / rank; twice the rank if None.
        where: sites; ``("conv",)`` is LoCon.
        dora: learn the norm of each output's weights apart from their direction (Liu et al. 2024).
        quantize: hold the frozen linear layers of all sites in 4 bits ("nf4") or 8 ("int8", which casts their
            inputs to float16); needs ``seqgraft[quant]``. Merging puts the change on the layers as they were before.
        last: of the site "conv" only the last so many modules.
        dropout: on the input of A, in training.
        rslora: scale by alpha / sqrt(rank) instead.
        conv_rank, conv_alpha: of convolutions, where they are not to be those of linear layers.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float | None = None
    where: tuple[str, ...] = ("attention",)
    dora: bool = False
    quantize: Literal["nf4", "int8"] | None = None
    last: int | None = None
    dropout: float = 0.0
    rslora: bool = False
    conv_rank: int | None = None
    conv_alpha: float | None = None

    @classmethod
    def baskerville(cls, convs: int = 0) -> LoRA:
        """Baskerville's "lora", and with ``convs=4`` its "locon": also in the last so many convolutions, of rank 4."""
        where = ("attention.query", "attention.value")
        if not convs:
            return cls(8, 16.0, where)
        return cls(8, 16.0, (*where, "conv"), last=convs, conv_rank=4, conv_alpha=1.0)

    def __post_init__(self) -> None:
        for rank in (self.rank, 1 if self.conv_rank is None else self.conv_rank):
            if rank < 1:
                raise ConfigError("the rank must be at least 1", rank, where="adapter lora")
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout must be at least 0 and below 1", self.dropout, where="adapter lora")
        if self.quantize not in (None, "nf4", "int8"):
            raise ConfigError("quantize must be 'nf4' or 'int8'", self.quantize, where="adapter lora")
        if self.dora and self.quantize == "int8":
            raise ConfigError("DoRA does not work on an 8-bit base", where="adapter lora", remedy="Use quantize: nf4")

    @property
    def label(self) -> str:
        name, sites = self._names
        return f"{name} r={self.rank}{sites}"

    @property
    def method(self) -> str:
        return "".join(self._names)

    @property
    def size(self) -> int:
        return self.rank

    @property
    def _names(self) -> tuple[str, str]:
        name = "DoRA" if self.dora else "LoCon" if set(self.where) == {"conv"} else "LoRA"
        name = f"Q{name} {self.quantize}" if self.quantize else name
        return name, "" if name.startswith("LoCon") else f" ({', '.join(self.where)})"

    def modules(self, trunk: Trunk) -> tuple[str, ...]:
        names = modules_at(trunk, self.where, self.last)
        check_types(trunk, names, self.label, nn.Linear, nn.Conv1d)
        for name in names if self.dora and self.dropout else ():
            if getattr(trunk.get_submodule(name), "padding_mode", "zeros") != "zeros":
                what = "DoRA with dropout cannot reach a convolution that is not padded with zeros"
                raise ModelError(what, name, where=self.label)
        return names

    def prepare(self, trunk: Trunk) -> None:
        if self.quantize is not None:
            linears = [
                name
                for name in modules_at(trunk, [site for site, names in trunk.spec.sites.items() if names])
                if type(trunk.get_submodule(name)) is nn.Linear
            ]
            _quantize(trunk, linears, self.quantize)

    def apply(self, model: SequenceModel) -> None:
        settings: dict[str, Any] = {
            "r": self.rank,
            "lora_alpha": 2 * self.rank if self.alpha is None else self.alpha,
            "use_dora": self.dora,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
        }
        names = modules_at(model.trunk, self.where, self.last)
        convs = _exactly([name for name in names if isinstance(model.trunk.get_submodule(name), nn.Conv1d)])
        if self.conv_rank is not None:
            settings["rank_pattern"] = {convs: self.conv_rank}
        if (alpha := self._conv_alpha) is not None:
            settings["alpha_pattern"] = {convs: alpha}
        _inject(model.trunk, names, "LORA", settings, self.label, self.quantize)

    @property
    def _conv_alpha(self) -> float | None:
        """Twice the rank if only that is given."""
        return 2 * self.conv_rank if self.conv_alpha is None and self.conv_rank is not None else self.conv_alpha

    def fold(self, model: SequenceModel) -> None:
        if self.quantize is not None:
            self._restore_precision(model)
        _fold(model.trunk, self.label)

    def _restore_precision(self, model: SequenceModel) -> None:
        """Moves the low-rank tensors onto the full-precision base."""
        trunk = model.trunk
        tensors = {name: p.detach() for name, p in trunk.named_parameters() if ".lora_" in name}
        device = next(iter(tensors.values())).device
        for name, linear in vars(trunk).pop(_FULL_PRECISION).layers():
            trunk.set_submodule(name, linear.to(device))
        for name in modules_at(trunk, self.where, self.last):
            if hasattr(module := trunk.get_submodule(name), "get_base_layer"):
                trunk.set_submodule(name, module.get_base_layer())  # type: ignore[operator]
        replace(self, quantize=None).apply(model)
        parameters = dict(trunk.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)


_SCALED_INPUTS = "feedforward.down"
_SCALED = {"attention": ("attention.key", "attention.value"), "feedforward": (_SCALED_INPUTS,)}


@dataclass(frozen=True)
class IA3(Adapter):
    """Learned scales of activations (Liu et al. 2022); they start at 1.

    "attention" means the outputs of keys and values, "feedforward" the inputs of the down-projection, "conv" the
    outputs of convolutions; any other site scales outputs.
    """

    kind: ClassVar[str] = "ia3"
    where: tuple[str, ...] = ("attention", "feedforward")

    @classmethod
    def baskerville(cls) -> IA3:
        """Baskerville's "ia3" on the layers that it was meant for.

        There, the down-projections are looked for by a width of 1536. Borzoi's have 3072, so that others are scaled
        instead, its up-projections and the dense layers of the way up.
        """
        return cls()

    @property
    def label(self) -> str:
        return f"IA3 ({', '.join(self.where)})"

    def modules(self, trunk: Trunk) -> tuple[str, ...]:
        names = modules_at(trunk, self._sites)
        check_types(trunk, names, self.label, nn.Linear, nn.Conv1d)
        return names

    def apply(self, model: SequenceModel) -> None:
        trunk = model.trunk
        names = self.modules(trunk)
        inputs = set(modules_at(trunk, (_SCALED_INPUTS,))) if _SCALED_INPUTS in self._sites else set()
        linears = [name for name in names if isinstance(trunk.get_submodule(name), nn.Linear)]
        if linears:
            feedforward = _exactly([name for name in linears if name in inputs])
            _inject(trunk, linears, "IA3", {"feedforward_modules": feedforward}, self.label)
        for name in names:
            if isinstance(module := trunk.get_submodule(name), nn.Conv1d):
                trunk.set_submodule(name, ScaledConv(module))

    def fold(self, model: SequenceModel) -> None:
        _fold(model.trunk, self.label)

    @property
    def _sites(self) -> tuple[str, ...]:
        return tuple(meant for site in self.where for meant in _SCALED.get(site, (site,)))


class ScaledConv(nn.Module):
    """A convolution whose outputs ``(batch, channels, positions)`` are scaled per channel."""

    def __init__(self, base_layer: nn.Conv1d) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scale = nn.Parameter(base_layer.weight.new_ones(base_layer.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y * self.scale[:, None]

    @torch.no_grad()
    def folded(self) -> nn.Conv1d:
        """The convolution with the scales in its weights."""
        self.base_layer.weight.mul_(self.scale[:, None, None])
        if self.base_layer.bias is not None:
            self.base_layer.bias.mul_(self.scale)
        return self.base_layer


@dataclass(frozen=True)
class Peft(Adapter):
    """Any other method of peft that works on plain modules, with the same guards.

    Args:
        type: peft's name for it, such as "vera", "loha", "lokr", "oft", "ln_tuning".
        where: sites.
        settings: arguments of the method's configuration.
    """

    kind: ClassVar[str] = "peft"
    type: str = "vera"
    where: tuple[str, ...] = ("attention",)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if remedy := _REFUSED.get(self.type.lower()):
            raise ConfigError(
                "this method of peft is not available here", self.type, where="adapter peft", remedy=remedy
            )

    @property
    def label(self) -> str:
        return f"{self.type} ({', '.join(self.where)})"

    def modules(self, trunk: Trunk) -> tuple[str, ...]:
        names = modules_at(trunk, self.where)
        problems = Problems(ModelError)
        for name in names:
            module = trunk.get_submodule(name)
            if isinstance(module, nn.Conv1d) and (module.groups > 1 or module.padding_mode != "zeros"):
                what = f"{self.type} cannot reach the convolution {name!r}, which is grouped or not padded with zeros"
                problems.add(what, str(module), remedy="Choose other sites")
        problems.raise_if_any()
        return names

    def apply(self, model: SequenceModel) -> None:
        _inject(model.trunk, modules_at(model.trunk, self.where), self.type.upper(), self.settings, self.label)
        for module in model.trunk.modules():
            if isinstance(module, _NormBase):  # a trainable copy of a BatchNorm keeps its statistics too
                module.frozen = True  # type: ignore[assignment]  # a flag that models.base reads

    def fold(self, model: SequenceModel) -> None:
        _fold(model.trunk, self.label)


_REFUSED = {
    "lora": "Use the adapter lora",
    "ia3": "Use the adapter ia3",
    "adalora": "Its ranks change inside the training loop; use the adapter lora",
    "xlora": "It mixes adapters that exist already; use the adapter lora",
    **dict.fromkeys(
        ("prompt_tuning", "p_tuning", "multitask_prompt_tuning"),
        "Use the adapter prompt: trained vectors before tokens",
    ),
    **dict.fromkeys(
        ("prefix_tuning", "adaption_prompt", "cpt", "cartridge"),
        "It needs a causal model of transformers; the adapter prompt puts trained vectors before tokens of any",
    ),
}
_FULL_PRECISION = "full_precision"  # of a quantised trunk: its linear layers as they were, for merging


def _exactly(names: Sequence[str]) -> str:
    """A regular expression that matches these names and nothing else."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


def _inject(
    trunk: Trunk,
    names: Sequence[str],
    method: str,
    settings: Mapping[str, Any],
    label: str,
    quantize: str | None = None,
) -> None:
    """Wraps the named modules in peft's layers; their parameters train."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer

    configs: dict[Any, Any] = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    tuners: dict[Any, Any] = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    if method not in tuners:
        known = sorted(name.lower() for name in tuners if name.lower() not in _REFUSED)
        remedy = f"Choose from {', '.join(known)}"
        what = "peft has no method of this name for single modules"
        raise ModelError(what, method.lower(), where=label, remedy=remedy)
    with explained("peft refuses these settings", label):
        config = configs[method](target_modules=_exactly(names), **settings)
    if method == "LORA":
        config._register_custom_module({nn.Conv1d: _lora_conv()})
    flags = {"nf4": ["is_loaded_in_4bit"], "int8": ["is_loaded_in_8bit"]}.get(quantize or "", [])
    vars(trunk).update(dict.fromkeys(flags, True))  # peft asks the model, not the module
    with explained("peft cannot adapt these modules", label):
        # The tuner itself, and not inject_adapter_in_model: that refuses methods whose layers share tensors (VeRA).
        tuners[method](trunk, config, "default")
    for left in ("peft_config", *flags):
        vars(trunk).pop(left, None)
    if missed := [name for name in names if not isinstance(trunk.get_submodule(name), BaseTunerLayer)]:
        raise ModelError("peft has left these modules as they were", missed, where=label, remedy="Choose other sites")


def _fold(trunk: Trunk, label: str) -> None:
    """Merges every wrapper into the module that it wraps, and puts that back in its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(trunk.named_modules()):
        if isinstance(module, ScaledConv):
            trunk.set_submodule(name, module.folded())
        elif isinstance(module, BaseTunerLayer):
            with explained(f"{name} cannot be merged", label):
                module.merge(safe_merge=True)
            trunk.set_submodule(name, module.get_base_layer())


@cache
def _lora_conv() -> type[nn.Module]:
    """peft's Conv1d layer, whose A takes the dilation and the padding mode of its base."""
    from peft.tuners.lora.layer import Conv1d

    class LoraConv1d(Conv1d):
        def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            super().update_layer(adapter_name, *args, **kwargs)
            base, low = self.get_base_layer(), self.lora_A[adapter_name]
            low.dilation, low.padding_mode = base.dilation, base.padding_mode
            low._reversed_padding_repeated_twice = base._reversed_padding_repeated_twice

    return LoraConv1d


def _quantize(trunk: Trunk, names: Sequence[str], kind: str) -> None:
    """Replaces linear layers by quantised ones; the full-precision ones go to disk."""
    try:
        import bitsandbytes
    except ImportError as error:
        what = "quantize needs the package bitsandbytes, which is not installed"
        raise ModelError(what, kind, remedy="pip install 'seqgraft[quant]'") from error
    layers: Any = bitsandbytes.nn
    kept = _OnDisk()
    for name in names:
        linear = trunk.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        if kind == "nf4":
            quantised = layers.Linear4bit(*shape, bias=bias, quant_type="nf4")
            quantised.support_avx512bf16_for_cpu = False  # a packed layout for inference that widths must fit
        else:
            quantised = layers.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        quantised.load_state_dict(linear.state_dict())
        trunk.set_submodule(name, quantised.to(linear.weight.device))  # moving it is what quantises
        kept.add(name, linear)
    vars(trunk)[_FULL_PRECISION] = kept


class _OnDisk:
    """Linear layers in a file without a name, which goes with this object: in memory they would undo the quantising."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        with self._explained():
            (folder := cache_folder()).mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (open as long as the trunk is quantised)

    def __deepcopy__(self, memo: object) -> _OnDisk:
        return self  # nothing in it changes

    def add(self, name: str, linear: nn.Linear) -> None:
        content = safetensors.torch.save({part: tensor.cpu() for part, tensor in linear.state_dict().items()})
        self._sizes[name] = len(content)
        with self._explained():
            self._file.write(content)
            self._file.flush()

    def layers(self) -> Iterator[tuple[str, nn.Linear]]:
        """The layers by name, frozen, one at a time."""
        self._file.seek(0)
        for name, size in self._sizes.items():
            tensors = safetensors.torch.load(self._file.read(size))
            outputs, inputs = tensors["weight"].shape
            linear = nn.Linear(inputs, outputs, bias="bias" in tensors, device="meta")
            linear.load_state_dict(tensors, assign=True)
            freeze(linear)
            yield name, linear

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"the layers as they were before quantising cannot be kept on disk ({error.strerror})"
            remedy = "Free some space, or point SEQGRAFT_CACHE to another folder"
            raise RunError(what, str(cache_folder()), where="adapter lora", remedy=remedy) from error
