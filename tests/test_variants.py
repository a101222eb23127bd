"""Variant effects: placement, alignment of indels, the engine, and what is left on disk."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pysam
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builders import BIN_SIZE, BINS, SETTINGS, WINDOW, tiny_coverage, tiny_labels
from guides import run_guide
from seqgraft.apply import score_run
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import DatasetInfo, write_dataset
from seqgraft.errors import ConfigError, DataError, ModelError, RunError
from seqgraft.experiment import build, parse_experiment, settings_of
from seqgraft.genome import Genome, Interval, Variant
from seqgraft.run import Run, fit_run, open_run
from seqgraft.sample import Sample
from seqgraft.sequence import N, decode, encode, reverse_complement
from seqgraft.tracks import TrackTable, unsquash
from seqgraft.variants import Layout, VariantConfig, VariantScorer
from seqgraft.variants import table as tables
from seqgraft.variants.over import Centre, Regions, Window
from seqgraft.variants.place import Alignment, Site, align, alternate
from seqgraft.variants.scorers import Difference, Log2FoldChange
from test_alleles import vcf

CENTRE = Centre(48)
REGIONS = 12
LENGTH = WINDOW - BINS * BIN_SIZE + REGIONS * BINS * BIN_SIZE


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs: coverage, labels of intervals, and labels of sequences without a genome."""
    root = tmp_path_factory.mktemp("runs")
    dataset = tiny_coverage(root / "data" / "coverage", regions=REGIONS)
    tiny_labels(root / "data" / "sequences", rows=18)
    _label_intervals(root / "data" / "intervals", dataset.genome)
    for name in ("coverage", "intervals", "sequences"):
        content: dict[str, Any] = {
            "data": str(root / "data" / name),
            "model": {"name": "convnet", "settings": SETTINGS},
        }
        content |= {"train": {"epochs": 1, "batch_size": 4}, "adapter": {"kind": "full", "statistics": "batch"}}
        fit_run(parse_experiment(content), root / name)
    return root


def _label_intervals(folder: Path, genome: Genome | None) -> None:
    assert genome is not None
    starts = np.arange(0, 1600, 128)
    regions = pd.DataFrame({"chrom": "chr1", "start": starts, "end": starts + 128, "strand": "+", "name": "r"})
    regions["fold"] = ["train", "train", "valid", "test"] * 3 + ["train"]
    tracks = TrackTable.build([{"name": "open", "link": "sigmoid"}, {"name": "closed", "link": "sigmoid"}])
    with write_dataset(folder, (len(starts), 2, 1)) as writer:
        writer.targets[:, 0, 0], writer.targets[:, 1, 0] = np.arange(13) % 2, np.arange(13) % 3 == 0
        recorded = {"path": str(genome.path), "hash": genome.hash}
        writer.finish(DatasetInfo("labelled", 128, 1, 128, recorded), regions, tracks)


@pytest.fixture(scope="module")
def run(runs: Path) -> Run:
    return open_run(runs / "coverage")


@pytest.fixture(scope="module")
def layout(run: Run) -> Layout:
    assert run.dataset.genome is not None
    return Layout(WINDOW, BINS, BIN_SIZE, run.model.tracks, run.dataset.genome)


def letters(run: Run) -> str:
    assert run.dataset.genome is not None
    return decode(np.asarray(run.dataset.genome.chrom_codes("chr1")))


def mixed(text: str, count: int, seed: int = 0, *, snvs: bool = False) -> list[Variant]:
    """SNVs, insertions, deletions and MNVs of up to 40 bases, also at the ends of the contig."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        place = [1, len(text) - 45, 2, len(text) - 50][number] if number < 4 else int(rng.integers(1, len(text) - 40))
        kind = 0 if snvs else number % 4
        ref = text[place - 1 : place - 1 + (1 if kind < 2 else int(rng.integers(2, 40)))]
        if kind == 1:
            alt = ref + decode(rng.integers(0, 4, int(rng.integers(1, 40))).astype(np.uint8))
        elif kind == 2:
            alt = ref[0]
        else:
            alt = "".join("ACGT"[("ACGT".index(c) + int(rng.integers(1, 4))) % 4] for c in ref)
        found.append(Variant("chr1", place, ref, alt, f"v{number}"))
    return found


def predicted(run: Run, text: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Raw predictions ``(tracks, bins)`` of a sequence, the plain way."""
    codes = torch.from_numpy(encode(text))[None]
    none = torch.zeros((1, 0, 0))
    with torch.inference_mode():
        values = run.model.predict(Sample(codes, torch.tensor([codes.shape[1]]), torch.zeros(1), none, none.bool()))
    return unsquash(values[0].double().numpy(), run.model.tracks, run.dataset.info.bin_size)


def window_of(text: str, start: int, size: int) -> str:
    """Letters of a contig, N beyond its ends."""
    return "".join(text[i] if 0 <= i < len(text) else "N" for i in range(start, start + size))


def slow_alternate(text: str, variant: Variant, start: int, size: int, *, right: bool = False) -> str:
    """The window of the changed contig that keeps its left (right) side."""
    far = "N" * 3 * size
    changed = text[: variant.position - 1] + variant.alt + text[variant.position - 1 + len(variant.ref) :]
    begin = start + len(changed) - len(text) if right else start
    whole = far + changed + far
    return whole[begin + len(far) :][:size]


def slow_align(variant: Variant, start: int, ref: Any, left: Any, right: Any = None) -> Any:
    """The rule of the module's text, bin by bin."""
    if len(variant.ref) == len(variant.alt):
        return left
    pairs = zip(variant.ref, variant.alt, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(variant.ref), len(variant.alt)))
    first_bin = start + (WINDOW - BINS * BIN_SIZE) // 2
    v = (variant.position - 1 + same - first_bin) // BIN_SIZE
    k = round((len(variant.alt) - len(variant.ref)) / BIN_SIZE)
    out = np.empty_like(ref)
    for i in range(BINS):
        if i < v:
            out[:, i] = left[:, i]
        elif i == v:
            out[:, i] = left[:, v : v + max(k, 0) + 1].sum(1)
        elif i <= v - k:
            out[:, i] = 0
        elif right is not None:
            out[:, i] = right[:, i]
        else:
            out[:, i] = left[:, i + k] if i + k < BINS else ref[:, i]
    return out


# Placement


def test_windows(layout: Layout) -> None:
    """A centred window has the variant at length / 2 - 1; one of the grid is the nearest of those an eighth apart."""
    variant = Variant("chr1", 1000, "A", "C")
    assert layout.centred(variant) == 999 - 127
    assert layout.step == BIN_SIZE
    for position in range(1, 400):
        start = layout.on_grid(Variant("chr1", position, "A", "C"))
        middle = start + WINDOW // 2
        assert (start + layout.margin) % layout.step == 0
        assert abs(position - 1 - middle) <= layout.step / 2
    big = replace(layout, window=5120, bins=256, bin_size=16)
    assert (big.step, big.margin, big.target) == (512, 512, 4096)
    assert replace(layout, window=5121, bins=256).margin == -Interval("c", 0, 4096).resize(5121).start


def test_the_centre_covers_its_width(layout: Layout) -> None:
    for width in (1, 2, 15, 16, 17, 48, 112):
        sites = Centre(width).sites(layout)
        for position in range(1, 300):
            (site,) = sites(Variant("chr1", position, "A", "C"))
            assert 0 <= site.bins[0] < site.bins[1] <= BINS
            first = site.start + layout.margin
            for at, weight in zip(range(*site.bins), site.weights, strict=True):
                left = position - 1 - (width - 1) // 2
                touched = first + at * BIN_SIZE < left + width and first + (at + 1) * BIN_SIZE > left
                assert weight == touched
            assert site.weights.sum() >= width / BIN_SIZE
    with pytest.raises(ConfigError, match="Give at most 112 bp"):
        Centre(113).sites(layout)
    with pytest.raises(ConfigError, match="label has no bins"):
        Centre().sites(replace(layout, bins=1, bin_size=WINDOW))


@given(st.integers(0, 10**6))
def test_alternates(seed: int) -> None:
    """Against strings: any variant at any place of a window that may reach beyond the contig."""
    rng = np.random.default_rng(seed)
    text = decode(rng.integers(0, 4, 60).astype(np.uint8))
    (variant,) = mixed(text + "A" * 50, 5, seed)[4:] if seed % 2 else mixed(text, 1, seed, snvs=True)
    if variant.position - 1 + len(variant.ref) > len(text):
        return
    size, reserve = 32, len(variant.ref) + seed % 3
    start = variant.position - 1 - int(rng.integers(0, size))
    codes = encode(window_of(text, start - reserve, size + 2 * reserve))
    for right in (False, True):
        found = alternate(codes, variant.position - 1 - start, variant, size, reserve, right=right)
        assert decode(found) == slow_alternate(text, variant, start, size, right=right)
    outside = alternate(codes, size, variant, size, reserve)
    assert decode(outside) == window_of(text, start, size)


@given(st.integers(0, BINS - 1), st.integers(-40, 40), st.integers(0, BINS - 1), st.integers(1, BINS), st.booleans())
def test_alignment(at: int, change: int, first: int, width: int, stitched: bool) -> None:
    """Any bins that are read are those of the aligned whole."""
    rng = np.random.default_rng(abs(change) + at)
    ref, left, right = (torch.from_numpy(rng.random((2, BINS))) for _ in range(3))
    position = 33 + at * BIN_SIZE  # of the first base of bin `at`, in a window that starts at 0
    variant = Variant("chr1", position, "A" * (1 + max(-change, 0)), "A" * (1 + max(change, 0)))
    alignment = Alignment(at, round(change / BIN_SIZE))
    whole = slow_align(
        replace(variant, ref="C" + variant.ref[1:]), 0, ref.numpy(), left.numpy(), right.numpy() if stitched else None
    )
    if change == 0:
        return
    bins = first, min(first + width, BINS)
    start, stop = alignment.needed(bins, BINS)
    others = (right[:, bins[0] : bins[1]], bins[0]) if stitched else (None, 0)
    found = align(alignment, bins, ref[:, slice(*bins)], left[:, start:stop], start, *others)
    np.testing.assert_allclose(found, whole[:, slice(*bins)])


# Scores


def scored(run: Run, layout: Layout, variants: list[Variant], **settings: Any) -> np.ndarray[Any, Any]:
    settings = {"scorers": (Difference(), Log2FoldChange()), "over": CENTRE} | settings
    return VariantScorer(run.model, layout, VariantConfig(**settings))(variants).values


def expected(run: Run, layout: Layout, variant: Variant, over: Any, *, stitch: bool = False) -> Any:
    """Difference and log2 fold change, the plain way."""
    text = letters(run)
    (site,) = over.sites(layout)(variant)
    ref = predicted(run, window_of(text, site.start, WINDOW))
    left = predicted(run, slow_alternate(text, variant, site.start, WINDOW))
    right = predicted(run, slow_alternate(text, variant, site.start, WINDOW, right=True)) if stitch else None
    alt = slow_align(variant, site.start, ref, left, right)
    sums = [(values[:, slice(*site.bins)] * site.weights).sum(1) for values in (ref, alt)]
    return np.stack([sums[1] - sums[0], np.log2((sums[1] + 1) / (sums[0] + 1))])


@pytest.mark.parametrize("stitch", [False, True])
@pytest.mark.parametrize("over", [CENTRE, Window()], ids=["centre", "window"])
def test_scores_are_those_of_the_plain_way(over: Any, stitch: bool, run: Run, layout: Layout) -> None:
    """Local recomputation and whole windows, beyond the ends of the contig too."""
    variants = mixed(letters(run), 16)
    wanted = np.stack([expected(run, layout, v, over, stitch=stitch) for v in variants])
    assert np.abs(wanted).max() > 0.1
    for local in (True, False):
        found = scored(run, layout, variants, over=over, stitch=stitch, local=local)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


def test_padded_windows_are_counted(run: Run, layout: Layout) -> None:
    scorer = VariantScorer(run.model, layout, VariantConfig(over=CENTRE))
    text = letters(run)
    positions = [1, len(text), len(text) // 2]
    assert scorer([Variant("chr1", p, text[p - 1], "A") for p in positions]).padded == 2
    ends = layout.genome.codes(Interval("chr1", layout.on_grid(Variant("chr1", 1, "A", "C")), 0))
    assert (ends == N).all()


def test_scores_depend_on_the_variant_alone(run: Run, layout: Layout) -> None:
    """Not on the batch, the chunk, the order, or what else is scored."""
    variants = mixed(letters(run), 30)
    whole = scored(run, layout, variants)
    order = np.random.default_rng(1).permutation(len(variants))
    shuffled = scored(run, layout, [variants[i] for i in order])
    np.testing.assert_allclose(shuffled, whole[order], rtol=1e-4, atol=1e-5)
    for size in (1, 3, 64):
        np.testing.assert_allclose(scored(run, layout, variants, batch_size=size), whole, rtol=1e-4, atol=1e-5)
    alone = np.concatenate([scored(run, layout, [variant]) for variant in variants[:8]])
    np.testing.assert_allclose(alone, whole[:8], rtol=1e-4, atol=1e-5)


def test_views_are_averaged_in_raw_units(run: Run, layout: Layout) -> None:
    """Both strands and shifts: the bins turn round, the strand pairs change places, and shifts leave the bins alone."""
    text, variant = letters(run), mixed(letters(run), 8)[6]
    (site,) = CENTRE.sites(layout)(variant)
    sums = []
    for sequence in (window_of, slow_alternate):
        of = (text,) if sequence is window_of else (text, variant)
        values = []
        for shift in (-1, 0, 1):
            forward = sequence(*of, site.start + shift, WINDOW)  # type: ignore[arg-type, operator]
            turned = decode(reverse_complement(encode(forward)))
            values += [predicted(run, forward), predicted(run, turned)[run.model.tracks.permutation, ::-1]]
        sums.append(np.mean(values, axis=0))
    aligned = slow_align(variant, site.start, sums[0], sums[1])
    weighted = [(v[:, slice(*site.bins)] * site.weights).sum(1) for v in (aligned, sums[0])]
    for local in (True, False):
        found = scored(run, layout, [variant], ensemble=Augmentation(True, 1), local=local)[0, 0]
        np.testing.assert_allclose(found, weighted[0] - weighted[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(scored(run, layout, [variant])[0, 0], weighted[0] - weighted[1], rtol=1e-3)


def test_neighbours_share_the_reference_pass(run: Run, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    predict = run.model.predict

    def counted(sample: Sample) -> torch.Tensor:
        passes.append(len(sample.codes))
        return predict(sample)

    monkeypatch.setattr(run.model, "predict", counted)
    text = letters(run)
    at = 500
    variants = [
        Variant("chr1", p, text[p - 1], alt) for p in range(at, at + 40) for alt in "ACGT" if alt != text[p - 1]
    ]
    windows = len({layout.on_grid(v) for v in variants})
    assert windows <= 4
    scored(run, layout, variants[::-1], local=False, batch_size=8)
    assert sum(passes) == len(variants) + windows


def test_sites_of_several_kinds(run: Run, layout: Layout) -> None:
    """A variant may be read at several places, with a name and some tracks each, or nowhere."""

    class Twice:
        columns = ("gene",)

        def sites(self, layout: Layout) -> Any:
            one = Site(300, (2, 5), np.ones(3), ("a",), np.array([True, False, False]))
            two = Site(300, (0, BINS), np.ones(BINS), ("b",))
            return lambda variant: [] if variant.position < 350 else [one, two]

    text = letters(run)
    variants = [Variant("chr1", p, text[p - 1], "A" if text[p - 1] != "A" else "C") for p in (400, 340, 420)]
    found = VariantScorer(run.model, layout, VariantConfig(over=Twice()))(variants)
    assert found.variant.tolist() == [0, 0, 2, 2]
    assert found.names == [("a",), ("b",)] * 2
    assert np.isnan(found.values[0]).tolist() == [[False, True, True]]
    assert not np.isnan(found.values[1]).any()


def test_predictions_that_are_not_finite(runs: Path, layout: Layout) -> None:
    broken = open_run(runs / "coverage")
    with torch.no_grad():
        next(iter(broken.model.heads.values())).out.bias[:] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(ModelError, match=r"chr1:5.*not finite"):
        scored(broken, layout, [Variant("chr1", 5, letters(broken)[4], "A")])


# Settings


def test_settings_are_read_and_written() -> None:
    content = {
        "scorers": ["difference", {"kind": "log2_fold_change", "pseudocount": 0.5}],
        "over": {"kind": "centre", "width": 301},
        "ensemble": {"reverse_complement": True, "shift": 1},
    }
    config = build(VariantConfig, content, "variants.yaml")
    assert config.scorers == (Difference(), Log2FoldChange(0.5))
    assert config.over == Centre(301)
    assert build(VariantConfig, settings_of(config), "again") == config
    assert build(VariantConfig, {"scorers": "difference", "over": "window"}, "x") == VariantConfig(
        scorers=(Difference(),), over=Window()
    )
    for wrong, words in (
        ({"scorers": ["SAD"]}, "there is no such kind: 'SAD'"),
        ({"scorers": ["difference", "difference"]}, "two scorers have one name"),
        ({"over": {"kind": "centre", "width": 0}}, "must be 1 or more: 0"),
        ({"batch_size": 0}, "must be 1 or more: 0"),
        ({"scorers": [{"kind": "log2_fold_change", "pseudocount": 0}]}, "must be above 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(VariantConfig, wrong, "variants.yaml")


# Files


@pytest.fixture
def source(run: Run, tmp_path: Path) -> Path:
    """40 records; the 11th has two ALTs."""
    rows = [(v.chrom, v.position, v.ref, v.alt) for v in sorted(mixed(letters(run), 40, 3), key=lambda v: v.position)]
    chrom, position, ref, alt = rows[10]
    rows[10] = (chrom, position, ref, f"{alt},{alt}AC")
    return vcf(tmp_path / "in.vcf", rows)


CONFIG = VariantConfig(scorers=(Difference(), Log2FoldChange()), over=CENTRE)


def test_a_table_of_scores(runs: Path, run: Run, layout: Layout, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "effects.parquet"
    done = score_run(runs / "coverage", source, out, CONFIG)
    table = pd.read_parquet(out)
    assert list(table.columns) == ["chrom", "position", "ref", "alt", "id", "scorer", *run.model.tracks.names]
    assert (done.variants, done.rows, len(table), done.skipped) == (41, 82, 82, {})
    assert done.files == (out, out.with_name("effects.skipped.tsv"))
    assert table["scorer"].tolist() == ["difference", "log2_fold_change"] * 41
    assert table["id"].tolist()[18:26] == ["v10"] * 2 + ["v11"] * 4 + ["v12"] * 2
    variants = [Variant(*row) for row in table.iloc[::2, :5].itertuples(index=False, name=None)]
    values = table[run.model.tracks.names].to_numpy().reshape(41, 2, -1)
    np.testing.assert_allclose(values, scored(run, layout, variants), rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in out.parent.iterdir()) == ["effects.parquet", "effects.skipped.tsv"]
    assert pq.read_schema(out).metadata[b"seqgraft.genome"].decode() == layout.genome.hash
    with pytest.raises(RunError, match="exists already"):
        score_run(runs / "coverage", source, out, CONFIG)


def test_a_vcf_of_scores(runs: Path, run: Run, source: Path, tmp_path: Path) -> None:
    """Header, IDs and INFO are kept; each ALT has its values; a skipped one has none."""
    lines = source.read_text().splitlines()
    fields = lines[-1].split("\t")
    lines[-1] = "\t".join([*fields[:4], f"{fields[4]},<DEL>", *fields[5:]])
    lines.append("\t".join([*fields[:4], "*", *fields[5:7], "."]))
    source.write_text("\n".join(lines) + "\n")
    allowed = replace(CONFIG, allow_skipped=True)
    out = tmp_path / "effects.vcf.gz"
    done = score_run(runs / "coverage", source, out, allowed)
    score_run(runs / "coverage", source, tmp_path / "same.parquet", allowed)
    table = pd.read_parquet(tmp_path / "same.parquet")
    assert done.files[:2] == (out, tmp_path / "effects.vcf.gz.tbi")
    assert sum(done.skipped.values()) == 2
    names = run.model.tracks.names
    with pysam.VariantFile(str(out)) as file:
        assert [line for line in str(file.header).splitlines() if line in lines] == [x for x in lines if x[0] == "#"]
        assert f"##seqgraft_tracks={'|'.join(names)}" in str(file.header)
        records = list(file)
        assert [r.pos for r in file.fetch("chr1", records[5].pos - 1, records[5].pos)] == [records[5].pos]
    assert [r.id for r in records] == [line.split("\t")[2] for line in lines if line[0] != "#"]
    assert [r.info.get("X") for r in records] == [*range(1, 41), None]
    found = [entry for r in records for entry in r.info.get("difference", ()) if entry != "."]
    values = np.array([[float(v) for v in entry.split("|")] for entry in found])
    np.testing.assert_allclose(values, table.loc[table["scorer"] == "difference", names], rtol=1e-4)
    assert len(records[10].info["difference"]) == 2
    assert records[39].info["log2_fold_change"][1] == "."
    assert "difference" not in records[40].info
    with pytest.raises(DataError, match="does not exist"):
        score_run(runs / "coverage", tmp_path / "no.vcf", tmp_path / "no.vcf.gz", CONFIG)
    with pytest.raises(DataError, match=r"INFO fields of these scorers already: \['difference', 'log2_fold_change'\]"):
        score_run(runs / "coverage", out, tmp_path / "again.vcf.gz", allowed)


def test_a_vcf_with_odd_letters(runs: Path, source: Path, tmp_path: Path) -> None:
    """A form feed or a Unicode line end ends no line."""
    text = source.read_text().replace("X=3\n", "X=3;Y=a\u2028b\n")
    source.write_text(text.replace("\n", '\n##INFO=<ID=Y,Number=1,Type=String,Description="a\x0cb">\n', 1))
    score_run(runs / "coverage", source, tmp_path / "odd.vcf.gz", CONFIG)
    records = records_of(tmp_path / "odd.vcf.gz")
    assert len(records) == 40
    assert sum("Y=a\u2028b;difference=" in line for line in records) == 1


def records_of(path: Path) -> list[str]:
    return [line for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line and line[0] != "#"]


@pytest.mark.parametrize("kept", ["its index", "the index of another"])
def test_the_index_is_that_of_the_output(
    kept: str, runs: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two renames loses no index; one that was left beside an unsorted output is no index of it."""
    out = tmp_path / "effects.vcf.gz"
    index = tmp_path / "effects.vcf.gz.tbi"
    if kept == "its index":
        replaced, made = os.replace, []

        def killed(old: Path, new: Path) -> None:
            replaced(old, new)
            made.append(Path(new).name)
            if {out.name, index.name} & set(made):
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            score_run(runs / "coverage", source, out, CONFIG)
        monkeypatch.setattr(os, "replace", replaced)
        done = score_run(runs / "coverage", source, out, CONFIG, resume=True)
        assert done.files[:2] == (out, index)
    else:
        lines = source.read_text().splitlines()
        source.write_text(
            "\n".join([*(x for x in lines if x[0] == "#"), *(x for x in lines[::-1] if x[0] != "#")]) + "\n"
        )
        index.write_text("of an output that was removed")
        done = score_run(runs / "coverage", source, out, CONFIG)
        assert index not in done.files
        assert not index.exists()


def test_intervals_beyond_their_chromosome(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "r.bed").write_text("chr1\t100\t200\nchr1\t9999900\t9999990\n")
    with pytest.raises(DataError, match=r"reaches beyond its chromosome: 'chr1:9999900-9999990'"):
        Regions(tmp_path / "r.bed").sites(layout)


def test_shards_and_chunks_make_the_same_table(runs: Path, source: Path, tmp_path: Path) -> None:
    score_run(runs / "coverage", source, tmp_path / "all.parquet", CONFIG)
    whole = pd.read_parquet(tmp_path / "all.parquet")
    for number in (1, 2):
        score_run(runs / "coverage", source, tmp_path / f"{number}.parquet", CONFIG, shard=(number, 2))
        score_run(runs / "coverage", source, tmp_path / f"{number}.vcf.gz", CONFIG, shard=(number, 2))
    joined = pd.concat([pd.read_parquet(tmp_path / f"{number}.parquet") for number in (1, 2)], ignore_index=True)
    pd.testing.assert_frame_equal(joined, whole, rtol=1e-4, atol=1e-5)
    ids = []
    for number in (1, 2):
        with pysam.VariantFile(str(tmp_path / f"{number}.vcf.gz")) as file:
            ids += [record.id for record in file]
    assert ids == [f"v{n}" for n in range(1, 41)]
    run = open_run(runs / "coverage")
    assert run.dataset.genome is not None
    layout = Layout(WINDOW, BINS, BIN_SIZE, run.model.tracks, run.dataset.genome)
    out = tmp_path / "chunks.parquet"
    tables.score_vcf(run.model, layout, CONFIG, source, out, identity={}, chunk=7)
    pd.testing.assert_frame_equal(pd.read_parquet(out), whole, rtol=1e-4, atol=1e-5)


def test_variants_that_nothing_reads_are_counted(runs: Path, source: Path, tmp_path: Path) -> None:
    bed = tmp_path / "peak.bed"
    bed.write_text(f"chr1\t{WINDOW}\t{WINDOW + BIN_SIZE}\n")
    out = tmp_path / "peaks.parquet"
    config = replace(CONFIG, over=Regions(bed))
    found = score_run(runs / "coverage", source, out, config)
    named = set(pd.read_parquet(out)["id"])
    assert 0 < found.unread < found.variants
    assert found.rows == len(pd.read_parquet(out)) == (found.variants - found.unread) * len(CONFIG.scorers)
    assert 0 < len(named) < 40


def test_replicates_are_averaged(runs: Path, source: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((runs / "coverage" / "experiment.yaml").read_text())
    content["train"]["seed"] = 2
    fit_run(parse_experiment(content), tmp_path / "second")
    folders = [runs / "coverage", tmp_path / "second"]
    for number, folder in enumerate(folders):
        score_run(folder, source, tmp_path / f"{number}.parquet", CONFIG)
    out = tmp_path / "mean.parquet"
    score_run(folders[0], source, out, CONFIG, replicates=folders[1:])
    first, second, mean = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in (0, 1, "mean"))
    tracks = open_run(folders[0]).model.tracks.names
    assert not np.allclose(first[tracks], second[tracks], rtol=1e-2)
    np.testing.assert_allclose(mean[tracks], (first[tracks] + second[tracks]) / 2, rtol=1e-4, atol=1e-6)
    pd.testing.assert_frame_equal(mean.drop(columns=tracks), first.drop(columns=tracks))
    with pytest.raises(ConfigError, match="a replicate differs from the first run in") as error:
        score_run(folders[0], source, tmp_path / "x.parquet", CONFIG, replicates=[runs / "intervals"])
    assert "['windows and bins', 'tracks']" in str(error.value)


def in_parts_of_four(runs: Path, source: Path, out: Path, *, resume: bool = False) -> None:
    """A scoring in eleven parts."""
    run = open_run(runs / "coverage")
    assert run.dataset.genome is not None
    layout = Layout(WINDOW, BINS, BIN_SIZE, run.model.tracks, run.dataset.genome)
    tables.score_vcf(run.model, layout, CONFIG, source, out, identity={"run": "a"}, resume=resume, chunk=4)


@pytest.mark.parametrize("suffix", ["parquet", "vcf.gz"])
def test_a_killed_scoring_goes_on(suffix: str, runs: Path, source: Path, tmp_path: Path) -> None:
    """kill -9 with some parts written; the rest is computed, and the file is byte for byte that of a quiet run."""
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"
    in_parts_of_four(runs, source, whole)
    parts = tmp_path / f"out.{suffix}.parts"
    started = multiprocessing.get_context("fork").Process(target=in_parts_of_four, args=(runs, source, out))
    started.start()
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.parquet"))) < 2 and started.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert started.pid is not None
    os.kill(started.pid, signal.SIGKILL)
    started.join()
    assert started.exitcode == -signal.SIGKILL, "it ended before it was killed"
    assert 2 <= len(list(parts.glob("*.parquet"))) < 11
    assert not out.exists()
    (parts / "000010.part").write_text("what a kill leaves")
    kept = tmp_path / "kept"
    os.link(parts / "000000.parquet", kept)
    inode = kept.stat().st_ino
    in_parts_of_four(runs, source, out, resume=True)
    assert (kept.stat().st_ino, kept.stat().st_nlink) == (inode, 1)
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_what_was_scored_is_not_scored_again(
    runs: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    interrupted(runs, source, out, monkeypatch)
    monkeypatch.setattr(tables, "LARGEST_CHUNK", 16)
    seen: list[int] = []
    call = VariantScorer.__call__

    def counted(self: VariantScorer, variants: list[Variant]) -> Any:
        seen.append(len(variants))
        return call(self, variants)

    monkeypatch.setattr(VariantScorer, "__call__", counted)
    score_run(runs / "coverage", source, out, CONFIG, resume=True)
    assert seen == [16, 9]


def interrupted(runs: Path, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scoring that stops after its first part of sixteen variants."""
    write = tables.Parts.write

    def stop(self: tables.Parts, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(tables.Parts, "write", stop)
        patched.setattr(tables, "LARGEST_CHUNK", 16)
        with pytest.raises(KeyboardInterrupt):
            score_run(runs / "coverage", source, out, CONFIG)


def test_resuming_something_else(runs: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.parquet"
    interrupted(runs, source, out, monkeypatch)
    monkeypatch.setattr(tables, "LARGEST_CHUNK", 16)
    with pytest.raises(
        RunError, match=r"An interrupted scoring is in the way.*--resume, or remove .*out.parquet.parts"
    ):
        score_run(runs / "coverage", source, out, CONFIG)
    other = tmp_path / "other.vcf"
    other.write_text(source.read_text() + "\n")
    copy = tmp_path / "run"
    shutil.copytree(runs / "coverage", copy)
    saved = json.loads((copy / "adapter" / "adapter.json").read_text())
    (copy / "adapter" / "adapter.json").write_text(json.dumps(saved, indent=4))
    for changed, call in (
        ("settings", (runs / "coverage", source, out, replace(CONFIG, stitch=True))),
        ("VCF", (runs / "coverage", other, out, CONFIG)),
        ("run", (copy, source, out, CONFIG)),
    ):
        with pytest.raises(RunError, match=rf"differs in {changed}: .*Resume it as it was started, or remove"):
            score_run(*call, resume=True)
    with pytest.raises(RunError, match="differs in shard"):
        score_run(runs / "coverage", source, out, CONFIG, resume=True, shard=(1, 2))
    (tmp_path / "out.parquet.parts" / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="The manifest cannot be read"):
        score_run(runs / "coverage", source, out, CONFIG, resume=True)


def test_resuming_with_another_batch_size(
    runs: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a card ran out of memory, say; and a kill just before the parts are removed is no obstacle."""
    out = tmp_path / "out.parquet"
    interrupted(runs, source, out, monkeypatch)
    monkeypatch.setattr(tables, "LARGEST_CHUNK", 16)

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            score_run(runs / "coverage", source, out, replace(CONFIG, batch_size=5), resume=True)
    assert out.exists()
    score_run(runs / "coverage", source, out, CONFIG, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.vcf", "out.parquet", "out.skipped.tsv"]
    assert len(pd.read_parquet(out)) == 82


def _with_a_full_disk(*arguments: Any) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    try:
        in_parts_of_four(*arguments)
    except RunError as error:
        os._exit(5 if "Free some disk space" in str(error) else 1)


def test_a_full_disk(runs: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    process = multiprocessing.get_context("fork").Process(target=_with_a_full_disk, args=(runs, source, out))
    process.start()
    process.join()
    assert process.exitcode == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.vcf", "out.skipped.tsv"]


# Labels


def test_labels_of_intervals(runs: Path, tmp_path: Path) -> None:
    """The window is centred on the variant; the score is the change of the probability."""
    run = open_run(runs / "intervals")
    text = letters(run)
    variants = mixed(text, 8)
    path = vcf(
        tmp_path / "in.vcf", [(v.chrom, v.position, v.ref, v.alt) for v in variants if len(v.ref) < 32 > len(v.alt)]
    )
    score_run(runs / "intervals", path, tmp_path / "out.parquet")
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert table["scorer"].unique().tolist() == ["difference"]
    for row in table.itertuples():
        variant = Variant(row.chrom, row.position, row.ref, row.alt)  # type: ignore[arg-type]
        start = variant.position - 1 - 63
        ref, alt = window_of(text, start, 128), slow_alternate(text, variant, start, 128)
        change = predicted(run, alt)[:, 0] - predicted(run, ref)[:, 0]
        np.testing.assert_allclose([row.open, row.closed], change, rtol=1e-3, atol=1e-6)
    assert table[["open", "closed"]].abs().to_numpy().max() > 1e-4
    with pytest.raises(ConfigError, match="a label has no bins to choose from"):
        score_run(runs / "intervals", path, tmp_path / "b.parquet", VariantConfig(over=CENTRE))


def test_labels_of_sequences_have_no_place(runs: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sequences without a window of a genome.*genome, interval and window"):
        score_run(runs / "sequences", source, tmp_path / "out.parquet")


def test_a_track_with_the_name_of_a_column() -> None:
    with pytest.raises(ConfigError, match=r"name of another column of the table: \['alt'\]"):
        tables.Table(("difference",), (), ("alt", "b"))


# The command


def seqgraft(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    from seqgraft.__main__ import main

    monkeypatch.setattr(sys, "argv", ["seqgraft", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_command(
    runs: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "variants.yaml"
    config.write_text(yaml.safe_dump({"scorers": ["difference"], "over": {"kind": "centre", "width": 48}}))
    call = ["variants", runs / "coverage", source, tmp_path / "a.parquet", "--config", config]
    assert seqgraft(monkeypatch, *call, "--set", "ensemble.reverse_complement=true") == 0
    shown = capsys.readouterr().out
    assert "41 variants were scored" in shown
    assert re.search(r"In \d+ of 41 rows the window reaches beyond its contig", shown)
    assert set(pd.read_parquet(tmp_path / "a.parquet")["scorer"]) == {"difference"}
    assert seqgraft(monkeypatch, "variants", runs / "coverage", source, tmp_path / "b.vcf.gz", "--shard", "2/2",
                    "--set", "over.kind=centre", "--set", "over.width=48") == 0  # fmt: skip
    for arguments, code, words in (
        (["--shard", "0/3"], 2, "'0/3'"),
        (["--shard", "4/3"], 2, "Write 1/16"),
        (["--set", "scorer=x"], 2, "Did you mean 'scorers'"),
        (["--config", tmp_path / "none.yaml"], 2, "does not exist"),
        (["--set", "over={kind: centre, width: 200}"], 2, "Give at most 112 bp"),
    ):
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        assert seqgraft(monkeypatch, "variants", runs / "coverage", source, tmp_path / "c.parquet", *arguments) == code
        assert words in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before
    for vcf_file, name, code, words in (
        (source, "c.csv", 2, ".parquet or .vcf.gz"),
        (tmp_path / "none.vcf", "c.parquet", 3, "does not exist"),
        (runs / "coverage" / "log.csv", "c.parquet", 3, "cannot be read"),
        (source, "none.txt/c.parquet", 5, "could not be written"),
    ):
        (tmp_path / "none.txt").write_text("")
        before = sorted(tmp_path.iterdir())
        call = ["variants", runs / "coverage", vcf_file, tmp_path / name, "--config", config]
        assert seqgraft(monkeypatch, *call) == code
        assert words in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python and its commands, in order, in one folder."""
    monkeypatch.chdir(tmp_path)
    names = run_guide("variants")
    effects, truth = names["effects"], names["truth"]
    assert pd.read_parquet("again.parquet").equals(effects)
    assert set(effects["id"]) == set(truth.index)
