"""A rank of several devices (solver.devices) has its own, and the coordinator none."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_workers import MPIEXEC, needs_mpi

CODE = """if True:
    import json, os, pathlib, sys
    from launch import devices, mpi
    from tests.contract import answers, message, until
    rank, _ = mpi.world()
    if rank:
        mpi.serve()
        mpi.leave(0)
    folder = pathlib.Path(sys.argv[1])
    with mpi.MpiWorkers("tests.evaluators:surroundings", share=2) as crew:
        devices.coordinator()
        crew.start(folder)
        until(crew, lambda: len(crew.idle()) == 2)
        told = answers(crew, [message(trial, folder) for trial in range(12)]).values()
        print(os.environ["JAX_PLATFORMS"], json.dumps({event.worker: event.results[0] for event in told}))
    mpi.leave(0)"""


@needs_mpi
@pytest.mark.parametrize("gpus", ["0,1,2,3", ""])
def test_each_rank_has_as_many_devices_of_its_own_as_a_reconstruction_needs(gpus, tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS", "NPROC")}
    done = subprocess.run([MPIEXEC, "-n", "3", sys.executable, "-c", CODE, tmp_path], capture_output=True, text=True,
                          timeout=120, env={**env, "CUDA_VISIBLE_DEVICES": gpus})
    assert done.returncode == 0, done.stderr
    platform, _, told = done.stdout.partition(" ")
    first, second = (json.loads(told)[worker] for worker in ("worker-1", "worker-2"))
    assert platform == "cpu"
    if gpus:
        assert (first["gpus"], second["gpus"]) == ("0,1", "2,3") and "device_count" not in first["flags"]
    else:
        assert all("--xla_force_host_platform_device_count=2" in rank["flags"] for rank in (first, second))
        assert first["pool"] == second["pool"] == "16"  # fewer hang (launch/devices.py)
