"""Expression of yeast segregants: from files to reports. ``SEQGRAFT_SHARED=... python run.py OUT``

Two recipes beside linear models on dosage and the trunk's own tracks: a frozen trunk, and full fine-tuning. Everything
goes into OUT: the prepared data, both runs with their reports, and one page for both.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pandas as pd

from seqgraft.agreement import Measured
from seqgraft.apply import effects_run
from seqgraft.effects import EffectsConfig
from seqgraft.experiment import read_experiment
from seqgraft.plan import plan_run
from seqgraft.report import write_report
from seqgraft.run import evaluate_run, fit_run, prepare

HERE = Path(__file__).parent
RECIPES = ("frozen", "full")
FOLDS = {
    "test": "segregants for testing, genes of training",
    "unseen_genes": "segregants of training, genes of chromosomes XIV and XVI",
    "unseen_both": "segregants for testing, genes of chromosomes XIV and XVI",
}


def main(out: Path) -> None:
    """Prepares, trains, evaluates and reports; prints what the README of the results says."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    if not Path("data/segregants").exists():
        prepare(HERE / "data.yaml", Path("data/segregants"))
    for recipe in RECIPES:
        folder = Path("runs") / recipe
        if not (folder / "evaluation").exists():
            experiment = read_experiment(HERE / f"{recipe}.yaml")
            for problem in plan_run(experiment).problems:
                raise problem
            fit_run(experiment, folder, resume=(folder / "checkpoints").exists())
            evaluate_run(folder)
        write_report(folder)
    write_report(Path("runs"))
    print(table(Path("runs")))
    print("\nEffects of promoter variants beside a reporter assay (Renganaath et al. 2020)\n")
    print(beside_reporters(Path("effects")).to_string(index=False))
    print(f"\n{(time.monotonic() - began) / 60:.0f} minutes in all.")


def beside_reporters(out: Path) -> pd.DataFrame:
    """What the fully tuned network says of each variant, and the linear models, beside measured effects."""
    if not out.exists():
        measured = Measured(
            Path(
                os.environ["SEQGRAFT_SHARED"],
                "data/personal/yeast_segregants/mpra_promoter_variants_renganaath2020.tsv.gz",
            ),
            chrom="chr",
            position="pos",
            effect="logFC",
            gene="gene",
            significant="adj.P.Val",
            below=0.05,
        )
        effects_run(Path("runs/full"), out, EffectsConfig(measured=measured))
    found = pd.read_parquet(out / "agreement.parquet")
    return found[found["fold"] == "all"]


def table(runs: Path) -> str:
    """Mean correlation within genes, with intervals; and the effect of the haplotype across genes."""
    parts = [pd.read_parquet(runs / recipe / "evaluation" / "metrics.parquet") for recipe in RECIPES]
    metrics = pd.concat(parts).drop_duplicates(["model", "fold", "metric"])
    lines = []
    for metric, title in (
        ("pearson_within_genes", "Pearson across segregants, mean over genes"),
        ("haplotype_effect", "Pearson across genes of the difference between the two haplotypes"),
    ):
        chosen = metrics[metrics["metric"] == metric]
        lines += [f"\n{title}\n", f"| model | {' | '.join(FOLDS.values())} |", "|---|" + "---|" * len(FOLDS)]
        for model in dict.fromkeys(chosen["model"]):
            rows = chosen[chosen["model"] == model].set_index("fold")
            cells = [_cell(rows.loc[fold]) if fold in rows.index else "" for fold in FOLDS]
            lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: pd.Series) -> str:
    starred = "*" if "fitted" in str(row["note"]) else ""
    return f"{row['value']:.3f}{starred} ({row['low']:.3f} to {row['high']:.3f})"


if __name__ == "__main__":
    if len(sys.argv) != 2 or "SEQGRAFT_SHARED" not in os.environ:
        sys.exit("SEQGRAFT_SHARED=folder python run.py OUT")
    os.environ["SEQGRAFT_SHARED"] = str(Path(os.environ["SEQGRAFT_SHARED"]).resolve())
    main(Path(sys.argv[1]).resolve())
