"""Several runs on one page: one table and one plot, with the baselines of all of them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence

import pandas as pd

from seqgraft.plots import model_dots, svg
from seqgraft.report.glossary import words_section
from seqgraft.report.page import Cell, Chart, Code, Page, RunFiles, Section, Table, held_out
from seqgraft.report.scores import Key, Score, intervals_in_words, words
from seqgraft.scoring import whole_fold

__all__ = ["comparison_page"]

_LEAD = (
    "Runs stand in the order of their scores. Where intervals overlap, a difference may be chance: 'seqgraft sweep' "
    "repeats each method with several seeds and tests the differences."
)


def comparison_page(runs: Sequence[RunFiles]) -> Page:
    """Ranks runs by the leading score of the first one that was evaluated."""
    names = _names(runs)
    notes = [f"{name}: {text}" for name, run in names.items() for text in run.missing]
    if len({run.part("dataset").get("hash") for run in runs} - {None}) > 1:
        notes.insert(0, "The runs were evaluated on different data, so their scores do not compare.")
    scored = [(run, run.scores) for run in runs if run.scores is not None]
    if not scored:
        table = _table(names, [])
        return Page(f"{len(runs)} runs, none of them evaluated", "", tuple(notes), (Section("Runs", (table,)),))
    # scores without copies of training data, where any run has them
    first, scores = next(((run, found) for run, found in scored if found.main(run.label).is_clean), scored[0])
    main = scores.main(first.label)
    if main.is_clean:
        what = "it has no scores without copies of training data; run 'seqgraft evaluate {}' again."
        notes += [
            f"{name}: {what.format(run.folder)}"
            for name, run in names.items()
            if run.scores is not None and not run.scores.has_copies(whole_fold(main.fold))
        ]
    keys = [main, *(key for key in scores.leading() if key != main and not key.about and key.group != main.group)]
    measures = [(key, _own(names, key), _others(names, key)) for key in keys]
    titles = [_title(own, others, key, held_out(first, key.fold)) for key, own, others in measures]
    headed = [f"{key.group}: {title}" if len(keys) > 1 else title for key, title in zip(keys, titles, strict=True)]
    charts = [
        _chart(own, others, key, title, f"methods{number}")
        for number, ((key, own, others), title) in enumerate(zip(measures, headed, strict=True))
    ]
    sections = [Section("Which run is best?", (_table(names, measures), *charts)), _runs(names)]
    glossary = words_section(titles[0], sections)
    sections += [] if glossary is None else [glossary]
    return Page(titles[0], _LEAD if len(scored) > 1 else "", tuple(notes), tuple(sections))


def _runs(names: Mapping[str, RunFiles]) -> Section:
    """Where each run is, what it was trained on, and how to see more of it."""
    rows = tuple(
        (
            Cell(name),
            Cell(str(run.folder)),
            Cell.of(run.part("dataset").get("folder")),
            Cell.of(run.part("model").get("name")),
            Cell.of(run.part("model").get("licence") or None),
            Cell.of(run.environment.get("command")),
        )
        for name, run in names.items()
    )
    table = Table("Each has a report of its own.", ("run", "folder", "data", "base model", "licence", "made by"), rows)
    commands = "\n".join(f"seqgraft report {shlex.quote(str(run.folder))}" for run in names.values())
    return Section("Where are the runs?", (table, Code("To see all about one", commands)))


#: What is measured, and the scores of runs and of baselines.
Measure = tuple[Key, Mapping[str, Score], Mapping[str, Score]]


def _own(names: Mapping[str, RunFiles], key: Key) -> dict[str, Score]:
    """Each run's score, where it has one."""
    found = {name: run.scores.get(run.label, key) for name, run in names.items() if run.scores is not None}
    return {name: score for name, score in found.items() if score is not None}


def _names(runs: Sequence[RunFiles]) -> dict[str, RunFiles]:
    """Each run's label, with its folder where two share one."""
    labels = [run.label for run in runs]
    return {r.label if labels.count(r.label) == 1 else f"{r.label} ({r.folder.resolve().name})": r for r in runs}


def _others(names: Mapping[str, RunFiles], key: Key) -> dict[str, Score]:
    """All baselines; one that differs between runs is listed for each of them."""
    labels = {run.label for run in names.values()}
    others: dict[str, Score] = {}
    for name, run in names.items():
        for model, score in (run.scores.others(run.label, key) if run.scores else {}).items():
            known = others.get(model)
            if known is not None and not math.isclose(known.value, score.value, rel_tol=1e-6, abs_tol=1e-9):
                others[f"{model} ({name})"] = score
            elif model not in labels:
                others.setdefault(model, score)
    return others


def _title(own: Mapping[str, Score], others: Mapping[str, Score], key: Key, place: str) -> str:
    if not own:
        return f"{key.text}{place} is undefined for every run"
    ranked = sorted(own.items(), key=lambda item: item[1].rank)
    best, score = ranked[0]
    text = f"{best} is best of {len(own)} runs with" if len(own) > 1 else f"{best} reaches"
    text = f"{text[:1].upper()}{text[1:]} {key.text} {score.short}{place}"
    if len(ranked) > 1:
        text += f"; then {ranked[1][0]}, {ranked[1][1].value:z.2f}"
    baselines = [item for item in others.items() if not item[1].is_ceiling]
    if not baselines:
        return text
    name, rival = min(baselines, key=lambda item: item[1].rank)
    beaten = "; the best baseline" if score.rank < rival.rank else "; none beats the best baseline"
    return f"{text}{beaten}, {words(name)}, {rival.value:z.2f}"


def _chart(own: Mapping[str, Score], others: Mapping[str, Score], key: Key, title: str, name: str) -> Chart:
    rows = [(model, score, "run") for model, score in own.items()]
    rows += [(model, score, "ceiling" if score.is_ceiling else "baseline") for model, score in others.items()]
    rows.sort(key=lambda row: row[1].rank)
    frame = pd.DataFrame([{"model": n, "value": s.value, "low": s.low, "high": s.high, "group": g} for n, s, g in rows])
    groups = [group for group in ("run", "baseline", "ceiling") if any(row[2] == group for row in rows)]
    figure = model_dots(frame, title=title, xlabel=key.axis, groups=groups)
    what = f"track {key.track}" if key.track else "mean over tracks"
    intervals = intervals_in_words(frame["low"], "lines are 95 % bootstrap intervals over regions")
    caption = f"{key.axis}, {what}, fold {key.fold}; {intervals}."
    return Chart(svg(figure, name, title), caption)


def _table(names: Mapping[str, RunFiles], measures: Sequence[Measure]) -> Table:
    first = measures[0][1] if measures else {}
    ordered = sorted(names, key=lambda name: first[name].rank if name in first else math.inf)
    rows = [
        (
            Cell(name),
            *(Cell.score(own.get(name)) for _, own, _ in measures),
            Cell.of(run.trained),
            Cell.of(run.part("result").get("best_epoch")),
            Cell.duration(run.environment.get("seconds")),
            Cell.size(run.environment.get("peak_memory_bytes")),
        )
        for name, run in ((name, names[name]) for name in ordered)
    ]
    unknown = (Cell.of(None),) * 4
    models = dict.fromkeys(model for _, _, others in measures for model in others)
    for model in models:
        rows.append((Cell(words(model)), *(Cell.score(others.get(model)) for _, _, others in measures), *unknown))
    strong = frozenset([0]) if first else frozenset()
    scores = [key.column for key, _, _ in measures]
    columns = ("method", *scores, "trained parameters", "best epoch", "training time", "peak memory")
    lows = (score.low for _, own, others in measures for score in (*own.values(), *others.values()))
    caption = f"Runs and, below them, baselines; {intervals_in_words(lows, '95 % intervals in brackets')}."
    return Table(caption, columns, tuple(rows), strong)
