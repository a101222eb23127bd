"""The report of one run. A new panel is a function ``RunFiles -> Section | None`` that joins :data:`SECTIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from seqgraft.plots import Examples, metric_dots, model_dots, svg, tracks_panel
from seqgraft.report.cards import (
    cards_section,
    cite_section,
    exposure_section,
    exposure_sentence,
    provenance_section,
    settings_section,
    training_section,
)
from seqgraft.report.cell_types import cells_section, is_of_cells
from seqgraft.report.donors import donors_section, is_of_donors, is_of_genes
from seqgraft.report.effects import attributions_section, variants_section
from seqgraft.report.genes import genes_section
from seqgraft.report.glossary import words_section
from seqgraft.report.page import Cell, Chart, Page, RunFiles, Section, Table, frame_table, held_out
from seqgraft.report.scores import Key, Score, Scores, intervals_in_words, words
from seqgraft.report.values import value_chart
from seqgraft.scoring import whole_fold

__all__ = ["SECTIONS", "run_page"]

MAX_EXAMPLES = 4
MAX_TRACKS = 6  # of an example


def run_page(run: RunFiles) -> Page:
    """The report of one run; panels whose files are missing are left out."""
    sections = [section for make in SECTIONS if (section := make(run)) is not None]
    glossary = words_section(_title(run), sections)
    folded = next((n for n, section in enumerate(sections) if section.folded), len(sections))
    sections[folded:folded] = [glossary] if glossary is not None else []
    lead = " ".join(
        filter(None, [exposure_sentence(run), _copies_sentence(run), _data_sentence(run), _model_sentence(run)])
    )
    return Page(_title(run), lead, run.missing, tuple(sections))


def _title(run: RunFiles) -> str:
    if run.scores is None:
        return f"{run.label}: trained, not evaluated yet" if run.adapter_bytes else f"{run.label}: an unfinished run"
    return _finding(run, run.scores, run.scores.main(run.label))


def _finding(run: RunFiles, scores: Scores, key: Key) -> str:
    """The score of a run beside its best baseline, in words."""
    own = scores.get(run.label, key)
    if own is None:
        return f"{run.label}: {key.text}{held_out(run, key.fold)} is undefined"
    text = f"{_capital(run.label)} reaches {key.text} {own.short}{held_out(run, key.fold)}"
    baselines = {model: score for model, score in scores.others(run.label, key).items() if not score.is_ceiling}
    if not baselines:
        return f"{text}; there is no baseline to compare with"
    name, best = min(baselines.items(), key=lambda item: item[1].rank)
    rival = f"the best baseline, {words(name)}, {best.value:z.2f}"
    if best.rank <= own.rank:
        return f"{text} and does not beat {rival}"
    difference = _difference(run, name, key)
    unclear = difference.low <= 0 <= difference.high if difference else own.low <= best.value <= own.high
    return f"{text}, not clearly better than {rival}" if unclear else f"{text}; {rival}"


def _forgetting(run: RunFiles, scores: Scores, key: Key) -> str:
    """What became of the tracks that the trunk was pretrained on, in words."""
    own, before = scores.get(run.label, key), next(iter(scores.others(run.label, key).values()), None)
    after = f"{own.short} after adaptation" if own else "undefined after adaptation"
    return f"Original tracks of the trunk: {key.text} " + (f"{before.short} before, {after}" if before else after)


def _difference(run: RunFiles, baseline: str, key: Key) -> Score | None:
    """The run minus a baseline, by paired bootstrap; None if it was not computed."""
    table = run.differences
    if table is None or not {"baseline", "track", "metric", "value", "low", "high"} <= set(table):
        return None
    rows = table[(table["baseline"] == baseline) & (table["metric"] == key.metric) & (table["track"] == key.track)]
    for column, wanted in (("group", key.group), ("fold", key.fold)):
        if column in rows and wanted:
            rows = rows[rows[column] == wanted]
    if rows.empty or rows[["value", "low", "high"]].iloc[0].isna().any():
        return None
    value, low, high = (float(rows[column].iloc[0]) for column in ("value", "low", "high"))
    return Score(value, low, high, higher_better=True, is_ceiling=False)


def _data_sentence(run: RunFiles) -> str:
    data = run.part("dataset")
    if not data:
        return ""
    folds = ", ".join(f"{count:,} {fold}" for fold, count in data.get("folds", {}).items())
    tracks = len(data.get("tracks", []))
    named = f", {tracks} track{'s' * (tracks != 1)}" if tracks else ""
    return f"Data: {data.get('kind', '')}{named}; regions: {folds}."


def _model_sentence(run: RunFiles) -> str:
    total = run.part("counts").get("total")
    if not total or run.trained is None:
        return ""
    share = f"{run.trained:,} of {total:,} parameters trained ({run.trained / total:.2%})"
    return f"Model: {run.part('model').get('name', 'unknown')}, {share}."


def _copies_sentence(run: RunFiles) -> str:
    """Only where regions that were tested on have copies in the training data: how many, and the score with them."""
    if run.scores is None:
        return ""
    key = run.scores.main(run.label)
    whole = replace(key, fold=whole_fold(key.fold))
    if not run.scores.has_copies(whole.fold):
        return ""
    note = run.scores.rows(whole)["note"].iloc[0].partition(";")[0]
    leaky = run.scores.get(run.label, whole)
    known = f"; on all of them, {key.text} is {leaky.short}, which is no held-out score" if leaky else ""
    return f"Of the {whole.fold} regions, {note}{known}."


def _scores_section(run: RunFiles) -> Section | None:
    if run.scores is None:
        return None
    blocks: list[Table | Chart] = list(_summaries(run, run.scores))
    several = len({key.group for key in run.scores.leading()}) > 1
    for number_, key in enumerate(run.scores.leading()):
        title = _forgetting(run, run.scores, key) if key.about else _finding(run, run.scores, key)
        blocks.append(_dots(run, run.scores, key, f"{key.group}: {title}" if several else title, f"scores{number_}"))
        scatter = None if key.about else value_chart(run, key, f"values{number_}")
        blocks += [] if scatter is None else [scatter]
    return Section("How good is it?", tuple(blocks))


def _dots(run: RunFiles, scores: Scores, key: Key, title: str, name: str) -> Chart:
    """Scores by track, or by model where there is one track, or means alone."""
    rows = scores.rows(key)
    rows = rows[rows["model"].isin(rows.loc[np.isfinite(rows["value"]), "model"]) | (rows["model"] == run.label)]
    tracks = [track for track in dict.fromkeys(rows["track"]) if track]
    over = f"lines are 95 % bootstrap intervals over {'genes' if is_of_genes(key) else 'regions'}"
    lines = f"{_capital(intervals_in_words(rows['low'], over))}."
    if len(tracks) > 1:
        figure = metric_dots(rows, title=title, xlabel=key.axis, highlight=run.label)
        return Chart(svg(figure, name, title), f"{_capital(key.axis)} of each track, fold {key.fold}. {lines}")
    one = replace(key, track="" if (rows["track"] == "").any() else tracks[0])
    known = {model: scores.get(model, one) for model in dict.fromkeys(rows["model"])}
    ranked = sorted(((model, score) for model, score in known.items() if score), key=lambda item: item[1].rank)
    found = [(m, s.value, s.low, s.high, _role(run, m, s)) for m, s in ranked]
    frame = pd.DataFrame(found, columns=["model", "value", "low", "high", "group"])
    groups = [group for group in ("this run", "baseline", "ceiling") if group in set(frame["group"])]
    figure = model_dots(frame, title=title, xlabel=key.axis, groups=groups)
    what = f"track {tracks[0]}, fold {key.fold}" if tracks else f"fold {key.fold}"
    return Chart(svg(figure, name, title), f"{_capital(key.axis)}, {what}. {lines}")


def _items(key: Key) -> str:
    """What a score of no single track is the mean of."""
    return "genes" if is_of_genes(key) else "hidden tokens" if key.unit == "hidden tokens" else "tracks"


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _role(run: RunFiles, model: str, score: Score) -> str:
    return "this run" if model == run.label else "ceiling" if score.is_ceiling else "baseline"


def _summaries(run: RunFiles, scores: Scores) -> list[Table]:
    """A table per group of tracks and fold: a row per model, a column per measure."""
    keys = [key for key in scores.keys() if not (is_of_cells(key) or is_of_donors(key))]  # noqa: SIM118  # no mapping
    models = [run.label, *(model for model in scores.models if model != run.label)]
    keys = [key for key in keys if any(scores.get(model, key) for model in models)] or keys[:1]  # some cannot be tested
    parts: dict[tuple[str, str, str], list[Key]] = {}
    for key in keys:
        parts.setdefault((key.fold, key.about, "" if key.about else key.group), []).append(key)
    return [_summary(run, scores, part, several=len(parts) > 1) for part in parts.values()]


def _summary(run: RunFiles, scores: Scores, keys: list[Key], *, several: bool) -> Table:
    first, others = keys[0], [model for model in scores.models if model != run.label]
    models = [run.label, *(model for model in others if any(scores.get(model, key) for key in keys))]
    found = [[scores.get(model, key) for key in keys] for model in models]
    rows = tuple((Cell(words(model)), *map(Cell.score, row)) for model, row in zip(models, found, strict=True))
    lows = (score.low for row in found for score in row if score)
    what = "each track" if first.track else f"means over {_items(first)}"
    place = ", ".join(
        filter(None, [f"{first.fold}{held_out(run, first.fold)}", first.group if several and not first.about else ""])
    )
    scale = ", on the squashed scale unless a column says otherwise" * any(key.unit == "squashed" for key in keys)
    compared = "the run and, below it, what it is compared with"
    if first.about:
        compared = "the tracks that the trunk was pretrained on, before and after adaptation"
    intervals = intervals_in_words(lows, "95 % bootstrap intervals in brackets")
    caption = f"Fold {place}: {compared}; {what}{scale}; {intervals}."
    for note, of in scores.notes(first).items():
        about = "" if set(of) >= set(models) else f"{', '.join(map(words, of))}: "
        caption += f" {_capital(about + note)}."
    heads = (f"{key.column_of('squashed')}{f', {key.group}' if key.about and key.group else ''}" for key in keys)
    return Table(caption, ("model", *heads), rows, frozenset([0]))


def _examples_section(run: RunFiles) -> Section | None:
    examples = run.examples
    if examples is None or not len(examples.chrom):
        return None
    shown = _spread(examples, MAX_TRACKS)
    charts = []
    for region in range(min(len(examples.chrom), MAX_EXAMPLES)):
        figure = tracks_panel(shown, region)
        title = figure.texts[0].get_text().replace("\n", " ")
        some = f" of {len(shown.tracks)} of {len(examples.tracks)} tracks" * (len(shown.tracks) < len(examples.tracks))
        caption = f"Observed and predicted {examples.unit}{some}; bins of {examples.bin_size} bp."
        charts.append(Chart(svg(figure, f"example{region}", title), caption))
    return Section("What does it look like?", tuple(charts))


def _spread(examples: Examples, most: int) -> Examples:
    """Some of the tracks, from the first to the last, so that every kind of them is seen."""
    chosen = np.unique(np.linspace(0, len(examples.tracks) - 1, min(most, len(examples.tracks))).astype(int))
    arrays = {name: getattr(examples, name)[:, chosen] for name in ("observed", "predicted", "baseline")}
    return replace(examples, tracks=[examples.tracks[number] for number in chosen], **arrays)


def _genes_section(run: RunFiles) -> Section | None:
    if run.genes is not None and "pearson_within_genes" in run.genes and not run.genes.empty:
        return donors_section(run)
    return genes_section(run)


def _differences_section(run: RunFiles) -> Section | None:
    if run.differences is None or run.differences.empty:
        return None
    caption = f"{run.label} minus each baseline, with 95 % intervals by paired bootstrap"
    table = frame_table(run.differences, caption, "evaluation/differences.parquet")
    return Section("How much better than the baselines?", (table,), folded=True)


def _all_scores_section(run: RunFiles) -> Section | None:
    if run.scores is None:
        return None
    blocks = [frame_table(run.scores.frame, "Every score of every model and track", "evaluation/metrics.parquet")]
    if run.genes is not None and not run.genes.empty and "level" in run.genes:
        first = [column for column in ("model", "level", "track", "metric") if column in run.genes]
        frame = run.genes[[*first, *(column for column in run.genes if column not in first)]]
        blocks.append(frame_table(frame, "Every score of genes", "evaluation/genes.parquet"))
    return Section("Every score", tuple(blocks), folded=True)


#: The panels of a run's report, in their order; what is folded comes last.
SECTIONS: tuple[Callable[[RunFiles], Section | None], ...] = (
    _scores_section,
    cells_section,
    exposure_section,
    _examples_section,
    _genes_section,
    variants_section,
    attributions_section,
    training_section,
    cards_section,
    cite_section,
    provenance_section,
    _differences_section,
    _all_scores_section,
    settings_section,
)
