"""Any module as a trunk: what it does is found by running it, and what does not fit is an error before anything trains.

::

    trunk = wrap(network, ModuleSpec("mine", channels=64, bin_size=8))
    print(describe(trunk))                        # which modules adapters can change, and why not the others

The module takes one-hot ``(batch, 4, length)`` and returns ``(batch, channels, bins)``; where it does something else,
``ModuleSpec.call`` says how. An ``nn.Sequential``, or a mapping of modules that run one after the other, is a chain of
stages; any other module is one stage. To use it by name in runs, see ``folders.register``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor, nn

from seqgraft.errors import ModelError
from seqgraft.models.base import State, Trunk, TrunkSpec
from seqgraft.models.dryrun import Chain, dry_run
from seqgraft.models.module import ModuleSpec, WrappedStage
from seqgraft.models.sites import find_sites
from seqgraft.models.stages import Crop

__all__ = ["ModuleSpec", "WrappedTrunk", "describe", "redraw", "trunk_class", "wrap"]


class WrappedTrunk(Trunk):
    """A trunk around a module, which it takes over; ``wrap`` and ``folders.register`` make it.

    Args:
        module: the network, or the modules of a chain by name.
        spec: what is known of it.
        crop: bins dropped at each end, those that the module drops included.

    Raises:
        ModelError: naming everything that the dry run found wrong.
    """

    #: Of a registered module: makes it with random or pretrained weights.
    make: ClassVar[Callable[..., nn.Module | Mapping[str, nn.Module]] | None] = None
    about: ClassVar[ModuleSpec]

    def __init__(self, module: nn.Module | Mapping[str, nn.Module], spec: ModuleSpec, crop: int = 0) -> None:
        super().__init__()
        self.settings: Mapping[str, Any] = {}
        self.stride, self.drops = spec.multiple, spec.drops
        self.stages = chain = Chain()
        for name, inner in _modules_of(module, spec).items():
            if name == "crop" or "." in name or name in dir(nn.ModuleDict):
                raise ModelError("a stage cannot have this name", name, where=spec.name, remedy="Rename the module")
            chain[name] = WrappedStage(inner, spec.call, self.stride)
        for inner in self.modules():
            if getattr(inner, "inplace", False):
                inner.inplace = False  # type: ignore[assignment]  # a stage must not change the state it was given
            if isinstance(inner, nn.TransformerEncoderLayer):
                inner.activation_relu_or_gelu = 0  # else, in eval mode, it reads weights past whatever wraps its layers
        if not any(True for _ in self.parameters()):
            raise ModelError("the module has no parameters", where=spec.name)
        if other := {str(p.dtype) for p in self.parameters() if p.dtype != torch.float32}:
            remedy = "Convert it with module.float(); bf16 is train.precision"
            what = "the module has weights that are not float32"
            raise ModelError(what, sorted(other), where=spec.name, remedy=remedy)
        self.eval()
        called = {f"stages.{name}" for name in dry_run(chain, spec)}
        self.found = find_sites(self, spec.sites, called, spec.name)
        sites: dict[str, list[str]] = {}
        for entry in self.found:
            for site in entry.sites:
                sites.setdefault(site, []).append(entry.name)
        self.spec = TrunkSpec(
            name=spec.name,
            channels=spec.channels,
            bin_size=spec.bin_size,
            length=spec.window,
            sites={site: tuple(names) for site, names in sites.items()},
            weights=spec.weights,
            licence=spec.licence,
            citation=spec.citation,
        )
        if crop < spec.drops:
            remedy = f"Choose a window that exceeds the target by {2 * spec.drops * spec.bin_size} bp or more"
            raise ModelError(
                f"the module drops {spec.drops} bins at each end, and the data leave",
                crop,
                where=spec.name,
                remedy=remedy,
            )
        self.stages = nn.ModuleDict({**dict(chain.items()), "crop": Crop(crop - spec.drops)})

    @classmethod
    def build(cls, settings: Mapping[str, Any], *, bin_size: int, crop: int) -> WrappedTrunk:
        """A registered module with these settings; see ``Trunk.build``."""
        if bin_size != cls.about.bin_size:
            remedy = f"Prepare the data with bin_size: {cls.about.bin_size}"
            raise ModelError("the module cannot give bins of this size", bin_size, where=cls.about.name, remedy=remedy)
        assert cls.make is not None
        trunk = cls(cls.make(**settings), cls.about, crop)
        trunk.settings = cls.defaults() | dict(settings)
        return trunk

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        assert cls.make is not None
        return {name: p.default for name, p in inspect.signature(cls.make).parameters.items()}

    def encode(self, codes: Tensor, lengths: Tensor | None = None) -> State:
        """The first state, see ``Trunk.encode``.

        Raises:
            ModelError: longer sequences than the only length that the module takes.
        """
        if self.spec.length is not None and codes.shape[1] > self.spec.length:
            what = f"the module takes sequences of {self.spec.length} bp, and here they have"
            raise ModelError(what, codes.shape[1], where=self.spec.name, remedy="Prepare the data with that window")
        return super().encode(codes, lengths)


def wrap(module: nn.Module | Mapping[str, nn.Module], spec: ModuleSpec) -> WrappedTrunk:
    """The module as a trunk, in eval mode; its own tensors, not copies of them.

    Raises:
        ModelError: what it gives is not what the spec says; it depends on chance or on the batch; it has parameters
            without effect; a site that does not exist or cannot be reached; steps that are too short.
    """
    return WrappedTrunk(module, spec, spec.drops)


def trunk_class(make: Callable[..., nn.Module | Mapping[str, nn.Module]], spec: ModuleSpec) -> type[WrappedTrunk]:
    """A class of trunks whose ``build`` calls ``make``: its keyword arguments are the settings, all with defaults.

    Raises:
        ModelError: an argument without a default.
    """
    needed = [n for n, p in inspect.signature(make).parameters.items() if p.default is inspect.Parameter.empty]
    if needed:
        raise ModelError("what makes the module has arguments without a default", needed, where=spec.name)
    facts = {
        "make": staticmethod(make),
        "about": spec,
        "label_bin_size": spec.bin_size,
        "drops": spec.drops,
        "pretrained": spec.weights,
        "__module__": __name__,
        "__doc__": f"The registered module {spec.name}.",
    }
    return type(f"Wrapped_{spec.name}", (WrappedTrunk,), facts)


def describe(trunk: WrappedTrunk) -> pd.DataFrame:
    """The modules with weights: name in the trunk, type, sites that adapters find it at, and why it is at none."""
    rows = [(entry.name, entry.layer, ", ".join(entry.sites), entry.note) for entry in trunk.found]
    return pd.DataFrame(rows, columns=["module", "type", "sites", "note"])


@torch.no_grad()
def redraw(trunk: WrappedTrunk) -> None:
    """New random weights, as each module draws its own (``reset_parameters``).

    Raises:
        ModelError: a module has parameters and no way to draw them.
    """
    for name, module in trunk.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            remedy = "Give its class a method reset_parameters()"
            raise ModelError("a module cannot draw new weights", name, where=trunk.spec.name, remedy=remedy)


# ---- the chain ----


def _modules_of(module: nn.Module | Mapping[str, nn.Module], spec: ModuleSpec) -> dict[str, nn.Module]:
    if isinstance(module, Mapping | nn.ModuleDict):
        if spec.call is not None:
            raise ModelError("'call' is for one module, and these are several", list(module), where=spec.name)
        return dict(module.items())
    if type(module) is nn.Sequential and spec.call is None and len(module):
        return {name: module.get_submodule(name) for name in module._modules}  # one that is there twice, too
    return {"module": module}
