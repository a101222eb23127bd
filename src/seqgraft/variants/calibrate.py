"""How large a score is beside those of background variants: percentiles.

A calibration belongs to a run, its genome and the settings of the scores. It holds, for each scorer, track and
*stratum*, the sorted absolute scores of background variants. Strata are allele types, each divided by the distance to
the nearest transcription start if there is a GTF.

**Rule.** Percentiles are two-sided: of ``|score|`` among the ``|score|`` of the background of the same stratum, 100
times the share that is smaller plus half the share that is equal. A stratum of fewer than 100 background rows is not
used: its variants are compared with all of their allele type, and those of a type of fewer than 100 have no percentile
(NaN). Of more than 1,000 background scores, 1,000 order statistics, evenly spaced from the smallest to the largest, are
kept, so that percentiles are in steps of 0.1.

::

    runs/NAME/calibration/
      KEY.json      what it is of: hashes, settings, counts per stratum
      KEY.parquet   scorer, stratum, one column per track: sorted absolute scores, NaN where there are fewer
      KEY.npz       digests of the background variants, positions of transcription starts
      KEY.vcf       the background, if it was drawn at random
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from seqgraft.data.dataset import hash_file, write_json
from seqgraft.errors import ConfigError, DataError, RunError
from seqgraft.genome import Genome, Variant, match_chroms, read_gtf
from seqgraft.models.base import SequenceModel
from seqgraft.variants.place import Layout
from seqgraft.variants.score import Scores, VariantConfig
from seqgraft.variants.table import score_vcf, skipped_path

__all__ = ["MINIMUM", "TYPES", "Calibrated", "Calibration", "allele_type", "calibrate", "random_variants", "strata_of"]

FORMAT_VERSION = 1
#: Background rows that a stratum needs.
MINIMUM = 100
#: Sorted scores that are kept of a stratum, at most.
POINTS = 1000
#: Allele types; lengths of indels are in bp gained or lost.
TYPES = (
    "transition", "transversion", "mnv",
    "insertion_1", "insertion_2-5", "insertion_6+", "deletion_1", "deletion_2-5", "deletion_6+",
)  # fmt: skip
_DISTANCES = (1_000, 10_000, 100_000)  # bp to the nearest transcription start
_NEAR = ("0-1kb", "1-10kb", "10-100kb", "100kb+")
_TRANSITIONS = {("A", "G"), ("G", "A"), ("C", "T"), ("T", "C")}
_LONGEST = 20  # bp that a random indel gains or loses
_PLACE = ("chrom", "position", "ref", "alt", "scorer")
Starts = Mapping[str, npt.NDArray[np.int64]]


def allele_type(variant: Variant) -> str:
    """One of ``TYPES``."""
    ref, alt = variant.ref, variant.alt
    gained = len(alt) - len(ref)
    if gained == 0:
        return "mnv" if len(ref) > 1 else "transition" if (ref, alt) in _TRANSITIONS else "transversion"
    length = "1" if abs(gained) == 1 else "2-5" if abs(gained) <= 5 else "6+"
    return f"{'insertion' if gained > 0 else 'deletion'}_{length}"


def strata_of(variants: Sequence[Variant], starts: Starts | None) -> list[str]:
    """``TYPE``, or ``TYPE/DISTANCE`` where the transcription starts are known (sorted, 0-based)."""
    types = [allele_type(variant) for variant in variants]
    if starts is None:
        return types
    near = []
    for variant in variants:
        sites, at = starts.get(variant.chrom), variant.position - 1
        if sites is None or not len(sites):
            near.append(_NEAR[-1])
            continue
        right = int(np.searchsorted(sites, at))
        distance = min(abs(int(site) - at) for site in sites[max(0, right - 1) : right + 1])
        near.append(_NEAR[int(np.searchsorted(_DISTANCES, distance, side="right"))])
    return [f"{kind}/{distance}" for kind, distance in zip(types, near, strict=True)]


def random_variants(genome: Genome, count: int, seed: int = 0) -> list[Variant]:
    """Background variants: as many of each allele type, at places drawn evenly from the known bases of a genome.

    Raises:
        ConfigError: fewer than one of each type.
        DataError: the genome has too few known bases.
    """
    if count < len(TYPES):
        raise ConfigError("is less than one of each type of allele", count, where="--random", remedy="Take 10000")
    rng = np.random.default_rng(seed)
    names, lengths = list(genome.chroms), np.array(list(genome.chroms.values()))
    found: dict[Variant, None] = {}
    for _ in range(20 * count + 1000):
        if len(found) == count:
            break
        chrom = int(rng.choice(len(names), p=lengths / lengths.sum()))
        variant = _draw(genome, names[chrom], int(rng.integers(0, lengths[chrom])), TYPES[len(found) % len(TYPES)], rng)
        if variant is not None:
            found.setdefault(variant)
    else:
        what = f"only {len(found)} places of {count} with known bases were found"
        raise DataError(what, where="--random", remedy="Ask for fewer, or give a VCF")
    order = {name: number for number, name in enumerate(names)}
    return sorted(found, key=lambda v: (order[v.chrom], v.position, v.ref, v.alt))


def _draw(genome: Genome, chrom: str, start: int, kind: str, rng: np.random.Generator) -> Variant | None:
    """A variant of a type at a place, or None where bases are unknown or the contig ends."""
    name, _, length = kind.partition("_")
    size = {"": 0, "1": 1, "2-5": int(rng.integers(2, 6)), "6+": int(rng.integers(6, _LONGEST + 1))}[length]
    span = {"deletion": size + 1, "mnv": int(rng.integers(2, 4))}.get(name, 1)
    codes = np.asarray(genome.chrom_codes(chrom)[start : start + span])
    if len(codes) < span or (codes > 3).any():
        return None
    ref = "".join("ACGT"[code] for code in codes)
    if name == "deletion":
        alt = ref[0]
    elif name == "insertion":
        alt = ref + "".join("ACGT"[code] for code in rng.integers(0, 4, size))
    elif name == "transition":
        alt = dict(_TRANSITIONS)[ref]
    elif name == "transversion":
        alt = str(rng.choice([base for base in "ACGT" if base != ref and (ref, base) not in _TRANSITIONS]))
    else:
        alt = "".join("ACGT"[(code + int(rng.integers(1, 4))) % 4] for code in codes)
    return Variant(chrom, start + 1, ref, alt, ".")


def _digests(variants: Iterable[Variant]) -> Iterator[int]:
    for v in variants:
        text = f"{v.chrom}\t{v.position}\t{v.ref}\t{v.alt}"
        yield int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(eq=False)
class Calibration:
    """A calibration of a run, read when it is needed.

    Attributes:
        path: its ``KEY.json``.
        content: of that file.
        starts: transcription starts per chromosome, 0-based and sorted; None without a GTF.
        background: sorted digests of the background variants.
    """

    path: Path
    content: Mapping[str, Any]
    starts: Starts | None
    background: npt.NDArray[np.uint64]
    _points: dict[tuple[str, str], npt.NDArray[np.float32]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path, key: str) -> Calibration | None:
        """The calibration of that key, if there is one.

        Raises:
            RunError: it cannot be read.
        """
        path = folder / f"{key}.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                background = arrays["background"]
                starts = {name.removeprefix("start/"): arrays[name] for name in arrays.files if name != "background"}
            if content["format_version"] != FORMAT_VERSION:
                raise RunError("the calibration has another format version", content["format_version"], where=path)
        except (OSError, ValueError, KeyError) as error:
            remedy = f"Remove {folder / key}.* and calibrate again"
            raise RunError(f"the calibration cannot be read ({error})", str(path), remedy=remedy) from error
        return cls(path, content, starts if content["gtf"] else None, background)

    @property
    def identity(self) -> str:
        """Hash of its scores."""
        return str(self.content["sha256"])

    def stratum(self, name: str) -> str:
        """Which stratum variants of this one are compared with: itself, its type, or "" for none."""
        known = self.content["strata"]
        kind = name.partition("/")[0]
        return name if name in known else kind if kind in known else ""

    def percentiles(self, variants: Sequence[Variant], scores: Scores) -> npt.NDArray[np.float32]:
        """``(rows, scorers, columns)``, 0 to 100; NaN where the score is, or there is nothing to compare with."""
        own = np.array([self.stratum(name) for name in strata_of(variants, self.starts)], dtype=object)
        rows = own[scores.variant] if len(variants) else own
        found = np.full(scores.values.shape, np.nan, dtype=np.float32)
        for stratum in set(rows.tolist()) - {""}:
            index = np.flatnonzero(rows == stratum)
            for number, scorer in enumerate(self.content["scorers"]):
                found[index, number] = _percentiles(self._sorted(scorer, stratum), np.abs(scores.values[index, number]))
        return found

    def notes(self, variants: Iterable[Variant]) -> tuple[str, ...]:
        """How many are in the background, are compared with their type alone, or with nothing."""
        counts: Counter[str] = Counter()
        background = set(self.background.tolist())
        for variant in variants:
            counts["overlap"] += next(_digests([variant])) in background
            (name,) = strata_of([variant], self.starts)
            stratum = self.stratum(name)
            counts["none" if not stratum else "type" if stratum != name else "own"] += 1
        words = {
            "overlap": "are in the calibration's background themselves, which pulls their percentiles to the middle",
            "type": f"are in strata of fewer than {MINIMUM} background rows and are compared with all of their type",
            "none": f"are of a type of fewer than {MINIMUM} background rows and have no percentile",
        }
        return tuple(f"{counts[key]} variants {text}." for key, text in words.items() if counts[key])

    def _sorted(self, scorer: str, stratum: str) -> npt.NDArray[np.float32]:
        """Sorted absolute scores ``(points, columns)``, NaN last."""
        if not self._points:
            file = pq.ParquetFile(self.path.with_suffix(".parquet"))
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                key = str(table["scorer"][0]), str(table["stratum"][0])
                columns = table.column_names[2:]
                self._points[key] = np.stack([table[name].to_numpy() for name in columns], axis=1)
        return self._points[scorer, stratum]


def _percentiles(points: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of scores ``(rows, columns)`` among sorted points ``(points, columns)``, by the rule of the module."""
    found = np.full(scores.shape, np.nan, dtype=np.float32)
    for column in range(scores.shape[1]):
        known = points[:, column][~np.isnan(points[:, column])]
        if len(known):
            below, upto = (np.searchsorted(known, scores[:, column], side=side) for side in ("left", "right"))
            found[:, column] = 100 * (below + upto) / (2 * len(known))
    found[np.isnan(scores)] = np.nan
    return found


@dataclass(frozen=True)
class Calibrated:
    """What became of a background.

    Attributes:
        path: ``KEY.json``.
        variants: of the background that were scored.
        strata: name -> rows, of those that are used.
        small: name -> rows, of those that have too few.
        skipped: reason -> variants of the file that could not be scored.
    """

    path: Path
    variants: int
    strata: Mapping[str, int]
    small: Mapping[str, int]
    skipped: Mapping[str, int]


def calibrate(
    model: SequenceModel,
    layout: Layout,
    config: VariantConfig,
    background: Path | int,
    folder: Path,
    key: str,
    *,
    identity: Mapping[str, Any],
    gtf: Path | None = None,
    seed: int = 0,
    resume: bool = False,
) -> Calibrated:
    """Scores background variants and writes their quantiles into ``folder``.

    Args:
        background: a VCF, or how many to draw at random.
        key: name of the files.
        identity: what the scores depend on, as for ``score_vcf``.
        gtf: transcription starts (5' ends of its genes), by whose distance the strata are divided.

    Raises:
        ConfigError, DataError, ModelError: as ``score_vcf`` and ``read_gtf``; no stratum has enough rows.
        RunError: there is one already; it cannot be written.
    """
    path = folder / f"{key}.json"
    if path.exists():
        remedy = f"Remove {folder / key}.* to make another"
        raise RunError("these settings are calibrated already", str(path), remedy=remedy)
    starts = None if gtf is None else _starts(gtf, layout.genome, config.rename)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        vcf = background if isinstance(background, Path) else folder / f"{key}.vcf"
        if isinstance(background, int):
            _write(vcf, layout.genome, random_variants(layout.genome, background, seed))
        scored = folder / f"{key}.{hash_file(vcf)['sha256'][:8]}.parquet"
        if not scored.exists():
            score_vcf(model, layout, config, vcf, scored, identity=identity, resume=resume)
        try:
            found = _summarise(scored, folder / f"{key}.parquet", config, starts)
        except DataError:  # of no use to a larger background, whose scores are another file
            for left in (scored, skipped_path(scored), *([vcf] if vcf != background else [])):
                left.unlink(missing_ok=True)
            raise
        listed = pd.read_csv(skipped_path(scored), sep="\t")
        arrays = {f"start/{chrom}": sites for chrom, sites in (starts or {}).items()}
        np.savez(path.with_suffix(".npz"), background=np.sort(found.digests), **arrays)  # type: ignore[arg-type]
        content = {
            "format": "seqgraft-calibration",
            "format_version": FORMAT_VERSION,
            **identity,
            "genome": layout.genome.hash,
            "background": hash_file(vcf) | ({"random": background, "seed": seed} if vcf != background else {}),
            "gtf": None if gtf is None else hash_file(gtf),
            "sha256": hash_file(folder / f"{key}.parquet")["sha256"],
            "minimum": MINIMUM,
            "points": POINTS,
            "scorers": [scorer.label for scorer in config.scorers],
            "variants": len(found.digests),
            "strata": found.strata,
            "too_small": found.small,
        }
        write_json(path, content)
        scored.unlink()
    except OSError as error:
        what = f"the calibration could not be written ({error.strerror or error})"
        raise RunError(what, str(folder), remedy="Free some disk space or check permissions") from error
    skipped = {str(reason): int(count) for reason, count in listed["reason"].value_counts().items()}
    return Calibrated(path, len(found.digests), found.strata, found.small, skipped)


@dataclass(frozen=True)
class _Summary:
    strata: dict[str, int]
    small: dict[str, int]
    digests: npt.NDArray[np.uint64]


def _summarise(scored: Path, out: Path, config: VariantConfig, starts: Starts | None) -> _Summary:
    """Writes the sorted absolute scores of each scorer and stratum, a row group each; reads one track at a time."""
    rows = pq.read_table(scored, columns=list(_PLACE)).to_pandas()
    columns = [field.name for field in pq.read_schema(scored) if field.type == pa.float32()]
    labels = [scorer.label for scorer in config.scorers]
    places = rows[rows["scorer"] == labels[0]]
    columns_of = (places[name].tolist() for name in _PLACE[:-1])
    names = config.rename
    variants = [Variant(names.get(c, c), p, r, a, ".") for c, p, r, a in zip(*columns_of, strict=True)]
    own = np.array(strata_of(variants, starts), dtype=object)
    members = {name: np.flatnonzero(own == name) for name in dict.fromkeys(own.tolist())}
    if starts is not None:
        types = np.array([name.partition("/")[0] for name in own.tolist()], dtype=object)
        members |= {name: np.flatnonzero(types == name) for name in dict.fromkeys(types.tolist())}
    sizes = {name: len(index) for name, index in sorted(members.items())}
    used = {name: size for name, size in sizes.items() if size >= MINIMUM}
    if not used:
        remedy = f"Give at least {MINIMUM} of a type; --random 10000 has about a thousand of each"
        raise DataError(
            "no type of allele has enough background variants", sizes, where="the background", remedy=remedy
        )
    wanted = [(label, name) for label in labels for name in used]
    sorted_scores: dict[tuple[str, str], list[npt.NDArray[np.float32]]] = {key: [] for key in wanted}
    for column in columns:
        values = np.abs(pq.read_table(scored, columns=[column])[column].to_numpy()).reshape(-1, len(labels))
        for label, name in wanted:
            sorted_scores[label, name].append(_order_statistics(values[members[name], labels.index(label)]))
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    text = [pa.field("scorer", pa.string()), pa.field("stratum", pa.string())]
    schema = pa.schema([*text, *(pa.field(column, pa.float32()) for column in columns)])
    try:
        with pq.ParquetWriter(part, schema) as writer:
            for (label, name), points in sorted_scores.items():
                count = max(map(len, points))
                padded = [np.pad(p, (0, count - len(p)), constant_values=np.float32(np.nan)) for p in points]
                writer.write_table(pa.table([[label] * count, [name] * count, *padded], schema=schema))
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    digests = np.array(sorted(set(_digests(variants))), dtype=np.uint64)
    return _Summary(used, {name: size for name, size in sizes.items() if name not in used}, digests)


def _order_statistics(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Sorted values without NaN, ``POINTS`` of them at most, evenly spaced with both ends; one NaN if there is none."""
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return np.full(1, np.nan, dtype=np.float32)
    if len(known) <= POINTS:
        return known
    return known[np.round(np.linspace(0, len(known) - 1, POINTS)).astype(np.int64)]


def _starts(gtf: Path, genome: Genome, rename: Mapping[str, str]) -> dict[str, npt.NDArray[np.int64]]:
    """5' ends of the genes of each chromosome, 0-based and sorted."""
    exons = read_gtf(gtf, rename=rename)
    match_chroms(exons["chrom"].unique(), genome, gtf, more=True)
    genes = exons.groupby(["chrom", "gene_id", "strand"]).agg(start=("start", "min"), end=("end", "max")).reset_index()
    ends = np.where(genes["strand"] == "-", genes["end"] - 1, genes["start"]).astype(np.int64)
    chroms = genes["chrom"].to_numpy()
    return {str(chrom): np.sort(ends[chroms == chrom]) for chrom in np.unique(chroms) if chrom in genome.chroms}


def _write(path: Path, genome: Genome, variants: Sequence[Variant]) -> None:
    with path.open("w") as file:
        file.write("##fileformat=VCFv4.2\n")
        file.writelines(f"##contig=<ID={name},length={length}>\n" for name, length in genome.chroms.items())
        file.write("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n")
        file.writelines(f"{v.chrom}\t{v.position}\t.\t{v.ref}\t{v.alt}\t.\t.\t.\n" for v in variants)
