"""Reading Baskerville's networks, Keras ``.h5`` files with their ``params.json``: the only door to h5py.

Layers are found by their kind and the number at the end of their name, in which Keras counts them as they are made:
the n-th ``conv1d`` of a file is the n-th convolution of the network, wherever the count began. A file holds a trunk, or
a trunk and one head, with or without adapters.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from seqgraft.data.dataset import DatasetInfo
from seqgraft.data.tables import read_track_table
from seqgraft.errors import ModelError
from seqgraft.models.base import Head, SequenceModel
from seqgraft.models.borzoi import Borzoi
from seqgraft.models.folders import save_model
from seqgraft.models.params import Network, read_params
from seqgraft.models.reading import LoadReport, file_sha256
from seqgraft.tracks import TrackTable

__all__ = ["Baskerville", "convert_baskerville", "export_baskerville", "load_baskerville"]

Arrays = dict[tuple[str, int], dict[str, npt.NDArray[np.float32]]]  # (kind of layer, place) -> weight -> array


@dataclass(frozen=True)
class Baskerville:
    """A file of weights, on our modules.

    Attributes:
        trunk: with the weights of the file, in eval mode.
        heads: by group of tracks; none if the file holds a trunk alone.
        tracks: of the heads, or None.
        network: what ``params.json`` says.
        report: what became of every tensor.
        adapter: tensors of adapters in the file, as ``module of the trunk:part``, axes reversed to torch's order. They
            are not in the trunk; ``seqgraft.adapters.baskerville`` puts them there.
    """

    trunk: Borzoi
    heads: Mapping[str, Head]
    tracks: TrackTable | None
    network: Network
    report: LoadReport
    adapter: Mapping[str, Tensor] = field(default_factory=dict)

    def model(self) -> SequenceModel:
        """The trunk with its heads, in eval mode.

        Raises:
            ModelError: the file holds a trunk alone.
        """
        if self.tracks is None:
            remedy = "Use the trunk, or a file of the whole model"
            raise ModelError("the file has no head, only a trunk", remedy=remedy)
        return SequenceModel(self.trunk, self.heads, self.tracks).eval()


def load_baskerville(
    h5: Path | str,
    params: Path | str | Mapping[str, Any],
    targets: Path | str | None = None,
    *,
    gelu: Literal["tanh", "exact"] | None = None,
    transform_old: bool = False,
) -> Baskerville:
    """A network of Baskerville from its weights and its ``params.json``.

    Args:
        h5: a full model or a trunk, as Keras saves it.
        params: the file, or what is in it.
        targets: ``targets.txt`` with one row per track of the head; without it the tracks are called ``track_0`` on.
        gelu: None chooses what the weights were trained with. Baskerville's networks are trained with the tanh form;
            while Houlsby, squeeze-excite, LoCon or IA3 adapters are in them, it silently runs the exact one.
        transform_old: whether the targets were squashed in the legacy order.

    Raises:
        ConfigError: a ``params.json`` that cannot be read, or describes another family of networks.
        DataError: a targets table that cannot be read.
        ModelError: no such file, a damaged one, links out of it; tensors missing, unexpected or misshapen.
    """
    network, layers = read_params(params), _read_h5(Path(h5))
    inserted = any(_EXACT.search(f"{kind}/{name}") for (kind, _), arrays in layers.items() for name in arrays)
    settings = {**network.settings, "gelu": gelu or ("exact" if inserted else "tanh")}
    trunk = Borzoi.build(settings, bin_size=network.bin_size, crop=network.crop).eval()
    head = layers.pop(("dense", _denses(trunk)), None)
    tracks = heads = None
    if head is not None:
        tracks = _tracks(targets, head, network, transform_old, Path(h5))
        heads = _heads(tracks, trunk.spec.channels, head, Path(h5))
    report, adapter = _fill(trunk, layers, Path(h5))
    theirs = {"out.weight": f"dense {_denses(trunk)}/kernel", "out.bias": f"dense {_denses(trunk)}/bias"}
    found = {f"heads.{k}.{n}": theirs[n] for k, h in (heads or {}).items() for n in h.state_dict()}
    report = replace(report, matched={**report.matched, **found})
    return Baskerville(trunk, heads or {}, tracks, network, report, adapter)


def convert_baskerville(
    h5: Path | str,
    params: Path | str | Mapping[str, Any],
    folder: Path | str,
    targets: Path | str | None = None,
    *,
    name: str,
    licence: str,
    citation: str,
    transform_old: bool = False,
) -> LoadReport:
    """Writes a model folder, which ``model.name`` takes, from a full model of Baskerville without adapters.

    Raises:
        ConfigError, DataError, ModelError: as ``load_baskerville``; a trunk alone, or adapters that are not merged.
    """
    loaded = load_baskerville(h5, params, targets, transform_old=transform_old)
    if loaded.adapter:
        raise ModelError(
            "the file has adapters beside the weights",
            sorted({key.partition(":")[2] for key in loaded.adapter}),
            where=h5,
            remedy="Take the file with merged weights, *.mergeW.h5",
        )
    network = loaded.network
    save_model(
        loaded.model(),
        Path(folder),
        name=name,
        info=DatasetInfo("coverage", network.window, network.bins, network.bin_size),
        licence=licence,
        citation=citation,
        trained_on=None,
        card=f"# {name}\n\nConverted from Baskerville's `{Path(h5).name}`.\n\n{licence}\n\n{citation}\n",
        parameters=sum(p.numel() for p in loaded.trunk.parameters()),
    )
    return loaded.report


def export_baskerville(model: SequenceModel, template: Path | str, path: Path | str) -> None:
    """Writes a model without adapters (merge first) as a file that Baskerville reads with a ``params.json``.

    Args:
        template: a full model of Baskerville with the same trunk; its layers and their order are kept. If the number of
            tracks differs, ``units`` of the head in ``params.json`` has to be the new one.

    Raises:
        ModelError: an adapter, another trunk, or one that Baskerville would run with another GELU.
    """
    trunk, path = model.trunk, Path(path)
    plain = {"gelu": "tanh", "attention": "relative"}
    if not isinstance(trunk, Borzoi) or model.adapter is not None or not plain.items() <= trunk.settings.items():
        found = (type(trunk).__name__, getattr(model.adapter, "label", None), *map(trunk.settings.get, plain))
        remedy = "Merge the adapter; Baskerville runs plain networks with relative attention and the tanh form of GELU"
        raise ModelError("only a plain trunk of the Borzoi family can be exported", found, remedy=remedy)
    places, state = _places(trunk), trunk.state_dict()
    kernel = torch.cat([head.out.weight for head in model.heads.values()])[model._order]  # type: ignore[union-attr, misc]
    bias = torch.cat([head.out.bias for head in model.heads.values()])[model._order]  # type: ignore[union-attr, misc]
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        shutil.copyfile(template, building)
        with _opened(building, "r+") as file:
            wanted = set(state) - {name for name in state if name.endswith("num_batches_tracked")} | {"weight", "bias"}
            for kind, place, name, item in list(_weights(file, Path(template))):
                at = f"{places[kind][place]}." if place < len(places.get(kind, ())) else ""
                ours = f"{at}{_MODULES.get(kind, {}).get(name)}"
                is_head = not at and kind == "dense" and place == len(places["dense"])
                tensor = {"weight": kernel, "bias": bias}[ours] if is_head else state.get(ours)
                array = None if tensor is None else _keras(tensor.detach().cpu(), name, item.ndim)
                if array is None or (array.shape != item.shape and not is_head):
                    raise ModelError("the template has another network", f"{kind} {place}/{name}", where=template)
                wanted.discard(ours)
                group, called = item.parent, item.name
                if array.shape == item.shape:
                    item[...] = array
                else:
                    del group[called]
                    group[called] = array
            if wanted:
                raise ModelError("the template lacks weights of the network", sorted(wanted), where=template)
        os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)


def _keras(tensor: Tensor, name: str, ndim: int) -> npt.NDArray[np.float32]:
    """The inverse of ``_oriented``."""
    array = tensor.float().numpy()
    if "kernel" not in name:
        return array
    array = array.transpose(2, 0, 1) if name == "depthwise_kernel" else array.transpose()
    return array[0] if array.ndim == ndim + 1 else array


# ---- weights ----

_EXACT = re.compile(r"adapter_houlsby|squeeze_excite|locon_|ia3")
_ADDED = re.compile(r"lora_[ab]/|locon_(down|up)/|ia3(_ff)?/")
_MODULES: dict[str, dict[str, str]] = {  # kind of layer -> its weights -> ours, below the module of that place
    "conv1d": {"kernel": "weight", "bias": "bias"},
    "dense": {"kernel": "weight", "bias": "bias"},
    "batch_normalization": {
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    },
    "layer_normalization": {"gamma": "weight", "beta": "bias"},
    "multihead_attention": {
        "r_w_bias": "content_bias",
        "r_r_bias": "position_bias",
        "r_k_layer/kernel": "position.weight",
        "q_layer/kernel": "query.weight",
        "k_layer/kernel": "key.weight",
        "v_layer/kernel": "value.weight",
        "embedding_layer/kernel": "output.weight",
        "embedding_layer/bias": "output.bias",
    },
    "separable_conv1d": {
        "depthwise_kernel": "depthwise.weight",
        "pointwise_kernel": "pointwise.weight",
        "bias": "pointwise.bias",
    },
}
_PARTS = {"q_layer": "query", "k_layer": "key", "v_layer": "value", "embedding_layer": "output"}


def _read_h5(path: Path) -> Arrays:
    """The weights of a Keras file, by kind and place of their layer; nothing outside the file is followed."""
    if not path.is_file():
        raise ModelError("the weights are missing", str(path), remedy="Check the path")
    with _opened(path, "r") as file:
        found: Arrays = {}
        for kind, place, name, item in _weights(file, path):
            found.setdefault((kind, place), {})[name] = np.asarray(item[()], dtype=np.float32)
    return found


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        what = "reading Keras files needs the package h5py, which is not installed"
        raise ModelError(what, str(path), remedy="pip install 'seqgraft[h5]'") from error
    try:
        with h5py.File(path, mode) as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"the weights cannot be read ({error})",
            str(path),
            remedy="The file may be truncated or no HDF5: copy or download it again",
        ) from error


def _weights(file: Any, path: Path) -> Iterator[tuple[str, int, str, Any]]:
    """Kind and place of its layer, name below that, without ``:0``, and dataset, of every weight of a file."""
    top = file["model_weights"] if file.get("model_weights", getlink=True) is not None else file
    layers = {layer: found for layer in top if (found := dict(_below(top, layer, path)))}
    numbered: dict[str, list[tuple[int, str]]] = {}
    for layer in layers:
        parts = re.fullmatch(r"(.*?)(?:_(\d+))?", layer)
        assert parts is not None
        numbered.setdefault(parts[1].removeprefix("sync_"), []).append((int(parts[2] or 0), layer))
    for kind, alike in numbered.items():
        for place, (_, layer) in enumerate(sorted(alike)):
            for name, item in layers[layer].items():
                yield kind, place, name, item


def _below(top: Any, layer: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Name and dataset of every weight of a layer."""
    pending = [layer]
    while pending:
        name = pending.pop()
        if type(top.get(name, getlink=True)).__name__ != "HardLink":
            remedy = "Take a file that holds its weights itself"
            raise ModelError("the file links to another place, which is not followed", name, where=path, remedy=remedy)
        item = top[name]
        if not hasattr(item, "dtype"):
            pending += [f"{name}/{inner}" for inner in item]
            continue
        if item.external or item.is_virtual:
            raise ModelError("the weights lie in another file, which is not read", name, where=path)
        if item.dtype.kind != "f":
            raise ModelError(f"the weights {name!r} must be floating-point numbers", str(item.dtype), where=path)
        parts = re.sub(r"(:0)+$", "", name).split("/")
        last = max(i for i, part in enumerate(parts) if part == layer)
        yield "/".join(parts[last + 1 :]), item


def _places(trunk: Borzoi) -> dict[str, list[str]]:
    """Kind of layer -> the modules of the trunk, in the order in which Baskerville makes their layers."""
    names = [f"stages.{name}" for name in trunk.stages]
    towers, blocks, ups = (
        [name for name in names if f".{kind}_" in name] for kind in ("tower", "transformer", "upsample")
    )
    final = ["stages.final"] if trunk.settings["final"] else []
    dense = ["below", "lateral"] if trunk.settings["upsample_conv"] else ["lateral"]
    return {
        "conv1d": [f"{name}.conv" for name in ["stages.stem", *towers, *final]],
        "batch_normalization": [
            *(f"{name}.norm" for name in towers),
            *(f"{name}.{norm}" for name in ups for norm in ("norm", "lateral_norm")),
            *(f"{name}.norm" for name in final),
        ],
        "layer_normalization": [f"{b}.{norm}" for b in blocks for norm in ("attention_norm", "feedforward_norm")],
        "multihead_attention": [f"{name}.attention" for name in blocks],
        "dense": [
            *(f"{name}.{layer}" for name in blocks for layer in ("up", "down")),
            *(f"{name}.{layer}" for name in ups for layer in dense),
        ],
        "separable_conv1d": ups,
    }


def _denses(trunk: Borzoi) -> int:
    return len(_places(trunk)["dense"])


def _oriented(array: npt.NDArray[np.float32], name: str) -> Tensor:
    """Keras has (width, inputs, outputs), torch (outputs, inputs, width); vectors and attention's biases stay."""
    tensor = torch.from_numpy(array)
    if "kernel" not in name:
        return tensor
    return tensor.permute(1, 2, 0) if name == "depthwise_kernel" else tensor.permute(*reversed(range(tensor.ndim)))


def _fill(trunk: Borzoi, layers: Arrays, path: Path) -> tuple[LoadReport, dict[str, Tensor]]:
    """Copies the weights into the trunk; strict about names and shapes."""
    places, own = _places(trunk), trunk.state_dict()
    given: dict[str, Tensor] = {}
    matched: dict[str, str] = {}
    adapter: dict[str, Tensor] = {}
    extra: list[str] = []
    bottlenecks = [f"{b.removesuffix('.attention')}.{end}" for b in places["multihead_attention"] for end in _AFTER]
    excited = sum(kind == "squeeze_excite" for kind, _ in layers)
    added = {
        "adapter_houlsby": bottlenecks,
        "squeeze_excite": places["conv1d"][len(places["conv1d"]) - excited :] if excited else [],
    }
    for (kind, place), arrays in layers.items():
        modules = places.get(kind, added.get(kind, []))
        for name, array in arrays.items():
            if place >= len(modules):
                extra.append(f"{kind} {place}/{name}")
            elif kind in added or _ADDED.search(name):
                layer, _, rest = name.partition("/")
                inner = f".{_PARTS[layer]}" if layer in _PARTS else ""
                adapter[f"{modules[place]}{inner}:{rest if inner else name}"] = _oriented(array, name).contiguous()
            elif (ours := _MODULES.get(kind, {}).get(name)) is None:
                extra.append(f"{kind} {place}/{name}")
            else:
                given[f"{modules[place]}.{ours}"] = _oriented(array, name)
                matched[f"trunk.{modules[place]}.{ours}"] = f"{kind} {place}/{name}"
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    given = {
        name: t[..., None] if name in own and _of_conv(trunk, name) and t.ndim == own[name].ndim - 1 else t
        for name, t in given.items()
    }
    missing = sorted(set(own) - counters - set(given))
    shapes = [
        f"{name}: {tuple(t.shape)} instead of {tuple(own[name].shape)}"
        for name, t in given.items()
        if name in own and t.shape != own[name].shape
    ]
    if missing or extra or shapes:
        raise ModelError(
            "the weights do not fit params.json",
            {"missing": missing, "unexpected": sorted(extra), "misshapen": shapes},
            where=path,
            remedy="Take the params.json that the network was trained with",
        )
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)
    new = tuple(f"trunk.{name}" for name in sorted(counters))
    return LoadReport(path, file_sha256(path), matched, new, tuple(sorted(adapter))), adapter


_AFTER = ("attention.output", "down")  # the layers that Houlsby adapters follow


def _of_conv(trunk: nn.Module, name: str) -> bool:
    """Whether a weight belongs to a convolution: Keras has a dense layer for one of width 1."""
    module, _, part = name.rpartition(".")
    return part == "weight" and isinstance(trunk.get_submodule(module), nn.Conv1d)


# ---- heads ----


def _tracks(targets: Path | str | None, head: Mapping[str, Any], network: Network, old: bool, path: Path) -> TrackTable:
    units = len(head.get("bias", ()))
    if network.heads and units not in network.heads.values():
        what = f"the head has a number of tracks that params.json does not know, {dict(network.heads)}"
        raise ModelError(what, units, where=path)
    if targets is None:
        return TrackTable.build([{"name": f"track_{i}", "group": "tracks", "link": "softplus"} for i in range(units)])
    tracks = read_track_table(targets, transform_old=old).replace(link="softplus")
    if len(tracks) != units:
        raise ModelError(f"the head has {units} tracks and the table of targets has", len(tracks), where=targets)
    return tracks


def _heads(tracks: TrackTable, channels: int, head: Mapping[str, Any], path: Path) -> dict[str, Head]:
    expected = (channels, len(tracks))
    if set(head) != {"kernel", "bias"} or head["kernel"].shape != expected:
        found = {name: array.shape for name, array in head.items()}
        raise ModelError(f"the head does not have a kernel {expected} and a bias", found, where=path)
    kernel, bias = torch.from_numpy(head["kernel"]).T[..., None], torch.from_numpy(head["bias"])
    heads = {}
    for group, index in tracks.groups.items():
        made = Head(tracks.select([tracks.names[i] for i in index]), channels)
        made.out.load_state_dict({"weight": kernel[index], "bias": bias[index]})
        heads[(group or "tracks").replace(".", "_")] = made
    return heads
