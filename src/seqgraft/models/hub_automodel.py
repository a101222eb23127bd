"""Checkpoints of any architecture that transformers has, and of architectures that come with their own code.

Every tensor is accounted for: those of other tasks' heads, and tables that are computed, are left and listed; what is
missing, misshapen or not known is refused, so that nothing of a model is random in silence. Weights are safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqgraft.errors import ConfigError, ModelError
from seqgraft.models.automodel import AutoTrunk
from seqgraft.models.huggingface import Loaded, Tracks, find_code, find_folder, read_config
from seqgraft.models.reading import LoadReport, Place, file_sha256, fill, read_tensors
from seqgraft.models.remote_code import allowing, check_commit, read_code
from seqgraft.models.tokens import Blocks, BytePairs, Overlapping
from seqgraft.models.vocabulary import BASES, read_vocabulary

__all__ = ["load_automodel"]

_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_WEIGHTS = "model.safetensors"
#: Parts of a checkpoint without a prefix that belong to other tasks, or are computed here.
_HEADS = r"(lm_head|cls|classifier|score|pooler|qa_outputs|embed_out|decoder|head|predictions)\."
_COMPUTED = re.compile(r"(^|.*\.)(inv_freq|position_ids|token_type_ids|attn\.bias|attn\.masked_bias|attention\.bias)")
#: Part of the joined experts -> what is joined in each, as Mixtral and as Jamba call it.
_EXPERTS = {"gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")), "down_proj": (("w2",), ("down_proj",))}
_BP_PER_PAIR = 4  # of byte pairs on DNA, about: which window is proposed where tokens do not say how long it can be
_TOKENS = 1024  # and how many tokens, where the model takes any number


def load_automodel(
    source: str | Path,
    *,
    revision: str | None = None,
    species: str | None = None,
    bin_size: int = 16,
    crop: int = 0,
    tracks: Tracks = None,
    remote_code: str | None = None,
) -> Loaded:
    """The trunk of a model of transformers from a folder or a hub id; it has no heads.

    The folder is as transformers saves them, with ``model.safetensors`` and the files of the tokens.

    Args:
        source, revision: see ``find_folder``.
        species: the token that stands before each sequence, for k-mers that overlap.
        bin_size: bp per bin of the trunk's output: any.
        crop: bins dropped at each end.
        tracks: none, because there are no heads.
        remote_code: the full commit whose Python files may run. Of a hub id it is the ``revision``, or, where
            ``auto_map`` names another repository, a commit of that; of a folder it is what the user says of it.

    Raises:
        ConfigError: see ``find_folder``; code that is not allowed, or allowed where there is none; an unknown species.
        ModelError: files that are missing, truncated or of another model; tensors that do not fit; k-mers of which no
            file says how they stand.
    """
    check_commit(remote_code)
    if tracks is not None:
        raise ModelError("the model has no heads that tracks belong to", sorted(tracks), where="tracks")
    folder = find_folder(source, revision, (*_FILES, "*.py") if remote_code else _FILES)
    config = read_config(folder)
    code = _code(folder, str(source), revision, config, remote_code)
    words = _read_tokens(folder, species)
    vocabulary = words.vocabulary
    settings = {
        "config": {name: value for name, value in config.items() if name != "auto_map"},
        "tokens": {Overlapping: "overlapping", Blocks: "blocks", BytePairs: "byte_pairs"}[type(words)],
        "k": getattr(words, "k", 1),
        "vocabulary": {
            "ids": {} if isinstance(words, BytePairs) else dict(vocabulary.ids),
            **{name: getattr(vocabulary, name) for name in ("unknown", "padding", "limit")},
            **{name: list(getattr(vocabulary, name)) for name in ("before", "after")},
        },
        "tokenizer": words.text if isinstance(words, BytePairs) else "",
        "code": code,
        "species": species or "",
    }
    with allowing(remote_code):
        trunk = AutoTrunk.build(settings, bin_size=bin_size, crop=crop)
    rows = len(trunk.get_parameter("stages.embeddings.table.weight"))
    if (most := max(vocabulary.ids.values())) >= rows:
        what = f"the model has vectors for {rows} tokens, and the vocabulary goes up to number"
        raise ModelError(what, most, where=folder, remedy="Copy all files from one place")
    path = folder / _WEIGHTS
    if not path.exists():
        remedy = "It must be in one file; transformers saves it with save_pretrained(..., max_shard_size='1TB')"
        raise ModelError("the weights are missing", str(path), remedy=remedy)
    places = _places(trunk)
    prefix = f"{getattr(trunk.stages['model'].inner, 'base_model_prefix', '')}."
    known, left = _known(read_tensors(path), prefix, {place.name for place in places.values()})
    for name in trunk.transposed:
        if name in known:
            known[name] = known[name].T
    matched = fill({"trunk.": trunk}, places, known, path)
    size = max(1, bin_size)
    window = (trunk.longest or (vocabulary.limit or _TOKENS) * _BP_PER_PAIR) // size * size
    report = LoadReport(path, file_sha256(path), matched, left=left)
    return Loaded(trunk.eval(), {}, report, window, window // size - 2 * crop)


def _code(
    folder: Path, source: str, revision: str | None, config: Mapping[str, Any], allowed: str | None
) -> dict[str, Any]:
    """The code of the repository, if it is wanted."""
    auto_map = config.get("auto_map") or {}
    if allowed is None:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if auto_map and config.get("model_type") not in CONFIG_MAPPING:
            remedy = "Read its Python files; if you trust them, set model.remote_code to their commit (40 digits)"
            what = "transformers has no such model: Python code of the repository makes it, which is not run unasked"
            raise ConfigError(what, config.get("model_type"), where=f"model {source}", remedy=remedy)
        return {}
    if not auto_map:
        what = "the model needs no code of its repository"
        raise ConfigError(what, allowed, where="model.remote_code", remedy="Leave it out")
    elsewhere = {str(name).partition("--")[0] for name in auto_map.values() if "--" in str(name)}
    if len(elsewhere) > 1:
        raise ModelError("the code is in several repositories", sorted(elsewhere), where=source)
    for repository in elsewhere:
        return read_code(find_code(repository, allowed), auto_map, repository, allowed)
    if revision is not None and revision != allowed:
        what = "the code is beside the weights, whose commit (model.revision) is another"
        raise ConfigError(what, allowed, where="model.remote_code", remedy=f"Give {revision}, if you trust its code")
    return read_code(folder, auto_map, source, allowed)


def _read_tokens(folder: Path, species: str | None) -> Overlapping | Blocks | BytePairs:
    """The tokens that the files describe: byte pairs, single bases, k-mers and single bases (blocks), k-mers alone.

    K-mers alone overlap where the files are those of BERT's tokeniser; elsewhere nothing says whether they do.

    Raises:
        ModelError: nothing says it.
    """
    path = folder / "tokenizer.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["model"].get("type") in ("BPE", "Unigram"):
        if species is not None:
            raise ConfigError("the model has no token for the species", species, where=folder, remedy="Leave it out")
        return BytePairs.read(folder)
    vocabulary = read_vocabulary(folder, (), ())
    sizes = {len(token) for token in vocabulary.ids if token and set(token.upper()) <= set(BASES)}
    if len(sizes) > 1:
        return Blocks.read(folder)
    settings = folder / "tokenizer_config.json"
    maker = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.exists() else None
    if max(sizes, default=1) > 1 and not str(maker).startswith("Bert"):
        remedy = 'Write "tokenizer_class": "BertTokenizer" into tokenizer_config.json if they overlap'
        raise ModelError("no file says whether the k-mers overlap", maker, where=folder, remedy=remedy)
    return Overlapping.read(folder, species=species)


def _places(trunk: AutoTrunk) -> dict[str, Place]:
    """Where each tensor of the trunk stands in a checkpoint of the model alone."""
    table, inner = "stages.embeddings.table.", "stages.model.inner."
    places = {}
    for name, tensor in trunk.state_dict().items():
        theirs = (
            f"{trunk.table_name}.{name.removeprefix(table)}" if name.startswith(table) else name.removeprefix(inner)
        )
        places[f"trunk.{name}"] = Place(theirs, tuple(tensor.shape))
    return places


def _known(tensors: Mapping[str, Tensor], prefix: str, wanted: set[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The model's tensors by the names that they have in the model alone, and what is left.

    In a checkpoint with a head the model's own names have a prefix: what has none is the head's.
    """
    whole = prefix != "." and any(name.startswith(prefix) for name in tensors)
    known: dict[str, Tensor] = {}
    left = []
    for name, tensor in tensors.items():
        plain = name.removeprefix(prefix) if whole else name
        plain = re.sub(r"\.block_sparse_moe\.", ".mlp.", plain)  # Mixtral, as it was called and is saved again
        plain = re.sub(r"^embedding\.", "embeddings.", plain) if plain not in wanted else plain  # Mamba's own files
        of_head = (whole and not name.startswith(prefix)) or re.match(_HEADS, plain)
        if plain not in wanted and (of_head or _COMPUTED.fullmatch(plain)):
            left.append(name)
        else:
            known[plain] = tensor
    return _joined(known, wanted), tuple(left)


def _joined(tensors: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Experts that are saved one by one, joined as the model holds them: gates above what goes up; what goes down."""
    joined = dict(tensors)
    for name in wanted - tensors.keys():
        found = re.fullmatch(r"(.*\.experts\.)(gate_up_proj|down_proj)", name)
        if found is None:
            continue
        for parts in _EXPERTS[found[2]]:
            experts: list[Tensor] = []
            while {*(names := [f"{found[1]}{len(experts)}.{part}.weight" for part in parts])} <= joined.keys():
                experts.append(torch.cat([joined.pop(each) for each in names]))
            if experts:
                joined[name] = torch.stack(experts)
    return joined
