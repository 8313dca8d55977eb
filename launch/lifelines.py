"""A connection from every rank to rank 0 on which nothing is said: the system closes it when either process dies.

So a death is known at once, under any launcher and on any node. MPI tells of deaths only where it is fault-tolerant,
and a heart's silence also means a node that is gone or a process that is stopped: it has to be waited for. Where no
connection can be made (a wall between nodes, too many files) hearts are all there is.
"""

from __future__ import annotations

import contextlib
import resource
import secrets
import selectors
import socket
from typing import Any

SPARE = 256  # files that rank 0 opens besides
PATIENCE = 20.0  # [s] for a connection to rank 0


class Lifelines:
    """Rank 0's ends."""

    def __init__(self, ranks: int) -> None:
        """ranks: how many connections there will be."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < ranks + SPARE:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(ranks + SPARE, hard), hard))
        self._secret = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()
        self._door = socket.create_server(("", 0), backlog=4096)
        self._door.setblocking(False)
        self._selector.register(self._door, selectors.EVENT_READ)

    @property
    def address(self) -> list[Any]:
        """What `hold` needs, as JSON has it."""
        return [socket.gethostname(), self._door.getsockname()[1], self._secret]

    def cut(self) -> list[int]:
        """Ranks whose connection has closed since the last call."""
        found = []
        for key, _ in self._selector.select(0):
            if key.fileobj is self._door:
                self._admit()
                continue
            line, said = key.fileobj, key.data
            assert isinstance(line, socket.socket)
            data = _read(line)
            said += (data or b"")[:100]
            if data == b"":
                self._selector.unregister(line)
                line.close()
                secret, _, rank = said.decode(errors="replace").strip().partition(" ")
                if secret == self._secret and rank.isdecimal():
                    found.append(int(rank))
        return found

    def close(self) -> None:
        """Let all ranks go: they take it for the end of this process."""
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _admit(self) -> None:
        while True:
            try:
                line, _ = self._door.accept()
            except BlockingIOError:
                return
            except OSError:  # no file is left
                self._selector.unregister(self._door)
                return
            line.setblocking(False)
            self._selector.register(line, selectors.EVENT_READ, bytearray())


def hold(address: list[Any], rank: int) -> socket.socket | None:
    """A rank's end; None where rank 0 cannot be reached."""
    host, port, secret = address
    with contextlib.suppress(OSError):
        line = socket.create_connection(("127.0.0.1" if host == socket.gethostname() else host, port), PATIENCE)
        line.sendall(f"{secret} {rank}\n".encode())
        line.setblocking(False)
        return line
    return None


def is_cut(line: socket.socket | None) -> bool:
    """Whether rank 0 is gone."""
    return line is not None and _read(line) == b""


def _read(line: socket.socket) -> bytes | None:
    """What has arrived; b"" at the end of the connection, None where nothing has."""
    try:
        return line.recv(4096)
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:
        return b""
