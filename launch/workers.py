"""Processes that evaluate trials: started here (`LocalWorkers`) or by an MPI launcher (`MpiWorkers`).

Both kinds speak JSON text. A worker imports the evaluation ("module:function") itself, after its environment
is set (`launch.devices`); the coordinator never imports JAX. What they print goes to <folder>/logs/: a file for each
local worker, one for all MPI workers of a machine, every line with the trial it is about (`launch.logs`).
"""

from __future__ import annotations

import json
import selectors
from pathlib import Path
from typing import Any

from launch import devices
from launch.mpi import MpiWorkers, leave, serve, world
from launch.process import Child, end, module
from sweeps.crew import Event

__all__ = ["LocalWorkers", "MpiWorkers", "leave", "serve", "world"]


class LocalWorkers:
    """`count` processes on this machine.

    A worker that dies is replaced; one that dies before it was ready (an import that fails) is not.
    """

    def __init__(self, count: int, evaluate: str, share: int = 1) -> None:
        """share: devices that one reconstruction is spread over (solver.devices)."""
        self._count, self._evaluate, self._share = count, evaluate, share
        self._workers: dict[str, _Local] = {}
        self._selector = selectors.DefaultSelector()

    def start(self, folder: Path) -> None:
        """Start the processes; they are idle when they have imported the evaluation."""
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        command, path = module("launch.worker", "--evaluate", self._evaluate)
        for index in range(self._count):
            given = devices.environment(index, self._count, devices.given(), share=self._share)
            env = {**given, **path}
            self._admit(_Local(f"worker-{index}", command, env, logs / f"worker-{index}.log"))

    def _admit(self, worker: _Local) -> None:
        self._workers[worker.name] = worker
        self._selector.register(worker.output, selectors.EVENT_READ, worker)

    def names(self) -> list[str]:
        """Workers that live or are being started."""
        return list(self._workers)

    def idle(self) -> list[str]:
        """Workers that have said they are ready, and have no trial."""
        return [name for name, worker in self._workers.items() if worker.ready and not worker.busy]

    def submit(self, worker: str, message: dict[str, Any]) -> None:
        """Hand trials to an idle worker."""
        self._workers[worker].busy = True
        self._workers[worker].say(json.dumps(message))

    def kill(self, worker: str) -> None:
        """End a process, whatever it does; a new one takes its place."""
        self._workers[worker].process.kill()

    def poll(self, timeout: float) -> list[Event]:
        """Results and losses; waits at most `timeout` seconds for the first."""
        events: list[Event] = []
        for key, _ in self._selector.select(timeout):
            worker: _Local = key.data
            lines, ended = worker.lines()
            for line in lines:
                if worker.ready:
                    worker.busy = False
                    events.append(Event(worker.name, results=json.loads(line)))
                worker.ready = True  # its first line says so
            if ended:
                events.append(Event(worker.name, lost=self._bury(worker)))
        return events

    def _bury(self, worker: _Local) -> str:
        """Replace a dead worker; how it died."""
        self._selector.unregister(worker.output)
        del self._workers[worker.name]
        worker.part()
        if worker.ready:
            self._admit(_Local(worker.name, worker.command, worker.env, worker.log))
        return worker.obituary()

    def close(self) -> None:
        """End the workers: they leave at once, in the middle of a trial, too."""
        workers, self._workers = list(self._workers.values()), {}
        for worker in workers:
            self._selector.unregister(worker.output)
            worker.part()
        end(workers)

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._selector.close()


class _Local(Child):
    """One local worker, and whether it is ready or at work."""

    ready = busy = False
