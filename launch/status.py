"""How far a run folder is, from its files and squeue alone: while the sweep runs, after a kill, on a login node."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import Any

from launch import jobs
from sweeps import grid, journal, tables
from sweeps.atlas import RunFolder
from sweeps.limits import Ledger
from sweeps.tables import Run, shown

EVERY = 5.0  # [s] between looks
ERRORS = 3  # that are shown


def show(folder: Path, as_json: bool, watch: bool) -> None:
    """Print the state of a run folder, once or until the sweep has ended; RunError where there is none."""
    while True:
        seen = look(folder)
        print(json.dumps(seen) if as_json else text(seen), flush=True)
        if not watch or not (seen["running"] or seen["jobs"]):
            return
        time.sleep(EVERY)
        if not as_json:
            print()


def look(folder: Path) -> dict[str, Any]:
    """The state as plain data.

    state: running, done, stopped (on request), interrupted, or queued (nothing has run yet); seconds: since the last
    event; jobs: those in the queue, as `jobs.queue` has them, None where Slurm does not answer; workers, use, left: as
    `_pace` has them; errors: the newest first.
    """
    queue = jobs.queue(folder)
    if not RunFolder(folder).lock.exists() and jobs.submitted(folder):
        return _waiting(folder, queue)
    run = tables.read(folder)
    events, _ = journal.read(RunFolder(folder).journal)
    cells = {cell.id: _cell(run, cell) for cell in run.cells}
    ledger = Ledger()
    for cell in run.cells:
        for row in run.rows(cell):
            ledger.add(cell, row)
    total = sum(cell["trials"] for cell in cells.values())
    done = sum(cell["done"] for cell in cells.values())
    # On a login node the lock of a compute node may not show, and Slurm knows.
    running = locked(RunFolder(folder).journal) or any(job["state"] == "RUNNING" for job in queue or [])
    ended = bool(events) and events[-1]["event"] in ("stop", "end")
    state = (
        "running"
        if running
        else "done"
        if done >= total
        else "stopped"
        if ended or not events
        else "interrupted"
    )
    return {
        "name": run.sweep.name,
        "folder": str(folder),
        "state": state,
        "running": running,
        "trials": total,
        "done": done,
        "failed": sum(cell["failed"] for cell in cells.values()),
        "at_work": sum(cell["at_work"] for cell in cells.values()) if running else 0,
        "seconds": round(time.time() - events[-1]["time"], 1) if events else None,
        "objective": run.sweep.search.objective,
        "device_hours": round(ledger.hours, 4),
        "budget_hours": run.sweep.search.budget_hours,
        **_pace(events, total - done, running),
        "errors": _errors(events),
        "cells": cells,
        "jobs": queue,
    }


def _pace(events: list[dict[str, Any]], left: int, running: bool) -> dict[str, Any]:
    """How the last start goes, None where there was none: workers, their use (0 to 1), and seconds to the end.

    The use counts trials that ended and, while the sweep runs, those under way. The end is estimated from the trials
    since the start, None where there were none.
    """
    first = max((k for k, event in enumerate(events) if event["event"] == "start"), default=None)
    if first is None:
        return {"workers": None, "use": None, "left": None}
    begun, since = events[first]["time"], events[first + 1:]
    now = time.time() if running else events[-1]["time"]
    asked, solved, done, ready = dict[tuple[str, int], float](), 0.0, 0, now
    for event in since:
        if event["event"] == "ask":
            asked[event["cell"], event["trial"]] = event["time"]
            ready = min(ready, event["time"])  # before, workers were being started
        elif event["event"] in ("result", "lost"):
            at = asked.pop((event["cell"], event["trial"]), event["time"])
            if event["event"] == "result":
                solved, done = solved + event["time"] - at, done + 1
    if running:
        solved += sum(now - at for at in asked.values())
    workers = len(events[first]["workers"])
    span = (now - ready) * workers
    rate = done / (now - begun) if done and now > begun else 0.0
    return {"workers": workers, "use": round(min(1.0, solved / span), 4) if span > 0 else None,
            "left": round(left / rate, 1) if running and rate else None}


def _errors(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last failed and lost trials, the newest first."""
    bad = [event for event in events if event["event"] == "lost" or event.get("status", "ok") != "ok"]
    return [{"cell": event["cell"], "trial": event["trial"], "time": event["time"],
             "words": event["reason"] if event["event"] == "lost" else event["status"]}
            for event in reversed(bad[-ERRORS:])]


def _waiting(folder: Path, queue: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The state of a folder that only knows of jobs."""
    running = any(job["state"] == "RUNNING" for job in queue or [])
    return {"name": folder.resolve().name, "folder": str(folder), "state": "running" if running else "queued",
            "running": running, "trials": 0, "done": 0, "failed": 0, "at_work": 0, "seconds": None,
            "objective": "", "device_hours": 0.0, "budget_hours": None, "workers": None, "use": None, "left": None,
            "errors": [], "cells": {}, "jobs": queue}


def _cell(run: Run, cell: grid.Cell) -> dict[str, Any]:
    history, best = run.history.cell(cell.id), run.winner(cell)
    rows = run.rows(cell)
    return {
        "trials": max(grid.trials(cell), len(history.rows)),
        "done": len(rows),
        "failed": sum(row["status"] != "ok" for row in rows),
        "at_work": len(history.running),
        "best": None if best is None else best["objective"],
        "params": {} if best is None else best["params"],
    }


def locked(path: Path) -> bool:
    """Whether a coordinator on this machine (or, where locks are shared, on any) holds the journal."""
    if not path.exists():
        return False
    with open(path, "rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass  # a file system without locks cannot tell
    return False


def text(seen: dict[str, Any]) -> str:
    """The state in words, a line for each job in the queue, and one for each cell."""
    if not seen["cells"]:
        return "\n".join([f"{seen['name']}: no trial has begun", *_job_lines(seen)])
    head = (
        f"{seen['name']}: {seen['state']}, {seen['done']} of {seen['trials']} trials, {seen['failed']} failed"
    )
    if seen["running"]:
        head += f", {seen['at_work']} at work"
        if seen["use"] is not None:
            head += f", {seen['workers']} workers used to {seen['use']:.0%}"
        if seen["left"] is not None:
            head += f", about {tables.duration(seen['left'])} left"
    if seen["seconds"] is not None:
        head += f"; last event {tables.duration(seen['seconds'])} ago"
    if seen["budget_hours"] is not None:
        head += f"; {seen['device_hours']:.3g} of {seen['budget_hours']:g} device hours spent"
    if seen["state"] in ("stopped", "interrupted") and not seen["jobs"]:
        head += "; run again to continue"
    rows = [["cell", seen["objective"], "trials", "failed"]]
    rows += [
        [name, shown(cell["best"]), f"{cell['done']}/{cell['trials']}", str(cell["failed"])]
        for name, cell in seen["cells"].items()
    ]
    errors = [f"{error['cell']} trial {error['trial']}, {tables.duration(time.time() - error['time'])} ago: "
              f"{error['words']}" for error in seen["errors"]]
    return "\n".join([head, *_job_lines(seen), tables.aligned(rows), *(["last errors:"] if errors else []), *errors])


def _job_lines(seen: dict[str, Any]) -> list[str]:
    """A line about each job: its state, and how long it may run or when it may start."""
    last = jobs.submitted(Path(seen["folder"]))[-1:]
    if not last:
        return []
    if seen["jobs"] is None:
        return [f"job {last[0][1]}: there is no squeue here that knows of it"]
    if not seen["jobs"] and seen["state"] != "done":
        return [f"job {last[0][1]}: is not in the queue; its output lies in {RunFolder(seen['folder']).jobs}"]
    lines = []
    for job in seen["jobs"]:
        words = [f"{tables.duration(job['left'])} of walltime left" if job["left"] is not None else "",
                 f"Slurm expects it to start at {job['starts']}" if job["starts"] else "",
                 f"it waits for {job['reason']}" if job["reason"] else ""]
        lines.append(f"job {job['id']}: " + ", ".join([job["state"].lower(), *filter(None, words)]))
    return lines
