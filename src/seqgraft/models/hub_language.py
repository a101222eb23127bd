"""Checkpoints of DNA language models as transformers saves them: the door to transformers, which is asked one thing.

That is what the entries mean that a ``config.json`` leaves out. Every tensor is accounted for: heads of other tasks are
left and listed, anything else that is not expected is refused. No code of a repository is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqgraft.errors import ConfigError, ModelError, Problems
from seqgraft.models.huggingface import Loaded, Tracks, find_folder, read_config, read_weights
from seqgraft.models.language import FAMILIES, Language, pieces
from seqgraft.models.reading import LoadReport, Place, file_sha256, fill
from seqgraft.models.tokens import Blocks, Overlapping, Vocabulary

__all__ = ["load_language"]

_TABLES = {"tokens": "word_embeddings", "positions": "position_embeddings", "segment": "token_type_embeddings"}
_LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORMS = {  # of the embeddings, before or after attention and feed-forward
    "bert": ("embeddings.LayerNorm", "attention.output.LayerNorm", "output.LayerNorm"),
    "esm": ("embeddings.layer_norm", "attention.LayerNorm", "LayerNorm"),
}
# Heads of other tasks, and a table that is computed.
_LEFT = re.compile(r"(cls|lm_head|pooler|contact_head|classifier|qa_outputs)\..+|embeddings\.position_ids")
_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_language(
    source: str | Path,
    *,
    revision: str | None = None,
    species: str | None = None,
    bin_size: int = 16,
    crop: int = 0,
    tracks: Tracks = None,
) -> Loaded:
    """The trunk of a DNA language model from a folder or a hub id; it has no heads.

    The folder is one of transformers' with a ``model_type`` of "bert", whose tokens are overlapping k-mers, or "esm",
    whose tokens are blocks of k bases; with the files of its vocabulary. Heads of other tasks are left, and listed.

    Args:
        source, revision: see ``find_folder``.
        species: the token that stands before each sequence, for models that have such tokens (SpeciesLM).
        bin_size: bp per bin of the trunk's output: any.
        crop: bins dropped at each end.
        tracks: none, because there are no heads.

    Raises:
        ConfigError: see ``find_folder``; an unknown species, or none where the model needs one.
        ModelError: files that are missing, truncated or of another model; tensors that do not fit; what is not
            supported, such as rotary positions.
    """
    if tracks is not None:
        raise ModelError("a language model has no heads that tracks belong to", sorted(tracks), where="tracks")
    folder = find_folder(source, revision, _FILES)
    config = _read_config(folder)
    family, limit = config["model_type"], config["max_position_embeddings"]
    first = 0 if family == "bert" else config["pad_token_id"] + 1  # ESM counts positions from there
    theirs: Overlapping | Blocks
    if family == "bert":
        theirs = Overlapping.read(folder, species=species, limit=limit)
    else:
        if species is not None:
            raise ConfigError("the model has no token for the species", species, where=folder, remedy="Leave it out")
        theirs = Blocks.read(folder, limit=limit - first)
    words, tokens = theirs.vocabulary, "overlapping" if family == "bert" else "blocks"
    settings = {
        "family": family,
        "tokens": tokens,
        "k": theirs.k,
        "before": len(words.before),
        "after": len(words.after),
        "channels": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "positions": limit - first,
        "embedding_norm": family == "bert" or bool(config["emb_layer_norm_before"]),
        "embedding_scale": 1 - 0.15 * 0.8 if config.get("token_dropout") else 1.0,  # as where no token is masked
        "dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
        "eps": config["layer_norm_eps"],
    }
    with torch.device("meta"):  # memory and time for the weights once
        trunk = Language.build(settings, bin_size=bin_size, crop=crop)
    rows: dict[str, tuple[int, range | list[int]]] = {
        "tokens": (config["vocab_size"], _rows(words, tokens, theirs.k, folder)),
        "positions": (limit, range(first, limit)),
        "segment": (config.get("type_vocab_size", 0), range(1)),
    }
    path, tensors = read_weights(folder)
    known, left = _known(tensors, family)
    places = {f"trunk.{name}": _place(name, tuple(t.shape), family, rows) for name, t in trunk.state_dict().items()}
    matched = fill({"trunk.": trunk}, places, known, path)
    report = LoadReport(path, file_sha256(path), matched, left=left)
    window = _window(settings) // bin_size * bin_size
    return Loaded(trunk.eval(), {}, report, window, window // bin_size - 2 * crop)


def _read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` with transformers' defaults for the entries that it leaves out."""
    given = read_config(folder, *FAMILIES)
    from transformers import BertConfig, EsmConfig

    kind = {"bert": BertConfig, "esm": EsmConfig}[given["model_type"]]
    try:
        config: dict[str, Any] = given | kind(**given).to_dict()
    except (TypeError, ValueError) as error:
        raise ModelError(f"transformers refuses the description ({error})", where=folder / "config.json") from error
    unsupported = {
        "position_embedding_type": config.get("position_embedding_type", "absolute") != "absolute",
        "hidden_act": config.get("hidden_act", "gelu") != "gelu",
        "is_decoder": config.get("is_decoder"),
        "is_folding_model": config.get("is_folding_model"),
        "pad_token_id": config["pad_token_id"] is None,
    }
    problems = Problems(ModelError)
    for name in [name for name, refused in unsupported.items() if refused]:
        problems.add(f"this {name} is not supported", config[name], where=folder / "config.json")
    problems.raise_if_any()
    return config


def _rows(words: Vocabulary, tokens: str, k: int, folder: Path) -> list[int]:
    """Which rows of their table ours are."""
    if tokens == "overlapping" and any("N" in token and not set(token) - set("ACGTN") for token in words.ids):
        raise ModelError("a vocabulary with N in its k-mers is not supported", where=folder)
    wanted = pieces(tokens, k)
    missing = [piece for piece in wanted if piece not in words.ids]
    if missing:
        raise ModelError("the vocabulary lacks tokens", missing[:5], where=folder, remedy="Copy the whole folder")
    return [words.unknown, words.padding, *words.before, *words.after, *(words.ids[piece] for piece in wanted)]


def _known(tensors: Mapping[str, Tensor], family: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The encoder's tensors by their plain names, and what is left: heads of other tasks."""
    known: dict[str, Tensor] = {}
    left: list[str] = []
    for name, tensor in tensors.items():
        plain = name.removeprefix(f"{family}.")
        plain = re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", plain))  # as they were called, and are saved again
        if _LEFT.fullmatch(plain):
            left.append(name)
        else:
            known[plain] = tensor
    return known, tuple(left)


def _place(name: str, shape: tuple[int, ...], family: str, rows: Mapping[str, tuple[int, range | list[int]]]) -> Place:
    """Where a tensor of the trunk stands there, ``stages.STAGE.MODULE.PARAMETER`` here."""
    _, stage, module, parameter = name.split(".")
    of_embeddings, of_attention, of_feedforward = _NORMS[family]
    if module in _TABLES:
        count, chosen = rows[module]
        return Place(f"embeddings.{_TABLES[module]}.{parameter}", (count, *shape[1:]), chosen)
    if stage == "final":
        return Place(f"encoder.emb_layer_norm_after.{parameter}", shape)
    if stage == "embeddings":
        return Place(f"{of_embeddings}.{parameter}", shape)
    inside = {**_LINEARS, "attention_norm": of_attention, "feedforward_norm": of_feedforward}
    return Place(f"encoder.layer.{stage.partition('_')[2]}.{inside[module]}.{parameter}", shape)


def _window(settings: Mapping[str, Any]) -> int:
    """The longest sequence without N that the model takes, in bp."""
    room = settings["positions"] - settings["before"] - settings["after"]
    k = settings["k"]
    return int(room + k - 1 if settings["tokens"] == "overlapping" else room * k)
