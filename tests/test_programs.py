"""Workers of a machine compile each program once."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from engine import programs
from launch import devices
from tests.test_trial import message

ROOT = Path(__file__).resolve().parent.parent
WORKER = """if True:
    import collections, json, sys
    import jax.monitoring
    from sweeps import trial
    seen = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.rpartition("/")[2]]))
    rows = trial.run(json.loads(sys.argv[1]))
    print(json.dumps([rows[0]["status"], rows[0]["objective"], seen]))"""


def workers(count, cache, folder):
    """What so many new workers that start together say: status, objective, JAX's events."""
    # What other tests of this process have set would stand.
    given = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env = devices.environment(0, count, {**given, "XDG_CACHE_HOME": str(cache), "TMPDIR": str(folder.parent)})
    crew = [subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(message(folder, number=k))], env=env, cwd=ROOT,
                             stdout=subprocess.PIPE, text=True) for k in range(count)]
    return [json.loads(worker.communicate(timeout=300)[0]) for worker in crew]


@pytest.mark.slow
def test_of_workers_that_start_together_one_compiles_each_program_and_later_ones_none(tmp_path):
    cache = tmp_path / "cache"
    told = workers(3, cache, tmp_path / "run")
    assert {status for status, _, _ in told} == {"ok"} and len({objective for _, objective, _ in told}) == 1
    seen = Counter()
    for _, _, events in told:
        seen.update(events)
    kept = len(list(cache.rglob("jax/*-cache")))
    assert kept > 5 and seen["cache_misses"] == kept
    assert seen["cache_hits"] + seen["cache_misses"] == seen["compile_requests_use_cache"] > 2 * kept
    (later,) = workers(1, cache, tmp_path / "later")
    assert "cache_misses" not in later[2] and later[2]["cache_hits"] > 5


HOLDER = """if True:
    import sys, time
    from engine import programs
    programs.about(sys.argv[1])
    programs._waited(programs._ASKED)
    print("held", flush=True)
    time.sleep(60)"""


def test_a_dead_or_a_slow_compiler_stops_nobody_and_another_shape_waits_for_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shape = f"a shape of {tmp_path}"
    with subprocess.Popen([sys.executable, "-c", HOLDER, shape], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        programs.about("another " + shape)
        assert seconds() < 5
        programs.about(shape)
        monkeypatch.setattr(programs, "PATIENCE", 0.5)
        assert seconds() >= 0.5
        monkeypatch.setattr(programs, "PATIENCE", 60.0)
        other.send_signal(signal.SIGKILL)
        assert seconds() < 30
    programs.about("")


def seconds():
    """How long a compilation has to wait."""
    started = time.monotonic()
    programs._waited(programs._ASKED)
    waited = time.monotonic() - started
    assert programs._lock is not None
    programs._released(programs._COMPILED, 1.0)
    assert programs._lock is None
    return waited
