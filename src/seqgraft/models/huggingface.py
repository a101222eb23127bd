"""Enformer's weights in the Hugging Face layout of ``EleutherAI/enformer-official-rough``, that of enformer-pytorch.

::

    FOLDER/
      config.json                              model_type "enformer", sizes, heads
      model.safetensors or pytorch_model.bin   stem.*, conv_tower.*, transformer.*, final_pointwise.*, _heads.NAME.*

Every tensor is accounted for: what is missing, unknown or misshapen is an error, and nothing of a file is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqgraft.data.dataset import DatasetInfo
from seqgraft.errors import ConfigError, ModelError
from seqgraft.models.base import Head, SequenceModel, with_spec
from seqgraft.models.enformer import Enformer
from seqgraft.models.weights import read_tensors, save_model
from seqgraft.tracks import TrackTable

__all__ = ["ENFORMER_CITATION", "LoadReport", "Loaded", "convert_enformer", "find_folder", "load_enformer"]

PUBLISHED = "EleutherAI/enformer-official-rough"
ENFORMER_CITATION = (
    "Avsec et al., Effective gene expression prediction from sequence by integrating long-range interactions, "
    "Nature Methods 18, 2021, doi 10.1038/s41592-021-01252-x"
)
_FILES = ("model.safetensors", "pytorch_model.bin")

# Where our stages and their modules stand there.
_STAGES = {"stem": "stem", "tower": "conv_tower", "transformer": "transformer", "final": "final_pointwise"}
_RESIDUAL = {"mix_norm": "1.fn.0", "mix": "1.fn.2", "pool.logits": "2.to_attn_logits"}
_MODULES = {
    "stem": {"conv": "0", **_RESIDUAL},
    "tower": {"norm": "0.0", "conv": "0.2", **_RESIDUAL},
    "transformer": {
        "attention_norm": "0.fn.0",
        "query": "0.fn.1.to_q",
        "key": "0.fn.1.to_k",
        "value": "0.fn.1.to_v",
        "output": "0.fn.1.to_out",
        "position": "0.fn.1.to_rel_k",
        "content_bias": "0.fn.1.rel_content_bias",
        "position_bias": "0.fn.1.rel_pos_bias",
        "feedforward_norm": "1.fn.0",
        "up": "1.fn.1",
        "down": "1.fn.4",
    },
    "final": {"norm": "1.0", "conv": "1.2"},
}
# The same tensors under a second name, of which a file may have either or both.
_ALIASES = {
    "_trunk.1.": "stem.",
    "_trunk.2.": "conv_tower.",
    "_trunk.4.": "transformer.",
    "_trunk.6.": "final_pointwise.",
}
# Settings of the trunk and their keys in config.json.
_SETTINGS = {
    "channels": "dim",
    "depth": "depth",
    "heads": "heads",
    "key_size": "attn_dim_key",
    "divisible_by": "dim_divisible_by",
    "dropout": "dropout_rate",
    "attention_dropout": "attn_dropout",
    "position_dropout": "pos_dropout",
}
_RATES = ("dropout_rate", "attn_dropout", "pos_dropout")
_OTHERS = ("num_downsamples", "target_length", "output_heads")


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor.

    Attributes:
        file: the file of the weights.
        sha256: of that file.
        matched: our name ("trunk.*", "heads.*") -> theirs.
        left: tensors of the file that were not used: second names of the same tensors.
    """

    file: Path
    sha256: str
    matched: Mapping[str, str]
    left: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {len(self.matched)} tensors matched, 0 new, {len(self.left)} left (second names)"


@dataclass(frozen=True)
class Loaded:
    """Trunk and heads with their weights, both in float32 and eval mode.

    Attributes:
        heads: by the names in ``config.json``: human and mouse.
        window: input length in bp that the output bins belong to.
    """

    trunk: Enformer
    heads: Mapping[str, Head]
    report: LoadReport
    window: int
    bins: int


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is, or the snapshot of a Hugging Face repository in the local cache, downloaded if need be.

    Args:
        source: the path of a folder, or a hub id such as ``EleutherAI/enformer-official-rough``.
        revision: the full commit of the repository; needed for a hub id, so that the weights stay the same.

    Raises:
        ConfigError: a hub id without a commit.
        ModelError: it is neither, or it cannot be downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ModelError("there is no such folder", str(source), remedy="Give a folder with a config.json, or a hub id")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        remedy = "Give the 40 digits of a commit, from the repository's history on the hub"
        raise ConfigError("a hub id needs the commit that is meant", revision, where=str(source), remedy=remedy)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=["config.json", *_FILES]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(
            f"the repository cannot be downloaded ({type(error).__name__}: {error})",
            where=str(source),
            remedy="Check name, commit and network, or copy the files into a folder and give its path",
        ) from error


def load_enformer(
    source: str | Path,
    *,
    revision: str | None = None,
    tensorflow_gamma: bool | None = None,
    positions: int = 1536,
    tracks: Mapping[str, TrackTable] | None = None,
) -> Loaded:
    """Enformer's trunk and heads from a folder or a hub id.

    Args:
        source, revision: see ``find_folder``.
        tensorflow_gamma: which gamma features the weights were trained with: True for the published ones, False for
            those that enformer-pytorch trained without its table. None: as ``config.json`` says (``use_tf_gamma``).
        positions: of 128 bp (of the model's bin size) in the training window.
        tracks: the tracks of each head. None: tracks named "human_0" and so on, whose units are unknown.

    Raises:
        ConfigError: see ``find_folder``.
        ModelError: files that are missing, truncated or of another model; tensors that do not fit.
    """
    folder = find_folder(source, revision)
    config = _read_config(folder / "config.json")
    if tensorflow_gamma is None:
        tensorflow_gamma = True if str(source) == PUBLISHED else config.get("use_tf_gamma")
    if tensorflow_gamma is None:
        raise ModelError(
            "config.json does not say which gamma features the weights were trained with (use_tf_gamma)",
            where=folder,
            remedy=f"Pass tensorflow_gamma=True for copies of {PUBLISHED}, False for weights of enformer-pytorch's own",
        )
    bins = config["target_length"] if config["target_length"] != -1 else positions
    crop, odd = divmod(positions - bins, 2)
    if odd or crop < 0:
        what = f"{positions} positions cannot be cropped evenly to"
        raise ModelError(what, bins, where=folder, remedy="Give the positions of the training window")
    settings = {ours: config[theirs] for ours, theirs in _SETTINGS.items()}
    with torch.device("meta"):  # memory and time for the weights once
        trunk = Enformer(
            **settings,
            positions=positions,
            gamma_per_position=not tensorflow_gamma,
            bin_size=2 ** config["num_downsamples"],
            crop=crop,
        )
        heads = {
            name: Head(_tracks(name, count, tracks), trunk.spec.channels)
            for name, count in config["output_heads"].items()
        }
    path, tensors = _read_weights(folder)
    tensors, left = _without_aliases(tensors, path)
    matched = _fill(trunk, heads, tensors, path)
    with_spec(trunk, citation=ENFORMER_CITATION)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    for module in (trunk, *heads.values()):
        module.eval()
    return Loaded(trunk, heads, LoadReport(path, sha256, matched, left), positions * trunk.spec.bin_size, bins)


def convert_enformer(
    loaded: Loaded, folder: Path, *, name: str, licence: str, source: str = "", revision: str | None = None
) -> None:
    """Writes what was loaded as a model folder, which ``model.name`` takes.

    Args:
        name: of the model.
        licence: of the weights; CC-BY-4.0 for ``EleutherAI/enformer-official-rough``.
        source, revision: where they came from, for the record.
    """
    tables = [head.tracks for head in loaded.heads.values()]
    table = tables[0]
    for more in tables[1:]:
        table = table.concat(more)
    report = loaded.report
    origin = {"source": source or str(report.file), "revision": revision, "file": report.file.name}
    lines = [
        f"# {name}",
        "",
        f"Enformer, converted from {origin['source']} ({origin['file']}, sha256 {report.sha256}).",
    ]
    lines += ["", f"Licence: {licence}. Citation: {ENFORMER_CITATION}.", ""]
    save_model(
        SequenceModel(loaded.trunk, loaded.heads, table),
        folder,
        name=name,
        info=DatasetInfo("coverage", loaded.window, loaded.bins, loaded.trunk.spec.bin_size),
        licence=licence,
        citation=ENFORMER_CITATION,
        trained_on=None,
        card="\n".join(lines),
        converted_from={**origin, "sha256": report.sha256},
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ModelError("the description of the model is missing", str(path), remedy="Copy the whole folder")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"the file is not valid JSON ({error})", where=path, remedy="Copy or download it again"
        ) from error
    if not isinstance(config, dict) or config.get("model_type") != "enformer":
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ModelError("the folder holds another model", found, where=path, remedy='model_type must be "enformer"')
    if absent := [key for key in (*_SETTINGS.values(), *_OTHERS) if key not in config]:
        raise ModelError("the model's description lacks entries", absent, where=path, remedy="Copy the file again")
    counts = config["output_heads"]
    whole = [key for key in (*_SETTINGS.values(), *_OTHERS[:2]) if key not in _RATES]
    wrong = [key for key in whole if type(config[key]) is not int]
    if not isinstance(counts, dict) or not counts or any(type(n) is not int or n < 1 for n in counts.values()):
        wrong.append("output_heads")
    if wrong:
        raise ModelError("these entries are not whole numbers", {key: config[key] for key in wrong}, where=path)
    if config.get("use_convnext"):
        raise ModelError("a variant with ConvNeXt blocks is not supported", "use_convnext: true", where=path)
    return config


def _tracks(head: str, count: int, tracks: Mapping[str, TrackTable] | None) -> TrackTable:
    if tracks is None:
        return TrackTable.build({"name": f"{head}_{i}", "group": head, "link": "softplus"} for i in range(count))
    if head not in tracks or len(tracks[head]) != count or len(tracks[head].groups) != 1:
        given = {name: len(table) for name, table in tracks.items()}
        raise ModelError(f"the head {head!r} needs a table of {count} tracks in one group", given, where="tracks")
    return tracks[head]


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of the weights, safetensors before others, and what is in it."""
    path = next((folder / name for name in _FILES if (folder / name).exists()), None)
    if path is None:
        raise ModelError("the weights are missing", list(_FILES), where=folder, remedy="Copy the whole folder")
    if path.suffix == ".safetensors":
        return path, read_tensors(path)
    again = "The file may be truncated: copy or download it again"
    try:
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            remedy = "Do not open it with other tools; take the weights from their publisher"
            raise ModelError(
                "the weights hold more than tensors, which could run code", unsafe, where=path, remedy=remedy
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        first = str(error).partition("\n")[0]
        raise ModelError(f"the weights cannot be read ({first})", str(path), remedy=again) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError("the file is no table of tensors", type(content).__name__, where=path, remedy=again)
    return path, {str(name): value for name, value in content.items()}


def _without_aliases(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors by their first names, and the second names that were left because the first is there too."""
    found, left, differ = dict(tensors), [], []
    for name in tensors:
        prefix = next((alias for alias in _ALIASES if name.startswith(alias)), None)
        if prefix is None:
            continue
        first = _ALIASES[prefix] + name.removeprefix(prefix)
        value = found.pop(name)
        if first not in tensors:
            found[first] = value
            continue
        left.append(name)
        if not torch.equal(tensors[first], value):
            differ.append((first, name))
    if differ:
        raise ModelError("tensors that should be the same differ", differ[:5], where=path)
    return found, tuple(left)


def _fill(trunk: Enformer, heads: Mapping[str, Head], tensors: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Puts the tensors into trunk and heads, all or none; returns our names with theirs."""
    wanted: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}  # theirs -> ours, their shape, our shape
    for name, tensor in trunk.state_dict().items():
        theirs, shape = _theirs(name, tuple(tensor.shape))
        wanted[theirs] = (f"trunk.{name}", shape, tuple(tensor.shape))
    for head, module in heads.items():
        for name, tensor in module.state_dict().items():  # a linear layer there, a convolution of 1 here
            theirs = f"_heads.{head}.0.{name.removeprefix('out.')}"
            wanted[theirs] = (f"heads.{head}.{name}", tuple(tensor.shape[:2]), tuple(tensor.shape))
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} instead of {shape}"
        for name, (_, shape, _) in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or extra or shapes:
        raise ModelError(
            "the weights do not fit the architecture that config.json describes",
            {"missing": missing, "unexpected": extra, "misshapen": shapes},
            where=path,
            remedy="Copy or download both files again, from one place",
        )
    filled = {ours: _as_ours(tensors[theirs]).reshape(shape) for theirs, (ours, _, shape) in wanted.items()}
    parts: dict[str, nn.Module] = {"trunk.": trunk, **{f"heads.{name}.": head for name, head in heads.items()}}
    for prefix, part in parts.items():
        own = {name.removeprefix(prefix): value for name, value in filled.items() if name.startswith(prefix)}
        part.load_state_dict(own, assign=True)
    return {ours: theirs for theirs, (ours, _, _) in wanted.items()}


def _as_ours(tensor: Tensor) -> Tensor:
    """A copy of its own, in float32 if it is no counter."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()


def _theirs(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The name and shape there of a tensor of the trunk, ``stages.STAGE.MODULE.PARAMETER``."""
    _, stage, rest = name.split(".", 2)
    kind, _, number = stage.partition("_")
    modules = _MODULES[kind]
    place = f"{_STAGES[kind]}.{number}." if number else f"{_STAGES[kind]}."
    if rest in modules:  # a parameter of the block itself
        return place + modules[rest], (1, *shape)
    module, _, parameter = rest.rpartition(".")
    return f"{place}{modules[module]}.{parameter}", (*shape, 1) if module == "pool.logits" else shape
