"""The quickstart and the guides that have no other test run as they are written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from guides import run_guide
from seqgraft.data import open_dataset


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_quickstart() -> None:
    names = run_guide("../quickstart")
    assert names["plan"].would_start
    assert set(names["table"]["model"]) >= {"mean track"}
    assert names["predicted"].shape == (2, len(open_dataset("data/sim").tracks), 128)
    assert Path("runs/lora/report.html").is_file()


def test_coverage(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_guide("coverage")
    assert "fit would start." in capsys.readouterr().out
    assert pd.read_parquet("runs/probe/evaluation/genes.parquet")["level"].eq("genes").any()
    assert {path.suffix for path in Path("predicted.bw").iterdir()} == {".bw"}
    tracks = open_dataset("data/mine").tracks.names
    assert set(pd.read_parquet("predicted.parquet")["track"]) == set(tracks)
    assert {"value", "low", "high"} <= set(names["scores"])


def test_labelled() -> None:
    names = run_guide("labelled")
    assert pd.read_csv("predicted.csv")["name"].nunique() == 3
    assert open_dataset("data/promoters").tracks.names != open_dataset("data/expression").tracks.names
    assert "k-mer regression" in set(names["scores"]["model"])


def test_effects() -> None:
    names = run_guide("effects")
    assert {path.name for path in Path("lcl-effects").iterdir()} >= {"lcl-effects.db", "lcl-effects.txt.gz"}
    one, two = (pd.read_parquet(f"{folder}/effects.parquet") for folder in ("beside-mpra", "again"))
    assert one.equals(two)
    assert "ridge on dosage (BLUP)" in set(names["found"].agreement.table["model"])
