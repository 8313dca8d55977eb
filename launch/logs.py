"""What workers print: whole lines, each behind the trials that it is about, so that many can share one file.

    worker-3 haadf_tilts=9,chem_tilts=5-12 | Traceback (most recent call last):

`grep -h 'chem_tilts=5-12 ' logs/*` finds all lines about trial 12 of that cell. Libraries that write to the terminal
from C stay as they are, between these lines.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_about = ""


class Labelled(io.TextIOBase):
    """A text stream that writes whole lines to a file descriptor, with one call each: they never mix."""

    def __init__(self, file: int, worker: str) -> None:
        self._file, self._worker, self._rest = file, worker, ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        head = " ".join(filter(None, (self._worker, _about)))
        for line in lines:
            data = (f"{head} | {line}\n" if head and line else f"{line}\n").encode(errors="replace")
            while data:
                data = data[os.write(self._file, data):]
        return len(text)

    def close(self) -> None:
        """Write what has no line end yet; the file stays open."""
        if self._rest and not self.closed:
            self.write("\n")
        super().close()


def about(message: Mapping[str, Any]) -> None:
    """From now on lines are about the trials of this message."""
    global _about
    _about = " ".join(f"{message['cell']}-{trial['trial']}" for trial in message["trials"])


def label(worker: str = "") -> None:
    """What Python prints goes to the file descriptors 1 and 2 in labelled lines."""
    sys.stdout, sys.stderr = Labelled(1, worker), Labelled(2, worker)


def share(path: Path, worker: str) -> None:
    """Everything that this process prints goes to the end of a file that it shares with other workers."""
    # Appending, the system keeps the writes of the processes of one machine apart.
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    label(worker)
