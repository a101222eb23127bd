"""Models by name: the registry of trunks, and the folder format in which weights travel.

::

    NAME/
      model.json            format version, architecture and settings, tracks and heads, hash of the weights, licence
      weights.safetensors   "trunk.*" and "heads.*"
      trained_on.bed        the regions that the weights were fitted to (column 4: the fold)
      card.md               for people

A name is one of the models that come with the package (``seqgraft models``), the path of such a folder, or an
architecture (``convnet``) with random weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from seqgraft.data.dataset import DatasetInfo, new_folder, write_json
from seqgraft.errors import ConfigError, ModelError, Problems
from seqgraft.models.base import Head, SequenceModel, Trunk, weight_hash, with_spec
from seqgraft.models.borzoi import Borzoi
from seqgraft.models.convnet import ConvNet
from seqgraft.models.enformer import Enformer
from seqgraft.tracks import TrackTable

__all__ = [
    "TRUNKS",
    "ModelConfig",
    "Pretrained",
    "build_model",
    "build_pretrained",
    "bundled_models",
    "find_model",
    "read_tensors",
    "save_model",
]

FORMAT_VERSION = 1
PRETRAINED = "pretrained_"  # heads whose names start so came with the weights and stay as they are
CONTINUED = "continued_"  # and those of head: pretrained, which train on

#: Architecture -> class. A new trunk is registered here, and the contract tests find it.
TRUNKS: dict[str, type[Trunk]] = {"convnet": ConvNet, "borzoi": Borzoi, "enformer": Enformer}


@dataclass(frozen=True)
class ModelConfig:
    """Which model to start from.

    Attributes:
        name: a bundled model, the path of a model folder, or an architecture.
        init: "random" keeps the architecture and draws new weights: the control that training from scratch needs.
        head: "new" heads for the new tracks; "pretrained": the heads that came with the weights train on, for tracks of
            the same names; "extend": new heads. Pretrained tracks that the data lack are kept frozen beside them.
        pool: how the bins of a labelled sequence become one.
        settings: of an architecture, such as ``{channels: 96, depth: 4, blocks: 2}``.
    """

    name: str = "convnet"
    init: Literal["pretrained", "random"] = "pretrained"
    head: Literal["new", "pretrained", "extend"] = "new"
    pool: Literal["mean", "max"] = "mean"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Every setting of an architecture is of the type of its default."""
        defaults = TRUNKS[self.name].defaults() if self.name in TRUNKS else {}
        problems = Problems(ConfigError)
        for name, value in self.settings.items():
            if name in defaults and not _like(value, defaults[name]):
                remedy = f"Give a value such as {defaults[name]!r}"
                problems.add(f"{name} has a value of another kind", value, where="model.settings", remedy=remedy)
        problems.raise_if_any()


def _like(value: object, default: object) -> bool:
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple) and all(_like(inner, default[0]) for inner in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return default is None or type(value) is type(default)


@dataclass(frozen=True)
class Pretrained:
    """A model folder, read but not built."""

    folder: Path
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.content["name"])

    @cached_property
    def tracks(self) -> TrackTable:
        return TrackTable.build(self.content["tracks"])

    @property
    def trained_on(self) -> Path | None:
        path = self.folder / "trained_on.bed"
        return path if path.exists() else None

    def tensors(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.folder / "weights.safetensors")


def bundled_models() -> dict[str, Pretrained]:
    """The models that come with the package, by name."""
    folder = Path(__file__).parent.parent / "trunks"
    return {path.parent.name: _read_folder(path.parent) for path in sorted(folder.glob("*/model.json"))}


def find_model(name: str) -> Pretrained | None:
    """The pretrained model of that name or path; None if it names an architecture.

    Raises:
        ConfigError: there is no such model.
    """
    if name in TRUNKS:
        return None
    bundled = bundled_models()
    if name in bundled:
        return bundled[name]
    if (Path(name) / "model.json").exists():
        return _read_folder(Path(name))
    raise ConfigError(
        "there is no such model",
        name,
        where="model.name",
        remedy=f"Choose one of {sorted([*bundled, *TRUNKS])}, or the path of a folder with a model.json",
    )


def _read_folder(folder: Path) -> Pretrained:
    path = folder / "model.json"
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        remedy = "Copy or download the folder again"
        raise ConfigError(f"the file is not valid JSON ({error})", where=path, remedy=remedy) from error
    if not isinstance(content, dict):
        raise ConfigError("the file does not describe a model", type(content).__name__, where=path)
    if content.get("format") != "seqgraft-model" or content.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            "the model has a format or version that this seqgraft does not read",
            content.get("format_version"),
            where=path,
        )
    needed = ("name", "architecture", "settings", "bin_size", "heads", "tracks", "weights_sha256")
    if absent := [key for key in needed if key not in content]:
        raise ConfigError("the model's description lacks entries", absent, where=path, remedy="Copy the folder again")
    if content["architecture"] not in TRUNKS:
        raise ModelError(
            "the model has an unknown architecture",
            content["architecture"],
            where=path,
            remedy=f"Known are {sorted(TRUNKS)}",
        )
    return Pretrained(folder, content)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ModelError: the file is missing, truncated or not a safetensors file.
    """
    if not path.exists():
        raise ModelError("the weights are missing", str(path), remedy="Copy the whole folder")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(
            f"the weights cannot be read ({error})",
            str(path),
            remedy="The file may be truncated: copy or download it again",
        ) from error


def build_model(config: ModelConfig, tracks: TrackTable, info: DatasetInfo, covariates: int = 0) -> SequenceModel:
    """A model for the tracks of a dataset, with pretrained or random weights and everything trainable.

    Args:
        tracks: the dataset's tracks; heads are made one per group.
        info: window, bins and bin size of the dataset.
        covariates: how many covariates each example has.

    Raises:
        ConfigError: unknown model or settings.
        ModelError: the trunk does not fit the dataset's window or bins, or its weights do not fit the architecture.
    """
    pretrained = find_model(config.name)
    labels = info.bins == 1
    trunk = _build_trunk(config, pretrained, info, labels)
    pool = config.pool if labels else "none"
    heads = {} if config.head == "pretrained" else _new_heads(tracks, trunk.spec.channels, pool, covariates)
    if config.head == "new":
        model = SequenceModel(trunk, heads, tracks)
    else:
        model = _with_pretrained_heads(config, pretrained, trunk, heads, tracks, labels)
    if pretrained is not None and config.init == "pretrained":
        _load(model, pretrained)
    return model


def build_pretrained(config: ModelConfig, info: DatasetInfo) -> SequenceModel | None:
    """The pretrained model with its own heads and nothing new, for the bins of a dataset; None if there is none.

    Its outputs are what the new data's predictions are compared with, and what fine-tuning may forget.
    """
    pretrained = find_model(config.name)
    if pretrained is None or config.init == "random" or info.bins == 1:
        return None
    trunk = _build_trunk(config, pretrained, info, labels=False)
    model = SequenceModel(trunk, _pretrained_heads(pretrained, trunk), pretrained.tracks)
    _load(model, pretrained)
    return model.eval()


def _pretrained_heads(pretrained: Pretrained, trunk: Trunk) -> dict[str, Head]:
    tracks, channels = pretrained.tracks, trunk.spec.channels
    return {
        PRETRAINED + name: Head(tracks.select(names), channels) for name, names in pretrained.content["heads"].items()
    }


def _build_trunk(config: ModelConfig, pretrained: Pretrained | None, info: DatasetInfo, labels: bool) -> Trunk:
    architecture = str(pretrained.content["architecture"]) if pretrained else config.name
    if pretrained is not None and config.settings:
        raise ConfigError(
            "a pretrained model brings its own settings",
            dict(config.settings),
            where="model.settings",
            remedy="Remove them, or name an architecture",
        )
    settings = dict(pretrained.content["settings"] if pretrained else config.settings)
    kind = TRUNKS[architecture]
    native = int(pretrained.content["bin_size"]) if pretrained else (kind.label_bin_size if labels else info.bin_size)
    if labels:
        crop = 0
    else:
        if native != info.bin_size:
            raise ModelError(
                f"the model gives bins of {native} bp and the dataset has bins of",
                info.bin_size,
                where=f"model {config.name}",
                remedy=f"Prepare the data with bin_size: {native}",
            )
        crop, rest = divmod(info.window - info.bins * info.bin_size, 2 * native)
        if rest or crop < 0:
            raise ModelError(
                "the margin between window and target interval must be a whole number of bins on each side",
                f"window {info.window}, {info.bins} bins of {info.bin_size} bp",
                remedy=f"Choose a window that exceeds the target length by a multiple of {2 * native}",
            )
    if unknown := sorted(set(settings) - set(names := kind.defaults())):
        raise ConfigError(
            "the architecture does not take these settings",
            unknown,
            where="model.settings",
            remedy=f"It takes {', '.join(names)}",
        )
    trunk = kind.build(settings, bin_size=native, crop=crop)
    if not labels and info.window % trunk.stride:
        raise ModelError(
            "the window must be a multiple of the trunk's stride",
            info.window,
            where=f"model {config.name}",
            remedy=f"Choose a multiple of {trunk.stride} bp",
        )
    if pretrained is not None:
        content = pretrained.content
        with_spec(trunk, name=pretrained.name, licence=content.get("licence", ""), citation=content.get("citation", ""))
        if config.init == "pretrained":
            with_spec(
                trunk, weights=str(content["weights_sha256"]), folds=pretrained.name if pretrained.trained_on else None
            )
    return trunk


def _new_heads(
    tracks: TrackTable, channels: int, pool: Literal["none", "mean", "max"], covariates: int
) -> dict[str, Head]:
    return {
        _key(group): Head(tracks.select([tracks.names[i] for i in index]), channels, pool, covariates)
        for group, index in tracks.groups.items()
    }


def _key(group: str) -> str:
    return "new_" + group.replace(".", "_")


def _with_pretrained_heads(
    config: ModelConfig,
    pretrained: Pretrained | None,
    trunk: Trunk,
    heads: dict[str, Head],
    tracks: TrackTable,
    labels: bool,
) -> SequenceModel:
    if pretrained is None or labels:
        raise ModelError(
            f"head: {config.head} needs a pretrained model and tracks with bins",
            config.name,
            where="model.head",
            remedy="Use head: new",
        )
    old = pretrained.tracks
    if config.head == "pretrained":
        absent = [name for name in tracks.names if name not in old.names]
        if absent:
            raise ModelError(
                "the pretrained heads have no tracks of these names",
                absent,
                where="model.head",
                remedy=f"They have {old.names}; use head: new or extend",
            )
        _check_units(tracks, old)
        continued: dict[str, Head] = {}
        for name, names in pretrained.content["heads"].items():
            here = [track for track in names if track in tracks.names]
            rest = [track for track in names if track not in tracks.names]
            for prefix, table, chosen in ((CONTINUED, tracks, here), (PRETRAINED, old, rest)):
                if chosen:
                    continued[prefix + name] = Head(table.select(chosen), trunk.spec.channels)
        beside = [name for name in old.names if name not in tracks.names]
        return SequenceModel(trunk, continued, tracks.concat(old.select(beside)) if beside else tracks)
    if config.init == "random":
        raise ConfigError(
            "pretrained tracks cannot be kept on a trunk with random weights",
            config.head,
            where="model.head",
            remedy="Use head: new with init: random",
        )
    clash = set(tracks.names) & set(old.names)
    if clash:
        raise ModelError(
            "new and pretrained tracks share names",
            sorted(clash),
            where="model.head",
            remedy="Rename the new tracks, or use head: pretrained",
        )
    return SequenceModel(trunk, {**heads, **_pretrained_heads(pretrained, trunk)}, tracks.concat(old))


def _check_units(tracks: TrackTable, old: TrackTable) -> None:
    """A head that trains on must mean the same by its outputs."""
    problems = Problems(ModelError)
    for column in ("link", "statistic", "scale", "center", "squash", "soft_clip", "clip"):
        of_old = dict(zip(old.names, old.frame[column], strict=True))
        for name, value in zip(tracks.names, tracks.frame[column], strict=True):
            if value != of_old[name] and not (value != value and of_old[name] != of_old[name]):  # NaN: none
                problems.add(
                    f"the track {name!r} has another {column} than in the pretrained model, {of_old[name]!r}",
                    value,
                    where="model.head",
                    remedy="Prepare the tracks as the model's were, or use head: new",
                )
    problems.raise_if_any()


def _load(model: SequenceModel, pretrained: Pretrained) -> None:
    """Copies the trunk's weights, and those of pretrained tracks that the model has; strict about names and shapes."""
    tensors = pretrained.tensors()
    own = model.state_dict()
    wanted: dict[str, list[tuple[str, list[int] | None]]] = {  # their name -> ours, and which of their rows
        name: [(name, None)] for name in own if name.startswith("trunk.")
    }
    expected = {name: tuple(own[name].shape) for name in wanted}
    for key, head in model.heads.items():
        if key.startswith((PRETRAINED, CONTINUED)) and isinstance(head, Head):
            there = key.partition("_")[2]
            names = list(pretrained.content["heads"][there])
            for part, tensor in head.state_dict().items():
                theirs = f"heads.{there}.{part}"
                rows = [names.index(track) for track in head.tracks.names]
                wanted.setdefault(theirs, []).append((f"heads.{key}.{part}", rows))
                expected[theirs] = (len(names), *tensor.shape[1:])
    missing = sorted(set(wanted) - set(tensors))
    extra = sorted(name for name in set(tensors) - set(wanted) if name.startswith("trunk."))
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or extra or shapes:
        raise ModelError(
            "the weights do not fit the architecture",
            {"missing": missing, "unexpected": extra, "misshapen": shapes},
            where=pretrained.folder,
        )
    with torch.no_grad():
        for theirs, copies in wanted.items():
            for ours, chosen in copies:
                own[ours].copy_(tensors[theirs] if chosen is None else tensors[theirs][chosen])
    found = weight_hash(model.trunk)
    if found != pretrained.content["weights_sha256"]:
        raise ModelError(
            "the weights are not those that model.json describes",
            found,
            where=pretrained.folder,
            remedy="Copy or download the folder again",
        )


def save_model(
    model: SequenceModel,
    folder: Path,
    *,
    name: str,
    info: DatasetInfo,
    licence: str,
    citation: str,
    trained_on: pd.DataFrame | None,
    card: str,
    **facts: object,
) -> None:
    """Writes a model folder from a model without adapters (merge first).

    Args:
        trained_on: regions (chrom, start, end, fold) that the weights were fitted to, for leak checks.
        facts: anything else that ``model.json`` should record.
    """
    trunk = model.trunk
    architecture = next(key for key, cls in TRUNKS.items() if type(trunk) is cls)
    with new_folder(Path(folder)) as building:
        tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, building / "weights.safetensors")
        if trained_on is not None:
            trained_on[["chrom", "start", "end", "fold"]].to_csv(
                building / "trained_on.bed", sep="\t", header=False, index=False
            )
        (building / "card.md").write_text(card)
        tracks = model.tracks.replace(file=[""] * len(model.tracks)).to_frame()
        write_json(
            building / "model.json",
            {
                "format": "seqgraft-model",
                "format_version": FORMAT_VERSION,
                "name": name,
                "architecture": architecture,
                "settings": dict(trunk.settings),
                "bin_size": trunk.spec.bin_size,
                "window": info.window,
                "bins": info.bins,
                "genome": (info.genome or {}).get("hash"),
                "heads": {key: head.tracks.names for key, head in model.heads.items() if isinstance(head, Head)},
                "tracks": [
                    {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}
                    for row in tracks.to_dict("records")
                ],
                "weights_sha256": weight_hash(trunk),
                "licence": licence,
                "citation": citation,
                **facts,
            },
        )
