"""The command line: each command reads its arguments, calls one public function and prints what it found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

    from seqgraft.plan import Plan

# Nothing heavy may be imported at the top of this file: `seqgraft --help` must not load torch.

app = typer.Typer(
    name="seqgraft",
    help="Graft new data onto pretrained genomic sequence models: prepare, plan, fit, evaluate, predict, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the YAML file, as in --set train.lr=3e-5.")
]


def _say(text: str) -> None:
    typer.echo(text)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to write the demo's data, runs and report.")] = Path(
        "seqgraft-demo"
    ),
) -> None:
    """Simulated data with known truth, from raw files to a report, in minutes on two cores."""
    from seqgraft.demo import run_demo

    run_demo(folder, _say)


@app.command()
def simulate(
    source: Annotated[Path, typer.Argument(help="YAML file with the simulation's settings.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the simulated files.")],
    settings: Settings = None,
) -> None:
    """Write a simulated genome, tracks, genes and variants with known truth."""
    from seqgraft.data.simulate import Simulation
    from seqgraft.data.simulate import simulate as run
    from seqgraft.experiment import build, read_yaml

    run(build(Simulation, read_yaml(source, settings or ()), str(source)), folder)
    _say(f"The simulation is in {folder}.")


@app.command()
def prepare(
    source: Annotated[
        Path, typer.Argument(help="YAML file that says which files to read (kind: coverage, labelled, peaks).")
    ],
    folder: Annotated[Path, typer.Argument(help="New folder for the prepared dataset.")],
    settings: Settings = None,
) -> None:
    """Turn raw files into a prepared dataset."""
    from seqgraft.data.duplicates import duplicates_in_words
    from seqgraft.run import prepare as run

    dataset = run(source, folder, tuple(settings or ()))
    folds = ", ".join(f"{fold} {count}" for fold, count in dataset.regions["fold"].value_counts().items())
    _say(f"{folder}: {len(dataset)} regions ({folds}), {len(dataset.tracks)} tracks, {dataset.info.in_words}.")
    for name, note in dataset.info.notes.items():
        if note:
            text = duplicates_in_words(note) if name == "duplicates" else note
            _say(f"  {name.replace('_', ' ')}: {text}")


@app.command()
def retrack(
    folder: Annotated[Path, typer.Argument(help="A prepared dataset of coverage.")],
    tracks: Annotated[Path, typer.Argument(help="Track table (CSV, TSV) with the same names.")],
) -> None:
    """Change scale, clip, squash or groups of a prepared dataset without reading its bigWigs again."""
    from seqgraft.data.coverage import retrack_dataset

    dataset = retrack_dataset(folder, tracks)
    _say(f"{folder}: {len(dataset.tracks)} tracks have the settings of {tracks}.")


@app.command()
def plan(
    experiment: Annotated[Path, typer.Argument(help="YAML file of the experiment.")],
    folder: Annotated[Path | None, typer.Argument(help="The run directory that fit would write.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Answer for a card with this much memory, such as '24 GB'.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Every check, and what the run would cost; exits with 0 only if fit would start."""
    from seqgraft.experiment import read_experiment
    from seqgraft.plan import parse_memory, plan_run

    found = plan_run(read_experiment(experiment, settings or ()), folder, parse_memory(device) if device else None)
    _print_plan(found)
    if found.problems:
        raise typer.Exit(found.problems[0].exit_code)


@app.command()
def fit(
    experiment: Annotated[Path, typer.Argument(help="YAML file of the experiment.")],
    folder: Annotated[Path, typer.Argument(help="Run directory to write.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")] = False,
    settings: Settings = None,
) -> None:
    """Train an adapter and heads; checks run first."""
    import os

    from seqgraft.experiment import read_experiment
    from seqgraft.plan import plan_run
    from seqgraft.run import fit_run

    parsed = read_experiment(experiment, settings or ())
    if not resume and os.environ.get("RANK", "0") == "0":
        found = plan_run(parsed, folder)
        if found.problems:
            _print_plan(found)
            raise typer.Exit(found.problems[0].exit_code)
    result = fit_run(parsed, folder, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        _say(
            f"{folder}: the best validation score is {result.best_score:.4f}, "
            f"in epoch {result.best_epoch} of {result.epochs} ({result.seconds:.0f} s)."
        )
        if parsed.train.cache != "off":
            _say(f"Cache: {result.cache}.")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A finished run.")],
    fold: Annotated[str | None, typer.Option(help="Which fold; by default the one of the experiment.")] = None,
) -> None:
    """Score a run beside its baselines, with intervals."""
    from seqgraft.run import evaluate_run

    found = evaluate_run(folder, fold)
    _print_metrics(found.metrics)
    if found.genes is not None:
        _say("")
        _say(found.genes.round(3).to_string(index=False))
    _say(f"The whole table is in {folder / 'evaluation' / 'metrics.parquet'}.")


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(help="A finished run.")],
    source: Annotated[Path, typer.Argument(help="Regions (BED) or sequences (FASTA, CSV).")],
    out: Annotated[Path, typer.Argument(help="Output: .parquet, .csv, .zarr or .bw.")],
) -> None:
    """Predict tracks or labels for regions or sequences, in raw units."""
    from seqgraft.run import predict_run

    for path in predict_run(folder, source, out):
        _say(f"The predictions are in {path}.")


@app.command()
def embed(
    folder: Annotated[Path, typer.Argument(help="A finished run.")],
    source: Annotated[Path, typer.Argument(help="Regions (BED) or sequences (FASTA, CSV).")],
    out: Annotated[Path, typer.Argument(help="Output .parquet.")],
) -> None:
    """Write the trunk's features for regions or sequences."""
    from seqgraft.run import embed_run

    _say(f"The embeddings are in {embed_run(folder, source, out)}.")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run, or a folder of runs to compare.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page; by default into the folder.")] = None,
) -> None:
    """One self-contained HTML page of a run, or a comparison of runs."""
    from seqgraft.report import write_report

    _say(f"The report is {write_report(folder, out)}.")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A finished run whose adapter can be merged.")],
    out: Annotated[Path, typer.Argument(help="New model folder.")],
    name: Annotated[str, typer.Option(help="The model's name.")],
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "",
    citation: Annotated[str, typer.Option(help="How to cite them.")] = "",
    card: Annotated[Path | None, typer.Option(help="A Markdown file for people.")] = None,
) -> None:
    """Merge a run's adapter and write a model that 'model.name' accepts."""
    from seqgraft.errors import ConfigError
    from seqgraft.run import export_run

    try:
        text = card.read_text(encoding="utf-8") if card else ""
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Give a Markdown text file, or leave it out"
        raise ConfigError(f"the card cannot be read ({error})", where="--card", remedy=remedy) from error
    difference = export_run(folder, out, name=name, licence=licence, citation=citation, card=text)
    _say(f"{out}: merged, with a relative difference of {difference:.1e}.")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A Baskerville .h5 file, or a local folder or hub id of Enformer.")],
    out: Annotated[Path, typer.Argument(help="New model folder.")],
    name: Annotated[str, typer.Option(help="The model's name.")],
    licence: Annotated[str, typer.Option(help="Licence of the weights.")],
    citation: Annotated[str, typer.Option(help="How to cite them (.h5).")] = "",
    params: Annotated[Path | None, typer.Option(help="params.json of the network (.h5).")] = None,
    targets: Annotated[Path | None, typer.Option(help="targets.txt, for the tracks' names and scales (.h5).")] = None,
    revision: Annotated[str | None, typer.Option(help="Pinned revision (hub id).")] = None,
) -> None:
    """Turn published weights into a model folder that 'model.name' accepts."""
    from seqgraft.errors import ConfigError

    if source.endswith(".h5"):
        from seqgraft.models.baskerville import convert_baskerville

        if params is None:
            remedy = "Pass --params params.json, which lies beside the weights"
            raise ConfigError("the file of weights does not say how the network is built", source, remedy=remedy)
        report = convert_baskerville(source, params, out, targets, name=name, licence=licence, citation=citation)
        count = len(report.matched)
    else:
        from seqgraft.models.huggingface import convert_enformer, load_enformer

        loaded = load_enformer(source, revision=revision)
        convert_enformer(loaded, out, name=name, licence=licence, source=source, revision=revision)
        count = len(loaded.report.matched)
    _say(f"{out}: {count} tensors of {source} are there. Use it with model: {{name: {out}}}.")


@app.command()
def models() -> None:
    """The models that come with the package, and the architectures."""
    from seqgraft.models.weights import TRUNKS, bundled_models

    for name, model in bundled_models().items():
        content = model.content
        _say(
            f"{name}: {content['architecture']}, {content.get('parameters', 0):,} parameters, "
            f"bins of {content['bin_size']} bp, trained with windows of {content['window']} bp "
            f"on {len(content['tracks'])} tracks, licence {content.get('licence') or 'not stated'}"
        )
    _say(f"Architectures with random weights: {', '.join(TRUNKS)}.")


def _print_plan(found: Plan) -> None:
    width = max((len(name) for name in found.facts), default=0)
    for name, fact in found.facts.items():
        _say(f"{name:<{width}}  {fact}")
    if found.problems:
        for problem in found.problems:
            typer.echo(f"seqgraft: {problem}", err=True)
        _say("fit would not start.")
    else:
        _say("fit would start.")


def _print_metrics(table: pd.DataFrame) -> None:
    """The mean over tracks of the leading metrics; what became of the trunk's own tracks comes last."""
    means = table[table["track"] == ""]
    original = means["note"].str.contains("original tracks", regex=False)
    own = means[~original]
    leading = own.groupby(["group", "unit"], sort=False)["metric"].transform("first")
    for part in (own[own["metric"] == leading], means[original]):
        for row in part.to_dict("records"):
            interval = f" ({row['low']:.3f} to {row['high']:.3f})" if row["low"] == row["low"] else ""
            note = f"  {row['note']}" if row["note"] else ""
            group = f"{row['group']:<10} " if part["group"].nunique() > 1 else ""
            score = f"{group}{row['model']:<28} {row['metric']:>10} {row['value']:.3f}{interval}"
            _say(f"{score}  {row['unit']}, fold {row['fold']}{note}")
