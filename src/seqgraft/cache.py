"""The frozen-prefix cache: what the stages before the first one that trains make of a region, kept on disk.

::

    $SEQGRAFT_CACHE/activations/KEY/
      manifest.json   everything that the key is the hash of, and the arrays
      x.npy           float16 or float32 (regions x views, channels, positions)
      skip_0.npy ...  the skips that later stages read
      valid.npy       which positions are no padding, where sequences differ in length
      done.npy        one byte per row: 1 once the row is whole and on disk

The key names the weights, buffers, settings and code of the prefix, the sequences, the views, the precision and the
storage type, so a change of any of them is another folder. A row is written, flushed and only then marked, under a
lock; a kill in between costs that row. Folders may be removed at any time: they cost nothing but time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seqgraft import __version__
from seqgraft.data.augment import FORWARD, Augmentation, View
from seqgraft.data.dataset import Dataset, new_folder, write_json
from seqgraft.errors import ConfigError, ModelError, RunError
from seqgraft.genome import cache_folder
from seqgraft.models.base import Halfway, SequenceModel, Span, Stage, State, Step, Trunk, weight_hash
from seqgraft.predict import Precision, autocast
from seqgraft.sample import Sample
from seqgraft.sequence import PAD

__all__ = ["ActivationCache", "CacheMode", "CacheSettings", "Choice", "choose", "frozen_prefix", "views_of"]

CacheMode = Literal["off", "auto", "float16", "float32"]

_FORMAT_VERSION = 1
_LARGEST_FLOAT16 = 65504.0
_LEAST_GAIN = 0.1  # of the time that the prefix takes, for "auto"


@dataclass(frozen=True)
class CacheSettings:
    """What a run asks of the cache; the fields are those of ``TrainConfig``."""

    mode: CacheMode
    gigabytes: float
    epochs: int
    precision: Precision
    augment: Augmentation


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the state at the cut: ``(channels, positions)``, of which ``[start, stop)`` is kept."""

    name: str
    channels: int
    positions: int
    dtype: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Point:
    """What the state is after some stages, for the longest region."""

    cut: str  # the stage that comes next
    seconds: float  # all stages so far
    largest: float  # absolute value
    tensors: tuple[_Tensor, ...]
    masked: bool

    def row_bytes(self, storage: str) -> int:
        values = sum(t.channels * (t.stop - t.start) for t in self.tensors)
        return values * np.dtype(storage).itemsize + self.masked * self.tensors[0].positions


@dataclass(frozen=True)
class Choice:
    """Whether, where and how activations are kept.

    Attributes:
        cut: the stage that runs on what is kept; "" past the last one; None if nothing is kept.
        storage: "float16", "float32", or "" if nothing is kept.
        reason: why nothing is kept.
        size: bytes on disk once every region was seen in every view.
        views: in how many views a training region is kept.
        seconds: of the prefix per region, on this machine; 0 where it was not measured.
        saved: share of the prefix's runs of the whole training that are not needed, on average.
        point: what is kept.
    """

    cut: str | None
    storage: str = ""
    reason: str = ""
    size: int = 0
    views: int = 1
    seconds: float = 0.0
    saved: float = 0.0
    point: _Point | None = None

    @property
    def used(self) -> bool:
        return self.cut is not None

    @property
    def identity(self) -> str:
        """What a checkpoint remembers."""
        return f"{self.storage} {self.cut}" if self.used else "off"

    @property
    def in_words(self) -> str:
        if not self.used:
            return f"not used: {self.reason}"
        where = f"up to the stage {self.cut}" if self.cut else "of the whole trunk"
        views = "one view" if self.views == 1 else f"{self.views} views"
        return (
            f"activations {where} as {self.storage}, {views} of a training region, "
            f"at most {self.size / 2**30:.3g} GB; {self.saved:.0%} of these stages' runs are saved"
        )


# ---- where to cut ----


def frozen_prefix(trunk: Trunk) -> tuple[list[str], str]:
    """The stages before the first in which anything trains, and why there are none, if there are none."""
    if type(trunk).forward is not Trunk.forward or type(trunk).run is not Trunk.run:
        return [], "the trunk does not run as a plain chain of stages"
    inside = {id(p) for p in trunk.stages.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in trunk.parameters()):
        return [], "the trunk trains parameters that are in no stage"
    names: list[str] = []
    for name, stage in trunk.stages.items():
        if any(p.requires_grad for p in stage.parameters()):
            break
        if not all(getattr(module, "frozen", False) for module in stage.modules()):
            break
        names.append(name)
    return names, "" if names else f"the first stage, {next(iter(trunk.stages))}, trains"


def views_of(dataset: Dataset, augment: Augmentation) -> list[View]:
    """The views that give different sequences, the forward one first: stored sequences have no shifts."""
    return list(dict.fromkeys(_same_view(dataset, view) for view in augment.views()))


def _same_view(dataset: Dataset, view: View) -> View:
    return view if dataset.codes is None else View(view.reverse)


def choose(
    model: SequenceModel,
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    valid_rows: npt.NDArray[np.int64],
    settings: CacheSettings,
    before: str | None = None,
) -> Choice:
    """Decides from the settings what to keep.

    "float16" and "float32" keep the longest prefix. "auto" keeps what saves most time, as far as measuring one region
    and the disk can tell, within the budget, or nothing if less than a tenth of the prefix's time would be saved; in
    float32, or in float16 where the prefix runs in bf16 and its values are small enough.

    Args:
        before: ``Choice.identity`` of the run that is resumed: "auto" decides once.

    Raises:
        ConfigError: a storage type was asked for and the budget does not allow it.
    """
    if settings.mode == "off":
        return Choice(None, reason="train.cache is off")
    if settings.mode == "auto" and before == "off":
        return Choice(None, reason="the run began without")
    prefix, reason = frozen_prefix(model.trunk)
    if not prefix:
        return Choice(None, reason=reason)
    views = len(views_of(dataset, settings.augment))
    kept = len(rows) * views + len(valid_rows)
    runs = settings.epochs * (len(rows) + len(valid_rows))
    seen = len(rows) * views * (1 - (1 - 1 / views) ** settings.epochs) + len(valid_rows)  # on average
    remembered = settings.mode == "auto" and before is not None
    measured = settings.mode == "auto" and not remembered
    points = _profile(model, dataset, prefix, settings.precision, passes=2 if measured else 1)
    budget = settings.gigabytes * 2**30

    def option(point: _Point, storage: str) -> Choice:
        size = kept * point.row_bytes(storage)
        return Choice(point.cut, storage, "", size, views, point.seconds, max(0.0, 1 - seen / runs), point)

    if remembered:
        assert before is not None
        storage, _, cut = before.partition(" ")
        return next(option(point, storage) for point in points if point.cut == cut)
    if settings.mode != "auto":
        choice = option(points[-1], settings.mode)
        if choice.size > budget:
            raise ConfigError(
                f"the activations of {len(rows)} regions in {views} views take more than train.cache_gb allows",
                f"{choice.size / 2**30:.3g} GB",
                where="train.cache",
                remedy="Raise train.cache_gb, draw fewer views (train.augment), or use train.cache: off",
            )
        return choice
    small = settings.precision == "bf16" and max(point.largest for point in points) < _LARGEST_FLOAT16 / 10
    storage = "float16" if small else "float32"
    fitting = [option(point, storage) for point in points if kept * point.row_bytes(storage) <= budget]
    if not fitting:
        least = min(kept * point.row_bytes(storage) for point in points)
        return Choice(None, reason=f"it would take {least / 2**30:.3g} GB in {views} views, above train.cache_gb")
    write, read = _disk_speed(points[-1].row_bytes(storage))

    def gain(choice: Choice) -> float:
        row = choice.size / kept
        return choice.seconds * (runs - seen) - row * (write * seen + read * runs)

    best = max(fitting, key=gain)
    if gain(best) < _LEAST_GAIN * best.seconds * runs:
        return Choice(None, reason=f"it would not pay within {settings.epochs} epochs of {views} views", views=views)
    if shutil.disk_usage(_activations()).free < best.size:
        return Choice(None, reason=f"the disk has no room for {best.size / 2**30:.3g} GB")
    return best


@torch.no_grad()
def _profile(
    model: SequenceModel, dataset: Dataset, prefix: Sequence[str], precision: Precision, passes: int
) -> list[_Point]:
    """The state after each stage of the prefix for the longest region, and the time up to there; the best of passes."""
    trunk = model.trunk
    device = next(model.parameters()).device
    longest = 0 if dataset.lengths is None else int(np.argmax(dataset.lengths))
    sample = dataset.sample([longest]).to(device)
    was_training = model.training
    model.eval()
    names = list(trunk.stages)
    seconds = np.full(len(names), np.inf)
    try:
        for _ in range(passes):
            states = []
            with autocast(precision, device):
                state = trunk.encode(sample.codes, sample.lengths)
                for i, (name, after) in enumerate(pairwise([*names, None])):
                    began = _now(device)
                    assert name is not None
                    state = trunk.run(state, start=name, stop=after)
                    seconds[i] = min(seconds[i], _now(device) - began)
                    states.append(state)
    finally:
        model.train(was_training)
    masked = dataset.lengths is not None or states[-1].valid is not None
    points = []
    for i in range(len(prefix)):
        later: list[Stage] = list(trunk.stages.values())[i + 1 :]  # type: ignore[assignment]
        spans = {} if masked else _needed(later, {"x": (0, states[-1].x.shape[-1])})
        read = {name for stage in later for name in stage.reads}
        live = {"x": states[i].x} | {k: v for k, v in sorted(states[i].skips.items()) if k in read}
        tensors = tuple(_tensor(name, value, spans.get(name)) for name, value in live.items())
        largest = max(float(value.abs().max()) for value in live.values())
        cut = names[i + 1] if i + 1 < len(names) else ""
        points.append(_Point(cut, float(seconds[: i + 1].sum()), largest, tensors, masked))
    return points


def _needed(later: Sequence[Stage], spans: dict[str, Span]) -> dict[str, Span]:
    """Positions that the last state is computed from; nothing where a stage is global or averages over positions."""
    moving = any(
        isinstance(m, _BatchNorm) and not getattr(m, "frozen", False) for stage in later for m in stage.modules()
    )
    if moving or not all(stage.local for stage in later):
        return {}
    for stage in reversed(later):
        spans = stage.needed(spans)
    return spans


def _tensor(name: str, value: Tensor, span: Span | None) -> _Tensor:
    _, channels, positions = value.shape
    start, stop = (max(0, span[0]), min(positions, span[1])) if span else (0, positions)
    return _Tensor(name, channels, positions, str(value.dtype).removeprefix("torch."), start, stop)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _disk_speed(row_bytes: int) -> tuple[float, float]:
    """Seconds to write and flush, and to read, one byte; measured on eight rows, 64 MB at most."""
    size = max(1, min(8 * row_bytes, 2**26))
    try:
        with tempfile.TemporaryFile(dir=_activations()) as file:
            content = os.urandom(size)
            began = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            file.seek(0)
            file.read()
            return (written - began) / size, (time.perf_counter() - written) / size
    except OSError as error:
        raise _unwritable(error, _activations()) from error


def _activations() -> Path:
    folder = cache_folder() / "activations"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(error, folder) from error
    return folder


def _unwritable(error: OSError, folder: Path) -> RunError:
    return RunError(
        f"the activation cache cannot be written ({error.strerror})",
        str(folder),
        where="train.cache",
        remedy="Free some disk space or point SEQGRAFT_CACHE to another folder, then continue with --resume",
    )


# ---- what the key is made of ----


def _facts(
    model: SequenceModel, dataset: Dataset, point: _Point, storage: str, precision: Precision, views: Sequence[View]
) -> dict[str, Any]:
    trunk = model.trunk
    names = list(trunk.stages)
    prefix = nn.ModuleDict({name: trunk.stages[name] for name in names[: _index(names, point.cut)]})
    kinds = {type(module) for module in [trunk, *prefix.modules()]}
    return {
        "code": {
            "seqgraft": __version__,
            "torch": torch.__version__,
            "files": sorted(_source_hashes({Trunk, *kinds}).items()),
        },
        "trunk": f"{type(trunk).__module__}.{type(trunk).__qualname__}, stride {trunk.stride}",
        "architecture": str(sorted(getattr(trunk, "settings", {}).items())),
        "weights": weight_hash(prefix),
        "buffers": hashlib.sha256(b"".join(_buffer_bytes(prefix))).hexdigest(),
        "settings": hashlib.sha256("\n".join(_settings(prefix)).encode()).hexdigest(),
        "cut": point.cut,
        "sequences": _sequences_hash(dataset),
        "window": dataset.info.window,
        "views": [[view.reverse, view.shift] for view in views],
        "precision": precision,
        "products": torch.get_float32_matmul_precision(),
        "device": next(model.parameters()).device.type,
        "storage": storage,
        "rows": len(dataset),
        "masked": point.masked,
        "tensors": [asdict(tensor) for tensor in point.tensors],
    }


def _index(names: Sequence[str], cut: str) -> int:
    return names.index(cut) if cut else len(names)


def _source_hashes(kinds: set[type]) -> dict[str, str]:
    """File name -> hash of the code of these classes, torch's own and those without a file left out."""
    found: dict[str, str] = {}
    for name in {base.__module__ for kind in kinds for base in kind.__mro__}:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and name.partition(".")[0] != "torch" and Path(file).is_file():
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def _buffer_bytes(prefix: nn.Module) -> Iterator[bytes]:
    """Buffers that are not saved with the weights: tables that a trunk computes for itself."""
    saved = prefix.state_dict().keys()
    for name, buffer in prefix.named_buffers():
        if name not in saved:
            yield f"{name}{tuple(buffer.shape)}{buffer.dtype}".encode()
            yield buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _settings(prefix: nn.Module) -> Iterator[str]:
    """Every plain attribute of every module: strides, paddings, numbers of heads."""
    for name, module in prefix.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if key not in ("training", "frozen") and _is_plain(value)
        }
        yield f"{name} {type(module).__qualname__} {module.extra_repr()} {plain}"


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str | Step)


def _sequences_hash(dataset: Dataset) -> str:
    """Identifies every sequence that the dataset can show; targets and tracks do not matter here."""
    digest = hashlib.sha256()
    if dataset.codes is not None and dataset.lengths is not None:
        digest.update(f"codes {dataset.codes.shape}".encode())
        for start in range(0, len(dataset.codes), 4096):
            digest.update(np.ascontiguousarray(dataset.codes[start : start + 4096]).tobytes())
        digest.update(np.asarray(dataset.lengths, dtype=np.int64).tobytes())
    else:
        assert dataset.genome is not None
        digest.update(f"genome {dataset.genome.hash}\n".encode())
        digest.update(dataset.regions[["chrom", "start", "end", "strand"]].to_csv().encode())
    return digest.hexdigest()


# ---- the store ----


class ActivationCache:
    """States at the cut, one row per region and view, filled as they are asked for.

    Args:
        folder: an open store, see ``open``.
    """

    def __init__(
        self, folder: Path, model: SequenceModel, dataset: Dataset, facts: Mapping[str, Any], views: Sequence[View]
    ) -> None:
        self.folder = folder
        self._model, self._dataset = model, dataset
        self._precision: Precision = facts["precision"]
        self._cut: str = facts["cut"]
        self._masked: bool = facts["masked"]
        self._tensors = [_Tensor(**tensor) for tensor in facts["tensors"]]
        self._views = {view: i for i, view in enumerate(views)}
        self._length = dataset.info.window if dataset.lengths is None else int(dataset.lengths.max())
        self._arrays = {name: _mapped(folder / f"{name}.npy") for name in _array_shapes(facts)}
        # held open, so that what is read is what was written even if the folder is removed meanwhile
        self._open = {name: os.open(folder / f"{name}.npy", os.O_WRONLY) for name in self._arrays}
        for file in self._open.values():
            weakref.finalize(self, os.close, file)
        trunk = model.trunk
        before = list(trunk.stages.values())[: _index(list(trunk.stages), self._cut)]
        self._crops = any(s.kind == "crop" and s.size for stage in before for s in stage.steps or ())  # type: ignore[union-attr]
        #: Rows that this process computed, for those who count.
        self.filled = 0

    @classmethod
    def open(
        cls, model: SequenceModel, dataset: Dataset, choice: Choice, precision: Precision, augment: Augmentation
    ) -> ActivationCache:
        """Opens the store that a choice means, or makes it; one that is not whole is made anew.

        Raises:
            RunError: the folder cannot be written, or the disk has no room.
        """
        assert choice.point is not None
        views = views_of(dataset, augment)
        facts = _facts(model, dataset, choice.point, choice.storage, precision, views)
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        folder = _activations() / key
        with _locked(folder):
            if not _is_whole(folder, facts):
                free = shutil.disk_usage(folder.parent).free
                if free < choice.size:
                    raise RunError(
                        f"the disk has {free / 2**30:.3g} GB left and the activation cache needs up to",
                        f"{choice.size / 2**30:.3g} GB",
                        where=str(folder.parent),
                        remedy="Free some space, point SEQGRAFT_CACHE to another folder, or use train.cache: off",
                    )
                with new_folder(folder, replace_existing=True) as building:
                    for name, (shape, dtype) in _array_shapes(facts).items():
                        # sparse: it takes room as rows come
                        np.lib.format.open_memmap(building / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
                    write_json(building / "manifest.json", _manifest(facts))
            return cls(folder, model, dataset, facts, views)

    def attach(self, sample: Sample, views: Sequence[View] | None = None) -> Sample:
        """The sample with its state at the cut: what was missing is computed, stored and read back.

        Args:
            sample: of the dataset that the store was opened for.
            views: of each example; all forward if not given.

        Raises:
            RunError: the disk is full or cannot be written; what is stored stays right.
            ModelError: a value that float16 cannot hold.
        """
        chosen = [_same_view(self._dataset, view) for view in views or [FORWARD] * len(sample)]
        place = np.array([self._views[view] for view in chosen], dtype=np.int64)
        slots = sample.row.cpu().numpy() * len(self._views) + place
        _, first = np.unique(slots, return_index=True)
        missing = np.sort(first)[self._arrays["done"][slots[np.sort(first)]] != 1]
        if missing.size:
            self._fill(sample, slots[missing], torch.from_numpy(missing).to(sample.codes.device))
        return replace(sample, halfway=Halfway(self._read(slots, sample), self._cut or None))

    def _fill(self, sample: Sample, slots: npt.NDArray[np.int64], chosen: Tensor) -> None:
        trunk = self._model.trunk
        codes = nn.functional.pad(sample.codes[chosen], (0, self._length - sample.codes.shape[1]), value=PAD)
        with torch.no_grad(), autocast(self._precision, codes.device):
            state = trunk.run(trunk.encode(codes, sample.lengths[chosen]), stop=self._cut or None)
        values = dict(zip(self._files(), [state.x, *(state.skips[t.name] for t in self._tensors[1:])], strict=True))
        rows = {}
        for tensor, (name, value) in zip(self._tensors, values.items(), strict=True):
            if value.shape[-1] != tensor.positions:  # tokens, of which a sequence with N has more
                what = f"a region has not {tensor.positions} positions like others before the stage {self._cut}, but"
                raise ModelError(what, value.shape[-1], where="train.cache", remedy="Use train.cache: off")
            rows[name] = _stored(value[..., tensor.start : tensor.stop], self._arrays[name].dtype, self._cut)
        if self._masked:
            valid = state.valid if state.valid is not None else torch.ones_like(state.x[:, 0], dtype=torch.bool)
            rows["valid"] = valid.cpu().numpy()
        with _locked(self.folder):
            new = np.flatnonzero(self._arrays["done"][slots] != 1)  # another run may have been faster
            for name, array in rows.items():
                self._write(name, slots[new], array[new])
            self._write("done", slots[new], np.ones(len(new), dtype=np.uint8))
        self.filled += len(new)

    def _write(self, name: str, slots: npt.NDArray[np.int64], rows: npt.NDArray[Any]) -> None:
        """Rows into an array's file, on disk when it returns; not through the map, where a full disk kills."""
        array, file = self._arrays[name], self._open[name]
        for slot, row in zip(slots, rows, strict=True):
            at, content = int(array.offset + slot * array.strides[0]), np.ascontiguousarray(row).tobytes()
            while content:
                written = os.pwrite(file, content, at)
                at, content = at + written, content[written:]
        os.fsync(file)

    def _read(self, slots: npt.NDArray[np.int64], sample: Sample) -> State:
        device = sample.codes.device
        tensors: dict[str, Tensor] = {}
        for name, tensor in zip(self._files(), self._tensors, strict=True):
            array = self._arrays[name]
            # on CPU straight from the map to float32: one copy, and fast also on the way to bfloat16
            kind = torch.float32 if device.type == "cpu" else getattr(torch, array.dtype.name)
            made = torch.empty((len(slots), *array.shape[1:]), dtype=kind)
            for row, slot in zip(made, slots, strict=True):
                row.copy_(torch.from_numpy(array[slot]))
            value = made.to(device).to(getattr(torch, tensor.dtype))
            missing = (tensor.start, tensor.positions - tensor.stop)
            tensors[tensor.name] = nn.functional.pad(value, missing) if any(missing) else value
        valid = torch.from_numpy(self._arrays["valid"][slots]).to(device) if self._masked else None
        x = tensors.pop("x")
        return self._trimmed(State(x, tensors, valid), sample)

    def _trimmed(self, state: State, sample: Sample) -> State:
        """Without the padding beyond the longest sequence of the batch, as the trunk itself would have it."""
        if state.valid is None:
            return state
        stride = self._model.trunk.stride
        full, now = (-(-int(length) // stride) for length in (self._length, sample.lengths.max()))
        parts = [state.x, *state.skips.values()]
        whole = not self._crops and all(part.shape[-1] * now % full == 0 for part in parts)

        def cut(part: Tensor) -> Tensor:
            return part[..., : part.shape[-1] * now // full]

        if whole and int(cut(state.valid).sum()) == int(state.valid.sum()):  # tokens follow no proportion
            state = State(cut(state.x), {name: cut(skip) for name, skip in state.skips.items()}, cut(state.valid))
        return replace(state, valid=None) if state.valid is not None and bool(state.valid.all()) else state

    def _files(self) -> list[str]:
        return ["x", *(f"skip_{i}" for i in range(len(self._tensors) - 1))]


def _stored(value: Tensor, dtype: np.dtype[Any], cut: str) -> npt.NDArray[Any]:
    wide = value.float()
    if dtype == np.float16 and float(wide.abs().max()) > _LARGEST_FLOAT16:
        raise ModelError(
            "the activations are too large to be stored as float16",
            float(wide.abs().max()),
            where=f"the state before {cut or 'the heads'}",
            remedy="Use train.cache: float32",
        )
    return np.asarray(wide.cpu().numpy(), dtype=dtype)


def _array_shapes(facts: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    rows = facts["rows"] * len(facts["views"])
    tensors = facts["tensors"]
    names = ["x", *(f"skip_{i}" for i in range(len(tensors) - 1))]
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        name: ((rows, t["channels"], t["stop"] - t["start"]), facts["storage"])
        for name, t in zip(names, tensors, strict=True)
    }
    if facts["masked"]:
        shapes["valid"] = ((rows, tensors[0]["positions"]), "bool")
    return shapes | {"done": ((rows,), "uint8")}


def _manifest(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": "seqgraft-activations", "format_version": _FORMAT_VERSION, **facts}


def _is_whole(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a folder holds what its key says: the manifest, and arrays of the right shapes and sizes."""
    try:
        content = json.loads((folder / "manifest.json").read_text())
        arrays = {name: _mapped(folder / f"{name}.npy") for name in _array_shapes(facts)}
    except (OSError, ValueError, EOFError):
        return False
    if content != json.loads(json.dumps(_manifest(facts))):
        return False
    return all(
        arrays[name].shape == shape and arrays[name].dtype == np.dtype(dtype)
        for name, (shape, dtype) in _array_shapes(facts).items()
    )


def _mapped(path: Path) -> np.memmap[Any, Any]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    whole = isinstance(array, np.memmap) and path.stat().st_size == array.offset + array.nbytes
    if not whole:
        raise ValueError(f"{path.name} is no whole array")
    # torch takes no array that cannot be written; only now, because opened so, a short file would be lengthened
    return np.load(path, mmap_mode="r+", allow_pickle=False)  # type: ignore[no-any-return]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in a store; the lock goes with the process that holds it."""
    import fcntl

    try:
        with folder.with_name(f"{folder.name}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file releases it
    except OSError as error:
        raise _unwritable(error, folder) from error
