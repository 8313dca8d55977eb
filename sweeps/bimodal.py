"""What a sweep of hebt over alpha and n found, in numbers: HEBT's Figs. 4, 8 and 13. Imports without JAX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sweeps.grid import Cell
from sweeps.settings import setting_of
from sweeps.tables import Run, shown, title

ALPHA = "solver.alpha"
DIRECT, WEIGHT = ("ssim", "mse"), ("weight_ssim", "weight_mse")  # of volumes, and of weight fractions made of them
STOPS = (100, 200, 500)  # n of the paper's curves over alpha, shown where they were recorded; else the last three


@dataclass(frozen=True)
class Curves:
    """Cells that differ in alpha alone. values: by metric (alpha, stop, element), NaN where there is none.

    alphas: rising; 0 are the maps alone. words: the other coordinates.
    """

    words: str
    cells: list[Cell]
    alphas: list[float]
    stops: list[int]
    elements: list[str]
    values: dict[str, np.ndarray]

    @property
    def shown(self) -> list[int]:
        """Positions of the stops that are worth a curve over alpha."""
        return [k for k, stop in enumerate(self.stops) if stop in STOPS] or list(range(len(self.stops)))[-3:]

    def alone(self, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Best value and its n, (element,) each, of the maps alone; None where alpha = 0 is not on the grid."""
        if 0 not in self.alphas or metric not in self.values:
            return None
        values = self.values[metric][self.alphas.index(0)]
        if not np.isfinite(values).all(1).any():
            return None
        best = np.nanargmax(values, 0) if metric.endswith("ssim") else np.nanargmin(values, 0)
        return values[best, range(len(self.elements))], np.array(self.stops)[best]

    def best(self) -> tuple[int, int] | None:
        """Positions of the alpha above 0 and of the n with the best mean SSIM over the elements."""
        mean = self.values["ssim"].mean(2) * np.where(np.array(self.alphas) > 0, 1, np.nan)[:, None]
        if not np.isfinite(mean).any():
            return None
        alpha, stop = np.unravel_index(np.nanargmax(mean), mean.shape)
        return int(alpha), int(stop)


def curves(run: Run) -> list[Curves]:
    """One for each point of the grid's other axes; none where alpha is no axis, or nothing has a truth."""
    axis = next((name for name in run.sweep.grid if setting_of(name) == ALPHA), None)
    groups: dict[str, dict[float, Cell]] = {}
    for cell in run.cells:
        if axis is None:
            return []
        rest = {name: value for name, value in cell.coordinates.items() if name != axis}
        words = ", ".join(f"{title(name)} {shown(value)}" for name, value in rest.items())
        groups.setdefault(words, {})[cell.coordinates[axis]] = cell
    made = (_curves(run, words, cells) for words, cells in groups.items())
    return [each for each in made if each is not None and "ssim" in each.values]


def _curves(run: Run, words: str, cells: dict[float, Cell]) -> Curves | None:
    alphas, rows = sorted(cells), {alpha: run.winner(cell) for alpha, cell in cells.items()}
    passed = {alpha: row["checkpoints"] or [row] for alpha, row in rows.items() if row}
    stops = sorted({stop["iterations"] for each in passed.values() for stop in each})
    known = [stop["elements"] for each in passed.values() for stop in each]
    elements = list(dict.fromkeys(name for each in known for name in each.get("ssim", {})))
    if len(alphas) < 2 or not elements:
        return None
    values = {}
    for metric in (*DIRECT, *WEIGHT):
        if any(metric in each for each in known):
            table = np.full((len(alphas), len(stops), len(elements)), np.nan)
            for a, alpha in enumerate(alphas):
                for stop in passed.get(alpha, []):
                    found = stop["elements"].get(metric, {})
                    table[a, stops.index(stop["iterations"])] = [found.get(name, np.nan) for name in elements]
            values[metric] = table
    return Curves(words, [cells[alpha] for alpha in alphas], alphas, stops, elements, values)


def text(run: Run) -> str:
    """The sentences of HEBT's 3.1 with this run's numbers."""
    return "\n\n".join("\n".join(_lines(each)) for each in curves(run))


def _lines(found: Curves) -> Iterator[str]:
    yield f"HEBT against the maps alone{f', {found.words}' if found.words else ''} ({' / '.join(found.elements)})"
    alone, ssim = found.alone("ssim"), found.values["ssim"]
    if alone:
        yield f"  maps alone: best SSIM {_each(alone[0])} at n = {_each(alone[1], '{:d}')}"
    for stop in found.shown:
        column = ssim[:, stop]
        if not np.isfinite(column).all():
            continue
        best = int(np.argmax(column.mean(1)))
        line = f"  n = {found.stops[stop]}: best alpha {shown(found.alphas[best])} (SSIM {_each(column[best])})"
        if alone:
            line += "; above the maps alone at alpha " + " / ".join(
                _ranges([alpha for alpha, value in zip(found.alphas, column[:, k]) if alpha > 0 and value > reference])
                for k, reference in enumerate(alone[0]))
        yield line
    place = found.best()
    if place:
        alpha, stop = place
        yield (f"  best of all: alpha {shown(found.alphas[alpha])}, n = {found.stops[stop]}: "
               f"SSIM {_each(ssim[place])}, MSE {_each(found.values['mse'][place], '{:.3g}')}")
        quantified = [found.alone(metric) for metric in WEIGHT]
        if WEIGHT[0] in found.values:
            here = [found.values[metric][place] for metric in WEIGHT]
            yield f"  weight fractions: SSIM {_each(here[0])}, MSE {_each(here[1], '{:.4f}')}" + (
                f"; maps alone, each at its own best n: SSIM {_each(quantified[0][0])}, "
                f"MSE {_each(quantified[1][0], '{:.4f}')}" if quantified[0] and quantified[1] else "")


def _each(values: np.ndarray, form: str = "{:.3f}") -> str:
    return " / ".join(form.format(value) for value in values.tolist())


def _ranges(alphas: list[float]) -> str:
    return f"{shown(alphas[0])} to {shown(alphas[-1])}" if len(alphas) > 1 else shown(alphas[0]) if alphas else "none"
