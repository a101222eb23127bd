"""Scorers, what they read, merged strands, and parity with Baskerville's scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

from builders import settled_trunk, track_table
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import DatasetInfo
from seqgraft.errors import ConfigError, DataError
from seqgraft.experiment import build, settings_of
from seqgraft.genome import Genome, Variant
from seqgraft.models.base import Head, SequenceModel
from seqgraft.models.baskerville import convert_baskerville
from seqgraft.models.weights import ModelConfig, build_pretrained
from seqgraft.tracks import TrackTable
from seqgraft.variants import SCORERS, Layout, VariantConfig, VariantScorer
from seqgraft.variants.over import Genes, Regions, Window
from seqgraft.variants.scorers import Baskerville, effects, scaled

FORMATS = Path(__file__).resolve().parents[1] / "docs" / "formats.md"
WINDOW, BINS, BIN = 256, 12, 16
MARGIN = (WINDOW - BINS * BIN) // 2
Array = np.ndarray[Any, np.dtype[np.float64]]


# Formulas


def plain(kind: str, r: Array, a: Array) -> float:
    """One track, all bins, as the formulas are published."""
    match kind:
        case "log2_fold_change":
            return float(np.log2((a.sum() + 1) / (r.sum() + 1)))
        case "difference" | "SUM":
            return float(a.sum() - r.sum())
        case "l2" | "D2":
            return float(np.linalg.norm(a - r))
        case "max_abs":
            return float(np.abs(a - r).max())
        case "jensen_shannon":
            return float(jensenshannon(r, a, base=2) ** 2)
        case "logSED":
            return float(np.log2(a.sum() + 1) - np.log2(r.sum() + 1))
        case "SAX":
            return float((a - r)[np.argmax(np.abs(a - r))])
        case "D1":
            return float(np.abs(a - r).sum())
        case "JS":
            pseudocount = np.quantile(r, 0.25)
            p, q = ((v + pseudocount) / (v + pseudocount).sum() for v in (r, a))
            return float((rel_entr(p, q).sum() + rel_entr(q, p).sum()) / 2)
    start, rest = ("log", np.log2(r + 1)), ("log", np.log2(a + 1))
    if kind.startswith("sqrt"):
        start, rest = ("sqrt", np.sqrt(r)), ("sqrt", np.sqrt(a))
    return plain(kind.removeprefix(start[0]), start[1], rest[1])


@pytest.mark.parametrize("kind", SCORERS)
def test_formulas(kind: str) -> None:
    rng = np.random.default_rng(3)
    r, a = rng.gamma(1, 2, (2, 3, 2, 9))
    weights = torch.ones(3, 1, 9, dtype=torch.float64)
    found = SCORERS[kind]()(torch.from_numpy(r), torch.from_numpy(a), weights).numpy()
    wanted = [[plain(kind, r[i, j], a[i, j]) for j in range(2)] for i in range(3)]
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    weights[:, :, [0, 4]] = 0  # bins without weight do not count
    found = SCORERS[kind]()(torch.from_numpy(r), torch.from_numpy(a), weights).numpy()
    keep = [1, 2, 3, 5, 6, 7, 8]
    wanted = [[plain(kind, r[i, j, keep], a[i, j, keep]) for j in range(2)] for i in range(3)]
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_signs_and_parts_of_bins() -> None:
    """Half a weight is half a bin; SAX keeps the sign of the largest change."""
    r = torch.tensor([[4.0, 2.0, 8.0]]).double()
    a = torch.tensor([[2.0, 3.0, 6.0]]).double()
    half = torch.tensor([[0.5, 1.0, 0.5]]).double()
    assert SCORERS["difference"]()(r, a, half).item() == -1
    assert SCORERS["SAX"]()(r, a, torch.ones(1, 3).double()).item() == -2
    assert SCORERS["max_abs"]()(r, a, half).item() == 1
    assert SCORERS["l2"]()(r, a, half).item() == pytest.approx(np.sqrt(2 + 1 + 2))


@pytest.mark.parametrize(
    ("kind", "ref", "alt"),
    [
        ("jensen_shannon", [0, 0], [1, 1]),
        ("jensen_shannon", [1, 1], [0, 0]),
        ("JS", [0, 0], [1, 1]),
        ("JS", [0, 0], [0, 0]),
        ("JS", [0.0, 0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0, 1.0]),  # an infinite divergence
        ("log2_fold_change", [-3, -3], [1, 1]),
        ("log2_fold_change", [-3, -3], [-4, -3]),  # the ratio of the sums would be positive
        ("logSED", [-3, 1], [1, 1]),
        ("logSUM", [-3, 1], [1, 1]),
        ("sqrtD1", [-3, 1], [1, 1]),
    ],
)
def test_what_is_undefined_is_nan(kind: str, ref: list[float], alt: list[float]) -> None:
    values = [torch.tensor([v], dtype=torch.float64) for v in (ref, alt)]
    assert SCORERS[kind]()(*values, torch.ones(1, len(ref), dtype=torch.float64)).isnan().all()


def test_no_signal_and_no_change() -> None:
    zero, ones = torch.zeros(1, 4).double(), torch.ones(1, 4).double()
    for kind in set(SCORERS) - {"jensen_shannon", "JS"}:
        assert SCORERS[kind]()(zero, zero, ones).item() == 0
    assert SCORERS["jensen_shannon"]()(ones, 3 * ones, ones).item() == 0  # the shape alone


def test_units_of_baskerville() -> None:
    """The statistic of a track times its scale: neither the scale nor the mean is undone."""
    rows = [{"name": "a", "scale": 0.5}, {"name": "b", "statistic": "mean", "scale": 2.0, "squash": "sqrt"}]
    found = scaled(torch.full((2, 3), 64.0, dtype=torch.float64), TrackTable.build(rows), 32)
    assert found.tolist() == [[32.0] * 3, [4.0] * 3]


def test_names() -> None:
    text = FORMATS.read_text()
    for kind, scorer in SCORERS.items():
        assert scorer.kind == kind == scorer().label
        assert f"| `{kind}` |" in text or f"kind: {kind}`" in text, f"docs/formats.md does not explain {kind}"
        assert scorer.units == ("scaled" if issubclass(scorer, Baskerville) else "raw")
        again = build(VariantConfig, settings_of(VariantConfig(scorers=(scorer(),))), "again")
        assert again.scorers == (scorer(),)
    with pytest.raises(ConfigError, match=r"no such kind: 'SAD'.*logSED, SAX"):
        build(VariantConfig, {"scorers": ["SAD"]}, "variants.yaml")


# Merged strands


def test_merged_strands() -> None:
    rng = np.random.default_rng(1)
    ref, alt = (torch.from_numpy(rng.gamma(1, 2, (2, 3, 5))) for _ in range(2))  # tracks: +, -, unstranded
    weights, read = torch.ones(2, 1, 5, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    signals = torch.tensor([0, 2]), torch.tensor([1, 2])
    for kind in SCORERS:
        scorer = SCORERS[kind]()
        apart = effects(scorer, [(ref, alt)], weights, read)
        merged = effects(scorer, [(ref, alt)], weights, read, signals)
        torch.testing.assert_close(merged[:, 1], apart[:, 2])
        if not isinstance(scorer, Baskerville):
            both = scorer(ref[:, :2].sum(1, keepdim=True), alt[:, :2].sum(1, keepdim=True), weights)[:, 0]
        else:
            both = apart[:, :2].square().sum(1).sqrt() if kind.endswith("D2") else apart[:, :2].sum(1)
        torch.testing.assert_close(merged[:, 0], both)
    one = torch.tensor([[True, False, True], [False, False, True]])
    merged = effects(SCORERS["SUM"](), [(ref, alt)], weights, one, signals)
    apart = effects(SCORERS["SUM"](), [(ref, alt)], weights, one)
    assert merged[0, 0] == apart[0, 0]
    assert apart[:, 1].isnan().all()
    assert merged[1, 0].isnan()


# Genes and regions


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    folder = tmp_path_factory.mktemp("genome")
    rng = np.random.default_rng(0)
    letters = ["".join(rng.choice(list("ACGT"), 4000)) for _ in range(2)]
    (folder / "g.fa").write_text(f">chr1\n{letters[0]}\n>chr2\n{letters[1]}\n")
    tracks = track_table(["rna+", "rna-", "atac"])
    return Layout(WINDOW, BINS, BIN, tracks, Genome.open(folder / "g.fa"))


@pytest.fixture(scope="module")
def model(layout: Layout) -> SequenceModel:
    trunk = settled_trunk()
    heads = {name: Head(layout.tracks.select([layout.tracks.names[i] for i in index]), trunk.spec.channels)
             for name, index in layout.tracks.groups.items()}  # fmt: skip
    return SequenceModel(trunk, heads, layout.tracks).eval()


def gtf(path: Path, rows: Sequence[tuple[str, int, int, str, str]]) -> Path:
    lines = [f'{c}\tx\texon\t{s + 1}\t{e}\t.\t{strand}\t.\tgene_id "{gene}";' for c, s, e, strand, gene in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def covered(spans: Sequence[tuple[int, int]], first: int) -> Array:
    """Share of each bin that spans cover, base by base."""
    bases = [any(a <= first + i < b for a, b in spans) for i in range(BINS * BIN)]
    return np.array(bases, dtype=np.float64).reshape(BINS, BIN).mean(1)


def test_genes(layout: Layout, tmp_path: Path) -> None:
    exons = {
        "near": ("chr1", "+", [(1000, 1020), (1010, 1037), (1100, 1150)]),
        "other": ("chr1", "-", [(1060, 1090)]),
        "long": ("chr1", "-", [(400, 420), (1180, 1210)]),  # longer than 192 bp: placed at its start, 1209
        "far": ("chr2", "+", [(500, 520)]),
        "bare": ("chr1", ".", [(3000, 3050)]),
    }
    rows = [(chrom, a, b, strand, gene) for gene, (chrom, strand, spans) in exons.items() for a, b in spans]
    rows += [("chr1", 1000, 1010, "+", "two"), ("chr2", 1000, 1010, "+", "two"), ("chrUn", 5, 9, "+", "scaffold")]
    over = Genes(gtf(tmp_path / "g.gtf", rows))
    sites = over.sites(layout)
    found = {site.names[0]: site for site in sites(Variant("chr1", 1101, "A", "C"))}
    assert list(found) == ["near", "other", "long"] or set(found) == {"near", "other", "long"}
    middles = {"near": 1075, "other": 1075, "long": 1209}
    for gene, site in found.items():
        first = middles[gene] - BINS * BIN // 2
        assert site.start == first - MARGIN
        weights = np.zeros(BINS)
        weights[slice(*site.bins)] = site.weights
        np.testing.assert_allclose(weights, covered(exons[gene][2], first))
        assert site.tracks is not None
        assert site.tracks.tolist() == ([True, False, True] if gene == "near" else [False, True, True])
    for gene, middle in middles.items():  # every base of the window, and no other
        start = middle - WINDOW // 2
        for position, inside in (
            (start, False),
            (start + 1, True),
            (start + WINDOW, True),
            (start + WINDOW + 1, False),
        ):
            names = [site.names[0] for site in sites(Variant("chr1", position, "A", "C"))]
            assert (gene in names) == inside
    assert not sites(Variant("chr1", 2000, "A", "C"))
    assert [site.names for site in sites(Variant("chr2", 505, "A", "C"))] == [("far",)]
    (bare,) = sites(Variant("chr1", 3001, "A", "C"))
    assert bare.tracks is not None
    assert bare.tracks.all()
    with pytest.raises(DataError, match="pass rename"):
        Genes(gtf(tmp_path / "h.gtf", [("1", 5, 9, "+", "a")])).sites(layout)
    renamed = Genes(tmp_path / "h.gtf", {"1": "chr1"}).sites(layout)
    assert [site.names for site in renamed(Variant("chr1", 7, "A", "C"))] == [("a",)]


def test_regions(layout: Layout, tmp_path: Path) -> None:
    bed = tmp_path / "r.bed"
    bed.write_text("chr1\t1000\t1040\tpeak\nchr2\t1000\t1001\n")
    sites = Regions(bed).sites(layout)
    (site,) = sites(Variant("chr1", 1001, "A", "C"))
    first = 1020 - BINS * BIN // 2
    weights = np.zeros(BINS)
    weights[slice(*site.bins)] = site.weights
    np.testing.assert_allclose(weights, covered([(1000, 1040)], first))
    assert (site.names, site.tracks, site.start) == (("peak",), None, first - MARGIN)
    assert [s.names for s in sites(Variant("chr2", 1001, "A", "C"))] == [("chr2:1000-1001",)]
    bed.write_text(f"chr1\t1000\t{1001 + BINS * BIN}\n")
    with pytest.raises(DataError, match="longer than what the model predicts"):
        Regions(bed).sites(layout)


def test_scores_over_genes(layout: Layout, model: SequenceModel, tmp_path: Path) -> None:
    """Through the engine: the strand's tracks alone, merged or not; a variant without a gene has no row."""
    over = Genes(gtf(tmp_path / "g.gtf", [("chr1", 1000, 1050, "-", "one"), ("chr1", 1090, 1120, "+", "two")]))
    text = "ACGT"
    refs = {p: text[layout.genome.chrom_codes("chr1")[p - 1]] for p in (1030, 2500)}
    variants = [Variant("chr1", p, ref, "A" if ref != "A" else "C") for p, ref in refs.items()]
    apart = VariantScorer(model, layout, VariantConfig((SCORERS["SUM"](),), over))
    scores = apart(variants)
    assert scores.variant.tolist() == [0, 0]
    assert [name for (name,) in scores.names] == ["one", "two"]
    assert np.isnan(scores.values[:, 0]).tolist() == [[True, False, False], [False, True, False]]
    merged = VariantScorer(model, layout, VariantConfig((SCORERS["SUM"](),), over, merge_strands=True))
    assert merged.columns == ("rna", "atac")
    np.testing.assert_allclose(merged(variants).values[:, 0, 0], [scores.values[0, 0, 1], scores.values[1, 0, 0]])
    np.testing.assert_allclose(merged(variants).values[:, 0, 1], scores.values[:, 0, 2])


# Parity with Baskerville


@pytest.fixture(scope="module")
def published(
    shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SequenceModel, Layout, list[Variant], Path]:
    """The trained network, converted to a model folder, on the first Mb of chr1."""
    files, folder = shared / "reference" / "parity", tmp_path_factory.mktemp("published") / "model"
    trained = files / "trained_0.6M"
    convert_baskerville(
        trained / "model.h5", trained / "params.json", folder, trained / "targets.txt",
        name="trained", licence="not stated", citation="",
    )  # fmt: skip
    genome = Genome.open(files / "hg38_1m.fa.gz", cache=folder.parent)
    info = DatasetInfo("coverage", 131072, 2048, 32, {"path": str(genome.path), "hash": genome.hash})
    model = build_pretrained(ModelConfig(name=str(folder)), info)
    assert model is not None
    rows = [row.split("\t") for row in (files / "variants" / "snv.vcf").read_text().splitlines() if row[0] != "#"]
    variants = [Variant(chrom, int(position), ref, alt) for chrom, position, _, ref, alt, *_ in rows]
    return model, Layout(131072, 2048, 32, model.tracks, genome), variants, files / "variants"


def compare(published: Any, name: str, config: VariantConfig, count: int) -> set[str]:
    """Our scores with those of a file, to the rounding of float16; returns which were compared."""
    h5py = pytest.importorskip("h5py")
    model, layout, variants, folder = published
    scorer = VariantScorer(model, layout, config)
    scores = scorer(variants[:count])
    compared = set()
    with h5py.File(folder / name) as file:
        ids = [text.decode().rstrip("+-") for text in file["target_ids"][:]]
        assert len(ids) == len(scorer.columns) == 47
        order = [scorer.columns.index(each) for each in ids]
        for number, each in enumerate(config.scorers):
            if each.label not in file:
                continue
            wanted = file[each.label][:count].astype(np.float64)
            found = scores.values[:, number, order]
            error = np.abs(found - wanted) / np.maximum(np.abs(wanted), 0.05 * np.abs(wanted).max())
            assert error.max() < 4e-3, each.label
            assert np.median(error) < 2**-11, each.label
            compared.add(each.label)
    return compared


def baskerville() -> tuple[Any, ...]:
    return tuple(scorer() for scorer in SCORERS.values() if issubclass(scorer, Baskerville))


def test_parity(published: Any) -> None:
    """All statistics of the file; JS is not in it."""
    config = VariantConfig(baskerville(), Window(), merge_strands=True)
    compared = compare(published, "snv_scores.h5", config, 8)
    assert compared == {scorer.label for scorer in baskerville()} - {"JS"}
    assert len(compared) == 11


def test_parity_of_ensembles(published: Any) -> None:
    """Strands are averaged on the model's scale, scores over the shifts; another way of averaging is far off."""
    config = VariantConfig(baskerville(), Window(), Augmentation(True, 1), "baskerville", merge_strands=True)
    assert compare(published, "snv_scores_rc_shifts.h5", config, 3) == {"D2", "logD2", "logSED", "logSUM"}
    raw = VariantConfig(baskerville(), Window(), Augmentation(True, 1), merge_strands=True)
    with pytest.raises(AssertionError):
        compare(published, "snv_scores_rc_shifts.h5", raw, 1)
