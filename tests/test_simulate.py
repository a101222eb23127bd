"""The generator: frozen difficulty, rules that hold on both strands, files that agree with their truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pybigtools
import pytest

from seqgraft.data import prepare_source
from seqgraft.data.simulate import Simulation, Truth, open_truth, simulate, simulate_labelled, variant_windows
from seqgraft.data.simulated_cells import cell_tracks
from seqgraft.errors import ConfigError, DataError, RunError
from seqgraft.experiment import parse_source
from seqgraft.oracle import (
    cell_difficulty,
    difficulty,
    expected,
    expected_marks,
    grammar,
    motif_difference,
    oracle,
    scan,
    track_names,
)
from seqgraft.sequence import Codes, N, encode, reverse_complement
from seqgraft.tracks import TrackTable

# Whoever changes this makes every threshold on simulated data mean something else: retrain sim-mini and say why.
FROZEN = "7b059e7e8a370e082ec74d79579257b21389c131aef562be216592e38f693f1c"

SMALL = Simulation(seed=3, chromosomes=2, chromosome_length=80_000, variants=30)
NEW = ("naive", "activated")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return simulate(SMALL, tmp_path_factory.mktemp("simulated") / "sim")


@pytest.fixture(scope="module")
def genome(truth: Truth) -> dict[str, Codes]:
    records = (truth.folder / "genome.fa").read_text().split(">")[1:]
    return {name: encode(text.replace("\n", "")) for name, text in (record.split("\n", 1) for record in records)}


def test_difficulty_is_frozen(truth: Truth) -> None:
    assert difficulty()[1] == FROZEN
    assert truth.difficulty == FROZEN


def test_grammar_is_sane() -> None:
    known = grammar()
    assert all(len(motif.pattern) % 2 == 1 for motif in known.motifs)
    assert len(known.role("core")) == len(known.role("terminator")) == 1
    assert known.conditions == ("base1", "base2", "base3", "base4", *NEW, *TYPES)
    activity = known.activities(known.role("regulator"), known.conditions)
    assert (activity > 0).any(0).all()
    assert (activity < 0).any(0).all()
    assert (np.ptp(activity[:, 4:6], axis=1) > 0.5).sum() >= 5, "few motifs tell the new conditions apart"


def test_oracle_is_the_same_on_both_strands(genome: dict[str, Codes]) -> None:
    codes = genome["chr1"][None, :20_000]
    turned = expected(reverse_complement(codes), NEW)[..., ::-1]
    np.testing.assert_allclose(turned[:, [1, 0, 2, 4, 3, 5]], expected(codes, NEW), atol=1e-9)


def test_oracle_by_hand() -> None:
    rules = grammar().rules
    (core,), regulators = grammar().role("core"), {motif.name: motif for motif in grammar().role("regulator")}
    codes = np.full(4096, N, dtype=np.uint8)
    tss, centre = 1500, 1400

    def put(pattern: str, start: int) -> None:
        codes[start : start + len(pattern)] = encode(pattern.upper().translate(str.maketrans("RYSWKMN", "ACCAGAA")))

    put(core.pattern, tss - rules.tss)
    put(regulators["cond1"].pattern, centre - len(regulators["cond1"].pattern) // 2)
    naive, activated = (oracle(codes, [condition], 1) for condition in NEW)
    activity = grammar().activities([regulators["cond1"]], NEW)[0]
    for signal, effect in zip((naive, activated), activity, strict=True):
        level = np.exp(effect * np.exp(-(tss - centre) / rules.decay))
        along = np.arange(rules.longest)
        body = (rules.rna_depth * level * (1 - rules.loss) ** along + rules.rna_background) / rules.resolution
        np.testing.assert_allclose(signal[0, tss : tss + rules.longest], body)
        np.testing.assert_allclose(signal[0, :tss], rules.rna_background / rules.resolution)
        np.testing.assert_allclose(signal[1], rules.rna_background / rules.resolution)
        bell = np.exp(-0.5 * ((tss - rules.tss + len(core.pattern) // 2 - centre) / rules.atac_width) ** 2)
        peak = rules.atac_background * np.exp(rules.atac_gain * (effect + rules.atac_core * bell)) / rules.resolution
        np.testing.assert_allclose(signal[2, centre], peak)


def test_window_and_chromosome_agree(genome: dict[str, Codes], truth: Truth) -> None:
    margin = 2048
    window = oracle(genome["chr2"][16_000 : 16_000 + 3 * margin], NEW)
    rates = truth.rates().query("chrom == 'chr2'")[track_names(NEW)].to_numpy().T
    inside = slice(margin // 16, 2 * margin // 16)
    np.testing.assert_allclose(window[:, inside], rates[:, 1000:][:, inside], atol=1e-9)


@pytest.mark.parametrize("bad", [np.full(32, 7, dtype=np.uint8), np.zeros(33, dtype=np.uint8)])
def test_oracle_refuses(bad: Codes) -> None:
    with pytest.raises(DataError):
        oracle(bad, NEW)


def test_files(truth: Truth, genome: dict[str, Codes]) -> None:
    table = TrackTable.build(pd.read_csv(truth.folder / "tracks.csv", keep_default_na=False).to_dict("records"))
    assert table.names == track_names(NEW)
    assert table.permutation.tolist() == [1, 0, 2, 4, 3, 5]
    rates = truth.rates()
    for row in table.to_frame().itertuples():
        reader = pybigtools.open(str(truth.folder / str(row.file)))
        assert reader.chroms() == {name: len(codes) for name, codes in genome.items()}
        values = np.concatenate([reader.values(name, 0, len(codes), fillna=0) for name, codes in genome.items()])
        counts = values.reshape(-1, 16).sum(1)
        assert counts.sum() == pytest.approx(row.depth)
        assert np.array_equal(counts, np.round(counts))
        ceiling = float(np.corrcoef(counts, rates[str(row.name)])[0, 1])
        assert truth.ceilings[str(row.name)]["16"] == pytest.approx(ceiling)
        assert counts.mean() == pytest.approx(rates[str(row.name)].mean(), rel=0.05)


def test_noise_leaves_enough_to_learn(truth: Truth) -> None:
    for name, ceiling in truth.ceilings.items():
        assert 0.75 < ceiling["32"] < 0.98, name


def test_genes(truth: Truth, genome: dict[str, Codes]) -> None:
    genes, rates = truth.genes(), truth.rates()
    gtf = [line.split("\t") for line in (truth.folder / "genes.gtf").read_text().splitlines()]
    exons = [(f[0], int(f[3]) - 1, int(f[4]), f[6]) for f in gtf if f[2] == "exon"]
    assert exons == list(genes[["chrom", "start", "end", "strand"]].itertuples(index=False, name=None))
    assert set(genes["strand"]) == {"+", "-"}
    gene = genes.iloc[3]
    bins = rates[(rates["chrom"] == gene["chrom"]) & (rates["end"] > gene["start"]) & (rates["start"] < gene["end"])]
    track = f"rna_naive_{'plus' if gene['strand'] == '+' else 'minus'}"
    assert bins[track].sum() == pytest.approx(gene["naive"], rel=0.1)
    change = np.log2((genes["activated"] + 1) / (genes["naive"] + 1))
    assert change.std() > 0.7, "conditions must differ in their genes"


def test_motifs(truth: Truth, genome: dict[str, Codes]) -> None:
    motifs = truth.motifs()
    assert motifs["planted"].sum() > 5 * (~motifs["planted"] & (motifs["role"] == "regulator")).sum()
    row = motifs[(motifs["occupancy"] == 1) & (motifs["strand"] == "-")].iloc[0]
    (motif,) = [m for m in grammar().motifs if m.name == row["motif"]]
    found = scan(reverse_complement(genome[row["chrom"]][row["start"] : row["end"]])[None], [motif])
    assert (found.strand > 0).any()
    assert found.occupancy.max() == 1


def test_variants_do_what_their_kind_says(truth: Truth, genome: dict[str, Codes]) -> None:
    variants, names = truth.variants(), track_names(NEW)
    assert variants["kind"].value_counts().to_dict() == dict.fromkeys(["causal", "neutral", "decoy", "background"], 30)
    size = variants[names].abs().max(axis=1)
    limits = difficulty()[0]["variants"]
    causal = variants["kind"] == "causal"
    assert (size[causal] >= limits["least"]).all()
    assert (size[~causal] <= limits["most"]).all()
    reference, alternate = variant_windows(genome, variants, limits["window"])
    assert ["ACGT"[code] for code in reference[:, limits["window"] // 2]] == variants["ref"].tolist()
    middle = slice((limits["window"] - limits["rna_span"]) // 32, (limits["window"] + limits["rna_span"]) // 32)
    sums = [oracle(codes, NEW)[:, 0, middle].sum(-1) + 1 for codes in (reference, alternate)]
    np.testing.assert_allclose(np.log2(sums[1] / sums[0]), variants[names[0]], atol=1e-9)
    naive = motif_difference(reference, alternate)
    np.testing.assert_allclose(naive, variants["motif_difference"])
    assert np.abs(naive[variants["kind"] == "decoy"]).mean() > 0.3, "decoys must fool the motif difference"
    assert np.abs(naive[variants["kind"] == "neutral"]).mean() < 0.02


def test_vcf_keeps_the_kind_to_itself(truth: Truth) -> None:
    text = (truth.folder / "variants.vcf").read_text()
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    variants = truth.variants()
    assert [(r[0], int(r[1]), r[2], r[3], r[4]) for r in rows] == list(
        variants[["chrom", "position", "id", "ref", "alt"]].itertuples(index=False, name=None)
    )
    assert "causal" not in text


def test_some_variants_act_in_one_condition_only(truth: Truth) -> None:
    causal = truth.variants().query("kind == 'causal'")
    effect = np.abs(causal[track_names(NEW)].to_numpy()).reshape(-1, 2, 3).max(-1)
    assert ((effect.max(1) > 0.3) & (effect.min(1) < 0.1 * effect.max(1))).sum() >= 3


def test_seeds(tmp_path: Path, truth: Truth) -> None:
    again = simulate(SMALL, tmp_path / "again")
    for file in sorted(path.relative_to(truth.folder) for path in truth.folder.rglob("*") if path.is_file()):
        assert (again.folder / file).read_bytes() == (truth.folder / file).read_bytes(), file
    tiny = {"chromosomes": 1, "chromosome_length": 16_384, "variants": 0}
    other = simulate(Simulation(seed=4, conditions=("base1",), replicates=2, **tiny), tmp_path / "other")
    same = simulate(Simulation(seed=4, conditions=("base1", "base2"), **tiny), tmp_path / "same")
    assert (other.folder / "genome.fa").read_text() == (same.folder / "genome.fa").read_text()
    assert (other.folder / "genome.fa").read_text()[:200] != (truth.folder / "genome.fa").read_text()[:200]
    table = pd.read_csv(other.folder / "tracks.csv")
    assert "rna_base1_rep2_minus" in set(table["name"])
    assert len(TrackTable.build(table.to_dict("records"))) == 6
    assert not (other.folder / "variants.vcf").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"conditions": ("stress",)},
        {"conditions": ()},
        {"conditions": ("naive", "naive")},
        {"chromosome_length": 100_001},
        {"chromosome_length": 1024},
        {"chromosomes": 0},
        {"replicates": 0},
        {"variants": -1},
    ],
)
def test_bad_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Simulation(**settings)  # type: ignore[arg-type]


def test_folders(truth: Truth, tmp_path: Path) -> None:
    assert open_truth(truth.folder) == truth
    with pytest.raises(RunError):
        simulate(SMALL, truth.folder)
    with pytest.raises(DataError):
        open_truth(tmp_path)
    (tmp_path / "truth.json").write_text('{"format_version": 99}')
    with pytest.raises(DataError):
        open_truth(tmp_path)


def test_labelled(tmp_path: Path) -> None:
    table = simulate_labelled(Simulation(), tmp_path / "labels.csv", n=200, length=320)
    read = pd.read_csv(tmp_path / "labels.csv")
    assert read["sequence"].str.len().eq(320).all()
    assert read["promoter"].sum() == 100
    assert set(read["fold"]) == {"train", "valid", "test"}
    expression = table.groupby("promoter")["expression_naive"].median()
    assert expression[1] > expression[0] + 1
    with pytest.raises(ConfigError):
        simulate_labelled(Simulation(), tmp_path / "bad.csv", length=100)


# ---- single cells ----

# As above: four cell types, two marks and the depth of their cells.
FROZEN_CELLS = "645c2a8c93c83004a4d84db253bec8caf880b32e4e9c12077884e92cac08726e"
TYPES = ("bcell", "mono", "nk", "tcell")
CELLS = {"bcell": 40, "mono": 30, "nk": 6, "tcell": 50}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    tiny = {"chromosomes": 2, "chromosome_length": 40_000, "variants": 10}
    return simulate(Simulation(seed=5, conditions=TYPES, cells=CELLS, **tiny), tmp_path_factory.mktemp("cells") / "sim")


def test_difficulty_of_cells_is_frozen(cells: Truth) -> None:
    assert cell_difficulty()[1] == FROZEN_CELLS
    about = json.loads((cells.folder / "truth.json").read_text())
    assert about["cells"]["difficulty"] == FROZEN_CELLS
    assert cells.difficulty == FROZEN
    assert cells.simulation.cells == CELLS


def test_marks_by_hand() -> None:
    rules, marks = grammar().rules, cell_difficulty()[0]["marks"]
    (core,), (act,) = grammar().role("core"), [m for m in grammar().motifs if m.name == "cond1"]
    codes = np.full(4096, N, dtype=np.uint8)
    tss, centre = 1500, 1400
    for motif, start in ((core, tss - rules.tss), (act, centre - len(act.pattern) // 2)):
        pattern = motif.pattern.upper().translate(str.maketrans("RYSWKMN", "ACCAGAA"))
        codes[start : start + len(pattern)] = encode(pattern)
    (ac, me), at_core = expected_marks(codes[None], ["bcell"])[0], tss - rules.tss + len(core.pattern) // 2
    effect = grammar().activities([act], ["bcell"])[0, 0]

    def bell(distance: float, mark: str) -> float:
        return float(np.exp(-0.5 * (distance / marks[mark]["width"]) ** 2))

    log = marks["k27ac"]["gain"] * (effect + marks["k27ac"]["core"] * bell(at_core - centre, "k27ac"))
    np.testing.assert_allclose(ac[centre], marks["k27ac"]["background"] * np.exp(log) / rules.resolution)
    rate = np.exp(effect * np.exp(-(tss - centre) / rules.decay))
    for distance in (0, 40, -100):
        there = me[tss + marks["k4me3"]["downstream"] + distance] * rules.resolution
        assert there == pytest.approx(
            marks["k4me3"]["background"] + marks["k4me3"]["height"] * rate * bell(distance, "k4me3")
        )
    turned = expected_marks(reverse_complement(codes)[None], TYPES)[..., ::-1]
    np.testing.assert_allclose(turned, expected_marks(codes[None], TYPES), atol=1e-9)


def test_fragments_are_draws_of_their_truth(cells: Truth, tmp_path: Path) -> None:
    """Counted by `prepare`, every track has the depth of its truth, and varies around it as Poisson draws do."""
    assays = [
        {"name": name, "count": about["count"], "files": [{"path": str(cells.folder / "fragments" / f"{name}.tsv.gz")}]}
        for name, about in cell_difficulty()[0]["assays"].items()
    ]
    assays[-1]["files"][0]["strand"] = "forward"
    source = {
        "kind": "fragments",
        "fasta": str(cells.folder / "genome.fa"),
        "assays": assays,
        "labels": {"path": str(cells.folder / "cells.csv"), "group": "cell_type"},
        "window": 5120,
        "target_length": 4096,
        "bin_size": 16,
        "folds": {"by": "chromosome", "test": ["chr2"]},
    }
    dataset = prepare_source(parse_source(source), tmp_path / "data")
    assert dataset.tracks.names == cell_tracks(TYPES)
    files = {file["assay"]: file for file in dataset.info.notes["fragment_files"]}
    assert list(files) == list(cell_difficulty()[0]["assays"])
    for file in files.values():
        assert file["matched"] == sum(CELLS.values())
        assert file["unmatched"] == sum(CELLS.values()) // 10
        assert 1 - file["counted"] / file["fragments"] == pytest.approx(cell_difficulty()[0]["ambient"], abs=0.012)
    rates = _of_regions(cells, dataset.regions)
    for track, name in enumerate(dataset.tracks.names):
        mean, counts = rates[:, track].ravel(), dataset.raw_targets(np.arange(len(dataset)))[:, track].ravel()
        inner = np.tile(np.arange(rates.shape[2]), len(rates)) > 20  # fragments are cut at the chromosome's ends
        assert counts[inner].sum() == pytest.approx(mean[inner].sum(), rel=0.25 if name.startswith("nk") else 0.06), (
            name
        )
        if name.endswith(("k27ac", "k4me3")) and not name.startswith("nk"):  # of others, neighbours hang together
            spread = ((counts - mean)[inner] ** 2 / mean[inner]).mean()
            assert spread == pytest.approx(1, abs=0.15), name
    shallow = dataset.tracks.frame.set_index("name")["depth"]
    assert shallow["nk_atac"] < 0.3 * shallow["bcell_atac"]


def _of_regions(truth: Truth, regions: pd.DataFrame) -> np.ndarray:
    """Expected counts ``(regions, tracks, bins)``."""
    rates = truth.cell_rates()
    values = {chrom: part[cell_tracks(TYPES)].to_numpy().T for chrom, part in rates.groupby("chrom")}
    return np.stack([values[r.chrom][:, r.start // 16 : r.end // 16] for r in regions.itertuples()])


def test_variants_act_in_cell_types(cells: Truth) -> None:
    variants = cells.cell_variants()
    tracks = variants[cell_tracks(TYPES)].to_numpy()
    size = np.stack([np.abs(tracks[:, [n.startswith(t) for n in cell_tracks(TYPES)]]).max(1) for t in TYPES], axis=1)
    np.testing.assert_allclose(variants["size"], size.max(1))
    np.testing.assert_allclose(variants["runner_up"], np.sort(size, axis=1)[:, -2])
    assert variants["cell_type"].tolist() == [TYPES[i] for i in size.argmax(1)]
    causal = variants["kind"] == "causal"
    assert (variants["size"][~causal] < 0.05).all()
    motif = cells.variants().set_index("id").loc[variants["id"], "motif"].to_numpy()
    activity = {m.name: np.abs(grammar().activities([m], TYPES)[0]) for m in grammar().role("regulator")}
    own = [
        (row.cell_type, TYPES[int(activity[name].argmax())])
        for row, name in zip(variants.itertuples(), motif, strict=True)
        if row.kind == "causal" and name in activity and np.sort(activity[name])[-2] < 0.25
    ]
    assert len(own) >= 3
    assert all(found == true for found, true in own)


@pytest.mark.parametrize("wrong", [{"stress": 3}, {"bcell": 0}])
def test_bad_cells(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="these cells cannot be simulated"):
        Simulation(conditions=TYPES, cells=wrong)
