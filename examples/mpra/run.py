"""Natural promoter variants of yeast, scored with `yeast-mini`, beside the effects that a reporter assay measured.

    python examples/mpra/run.py OUT

The assay (Renganaath et al. 2020) measured the log2 fold change of expression, alternative over reference allele, of
144-bp fragments in front of a reporter. Nothing is trained on it, but for one baseline. What is read was fixed before
any score was looked at: the tracks that count transcription starts in glucose (YPD), on the strand of the variant's
gene; the score is the mean of their log2 fold changes, in the 500 bp around the gene's start, or in the 501 bp around
the variant.

Scored are the bundled model as it is; LoRA, fine-tuned to STRIPE-seq starts on three chromosomes; and the same network
with random weights. Needs SEQGRAFT_SHARED; takes some ten minutes on one core, leaves OUT/table.md and OUT/mpra.svg.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from seqgraft.baselines import kmer_counts
from seqgraft.data import Dataset, open_dataset, prepare_source
from seqgraft.experiment import parse_experiment, parse_source, read_yaml
from seqgraft.genome import Genome, Interval, Variant
from seqgraft.intervals import Estimate, bootstrap_interval, segment_blocks
from seqgraft.metrics import Values
from seqgraft.models.base import SequenceModel
from seqgraft.models.weights import ModelConfig, build_pretrained
from seqgraft.plots import THEME, model_dots, svg
from seqgraft.run import fit_run, open_run
from seqgraft.variants import Layout, Over, VariantConfig
from seqgraft.variants.over import Centre, Regions, Sites
from seqgraft.variants.place import alternate
from seqgraft.variants.table import score_vcf

HERE = Path(__file__).parent
STARTS = ("tif_tss_ypd", "stripe_ypd")  # without their strand
UNSEEN = ("chrXIV", "chrXVI")  # by the trunk and by the adapter
OLIGO = 144  # bp of the assay's fragments
FDR = 0.05
STRENGTHS = (1e1, 1e2, 1e3, 1e4, 1e5)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OwnGenes:
    """The start of the gene that a variant was measured for, out of the regions of a BED file.

    Attributes:
        genes: id of the variant -> its genes.
    """

    bed: Path
    genes: Mapping[str, frozenset[str]]
    kind: ClassVar[str] = "own_genes"
    columns: ClassVar[tuple[str, ...]] = ("region",)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.bed,)

    def sites(self, layout: Layout) -> Sites:
        every = Regions(self.bed).sites(layout)
        return lambda variant: [site for site in every(variant) if site.names[0] in self.genes[variant.id]]


def shared() -> Path:
    return Path(os.environ["SEQGRAFT_SHARED"]) / "data"


def read_effects() -> pd.DataFrame:
    """Measurements whose gene has a known place: one row per variant, gene and design.

    Columns: chrom, position, ref, alt, id, gene, side (+ or -: the gene's strand), start (0-based), effect, error (its
    standard error), significant.
    """
    folder = shared() / "personal" / "yeast_segregants"
    table = pd.read_csv(folder / "mpra_promoter_variants_renganaath2020.tsv.gz", sep="\t")
    table = table.rename(columns={"chr": "chrom", "pos": "position", "logFC": "effect"}).drop(columns="strand")
    genes = pd.read_csv(folder / "genes.tsv", sep="\t").rename(columns={"strand": "side"})
    table = table.merge(genes[["gene", "chrom", "side", "tss_orf"]], on=["gene", "chrom"])
    table["start"] = table["tss_orf"] - 1
    table["significant"] = table["adj.P.Val"] < FDR
    table["error"] = (table["effect"] / table["t"]).abs()
    table["id"] = table["chrom"] + "_" + table["position"].astype(str) + "_" + table["ref"] + "_" + table["alt"]
    keep = ["chrom", "position", "ref", "alt", "id", "gene", "side", "start", "effect", "error", "significant"]
    return table[keep].sort_values(["chrom", "position"], kind="stable").reset_index(drop=True)


def write_inputs(table: pd.DataFrame, out: Path) -> None:
    """The variants as a VCF, each once, and 500 bp around the start of each gene as a BED file."""
    with (out / "variants.vcf").open("w") as file:
        file.write("##fileformat=VCFv4.2\n")
        file.writelines(f"##contig=<ID={chrom}>\n" for chrom in table["chrom"].unique())
        file.write("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n")
        for row in table.drop_duplicates("id").itertuples():
            file.write(f"{row.chrom}\t{row.position}\t{row.id}\t{row.ref}\t{row.alt}\t.\t.\t.\n")
    starts = table.drop_duplicates("gene")
    bed = pd.DataFrame({"chrom": starts["chrom"], "start": (starts["start"] - 250).clip(lower=0)})
    bed["end"], bed["name"] = starts["start"] + 250, starts["gene"]
    bed.to_csv(out / "starts.bed", sep="\t", header=False, index=False)


def overs(table: pd.DataFrame, out: Path) -> dict[str, Over]:
    """Where scores are read."""
    genes = {name: frozenset(rows) for name, rows in table.groupby("id")["gene"]}
    return {"gene": OwnGenes(out / "starts.bed", genes), "variant": Centre(501)}


def score(model: SequenceModel, layout: Layout, over: Over, table: pd.DataFrame, out: Path) -> Floats:
    """One score per row of the table: the mean log2 fold change of starts on the gene's strand."""
    if not out.exists():
        score_vcf(model, layout, VariantConfig(over=over), out.parent / "variants.vcf", out, identity={}, resume=True)
    found = pd.read_parquet(out)
    keys = {"id": "id", **dict.fromkeys(over.columns, "gene")}
    rows = table.merge(found, how="left", left_on=list(keys.values()), right_on=list(keys), validate="m:1")
    by_strand = [
        rows[[f"{name}{strand}" for name in STARTS if f"{name}{strand}" in rows]].mean(axis=1).to_numpy()
        for strand in "+-"
    ]
    return np.where(table["side"] == "+", *by_strand).astype(np.float64)


def models(out: Path) -> dict[str, tuple[SequenceModel, Layout]]:
    """What scores, and where it looks."""
    folder = out / "data"
    source = parse_source(read_yaml(HERE / "data.yaml"))
    dataset = open_dataset(folder) if folder.exists() else prepare_source(source, folder)
    content = read_yaml(HERE / "lora.yaml") | {"data": str(folder)}
    run = out / "lora"
    fit_run(parse_experiment(content), run, resume=run.exists())
    pretrained = build_pretrained(ModelConfig("yeast-mini"), dataset.info)
    control = build_pretrained(ModelConfig("yeast-mini"), dataset.info)
    assert pretrained is not None
    assert control is not None
    redraw(control)
    found = {"yeast-mini": pretrained, "LoRA": open_run(run).model, "random weights": control}
    return {name: (model, layout_of(model, dataset)) for name, model in found.items()}


def redraw(model: SequenceModel) -> None:
    """New random weights, with the initialisation of each layer."""
    torch.manual_seed(0)
    for module in model.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def layout_of(model: SequenceModel, dataset: Dataset) -> Layout:
    info = dataset.info
    assert dataset.genome is not None
    return Layout(info.window, info.bins, info.bin_size, model.tracks, dataset.genome)


def fragments(table: pd.DataFrame, genome: Genome) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Reference and alternate ``(rows, 144)`` around each variant, along the forward strand."""
    windows = []
    for row in table.itertuples():
        variant, before, reserve = Variant(row.chrom, row.position, row.ref, row.alt), OLIGO // 2, len(row.ref)
        first = row.position - 1 - before - reserve
        codes = genome.codes(Interval(row.chrom, first, first + OLIGO + 2 * reserve))
        edited = alternate(codes, before, variant, OLIGO, reserve)
        windows.append((codes[reserve : reserve + OLIGO], edited))
    reference, edited = zip(*windows, strict=True)
    return np.stack(reference), np.stack(edited)


def kmer_ridge(table: pd.DataFrame, pair: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]) -> Floats:
    """Effects predicted from the change of 1- to 5-mer counts by a ridge that the other chromosomes' effects train.

    Four folds of chromosomes; the strength is chosen on one of the three that train.
    """
    counts = [np.hstack([kmer_counts(codes, size, True).toarray() for size in range(1, 6)]) for codes in pair]
    change, effect = (counts[1] - counts[0]).astype(np.float64), table["effect"].to_numpy()
    fold = pd.factorize(table["chrom"])[0] % 4
    found = np.zeros(len(table))

    def fit(rows: npt.NDArray[np.bool_], strength: float) -> Floats:
        x = change[rows]
        solved: Floats = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ effect[rows])
        return solved

    for test in range(4):
        check = fold == (test + 1) % 4
        train = (fold != test) & ~check
        errors = [np.square(change[check] @ fit(train, s) - effect[check]).mean() for s in STRENGTHS]
        best = STRENGTHS[int(np.argmin(errors))]
        found[fold == test] = change[fold == test] @ fit(fold != test, best)
    return found


def baselines(table: pd.DataFrame, genome: Genome) -> dict[str, Floats]:
    """Scores that need no network. Distance says nothing of the sign."""
    pair = fragments(table, genome)
    gc = [((codes == 1) | (codes == 2)).sum(1) for codes in pair]
    return {
        "k-mer ridge (on the assay)": kmer_ridge(table, pair),
        "change of GC": (gc[1] - gc[0]).astype(np.float64),
        "nearness to the start": -np.abs(table["position"] - 1 - table["start"]).to_numpy(np.float64),
    }


def estimate(metric: str, true: Floats, predicted: Floats, table: pd.DataFrame) -> Estimate:
    """A metric with its 95 % interval, by a bootstrap over blocks of 50 kb."""
    blocks = segment_blocks(table["chrom"].tolist(), table["position"].to_numpy(), table["position"].to_numpy() + 1)
    return bootstrap_interval(Values.of(true[:, None, None], predicted[:, None, None]), metric, blocks)


def judge(table: pd.DataFrame, predicted: Floats, *, signed: bool) -> dict[str, Estimate]:
    """All that is asked of one score."""
    effect, significant = table["effect"].to_numpy(), table["significant"].to_numpy()
    size = np.abs(predicted) if signed else predicted
    found = {"AUROC": estimate("auroc", significant.astype(np.float64), size, table)}
    if signed:
        found["Spearman"] = estimate("spearman", effect, predicted, table)
        found["Spearman, significant"] = estimate(
            "spearman", effect[significant], predicted[significant], table[significant]
        )
        up = (effect[significant] > 0).astype(np.float64)
        found["AUROC of up or down, significant"] = estimate("auroc", up, predicted[significant], table[significant])
    return found


def in_words(value: Estimate) -> str:
    return f"{value.mean:.3f} ({value.mean_low:.3f} to {value.mean_high:.3f})"


def markdown(judged: Mapping[str, Mapping[str, Estimate]]) -> str:
    """A Markdown table."""
    columns = ["Spearman", "Spearman, significant", "AUROC of up or down, significant", "AUROC"]
    cells = [[name, *(in_words(of[c]) if c in of else "" for c in columns)] for name, of in judged.items()]
    columns[-1] = "AUROC of significant or not"
    lines = [["score", *columns], ["---"] * (len(columns) + 1), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ceiling(table: pd.DataFrame) -> str:
    """What limits a prediction: the errors of the effects, and how far they depend on the fragment's direction."""
    effect, error = table["effect"], table["error"]
    perfect = np.sqrt(max(0.0, 1 - np.square(error).mean() / effect.var()))
    twice = table.merge(table, on="id").query("gene_x < gene_y and side_x != side_y")
    hits = twice[twice["significant_x"] | twice["significant_y"]]
    every, strong = (part[["effect_x", "effect_y"]].corr("spearman").iloc[0, 1] for part in (twice, hits))
    return (
        f"The effects have a standard deviation of {effect.std():.3f} and a median standard error of "
        f"{error.median():.3f}: a perfect prediction would have a Pearson correlation of {perfect:.2f}. "
        f"{len(twice)} variants between two genes were measured in both directions: Spearman of the two effects "
        f"{every:.3f}, and {strong:.3f} for the {len(hits)} that are significant in either."
    )


def draw(judged: Mapping[str, Mapping[str, Estimate]], out: Path) -> None:
    """AUROC of every score as dots with intervals."""
    rows = [
        {
            "model": name,
            "value": e.mean,
            "low": e.mean_low,
            "high": e.mean_high,
            "group": "networks" if ", at " in name else "baselines",
        }
        for name, of in judged.items()
        for e in (of["AUROC"],)
    ]
    frame = pd.DataFrame(rows).sort_values("value", ascending=False)
    title = "Which promoter variants change a reporter: AUROC by the size of the score"
    figure = model_dots(frame, title=title, xlabel="AUROC of significant or not", groups=("networks", "baselines"))
    text = svg(figure, "mpra", title)
    for colour, variable in THEME.items():
        text = text.replace(f"var({variable})", colour)
    (out / "mpra.svg").write_text(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def main(out: Path) -> None:
    """Scores everything and writes OUT/table.md and OUT/mpra.svg."""
    out.mkdir(parents=True, exist_ok=True)
    table = read_effects()
    write_inputs(table, out)
    scores: dict[str, Floats] = {}
    for name, (model, layout) in models(out).items():
        for place, over in overs(table, out).items():
            file = out / f"{name.replace(' ', '-')}-{place}.parquet"
            scores[f"{name}, at {place}"] = score(model, layout, over, table, file)
    plain = baselines(table, layout.genome)
    unsigned = "nearness to the start"
    parts = {"all": np.ones(len(table), np.bool_), "unseen": table["chrom"].isin(UNSEEN).to_numpy()}
    text = []
    for part, rows in parts.items():
        some = table[rows]
        judged = {n: judge(some, s[rows], signed=n != unsigned) for n, s in (scores | plain).items()}
        where = "All chromosomes" if part == "all" else "Chromosomes XIV and XVI"
        text.append(f"{where}: {len(some)} measurements, {some['significant'].sum()} of them significant.")
        text.append(markdown(judged))
        if part == "all":
            draw(judged, out)
    text.append(ceiling(table))
    (out / "table.md").write_text("\n\n".join(text) + "\n")
    sys.stdout.write((out / "table.md").read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "mpra"))
