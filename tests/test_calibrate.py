"""Percentiles against background variants: strata, ties, few, the run's folder, and the commands."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from builders import SETTINGS, tiny_coverage
from seqgraft.apply import calibrate_run, score_run
from seqgraft.cli import app
from seqgraft.data.augment import Augmentation
from seqgraft.errors import ConfigError, DataError, RunError
from seqgraft.experiment import parse_experiment
from seqgraft.genome import Genome, Variant, read_vcf, vcf_text
from seqgraft.run import fit_run
from seqgraft.variants import VariantConfig
from seqgraft.variants.calibrate import (
    TYPES,
    Calibration,
    _order_statistics,
    _percentiles,
    allele_type,
    random_variants,
    strata_of,
)
from seqgraft.variants.over import Centre
from seqgraft.variants.scorers import Difference, Log2FoldChange

CONFIG = VariantConfig((Difference(), Log2FoldChange()), Centre(48))
COUNT = 1100


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, genes, and variants to be scored: 6 SNVs, one of the background, an insertion."""
    root = tmp_path_factory.mktemp("calibrate")
    dataset = tiny_coverage(root / "data", regions=12)
    content: dict[str, Any] = {"data": str(root / "data"), "model": {"name": "convnet", "settings": SETTINGS}}
    fit_run(parse_experiment(content | {"train": {"epochs": 1, "batch_size": 4}}), root / "run")
    attributes = 'gene_id "g";'
    (root / "g.gtf").write_text(f"chr1\tx\texon\t51\t90\t.\t+\t.\t{attributes}\n")
    assert dataset.genome is not None
    drawn = random_variants(dataset.genome, COUNT, seed=0)
    snvs = [v for v in random_variants(dataset.genome, 90, seed=7) if len(v.ref) == len(v.alt) == 1 and v not in drawn]
    longer = [v for v in random_variants(dataset.genome, 90, seed=8) if len(v.alt) > len(v.ref) and v not in drawn]
    known = next(v for v in drawn if allele_type(v) == "transition")
    write(root / "in.vcf", dataset.genome, [*snvs[:6], known, longer[0]])
    return root


def write(path: Path, genome: Genome, variants: list[Variant]) -> None:
    lines = ["##fileformat=VCFv4.2", *(f"##contig=<ID={c},length={n}>" for c, n in genome.chroms.items())]
    lines.append("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO")
    lines += [
        f"{v.chrom}\t{v.position}\t.\t{v.ref}\t{v.alt}\t.\t.\t." for v in sorted(variants, key=lambda v: v.position)
    ]
    path.write_text("\n".join(lines) + "\n")


# Strata


def test_allele_types() -> None:
    pairs = {
        ("A", "G"): "transition", ("C", "T"): "transition", ("A", "C"): "transversion", ("G", "T"): "transversion",
        ("AC", "GT"): "mnv", ("A", "AC"): "insertion_1", ("A", "ACCCCC"): "insertion_2-5",
        ("A", "AC" * 4): "insertion_6+",
        ("AC", "A"): "deletion_1", ("ACC", "A"): "deletion_2-5", ("ACCCCCC", "A"): "deletion_6+",
    }  # fmt: skip
    assert {pair: allele_type(Variant("c", 1, *pair)) for pair in pairs} == pairs
    assert set(pairs.values()) == set(TYPES)


def test_distances() -> None:
    """To the nearest start; the edges are half-open."""
    starts = {"chr1": np.array([1000, 50_000])}
    at = {
        1001: "0-1kb",
        2000: "0-1kb",
        2001: "1-10kb",
        1: "1-10kb",
        25_501: "10-100kb",
        50_001: "0-1kb",
        200_000: "100kb+",
    }
    variants = [Variant("chr1", position, "A", "G") for position in at]
    assert strata_of(variants, starts) == [f"transition/{name}" for name in at.values()]
    assert strata_of([Variant("chr2", 5, "A", "G")], starts) == ["transition/100kb+"]
    assert strata_of(variants[:1], None) == ["transition"]


def test_random_variants(root: Path) -> None:
    genome = Genome.open(root / "data.fa")
    drawn = random_variants(genome, 450, seed=3)
    assert drawn == random_variants(genome, 450, seed=3) != random_variants(genome, 450, seed=4)
    assert Counter(map(allele_type, drawn)) == dict.fromkeys(TYPES, 50)
    assert len(set(drawn)) == 450
    letters = np.array(list("ACGTN"))[genome.chrom_codes("chr1")]
    assert all("".join(letters[v.position - 1 : v.position - 1 + len(v.ref)]) == v.ref for v in drawn)
    assert all(v.ref[0] == v.alt[0] for v in drawn if len(v.ref) != len(v.alt))
    with pytest.raises(ConfigError, match="less than one of each type"):
        random_variants(genome, 3)


# Percentiles


def test_the_rule_of_percentiles() -> None:
    """Smaller plus half of the equal, per column; NaN is left out of the background and stays NaN in a score."""
    points = np.array([[1, 5], [2, 5], [2, np.nan], [3, np.nan]], dtype=np.float32)
    scores = np.array([[0, 5], [1, 4], [2, 6], [9, np.nan]], dtype=np.float32)
    found = _percentiles(points, scores)
    np.testing.assert_array_equal(found, [[0, 50], [12.5, 0], [50, 100], [100, np.nan]])


def test_order_statistics() -> None:
    """Up to a thousand are exact; of more, percentiles are off by a twentieth of a percent at most."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=1000).astype(np.float32) ** 2
    np.testing.assert_array_equal(_order_statistics(values), np.sort(values))
    many = rng.normal(size=54_321).astype(np.float32) ** 2
    kept = _order_statistics(many)
    assert (len(kept), kept[0], kept[-1]) == (1000, many.min(), many.max())
    scores = rng.normal(size=(500, 1)).astype(np.float32) ** 2
    exact = _percentiles(np.sort(many)[:, None], scores)
    assert np.abs(_percentiles(kept[:, None], scores) - exact).max() < 0.11
    assert np.isnan(_order_statistics(np.full(4, np.nan, np.float32))).tolist() == [True]


# A run


@pytest.fixture(scope="module")
def calibrated(root: Path) -> Path:
    """A copy of the run with a calibration by allele type and distance."""
    shutil.copytree(root / "run", root / "calibrated")
    found = calibrate_run(root / "calibrated", COUNT, CONFIG, gtf=root / "g.gtf")
    assert found.variants == COUNT
    assert set(found.strata) >= set(TYPES)  # of 1,100, 122 of each; divided by distance some are too few
    assert found.small
    return root / "calibrated"


def test_percentiles_of_a_run(root: Path, calibrated: Path, tmp_path: Path) -> None:
    """Against the background's own scores, sorted the plain way; in Parquet and in VCF."""
    found = score_run(calibrated, root / "in.vcf", tmp_path / "a.parquet", CONFIG)
    table = pd.read_parquet(tmp_path / "a.parquet")
    vcf = next((calibrated / "calibration").glob("*.vcf"))
    score_run(root / "run", vcf, tmp_path / "b.parquet", CONFIG)
    background = pd.read_parquet(tmp_path / "b.parquet")
    plain = pd.read_parquet(tmp_path / "b.parquet").columns
    assert list(table.columns) == [*plain, "rna+_percentile", "rna-_percentile", "atac_percentile"]
    content = json.loads(next((calibrated / "calibration").glob("*.json")).read_text())
    starts = {"chr1": np.array([50])}
    ours, theirs = (
        [Variant(*row) for row in t[["chrom", "position", "ref", "alt"]].itertuples(index=False)]
        for t in (table, background)
    )
    names = dict(zip(theirs, strata_of(theirs, starts), strict=True))
    counts = Counter(names.values()) + Counter(name.partition("/")[0] for name in names.values())
    assert content["strata"] | content["too_small"] == counts
    assert min(content["strata"].values()) >= 100 > max(content["too_small"].values())
    fallen = 0
    for row, variant in zip(table.to_dict("records"), ours, strict=True):
        (own,) = strata_of([variant], starts)
        whole = own.partition("/")[0]
        fallen += own not in content["strata"] and row["scorer"] == "difference"
        same = [names[v] == own if own in content["strata"] else names[v].startswith(f"{whole}/") for v in theirs]
        for track in ("rna+", "rna-", "atac"):
            values = background[np.array(same) & (background["scorer"] == row["scorer"])][track].abs()
            assert len(values) >= 100
            wanted = 100 * ((values < abs(row[track])).mean() + (values == abs(row[track])).mean() / 2)
            assert row[f"{track}_percentile"] == pytest.approx(wanted, abs=1.5 / len(values) * 100)
    notes = " ".join(found.notes)
    assert notes.startswith("1 variants are in the calibration's background themselves")
    assert (f"{fallen} variants are in strata of fewer than 100" in notes) == (fallen > 0)
    score_run(calibrated, root / "in.vcf", tmp_path / "a.vcf.gz", CONFIG)
    text = list(vcf_text(tmp_path / "a.vcf.gz"))
    assert any("ID=difference_percentile" in line for line in text)
    fields = dict(item.split("=") for item in text[-1].split("\t")[7].split(";"))
    shown = [float(v) for v in fields["difference_percentile"].split("|")]
    last = table[table["scorer"] == "difference"].iloc[-1]
    np.testing.assert_allclose(
        shown, last[["rna+_percentile", "rna-_percentile", "atac_percentile"]].tolist(), rtol=1e-4
    )


def test_it_is_of_its_settings(root: Path, calibrated: Path, tmp_path: Path) -> None:
    """Other settings have no percentiles; what changes rounding or names alone finds the same calibration."""
    for name, config, there in (
        ("a", VariantConfig((Difference(),), Centre(48)), False),
        ("b", VariantConfig(CONFIG.scorers, Centre(64)), False),
        ("c", VariantConfig(CONFIG.scorers, Centre(48), Augmentation(True)), False),
        ("d", VariantConfig(CONFIG.scorers, Centre(48), batch_size=3, local=False), True),
    ):
        score_run(calibrated, root / "in.vcf", tmp_path / f"{name}.parquet", config)
        columns = pd.read_parquet(tmp_path / f"{name}.parquet").columns
        assert ("atac_percentile" in columns) == there
    with pytest.raises(RunError, match="calibrated already"):
        calibrate_run(calibrated, COUNT, CONFIG)


def test_few_fall_back_and_are_said(tmp_path: Path) -> None:
    """A stratum without enough rows uses its type; a type without enough has no percentile."""
    content = {"strata": {"transition": 200, "transition/0-1kb": 120}, "gtf": {}}
    of = Calibration(tmp_path / "x.json", content, {"chr1": np.array([0])}, np.zeros(0, np.uint64))
    assert [of.stratum(f"transition/{d}") for d in ("0-1kb", "1-10kb")] == ["transition/0-1kb", "transition"]
    assert of.stratum("mnv/0-1kb") == ""
    variants = [Variant("chr1", 5, "A", "G"), Variant("chr1", 5000, "A", "G"), Variant("chr1", 5, "AC", "GT")]
    notes = of.notes(variants)
    assert len(notes) == 2
    assert notes[0].startswith("1 variants are in strata of fewer than 100")
    assert notes[1].startswith("1 variants are of a type of fewer than 100")


def test_a_background_that_is_too_small(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "run", tmp_path / "run")
    for background in (root / "in.vcf", 90):
        with pytest.raises(DataError, match="the background: no type of allele has enough"):
            calibrate_run(tmp_path / "run", background, CONFIG)
        assert not list((tmp_path / "run" / "calibration").iterdir())
    assert (root / "in.vcf").exists()


def test_the_commands(root: Path, tmp_path: Path) -> None:
    """``calibrate`` with a VCF, ``variants`` that uses it, and ``screen``."""
    shutil.copytree(root / "run", tmp_path / "run")
    genome = Genome.open(root / "data.fa")
    write(
        tmp_path / "back.vcf", genome, [v for v in random_variants(genome, 1000, 5) if allele_type(v) == "transition"]
    )
    options = ["--set", "over={kind: centre, width: 48}"]
    call = CliRunner().invoke
    few = call(app, ["calibrate", str(tmp_path / "run"), *options])
    assert isinstance(few.exception, ConfigError)
    done = call(app, ["calibrate", str(tmp_path / "run"), str(tmp_path / "back.vcf"), *options], catch_exceptions=False)
    assert "112 background variants in 1 strata" in done.output
    assert [v.ref for v in read_vcf(tmp_path / "back.vcf")]
    arguments = ["variants", str(tmp_path / "run"), str(root / "in.vcf"), str(tmp_path / "o.parquet"), *options]
    shown = call(app, arguments, catch_exceptions=False)
    assert "variants are of a type of fewer than 100 background rows and have no percentile" in shown.output
    table = pd.read_parquet(tmp_path / "o.parquet")
    assert table["atac_percentile"].isna().any()
    assert table["atac_percentile"].between(0, 100).any()
    (tmp_path / "r.bed").write_text("chr1\t300\t400\n")
    arguments = ["screen", str(tmp_path / "run"), str(tmp_path / "r.bed"), str(tmp_path / "s.parquet"), "--top", "5"]
    screened = call(app, [*arguments, "--set", "sample=20"], catch_exceptions=False)
    assert "300 SNVs were scored to first order in 1 window;" in screened.output
    assert "atac: on 20 random SNVs, Spearman with the exact scores is" in screened.output
    assert len(pd.read_parquet(tmp_path / "s.exact.parquet")) == 20 + 2 * 5
