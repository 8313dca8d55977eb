"""What ends a sweep before its trials are done: the end of the job's time, a budget of device hours, a stuck trial.

A trial that cannot end before the job is killed is not started: it would be lost, and the next job does it anyway. How
long it will take is told by the trials that have ended.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sweeps.grid import Cell
from sweeps.journal import Clock, RunError

MARGIN = 15.0  # [s] before the end of the job that are left for writing
SLACK = 1.3  # by which a trial may be longer than the longest of its cell so far
HOUR = 3600.0
ENDS = ("TOMOATLAS_END", "SLURM_JOB_END_TIME")  # [s since 1970] when a job is killed, for schedulers that tell


def job_end(env: Mapping[str, str]) -> float | None:
    """When the job that this process runs in is killed, in seconds since 1970; None where nobody says."""
    for name in ENDS:
        if given := env.get(name):
            try:
                return float(given)
            except ValueError:
                raise RunError(f"{name} is {given!r}, not a time in seconds since 1970: unset it, or set it by "
                               "$(date -d '+2 hours' +%s)") from None
    return None


@dataclass
class Ledger:
    """What trials have cost so far, and what the next may cost.

    until: when the job is killed [s since 1970]. budget: device hours of the sweep. None: no limit.
    """

    until: float | None = None
    budget: float | None = None
    clock: Clock = time
    hours: float = 0.0
    longest: dict[str, float] = field(default_factory=dict)  # [s] by cell, of the messages that ended well
    most: float = 0.0  # [s] of all cells

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Count a result; a batch shares its seconds, so that each of its trials knows the whole."""
        self.hours += result["seconds"] * cell.sweep.solver.devices / HOUR
        if result["status"] == "ok":
            span = result["seconds"] * result["batch"]
            self.longest[cell.id] = max(span, self.longest.get(cell.id, 0.0))
            self.most = max(span, self.most)

    def helped(self, cell: Cell, seconds: float) -> None:
        """Count the time of a worker that helped with a trial of another."""
        self.hours += seconds * cell.sweep.solver.devices / HOUR

    def left(self) -> float:
        """Seconds in which trials may still run."""
        return float("inf") if self.until is None else self.until - MARGIN - self.clock.time()

    def refusal(self, cell: Cell) -> str | None:
        """Why no trial of this cell is to be started now; None where one may. Where nothing is known, it may."""
        if self.budget is not None and self.hours >= self.budget:
            return f"{self.hours:.3g} device hours are spent, and search.budget_hours is {self.budget:g}"
        left = self.left()
        if left <= 0:
            return "the job's time is over"
        takes = self.longest.get(cell.id, self.most)
        if takes * SLACK > left:
            return f"the job's time ends in {left + MARGIN:.0f} s, and a trial takes up to {takes:.0f} s"
        return None

    @property
    def spent(self) -> bool:
        """Whether the budget is used up."""
        return self.budget is not None and self.hours >= self.budget
