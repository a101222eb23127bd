"""Reports: from run directories, whole or not, to one page that stands alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from seqgraft.errors import ConfigError, RunError
from seqgraft.report import write_comparison, write_report

EVIL = "<script>alert(1)</script>\"'&{{ 7*7 }}</style>"


def metrics(label: str, value: float, baseline: float = 0.41, metric: str = "pearson") -> pd.DataFrame:
    rows = []
    for model, mean in [(label, value), ("mean track", 0.33), ("nearest pretrained track", baseline), ("oracle", 0.7)]:
        for track, score in [("plus", mean + 0.01), (EVIL, mean - 0.01), ("", mean)]:
            rows.append((model, "test", "rna", track, metric, score, score - 0.03, score + 0.03, 300, "squashed", ""))
    columns = ["model", "fold", "group", "track", "metric", "value", "low", "high", "n", "unit", "note"]
    return pd.DataFrame(rows, columns=columns)


def make_run(folder: Path, label: str = "LoRA(rank=8)", value: float = 0.54, **changes: Any) -> Path:
    for name in ("adapter", "evaluation"):
        (folder / name).mkdir(parents=True)
    environment = {
        "label": label,
        "versions": {"seqgraft": "0.1.0", "torch": "2.9"},
        "command": f"seqgraft fit a.yaml {EVIL}",
        "metric": "pearson",
        "dataset": {
            "folder": "data/yeast", "hash": "ab12", "kind": "coverage", "window": 4096, "bins": 128, "bin_size": 16,
            "folds": {"train": 1200, "test": 300}, "tracks": ["plus", EVIL], "chroms": {"test": ["chrXIV", "chrXVI"]},
            "notes": {"skipped": 3},
        },
        "model": {"name": "yeast-mini", "licence": "Apache-2.0", "parameters": 810_000},
        "counts": {"adapter": 12_000, "head": 650, "trunk": 0, "total": 822_650},
        "result": {"best_epoch": 3, "epochs": 5, "steps": 1500},
        "seconds": 734.2,
        "peak_memory_bytes": 812_000_000,
        **changes,
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "experiment.yaml").write_text(f"data: data/yeast\n# {EVIL}\n")
    (folder / "adapter" / "adapter.json").write_text(json.dumps({"label": label}))
    (folder / "adapter" / "weights.safetensors").write_bytes(bytes(51_000))
    epoch = np.arange(1, 6)
    curve = {"epoch": epoch, "train_loss": 1 / epoch, "valid_loss": 2 / epoch, "valid_score": 0.1 * epoch}
    pd.DataFrame(curve).to_csv(folder / "log.csv", index=False)
    metrics(label, value).to_parquet(folder / "evaluation" / "metrics.parquet")
    observed = np.random.default_rng(0).gamma(2, 1, (2, 2, 32))
    regions = {"chrom": ["chrXIV"] * 2, "start": [0, 512], "bin_size": 16, "tracks": ["plus", EVIL]}
    signal = {
        "observed": observed,
        "predicted": observed / 2,
        "baseline": observed * 0 + 1,
        "baseline_name": "mean track",
    }
    np.savez(folder / "evaluation" / "examples.npz", **regions, **signal)
    return folder


class Outline(HTMLParser):
    """What is in a page: its tags with attributes, and its text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(path: Path) -> tuple[str, Outline]:
    text = path.read_text(encoding="utf-8")
    return text, Outline(text)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Outline]:
    run = make_run(tmp_path_factory.mktemp("runs") / "lora")
    out = write_report(run)
    assert out == run / "report.html"
    assert sorted(path.name for path in run.iterdir() if "report" in path.name) == ["report.html"]
    return page(out)


def test_the_title_states_the_finding(report: tuple[str, Outline]) -> None:
    finding = (
        "LoRA(rank=8) reaches Pearson 0.54 (0.51 to 0.57) on held-out chrXIV and chrXVI;"
        " the best baseline, nearest pretrained track, 0.41"
    )
    assert report[1].text["h1"] == [finding]
    assert report[1].text["title"] == [finding]


def test_the_page_stands_alone(report: tuple[str, Outline]) -> None:
    text, outline = report
    addresses = re.findall(r'https?://[^"\s<]+', text)
    assert set(addresses) <= {"http://www.w3.org/1999/xlink"}  # a name, not a place
    assert not [tag for tag in ("link", "img", "iframe", "object", "base", "form") if outline.all(tag)]
    assert not [a for _, attributes in outline.tags for a in attributes if a == "src" or a.startswith("on")]
    assert len(text) < 1_000_000


def test_only_the_pages_own_script_runs(report: tuple[str, Outline]) -> None:
    text, outline = report
    policy = next(m["content"] for m in outline.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_every_name_is_escaped(report: tuple[str, Outline]) -> None:
    text, outline = report
    assert "alert(1)</script>" not in text
    assert "49" not in text[text.index("alert(1)") : text.index("alert(1)") + 60], "names are no templates"
    assert any(EVIL in part for part in outline.text["td"])
    assert any(EVIL in part for part in outline.text["pre"])


def test_it_can_be_read_by_everyone(report: tuple[str, Outline]) -> None:
    _, outline = report
    assert outline.all("html")[0]["lang"] == "en"
    assert all("scope" in head for head in outline.all("th"))
    figures = outline.all("svg")
    assert len(figures) == 4 == len(outline.all("figcaption"))
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {table["aria-labelledby"] for table in outline.all("table")} <= set(ids)
    assert "@media print" in outline.text["style"][0]
    assert "prefers-color-scheme: dark" in outline.text["style"][0]


def test_the_table_has_baselines_and_intervals(report: tuple[str, Outline]) -> None:
    text, outline = report
    assert '<td data-sort="0.54">0.540 <span class="interval">(0.510 to 0.570)</span></td>' in text
    assert {"LoRA(rank=8)", "mean track", "nearest pretrained track", "oracle"} <= set(outline.text["th"])
    assert {"12 min 14 s", "812 MB", "51 kB"} <= set(outline.text["dd"])
    assert "class" not in outline.tags[0][1]
    assert not [c for c in outline.all("div") if c.get("class") == "missing"]


@pytest.mark.parametrize(
    ("value", "difference", "ending"),
    [
        (0.39, None, " and does not beat the best baseline, nearest pretrained track, 0.41"),
        (0.42, None, ", not clearly better than the best baseline, nearest pretrained track, 0.41"),
        (0.42, (0.005, 0.015), "; the best baseline, nearest pretrained track, 0.41"),
        (0.54, (-0.01, 0.3), ", not clearly better than the best baseline, nearest pretrained track, 0.41"),
    ],
)
def test_the_title_does_not_boast(tmp_path: Path, value: float, difference: Any, ending: str) -> None:
    run = make_run(tmp_path / "run", value=value)
    if difference:
        row = {"baseline": "nearest pretrained track", "track": "", "metric": "pearson", "value": value - 0.41}
        frame = pd.DataFrame([{**row, "low": difference[0], "high": difference[1], "unit": "squashed"}])
        frame.to_parquet(run / "evaluation" / "differences.parquet")
    assert page(write_report(run))[1].text["h1"][0].endswith(ending)


def test_a_smaller_error_is_better(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    metrics("LoRA(rank=8)", 0.2, baseline=0.3, metric="mse").to_parquet(run / "evaluation" / "metrics.parquet")
    title = page(write_report(run))[1].text["h1"][0]
    assert title.startswith("LoRA(rank=8) reaches MSE 0.20")
    assert title.endswith("; the best baseline, nearest pretrained track, 0.30")


def test_without_intervals_none_are_claimed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "run")
    assert "no intervals" not in write_report(run).read_text()
    frame = metrics("LoRA(rank=8)", 0.54).assign(low=np.nan, high=np.nan)
    frame.to_parquet(run / "evaluation" / "metrics.parquet")
    make_run(tmp_path / "runs" / "twin")
    frame.to_parquet(tmp_path / "runs" / "twin" / "evaluation" / "metrics.parquet")
    for folder in (run, tmp_path / "runs"):
        text = write_report(folder).read_text()
        assert "o intervals: too few test rows are independent of each other." in text
        assert "95 % bootstrap intervals" not in text
        assert "intervals in brackets" not in text


def test_a_pulled_run_is_not_sent_back_to_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("environment.json", "log.csv", "evaluation/metrics.parquet"):
        (run / name).unlink()
    assert "--resume" in write_report(run).read_text()
    (run / "README.md").write_text("# a card")
    text = write_report(run).read_text()
    assert "The run was pulled: README.md, its card, has its data, training and scores." in text
    assert "--resume" not in text


def test_forgetting_is_a_panel_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    frame = metrics("LoRA(rank=8)", 0.54)
    row = frame[frame["track"] == ""].iloc[0].to_dict()
    extra = [
        {**row, "group": "rna", "value": 0.6, "note": "original tracks, after adaptation"},
        {**row, "model": "pretrained, before", "value": 0.63, "note": "original tracks"},
    ]
    pd.concat([frame, pd.DataFrame(extra)]).to_parquet(run / "evaluation" / "metrics.parquet")
    _, outline = page(write_report(run))
    assert outline.text["h1"][0].endswith("the best baseline, nearest pretrained track, 0.41")
    labels = [figure["aria-label"] or "" for figure in outline.all("svg")]
    assert any(label.startswith("Original tracks of the trunk: Pearson 0.63") for label in labels)


def test_what_is_said_of_a_score_stands_above_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    frame = metrics("LoRA(rank=8)", 0.54)
    frame.loc[frame["model"] == "mean track", "note"] = "fitted to these very genes"
    frame.to_parquet(run / "evaluation" / "metrics.parquet")
    assert "in brackets. Mean track: fitted to these very genes." in write_report(run).read_text()
    frame.assign(note="rough interval, from 8 blocks").to_parquet(run / "evaluation" / "metrics.parquet")
    assert "in brackets. Rough interval, from 8 blocks." in write_report(run).read_text()


def test_an_interrupted_run_says_what_is_missing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "experiment.yaml").write_text("data: data/yeast\n")
    _, outline = page(write_report(run))
    assert outline.text["h1"] == ["run: an unfinished run"]
    missing = " ".join(outline.text["li"])
    for name in ("environment.json", "log.csv", "adapter/adapter.json", "evaluation/metrics.parquet"):
        assert f"{name} is missing" in missing
    assert "seqgraft fit --resume" in missing


@pytest.mark.parametrize(
    "name",
    ["environment.json", "log.csv", "adapter/adapter.json", "evaluation/metrics.parquet", "evaluation/examples.npz"],
)
@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe\x00"])
def test_a_damaged_file_is_listed(tmp_path: Path, name: str, content: bytes) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(content)
    _, outline = page(write_report(run))
    assert f"{name} cannot be read" in " ".join(outline.text["li"])


def test_environment_of_another_shape(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dataset=None, model=[], counts=None, result=None, versions="1", seconds=None)
    write_report(run)


EXPOSED = {
    "fold": "test", "note": "90.0% of the 300 windows overlap", "share": 0.9, "allowed": True,
    "counts": {"train": 270, "valid": 12, "test": 11, "nothing": 7}, "problem": "90.0% of the windows overlap",
}  # fmt: skip


def test_what_the_trunk_has_seen(tmp_path: Path) -> None:
    """Counts by the trunk's folds; what was let pass stands at the top of the page too."""
    _, outline = page(write_report(make_run(tmp_path / "run", exposure=EXPOSED)))
    assert "Has the trunk seen the test regions?" in outline.text["h2"]
    facts = dict(zip(outline.text["dt"], outline.text["dd"], strict=True))
    assert facts["exposure"] == "90.0% of the 300 windows overlap"
    touched = {term: fact for term, fact in facts.items() if term.startswith("windows that touch")}
    assert list(touched.values()) == ["270", "12", "11", "7"]
    assert "held-out" not in outline.text["h1"][0]
    warning = "Not held out from the trunk: 90.0% of the windows overlap, which allow_exposure let pass."
    assert facts["warning"] == warning
    assert any(text.startswith(warning) for text in outline.text["p"])


def test_a_trunk_that_has_seen_nothing_is_said_without_a_warning(tmp_path: Path) -> None:
    clean = {"fold": "test", "note": "none: the trunk has random weights", "counts": {}, "problem": None}
    text, outline = page(write_report(make_run(tmp_path / "run", exposure=clean)))
    assert "none: the trunk has random weights" in outline.text["dd"]
    assert "held out from the trunk" not in text
    assert "windows that touch" not in text


def test_labels_without_a_mean_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    frame = metrics("LoRA(rank=8)", 0.8, metric="auroc").assign(unit="label")
    frame[frame["track"] == "plus"].assign(low=np.nan, high=np.nan).to_parquet(run / "evaluation" / "metrics.parquet")
    title = page(write_report(run))[1].text["h1"][0]
    assert title.startswith("LoRA(rank=8) reaches AUROC 0.81 on held-out")


def test_an_undefined_score(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    metrics("LoRA(rank=8)", np.nan).to_parquet(run / "evaluation" / "metrics.parquet")
    assert "is undefined" in page(write_report(run))[1].text["h1"][0]


def test_a_folder_of_runs_becomes_one_comparison(tmp_path: Path) -> None:
    make_run(tmp_path / "linear", "linear probe", 0.46)
    make_run(tmp_path / "lora", "LoRA(rank=8)", 0.54)
    (tmp_path / "notes").mkdir()
    out = write_report(tmp_path)
    assert out == tmp_path / "report.html"
    _, outline = page(out)
    assert outline.text["h1"] == [
        "LoRA(rank=8) is best of 2 runs with Pearson 0.54 (0.51 to 0.57) on held-out chrXIV and chrXVI;"
        " then linear probe, 0.46; the best baseline, nearest pretrained track, 0.41"
    ]
    assert {"linear probe", "LoRA(rank=8)", "mean track", "oracle"} <= set(outline.text["th"])
    assert len(outline.all("svg")) == 1


def test_a_comparison_of_twins_strangers_and_the_unfinished(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", "LoRA", 0.5)
    second = make_run(tmp_path / "b", "LoRA", 0.3, dataset={"hash": "other"})
    metrics("LoRA", 0.3, baseline=0.35).to_parquet(second / "evaluation" / "metrics.parquet")
    third = make_run(tmp_path / "c", "IA3")
    (third / "evaluation" / "metrics.parquet").unlink()
    _, outline = page(write_comparison([first, second, third], tmp_path / "all.html"))
    assert {"LoRA (a)", "LoRA (b)", "IA3", "nearest pretrained track (LoRA (b))"} <= set(outline.text["th"])
    assert "different data" in outline.text["li"][0]
    assert "IA3: evaluation/metrics.parquet is missing" in " ".join(outline.text["li"])


def _with_copies(run: Path, label: str, clean: float, leaky: float) -> Path:
    """An evaluation of 400 regions, a quarter of which have copies in the training data."""
    parts = [
        metrics(label, value, baseline).assign(fold=fold, n=n, note=note)
        for fold, value, baseline, n, note in (
            ("test", leaky, 0.45, 400, "100 of 400 have copies in earlier folds (100 exact, 0 near); rough interval"),
            ("test without copies", clean, 0.41, 300, "300 of 400, those without copies"),
        )
    ]
    pd.concat(parts, ignore_index=True).to_parquet(run / "evaluation" / "metrics.parquet")
    each = [("test", 0.2, 0.1, 0.3), ("test without copies", 0.01, -0.02, 0.04)]
    table = pd.DataFrame(each, columns=["fold", "value", "low", "high"])
    table.assign(baseline="nearest pretrained track", group="rna", track="", metric="pearson").to_parquet(
        run / "evaluation" / "differences.parquet"
    )
    return run


def test_the_title_is_the_score_without_copies_of_training_data(tmp_path: Path) -> None:
    """Also where the table has the rows of the whole fold first."""
    text, outline = page(write_report(_with_copies(make_run(tmp_path / "run", "LoRA"), "LoRA", 0.42, 0.8)))
    assert outline.text["h1"] == [
        "LoRA reaches Pearson 0.42 (0.39 to 0.45) on held-out chrXIV and chrXVI without copies in the training data,"
        " not clearly better than the best baseline, nearest pretrained track, 0.41"
    ]
    sentence = (
        "Of the test regions, 100 of 400 have copies in earlier folds (100 exact, 0 near); "
        "on all of them, Pearson is 0.80 (0.77 to 0.83), which is no held-out score."
    )
    assert sentence in text
    captions = [text for text in outline.text["p"] if text.startswith("Fold test")]
    assert captions[0].startswith("Fold test without copies on held-out chrXIV and chrXVI without copies")
    assert captions[1].startswith("Fold test on all test regions, copies of training data included")


def test_copies_without_a_clean_score_are_said(tmp_path: Path) -> None:
    run = _with_copies(make_run(tmp_path / "run", "LoRA"), "LoRA", float("nan"), 0.8)
    _, outline = page(write_report(run))
    assert "0.80 (0.77 to 0.83) on all test regions, copies of training data included" in outline.text["h1"][0]


def test_a_comparison_uses_scores_without_copies(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "older", 0.9)
    _with_copies(make_run(tmp_path / "b", "linear"), "linear", 0.5, 0.6)
    _with_copies(make_run(tmp_path / "c", "LoRA"), "LoRA", 0.45, 0.8)
    _, outline = page(write_report(tmp_path))
    assert outline.text["h1"][0].startswith(
        "Linear is best of 2 runs with Pearson 0.50 (0.47 to 0.53) on held-out chrXIV and chrXVI without copies in the "
        "training data; then LoRA, 0.45"
    )
    assert "older: it has no scores without copies of training data" in " ".join(outline.text["li"])


def test_a_comparison_before_any_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "evaluation" / "metrics.parquet").unlink()
    assert page(write_comparison([run], tmp_path / "all.html"))[1].text["h1"] == ["1 runs, none of them evaluated"]


def test_what_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="no run"):
            write_report(folder)
        with pytest.raises(ConfigError, match="not run directories"):
            write_comparison([folder], tmp_path / "out.html")
    with pytest.raises(ConfigError):
        write_comparison([], tmp_path / "out.html")
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_report(run, blocked / "report.html")
    with pytest.raises(RunError, match="cannot be written"):
        write_report(run, run / "adapter")
    assert not list(tmp_path.rglob("*.part"))


# Cell types


def cells_run(folder: Path) -> Path:
    """A run of two cell types, one at the ceiling and one without, of which one is recognised."""
    run = make_run(folder)
    label, rows = "LoRA(rank=8)", []
    for model, scores in ((label, (1.02, float("nan"))), ("mean track", (0.1, float("nan")))):
        for metric, unit in (
            ("pearson", "squashed"),
            ("pearson_across_tracks", "squashed"),
            ("pearson_across_tracks_of_ceiling", "share of the ceiling"),
        ):
            values = {"B": scores[0], EVIL: scores[1], "": scores[0]}
            rows += [(model, "test", "atac", t, metric, v, v - 0.05, v + 0.05, 30, unit, "") for t, v in values.items()]
        rows.append(
            (model, "test", "atac", "", "cell_types_recognised", 0.5, *[float("nan")] * 2, 30, "share", "1 of 2")
        )
    rows.append(("split-half ceiling", "test", "atac", "", "pearson", 0.8, 0.7, 0.9, 30, "squashed", ""))
    columns = ["model", "fold", "group", "track", "metric", "value", "low", "high", "n", "unit", "note"]
    pd.DataFrame(rows, columns=columns).to_parquet(run / "evaluation" / "metrics.parquet")
    names = ["B", EVIL]
    confusion = pd.DataFrame({"observed": np.repeat(names, 2), "predicted": names * 2, "pearson": [0.6, 0.2, 0.5, 0.1]})
    confusion = confusion.assign(best=[True, False, True, False], group="atac", fold="test", model=label, n=99)
    confusion.to_parquet(run / "evaluation" / "confusion.parquet")
    return run


def test_cell_types_have_a_section(tmp_path: Path) -> None:
    text, outline = page(write_report(cells_run(tmp_path / "run")))
    assert "Does it tell cell types apart?" in outline.text["h2"]
    charts = [svg["aria-label"] or "" for svg in outline.all("svg")]
    share = next(label for label in charts if "of the ceiling" in label)
    assert share.startswith("LoRA(rank=8): 102% of the ceiling of what cell types have of their own")
    assert "1 of 2 tracks at or above it" in share
    assert "1 without a ceiling" in share
    assert any(label.startswith("1 of 2 cell types are recognised by LoRA(rank=8)") for label in charts)
    assert "a share can exceed 1" in text
    first = next(label for label in charts if "reaches Pearson" in label)
    assert "best baseline, mean track" in first  # a ceiling is no baseline
    assert EVIL not in text


def test_without_cell_types_there_is_no_such_section(report: tuple[str, Outline]) -> None:
    assert "Does it tell cell types apart?" not in report[1].text["h2"]


def test_damaged_confusion_is_listed(tmp_path: Path) -> None:
    run = cells_run(tmp_path / "run")
    (run / "evaluation" / "confusion.parquet").write_bytes(b"PAR1")
    text, _ = page(write_report(run))
    assert "confusion.parquet cannot be read" in text
    assert "recognised by" not in text
