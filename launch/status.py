"""How far a run folder is, from its journal alone: while the sweep runs, after a kill, on a login node."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import Any

from sweeps import grid, journal, tables
from sweeps.atlas import RunFolder
from sweeps.tables import Run, shown

EVERY = 5.0  # [s] between looks


def show(folder: Path, as_json: bool, watch: bool) -> None:
    """Print the state of a run folder, once or until the sweep has ended; RunError where there is none."""
    while True:
        seen = look(folder)
        print(json.dumps(seen) if as_json else text(seen), flush=True)
        if not watch or not seen["running"]:
            return
        time.sleep(EVERY)
        if not as_json:
            print()


def look(folder: Path) -> dict[str, Any]:
    """The state as plain data.

    state: running, done, stopped (on request), or interrupted; seconds: since the last event.
    """
    run = tables.read(folder)
    events, _ = journal.read(RunFolder(folder).journal)
    cells = {cell.id: _cell(run, cell) for cell in run.cells}
    total = sum(cell["trials"] for cell in cells.values())
    done = sum(cell["done"] for cell in cells.values())
    running = locked(RunFolder(folder).journal)
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
        "cells": cells,
    }


def _cell(run: Run, cell: grid.Cell) -> dict[str, Any]:
    history, best = run.history.cell(cell.id), run.winner(cell)
    rows = run.rows(cell)
    return {
        "trials": max(grid.trials(cell), len(history.rows)),
        "done": len(rows),
        "failed": sum(row["status"] != "ok" for row in rows),
        "at_work": len(history.running()),
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
    """The state in words, and a line for each cell."""
    head = (
        f"{seen['name']}: {seen['state']}, {seen['done']} of {seen['trials']} trials, {seen['failed']} failed"
    )
    if seen["running"]:
        head += f", {seen['at_work']} at work"
    if seen["seconds"] is not None:
        head += f"; last event {tables.duration(seen['seconds'])} ago"
    if seen["state"] in ("stopped", "interrupted"):
        head += "; run again to continue"
    rows = [["cell", seen["objective"], "trials", "failed"]]
    rows += [
        [name, shown(cell["best"]), f"{cell['done']}/{cell['trials']}", str(cell["failed"])]
        for name, cell in seen["cells"].items()
    ]
    return head + "\n" + tables.aligned(rows)
