"""Who proposes trials: a replica of the searches, fed with the events of the journal that they depend on.

A proposal is a function of the history, so a replica in another process makes the one that the coordinator would
make: `launch.advisers` has replicas in side processes, so that no free worker waits while a model is fitted for
another. `Inline` is one in the coordinator's own process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sweeps.grid import Cell
from sweeps.journal import History
from sweeps.optimizer import SpaceExhausted
from sweeps.search import CellSearch, SharedSearch, searches

Event = dict[str, Any]
Proposals = list[dict[str, Any]]


@dataclass(frozen=True)
class Advice:
    """Proposals for a cell, in the order of their numbers.

    exhausted: no point of a finite space is left. seconds: of a processor, that they took.
    lost: the process ended before it could answer (a sentence); ask again.
    """

    cell: str
    proposals: Proposals
    exhausted: bool = False
    seconds: float = 0.0
    lost: str | None = None


class Advisers(Protocol):
    """Who proposes. Used in a `with` block, which they do not outlive."""

    def start(self, history: History, folder: Path) -> None:
        """Learn what has happened so far; logs go to `folder`/logs."""

    def tell(self, event: Event) -> None:
        """An ask or a result that was written down: it counts for every later `ask`."""

    def ask(self, cell: str, proposed: Proposals, count: int) -> None:
        """Propose `count` trials of a cell after those `proposed` but not asked; one request per cell at a time."""

    def poll(self) -> list[Advice]:
        """What has been proposed since; never waits."""

    def __enter__(self) -> Advisers: ...

    def __exit__(self, *_: object) -> None: ...


class Replica:
    """The searches of a sweep, or of some of its cells, as far as they depend on events."""

    def __init__(self, cells: Sequence[Cell], batches: Mapping[str, int] | None = None) -> None:
        self.history = History()
        self.searches = searches(cells, self.history, batches)

    def tell(self, event: Event) -> None:
        """Take an event of `news` or of the journal into account."""
        self.history.apply(event)

    def propose(self, cell: str, proposed: Proposals, count: int) -> Advice:
        """`count` proposals after those that are `proposed` but not asked; each counts as running for the next."""
        started, search = time.process_time(), self.searches[cell]
        search.proposed = {proposal["trial"]: proposal for proposal in proposed}
        made: Proposals = []
        with contextlib.suppress(SpaceExhausted):
            while len(made) < count:
                made.append(search.propose(search.following))
                search.proposed[search.following] = made[-1]
        search.proposed = {}
        return Advice(cell, made, len(made) < count, time.process_time() - started)


class Inline:
    """Proposes at once, in the coordinator's own process."""

    def __init__(self, cells: Sequence[Cell], batches: Mapping[str, int] | None = None) -> None:
        self._replica, self._made = Replica(cells, batches), list[Advice]()

    def start(self, history: History, folder: Path) -> None:
        """Learn what has happened so far."""
        for name in self._replica.searches:
            for event in past(history, name):
                self._replica.tell(event)

    def tell(self, event: Event) -> None:
        """An ask or a result that was written down."""
        self._replica.tell(event)

    def ask(self, cell: str, proposed: Proposals, count: int) -> None:
        """Propose trials, at once."""
        self._made.append(self._replica.propose(cell, proposed, count))

    def poll(self) -> list[Advice]:
        """What has been proposed since."""
        made, self._made = self._made, []
        return made

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def news(event: Event) -> Event | None:
    """What searches depend on in an event of the journal; None where it is nothing."""
    place = {key: event.get(key) for key in ("event", "cell", "trial", "attempt")}
    if event["event"] == "ask":
        return place | {key: event[key] for key in ("kind", "fidelity", "params") if key in event}
    if event["event"] == "result":
        return place | {key: event[key] for key in ("status", "objective")}
    return None


def past(history: History, cell: str) -> Iterator[Event]:
    """Events that bring a replica to where the history of a cell is."""
    known = history.cell(cell)
    events = [known.rows[trial].ask for trial in sorted(known.rows)]
    events += [result for trial in known.finished if (result := known.rows[trial].result) is not None]
    yield from (found for event in events if (found := news(event)))


def subscriptions(search: CellSearch) -> list[str]:
    """The cells whose events the proposals of a cell depend on."""
    return [near.cell.id for near in search.near] if isinstance(search, SharedSearch) else [search.cell.id]
