"""`python -m tests.coordinate FOLDER`: one run of the coordinator, alone or under mpiexec, to be killed."""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from launch import workers
from launch.dask_workers import DaskWorkers
from launch.workers import LocalWorkers, MpiWorkers
from sweeps import grid, settings
from sweeps.atlas import RunFolder
from sweeps.coordinator import Observer, Summary, run
from sweeps.crew import Workers
from sweeps.journal import RunError
from sweeps.settings import Sweep

WEIGHT = {"low": 1e-3, "high": 1e3, "scale": "log"}


def sweep(trials: int = 6, order: str = "free", save: str = "best", axes: dict[str, list[Any]] | None = None,
          initial: int = 3, search: dict[str, Any] | None = None, **solver: Any) -> Sweep:
    """A small sweep: with no `axes` 2 x 2 cells, one row of them conventional."""
    axes = {"haadf_tilts": [0, 9], "chem_tilts": [3, 5]} if axes is None else axes
    return settings.load({
        "name": "small", "data": {"phantom": "cocuo", "size": 16}, "grid": axes,
        "solver": {"iterations": 10, "lambda_model": WEIGHT, "lambda_tv": WEIGHT, **solver},
        "search": {"trials": trials, "initial": min(initial, trials), "order": order, "acquisition": "EI",
                   **(search or {})},
        "output": {"save": save}})


def coordinate(folder: Path, chosen: Sweep, evaluate: str = "landscape", count: int = 2, observer: Any = None,
               **options: Any) -> Summary:
    """A run with local workers."""
    with LocalWorkers(count, f"tests.evaluators:{evaluate}") as crew:
        return run(chosen, grid.cells(chosen), crew, RunFolder(folder), observer, **options)


class Lines(Observer):
    """One line per result, so that a test knows when to strike."""

    def result(self, result: dict[str, Any], cell: grid.Cell, best: float | None) -> None:
        print(cell.id, result["trial"], best, flush=True)


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--evaluate", default="landscape")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--initial", type=int, default=3)
    parser.add_argument("--order", default="free")
    parser.add_argument("--save", default="best")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dask", action="store_true")
    parser.add_argument("--grace", type=float, default=20.0)
    asked = parser.parse_args()
    rank, size = workers.world()
    if rank:
        workers.serve()
        return 0
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    evaluate = f"tests.evaluators:{asked.evaluate}"
    chosen = sweep(asked.trials, asked.order, asked.save, initial=asked.initial)
    here: Workers = (DaskWorkers(evaluate, count=asked.workers) if asked.dask else
                     LocalWorkers(asked.workers, evaluate))
    with MpiWorkers(evaluate) if size > 1 else here as crew:
        try:
            summary = run(chosen, grid.cells(chosen), crew, RunFolder(asked.folder), Lines(),
                          lambda: len(signals), grace=lambda: asked.grace)
        except RunError as error:
            print(error, file=sys.stderr)
            return 2
    print(summary.stopped or "finished")
    return 0


if __name__ == "__main__":
    workers.leave(main())
