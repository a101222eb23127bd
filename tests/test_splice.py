"""A published network of human splice sites as a trunk: it finds those of yeast, and what it knows is worth having."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from seqgraft.adapters import LoRA, adapt
from seqgraft.cache import frozen_prefix
from seqgraft.data import Dataset
from seqgraft.models.base import Step, weight_hash
from seqgraft.models.folders import TRUNKS, register
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.models.wrap import wrap
from seqgraft.run import open_run

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "splice" / "compare.py"


@pytest.fixture(scope="module")
def splice(shared: Path) -> Iterator[ModuleType]:
    """examples/splice/compare.py, with its network registered."""
    spec = importlib.util.spec_from_file_location("splice_compare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQGRAFT_SHARED", str(shared))
        patch.setitem(sys.modules, "splice_compare", module)
        spec.loader.exec_module(module)
        register(module.SPEC.name, module.network, module.SPEC)
        yield module
        del TRUNKS[module.SPEC.name]


@pytest.fixture(scope="module")
def out(splice: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splice")
    splice.prepare(folder, per_site=2)
    return folder


@pytest.fixture(scope="module")
def dataset(splice: ModuleType, out: Path) -> Dataset:
    made: Dataset = splice.prepare(out, per_site=2)
    return made


def test_the_published_network_is_a_trunk(splice: ModuleType) -> None:
    network = splice.published()
    trunk = wrap(network.stages(), splice.SPEC).eval()
    assert [stage.steps for stage in trunk.stages.values()] == [
        (Step("conv", 1),),
        (Step("conv", 81), Step("crop", 40)),
        (Step("conv", 321), Step("crop", 160)),
        (Step("conv", 1),),
        (Step("crop", 0),),
    ]
    assert {site: len(names) for site, names in trunk.spec.sites.items()} == {"conv": 20, "norm": 16}
    codes = torch.randint(0, 4, (2, 451), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = trunk(codes).x
        assert features.shape == (2, 32, 51)
        x = nn.functional.one_hot(codes.long(), 4).float().transpose(1, 2)
        assert torch.allclose(network.final_conv(features), network(x), atol=1e-5)


def test_sites_of_introns_and_decoys(dataset: Dataset) -> None:
    """All candidates end or begin alike; the windows are on the strand of their genes."""
    truth = dataset.raw_targets(np.arange(len(dataset)))[..., 0]
    codes = dataset.sample(np.arange(len(dataset))).codes.numpy()
    acceptor, donor = (~np.isnan(truth[:, track]) for track in (0, 1))
    assert (acceptor ^ donor).all()
    assert (codes[acceptor][:, 198:200] == [0, 2]).all()  # AG | first base of the exon
    assert (codes[donor][:, 201:203] == [2, 3]).all()  # last base of the exon | GT
    assert np.nansum(truth, axis=0).tolist() == pytest.approx([250, 250], abs=30)
    chroms = dataset.regions.groupby("fold")["chrom"].agg(set)
    assert chroms["test"] == {"chrIV", "chrXIV", "chrXVI"}
    assert chroms["valid"] == {"chrII"}


def test_the_network_finds_sites_of_yeast_untrained(splice: ModuleType, dataset: Dataset) -> None:
    """Measured with five decoys per site: acceptors 0.963, donors 0.903."""
    scores = splice.zero_shot(dataset, dataset.rows("test"))
    assert scores["acceptor"] > 0.93
    assert scores["donor"] > 0.85


def paired(differences: pd.DataFrame) -> dict[str, float]:
    """Lower end of the interval of the difference to random weights, by track."""
    rows = differences.query("baseline == 'random weights' and metric == 'auroc' and track != ''")
    return dict(zip(rows["track"], rows["low"], strict=True))


def test_its_features_beat_those_of_random_weights(splice: ModuleType, out: Path, dataset: Dataset) -> None:
    evaluation = splice.against_random(out, "linear probe", 1, epochs=8)
    assert paired(evaluation.differences)["acceptor"] > 0.1
    assert paired(evaluation.differences)["donor"] > 0
    kmers = evaluation.differences.query("baseline == 'k-mer regression' and track == 'acceptor' and metric == 'auroc'")
    assert float(kmers["low"].iloc[0]) > 0.05
    run = open_run(out / "runs" / "linear-probe-pretrained-1")
    assert run.model.trunk.spec.licence == "GPL-3.0"
    plain = build_model(ModelConfig(splice.SPEC.name), dataset.tracks, dataset.info)
    assert weight_hash(plain.trunk) == weight_hash(run.model.trunk)


def test_a_prefix_of_its_stages_can_stay_frozen(splice: ModuleType, dataset: Dataset) -> None:
    model = build_model(ModelConfig(splice.SPEC.name), dataset.tracks, dataset.info)
    adapt(model, LoRA(rank=4, where=("conv",), last=5))
    assert frozen_prefix(model.trunk)[0] == ["stem", "near"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LoCon", "full"])
def test_fine_tuning_it_beats_training_from_scratch(method: str, splice: ModuleType, out: Path) -> None:
    evaluation = splice.against_random(out, method, 1)
    assert paired(evaluation.differences)["acceptor"] > 0
