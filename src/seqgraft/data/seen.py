"""What a trunk has seen: the published splits, BED files with folds, and how much of a set of windows lies in them."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from seqgraft.errors import DataError, Problems, RunError
from seqgraft.genome import Genome, cache_folder, match_chroms, read_bed_table

__all__ = [
    "DOWNLOAD",
    "TRUNK_FOLDS",
    "Seen",
    "TrunkFolds",
    "exposure",
    "read_trunk_folds",
    "seen_by",
    "seen_of",
    "touched",
    "touched_folds",
    "trunk_folds",
]

#: What a trunk did with a region.
ROLES = ("train", "valid", "test")
#: In place of a path: fetch the published file into the cache, if it is not there.
DOWNLOAD = Path("download")
_MOST_BYTES = 32 << 20  # the published files have less than 2 MB
_BUNDLED = Path(__file__).parent.parent / "trunks"


@dataclass(frozen=True)
class TrunkFolds:
    """A published split. The files are their authors': they are read where they lie, never part of this package.

    Attributes:
        assembly: that the places refer to.
        names: fold in column 4 of the BED -> "train", "valid" or "test".
        window: bp about the centre of a listed interval that the trunk had as input.
        url: the published BED.
        licence: of that file; "" where none is stated.
        citation: of the split.
        note: what to know about it.
        sha256: of the file, where the address is that of one version.
    """

    assembly: str
    names: Mapping[str, str]
    window: int
    url: str
    licence: str
    citation: str
    note: str
    sha256: str | None = None


_BORZOI_FOLDS = {f"fold{i}": {3: "test", 4: "valid"}.get(i, "train") for i in range(8)}
_BORZOI_FILES = "https://raw.githubusercontent.com/calico/borzoi/5c9358222b5026abb733ed5fb84f3f6c77239b37/data"
_BORZOI_PAPER = "Linder et al., Nature Genetics 57, 949-961 (2025)"

#: Key, as in ``model.json`` under "folds" -> the split. A trunk of two species has one key for each.
#:
#: Checked in the two files of calico/borzoi at the commit of the address: 55,497 and 49,369 intervals, all of 196,608
#: bp, column 4 is fold0 to fold7 and no other name, chromosomes chr1 to chr22 (chr19 in mouse) and chrX. That all four
#: replicates test on fold3 and validate on fold4 is said by the README there; that the mouse folds have the same roles,
#: by google-deepmind/alphagenome (data/fold_intervals.py: "aligned with all trained Borzoi checkpoints: 3 and 4 are
#: held out", for both organisms). The network reads 524,288 bp and predicts the listed 196,608 in their middle.
#:
#: Enformer: its README names Basenji2's data, gs://basenji_barnyard/data; the public copy of that split's BED is the
#: address below (train, valid, test in column 4). Basenji2 listed 131,072 bp, which Enformer extended to 196,608.
TRUNK_FOLDS: dict[str, TrunkFolds] = {
    "borzoi": TrunkFolds(
        assembly="hg38",
        names=_BORZOI_FOLDS,
        window=524_288,
        url=f"{_BORZOI_FILES}/sequences_human.bed.gz",
        licence="Apache-2.0",
        citation=_BORZOI_PAPER,
        note="the human part; all replicates test on fold3 and validate on fold4",
        sha256="13724966c9378c2fd024c62e6bb72b94850e12d96d23a419f60040ae50b98ba3",
    ),
    "borzoi_mouse": TrunkFolds(
        assembly="mm10",
        names=_BORZOI_FOLDS,
        window=524_288,
        url=f"{_BORZOI_FILES}/sequences_mouse.bed.gz",
        licence="Apache-2.0",
        citation=_BORZOI_PAPER,
        note="the mouse part; orthologous regions are in the same fold as in human",
        sha256="197647b00a3cd1de5a1073837c8576faadd32c5d4e5280211b73561f37f8cea4",
    ),
    "enformer": TrunkFolds(
        assembly="hg38",
        names={role: role for role in ROLES},
        window=196_608,
        url="https://storage.googleapis.com/basenji_barnyard2/sequences_human.bed",
        licence="",
        citation="Kelley, PLOS Computational Biology 16, e1008050 (2020); Avsec et al., Nature Methods 18, 1196 (2021)",
        note="the human part of Basenji2's split, which Enformer was trained on",
    ),
}


@dataclass(frozen=True)
class Seen:
    """The windows that a trunk saw.

    Attributes:
        regions: chrom, start, end (0-based, half-open; the whole input, not only what was predicted), fold ("train",
            "valid" or "test").
        files: where that stands.
        assembly: of a published split; its places are compared by the names of chromosomes.
        genome: hash of the genome, where the model was made by this package.
        ends: the last listed base of each chromosome, where the genome's hash is not known.
    """

    regions: pd.DataFrame
    files: tuple[Path, ...]
    assembly: str = ""
    genome: str | None = None
    ends: Mapping[str, int] = field(default_factory=dict)

    def is_of_another_genome(self, genome: Genome) -> bool:
        """Whether the places are known to be of another genome."""
        return self.genome is not None and self.genome != genome.hash

    def on(self, genome: Genome, rename: Mapping[str, str]) -> pd.DataFrame:
        """The windows under the genome's names of chromosomes.

        Args:
            rename: names in the BED -> names in the FASTA.

        Raises:
            DataError: they are of another genome, have no chromosome in common with it or reach beyond its ends.
        """
        where = ", ".join(map(str, self.files))
        if self.is_of_another_genome(genome):
            remedy = f"{genome.path} is not the FASTA that it was trained on: use that one, or folds by chromosome"
            raise DataError("the trunk was trained on another genome", self.genome, where=where, remedy=remedy)
        if self.genome is not None:
            return self.regions
        match_chroms([rename.get(chrom, chrom) for chrom in self.ends], genome, where, more=True)
        for chrom, end in self.ends.items():
            size = genome.chroms.get(rename.get(chrom, chrom), end)
            if end > size:
                remedy = f"The regions are of {self.assembly or 'another assembly'}: check that {genome.path} is too"
                what = f"a region ends beyond {chrom} of the genome ({size} bp)"
                raise DataError(what, f"{chrom}:{end}", where=where, remedy=remedy)
        return self.regions.assign(chrom=self.regions["chrom"].replace(dict(rename)))


def seen_by(trunk: str, bed: Path | None = None) -> Seen:
    """What a trunk saw, by a key of ``TRUNK_FOLDS``, the name of a bundled model or the path of a model folder or BED.

    Raises:
        DataError: there is no such trunk, its regions are not at hand, or their file is wrong.
    """
    if trunk in TRUNK_FOLDS:
        return _published(trunk, bed)
    folder = next((path for path in (_BUNDLED / trunk, Path(trunk)) if (path / "model.json").is_file()), None)
    if folder is None:
        if bed is None and Path(trunk).is_file():
            return _listed(Path(trunk))
        known = ", ".join([*TRUNK_FOLDS, *sorted(path.parent.name for path in _BUNDLED.glob("*/model.json"))])
        remedy = f"Name one of {known}, a model folder, or a BED file (without bed) with train, valid, test in column 4"
        raise DataError("there is no such trunk", trunk, where="folds.trunk", remedy=remedy)
    try:
        content = json.loads((folder / "model.json").read_text())
        key, genome = content.get("folds"), content.get("genome")
    except (ValueError, AttributeError) as error:
        remedy = "Copy the folder again"
        raise DataError(f"the file does not describe a model ({error})", where=folder, remedy=remedy) from error
    own = folder / "trained_on.bed"
    return seen_of(key, genome, own if own.is_file() else None, bed, where=str(folder))


def seen_of(key: str | None, genome: str | None, own: Path | None, bed: Path | None, *, where: str) -> Seen:
    """What a model saw, from the entries of its folder.

    A model that names a key and a genome was fitted further from a published trunk: it saw the regions of both.

    Args:
        key: of ``TRUNK_FOLDS``.
        genome: hash of the genome that ``own`` refers to; without it, ``own`` is the published BED.
        own: the folder's ``trained_on.bed``.
        bed: to be read instead of what is published.

    Raises:
        DataError: the regions are not at hand, or their file is wrong.
    """
    if key in TRUNK_FOLDS:
        published = _published(key, bed or (own if genome is None else None))
        if own is None or genome is None:
            return published
        regions = pd.concat([read_trunk_folds(own), published.regions], ignore_index=True)
        return Seen(regions, (own, *published.files), published.assembly, None, published.ends)
    if bed is not None and own is not None and genome:
        remedy = "Leave the setting out (folds.bed, model.trained_on)"
        raise DataError(
            "the model brings its own regions, so it takes no other list", str(bed), where=own, remedy=remedy
        )
    if bed is not None:
        return _listed(bed)
    if own is not None:
        return Seen(read_trunk_folds(own), (own,), genome=genome) if genome else _listed(own)
    remedy = "Give a BED file with train, valid or test in column 4 (folds.bed, model.trained_on)"
    raise DataError("the model does not say which regions it was trained on", key, where=where, remedy=remedy)


def _listed(path: Path) -> Seen:
    table = read_trunk_folds(path)
    return Seen(table, (path,), ends=_ends(table))


def _published(key: str, bed: Path | None) -> Seen:
    path, facts = _find(key, bed), TRUNK_FOLDS[key]
    table = read_trunk_folds(path, facts.names)
    return Seen(_windows(table, facts.window), (path,), facts.assembly, None, _ends(table))


def _ends(table: pd.DataFrame) -> dict[str, int]:
    return {str(chrom): int(end) for chrom, end in table.groupby("chrom", sort=False)["end"].max().items()}


def _windows(table: pd.DataFrame, window: int) -> pd.DataFrame:
    """Intervals that are shorter than the window, about their centres as long as it."""
    more = (window - (table["end"] - table["start"])).clip(lower=0)
    start = table["start"] - more // 2
    return table.assign(start=start.clip(lower=0), end=table["end"] + more - more // 2)


def trunk_folds(key: str, bed: Path | None = None) -> pd.DataFrame:
    """The windows that a published trunk saw: chrom, start, end (0-based, half-open), fold ("train", "valid", "test").

    Args:
        key: of ``TRUNK_FOLDS``.
        bed: the published BED, plain or gzipped; by default the one in the cache; ``DOWNLOAD`` fetches that first.

    Raises:
        DataError: no such key; no such file, or it is empty, truncated or has other columns or folds.
        RunError: the cache cannot be written.
    """
    if key not in TRUNK_FOLDS:
        raise DataError("no split is published under this name", key, remedy=f"Choose one of {', '.join(TRUNK_FOLDS)}")
    return _published(key, bed).regions


def read_trunk_folds(path: Path, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """A BED file (plain or gzipped) with folds in column 4 as chrom, start, end, fold ("train", "valid", "test").

    Args:
        names: of other folds in the file -> which of the three they are.

    Raises:
        DataError: no such file, an empty or truncated one, rows that are not BED, unknown folds.
    """
    table = read_bed_table(path)
    roles = {role: role for role in ROLES} | dict(names or {})
    problems = Problems(DataError)
    unknown = table["name"][~table["name"].isin(list(roles))]
    for name, rows in unknown.groupby(unknown, sort=False):
        what = f"column 4 of {len(rows)} rows, first of interval {int(rows.index[0]) + 1}, is not a fold"
        remedy = f"It must be one of {', '.join(roles)}"
        if names is None:
            remedy += f"; for a published file name its trunk ({', '.join(TRUNK_FOLDS)}) and give the file as bed"
        problems.add(what, name, where=path, remedy=remedy)
    problems.raise_if_any()
    return table[["chrom", "start", "end"]].assign(fold=table["name"].map(roles))


# The published files


def _cached(key: str) -> Path:
    return cache_folder() / "folds" / f"{key}.bed{'.gz' if TRUNK_FOLDS[key].url.endswith('.gz') else ''}"


def _find(key: str, bed: Path | None) -> Path:
    path = _cached(key)
    if bed is not None and bed != DOWNLOAD:
        return bed
    if path.is_file():
        return path
    if bed == DOWNLOAD:
        return _download(key, path)
    remedy = (
        f"Put {TRUNK_FOLDS[key].url} at {path}, or give the path of that file, or the word download, as folds.bed "
        "(prepare) or model.trained_on (plan, fit)"
    )
    raise DataError("the published regions are not here", str(path), where=f"folds of {key}", remedy=remedy)


def _download(key: str, path: Path) -> Path:
    """Fetches a published BED, checks it and puts it into the cache."""
    url, wanted = TRUNK_FOLDS[key].url, TRUNK_FOLDS[key].sha256
    remedy = f"Fetch it in another way and put it at {path}, or give its path as bed"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:  # the address is one of ours
            content = response.read(_MOST_BYTES + 1)
            announced = int(response.headers.get("Content-Length") or len(content))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"the file cannot be downloaded ({error})", where=url, remedy=remedy) from error
    if len(content) > _MOST_BYTES:
        raise DataError("the file is larger than a list of regions can be", announced, where=url, remedy=remedy)
    found = hashlib.sha256(content).hexdigest()
    if len(content) != announced or found != (wanted or found):
        what = "the download is not whole, or not the file that was published"
        raise DataError(what, found, where=url, remedy=remedy)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        read_trunk_folds(part, TRUNK_FOLDS[key].names)
        part.replace(path)
    except OSError as error:
        remedy = "Point SEQGRAFT_CACHE to a folder that can be written"
        raise RunError(f"the cache cannot be written ({error.strerror})", where=path, remedy=remedy) from error
    finally:
        if part.exists():
            part.unlink()
    return path


# Touching


def exposure(windows: pd.DataFrame, seen: pd.DataFrame) -> dict[str, int]:
    """How many windows (chrom, start, end) touch what a trunk saw, each counted once, under the first that it touches.

    ``train``, else ``valid``, else ``test``, else ``nothing``.
    """
    hits = touched_folds(windows, seen)
    counts, left = {}, np.ones(len(windows), dtype=bool)
    for column, role in enumerate(ROLES):
        counts[role] = int((left & hits[:, column]).sum())
        left &= ~hits[:, column]
    return {**counts, "nothing": int(left.sum())}


def touched_folds(windows: pd.DataFrame, seen: pd.DataFrame) -> NDArray[np.bool_]:
    """Which of ``ROLES`` each window shares a base with: ``(windows, 3)``."""
    return np.stack([touched(windows, seen[seen["fold"] == role]) >= 0 for role in ROLES], axis=1)


def touched(queries: pd.DataFrame, targets: pd.DataFrame) -> NDArray[np.int64]:
    """For each query interval, the position of an overlapping target, or -1."""
    found = np.full(len(queries), -1, dtype=np.int64)
    query_chrom, target_chrom = queries["chrom"].to_numpy(dtype=str), targets["chrom"].to_numpy(dtype=str)
    starts, ends = targets["start"].to_numpy(), targets["end"].to_numpy()
    for chrom in np.intersect1d(query_chrom, target_chrom):
        mine, theirs = np.flatnonzero(query_chrom == chrom), np.flatnonzero(target_chrom == chrom)
        theirs = theirs[np.argsort(starts[theirs], kind="stable")]
        furthest = np.maximum.accumulate(ends[theirs])
        # the first target that reaches as far as any target up to here
        holder = np.searchsorted(furthest, furthest, side="left")
        before = np.searchsorted(starts[theirs], queries["end"].to_numpy()[mine], side="left") - 1
        hit = (before >= 0) & (furthest[np.maximum(before, 0)] > queries["start"].to_numpy()[mine])
        found[mine[hit]] = theirs[holder[before[hit]]]
    return found
