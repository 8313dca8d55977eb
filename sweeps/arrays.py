"""The atlas as named arrays, from the settings and the journal's history alone; `atlas.py` writes them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sweeps import grid, settings, winners
from sweeps.grid import Cell
from sweeps.journal import History, Row
from sweeps.settings import Sweep
from sweeps.winners import Entry
from sweeps.yamlio import flow

STRING = np.dtypes.StringDType()
WORDS = {  # units and long names of what is not a setting
    "element": ("", "element"),
    "iterations": ("1", "iterations"),
    "checkpoint": ("1", "iterations at the checkpoint"),
    "checkpoint_objective": ("1", "objective at the checkpoint"),
    "objective": ("1", "objective, lower is better"),
    "nrmse": ("1", "normalised root-mean-square error, mean over elements"),
    "nrmse_element": ("1", "normalised root-mean-square error of each element"),
    **{f"metric_share{kind}": ("%", f"{words} of each element's concentration{how}") for kind, words, how in (
        ("", "mean", ""), ("_sigma", "sigma", ""), ("_measured", "mean", ", as measured"),
        ("_sigma_measured", "sigma", ", as measured"))},
    "metric_ssim": ("1", "SSIM's structure term of each element (HEBT, Eq. 19)"),
    "metric_ssim_windowed": ("1", "SSIM over windows of each element (Wang et al., 2004)"),
    "metric_mse": ("1", "mean squared error of each element, to the truth's maximum of 1 and at the best scale"),
    "metric_weight_ssim": ("1", "SSIM's structure term of each element's weight fraction"),
    "metric_weight_mse": ("1", "mean squared error of each element's weight fraction"),
    **{f"metric_{kind}_percent{sigma}": ("%", f"{words} of each element's {kind} fraction in the specimen")
       for kind in ("weight", "atomic") for sigma, words in (("", "mean"), ("_sigma", "sigma"))},
    "metric_specimen_voxels": ("1", "voxels of the specimen, whose fractions are told"),
    "metric_threshold": ("1", "summed map above which the specimen is"),
    "metric_threshold_found": ("1", "1 where the specimen has a clear edge, 0 where Otsu's threshold was taken"),
    "metric_response": ("1", "HAADF per count of each element (HEBT, Eq. 15)"),
    "metric_average_standard_error": ("1", "mean standard error of the concentrations in the specimen"),
    "metric_average_relative_error": ("%", "mean standard error of the elements' shares in the specimen"),
    "metric_error_residual": ("1", "worst residual of conjugate gradients for the standard errors"),
    "metric_r_squared": ("1", "R^2 of HAADF as a sum of the maps"),
    "metric_r_squared_smooth": ("1", "R^2 of HAADF as a sum of the maps, both smoothed"),
    **{f"metric_dose_{name}": ("e/A^2", words) for name, words in (
        ("haadf", "electrons that the HAADF series took"), ("chem", "electrons that the maps took"),
        ("total", "electrons that both took"), ("conventional", "electrons that a map at each tilt would have taken"))},
    **{f"metric_{true}particles": ("1", f"particles{words}") for true, words in (("", ""), ("true_", " of the truth"))},
    "metric_particles_cut": ("1", "particles that reach the end of the volume"),
    **{f"metric_{true}diameter{sigma}": ("nm", f"{kind} of the diameters of whole particles{words}") for true, words in
       (("", ""), ("true_", " of the truth")) for sigma, kind in (("", "mean"), ("_sigma", "sigma"))},
    **{f"metric_resolved{haadf}{part}": ("nm", f"resolution of {words}, two halves of the tilts to 0.143{where}")
       for haadf, words in (("", "each element"), ("_haadf", "HAADF alone"))
       for part, where in (("", ""), ("_z", ", within 30 degrees of z"))},
    "metric_shell": ("nm", "thickness of the shell"),
    "metric_shell_se": ("nm", "standard error of the shell's thickness"),
    "metric_rmsd": ("pm", "root-mean-square distance of traced atoms from the true ones"),
    "metric_tracing_error": ("%", "atoms missed, invented or wrongly named"),
    "metric_classification": ("%", "found atoms that are rightly named"),
    "metric_defocus": ("nm", "defocus, as refined"),
    "metric_moved": ("pm", "root-mean-square correction of scan positions"),
    "metric_shift_error": ("pixel", "root-mean-square error of the tilts' shifts"),
    **{f"metric_{turn}_error": ("degree", f"root-mean-square error of the tilts' turns about {words}")
       for turn, words in (("inplane", "the beam"), ("tilt", "the tilt axis"), ("azimuth", "the axis across"))},
    **{f"metric_resolution_{axis}": ("nm", f"of the last lattice peak along {axis}") for axis in "zyx"},
    "metric_depth_one_tilt": ("nm", "resolution along the beam of one tilt's sections, against the truth"),
    "metric_depth_tomogram": ("nm", "resolution along the beam of the tomogram, against the truth"),
    "metric_agreement": ("1", "correlation of the volume with the lattice"),
    "metric_missing_sites": ("%", "sites of the lattice that were not found"),
    **{f"metric_displacement{axis}": ("pm", "mean displacement of the sites found" + words) for axis, words in (
        ("", ""), ("_z", ", along z"), ("_y", ", along y"), ("_x", ", along x"))},
    "metric_share_rmse": ("%", "root-mean-square error of concentrations"),
    "trials_done": ("1", "trials that have ended, well or not"),
    "failed": ("1", "trials that have failed"),
    "seconds": ("s", "time spent on trials"),
    "cell": ("", "cell of the grid"),
    "trial": ("1", "number of the trial in its cell"),
    "attempt": ("1", "attempt that gave the result"),
    "kind": ("", "baseline or search"),
    "fidelity": ("1", "share of the iterations; below 1 a cheap trial, which cannot win"),
    "batch": ("1", "trials that were solved together"),
    "changes": ("", "settings a baseline changes, as JSON"),
    "worker": ("", "worker that gave the result"),
    "status": ("", "ok, or why the trial failed; empty while it has not ended"),
}


@dataclass(frozen=True)
class Variable:
    """An array with the names of its axes and its attributes (units, long_name)."""

    dims: tuple[str, ...]
    values: np.ndarray
    attributes: dict[str, str]


Variables = dict[str, Variable]


class Table:
    """Arrays over common axes, each made when its first value is put; what is never put is NaN, -1 or ""."""

    def __init__(self, dims: tuple[str, ...], shape: tuple[int, ...], elements: Sequence[str]) -> None:
        self.dims, self.shape, self.elements = dims, shape, elements
        self.made: Variables = {}

    def put(self, name: str, index: tuple[int, ...], value: Any, setting: str = "") -> None:
        """A number or a word, None for a gap; of a setting, its dotted name gives units and long name."""
        if name not in self.made:
            self.made[name] = Variable(self.dims, self._gaps(value), attributes(name, setting))
        if value is not None:
            self.made[name].values[index] = value

    def fill(self, name: str, values: Sequence[Any] | np.ndarray, setting: str = "") -> None:
        """All values at once, of numbers or words."""
        words = len(values) > 0 and isinstance(values[0], str)
        made = np.array(values, STRING) if words else np.asarray(values)
        self.made[name] = Variable(self.dims, made, attributes(name, setting))

    def put_elements(self, name: str, index: tuple[int, ...], values: Mapping[str, float | None]) -> None:
        """One number per element."""
        if name not in self.made:
            gaps = np.full((*self.shape, len(self.elements)), np.nan)
            self.made[name] = Variable((*self.dims, "element"), gaps, attributes(name))
        for element, value in values.items():
            if value is not None:
                self.made[name].values[(*index, self.elements.index(element))] = value

    def _gaps(self, value: Any) -> np.ndarray:
        if isinstance(value, str):
            return np.full(self.shape, "", STRING)
        return np.full(self.shape, -1) if isinstance(value, np.integer) else np.full(self.shape, np.nan)


def atlas(sweep: Sweep, cells: Sequence[Cell], history: History) -> Variables:
    """What each cell reached, over the axes of the grid.

    objective, nrmse, metric_<name>: of the best trial; per element with a last axis `element`.
    best_<tunable>: where it was found.
    With solver.record all these have an axis `iterations`: the best at each checkpoint.
    baseline_<method>, baseline_<method>_best: at a baseline's last and best iteration.
    trials_done, failed, seconds: what the cell has cost.
    """
    axes = {axis: coordinate(values) for axis, values in grid.axes(sweep).items()}
    names, stops = _elements(cells, history), _stops(sweep)
    dims, shape = tuple(axes), tuple(len(values) for values in axes.values())
    plain = Table(dims, shape, names)
    deep = Table((*dims, "iterations"), (*shape, len(stops)), names) if stops else plain
    for cell in cells:
        rows = list(history.cell(cell.id).rows.values())
        own = [row for row in rows if winners.eligible(cell, row)]
        for i, stop in enumerate(stops or [None]):
            index = cell.index if stop is None else (*cell.index, i)
            found = _entries(own, stop)
            best = found[winners.choose(cell, found)] if found else NOTHING
            _scores(deep, index, best)
            _params(deep, index, best, cell, "best_")
        _baselines(plain, cell, rows)
        _effort(plain, cell.index, [row.result for row in rows if row.result])
    deep.made["objective"].attributes.update(objective=sweep.search.objective, direction="minimise")
    return _coordinates(axes, names, iterations=stops) | plain.made | deep.made


def trials(sweep: Sweep, cells: Sequence[Cell], history: History) -> Variables:
    """One row per planned trial, in the order of the cells; what has not ended holds NaN, -1 and ""."""
    axes = {axis: coordinate(values) for axis, values in grid.axes(sweep).items()}
    names = _elements(cells, history)
    places = [(cell, trial) for cell in cells
              for trial in range(max(grid.trials(cell), len(history.cell(cell.id).rows)))]
    results = _results(cells, history)
    stops = sorted({stop["iterations"] for result in results for stop in result["checkpoints"]})
    table = Table(("row",), (len(places),), names)
    curves = Table(("row", "checkpoint"), (len(places), len(stops)), names)
    table.fill("cell", [cell.id for cell, _ in places])
    table.fill("trial", np.array([trial for _, trial in places]))
    for axis, values in axes.items():
        position = list(axes).index(axis)
        table.fill(axis, values[[cell.index[position] for cell, _ in places]], axis)
    table.fill("status", [""] * len(places))
    for number, (cell, trial) in enumerate(places):
        row = history.cell(cell.id).rows.get(trial)
        if row and row.result:
            table.put("status", (number,), row.result["status"])
            _trial(table, (number,), cell, row)
            for stop in row.result["checkpoints"]:
                column = stops.index(stop["iterations"])
                curves.put("checkpoint_objective", (number, column), stop["objective"])
    return _coordinates({}, names, checkpoint=stops) | table.made | curves.made


def coordinate(values: Sequence[Any]) -> np.ndarray:
    """Values of an axis: numbers where all are numbers, else labels."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return np.array(values)
    return np.array([value if isinstance(value, str) else flow(value) for value in values], STRING)


def attributes(name: str, setting: str = "") -> dict[str, str]:
    """units and long_name of a variable; those of a setting (or an axis) from its model."""
    if setting:
        known, path = _settings(), settings.setting_of(setting)
        while path not in known and "." in path:  # data.snr.haadf is described by data.snr
            path = path.rpartition(".")[0]
        units, words = known.get(path, ("1", setting))
    elif name.startswith("baseline_"):
        method = name.removeprefix("baseline_")
        units, words = "1", f"objective of {method.replace('_best', ' at its best iteration')}"
    else:
        units, words = WORDS.get(name, ("1", name.removeprefix("metric_").replace("_", " ")))
    return {"long_name": words, **({"units": units} if units else {})}


@functools.cache
def _settings() -> dict[str, tuple[str, str]]:
    """Unit and description of every setting."""
    known = {}
    for name, model in settings.fields():
        extra = model.json_schema_extra
        unit = str(extra["unit"]) if isinstance(extra, dict) else "-"
        known[name] = ("1" if unit == "-" else unit, model.description or name)
    return known


def _coordinates(axes: Mapping[str, np.ndarray], elements: Sequence[str], **stops: Sequence[int]) -> Variables:
    made = {axis: Variable((axis,), values, attributes(axis, axis)) for axis, values in axes.items()}
    if elements:
        made["element"] = Variable(("element",), np.array(elements, STRING), attributes("element"))
    for name, numbers in stops.items():
        if numbers:
            made[name] = Variable((name,), np.array(numbers), attributes(name))
    return made


def _stops(sweep: Sweep) -> list[int]:
    """The axis `iterations` of the atlas; empty where the sweep records no checkpoints."""
    if not sweep.solver.record:
        return []
    last = sweep.solver.iterations
    return sorted({*sweep.solver.record, *([last] if isinstance(last, int) else [])})


def _results(cells: Sequence[Cell], history: History) -> Iterator[dict[str, Any]]:
    """Results in the order of cells and trials, whatever order they came in."""
    for cell in cells:
        rows = history.cell(cell.id).rows
        yield from (result for trial in sorted(rows) if (result := rows[trial].result) is not None)


def _elements(cells: Sequence[Cell], history: History) -> list[str]:
    """Names of the elements that results speak of, in their order."""
    return list(dict.fromkeys(name for result in _results(cells, history)
                              for values in result["elements"].values() for name in values))


NOTHING: Entry = {"objective": None, "metrics": {}, "elements": {}, "params": {}}


def _entry(row: Row, checkpoint: Mapping[str, Any] | None = None) -> Entry:
    return {**(row.result or {}), **(checkpoint or {}), "params": row.ask["params"]}


def _entries(rows: Sequence[Row], stop: int | None) -> list[Entry]:
    """What the trials reached: in the end, or at a number of iterations that they recorded or ended at."""
    if stop is None:
        return [_entry(row) for row in rows]
    passed = [_entry(row, passed) for row in rows for passed in (row.result or {})["checkpoints"]]
    return [entry for entry in [*passed, *map(_entry, rows)] if entry["iterations"] == stop]


def _scores(table: Table, index: tuple[int, ...], entry: Entry) -> None:
    table.put("objective", index, entry["objective"])
    for name, value in entry["metrics"].items():
        table.put("nrmse" if name == "nrmse" else f"metric_{name}", index, value)
    for name, values in entry["elements"].items():
        label = "nrmse_element" if name == "nrmse" else f"metric_{name}"
        table.put_elements(f"{label}_element" if name in entry["metrics"] and name != "nrmse" else label,
                           index, values)


def _params(table: Table, index: tuple[int, ...], entry: Entry, cell: Cell, prefix: str = "") -> None:
    for name in cell.space:
        table.put(prefix + name.rpartition(".")[2], index, entry["params"].get(name), name)


def method(cell: Cell, row: Row) -> str:
    """The method of a trial."""
    return str(row.ask["params"].get("solver.method", cell.sweep.solver.method))


def last_and_best(row: Row) -> dict[str, float | None]:
    """The objective of a trial at its last iteration, and at the best of its checkpoints."""
    result = row.result or {"checkpoints": [], "iterations": 0}
    stops = {stop["iterations"]: stop["objective"] for stop in result["checkpoints"] if stop["objective"] is not None}
    return {"last": stops.get(result["iterations"], row.objective), "best": min(stops.values(), default=row.objective)}


def _baselines(table: Table, cell: Cell, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.ok and not row.own(bool(cell.space)):
            reached = last_and_best(row)
            table.put(f"baseline_{method(cell, row)}", cell.index, reached["last"])
            table.put(f"baseline_{method(cell, row)}_best", cell.index, reached["best"])


def _effort(table: Table, index: tuple[int, ...], results: Sequence[dict[str, Any]]) -> None:
    table.put("trials_done", index, np.int64(len(results)))
    table.put("failed", index, np.int64(sum(result["status"] != "ok" for result in results)))
    table.put("seconds", index, math.fsum(result["seconds"] or 0.0 for result in results))


def _trial(table: Table, index: tuple[int, ...], cell: Cell, row: Row) -> None:
    """What is known of a trial that has ended."""
    result: dict[str, Any] = row.result or {}
    entry = _entry(row)
    _scores(table, index, entry)
    _params(table, index, entry, cell)
    for name in ("attempt", "iterations"):
        table.put(name, index, np.int64(result[name] or 0))
    for name in ("seconds", "worker"):
        table.put(name, index, result[name])
    table.put("fidelity", index, row.fidelity)
    table.put("batch", index, np.int64(result.get("batch", 1)))
    changes = {name: value for name, value in row.ask["params"].items() if name not in cell.space}
    table.put("kind", index, row.ask["kind"])
    table.put("method", index, method(cell, row), "solver.method")
    table.put("changes", index, json.dumps(changes) if changes else "")
