"""Panels of a run's report: values and calibration, genes, variants, logos, cards, words; and where the demo ends."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from seqgraft.attribute import Attributions
from seqgraft.demo import run_demo
from seqgraft.metrics import Moments
from seqgraft.report import write_report
from seqgraft.report.glossary import words_section
from seqgraft.report.page import Code, Section, Values
from seqgraft.value_plots import calibration_error, reliability, tenths, value_scatter, wilson
from test_report import Outline, make_run, page

RNG = np.random.default_rng(0)


def with_values(run: Path, observed: np.ndarray, predicted: np.ndarray, tracks: list[str]) -> Path:
    """``(regions, tracks, bins)``, as an evaluation keeps them."""
    found = Moments.of(observed, predicted, None, np.arange(len(observed)))
    np.savez(run / "evaluation" / "moments.npz", rows=found.rows, moments=found.sums, blocks=found.rows, tracks=tracks)
    return run


def figures(outline: Outline) -> list[str]:
    return [svg["aria-label"] or "" for svg in outline.all("svg")]


# ---- predicted against observed ----


def test_values_are_means_over_bins(tmp_path: Path) -> None:
    observed, predicted = RNG.gamma(2, 1, (2, 9, 2, 4))
    observed[3, 1] = np.nan  # nothing was measured there
    run = with_values(make_run(tmp_path / "run"), observed, predicted, ["plus", "minus"])
    values = Values.load(run / "evaluation" / "moments.npz")
    assert values is not None
    assert values.tracks == ("plus", "minus")
    np.testing.assert_allclose(values.observed, observed.mean(-1))
    assert np.isnan(values.predicted[3, 1])
    np.testing.assert_allclose(np.delete(values.predicted[:, 1], 3), np.delete(predicted[:, 1].mean(-1), 3))


def test_the_track_with_the_median_score_is_shown(tmp_path: Path) -> None:
    observed = RNG.gamma(2, 1, (40, 1, 4))
    predicted = observed * 0.5 + RNG.normal(0, 0.1, observed.shape)
    run = with_values(make_run(tmp_path / "run"), observed, predicted, ["plus"])
    r = np.corrcoef(observed.mean(-1)[:, 0], predicted.mean(-1)[:, 0])[0, 1]
    title = f"Over 40 regions, predicted and observed agree with Pearson {r:.2f}: plus, the track with the median score"
    assert title in figures(page(write_report(run))[1])


def test_labels_have_their_probabilities_checked(tmp_path: Path) -> None:
    sure = np.repeat([0.25, 0.75], 200)
    label = np.concatenate([np.arange(200) < 100, np.arange(200) < 150]).astype(float)  # the first are too low by 0.25
    run = make_run(tmp_path / "run")
    with_values(run, label[:, None, None], sure[:, None, None], ["plus"])
    text, outline = page(write_report(run))
    assert any(
        title.startswith("Predicted probabilities are off by 0.12 on average: plus") for title in figures(outline)
    )
    assert "400 sequences of fold test" in text


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04"])
def test_damaged_moments_are_listed(tmp_path: Path, content: bytes) -> None:
    run = make_run(tmp_path / "run")
    (run / "evaluation" / "moments.npz").write_bytes(content)
    assert "evaluation/moments.npz cannot be read" in " ".join(page(write_report(run))[1].text["li"])


def test_statistics_of_something_else_are_no_values(tmp_path: Path) -> None:
    np.savez(tmp_path / "tokens.npz", rows=np.arange(3), sums=np.zeros((4, 3)), tracks=np.array([], dtype="<U1"))
    assert Values.load(tmp_path / "tokens.npz") is None
    np.savez(tmp_path / "bad.npz", moments=np.zeros((6, 3, 2)), tracks=["one"])
    with pytest.raises(ValueError, match="no statistics of these tracks"):
        Values.load(tmp_path / "bad.npz")


def test_calibration_is_what_its_definition_says() -> None:
    predicted = RNG.random(500)
    observed = (RNG.random(500) < predicted**2).astype(float)
    place = np.minimum((predicted * 10).astype(int), 9)
    error = sum(
        (place == bin_).mean() * abs(observed[place == bin_].mean() - predicted[place == bin_].mean())
        for bin_ in range(10)
    )
    assert calibration_error(np.stack([predicted, observed], 1)) == pytest.approx(error)
    assert calibration_error(np.array([[0.0, 0.0], [1.0, 1.0]])) == 0


def test_intervals_of_shares_are_wilsons() -> None:
    hits, items = np.array([0.0, 3.0, 50.0]), np.array([5.0, 10.0, 50.0])
    low, high = wilson(hits, items)
    for number, (k, n) in enumerate(zip(hits.astype(int), items.astype(int), strict=True)):
        expected = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert (low[number], high[number]) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_tenths_are_means_in_the_order_of_the_prediction() -> None:
    values = np.stack([np.arange(100.0)[::-1], np.arange(100.0)], 1)
    np.testing.assert_allclose(tenths(values)[:, 0], np.arange(10) * 10 + 4.5)
    np.testing.assert_allclose(tenths(values).sum(1), 99)
    assert len(tenths(values[:3])) == 3


def test_figures_draw_few_dots_of_many() -> None:
    values = RNG.random((5000, 2))
    dots = value_scatter(values, title="t", xlabel="x", ylabel="y").axes[0].lines[0]
    assert len(dots.get_xdata()) == 500  # type: ignore[arg-type]
    assert len(reliability(values.round(0), title="t", ylabel="y").axes[0].lines) == 2


# ---- genes, variants, logos ----


def test_genes_have_figures_and_a_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    columns = ["model", "level", "track", "metric", "value", "low", "high", "count", "reason", "fold"]
    rows = [
        (model, level, track, metric, value + shift, value - 0.1, value + 0.1, 120, "", "test")
        for model, shift in (("LoRA(rank=8)", 0.0), ("mean track", -0.4))
        for level, track, value in (
            ("genes", "rna", 0.8),
            ("genes_specific", "rna", 0.5),
            ("genes_fold_change", "a/b", 0.6),
        )
        for metric in ("pearson", "spearman")
    ]
    pd.DataFrame(rows, columns=columns).to_parquet(run / "evaluation" / "genes.parquet")
    _, outline = page(write_report(run))
    assert "And genes?" in outline.text["h2"]
    assert (
        "Expression of 120 held-out genes: LoRA(rank=8) reaches Pearson 0.80; the best baseline, mean track, 0.40"
        in figures(outline)
    )
    assert any(title.startswith("Fold changes of 120 held-out genes") for title in figures(outline))
    assert "what a signal has of its own" in outline.text["th"]


def test_variants_of_a_run_stand_by_their_size(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "variants").mkdir()
    places = {
        "chrom": "chr1",
        "position": [5, 7, 9],
        "ref": "A",
        "alt": ["C", "G", "T" * 30],
        "scorer": "log2_fold_change",
    }
    frame = pd.DataFrame({**places, "id": ["a", "", "c"], "plus": [0.1, -2.0, np.nan]})
    frame.to_parquet(run / "variants" / "mine.parquet")
    text, outline = page(write_report(run))
    assert "Which variants matter most?" in outline.text["h2"]
    assert "variants/mine.parquet: of 3 variants the 3 with the largest change of any track by log2 fold change" in text
    shown = [name for name in outline.text["th"] if name.startswith("chr1:")]
    assert shown == ["chr1:7 A>G", "chr1:5 A>C", "chr1:9 A>TTTTT…30 bp"]


def test_attributions_of_a_run_are_logos(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "attributions").mkdir()
    hypothetical = RNG.normal(size=(5, 1, 4, 50)).astype(np.float32)
    regions = pd.DataFrame({"region": range(5), "name": "", "chrom": "chr2", "start": 100, "end": 150, "strand": "."})
    codes = RNG.integers(0, 4, (5, 50), dtype=np.uint8)
    Attributions(hypothetical, codes, np.ones((5, 1)), ("sum of plus",), regions, "gradient").write(
        run / "attributions" / "promoters.npz"
    )
    text, outline = page(write_report(run))
    assert "Which bases does it look at?" in outline.text["h2"]
    assert len([title for title in figures(outline) if "of all attribution is at chr2:" in title]) == 3
    assert "attributions/promoters.npz (the first 3 of 5 regions)" in text
    addresses = re.findall(r'xlink:href="(.{5})', text)
    assert set(addresses) <= {"data:", *(a for a in addresses if a.startswith("#"))}


@pytest.mark.parametrize("name", ["variants/all.parquet", "attributions/all.npz"])
def test_what_was_written_into_a_run_may_be_damaged(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).parent.mkdir()
    (run / name).write_bytes(b"no")
    assert f"{name} cannot be read" in " ".join(page(write_report(run))[1].text["li"])


# ---- cards, citation, commands, words ----


def facts(outline: Outline) -> dict[str, str]:
    return dict(zip(outline.text["dt"], outline.text["dd"], strict=True))


def test_the_cards_say_what_was_used(tmp_path: Path) -> None:
    _, outline = page(write_report(make_run(tmp_path / "run")))
    found = facts(outline)
    assert found["base model (trunk)"] == "yeast-mini"
    assert found["its licence"] == "Apache-2.0"
    assert found["of these trained"] == "12,650 (1.54%)"
    assert found["file of what was trained"] == "51 kB"
    assert found["fold test"] == "300 regions on chrXIV, chrXVI"
    assert found["target"] == "128 bins of 16 bp"
    assert found["skipped"] == "3"
    assert found["method"].startswith("LoRA")


def test_how_to_cite_and_how_to_make_it_again(tmp_path: Path) -> None:
    model = {"name": "splice-400", "licence": "GPL-3.0", "citation": "Chao et al. 2025"}
    _, outline = page(write_report(make_run(tmp_path / "run", model=model)))
    found = facts(outline)
    assert found["software"] == "seqgraft 0.1.0, Apache-2.0"
    assert found["base model"] == "splice-400, Chao et al. 2025"
    assert "arXiv:2106.09685" in " ".join(outline.text["dd"])
    again, more = outline.text["pre"][:2]
    assert (
        again
        == f"seqgraft fit {tmp_path}/run/experiment.yaml NEW_RUN\nseqgraft evaluate NEW_RUN\nseqgraft report NEW_RUN"
    )
    assert f"seqgraft variants {tmp_path}/run variants.vcf {tmp_path}/run/variants/all.parquet" in more
    assert f"seqgraft attribute {tmp_path}/run regions.bed {tmp_path}/run/attributions/all.npz" in more


def test_the_commands_of_a_folder_with_a_blank(tmp_path: Path) -> None:
    _, outline = page(write_report(make_run(tmp_path / "my run")))
    assert f"seqgraft fit '{tmp_path}/my run/experiment.yaml' NEW_RUN" in outline.text["pre"][0]
    assert all(f"'{tmp_path}/my run" in line for line in outline.text["pre"][1].splitlines())


def test_words_are_those_of_the_page(tmp_path: Path) -> None:
    terms = facts(page(write_report(make_run(tmp_path / "run")))[1])
    assert {"Pearson", "mean track", "nearest pretrained track", "oracle", "squashed scale", "95 % interval"} <= set(
        terms
    )
    assert not {"AUROC", "majority", "Houlsby", "split-half ceiling"} & set(terms)
    assert terms["mean track"].startswith("Baseline: ")
    assert words_section("Nothing", [Section("Pearson", (Code("AUROC", "AUROC"),), folded=True)]) is not None
    assert words_section("Nothing", [Section("At all", (Code("AUROC", "AUROC"),), folded=True)]) is None


def test_every_word_is_explained_once() -> None:
    lines = (Path(__file__).parents[1] / "src/seqgraft/report/words.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    assert rows[0] == ["term", "pattern", "meaning"]
    assert all(len(row) == 3 and row[2].endswith(".") and re.compile(row[1]) for row in rows[1:])
    assert len({row[0] for row in rows}) == len(rows)


# ---- the demo ----


@pytest.mark.slow
def test_the_demo_ends_by_saying_where_its_report_is(tmp_path: Path) -> None:
    said: list[str] = []
    report = run_demo(tmp_path / "demo", said.append)
    assert said[-1] == f"The report is {report}."
    _, outline = page(report)
    assert {"linear probe", "LoRA r=8 (attention, conv)", "from scratch", "oracle"} <= set(outline.text["th"])
