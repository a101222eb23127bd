"""The command line: what each command says, and a whole run of coverage and of labels by commands alone."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from builders import SETTINGS, tiny_pretrained
from seqgraft import __version__
from seqgraft.__main__ import main
from seqgraft.adapters import LinearProbe
from seqgraft.bigwig import runs as runs_of
from seqgraft.bigwig import write_bigwig
from seqgraft.data import open_dataset
from seqgraft.genome import Interval
from seqgraft.models.folders import TRUNKS, find_model
from seqgraft.run import open_run
from seqgraft.sequence import decode
from seqgraft.tracks import read_bins

COMMANDS = (
    "demo",
    "simulate",
    "prepare",
    "retrack",
    "convert",
    "plan",
    "fit",
    "evaluate",
    "predict",
    "variants",
    "calibrate",
    "effects",
    "screen",
    "attribute",
    "embed",
    "sweep",
    "report",
    "serve",
    "export",
    "push",
    "pull",
    "models",
)
CHROMS = {"chr1": 4000, "chr2": 1600, "chr3": 1600}

#: Runs a command line: its exit code, what it said and its complaints.
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def seqgraft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["seqgraft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        shown = capsys.readouterr()
        return int(caught.value.code or 0), shown.out, shown.err

    return run


def done(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, err
    return out


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Help


def test_every_command_is_in_the_help(seqgraft: Command) -> None:
    shown = done(seqgraft("--help"))
    listed = re.findall(r"^\W*(\w+) {2,}\S", shown, flags=re.MULTILINE)
    assert set(COMMANDS) == set(listed) & set(COMMANDS)
    from seqgraft.cli import app

    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str, seqgraft: Command) -> None:
    shown = done(seqgraft(command, "--help"))
    assert command in shown
    assert "Usage" in shown
    assert "Traceback" not in shown


def test_version(seqgraft: Command) -> None:
    assert done(seqgraft("--version")) == f"seqgraft {__version__}\n"


def test_wrong_use_is_no_traceback(seqgraft: Command) -> None:
    for arguments in (("fits",), ("fit",), ("fit", "a", "b", "--epochs", "3"), ()):
        code, out, err = seqgraft(*arguments)
        assert code == 2, (arguments, code)
        assert "Usage" in out + err
        assert "Traceback" not in out + err


def test_models(seqgraft: Command) -> None:
    shown = done(seqgraft("models"))
    assert f"Architectures with random weights: {', '.join(TRUNKS)}." in shown


def test_published_weights_become_a_model(
    shared: Path, tmp_path: Path, seqgraft: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("h5py")
    monkeypatch.setattr("seqgraft.card._SHOWN", (LinearProbe(),))  # to save time
    files, out = shared / "reference" / "parity" / "trained_0.6M", tmp_path / "small"
    named = ("--name", "small", "--licence", "Apache-2.0")
    code, _, err = seqgraft("convert", files / "model.h5", out, *named)
    assert code == 2
    assert "--params" in err
    table = ("--params", files / "params.json", "--targets", files / "targets.txt")
    assert "model: {name:" in done(seqgraft("convert", files / "model.h5", out, *named, *table))
    found = find_model(str(out))
    assert found is not None
    assert len(found.tracks) == 74
    card = (out / "card.md").read_text()
    assert "Converted from Baskerville's `model.h5`" in card
    assert "| linear probe | 0 |" in card
    code, _, err = seqgraft("convert", tmp_path / "absent", tmp_path / "other", *named)
    assert code in (2, 4)
    assert "absent" in err


# A whole run


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genome, two bigWigs and a table of labelled sequences: read only."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    codes = {chrom: rng.integers(0, 4, size).astype(np.uint8) for chrom, size in CHROMS.items()}
    (folder / "genome.fa").write_text("".join(f">{c}\n{decode(bases)}\n" for c, bases in codes.items()))
    for name, base in (("rna+", 0), ("rna-", 3)):
        values = (value for c, bases in codes.items() for value in runs_of(c, (bases == base).astype(np.float64)))
        write_bigwig(folder / f"{name}.bw", CHROMS, values)
    (folder / "tracks.csv").write_text("name,file,squash\nrna+,rna+.bw,sqrt\nrna-,rna-.bw,sqrt\n")
    rows = [
        {
            "sequence": decode(rng.choice(4, 60, p=[0.1, 0.4, 0.4, 0.1] if row % 2 else None).astype(np.uint8)),
            "label": "rich" if row % 2 else "even",
            "fold": ("train", "train", "valid", "test")[row // 2 % 4],
        }
        for row in range(48)
    ]
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    return folder


def write(path: Path, content: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_coverage_from_raw_files_to_an_exported_model(raw: Path, tmp_path: Path, seqgraft: Command) -> None:
    data, run = tmp_path / "data", tmp_path / "runs" / "lora"
    source = write(
        tmp_path / "data.yaml",
        {
            "kind": "coverage",
            "fasta": str(raw / "genome.fa"),
            "tracks": str(raw / "tracks.csv"),
            "window": 256,
            "target_length": 192,
            "bin_size": 16,
            "folds": {"by": "chromosome", "valid": ["chr2"], "test": ["chr3"]},
        },
    )
    shown = done(seqgraft("prepare", source, data, "--set", "stride=96"))
    assert "train 40" in shown
    assert "2 tracks, windows of 256 bp, 12 bins of 16 bp" in shown
    other = pd.read_csv(raw / "tracks.csv").assign(scale=0.5)
    other.to_csv(tmp_path / "other.csv", index=False)
    assert "2 tracks with the settings" in done(seqgraft("retrack", data, tmp_path / "other.csv"))
    assert open_dataset(data).tracks.frame["scale"].tolist() == [0.5, 0.5]
    done(seqgraft("retrack", data, raw / "tracks.csv"))

    model = tiny_pretrained(tmp_path / "model", tracks=("old+", "old-"), trained_on=open_dataset(data))
    experiment = write(
        tmp_path / "lora.yaml",
        {
            "data": str(data),
            "model": {"name": str(model)},
            "adapter": {"kind": "lora", "rank": 2},
            "train": {"epochs": 2, "batch_size": 8, "lr": 1e-2},
            "evaluate": {"draws": 20, "block": 400, "ensemble": {"reverse_complement": True, "shift": 0}},
        },
    )
    code, shown, err = seqgraft("plan", experiment, run, "--device", "24 GB")
    assert (code, err) == (0, "")
    assert shown.endswith("fit would start.\n")
    for fact in ("LoRA r=2 (attention)", "train 40", "licence CC0", "a card of 24.0 GB", "per epoch"):
        assert fact in shown
    assert not run.exists()

    shown = done(seqgraft("fit", experiment, run, "--set", "train.epochs=3"))
    assert re.search(r"best validation score is -?\d\.\d{4}, in epoch \d of 3", shown)
    assert files(run) == {"adapter", "checkpoints", "environment.json", "experiment.yaml", "log.csv"}
    assert yaml.safe_load((run / "experiment.yaml").read_text())["train"]["epochs"] == 3
    assert len(pd.read_csv(run / "log.csv")) == 3
    assert json.loads((run / "environment.json").read_text())["command"].startswith("seqgraft fit ")

    shown = done(seqgraft("evaluate", run))
    for name in ("LoRA r=2 (attention)", "mean track", "nearest pretrained track", "mean profile", "3-mer ridge"):
        assert re.search(rf"^{re.escape(name)} .* pearson -?\d\.\d{{3}}", shown, flags=re.MULTILINE), shown
    assert files(run / "evaluation") == {"differences.parquet", "examples.npz", "metrics.parquet", "moments.npz"}
    assert set(pd.read_parquet(run / "evaluation" / "metrics.parquet")["fold"]) == {"test"}
    done(seqgraft("evaluate", run, "--fold", "valid"))
    assert set(pd.read_parquet(run / "evaluation" / "metrics.parquet")["fold"]) == {"valid"}

    _predict_coverage(run, tmp_path, seqgraft)
    page = done(seqgraft("report", run))
    assert str(run / "report.html") in page
    assert "<html" in (run / "report.html").read_text()
    done(seqgraft("report", run.parent, "--out", tmp_path / "all.html"))
    assert "LoRA r=2" in (tmp_path / "all.html").read_text()
    _export_and_start_from_it(run, experiment, tmp_path, seqgraft)


def _predict_coverage(run: Path, folder: Path, seqgraft: Command) -> None:
    opened = open_run(run)
    regions = opened.dataset.regions.iloc[opened.dataset.rows("test")]
    bed = folder / "test.bed"
    regions[::2][["chrom", "start", "end", "name"]].to_csv(bed, sep="\t", header=False, index=False)
    shown = done(seqgraft("predict", run, bed, folder / "out.bw"))
    assert files(folder / "out.bw") == {"rna+.bw", "rna-.bw"}
    assert str(folder / "out.bw" / "rna+.bw") in shown
    done(seqgraft("predict", run, bed, folder / "out.parquet"))
    table = pq.read_table(folder / "out.parquet").to_pandas()
    assert len(table) == len(regions[::2]) * 2 * 12
    assert (table["value"] >= 0).all()
    first = table[(table["track"] == "rna+") & (table["region"] == 0)]
    place = Interval(str(first["chrom"].iloc[0]), int(first["start"].min()), int(first["end"].max()))
    np.testing.assert_allclose(read_bins(folder / "out.bw" / "rna+.bw", place, 16), first["value"], rtol=1e-4)
    done(seqgraft("embed", run, bed, folder / "embedded.parquet"))
    embedded = pd.read_parquet(folder / "embedded.parquet")
    assert len(embedded) == len(regions[::2])
    assert [c for c in embedded if re.fullmatch(r"e\d+", c)] == [f"e{i}" for i in range(SETTINGS["channels"])]


def _export_and_start_from_it(run: Path, experiment: Path, folder: Path, seqgraft: Command) -> None:
    (folder / "card.md").write_text("# A model\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("seqgraft.card._SHOWN", (LinearProbe(),))  # to save time
        shown = done(seqgraft("export", run, folder / "grown", "--name", "grown", "--card", folder / "card.md"))
    card = (folder / "grown" / "card.md").read_text()
    assert card.startswith("# A model\n")
    assert "| linear probe | 0 |" in card
    assert "merged" in shown
    assert files(folder / "grown") == {"card.md", "model.json", "trained_on.bed", "weights.safetensors"}
    content = json.loads((folder / "grown" / "model.json").read_text())
    assert content["licence"] == "CC0"  # of the model that it grew from
    seen = pd.read_csv(folder / "grown" / "trained_on.bed", sep="\t", names=["chrom", "start", "end", "fold"])
    # the 40 regions that the first model names, then this run's windows, which join
    assert (seen["end"] - seen["start"]).tolist() == [192] * 40 + [39 * 96 + 192 + 32]
    assert seen.iloc[-1].tolist() == ["chr1", 0, 39 * 96 + 192 + 32, "train"]
    found = find_model(str(folder / "grown"))
    assert found is not None
    assert found.tracks.names == ["rna+", "rna-"]

    # its own tracks, untrained, are the run's predictions
    again = folder / "runs" / "again"
    settings = {
        **yaml.safe_load(experiment.read_text()),
        "model": {"name": str(folder / "grown"), "head": "pretrained"},
    }
    settings |= {"adapter": {"kind": "full"}, "train": {"epochs": 1, "lr": 1e-12}}
    # its test windows are new to it, its training windows are not
    done(seqgraft("fit", write(folder / "again.yaml", settings), again))
    bed = folder / "test.bed"
    done(seqgraft("predict", again, bed, folder / "again.parquet"))
    one, two = (pd.read_parquet(folder / name)["value"] for name in ("out.parquet", "again.parquet"))
    np.testing.assert_allclose(one, two, rtol=1e-3)
    settings["evaluate"] = {"fold": "train"}
    code, _, err = seqgraft("plan", write(folder / "exposed.yaml", settings))
    assert code == 3
    assert "100.0% of the windows of fold 'train'" in err


def test_labels_from_a_table_to_predictions(raw: Path, tmp_path: Path, seqgraft: Command) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    source = {"kind": "labelled", "files": [{"path": str(raw / "labels.csv")}], "folds": {"by": "column"}}
    assert "), 1 track, one label" in done(seqgraft("prepare", write(tmp_path / "data.yaml", source), data))
    experiment = {
        "data": str(data),
        "model": {"name": "convnet", "settings": SETTINGS},
        "adapter": {"kind": "full", "statistics": "batch"},
        "train": {"epochs": 2},
        "evaluate": {"draws": 20},
    }
    path = write(tmp_path / "experiment.yaml", experiment)
    assert "fit would start." in done(seqgraft("plan", path))
    done(seqgraft("fit", path, run))
    shown = done(seqgraft("evaluate", run))
    for name in ("from scratch", "k-mer regression", "majority"):
        assert re.search(rf"^{name} .* auroc ", shown, flags=re.MULTILINE), shown

    sequences = pd.read_csv(raw / "labels.csv")["sequence"].iloc[:5].tolist()
    (tmp_path / "in.fa").write_text("".join(f">s{n} text\n{text}\n" for n, text in enumerate(sequences)))
    pd.DataFrame({"name": [f"s{n}" for n in range(5)], "sequence": sequences}).to_csv(tmp_path / "in.csv", index=False)
    tables = []
    for name in ("in.fa", "in.csv"):
        done(seqgraft("predict", run, tmp_path / name, tmp_path / f"{name}.out.csv"))
        tables.append(pd.read_csv(tmp_path / f"{name}.out.csv"))
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["name"].tolist() == [f"s{n}" for n in range(5)]
    assert tables[0]["track"].unique().tolist() == ["label=rich"]
    assert tables[0]["value"].between(0, 1).all()
    done(seqgraft("embed", run, tmp_path / "in.fa", tmp_path / "embedded.npz"))
    with np.load(tmp_path / "embedded.npz", allow_pickle=False) as embedded:
        assert embedded["embeddings"].shape == (5, SETTINGS["channels"])


def test_resume_goes_on(raw: Path, tmp_path: Path, seqgraft: Command) -> None:
    """A run that lost its adapter and its last epoch is continued, and scored as it would have been."""
    data, run = tmp_path / "data", tmp_path / "run"
    source = {"kind": "labelled", "files": [{"path": str(raw / "labels.csv")}], "folds": {"by": "column"}}
    done(seqgraft("prepare", write(tmp_path / "data.yaml", source), data))
    experiment = {"data": str(data), "model": {"name": "convnet", "settings": SETTINGS}, "train": {"epochs": 2}}
    path = write(tmp_path / "experiment.yaml", experiment)
    first = done(seqgraft("fit", path, run))
    code, _, err = seqgraft("fit", path, run)
    assert code == 5
    assert "--resume" in err
    again = done(seqgraft("fit", path, run, "--resume", "--set", "evaluate.draws=7"))
    assert first.partition("(")[0] == again.partition("(")[0]
    assert yaml.safe_load((run / "experiment.yaml").read_text())["evaluate"]["draws"] == 7
    code, _, err = seqgraft("fit", path, run, "--resume", "--set", "train.seed=5", "--set", "adapter.kind=full")
    assert code == 5
    assert "['adapter', 'train.seed']" in err
    assert yaml.safe_load((run / "experiment.yaml").read_text())["adapter"]["kind"] == "linear_probe"


def test_simulate(tmp_path: Path, seqgraft: Command) -> None:
    path = write(tmp_path / "sim.yaml", {"chromosmes": 3})
    code, _, err = seqgraft("simulate", path, tmp_path / "sim")
    assert code == 2
    assert "'chromosmes'" in err
    assert not (tmp_path / "sim").exists()
