"""A generator of data with known truth: genomes, stranded RNA and ATAC tracks, genes, variants, labelled sequences.

All genomes share the grammar of ``seqgraft.oracle``; a seed changes the sequence and the noise, never the rules. So a
trunk pretrained on some seeds and conditions meets the same motifs in another genome, where new conditions weigh them
differently. The difficulty is frozen in ``simulation.json`` and its hash is part of the truth.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.bigwig import runs, write_bigwig
from seqgraft.data.cohort import Cohort, cohort_difficulty, write_cohort
from seqgraft.data.dataset import new_folder, write_json
from seqgraft.data.simulated_cells import write_cell_variants, write_cells
from seqgraft.errors import ConfigError, DataError
from seqgraft.oracle import (
    Motif,
    cell_difficulty,
    difficulty,
    expected,
    grammar,
    motif_difference,
    oracle,
    scan,
    track_names,
)
from seqgraft.sequence import COMPLEMENT, Codes, N, decode, reverse_complement

__all__ = ["Simulation", "Truth", "open_truth", "simulate", "simulate_labelled", "variant_windows"]

FORMAT_VERSION = 1
Floats = npt.NDArray[np.float64]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Simulation:
    """What to simulate.

    ``conditions`` are names of the grammar: base1 to base4, the new ones (naive, activated), cell types (bcell, ...).

    ``chromosome_length`` in bp; ``variants``: how many per kind (causal, neutral, decoy, background) at most;
    ``donors``: a cohort with genotypes and expression in the first condition, if wanted; ``cells``: condition -> how
    many cells, for fragments of single cells.
    """

    seed: int = 1
    conditions: tuple[str, ...] = ("naive", "activated")
    replicates: int = 1
    chromosomes: int = 8
    chromosome_length: int = 200_000
    variants: int = 100
    donors: Cohort | None = None
    cells: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grammar().activities((), self.conditions)
        resolution = grammar().rules.resolution
        if not self.conditions or len(set(self.conditions)) < len(self.conditions):
            raise ConfigError("conditions must be named, each once", list(self.conditions), where="simulation")
        if self.chromosome_length % resolution or self.chromosome_length < 8192:
            remedy = f"Use a multiple of {resolution} of at least 8192 bp"
            raise ConfigError(
                "the chromosome length cannot be simulated", self.chromosome_length, where="simulation", remedy=remedy
            )
        for name in ("replicates", "chromosomes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", getattr(self, name), where="simulation")
        for name, number in self.cells.items():
            if name not in self.conditions or number < 1:
                remedy = "Give conditions of the simulation and a number of cells, 1 or more, of each"
                raise ConfigError("these cells cannot be simulated", {name: number}, where="cells", remedy=remedy)
        if self.variants < 0 or self.seed < 0:
            raise ConfigError("variants and seed cannot be negative", (self.variants, self.seed), where="simulation")


@dataclass(frozen=True)
class Truth:
    """What was simulated. Tables are read when asked for; every file is described in :func:`simulate`."""

    folder: Path
    simulation: Simulation
    difficulty: str
    ceilings: dict[str, dict[str, float]]

    def rates(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "truth" / "rates.parquet")

    def motifs(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "truth" / "motifs.parquet")

    def genes(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "truth" / "genes.parquet")

    def variants(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "truth" / "variants.parquet")

    def cell_rates(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "truth" / "cell_rates.parquet")

    def cell_variants(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "truth" / "cell_variants.parquet")

    def donor_variants(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "truth" / "donor_variants.parquet")

    def donor_genes(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "truth" / "donor_genes.parquet")

    def donor_values(self) -> pd.DataFrame:
        """Genetic values, genes x donors."""
        return pd.read_parquet(self.folder / "truth" / "donor_values.parquet").set_index("gene")


def open_truth(folder: Path | str) -> Truth:
    """The truth in a simulated folder.

    Raises:
        DataError: the folder is not a simulation, or of another format version.
    """
    folder = Path(folder)
    path = folder / "truth.json"
    if not path.exists():
        raise DataError(
            "the folder is not a simulation: it has no truth.json",
            str(folder),
            remedy="Make one with seqgraft simulate",
        )
    content = json.loads(path.read_text())
    if content.get("format_version") != FORMAT_VERSION:
        remedy = f"This version reads {FORMAT_VERSION}; simulate again"
        raise DataError(
            "the simulation has another format version", content.get("format_version"), where=path, remedy=remedy
        )
    settings = {**content["simulation"], "conditions": tuple(content["simulation"]["conditions"])}
    if donors := settings.get("donors"):
        settings["donors"] = Cohort(**{**donors, "populations": tuple(donors["populations"])})
    return Truth(folder, Simulation(**settings), content["difficulty"], content["ceilings"])


def simulate(simulation: Simulation, folder: Path | str) -> Truth:
    """Write a simulated data set; the folder appears only when it is complete.

    ``genome.fa``; ``tracks/NAME.bw`` at the resolution of the rules (value = count / resolution, so that sums over
    bases are counts); ``tracks.csv`` (a track table, files relative to the folder); ``genes.gtf`` (one exon per gene);
    ``variants.vcf``; ``truth.json``; and ``truth/`` with

    * ``rates.parquet``: chrom, start, end, and the expected count per track without replicates (nominal depth);
    * ``motifs.parquet``: every site: chrom, start, end, strand, motif, role, occupancy, planted;
    * ``genes.parquet``: gene_id, chrom, start, end, strand, tss, and per condition the expected count of its exon;
    * ``variants.parquet``: chrom, position (1-based), ref, alt, id, kind, motif, role, motif_difference, and per track
      the log2 fold change of the expected sum (+ 1) around the variant, spans as in ``simulation.json``.

    With donors also what :func:`seqgraft.data.cohort.write_cohort` says, and with cells what
    :func:`seqgraft.data.simulated_cells.write_cells` and ``write_cell_variants`` say.

    Raises:
        RunError: the folder exists or cannot be written.
    """
    folder = Path(folder)
    content, digest = difficulty()
    with new_folder(folder) as building:
        (building / "truth").mkdir()
        (building / "tracks").mkdir()
        chromosomes = {f"chr{i + 1}": _Chromosome.draw(simulation, i) for i in range(simulation.chromosomes)}
        signal = {name: expected(c.codes[None], simulation.conditions)[0] for name, c in chromosomes.items()}
        _write_genome(chromosomes, building / "genome.fa")
        genes = _genes(chromosomes, signal, simulation.conditions)
        _write_gtf(genes, building / "genes.gtf")
        motifs = _motif_table(chromosomes)
        rates = _rates(signal, simulation.conditions)
        tables = {"rates": rates, "motifs": motifs, "genes": genes}
        if simulation.variants:
            tables["variants"] = _variants(simulation, chromosomes, motifs, genes)
            _write_vcf(tables["variants"], chromosomes, building / "variants.vcf")
        for name, table in tables.items():
            table.to_parquet(building / "truth" / f"{name}.parquet")
        ceilings = _write_tracks(simulation, rates, chromosomes, building)
        about = {"format": "seqgraft-simulation", "format_version": FORMAT_VERSION, "simulation": asdict(simulation)}
        if simulation.donors is not None:
            codes, condition = {name: c.codes for name, c in chromosomes.items()}, simulation.conditions[0]
            made = write_cohort(simulation.donors, building, codes, motifs, genes, condition, simulation.seed)
            ceilings |= {"donors": made}
            frozen, its_hash = cohort_difficulty()
            about |= {"donors": {"difficulty": its_hash, "settings": frozen}}
        if simulation.cells:
            codes = {name: c.codes for name, c in chromosomes.items()}
            write_cells(building, simulation.cells, codes, simulation.seed)
            if simulation.variants:
                pair = variant_windows(codes, tables["variants"], content["variants"]["window"])
                write_cell_variants(building, list(simulation.cells), tables["variants"], pair)
            frozen, its_hash = cell_difficulty()
            about |= {"cells": {"difficulty": its_hash, "settings": frozen}}
        write_json(building / "truth.json", {**about, "difficulty": digest, "ceilings": ceilings, "settings": content})
    return open_truth(folder)


@dataclass(frozen=True)
class _Chromosome:
    """A sequence and what was planted into it (sites and genes, in 0-based forward coordinates)."""

    codes: Codes
    sites: Rows
    genes: Rows

    @staticmethod
    def draw(simulation: Simulation, index: int) -> _Chromosome:
        layout = difficulty()[0]["layout"]
        rng = np.random.default_rng([simulation.seed, index, 0])
        codes = rng.choice(4, simulation.chromosome_length, p=layout["composition"]).astype(np.uint8)
        sites: Rows = []
        genes: Rows = []
        left = int(rng.integers(*layout["gap"]))
        while True:
            body, gap = (int(rng.integers(*layout[part])) for part in ("body", "gap"))
            right = left + layout["upstream"] + body
            if right + gap > len(codes):
                return _Chromosome(codes, sites, genes)
            strand = "+" if rng.random() < 0.5 else "-"
            planter = _Planter.of(codes[left:right], strand, rng)
            planter.plant_gene(layout["upstream"])
            start, end = planter.span(layout["upstream"], right - left)
            genes.append({"start": left + start, "end": left + end, "strand": strand})
            sites += planter.sites_from(left)
            if rng.random() < layout["distal"]:
                planter = _Planter.of(codes[right : right + gap], "+", rng)
                planter.plant_around(gap // 2, (-75, 75), layout["regulators"], "regulator")
                sites += planter.sites_from(right)
            left = right + gap


@dataclass(frozen=True)
class _Planter:
    """Writes motif instances into a stretch, seen along ``strand``; ``view`` is the stretch itself, not a copy."""

    view: Codes
    taken: npt.NDArray[np.bool_]
    strand: str
    rng: np.random.Generator
    sites: Rows

    @staticmethod
    def of(view: Codes, strand: str, rng: np.random.Generator) -> _Planter:
        return _Planter(view, np.zeros(len(view), dtype=bool), strand, rng, [])

    def span(self, start: int, end: int) -> tuple[int, int]:
        """An interval along the strand in forward coordinates of the stretch."""
        return (start, end) if self.strand == "+" else (len(self.view) - end, len(self.view) - start)

    def sites_from(self, origin: int) -> Rows:
        return [{**site, "start": site["start"] + origin} for site in self.sites]

    def plant_gene(self, tss: int) -> None:
        """A core with its TSS at ``tss``, a terminator at the end, regulators and decoys around the TSS."""
        layout = difficulty()[0]["layout"]
        (core,), (terminator,) = grammar().role("core"), grammar().role("terminator")
        self.plant(core, tss - grammar().rules.tss, "+")
        self.plant(terminator, len(self.view) - len(terminator.pattern), "+")
        self.plant_around(tss, layout["span"], layout["regulators"], "regulator")
        self.plant_around(tss, layout["span"], layout["decoys"], "decoy")

    def plant_around(self, centre: int, span: Sequence[int], mean: float, role: str) -> None:
        """One site more than a Poisson number of ``mean`` at random free places of ``span`` around ``centre``."""
        motifs = grammar().role(role)
        for _ in range(int(self.rng.poisson(mean)) + (role == "regulator")):
            motif = motifs[int(self.rng.integers(len(motifs)))]
            start = centre + int(self.rng.integers(span[0], span[1]))
            end = start + len(motif.pattern)
            if start >= 0 and end <= len(self.view) and not self.taken[start:end].any():
                self.plant(motif, start, "+" if self.rng.random() < 0.5 else "-")

    def plant(self, motif: Motif, start: int, strand: str) -> None:
        """An instance at ``start`` along the planter's strand, itself on ``strand`` relative to it."""
        instance = _instance(motif, self.rng)
        self.taken[start : start + len(instance)] = True
        begin, end = self.span(start, start + len(instance))
        forward = strand == self.strand
        self.view[begin:end] = instance if forward else reverse_complement(instance)
        self.sites.append({"start": begin, "motif": motif.name, "strand": "+" if forward else "-"})


@cache
def _mismatches(motif: Motif) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Which bases ``(length, 4)`` are mismatches, and how often ``(length,)`` a planted site has one."""
    layout, rules = difficulty()[0]["layout"], grammar().rules
    penalties = motif.penalties(rules)[:, :4]
    worst = penalties.max(axis=1)
    strong = 0.0 if motif.role in ("core", "terminator") else layout["strong_mismatch"]
    return penalties > 0, np.where(worst == 0, 0.0, np.where(worst == rules.weak, layout["weak_mismatch"], strong))


def _instance(motif: Motif, rng: np.random.Generator) -> Codes:
    """A sequence of the motif with random mismatches, but none at the strong bases of cores and terminators."""
    mismatch, rate = _mismatches(motif)
    wrong = rng.random(len(rate)) < rate
    lots = rng.random(mismatch.shape)
    codes: Codes = np.where(mismatch == wrong[:, None], lots, -1.0).argmax(axis=1).astype(np.uint8)
    return codes


def _motif_table(chromosomes: dict[str, _Chromosome]) -> pd.DataFrame:
    """Every site, planted or not, with its occupancy."""
    motifs = grammar().motifs
    names, roles = np.array([m.name for m in motifs]), np.array([m.role for m in motifs])
    sizes = np.array([len(m.pattern) for m in motifs])
    tables = []
    for chrom, chromosome in chromosomes.items():
        sites = scan(chromosome.codes[None], motifs)
        columns = {
            "start": sites.start,
            "end": sites.start + sizes[sites.motif],
            "strand": np.where(sites.strand > 0, "+", "-"),
        }
        table = pd.DataFrame({"chrom": chrom, **columns, "motif": names[sites.motif], "role": roles[sites.motif]})
        planted = pd.DataFrame(chromosome.sites).assign(planted=True)
        table = table.assign(occupancy=sites.occupancy).merge(planted, how="left", on=["start", "motif", "strand"])
        tables.append(table.assign(planted=table["planted"].notna()).sort_values(["start", "motif"]))
    return pd.concat(tables, ignore_index=True)


def _rates(signal: dict[str, Floats], conditions: Sequence[str]) -> pd.DataFrame:
    resolution = grammar().rules.resolution
    tables = []
    for chrom, bases in signal.items():
        bins = bases.reshape(len(bases), -1, resolution).sum(-1)
        start = np.arange(bins.shape[1]) * resolution
        table = pd.DataFrame({"chrom": chrom, "start": start, "end": start + resolution})
        tables.append(pd.concat([table, pd.DataFrame(bins.T, columns=track_names(conditions))], axis=1))
    return pd.concat(tables, ignore_index=True)


def _genes(chromosomes: dict[str, _Chromosome], signal: dict[str, Floats], conditions: Sequence[str]) -> pd.DataFrame:
    names = track_names(conditions)
    rows: Rows = []
    for chrom, chromosome in chromosomes.items():
        sums = np.pad(np.cumsum(signal[chrom], axis=1), ((0, 0), (1, 0)))
        for gene in chromosome.genes:
            strand = "plus" if gene["strand"] == "+" else "minus"
            counts = sums[:, gene["end"]] - sums[:, gene["start"]]
            tss = gene["start"] if strand == "plus" else gene["end"] - 1
            values = {c: counts[names.index(f"rna_{c}_{strand}")] for c in conditions}
            rows.append({"gene_id": f"gene{len(rows) + 1:04d}", "chrom": chrom, **gene, "tss": tss, **values})
    return pd.DataFrame(rows)


def _write_tracks(
    simulation: Simulation, rates: pd.DataFrame, chromosomes: dict[str, _Chromosome], folder: Path
) -> dict[str, dict[str, float]]:
    """Draw counts and write them; the Pearson of each noisy track with its expectation, per bin size."""
    noise, resolution = difficulty()[0]["noise"], grammar().rules.resolution
    lengths = {name: len(chromosome.codes) for name, chromosome in chromosomes.items()}
    table: Rows = []
    ceilings: dict[str, dict[str, float]] = {}
    for track, replicate in itertools.product(track_names(simulation.conditions), range(simulation.replicates)):
        assay, condition = track.split("_")[:2]
        # One library per condition, assay and replicate: the two strands of RNA share its depth.
        library = [simulation.seed, grammar().conditions.index(condition), ["rna", "atac"].index(assay), replicate]
        depth = (
            np.exp(noise["library"] * np.random.default_rng([*library, 1]).standard_normal())
            if simulation.replicates > 1
            else 1.0
        )
        mean = rates[track].to_numpy() * depth
        rng = np.random.default_rng([*library, 2, track.endswith("minus")])
        counts = rng.poisson(mean * rng.gamma(1 / noise["dispersion"], noise["dispersion"], mean.size)).astype(
            np.float64
        )
        suffix = f"_rep{replicate + 1}" if simulation.replicates > 1 else ""
        name, partner = (text.replace(condition, condition + suffix) for text in (track, _partner(track)))
        ceilings[name] = {str(resolution * k): _binned_pearson(counts, mean, k, simulation) for k in (1, 2, 4)}
        values = (runs(c, counts[(rates["chrom"] == c).to_numpy()] / resolution, resolution) for c in lengths)
        write_bigwig(folder / "tracks" / f"{name}.bw", lengths, itertools.chain.from_iterable(values))
        about = {
            "name": name,
            "group": assay,
            "link": "softplus",
            "strand_pair": partner,
            "statistic": "sum",
            "scale": 1.0,
        }
        more = {
            "condition": condition,
            "replicate": suffix.lstrip("_"),
            "depth": counts.sum(),
            "file": f"tracks/{name}.bw",
        }
        table.append({**about, "squash": "none", **more})
    pd.DataFrame(table).to_csv(folder / "tracks.csv", index=False)
    return ceilings


def _partner(track: str) -> str:
    return track.replace("_plus", "_minus") if track.endswith("_plus") else track.replace("_minus", "_plus")


def _binned_pearson(observed: Floats, mean: Floats, factor: int, simulation: Simulation) -> float:
    bins = simulation.chromosome_length // grammar().rules.resolution // factor
    pair = [
        v.reshape(simulation.chromosomes, -1)[:, : bins * factor].reshape(-1, factor).sum(1) for v in (observed, mean)
    ]
    return float(np.corrcoef(pair)[0, 1])


def variant_windows(chromosomes: dict[str, Codes], variants: pd.DataFrame, width: int) -> tuple[Codes, Codes]:
    """Reference and alternate windows ``(variants, width)`` of SNVs at index ``width // 2``; N beyond the ends."""
    padded = {name: np.pad(codes, width // 2, constant_values=N) for name, codes in chromosomes.items()}
    reference = np.stack(
        [padded[c][p - 1 : p - 1 + width] for c, p in zip(variants["chrom"], variants["position"], strict=True)]
    )
    alternate = reference.copy()
    alternate[:, width // 2] = ["ACGT".index(alt) for alt in variants["alt"]]
    return reference, alternate


def _variants(
    simulation: Simulation, chromosomes: dict[str, _Chromosome], motifs: pd.DataFrame, genes: pd.DataFrame
) -> pd.DataFrame:
    """SNVs of four kinds; candidates that do not do what their kind says (an accidental site) are dropped."""
    limits = difficulty()[0]["variants"]
    rng = np.random.default_rng([simulation.seed, 3])
    drawn = list(itertools.islice(_candidates(chromosomes, motifs, genes, rng), 6 * simulation.variants + 16))
    table = pd.DataFrame(drawn).drop_duplicates(["chrom", "position"]).reset_index(drop=True)
    reference, alternate = variant_windows({n: c.codes for n, c in chromosomes.items()}, table, limits["window"])
    table["motif_difference"] = motif_difference(reference, alternate)
    names = track_names(simulation.conditions)
    effects = _effects(reference, alternate, simulation.conditions, limits)
    table[names] = effects
    size = np.abs(effects).max(axis=1)
    table = table[np.where(table["kind"] == "causal", size >= limits["least"], size <= limits["most"])]
    table = table.groupby("kind").head(simulation.variants)
    order = np.lexsort((table["position"], table["chrom"].map(list(chromosomes).index)))
    chosen: pd.DataFrame = table.iloc[order].reset_index(drop=True)
    chosen.insert(4, "id", [f"snv{i + 1}" for i in range(len(chosen))])
    return chosen


def _effects(reference: Codes, alternate: Codes, conditions: Sequence[str], limits: dict[str, Any]) -> Floats:
    """``(variants, tracks)``: log2 fold change of the expected sums + 1 in the spans around the variant."""
    resolution = grammar().rules.resolution
    sums = []
    for codes in (reference, alternate):
        signal = oracle(codes, conditions, resolution)
        middle = signal.shape[2] // 2
        spans = {assay: limits[f"{assay}_span"] // 2 // resolution for assay in ("rna", "atac")}
        reach = [spans[name.split("_")[0]] for name in track_names(conditions)]
        sums.append(np.stack([signal[:, t, middle - r : middle + r].sum(1) for t, r in enumerate(reach)], axis=1))
    change: Floats = np.log2((sums[1] + 1) / (sums[0] + 1))
    return change


def _candidates(
    chromosomes: dict[str, _Chromosome], motifs: pd.DataFrame, genes: pd.DataFrame, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """An endless stream of SNVs, one of each kind in turn."""
    rules, known = grammar().rules, {motif.name: motif for motif in grammar().motifs}
    planted = motifs[motifs["planted"] & (motifs["occupancy"] > 0.3)]
    acting, decoys = (planted[planted["role"].isin(r)].to_dict("records") for r in (("regulator", "core"), ("decoy",)))
    near_genes = genes.to_dict("records")
    span = difficulty()[0]["layout"]["span"]
    for kind in itertools.cycle(("causal", "neutral", "decoy", "background")):
        name, role = "", ""
        if kind == "background":
            gene = near_genes[int(rng.integers(len(near_genes)))]
            chrom, position = (
                gene["chrom"],
                gene["tss"] + int(rng.integers(*span)) * (1 if gene["strand"] == "+" else -1),
            )
            choices = np.arange(4)
        else:
            among = decoys if kind == "decoy" else acting
            site = among[int(rng.integers(len(among)))]
            chrom, name, role = site["chrom"], site["motif"], site["role"]
            penalties = known[name].penalties(rules)[:, :4]
            free = (penalties == 0).sum(1)
            column = int(rng.choice(np.flatnonzero(free > 1 if kind == "neutral" else free < 4)))
            forward = site["strand"] == "+"
            position = site["start"] + column if forward else site["end"] - 1 - column
            choices = np.flatnonzero(penalties[column] == 0) if kind == "neutral" else np.arange(4)
            choices = choices if forward else COMPLEMENT[choices].astype(np.int64)
        codes = chromosomes[chrom].codes
        if not 0 <= position < len(codes):
            continue
        alternates = [c for c in choices if c != codes[position]]
        if alternates:
            alt = "ACGT"[int(rng.choice(alternates))]
            yield {
                "chrom": chrom,
                "position": position + 1,
                "ref": "ACGT"[codes[position]],
                "alt": alt,
                "kind": kind,
                "motif": name,
                "role": role,
            }


def _write_genome(chromosomes: dict[str, _Chromosome], path: Path) -> None:
    with path.open("w") as file:
        for name, chromosome in chromosomes.items():
            text = decode(chromosome.codes)
            file.write(f">{name}\n" + "".join(f"{text[i : i + 80]}\n" for i in range(0, len(text), 80)))


def _write_gtf(genes: pd.DataFrame, path: Path) -> None:
    with path.open("w") as file:
        for gene in genes.to_dict("records"):
            name, place = gene["gene_id"], f"{gene['start'] + 1}\t{gene['end']}\t.\t{gene['strand']}\t."
            for feature in ("gene", "transcript", "exon"):
                label = f'gene_id "{name}"; gene_name "{name}";'
                label += "" if feature == "gene" else f' transcript_id "{name}.1";'
                file.write(f"{gene['chrom']}\tseqgraft\t{feature}\t{place}\t{label}\n")


def _write_vcf(variants: pd.DataFrame, chromosomes: dict[str, _Chromosome], path: Path) -> None:
    """The kind of a variant is not in the VCF: it belongs to the truth."""
    with path.open("w") as file:
        file.write("##fileformat=VCFv4.2\n")
        file.writelines(f"##contig=<ID={name},length={len(c.codes)}>\n" for name, c in chromosomes.items())
        file.write("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n")
        for v in variants.itertuples():
            file.write(f"{v.chrom}\t{v.position}\t{v.id}\t{v.ref}\t{v.alt}\t.\t.\t.\n")


def simulate_labelled(simulation: Simulation, path: Path | str, n: int = 1000, length: int = 512) -> pd.DataFrame:
    """Write a CSV of ``n`` labelled sequences of ``length`` bp: name, sequence, promoter, expression_CONDITION, fold.

    Half have a core in the middle and are promoters (1, else 0); all have regulators and decoys at the same rates.
    Expression is log2 of the expected RNA count of the window (+ 1), both strands, with Gaussian noise.

    Raises:
        ConfigError: a length that is shorter than 128 or no multiple of the resolution of the rules.
    """
    resolution = grammar().rules.resolution
    if length < 128 or length % resolution:
        raise ConfigError(
            "the length cannot be simulated", length, remedy=f"Use a multiple of {resolution} of at least 128"
        )
    layout = difficulty()[0]["layout"]
    rng = np.random.default_rng([simulation.seed, 4])
    codes = rng.choice(4, (n, length), p=layout["composition"]).astype(np.uint8)
    promoter = rng.permutation(n) < n // 2
    (core,) = grammar().role("core")
    for row, labelled in zip(codes, promoter, strict=True):
        planter = _Planter.of(row, "+" if rng.random() < 0.5 else "-", rng)
        if labelled:
            planter.plant(core, length // 2 - grammar().rules.tss, "+")
        span = (max(layout["span"][0], -length // 2), min(layout["span"][1], length // 2))
        planter.plant_around(length // 2, span, layout["regulators"], "regulator")
        planter.plant_around(length // 2, span, layout["decoys"], "decoy")
    signal = oracle(codes, simulation.conditions, resolution).sum(-1).reshape(n, -1, 3)
    expression = np.log2(signal[:, :, :2].sum(-1) + 1) + rng.normal(
        0, difficulty()[0]["noise"]["labels"], (n, len(simulation.conditions))
    )
    table = pd.DataFrame(
        {
            "name": [f"seq{i + 1}" for i in range(n)],
            "sequence": [decode(row) for row in codes],
            "promoter": promoter.astype(int),
        }
    )
    table[[f"expression_{c}" for c in simulation.conditions]] = expression.round(4)
    table["fold"] = rng.choice(["train", "valid", "test"], n, p=[0.7, 0.15, 0.15])
    table.to_csv(path, index=False)
    return table
