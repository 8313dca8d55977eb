"""`python -m tests.bench_utilisation`: how much of their time local workers solve, when trials last 0.5 to 2 s.

The trials only sleep, so that what is measured is the coordinator, its side processes and its disk. Each finished
sweep takes place in a folder of its own.
"""

import tempfile
import time
from pathlib import Path

from launch.advisers import SideAdvisers, useful
from sweeps import grid, journal
from sweeps.settings import Sweep
from tests.bench import publish
from tests.coordinate import coordinate, sweep

CASES = {"4 cells of 30 trials": {"chem_tilts": [3, 5, 7, 9]}, "one cell of 120 trials": {}}


def measure(workers: int, chosen: Sweep) -> list[str]:
    """Share of the workers' time spent in trials until the last was handed out, and to the end; CPU ms per trial."""
    cells = grid.cells(chosen)
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        with SideAdvisers(useful(workers, len(cells)), chosen, cells) as advisers:
            coordinate(Path(folder) / "run", chosen, "varied", workers, advisers=advisers)
        coordinator = time.process_time() - before
        log = journal.read(Path(folder) / "run/journal.jsonl")[0]
    asks = {(event["cell"], event["trial"]): event["time"] for event in log if event["event"] == "ask"}
    spans = [(asks[event["cell"], event["trial"]], event["seconds"]) for event in log if event["event"] == "result"]
    begin, last, end = min(asks.values()), max(asks.values()), log[-1]["time"]
    early = sum(min(seconds, last - start) for start, seconds in spans) / (last - begin) / workers
    whole = sum(seconds for _, seconds in spans) / (end - begin) / workers
    return [f"{early:.1%}", f"{whole:.1%}", f"{1e3 * coordinator / len(spans):.0f}"]


def section() -> str:
    """The table, in markdown."""
    rows = []
    for name, axes in CASES.items():
        for workers in (2, 8):
            together = max(2, workers // 2) if axes else workers
            chosen = sweep(30 if axes else 120, axes=axes, initial=8,
                           search={"in_flight": together, "acquisition": "gp_hedge"})
            rows.append(f"| {name} | {workers} | " + " | ".join(measure(workers, chosen)) + " |")
    return "\n".join([
        "Trials that sleep for 0.5 to 2 s (uniform), two weights searched with GP-Hedge. Until the last trial was "
        "handed out, and to the end, when there is no work left for some.", "",
        "| sweep | workers | busy | to the end | coordinator, CPU ms per trial |", "|" + "---|" * 5, *rows])


def main() -> None:
    """Write the section."""
    publish("Local workers: share of the time spent in trials", section())


if __name__ == "__main__":
    main()
