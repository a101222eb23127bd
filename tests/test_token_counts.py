"""Tokens of a dataset: counted as one sequence at a time would be, refused before training, and what labels see."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from builders import BLOCKS, LANGUAGE, SETTINGS, tiny_coverage, tiny_labels, tiny_language
from seqgraft.apply import embed_run, predict_run
from seqgraft.data.augment import FORWARD, Augmentation
from seqgraft.data.dataset import Dataset, DatasetInfo, open_dataset, write_dataset
from seqgraft.errors import ConfigError, DataError
from seqgraft.experiment import Experiment, parse_experiment
from seqgraft.genome import Genome
from seqgraft.models.base import mean_of_valid
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.plan import plan_run
from seqgraft.predict import FORWARD_ONLY, embed
from seqgraft.report import write_report
from seqgraft.run import evaluate_run, fit_run
from seqgraft.sequence import PAD, encode
from seqgraft.token_counts import TokenCounts, count_tokens
from seqgraft.tracks import TrackTable

BOTH = Augmentation(reverse_complement=True, shift=0)


def sequences(folder: Path, texts: list[str], folds: list[str]) -> Dataset:
    """Labels 0 and 1 in turn of stored sequences."""
    codes = np.full((len(texts), max(map(len, texts))), PAD, dtype=np.uint8)
    for row, text in enumerate(texts):
        codes[row, : len(text)] = encode(text)
    with write_dataset(folder, (len(texts), 1, 1)) as writer:
        writer.targets[:, 0, 0] = np.arange(len(texts)) % 2
        names = [f"s{i}" for i in range(len(texts))]
        writer.finish(
            DatasetInfo("labelled", 0, 1, 1),
            pd.DataFrame({"chrom": "", "start": 0, "end": 0, "strand": ".", "name": names, "fold": folds}),
            TrackTable.build([{"name": "label", "link": "sigmoid"}]),
            codes=codes,
            lengths=np.array([len(text) for text in texts]),
        )
    return open_dataset(folder)


def random_texts(count: int, low: int, high: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), rng.integers(low, high + 1))) for _ in range(count)]


def counted(dataset: Dataset, unknown: float = 1.0, augment: Augmentation = BOTH, **settings: Any) -> TokenCounts:
    folds = {fold: (dataset.rows(fold), augment) for fold in sorted(set(dataset.regions["fold"]))}
    return count_tokens(tiny_language(crop=0, **settings), dataset, folds, unknown)


def experiment(data: Path, model: dict[str, Any] | None = None, **sections: Any) -> Experiment:
    model = model or {"name": "language", "settings": {**LANGUAGE, "depth": 1}}
    train = {"epochs": 1, "batch_size": 4, **sections.pop("train", {})}
    evaluate = {"draws": 20, "baselines": [], **sections.pop("evaluate", {})}
    return parse_experiment({"data": str(data), "model": model, "train": train, "evaluate": evaluate, **sections})


# ---- counts ----


def test_counts_are_those_of_one_sequence_after_the_other(tmp_path: Path) -> None:
    """3-mers of at most 20 tokens, two of them special, by a loop over strings."""
    texts = random_texts(40, 5, 30)
    texts[3], texts[7] = texts[3][:2] + "N" + texts[3][3:], "ACGNNACGTACGTAC"
    data = sequences(tmp_path / "data", texts, ["train", "valid"] * 20)
    found = counted(data, positions=20, truncate=True)
    assert not found.problems.found
    for fold, offset in (("train", 0), ("valid", 1)):
        chosen = texts[offset::2]
        kept = [[text[i : i + 3] for i in range(len(text) - 2)][:18] for text in chosen]
        cut = [len(text) - (len(words) + 2) for text, words in zip(chosen, kept, strict=True)]
        of = found.folds[fold]
        assert (of.rows, of.bases) == (20, sum(map(len, chosen)))
        assert of.tokens == sum(map(len, kept))
        assert of.unknown == sum("N" in word for words in kept for word in words)
        assert (of.truncated, of.truncated_rows) == (sum(cut), sum(c > 0 for c in cut))
        assert (of.median, of.most) == (np.median([len(w) + 2 for w in kept]), max(len(w) + 2 for w in kept))
    assert found.folds["valid"].unknown > 3
    assert found.folds["train"].truncated > 0
    assert "at most 20 of the 20 that the model takes" in found.facts["tokens"]
    assert json.loads(json.dumps(found.record()))["folds"]["train"]["truncated"] == found.folds["train"].truncated


def test_a_model_of_bases_has_no_tokens(tmp_path: Path) -> None:
    data = tiny_labels(tmp_path / "data")
    trunk = build_model(ModelConfig(settings=SETTINGS), data.tracks, data.info).trunk
    found = count_tokens(trunk, data, {"train": (data.rows("train"), BOTH)}, 0.0)
    assert (found.facts, found.problems.found) == ({}, [])


# ---- refusals, before training ----


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    texts = ["ACGT" * 5, "AC", "ACGT" * 6, "ACGTA", "ACGNTACGTA", "ACGTACG"]
    data = sequences(tmp_path / "data", texts, ["train", "train", "train", "valid", "valid", "valid"])
    found = counted(data, 0.01, positions=20)  # 18 3-mers: 20 bp
    with pytest.raises(DataError) as raised:
        found.problems.raise_if_any()
    short, long, unknown = str(raised.value).splitlines()[1:]
    assert (
        "fold 'train': 1 of 3 sequences are too short for a token; the bases of the shortest, row 1 (s1): 2." in short
    )
    assert "fold 'train': 1 of 3 sequences have bases that no token" in long
    assert "those of the longest, row 2 (s2) of 24 bp: 4. The model takes up to 20 bp. Set model.truncate: true" in long
    assert "fold 'valid': 3 of 16 tokens are not in the model's vocabulary, 3 of them in row 4 (s4)" in unknown
    assert "model.unknown allows 0.01, and this is: 0.1875." in unknown
    assert [str(problem) for problem in counted(data, 0.19, positions=20, truncate=True).problems.found] == [short[4:]]


@pytest.mark.parametrize("settings", [{}, BLOCKS], ids=["3-mers", "blocks"])
def test_what_passes_trains(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Sequences of exactly the length that fits, with N as far as they are allowed, in every view."""
    texts = [text[:30] + "N" + text[31:] for text in random_texts(12, 60, 60)]
    data = sequences(tmp_path / "data", texts, ["train"] * 8 + ["valid"] * 2 + ["test"] * 2)
    unlimited = counted(data, **settings)
    fitting = {**LANGUAGE, **settings, "positions": max(fold.most for fold in unlimited.folds.values()), "depth": 1}
    planned = experiment(data.folder, {"name": "language", "settings": fitting, "unknown": 0.1})
    assert plan_run(planned).problems == []
    fit_run(planned, tmp_path / "run")
    tight = replace(planned, model=replace(planned.model, settings={**fitting, "positions": fitting["positions"] - 1}))
    found = plan_run(tight)
    assert [type(problem) for problem in found.problems] == [DataError] * 3
    assert "train" in found.facts["truncated bases"]
    with pytest.raises(DataError, match="3 problems were found"):
        fit_run(tight, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_every_shift_is_looked_at(tmp_path: Path) -> None:
    """Four bases to the right stands an N, so that a shift breaks a block in two: more tokens than the window has."""
    (tmp_path / "genome.fa").write_text(f">chr1\n{'ACGT' * 20}{'N' * 8}{'ACGT' * 20}\n")
    genome = Genome.open(tmp_path / "genome.fa")
    with write_dataset(tmp_path / "data", (1, 1, 1)) as writer:
        region = {"chrom": ["chr1"], "start": [16], "end": [80], "strand": ["+"], "name": ["."], "fold": ["train"]}
        info = DatasetInfo("labelled", 64, 1, 64, {"path": str(genome.path), "hash": genome.hash})
        writer.finish(info, pd.DataFrame(region), TrackTable.build([{"name": "a", "link": "sigmoid"}]))
    data = open_dataset(tmp_path / "data")
    fits = {**BLOCKS, "positions": 1 + 16}
    assert not counted(data, augment=FORWARD_ONLY, **fits).problems.found
    found = counted(data, augment=Augmentation(reverse_complement=False, shift=3), **fits).problems.found
    assert len(found) == 1
    assert "row 0 (chr1:16-80)" in str(found[0])


def test_truncating_is_counted_everywhere(tmp_path: Path) -> None:
    """In the plan, in environment.json and in the report; the longer sequences are read as their first bases."""
    texts = random_texts(16, 20, 60)
    data = sequences(tmp_path / "data", texts, ["train"] * 10 + ["valid"] * 3 + ["test"] * 3)
    small = {"name": "language", "settings": {**LANGUAGE, "depth": 1, "positions": 40}}
    assert not plan_run(experiment(data.folder, small)).would_start
    planned = experiment(data.folder, {**small, "truncate": True})
    lost = sum(max(0, len(text) - 40) for text in texts[:10])
    assert f"train {lost} of {sum(map(len, texts[:10]))}, in " in plan_run(planned).facts["truncated bases"]
    run = tmp_path / "run"
    fit_run(planned, run)
    recorded = json.loads((run / "environment.json").read_text())["tokens"]
    assert recorded["folds"]["train"]["truncated"] == lost
    evaluate_run(run)
    page = write_report(run).read_text()
    assert f"train {lost} of" in page
    pd.DataFrame({"sequence": [texts[0], "A" * 100]}).to_csv(tmp_path / "new.csv", index=False)
    predict_run(run, tmp_path / "new.csv", tmp_path / "out.csv")
    assert len(pd.read_csv(tmp_path / "out.csv")) == 2


def test_predicting_names_the_sequence_that_does_not_fit(tmp_path: Path) -> None:
    data = sequences(tmp_path / "data", random_texts(10, 20, 38), ["train"] * 6 + ["valid"] * 2 + ["test"] * 2)
    small = {"name": "language", "settings": {**LANGUAGE, "depth": 1, "positions": 40}}
    fit_run(experiment(data.folder, small), tmp_path / "run")
    table = tmp_path / "new.csv"
    pd.DataFrame({"name": ["one", "two"], "sequence": ["ACGT" * 5, "A" * 100]}).to_csv(table, index=False)
    for run, out in ((predict_run, "out.csv"), (embed_run, "out.parquet")):
        with pytest.raises(DataError, match=r"1 of 2 sequences have bases .* row 1 \(two\) of 100 bp: 60"):
            run(tmp_path / "run", table, tmp_path / out)
        assert not (tmp_path / out).exists()


# ---- a checkpoint, by the path of its folder ----


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What transformers saves of a tiny BERT on 3-mers, with tokens for two species."""
    import transformers

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map("".join, product("ATCG", repeat=3)),
        "yeast_a",
        "yeast_b",
    ]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=100, **sizes)
    model = transformers.BertModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "vocab.txt").write_text("\n".join(words))
    return tmp_path / "saved"


def test_species_from_the_settings_to_the_record(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    data = sequences(tmp_path / "data", random_texts(12, 20, 40), ["train"] * 8 + ["valid"] * 2 + ["test"] * 2)
    for species, message in ((None, "needs the token of a species"), ("yeast_c", "'yeast_c'. Known: yeast_b, yeast_a")):
        (problem,) = plan_run(experiment(data.folder, {"name": str(checkpoint), "species": species})).problems
        assert isinstance(problem, ConfigError)
        assert message in str(problem)
    found = {}
    for species in ("yeast_a", "yeast_b"):
        planned = experiment(data.folder, {"name": str(checkpoint), "species": species}, train={"cache": "float32"})
        assert f"species {species}" in plan_run(planned).facts["model"]
        run = tmp_path / species
        fit_run(planned, run)
        environment = json.loads((run / "environment.json").read_text())
        assert environment["model"]["species"] == species
        evaluate_run(run)
        assert species in write_report(run).read_text()
        model = build_model(planned.model, data.tracks, data.info).eval()
        found[species] = embed(model, data, np.arange(4))
    assert len(list((tmp_path / "cache" / "models" / "folders").iterdir())) == 2
    assert len(list((tmp_path / "cache" / "activations").glob("*/manifest.json"))) == 2
    assert np.abs(found["yeast_a"] - found["yeast_b"]).max() > 1e-3
    (checkpoint / "vocab.txt").write_text((checkpoint / "vocab.txt").read_text().replace("yeast_a", "yeast_d"))
    assert plan_run(experiment(data.folder, {"name": str(checkpoint), "species": "yeast_d"})).would_start
    converted = str(next((tmp_path / "cache" / "models" / "folders").glob("*-yeast_b")))
    assert plan_run(experiment(data.folder, {"name": converted})).would_start
    (problem,) = plan_run(experiment(data.folder, {"name": converted, "species": "yeast_a"})).problems
    assert "'yeast_a'. It was made for yeast_b" in str(problem)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "convnet", "truncate": True}, "reads bases and no tokens"),
        ({"name": "convnet", "species": "yeast"}, "no token for the species"),
        ({"name": "language", "species": "yeast"}, "no token for the species"),
        ({"name": "language", "settings": {"truncate": True}}, "model.truncate"),
        ({"name": "language", "settings": {"species": "yeast"}}, "model.species"),
    ],
)
def test_settings_of_tokens_without_tokens(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    data = sequences(tmp_path / "data", ["ACGTACGT"] * 3, ["train", "valid", "test"])
    (problem,) = plan_run(experiment(data.folder, model)).problems
    assert isinstance(problem, ConfigError)
    assert message in str(problem)


def test_unknown_is_a_share() -> None:
    with pytest.raises(ConfigError, match="must be a share"):
        ModelConfig(unknown=1.5)


# ---- what labels see ----


def slow_mean(states: Tensor, spans: list[tuple[int, int]], length: int) -> Tensor:
    """Each base the mean of the states of the tokens over it, and the mean of the bases that have one."""
    bases = [
        torch.stack([state for state, (start, stop) in zip(states, spans, strict=True) if start <= base < stop]).mean(0)
        for base in range(length)
        if any(start <= base < stop for start, stop in spans)
    ]
    return torch.stack(bases).mean(0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["3-mers", "blocks", "truncated"])
def test_an_embedding_is_the_mean_over_the_bases(tmp_path: Path, kind: str) -> None:
    """Whatever the batch and its padding, to 1e-6; 16 divides none of the lengths, and each base counts the same."""
    settings = {"3-mers": {}, "blocks": BLOCKS, "truncated": {"positions": 22, "truncate": True}}[kind]
    texts = [*random_texts(6, 17, 43), "ACGTACG", "ACGTA"]
    data = sequences(tmp_path / "data", texts, ["train"] * 8)
    own = {**LANGUAGE, **settings}
    config = ModelConfig(
        "language", settings={k: v for k, v in own.items() if k != "truncate"}, truncate="truncate" in own
    )
    model = build_model(config, data.tracks, data.info).eval()
    for table in (m for m in model.trunk.modules() if isinstance(m, torch.nn.Embedding)):
        torch.nn.init.normal_(table.weight, std=0.5)
    one, several = (embed(model, data, np.arange(8), batch_size=size) for size in (1, 8))
    assert np.abs(one - several).max() <= 1e-6
    for row, text in enumerate(texts):
        sample = data.sample([row], [FORWARD])
        state = model.trunk.run(model.trunk.encode(sample.codes, sample.lengths), stop="final")
        norm = model.trunk.stages["final"].norm
        states = state.x[0].T if norm is None else norm(state.x[0].T)  # type: ignore[operator]
        if kind == "blocks":
            whole = len(text) // 4 * 4
            spans = [(i, i + 4) for i in range(0, whole, 4)] + [(i, i + 1) for i in range(whole, len(text))]
        else:
            spans = [(i, i + 3) for i in range(len(text) - 2)][: 20 if kind == "truncated" else None]
        expected = slow_mean(states[1 : 1 + len(spans)], spans, len(text))
        assert np.abs(one[row] - expected.numpy()).max() <= 1e-6, text
    state = model.trunk(*(getattr(data.sample(np.arange(8)), name) for name in ("codes", "lengths")))
    assert np.allclose(mean_of_valid(state)[:, :, 0].numpy(), several, atol=1e-6)


def test_the_largest_of_the_bases(tmp_path: Path) -> None:
    """With pool: max there are bins to choose from, and bases without a token are none of them."""
    data = sequences(tmp_path / "data", random_texts(4, 30, 40), ["train"] * 4)
    settings = {**LANGUAGE, "positions": 22}
    trunk = build_model(
        ModelConfig("language", settings=settings, pool="max", truncate=True), data.tracks, data.info
    ).trunk
    sample = data.sample(np.arange(4))
    state = trunk(sample.codes, sample.lengths)
    assert state.x.shape[-1] == sample.codes.shape[1]
    assert state.valid is not None
    assert state.valid.sum(1).tolist() == [22] * 4


def test_bins_without_a_token_are_not_valid(tmp_path: Path) -> None:
    """Per-position tracks of windows that the model takes in part."""
    data = tiny_coverage(tmp_path / "data")
    settings = {**LANGUAGE, "positions": 100}
    trunk = build_model(ModelConfig("language", settings=settings, truncate=True), data.tracks, data.info).trunk.eval()
    sample = data.sample([0])
    state = trunk(sample.codes, sample.lengths)
    known = [i * 16 < 100 for i in range(2, 14)]  # of 256 bp, two bins are cropped at each end
    assert state.valid is not None
    assert state.valid[0].tolist() == known
    assert (state.x[0].abs().sum(0) > 0).tolist() == known
