"""Which cell type a variant affects most: by hand, in tables and VCF files, and as figures."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pysam
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from builders import SETTINGS, tiny_coverage
from seqgraft.apply import score_run
from seqgraft.cell_plots import VariantPanel, confusion_matrix, variant_panel
from seqgraft.cli import app
from seqgraft.errors import ConfigError, RunError
from seqgraft.experiment import parse_experiment
from seqgraft.genome import Variant
from seqgraft.run import fit_run, open_run
from seqgraft.tracks import TrackTable
from seqgraft.variants import Layout, VariantConfig, VariantScorer
from seqgraft.variants import panels as drawing
from seqgraft.variants.marks import Mark, marks_of
from seqgraft.variants.over import Centre
from seqgraft.variants.panels import Panels
from seqgraft.variants.scorers import Difference, Log2FoldChange

TRACKS = ("B_atac", "T_atac", "B_rna+", "B_rna-", "T_rna+", "T_rna-", "other")
GROUPS = ("atac", "atac", "rna", "rna", "rna", "rna", "other")
CONFIG = VariantConfig(scorers=(Log2FoldChange(), Difference()), over=Centre(48))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two cell types, two marks and a track that is of no cell type; a VCF of 30 variants."""
    root = tmp_path_factory.mktemp("cells")
    dataset = tiny_coverage(root / "data", regions=12, tracks=TRACKS, groups=GROUPS)
    frame = dataset.tracks.to_frame().assign(condition=[*"BTBBTT", ""])
    frame.to_parquet(dataset.folder / "tracks.parquet")
    content: dict[str, Any] = {"data": str(dataset.folder), "model": {"name": "convnet", "settings": SETTINGS}}
    content |= {"train": {"epochs": 1, "batch_size": 4}, "adapter": {"kind": "full", "statistics": "batch"}}
    fit_run(parse_experiment(content), root / "run")
    assert dataset.genome is not None
    codes, lines = np.asarray(dataset.genome.chrom_codes("chr1")), ["##fileformat=VCFv4.2", "##contig=<ID=chr1>"]
    lines.append("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO")
    for number, place in enumerate(range(200, 2000, 60)):
        ref = "ACGT"[codes[place - 1]]
        lines.append(f"chr1\t{place}\tv{number}\t{ref}\t{'G' if ref != 'G' else 'A'}\t.\t.\t.")
    (root / "in.vcf").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def table(run: Path) -> pd.DataFrame:
    score_run(run / "run", run / "in.vcf", run / "scores.parquet", CONFIG)
    return pd.read_parquet(run / "scores.parquet")


def test_the_most_affected_and_its_margin() -> None:
    """Absolute scores, the mean over tracks of a cell type, those that are not read left out."""
    mark = Mark("rna", {"B": (0, 1), "T": (2, 3), "NK": (4,)})
    nan = np.nan
    rows = {
        (1.0, -3.0, 1.5, 1.5, 0.0): ("B", 0.5),
        (1.0, nan, -4.0, nan, 3.0): ("T", 1.0),
        (nan, nan, nan, nan, -2.0): ("NK", nan),
        (nan,) * 5: ("", nan),
        (1.0, 1.0, -1.0, 1.0, 0.5): ("B", 0.0),
        (0.0,) * 5: ("B", 0.0),
    }
    names, margins = mark.most_affected(np.array(list(rows), dtype=np.float32))
    assert names == [name for name, _ in rows.values()]
    np.testing.assert_allclose(margins, [margin for _, margin in rows.values()])
    assert mark.columns == ("rna_most_affected", "rna_margin")


def test_marks_are_groups_of_several_conditions() -> None:
    rows = [{"name": n, "group": g, "condition": c} for n, g, c in zip(TRACKS, GROUPS, [*"BTBBTT", ""], strict=True)]
    tracks = TrackTable.build([*rows, {"name": "one", "group": "other", "condition": "B"}])
    found = {mark.group: dict(mark.conditions) for mark in marks_of(tracks, merged=False)}
    assert found == {"atac": {"B": (0,), "T": (1,)}, "rna": {"B": (2, 3), "T": (4, 5)}}
    merged = {mark.group: dict(mark.conditions) for mark in marks_of(tracks, merged=True)}
    assert merged == {"atac": {"B": (0,), "T": (1,)}, "rna": {"B": (2,), "T": (3,)}}


def test_columns_of_the_table(table: pd.DataFrame) -> None:
    added = ["atac_most_affected", "atac_margin", "rna_most_affected", "rna_margin"]
    assert table.columns.tolist()[-5:] == ["other", *added]
    effect = {c: table[[f"{c}_rna+", f"{c}_rna-"]].abs().mean(axis=1) for c in "BT"}
    assert table["rna_most_affected"].tolist() == np.where(effect["B"] >= effect["T"], "B", "T").tolist()
    np.testing.assert_allclose(table["rna_margin"], (effect["B"] - effect["T"]).abs(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(table["atac_margin"], (table["B_atac"].abs() - table["T_atac"].abs()).abs(), atol=1e-6)
    assert set(table["atac_most_affected"]) == {"B", "T"}


def test_info_fields_of_a_vcf(run: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    score_run(run / "run", run / "in.vcf", tmp_path / "out.vcf.gz", CONFIG)
    with pysam.VariantFile(str(tmp_path / "out.vcf.gz")) as file:
        assert "##seqgraft_groups=atac|rna" in str(file.header)
        records = list(file)
    rows = table[table["scorer"] == "difference"].reset_index(drop=True)
    for record, row in zip(records, rows.to_dict("records"), strict=True):
        assert record.info["difference_most_affected"] == (f"{row['atac_most_affected']}|{row['rna_most_affected']}",)
        margins = [float(text) for text in record.info["difference_margin"][0].split("|")]
        np.testing.assert_allclose(margins, [row["atac_margin"], row["rna_margin"]], rtol=1e-4)


def test_profiles_are_what_scores_are_made_of(run: Path, table: pd.DataFrame) -> None:
    opened = open_run(run / "run")
    info, genome = opened.dataset.info, opened.dataset.genome
    assert genome is not None
    layout = Layout(info.window, info.bins, info.bin_size, opened.model.tracks, genome)
    row = table.iloc[3]
    assert row["scorer"] == "difference"
    variant = Variant(row["chrom"], int(row["position"]), row["ref"], row["alt"])
    ((site, ref, alt),) = VariantScorer(opened.model, layout, CONFIG).profiles(variant)
    assert ref.shape == alt.shape == (len(TRACKS), site.bins[1] - site.bins[0])
    np.testing.assert_allclose(((alt - ref) * site.weights).sum(1), row[list(TRACKS)].astype(float), rtol=1e-4)


def test_figures_of_the_top_and_of_named_variants(
    run: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[VariantPanel] = []

    def kept(panel: VariantPanel) -> Figure:
        drawn.append(panel)
        return variant_panel(panel)

    monkeypatch.setattr(drawing, "variant_panel", kept)
    command = ["variants", str(run / "run"), str(run / "in.vcf"), str(tmp_path / "a.parquet"), "--plots"]
    command += [str(tmp_path / "top"), "--top", "2", "--figures", "svg"]
    command += ["--set", "over.kind=centre", "--set", "over.width=48"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert f"The figures are in {tmp_path / 'top'}: 2." in result.output
    first = table[table["scorer"] == "log2_fold_change"]
    strongest = first.loc[first[list(TRACKS)].abs().max(axis=1).sort_values(ascending=False).index[:2], "id"].tolist()
    files = sorted(path.name for path in (tmp_path / "top").iterdir())
    assert files == [f"{number:04d}_{name}.svg" for number, name in enumerate(strongest)]
    panel = drawn[0]
    assert panel.title.startswith(f"{strongest[0]}, chr1:")
    assert "beyond the next cell type" in panel.title
    assert (panel.rows, panel.columns) == (["B", "T", "other"], ["atac", "rna", "other"])
    assert panel.reference.shape == (3, 3, 2, 12)
    known = np.isfinite(panel.reference).all(-1)
    assert known[:2, :2, 0].all()
    assert known[:2, 1, 1].all()
    assert known.sum() == 4 + 2 + 1
    assert panel.start <= panel.changed[0] < panel.start + 12 * panel.bin_size
    np.testing.assert_array_equal(np.isfinite(panel.alternate).all(-1), known)
    assert not np.allclose(panel.reference[0, 0, 0], panel.alternate[0, 0, 0], rtol=1e-6, atol=0)

    named = Panels(tmp_path / "named", named=("v3", "v7"))
    score_run(run / "run", run / "in.vcf", tmp_path / "b.parquet", CONFIG, panels=named)
    assert sorted(path.name for path in named.folder.iterdir()) == ["0000_v3.png", "0001_v7.png"]
    with pytest.raises(ConfigError, match=r"no scored variant has this ID: \['v99'\]"):
        score_run(
            run / "run", run / "in.vcf", tmp_path / "c.parquet", CONFIG,
            panels=replace(named, folder=tmp_path / "none", named=("v99",)),
        )  # fmt: skip


def test_what_cannot_be_drawn_is_refused_before_scoring(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for out, panels, error in (
        ("a.vcf.gz", Panels(tmp_path / "x"), ConfigError),
        ("a.parquet", Panels(tmp_path / "there"), RunError),
    ):
        with pytest.raises(error):
            score_run(run / "run", run / "in.vcf", tmp_path / out, CONFIG, panels=panels)
        assert not (tmp_path / out).exists()
    with pytest.raises(ConfigError, match=r"'\.gif'"):
        Panels(tmp_path / "x", suffix=".gif")
    with pytest.raises(ConfigError, match="--top"):
        Panels(tmp_path / "x", top=0)


def test_the_confusion_matrix_frames_the_best_of_each_row() -> None:
    names = ["B", "a cell type with a very long name", "T"]
    values = np.array([[0.9, 0.1, -0.2], [0.2, 0.3, 0.8], [np.nan, np.nan, np.nan]])
    frame = pd.DataFrame({"observed": np.repeat(names, 3), "predicted": names * 3, "pearson": values.ravel()})
    frame["best"] = frame["pearson"] == frame.groupby("observed")["pearson"].transform("max")
    (axes,) = confusion_matrix(frame, title="1 of 3").axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["0.90", "0.10", "-0.20", "0.20", "0.30", "0.80", "–", "–", "–"]
    frames = [(line.get_xdata()[0], line.get_ydata()[0], line.get_color()) for line in axes.lines]
    assert [(x, y) for x, y, _ in frames] == [(0, 0), (2, 1)]
    assert frames[0][2] != frames[1][2]  # a wrong one in another colour
    assert axes.get_xticklabels()[0].get_text() == "B"
    assert all(re.fullmatch(r".{1,18}", label.get_text()) for label in axes.get_yticklabels())
