"""The command line: each command reads its arguments, calls one public function and prints what it found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    import pandas as pd

    from seqgraft.plan import Plan

# Nothing heavy may be imported at the top of this file: `seqgraft --help` must not load torch.

T = TypeVar("T")

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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _were(number: int, noun: str) -> str:
    return f"{_count(number, noun)} {'was' if number == 1 else 'were'}"


def _parsed(kind: type[T], config: Path | None, settings: list[str] | None) -> T:
    """The settings of a command: its file, if there is one, and what --set says."""
    from seqgraft.experiment import build, read_yaml

    return build(kind, read_yaml(config, settings or ()), str(config or "--set"))


def _card_text(path: Path | None) -> str:
    """The Markdown that --card names."""
    from seqgraft.errors import ConfigError

    try:
        return path.read_text(encoding="utf-8") if path else ""
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Give a Markdown text file, or leave it out"
        raise ConfigError(f"the card cannot be read ({error})", where="--card", remedy=remedy) from error


def _show_version(wanted: bool) -> None:
    if wanted:
        from seqgraft import __version__

        _say(f"seqgraft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of no single command; the text of its help is the application's."""


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
    """Write a simulated genome with tracks, genes and variants, or cells or donors, with known truth."""
    from seqgraft.data.simulate import Simulation
    from seqgraft.data.simulate import simulate as run
    from seqgraft.experiment import build, read_yaml

    run(build(Simulation, read_yaml(source, settings or ()), str(source)), folder)
    _say(f"The simulation is in {folder}.")


@app.command()
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            help="YAML file that says which files to read "
            "(kind: coverage, fragments, h5ad, labelled, peaks, personal or windows)."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="New folder for the prepared dataset.")],
    settings: Settings = None,
) -> None:
    """Turn raw files into a prepared dataset."""
    from seqgraft.data.duplicates import duplicates_in_words
    from seqgraft.run import prepare as run

    dataset = run(source, folder, tuple(settings or ()))
    _say(f"{folder}: {dataset.in_words}.")
    for name, note in dataset.info.notes.items():
        if note and name not in ("tracks", "fragment_files"):  # a row each: NAME.qc.tsv, dataset.json
            text = duplicates_in_words(note) if name == "duplicates" else note
            if isinstance(text, dict):
                text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in text.items() if key != "files")
            elif isinstance(text, list):
                text = "; ".join(map(str, text))
            _say(f"  {name.replace('_', ' ')}: {text}")


@app.command()
def retrack(
    folder: Annotated[Path, typer.Argument(help="A prepared dataset of coverage.")],
    tracks: Annotated[Path, typer.Argument(help="Track table (CSV, TSV) with the same names.")],
) -> None:
    """Change scale, clip, squash or groups of a prepared dataset without reading its bigWigs again."""
    from seqgraft.data.coverage import retrack_dataset

    dataset = retrack_dataset(folder, tracks)
    _say(f"{folder}: {_count(len(dataset.tracks), 'track')} with the settings of {tracks}.")


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
    if not found.metrics["low"].notna().any():
        _say("There are no intervals: too few rows of the fold are independent of each other.")
    if found.genes is not None and "gene" in found.genes:  # of donors: a row for each gene and model
        _say(f"Scores gene by gene are in {folder / 'evaluation' / 'genes.parquet'}.")
    elif found.genes is not None:
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
    from seqgraft.apply import predict_run

    for path in predict_run(folder, source, out):
        _say(f"The predictions are in {path}.")


@app.command()
def variants(
    folder: Annotated[Path, typer.Argument(help="A finished run; with --genome, a language model.")],
    source: Annotated[Path, typer.Argument(help="Variants: VCF or BCF, plain or bgzipped.")],
    out: Annotated[Path, typer.Argument(help="Output: .parquet or .vcf.gz.")],
    config: Annotated[Path | None, typer.Option(help="YAML file that says how to score.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a scoring that was interrupted.")] = False,
    shard: Annotated[str, typer.Option(help="Score one of several parts of the file, as in 3/16.")] = "1/1",
    replicate: Annotated[
        list[Path] | None, typer.Option(help="Another run of the same tracks to average with; may be repeated.")
    ] = None,
    genome: Annotated[
        Path | None, typer.Option(help="FASTA: score with a bundled model or model folder, by its masked likelihood.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="New folder for figures of both alleles in every cell type.")
    ] = None,
    top: Annotated[int, typer.Option(help="Draw so many, those with the largest scores.")] = 10,
    named: Annotated[list[str] | None, typer.Option(help="Draw the variant with this ID; may be repeated.")] = None,
    figures: Annotated[str, typer.Option(help="Format of the figures: png or svg.")] = "png",
    settings: Settings = None,
) -> None:
    """Score what the alternative alleles of variants change in each track."""
    import re

    from seqgraft.apply import score_model, score_run
    from seqgraft.errors import ConfigError
    from seqgraft.variants import VariantConfig
    from seqgraft.variants.panels import Panels

    numbers = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise ConfigError("this is no part of a file", shard, where="--shard", remedy="Write 1/16 to 16/16")
    parsed = _parsed(VariantConfig, config, settings)
    part = int(numbers[1]), int(numbers[2])
    panels = None if plots is None else Panels(plots, top, tuple(named or ()), f".{figures}")
    if genome is None:
        found = score_run(
            folder, source, out, parsed, resume=resume, shard=part, replicates=replicate or (), panels=panels
        )
    elif panels is not None:
        raise ConfigError("only runs of tracks have figures of variants", str(plots), where="--plots")
    elif replicate:
        raise ConfigError("only runs have replicates", [str(path) for path in replicate], where="--replicate")
    else:
        found = score_model(str(folder), genome, source, out, parsed, resume=resume, shard=part)
    _say(f"{_were(found.variants - found.unread, 'variant')} scored. Computed for each: {found.in_words}.")
    if found.unread:
        _say(f"In the window of no gene or region, and without a row: {_count(found.unread, 'variant')}.")
    if found.padded:
        _say(f"In {found.padded} of {found.rows} rows the window reaches beyond its contig; the model saw N there.")
    for note in found.notes:
        _say(note)
    for reason, count in found.skipped.items():
        _say(f"{_were(count, 'variant')} skipped: {reason}.")
    skipped = f"the skipped variants in {found.files[-1]}" if found.skipped else "no variant was skipped"
    _say(f"The scores are in {found.files[0]}, {skipped}.")
    if plots is not None:
        _say(f"The figures are in {plots}: {len(list(plots.iterdir()))}.")


@app.command()
def effects(
    folder: Annotated[Path, typer.Argument(help="A finished run of donors.")],
    out: Annotated[Path, typer.Argument(help="New folder for the tables.")],
    genes: Annotated[Path | None, typer.Option(help="A text file of genes, one per line: no others.")] = None,
    predixcan: Annotated[bool, typer.Option("--predixcan", help="Write PrediXcan's weights and covariances.")] = False,
    donors: Annotated[bool, typer.Option("--donors", help="Write predictions for every donor, by name.")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file: measured effects to compare with, and more.")] = None,
    settings: Settings = None,
) -> None:
    """What each variant does to the expression of genes, and which few explain the predictions for donors."""
    from seqgraft.apply import effects_run
    from seqgraft.effects import EffectsConfig, with_extras

    parsed = with_extras(_parsed(EffectsConfig, config, settings), genes=genes, predixcan=predixcan, donors=donors)
    found = effects_run(folder, out, parsed)
    table = found.genes
    _say(f"{len(found.effects.table)} effects on {len(table)} genes. Computed for each: {found.effects.in_words}.")
    told = f"Over the donors of fold {found.fold}, effects times dosage add up to"
    _say(f"{told} the predictions with a mean r of {table['linear'].mean():.3f} within genes,")
    _say(f"and to the measured expression with {table['pearson'].mean():.3f} (constants count 0).")
    _say(f"{len(found.drivers)} drivers explain the predictions of {(table['drivers'] > 0).sum()} genes.")
    if found.agreement is not None:
        counts = found.agreement.counts
        _say(
            f"Of {counts['measured']} measured variants {counts['matched']} are in a window, {counts['swapped']} with "
            f"REF and ALT the other way round: {counts['pairs']} pairs of variant and gene."
        )
        _print_agreement(found.agreement.table)
    if found.predixcan is not None:
        counts = found.predixcan
        _say(f"PrediXcan's files: {counts['genes']} genes, {counts['weights']} weights, {counts['ids']} with an ID.")
    if parsed.donors:
        _say("donors.parquet names donors: keep it where their data are.")
    _say(f"The tables are in {out}: {', '.join(path.name for path in found.files)}.")


@app.command()
def calibrate(
    folder: Annotated[Path, typer.Argument(help="A finished run.")],
    background: Annotated[Path | None, typer.Argument(help="Background variants: VCF or BCF.")] = None,
    random: Annotated[int | None, typer.Option(help="Draw so many from the genome instead, such as 10000.")] = None,
    gtf: Annotated[
        Path | None, typer.Option(help="Genes: divide the background by the distance to their start.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random draw.")] = 0,
    config: Annotated[Path | None, typer.Option(help="YAML file that says how to score, as for variants.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a calibration that was interrupted.")] = False,
    settings: Settings = None,
) -> None:
    """Score background variants, so that 'variants' with the same settings adds percentiles."""
    from seqgraft.apply import calibrate_run
    from seqgraft.errors import ConfigError
    from seqgraft.variants import VariantConfig

    if (background is None) == (random is None):
        remedy = "Give a VCF of background variants, or --random 10000"
        raise ConfigError("a calibration needs one background", remedy=remedy)
    parsed = _parsed(VariantConfig, config, settings)
    source = background if background is not None else random
    assert source is not None
    found = calibrate_run(folder, source, parsed, gtf=gtf, seed=seed, resume=resume)
    for reason, count in found.skipped.items():
        _say(f"{_were(count, 'background variant')} skipped: {reason}.")
    for name, count in found.small.items():
        _say(f"Stratum {name} has {count} background rows, too few: its variants are compared with all of their type.")
    _say(f"{found.variants} background variants in {len(found.strata)} strata: {found.path}.")


@app.command()
def screen(
    folder: Annotated[Path, typer.Argument(help="A finished run.")],
    regions: Annotated[Path, typer.Argument(help="Regions (BED) of which every SNV is scored.")],
    out: Annotated[Path, typer.Argument(help="Output .parquet.")],
    top: Annotated[int | None, typer.Option(help="Score so many of the largest of each group exactly.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file that says how to screen.")] = None,
    settings: Settings = None,
) -> None:
    """First-order scores of every possible SNV of regions, and how well they agree with exact ones."""
    from dataclasses import replace

    from seqgraft.apply import screen_run
    from seqgraft.variants import ScreenConfig

    parsed = _parsed(ScreenConfig, config, settings)
    found = screen_run(folder, regions, out, parsed if top is None else replace(parsed, top=top))
    _say(
        f"{_were(found.snvs, 'SNV')} scored to first order in {_count(found.windows, 'window')}; "
        f"unknown bases: {found.unknown}."
    )
    for row in found.agreement.to_dict("records"):
        if row.get("n", 0) > 1:
            interval = f"{row['spearman']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            _say(
                f"{row['group']}: on {row['n']:.0f} random SNVs, Spearman with the exact scores is {interval}, "
                f"recall of the largest tenth {row['recall']:.2f} (chance: 0.10)."
            )
    _say(f"The scores are in {' and '.join(map(str, found.files))}.")


@app.command()
def attribute(
    folder: Annotated[Path, typer.Argument(help="A finished run.")],
    source: Annotated[Path, typer.Argument(help="Regions (BED) or sequences (FASTA, CSV).")],
    out: Annotated[Path, typer.Argument(help="Output .npz.")],
    config: Annotated[Path | None, typer.Option(help="YAML file that says what is explained, and how.")] = None,
    plots: Annotated[Path | None, typer.Option(help="New folder for a figure of each region.")] = None,
    figures: Annotated[str, typer.Option(help="Their format: png or svg.")] = "png",
    settings: Settings = None,
) -> None:
    """What each base of regions does to a prediction, or to the contrast of two groups of tracks."""
    from seqgraft.apply import attribute_run
    from seqgraft.attribute import AttributeConfig

    parsed = _parsed(AttributeConfig, config, settings)
    made = attribute_run(folder, source, out, parsed, plots=plots, suffix=f".{figures}")
    _say(f"{_count(len(made.found.regions), 'region')}, explaining {'; '.join(made.found.names)}.")
    if made.found.in_words:
        _say(f"Computed for each alternate: {made.found.in_words}.")
    if made.padded:
        _say(f"With bases beyond the end of a contig, where the model saw N: {_count(made.padded, 'window')}.")
    _say(f"The attributions are in {made.files[0]}.")
    if plots is not None:
        _say(f"The figures are in {plots}: {len(made.files) - 1}.")


@app.command()
def embed(
    folder: Annotated[Path, typer.Argument(help="A finished run.")],
    source: Annotated[Path, typer.Argument(help="Regions (BED) or sequences (FASTA, CSV).")],
    out: Annotated[Path, typer.Argument(help="Output .parquet.")],
) -> None:
    """Write the trunk's features for regions or sequences."""
    from seqgraft.apply import embed_run

    _say(f"The embeddings are in {embed_run(folder, source, out)}.")


@app.command()
def sweep(
    source: Annotated[Path, typer.Argument(help="YAML file of the sweep.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the sweep: new, or one to go on with.")],
    workers: Annotated[int, typer.Option(help="Cells at a time, each in a process of its own from 2 on.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster to run the cells on.")] = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="Count cells, time and memory; run nothing.")] = False,
    settings: Settings = None,
) -> None:
    """Run an experiment over methods, settings and seeds, compare them, and write tables and a report."""
    from seqgraft.errors import RunError
    from seqgraft.grids import read_sweep
    from seqgraft.report import write_report
    from seqgraft.sweep import plan_sweep, run_sweep

    config = read_sweep(source, settings or ())
    if plan_only:
        found = plan_sweep(config, folder, workers)
        _print_facts(found.facts)
        for problem in found.problems:
            typer.echo(f"seqgraft: {problem}", err=True)
        _say("Some cells would fail." if found.problems else "Every cell would start.")
        if found.problems:
            raise typer.Exit(found.problems[0].exit_code)
        return
    swept = run_sweep(config, folder, workers=workers, ray=ray, tell=_say)
    _say(f"{swept.ran} cells were run, {swept.found} were there already, {swept.failed} failed.")
    _say(f"The tables are in {folder} (results, summary, tests), the report is {write_report(folder)}.")
    if swept.failed:  # the column `message` of results says why
        raise typer.Exit(RunError.exit_code)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run, a sweep, or a folder of runs to compare.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page; by default into the folder.")] = None,
) -> None:
    """One self-contained HTML page of a run or a sweep, or a comparison of runs."""
    from seqgraft.report import write_report

    _say(f"The report is {write_report(folder, out)}.")


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="A finished run.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's own let others in.")] = (
        "127.0.0.1"
    ),
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    replicate: Annotated[
        list[Path] | None, typer.Option(help="Another run of the same tracks to average with; may be repeated.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file that says how to score, as for variants.")] = None,
    settings: Settings = None,
) -> None:
    """A local web page: effects of variants, the signal of both alleles, and logos; it ends with Ctrl-C."""
    from seqgraft.serve import serve_run
    from seqgraft.variants import VariantConfig

    parsed = _parsed(VariantConfig, config, settings)
    serve_run(folder, parsed, replicates=replicate or (), host=host, port=port, show=show, tell=_say)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A finished run whose adapter can be merged.")],
    out: Annotated[Path, typer.Argument(help="New model folder.")],
    name: Annotated[str, typer.Option(help="The model's name.")],
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "",
    citation: Annotated[str, typer.Option(help="How to cite them.")] = "",
    card: Annotated[Path | None, typer.Option(help="A Markdown file for people.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the weights in bfloat16, in half the space.")] = False,
) -> None:
    """Merge a run's adapter and write a model that 'model.name' accepts."""
    from seqgraft.card import write_card
    from seqgraft.experiment import read_experiment
    from seqgraft.export import export_run
    from seqgraft.models.folders import read_model
    from seqgraft.models.remote_code import allowing

    text = _card_text(card)
    difference = export_run(folder, out, name=name, licence=licence, citation=citation, card=text, half=half)
    with allowing(read_experiment(folder / "experiment.yaml").model.remote_code):
        write_card(out)
    _say(f"{out}: merged, with a relative difference of {difference:.1e}.")
    if not read_model(out).content["heads"]:
        _say("It has no heads of tracks or labels; those of labels stay in the run. 'seqgraft push' shares them.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A finished run.")],
    repository: Annotated[str | None, typer.Argument(help="OWNER/NAME on the Hugging Face hub.")] = None,
    to: Annotated[Path | None, typer.Option(help="A new folder instead, in the same layout.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch of the repository, made if need be.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the adapter; that of the base if not given.")] = "",
    citation: Annotated[str, typer.Option(help="How to cite it.")] = "",
    card: Annotated[Path | None, typer.Option(help="A Markdown file for people, which stands first.")] = None,
) -> None:
    """Share a run's adapter, with its heads and a model card; data, donors and paths stay behind."""
    from seqgraft.share import push as run

    stated = {"licence": licence, "citation": citation, "card": _card_text(card)}
    place = run(folder, repository, to=to, private=private, revision=revision, **stated)
    _say(f"The adapter is in {place}. Read its README.md: the names of tracks and conditions go along.")
    _say(f"Others use it with: seqgraft pull {place} NEW_FOLDER")


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="OWNER/NAME@COMMIT on the hub, or a folder of 'push --to'.")],
    folder: Annotated[Path, typer.Argument(help="Run directory to write.")],
    genome: Annotated[Path | None, typer.Option(help="FASTA of the run's genome, for regions and variants.")] = None,
    data: Annotated[Path | None, typer.Option(help="A prepared dataset of the same tracks, to evaluate on.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder of the base model, if it cannot be fetched.")] = None,
    remote_code: Annotated[
        str | None, typer.Option(help="The full commit whose Python files may run, for base models made by them.")
    ] = None,
) -> None:
    """Make a shared adapter a run directory that predicts as the run it came from."""
    from seqgraft.run import label_of
    from seqgraft.share import pull as run

    found = run(source, folder, genome=genome, data=data, base=base, remote_code=remote_code)
    opened = found.run
    facts = f"{len(opened.dataset.tracks)} tracks, {opened.dataset.info.in_words}"
    _say(f"{folder}: {label_of(opened.experiment)} on {opened.experiment.model.name}, {facts}.")
    if found.genome is not None and not found.placed:
        _say("It predicts sequences; for regions and variants pull it with --genome, the FASTA of its genome.")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A Baskerville .h5 file, or a folder or hub id of the Hugging Face layout.")
    ],
    out: Annotated[Path, typer.Argument(help="New model folder.")],
    name: Annotated[str, typer.Option(help="The model's name.")],
    licence: Annotated[str, typer.Option(help="Licence of the weights, if it is not known here.")] = "",
    citation: Annotated[str, typer.Option(help="How to cite them (.h5).")] = "",
    params: Annotated[Path | None, typer.Option(help="params.json of the network (.h5).")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="targets.txt, for the tracks' names and scales; of several heads HEAD=FILE, repeated."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The full commit (hub id).")] = None,
    trained_on: Annotated[
        Path | None, typer.Option(help="The published BED of the regions that the weights were trained on.")
    ] = None,
    species: Annotated[
        str | None, typer.Option(help="The token before each sequence, for checkpoints that have such tokens.")
    ] = None,
    remote_code: Annotated[
        str | None, typer.Option(help="The full commit whose Python files may run, for models made by their own code.")
    ] = None,
) -> None:
    """Turn published weights into a model folder that 'model.name' accepts."""
    from seqgraft.card import write_card
    from seqgraft.errors import ConfigError
    from seqgraft.models.remote_code import allowing

    tables = {head: Path(path) for head, _, path in (each.rpartition("=") for each in targets or [])}
    if source.endswith(".h5"):
        from seqgraft.models.baskerville import convert_baskerville

        if params is None:
            remedy = "Pass --params params.json, which lies beside the weights"
            raise ConfigError("the file of weights does not say how the network is built", source, remedy=remedy)
        if any(each is not None for each in (trained_on, revision, species, remote_code)) or set(tables) - {""}:
            remedy = "Set model.trained_on where the model is used, and give one table without a name"
            what = "a Keras file takes no --trained-on, --revision, --species, --remote-code or tables of heads"
            raise ConfigError(what, source, remedy=remedy)
        report = convert_baskerville(
            source, params, out, tables.get(""), name=name, licence=licence or "not stated", citation=citation
        )
    else:
        from seqgraft.models.folders import convert_published
        from seqgraft.models.hub import licence_of, load_published, regions_of

        if params is not None or citation:
            what, remedy = "--params and --citation are for a Keras file (.h5)", "Leave them out: they are known here"
            raise ConfigError(what, source, where="convert", remedy=remedy)
        loaded = load_published(source, revision=revision, targets=tables, species=species, remote_code=remote_code)
        report = loaded.report
        seen = None if trained_on is None else regions_of(loaded, trained_on)
        licence = licence or licence_of(source)
        convert_published(loaded, out, name=name, licence=licence, source=source, revision=revision, trained_on=seen)
    with allowing(remote_code):
        write_card(out)
    left = f"; left: {', '.join(report.left)}" if report.left else ""
    _say(f"{out}: {len(report.matched)} tensors of {source} are there{left}. Use it with model: {{name: {out}}}.")


@app.command()
def models(
    name: Annotated[
        str | None, typer.Argument(help="A bundled or published model, or a model folder: prints its card.")
    ] = None,
) -> None:
    """Which models there are; of one, what is known and what fine-tuning it takes."""
    from seqgraft.card import facts_of, list_models, model_card

    _say(model_card(facts_of(name)).rstrip() if name else list_models())


def _print_agreement(table: pd.DataFrame) -> None:
    """A line for each score over genes of all folds."""
    for (metric, variants), part in table[table["fold"] == "all"].groupby(["metric", "variants"], sort=False):
        scores = [
            f"{row['model']} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            for row in part.to_dict("records")
        ]
        pairs = f"{variants} {part['n'].iloc[0]} pairs of {part['genes'].iloc[0]} genes"
        _say(f"{metric}, {pairs}: {'; '.join(scores)}")


def _print_plan(found: Plan) -> None:
    _print_facts(found.facts)
    if found.problems:
        for problem in found.problems:
            typer.echo(f"seqgraft: {problem}", err=True)
        _say("fit would not start.")
    else:
        _say("fit would start.")


def _print_facts(facts: Mapping[str, str]) -> None:
    width = max((len(name) for name in facts), default=0)
    for name, fact in facts.items():
        _say(f"{name:<{width}}  {fact}")


def _print_metrics(table: pd.DataFrame) -> None:
    """The mean over tracks of the leading metrics; what became of the trunk's own tracks comes last."""
    means = table[table["track"] == ""]
    original = means["note"].str.contains("original tracks", regex=False)
    own = means[~original]
    leading = own.groupby(["group", "unit"], sort=False)["metric"].transform("first")
    for part in (own[own["metric"] == leading], means[original]):
        wide = max((28, *part["model"].str.len()))
        for row in part.to_dict("records"):
            interval = f" ({row['low']:.3f} to {row['high']:.3f})" if row["low"] == row["low"] else ""
            note = f"  {row['note']}" if row["note"] else ""
            group = f"{row['group']:<10} " if part["group"].nunique() > 1 else ""
            score = f"{group}{row['model']:<{wide}} {row['metric']:>10} {row['value']:.3f}{interval}"
            _say(f"{score}  {row['unit']}, fold {row['fold']}{note}")
