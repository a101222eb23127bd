"""A network of human splice sites, wrapped and fine-tuned to the introns of yeast, beside the same from random weights.

    python examples/splice/compare.py OUT [SEEDS]

The network is SpliceAI's with 400 nt of context (Jaganathan et al. 2019), its weights OpenSpliceAI's (Chao et al. 2025;
GPL-3, read where they lie). Candidates are AG and GT dinucleotides of genes with an intron, so that neither of them
tells true sites apart. Needs SEQGRAFT_SHARED; about three minutes per seed on one core.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from seqgraft.data import Dataset, open_dataset, prepare_source
from seqgraft.evaluate import Evaluation
from seqgraft.experiment import parse_experiment, parse_source, read_yaml
from seqgraft.genome import Genome, read_gtf
from seqgraft.metrics import METRICS
from seqgraft.models.folders import register
from seqgraft.models.wrap import ModuleSpec
from seqgraft.predict import predict
from seqgraft.run import evaluate_run, fit_run, open_run

HERE = Path(__file__).parent
ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV", "XV", "XVI"]
CONTEXT = 200  # bp on each side of a site
SHORTEST = 40  # bp: shorter gaps between exons are frameshifts
CHANNELS = 32
SITES = ("acceptor", "donor")
METHODS: dict[str, dict[str, Any]] = {
    "linear probe": {"adapter": {"kind": "linear_probe"}, "train": {"lr": 1e-2, "epochs": 20, "cache": "float32"}},
    "LoCon": {"adapter": {"kind": "lora", "rank": 8, "where": ["conv"]}, "train": {"lr": 3e-3, "epochs": 4}},
    "full": {"adapter": {"kind": "full"}, "train": {"lr": 1e-3, "epochs": 4}},
}


# ---- the network, with the names of its published weights ----


def trimmed(x: Tensor, size: int) -> Tensor:
    """Without ``size`` positions at each end."""
    return x[..., size : x.shape[-1] - size]


class Residual(nn.Module):
    """Two dilated convolutions on x; x and the skip, joined as ``(batch, 64, positions)``, lose what they reach."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.batchnorm1, self.batchnorm2 = nn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS)
        self.conv1 = nn.Conv1d(CHANNELS, CHANNELS, width, dilation=dilation)
        self.conv2 = nn.Conv1d(CHANNELS, CHANNELS, width, dilation=dilation)
        self.reach = (width - 1) * dilation

    def forward(self, both: Tensor) -> Tensor:
        x, skip = trimmed(both, self.reach).split(CHANNELS, dim=1)
        y = both[:, :CHANNELS]
        for norm, conv in ((self.batchnorm1, self.conv1), (self.batchnorm2, self.conv2)):
            y = conv(nn.functional.leaky_relu(norm(y), 0.1))
        return torch.cat([x + y, skip], dim=1)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(CHANNELS, CHANNELS, 1)

    def forward(self, both: Tensor) -> Tensor:
        x, skip = both.split(CHANNELS, dim=1)
        return torch.cat([x, skip + self.conv(x)], dim=1)


class Network(nn.Module):
    """Features ``(batch, 32, positions - 400)``; the published network reads them with ``final_conv``."""

    def __init__(self) -> None:
        super().__init__()
        self.initial_conv = nn.Conv1d(4, CHANNELS, 1)
        self.initial_skip = Skip()
        units: list[nn.Module] = []
        for dilation in (1, 4):
            units += [*(Residual(11, dilation) for _ in range(4)), Skip()]
        self.residual_units = nn.ModuleList(units)
        self.final_conv = nn.Conv1d(CHANNELS, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Log odds ``(batch, 3, positions - 400)`` of no site, acceptor and donor, up to a constant."""
        for stage in self.stages().values():
            x = stage(x)
        y: Tensor = self.final_conv(x)
        return y

    def stages(self) -> dict[str, nn.Module]:
        """The network without its last layer, in four stages."""
        return {
            "stem": _Stem(self.initial_conv, self.initial_skip),
            "near": nn.Sequential(*self.residual_units[:5]),
            "far": nn.Sequential(*self.residual_units[5:]),
            "skip": _TakeSkip(),
        }


class _Stem(nn.Module):
    def __init__(self, conv: nn.Conv1d, skip: Skip) -> None:
        super().__init__()
        self.conv, self.skip = conv, skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        both: Tensor = self.skip(torch.cat([x, torch.zeros_like(x)], dim=1))
        return both


class _TakeSkip(nn.Module):
    def forward(self, both: Tensor) -> Tensor:
        return both[:, CHANNELS:]


def published() -> Network:
    """The network with its published weights, every one of them."""
    network = Network()
    path = Path(os.environ["SEQGRAFT_SHARED"]) / "data/splice/model_400nt_rs10.pt"
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    return network.eval()


def network() -> dict[str, nn.Module]:
    """What is registered: the stages, with the published weights."""
    return published().stages()


SPEC = ModuleSpec(
    "splice-400",
    channels=CHANNELS,
    drops=CONTEXT,
    weights="OpenSpliceAI, 400 nt, seed 10",
    licence="GPL-3.0",
    citation="Chao et al. 2025, doi:10.7554/eLife.107454",
)


# ---- the data ----


def introns(gtf: Path, genome: Genome) -> pd.DataFrame:
    """chrom, strand, gene (its span) and intron of protein-coding transcripts, those from GT to AG; one row each."""
    exons = read_gtf(gtf, rename={name: f"chr{name}" for name in ROMAN} | {"Mito": "chrM"})
    exons = exons[(exons["gene_biotype"] == "protein_coding") & (exons["chrom"] != "chrM")]
    exons = exons.sort_values(["transcript_id", "start"])
    by = exons.groupby("transcript_id")
    table = exons.assign(
        left=by["end"].shift(),
        right=exons["start"],
        gene_start=by["start"].transform("min"),
        gene_end=by["end"].transform("max"),
    ).dropna(subset=["left"])
    table["left"] = table["left"].astype(int)
    table = table[table["right"] - table["left"] >= SHORTEST]
    ends = [
        (stranded(genome, row.chrom, row.strand)[slice(*positions(genome, row))][[0, 1, -2, -1]]).tolist()
        for row in table.itertuples()
    ]
    return table[[end == [2, 3, 0, 2] for end in ends]].drop_duplicates(["chrom", "left", "right", "strand"])


def stranded(genome: Genome, chrom: str, strand: str) -> np.ndarray:
    """The base codes of a chromosome as its strand reads: A C G T = 0..3."""
    codes = np.asarray(genome.chrom_codes(chrom))
    return codes if strand == "+" else (3 - codes)[::-1]


def positions(genome: Genome, row: Any) -> tuple[int, int]:
    """Start and end of the intron along its strand."""
    size = genome.chroms[row.chrom]
    return (row.left, row.right) if row.strand == "+" else (size - row.right, size - row.left)


def candidates(genome: Genome, table: pd.DataFrame, per_site: int, seed: int = 0) -> pd.DataFrame:
    """True sites, and ``per_site`` other AG and GT for each of them, from the same genes and strands.

    A site is a place of one base: the first of an exon (acceptor), the last of one (donor).
    """
    rng = np.random.default_rng(seed)
    true = {(*key, site) for row in table.itertuples() for site, key in sites_of(genome, row)}
    rows = [(chrom, strand, place, site, 1) for chrom, strand, place, site in sorted(true)]
    for site, (first, second), offset in (("acceptor", (0, 2), 2), ("donor", (2, 3), -1)):
        others: set[tuple[str, str, int, str]] = set()
        for row in table.itertuples():
            codes, size = stranded(genome, row.chrom, row.strand), genome.chroms[row.chrom]
            start, stop = (
                (row.gene_start, row.gene_end) if row.strand == "+" else (size - row.gene_end, size - row.gene_start)
            )
            found = np.flatnonzero((codes[start : stop - 1] == first) & (codes[start + 1 : stop] == second)) + start
            others |= {(row.chrom, row.strand, int(place) + offset, site) for place in found}
        pool = sorted(others - true)
        wanted = per_site * sum(entry[3] == site for entry in true)
        rows += [(*pool[i], 0) for i in rng.permutation(len(pool))[:wanted]]
    made = pd.DataFrame(rows, columns=["chrom", "strand", "place", "site", "label"])
    size = made["chrom"].map(genome.chroms)
    made["start"] = np.where(made["strand"] == "+", made["place"], size - made["place"] - 1)
    made["end"] = made["start"] + 1
    for site in SITES:
        made[site] = made["label"].where(made["site"] == site).astype("Int64")
    made["name"] = made["site"] + ":" + made["chrom"] + ":" + made["start"].astype(str) + ":" + made["strand"]
    inside = (made["start"] >= CONTEXT) & (made["end"] + CONTEXT <= size)
    return made[inside][["name", "chrom", "start", "end", "strand", *SITES]]


def sites_of(genome: Genome, row: Any) -> list[tuple[str, tuple[str, str, int]]]:
    start, stop = positions(genome, row)
    return [("acceptor", (row.chrom, row.strand, stop)), ("donor", (row.chrom, row.strand, start - 1))]


def prepare(folder: Path, per_site: int) -> Dataset:
    """The prepared dataset, and sites.csv beside it."""
    if (folder / "data").exists():
        return open_dataset(folder / "data")
    shared = Path(os.environ["SEQGRAFT_SHARED"]) / "data/yeast"
    genome = Genome.open(shared / "sacCer3.fa.gz")
    folder.mkdir(parents=True, exist_ok=True)
    table = introns(shared / "Saccharomyces_cerevisiae.R64-1-1.81.gtf.gz", genome)
    candidates(genome, table, per_site).to_csv(folder / "sites.csv", index=False)
    content = read_yaml(HERE / "data.yaml")
    content["files"] = [{"path": str(folder / "sites.csv")}]
    return prepare_source(parse_source(content), folder / "data")


@torch.no_grad()
def zero_shot(dataset: Dataset, rows: np.ndarray) -> dict[str, float]:
    """AUROC of the published network's own scores of acceptors and donors."""
    network = published()
    eye = torch.eye(6)[:, :4]
    scores = [
        network(eye[dataset.sample(part).codes.long()].transpose(1, 2)).log_softmax(1)[:, 1:, 0]
        for part in np.array_split(rows, max(1, len(rows) // 64))
    ]
    return {site: scored(dataset, rows, torch.cat(scores)[:, i].numpy(), i) for i, site in enumerate(SITES)}


def scored(dataset: Dataset, rows: np.ndarray, scores: np.ndarray, track: int) -> float:
    truth = dataset.raw_targets(rows)[:, track, 0]
    known = ~np.isnan(truth)
    return float(METRICS["auroc"].function(truth[known], scores[known]))


# ---- the comparison ----


def run(data: Path, folder: Path, method: str, init: str, seed: int, **train: Any) -> Path:
    """One run, or what is left to do of it; ``train`` replaces settings of the method."""
    settings = METHODS[method]
    fixed = {"batch_size": 32, "seed": seed, "augment": {"reverse_complement": False, "shift": 0}}
    train = fixed | settings["train"] | train
    adapter = dict(settings["adapter"])
    if init == "random" and method == "full":
        adapter["statistics"] = "batch"
    experiment = {
        "data": str(data),
        "model": {"name": SPEC.name, "init": init},
        "adapter": adapter,
        "train": train,
        "evaluate": {"fold": "test"},
    }
    folder = folder / f"{method} {init} {seed}".replace(" ", "-")
    if not (folder / "adapter").exists():
        fit_run(parse_experiment(experiment), folder, resume=folder.exists())
    return folder


def against_random(out: Path, method: str, seed: int, **train: Any) -> Evaluation:
    """The run from published weights, scored beside the same from random ones on the same rows."""
    first, random = (run(out / "data", out / "runs", method, init, seed, **train) for init in ("pretrained", "random"))
    opened = open_run(random)
    scratch = predict(opened.model, opened.dataset, opened.dataset.rows("test"))
    return evaluate_run(first, extra={"random weights": scratch})


def main(out: Path, seeds: int) -> None:
    register(SPEC.name, network, SPEC)
    dataset = prepare(out, per_site=5)
    rows = dataset.rows("test")
    print(dataset.regions["fold"].value_counts().to_dict(), zero_shot(dataset, rows), flush=True)
    for seed in range(1, seeds + 1):
        for method in METHODS:
            evaluation = against_random(out, method, seed)
            for name, table in (("metrics", evaluation.metrics), ("differences", evaluation.differences)):
                table.assign(seed=seed, method=method).to_csv(out / f"{name}-{method}-{seed}.csv".replace(" ", "-"))
            print(seed, method, flush=True)
            print(evaluation.metrics.query("metric in ('auroc', 'auprc') and track in @SITES").to_string(), flush=True)
            print(evaluation.differences.to_string(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
