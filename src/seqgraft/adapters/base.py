"""What an adapter is, and the guards around every one of them.

``adapt`` freezes the trunk, lets the adapter change it, and checks that the change starts as the identity and reaches
the modules it names; ``check_gradients`` watches the first backward passes; ``merge`` folds an adapter into plain
weights. The adapters themselves are one file per family beside this one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from seqgraft.errors import ModelError, Problems
from seqgraft.models.base import SequenceModel, Trunk, trainable_state, weight_hash
from seqgraft.models.masked import MaskedModel

__all__ = [
    "Adapted",
    "Adapter",
    "Counts",
    "adapt",
    "adapted_of",
    "check_frozen",
    "check_gradients",
    "check_types",
    "explained",
    "freeze",
    "merge",
    "modules_at",
    "parameter_groups",
    "probe",
    "relative_difference",
]

#: Heads whose name starts with this are kept beside new ones and never trained.
PRETRAINED = "pretrained"
#: Largest change of the trunk's output, relative to its largest value, when an adapter is put in or folded.
#: A method that starts from zeros gives 0; one that divides by a norm (DoRA) rounds once per module.
TOLERANCE = 1e-5


class Adapter:
    """Base of all adapters; a subclass is a frozen dataclass whose fields are its settings.

    Attributes:
        kind: the name in configurations and files.
        mergeable: can it be folded into the trunk's weights?
        starts_as_identity: does the trunk give, before any training, what it gave without it? What does not is only
            asked for finite numbers.
    """

    kind: ClassVar[str]
    mergeable: ClassVar[bool] = True
    starts_as_identity: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The name in tables and figures."""
        raise NotImplementedError

    @property
    def size(self) -> int | None:
        """The rank or width of what is added; None where there is none to choose."""
        return None

    @property
    def method(self) -> str:
        """The label without the size."""
        return self.label

    def modules(self, trunk: Trunk) -> tuple[str, ...]:  # noqa: ARG002
        """Names, relative to the trunk, of the modules that it changes.

        Raises:
            ModelError: a site that the trunk lacks, or a module that the method cannot reach.
        """
        return ()

    def prepare(self, trunk: Trunk) -> None:
        """Changes the frozen trunk before its outputs are recorded for the identity check: quantisation."""

    def apply(self, model: SequenceModel) -> None:
        """Puts the new parameters in; the trunk is frozen already."""
        raise NotImplementedError

    def fold(self, model: SequenceModel) -> None:
        """Folds the new parameters into the trunk and restores plain modules; nothing to do where there are none."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many numbers train: in new modules, in the heads, in the trunk itself; ``total`` counts frozen ones too."""

    adapter: int
    head: int
    trunk: int
    total: int

    @property
    def trainable(self) -> int:
        return self.adapter + self.head + self.trunk


@dataclass(frozen=True)
class Adapted:
    """What ``adapt`` recorded; it stands in ``model.adapted``.

    Attributes:
        adapter: what was applied.
        counts: what trains.
        groups: name of each trainable parameter -> "adapter", "head" or "trunk".
        base: hashes of the weights below: "trunk", and one per pretrained head that is kept.
        frozen: checksum of each tensor that must not move.
        identity: largest relative change of the trunk's output on the probe when the adapter was put in.
        trunk_bytes: what the trunk's parameters and buffers held before, in full precision.
    """

    adapter: Adapter
    counts: Counts
    groups: Mapping[str, str]
    base: Mapping[str, str]
    frozen: Mapping[str, int]
    identity: float
    trunk_bytes: int


def adapt(model: SequenceModel, adapter: Adapter) -> Counts:
    """Freezes trunk and pretrained heads, applies the adapter, and leaves its parameters and the new heads to train.

    The model is changed in place; after an error, build it again.

    Raises:
        ModelError: the model is adapted already; a site matches nothing; the method cannot reach a module, or the
            trunk never calls it; the adapter does not start as the identity; nothing would train.
    """
    if model.adapter is not None:
        raise ModelError("the model has an adapter already", model.adapter.label, remedy="Merge it first")
    trunk = model.trunk
    base = {"trunk": weight_hash(trunk)}
    base |= {f"heads.{name}": weight_hash(head) for name, head in model.heads.items() if name.startswith(PRETRAINED)}
    own = list(trunk.parameters())
    trunk_bytes = sum(tensor.nbytes for tensor in [*own, *trunk.buffers()])
    below = sum(p.numel() for p in model.parameters())
    names = adapter.modules(trunk)
    freeze(trunk)
    for name, head in model.heads.items():
        if name.startswith(PRETRAINED):
            freeze(head)
    adapter.prepare(trunk)
    freeze(trunk)
    before, called = probe(trunk, names)
    if bypassed := [name for name in names if name not in called]:
        raise ModelError(
            "the trunk never calls these modules (it reads their weights itself): an adapter there would do nothing",
            bypassed,
            where=adapter.label,
            remedy="Choose another site",
        )
    adapter.apply(model)
    lm = getattr(trunk, "lm", None)
    if lm is not None and isinstance(model, MaskedModel):
        _release(lm)
    elif lm is not None:
        freeze(lm)  # nothing reads it
    identity = relative_difference(before, probe(trunk)[0])
    if not identity <= (TOLERANCE if adapter.starts_as_identity else sys.float_info.max):  # also catches NaN
        raise ModelError(
            "the adapter does not start as the identity: before any training it changes the output by a fraction of",
            identity,
            where=adapter.label,
            remedy="Choose a method or settings that start from the pretrained function",
        )
    groups = _groups(model, own)
    if not groups:
        raise ModelError("nothing would train", adapter.label, remedy="Add a head or choose another adapter")
    count = {group: sum(p.numel() for p in parameters) for group, parameters in _grouped(model, groups).items()}
    counts = Counts(**count, total=below + count["adapter"])
    model.adapter = adapter
    model.adapted = Adapted(adapter, counts, groups, base, _checksums(model), identity, trunk_bytes)
    model.train(model.training)
    return counts


def merge(model: SequenceModel) -> float:
    """Folds the adapter into the trunk's weights and restores the plain modules, under the names they had.

    Returns:
        The largest difference of the trunk's output on the probe, relative to its largest value. A quantised base is
        replaced by the full-precision one, which changes the output: there the difference is a finding, not an error.

    Raises:
        ModelError: no adapter, one that cannot be merged, or a merged model that differs (build it again).
    """
    adapter = adapted_of(model).adapter
    if not adapter.mergeable:
        raise ModelError(
            f"{adapter.label} cannot be merged", remedy="It is no change of a weight: keep the adapter beside the model"
        )
    before, _ = probe(model.trunk)
    quantised = getattr(adapter, "quantize", None) is not None
    adapter.fold(model)
    difference = relative_difference(before, probe(model.trunk)[0])
    if not quantised and not difference <= TOLERANCE:
        raise ModelError(
            "the merged trunk differs from the adapted one by a fraction of", difference, where=adapter.label
        )
    model.adapter = model.adapted = None
    return difference


def freeze(module: nn.Module) -> None:
    """No gradient, and eval mode whatever ``train`` says, for everything in the module."""
    module.requires_grad_(False)
    for inner in module.modules():
        inner.frozen = True  # type: ignore[assignment]  # a flag that models.base reads
    module.eval()


def _release(module: nn.Module) -> None:
    """The inverse of ``freeze``."""
    module.requires_grad_(True)
    for inner in module.modules():
        inner.frozen = False  # type: ignore[assignment]  # a flag that models.base reads


def modules_at(trunk: Trunk, where: Sequence[str], last: int | None = None) -> tuple[str, ...]:
    """Names of the modules at the sites, in the trunk's order; of the site "conv" only the ``last`` ones if given.

    Raises:
        ModelError: a site matches nothing; the message names the sites the trunk has.
    """
    sites = trunk.spec.sites
    if absent := [site for site in where if not sites.get(site)]:
        raise ModelError(
            f"the trunk {trunk.spec.name!r} has no module at the site",
            absent[0],
            remedy=f"Its sites are {', '.join(sorted(site for site, names in sites.items() if names))}",
        )
    chosen = {site: tuple(sites[site]) for site in where}
    if last is not None:
        convs = chosen.get("conv", ())
        if not 0 < last <= len(convs):
            raise ModelError(f"'last' must be between 1 and the {len(convs)} modules chosen at the site 'conv'", last)
        chosen["conv"] = convs[-last:]
    wanted = {name for names in chosen.values() for name in names}
    found = tuple(name for name, _ in trunk.named_modules() if name in wanted)
    if gone := sorted(wanted - set(found)):
        raise ModelError(f"the spec of the trunk {trunk.spec.name!r} names modules that it does not have", gone)
    return found


def check_types(trunk: Trunk, names: Sequence[str], label: str, *kinds: type[nn.Module]) -> None:
    """Only plain modules can be wrapped: a subclass may compute something else, a grouped convolution does not add up.

    Raises:
        ModelError: listing every module that the method cannot reach.
    """
    problems = Problems(ModelError)
    for name in names:
        module = trunk.get_submodule(name)
        wanted = " or ".join(kind.__name__ for kind in kinds)
        if type(module) not in kinds:
            what = f"{label} cannot reach the module {name!r}, it takes {wanted}"
            problems.add(what, type(module).__name__, remedy="Choose other sites")
        elif isinstance(module, nn.Conv1d) and module.groups > 1:
            what = f"{label} cannot reach the grouped convolution {name!r}, with groups"
            problems.add(what, module.groups, remedy="Choose other sites")
    problems.raise_if_any()


@torch.no_grad()
def probe(trunk: Trunk, watch: Sequence[str] = ()) -> tuple[Tensor, set[str]]:
    """The trunk's output in eval mode on two short random sequences, and which of the watched modules were called.

    Stages that crop are left out, so that a trunk of half a megabase is probed with a few hundred bases.
    """
    shortest = max(256, 8 * trunk.stride) + 2 * trunk.drops * trunk.spec.bin_size
    most = shortest if trunk.longest is None else min(shortest, trunk.longest // trunk.stride * trunk.stride)
    length = trunk.spec.length or -(-most // trunk.stride) * trunk.stride
    codes = torch.randint(0, 4, (2, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    called: set[str] = set()
    hooks = [trunk.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: called.add(n)) for n in watch]
    modes = {module: module.training for module in trunk.modules()}
    trunk.eval()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # accelerators round float32 products to 10 bits otherwise
    try:
        device = next(trunk.parameters()).device
        state = trunk.encode(codes.to(device))
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            for stage in trunk.stages.values():
                if not (stage.steps and all(step.kind == "crop" for step in stage.steps)):  # type: ignore[union-attr]
                    state = stage(state)
    finally:
        torch.set_float32_matmul_precision(precision)
        for module, mode in modes.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    if not state.x.numel():
        raise ModelError(f"the trunk {trunk.spec.name!r} gives no output for a short sequence of bases", length)
    return state.x.float(), called


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of ``a``."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(a.dtype).tiny))


def parameter_groups(model: SequenceModel) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters as "adapter", "head" and "trunk", for learning rates of their own.

    Raises:
        ModelError: the model has no adapter.
    """
    return _grouped(model, adapted_of(model).groups)


def check_gradients(model: SequenceModel, alive: set[str], *, last: bool = False) -> set[str]:
    """To be called after each of the first backward passes (four will do), before gradients are cleared.

    The first factor of a low-rank pair has no gradient until the second, which starts at zero, has moved: so a tensor
    must have a finite gradient at every call, and one that is not zero by the last.

    Args:
        alive: what the previous call returned, at first an empty set.
        last: whether to ask that every tensor has had a gradient that is not zero.

    Returns:
        Names of the parameters that have had a gradient that is not zero.

    Raises:
        ModelError: naming the tensors that get no gradient or one that is not finite, and the frozen ones that do.
    """
    groups = adapted_of(model).groups
    grads = {name: p.grad for name, p in model.named_parameters()}
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    problems = Problems(ModelError)
    flat = [name for name, grad in grads.items() if name in groups and grad is not None and not grad.any()]
    alive = alive | (groups.keys() - flat)
    frozen = [name for name, module in model.named_modules() if getattr(module, "frozen", False) and module.training]
    found_of = {
        "these tensors train although they were frozen": [n for n in trains if n not in groups],
        "these frozen tensors have a gradient": [
            n for n, grad in grads.items() if n not in groups and grad is not None
        ],
        "these frozen modules are in training mode": frozen,
        "these tensors get no gradient: the model does not use them": [n for n in groups if grads[n] is None],
        "these tensors have a gradient that is not finite": [n for n in groups if not _finite(grads[n])],
        "the gradient of these tensors is always zero": [n for n in groups if last and n not in alive],
    }
    for what, found in found_of.items():
        if found:
            problems.add(what, _some(found), where=adapted_of(model).adapter.label)
    problems.raise_if_any()
    return alive


def check_frozen(model: SequenceModel) -> None:
    """Compares every frozen tensor and buffer with what it was when the model was adapted.

    Raises:
        ModelError: naming those that moved.
    """
    now = _checksums(model)
    moved = [name for name, value in adapted_of(model).frozen.items() if now.get(name) != value]
    if moved:
        where = adapted_of(model).adapter.label
        raise ModelError("frozen tensors have changed since the model was adapted", _some(moved), where=where)


def _some(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) <= 10 else [*names[:10], f"and {len(names) - 10} more"]


def adapted_of(model: SequenceModel) -> Adapted:
    """What ``adapt`` recorded of the model.

    Raises:
        ModelError: it has no adapter.
    """
    if model.adapted is None:
        raise ModelError("the model has no adapter", remedy="Call adapt(model, adapter) first")
    adapted: Adapted = model.adapted
    return adapted


def _groups(model: SequenceModel, own: Sequence[nn.Parameter]) -> dict[str, str]:
    """Trainable parameter -> group; ``own`` are the parameters that the trunk had before."""
    of_trunk, heads = {id(p) for p in own}, ("heads.", "beside.", "trunk.lm.")
    return {
        name: "head" if name.startswith(heads) else "trunk" if id(p) in of_trunk else "adapter"
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _grouped(model: SequenceModel, groups: Mapping[str, str]) -> dict[str, list[nn.Parameter]]:
    parameters = dict(model.named_parameters())
    return {group: [parameters[n] for n, g in groups.items() if g == group] for group in ("adapter", "head", "trunk")}


def _finite(grad: Tensor | None) -> bool:
    return grad is None or bool(torch.isfinite(grad).all())


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksums(model: SequenceModel) -> dict[str, int]:
    """Sum of the bits of every floating-point tensor that must not move, taken where the tensor is.

    Packed weights of a quantised base are left out: their layout depends on the device.
    """
    trainable = trainable_state(model)
    return {
        name: int(tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name not in trainable and tensor.is_floating_point() and tensor.element_size() in _INTEGERS
    }


@contextmanager
def explained(what: str, where: str) -> Iterator[None]:
    """Turns what a library says about an impossible request into a ModelError."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
        raise ModelError(f"{what} ({error})", where=where, remedy="Choose other sites or settings") from error
