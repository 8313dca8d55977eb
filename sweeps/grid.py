"""Axes of the grid become cells; each cell knows what is searched in it and which trials are fixed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sweeps.patterns import Recorded, Scanned
from sweeps.rules import HAADF_METHODS, LINEAR, tunables
from sweeps.settings import Hebt, Measured, Range, Search, Sweep, dump, replace, setting_of
from sweeps.yamlio import flow

# What the chemical maps alone do not feel; ML and SIRT feel no weight at all.
HAADF_SETTINGS = ("solver.gamma", "solver.lambda_model", "solver.alpha", "solver.differences")
MAPS_ONLY = ("ml", "sirt")
CONVENTIONAL_METHODS = (*MAPS_ONLY, "chem_tv", "eds", "sset", "sspt", *LINEAR)  # that see no HAADF, or one slice
STOPPED = (*MAPS_ONLY, "eds", "hebt")  # noise grows with the iterations: as good as the best of those recorded
# F3's conventional tomography is Poisson ML at 100 iterations; recording each gives its best iteration too.
CONVENTIONAL: dict[str, Any] = {
    "solver.method": "ml", "solver.iterations": 100, "solver.record": list(range(1, 101))}

# Shared search: of three trials two are cheap, with a tenth of the iterations, and only the full one may win. At 64^3,
# 24 settings drawn over six and four decades and 60 iterations after coarse solves, the ranks of the NRMSE after 3, 5,
# 8 and 12 iterations correlate with those at the end by .81, .89, .91 and .94, and each had the best setting first. On
# 4 cells full trials alone came within 8.8 % of the optimum, where 4 full and 8 cheap ones, for the same iterations,
# came within 5.0 % (a solver without coarse solves, a fifth of the iterations).
CHEAP = 0.1
PERIOD = 3


@dataclass(frozen=True)
class Dimension:
    """One searched setting: a range from `low` to `high` on a scale, or a tuple of choices."""

    low: float = 0.0
    high: float = 1.0
    scale: str = "linear"
    integer: bool = False
    choices: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    id: unique, fit for a file name: "haadf_tilts=9,chem_tilts=5", or "all" where there is no grid.
    index: position along each axis.
    coordinates: value along each axis, in the order of the YAML.
    sweep: the settings with the coordinates put in and no grid; what is searched is still a range.
    space: what the optimiser searches, by dotted setting.
    fixed: settings of the trials made before the search and never told to the optimiser.
    """

    id: str
    index: tuple[int, ...]
    coordinates: dict[str, Any]
    sweep: Sweep
    space: dict[str, Dimension]
    fixed: tuple[dict[str, Any], ...]


def axes(sweep: Sweep) -> dict[str, list[Any]]:
    """The axes of the atlas and their values, in the order of the YAML."""
    return dict(sweep.grid)


def cells(sweep: Sweep) -> list[Cell]:
    """Every point of the grid, the last axis fastest."""
    labels = {axis: _labels(values) for axis, values in sweep.grid.items()}
    made = []
    for index in itertools.product(*(range(len(values)) for values in sweep.grid.values())):
        places = list(zip(sweep.grid, index, strict=True))
        coordinates = {axis: sweep.grid[axis][i] for axis, i in places}
        name = ",".join(f"{axis}={labels[axis][i]}" for axis, i in places)
        made.append(_cell(name or "all", index, coordinates, sweep))
    return made


def trials(cell: Cell) -> int:
    """Rows planned for a cell: its fixed trials, and the budget of its search."""
    return len(cell.fixed) + (cell.sweep.search.trials if cell.space else 0)


def fidelity(search: Search, number: int) -> float:
    """The share of solver.iterations that search trial `number` of a cell has, where trials come one by one."""
    return 1.0 if search.strategy == "per_cell" or number % PERIOD == PERIOD - 1 else CHEAP


def effort(cell: Cell) -> float:
    """What the search of a cell costs, in full trials."""
    return math.fsum(fidelity(cell.sweep.search, k) for k in range(cell.sweep.search.trials)) if cell.space else 0.0


def conventional(sweep: Sweep) -> bool:
    """Whether a sweep without a grid reconstructs from the maps alone, for want of HAADF images."""
    data = sweep.data
    if isinstance(data, Scanned | Recorded):
        return False
    return data.haadf_tilts == 0 or (isinstance(data, Measured) and data.haadf is None)


def maps_alone(sweep: Sweep) -> bool:
    """Whether a sweep without a grid makes no use of HAADF images, be there any or not."""
    solver = sweep.solver
    return solver.method in CONVENTIONAL_METHODS or (isinstance(solver, Hebt) and solver.alpha == 0)


def space_difference(old: Sweep, new: Sweep) -> str:
    """Why the results of `old` cannot be continued as `new`, one line per setting; "" when they can.

    The name, what is kept, limits of time, more trials and (in free order) what is in flight and in a batch may change.
    """
    lines = list(_differences(_flat(dump(old)), _flat(dump(new))))
    if not lines and list(old.grid) != list(new.grid):
        lines = [f"grid: the axes were in the order {', '.join(old.grid)}, now {', '.join(new.grid)}"]
    return "\n".join(lines)


def _cell(name: str, index: tuple[int, ...], coordinates: dict[str, Any], sweep: Sweep) -> Cell:
    changes: dict[str, Any] = {"grid": {}} | {setting_of(axis): value for axis, value in coordinates.items()}
    sweep = replace(sweep, changes)
    changes, fixed = {}, []
    method = sweep.solver.method
    if method in MAPS_ONLY:
        unused = set(tunables(sweep))
        if not sweep.solver.record:
            changes["solver.record"] = list(range(1, sweep.solver.iterations + 1))
    elif method in LINEAR:
        felt = {"solver.threshold"} | ({"solver.lambda_tv"} if method == "resire" else set())
        unused = set(tunables(sweep)) - felt
    elif method == "sset":
        unused = {"solver.binning"} & set(tunables(sweep))
    elif conventional(sweep) or method not in HAADF_METHODS:
        unused = set(HAADF_SETTINGS) & set(tunables(sweep))
    else:
        unused = set()
    if conventional(sweep) and method not in MAPS_ONLY:
        changes["solver.method"] = "eds" if sweep.system == "hebt" else "chem_tv"
        alone = isinstance(sweep.data, Measured) and sweep.data.alone
        fixed += [] if sweep.system == "hebt" or alone else [dict(CONVENTIONAL)]
    # A range that nothing searches gives way to the field's default, which nothing feels either.
    defaults = {f"solver.{key}": field.default for key, field in type(sweep.solver).model_fields.items()}
    sweep = replace(sweep, changes | {key: defaults[key] for key in unused})
    space = {key: _dimension(value) for key, value in tunables(sweep).items()}
    return Cell(name, index, coordinates, sweep, space, (*fixed, *([] if space else [{}])))


def _dimension(value: Range) -> Dimension:
    """Integers are searched where the setting is a whole number, whatever its ends look like."""
    integer = all(isinstance(end, int) for end in value.values)
    if value.choice is not None:
        return Dimension(integer=integer, choices=tuple(value.choice))
    low, high = value.values
    return Dimension(low, high, value.scale, integer)


def _labels(values: list[Any]) -> list[str]:
    """A short, unique text for each value of an axis, of characters that a file name can hold."""
    texts = [re.sub(r"[^A-Za-z0-9_.+-]+", "_", flow(value)).strip("_")[:40] for value in values]
    return [f"{text}+{i}" if texts.count(text) > 1 or not text else text for i, text in enumerate(texts)]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings to dotted settings; a range stays whole."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, dict) and not value.keys() & {"low", "choice"}
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    free = old.get("search.order") == new.get("search.order") == "free"
    may_change = {"name", "output.save", "search.budget_hours", "search.trial_timeout"}
    may_change |= {"search.in_flight", "search.batch"} if free else set()
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)  # None: not given
        if before == after or key in may_change:
            continue
        if key == "search.trials" and before and after:
            if after < before:
                yield f"search.trials: was {before}, now {after}; a budget may grow, not shrink"
        else:
            yield f"{key}: {_told('was', before)}, {_told('now', after)}"


def _told(verb: str, value: Any) -> str:
    return f"{verb} not given" if value is None else f"{verb} {flow(value)}"
