"""One call of `tomoatlas run`: who coordinates, who serves, what a signal does, what is said at the end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launch import dask_workers, devices, mpi, plan, workers
from launch.advisers import SideAdvisers, useful
from launch.plan import Plan
from sweeps import grid, lookup
from sweeps.atlas import RunFolder
from sweeps.coordinator import GRACE, Summary
from sweeps.crew import Workers
from sweeps.grid import Cell
from sweeps.journal import RunError
from sweeps.limits import MARGIN, job_end
from sweeps.settings import SettingsError, Sweep

EVALUATE = "sweeps.trial:run"
AGAIN = 75  # exit status, EX_TEMPFAIL of sysexits.h: the job's time was too short, the next one continues
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCHED = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # how MPI launchers tell the number of their processes
FILLED = 4 * 256**3  # voxels times elements that keep a large GPU busy: more at once take longer in proportion
ROUNDS = 4  # batches of a search at least


def run(
    sweep: Sweep, out: Path | None, chosen: str | None, again: str | None, evaluate: str = EVALUATE
) -> int:
    """Carry out a sweep, or serve it as an MPI worker; the exit status.

    out: the run folder, by default runs/<name>.
    chosen: what --workers says: a number of local workers, by default one per GPU or two; or "dask", "dask:PLACE".
    again: the id of a cell to run from its first trial.
    Raises SettingsError, DataError or RunError, before anything is written, for what cannot run.
    """
    count, place = chosen_workers(chosen)
    rank, size = (0, 1) if place is not None else mpi.world()
    if rank > 0:
        mpi.serve()
        return 0
    share = max(cell.sweep.solver.devices for cell in grid.cells(sweep))
    count, far = count or local_count(share), size > 1 or bool(place)
    room = gpu_room(1 if far else count)
    crew: Workers = (dask_workers.DaskWorkers(evaluate, share, place, count) if place is not None else
                     mpi.MpiWorkers(evaluate, share) if size > 1 else workers.LocalWorkers(count, evaluate, share))
    # Other ranks may run on other machines, of whose memory this one knows nothing.
    memory = (0, "") if far else plan.memory_here(count)
    with crew:
        return _coordinate(sweep, RunFolder(out or Path("runs") / sweep.name), crew, size - 1 or count, again, memory,
                           room)


def _coordinate(sweep: Sweep, folder: RunFolder, crew: Workers, count: int, again: str | None,
                memory: tuple[int, str], room: int) -> int:
    from launch import progress
    from sweeps import coordinator, report

    devices.coordinator()
    cells = grid.cells(sweep)
    check_cell(cells, again)
    planned = plan.plan(sweep)
    refused = list(plan.refusals(planned, *memory, folder.path))
    if refused:
        raise RunError("\n".join(refused))
    for warning in plan.warnings(planned):
        print(warning, file=sys.stderr)
    if not folder.journal.exists():
        lookup.check(cells)
    until, together = job_end(os.environ), batches(planned, room)
    with (signals(until) as stop, progress.observer(sys.stdout) as watch,
          SideAdvisers(useful(count, len(cells)), sweep, cells, together) as advisers):
        summary = coordinator.run(sweep, cells, crew, folder, watch, stop, again, stop.grace, together, until, advisers)
    print(f"\n{report.table(folder.path)}\n")
    # A launcher that has sent SIGTERM kills soon after: no time for figures then.
    if summary.stopped is None:
        pages = report.write(folder.path)
        print(f"report  {pages[0]} and {len(pages) - 1} figures")
        print(f"best    {folder.best}{os.sep}<cell>.yaml, each runs again with: tomoatlas run")
        print(f"atlas   {folder.atlas}, for example: xarray.open_zarr({str(folder.atlas)!r})")
    return ending(summary, stop.number)


def chosen_workers(chosen: str | None) -> tuple[int | None, str | None]:
    """What --workers says: a number of workers, or the place of a dask cluster, "" for one that is started here."""
    if chosen is None:
        return None, None
    kind, _, place = chosen.partition(":")
    if kind == "dask" and chosen != "dask:":
        launched = next((name for name in LAUNCHED if int(os.environ.get(name) or 1) > 1), None)
        if launched:
            raise SettingsError(f"--workers {chosen}: this command was started by an MPI launcher ({launched}), whose "
                                "ranks would be the workers: start it once, or leave out --workers")
        return None, place
    if not chosen.isdecimal() or int(chosen) < 1:
        raise SettingsError(f"--workers {chosen}: write a number from 1, or dask, dask:tcp://HOST:PORT or "
                            "dask:SCHEDULER_FILE.json")
    return int(chosen), None


def ending(summary: Summary, number: int) -> int:
    """Say where a stopped sweep stands; the exit status.

    0 when all is done or the budget is spent, AGAIN when the job's time was too short, else as by the signal.
    """
    if summary.stopped is None:
        return 0
    print(f"{summary.stopped}; figures so far: tomoatlas report {summary.folder}")
    if summary.limit is None:
        return 128 + number if number else 1
    return 0 if summary.spent else AGAIN


def local_count(share: int = 1) -> int:
    """One worker per `share` GPUs; on a machine without GPUs two, or as many as there are cores."""
    gpus = len(devices.visible_gpus(os.environ))
    return max(1, gpus // share) if gpus else max(1, min(2, len(os.sched_getaffinity(0)) // share))


def gpu_room(workers: int) -> int:
    """Bytes that a worker may fill of its GPU; 0 on a machine without. MPI ranks are taken to have one each."""
    gpus = len(devices.visible_gpus(os.environ))
    available, where = plan.memory_here(workers) if gpus else (0, "")
    return available // -(-workers // gpus) if where == "on the GPU" else 0


def batches(planned: Plan, room: int) -> dict[str, int]:
    """By cell, how many trials a worker with `room` bytes of a GPU solves at once where search.batch is auto.

    As many as fit and as fill it, but so few that the search can learn from one batch to the next.
    """
    found = {}
    for cost in planned.costs:
        fitting, filling = room // sum(cost.memory.values()), FILLED // (cost.extent.volume // 4)
        found[cost.cell.id] = max(1, min(fitting, filling, cost.cell.sweep.search.trials // ROUNDS))
    return found


def check_cell(cells: list[Cell], again: str | None) -> None:
    """SettingsError where --cell names no cell of the sweep."""
    known = [cell.id for cell in cells]
    if again is not None and again not in known:
        from difflib import get_close_matches

        close = get_close_matches(again, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the first is {known[0]}"
        raise SettingsError(f"--cell {again}: is none of the {len(known)} cells of this sweep ({hint})")


@contextmanager
def signals(until: float | None = None) -> Iterator[Stop]:
    """While inside, signals ask the coordinator to stop; afterwards they are as before. until: the end of the job."""
    stop = Stop(until)
    before = {number: signal.signal(number, stop.hear) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """How often the user has asked to stop, and by which signal first. until: the end of the job [s since 1970]."""

    def __init__(self, until: float | None = None) -> None:
        self.count, self.number, self.until = 0, 0, until

    def __call__(self) -> int:
        return self.count

    def grace(self) -> float:
        """Seconds that running trials have: after SIGUSR1, a job's notice of its end, until then."""
        if self.number != signal.SIGUSR1 or self.until is None:
            return GRACE
        return max(GRACE, self.until - MARGIN - time.time())

    def hear(self, number: int, frame: FrameType | None) -> None:
        """A signal handler: the first lets running trials end, the second does not wait for them."""
        self.number = self.number or number
        self.count += 1
        words = "finishing the trials that run; again to leave at once" if self.count == 1 else "leaving"
        # os.write: a handler may interrupt a print, and buffered writers do not allow a second one inside it.
        os.write(2, f"\n{signal.Signals(number).name}: {words}\n".encode())
