"""Bad input: what a user can get wrong ends in a message of four parts, the right exit code and nothing half-written.

Each row of the table makes its files, runs the real command line and names what the message must hold: where, the value
and what to do about it.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pybigtools
import pytest
import yaml

from builders import SETTINGS, tiny_coverage, tiny_labels, tiny_pretrained
from seqgraft.__main__ import main
from seqgraft.data import open_dataset
from seqgraft.experiment import parse_experiment
from seqgraft.run import fit_run
from seqgraft.sequence import decode

CHROMS = {"chr1": 1000, "chr2": 600, "chr3": 600}
MODEL = {"name": "convnet", "settings": SETTINGS}


@dataclass(frozen=True)
class Case:
    """``make`` fills a folder and returns the arguments; ``where``, ``value`` and ``remedy`` must be in the message."""

    name: str
    code: int
    make: Callable[[Files], list[str]]
    where: str
    value: str
    remedy: str


class Files:
    """A folder of raw files that are right, until a case changes them."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder, self.runs = folder, runs

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, text: str) -> Path:
        (self / name).write_text(text)
        return self / name

    def yaml(self, name: str, content: Mapping[str, Any]) -> str:
        return str(self.write(name, yaml.safe_dump(dict(content))))

    def genome(self, name: str = "genome.fa", replace: tuple[str, str] | None = None) -> Path:
        rng = np.random.default_rng(0)
        letters = {c: decode(rng.integers(0, 4, size).astype(np.uint8)) for c, size in CHROMS.items()}
        text = "".join(f">{chrom}\n{sequence}\n" for chrom, sequence in letters.items())
        return self.write(name, text.replace(*replace, 1) if replace else text)

    def bigwig(self, name: str = "a.bw", chroms: Mapping[str, int] = CHROMS, value: float = 2.0) -> Path:
        records = []
        for chrom, size in chroms.items():
            records += [(chrom, at, at + 20, value if at == 20 else float(at % 7 + 1)) for at in range(0, size, 20)]
        pybigtools.open(str(self / name), "w").write(dict(chroms), iter(records))
        return self / name

    def coverage(self, *, without: str = "", **changes: Any) -> list[str]:
        """``prepare`` of coverage with these settings changed."""
        if not (self / "genome.fa").exists():
            self.genome()
        if not (self / "a.bw").exists():
            self.bigwig()
        settings: dict[str, Any] = {
            "kind": "coverage",
            "fasta": str(self / "genome.fa"),
            "tracks": [{"name": "a", "file": str(self / "a.bw")}],
            "window": 128,
            "target_length": 64,
            "bin_size": 16,
            "folds": {"by": "chromosome", "valid": ["chr2"], "test": ["chr3"]},
        }
        settings = {key: value for key, value in (settings | changes).items() if key != without}
        return ["prepare", self.yaml("data.yaml", settings), str(self / "out" / "data")]

    def labelled(self, columns: Mapping[str, Any] | None = None, text: str | None = None, **changes: Any) -> list[str]:
        """``prepare`` of labelled sequences with these columns or this text."""
        table: dict[str, Any] = {
            "sequence": random_sequences(12),
            "label": [0, 1] * 6,
            "fold": ["train"] * 6 + ["valid"] * 3 + ["test"] * 3,
        }
        if text is None:
            pd.DataFrame(table | dict(columns or {})).to_csv(self / "labels.csv", index=False)
        else:
            self.write("labels.csv", text)
        settings: dict[str, Any] = {
            "kind": "labelled",
            "files": [{"path": str(self / "labels.csv")}],
            "folds": {"by": "column"},
        }
        return ["prepare", self.yaml("data.yaml", settings | changes), str(self / "out" / "data")]

    def experiment(self, command: str = "plan", data: Path | str | None = None, **changes: Any) -> list[str]:
        """``plan`` or ``fit`` of an experiment with these sections changed, on tiny coverage unless told."""
        if data is None:
            data = self / "tiny"
            tiny_coverage(data, regions=12)
        content: dict[str, Any] = {"data": str(data), "model": MODEL, "train": {"epochs": 1}}
        return [command, self.yaml("experiment.yaml", content | changes), str(self / "out" / "run")]

    def run(self, name: str = "coverage") -> Path:
        """A copy of a finished run."""
        shutil.copytree(self.runs / name, self / "run")
        return self / "run"


def random_sequences(count: int, length: int = 40, seed: int = 0) -> list[str]:
    codes = np.random.default_rng(seed).integers(0, 4, (count, length)).astype(np.uint8)
    return [decode(row) for row in codes]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, their data beside them: read only."""
    root = tmp_path_factory.mktemp("finished")
    tiny_coverage(root / "data" / "coverage", regions=12)
    tiny_labels(root / "data" / "labels", rows=18)
    for name in ("coverage", "labels"):
        content = {"data": str(root / "data" / name), "model": MODEL, "train": {"epochs": 1, "batch_size": 4}}
        fit_run(parse_experiment({**content, "adapter": {"kind": "lora", "rank": 2}}), root / name)
    return root


# Makers that need more than a line


def _chromosomes(f: Files) -> list[str]:
    f.bigwig(chroms={name.removeprefix("chr"): size for name, size in CHROMS.items()})
    return f.coverage()


def _short_bigwig(f: Files) -> list[str]:
    f.bigwig(chroms=CHROMS | {"chr2": 500})
    return f.coverage()


def _cut(path: Path, keep: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def _truncated_bigwig(f: Files) -> list[str]:
    _cut(f.bigwig())
    return f.coverage()


def _signal(value: float) -> Callable[[Files], list[str]]:
    def make(f: Files) -> list[str]:
        f.bigwig(value=value)
        return f.coverage()

    return make


def _bed(text: str) -> Callable[[Files], list[str]]:
    def make(f: Files) -> list[str]:
        return f.coverage(regions=str(f.write("regions.bed", text)))

    return make


def _fasta(text: str) -> Callable[[Files], list[str]]:
    def make(f: Files) -> list[str]:
        f.write("genome.fa", text)
        return f.coverage()

    return make


def _truncated_gzip(f: Files) -> list[str]:
    packed = gzip.compress(f.genome().read_bytes())
    (f / "genome.fa.gz").write_bytes(packed[: len(packed) // 2])
    return f.coverage(fasta=str(f / "genome.fa.gz"))


def _overlapping_folds(f: Files) -> list[str]:
    rows = [
        {
            "chrom": "chr1",
            "start": start,
            "end": start + 50,
            "label": row % 2,
            "fold": ("train", "valid", "test")[row % 3],
        }
        for row, start in enumerate(range(0, 600, 30))
    ]
    return f.labelled(text=pd.DataFrame(rows).to_csv(index=False), genome=str(f.genome()))


def _leaked_rows(f: Files) -> list[str]:
    sequences = random_sequences(12)
    sequences[11] = sequences[0]
    return f.labelled({"sequence": sequences})


def _tracks(*rows: Mapping[str, Any]) -> Callable[[Files], list[str]]:
    return lambda f: f.coverage(tracks=[{"file": str(f / "a.bw"), **row} for row in rows])


def _table(text: str) -> Callable[[Files], list[str]]:
    return lambda f: f.coverage(tracks=str(f.write("tracks.csv", text)))


def _damaged_dataset(change: Callable[[Path], object]) -> Callable[[Files], list[str]]:
    def make(f: Files) -> list[str]:
        arguments = f.experiment("fit")
        change(f / "tiny")
        return arguments

    return make


def _other_version(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"format_version": 99}))


def _pickled(folder: Path) -> None:
    targets = np.load(folder / "targets.npy", allow_pickle=False)
    np.save(folder / "targets.npy", targets.astype(object), allow_pickle=True)


def _zipped(folder: Path) -> None:
    with (folder / "targets.npy").open("wb") as file:
        np.savez(file, targets=np.zeros(3))


def _changed_genome(folder: Path) -> None:
    fasta = folder.with_suffix(".fa")
    fasta.write_text(fasta.read_text()[:-2] + "\n")


def _fewer_regions(folder: Path) -> None:
    pd.read_parquet(folder / "regions.parquet").iloc[:-1].to_parquet(folder / "regions.parquet")


def _no_exons(f: Files) -> list[str]:
    row = 'chr1\tx\tgene\t1\t500\t.\t+\t.\tgene_id "a";\n'
    return _scored(f, {"genes": {"gtf": str(f.write("genes.gtf", row))}})


def _scored(f: Files, evaluate: Mapping[str, Any]) -> list[str]:
    run = f.run()
    content = yaml.safe_load((run / "experiment.yaml").read_text())
    f.yaml("run/experiment.yaml", content | {"evaluate": dict(evaluate)})
    return ["evaluate", str(run)]


def _variants(chrom: str, settings: str = "over=window", run: str = "coverage") -> Callable[[Files], list[str]]:
    def make(f: Files) -> list[str]:
        header = "##fileformat=VCFv4.2\n##contig=<ID=%s>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
        source = f.write("in.vcf", header % chrom + f"{chrom}\t5\t.\tA\tC\t.\t.\t.\n")
        return ["variants", str(f.run(run)), str(source), str(f / "o.parquet"), "--set", settings]

    return make


def _predict(
    text: str, name: str = "in.bed", out: str = "out.parquet", run: str = "coverage"
) -> Callable[[Files], list[str]]:
    return lambda f: ["predict", str(f.run(run)), str(f.write(name, text)), str(f / out)]


def _existing_prediction(f: Files) -> list[str]:
    return [*_predict(BED)(f)[:3], str(f.write("out.csv", "kept"))]


def _damaged_run(change: Callable[[Path], object], command: str = "evaluate") -> Callable[[Files], list[str]]:
    def make(f: Files) -> list[str]:
        run = f.run()
        change(run)
        return [command, str(run)]

    return make


def _other_base(run: Path) -> None:
    content = yaml.safe_load((run / "experiment.yaml").read_text())
    content["train"]["seed"] = 99  # other random weights below the adapter
    (run / "experiment.yaml").write_text(yaml.safe_dump(content))


def _model(change: Callable[[Path], object]) -> Callable[[Files], list[str]]:
    def make(f: Files) -> list[str]:
        change(tiny_pretrained(f / "model"))
        return f.experiment(model={"name": str(f / "model")})

    return make


def _exposed(f: Files) -> list[str]:
    dataset = tiny_coverage(f / "tiny", regions=12)
    model = tiny_pretrained(f / "model", trained_on=dataset)
    place = dataset.regions[dataset.regions["fold"] == "test"][["chrom", "start", "end"]]
    place.assign(fold="train").to_csv(model / "trained_on.bed", sep="\t", header=False, index=False)
    return f.experiment("fit", data=f / "tiny", model={"name": str(model)})


def _resume(f: Files) -> list[str]:
    run = f.run()
    content = yaml.safe_load((run / "experiment.yaml").read_text())
    content["train"]["lr"] = 0.5
    return ["fit", f.yaml("other.yaml", content), str(run), "--resume"]


def _settings_of_run(f: Files) -> list[str]:
    return ["fit", str(f.run() / "experiment.yaml"), str(f / "run")]


def _below_a_file(f: Files) -> list[str]:
    return [*f.coverage()[:2], str(f.write("file", "") / "data")]


def _existing_output(f: Files) -> list[str]:
    (f / "out" / "data").mkdir(parents=True)
    return f.coverage()


def _yaml(text: str, command: str = "plan") -> Callable[[Files], list[str]]:
    return lambda f: [command, str(f.write("experiment.yaml", text))]


def _bad_bytes(f: Files) -> list[str]:
    arguments = f.labelled()
    (f / "labels.csv").write_bytes("sequence,label,fold\nACGT,é,train\n".encode("latin-1"))
    return arguments


CSV = "sequence,label,fold\n"
BED = "chr1\t10\t20\n"

CASES = [
    # Coverage: bigWigs, regions, tracks
    Case("bigwig names lack chr", 3, _chromosomes, "a.bw", "'chr1'", "rename: {'1': 'chr1'}"),
    Case("bigwig shorter than the genome", 3, _short_bigwig, "a.bw", "500", "of the same one"),
    Case("truncated bigwig", 3, _truncated_bigwig, "a.bw", "a.bw", "truncated"),
    Case(
        "no bigwig", 3, lambda f: f.coverage(tracks=[{"name": "a", "file": "gone.bw"}]), "track a", "'gone.bw'", "Check"
    ),
    Case("infinite signal", 3, _signal(float("inf")), "a.bw chr1:20-40", "inf", "write 0"),
    Case("signal that is no number", 3, _signal(float("nan")), "a.bw chr1:20-40", "nan", "write 0"),
    Case("negative signal", 3, _signal(-30.0), "a.bw) chr1:16-32", "-356.0", "absolute"),
    Case("empty bed", 3, _bed(""), "regions.bed", "no intervals", "leave the setting out"),
    Case("bed that is no bed", 3, _bed("chr1 ten twenty\n"), "regions.bed line 1", "'chr1 ten twenty'", "0-based"),
    Case("bed beyond the contig", 3, _bed("chr1\t900\t1100\n"), "regions.bed", "chr1:900-1100", "same assembly"),
    Case("bed with an unknown chromosome", 3, _bed("1\t10\t90\n"), "regions.bed", "'1'", "rename: {'1': 'chr1'}"),
    Case("duplicate track names", 3, _tracks({"name": "a"}, {"name": "a"}), "rack name", "'a'", "its own name"),
    Case("unpaired strands", 3, _tracks({"name": "rna+"}), "track table row 0", "'rna-'", "strand_pair"),
    Case("unknown squash", 3, _tracks({"name": "a", "squash": "log"}), "row 0 (a)", "'log'", "exp75"),
    Case("unknown column", 3, _table("name,file,colour\na,a.bw,red\n"), "olumns", "'colour'", "soft_clip"),
    Case("no track table", 3, lambda f: f.coverage(tracks=str(f / "none.csv")), "none.csv", "does not exist", "Check"),
    Case(
        "no held-out chromosome",
        2,
        lambda f: f.coverage(folds={"by": "chromosome"}),
        "folds",
        "held out",
        "test: [chr8]",
    ),
    Case(
        "a chromosome in two folds",
        2,
        lambda f: f.coverage(folds={"by": "chromosome", "valid": ["chr2"], "test": ["chr2"]}),
        "folds.test",
        "'chr2'",
        "once",
    ),
    Case(
        "a fold without rows",
        3,
        lambda f: f.coverage(folds={"by": "chromosome", "valid": ["chr2"], "test": ["8"]}),
        "folds.test",
        "'8'",
        "chr1, chr2, chr3",
    ),
    Case("bins that do not fit", 2, lambda f: f.coverage(bin_size=48), "coverage source", "64", "Use 48"),
    Case("window below target", 2, lambda f: f.coverage(window=32), "coverage source", "32", "enlarge window"),
    # Genomes
    Case("empty fasta", 3, _fasta(""), "genome.fa", "empty", "Check the file"),
    Case("no fasta", 3, lambda f: f.coverage(fasta=str(f / "none.fa")), "none.fa", "does not exist", "Check the path"),
    Case("not a fasta", 3, _fasta("chr1 ACGT\n"), "genome.fa", "'chr1ACGT'", "Give a FASTA"),
    Case("a contig twice", 3, _fasta(">chr1\nACGT\n>chr1\nACGT\n"), "genome.fa", "'chr1'", "rename one"),
    Case("a contig without bases", 3, _fasta(">chr1\n>chr2\nACGT\n"), "genome.fa", "'chr1'", "truncated"),
    Case("a letter that is no base", 3, _fasta(">chr1\nACGTJACGT\n"), "contig chr1, base 5", "'J'", "A, C, G, T"),
    Case("truncated gzip", 3, _truncated_gzip, "genome.fa.gz", "truncated", "Copy"),
    # Labels
    Case("overlapping folds", 3, _overlapping_folds, "folds by column", "chr1:0-50", "by: cluster"),
    Case("leaked rows", 3, _leaked_rows, "labels.csv row 12", "labels.csv row 1", "duplicates: drop"),
    Case(
        "no label column",
        3,
        lambda f: f.labelled(labels=[{"column": "y"}]),
        "labels.csv",
        "'y'",
        "It has sequence, label",
    ),
    Case(
        "infinite label",
        3,
        lambda f: f.labelled({"label": [0.5, "inf"] * 6}),
        "labels.csv row 2",
        "'inf'",
        "Write a number",
    ),
    Case(
        "no label at all",
        3,
        lambda f: f.labelled({"label": [""] * 12}),
        "column 'label'",
        "no row has",
        "leave the label out",
    ),
    Case(
        "one class in training",
        3,
        lambda f: f.labelled({"label": [0] * 6 + [0, 1] * 3}),
        "label 'label'",
        "0.0",
        "Check the folds",
    ),
    Case(
        "many unknown bases",
        3,
        lambda f: f.labelled({"sequence": ["ACGTNNNNAC" + s for s in random_sequences(12)]}),
        "labels.csv",
        "%",
        "max_unknown",
    ),
    Case(
        "a letter that is no base in a table",
        3,
        lambda f: f.labelled({"sequence": ["ACGJ", *random_sequences(11)]}),
        "labels.csv row 1",
        "'J'",
        "A, C, G, T",
    ),
    Case(
        "ragged rows",
        3,
        lambda f: f.labelled(text=CSV + "ACGT,1,train\nACGT,1\n"),
        "labels.csv row 2",
        "2",
        "all 3 columns",
    ),
    Case("other encoding", 3, _bad_bytes, "labels.csv", "utf-8", "write it again"),
    Case("empty table", 3, lambda f: f.labelled(text=CSV), "labels.csv", "no rows", "leave it out"),
    Case("empty file", 3, lambda f: f.labelled(text=""), "labels.csv", "'sequence'", "It has"),
    Case(
        "unknown kind of file", 2, lambda f: f.labelled(files=[{"path": "labels.xls"}]), "files", "'labels.xls'", ".csv"
    ),
    Case(
        "fold that is none",
        3,
        lambda f: f.labelled({"fold": ["dev"] * 12}),
        "column 'fold'",
        "'dev'",
        "names: {dev: train}",
    ),
    # Prepared datasets
    Case("truncated targets", 3, _damaged_dataset(lambda d: _cut(d / "targets.npy")), "tiny", "'targets.npy'", "again"),
    Case("pickled targets", 3, _damaged_dataset(_pickled), "tiny", "'targets.npy'", "Prepare the dataset again"),
    Case("zipped targets", 3, _damaged_dataset(_zipped), "tiny", "'targets.npy'", "Prepare the dataset again"),
    Case("no targets", 3, _damaged_dataset(lambda d: (d / "targets.npy").unlink()), "tiny", "'targets.npy'", "again"),
    Case("fewer regions", 3, _damaged_dataset(_fewer_regions), "tiny", "(12, 3, 12)", "Prepare the dataset again"),
    Case(
        "truncated regions",
        3,
        _damaged_dataset(lambda d: _cut(d / "regions.parquet")),
        "tiny",
        "'regions.parquet'",
        "again",
    ),
    Case("another version", 2, _damaged_dataset(_other_version), "dataset.json", "99", "Prepare it again"),
    Case(
        "damaged dataset.json", 2, _damaged_dataset(lambda d: _cut(d / "dataset.json")), "dataset.json", "JSON", "again"
    ),
    Case(
        "another json",
        2,
        _damaged_dataset(lambda d: (d / "dataset.json").write_text("[1]")),
        "dataset.json",
        "prepared dataset",
        "seqgraft prepare",
    ),
    Case(
        "no dataset", 2, lambda f: f.experiment(data=f / "nothing"), "nothing", "prepared dataset", "seqgraft prepare"
    ),
    Case(
        "changed genome", 3, _damaged_dataset(_changed_genome), "dataset.json", "tiny.fa", "Prepare the dataset again"
    ),
    Case(
        "no genome any more",
        3,
        _damaged_dataset(lambda d: d.with_suffix(".fa").unlink()),
        "dataset.json",
        "tiny.fa",
        "Restore",
    ),
    # YAML
    Case("unknown key", 2, lambda f: f.experiment(train={"epoch": 1}), "experiment.yaml: train", "'epoch'", "'epochs'"),
    Case("unknown key of a source", 2, lambda f: f.coverage(windw=3), "data.yaml", "'windw'", "'window'"),
    Case("unknown kind", 2, lambda f: f.coverage(kind="coverages"), "data.yaml", "'coverages'", "coverage, fragments"),
    Case(
        "unknown adapter",
        2,
        lambda f: f.experiment(adapter={"kind": "adapter"}),
        "adapter",
        "'adapter'",
        "linear_probe",
    ),
    Case("wrong type", 2, lambda f: f.experiment(train={"epochs": "many"}), "train.epochs", "'many'", "a whole number"),
    Case("missing key", 2, lambda f: f.coverage(without="window"), "data.yaml", "'window'", "Add a line"),
    Case("not a mapping", 2, _yaml("- data\n"), "experiment.yaml", "a list", "Write lines"),
    Case("not yaml", 2, _yaml("data: [a\nmodel: b\n"), "experiment.yaml", "line 2", "brackets"),
    Case("a key twice", 2, _yaml("data: a\ndata: b\n"), "experiment.yaml line 2", "'data'", "Keep one"),
    Case("no yaml", 2, lambda f: ["plan", str(f / "none.yaml")], "none.yaml", "does not exist", "Check the path"),
    Case("binary yaml", 2, lambda f: ["plan", str(f.bigwig())], "a.bw", "cannot be read", "YAML"),
    Case(
        "environment", 2, _yaml("data: ${SEQGRAFT_NOT_SET}/a\n"), "experiment.yaml", "${SEQGRAFT_NOT_SET}/a", "Set it"
    ),
    Case(
        "--set without =", 2, lambda f: [*f.experiment(), "--set", "train.lr"], "--set", "'train.lr'", "train.lr=3e-5"
    ),
    Case(
        "--set that is no yaml",
        2,
        lambda f: [*f.experiment(), "--set", "train.lr={"],
        "--set train.lr={",
        "YAML",
        "brackets",
    ),
    Case("--device", 2, lambda f: [*f.experiment(), "--device", "big"], "--device", "'big'", "'24 GB'"),
    # Models
    Case("unknown model", 2, lambda f: f.experiment(model={"name": "borzio"}), "model.name", "'borzio'", "convnet"),
    Case(
        "unknown setting of a model",
        2,
        lambda f: f.experiment(model={"name": "convnet", "settings": {"widht": 3}}),
        "model.settings",
        "widht",
        "channels",
    ),
    Case("damaged model.json", 2, _model(lambda m: _cut(m / "model.json")), "model.json", "JSON", "again"),
    Case(
        "truncated weights",
        4,
        _model(lambda m: _cut(m / "weights.safetensors")),
        "weights.safetensors",
        "cannot be read",
        "truncated",
    ),
    Case(
        "no weights",
        4,
        _model(lambda m: (m / "weights.safetensors").unlink()),
        "weights.safetensors",
        "missing",
        "whole folder",
    ),
    Case(
        "unknown site",
        4,
        lambda f: f.experiment(adapter={"kind": "lora", "where": ["attn"]}),
        "convnet",
        "'attn'",
        "attention",
    ),
    Case(
        "unknown method of peft",
        4,
        lambda f: f.experiment(adapter={"kind": "peft", "type": "lola"}),
        "lola",
        "'lola'",
        "loha",
    ),
    Case(
        "metric that does not suit",
        2,
        lambda f: f.experiment(train={"metric": "auroc"}),
        "metric",
        "'auroc'",
        "pearson",
    ),
    Case("loss of no group", 2, lambda f: f.experiment(loss={"cage": {"kind": "poisson"}}), "loss", "'cage'", "'rna'"),
    Case("fold that is empty", 2, lambda f: f.experiment(evaluate={"fold": "tests"}), "tiny", "'tests'", "'test'"),
    Case(
        "window and stride",
        4,
        lambda f: f.experiment(model={"name": "convnet", "settings": {"channels": 16, "depth": 7}}),
        "model convnet",
        "256",
        "multiple of 512",
    ),
    Case(
        "bin size of the architecture",
        4,
        lambda f: f.experiment(model={"name": "convnet", "settings": {"depth": 1}}),
        "convnet",
        "16",
        "[4, 8]",
    ),
    Case(
        "bin size of the weights",
        4,
        lambda f: f.experiment(model={"name": str(tiny_pretrained(f / "model", bin_size=8, crop=4))}),
        "model",
        "16",
        "bin_size: 8",
    ),
    Case(
        "pretrained heads",
        4,
        lambda f: f.experiment(model={**MODEL, "head": "extend"}),
        "model.head",
        "'convnet'",
        "head: new",
    ),
    Case("trained on the test regions", 3, _exposed, "tiny", "100.0%", "allow_exposure"),
    Case(
        "a card too small", 2, lambda f: [*f.experiment(), "--device", "0.2 MB"], "train.batch_size", "8", "se train."
    ),
    # Runs
    Case("output folder exists", 5, _existing_output, "data", "exists already", "another name"),
    Case("output below a file", 5, _below_a_file, "file/data", "cannot be made", "write to"),
    Case(
        "run below a file",
        5,
        lambda f: [*f.experiment("fit")[:2], str(f.write("file", "") / "run")],
        "file/run",
        "cannot be",
        "write to",
    ),
    Case("run exists", 5, _settings_of_run, "run", "already", "--resume"),
    Case("resumed with other settings", 5, _resume, "run", "['train.lr']", "start a new run"),
    Case(
        "run not finished",
        5,
        _damaged_run(lambda run: shutil.rmtree(run / "adapter")),
        "run",
        "not finished",
        "--resume",
    ),
    Case("not a run", 5, lambda f: ["evaluate", str(f.folder)], "0", "not a run", "seqgraft fit"),
    Case(
        "fold of no region", 2, lambda f: ["evaluate", str(f.run()), "--fold", "tset"], "coverage", "'tset'", "'test'"
    ),
    Case(
        "damaged adapter",
        4,
        _damaged_run(lambda run: _cut(run / "adapter" / "weights.safetensors")),
        "adapter",
        "'weights.safetensors'",
        "truncated",
    ),
    Case("another base", 4, _damaged_run(_other_base), "LoRA", "trunk", "Build the model"),
    Case("gtf without exons", 3, _no_exons, "genes.gtf", "'exon'", "third column"),
    Case(
        "no gtf",
        3,
        lambda f: _scored(f, {"genes": {"gtf": str(f / "none.gtf")}}),
        "none.gtf",
        "does not exist",
        "Check",
    ),
    Case(
        "baseline that does not suit",
        2,
        lambda f: _scored(f, {"baselines": ["kmer"]}),
        "evaluate.baselines",
        "'kmer'",
        "mean_track",
    ),
    Case(
        "original of an untrained trunk",
        2,
        lambda f: _scored(f, {"original": str(f.runs / "data" / "coverage")}),
        "evaluate.original",
        "'convnet'",
        "Leave it out",
    ),
    Case("report of nothing", 2, lambda f: ["report", str(f.folder)], "0", "no run", "seqgraft fit"),
    Case(
        "report below a file",
        5,
        lambda f: ["report", str(f.run()), "--out", str(f.write("file", "") / "a.html")],
        "a.html",
        "cannot be written",
        "another place",
    ),
    Case(
        "export without a card",
        2,
        lambda f: ["export", str(f.run()), str(f / "out"), "--name", "x", "--card", str(f / "none.md")],
        "--card",
        "none.md",
        "leave it out",
    ),
    # Predictions
    Case("unknown output", 2, _predict(BED, out="out.xls"), "out.xls", "unknown", ".parquet"),
    Case("existing output", 5, _existing_prediction, "out.csv", "exists already", "remove it"),
    Case(
        "no input",
        3,
        lambda f: ["predict", str(f.run()), str(f / "none.bed"), str(f / "o.csv")],
        "none.bed",
        "does not exist",
        "Check",
    ),
    Case("unknown input", 2, _predict(BED, name="in.gff"), "in.gff", "unknown", ".bed"),
    Case("interval beyond the contig", 3, _predict("chr1\t10\t999999\n"), "in.bed", "chr1:10-999999", "same assembly"),
    Case("interval on no contig", 3, _predict("chr9\t10\t20\n"), "in.bed", "'chr9'", "chr1"),
    Case("sequences of another length", 3, _predict(">a\nACGT\n", name="in.fa"), "in.fa sequence 1", "4", "extend it"),
    Case(
        "table without sequences",
        3,
        _predict("seq\nACGT\n", name="in.csv", run="labels"),
        "in.csv",
        "'sequence'",
        "It has seq",
    ),
    Case(
        "bigwig of sequences",
        2,
        _predict(">a\nACGT\n", name="in.fa", out="o.bw", run="labels"),
        "o.bw",
        "bigWig",
        ".parquet",
    ),
    Case("intervals for a model of sequences", 2, _predict(BED, run="labels"), "in.bed", "genome", "sequences"),
    Case(
        "variants without a genome", 2, _variants("chr1", run="labels"), "run", "would have no place", "from intervals"
    ),
    Case("too wide a centre", 2, _variants("chr1", "over=centre"), "over", "501", "at most 112 bp"),
    Case("variants of another naming", 3, _variants("1"), "in.vcf", "'1'", "rename: {'1': 'chr1'}"),
    Case(
        "embeddings of unknown kind",
        2,
        lambda f: ["embed", *_predict(BED, out="o.bw")(f)[1:]],
        "o.bw",
        "unknown",
        ".parquet",
    ),
]


def listing(folder: Path) -> dict[str, bytes]:
    """Every file with its content, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["seqgraft", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def check_message(text: str, case: Case) -> None:
    assert "Traceback" not in text
    first, *more = text.splitlines()
    assert first.startswith("seqgraft: "), text
    problems = [line for line in more if line.startswith("  - ")] if first.endswith("were found:") else [first]
    assert problems
    assert all(line.rstrip().endswith((".", "?")) for line in problems), text
    for part in ("where", "value", "remedy"):
        assert getattr(case, part) in text, f"the {part} {getattr(case, part)!r} is not in: {text}"


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(
    case: Case,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = case.make(Files(tmp_path, finished))
    before = listing(tmp_path)
    capsys.readouterr()
    code = call(arguments, monkeypatch)
    shown = capsys.readouterr()
    check_message(shown.err, case)
    assert code == case.code, shown.err
    after = listing(tmp_path)
    if case.name == "leaked rows":  # the list of copies that the message points to
        assert "out/data.duplicates.tsv" in after
        after = {name: content for name, content in after.items() if name not in ("out", "out/data.duplicates.tsv")}
    assert sorted(after) == sorted(before), "something half-written was left"
    assert after == before


# Not errors


def test_lower_case_and_iupac_bases_are_read_and_counted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(tmp_path, finished)
    text = files.genome().read_text().splitlines()
    text[1] = text[1][:100].lower() + "RYN" + text[1][103:]
    files.write("genome.fa", "\n".join(text) + "\n")
    assert call(files.coverage(), monkeypatch) == 0
    dataset = open_dataset(tmp_path / "out" / "data")
    assert dataset.info.notes["ambiguous_bases"] == 2
    assert dataset.genome is not None
    assert decode(dataset.genome.chrom_codes("chr1")[:103]) == text[1][:100].upper() + "NNN"


def test_several_problems_are_told_at_once(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = Files(tmp_path, finished).experiment(train={"epoch": 1, "lr": "fast"}, adapter={"kind": "none"})
    assert call(arguments, monkeypatch) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("seqgraft: 3 problems were found:")
    assert all(word in shown for word in ("'epoch'", "'fast'", "'none'"))


# As a process


def seqgraft(*arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose files may not grow beyond ``limit`` bytes: a full disk."""
    code = "from seqgraft.__main__ import main; main()"
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=240, check=False
    )


def test_as_a_process(finished: Path, tmp_path: Path) -> None:
    done = seqgraft(*Files(tmp_path, finished).coverage(without="window"))
    assert done.returncode == 2
    assert done.stderr.startswith("seqgraft: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_full_disk_while_preparing(finished: Path, tmp_path: Path) -> None:
    files = Files(tmp_path, finished)
    arguments = files.coverage(stride=1)
    assert seqgraft(*files.coverage(stride=64)).returncode == 0  # the genome is in the cache now
    shutil.rmtree(tmp_path / "out")
    before = listing(tmp_path)
    done = seqgraft(*files.coverage(stride=1), limit=4096)
    assert arguments[0] == "prepare"
    assert (done.returncode, "Traceback" in done.stderr) == (5, False), done.stderr
    assert done.stderr.startswith("seqgraft: ")
    assert "disk space" in done.stderr
    left = listing(tmp_path)
    assert [name for name in left if name not in before and name != "out"] == []


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_full_disk_while_training_and_predicting(finished: Path, tmp_path: Path) -> None:
    files = Files(tmp_path, finished)
    arguments = files.experiment("fit")
    done = seqgraft(*arguments, limit=8192)
    assert (done.returncode, "Traceback" in done.stderr) == (5, False), done.stderr
    assert "disk space" in done.stderr
    run = tmp_path / "out" / "run"
    assert not (run / "adapter").exists()
    assert not [path.name for path in run.rglob("*") if path.name.startswith(".") or path.name.endswith(".part")]
    done = seqgraft("evaluate", str(run))
    assert done.returncode == 5
    assert "--resume" in done.stderr
    out = files / "out.csv"
    before = set(listing(tmp_path))
    done = seqgraft("predict", str(files.run()), str(files.write("in.bed", BED * 20)), str(out), limit=8192)
    assert (done.returncode, "Traceback" in done.stderr) == (5, False), done.stderr
    assert {name for name in set(listing(tmp_path)) - before if not name.startswith("run")} == {"in.bed"}


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_full_disk_while_exporting_and_scoring(finished: Path, tmp_path: Path) -> None:
    run = Files(tmp_path, finished).run()
    before = listing(tmp_path)
    for arguments in (("export", str(run), str(tmp_path / "model"), "--name", "x"), ("evaluate", str(run))):
        done = seqgraft(*arguments, limit=2048)
        assert (done.returncode, "Traceback" in done.stderr) == (5, False), done.stderr
        assert "disk space" in done.stderr
        assert listing(tmp_path) == before
