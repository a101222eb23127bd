"""What a finished run says of sequences: predictions, embeddings, variant effects, attributions, effects in donors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqgraft.attribute import AttributeConfig, Attributions, attribute
from seqgraft.data.dataset import (
    Dataset,
    DatasetInfo,
    check_new_folder,
    hash_file,
    new_folder,
)
from seqgraft.effects import EffectsConfig, Found, write_effects
from seqgraft.errors import ConfigError, Problems
from seqgraft.experiment import settings_of
from seqgraft.genome import Genome, read_gtf
from seqgraft.models.folders import find_model
from seqgraft.models.masked import MaskedModel
from seqgraft.models.weights import ModelConfig, build_masked
from seqgraft.output import (
    check_arrays,
    check_embeddings,
    check_output,
    write_arrays,
    write_embeddings,
    write_predictions,
)
from seqgraft.predict import embed, predict_batches
from seqgraft.regions import regions_for_prediction
from seqgraft.run import Run, open_run
from seqgraft.sequence import PAD
from seqgraft.token_counts import count_tokens
from seqgraft.tracks import TrackTable
from seqgraft.variants import Layout, ScreenConfig, VariantConfig
from seqgraft.variants.calibrate import Calibrated, Calibration, calibrate
from seqgraft.variants.panels import Panels, check_panels, draw_panels
from seqgraft.variants.screen import Screened, screen
from seqgraft.variants.table import Scored, score_vcf

__all__ = [
    "Attributed",
    "attribute_run",
    "calibrate_run",
    "check_replicates",
    "effects_run",
    "embed_run",
    "inputs_of",
    "layout_of",
    "predict_run",
    "score_model",
    "score_run",
    "screen_run",
]


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
