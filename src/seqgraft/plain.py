"""A model as a plain module from one-hot sequence to numbers, for tools that attribute any PyTorch module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seqgraft.data.dataset import DatasetInfo
from seqgraft.errors import ModelError
from seqgraft.models.base import SequenceModel, State
from seqgraft.sample import Sample
from seqgraft.target import Reader, Target
from seqgraft.tracks import unsquash

__all__ = ["Elementwise", "PlainModule", "plain_module"]

_LOWEST = -1e30  # in place of minus infinity


class Elementwise(nn.Module):
    """A function of each value alone. Tools that correct activations by module, as DeepLIFT does, need its rule."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def plain_module(
    model: SequenceModel,
    info: DatasetInfo,
    target: Target | None = None,
    *,
    bins: Sequence[int] | None = None,
    strand: str = ".",
    product: Callable[..., nn.Module] | None = None,
) -> PlainModule:
    """A module from one-hot float ``(batch, 4, length)`` (A C G T) to the target's numbers ``(batch, numbers)``.

    It holds a frozen copy of the model, in eval mode. Every activation is called as a module (GELU, ReLU, SiLU,
    Sigmoid, Tanh, Softplus, Softmax and MaxPool1d of ``torch.nn``), whatever the trunk's code calls, so that tools that
    hook modules see it; undoing the squash and the logarithm are :class:`Elementwise`. Products of two activations
    (attention, gates) are what ``product`` makes. Without it DeepLIFT takes them for linear, and its attributions do
    not add up to the difference of the numbers. For tangermeme::

        from tangermeme.deep_lift_shap import BilinearOp, _nonlinear, deep_lift_shap
        plain = plain_module(model, info, target, product=BilinearOp)
        deep_lift_shap(plain, X, additional_nonlinear_ops={Elementwise: _nonlinear})

    Args:
        info: of the data that the model was fitted to: window, bin size, number of bins.
        target: the number; by default of all tracks.
        bins: which count; all if None.
        strand: of a gene, whose tracks of that strand count.
        product: makes a module of ``(left, right)``: with the argument "...,...->..." their product value by value,
            without one the matrix product.

    Raises:
        ConfigError: as :meth:`Target.reader`.
        ModelError: the model needs more than the sequence, or computes something that modules do not give.
    """
    if any(getattr(head, "covariates", None) is not None for head in model.heads.values()):
        remedy = "Fit a run without covariates"
        raise ModelError("the model's heads need covariates, which a sequence does not have", remedy=remedy)
    reader = (target or Target()).reader(model.tracks, info.bins, strand)
    plain = PlainModule(model, reader, info.bin_size, bins, product)
    plain.meet(info.window or 4 * model.trunk.stride)
    return plain


class PlainModule(nn.Module):
    """What :func:`plain_module` makes; ``names`` are those of the numbers."""

    def __init__(
        self,
        model: SequenceModel,
        reader: Reader,
        bin_size: int,
        bins: Sequence[int] | None,
        product: Callable[..., nn.Module] | None,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.names, self.reader, self.bins = reader.names, reader, None if bins is None else list(bins)
        self.unsquash = Elementwise(partial(unsquash, tracks=model.tracks, bin_size=bin_size))
        self.log = Elementwise(torch.log)
        self.activations = nn.ModuleDict()
        self.matmul = None if product is None else product()
        self.mul = None if product is None else product("...,...->...")
        self._meeting = False
        self.eval()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """It stays in eval mode."""
        return super().train(False)

    def meet(self, length: int) -> None:
        """Makes the modules of the activations, on a random sequence of this length.

        Raises:
            ModelError: with them the numbers are others, as with a mask or an argument that they do not know.
        """
        device = next(self.model.parameters()).device
        codes = torch.randint(0, 4, (length,), generator=torch.Generator().manual_seed(0)).to(device)
        x = nn.functional.one_hot(codes, 4).T[None].float()
        products = self.matmul, self.mul
        self.matmul = self.mul = None  # what they give is the caller's
        self._meeting = True
        found = self(x.requires_grad_())
        self._meeting = False
        self.matmul, self.mul = products
        if not torch.allclose(found, self._numbers(x), rtol=1e-3, atol=1e-5, equal_nan=True):
            remedy = "Use seqgraft's own attributions, which call the model as it is"
            raise ModelError("the model's activations, as modules, do not give what it computes", remedy=remedy)

    def activation(self, kind: type[nn.Module], *args: Any) -> nn.Module:
        """The one module of this kind and these settings."""
        key = "_".join([kind.__name__, *map(str, args)]).replace(".", "_")
        if key not in self.activations:
            if not self._meeting:
                remedy = "Give sequences of the window's length, or call meet(length) first"
                raise ModelError("the model computes something new on sequences of this length", key, remedy=remedy)
            self.activations[key] = kind(*args)
        return self.activations[key]

    def forward(self, x: Tensor) -> Tensor:
        """One-hot ``(batch, 4, length)`` to ``(batch, numbers)``."""
        with _AsModules(self):
            return self._numbers(x)

    def _numbers(self, x: Tensor) -> Tensor:
        values = self.model.read(self.model.trunk.run(_first(x, self.model.trunk.stride)), _nothing(x))
        if self.reader.statistic != "logits":
            values = self.unsquash(self.model.link(values))
        values = values if self.bins is None else values[..., self.bins]
        return self.reader(values, torch.ones_like(values[0, 0]), self.log)


def _first(x: Tensor, stride: int) -> State:
    """The first state of one-hot sequences, padded to a multiple of the stride as ``Trunk.encode`` does."""
    length = x.shape[-1]
    padded = -(-length // stride) * stride
    if padded == length:
        return State(x)
    valid = (torch.arange(padded, device=x.device) < length).expand(len(x), -1)
    return State(nn.functional.pad(x, (0, padded - length)), valid=valid)


def _nothing(x: Tensor) -> Sample:
    none = torch.zeros(len(x), 0, device=x.device)
    return Sample(none, none, none, none, none)


def _depends(value: object) -> bool:
    """On the sequence: nothing else in the module has a gradient."""
    return isinstance(value, Tensor) and value.requires_grad


class _AsModules(TorchFunctionMode):
    """Calls of functions become calls of modules, where they are not linear in what depends on the sequence."""

    def __init__(self, plain: PlainModule) -> None:
        super().__init__()
        self.plain = plain

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, make = kwargs or {}, self.plain.activation
        if not any(_depends(value) for value in args[:2]):
            return func(*args, **kwargs)
        x, *rest = args
        simple = {"relu": nn.ReLU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softplus": nn.Softplus}
        match getattr(func, "__name__", ""):
            case "gelu":
                return make(nn.GELU, kwargs.get("approximate", "none"))(x)
            case "relu" | "silu" | "sigmoid" | "tanh" | "softplus" as name if not rest:
                return make(simple[name])(x)
            case "softmax":
                return _softmax(make, x, rest[0] if rest else kwargs["dim"])
            case "max_pool1d":
                return _pool(make, x, rest[0] if rest else kwargs["kernel_size"])
            case "amax":
                return _pool(make, x, x.shape[-1])
            case "scaled_dot_product_attention":
                return self._attend(x, *rest, **kwargs)
            case "matmul" | "__matmul__":
                return self._product(self.plain.matmul, func, x, rest[0])
            case "mul" | "__mul__":
                return self._product(self.plain.mul, func, x, rest[0])
        return func(*args, **kwargs)

    def _product(self, module: nn.Module | None, func: Any, left: Any, right: Any) -> Any:
        both = _depends(left) and _depends(right)
        return module(left, right) if both and module is not None else func(left, right)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        """Without dropout, as in eval mode."""
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        logits = self._product(self.plain.matmul, torch.matmul, query * scale, key.transpose(-1, -2))
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, _LOWEST) if attn_mask.dtype == torch.bool else logits + attn_mask
        mixed: Tensor = self._product(
            self.plain.matmul, torch.matmul, _softmax(self.plain.activation, logits, -1), value
        )
        return mixed


def _softmax(make: Callable[..., nn.Module], x: Tensor, dim: int) -> Any:
    return make(nn.Softmax, dim)(_finite(x))


def _pool(make: Callable[..., nn.Module], x: Tensor, size: Any) -> Any:
    return make(nn.MaxPool1d, size if isinstance(size, int) else size[0])(_finite(x))


def _finite(x: Tensor) -> Tensor:
    """Where padding was masked: the difference of two infinities is not a number."""
    return torch.nan_to_num(x, neginf=_LOWEST) if x.isneginf().any() else x
