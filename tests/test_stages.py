"""Stages of a cell: made once whoever asks, shared among workers, made again where a worker died or tore a file."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from sweeps import stages
from sweeps.settings import load
from tests.coordinate import coordinate
from tests.test_coordinator import events

INPUTS = [{"tilt": k} for k in range(8)]
HOLDER = """
import sys, time
from pathlib import Path
from sweeps import stages
def make(k):
    if k == 2:
        print("holding", flush=True)
        time.sleep(600)
    return {"made": k}
stages.together(Path(sys.argv[1]), "tilt", [{"tilt": k} for k in range(8)], make)
"""


def test_workers_share_stages_and_each_gets_all(tmp_path):
    made, found, meet = [], {}, threading.Barrier(2)

    def work(name):
        def make(k):
            made.append((name, k))
            if k < 2:
                meet.wait(30)  # each has begun one before either has finished
            time.sleep(0.01)
            return {"made": np.array(k)}

        found[name] = [int(each["made"]) for each in stages.together(tmp_path, "tilt", INPUTS, make)]

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {"a": list(range(8)), "b": list(range(8))}
    assert sorted(k for _, k in made) == list(range(8)) and {name for name, _ in made} == {"a", "b"}
    assert not list((tmp_path / "stages").glob("*.lock")) and len(list((tmp_path / "stages").iterdir())) == 8


def test_what_a_killed_worker_was_making_is_made_by_the_other(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"holding\n"
        threading.Timer(0.5, os.kill, (holder.pid, signal.SIGKILL)).start()
        made = []
        stages.together(tmp_path, "tilt", INPUTS, lambda k: made.append(k) or {"made": np.array(k)})
    assert made == [3, 4, 5, 6, 7, 2]  # 0 and 1 stood; what was being made came last


def test_a_stage_that_fails_leaves_no_lock_and_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError):
        stages.stage(tmp_path, "one", {"k": 1}, lambda: {"made": np.array(1 / 0)})
    assert not list((tmp_path / "stages").iterdir())
    assert stages.stage(tmp_path, "one", {"k": 1}, lambda: {"made": np.array(3)})["made"] == 3


@pytest.mark.parametrize("trials", [1, 3])
def test_workers_without_a_trial_help_with_those_of_others(trials, tmp_path):
    """One cell of one trial, then of three that follow one another: both workers make its stages, once each."""
    space = {"strength": {"low": 0.1, "high": 2.0}} if trials > 1 else {}
    sweep = load({"name": "shared", "system": "mspt", "data": {"phantom": "cuau"},
                  "solver": {"denoise": "nlm", **space} if space else {},
                  "search": {"trials": trials, "initial": min(2, trials), "in_flight": 1}})
    summary = coordinate(tmp_path / "r", sweep, "shared")
    assert summary.failed == 0 and summary.done == trials
    results, helps = events(tmp_path / "r", "result"), events(tmp_path / "r", "help")
    shares = [result["metrics"]["share"] for result in results]
    assert all(0 < share < 8 for share in shares)
    assert len(helps) >= trials - 1  # the last one may come when the run is over
    assert all(help["worker"] != results[help["trial"]]["worker"] for help in helps)
    assert len(list((tmp_path / "r" / "stages").glob("tilt-*.npz"))) == 8 * trials
    again = coordinate(tmp_path / "r", sweep, "shared")
    assert again.done == trials and len(events(tmp_path / "r", "help")) == len(helps)
