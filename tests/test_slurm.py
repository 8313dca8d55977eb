"""Sweeps on a real Slurm of one node, which `make test-slurm` installs and starts. Only the trials are quick ones."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launch import slurm as scripts
from sweeps.atlas import RunFolder
from tests import slurmd
from tests.slurmd import told, until
from tests.test_cli import told as tomoatlas

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(slurmd.missing()), reason=slurmd.missing())]
ROOT = Path(__file__).resolve().parent.parent
SWEEP = """\
name: small
data: {phantom: cocuo, size: 16}
grid: {chem_tilts: [3, 5]}
solver:
  lambda_model: {low: 1e-3, high: 1e3, scale: log}
  lambda_tv: {low: 1e-3, high: 1e1, scale: log}
search: {trials: %d, initial: %d}
"""
PYTHON = """\
#!/bin/sh
# Stands for an environment's Python: `python -P -m launch.cli WORDS`, with an evaluation of the tests.
shift 3
exec %s -P -m tests.quick %s "$@"
"""
# A task that says where it is. Not a sweep: on two nodes that are one machine MPICH finds no way from one to the other.
RANK = """\
#!/bin/sh
echo "rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME, GPUs $CUDA_VISIBLE_DEVICES"
"""


@pytest.fixture(scope="module")
def cluster():
    """The environment of a Slurm that runs; daemons like short paths, and pytest's folders are private to it."""
    here = Path(tempfile.mkdtemp(prefix="slurm-"))
    here.chmod(0o755)
    with slurmd.slurm(here / "private") as env:
        yield env
    shutil.rmtree(here)


class Bench:
    """One sweep on the cluster: `submit`, then look."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env, self.out = folder, env, folder / "out"
        (folder / "local").mkdir()

    def submit(self, trials, evaluation, *words, **site):
        """Submit a sweep of two cells to 3 workers; the job's id."""
        python = self.folder / "environment" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(evaluation if evaluation == RANK else PYTHON % (sys.executable, evaluation))
        python.chmod(0o755)
        fields = {"gpus_per_node": 3, "environment": str(python.parent.parent), "local": str(self.folder / "local"),
                  "time": "00:05:00", **site}
        (self.folder / "sites.yaml").write_text(json.dumps({"here": fields}))
        (self.folder / "small.yaml").write_text(SWEEP % (trials, trials))
        code, out, err = tomoatlas("submit", self.folder / "small.yaml", "--site", "here", "--out", self.out,
                                   "--sites", self.folder / "sites.yaml", *words)
        assert (code, err) == (0, ""), err
        return out.split()[1].rstrip(":")

    def open(self, below):
        """Let trials of lower numbers end (the evaluation `gated`)."""
        (self.out / "go").write_text(str(below))

    def seen(self):
        """What `tomoatlas status --json` says."""
        return json.loads(tomoatlas("status", self.out, "--json")[1])

    def log(self):
        """The output of all jobs, in the order of their ids."""
        return "".join(path.read_text() for path in sorted(self.out.glob("jobs/*.log")))

    def gone(self, seconds=120):
        """Wait until no job of this sweep is left in the queue."""
        until(lambda: self.seen()["jobs"] == [], seconds)

    def at_gate(self, done):
        """Wait until so many trials are done and all three workers wait at the gate; the status."""
        return until(lambda: (now := self.seen())["done"] == done and now["at_work"] == 3 and now, 120)

    def events(self, kind):
        """The journal's events of a kind."""
        lines = (json.loads(line) for line in RunFolder(self.out).journal.read_text().splitlines())
        return [event for event in lines if event["event"] == kind]

    def once(self):
        """All trials are done, each once."""
        results = [(event["cell"], event["trial"]) for event in self.events("result")]
        assert len(results) == len(set(results)) == self.seen()["trials"] == self.seen()["done"]
        assert self.seen()["state"] == "done"


@pytest.fixture
def bench(cluster, tmp_path, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster[name])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield Bench(tmp_path, cluster)
    told(cluster, "scancel", f"--user={os.getuid()}")
    until(lambda: not told(cluster, "squeue", "--noheader"), 30)


@pytest.mark.parametrize("name", sorted(name for name, site in scripts.sites().items()
                                        if site.template.endswith(".sbatch")))
def test_slurm_would_take_the_script_of_every_site_on_nodes_of_its_shape(name, bench):
    (bench.folder / "small.yaml").write_text(SWEEP % (3, 3))
    script = bench.folder / "script"
    script.write_text(tomoatlas("submit", bench.folder / "small.yaml", "--site", name, "--nodes", 2, "--account", "m1",
                                "--partition", name, "--out", bench.out, "--dry-run")[1])
    answer = subprocess.run(["sbatch", "--test-only", script], env=bench.env, capture_output=True, text=True).stderr
    assert "to start at" in answer and f"in partition {name}" in answer, answer


def test_submit_runs_a_sweep_on_three_ranks_and_status_follows_it(bench):
    kept = bench.folder / "cache" / "tomoatlas" / "program"
    kept.parent.mkdir(parents=True)
    kept.write_text("compiled")
    left = Path(tempfile.mkstemp(prefix="mpich_shm_", dir="/dev/shm")[1])  # as by a rank that was killed
    number = bench.submit(10, "gated")
    seen = bench.at_gate(6)
    assert seen["state"] == "running"
    assert seen["jobs"][0]["id"] == number and 0 < seen["jobs"][0]["left"] < 300
    assert not left.exists(), "the job, requeued, would hang in MPI_Init"
    (local,) = (bench.folder / "local").iterdir()
    assert (local / "environment" / "bin" / "python").exists(), "the environment was not brought to the node"
    assert (local / "cache" / "tomoatlas" / "program").read_text() == "compiled"
    (local / "cache" / "tomoatlas" / "fresh").write_text("compiled in this job")
    bench.open(10)
    bench.gone()
    bench.once()
    (start,) = bench.events("start")
    assert start["workers"] == ["worker-1", "worker-2", "worker-3"]
    assert {event["worker"] for event in bench.events("result")} == set(start["workers"])
    assert "all trials are done" in bench.log() and f"runs {local}/environment/bin/python" in bench.log()
    assert kept.with_name("fresh").read_text() == "compiled in this job", "compiled programs did not come home"
    assert not list((bench.folder / "local").iterdir()), "the node's disk was not cleaned"


def test_before_the_time_limit_a_job_ends_its_trials_requeues_itself_and_continues(bench):
    # Slurm looks every half minute, so the signal comes within a minute. The trials at work last much longer than they
    # would be given after SIGTERM.
    number = bench.submit(20, "gated", time="00:02:00", warning=55)
    bench.at_gate(6)
    until(lambda: "SIGUSR1: finishing the trials that run" in bench.log(), 115)
    time.sleep(2)
    assert "the sweep ended" not in bench.log()
    bench.open(10)
    until(lambda: "requeued" in bench.log(), 60)
    assert "the time limit is near" in bench.log()
    assert bench.seen()["done"] == 9 and bench.seen()["state"] == "stopped", "a running trial was thrown away"
    until(lambda: "BeginTime" in told(bench.env, "squeue", "--noheader", "--format=%r"), 60)
    assert bench.seen()["jobs"][0]["starts"], "status does not tell when the job will start again"
    bench.open(20)

    def again():
        time.sleep(4)  # started in the same second, the job would fail: "Job credential revoked"
        told(bench.env, "scontrol", "update", f"jobid={number}", "StartTime=now")  # Slurm waits two minutes otherwise
        return "1 times continued" in bench.log()

    until(again, 100)
    bench.gone()
    bench.once()
    assert "continuing: 9 of 40 trials are finished" in bench.log() and not bench.events("lost")


def test_a_chain_of_jobs_stops_at_its_cap(bench):
    first = bench.submit(40, "gated", "--continue", "chain", "--most", 1)

    def strike(job, count, gate):
        bench.at_gate(6 * count)
        told(bench.env, "scancel", "--signal=USR1", "--batch", job)  # as Slurm itself does before the limit
        until(lambda: bench.log().count("SIGUSR1: finishing the trials that run") == count, 60)
        bench.open(gate)
        until(lambda: bench.log().count("the sweep ended with status") == count, 60)
        assert bench.seen()["done"] == 6 * count + 3

    strike(first, 1, 6)
    strike(str(int(first) + 1), 2, 9)
    bench.gone()
    assert f"continued by job {int(first) + 1}" in bench.log()
    assert "not continued (1 of at most 1 times)" in bench.log()
    assert bench.seen()["state"] == "stopped" and len(bench.events("start")) == 2


def test_a_cancelled_job_is_not_continued_by_itself_and_goes_on_when_submitted_again(bench):
    number = bench.submit(12, "gated")
    bench.at_gate(6)
    told(bench.env, "scancel", number)
    bench.gone()
    assert bench.seen()["state"] in ("stopped", "interrupted") and "requeued" not in bench.log()
    again = bench.submit(12, "landscape")
    assert again != number
    bench.gone()
    bench.once()
    assert "continuing: 6 of 24 trials are finished" in bench.log()


def test_a_rank_that_is_killed_costs_its_trial_one_attempt_and_the_sweep_ends(bench, capsys):
    bench.submit(6, "fated")
    bench.gone()
    bench.once()
    cell, killed = (bench.out / "killed").read_text().split()
    (lost,) = bench.events("lost")
    assert (lost["cell"], lost["trial"], lost["attempt"]) == (cell, 3, 0) and "died" in lost["reason"]
    (row,) = (event for event in bench.events("result") if (event["cell"], event["trial"]) == (cell, 3))
    assert (row["attempt"], row["status"]) == (1, "ok") and row["worker"] != lost["worker"]
    assert "all trials are done" in bench.log() and bench.seen()["failed"] == 0
    with capsys.disabled():
        print(f" [noticed {lost['time'] - float(killed):.2f} s after the kill, srun --mpi=pmi2]")


def test_tasks_that_do_not_find_each_other_are_refused_with_the_word_for_srun(bench):
    (bench.folder / "small.yaml").write_text(SWEEP % (3, 3))
    command = ["srun", "--ntasks=3", "--mpi=none", sys.executable, "-m", "tests.quick", "landscape", "run",
               bench.folder / "small.yaml", "--out", bench.out]
    done = subprocess.run(command, env={**os.environ, **bench.env}, cwd=ROOT, capture_output=True, text=True)
    assert "3 processes were started, but each finds itself alone" in done.stderr
    assert done.stderr.count("srun --mpi=pmi2") == 1 and "Traceback" not in done.stderr
    assert done.returncode == 2 and not bench.out.exists()


def test_two_nodes_have_the_same_workers_and_the_first_one_the_coordinator_too(bench):
    # Both nodes are this machine, with one disk: nothing is copied to it, and the job goes on without.
    bench.submit(3, RANK, "--nodes", 2, "--partition", "pair", local="/proc/nowhere")
    bench.gone()
    ranks = sorted(line for line in bench.log().splitlines() if line.startswith("rank "))
    assert ranks == [f"rank {rank} of 7 on {('first', 'second')[rank % 2]}, GPUs 0,1,2" for rank in range(7)]
    assert "nothing could be copied to /proc/nowhere" in bench.log() and "Warning" not in bench.log()
