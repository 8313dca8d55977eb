"""Workers of every kind keep one contract, wherever they run and however they die."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import devices
from tests import contract
from tests.contract import answers, local, message, until

MPIEXEC = Path(sys.executable).parent / "mpiexec"
needs_mpi = pytest.mark.skipif(not MPIEXEC.exists(), reason="needs the extras mpi and mpich")


def ranks(count, module, *arguments, **options):
    """A module under mpiexec."""
    command = [MPIEXEC, "-n", str(count), sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("check", contract.REPLACED)
def test_local_workers_keep_the_contract(check, tmp_path):
    contract.REPLACED[check](local, tmp_path)


@needs_mpi
@pytest.mark.parametrize("check", contract.MPI_CHECKS)
def test_mpi_workers_keep_the_contract(check, tmp_path):
    done = ranks(3, "tests.contract", check, tmp_path)
    assert done.stdout.startswith("kept\n"), done.stderr
    assert done.returncode == 0 or check == "a_rank_that_falls_silent_is_lost"  # which mpiexec has to kill


@pytest.mark.parametrize("trial, how", [(3, "ended with exit status 9"), (4, "was killed by SIGKILL")])
def test_a_local_worker_that_dies_is_reported_and_replaced(trial, how, tmp_path):
    with local("ill") as crew:
        crew.start(tmp_path)
        found = answers(crew, [message(0, tmp_path), message(trial, tmp_path)])
        assert found[trial].results is None and how in found[trial].lost
        until(crew, lambda: len(crew.idle()) == 2)
        assert answers(crew, [message(6, tmp_path), message(7, tmp_path)])[7].results[0]["status"] == "ok"


def test_local_workers_leave_at_once_when_closed_and_when_orphaned(tmp_path):
    with local("stuck") as crew:
        crew.start(tmp_path)
        until(crew, lambda: len(crew.idle()) == 2)
        crew.submit("worker-0", message(1, tmp_path))
        pids = [worker.process.pid for worker in crew._workers.values()]
        started = time.monotonic()
    assert time.monotonic() - started < 3 and not any(map(alive, pids))

    code = f"""if True:
        from pathlib import Path
        from tests.contract import local, message, until
        crew, folder = local("stuck"), Path({str(tmp_path)!r})
        crew.start(folder)
        until(crew, lambda: len(crew.idle()) == 2)
        crew.submit("worker-1", message(1, folder))
        print(*(worker.process.pid for worker in crew._workers.values()), flush=True)
        crew.poll(60)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as coordinator:
        pids = [int(pid) for pid in coordinator.stdout.readline().split()]
        coordinator.kill()
    deadline = time.monotonic() + 3
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    """Whether a process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_mpi
def test_a_launcher_that_does_not_know_our_mpi_is_refused_with_the_word_for_srun():
    code = "from launch.workers import world\nprint(world())"
    env = {**os.environ, "SLURM_STEP_NUM_TASKS": "4"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "RunError: 4 processes were started, but each finds itself alone" in done.stderr
    assert "srun --mpi=pmi2" in done.stderr
    del env["SLURM_STEP_NUM_TASKS"]
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=env) == "(0, 1)\n"


@pytest.mark.parametrize("index, workers, gpus, chosen", [
    (0, 2, [], (None, None)),
    (1, 2, ["0", "1"], ("1", None)),
    (1, 2, ["0", "1", "2", "3"], ("2,3", None)),
    (0, 2, ["5"], ("5", "0.450")),
    (3, 4, ["0", "1", "2"], ("0", "0.450")),
    (2, 4, ["0", "1", "2"], ("2", "0.900")),
    (1, 3, ["GPU-a", "GPU-b", "MIG-c"], ("GPU-b", None)),
])
def test_gpus_are_shared_out(index, workers, gpus, chosen):
    env = devices.environment(index, workers, {"HOME": "/home/u"}, gpus=gpus)
    assert (env.get("CUDA_VISIBLE_DEVICES"), env.get("XLA_PYTHON_CLIENT_MEM_FRACTION")) == chosen


def test_the_environment_given_stands():
    given = {"OMP_NUM_THREADS": "7", "NPROC": "5", "JAX_COMPILATION_CACHE_DIR": "/scratch/cache",
             "CUDA_VISIBLE_DEVICES": "3,4", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2"}
    env = devices.environment(1, 2, given)
    assert env.items() >= (given | {"CUDA_VISIBLE_DEVICES": "4"}).items()
    assert devices.environment(0, 2, {**given, "JAX_PLATFORMS": "cpu"})["CUDA_VISIBLE_DEVICES"] == "3,4"
    cache = devices.environment(0, 1, {"HOME": "/home/u"})["JAX_COMPILATION_CACHE_DIR"]
    assert cache.startswith("/home/u/.cache/tomoatlas/")


def test_the_coordinator_keeps_off_the_gpus_but_its_workers_do_not():
    code = ("import os\nos.environ.pop('JAX_PLATFORMS', None)\n"
            "from launch import devices\ndevices.coordinator()\ndevices.coordinator()\n"
            "print(os.environ['JAX_PLATFORMS'], devices.given().get('JAX_PLATFORMS'))")
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "cpu None\n"


@pytest.mark.parametrize("threads", [1, 3])
def test_jax_and_the_blas_keep_to_their_share_of_the_cores(threads, tmp_path):
    code = """if True:
        import json, pathlib, jax, threadpoolctl, numpy, scipy.linalg
        jax.numpy.ones(3).sum()
        names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
        pools = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
        print(json.dumps([names.count("tf_XLAEigen"), pools]))"""
    given = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = devices.environment(0, 1, {**given, "JAX_PLATFORMS": "cpu"}, threads=threads)
    pool, blas = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True, env=env))
    assert pool == threads and all(pool <= threads for pool in blas)
