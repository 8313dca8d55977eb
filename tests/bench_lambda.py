"""`python -m tests.bench_lambda`: weights without a truth, by held-out maps and by an atlas, against the best."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from launch.workers import LocalWorkers
from sweeps import coordinator, grid, settings, tables, winners
from sweeps.atlas import RunFolder
from sweeps.grid import Cell
from sweeps.settings import Sweep
from sweeps.tables import Run
from tests.bench import publish

SIZE, TRIALS = 32, 24
PHANTOMS = ("cocuo", "conio")
NOISE = [0.5, 1.5, 5.0]  # factor on F3's mean counts, of about 1 in a pixel of a map
ATLAS = {"data.snr.chem": [0.3, 1.0, 3.0], "haadf_tilts": [31], "chem_tilts": [7, 13]}
RANGES: dict[str, Any] = {"lambda_model": {"low": 1e-2, "high": 1e2, "scale": "log"},
                          "lambda_tv": {"low": 3e-2, "high": 3e1, "scale": "log"}}
HELDOUT: dict[str, dict[str, Any]] = {"tilts": {"objective": "heldout", "heldout": "tilts"},
                                      "counts": {"objective": "heldout", "heldout": "counts"}}
RULES = {"best": "", "one_standard_error": ", one standard error"}
TARGETS = {"held out": 1.1, "atlas": 1.2}


def sweep(phantom: str, name: str, axes: Mapping[str, Any], seed: int, search: Mapping[str, Any]) -> Sweep:
    """A search for two weights in each cell."""
    return settings.load({
        "name": f"{phantom}-{name}", "data": {"phantom": phantom, "size": SIZE, "haadf_tilts": 47, "chem_tilts": 9},
        "grid": dict(axes), "solver": {"gamma": 1.6, "iterations": 60, **RANGES}, "seed": seed,
        "search": {"trials": TRIALS, "initial": 8, **search}, "output": {"save": "none"}})


def carried_out(chosen: Sweep, folder: Path) -> Run:
    """The sweep, on two local workers."""
    place = folder / chosen.name
    with LocalWorkers(2, "sweeps.trial:run") as crew:
        coordinator.run(chosen, grid.cells(chosen), crew, RunFolder(place))
    return tables.read(place)


def chosen_by(run: Run, cell: Cell, rule: str) -> dict[str, Any]:
    """The row that a rule makes the winner of a cell."""
    ruled = grid.Cell(**{**vars(cell), "sweep": settings.replace(cell.sweep, {"search.rule": rule})})
    row = winners.winner(ruled, run.history.cell(cell.id))
    assert row is not None and row.result is not None
    return {**row.ask, **row.result}


def choices(phantom: str, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """By noise level: the row that each way to choose ends with, and the best of all rows under "truth"."""
    axes = {"data.snr.chem": NOISE}
    searched = {name: carried_out(sweep(phantom, name, axes, 5, search), folder)
                for name, search in {"truth": {}, **HELDOUT}.items()}
    looked = {f"atlas of {other}": carried_out(sweep(phantom, f"by-{other}", axes, 5, {
        "trials": 1, "atlas": str(folder / f"{other}-atlas")}), folder) for other in PHANTOMS}
    found = []
    for k, cell in enumerate(searched["truth"].cells):
        rows = [row for run in (*searched.values(), *looked.values()) for row in run.rows(cell) if tables.good(row)]
        row = {"truth": min(rows, key=nrmse)}
        for name in HELDOUT:
            for rule, words in RULES.items():
                row[f"{name}{words}"] = chosen_by(searched[name], searched[name].cells[k], rule)
        for name, run in looked.items():
            row[name.replace(phantom, "its own phantom") if phantom in name else "atlas of the other phantom"] = (
                run.rows(run.cells[k])[0])
        found.append(row)
    return found


def nrmse(row: Mapping[str, Any]) -> float:
    """Against the truth, which all rows know and few have minimised."""
    return float(row["metrics"]["nrmse"])


def weights(row: Mapping[str, Any]) -> str:
    """lambda_model and lambda_tv."""
    return " / ".join(f"{row['params'][f'solver.{name}']:.2g}" for name in RANGES)


def main() -> None:
    """Write the section."""
    begun, sets = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="tomoatlas-") as made:
        folder = Path(made)
        for phantom in PHANTOMS:
            carried_out(sweep(phantom, "atlas", ATLAS, 11, {"trials": 20}), folder)
        for phantom in PHANTOMS:
            for factor, row in zip(NOISE, choices(phantom, folder), strict=True):
                sets[f"{phantom}, counts x {factor:g}"] = row
    ways = [way for way in next(iter(sets.values())) if way != "truth"]
    lines = ["| set | best with the truth | its weights | " + " | ".join(ways) + " |", "|" + "---|" * (len(ways) + 3)]
    ratios = {way: [nrmse(row[way]) / nrmse(row["truth"]) for row in sets.values()] for way in ways}
    for k, (name, row) in enumerate(sets.items()):
        lines.append(f"| {name} | {nrmse(row['truth']):.3f} | {weights(row['truth'])} | " + " | ".join(
            f"{ratios[way][k]:.3f} ({weights(row[way])})" for way in ways) + " |")
    lines.append("| worst | | | " + " | ".join(f"{max(ratios[way]):.3f}" for way in ways) + " |")
    lines.append("| mean | | | " + " | ".join(f"{np.mean(ratios[way]):.3f}" for way in ways) + " |")
    verdicts = [f"{way} {'met' if max(each) <= TARGETS['atlas' if 'atlas' in way else 'held out'] else 'missed'}"
                for way, each in ratios.items()]
    publish("Weights without a truth", "\n".join([
        f"NRMSE over the best NRMSE found with the truth, in brackets lambda_model / lambda_tv. Six simulated sets of "
        f"47 images and 9 maps at {SIZE}^3, F3's mean counts times a factor; {TRIALS} trials of each search, held-out "
        "deviance over 4 folds. The best with the truth is that of all trials of all searches. The atlases have other "
        f"seeds, counts ({', '.join(f'{x:g}' for x in ATLAS['data.snr.chem'])}) and samplings (31 images, 7 and 13 "
        "maps), and answer without any trial; one is of the same phantom, one of the other.", "", *lines, "",
        f"Within 10 % (held out) and 20 % (atlas) on every set: {', '.join(verdicts)}. "
        f"{time.perf_counter() - begun:.0f} s on two cores."]))


if __name__ == "__main__":
    main()
