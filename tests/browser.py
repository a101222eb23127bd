"""Pages in headless Chromium: what they load, what they say on the console, and what axe-core finds on them.

`visit` opens a page in a context of its own and keeps what goes wrong; the fixture `chromium` (conftest.py) is the
browser.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

DESKTOP, PHONE = (1280, 900), (390, 844)

#: No name is looked up but this machine's, so that a page which asks for something elsewhere cannot get it.
ARGUMENTS = (
    "--no-sandbox",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)


def find_chromium() -> str:
    """Debian's Chromium, or what SEQGRAFT_CHROMIUM names; skips the test where there is neither, or no Playwright."""
    for module in ("playwright.sync_api", "axe_playwright_python"):
        pytest.importorskip(module, reason="Playwright is not installed: pip install 'seqgraft[browser]'")
    named = os.environ.get("SEQGRAFT_CHROMIUM")
    path = named or shutil.which("chromium")
    if path is None or not Path(path).is_file():
        where = (
            f"SEQGRAFT_CHROMIUM={named} is no file"
            if named
            else "it is not on the path and SEQGRAFT_CHROMIUM is not set"
        )
        pytest.skip(f"Chromium is not at hand: {where}.")
    return path


@contextmanager
def start_chromium() -> Iterator[Browser]:
    """A headless browser until the end of the block."""
    path = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """An open page, and what went wrong on it since it was opened."""

    page: Page
    origin: str
    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    @property
    def troubles(self) -> list[str]:
        """Console errors and warnings, script errors, and requests that left the page's origin: none on a good page."""
        return [*self.console, *self.errors, *(f"asked for {address}" for address in self.strangers)]

    def watch(self) -> None:
        """Begins to listen; before the page is opened."""

        def heard(message: Any) -> None:
            if message.type in ("error", "warning"):
                self.console.append(f"{message.type}: {message.text}")

        def asked(request: Any) -> None:
            parts = urlsplit(request.url)
            own = f"{parts.scheme}://{parts.netloc}" == self.origin
            if not own and parts.scheme not in ("file", "data", "blob", "about"):
                self.strangers.append(request.url)

        self.page.on("console", heard)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", asked)


@contextmanager
def visit(
    browser: Browser,
    address: str | Path,
    *,
    size: tuple[int, int] = DESKTOP,
    dark: bool = False,
    printed: bool = False,
    **context: Any,
) -> Iterator[Visit]:
    """Opens a file or an address in a fresh context of ``size`` (width and height in CSS pixels).

    Args:
        dark: the reader prefers dark colours.
        printed: as laid out for paper; ``size`` is the paper's.
        context: more arguments of Playwright's ``new_context``, such as ``accept_downloads``.
    """
    url = address.resolve().as_uri() if isinstance(address, Path) else address
    phone = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2} if size[0] < 600 else {}
    opened: BrowserContext = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        **{**phone, **context},
    )
    try:
        page = opened.new_page()
        if printed:
            page.emulate_media(media="print")
        parts = urlsplit(url)
        here = Visit(page, f"{parts.scheme}://{parts.netloc}")
        here.watch()
        page.goto(url, wait_until="load", timeout=60_000)
        yield here
    finally:
        opened.close()


def serious_problems(page: Page, *, also: tuple[str, ...] = ()) -> list[str]:
    """What axe-core finds of impact serious or critical (and ``also``): a line per rule and element."""
    from axe_playwright_python.base import AXE_SCRIPT

    page.evaluate(AXE_SCRIPT)  # by the debugger, so that the page's content-security policy does not stop it
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then(found => found.violations)")
    return [
        f"{rule['impact']}: {rule['id']}: {' '.join(map(str, node['target']))}: {node['failureSummary']}"
        for rule in found
        if rule["impact"] in ("serious", "critical", *also)
        for node in rule["nodes"]
    ]


#: Finds text that is cut, leaves the page, or lies on other text; gives a line for each. Text in what scrolls sideways
#: may reach beyond it. One rectangle per line of a text, shrunk by a pixel, because glyphs are smaller than lines.
_LAYOUT = r"""
() => {
  const width = document.documentElement.clientWidth, found = [], rects = [];
  if (document.documentElement.scrollWidth > width + 1)
    found.push(`the page is ${document.documentElement.scrollWidth} px wide in ${width} px`);
  const named = (node) => `${node.tagName.toLowerCase()} "${node.textContent.trim().slice(0, 50)}"`;
  const scroller = (node) => {
    for (let up = node; up; up = up.parentElement)
      if (/auto|scroll/.test(getComputedStyle(up).overflowX)) return up;
    return null;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const parent = text.parentElement;
    if (!text.data.trim() || parent.closest("script, style") || !parent.checkVisibility()) continue;
    const figure = parent.closest("svg");
    const box = (figure ?? parent.closest("td, th, dd, dt, h1, h2, h3, p, li, pre, figcaption, summary") ?? parent);
    const frame = box.getBoundingClientRect(), scrolls = scroller(parent);
    const range = document.createRange();
    range.selectNodeContents(text);
    for (const r of figure ? [parent.getBoundingClientRect()] : range.getClientRects()) {
      if (r.width < 2 || r.height < 4) continue;
      const slack = figure ? 2 : 1;
      if (!scrolls && (r.left < -1 || r.right > width + 1)) found.push(`leaves the page: ${named(parent)}`);
      else if (box.tagName !== "PRE" && (r.left < frame.left - slack || r.right > frame.right + slack))
        found.push(`cut: ${named(parent)} is wider than its ${box.tagName.toLowerCase()}`);
      else if (figure && (r.top < frame.top - slack || r.bottom > frame.bottom + slack))
        found.push(`cut: ${named(parent)} is higher than its figure`);
      const hidden = [...(function* () { for (let up = parent; up; up = up.parentElement) yield up; })()].find(
        (up) => getComputedStyle(up).overflowX === "hidden" && up.tagName !== "svg" &&
          r.right > up.getBoundingClientRect().right + 1);
      if (hidden) found.push(`hidden: ${named(parent)}`);
      const clip = scrolls?.getBoundingClientRect();
      if (clip && (r.left >= clip.right || r.right <= clip.left)) continue;  // scrolled out of sight
      const own = figure ? parent : box;
      rects.push({ box: own, left: r.left + 1, right: r.right - 1, top: r.top + 2, bottom: r.bottom - 2 });
    }
  }
  rects.sort((a, b) => a.top - b.top);
  for (let i = 0; i < rects.length; i++)
    for (let j = i + 1; j < rects.length && rects[j].top < rects[i].bottom; j++) {
      const [a, b] = [rects[i], rects[j]];
      if (a.box !== b.box && !a.box.contains(b.box) && !b.box.contains(a.box) && a.left < b.right && b.left < a.right)
        found.push(`overlap: ${named(a.box)} and ${named(b.box)}`);
    }
  for (const panel of document.querySelectorAll(".blocks > *")) {
    if (!panel.checkVisibility()) continue;
    const { width, height } = panel.getBoundingClientRect();
    if (width < 40 || height < 15) found.push(`an empty panel: ${named(panel)}`);
  }
  for (const figure of document.querySelectorAll("svg"))
    if (figure.checkVisibility() && (figure.getBoundingClientRect().height < 40 || !figure.querySelector("path")))
      found.push(`an empty figure: ${figure.getAttribute("aria-label")}`);
  return [...new Set(found)];
}
"""


def layout_problems(page: Page) -> list[str]:
    """Text that is cut or hidden, leaves the page or lies on other text, and panels or figures without content."""
    return list(page.evaluate(_LAYOUT))
