"""The card of a shared adapter: what it is, how good beside what, of which data, how to use and to cite it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqgraft import __version__
from seqgraft.models.hub import is_hub_id
from seqgraft.report.page import RunFiles, read_run
from seqgraft.report.scores import Key, Scores, intervals_in_words
from seqgraft.repository import card_head
from seqgraft.run import Run, label_of

__all__ = ["write_card"]

#: What the hub calls licences that are written in another way; all others it knows are theirs in small letters.
_LICENCES = {"cc0": "cc0-1.0", "apache 2.0": "apache-2.0", "bsd": "bsd-3-clause"}
_KNOWN = re.compile(
    r"mit|apache-2\.0|bsd-[23]-clause|isc|unlicense|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[34]\.0|[al]?gpl-[23](\.[01])?|mpl-2\.0|openrail"
)
_SEQGRAFT = "Made with seqgraft"


def write_card(
    run: Run, path: Path, base: Mapping[str, Any], repository: str | None, *, licence: str, citation: str, text: str
) -> None:
    """Writes the card of a run's adapter, without names of files, samples, donors or genes.

    Args:
        base: name, revision and hash of the base model, as others find it.
        repository: on the hub; None for a folder.
        licence: of the adapter; that of the base if not given.
        citation: of the adapter.
        text: Markdown of its maker, that stands first.
    """
    files, spec = read_run(run.folder), run.model.trunk.spec
    licence = licence or spec.licence or "not stated"
    title = (repository or "").rpartition("/")[2] or _plain(label_of(run.experiment))
    parts = [
        f"# {title}",
        *([text.strip()] if text.strip() else []),
        f"{_plain(label_of(run.experiment))} on {_named(base)}, an adapter with its heads for predicting "
        f"{_tracks_in_words(run)} from DNA sequence.",
        "## Scores",
        _scores_in_words(files),
        "## Data",
        _data(run, files),
        "## How to use it",
        _use(run, base, repository),
        "## Model",
        _model(run, files, base, licence),
        "## How to cite",
        "\n".join(f"- {_plain(one)}" for one in (citation, spec.citation) if one) or "Nothing is stated.",
        f"{_SEQGRAFT} {__version__}.",
    ]
    head = card_head(_facts(run, base, licence), title, _results(files))
    path.write_text(head + "\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


def _plain(text: object) -> str:
    """Text without what Markdown or HTML would read as their own."""
    return re.sub(r"[|<>`\[\]\r\n]+", " ", str(text)).strip()


def _named(base: Mapping[str, Any]) -> str:
    at = f" at {base['revision']}" if base["revision"] else ""
    return f"`{_plain(base['name'])}`{at}"


def _facts(run: Run, base: Mapping[str, Any], licence: str) -> dict[str, Any]:
    """What the hub files a model under."""
    name = _LICENCES.get(licence.lower(), licence.lower())
    known = {"license": name} if _KNOWN.fullmatch(name) else {"license": "other", "license_name": _plain(licence)[:90]}
    facts = {"library_name": "seqgraft", **known}
    if is_hub_id(base["name"]) and not base["local"]:
        facts |= {"base_model": base["name"], "base_model_relation": "adapter"}
    kinds = [run.experiment.adapter.kind.replace("_", "-"), run.dataset.info.kind]
    return {**facts, "tags": ["seqgraft", "genomics", "biology", "dna", *kinds]}


def _own(scores: Scores) -> list[Key]:
    """The leading measure of each group of the run's own tracks."""
    return [key for key in scores.leading() if not key.about]


def _results(files: RunFiles) -> list[dict[str, Any]]:
    """The leading score of each group of tracks, with its interval and those of the baselines."""
    scores, found = files.scores, list[dict[str, Any]]()
    if scores is None:
        return found
    for key in _own(scores):
        score = scores.get(files.label, key)
        if score is None:
            continue
        others = {name: round(other.value, 4) for name, other in scores.others(files.label, key).items()}
        interval = {"interval_95": [round(score.low, 4), round(score.high, 4)]} if math.isfinite(score.low) else {}
        found.append(
            {
                "task_type": "other",
                "task_name": "prediction from DNA sequence",
                "dataset_type": str(files.part("dataset").get("kind") or "prepared"),
                "dataset_name": key.group or "all tracks",
                "dataset_config": key.group or "all",
                "dataset_split": key.fold,
                "metric_type": key.metric,
                "metric_name": _plain(key.column),
                "metric_value": round(score.value, 4),
                "metric_args": {**interval, "baselines": others},
            }
        )
    return found


def _scores_in_words(files: RunFiles) -> str:
    scores = files.scores
    if scores is None:
        return "The run was not evaluated."
    keys = _own(scores)
    heads = [f"{_plain(key.column)}, fold {_plain(key.fold)}" for key in keys]
    rows = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(keys)]
    ordered = [files.label, *(name for name in scores.models if name != files.label)]
    rows += ["| " + " | ".join([_plain(name), *(_score(scores, name, key) for key in keys)]) + " |" for name in ordered]
    known = "95 % bootstrap intervals in brackets"
    found = [scores.get(name, key) for name in ordered for key in keys]
    said = intervals_in_words((score.low for score in found if score), known)
    return f"Means over tracks, beside baselines on the same rows; {said}.\n\n" + "\n".join(rows)


def _score(scores: Scores, name: str, key: Key) -> str:
    found = scores.get(name, key)
    return "" if found is None else found.long


def _tracks_in_words(run: Run) -> str:
    count = len(run.dataset.tracks)
    return f"{count} track{'s' if count != 1 else ''}" if count else "hidden tokens"


def _data(run: Run, files: RunFiles) -> str:
    info, tracks = run.dataset.info, run.dataset.tracks
    folds = files.part("dataset").get("folds")
    counted = ", ".join(f"{_plain(name)} {count}" for name, count in folds.items()) if isinstance(folds, dict) else ""
    hashed, seen = None if info.genome is None else info.genome["hash"], files.part("exposure").get("share")
    facts = {
        "kind": info.kind,
        "examples": info.in_words,
        "rows by fold": counted,
        "hash of the genome": hashed,
        "covariates": ", ".join(run.dataset.covariates.columns) if run.dataset.covariates is not None else "",
        "test windows that the base was trained on": f"{seen:.1%}" if isinstance(seen, float) else "",
    }
    lines = [f"- {name}: {_plain(value)}" for name, value in facts.items() if value]
    if not len(tracks):
        return "\n".join(lines)
    rows = ["| track | group | link | squash | scale | condition |", "|---|---|---|---|---|---|"]
    names = ("name", "group", "link", "squash", "scale", "condition")
    for row in tracks.to_frame().head(200).to_dict("records"):
        rows.append("| " + " | ".join(_plain(row[name]) for name in names) + " |")
    rest = f"\n\nand {len(tracks) - 200} more, in `shared.json`." if len(tracks) > 200 else ""
    return "\n".join([*lines, "", *rows]) + rest


def _use(run: Run, base: Mapping[str, Any], repository: str | None) -> str:
    source = f"{repository}@COMMIT" if repository else "FOLDER"
    placed = run.dataset.info.genome is not None
    more = (" --base BASE_FOLDER" if base["local"] else "") + (" --genome genome.fa" if placed else "")
    lines = [f"seqgraft pull {source} pulled{more}"]
    if len(run.dataset.tracks):
        lines += ["seqgraft predict pulled regions.bed predicted.parquet"] if placed else []
        sequences = "sequences.fa" if run.dataset.covariates is None else "sequences.csv"
        lines += [f"seqgraft predict pulled {sequences} predicted.parquet"]
    lines += ["seqgraft variants pulled variants.vcf effects.parquet"] if placed else []
    what = "COMMIT is the full commit that is meant, from the history of the repository. " if repository else ""
    needs = "The genome must be the one of the hash above." if placed else ""
    held = f"The base model has the hash {base['weights_sha256']}; ask for it." if base["local"] else ""
    words = " ".join(filter(None, [what.strip(), needs, held]))
    return "```sh\n" + "\n".join(lines) + "\n```" + (f"\n\n{words}" if words else "")


def _model(run: Run, files: RunFiles, base: Mapping[str, Any], licence: str) -> str:
    counts, spec = files.part("counts"), run.model.trunk.spec
    trained = None if files.trained is None else f"{files.trained:,} of {counts.get('total', 0):,} numbers"
    facts = {
        "base": f"{base['name']}{' at ' + base['revision'] if base['revision'] else ''}",
        "licence of the base": spec.licence,
        "licence of the adapter": licence,
        "adapter": run.experiment.adapter.label,
        "trained": trained,
        "training": f"at most {run.experiment.train.epochs} epochs, learning rate {run.experiment.train.lr:g}",
    }
    return "\n".join(f"- {name}: {_plain(value)}" for name, value in facts.items() if value)
