"""A worker's side: import the evaluation, answer JSON with JSON. `python -m launch.worker` is a local one."""

from __future__ import annotations

import argparse
import errno
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from sweeps.journal import plain

Evaluate = Callable[[dict[str, Any]], dict[str, Any]]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def load(name: str) -> Evaluate:
    """The function called "module:function"."""
    module, _, function = name.partition(":")
    evaluate: Evaluate = getattr(import_module(module), function)
    return evaluate


def answer(evaluate: Evaluate, text: str) -> str:
    """The result of one message, JSON to JSON.

    An evaluation that raises is a result with a status; a full disk fails no trial, it is `fatal` to the run.
    """
    started = time.perf_counter()
    try:
        result = evaluate(json.loads(text))
        if not isinstance(result, dict):
            raise TypeError(f"the evaluation returned {type(result).__name__}, not a result")
        return json.dumps(plain(result), allow_nan=False)
    except Exception as error:
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno}; see the log)"
        failed = {"status": " ".join(words.split()), "seconds": time.perf_counter() - started}
        if isinstance(error, OSError) and error.errno in FULL:
            failed["fatal"] = f"{error.filename or 'the disk'}: {error.strerror}"
        return json.dumps(failed)
    finally:
        sys.stdout.flush()


def ignore_signals() -> None:
    """Launchers signal every process; the coordinator decides for all what follows."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def serve(evaluate: str) -> None:
    """A line of JSON in, a line of JSON out; end of input means to leave at once, whatever is running."""
    ignore_signals()
    inbox: queue.SimpleQueue[str] = queue.SimpleQueue()
    # What the evaluation prints must not get among the results: file descriptor 1 becomes the log.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def listen() -> None:
        for line in sys.stdin:
            inbox.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    function = load(evaluate)
    reply = "ready"
    while True:
        print(reply, file=channel, flush=True)
        reply = answer(function, inbox.get())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A local worker of tomoatlas: JSON lines in and out.")
    parser.add_argument("--evaluate", required=True, help="module:function")
    serve(parser.parse_args().evaluate)
