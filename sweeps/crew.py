"""What the coordinator expects of workers; `launch.workers` has them. Light, so that a worker starts quickly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Event:
    """What a worker reports: the results of its trials, in their order, or (`lost`, a sentence) that it is gone."""

    worker: str
    results: list[dict[str, Any]] | None = None
    lost: str | None = None


class Workers(Protocol):
    """Processes that answer messages (lists of trials) with results, one message at a time each; local, MPI, ...

    Used in a `with` block, which they do not outlive.
    """

    def start(self, folder: Path) -> None:
        """Bring the workers up; their logs go to `folder`/logs."""

    def names(self) -> list[str]:
        """Workers that live or are being brought up; when there are none, nothing more will come."""

    def idle(self) -> list[str]:
        """Workers that can take a message now."""

    def submit(self, worker: str, message: dict[str, Any]) -> None:
        """Hand trials to an idle worker. A worker that dies of it is reported by `poll`."""

    def kill(self, worker: str) -> None:
        """Give up a worker in the middle of a message; `poll` reports it as lost. It may be replaced or come back."""

    def poll(self, timeout: float) -> list[Event]:
        """What has happened; waits at most `timeout` seconds for the first event."""

    def close(self) -> None:
        """No more trials will come; those still running are not waited for."""

    def __enter__(self) -> Workers: ...

    def __exit__(self, *_: object) -> None: ...
