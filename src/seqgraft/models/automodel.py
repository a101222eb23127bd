"""Any architecture that transformers has, as a trunk: Llama, Mistral, Gemma, GPT-2, ModernBERT, BigBird, Mamba, others.

::

    bases (b, 4, L) -> embeddings -> model -> final: bins (b, channels, L / bin_size) -> crop
                           |_ tokens, bins (skips) _|

"model" is transformers' own module in one stage; "embeddings" is its table of tokens. Checkpoints are read by
``hub_automodel.py``. Sequences are padded on the right alone, whatever side a checkpoint prefers, so that positions
count from the first token; a model whose mask is not known to keep padding out runs one length at a time.

Adapters find their sites by the names of layers. Where one layer makes queries, keys and values it stands for all
three; a block of Mamba is attention and feed-forward in one, so its two projections are sites of both. Layers of GPT-2
that hold their weights transposed become linear layers, which every method takes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqgraft.errors import ModelError
from seqgraft.models.base import Stage, State, Trunk, TrunkSpec
from seqgraft.models.huggingface import refusals
from seqgraft.models.language import ToBins, bases_of, beside_tokens, most_tokens, pieces
from seqgraft.models.remote_code import class_of
from seqgraft.models.stages import Crop
from seqgraft.models.tokens import Blocks, BytePairs, Overlapping
from seqgraft.models.vocabulary import Vocabulary

__all__ = ["KINDS", "MASKED", "AutoTrunk", "make_tokeniser"]

KINDS = ("overlapping", "blocks", "byte_pairs")
#: Types of models whose padded batches give what each sequence gives alone, as the tests compare.
MASKED = frozenset(
    [*("llama", "mistral", "mixtral", "gemma", "olmo", "gpt2", "gpt_neox", "modernbert", "big_bird"),
     *("megatron-bert", "roformer", "mamba", "mamba2", "jamba")]
)  # fmt: skip
#: Types of models whose configuration names a number of positions that they do not have.
_ANY_LENGTH = ("mamba", "mamba2", "falcon_mamba")
_SMALL: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
}
_NOTHING: Mapping[str, Any] = {}
#: What a config.json says that is of no concern here: precision, kernels, how it was saved, quick decoding.
_DROPPED = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("_name_or_path", "attn_implementation", "_attn_implementation", "return_dict", "output_attentions"),
    *("output_hidden_states", "_attn_implementation_autoset"),
)
#: Site -> how the names of its layers end.
_FUSED = r"Wqkv|c_attn|query_key_value|qkv_proj"
_MIXER = r"mixer\.in_proj|mamba\.in_proj"
_MIXED = r"mixer\.out_proj|mamba\.out_proj"
_SITES: Mapping[str, str] = {
    "attention.query": rf"q_proj|query|{_FUSED}|{_MIXER}",
    "attention.key": rf"k_proj|key|{_FUSED}|{_MIXER}",
    "attention.value": rf"v_proj|value|{_FUSED}|{_MIXER}",
    "attention.output": rf"o_proj|attn\.c_proj|attn\.Wo|attention(\.output)?\.dense|attn\.out_proj|{_MIXED}",
    "feedforward.up": rf"gate_proj|up_proj|Wi|c_fc|intermediate\.dense|dense_h_to_4h|fc1|{_MIXER}",
    "feedforward.down": rf"down_proj|mlp\.Wo|mlp\.c_proj|(?<!attention\.)output\.dense|dense_4h_to_h|fc2|{_MIXED}",
}
#: End of the name of any other linear layer -> its site, the first that fits. Mamba reads dt_proj's weight past it.
_OTHERS = {r"(mixer|mamba)\.x_proj": "attention", r"(mixer|mamba)\.dt_proj": "", r"": "linear"}
_BESIDE = {"tokens": 0, "bins": 0}  # what the last stage reads of the first


class AutoTrunk(Trunk):
    """A model of transformers on tokens of bases.

    Args:
        config: what ``config.json`` holds, above all ``model_type``.
        tokens: "overlapping" k-mers (of k = 1: single bases), "blocks" of them side by side, or "byte_pairs".
        k: bases of a token, of the first two kinds.
        vocabulary: ``ids`` (token -> id), ``unknown``, ``padding``, ``before``, ``after``, ``limit``; if empty, an
            unknown and a padding token, the k-mers and N.
        tokenizer: text of ``tokenizer.json``, of byte pairs.
        code: the Python files that make the model, see ``remote_code.read_code``; empty for native types.
        species: whose token stands before each sequence, for the record.
        truncate: drop bases that no token stands for, instead of refusing them.
        bin_size: bp per bin of the output: any; 0 makes one bin of the whole sequence, the mean over its bases.
        crop: bins dropped at each end of the output.

    Raises:
        ConfigError: code that the user has not allowed to run.
        ModelError: a type of model that transformers does not have or that takes no vectors of tokens, or settings
            that it refuses.
    """

    any_bin_size = True
    label_bin_size = 0

    def __init__(
        self,
        config: Mapping[str, Any] = _SMALL,
        tokens: str = "overlapping",
        k: int = 1,
        vocabulary: Mapping[str, Any] = _NOTHING,
        tokenizer: str = "",
        code: Mapping[str, Any] = _NOTHING,
        species: str = "",
        truncate: bool = False,
        bin_size: int = 16,
        crop: int = 0,
    ) -> None:
        super().__init__()
        self.settings: Mapping[str, Any] = {
            "config": dict(config),
            "tokens": tokens,
            "k": k,
            "vocabulary": dict(vocabulary),
            "tokenizer": tokenizer,
            "code": dict(code),
            "species": species,
            "truncate": truncate,
        }
        if bin_size < 0:
            raise ModelError("bins must be 1 bp or more, or 0 for one", bin_size, where="transformers")
        self.stride = max(1, bin_size)
        words = _vocabulary(tokens, k, vocabulary)
        wanted = {"vocab_size": len(words.ids)} if not vocabulary else {}
        inner, made = _build({**wanted, **config}, code)
        words = replace(words, left=False, limit=_limit(made, words.limit))
        tokeniser = make_tokeniser(tokens, k, words, tokenizer, truncate)
        self.longest = tokeniser.longest
        _plain(inner)
        table = inner.get_input_embeddings()
        #: Names in the checkpoint of what stands elsewhere here, and of weights that are transposed.
        self.table_name = next(name for name, module in inner.named_modules() if module is table)
        self.transposed = _straighten(inner)
        inner.set_input_embeddings(None)
        self.stages = nn.ModuleDict(
            {
                "embeddings": _Embeddings(tokeniser, table, bin_size),
                "model": _Model(inner, not code and config.get("model_type") in MASKED),
                "final": ToBins(bin_size, None),
                "crop": Crop(crop),
            }
        )
        channels = int(getattr(made, "hidden_size", table.embedding_dim))
        self.spec = TrunkSpec(name="transformers", channels=channels, bin_size=bin_size, sites=self._sites())

    def _sites(self) -> dict[str, tuple[str, ...]]:
        """Of layers that are linear or norms; grouped convolutions, tables and fused experts are at none."""
        sites: dict[str, list[str]] = {}
        for name, module in self.stages["model"].named_modules(prefix="stages.model"):
            found = []
            if type(module) is nn.Linear:
                found = [site for site, ends in _SITES.items() if re.search(rf"\.({ends})$", name)]
                found += sorted({site.partition(".")[0] for site in found})
                if not found:
                    found = [site for ends, site in _OTHERS.items() if re.search(rf"({ends})$", name)][:1]
            elif re.search("norm", type(module).__name__, re.IGNORECASE) and any(True for _ in module.parameters()):
                found = ["norm"]
            for site in filter(None, found):
                sites.setdefault(site, []).append(name)
        return {site: tuple(names) for site, names in sites.items()}


def make_tokeniser(kind: str, k: int, words: Vocabulary, text: str, truncate: bool) -> Overlapping | Blocks | BytePairs:
    """The tokens of one of ``KINDS``.

    Raises:
        ModelError: there is no such kind.
    """
    if kind == "byte_pairs":
        return BytePairs(words, text, truncate)
    if kind not in KINDS:
        raise ModelError("there is no such kind of tokens", kind, where="transformers", remedy=f"Choose one of {KINDS}")
    return (Overlapping if kind == "overlapping" else Blocks)(words, k, truncate)


def _vocabulary(tokens: str, k: int, given: Mapping[str, Any]) -> Vocabulary:
    if not given:
        return Vocabulary.of(dict.fromkeys(["[UNK]", "[PAD]", *pieces(tokens, k), "N"]))
    before, after = (tuple(given[name]) for name in ("before", "after"))
    return Vocabulary(given["ids"], given["unknown"], given["padding"], before, after, limit=given["limit"])


def _build(config: Mapping[str, Any], code: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model without pooling layers and heads, with random weights in float32, and its configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    kind, given = str(config.get("model_type")), {k: _number(v) for k, v in config.items() if k not in _DROPPED}
    native = not (code and code["config"])
    if native and (kind not in CONFIG_MAPPING or (not code and CONFIG_MAPPING[kind] not in MODEL_MAPPING)):
        remedy = "model_type must be one that transformers has, such as llama, gpt2, modernbert or mamba"
        raise ModelError("there is no model of this type", kind, where="transformers", remedy=remedy)
    if kind == "big_bird":
        given["attention_type"] = "original_full"  # as it is for as many tokens as _limit allows
    of_config: Any = CONFIG_MAPPING[kind] if native else class_of(code, "config")
    try:
        made = of_config(**given)
        made.use_cache = False
        of_model: Any = class_of(code, "model") if code else MODEL_MAPPING[of_config]
        pooling = {"add_pooling_layer": False} if "add_pooling_layer" in _arguments(of_model) else {}
        inner = of_model(made, **pooling)
    except refusals() as error:
        what = f"transformers refuses the description ({type(error).__name__}: {error})"
        raise ModelError(what, kind, where="config.json") from error
    if getattr(made, "is_encoder_decoder", False):
        raise ModelError("a model of an encoder and a decoder is not supported", type(inner).__name__, where=kind)
    if "inputs_embeds" not in _arguments(inner.forward):
        raise ModelError("the model takes no vectors of tokens (inputs_embeds)", type(inner).__name__, where=kind)
    if kind == "big_bird":
        made.attention_type = config.get("attention_type", "block_sparse")
    return inner, made


def _number(value: Any) -> Any:
    """Infinity, and what else JSON lacks, as transformers writes it into a config.json."""
    if isinstance(value, dict):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _number(v) for k, v in value.items()}
    return [_number(each) for each in value] if isinstance(value, list) else value


def _arguments(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _limit(config: Any, given: int | None) -> int | None:
    """How many tokens the model takes.

    BigBird of blocks attends fully up to a number of tokens, and beyond to blocks that are drawn at random: there, one
    sequence has no one answer, so that it is used up to this number.
    """
    limits = [given, None if config.model_type in _ANY_LENGTH else getattr(config, "max_position_embeddings", None)]
    if config.model_type == "big_bird" and config.attention_type == "block_sparse":
        limits.append((5 + 2 * config.num_random_blocks) * config.block_size)
    return min((limit for limit in limits if limit), default=None)


def _plain(inner: nn.Module) -> None:
    """Parameters that the architecture itself holds constant (tables of sines) become buffers: nothing trains them."""
    for module in inner.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def _straighten(inner: nn.Module) -> tuple[str, ...]:
    """Puts linear layers in the places of those with transposed weights; names of these weights."""
    from transformers.pytorch_utils import Conv1D

    found = [(name, module) for name, module in inner.named_modules() if type(module) is Conv1D]
    for name, module in found:
        n_in, n_out = module.weight.shape
        linear = nn.Linear(n_in, n_out, device="meta")
        linear.weight, linear.bias = nn.Parameter(module.weight.detach().T.contiguous()), module.bias
        inner.set_submodule(name, linear)
    return tuple(f"{name}.weight" for name, _ in found)


class _Embeddings(Stage):
    """Bases to tokens, and tokens to vectors. Which bases each token stands for goes on to the last stage."""

    writes = _BESIDE
    positions_later = True

    def __init__(self, tokeniser: Overlapping | Blocks | BytePairs, table: nn.Module, bin_size: int) -> None:
        super().__init__()
        self.tokeniser, self.table, self.bin_size = tokeniser, table, bin_size

    def forward(self, state: State) -> State:
        codes, lengths, first = bases_of(state)
        found = self.tokeniser.encode(codes, lengths)
        more = max(
            0, most_tokens(self.tokeniser, codes.shape[1]) - found.ids.shape[1]
        )  # so that the shape says how many there are
        x = self.table(functional.pad(found.ids, (0, more), value=self.tokeniser.vocabulary.padding))
        skips = {**state.skips, **beside_tokens(state, found, first, more, self.bin_size)}
        return State(x.transpose(1, 2), skips, functional.pad(found.mask, (0, more)))


class _Model(Stage):
    """The model on vectors of tokens; as many as the batch has. Global."""

    def __init__(self, inner: nn.Module, masked: bool) -> None:
        super().__init__()
        self.inner, self.masked = inner, masked
        self.takes_mask = "attention_mask" in _arguments(inner.forward)

    def forward(self, state: State) -> State:
        x = state.x.transpose(1, 2)
        valid = torch.ones_like(x[..., 0], dtype=torch.bool) if state.valid is None else state.valid
        counts = valid.sum(1)
        if self.masked:
            n = int(counts.max())
            out = self._run(x[:, :n], valid[:, :n])
        else:
            out = _by_length(self._run, x, counts)
        out = functional.pad(out, (0, 0, 0, x.shape[1] - out.shape[1]))
        return State(out.transpose(1, 2), state.skips, valid)

    def _run(self, x: Tensor, valid: Tensor) -> Tensor:
        mask = {"attention_mask": valid.long()} if self.takes_mask else {}
        found = self.inner(inputs_embeds=x, **mask)
        hidden: Tensor = found[0] if isinstance(found, tuple) else found.last_hidden_state
        return hidden


def _by_length(run: Any, x: Tensor, counts: Tensor) -> Tensor:
    """Sequences of one length at a time, each without padding."""
    out: Tensor | None = None
    for n in sorted(set(counts.tolist())):
        rows = counts == n
        part = run(x[rows, :n], torch.ones(int(rows.sum()), n, dtype=torch.bool, device=x.device))
        if out is None:
            out = part.new_zeros(len(x), x.shape[1], part.shape[-1])
        out = out.index_put((rows.nonzero()[:, :1], torch.arange(n, device=x.device)[None]), part)
    assert out is not None
    return out
