"""``seqgraft demo``: the whole way on simulated data whose truth is known, from raw files to a report.

A new genome with two conditions is simulated; the bundled trunk ``sim-mini`` has seen neither, only other conditions on
another genome of the same grammar. A linear probe and LoRA are fitted to it, beside the same network from scratch with
the same training, and every score stands beside the oracle that made the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.adapters import Adapter, FullFineTune, LinearProbe, LoRA
from seqgraft.data import Dataset, prepare_source
from seqgraft.data.augment import Augmentation
from seqgraft.data.coverage import CoverageSource
from seqgraft.data.folds import Folds
from seqgraft.data.simulate import Simulation, Truth, simulate, variant_windows
from seqgraft.errors import RunError
from seqgraft.evaluate import EvaluateConfig
from seqgraft.experiment import Experiment
from seqgraft.metrics import METRICS
from seqgraft.models.weights import ModelConfig
from seqgraft.oracle import motif_difference, oracle
from seqgraft.plan import plan_run
from seqgraft.predict import predict
from seqgraft.report import write_comparison
from seqgraft.run import build_run, evaluate_run, fit_run, open_run
from seqgraft.sample import Sample
from seqgraft.tracks import squash

__all__ = ["run_demo"]

TRUNK = "sim-mini"
WINDOW, TARGET, BIN = 5120, 4096, 16
_METHODS: dict[str, tuple[Adapter, ModelConfig, float]] = {
    "linear-probe": (LinearProbe(), ModelConfig(TRUNK), 1e-2),
    "lora": (LoRA(rank=8, where=("attention", "conv")), ModelConfig(TRUNK), 3e-3),
    "scratch": (FullFineTune(statistics="batch"), ModelConfig(TRUNK, init="random"), 3e-3),
}


def run_demo(folder: Path, say: Callable[[str], None]) -> Path:
    """Runs everything into a new folder; returns the report's path.

    Raises:
        RunError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise RunError("the demo's folder exists already", str(folder), remedy="Give another one: seqgraft demo FOLDER")
    say("1/6  Simulating a genome with two conditions, naive and activated.")
    truth = simulate(Simulation(seed=1), folder / "simulation")
    say("2/6  Preparing the tracks.")
    source = CoverageSource(
        fasta=folder / "simulation" / "genome.fa",
        tracks=folder / "simulation" / "tracks.csv",
        window=WINDOW,
        target_length=TARGET,
        bin_size=BIN,
        folds=Folds(by="chromosome", valid=("chr6",), test=("chr7", "chr8")),
    )
    dataset = prepare_source(source, folder / "data")
    experiments = {name: _experiment(folder / "data", *method) for name, method in _METHODS.items()}
    say("3/6  Planning.")
    plan = plan_run(experiments["lora"], folder / "runs" / "lora")
    for name in ("data", "model", "trains", "leak exposure", "memory", "time"):
        say(f"     {name}: {plan.facts[name]}")
    say("4/6  Fitting a linear probe, LoRA, and the same network from scratch.")
    for name, experiment in experiments.items():
        result = fit_run(experiment, folder / "runs" / name)
        say(f"     {name}: best validation score {result.best_score:.3f}, {result.seconds:.0f} s")
    say("5/6  Evaluating on chromosomes that no model has seen, beside baselines and the oracle.")
    rows = dataset.rows("test")
    untrained, _ = build_run(experiments["lora"], dataset)
    beside = {"oracle": _oracle(truth, dataset, rows), "untrained head": predict(untrained, dataset, rows)}
    for name in experiments:
        metrics = evaluate_run(folder / "runs" / name, extra=beside).metrics
        shown = metrics[(metrics["metric"] == "pearson") & (metrics["track"] == "") & (metrics["unit"] == "squashed")]
        for row in (shown if name == "lora" else shown.groupby("group").head(1)).to_dict("records"):
            interval = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            say(f"     {row['group']:<5} {row['model']:<26} Pearson {interval}")
    variants = score_variants(truth, folder)
    variants.to_csv(folder / "variants.csv", index=False)
    say("     Causal variants among look-alikes and decoys, by the size of the predicted change:")
    for row in variants.to_dict("records"):
        say(f"     {row['model']:<32} AUROC {row['auroc']:.3f}")
    say("6/6  Writing the report.")
    page = write_comparison([folder / "runs" / name for name in experiments], folder / "report.html")
    say(f"The report is {page}.")
    return page


def _experiment(data: Path, adapter: Adapter, model: ModelConfig, lr: float) -> Experiment:
    experiment = Experiment(data=data, model=model, adapter=adapter, evaluate=EvaluateConfig(draws=500))
    return replace(
        experiment,
        train=replace(
            experiment.train,
            lr=lr,
            batch_size=16,
            epochs=8,
            patience=0,
            precision="bf16",
            augment=Augmentation(shift=3),
        ),
    )


def _oracle(truth: Truth, dataset: Dataset, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """What the rules of the simulation expect for these regions, on the model's scale."""
    codes, _ = dataset.sequences(rows)
    margin = (WINDOW - TARGET) // 2 // BIN
    signal = oracle(codes, truth.simulation.conditions, BIN)[:, :, margin : margin + dataset.info.bins]
    return np.asarray(squash(signal, dataset.tracks, BIN), dtype=np.float32)


def score_variants(truth: Truth, folder: Path) -> pd.DataFrame:
    """AUROC of causal against neutral, decoy and background variants, by the largest change of any track.

    The change of a track is ``log2((alternate + 1) / (reference + 1))`` of its signal within 256 bp of the variant.
    """
    import torch

    table = truth.variants()
    run = open_run(folder / "runs" / "lora")
    untrained, _ = build_run(run.experiment, run.dataset)
    genome = run.dataset.genome
    assert genome is not None
    chromosomes = {name: np.asarray(genome.chrom_codes(name)) for name in genome.chroms}
    windows = variant_windows(chromosomes, table, WINDOW)
    centre = slice(TARGET // 2 // BIN - 256 // BIN, TARGET // 2 // BIN + 256 // BIN)

    def of(predict: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.floating]]) -> npt.NDArray[np.floating]:
        reference, alternate = (predict(codes)[:, :, centre].sum(-1) for codes in windows)
        change: npt.NDArray[np.floating] = np.abs(np.log2((alternate + 1) / (reference + 1))).max(axis=1)
        return change

    def model_of(model: torch.nn.Module) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.floating]]:
        def of_codes(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.floating]:
            parts = []
            for start in range(0, len(codes), 32):
                batch = torch.from_numpy(np.ascontiguousarray(codes[start : start + 32]))
                lengths = torch.full((len(batch),), batch.shape[1])
                nothing = torch.zeros(0)
                sample = Sample(batch, lengths, lengths, nothing, nothing)
                with torch.inference_mode():
                    parts.append(model.predict(sample).numpy())  # type: ignore[operator]
            return np.concatenate(parts)

        return of_codes

    margin = (WINDOW - TARGET) // 2 // BIN
    conditions = truth.simulation.conditions
    scores = {
        "oracle": of(lambda codes: oracle(codes, conditions, BIN)[:, :, margin : margin + TARGET // BIN]),
        run.experiment.adapter.label: of(model_of(run.model)),
        "motif difference": np.abs(motif_difference(*windows)),
        "untrained head": of(model_of(untrained.eval())),
        "from scratch": of(model_of(open_run(folder / "runs" / "scratch").model)),
    }
    causal = (table["kind"] == "causal").to_numpy(dtype=np.float64)
    auroc = METRICS["auroc"].function
    return pd.DataFrame(
        [{"model": name, "auroc": auroc(causal, score), "variants": len(table)} for name, score in scores.items()]
    )
