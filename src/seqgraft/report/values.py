"""The panel of predicted against observed values by region: a scatter with its trend, or how often a class is there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from seqgraft.plots import short_name, svg
from seqgraft.report.page import Chart, RunFiles
from seqgraft.report.scores import Key
from seqgraft.value_plots import calibration_error, reliability, value_scatter

__all__ = ["value_chart"]

_FEWEST = 5  # regions, for a figure


def value_chart(run: RunFiles, key: Key, name: str) -> Chart | None:
    """Predicted against observed of the group's track with the median score; None where nothing can be drawn."""
    values = run.values
    track = _median_track(run, key)
    if values is None or track not in values.tracks:
        return None
    column = values.tracks.index(track)
    pairs = np.stack([values.predicted[:, column], values.observed[:, column]], axis=1)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) < _FEWEST or not np.ptp(pairs, axis=0).all():
        return None
    several = len(_tracks(run, key)) > 1
    which = f"{short_name(track, 40)}, the track with the median score" if several else short_name(track, 40)
    if _is_class(pairs):
        title = f"Predicted probabilities are off by {calibration_error(pairs):.2f} on average: {which}"
        caption = (
            f"{len(pairs):,} sequences of fold {key.fold}. On the dashed line, of what is predicted with 0.8, eight of "
            "ten are of the class. Lines are 95 % intervals (Wilson); the bars at the bottom show how many there are."
        )
        figure = reliability(pairs, title=title, ylabel="observed share")
        return Chart(svg(figure, name, title), caption)
    labels = run.part("dataset").get("bins") == 1
    what = "value" if labels else "mean signal of a region"
    r = float(np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1])
    title = f"Over {len(pairs):,} regions, predicted and observed agree with Pearson {r:.2f}: {which}"
    figure = value_scatter(pairs, title=title, xlabel=f"predicted {what}", ylabel=f"observed {what}")
    caption = (
        f"Regions of fold {key.fold}{'' if labels else ', on the scale of training'}. On the dashed line both are "
        "equal. Diamonds are the means of tenths of the regions in the order of the prediction: above the dashed line "
        "predictions are too low on average, below it too high."
    )
    return Chart(svg(figure, name, title), caption)


def _tracks(run: RunFiles, key: Key) -> list[str]:
    assert run.scores is not None
    rows = run.scores.rows(key)
    return list(dict.fromkeys(rows.loc[rows["track"] != "", "track"]))


def _median_track(run: RunFiles, key: Key) -> str:
    """Of an even number of tracks the better of the two in the middle."""
    assert run.scores is not None
    rows = run.scores.rows(key)
    own = rows[(rows["model"] == run.label) & (rows["track"] != "")].dropna(subset="value")
    return "" if own.empty else str(own.sort_values("value", kind="stable")["track"].iloc[len(own) // 2])


def _is_class(pairs: npt.NDArray[np.float64]) -> bool:
    """Are these probabilities, and 0 or 1?"""
    predicted, observed = pairs.T
    return bool(np.isin(observed, (0, 1)).all() and predicted.min() >= 0 and predicted.max() <= 1)
