"""Every way to fine-tune `yeast-mini` to diamide stress, beside training from scratch.

    python examples/yeast_diamide/compare.py OUT

Trains on chromosomes II, V and IX, chooses learning rates and checkpoints on X, and scores XIV and XVI, which neither
the trunk nor the adapters have seen. Each method tries three learning rates; training from scratch may take four times
as many epochs. Fold changes of held-out genes divide the predicted diamide signal by the YPD signal that the untouched
trunk predicts. Needs SEQGRAFT_SHARED; takes less than 25 minutes on two cores.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core per run, two runs at a time

import numpy as np
import pandas as pd

from seqgraft.data import Dataset, open_dataset, prepare_source
from seqgraft.evaluate import compare_runs
from seqgraft.experiment import parse_experiment, parse_source, read_yaml
from seqgraft.genes import (
    GeneBins,
    GeneSettings,
    expressed,
    fold_change,
    fold_change_ceiling,
    fold_change_scores,
    gene_bins,
    gene_signal,
    rest_of_merged,
    signal_table,
)
from seqgraft.genome import read_gtf
from seqgraft.models.weights import build_pretrained
from seqgraft.predict import predict
from seqgraft.run import evaluate_run, fit_run, open_run
from seqgraft.tracks import unsquash

HERE = Path(__file__).parent
ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV", "XV", "XVI"]
GENES = GeneSettings(around="start", upstream=250, downstream=250)
MERGED = ["diamide+", "diamide-", "ypd+", "ypd-"]
METHODS: dict[str, tuple[dict[str, object], tuple[float, ...]]] = {
    "linear probe": ({"adapter": {"kind": "linear_probe"}}, (1e-3, 3e-3, 1e-2)),
    "LoRA": ({"adapter": {"kind": "lora", "rank": 8, "where": ["attention", "conv"]}}, (1e-3, 3e-3, 1e-2)),
    "IA3": ({"adapter": {"kind": "ia3", "where": ["attention", "feedforward", "conv"]}}, (3e-3, 1e-2, 3e-2)),
    "Houlsby": ({"adapter": {"kind": "houlsby", "bottleneck": 8}}, (1e-3, 3e-3, 1e-2)),
    "full": ({"adapter": {"kind": "full"}}, (3e-4, 1e-3, 3e-3)),
    "scratch": (
        {
            "model": {"name": "yeast-mini", "init": "random"},
            "adapter": {"kind": "full", "statistics": "batch"},
            "train": {"epochs": 48, "patience": 12},
        },
        (1e-3, 3e-3, 1e-2),
    ),
}


def prepare(name: str, folder: Path) -> Dataset:
    """A prepared dataset, made if it is not there."""
    return open_dataset(folder) if folder.exists() else prepare_source(parse_source(read_yaml(HERE / name)), folder)


def train(method: str, lr: float, data: Path, folder: Path) -> float:
    """One run; returns its best validation score."""
    content = read_yaml(HERE / "experiment.yaml")
    settings = METHODS[method][0]
    content |= {key: value for key, value in settings.items() if key != "train"}
    content["data"] = str(data)
    content["train"] |= {**settings.get("train", {}), "lr": lr}  # type: ignore[dict-item]
    return fit_run(parse_experiment(content), folder, resume=folder.exists()).best_score


def score(folder: Path, observed: Path) -> dict[str, float]:
    """Evaluates a run; returns Pearson of held-out genes' fold changes with its interval."""
    evaluate_run(folder)
    run, genes = open_run(folder), open_dataset(observed)
    rows = run.dataset.rows("test")
    reference = build_pretrained(run.experiment.model, run.dataset.info)
    if reference is None:  # from scratch: the same denominator as everyone
        reference = build_pretrained(type(run.experiment.model)("yeast-mini"), run.dataset.info)
    assert reference is not None
    ypd = [reference.tracks.names.index(name) for name in ("stripe_ypd+", "stripe_ypd-")]
    values = [predict(run.model, run.dataset, rows), predict(reference, run.dataset, rows)[:, ypd]]
    merged = genes.select_tracks(genes.tracks.select(MERGED))
    raw = unsquash(np.concatenate(values, axis=1).astype(np.float64), merged.tracks, genes.info.bin_size)
    bins = gene_places(genes)
    truth = observed_change(merged, bins, merged.raw_targets(rows))
    signals = signal_table(merged.tracks)
    predicted = fold_change(gene_signal(bins, raw, signals), signals, "diamide", "ypd", GENES)
    found = fold_change_scores(truth, predicted)
    return {key: float(found[found["metric"] == "pearson"].iloc[0][key]) for key in ("value", "low", "high")}


def gene_places(genes: Dataset) -> GeneBins:
    """The bins around the starts of the genes of the test chromosomes."""
    gtf = Path(os.environ["SEQGRAFT_SHARED"]) / "data/yeast/Saccharomyces_cerevisiae.R64-1-1.81.gtf.gz"
    exons = read_gtf(gtf, rename={name: f"chr{name}" for name in ROMAN} | {"Mito": "chrM"})
    return gene_bins(exons, genes.regions.iloc[genes.rows("test")], genes.info.bins, genes.info.bin_size, GENES)


def observed_change(merged: Dataset, bins: GeneBins, raw: np.ndarray) -> pd.Series:
    """Observed log2 diamide/YPD of expressed genes."""
    signals = signal_table(merged.tracks)
    signal = gene_signal(bins, raw, signals)
    return fold_change(signal, signals, "diamide", "ypd", GENES)[expressed(signal, signals, ("diamide", "ypd"), GENES)]


def ceiling(genes: Dataset) -> str:
    """What replicate 1 against the other replicates says about fold changes of the merged data."""
    rows, bins = genes.rows("test"), gene_places(genes)
    merged = genes.select_tracks(genes.tracks.select(MERGED))
    first = genes.select_tracks(genes.tracks.select([f"{name[:-1]}_rep1{name[-1]}" for name in MERGED]))
    whole, part = merged.raw_targets(rows), first.raw_targets(rows)
    kept = observed_change(merged, bins, whole).index
    depth = merged.tracks.column("depth") - first.tracks.column("depth")
    rest = merged.tracks.replace(depth=depth)
    change = [
        fold_change(gene_signal(bins, raw, signal_table(tracks)), signal_table(tracks), "diamide", "ypd", GENES)[kept]
        for raw, tracks in ((part, first.tracks), (rest_of_merged(whole, part), rest))
    ]
    found = fold_change_ceiling(*change, (float(first.tracks.column("depth").sum()), float(depth.sum())))
    return (
        f"Fold changes: replicate 1 against the others correlates at {found.replicates:.3f} over {found.genes} genes; "
        f"by Spearman-Brown, {found.reliability:.3f} for an equal experiment and {found.perfect:.3f} for a perfect "
        "prediction."
    )


def interval(value: float, low: float, high: float) -> str:
    """A number with its 95 % interval."""
    return f"{value:.3f} ({low:.3f} to {high:.3f})" if low == low else f"{value:.3f}"


def line(name: str, metrics: pd.DataFrame, model: str) -> dict[str, str]:
    """One model's line: Pearson on both scales, and how far the pretrained tracks have moved."""
    means = metrics[(metrics["model"] == model) & (metrics["track"] == "")]
    row = {"method": name}
    for column, unit, metric in (
        ("Pearson, squashed", "squashed", "pearson"),
        ("Pearson, raw", "raw", "pearson"),
        ("old tracks kept", "squashed", "agreement"),
    ):
        found = means[(means["unit"] == unit) & (means["metric"] == metric)]
        row[column] = interval(*(float(found.iloc[0][key]) for key in ("value", "low", "high"))) if len(found) else ""
    return row


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(out: Path) -> None:
    """Prepares, trains, scores and writes OUT/table.md."""
    began = time.monotonic()
    data, observed = out / "data" / "yeast-diamide", out / "data" / "yeast-stripe"
    prepare("data.yaml", data)
    genes = prepare("genes.data.yaml", observed)
    jobs = sorted(((m, lr) for m, (_, rates) in METHODS.items() for lr in rates), key=lambda job: job[0] != "scratch")
    folders = {job: out / "runs" / f"{job[0].replace(' ', '-')}-{job[1]:g}" for job in jobs}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = {job: pool.submit(train, *job, data, folders[job]) for job in jobs}
        scores = {job: future.result() for job, future in futures.items()}
        best = {m: max(rates, key=lambda lr: scores[m, lr]) for m, (_, rates) in METHODS.items()}
        changes = list(pool.map(score, [folders[m, lr] for m, lr in best.items()], [observed] * len(best)))
    rows: list[dict[str, str]] = []
    baselines: list[dict[str, str]] = []
    scratch = folders["scratch", best["scratch"]]
    for (method, lr), change in zip(best.items(), changes, strict=True):
        folder = folders[method, lr]
        metrics = pd.read_parquet(folder / "evaluation" / "metrics.parquet")
        facts = json.loads((folder / "environment.json").read_text())
        row = line(method, metrics, facts["label"])
        if method != "scratch":
            gain = compare_runs(folder, scratch)
            row["above scratch"] = interval(gain.mean, gain.mean_low, gain.mean_high)
        if method == "linear probe":
            baselines = [line(name, metrics, name) for name in metrics["model"].unique() if name != facts["label"]]
        row["fold change of genes"] = interval(change["value"], change["low"], change["high"])
        row["trains"] = f"{sum(facts['counts'][part] for part in ('adapter', 'head', 'trunk')):,}"
        row["learning rate"] = f"{lr:g}"
        rows.append(row)
    table = pd.DataFrame(rows + baselines).fillna("")
    minutes = (time.monotonic() - began) / 60
    text = "\n\n".join([markdown(table), ceiling(genes), f"Everything took {minutes:.1f} minutes."]) + "\n"
    (out / "table.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "yeast-diamide"))
