"""Figures and how they enter a page."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from seqgraft.errors import DataError
from seqgraft.plots import MAX_TRACKS, THEME, Examples, metric_dots, model_dots, svg, tracks_panel, training_curve


def scores(tracks: list[str], models: tuple[str, ...] = ("LoRA", "mean track")) -> pd.DataFrame:
    rows = [(m, t, 0.5 - 0.2 * i + 0.01 * j) for i, m in enumerate(models) for j, t in enumerate(["", *tracks])]
    frame = pd.DataFrame(rows, columns=["model", "track", "value"])
    return frame.assign(low=frame["value"] - 0.05, high=frame["value"] + 0.05)


def log(epochs: int = 5) -> pd.DataFrame:
    epoch = np.arange(1, epochs + 1)
    score = 0.5 - 0.1 * np.abs(epoch - 3)
    return pd.DataFrame({"epoch": epoch, "train_loss": 1 / epoch, "valid_loss": 1.2 / epoch, "valid_score": score})


def examples(tracks: int = 2, bins: int = 16, baseline: bool = True) -> Examples:
    observed = np.random.default_rng(0).gamma(2, 1, (1, tracks, bins))
    flat = np.linspace(0, 1, bins) + 0 * observed if baseline else np.full_like(observed, np.nan)
    names = [f"track {number}" for number in range(tracks)]
    return Examples(names, ["chrI"], [1600], 16, observed, observed * 0.5, flat, baseline_name="mean_track" * baseline)


def texts(figure: Figure) -> str:
    root = ElementTree.fromstring(svg(figure, "f", "alt"))
    return " ".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("text"))


def inside(figure: Figure) -> bool:
    """Whether everything drawn, text included, is inside the figure."""
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def figures() -> dict[str, Figure]:
    finding = "LoRA(rank=8) reaches Pearson 0.54 (0.51 to 0.57) on held-out chrXIV and chrXVI; the best baseline 0.41"
    frame = scores(["a", "x$y$_1", "<b>", "a very long name of a track that goes on and on"])
    models = frame[frame["track"] == ""].assign(group=["run", "baseline"])
    return {
        "metric": metric_dots(frame, title=finding, xlabel="Pearson", highlight="LoRA"),
        "models": model_dots(models, title=finding, xlabel="Pearson", groups=["run", "baseline"]),
        "training": training_curve(log(), score="Pearson"),
        "tracks": tracks_panel(examples(), 0),
    }


@pytest.mark.parametrize("name", ["metric", "models", "training", "tracks"])
def test_every_figure_is_a_sound_element(name: str) -> None:
    figure = figures()[name]
    text = svg(figure, name, 'says "so" & <more>')
    root = ElementTree.fromstring(text)  # well-formed, whatever the tracks are called
    assert root.attrib["aria-label"] == 'says "so" & <more>'
    assert not [colour for colour in THEME if colour in text], "colours are the page's, so that dark mode works"
    assert "<style" not in text
    ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
    assert ids
    assert all(identity.startswith(f"{name}-") for identity in ids)
    assert len(ids) == len(set(ids))
    assert inside(figure)
    assert text == svg(figures()[name], name, 'says "so" & <more>'), "the same data give the same bytes"


def test_metric_dots_put_the_mean_on_top_and_the_baseline_beside() -> None:
    figure = metric_dots(scores(["a", "b"]), title="finding", xlabel="Pearson", highlight="LoRA")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["mean over tracks", "b", "a"]  # best first
    assert {line.get_label() for line in figure.axes[0].lines} >= {"LoRA", "mean track"}
    assert "finding" in texts(figure)


def test_many_tracks_show_the_best_and_the_worst_and_say_so() -> None:
    names = [f"t{number}" for number in range(100)]
    figure = metric_dots(scores(names), title="", xlabel="Pearson", highlight="LoRA")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == MAX_TRACKS + 1
    assert {"t99", "t0"} <= set(labels)
    assert "12 best and 12 worst of 100 tracks" in figure.axes[0].get_xlabel()
    assert inside(figure)


@pytest.mark.parametrize("scale", [2e3, 1e5])
def test_long_numbers_on_an_axis_stand_apart(scale: float) -> None:
    frame = scores(["a", "a_track_with_a_long_name"])
    frame[["value", "low", "high"]] = 0.9994 + frame[["value", "low", "high"]] / scale
    figure = metric_dots(frame, title="", xlabel="", highlight="LoRA")
    figure.draw_without_rendering()
    assert figure.axes[0].xaxis.get_offset_text().get_text() == ""
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert len(boxes) > 1
    assert all(left.x1 < right.x0 for left, right in pairwise(sorted(boxes, key=lambda box: box.x0)))


def test_undefined_scores_and_intervals_leave_gaps() -> None:
    frame = scores(["a", "b"])
    frame.loc[frame["track"] == "a", ["value", "low", "high"]] = np.nan
    frame[["low", "high"]] = np.nan
    svg(metric_dots(frame, title="", xlabel="", highlight="LoRA"), "f", "alt")


def test_training_curve_names_the_best_epoch() -> None:
    assert "Validation Pearson is best, 0.500, in epoch 3 of 5" in texts(training_curve(log(), score="Pearson"))
    rising = log(2)
    assert "in the last epoch: more may help" in texts(training_curve(rising)).replace("\n", " ")


def test_training_curve_without_a_score() -> None:
    assert len(training_curve(log().drop(columns="valid_score")).axes) == 1
    assert len(training_curve(log(1).assign(valid_score=np.nan)).axes) == 1


def test_tracks_panel_states_the_agreement_beside_the_baseline() -> None:
    text = texts(tracks_panel(examples(), 0))
    assert "chrI:1,601-1,856" in text
    assert "Pearson 1.00" in text
    assert "mean track with" in text.replace("\n", " ")


def test_tracks_panel_without_baseline_with_missing_bins_and_many_tracks() -> None:
    shown = examples(tracks=9, baseline=False)
    shown.observed[0, 0, :4] = np.nan
    text = texts(tracks_panel(shown, 0))
    assert "baseline" not in text
    assert "6 of 9 tracks" in text


def test_examples_read_what_evaluation_writes(tmp_path: Path) -> None:
    path = tmp_path / "examples.npz"
    arrays = {"observed": np.ones((2, 1, 4)), "predicted": np.zeros((2, 1, 4))}
    np.savez(path, tracks=["a"], chrom=["chrI", "chrII"], start=[0, 5], bin_size=16, **arrays)
    read = Examples.load(path)
    assert read is not None
    assert (read.tracks, read.chrom, read.start, read.bin_size) == (["a"], ["chrI", "chrII"], [0, 5], 16)
    assert np.isnan(read.baseline).all()
    np.savez(path)
    assert Examples.load(path) is None


@pytest.mark.parametrize("damage", ["truncated", "shape", "lacking", "text"])
def test_damaged_examples(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "examples.npz"
    arrays = {"observed": np.ones((1, 1, 4)), "predicted": np.zeros((1, 1, 3 if damage == "shape" else 4))}
    if damage == "lacking":
        del arrays["predicted"]
    np.savez(path, tracks=["a"], chrom=["chrI"], start=[0], bin_size=16, **arrays)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    if damage == "text":
        path.write_text("no")
    with pytest.raises(DataError):
        Examples.load(path)
