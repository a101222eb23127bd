"""The report of a sweep: what its tables say, as a page. Nothing is ranked that the tests do not tell apart."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from seqgraft.errors import RunError
from seqgraft.plots import model_dots, svg
from seqgraft.report.glossary import words_section
from seqgraft.report.page import Cell, Chart, Code, Page, Section, Table, join
from seqgraft.report.scores import Score, intervals_in_words, metric_name, words
from seqgraft.trends import cost_dots, epoch_curves, setting_lines

__all__ = ["findings", "is_sweep", "sweep_page"]

_FILES = ("sweep.yaml", "results.parquet", "summary.parquet", "tests.parquet")
#: Column of a setting -> what it is called on an axis.
_SETTINGS = {"rank": "rank (or width)", "lr": "learning rate", "batch_size": "batch size"}
#: Column of a cost -> what it is, and how to write it.
_COSTS: dict[str, tuple[str, Callable[[float], Cell]]] = {
    "seconds": ("time of training", Cell.duration),
    "memory_bytes": ("peak memory of training", Cell.size),
    "adapter_bytes": ("size of the adapter on disk", Cell.size),
    "trainable": ("numbers that train", Cell.of),
}
_MAX_CURVES = 30
_MANY = 5  # methods in a title
_MANY_PAIRS = 15  # that are shown at once
_FEW = 2  # data sets whose findings are the title


def is_sweep(folder: Path) -> bool:
    """Whether the folder is that of a sweep, finished or not."""
    return (folder / "sweep.yaml").is_file() and (folder / "cells").is_dir()


def sweep_page(folder: Path) -> Page:
    """The report of a sweep's folder.

    Raises:
        RunError: the tables are not there yet, or cannot be read.
    """
    text, results, slices = _read(folder)
    failed = results[results["status"] != "done"].drop_duplicates("cell")
    notes = [f"{len(failed)} of {results['cell'].nunique()} cells have no result; they are listed below."] * bool(
        len(failed)
    )
    sections = [section for each in slices for section in each.sections(several=len(slices) > 1)]
    if len(failed):
        sections.append(Section("Cells without a result", (_failures(failed),)))
    again = f"seqgraft sweep {shlex.quote(str(folder / 'sweep.yaml'))} NEW_FOLDER"
    sections.append(Section("How to make it again", (Code("With the same prepared data", again),)))
    if len(slices) > _FEW:
        rows = tuple((Cell(each.place), Cell(each.finding)) for each in slices)
        caption = "What the tests say, by data set."
        sections.insert(0, Section("What was found?", (Table(caption, ("data", "finding"), rows),)))
    glossary = words_section(_title(slices), sections)
    sections += [] if glossary is None else [glossary]
    tables = (
        ("Every cell", results.drop(columns="message"), "One row per cell (results.parquet)."),
        ("Every setting", pd.read_parquet(folder / "summary.parquet"), "Means over seeds (summary.parquet)."),
    )
    sections += [Section(title, (_frame(frame, caption),), folded=True) for title, frame, caption in tables]
    sections.append(Section("Settings of the sweep", (Code("sweep.yaml", text),), folded=True))
    return Page(_title(slices), _lead(results, slices), tuple(notes), tuple(sections))


def findings(folder: Path) -> dict[str, str]:
    """What the tests of a sweep say, by data set (and group of tracks, where there are several).

    Raises:
        RunError: the tables are not there yet, or cannot be read.
    """
    return {each.place: each.finding for each in _read(folder)[2]}


def _read(folder: Path) -> tuple[str, pd.DataFrame, list[_Slice]]:
    """The configuration's text, the row of every cell, and the tables by data set and group."""
    try:
        text = (folder / _FILES[0]).read_text(encoding="utf-8")
        results, summary, tests = (pd.read_parquet(folder / name) for name in _FILES[1:])
    except (OSError, ValueError) as error:
        remedy = "Run 'seqgraft sweep' again: it goes on where it stopped, and then writes them"
        raise RunError(f"the tables of the sweep cannot be read ({error})", str(folder), remedy=remedy) from error
    parts = summary.groupby(["dataset", "group"], sort=False)
    return text, results, [_Slice(folder, results, part, tests) for _, part in parts]


def _title(slices: Sequence[_Slice]) -> str:
    """The findings; of many data sets, in how many of them there is something to tell."""
    if len(slices) <= _FEW:
        told = [each.finding if len(slices) == 1 else f"{each.place}: {each.finding}" for each in slices]
        return ". ".join(told) or "A sweep without a result"
    clear = sum(len(each.leaders) == 1 < len(each.chosen) for each in slices)
    above, with_floor = (
        sum(bool(each.beyond_floor(1)) for each in slices),
        sum(bool(each.best_floor) for each in slices),
    )
    title = f"In {clear} of {len(slices)} data sets one method is told apart from all others"
    return title + (f"; in {above} of {with_floor} one is above the best baseline" if with_floor else "")


class _Slice:
    """The tables of one data set and group of tracks."""

    def __init__(self, folder: Path, results: pd.DataFrame, summary: pd.DataFrame, tests: pd.DataFrame) -> None:
        self.folder = folder
        self.dataset, self.group = summary["dataset"].iloc[0], summary["group"].iloc[0]
        self.results = results[results["dataset"] == self.dataset]
        self.several_groups = self.results["group"].replace("", None).nunique() > 1
        self.several_models = summary.loc[summary["role"] == "run", "model"].nunique() > 1
        self._brief = _brief(results["method"])
        self.summary = summary.assign(name=[self._name(*pair) for pair in summary[["method", "model"]].to_numpy()])
        tests = tests[(tests["dataset"] == self.dataset) & (tests["group"] == self.group)]
        first = [self._name(*pair) for pair in tests[["first", "first_model"]].to_numpy()]
        second = [self._name(*pair) for pair in tests[["second", "second_model"]].to_numpy()]
        self.tests = tests.assign(first=first, second=second)
        self.metric = metric_name(str(summary["metric"].iloc[0]))
        self.methods = list(dict.fromkeys(self.summary.loc[self.summary["role"] == "run", "name"]))

    def _name(self, method: str, model: str) -> str:
        name = words(self._brief.get(method, method))
        return f"{name}, {model}" if model and self.several_models else name

    @property
    def place(self) -> str:
        """The data set, and the group of tracks where there are several."""
        return f"{self.dataset}, {self.group}" if self.several_groups else str(self.dataset)

    @property
    def chosen(self) -> pd.DataFrame:
        return self.summary[self.summary["chosen"] & (self.summary["role"] == "run")]

    @property
    def floors(self) -> dict[str, float]:
        rows = self.summary[self.summary["role"] == "baseline"]
        return dict(zip(rows["name"], rows["score"], strict=True))

    @property
    def best_floor(self) -> dict[str, float]:
        """The baseline with the highest score."""
        known = {name: score for name, score in self.floors.items() if not math.isnan(score)}
        return dict(sorted(known.items(), key=lambda item: -item[1])[:1])

    # ---- the finding ----

    @property
    def finding(self) -> str:
        """What the tests say, in words."""
        scores = dict(zip(self.chosen["name"], self.chosen["score"], strict=True))
        if len(scores) == 1:
            row = self.chosen.iloc[0]
            text = f"{row['name']} reaches {self.metric} {_score(row).short}"
        else:
            text = self._compared(scores)
        text += self._against_floor(list(scores))
        return text[:1].upper() + text[1:]

    @property
    def leaders(self) -> list[str]:
        """The method with the best score, and those that the tests do not tell apart from it."""
        scores = dict(zip(self.chosen["name"], self.chosen["score"], strict=True))
        best = max(scores, key=lambda name: scores[name])
        return [name for name in scores if name == best or not self._told_apart(best, name)]

    def beyond_floor(self, sign: int) -> list[str]:
        """The methods that the tests tell to be above (``sign`` 1) or below (-1) the best baseline."""
        rows = self.tests[(self.tests["family"] == "floors") & self.tests["second"].isin(list(self.best_floor))]
        rows = rows[rows["told_apart"] & (sign * rows["difference"] > 0)]
        return [name for name in self.chosen["name"] if name in set(rows["first"])]

    def _compared(self, scores: dict[str, float]) -> str:
        if self.tests["p"].isna().all():
            return f"{len(scores)} methods, and too few independent test regions to compare them by {self.metric}"
        best = max(scores, key=lambda name: scores[name])
        level = self.leaders
        below = [name for name in scores if name not in level]
        if len(level) == 1:
            others = join(below) if len(below) < _MANY else f"the other {len(below)} methods"
            return f"{best} has a higher {self.metric} than {others}"
        if not below:
            named = join(level) if len(level) <= _MANY else f"the {len(level)} methods"
            return f"{named} are not told apart by {self.metric}"
        named = join(level) if len(level) <= _MANY else f"{len(level)} of the methods"
        worse = join(below) if len(below) < _MANY else f"{len(below)} others"
        return f"{named} are not told apart by {self.metric}; {worse} {'is' if len(below) == 1 else 'are'} below {best}"

    def _told_apart(self, one: str, other: str) -> bool:
        first, second = self.tests["first"], self.tests["second"]
        pair = ((first == one) & (second == other)) | ((first == other) & (second == one))
        return bool(self.tests.loc[pair, "told_apart"].any())

    def _against_floor(self, names: Sequence[str]) -> str:
        if not self.best_floor:
            return ""
        (floor,) = self.best_floor
        above, below = self.beyond_floor(1), self.beyond_floor(-1)
        if self.tests["p"].isna().all():
            return ""
        every = {1: "it is", 2: "both are"}.get(len(names), "all are")
        if len(above) == len(names):
            return f"; {every} above {floor}"
        if len(below) == len(names):
            return f"; {every} below {floor}"
        if above:
            return f"; only {join(above)} {'is' if len(above) == 1 else 'are'} above {floor}"
        return f"; none is above {floor}"

    # ---- the panels ----

    def sections(self, *, several: bool) -> Iterator[Section]:
        place = f"{self.place}: " if several else ""
        yield Section(f"{place}Which method?", (self._dots(), self._table()))
        if len(self.tests):
            yield Section(f"{place}Are they told apart?", tuple(self._tests()), folded=len(self.tests) > _MANY_PAIRS)
        settings = tuple(self._setting_charts())
        if settings:
            yield Section(f"{place}What do the settings do?", settings)
        yield Section(f"{place}What does it cost?", (*self._cost_charts(), self._costs()))
        curves = self._curves()
        if curves is not None:
            yield Section(f"{place}How did training go?", (curves,))

    def _dots(self) -> Chart:
        kinds = {"run": "method", "control": "random weights", "baseline": "baseline"}
        rows = self.summary[self.summary["chosen"]]
        rows = rows.assign(group=rows["role"].map(kinds), model=rows["name"], value=rows["score"])
        rows = rows.sort_values("value", ascending=False)
        groups = [kind for kind in kinds.values() if kind in set(rows["group"])]
        figure = model_dots(rows, title=self.finding, xlabel=f"{self.metric}, test", groups=groups)
        seeds = int(self.chosen["seeds"].max())
        drawn = "seeds and test items" if seeds > 1 else "test items (there is one seed)"
        intervals = intervals_in_words(rows["low"], f"lines are 95 % bootstrap intervals over {drawn}")
        caption = (
            f"{self.metric} on the test fold, the mean over seeds; {intervals}. "
            "Each method is in its setting of the best validation score."
        )
        return Chart(svg(figure, f"methods{self._id}", self.finding), caption)

    @property
    def _id(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in f"{self.dataset}{self.group}")

    @property
    def _shown(self) -> pd.DataFrame:
        """Chosen settings: the methods, then random weights and baselines."""
        order = {"run": 0, "control": 1, "baseline": 2}
        shown = self.summary[self.summary["chosen"]]
        return shown.sort_values("role", key=lambda role: role.map(order), kind="stable")

    def _table(self) -> Table:
        named = {"rank": "rank", "settings": "further settings"}
        columns = [name for name in named if self._shown[name].replace("", None).notna().any()]
        rows = tuple(
            (
                Cell(row["name"]), *(Cell.of(row[name] or None) for name in columns),
                _known(lambda lr: Cell(f"{lr:g}", lr), row["lr"]), Cell.of(row["batch_size"]), Cell.score(_score(row)),
                Cell.of(row["seed_sd"]), Cell.of(row["valid_score"]), Cell.of(row["seeds"]),
            )
            for row in self._shown.to_dict("records")
        )  # fmt: skip
        caption = "Methods in their chosen settings, then random weights and baselines. 95 % intervals in brackets."
        head = ("method", *(named[name] for name in columns), "learning rate", "batch", f"{self.metric}, test")
        return Table(caption, (*head, "sd of seeds", f"{self.metric}, validation", "seeds"), rows)

    def _costs(self) -> Table:
        rows = []
        for row in self._shown[self._shown["role"] != "baseline"].to_dict("records"):
            percent = 100 * row["trainable"] / row["total"]
            trains = _known(lambda share, count=row["trainable"]: Cell(f"{count:,.0f} ({share:.3g} %)", count), percent)  # type: ignore[misc]
            rows.append((
                Cell(row["name"]), trains, _known(Cell.size, row["adapter_bytes"]),
                _known(Cell.size, row["memory_bytes"]), _known(Cell.duration, row["seconds"]),
                _known(Cell.duration, row["seconds_per_epoch"]),
                _known(lambda change: Cell(f"{change:.0e}", change), row["merged_difference"]),
            ))  # fmt: skip
        how = " and ".join(filter(None, self.results["memory_how"].unique()))
        caption = (
            f"What the chosen settings cost. Memory: {how}. Merged: the largest relative change of the trunk's output "
            "when the adapter is folded into its weights."
        )
        head = ("method", "trains", "adapter file", "memory", "time", "time per epoch", "merged")
        return Table(caption, head, tuple(rows))

    def _tests(self) -> Iterator[Table]:
        captions = {
            "methods": "Pairs of methods on the same test items",
            "floors": "Methods against baselines and random weights",
        }
        seeds = int(self.tests["seeds"].max())
        combined = (
            "" if seeds == 1 else f" of each of {seeds} seeds, combined (n / k times the k-th smallest p, k = n / 2)"
        )
        for family, rows in self.tests.groupby("family", sort=False):
            classes = rows["p_mcnemar"].notna().any()
            head = ["first", "second", f"difference in {self.metric}", "p, bootstrap", "corrected", "told apart"]
            head += ["only first right", "only second right", "p, McNemar", "corrected (McNemar)"] * bool(classes)
            cells = []
            for row in rows.to_dict("records"):
                line = [
                    Cell(row["first"]), Cell(row["second"]),
                    Cell.score(Score(row["difference"], row["low"], row["high"], True, False)),
                    _p(row["p"]), _p(row["p_holm"]), Cell("yes" if row["told_apart"] else "no"),
                ]  # fmt: skip
                if classes:
                    line += [Cell.of(row["only_first_right"]), Cell.of(row["only_second_right"])]
                    line += [_p(row["p_mcnemar"]), _p(row["p_mcnemar_holm"])]
                cells.append(tuple(line))
            pairs = f"{len(rows)} pairs" if len(rows) > 1 else "one pair"
            caption = (
                f"{captions[str(family)]}: paired bootstrap of the difference; corrected for the {pairs} "
                "(Holm); told apart below 0.05."
            )
            caption += f" McNemar's exact test counts items that one has right and the other not{combined}." * bool(
                classes
            )
            yield Table(caption, tuple(head), tuple(cells))

    def _setting_charts(self) -> Iterator[Chart]:
        runs = self.summary[self.summary["role"] == "run"]
        trials = self.results[self.results["role"] == "trial"]
        for column, label in _SETTINGS.items():
            if len(trials):
                names = [self._name(*pair) for pair in self.results[["method", "model"]].to_numpy()]
                cells = self.results.assign(name=names, value=self.results["valid_score"], low=math.nan, high=math.nan)
                cells = cells[(cells["role"] != "control") & (cells["seed"] == trials["seed"].iloc[0])]
                frame, fold = cells.drop_duplicates("cell"), "validation"
            else:
                frame, fold = runs.assign(value=runs["score"]), "test"
            frame = frame[frame[column].notna() & frame["value"].notna()]
            frame = frame[frame.groupby("name")[column].transform("nunique") > 1]
            if frame.empty:
                continue
            best = frame.sort_values("valid_score", ascending=False).drop_duplicates(["name", column])
            best = best.assign(method=best["name"], x=best[column].astype(float))
            title = _effect(best, label, fold)
            ylabel, floors = f"{self.metric}, {fold}", self.best_floor if fold == "test" else {}
            figure = setting_lines(best, title=title, xlabel=label, ylabel=ylabel, methods=self.methods, floors=floors)
            caption = (
                f"At each value the best of the other settings by validation score; {self.metric} on the {fold} fold."
            )
            caption += (
                " Lines are 95 % intervals."
                if fold == "test"
                else " These are the trials of the search, with one seed."
            )
            yield Chart(svg(figure, f"{column}{self._id}", title), caption)

    def _cost_charts(self) -> Iterator[Chart]:
        chosen = self.chosen
        for column, (what, write) in _COSTS.items():
            known = chosen[chosen[column].notna() & chosen["score"].notna()]
            if known.empty:
                continue
            factor, unit = _unit(column, float(known[column].max()))
            frame = known.assign(method=known["name"], x=known[column] / factor, value=known["score"])
            least, most = known.iloc[known[column].argmin()], known.iloc[known[column].argmax()]
            title = f"{what[:1].upper()}{what[1:]}: {write(float(least[column])).text} ({least['name']})"
            if least["name"] != most["name"]:
                title += f" to {write(float(most[column])).text} ({most['name']})"
            label = f"{what}, {unit}" if unit else what
            figure = cost_dots(
                frame,
                title=title,
                xlabel=label,
                ylabel=f"{self.metric}, test",
                methods=self.methods,
                floors=self.best_floor,
            )
            yield Chart(
                svg(figure, f"{column}{self._id}", title), f"Score against {what}, chosen settings, means over seeds."
            )

    def _curves(self) -> Chart | None:
        parts = []
        keys = ["model", "method", "rank", "lr", "batch_size", "settings"]
        merged = self.results[self.results["role"] == "run"].merge(self.chosen[keys], on=keys).drop_duplicates("cell")
        for row in merged.head(_MAX_CURVES).to_dict("records"):
            path = self.folder / "cells" / row["cell"] / "log.csv"
            if path.is_file():
                log = pd.read_csv(path)
                name = self._name(row["method"], row["model"])
                parts.append(
                    pd.DataFrame(
                        {"method": name, "run": row["cell"], "epoch": log["epoch"], "value": log["valid_score"]}
                    )
                )
        if not parts:
            return None
        frame = pd.concat(parts)
        last = frame.groupby("run").apply(lambda run: run["value"].idxmax() == run.index[-1])
        title = f"{int(last.sum())} of {len(last)} runs were best in their last epoch"
        title += ": more epochs may help" if last.mean() > 0.5 else ""
        figure = epoch_curves(frame, title=title, ylabel=f"{self.metric}, validation", methods=self.methods)
        return Chart(svg(figure, f"curves{self._id}", title), "Validation score of every run of the chosen settings.")


def _brief(methods: pd.Series[str]) -> dict[str, str]:
    """Methods without the sites in brackets, where what is left still tells them apart."""
    short = {method: re.sub(r" \([^)]*\)", "", method) for method in methods.unique()}
    return {method: name for method, name in short.items() if list(short.values()).count(name) == 1}


def _lead(results: pd.DataFrame, slices: Sequence[_Slice]) -> str:
    cells, done = results["cell"].nunique(), results[results["status"] == "done"]["cell"].nunique()
    trials = results[results["role"] == "trial"]["cell"].nunique()
    text = f"{done} of {cells} cells ended" + (f", {trials} of them trials of the search." if trials else ".")
    items = {str(each.dataset): int(each.summary["n"].max()) for each in slices}
    text += f" Test items: {', '.join(f'{name} {count:,}' for name, count in items.items())}."
    seeds = {str(each.dataset): int(each.chosen["seeds"].max()) for each in slices}
    few = min(seeds.values(), default=0)
    one = len(set(seeds.values())) == 1
    text += f" Seeds per setting: {few if one else ', '.join(f'{name} {count}' for name, count in seeds.items())}."
    if few == 1:
        text += " With one seed, what differs between seeds is not in the intervals."
    elif few < _MANY:
        text += " With so few seeds, what differs between them is known roughly."
    return text


def _effect(frame: pd.DataFrame, label: str, fold: str) -> str:
    """Whether the intervals of a method's best and worst value overlap."""
    clear = []
    for name, part in frame.groupby("name", sort=False):
        best, worst = part.iloc[part["value"].argmax()], part.iloc[part["value"].argmin()]
        if best["low"] > worst["high"]:
            clear.append(f"{name} is better with {best['x']:g} than with {worst['x']:g}")
    if fold == "validation":
        return f"Trials by {label}"
    return f"{label[:1].upper()}{label[1:]}: {'; '.join(clear) if clear else 'no clear effect, all intervals overlap'}"


def _unit(column: str, largest: float) -> tuple[float, str]:
    """What the values of an axis are divided by, and what they are then in."""
    if column == "seconds":
        return (60, "min") if largest > 600 else (1, "s")
    if column == "trainable":
        return 1, ""
    return next(
        (10.0**power, unit) for power, unit in ((9, "GB"), (6, "MB"), (3, "kB"), (0, "B")) if largest >= 10.0**power
    )


def _score(row: Any) -> Score:
    return Score(float(row["score"]), float(row["low"]), float(row["high"]), True, False)


def _known(write: Callable[[float], Cell], value: float) -> Cell:
    return Cell.of(None) if math.isnan(value) else write(value)


def _p(value: float) -> Cell:
    if math.isnan(value):
        return Cell.of(None)
    return Cell(f"{value:.3f}" if value >= 0.001 else f"{value:.0e}", value)


def _failures(failed: pd.DataFrame) -> Table:
    rows = tuple(
        (
            Cell(row["label"]),
            Cell(f"{row['lr']:g}"),
            Cell.of(row["seed"]),
            Cell(row["status"]),
            Cell(row["message"]),
            Cell(row["cell"]),
        )
        for row in failed.to_dict("records")
    )
    caption = "They are tried again when the sweep is run again; the others are not."
    return Table(caption, ("method", "learning rate", "seed", "status", "message", "folder in cells"), rows)


def _frame(frame: pd.DataFrame, caption: str) -> Table:
    rows = tuple(
        tuple(Cell.of(None if value == "" else value) for value in row) for row in frame.itertuples(index=False)
    )
    return Table(caption, tuple(words(str(name)) for name in frame), rows)
