"""Side processes that propose trials, so that the coordinator never waits for a model: each has some of the cells.

`python -m launch.advisers` is one of them. Lines of JSON come in: first {"sweep", "batches"}, then {"tell": event} and
{"ask": [cell, proposed, count]}; each ask is answered by a line, an `Advice` or {"error": sentence}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import logs
from launch.process import Child, end, module
from launch.worker import ignore_signals
from sweeps import grid, settings
from sweeps.advice import Advice, Event, Proposals, Replica, past, subscriptions
from sweeps.grid import Cell
from sweeps.journal import History, RunError
from sweeps.search import searches
from sweeps.settings import Sweep

FED = 64  # workers that one process proposes for, at most, as far as there are cores
RESTARTS = 3  # of one process without an answer between them
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def useful(workers: int, cells: int) -> int:
    """How many side processes so many workers and cells can use on this machine."""
    return max(1, min(1 + workers // FED, cells, len(os.sched_getaffinity(0))))


def shared_out(cells: Sequence[Cell], count: int) -> dict[str, int]:
    """Which of `count` processes proposes for each cell.

    Neighbours that share what they know go together; others are dealt out, for neighbours are busy at the same time.
    """
    if any(cell.sweep.search.strategy == "shared" for cell in cells):
        return {cell.id: index * count // len(cells) for index, cell in enumerate(cells)}
    return {cell.id: index % count for index, cell in enumerate(cells)}


class SideAdvisers:
    """`count` processes; one that dies is replaced, and what it was asked is asked again."""

    def __init__(self, count: int, sweep: Sweep, cells: Sequence[Cell],
                 batches: Mapping[str, int] | None = None) -> None:
        self._sweep, self._batches = sweep, dict(batches or {})
        count = min(count, len(cells))
        self._of = shared_out(cells, count)
        self._hear: list[set[str]] = [set() for _ in range(count)]
        for name, search in searches(cells, History(), self._batches).items():
            self._hear[self._of[name]] |= set(subscriptions(search))
        self._listeners = {cell.id: [index for index, heard in enumerate(self._hear) if cell.id in heard]
                           for cell in cells}
        self._sides: list[_Side] = []
        self._history, self._logs = History(), Path()
        self._selector = selectors.DefaultSelector()

    def start(self, history: History, folder: Path) -> None:
        """Start the processes and tell them what has happened so far."""
        self._history, self._logs = history, folder / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._sides = [self._spawn(index) for index in range(len(self._hear))]

    def _spawn(self, index: int, restarts: int = 0) -> _Side:
        command, path = module("launch.advisers")
        env = {**os.environ, **path, **dict.fromkeys(THREADS, "1")}
        side = _Side(f"adviser-{index}", command, env, self._logs / f"adviser-{index}.log", index, restarts)
        self._selector.register(side.output, selectors.EVENT_READ, side)
        side.send({"sweep": settings.dump(self._sweep), "batches": self._batches})
        for name in sorted(self._hear[index]):
            for event in past(self._history, name):
                side.send({"tell": event})
        return side

    def tell(self, event: Event) -> None:
        """An ask or a result that counts for every later `ask`."""
        for index in self._listeners[event["cell"]]:
            self._sides[index].send({"tell": event})

    def ask(self, cell: str, proposed: Proposals, count: int) -> None:
        """Propose `count` trials of a cell after those `proposed` but not asked."""
        side = self._sides[self._of[cell]]
        side.asked.append(cell)
        side.send({"ask": [cell, proposed, count]})

    def poll(self, timeout: float = 0.0) -> list[Advice]:
        """What has been proposed; waits at most `timeout` [s] for the first. RunError where a process fails."""
        made: list[Advice] = []
        for side in self._sides:
            side.pump()
        for key, _ in self._selector.select(timeout):
            side = key.data
            lines, ended = side.lines()
            made += [self._advice(side, json.loads(line)) for line in lines]
            if ended:
                made += self._replace(side)
        return made

    def _advice(self, side: _Side, answer: dict[str, Any]) -> Advice:
        if "error" in answer:
            raise RunError(f"no trial could be proposed for the cell {side.asked[0]} ({answer['error']}; see "
                           f"{side.log}); nothing that was finished is lost")
        side.asked.remove(answer["cell"])
        side.restarts = 0
        return Advice(**answer)

    def _replace(self, side: _Side) -> list[Advice]:
        """A new process instead of a dead one; what it leaves unanswered."""
        self._selector.unregister(side.output)
        side.part()
        why = side.obituary()
        if side.restarts >= RESTARTS:
            raise RunError(f"no trial can be proposed: {why}; nothing that was finished is lost")
        self._sides[side.index] = self._spawn(side.index, side.restarts + 1)
        return [Advice(cell, [], lost=why) for cell in side.asked]

    def __enter__(self) -> SideAdvisers:
        return self

    def __exit__(self, *_: object) -> None:
        for side in self._sides:
            side.part()
        end(self._sides)
        self._selector.close()


class _Side(Child):
    """One process, and the cells it was asked about. What its pipe does not take yet waits here."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log: Path, index: int,
                 restarts: int) -> None:
        super().__init__(name, command, env, log)
        self.index, self.restarts, self.asked = index, restarts, list[str]()
        self._unsent = bytearray()
        os.set_blocking(self.input.fileno(), False)

    def send(self, message: dict[str, Any]) -> None:
        """Send a line, now or when the pipe has room."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.pump()

    def pump(self) -> None:
        """Send what the pipe takes."""
        try:
            while self._unsent:
                del self._unsent[:os.write(self.input.fileno(), self._unsent)]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # its output ends, too, and `poll` sees that
            self._unsent.clear()


def serve() -> None:
    """The life of a side process, until its input ends."""
    ignore_signals()
    # What libraries print must not get among the answers: file descriptor 1 becomes the log.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logs.label()
    first = json.loads(sys.stdin.readline())
    replica = Replica(grid.cells(settings.load(first["sweep"])), first["batches"])
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if "tell" in message:
                replica.tell(message["tell"])
                continue
            answer = dataclasses.asdict(replica.propose(*message["ask"]))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    serve()
