"""Checkpoints of DNA language models as transformers saves them: the door to transformers, which is asked one thing.

That is what the entries mean that a ``config.json`` leaves out. Every tensor is accounted for: heads of other tasks are
left and listed, anything else that is not expected is refused. No code of a repository is run, also where it has some:
the layers of DNABERT-2 and of version 2 of the Nucleotide Transformer are told by their tensors.

=================  ============  ==============================================================================
``model_type``     family        told by
=================  ============  ==============================================================================
``bert``           bert
``bert`` or none   mosaic        queries, keys and values in one layer, ``Wqkv``
``esm``            esm
``esm``            esm_rotary    ``position_embedding_type`` rotary, and no bias in the feed-forward part
=================  ============  ==============================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqgraft.errors import ConfigError, ModelError, Problems
from seqgraft.models.base import with_spec
from seqgraft.models.encoder import FAMILIES
from seqgraft.models.huggingface import Loaded, Tracks, find_folder, read_config, read_weights
from seqgraft.models.language import Language, pieces
from seqgraft.models.reading import LoadReport, Place, file_sha256, fill
from seqgraft.models.tokens import Blocks, BytePairs, Overlapping
from seqgraft.models.vocabulary import Vocabulary

__all__ = ["LANGUAGE_MODELS", "MODEL_TYPES", "PublishedLanguage", "load_language", "window_of"]

#: What ``config.json`` calls these models.
MODEL_TYPES = ("bert", "esm")

_TABLES = {"tokens": "word_embeddings", "positions": "position_embeddings", "segment": "token_type_embeddings"}
_ATTENTION = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
}
_PLAIN = {**_ATTENTION, "up": "intermediate.dense", "down": "output.dense"}
_FUSED = ("query", "key", "value")  # in the order of their rows in Wqkv
_BERT_NORMS = {"attention_norm": "attention.output.LayerNorm", "feedforward_norm": "output.LayerNorm"}
_ESM_NORMS = {"attention_norm": "attention.LayerNorm", "feedforward_norm": "LayerNorm"}
#: What the parts of a layer are called, by family.
_LAYERS: Mapping[str, Mapping[str, str]] = {
    "bert": _PLAIN | _BERT_NORMS,
    "esm": _PLAIN | _ESM_NORMS,
    "mosaic": {
        **_ATTENTION,
        **dict.fromkeys(_FUSED, "attention.self.Wqkv"),
        "up": "mlp.gated_layers",
        "down": "mlp.wo",
        "attention_norm": "attention.output.LayerNorm",
        "feedforward_norm": "mlp.layernorm",
    },
    "esm_rotary": _PLAIN | _ESM_NORMS,
}
#: The head for masked tokens by ``model_type``: its parts, and where its bias may stand.
_LM = {
    "bert": {
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "decoder": "cls.predictions.decoder",
    },
    "esm": {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "decoder": "lm_head.decoder"},
}
# The first of them counts: of two that are not shared, BERT adds the decoder's.
_LM_BIAS = {"bert": ("cls.predictions.decoder.bias", "cls.predictions.bias"), "esm": ("lm_head.bias",)}
# Heads of other tasks, and what is computed.
_LEFT = re.compile(
    r"(cls|lm_head|pooler|contact_head|classifier|qa_outputs)\..+|embeddings\.(position_ids|token_type_ids)"
    r"|encoder\.layer\.\d+\.attention\.self\.rotary_embeddings\.inv_freq"
)
_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_BASES_PER_PAIR = 4  # of a token of byte pairs, about: of DNABERT-2, 4 to 5


@dataclass(frozen=True)
class PublishedLanguage:
    """A published model by hub id.

    Attributes:
        citation: of the weights.
        licence: that the repository states; "" if it states none that could be read.
        settings: of the trunk without its head for masked tokens; none where tokens or sizes are in its files alone.
    """

    citation: str
    licence: str = ""
    settings: Mapping[str, Any] | None = None


def _language_models() -> dict[str, PublishedLanguage]:
    dnabert = "Ji et al. 2021, Bioinformatics, doi:10.1093/bioinformatics/btab083"
    nt = "Dalla-Torre et al. 2024, Nature Methods, doi:10.1038/s41592-024-02523-z"
    agro = "Mendoza-Revilla et al. 2024, Communications Biology, doi:10.1038/s42003-024-06465-2"
    species = "Karollus et al. 2023, bioRxiv, doi:10.1101/2023.01.26.525670"
    blocks = {"tokens": "blocks", "k": 6, "after": 0, "embedding_norm": False}

    def sized(family: str, positions: int, channels: int, depth: int, heads: int, hidden: int) -> dict[str, Any]:
        sizes = {"channels": channels, "depth": depth, "heads": heads, "hidden": hidden}
        return {"family": family, **blocks, **sizes, "positions": positions}

    small, large = sized("esm", 1000, 1280, 24, 20, 5120), sized("esm", 1000, 2560, 32, 20, 10240)
    nucleotide = {
        "500m-human-ref": small,
        "500m-1000g": small,
        "2.5b-1000g": large,
        "2.5b-multi-species": large,
        "v2-50m-multi-species": sized("esm_rotary", 2048, 512, 12, 16, 2048),
        "v2-100m-multi-species": sized("esm_rotary", 2048, 512, 22, 16, 2048),
        "v2-250m-multi-species": sized("esm_rotary", 2048, 768, 24, 16, 3072),
        "v2-500m-multi-species": sized("esm_rotary", 2048, 1024, 29, 16, 4096),
    }
    terms = "CC-BY-NC-SA-4.0"
    return {
        **{f"zhihan1996/DNA_bert_{k}": PublishedLanguage(dnabert, "", {"k": k}) for k in range(3, 7)},
        "zhihan1996/DNABERT-2-117M": PublishedLanguage("Zhou et al. 2023, arXiv:2306.15006", "Apache-2.0"),
        "zhihan1996/DNABERT-S": PublishedLanguage("Zhou et al. 2024, arXiv:2402.08777"),
        **{
            f"InstaDeepAI/nucleotide-transformer-{name}": PublishedLanguage(nt, terms, settings)
            for name, settings in nucleotide.items()
        },
        "InstaDeepAI/agro-nucleotide-transformer-1b": PublishedLanguage(
            agro, terms, sized("esm", 1024, 1500, 40, 20, 5120)
        ),
        "gagneurlab/SpeciesLM": PublishedLanguage(species, "MIT"),
    }


#: Hub id -> what is known of it without its files. Sizes are those of the publications.
LANGUAGE_MODELS: Mapping[str, PublishedLanguage] = _language_models()


def load_language(
    source: str | Path,
    *,
    revision: str | None = None,
    species: str | None = None,
    bin_size: int = 16,
    crop: int = 0,
    tracks: Tracks = None,
) -> Loaded:
    """The trunk of a DNA language model from a folder or a hub id; it has no heads for tracks.

    The folder is one of transformers' with a ``model_type`` of "bert" or "esm", and the files of its vocabulary: byte
    pairs where ``tokenizer.json`` says so, else overlapping k-mers for "bert" and blocks of k bases for "esm". The head
    for masked tokens is read if it is there (``trunk.lm``); heads of other tasks are left, and listed.

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
    path, tensors = read_weights(folder)
    config = _read_config(folder, tensors)
    kind, family = config["model_type"], config["family"]
    known, left = _known(tensors, kind, family)
    first = 0 if kind == "bert" else config["pad_token_id"] + 1  # ESM counts positions from there
    limit = config["max_position_embeddings"]
    tokens = _read_tokens(folder, kind, limit - first if FAMILIES[family].positions == "learned" else None, species)
    settings = {
        "family": family,
        **_describe(tokens),
        "channels": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "positions": limit - first,
        "embedding_norm": kind == "bert" or bool(config["emb_layer_norm_before"]),
        "embedding_scale": 1 - 0.15 * 0.8 if config.get("token_dropout") else 1.0,  # as where no token is masked
        "dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
        "eps": config["layer_norm_eps"],
        "species": species or "",
        "lm_head": f"{_LM[kind]['dense']}.weight" in known,
    }
    with torch.device("meta"):  # memory and time for the weights once
        trunk = Language.build(settings, bin_size=bin_size, crop=crop)
    rows: dict[str, tuple[int, range | list[int]]] = {
        "tokens": (config["vocab_size"], _rows(tokens, trunk, config["vocab_size"], folder)),
        "positions": (limit, range(first, limit)),
        "segment": (config.get("type_vocab_size", 0), range(1)),
    }
    places = {
        f"trunk.{name}": _place(name, tuple(tensor.shape), kind, family, rows, known)
        for name, tensor in trunk.state_dict().items()
    }
    wanted = {place.name for place in places.values()}
    spare = {name for name in known if name not in wanted and _LEFT.fullmatch(name)}  # second names of the same
    matched = fill({"trunk.": trunk}, places, {k: v for k, v in known.items() if k not in spare}, path)
    report = LoadReport(path, file_sha256(path), matched, left=(*left, *sorted(spare)))
    if known_as := LANGUAGE_MODELS.get(str(source)):
        with_spec(trunk, citation=known_as.citation)
    window = window_of(settings) // bin_size * bin_size
    return Loaded(trunk.eval(), {}, report, window, window // bin_size - 2 * crop)


def _read_config(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """``config.json`` with transformers' defaults for the entries that it leaves out, and the family of the layers."""
    given = read_config(folder, *MODEL_TYPES)
    from transformers import BertConfig, EsmConfig

    kind = {"bert": BertConfig, "esm": EsmConfig}[given["model_type"]]
    try:
        config: dict[str, Any] = given | kind(**given).to_dict()
    except (TypeError, ValueError) as error:
        raise ModelError(f"transformers refuses the description ({error})", where=folder / "config.json") from error
    positions = config.get("position_embedding_type", "absolute")
    family = config["family"] = _family(given["model_type"], positions, tensors)
    unsupported = {
        "position_embedding_type": positions != ("rotary" if family == "esm_rotary" else "absolute"),
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


def _family(kind: str, positions: str, tensors: Mapping[str, Tensor]) -> str:
    if any(".Wqkv." in name for name in tensors):
        return "mosaic"
    biased = any(name.endswith("intermediate.dense.bias") for name in tensors)
    return "esm_rotary" if kind == "esm" and positions == "rotary" and not biased else kind


def _read_tokens(folder: Path, kind: str, limit: int | None, species: str | None) -> Overlapping | Blocks | BytePairs:
    path = folder / "tokenizer.json"
    pairs = path.exists() and re.search(r'"type":\s*"BPE"', path.read_text(encoding="utf-8"))
    if kind == "bert" and not pairs:
        return Overlapping.read(folder, species=species, limit=limit)
    if species is not None:
        raise ConfigError("the model has no token for the species", species, where=folder, remedy="Leave it out")
    return BytePairs.read(folder, limit=limit) if pairs else Blocks.read(folder, limit=limit)


def _describe(tokens: Overlapping | Blocks | BytePairs) -> dict[str, Any]:
    """The settings of a trunk with such tokens."""
    words = tokens.vocabulary
    around = {"before": len(words.before), "after": len(words.after)}
    if isinstance(tokens, BytePairs):
        text = json.dumps(json.loads(tokens.text), separators=(",", ":"), ensure_ascii=False)
        return {"tokens": "byte_pairs", "k": _BASES_PER_PAIR, **around, "tokenizer": text}
    return {"tokens": "overlapping" if isinstance(tokens, Overlapping) else "blocks", "k": tokens.k, **around}


def _rows(tokens: Overlapping | Blocks | BytePairs, trunk: Language, count: int, folder: Path) -> list[int]:
    """Which of the ``count`` rows of their table ours are."""
    words: Vocabulary = tokens.vocabulary
    if isinstance(tokens, BytePairs):
        ours: Vocabulary = trunk.stages["embeddings"].tokeniser.vocabulary  # type: ignore[assignment,union-attr]
        if (ours.unknown, ours.padding) != (words.unknown, words.padding):
            named = {"unknown": words.unknown, "padding": words.padding}
            raise ModelError("special tokens have other names than usual", named, where=folder)
        rows = list(range(len(ours.ids)))
    else:
        rows = _kmer_rows(tokens, folder)
    if max(rows) >= count:
        what = f"the table has {count} rows, and the vocabulary a token with the id"
        raise ModelError(what, max(rows), where=folder, remedy="Copy all files from one place")
    return rows


def _kmer_rows(tokens: Overlapping | Blocks, folder: Path) -> list[int]:
    words = tokens.vocabulary
    if isinstance(tokens, Overlapping) and any("N" in token and not set(token) - set("ACGTN") for token in words.ids):
        raise ModelError("a vocabulary with N in its k-mers is not supported", where=folder)
    wanted = pieces("overlapping" if isinstance(tokens, Overlapping) else "blocks", tokens.k)
    missing = [piece for piece in wanted if piece not in words.ids]
    if missing:
        raise ModelError("the vocabulary lacks tokens", missing[:5], where=folder, remedy="Copy the whole folder")
    mask = next((words.ids[name] for name in ("[MASK]", "<mask>") if name in words.ids), words.unknown)
    return [words.unknown, words.padding, *words.before, *words.after, mask, *(words.ids[piece] for piece in wanted)]


def _known(tensors: Mapping[str, Tensor], kind: str, family: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of the encoder and of its head for masked tokens by their plain names, and the names of the rest."""
    known: dict[str, Tensor] = {}
    left: list[str] = []
    head = tuple(f"{name}." for name in _LM[kind].values())
    unused = "" if FAMILIES[family].positions == "learned" else "embeddings.position_embeddings.weight"
    for name, tensor in tensors.items():
        plain = name.removeprefix(f"{kind}.")
        plain = re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", plain))  # as they were called, and are saved again
        predicts = plain.startswith(head) or plain in _LM_BIAS[kind]
        if plain == unused or (_LEFT.fullmatch(plain) and not predicts):
            left.append(name)
        else:
            known[plain] = tensor
    return known, tuple(left)


def _place(
    name: str,
    shape: tuple[int, ...],
    kind: str,
    family: str,
    rows: Mapping[str, tuple[int, range | list[int]]],
    known: Mapping[str, Tensor],
) -> Place:
    """Where a tensor of the trunk stands: ``stages.STAGE.MODULE.PARAMETER`` or ``lm.MODULE.PARAMETER`` here."""
    *_, stage, module, parameter = name.split(".")
    count, chosen = rows["tokens"]
    if stage == "lm" and module == "decoder":
        table = f"{_LM[kind]['decoder']}.weight"
        names = _LM_BIAS[kind] if parameter == "bias" else (table, "embeddings.word_embeddings.weight")  # shared
        found = next((each for each in names if each in known), names[0])
        return Place(found, (count, *shape[1:]), chosen)
    if stage == "lm":
        return Place(f"{_LM[kind][module]}.{parameter}", shape)
    if module in _TABLES:
        count, chosen = rows[module]
        return Place(f"embeddings.{_TABLES[module]}.{parameter}", (count, *shape[1:]), chosen)
    if stage == "final":
        return Place(f"encoder.emb_layer_norm_after.{parameter}", shape)
    if stage == "embeddings":
        return Place(f"embeddings.{'LayerNorm' if kind == 'bert' else 'layer_norm'}.{parameter}", shape)
    there = f"encoder.layer.{stage.partition('_')[2]}.{_LAYERS[family][module]}.{parameter}"
    if family == "mosaic" and module in _FUSED:
        size, at = shape[0], _FUSED.index(module)
        return Place(there, (len(_FUSED) * size, *shape[1:]), range(at * size, (at + 1) * size))
    return Place(there, shape)


def window_of(settings: Mapping[str, Any]) -> int:
    """The longest sequence without N that the model takes, or was trained with, in bp; of byte pairs, about."""
    room = settings["positions"] - settings["before"] - settings["after"]
    k = settings["k"]
    return int(room + k - 1 if settings["tokens"] == "overlapping" else room * k)
