"""Which cell a free worker is to have, and that there is a trial of it: proposals are asked for, never waited for.

A worker gets a cell; where the next trial of that cell is not at hand, its place is kept and the advisers are asked.
Cells stick to workers, for their data are there; else a worker goes where fewest work. Where trials are so short that
workers would often wait for a proposal, one more is made ahead of need; it then knows one result less. Cells share the
workers, where search.in_flight leaves it open; one whose trials have all gone out leaves its share to the others.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from sweeps.advice import Advice, Advisers, Event, subscriptions
from sweeps.optimizer import SpaceExhausted
from sweeps.search import CellSearch

WORTH = 0.01  # a proposal is made ahead where it takes more than this share of a trial's time
MEMORY = 0.2  # weight of the newest of the times that are averaged

Key = tuple[int, int, int]


class Dispatch:
    """Workers and cells, brought together.

    lines: how many lines the journal has now. crew: how many workers there are. refusal: why no trial of a cell may
    start. ask: notes that a trial of a cell goes out and returns the event.
    """

    def __init__(self, searches: Mapping[str, CellSearch], advisers: Advisers, lines: Callable[[], int],
                 crew: Callable[[], int], refusal: Callable[[CellSearch], str | None],
                 ask: Callable[[CellSearch, Event], Event]) -> None:
        self.searches, self.advisers, self.lines, self.crew = searches, advisers, lines, crew
        self.refusal, self.ask = refusal, ask
        self.limit: str | None = None  # why trials that are ready are not started
        self.home: dict[str, str] = {}  # the cell a worker had last: its data are still there
        self.waiting: dict[str, deque[str]] = {name: deque() for name in searches}  # workers, by cell
        self.placed: dict[str, str] = {}  # the cell, by worker that waits
        self.requests: dict[str, int] = {}  # by cell: how many lines the journal had when it was asked for
        self._line: list[tuple[Key, str]] = []
        self._in_line: dict[str, Key] = {}
        self._takes: dict[str, float] = {}  # [s] a trial, by cell
        self._thinks = 0.0  # [s] a proposal
        self._share = 0  # workers for each cell
        self._affects: dict[str, list[str]] = {name: [] for name in searches}
        for name, search in searches.items():
            for source in subscriptions(search):
                self._affects[source].append(name)
            self.queue(search)

    def share(self) -> None:
        """Let the cells that have trials to come share the workers there are now."""
        to_come = [search for search in self.searches.values() if not search.all_asked]
        share = math.ceil(self.crew() / max(1, len(to_come)))
        if share > self._share:
            self._share = share
            for search in to_come:
                search.widen(share)
                self.queue(search)

    def place(self, worker: str) -> bool:
        """Give a worker a cell; False where there is none for it now."""
        search = self._choose(self.home.get(worker))
        if search is None:
            return False
        name = search.cell.id
        self.waiting[name].append(worker)
        self.placed[worker] = name
        search.promised += 1
        self.queue(search)
        return True

    def prepare(self, search: CellSearch) -> None:
        """Make the proposals that a cell lacks, or ask the advisers for them."""
        name = search.cell.id
        if name in self.requests:
            return
        spare = self._thinks > WORTH * self._takes.get(name, float("inf"))
        count = search.wanted(int(spare) * search.batch)
        seen = self.lines()
        while count and not search.modelled(search.following):
            try:
                proposal = search.propose(search.following)
            except SpaceExhausted:
                search.planned = search.following
                self.share()
                return
            search.proposed[proposal["trial"]] = proposal | {"seen": seen}
            count -= 1
        if count:
            self.requests[name] = seen
            self.advisers.ask(name, list(search.proposed.values()), count)

    def advised(self, advice: Advice) -> None:
        """Take proposals in."""
        search, seen = self.searches[advice.cell], self.requests.pop(advice.cell)
        if advice.lost is not None:
            return  # whoever waits is asked for again, from what is known now
        for proposal in advice.proposals:
            search.proposed[proposal["trial"]] = proposal | {"seen": seen}
        if advice.proposals:
            seconds = advice.seconds / len(advice.proposals)
            self._thinks = _mean(self._thinks or seconds, seconds)
        if advice.exhausted:
            search.planned = search.following
            self.share()
        self.queue(search)

    def served(self) -> Iterator[tuple[str, list[Event]]]:
        """Workers that wait and whose trials are at hand now, with the asks of a batch; those in vain wait no more."""
        for name in dict.fromkeys(self.placed.values()):
            search, waiting = self.searches[name], self.waiting[name]
            while True:
                self.prepare(search)
                asks = self._batch(search) if waiting else []
                if not asks:
                    break
                worker = waiting[0]
                self.queue(self._free(worker))
                self.home[worker] = name
                yield worker, asks
            while waiting and name not in self.requests:  # the space is exhausted, or another has the last trial
                self.queue(self._free(waiting[0]))

    def ended(self, search: CellSearch, seconds: float | None) -> None:
        """A trial of a cell came to an end, after so many seconds, or was lost."""
        name = search.cell.id
        if seconds is not None:
            self._takes[name] = _mean(self._takes.get(name, seconds), seconds)
        for near in self._affects[name]:
            self.queue(self.searches[near])
            if self.waiting[near]:
                self.prepare(self.searches[near])

    def gone(self, worker: str) -> None:
        """A worker is lost; if it waited, its place is free."""
        self.home.pop(worker, None)
        if worker in self.placed:
            self.queue(self._free(worker))

    def _free(self, worker: str) -> CellSearch:
        """A worker waits no more; the cell it waited for."""
        name = self.placed.pop(worker)
        self.waiting[name].remove(worker)
        self.searches[name].promised -= 1
        return self.searches[name]

    def _batch(self, search: CellSearch) -> list[Event]:
        """Trials at hand for one worker."""
        asks: list[Event] = []
        while len(asks) < search.batch and (not asks or search.joins(asks[0])):
            trial = search.take()
            if trial is None:
                break
            asks.append(self.ask(search, trial))
            search.at_work.add(trial["trial"])
            if not search.may_share(trial["trial"]):
                break
        if asks and search.all_asked:
            self.share()
        return asks

    def _choose(self, home: str | None) -> CellSearch | None:
        """The cell that a worker should have: its last one if that is its turn, else where fewest work."""
        best = self._best()
        if best is not None and home is not None:
            last = self.searches[home]
            if last is not best and last.turn() <= best.turn() and last.open() and self.refusal(last) is None:
                return last
        return best

    def _best(self) -> CellSearch | None:
        """The first in line that is open and not refused."""
        refused, found = list[tuple[Key, str]](), None
        self.limit = None
        while self._line and found is None:
            key, name = self._line[0]
            search = self.searches[name]
            if key != self._in_line.get(name) or not search.open():
                heapq.heappop(self._line)
                if key == self._in_line.get(name):
                    del self._in_line[name]
            elif why := self.refusal(search):
                self.limit = self.limit or why
                refused.append(heapq.heappop(self._line))
            else:
                found = search
        for entry in refused:
            heapq.heappush(self._line, entry)
        if found is not None:
            self.limit = None
        return found

    def queue(self, search: CellSearch) -> None:
        """Put a cell in line, or to its new place there."""
        name, key = search.cell.id, _key(search)
        if self._in_line.get(name) != key and search.open():
            self._in_line[name] = key
            heapq.heappush(self._line, (key, name))


def _key(search: CellSearch) -> Key:
    return search.turn(), len(search.at_work) + search.promised, len(search.history.rows)


def _mean(before: float, newest: float) -> float:
    return before + MEMORY * (newest - before)
