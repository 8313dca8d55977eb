"""The coordinator finishes what it starts, however it is treated, and the journal tells all of it."""

import contextlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from sweeps import grid, journal
from sweeps.advice import Replica
from sweeps.coordinator import Observer
from sweeps.grid import cells
from sweeps.journal import History, RunError
from sweeps.search import searches
from tests.coordinate import coordinate, sweep
from tests.test_workers import MPIEXEC, needs_mpi

KILLS = int(os.environ.get("TOMOATLAS_KILLS", 30))  # of workers, coordinators and both; a hundred take minutes


def events(folder, *kinds):
    """The journal's events of some kinds."""
    return [event for event in journal.read(folder / "journal.jsonl")[0] if event["event"] in kinds]


def at_work(folder):
    """Trials that were asked and not answered."""
    return set(map(place, events(folder, "ask"))) - set(map(place, events(folder, "result")))


def place(event):
    return event["cell"], event["trial"]


def figures(folder):
    """The atlas and the table of trials, without what depends on who worked and how often it was tried."""
    import xarray

    found = {}
    for group in ("/", "trials"):
        with xarray.open_zarr(folder / "atlas.zarr", group=group, chunks=None) as data:
            found |= {(group, name): data[name].values.tolist() for name in data.variables
                      if name not in ("worker", "attempt")}
    return json.dumps([[*key, value] for key, value in sorted(found.items())])


def replayed(chosen, log):
    """Searches of every cell that know only the journal."""
    return searches(cells(chosen), History(log))


def assert_whole(folder, chosen):
    """Every planned trial was finished once, and what was asked follows from the journal before it."""
    planned = {(cell.id, trial) for cell in cells(chosen) for trial in range(grid.trials(cell))}
    assert Counter(map(place, events(folder, "result"))) == Counter(planned)
    log, replicas = journal.read(folder / "journal.jsonl")[0], {}
    for event in log:
        if event["event"] == "ask" and event["kind"] == "search" and event["attempt"] == 0:
            assert proposed_again(log, event, replicas, chosen) == {
                key: event[key] for key in ("trial", "kind", "fidelity", "params")}


def proposed_again(log, ask, replicas, chosen):
    """What follows from the lines that a trial was proposed from, and from the proposals of its cell before it."""
    cell = ask["cell"]
    replica, told = replicas.setdefault(cell, (Replica(cells(chosen), batches_of(log)), []))
    for event in log[len(told):ask["seen"]]:
        replica.tell(event)
    told += log[len(told):ask["seen"]]
    rows = replica.history.cell(cell).rows
    before = [event for event in log if event["event"] == "ask" and event["cell"] == cell and event["attempt"] == 0
              and event["trial"] < ask["trial"] and event["trial"] not in rows]
    return replica.propose(cell, before, 1).proposals[0]


def batches_of(log):
    """The size of each cell's batches, as its results tell it."""
    return {event["cell"]: max(other["batch"] for other in log if other["event"] == "result"
                               and other["cell"] == event["cell"]) for event in log if event["event"] == "result"}


class Diary(Observer):
    """Everything the coordinator tells."""

    def __init__(self):
        self.told = []

    def started(self, total, done):
        self.told.append(("started", total, done))

    def result(self, result, cell, best):
        self.told.append(("result", cell.id, result["trial"], result["status"], best))

    def lost(self, cell, trial, attempt, worker, reason):
        self.told.append(("lost", cell.id, trial, attempt, worker, reason))

    def finished(self, summary):
        self.told.append(("finished", summary.done))


@pytest.mark.parametrize("order", ["free", "strict"])
def test_a_sweep_ends_with_every_trial_done_and_the_optimisers_as_the_journal_says(order, tmp_path):
    chosen, diary = sweep(5, order), Diary()
    summary = coordinate(tmp_path / "r", chosen, observer=diary)
    assert (summary.total, summary.done, summary.failed, summary.stopped) == (22, 22, 0, None)
    assert_whole(tmp_path / "r", chosen)
    again = replayed(chosen, journal.read(tmp_path / "r/journal.jsonl")[0])
    for name, search in summary.searches.items():
        assert search.optimizer().state() == again[name].optimizer().state()
    assert diary.told[0] == ("started", 22, 0) and diary.told[-1] == ("finished", 22)
    assert Counter(kind for kind, *_ in diary.told) == {"started": 1, "result": 22, "finished": 1}
    bests = [best for kind, name, _, _, best in diary.told[1:-1] if name == "haadf_tilts=9,chem_tilts=5"]
    assert bests == sorted(bests, reverse=True)


def test_workers_stay_with_their_cells_and_none_is_idle(tmp_path):
    coordinate(tmp_path / "r", sweep(6))
    served = {}
    for event in events(tmp_path / "r", "result"):
        served.setdefault(event["worker"], []).append(event["cell"])
    assert len(served) == 2 and min(map(len, served.values())) > 6
    moves = sum(before != after for row in served.values() for before, after in itertools.pairwise(row))
    assert moves <= 4  # as many as there are cells


def test_one_cell_keeps_all_workers_busy_unless_it_may_not(tmp_path):
    most = {}
    for name, search in {"auto": {}, "two": {"in_flight": 2}}.items():
        coordinate(tmp_path / name, sweep(16, axes={}, initial=16, search=search), "slow", count=4)
        running, most[name] = set(), 0
        for event in events(tmp_path / name, "ask", "result"):
            running = running | {place(event)} if event["event"] == "ask" else running - {place(event)}
            most[name] = max(most[name], len(running))
    assert most["auto"] > most["two"] == 2


def test_strict_order_gives_one_atlas_whoever_works(tmp_path):
    chosen = sweep(5, "strict")
    coordinate(tmp_path / "one", chosen, count=1)
    coordinate(tmp_path / "three", chosen, count=3)
    assert figures(tmp_path / "one") == figures(tmp_path / "three")
    asked = [event for event in events(tmp_path / "one", "ask") if event["kind"] == "search"]
    assert len(asked) == 20


def test_a_space_of_few_points_ends_the_search_early(tmp_path):
    few = {"choice": [0.1, 1.0]}
    chosen = sweep(9, axes={"chem_tilts": [3, 5]}, lambda_model=few, lambda_tv=few)
    for done in (8, 8):  # and a finished folder stays finished
        summary = coordinate(tmp_path / "r", chosen)
        assert (summary.done, summary.total, summary.stopped) == (done, done, None)
    tried = {(event["cell"], *event["params"].values()) for event in events(tmp_path / "r", "ask")}
    assert len(tried) == 8


def test_ill_trials_are_rows_and_the_sweep_goes_on(tmp_path):
    chosen, diary = sweep(8, axes={}), Diary()
    summary = coordinate(tmp_path / "r", chosen, "ill", observer=diary)
    assert (summary.done, summary.failed, summary.stopped) == (8, 3, None)
    rows = {event["trial"]: event for event in events(tmp_path / "r", "result")}
    assert [trial for trial in sorted(rows) if rows[trial]["status"] != "ok"] == [1, 2, 4]
    assert rows[3]["attempt"] == 2
    assert rows[4]["status"].startswith("lost 3 times, the last time because worker-")
    assert "was killed by SIGKILL" in rows[4]["status"]
    assert rows[5]["objective"] is None and rows[5]["status"] == "ok"
    assert Counter(event["trial"] for event in events(tmp_path / "r", "lost")) == {3: 2, 4: 3}
    assert sum(kind == "lost" for kind, *_ in diary.told) == 5
    assert_whole(tmp_path / "r", chosen)


def test_without_a_worker_the_run_ends_with_a_sentence(tmp_path):
    words = r"no worker is left: worker-\d ended with exit status 1; the last line of .*\.log is: .*missing"
    with pytest.raises(RunError, match=words):
        coordinate(tmp_path / "r", sweep(2), "missing")


def spawn(folder, *options, ranks=0):
    """`tests.coordinate` in a process of its own, or under mpiexec."""
    launcher = [MPIEXEC, "-n", str(ranks)] if ranks else []
    command = [*launcher, sys.executable, "-m", "tests.coordinate", folder, *options]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def kill_again_and_again(folder, order, ranks, kills):
    """SIGKILL to the coordinator at random moments; no finished trial may be lost between two runs."""
    chance, finished = random.Random(0), Counter()
    for _ in range(kills):
        starts = len(events(folder, "start"))
        with spawn(folder, "--order", order, "--trials", 8, "--evaluate", "paced", ranks=ranks) as process:
            for _ in range(chance.randrange(4)):
                process.stdout.readline()
            time.sleep(chance.uniform(0, 0.05))
            while ranks and len(events(folder, "start")) == starts and process.poll() is None:
                time.sleep(0.01)  # rank 0 is not our child: only its journal tells who it is
            assert process.poll() is None
            os.kill(events(folder, "start")[-1]["pid"] if ranks else process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
        now = Counter(map(place, events(folder, "result")))
        assert now >= finished and max(now.values(), default=1) == 1
        finished = now
    return finished


@pytest.mark.parametrize("order, ranks, kills", [
    ("strict", 0, 10), pytest.param("free", 0, 5, marks=pytest.mark.slow),
    pytest.param("strict", 3, 5, marks=[needs_mpi, pytest.mark.slow])])
def test_kills_of_the_coordinator_lose_nothing_and_change_nothing(order, ranks, kills, tmp_path):
    folder, chosen = tmp_path / "killed", sweep(8, order)
    finished = kill_again_and_again(folder, order, ranks, kills)
    assert 0 < sum(finished.values()) < 34
    with spawn(folder, "--order", order, "--trials", 8, "--evaluate", "paced", ranks=ranks) as process:
        out, err = process.communicate(timeout=60)
        assert out.endswith("finished\n"), err
    assert Counter(map(place, events(folder, "result"))) >= finished
    assert_whole(folder, chosen)
    assert any(event["reason"] == "the run was interrupted" for event in events(folder, "lost"))
    if order == "strict":
        coordinate(tmp_path / "calm", chosen)
        assert figures(folder) == figures(tmp_path / "calm")


def children(pid):
    """The processes that a process has started."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as listing:
            return [int(child) for child in listing.read().split()]
    except OSError:
        return []


def killed(pid):
    """SIGKILL to a process that may have ended; whether it had not."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="children are found under /proc")
def test_kills_of_anything_lose_nothing_and_change_nothing(tmp_path):
    """Workers, the coordinator and both together are killed KILLS times at random moments of a sweep."""
    per_cell = KILLS // 2
    folder, chosen, chance = tmp_path / "killed", sweep(per_cell, "strict", initial=KILLS // 5), random.Random(1)
    options = ("--order", "strict", "--trials", per_cell, "--initial", KILLS // 5, "--evaluate", "paced")
    kills, process, hold = Counter(), None, tmp_path / "hold"
    while kills.total() < KILLS:
        if process is None or process.poll() is not None:
            assert process is None or process.returncode in (-signal.SIGKILL, 2)  # 2: no worker was left
            if process is not None:
                process.communicate()
            done = len(events(folder, "result")) if folder.exists() else 0
            hold.unlink(missing_ok=True)
            process = spawn(folder, *options)
            # A run that never got to a result would interrupt the same trials until they count as deadly.
            while process.poll() is None and not (folder / "journal.jsonl").exists():
                time.sleep(0.01)
            while process.poll() is None and len(events(folder, "result")) == done:
                time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        losses = Counter(place(event) for event in events(folder, "lost") if event["worker"])
        if any(losses[trial] > 1 for trial in at_work(folder)):  # a third worker's death would make it a failed row
            # It may wait for a worker that others have: all go on that have begun, and those alone.
            hold.write_text(" ".join(f"{cell}-{trial}" for cell, trial in at_work(folder)))
            time.sleep(0.2)
            continue
        # Where kills take long, the sweep must not end before the last of them.
        if len(events(folder, "result")) > kills.total() + 10:
            hold.write_text("")
        else:
            hold.unlink(missing_ok=True)
        victim, workers = chance.choice(["worker", "worker", "worker", "coordinator", "job"]), children(process.pid)
        doomed = workers[:1] if victim == "worker" else [process.pid, *workers] if victim == "job" else [process.pid]
        kills[victim] += any([killed(pid) for pid in doomed])
        if victim != "worker":
            process.communicate(timeout=60)
    hold.unlink(missing_ok=True)
    out, err = process.communicate(timeout=300)
    while not out.endswith("finished\n"):
        with spawn(folder, *options) as process:
            out, err = process.communicate(timeout=300)
            assert process.returncode in (0, 2), err
    rows = Counter(map(place, events(folder, "result")))
    assert rows.total() == len(rows) == 4 * per_cell + 2 and min(kills.values()) > 1 and len(kills) == 3
    assert all(event["status"] == "ok" for event in events(folder, "result"))
    assert_whole(folder, chosen)
    coordinate(tmp_path / "calm", chosen)
    assert figures(folder) == figures(tmp_path / "calm")


@pytest.mark.parametrize("ranks", [0, pytest.param(3, marks=needs_mpi)])
def test_sigterm_lets_the_running_trials_end_and_the_next_run_continues(ranks, tmp_path):
    with spawn(tmp_path / "r", "--evaluate", "slow", ranks=ranks) as process:
        process.stdout.readline()
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    done, running = len(events(tmp_path / "r", "result")), events(tmp_path / "r", "ask")
    assert out.splitlines()[-1] == f"stopped: {done} of 26 trials; run again to continue"
    assert len(running) == done and events(tmp_path / "r", "stop")
    assert coordinate(tmp_path / "r", sweep()).stopped is None
    assert not events(tmp_path / "r", "lost")
    assert_whole(tmp_path / "r", sweep())


def test_the_grace_of_a_stop_ends_and_a_second_signal_ends_it_at_once(tmp_path):
    for runs, (options, signals) in enumerate([(["--grace", "0.05"], 1), ([], 2)], start=1):
        with spawn(tmp_path / "r", "--evaluate", "stuck", *options) as process:
            deadline = time.monotonic() + 60
            while len(events(tmp_path / "r", "start")) < runs or not any(t for _, t in at_work(tmp_path / "r")):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            started = time.monotonic()
            for _ in range(signals):
                process.send_signal(signal.SIGINT)
                time.sleep(0.05)
            assert "stopped: " in process.communicate(timeout=60)[0]
            assert time.monotonic() - started < 10  # a trial takes 60 s, the grace is 20 s
        assert at_work(tmp_path / "r")
    assert coordinate(tmp_path / "r", sweep()).stopped is None
    assert_whole(tmp_path / "r", sweep())


def test_a_finished_folder_is_left_alone_and_a_larger_budget_continues_it(tmp_path):
    coordinate(tmp_path / "r", sweep(3))
    before = events(tmp_path / "r", "result")
    coordinate(tmp_path / "r", sweep(3), "missing")  # no worker is started where nothing is left
    assert coordinate(tmp_path / "r", sweep(5)).total == 22
    assert events(tmp_path / "r", "result")[:len(before)] == before
    assert_whole(tmp_path / "r", sweep(5))


def test_other_settings_are_refused_with_the_difference_and_change_nothing(tmp_path):
    coordinate(tmp_path / "r", sweep(3, axes={}))
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    words = r"holds the results of other settings:\n  solver.iterations: was 10, now 12\n"
    with pytest.raises(RunError, match=words):
        coordinate(tmp_path / "r", sweep(3, axes={}, iterations=12))
    with pytest.raises(RunError, match="search.trials: was 3, now 2; a budget may grow, not shrink"):
        coordinate(tmp_path / "r", sweep(2, axes={}))
    assert before == {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="is no run folder and not empty"):
        coordinate(tmp_path, sweep(2))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_cell_runs_again_and_the_others_stay(tmp_path):
    chosen = sweep(4, "strict", save="all")
    coordinate(tmp_path / "r", chosen, "with_volume")
    before = figures(tmp_path / "r")
    summary = coordinate(tmp_path / "r", chosen, "with_volume", again="haadf_tilts=9,chem_tilts=3")
    assert (summary.done, summary.total) == (18, 18)
    results = Counter(event["cell"] for event in events(tmp_path / "r", "result"))
    assert results == {"haadf_tilts=9,chem_tilts=3": 8, "haadf_tilts=9,chem_tilts=5": 4,
                       "haadf_tilts=0,chem_tilts=3": 5, "haadf_tilts=0,chem_tilts=5": 5}
    assert {event["attempt"] for event in events(tmp_path / "r", "ask")[18:]} == {1}
    assert len(list((tmp_path / "r/volumes").iterdir())) == 18
    assert figures(tmp_path / "r") == before  # strict order
    with pytest.raises(RunError, match="no cell haadf_tilts=9,chem_tilts=4; did you mean haadf_tilts=9,chem"):
        coordinate(tmp_path / "r", chosen, again="haadf_tilts=9,chem_tilts=4")


def test_a_second_coordinator_is_refused(tmp_path):
    with spawn(tmp_path / "r", "--evaluate", "slow") as first:
        first.stdout.readline()
        with pytest.raises(RunError, match=rf"another coordinator works here \(process {first.pid} on "):
            coordinate(tmp_path / "r", sweep())
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=60) == 0


@contextlib.contextmanager
def no_file_above(size):
    """A limit on the size of a file fills the disk for the one file that grows, the journal."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_gives_a_sentence_and_loses_nothing(tmp_path):
    chosen = sweep(30, initial=30)  # no model to fit: many trials in little time
    with no_file_above(40_000), pytest.raises(
            RunError, match="journal.jsonl: File too large; all trials that were finished are safe"):
        coordinate(tmp_path / "r", chosen)
    finished = Counter(map(place, events(tmp_path / "r", "result")))
    assert 20 < finished.total() < 100
    coordinate(tmp_path / "r", chosen)
    assert Counter(map(place, events(tmp_path / "r", "result"))) >= finished
    assert_whole(tmp_path / "r", chosen)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_run_on_a_disk_that_fills_up_goes_on_when_there_is_room(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", tmp_path]).returncode:
        pytest.skip("this machine cannot mount a disk")
    try:
        with pytest.raises(RunError, match="No space left on device; all trials that were finished are safe"):
            coordinate(tmp_path / "r", sweep(save="all"), "with_volume")
        finished = Counter(map(place, events(tmp_path / "r", "result")))
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path], check=True)
        coordinate(tmp_path / "r", sweep(save="all"), "with_volume")
        assert Counter(map(place, events(tmp_path / "r", "result"))) >= finished
        assert_whole(tmp_path / "r", sweep(save="all"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.slow
@needs_mpi
def test_a_rank_that_dies_ends_an_mpich_job_and_the_next_run_goes_on(tmp_path):
    for _ in range(3):
        with spawn(tmp_path / "r", "--evaluate", "ill", ranks=3) as process:
            process.communicate(timeout=30)
        if process.returncode == 0:
            break
    assert events(tmp_path / "r", "lost")
