"""`tomoatlas simulate`: how a sweep would go on a machine of any size, before anybody spends its hours.

The coordinator, its journal, the searches and their side processes are real; the trials are not (launch.simulated).
"""

from __future__ import annotations

import bisect
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from launch.advisers import FED, SideAdvisers
from launch.simulated import MESSAGE, Clock, Landscape, Ledger, Machine, SimulatedAdvisers, SimulatedWorkers
from sweeps import coordinator, grid, settings, winners
from sweeps.atlas import RunFolder
from sweeps.coordinator import Observer
from sweeps.grid import Cell
from sweeps.settings import SettingsError, Sweep
from sweeps.tables import aligned, duration

INFORMED = 8  # results of its cell that a model should have seen
SAY = 10.0  # [s] between lines on a long simulation
JOBS = 10_000  # that one sweep may take
MOST = 64  # side processes: cores of a node
FEWEST = 16  # cells, where fewer workers have fewer


@dataclass(frozen=True)
class Outcome:
    """What a simulation showed. Times in seconds on the simulated clock unless said otherwise.

    busy: share of the workers' time in which they solved, until the last trial was handed out; whole: until the end.
    lost: trials that died with a node. repeated: attempts beyond the first. coordinator: own seconds per trial.
    proposal: processor seconds of the side processes for each. memory: peak of the coordinator's process [MiB], the
    simulation's own included. informed: share of the searched trials proposed from 8 results of their cell or more.
    regret: by cell, how far its best objective lies above its least one, in shares of that.
    """

    workers: int
    cells: int
    trials: int
    jobs: int
    elapsed: float
    busy: float
    whole: float
    lost: int
    repeated: int
    coordinator: float
    advisers: int
    proposal: float
    memory: float
    informed: float
    regret: dict[str, float]
    real: float


def show(sweep: Sweep, workers: Sequence[int], machine: Machine, walltime: float | None, queue: float, side: int,
         out: Path | None, scale: bool, as_json: bool) -> None:
    """Simulate a sweep on machines of several sizes and print a table.

    walltime, queue: of a job, and before each but the first [s]. side: real processes that propose. scale: fewer cells
    for fewer workers, so that each worker has as many trials, and rarer failures. out: keeps the run folders.
    """
    cells = grid.cells(sweep)
    if not any(cell.space for cell in cells):
        raise SettingsError(f"{sweep.name}: nothing is searched, so there is nothing to simulate; give a setting of "
                            "the solver a range, as in: lambda_tv: {low: 1e-3, high: 1e1, scale: log}")
    outcomes: list[Outcome] = []
    for count in workers:
        share = count / max(workers) if scale else 1.0
        # As many nodes as before fail as often; of fewer, one of them fails more seldom.
        sized = replace(machine, workers=count, mtbf=machine.mtbf / share,
                        advisers=machine.advisers or max(1, min(MOST, count // FED)))
        job = (settings.dump(sweep), share, sized, walltime, queue, side,
               str(out / str(count)) if out else None)
        # A process of its own, so that its memory is its own.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            outcomes.append(pool.submit(_simulate, *job).result())
        if as_json:
            print(json.dumps(asdict(outcomes[-1])), flush=True)
    if not as_json:
        print(text(sweep, machine, outcomes))


def _simulate(given: dict[str, Any], share: float, machine: Machine, walltime: float | None, queue: float, side: int,
              out: str | None) -> Outcome:
    sweep = settings.load(given)
    cells = grid.cells(sweep)
    count = max(min(len(cells), FEWEST), round(share * len(cells)))
    chosen = [cells[k * len(cells) // count] for k in range(count)]
    with tempfile.TemporaryDirectory(prefix="tomoatlas-") as folder:
        return simulate(sweep, chosen, cells, machine, Path(out or folder) / "run", walltime, queue, side,
                        Lines(machine.workers))


def simulate(sweep: Sweep, cells: Sequence[Cell], all_cells: Sequence[Cell], machine: Machine, folder: Path,
             walltime: float | None = None, queue: float = 0.0, side: int = 1,
             observer: Lines | None = None) -> Outcome:
    """Carry out a sweep of some cells on a simulated machine, in as many jobs as it takes; its files go to a folder."""
    started, clock, ledger = time.perf_counter(), Clock(), Ledger()
    named = {cell.id: cell for cell in cells}
    landscape = Landscape({cell.id: cell for cell in all_cells}, machine)
    together = dict.fromkeys(named, 1)
    elapsed = 0.0
    jobs: list[tuple[float, float]] = []
    if observer is not None:
        observer.clock = clock
    for number in range(JOBS):
        with SideAdvisers(side, sweep, cells, together) as real:
            advisers = SimulatedAdvisers(real, named, machine.advisers, clock, ledger)
            crew = SimulatedWorkers(machine, landscape.evaluate, clock, advisers, ledger, number)
            begun = clock.time()
            summary = coordinator.run(sweep, cells, crew, RunFolder(folder), observer, batches=together,
                                      until=None if walltime is None else begun + walltime, advisers=advisers,
                                      clock=clock)
        jobs.append((begun, clock.time()))
        elapsed += clock.time() - begun
        if summary.limit is None:
            break
        clock.jump(clock.time() + queue)
    known = _journal(folder, cells)
    spans = np.array(ledger.spans).reshape(-1, 2)
    handed = spans[:, 0].max() - jobs[-1][0] + sum(end - begin for begin, end in jobs[:-1])
    worked = float((spans[:, 1] - spans[:, 0]).sum())
    early = float((np.minimum(spans[:, 1], spans[:, 0].max()) - spans[:, 0]).sum())
    best = {name: winners.winner(search.cell, search.history) for name, search in summary.searches.items()}
    return Outcome(
        machine.workers, len(cells), summary.done, len(jobs), elapsed, early / handed / machine.workers,
        worked / elapsed / machine.workers, ledger.lost, known["repeated"], clock.worked / max(1, summary.done),
        machine.advisers, ledger.thought / max(1, ledger.proposals),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, known["informed"],
        {name: row.objective / landscape.floor(named[name]) - 1 for name, row in best.items()
         if row is not None and row.objective is not None},
        time.perf_counter() - started)


def _journal(folder: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    """What the journal tells of a simulation, read line by line: it can be larger than one likes to hold."""
    searched, informed, repeated = 0, 0, 0
    results: dict[str, list[int]] = {cell.id: [] for cell in cells}  # lines with results of searched trials
    fixed: set[tuple[str, int]] = set()
    with open(RunFolder(folder).journal, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            event = json.loads(line)
            if event["event"] == "result" and (event["cell"], event["trial"]) not in fixed:
                results[event["cell"]].append(number)
            elif event["event"] == "ask":
                repeated += event["attempt"] > 0
                if event["kind"] != "search":
                    fixed.add((event["cell"], event["trial"]))
                elif event["attempt"] == 0:
                    searched += 1
                    informed += bisect.bisect_left(results[event["cell"]], event["seen"]) >= INFORMED
    return {"informed": informed / max(1, searched), "repeated": repeated}


class Lines(Observer):
    """A line now and then, on stderr."""

    def __init__(self, workers: int) -> None:
        self.clock = Clock()
        self._workers, self._done, self._total = workers, 0, 0
        self._began, self._said = self.clock.time(), time.monotonic()

    def started(self, total: int, done: int) -> None:
        self._done, self._total = done, total
        if not done:
            self._began = self.clock.time()

    def result(self, result: dict[str, Any], cell: Cell, best: float | None) -> None:
        self._done += 1
        if time.monotonic() - self._said > SAY:
            self._said = time.monotonic()
            print(f"{self._workers:,} workers: {self._done:,} of {self._total:,} trials after "
                  f"{duration(self.clock.time() - self._began)} there", file=sys.stderr, flush=True)


def text(sweep: Sweep, machine: Machine, outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table, with what its columns mean."""
    common = set.intersection(*(set(outcome.regret) for outcome in outcomes))
    rows = [["workers", "cells", "trials", "jobs", "took", "busy", "with the end", "lost", "repeated", "coordinator",
             "memory", "proposal", "informed", "regret", "worst"]]
    for outcome in outcomes:
        regrets = [outcome.regret[name] for name in common] or [float("nan")]
        rows.append([f"{outcome.workers:,}", f"{outcome.cells:,}", f"{outcome.trials:,}", str(outcome.jobs),
                     duration(outcome.elapsed), f"{outcome.busy:.1%}", f"{outcome.whole:.1%}", str(outcome.lost),
                     str(outcome.repeated), f"{1e3 * outcome.coordinator:.2f} ms", f"{outcome.memory:.0f} MiB",
                     f"{1e3 * outcome.proposal:.0f} ms", f"{outcome.informed:.0%}", f"{np.mean(regrets):.2%}",
                     f"{max(regrets):.2%}"])
    return "\n".join([
        f"{sweep.name} on a simulated machine: a trial takes {machine.median:g} s (median; its logarithm spreads by "
        f"{machine.spread:g}).", "", aligned(rows), "",
        "busy: share of the workers' time spent solving until no trial was left to hand out; with the end: until the "
        "last one ended.",
        f"coordinator: its own time for a trial, measured here; on the simulated clock it takes {MESSAGE * 1e6:.0f} us "
        "more, for the messages. memory: its peak.",
        f"proposal: processor time of a side process for one; informed: trials proposed from {INFORMED} results of "
        "their cell or more.",
        f"regret: how far the best of a cell lies above its least value, mean and worst of the {len(common)} cells "
        "that all machines had."])
