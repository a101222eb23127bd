"""docs/inputs.md: every file that is read, as it should be and as it should not, with what is then said."""

from __future__ import annotations

import re
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from builders import write_h5ad
from seqgraft.agreement import read_measured
from seqgraft.attribute import AttributeConfig
from seqgraft.data import SOURCES, prepare_source
from seqgraft.data.dataset import DatasetInfo
from seqgraft.data.seen import read_trunk_folds
from seqgraft.data.simulate import Simulation
from seqgraft.data.tables import read_track_table
from seqgraft.effects import EffectsConfig
from seqgraft.errors import SeqgraftError
from seqgraft.experiment import build, parse_source, read_experiment, read_yaml
from seqgraft.genes import read_fold_changes
from seqgraft.genome import Genome, read_bed_on, read_gtf
from seqgraft.grids import methods_of, read_sweep
from seqgraft.regions import regions_for_prediction
from seqgraft.tracks import TrackTable
from seqgraft.variants import ScreenConfig, VariantConfig
from seqgraft.variants.alleles import AlleleCheck, check_vcf

PAGE = Path(__file__).resolve().parents[1] / "docs" / "inputs.md"
LABELS = DatasetInfo("labelled", 20, 1, 20)


def _prepared(name: str) -> Callable[[], object]:
    return lambda: prepare_source(parse_source(read_yaml(Path(name)), name), Path("made") / name)


def _built(cls: type, name: str) -> Callable[[], object]:
    return lambda: build(cls, read_yaml(Path(name)), name)


def _vcf() -> object:
    check = AlleleCheck(Genome.open("genome.fa"), 64, 48, {})
    return check_vcf(Path("variants.vcf"), check, Path("skipped.tsv"))


def _new(name: str) -> Callable[[], object]:
    tracks = TrackTable.build([{"name": "bound", "link": "sigmoid"}])
    return lambda: regions_for_prediction(Path(name), LABELS, tracks)


#: File -> what reads it, in a folder that holds all the others.
READERS: dict[str, Callable[[], object]] = {
    "genome.fa": lambda: Genome.open("genome.fa"),
    "atac.bw": _prepared("coverage.yaml"),
    "tracks.csv": lambda: read_track_table("tracks.csv"),
    "targets.txt": lambda: read_track_table("targets.txt"),
    "regions.bed": lambda: read_bed_on("regions.bed", Genome.open("genome.fa")),
    "genes.gtf": lambda: read_gtf("genes.gtf"),
    "deseq2.csv": lambda: read_fold_changes("deseq2.csv"),
    "labels.csv": _prepared("labelled.yaml"),
    "labels.fa": _prepared("labels-fasta.yaml"),
    "intervals.csv": _prepared("intervals.yaml"),
    "covariates.csv": _prepared("covariates.yaml"),
    "peaks.narrowPeak": _prepared("peaks.yaml"),
    "fragments.tsv": _prepared("fragments.yaml"),
    "cells.csv": _prepared("fragments.yaml"),
    "cells.h5ad": _prepared("h5ad.yaml"),
    "cohort.vcf": _prepared("personal.yaml"),
    "expression.tsv": _prepared("personal.yaml"),
    "phenotypes.bed": _prepared("phenotypes.yaml"),
    "starts.tsv": _prepared("personal.yaml"),
    "donors.tsv": _prepared("personal.yaml"),
    "genes.txt": _prepared("personal.yaml"),
    "new.csv": _new("new.csv"),
    "new.fa": _new("new.fa"),
    "variants.vcf": _vcf,
    "mpra.tsv": lambda: read_measured(build(EffectsConfig, read_yaml(Path("effects.yaml")), "effects.yaml").measured),
    "trained_on.bed": lambda: read_trunk_folds(Path("trained_on.bed")),
    "experiment.yaml": lambda: read_experiment(Path("experiment.yaml")),
    "sweep.yaml": lambda: methods_of(read_sweep(Path("sweep.yaml"))),
    "sim.yaml": _built(Simulation, "sim.yaml"),
    "variants.yaml": _built(VariantConfig, "variants.yaml"),
    "effects.yaml": _built(EffectsConfig, "effects.yaml"),
    "attribute.yaml": _built(AttributeConfig, "attribute.yaml"),
    "screen.yaml": _built(ScreenConfig, "screen.yaml"),
    "windows.yaml": _prepared("windows.yaml"),
    "coverage.yaml": lambda: parse_source(read_yaml(Path("coverage.yaml")), "coverage.yaml"),
}


@dataclass(frozen=True)
class Example:
    """A block of the page.

    Attributes:
        role: "file" and "run" make what is right, "wrong" what is not.
        says: what is said of a wrong one.
    """

    role: str
    name: str
    language: str
    text: str
    says: str


BLOCK = re.compile(
    r"^<!-- (?P<role>file|run|wrong): (?P<name>\S+) -->\n```(?P<language>\w+)\n(?P<text>.*?)^```\n"
    r"(?:\n<!-- says -->\n```text\n(?P<says>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
EXAMPLES = [
    Example(*(found[part] or "" for part in ("role", "name", "language", "text", "says")))
    for found in BLOCK.finditer(PAGE.read_text())
]
RIGHT = {each.name: each for each in EXAMPLES if each.role != "wrong"}
WRONG = [each for each in EXAMPLES if each.role == "wrong"]


class _AnnData:
    """As much of anndata, which is not needed here, as the page uses: the file that it would write."""

    def __init__(self, X: Any, obs: pd.DataFrame, var: pd.DataFrame) -> None:
        self.counts, self.obs, self.var = X, obs, var

    def write_h5ad(self, path: str) -> None:
        write_h5ad(Path(path), np.asarray(self.counts), list(self.var.index), list(self.obs["cell_type"]))
        import h5py

        with h5py.File(path, "a") as file:
            file["obs"].move("type", "cell_type")


def _write(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    if example.language == "python":
        monkeypatch.setitem(sys.modules, "anndata", types.SimpleNamespace(AnnData=_AnnData))  # type: ignore[arg-type]
        exec(compile(example.text, PAGE.name, "exec"), {})
    else:
        Path(example.name).write_text(example.text)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every example that is right."""
    folder = tmp_path_factory.mktemp("right")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for example in RIGHT.values():
            _write(example, patched)
    return folder


def test_the_page_has_every_file() -> None:
    kinds = {read["kind"] for name in RIGHT if (read := _yaml(name)).get("kind")}
    assert kinds == set(SOURCES)
    made = {name for name in RIGHT if Path(name).suffix != ".yaml" and not name.startswith("rna")}
    assert made <= READERS.keys() <= RIGHT.keys()
    read_by_others = {"windows.yaml"}  # whose files are wrong in other examples
    assert {each.name for each in WRONG} == READERS.keys() - read_by_others
    assert all(each.says for each in WRONG)


def _yaml(name: str) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(RIGHT[name].text)) if name.endswith(".yaml") else {}


def test_what_is_right_is_read(right: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(right)
    for name, reader in READERS.items():
        if name not in ("expression.tsv", "starts.tsv", "donors.tsv", "genes.txt", "cells.csv"):  # read with another
            assert reader() is not None, name


@pytest.mark.parametrize("example", WRONG, ids=lambda each: each.name)
def test_what_is_wrong_is_told_as_the_page_says(
    right: Path, example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in right.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    Path(example.name).unlink()
    _write(example, monkeypatch)
    with pytest.raises(SeqgraftError) as caught:
        READERS[example.name]()
    assert str(caught.value).replace(f"{tmp_path}/", "") == example.says.rstrip("\n")
    assert not Path("made").exists()
