"""YAML that knows its lines: text to data with the place of every key, `--set` overrides, models to text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

Keys = tuple[str | int, ...]
"""Where a value lies: ("solver", "lambda_tv", "low"), or with numbers for the items of a list."""


class SettingsError(Exception):
    """Settings that cannot be run. `problems` holds one sentence each; str() gives them one per line."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


def dotted(keys: Keys) -> str:
    """("grid", "chem_tilts", 2) -> "grid.chem_tilts[2]"."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")


def split(setting: str) -> Keys:
    """"data.snr.haadf" -> its keys; below `grid` the rest is one key, the name of an axis."""
    return tuple(setting.split(".", 1) if setting.startswith("grid.") else setting.split("."))


def put(data: dict[Any, Any], keys: Keys, value: Any) -> None:
    """Set the value at `keys`, making mappings on the way; ValueError where something else is in the way."""
    for depth, key in enumerate(keys[:-1], start=1):
        inner = data.setdefault(key, {})
        if inner is None:
            inner = data[key] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"{dotted(keys[:depth])} is {flow(inner)}, which has no {dotted(keys[depth:])}; "
                             f"set {dotted(keys[:depth])} as a whole")
        data = inner
    data[keys[-1]] = value


@dataclass
class Document:
    """Plain data, and where each key and list item came from: "file.yaml:12" or "--set key=value"."""

    data: dict[str, Any]
    places: dict[Keys, str]

    def place(self, keys: Keys) -> str:
        """The place of the innermost known part of `keys`."""
        known = (keys[:depth] for depth in range(len(keys), -1, -1))
        return next((self.places[part] for part in known if part in self.places), "settings")

    def problem(self, keys: Keys, text: str) -> str:
        """One line: "file.yaml:12: solver.lamda_tv: unknown key"."""
        return ": ".join(part for part in (self.place(keys), dotted(keys), text) if part)

    def override(self, text: str) -> None:
        """Apply one `key=value`, the value read as YAML; SettingsError names the override."""
        place = f"--set {text}"
        setting, sign, value = text.partition("=")
        if not sign or not all(setting.strip().split(".")):
            raise SettingsError(f"{place}: write key=value, for example --set data.size=64")
        keys = split(setting.strip())
        parsed, inner = _parse(value, lambda line: place)
        try:
            put(self.data, keys, parsed)
        except ValueError as error:
            raise SettingsError(f"{place}: {error}") from None
        self.places = {known: at for known, at in self.places.items() if known[:len(keys)] != keys}
        self.places |= {keys: place} | {keys + tail: place for tail in inner}
        for depth in range(1, len(keys)):
            self.places.setdefault(keys[:depth], place)


def read(path: str | Path) -> Document:
    """The mapping in a YAML file. SettingsError for a file that cannot be read, bad YAML, duplicate keys."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise SettingsError(f"{path}:{line}: is not UTF-8 text; is this a YAML file?") from None
    except OSError as error:
        raise SettingsError(f"{path}:1: cannot be read: {error.strerror}") from None
    data, places = _parse(text, lambda line: f"{path}:{line}")
    if data is None:
        raise SettingsError(f"{path}:1: the file is empty; `tomoatlas init` writes one to start from")
    if not isinstance(data, dict):
        raise SettingsError(f"{path}:1: settings are `key: value` lines, this is {shape(data)}")
    return Document(data, {(): f"{path}:1"} | places)


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2: 1e-3 is a number, `no` and dates are words, so are 010 and 1_000."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every word that `_Loader` or an ordinary YAML reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_CORE = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
              r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
}
for _tag, (_pattern, _first) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _regexp = re.compile(f"^(?:{_pattern})$")
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regexp, list(_first))


def _parse(text: str, at: Callable[[int], str]) -> tuple[Any, dict[Keys, str]]:
    """Plain data and the places of its keys; `at` names a line."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        places: dict[Keys, str] = {}
        problems = list(_walk(node, (), at, places))
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        lines = text.splitlines()
        if "\t" in (lines[line] if line < len(lines) else ""):
            raise SettingsError(f"{at(line + 1)}: there is a tab; YAML wants spaces") from None
        raise SettingsError(f"{at(line + 1)}: not valid YAML: {error.problem or error.context}; is a bracket "
                            "open, or a colon without its space, here or just above?") from None
    except yaml.reader.ReaderError as error:
        line = text[:error.position].count("\n") + 1
        raise SettingsError(f"{at(line)}: holds a character that is not text; is this a YAML file?") from None
    except RecursionError:
        raise SettingsError(f"{at(1)}: an anchor contains itself, or lists are nested too deeply") from None
    if problems:
        raise SettingsError(*problems)
    return data, places


def _walk(node: yaml.Node, keys: Keys, at: Callable[[int], str], places: dict[Keys, str]) -> Iterator[str]:
    """Note the place of everything below `node`; a problem for each key that is no word or comes twice."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[*keys, index] = at(item.start_mark.line + 1)
            yield from _walk(item, (*keys, index), at, places)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                yield f"{at(line)}: {dotted(keys)}: a key must be a word, not {getattr(key, 'value', key)}"
                continue
            inner = (*keys, key.value)
            if key.value in lines:
                yield f"{at(line)}: {dotted(inner)}: is given twice, first in line {lines[key.value]}"
            lines[key.value] = line
            places[inner] = at(line)
            yield from _walk(value, inner, at, places)


def shape(value: Any) -> str:
    """What a value is, in a word or two, for messages."""
    if value is None:
        return "nothing"
    if isinstance(value, (dict, BaseModel)):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, bool):
        return "true or false"
    return "a word" if isinstance(value, str) else "a number"


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, (str, int, float, bool)):
        return _scalar(type(value).__name__, value)
    return _dumped(value)


@lru_cache(4096)
def _scalar(kind: str, value: str | float) -> str:
    """A number or a word: an atlas writes the same ones again and again. kind: 1, 1.0 and True are equal keys."""
    return _dumped(value)


def _dumped(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**6,
                          allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def write(model: BaseModel, comments: bool, indent: str = "") -> str:
    """A model as YAML, one line per setting; with comments each has its description, set or not.

    Models with `flow = True` and mappings of numbers stay on one line; one of lists (the grid) does not.
    """
    lines = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        note = _note(field) if comments else ""
        if value is None:
            example = (field.examples or ["null"])[0]
            lines += [_line(f"{indent}# {name}: {example}", note)] if comments else []
        elif isinstance(value, BaseModel) and not getattr(value, "flow", False):
            lines += [_line(f"{indent}{name}:", note), write(value, comments, indent + "  ")]
        elif isinstance(value, dict) and value and all(isinstance(item, list) for item in value.values()):
            lines += [_line(f"{indent}{name}:", note)]
            lines += [f"{indent}  {flow(key)}: {flow(item)}" for key, item in value.items()]
        else:
            lines.append(_line(f"{indent}{name}: {flow(plain(value))}", note))
    return "\n".join(line.rstrip("\n") for line in lines) + "\n"


def plain(value: Any) -> Any:
    """Models inside lists and mappings to plain data, leaving out what is None."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def _note(field: Any) -> str:
    unit = (field.json_schema_extra or {}).get("unit", "-")
    return f"{field.description}" + ("" if unit == "-" else f" [{unit}]")


def _line(text: str, note: str) -> str:
    """A setting with its comment behind it, or before it where that would be too long to read."""
    if not note:
        return text
    line = f"{text:<36} # {note}"
    indent = text[:len(text) - len(text.lstrip())]
    return line if len(line) <= 110 else f"{indent}# {note}\n{text}"
