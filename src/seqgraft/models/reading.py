"""What readers of published weights share: safetensors, strict filling of modules, and a report of every tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from seqgraft.errors import ModelError

__all__ = ["LoadReport", "Place", "check_fit", "file_sha256", "fill", "read_tensors"]


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor, of the model and of the file.

    Attributes:
        file: the file of the weights. sha256: of that file.
        matched: our name ("trunk.*", "heads.*") -> theirs.
        new: our tensors that the file does not have: counters that nothing reads.
        left: tensors of the file that were not used: second names of the same tensors, tables that are computed here,
            adapters.
    """

    file: Path
    sha256: str
    matched: Mapping[str, str]
    new: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        listed = f": {', '.join(self.left[:5])}{', ...' if len(self.left) > 5 else ''}" if self.left else ""
        return f"{self.file}: {len(self.matched)} tensors matched, {len(self.new)} new, {len(self.left)} left{listed}"


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours stands in a file.

    Attributes:
        name: there.
        shape: there.
        rows: which of its rows are ours, in our order. None: all.
    """

    name: str
    shape: tuple[int, ...]
    rows: range | list[int] | None = None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ModelError: the file is missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise ModelError("the weights are missing", str(path), remedy="Copy the whole folder")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the weights cannot be read ({error})",
            str(path),
            remedy="The file may be truncated: copy or download it again",
        ) from error


def file_sha256(path: Path) -> str:
    """In hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_fit(
    wanted: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    where: Path,
    *,
    what: str,
    remedy: str,
    prefix: str = "",
) -> None:
    """Finds every tensor that is missing, unexpected or misshapen.

    Args:
        wanted: name in the file -> shape.
        where: the file or folder, for the message.
        what, remedy: the rest of it.
        prefix: only names that start so can be unexpected.

    Raises:
        ModelError: there is one; all of them at once.
    """
    missing = sorted(set(wanted) - set(tensors))
    extra = sorted(name for name in set(tensors) - set(wanted) if name.startswith(prefix))
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or extra or shapes:
        found = {"missing": missing, "unexpected": extra, "misshapen": shapes}
        raise ModelError(what, found, where=where, remedy=remedy)


def fill(
    parts: Mapping[str, nn.Module], places: Mapping[str, Place], tensors: Mapping[str, Tensor], path: Path
) -> dict[str, str]:
    """Puts tensors into modules, which may be on the meta device: all of them or none.

    Args:
        parts: prefix of the names ("trunk.") -> module.
        places: our name -> where it stands in the file. Every tensor of the modules has one.
        tensors: the file's, all of which must be wanted.
        path: of the file, for messages.

    Returns:
        Our names with theirs.

    Raises:
        ModelError: tensors missing, unexpected, misshapen, or whole numbers where others belong.
    """
    check_fit(
        {place.name: place.shape for place in places.values()},
        tensors,
        path,
        what="the weights do not fit the architecture that config.json describes",
        remedy="Copy or download both files again, from one place",
    )
    own_types = {f"{prefix}{name}": t.dtype for prefix, part in parts.items() for name, t in part.state_dict().items()}
    types = {
        place.name: str(tensors[place.name].dtype)
        for name, place in places.items()
        if own_types[name].is_floating_point != tensors[place.name].is_floating_point()
    }
    if types:
        remedy = "Take weights in float32, bfloat16 or float16: quantised ones are not supported"
        raise ModelError("the weights are numbers of another type than the model's", types, where=path, remedy=remedy)
    for prefix, part in parts.items():
        own = {}
        for name, tensor in part.state_dict().items():
            place = places[prefix + name]
            theirs = tensors[place.name]
            own[name] = _as_ours(theirs if place.rows is None else theirs[list(place.rows)]).reshape(tensor.shape)
        part.load_state_dict(own, assign=True)
    return {ours: place.name for ours, place in places.items()}


def _as_ours(tensor: Tensor) -> Tensor:
    """A copy of its own, in float32 if it is no counter."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
