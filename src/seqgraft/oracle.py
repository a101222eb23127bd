"""The rules by which simulated sequence becomes signal, computed from the sequence alone.

``data/simulation.json`` holds the grammar: motifs, what each does in each condition, and every number below. A site is
a place where a motif matches; its occupancy is ``max(0, 1 - penalty / tolerance)``, with a penalty for every mismatch
at a strong (upper-case) or weak (lower-case) position of the pattern, none at a degenerate one (IUPAC).

* The effect field of a condition is ``sum(activity * occupancy * exp(-distance / decay))`` over regulator sites within
  ``reach`` of a position, whatever their strand.
* A core site of a strand starts transcripts at its TSS at the rate ``occupancy * exp(field)``. A transcript runs for at
  most ``longest`` bases, loses ``loss`` of its coverage per base and ``stop * occupancy`` at every terminator of its
  strand. ``rna = rna_depth * coverage + rna_background`` per ``resolution`` bases.
* ``atac = atac_background * exp(atac_gain * sum(activity * occupancy * bell(distance)))`` per ``resolution`` bases,
  over regulator and core sites (activity ``atac_core``), with a Gaussian bell of standard deviation ``atac_width`` and
  height 1, cut at three standard deviations.

* ``k27ac = background * exp(gain * sum(activity * occupancy * bell(distance)))``, with a wider bell and numbers of its
  own in ``data/simulated_cells.json``.
* ``k4me3 = background + height * sum(rate * bell(distance))`` over core sites of both strands, ``rate`` that at which
  they start transcripts, with a bell ``downstream`` of their TSS.

Decoys look like regulators and do nothing. Nothing outside the given window counts. ``simulated_cells.json`` also has
the activities of four cell types, which are conditions like the others; it is frozen on its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from seqgraft.errors import ConfigError, DataError
from seqgraft.sequence import COMPLEMENT, PAD, Codes, N

__all__ = [
    "Grammar",
    "Motif",
    "Rules",
    "Sites",
    "cell_difficulty",
    "difficulty",
    "expected",
    "expected_marks",
    "grammar",
    "motif_difference",
    "oracle",
    "scan",
    "track_names",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_TWO = {"R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC"}
_LETTERS = {**{base: base for base in "ACGT"}, **_TWO, "N": "ACGT"}
_WORD = 4  # bases looked up at once
_FORBIDDEN = 20.0  # penalty of an unknown base: more than any tolerance


@dataclass(frozen=True, slots=True)
class Rules:
    """The numbers of the rules above; lengths in bp, penalties in bits."""

    strong: float
    weak: float
    tolerance: float
    reach: int
    decay: float
    tss: int
    longest: int
    loss: float
    stop: float
    rna_background: float
    rna_depth: float
    atac_core: float
    atac_gain: float
    atac_width: float
    atac_background: float
    resolution: int


@dataclass(frozen=True, slots=True)
class Motif:
    """A pattern of odd length and its role (core, terminator, regulator, decoy).

    ``activity`` has one value per condition of the grammar.
    """

    name: str
    role: str
    pattern: str
    activity: tuple[float, ...]

    def penalties(self, rules: Rules) -> Floats:
        """``(length, 5)``: what each base (A C G T, unknown) costs at each position."""
        table = np.zeros((len(self.pattern), 5))
        for row, letter in zip(table, self.pattern, strict=True):
            allowed = _LETTERS[letter.upper()]
            row[:4] = [0.0 if base in allowed else rules.weak if letter.islower() else rules.strong for base in "ACGT"]
            row[4] = 0.0 if allowed == "ACGT" else _FORBIDDEN
        return table


@dataclass(frozen=True, slots=True)
class Grammar:
    """Motifs and rules that every simulated genome shares."""

    rules: Rules
    motifs: tuple[Motif, ...]
    base_conditions: tuple[str, ...]
    new_conditions: tuple[str, ...]
    cell_types: tuple[str, ...]

    @property
    def conditions(self) -> tuple[str, ...]:
        return self.base_conditions + self.new_conditions + self.cell_types

    def role(self, *roles: str) -> tuple[Motif, ...]:
        """The motifs with one of these roles."""
        return tuple(motif for motif in self.motifs if motif.role in roles)

    def activities(self, motifs: Sequence[Motif], conditions: Sequence[str]) -> Floats:
        """``(motifs, conditions)``.

        Raises:
            ConfigError: a condition that the grammar does not have.
        """
        unknown = [name for name in conditions if name not in self.conditions]
        if unknown:
            remedy = f"Use some of {', '.join(self.conditions)}"
            raise ConfigError("the simulated grammar has no such condition", unknown[0], remedy=remedy)
        columns = [self.conditions.index(name) for name in conditions]
        table: Floats = np.array([motif.activity for motif in motifs]).reshape(len(motifs), len(self.conditions))
        return table[:, columns]


@dataclass(frozen=True, slots=True)
class Sites:
    """Where motifs match: ``start`` is 0-based within the row, ``motif`` an index, ``strand`` +1 or -1."""

    row: Ints
    start: Ints
    motif: Ints
    strand: Ints
    occupancy: Floats

    def where(self, keep: npt.NDArray[np.bool_]) -> Sites:
        return Sites(self.row[keep], self.start[keep], self.motif[keep], self.strand[keep], self.occupancy[keep])


@cache
def difficulty() -> tuple[dict[str, Any], str]:
    """The content of the frozen ``data/simulation.json`` and its sha256."""
    return _frozen("simulation.json")


@cache
def cell_difficulty() -> tuple[dict[str, Any], str]:
    """The content of the frozen ``data/simulated_cells.json`` and its sha256."""
    return _frozen("simulated_cells.json")


def _frozen(name: str) -> tuple[dict[str, Any], str]:
    content = resources.files("seqgraft").joinpath("data", name).read_bytes()
    return json.loads(content), hashlib.sha256(content).hexdigest()


@cache
def grammar() -> Grammar:
    """The grammar in ``data/simulation.json``, with the cell types of ``data/simulated_cells.json``."""
    content, cells = difficulty()[0], cell_difficulty()[0]
    base, new, types = content["conditions"]["base"], content["conditions"]["new"], cells["conditions"]
    rules = Rules(**content["rules"])
    motifs = []
    for name, entry in content["motifs"].items():
        constant = rules.atac_core if entry["role"] == "core" else 0.0
        activity = entry.get("activity", {}) | dict(zip(types, cells["activity"].get(name, ()), strict=False))
        values = tuple(activity.get(c, constant) for c in base + new + types)
        motifs.append(Motif(name, entry["role"], entry["pattern"], values))
    return Grammar(rules, tuple(motifs), tuple(base), tuple(new), tuple(types))


def track_names(conditions: Iterable[str]) -> list[str]:
    """The tracks of the oracle, in its order: per condition RNA of the plus strand, of the minus strand, and ATAC."""
    return [name for c in conditions for name in (f"rna_{c}_plus", f"rna_{c}_minus", f"atac_{c}")]


def oracle(codes: Codes, conditions: Sequence[str], bin_size: int = 16) -> Floats:
    """Expected counts ``(batch, tracks, bins)`` of windows ``(batch, length)``, tracks as in :func:`track_names`.

    One window ``(length,)`` gives ``(tracks, bins)``. Counts are those of a replicate of nominal depth.

    Raises:
        DataError: heterozygous codes, or a length that is no multiple of ``bin_size``.
        ConfigError: a condition that the grammar does not have.
    """
    windows = np.atleast_2d(codes)
    length = windows.shape[1]
    if length % bin_size:
        raise DataError("the window is not a whole number of bins", length, remedy=f"Use a multiple of {bin_size}")
    rows = max(1, 2**19 // length)
    parts = [
        expected(windows[at : at + rows], conditions)
        .reshape(-1, 3 * len(conditions), length // bin_size, bin_size)
        .sum(-1)
        for at in range(0, len(windows), rows)
    ]
    signal: Floats = np.concatenate(parts)
    return signal if codes.ndim == 2 else signal[0]


def expected(codes: Codes, conditions: Sequence[str]) -> Floats:
    """Expected counts per base ``(batch, tracks, length)`` of windows ``(batch, length)``; :func:`oracle` sums them."""
    known = grammar()
    rules, motifs = known.rules, known.role("regulator", "core", "terminator")
    sites = scan(codes, motifs)
    activities = known.activities(motifs, conditions)
    role = np.array([motif.role for motif in motifs])[sites.motif]
    shape = (len(codes), len(conditions), codes.shape[1])
    impulses = _impulses(sites.where(role == "regulator"), motifs, activities, shape)
    signal = np.empty((shape[0], shape[1], 3, shape[2]))
    for side, strand in enumerate((1, -1)):
        on = sites.strand == strand
        cores, ends = sites.where(on & (role == "core")), sites.where(on & (role == "terminator"))
        signal[:, :, side] = _transcripts(cores, ends, motifs, impulses, strand)
    signal[:, :, :2] = (rules.rna_depth * signal[:, :, :2] + rules.rna_background) / rules.resolution
    log = _bells(sites.where(role != "terminator"), motifs, activities, shape, rules.atac_width)
    signal[:, :, 2] = rules.atac_background / rules.resolution * np.exp(rules.atac_gain * log)
    return signal.reshape(shape[0], -1, shape[2])


def expected_marks(codes: Codes, conditions: Sequence[str]) -> Floats:
    """Expected counts per base ``(batch, 2 * conditions, length)`` of windows ``(batch, length)``.

    Per condition the marks k27ac and k4me3.
    """
    rules, marks = grammar().rules, cell_difficulty()[0]["marks"]
    ac, me = marks["k27ac"], marks["k4me3"]
    motifs = grammar().role("regulator", "core")
    sites, activities = scan(codes, motifs), grammar().activities(motifs, conditions)
    is_core = np.array([motif.role == "core" for motif in motifs])
    shape = (len(codes), len(conditions), codes.shape[1])
    weights = np.where(is_core[:, None], ac["core"], activities)
    log = _bells(sites, motifs, weights, shape, ac["width"])
    impulses = _impulses(sites.where(~is_core[sites.motif]), motifs, activities, shape)
    started = np.zeros(shape)
    for strand in (1, -1):
        cores = sites.where(is_core[sites.motif] & (sites.strand == strand))
        tss, level = _starts(cores, motifs, impulses if strand == 1 else impulses[..., ::-1], strand)
        centre = tss + me["downstream"] if strand == 1 else shape[2] - 1 - tss - me["downstream"]
        started += _spread(cores.row, centre, level, shape, me["width"])
    signal = [ac["background"] * np.exp(ac["gain"] * log), me["background"] + me["height"] * started]
    return np.stack(signal, axis=2).reshape(shape[0], -1, shape[2]) / rules.resolution


def scan(codes: Codes, motifs: Sequence[Motif]) -> Sites:
    """Every site of ``motifs`` on both strands of windows ``(batch, length)``.

    Raises:
        DataError: heterozygous codes.
    """
    if codes.size and int(codes.max()) > PAD:
        raise DataError("the oracle needs single haplotypes, not heterozygous codes", int(codes.max()))
    rules = grammar().rules
    length = codes.shape[1]
    padded = np.pad(np.minimum(codes, N), ((0, 0), (0, _WORD - 1)), constant_values=N).astype(np.int64)
    words = padded[:, :length]
    for offset in range(1, _WORD):
        words = words * 5 + padded[:, offset : offset + length]
    found: list[tuple[npt.NDArray[Any], ...]] = []
    for index, motif in enumerate(motifs):
        positions = length - len(motif.pattern) + 1
        for strand in (1, -1):
            if positions <= 0:
                continue
            table = motif.penalties(rules)
            table = table if strand == 1 else table[::-1, COMPLEMENT[:5]]
            penalty = np.zeros((len(codes), positions))
            for offset in range(0, len(table), _WORD):
                penalty += _word_penalties(table[offset : offset + _WORD])[words[:, offset : offset + positions]]
            row, start = np.nonzero(penalty < rules.tolerance)
            side = np.full(len(row), strand)
            found.append((row, start, np.full(len(row), index), side, 1 - penalty[row, start] / rules.tolerance))
    if not found:
        nothing = np.empty(0, dtype=np.int64)
        return Sites(nothing, nothing, nothing, nothing, np.empty(0))
    return Sites(*(np.concatenate(column) for column in zip(*found, strict=True)))


def motif_difference(reference: Codes, alternate: Codes, reach: int = 20) -> Floats:
    """A naive score ``(batch,)`` of variants at the centre of windows ``(batch, length)``: a scan with all motifs.

    For every motif, decoys included, the change of the best occupancy within ``reach`` of the centre; of these, the
    one of largest size. It knows neither activities nor conditions nor promoters.
    """
    centre = reference.shape[1] // 2
    near = slice(max(0, centre - reach), centre + reach + 1)
    motifs = grammar().role("core", "regulator", "decoy")
    best = np.zeros((2, len(reference), len(motifs)))
    for side, codes in enumerate((reference, alternate)):
        sites = scan(codes[:, near], motifs)
        np.maximum.at(best[side], (sites.row, sites.motif), sites.occupancy)
    change: Floats = best[1] - best[0]
    largest = np.abs(change).argmax(axis=1)
    return np.take_along_axis(change, largest[:, None], axis=1)[:, 0]


def _word_penalties(columns: Floats) -> Floats:
    """``(5 ** _WORD,)`` penalties of every word of bases for up to ``_WORD`` motif positions."""
    full = np.zeros((_WORD, 5))
    full[: len(columns)] = columns
    total = np.zeros(1)
    for row in full:
        total = (total[:, None] + row[None, :]).reshape(-1)
    return total


def _centres(sites: Sites, motifs: Sequence[Motif]) -> Ints:
    """The middle base of each site; all patterns have odd lengths, so it is the same base on both strands."""
    half = np.array([len(motif.pattern) // 2 for motif in motifs], dtype=np.int64)
    return sites.start + half[sites.motif]


def _impulses(sites: Sites, motifs: Sequence[Motif], activities: Floats, shape: tuple[int, int, int]) -> Floats:
    """``(batch, conditions, length)``: activity times occupancy at the centre of each site."""
    place = sites.row * shape[2] + _centres(sites, motifs)
    weights = activities[sites.motif].T * sites.occupancy
    size = shape[0] * shape[2]
    planes = [np.bincount(place, w, minlength=size).reshape(shape[0], shape[2]) for w in weights]
    return np.stack(planes, axis=1)


def _bells(
    sites: Sites, motifs: Sequence[Motif], activities: Floats, shape: tuple[int, int, int], width: float
) -> Floats:
    """``(batch, conditions, length)``: the sum of the bells of all sites."""
    heights = activities[sites.motif] * sites.occupancy[:, None]
    return _spread(sites.row, _centres(sites, motifs), heights, shape, width)


def _spread(row: Ints, centre: Ints, heights: Floats, shape: tuple[int, int, int], width: float) -> Floats:
    """``(batch, conditions, length)``: the sum of Gaussian bells, cut at three standard deviations ``width``.

    Their centres may lie outside of the window, and their heights are ``(sites, conditions)``.
    """
    reach = int(3 * width)
    near = (centre >= -reach) & (centre < shape[2] + reach)
    row, centre, heights = row[near], centre[near], heights[near]
    offsets = np.arange(-reach, reach + 1)
    bell = np.exp(-0.5 * (offsets / width) ** 2)
    stride = shape[2] + 4 * reach
    place = (row * stride + centre + 2 * reach)[:, None] + offsets
    planes = [
        np.bincount(place.reshape(-1), (w[:, None] * bell).reshape(-1), minlength=shape[0] * stride).reshape(
            shape[0], stride
        )[:, 2 * reach : 2 * reach + shape[2]]
        for w in heights.T
    ]
    return np.stack(planes, axis=1)


def _along(sites: Sites, motifs: Sequence[Motif], offset: Ints | int, strand: int, length: int) -> Ints:
    """Position, counted in the direction of transcription, of the base ``offset`` bases into each site."""
    size = np.array([len(motif.pattern) for motif in motifs])
    return sites.start + offset if strand == 1 else length - sites.start - size[sites.motif] + offset


def _starts(cores: Sites, motifs: Sequence[Motif], field: Floats, strand: int) -> tuple[Ints, Floats]:
    """TSS ``(cores,)``, in the direction of transcription, and rate ``(cores, conditions)`` of core sites.

    ``field``: effects ``(batch, conditions, length)`` at the centres of sites, in the same direction.
    """
    rules, length = grammar().rules, field.shape[2]
    tss = _along(cores, motifs, rules.tss, strand, length)
    around = np.arange(-rules.reach, rules.reach + 1)
    kernel = np.exp(-np.abs(around) / rules.decay)
    near = tss[:, None] + around
    inside = (near >= 0) & (near < length)
    felt = field[cores.row[:, None], :, np.clip(near, 0, length - 1)] * (kernel * inside)[..., None]
    return tss, cores.occupancy[:, None] * np.exp(felt.sum(axis=1))


def _transcripts(cores: Sites, ends: Sites, motifs: Sequence[Motif], impulses: Floats, strand: int) -> Floats:
    """Coverage ``(batch, conditions, length)`` of the transcripts of one strand."""
    rules = grammar().rules
    batch, conditions, length = impulses.shape
    forward = strand == 1
    size = np.array([len(motif.pattern) for motif in motifs])

    last = _along(ends, motifs, size[ends.motif] - 1, strand, length)
    survival = np.full((batch, length), np.log1p(-rules.loss))
    np.add.at(survival, (ends.row, last), np.log1p(-rules.stop * ends.occupancy))
    survival = np.cumsum(survival, axis=1)
    tss, level = _starts(cores, motifs, impulses if forward else impulses[..., ::-1], strand)

    body = tss[:, None] + np.arange(rules.longest)
    kept = body < length
    body = np.minimum(body, length - 1)
    shape = np.exp(survival[cores.row[:, None], body] - survival[cores.row, tss][:, None]) * kept
    place = (cores.row[:, None] * length + body).reshape(-1)
    planes = [
        np.bincount(place, (level[:, c, None] * shape).reshape(-1), minlength=batch * length).reshape(batch, length)
        for c in range(conditions)
    ]
    covered: Floats = np.stack(planes, axis=1).astype(np.float64, copy=False)
    return covered if forward else covered[..., ::-1]
