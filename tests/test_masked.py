"""Masked tokens: which are hidden, what training on them reaches, how it is scored, and what it says of variants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders import BLOCKS, LANGUAGE, MOSAIC, ROTARY, tiny_labels
from guides import run_guide
from seqgraft import objectives
from seqgraft.adapters import FullFineTune, LoRA, adapt
from seqgraft.apply import attribute_run, embed_run, predict_run, score_model, score_run
from seqgraft.data import open_dataset, prepare_source
from seqgraft.data.dataset import Dataset
from seqgraft.data.folds import Folds
from seqgraft.data.windows import WindowSource
from seqgraft.errors import ConfigError, DataError, ModelError
from seqgraft.evaluate import compare_runs
from seqgraft.experiment import Experiment, parse_experiment, read_experiment
from seqgraft.export import export_run
from seqgraft.genome import Genome, Variant
from seqgraft.losses import MaskedTokens
from seqgraft.markov import Markov
from seqgraft.memory import FrozenBytes
from seqgraft.models.base import SequenceModel
from seqgraft.models.language import Language
from seqgraft.models.masked import HIDDEN, Hidden, MaskedHead, MaskedModel, mask_tokens, tokeniser_of
from seqgraft.models.weights import ModelConfig, build_masked
from seqgraft.objectives import MaskedTokens as MaskedObjective
from seqgraft.perplexity import METRICS, _unknown, evaluate_masked
from seqgraft.plan import plan_run
from seqgraft.predict import FORWARD_ONLY
from seqgraft.report import write_report
from seqgraft.run import build_run, evaluate_run, fit_run, open_run
from seqgraft.sample import Sample
from seqgraft.sequence import Codes, N, decode, encode, reverse_complement
from seqgraft.variants import Layout, VariantConfig
from seqgraft.variants.likelihood import LikelihoodScorer

SMALL: dict[str, Any] = {
    "family": "esm_rotary", "before": 0, "after": 0, "channels": 16, "depth": 1, "heads": 2, "hidden": 16,
    "embedding_norm": False, "dropout": 0.0, "attention_dropout": 0.0, "lm_head": True,
}  # fmt: skip
CHARACTERS = SMALL | {"tokens": "overlapping", "k": 1}
KINDS = {
    "characters": CHARACTERS,
    "overlapping": SMALL | {"tokens": "overlapping", "k": 3},
    "blocks": SMALL | {"tokens": "blocks", "k": 3},
}
MOTIF = "TTGACGTCAA"  # its own reverse complement
WINDOW = 48


def bases(count: int, length: int, seed: int = 0) -> Codes:
    return np.random.default_rng(seed).integers(0, 4, (count, length)).astype(np.uint8)


def sample_of(codes: Codes, rows: Sequence[int] | None = None) -> Sample:
    lengths = torch.full((len(codes),), codes.shape[1])
    none = torch.zeros((len(codes), 0, 1))
    row = torch.arange(len(codes)) if rows is None else torch.tensor(rows)
    return Sample(torch.from_numpy(codes), lengths, row, none, none.bool())


def masked_model(settings: dict[str, Any], seed: int = 0) -> MaskedModel:
    torch.manual_seed(seed)
    return MaskedModel(Language.build(settings, bin_size=0, crop=0)).eval()


def objective_for(model: SequenceModel, share: float = 0.15) -> MaskedObjective:
    return MaskedObjective(tokeniser_of(model.trunk), share)


# ---- which tokens are hidden ----


def hide(settings: dict[str, Any], codes: Codes, rows: Sequence[int] | None = None, **more: Any) -> Hidden:
    tokeniser = tokeniser_of(masked_model(settings).trunk)
    tokens = tokeniser.encode(torch.from_numpy(codes), torch.full((len(codes),), codes.shape[1]))
    span = settings["k"] if settings["tokens"] == "overlapping" else 1
    chosen = {"share": 0.15, "seed": 1, "step": 0, "span": span} | more
    return mask_tokens(tokens, tokeniser.vocabulary, rows=list(range(len(codes))) if rows is None else rows, **chosen)


def test_a_fifth_of_the_hidden_tokens_is_not_the_mask() -> None:
    found = hide(CHARACTERS, bases(200, 200))
    mask = tokeniser_of(masked_model(CHARACTERS).trunk).vocabulary.ids["[MASK]"]
    given = found.given[found.row, found.column]
    assert len(found) == 200 * 30
    assert float((given == mask).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((given == found.truth).float().mean()) == pytest.approx(0.1 + 0.1 / 4, abs=0.02)
    assert set(given.tolist()) <= {mask, *range(mask + 1, mask + 5)}
    plain = hide(CHARACTERS, bases(200, 200), plain=True)
    assert torch.equal(plain.column, found.column)
    assert set(plain.given[plain.row, plain.column].tolist()) == {mask}


def test_what_is_hidden_follows_from_seed_step_and_row_alone() -> None:
    codes = bases(6, 60)
    whole = hide(KINDS["overlapping"], codes)
    part = hide(KINDS["overlapping"], codes[[4, 1]], rows=[4, 1])
    assert torch.equal(part.given, whole.given[[4, 1]])
    for other in ({"seed": 2}, {"step": 1}, {"rows": [7, 8, 9, 10, 11, 12]}):
        assert not torch.equal(hide(KINDS["overlapping"], codes, **other).given, whole.given)


def test_unknown_bases_are_never_hidden() -> None:
    codes = bases(20, 60)
    codes[:, 20:40] = N
    for settings in KINDS.values():
        found = hide(settings, codes, share=0.9)
        tokens = tokeniser_of(masked_model(settings).trunk).encode(torch.from_numpy(codes), torch.full((20,), 60))
        stop = tokens.stop[found.row, found.column]
        start = tokens.start[found.row, found.column]
        assert bool(((stop <= 20) | (start >= 40)).all())
        assert len(found) > 20
    assert not len(hide(CHARACTERS, np.full((2, 30), N, dtype=np.uint8)))


def test_overlapping_tokens_are_hidden_in_spans_of_one_fate() -> None:
    found = hide(KINDS["overlapping"], bases(50, 80), share=0.05)
    mask = tokeniser_of(masked_model(KINDS["overlapping"]).trunk).vocabulary.ids["[MASK]"]
    hidden = (found.given >= 0).numpy()
    for row, given in zip(hidden, found.given.numpy(), strict=True):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            assert stop - start >= 3
            if stop - start == 3:
                assert len({value == mask for value in given[start:stop].tolist()}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_bases_that_no_visible_token_tells(kind: str) -> None:
    codes = bases(5, 50)
    codes[0, 10] = N
    tokeniser = tokeniser_of(masked_model(KINDS[kind]).trunk)
    tokens = tokeniser.encode(torch.from_numpy(codes), torch.full((5,), 50))
    found = hide(KINDS[kind], codes, share=0.3)
    start, stop = _unknown(tokens, found)
    for place, (row, column) in enumerate(zip(found.row.tolist(), found.column.tolist(), strict=True)):
        seen = set[int]()
        for other in range(tokens.ids.shape[1]):
            if found.given[row, other] < 0:
                seen |= set(range(int(tokens.start[row, other]), int(tokens.stop[row, other])))
        own = set(range(int(tokens.start[row, column]), int(tokens.stop[row, column])))
        assert own - seen == set(range(start[place], stop[place]))
        assert own - seen


# ---- the model and the objective ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_does_not_see_what_is_hidden(kind: str) -> None:
    model, codes = masked_model(KINDS[kind]), bases(1, 42)
    sample = objective_for(model).scored(sample_of(codes))
    tokens = tokeniser_of(model.trunk).encode(sample.codes, sample.lengths)
    start, stop = _unknown(tokens, sample.hidden)
    other = codes.copy()
    for low, high in zip(start, stop, strict=True):
        other[0, low:high] = 3 - codes[0, low:high]
    with torch.no_grad():
        first, second = model(sample), model(replace(sample, codes=torch.from_numpy(other)))
        visible = codes.copy()
        visible[0, min(set(range(42)) - {p for a, b in zip(start, stop, strict=True) for p in range(a, b)})] ^= 1
        third = model(replace(sample, codes=torch.from_numpy(visible)))
    assert not np.array_equal(codes, other)
    assert torch.equal(first, second)
    assert not torch.allclose(first, third)
    assert first.shape == (len(sample.hidden), len(tokeniser_of(model.trunk).vocabulary.ids))


def test_logits_are_those_of_the_whole_chain() -> None:
    """Against the chain written out: embeddings with the skip, layers, the norm of the last stage, the head."""
    model = masked_model(KINDS["blocks"])
    sample = objective_for(model).scored(sample_of(bases(3, 40)))
    trunk = model.trunk
    with torch.no_grad():
        state = trunk.encode(sample.codes, sample.lengths)
        state = trunk.stages["embeddings"](replace(state, skips={HIDDEN: sample.hidden.given[:, None]}))
        x = trunk.stages["final"].norm(trunk.stages["layer_0"](state).x.transpose(1, 2))
        lm = trunk.lm
        assert isinstance(lm, MaskedHead)
        x = lm.norm(functional.gelu(x @ lm.dense.weight.T + lm.dense.bias)) @ lm.decoder.weight.T + lm.decoder.bias
        assert torch.allclose(model(sample), x[sample.hidden.row, sample.hidden.column], atol=1e-5)


@pytest.mark.parametrize("settings", [LANGUAGE, BLOCKS, MOSAIC, ROTARY], ids=["bert", "esm", "mosaic", "esm_rotary"])
def test_every_family_trains_on_hidden_tokens(settings: dict[str, Any], tmp_path: Path) -> None:
    labels = tiny_labels(tmp_path / "labels", "sigmoid")
    content = {"data": str(labels.folder), "model": {"name": "language", "settings": settings | {"lm_head": True}}}
    content |= {"adapter": {"kind": "full"}, "loss": {"kind": "masked_tokens"}, "evaluate": {"draws": 20}}
    experiment = parse_experiment(content | {"train": {"epochs": 1, "patience": 0}})
    fit_run(experiment, tmp_path / "run")  # whose guard looks for tensors without a gradient
    before, _ = build_run(experiment)
    after = open_run(tmp_path / "run").model.state_dict()
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])}
    assert {name for name in after if name.startswith(("trunk.lm", "trunk.stages.layer_0"))} <= changed
    models = evaluate_run(tmp_path / "run").metrics["model"].unique().tolist()
    assert models[:2] == ["from scratch", "token frequencies"]
    assert len(models) == (2 if "tokenizer" in settings else 9)


def test_the_objective_is_the_sum_over_hidden_tokens() -> None:
    model = masked_model(CHARACTERS)
    objective = objective_for(model, 0.2)
    sample = objective.draw(sample_of(bases(4, 50)), seed=3, epoch=1)
    assert objective.weigh(sample).tolist() == [40.0]
    with torch.no_grad():
        logits = model(sample)
    expected = -logits.log_softmax(1)[torch.arange(40), sample.hidden.truth].sum()
    assert float(objective(model, sample).detach()) == pytest.approx(float(expected), rel=1e-5)
    halves = [objective.draw(sample_of(bases(4, 50)[part], part), 3, 1) for part in ([0, 1], [2, 3])]
    assert sum(float(objective(model, half).detach()) for half in halves) == pytest.approx(float(expected), rel=1e-5)
    nothing = sample.without_targets()
    assert objective.weigh(nothing).tolist() == [0.0]
    assert float(objective(model, nothing).detach()) == 0.0


def test_a_model_without_the_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no head for masked tokens"):
        masked_model(CHARACTERS | {"lm_head": False})
    with pytest.raises(ConfigError, match="share of the tokens"):
        MaskedTokens(share=1.0)


# ---- Markov models ----


def test_hidden_bases_of_a_chain_by_enumeration() -> None:
    """Against the joint probability of the whole sequence, for every sequence that could stand there."""
    chain = Markov.fit(list(bases(3, 200, seed=1)), 2)
    codes = bases(2, 9, seed=2)
    codes[1, 2] = N

    def joint(row: Codes) -> float:
        total = 0.0
        for j, base in enumerate(row.tolist()):
            known = 0
            while known < min(2, j) and row[j - known - 1] < N:
                known += 1
            number = int("".join(map(str, row[j - known : j].tolist())) or "0", 4)
            total += float(chain.tables[known][number, base]) if base < N else 0.0
        return total

    for width, places in ((1, [0, 4, 8]), (2, [0, 5, 7])):
        for row in (0, 1):
            for start in places:
                logs = []
                for letters in product(range(4), repeat=width):
                    other = codes[row].copy()
                    other[start : start + width] = letters
                    logs.append(joint(other))
                expected = np.array(logs) - np.logaddexp.reduce(logs)
                found = chain.hidden(codes, np.array([row]), np.array([start]), width)
                assert found[0] == pytest.approx(expected, abs=1e-9)


def test_a_chain_is_fitted_to_both_strands() -> None:
    chain = Markov.fit([encode("AAAC")], 0)
    assert np.exp(chain.tables[0][0]) == pytest.approx((np.array([3, 1, 1, 3]) + 1) / 12)
    alternating = Markov.fit([encode("AC" * 500 + "GT" * 500)], 1)  # its own reverse complement
    assert np.exp(alternating.tables[1][0, 1]) > 0.99
    assert [table.shape for table in alternating.tables] == [(1, 4), (4, 4)]
    assert alternating.below(0).order == 0


# ---- windows of a genome ----


def write_genome(path: Path, seed: int = 0, chroms: int = 4, length: int = 2400) -> Path:
    """Random bases with a motif about every 15 bp."""
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(chroms):
        codes = generator.integers(0, 4, length).astype(np.uint8)
        at = 5
        while at + len(MOTIF) < length:
            codes[at : at + len(MOTIF)] = encode(MOTIF)
            at += len(MOTIF) + int(generator.integers(3, 9))
        lines += [f">chr{number + 1}", decode(codes)]
    path.write_text("\n".join(lines) + "\n")
    return path


def windows_of(fasta: Path, **changes: Any) -> WindowSource:
    folds = Folds(by="chromosome", valid=("chr3",), test=("chr4",))
    return replace(WindowSource(fasta, WINDOW, folds), **changes)


def test_windows_of_a_genome(tmp_path: Path) -> None:
    fasta = tmp_path / "genome.fa"
    first, second = "ACGT" * 25 + "N" * 50 + "ACGTT" * 30, "GATTACA" * 20
    fasta.write_text(f">chr1\n{first}\n>chr2\n{second}\n>chrM\nACGT\n")
    folds = Folds(by="chromosome", test=("chr2",))
    source = WindowSource(fasta, 50, folds, exclude_chroms=("chrM",), unknown=0.0)
    data = prepare_source(source, tmp_path / "data")
    assert data.targets.shape == (7, 0, 1)
    assert len(data.tracks) == 0
    assert data.regions["start"].tolist() == [0, 50, 150, 200, 250, 0, 50]
    assert data.regions["fold"].tolist() == ["train"] * 5 + ["test"] * 2
    assert data.info.notes["dropped_windows"] == {"unknown_bases": 1}
    sample = open_dataset(tmp_path / "data").sample([0, 6])
    assert decode(sample.codes[1].numpy()) == ("GATTACA" * 20)[50:100]
    assert sample.targets.shape == (2, 0, 1)
    overlapping = prepare_source(replace(source, stride=25, unknown=0.5), tmp_path / "dense")
    assert overlapping.regions["start"].tolist()[:5] == [0, 25, 50, 75, 125]
    bed = tmp_path / "folds.bed"
    bed.write_text("chr1\t0\t100\ttrain\nchr1\t150\t300\tvalid\nchr2\t0\t140\ttest\n")
    by_bed = prepare_source(replace(source, folds=Folds(by="trunk", trunk=str(bed))), tmp_path / "bed")
    assert by_bed.regions["fold"].tolist() == ["train"] * 2 + ["valid"] * 3 + ["test"] * 2
    with pytest.raises(DataError, match="no window fits"):
        prepare_source(replace(source, window=400), tmp_path / "none")
    with pytest.raises(ConfigError, match="unknown must be a share"):
        replace(source, unknown=1.0)


# ---- a run ----


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_genome(tmp_path_factory.mktemp("genome") / "genome.fa")


@pytest.fixture(scope="module")
def data(genome: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare_source(windows_of(genome), tmp_path_factory.mktemp("data") / "data")


def experiment_of(data: Dataset, settings: dict[str, Any] | None = None, **train: Any) -> Experiment:
    chosen = {"lr": 1e-2, "batch_size": 25, "epochs": 2, "patience": 0, "augment": {"shift": 2}} | train
    return parse_experiment(
        {
            "data": str(data.folder),
            "model": {"name": "language", "settings": settings or CHARACTERS},
            "adapter": {"kind": "full", "statistics": "batch"},
            "loss": {"kind": "masked_tokens", "share": 0.2},
            "train": chosen,
            "evaluate": {"draws": 50, "block": 200},
        }
    )


@pytest.fixture(scope="module")
def run(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt the motif."""
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = CHARACTERS | {"channels": 32, "depth": 2, "hidden": 32}
    fit_run(experiment_of(data, settings, epochs=40), folder)
    return folder


def test_a_run_beats_the_baselines_and_is_reported(run: Path) -> None:
    evaluation = evaluate_run(run)
    table = evaluation.metrics.set_index(["model", "metric"])["value"]
    assert list(dict.fromkeys(evaluation.metrics["metric"])) == list(METRICS)
    own = float(table["from scratch", "bits_per_base"])
    assert own < float(table["Markov model, order 1", "bits_per_base"]) - 0.1
    assert own < float(table["token frequencies", "bits_per_base"]) - 0.3
    assert float(table["from scratch", "perplexity"]) == pytest.approx(2**own, rel=1e-6)  # a character is a base
    assert 1.9 < float(table["Markov model, order 0", "bits_per_base"]) < 2.01
    rows = evaluation.metrics[evaluation.metrics["model"] == "from scratch"]
    assert (rows["low"] < rows["value"]).all()
    assert (rows["value"] < rows["high"]).all()
    assert set(rows["n"]) == {round(0.2 * WINDOW) * 50}
    differences = evaluation.differences.set_index("baseline")["value"]
    expected = own - float(table["Markov model, order 6", "bits_per_base"])
    assert float(differences["Markov model, order 6"]) == pytest.approx(expected)
    with pytest.raises(ConfigError, match="no statistics of tracks"):
        compare_runs(run, run)
    again = evaluate_run(run)
    pd.testing.assert_frame_equal(again.metrics, evaluation.metrics)
    text = write_report(run).read_text()
    assert "bits per base" in text
    assert "Markov model, order 6" in text
    log = pd.read_csv(run / "log.csv")
    assert log["valid_score"].tolist() == pytest.approx((-log["valid_loss"]).tolist())
    assert json.loads((run / "environment.json").read_text())["metric"] == "cross_entropy"


def test_scores_do_not_depend_on_the_batches(run: Path) -> None:
    opened = open_run(run)
    assert isinstance(opened.model, MaskedModel)
    objective = objective_for(opened.model, 0.2)
    tables = [
        evaluate_masked(
            opened.model, opened.dataset, replace(opened.experiment.evaluate, batch_size=size), "x", objective
        ).metrics["value"]
        for size in (7, 50)
    ]
    assert tables[0].to_numpy() == pytest.approx(tables[1].to_numpy(), rel=1e-5)


class KilledError(Exception):
    pass


class MaskedTokensThatDie(MaskedObjective):
    """Stops in the middle of the second epoch."""

    steps = 0

    def __call__(self, model: nn.Module, sample: Sample) -> Tensor:
        self.steps += model.training
        if self.steps == 7:
            raise KilledError
        return super().__call__(model, sample)


MaskedTokensThatDie.__name__ = "MaskedTokens"  # as the checkpoint knows it


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = experiment_of(data, epochs=3, save_minutes=0)
    fit_run(once, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "MaskedTokens", MaskedTokensThatDie)
        with pytest.raises(KilledError):
            fit_run(once, tmp_path / "parts")
    assert pd.read_csv(tmp_path / "parts" / "log.csv")["epoch"].tolist() == [1]
    fit_run(once, tmp_path / "parts", resume=True)
    whole, parts = (open_run(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in parts.items())


def test_plan_names_the_head_and_the_problems(data: Dataset, tmp_path: Path) -> None:
    plan = plan_run(experiment_of(data), tmp_path / "run")
    assert plan.would_start, plan.problems
    assert "head 423" in plan.facts["trains"]
    assert plan.cost is not None
    assert plan.cost.bytes_per_row > 0
    wrong = plan_run(experiment_of(data, CHARACTERS | {"lm_head": False}))
    assert "no head for masked tokens" in str(wrong.problems[0])
    cached = plan_run(experiment_of(data, cache="float16"))
    assert "drawn anew" in str(cached.problems[0])
    group = replace(experiment_of(data), loss=MaskedTokens(0.2), model=ModelConfig("convnet"))
    assert "no head for masked tokens" in str(plan_run(group).problems[0])


def test_export_keeps_the_head_and_adapters_train_on_it(run: Path, data: Dataset, genome: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "lm", name="lm", licence="MIT", half=True)
    content = json.loads((tmp_path / "lm" / "model.json").read_text())
    assert content["settings"]["lm_head"]
    assert content["window"] == WINDOW
    assert (tmp_path / "lm" / "trained_on.bed").read_text().startswith("chr1\t0\t2400\ttrain")
    half = build_masked(ModelConfig(str(tmp_path / "lm")), data.info)
    full = open_run(run).model
    for name, tensor in full.state_dict().items():
        assert torch.equal(tensor.to(torch.bfloat16).float(), half.state_dict()[name]), name
    size = (tmp_path / "lm" / "weights.safetensors").stat().st_size
    assert size < 2.2 * sum(p.numel() for p in half.parameters()) + 6000
    labels = tiny_labels(tmp_path / "labels", "sigmoid")
    settled = {
        "model": {"name": str(tmp_path / "lm")},
        "loss": {"kind": "masked_tokens"},
        "evaluate": {"baselines": []},
    }
    adapter = {"kind": "lora", "rank": 2, "where": ["attention"]}
    train = {"epochs": 2, "batch_size": 16, "augment": {"shift": 0}}
    fit_run(
        parse_experiment({"data": str(labels.folder), "adapter": adapter, "train": train} | settled), tmp_path / "lora"
    )
    tuned = open_run(tmp_path / "lora")
    assert tuned.model.adapted.counts.head == sum(p.numel() for p in half.trunk.lm.parameters())
    assert tuned.model.adapted.counts.trunk == 0
    assert len(tuned.dataset.tracks) == 0
    assert evaluate_run(tmp_path / "lora").metrics["model"].unique().tolist() == ["LoRA r=2 (attention)"]
    ordinary = {"data": str(labels.folder), "model": settled["model"], "adapter": adapter, "train": train}
    model, _ = build_run(parse_experiment(ordinary))
    counts = adapt(model, LoRA(rank=2, where=("attention",)))
    assert counts.trunk == 0
    model, _ = build_run(parse_experiment(ordinary))
    adapt(model, FullFineTune())
    assert not any(p.requires_grad for p in model.trunk.lm.parameters())  # nothing reads it there


def test_an_adapted_model_stands_beside_the_one_it_came_from(run: Path, data: Dataset, tmp_path: Path) -> None:
    export_run(run, tmp_path / "lm", name="lm", licence="MIT")
    adapter = LoRA(rank=2, where=("attention",))
    still = replace(experiment_of(data, epochs=1, lr=1e-9), model=ModelConfig(str(tmp_path / "lm")), adapter=adapter)
    fit_run(still, tmp_path / "lora")
    assert not FrozenBytes.of(open_run(tmp_path / "lora").model).quantised  # the head for tokens trains, and is inside
    evaluation = evaluate_run(tmp_path / "lora")
    scores = evaluation.metrics.query("metric == 'bits_per_base'").set_index("model")["value"]
    own = evaluate_run(run).metrics.query("metric == 'bits_per_base'").set_index("model")["value"]
    assert scores["before adaptation"] == pytest.approx(own["from scratch"], rel=1e-6)
    assert scores["LoRA r=2 (attention)"] == pytest.approx(own["from scratch"], rel=1e-4)
    assert "before adaptation" in set(evaluation.differences["baseline"])


def test_what_needs_tracks_is_refused(run: Path, tmp_path: Path) -> None:
    bed = tmp_path / "a.bed"
    bed.write_text("chr1\t0\t48\n")
    for refused in (
        lambda: predict_run(run, bed, tmp_path / "a.parquet"),
        lambda: attribute_run(run, bed, tmp_path / "a.npz"),
    ):
        with pytest.raises(ConfigError, match="predicts no tracks"):
            refused()
    assert len(pd.read_parquet(embed_run(run, bed, tmp_path / "e.parquet"))) == 1
    experiment = read_experiment(run / "experiment.yaml")
    wrong = replace(experiment.evaluate, ensemble=replace(FORWARD_ONLY, reverse_complement=True))
    opened = open_run(run)
    assert isinstance(opened.model, MaskedModel)
    with pytest.raises(ConfigError, match="hidden tokens have no tracks"):
        evaluate_masked(opened.model, opened.dataset, wrong, "x", objective_for(opened.model))


# ---- variants ----


def slowly(model: MaskedModel, genome: Genome, variant: Variant, window: int) -> float:
    """One variant, both strands, with the probabilities written out."""
    tokeniser = tokeniser_of(model.trunk)
    start = variant.position - window // 2
    contig = genome.chrom_codes(variant.chrom)
    codes = np.array([contig[p] if 0 <= p < len(contig) else N for p in range(start, start + window)])
    strands = []
    for turned in (False, True):
        alleles = []
        for base in (variant.ref, variant.alt):
            row = codes.astype(np.uint8).copy()
            row[window // 2 - 1] = encode(base)[0]
            alleles.append(reverse_complement(row[None])[0] if turned else row)
        at = window - window // 2 if turned else window // 2 - 1
        ref, alt = (tokeniser.encode(torch.from_numpy(a[None].copy()), torch.tensor([window])) for a in alleles)
        columns = [c for c in range(ref.ids.shape[1]) if ref.start[0, c] <= at < ref.stop[0, c]]
        columns = [c for c in columns if ref.ids[0, c] != tokeniser.vocabulary.unknown]
        given = torch.full_like(ref.ids, -1)
        given[0, columns] = tokeniser.vocabulary.ids["[MASK]"]
        places = torch.tensor(columns)
        hidden = Hidden(given, torch.zeros_like(places), places, ref.ids[0, places])
        sample = replace(sample_of(alleles[0][None].copy()), hidden=hidden)
        with torch.no_grad():
            probability = model(sample).double().softmax(1)
        names = {i: name for name, i in tokeniser.vocabulary.ids.items()}
        ratios = []
        for number, column in enumerate(columns):
            name, place = names[int(ref.ids[0, column])], at - int(ref.start[0, column])
            agree = [name[:place] + base + name[place + 1 :] for base in "ACGT"]
            each = {other[place]: probability[number, tokeniser.vocabulary.ids[other]] for other in agree}
            total = sum(each.values())
            wanted = [names[int(t.ids[0, column])][place] for t in (alt, ref)]
            ratios.append(float(torch.log(each[wanted[0]] / total) - torch.log(each[wanted[1]] / total)))
        strands.append(np.mean(ratios))
    return float(np.mean(strands))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_one_variant_at_a_time(kind: str, genome: Path, data: Dataset) -> None:
    model = masked_model(KINDS[kind])
    opened = Genome.open(genome)
    layout = Layout(31, 1, 31, data.tracks, opened)
    codes = opened.chrom_codes("chr1")
    variants = []
    for position in (3, 200, 201, 1000, 1001, 1002, 2399):
        ref = decode(np.asarray(codes[position - 1 : position]))
        variants += [Variant("chr1", position, ref, alt, "") for alt in "ACGT" if alt != ref]
    scored = LikelihoodScorer(model, layout, VariantConfig(batch_size=4))(variants)
    expected = [slowly(model, opened, variant, 31) for variant in variants]
    assert scored.values[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert scored.padded == 6
    assert len(set(expected)) == len(expected)


def write_vcf(path: Path, rows: Sequence[tuple[str, int, str, str]]) -> Path:
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    lines += [f"{chrom}\t{position}\t.\t{ref}\t{alt}\t.\t.\t." for chrom, position, ref, alt in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_variants_that_break_a_motif_are_unexpected(run: Path, genome: Path, tmp_path: Path) -> None:
    text = Genome.open(genome)
    codes = decode(np.asarray(text.chrom_codes("chr4")))
    inside, outside = [], []
    at = codes.find(MOTIF, 100)
    while at >= 0 and len(inside) < 12:
        for place, rows in ((at + 4, inside), (at - 2, outside)):
            alt = "ACGT"[("ACGT".index(codes[place]) + 1) % 4]
            rows.append(("chr4", place + 1, codes[place], alt))
        at = codes.find(MOTIF, at + 40)
    indel = ("chr4", 90, codes[89], codes[89] + "A")
    vcf = write_vcf(tmp_path / "v.vcf", sorted([*inside, *outside, indel], key=lambda row: row[1]))
    with pytest.raises(DataError, match="single-base substitutions only"):
        score_run(run, vcf, tmp_path / "refused.parquet")
    config = VariantConfig(allow_skipped=True)
    found = score_run(run, vcf, tmp_path / "v.parquet", config)
    assert found.skipped == {"the model scores single-base substitutions only": 1}
    assert "single-base substitutions" in (tmp_path / "v.skipped.tsv").read_text()
    table = pd.read_parquet(tmp_path / "v.parquet").set_index("position")
    assert set(table["scorer"]) == {"masked_likelihood"}
    scores = table["log_likelihood_ratio"]
    breaking = scores[[row[1] for row in inside]]
    assert (breaking < 0).all()
    assert breaking.mean() < scores[[row[1] for row in outside]].mean() - 1
    export_run(run, tmp_path / "lm", name="lm", licence="MIT")
    score_model(str(tmp_path / "lm"), genome, vcf, tmp_path / "m.parquet", config)
    named = pd.read_parquet(tmp_path / "m.parquet").set_index("position")["log_likelihood_ratio"]
    pd.testing.assert_series_equal(named, scores, rtol=1e-4, atol=1e-5)
    score_run(run, vcf, tmp_path / "v.vcf.gz", config)
    with pytest.raises(ConfigError, match="which these settings are for"):
        score_run(run, vcf, tmp_path / "w.parquet", VariantConfig(merge_strands=True))
    with pytest.raises(ConfigError, match="no weights"):
        score_model("language", genome, vcf, tmp_path / "w.parquet")


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = run_guide("language-models")["table"]
    assert {"before adaptation", "Markov model, order 0", "LoRA r=8 (attention)"} <= set(table["model"])
    assert len(pd.read_parquet("expected.parquet")) > 0
    assert (pd.read_parquet("runs/ia3/evaluation/metrics.parquet")["value"].notna()).any()
