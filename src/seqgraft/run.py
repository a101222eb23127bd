"""Run directories: what a run reads, makes and leaves behind.

::

    runs/NAME/
      experiment.yaml     resolved: every default written out
      environment.json    versions, command, dataset, model, counts, cost
      log.csv             one row per epoch
      checkpoints/        last.safetensors (to resume), best.safetensors
      adapter/            adapter.json, weights.safetensors
      evaluation/         metrics.parquet, differences.parquet, genes.parquet, moments.npz, examples.npz
      report.html
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from seqgraft import __version__, objectives
from seqgraft.adapters import Counts, adapt, load_adapter, merge, save_adapter
from seqgraft.attribute import AttributeConfig, Attributions, attribute
from seqgraft.data import prepare_source
from seqgraft.data.dataset import (
    Dataset,
    DatasetInfo,
    check_new_folder,
    hash_file,
    new_folder,
    open_dataset,
    write_json,
)
from seqgraft.data.donors import MEAN
from seqgraft.data.seen import read_trunk_folds
from seqgraft.donor_scores import evaluate_donors
from seqgraft.effects import EffectsConfig, Found, write_effects
from seqgraft.errors import ConfigError, Problems, RunError
from seqgraft.evaluate import Evaluation, evaluate_model
from seqgraft.experiment import Experiment, parse_source, read_experiment, read_yaml, settings_of, write_yaml
from seqgraft.exposure import inherited, test_exposure
from seqgraft.genome import Genome, read_gtf
from seqgraft.joint import Joint
from seqgraft.losses import Loss, MaskedTokens
from seqgraft.memory import FrozenBytes
from seqgraft.models.base import Head, SequenceModel
from seqgraft.models.folders import find_model, save_model
from seqgraft.models.masked import MaskedModel, token_counts, tokeniser_of
from seqgraft.models.track_head import start_track_heads
from seqgraft.models.weights import ModelConfig, build_beside, build_masked, build_model, is_random
from seqgraft.objectives import Elementwise, Objective, OfGenes
from seqgraft.output import (
    check_arrays,
    check_embeddings,
    check_output,
    write_arrays,
    write_embeddings,
    write_predictions,
)
from seqgraft.perplexity import evaluate_masked
from seqgraft.predict import FORWARD_ONLY, embed, predict_batches, resolve_precision
from seqgraft.regions import regions_for_prediction
from seqgraft.scoring import default_metric
from seqgraft.sequence import PAD
from seqgraft.token_counts import TokenCounts, count_tokens
from seqgraft.tracks import TrackTable
from seqgraft.train import FitResult, TrainConfig, fit
from seqgraft.variants import Layout, ScreenConfig, VariantConfig
from seqgraft.variants.calibrate import Calibrated, Calibration, calibrate
from seqgraft.variants.panels import Panels, check_panels, draw_panels
from seqgraft.variants.screen import Screened, screen
from seqgraft.variants.table import Scored, score_vcf

__all__ = [
    "Attributed",
    "Run",
    "attribute_run",
    "build_run",
    "calibrate_run",
    "check_replicates",
    "effects_run",
    "embed_run",
    "evaluate_run",
    "export_run",
    "fit_run",
    "inputs_of",
    "label_of",
    "layout_of",
    "objective_of",
    "open_run",
    "predict_run",
    "prepare",
    "score_model",
    "score_run",
    "screen_run",
    "seeded_model",
    "tokens_of",
    "trained_windows",
    "with_precision",
]


_STARTING = 32  # training examples that set where a pretrained track begins as a head


@dataclass(frozen=True)
class Run:
    """A finished run: its settings, its data and its model with the adapter in place."""

    folder: Path
    experiment: Experiment
    dataset: Dataset
    model: SequenceModel


def prepare(source: Path, folder: Path, overrides: tuple[str, ...] = ()) -> Dataset:
    """Prepares the dataset that a YAML file describes.

    Raises:
        ConfigError: the file is wrong.
        DataError: the data are wrong.
        RunError: the folder exists or cannot be written.
    """
    settings = parse_source(read_yaml(source, overrides), str(source))
    return prepare_source(settings, Path(folder))


def label_of(experiment: Experiment) -> str:
    """The run's name in tables: its adapter, or "from scratch" for a trunk with random weights that trains."""
    if not is_random(experiment.model):
        return experiment.adapter.label
    return "from scratch" if experiment.adapter.kind == "full" else f"{experiment.adapter.label} on random weights"


def objective_of(experiment: Experiment, dataset: Dataset, model: SequenceModel | None = None) -> Objective:
    """The objective that the experiment's loss means for these tracks, or for the tokens of this model."""
    joint, more = experiment.joint, [name for name in ("loss_weights", "joint") if getattr(experiment, name)]
    if isinstance(experiment.loss, MaskedTokens) and more:
        raise ConfigError("masked tokens are the whole loss", more, where="loss", remedy="Leave these keys out")
    objective = _main_objective(experiment, dataset, model)
    if joint is None:
        return objective
    beside = open_dataset(joint.data)
    if experiment.evaluate.original is None:
        beside.rows(experiment.evaluate.fold)  # what is forgotten will be measured on it
    return Joint(objective, dataset.rows("train"), dataset, beside, joint, experiment.train.augment)


def _main_objective(experiment: Experiment, dataset: Dataset, model: SequenceModel | None) -> Objective:
    loss, lengths = experiment.loss, dataset.lengths if experiment.train.buckets else None
    shares = experiment.loss_weights
    if isinstance(loss, MaskedTokens):
        assert model is not None  # whose tokens they are
        return objectives.MaskedTokens(tokeniser_of(model.trunk), loss.share, lengths)
    losses = loss if isinstance(loss, Mapping) else dict.fromkeys(dataset.tracks.groups, loss) if loss else None
    if dataset.donors is not None:
        if losses is not None and hasattr(loss, "of_genes"):  # one for all is for the group in which donors differ
            losses = {group: one for group, one in losses.items() if group != MEAN}
        return OfGenes(dataset.tracks, losses or {}, dataset.donors.gene, experiment.train.batch_size, shares)
    if wrong := [group for group, one in (losses or {}).items() if hasattr(one, "of_genes")]:
        what, remedy = "the loss compares donors, and the data have none", "Use another loss, or data of kind: personal"
        raise ConfigError(what, wrong, where="loss", remedy=remedy)
    return Elementwise(
        dataset.tracks, cast("Mapping[str, Loss] | None", losses), dataset.info.settings.get("class_weights"), lengths,
        shares,
    )  # fmt: skip


def build_run(experiment: Experiment, dataset: Dataset | None = None) -> tuple[SequenceModel, Dataset]:
    """Model (without its adapter) and dataset of an experiment; new heads start at the training means.

    The same seed gives the same model.
    """
    dataset = dataset or _open_data(experiment)
    model = seeded_model(experiment, dataset)
    rows = dataset.rows("train")
    if isinstance(model, MaskedModel):
        if is_random(experiment.model):
            _start_masked(model, dataset, rows)
        return model, dataset
    means = np.nanmean(dataset.squashed_targets(rows[:: max(1, len(rows) // 512)]).astype(np.float64), axis=(0, 2))
    names = list(dataset.tracks.names)
    for name, head in model.heads.items():
        if name.startswith("new_") and isinstance(head, Head):
            head.start_at(np.nan_to_num(means[[names.index(track) for track in head.tracks.names]]))
    return model, dataset


def _start_masked(model: MaskedModel, dataset: Dataset, rows: npt.NDArray[np.int64]) -> None:
    """An untrained head for masked tokens starts at the frequencies of the tokens in some of the training windows."""
    tokeniser, some = tokeniser_of(model.trunk), rows[:: max(1, len(rows) // 8192)]
    parts = np.array_split(some, len(some) // 64 + 1)
    counts = sum(token_counts(tokeniser, *dataset.sequences(part)) for part in parts)
    head: Any = model.trunk.lm
    head.start_at(torch.as_tensor(counts))


def _open_data(experiment: Experiment) -> Dataset:
    """The dataset of an experiment, without its tracks where these play no part."""
    dataset = open_dataset(experiment.data)
    if isinstance(experiment.loss, MaskedTokens):
        if dataset.donors is not None:
            what, remedy = "donors have no masked tokens", "Use kind: windows of the same genome, or another loss"
            raise ConfigError(what, "masked_tokens", where="loss", remedy=remedy)
        return replace(dataset.select_tracks(TrackTable.none()), covariates=None)
    return dataset


def with_precision(experiment: Experiment, model: SequenceModel) -> Experiment:
    """The experiment with the precision that "auto" means for this model on this machine."""
    return _in_precision(experiment, resolve_precision(experiment.train.precision, model))


def _in_precision(experiment: Experiment, precision: str) -> Experiment:
    return replace(experiment, train=replace(experiment.train, precision=precision))


def seeded_model(experiment: Experiment, dataset: Dataset) -> SequenceModel:
    """The model of an experiment before training and without its adapter, as the seed draws it."""
    torch.manual_seed(experiment.train.seed)
    if isinstance(experiment.loss, MaskedTokens):
        return build_masked(experiment.model, dataset.info)
    covariates = 0 if dataset.covariates is None else dataset.covariates.shape[1]
    joint = experiment.joint
    model = build_model(experiment.model, dataset.tracks, dataset.info, covariates, own_bins=joint is not None)
    if joint is not None:
        beside = open_dataset(joint.data)
        model.beside = build_beside(experiment.model, beside.tracks, beside.info)
    return model


def tokens_of(experiment: Experiment, model: SequenceModel, dataset: Dataset) -> TokenCounts:
    """The tokens of the folds that a run reads, in the views that it draws."""
    folds = {"train": experiment.train.augment, "valid": FORWARD_ONLY}
    folds |= {experiment.evaluate.fold: experiment.evaluate.ensemble}
    known = set(dataset.regions["fold"])
    present = {name: (dataset.rows(name), views) for name, views in folds.items() if name in known}
    return count_tokens(model.trunk, dataset, present, experiment.model.unknown)


def fit_run(experiment: Experiment, folder: Path, *, resume: bool = False) -> FitResult:
    """Trains an experiment into a run directory; ``plan`` should have found nothing wrong.

    Raises:
        RunError: the directory holds a run already and ``resume`` is off.
        SeqgraftError: whatever else stands in the way, before or while training.
    """
    folder = Path(folder)
    main = not _other_process()
    if main and not resume and (folder / "experiment.yaml").exists():
        raise RunError(
            "the run directory holds a run already",
            str(folder),
            remedy="Continue it with --resume, or choose another name",
        )
    if resume and (folder / "experiment.yaml").exists():
        before = read_experiment(folder / "experiment.yaml")
        if experiment.train.precision == "auto":  # which was decided when the run began
            experiment = _in_precision(experiment, before.train.precision)
        _check_resumed(experiment, before, folder)
    model, dataset = build_run(experiment)
    experiment = with_precision(experiment, model)
    if experiment.model.track is not None:
        rows = dataset.rows("train")
        some = rows[:: max(1, len(rows) // _STARTING)]
        start_track_heads(model, (dataset.sample(part) for part in np.array_split(some, -(-len(some) // 4))))
    objective = objective_of(experiment, dataset, model)
    counts = adapt(model, experiment.adapter)
    tokens = tokens_of(experiment, model, dataset)
    tokens.problems.raise_if_any()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if main:
            write_yaml(folder / "experiment.yaml", settings_of(experiment))
            beside = {"joint": objective.in_words} if isinstance(objective, Joint) else {}
            facts = _environment(experiment, dataset, model, counts, tokens) | beside
            write_json(folder / "environment.json", facts)
    except OSError as error:
        raise RunError(
            f"the run directory cannot be written ({error.strerror})",
            str(folder),
            remedy="Choose a folder that you can write to",
        ) from error
    result = fit(model, dataset, objective, experiment.train, folder, resume=resume)
    if main:
        base = {"name": experiment.model.name, "init": experiment.model.init}
        save_adapter(model, folder / "adapter", base, folds=_fold_counts(dataset), replace_existing=True)
        environment = _environment(experiment, dataset, model, counts, tokens) | beside
        write_json(
            folder / "environment.json",
            environment
            | {"result": asdict(result), "seconds": result.seconds, "peak_memory_bytes": result.peak_memory_bytes},
        )
    return result


def _check_resumed(experiment: Experiment, before: Experiment, folder: Path) -> None:
    """A run goes on as it began; only how it is scored, and what does not change the result, may be another."""
    free = {"patience", "save_minutes", "tracker", "cache_gb"}
    parts = ("model", "adapter", "loss", "loss_weights", "joint")
    named = [(name, getattr(experiment, name), getattr(before, name)) for name in parts]
    for name in sorted(TrainConfig.__dataclass_fields__.keys() - free):
        named.append((f"train.{name}", getattr(experiment.train, name), getattr(before.train, name)))
    if changed := [name for name, now, then in named if now != then]:
        raise RunError(
            "the run was started with other settings",
            changed,
            where=folder,
            remedy=f"Resume it with {folder / 'experiment.yaml'}, or start a new run",
        )


def _other_process() -> bool:
    import os

    return int(os.environ.get("RANK", "0")) > 0


def open_run(folder: Path) -> Run:
    """A finished run, ready to predict.

    Raises:
        RunError: there is no finished run.
        ModelError: the adapter and the weights below it do not belong together.
    """
    folder = Path(folder)
    if not (folder / "experiment.yaml").exists():
        raise RunError("this is not a run directory", str(folder), remedy="Give the folder that 'seqgraft fit' wrote")
    if not (folder / "adapter").exists():
        raise RunError("the run was not finished", str(folder), remedy="Continue it with 'seqgraft fit ... --resume'")
    experiment = read_experiment(folder / "experiment.yaml")
    if (folder / "data" / "dataset.json").exists():  # a pulled run brings what it needs of its data
        experiment = replace(experiment, data=folder / "data")
    dataset = _open_data(experiment)
    model = seeded_model(experiment, dataset)
    load_adapter(model, folder / "adapter")
    if torch.cuda.is_available():
        model.to("cuda")
    return Run(folder, experiment, dataset, model.eval())


def evaluate_run(
    folder: Path,
    fold: str | None = None,
    *,
    extra: Mapping[str, npt.NDArray[np.float32]] | None = None,
    baselines: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Evaluation:
    """Scores a run and its baselines and writes ``evaluation/``.

    Args:
        extra: predictions to score beside them, squashed, ``(rows of the fold, tracks, bins)``, by name.
        baselines: those of the baselines, where they are known already; computed if None.
    """
    run = open_run(folder)
    config, joint = run.experiment.evaluate, run.experiment.joint
    if joint is not None and config.original is None:
        config = replace(config, original=joint.data)
    if not len(run.dataset):
        remedy = "Pull it with --data and a prepared dataset of the same tracks"
        raise ConfigError("a pulled run has no data to be scored on", str(folder), remedy=remedy)
    if isinstance(run.model, MaskedModel):
        return _evaluate_masked(run, run.model, fold)
    if run.dataset.donors is not None:
        label = label_of(run.experiment)
        evaluation = evaluate_donors(run.model, run.dataset, config, label, run.experiment.model, extra=extra)
        evaluation.save(run.folder / "evaluation")
        return evaluation
    evaluation = evaluate_model(
        run.model, run.dataset, config, label_of(run.experiment), run.experiment.model,
        fold=fold, extra=extra, baselines=baselines,
    )  # fmt: skip
    evaluation.save(run.folder / "evaluation")
    return evaluation


def _evaluate_masked(run: Run, model: MaskedModel, fold: str | None) -> Evaluation:
    loss = run.experiment.loss
    assert isinstance(loss, MaskedTokens)  # as the model says
    objective, label = objectives.MaskedTokens(tokeniser_of(model.trunk), loss.share), label_of(run.experiment)
    before = None
    if model.trunk.spec.weights is not None:
        before = build_masked(run.experiment.model, run.dataset.info).to(next(model.parameters()).device).eval()
    evaluation = evaluate_masked(
        model, run.dataset, run.experiment.evaluate, label, objective, fold=fold, pretrained=before
    )
    evaluation.save(run.folder / "evaluation")
    return evaluation


def _with_tracks(run: Run) -> Run:
    """The run.

    Raises:
        ConfigError: it was trained on masked tokens, and predicts no tracks.
    """
    if isinstance(run.model, MaskedModel):
        remedy = "Export it, and fit a run to tracks or labels with the model; 'variants' and 'embed' take it as it is"
        raise ConfigError("a run of masked tokens predicts no tracks", str(run.folder), remedy=remedy)
    return run


def score_model(
    name: str,
    genome: Path,
    vcf: Path,
    out: Path,
    config: VariantConfig | None = None,
    *,
    resume: bool = False,
    shard: tuple[int, int] = (1, 1),
) -> Scored:
    """Scores variants with a language model as it was published, by its masked likelihood (``variants.likelihood``).

    Args:
        name: of a bundled model, or the path of a model folder; it has a head for masked tokens.
        genome: FASTA that the variants are on.
        vcf, out, config, resume, shard: as in ``score_run``.

    Raises:
        ConfigError: there is no such model; settings that are for tracks.
        DataError: the VCF does not fit the genome.
        ModelError: the model has no head for masked tokens.
        RunError: as ``score_run``.
    """
    pretrained = find_model(name)
    if pretrained is None:
        raise ConfigError("an architecture has no weights to score variants with", name, remedy="Name a trained model")
    window = int(pretrained.content["window"])
    model = build_masked(ModelConfig(name), DatasetInfo("windows", window, 1, window)).eval()
    layout = Layout(window, 1, window, TrackTable.none(), Genome.open(genome))
    settings = settings_of(config := config or VariantConfig())
    del settings["batch_size"]  # which changes rounding at most
    identity = {"run": pretrained.content["weights_sha256"], "settings": settings}
    if torch.cuda.is_available():
        model.to("cuda")
    return score_vcf(model, layout, config, Path(vcf), Path(out), identity=identity, resume=resume, shard=shard)


def predict_run(folder: Path, source: Path, out: Path) -> list[Path]:
    """Predicts the regions (BED) or sequences (FASTA, table) of a file in raw units; returns the files written."""
    run = _with_tracks(open_run(folder))
    dataset = inputs_of(run, source)
    check_output(out, dataset)
    config = run.experiment.evaluate
    batches = predict_batches(
        run.model, dataset, np.arange(len(dataset)), ensemble=config.ensemble, batch_size=config.batch_size
    )
    return write_predictions(out, dataset, batches, run.model.tracks)


def embed_run(folder: Path, source: Path, out: Path) -> Path:
    """Writes the trunk's features, averaged over each region or sequence, as Parquet."""
    check_embeddings(out)
    run = open_run(folder)
    dataset = inputs_of(run, source)
    config = run.experiment.evaluate
    rows = np.arange(len(dataset))
    return write_embeddings(
        out, dataset, rows, embed(run.model, dataset, rows, ensemble=config.ensemble, batch_size=config.batch_size)
    )


def inputs_of(run: Run, source: Path) -> Dataset:
    """The regions (BED) or sequences (FASTA, table) of a file, as the run's model sees them.

    Raises:
        ConfigError, DataError: as ``regions_for_prediction``; sequences that the model's tokens do not suit.
    """
    covariates = [] if run.dataset.covariates is None else list(run.dataset.covariates.columns)
    dataset = regions_for_prediction(source, run.dataset.info, run.model.tracks, run.dataset.genome, covariates)
    config = run.experiment
    everything = {"": (np.arange(len(dataset)), config.evaluate.ensemble)}
    count_tokens(run.model.trunk, dataset, everything, config.model.unknown).problems.raise_if_any()
    return dataset


def score_run(
    folder: Path | Run,
    vcf: Path,
    out: Path,
    config: VariantConfig | None = None,
    *,
    resume: bool = False,
    shard: tuple[int, int] = (1, 1),
    replicates: Sequence[Path | Run] = (),
    panels: Panels | None = None,
) -> Scored:
    """Scores the variants of a VCF with a finished run: what their alternative alleles change in each of its tracks.

    A run of masked tokens says how much less it expects the alternative base (``variants.likelihood``).

    A run of labels needs to have been prepared from intervals of a genome; the score is then the change of the label
    that is predicted for the window around the variant, after the link: of a probability, or in the label's own unit.

    Args:
        folder: of the run, or the run itself if it is open; of ``replicates`` too.
        out: ``.parquet`` (one row per variant and scorer) or ``.vcf.gz`` (one INFO field per scorer).
        config: by default, the log2 fold change of the bins around the variant; for labels the difference.
        resume: continue what was interrupted, with the same run, VCF and settings.
        shard: ``(i, n)``: only the i-th of n stretches of the file.
        replicates: further runs of the same tracks, of other seeds or folds: the scores are the mean over all of them,
            and have no percentiles.
        panels: draw some of the variants, once all are scored.

    Raises:
        ConfigError: the run's data have no genome or its model takes more than sequences; a wrong setting or suffix;
            replicates of other tracks.
        DataError: the VCF does not fit the genome.
        RunError: the run is not finished; the output exists or cannot be written; nothing to resume from matches.
    """
    run = folder if isinstance(folder, Run) else open_run(folder)
    layout = layout_of(run)
    config = config or VariantConfig()
    masked = isinstance(run.model, MaskedModel)
    config = config if masked else config.resolved(layout)
    if panels is not None:
        check_panels(panels, layout_of(_with_tracks(run)), Path(out))
    identity = _identity(run, config)
    others = [other if isinstance(other, Run) else open_run(other) for other in replicates]
    if others:
        check_replicates(layout, others)
        identity["replicates"] = [_identity(other, config)["run"] for other in others]
    found = None if others or masked else Calibration.open(run.folder / "calibration", _key(identity, layout))
    models = [run.model, *(other.model for other in others)]
    done = score_vcf(
        run.model, layout, config, Path(vcf), Path(out),
        identity=identity, resume=resume, shard=shard, calibration=found, replicates=models[1:],
    )  # fmt: skip
    if panels is not None:
        draw_panels(models, layout, config, Path(out), panels)
    return done


def check_replicates(layout: Layout, others: Sequence[Run]) -> None:
    """Refuses runs whose scores would not mean the same.

    Raises:
        ConfigError: another genome, other windows, bins or tracks.
    """
    problems = Problems(ConfigError)
    for other in others:
        theirs = layout_of(other)
        facts = {
            "genome": (layout.genome.hash, theirs.genome.hash),
            "windows and bins": tuple((each.window, each.bins, each.bin_size) for each in (layout, theirs)),
            "tracks": (layout.tracks.names, theirs.tracks.names),
        }
        if differing := [name for name, (ours, its) in facts.items() if ours != its]:
            remedy = "Give runs of one prepared dataset"
            problems.add("a replicate differs from the first run in", differing, where=other.folder, remedy=remedy)
    problems.raise_if_any()


def _identity(run: Run, config: VariantConfig) -> dict[str, Any]:
    """What scores depend on beside the variants and the genome."""
    adapter = run.folder / "adapter"
    files = [(adapter / name).read_bytes() for name in ("adapter.json", "weights.safetensors")]
    settings = settings_of(config)
    del settings["batch_size"]  # which changes rounding at most
    read = () if config.over is None else config.over.files
    hashes = [hash_file(path)["sha256"] for path in read if path.is_file()]
    return {"run": hashlib.sha256(b"".join(files)).hexdigest(), "settings": settings, "files": hashes}


def _key(identity: Mapping[str, Any], layout: Layout) -> str:
    """The name of a calibration: the same for the same run, genome and settings of the scores."""
    free = {"allow_skipped", "rename", "local", "over"}
    settings = {name: value for name, value in identity["settings"].items() if name not in free}
    settings["over"] = {k: v for k, v in identity["settings"]["over"].items() if k not in ("gtf", "bed", "rename")}
    content = [identity["run"], settings, identity["files"], layout.genome.hash]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def calibrate_run(
    folder: Path,
    background: Path | int,
    config: VariantConfig | None = None,
    *,
    gtf: Path | None = None,
    seed: int = 0,
    resume: bool = False,
) -> Calibrated:
    """Scores background variants, so that ``score_run`` with the same settings adds percentiles.

    Args:
        background: a VCF, or how many variants to draw at random from the run's genome.
        gtf: genes, by the distance to whose starts the background is divided.

    Raises:
        ConfigError, DataError: as ``score_run``; no stratum has enough variants.
        RunError: the run is not finished; these settings are calibrated already.
    """
    run = _with_tracks(open_run(folder))
    layout = layout_of(run)
    config = (config or VariantConfig()).resolved(layout)
    identity = _identity(run, config)
    return calibrate(
        run.model, layout, config, background, run.folder / "calibration", _key(identity, layout),
        identity=identity, gtf=gtf, seed=seed, resume=resume,
    )  # fmt: skip


def screen_run(folder: Path, regions: Path, out: Path, config: ScreenConfig | None = None) -> Screened:
    """First-order scores of every SNV of the regions of a BED file, and exact ones of some (``variants.screen``).

    Raises:
        ConfigError, DataError, ModelError, RunError: as ``screen``; the run has no genome, or is not finished.
    """
    run = _with_tracks(open_run(folder))
    return screen(run.model, layout_of(run), config or ScreenConfig(), Path(regions), Path(out))


def effects_run(folder: Path, out: Path, config: EffectsConfig | None = None) -> Found:
    """What variants do to the genes of a finished run of donors, into a new folder (``seqgraft.effects``).

    Raises:
        ConfigError, DataError, RunError: as ``write_effects``; the run is not finished.
    """
    run = _with_tracks(open_run(folder))
    return write_effects(run.model, run.dataset, Path(out), run.experiment.evaluate, config)


def layout_of(run: Run) -> Layout:
    """What the run's model sees and predicts around a variant.

    Raises:
        ConfigError: the run's data have no genome or windows; its model takes more than sequences.
    """
    info, genome = run.dataset.info, run.dataset.genome
    if genome is None or not info.window:
        what = "the run's data are sequences without a window of a genome, where a variant would have no place"
        remedy = "Prepare the labels from intervals: genome, interval and window in the prepare file"
        raise ConfigError(what, str(run.folder), remedy=remedy)
    if run.dataset.covariates is not None:
        names = list(run.dataset.covariates.columns)
        remedy = "Fit a run without covariates"
        raise ConfigError("the run's model needs covariates, which a VCF does not have", names, remedy=remedy)
    return Layout(info.window, info.bins, info.bin_size, run.model.tracks, genome)


@dataclass(frozen=True)
class Attributed:
    """What :func:`attribute_run` made.

    Attributes:
        found: the attributions.
        files: the ``.npz``, then the figures.
        padded: how many windows reach beyond their contig; the model saw N there.
    """

    found: Attributions
    files: list[Path]
    padded: int


def attribute_run(
    folder: Path,
    source: Path,
    out: Path,
    config: AttributeConfig | None = None,
    *,
    plots: Path | None = None,
    suffix: str = ".png",
) -> Attributed:
    """What each base of the regions (BED) or sequences (FASTA, table) of a file does to a number of a finished run.

    Args:
        out: ``.npz`` (:class:`seqgraft.attribute.Attributions`).
        plots: a new folder for one figure of each region and number.
        suffix: of the figures, ``.png`` or ``.svg``.

    Raises:
        ConfigError: an unknown track; settings that do not suit the run; a wrong suffix.
        DataError: a region that is outside its chromosome or, with genes, is no gene.
        RunError: the run is not finished; an output exists or cannot be written.
    """
    check_arrays(out)
    if suffix not in (".png", ".svg"):
        raise ConfigError("figures of this format are not drawn", suffix, remedy="Choose .png or .svg")
    if plots is not None:
        check_new_folder(plots)
    config, run = config or AttributeConfig(), _with_tracks(open_run(folder))
    dataset = inputs_of(run, source)
    exons = None if config.genes is None else read_gtf(config.genes, rename=config.rename)
    found = attribute(run.model, dataset, config, exons)
    padded = 0
    if dataset.genome is not None:
        windows = [dataset.interval(row) for row in range(len(dataset))]
        padded = sum(w.start < 0 or w.end > dataset.genome.chroms[w.chrom] for w in windows)
    files = [write_arrays(out, found.write)]
    if plots is not None:
        with new_folder(plots) as building:
            _draw(found, building, suffix)
        files += sorted(plots.iterdir())
    return Attributed(found, files, padded)


def _draw(found: Attributions, folder: Path, suffix: str) -> None:
    from seqgraft.logos import attribution_figure, save_figure

    for row, region in enumerate(found.regions.to_dict("records")):
        known = found.codes[row] != PAD
        for number, explained in enumerate(found.names):
            figure = attribution_figure(
                found.hypothetical[row, number][:, known], found.codes[row, known], chrom=region["chrom"],
                start=region["start"], number=explained, method=found.method, name=region["name"].strip("."),
            )  # fmt: skip
            name = re.sub(r"[^A-Za-z0-9_.-]+", "_", region["name"]).strip("._")[:60]
            words = [f"{row:04d}", *([name] if name else []), *([str(number)] if len(found.names) > 1 else [])]
            save_figure(figure, folder / f"{'_'.join(words)}{suffix}")


def export_run(
    folder: Path,
    out: Path,
    *,
    name: str,
    licence: str = "",
    citation: str = "",
    card: str = "",
    half: bool = False,
) -> float:
    """Merges the run's adapter and writes a model folder that ``model.name`` accepts.

    Heads of tracks with bins go along. Those of labels stay in the run: a model folder has no place for how they pool
    the bins, nor for covariates; heads that trained along stand in for them, beside tracks with bins they stay in the
    run. Places of training sequences that have none in a genome cannot be listed.

    Args:
        half: round the weights to bfloat16 and store them so, in half the space.

    Returns:
        The largest relative difference that merging made.

    Raises:
        ModelError: the adapter cannot be merged.
    """
    run = open_run(folder)
    difference = merge(run.model)
    model, info, beside, joint = run.model, run.dataset.info, run.model.beside, run.experiment.joint
    model.beside = None
    if _has_labels(model):
        model, info, card = SequenceModel(model.trunk, {}, TrackTable.none()), _info_of_trunk(run), _card(run, card)
        if beside is not None and joint is not None:
            model = SequenceModel(model.trunk, dict(beside.heads.items()), beside.tracks)  # type: ignore[arg-type]
            info = open_dataset(joint.data).info
    parameters = sum(p.numel() for p in run.model.trunk.parameters())
    folds, _ = inherited(run.experiment.model, run.dataset)
    save_model(
        model,
        Path(out),
        name=name,
        info=info,
        licence=licence or run.model.trunk.spec.licence,
        citation=citation or run.model.trunk.spec.citation,
        trained_on=trained_windows(run),
        card=card,
        half=half,
        parameters=parameters,
        folds=folds,
        seqgraft=__version__,
    )
    return difference


def _has_labels(model: SequenceModel) -> bool:
    """Whether heads pool the bins of a sequence into one."""
    return any(head.pool != "none" for head in model.heads.values() if isinstance(head, Head))


def _info_of_trunk(run: Run) -> DatasetInfo:
    """Window and bins of the trunk alone, as long as the longest sequence of the run's labels."""
    dataset, trunk = run.dataset, run.model.trunk
    longest = dataset.info.window or int(np.max(np.asarray(dataset.lengths)))
    window = -(-longest // trunk.stride) * trunk.stride
    size = trunk.spec.bin_size or window
    bins = max(1, window // size - 2 * type(trunk).drops)
    return replace(dataset.info, window=window, bins=bins, bin_size=size)


def _card(run: Run, text: str) -> str:
    """The card, and what the folder of a run of labels does not hold."""
    names = ", ".join(run.model.tracks.names)
    more = f"The trunk of a run on labels ({names}). Their heads are not part of it."
    if run.dataset.genome is None:
        more += " Its training sequences have no places in a genome, so no leak check finds them."
    return f"{text.rstrip()}\n\n{more}\n".lstrip()


def trained_windows(run: Run) -> pd.DataFrame | None:
    """The windows that the weights were fitted to: chrom, start, end, fold; None where none is known.

    Those of this run, and those of the model it started from; of a pulled run, what it brought.
    """
    if (run.folder / "trained_on.bed").exists():
        return read_trunk_folds(run.folder / "trained_on.bed")
    joint, (_, before) = run.experiment.joint, inherited(run.experiment.model, run.dataset)
    if run.dataset.genome is None:
        return before
    fitted = [_training_windows(run.dataset)]
    if joint is not None and (beside := open_dataset(joint.data)).genome is not None:
        fitted += [_training_windows(beside)] if beside.genome.hash == run.dataset.genome.hash else []
    joined = _joined(pd.concat(fitted))
    return joined if before is None else pd.concat([before, joined], ignore_index=True)


def _training_windows(dataset: Dataset) -> pd.DataFrame:
    info, regions = dataset.info, dataset.regions
    fitted = regions[regions["fold"] == "train"][["chrom", "start", "end", "fold"]].copy()
    margin = (info.window - info.bins * info.bin_size) // 2
    fitted["start"], fitted["end"] = (fitted["start"] - margin).clip(lower=0), fitted["end"] + margin
    return fitted


def _joined(regions: pd.DataFrame) -> pd.DataFrame:
    """Overlapping or touching regions of a chromosome and fold as one."""
    regions = regions.sort_values(["fold", "chrom", "start"])
    same = (regions["chrom"] == regions["chrom"].shift()) & (regions["fold"] == regions["fold"].shift())
    reach = regions.groupby(["fold", "chrom"])["end"].cummax().shift()
    piece = (~(same & (regions["start"] <= reach))).cumsum()
    return regions.groupby(piece).agg({"chrom": "first", "start": "min", "end": "max", "fold": "first"})


def _fold_counts(dataset: Dataset) -> dict[str, int]:
    return {str(fold): int(count) for fold, count in dataset.regions["fold"].value_counts().items()}


def _fold_chroms(dataset: Dataset) -> dict[str, list[str]]:
    return {
        str(fold): sorted(set(part["chrom"])) for fold, part in dataset.regions.groupby("fold") if part["chrom"].any()
    }


def _metric(experiment: Experiment, dataset: Dataset) -> str:
    if isinstance(experiment.loss, MaskedTokens):
        return "cross_entropy"
    return experiment.train.metric or default_metric(str(dataset.tracks.frame["link"].iloc[0]))


def _code(model: SequenceModel) -> dict[str, Any]:
    """Which code of a repository makes the trunk, if any does."""
    code = getattr(model.trunk, "settings", {}).get("code")
    return {"code": {name: code[name] for name in ("repository", "commit", "sha256")}} if code else {}


def _environment(
    experiment: Experiment, dataset: Dataset, model: SequenceModel, counts: Counts, tokens: TokenCounts
) -> dict[str, Any]:
    info = dataset.info
    return {
        "versions": {
            "seqgraft": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "peft", "accelerate", "transformers")},
        },
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "label": label_of(experiment),
        "precision": experiment.train.precision,
        "metric": _metric(experiment, dataset),
        "dataset": {
            "folder": str(dataset.folder),
            "hash": dataset.hash,
            "kind": info.kind,
            "window": info.window,
            "bins": info.bins,
            "bin_size": info.bin_size,
            "folds": _fold_counts(dataset),
            "chroms": _fold_chroms(dataset),
            "tracks": dataset.tracks.names,
            "notes": info.notes,
        },
        "model": {
            "name": experiment.model.name,
            "init": experiment.model.init,
            "licence": model.trunk.spec.licence,
            "citation": model.trunk.spec.citation,
            "weights": model.trunk.spec.weights,
            "species": getattr(model.trunk, "settings", {}).get("species", ""),
            **_code(model),
            "parameters": sum(p.numel() for p in model.trunk.parameters()) - counts.adapter,
        },
        "exposure": test_exposure(experiment, dataset).record(),
        "counts": asdict(counts),
        "frozen_bytes": asdict(FrozenBytes.of(model)),
        **({"tokens": tokens.record()} if tokens.folds else {}),
    }
