"""The report of one run. A new panel is a function ``RunFiles -> Section | None`` that joins :data:`SECTIONS`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from seqgraft.cell_plots import confusion_matrix
from seqgraft.plots import metric_dots, svg, tracks_panel, training_curve
from seqgraft.report.donors import donors_section
from seqgraft.report.page import Cell, Chart, Code, Facts, Page, RunFiles, Section, Table, held_out, join
from seqgraft.report.scores import Key, Score, Scores, metric_name, words
from seqgraft.scoring import whole_fold
from seqgraft.specificity import ACROSS, DIFFERENTIAL, OF_CEILING, RECOGNISED

__all__ = ["SECTIONS", "run_page"]

MAX_ROWS = 2000
MAX_EXAMPLES = 4
MAX_NAMES = 12


def run_page(run: RunFiles) -> Page:
    """The report of one run; panels whose files are missing are left out."""
    sections = tuple(section for make in SECTIONS if (section := make(run)) is not None)
    lead = " ".join(
        filter(None, [_exposure_sentence(run), _copies_sentence(run), _data_sentence(run), _model_sentence(run)])
    )
    return Page(_title(run), lead, run.missing, sections)


def _title(run: RunFiles) -> str:
    if run.scores is None:
        return f"{run.label}: trained, not evaluated yet" if run.adapter_bytes else f"{run.label}: an unfinished run"
    return _finding(run, run.scores, run.scores.main(run.label))


def _finding(run: RunFiles, scores: Scores, key: Key) -> str:
    """The score of a run beside its best baseline, in words."""
    own = scores.get(run.label, key)
    if own is None:
        return f"{run.label}: {key.text}{held_out(run, key.fold)} is undefined"
    text = f"{run.label[:1].upper()}{run.label[1:]} reaches {key.text} {own.short}{held_out(run, key.fold)}"
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
    return f"Data: {data.get('kind', '')}, {tracks} track{'s' * (tracks != 1)}; regions: {folds}."


def _model_sentence(run: RunFiles) -> str:
    total = run.part("counts").get("total")
    if not total or run.trained is None:
        return ""
    share = f"{run.trained:,} of {total:,} parameters trained ({run.trained / total:.2%})"
    return f"Model: {run.part('model').get('name', 'unknown')}, {share}."


def _exposure_sentence(run: RunFiles) -> str:
    """Only where the trunk has seen what the run was tested on, or nobody knows, and the run went on all the same."""
    found = run.part("exposure")
    allowed = ", which allow_exposure let pass" if found.get("allowed") else ""
    what = "Not held out from the trunk" if found.get("share") else "Not known to be held out from the trunk"
    return f"{what}: {found['problem']}{allowed}." if found.get("problem") else ""


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


def _exposure_section(run: RunFiles) -> Section | None:
    found = run.part("exposure")
    if not found.get("note"):
        return None
    counts = found.get("counts") or {}
    touched = {"train": "its training", "valid": "its validation", "test": "only its test", "nothing": "none of its"}
    rows = [(f"windows that touch {words} regions", f"{counts[name]:,}") for name, words in touched.items() if counts]
    facts = Facts.of(("exposure", found["note"]), *rows, ("warning", _exposure_sentence(run)))
    return Section("Has the trunk seen the test regions?", (facts,))


def _scores_section(run: RunFiles) -> Section | None:
    if run.scores is None:
        return None
    charts = []
    for number_, key in enumerate(run.scores.leading()):
        title = _forgetting(run, run.scores, key) if key.about else _finding(run, run.scores, key)
        figure = metric_dots(run.scores.rows(key), title=title, xlabel=key.axis, highlight=run.label)
        caption = f"{key.axis} of each track, fold {key.fold}. Lines are 95 % bootstrap intervals over regions."
        charts.append(Chart(svg(figure, f"scores{number_}", title), caption))
    return Section("How good is it?", (_summary(run, run.scores), *charts))


def _summary(run: RunFiles, scores: Scores) -> Table:
    keys = [key for key in scores.keys() if not _is_of_cells(key)]  # noqa: SIM118  # it is no mapping
    models = [run.label, *(model for model in scores.models if model != run.label)]
    keys = [key for key in keys if any(scores.get(model, key) for model in models)] or keys[:1]  # some cannot be tested
    models = [model for model in models if model == run.label or any(scores.get(model, key) for key in keys)]
    rows = tuple((Cell(words(model)), *(Cell.score(scores.get(model, key)) for key in keys)) for model in models)
    folds = sorted({key.fold for key in keys})
    columns = tuple(key.column + (f", {key.fold}" if len(folds) > 1 else "") for key in keys)
    what = "means over tracks" if not keys[0].track else "each track"
    caption = f"The run and, below it, the baselines: {what}, fold {join(folds)}; 95 % bootstrap intervals in brackets."
    return Table(caption, ("model", *columns), rows, frozenset([0]))


def _is_of_cells(key: Key) -> bool:
    """Is it about telling cell types apart, or beside a ceiling?"""
    return key.metric in (DIFFERENTIAL, RECOGNISED) or key.metric.endswith(OF_CEILING)


def _cells_section(run: RunFiles) -> Section | None:
    """Specificity, shares of ceilings and confusion of cell types, of the rows without copies where some have them."""
    if run.scores is None:
        return None
    main = run.scores.main(run.label)
    keys = [key for key in run.scores.keys() if key.fold == main.fold]  # noqa: SIM118  # it is no mapping
    of_cells = [key for key in keys if _is_of_cells(key)]
    if not of_cells:
        return None
    several = {key.group for key in of_cells}
    own = [key for key in keys if key.metric == ACROSS and key.group in several]
    charts = []
    for number_, key in enumerate(key for key in of_cells if key.metric.endswith(ACROSS + OF_CEILING)):
        charts.append(_share_chart(run, run.scores, key, f"share{number_}"))
    table = run.confusion
    if table is not None and {"model", "fold", "group", "observed", "predicted", "pearson", "best"} <= set(table):
        mine = table[(table["model"] == run.label) & (table["fold"] == main.fold)]
        for number_, (group, part) in enumerate(mine.groupby("group", sort=False)):
            charts.append(_confusion_chart(run, str(group), part, f"confusion{number_}"))
    return Section("Does it tell cell types apart?", (_cells_table(run, run.scores, [*own, *of_cells]), *charts))


def _cells_table(run: RunFiles, scores: Scores, keys: list[Key]) -> Table:
    """A row per measure and group of tracks, a column per model: of both there are many."""
    models = [run.label, *(model for model in scores.models if model != run.label)]
    ordered = sorted(keys, key=lambda key: list(dict.fromkeys(other.group for other in keys)).index(key.group))
    rows = tuple(
        (Cell(key.group), Cell(key.axis), *(Cell.score(scores.get(model, key)) for model in models)) for key in ordered
    )
    caption = (
        "Every track divided by its mean and centred across the tracks of its group, so that what is left is its own:"
        f" means over tracks, fold {keys[0].fold}; 95 % bootstrap intervals in brackets."
    )
    return Table(caption, ("group", "measure", *map(words, models)), rows)


def _share_chart(run: RunFiles, scores: Scores, key: Key, name: str) -> Chart:
    own = scores.get(run.label, key)
    rows = scores.rows(key)
    mine = rows[(rows["model"] == run.label) & (rows["track"] != "")]
    above, undefined = int((mine["value"] >= 1).sum()), int(mine["value"].isna().sum())
    title = f"{run.label[:1].upper()}{run.label[1:]}: " + (f"{own.value:.0%} of the ceiling" if own else "no ceiling")
    title += f" of what cell types have of their own{', ' + key.group if key.group else ''}"
    title += f"; {above} of {len(mine)} tracks at or above it" if above else ""
    title += f"; {undefined} without a ceiling" if undefined else ""
    figure = metric_dots(rows, title=title, xlabel="share of the split-half ceiling", highlight=run.label)
    caption = (
        "The ceiling is an estimate itself, from two random halves of each group's cells, so that a share can exceed 1."
    )
    return Chart(svg(figure, name, title), f"{caption} Lines are 95 % bootstrap intervals of both.")


def _confusion_chart(run: RunFiles, group: str, part: pd.DataFrame, name: str) -> Chart:
    count, right = part["observed"].nunique(), int((part["best"] & (part["observed"] == part["predicted"])).sum())
    title = f"{right} of {count} cell types are recognised by {run.label}: {group}"
    caption = (
        "Pearson of observed and predicted signal after levelling and centring across cell types; framed is the"
        " prediction that correlates best with each observed cell type."
    )
    return Chart(svg(confusion_matrix(part, title=title), name, title), caption)


def _examples_section(run: RunFiles) -> Section | None:
    examples = run.examples
    if examples is None or not len(examples.chrom):
        return None
    charts = []
    for region in range(min(len(examples.chrom), MAX_EXAMPLES)):
        figure = tracks_panel(examples, region)
        title = figure.texts[0].get_text().replace("\n", " ")
        charts.append(Chart(svg(figure, f"example{region}", title), f"Observed and predicted {examples.unit}."))
    return Section("What does it look like?", tuple(charts))


def _training_section(run: RunFiles) -> Section | None:
    if run.log is None or run.log.empty:
        return None
    score = metric_name(str(run.environment.get("metric") or "score"))
    figure = training_curve(run.log, score=score)
    epochs = f"{len(run.log)} epoch{'s' * (len(run.log) != 1)}"
    caption = f"Loss and {score} of {epochs}; the weights of the best one were kept."
    return Section("How did training go?", (Chart(svg(figure, "training", caption), caption),))


def _genes_section(run: RunFiles) -> Section | None:
    if run.genes is None or run.genes.empty:
        return None
    if "pearson_within_genes" in run.genes:
        return donors_section(run)
    first = [column for column in ("model", "level", "track", "metric") if column in run.genes]
    frame = run.genes[[*first, *(column for column in run.genes if column not in first)]]
    caption = "Expression and fold changes of genes in held-out regions, predicted against observed"
    return Section("And genes?", (_frame_table(frame, caption, "evaluation/genes.parquet"),))


def _differences_section(run: RunFiles) -> Section | None:
    if run.differences is None or run.differences.empty:
        return None
    caption = f"{run.label} minus each baseline, with 95 % intervals by paired bootstrap"
    table = _frame_table(run.differences, caption, "evaluation/differences.parquet")
    return Section("How much better than the baselines?", (table,), folded=True)


def _all_scores_section(run: RunFiles) -> Section | None:
    if run.scores is None:
        return None
    table = _frame_table(run.scores.frame, "Every score of every model and track", "evaluation/metrics.parquet")
    return Section("Every score", (table,), folded=True)


def _frame_table(frame: pd.DataFrame, caption: str, source: str) -> Table:
    """Any table; ``low`` and ``high`` become one column, empty columns go, "" among the tracks is their mean."""
    shown = frame.head(MAX_ROWS)
    empty = [column for column in shown if shown[column].isin(["", None]).all()]
    rows, columns = [], [column for column in shown if column not in (*empty, "high")]
    for row in shown.to_dict("records"):
        cells = {str(name): Cell.of(value) for name, value in row.items()}
        if {"low", "high"} <= cells.keys() and cells["low"].sort is not None:
            cells["low"] = Cell(f"{cells['low'].text} to {cells['high'].text}", cells["low"].sort)
        if row.get("track") == "":
            cells["track"] = Cell("mean over tracks")
        if "metric" in row:
            cells["metric"] = Cell(metric_name(str(row["metric"])))
        rows.append(tuple(cells[str(column)] for column in columns))
    more = f" (the first {MAX_ROWS:,} of {len(frame):,} rows in {source})" if len(frame) > MAX_ROWS else ""
    names = ("95 % interval" if column == "low" else words(str(column)) for column in columns)
    return Table(f"{caption}{more}.", tuple(names), tuple(rows))


def _cost_section(run: RunFiles) -> Section | None:
    environment, result, frozen = run.environment, run.part("result"), run.part("frozen_bytes")
    quantised = frozen.get("now", 0) < frozen.get("before", 0)
    facts = Facts.of(
        ("training time", Cell.duration(environment.get("seconds")).text),
        ("peak memory", Cell.size(environment.get("peak_memory_bytes")).text),
        ("tensors of a training step at most", Cell.size(result.get("step_bytes") or None).text),
        ("frozen weights", Cell.size(frozen.get("now")).text),
        ("frozen weights before quantising", Cell.size(frozen["before"]).text if quantised else None),
        ("epochs", result.get("epochs")),
        ("steps", Cell.of(result.get("steps")).text),
        ("device", environment.get("device")),
        ("threads", environment.get("threads")),
        ("precision of training", environment.get("precision")),
    )
    return Section("What did it cost?", (facts,)) if facts.pairs else None


def _cards_section(run: RunFiles) -> Section | None:
    data, model, counts = (run.part(name) for name in ("dataset", "model", "counts"))
    if not (data or model):
        return None
    tracks = [str(track) for track in data.get("tracks", [])]
    more = f", and {len(tracks) - MAX_NAMES} more" if len(tracks) > MAX_NAMES else ""
    target = "one value"
    if data.get("bins", 1) > 1:
        target = f"{data['bins']:,} bins of {data.get('bin_size')} bp"
    facts = Facts.of(
        ("dataset", data.get("folder")),
        ("kind", data.get("kind")),
        ("window", f"{data['window']:,} bp" if data.get("window") else "variable" if data else None),
        ("target", target if data else None),
        ("regions", ", ".join(f"{fold} {count:,}" for fold, count in data.get("folds", {}).items())),
        ("tracks", ", ".join(tracks[:MAX_NAMES]) + more),
        ("trunk", model.get("name")),
        ("weights", model.get("weights")),
        ("token of the species", model.get("species")),
        *((term, run.part("tokens").get(term)) for term in ("tokens", "unknown tokens", "truncated bases")),
        ("licence", model.get("licence")),
        ("citation", model.get("citation")),
        ("adapter", run.label),
        *((f"trained in the {part}", f"{counts[part]:,}") for part in ("adapter", "head", "trunk") if part in counts),
        ("parameters in all", f"{counts['total']:,}" if "total" in counts else None),
        ("adapter file", Cell.size(run.adapter_bytes).text),
    )
    blocks: tuple[Facts | Code, ...] = (facts,)
    if data.get("notes"):
        blocks = (facts, Code("Notes of preparation", json.dumps(data["notes"], indent=2, ensure_ascii=False)))
    return Section("Data and model", blocks, folded=True)


def _provenance_section(run: RunFiles) -> Section | None:
    environment, settings = run.environment, shlex.quote(str(run.folder / "experiment.yaml"))
    commands = f"seqgraft fit {settings} NEW_RUN\nseqgraft evaluate NEW_RUN\nseqgraft report NEW_RUN"
    blocks: list[Facts | Code] = [Code("To do it again", commands)] if run.experiment else []
    facts = Facts.of(
        ("command", environment.get("command")),
        ("dataset hash", run.part("dataset").get("hash")),
        ("weights hash", run.part("model").get("hash")),
        ("platform", environment.get("platform")),
        *((name, version) for name, version in run.part("versions").items()),
    )
    blocks += [facts] if facts.pairs else []
    blocks += [Code("experiment.yaml", run.experiment)] if run.experiment else []
    return Section("How was it made, and how to make it again", tuple(blocks), folded=True) if blocks else None


#: The panels of a run's report, in their order.
SECTIONS: tuple[Callable[[RunFiles], Section | None], ...] = (
    _scores_section,
    _cells_section,
    _exposure_section,
    _examples_section,
    _training_section,
    _genes_section,
    _cost_section,
    _differences_section,
    _all_scores_section,
    _cards_section,
    _provenance_section,
)
