"""The journal of a run: one line of JSON per event, written before anything else happens.

It is the truth; the atlas, the summary and the optimisers' states follow from it.

    {"event": "start", "tomoatlas", "commit", "host", "pid", "workers"}
    {"event": "ask", "cell", "trial", "attempt", "kind", "fidelity", "params", "seen", "source"?}
    {"event": "result", "cell", "trial", "attempt", "status", "objective", ...}
    {"event": "lost", "cell", "trial", "attempt", "worker", "reason"}    # worker "": the whole run ended
    {"event": "again", "cell"}                                           # its rows so far are superseded
    {"event": "help", "cell", "trial", "worker", "seconds"}              # with a trial that another worker has
    {"event": "stop" | "end", "reason"}

Every line also carries "time" [s since 1970]. A searched trial was proposed from the first `seen` lines of the journal
and from the trials of its cell with lower numbers, which count as running where those lines have no result of them;
one that an atlas proposed says so in its `source`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Clock(Protocol):
    """What tells the time: the module `time`, or a simulation."""

    def time(self) -> float:
        """Seconds since 1970."""

    def monotonic(self) -> float:
        """Seconds since some moment; never set back."""


class RunError(Exception):
    """A run that cannot start or go on; the message is one sentence: where, what, and the next step."""


def plain(value: Any) -> Any:
    """The value as JSON knows it: NumPy's numbers and arrays become numbers and lists, NaN and infinity null."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a journal, and how many bytes of it are whole lines.

    A last line that a kill or a full disk has torn is left out; a broken line before it is a RunError.
    """
    events: list[dict[str, Any]] = []
    good = 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        event = _parse(line)
        if event is None and number < len(lines):
            raise RunError(f"{path}:{number}: this line is not an event, and more lines follow it: something "
                           "else wrote into the journal. To go on from the events before it, keep a copy and "
                           f"cut the file there: head -n {number - 1}")
        if event is not None:
            events.append(event)
            good += len(line)
    return events, good


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


class Journal:
    """The journal opened for writing by the one coordinator of a run folder.

    A torn tail is cut off. The file stays locked until `close` or the end of the process, however it ends.
    """

    def __init__(self, path: Path, clock: Clock = time) -> None:
        self.path, self._clock = path, clock
        self._dirty, self._synced = False, 0.0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self.events, self._end = read(path)
            os.ftruncate(self._file, self._end)
            _sync_folder(path.parent)
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            starts = [event for event in read(self.path)[0] if event["event"] == "start"]
            who = "process {pid} on {host}".format(**starts[-1]) if starts else "it has only just started"
            raise RunError(f"{self.path.parent}: another coordinator works here ({who}); wait for it, stop "
                           "it, or choose another --out") from None
        except OSError as error:
            # Some shared file systems know no locks; the run is then as safe as its user is careful.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise

    def stamped(self, event: dict[str, Any]) -> dict[str, Any]:
        """An event with the time, as it will be read again; `append` writes it."""
        stamped: dict[str, Any] = plain({**event, "time": round(self._clock.time(), 3)})
        return stamped

    def append(self, *events: dict[str, Any]) -> list[dict[str, Any]]:
        """Write events, and return them as they will be read again.

        The system has them when this returns, so that no end of this process can lose them; the disk has them at the
        next `sync`, which this calls where the last one is SYNC ago.
        """
        written = [event if "time" in event else self.stamped(event) for event in events]
        data = b"".join(json.dumps(event, allow_nan=False).encode() + b"\n" for event in written)
        try:
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise RunError(f"{self.path}: {error.strerror}; {SAFE}") from error
        self._end += len(data)
        self.events += written
        self._dirty = True
        self.sync(SYNC)
        return written

    def sync(self, every: float = 0.0) -> None:
        """Bring to the disk what was written, if the last time is so many seconds ago: it takes milliseconds."""
        if self._dirty and self._clock.monotonic() - self._synced >= every:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise RunError(f"{self.path}: {error.strerror}; {SAFE}") from error
            self._dirty, self._synced = False, self._clock.monotonic()

    def close(self) -> None:
        """Bring the journal to the disk and unlock it."""
        try:
            self.sync()
        finally:
            os.close(self._file)


SYNC = 0.1  # [s] that a power cut can take back at most
SAFE = "all trials that were finished are safe: make room and run again to continue"


def _sync_folder(folder: Path) -> None:
    """Make the names of new files in a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass
class Row:
    """What the journal knows of one trial.

    ask: the last one, of several attempts.
    losses: workers that died over it. interruptions: ends of the whole run during it.
    """

    ask: dict[str, Any]
    result: dict[str, Any] | None = None
    losses: int = 0
    interruptions: int = 0

    def own(self, searched: bool) -> bool:
        """Whether this is one of the cell's own trials, of its search or its only one, and no baseline."""
        return self.ask["kind"] == "search" if searched else not self.ask["params"]

    @property
    def fidelity(self) -> float:
        """Share of the sweep's iterations that the trial has; below 1 it is cheap and cannot win."""
        return float(self.ask.get("fidelity", 1.0))

    @property
    def ok(self) -> bool:
        """Whether the trial has ended well."""
        return self.result is not None and self.result["status"] == "ok"

    @property
    def objective(self) -> float | None:
        """The objective of a trial that ended well; None otherwise."""
        return self.result["objective"] if self.result is not None and self.ok else None


@dataclass
class CellHistory:
    """The trials of one cell: rows by trial number, and the numbers in the order in which results came."""

    rows: dict[int, Row] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    running: dict[int, None] = field(default_factory=dict)  # an ordered set: asked, without a result
    _best: dict[bool, tuple[float, int]] = field(default_factory=dict)  # objective and trial, searched or not

    def winner(self, searched: bool) -> Row | None:
        """The best of the cell's own full trials, the first of equals; None while there is none."""
        best = self._best.get(searched)
        return None if best is None else self.rows[best[1]]

    def ended(self, trial: int, result: dict[str, Any]) -> None:
        """A trial has a result now."""
        row = self.rows[trial]
        row.result = result
        self.finished.append(trial)
        self.running.pop(trial, None)
        for searched in (True, False):
            if row.ok and row.own(searched) and row.fidelity == 1:
                reached = (math.inf if row.objective is None else row.objective, trial)
                self._best[searched] = min(reached, self._best.get(searched, reached))

    def clear(self) -> None:
        """Forget all trials."""
        self.rows.clear()
        self.finished.clear()
        self.running.clear()
        self._best.clear()


class History:
    """What follows from a list of events, the same whether they just happen or are read again."""

    def __init__(self, events: Iterable[dict[str, Any]] = ()) -> None:
        self._cells: dict[str, CellHistory] = {}
        self._attempts: dict[tuple[str, int], int] = {}
        for event in events:
            self.apply(event)

    def cell(self, cell: str) -> CellHistory:
        """The trials of a cell, by its id; the same object for the life of this history."""
        return self._cells.setdefault(cell, CellHistory())

    def next_attempt(self, cell: str, trial: int) -> int:
        """A number never used for this trial before, not even before an `again`: volumes are named by it."""
        return self._attempts.get((cell, trial), -1) + 1

    def apply(self, event: dict[str, Any]) -> None:
        """Take one event into account."""
        kind = event["event"]
        if kind not in ("ask", "result", "lost", "again"):
            return
        cell = self.cell(event["cell"])
        if kind == "again":
            cell.clear()
            return
        trial = event["trial"]
        if kind == "ask":
            self._attempts[event["cell"], trial] = event["attempt"]
            row = cell.rows.setdefault(trial, Row(event))
            row.ask = event
            if row.result is None:
                cell.running[trial] = None
        elif kind == "result" and cell.rows[trial].result is None:
            cell.ended(trial, event)
        elif kind == "lost" and event["worker"]:
            cell.rows[trial].losses += 1
        elif kind == "lost":
            cell.rows[trial].interruptions += 1
