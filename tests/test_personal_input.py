"""What can be wrong with files of donors: every message has its four parts, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from seqgraft.data import prepare_source
from seqgraft.data.folds import Folds
from seqgraft.data.personal import DonorTable, Expression, GeneTable
from seqgraft.errors import SeqgraftError
from test_personal import source_of, write_cohort

Files = dict[str, Path]


@dataclass(frozen=True)
class Case:
    """What is done to the files, further settings, and what the message must have."""

    change: Callable[[Files], None]
    where: str
    value: str
    remedy: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def record(number: int, column: int, text: str) -> Callable[[Files], None]:
    """Another text in a column (from 0) of a record (from 1) of the VCF; donors begin at column 9."""

    def change(files: Files) -> None:
        lines = files["c.vcf"].read_text().splitlines()
        first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        fields = lines[first + number - 1].split("\t")
        fields[column] = text
        lines[first + number - 1] = "\t".join(fields)
        files["c.vcf"].write_text("\n".join(lines) + "\n")

    return change


def in_header(before: str, after: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        text = files["c.vcf"].read_text()
        files["c.vcf"].write_text(text.replace(f"\t{before}\t", f"\t{after}\t", 1))

    return change


def table(name: str, edit: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        edit(pd.read_csv(files[name], sep="\t", dtype=str)).to_csv(files[name], sep="\t", index=False, na_rep="NA")

    return change


def cell(name: str, row: int, column: str, text: str) -> Callable[[Files], None]:
    """Another text in a row (from 1) of a table."""

    def edit(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[row - 1, column] = text
        return frame

    return table(name, edit)


def as_bed(start: str) -> Callable[[Files], None]:
    """Expression becomes a phenotype BED in which the third gene starts at a text."""

    def change(files: Files) -> None:
        genes, values = (pd.read_csv(files[name], sep="\t", dtype=str) for name in ("genes.tsv", "e.tsv"))
        places = pd.DataFrame({"#chr": genes["chrom"], "start": genes["tss"].astype(int) - 1, "end": genes["tss"]})
        bed = places.astype(str).join(values)
        bed.loc[2, "start"] = start
        bed.to_csv(files["e.tsv"], sep="\t", index=False)

    return change


def nothing(files: Files) -> None:
    pass


def by(column: str, **more: Any) -> dict[str, Any]:
    return {"donor_folds": Folds(by="column", column=column, **more)}


BED = {"genes": GeneTable()}
CASES = {
    # the VCF
    "no phase": Case(record(2, 12, "0/1"), "c.vcf", "d03", "unphased: random"),
    "missing call": Case(record(2, 12, "./."), "c.vcf", "d03", "missing: reference or major"),
    "another REF": Case(record(1, 3, "N"), "c1:1961", "'N'", "FASTA has"),
    "an allele that is not listed": Case(record(3, 9, "0|2"), "c.vcf, c1:2061", "2", "The record has 1 ALT"),
    "no genotype": Case(record(1, 9, "AB"), "c.vcf", "'AB'", "0|1"),
    "structural variants": Case(record(1, 4, "<DEL>"), "c.vcf", "symbolic", "allow_skipped"),
    "another ploidy": Case(record(2, 9, "1"), "c.vcf", "1 at c1:2031, 2 before", "pseudo-autosomal"),
    "a truncated record": Case(record(4, 1, "x"), "c.vcf record 4", "'c1\\tx", "the second a position"),
    "a donor twice in the VCF": Case(in_header("d01", "d00"), "c.vcf", "'d00'", "one column"),
    "another donor's names": Case(
        table("e.tsv", lambda t: t.rename(columns=lambda name: name.upper())), "e.tsv", "no donor", "same names"
    ),
    "names of the VCF": Case(
        table("donors.tsv", lambda t: t.assign(vcf="x" + t["donor"])),
        "c.vcf",
        "'xd00'",
        "use its names",
        {"donors": DonorTable(Path("donors.tsv"), genotypes="vcf")},
    ),
    # genes
    "a start that is no number": Case(
        cell("genes.tsv", 3, "tss", "6e3x"), "genes.tsv row 3, column tss", "'6e3x'", "1-based"
    ),
    "a start at 0": Case(cell("genes.tsv", 3, "tss", "0"), "genes.tsv row 3, column tss", "'0'", "1-based"),
    "a strand": Case(cell("genes.tsv", 2, "strand", "minus"), "genes.tsv row 2, column strand", "'minus'", "+, - or ."),
    "a gene twice": Case(cell("genes.tsv", 2, "gene", "gene0"), "genes.tsv", "'gene0'", "Keep one"),
    "a gene off its contig": Case(cell("genes.tsv", 3, "tss", "20001"), "genes.tsv", "'c1:20001'", "same assembly"),
    "genes of other contigs": Case(
        table("genes.tsv", lambda t: t.assign(chrom="chr" + t["chrom"])), "genes.tsv", "'chrc1'", "rename"
    ),
    "no such column": Case(
        table("genes.tsv", lambda t: t.rename(columns={"tss": "start"})), "genes.tsv", "['tss']", "It has gene, chrom"
    ),
    # expression
    "expression that is no number": Case(cell("e.tsv", 2, "d05", "high"), "gene gene1, donor d05", "'high'", "NA"),
    "a gene twice in expression": Case(cell("e.tsv", 2, "gene", "gene0"), "e.tsv", "'gene0'", "Keep one"),
    "a start in the BED": Case(as_bed("x"), "e.tsv row 3, column start", "'x'", "0-based", BED),
    "a start before the contig": Case(as_bed("-5"), "e.tsv", "'c1:-4'", "same assembly", BED),
    "zeros without logarithm": Case(
        cell("e.tsv", 2, "d05", "0"), "gene gene1, donor d05", "0.0", "Raise expression.log", {}
    ),
    # donors, covariates and folds
    "a donor twice in the table": Case(cell("donors.tsv", 2, "donor", "d00"), "donors.tsv", "'d00'", "Keep one row"),
    "no such covariate": Case(nothing, "expression.covariates", "['age']", "has donor, family, population, sex", {}),
    "a covariate that is part number": Case(cell("donors.tsv", 2, "sex", "1"), "column sex", "'f'", "every donor", {}),
    "more components than donors": Case(nothing, "expression.components", "99", "at most", {}),
    "more components of genotypes": Case(nothing, "expression.genotype_components", "99", "at most", {}),
    "no such group": Case(
        nothing, "folds.group", "'famly'", "family", {"donor_folds": Folds(by="random", test=0.2, group="famly")}
    ),
    "no such column of folds": Case(nothing, "folds", "'split'", "population", by("split")),
    "a population that is no fold": Case(nothing, "column 'population'", "'one'", "names", by("population")),
}
EXPRESSION: dict[str, dict[str, Any]] = {
    "zeros without logarithm": {"log": 0.0},
    "no such covariate": {"covariates": ("age",)},
    "a covariate that is part number": {"covariates": ("sex",)},
    "more components than donors": {"components": 99},
    "more components of genotypes": {"genotype_components": 99},
    **{name: {"kind": "bed"} for name, case in CASES.items() if case.settings is BED},
}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_cohort(tmp_path_factory.mktemp("right"))


@pytest.mark.parametrize("name", CASES)
def test_messages_have_four_parts(name: str, right: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    files = {key: Path(shutil.copy(path, tmp_path)) for key, path in right.items()}
    monkeypatch.chdir(tmp_path)
    case.change(files)
    expression = Expression(files["e.tsv"], **EXPRESSION.get(name, {}))
    with pytest.raises(SeqgraftError) as caught:
        prepare_source(source_of(files, **{"expression": expression, **case.settings}), tmp_path / "out")
    message = str(caught.value)
    assert case.where in message
    assert case.value in message
    assert case.remedy in message
    assert all(error.where is not None and error.remedy for error in caught.value.parts or (caught.value,)), message
    assert not (tmp_path / "out").exists()
