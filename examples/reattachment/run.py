"""A trained Baskerville network, a quarter of its tracks taken off its head and grafted on again by every adapter.

    python examples/reattachment/run.py OUT

A check that every method works end to end on published weights, and no evidence of transfer: the trunk has seen these
tracks, and perhaps these windows, in its own training. Every fourth track of the network's table (both strands of a
pair count as one) is held out of its head; new heads for them are trained on the training windows, the learning rate
is chosen on the validation windows, and the test windows are scored. Needs SEQGRAFT_SHARED; takes about half an hour
on one core, and leaves OUT/table.md, OUT/per-assay.md and OUT/figure.svg.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch

from seqgraft.adapters import merge
from seqgraft.controls import baseline_predictions
from seqgraft.data import Dataset, open_dataset
from seqgraft.data.dataset import DatasetInfo, hash_file, write_dataset
from seqgraft.data.tables import read_track_table
from seqgraft.evaluate import EvaluateConfig
from seqgraft.experiment import parse_experiment, read_yaml
from seqgraft.intervals import Estimate, bootstrap_interval, paired_bootstrap
from seqgraft.metrics import Moments
from seqgraft.models.base import SequenceModel
from seqgraft.models.baskerville import convert_baskerville
from seqgraft.models.folders import save_model
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.plots import THEME, model_dots, svg
from seqgraft.predict import predict
from seqgraft.run import evaluate_run, fit_run, open_run
from seqgraft.tracks import TrackTable, unsquash

HERE = Path(__file__).parent
EVERY = 4  # one track of so many is held out
FOLDS = ("train", "valid", "test")
LICENCE = "Apache-2.0"
CITATION = "calico/baskerville, tests/data/eval"
TITLE = (
    "A re-attachment check on a trunk that has seen these tracks (and perhaps these windows), not evidence of transfer."
)
PROBE, SCRATCH, PUBLISHED = "linear probe", "from random weights (full)", "the published head"
LORA = "LoRA (attention)"
#: Settings, and the learning rates to try, or the method whose rate is taken.
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...] | str]] = {
    PROBE: ({"adapter": {"kind": "linear_probe"}}, (3e-3, 1e-2, 3e-2)),
    LORA: ({"adapter": {"kind": "lora"}}, (3e-4, 1e-3, 3e-3)),
    "LoRA (Baskerville)": (
        {"adapter": {"kind": "lora", "rank": 8, "alpha": 16, "where": ["attention.query", "attention.value"]}},
        LORA,
    ),
    "LoCon4 (Baskerville)": (
        {
            "adapter": {
                "kind": "lora",
                "rank": 8,
                "alpha": 16,
                "where": ["attention.query", "attention.value", "conv"],
                "last": 4,
                "conv_rank": 4,
                "conv_alpha": 1,
            }
        },
        LORA,
    ),
    "DoRA (attention)": ({"adapter": {"kind": "lora", "dora": True}}, LORA),
    "QLoRA nf4 (attention)": ({"adapter": {"kind": "lora", "quantize": "nf4"}}, LORA),
    "IA3": ({"adapter": {"kind": "ia3"}}, (1e-2,)),
    "Houlsby": ({"adapter": {"kind": "houlsby"}}, LORA),
    "Houlsby + SE4": ({"adapter": {"kind": "houlsby", "squeeze_excite": 16, "last": 4}}, LORA),
    "full": ({"adapter": {"kind": "full"}}, (1e-4,)),
    SCRATCH: (
        {"adapter": {"kind": "full", "statistics": "batch"}, "model": {"name": "trunk", "init": "random"}},
        (1e-3,),
    ),
}


# ---- data and model ----


def network() -> Path:
    """The folder with the weights, the table of targets and the windows."""
    return Path(os.environ["SEQGRAFT_SHARED"]) / "reference" / "parity" / "trained_0.6M"


def held_out(tracks: TrackTable) -> list[str]:
    """Every fourth track, from the first; the two strands of a pair are one."""
    pairs = list(dict.fromkeys(frozenset(pair) for pair in zip(tracks.names, tracks.frame["strand_pair"], strict=True)))
    chosen = {name for pair in pairs[::EVERY] for name in pair}
    return [name for name in tracks.names if name in chosen]


def build_dataset(folder: Path, names: list[str] | None = None) -> Dataset:
    """The windows, with some of the tracks or all, as a prepared dataset.

    The files hold targets as the network was trained on them: scaled, square roots for all but DNase, soft-clipped,
    float16, rounded to 2 decimals. Raw sums are what the inverse of that gives, so that reading the dataset gives the
    stored values back. Which row of ``sequences.bed`` a window is, is not recorded: windows have no coordinates.
    """
    table = read_track_table(network() / "targets.txt")
    tracks = table.select(names or table.names)
    index = [table.names.index(name) for name in tracks.names]
    codes, targets, regions, sources = [], [], [], [hash_file(network() / "targets.txt")]
    for fold in FOLDS:
        path = network() / f"tiny_hg38_{fold}.npz"
        with np.load(path, allow_pickle=False) as stored:
            codes.append(stored["seq_index"])
            targets.append(stored["targets"][:, :, index].transpose(0, 2, 1).astype(np.float64))
        names_of = [f"{fold}_{number}" for number in range(len(codes[-1]))]
        regions.append(pd.DataFrame({"name": names_of, "fold": fold}))
        sources.append(hash_file(path))
    values, windows = np.concatenate(targets), np.concatenate(codes)
    info = DatasetInfo("coverage", windows.shape[1], values.shape[2], 32, sources=sources)
    with write_dataset(folder, values.shape) as writer:
        writer.targets[:] = unsquash(values, tracks, info.bin_size)
        lengths = np.full(len(windows), windows.shape[1], dtype=np.int64)
        places = pd.concat(regions, ignore_index=True).assign(chrom="", start=0, end=0, strand="+")
        writer.finish(info, places, tracks, codes=windows, lengths=lengths)
    return open_dataset(folder)


def build_models(out: Path, kept: Dataset) -> None:
    """OUT/published, the network as it is, and OUT/trunk, whose head has only the tracks that were kept."""
    files = network()
    convert_baskerville(
        files / "model.h5", files / "params.json", out / "published", files / "targets.txt",
        name="trained-0.6M", licence=LICENCE, citation=CITATION,
    )  # fmt: skip
    whole = build_model(ModelConfig(str(out / "published"), head="pretrained"), kept.tracks, kept.info)
    heads = {
        name.removeprefix("continued_"): head for name, head in whole.heads.items() if name.startswith("continued_")
    }
    save_model(
        SequenceModel(whole.trunk, heads, kept.tracks),
        out / "trunk", name="trained-0.6M without held-out tracks", info=kept.info, licence=LICENCE, citation=CITATION,
        trained_on=None, card="The trunk of `trained-0.6M`, and of its head the tracks that were not held out.\n",
    )  # fmt: skip


# ---- runs ----


@dataclass(frozen=True)
class Trained:
    """One run, and what it reached on the validation windows."""

    folder: Path
    lr: float
    valid: float


def train(out: Path, method: str, lr: float, head_lr: float) -> Trained:
    """Fits a method, or goes on where that was left."""
    folder = out / "runs" / f"{''.join(c if c.isalnum() else '-' for c in method)}-{lr:g}"
    content = read_yaml(HERE / "experiment.yaml") | METHODS[method][0]
    content["data"], content["model"]["name"] = str(out / content["data"]), str(out / "trunk")
    content["train"] |= {"lr": lr, "head_lr": head_lr}
    content["evaluate"]["original"] = str(out / content["evaluate"]["original"])
    if method == SCRATCH:  # it never knew the other tracks
        del content["evaluate"]["original"]
    if not (folder / "adapter").exists():
        fit_run(parse_experiment(content), folder, resume=folder.exists())
    valid = float(pd.read_csv(folder / "log.csv")["valid_score"].max())
    sys.stderr.write(f"{method}, learning rate {lr:g}: {valid:.4f} on the validation windows\n")
    return Trained(folder, lr, valid)


def train_all(out: Path) -> dict[str, Trained]:
    """The best run of each method on the validation windows; all heads train at the linear probe's best rate."""
    best: dict[str, Trained] = {}
    for method, (_, rates) in METHODS.items():
        tried = (best[rates].lr,) if isinstance(rates, str) else rates
        runs = [train(out, method, lr, best[PROBE].lr if best else lr) for lr in tried]
        best[method] = max(runs, key=lambda run: run.valid)
    return best


def merged_difference(folder: Path) -> float:
    """Largest change of the predictions for a test window when the adapter is merged, relative to the largest one."""
    run = open_run(folder)
    rows = run.dataset.rows("test")[:1]
    before = predict(run.model, run.dataset, rows)
    merge(run.model)
    return float(np.abs(predict(run.model, run.dataset, rows) - before).max() / np.abs(before).max())


# ---- scores ----


def moments_of(folder: Path) -> Moments:
    """What evaluating a run left."""
    with np.load(folder / "evaluation" / "moments.npz", allow_pickle=False) as stored:
        return Moments(stored["rows"], stored["moments"])


def references(out: Path, dataset: Dataset) -> dict[str, Moments]:
    """The baselines and the network's own head on the same tracks and windows."""
    rows, config = dataset.rows("test"), EvaluateConfig(ensemble=parse_experiment(_base(out)).evaluate.ensemble)
    start = ModelConfig(str(out / "trunk"))
    found = baseline_predictions(dataset, rows, start, None, config.ensemble, config.batch_size, torch.device("cpu"))
    whole = build_model(ModelConfig(str(out / "published"), head="pretrained"), dataset.tracks, dataset.info)
    found[PUBLISHED] = predict(whole, dataset, rows, ensemble=config.ensemble)[:, : len(dataset.tracks)]
    truth = dataset.squashed_targets(rows).astype(np.float64)
    return {name: Moments.of(truth, values.astype(np.float64), None, rows) for name, values in found.items()}


def _base(out: Path) -> dict[str, Any]:
    content = read_yaml(HERE / "experiment.yaml")
    return content | {"data": str(out / content["data"]), "model": {"name": str(out / "trunk")}}


def of_tracks(moments: Moments, index: list[int]) -> Moments:
    return replace(moments, sums=moments.sums[:, :, index])


def in_words(estimate: Estimate) -> str:
    """The mean over tracks with its interval."""
    return f"{estimate.mean:.3f} ({estimate.mean_low:.3f} to {estimate.mean_high:.3f})"


def facts_of(run: Trained) -> dict[str, str]:
    """What a run trained, weighs, kept and merges into."""
    counts = json.loads((run.folder / "environment.json").read_text())["counts"]
    size = (run.folder / "adapter" / "weights.safetensors").stat().st_size
    metrics = pd.read_parquet(run.folder / "evaluation" / "metrics.parquet")
    forgetting = metrics[(metrics["metric"] == "forgetting") & (metrics["track"] != "")]
    mergeable = open_run(run.folder).experiment.adapter.mergeable
    changes = counts["adapter"] > 0
    return {
        "other tracks": f"{forgetting['value'].mean():+.3f}" if len(forgetting) else "",
        "merged": ("no" if not mergeable else f"{merged_difference(run.folder):.0e}") if changes else "",
        "trains": f"{counts['adapter'] + counts['head'] + counts['trunk']:,}",
        "of them heads": f"{counts['head']:,}",
        "file": f"{size / 1000:,.0f} kB",
        "learning rate": f"{run.lr:g}",
        "valid": f"{run.valid:.3f}",
    }


def tables(out: Path, dataset: Dataset, best: dict[str, Trained]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The main table, Pearson per assay, and what the figure shows."""
    found = {method: moments_of(run.folder) for method, run in best.items()}
    others = references(out, dataset)
    blocks = np.arange(len(dataset.rows("test")))
    main, assays, dots = [], [], []
    for method, moments in {**found, **others}.items():
        estimate = bootstrap_interval(moments, "pearson", blocks)
        gain = "" if method == PROBE else in_words(paired_bootstrap(moments, found[PROBE], "pearson", blocks))
        row = {"method": method, "Pearson": in_words(estimate), "above linear probe": gain}
        main.append(row | (facts_of(best[method]) if method in best else {}))
        assays.append({"method": method} | {
            f"{group} ({len(index)})": in_words(bootstrap_interval(of_tracks(moments, index), "pearson", blocks))
            for group, index in dataset.tracks.groups.items()
        })  # fmt: skip
        group = "control" if method == SCRATCH else "graft" if method in best else "baseline"
        group = "reference" if method == PUBLISHED else group
        dots.append((method, estimate.mean, estimate.mean_low, estimate.mean_high, group))
    figure = pd.DataFrame(dots, columns=["model", "value", "low", "high", "group"])
    return pd.DataFrame(main).fillna(""), pd.DataFrame(assays), figure.sort_values("value", ascending=False)


def draw(frame: pd.DataFrame) -> str:
    """The figure as a file of its own: on white, in plain colours."""
    grafts = frame[frame["group"] == "graft"]["value"]
    own = frame.set_index("model")["value"]
    title = (
        f"Re-attached, the tracks reach {grafts.min():.3f} to {grafts.max():.3f}; "
        f"the published head has {own[PUBLISHED]:.3f}, training from random weights {own[SCRATCH]:.3f}"
    )
    xlabel = "Pearson on 10 test windows"
    groups = ["graft", "control", "baseline", "reference"]
    text = svg(model_dots(frame, title=title, xlabel=xlabel, groups=groups), "reattachment", title)
    for colour, variable in THEME.items():
        text = text.replace(f"var({variable})", colour)
    return text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: #fff" ', 1)


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def main(out: Path) -> None:
    """Prepares, trains, scores, writes the tables and the figure."""
    began = time.process_time()
    table = read_track_table(network() / "targets.txt")
    out_names = held_out(table)
    folders = {"held-out": out_names, "kept": [name for name in table.names if name not in out_names]}
    data = {
        name: open_dataset(folder) if (folder := out / "data" / name).exists() else build_dataset(folder, names)
        for name, names in folders.items()
    }
    if not (out / "trunk").exists():
        build_models(out, data["kept"])
    best = train_all(out)
    for run in best.values():
        if not (run.folder / "evaluation").exists():
            evaluate_run(run.folder)
    table, assays, figure = tables(out, data["held-out"], best)
    (out / "table.md").write_text(f"{TITLE}\n\n{markdown(table)}")
    (out / "per-assay.md").write_text(markdown(assays))
    (out / "figure.svg").write_text(draw(figure))
    sys.stdout.write(f"{TITLE}\n\n{markdown(table)}\n{markdown(assays)}\n")
    sys.stdout.write(f"It took {(time.process_time() - began) / 60:.0f} minutes of one core.\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "reattachment"))
