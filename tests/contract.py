"""What every kind of workers must do. `mpiexec -n 3 python -m tests.contract NAME FOLDER`: MPI workers do."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import mpi, workers
from launch.dask_workers import DaskWorkers
from launch.simulated import Clock, Ledger, Machine, SimulatedWorkers
from launch.workers import LocalWorkers, MpiWorkers
from sweeps.crew import Event, Workers
from tests import evaluators

Maker = Callable[[str], Workers]
"""From the name of an evaluation to workers, two of them."""


def message(trial: int, folder: Path, attempt: int = 0) -> dict[str, Any]:
    """A trial as the coordinator sends it."""
    return batch([trial], folder, attempt)


def batch(trials: list[int], folder: Path, attempt: int = 0) -> dict[str, Any]:
    """Several trials as the coordinator sends them."""
    solver = {"lambda_model": 1.0, "lambda_tv": 1.0, "method": "fused", "iterations": 10, "record": []}
    asked = {"attempt": attempt, "kind": "search", "params": {},
             "settings": {"solver": solver, "data": {"chem_tilts": 5}}}
    return {"cell": "all", "folder": str(folder), "trials": [{"trial": trial, **asked} for trial in trials]}


def until(crew: Workers, met: Callable[[], bool], seconds: float = 60.0) -> list[Event]:
    """Poll until a condition is met; what was reported meanwhile."""
    events: list[Event] = []
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"timed out after {events}"
        events += crew.poll(0.05)
    return events


def answers(crew: Workers, messages: list[dict[str, Any]]) -> dict[int, Event]:
    """Send messages one after the other to whoever is idle; the events by trial."""
    found: dict[int, Event] = {}
    todo, at_work = list(messages), {}
    deadline = time.monotonic() + 60
    while todo or at_work:
        assert time.monotonic() < deadline, f"no answer to {at_work}"
        for worker in crew.idle():
            if todo:
                at_work[worker] = todo.pop(0)
                crew.submit(worker, at_work[worker])
        for event in crew.poll(0.05):
            found[at_work.pop(event.worker)["trials"][0]["trial"]] = event
    return found


def every_message_is_answered_by_its_worker(make: Maker, folder: Path) -> None:
    with make("landscape") as crew:
        crew.start(folder)
        until(crew, lambda: len(crew.idle()) == 2)
        assert sorted(crew.idle()) == sorted(crew.names())
        found = answers(crew, [message(trial, folder) for trial in range(20)])
        assert sorted(found) == list(range(20))
        assert all(event.lost is None and event.results[0]["trial"] == trial for trial, event in found.items())
        assert {event.worker for event in found.values()} == set(crew.names())


def a_busy_worker_is_not_idle_and_the_quick_do_not_wait_for_the_slow(make: Maker, folder: Path) -> None:
    with make("slow_or_quick") as crew:
        crew.start(folder)
        until(crew, lambda: len(crew.idle()) == 2)
        slow, quick = crew.idle()
        crew.submit(slow, message(1, folder))
        crew.submit(quick, message(0, folder))
        assert crew.idle() == []
        first = until(crew, lambda: crew.idle() == [quick])
        assert [event.worker for event in first] == [quick]
        second = until(crew, lambda: len(crew.idle()) == 2)
        assert [event.worker for event in second] == [slow]


def illness_is_a_status_and_chatter_goes_to_the_log(make: Maker, folder: Path) -> None:
    with make("ill") as crew:
        crew.start(folder)
        found = answers(crew, [message(trial, folder) for trial in (0, 1, 2, 5, 6)])
        statuses = {trial: event.results[0]["status"] for trial, event in found.items()}
        assert statuses[0] == statuses[5] == statuses[6] == "ok"
        assert statuses[1] == "the cost rose; lower lambda_tv"
        assert statuses[2].startswith("ValueError: lambda_tv is too much (evaluators.py:")
        assert found[5].results[0]["objective"] is None and found[5].results[0]["metrics"] == {"nrmse": None}
    logs = "".join(path.read_text(errors="replace") for path in (folder / "logs").glob("*.log"))
    assert "neither is this" in logs and "is not for the coordinator" in logs and "Traceback" in logs


def an_answer_that_is_no_result_is_a_status(make: Maker, folder: Path) -> None:
    with make("odd") as crew:
        crew.start(folder)
        found = answers(crew, [message(0, folder), message(1, folder)])
        assert found[0].results[0]["status"] == "ok"
        assert "the evaluation returned set, not a list of results" in found[1].results[0]["status"]


def a_trial_that_fails_does_not_fail_its_batch(make: Maker, folder: Path) -> None:
    with make("ill") as crew:
        crew.start(folder)
        results = answers(crew, [batch([0, 1, 2, 6], folder)])[0].results
        assert results is not None and [result["status"][:10] for result in results] == [
            "ok", "the cost r", "ValueError", "ok"]


def waiting_costs_no_processor_time(make: Maker, folder: Path) -> None:
    with make("slow") as crew:
        crew.start(folder)
        until(crew, lambda: len(crew.idle()) == 2)
        crew.submit(crew.idle()[0], message(0, folder))
        wall, cpu = time.monotonic(), time.process_time()
        assert crew.poll(0.3) == []
        assert time.monotonic() - wall >= 0.3
        assert time.process_time() - cpu < 0.05
        until(crew, lambda: len(crew.idle()) == 2)


def long_messages_arrive_whole(make: Maker, folder: Path) -> None:
    with make("echo") as crew:
        crew.start(folder)
        long = message(0, folder)
        long["trials"][0]["params"] = {"angles": [i / 7 for i in range(50_000)]}
        assert answers(crew, [long])[0].results[0]["params"] == long["trials"][0]["params"]


def workers_that_cannot_import_their_evaluation_are_no_workers(make: Maker, folder: Path) -> None:
    with make("missing") as crew:
        crew.start(folder)
        events = until(crew, lambda: not crew.names())
        assert all(event.results is None and "missing" in event.lost for event in events) and len(events) == 2


def a_worker_stuck_in_a_trial_is_given_up(make: Maker, folder: Path) -> None:
    with make("stuck") as crew:
        crew.start(folder)
        until(crew, lambda: len(crew.idle()) == 2)
        worker = crew.idle()[0]
        crew.submit(worker, message(1, folder))  # lasts a minute
        started = time.monotonic()
        crew.kill(worker)
        events: list[Event] = []
        while not events:
            events = crew.poll(0.05)
        assert [(event.worker, event.results) for event in events] == [(worker, None)] and events[0].lost
        found = answers(crew, [message(0, folder)])
        assert found[0].results is not None
        assert time.monotonic() - started < 20


def a_full_disk_is_fatal_and_no_fault_of_the_trial(make: Maker, folder: Path) -> None:
    with make("full") as crew:
        crew.start(folder)
        found = answers(crew, [message(trial, folder) for trial in (0, 1)])
        assert "fatal" not in found[0].results[0]
        assert found[1].results[0]["fatal"] == f"{folder}/volumes/all-1-0.zarr: No space left on device"


def a_worker_that_dies_in_a_trial_is_lost_once_and_comes_back(make: Maker, folder: Path) -> None:
    """Not of MPI workers, whose job dies, or who are not replaced."""
    with make("ill") as crew:
        crew.start(folder)
        until(crew, lambda: len(crew.idle()) == 2)
        for trial in (3, 4):  # leaves; is killed by SIGKILL
            worker = crew.idle()[0]
            crew.submit(worker, message(trial, folder))
            events: list[Event] = []
            while not events:
                events = crew.poll(0.05)
            assert [(event.worker, event.results) for event in events] == [(worker, None)] and events[0].lost
            assert not until(crew, lambda: len(crew.idle()) == 2)
        assert len(crew.names()) == 2
        assert {event.worker for event in answers(crew, [message(k, folder) for k in (6, 7)]).values()} <= set(
            crew.names())


def an_idle_worker_that_is_killed_comes_back(make: Maker, folder: Path) -> None:
    """Not of MPI workers."""
    with make("process") as crew:
        crew.start(folder)
        found = answers(crew, [message(0, folder)])[0]
        os.kill(found.results[0]["pid"], signal.SIGKILL)
        events: list[Event] = []
        while not events:
            events = crew.poll(0.05)
        assert [(event.worker, event.results) for event in events] == [(found.worker, None)]
        assert len(crew.names()) == 2
        assert not until(crew, lambda: len(crew.idle()) == 2)


def a_rank_given_up_comes_back_with_its_answer(make: Maker, folder: Path) -> None:
    """Of MPI workers only: a local worker is replaced."""
    with make("slow") as crew:
        crew.start(folder)
        until(crew, lambda: len(crew.idle()) == 2)
        worker = crew.idle()[0]
        crew.submit(worker, message(0, folder))
        crew.kill(worker)
        assert worker not in crew.names()
        events = until(crew, lambda: worker in crew.idle())
        assert [event.results for event in events] == [None] and worker in crew.names()
        assert set(answers(crew, [message(trial, folder) for trial in (1, 2)])) == {1, 2}


def a_rank_that_falls_silent_is_lost(make: Maker, folder: Path) -> None:
    """Of MPI workers only: a local worker's end is known at once, and one that is stopped may go on."""
    mpi.SILENCE = 1.0
    with make("frozen") as crew:
        crew.start(folder)
        found = answers(crew, [message(trial, folder) for trial in (0, 1, 2, 3)])
        assert found[1].lost == f"{found[1].worker} gave no sign of life for 1 s"
        assert crew.names() == crew.idle() == [found[3].worker] != [found[1].worker]


CHECKS = {check.__name__: check for check in (
    every_message_is_answered_by_its_worker,
    a_busy_worker_is_not_idle_and_the_quick_do_not_wait_for_the_slow,
    illness_is_a_status_and_chatter_goes_to_the_log,
    an_answer_that_is_no_result_is_a_status,
    a_trial_that_fails_does_not_fail_its_batch,
    waiting_costs_no_processor_time,
    long_messages_arrive_whole,
    workers_that_cannot_import_their_evaluation_are_no_workers,
    a_worker_stuck_in_a_trial_is_given_up,
    a_full_disk_is_fatal_and_no_fault_of_the_trial,
)}
# Simulated workers have no process that prints, hangs or fails to import.
SIMULATED = {check.__name__: check for check in (
    every_message_is_answered_by_its_worker,
    a_busy_worker_is_not_idle_and_the_quick_do_not_wait_for_the_slow,
    an_answer_that_is_no_result_is_a_status,
    a_trial_that_fails_does_not_fail_its_batch,
    long_messages_arrive_whole,
    a_full_disk_is_fatal_and_no_fault_of_the_trial,
)}
# Also kept by kinds that replace their dead.
REPLACED = {**CHECKS, **{check.__name__: check for check in (
    a_worker_that_dies_in_a_trial_is_lost_once_and_comes_back, an_idle_worker_that_is_killed_comes_back)}}


MPI_CHECKS = {**CHECKS, **{check.__name__: check for check in (
    a_rank_that_falls_silent_is_lost, a_rank_given_up_comes_back_with_its_answer)}}


def local(evaluate: str) -> LocalWorkers:
    """Two processes."""
    return LocalWorkers(2, f"tests.evaluators:{evaluate}")


def dask(evaluate: str, address: str = "") -> DaskWorkers:
    """Two processes of a dask cluster of our own, or those of another one."""
    return DaskWorkers(f"tests.evaluators:{evaluate}", address=address, count=2)


def simulated(evaluate: str) -> SimulatedWorkers:
    """Two workers that are none."""
    return SimulatedWorkers(Machine(2), getattr(evaluators, evaluate), Clock(), None, Ledger())


def ranks(evaluate: str) -> MpiWorkers:
    """Ranks 1 and 2."""
    return MpiWorkers(f"tests.evaluators:{evaluate}")


if __name__ == "__main__":
    mpi.HEARTBEAT = 0.1
    rank, _ = workers.world()
    if rank:
        workers.serve()
    else:
        MPI_CHECKS[sys.argv[1]](ranks, Path(sys.argv[2]))
        print("kept")
    workers.leave(0)
