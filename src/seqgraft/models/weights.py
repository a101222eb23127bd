"""Models of an experiment: a trunk by name, with new heads, those that came with its weights, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from seqgraft.data.dataset import DatasetInfo
from seqgraft.errors import ConfigError, ModelError, Problems
from seqgraft.models.base import Beside, Head, SequenceModel, Trunk, weight_hash, with_spec
from seqgraft.models.folders import TRUNKS, Pretrained, find_model, is_like
from seqgraft.models.masked import MaskedModel
from seqgraft.models.reading import check_fit
from seqgraft.models.remote_code import allowing, check_commit
from seqgraft.models.track_head import TrackHead
from seqgraft.models.wrap import WrappedTrunk, redraw
from seqgraft.tracks import TrackTable

__all__ = ["ModelConfig", "build_beside", "build_masked", "build_model", "build_pretrained", "is_random"]
__all__ += ["pretrained_of"]

PRETRAINED = "pretrained_"  # heads whose names start so came with the weights and stay as they are
CONTINUED = "continued_"  # and those of head: pretrained, which train on


@dataclass(frozen=True)
class ModelConfig:
    """Which model to start from.

    Attributes:
        name: a bundled model, the path of a model folder or of a folder as the hub has them, a hub id such as
            ``johahi/flashzoi-replicate-0``, or an architecture.
        revision: the full commit of a hub id's repository.
        init: "random" keeps the architecture and draws new weights: the control that training from scratch needs.
        head: "new" heads for the new tracks; "pretrained": the heads that came with the weights train on, for tracks of
            the same names; "extend": new heads. Pretrained tracks that the data lack are kept frozen beside them.
        pool: how the bins of a labelled sequence become one.
        centre: labels: only so many bins around the middle of the sequence; None for all.
        track: labels: instead of new heads, one of the pretrained model's tracks, by name, summed over these bins
            (``track_head.TrackHead``).
        settings: of an architecture, such as ``{channels: 96, depth: 4, blocks: 2}``.
        species: the token before each sequence, for checkpoints that have such tokens: they need one.
        truncate: models of tokens: drop and count bases that no token stands for, which are an error otherwise.
        unknown: models of tokens: largest share of a fold's tokens that the model may not know.
        remote_code: the full commit whose Python files may run, for models that code of their repository makes.
        trained_on: BED of the regions that the weights were trained on, with their fold in column 4, for models that
            do not bring it; or a key of ``seqgraft.data.seen.TRUNK_FOLDS``, or "download".
    """

    name: str = "convnet"
    revision: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    head: Literal["new", "pretrained", "extend"] = "new"
    pool: Literal["mean", "max", "attention"] = "mean"
    centre: int | None = None
    track: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    species: str | None = None
    truncate: bool = False
    unknown: float = 0.01
    remote_code: str | None = None
    trained_on: Path | None = None

    def __post_init__(self) -> None:
        """Every setting of an architecture is of the type of its default."""
        defaults = TRUNKS[self.name].defaults() if self.name in TRUNKS else {}
        problems = Problems(ConfigError)
        for name, value in self.settings.items():
            if name in defaults and not is_like(value, defaults[name]):
                remedy = f"Give a value such as {defaults[name]!r}"
                problems.add(f"{name} has a value of another kind", value, where="model.settings", remedy=remedy)
        check_commit(self.remote_code)
        if self.centre is not None and self.centre < 1:
            problems.add("must be 1 bin or more", self.centre, where="model.centre", remedy="Leave it out for all")
        if not 0 <= self.unknown <= 1:
            problems.add("must be a share, from 0 to 1", self.unknown, where="model.unknown")
        problems.raise_if_any()


def is_random(config: ModelConfig) -> bool:
    """Are the trunk's weights drawn anew?

    Raises:
        ConfigError: there is no such model.
    """
    if config.init == "random":
        return True
    return pretrained_of(config) is None and TRUNKS[config.name].pretrained is None


def pretrained_of(config: ModelConfig) -> Pretrained | None:
    """The pretrained model that is named; None if it is an architecture.

    Raises:
        ConfigError, ModelError: see ``find_model``.
    """
    return find_model(config.name, config.revision, config.species, config.remote_code)


def build_masked(config: ModelConfig, info: DatasetInfo) -> MaskedModel:
    """A language model with its own head for masked tokens as the only output, and everything trainable.

    Raises:
        ConfigError: unknown model or settings.
        ModelError: the model has no such head.
    """
    pretrained = pretrained_of(config)
    model = MaskedModel(_build_trunk(config, pretrained, info, labels=True))
    if pretrained is not None and config.init == "pretrained":
        _load(model, pretrained)
    return model


def build_model(
    config: ModelConfig, tracks: TrackTable, info: DatasetInfo, covariates: int = 0, *, own_bins: bool = False
) -> SequenceModel:
    """A model for the tracks of a dataset, with pretrained or random weights and everything trainable.

    Args:
        tracks: the dataset's tracks; heads are made one per group.
        info: window, bins and bin size of the dataset.
        covariates: how many covariates each example has.
        own_bins: bins of labels are as long as in pretraining, because pretrained heads read them too.

    Raises:
        ConfigError: unknown model or settings.
        ModelError: the trunk does not fit the dataset's window or bins, or its weights do not fit the architecture.
    """
    pretrained = pretrained_of(config)
    labels = info.bins == 1
    trunk = _build_trunk(config, pretrained, info, labels, own_bins=own_bins or config.track is not None)
    pool = config.pool if labels else "none"
    heads: dict[str, Head] = {}
    if config.track is not None:
        heads = _track_heads(config, config.track, pretrained, trunk, tracks, labels and not covariates)
    elif config.head != "pretrained":
        heads = _new_heads(tracks, trunk.spec.channels, pool, covariates)
    if config.head == "new":
        model = SequenceModel(trunk, heads, tracks)
    else:
        model = _with_pretrained_heads(config, pretrained, trunk, heads, tracks, labels)
    if pretrained is not None and config.init == "pretrained":
        _load(model, pretrained)
    return model


def build_pretrained(config: ModelConfig, info: DatasetInfo, *, of_labels: bool = False) -> SequenceModel | None:
    """The pretrained model with its own heads and nothing new, for the bins of a dataset; None if there is none.

    Args:
        of_labels: the bins that heads of labels see: ``config.centre`` around the middle, or all.

    Its outputs are what the new data's predictions are compared with, and what fine-tuning may forget.
    """
    pretrained = pretrained_of(config)
    if pretrained is None or config.init == "random" or not pretrained.content["heads"]:
        return None
    if info.bins == 1 and not of_labels:
        return None
    trunk = _build_trunk(config, pretrained, info, labels=of_labels, own_bins=of_labels)
    model = SequenceModel(trunk, _pretrained_heads(pretrained, trunk), pretrained.tracks)
    _load(model, pretrained)
    return model.eval()


def build_beside(config: ModelConfig, tracks: TrackTable, info: DatasetInfo) -> Beside:
    """The pretrained heads of tracks of other data, to train along on the trunk of a model of ``config``.

    Raises:
        ModelError: no pretrained model with these tracks, in these units; windows or bins that do not fit it.
    """
    if pretrained_of(config) is None:
        what, remedy = "tracks can train along on a pretrained model alone", "Name one that was pretrained on them"
        raise ModelError(what, config.name, where="joint", remedy=remedy)
    model = build_model(replace(config, head="pretrained", track=None, centre=None, pool="mean"), tracks, info)
    heads = {name: head for name, head in model.heads.items() if not name.startswith(PRETRAINED)}
    return Beside(SequenceModel(model.trunk, cast("dict[str, Head]", heads), tracks))


def _pretrained_heads(pretrained: Pretrained, trunk: Trunk) -> dict[str, Head]:
    tracks, channels = pretrained.tracks, trunk.spec.channels
    return {
        PRETRAINED + name: Head(tracks.select(names), channels) for name, names in pretrained.content["heads"].items()
    }


def _build_trunk(
    config: ModelConfig, pretrained: Pretrained | None, info: DatasetInfo, labels: bool, own_bins: bool = False
) -> Trunk:
    """The trunk for the window and bins of a dataset; ``own_bins``: bins of labels are as long as in pretraining."""
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
    settings |= _of_tokens(config, kind)
    native = kind.label_bin_size if labels else info.bin_size
    if labels and (config.pool != "mean" or config.centre is not None):
        native = max(1, native)  # there is nothing to choose from in one bin
    if pretrained and (own_bins or not kind.any_bin_size):
        native = int(pretrained.content["bin_size"])
    if labels:
        crop = kind.drops if config.centre is None else _around_centre(config, kind, info.window, native)
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
    with allowing(config.remote_code):
        trunk = kind.build(settings, bin_size=native, crop=crop)
    if config.init == "random" and isinstance(trunk, WrappedTrunk) and trunk.pretrained is not None:
        redraw(trunk)
        with_spec(trunk, weights=None)
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
            own = pretrained.name if pretrained.trained_on else None
            with_spec(trunk, weights=str(content["weights_sha256"]), folds=pretrained.folds or own)
    return trunk


def _around_centre(config: ModelConfig, kind: type[Trunk], window: int, native: int) -> int:
    """Bins to drop at each end so that ``model.centre`` are left in the middle."""
    assert config.centre is not None
    crop, rest = divmod(window // native - config.centre, 2)
    if not window or window % native or rest or crop < kind.drops:
        bins = f"{window // native} bins of {native} bp" if window else "sequences of several lengths"
        remedy = "Choose an even number of bins less than these, or leave it out"
        raise ModelError(
            f"the heads cannot see the middle of {bins} alone", config.centre, where="model.centre", remedy=remedy
        )
    return crop


def _of_tokens(config: ModelConfig, kind: type[Trunk]) -> dict[str, bool]:
    """What the configuration says about tokens, as settings of the trunk."""
    if not {"species", "truncate"} <= kind.defaults().keys():
        if config.truncate:
            remedy = "Leave it out"
            raise ConfigError("the model reads bases and no tokens", True, where="model.truncate", remedy=remedy)
        return {}
    problems = Problems(ConfigError)
    for name in ("species", "truncate"):
        if name in config.settings:
            remedy = f"Write model.{name}"
            problems.add("is not among the settings", name, where="model.settings", remedy=remedy)
    problems.raise_if_any()
    return {"truncate": config.truncate}


def _new_heads(
    tracks: TrackTable, channels: int, pool: Literal["none", "mean", "max", "attention"], covariates: int
) -> dict[str, Head]:
    return {
        _key(group): Head(tracks.select([tracks.names[i] for i in index]), channels, pool, covariates)
        for group, index in tracks.groups.items()
    }


def _track_heads(
    config: ModelConfig, name: str, pretrained: Pretrained | None, trunk: Trunk, tracks: TrackTable, suits: bool
) -> dict[str, Head]:
    """A head per group of labels that reads a pretrained track, with its strand partner."""
    if pretrained is None or not suits or config.head != "new" or config.init == "random":
        what = "a pretrained track as the head needs a pretrained model, labels, head: new and no covariates"
        raise ModelError(what, config.name, where="model.track", remedy="Leave it out for a new head")
    old = pretrained.tracks
    if name not in old.names:
        remedy = f"It has {len(old)} tracks, such as {', '.join(old.names[:8])}"
        raise ModelError("the pretrained model has no such track", name, where="model.track", remedy=remedy)
    frame = old.frame.set_index("name", drop=False)
    source = old.select(list(dict.fromkeys([name, str(frame.loc[name, "strand_pair"])])))
    return {
        "track_" + key.removeprefix("new_"): TrackHead(
            tracks.select([tracks.names[i] for i in index]), trunk.spec.channels, source, trunk.spec.bin_size
        )
        for key, index in ((_key(group), index) for group, index in tracks.groups.items())
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
    groups: Mapping[str, list[str]] = pretrained.content["heads"]
    for key, head in model.heads.items():
        if isinstance(head, TrackHead) or (key.startswith((PRETRAINED, CONTINUED)) and isinstance(head, Head)):
            copied = head.source.names if isinstance(head, TrackHead) else head.tracks.names
            there = next(group for group, names in groups.items() if copied[0] in names)
            names = list(groups[there])
            rows = [names.index(track) for track in copied]
            for part, tensor in head.state_dict().items():
                if part in ("scale", "bias"):  # a TrackHead's own
                    continue
                theirs = f"heads.{there}.{part}"
                wanted.setdefault(theirs, []).append((f"heads.{key}.{part}", rows))
                expected[theirs] = (len(names), *tensor.shape[1:])
    check_fit(
        expected,
        tensors,
        pretrained.folder,
        what="the weights do not fit the architecture",
        remedy="Copy or download the folder again",
        prefix="trunk.",
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
