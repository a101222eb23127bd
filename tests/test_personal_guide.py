"""The guide of personal genomes and its example, as written; and what their commands say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from builders import LANGUAGE
from guides import run_guide, seqgraft
from seqgraft.adapters import adapt
from seqgraft.data import prepare_source
from seqgraft.experiment import parse_experiment, parse_source
from seqgraft.memory import LiveBytes, training_step
from seqgraft.plan import measure_cost, plan_run
from seqgraft.run import build_run, objective_of
from test_personal import TINY, source_of, write_cohort
from test_readme import ROOT, blocks

GUIDE = ROOT / "docs" / "guides" / "personal.md"
EXAMPLE = ROOT / "examples" / "personal"
FOLDS = {"test", "unseen_genes", "unseen_both"}
LINEAR = {"top SNP", "ridge on dosage (BLUP)", "lasso on dosage", "elastic net on dosage"}

#: The commands of examples/README.md in a size that takes seconds.
SMALLEST = {
    "simulate": ["chromosomes=2", "chromosome_length=8192", "donors.donors=60"],
    "prepare": ["gene_folds.test=[chr2]"],
    "fit": ["train.epochs=1", "evaluate.draws=50", "evaluate.linearity=2", "evaluate.block=50000"],
}


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_guide("personal")
    promised = re.findall(r"^print\(.*\)  # (.+)$", GUIDE.read_text(), re.MULTILINE)
    said = capsys.readouterr().out
    assert promised
    assert not [line for line in promised if line not in said.splitlines()]
    assert "1680 pairs of 28 genes and 60 donors (train 684" in said
    assert "distinct tiles of" in said
    assert "3,360, 711" in GUIDE.read_text()
    assert (dataset := names["dataset"]).info.notes["haplotypes"] == 3360
    assert dataset.info.notes["distinct_haplotypes"] == 711

    within = names["within"].set_index(["model", "fold"])["value"]
    run = "LoRA r=8 (attention, feedforward)"
    assert set(names["within"]["model"]) == {run, "pretrained track", "ceiling of linear models", *LINEAR}
    assert set(names["within"]["fold"]) == FOLDS
    assert within[run, "test"] > within["pretrained track", "test"]
    assert within[run, "test"] > within["ridge on dosage (BLUP)", "test"] - 0.05
    assert set(names["differences"]["baseline"]) == {"pretrained track", *LINEAR}

    effects = pd.read_parquet("effects/effects.parquet")
    assert effects["gene"].nunique() == 28
    assert {path.name for path in Path("effects").iterdir()} >= {"effects.db", "effects.txt.gz", "drivers.parquet"}
    south = names["south"].donors.donors
    assert set(south.loc[south["population"] == "south", "fold"]) == {"test"}
    assert set(south.loc[south["population"] == "north", "fold"]) == {"train", "valid"}
    assert (south.groupby("family")["fold"].nunique() == 1).all()
    assert set(names["found"].metrics["fold"]) == FOLDS


def test_what_its_tables_show_is_understood() -> None:
    """Settings of data and of losses."""
    page = GUIDE.read_text()
    (source,) = [yaml.safe_load(block.code) for block in blocks(page) if block.marker == "file: data.yaml"]
    shown = set()
    for key, text, kind in re.findall(r"`(\w+):\s(\{[^`]*\})`|`(\{kind: [^`]*\})`", page):
        content, name = yaml.safe_load(text or kind), key or "loss"
        shown.add(name)
        if name in {*source, "select"}:
            kept = source[name] if name in ("expression", "donors") else {}
            parse_source({**source, name: {**kept, **content}})
        else:
            adapter = name == "loss" and content["kind"] == "full"
            parse_experiment({"data": "data", "adapter" if adapter else name: content})
    assert shown >= {"donor_folds", "gene_folds", "loss", "loss_weights", "joint", "expression", "donors", "select"}


def donors_named(folder: Path) -> list[str]:
    """Files of a folder that have the name of a simulated donor."""
    name, named = re.compile(rb"donor\d{4}"), []
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            found = bool(name.search(pd.read_parquet(path).to_csv().encode()))
        else:
            found = path.is_file() and bool(name.search(path.read_bytes()))
        named += [str(path.relative_to(folder))] * found
    return named


def test_the_example_at_its_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of examples/README.md; what they write names donors where the guide says."""
    folder = Path(shutil.copytree(EXAMPLE, tmp_path / "personal"))
    monkeypatch.chdir(folder)
    page = (ROOT / "examples" / "README.md").read_text()
    (block,) = [block.code for block in blocks(page) if "data/cohort" in block.code]
    for line in block.splitlines():
        seqgraft(line, SMALLEST)
    for recipe in ("frozen", "adapters"):
        metrics = pd.read_parquet(f"runs/{recipe}/evaluation/metrics.parquet")
        own = metrics[(metrics["metric"] == "pearson_within_genes") & ~metrics["model"].isin(LINEAR)]
        assert set(own["fold"]) == FOLDS
    assert (folder / "runs" / "report.html").stat().st_size > 10_000
    seqgraft("seqgraft report runs/frozen")
    assert "nan" not in re.sub("<[^>]*>", " ", (folder / "runs/frozen/report.html").read_text())  # one block of genes
    assert donors_named(folder / "runs") == []
    assert donors_named(folder / "effects") == []
    assert donors_named(folder / "data" / "cohort") == ["donors.parquet"]


# ---- what plan and evaluate say ----


def test_tokens_are_counted_of_haplotypes(tmp_path: Path) -> None:
    dataset = prepare_source(source_of(write_cohort(tmp_path), window=256), tmp_path / "data")
    model = {"name": "language", "settings": {**LANGUAGE, "positions": 64}}
    first, *_ = plan_run(parse_experiment({"data": str(dataset.folder), "model": model})).problems
    distinct = len(dataset.stored(dataset.rows("train")))
    assert f"{distinct} of {distinct} sequences have bases that no token" in str(first)
    assert "those of the longest, a haplotype of gene" in str(first)


def test_masked_tokens_are_not_of_donors(tmp_path: Path) -> None:
    dataset = prepare_source(source_of(write_cohort(tmp_path)), tmp_path / "data")
    content = {"data": str(dataset.folder), "model": {"name": "yeast-lm-mini"}, "loss": {"kind": "masked_tokens"}}
    (problem,) = plan_run(parse_experiment(content)).problems
    assert "loss: donors have no masked tokens" in str(problem)
    assert problem.remedy is not None


@pytest.mark.parametrize("size", [4, 24])
def test_plan_counts_haplotypes_that_donors_share(tmp_path: Path, size: int) -> None:
    """A batch takes no more than the plan says, and no less than half of it."""
    dataset = prepare_source(source_of(write_cohort(tmp_path)), tmp_path / "data")
    experiment = parse_experiment(
        {
            "data": str(dataset.folder),
            "model": {"settings": TINY, "init": "random", "centre": 4},
            "adapter": {"kind": "full"},
            "train": {"batch_size": size, "augment": {"reverse_complement": False}},
        }
    )
    model, dataset = build_run(experiment)
    adapt(model, experiment.adapter)
    cost = measure_cost(experiment, model, dataset)
    model.train()
    objective = objective_of(experiment, dataset, model)
    most = 0
    for batch in objective.batches(dataset.rows("train"), size, 1, 0):
        with (live := LiveBytes(beside=model.parameters())):
            training_step(model, objective, dataset.sample(batch), "float32").backward()  # type: ignore[no-untyped-call]
        most = max(most, live.peak)
    assert 0.5 * size * cost.bytes_per_row < most < 1.1 * cost.peak_bytes(size)
    assert 0.1 < cost.distinct <= 1
    assert cost.seconds_per_row is not None
    facts = plan_run(experiment).facts
    assert f"{len(dataset)} pairs of 8 genes and 40 donors" in facts["data"]
    assert "haplotypes of 256 bp around starts of genes" in facts["data"]
