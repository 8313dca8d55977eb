"""What runs inside a dask worker, called by `launch.dask_workers`: set up the process once, then answer messages.

The evaluation runs in the worker's thread, so that its event loop, and with it its heart, goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from launch import devices, logs, worker

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Refused(Exception):
    """Why a process cannot be given what a worker needs."""


@dataclass
class _Process:
    """This process: whom it serves and by which address, its evaluation, and what its output was before."""

    served: tuple[str, str] = ("", "")
    evaluate: worker.Evaluate | None = None
    output: tuple[int, int, TextIO, TextIO] | None = None
    claims: dict[str, TextIO] = field(default_factory=dict)  # locks by GPU, held as long as the process lives


_this = _Process()


def view() -> dict[str, Any]:
    """What the coordinator wants to know of a worker before it gives it work."""
    return {"cores": sorted(os.sched_getaffinity(0))}


def prepare(token: str, address: str, text: str) -> str:
    """Environment, log and evaluation of this process; "", or a sentence on why it cannot work."""
    from distributed import get_worker

    words, dask_worker = json.loads(text), get_worker()
    try:
        env = words.get("env") or _environment(words["crowd"], words["share"])
        _adopt(env)
        _this.served, _this.evaluate = (token, address), None
        _redirect(Path(words["log"]))
        if dask_worker.nanny:  # which ends it by other means; a worker that stands alone hears its signals
            dask_worker.loop.add_callback(_ignore_signals)
        _this.evaluate = worker.load(words["evaluate"])
    except _Refused as error:
        return f"({address}) {error}"
    except OSError as error:
        return (f"({address}) cannot use {error.filename or words['log']}: {error.strerror}; the run folder must be on "
                "a disk that all workers share")
    except Exception as error:
        traceback.print_exc()
        return f"could not import {words['evaluate']}: {error}"
    return ""


def evaluate(token: str, address: str, text: str) -> str:
    """The results of one message, JSON to JSON."""
    if _this.served != (token, address) or _this.evaluate is None:
        raise RuntimeError("this process was not set up for the message, which dask has sent twice")
    return worker.answer(_this.evaluate, text)


def release(token: str) -> None:
    """The coordinator leaves: this process prints to where it did before."""
    if _this.served[0] == token and _this.output is not None:
        out, err, sys.stdout, sys.stderr = _this.output
        for saved, number in ((out, 1), (err, 2)):
            os.dup2(saved, number)
            os.close(saved)
        _this.output, _this.served = None, ("", "")


def kill(dask_worker: Any) -> None:
    """In a nanny: end its worker, whatever that does."""
    os.kill(dask_worker.pid, signal.SIGKILL)


def _ignore_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        worker.ignore_signals()


def _environment(crowd: int, share: int) -> dict[str, str]:
    """What `devices.environment` gives a worker that somebody else has started; refused where it can have no GPU.

    crowd: workers that may run on the same cores. GPUs that a launcher has not bound are shared out by locks.
    """
    gpus = devices.visible_gpus(os.environ)
    if gpus and not devices.bound(os.environ):
        gpus = _claim(gpus, share)
    threads = max(1, len(os.sched_getaffinity(0)) // crowd)
    return devices.environment(0, 1, os.environ, threads, gpus, share)


def _claim(gpus: list[str], count: int) -> list[str]:
    """The first GPUs that no other worker of this machine holds; held until this process ends."""
    mine = [gpu for gpu in gpus if gpu in _this.claims]
    for gpu in gpus:
        if len(mine) < count and gpu not in mine:
            path = Path(tempfile.gettempdir(), f"tomoatlas-{os.getuid()}-gpu-{gpu.replace('/', '-')}")
            lock = open(path, "a")  # noqa: SIM115  # as long as the process lives
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            _this.claims[gpu] = lock
            mine.append(gpu)
    if len(mine) < count:
        each = "GPU" if count == 1 else f"{count} GPUs (solver.devices)"
        raise _Refused(f"finds the GPUs {', '.join(gpus)} taken by other workers of its machine: start one dask worker "
                       f"for every {each}")
    return mine


def _adopt(env: dict[str, str]) -> None:
    """Make `env` this process's environment before JAX is imported; refused where it is too late for that."""
    if env != dict(os.environ) and "jax" in sys.modules:
        names = sorted(name for name in env.keys() | os.environ.keys() if env.get(name) != os.environ.get(name))
        raise _Refused(f"has imported JAX before it could be given {', '.join(names)}: restart the dask workers (in "
                       "Python: Client.restart()), without preloads that import jax")
    os.environ.clear()
    os.environ.update(env)
    from threadpoolctl import threadpool_limits

    # Dask has imported numpy, and its BLAS has read its number of threads, before this was known.
    threadpool_limits(int(env["OPENBLAS_NUM_THREADS"]))


def _redirect(log: Path) -> None:
    """From now on this process prints to its log."""
    if _this.output is None:
        _this.output = (os.dup(1), os.dup(2), sys.stdout, sys.stderr)
    logs.share(log, "")
