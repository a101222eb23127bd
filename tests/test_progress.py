from __future__ import annotations

import pytest

from seqgraft import progress as module
from seqgraft.progress import progress


def test_items_pass_through_in_silence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEQGRAFT_PROGRESS", raising=False)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    assert list(progress(iter("abc"), "Working")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_a_bar_on_stderr_after_a_while(
    patience: float, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQGRAFT_PROGRESS", "1")
    monkeypatch.setattr(module, "PATIENCE", patience)
    assert list(progress(range(5), "Working")) == [0, 1, 2, 3, 4]
    captured = capsys.readouterr()
    assert ("Working" in captured.err and "5/5" in captured.err) == shown
    assert captured.out == ""


def test_no_items() -> None:
    assert list(progress([], "Working")) == []
