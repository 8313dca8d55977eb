"""Settings of a sweep: a YAML file to a checked `Sweep`, every problem with file, line, path and next step.

    sweep = load("sweep.yaml", ["data.size=64"])       # SettingsError, one line per problem
    get(sweep, "solver.gamma"), replace(sweep, {"solver.gamma": 1.7}), load(dump(sweep)) == sweep
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sweeps.fields import TAGS, Range
from sweeps.patterns import Mset, Mspt, Recorded, Scanned
from sweeps.rules import Problem, conflicts, tunables
from sweeps.schema import Fused3D, Hebt, Output, Particle, Phantom, Search, Sweep
from sweeps.sources import Measured, Source
from sweeps.yamlio import Document, Keys, SettingsError, dotted, flow, put, read, shape, split, write

__all__ = ["Fused3D", "Hebt", "Measured", "Mset", "Mspt", "Output", "Particle", "Phantom", "Range", "Recorded",
           "Scanned", "Search", "SettingsError", "Source", "Sweep", "dump", "fields", "get", "load", "replace",
           "setting_of", "template", "to_yaml", "tunables"]

SHORT = {name: f"data.{name}" for name in ("haadf_tilts", "chem_tilts", "replicate", "tilt_range", "size")}
SHORT |= {name: f"solver.{name}" for name in ("gamma", "method")}
NOT_AXES = ("name", "grid", "output")


# ---- The public verbs


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in a YAML file, or in a mapping as `dump` makes it, after `key=value` overrides.

    A relative data.root is taken from the YAML's folder, or from the current one if an override gives it.
    Raises SettingsError with one line per problem.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    document = read(path) if path else Document(copy.deepcopy(dict(source)), {})  # type: ignore[arg-type]
    for text in overrides:
        document.override(text)
    _anchor(document, path)
    sweep = _checked(document)
    for text in overrides:
        name = text.partition("=")[0].strip()
        axis = next((axis for axis in sweep.grid if setting_of(axis) == name), None)
        if axis:
            raise SettingsError(f"--set {text}: {name}: the grid overrules it; write --set grid.{axis}=[...]")
    sweep._path, sweep._document = path, document
    return sweep


def dump(sweep: Sweep) -> dict[str, Any]:
    """Plain data, for YAML and JSON: every setting but those that are not given and have no default."""
    return sweep.model_dump(exclude_none=True)


def to_yaml(sweep: Sweep, comments: bool = False) -> str:
    """YAML text; with comments every setting has its description and unit."""
    return write(sweep, comments)


def template(system: str = "fused3d", measured: bool = False) -> str:
    """A commented YAML to start from, for simulated or for measured data."""
    simulated, axes = _SIMULATED.get(system, _SIMULATED["fused3d"])
    example = {"name": "my-sweep", "system": system, "solver": _SEARCHED.get(system, _SEARCHED["fused3d"]),
               "data": _MEASURED.get(system, _MEASURED["fused3d"]) if measured else simulated,
               "grid": {} if measured else axes,
               "search": {"objective": "heldout"} if measured else {}}
    return write(_checked(Document(example, {})), comments=True)


def get(sweep: Sweep, name: str) -> Any:
    """The value of a dotted setting; KeyError where there is none."""
    value: Any = sweep
    for key in split(name):
        known = isinstance(value, BaseModel) and key in type(value).model_fields
        if not known and not (isinstance(value, dict) and key in value):
            raise KeyError(name)
        value = getattr(value, str(key)) if known else value[key]
    return value


def replace(sweep: Sweep, changes: Mapping[str, Any]) -> Sweep:
    """The sweep with dotted settings changed, checked anew; SettingsError."""
    document = Document(_changed(dump(sweep), changes), sweep._document.places if sweep._document else {})
    changed = _checked(document)
    changed._path, changed._document = sweep._path, sweep._document
    return changed


def setting_of(axis: str) -> str:
    """The dotted setting that an axis of the grid stands for: chem_tilts is data.chem_tilts."""
    return SHORT.get(axis, axis)


def fields(model: type[BaseModel] = Sweep, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting there is, with its pydantic field; both kinds of data."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for inner in _models(field.annotation):
            yield from fields(inner, f"{prefix}{name}.")


# ---- Checks


def _checked(document: Document) -> Sweep:
    """A sweep whose fields, axes and every cell are sound."""
    try:
        sweep = Sweep.model_validate(document.data)
    except ValidationError as error:
        raise SettingsError(*(document.problem(*_sentence(detail)) for detail in error.errors())) from None
    problems = list(_axis_problems(sweep)) or list(_cell_problems(sweep))
    if problems:
        raise SettingsError(*(document.problem(keys, text) for keys, text in problems))
    return sweep


def _anchor(document: Document, path: Path | None) -> None:
    """Make data.root of measured data, and search.atlas, absolute, so that a worker elsewhere finds the files."""
    search = document.data.get("search")
    if isinstance(search, dict) and isinstance(search.get("atlas"), str):
        given_here = document.place(("search", "atlas")).startswith("--set")
        base = path.parent if path and not given_here else Path()
        search["atlas"] = str((base / Path(search["atlas"]).expanduser()).resolve())
    data = document.data.get("data")
    if not isinstance(data, dict) or not data.keys() & {"chem", "haadf", "scan"} or "phantom" in data:
        return
    if isinstance(data.get("root", "."), str):
        given_here = document.place(("data", "root")).startswith("--set") and "root" in data
        base = path.parent if path and not given_here else Path()
        data["root"] = str((base / Path(data.get("root", ".")).expanduser()).resolve())


def _changed(data: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        put(data, split(name), value)
    return data


def _settable(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names below a model or a mapping that an axis may vary."""
    if isinstance(value, BaseModel) and not isinstance(value, Range):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    elif not isinstance(value, dict):
        yield prefix
        return
    for name, inner in value.items():
        yield from _settable(inner, f"{prefix}.{name}" if prefix else name)


def _axis_problems(sweep: Sweep) -> Iterator[Problem]:
    """Axes that do not name a setting, and values that the setting refuses."""
    names = [name for name in _settable(sweep) if name.split(".")[0] not in NOT_AXES]
    seen: dict[str, str] = {}
    for axis, values in sweep.grid.items():
        keys, name = ("grid", axis), setting_of(axis)
        twin = seen.setdefault(name, axis)
        if name not in names:
            yield keys, f"is no setting of this sweep{_hint(axis, [*SHORT, *names])}"
        elif twin != axis:
            yield keys, f"is the same setting as the axis {twin}; keep one"
        elif isinstance(get(sweep, name), Range):
            yield keys, f"{name} is both searched and an axis of the grid; keep one of the two"
        elif not values:
            yield keys, "has no values; list at least one, or leave the axis out"
        for index in range(len(values) if name in names else 0):
            yield from (((*keys, index), text) for text in _value_problems(sweep, name, values, index))


def _value_problems(sweep: Sweep, name: str, values: list[Any], index: int) -> Iterator[str]:
    value = values[index]
    if isinstance(value, Range | dict):
        yield "a range cannot be a value of an axis; list the values"
    elif value in values[:index]:
        yield f"the value {flow(value)} is given twice"
    else:
        try:
            Sweep.model_validate(_changed(dump(sweep), {name: value}))
        except ValidationError as error:
            sentences = map(_sentence, error.errors())
            yield from (text for keys, text in sentences if dotted(keys).startswith(name))


def _cell_problems(sweep: Sweep) -> Iterator[Problem]:
    """What does not fit together, at the first cell of the grid where it does not."""
    names = {setting_of(axis): axis for axis in sweep.grid}
    found: dict[Keys, tuple[str, str, int]] = {}
    for values in itertools.product(*(enumerate(values) for values in sweep.grid.values())):
        chosen = dict(zip(names, (value for _, value in values), strict=True))
        cell = Sweep.model_validate(_changed(dump(sweep), {"grid": {}} | chosen)) if chosen else sweep
        inside = ", ".join(f"{names[name]} {flow(value)}" for name, value in chosen.items())
        for keys, text in conflicts(cell):
            name = dotted(keys)
            if name in chosen:
                keys = ("grid", names[name], values[list(chosen).index(name)][0])
            first, where, count = found.get(keys, (text, inside, 0))
            found[keys] = first, where, count + 1
    everywhere = prod(map(len, sweep.grid.values()))
    for keys, (text, where, count) in found.items():
        yield keys, text if count == everywhere else f"{text} (in the cell {where})"


# ---- Sentences from pydantic's errors


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation, unions and mappings included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    """The settings beside the one at a pydantic location."""
    models: list[type[BaseModel]] = [Sweep]
    for key in location[:-1]:
        field = models[0].model_fields.get(str(key)) if models else None
        tagged = [model for model in models if key == f"<{model.__name__}>"]
        models = _models(field.annotation) if field else tagged or models
    return list(models[0].model_fields) if models else []


def _hint(name: str, near: list[str], far: Sequence[str] = ()) -> str:
    """The nearest name, or one elsewhere that ends alike, or all if they are few, to end a sentence."""
    close = get_close_matches(name, near, n=1) or [other for other in far if other.split(".")[-1] == name]
    if close:
        return f" (did you mean {' or '.join(dict.fromkeys(close))}?)"
    return f"; known: {', '.join(near)}" if len(near) < 15 else ""


def _sentence(error: ErrorDetails) -> Problem:
    """Where a pydantic error lies in the YAML, and its text in words."""
    keys: Keys = tuple(key for key in error["loc"] if key not in TAGS)
    value, rule = error["input"], error.get("ctx", {})
    got = f"{shape(value)}" if isinstance(value, dict | list | BaseModel) or value is None else flow(value)
    match error["type"]:
        case "extra_forbidden":
            far = [name for name, _ in fields() if name != dotted(keys)]
            text = f"unknown key{_hint(str(keys[-1]), _siblings(error['loc']), far)}"
        case "missing":
            text = "is missing"
        case "value_error":
            text = str(rule["error"])
        case "finite_number":
            text = f"must be a finite number, not {got}"
        case "literal_error":
            known = [word.strip("' ") for word in rule["expected"].replace(" or ", ",").split(",")]
            text = f"must be {rule['expected'].replace(chr(39), '')}, not {got}"
            text += _hint(str(value), known) if get_close_matches(str(value), known, n=1) else ""
        case "union_tag_invalid":
            text = f"must be {rule['expected_tags'].translate(_UNQUOTE).replace(', ', ' or ')}, not {got}"
            text += "; to search it write {low: , high: , scale: }" if keys[0] == "solver" else ""
        case "too_short":
            text = f"needs {rule['min_length']} or more entries, has {rule['actual_length']}"
        case "too_long":
            text = f"takes at most {rule['max_length']} entries, has {rule['actual_length']}"
        case kind if kind in _WANTED:
            text = f"must be {_WANTED[kind]}, not {got}"
        case kind if kind in _BOUNDS:
            word, key = _BOUNDS[kind]
            text = f"must be {word} {rule[key]:g}, not {got}"
        case _:
            text = error["msg"]
    return keys, text


_WANTED = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
           "string_type": "a word", "list_type": "a list",
           "dict_type": "a mapping", "model_type": "a mapping"}
_BOUNDS = {"greater_than": ("above", "gt"), "greater_than_equal": ("at least", "ge"),
           "less_than": ("below", "lt"), "less_than_equal": ("at most", "le")}
_UNQUOTE = str.maketrans("", "", "<>'")
_SEARCHED: dict[str, dict[str, Any]] = {  # settings of the solver, by system
    "fused3d": {"lambda_model": {"low": 1e-3, "high": 1e3, "scale": "log"},
                "lambda_tv": {"low": 1e-3, "high": 1e1, "scale": "log"}},
    "hebt": {"alpha": {"low": 0.1, "high": 0.98}, "differences": {"low": 0.02, "high": 1.0, "scale": "log"},
             "iterations": 40, "record": [5, 10, 15, 20, 30, 40]},
    "mspt": {"coupling": {"low": 1e-3, "high": 10.0, "scale": "log"}, "blur": {"low": 0.0, "high": 1.0}},
    "mset": {"step": {"low": 0.2, "high": 2.0, "scale": "log"},
             "lambda_tv": {"low": 1e-8, "high": 1e-5, "scale": "log"}},
}
_SIMULATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # data and grid, by system
    "fused3d": ({"phantom": "cocuo"}, {"haadf_tilts": [0, 9, 47], "chem_tilts": [5, 9, 13]}),
    "hebt": ({"phantom": "agau", "planes": 1}, {"data.dose": [3.121e6, 3.121e7, 3.121e8]}),
    "mspt": ({"phantom": "cuau", "probes": 12, "tilts": 24, "tilt_range": [-75, 75], "shift_error": 0.1,
              "inplane_error": 1.0}, {"data.dose": [2e5, 2e6], "solver.slices": [1, 5]}),
    "mset": ({"phantom": "cuau"}, {"data.dose": [2e4, 2e5, 2e6], "data.defocus": [-40, -20, 0]}),
    "fused2d": ({"phantom": "coscoo", "size": 128}, {"data.snr.haadf": [5, 20, 100], "data.snr.chem": [0.25, 1, 4]}),
}
_MEASURED: dict[str, dict[str, Any]] = {  # data, by system
    "mspt": {"scan": {"files": "tilt_*.hspy", "angles": "tilts.rawtlt", "step": 0.05, "aperture": 21.0,
                      "defocus": -20.0}},
    "mset": {"scan": {"files": "tilt_*.hspy", "angles": "tilts.rawtlt", "step": 0.05, "aperture": 21.0,
                      "defocus": -20.0}},
    "fused3d": {
        "pixel_size": 1.0,
        "haadf": {"path": "haadf.mrc", "axes": ["tilt", "y", "x"], "angles": "haadf.rawtlt"},
        "chem": {"path": "maps.npz", "key": "counts", "axes": ["element", "tilt", "y", "x"],
                 "angles": "key:angles", "elements": {"Co": 27, "O": 8}}},
    "fused2d": {
        "pixel_size": 1.0,
        "haadf": {"path": "map.bcf", "key": "HAADF", "axes": ["y", "x"]},
        "chem": {"path": "map.bcf", "key": "EDX", "axes": ["y", "x", "energy"], "elements": {
            "Co": {"number": 27, "window": [6.8, 7.05], "sides": [[6.1, 6.3], [7.2, 7.4]]},
            "O": {"number": 8, "window": [0.48, 0.57]}}}},
}
