"""What to try next in a cell, from the journal alone: each cell by itself, or together with its neighbours.

Free order proposes from every result there is. Strict order proposes a cell's search trial j from the results of
trials 0 .. j - L in the order of their numbers, with j - L + 1 .. j - 1 pending, where L = search.in_flight (auto: 2)
times search.batch: neither timing nor kills can change what is proposed. With search.strategy: shared these are the
trials of the cell and of its neighbours, all by their numbers in the search; trial j waits until they are there.

A trial is proposed (it has a number and parameters), then asked (a worker got it, the journal says so). Proposals are
a function of the history and of the proposals of the cell before them, so that any process with the same history
makes the same ones: sweeps/advice.py makes them beside the coordinator.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from sweeps.grid import CHEAP, PERIOD, Cell, fidelity, trials
from sweeps.journal import CellHistory, History, Row
from sweeps.lookup import Start, starts
from sweeps.optimizer import Optimizer, SpaceExhausted
from sweeps.shared import Elsewhere, SharedOptimizer

ALONE = 2  # losses of a trial after which it is handed out by itself: one of its batch kills workers
TOGETHER = 2  # batches of a cell at work at once where search.in_flight leaves it open, at least
NEIGHBOURS = 8  # nearest cells whose results count: so the model stays small on large grids


def searches(cells: Sequence[Cell], history: History, batches: Mapping[str, int] | None = None,
             ) -> dict[str, CellSearch]:
    """The search of every cell, by its id. batches: by cell, where search.batch is auto; by default 1."""
    made: dict[str, CellSearch] = {}
    for cell in cells:
        kind = SharedSearch if cell.sweep.search.strategy == "shared" else CellSearch
        made[cell.id] = kind(cell, history.cell(cell.id), (batches or {}).get(cell.id, 1))
    _acquaint([search for search in made.values() if isinstance(search, SharedSearch) and search.cell.space])
    return made


class CellSearch:
    """The search in one cell. batch: trials handed out at once, where search.batch leaves it open."""

    def __init__(self, cell: Cell, history: CellHistory, batch: int = 1) -> None:
        self.cell, self.history, self.search = cell, history, cell.sweep.search
        self.planned = trials(cell)
        self.first = len(cell.fixed)  # number of the first searched trial
        self.at_work: set[int] = set()  # trials that a worker has now
        self.proposed: dict[int, dict[str, Any]] = {}  # by number: made ahead, not asked yet
        self.promised = 0  # workers that wait for trials of this cell
        given = self.search.batch
        strict = self.search.order == "strict"
        # What depends on the machine must not decide what is proposed.
        self.batch = given if isinstance(given, int) else 1 if strict else batch
        together = self.search.in_flight
        self.window = self.batch * (together if isinstance(together, int) else TOGETHER)
        self._told = 0
        self._optimizer: Optimizer | None = None

    def widen(self, workers: int) -> None:
        """Let so many workers work here at once, where search.in_flight and search.order leave it open."""
        if self.search.in_flight == "auto" and self.search.order == "free":
            self.window = max(self.window, self.batch * workers)

    @property
    def all_asked(self) -> bool:
        """Whether every trial has gone out at least once."""
        return len(self.history.rows) >= self.planned

    @property
    def following(self) -> int:
        """The number of the next trial to propose."""
        return len(self.history.rows) + len(self.proposed)

    def orphans(self) -> list[int]:
        """Trials that were asked, are not finished, and have no worker."""
        return [trial for trial in self.history.running if trial not in self.at_work]

    def open(self) -> bool:
        """Whether one more worker could have a trial, now or when it is proposed."""
        ahead = self.promised * self.batch - len(self.orphans())
        return ahead < 0 or self.allowed(len(self.history.rows) + ahead)

    def allowed(self, trial: int) -> bool:
        """Whether a trial that was never asked may go out now."""
        if trial >= self.planned or trial < self.first:
            return trial < self.planned
        if self.search.order == "strict":
            return self.complete(trial - self.first)
        searched = sum(k >= self.first for k in self.history.running)
        return searched + trial - max(self.first, len(self.history.rows)) < self.window

    def wanted(self, spare: int = 0) -> int:
        """How many proposals those workers lack that wait, and `spare` that may come; in strict order none may."""
        want = self.promised * self.batch - len(self.orphans()) - len(self.proposed)
        count = 0
        while count < want and self.allowed(self.following + count):
            count += 1
        if count >= want and self.search.order == "free":
            count = min(max(count, want + spare), self.planned - self.following)
        return max(0, count)

    def complete(self, number: int) -> bool:
        """In strict order: whether everything that search trial `number` is proposed from is there."""
        rows = self.history.rows
        return all(k in rows and rows[k].result for k in self.known(number))

    def may_share(self, trial: int) -> bool:
        """Whether a trial may be solved together with others: searched, and no suspect of killing workers."""
        row = self.history.rows[trial]
        return row.ask["kind"] == "search" and row.losses + row.interruptions < ALONE

    def joins(self, ask: dict[str, Any]) -> bool:
        """Whether the next trial at hand may be solved together with one that was just taken."""
        orphans = self.orphans()
        if orphans:
            row = self.history.rows[min(orphans)]
            return self.may_share(min(orphans)) and row.fidelity == ask["fidelity"]
        following = self.proposed.get(len(self.history.rows))
        return (following is not None and self.allowed(following["trial"]) and following["kind"] == "search"
                and following["fidelity"] == ask["fidelity"])

    def fidelity(self, number: int) -> float:
        """What share of the iterations search trial `number` is to have."""
        return 1.0

    def turn(self) -> int:
        """Cells of a lower turn go first."""
        return 0

    def take(self) -> dict[str, Any] | None:
        """A trial to hand out: an ask without its cell and attempt; None where none is at hand."""
        orphans = self.orphans()
        if not orphans:
            return self.proposed.pop(len(self.history.rows), None)
        ask = self.history.rows[min(orphans)].ask
        return {"fidelity": 1.0} | {key: ask[key] for key in ("trial", "kind", "fidelity", "params", "seen", "source")
                                    if key in ask}

    def modelled(self, trial: int) -> bool:
        """Whether it takes a model, and time, to propose a trial."""
        number = trial - self.first
        return number >= 0 and Optimizer.modelled(self.search.initial, len(self.known(number)),
                                                  len(self.pending(number)))

    def propose(self, trial: int) -> dict[str, Any]:
        """The trial number `following`. Raises SpaceExhausted where every point of a finite space has been asked."""
        if trial < self.first:
            return {"trial": trial, "kind": "baseline", "fidelity": 1.0, "params": self.cell.fixed[trial]}
        number = trial - self.first
        if number < len(self.starts):
            start = self.starts[number]
            return {"trial": trial, "kind": "search", "fidelity": self.fidelity(number), "params": start.params,
                    "source": start.source}
        share, params = self.proposal(number)
        return {"trial": trial, "kind": "search", "fidelity": share, "params": params}

    @cached_property
    def starts(self) -> tuple[Start, ...]:
        """What an atlas proposes to begin with, where the search has one."""
        return starts(self.cell)

    def proposal(self, number: int) -> tuple[float, dict[str, Any]]:
        """Fidelity and params of search trial `number`."""
        return 1.0, self.optimizer(number).ask([self.params(k) for k in self.pending(number)], number)

    def params(self, trial: int) -> dict[str, Any]:
        """The parameters of a trial that was asked or proposed."""
        row = self.history.rows.get(trial)
        params: dict[str, Any] = (self.proposed[trial] if row is None else row.ask)["params"]
        return params

    def optimizer(self, number: int | None = None) -> Optimizer:
        """The optimiser, told what it may know when it proposes search trial `number`, or else all there is."""
        if self._optimizer is None:
            seed = zlib.crc32(f"{self.cell.sweep.seed} {self.cell.id}".encode())
            self._optimizer = Optimizer(self.cell.space, seed, self.search.initial, self.search.acquisition)
        known = self.known(number)
        for k in known[self._told:]:
            self._optimizer.tell(self.params(k), self.history.rows[k].objective)
        self._told = max(self._told, len(known))
        return self._optimizer

    def known(self, number: int | None) -> list[int]:
        """Trials of this cell whose results may be told before a search trial `number`, in the order of telling."""
        if self.search.order == "free":
            return [k for k in self.history.finished if k >= self.first]
        done = set(self.history.finished)
        if number is None:
            number = self.window - 1 + next(k for k in range(len(done) + 1) if self.first + k not in done)
        return list(range(self.first, min(self.first + max(0, number - self.window + 1), self.planned)))

    def pending(self, number: int) -> list[int]:
        """Trials of this cell that count as running when a search trial `number` is proposed, proposed ones too."""
        if self.search.order == "free":
            return sorted(k for k in (*self.history.running, *self.proposed) if k >= self.first)
        first = self.first + max(0, number - self.window + 1)
        return list(range(first, min(self.first + number, self.planned)))


class SharedSearch(CellSearch):
    """The search in one cell that learns from the cells around, and from cheap trials before full ones."""

    def __init__(self, cell: Cell, history: CellHistory, batch: int = 1) -> None:
        super().__init__(cell, history, min(batch, max(1, cell.sweep.search.trials // PERIOD)))
        self.place: tuple[float, ...] = ()
        self.number, self.cells = 0, 1  # of the cells that share a space, which one, and how many
        self.near: list[SharedSearch] = []  # itself among them

    def complete(self, number: int) -> bool:
        """Whether also the neighbours have finished, and asked, what search trial `number` is proposed from."""
        for search in self.near:
            rows = search.history.rows
            asked = search is self or rows.keys() >= set(search.pending(number))
            if not asked or not all(k in rows and rows[k].result for k in search.known(number)):
                return False
        return True

    def proposal(self, number: int) -> tuple[float, dict[str, Any]]:
        """Fidelity and params of search trial `number`; where no cheap point is left, a full one."""
        share = self.fidelity(number)
        try:
            return share, self._ask(number, share)
        except SpaceExhausted:
            if share == 1.0:
                raise
            return 1.0, self._ask(number, 1.0)

    def fidelity(self, number: int) -> float:
        """Of PERIOD batches the last one is full."""
        return fidelity(self.search, number // self.batch)

    def turn(self) -> int:
        """Trials in the search so far: cells that share take turns."""
        return len(self.history.rows) + self.promised * self.batch - self.first

    def modelled(self, trial: int) -> bool:
        """Whether it takes a model, and time, to propose a trial."""
        number = trial - self.first
        known = sum(len(search.known(number)) for search in self.near) if number >= 0 else 0
        return number >= 0 and SharedOptimizer.modelled(self.search.initial, known, 0)

    def _ask(self, number: int, fidelity: float) -> dict[str, Any]:
        optimizer = self._informed(number, fidelity)
        own, others = self._parted(number, fidelity, pending=True)
        optimizer.expect([search.elsewhere(row) for search, row in others])
        return optimizer.ask([row.ask["params"] for row in own], number)

    def optimizer(self, number: int | None = None) -> SharedOptimizer:
        """The optimiser of full trials, told what it may know when it proposes search trial `number`, or all."""
        return self._informed(number, 1.0)

    def _informed(self, number: int | None, fidelity: float) -> SharedOptimizer:
        seed = zlib.crc32(f"{self.cell.sweep.seed} shared".encode())
        optimizer = SharedOptimizer(self.cell.space, seed, self.search.initial, self.search.acquisition,
                                    self._where(fidelity), self.number, self.cells)
        own, others = self._parted(number, fidelity)
        for row in own:
            optimizer.tell(row.ask["params"], row.objective)
        optimizer.learn([search.elsewhere(row) for search, row in others])
        return optimizer

    def _parted(self, number: int | None, fidelity: float, pending: bool = False,
                ) -> tuple[list[Row], list[tuple[SharedSearch, Row]]]:
        """The trials known (or pending), in the order of cells and numbers: own ones of a fidelity, and the others."""
        own: list[Row] = []
        others: list[tuple[SharedSearch, Row]] = []
        for search in self.near:
            rows = search.history.rows
            if search is self:  # what neighbours have only proposed follows from no journal
                rows = rows | {k: Row(proposal) for k, proposal in self.proposed.items()}
            numbers = search.pending(number or 0) if pending else search.known(number)
            for row in (rows[k] for k in sorted(numbers) if k in rows):
                if search is self and row.fidelity == fidelity:
                    own.append(row)
                else:
                    others.append((search, row))
        return own, others

    def elsewhere(self, row: Row) -> Elsewhere:
        """A trial of this cell as its neighbours see it."""
        return Elsewhere(self._where(row.fidelity), row.ask["params"], row.objective)

    def _where(self, fidelity: float) -> tuple[float, ...]:
        return (*self.place, math.log(fidelity) / math.log(CHEAP))


def _acquaint(found: Sequence[SharedSearch]) -> None:
    """Tell searches of equal spaces and methods where they lie and who is near.

    What is no number in a coordinate (a word, a list) parts cells like a method does.
    """
    groups: dict[str, list[SharedSearch]] = {}
    for search in found:
        words = {axis: value for axis, value in search.cell.coordinates.items() if not _number(value)}
        groups.setdefault(str((search.cell.space, search.cell.sweep.solver.method, words)), []).append(search)
    for group in groups.values():
        places = list(zip(*_columns(group), strict=True)) or [()] * len(group)
        for number, (search, place) in enumerate(zip(group, places, strict=True)):
            search.place, search.number, search.cells = place, number, len(group)
            near = sorted(range(len(group)), key=lambda k, here=place: (math.dist(places[k], here), k))  # type: ignore[misc]
            search.near = [group[k] for k in sorted({number, *near[:NEIGHBOURS + 1]})]


def _columns(group: Sequence[SharedSearch]) -> Iterator[list[float]]:
    """For each axis with several numbers in the group: where its cells lie, from 0 to 1, in ratios where they can."""
    for axis, value in group[0].cell.coordinates.items():
        values = [search.cell.coordinates[axis] for search in group]
        if not _number(value) or len(set(values)) == 1:
            continue
        values = list(map(math.log, values)) if min(values) > 0 else values
        low, high = min(values), max(values)
        yield [(value - low) / (high - low) for value in values]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
