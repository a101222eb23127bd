"""Architectures of transformers as trunks: its own numbers, padding, adapters, checkpoints, code that comes along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from builders import tiny_coverage, tiny_labels
from seqgraft.adapters import (
    IA3,
    Adapter,
    FullFineTune,
    Houlsby,
    LinearProbe,
    LoRA,
    Peft,
    Prompt,
    adapt,
    check_gradients,
    load_adapter,
    merge,
    save_adapter,
)
from seqgraft.cache import ActivationCache
from seqgraft.card import write_card
from seqgraft.cli import app
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError, DataError, ModelError
from seqgraft.experiment import parse_experiment
from seqgraft.models.automodel import MASKED, AutoTrunk
from seqgraft.models.base import Head, SequenceModel, Trunk, mean_of_valid
from seqgraft.models.folders import convert_published, find_model
from seqgraft.models.hub import load_published
from seqgraft.models.hub_automodel import load_automodel
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.run import fit_run
from seqgraft.sequence import decode
from seqgraft.train import TrainConfig, cache_choice
from test_language import batch

ENDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 400,
}
SSM = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
#: model_type -> what else its configuration has.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"num_key_value_heads": 1},
    "mistral": SIZES | {"num_key_value_heads": 1, "sliding_window": 32},
    "mixtral": SIZES | {"num_key_value_heads": 1, "num_local_experts": 2},
    "gemma": SIZES | {"num_key_value_heads": 1, "head_dim": 8},
    "olmo": SIZES,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 400},
    "gpt_neox": SIZES,
    "modernbert": SIZES | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 0},
    "big_bird": SIZES | {"sep_token_id": 0},
    "megatron-bert": SIZES,
    "roformer": SIZES,
    "mamba": SSM,
    "mamba2": SSM | {"head_dim": 8, "num_heads": 4, "n_groups": 1, "expand": 2},
    "jamba": SIZES | {"num_key_value_heads": 1, "mamba_d_state": 4, "num_experts": 2, "attn_layer_period": 2,
                      "attn_layer_offset": 1},
    "phi": SIZES,  # one that is in no list here: one length at a time
}  # fmt: skip
TRIED = ("llama", "modernbert", "gpt2", "mamba")
COMMIT = "0123456789abcdef" * 2 + "01234567"


def trunk_of(kind: str, seed: int = 0, crop: int = 0, **settings: Any) -> AutoTrunk:
    torch.manual_seed(seed)
    config = {"model_type": kind, **ENDS, **CONFIGS[kind], **settings.pop("config", {})}
    trunk = AutoTrunk(config, **settings, crop=crop)
    for module in trunk.modules():
        if isinstance(module, nn.Linear | nn.Embedding):  # a model that has learned something
            nn.init.normal_(module.weight, std=0.3)
    return trunk.eval()


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_labels(tmp_path_factory.mktemp("labels") / "data", rows=24, lengths=(20, 40))


def model_of(trunk: Trunk, dataset: Dataset) -> SequenceModel:
    torch.manual_seed(5)
    pool = "mean" if dataset.info.bins == 1 else "none"
    heads = {
        f"new_{group}": Head(dataset.tracks.select([dataset.tracks.names[i] for i in index]), trunk.spec.channels, pool)
        for group, index in dataset.tracks.groups.items()
    }
    return SequenceModel(trunk, heads, dataset.tracks)


# ---- padding, sites ----


def test_every_type_that_is_trusted_with_padding_is_tried() -> None:
    assert not MASKED - CONFIGS.keys()


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_gives_what_each_sequence_gives_alone(kind: str) -> None:
    trunk = trunk_of(kind)
    codes, lengths = batch(100, 50, 7)
    together = trunk(codes, lengths)
    assert together.x.shape == (3, 16, 7)
    for row, length in enumerate(lengths.tolist()):
        alone = trunk(codes[row : row + 1, :length], lengths[row : row + 1])
        size = alone.x.abs().max()
        assert (together.x[row, :, : alone.x.shape[-1]] - alone.x[0]).abs().max() < 1e-5 * size
        assert torch.allclose(mean_of_valid(together)[row], mean_of_valid(alone)[0], atol=1e-5 * float(size))


@torch.no_grad()
def test_padding_on_the_left_is_not_kept() -> None:
    """GPT-2 numbers positions from the first place of the batch: padding on the left would shift them."""
    words = {"ids": {t: i for i, t in enumerate("?-ACGT")}, "unknown": 0, "padding": 1, "before": [], "after": []}
    trunk = trunk_of("gpt2", vocabulary={**words, "limit": None}, config={"vocab_size": 6})
    assert not trunk.stages["embeddings"].tokeniser.vocabulary.left
    state = trunk.run(trunk.encode(*batch(30, 9)), stop="final")
    assert state.valid is not None
    assert state.valid[1].tolist() == [True] * 9 + [False] * (state.valid.shape[1] - 9)


@pytest.mark.parametrize("kind", TRIED)
def test_sites_are_found_by_name(kind: str) -> None:
    sites = trunk_of(kind).spec.sites
    ends = {site: sorted({name.partition(".1.")[2] for name in names} - {""}) for site, names in sites.items()}
    expected = {
        "llama": {
            "attention.query": ["self_attn.q_proj"],
            "attention.output": ["self_attn.o_proj"],
            "feedforward.up": ["mlp.gate_proj", "mlp.up_proj"],
            "feedforward.down": ["mlp.down_proj"],
        },
        "modernbert": {
            "attention.key": ["attn.Wqkv"],
            "attention.output": ["attn.Wo"],
            "feedforward.up": ["mlp.Wi"],
            "feedforward.down": ["mlp.Wo"],
        },
        "gpt2": {
            "attention": ["attn.c_attn", "attn.c_proj"],
            "feedforward.up": ["mlp.c_fc"],
            "feedforward.down": ["mlp.c_proj"],
        },
        "mamba": {
            "attention": ["mixer.in_proj", "mixer.out_proj", "mixer.x_proj"],
            "feedforward": ["mixer.in_proj", "mixer.out_proj"],
        },
    }[kind]
    assert "linear" not in sites  # Mamba's dt_proj, above all
    assert {site: ends[site] for site in expected} == expected
    assert sites["norm"]


def test_experts_that_are_no_layers_are_at_no_site(labels: Dataset) -> None:
    with pytest.raises(ModelError, match=r"no module at the site: 'feedforward'.*attention"):
        adapt(model_of(trunk_of("mixtral"), labels), LoRA(where=("attention", "feedforward")))


# ---- adapters ----

ADAPTERS: dict[str, Adapter] = {
    "linear probe": LinearProbe(),
    "lora": LoRA(rank=2, where=("attention", "feedforward")),
    "dora": LoRA(rank=2, dora=True),
    "ia3": IA3(),
    "houlsby": Houlsby(bottleneck=4),
    "vera": Peft(settings={"r": 4}),
    "full": FullFineTune(),
    "prompt": Prompt(tokens=3),
}


@pytest.mark.parametrize("kind", TRIED)
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(kind: str, name: str, labels: Dataset, tmp_path: Path) -> None:
    """Identity at the start, gradients for all that trains and for nothing else, merged and reloaded the same."""
    adapter = ADAPTERS[name]
    sample = labels.sample([0, 1, 2, 3])

    def made() -> SequenceModel:
        return model_of(trunk_of(kind), labels).eval()

    model = made()
    with torch.no_grad():
        before = model(sample)
        adapt(model, adapter)
        same = torch.allclose(model(sample), before, atol=1e-5)
    assert same == adapter.starts_as_identity
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.01)
    alive: set[str] = set()
    for step in range(4):
        optimiser.zero_grad()
        (model(sample) - sample.targets.nan_to_num()).square().mean().backward()
        alive = check_gradients(model, alive, last=step == 3)
        optimiser.step()
    model.eval()
    with torch.no_grad():
        after = model(sample)
        assert not torch.allclose(after, before, atol=1e-3)
        save_adapter(model, tmp_path / "adapter", {"name": "tiny"})
        again = made()
        load_adapter(again, tmp_path / "adapter")
        assert torch.equal(again(sample), after)
        if not adapter.mergeable:
            with pytest.raises(ModelError, match="cannot be merged"):
                merge(model)
            return
        merge(model)
        assert [*model.state_dict()] == [*made().state_dict()]
        assert torch.allclose(model(sample), after, atol=1e-5)


def test_frozen_modules_drop_nothing_out(labels: Dataset) -> None:
    for adapter, changes in ((LinearProbe(), False), (FullFineTune(), True)):
        model = model_of(trunk_of("gpt2", config={"resid_pdrop": 0.5}), labels)
        adapt(model, adapter)
        model.train()
        sample = labels.sample([0, 1])
        with torch.no_grad():
            assert torch.equal(model(sample), model(sample)) != changes


def test_a_module_that_reads_weights_past_their_layers_is_found(
    labels: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mamba's mixer reads dt_proj.weight always, and with its kernels, in training, those of x_proj and out_proj."""
    model = model_of(trunk_of("mamba"), labels)
    model.trunk.spec.sites["linear"] = ("stages.model.inner.layers.0.mixer.dt_proj",)  # type: ignore[index]
    with pytest.raises(ModelError, match=r"never calls these.*reads their weights itself.*mixer\.dt_proj"):
        adapt(model, LoRA(where=("linear",)))
    from transformers.models.mamba import modeling_mamba

    def fused(projected: Tensor, conv: Tensor, *weights: Tensor | None, **_: Any) -> Tensor:
        out = weights[3]
        assert out is not None
        return projected.chunk(2, dim=1)[0].transpose(1, 2) @ out.T

    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", fused)
    trunk = trunk_of("mamba")
    model = model_of(trunk, labels)
    adapt(model, LoRA(rank=2, where=("attention.output",)))
    model.train()
    for module in trunk.stages["model"].modules():
        if type(module).__name__ == "MambaMixer":
            module.frozen, module.training = False, True  # as it is where the trunk trains too
    sample = labels.sample([0, 1])
    (model(sample) - sample.targets.nan_to_num()).square().mean().backward()
    with pytest.raises(ModelError, match=r"get no gradient: the model does not use them.*out_proj\.lora_A"):
        check_gradients(model, set())


@torch.no_grad()
def test_the_cache_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte pairs are of any number: states have room for as many as there are bases."""
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    checkpoint(tmp_path / "saved", "llama", pairs=True)
    short = tiny_labels(tmp_path / "data", rows=12, lengths=(12, 32))
    for adapter in (LinearProbe(), LoRA(rank=2)):  # the whole trunk, and the embeddings alone
        model = model_of(load_automodel(tmp_path / "saved").trunk, short)
        adapt(model, adapter)
        model.eval()
        config = TrainConfig(cache="float32")
        choice = cache_choice(model, short, config, short.rows("train"), short.rows("valid"))
        cache = ActivationCache.open(model, short, choice, "float32", config.augment)
        for rows in ([2], [0, 1], [2, 3, 4], [2]):
            sample = short.sample(rows)
            attached = cache.attach(sample)
            assert attached.halfway is not None
            assert torch.allclose(model(attached), model(sample), atol=1e-5)


# ---- prompts ----


@torch.no_grad()
def test_a_prompt_is_seen_by_tokens_and_is_in_no_bin(labels: Dataset) -> None:
    model = model_of(trunk_of("modernbert"), labels).eval()
    codes, lengths = batch(60, 33)
    before = model.trunk(codes, lengths)
    adapt(model, Prompt(tokens=4))
    after = model.eval().trunk(codes, lengths)
    assert after.x.shape == before.x.shape
    assert torch.equal(after.valid, before.valid)
    assert not torch.allclose(after.x, before.x, atol=1e-3)
    alone = model.trunk(codes[1:, :33], lengths[1:])
    assert torch.allclose(after.x[1, :, : alone.x.shape[-1]], alone.x[0], atol=1e-5)


def test_a_prompt_takes_places(labels: Dataset) -> None:
    model = model_of(trunk_of("gpt2", config={"n_positions": 300}), labels)
    assert model.trunk.longest == 300
    adapt(model, Prompt(tokens=20))
    assert model.trunk.longest == 280
    model.trunk(*batch(280))
    with pytest.raises(DataError, match="bases that no token stands for"):
        model.trunk(*batch(281))


def test_what_does_not_start_as_the_identity_must_say_so(labels: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prompt, "starts_as_identity", True)
    with pytest.raises(ModelError, match="does not start as the identity"):
        adapt(model_of(trunk_of("llama"), labels), Prompt(tokens=2))
    monkeypatch.undo()
    monkeypatch.setattr("seqgraft.adapters.prompt._start", lambda trunk, *_: torch.full((2, 16), float("nan")))
    with pytest.raises(ModelError, match="does not start as the identity"):  # numbers must be finite all the same
        adapt(model_of(trunk_of("llama"), labels), Prompt(tokens=2))


def test_prompts_elsewhere(tmp_path: Path) -> None:
    from builders import settled_trunk

    coverage = tiny_coverage(tmp_path / "data")
    with pytest.raises(ModelError, match="reads no tokens"):
        adapt(model_of(settled_trunk(), coverage), Prompt())
    for name in ("prompt_tuning", "prefix_tuning"):
        with pytest.raises(ConfigError, match="adapter prompt"):
            Peft(type=name)
    with pytest.raises(ConfigError, match="at least one token"):
        Prompt(tokens=0)


# ---- checkpoints ----

LETTERS = ["<unk>", "<pad>", *"ACGTN"]
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, t in enumerate(["<unk>", "<pad>", "<s>"])
    ],
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
    },
    "model": {
        "type": "BPE",
        "unk_token": "<unk>",
        "vocab": {t: i for i, t in enumerate(["<unk>", "<pad>", "<s>", *"ACGTN", "AC", "GT", "ACGT", "AA"])},
        "merges": [["A", "C"], ["G", "T"], ["AC", "GT"], ["A", "A"]],
    },
}  # fmt: skip


def checkpoint(folder: Path, kind: str, head: str | None = None, pairs: bool = False, **changes: Any) -> Any:
    """What transformers saves of a tiny model, with its tokens; returns transformers' model without head."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, vocab_size=12, **ENDS, **CONFIGS[kind], **changes)
    torch.manual_seed(1)
    maker = getattr(transformers, head or "AutoModel")
    model = maker.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "A_log" not in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if pairs:
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    else:
        (folder / "vocab.txt").write_text("\n".join(LETTERS))
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return (model if head is None else model.base_model).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("llama", None),
        ("llama", "AutoModelForCausalLM"),
        ("mistral", "AutoModelForSequenceClassification"),
        ("mixtral", "AutoModelForCausalLM"),
        ("gemma", None),
        ("olmo", "AutoModelForCausalLM"),
        ("gpt2", None),
        ("gpt2", "AutoModelForCausalLM"),
        ("modernbert", "AutoModelForMaskedLM"),
        ("big_bird", "AutoModelForMaskedLM"),
        ("big_bird", None),
        ("megatron-bert", "AutoModelForMaskedLM"),
        ("roformer", "AutoModelForMaskedLM"),
        ("mamba", "AutoModelForCausalLM"),
        ("mamba2", None),
        ("jamba", "AutoModelForCausalLM"),
    ],
)
def test_hidden_states_are_those_of_transformers(tmp_path: Path, kind: str, head: str | None) -> None:
    theirs = checkpoint(tmp_path / "saved", kind, head)
    loaded = load_published(str(tmp_path / "saved"))
    codes, lengths = batch(40)
    codes[0, 7] = 4
    trunk = loaded.trunk
    state = trunk.run(trunk.encode(codes, lengths), stop="final")
    ids = torch.tensor([[LETTERS.index(letter) for letter in decode(codes[0].numpy())]])
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert state.valid is not None
    assert int(state.valid.sum()) == 40
    assert (state.x[0].T[:40] - expected[0]).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert len(loaded.report.matched) == len(trunk.state_dict())
    own = {"big_bird": "pooler."}.get(kind) if head is None else None
    tied = kind in ("gemma", "gpt2", "mamba")  # their head is the table of tokens
    assert bool(loaded.report.left) == (bool(own) or (head is not None and not tied))
    assert not {name for name in loaded.report.left if "layer" in name}
    assert loaded.heads == {}


@torch.no_grad()
def test_byte_pairs(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "saved", "llama", pairs=True)
    loaded = load_automodel(tmp_path / "saved", bin_size=4)
    text = torch.tensor([[0, 1, 2, 3, 0, 0, 3, 3, 0, 1, 1, 1]], dtype=torch.uint8)  # ACGT AA T T AC C C
    ids = torch.tensor([[2, 10, 11, 6, 6, 8, 4, 4]])
    hidden = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    found = loaded.trunk(text).x[0].T
    bases = hidden[[1, 1, 1, 1, 2, 2, 3, 4, 5, 5, 6, 7]]
    assert torch.allclose(found, bases.reshape(3, 4, -1).mean(1), atol=1e-5)
    again = AutoTrunk.build(json.loads(json.dumps(dict(loaded.trunk.settings))), bin_size=4, crop=0).eval()
    again.load_state_dict(loaded.trunk.state_dict())
    codes, lengths = batch(50, 21)
    assert torch.equal(again(codes, lengths).x, loaded.trunk(codes, lengths).x)


@torch.no_grad()
def test_a_checkpoint_is_a_model_name(tmp_path: Path, labels: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder as it is, and the model folder that is made of it; both as the checkpoint."""
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    checkpoint(tmp_path / "saved", "gpt2", "AutoModelForCausalLM", pairs=True)
    loaded = load_published(str(tmp_path / "saved"))
    convert_published(loaded, tmp_path / "model", name="dna", licence="", source="here")
    codes, lengths = batch(48)
    expected = mean_of_valid(loaded.trunk(codes, lengths))
    for name in ("saved", "model"):
        model = build_model(ModelConfig(name=str(tmp_path / name)), labels.tracks, labels.info).eval()
        assert torch.allclose(mean_of_valid(model.trunk(codes, lengths)), expected, atol=1e-5)
        assert model.trunk.spec.weights is not None
    with pytest.raises(ConfigError, match=r"model\.remote_code.*needs no code"):
        find_model(str(tmp_path / "saved"), remote_code=COMMIT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.mlp.down_proj.weight"), "missing"),
        (lambda t: t.update({"layers.2.mlp.down_proj.weight": torch.zeros(16)}), "unexpected"),
        (lambda t: t.update({"embed_tokens.weight": torch.zeros(9, 16)}), "misshapen"),
    ],
)
def test_tensors_are_checked(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"do not fit.*'{message}': \['"):
        load_automodel(tmp_path)


def test_files_that_do_not_do(tmp_path: Path) -> None:
    checkpoint(tmp_path, "llama")
    weights = (tmp_path / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ModelError, match="weights are missing"):
        load_automodel(tmp_path)
    weights.rename(tmp_path / "model.safetensors")
    (tmp_path / "vocab.txt").write_text("\n".join([*LETTERS, *(f"<{i}>" for i in range(9))]))
    with pytest.raises(ModelError, match="12 tokens, and the vocabulary goes up to number: 15"):
        load_automodel(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["<unk>", "<pad>", *(a + b for a in "ACGT" for b in "ACGT")]))
    with pytest.raises(ModelError, match="whether the k-mers overlap"):
        load_automodel(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "nothing"}, "no model of this type: 'nothing'"),
        ({"hidden_size": "wide"}, "refuses the description"),
        ({"model_type": "t5"}, "of an encoder and a decoder"),
    ):
        (tmp_path / "vocab.txt").write_text("\n".join(LETTERS))
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=message):
            load_automodel(tmp_path)


def test_many_tokens_of_bigbird_are_refused() -> None:
    """Beyond that number its attention is to blocks drawn at random."""
    trunk = trunk_of("big_bird", config={"block_size": 8, "num_random_blocks": 1})
    assert trunk.longest == 56
    assert trunk_of("big_bird", config={"attention_type": "original_full"}).longest == 400


# ---- code that comes with a checkpoint ----

MODELLING = '''
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_tiny import TinyConfig


class TinyModel(PreTrainedModel):
    """Sums up what came before, whatever is padding: only right one length at a time."""

    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.width)
        self.query = nn.Linear(config.width, config.width)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def set_input_embeddings(self, value):
        self.table = value

    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.query(x)
        return BaseModelOutput(last_hidden_state=x + x.flip(1))
'''
CONFIGURING = """
from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "tiny_dna"

    def __init__(self, vocab_size=7, width=16, **kwargs):
        self.width = width
        self.vocab_size = vocab_size
        super().__init__(**kwargs)
"""


def repository(folder: Path) -> Path:
    folder.mkdir()
    torch.manual_seed(3)
    tensors = {"table.weight": torch.randn(7, 16), "query.weight": torch.randn(16, 16), "query.bias": torch.randn(16)}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "tiny_dna",
        "width": 16,
        "vocab_size": 7,
        "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_tiny.py").write_text(MODELLING)
    (folder / "configuration_tiny.py").write_text(CONFIGURING)
    (folder / "vocab.txt").write_text("\n".join(LETTERS))
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@torch.no_grad()
def test_code_runs_where_its_commit_is_allowed(home: Path, labels: Dataset) -> None:
    source = repository(home / "saved")
    loaded = load_published(str(source), remote_code=COMMIT)
    trunk = loaded.trunk
    tensors = load_file(source / "model.safetensors")
    codes, lengths = batch(20, 11)
    codes[0, 3] = 4
    together = trunk.run(trunk.encode(codes, lengths), stop="final").x
    for row, length in enumerate(lengths.tolist()):
        ids = [LETTERS.index(letter) for letter in decode(codes[row, :length].numpy())]
        x = tensors["table.weight"][ids] @ tensors["query.weight"].T + tensors["query.bias"]
        assert torch.allclose(together[row, :, :length].T, x + x.flip(0), atol=1e-5)
    code = trunk.settings["code"]
    assert code["commit"] == COMMIT
    assert len(code["sha256"]) == 64
    assert trunk.spec.sites["attention.query"] == ("stages.model.inner.query",)

    convert_published(loaded, home / "model", name="dna", licence="", source=str(source))
    for name in (home / "model", source):
        model = build_model(ModelConfig(name=str(name), remote_code=COMMIT), labels.tracks, labels.info).eval()
        found = model.trunk.run(model.trunk.encode(codes, lengths), stop="final").x
        assert torch.allclose(found[..., :20], together[..., :20], atol=1e-6)
        with pytest.raises(ConfigError, match=r"not run un.*model\.remote_code"):
            build_model(ModelConfig(name=str(name)), labels.tracks, labels.info)
    with pytest.raises(ConfigError, match=rf"not run unless.*set model\.remote_code: {COMMIT}"):
        build_model(ModelConfig(name=str(home / "model"), remote_code="f" * 40), labels.tracks, labels.info)


def test_cards_of_them(home: Path) -> None:
    """What is counted from shapes stops at tokens, which are data; a card of a model with code needs its commit."""
    checkpoint(home / "gpt2", "gpt2", pairs=True)
    source = repository(home / "saved")
    for saved, commit in ((home / "gpt2", None), (source, COMMIT)):
        command = ["convert", str(saved), str(home / f"of_{saved.name}"), "--name", "dna"]
        done = CliRunner().invoke(app, [*command, *(["--remote-code", commit] if commit else [])])
        assert done.exit_code == 0, done.output
        assert "| LoRA r=8" in (home / f"of_{saved.name}" / "card.md").read_text()
    with pytest.raises(ConfigError, match=r"model\.remote_code"):
        write_card(home / "of_saved")


def test_a_run_records_the_code(home: Path, labels: Dataset) -> None:
    source = repository(home / "saved")
    experiment = parse_experiment(
        {
            "data": str(labels.folder),
            "model": {"name": str(source), "remote_code": COMMIT, "unknown": 1.0},
            "train": {"epochs": 1, "batch_size": 4},
        }
    )
    fit_run(experiment, home / "run")
    code = json.loads((home / "run" / "environment.json").read_text())["model"]["code"]
    settings = find_model(str(source), remote_code=COMMIT).content["settings"]["code"]  # type: ignore[union-attr]
    assert code == {name: settings[name] for name in ("repository", "commit", "sha256")}


def test_nothing_of_the_code_runs_unasked(home: Path) -> None:
    source = repository(home / "saved")
    mark = home / "mark"
    (source / "configuration_tiny.py").write_text(f"open({str(mark)!r}, 'w')\n{CONFIGURING}")
    with pytest.raises(ConfigError, match=r"transformers has no such model.*model\.remote_code"):
        load_published(str(source))
    assert not mark.exists()
    load_published(str(source), remote_code=COMMIT)
    assert mark.exists()


@pytest.mark.parametrize("commit", ["main", "", COMMIT[:39], COMMIT.upper()])
def test_a_branch_is_no_commit(commit: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.remote_code: must be a full commit"):
        ModelConfig(name="anything", remote_code=commit)
    with pytest.raises(ConfigError, match=r"model\.remote_code: must be a full commit"):
        load_automodel("anything", remote_code=commit)


def test_code_that_was_changed_is_refused(home: Path, labels: Dataset) -> None:
    source = repository(home / "saved")
    loaded = load_published(str(source), remote_code=COMMIT)
    convert_published(loaded, home / "model", name="dna", licence="", source=str(source))
    path = home / "model" / "model.json"
    content = json.loads(path.read_text())
    for name, text in (("modeling_tiny.py", "import os"), ("../evil.py", "import os")):
        changed = json.loads(json.dumps(content))
        changed["settings"]["code"]["files"][name] = text
        path.write_text(json.dumps(changed))
        with pytest.raises(ModelError, match="not that of its hash"):
            build_model(ModelConfig(name=str(home / "model"), remote_code=COMMIT), labels.tracks, labels.info)


def test_code_that_cannot_be_used(home: Path) -> None:
    source = repository(home / "saved")
    config = json.loads((source / "config.json").read_text())
    (source / "modeling_tiny.py").write_text("import a_package_that_nobody_has\n" + MODELLING)
    with pytest.raises(ModelError, match=r"cannot be imported.*a_package_that_nobody_has"):
        load_published(str(source), remote_code=COMMIT)
    for auto_map, error, message in (
        ({}, ConfigError, "needs no code"),
        ({"AutoModelForMaskedLM": "modeling_tiny.TinyModel"}, ModelError, "no class for AutoModel"),
        ({"AutoModel": "elsewhere.TinyModel"}, ModelError, "code is missing"),
    ):
        (source / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
        with pytest.raises(error, match=message):
            load_published(str(source), remote_code=COMMIT)
