"""Proposals from side processes are those of the journal, whoever makes them, and nobody waits for them in vain."""

import os
import signal
import time
from collections import Counter

import pytest

from launch import advisers
from launch.advisers import SideAdvisers
from sweeps import dispatch, grid, journal
from sweeps.advice import Advice, Inline, Replica, news, past
from sweeps.coordinator import Observer
from sweeps.journal import History, RunError
from tests.coordinate import coordinate, sweep
from tests.test_coordinator import assert_whole, events, figures

SEARCHES = {"alone": {}, "shared": {"strategy": "shared"}, "batches": {"batch": 2}}


def beside(folder, chosen, count=2, observer=None, workers=2, evaluate="landscape"):
    """A run whose proposals come from side processes."""
    with SideAdvisers(count, chosen, grid.cells(chosen)) as aside:
        return coordinate(folder, chosen, evaluate, workers, observer, advisers=aside), aside


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("order", ["free", "strict"])
def test_side_processes_propose_what_the_journal_says(search, order, tmp_path):
    chosen = sweep(6, order, search=SEARCHES[search])
    summary, _ = beside(tmp_path / "r", chosen)
    assert (summary.done, summary.failed, summary.stopped) == (summary.total, 0, None)
    assert_whole(tmp_path / "r", chosen)
    if order == "strict":
        coordinate(tmp_path / "one", chosen, count=1)
        assert figures(tmp_path / "r") == figures(tmp_path / "one")


def test_a_continued_run_tells_them_what_has_happened(tmp_path):
    chosen, ends = sweep(6, "strict"), []

    class Count(Observer):
        def result(self, *_):
            ends.append(1)

    for limit in (7, 99):
        with SideAdvisers(2, chosen, grid.cells(chosen)) as aside:
            coordinate(tmp_path / "r", chosen, observer=Count(), advisers=aside,
                       stop=lambda limit=limit: int(len(ends) >= limit))
    coordinate(tmp_path / "calm", chosen)
    assert figures(tmp_path / "r") == figures(tmp_path / "calm")


def test_a_side_process_that_is_killed_is_replaced_and_its_proposals_are_made_again(tmp_path):
    chosen, kills = sweep(10, "strict", axes={"chem_tilts": [3, 5]}), []

    class Strike(Observer):
        def result(self, *_):
            if len(kills) < 5:
                side = aside._sides[len(kills) % 2]
                kills.append(side.process.pid)
                os.kill(side.process.pid, signal.SIGKILL)

    with SideAdvisers(2, chosen, grid.cells(chosen)) as aside:
        coordinate(tmp_path / "r", chosen, observer=Strike(), advisers=aside)
    assert len(kills) == 5
    assert_whole(tmp_path / "r", chosen)
    coordinate(tmp_path / "calm", chosen)
    assert figures(tmp_path / "r") == figures(tmp_path / "calm")


def until(met, seconds=60.0):
    """What a condition gave when it was met."""
    deadline = time.monotonic() + seconds
    while not (given := met()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return given


def test_one_that_always_dies_and_one_that_fails_end_the_run_with_a_sentence(tmp_path, monkeypatch):
    chosen = sweep(6, axes={})
    with SideAdvisers(1, chosen, grid.cells(chosen)) as aside:
        aside.start(History(), tmp_path)
        aside.tell({"event": "result", "cell": "all", "trial": 7})  # a result of a trial that nobody asked for
        aside.ask("all", [], 1)
        with pytest.raises(RunError, match=r"no trial could be proposed for the cell all \(KeyError: 7; see .*log\)"):
            until(aside.poll)
    monkeypatch.setattr(advisers, "module", lambda _: (["/bin/false"], {}))
    with SideAdvisers(1, chosen, grid.cells(chosen)) as aside:
        aside.start(History(), tmp_path)
        aside.ask("all", [], 1)
        with pytest.raises(RunError, match="no trial can be proposed: adviser-0 ended with exit status 1"):
            while True:
                for advice in until(aside.poll):
                    aside.ask(advice.cell, [], 1)


def test_what_a_pipe_cannot_take_waits_without_blocking(tmp_path):
    chosen = sweep(6, axes={})
    with SideAdvisers(1, chosen, grid.cells(chosen)) as aside:
        aside.start(History(), tmp_path)
        os.kill(aside._sides[0].process.pid, signal.SIGSTOP)
        for trial in range(5000):  # far more than a pipe holds
            aside.tell({"event": "ask", "cell": "all", "trial": trial, "attempt": 0, "kind": "search",
                        "fidelity": 1.0, "params": {"solver.lambda_model": 1.0 + trial / 100, "solver.lambda_tv": 1.0}})
        aside.ask("all", [], 1)
        os.kill(aside._sides[0].process.pid, signal.SIGCONT)
        assert [proposal["trial"] for proposal in until(aside.poll)[0].proposals] == [5000]


def test_they_leave_with_their_coordinator(tmp_path):
    chosen = sweep(6, axes={})
    with SideAdvisers(2, chosen, grid.cells(chosen)) as aside:
        aside.start(History(), tmp_path)
        children = [side.process for side in aside._sides]
        assert len(children) == 1 and children[0].poll() is None  # one cell needs one process
    assert all(child.poll() is not None for child in children)


@pytest.mark.parametrize("worth, lag", [(0.0, 1), (1e9, 0)])
def test_a_proposal_made_ahead_of_need_knows_one_result_less(worth, lag, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "WORTH", worth)  # short trials are worth it, long ones are not
    chosen = sweep(8, axes={}, initial=2)
    beside(tmp_path, chosen, workers=1)
    log = journal.read(tmp_path / "journal.jsonl")[0]
    late = [sum(event["event"] == "result" for event in log[ask["seen"]:log.index(ask)])
            for ask in events(tmp_path, "ask")]
    assert late[4:] == [lag] * 4
    assert_whole(tmp_path, chosen)


def test_a_replica_fed_from_the_middle_is_one_fed_from_the_start(tmp_path):
    chosen = sweep(6, search={"strategy": "shared"})
    coordinate(tmp_path / "r", chosen)
    log = journal.read(tmp_path / "r/journal.jsonl")[0]
    grown = sweep(9, search={"strategy": "shared"})
    whole, later = (Replica(grid.cells(grown)) for _ in range(2))
    for event in log:
        if told := news(event):
            whole.tell(told)
    for name in whole.searches:
        for event in past(History(log), name):
            later.tell(event)
    for name in whole.searches:
        assert whole.propose(name, [], 2).proposals == later.propose(name, [], 2).proposals


def test_proposals_of_one_request_are_those_of_two():
    chosen = sweep(9, axes={})
    at_once, in_turn = (Replica(grid.cells(chosen)) for _ in range(2))
    both = at_once.propose("all", [], 2).proposals
    first = in_turn.propose("all", [], 1).proposals
    assert both == first + in_turn.propose("all", first, 1).proposals
    assert len({tuple(proposal["params"].values()) for proposal in both}) == 2


def test_few_points_are_told_to_be_exhausted():
    few = {"choice": [0.1, 1.0]}
    chosen = sweep(9, axes={}, lambda_model=few, lambda_tv=few)
    inline = Inline(grid.cells(chosen))
    inline.start(History(), None)
    inline.ask("all", [], 9)
    advice, = inline.poll()
    assert isinstance(advice, Advice) and advice.exhausted
    assert Counter(len(proposal["params"]) for proposal in advice.proposals) == {2: 4}
