"""Published weights by folder or hub id: which layout is which, and whose licence is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from seqgraft.data.seen import TRUNK_FOLDS, read_trunk_folds
from seqgraft.data.tables import read_track_table
from seqgraft.errors import ConfigError
from seqgraft.models.hub_automodel import load_automodel
from seqgraft.models.hub_borzoi import load_borzoi
from seqgraft.models.hub_enformer import PUBLISHED, load_enformer
from seqgraft.models.hub_language import LANGUAGE_MODELS, MODEL_TYPES, load_language
from seqgraft.models.huggingface import Loaded, find_folder, is_hub_id, read_config

__all__ = ["LAYOUTS", "is_hub_id", "licence_of", "load_published", "regions_of"]

#: ``model_type`` of ``config.json`` -> what loads it; ``load_automodel`` all other types that transformers has.
LAYOUTS: Mapping[str, Callable[..., Loaded]] = {
    "borzoi": load_borzoi,
    "enformer": load_enformer,
    **dict.fromkeys(MODEL_TYPES, load_language),
}
#: As the model cards on the hub say.
_LICENCES = {
    PUBLISHED: "CC-BY-4.0",
    **{f"johahi/borzoi-replicate-{i}{species}": "CC-BY-4.0" for i in range(4) for species in ("", "-mouse")},
    **{f"johahi/flashzoi-replicate-{i}": "MIT" for i in range(4)},
    **{name: weights.licence for name, weights in LANGUAGE_MODELS.items() if weights.licence},
}


def licence_of(source: str) -> str:
    """The licence of published weights, where it is known."""
    is_repository = is_hub_id(source) and not Path(source).is_dir()
    unknown = f"not stated: see the repository {source}" if is_repository else "not stated"
    return _LICENCES.get(source, unknown)


def regions_of(loaded: Loaded, bed: Path) -> pd.DataFrame:
    """The regions of a published BED (chrom, start, end, fold), with what the weights did with each as its fold.

    Raises:
        DataError: it cannot be read, or has folds that the model's split does not have.
    """
    return read_trunk_folds(bed, TRUNK_FOLDS[str(loaded.trunk.spec.folds)].names)


def load_published(
    source: str,
    *,
    revision: str | None = None,
    targets: Mapping[str, Path] | None = None,
    species: str | None = None,
    remote_code: str | None = None,
) -> Loaded:
    """Trunk and heads from a folder or a hub id, by the ``model_type`` of its ``config.json``.

    Args:
        revision: the commit, for a hub id.
        targets: tables of tracks by the name of their head; "" names the only one. A ``targets.txt`` means the legacy
            order of squashing, in which the published networks were trained.
        species: the token that stands before each sequence, for models that have such tokens.
        remote_code: the full commit whose Python files may run, for models that are made by code of their repository.

    Raises:
        ConfigError: see ``find_folder``; a species that the model does not know, or none where it needs one; code
            that is not allowed.
        DataError: a table of tracks that cannot be read.
        ModelError: files that are missing, truncated or of another model; tensors or tables that do not fit.
    """
    config = read_config(find_folder(source, revision))
    tracks = {head: read_track_table(path, transform_old=True) for head, path in (targets or {}).items()} or None
    kind = str(config.get("model_type"))
    if remote_code is not None or kind not in LAYOUTS:
        return load_automodel(source, revision=revision, species=species, tracks=tracks, remote_code=remote_code)
    if species is not None and kind not in MODEL_TYPES:
        what = f"a model of the type {kind!r} has no token for the species"
        raise ConfigError(what, species, where=source, remedy="Leave it out")
    more = {} if species is None else {"species": species}
    return LAYOUTS[kind](source, revision=revision, tracks=tracks, **more)
