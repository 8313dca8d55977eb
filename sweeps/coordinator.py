"""The asynchronous loop: ask the optimiser of a cell, hand the trial to a free worker, write down the answer.

Nothing is kept here that does not follow from the journal: every event is appended to it, then applied to a
`History`, and a run that continues applies the same events again. A kill costs the trials that were running.

A message to a worker:  {"cell", "trial", "attempt", "kind", "params", "settings", "folder"}
A result of a worker:   {"status": "ok" | sentence, "objective", "metrics": {name: number},
                         "elements": {name: {element: number}}, "checkpoints": [{"iterations", "objective",
                         "metrics", "elements"}], "iterations", "seconds", "worker", "volume": path | null}
"""

from __future__ import annotations

import difflib
import itertools
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.atlas import Atlas, RunFolder, commit, resolved, version
from sweeps.crew import Event, Workers
from sweeps.grid import Cell, trials
from sweeps.journal import SAFE, CellHistory, History, Journal, RunError
from sweeps.optimizer import Optimizer, SpaceExhausted
from sweeps.settings import Sweep, dump

LOSSES = 3  # workers that may die over one trial before it becomes a failed row
INTERRUPTIONS = 20  # ends of the whole run during one trial: MPICH ends a job when one of its workers dies
GRACE = 20.0  # [s] for running trials after the first signal; Slurm kills 30 s after SIGTERM
EMPTY: dict[str, Any] = {"status": "", "objective": None, "metrics": {}, "elements": {}, "checkpoints": [],
                         "iterations": 0, "seconds": 0.0, "worker": "", "volume": None}


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
    figures: as in summary.json.
    searches: by cell.
    """

    folder: Path
    total: int
    done: int
    failed: int
    stopped: str | None
    figures: dict[str, Any]
    searches: dict[str, CellSearch]


class CellSearch:
    """The search in one cell: what to try next, from the cell's part of the journal.

    Free order proposes from every result there is. Strict order proposes search trial j from the results of
    trials 0 .. j - L in the order of their numbers, with j - L + 1 .. j - 1 pending (L = search.in_flight):
    neither timing nor kills can change what is proposed.
    """

    def __init__(self, cell: Cell, history: CellHistory) -> None:
        self.cell, self.history, self.search = cell, history, cell.sweep.search
        self.planned = trials(cell)
        self.first = len(cell.fixed)  # number of the first searched trial
        self.at_work: set[int] = set()  # trials that a worker has now
        self._told = 0
        self._optimizer: Optimizer | None = None

    def orphans(self) -> list[int]:
        """Trials that were asked, are not finished, and have no worker."""
        return [trial for trial in self.history.running() if trial not in self.at_work]

    def ready(self) -> bool:
        """Whether a trial could be handed out now."""
        trial = len(self.history.rows)
        if self.orphans():
            return True
        if trial >= self.planned or trial < self.first:
            return trial < self.planned
        if self.search.order == "strict":
            return all(self.history.rows[k].result for k in self._before(trial))
        return sum(k >= self.first for k in self.history.running()) < self.search.in_flight

    def next(self) -> dict[str, Any] | None:
        """What to hand out of a cell that is `ready`: an ask without its cell and attempt.

        None where every point of a finite space has been asked: then the cell plans no more trials.
        """
        orphans = self.orphans()
        if not orphans:
            try:
                return self.propose()
            except SpaceExhausted:
                self.planned = len(self.history.rows)
                return None
        ask = self.history.rows[min(orphans)].ask
        return {key: ask[key] for key in ("trial", "kind", "params", "pending")}

    def propose(self) -> dict[str, Any]:
        """The first trial that was never asked."""
        trial = len(self.history.rows)
        if trial < self.first:
            return {"trial": trial, "kind": "baseline", "params": self.cell.fixed[trial], "pending": []}
        running = range(max(self.first, trial - self.search.in_flight + 1), trial) \
            if self.search.order == "strict" else [k for k in self.history.running() if k >= self.first]
        pending = [self.history.rows[k].ask["params"] for k in running]
        params = self.optimizer(trial).ask(pending, trial - self.first)
        return {"trial": trial, "kind": "search", "params": params, "pending": pending}

    def optimizer(self, trial: int | None = None) -> Optimizer:
        """The optimiser, told what it may know when it proposes `trial`, or else all there is to know."""
        if self._optimizer is None:
            seed = zlib.crc32(f"{self.cell.sweep.seed} {self.cell.id}".encode())
            self._optimizer = Optimizer(self.cell.space, seed, self.search.initial, self.search.acquisition)
        for k in self._known(trial)[self._told:]:
            row = self.history.rows[k]
            self._optimizer.tell(row.ask["params"], row.objective)
            self._told += 1
        return self._optimizer

    def _known(self, trial: int | None) -> list[int]:
        """Trials whose results may be told before `trial` is proposed, in the order of telling."""
        if self.search.order == "free":
            return [k for k in self.history.finished if k >= self.first]
        if trial is not None:
            return list(self._before(trial))
        return list(itertools.takewhile(set(self.history.finished).__contains__, itertools.count(self.first)))

    def _before(self, trial: int) -> Iterable[int]:
        """In strict order: the trials that must be finished before `trial` is proposed."""
        return range(self.first, max(self.first, trial - self.search.in_flight + 1))


class _Run:
    """One run of the coordinator: who works on what, and the way of every event into the journal."""

    def __init__(self, cells: Sequence[Cell], workers: Workers, folder: RunFolder, journal: Journal,
                 observer: Observer) -> None:
        self.workers, self.folder, self.journal, self.observer = workers, folder, journal, observer
        self.history = History(journal.events)
        self.searches = {cell.id: CellSearch(cell, self.history.cell(cell.id)) for cell in cells}
        self.jobs: dict[str, dict[str, Any]] = {}  # ask by worker
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
        """Give idle workers trials, if there are any: of the cell each had last, else where fewest work."""
        for worker in self.workers.idle():
            ready = [search for search in self.searches.values() if search.ready()]
            if not ready:
                return
            home = self.home.get(worker)
            self.submit(worker, min(ready, key=lambda search: (
                search.cell.id != home, len(search.at_work), len(search.history.rows))))

    def submit(self, worker: str, search: CellSearch) -> None:
        """Ask for a trial, write that down, and hand it to a worker."""
        cell, trial = search.cell, search.next()
        if trial is None:
            return
        attempt = self.history.next_attempt(cell.id, trial["trial"])
        ask = self.record({"event": "ask", "cell": cell.id, "attempt": attempt, **trial})
        search.at_work.add(ask["trial"])
        self.jobs[worker], self.home[worker] = ask, cell.id
        message = {key: ask[key] for key in ("cell", "trial", "attempt", "kind", "params")}
        message |= {"settings": dump(resolved(cell, ask["params"])), "folder": str(self.folder.path.resolve())}
        self.workers.submit(worker, message)

    def receive(self, event: Event) -> None:
        """Take a worker's report into the journal."""
        if event.lost is not None:
            self.last_loss = event.lost
            self.home.pop(event.worker, None)
        ask = self.jobs.pop(event.worker, None)
        if ask is None:
            return
        self.searches[ask["cell"]].at_work.discard(ask["trial"])
        if event.result is None:
            self.lose(ask, event.worker, event.lost or "")
        elif "fatal" in event.result:
            raise RunError(f"{event.result['fatal']}; {SAFE}")
        else:
            self.finish(ask, {**event.result, "worker": event.result.get("worker") or event.worker})

    def finish(self, ask: dict[str, Any], answer: dict[str, Any]) -> None:
        """Note a result."""
        place = {"event": "result", **{key: ask[key] for key in ("cell", "trial", "attempt")}}
        result = self.record({**place, **EMPTY, **answer, **place})
        search = self.searches[ask["cell"]]
        best = search.history.winner(bool(search.cell.space))
        self.changed.add(ask["cell"])
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
        grace: float = GRACE) -> Summary:
    """Carry out what is left of a sweep.

    stop: how often the user has asked to stop: once, running trials may end within `grace` [s]; twice, leave.
    again: the id of a cell to run from its first trial.
    Raises RunError where the folder belongs to other settings or another coordinator, where there is no such
    cell, when the disk is full, and when no worker is left.
    """
    observer = observer or Observer()
    with folder.open(sweep) as journal:
        state = _Run(cells, workers, folder, journal, observer)
        state.interrupted()
        if again is not None:
            state.again(again)
        atlas = Atlas(folder, sweep, cells, state.history)
        atlas.rebuild()
        observer.started(state.total, state.done)
        if state.done < state.total:
            _work(state, atlas, stop, grace)
        stopped = None
        if state.done < state.total:
            stopped = f"stopped: {state.done} of {state.total} trials; run again to continue"
        journal.append({"event": "stop" if stopped else "end", "reason": stopped or "all trials are done"})
        atlas.update(state.changed)
        figures = atlas.summary
        summary = Summary(folder.path, state.total, state.done, figures["failed"], stopped, figures,
                          state.searches)
    observer.finished(summary)
    return summary


def _work(state: _Run, atlas: Atlas, stop: Callable[[], int], grace: float) -> None:
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
                deadline = time.monotonic() + grace
            if deadline is None:
                state.dispatch()
            elif asked > 1 or not state.jobs or time.monotonic() > deadline:
                return
            if not state.workers.names():
                raise RunError(f"no worker is left: {state.last_loss}; nothing that was finished is lost")
            for event in state.workers.poll(0.1):
                state.receive(event)
            if atlas.due():
                atlas.update(state.changed)
    finally:
        state.workers.close()
