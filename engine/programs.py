"""Workers of a machine compile each program once: the others wait until JAX's cache on the disk has it.

All workers meet a new shape at the same time, and without this each compiles the same programs. JAX tells when it is
about to look into its cache and when it has the program; a file is locked in between. JAX is free to stop telling:
then nothing is locked, and everything works as it did.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import jax.monitoring

PATIENCE = 600.0  # [s] for another's compilation, which may hang
_ASKED, _COMPILED = "/jax/compilation_cache/compile_requests_use_cache", "/jax/core/compile/backend_compile_duration"
_shape = ""
_lock: int | None = None


def about(shape: str) -> None:
    """Programs for other shapes than this one do not wait for each other."""
    global _shape
    _shape = shape


@cache
def share() -> None:
    """From now on this process compiles nothing that another one of its user compiles for the same shape."""
    jax.monitoring.register_event_listener(_waited)
    jax.monitoring.register_event_duration_secs_listener(_released)


def _place() -> Path:
    """The file that is locked: on a disk of this machine, where a lock is quick and always works."""
    name = f"{os.environ.get('JAX_COMPILATION_CACHE_DIR')} {_shape}"
    return Path(tempfile.gettempdir(), f"tomoatlas-{os.getuid()}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock")


def _waited(event: str, **_: Any) -> None:
    global _lock
    if event != _ASKED or _lock is not None:
        return
    try:
        _lock = os.open(_place(), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    deadline, pause = time.monotonic() + PATIENCE, 0.005
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(pause)
            pause = min(2 * pause, 0.2)


def _released(event: str, duration_secs: float, **_: Any) -> None:
    global _lock
    if event == _COMPILED and _lock is not None:
        os.close(_lock)
        _lock = None
