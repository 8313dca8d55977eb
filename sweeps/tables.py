"""A run folder's results as numbers: what each cell reached, beside its baselines, along the grid's axes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from sweeps import flat, grid, journal, winners
from sweeps.atlas import RunFolder
from sweeps.grid import Cell
from sweeps.journal import History, RunError
from sweeps.settings import Sweep, tunables

METHODS = {
    "fused": "fused",
    "chem_tv": "chemistry + TV",
    "ml": "Poisson ML",
    "sirt": "SIRT",
    "plain": "fused, plain gradient",
    "fista": "fused, FISTA",
    "hebt": "HEBT",
    "eds": "SIRT of the maps alone",
    "mset": "MSET",
    "sset": "one slice (SSET)",
    "mspt": "MSPT",
    "sspt": "one slice (SSPT)",
    "resire": "dark field, RESIRE",
    "genfire": "dark field, GENFIRE",
}
TITLES = {
    "haadf_tilts": "HAADF tilts",
    "chem_tilts": "chemical tilts",
    "snr.haadf": "HAADF SNR",
    "snr.chem": "chemical SNR (factor)",
    "tilt_range": "tilt range [deg]",
    "size": "size [voxels]",
    "defocus": "defocus [nm]",
    "rmsd": "RMSD [pm]",
    "tracing_error": "tracing error [%]",
    "amplitude_error": "error of the amplitudes",
    "gamma": "gamma",
    "alpha": "alpha (HAADF)",
    "lambda_model": "λ HAADF",
    "lambda_chem": "λ chemistry",
    "lambda_tv": "λ TV",
    "nrmse": "NRMSE",
    "share_rmse": "RMSE of concentrations [%]",
    "missing_sites": "sites not found [%]",
    "heldout": "held-out deviance",
}
REPLICATE = "replicate"
GAINS = {"hebt": "HEBT / best of the maps alone", "mset": "many slices / best of the others with the same data",
         "mspt": "many slices / one"}


@dataclass(frozen=True)
class Score:
    """What a cell reached: series is "" for the cell itself, else the name of a baseline or of a stage."""

    series: str
    value: float
    metrics: dict[str, float]
    elements: dict[str, float]
    iterations: int


@dataclass(frozen=True)
class Entry:
    """One number of a table: the mean over `count` replicates and their standard deviation.

    For a single one `deviation` is the standard error over held-out folds, 0 where there is none.
    """

    value: float
    deviation: float
    count: int


@dataclass(frozen=True)
class Panel:
    """A table of at most two axes. Lines are (value of the row axis, series); entries by (*line, column)."""

    title: str
    row_axis: str
    column_axis: str
    lines: list[tuple[Any, str]]
    columns: list[Any]
    entries: dict[tuple[Any, str, Any], Entry]


@dataclass(frozen=True)
class Run:
    """Settings and finished trials of a run folder.

    history: what the journal knows. metric: "nrmse" where a truth is, else the objective's name.
    """

    folder: Path
    sweep: Sweep
    cells: list[Cell]
    history: History
    metric: str

    def rows(self, cell: Cell) -> list[dict[str, Any]]:
        """The finished trials of a cell in trial order: what was asked and what came out, together."""
        rows = self.history.cell(cell.id).rows
        return [{**rows[trial].ask, **result} for trial in sorted(rows) if (result := rows[trial].result)]

    def winner(self, cell: Cell) -> dict[str, Any] | None:
        """The best searched trial of a cell, or the best of its fixed ones where nothing is searched."""
        row = winners.winner(cell, self.history.cell(cell.id))
        return {**row.ask, **row.result} if row and row.result and row.objective is not None else None


def read(folder: Path) -> Run:
    """The Run of a run folder, while it grows or when it is finished; RunError where there is none."""
    names = RunFolder(folder)
    if not names.lock.exists():
        raise RunError(
            f"{folder}: is no run folder (it holds no {names.lock.name}); `tomoatlas run FILE` makes one, "
            "by default runs/<name> below the current folder"
        )
    events, _ = journal.read(names.journal)
    return collect(names.path, names.settings(), events)


def collect(folder: Path, sweep: Sweep, events: Iterable[dict[str, Any]]) -> Run:
    """A Run from the resolved settings and the events of a journal."""
    cells, history = grid.cells(sweep), History(events)
    run = Run(folder, sweep, cells, history, "nrmse")
    scored = any("nrmse" in (row.get("metrics") or {}) for cell in cells for row in run.rows(cell))
    return run if scored else replace(run, metric=sweep.search.objective)


def title(name: str) -> str:
    """Words for an axis, a setting or a metric: "data.snr.haadf" -> "HAADF SNR"."""
    short = name.removeprefix("data.").removeprefix("solver.")
    return TITLES.get(short, short.split(".")[-1].replace("_", " "))


def good(row: dict[str, Any]) -> bool:
    """Whether a trial ended with an objective that can be compared."""
    return row["status"] == "ok" and row["objective"] is not None and math.isfinite(row["objective"])


def scores(run: Run, cell: Cell) -> list[Score]:
    """The cell's own result first, then its baselines; SIRT and ML at the best and at the last iteration."""
    baselines = [row for row in run.rows(cell) if good(row) and row["kind"] == "baseline" and row["params"]]
    method = cell.sweep.solver.method
    found: list[Score] = []
    if best := run.winner(cell):
        name = METHODS[method] + (", searched" if cell.space else "")
        found += _stops(run, best, method, name if baselines else "")
    for row in baselines:
        found += _stops(run, row, row["params"]["solver.method"], METHODS[row["params"]["solver.method"]])
    return found


def _stops(run: Run, row: dict[str, Any], method: str, name: str) -> list[Score]:
    """One score, or for a method that must be stopped early two: where it was best, and where it ended."""
    stops = [stop for stop in row.get("checkpoints") or [] if stop["objective"] is not None]
    if method not in grid.STOPPED or len(stops) < 2:
        return [_score(run, name, row)]
    best = min(stops, key=lambda stop: stop["objective"])
    words = {"best iteration": best, f"{stops[-1]['iterations']} iterations": stops[-1]}
    return [_score(run, f"{name}, {word}".removeprefix(", "), stop) for word, stop in words.items()]


def _score(run: Run, series: str, source: Mapping[str, Any]) -> Score:
    """A row's, or one of its checkpoints', value of the metric that the run is judged by."""
    metrics = source["metrics"] or {}
    elements = (source["elements"] or {}).get(run.metric, {})
    value = metrics.get(run.metric)
    return Score(series, source["objective"] if value is None else value, metrics, elements, source["iterations"])


def pivot(run: Run) -> list[Panel]:
    """Tables of the metric: two axes each, replicates averaged, a panel for each point of the other axes."""
    axes = {name: values for name, values in grid.axes(run.sweep).items() if name != REPLICATE}
    pair = _pair(axes)
    rest = [name for name in axes if name not in pair]
    found: dict[tuple[Any, ...], dict[tuple[Any, str, Any], list[Score]]] = {}
    for cell in run.cells:
        at = {name: label(value) for name, value in cell.coordinates.items()}
        values = found.setdefault(tuple(at[name] for name in rest), {})
        for score in scores(run, cell):
            values.setdefault((at.get(pair[0], ""), score.series, at.get(pair[1], "")), []).append(score)
    rows, columns = ([label(value) for value in axes.get(name, [""])] for name in pair)
    # The largest number on top, as on the paper's map; what is no number, or in no order, as it is given.
    rows = rows[::-1] if all(map(_number, rows)) and sorted(rows) == rows else rows
    panels = []
    for key, values in found.items():
        words = ", ".join(f"{title(name)} {value}" for name, value in zip(rest, key, strict=True))
        lines = list(dict.fromkeys((row, series) for row in rows for at, series, _ in values if at == row))
        entries = {place: _entry(run.metric, those) for place, those in values.items()}
        panels.append(Panel(words, *pair, lines, columns, entries))
    return panels


def _entry(metric: str, found: list[Score]) -> Entry:
    values = [score.value for score in found]
    deviation = stdev(values) if len(values) > 1 else found[0].metrics.get(f"{metric}_se", 0.0)
    return Entry(mean(values), deviation, len(values))


def _pair(axes: dict[str, list[Any]]) -> tuple[str, str]:
    """Row axis, column axis: HAADF over chemical tilts as in F3 Fig. 4a, else the first two of the grid."""
    if "haadf_tilts" in axes and "chem_tilts" in axes:
        return "haadf_tilts", "chem_tilts"
    names = [*axes, "", ""]
    return names[0], names[1]


def label(value: Any) -> Any:
    """An axis value as a table shows it: numbers as they are, lists as words."""
    return "..".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A number with as many digits as a reader needs: 0.331, 17, 2.1e-05."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not _number(value):
        return str(label(value))
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.3f}" if 0.1 <= abs(value) < 100 else f"{value:.3g}"


def table(run: Run) -> str:
    """The metric along the grid with the baselines, the gain over them, and the winners: plain text."""
    parts = [_grid_text(run, panel) for panel in pivot(run)]
    parts.append(_gain_text(run))
    parts.append(_shares_text(run) if run.sweep.system == "fused2d" else "")
    parts.append(_fractions_text(run) if run.sweep.output.fractions else "")
    parts.append(_responses_text(run) if run.sweep.system == "hebt" else "")
    parts.append(_winners_text(run))
    parts.append(_starts_text(run))
    parts.append(_errors_text(run) if run.sweep.system == "fused3d" else "")
    parts.append(_notes_text(run))
    return "\n\n".join(part for part in parts if part)


def rivals(run: Run) -> list[tuple[Cell, Score, list[tuple[Cell, Score]]]]:
    """Every cell that uses HAADF, its score, and the scores of the conventional cells with the same maps."""
    scored = [(cell, scores(run, cell)) for cell in run.cells]
    conventional: dict[str, list[tuple[Cell, Score]]] = {}
    for cell, found in scored:
        if grid.maps_alone(cell.sweep):
            conventional.setdefault(_maps(cell), []).extend((cell, score) for score in found)
    return [
        (cell, found[0], conventional.get(_maps(cell), []))
        for cell, found in scored
        if found and not grid.maps_alone(cell.sweep)
    ]


def _maps(cell: Cell) -> str:
    """What a fused cell and its conventional rivals have in common."""
    apart = ("haadf_tilts", "data.haadf_tilts", "method", "solver.method", "solver.alpha", "data.snr.haadf")
    return str({axis: value for axis, value in cell.coordinates.items() if axis not in apart})


def gain(run: Run) -> tuple[float, float] | None:
    """Smallest and largest ratio of a fused cell to the best conventional result with the same maps."""
    best = [(score.value, min(other.value for _, other in others)) for _, score, others in rivals(run) if others]
    ratios = [value / rival for value, rival in best if rival > 0]
    return (min(ratios), max(ratios)) if ratios else None


def _gain_text(run: Run) -> str:
    """The gain as a ratio; for a held-out objective also the best fused cell's differences, fold by fold."""
    found = gain(run)
    if found is None:
        return ""
    span = " to ".join(dict.fromkeys(f"{ratio:.3f}" for ratio in found))
    lines = [f"{GAINS.get(run.sweep.system, 'fused / best conventional with the same maps')}: {span}"]
    cell, score, others = min((each for each in rivals(run) if each[2]), key=lambda each: each[1].value)
    folds = [name for name in score.metrics if name.startswith(f"{run.metric}_fold_")]
    for other, rival in others if len(folds) > 1 else []:
        apart = [score.metrics[name] - rival.metrics[name] for name in folds if name in rival.metrics]
        words = f"{cell.id} minus {other.id} {rival.series}".rstrip()
        error = stdev(apart) / len(apart) ** 0.5
        lines.append(f"{words}: {mean(apart):+.4f} ± {error:.4f} (standard error, paired over {len(apart)} folds)")
    return "\n".join(lines)


def _grid_text(run: Run, panel: Panel) -> str:
    counts = {entry.count for entry in panel.entries.values()}
    most = max(counts, default=1)
    head = title(run.metric) + (f" ({panel.title})" if panel.title else "")
    if most > 1:
        head += f", mean of {most} replicates ± standard deviation"
    elif any(entry.deviation for entry in panel.entries.values()):
        head += " ± standard error over folds"
    if not panel.entries:
        return head + ": no finished trial yet"
    corner = " \\ ".join(title(axis) for axis in (panel.row_axis, panel.column_axis) if axis) or "cell"
    rows = [[corner, *(shown(column) or "value" for column in panel.columns)]]
    for value, series in panel.lines:
        name = "  ".join(part for part in (shown(value), series) if part) or "all"
        rows.append([name, *(_entry_text(panel.entries.get((value, series, column))) for column in panel.columns)])
    return head + "\n" + aligned(rows)


def _entry_text(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    return shown(entry.value) + (f" ±{entry.deviation:.2g}" if entry.deviation else "")


def _shares_text(run: Run) -> str:
    """How predicted and true errors agree, and the concentrations of the best cell, before and after."""
    bests = {cell.id: run.winner(cell) or {} for cell in run.cells}
    entries = {name: {"metrics": best.get("metrics", {}), "elements": best.get("elements", {})}
               for name, best in bests.items()}
    found, lines = flat.summary(run.cells, entries), []
    for words, name in (("", "all cells"), ("_clear", "SNR > 10")):
        if f"error_slope{words}" in found:
            lines.append(f"RMSE of concentrations over average standard error, {name}: correlation "
                         f"{found[f'error_correlation{words}']:.4f}, slope {found[f'error_slope{words}']:.3f}")
    best_cell, _, shares = _best(run)
    for element, value in shares.get("share", {}).items():
        after, before, raw = (shares[name][element] for name in flat.SHARES[1:])
        spread = found.get("share_sensitivity", {}).get(element)
        lines.append(f"{element} in {best_cell}: {value:.2f} ± {after:.2f} % (as measured {before:.2f} ± {raw:.2f} %)"
                     + (f"; ± {spread:.2f} % over the solver's settings" if spread is not None else ""))
    return "\n".join(lines)


def _best(run: Run) -> tuple[str, Mapping[str, Any], Mapping[str, Mapping[str, float]]]:
    """The best cell, its metrics, and those of each element; nothing while there is none."""
    reached = {cell.id: best for cell in run.cells if (best := run.winner(cell))}
    name = min(reached, key=lambda name: reached[name]["objective"], default="")
    return name, reached.get(name, {}).get("metrics", {}), reached.get(name, {}).get("elements", {})


def _responses_text(run: Run) -> str:
    """How well HAADF is a sum of the maps, and what each adds to it (HEBT, Eq. 15)."""
    name, metrics, each = _best(run)
    if "r_squared_smooth" not in metrics:
        return ""
    ratios = ", ".join(f"{element} {value:.3g}" for element, value in each["response"].items())
    return (f"HAADF in {name} as a sum of the maps: R^2 {metrics['r_squared']:.3f}, {metrics['r_squared_smooth']:.3f} "
            f"where noise is smoothed away; HAADF per count: {ratios}")


def _fractions_text(run: Run) -> str:
    """Weight fractions of the best cell, and whether its specimen has a clear edge."""
    best_cell, metrics, each = _best(run)
    lines = [f"{element} in {best_cell}: {value:.2f} ± {each['weight_percent_sigma'][element]:.2f} wt%, "
             f"{each['atomic_percent'][element]:.2f} ± {each['atomic_percent_sigma'][element]:.2f} at% "
             "(mean and sigma over voxels)" for element, value in each.get("weight_percent", {}).items()]
    if lines and not metrics["threshold_found"]:
        lines.append("the volume has no clear edge: its specimen was told by Otsu's threshold; look at the figure, or "
                     "give output.fractions.threshold")
    return "\n".join(lines)


def _winners_text(run: Run) -> str:
    """A line per cell: the winner's objective, its metric for each element, its settings, what it took."""
    names = list(tunables(run.sweep))
    bests = [run.winner(cell) or {} for cell in run.cells]
    each = [best.get("elements", {}).get(run.metric, {}) for best in bests]
    elements = list(dict.fromkeys(name for values in each for name in values))
    short = [name.split(".")[-1] for name in names]
    rows = [["cell", run.sweep.search.objective, *elements, *short, "trials", "failed", "seconds"]]
    for cell, best, values in zip(run.cells, bests, each, strict=True):
        done = run.rows(cell)
        numbers = [best.get("objective"), *map(values.get, elements), *map(best.get("params", {}).get, names)]
        failed = sum(not good(row) for row in done)
        seconds = sum(row.get("seconds") or 0.0 for row in done)
        effort = [f"{len(done)}/{grid.trials(cell)}", str(failed), f"{seconds:.1f}"]
        rows.append([cell.id, *map(shown, numbers), *effort])
    return "Winners\n" + aligned(rows)


def _errors_text(run: Run) -> str:
    """Averages of the standard errors over the specimen, where they were asked for."""
    found = {cell.id: (run.winner(cell) or {}).get("metrics", {}) for cell in run.cells}
    lines = [f"{cell}: {shown(told['average_standard_error'])} of the concentrations, "
             f"{shown(told['average_relative_error'])} % of the elements' shares"
             for cell, told in found.items() if "average_standard_error" in told]
    return "\n".join(["Standard errors, averages over the specimen", *lines] if lines else [])


def _starts_text(run: Run) -> str:
    """What searches with an atlas began with, and where that is from."""
    lines = []
    for cell in run.cells:
        for row in run.rows(cell):
            if "source" in row:
                words = ", ".join(f"{name.rpartition('.')[2]} {shown(value)}" for name, value in row["params"].items())
                lines.append(f"{cell.id}: trial {row['trial']} had {words}, {row['source']}")
    return "\n".join(["Starts from an atlas", *lines] if lines else [])


def _notes_text(run: Run) -> str:
    """What was said of the data, and by how many trials."""
    rows = [row for cell in run.cells for row in run.rows(cell)]
    counts = Counter(note for row in rows for note in row.get("notes", []))
    return "\n".join(["Warnings", *(f"{note} ({count} of {len(rows)} trials)" for note, count in counts.items())]
                     if counts else [])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of text: the first to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def duration(seconds: float) -> str:
    """Seconds as a reader says them: "8 s", "5 min", "3.2 h", "2.1 days"."""
    for unit, amount in (("days", 86400.0), ("h", 3600.0)):
        if seconds >= amount:
            return f"{seconds / amount:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
