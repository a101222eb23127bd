"""Which cells a sweep has: combinations of an experiment's keys, and settings that a search proposes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seqgraft.adapters import ADAPTERS
from seqgraft.errors import ConfigError, Problems, SeqgraftError
from seqgraft.experiment import Experiment, build, parse_experiment, read_yaml, settings_of
from seqgraft.results import method_of

__all__ = ["Method", "Range", "Search", "SweepConfig", "canonical", "methods_of", "proposals", "read_sweep"]

Content = dict[str, Any]


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, on a logarithmic scale if ``log``; whole ones if both ends are whole."""

    low: float
    high: float
    log: bool = True

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            what = "a range goes from a smaller to a larger number, above 0 if it is logarithmic"
            raise ConfigError(what, [self.low, self.high], where="search.space")

    @property
    def whole(self) -> bool:
        return float(self.low).is_integer() and float(self.high).is_integer()

    def draw(self, generator: np.random.Generator) -> float:
        if self.log:
            value = float(np.exp(generator.uniform(np.log(self.low), np.log(self.high))))
        else:
            value = float(generator.uniform(self.low, self.high))
        return round(value) if self.whole else float(f"{value:.4g}")


@dataclass(frozen=True)
class Search:
    """Tuning of each method on the validation fold, with the first seed.

    Attributes:
        space: key of the experiment -> list of values, or ``{low, high, log}``.
        trials: settings that every method tries; a method without so many is an error.
        strategy: "random" draws them without replacement, "grid" takes all of the lists, "tpe" asks Optuna.
        seed: of the draw.
    """

    space: Mapping[str, Any]
    trials: int
    strategy: Literal["grid", "random", "tpe"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError("must be 1 or more", self.trials, where="search.trials")
        for key, values in self.ranges.items():
            if isinstance(values, Range) and self.strategy == "grid":
                raise ConfigError("a grid needs a list of values", key, where="search.space", remedy="Use random")

    @property
    def ranges(self) -> dict[str, list[Any] | Range]:
        """The space with its ranges built."""
        return {
            key: build(Range, values, f"search.space.{key}") if isinstance(values, Mapping) else _listed(key, values)
            for key, values in self.space.items()
        }


def _listed(key: str, values: Any) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError("must be a list of values", values, where=key, remedy="Write [a, b]")
    return list(values)


@dataclass(frozen=True)
class SweepConfig:
    """What is swept.

    Attributes:
        experiment: path of an experiment's file, or its content.
        grid: key of the experiment, dotted (``adapter``, ``adapter.rank``, ``train.lr``, ``data``) -> list of values.
        seeds: every setting is run with each.
        search: tuning of each combination of the grid, before its best setting is run with all seeds.
        controls: run the best method of each data set and model on random weights too.
        draws: of the bootstrap over seeds and test items, at least.
    """

    experiment: Path | Mapping[str, Any]
    grid: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1,)
    search: Search | None = None
    controls: bool = False
    draws: int = 1000

    def __post_init__(self) -> None:
        space = {} if self.search is None else self.search.space
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("must be different numbers, at least one", list(self.seeds), where="seeds")
        if twice := [key for key in self.grid if key in space]:
            raise ConfigError(
                "the keys stand in the grid and in the search", twice, remedy="Keep them in one of the two"
            )
        for key in (*self.grid, *space):
            if key == "train.seed":
                raise ConfigError("seeds have a key of their own", key, remedy="Write seeds: [1, 2, 3]")


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep in a YAML file.

    Raises:
        ConfigError: everything that is wrong with it, at once.
    """
    return build(SweepConfig, read_yaml(path, overrides), str(path))


# ---- which cells there are ----


@dataclass(frozen=True)
class Method:
    """A combination of the grid; ``content`` is an experiment, of which a search sets more."""

    content: Content

    def with_settings(self, settings: Mapping[str, Any]) -> Method:
        return Method(_with(self.content, settings))

    def experiment(self, seed: int) -> Experiment:
        return parse_experiment(_with(self.content, {"train.seed": seed}), _where(self.content))

    @property
    def key(self) -> str:
        """The same for combinations that mean the same."""
        return canonical(self.experiment(0))


def _where(content: Mapping[str, Any]) -> str:
    """Where an error is, before the experiment can be built."""
    return f"a cell with adapter {content.get('adapter', {'kind': 'linear_probe'})}"


def canonical(value: object) -> str:
    """Settings as text, the same for the same ones."""
    return json.dumps(settings_of(value), sort_keys=True, default=str)


def _with(content: Content, settings: Mapping[str, Any]) -> Content:
    """The content with dotted keys set, sections first; an adapter's key left out where its kind lacks it."""
    made = copy.deepcopy(content)
    for name in sorted(settings, key=lambda key: key.count(".")):
        *parents, last = name.split(".")
        if parents == ["adapter"] and last not in _adapter_keys(made):
            continue
        section = made
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise ConfigError("the key is not a section of the experiment", parent, where=f"sweep: {name}")
        section[last] = copy.deepcopy(settings[name])
    return made


def _adapter_keys(content: Content) -> set[str]:
    adapter = content.get("adapter") or {"kind": "linear_probe"}
    cls = ADAPTERS.get(str(adapter.get("kind"))) if isinstance(adapter, Mapping) else None
    return {"kind"} if cls is None else {"kind", *(f.name for f in dataclasses.fields(cls))}  # type: ignore[arg-type]


def methods_of(config: SweepConfig) -> list[Method]:
    """Every combination of the grid once.

    Raises:
        ConfigError: whatever is wrong with any of them; a key that none of the adapters has.
    """
    base = config.experiment
    content = read_yaml(base) if isinstance(base, Path) else copy.deepcopy(dict(base))
    if not isinstance(base, Path) and set(content) == set():
        raise ConfigError("the experiment is empty", where="experiment", remedy="Give a path, or its sections")
    lists = [[(key, value) for value in _listed(f"grid.{key}", values)] for key, values in config.grid.items()]
    made = [Method(_with(content, dict(combination))) for combination in itertools.product(*lists)]
    for key in (*config.grid, *(config.search.space if config.search else ())):
        section, _, name = key.partition(".")
        if section == "adapter" and name and not any(name in _adapter_keys(method.content) for method in made):
            remedy = "See the keys of each kind of adapter in docs/formats.md"
            raise ConfigError("no adapter of the sweep has this key", key, where="sweep", remedy=remedy)
    problems, unique = Problems(ConfigError), dict[str, Method]()
    for method in made:
        try:
            unique.setdefault(method.key, method)
        except SeqgraftError as error:
            if str(error) not in {str(known) for known in problems.found}:
                problems.extend(error)
    problems.raise_if_any()
    return list(unique.values())


# ---- what a search proposes ----

#: Gives settings one after the other, and is sent the validation score of each.
Asking = Generator["Method", float | None, None]


def proposals(search: Search, methods: Sequence[Method]) -> list[Asking]:
    """Of each method, the settings that it tries one after the other; sending back the score of each.

    Raises:
        ConfigError: the budgets of the methods would differ.
    """
    if search.strategy == "tpe":
        return [_ask_optuna(search, method) for method in methods]
    problems, found = Problems(ConfigError), list[Asking]()
    for method in methods:
        tried = _drawn(search, method)
        if len(tried) != search.trials:
            what = f"{method_of(method.experiment(0))} has another number of settings than trials ({search.trials})"
            remedy = "Every method gets the same budget: give as many trials, or use random with a range or more values"
            problems.add(what, len(tried), where="search", remedy=remedy)
        found.append(_in_turn(tried))
    problems.raise_if_any()
    return found


def _in_turn(methods: Sequence[Method]) -> Asking:
    yield from methods


def _drawn(search: Search, method: Method) -> list[Method]:
    """Different settings of a method: all of the lists, or so many at random."""
    ranges, generator = search.ranges, np.random.default_rng(search.seed)
    if not any(isinstance(values, Range) for values in ranges.values()):
        lists = [[(key, value) for value in values] for key, values in ranges.items() if isinstance(values, list)]
        made = [method.with_settings(dict(setting)) for setting in itertools.product(*lists)]
        unique = list({each.key: each for each in made}.values())
        if search.strategy == "grid" or len(unique) < search.trials:
            return unique
        return [unique[i] for i in sorted(generator.choice(len(unique), search.trials, replace=False))]
    drawn: dict[str, Method] = {}
    for _ in range(100 * search.trials):
        if len(drawn) == search.trials:
            break
        setting = {
            key: values.draw(generator) if isinstance(values, Range) else values[generator.integers(len(values))]
            for key, values in ranges.items()
        }
        made_one = method.with_settings(setting)
        drawn.setdefault(made_one.key, made_one)
    return list(drawn.values())


def _ask_optuna(search: Search, method: Method) -> Asking:
    """Settings from a Tree-structured Parzen Estimator; the validation score of each is sent back, NaN if it failed."""
    try:
        import optuna
    except ImportError as error:
        remedy = "Install seqgraft[sweep], or use strategy: random"
        raise ConfigError("Optuna is not installed", search.strategy, where="search.strategy", remedy=remedy) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=max(2, min(10, search.trials // 3)))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    ranges = {
        key: values
        for key, values in search.ranges.items()
        if not key.startswith("adapter.") or key.partition(".")[2] in _adapter_keys(method.content)
    }
    for _ in range(search.trials):
        trial, setting = study.ask(), dict[str, Any]()
        for key, values in ranges.items():
            if isinstance(values, list):  # lists and sections are no choices of Optuna's, their numbers are
                setting[key] = values[trial.suggest_categorical(key, list(range(len(values))))]
            elif values.whole:
                setting[key] = trial.suggest_int(key, int(values.low), int(values.high), log=values.log)
            else:
                setting[key] = float(f"{trial.suggest_float(key, values.low, values.high, log=values.log):.4g}")
        score = yield method.with_settings(setting)
        if score is not None and np.isfinite(score):
            study.tell(trial, score)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
