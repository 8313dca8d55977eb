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

from launch import logs
from sweeps.journal import plain

Evaluate = Callable[[dict[str, Any]], list[dict[str, Any]]]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def load(name: str) -> Evaluate:
    """The function called "module:function"."""
    module, _, function = name.partition(":")
    evaluate: Evaluate = getattr(import_module(module), function)
    return evaluate


def answer(evaluate: Evaluate, text: str) -> str:
    """The results of one message, one for each of its trials, JSON to JSON."""
    try:
        return json.dumps(_results(evaluate, json.loads(text)))
    finally:
        sys.stdout.flush()


def _results(evaluate: Evaluate, message: dict[str, Any]) -> list[dict[str, Any]]:
    """One result per trial, in their order.

    An evaluation that raises is a result with a status; in a batch, whose fault it is shows when each trial is
    evaluated alone. A full disk fails no trial, it is `fatal` to the run.
    """
    started, trials = time.perf_counter(), message["trials"]
    logs.about(message)
    try:
        results = evaluate(message)
        if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
            raise TypeError(f"the evaluation returned {type(results).__name__}, not a list of results")
        if len(results) != len(trials):
            raise ValueError(f"the evaluation returned {len(results)} results for {len(trials)} trials")
        answers: list[dict[str, Any]] = plain(results)
        json.dumps(answers, allow_nan=False)
        return answers
    except Exception as error:
        traceback.print_exc()
        full = isinstance(error, OSError) and error.errno in FULL
        if len(trials) > 1 and not full:
            return [result for trial in trials for result in _results(evaluate, {**message, "trials": [trial]})]
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno}; see the log)"
        failed = {"status": " ".join(words.split()), "seconds": time.perf_counter() - started}
        if isinstance(error, OSError) and full:
            failed["fatal"] = f"{error.filename or 'the disk'}: {error.strerror}"
        return [failed for _ in trials]


def ignore_signals() -> None:
    """Launchers signal every process; the coordinator decides for all what follows."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def serve(evaluate: str) -> None:
    """A line of JSON in, a line of JSON out; end of either pipe means to leave at once, whatever is running."""
    ignore_signals()
    inbox: queue.SimpleQueue[str] = queue.SimpleQueue()
    # What the evaluation prints must not get among the results: file descriptor 1 becomes the log.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logs.label()

    def listen() -> None:
        for line in sys.stdin:
            inbox.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    function = load(evaluate)
    reply = "ready"
    while True:
        try:
            print(reply, file=channel, flush=True)
        except BrokenPipeError:  # the coordinator has gone: nothing to put into a log
            os._exit(0)
        reply = answer(function, inbox.get())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A local worker of tomoatlas: JSON lines in and out.")
    parser.add_argument("--evaluate", required=True, help="module:function")
    serve(parser.parse_args().evaluate)
