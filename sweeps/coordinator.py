"""The asynchronous loop: ask the optimiser of a cell, hand the trial to a free worker, write down the answer.

Nothing is kept here that does not follow from the journal: every event is appended to it, then applied to a
`History`, and a run that continues applies the same events again. A kill costs the trials that were running.

A message to a worker:  {"cell", "folder", "trials": [{"trial", "attempt", "kind", "params", "settings"}]}
Its answer, per trial:  [{"status": "ok" | sentence, "objective", "metrics": {name: number},
                          "elements": {name: {element: number}}, "checkpoints": [{"iterations", "objective",
                          "metrics", "elements"}], "iterations", "seconds", "batch", "worker", "volume": path | null}]
The trials of a message are of one cell and one fidelity, so that a solver can take them together.
"""

from __future__ import annotations

import difflib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.atlas import Atlas, RunFolder, commit, resolved, version
from sweeps.crew import Event, Workers
from sweeps.grid import Cell
from sweeps.journal import SAFE, History, Journal, RunError
from sweeps.limits import Ledger
from sweeps.search import CellSearch, searches
from sweeps.settings import Sweep, dump

LOSSES = 3  # workers that may die over one trial before it becomes a failed row
INTERRUPTIONS = 20  # ends of the whole run during one trial: MPICH ends a job when one of its workers dies
GRACE = 20.0  # [s] for running trials after the first signal; Slurm kills 30 s after SIGTERM
EMPTY: dict[str, Any] = {"status": "", "objective": None, "metrics": {}, "elements": {}, "checkpoints": [],
                         "iterations": 0, "seconds": 0.0, "batch": 1, "worker": "", "volume": None}


class Observer:
    """Told what happens, in order; this one keeps silent."""

    def started(self, total: int, done: int) -> None:
        """The run begins: `done` of `total` trials were finished by earlier runs."""

    def result(self, result: dict[str, Any], cell: Cell, best: float | None) -> None:
        """A trial has ended, well or not (`result["status"]`); `best`: the cell's lowest objective so far."""

    def lost(self, cell: Cell, trial: int, attempt: int, worker: str, reason: str) -> None:
        """A trial was lost with its worker; it will be tried again or become a failed row."""

    def finished(self, summary: Summary) -> None:
        """The run has ended."""


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    total, done, failed: numbers of trials; failed ones are done, too.
    stopped: None when every trial is done; otherwise the sentence for the user.
    limit: why the sweep ended by itself before that; None where a signal ended it. spent: it was the budget.
    figures: as in summary.json.
    searches: by cell.
    """

    folder: Path
    total: int
    done: int
    failed: int
    stopped: str | None
    limit: str | None
    spent: bool
    figures: dict[str, Any]
    searches: dict[str, CellSearch]


class _Run:
    """One run of the coordinator: who works on what, and the way of every event into the journal."""

    def __init__(self, cells: Sequence[Cell], workers: Workers, folder: RunFolder, journal: Journal,
                 observer: Observer, batches: Mapping[str, int], ledger: Ledger) -> None:
        self.workers, self.folder, self.journal, self.observer = workers, folder, journal, observer
        self.history = History(journal.events)
        self.searches = searches(cells, self.history, batches)
        self.ledger = ledger
        for cell in cells:
            for row in self.history.cell(cell.id).rows.values():
                if row.result is not None:
                    ledger.add(cell, row.result)
        self.limit: str | None = None  # why trials that are ready are not started
        self.jobs: dict[str, list[dict[str, Any]]] = {}  # asks by worker
        self.since: dict[str, float] = {}  # when each worker got them
        self.expired: set[str] = set()  # workers given up in the middle of a trial
        self.home: dict[str, str] = {}  # the cell a worker had last: its data are still there
        self.changed: set[str] = set()  # cells the atlas has not seen yet
        self.last_loss = ""

    @property
    def total(self) -> int:
        return sum(max(search.planned, len(search.history.rows)) for search in self.searches.values())

    @property
    def done(self) -> int:
        return sum(len(search.history.finished) for search in self.searches.values())

    def record(self, event: dict[str, Any]) -> dict[str, Any]:
        """Write an event down, then let it count."""
        written = self.journal.append(event)
        self.history.apply(written)
        return written

    def interrupted(self) -> None:
        """Note what the end of an earlier run has cost, unless it was told to stop."""
        if self.journal.events and self.journal.events[-1]["event"] not in ("stop", "end"):
            for search in self.searches.values():
                for trial in search.orphans():
                    self.lose(search.history.rows[trial].ask, "", "the run was interrupted")

    def again(self, name: str) -> None:
        """Forget the rows of a cell; the journal keeps them."""
        if name not in self.searches:
            near = difflib.get_close_matches(name, self.searches, n=1) or list(self.searches)[:1]
            raise RunError(f"{self.folder.path}: there is no cell {name}; did you mean {near[0]}?")
        self.record({"event": "again", "cell": name})

    def dispatch(self) -> None:
        """Give idle workers trials, if there are any: of the cell each had last, else where fewest work.

        Cells that share take turns: the first trials of all tell more than all trials of the first.
        """
        for worker in self.workers.idle():
            ready = [search for search in self.searches.values() if search.ready()]
            refusals = {search.cell.id: self.ledger.refusal(search.cell) for search in ready}
            self.limit = next((why for why in refusals.values() if why), None)
            ready = [search for search in ready if refusals[search.cell.id] is None]
            if not ready:
                return
            self.limit = None
            home = self.home.get(worker)
            self.submit(worker, min(ready, key=lambda search: (
                search.turn(), search.cell.id != home, len(search.at_work), len(search.history.rows))))

    def submit(self, worker: str, search: CellSearch) -> None:
        """Ask for a batch of trials, write that down, and hand them to a worker."""
        cell, asks = search.cell, list[dict[str, Any]]()
        while len(asks) < search.batch and search.ready() and (not asks or search.joins(asks[0])):
            trial = search.next()
            if trial is None:
                break
            attempt = self.history.next_attempt(cell.id, trial["trial"])
            asks.append(self.record({"event": "ask", "cell": cell.id, "attempt": attempt, **trial}))
            search.at_work.add(trial["trial"])
            if not search.may_share(trial["trial"]):
                break
        if asks:
            self.jobs[worker], self.home[worker], self.since[worker] = asks, cell.id, time.monotonic()
            self.workers.submit(worker, {"cell": cell.id, "folder": str(self.folder.path.resolve()), "trials": [
                {key: ask[key] for key in ("trial", "attempt", "kind", "params")}
                | {"settings": dump(resolved(cell, ask["params"], ask["fidelity"]))} for ask in asks]})

    def expire(self) -> None:
        """Give up workers whose trials take longer than they may."""
        now = time.monotonic()
        for worker, asks in self.jobs.items():
            allowed = self.searches[asks[0]["cell"]].cell.sweep.search.trial_timeout
            if allowed is not None and now - self.since[worker] > allowed * len(asks) and worker not in self.expired:
                self.expired.add(worker)
                self.workers.kill(worker)

    def receive(self, event: Event) -> None:
        """Take a worker's report into the journal."""
        if event.lost is not None:
            self.last_loss = event.lost
            self.home.pop(event.worker, None)
        asks, late = self.jobs.pop(event.worker, []), event.worker in self.expired
        self.expired.discard(event.worker)
        for ask in asks:
            self.searches[ask["cell"]].at_work.discard(ask["trial"])
        if event.results is None:
            for ask in asks:
                allowed = self.searches[ask["cell"]].cell.sweep.search.trial_timeout
                if late and len(asks) == 1:
                    status = f"took longer than search.trial_timeout ({allowed:g} s)"
                    self.finish(ask, {"status": status, "worker": event.worker, "seconds": allowed})
                else:  # of a batch nobody knows which trial was stuck: each loss brings it nearer to going alone
                    self.lose(ask, event.worker, event.lost or "")
            return
        for ask, result in zip(asks, event.results, strict=True):
            if "fatal" in result:
                raise RunError(f"{result['fatal']}; {SAFE}")
            self.finish(ask, {**result, "worker": result.get("worker") or event.worker})

    def finish(self, ask: dict[str, Any], answer: dict[str, Any]) -> None:
        """Note a result."""
        place = {"event": "result", **{key: ask[key] for key in ("cell", "trial", "attempt")}}
        result = self.record({**place, **EMPTY, **answer, **place})
        search = self.searches[ask["cell"]]
        best = search.history.winner(bool(search.cell.space))
        self.changed.add(ask["cell"])
        self.ledger.add(search.cell, result)
        self.observer.result(result, search.cell, best.objective if best else None)

    def lose(self, ask: dict[str, Any], worker: str, reason: str) -> None:
        """Note a lost trial; it goes out again, unless it was lost too often."""
        place = {key: ask[key] for key in ("cell", "trial", "attempt")}
        self.record({"event": "lost", **place, "worker": worker, "reason": reason})
        search = self.searches[ask["cell"]]
        self.observer.lost(search.cell, ask["trial"], ask["attempt"], worker, reason)
        row = search.history.rows[ask["trial"]]
        if row.losses >= LOSSES or row.interruptions >= INTERRUPTIONS:
            status = f"lost {row.losses + row.interruptions} times, the last time because {reason}"
            self.finish(ask, {"status": status, "worker": worker})


def run(sweep: Sweep, cells: Sequence[Cell], workers: Workers, folder: RunFolder,
        observer: Observer | None = None, stop: Callable[[], int] = lambda: 0, again: str | None = None,
        grace: Callable[[], float] = lambda: GRACE, batches: Mapping[str, int] | None = None,
        until: float | None = None) -> Summary:
    """Carry out what is left of a sweep.

    stop: how often the user has asked to stop: once, running trials may end within `grace()` [s]; twice, leave.
    again: the id of a cell to run from its first trial.
    batches: by cell, how many trials a worker can take at once, where search.batch is auto; by default one.
    until: when the job is killed, in seconds since 1970: no trial is started that will not have ended by then.
    Raises RunError where the folder belongs to other settings or another coordinator, where there is no such
    cell, when the disk is full, and when no worker is left.
    """
    observer = observer or Observer()
    with folder.open(sweep) as journal:
        ledger = Ledger(until, sweep.search.budget_hours)
        state = _Run(cells, workers, folder, journal, observer, batches or {}, ledger)
        state.interrupted()
        if again is not None:
            state.again(again)
        atlas = Atlas(folder, sweep, cells, state.history)
        atlas.rebuild()
        observer.started(state.total, state.done)
        if state.done < state.total:
            _work(state, atlas, stop, grace)
        stopped, limit = None, None
        if state.done < state.total:
            limit = None if stop() else state.limit
            cure = "raise search.budget_hours" if ledger.spent and limit else "run again"
            stopped = (f"stopped: {state.done} of {state.total} trials{'; ' + limit if limit else ''}; {cure} to "
                       "continue")
        journal.append({"event": "stop" if stopped else "end", "reason": stopped or "all trials are done"})
        atlas.update(state.changed)
        figures = atlas.summary
        summary = Summary(folder.path, state.total, state.done, figures["failed"], stopped, limit,
                          ledger.spent, figures, state.searches)
    observer.finished(summary)
    return summary


def _work(state: _Run, atlas: Atlas, stop: Callable[[], int], grace: Callable[[], float]) -> None:
    """The loop, until every trial is done or the user has had enough."""
    deadline = None
    try:
        state.workers.start(state.folder.path)
        state.journal.append({"event": "start", "tomoatlas": version(), "commit": commit(),
                              "host": socket.gethostname(), "pid": os.getpid(),
                              "workers": state.workers.names()})
        while state.done < state.total:
            asked = stop()
            if asked and deadline is None:
                deadline = time.monotonic() + grace()
            if deadline is None:
                state.dispatch()
                if state.limit and not state.jobs:
                    return
            elif asked > 1 or not state.jobs or time.monotonic() > deadline:
                return
            if not state.workers.names():
                raise RunError(f"no worker is left: {state.last_loss}; nothing that was finished is lost")
            for event in state.workers.poll(0.1):
                state.receive(event)
            state.expire()
            if atlas.due():
                atlas.update(state.changed)
    finally:
        state.workers.close()
