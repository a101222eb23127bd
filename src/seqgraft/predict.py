"""Predictions: batches, strand and shift ensembles, embeddings."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqgraft.data.augment import Augmentation, View
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ModelError
from seqgraft.models.base import SequenceModel, State, mean_of_haplotypes, mean_of_valid
from seqgraft.progress import progress
from seqgraft.sample import Sample

__all__ = [
    "FORWARD_ONLY",
    "Precision",
    "autocast",
    "automatic_precision",
    "embed",
    "features",
    "has_bf16",
    "predict",
    "predict_batches",
    "resolve_precision",
]

Precision = Literal["float32", "bf16"]
#: Parameters of a trunk above which "auto" means bf16. On one core with avx512_bf16, a training step of trunks of 10 to
#: 46 million takes 1.8 to 2.3 times less processor time in it, one of 0.2 to 5 million 1.1 to 1.6 times less: there,
#: rounding to 8 binary digits buys little.
BF16_PARAMETERS = 10_000_000
_HELD = 50  # batches that are put in the order of their lengths together
_HELD_DONORS = 65_536  # rows of donors whose sequences run together
FORWARD_ONLY = Augmentation(reverse_complement=False, shift=0)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 where it pays, float32 elsewhere. float16 is not offered: on CPU it is some 60 times slower."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def has_bf16() -> bool:
    """Whether the processor that training would run on, the accelerator if there is one, computes in bfloat16 natively.

    Elsewhere it is emulated, which costs time instead of saving it.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def automatic_precision(parameters: int, native: bool) -> Precision:
    """What "auto" means for a trunk of so many parameters on a processor that has bfloat16, or has not."""
    return "bf16" if native and parameters > BF16_PARAMETERS else "float32"


def resolve_precision(wanted: str, model: SequenceModel) -> Precision:
    """``wanted``, or for "auto" what this model and this machine make of it."""
    if wanted == "auto":
        return automatic_precision(sum(p.numel() for p in model.trunk.parameters()), has_bf16())
    return "bf16" if wanted == "bf16" else "float32"


def predict_batches(
    model: SequenceModel,
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    *,
    ensemble: Augmentation = FORWARD_ONLY,
    batch_size: int = 16,
    precision: Precision = "float32",
    what: str = "predict",
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Yields ``(rows, values)`` per batch: values ``(batch, tracks, bins)`` on the model's (squashed) scale.

    Predictions are averaged over the views of ``ensemble``; those of the other strand are turned round first and the
    strands of each pair change places. The result does not depend on ``batch_size``.
    """

    def one(sample: Sample, view: View) -> Tensor:
        values = model.predict(sample)
        return (
            values.flip(-1)[:, torch.as_tensor(model.tracks.permutation, device=values.device)]
            if view.reverse
            else values
        )

    yield from _over_views(model, dataset, rows, one, ensemble, batch_size, precision, what)


def predict(
    model: SequenceModel,
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    *,
    ensemble: Augmentation = FORWARD_ONLY,
    batch_size: int = 16,
    precision: Precision = "float32",
    what: str = "predict",
) -> npt.NDArray[np.float32]:
    """All predictions of ``rows`` at once, ``(rows, tracks, bins)``, on the model's (squashed) scale."""
    parts = [
        values
        for _, values in predict_batches(
            model, dataset, rows, ensemble=ensemble, batch_size=batch_size, precision=precision, what=what
        )
    ]
    return np.concatenate(parts) if parts else np.empty((0, len(model.tracks), dataset.info.bins), dtype=np.float32)


def embed(
    model: SequenceModel,
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    *,
    ensemble: Augmentation = FORWARD_ONLY,
    batch_size: int = 16,
    precision: Precision = "float32",
) -> npt.NDArray[np.float32]:
    """The trunk's features, averaged over the valid bins: ``(rows, channels)``."""

    def one(sample: Sample, view: View) -> Tensor:  # noqa: ARG001  (features of both strands are averaged as they are)
        state: State = model.trunk(sample.codes, sample.lengths)
        return mean_of_valid(state)[:, :, 0].float()

    parts = [values for _, values in _over_views(model, dataset, rows, one, ensemble, batch_size, precision, "embed")]
    return np.concatenate(parts) if parts else np.empty((0, model.trunk.spec.channels), dtype=np.float32)


def features(
    model: SequenceModel, dataset: Dataset, rows: npt.NDArray[np.int64], *, batch_size: int = 16
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Yields ``(rows, values)`` per batch: the trunk's features ``(batch, channels, bins)``, or one bin for labels."""
    labels = dataset.info.bins == 1

    def one(sample: Sample, view: View) -> Tensor:  # noqa: ARG001  (forward only)
        state: State = model.trunk(sample.codes, sample.lengths)
        return mean_of_valid(state) if labels else state.x

    yield from _over_views(model, dataset, rows, one, FORWARD_ONLY, batch_size, "float32", "features")


def _over_views(
    model: SequenceModel,
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    one: Callable[[Sample, View], Tensor],
    ensemble: Augmentation,
    batch_size: int,
    precision: Precision,
    what: str,
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Batches of rows in their order, averaged over views.

    Stored sequences run in the order of their lengths, some batches at a time, so that little of a batch is padding. Of
    donors each distinct sequence runs once for many rows, which are the means of their haplotypes.
    """
    if dataset.donors is not None:
        for start in range(0, len(rows), _HELD_DONORS):
            piece = rows[start : start + _HELD_DONORS]
            stored = dataset.stored(piece)
            with closing(_batches(model, dataset, stored, one, ensemble, batch_size, precision, what)) as batches:
                found = torch.from_numpy(np.concatenate(list(batches)))
            owned = dataset.donors.haplotypes_of(piece)
            places = torch.from_numpy(np.where(owned >= 0, np.searchsorted(stored, owned), -1))
            for first in range(0, len(piece), batch_size):
                some = slice(first, first + batch_size)
                yield piece[some], mean_of_haplotypes(found, places[some]).numpy()
        return
    held = _HELD * batch_size if dataset.info.bins == 1 else batch_size  # of labels little is held
    pieces = [rows[start : start + held] for start in range(0, len(rows), held)]
    orders = [dataset.length_order(piece) for piece in pieces]
    queue = np.concatenate([rows[:0], *(piece[order] for piece, order in zip(pieces, orders, strict=True))])
    with closing(_batches(model, dataset, queue, one, ensemble, batch_size, precision, what)) as batches:
        for piece, order in zip(pieces, orders, strict=True):
            starts = range(0, len(piece), batch_size)
            values = np.concatenate([next(batches) for _ in starts])[np.argsort(order)]
            for start in starts:
                yield piece[start : start + batch_size], values[start : start + batch_size]


def _batches(
    model: SequenceModel,
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    one: Callable[[Sample, View], Tensor],
    ensemble: Augmentation,
    batch_size: int,
    precision: Precision,
    what: str,
) -> Generator[npt.NDArray[np.float32]]:
    """The values of one batch of stored sequences after the other."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    views = ensemble.views()
    starts = range(0, len(rows), batch_size)
    try:
        for start in progress(starts, what, total=len(starts)):
            chosen = rows[start : start + batch_size]
            with torch.inference_mode(), autocast(precision, device):
                total = sum(
                    one(dataset.stored_sample(chosen, [view] * len(chosen)).to(device), view).float() for view in views
                )
            assert isinstance(total, Tensor)
            values = (total / len(views)).cpu().numpy()
            if not np.isfinite(values).all():
                raise ModelError(
                    "the model predicts values that are not finite",
                    where=f"rows {int(chosen.min())} to {int(chosen.max())}",
                    remedy="Train with a lower learning rate, or in float32",
                )
            yield values
    finally:
        model.train(was_training)
