"""The page of a run without a browser: what it is asked, the queue, the numbers, and who may ask."""

from __future__ import annotations

import gzip
import io
import json
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import uvicorn
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from builders import BLOCKS, SETTINGS, tiny_coverage
from seqgraft.apply import calibrate_run, predict_run
from seqgraft.cell_plots import VariantPanel, variant_panel
from seqgraft.cli import app as cli
from seqgraft.data.dataset import DatasetInfo, write_dataset
from seqgraft.errors import ConfigError, DataError, RunError
from seqgraft.experiment import parse_experiment
from seqgraft.genome import Genome, Interval
from seqgraft.progress import listening, progress, steps
from seqgraft.run import Run, fit_run, open_run
from seqgraft.sequence import decode
from seqgraft.serve import Served, serve_run
from seqgraft.serve.app import ANY_ADDRESS, make_app
from seqgraft.serve.asked import REMEDIES, Choice, Limits, plain_text, read_region, read_variants
from seqgraft.serve.jobs import BusyError, Job, Queue, Rate
from seqgraft.tracks import TrackTable
from seqgraft.variants import VariantConfig
from seqgraft.variants.alleles import REASONS, AlleleCheck
from seqgraft.variants.over import Centre, Genes, Window
from seqgraft.variants.scorers import Log2FoldChange
from test_readme import ROOT, blocks

GUIDE = ROOT / "docs" / "guides" / "serve.md"
TRACKS = ("B_atac", "T_atac", "B_rna+", "B_rna-", "T_rna+", "T_rna-", "<script>alert(1)</script>")
GROUPS = ("atac", "atac", "rna", "rna", "rna", "rna", "other")
CENTRE = VariantConfig(over=Centre(48))
ASKED = "over=centre&width=48"
LIMITS = Limits(variants=50, body=20_000, text=60_000, waiting=3, rate=10_000)


def fit_small(folder: Path, data: Path, **more: Any) -> Path:
    """A run of a small network; ``more`` are sections of its experiment."""
    content: dict[str, Any] = {"data": str(data), "model": {"name": "convnet", "settings": SETTINGS}}
    content |= {"train": {"epochs": 1, "batch_size": 4}, "adapter": {"kind": "full", "statistics": "batch"}}
    fit_run(parse_experiment(content | more), folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two cell types, two marks and a track that is of no cell type and has a wicked name."""
    root = tmp_path_factory.mktemp("served")
    dataset = tiny_coverage(root / "data", regions=12, tracks=TRACKS, groups=GROUPS)
    frame = dataset.tracks.to_frame().assign(condition=[*"BTBBTT", ""])
    frame.to_parquet(dataset.folder / "tracks.parquet")
    fit_small(root / "run", dataset.folder)
    fit_small(root / "other", dataset.folder, train={"epochs": 1, "batch_size": 4, "seed": 5})
    return root


@pytest.fixture(scope="module")
def run(runs: Path) -> Run:
    return open_run(runs / "run")


@pytest.fixture(scope="module")
def letters(run: Run) -> str:
    assert run.dataset.genome is not None
    return decode(np.asarray(run.dataset.genome.chrom_codes("chr1")))


@pytest.fixture(scope="module")
def served(run: Run) -> Served:
    return Served(run, config=CENTRE)


@pytest.fixture
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(make_app(served, LIMITS), base_url="http://127.0.0.1:8000") as client:
        yield client


@contextmanager
def live(folder: Path, config: VariantConfig | None = None) -> Iterator[str]:
    """The page of a run as the command offers it, until the end of the block; gives its address."""
    servers: list[uvicorn.Server] = []
    told: list[str] = []
    started = uvicorn.Server.run

    def run(server: uvicorn.Server, sockets: Any) -> None:
        servers.append(server)
        started(server, sockets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", run)
        options = {"port": 0, "tell": told.append}
        thread = threading.Thread(target=serve_run, args=(folder, config), kwargs=options, daemon=True)
        thread.start()
        until = time.monotonic() + 120
        while not (servers and servers[0].started):
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.02)
    found = re.search(r"http://[\d.:]+", told[-1])
    assert found is not None
    try:
        yield found[0]
    finally:
        servers[0].should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def snv(letters: str, position: int) -> str:
    """chrom-pos-ref-alt of a transition."""
    ref = letters[position - 1]
    return f"chr1-{position}-{ref}-{ {'A': 'G', 'G': 'A', 'C': 'T', 'T': 'C'}[ref] }".replace(" ", "")


def vcf_of(lines: list[str]) -> str:
    """A VCF of variants as ``snv`` writes them."""
    rows = ["{}\t{}\tv{number}\t{}\t{}\t.\t.\t.".format(*line.split("-"), number=i) for i, line in enumerate(lines)]
    head = ["##fileformat=VCFv4.2", "##contig=<ID=chr1>", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    return "\n".join([*head, *rows]) + "\n"


def ask(client: TestClient, body: str | bytes, query: str = ASKED) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the request is answered, and the state of its job once it has ended."""
    answer = client.post(f"/jobs?{query}", content=body)
    assert answer.status_code == 202, answer.text
    return answer.json(), ended(client, answer.json()["id"])


def ended(client: TestClient, number: str) -> dict[str, Any]:
    until = time.monotonic() + 120
    while (state := client.get(f"/jobs/{number}").json())["state"] in ("waiting", "running"):
        assert time.monotonic() < until
        time.sleep(0.02)
    return state


def test_three_pasted_one_bad(client: TestClient, letters: str) -> None:
    lines = [snv(letters, 300), "chr1-400-A-", snv(letters, 500).replace("-", ":", 2)]
    made, state = ask(client, "\n".join(lines))
    (problem,) = made["problems"]
    assert problem == {"line": 2, "value": "chr1-400-A-", "text": problem["text"]}
    assert problem["text"] == (
        "line 2: this is no variant: 'chr1-400-A-'. Write chrom-pos-ref-alt, as in chr1-1000-A-G."
    )
    assert (state["state"], state["rows"], state["problems"]) == ("done", 2, [problem])
    rows = client.get(f"/jobs/{made['id']}/table?column=0").json()["rows"]
    assert [row["position"] for row in rows] == [300, 500]


@pytest.mark.parametrize(
    ("query", "settings", "replicates"),
    [
        ("over=centre&width=48", ["over.kind=centre", "over.width=48"], False),
        (
            "over=window&scorers=difference&scorers=D2&reverse_complement=true&merge_strands=true&stitch=true",
            [
                "over=window",
                "scorers=[difference,D2]",
                "ensemble.reverse_complement=true",
                "merge_strands=true",
                "stitch=true",
            ],
            False,
        ),
        ("over=centre&width=48", ["over.kind=centre", "over.width=48"], True),
    ],
)
def test_numbers_are_those_of_the_command(
    query: str, settings: list[str], replicates: bool, runs: Path, letters: str, tmp_path: Path
) -> None:
    """To the last digit stored, as a table, as JSON and as the TSV; more variants than are computed in one batch."""
    lines = [snv(letters, position) for position in range(1900, 200, -90)]
    lines += [
        f"chr1-{700}-{letters[699]}-{letters[699]}ACGTACGTACGTACGTACG",
        f"chr1-900-{letters[899:905]}-{letters[899]}",
    ]
    (tmp_path / "in.vcf").write_text(vcf_of(lines))
    command = ["variants", str(runs / "run"), str(tmp_path / "in.vcf"), str(tmp_path / "out.parquet")]
    command += [part for setting in settings for part in ("--set", setting)]
    others = [runs / "other"] if replicates else []
    command += [part for other in others for part in ("--replicate", str(other))]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    expected = pd.read_parquet(tmp_path / "out.parquet")

    served = Served(open_run(runs / "run"), [open_run(other) for other in others])
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        made, state = ask(client, gzip.compress(vcf_of(lines).encode()), query)
        assert state["state"] == "done", state
        names = [column["name"] for column in state["columns"]]
        chosen = "&".join(f"column={number}" for number in range(len(names)))
        rows = client.get(f"/jobs/{made['id']}/table?{chosen}").json()["rows"]
        text = client.get(f"/jobs/{made['id']}/table.tsv").text
    assert names == list(expected.columns[6 : 6 + len(names)])
    found = np.array([row["values"] for row in rows], dtype=np.float32)
    np.testing.assert_array_equal(found, expected[names].to_numpy())
    numbers = {name: kind for name, kind in expected.dtypes.items() if kind == np.float32}
    table = pd.read_csv(io.StringIO(text), sep="\t", dtype=numbers)
    pd.testing.assert_frame_equal(table, expected, check_exact=True, check_dtype=False)
    strongest = expected[names].abs().to_numpy().argmax(axis=1)
    assert [row["top"]["name"] for row in rows] == [names[i] for i in strongest]
    assert [[mark["name"] for mark in row["marks"]] for row in rows] == expected[
        ["atac_most_affected", "rna_most_affected"]
    ].to_numpy().tolist()


def test_the_most_affected_come_first(client: TestClient, letters: str) -> None:
    made, _ = ask(client, snv(letters, 700))
    (row,) = client.get(f"/jobs/{made['id']}/table?" + "&".join(f"column={i}" for i in range(7))).json()["rows"]
    found = client.get(f"/jobs/{made['id']}/ranked?row=0").json()
    assert [entry["name"] for entry in found["ranked"]] == [TRACKS[i] for i in np.argsort(-np.abs(row["values"]))]
    assert found["ranked"][0]["value"] == row["top"]["value"] == max(row["values"], key=abs)
    assert row["top"]["name"] in found["title"]
    assert client.get(f"/jobs/{made['id']}/ranked?row=1").status_code == 404


def test_signal_and_logos_of_both_alleles(run: Run, letters: str) -> None:
    """The logo's change at the variant is the score, forwards for the reference and backwards for the alternate."""
    config = VariantConfig(over=Window(), scorers=(Log2FoldChange(1.0),))
    served = Served(run, config=config)
    text = f"{snv(letters, 800)}\nchr1-900-{letters[899]}-{letters[899]}AC"
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        made, _ = ask(client, text, "")
        rows = client.get(f"/jobs/{made['id']}/table?" + "&".join(f"column={i}" for i in range(7))).json()["rows"]
        look = client.post(f"/jobs/{made['id']}/looks?what=logo&row=0").json()["id"]
        assert ended(client, look)["state"] == "done"
        logo = client.app.state.queue.get(look).result  # type: ignore[attr-defined]
        at = logo.marked[0][0]
        ref, alt = (logo.found.codes[row, at] for row in (0, 1))
        assert "ACGT"[ref] == letters[799]
        assert logo.found.regions["start"].tolist() == [799 - at] * 2
        effect = logo.found.hypothetical[:, :, alt, at] - logo.found.hypothetical[:, :, ref, at]
        expected = np.array(rows[0]["values"]) * np.log(2)
        np.testing.assert_allclose(effect[0], expected, rtol=1e-3, atol=2e-5)
        np.testing.assert_allclose(effect[1], expected, rtol=1e-3, atol=2e-5)
        first, second = client.get(f"/jobs/{look}/figures?column=2").json()["figures"]
        assert "B_rna+" in first
        assert 'aria-label="alternate: what each base does to B_rna+"' in second

        look = client.post(f"/jobs/{made['id']}/looks?what=signal&row=0").json()["id"]
        assert ended(client, look)["state"] == "done"
        signal = client.app.state.queue.get(look).result  # type: ignore[attr-defined]
        sums = signal.reference.sum(1), signal.alternate.sum(1)  # the window has fewer bins than are shown
        np.testing.assert_allclose(np.log2((sums[1] + 1) / (sums[0] + 1)), rows[0]["values"], rtol=1e-4, atol=1e-6)
        (figure,) = client.get(f"/jobs/{look}/figures?column=6&column=0").json()["figures"]
        assert "<script" not in figure
        assert "&lt;script&gt;" in figure

        indel = client.post(f"/jobs/{made['id']}/looks?what=logo&row=1").json()["id"]
        ended(client, indel)
        logo = client.app.state.queue.get(indel).result  # type: ignore[attr-defined]
        assert logo.found.regions["chrom"].tolist() == ["chr1", ""]  # bases have moved
        assert [end - start for start, end in logo.marked] == [1, 3]
        assert decode(logo.found.codes[1, logo.marked[1][0] :])[:3] == f"{letters[899]}AC"


def test_a_region_is_predicted_as_by_the_command(
    served: Served, client: TestClient, runs: Path, tmp_path: Path
) -> None:
    made, state = ask(client, "", "region=chr1:1,001-1,100")
    assert state["state"] == "done"
    (tmp_path / "r.bed").write_text("chr1\t1000\t1100\n")
    predict_run(runs / "run", tmp_path / "r.bed", tmp_path / "r.parquet")
    table = pd.read_parquet(tmp_path / "r.parquet")
    inside = table[(table["start"] < 1100) & (table["end"] > 1000)]
    expected = inside.groupby("track")["value"].sum()
    signal = served.region(Interval("chr1", 1000, 1100), Choice())
    assert signal.reference.base is None  # what is kept is what is counted
    ranked = client.get(f"/jobs/{made['id']}/ranked").json()
    assert {entry["name"]: entry["value"] for entry in ranked["ranked"]} == pytest.approx(expected.to_dict(), rel=1e-6)
    assert ranked["title"] == f"chr1:1,001-1,100: most predicted signal in {expected.idxmax()}"
    (figure,) = client.get(f"/jobs/{made['id']}/figures?column=0").json()["figures"]
    assert "predicted" in figure
    look = client.post(f"/jobs/{made['id']}/looks?what=logo&column=1").json()["id"]
    assert ended(client, look)["state"] == "done"
    (figure,) = client.get(f"/jobs/{look}/figures?column=1").json()["figures"]
    assert "by mutagenesis" in figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seqgraft.serve.served.MUTAGENESIS", 90)
        look = client.post(f"/jobs/{made['id']}/looks?what=logo&column=3").json()["id"]
        assert ended(client, look)["state"] == "done"
    assert "by gradient" in client.get(f"/jobs/{look}/figures?column=3").json()["figures"][0]
    assert "of another track" in client.get(f"/jobs/{look}/figures?column=2").json()["message"]


def test_the_figure_of_a_region() -> None:
    """One series, its region shaded, and names that fit beside it."""
    names = ["atac", "rna_activated_plus", "x" * 40]
    panel = VariantPanel("title", "chr1", 0, 16, (16, 48), names, [""], np.ones((3, 1, 1, 8)), None)
    figure = variant_panel(panel)
    texts = [text.get_text() for text in figure.texts]
    assert texts[1:4] == ["atac", "rna_activated_\nplus", f"{'x' * 16}\n{'x' * 7}…{'x' * 8}"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["predicted", "region"]
    assert all(axes.patches[-1].get_x() == 0.016 for axes in figure.axes)


def test_genes_names_and_percentiles(runs: Path, letters: str, tmp_path: Path) -> None:
    """What only the server is started with: genes to read over, other names of chromosomes; and calibrations."""
    exon = 'chr1\tx\texon\t{}\t{}\t.\t+\t.\tgene_id "{}"; transcript_id "t";\n'
    (tmp_path / "genes.gtf").write_text(exon.format(651, 700, "first") + exon.format(671, 760, "second"))
    run = open_run(runs / "run")
    over = Genes(tmp_path / "genes.gtf")
    with TestClient(make_app(Served(run, config=VariantConfig(over=over))), base_url="http://127.0.0.1") as client:
        assert client.get("/about").json()["overs"] == ["centre", "genes", "window"]
        made, state = ask(client, f"{snv(letters, 690)}\n{snv(letters, 2000)}", "")
        assert (state["over"], state["rows"]) == (["gene"], 2)
        assert state["notes"][0] == ("Variants without a row, because they lie in the window of no gene or region: 1.")
        rows = client.get(f"/jobs/{made['id']}/table?column=2&column=3").json()["rows"]
        assert [row["over"] for row in rows] == [["first"], ["second"]]
        assert [row["values"][1] for row in rows] == [None, None]  # a track of the other strand

    config = VariantConfig(over=Centre(32), rename={"1": "chr1"})
    (tmp_path / "background.vcf").write_text(vcf_of([snv(letters, position) for position in range(300, 1900, 15)]))
    calibrate_run(runs / "run", tmp_path / "background.vcf", config)
    with TestClient(make_app(Served(run, config=config)), base_url="http://127.0.0.1") as client:
        made, state = ask(client, snv(letters, 690).removeprefix("chr"), "")
        assert state["state"] == "done", state
        (row,) = client.get(f"/jobs/{made['id']}/table").json()["rows"]
        assert row["chrom"] == "1"
        ranked = client.get(f"/jobs/{made['id']}/ranked").json()["ranked"]
        assert all(0 <= entry["percentile"] <= 100 for entry in ranked)
        look = client.post(f"/jobs/{made['id']}/looks?what=signal").json()["id"]
        assert ended(client, look)["state"] == "done"
        _, state = ask(client, "", "region=1:901-950")
        assert state["state"] == "done"


# ---- what is asked ----


@pytest.fixture(scope="module")
def check(served: Served) -> AlleleCheck:
    return served.check


def test_ways_to_write_a_variant(check: AlleleCheck, letters: str) -> None:
    ref = letters[299]
    alt, other = [base for base in "ACGT" if base != ref][:2]
    ways = [
        f"chr1-300-{ref}-{alt}",
        f"chr1-0,300-{ref}-{alt}",
        f"chr1:300:{ref}>{alt}",
        f"chr1:300{ref}>{alt}",
        f"chr1:300:{ref}:{alt}",
        f"chr1_300_{ref}/{alt}",
        f"  chr1 300 {ref} {alt} ",
        f"chr1 300 rs7 {ref} {alt}",
        f"chr1\t300\trs7\t{ref.lower()}\t{alt}\t.\t.\tX=1\tGT\t0|1",
    ]
    for way in ways:
        found = read_variants(f"# a comment\r\n\r\n{way}\r\n", check, LIMITS)
        assert not found.problems
        (variant,) = found.variants
        assert str(check.named(variant)) == f"chr1:300:{ref}>{alt}", way
    both = read_variants(f"chr1\t300\t.\t{ref}\t{alt},{other},{alt}", check, LIMITS)
    assert [variant.alt for variant in both.variants] == [alt, other]
    assert [problem.text for problem in both.problems] == [
        f"line 1: it stands in the file before: 'chr1:300:{ref}>{alt}'. It has a row already."
    ]


def test_what_cannot_be_scored_says_why(check: AlleleCheck, letters: str) -> None:
    """Every reason that a variant can have has a remedy, and a line that is none says how to write one."""
    assert set(REMEDIES) == set(REASONS) - {""}
    ref = letters[299]
    alt = "A" if ref != "A" else "C"
    wrong = {
        "8-300-A-C": "line 1: the chromosome is not in the FASTA: '8:300:A>C'. The genome has chr1.",
        f"1-300-{ref}-{alt}": f"not in the FASTA: '1:300:{ref}>{alt}'. The genome names it 'chr1'.",
        f"chr1-300-{alt}-T": f"REF does not match the FASTA: 'chr1:300:{alt}>T'. The FASTA has '{ref}' there: check",
        f"chr1-300-{alt}-{ref}": f"Write '{ref}' as the reference; the sign of the effect depends on it.",
        f"chr1-99999-{ref}-{alt}": f"its chromosome: 'chr1:99999:{ref}>{alt}'. chr1 has {len(letters):,} bases",
        f"chr1-0-{ref}-{alt}": "it lies beyond the end",
        f"chr1-300-{ref}-{ref}": "REF and ALT are the same",
        f"chr1-300-{ref}-N": "an allele has letters other than A, C, G, T",
        f"chr1\t300\t.\t{ref}\t<DEL>": "Write its bases out",
        f"chr1\t300\t.\t{ref}\t.": "the record has no alternative allele",
        f"chr1\t300\t.\t{ref}\t*": "the place of another record's deletion",
        f"chr1-300-{ref}-{'A' * 200}": "Give alleles of at most 48 bases",
        "rs7412": "line 1: this is no variant: 'rs7412'. An rs number has no alleles: write chrom-pos-ref-alt.",
        "x" * 100: f"'{'x' * 59}…'",
        "<img src=x onerror=alert(1)>": "this is no variant: '<img src=x onerror=alert(1)>'",
        "y" * 30_000: "the line is too long for a variant",
    }  # fmt: skip
    for line, text in wrong.items():
        found = read_variants(line, check, LIMITS)
        assert not found.variants
        (problem,) = found.problems
        assert text in problem.text, problem.text
        assert problem.line == 1
        assert len(problem.value) <= 60


def test_limits_of_what_is_asked(check: AlleleCheck, letters: str) -> None:
    lines = [snv(letters, position) for position in range(300, 352)]
    assert len(read_variants("\n".join(lines[:50]), check, LIMITS).variants) == 50
    with pytest.raises(DataError, match=r"A request may hold 50 variants.*seqgraft variants"):
        read_variants("\n".join(lines), check, LIMITS)
    for text in ("", "\n \n", "#only a header\n"):
        with pytest.raises(DataError, match="There is no variant"):
            read_variants(text, check, LIMITS)
    other = [f"chr1-{position}-{'A' if letters[position - 1] != 'A' else 'C'}-N" for position in range(300, 320)]
    other = [line.replace("N", "G" if letters[int(line.split("-")[1]) - 1] != "G" else "T") for line in other]
    with pytest.raises(DataError, match="of another assembly"):
        read_variants("\n".join(other), check, LIMITS)


def test_uploads_are_decompressed_up_to_a_limit() -> None:
    text = "chr1-1-A-C\n" * 1000
    half = len(text) // 2
    members = gzip.compress(text[:half].encode()) + gzip.compress(text[half:].encode())  # as bgzip writes them
    assert plain_text(members, LIMITS) == plain_text(text.encode(), LIMITS) == text
    assert plain_text("\ufeffx".encode(), LIMITS) == "x"
    wrong = {
        gzip.compress(b"0" * 10_000_000): "more than 60,000 bytes once it is decompressed",
        gzip.compress(b"0" * 40_000) * 2: "more than 60,000 bytes once it is decompressed",
        members[:-20]: "truncated",
        members[:30] + b"\xff" * 40: "decompress",
        b"BCF\x02\x02": "this is a BCF file",
        gzip.compress(b"BCF\x02\x02"): "this is a BCF file",
        b"\x89PNG\r\n": "the upload is not text",
    }
    for body, message in wrong.items():
        with pytest.raises(DataError, match=f"(?i){message}"):
            plain_text(body, LIMITS)


def test_regions_are_read_as_browsers_write_them(served: Served) -> None:
    found = read_region(" one:1,001-1,100 ", served.layout, {"one": "chr1"})
    assert str(found) == "chr1:1000-1100"
    wrong = {
        "chr1": "This is no region",
        "chr1:5": "This is no region",
        "chr9:1-5": "the chromosome is not in the FASTA: 'chr9'. The genome has chr1",
        "chr1:0-5": "within 1 to",
        "chr1:9-5": "within 1 to",
        "chr1:1-999999": "within 1 to",
        "chr1:1-193": "Give at most 192 bp",
    }
    for text, message in wrong.items():
        with pytest.raises(DataError, match=message):
            read_region(text, served.layout, {})


# ---- who may ask ----


def test_only_our_own_page_may_ask(client: TestClient, letters: str) -> None:
    own, text = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}, snv(letters, 300)
    assert client.get("/about", headers={"Host": "localhost:9000"}).status_code == 200  # through a tunnel
    assert client.get("/about", headers={"Host": "[::1]:8000"}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.7", "", "["):
        answer = client.get("/", headers={"Host": host})
        assert answer.status_code == 403, host
        assert "not one that the server is known by" in answer.json()["message"]
    number = client.post("/jobs", content=text, headers=own).json()["id"]
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:9",
        "https://127.0.0.1:8000",
        "http://localhost:8000",
    ):
        for method, address in (
            ("POST", "/jobs"),
            ("POST", f"/jobs/{number}/looks?what=logo"),
            ("DELETE", f"/jobs/{number}"),
        ):
            answer = client.request(method, address, content=text, headers={"Origin": origin})
            assert answer.status_code == 403, (origin, method)
    assert client.post("/jobs", content=text, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.post("/jobs", content=text).status_code == 202  # no browser: none leaves both out


def test_every_answer_has_the_headers(client: TestClient) -> None:
    pages = {"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css", "/report.css": "text/css"}
    for address in (*pages, "/about", "/nothing", "/jobs/none"):
        answer = client.get(address)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        if address in pages:
            assert answer.headers["Content-Type"].startswith(pages[address])
    assert client.get("/", headers={"Host": "x"}).headers["X-Content-Type-Options"] == "nosniff"
    for address in ("/docs", "/redoc", "/openapi.json"):  # these load scripts from elsewhere
        assert client.get(address).status_code == 404
    assert "http" not in client.get("/page.js").text.replace("http://www.w3.org", "")


def test_any_address_in_digits(served: Served) -> None:
    with TestClient(make_app(served, hosts={ANY_ADDRESS, "lab"}), base_url="http://10.1.2.3:8000") as client:
        for host, status in {"10.1.2.3:8000": 200, "[fe80::1]:8000": 200, "lab:8000": 200, "evil.example": 403}.items():
            assert client.get("/about", headers={"Host": host}).status_code == status


def test_limits_of_requests(served: Served, letters: str) -> None:
    limits = replace(LIMITS, rate=4)
    with TestClient(make_app(served, limits), base_url="http://127.0.0.1") as client:
        answers = [
            client.post("/jobs", content="x" * 20_001),
            client.post("/jobs", content=(b"x" * 5000 for _ in range(5))),  # a length that nobody says
            client.post("/jobs?scorers=nonsense", content=snv(letters, 300)),
            client.post("/jobs?width=-4", content=snv(letters, 300)),
            client.post("/jobs", content="nonsense"),
            client.post("/jobs", content=snv(letters, 300)),
        ]
    assert [answer.status_code for answer in answers] == [422, 422, 422, 422, 422, 429]
    messages = [answer.json()["message"] for answer in answers]
    assert "a request may have 20,000 bytes" in messages[0].lower()
    assert messages[0] == messages[1]
    assert "there is no such scorer: 'nonsense'. Choose from log2_fold_change" in messages[2]
    assert messages[3].startswith("width: ")
    assert messages[4] == "None of the variants can be scored."
    assert len(answers[4].json()["problems"]) == 1
    assert "more than 4 requests in a minute" in messages[5].lower()


def test_what_is_not_there(client: TestClient, letters: str) -> None:
    assert "no longer kept" in client.get("/jobs/none").json()["message"]
    made, _ = ask(client, snv(letters, 300))
    for address in ("table?column=7", "table?column=-1", "figures", "ranked?row=-1"):
        assert client.get(f"/jobs/{made['id']}/{address}").status_code == 404, address
    assert client.post(f"/jobs/{made['id']}/looks?what=logo&row=5").status_code == 404
    assert client.get(f"/jobs/{made['id']}/table?" + "&".join(["column=0"] * 201)).status_code == 422


def test_a_setting_that_does_not_suit_is_told(client: TestClient, letters: str) -> None:
    _, state = ask(client, snv(letters, 300), "over=centre&width=501")
    assert state["state"] == "failed"
    assert "the model's bins do not reach so far: 501" in state["message"]


def test_nothing_of_a_request_is_left(client: TestClient, letters: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made: list[Path] = []
    before = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **k: made.append(Path(before(*a, **k))) or str(made[-1]))
    ask(client, snv(letters, 640))
    ask(client, snv(letters, 640), "over=centre&width=501")  # fails
    ask(client, "", "region=chr1:901-950")
    assert len(made) == 3
    assert all(folder.parent == tmp_path for folder in made)
    assert not list(tmp_path.iterdir())


# ---- the queue ----


class Bytes(bytes):
    """A result that is as large as it is long."""

    @property
    def size(self) -> int:
        return len(self)


def wait_for(job: Job[Any], *states: str) -> None:
    until = time.monotonic() + 20
    while job.state not in states:
        assert time.monotonic() < until, job
        time.sleep(0.005)


@pytest.fixture
def queue() -> Iterator[Queue[Bytes]]:
    made: Queue[Bytes] = Queue(waiting=2, kept=3, kept_bytes=100)
    yield made
    made.close()


def test_requests_wait_in_order_and_can_be_cancelled(queue: Queue[Bytes]) -> None:
    done: list[str] = []
    go = threading.Event()

    def work(name: str) -> Bytes:
        for _ in steps(range(1000)):
            if go.wait(0.005):
                break
        done.append(name)
        return Bytes(name.encode())

    first, second, third = (queue.add(name, lambda name=name: work(name)) for name in ("a", "b", "c"))
    wait_for(first, "running")
    assert [queue.before(job) for job in (first, second, third)] == [0, 1, 2]
    queue.get(second.id)  # looking does not change the order
    assert [queue.before(job) for job in (second, third)] == [1, 2]
    with pytest.raises(BusyError, match="2 requests are waiting already"):
        queue.add("d", lambda: work("d"))
    assert queue.add("b", lambda: work("again")) is second
    queue.cancel(second)
    wait_for(second, "cancelled")
    assert queue.before(third) == 1
    queue.cancel(first)
    wait_for(first, "cancelled")
    go.set()
    wait_for(third, "done")
    assert (done, third.result, third.progress) == (["c"], b"c", 1.0)
    again = queue.add("a", lambda: work("a"))  # what was cancelled is computed when it is asked for again
    assert again is not first
    wait_for(again, "done")


def test_progress_is_heard(queue: Queue[Bytes]) -> None:
    heard: list[float] = []
    go = threading.Event()

    def work() -> Bytes:
        for i in steps(range(4)):
            for _ in steps([0, 1]):
                if i == 3:
                    go.wait(10)
        return Bytes()

    job = queue.add("a", work)
    until = time.monotonic() + 10
    while job.progress < 0.75 and time.monotonic() < until:
        time.sleep(0.002)
    assert job.progress == 0.75
    go.set()
    wait_for(job, "done")
    with listening(heard.append):
        for _ in progress([0, 1], "outer"):
            for _ in steps(iter("xyz"), total=3):
                pass
            assert list(steps(iter("unknown length"))) == list("unknown length")
    assert heard == pytest.approx([0, 0, 1 / 6, 2 / 6, 0.5, 0.5, 4 / 6, 5 / 6])


def test_errors_are_told_and_the_queue_goes_on(queue: Queue[Bytes], capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> Any:
        def work() -> Bytes:
            raise error

        return work

    jobs = [
        queue.add(number, fails(error))
        for number, error in enumerate((DataError("no such thing", remedy="Try again"), KeyError("secret")))
    ]
    for job in jobs:
        wait_for(job, "failed")
    full = queue.add("full", fails(MemoryError()))
    wait_for(full, "failed")
    assert jobs[0].message == "No such thing. Try again."
    assert "bug" in jobs[1].message
    assert "secret" not in jobs[1].message
    assert "memory" in full.message
    assert "KeyError: 'secret'" in capsys.readouterr().err
    last = queue.add("b", lambda: Bytes(b"b"))
    wait_for(last, "done")


def test_results_are_kept_in_bounds(queue: Queue[Bytes]) -> None:
    def result(name: str, size: int) -> Job[Bytes]:
        job = queue.add(name, lambda: Bytes(size))
        wait_for(job, "done")
        return job

    a, b, c = (result(name, 10) for name in "abc")
    queue.get(a.id)
    d = result("d", 10)
    assert [queue.get(job.id) is not None for job in (b, a, c, d)] == [False, True, True, True]
    assert queue.add("a", Bytes) is a
    large = result("large", 85)  # of the others only that which was asked for last has room beside it
    assert [queue.get(job.id) is not None for job in (c, d, a, large)] == [False, False, True, True]
    too_large = result("too large", 200)
    assert queue.get(too_large.id) is too_large
    assert queue.get(large.id) is None


def test_clients_have_a_rate_each() -> None:
    now = [0.0]
    rate = Rate(2, clock=lambda: now[0])
    for client in ("a", "b", "a", "b"):
        rate.count(client)
    with pytest.raises(BusyError, match="2 requests in a minute"):
        rate.count("a")
    now[0] = 61
    rate.count("a")


# ---- which runs ----


def label_intervals(folder: Path, genome: Genome) -> Path:
    starts = np.arange(0, 1600, 128)
    regions = pd.DataFrame({"chrom": "chr1", "start": starts, "end": starts + 128, "strand": "+", "name": "r"})
    regions["fold"] = ["train", "train", "valid", "test"] * 3 + ["train"]
    tracks = TrackTable.build([{"name": "open", "link": "sigmoid"}, {"name": "closed", "link": "sigmoid"}])
    with write_dataset(folder, (len(starts), 2, 1)) as writer:
        writer.targets[:, 0, 0], writer.targets[:, 1, 0] = np.arange(13) % 2, np.arange(13) % 3 == 0
        recorded = {"path": str(genome.path), "hash": genome.hash}
        writer.finish(DatasetInfo("labelled", 128, 1, 128, recorded), regions, tracks)
    return folder


def test_labels_have_effects_and_logos(run: Run, letters: str, tmp_path: Path) -> None:
    assert run.dataset.genome is not None
    folder = fit_small(tmp_path / "run", label_intervals(tmp_path / "labels", run.dataset.genome))
    served = Served(open_run(folder))
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        about = client.get("/about").json()
        assert (about["signal"], about["logo"], about["overs"]) == (False, True, [])
        assert about["chosen"]["scorers"] == ["difference"]
        assert "no signal along the sequence" in about["cannot"][0]
        made, state = ask(client, snv(letters, 700), "")
        assert (state["state"], len(state["columns"])) == ("done", 2)
        (row,) = client.get(f"/jobs/{made['id']}/table?column=0&column=1").json()["rows"]
        looks = [client.post(f"/jobs/{made['id']}/looks?what={what}").json()["id"] for what in ("signal", "logo")]
        signal, logo = (ended(client, look) for look in looks)
        assert "a label has no bins to draw" in signal["message"].lower()
        assert logo["state"] == "done"
        found = client.app.state.queue.get(looks[1]).result  # type: ignore[attr-defined]
        at, codes = found.marked[0][0], found.found.codes
        change = found.found.hypothetical[0, :, codes[1, at], at] - found.found.hypothetical[0, :, codes[0, at], at]
        np.testing.assert_allclose(change, row["values"], atol=1e-6)
        made, state = ask(client, "", "region=chr1:601-700")
        assert state["state"] == "done"
        assert "open" in client.get(f"/jobs/{made['id']}/ranked").text


def test_masked_tokens_have_scores_only(run: Run, letters: str, tmp_path: Path) -> None:
    assert run.dataset.genome is not None
    data = label_intervals(tmp_path / "data", run.dataset.genome)
    more: dict[str, Any] = {"model": {"name": "language", "settings": BLOCKS | {"lm_head": True}}}
    folder = fit_small(tmp_path / "run", data, adapter={"kind": "full"}, loss={"kind": "masked_tokens"}, **more)
    served = Served(open_run(folder))
    with TestClient(make_app(served), base_url="http://127.0.0.1") as client:
        about = client.get("/about").json()
        assert (about["signal"], about["logo"], about["scorers"]) == (False, False, [])
        assert "masked tokens" in about["cannot"][0]
        made, state = ask(client, f"{snv(letters, 700)}\nchr1-701-{letters[700]}-{letters[700]}A", "")
        assert (state["state"], state["rows"]) == ("done", 1), state
        assert "single-base substitutions only" in made["problems"][0]["text"]
        assert client.get(f"/jobs/{made['id']}/table?column=0").json()["rows"][0]["values"][0] is not None
        _, state = ask(client, "", "region=chr1:601-700")
        assert "predicts no tracks" in state["message"]


def test_runs_that_cannot_be_served(run: Run, served: Served, tmp_path: Path) -> None:
    def other(**info: Any) -> Run:
        return replace(run, dataset=replace(run.dataset, info=replace(run.dataset.info, **info)))

    with pytest.raises(ConfigError, match=r"A run of donors predicts .* 'seqgraft effects'"):
        Served(other(kind="personal"))
    with pytest.raises(ConfigError, match="sequences without a window of a genome"):
        Served(replace(run, dataset=replace(run.dataset, genome=None)))
    with pytest.raises(ConfigError, match="a replicate differs"):
        Served(run, [other(bins=6)])
    (tmp_path / "experiment.yaml").write_text("data: nowhere\n")
    with pytest.raises(RunError, match="was not finished"):
        serve_run(tmp_path)


def test_files_of_the_model_that_are_gone(runs: Path, tmp_path: Path) -> None:
    """The message names what is missing, before anything is listened to."""
    content = (runs / "run" / "experiment.yaml").read_text()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "experiment.yaml").write_text(content.replace("name: convnet", f"name: {tmp_path}/gone"))
    with pytest.raises(ConfigError, match="gone"):
        serve_run(tmp_path)


# ---- the command ----


def test_the_command_listens_and_says_where(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(server: uvicorn.Server, sockets: Any) -> None:
        asked.append((server.config, sockets[0].getsockname()))

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setattr("webbrowser.open", asked.append)
    command = ["serve", str(runs / "run"), "--port", "0", "--replicate", str(runs / "other"), "--set", "over=window"]
    result = CliRunner().invoke(cli, [*command, "--open"], catch_exceptions=False)
    address, (config, (host, port)) = asked
    assert host == "127.0.0.1"
    assert address == f"http://127.0.0.1:{port}"
    assert f"is at {address} (Ctrl-C" in result.output
    assert "Whoever" not in result.output
    assert not config.proxy_headers  # or a client could be another at every request
    with TestClient(config.app, base_url=address) as client:
        about = client.get("/about").json()
        assert (about["replicates"], about["chosen"]["over"]) == (1, "window")
        assert client.get("/about", headers={"Host": "10.0.0.1"}).status_code == 403

    result = CliRunner().invoke(cli, [*command, "--host", "0.0.0.0"], catch_exceptions=False)
    assert "Whoever can reach 0.0.0.0 can use this run, without a password" in result.output
    with TestClient(asked[-1][0].app, base_url="http://10.0.0.1") as client:
        assert client.get("/about").status_code == 200
        assert client.get("/about", headers={"Host": "evil.example"}).status_code == 403


def test_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block is run, in order, in one folder; the server listens at a free port instead of 8000."""
    monkeypatch.chdir(tmp_path)
    first, command, last = [block for block in blocks(GUIDE.read_text()) if block.language]
    assert {first.marker, command.marker, last.marker} == {"run"}
    assert command.code == "seqgraft serve run --port 8000\n"
    names: dict[str, Any] = {}
    exec(compile(first.code, GUIDE.name, "exec"), names)
    with live(Path("run")) as address:
        assert 'address = "http://127.0.0.1:8000"' in last.code
        exec(compile(last.code.replace("http://127.0.0.1:8000", address), GUIDE.name, "exec"), names)
    assert names["state"]["state"] == "done"
    variants = len([line for line in Path("sim/variants.vcf").read_text().splitlines() if not line.startswith("#")])
    assert names["state"]["rows"] == variants
    assert capsys.readouterr().out.startswith(f"done {variants}\nchrom\tposition")


@pytest.mark.parametrize(("host", "at"), [("::", "::1"), ("0:0:0:0:0:0:0:1", "::1")])
def test_addresses_of_version_6(runs: Path, monkeypatch: pytest.MonkeyPatch, host: str, at: str) -> None:
    try:
        socket.create_server((at, 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    asked: list[str] = []

    def run(server: uvicorn.Server, sockets: Any) -> None:
        socket.create_connection((at, sockets[0].getsockname()[1]), timeout=5).close()
        address = asked[-1].partition(" is at ")[2].partition(" ")[0]
        with TestClient(server.config.app, base_url=address) as client:
            assert client.get("/about").status_code == 200

    monkeypatch.setattr(uvicorn.Server, "run", run)
    serve_run(runs / "run", host=host, port=0, tell=asked.append)
    assert f"http://[{at}]:" in asked[-1]
    assert ("Whoever can reach" in asked[0]) == (host == "::")


def test_a_port_that_is_taken(runs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(RunError, match="Choose another --port"):
        serve_run(runs / "run", port=taken.getsockname()[1])


@pytest.mark.parametrize("package", ["uvicorn", "fastapi"])
def test_what_is_not_installed_is_named(package: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "seqgraft.serve.app")
    with pytest.raises(ConfigError, match=rf"{package}.* pip install 'seqgraft\[serve\]'"):
        serve_run(runs / "run")


def test_numbers_of_json_are_the_shortest_that_are_the_same() -> None:
    from seqgraft.serve.answers import _number

    values = np.array([0.1, 1 / 3, -1e-30, 3e30], dtype=np.float32)
    found = json.loads(json.dumps([_number(value) for value in values]))
    assert found[0] == 0.1
    np.testing.assert_array_equal(np.array(found, dtype=np.float32), values)
    assert _number(np.float32("nan")) is None
