"""Published weights by folder or hub id: which layout is which, and whose licence is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from seqgraft.data.seen import TRUNK_FOLDS, read_trunk_folds
from seqgraft.data.tables import read_track_table
from seqgraft.models.hub_borzoi import load_borzoi
from seqgraft.models.hub_enformer import PUBLISHED, load_enformer
from seqgraft.models.hub_language import load_language
from seqgraft.models.huggingface import Loaded, find_folder, is_hub_id, read_config
from seqgraft.models.language import FAMILIES

__all__ = ["LAYOUTS", "is_hub_id", "licence_of", "load_published", "regions_of"]

#: ``model_type`` of ``config.json`` -> what loads it.
LAYOUTS: Mapping[str, Callable[..., Loaded]] = {
    "borzoi": load_borzoi,
    "enformer": load_enformer,
    **dict.fromkeys(FAMILIES, load_language),
}
#: As the model cards on the hub say.
_LICENCES = {
    PUBLISHED: "CC-BY-4.0",
    **{f"johahi/borzoi-replicate-{i}{species}": "CC-BY-4.0" for i in range(4) for species in ("", "-mouse")},
    **{f"johahi/flashzoi-replicate-{i}": "MIT" for i in range(4)},
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


def load_published(source: str, *, revision: str | None = None, targets: Mapping[str, Path] | None = None) -> Loaded:
    """Trunk and heads from a folder or a hub id, by the ``model_type`` of its ``config.json``.

    Args:
        revision: the commit, for a hub id.
        targets: tables of tracks by the name of their head; "" names the only one. A ``targets.txt`` means the legacy
            order of squashing, in which the published networks were trained.

    Raises:
        ConfigError: see ``find_folder``.
        DataError: a table of tracks that cannot be read.
        ModelError: files that are missing, truncated or of another model; tensors or tables that do not fit.
    """
    config = read_config(find_folder(source, revision), *LAYOUTS)
    tracks = {head: read_track_table(path, transform_old=True) for head, path in (targets or {}).items()} or None
    return LAYOUTS[config["model_type"]](source, revision=revision, tracks=tracks)
