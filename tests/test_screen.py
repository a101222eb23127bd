"""First-order scores of all SNVs: the formula, the pieces, what is written, and how agreement is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from builders import settled_trunk, track_table
from seqgraft.data.augment import Augmentation
from seqgraft.errors import ConfigError, DataError, ModelError, RunError
from seqgraft.genome import Genome, Variant
from seqgraft.models.base import Head, SequenceModel
from seqgraft.models.wrap import ModuleSpec, wrap
from seqgraft.sample import Sample
from seqgraft.sequence import encode
from seqgraft.tracks import TrackTable, unsquash
from seqgraft.variants import Layout, ScreenConfig
from seqgraft.variants.screen import Gradients, _agreement, _OverPieces, cut, screen

WINDOW, BINS, BIN = 256, 12, 16
LENGTH = 6000
ROUND = Augmentation(True, 1)


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    fasta = tmp_path_factory.mktemp("genome") / "g.fa"
    letters = np.random.default_rng(0).choice(list("ACGT"), LENGTH)
    letters[2000:2010] = "N"
    fasta.write_text(f">chr1\n{''.join(letters)}\n>chr2\n{'ACGT' * 100}\n")
    return Genome.open(fasta)


def model_of(trunk: Any, tracks: TrackTable) -> SequenceModel:
    torch.manual_seed(1)
    heads = {g: Head(tracks.select([tracks.names[i] for i in at]), trunk.spec.channels)
             for g, at in tracks.groups.items()}  # fmt: skip
    return SequenceModel(trunk, heads, tracks).eval()


@pytest.fixture(scope="module")
def layout(genome: Genome) -> Layout:
    return Layout(WINDOW, BINS, BIN, track_table(["rna+", "rna-", "atac"], squash="sqrt", soft_clip=1.0), genome)


@pytest.fixture(scope="module")
def model(layout: Layout) -> SequenceModel:
    return model_of(settled_trunk(), layout.tracks)


def regions(*rows: tuple[str, int, int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["chrom", "start", "end"])


def exact(model: SequenceModel, layout: Layout, config: ScreenConfig, pieces: Any, variants: list[Variant]) -> Any:
    """Group means ``(variants, groups)`` from plain predictions of whole windows."""
    found = []
    for variant in variants:
        (site,) = _OverPieces(pieces).sites(layout)(variant)
        sums = []
        for base in (variant.ref, variant.alt):
            values = []
            for view in config.ensemble.views():
                start = site.start + view.shift
                at = np.arange(start, start + WINDOW)
                codes = np.full(WINDOW, 4, np.uint8)
                known = (at >= 0) & (at < layout.genome.chroms[variant.chrom])
                codes[known] = np.asarray(layout.genome.chrom_codes(variant.chrom))[at[known]]
                codes[variant.position - 1 - start] = encode(base)[0]
                codes = (np.where(codes < 4, 3 - codes, codes)[::-1] if view.reverse else codes).copy()
                none = torch.zeros((1, 0, 0))
                sample = Sample(
                    torch.from_numpy(codes)[None], torch.tensor([WINDOW]), torch.zeros(1), none, none.bool()
                )
                with torch.inference_mode():
                    raw = unsquash(model.predict(sample)[0].double().numpy(), layout.tracks, BIN)
                values.append(raw[layout.tracks.permutation, ::-1] if view.reverse else raw)
            sums.append((np.mean(values, 0)[:, slice(*site.bins)] * site.weights).sum(1))
        score = sums[1] - sums[0] if config.score == "difference" else np.log2((sums[1] + 1) / (sums[0] + 1))
        found.append([score[index].mean() for index in layout.tracks.groups.values()])
    return np.array(found)


@pytest.mark.parametrize("views", [Augmentation(False), ROUND], ids=["forward", "all"])
def test_a_linear_model_is_exact(views: Augmentation, genome: Genome) -> None:
    """Where effects add up, the first-order difference is the difference, over both strands and shifts."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(4, 6, 9, padding=4), nn.AvgPool1d(BIN))
    nn.init.normal_(module[0].weight)  # type: ignore[arg-type]
    spec = ModuleSpec("linear", channels=6, bin_size=BIN)
    tracks = track_table(["rna+", "rna-", "atac"], link="identity")
    layout = Layout(WINDOW, WINDOW // BIN, BIN, tracks, genome)
    model = model_of(wrap(module, spec), tracks)
    config = ScreenConfig("difference", ensemble=views, width=40)
    pieces = cut(regions(("chr1", 1000, 1077), ("chr1", 0, 9)), layout, 40)
    found = Gradients(model, layout, config)(pieces)
    letters = "ACGT"
    for piece, (codes, scores) in zip(pieces, found, strict=True):
        for offset in range(0, piece.end - piece.start, 5):
            ref = letters[codes[offset]]
            variants = [Variant(piece.chrom, piece.start + offset + 1, ref, alt) for alt in letters if alt != ref]
            wanted = exact(model, layout, config, pieces, variants)
            columns = [letters.index(v.alt) for v in variants]
            np.testing.assert_allclose(scores[:, offset, columns].T, wanted, rtol=1e-3, atol=1e-4)
            assert not scores[:, offset, codes[offset]].any()
    assert np.abs(found[1][1]).max() > 0.1


def test_the_fold_change_is_the_difference_over_the_sum(model: SequenceModel, layout: Layout) -> None:
    """d log2(S + p) = dS / ((S + p) ln 2), in a group of one track; N has no SNVs and changes nothing."""
    pieces = cut(regions(("chr1", 1990, 2020)), layout, 512)
    (codes, change), = Gradients(model, layout, ScreenConfig("difference"))(pieces)  # fmt: skip
    (_, fold), = Gradients(model, layout, ScreenConfig(pseudocount=0.5))(pieces)  # fmt: skip
    values = unsquash(predicted(model, layout, pieces[0].site.start), layout.tracks, BIN)
    total = values[2, slice(*pieces[0].site.bins)].sum()
    np.testing.assert_allclose(fold[1], change[1] / ((total + 0.5) * np.log(2)), rtol=1e-3, atol=1e-7)
    assert (codes[10:20] == 4).all()


def predicted(model: SequenceModel, layout: Layout, start: int) -> Any:
    codes = torch.from_numpy(np.asarray(layout.genome.chrom_codes("chr1"))[start : start + WINDOW].copy())[None]
    none = torch.zeros((1, 0, 0))
    with torch.inference_mode():
        return (
            model.predict(Sample(codes, torch.tensor([WINDOW]), torch.zeros(1), none, none.bool()))[0].double().numpy()
        )


def test_first_order_of_a_small_step(model: SequenceModel, layout: Layout) -> None:
    """Along the line from one base to another the values change as the score says, where the step is small."""
    config = ScreenConfig(width=64)
    (piece,) = cut(regions(("chr1", 3000, 3050)), layout, 64)
    gradients = Gradients(model, layout, config)
    (codes, scores), = gradients([piece])  # fmt: skip
    window = np.asarray(layout.genome.chrom_codes("chr1"))[piece.site.start : piece.site.start + WINDOW].copy()[None]
    one_hot = torch.from_numpy(np.eye(5, dtype=np.float32)[window][:, :, :4]).transpose(1, 2)
    offset, alt = (int(i) for i in np.unravel_index(np.abs(scores).min(0).argmax(), scores.shape[1:]))
    at, ref, steps = piece.start - piece.site.start + offset, int(codes[offset]), []
    encoded = model.trunk.encode
    for step in (-0.02, 0.02):
        moved = one_hot.clone()
        moved[0, ref, at] -= step
        moved[0, alt, at] += step
        model.trunk.encode = lambda *_, x=moved: replace(encoded(torch.from_numpy(window)), x=x)  # type: ignore[method-assign]
        with torch.no_grad():
            steps.append(gradients._values(moved, window, [piece]).numpy()[0])
    del model.trunk.encode
    np.testing.assert_allclose((steps[1] - steps[0]) / 0.04, scores[:, offset, alt], rtol=0.05)


def test_pieces(layout: Layout) -> None:
    pieces = cut(regions(("chr1", 100, 700), ("chr1", 650, 800), ("chr1", 5990, 6100), ("chr2", 0, 10)), layout, 150)
    assert all(p.end - p.start <= 150 for p in pieces)
    first = [base for p in pieces if p.chrom == "chr1" for base in range(p.start, p.end)]
    assert first == [*range(100, 800), *range(5990, 6000)]  # each base once, and none beyond the contig
    for p in pieces:
        left = p.site.start + layout.margin + p.site.bins[0] * BIN
        right = p.site.start + layout.margin + p.site.bins[1] * BIN
        assert left <= p.start < left + BIN
        assert right - BIN < p.end <= right
    assert [p.end - p.start for p in cut(regions(("chr1", 0, 300)), layout, 10**6)] == [150, 150]  # 192 bp at most


def test_a_screen(model: SequenceModel, layout: Layout, tmp_path: Path) -> None:
    """All SNVs in order; the largest and the sample have the exact scores of the plain way."""
    bed = tmp_path / "r.bed"
    bed.write_text("chr1\t900\t1300\nchr1\t1995\t2015\nchr2\t100\t160\n")
    config = ScreenConfig(width=100, top=12, sample=60, ensemble=Augmentation(True))
    found = screen(model, layout, config, bed, tmp_path / "s.parquet")
    table = pd.read_parquet(tmp_path / "s.parquet")
    assert (found.snvs, found.unknown, found.windows) == (3 * 470, 10, 6)
    assert len(table) == found.snvs
    assert list(table.columns) == ["chrom", "position", "ref", "alt", "rna", "atac"]
    text = {chrom: np.array(list("ACGTN"))[layout.genome.chrom_codes(chrom)] for chrom in layout.genome.chroms}
    assert all(
        text[chrom][at - 1] == ref for chrom, at, ref in zip(table.chrom, table.position, table.ref, strict=True)
    )
    assert not table.duplicated(["chrom", "position", "alt"]).any()
    assert not (table.ref == table.alt).any()
    chosen = pd.read_parquet(found.files[1])
    assert (chosen["drawn"] == "random").sum() == 60
    for group in ("rna", "atac"):
        wanted = table.assign(size=table[group].abs()).nlargest(12, "size")
        given = chosen[chosen["drawn"] == group]
        assert set(zip(given.position, given.alt, strict=True)) == set(zip(wanted.position, wanted.alt, strict=True))
    pieces = cut(regions(("chr1", 900, 1300), ("chr1", 1995, 2015), ("chr2", 100, 160)), layout, 100)
    few = chosen.iloc[::6]
    variants = [Variant(*row) for row in few[["chrom", "position", "ref", "alt"]].itertuples(index=False)]
    np.testing.assert_allclose(
        few[["rna_exact", "atac_exact"]], exact(model, layout, config, pieces, variants), rtol=1e-3, atol=1e-5
    )
    merged = chosen.merge(table, on=["chrom", "position", "ref", "alt"], suffixes=("", "_all"))
    np.testing.assert_array_equal(merged["rna"], merged["rna_all"])
    sample = chosen[chosen["drawn"] == "random"]
    row = found.agreement.set_index("group").loc["atac"]
    assert row["spearman"] == pytest.approx(sample["atac"].corr(sample["atac_exact"], method="spearman"))
    assert row["low"] <= row["spearman"] <= row["high"]
    assert row["spearman"] > 0.2  # measured, of random weights: 0.45
    notes = pq.read_metadata(found.files[0]).metadata
    assert json.loads(notes[b"seqgraft.agreement"])[1]["spearman"] == pytest.approx(row["spearman"])
    again = screen(model, layout, config, bed, tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(again.files[1]), chosen)
    with pytest.raises(RunError, match="exists already"):
        screen(model, layout, config, bed, tmp_path / "s.parquet")


def test_recall_and_intervals() -> None:
    rng = np.random.default_rng(0)
    exact_scores = rng.normal(size=200).astype(np.float32)
    drawn, piece = np.array(["random"] * 200), np.arange(200) // 10
    same = _agreement(exact_scores, exact_scores, piece, drawn, "g")
    assert (same["spearman"], same["recall"], same["n"]) == (1, 1, 200)
    noise = rng.normal(size=200).astype(np.float32)
    other = _agreement(noise, exact_scores, piece, drawn, "g")
    assert other["recall"] < 0.5
    assert other["low"] < 0 < other["high"]
    flipped = _agreement(-exact_scores, exact_scores, piece, drawn, "g")
    assert (flipped["spearman"], flipped["recall"]) == (pytest.approx(-1), 1)


def test_what_cannot_be_screened(model: SequenceModel, layout: Layout, tmp_path: Path) -> None:
    bed = tmp_path / "r.bed"
    bed.write_text("chr1\t2000\t2010\n")
    with pytest.raises(DataError, match="no known base"):
        screen(model, layout, ScreenConfig(), bed, tmp_path / "s.parquet")
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "s.parquet").exists()
    bed.write_text("chr1\t100\t200\nchr1\t5900\t6010\n")
    with pytest.raises(DataError, match="reaches beyond its chromosome: 'chr1:5900-6010'"):
        screen(model, layout, ScreenConfig(), bed, tmp_path / "s.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["r.bed"]
    with pytest.raises(ConfigError, match=r"End its name in \.parquet"):
        screen(model, layout, ScreenConfig(), bed, tmp_path / "s.csv")
    encoded = model.trunk.encode
    model.trunk.encode = lambda codes, lengths=None: replace(encoded(codes), x=2 * encoded(codes).x)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="does not start from one-hot"):
        Gradients(model, layout, ScreenConfig())(cut(regions(("chr1", 0, 9)), layout, 9))
    del model.trunk.encode
    for wrong in ({"width": 0}, {"top": -1}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            ScreenConfig(**wrong)
