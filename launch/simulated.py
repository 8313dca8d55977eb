"""A simulated machine: workers that take time without spending it, and a clock that the coordinator's own work moves.

The coordinator, its journal and its optimisers are the real ones. Every second that they take, here and now, passes on
the simulated clock too; the trials, which would take hours of a supercomputer, are only waited for on that clock.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launch import worker as evaluation
from launch.advisers import SideAdvisers, shared_out
from sweeps.advice import Advice, Event, Proposals
from sweeps.crew import Event as Report
from sweeps.grid import Cell
from sweeps.journal import History
from sweeps.optimizer import place_of

MESSAGE = 1e-4  # [s] of the coordinator for a message and its answer: 88 us measured with raw pickles under MPICH
LOOKAHEAD = 0.01  # [s] the clock may run ahead of proposals that are being made; they are late by so much at most
FOREVER = math.inf


class Clock:
    """Simulated time, which real work moves on, and `jump` over the waiting."""

    def __init__(self) -> None:
        self._now, self._resumed = time.time(), time.perf_counter()
        self.worked = 0.0  # [s] of real work that has counted

    def time(self) -> float:
        """Seconds since 1970, if the simulation had begun when it began and taken as long as it says."""
        return self._now + time.perf_counter() - self._resumed

    monotonic = time

    def pause(self) -> float:
        """The moment at which the coordinator has done its work and waits; `jump` ends the pause."""
        self.worked += time.perf_counter() - self._resumed
        return self.time()

    def jump(self, moment: float) -> None:
        """It is now this moment; the time that was spent waiting for it does not count."""
        self._now, self._resumed = moment, time.perf_counter()


@dataclass(frozen=True)
class Machine:
    """What is simulated.

    workers; per_node: of them on a node. median [s], spread: of the lognormal time of a full trial (spread: standard
    deviation of its logarithm). mtbf: mean time between failures of the whole machine [s], each takes a node.
    notice: until the coordinator knows [s]. advisers: side processes, each on a core. seed: of times and failures.
    """

    workers: int
    median: float = 60.0
    spread: float = 0.3
    mtbf: float = FOREVER
    per_node: int = 6
    notice: float = 20.0
    advisers: int = 1
    seed: int = 0


@dataclass
class Ledger:
    """What the simulated machine did. Times in seconds on the simulated clock."""

    spans: list[tuple[float, float]] = field(default_factory=list)  # of messages that were answered
    lost: int = 0  # trials that died with their node
    thought: float = 0.0  # processor seconds of the side processes
    proposals: int = 0


class Landscape:
    """Objectives like an NRMSE over weights: in each cell a curved valley with a ripple; it moves with the cell."""

    def __init__(self, cells: Mapping[str, Cell], machine: Machine) -> None:
        self._cells, self._machine = cells, machine
        self._rng = np.random.default_rng([machine.seed, 31])
        self._phase = np.random.default_rng([machine.seed, 32]).uniform(0, 2 * np.pi, 16)
        self._sizes = [max(cell.index[axis] for cell in cells.values()) + 1
                       for axis in range(len(next(iter(cells.values())).index))]

    def floor(self, cell: Cell) -> float:
        """About the least objective of a cell."""
        return 0.3 + 0.08 * math.sin(self._phase[0] + self._drift(cell, 1))

    def objective(self, cell: Cell, params: Mapping[str, Any], fidelity: float = 1.0) -> float:
        """The objective of a trial; a cheap one is worse and has its valley elsewhere."""
        places = [place_of(dimension, params[key]) / (len(dimension.choices) if dimension.choices else 1)
                  for key, dimension in cell.space.items()]
        centres = [0.5 + 0.3 * math.sin(self._phase[k] + self._drift(cell, k)) + 0.05 * (1 - fidelity)
                   for k in range(1, len(places) + 1)]
        u = [place - centre for place, centre in zip(places, centres, strict=True)]
        # The valley's bottom bends along the first setting.
        bend = 0.3 * u[0] + 0.5 * u[0] ** 2
        q = sum(((v - bend) / 0.15 if k else v / 0.25) ** 2 for k, v in enumerate(u))
        ripple = math.prod(math.sin(30 * place + phase) for place, phase in zip(places, self._phase[8:], strict=False))
        return float(self.floor(cell) * (1 + 3 * q / (1 + q) + 0.007 * (1 + ripple) + 0.2 * (1 - fidelity)))

    def evaluate(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """The results of a message, as a worker's evaluation gives them; `seconds` are what they would take."""
        cell, trials = self._cells[message["cell"]], message["trials"]
        return [self._result(cell, trial, len(trials)) for trial in trials]

    def _result(self, cell: Cell, trial: dict[str, Any], batch: int) -> dict[str, Any]:
        iterations, searched = trial["settings"]["solver"]["iterations"], trial["kind"] == "search"
        share = iterations / cell.sweep.solver.iterations if searched else 1.0
        value = self.objective(cell, trial["params"], share) if searched else 3 * self.floor(cell)
        seconds = self._machine.median * share * math.exp(self._rng.normal(0.0, self._machine.spread))
        names = [name for name in trial["settings"]["data"].get("snr", {}) if name != "haadf"]
        return {"status": "ok", "objective": value, "metrics": {"nrmse": value, "ssim": 1 - value, "psnr": 20.0},
                "elements": {metric: dict.fromkeys(names, value) for metric in ("nrmse", "ssim", "scale_error")},
                "iterations": iterations, "seconds": round(seconds, 3), "batch": batch}

    def _drift(self, cell: Cell, k: int) -> float:
        return sum(2 * math.sin(self._phase[(k + axis) % 16]) * index / size
                   for axis, (index, size) in enumerate(zip(cell.index, self._sizes, strict=True)))


class SimulatedAdvisers:
    """Real side processes, each standing for several: their processor seconds count on the simulated clock."""

    def __init__(self, real: SideAdvisers, cells: Mapping[str, Cell], count: int, clock: Clock,
                 ledger: Ledger) -> None:
        self._real, self._clock, self._ledger = real, clock, ledger
        self._of = shared_out(list(cells.values()), count)
        self._asked: list[deque[tuple[float, str]]] = [deque() for _ in range(count)]  # when, which cell
        self._free = [0.0] * count  # when each simulated process has done what it was asked
        self._made: dict[str, Advice] = {}  # answers whose time is not known: the process is asked in order
        self._due: list[tuple[float, int, Advice]] = []
        self._open: dict[str, float] = {}  # cells without a real answer, and when they were asked for
        self._count = itertools.count()

    def start(self, history: History, folder: Path) -> None:
        """Start the real ones, and wait until they are up: no other run is measured by that."""
        self._real.start(history, folder)

    def tell(self, event: Event) -> None:
        """An ask or a result that counts from now on."""
        self._real.tell(event)

    def ask(self, cell: str, proposed: Proposals, count: int) -> None:
        """Propose trials."""
        now = self._clock.time()
        self._asked[self._of[cell]].append((now, cell))
        self._open[cell] = now
        self._real.ask(cell, proposed, count)

    def poll(self) -> list[Advice]:
        """What is ready by the simulated clock."""
        self.collect()
        now, ready = self._clock.time(), list[Advice]()
        while self._due and self._due[0][0] <= now:
            ready.append(heapq.heappop(self._due)[2])
        return ready

    def collect(self, timeout: float = 0.0) -> None:
        """Take in what the real processes have answered; waits at most so many real seconds for the first."""
        for advice in self._real.poll(timeout):
            self._made[advice.cell] = advice
            self._open.pop(advice.cell, None)
            self._ledger.thought += advice.seconds
            self._ledger.proposals += len(advice.proposals)
            side = self._of[advice.cell]
            line = self._asked[side]
            while line and line[0][1] in self._made:
                asked, cell = line.popleft()
                done = self._made.pop(cell)
                self._free[side] = max(asked, self._free[side]) + done.seconds
                heapq.heappush(self._due, (self._free[side], next(self._count), done))

    def next(self) -> float:
        """When the next proposal is ready, as far as is known."""
        return self._due[0][0] if self._due else FOREVER

    def horizon(self) -> float:
        """How far the clock may go before a real answer has to be waited for."""
        return next(iter(self._open.values())) + LOOKAHEAD if self._open else FOREVER

    def __enter__(self) -> SimulatedAdvisers:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class SimulatedWorkers:
    """Workers that answer at once and are busy for as long as their results say; they die with their nodes."""

    def __init__(self, machine: Machine, evaluate: evaluation.Evaluate, clock: Clock,
                 advisers: SimulatedAdvisers | None, ledger: Ledger, seed: int = 0) -> None:
        """seed: of the failures in this job."""
        self._machine, self._evaluate, self._clock = machine, evaluate, clock
        self._advisers, self._ledger = advisers, ledger
        self._rng = np.random.default_rng([machine.seed, seed])
        self._alive = {f"worker-{k}": k // machine.per_node for k in range(machine.workers)}  # and their nodes
        self._idle = dict.fromkeys(self._alive)
        self._at_work: dict[str, tuple[float, str]] = {}  # since when, and the answer that will come
        self._coming: list[tuple[float, int, str | int]] = []  # ends of messages (worker) and of nodes (number)
        self._news: list[tuple[float, int, Report]] = []  # losses that are noticed at a time
        self._count = itertools.count()
        self._owed = 0.0  # [s] of the coordinator, for messages

    def start(self, folder: Path) -> None:
        """All are up at once."""
        self._fail()

    def names(self) -> list[str]:
        """Workers that live."""
        return list(self._alive)

    def idle(self) -> list[str]:
        """Workers without a message."""
        return list(self._idle)

    def submit(self, worker: str, message: dict[str, Any]) -> None:
        """Hand trials to a worker."""
        del self._idle[worker]
        self._owed += MESSAGE
        text = json.dumps(message)
        now, started = self._clock.pause(), time.perf_counter()
        answer = evaluation.answer(self._evaluate, text)
        seconds = max(time.perf_counter() - started, sum(result.get("seconds", 0.0) for result in json.loads(answer)))
        self._clock.jump(now)  # a real worker would have done this
        began = now + self._owed
        self._at_work[worker] = began, answer
        heapq.heappush(self._coming, (began + seconds, next(self._count), worker))

    def kill(self, worker: str) -> None:
        """Wait no longer for a worker."""
        self._bury(worker, f"{worker} was given up in the middle of a trial", self._clock.time())

    def poll(self, timeout: float) -> list[Report]:
        """What has happened; jumps to the first event, at most `timeout` seconds ahead."""
        now = self._clock.pause() + self._owed
        self._owed = 0.0
        while True:
            first = min([now + timeout, self._advisers.next() if self._advisers else FOREVER,
                         *(queue[0][0] for queue in (self._coming, self._news) if queue)])
            if self._advisers is None or first <= self._advisers.horizon():
                break
            self._advisers.collect(1.0)  # real time, which does not count
        now = max(now, first)
        self._clock.jump(now)
        reports: list[Report] = []
        while self._coming and self._coming[0][0] <= now:
            moment, _, what = heapq.heappop(self._coming)
            reports += self._break(what, moment) if isinstance(what, int) else self._answer(what, moment)
        while self._news and self._news[0][0] <= now:
            reports.append(heapq.heappop(self._news)[2])
        return reports

    def _answer(self, worker: str, moment: float) -> list[Report]:
        """The results of a message that was not lost before its end."""
        if worker not in self._at_work:
            return []
        began, text = self._at_work.pop(worker)
        self._idle[worker] = None
        self._ledger.spans.append((began, moment))
        return [Report(worker, results=json.loads(text))]

    def _fail(self) -> None:
        """The next node to die."""
        if math.isfinite(self._machine.mtbf) and self._alive:
            moment = self._clock.time() + self._rng.exponential(self._machine.mtbf)
            node = int(self._rng.integers(-(-self._machine.workers // self._machine.per_node)))
            heapq.heappush(self._coming, (moment, next(self._count), node))

    def _break(self, node: int, moment: float) -> list[Report]:
        """A node dies; the coordinator hears of it later."""
        for k in range(node * self._machine.per_node, (node + 1) * self._machine.per_node):
            if (worker := f"worker-{k}") in self._alive:
                self._bury(worker, f"{worker} died with its node", moment + self._machine.notice)
        self._fail()
        return []

    def _bury(self, worker: str, words: str, moment: float) -> None:
        del self._alive[worker]
        self._idle.pop(worker, None)
        _, answer = self._at_work.pop(worker, (0.0, "[]"))
        self._ledger.lost += len(json.loads(answer))
        heapq.heappush(self._news, (moment, next(self._count), Report(worker, lost=words)))

    def close(self) -> None:
        """Trials that still run are not waited for."""
        self._at_work.clear()

    def __enter__(self) -> SimulatedWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        return None
