"""Cards of a run: its data, its model, what it cost, how to cite it, and how to make it again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from seqgraft.data.duplicates import duplicates_in_words
from seqgraft.plots import svg, training_curve
from seqgraft.report.page import ATTRIBUTIONS, VARIANTS, Cell, Chart, Code, Facts, RunFiles, Section, Table
from seqgraft.report.scores import metric_name, number, words

__all__ = [
    "cards_section",
    "cite_section",
    "exposure_section",
    "exposure_sentence",
    "provenance_section",
    "settings_section",
    "training_section",
]  # fmt: skip

_MAX_NAMES = 12
#: What an adapter's label holds -> where the method comes from.
_METHODS = {
    "QLoRA": "QLoRA: Dettmers et al. 2023, arXiv:2305.14314",
    "DoRA": "DoRA: Liu et al. 2024, arXiv:2402.09353",
    "LoRA": "LoRA: Hu et al. 2021, arXiv:2106.09685",
    "LoCon": "LoRA, here also of convolutions: Hu et al. 2021, arXiv:2106.09685",
    "IA3": "IA3: Liu et al. 2022, arXiv:2205.05638",
    "Houlsby": "Bottleneck adapters: Houlsby et al. 2019, arXiv:1902.00751",
    "prompt": "Prompt tuning: Lester et al. 2021, arXiv:2104.08691",
}
#: Columns of a table of pseudobulk tracks: key in the notes -> head.
_TRACK_NOTES = {
    "cells": "cells", "depth": "depth, counts", "unit": "unit", "tss_enrichment": "TSS enrichment",
    "split_half": "Pearson of two halves of the cells", "ceiling": "ceiling (Pearson)",
}  # fmt: skip


def exposure_sentence(run: RunFiles) -> str:
    """Only where the trunk has seen what the run was tested on, or nobody knows, and the run went on all the same."""
    found = run.part("exposure")
    allowed = ", which allow_exposure let pass" if found.get("allowed") else ""
    what = "Not held out from the trunk" if found.get("share") else "Not known to be held out from the trunk"
    return f"{what}: {found['problem']}{allowed}." if found.get("problem") else ""


def exposure_section(run: RunFiles) -> Section | None:
    """What the trunk saw in its own training of the windows that the run was tested on."""
    found = run.part("exposure")
    if not found.get("note"):
        return None
    counts = found.get("counts") or {}
    touched = {"train": "its training", "valid": "its validation", "test": "only its test", "nothing": "none of its"}
    rows = [(f"windows that touch {words_} regions", f"{counts[name]:,}") for name, words_ in touched.items() if counts]
    facts = Facts.of(("exposure", found["note"]), *rows, ("warning", exposure_sentence(run)), wide=True)
    return Section("Has the trunk seen the test regions?", (facts,))


def training_section(run: RunFiles) -> Section | None:
    """Curves of the epochs, and beside them what they cost."""
    blocks: list[Chart | Facts] = []
    if run.log is not None and not run.log.empty:
        score = metric_name(str(run.environment.get("metric") or "score"))
        figure = training_curve(run.log, score=score)
        title = figure.texts[0].get_text().replace("\n", " ")
        epochs = f"{len(run.log)} epoch{'s' * (len(run.log) != 1)}"
        caption = f"Loss (smaller is better) and {score} of {epochs}; the weights of the best one were kept."
        blocks.append(Chart(svg(figure, "training", title), caption))
    cost = _cost(run)
    blocks += [cost] if cost.pairs else []
    return Section("How did training go, and what did it cost?", tuple(blocks)) if blocks else None


def _cost(run: RunFiles) -> Facts:
    environment, result, frozen = run.environment, run.part("result"), run.part("frozen_bytes")
    quantised = frozen.get("now", 0) < frozen.get("before", 0)
    return Facts.of(
        ("training time", Cell.duration(environment.get("seconds")).text),
        ("peak memory", Cell.size(environment.get("peak_memory_bytes")).text),
        ("tensors of a training step at most", Cell.size(result.get("step_bytes") or None).text),
        ("frozen weights", Cell.size(frozen.get("now")).text),
        ("frozen weights before quantising", Cell.size(frozen["before"]).text if quantised else None),
        ("epochs", result.get("epochs")),
        ("steps", Cell.of(result.get("steps")).text),
        ("cache of frozen layers", result.get("cache")),
        ("device", environment.get("device")),
        ("threads", environment.get("threads")),
        ("precision of training", environment.get("precision")),
        title="Cost",
    )


def cards_section(run: RunFiles) -> Section | None:
    """Cards of the data and of the model, and a table of tracks where the notes have one."""
    data, model = run.part("dataset"), run.part("model")
    if not (data or model):
        return None
    blocks: list[Facts | Table] = [facts for facts in (_data(data), _model(run, model)) if facts.pairs]
    notes = data.get("notes")
    tracks = notes.get("tracks") if isinstance(notes, dict) else None
    if isinstance(tracks, dict) and tracks and all(isinstance(row, dict) for row in tracks.values()):
        blocks.append(_track_table(tracks))
    return Section("What are the data and the model?", tuple(blocks))


def _data(data: Mapping[str, Any]) -> Facts:
    tracks = [str(track) for track in data.get("tracks", [])]
    more = f", and {len(tracks) - _MAX_NAMES} more" if len(tracks) > _MAX_NAMES else ""
    chroms = data["chroms"] if isinstance(data.get("chroms"), dict) else {}
    target = f"{data['bins']:,} bins of {data.get('bin_size')} bp" if data.get("bins", 1) > 1 else "one value"
    folds = [
        (f"fold {fold}", f"{count:,} regions{_on(chroms.get(fold, []))}")
        for fold, count in data.get("folds", {}).items()
    ]
    notes = data.get("notes")
    return Facts.of(
        ("kind", data.get("kind")),
        ("folder", data.get("folder")),
        ("sequence window", f"{data['window']:,} bp" if data.get("window") else "of any length" if data else None),
        ("target", target if data else None),
        *folds,
        (f"{len(tracks)} track{'s' * (len(tracks) != 1)}", ", ".join(tracks[:_MAX_NAMES]) + more if tracks else None),
        *(_notes(notes) if isinstance(notes, dict) else ()),
        title="Data",
    )  # fmt: skip


def _on(chroms: list[str]) -> str:
    return f" on {', '.join(chroms)}" if 0 < len(chroms) <= _MAX_NAMES else ""


def _notes(notes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was noted during preparation, in words; what is nought, and tables of rows, are left out."""
    for name, note in notes.items():
        if name == "duplicates" and isinstance(note, dict) and {"exact", "near"} <= set(note):
            yield "duplicates", duplicates_in_words(note)
        elif name != "tracks" and (text := _in_words(note)):
            yield words(name), text


def _in_words(note: Any) -> str:
    if isinstance(note, dict):
        parts = {key: _in_words(value) for key, value in note.items()}
        return "; ".join(f"{words(str(key))} {text}" for key, text in parts.items() if text)
    if isinstance(note, list):
        return (
            ""
            if any(isinstance(part, (dict, list)) for part in note)
            else "; ".join(filter(None, map(_in_words, note)))
        )
    if isinstance(note, bool) or not isinstance(note, (int, float)):
        return "" if note in (None, False) else str(note)
    return number(note) if note else ""


def _track_table(tracks: Mapping[str, Mapping[str, Any]]) -> Table:
    keys = [key for key in _TRACK_NOTES if any(row.get(key) is not None for row in tracks.values())]
    rows = tuple((Cell(name), *(Cell.of(row.get(key)) for key in keys)) for name, row in tracks.items())
    caption = (
        "Tracks: what was counted, and how well two random halves of the cells agree. The ceiling is the highest "
        "correlation that a prediction without any error could have."
    )
    return Table(caption, ("track", *(_TRACK_NOTES[key] for key in keys)), rows)


def _model(run: RunFiles, model: Mapping[str, Any]) -> Facts:
    counts = run.part("counts")
    share = f"{run.trained:,} ({run.trained / counts['total']:.2%})" if run.trained and counts.get("total") else None
    return Facts.of(
        ("base model (trunk)", model.get("name")),
        ("its weights", model.get("weights") or ("random at the start" if model else None)),
        ("its licence", model.get("licence") or None),
        ("token of the species", model.get("species")),
        *((term, run.part("tokens").get(term)) for term in ("tokens", "unknown tokens", "truncated bases")),
        ("method", run.label),
        ("numbers in all", f"{counts['total']:,}" if counts.get("total") else None),
        ("of these trained", share),
        *((f"trained in the {part}", f"{counts[part]:,}") for part in ("adapter", "head", "trunk") if counts.get(part)),
        ("file of what was trained", Cell.size(run.adapter_bytes).text),
        title="Model",
    )  # fmt: skip


def cite_section(run: RunFiles) -> Section | None:
    """What a paper that uses the run should name."""
    if not run.environment:
        return None
    model, software = run.part("model"), run.part("versions").get("seqgraft")
    method = next((text for word, text in _METHODS.items() if word in run.label), None)
    weights = str(model.get("weights") or "random weights")
    if re.fullmatch(r"[0-9a-f]{64}", weights):
        weights = f"weights {weights[:12]}"
    data = run.part("dataset").get("hash")
    facts = Facts.of(
        ("software", f"seqgraft {software}, Apache-2.0" if software else None),
        ("base model", f"{model.get('name')}, {model.get('citation') or weights}" if model else None),
        ("licence of its weights", model.get("licence") or None),
        ("method", method),
        ("data", f"the sources of the prepared data {str(data)[:12]}" if data else None),
        wide=True,
    )
    return Section("How to cite it", (facts,)) if facts.pairs else None


def provenance_section(run: RunFiles) -> Section | None:
    """The commands that make it again or add to it, the command that made it, versions and hashes."""
    environment, here = run.environment, shlex.quote(str(run.folder))
    blocks: list[Facts | Code] = []
    if run.experiment:
        settings = shlex.quote(str(run.folder / "experiment.yaml"))
        again = f"seqgraft fit {settings} NEW_RUN\nseqgraft evaluate NEW_RUN\nseqgraft report NEW_RUN"
        blocks.append(Code("To do it again, with the same prepared data", again))
    if run.scores is not None and run.part("dataset").get("kind") not in ("windows", "personal", None):
        blocks.append(Code("To add variants and logos to this page", _more(here, placed=bool(_chroms(run)))))
    facts = Facts.of(
        ("made by", environment.get("command")),
        ("hash of the data", run.part("dataset").get("hash")),
        ("weights of the base model", run.part("model").get("weights")),
        ("platform", environment.get("platform")),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.part("versions").items())),
        wide=True,
    )
    blocks += [facts] if facts.pairs else []
    return Section("How to make it again", tuple(blocks)) if blocks else None


def settings_section(run: RunFiles) -> Section | None:
    """The experiment as it was run, and everything that was noted while the data were prepared."""
    notes = run.part("dataset").get("notes")
    blocks = [Code("experiment.yaml", run.experiment)] if run.experiment else []
    blocks += [Code("Notes of preparation", json.dumps(notes, indent=2, ensure_ascii=False))] if notes else []
    return Section("Every setting and note", tuple(blocks), folded=True) if blocks else None


def _chroms(run: RunFiles) -> object:
    return run.part("dataset").get("chroms")


def _more(run: str, *, placed: bool) -> str:
    regions = "regions.bed" if placed else "sequences.fa"
    variants = f"seqgraft variants {run} variants.vcf {run}/{VARIANTS}/all.parquet\n" if placed else ""
    logos = f"seqgraft attribute {run} {regions} {run}/{ATTRIBUTIONS}/all.npz\n"
    return f"{variants}{logos}seqgraft report {run}"
