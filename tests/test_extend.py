"""New heads beside those of a trained network: what becomes of its 74 tracks, by adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch

from seqgraft.adapters import Adapter, FullFineTune, LinearProbe, LoRA, adapt
from seqgraft.data.dataset import Dataset, DatasetInfo, open_dataset, write_dataset
from seqgraft.data.tables import read_track_table
from seqgraft.evaluate import EvaluateConfig, evaluate_model
from seqgraft.models.base import SequenceModel
from seqgraft.models.baskerville import convert_baskerville
from seqgraft.models.weights import ModelConfig, build_model, build_pretrained
from seqgraft.objectives import Elementwise
from seqgraft.predict import predict
from seqgraft.tracks import TrackTable, unsquash
from seqgraft.train import TrainConfig, fit

WINDOW, BINS, BIN_SIZE = 32768, 512, 32  # the middle of the network's own windows, which costs a quarter
ROWS = {"train": 4, "valid": 2, "test": 4}


def cut(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    first = (array.shape[-1] - size) // 2
    return array[..., first : first + size]


def write(folder: Path, files: Path, tracks: TrackTable, targets: npt.NDArray[Any], codes: npt.NDArray[Any]) -> Dataset:
    fold = np.repeat(list(ROWS), list(ROWS.values()))
    regions = pd.DataFrame({"chrom": "", "start": 0, "end": 0, "strand": "+", "name": "", "fold": fold})
    with write_dataset(folder, targets.shape) as writer:
        writer.targets[:] = targets
        lengths = np.full(len(codes), WINDOW)
        writer.finish(DatasetInfo("coverage", WINDOW, BINS, BIN_SIZE), regions, tracks, codes=codes, lengths=lengths)
    return open_dataset(folder)


@pytest.fixture(scope="module")
def files(shared: Path) -> Path:
    return shared / "reference" / "parity" / "trained_0.6M"


@pytest.fixture(scope="module")
def data(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset, ModelConfig]:
    """Two cell types' tracks on real windows, the network's 74 own on the same, and the network."""
    root = tmp_path_factory.mktemp("extend")
    old = read_track_table(files / "targets.txt")
    codes, targets = [], []
    for fold, count in ROWS.items():
        with np.load(files / f"tiny_hg38_{fold}.npz", allow_pickle=False) as stored:
            codes.append(cut(stored["seq_index"][:count], WINDOW))
            targets.append(cut(stored["targets"][:count].transpose(0, 2, 1), BINS).astype(np.float64))
    raw = unsquash(np.concatenate(targets), old, BIN_SIZE)
    original = write(root / "original", files, old, raw, np.concatenate(codes))
    open_ = old.groups["DNASE"][:2]
    new = TrackTable.build({"name": f"{c}_atac", "group": "atac", "condition": c, "scale": 0.01} for c in ("B", "T"))
    cells = write(root / "cells", files, new, raw[:, open_], np.concatenate(codes))
    convert_baskerville(
        files / "model.h5", files / "params.json", root / "model", files / "targets.txt",
        name="trained-0.6M", licence="Apache-2.0", citation="",
    )  # fmt: skip
    return cells, original, ModelConfig(str(root / "model"), head="extend")


def extended(cells: Dataset, start: ModelConfig, adapter: Adapter, folder: Path) -> SequenceModel:
    """After two steps of training."""
    torch.manual_seed(0)
    model = build_model(start, cells.tracks, cells.info)
    adapt(model, adapter)
    settings = TrainConfig(epochs=1, batch_size=2, lr=1e-3, warmup=0, precision="float32")
    fit(model, cells, Elementwise(cells.tracks), settings, folder)
    return model.eval()


@pytest.mark.parametrize("adapter", [LinearProbe(), LoRA(rank=4), FullFineTune()], ids=lambda a: str(a.kind))
def test_the_74_tracks_of_a_trained_network(
    adapter: Adapter, data: tuple[Dataset, Dataset, ModelConfig], tmp_path: Path
) -> None:
    """To the bit under a linear probe; else evaluation says how far they moved, against before and on their data."""
    cells, original, start = data
    reference = build_pretrained(start, cells.info)
    assert reference is not None
    assert len(reference.tracks) == 74
    rows = cells.rows("test")
    before = predict(reference, cells, rows, batch_size=2)
    model = extended(cells, start, adapter, tmp_path)
    assert model.tracks.names == [*cells.tracks.names, *reference.tracks.names]
    after = predict(model, cells, rows, batch_size=2)[:, 2:]
    frozen = isinstance(adapter, LinearProbe)
    assert np.array_equal(after, before) == frozen
    config = EvaluateConfig(draws=10, block=1, baselines=(), batch_size=2)
    table = evaluate_model(model, cells, config, "run", start).metrics
    moved = table[table["metric"] == "agreement"]
    if frozen:
        assert moved.empty  # there is nothing to tell
    else:
        named = moved[moved["track"] != ""].set_index("track")["value"]
        assert set(named.index) == set(reference.tracks.names)
        assert named.max() < 1
        assert named.median() > 0
        by_hand = [np.corrcoef(before[:, i].ravel(), after[:, i].ravel())[0, 1] for i in range(74)]
        np.testing.assert_allclose(named[reference.tracks.names], by_hand, rtol=1e-4)
    config = EvaluateConfig(draws=10, block=1, baselines=(), batch_size=2, original=original.folder)
    table = evaluate_model(model, cells, config, "run", start).metrics
    forgotten = table[(table["metric"] == "forgetting") & (table["track"] != "")]
    assert len(forgotten) == 74
    assert forgotten["value"].notna().sum() >= 65  # a track may be constant in the few test windows
    assert (forgotten["value"].dropna() == 0).all() == frozen
    scores = table[(table["metric"] == "original_pearson") & (table["track"] == "")]
    assert scores.groupby("model")["value"].mean()["pretrained, before"] > 0.3
