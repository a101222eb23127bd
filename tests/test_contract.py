"""The contract: every trunk x adapter x source goes the whole way, from raw files to an evaluated, reloaded run.

Registering something is testing it: an entry of TRUNKS, ADAPTERS or SOURCES without settings here fails.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from builders import BLOCKS, BORZOI, FLASHZOI, LANGUAGE, LLAMA, MOSAIC, ROTARY, write_h5ad
from seqgraft import run as runs
from seqgraft.adapters import ADAPTERS
from seqgraft.bigwig import runs as runs_of
from seqgraft.bigwig import write_bigwig
from seqgraft.data import SOURCES, open_dataset
from seqgraft.experiment import parse_experiment, read_experiment
from seqgraft.genome import Genome, Interval
from seqgraft.models.base import SequenceModel
from seqgraft.models.folders import TRUNKS
from seqgraft.plan import plan_run
from seqgraft.predict import predict
from seqgraft.sequence import decode

Settings = Mapping[str, Any]

#: A size at which each trunk trains in a second, and the bins that it can give.
TRUNK_SETTINGS: dict[str, Settings] = {
    "convnet": {"channels": 16, "depth": 2, "blocks": 1},
    "borzoi": BORZOI,
    "enformer": {"channels": 24, "depth": 1, "heads": 2, "key_size": 4, "divisible_by": 2, "positions": 16},
    "language": {**LANGUAGE, "depth": 1},
    "transformers": {"config": LLAMA},
}

#: Settings with which a trunk runs other code, and the sources that they are tested on.
VARIANTS: dict[str, tuple[str, Settings, tuple[str, ...]]] = {
    "flashzoi": ("borzoi", FLASHZOI, ("binary",)),
    "blocks": ("language", {**BLOCKS, "depth": 1}, ("coverage",)),
    "mosaic": ("language", {**MOSAIC, "depth": 1}, ("binary",)),
    "rotary": ("language", {**ROTARY, "depth": 1}, ("regression",)),
}

#: Trunks without convolutions, and what adapters that need some ask for.
WITHOUT_CONVS = {"language", "transformers", "blocks", "mosaic", "rotary"}
NEEDS_CONVS = {"LoRA conv", "LoCon", "IA3 conv", "Houlsby + SE"}
NEEDS_TOKENS = {"prompt"}  # that trunks without convolutions read

#: Trunks that share almost all of their way with another, and the sources that they are tested on.
FEW_SOURCES = {"transformers": ("coverage", "binary")}

#: Sources that end in what another ends in, and the trunk and adapter that they are tested with.
FEW_CASES = {
    "fragments": ("convnet", "linear probe"),
    "h5ad": ("convnet", "linear probe"),
    "windows": ("", ""),
}  # without tracks: test_masked.py

#: Sources whose examples are several sequences each: every adapter is tested with this trunk, every trunk with this
#: adapter.
CROSSED = {"personal": ("convnet", "LoRA")}

ADAPTER_SETTINGS: dict[str, dict[str, Settings]] = {
    "linear_probe": {"linear probe": {}},
    "full": {"full": {}, "full, statistics": {"statistics": "batch"}},
    "lora": {
        "LoRA": {"rank": 2},
        "LoRA conv": {"rank": 2, "where": ["attention", "conv"]},
        "LoCon": {"rank": 2, "where": ["conv"], "last": 2},
        "DoRA": {"rank": 2, "dora": True},
        "QLoRA": {"rank": 2, "quantize": "nf4"},
    },
    "ia3": {"IA3": {}, "IA3 conv": {"where": ["attention", "conv"]}},
    "houlsby": {"Houlsby": {"bottleneck": 8}, "Houlsby + SE": {"bottleneck": 8, "squeeze_excite": 8}},
    "prompt": {"prompt": {"tokens": 4}},
    "peft": {"LoHa": {"type": "loha", "settings": {"r": 2, "alpha": 2}}},
}

#: Source kind -> datasets made by it.
SOURCE_CASES: dict[str, tuple[str, ...]] = {
    "coverage": ("coverage",),
    "fragments": ("fragments",),
    "h5ad": ("h5ad",),
    "labelled": ("binary", "multiclass", "regression"),
    "peaks": ("peaks",),
    "personal": ("personal",),
    "windows": ("windows",),
}

CHROMS = {"chr1": 4000, "chr2": 1600, "chr3": 1600}
FOLDS = {"by": "chromosome", "valid": ["chr2"], "test": ["chr3"]}


# What has no settings makes no case here, and `test_registering_is_testing` fail.
CASES = [
    pytest.param(trunk, kind, label, source, id=f"{trunk}-{label}-{source}")
    for trunk in TRUNK_SETTINGS
    if trunk in TRUNKS
    for kind in ADAPTER_SETTINGS
    if kind in ADAPTERS
    for label in ADAPTER_SETTINGS[kind]
    if label not in (NEEDS_CONVS if trunk in WITHOUT_CONVS else NEEDS_TOKENS)
    for source in itertools.chain.from_iterable(SOURCE_CASES[entry] for entry in SOURCE_CASES if entry in SOURCES)
    if source in FEW_SOURCES.get(trunk, (source,))
    if (trunk, label) == FEW_CASES.get(source, (trunk, label))
    if source not in CROSSED or trunk == CROSSED[source][0] or label == CROSSED[source][1]
]
CASES += [
    pytest.param(variant, kind, label, source, id=f"{variant}-{label}-{source}")
    for variant, (_, _, sources) in VARIANTS.items()
    for kind in ADAPTER_SETTINGS
    for label in ADAPTER_SETTINGS[kind]
    if label not in (NEEDS_CONVS if variant in WITHOUT_CONVS else NEEDS_TOKENS)
    for source in sources
]


def test_registering_is_testing() -> None:
    for registry, settings in ((TRUNKS, TRUNK_SETTINGS), (ADAPTERS, ADAPTER_SETTINGS), (SOURCES, SOURCE_CASES)):
        missing = sorted(set(registry) - {name for name, cases in settings.items() if cases is not None})
        stale = sorted(set(settings) - set(registry))
        assert not missing, f"Give {missing} settings in {Path(__file__).name}: whatever is registered is tested."
        assert not stale, f"{stale} are not registered."
    assert all(ADAPTER_SETTINGS.values())
    assert all(SOURCE_CASES.values())


# Raw files


def _coverage(folder: Path) -> Settings:
    rng = np.random.default_rng(1)
    for name in ("rna+", "rna-", "atac"):
        signal = {chrom: np.repeat(rng.poisson(2.0, size // 16), 16).astype(float) for chrom, size in CHROMS.items()}
        values = itertools.chain.from_iterable(runs_of(chrom, dense) for chrom, dense in signal.items())
        write_bigwig(folder / f"{name}.bw", CHROMS, values)
    squashes = {"group": "rna", "squash": "sqrt", "scale": 0.1}
    tracks = [{"name": name, "file": str(folder / f"{name}.bw"), **squashes} for name in ("rna+", "rna-")]
    atac = {"name": "atac", "file": str(folder / "atac.bw"), "group": "atac", "statistic": "mean"}
    return {
        "kind": "coverage",
        "fasta": str(_genome(folder)),
        "tracks": [*tracks, atac],
        "window": 256,
        "target_length": 192,
        "bin_size": 16,
        "folds": FOLDS,
    }


def _fragments(folder: Path) -> Settings:
    """Three groups of cells in one ATAC file."""
    rng = np.random.default_rng(4)
    cells = [f"cell{number}-1" for number in range(30)]
    labels = "".join(f"{cell},type{number % 3}\n" for number, cell in enumerate(cells))
    (folder / "cells.csv").write_text("barcode,type\n" + labels)
    lines = [
        f"{chrom}\t{start}\t{start + 50}\t{rng.choice(cells)}\t1\n"
        for chrom, size in CHROMS.items()
        for start in np.sort(rng.integers(0, size - 50, size))
    ]
    (folder / "atac.tsv").write_text("".join(lines))
    return {
        "kind": "fragments",
        "fasta": str(_genome(folder)),
        "assays": [{"name": "atac", "count": "insertions", "files": [{"path": str(folder / "atac.tsv")}]}],
        "labels": {"path": str(folder / "cells.csv"), "group": "type"},
        "window": 256,
        "target_length": 192,
        "bin_size": 16,
        "folds": FOLDS,
    }


def _h5ad(folder: Path) -> Settings:
    """Three groups of cells, and peaks that lie side by side."""
    rng = np.random.default_rng(5)
    peaks = [f"{chrom}:{start}-{start + 80}" for chrom, size in CHROMS.items() for start in range(0, size - 80, 160)]
    types = [f"type{number % 3}" for number in range(12)]
    write_h5ad(folder / "cells.h5ad", rng.poisson(2, (12, len(peaks))), peaks, types)
    fasta = str(_genome(folder))
    source = {"kind": "h5ad", "path": str(folder / "cells.h5ad"), "group": "type", "genome": fasta}
    return {**source, "window": 64, "folds": FOLDS}


def _genome(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    contigs = {chrom: decode(rng.integers(0, 4, size).astype(np.uint8)) for chrom, size in CHROMS.items()}
    (folder / "genome.fa").write_text("".join(f">{chrom}\n{letters}\n" for chrom, letters in contigs.items()))
    return folder / "genome.fa"


def _labelled(folder: Path, label: Callable[[float], object]) -> Settings:
    rng = np.random.default_rng(2)
    rows = []
    for number in range(40):
        length = int(rng.integers(60, 100))
        codes = rng.choice(4, length, p=rng.dirichlet([3, 3, 3, 3])).astype(np.uint8)
        fold = ("train", "train", "valid", "test")[number % 4]
        rows.append({"sequence": decode(codes), "label": label(float(np.isin(codes, (1, 2)).mean())), "fold": fold})
    rows[0]["label"] = None  # a missing label is masked
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    return {"kind": "labelled", "files": [{"path": str(folder / "labels.csv")}], "folds": {"by": "column"}}


def _peaks(folder: Path) -> Settings:
    rng = np.random.default_rng(3)
    peaks = [
        f"{chrom}\t{start}\t{start + 40}\n"
        for chrom, size in CHROMS.items()
        for start in rng.choice(np.arange(200, size - 200, 200), 5, replace=False)
    ]
    (folder / "peaks.bed").write_text("".join(peaks))
    return {
        "kind": "peaks",
        "peaks": str(folder / "peaks.bed"),
        "genome": str(_genome(folder)),
        "window": 64,
        "folds": FOLDS,
        "max_skipped": 0.2,
    }


def _personal(folder: Path) -> Settings:
    """Genes of 24 diploid donors, of which every donor has one in eight alleles that change a base or insert two."""
    rng = np.random.default_rng(6)
    genome = Genome.open(_genome(folder))
    donors = [f"donor{number}" for number in range(24)]
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *donors]
    lines, starts = ["##fileformat=VCFv4.2", "\t".join(columns)], []
    for chrom, size in CHROMS.items():
        starts += [(f"{chrom}_{start}", chrom, start, "+") for start in range(200, size - 200, 1200)]
        for position in range(60, size - 60, 20):
            ref = decode(genome.codes(Interval(chrom, position - 1, position)))
            alt = ref + "CA" if position % 3 else "ACGT"["ACGT".index(ref) - 1]
            calls = ["|".join(map(str, pair)) for pair in rng.binomial(1, 0.125, (len(donors), 2))]
            lines.append("\t".join([chrom, str(position), ".", ref, alt, ".", "PASS", ".", "GT", *calls]))
    (folder / "donors.vcf").write_text("\n".join(lines) + "\n")
    genes = pd.DataFrame(starts, columns=["gene", "chrom", "tss", "strand"])
    genes.to_csv(folder / "genes.tsv", sep="\t", index=False)
    expression = pd.DataFrame(rng.normal(size=(len(genes), len(donors))), genes["gene"], donors)
    expression.to_csv(folder / "expression.tsv", sep="\t")
    return {
        "kind": "personal",
        "genome": str(genome.path),
        "vcf": str(folder / "donors.vcf"),
        "expression": {"file": str(folder / "expression.tsv")},
        "genes": {"file": str(folder / "genes.tsv")},
        "window": 64,
        "donor_folds": {"by": "random", "valid": 0.2, "test": 0.2},
        "gene_folds": {"by": "chromosome", "test": ["chr3"]},
    }


WRITERS: dict[str, Callable[[Path], Settings]] = {
    "coverage": _coverage,
    "fragments": _fragments,
    "h5ad": _h5ad,
    "binary": lambda folder: _labelled(folder, lambda share: int(share > 0.5)),
    "multiclass": lambda folder: _labelled(folder, lambda share: "abc"[(share > 0.45) + (share > 0.55)]),
    "regression": lambda folder: _labelled(folder, lambda share: round(8 * share + 0.01, 3)),
    "peaks": _peaks,
    "personal": _personal,
    "windows": lambda folder: {"kind": "windows", "fasta": str(_genome(folder)), "window": 64, "folds": FOLDS},
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The prepared dataset of a case, made once by ``prepare`` from raw files."""
    root = tmp_path_factory.mktemp("contract")
    made: dict[str, Path] = {}

    def folder_of(case: str) -> Path:
        if case not in made:
            raw = root / case
            raw.mkdir()
            (raw / "data.yaml").write_text(yaml.safe_dump(dict(WRITERS[case](raw))))
            runs.prepare(raw / "data.yaml", raw / "prepared")
            made[case] = raw / "prepared"
        return made[case]

    return folder_of


@pytest.mark.parametrize("case", [case for cases in SOURCE_CASES.values() for case in cases])
def test_sources(case: str, prepared: Callable[[str], Path]) -> None:
    dataset = open_dataset(prepared(case))
    assert {"train", "valid", "test"} <= set(dataset.regions["fold"])
    assert set(dataset.tracks.frame["link"]) == {
        "coverage": {"softplus"},
        "fragments": {"softplus"},
        "h5ad": {"identity"},
        "binary": {"sigmoid"},
        "peaks": {"sigmoid"},
        "multiclass": {"softmax"},
        "regression": {"identity"},
        "personal": {"identity"},
    }.get(case, set(dataset.tracks.frame["link"]))


@pytest.mark.parametrize(("trunk", "kind", "label", "case"), CASES)
def test_the_whole_way(
    trunk: str,
    kind: str,
    label: str,
    case: str,
    prepared: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = ADAPTER_SETTINGS[kind][label]
    if settings.get("quantize") and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    name, chosen, _ = VARIANTS.get(trunk, (trunk, TRUNK_SETTINGS.get(trunk), ()))
    experiment = parse_experiment(
        {
            "data": str(prepared(case)),
            "model": {"name": name, "settings": chosen, "unknown": 0.05},  # windows reach beyond the small contigs
            "adapter": {"kind": kind, **settings},
            "train": {"epochs": 2, "batch_size": 4, "lr": 0.003},
            "evaluate": {"draws": 20, "block": 400, "linearity": 2},
        }
    )
    folder = tmp_path / "run"

    plan = plan_run(experiment, folder)
    assert plan.would_start, plan.problems
    assert not folder.exists()

    live: list[SequenceModel] = []
    fit = runs.fit

    def watched(model: SequenceModel, *args: Any, **kwargs: Any) -> Any:
        live.append(model)
        return fit(model, *args, **kwargs)

    monkeypatch.setattr(runs, "fit", watched)
    result = runs.fit_run(experiment, folder)
    assert result.epochs == 2
    assert np.isfinite(result.best_score)
    assert read_experiment(folder / "experiment.yaml") == runs.with_precision(experiment, live[0])
    assert {path.name for path in folder.iterdir()} == {
        *("adapter", "checkpoints", "environment.json", "experiment.yaml", "log.csv")
    }

    opened = runs.open_run(folder)
    rows = np.arange(len(opened.dataset))
    expected, found = (predict(model, opened.dataset, rows) for model in (live[0], opened.model))
    assert np.abs(found - expected).max() == 0.0
    assert found.shape == (len(rows), len(opened.dataset.tracks), opened.dataset.info.bins)
    untrained, _ = runs.build_run(experiment)
    assert not np.array_equal(predict(untrained, opened.dataset, rows), found)
    assert not any(torch.equal(a, b) for a, b in _trained(opened.model, untrained)), "a tensor did not train"

    _check_table(runs.evaluate_run(folder).metrics, runs.label_of(experiment), case)
    assert (folder / "evaluation" / "metrics.parquet").exists()


def _trained(model: SequenceModel, untrained: SequenceModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The parameters that train, where the untrained model has them too, and are not scalars or all zeros."""
    before = dict(untrained.named_parameters())
    return [
        (p.detach(), before[name].detach())
        for name, p in model.named_parameters()
        if p.requires_grad and name in before
    ]


def _check_table(table: pd.DataFrame, label: str, case: str) -> None:
    if case == "personal":
        _check_donors(table, label)
        return
    coverage = case in ("coverage", "fragments")
    baselines = {"mean profile", "3-mer ridge"} if coverage else {"k-mer regression", "majority"}
    ceiling = {"split-half ceiling"} if case == "fragments" else set()
    shares = {"share of the ceiling", "share of cell types"} if case == "fragments" else set()
    assert set(table["model"]) == {label, *baselines, *ceiling}
    assert set(table["unit"]) == ({"squashed", "raw", *shares} if coverage else {"label"})
    assert set(table["fold"]) == {"test"}
    run = table[(table["model"] == label) & (table["track"] == "") & ~table["unit"].isin(shares)]
    assert np.isfinite(run["value"]).all(), run
    _check_rows(table)


def _check_donors(table: pd.DataFrame, label: str) -> None:
    linear = {"top SNP", "ridge on dosage (BLUP)", "lasso on dosage", "elastic net on dosage"}
    assert set(table["model"]) == {label, *linear, "ceiling of linear models", "these donors"}
    assert set(table["unit"]) == {"label"}
    within = table[table["metric"] == "pearson_within_genes"]
    assert set(within["fold"]) == {"test", "unseen_genes", "unseen_both"}
    assert np.isfinite(within["value"]).all()
    _check_rows(table)


def _check_rows(table: pd.DataFrame) -> None:
    undefined = ~np.isfinite(table["value"])
    assert (table.loc[undefined, "note"] != "").all(), table[undefined]  # says why
    bounds = table[["low", "high"]].dropna()
    assert len(bounds)
    assert (bounds["low"] <= bounds["high"]).all()
    assert (table["n"] > 0)[~undefined].all()
    assert not table.duplicated(["model", "fold", "group", "track", "metric", "unit"]).any()
