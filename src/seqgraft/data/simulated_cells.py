"""Simulated single cells: fragments of ATAC, two histone marks and RNA, and where variants act, cell type by cell type.

Cell types are conditions of the oracle. A cell yields ``per_cell`` of the oracle's expected counts, times a depth of
its own; a group's fragments are Poisson draws of the sum over its cells:

* ``atac``: an insertion at a base is one end of a fragment, either with the same chance, and the other end is an
  insertion as well; truth counts both.
* ``k27ac``, ``k4me3``: midpoints of fragments.
* ``rna``: reads around a base, with their strand; truth counts the bases that they cover.

A share of the fragments (``ambient``) has barcodes of no cell. The numbers are in ``simulated_cells.json``; its hash is
part of the truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.genome import write_bgzip
from seqgraft.oracle import cell_difficulty, expected, expected_marks, grammar
from seqgraft.sequence import Codes

__all__ = ["cell_signal", "cell_tracks", "write_cell_variants", "write_cells"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
ENDINGS = {"atac": ("",), "k27ac": ("",), "k4me3": ("",), "rna": ("+", "-")}


def cell_tracks(types: Sequence[str]) -> list[str]:
    """Assay by assay, in each the cell types, in each the strands: the tracks of :func:`cell_signal`."""
    return [f"{name}_{assay}{ending}" for assay, endings in ENDINGS.items() for name in types for ending in endings]


def cell_signal(codes: Codes, types: Sequence[str]) -> Floats:
    """Where fragments are drawn: expected counts per base ``(batch, tracks, length)`` of a hundred cells of mean depth.

    Windows are ``(batch, length)``. Of ATAC, insertions; of marks, midpoints; of RNA, middles of reads.
    """
    bulk = expected(codes, types).reshape(len(codes), len(types), 3, -1)
    marks = expected_marks(codes, types).reshape(len(codes), len(types), 2, -1)
    rna = bulk[:, :, :2].reshape(len(codes), 2 * len(types), -1)
    return np.concatenate([bulk[:, :, 2], marks[:, :, 0], marks[:, :, 1], rna], axis=1)


def write_cells(folder: Path, cells: Mapping[str, int], chromosomes: Mapping[str, Codes], seed: int) -> None:
    """Write the files of single cells into a folder with ``truth/``.

    ``cells.csv`` (barcode, cell_type); ``fragments/ASSAY.tsv.gz``, bgzipped and sorted: chromosome, start, end,
    barcode, 1, and of RNA the strand; ``truth/cell_rates.parquet``: chrom, start, end and the expected count of every
    track of :func:`cell_tracks`, for the cells that there are, per ``resolution`` bases.

    Args:
        cells: cell type -> how many.
    """
    frozen, types = cell_difficulty()[0], list(cells)
    rng = np.random.default_rng([seed, 6])
    total = sum(cells.values())
    ambient = max(1, total // 10)
    barcodes = _barcodes(total + ambient, rng)
    owner = np.repeat(np.arange(len(types)), list(cells.values()))
    spread = frozen["depth_spread"]
    depth = frozen["per_cell"] * np.exp(spread * rng.standard_normal(total) - spread**2 / 2)
    table = pd.DataFrame({"barcode": barcodes[:total], "cell_type": np.array(types)[owner]})
    table.iloc[rng.permutation(total)].to_csv(folder / "cells.csv", index=False)
    (folder / "fragments").mkdir()
    signal = {name: cell_signal(codes[None], types)[0] for name, codes in chromosomes.items()}
    rates: dict[str, list[Floats]] = {name: [] for name in signal}
    first = 0
    for assay, endings in ENDINGS.items():
        count = len(types) * len(endings)
        own = {name: values[first : first + count] for name, values in signal.items()}
        lines = _lines(assay, own, owner, depth, barcodes, rng)
        write_bgzip(folder / "fragments" / f"{assay}.tsv.gz", lines)
        groups = np.repeat([depth[owner == group].sum() for group in range(len(types))], len(endings))
        for name, values in own.items():
            rates[name].append(_counted(assay, values) * groups[:, None] * (1 - frozen["ambient"]))
        first += count
    _rate_table(rates, cell_tracks(types)).to_parquet(folder / "truth" / "cell_rates.parquet")


def write_cell_variants(folder: Path, types: Sequence[str], variants: pd.DataFrame, pair: tuple[Codes, Codes]) -> None:
    """``truth/cell_variants.parquet``: id, kind, per track the log2 fold change of the expected sum (+ 1) around it.

    ``cell_type`` is the type with the largest change of any track, ``size`` that change, ``runner_up`` the largest
    change in another type.

    Args:
        variants: as ``Truth`` has them.
        pair: windows ``(variants, width)`` of the reference and of the alternate, the variants in their middle.
    """
    assays = cell_difficulty()[0]["assays"]
    tracks = cell_tracks(types)
    sums = []
    for codes in pair:
        signal = np.concatenate([cell_signal(codes[at : at + 64], types) for at in range(0, len(codes), 64)])
        middle = signal.shape[2] // 2
        reach = [assays[_assay(name)]["span"] // 2 for name in tracks]
        sums.append(np.stack([signal[:, t, middle - r : middle + r].sum(1) for t, r in enumerate(reach)], axis=1))
    change = np.log2((sums[1] + 1) / (sums[0] + 1))
    of_type = np.array([[name.startswith(f"{one}_") for name in tracks] for one in types])
    size = np.stack([np.abs(change[:, own]).max(axis=1) for own in of_type], axis=1)
    most, order = size.argmax(axis=1), np.sort(size, axis=1)
    table = variants[["id", "chrom", "position", "kind"]].assign(**dict(zip(tracks, change.T, strict=True)))
    second = order[:, -2] if len(types) > 1 else np.zeros(len(size))
    table = table.assign(cell_type=np.array(types)[most], size=order[:, -1], runner_up=second)
    table.to_parquet(folder / "truth" / "cell_variants.parquet")


def _assay(track: str) -> str:
    return track.split("_")[1].rstrip("+-")


def _barcodes(number: int, rng: np.random.Generator) -> npt.NDArray[np.str_]:
    """Different ones of 16 letters, as 10x has them."""
    found: dict[str, None] = {}
    while len(found) < number:
        letters = np.array(list("ACGT"))[rng.integers(4, size=(number, 16))]
        found |= dict.fromkeys("".join(row) + "-1" for row in letters)
    return np.array(list(found)[:number])


def _lines(
    assay: str,
    signal: Mapping[str, Floats],
    owner: Ints,
    depth: Floats,
    barcodes: npt.NDArray[np.str_],
    rng: np.random.Generator,
) -> Iterator[str]:
    """The sorted rows of an assay, chromosome by chromosome; ``signal`` is ``(types * strands, length)`` of each."""
    frozen, strands = cell_difficulty()[0], len(ENDINGS[assay])
    for name, values in signal.items():
        parts = []
        for row, rate in enumerate(values):
            cells = np.flatnonzero(owner == row // strands)
            number = rng.poisson(rate.sum() * depth[cells].sum() / (2 if assay == "atac" else 1))
            place = np.searchsorted(np.cumsum(rate), rng.random(number) * rate.sum())
            start, end = _ends(assay, place, rng)
            cell = rng.choice(cells, number, p=depth[cells] / depth[cells].sum())
            stray = rng.integers(len(owner), len(barcodes), number)
            cell = np.where(rng.random(number) < frozen["ambient"], stray, cell)
            parts.append(np.stack([start, end, cell, np.full(number, row % strands)]))
        table = np.concatenate(parts, axis=1)
        start, end = np.maximum(table[0], 0), np.minimum(table[1], values.shape[1])
        order = np.lexsort((end, start))
        columns: dict[str, Any] = {"chrom": name, "start": start, "end": end, "barcode": barcodes[table[2]], "n": 1}
        if strands == 2:
            columns["strand"] = np.array(["+", "-"])[table[3]]
        yield pd.DataFrame(columns).iloc[order].to_csv(sep="\t", header=False, index=False)


def _ends(assay: str, place: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Fragments ``[start, end)`` at drawn places."""
    length = rng.choice(cell_difficulty()[0]["assays"][assay]["lengths"], len(place))
    start = place - length // 2
    if assay == "atac":
        start = np.where(rng.random(len(place)) < 0.5, place, place - length + 1)
    return start, start + length


def _counted(assay: str, signal: Floats) -> Floats:
    """What the fragments count ``(rows, length)``, where one is drawn at each base at the rate ``signal``.

    Fragments that reach beyond an end of the chromosome are cut there; the truth leaves out what they lose.
    """
    about = cell_difficulty()[0]["assays"][assay]
    if about["count"] == "midpoints":
        return signal
    if about["count"] == "insertions":
        others = [side * (length - 1) for length in about["lengths"] for side in (-1, 1)]
        shares = {0: 0.5} | dict.fromkeys(others, 0.5 / len(others))
    else:
        (length,) = about["lengths"]
        shares = dict.fromkeys(range(-(length // 2), length - length // 2), 1.0)
    size, counted = signal.shape[1], np.zeros_like(signal)
    for offset, share in shares.items():
        to, of = slice(max(offset, 0), size + min(offset, 0)), slice(max(-offset, 0), size - max(offset, 0))
        counted[:, to] += share * signal[:, of]
    return counted


def _rate_table(rates: Mapping[str, list[Floats]], tracks: Sequence[str]) -> pd.DataFrame:
    resolution, tables = grammar().rules.resolution, []
    for chrom, parts in rates.items():
        bins = np.concatenate(parts)
        bins = bins.reshape(len(bins), -1, resolution).sum(-1)
        start = np.arange(bins.shape[1]) * resolution
        table = pd.DataFrame({"chrom": chrom, "start": start, "end": start + resolution})
        tables.append(pd.concat([table, pd.DataFrame(bins.T, columns=list(tracks))], axis=1))
    return pd.concat(tables, ignore_index=True)
