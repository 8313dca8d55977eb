"""Processes that evaluate trials: started here (`LocalWorkers`) or by an MPI launcher (`MpiWorkers`).

Both kinds speak JSON text. A worker imports the evaluation ("module:function") itself, after its environment
is set (`launch.devices`); the coordinator never imports JAX. Worker k prints to <folder>/logs/worker-<k>.log.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from launch import devices
from launch.mpi import MpiWorkers, leave, serve, world
from sweeps.crew import Event

__all__ = ["LocalWorkers", "MpiWorkers", "leave", "serve", "world"]

PATIENCE = 5.0  # [s] for a worker that was told to leave, before it is killed


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
        # The parent's own search path: a worker imports the same modules, wherever the command was started.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        command = [sys.executable, "-P", "-m", "launch.worker", "--evaluate", self._evaluate]
        for index in range(self._count):
            given = devices.environment(index, self._count, devices.given(), share=self._share)
            env = {**given, "PYTHONPATH": path}
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
        for worker in workers:
            try:
                worker.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._selector.close()


class _Local:
    """One local worker: its process and pipes, its log, and whether it is ready or at work."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log: Path) -> None:
        self.name, self.command, self.env, self.log = name, command, env, log
        self.ready = self.busy = False
        self.unread = b""
        with open(log, "ab") as stderr:
            # A session of its own: Ctrl-C on the terminal is for the coordinator, which lets trials finish.
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=stderr, start_new_session=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input: IO[bytes] = self.process.stdin
        self.output: IO[bytes] = self.process.stdout

    def lines(self) -> tuple[list[bytes], bool]:
        """Whole lines that have arrived, and whether the worker has closed its end."""
        chunk = os.read(self.output.fileno(), 1 << 20)
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        return lines, not chunk

    def say(self, text: str) -> None:
        """Send one line."""
        with contextlib.suppress(BrokenPipeError):  # a dead worker's output ends, too, and that is reported
            self.input.write(text.encode() + b"\n")
            self.input.flush()

    def part(self) -> None:
        """Close both pipes; a worker that lives takes it for the word to leave."""
        with contextlib.suppress(BrokenPipeError):
            self.input.close()
        self.output.close()

    def obituary(self) -> str:
        """A sentence on how the process ended."""
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        lines = self.log.read_text(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{self.name} {how}" + (f"; the last line of {self.log} is: {last}" if last else "")
