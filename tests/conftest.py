"""What every test runs under: one thread, no network, a cache of its own, and the real data where they are at hand."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]

# Set before torch and numpy are imported, here and in whatever a test starts: workers share the cores.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["NO_COLOR"] = "1"  # messages are compared as text

settings.register_profile(
    "default", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

_CACHE = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite on two workers.

    A run that names files stays in one process: it starts sooner and can be debugged. `-n` on the command line wins.
    """
    whole_suite = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.usepdb
    if whole_suite and not _is_worker(config) and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = 2
        config.option.dist = "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """One cache per test session, which its workers inherit: nothing is read from the user's."""
    if not _is_worker(config):
        config.stash[_CACHE] = os.environ["SEQGRAFT_CACHE"] = tempfile.mkdtemp(prefix="seqgraft-test-cache-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the real data or a browser carries its marker, so `-m 'not shared'` needs no care."""
    for item in items:
        for fixture, marker in (("shared", pytest.mark.shared), ("chromium", pytest.mark.browser)):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, read-only; the test is skipped where it is absent."""
    named = os.environ.get("SEQGRAFT_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        where = f"SEQGRAFT_SHARED={named}" if named else "neither SEQGRAFT_SHARED nor ../shared beside the checkout"
        pytest.skip(f"The real data are not at hand: {where} has a data folder.")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A headless Chromium, one per worker; `browser.visit` opens pages in it. Skips the test where there is none."""
    from browser import start_chromium

    with start_chromium() as browser:
        yield browser


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")
