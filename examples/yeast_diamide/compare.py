"""Every way to fine-tune `yeast-mini` to diamide stress, beside training from scratch.

    python examples/yeast_diamide/compare.py OUT

Trains on chromosomes II, V and IX, chooses learning rates and checkpoints on X, and scores XIV and XVI, which neither
the trunk nor the adapters have seen. Each method tries three learning rates; training from scratch may take four times
as many epochs. Needs SEQGRAFT_SHARED; takes less than 25 minutes on two cores.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core per run, two runs at a time

HERE = Path(__file__).parent
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


def train(method: str, lr: float, data: Path, folder: Path) -> float:
    """One run; returns its best validation score."""
    import torch

    from seqgraft.experiment import parse_experiment, read_yaml
    from seqgraft.run import fit_run

    torch.set_num_threads(1)
    content = read_yaml(HERE / "experiment.yaml")
    settings = METHODS[method][0]
    content |= {key: value for key, value in settings.items() if key != "train"}
    content["data"] = str(data)
    content["train"] |= {**settings.get("train", {}), "lr": lr}  # type: ignore[dict-item]
    return fit_run(parse_experiment(content), folder, resume=folder.exists()).best_score


def score(folder: Path) -> None:
    """Evaluates a run."""
    import torch

    from seqgraft.run import evaluate_run

    torch.set_num_threads(1)
    if not (folder / "evaluation").exists():
        evaluate_run(folder)


def ceiling(data: Path) -> dict[str, float]:
    """What replicate 1 against the other replicates says about fold changes of the merged data."""
    from seqgraft.data import open_dataset, prepare_source
    from seqgraft.experiment import parse_experiment, parse_source, read_yaml
    from seqgraft.genes import (
        expressed,
        fold_change,
        fold_change_ceiling,
        gene_bins,
        gene_signal,
        rest_of_merged,
        signal_table,
    )
    from seqgraft.genome import read_gtf

    source = read_yaml(HERE / "data.yaml")
    for row in source["tracks"]:
        row["file"] = row["file"].replace("diamide_", "diamide_rep1_").replace("ypd_", "ypd_rep1_")
    folder = data.with_name("yeast-diamide-rep1")
    first = open_dataset(folder) if folder.exists() else prepare_source(parse_source(source), folder)
    merged = open_dataset(data)
    genes = parse_experiment({**read_yaml(HERE / "experiment.yaml"), "data": str(data)}).evaluate.genes
    assert genes is not None
    rows = merged.rows("test")
    exons = read_gtf(genes.gtf, rename=genes.rename)
    bins = gene_bins(exons, merged.regions.iloc[rows], merged.info.bins, merged.info.bin_size, genes.settings)
    whole, part = merged.raw_targets(rows), first.raw_targets(rows)
    depth = {"whole": merged.tracks.column("depth"), "part": first.tracks.column("depth")}
    tables = {
        "whole": (whole, merged.tracks),
        "first": (part, first.tracks),
        "rest": (rest_of_merged(whole, part), merged.tracks.replace(depth=depth["whole"] - depth["part"])),
    }
    signals = {name: signal_table(tracks) for name, (_, tracks) in tables.items()}
    values = {name: gene_signal(bins, raw, signals[name]) for name, (raw, _) in tables.items()}
    high = expressed(values["whole"], signals["whole"], ("diamide", "ypd"), genes.settings)
    change: dict[str, pd.Series] = {
        n: fold_change(values[n], signals[n], "diamide", "ypd", genes.settings)[high] for n in ("first", "rest")
    }
    found = fold_change_ceiling(
        change["first"], change["rest"], (float(depth["part"].sum()), float((depth["whole"] - depth["part"]).sum()))
    )
    return {
        "replicates": found.replicates,
        "reliability": found.reliability,
        "perfect": found.perfect,
        "genes": found.genes,
    }


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})" if low == low else f"{value:.3f}"


def _row(name: str, metrics: pd.DataFrame, genes: pd.DataFrame, model: str) -> dict[str, str]:
    """One model's line: Pearson per group of tracks on the squashed scale, and of held-out genes' fold changes."""
    chosen = metrics[(metrics["model"] == model) & (metrics["unit"] == "squashed") & (metrics["track"] == "")]
    scores = chosen[chosen["metric"] == "pearson"].set_index("group")
    change = genes[(genes["model"] == model) & (genes["level"] == "genes_fold_change") & (genes["metric"] == "pearson")]
    row = {"method": name} | {
        group: _interval(*(float(scores.loc[group, c]) for c in ("value", "low", "high")))
        for group in ("diamide", "ypd")
    }
    lost = chosen[chosen["metric"] == "agreement"]["value"]
    row["fold change"] = _interval(*(float(change.iloc[0][c]) for c in ("value", "low", "high"))) if len(change) else ""
    return row | ({"old tracks kept": f"{lost.iloc[0]:.3f}"} if len(lost) else {})


def _markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(out: Path) -> None:
    """Prepares, trains, scores and writes OUT/table.md."""
    from seqgraft.data import prepare_source
    from seqgraft.evaluate import compare_runs
    from seqgraft.experiment import parse_source, read_yaml

    began = time.monotonic()
    data = out / "data" / "yeast-diamide"
    if not data.exists():
        prepare_source(parse_source(read_yaml(HERE / "data.yaml")), data)
    jobs = sorted(((m, lr) for m, (_, rates) in METHODS.items() for lr in rates), key=lambda job: job[0] != "scratch")
    folders = {job: out / "runs" / f"{job[0].replace(' ', '-')}-{job[1]:g}" for job in jobs}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = {job: pool.submit(train, *job, data, folders[job]) for job in jobs}
        scores = {job: future.result() for job, future in futures.items()}
        best = {m: max(rates, key=lambda lr: scores[m, lr]) for m, (_, rates) in METHODS.items()}
        list(pool.map(score, [folders[m, lr] for m, lr in best.items()]))
    rows = []
    scratch = folders["scratch", best["scratch"]]
    for method, lr in best.items():
        folder = folders[method, lr]
        metrics = pd.read_parquet(folder / "evaluation" / "metrics.parquet")
        genes = pd.read_parquet(folder / "evaluation" / "genes.parquet")
        facts = json.loads((folder / "environment.json").read_text())
        rows.append(
            _row(method, metrics, genes, facts["label"])
            | {
                "lr": f"{lr:g}",
                "trains": f"{facts['counts']['adapter'] + facts['counts']['head'] + facts['counts']['trunk']:,}",
            }
        )
        if method != "scratch":
            difference = compare_runs(folder, scratch, tracks=["diamide+", "diamide-"])
            rows[-1]["above scratch"] = _interval(difference.mean, difference.mean_low, difference.mean_high)
        else:
            baselines = [
                _row(name, metrics, genes, name) for name in metrics["model"].unique() if name != facts["label"]
            ]
    table = pd.DataFrame(rows + baselines).fillna("")
    limit = ceiling(data)
    minutes = (time.monotonic() - began) / 60
    text = [
        _markdown(table),
        "",
        f"Fold changes: replicate 1 against the others correlates at {limit['replicates']:.3f} over "
        f"{limit['genes']} genes (by Spearman-Brown, "
        f"{limit['reliability']:.3f} for an equal experiment, {limit['perfect']:.3f} for a perfect prediction).",
        f"Everything took {minutes:.1f} minutes.",
    ]
    (out / "table.md").write_text("\n".join(text) + "\n")
    sys.stdout.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "yeast-diamide"))
