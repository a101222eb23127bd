"""Simulated donors on a simulated genome: genotypes of several populations, and expression with known causes.

What a haplotype drives of a gene is ``log2(count + pseudocount)``, the oracle's expected RNA of the ``read`` bases from
the gene's start on, in the ``window`` around the start. A donor's genetic value is the mean over its haplotypes of

* ``additive``: the sum of what each of the haplotype's alleles does alone to the reference, or
* ``interacting``: what the whole haplotype drives, and beside it what each pair of alleles does together:
  ``k sum_(i<j) e_i e_j (a_i - f_i) (a_j - f_j)`` over alleles whose effect e alone is ``felt`` or more, a whether the
  haplotype has them, f how frequent they are; k makes its standard deviation ``interaction`` times that of the rest.
  An allele then helps on some haplotypes and harms on others, which no sum of effects says.

Expression is the genetic value with Gaussian noise that leaves a heritability drawn for each gene.

Populations are of one ancestry (Balding and Nichols 1995: a population's frequency is beta-distributed around the
ancestral one with the differentiation Fst). Each has a few founder haplotypes; donors are mosaics of them, siblings
mosaics of their parents, so that a window has tens of distinct haplotypes. The numbers are in ``cohort.json``; its
hash is part of the truth.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from seqgraft.data.calls import read_genotypes
from seqgraft.data.genotypes import Genotypes
from seqgraft.data.haplotypes import Haplotypes
from seqgraft.errors import ConfigError
from seqgraft.genome import Genome, Interval
from seqgraft.oracle import expected, grammar
from seqgraft.sequence import Codes, decode

__all__ = ["Cohort", "cohort_difficulty", "drive", "write_cohort"]

Floats = npt.NDArray[np.float64]
Alleles = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Cohort:
    """Donors to simulate.

    Attributes:
        donors: how many, in populations of nearly one size.
        populations: their names.
        truth: how the alleles of a haplotype make expression: "additive" or "interacting".
    """

    donors: int = 200
    populations: tuple[str, ...] = ("north", "south")
    truth: Literal["additive", "interacting"] = "additive"

    def __post_init__(self) -> None:
        if not self.populations or len(set(self.populations)) < len(self.populations):
            raise ConfigError("populations must be named, each once", list(self.populations), where="donors")
        if self.donors < 10 * len(self.populations):
            remedy = "Use 10 for each population, or more"
            raise ConfigError("there are too few donors", self.donors, where="donors", remedy=remedy)


@cache
def cohort_difficulty() -> tuple[dict[str, Any], str]:
    """The content of the frozen ``data/cohort.json`` and its sha256."""
    content = resources.files("seqgraft").joinpath("data", "cohort.json").read_bytes()
    return json.loads(content), hashlib.sha256(content).hexdigest()


def write_cohort(
    cohort: Cohort,
    folder: Path,
    chromosomes: Mapping[str, Codes],
    motifs: pd.DataFrame,
    genes: pd.DataFrame,
    condition: str,
    seed: int,
) -> dict[str, float]:
    """Write the cohort's files into a folder with ``genome.fa`` and ``truth/``; the mean ceiling of heritable genes.

    ``cohort.vcf``, ``donors.tsv`` (donor, population, family, sex), ``expression.tsv`` (genes x donors, log2),
    ``genes.tsv`` (gene, chrom, tss (1-based), strand) and, under ``truth``,

    * ``donor_variants.parquet``: gene, chrom, position (1-based), ref, alt, ``effect`` of one allele alone on what its
      haplotype drives, and its frequency in each population;
    * ``donor_values.parquet``: genetic values, genes x donors;
    * ``donor_genes.parquet``: gene, heritability, and ``ceiling``, the correlation of genetic value and expression.

    Args:
        motifs, genes: as ``Truth`` has them.
    """
    rng = np.random.default_rng([seed, 5])
    records = {name: _draw_records(name, codes, motifs, genes, rng) for name, codes in chromosomes.items()}
    people = _people(cohort, rng)
    calls = {name: _calls(people, cohort, found, rng) for name, found in records.items()}
    _write_vcf(folder / "cohort.vcf", people, chromosomes, records, calls)
    people[["donor", "population", "family", "sex"]].to_csv(folder / "donors.tsv", sep="\t", index=False)
    genome = Genome.open(folder / "genome.fa")
    genotypes = read_genotypes(folder / "cohort.vcf", genome)
    found = [_of_gene(gene, genome, genotypes, condition) for gene in genes.itertuples()]
    effects = pd.concat([one.effects for one in found], ignore_index=True)
    for name in cohort.populations:
        here = np.flatnonzero(people["population"] == name)
        effects[name] = genotypes.alleles(effects["row"].to_numpy())[:, :, here].mean((1, 2))
    values = np.stack([getattr(one, cohort.truth) for one in found])
    expression, about = _expressed(values, np.array([one.base for one in found]), rng)
    names = genes["gene_id"].to_numpy(str)
    donors = people["donor"].tolist()
    tables = {
        "donor_variants": effects.drop(columns="row"),
        "donor_values": pd.DataFrame(values, index=names, columns=donors).rename_axis("gene").reset_index(),
        "donor_genes": about.assign(gene=names)[["gene", "heritability", "ceiling"]],
    }
    for name, table in tables.items():
        table.to_parquet(folder / "truth" / f"{name}.parquet")
    matrix = pd.DataFrame(expression.round(5), index=names, columns=donors)
    matrix.rename_axis("gene").to_csv(folder / "expression.tsv", sep="\t")
    starts = {"gene": names, "chrom": genes["chrom"], "tss": genes["tss"] + 1, "strand": genes["strand"]}
    pd.DataFrame(starts).to_csv(folder / "genes.tsv", sep="\t", index=False)
    return {"expression": float(about.loc[about["heritability"] > 0, "ceiling"].mean())}


# ---- variants ----


@dataclass(frozen=True)
class _Record:
    """A line of the VCF: 0-based position, its alleles, and the ancestral frequency of each alternative one."""

    position: int
    ref: str
    alts: tuple[str, ...]
    frequencies: tuple[float, ...]


def _draw_records(
    chrom: str, codes: Codes, motifs: pd.DataFrame, genes: pd.DataFrame, rng: np.random.Generator
) -> list[_Record]:
    """Substitutions in regulators' sites near genes, then variants anywhere, no two within ``spacing`` bp."""
    rules = cohort_difficulty()[0]
    free = np.ones(len(codes), dtype=np.bool_)
    free[: rules["spacing"]] = free[-rules["spacing"] :] = False
    found = []
    for position, alt, kind in _candidates(chrom, codes, motifs, genes, rng):
        if not free[position]:
            continue
        free[max(0, position - rules["spacing"]) : position + rules["spacing"]] = False
        low, high = rules["frequency"][kind]
        frequency = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        size = 1 + int(rng.integers(rules["longest_indel"]))
        here, what = codes[position : position + 1 + size], rng.random()
        ref, alts, frequencies = decode(here[:1]), [alt], [frequency]
        if kind == "other" and what < rules["indel"] / 2:
            alts = [ref + decode(rng.integers(0, 4, size).astype(np.uint8))]
        elif kind == "other" and what < rules["indel"]:
            ref, alts = decode(here), [ref]
        if len(ref) == len(alts[0]) == 1 and rng.random() < rules["second_allele"]:
            third = [base for base in "ACGT" if base not in (ref, alt)]
            alts, frequencies = [alt, third[int(rng.integers(2))]], [frequency, frequency / 2]
        found.append(_Record(position, ref, tuple(alts), tuple(frequencies)))
    return sorted(found, key=lambda record: record.position)


def _candidates(
    chrom: str, codes: Codes, motifs: pd.DataFrame, genes: pd.DataFrame, rng: np.random.Generator
) -> Iterator[tuple[int, str, str]]:
    """Position, alternative base and kind."""
    rules, known = cohort_difficulty()[0], {motif.name: motif for motif in grammar().motifs}
    sites = motifs[(motifs["chrom"] == chrom) & (motifs["role"] == "regulator") & (motifs["occupancy"] > 0.3)]
    for tss in genes.loc[genes["chrom"] == chrom, "tss"]:
        near = sites[(sites["start"] > tss - grammar().rules.reach) & (sites["end"] < tss + grammar().rules.reach)]
        for row in rng.permutation(len(near))[: rules["acting"]]:
            site = near.iloc[int(row)]
            costs = known[site["motif"]].penalties(grammar().rules)[:, :4]
            costs = costs if site["strand"] == "+" else costs[::-1, ::-1]
            here = codes[site["start"] : site["end"]]
            change = np.abs(costs - costs[np.arange(len(here)), here][:, None])
            column, base = (int(each) for each in rng.permutation(np.argwhere(change > 0))[0])
            yield int(site["start"]) + column, "ACGT"[base], "acting"
    for position in rng.integers(0, len(codes), rng.poisson(rules["density"] * len(codes))):
        others = [base for base in "ACGT" if base != "ACGT"[codes[position]]]
        yield int(position), others[int(rng.integers(3))], "other"


# ---- donors ----


def _people(cohort: Cohort, rng: np.random.Generator) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for number, members in enumerate(np.array_split(np.arange(cohort.donors), len(cohort.populations))):
        left = len(members)
        while left:
            children = min(left, 2 if rng.random() < cohort_difficulty()[0]["siblings"] / 2 else 1)
            family = f"family{len(rows) + 1:04d}"
            for _ in range(children):
                sex = "female" if rng.random() < 0.5 else "male"
                about = {"population": cohort.populations[number], "family": family, "sex": sex}
                rows.append({"donor": f"donor{len(rows) + 1:04d}", **about})
            left -= children
    return pd.DataFrame(rows)


def _calls(people: pd.DataFrame, cohort: Cohort, records: Sequence[_Record], rng: np.random.Generator) -> Alleles:
    """Allele numbers ``(donors, 2, records)`` of one chromosome."""
    rules = cohort_difficulty()[0]
    place = np.array([record.position for record in records])
    ancestral = np.zeros((len(records), 2))
    for row, record in zip(ancestral, records, strict=True):
        row[: len(record.frequencies)] = record.frequencies
    spread = (1 - rules["differentiation"]) / rules["differentiation"]
    out = np.empty((len(people), 2, len(records)), dtype=np.uint8)
    for name in cohort.populations:
        frequency = np.where(ancestral > 0, rng.beta(np.maximum(ancestral, 1e-9) * spread, (1 - ancestral) * spread), 0)
        lot = rng.random((rules["founders"], len(records)))
        first, second = frequency[:, 0], frequency.sum(1)
        founders = np.where(lot < first, 1, np.where(lot < second, 2, 0)).astype(np.uint8)
        for _, family in people[people["population"] == name].groupby("family", sort=False):
            parents = [_mosaic(founders, place, rules["segment"], rng) for _ in range(4)]
            for donor in family.index:
                for slot in range(2):
                    pair = np.stack(parents[2 * slot : 2 * slot + 2])
                    out[donor, slot] = _mosaic(pair, place, rules["sibling_segment"], rng)
    return out


def _mosaic(sources: Alleles, place: npt.NDArray[np.int64], segment: float, rng: np.random.Generator) -> Alleles:
    """A haplotype ``(records,)`` of segments of random sources ``(sources, records)``, of mean length ``segment``."""
    new = rng.random(len(place)) < 1 - np.exp(-np.diff(place, prepend=place[:1]) / segment)
    part = np.cumsum(new)
    return np.asarray(sources[rng.integers(len(sources), size=len(place) + 1)[part], np.arange(len(place))])


def _write_vcf(
    path: Path,
    people: pd.DataFrame,
    chromosomes: Mapping[str, Codes],
    records: Mapping[str, list[_Record]],
    calls: Mapping[str, Alleles],
) -> None:
    with path.open("w") as file:
        file.write("##fileformat=VCFv4.2\n")
        file.writelines(f"##contig=<ID={name},length={len(codes)}>\n" for name, codes in chromosomes.items())
        file.write('##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">\n')
        names = "\t".join(people["donor"])
        file.write(f"#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t{names}\n")
        for name, found in records.items():
            for number, record in enumerate(found):
                pairs = "\t".join(f"{one}|{other}" for one, other in calls[name][:, :, number])
                alts = ",".join(record.alts)
                file.write(f"{name}\t{record.position + 1}\t.\t{record.ref}\t{alts}\t.\tPASS\t.\tGT\t{pairs}\n")


# ---- expression ----


def drive(codes: Codes, condition: str, strand: str) -> Floats:
    """What windows ``(batch, length)`` around a gene's start drive of it, ``(batch,)``: log2 of a count; see above."""
    rules, middle = cohort_difficulty()[0], codes.shape[1] // 2
    if strand == "+":
        side, first = 0, middle
    else:
        side, first = 1, middle - rules["read"] + 1
    count = expected(codes, [condition])[:, side, first : first + rules["read"]].sum(1)
    return np.asarray(np.log2(count + rules["pseudocount"]))


@dataclass(frozen=True)
class _Gene:
    """What is true of a gene: its variants, what the reference drives, and genetic values ``(donors,)``."""

    effects: pd.DataFrame
    base: float
    additive: Floats
    interacting: Floats


def _of_gene(gene: Any, genome: Genome, genotypes: Genotypes, condition: str) -> _Gene:
    """``gene``: chrom, tss (0-based), strand and gene_id."""
    chrom, tss, window = str(gene.chrom), int(gene.tss), cohort_difficulty()[0]["window"]
    dosage, rows = genotypes.dosage(Interval(chrom, tss - window // 2, tss + window // 2))
    alone = Haplotypes(genome, genotypes.singly(chrom, rows))
    pairs = np.stack([np.arange(len(rows) + 1), np.zeros(len(rows) + 1, dtype=np.int64)], axis=1)
    single = drive(alone.codes(chrom, tss, window, pairs), condition, gene.strand)
    variants = [genotypes.variant(row, genome) for row in rows]
    effects = pd.DataFrame(
        {
            "gene": gene.gene_id,
            "chrom": chrom,
            "position": [variant.position for variant in variants],
            "ref": [variant.ref for variant in variants],
            "alt": [variant.alt for variant in variants],
            "effect": single[:-1] - single[-1],
            "row": rows,
        }
    )
    codes, index = Haplotypes(genome, genotypes).distinct(chrom, tss, window)
    driven = drive(codes, condition, gene.strand)[index] - single[-1]
    together = _together(genotypes.alleles(rows), effects["effect"].to_numpy(), float(driven.std()))
    additive = dosage @ effects["effect"].to_numpy() / index.shape[1]
    return _Gene(effects, float(single[-1]), additive, (driven + together).mean(1))


def _together(alleles: npt.NDArray[np.bool_], effects: Floats, spread: float) -> Floats:
    """What the pairs of alleles ``(variants, slots, donors)`` of a haplotype do together, ``(donors, slots)``."""
    rules = cohort_difficulty()[0]
    felt = np.abs(effects) >= rules["felt"]
    each = (alleles[felt] - alleles[felt].mean((1, 2), keepdims=True)) * effects[felt, None, None]
    pairs = (each.sum(0) ** 2 - (each**2).sum(0)).T / 2
    size = float(pairs.std())
    return np.asarray(pairs * (rules["interaction"] * spread / size if size > 0 else 0.0))


def _expressed(values: Floats, base: Floats, rng: np.random.Generator) -> tuple[Floats, pd.DataFrame]:
    """Expression ``(genes, donors)``, and heritability and ceiling of every gene."""
    rules = cohort_difficulty()[0]
    h2 = rng.uniform(rules["heritability"][0], rules["heritability"][1], len(values))
    spread = values.std(1)
    heritable = spread >= rules["least"]
    h2 = np.where(heritable, h2, 0.0)
    noise = np.where(heritable, spread * np.sqrt(1 / np.where(heritable, h2, 1.0) - 1), rules["noise"])
    expression = base[:, None] + values + noise[:, None] * rng.standard_normal(values.shape)
    pairs = zip(values, expression, heritable, strict=True)
    ceiling = [np.corrcoef(value, noisy)[0, 1] if told else 0.0 for value, noisy, told in pairs]
    return expression, pd.DataFrame({"heritability": h2, "ceiling": ceiling})
