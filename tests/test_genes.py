"""Gene signal, specificity and fold changes, against counting base by base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from seqgraft.errors import ConfigError, DataError
from seqgraft.genes import (
    GeneSettings,
    expressed,
    fold_change,
    fold_change_ceiling,
    fold_change_scores,
    gene_bins,
    gene_scores,
    gene_signal,
    read_fold_changes,
    rest_of_merged,
    signal_table,
)
from seqgraft.genome import read_gtf
from seqgraft.tracks import TrackTable, open_bigwig, read_chrom

BIN, BINS = 10, 20


def exon_table(rows: list[tuple[str, str, int, int]], chrom: str = "c") -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["gene_id", "strand", "start", "end"])
    return frame.assign(chrom=chrom, gene_name=frame["gene_id"].str.upper())


def region_table(starts: list[int], chrom: str = "c") -> pd.DataFrame:
    return pd.DataFrame({"chrom": chrom, "start": starts, "end": np.array(starts) + BIN * BINS})


def stranded(**columns: object) -> TrackTable:
    return TrackTable.build(
        [{"name": f"{c}_{s}", "condition": c, **columns} for c in ("heat", "cold") for s in ("minus", "plus")]
    )


def binned(bases: np.ndarray, regions: pd.DataFrame) -> np.ndarray:
    """Bins (regions, tracks, bins) of base-resolution tracks (tracks, length)."""
    cut = [bases[:, start : start + BIN * BINS].reshape(len(bases), BINS, BIN).sum(-1) for start in regions["start"]]
    return np.stack(cut)


def test_bins_cover_exons_once_whatever_the_regions_overlap() -> None:
    rng = np.random.default_rng(0)
    exons = exon_table([("a", "+", 100, 130), ("a", "+", 120, 170), ("a", "+", 340, 350), ("b", "-", 210, 420)])
    bases = np.repeat(rng.random((4, 60)), BIN, axis=1)  # flat within bins, so that fractions are exact
    for starts in ([0, 200, 400], [400, 0, 150, 200, 200, 260], [0, 190, 350]):
        regions = region_table(starts)
        found = gene_bins(exons, regions, BINS, BIN)
        assert found.genes["length"].tolist() == [80, 210]
        assert found.genes["covered"].tolist() == [1, 1]
        assert found.fraction.max() <= 1
        assert found.fraction.sum() == pytest.approx(29)
        signal = gene_signal(found, binned(bases, regions), signal_table(stranded()))
        plus, minus = bases[[1, 3]], bases[[0, 2]]
        assert signal.loc["a"].to_numpy() == pytest.approx(plus[:, np.r_[100:170, 340:350]].sum(1))
        assert signal.loc["b"].to_numpy() == pytest.approx(minus[:, 210:420].sum(1))
    assert found.of("b")[0] == (1, 2, 1.0)


def test_shared_partly_covered_and_scattered_genes_are_listed() -> None:
    exons = exon_table(
        [
            *(("a", "+", 0, 100), ("b", "+", 90, 160), ("c", "-", 50, 150), ("inside", "+", 10, 30)),
            *(("edge", "+", 180, 230), ("far", "+", 900, 950)),
        ]
    )
    two = pd.concat([exons, exon_table([("c2", "+", 0, 5)]), exon_table([("c2", "+", 0, 5)], "d")])
    found = gene_bins(two, region_table([0]), BINS, BIN)
    assert dict(zip(found.genes["gene_id"], found.genes["length"], strict=True)) == {"a": 70, "b": 60, "c": 100}
    assert dict(found.skipped.to_numpy().tolist()) == {
        "c2": "several chromosomes or strands",
        "inside": "shared with other genes of its strand",
        "edge": "less than 95% in the regions",
        "far": "outside the regions",
    }
    half = gene_bins(exons, region_table([0]), BINS, BIN, GeneSettings(min_covered=0.3))
    assert half.genes.set_index("gene_id").loc["edge", "covered"] == pytest.approx(0.4)
    bases = np.ones((2, 200))
    signal = gene_signal(
        half, binned(bases, region_table([0])), signal_table(stranded().select(["heat_minus", "heat_plus"]))
    )
    assert signal.loc["edge", "heat"] == pytest.approx(50)  # the density of the covered part, over the whole gene
    with pytest.raises(DataError, match=r"no gene lies in the regions.*tile the genes"):
        gene_bins(exon_table([("a", "+", 0, 100)], "other"), region_table([0]), BINS, BIN)
    with pytest.raises(DataError, match="not all 20 bins of 5 bp"):
        gene_bins(exons, region_table([0]), BINS, 5)


def test_start_windows_follow_the_strand() -> None:
    exons = exon_table([("a", "+", 50, 70), ("a", "+", 80, 90), ("b", "-", 100, 150)])
    found = gene_bins(exons, region_table([0]), BINS, BIN, GeneSettings(around="start", upstream=20, downstream=10))
    assert found.of("a") == [(0, 3, 1), (0, 4, 1), (0, 5, 1)]
    assert found.of("b") == [(0, 14, 1), (0, 15, 1), (0, 16, 1)]


def test_missing_bins_take_the_density_of_the_gene() -> None:
    exons = exon_table([("a", "+", 0, 200), ("b", "-", 0, 200)])
    tracks = TrackTable.build([{"name": "x"}])
    found, raw = gene_bins(exons, region_table([0]), BINS, BIN), np.full((1, 1, BINS), 2.0)
    raw[0, 0, 3] = np.nan
    assert gene_signal(found, raw, signal_table(tracks))["x"].tolist() == pytest.approx([40, 40])
    valid = np.isfinite(raw)
    assert gene_signal(found, np.nan_to_num(raw, nan=9.0), signal_table(tracks), valid)["x"].tolist() == pytest.approx(
        [40, 40]
    )
    valid[..., :4] = False
    assert gene_signal(found, raw, signal_table(tracks), valid)["x"].isna().all()


def test_signals_pair_strands_in_any_order_and_scale_by_depth() -> None:
    table = signal_table(stranded(depth=250.0))
    assert table["name"].tolist() == ["heat", "cold"]
    assert table["plus"].tolist() == [1, 3]
    assert table["depth"].tolist() == [500.0, 500.0]
    found = gene_bins(exon_table([("a", "+", 0, 10)]), region_table([0]), BINS, BIN)
    assert gene_signal(found, np.ones((1, 4, BINS)), table)["heat"].tolist() == [1e6 / 500]
    with pytest.raises(DataError, match="have no depth while others do"):
        gene_signal(found, np.ones((1, 4, BINS)), table.assign(depth=[1.0, np.nan]))
    odd = TrackTable.build([{"name": "w", "strand_pair": "c"}, {"name": "c", "strand_pair": "w"}])
    with pytest.raises(DataError, match="which strand is which"):
        signal_table(odd)


def simulated(noise: float = 0.3, genes: int = 400) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, TrackTable]:
    rng = np.random.default_rng(1)
    names = [f"{condition}{replicate}" for condition in ("heat", "cold") for replicate in (1, 2)]
    tracks = TrackTable.build([{"name": n, "condition": n[:-1], "replicate": n[-1], "group": "rna"} for n in names])
    level, change = rng.normal(6, 2, (genes, 1)), rng.normal(0, 1, (genes, 1))
    log = level + change * np.array([0.5, 0.5, -0.5, -0.5])
    index = pd.Index([f"g{number}" for number in range(genes)], name="gene_id")
    frames = [pd.DataFrame(2 ** (log + noise * rng.normal(size=log.shape)), index, names) for _ in range(2)]
    return frames[0], frames[1], pd.DataFrame(change, index, ["change"]), tracks


def test_levels_specificity_and_fold_change() -> None:
    observed, predicted, change, tracks = simulated()
    signals = signal_table(tracks)
    scores = gene_scores(observed, predicted, signals, draws=100).set_index(["level", "metric", "track"])
    assert scores.loc[("genes", "pearson", "heat1"), "value"] > 0.95
    specific = scores.loc["genes_specific"]
    assert (specific["value"] > 0.5).all()
    assert (specific["low"] < specific["value"]).all()
    level_only = observed.mean(axis=1).to_frame("m")[["m"] * 4].set_axis(observed.columns, axis=1)
    flat = gene_scores(observed, level_only, signals, draws=10).set_index(["level", "metric", "track"])
    assert flat.loc[("genes", "pearson", "heat1"), "value"] > 0.9
    assert flat.loc[("genes_specific", "pearson", "heat1"), "reason"] == "constant prediction"

    settings = GeneSettings(pseudocount=0.01)
    true, pred = (fold_change(frame, signals, "heat", "cold", settings) for frame in (observed, predicted))
    assert true.name == "heat/cold"
    assert np.corrcoef(true, change["change"])[0, 1] > 0.9
    kept = expressed(observed, signals, ("heat", "cold"), GeneSettings(min_expression=32.0))
    assert 0 < kept.sum() < len(kept)
    table = fold_change_scores(true[kept], pred, draws=100)
    assert table["metric"].tolist() == ["pearson", "spearman"]
    assert table["count"].tolist() == [kept.sum()] * 2
    assert (table["value"] > 0.8).all()
    with pytest.raises(DataError, match=r"no track has the condition.*\('cold', '1'\)"):
        fold_change(observed, signals, "heat", "warm")
    with pytest.raises(DataError, match="no gene in common"):
        fold_change_scores(true.rename(lambda gene: gene + ".1"), pred)


def test_ceiling_bounds_a_perfect_prediction() -> None:
    observed, _, change, tracks = simulated(noise=0.7, genes=4000)
    signals, settings = signal_table(tracks), GeneSettings(pseudocount=1e-6)
    one, two = (fold_change(observed, signals, "heat", "cold", settings, [replicate]) for replicate in "12")
    ceiling = fold_change_ceiling(one, two)
    assert ceiling.genes == 4000
    assert ceiling.replicates < ceiling.reliability < ceiling.perfect < 1
    merged = (one + two) / 2
    assert np.corrcoef(merged, change["change"])[0, 1] == pytest.approx(ceiling.perfect, abs=0.01)


def test_rest_of_merged() -> None:
    assert rest_of_merged(np.array([3.0, 5.0]), np.array([1.0, 5.0])).tolist() == [2, 0]
    with pytest.raises(DataError, match=r"50\.00%"):
        rest_of_merged(np.array([3.0, 5.0]), np.array([4.0, 5.0]))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deseq2.csv", '"","baseMean","log2FoldChange","padj"\n"g1",10,1.5,0.1\n"g2",0,NA,NA\n"g3",4,-2,0.5\n'),
        ("edger.tsv", "logFC\tlogCPM\tPValue\ng1\t1.5\t3\t0.1\ng3\t-2\t4\t0.5\n"),
        ("named.txt", "padj\tgene_id\tlogFC\n0.1\tg1\t1.5\n0.2\tg3\t-2\n"),
    ],
)
def test_tables_of_deseq2_and_edger(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    changes = read_fold_changes(tmp_path / name)
    assert changes.to_dict() == {"g1": 1.5, "g3": -2.0}
    assert changes.index.name == "gene_id"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene,fc\na,1\n", "no column of fold changes"),
        ("gene,logFC\na,1\na,2\n", "listed more than once: 'a'"),
        ("gene,logFC\na,\n", "no gene has a fold change"),
    ],
)
def test_bad_fold_change_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_fold_changes(tmp_path / "x.csv")
    with pytest.raises(DataError, match="does not exist"):
        read_fold_changes(tmp_path / "absent.csv")


def test_bad_settings() -> None:
    for settings in ({"around": "middle"}, {"min_covered": 0}, {"pseudocount": 0}):
        with pytest.raises(ConfigError, match="genes"):
            GeneSettings(**settings)
    with pytest.raises(ConfigError, match="is empty"):
        GeneSettings(around="start", upstream=0, downstream=0)


def test_diamide_fold_change_of_held_out_yeast_genes(shared: Path) -> None:
    """Replicate 1 against the rest of the merged STRIPE-seq counts, over genes of two chromosomes."""
    yeast, size = shared / "data/yeast", 16
    roman = {"XIV": "chrXIV", "XVI": "chrXVI"}
    exons = read_gtf(yeast / "Saccharomyces_cerevisiae.R64-1-1.81.gtf.gz", rename=roman)
    exons = exons[exons["chrom"].isin(list(roman.values()))]
    names = [f"stripe_{c}{r}_{s}" for c in ("ypd", "diamide") for r in ("", "_rep1") for s in ("plus", "minus")]
    merged, first, regions = [], [], []
    for chrom in roman.values():
        bases = []
        for name in names:
            path = yeast / f"tracks/{name}.bw"
            with open_bigwig(path) as reader:
                bases.append(read_chrom(reader, chrom, path))
        bins = np.stack(bases)[:, : len(bases[0]) // 2048 * 2048].reshape(8, -1, 128, size).sum(-1).transpose(1, 0, 2)
        merged.append(bins[:, [0, 1, 4, 5]])
        first.append(bins[:, [2, 3, 6, 7]])
        starts = np.arange(len(bins)) * 2048
        regions.append(pd.DataFrame({"chrom": chrom, "start": starts, "end": starts + 2048}))
    whole, one = np.concatenate(merged), np.concatenate(first)
    tracks = TrackTable.build(
        [{"name": n, "condition": n.split("_")[1], "depth": 1e6} for n in names if "rep1" not in n]
    )
    signals, settings = signal_table(tracks), GeneSettings(around="start", min_expression=10.0)
    found = gene_bins(exons, pd.concat(regions), 128, size, settings)
    assert len(found.genes) > 700
    parts = [gene_signal(found, part, signals) for part in (whole, one, rest_of_merged(whole, one))]
    kept = expressed(parts[0], signals, ("diamide", "ypd"), settings)
    changes = [fold_change(part[kept], signals, "diamide", "ypd", settings) for part in parts]
    ceiling = fold_change_ceiling(changes[1], changes[2])
    assert ceiling.genes > 300
    assert 0.6 < ceiling.replicates < ceiling.reliability < 0.98


def test_marker_genes_are_those_that_one_condition_has_most_of() -> None:
    rng = np.random.default_rng(3)
    tracks = TrackTable.build([{"name": name, "condition": name[0]} for name in ("a1", "a2", "b1", "c1")])
    genes = pd.Index([f"g{i}" for i in range(4000)], name="gene_id")
    base = 2 ** rng.uniform(4, 8, (4000, 1)) * 2 ** rng.normal(0, 0.05, (4000, 4))
    base[:60, :2] *= 8  # 60 genes of a, of which 50 count; 20 of b, 2 of which hardly differ; c has none
    base[60:78, 2] *= 16
    base[78:80, 2] *= 1.5
    observed = pd.DataFrame(base, index=genes, columns=pd.Index(tracks.names))
    predicted = observed.copy()
    predicted.iloc[:80] = predicted.iloc[:80].to_numpy()[:, [3, 3, 3, 3]]  # knows of no marker gene
    scores = gene_scores(observed, predicted, signal_table(tracks), draws=10).set_index(["level", "metric", "track"])
    markers = scores.loc["genes_marker"].loc["pearson"]
    assert markers["count"].unique().tolist() == [50 + 18]
    assert markers["value"].max() < 0.3
    same = gene_scores(observed, observed, signal_table(tracks), draws=10).set_index("level")
    assert same.loc["genes_marker", "value"].min() == pytest.approx(1)
    alone = signal_table(TrackTable.build([{"name": name} for name in tracks.names]))
    assert "genes_marker" not in set(gene_scores(observed, observed, alone, draws=10)["level"])
