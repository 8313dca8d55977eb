"""`python -m tests.bench_strategy`: an atlas by shared search, against the paper's independent search of each cell.

`--size 48 --workers 1` is a smaller one, which is printed and not published.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.workers import LocalWorkers
from sweeps import coordinator, grid, journal, settings
from sweeps.atlas import RunFolder
from sweeps.journal import History
from tests.bench import publish

TITLE = "Atlas: shared search against the paper's way"
SIZE, ITERATIONS, SEED = 64, 60, 0
AXES = {"haadf_tilts": [9, 17, 47], "chem_tilts": [5, 9, 13]}
PAPER = {"trials": 30, "initial": 8}
# By name: the search, and the solver's tolerance. The paper's way has no stopping rule.
STRATEGIES: dict[str, tuple[dict[str, Any], float]] = {
    "per_cell, all iterations": (PAPER, 0.0), "per_cell": (PAPER, 1e-3), "shared": ({"strategy": "shared"}, 1e-3)}


def sweep(size: int, search: dict[str, Any], tolerance: float, seed: int) -> settings.Sweep:
    """The ranges of configs/fig4_cocuo.yaml on a small grid."""
    return settings.load({
        "name": "strategy", "data": {"phantom": "cocuo", "size": size}, "grid": AXES,
        "solver": {"iterations": ITERATIONS, "tolerance": tolerance,
                   "lambda_model": {"low": 1e-3, "high": 1e3, "scale": "log"},
                   "lambda_tv": {"low": 1e-3, "high": 1e1, "scale": "log"}},
        "search": search, "output": {"save": "none"}, "seed": seed})


def run(folder: Path, chosen: settings.Sweep, workers: int) -> dict[str, Any]:
    """What a strategy has cost, and the NRMSE it found in each cell."""
    cells, started = grid.cells(chosen), time.perf_counter()
    with LocalWorkers(workers, "sweeps.trial:run") as crew:
        coordinator.run(chosen, cells, crew, RunFolder(folder))
    wall = time.perf_counter() - started
    history = History(journal.read(folder / "journal.jsonl")[0])
    rows = [row for cell in cells for row in history.cell(cell.id).rows.values()]
    winners = {cell.id: history.cell(cell.id).winner(searched=True) for cell in cells}
    return {"full": sum(row.fidelity == 1 for row in rows), "cheap": sum(row.fidelity < 1 for row in rows),
            "seconds": sum(row.result["seconds"] for row in rows if row.result), "wall": wall,
            "nrmse": {name: row.objective for name, row in winners.items() if row and row.objective is not None}}


def section(found: dict[str, dict[str, Any]], size: int, workers: int) -> str:
    """The tables, in markdown."""
    shared, rivals = found["shared"], {name: cost for name, cost in found.items() if name != "shared"}
    apart = {rival: {name: 100 * (shared["nrmse"][name] / value - 1) for name, value in cost["nrmse"].items()}
             for rival, cost in rivals.items()}
    rows = [f"| {name} | {cost['full']} | {cost['cheap']} | {cost['seconds']:.0f} | {cost['wall']:.0f} | "
            f"{sum(cost['nrmse'].values()) / len(cost['nrmse']):.4f} |" for name, cost in found.items()]
    compared = [f"| {rival} | {cost['seconds'] / shared['seconds']:.1f} | {max(apart[rival].values()):+.2f} % | "
                f"{min(apart[rival].values()):+.2f} % | {sum(apart[rival].values()) / len(apart[rival]):+.2f} % | "
                f"{sum(map(abs, apart[rival].values())) / len(apart[rival]):.2f} % |" for rival, cost in rivals.items()]
    cells = ["| " + " | ".join([name, *(f"{cost['nrmse'][name]:.4f}" for cost in found.values())]) + " |"
             for name in shared["nrmse"]]
    return "\n".join([
        f"cocuo at {size}^3, {len(cells)} cells, at most {ITERATIONS} iterations, two weights searched over six and "
        f"four decades, {workers} workers. per_cell: 30 trials with GP-Hedge in each cell, as F3, and once without a "
        "stopping rule, as there. shared: the defaults of search.strategy: shared. Seconds are those of the trials, "
        "data and metrics included.", "",
        "| strategy | full trials | cheap trials | solver seconds | wall seconds | mean NRMSE |", "|" + "---|" * 6,
        *rows, "", "Shared against:", "",
        "| | times the solver seconds | largest difference | smallest | mean | mean without sign |", "|" + "---|" * 6,
        *compared, "", "| cell | " + " | ".join(found) + " |", "|" + "---|" * (1 + len(found)), *cells])


def main() -> None:
    """Write the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=SEED)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Compiled programs are kept on the disk: neither rival is to make them for the other.
        run(Path(folder, "warm"), sweep(asked.size, {"trials": 1, "initial": 1}, 0.0, asked.seed), asked.workers)
        found = {name: run(Path(folder, name), sweep(asked.size, *chosen, asked.seed), asked.workers)
                 for name, chosen in STRATEGIES.items()}
    text = section(found, asked.size, asked.workers)
    if asked.size == SIZE:
        publish(TITLE, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
