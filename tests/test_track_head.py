"""A pretrained track as the head: what it starts as, that it trains, that a run of it comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from seqgraft.adapters.lora import LoRA
from seqgraft.data import prepare_source
from seqgraft.data.augment import FORWARD, Augmentation
from seqgraft.data.dataset import Dataset
from seqgraft.donor_scores import _untuned
from seqgraft.errors import ModelError
from seqgraft.evaluate import EvaluateConfig
from seqgraft.experiment import Experiment
from seqgraft.losses import Pairs
from seqgraft.metrics import pearson_within
from seqgraft.models.base import State
from seqgraft.models.track_head import TrackHead, start_track_heads
from seqgraft.models.weights import ModelConfig, build_model, build_pretrained
from seqgraft.predict import predict
from seqgraft.run import build_run, evaluate_run, fit_run, open_run
from seqgraft.tracks import TrackTable
from seqgraft.train import TrainConfig
from test_personal import source_of, write_cohort

CONFIG = ModelConfig("sim-mini", track="rna_base1_plus", centre=4)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("cohort")
    return prepare_source(source_of(write_cohort(folder)), folder / "data")


@pytest.mark.parametrize("track", ["rna_base1_plus", "atac_base1"])
@pytest.mark.parametrize("centre", [4, None])
def test_it_starts_as_the_pretrained_track_with_its_partner(cohort: Dataset, track: str, centre: int | None) -> None:
    config = replace(CONFIG, track=track, centre=centre)
    model = build_model(config, cohort.tracks, cohort.info).eval()
    reference = build_pretrained(config, cohort.info, of_labels=True)
    assert reference is not None
    sample = cohort.stored_sample(np.arange(6), [FORWARD] * 6)
    names = [name for name in reference.tracks.names if name.startswith(track.removesuffix("plus"))]
    assert len(names) == (2 if track.startswith("rna") else 1)
    with torch.no_grad():
        outputs = reference.predict(sample)  # raw already: this model's tracks have neither squash nor scale
        signal = outputs[:, [reference.tracks.names.index(name) for name in names]].sum((1, 2))
        assert outputs.shape[-1] == (centre or 16)
        torch.testing.assert_close(model(sample)[:, 0, 0], torch.log1p(signal), rtol=1e-5, atol=1e-6)


def test_units_and_padding() -> None:
    """The raw sum of a squashed mean; bins of padding count nothing."""
    settings = {"statistic": "mean", "squash": "sqrt", "scale": 0.5, "soft_clip": 3.0}
    source = TrackTable.build([{"name": "a", "group": "a", "link": "softplus", **settings}])
    labels = TrackTable.build([{"name": name, "group": "b", "link": "identity"} for name in ("x", "y")])
    head = TrackHead(labels, 2, source, bin_size=8)
    torch.nn.init.constant_(head.scale, 2.0)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.0, 5.0]))
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    out = torch.nn.functional.softplus(head.out(x))[:, 0]
    unclipped = torch.where(out > 3, 3 - 1 + (out - 3 + 1) ** 2, out)
    raw = ((unclipped + 1) ** 2 - 1) / 0.5 * 8
    expected = 2 * torch.log1p((raw * valid).sum(-1))
    found = head(State(x, valid=valid), None)  # type: ignore[arg-type]
    torch.testing.assert_close(found[..., 0], torch.stack([expected, expected + 5], dim=1))


def test_means_and_spreads_are_set_from_training_examples(cohort: Dataset) -> None:
    model = build_model(CONFIG, cohort.tracks, cohort.info)
    rows = cohort.rows("train")[::5]
    before = predict(model, cohort, rows)[:, 0, 0]
    start_track_heads(model, [cohort.sample(part) for part in np.array_split(rows, 3)])
    after, truth = predict(model, cohort, rows)[:, 0, 0], cohort.raw_targets(rows)[:, 0, 0]
    assert np.corrcoef(before, after)[0, 1] == pytest.approx(1, abs=1e-6)
    assert (after.mean(), after.std()) == pytest.approx((truth.mean(), truth.std()), abs=1e-4)


def test_a_run_trains_it_beside_the_untrained_one(cohort: Dataset, tmp_path: Path) -> None:
    experiment = Experiment(
        data=cohort.folder,
        model=CONFIG,
        adapter=LoRA(rank=2),
        loss=Pairs(),
        train=TrainConfig(epochs=1, batch_size=16, head_lr=1e-3, augment=Augmentation(shift=0)),
        evaluate=EvaluateConfig(draws=20, linearity=2),
    )
    start, _ = build_run(experiment)
    fit_run(experiment, tmp_path / "run")
    run = open_run(tmp_path / "run")
    own, first = (model.heads["track_expression"].state_dict() for model in (run.model, start))
    assert {name for name in own if not torch.equal(own[name], first[name])} >= {"out.weight", "out.bias", "scale"}
    evaluation = evaluate_run(tmp_path / "run")
    r2 = evaluation.genes.groupby("model")["r2_within_genes"].count()
    assert r2["pretrained track"] == 0 < r2[experiment.adapter.label]  # its sums are no z-scores
    found = evaluation.metrics.set_index(["model", "fold", "metric"])["value"]
    for name in ("pretrained track", experiment.adapter.label):
        assert np.isfinite(found[name, "test", "pearson_within_genes"])


def test_the_untrained_track_is_the_best_on_the_genes_own_strand_or_the_other(cohort: Dataset) -> None:
    rows = np.sort(np.concatenate([cohort.rows("train"), cohort.rows("test")]))
    reference = build_pretrained(CONFIG, cohort.info, of_labels=True)
    assert reference is not None
    assert cohort.donors is not None
    signal = predict(reference, cohort, rows).sum(-1)
    names, train = reference.tracks.names, (cohort.regions["fold"] == "train").to_numpy()[rows]
    genes, truth = cohort.donors.gene[rows], cohort.raw_targets(rows)[:, 0, 0]
    found = {}
    for name in names:
        partner = name.replace("plus", "x").replace("minus", "plus").replace("x", "minus")
        minus = (cohort.regions["strand"] == "-").to_numpy()[rows]
        values = np.where(minus, signal[:, names.index(partner)], signal[:, names.index(name)])
        found[pearson_within(truth[train], values[train], genes[train]).mean()] = values
    own = _untuned(cohort, rows, CONFIG, EvaluateConfig(), reference)
    assert own is not None
    np.testing.assert_allclose(own[rows], found[max(found)], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"track": "cage"}, "no such track: 'cage'. It has 12 tracks, such as rna_base1_plus"),
        ({"head": "extend"}, "needs a pretrained model, labels, head: new"),
        ({"init": "random"}, "needs a pretrained model, labels, head: new"),
        ({"name": "convnet"}, "needs a pretrained model, labels, head: new"),
    ],
)
def test_what_cannot_be_a_head(cohort: Dataset, change: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(replace(CONFIG, **change), cohort.tracks, cohort.info)  # type: ignore[arg-type]
