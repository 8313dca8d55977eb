"""A child process that speaks lines of JSON over its pipes; what it prints otherwise goes to a log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO

PATIENCE = 5.0  # [s] for a process that was told to leave, before it is killed


def module(name: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command of a module of ours, and the variables that let it import what this process imports."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return [sys.executable, "-P", "-m", name, *arguments], {"PYTHONPATH": path}


class Child:
    """One process: its pipes and its log."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log: Path) -> None:
        self.name, self.command, self.env, self.log = name, command, env, log
        self.unread = b""
        with open(log, "ab") as stderr:
            # A session of its own: Ctrl-C on the terminal is for the coordinator, which lets trials finish.
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=stderr, start_new_session=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input: IO[bytes] = self.process.stdin
        self.output: IO[bytes] = self.process.stdout

    def lines(self) -> tuple[list[bytes], bool]:
        """Whole lines that have arrived, and whether the child has closed its end."""
        chunk = os.read(self.output.fileno(), 1 << 20)
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        return lines, not chunk

    def say(self, text: str) -> None:
        """Send one line."""
        with contextlib.suppress(BrokenPipeError):  # a dead child's output ends, too, and that is reported
            self.input.write(text.encode() + b"\n")
            self.input.flush()

    def part(self) -> None:
        """Close both pipes; a child that lives takes it for the word to leave."""
        with contextlib.suppress(BrokenPipeError):
            self.input.close()
        self.output.close()

    def obituary(self) -> str:
        """A sentence on how the process ended."""
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        lines = self.log.read_text(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{self.name} {how}" + (f"; the last line of {self.log} is: {last}" if last else "")


def end(children: Iterable[Child]) -> None:
    """Wait for children that have been parted from, and kill those that stay."""
    for child in children:
        try:
            child.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
