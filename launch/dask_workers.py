"""Workers of a dask cluster: one that is started here, or one that runs already; the coordinator's side.

`DaskWorkers` hands every message to one dask worker by name and never leaves it to dask to run it again: who has died,
and what becomes of its trial, is the coordinator's to decide. A thread with an event loop speaks to dask and puts news
into a queue; the coordinator's own thread waits on that queue. The workers' side is `launch.dask_side`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import dask_side, devices
from sweeps.crew import Event
from sweeps.journal import RunError

CONNECT = 30.0  # [s] for a scheduler to answer
FIRST = 600.0  # [s] for the first worker to join: a cluster's jobs may start one after the other
RETURN = 60.0  # [s] for a worker that died to be started again by its nanny
SETTLE = 1.0  # [s] after a worker joins: others of its machine join then, too, and share its cores with it
LOOK = 30.0  # [s] between looks at the cluster where it tells no news
STARTED_HERE = "a cluster of its own"


def installed() -> None:
    """RunError with the remedy where the extra `dask` is missing."""
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise RunError(f"dask is not installed ({error}): pip install 'tomoatlas[dask]'") from error


@dataclass
class _Seat:
    """A worker as the coordinator knows it. late: given up in a trial, its answer would bring it back."""

    name: str
    address: str
    nanny: str | None
    ready: bool = False
    busy: bool = False
    late: bool = False


class DaskWorkers:
    """The workers of a dask cluster; those that join later are taken in.

    A worker that dies is reported as lost, and where a nanny starts it again it comes back by itself. One that dies
    before it was ready (an import that fails) is not taken again.
    """

    def __init__(self, evaluate: str, share: int = 1, address: str = "", count: int = 2) -> None:
        """share: devices that one reconstruction is spread over (solver.devices).

        address: of a scheduler, "tcp://host:port", or the path of its scheduler file; "" starts a cluster of `count`
        workers on this machine.
        """
        installed()
        if address and "://" not in address and not Path(address).is_file():
            raise RunError(_unanswered(address, "there is no such file"))
        self._evaluate, self._share, self._count = evaluate, share, count
        self._news: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
        self._seats: dict[str, _Seat] = {}  # by dask's address
        self._away: dict[str, float] = {}  # names of workers that may come (back), and until when
        self._met = False  # somebody was there
        self._banned: set[str] = set()  # nannies whose workers die before they are ready
        self._link = _Link(address, count, self._news)
        self._logs = Path()

    def start(self, folder: Path) -> None:
        """Connect to the cluster, or start one; workers are idle when they have imported the evaluation."""
        self._logs = folder.resolve() / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        present = self._link.open(self._logs / "dask.log")
        self._away = dict.fromkeys((f"worker-{k}" for k in range(max(1, present))), time.monotonic() + FIRST)

    def names(self) -> list[str]:
        """Workers that live, or may be expected (back) soon."""
        now, seated = time.monotonic(), [seat.name for seat in self._seats.values() if not seat.late]
        return sorted({*seated, *(name for name, until in self._away.items() if until > now)})

    def idle(self) -> list[str]:
        """Workers that have said they are ready, and have no trial."""
        return [seat.name for seat in self._seats.values() if seat.ready and not seat.busy]

    def submit(self, worker: str, message: dict[str, Any]) -> None:
        """Hand trials to an idle worker."""
        seat = self._seat(worker)
        seat.busy = True
        self._link.do(self._link.ask(seat.address, dask_side.evaluate, json.dumps(message)))

    def kill(self, worker: str) -> None:
        """End a worker's process by its nanny, which starts a new one; without a nanny wait for it no longer."""
        seat = self._seat(worker)
        if seat.nanny:
            self._link.do(self._link.kill(seat.address))
        else:
            self._news.put(("stuck", seat.address, ""))

    def poll(self, timeout: float) -> list[Event]:
        """Results and losses; waits at most `timeout` seconds for the first news."""
        events: list[Event] = []
        with contextlib.suppress(queue.Empty):
            news = self._news.get(timeout=timeout)
            while True:
                events += getattr(self, f"_{news[0]}")(*news[1:])
                news = self._news.get_nowait()
        return events + self._nobody()

    def _joined(self, address: str, text: str) -> list[Event]:
        """A new worker: give it a name, and tell it what to evaluate."""
        told = json.loads(text)
        if told["nanny"] in self._banned:
            return []
        taken = {seat.name for seat in self._seats.values()}
        number = next(k for k in range(len(taken) + 1) if f"worker-{k}" not in taken)
        name = f"worker-{number}"
        self._away.pop(name, None)
        self._met = True
        self._seats[address] = _Seat(name, address, told["nanny"])
        words = {"name": name, "evaluate": self._evaluate, "share": self._share, "log": str(self._logs / f"{name}.log"),
                 "crowd": told["crowd"]}
        if self._link.own:  # it inherits this process's environment, not what the command was given
            words["env"] = devices.environment(number, max(self._count, number + 1), devices.given(), share=self._share)
        self._link.do(self._link.ask(address, dask_side.prepare, json.dumps(words)))
        return []

    def _answered(self, address: str, text: str) -> list[Event]:
        """A worker's first answer is "" or why it cannot work, the others are results."""
        seat = self._seats.get(address)
        if seat is None:
            return []
        if not seat.ready:
            seat.ready = not text
            return [] if seat.ready else self._lost(seat, f"{seat.name} {text}", ban=True)
        late, seat.busy, seat.late = seat.late, False, False
        return [] if late else [Event(seat.name, results=json.loads(text))]

    def _failed(self, address: str, text: str) -> list[Event]:
        """Dask could not bring a message to an end, though the worker lives."""
        seat = self._seats.get(address)
        if seat is None:
            return []
        if not seat.ready:
            return self._lost(seat, f"{seat.name} {text}", ban=True)
        late, seat.busy, seat.late = seat.late, False, False
        return [] if late else [Event(seat.name, lost=f"{seat.name} {text}")]

    def _stuck(self, address: str, _: str) -> list[Event]:
        """A worker that cannot be killed is given up; its answer would bring it back."""
        seat = self._seats.get(address)
        if seat is None or not seat.busy or seat.late:
            return []
        seat.late = True
        return [Event(seat.name, lost=f"{seat.name} was given up in the middle of a trial")]

    def _gone(self, address: str, reason: str) -> list[Event]:
        """A worker has left the cluster; its nanny may start it again."""
        seat = self._seats.get(address)
        return [] if seat is None else self._lost(seat, f"{seat.name} {reason}{self._last_words(seat)}",
                                                  ban=not seat.ready)

    def _cut(self, address: str, reason: str) -> list[Event]:
        """The way to a worker is lost, and to all the others: nobody is waited for any more."""
        seat = self._seats.pop(address, None)
        self._away = {}
        return [] if seat is None or seat.late else [Event(seat.name, lost=f"{seat.name} {reason}")]

    def _lost(self, seat: _Seat, sentence: str, ban: bool) -> list[Event]:
        del self._seats[seat.address]
        if ban:  # nobody waits for it, so nobody else would tell
            print(f"not used: {sentence}", file=sys.stderr, flush=True)
        if ban and seat.nanny:
            self._banned.add(seat.nanny)
        elif seat.nanny:
            self._away[seat.name] = time.monotonic() + RETURN
        return [] if seat.late else [Event(seat.name, lost=sentence)]

    def _nobody(self) -> list[Event]:
        """No worker has ever come to the cluster, and the time for it is over."""
        if self._met or any(until > time.monotonic() for until in self._away.values()):
            return []
        self._met = True
        return [Event(name, lost=f"no worker has joined the dask scheduler at {self._link.place} in {FIRST:g} s; start "
                      "some with `dask worker --scheduler-file FILE.json --nthreads 1`") for name in self._away]

    def _last_words(self, seat: _Seat) -> str:
        log = self._logs / f"{seat.name}.log"
        with contextlib.suppress(OSError):
            lines = log.read_text(errors="replace").splitlines()
            return next((f"; the last line of {log} is: {line.strip()}" for line in lines[::-1] if line.strip()), "")
        return ""

    def _seat(self, worker: str) -> _Seat:
        return next(seat for seat in self._seats.values() if seat.name == worker)

    def close(self) -> None:
        """End a cluster of our own; let go of another one, whose workers that are in a trial start anew."""
        busy = [seat.address for seat in self._seats.values() if seat.busy and seat.nanny]
        self._seats, self._away = {}, {}
        self._link.close(busy)

    def __enter__(self) -> DaskWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Link:
    """The thread that speaks to dask. News are (kind, address, text), by the methods of `DaskWorkers` that take them.

    own: whether the cluster is started here. place: where it is, for sentences.
    """

    def __init__(self, address: str, count: int, news: queue.SimpleQueue[tuple[str, str, str]]) -> None:
        self.own, self.place = not address, address or STARTED_HERE
        self._address, self._workers, self._news = address, count, news
        self._token = uuid.uuid4().hex
        self._known: dict[str, Any] = {}  # what the scheduler says of its workers, by address
        self._futures: dict[str, Any] = {}  # what a worker has to answer
        self._client: Any = None
        self._cluster: Any = None
        self._watch: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._logging = contextlib.ExitStack()

    def open(self, log: Path) -> int:
        """Connect, and hear from now on what happens in the cluster; how many workers there are."""
        import distributed  # noqa: F401  # which sets up its loggers

        self._logging.enter_context(_logged_to(log))
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._serve, args=(self._loop,), daemon=True, name="dask")
        thread.start()
        self._logging.callback(thread.join, 10.0)
        self._logging.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        try:
            return asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            self.close([])
            if self.own:
                raise RunError(f"a dask cluster could not be started on this machine ({error}); see {log}") from error
            raise RunError(_unanswered(self.place, str(error) or type(error).__name__)) from error

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        # Processes started from here inherit the mask: Ctrl-C on the terminal is for the coordinator alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, dask_side.SIGNALS)
        asyncio.set_event_loop(loop)
        loop.run_forever()

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        """Start something in the thread."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _connect(self) -> int:
        import dask
        from distributed import Client, LocalCluster

        where = {"address": self._address}
        if self.own:
            # What dask measures by itself is not looked at here, and costs time. No task is to be run twice.
            with dask.config.set({"distributed.worker.profile.enabled": False,
                                  "distributed.scheduler.allowed-failures": 0}):
                self._cluster = await LocalCluster(
                    n_workers=self._workers, threads_per_worker=1, processes=True, memory_limit=0, asynchronous=True,
                    silence_logs=logging.WARNING, scheduler_kwargs={"dashboard": False},
                    dashboard_address="127.0.0.1:0")
            where = {"address": self._cluster}
        elif "://" not in self._address:
            where = {"scheduler_file": self._address}
        self._client = await Client(**where, asynchronous=True, timeout=CONNECT, set_as_default=False)
        self._stir = asyncio.Event()
        self._client.subscribe_topic("all", self._hear)
        if not self.own:
            await asyncio.sleep(SETTLE)
        await self._look()
        self._watch = asyncio.get_running_loop().create_task(self._keep_looking())
        return len(self._known)

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        """The scheduler says that a worker came or went."""
        action = event[1].get("action")
        if action == "remove-worker":
            self._stir.set()
        elif action == "add-worker":
            asyncio.get_running_loop().call_later(0.0 if self.own else SETTLE, self._stir.set)

    async def _keep_looking(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stir.wait(), LOOK)
            self._stir.clear()
            if not await self._look():
                return

    async def _look(self) -> bool:
        """Compare the cluster with what is known of it; whether it can be looked at again."""
        kind, reason = "gone", "has left the dask cluster: it was killed, or its time or memory or machine has ended"
        try:
            now = (await self._client.scheduler.identity(n_workers=-1))["workers"]
            new = {address: about for address, about in now.items()
                   if self._known.get(address, {}).get("id") != about["id"]}
            views = await self._client.run(dask_side.view, workers=list(new), on_error="return") if new else {}
        except Exception as error:  # of a connection or of the scheduler: nothing is left to rely on
            now, new, views = {}, {}, {}
            kind, reason = "cut", f"is out of reach: the dask scheduler at {self.place} does not answer ({error})"
        for address in [address for address in self._known if address not in now or address in new]:
            del self._known[address]
            self._news.put((kind, address, f"({address}) {reason}"))
            future = self._futures.pop(address, None)
            if future is not None and kind == "gone":
                await future.cancel()
        for address in new.keys() & views.keys():  # others have gone already
            seen = views[address]  # no view where tomoatlas is missing: preparing it will tell
            self._known[address] = {**new[address], "cores": seen["cores"] if isinstance(seen, dict) else []}
        for address in sorted(new.keys() & self._known.keys()):
            self._meet(address)
        return kind == "gone"

    def _meet(self, address: str) -> None:
        about = self._known[address]
        crowd = sum(other["host"] == about["host"] and bool({*other["cores"]} & {*about["cores"]})
                    for other in self._known.values())
        self._news.put(("joined", address, json.dumps({"nanny": about["nanny"], "crowd": max(1, crowd)})))

    async def ask(self, address: str, function: Any, text: str) -> None:
        """Let a worker answer a text with a text."""
        from concurrent.futures import CancelledError

        from distributed import KilledWorker

        future = self._client.submit(function, self._token, address, text, workers=[address], pure=False, retries=0,
                                     allow_other_workers=False, key=f"tomoatlas-{uuid.uuid4().hex}")
        self._futures[address] = future
        try:
            reply = await future
        except (CancelledError, asyncio.CancelledError, KilledWorker):
            return  # it has gone; `_look` tells
        except Exception as error:
            self._news.put(("failed", address, f"({address}) cannot do its work: {type(error).__name__}: {error}"))
        else:
            self._news.put(("answered", address, reply))
        self._futures.pop(address, None)

    async def kill(self, address: str) -> None:
        """SIGKILL from the worker's nanny, which then starts a new one."""
        try:
            await self._client.run(dask_side.kill, workers=[address], nanny=True)
        except Exception:  # whatever a nanny of another version or under other rules answers
            if address in self._known:
                self._news.put(("stuck", address, ""))

    def close(self, busy: list[str]) -> None:
        """End the thread, and with it a cluster of our own."""
        if self._loop is None:
            return
        with contextlib.suppress(Exception):  # the cluster may have gone; nothing of ours is left in it then
            asyncio.run_coroutine_threadsafe(self._part(busy), self._loop).result(30.0)
        self._logging.close()
        self._loop.close()
        self._loop = None

    async def _part(self, busy: list[str]) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._cluster is not None:
            for nanny in self._cluster.workers.values():
                nanny.close_gracefully()  # it starts no worker any more
                if nanny.pid:
                    os.kill(nanny.pid, signal.SIGKILL)
        elif self._client is not None:
            free = [address for address in self._known if address not in busy]
            if free:
                await self._client.run(dask_side.release, self._token, workers=free, on_error="ignore")
            await asyncio.gather(*map(self.kill, busy))
        if self._client is not None:
            self._client.unsubscribe_topic("all")
        for thing in (self._client, self._cluster):
            if thing is not None:
                await thing.close()


def _unanswered(place: str, reason: str) -> str:
    return (f"no dask scheduler answers at {place} ({reason}): start one with `dask scheduler --scheduler-file "
            "FILE.json` and workers with `dask worker --scheduler-file FILE.json --nthreads 1`, then run with "
            "--workers dask:FILE.json")


@contextlib.contextmanager
def _logged_to(path: Path) -> Any:
    """Dask's own words go to a file instead of the terminal."""
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    # Dask gives several of its loggers a handler of their own.
    own = [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]
    loggers = [logging.getLogger(name) for name in ("asyncio", "tornado", *own)]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before):
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
