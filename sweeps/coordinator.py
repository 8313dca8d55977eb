"""The asynchronous loop: ask the optimiser of a cell, hand the trial to a free worker, write down the answer.

Nothing is kept here that does not follow from the journal: every event is appended to it, then applied to a
`History`, and a run that continues applies the same events again. A kill costs the trials that were running.

A message to a worker:  {"cell", "folder", "trials": [{"trial", "attempt", "kind", "params", "settings"}], "help"?}
Its answer, per trial:  [{"status": "ok" | sentence, "objective", "metrics": {name: number},
                          "elements": {name: {element: number}}, "checkpoints": [{"iterations", "objective",
                          "metrics", "elements"}], "iterations", "seconds", "batch", "worker", "volume": path | null}]
The trials of a message are of one cell and one fidelity, so that a solver can take them together. Where there is no
trial for a worker, and what others have at hand can be shared (`SHARED`), it is asked to `help` with one of theirs.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps import winners
from sweeps.advice import Advisers, Inline, news
from sweeps.atlas import Atlas, RunFolder, commit, resolved, version
from sweeps.crew import Event, Workers
from sweeps.dispatch import Dispatch
from sweeps.grid import Cell
from sweeps.journal import SAFE, SYNC, Clock, History, Journal, RunError
from sweeps.limits import Ledger
from sweeps.search import CellSearch, searches
from sweeps.settings import Sweep, dump

SHARED = ("mspt",)  # systems whose trials begin with stages that any worker can make
LOSSES = 3  # workers that may die over one trial before it becomes a failed row
INTERRUPTIONS = 20  # ends of the whole run during one trial: MPICH ends a job when one of its workers dies
GRACE = 20.0  # [s] for running trials after the first signal; Slurm kills 30 s after SIGTERM
POLL = 0.1  # [s] that the coordinator waits for reports, at most
GROUP = 256  # messages that wait for each other's lines in the journal, at most
SOON = 0.005  # [s] the same, while workers wait for proposals
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
                 observer: Observer, batches: Mapping[str, int], ledger: Ledger, advisers: Advisers,
                 clock: Clock) -> None:
        self.workers, self.folder, self.journal, self.observer = workers, folder, journal, observer
        self.advisers, self.clock, self.ledger = advisers, clock, ledger
        self.place = str(folder.path.resolve())  # workers may have another working directory
        self.history = History(journal.events)
        self.searches = searches(cells, self.history, batches)
        for cell in cells:
            for row in self.history.cell(cell.id).rows.values():
                if row.result is not None:
                    ledger.add(cell, row.result)
        for event in journal.events:
            if event["event"] == "help" and event["cell"] in self.searches:
                ledger.helped(self.searches[event["cell"]].cell, event["seconds"])
        self.dispatching = Dispatch(self.searches, advisers, lambda: len(journal.events) + len(self.unwritten),
                                    lambda: len(workers.names()), lambda search: ledger.refusal(search.cell), self.ask)
        self.unwritten: list[dict[str, Any]] = []  # events that count already, but are not on the disk yet
        self.untold: list[Callable[[], None]] = []  # what the observer hears once it is on the disk
        self.jobs: dict[str, list[dict[str, Any]]] = {}  # asks by worker
        self.helping: dict[str, dict[str, Any]] = {}  # the ask, by worker that helps with it
        self.since: dict[str, float] = {}  # when each worker got them
        self.helped: set[tuple[str, str, int, int]] = set()  # worker, cell, trial, attempt
        self.sharing = any(cell.sweep.system in SHARED for cell in cells)
        self.expired: set[str] = set()  # workers given up in the middle of a trial
        self.changed: set[str] = set()  # cells the atlas has not seen yet
        self.messages: dict[tuple[str, float], str] = {}  # settings of a trial but for its params, JSON
        self.last_loss, self.told, self.looked = "", False, 0.0  # told: whether the advisers hear what happens
        self.patience = POLL  # [s] to wait for reports
        self.limited = any(search.search.trial_timeout is not None for search in self.searches.values())
        self.done = sum(len(search.history.finished) for search in self.searches.values())

    @property
    def total(self) -> int:
        return sum(max(search.planned, len(search.history.rows)) for search in self.searches.values())

    @property
    def limit(self) -> str | None:
        """Why trials that are ready are not started."""
        return self.dispatching.limit

    def note(self, event: dict[str, Any]) -> dict[str, Any]:
        """Let an event count; `flush` writes it down, before anybody outside hears of it."""
        noted = self.journal.stamped(event)
        self.unwritten.append(noted)
        self.history.apply(noted)
        if self.told and (told := news(noted)):
            self.advisers.tell(told)
        return noted

    def flush(self) -> None:
        """Write down what was noted, all at once: each time costs the disk milliseconds."""
        if self.unwritten:
            self.journal.append(*self.unwritten)
            self.unwritten.clear()
        for tell in self.untold:
            tell()
        self.untold.clear()

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
        self.note({"event": "again", "cell": name})
        self.dispatching.queue(self.searches[name])
        self.done = sum(len(search.history.finished) for search in self.searches.values())

    def dispatch(self) -> None:
        """Give idle workers cells, and trials to those whose trials are at hand."""
        for advice in self.advisers.poll():
            self.dispatching.advised(advice)
        for worker in self.workers.idle():
            if worker not in self.dispatching.placed and not self.dispatching.place(worker):
                break
        messages = []
        # When thousands wait, as at the start, the first need not wait for the last.
        for worker, asks in itertools.islice(self.dispatching.served(), GROUP):
            self.jobs[worker], self.since[worker] = asks, self.clock.monotonic()
            messages.append((worker, self.message(asks)))
        self.flush()
        messages += self.helps()
        for worker, message in messages:
            self.workers.submit(worker, message)
        waiting = self.dispatching.placed and self.dispatching.requests
        self.patience = 0.0 if len(messages) == GROUP else SOON if waiting else POLL

    def ask(self, search: CellSearch, trial: dict[str, Any]) -> dict[str, Any]:
        """Note that a trial goes out."""
        attempt = self.history.next_attempt(search.cell.id, trial["trial"])
        return self.note({"event": "ask", "cell": search.cell.id, "attempt": attempt, **trial})

    def message(self, asks: list[dict[str, Any]]) -> dict[str, Any]:
        """What a worker is told."""
        return {"cell": asks[0]["cell"], "folder": self.place, "trials": [
            {key: ask[key] for key in ("trial", "attempt", "kind", "params")} | {"settings": self.settings(ask)}
            for ask in asks]}

    def helps(self) -> list[tuple[str, dict[str, Any]]]:
        """Messages to workers that have nothing to do, while others have trials that can be shared; once for each."""
        if not self.sharing:
            return []
        free = [w for w in self.workers.idle() if w not in self.jobs and w not in self.dispatching.placed]
        at_work = [ask for asks in self.jobs.values() for ask in asks
                   if self.searches[ask["cell"]].cell.sweep.system in SHARED]
        messages = []
        for worker in free:
            fresh = [ask for ask in at_work if (worker, ask["cell"], ask["trial"], ask["attempt"]) not in self.helped]
            if fresh:
                helped = [(ask["cell"], ask["trial"]) for ask in self.helping.values()]
                ask = min(fresh, key=lambda each: helped.count((each["cell"], each["trial"])))
                self.helped.add((worker, ask["cell"], ask["trial"], ask["attempt"]))
                self.helping[worker], self.since[worker] = ask, self.clock.monotonic()
                messages.append((worker, self.message([ask]) | {"help": True}))
        return messages

    def settings(self, ask: dict[str, Any]) -> dict[str, Any]:
        """The settings of a trial. Those of a cell's searched trials are worked out once: that takes milliseconds."""
        cell, params, fidelity = self.searches[ask["cell"]].cell, ask["params"], ask["fidelity"]
        if ask["kind"] != "search":
            return dump(resolved(cell, params, fidelity))
        if (cell.id, fidelity) not in self.messages:
            self.messages[cell.id, fidelity] = json.dumps(dump(resolved(cell, params, fidelity)))
        settings: dict[str, Any] = json.loads(self.messages[cell.id, fidelity])
        for name, value in params.items():
            *rooms, last = name.split(".")
            functools.reduce(dict.__getitem__, rooms, settings)[last] = value
        return settings

    def start(self) -> None:
        """Bring up workers and advisers."""
        self.workers.start(self.folder.path)
        if any(search.cell.space for search in self.searches.values()):
            self.advisers.start(self.history, self.folder.path)
            self.told = True
        self.dispatching.share()
        self.note({"event": "start", "tomoatlas": version(), "commit": commit(), "host": socket.gethostname(),
                   "pid": os.getpid(), "workers": self.workers.names()})
        self.flush()

    def listen(self) -> None:
        """Wait for reports, and for workers that take too long."""
        for event in self.workers.poll(self.patience):
            self.receive(event)
        self.patience = POLL
        self.journal.sync(SYNC)
        now = self.clock.monotonic()
        if self.limited and now - self.looked > POLL:
            self.looked = now
            self.expire(now)

    def expire(self, now: float) -> None:
        """Give up workers whose trials take longer than they may."""
        for worker, asks in [*self.jobs.items(), *((worker, [ask]) for worker, ask in self.helping.items())]:
            allowed = self.searches[asks[0]["cell"]].cell.sweep.search.trial_timeout
            if allowed is not None and now - self.since[worker] > allowed * len(asks) and worker not in self.expired:
                self.expired.add(worker)
                self.workers.kill(worker)

    def receive(self, event: Event) -> None:
        """Take a worker's report into the journal."""
        if event.lost is not None:
            self.last_loss = event.lost
            self.dispatching.gone(event.worker)
        asks, late = self.jobs.pop(event.worker, []), event.worker in self.expired
        self.expired.discard(event.worker)
        if event.worker in self.helping:
            self.thanked(event, self.helping.pop(event.worker))
            return
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
            self.go_on_after(result)
            self.finish(ask, {**result, "worker": result.get("worker") or event.worker})

    def thanked(self, event: Event, ask: dict[str, Any]) -> None:
        """Count a worker's help; the trial is another's, and what is wrong with it will be said there."""
        for result in event.results or []:
            self.go_on_after(result)
            self.note({"event": "help", "cell": ask["cell"], "trial": ask["trial"], "worker": event.worker,
                       "seconds": result["seconds"]})
            self.ledger.helped(self.searches[ask["cell"]].cell, result["seconds"])

    def go_on_after(self, result: dict[str, Any]) -> None:
        """RunError where a worker found what ends the run."""
        if "fatal" in result:
            self.flush()
            raise RunError(f"{result['fatal']}; {SAFE}")

    def finish(self, ask: dict[str, Any], answer: dict[str, Any]) -> None:
        """Note a result."""
        place = {"event": "result", **{key: ask[key] for key in ("cell", "trial", "attempt")}}
        result = self.note({**place, **EMPTY, **answer, **place})
        search = self.searches[ask["cell"]]
        best = winners.winner(search.cell, search.history)
        self.changed.add(ask["cell"])
        self.done += 1
        self.ledger.add(search.cell, result)
        self.dispatching.ended(search, result["seconds"] if result["status"] == "ok" else None)
        self.untold.append(functools.partial(
            self.observer.result, result, search.cell, best.objective if best else None))

    def lose(self, ask: dict[str, Any], worker: str, reason: str) -> None:
        """Note a lost trial; it goes out again, unless it was lost too often."""
        place = {key: ask[key] for key in ("cell", "trial", "attempt")}
        self.note({"event": "lost", **place, "worker": worker, "reason": reason})
        search = self.searches[ask["cell"]]
        self.untold.append(functools.partial(
            self.observer.lost, search.cell, ask["trial"], ask["attempt"], worker, reason))
        self.dispatching.ended(search, None)
        row = search.history.rows[ask["trial"]]
        if row.losses >= LOSSES or row.interruptions >= INTERRUPTIONS:
            status = f"lost {row.losses + row.interruptions} times, the last time because {reason}"
            self.finish(ask, {"status": status, "worker": worker})


def run(sweep: Sweep, cells: Sequence[Cell], workers: Workers, folder: RunFolder,
        observer: Observer | None = None, stop: Callable[[], int] = lambda: 0, again: str | None = None,
        grace: Callable[[], float] = lambda: GRACE, batches: Mapping[str, int] | None = None,
        until: float | None = None, advisers: Advisers | None = None, clock: Clock = time) -> Summary:
    """Carry out what is left of a sweep.

    stop: how often the user has asked to stop: once, running trials may end within `grace()` [s]; twice, leave.
    again: the id of a cell to run from its first trial.
    batches: by cell, how many trials a worker can take at once, where search.batch is auto; by default one.
    until: when the job is killed, in seconds since 1970: no trial is started that will not have ended by then.
    advisers: who proposes trials; by default this process, while the workers that are free wait.
    Raises RunError where the folder belongs to other settings or another coordinator, where there is no such
    cell, when the disk is full, and when no worker is left.
    """
    observer, batches = observer or Observer(), batches or {}
    with folder.open(sweep, clock) as journal:
        ledger = Ledger(until, sweep.search.budget_hours, clock)
        state = _Run(cells, workers, folder, journal, observer, batches, ledger,
                     advisers or Inline(cells, batches), clock)
        state.interrupted()
        if again is not None:
            state.again(again)
        state.flush()
        atlas = Atlas(folder, sweep, cells, state.history, clock)
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
        journal.sync()
        atlas.update(state.changed)
        figures = atlas.summary
        summary = Summary(folder.path, state.total, state.done, figures["failed"], stopped, limit,
                          ledger.spent, figures, state.searches)
    observer.finished(summary)
    return summary


def _work(state: _Run, atlas: Atlas, stop: Callable[[], int], grace: Callable[[], float]) -> None:
    """The loop, until every trial is done or the user has had enough."""
    deadline, clock = None, state.clock
    try:
        state.start()
        while state.jobs or state.done < state.total:
            asked = stop()
            if asked and deadline is None:
                deadline = clock.monotonic() + grace()
            if deadline is None:
                state.dispatch()
                if state.limit and not state.jobs and not state.dispatching.placed:
                    return
            state.flush()
            if deadline is not None and (asked > 1 or not state.jobs or clock.monotonic() > deadline):
                return
            if not state.jobs and not state.workers.names():
                raise RunError(f"no worker is left: {state.last_loss}; nothing that was finished is lost")
            state.listen()
            if atlas.due():
                state.flush()
                state.journal.sync()  # before anything is deleted that it may have to make anew
                atlas.update(state.changed)
        state.flush()
    finally:
        state.workers.close()
