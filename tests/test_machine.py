"""The simulated machine obeys the laws of a real one: nobody solves faster than time, and what dies is done again."""

import dataclasses
import json
import time
from collections import Counter

import numpy as np
import pytest

from launch import simulate
from launch.advisers import SideAdvisers
from launch.simulate import Outcome
from launch.simulated import Clock, Landscape, Ledger, Machine, SimulatedWorkers
from sweeps import coordinator, grid, journal
from sweeps.coordinator import POLL
from sweeps.journal import RunError
from sweeps.optimizer import Optimizer
from tests import contract
from tests.coordinate import sweep
from tests.test_cli import told
from tests.test_coordinator import assert_whole, events

ONE = Machine(1)


def simulated(folder, machine, chosen=None, **options):
    """A sweep on a simulated machine: four cells of twelve trials."""
    chosen = chosen or sweep(12, axes={"chem_tilts": [3, 5, 7, 9]}, initial=4, search={"in_flight": 4})
    cells = grid.cells(chosen)
    outcome = simulate.simulate(chosen, cells, cells, machine, folder, **options)
    assert_whole(folder, chosen)
    return outcome, journal.read(folder / "journal.jsonl")[0]


@pytest.mark.parametrize("check", contract.SIMULATED)
def test_simulated_workers_keep_the_contract(check, tmp_path):
    contract.SIMULATED[check](contract.simulated, tmp_path)


@pytest.mark.parametrize("wrong", ["another trial", "no answer", "another worker"])
def test_the_contract_is_not_kept_by_workers_that_answer_wrongly(wrong, tmp_path):
    """What the contract's functions assert can fail: for workers of every kind they are the same functions."""
    def make(evaluate):
        crew = contract.simulated(evaluate)
        answered = crew.poll

        def poll(timeout):
            found = answered(timeout)
            if wrong == "no answer":
                return [dataclasses.replace(event, lost="is gone", results=None) for event in found]
            if wrong == "another worker":
                return [dataclasses.replace(event, worker="nobody") for event in found]
            return [dataclasses.replace(event, results=[each | {"trial": each["trial"] + 1} for each in event.results])
                    for event in found]

        crew.poll = poll
        return crew

    with pytest.raises((AssertionError, KeyError)):
        contract.every_message_is_answered_by_its_worker(make, tmp_path)


def test_the_clock_goes_on_while_work_is_done_and_jumps_over_waiting():
    clock = Clock()
    before = clock.time()
    time.sleep(0.05)
    assert 0.05 <= clock.time() - before < 5
    clock.jump(before + 1000)
    assert 1000 <= clock.time() - before < 1005
    worked = clock.worked
    assert clock.pause() >= before + 1000 and clock.worked >= worked
    assert abs(time.time() - before) < 60  # the time of day, as long as nothing was jumped over


def test_a_sweep_takes_at_least_its_trials_and_no_worker_is_more_than_busy(tmp_path):
    outcome, log = simulated(tmp_path, Machine(8, median=60.0, spread=0.2))
    work = sum(event["seconds"] for event in log if event["event"] == "result")
    assert (outcome.trials, outcome.jobs, outcome.lost, outcome.repeated) == (48, 1, 0, 0)
    assert outcome.elapsed >= work / 8 and outcome.real < outcome.elapsed
    assert outcome.whole == pytest.approx(work / 8 / outcome.elapsed, rel=0.01)
    assert outcome.whole <= outcome.busy <= 1 + 1e-9
    assert outcome.busy > 0.9  # 0.02 s for a proposal, 60 s for a trial
    assert set(outcome.regret) == {cell.id for cell in grid.cells(sweep(12, axes={"chem_tilts": [3, 5, 7, 9]}))}
    assert min(outcome.regret.values()) >= 0


def test_workers_of_a_cell_that_is_done_help_the_others_unless_they_may_not(tmp_path):
    """At the last hand-out nobody is idle who could have had a trial."""
    at_last, busy = {}, {}
    for words, search in {"auto": {}, "two": {"in_flight": 2}}.items():
        chosen = sweep(16, axes={"chem_tilts": [3, 5, 7, 9]}, initial=4, search=search)
        outcome, log = simulated(tmp_path / words, Machine(8, median=60.0, spread=0.5), chosen)
        at_work = 0
        for event in log:
            at_work += {"ask": 1, "result": -1}.get(event["event"], 0)
            if event["event"] == "ask":
                at_last[words] = at_work
        busy[words] = outcome.busy
    assert at_last["auto"] == 8 > at_last["two"]
    assert busy["auto"] > 0.98 > busy["two"]


def test_a_large_crew_is_not_made_to_wait_for_its_first_trials(tmp_path, monkeypatch):
    """Between two groups of messages the coordinator waits for nothing."""
    waits, poll = [], SimulatedWorkers.poll

    def watched(crew, timeout):
        waits.append((timeout, bool(crew.idle())))
        return poll(crew, timeout)

    monkeypatch.setattr(SimulatedWorkers, "poll", watched)
    monkeypatch.setattr(coordinator, "GROUP", 32)
    chosen = sweep(15, axes={"chem_tilts": list(range(3, 8))}, initial=15)
    simulated(tmp_path, Machine(75, spread=0.0), chosen)
    assert waits[:3] == [(0.0, True), (0.0, True), (POLL, False)]  # 32, 64, 75 at work


def test_what_dies_with_its_node_is_done_again(tmp_path):
    outcome, log = simulated(tmp_path, Machine(12, spread=0.0, per_node=2, mtbf=60.0, notice=5.0, seed=3))
    lost = [event for event in log if event["event"] == "lost"]
    assert outcome.lost == outcome.repeated == sum(event["worker"] != "" for event in lost) > 0
    assert all("died with its node" in event["reason"] for event in lost)
    done = Counter((event["cell"], event["trial"]) for event in log if event["event"] == "result")
    assert len(done) == 48 and set(done.values()) == {1}


def test_a_machine_that_dies_whole_ends_the_run_with_a_sentence(tmp_path):
    with pytest.raises(RunError, match="no worker is left: worker-. died with its node"):
        simulated(tmp_path, Machine(2, per_node=1, mtbf=1.0, notice=1.0))


def test_a_time_limit_makes_jobs_of_it_and_loses_nothing(tmp_path):
    chosen = sweep(9, axes={"chem_tilts": [3, 5, 7, 9]}, initial=5)
    whole, _ = simulated(tmp_path / "whole", Machine(4), chosen)
    parts, log = simulated(tmp_path / "parts", Machine(4), chosen, walltime=300.0, queue=1000.0)
    starts = [event for event in log if event["event"] == "start"]
    stops = [event for event in log if event["event"] == "stop"]
    assert parts.jobs == len(starts) == len(stops) + 1 > 2 and parts.lost == parts.repeated == 0
    assert all("the job's time ends in" in event["reason"] for event in stops)
    for start, stop in zip(starts, stops, strict=False):
        assert stop["time"] - start["time"] < 300
    for stop, start in zip(stops, starts[1:], strict=False):
        assert start["time"] - stop["time"] >= 1000
    assert parts.elapsed > whole.elapsed


def test_slow_proposals_cost_the_simulated_machine_what_they_take(tmp_path, monkeypatch):
    advice = SideAdvisers._advice
    monkeypatch.setattr(SideAdvisers, "_advice",
                        lambda *given: dataclasses.replace(advice(*given), seconds=30.0))
    outcome, log = simulated(tmp_path, Machine(1, median=60.0, spread=0.0),
                             sweep(8, axes={}, initial=2, search={"in_flight": 1}))
    modelled = sum(event["event"] == "ask" for event in log) - 2
    assert outcome.proposal == pytest.approx(30.0)
    # One worker: it waits for the first proposal of the model; the next is made while it works.
    assert 8 * 60 + 30 <= outcome.elapsed < 8 * 60 + modelled * 30 + 20


def test_failed_nodes_and_answers_come_in_the_order_of_time(tmp_path):
    def evaluate(message):
        return [{"status": "ok", "objective": 0.0, "seconds": 10.0 * (1 + trial["trial"])}
                for trial in message["trials"]]

    clock = Clock()
    with SimulatedWorkers(Machine(5, per_node=1), evaluate, clock, None, Ledger()) as crew:
        crew.start(tmp_path)
        begun = clock.time()
        for trial, worker in enumerate(crew.idle()):
            crew.submit(worker, contract.message(trial, tmp_path))
        seen = []
        while len(seen) < 5:
            seen += [(round(clock.time() - begun), event.worker) for event in crew.poll(1000)]
        assert seen == [(10 * (k + 1), f"worker-{k}") for k in range(5)]


@pytest.mark.parametrize("axes", [{}, {"chem_tilts": [3, 5, 7, 9]}])
def test_the_landscape_has_one_valley_that_a_search_finds(axes):
    cells = {cell.id: cell for cell in grid.cells(sweep(30, axes=axes))}
    landscape = Landscape(cells, ONE)
    for cell in cells.values():
        search, values = Optimizer(cell.space, 0), []
        for trial in range(30):
            params = search.ask([], trial)
            values.append(landscape.objective(cell, params))
            search.tell(params, values[-1])
        assert min(values) >= landscape.floor(cell)
        assert min(values) < 1.03 * landscape.floor(cell) < np.median(values[:8])
        assert landscape.objective(cell, params, 0.1) != landscape.objective(cell, params)


def test_the_command_prints_a_table_or_json_and_refuses_nonsense(tmp_path):
    words = ["--set", "data.size=16", "--set", "grid={chem_tilts: [3, 5]}", "--set", "search.trials=6",
             "--set", "search.initial=4"]
    code, out, err = told("simulate", "fig4_cocuo", "--workers", "2,4", "--trial-seconds", "30,0.1", *words)
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][0] == "fig4-cocuo" and "30 s" in out
    rows = {line[0]: line for line in lines if line and line[0] in ("2", "4")}
    assert [rows[count][1:4] for count in ("2", "4")] == [["2", "12", "1"]] * 2
    code, out, _ = told("simulate", "fig4_cocuo", "--workers", "2", "--json", "--out", tmp_path / "kept", *words)
    assert code == 0 and Outcome(**json.loads(out)).trials == 12
    assert len(events(tmp_path / "kept/2/run", "result")) == 12
    assert told("simulate", "fig4_cocuo", "--workers", "0")[::2] == (
        2, "--workers 0: must be whole numbers above 0, separated by commas\n")
    assert told("simulate", "fig4_cocuo", "--trial-seconds", "1,2,3")[0] == 2
    fixed = ["--set", "solver.lambda_tv=1", "--set", "solver.lambda_model=1"]
    code, _, err = told("simulate", "fig4_cocuo", *fixed)
    assert code == 2 and "nothing is searched" in err
