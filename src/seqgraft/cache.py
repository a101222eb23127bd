"""The frozen-prefix cache: what the stages before the first one that trains make of a region, kept on disk.

::

    $SEQGRAFT_CACHE/activations/KEY/
      manifest.json   everything that the key is the hash of, and the arrays
      x.npy           float16 or float32 (regions x views, channels, positions)
      skip_0.npy ...  the skips that later stages read
      valid.npy       which positions are no padding, where sequences differ in length
      done.npy        one byte per row: 1 once the row is whole and on disk
      places.npy      of donors whose rows are tiles (``cache_tiles``): which ones make up each region and view

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
from seqgraft.cache_tiles import Divided, Tiling, divide, find_tiling, index_tiles, run_tiles
from seqgraft.data.augment import FORWARD, Augmentation, View
from seqgraft.data.dataset import Dataset, new_folder, write_json
from seqgraft.errors import ConfigError, ModelError, RunError
from seqgraft.genome import cache_folder
from seqgraft.models.base import Halfway, SequenceModel, Span, Stage, State, Step, Trunk, weight_hash
from seqgraft.predict import Precision, autocast
from seqgraft.sample import Sample
from seqgraft.sequence import PAD

__all__ = [
    "ActivationCache",
    "CacheMode",
    "CacheSettings",
    "Choice",
    "choose",
    "frozen_prefix",
    "size_in_words",
    "views_of",
]

CacheMode = Literal["off", "auto", "float16", "float32"]

_FORMAT_VERSION = 1
_LARGEST_FLOAT16 = 65504.0
_LEAST_GAIN = 0.1  # of the time that the prefix takes, for "auto"
_MOST_TILES = 0.5  # of the bytes of whole rows: tiles are read in many small pieces


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

    def tile_bytes(self, storage: str, tiling: Tiling) -> int:
        values = sum(t.channels * t.positions // tiling.units * tiling.size for t in self.tensors)
        return values * np.dtype(storage).itemsize


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
        tiling: of donors, how rows are divided into tiles; None where they are kept whole.
        tiles: how many distinct ones there are.
        whole: bytes on disk of whole rows instead.
    """

    cut: str | None
    storage: str = ""
    reason: str = ""
    size: int = 0
    views: int = 1
    seconds: float = 0.0
    saved: float = 0.0
    point: _Point | None = None
    tiling: Tiling | None = None
    tiles: int = 0
    whole: int = 0

    @property
    def used(self) -> bool:
        return self.cut is not None

    @property
    def identity(self) -> str:
        """What a checkpoint remembers."""
        divided = f" in tiles of {self.tiling.size}" if self.tiling else ""
        return f"{self.storage} {self.cut}{divided}" if self.used else "off"

    @property
    def in_words(self) -> str:
        if not self.used:
            return f"not used: {self.reason}"
        where = f"up to the stage {self.cut}" if self.cut else "of the whole trunk"
        views = "one view" if self.views == 1 else f"{self.views} views"
        divided = ""
        if self.tiling:
            width, times = self.tiling.size * self.tiling.unit, self.whole / self.size
            divided = f"in {self.tiles:,} distinct tiles of {width} bp ({times:.3g}x less), "
        return (
            f"activations {where} as {self.storage}, {views} of a training region, {divided}"
            f"at most {size_in_words(self.size)}; {self.saved:.0%} of these stages' runs are saved"
        )


def size_in_words(count: int) -> str:
    """Bytes as "890.6 kB" and the like, in steps of 1024."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TB"


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
    if not names:
        return names, f"the first stage, {next(iter(trunk.stages))}, trains"
    while names and trunk.stages[names[-1]].ragged:
        names.pop()
    return names, "" if names else "the frozen stages give states of different sizes for inputs of one length"


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

    Of donors, the longest prefix that can be divided is kept in tiles where these take at most half the bytes and the
    prefix runs on fewer bases; a whole trunk that ends in a crop or a global stage is kept per distinct haplotype.

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
    seen_in = views_of(dataset, settings.augment)
    views = len(seen_in)
    trained, validated = (len(dataset.stored(part)) for part in (rows, valid_rows))
    kept = trained * views + validated
    runs = settings.epochs * (len(rows) + len(valid_rows))
    seen = trained * views * (1 - (1 - 1 / views) ** settings.epochs) + validated  # on average
    remembered = settings.mode == "auto" and before is not None
    measured = settings.mode == "auto" and not remembered
    points = _profile(model, dataset, prefix, settings.precision, passes=2 if measured else 1)
    budget = settings.gigabytes * 2**30
    divisible, divided = _divide(model.trunk, dataset, points, [(rows, seen_in), (valid_rows, [FORWARD])])

    def option(point: _Point, storage: str) -> Choice:
        size, work = kept * point.row_bytes(storage), 1.0
        made = Choice(point.cut, storage, "", size, views, point.seconds, 0.0, point, whole=size)
        if divided and divisible is point:
            tiles = divided.count * point.tile_bytes(storage, divided.tiling) + divided.index_bytes
            if tiles <= _MOST_TILES * size and divided.bases < kept * dataset.info.window:
                made = replace(made, size=tiles, tiling=divided.tiling, tiles=divided.count)
                work = divided.bases / (kept * dataset.info.window)
        return replace(made, saved=max(0.0, 1 - work * seen / runs))

    if remembered:
        assert before is not None
        options = [option(point, before.partition(" ")[0]) for point in points]
        return next(choice for choice in options if choice.identity == before)
    if settings.mode != "auto":
        choice = option(points[-1], settings.mode)
        if choice.size > budget:
            raise ConfigError(
                f"the activations of {len(rows)} regions in {views} views take more than train.cache_gb allows",
                size_in_words(choice.size),
                where="train.cache",
                remedy="Raise train.cache_gb, draw fewer views (train.augment), or use train.cache: off",
            )
        return choice
    small = settings.precision == "bf16" and max(point.largest for point in points) < _LARGEST_FLOAT16 / 10
    storage = "float16" if small else "float32"
    options = [option(point, storage) for point in points]
    fitting = [choice for choice in options if choice.size <= budget]
    if not fitting:
        least = min(choice.size for choice in options)
        return Choice(None, reason=f"it would take {size_in_words(least)} in {views} views, above train.cache_gb")
    write, read = _disk_speed(points[-1].row_bytes(storage))

    def gain(choice: Choice) -> float:
        written, read_back = choice.size / kept * seen, choice.whole / kept * runs
        return choice.seconds * choice.saved * runs - write * written - read * read_back

    best = max(fitting, key=gain)
    if gain(best) < _LEAST_GAIN * best.seconds * runs:
        epochs = f"{settings.epochs} epoch{'s' * (settings.epochs != 1)}"
        return Choice(None, reason=f"it would not pay within {epochs} of {views} views", views=views)
    if shutil.disk_usage(_activations()).free < best.size:
        return Choice(None, reason=f"the disk has no room for {size_in_words(best.size)}")
    return best


def _divide(
    trunk: Trunk,
    dataset: Dataset,
    points: Sequence[_Point],
    seen: Sequence[tuple[npt.NDArray[np.int64], Sequence[View]]],
) -> tuple[_Point, Divided] | tuple[None, None]:
    """The longest prefix of donors that can be kept in tiles, and these; ``seen``: rows, and the views of them."""
    names = list(trunk.stages)
    for point in reversed(points) if dataset.donors is not None else ():
        spans = {tensor.name: (tensor.positions, (tensor.start, tensor.stop)) for tensor in point.tensors}
        prefix = names[: _index(names, point.cut)]
        if not point.masked and (tiling := find_tiling(trunk, prefix, dataset.info.window, spans)):
            shown = [(dataset.stored(part), views) for part, views in seen]
            found = divide(trunk, point.cut or None, tiling, dataset, shown)
            return (point, found) if found else (None, None)
    return None, None


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
    for i, name in enumerate(prefix):
        if trunk.stages[name].ragged:
            continue
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
    model: SequenceModel, dataset: Dataset, choice: Choice, precision: Precision, views: Sequence[View]
) -> dict[str, Any]:
    trunk, point, tiling = model.trunk, choice.point, choice.tiling
    assert point is not None
    tensors = [asdict(tensor if tiling is None else _in_units(tensor, tiling)) for tensor in point.tensors]
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
        "storage": choice.storage,
        "rows": dataset.sequence_count,
        "masked": point.masked,
        "tensors": tensors,
        **({"tiling": asdict(tiling)} if tiling else {}),
    }


def _in_units(tensor: _Tensor, tiling: Tiling) -> _Tensor:
    each = tensor.positions // tiling.units
    return replace(tensor, start=tiling.first * each, stop=tiling.last * each)


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
    elif dataset.donors is not None:
        digest.update(dataset.donors.identity.encode())
    else:
        assert dataset.genome is not None
        digest.update(f"genome {dataset.genome.hash}\n".encode())
        digest.update(dataset.regions[["chrom", "start", "end", "strand"]].to_csv().encode())
    return digest.hexdigest()


# ---- the store ----


class ActivationCache:
    """States at the cut, one row per region and view, or tile of one, filled as they are asked for.

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
        self._tiling = Tiling(**facts["tiling"]) if "tiling" in facts else None
        self._views = {view: i for i, view in enumerate(views)}
        self._length = dataset.info.window if dataset.lengths is None else int(dataset.lengths.max())
        self._arrays = {name: _mapped(folder / f"{name}.npy") for name in _array_shapes(facts, 0)}
        # held open, so that what is read is what was written even if the folder is removed meanwhile
        self._open = {name: os.open(folder / f"{name}.npy", os.O_WRONLY) for name in self._arrays}
        for file in self._open.values():
            weakref.finalize(self, os.close, file)
        trunk = model.trunk
        before = list(trunk.stages.values())[: _index(list(trunk.stages), self._cut)]
        self._crops = any(s.kind == "crop" and s.size for stage in before for s in stage.steps or ())  # type: ignore[union-attr]
        #: Rows or tiles that this process computed, for those who count.
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
        facts = _facts(model, dataset, choice, precision, views)
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
                places = index_tiles(choice.tiling, dataset, views) if choice.tiling else None
                count = facts["rows"] * len(views) if places is None else int(places.max()) + 1
                with new_folder(folder, replace_existing=True) as building:
                    for name, (shape, dtype) in _array_shapes(facts, count).items():
                        # sparse: it takes room as rows come
                        array = np.lib.format.open_memmap(building / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
                        if name == "places":
                            array[:] = places
                    write_json(building / "manifest.json", {**_manifest(facts), "count": count})
            return cls(folder, model, dataset, facts, views)

    def attach(self, sample: Sample) -> Sample:
        """The sample with its state at the cut: what was missing is computed, stored and read back.

        Args:
            sample: of the dataset that the store was opened for, which says what it shows.

        Raises:
            RunError: the disk is full or cannot be written; what is stored stays right.
            ModelError: a value that float16 cannot hold.
        """
        assert sample.shown is not None
        stored, reverse, shift = sample.shown.cpu().numpy().T
        views = [_same_view(self._dataset, View(bool(r), int(s))) for r, s in zip(reverse, shift, strict=True)]
        slots = stored * len(self._views) + np.array([self._views[view] for view in views], dtype=np.int64)
        if self._tiling is not None:
            slots = np.asarray(self._arrays["places"][slots], dtype=np.int64)
        _, first = np.unique(slots, return_index=True)
        missing = np.sort(first)[self._arrays["done"][slots.ravel()[np.sort(first)]] != 1]
        if missing.size:
            fill = self._computed if self._tiling is None else self._computed_tiles
            with torch.no_grad(), autocast(self._precision, sample.codes.device):
                self._store(slots.ravel()[missing], fill(sample, missing))
        return replace(sample, halfway=Halfway(self._read(slots, sample), self._cut or None))

    def _computed(self, sample: Sample, missing: npt.NDArray[np.intp]) -> dict[str, npt.NDArray[Any]]:
        """What is stored of some sequences of a sample, by file."""
        trunk, chosen = self._model.trunk, torch.from_numpy(missing).to(sample.codes.device)
        codes = nn.functional.pad(sample.codes[chosen], (0, self._length - sample.codes.shape[1]), value=PAD)
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
        return rows

    def _computed_tiles(self, sample: Sample, missing: npt.NDArray[np.intp]) -> dict[str, npt.NDArray[Any]]:
        """What is stored of some tiles, by file; they count along the sequences of a sample, one after the other."""
        assert self._tiling is not None
        arrays = [self._arrays[name] for name in self._files()]
        rows = {
            name: np.zeros((len(missing), *a.shape[1:]), a.dtype) for name, a in zip(self._files(), arrays, strict=True)
        }
        which, columns = np.divmod(missing, self._tiling.columns)
        stop = self._cut or None
        for chosen, state in run_tiles(self._model.trunk, stop, self._tiling, sample.codes, which, columns):
            values = [state.x, *(state.skips[tensor.name] for tensor in self._tensors[1:])]
            for row, value in zip(rows.values(), values, strict=True):
                row[chosen, :, : value.shape[-1]] = _stored(value, row.dtype, self._cut)
        return rows

    def _store(self, slots: npt.NDArray[np.int64], rows: Mapping[str, npt.NDArray[Any]]) -> None:
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
        wanted, which = np.unique(slots, return_inverse=True) if self._tiling else (slots, None)
        for name, tensor in zip(self._files(), self._tensors, strict=True):
            array = self._arrays[name]
            # on CPU straight from the map to float32: one copy, and fast also on the way to bfloat16
            kind = torch.float32 if device.type == "cpu" else getattr(torch, array.dtype.name)
            made = torch.empty((len(wanted), *array.shape[1:]), dtype=kind)
            for row, slot in zip(made, wanted, strict=True):
                row.copy_(torch.from_numpy(array[slot]))
            value = made.to(device).to(getattr(torch, tensor.dtype))
            if which is not None:  # (sequences, tiles, channels, positions of a tile) in one row
                placed = value[torch.from_numpy(which.reshape(slots.shape)).to(device)]
                value = placed.transpose(1, 2).flatten(2)[..., : tensor.stop - tensor.start]
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


def _array_shapes(facts: Mapping[str, Any], count: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each array of a store of so many rows or tiles."""
    tensors, tiling = facts["tensors"], Tiling(**facts["tiling"]) if "tiling" in facts else None
    names = ["x", *(f"skip_{i}" for i in range(len(tensors) - 1))]
    kept = [t["stop"] - t["start"] if tiling is None else t["positions"] // tiling.units * tiling.size for t in tensors]
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        name: ((count, t["channels"], positions), facts["storage"])
        for name, t, positions in zip(names, tensors, kept, strict=True)
    }
    if facts["masked"]:
        shapes["valid"] = ((count, tensors[0]["positions"]), "bool")
    if tiling:
        shapes["places"] = ((facts["rows"] * len(facts["views"]), tiling.columns), "int32")
    return shapes | {"done": ((count,), "uint8")}


def _manifest(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": "seqgraft-activations", "format_version": _FORMAT_VERSION, **facts}


def _is_whole(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a folder holds what its key says: the manifest, and arrays of the right shapes and sizes."""
    try:
        content = json.loads((folder / "manifest.json").read_text())
        arrays = {name: _mapped(folder / f"{name}.npy") for name in _array_shapes(facts, 0)}
    except (OSError, ValueError, EOFError):
        return False
    count = content.pop("count", None)
    if not isinstance(count, int) or content != json.loads(json.dumps(_manifest(facts))):
        return False
    return all(
        arrays[name].shape == shape and arrays[name].dtype == np.dtype(dtype)
        for name, (shape, dtype) in _array_shapes(facts, count).items()
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
