"""Predictions do not depend on batches, and ensembles turn strands back before they average."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from builders import BINS, SETTINGS, tiny_coverage, tiny_labels
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ModelError
from seqgraft.models.base import Head, SequenceModel, State, Trunk, TrunkSpec
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.predict import embed, predict, predict_batches

BOTH = Augmentation(reverse_complement=True, shift=0)


@pytest.fixture(scope="module")
def coverage(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_coverage(tmp_path_factory.mktemp("coverage") / "data")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_labels(tmp_path_factory.mktemp("labels") / "data")


def make(dataset: Dataset) -> SequenceModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(settings=SETTINGS), dataset.tracks, dataset.info)


class Counter(Trunk):
    """Counts A, C, G and T per bin: the features of a region read backwards are exactly those of the other strand."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict()
        self.spec = TrunkSpec("counter", channels=4, bin_size=16)
        self.stride = 16

    def forward(self, codes: Tensor, lengths: Tensor | None = None) -> State:
        x = self.encode(codes, lengths).x[..., 32:-32]
        return State(x.reshape(len(x), 4, -1, 16).sum(-1))


def counting_model(dataset: Dataset, symmetric: bool) -> SequenceModel:
    """``rna+`` predicts the A per bin, ``rna-`` the T, ``atac`` G and C; not so symmetric: ``atac`` G alone."""
    weights = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0] if symmetric else [0, 0, 1, 0]])
    head = Head(dataset.tracks.replace(group="all", link="identity"), 4)
    with torch.no_grad():
        head.out.weight.copy_(weights[:, :, None])
        nn.init.zeros_(head.out.bias)  # type: ignore[arg-type]
    return SequenceModel(Counter(), {"new_all": head}, head.tracks)


@pytest.mark.parametrize("kind", ["coverage", "labels"])
def test_batches_do_not_matter(kind: str, request: pytest.FixtureRequest) -> None:
    dataset: Dataset = request.getfixturevalue(kind)
    model, rows = make(dataset), np.array([7, 0, 3, 12, 5, 1, 2])
    for ensemble in (Augmentation(reverse_complement=False, shift=0), Augmentation(shift=1)):
        one, three, sixteen = (predict(model, dataset, rows, ensemble=ensemble, batch_size=n) for n in (1, 3, 16))
        assert one.shape == (7, len(dataset.tracks), dataset.info.bins)
        assert one.dtype == np.float32
        assert np.abs(one - three).max() <= 1e-6
        assert np.abs(one - sixteen).max() <= 1e-6
    few, many = (embed(model, dataset, rows, batch_size=n) for n in (2, 16))
    assert few.shape == (7, model.trunk.spec.channels)
    assert np.abs(few - many).max() <= 1e-6
    seen = [(list(r), len(v)) for r, v in predict_batches(model, dataset, rows, batch_size=3)]
    assert seen == [([7, 0, 3], 3), ([12, 5, 1], 3), ([2], 1)]


def test_sequences_go_by_length_and_come_back_in_order(labels: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches at a time are held."""
    monkeypatch.setattr("seqgraft.predict._HELD", 4)
    model, rows = make(labels), np.random.default_rng(0).permutation(36)
    assert labels.lengths is not None
    longest: list[int] = []
    original = type(labels).sample

    def sample(self: Dataset, chosen: npt.NDArray[np.int64], *more: object) -> object:
        longest.append(int(labels.lengths[chosen].max()))  # type: ignore[index]
        return original(self, chosen, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(type(labels), "sample", sample)
    found = list(predict_batches(model, labels, rows, batch_size=3))
    assert all(longest[i : i + 4] == sorted(longest[i : i + 4]) for i in range(0, 12, 4))
    assert longest != sorted(longest)
    assert [list(chosen) for chosen, _ in found] == [list(rows[i : i + 3]) for i in range(0, 36, 3)]
    alone = np.concatenate([predict(model, labels, np.array([row])) for row in rows])
    assert np.abs(np.concatenate([values for _, values in found]) - alone).max() <= 1e-6


def test_no_rows(coverage: Dataset) -> None:
    model, rows = make(coverage), np.array([], dtype=np.int64)
    assert predict(model, coverage, rows).shape == (0, 3, BINS)
    assert embed(model, coverage, rows).shape == (0, 16)


def test_both_strands_of_a_symmetric_model_agree(coverage: Dataset) -> None:
    rows = np.arange(5)
    model = counting_model(coverage, symmetric=True)
    forward, both = predict(model, coverage, rows), predict(model, coverage, rows, ensemble=BOTH)
    assert np.array_equal(forward, both)
    assert np.abs(forward - coverage.raw_targets(rows)).max() < 0.6, (
        "these are the counts that the targets were made of"
    )


def test_the_other_strand_is_turned_back_before_the_mean(coverage: Dataset) -> None:
    rows = np.arange(5)
    model = counting_model(coverage, symmetric=False)
    both = predict(model, coverage, rows, ensemble=BOTH)
    inside = np.stack([coverage.sequences([row])[0][0, 32:-32] for row in rows]).reshape(5, BINS, 16)
    guanines, cytosines = ((inside == base).sum(-1) for base in (2, 1))
    assert np.array_equal(predict(model, coverage, rows)[:, 2], guanines)
    assert np.array_equal(both[:, 2], (guanines + cytosines) / 2)


def test_shifts_are_averaged(coverage: Dataset) -> None:
    model, rows = counting_model(coverage, symmetric=True), np.array([3])
    ensemble = Augmentation(reverse_complement=False, shift=1)
    expected = np.mean(
        [
            (coverage.genome.codes(coverage.interval(3).shift(k))[32:-32] == 0).reshape(BINS, 16).sum(-1)  # type: ignore[union-attr]
            for k in (-1, 0, 1)
        ],
        axis=0,
    )
    assert predict(model, coverage, rows, ensemble=ensemble)[0, 0] == pytest.approx(expected, rel=1e-6)


def test_links_come_before_the_mean(labels: Dataset) -> None:
    """An ensemble averages predictions, not what is below the link."""
    model = make(labels).eval()
    with torch.no_grad():
        model.heads["new_label"].out.weight.mul_(40)
    rows = np.arange(6)
    forward = labels.sample(rows)
    views = BOTH.views()
    with torch.no_grad():
        each = [model(labels.sample(rows, [view] * 6)) for view in views]
        expected = sum(values.sigmoid() for values in each) / 2
        other = (sum(each) / 2).sigmoid()
    found = predict(model, labels, rows, ensemble=BOTH)
    assert np.allclose(found, expected.numpy(), atol=1e-6)
    assert not np.allclose(found, other.numpy(), atol=1e-4)
    assert len(forward) == 6


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(coverage: Dataset, training: bool) -> None:
    model = make(coverage).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict(model, coverage, np.arange(4))
    embed(model, coverage, np.arange(4))
    next(batches := predict_batches(model, coverage, np.arange(4), batch_size=2))
    batches.close()
    assert model.training is training
    assert model.trunk.stages["tower_0"].norm.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_mode_is_restored_after_an_error(coverage: Dataset) -> None:
    model = make(coverage).train()
    with torch.no_grad():
        model.heads["new_atac"].out.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        predict(model, coverage, np.arange(4))
    assert model.training


def test_bf16_is_close(coverage: Dataset, labels: Dataset) -> None:
    for dataset in (coverage, labels):
        model, rows = make(dataset), np.arange(8)
        full, half = (predict(model, dataset, rows, precision=p) for p in ("float32", "bf16"))  # type: ignore[arg-type]
        assert half.dtype == np.float32
        assert not np.array_equal(full, half)
        assert np.abs(full - half).max() < 0.03 * np.abs(full).max()


def test_padding_is_left_out_of_embeddings(labels: Dataset, tmp_path: Path) -> None:
    """A short sequence has the same embedding alone and beside the longest one."""
    model = make(labels)
    longest, shortest = (int(f(labels.lengths)) for f in (np.argmax, np.argmin))  # type: ignore[arg-type]
    alone = embed(model, labels, np.array([shortest]))
    beside = embed(model, labels, np.array([longest, shortest]))
    assert np.abs(alone[0] - beside[1]).max() <= 1e-6
    assert np.abs(beside[0] - beside[1]).max() > 1e-3
