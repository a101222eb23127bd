"""Sharing: an adapter with its heads and a card, as a folder or a repository of the Hugging Face hub.

::

    FOLDER or OWNER/NAME
      README.md             the model card, with the head that the hub reads
      adapter.json          kind, settings, hashes of the base, track table
      weights.safetensors   what training changed, heads included
      shared.json           base model, inputs, settings of training and evaluation
      trained_on.bed        the windows that the weights were fitted to, where they have places in a genome

Paths, file and sample names, donors and labels stay behind. What is pulled is a run directory whose data have no rows;
nothing in it is trusted: known names and sizes, JSON and safetensors alone, a base model of the recorded hash.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seqgraft.adapters import ADAPTERS
from seqgraft.data.dataset import (
    Dataset,
    DatasetInfo,
    check_new_folder,
    new_folder,
    open_dataset,
    write_dataset,
    write_json,
)
from seqgraft.data.seen import TRUNK_FOLDS
from seqgraft.errors import ConfigError, DataError, ModelError, Problems
from seqgraft.experiment import Experiment, build, parse_experiment, settings_of, write_yaml
from seqgraft.export import trained_windows
from seqgraft.genome import Genome
from seqgraft.models.dryrun import shapes_alone
from seqgraft.models.folders import TRUNKS, bundled_models
from seqgraft.models.hub import is_hub_id
from seqgraft.models.weights import ModelConfig, pretrained_of
from seqgraft.repository import check_size, download, upload
from seqgraft.run import Run, label_of, open_run, seeded_model
from seqgraft.share_card import write_card
from seqgraft.tracks import TrackTable

__all__ = ["FILES", "Pulled", "pull", "push"]

FORMAT, FORMAT_VERSION = "seqgraft-shared", 1
MARKER = "shared.json"
#: Files of a shared adapter, and the most bytes that each may have.
FILES: Mapping[str, int] = {
    "README.md": 1_000_000,
    "adapter.json": 50_000_000,
    "weights.safetensors": 20_000_000_000,
    MARKER: 50_000_000,
    "trained_on.bed": 200_000_000,
}
_LONGEST = 2**31  # bp of a window, and bins of it
_NUMBERS = 10**9  # of a model whose weights did not come along, and a number for each byte that did
NEEDED = ("adapter.json", "weights.safetensors", MARKER)
_TEXT = (str, type(None))
#: What other code relies on in ``shared.json`` -> its types.
_ENTRIES: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "base": {"name": (str,), "revision": _TEXT, "weights_sha256": _TEXT, "local": (bool,)},
    "inputs": {
        **dict.fromkeys(("window", "bins", "bin_size"), (int,)),
        **dict.fromkeys(("covariates", "tracks"), (list,)),
        "kind": (str,),
        "genome": _TEXT,
        "settings": (dict,),
    },
}
_COVARIATES = ("covariates", "codons", "lengths", "covariate_scaling")
#: Columns of a track that change what its numbers mean.
_UNITS = ("name", "group", "link", "strand_pair", "statistic", "scale", "center", "squash", "soft_clip", "clip")


def push(
    run: Path,
    repository: str | None = None,
    *,
    to: Path | None = None,
    private: bool = False,
    revision: str | None = None,
    licence: str = "",
    citation: str = "",
    card: str = "",
) -> str:
    """Shares the adapter of a finished run with its card; returns ``OWNER/NAME@COMMIT``, or the folder.

    Args:
        repository: ``OWNER/NAME`` on the hub, made if need be; the token is that of the hub's own client.
        to: a new folder instead, in the same layout.
        private: make the repository private; one that exists must be.
        revision: branch of the repository, made if need be.
        licence: of the adapter; that of the base if not given.
        citation: how to cite the adapter.
        card: Markdown that stands first on its card.

    Raises:
        ConfigError: not one place to go; a name that is no hub id; a run with joint data, without which its model
            cannot be built.
        RunError: the run is not finished; the folder exists; the repository is another's, or the hub refuses.
    """
    if (repository is None) == (to is None):
        raise ConfigError("an adapter goes to one place", remedy="Give OWNER/NAME, or --to FOLDER")
    if repository is not None and not is_hub_id(repository):
        raise ConfigError("this is no name of a repository", repository, remedy="Write OWNER/NAME, or --to FOLDER")
    if to is not None:
        if private or revision is not None:
            raise ConfigError("only a repository is private or has branches", str(to), where="--to")
        check_new_folder(to)
    opened = open_run(run)
    if opened.experiment.joint is not None:
        remedy = "Share one that was fitted without joint, or send the run directory with both datasets"
        raise ConfigError("a run that other data trained along with cannot be shared", str(run), remedy=remedy)
    label = label_of(opened.experiment)
    if to is not None:
        with new_folder(to) as building:
            _write(opened, building, None, licence=licence, citation=citation, text=card)
        return str(to)
    assert repository is not None  # one of the two is
    with tempfile.TemporaryDirectory(prefix="seqgraft-push-") as temporary:
        _write(opened, Path(temporary), repository, licence=licence, citation=citation, text=card)
        commit = upload(
            Path(temporary), repository, list(FILES), marker=MARKER, private=private, branch=revision, message=label
        )
    return f"{repository}@{commit}"


def _write(run: Run, folder: Path, repository: str | None, **stated: str) -> None:
    """The files of a shared adapter, without anything that is the data's own."""
    base = _base(run.experiment.model)
    content = json.loads((run.folder / "adapter" / "adapter.json").read_text())
    content["base"]["name"] = base["name"]
    content["tracks"] = _rows(run.model.tracks)
    write_json(folder / "adapter.json", content)
    shutil.copyfile(run.folder / "adapter" / "weights.safetensors", folder / "weights.safetensors")
    dataset, info = run.dataset, run.dataset.info
    covariates = [] if dataset.covariates is None else list(dataset.covariates.columns)
    inputs = {
        "kind": "windows" if info.kind == "personal" else info.kind,  # it has no donors
        "window": info.window,
        "bins": info.bins,
        "bin_size": info.bin_size,
        "genome": _genome_hash(info),
        "covariates": covariates,
        "settings": {key: info.settings[key] for key in _COVARIATES if covariates and key in info.settings},
        "tracks": _rows(dataset.tracks),
    }
    described = {"format": FORMAT, "format_version": FORMAT_VERSION, "base": base, "inputs": inputs}
    settings = settings_of(_without_places(run.experiment, base["name"], base["revision"]))
    write_json(folder / MARKER, {**described, "experiment": {k: v for k, v in settings.items() if k != "data"}})
    windows = trained_windows(run)
    if windows is not None and not windows.empty:
        windows.to_csv(folder / "trained_on.bed", sep="\t", header=False, index=False)
    write_card(run, folder / "README.md", base, repository, **stated)


def _genome_hash(info: DatasetInfo) -> str | None:
    return None if info.genome is None else info.genome["hash"]


def _rows(tracks: TrackTable) -> list[dict[str, Any]]:
    """The rows of a track table without the names of files and replicates."""
    rows = tracks.to_frame().assign(file="", replicate="").astype(object)
    return [{str(k): v for k, v in row.items()} for row in rows.where(rows.notna(), None).to_dict("records")]


def _base(config: ModelConfig) -> dict[str, Any]:
    """How others find the base model: a bundled name, an architecture, a hub id with its commit, or a name alone."""
    found = pretrained_of(config)
    if found is None:
        return {"name": config.name, "revision": None, "weights_sha256": None, "local": False}
    weights = None if config.init == "random" else found.content["weights_sha256"]
    origin = found.content.get("converted_from") or {}
    if config.name in bundled_models() or config.revision is not None:
        name, revision = config.name, config.revision
    elif is_hub_id(str(origin.get("source"))) and origin.get("revision"):
        name, revision = str(origin["source"]), str(origin["revision"])
    else:
        return {"name": found.name, "revision": None, "weights_sha256": weights, "local": True}
    return {"name": name, "revision": revision, "weights_sha256": weights, "local": False}


def _without_places(experiment: Experiment, base: str, revision: str | None) -> Experiment:
    """The settings that travel: no paths, no tracker, no cache, and the base by the name that others have for it."""
    named = experiment.model.trained_on
    published = named if str(named) in TRUNK_FOLDS else None
    model = replace(experiment.model, name=base, revision=revision, trained_on=published)
    return replace(
        experiment,
        model=model,
        train=replace(experiment.train, tracker=None, cache="off"),
        evaluate=replace(experiment.evaluate, genes=None, original=None),
    )


@dataclass(frozen=True)
class Pulled:
    """What :func:`pull` made: a run directory.

    Attributes:
        genome: hash of the genome that windows are of, None where sequences have none.
        placed: whether the genome is there, so that intervals and variants can be predicted.
    """

    run: Run
    genome: str | None
    placed: bool


def pull(
    source: str,
    folder: Path,
    *,
    genome: Path | None = None,
    data: Path | None = None,
    base: str | None = None,
    remote_code: str | None = None,
) -> Pulled:
    """Makes a shared adapter a run directory, which predicts and scores what the run that it came from did.

    Args:
        source: ``OWNER/NAME@COMMIT`` (40 digits) on the hub, or a folder that ``push`` wrote.
        genome: FASTA that regions and variants will be of; the one of the run, by its hash.
        data: a prepared dataset of the same tracks, to evaluate on; it brings its genome.
        base: the base model, where it is none that can be fetched: path of a model folder.
        remote_code: the full commit whose Python files may run, for base models that are made by their own code.

    Raises:
        ConfigError: a source without a commit; a setting that the shared files may not have; no base model.
        DataError: another genome, or data that are not of the same tracks and windows.
        ModelError: files that are missing, too large, damaged or do not belong together; another base model.
        RunError: the folder exists or cannot be written.
    """
    check_new_folder(folder)
    if genome is not None and data is not None:
        raise ConfigError("a dataset brings its own genome", str(genome), where="--genome", remedy="Leave it out")
    with new_folder(folder) as building:
        _fetch(source, building)
        content = _read(building / MARKER)
        (building / "adapter").mkdir()
        for name in ("adapter.json", "weights.safetensors"):
            (building / name).rename(building / "adapter" / name)
        (building / MARKER).unlink()
        _check_adapter(building / "adapter" / "adapter.json")
        known = None
        if data is None:
            known = _write_inputs(content["inputs"], building / "data", genome, source)
        else:
            _check_data(open_dataset(data), content["inputs"], data)
        place = folder.absolute() / "data" if data is None else Path(data).absolute()
        experiment = _experiment(content, place, base, remote_code, source)
        write_yaml(building / "experiment.yaml", settings_of(experiment))
        if experiment.model.name in TRUNKS:  # other models have the size that their weights have
            came = (building / "adapter" / "weights.safetensors").stat().st_size
            with shapes_alone(_NUMBERS + came, source):
                seeded_model(experiment, open_dataset(place if data is not None else building / "data"))
        opened = open_run(building)
    recorded = content["inputs"]["genome"]
    return Pulled(replace(opened, folder=folder), recorded, known is not None or data is not None)


def _fetch(source: str, folder: Path) -> None:
    """Copies the known files of a folder or repository, and no other."""
    repository, at, commit = source.partition("@")
    if not at or Path(source).is_dir():
        place = Path(source)
        if missing := [name for name in NEEDED if not (place / name).exists()]:
            remedy = "Give a folder that 'seqgraft push --to' wrote, or OWNER/NAME@COMMIT"
            if not place.is_dir():
                raise ModelError(
                    "there is no such folder, and no commit of a repository is named", where=source, remedy=remedy
                )
            raise ModelError(
                "the folder holds no shared adapter; it lacks", ", ".join(missing), where=source, remedy=remedy
            )
        for name in FILES:
            path = place / name
            if path.is_symlink() or (path.exists() and not path.is_file()):
                remedy = "Copy what it points to, if you trust it"
                raise ModelError("a file of a shared adapter is a link or a folder", name, where=source, remedy=remedy)
            if path.exists():
                check_size(name, path.stat().st_size, FILES[name], source)
                shutil.copyfile(path, folder / name)
        return
    if not is_hub_id(repository) or not re.fullmatch("[0-9a-f]{40}", commit):
        remedy = "Write OWNER/NAME@ and the 40 digits of a commit, so that the weights stay the same"
        raise ConfigError("this names no commit of a repository", source, remedy=remedy)
    download(repository, commit, FILES, NEEDED, folder)


_DAMAGED = "Fetch it again; if that does not help, ask who shared it"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a ValueError, too, for a number of thousands of digits
        raise ModelError(f"the file is not valid JSON ({error})", where=path.name, remedy=_DAMAGED) from error


def _check_adapter(path: Path) -> None:
    """Refuses settings in ``adapter.json`` of other types than the adapter's; all else is checked where it is read."""
    content = _json(path)
    kind, settings = (content.get(name) if isinstance(content, dict) else None for name in ("kind", "settings"))
    if isinstance(kind, str) and kind in ADAPTERS and isinstance(settings, dict):
        build(ADAPTERS[kind], settings, path.name)


def _read(path: Path) -> dict[str, Any]:
    """What ``shared.json`` says, checked for what everything else relies on."""
    content, damaged = _json(path), _DAMAGED
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError("the file does not describe a shared adapter", where=path.name, remedy=damaged)
    if content.get("format_version") != FORMAT_VERSION:
        what = f"the adapter was shared in another format version than this seqgraft reads ({FORMAT_VERSION})"
        remedy = "Use the version that made it"
        raise ModelError(what, content.get("format_version"), where=path.name, remedy=remedy)
    wrong = [
        f"{part}.{key}"
        for part, expected in _ENTRIES.items()
        for key, kinds in expected.items()
        if not isinstance(content.get(part), dict) or type(content[part].get(key)) not in kinds
    ]
    if not wrong and not all(0 <= content["inputs"][name] <= _LONGEST for name in ("window", "bins", "bin_size")):
        wrong = ["inputs"]
    if not wrong and not all(isinstance(name, str) for name in content["inputs"]["covariates"]):
        wrong = ["inputs.covariates"]
    if not isinstance(content.get("experiment"), dict) or "${" in json.dumps(content):  # read_yaml would fill that in
        wrong.append("experiment")
    elif content["experiment"].get("joint") is not None:  # a path of this machine
        wrong.append("experiment.joint")
    if wrong:
        what = "the file lacks entries, or has some that it may not have"
        raise ModelError(what, wrong, where=path.name, remedy=damaged)
    return content


def _experiment(
    content: Mapping[str, Any], data: Path, base: str | None, remote_code: str | None, source: str
) -> Experiment:
    """The settings of the run, on a base model that is there, or can be fetched, and has the recorded hash."""
    parsed = parse_experiment({**content["experiment"], "data": str(data)}, MARKER)
    recorded, asked = content["base"], parsed.model.remote_code
    name, revision = recorded["name"], recorded["revision"]
    if asked != remote_code:
        what = "the base model is made by code of its repository, of the commit" if asked else "no code is needed"
        remedy = "Read these files, then pass --remote-code with that commit" if asked else "Leave it out"
        raise ConfigError(what, asked or remote_code, where="--remote-code", remedy=remedy)
    fetched = name in TRUNKS or name in bundled_models() or (is_hub_id(name) and revision is not None)
    if base is None and (recorded["local"] or not fetched):
        what = f"the base model is none that can be fetched; its weights have the hash {recorded['weights_sha256']}"
        raise ConfigError(what, name, where=source, remedy="Ask who shared it, and pass --base FOLDER")
    if base is not None:
        name, revision = (str(Path(base).absolute()) if Path(base).is_dir() else base), None
    experiment = _without_places(parsed, name, revision)
    found = None if name in TRUNKS else pretrained_of(experiment.model)
    weights = None if found is None or experiment.model.init == "random" else found.content["weights_sha256"]
    if weights != recorded["weights_sha256"]:
        what = f"the base model has other weights ({weights}) than the adapter was trained on"
        remedy = f"Find the {recorded['name']} of that hash, and pass --base FOLDER"
        raise ModelError(what, recorded["weights_sha256"], where=name, remedy=remedy)
    return experiment


def _write_inputs(inputs: Mapping[str, Any], folder: Path, fasta: Path | None, source: str) -> Genome | None:
    """A prepared dataset without rows: what a model takes and gives, and the genome if it is there."""
    genome = None if fasta is None else Genome.open(fasta)
    if genome is not None and genome.hash != inputs["genome"]:
        what = f"the genome is another than the adapter was trained on, whose hash is {inputs['genome']}"
        remedy = "Give the FASTA of the same assembly, with the same contigs; of sequences without a genome, none"
        raise DataError(what, genome.hash, where=fasta, remedy=remedy)
    try:
        tracks = TrackTable.build(inputs["tracks"]) if inputs["tracks"] else TrackTable.none()
    except (TypeError, ValueError, DataError) as error:
        raise ModelError(f"the track table is damaged ({error})", where=source) from error
    place = None if genome is None else {"path": str(genome.path), "hash": genome.hash}
    sizes = {name: inputs[name] for name in ("kind", "window", "bins", "bin_size")}
    with write_dataset(folder, (0, len(tracks), inputs["bins"])) as writer:
        writer.finish(
            DatasetInfo(**sizes, genome=place, settings=inputs["settings"], notes={"pulled": source}),
            pd.DataFrame(columns=["chrom", "start", "end", "strand", "name", "fold"]),
            tracks,
            codes=np.empty((0, inputs["window"]), np.uint8),
            lengths=np.empty(0, np.int64),
            covariates=pd.DataFrame(columns=inputs["covariates"], dtype=np.float32) if inputs["covariates"] else None,
        )
    return genome


def _check_data(dataset: Dataset, inputs: Mapping[str, Any], place: Path) -> None:
    """Refuses a dataset whose rows would mean something else to the model.

    Raises:
        DataError: what differs, all of it.
    """
    ours, theirs = dataset.info, inputs
    problems = Problems(DataError)
    remedy = "Prepare the data as the run's were: the card says how"
    covariates = [] if dataset.covariates is None else list(dataset.covariates.columns)
    facts = {name: (getattr(ours, name), theirs[name]) for name in ("window", "bins", "bin_size")}
    facts |= {"genome": (_genome_hash(ours), theirs["genome"]), "covariates": (covariates, theirs["covariates"])}
    if covariates:
        scaling = "covariate_scaling"
        facts[scaling] = (ours.settings.get(scaling), theirs["settings"].get(scaling))
    rows = _rows(dataset.tracks), theirs["tracks"]
    for column in _UNITS:
        here, there = ([row.get(column) for row in each] for each in rows)
        facts[f"{column} of tracks"] = here, there
    for name, (here, there) in facts.items():
        if here != there:
            what = f"the dataset has another {name} than the adapter, {there!r}"
            problems.add(what, here, where=place, remedy=remedy)
    problems.raise_if_any()
