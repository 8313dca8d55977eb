"""Workers that an MPI launcher has started: `mpiexec -n N+1 tomoatlas run ...`; rank 0 coordinates.

Nobody blocks in MPI, where waiting spins on a core: both sides probe and sleep.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from launch import devices, worker
from launch.lifelines import Lifelines, hold, is_cut
from launch.logs import share
from sweeps.crew import Event
from sweeps.journal import RunError

SETUP, TRIAL, READY, RESULT, DEAD, BEAT, LEAVE, GONE = range(1, 9)  # tags
HEARTBEAT = 5.0  # [s] at least
CROWD = 2e-3  # [s] by which each rank makes all hearts slower: rank 0 hears at most 500 beats in a second
SILENCE = 60.0  # [s] after which a rank counts as lost though its connection stands: a node is gone, a process stopped
ABANDONED = 600.0  # [s] of silence after which a worker leaves; rank 0 may be busy for minutes
BROKEN = "others have died"  # word to leave: MPI_Finalize would hang
_broken = False  # a rank was lost: MPI_Finalize would wait for it for ever
_stuck = False  # it may still be there: the launcher would wait for it for ever


def world(env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, size) in the world of an MPI launcher; without one (0, 1), and mpi4py is not imported."""
    names = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # a batch script is one process
    expected = max(int(env.get(name) or 1) for name in names)
    if expected == 1:
        return 0, 1
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise RunError(f"a launcher started {expected} processes, but mpi4py does not load ({error}); "
                       "install tomoatlas[mpi], and tomoatlas[mpich] where the machine has no MPI") from error
    comm = MPI.COMM_WORLD
    if comm.size == 1:
        library = MPI.Get_library_version().splitlines()[0].partition(",")[0].strip()
        raise RunError(f"{expected} processes were started, but each finds itself alone: the launcher does "
                       f"not know mpi4py's MPI ({library}). Under Slurm use srun --mpi=pmi2 for MPICH or "
                       "srun --mpi=pmix for Open MPI (srun --mpi=list says what there is); elsewhere use the "
                       "mpiexec that belongs to this MPI")
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    return comm.rank, comm.size


def leave(code: int) -> NoReturn:
    """End this process, under MPI or not, with an exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _stuck:
        from mpi4py import MPI

        time.sleep(1)  # until the launcher has passed on what was printed: it drops the rest
        MPI.COMM_WORLD.Abort(code)
    if _broken:
        os._exit(code)
    sys.exit(code)


def _break(stuck: bool = False) -> None:
    """From now on MPI_Finalize would hang. stuck: so would the launcher."""
    global _broken, _stuck
    _stuck |= stuck
    if not _broken:
        atexit.register(leave, 2)  # an error may end the process without a word to `leave`
    _broken = True


class MpiWorkers:
    """Ranks 1, 2, ... as rank 0 sees them.

    A rank is lost when its connection closes (`launch.lifelines`), when MPI says so (Open MPI with --with-ft ulfm) or
    when its heart stops, and is not replaced. MPICH's mpiexec ends the whole job instead; running again continues it.
    """

    def __init__(self, evaluate: str, share: int = 1) -> None:
        """share: devices that one reconstruction is spread over (solver.devices)."""
        from mpi4py import MPI

        self._mpi, self._comm, self._evaluate, self._share = MPI, MPI.COMM_WORLD, evaluate, share
        self._present = set(range(1, self._comm.size))  # ranks that run
        self._alive = sorted(self._present)  # ranks that can evaluate
        self._idle: set[int] = set()
        self._heard: dict[int, float] = {}
        self._beat, self._pulse = 0.0, max(HEARTBEAT, CROWD * self._comm.size)
        self._silence = max(SILENCE, 3 * self._pulse)
        self._letters: list[Any] = []  # sends under way
        self._late: list[int] = []  # ranks given up in a trial, whose hearts beat
        self._news: list[Event] = []
        self._lines = Lifelines(self._comm.size)
        _neighbours(self._comm)

    def start(self, folder: Path) -> None:
        """Tell every rank what to evaluate; it is idle when it has imported that."""
        logs = folder.resolve() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        setup = {"evaluate": self._evaluate, "logs": str(logs), "share": self._share, "line": self._lines.address,
                 "pulse": self._pulse}
        for rank in self._alive:
            self._send(rank, json.dumps(setup), SETUP)
            self._heard[rank] = time.monotonic()

    def names(self) -> list[str]:
        """Ranks that live."""
        return [_name(rank) for rank in self._alive]

    def idle(self) -> list[str]:
        """Ranks that are ready and have no trial."""
        return [_name(rank) for rank in sorted(self._idle)]

    def submit(self, worker: str, message: dict[str, Any]) -> None:
        """Hand trials to an idle rank."""
        rank = int(worker.removeprefix("worker-"))
        self._idle.remove(rank)
        self._send(rank, json.dumps(message), TRIAL)

    def kill(self, worker: str) -> None:
        """Wait no longer for a rank, which cannot be killed without the job; its answer would bring it back."""
        rank = int(worker.removeprefix("worker-"))
        self._alive.remove(rank)
        self._late.append(rank)
        self._news.append(Event(worker, lost=f"{worker} was given up in the middle of a trial"))

    def poll(self, timeout: float) -> list[Event]:
        """Results and losses; waits at most `timeout` seconds for the first."""
        started = time.monotonic()
        while True:
            events = self._news + self._receive() + self._silent()
            self._news = []
            waited = time.monotonic() - started
            if events or waited >= timeout:
                return events
            # The longer the wait has been, the less the grain of the sleep matters.
            time.sleep(min(0.02, max(0.0005, waited / 10)))

    def _receive(self) -> list[Event]:
        events: list[Event] = []
        status = self._mpi.Status()
        cut = self._lines.cut()  # before the last words of those ranks are read
        try:
            while self._comm.iprobe(status=status):
                rank, tag = status.Get_source(), status.Get_tag()
                events += self._take(rank, tag, self._comm.recv(source=rank, tag=tag))
        except self._mpi.Exception as error:
            events += self._failed(error)
        return events + [event for rank in cut for event in self._lose(rank, f"{_name(rank)} died")]

    def _take(self, rank: int, tag: int, text: str) -> list[Event]:
        if tag == GONE:
            self._present.discard(rank)
        if tag == RESULT and rank in self._late:
            self._late.remove(rank)
            self._alive.append(rank)
            self._idle.add(rank)
            return []
        if rank not in self._alive:
            return []  # was given up
        self._heard[rank] = time.monotonic()
        if tag == DEAD:
            self._alive.remove(rank)
            return [Event(_name(rank), lost=text)]
        if tag in (READY, RESULT):
            self._idle.add(rank)
        return [Event(_name(rank), results=json.loads(text))] if tag == RESULT else []

    def _silent(self) -> list[Event]:
        """Let the ranks hear of us, and count those we have not heard of."""
        now = time.monotonic()
        if now - self._beat < self._pulse:
            return []
        self._beat = now
        for rank in self._present & self._heard.keys():
            self._send(rank, "", BEAT)
        silent = [rank for rank in self._alive if now - self._heard.get(rank, now) > self._silence]
        reason = f"gave no sign of life for {self._silence:.0f} s"
        return [event for rank in silent for event in self._lose(rank, f"{_name(rank)} {reason}", stuck=True)]

    def _failed(self, error: Exception) -> list[Event]:
        """The ranks that a fault-tolerant MPI reports as dead."""
        try:
            self._comm.Ack_failed()
            group = self._comm.Get_failed()
        except (NotImplementedError, self._mpi.Exception):
            raise RunError(f"MPI failed ({error}); nothing that was finished is lost: run again") from error
        dead = group.Translate_ranks(range(group.size), self._comm.group)
        return [event for rank in dead for event in self._lose(rank, f"{_name(rank)} died")]

    def _lose(self, rank: int, reason: str, stuck: bool = False) -> list[Event]:
        """Count a rank out; news of it, unless it has left or was given up before."""
        if rank not in self._present:
            return []
        _break(stuck)
        self._present.remove(rank)
        self._idle.discard(rank)
        if rank in self._late:
            self._late.remove(rank)
        if rank not in self._alive:
            return []
        self._alive.remove(rank)
        return [Event(_name(rank), lost=reason)]

    def _send(self, rank: int, text: str, tag: int) -> None:
        # Never a blocking send: the rank may be dead without our knowing yet, which `poll` finds out.
        try:
            self._letters = [letter for letter in self._letters if not letter.Test()]
            self._letters.append(self._comm.isend(text, rank, tag))
        except self._mpi.Exception:
            pass

    def close(self) -> None:
        """Nothing: ranks leave at the end of the `with` block, for in MPI_Finalize they spin on a core."""

    def __enter__(self) -> MpiWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        """Send the ranks home and wait for them: MPI_Finalize fails where a message is left unread."""
        for rank in self._present:
            self._send(rank, BROKEN if _broken else "", LEAVE)
        deadline = time.monotonic() + SILENCE
        while self._present and time.monotonic() < deadline:
            self._receive()
            time.sleep(0.005)
        if self._present:
            _break(stuck=True)
        if not _broken:
            _finalize(self._mpi)


def _finalize(mpi: Any) -> None:
    """End MPI, or this process, where others have died since they were sent home."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(math.ceil(SILENCE))
    mpi.Finalize()
    signal.alarm(0)


def _name(rank: int) -> str:
    return f"worker-{rank}"


def _neighbours(comm: Any) -> tuple[int, int, int]:
    """(index, workers, threads) of this rank; every rank has to call this.

    index, workers: its place among the worker ranks that share its GPUs, and their number.
    threads: its part of the processor cores, among the worker ranks that may run on the same ones.
    """
    from mpi4py import MPI

    cores = os.sched_getaffinity(0)
    # A launcher that binds GPUs to ranks shows each rank its own, often all by the number 0.
    bound = "SLURM_GPUS_PER_TASK" in os.environ or "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
    gpus = str(comm.rank) if bound else os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    views = [view for view in node.allgather((comm.rank, cores, gpus)) if view[0] != 0]
    _forget_names()
    node.Free()
    sharing = [rank for rank, _, theirs in views if theirs == gpus]
    crowd = sum(bool(theirs & cores) for _, theirs, _ in views)
    index = sharing.index(comm.rank) if comm.rank else 0
    return index, max(1, len(sharing)), max(1, len(cores) // max(1, crowd))


def _forget_names() -> None:
    """Unlink MPICH's shared memory, which every rank of the node has mapped by now.

    It is named after job and step: what a kill leaves behind makes a requeued job hang in MPI_Init.
    """
    with contextlib.suppress(OSError):
        for name in {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()
                     if "/dev/shm/mpich_shm_" in line}:
            Path(name).unlink(missing_ok=True)


def serve() -> None:
    """The life of a rank above 0: take trials from rank 0 until told to leave, or until rank 0 is gone."""
    worker.ignore_signals()
    _Rank().run()


class _Rank:
    """A worker rank: this thread speaks MPI, another one evaluates; so the heart beats during a solve."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.mpi, self.comm = MPI, MPI.COMM_WORLD
        self.place = _neighbours(self.comm)
        self.inbox: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self.busy = False
        self.heard = self.beat = time.monotonic()
        self.pulse = HEARTBEAT
        self.line: socket.socket | None = None

    def run(self) -> None:
        """Until told to leave."""
        status = self.mpi.Status()
        while True:
            while self.comm.iprobe(source=0, status=status):
                text, self.heard = self.comm.recv(source=0, tag=status.Get_tag()), time.monotonic()
                if status.Get_tag() == LEAVE:
                    return self.leave(text == BROKEN)
                self.take(status.Get_tag(), text)
            self.live()
            try:
                # While a trial runs only the word to leave can come; an idle worker looks more often.
                tag, text = self.outbox.get(timeout=0.05 if self.busy else 0.002)
            except queue.Empty:
                continue
            self.busy = False
            self.comm.send(text, 0, tag)

    def take(self, tag: int, text: str) -> None:
        """Act on a message from rank 0."""
        if tag == SETUP:
            setup = json.loads(text)
            self.pulse = setup.pop("pulse")
            self.line = hold(setup.pop("line"), self.comm.rank)
            index, workers, threads = self.place
            os.environ.update(devices.environment(index, workers, os.environ, threads, share=setup.pop("share")))
            self.busy = True
            threading.Thread(target=self.evaluate, kwargs=setup, daemon=True).start()
        elif tag == TRIAL:
            self.busy = True
            self.inbox.put(text)

    def live(self) -> None:
        """Let the heart beat, and leave a coordinator that is gone."""
        now = time.monotonic()
        if is_cut(self.line) or now - self.heard > ABANDONED:
            os._exit(1)
        if now - self.beat > self.pulse:
            self.beat = now
            self.comm.send("", 0, BEAT)

    def evaluate(self, evaluate: str, logs: str) -> None:
        """The other thread: import the function, then answer trial after trial."""
        name = _name(self.comm.rank)
        # One file per machine: a file per rank would be tens of thousands on a large one.
        share(Path(logs, f"{socket.gethostname().partition('.')[0]}.log"), name)
        try:
            function = worker.load(evaluate)
        except Exception as error:
            traceback.print_exc()
            self.outbox.put((DEAD, f"{name} could not import {evaluate}: {error}"))
            return
        self.outbox.put((READY, ""))
        while True:
            self.outbox.put((RESULT, worker.answer(function, self.inbox.get())))

    def leave(self, broken: bool) -> None:
        """Say goodbye; a trial that still runs ends with the process. broken: others have died."""
        self.comm.send("", 0, GONE)
        if broken:
            # MPICH's mpiexec ends all when one goes like this: rank 0 has to be the first.
            while self.line is not None and not is_cut(self.line) and time.monotonic() - self.heard < ABANDONED:
                time.sleep(0.02)
            os._exit(0)
        if not self.busy:
            return _finalize(self.mpi)
        # Not os._exit: MPICH tells its launcher only in C's exit handlers that it has finalized, and a process that is
        # gone without a word has failed and takes the job with it. Python's own shutdown would wait for the trial.
        _finalize(self.mpi)
        ctypes.CDLL(None).exit(0)
