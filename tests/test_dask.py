"""Workers of a dask cluster keep the contract of all workers, in a cluster of our own and in one that was there."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import dask_side, dask_workers, devices, resources, session
from launch.dask_workers import DaskWorkers
from sweeps.atlas import RunFolder
from sweeps.coordinator import Observer, run
from sweeps.grid import cells
from sweeps.journal import RunError
from sweeps.settings import SettingsError
from tests import contract
from tests.contract import answers, dask, message, until
from tests.coordinate import sweep
from tests.test_coordinator import assert_whole, events
from tests.test_workers import alive

pytest.importorskip("distributed")
ROOT = Path(__file__).resolve().parent.parent
DASK = Path(sys.executable).parent / "dask"
# As slurm/dask.sbatch starts them.
SCHEDULER = [DASK, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file"]
WORKER = [DASK, "worker", "--nthreads", "1", "--nworkers", "1", "--no-dashboard", "--memory-limit", "0",
          "--scheduler-file"]


@contextlib.contextmanager
def started(command, log, **env):
    """A process that ends with the block."""
    with open(log, "ab") as stream, subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=stream, cwd=log.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env}) as process:
        try:
            yield process
        finally:
            process.terminate()


def met(condition, seconds=60):
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The scheduler file of a cluster that is not ours, with two workers."""
    folder = tmp_path_factory.mktemp("cluster")
    file = folder / "scheduler.json"
    with started([*SCHEDULER, file], folder / "scheduler.log"):
        met(file.exists)
        with started([*WORKER, file], folder / "1.log"), started([*WORKER, file], folder / "2.log"):
            met(lambda: all("Registered to" in (folder / f"{k}.log").read_text() for k in (1, 2)))
            yield file


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Workers of a test are there, or come alone."""
    monkeypatch.setattr(dask_workers, "SETTLE", 0.05)


@pytest.mark.parametrize("check", contract.REPLACED)
def test_workers_of_our_own_cluster_keep_the_contract(check, tmp_path):
    contract.REPLACED[check](dask, tmp_path)


@pytest.mark.parametrize("check", [
    "every_message_is_answered_by_its_worker", "illness_is_a_status_and_chatter_goes_to_the_log",
    "workers_that_cannot_import_their_evaluation_are_no_workers", "a_worker_stuck_in_a_trial_is_given_up",
    "a_worker_that_dies_in_a_trial_is_lost_once_and_comes_back"])
def test_workers_of_another_cluster_keep_the_contract_run_after_run(check, cluster, tmp_path):
    contract.REPLACED[check](lambda evaluate: dask(evaluate, str(cluster)), tmp_path)


def test_a_worker_that_joins_is_taken_in_and_one_that_leaves_is_lost(cluster, tmp_path):
    address = json.loads(cluster.read_text())["address"]
    with dask("stuck", address) as crew:
        crew.start(tmp_path)
        until(crew, lambda: len(crew.idle()) == 2)
        with started([*WORKER, cluster, "--no-nanny"], tmp_path / "3.log") as third:
            until(crew, lambda: len(crew.idle()) == 3)
            crew.submit("worker-2", message(1, tmp_path))
            third.kill()
            (gone,) = until(crew, lambda: len(crew.names()) == 2)
            assert (gone.worker, gone.results) == ("worker-2", None) and "has left the dask cluster" in gone.lost
        # Nobody runs its trial again by himself: the two others are free.
        assert set(answers(crew, [message(0, tmp_path)])) == {0} and len(crew.idle()) == 2


def test_a_worker_without_a_nanny_is_given_up_and_its_answer_brings_it_back(cluster, tmp_path):
    with started([*WORKER, cluster, "--no-nanny"], tmp_path / "3.log"), dask("slow", str(cluster)) as crew:
        crew.start(tmp_path)
        until(crew, lambda: len(crew.idle()) == 3)
        alone = next(seat.name for seat in crew._seats.values() if seat.nanny is None)
        crew.submit(alone, message(0, tmp_path))
        crew.kill(alone)
        (late,) = until(crew, lambda: alone not in crew.names())
        assert "was given up in the middle of a trial" in late.lost
        assert until(crew, lambda: alone in crew.idle()) == []


def everybody(crew, folder):
    """What each worker says of itself, by name."""
    for trial, worker in enumerate(crew.idle()):
        crew.submit(worker, message(trial, folder))
    told = until(crew, lambda: len(crew.idle()) == len(crew.names()))
    return {event.worker: event.results[0] for event in told}


def test_our_own_workers_have_their_environment_and_their_share_before_jax(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_given", {**os.environ, "CUDA_VISIBLE_DEVICES": "3,4", "JAX_PLATFORMS": ""})
    with dask("process") as crew:
        crew.start(tmp_path)
        until(crew, lambda: len(crew.idle()) == 2)
        found = everybody(crew, tmp_path)
    cores = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [found[f"worker-{k}"]["env"]["CUDA_VISIBLE_DEVICES"] for k in (0, 1)] == ["3", "4"]
    for result in found.values():
        env = result["env"]
        assert result["ignored"] and env["JAX_COMPILATION_CACHE_DIR"]
        assert env["OMP_NUM_THREADS"] == env["NPROC"] == os.environ.get("NPROC", cores)


def test_workers_of_another_cluster_share_out_the_gpus_of_their_machine(tmp_path, capfd):
    env = {"CUDA_VISIBLE_DEVICES": "7,8", "JAX_PLATFORMS": "", "TMPDIR": str(tmp_path)}
    file = tmp_path / "scheduler.json"
    with contextlib.ExitStack() as stack:
        stack.enter_context(started([*SCHEDULER, file], tmp_path / "scheduler.log"))
        met(file.exists)
        for k in range(3):
            stack.enter_context(started([*WORKER, file], tmp_path / f"{k}.log", **env))
        met(lambda: all("Registered to" in (tmp_path / f"{k}.log").read_text() for k in range(3)))
        with dask("process", str(file)) as crew:
            crew.start(tmp_path / "r")
            (refused,) = until(crew, lambda: len(crew.idle()) == len(crew.names()) == 2)
            found = everybody(crew, tmp_path)
    assert "finds the GPUs 7, 8 taken by other workers of its machine: start one dask worker for" in refused.lost
    assert refused.lost in capfd.readouterr().err
    assert sorted(result["env"]["CUDA_VISIBLE_DEVICES"] for result in found.values()) == ["7", "8"]


def test_too_late_for_an_environment_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", sys)
    with pytest.raises(dask_side._Refused, match=r"JAX before it could be given NPROC: .* Client.restart\(\)"):
        dask_side._adopt({**os.environ, "NPROC": "99"})


def test_gpus_of_a_machine_are_shared_out_whoever_comes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(dask_side.tempfile, "tempdir", str(tmp_path))
    code = ("import sys, tempfile\nfrom launch import dask_side\ntempfile.tempdir = sys.argv[1]\n"
            "print(dask_side._claim(['0', '1', 'MIG-c'], 2), flush=True)\ninput()")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "['0', '1']\n"
        assert dask_side._claim(["1", "MIG-c", "0"], 1) == dask_side._claim(["1", "MIG-c", "0"], 1) == ["MIG-c"]
        with pytest.raises(dask_side._Refused, match="start one dask worker for every 2 GPUs"):
            dask_side._claim(["1", "MIG-c", "0"], 2)
        other.communicate("\n")
    assert dask_side._claim(["1", "MIG-c", "0"], 2) == ["MIG-c", "1"]
    for lock in dask_side._this.claims.values():
        lock.close()
    dask_side._this.claims.clear()


def test_a_sweep_whose_workers_are_killed_ends_with_every_trial_once(tmp_path):
    chosen = sweep(5)
    with dask("mortal") as crew:
        summary = run(chosen, cells(chosen), crew, RunFolder(tmp_path / "r"))
    assert (summary.done, summary.failed, summary.stopped) == (22, 0, None)
    assert len(events(tmp_path / "r", "lost")) == 4  # once in every cell
    assert_whole(tmp_path / "r", chosen)


@pytest.mark.slow
def test_a_scheduler_that_dies_ends_the_run_with_a_sentence_and_the_next_run_continues(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(dask_workers, "LOOK", 0.5)
    monkeypatch.setattr(dask_workers, "CONNECT", 5.0)  # so long the client tries to connect again
    file, chosen = tmp_path / "scheduler.json", sweep(5)

    class Killer(Observer):
        def result(self, *_):
            if scheduler.poll() is None:
                scheduler.kill()
                scheduler.wait()

    with started([*SCHEDULER, file], tmp_path / "scheduler.log") as scheduler:
        met(file.exists)
        with started([*WORKER, file, "--death-timeout", "5"], tmp_path / "1.log"), dask("paced", str(file)) as crew:
            with pytest.raises(RunError, match=r"no worker is left: worker-0 .* dask scheduler at .* does not answer"):
                run(chosen, cells(chosen), crew, RunFolder(tmp_path / "r"), Killer())
    assert capfd.readouterr().err == ""
    with dask("paced") as crew:
        assert run(chosen, cells(chosen), crew, RunFolder(tmp_path / "r")).stopped is None
    assert_whole(tmp_path / "r", chosen)


def test_ctrl_c_lets_trials_finish_and_leaves_no_process_and_no_noise(tmp_path):
    command = [sys.executable, "-m", "tests.coordinate", tmp_path / "r", "--evaluate", "slow", "--dask"]
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        process.stdout.readline()
        tree = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    done = len(events(tmp_path / "r", "result"))
    assert out.splitlines()[-1] == f"stopped: {done} of 26 trials; run again to continue"
    assert not events(tmp_path / "r", "lost") and len(events(tmp_path / "r", "ask")) == done
    met(lambda: not any(map(alive, tree)))


SRUN = """#!/bin/bash
# srun on one machine: the command, --ntasks times, told to end together.
while [[ $1 = --* ]]; do [[ $1 != --ntasks=* ]] || tasks=${1#*=}; shift; done
for _ in $(seq "$tasks"); do "$@" & pids+=($!); done
trap 'kill "${pids[@]}"' TERM
wait; wait
"""
YAML = """name: small
data: {phantom: cocuo, size: 16, haadf_tilts: 9, chem_tilts: 3}
solver: {iterations: 5, lambda_model: {low: 1e-3, high: 1e3, scale: log}}
search: {trials: 6, initial: 6}
"""


@pytest.mark.slow
def test_the_job_script_for_slurm_runs_a_sweep_over_scheduler_and_workers(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "env/bin").mkdir(parents=True)
    (tmp_path / "env/bin/dask").symlink_to(DASK)
    (tmp_path / "env/bin/tomoatlas").write_text(f"#!/bin/bash\nexec {sys.executable} -m tests.quick landscape \"$@\"\n")
    (tmp_path / "env/bin/tomoatlas").chmod(0o755)
    (tmp_path / "sweep.yaml").write_text(YAML)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "1",
           "SLURM_NTASKS": "2", "SLURM_JOB_END_TIME": str(int(time.time()) + 3600),
           "environment": str(tmp_path / "env")}
    script = resources.folder("slurm") / "dask.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "the sweep ended with status 0" in done.stdout, done.stderr[-3000:]
    results = events(tmp_path / "runs/sweep", "result")
    assert sorted(event["trial"] for event in results) == list(range(6)) and {
        event["status"] for event in results} == {"ok"}
    assert len(events(tmp_path / "runs/sweep", "start")) == 1 and not (tmp_path / "scheduler-1.json").exists()


def test_what_cannot_be_is_refused_with_the_next_step(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"no dask scheduler answers at .*none.json \(there is no such file\): start"):
        DaskWorkers("tests.evaluators:echo", address=str(tmp_path / "none.json"))
    monkeypatch.setattr(dask_workers, "CONNECT", 0.5)
    with dask("echo", "tcp://127.0.0.1:9") as crew, pytest.raises(RunError, match="no dask scheduler answers at tcp:"):
        crew.start(tmp_path)
    for words in ("daks", "0", "-1", "dask:", "two"):
        with pytest.raises(SettingsError, match=f"--workers {words}: write a number from 1, or dask"):
            session.chosen_workers(words)
    assert [session.chosen_workers(words) for words in (None, "3", "dask", "dask:tcp://h:1")] == [
        (None, None), (3, None), (None, ""), (None, "tcp://h:1")]
    monkeypatch.setenv("PMI_SIZE", "3")
    with pytest.raises(SettingsError, match="started by an MPI launcher"):
        session.chosen_workers("dask")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RunError, match=r"pip install 'tomoatlas\[dask\]'"):
        DaskWorkers("tests.evaluators:echo")
