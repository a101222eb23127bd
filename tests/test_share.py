"""Sharing: pulled runs give the numbers of their runs, what is private stays behind, and nothing is trusted."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import shlex
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from torch import nn

from builders import LANGUAGE, SETTINGS, tiny_coverage, tiny_labels, tiny_pretrained
from hub_stub import COMMIT, Hub, serve_hub
from seqgraft.__main__ import main
from seqgraft.apply import embed_run, predict_run, score_run
from seqgraft.data import prepare_source
from seqgraft.errors import ConfigError, DataError, ModelError, RunError, SeqgraftError
from seqgraft.experiment import Experiment, parse_experiment, parse_source
from seqgraft.export import export_run, trained_windows
from seqgraft.genome import Genome, Interval
from seqgraft.joint import JointConfig
from seqgraft.models.dryrun import shapes_alone
from seqgraft.run import evaluate_run, fit_run, open_run
from seqgraft.sequence import decode
from seqgraft.share import FILES, MARKER, Pulled, pull, push
from seqgraft.variants import VariantConfig
from seqgraft.variants.over import Centre
from test_personal import source_of, write_cohort
from test_readme import ROOT, blocks

TOKEN = "hf_nobodysToken"
GUIDE = ROOT / "docs" / "guides" / "sharing.md"
CENTRE = VariantConfig(over=Centre(48))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of coverage (on a local base), of labels, and of labels with covariates; and what they may predict."""
    root = tmp_path_factory.mktemp("made")
    dataset = tiny_coverage(root / "data" / "coverage", regions=12)
    table = dataset.folder / "tracks.parquet"
    pd.read_parquet(table).assign(file="secret_file.bw", replicate="secret_sample").to_parquet(table)
    tiny_labels(root / "data" / "labels")
    _prepare_covariates(root)
    base, convnet = {"name": str(tiny_pretrained(root / "trunk"))}, {"name": "convnet", "settings": SETTINGS}
    whole = {"kind": "full", "statistics": "batch"}
    _fit(root, "coverage", model=base, adapter={"kind": "lora", "rank": 2, "where": ["attention"]})
    _fit(root, "labels", model=convnet, adapter=whole)
    _fit(root, "covariates", model=convnet, adapter=whole)
    evaluate_run(root / "coverage")
    (root / "some.bed").write_text("chr1\t400\t700\tone\nchr1\t900\t1000\tanother\n")
    (root / "some.fa").write_text(">a\nACGTACGTTTGACAACGTACGTTTGACA\n>b\nTTGACATTGATTGCCCATAATTGACATTGATTGCCCATAA\n")
    (root / "some.csv").write_text("sequence,weight\nACGTACGTTTGACAACGTACGTTTGACA,0.5\nTTGACATTGATTGCC,-2\n")
    assert dataset.genome is not None
    ref = _base_at(dataset.genome, 899)
    header = f"##fileformat=VCFv4.2\n##contig=<ID=chr1,length={dataset.genome.chroms['chr1']}>\n"
    header += "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    (root / "some.vcf").write_text(f"{header}chr1\t900\tv\t{ref}\t{'A' if ref != 'A' else 'C'}\t.\t.\t.\n")
    return root


def _prepare_covariates(root: Path) -> None:
    rng = np.random.default_rng(3)
    sequences = ["".join(rng.choice(list("ACGT"), 40)) for _ in range(24)]
    rows = {"sequence": sequences, "label": rng.normal(size=24), "weight": rng.normal(3, 2, size=24)}
    rows |= {"fold": ["train", "train", "valid", "test"] * 6, "name": [f"secret_{i}" for i in range(24)]}
    pd.DataFrame(rows).to_csv(root / "table.csv", index=False)
    labels = [{"column": "label", "task": "regression"}]
    source = {"kind": "labelled", "files": [{"path": str(root / "table.csv")}], "labels": labels}
    prepare_source(parse_source(source | {"covariates": ["weight"]}), root / "data" / "covariates")


def _base_at(genome: Genome, position: int) -> str:
    return decode(genome.codes(Interval("chr1", position, position + 1)))


def _fit(root: Path, name: str, **sections: Any) -> None:
    content = {"data": str(root / "data" / name), "train": {"epochs": 1, "batch_size": 4}, "evaluate": {"draws": 20}}
    fit_run(parse_experiment(content | sections), root / name)


@pytest.fixture
def shared(made: Path, tmp_path: Path) -> Path:
    """The coverage run's adapter as a folder, to be spoilt."""
    push(made / "coverage", to=tmp_path / "shared")
    return tmp_path / "shared"


def _pull(made: Path, shared: Path, to: Path, **more: Any) -> Pulled:
    return pull(str(shared), to, **({"genome": made / "data" / "coverage.fa", "base": str(made / "trunk")} | more))


def _same_tables(one: Path, two: Path) -> None:
    first, second = (pd.read_parquet(path) for path in (one, two))
    assert len(first)
    pd.testing.assert_frame_equal(first, second, check_exact=True)


# The same numbers


def test_a_pulled_run_predicts_and_scores_variants_as_the_run(made: Path, shared: Path, tmp_path: Path) -> None:
    assert {path.name for path in shared.iterdir()} == set(FILES)
    pulled = _pull(made, shared, tmp_path / "pulled")
    assert pulled.placed
    for name, run in (("here", made / "coverage"), ("there", tmp_path / "pulled")):
        predict_run(run, made / "some.bed", tmp_path / f"{name}.parquet")
        embed_run(run, made / "some.bed", tmp_path / f"embedded-{name}.parquet")
        score_run(run, made / "some.vcf", tmp_path / f"scores-{name}.parquet", CENTRE)
    for what in ("", "embedded-", "scores-"):
        _same_tables(tmp_path / f"{what}here.parquet", tmp_path / f"{what}there.parquet")
    # it may be moved, since its data are inside
    (tmp_path / "pulled").rename(tmp_path / "moved")
    predict_run(tmp_path / "moved", made / "some.bed", tmp_path / "moved.parquet")
    _same_tables(tmp_path / "here.parquet", tmp_path / "moved.parquet")
    with pytest.raises(ConfigError, match=r"no data to be scored on.*--data"):
        evaluate_run(tmp_path / "moved")


def test_with_its_data_a_pulled_run_has_the_same_scores(made: Path, shared: Path, tmp_path: Path) -> None:
    pulled = _pull(made, shared, tmp_path / "pulled", genome=None, data=made / "data" / "coverage")
    assert pulled.placed
    scored = evaluate_run(tmp_path / "pulled").metrics
    pd.testing.assert_frame_equal(scored, pd.read_parquet(made / "coverage" / "evaluation" / "metrics.parquet"))


def test_an_export_of_it_says_what_it_was_trained_on(made: Path, shared: Path, tmp_path: Path) -> None:
    _pull(made, shared, tmp_path / "pulled")
    for run in (made / "coverage", tmp_path / "pulled"):
        export_run(run, tmp_path / f"export-{run.name}", name="one")
    seen = [(tmp_path / f"export-{name}" / "trained_on.bed").read_text() for name in ("coverage", "pulled")]
    assert seen[0] == seen[1]
    assert "train" in seen[0]
    assert trained_windows(open_run(made / "coverage")) is not None


@pytest.mark.parametrize(("name", "source"), [("labels", "some.fa"), ("covariates", "some.csv")])
def test_labels_need_no_genome(made: Path, tmp_path: Path, name: str, source: str) -> None:
    push(made / name, to=tmp_path / "shared")
    assert "trained_on.bed" not in {path.name for path in (tmp_path / "shared").iterdir()}
    pulled = pull(str(tmp_path / "shared"), tmp_path / "pulled")
    assert pulled.genome is None
    for each, run in (("here", made / name), ("there", tmp_path / "pulled")):
        predict_run(run, made / source, tmp_path / f"{each}.parquet")
    _same_tables(tmp_path / "here.parquet", tmp_path / "there.parquet")


def test_a_model_of_hidden_tokens(made: Path, tmp_path: Path) -> None:
    model = {"name": "language", "settings": LANGUAGE | {"lm_head": True}}
    content = {"data": str(made / "data" / "coverage"), "model": model, "loss": {"kind": "masked_tokens"}}
    fit_run(parse_experiment(content | {"adapter": {"kind": "full"}, "train": {"epochs": 1}}), tmp_path / "run")
    push(tmp_path / "run", to=tmp_path / "shared")
    pull(str(tmp_path / "shared"), tmp_path / "pulled", genome=made / "data" / "coverage.fa")
    for name in ("run", "pulled"):
        score_run(tmp_path / name, made / "some.vcf", tmp_path / f"{name}.parquet")
    _same_tables(tmp_path / "run.parquet", tmp_path / "pulled.parquet")


def test_without_the_genome_sequences_alone_are_predicted(made: Path, shared: Path, tmp_path: Path) -> None:
    assert not _pull(made, shared, tmp_path / "pulled", genome=None).placed
    with pytest.raises(ConfigError, match="intervals need a genome"):
        predict_run(tmp_path / "pulled", made / "some.bed", tmp_path / "out.parquet")


# What stays behind


def _all_bytes(folder: Path) -> bytes:
    return b"\n".join(
        path.name.encode() + b"\n" + path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    )


@pytest.mark.parametrize("name", ["coverage", "labels", "covariates"])
def test_no_path_file_sample_or_row_is_shared(made: Path, tmp_path: Path, name: str) -> None:
    push(made / name, to=tmp_path / "shared")
    content = _all_bytes(tmp_path / "shared")
    rows = [text for text in open_run(made / name).dataset.regions["name"] if len(text) > 3]
    for secret in (str(made), str(Path.home()), "secret_", ".bw", "table.csv", *rows):
        assert secret.encode() not in content, secret


def test_no_donor_is_shared(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    files = write_cohort(tmp_path / "files")
    for name in ("c.vcf", "e.tsv", "donors.tsv"):
        files[name].write_text(re.sub(r"\bd(\d\d)\b", r"person_\1", files[name].read_text()))
    data = prepare_source(source_of(files), tmp_path / "cohort")
    content = {"data": str(data.folder), "model": {"settings": SETTINGS, "centre": 12}, "train": {"epochs": 1}}
    fit_run(parse_experiment(content), tmp_path / "run")
    evaluate_run(tmp_path / "run")
    push(tmp_path / "run", to=tmp_path / "shared")
    shared = _all_bytes(tmp_path / "shared")
    people = pd.read_csv(files["donors.tsv"], sep="\t")
    genes = pd.read_csv(files["genes.tsv"], sep="\t")["gene"]
    for secret in (*people["donor"], "person_", str(tmp_path), "c.vcf", "e.tsv"):
        assert secret.encode() not in shared, secret
    assert not re.search(rb"\b(" + "|".join(genes).encode() + rb")\b", shared)
    assert re.search(rb"pearson_within_genes", shared)  # the scores are there
    pull(str(tmp_path / "shared"), tmp_path / "pulled", genome=files["g.fa"])
    (tmp_path / "in.bed").write_text("c1\t3000\t3100\tx\nc2\t5000\t5200\ty\n")
    for run in ("run", "pulled"):
        predict_run(tmp_path / run, tmp_path / "in.bed", tmp_path / f"{run}.parquet")
    _same_tables(tmp_path / "run.parquet", tmp_path / "pulled.parquet")


def _paths(cls: type, name: str = "") -> set[str]:
    """The keys below a dataclass that hold paths."""
    found = set()
    for key, hint in typing.get_type_hints(cls).items():
        parts, here = [hint], f"{name}{key}"
        while parts:
            part = parts.pop()
            parts += typing.get_args(part)
            if part is Path:
                found.add(here)
            elif dataclasses.is_dataclass(part) and isinstance(part, type):
                found |= _paths(part, f"{here}.")
    return found


def test_every_key_that_holds_a_path_is_known() -> None:
    """Whoever adds one to experiments says here that it does not travel, or that it may."""
    left_behind = {"data", "model.trained_on", "evaluate.original", "evaluate.genes.gtf", "evaluate.genes.truth"}
    assert _paths(Experiment) == {*left_behind, "joint.data"}  # a run with joint data is refused


def test_a_run_with_joint_data_is_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(made / "coverage")
    experiment = dataclasses.replace(run.experiment, joint=JointConfig(made / "data" / "coverage"))
    monkeypatch.setattr("seqgraft.share.open_run", lambda _: dataclasses.replace(run, experiment=experiment))
    with pytest.raises(ConfigError, match="other data trained along"):
        push(made / "coverage", to=tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


# The card


def test_the_card_is_what_the_hub_reads(made: Path, tmp_path: Path) -> None:
    stated = {"licence": "MIT", "citation": "Doe (2026). A <b>cell</b> state", "card": "Of *my* cells."}
    push(made / "coverage", to=tmp_path / "shared", **stated)
    card = ModelCard((tmp_path / "shared" / "README.md").read_text())
    assert (card.data.library_name, card.data.license) == ("seqgraft", "mit")
    assert {"seqgraft", "lora", "coverage"} <= set(card.data.tags)
    assert card.data.base_model is None  # it has a name only here
    metrics = pd.read_parquet(made / "coverage" / "evaluation" / "metrics.parquet").query(
        "track == '' and unit == 'squashed'"
    )
    label = open_run(made / "coverage").experiment.adapter.label
    scores = {result.dataset_name: result for result in card.data.eval_results}
    assert set(scores) == {"rna", "atac"}
    for group, part in metrics[metrics["metric"] == "pearson"].groupby("group"):
        values = part.set_index("model")
        found = scores[group]
        assert found.metric_value == round(values.loc[label, "value"], 4)
        assert found.metric_args["baselines"]["mean track"] == round(values.loc["mean track", "value"], 4)
    for text in (
        "| mean track |",
        "seqgraft pull FOLDER pulled --base BASE_FOLDER --genome genome.fa",
        "Doe (2026)",
        "Of *my* cells.",
    ):
        assert text in card.text, text
    assert "<b>" not in card.text


def test_scores_on_the_card_have_intervals(made: Path, tmp_path: Path) -> None:
    metrics = evaluate_run(made / "labels").metrics.query("track == '' and metric == 'auroc'").set_index("model")
    push(made / "labels", to=tmp_path / "shared")
    (found,) = ModelCard((tmp_path / "shared" / "README.md").read_text()).data.eval_results
    score = metrics.loc["from scratch"]
    assert found.metric_value == round(score["value"], 4)
    assert found.metric_args["interval_95"] == [round(score[end], 4) for end in ("low", "high")]
    assert found.metric_args["baselines"] == {
        name: round(metrics.loc[name, "value"], 4) for name in ("k-mer regression", "majority")
    }


@pytest.mark.parametrize(
    ("stated", "known", "name"),
    [("CC-BY-4.0", "cc-by-4.0", None), ("CC0", "cc0-1.0", None), ("ask us", "other", "ask us"), ("", "cc0-1.0", None)],
)
def test_licences(made: Path, tmp_path: Path, stated: str, known: str, name: str | None) -> None:
    push(made / "coverage", to=tmp_path / "shared", licence=stated)  # the base's is CC0
    data = ModelCard((tmp_path / "shared" / "README.md").read_text()).data
    assert (data.license, data.license_name) == (known, name)


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub(TOKEN) as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of the hub's own for large files
        monkeypatch.setattr(constants, "ENDPOINT", running.url)  # read from HF_ENDPOINT when it is imported
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield running


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def seqgraft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command: its exit code, and all that it said, which never has the token."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["seqgraft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert TOKEN not in shown.out + shown.err
        return int(ended.value.code or 0), shown.out + shown.err

    return run


def test_there_and_back(made: Path, tmp_path: Path, hub: Hub, seqgraft: Command) -> None:
    code, said = seqgraft("push", made / "coverage", "lab/cells", "--private")
    assert code == 0, said
    assert f"seqgraft pull lab/cells@{COMMIT} NEW_FOLDER" in said
    assert hub.private == {"lab/cells": True}
    push(made / "coverage", to=tmp_path / "folder")
    files = hub.repositories["lab/cells"]
    assert set(files) == {".gitattributes", *FILES}
    for name in set(FILES) - {"README.md"}:
        assert files[name] == (tmp_path / "folder" / name).read_bytes()
    files |= {"evil.py": b"raise SystemExit(7)", "../up.txt": b"up", "pytorch_model.bin": b"a pickle"}
    hub.asked.clear()
    genome = made / "data" / "coverage.fa"
    code, said = seqgraft(
        "pull", f"lab/cells@{COMMIT}", tmp_path / "pulled", "--base", made / "trunk", "--genome", genome
    )
    assert code == 0, said
    assert "LoRA r=2 (attention)" in said
    fetched = [line for line in hub.asked if "/resolve/" in line]
    assert {line.rpartition("/")[2] for line in fetched} == set(FILES)
    here = {path.relative_to(tmp_path / "pulled") for path in (tmp_path / "pulled").rglob("*") if path.is_file()}
    assert not {path.name for path in here} & {"evil.py", "up.txt", "pytorch_model.bin", "model.bin"}
    assert not (tmp_path / "up.txt").exists()
    for name, run in (("here", made / "coverage"), ("there", tmp_path / "pulled")):
        predict_run(run, made / "some.bed", tmp_path / f"{name}.parquet")
    _same_tables(tmp_path / "here.parquet", tmp_path / "there.parquet")


def test_pushing_again_replaces_what_was_there(made: Path, hub: Hub) -> None:
    push(made / "coverage", "lab/cells")
    assert hub.private == {"lab/cells": False}
    assert push(made / "labels", "lab/cells", revision="labels") == f"lab/cells@{COMMIT}"
    assert hub.branches == ["labels"]
    assert set(hub.repositories["lab/cells"]) == {".gitattributes", *FILES} - {"trained_on.bed"}


def test_pushing_is_refused(
    made: Path, tmp_path: Path, hub: Hub, seqgraft: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories |= {"lab/other": {"README.md": b"theirs"}, "lab/mine": {MARKER: b"{}"}}
    hub.private |= {"lab/other": False, "lab/mine": False}
    run = made / "coverage"
    for words, message in (
        (("lab/other",), "lab/other: the repository holds something else already: ['README.md']"),
        (("lab/mine", "--private"), "lab/mine: the repository exists and is public"),
        (("lab",), "This is no name of a repository: 'lab'"),
        ((), "An adapter goes to one place"),
        (("lab/mine", "--to", tmp_path / "x"), "An adapter goes to one place"),
        (("--to", tmp_path / "x", "--private"), "only a repository is private"),
        (("--to", tmp_path), "The output folder exists already"),
    ):
        code, said = seqgraft("push", run, *words)
        assert code in (2, 5), said
        assert message in said
    assert hub.repositories == {"lab/other": {"README.md": b"theirs"}, "lab/mine": {MARKER: b"{}"}}
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    code, said = seqgraft("push", run, "lab/new")
    assert code == 5
    assert "the hub could not be asked" in said
    assert "hf auth login" in said
    assert "hf_another" not in said
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "experiment.yaml").write_text("data: x\n")
    with pytest.raises(RunError, match="was not finished"):
        push(tmp_path / "begun", "lab/new")


def test_pulling_from_the_hub_is_refused(made: Path, tmp_path: Path, hub: Hub) -> None:
    push(made / "labels", "lab/labels")
    for source, message in (
        ("lab/labels@main", "names no commit"),
        ("lab@" + COMMIT, "names no commit"),
        ("lab/none@" + COMMIT, "could not be asked"),
        ("lab/labels@" + "d" * 40, "has no such commit"),  # the hub answers with another
        ("nowhere", "no such folder"),
        ("lab/labels", "no commit of a repository is named"),
    ):
        with pytest.raises(SeqgraftError, match=message):
            pull(source, tmp_path / "pulled")
    hub.sizes["weights.safetensors"] = FILES["weights.safetensors"] + 1
    hub.asked.clear()
    with pytest.raises(ModelError, match=r"weights\.safetensors has more bytes"):
        pull(f"lab/labels@{COMMIT}", tmp_path / "pulled")
    assert not any("weights" in line for line in hub.asked)
    del hub.repositories["lab/labels"][MARKER]
    with pytest.raises(ModelError, match="lacks files of a shared adapter"):
        pull(f"lab/labels@{COMMIT}", tmp_path / "pulled")
    assert {path.name for path in tmp_path.iterdir()} <= {"hub-cache"}


def test_no_hub(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"lab/cells: the hub could not be asked"):
        push(made / "labels", "lab/cells")
    with pytest.raises(ModelError, match=r"lab/cells: the hub could not be asked"):
        pull(f"lab/cells@{COMMIT}", made / "never")


# Untrusted files


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _inputs(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["inputs"].update(values)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (MARKER, lambda c: c.clear(), "does not describe a shared adapter"),
        (MARKER, lambda c: c.update(format_version=2), "another format version"),
        (MARKER, lambda c: c.pop("inputs"), r"inputs\.window"),
        (MARKER, lambda c: c.update(base=[]), r"base\.name"),
        (MARKER, _inputs(window="256"), r"inputs\.window"),
        (MARKER, _inputs(bins=-1), "'inputs'"),
        (MARKER, _inputs(window=10**12), "'inputs'"),
        (MARKER, _inputs(covariates=[["a"]]), r"'inputs\.covariates'"),
        (MARKER, lambda c: c["experiment"].update(joint={"data": "/etc"}), r"'experiment\.joint'"),
        (MARKER, _inputs(tracks=[1]), "track table is damaged"),
        (MARKER, _inputs(tracks=[{"name": "a"}]), "tracks differ"),
        (MARKER, _inputs(tracks=[]), "tracks|heads|tensor"),
        (MARKER, lambda c: c["experiment"].update(extra=1), "there is no such key"),
        (MARKER, lambda c: c["experiment"]["model"].update(name="${HF_TOKEN}"), "'experiment'"),
        (MARKER, lambda c: c["experiment"]["evaluate"]["ensemble"].update(shift="a"), "shift"),
        (MARKER, lambda c: c["experiment"]["model"].update(remote_code="a" * 40), "--remote-code"),
        ("adapter.json", lambda c: c.clear(), "does not describe an adapter"),
        ("adapter.json", lambda c: c.update(kind="evil"), "no adapter of this kind"),
        ("adapter.json", lambda c: c.update(settings={"rank": 2, "run": 1}), "no such key: 'run'"),
        ("adapter.json", lambda c: c["settings"].update(last="x"), "adapter.json: last"),
        ("adapter.json", lambda c: c["settings"].update(where=[["attention"]]), "adapter.json: where"),
        ("adapter.json", lambda c: c.update(settings=[1]), "entries"),
        ("adapter.json", lambda c: c.update(base="x"), "entries"),
        ("adapter.json", lambda c: c.update(tracks=[1]), "entries|damaged"),
        ("adapter.json", lambda c: c["settings"].update(rank=3), "another shape"),
        ("adapter.json", lambda c: c["settings"].update(rank=10**7), "larger than any size of the adapter's tensors"),
    ],
)
def test_spoilt_descriptions(
    made: Path, shared: Path, tmp_path: Path, file: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    _edit(shared / file, change)
    with pytest.raises(SeqgraftError, match=message):
        _pull(made, shared, tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_spoilt_files(made: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, keep = shared / "weights.safetensors", (shared / "weights.safetensors").read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message):
            _pull(made, shared, tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists()

    weights.write_bytes(keep[:-9])
    refused("cannot be read")
    torch.save({"a": torch.zeros(2)}, weights)  # a pickle by that name
    refused("cannot be read")
    weights.unlink()
    refused(r"holds no shared adapter; it lacks: 'weights\.safetensors'")
    weights.symlink_to(made / "trunk" / "weights.safetensors")
    refused("a link or a folder: 'weights.safetensors'")
    weights.unlink()
    tensors = load_file(made / "coverage" / "adapter" / "weights.safetensors")
    save_file({**tensors, "trunk.more": torch.zeros(3)}, weights)
    refused("a tensor too many: 'trunk.more'")
    weights.write_bytes(keep)
    monkeypatch.setitem(FILES, "README.md", 10)
    refused("README.md has more bytes than one of its kind may have, 10")
    monkeypatch.undo()
    for text in ("[" * 100_000, "1" * 5000):
        (shared / MARKER).write_text(text)
        refused("not valid JSON")


def test_settings_cannot_ask_for_a_model_of_any_size(made: Path, tmp_path: Path) -> None:
    push(made / "labels", to=tmp_path / "shared")
    _edit(tmp_path / "shared" / MARKER, lambda c: c["experiment"]["model"]["settings"].update(channels=2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"more than 1,000,\d+,\d+ numbers"):
        pull(str(tmp_path / "shared"), tmp_path / "pulled")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2**40, 2**10), "more than 1,000 numbers"),
        (lambda: nn.BatchNorm1d(400), "more than 1,000 numbers"),  # with its statistics
        (lambda: [nn.ParameterList([torch.zeros(0)]) for _ in range(200_000)], "100,000 tensors"),
        (lambda: nn.Linear(-4, 4), "no model can be built"),
        (lambda: nn.Linear(2**80, 4), "no model can be built"),
        (lambda: nn.Linear(4 // 0, 4), "no model can be built"),
    ],
)
def test_modules_of_shapes_alone(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ModelError, match=message), shapes_alone(1000, "here"):
        build()
    with shapes_alone(20, "here"):
        assert nn.Linear(4, 4).weight.is_meta
    assert not nn.Linear(40, 4).weight.is_meta


def test_what_is_not_known_is_not_copied(made: Path, shared: Path, tmp_path: Path) -> None:
    (shared / "evil.py").write_text("raise SystemExit(7)")
    (shared / "data").mkdir()
    (shared / "data" / "dataset.json").write_text("{}")
    _pull(made, shared, tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "evil.py").exists()
    assert json.loads((tmp_path / "pulled" / "data" / "dataset.json").read_text())["window"] == 256


def test_another_base_genome_or_data(made: Path, shared: Path, tmp_path: Path) -> None:
    tiny_pretrained(tmp_path / "other", seed=9)
    (tmp_path / "other.fa").write_text(">chr1\n" + "ACGT" * 592 + "\n")
    tiny_coverage(tmp_path / "otherdata", tracks=("atac", "more"))
    recorded = json.loads((shared / MARKER).read_text())["base"]["weights_sha256"]
    for more, kind, message in (
        ({"base": None}, ConfigError, f"none that can be fetched; its weights have the hash {recorded}: 'tiny'"),
        (
            {"base": str(tmp_path / "other")},
            ModelError,
            rf"other weights \(\w+\) than the adapter was trained on: '{recorded}",
        ),
        ({"base": str(tmp_path / "none")}, ConfigError, "there is no such model"),
        ({"genome": tmp_path / "other.fa"}, DataError, "genome is another than the adapter was trained on"),
        ({"genome": None, "data": tmp_path / "otherdata"}, DataError, "another name of tracks than the adapter"),
        ({"data": tmp_path / "otherdata"}, ConfigError, "a dataset brings its own genome"),
        ({"remote_code": "a" * 40}, ConfigError, "no code is needed"),
    ):
        with pytest.raises(kind, match=message):
            _pull(made, shared, tmp_path / "pulled", **more)
    assert not (tmp_path / "pulled").exists()


def test_a_path_is_no_name_of_a_base(made: Path, shared: Path, tmp_path: Path) -> None:
    """A shared file cannot make this machine read a folder of its choice."""
    _edit(shared / MARKER, lambda c: c["base"].update(name=str(made / "trunk"), local=False))
    with pytest.raises(ConfigError, match="none that can be fetched"):
        _pull(made, shared, tmp_path / "pulled", base=None)


def test_bases_that_others_find(made: Path, tmp_path: Path) -> None:
    """A bundled base by its name; a converted one by its repository and commit."""
    data = tiny_coverage(tmp_path / "data", regions=6, tracks=("atac",))
    content = {"data": str(data.folder), "train": {"epochs": 1}, "allow_exposure": True}
    fit_run(parse_experiment(content | {"model": {"name": "sim-mini"}}), tmp_path / "bundled")
    push(tmp_path / "bundled", to=tmp_path / "shared")
    base = json.loads((tmp_path / "shared" / MARKER).read_text())["base"]
    assert (base["name"], base["local"]) == ("sim-mini", False)
    pull(str(tmp_path / "shared"), tmp_path / "pulled")
    trunk = tiny_pretrained(tmp_path / "converted")
    origin = {"source": "lab/trunk", "revision": "b" * 40}
    _edit(trunk / "model.json", lambda c: c.update(converted_from=origin))
    fit_run(parse_experiment(content | {"model": {"name": str(trunk)}}), tmp_path / "run")
    push(tmp_path / "run", to=tmp_path / "again")
    base = json.loads((tmp_path / "again" / MARKER).read_text())["base"]
    assert (base["name"], base["revision"], base["local"]) == ("lab/trunk", "b" * 40, False)
    card = ModelCard((tmp_path / "again" / "README.md").read_text()).data
    assert (card.base_model, card.to_dict()["base_model_relation"]) == ("lab/trunk", "adapter")
    pull(str(tmp_path / "again"), tmp_path / "with", base=str(trunk))


# The guide


def test_the_guide(tmp_path: Path, hub: Hub, seqgraft: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    found = [block for block in blocks(GUIDE.read_text()) if block.language]
    assert {block.marker for block in found} == {"run", "run: hub"}
    for block in found:
        if block.language == "python":
            exec(compile(block.code, GUIDE.name, "exec"), names)
            continue
        for line in block.code.splitlines():
            code, said = seqgraft(*shlex.split(line.replace("@COMMIT", f"@{COMMIT}"))[1:])
            assert code == 0, said
    assert names["before"].equals(names["after"])
    assert set(hub.repositories) == {"your-lab/activated-cells"}
    assert {path.name for path in Path("shared").iterdir()} == set(FILES)
    assert set(FILES) <= set(re.findall(r"`([\w.]+)`", GUIDE.read_text()))
    predict_run(Path("from-hub"), Path("regions.bed"), Path("hub.parquet"))
    assert pd.read_parquet("hub.parquet").equals(names["after"])
    card = ModelCard(Path("shared/README.md").read_text())
    assert card.data.license == "cc-by-4.0"
    assert card.data.eval_results[0].metric_args["baselines"]
