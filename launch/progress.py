"""What a user sees while a sweep runs: a bar on a terminal, one plain line per result in a log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TextIO

from sweeps.coordinator import Observer, Summary
from sweeps.grid import Cell
from sweeps.tables import shown


def line(result: dict[str, Any], cell: Cell, best: float | None) -> str:
    """One result in words: "haadf_tilts=9,chem_tilts=5 trial 4 nrmse 0.352 best 0.331 8.1 s"."""
    seconds = f"{result.get('seconds') or 0.0:.1f} s"
    head = f"{cell.id} trial {result['trial']}"
    if result["status"] != "ok":
        return f"{head} failed after {seconds}: {result['status']}"
    return f"{head} {cell.sweep.search.objective} {shown(result['objective'])} best {shown(best)} {seconds}"


class Lines(Observer):
    """Plain lines, each flushed: what a log file, a pipe or an MPI launcher wants."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._done, self._total = stream, 0, 0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def started(self, total: int, done: int) -> None:
        self._done, self._total = done, total
        if done:
            self._say(f"continuing: {done} of {total} trials are finished")

    def result(self, result: dict[str, Any], cell: Cell, best: float | None) -> None:
        self._done += 1
        self._say(f"{self._done}/{self._total} {line(result, cell, best)}")

    def lost(self, cell: Cell, trial: int, attempt: int, worker: str, reason: str) -> None:
        self._say(f"{cell.id} trial {trial} attempt {attempt} is lost: {reason}")

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Bar(Observer):
    """A bar with the time that remains; failures and losses are lines above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.description}"),
            console=Console(file=stream, highlight=False),
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, total: int, done: int) -> None:
        # What earlier runs have finished says nothing about the speed of this one: `reset` forgets it.
        self._bar.reset(self._task, total=total, completed=done)

    def result(self, result: dict[str, Any], cell: Cell, best: float | None) -> None:
        if result["status"] != "ok":
            self._bar.console.print(line(result, cell, best), markup=False, soft_wrap=True)
        words = f"{cell.id}: {shown(result['objective'])}, best {shown(best)}"
        self._bar.update(self._task, advance=1, description=words.replace("[", r"\["))

    def lost(self, cell: Cell, trial: int, attempt: int, worker: str, reason: str) -> None:
        self._bar.console.print(
            f"{cell.id} trial {trial} attempt {attempt} is lost: {reason}", markup=False, soft_wrap=True
        )

    def finished(self, summary: Summary) -> None:
        self._bar.update(self._task, description="")


def observer(stream: TextIO | None = None) -> Bar | Lines:
    """A bar if the stream (default: standard output) is a terminal, else plain lines."""
    stream = sys.stdout if stream is None else stream
    return Bar(stream) if stream.isatty() else Lines(stream)


@contextlib.contextmanager
def share(stream: TextIO) -> Iterator[Callable[[float, str], None]]:
    """Something to tell the share of a work that is done, and what it is at: a bar on a terminal, else a line for each
    new thing it is at."""
    if not stream.isatty():
        said = set[str]()

        def line(done: float, words: str) -> None:
            if words not in said:
                said.add(words)
                print(f"{100 * done:3.0f} % {words}", file=stream, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=stream, highlight=False)) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda done, words: bar.update(task, completed=done, description=words.replace("[", r"\["))
