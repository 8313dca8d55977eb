"""What ends a sweep early: nothing is started that cannot end, nothing is lost, and what was spent is known."""

import signal
import time

import pytest

from launch import session, status
from sweeps import grid
from sweeps.coordinator import GRACE
from sweeps.journal import RunError
from sweeps.limits import MARGIN, SLACK, Ledger, job_end
from tests.coordinate import coordinate, sweep
from tests.test_coordinator import assert_whole, events


def one(trials=6, **search):
    """A sweep of one cell."""
    return sweep(trials, axes={}, search=search)


def test_a_job_that_ends_soon_starts_no_trial_that_cannot_end(tmp_path):
    """Trials of 0.3 s and about five seconds of time; the next job does the rest, and none was lost."""
    ends = time.time() + MARGIN + 5.0
    summary = coordinate(tmp_path / "r", one(60), "timed", until=ends)
    assert time.time() < ends
    assert 0 < summary.done < 60 and summary.limit and not summary.spent
    assert "the job's time" in summary.stopped and summary.stopped.endswith("run again to continue")
    assert not events(tmp_path / "r", "lost")
    assert len(events(tmp_path / "r", "ask")) == summary.done
    assert session.ending(summary, 0) == session.AGAIN
    assert coordinate(tmp_path / "r", one(60)).stopped is None
    assert_whole(tmp_path / "r", one(60))


def test_a_job_without_time_starts_nothing(tmp_path):
    summary = coordinate(tmp_path / "r", one(3), "timed", until=time.time() + MARGIN - 1)
    assert summary.done == 0 and summary.limit == "the job's time is over"
    assert coordinate(tmp_path / "r", one(3)).done == 3


def test_a_budget_ends_the_sweep_and_a_larger_one_continues_it(tmp_path):
    hours = 4 * 0.3 / 3600
    summary = coordinate(tmp_path / "r", one(20, budget_hours=0.9 * hours), "timed")
    assert 4 <= summary.done <= 5  # what two workers have begun may end
    assert summary.spent and "raise search.budget_hours to continue" in summary.stopped
    assert session.ending(summary, 0) == 0
    again = coordinate(tmp_path / "r", one(20, budget_hours=0.9 * hours), "timed")
    assert again.done == summary.done
    assert coordinate(tmp_path / "r", one(20, budget_hours=1.0), "timed").stopped is None
    seen = status.look(tmp_path / "r")
    assert seen["device_hours"] == pytest.approx(20 * 0.3 / 3600, abs=1e-4) and seen["budget_hours"] == 1
    assert "of 1 device hours spent" in status.text(seen)


def test_a_trial_that_takes_too_long_is_a_failed_row(tmp_path):
    """All but the first last a minute and have half a second each; workers are replaced."""
    started = time.monotonic()
    summary = coordinate(tmp_path / "r", one(4, trial_timeout=0.5), "stuck")
    assert time.monotonic() - started < 60 and (summary.done, summary.failed) == (4, 3)
    rows = {event["trial"]: event for event in events(tmp_path / "r", "result")}
    assert rows[0]["status"] == "ok"
    assert {rows[k]["status"] for k in (1, 2, 3)} == {"took longer than search.trial_timeout (0.5 s)"}
    assert [rows[k]["seconds"] for k in (1, 2, 3)] == [0.5] * 3
    assert len(events(tmp_path / "r", "ask")) == 4


def test_a_batch_that_takes_too_long_goes_out_again_until_each_trial_is_alone(tmp_path):
    summary = coordinate(tmp_path / "r", one(3, trial_timeout=0.3, batch=3, in_flight=1), "stuck", count=1)
    assert (summary.done, summary.failed) == (3, 2)
    rows = {event["trial"]: event["status"] for event in events(tmp_path / "r", "result")}
    assert rows[0] == "ok" and all("trial_timeout" in rows[k] for k in (1, 2))


def test_the_ledger_counts_devices_and_knows_the_longest_message():
    (cell,) = grid.cells(sweep(3, axes={}, devices=2))
    other, = grid.cells(sweep(3, axes={"chem_tilts": [3]}))
    ledger = Ledger(until=time.time() + MARGIN + 100)
    assert ledger.refusal(cell) is None  # nothing is known
    ledger.add(cell, {"seconds": 20.0, "batch": 3, "status": "ok"})
    assert ledger.hours == pytest.approx(2 * 20 / 3600) and ledger.longest == {cell.id: 60.0}
    assert ledger.refusal(cell) is None and ledger.refusal(other) is None
    ledger.add(cell, {"seconds": 1000.0, "batch": 1, "status": "failed"})  # tells nothing of trials that end
    assert ledger.refusal(cell) is None
    ledger.add(cell, {"seconds": 101 / SLACK, "batch": 1, "status": "ok"})
    assert "a trial takes up to" in ledger.refusal(cell) and ledger.refusal(other) == ledger.refusal(cell)
    ledger.longest[other.id] = 1.0
    assert ledger.refusal(other) is None


def test_the_end_of_the_job_is_read_from_the_environment():
    assert job_end({}) is None
    assert job_end({"SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    assert job_end({"SLURM_JOB_END_TIME": "1700000000", "TOMOATLAS_END": "5"}) == 5
    with pytest.raises(RunError, match="TOMOATLAS_END is 'noon', not a time in seconds"):
        job_end({"TOMOATLAS_END": "noon"})


@pytest.mark.parametrize(("number", "until", "seconds"), [
    (signal.SIGTERM, 1000.0, GRACE), (signal.SIGUSR1, None, GRACE), (signal.SIGUSR1, 1000.0, 1000 - MARGIN),
    (signal.SIGUSR1, 5.0, GRACE)])
def test_a_notice_of_the_end_leaves_trials_the_time_there_is(monkeypatch, number, until, seconds):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    stop = session.Stop(until)
    stop.hear(number, None)
    assert stop.grace() == seconds and stop() == 1
