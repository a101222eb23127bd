"""The page of a run in a browser: what a reader does, sees and hears, and that it is the numbers of the command."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from browser import PHONE, Visit, serious_problems, visit
from seqgraft.apply import score_run
from seqgraft.progress import steps
from seqgraft.run import open_run
from seqgraft.sequence import decode
from seqgraft.serve import Served
from test_serve import CENTRE, TRACKS, live, runs, snv, vcf_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["runs"]  # a fixture

WAIT = 60_000  # ms


@pytest.fixture(scope="module")
def lines(runs: Path) -> list[str]:
    """Two variants that can be scored."""
    genome = open_run(runs / "run").dataset.genome
    assert genome is not None
    letters = decode(np.asarray(genome.chrom_codes("chr1")))
    return [snv(letters, 300), snv(letters, 700)]


@pytest.fixture(scope="module")
def expected(runs: Path, lines: list[str]) -> pd.DataFrame:
    """What ``seqgraft variants`` writes."""
    (runs / "in.vcf").write_text(vcf_of(lines))
    score_run(runs / "run", runs / "in.vcf", runs / "out.parquet", CENTRE)
    return pd.read_parquet(runs / "out.parquet")


@pytest.fixture(scope="module")
def address(chromium: Browser, runs: Path) -> Iterator[str]:
    with live(runs / "run", CENTRE) as address:
        yield address


def paste(page: Page, text: str) -> None:
    page.get_by_label("Variants, one per line").fill(text)
    page.get_by_role("button", name="Show the effects").click()


def drawn(page: Page) -> None:
    """Waits for the signal and the logos."""
    for part in ("#signal figure", "#logo figure"):
        page.locator(part).first.wait_for(timeout=WAIT)


def numbers(page: Page) -> pd.DataFrame:
    """The table of the page, each number as it is stored."""
    heads = [text.removesuffix("\u00a0↕").strip() for text in page.locator("#table thead th").all_inner_texts()]
    rows = []
    for line in page.locator("#table tbody tr").all():
        cells = line.locator("th, td")
        rows.append([cell.get_attribute("data-sort") or cell.inner_text() for cell in cells.all()])
    return pd.DataFrame(rows, columns=heads)


def check_numbers(found: pd.DataFrame, expected: pd.DataFrame, tracks: list[str]) -> None:
    np.testing.assert_array_equal(found[tracks].astype(np.float32), expected[tracks])


def check_page(opened: Visit) -> None:
    assert opened.troubles == []
    assert serious_problems(opened.page) == []


def test_paste_three_variants_of_which_one_is_bad(
    chromium: Browser, address: str, lines: list[str], expected: pd.DataFrame
) -> None:
    with visit(chromium, address) as opened:
        page = opened.page
        paste(page, f"{lines[0]}\nchr1-400-A\n{lines[1]}")
        drawn(page)
        assert page.locator("#status").inner_text() == "Done: 2 rows, 1 problem."
        (problem,) = page.locator("#problems li").all_inner_texts()
        assert problem == "line 2: this is no variant: 'chr1-400-A'. Write chrom-pos-ref-alt, as in chr1-1000-A-G."
        found = numbers(page)
        first_six = list(TRACKS[:6])
        assert found.columns[-6:].tolist() == first_six
        check_numbers(found, expected, first_six)
        strongest = expected[list(TRACKS)].abs().to_numpy().argmax(axis=1)
        assert found["Most affected track"].tolist() == [TRACKS[i] for i in strongest]
        assert found["Most affected (atac)"].str.split(",").str[0].tolist() == expected["atac_most_affected"].tolist()
        ranked = page.locator("#ranked .who").all_inner_texts()
        order = np.argsort(-expected[list(TRACKS)].iloc[0].abs().to_numpy(np.float64))
        assert [text.split(" (")[0] for text in ranked] == [TRACKS[i] for i in order]
        assert page.locator("#logo figure").count() == 2
        check_page(opened)

        link = page.url
    with visit(chromium, link, dark=True) as again:  # the address holds the request
        drawn(again.page)
        check_numbers(numbers(again.page), expected, first_six)
        assert again.page.get_by_label("Variants, one per line").input_value().split("\n")[1] == "chr1-400-A"
        check_page(again)


def test_other_tracks_and_another_row(
    chromium: Browser, address: str, lines: list[str], expected: pd.DataFrame
) -> None:
    with visit(chromium, address) as opened:
        page = opened.page
        paste(page, "\n".join(lines))
        drawn(page)
        for name in TRACKS[2:6]:
            page.get_by_label(name, exact=True).uncheck()
        page.get_by_label(TRACKS[6]).check()
        shown = [*TRACKS[:2], TRACKS[6]]
        page.locator("#table thead th", has_text=TRACKS[6]).wait_for()
        found = numbers(page)
        assert found.columns[-3:].tolist() == shown
        check_numbers(found, expected, shown)
        page.locator(f"#signal svg[aria-label$='in {', '.join(shown)}']").wait_for(timeout=WAIT)
        page.get_by_label("Track", exact=True).select_option(label=TRACKS[1])
        page.locator(f"#logo svg[aria-label$='does to {TRACKS[1]}']").first.wait_for(timeout=WAIT)

        second = page.locator("#table tbody button").nth(1)
        second.focus()
        page.keyboard.press("Enter")
        page.locator("#detail-title", has_text=second.inner_text()).wait_for()
        assert page.evaluate("document.activeElement.id") == "detail-title"
        page.locator(f"#signal svg[aria-label^='{second.inner_text()}']").wait_for(timeout=WAIT)
        page.get_by_role("button", name=TRACKS[0]).click()
        heads = page.locator("#table thead th")
        assert heads.nth(5).get_attribute("aria-sort") == "descending"
        values = numbers(page)[TRACKS[0]].astype(float)
        assert values.is_monotonic_decreasing
        assert "row=1" in page.url
        check_page(opened)


def test_upload_a_file_and_download_the_table(
    chromium: Browser, address: str, lines: list[str], expected: pd.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / "in.vcf.gz"
    path.write_bytes(gzip.compress(vcf_of(lines).encode()))
    with visit(chromium, address, accept_downloads=True) as opened:
        page = opened.page
        page.get_by_label("a VCF file").check()
        page.get_by_label("VCF, plain or gzipped").set_input_files(path)
        page.get_by_role("button", name="Show the effects").click()
        drawn(page)
        check_numbers(numbers(page), expected, list(TRACKS[:6]))
        with page.expect_download() as waiting:
            page.get_by_role("link", name="Download the table").click()
        table = pd.read_csv(waiting.value.path(), sep="\t", dtype=dict.fromkeys(TRACKS, np.float32))
        np.testing.assert_array_equal(table[list(TRACKS)], expected[list(TRACKS)])
        assert table["id"].tolist() == ["v0", "v1"]
        assert lines[0] in page.url  # the link has the variants of the file
        check_page(opened)


def test_names_are_text(chromium: Browser, address: str, lines: list[str]) -> None:
    """Neither a line nor the name of a track can bring code along."""
    with visit(chromium, address) as opened:
        page = opened.page
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        paste(page, f"<img src=x onerror=alert(1)>\n{lines[0]}")
        drawn(page)
        assert "<img src=x onerror=alert(1)>" in page.locator("#problems li").inner_text()
        page.get_by_label(TRACKS[6]).check()
        page.locator("#signal svg[aria-label*='<script>']").wait_for(timeout=WAIT)
        assert page.locator("main img, main script").count() == 0
        assert opened.troubles == []


def test_a_region_on_a_phone(chromium: Browser, address: str) -> None:
    with visit(chromium, address, size=PHONE) as opened:
        page = opened.page
        page.get_by_label("a region").check()
        page.get_by_label("Region", exact=True).fill("chr1:1,001-1,050")
        page.get_by_role("button", name="Show the region").click()
        drawn(page)
        assert page.locator("#detail-title").inner_text().startswith("chr1:1,001-1,050: most predicted signal in ")
        assert page.locator("#ranked li").count() == len(TRACKS)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        check_page(opened)


def test_waiting_and_cancelling(
    chromium: Browser, address: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def slow(served: Served, asked: Any, choice: Any) -> Any:
        for _ in steps(range(2000)):
            if go.wait(0.01):
                raise AssertionError("it was to be cancelled")

    monkeypatch.setattr(Served, "scores", slow)
    with visit(chromium, address) as opened, visit(chromium, address) as other:
        for each, text in ((opened, lines[0]), (other, lines[1])):
            paste(each.page, f"{text}\n# slow")
        opened.page.locator("#status", has_text="Computing").wait_for()
        other.page.locator("#status", has_text="Waiting: 1 request comes first.").wait_for()
        assert opened.page.locator("#progress").is_visible()
        opened.page.get_by_role("button", name="Cancel").click()
        opened.page.locator("#status", has_text="Cancelled.").wait_for()
        other.page.locator("#status", has_text="Computing").wait_for()
        other.page.get_by_role("button", name="Cancel").click()
        other.page.locator("#status", has_text="Cancelled.").wait_for()
        assert opened.page.get_by_role("button", name="Show the effects").is_enabled()
        assert opened.troubles == other.troubles == []
    go.set()
