"""DNA language models: what transformers answers on its own checkpoints, tokens and bins, adapters, padding.

``data/dnabert2_parity.npz`` and ``data/nucleotide_transformer2_parity.npz`` hold what published modelling code computes
with small random weights: ``config`` (JSON), ``sequences``, token ``ids`` (some of them the mask token) with their
attention ``mask``, ``states`` (after the embeddings and after each layer, the last norm included), ``logits`` of the
head for masked tokens, ``weights/*`` by the names of a checkpoint, and ``tokenizer`` or ``vocabulary``.

DNABERT-2's were made with ``bert_layers.py`` of the repository zhihan1996/DNABERT-2-117M at commit d064dec (without
its Triton kernel), in float32, with transformers 4.57.6: three heads, so that the slopes are not those of a power of
two, and ``alibi_starting_size`` 8, so that its table grows. Those of version 2 of the Nucleotide Transformer were made
with the layers of a public copy of its ``modeling_esm.py`` to which layers for another purpose had been added, which
were left out; transformers' own ESM with its two feed-forward classes exchanged for that copy's gives the same numbers
exactly.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from builders import BLOCKS, MOSAIC, ROTARY, byte_pairs, tiny_coverage, tiny_labels, tiny_language
from seqgraft.adapters import IA3, FullFineTune, Houlsby, LinearProbe, LoRA, adapt, merge
from seqgraft.cache import ActivationCache
from seqgraft.cli import app
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError, DataError, ModelError
from seqgraft.experiment import Experiment
from seqgraft.export import export_run
from seqgraft.local import Recompute
from seqgraft.memory import bytes_without_computing
from seqgraft.models.base import Head, SequenceModel, State, Trunk, mean_of_valid
from seqgraft.models.encoder import alibi_slopes
from seqgraft.models.folders import convert_published, read_model
from seqgraft.models.hub import licence_of, load_published
from seqgraft.models.hub_language import load_language
from seqgraft.models.language import Language, pieces
from seqgraft.models.masked import HIDDEN
from seqgraft.models.weights import ModelConfig, build_model, build_pretrained
from seqgraft.objectives import Elementwise
from seqgraft.plan import plan_run
from seqgraft.run import fit_run, open_run
from seqgraft.sample import Sample
from seqgraft.sequence import PAD, decode, encode
from seqgraft.train import TrainConfig, cache_choice

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LENGTHS = (50, 37, 20)


def kmers(k: int) -> list[str]:
    return ["".join(letters) for letters in product("ATCG", repeat=k)]


#: family -> vocabulary in the order of its publication, and what else its config has.
VOCABULARIES = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *kmers(3)],
    "esm": ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>", *kmers(3), *"ATCGN"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"max_position_embeddings": 64},
    "esm": {"max_position_embeddings": 66, "pad_token_id": 1, "mask_token_id": 2, "token_dropout": True},
}


def checkpoint(folder: Path, family: str, task: str = "Model", species: tuple[str, ...] = (), **changes: Any) -> Any:
    """What transformers saves of a tiny model, with its vocabulary; returns transformers' model."""
    import transformers

    words = [*VOCABULARIES[family], *species]
    name = {"bert": "Bert", "esm": "Esm"}[family]
    config = getattr(transformers, f"{name}Config")(vocab_size=len(words), **SIZES, **CONFIGS[family], **changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{task}")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    if family == "esm":
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    return model.eval()


def batch(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 4, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    for row, length in zip(codes, lengths, strict=True):
        row[length:] = PAD
    return codes.to(torch.uint8), torch.tensor(lengths)


def pieces_of(text: str, family: str) -> list[str]:
    """Tokens as the publications make them, one at a time."""
    if family == "bert":
        return ["[CLS]", *(text[i : i + 3] for i in range(len(text) - 2)), "[SEP]"]
    found, at = ["<cls>"], 0
    while at < len(text):
        piece = text[at : at + 3]
        found.append(piece if len(piece) == 3 and "N" not in piece else text[at])
        at += len(found[-1])
    return found


# ---- transformers' numbers ----


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "task", "changes"),
    [
        ("bert", "Model", {}),
        ("bert", "ForMaskedLM", {}),
        ("esm", "Model", {}),
        ("esm", "ForMaskedLM", {"emb_layer_norm_before": True, "token_dropout": False}),
        ("esm", "ForSequenceClassification", {}),
    ],
)
def test_hidden_states_are_those_of_transformers(
    tmp_path: Path, family: str, task: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoModel on the same folder, with padding and an N; every layer, not the last alone."""
    monkeypatch.setitem(CONFIGS, family, CONFIGS[family] | changes)
    checkpoint(tmp_path / "saved", family, task)
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained(tmp_path / "saved").eval()
    loaded = load_language(tmp_path / "saved", bin_size=10)
    codes, lengths = batch(*LENGTHS)
    codes[1, 10] = 4
    texts = [decode(row[:n].numpy()) for row, n in zip(codes, LENGTHS, strict=True)]
    words = VOCABULARIES[family]
    unknown = next(i for i, word in enumerate(words) if word.strip("[]<>").lower() == "unk")
    ids = [[words.index(p) if p in words else unknown for p in pieces_of(text, family)] for text in texts]
    width = max(map(len, ids))
    padding = 0 if family == "bert" else 1
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    answer = theirs(
        input_ids=torch.tensor([row + [padding] * (width - len(row)) for row in ids]),
        attention_mask=mask,
        output_hidden_states=True,
    )
    trunk = loaded.trunk
    state = trunk.encode(codes, lengths)
    for stage, expected in zip(["embeddings", "layer_0", "layer_1"], answer.hidden_states, strict=True):
        state = trunk.stages[stage](state)
        found = state.x.transpose(1, 2)
        if stage == "layer_1" and (norm := trunk.stages["final"].norm) is not None:
            found = norm(found)  # transformers counts it to the last layer
        assert state.valid is not None
        assert torch.equal(state.valid[:, :width], mask.bool())
        assert not state.valid[:, width:].any()
        difference = (found[:, :width] - expected)[mask.bool()].abs().max()
        assert float(difference) <= 1e-6 * max(1.0, float(expected.abs().max())), stage
    assert trunk(codes, lengths).x.shape == (3, 16, 5)
    left = {"classifier"} if task == "ForSequenceClassification" else set()
    heads = {name.removeprefix(f"{family}.").partition(".")[0] for name in loaded.report.left}
    assert heads - {"contact_head", "pooler"} == left
    assert bool(heads) == (task != "ForMaskedLM" or family == "esm")
    assert (trunk.lm is not None) == (task == "ForMaskedLM")
    assert len(loaded.report.matched) == len(trunk.state_dict())
    assert (loaded.window, loaded.bins) == ((60, 6) if family == "bert" else (180, 18))


def hide(trunk: Language, codes: Tensor, lengths: Tensor, hidden: Tensor) -> State:
    """The first state, with the mask token in the place of the tokens ``hidden`` ``(batch, tokens)``."""
    state, words = trunk.encode(codes, lengths), trunk.stages["embeddings"].tokeniser.vocabulary
    given = torch.where(hidden, words.ids["[MASK]"], -1)
    return replace(state, skips={**state.skips, HIDDEN: given[:, None]})


def logits_of(trunk: Language, state: State) -> Tensor:
    """``(batch, tokens, vocabulary)`` of the state before the last stage."""
    norm, x = trunk.stages["final"].norm, state.x.transpose(1, 2)
    assert trunk.lm is not None
    logits: Tensor = trunk.lm(x if norm is None else norm(x))
    return logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [("bert", {}), ("bert", {"tie_word_embeddings": False}), ("esm", {}), ("esm", {"token_dropout": False})],
)
def test_masked_tokens_are_predicted_as_by_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In our order of the vocabulary; ESM scales by how many tokens are masked, which differs between sequences."""
    monkeypatch.setitem(CONFIGS, family, CONFIGS[family] | changes)
    theirs = checkpoint(tmp_path, family, "ForMaskedLM")
    loaded = load_language(tmp_path)
    trunk = loaded.trunk
    assert isinstance(trunk, Language)
    codes, lengths = batch(30, 30)
    ids = torch.tensor(
        [[VOCABULARIES[family].index(p) for p in pieces_of(decode(row.numpy()), family)] for row in codes]
    )
    hidden = torch.zeros(ids.shape, dtype=torch.bool)
    hidden[0, 2] = hidden[1, 3:6] = True
    names = ["[MASK]", "<mask>"]
    mask = next(i for i, word in enumerate(VOCABULARIES[family]) if word in names)
    expected = theirs(input_ids=ids.masked_fill(hidden, mask)).logits
    found = logits_of(trunk, trunk.run(hide(trunk, codes, lengths, hidden), stop="final"))[:, : ids.shape[1]]
    ours = trunk.stages["embeddings"].tokeniser.vocabulary.ids
    words = [*pieces("overlapping" if family == "bert" else "blocks", 3), "[MASK]"]
    rows = [mask if word == "[MASK]" else VOCABULARIES[family].index(word) for word in words]
    difference = found[..., [ours[word] for word in words]] - expected[..., rows]
    assert float(difference.abs().max()) <= 1e-5
    computed = ("cls.predictions.bias", "esm.contact_head.")  # the first is not used if nothing is shared
    assert all(name.startswith(computed) for name in loaded.report.left)


# ---- published code's numbers ----

PUBLISHED = {"mosaic": "dnabert2_parity", "esm_rotary": "nucleotide_transformer2_parity"}


def published(folder: Path, family: str, **config: Any) -> dict[str, Any]:
    """The published code's answers, and a checkpoint folder of its weights as the hub has them."""
    with np.load(Path(__file__).parent / "data" / f"{PUBLISHED[family]}.npz") as file:
        found = dict(file)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(json.loads(str(found["config"])) | config))
    weights = {
        name.partition("/")[2]: torch.from_numpy(value) for name, value in found.items() if name.startswith("weights/")
    }
    save_file(weights, folder / "model.safetensors")
    if family == "mosaic":
        special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]", "model_max_length": 32}
        (folder / "tokenizer.json").write_text(str(found["tokenizer"]))
        (folder / "tokenizer_config.json").write_text(json.dumps(special))
    else:
        (folder / "vocab.txt").write_text("\n".join(found["vocabulary"]))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": None, "model_max_length": 64}))
    return found


def as_codes(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(text) for text in texts])
    codes = torch.full((len(texts), int(lengths.max())), PAD, dtype=torch.uint8)
    for row, text in zip(codes, texts, strict=True):
        row[: len(text)] = torch.from_numpy(encode(text))
    return codes, lengths


@torch.no_grad()
@pytest.mark.parametrize("family", PUBLISHED)
def test_hidden_states_are_those_of_published_code(tmp_path: Path, family: str) -> None:
    """After every layer, with padding, an N and hidden tokens; and the logits of the head for masked tokens."""
    content = published(tmp_path, family)
    loaded = load_language(tmp_path, bin_size=10)
    trunk = loaded.trunk
    assert isinstance(trunk, Language)
    assert trunk.settings["family"] == family
    codes, lengths = as_codes([str(text) for text in content["sequences"]])
    mask, states = torch.from_numpy(content["mask"]).bool(), torch.from_numpy(content["states"])
    state = hide(trunk, codes, lengths, torch.from_numpy(content["ids"]) == (4 if family == "mosaic" else 2))
    width = mask.shape[1]
    for stage, expected in zip(["embeddings", "layer_0", "layer_1"], states, strict=True):
        state = trunk.stages[stage](state)
        found = state.x.transpose(1, 2)
        if stage == "layer_1" and (norm := trunk.stages["final"].norm) is not None:
            found = norm(found)
        assert state.valid is not None
        assert torch.equal(state.valid[:, :width], mask)
        assert float((found[:, :width] - expected)[mask].abs().max()) <= 1e-5, stage
    logits = logits_of(trunk, state)[:, :width]
    ours = trunk.stages["embeddings"].tokeniser.vocabulary.ids
    theirs = list(ours) if family == "mosaic" else [str(word) for word in content["vocabulary"]]
    words = [word for word in ours if word in theirs]
    assert len(words) >= (48 if family == "mosaic" else 64 + 5)
    expected = torch.from_numpy(content["logits"])[..., [theirs.index(word) for word in words]]
    assert float((logits[..., [ours[word] for word in words]] - expected)[mask].abs().max()) <= 1e-5
    assert trunk(codes, lengths).x.shape == (3, 24, 7)
    computed = () if family == "mosaic" else ("position_embeddings.weight", "inv_freq")
    assert all(name.endswith(computed) for name in loaded.report.left)
    assert len(loaded.report.matched) == len(trunk.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("family", PUBLISHED)
def test_computed_positions_have_no_end(tmp_path: Path, family: str) -> None:
    """Inputs longer than the ``positions`` of training; what a model folder says is enough to build it again."""
    published(tmp_path / "saved", family, max_position_embeddings=18)
    loaded = load_published(str(tmp_path / "saved"))
    assert loaded.trunk.settings["positions"] == (18 if family == "mosaic" else 16)
    codes, lengths = batch(400, 300)
    expected = loaded.trunk(codes, lengths).x
    assert torch.isfinite(expected).all()
    convert_published(loaded, tmp_path / "model", name="dna", licence="", source="here")
    settings = json.loads((tmp_path / "model" / "model.json").read_text())["settings"]
    again = Language.build(settings, bin_size=16, crop=0).eval()
    tensors = load_file(tmp_path / "model" / "weights.safetensors")
    again.load_state_dict({name.removeprefix("trunk."): tensor for name, tensor in tensors.items()})
    assert torch.equal(again(codes, lengths).x, expected)


def test_slopes_of_alibi() -> None:
    """As Press et al. 2022 give for 8 heads, and for numbers between powers of two, such as DNABERT-2's 12."""
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(12) == (*alibi_slopes(8), *(2.0 ** -(i - 0.5) for i in range(1, 5)))
    assert alibi_slopes(1) == (2.0**-8,)


def test_fused_layers_of_an_unknown_shape_are_refused(tmp_path: Path) -> None:
    published(tmp_path, "mosaic")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.Wqkv.weight"
    save_file(tensors | {name: tensors[name][:48].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"misshapen.*Wqkv.*\(72, 24\)"):
        load_language(tmp_path)


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_vocabulary_larger_than_its_table_is_refused(tmp_path: Path, family: str) -> None:
    published(tmp_path, family, vocab_size=40)
    with pytest.raises(ModelError, match="the table has 40 rows, and the vocabulary a token with the id"):
        load_language(tmp_path)


def test_special_tokens_are_those_of_the_text(tmp_path: Path) -> None:
    published(tmp_path, "mosaic")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "[UNK]", "pad_token": "[SEP]"}))
    with pytest.raises(ModelError, match="special tokens have other names than usual"):
        load_language(tmp_path)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("", "need the text of a tokenizer.json"),
        ("{}", "cannot be read"),
        (byte_pairs().replace('"[MASK]"', '"[OTHER]"'), r"lack a special one.*\[MASK\]"),
        (byte_pairs().replace('"TATAA":28', '"TATAA":30'), "ids of the tokens have gaps"),
    ],
)
def test_texts_that_are_no_byte_pairs(tokenizer: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tiny_language(**{**MOSAIC, "tokenizer": tokenizer})
    with pytest.raises(ModelError, match="no other tokens"):
        tiny_language(tokenizer=byte_pairs())


def test_licences_of_published_weights_are_those_that_are_stated() -> None:
    assert licence_of("zhihan1996/DNABERT-2-117M") == "Apache-2.0"
    assert licence_of("InstaDeepAI/nucleotide-transformer-v2-50m-multi-species") == "CC-BY-NC-SA-4.0"
    assert licence_of("gagneurlab/SpeciesLM") == "MIT"
    assert licence_of("zhihan1996/DNA_bert_6").startswith("not stated")


@torch.no_grad()
def test_a_species_is_a_token_of_its_own(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "saved", "bert", species=("yeast_one", "yeast_two"))
    codes, lengths = batch(30)
    words = [*VOCABULARIES["bert"], "yeast_one", "yeast_two"]
    pieces = pieces_of(decode(codes[0].numpy()), "bert")
    ids = torch.tensor([[words.index(piece) for piece in (pieces[0], "yeast_two", *pieces[1:])]])
    trunk = load_language(tmp_path / "saved", species="yeast_two").trunk
    found = trunk.run(trunk.encode(codes, lengths), stop="final")
    expected = theirs(input_ids=ids).last_hidden_state[0]
    assert torch.allclose(found.x[0].T[: len(expected)], expected, atol=1e-6)
    for species in (None, "yeast"):
        with pytest.raises(ConfigError, match="species"):
            load_language(tmp_path / "saved", species=species)


def test_convert_takes_a_species(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "saved", "bert", species=("yeast_one", "yeast_two"))
    monkeypatch.setattr("seqgraft.card._SHOWN", (LinearProbe(),))  # to save time
    convert = ["convert", str(tmp_path / "saved"), str(tmp_path / "model"), "--name", "tiny", "--species"]
    runner = CliRunner()
    wrong = runner.invoke(app, [*convert, "yeast"])
    assert isinstance(wrong.exception, ConfigError)
    assert "yeast_one" in str(wrong.exception)
    assert runner.invoke(app, [*convert, "yeast_two"], catch_exceptions=False).exit_code == 0
    assert read_model(tmp_path / "model").content["settings"]["species"] == "yeast_two"


def test_export_of_a_run_on_labels_is_its_merged_trunk(tmp_path: Path) -> None:
    data = tiny_labels(tmp_path / "data")
    settings = {**BLOCKS, "channels": 8, "heads": 2}
    model = ModelConfig("language", settings=settings)
    train = TrainConfig(epochs=1, batch_size=12, lr=0.05)
    experiment = Experiment(data.folder, model, LoRA(rank=2, where=("attention",)), train=train)
    fit_run(experiment, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "model", name="grown", licence="MIT")
    content = read_model(tmp_path / "model").content
    assert (content["heads"], content["tracks"]) == ({}, [])
    assert content["window"] == content["bin_size"] == data.lengths.max()
    assert not (tmp_path / "model" / "trained_on.bed").exists()
    card = (tmp_path / "model" / "card.md").read_text()
    assert "heads are not part of it" in card
    assert "no places in a genome" in card
    fitted, grown = (
        open_run(tmp_path / "run").model,
        build_model(ModelConfig(str(tmp_path / "model")), data.tracks, data.info),
    )
    merge(fitted)
    for name, tensor in fitted.trunk.state_dict().items():
        assert torch.equal(tensor, grown.trunk.state_dict()[name]), name
    again = replace(experiment, model=ModelConfig(str(tmp_path / "model")), adapter=LinearProbe())
    assert plan_run(again).would_start


def test_a_copy_is_built_from_its_settings_alone(tmp_path: Path) -> None:
    """No file of the vocabulary is needed once the weights are read."""
    checkpoint(tmp_path / "saved", "esm")
    trunk = load_language(tmp_path / "saved").trunk
    settings = json.loads(json.dumps(dict(trunk.settings)))
    again = Language.build(settings, bin_size=16, crop=0).eval()
    again.load_state_dict(trunk.state_dict())
    codes, lengths = batch(*LENGTHS)
    assert torch.equal(again(codes, lengths).x, trunk(codes, lengths).x)


def test_a_checkpoint_is_a_model_name(tmp_path: Path, labels: Dataset, coverage: Dataset) -> None:
    """As a hub id is: converted into a model folder without heads, good for labels and for bins of any size."""
    checkpoint(tmp_path / "saved", "esm")
    loaded = load_published(str(tmp_path / "saved"))
    folder = tmp_path / "model"
    convert_published(loaded, folder, name="dna", licence="", source="here")
    config = ModelConfig(name=str(folder))
    codes, lengths = batch(48)
    expected = loaded.trunk(codes, lengths).x
    for dataset in (labels, coverage):
        info = replace(dataset.info, bin_size=dataset.info.bin_size if dataset is labels else 8, window=256)
        info = info if dataset is labels else replace(info, bins=28)
        model = build_model(config, dataset.tracks, info).eval()
        found = model.trunk.run(model.trunk.encode(codes, lengths), stop="crop").x
        assert torch.allclose(found.mean(-1), expected.mean(-1), atol=1e-5)
        assert model.trunk.spec.bin_size == (0 if dataset is labels else 8)
        assert build_pretrained(config, info) is None
    with pytest.raises(ModelError, match="no heads"):
        load_language(tmp_path / "saved", tracks={"": coverage.tracks})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.layer.1.output.dense.bias"), "missing"),
        (lambda t: t.update({"encoder.layer.2.output.dense.bias": torch.zeros(16)}), "unexpected"),
        (lambda t: t.update({"embeddings.word_embeddings.weight": torch.zeros(9, 16)}), "misshapen"),
    ],
)
def test_tensors_are_checked(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint(tmp_path, "bert")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"do not fit.*'{message}': \['"):
        load_language(tmp_path)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("esm", {"position_embedding_type": "rotary"}, "position_embedding_type is not supported"),
        ("bert", {"hidden_act": "relu"}, "hidden_act is not supported"),
        ("bert", {"model_type": "roberta"}, "another model"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path: Path, family: str, config: dict[str, Any], message: str) -> None:
    checkpoint(tmp_path, family)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | config))
    with pytest.raises(ModelError, match=message):
        load_language(tmp_path)


def test_a_vocabulary_is_needed(tmp_path: Path) -> None:
    checkpoint(tmp_path, "bert")
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ModelError, match="no vocabulary"):
        load_language(tmp_path)


def test_transformers_is_loaded_with_a_checkpoint_only() -> None:
    probe = "import sys, seqgraft.models.hub_language as m; m.Language(); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


# ---- tokens, bins, padding ----

TRUNKS: dict[str, dict[str, Any]] = {"overlapping": {}, "blocks": BLOCKS, "byte_pairs": MOSAIC, "rotary": ROTARY}


def language(tokens: str, **settings: Any) -> Language:
    return tiny_language(1, **{"crop": 0, **TRUNKS[tokens], **settings}).eval()


@torch.no_grad()
@pytest.mark.parametrize("tokens", TRUNKS)
@pytest.mark.parametrize("lengths", [(64, 50, 5), (200, 16, 17), (7, 100, 99)])
def test_a_batch_gives_what_each_sequence_gives_alone(tokens: str, lengths: tuple[int, ...]) -> None:
    trunk = language(tokens)
    codes, sizes = batch(*lengths)
    codes[0, 5] = 4
    together = trunk(codes, sizes)
    for row, length in enumerate(lengths):
        alone = trunk(codes[row : row + 1, :length], sizes[row : row + 1])
        bins = -(-length // 16)
        assert int(together.valid[row].sum()) == bins == alone.x.shape[-1]  # type: ignore[index]
        assert torch.allclose(together.x[row, :, :bins], alone.x[0], atol=1e-5)
        assert torch.allclose(mean_of_valid(together)[row], mean_of_valid(alone)[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bin_size", [1, 5, 16])
def test_bins_are_means_of_the_tokens_over_them(bin_size: int) -> None:
    """Base by base, with an N between blocks of four."""
    trunk = language("blocks", bin_size=bin_size)
    codes, lengths = batch(80)
    codes[0, 21] = 4
    state = trunk.run(trunk.encode(codes, lengths), stop="final")
    norm = trunk.stages["final"].norm
    assert norm is not None
    hidden = norm(state.x.transpose(1, 2))[0]
    spans = [(4 * i, 4 * i + 4) for i in range(5)] + [(20, 21), (21, 22)]
    spans += [(22 + 4 * i, 26 + 4 * i) for i in range(14)] + [(78, 79), (79, 80)]
    bases = torch.cat([hidden[i + 1].expand(stop - start, -1) for i, (start, stop) in enumerate(spans)])
    expected = functional.avg_pool1d(bases.T[None], bin_size)[0]
    assert torch.allclose(trunk(codes, lengths).x[0], expected, atol=1e-5)


def test_sequences_that_do_not_fit_are_refused() -> None:
    trunk = language("overlapping", positions=66)
    assert trunk(*batch(66)).x.shape[-1] == 5
    for length in (67, 2):
        with pytest.raises(DataError, match="bases that no token stands for"):
            trunk(*batch(length))


@pytest.mark.parametrize(
    "settings", [{"family": "gpt"}, {"tokens": "pairs"}, {"heads": 3}, {"k": 0}, {"bin_size": -1}, {"depth": 0}]
)
def test_trunks_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="language"):
        tiny_language(**settings)


# ---- what follows from the chain ----


def model_of(trunk: Trunk, dataset: Dataset) -> SequenceModel:
    pool = "mean" if dataset.info.bins == 1 else "none"
    heads = {
        f"new_{group}": Head(dataset.tracks.select([dataset.tracks.names[i] for i in index]), trunk.spec.channels, pool)
        for group, index in dataset.tracks.groups.items()
    }
    return SequenceModel(trunk, heads, dataset.tracks)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_labels(tmp_path_factory.mktemp("labels") / "data")


@pytest.fixture(scope="module")
def coverage(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_coverage(tmp_path_factory.mktemp("coverage") / "data")


@pytest.mark.parametrize("tokens", TRUNKS)
def test_lora_starts_as_the_identity_and_merges(labels: Dataset, tokens: str) -> None:
    model = model_of(language(tokens, dropout=0.0), labels).eval()
    sample = labels.sample([0, 1, 2])
    with torch.no_grad():
        before = model(sample)
        adapt(model, LoRA(rank=2, where=("attention", "feedforward")))
        assert torch.equal(model(sample), before)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        adapted = model.eval()(sample)
        assert not torch.allclose(adapted, before, atol=1e-3)
        merge(model)
        assert torch.allclose(model(sample), adapted, atol=1e-5)


@pytest.mark.parametrize("adapter", [IA3(), Houlsby(bottleneck=4)], ids=["ia3", "houlsby"])
def test_other_adapters_find_their_sites(labels: Dataset, adapter: Any) -> None:
    model = model_of(language("blocks"), labels).eval()
    sample = labels.sample([0, 1, 2])
    with torch.no_grad():
        before = model(sample)
        adapt(model, adapter)
        assert torch.equal(model.eval()(sample), before)
    with pytest.raises(ModelError, match="no module at the site"):
        adapt(model_of(language("blocks"), labels), LoRA(where=("conv",)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("adapter", "settings"),
    [(LinearProbe(), {"k": 1}), (LoRA(rank=2), {"k": 1, "before": 5}), (LoRA(rank=2), BLOCKS), (LinearProbe(), MOSAIC)],
    ids=["whole trunk", "embeddings", "embeddings of blocks", "whole trunk of byte pairs"],
)
def test_the_cache_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Any, settings: dict[str, Any]
) -> None:
    """Half as many bases have more than half as many tokens, because of the special ones."""
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    short = tiny_labels(tmp_path / "data", rows=18, lengths=(12, 32))
    model = model_of(tiny_language(1, crop=0, **settings), short)
    adapt(model, adapter)
    model.eval()
    config = TrainConfig(cache="float32")
    choice = cache_choice(model, short, config, short.rows("train"), short.rows("valid"))
    cache = ActivationCache.open(model, short, choice, "float32", config.augment)
    for rows in ([8], [0, 1], [2, 3, 4], [8]):
        sample = short.sample(rows)
        attached = cache.attach(sample)
        assert attached.halfway is not None
        assert torch.allclose(model(attached), model(sample), atol=1e-5)
    assert cache.filled == 6


def test_states_of_byte_pairs_are_not_stored(tmp_path: Path, labels: Dataset) -> None:
    """Sequences of one length have different numbers of tokens: only what follows the last stage has one size."""
    model = model_of(tiny_language(crop=0, **MOSAIC), labels)
    adapt(model, LinearProbe())
    model.trunk.stages["layer_1"].requires_grad_(True)
    config = TrainConfig(cache="float32")
    choice = cache_choice(model, labels, config, labels.rows("train"), labels.rows("valid"))
    assert choice.cut is None
    assert "different sizes" in choice.reason


def test_the_head_for_masked_tokens_is_no_part_of_the_rest(labels: Dataset) -> None:
    """Nothing reads it: it neither trains nor has sites, and is in the weights all the same."""
    model = model_of(language("blocks", lm_head=True), labels)
    adapt(model, FullFineTune())
    assert not any("lm." in name for names in model.trunk.spec.sites.values() for name in names)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "trunk.stages.layer_0.query.weight" in trains
    assert not any(".lm." in name for name in trains)
    assert "trunk.lm.decoder.weight" in model.state_dict()


@torch.no_grad()
def test_variants_are_computed_whole_and_right(coverage: Dataset) -> None:
    """Of 3-mers between two special tokens there are as many as bases: edits must not be taken for those of tokens."""
    model = model_of(language("overlapping", crop=2), coverage).eval()
    codes = coverage.sample([0]).codes
    edited = codes.clone()
    edited[0, 100] = (edited[0, 100] + 1) % 4
    local = Recompute(model)
    found = local.predict(local.reference(codes[0]), edited)
    lengths = torch.tensor([codes.shape[1]])
    empty = torch.zeros(1, len(coverage.tracks), 1)
    expected = model.predict(Sample(edited, lengths, torch.zeros(1, dtype=torch.int64), empty, empty > 0))
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_needs_bases_says_so(coverage: Dataset) -> None:
    model = model_of(language("overlapping", crop=2), coverage)
    with pytest.raises(ModelError, match="no gradient by the bases"):
        model.trunk.run(replace(state := model.trunk.encode(batch(64)[0]), x=state.x.requires_grad_()))
    samples = [coverage.sample(rows) for rows in ([0], [0, 0])]
    assert bytes_without_computing(model, Elementwise(model.tracks), samples, "float32") is None
