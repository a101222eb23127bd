"""Reports in a browser: every kind of run on a desktop, a phone and paper, in light and dark."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install 'seqgraft[browser]'")

from browser import DESKTOP, PHONE, layout_problems, serious_problems, visit
from builders import SETTINGS, tiny_coverage, tiny_labels, tiny_pretrained
from seqgraft.adapters import LinearProbe, LoRA
from seqgraft.apply import attribute_run, score_run
from seqgraft.attribute import AttributeConfig
from seqgraft.data import prepare_source
from seqgraft.evaluate import EvaluateConfig, GenesConfig
from seqgraft.experiment import Experiment, build
from seqgraft.models.weights import ModelConfig
from seqgraft.report import write_report
from seqgraft.run import evaluate_run, fit_run
from seqgraft.sweep import SweepConfig, run_sweep
from seqgraft.train import TrainConfig
from seqgraft.variants import VariantConfig
from test_evaluate import _gtf
from test_personal import TINY, source_of, write_cohort
from test_report import EVIL, make_run
from test_specificity import cells

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from browser import Visit

PAPER = (718, 1000)  # A4 without margins, in CSS pixels
KINDS = ("coverage", "labels", "sweep", "personal", "cells", "comparison", "interrupted", "unusual")
QUICK = TrainConfig(epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind of run: small ones, trained and scored, and one with names that are long or evil."""
    folder = tmp_path_factory.mktemp("reports")
    runs = {"coverage": _coverage(folder), "personal": _personal(folder), "cells": _cells(folder)}
    runs["sweep"] = _sweep(folder)
    runs["labels"] = sorted((runs["sweep"] / "cells").glob("lora*"))[0]
    runs["comparison"] = folder / "runs"
    runs["interrupted"] = folder / "interrupted"
    runs["interrupted"].mkdir()
    for name in ("experiment.yaml", "environment.json", "log.csv"):
        shutil.copy(runs["coverage"] / name, runs["interrupted"])
    runs["unusual"] = make_run(folder / "unusual", label=f"LoRA(rank=8) on {'a_name_without_any_space_' * 4}{EVIL}")
    return {name: write_report(runs[name], folder / f"{name}.html") for name in KINDS}


def _fit(experiment: Experiment, run: Path) -> Path:
    fit_run(experiment, run)
    evaluate_run(run)
    return run


def _coverage(folder: Path) -> Path:
    """A run with genes, variants and attributions, beside a linear probe on the same data."""
    dataset = tiny_coverage(folder / "data", regions=60)
    model = ModelConfig(str(tiny_pretrained(folder / "tiny")))
    genes = GenesConfig(gtf=_gtf(folder, dataset), rename={"1": "chr1"})
    scoring = EvaluateConfig(draws=20, genes=genes)
    probe = Experiment(folder / "data", model, LinearProbe(), train=QUICK, evaluate=scoring)
    _fit(probe, folder / "runs" / "probe")
    run = _fit(replace(probe, adapter=LoRA(rank=2)), folder / "runs" / "lora")
    start, bases = int(dataset.regions["start"].iloc[0]), (folder / "data.fa").read_text().split()[1]
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    for at in (start + 20, start + 60):
        lines.append(f"chr1\t{at + 1}\tv{at}\t{bases[at]}\t{'G' if bases[at] == 'C' else 'C'}\t.\t.\t.")
    (folder / "some.vcf").write_text("\n".join(lines) + "\n")
    (folder / "some.bed").write_text(f"chr1\t{start}\t{start + 128}\ta promoter\n")
    for name in ("variants", "attributions"):
        (run / name).mkdir()
    score_run(
        run,
        folder / "some.vcf",
        run / "variants" / "some.parquet",
        build(VariantConfig, {"over": {"kind": "centre", "width": 65}}, "variants"),
    )
    attribute_run(run, folder / "some.bed", run / "attributions" / "some.npz", AttributeConfig())
    return run


def _sweep(folder: Path) -> Path:
    tiny_labels(folder / "classes", "softmax", rows=120, lengths=(40, 60), seed=1)
    base = {
        "data": str(folder / "classes"),
        "model": {"name": str(folder / "tiny")},
        "train": {"epochs": 2, "batch_size": 32, "lr": 1e-2},
        "evaluate": {"draws": 20},
    }
    grid = {"adapter": [{"kind": "linear_probe"}, {"kind": "lora", "where": ["attention"]}], "adapter.rank": [2, 4]}
    settings = {"experiment": base, "draws": 100, "grid": grid, "seeds": [1, 2]}
    run_sweep(build(SweepConfig, settings, "sweep"), folder / "sweep")
    return folder / "sweep"


def _personal(folder: Path) -> Path:
    (folder / "cohort").mkdir()
    data = prepare_source(source_of(write_cohort(folder / "cohort", missing=True)), folder / "donors").folder
    model = ModelConfig(settings=TINY, init="random", centre=12)
    return _fit(
        Experiment(data, model, LinearProbe(), train=QUICK, evaluate=EvaluateConfig(draws=20)), folder / "personal"
    )


def _cells(folder: Path) -> Path:
    data = cells(folder / "fragments", test=20).folder
    scoring = EvaluateConfig(draws=20, block=2000, baselines=("mean_profile",))
    model = ModelConfig("convnet", settings=SETTINGS)
    return _fit(Experiment(data, model, LinearProbe(), train=QUICK, evaluate=scoring), folder / "cells")


def _open_everything(here: Visit) -> None:
    here.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")


# ---- every page ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_on_a_desktop_and_on_paper(chromium: Browser, reports: dict[str, Path], kind: str) -> None:
    assert reports[kind].stat().st_size < 5_000_000
    with visit(chromium, reports[kind]) as here:
        _open_everything(here)
        assert layout_problems(here.page) == []
        assert serious_problems(here.page) == []
        here.page.emulate_media(color_scheme="dark")
        assert here.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        assert serious_problems(here.page) == []
        here.page.set_viewport_size({"width": PAPER[0], "height": PAPER[1]})
        here.page.emulate_media(media="print", color_scheme="dark")
        assert here.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert layout_problems(here.page) == []
        assert here.troubles == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_on_a_phone(chromium: Browser, reports: dict[str, Path], kind: str) -> None:
    with visit(chromium, reports[kind], size=PHONE) as here:
        _open_everything(here)
        assert layout_problems(here.page) == []
        assert here.troubles == []


def test_what_a_report_of_coverage_shows(chromium: Browser, reports: dict[str, Path]) -> None:
    with visit(chromium, reports["coverage"]) as here:
        titles = here.page.locator("section h2").all_inner_texts()
        figures = here.page.locator("svg").count()
    assert titles == [
        "How good is it?", "Has the trunk seen the test regions?", "What does it look like?", "And genes?",
        "Which variants matter most?", "Which bases does it look at?", "How did training go, and what did it cost?",
        "What are the data and the model?", "How to cite it", "How to make it again", "What do the words mean?",
        "How much better than the baselines?", "Every score", "Every setting and note",
    ]  # fmt: skip
    assert figures >= 10


def test_an_interrupted_run_says_in_words_what_is_missing(chromium: Browser, reports: dict[str, Path]) -> None:
    with visit(chromium, reports["interrupted"]) as here:
        note = here.page.get_by_role("note").inner_text()
        assert here.page.locator("section h2").first.inner_text() == "Has the trunk seen the test regions?"
    assert "training was not finished; continue with 'seqgraft fit --resume'" in note
    assert "the run was not evaluated; run 'seqgraft evaluate'" in note


# ---- what a reader does ----


def test_tables_sort_by_click_and_by_key(chromium: Browser, reports: dict[str, Path]) -> None:
    column = "(cells) => cells.map((cell) => cell.dataset.sort === undefined ? null : Number(cell.dataset.sort))"
    with visit(chromium, reports["coverage"]) as here:
        table = here.page.locator("table.sortable").first
        head, values = table.locator("thead th").nth(1), table.locator("tbody tr td:nth-child(2)")
        before = values.evaluate_all(column)
        assert len(set(before)) > 3
        assert head.get_attribute("aria-sort") is None
        known = sorted(value for value in before if value is not None)
        unknown = [None] * before.count(None)
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        assert values.evaluate_all(column) == known[::-1] + unknown
        for key, order, ranked in (("Enter", "ascending", known), ("Space", "descending", known[::-1])):
            here.page.keyboard.press(key)
            assert head.get_attribute("aria-sort") == order
            assert values.evaluate_all(column) == ranked + unknown
        here.page.keyboard.press("Shift+Tab")
        here.page.keyboard.press("Enter")  # the first column, which is text
        assert table.locator("thead th").first.get_attribute("aria-sort") == "descending"
        assert head.get_attribute("aria-sort") is None
        names = table.locator("tbody th").all_inner_texts()
        assert names == sorted(names, key=str.lower, reverse=True)
        assert here.troubles == []


def test_a_link_opens_the_part_it_leads_to(chromium: Browser, reports: dict[str, Path]) -> None:
    with visit(chromium, reports["coverage"]) as here:
        part = here.page.locator("details", has_text="Every setting and note").last
        assert part.get_attribute("open") is None
        here.page.get_by_role("link", name="Every setting and note").click()
        part.locator("pre").first.wait_for(state="visible", timeout=5_000)
        assert part.get_attribute("open") is not None
        assert part.evaluate("(part) => part.getBoundingClientRect().top < innerHeight")


def test_the_policy_stops_what_is_not_the_pages_own(chromium: Browser, reports: dict[str, Path]) -> None:
    """Even a name that got through unescaped could run nothing and send nothing."""
    with visit(chromium, reports["unusual"]) as here:
        assert here.troubles == []
        stopped = here.page.evaluate(
            """async () => {
              const stopped = [];
              addEventListener("securitypolicyviolation", (event) => stopped.push(event.effectiveDirective));
              const script = document.createElement("script");
              script.textContent = "window.ran = true";
              document.body.append(script);
              const image = "<img src='https://example.org/a.png' onerror='ran = true'>";
              document.body.insertAdjacentHTML("beforeend", image);
              await fetch("https://example.org/").catch(() => null);
              await new Promise((done) => setTimeout(done, 200));
              return [stopped.sort(), window.ran ?? false];
            }"""
        )
    assert stopped == [["connect-src", "img-src", "script-src-attr", "script-src-elem"], False]


# ---- do the checks see what they should? ----

_PAGE = """<!doctype html><html lang="en"><title>x</title><style>body {{ margin: 0 }} {style}</style>
<main><h1>A title</h1><div class="blocks"><table><tr><th>model</th><td>0.75</td></tr></table></div>
<p>Some words here.</p>{more}</main></html>"""
_SVG = '<svg width="90" height="90" {}>{}</svg>'
_LINE = '<path d="M0 0h9"/>'


_BROKEN: tuple[tuple[str, str, str], ...] = (
    ("p { width: 3000px }", "", "the page is 3000 px wide"),
    ("h1 { margin-bottom: -2rem; font-size: 2rem }", "", 'overlap: h1 "A title" and'),
    ("h1 { width: 2rem; white-space: nowrap; overflow: hidden }", "", 'h1 "A title"'),
    ("p { position: relative; top: -2rem }", "", "overlap: "),
    ("p { position: relative; left: -1rem }", "", 'leaves the page: p "Some words'),
    ("td { max-width: 1rem; white-space: nowrap; font-size: 5rem }", "", "cut: td"),
    ("", '<div class="blocks"><div></div></div>', "an empty panel"),
    ("", _SVG.format("", f'{_LINE}<text x="80" y="40">cut off</text>'), "cut: text"),
    ("", _SVG.format("", f'{_LINE}<text y="40">one</text><text y="44">two</text>'), "overlap: text"),
    ("", _SVG.format('aria-label="Scores"', ""), "an empty figure: Scores"),
)


def test_layout_problems_are_found(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(_PAGE.format(style="", more=""))
    with visit(chromium, tmp_path / "page.html", size=DESKTOP) as here:
        assert layout_problems(here.page) == []
        for style, more, found in _BROKEN:
            here.page.set_content(_PAGE.format(style=style, more=more))
            problems = layout_problems(here.page)
            assert any(found in problem for problem in problems), (style, more, problems)


def test_troubles_and_serious_problems_are_found(chromium: Browser, tmp_path: Path) -> None:
    image, pale = "<img src='https://example.org/a.png'>", "<p style='color: #ddd'>pale</p>"
    more = f"{image}{pale}<script>console.error('oh'); null.x</script>"
    (tmp_path / "page.html").write_text(_PAGE.format(style="", more=more))
    with visit(chromium, tmp_path / "page.html") as here:
        troubles, problems = here.troubles, serious_problems(here.page)
    assert here.strangers == ["https://example.org/a.png"]
    assert any("oh" in text for text in troubles)
    assert any("null" in text for text in here.errors)
    assert {problem.split(": ")[1] for problem in problems} == {"image-alt", "color-contrast"}
