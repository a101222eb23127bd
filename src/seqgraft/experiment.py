"""Experiments: the YAML file is the constructor.

Every section of the file is a frozen dataclass and every key one of its fields; ``kind`` picks the class where there
is a choice. Unknown keys, wrong types and values out of range are reported together. ``${NAME}`` is taken from the
environment. This module is the only door to pydantic and yaml.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from seqgraft.adapters import ADAPTERS, Adapter
from seqgraft.adapters.freeze import LinearProbe
from seqgraft.data import SOURCES
from seqgraft.errors import ConfigError, Problems, SeqgraftError
from seqgraft.evaluate import EvaluateConfig
from seqgraft.joint import JointConfig
from seqgraft.losses import LOSSES, PAIR_LOSSES, TOKEN_LOSSES, Loss, MaskedTokens, PairLoss
from seqgraft.models.weights import ModelConfig
from seqgraft.train import TrainConfig
from seqgraft.variants import OVERS, SCORERS, Over, Scorer

__all__ = [
    "Experiment",
    "build",
    "parse_experiment",
    "parse_source",
    "read_experiment",
    "read_yaml",
    "settings_of",
    "write_yaml",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Experiment:
    """One run: data, model, adapter, loss, training and evaluation.

    Attributes:
        data: folder of a prepared dataset.
        loss: one loss for all groups of tracks, or group -> loss; the usual one of each link if not given.
            ``masked_tokens`` trains a language model on the sequences alone.
        loss_weights: group -> what its part of the loss is multiplied by; 1 for those that are not named.
        joint: other data, of tracks that the model was pretrained on, which train along.
        allow_exposure: train although test windows overlap regions that the trunk was pretrained on.
    """

    data: Path
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: Adapter = field(default_factory=LinearProbe)
    loss: Loss | PairLoss | MaskedTokens | Mapping[str, Loss | PairLoss] | None = None
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    joint: JointConfig | None = None
    allow_exposure: bool = False


def read_yaml(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file (an empty one without a file), with ``a.b=value`` overrides applied.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping or has a key twice; an override that is not
            ``key=value``.
    """
    content = {} if path is None else _parse(_read_text(path), path)
    if not isinstance(content, dict):
        found, remedy = "a list" if isinstance(content, list) else content, "Write lines such as 'data: folder'"
        raise ConfigError("the file must hold 'key: value' lines and does not", found, where=path, remedy=remedy)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            remedy = "Write section.key=value, as in --set train.lr=3e-5"
            raise ConfigError("this does not set anything", override, where="--set", remedy=remedy)
        *parents, last = name.split(".")
        section = content
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                remedy = f"It is {section!r}: set {parent} itself, or make it a section in the file"
                raise ConfigError("the key is not a section", parent, where=f"--set {override}", remedy=remedy)
        section[last] = _parse(text, f"--set {override}")
    expanded: dict[str, Any] = _expand(content, str(path))
    return expanded


def _read_text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError("the file does not exist", str(path), remedy="Check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file cannot be read ({error})", where=path, remedy="Give a YAML text file") from error


_MOST_NODES = 1_000_000  # aliases can make a short file endless


def _parse(text: str, where: object) -> Any:
    """What YAML text means; unlike YAML's own loader it refuses a key that is there twice."""
    try:
        nodes = [node for node in [yaml.compose(text, Loader=yaml.SafeLoader)] if node is not None]
        visited = 0
        while nodes:
            node, visited = nodes.pop(), visited + 1
            if visited > _MOST_NODES:
                raise ConfigError("the file has too many entries, or one that holds itself", _MOST_NODES, where=where)
            if isinstance(node, yaml.MappingNode):
                seen: set[str] = set()
                for key, value in node.value:
                    name = str(key.value)
                    if name in seen:
                        place = f"{where} line {key.start_mark.line + 1}"
                        raise ConfigError("the key is there twice", name, where=place, remedy="Keep one of them")
                    seen.add(name)
                    nodes.append(value)
            elif isinstance(node, yaml.SequenceNode):
                nodes += node.value
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        told, mark = str(error), getattr(error, "problem_mark", None)
        if mark is not None:  # the whole message repeats the text, and names no file
            told = f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or told}"
        what = f"this is not valid YAML ({' '.join(told.split())})"
        raise ConfigError(what, where=where, remedy="Check indentation, brackets and quotes there") from error


def _expand(content: Any, where: str) -> Any:
    """``${NAME}`` in any text becomes the environment variable of that name."""
    if isinstance(content, dict):
        return {key: _expand(value, where) for key, value in content.items()}
    if isinstance(content, list):
        return [_expand(value, where) for value in content]
    if isinstance(content, str) and "${" in content:
        content = os.path.expandvars(content)
        if "${" in content:
            raise ConfigError(
                "the text names an environment variable that is not set",
                content,
                where=where,
                remedy="Set it, or write the path out",
            )
    return content


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a mapping, keys in their order."""
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))


def read_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in a YAML file.

    Raises:
        ConfigError: everything that is wrong with it, at once.
    """
    return parse_experiment(read_yaml(path, overrides), str(path))


def parse_experiment(content: Mapping[str, Any], where: str = "experiment") -> Experiment:
    """The experiment that a mapping describes, such as a YAML file's content."""
    return build(Experiment, content, where)


def parse_source(content: Mapping[str, Any], where: str = "data.yaml") -> Any:
    """The data source of a ``prepare`` file: ``kind`` names its class, the other keys are its fields."""
    return _build_kind({kind: source for kind, (source, _) in SOURCES.items()}, content, where)


def settings_of(value: object) -> Any:
    """The inverse of ``build``: plain mappings, lists, numbers and text, with ``kind`` where it is needed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: settings_of(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = next((name for registry in _registries() for name, cls in registry.items() if type(value) is cls), None)
        return {"kind": kind, **fields} if kind else fields
    if isinstance(value, Mapping):
        return {str(key): settings_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [settings_of(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _registries() -> list[Mapping[str, type]]:
    sources = {kind: source for kind, (source, _) in SOURCES.items()}
    return [ADAPTERS, LOSSES, PAIR_LOSSES, TOKEN_LOSSES, SCORERS, OVERS, sources]


def build(cls: type[T], content: object, where: str) -> T:
    """A frozen dataclass from a mapping of its fields, nested ones included.

    Raises:
        ConfigError: unknown or missing keys, wrong types, values that the class refuses; all of them at once.
    """
    if not isinstance(content, Mapping):
        remedy = "Write one key per line, indented below its name"
        raise ConfigError("must be a section of 'key: value' lines", content, where=where, remedy=remedy)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    problems = Problems(ConfigError)
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"Did you mean {close[0]!r}?" if close else f"The keys here are {', '.join(fields)}"
            problems.add("there is no such key", key, where=where, remedy=remedy)
            continue
        try:
            values[key] = _convert(hints[key], value, f"{where}: {key}" if ":" not in where else f"{where}.{key}")
        except SeqgraftError as error:
            problems.extend(error)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in content:
            problems.add("a key is missing", name, where=where, remedy=f"Add a line '{name}: ...'")
    problems.raise_if_any()
    return cls(**values)


def _build_kind(registry: Mapping[str, type], content: object, where: str) -> Any:
    if not isinstance(content, Mapping) or "kind" not in content:
        raise ConfigError(
            "must be a section with a 'kind'", content, where=where, remedy=f"The kinds are {', '.join(registry)}"
        )
    kind = content["kind"]
    if not isinstance(kind, str) or kind not in registry:
        raise ConfigError("there is no such kind", kind, where=where, remedy=f"Choose one of {', '.join(registry)}")
    return build(registry[kind], {key: value for key, value in content.items() if key != "kind"}, where)


def _convert(hint: Any, value: object, where: str) -> Any:
    if hint is Adapter:
        return _build_kind(ADAPTERS, value, where)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if Loss in options:
        if isinstance(value, Mapping) and "kind" not in value:
            of_tracks = {**LOSSES, **PAIR_LOSSES}
            return {str(group): _build_kind(of_tracks, part, f"{where}.{group}") for group, part in value.items()}
        return _build_kind({**LOSSES, **PAIR_LOSSES, **TOKEN_LOSSES}, value, where)
    if Over in options:
        return _build_kind(OVERS, {"kind": value} if isinstance(value, str) else value, where)
    if hint == tuple[Scorer, ...]:  # a kind alone means its defaults
        listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        named = [{"kind": item} if isinstance(item, str) else item for item in listed]
        return tuple(_build_kind(SCORERS, item, f"{where}[{number}]") for number, item in enumerate(named))
    nested = [option for option in options if dataclasses.is_dataclass(option)]
    if nested:  # an empty section means its defaults
        return build(nested[0], {} if value is None else value, where)  # type: ignore[arg-type]
    items = [
        a
        for o in options
        if typing.get_origin(o) in (list, tuple)
        for a in typing.get_args(o)
        if dataclasses.is_dataclass(a)
    ]
    if items and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(build(items[0], item, f"{where}[{number}]") for number, item in enumerate(value))  # type: ignore[arg-type]
    if isinstance(value, bool) and not {bool, Any} & set(options):  # pydantic would take it for 0 or 1
        raise ConfigError("must not be true or false", value, where=where, remedy=f"Give {_in_words(options)}")
    if isinstance(value, bytes):  # pydantic would take it for text
        remedy = f"Give {_in_words(options)}, without !!binary"
        raise ConfigError("must not be binary", value, where=where, remedy=remedy)
    try:
        return TypeAdapter(hint, config={"arbitrary_types_allowed": True}).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")[0]
        remedy = f"Give {_in_words(options)}"
        if first["type"] == "tuple_type" and isinstance(value, str):
            remedy += f", as in [{value}]"
        what = _REASONS.get(first["type"], reason[:1].lower() + reason[1:])
        raise ConfigError(what, value, where=where, remedy=remedy) from error


#: What pydantic says in Python's words, in those of YAML.
_REASONS = {
    "tuple_type": "should be a list",
    "dict_type": "should be a section",
    "mapping_type": "should be a section",
    "path_type": "is not a path",
}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text (in quotes)", Path: "a path"}


def _in_words(options: Sequence[Any]) -> str:
    """What a key takes, such as "a number or nothing"."""
    words = []
    for option in options:
        origin = typing.get_origin(option)
        if origin is typing.Literal:
            words += [repr(choice) for choice in typing.get_args(option)]
        elif origin is Mapping or origin is dict or dataclasses.is_dataclass(option):
            words.append("a section of 'key: value' lines")
        elif origin in (list, tuple):
            words.append("a list")
        else:
            words.append("nothing" if option is type(None) else _WORDS.get(option, "another value"))
    return " or ".join(dict.fromkeys(words))
