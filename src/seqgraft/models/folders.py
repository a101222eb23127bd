"""Models by name: the registry of trunks, and the folder format in which weights travel.

::

    NAME/
      model.json            format version, architecture and settings, tracks and heads, hash of the weights, licence
      weights.safetensors   "trunk.*" and "heads.*"
      trained_on.bed        the regions that the weights were fitted to (column 4: the fold)
      card.md               for people

A name is one of the models that come with the package (``seqgraft models``), the path of such a folder, the id of a
repository of the Hugging Face hub or the path of a folder as it has them (which becomes such a folder, once, in the
cache), or an architecture (``convnet``) with random weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file

from seqgraft.data.dataset import DatasetInfo, new_folder, write_json
from seqgraft.errors import ConfigError, ModelError, RunError
from seqgraft.genome import cache_folder
from seqgraft.models.automodel import AutoTrunk
from seqgraft.models.base import Head, SequenceModel, Trunk, weight_hash
from seqgraft.models.borzoi import Borzoi
from seqgraft.models.convnet import ConvNet
from seqgraft.models.enformer import Enformer
from seqgraft.models.hub import is_hub_id, licence_of, load_published
from seqgraft.models.huggingface import WEIGHTS, Loaded
from seqgraft.models.language import Language
from seqgraft.models.reading import file_sha256, read_tensors
from seqgraft.models.remote_code import check_commit
from seqgraft.models.wrap import ModuleSpec, WrappedTrunk, trunk_class
from seqgraft.tracks import TrackTable

__all__ = [
    "TRUNKS",
    "Pretrained",
    "bundled_models",
    "convert_published",
    "find_model",
    "is_like",
    "read_model",
    "register",
    "save_model",
]

FORMAT_VERSION = 1
#: What model.json has at least -> its type.
_ENTRIES: Mapping[str, type] = {
    "name": str,
    "architecture": str,
    "settings": dict,
    "bin_size": int,
    "window": int,
    "bins": int,
    "heads": dict,
    "tracks": list,
    "weights_sha256": str,
}

#: Architecture -> class. A new trunk is registered here, and the contract tests find it.
TRUNKS: dict[str, type[Trunk]] = {
    "convnet": ConvNet,
    "borzoi": Borzoi,
    "enformer": Enformer,
    "language": Language,
    "transformers": AutoTrunk,
}


@dataclass(frozen=True)
class Pretrained:
    """A model folder, read but not built."""

    folder: Path
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.content["name"])

    @property
    def folds(self) -> str | None:
        """Key of the published split that the weights were trained on (``seqgraft.data.seen.TRUNK_FOLDS``)."""
        return str(self.content["folds"]) if self.content.get("folds") else None

    @cached_property
    def tracks(self) -> TrackTable:
        listed = self.content["tracks"]
        return TrackTable.build(listed) if listed else TrackTable.none()

    @property
    def trained_on(self) -> Path | None:
        path = self.folder / "trained_on.bed"
        return path if path.exists() else None

    def tensors(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.folder / "weights.safetensors")


def bundled_models() -> dict[str, Pretrained]:
    """The models that come with the package, by name."""
    folder = Path(__file__).parent.parent / "trunks"
    return {path.parent.name: read_model(path.parent) for path in sorted(folder.glob("*/model.json"))}


def find_model(
    name: str, revision: str | None = None, species: str | None = None, remote_code: str | None = None
) -> Pretrained | None:
    """The pretrained model of that name, path or hub id; None if it names an architecture.

    A hub id, or a folder as the hub has them, is converted to a model folder in the cache at its first use, and read
    from there ever after.

    Args:
        revision: the full commit of a hub id's repository.
        species: whose token stands before each sequence, for models that have such tokens.
        remote_code: the full commit whose Python files may run, for models that are made by code of their repository.

    Raises:
        ConfigError: there is no such model; a hub id without a commit, or a commit without a hub id; a species that
            the model does not know, or none where it needs one.
        ModelError: weights that cannot be downloaded or do not fit.
    """
    check_commit(remote_code)
    found = _find(name, revision, species, remote_code)
    own = found.content["settings"].get("species", "") if found else ""
    if species is not None and species != own:
        remedy = f"It was made for {own}: name that, or leave it out" if own else "It has none at all: leave it out"
        raise ConfigError("the model has no token for the species", species, where="model.species", remedy=remedy)
    if remote_code is not None and (found is None or not found.content["settings"].get("code")):
        what = "the model needs no code of its repository"
        raise ConfigError(what, remote_code, where="model.remote_code", remedy="Leave it out")
    return found


def _find(name: str, revision: str | None, species: str | None, remote_code: str | None) -> Pretrained | None:
    bundled, ours = bundled_models(), (Path(name) / "model.json").exists()
    foreign = name not in TRUNKS and name not in bundled and not ours
    if foreign and is_hub_id(name) and not Path(name).is_dir():
        return read_model(_converted(name, revision, species, remote_code))
    if revision is not None:
        raise ConfigError("only a hub id has a revision", revision, where="model.revision", remedy="Leave it out")
    if foreign and (Path(name) / "config.json").exists():
        return read_model(_converted_folder(Path(name), species, remote_code))
    if name in TRUNKS:
        return None
    if name in bundled:
        return bundled[name]
    if ours:
        return read_model(Path(name))
    paths = "the path of a folder with a model.json, or with a config.json and weights as the hub has them"
    remedy = f"Choose one of {sorted([*bundled, *TRUNKS])}, {paths}, or a hub id"
    raise ConfigError("there is no such model", name, where="model.name", remedy=remedy)


def _converted(name: str, revision: str | None, species: str | None, remote_code: str | None) -> Path:
    """The model folder in the cache of a repository's commit, made if need be."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ConfigError(
            f"there is no model folder {name!r}, and as a hub id it needs the commit that is meant",
            revision,
            where="model.revision",
            remedy="Give the 40 digits of a commit, from the repository's history on the hub",
        )
    folder = cache_folder() / "models" / name.replace("/", "--") / _variant(str(revision), species, remote_code)
    _convert_once(folder, name, source=name, revision=revision, species=species, remote_code=remote_code)
    return folder


def _converted_folder(source: Path, species: str | None, remote_code: str | None) -> Path:
    """The model folder in the cache of a folder as the hub has them, made if need be: one for each content."""
    described = sorted(path for path in source.iterdir() if path.suffix in (".json", ".txt", ".py"))
    files = [*described, *(source / name for name in WEIGHTS if (source / name).exists())]
    hashes = [f"{path.name} {_file_hash(path, path.stat().st_size, path.stat().st_mtime_ns)}" for path in files]
    key = hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:32]
    folder = cache_folder() / "models" / "folders" / _variant(key, species, remote_code)
    _convert_once(folder, source.resolve().name, source=str(source), species=species, remote_code=remote_code)
    return folder


@cache
def _file_hash(path: Path, size: int, time: int) -> str:  # noqa: ARG001  (a file that changes is another)
    return file_sha256(path)


def _variant(key: str, species: str | None, remote_code: str | None) -> str:
    key = key if species is None else f"{key}-{species.replace('/', '--')}"
    return key if remote_code is None else f"{key}-code-{remote_code}"


def _convert_once(
    folder: Path,
    name: str,
    *,
    source: str,
    revision: str | None = None,
    species: str | None = None,
    remote_code: str | None = None,
) -> None:
    if (folder / "model.json").exists():
        return
    loaded = load_published(source, revision=revision, species=species, remote_code=remote_code)
    try:
        convert_published(loaded, folder, name=name, licence=licence_of(source), source=source, revision=revision)
    except RunError:
        if not (folder / "model.json").exists():  # else another process was faster, with the same result
            raise


def is_like(value: object, default: object) -> bool:
    """Whether a setting of an architecture is of the type of its default; whole numbers are fractions too."""
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple) and all(is_like(inner, each) for inner in value for each in default[:1])
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return default is None or type(value) is type(default)


def read_model(folder: Path) -> Pretrained:
    """A model folder of ours.

    Raises:
        ConfigError: it has no valid description.
        ModelError: an unknown architecture.
    """
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
    again = "Copy the folder again"
    if absent := [key for key in _ENTRIES if key not in content]:
        raise ConfigError("the model's description lacks entries", absent, where=path, remedy=again)
    wrong = {key: content[key] for key, kind in _ENTRIES.items() if type(content[key]) is not kind}
    if not wrong and not all(isinstance(names, list) for names in content["heads"].values()):
        wrong = {"heads": content["heads"]}
    if wrong:
        raise ConfigError("these entries have values of another kind", wrong, where=path, remedy=again)
    if content["architecture"] not in TRUNKS:
        raise ModelError(
            "the model has an unknown architecture",
            content["architecture"],
            where=path,
            remedy=f"Known are {sorted(TRUNKS)}; register a module of your own first",
        )
    defaults, settings = TRUNKS[content["architecture"]].defaults(), content["settings"]
    odd = {k: value for k, value in settings.items() if k not in defaults or not is_like(value, defaults[k])}
    if odd:
        remedy = f"The architecture takes {', '.join(defaults)}: copy the folder again"
        raise ConfigError("settings that the model's architecture does not take", odd, where=path, remedy=remedy)
    return Pretrained(folder, content)


def register(name: str, make: Callable[..., torch.nn.Module | Mapping[str, torch.nn.Module]], spec: ModuleSpec) -> None:
    """Lets this process use a module by name, as an architecture: in ``ModelConfig.name`` and in model folders.

    A file can name it and never make it: another process that reads the run or the folder registers it first.
    A name of one's own may be registered again.

    Args:
        make: makes the module, the same at every call; its keyword arguments are ``ModelConfig.settings``.
        spec: what ``wrap`` takes. With ``spec.weights`` the weights that ``make`` gives count as pretrained, and
            ``init: random`` draws new ones.

    Raises:
        ModelError: the name belongs to the package, or the module does not fit its spec.
    """
    known = TRUNKS.get(name)
    if name in bundled_models() or (known is not None and not issubclass(known, WrappedTrunk)):
        raise ModelError("the name belongs to a model of the package", name, where="register", remedy="Choose another")
    kind = trunk_class(make, spec)
    kind.build({}, bin_size=spec.bin_size, crop=spec.drops)  # whatever is wrong with it is said here
    TRUNKS[name] = kind


def convert_published(
    loaded: Loaded,
    folder: Path,
    *,
    name: str,
    licence: str,
    source: str,
    revision: str | None = None,
    trained_on: pd.DataFrame | None = None,
) -> None:
    """Writes published weights as a model folder, which ``model.name`` takes.

    Args:
        name: of the model.
        licence: of the weights.
        source, revision: where they came from, for the record.
        trained_on: regions (chrom, start, end, fold) that they were fitted to, for leak checks.

    Raises:
        RunError: the folder exists or cannot be written.
    """
    report, spec = loaded.report, loaded.trunk.spec
    tables = [head.tracks for head in loaded.heads.values()]
    tracks = tables[0] if tables else TrackTable.none()
    for more in tables[1:]:
        tracks = tracks.concat(more)
    origin = {"source": source, "revision": revision, "file": report.file.name, "sha256": report.sha256}
    at = f"{source} at {revision}" if revision else source
    card = (
        f"# {name}\n\nConverted from {at} ({report.file.name}, sha256 {report.sha256}).\n\n"
        f"Licence: {licence}. Citation: {spec.citation}.\n"
    )
    save_model(
        SequenceModel(loaded.trunk, loaded.heads, tracks),
        folder,
        name=name,
        info=DatasetInfo("coverage", loaded.window, loaded.bins, spec.bin_size),
        licence=licence,
        citation=spec.citation,
        trained_on=trained_on,
        card=card,
        parameters=sum(p.numel() for p in loaded.trunk.parameters()),
        folds=spec.folds,
        converted_from=origin,
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
    half: bool = False,
    **facts: object,
) -> None:
    """Writes a model folder from a model without adapters (merge first).

    Args:
        trained_on: regions (chrom, start, end, fold) that the weights were fitted to, for leak checks.
        half: round the model's numbers to bfloat16, and store them so; they are read as float32.
        facts: anything else that ``model.json`` should record.
    """
    trunk = model.trunk
    architecture = next((key for key, cls in TRUNKS.items() if type(trunk) is cls), None)
    if architecture is None:
        remedy = "Register it, and build it by its name"
        raise ModelError("only a registered trunk can be saved as a model", trunk.spec.name, remedy=remedy)
    with new_folder(Path(folder)) as building:
        if half:
            _round(model)
        tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        if half:
            tensors = {key: t.bfloat16() if t.is_floating_point() else t for key, t in tensors.items()}
        save_file(tensors, building / "weights.safetensors")
        if trained_on is not None:
            trained_on[["chrom", "start", "end", "fold"]].to_csv(
                building / "trained_on.bed", sep="\t", header=False, index=False
            )
        (building / "card.md").write_text(card)
        tracks = model.tracks.to_frame().assign(file="")
        write_json(
            building / "model.json",
            {
                "format": "seqgraft-model",
                "format_version": FORMAT_VERSION,
                "name": name,
                "architecture": architecture,
                "settings": dict(trunk.settings),
                "bin_size": trunk.spec.bin_size or info.bin_size,  # one bin of whatever there is
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


@torch.no_grad()
def _round(model: SequenceModel) -> None:
    """Every floating-point number becomes one that bfloat16 has; the weights' hash is of what will be read."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
