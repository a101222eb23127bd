"""Losses: parity with the reference, exact means, masks, and gradients that missing targets cannot poison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seqgraft.errors import ConfigError, DataError
from seqgraft.losses import LOSSES, BinaryCrossEntropy, CrossEntropy, Huber, Poisson, PoissonMultinomial


def example(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets and predictions (3, 4, 5) of the right kind."""
    generator = torch.Generator().manual_seed(seed)
    y_pred = torch.randn(3, 4, 5, generator=generator)
    classes = torch.randint(0, 4, (3, 5), generator=generator)
    if kind == "cross_entropy":
        return F.one_hot(classes, 4).mT.float(), y_pred
    if kind == "bce":
        return (torch.rand(3, 4, 5, generator=generator) < 0.3).float(), y_pred
    return torch.poisson(torch.full((3, 4, 5), 2.0), generator=generator), F.softplus(y_pred)


@pytest.mark.parametrize("kind", LOSSES)
def test_totals_add_up_over_batches(kind: str) -> None:
    loss, (y_true, y_pred) = LOSSES[kind](), example(kind)
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.8
    total, weight = loss(y_true=y_true, y_pred=y_pred, mask=mask)
    parts = [loss(y_true=y_true[i : i + 1], y_pred=y_pred[i : i + 1], mask=mask[i : i + 1]) for i in range(3)]
    assert torch.allclose(total, sum(part[0] for part in parts))
    assert torch.allclose(weight, sum(part[1] for part in parts))


@pytest.mark.parametrize("kind", LOSSES)
def test_missing_targets_poison_nothing(kind: str) -> None:
    loss, (y_true, y_pred) = LOSSES[kind](), example(kind)
    mask = torch.ones(3, 4, 5, dtype=torch.bool)
    mask[0] = False
    mask[1, :, 2:] = False
    clean = y_pred.clone().requires_grad_()
    loss(y_true=y_true, y_pred=clean, mask=mask)[0].backward()
    missing = y_pred.clone().requires_grad_()
    total, weight = loss(y_true=y_true.masked_fill(~mask, float("nan")), y_pred=missing, mask=mask)
    total.backward()
    assert torch.isfinite(total)
    assert weight > 0
    assert torch.equal(missing.grad, clean.grad)
    assert not missing.grad[~mask].any()
    assert missing.grad[mask].any()


@pytest.mark.parametrize("kind", LOSSES)
def test_fully_masked_is_zero(kind: str) -> None:
    y_pred = example(kind)[1].requires_grad_()
    mask = torch.zeros(3, 1, 1, dtype=torch.bool)
    total, weight = LOSSES[kind]()(y_true=torch.full((3, 4, 5), float("nan")), y_pred=y_pred, mask=mask)
    total.backward()
    assert (total.item(), weight.item()) == (0, 0)
    assert not y_pred.grad.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_masked_row_equals_its_absence_and_weights_repeat_rows(kind: str) -> None:
    loss, (y_true, y_pred) = LOSSES[kind](), example(kind)
    mask = torch.tensor([True, False, True])[:, None, None]
    kept = loss(y_true=y_true[::2], y_pred=y_pred[::2])
    assert torch.allclose(torch.stack(loss(y_true=y_true, y_pred=y_pred, mask=mask)), torch.stack(kept))
    rows = torch.tensor([[2.0], [0.0], [2.0]]).expand(3, 4)
    weighted = loss(y_true=y_true, y_pred=y_pred, weight=rows)
    assert torch.allclose(torch.stack(weighted), 2 * torch.stack(kept))


@pytest.mark.parametrize("kind", LOSSES)
def test_masked_bins_equal_shorter_regions(kind: str) -> None:
    loss, (y_true, y_pred) = LOSSES[kind](), (part.double() for part in example(kind))
    mask = torch.tensor([True, True, True, False, False])
    masked = torch.stack(loss(y_true=y_true, y_pred=y_pred, mask=mask))
    short = torch.stack(loss(y_true=y_true[..., :3], y_pred=y_pred[..., :3]))
    assert torch.allclose(masked, short, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_half_precision_is_computed_in_float32(kind: str) -> None:
    loss, (y_true, y_pred) = LOSSES[kind](), example(kind)
    total, weight = loss(y_true=y_true, y_pred=y_pred.bfloat16())
    assert total.dtype == weight.dtype == torch.float32
    assert torch.equal(total, loss(y_true=y_true, y_pred=y_pred.bfloat16().float())[0])
    assert loss(y_true=y_true, y_pred=y_pred.double())[0].dtype == torch.float64


def mean(kind: str, y_true: torch.Tensor, y_pred: torch.Tensor, **settings: float) -> float:
    total, weight = LOSSES[kind](**settings)(y_true=y_true, y_pred=y_pred)
    return float(total / weight)


def test_formulas() -> None:
    y_true, y_pred = example("mse")
    assert mean("mse", y_true, y_pred) == pytest.approx(F.mse_loss(y_pred, y_true).item())
    assert mean("huber", y_true, y_pred, delta=0.5) == pytest.approx(F.huber_loss(y_pred, y_true, delta=0.5).item())
    poisson = F.poisson_nll_loss(y_pred, y_true, log_input=False, eps=1e-7).item()
    assert mean("poisson", y_true, y_pred) == pytest.approx(poisson, rel=1e-6)
    assert mean("poisson_multinomial", y_true, y_pred) == pytest.approx(poisson, rel=1e-5)  # the two with weight 1
    y_true, y_pred = example("cross_entropy")
    expected = F.cross_entropy(y_pred, y_true.argmax(1), weight=torch.tensor([1.0, 2.0, 3.0, 4.0])).item()
    total, weight = CrossEntropy()(y_true=y_true, y_pred=y_pred, weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert float(total / weight) == pytest.approx(expected)


def test_positive_weight_per_track() -> None:
    y_true, y_pred = example("bce")
    total, _ = BinaryCrossEntropy((1.0, 2.0, 3.0, 4.0))(y_true=y_true, y_pred=y_pred)
    each = [BinaryCrossEntropy(k + 1.0)(y_true=y_true[:, [k]], y_pred=y_pred[:, [k]])[0] for k in range(4)]
    assert torch.allclose(total, sum(each))
    with pytest.raises(ConfigError, match="has 3 values for 4 tracks"):
        BinaryCrossEntropy((1.0, 2.0, 3.0))(y_true=y_true, y_pred=y_pred)


def test_weight_range_falls_towards_the_ends() -> None:
    weights = PoissonMultinomial(weight_range=8, weight_exp=6).position_weights(torch.zeros(1, 1, 101))
    assert weights[50] == 1
    assert torch.allclose(weights[[0, -1]], torch.tensor(1 / 8))
    assert torch.equal(weights, weights.flip(0))


def test_a_prediction_of_zero_stays_finite() -> None:
    y_pred = torch.zeros(1, 1, 4, requires_grad=True)
    total, _ = PoissonMultinomial(0.2)(y_true=torch.ones(1, 1, 4), y_pred=y_pred)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(y_pred.grad).all()


def test_bad_settings_and_shapes() -> None:
    for make in (
        lambda: PoissonMultinomial(total_weight=-1),
        lambda: PoissonMultinomial(weight_range=0.5),
        lambda: Huber(delta=0),
        lambda: BinaryCrossEntropy(0.0),
    ):
        with pytest.raises(ConfigError, match="loss"):
            make()
    with pytest.raises(DataError, match="differ in shape"):
        Poisson()(y_true=torch.ones(1, 1, 2), y_pred=torch.ones(1, 1, 3))


def test_parity_with_the_reference(shared: Path) -> None:
    """Each (window, track) of the reference network; its loss without the L2 terms, which are the optimiser's."""
    with np.load(shared / "reference/parity/trained_0.6M/reference_loss.npz") as stored:
        y_true, y_pred = (torch.tensor(stored[key]).mT for key in ("y_true", "y_pred"))
        for total_weight in (1, 0.2):
            for reach, exponent in ((1, 1), (8, 6)):
                loss = PoissonMultinomial(total_weight, reach, exponent)
                expected = stored[f"pmn_tw{total_weight}_wr{reach}_we{exponent}_rs0"]
                for row, track in np.ndindex(*expected.shape):
                    cell = slice(row, row + 1), slice(track, track + 1)
                    value = float(loss(y_true=y_true[cell], y_pred=y_pred[cell])[0])
                    assert value == pytest.approx(expected[row, track], rel=1e-5, abs=1e-6)
        total, weight = PoissonMultinomial(0.2)(y_true=y_true, y_pred=y_pred)
        assert float(total / weight) == pytest.approx(float(stored["pmn_class_tw0.2"]), rel=2e-6)
        total, weight = Poisson()(y_true=y_true, y_pred=y_pred)
        assert float(total / weight) == pytest.approx(float(stored["poisson_keras"]), rel=2e-6)
