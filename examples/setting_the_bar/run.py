"""Which method of fine-tuning a DNA language model? Eight of them, tuned alike, on six data sets, and what settings do.

    python examples/setting_the_bar/run.py OUT

Prepares the data, runs the sweeps of this folder into OUT/runs (``bar.yaml`` is the comparison, the others ask what
rank, learning rate, batch size and epochs do and what a table can get wrong), and leaves OUT/tables.md, OUT/*.svg and
a report of each sweep. What is done is not done again, so an interrupted run goes on where it stopped. A check of the
pipeline with the bundled `yeast-lm-mini`, and no verdict on methods; published models (``species-lm.yaml``,
``dnabert-2.yaml``) give one. Needs SEQGRAFT_SHARED.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seqgraft.data import open_dataset, prepare_source
from seqgraft.data.dataset import Dataset
from seqgraft.experiment import parse_source, read_yaml
from seqgraft.genome import Genome
from seqgraft.grids import read_sweep
from seqgraft.intervals import hierarchical_draws, hierarchical_estimate
from seqgraft.models.folders import bundled_models
from seqgraft.plots import THEME, model_dots, svg
from seqgraft.report import write_report
from seqgraft.report.sweep import findings
from seqgraft.scoring import Scorecard, default_metric
from seqgraft.sequence import decode, reverse_complement
from seqgraft.sweep import run_sweep
from seqgraft.trends import cost_dots, epoch_curves, setting_lines

HERE = Path(__file__).parent
DATA = ("tf0", "tf1", "mouse-tf0", "core-tata", "h3", "half-life", "enhancers", "half-life-alone")
SWEEPS = ("bar", "rank", "learning-rate", "batch-size", "epochs", "pitfalls")
YEAST = ("h3", "half-life")
MODEL = "yeast-lm-mini"
SETTINGS = {"rank": "rank", "learning-rate": "lr", "batch-size": "batch_size", "epochs": "settings"}
KINDS = {"run": "method", "control": "random weights", "baseline": "baseline"}
NAMES = {"auroc": "AUROC", "pearson": "Pearson", "mcc": "MCC", "accuracy": "accuracy"}


def short(method: str) -> str:
    """A method without its sites."""
    return method.partition(" (")[0] + (" on random weights" if "random weights" in method else "")


def summary_of(name: str) -> pd.DataFrame:
    """The summary of a sweep, methods by their short names."""
    frame = pd.read_parquet(Path("runs") / name / "summary.parquet")
    return frame.assign(method=frame["method"].map(short))


def cells_of_bar() -> pd.DataFrame:
    """The cells of the comparison, methods by their short names."""
    frame = pd.read_parquet("runs/bar/results.parquet")
    return frame.assign(method=frame["method"].map(short))


def interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})" if value == value else ""


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.fillna("").astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines) + "\n"


# ---- tables ----


def scores(summary: pd.DataFrame) -> pd.DataFrame:
    """A row per method, floor and control, a column per data set: the chosen setting's score on the test fold."""
    chosen = summary[summary["chosen"]].copy()
    chosen["method"] = np.where(chosen["role"] == "control", "the best, on random weights", chosen["method"])
    metric = chosen.drop_duplicates("dataset").set_index("dataset")["metric"].map(NAMES)
    chosen["text"] = [interval(*row) for row in chosen[["score", "low", "high"]].to_numpy()]
    order = chosen.sort_values("role", key=lambda role: role.map(list(KINDS).index), kind="stable")["method"].unique()
    wide = chosen.pivot_table(index="method", columns="dataset", values="text", aggfunc="first").loc[order]
    wide = wide[[name for name in DATA if name in wide]]
    wide.columns = [f"{name}, {metric[name]}" for name in wide.columns]
    return wide.rename_axis(None).reset_index(names="method")


def costs(summary: pd.DataFrame) -> pd.DataFrame:
    """What each method trains, stores and takes, the median over data sets."""
    runs = summary[(summary["role"] == "run") & summary["chosen"]]
    columns = ["trainable", "total", "adapter_bytes", "memory_bytes", "seconds_per_epoch", "merged_difference"]
    usual = runs.groupby("method", sort=False)[columns].median()
    rates = runs.groupby("method", sort=False)["lr"].agg(lambda lr: ", ".join(f"{each:g}" for each in sorted(set(lr))))
    return pd.DataFrame({
        "method": usual.index,
        "trains": [f"{n:,.0f} ({100 * n / of:.2g} %)" for n, of in usual[["trainable", "total"]].to_numpy()],
        "file": [f"{size / 1e3:,.0f} kB" for size in usual["adapter_bytes"]],
        "memory of a step": [f"{size / 1e6:,.0f} MB" for size in usual["memory_bytes"]],
        "seconds per epoch": [f"{each:.1f}" for each in usual["seconds_per_epoch"]],
        "merged": [f"{each:.0e}" if each == each else "no" for each in usual["merged_difference"]],
        "chosen rates": rates.to_numpy(),
    })  # fmt: skip


def overlap(dataset: Dataset, rows: Sequence[int], trained: dict[str, bytes]) -> np.ndarray:
    """Of each row, whether its sequence or the reverse complement stands in a chromosome, base for base."""
    codes, lengths = dataset.sequences(np.asarray(rows))
    found = []
    for code, length in zip(codes, lengths, strict=True):
        sides = [decode(side).encode() for side in (code[:length], reverse_complement(code[:length]))]
        found.append(any(side in chromosome for chromosome in trained.values() for side in sides))
    return np.array(found)


def training_genome() -> dict[str, bytes]:
    """The chromosomes that the bundled model was trained on, whole, as text."""
    path = bundled_models()[MODEL].trained_on
    assert path is not None
    windows = pd.read_csv(path, sep="\t", header=None, names=["chrom", "start", "end", "fold"])
    genome = Genome.open(Path(os.environ["SEQGRAFT_SHARED"]) / "data/yeast/sacCer3.fa.gz")
    names = windows.loc[windows["fold"] == "train", "chrom"].unique()
    return {name: decode(genome.chrom_codes(name)).encode() for name in names}


def split_by_overlap(results: pd.DataFrame, summary: pd.DataFrame) -> Iterator[dict[str, object]]:
    """Scores of the chosen settings on yeast sequences inside and outside the training genome."""
    trained = training_genome()
    for name in (name for name in YEAST if name in set(results["dataset"])):
        dataset = open_dataset(Path("data") / name)
        keys = ["dataset", "method", "lr"]
        chosen = summary[(summary["role"] == "run") & summary["chosen"] & (summary["dataset"] == name)]
        cells = results[results["role"] == "run"].merge(chosen[keys], on=keys).sort_values("seed")
        with np.load(Path("runs/bar/cells") / cells["cell"].iloc[0] / "evaluation" / "moments.npz") as arrays:
            inside = overlap(dataset, arrays["rows"], trained)
        for place, here in (("inside", inside), ("outside", ~inside)):
            if here.sum() < 30:
                yield {"data": name, "training genome": place, "n": int(here.sum()), "method": "too few to score"}
                continue
            for method, runs in cells.groupby("method", sort=False):
                text = part_score(dataset, list(runs["cell"]), here)
                yield {"data": name, "training genome": place, "n": int(here.sum()), "method": method, "score": text}


def part_score(dataset: Dataset, cells: Sequence[str], here: np.ndarray) -> str:
    """The leading metric on a part of the test rows, the mean over seeds, with its interval over seeds and rows."""
    metric = default_metric(dataset.tracks.frame["link"].iloc[0])
    statistics = []
    for cell in cells:
        with np.load(Path("runs/bar/cells") / cell / "evaluation" / "moments.npz") as arrays:
            sums, rows = arrays["moments"][:, here], arrays["rows"][here]
        card = Scorecard(dataset.tracks, [metric])
        card.update(np.where(sums[0] > 0, sums[1], np.nan)[..., None], sums[2][..., None], rows)
        statistics.append(card.result()[0].statistics)
    each, blocks = np.array([one.compute(metric) for one in statistics]), np.arange(int(here.sum()))
    drawn = hierarchical_draws(statistics, metric, blocks)
    found, _ = hierarchical_estimate(each.mean(0), drawn, each.mean(1), blocks)
    return interval(found.mean, found.mean_low, found.mean_high)


def leaks(results: pd.DataFrame) -> pd.DataFrame:
    """The enhancers: each metric on the clean test sequences and on all, first seed, with intervals over sequences."""
    cells = results[(results["dataset"] == "enhancers") & (results["seed"] == 1)]
    rows: dict[str, dict[str, str]] = {}
    for cell in cells.to_dict("records"):
        metrics = pd.read_parquet(Path("runs/pitfalls/cells") / cell["cell"] / "evaluation" / "metrics.parquet")
        shown = metrics[(metrics["track"] == "") & metrics["metric"].isin(["auroc", "mcc", "accuracy"])]
        for row in shown.to_dict("records"):
            where = "clean" if "without copies" in row["fold"] else "all"
            name = f"{NAMES[row['metric']]}, {where} {row['n']}"
            rows.setdefault(short(row["model"]), {})[name] = interval(row["value"], row["low"], row["high"])
    return pd.DataFrame(rows).T.rename_axis("method").reset_index()


def covariates(bar: pd.DataFrame, alone: pd.DataFrame) -> pd.DataFrame:
    """Half-life with codons and lengths, and from the 3' UTR alone."""
    columns = {}
    for name, summary in (("with codons and lengths", bar), ("3' UTR alone", alone)):
        data = summary[
            summary["dataset"].str.startswith("half-life") & summary["chosen"] & (summary["role"] != "control")
        ]
        columns[name] = pd.Series(
            [interval(*row) for row in data[["score", "low", "high"]].to_numpy()], index=data["method"]
        )
    return pd.DataFrame(columns).dropna(how="all").rename_axis("method").reset_index()


# ---- figures ----


def save(figure: Figure, name: str, title: str) -> None:
    """A figure as a file of its own: on white, in plain colours."""
    text = svg(figure, name, title)
    for colour, variable in THEME.items():
        text = text.replace(f"var({variable})", colour)
    text = text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: #fff" ', 1)
    Path(f"{name}.svg").write_text(text, encoding="utf-8")


def draw_methods(summary: pd.DataFrame) -> None:
    """Per data set the methods, the control and the floors; against time and numbers that train; training losses."""
    for name, part in summary.groupby("dataset", sort=False):
        shown = part[part["chosen"]].sort_values("score", ascending=False)
        shown = shown.assign(model=shown["method"], value=shown["score"], group=shown["role"].map(KINDS))
        metric = NAMES[shown["metric"].iloc[0]]
        best = shown.iloc[0]
        title = f"{name}: {best['method']} has the highest {metric}, {interval(*best[['score', 'low', 'high']])}"
        groups = [kind for kind in KINDS.values() if kind in set(shown["group"])]
        save(model_dots(shown, title=title, xlabel=f"{metric}, test", groups=groups), f"methods-{name}", title)
        methods = list(part.loc[part["role"] == "run", "method"].unique())
        runs = shown[shown["role"] == "run"]
        floors = shown[shown["role"] == "baseline"].head(1)
        floor = dict(zip(floors["method"], floors["score"], strict=True))
        for column, label in (("seconds_per_epoch", "seconds per epoch"), ("trainable", "numbers that train")):
            least, most = runs.loc[runs[column].idxmin()], runs.loc[runs[column].idxmax()]
            ends = [f"{row[column]:,.{0 if most[column] > 100 else 1}f} ({row['method']})" for row in (least, most)]
            title = f"{name}: {label} from {ends[0]} to {ends[1]}"
            figure = cost_dots(
                runs.assign(x=runs[column]),
                title=title,
                xlabel=label,
                ylabel=f"{metric}, test",
                methods=methods,
                floors=floor,
            )
            save(figure, f"{column}-{name}".replace("_", "-"), title)


def draw_losses(results: pd.DataFrame, summary: pd.DataFrame) -> None:
    """The training loss of every run of the chosen settings, per data set."""
    keys = ["dataset", "method", "lr"]
    chosen = summary[(summary["role"] == "run") & summary["chosen"]]
    cells = results[results["role"] == "run"].merge(chosen[keys], on=keys).drop_duplicates("cell")
    for name, part in cells.groupby("dataset", sort=False):
        logs = [
            pd.read_csv(Path("runs/bar/cells") / row["cell"] / "log.csv").assign(method=row["method"], run=row["cell"])
            for row in part.to_dict("records")
        ]
        frame = pd.concat(logs).rename(columns={"train_loss": "value"})
        falls = frame.groupby("run")["value"].agg(lambda loss: loss.iloc[-1] < loss.iloc[0])
        title = f"{name}: the training loss falls in {int(falls.sum())} of {len(falls)} runs"
        save(
            epoch_curves(frame, title=title, ylabel="training loss", methods=list(part["method"].unique())),
            f"loss-{name}",
            title,
        )


def draw_setting(name: str, column: str) -> None:
    """Scores over the values of a setting, beside the best floor."""
    summary = summary_of(name)
    runs = summary[summary["role"] == "run"]
    number = r"([\d.e-]+)$"  # settings without a column of their own are words: "epochs 10"
    values = runs[column].astype(str).str.extract(number)[0].astype(float)
    metric = NAMES[runs["metric"].iloc[0]]
    floor = summary[summary["role"] == "baseline"].nlargest(1, "score")
    label = name.replace("-", " ")
    title = (
        f"{runs['dataset'].iloc[0]}, by {label}: {metric} from {runs['score'].min():.3f} to {runs['score'].max():.3f}"
    )
    figure = setting_lines(
        runs.assign(x=values, value=runs["score"]),
        title=title,
        xlabel=label,
        ylabel=f"{metric}, test",
        methods=list(runs["method"].unique()),
        floors=dict(zip(floor["method"], floor["score"], strict=True)),
    )
    save(figure, f"by-{name}", title)


# ---- all of it ----


def write_figures(sweeps: Sequence[str]) -> None:
    """Every figure of the sweeps that are there, as a file."""
    summary = summary_of("bar")
    draw_methods(summary)
    draw_losses(cells_of_bar(), summary)
    for name, column in SETTINGS.items():
        if name in sweeps:
            draw_setting(name, column)


def make_tables(sweeps: Sequence[str]) -> dict[str, str]:
    """The tables of the sweeps that are there, by name, as Markdown."""
    summary = summary_of("bar")
    told = pd.Series(findings(Path("runs/bar")), name="finding").rename_axis("data").reset_index()
    made = {"findings": told, "scores": scores(summary), "costs": costs(summary)}
    if split := list(split_by_overlap(cells_of_bar(), summary)):
        made["overlap"] = pd.DataFrame(split)
    if "pitfalls" in sweeps:
        made["leaks"] = leaks(pd.read_parquet("runs/pitfalls/results.parquet"))
        made["covariates"] = covariates(summary, summary_of("pitfalls"))
    return {name: markdown(table) for name, table in made.items()}


def publish(page: Path, tables: Mapping[str, str]) -> None:
    """Puts the tables between their marks on a page, and the figures that it shows beside it."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(marks[0])
        _, _, after = rest.partition(marks[1])
        text = f"{before}{marks[0]}\n\n{table}\n{marks[1]}{after}" if after else text
    page.write_text(text, encoding="utf-8")
    for name in re.findall(rf"\({page.stem}-([\w-]+)\.svg\)", text):
        shutil.copy(f"{name}.svg", page.with_name(f"{page.stem}-{name}.svg"))


def main(out: Path, workers: int = 1, page: Path | None = None) -> None:
    """Prepares, sweeps, and writes tables, figures and reports into ``out``."""
    page = page.resolve() if page is not None else None
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    for name in DATA:
        folder = Path("data") / name
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            prepare_source(parse_source(read_yaml(HERE / f"{name}.data.yaml"), name), folder)
    for name in SWEEPS:
        run_sweep(read_sweep(HERE / f"{name}.yaml"), Path("runs") / name, workers=workers, tell=tell)
        write_report(Path("runs") / name)
    write_figures(SWEEPS)
    tables = make_tables(SWEEPS)
    text = "\n".join(tables.values())
    Path("tables.md").write_text(text, encoding="utf-8")
    if page is not None:
        publish(page, tables)
    tell(text)
    tell(f"It took {time.process_time() / 60:.0f} minutes of one core" + " in this process." * (workers > 1))


def tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("setting-the-bar"))
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--page", type=Path, help="page with marks for the tables; they and the figures are put there")
    given = parser.parse_args()
    main(given.out, given.workers, given.page)
