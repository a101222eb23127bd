"""A run that is served: what can be asked of it, and how that is computed.

Scores are those of ``apply.score_run``, of the same settings and to the last digit; predictions and attributions are
made by the functions that the commands call. Nothing is computed a second way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.apply import check_replicates, inputs_of, layout_of, score_run
from seqgraft.attribute import AttributeConfig, Attributions, attribute
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset
from seqgraft.errors import ConfigError
from seqgraft.genes import signal_table
from seqgraft.genome import Interval
from seqgraft.models.masked import MaskedModel
from seqgraft.predict import predict
from seqgraft.progress import steps
from seqgraft.run import Run, label_of
from seqgraft.sequence import Codes
from seqgraft.serve.answers import Column, Logo, Scores, Signal
from seqgraft.serve.asked import Choice, Variants, write_vcf_of
from seqgraft.target import Target
from seqgraft.tracks import unsquash
from seqgraft.variants import SCORERS, VariantConfig, VariantScorer
from seqgraft.variants.alleles import AlleleCheck
from seqgraft.variants.marks import marks_of
from seqgraft.variants.over import Centre, Window
from seqgraft.variants.panels import SHOWN, profile_of
from seqgraft.variants.place import alternate

__all__ = ["Served"]

LOGO = 80  # bp around a variant; letters that stay readable beside each other
MUTAGENESIS = 200  # bp up to which every base of a region is changed; longer ones are explained by gradients

Floats = npt.NDArray[np.float64]


class Served:
    """A finished run, open to be asked; with replicates its scores and predictions are means over all of them.

    Raises:
        ConfigError: a run that has no place for a variant: of donors, without a genome, with covariates; replicates of
            other tracks.
    """

    def __init__(self, run: Run, replicates: Sequence[Run] = (), config: VariantConfig | None = None) -> None:
        if run.dataset.info.kind == "personal":
            what = "a run of donors predicts the expression of genes, and has no prediction for any other place"
            remedy = "Use 'seqgraft effects', which writes what every variant does to its genes"
            raise ConfigError(what, str(run.folder), remedy=remedy)
        self.run, self.others, self.layout = run, tuple(replicates), layout_of(run)
        check_replicates(self.layout, self.others)
        self.config = replace(config or VariantConfig(), allow_skipped=True)
        self.masked = isinstance(run.model, MaskedModel)
        self.check = AlleleCheck(
            self.layout.genome, self.layout.window, self.layout.target, self.config.rename, self.masked
        )
        self.columns_of(self.config)  # refuses strand pairs that cannot be merged

    @property
    def _runs(self) -> tuple[Run, ...]:
        return (self.run, *self.others)

    def facts(self) -> dict[str, Any]:
        """What the page says of the run, for JSON."""
        layout, info = self.layout, self.run.dataset.info
        config = self.config if self.masked else self.config.resolved(layout)
        label, chroms = layout.bins == 1, list(layout.genome.chroms)
        over = {} if config.over is None else {"kind": config.over.kind, "width": getattr(config.over, "width", None)}
        return {
            "name": self.run.folder.resolve().name,
            "model": self.run.experiment.model.name,
            "label": label_of(self.run.experiment),
            "replicates": len(self.others),
            "genome": layout.genome.path.name,
            "chroms": chroms[:5],
            "more_chroms": max(0, len(chroms) - 5),
            "predicts": info.in_words,
            "target": layout.target,
            "tracks": len(layout.tracks),
            "scorers": [] if self.masked else list(SCORERS),
            "overs": [] if self.masked or label else sorted({over.get("kind", ""), "centre", "window"}),
            "chosen": {
                "scorers": [] if self.masked else [kind_of(SCORERS, scorer) for scorer in config.scorers],
                "over": over.get("kind", ""),
                "width": over.get("width"),
                "reverse_complement": config.ensemble.reverse_complement,
                "merge_strands": config.merge_strands,
                "stitch": config.stitch,
            },
            "stranded": list(layout.tracks.permutation) != list(range(len(layout.tracks))),
            "signal": not (self.masked or label),
            "logo": not self.masked,
            "cannot": self._cannot(),
        }

    def _cannot(self) -> list[str]:
        """What a run of this kind has no answer to, in sentences."""
        if self.masked:
            return [
                "This run predicts masked tokens, not tracks. Single-base substitutions have a score: how much more "
                "the alternative base is expected than the reference. There is no signal, logo or region."
            ]
        if self.layout.bins == 1:
            return [f"This run predicts labels of {self.layout.window:,} bp: there is no signal along the sequence."]
        return []

    def columns_of(self, config: VariantConfig) -> tuple[Column, ...]:
        """What has scores: the tracks, or the signals whose strands are merged.

        Raises:
            DataError: strand pairs whose names do not tell which strand is which.
        """
        tracks = self.layout.tracks
        if self.masked:
            return (Column("log_likelihood_ratio", "", "", ()),)
        if not config.merge_strands:
            records = tracks.frame[["name", "group", "condition"]].to_dict("records")
            return tuple(Column(r["name"], r["group"], r["condition"], (r["name"],)) for r in records)
        return tuple(
            Column(
                row["name"], row["group"], row["condition"],
                tuple(dict.fromkeys((tracks.names[row["plus"]], tracks.names[row["minus"]]))),
            )
            for row in signal_table(tracks).to_dict("records")
        )  # fmt: skip

    def scores(self, asked: Variants, choice: Choice) -> Scores:
        """The scores of variants, as ``seqgraft variants`` writes them.

        Raises:
            ConfigError: settings that do not suit the run.
            ModelError: predictions that are not finite.
        """
        config = choice.on(self.config)
        columns = self.columns_of(config)
        with _private_folder() as folder:
            vcf, out = folder / "asked.vcf", folder / "scores.parquet"
            write_vcf_of(asked.variants, vcf)
            done = score_run(self.run, vcf, out, config, replicates=self.others)
            frame = pd.read_parquet(out)
        config = config if self.masked else config.resolved(self.layout)
        over = () if config.over is None else config.over.columns
        marks = () if self.masked else marks_of(self.layout.tracks, config.merge_strands)
        notes = list(done.notes)
        if done.unread:
            notes.append(f"Variants without a row, because they lie in the window of no gene or region: {done.unread}.")
        if done.padded:
            notes.append(
                f"In {done.padded} of {done.rows} rows the window reaches beyond its contig; the model saw N there."
            )
        return Scores(frame, columns, tuple(over), marks, config, asked.problems, tuple(notes))

    def alleles(self, scores: Scores, row: int) -> Signal:
        """Predictions of both alleles in the bins around the variant of a row.

        Raises:
            ConfigError: the run has no bins.
        """
        self._needs_bins()
        variant, config = self.check.named(scores.variant(row)), replace(scores.config, over=Window())
        scorers = [VariantScorer(each.model, self.layout, config) for each in self._runs]
        found = profile_of(scorers, self.layout, variant)
        changed = (variant.position - 1, variant.position - 1 + len(variant.ref))
        ref, alt = (self._by_column(part, scores.columns) for part in (found.reference, found.alternate))
        return Signal(
            scores.title(row), variant.chrom, found.start, self.layout.bin_size, changed, scores.columns, ref, alt
        )

    def allele_logos(self, scores: Scores, row: int) -> Logo:
        """What every base within 80 bp does to the reference's and to the alternate's prediction, by mutagenesis.

        The number is the logarithm of the signal that the scores read around the variant, for labels the label.

        Raises:
            ConfigError: a run of masked tokens.
        """
        variant, layout = self.check.named(scores.variant(row)), self.layout
        start, reserve = layout.centred(variant), len(variant.ref)
        around = Interval(variant.chrom, start - reserve, start + layout.window + reserve)
        codes = layout.genome.codes(around)
        both = [
            codes[reserve : reserve + layout.window],
            alternate(codes, variant.position - 1 - start, variant, layout.window, reserve),
        ]
        over = scores.config.over
        width = min(over.width if isinstance(over, Centre) else layout.target, layout.target)
        first = variant.position - 1 - (width - 1) // 2
        target = start + layout.margin
        read = (max(first, target), min(first + width, target + layout.target))
        dataset = self._of_sequences(variant.chrom, target, np.stack(both), read)
        found = self._attributed(dataset, scores.config, "ism", min(LOGO, layout.window), ("*",))
        left = (layout.window - found.codes.shape[1]) // 2
        at = layout.window // 2 - 1 - left
        moved = len(variant.ref) != len(variant.alt)  # then the alternate's bases have no places of the genome
        places = found.regions.assign(start=[start + left, 0 if moved else start + left])
        places["chrom"] = [variant.chrom, "" if moved else variant.chrom]
        marked = ((at, at + len(variant.ref)), (at, at + len(variant.alt)))
        return Logo(replace(found, regions=places), scores.columns, ("reference", "alternate"), marked)

    def region(self, region: Interval, choice: Choice) -> Signal:
        """Predictions of a region, in the window that is centred on it.

        Raises:
            ConfigError: a run of masked tokens.
        """
        self._needs_tracks()
        config, layout = choice.on(self.config), self.layout
        with _private_folder() as folder:
            datasets = [inputs_of(each, _bed(folder, region)) for each in self._runs]
        each = [self._raw(run, d, config) for run, d in steps(list(zip(self._runs, datasets, strict=True)))]
        columns = self.columns_of(config)
        values = self._by_column(np.mean(each, axis=0), columns)
        start = int(datasets[0].regions["start"].iloc[0])
        first = max(0, (region.start - start) // layout.bin_size)
        last = min(layout.bins, -(-(region.end - start) // layout.bin_size))
        totals, shown = values[:, first:last].sum(axis=1), max(last - first, min(SHOWN, layout.bins))
        marked = (region.start, region.end) if shown > last - first else None
        first = min(max(0, first - (shown - last + first) // 2), layout.bins - shown)
        place = f"{region.chrom}:{region.start + 1:,}-{region.end:,}"
        most = columns[int(np.argmax(totals))].name
        title = f"{place}: most predicted signal in {most}" if len(columns) > 1 else f"{place}: predicted signal"
        begin = start + first * layout.bin_size
        drawn = values[:, first : first + shown].copy()  # so that the whole window is not kept
        asked = (region, choice)
        return Signal(title, region.chrom, begin, layout.bin_size, marked, columns, drawn, None, totals, asked)

    def by_gradient(self, region: Interval) -> bool:
        """Whether the logo of a region is one column's alone; mutagenesis gives those of all at once."""
        return region.length > MUTAGENESIS

    def region_logo(self, region: Interval, choice: Choice, column: Column) -> Logo:
        """What every base of a region does to the signal in it: by mutagenesis up to 200 bp, else by the gradient.

        Raises:
            ConfigError: a run of masked tokens.
            ModelError: a model that has no gradient by the bases.
        """
        self._needs_tracks()
        config = choice.on(self.config)
        with _private_folder() as folder:
            dataset = inputs_of(self.run, _bed(folder, region))
        width = min(max(region.length, LOGO), self.layout.window)
        method: Literal["ism", "gradient"] = "gradient" if self.by_gradient(region) else "ism"
        found = self._attributed(dataset, config, method, width, ("*",) if method == "ism" else column.tracks)
        return Logo(found, self.columns_of(config), ("",), (None,))

    def _needs_tracks(self) -> None:
        if self.masked:
            remedy = "Ask for single-base substitutions"
            raise ConfigError("a run of masked tokens predicts no tracks", str(self.run.folder), remedy=remedy)

    def _needs_bins(self) -> None:
        self._needs_tracks()
        if self.layout.bins == 1:
            raise ConfigError("a label has no bins to draw", str(self.run.folder), remedy="Look at effects and logos")

    def _raw(self, run: Run, dataset: Dataset, config: VariantConfig) -> Floats:
        """Raw predictions ``(tracks, bins)`` of the only row of a dataset."""
        values = predict(run.model, dataset, np.arange(1), ensemble=config.ensemble)[0].astype(np.float64)
        return np.asarray(unsquash(values, self.layout.tracks, self.layout.bin_size))

    def _by_column(self, values: Floats, columns: Sequence[Column]) -> Floats:
        """Of ``(tracks, bins)`` the sums over the tracks of each column."""
        index = {name: number for number, name in enumerate(self.layout.tracks.names)}
        return np.stack([values[[index[track] for track in column.tracks]].sum(axis=0) for column in columns])

    def _of_sequences(self, chrom: str, start: int, codes: Codes, read: tuple[int, int]) -> Dataset:
        """Sequences ``(n, window)`` as the run's model sees them; the bins that the interval ``read`` touches count."""
        info, tracks, folder = self.run.dataset.info, self.layout.tracks, self.run.dataset.folder
        regions = pd.DataFrame({"chrom": [chrom] * len(codes), "start": start, "end": start + self.layout.target})
        regions = regions.assign(strand=".", name="", fold="predict", bed_start=read[0], bed_end=read[1])
        missing = np.broadcast_to(np.float32(np.nan), (len(codes), len(tracks), info.bins))
        lengths = np.full(len(codes), codes.shape[1], dtype=np.int64)
        return Dataset(folder, replace(info, genome=None), tracks, regions, missing, None, None, codes, lengths, None)

    def _attributed(
        self,
        dataset: Dataset,
        config: VariantConfig,
        method: Literal["ism", "gradient"],
        width: int,
        tracks: tuple[str, ...],
    ) -> Attributions:
        """Attributions of all sequences of a dataset to each of the tracks, the mean over the runs."""
        self._needs_tracks()
        signed = self.layout.bins > 1 and (self.layout.tracks.frame["link"] == "identity").any()
        target = Target(tracks, each=True, statistic="sum" if signed else "auto", pseudocount=1.0)
        views = Augmentation(config.ensemble.reverse_complement, 0)
        asked = AttributeConfig(target, method, width, ensemble=views, batch_size=config.batch_size, local=config.local)
        each = [attribute(run.model, dataset, asked) for run in steps(self._runs)]
        return replace(each[0], hypothetical=np.mean([found.hypothetical for found in each], axis=0))


def kind_of(registry: Mapping[str, type], value: object) -> str:
    """The name under which the class of a value is registered."""
    return next(kind for kind, cls in registry.items() if type(value) is cls)


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder that only this user can read, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="seqgraft-serve-") as folder:
        yield Path(folder)


def _bed(folder: Path, region: Interval) -> Path:
    path = folder / "region.bed"
    path.write_text(f"{region.chrom}\t{region.start}\t{region.end}\n", encoding="utf-8")
    return path
