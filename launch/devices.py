"""The environment that JAX and the BLAS read once, at import: threads, devices, memory, compilation cache.

What the user or the launcher has set stays as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from engine.native import cache_folder

# XLA by itself takes three quarters of a GPU. Workers that share one divide more: it has no other use.
GPU_MEMORY = 0.9
_given: dict[str, str] | None = None


def coordinator() -> None:
    """Keep this process off the GPUs, whatever imports JAX later; workers get what the command was given."""
    global _given
    _given = given()
    os.environ["JAX_PLATFORMS"] = "cpu"


def given() -> dict[str, str]:
    """The environment the command was given, before `coordinator`."""
    return dict(os.environ if _given is None else _given)


def environment(index: int, workers: int, env: Mapping[str, str], threads: int | None = None,
                gpus: list[str] | None = None, share: int = 1) -> dict[str, str]:
    """`env` with what worker `index` of the `workers` on this machine needs before JAX is imported.

    threads: by default an equal part of the cores this process may run on.
    gpus: GPUs the workers share, named as in CUDA_VISIBLE_DEVICES; by default those visible here.
    share: devices of one reconstruction (solver.devices). Without GPUs the worker's cores become as many devices.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // workers) if threads is None else threads
    gpus = visible_gpus(env) if gpus is None else gpus
    flags = _flags(env.get("XLA_FLAGS", ""), 1 if gpus else share)
    # By itself JAX keeps only what took a second to compile; the many small programs of a solve take two together.
    chosen = {"JAX_COMPILATION_CACHE_DIR": str(cache_folder(env) / "jax"),
              "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **_threads(threads, flags)}
    shared = _share(index, workers, gpus) if gpus else {}
    # GPUs are narrowed within what was given and flags added to it; everything else that was given stands.
    added = {name: value for name, value in shared.items() if name == "CUDA_VISIBLE_DEVICES"} | {"XLA_FLAGS": flags}
    return {**chosen, **shared, **env, **added}


def _flags(given: str, share: int) -> str:
    """XLA's flags: those given, and ours unless they are named there."""
    wanted = {}
    if version("jaxlib").startswith("0.10."):
        # Here XLA hands sums and products of arrays to a library, one by one: an iteration at 64^3 took 2.3 times the
        # CPU time that it takes with XLA's own loops. XLA ends the process over a flag that it does not know.
        wanted["--xla_cpu_experimental_ynn_fusion_type"] = ""
    if share > 1:
        wanted["--xla_force_host_platform_device_count"] = str(share)
    return " ".join([*given.split(), *(f"{flag}={value}" for flag, value in wanted.items() if flag not in given)])


def _threads(count: int, flags: str) -> dict[str, str]:
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    # XLA's CPU pool has NPROC threads (jax 0.10.2; --xla_cpu_multi_thread_eigen=false leaves one per core).
    # Several devices forced on one CPU wait for each other in collectives, and hang with fewer than 16.
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", flags)
    # Each device runs our own kernels, OpenMP's, by itself. Its threads sleep between calls: spinning, they would
    # take the cores from XLA's.
    each = max(1, count // int(forced[1])) if forced else count
    return {**dict.fromkeys(names, str(count)), "OMP_NUM_THREADS": str(each), "OMP_WAIT_POLICY": "PASSIVE",
            "NPROC": "16" if forced else str(count)}


def _share(index: int, workers: int, gpus: list[str]) -> dict[str, str]:
    """Whole GPUs for each worker where there are enough, else several workers to a GPU and to its memory."""
    each = len(gpus) // workers
    if each:
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * each:(index + 1) * each])}
    gpu = index % len(gpus)
    memory = GPU_MEMORY / len(range(gpu, workers, len(gpus)))
    return {"CUDA_VISIBLE_DEVICES": gpus[gpu], "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{memory:.3f}"}


def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """GPUs this process may use, without asking CUDA: CUDA_VISIBLE_DEVICES, else the NVIDIA device files."""
    if env.get("JAX_PLATFORMS") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in env:
        return [name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def bound(env: Mapping[str, str]) -> bool:
    """Whether Slurm has given this process GPUs of its own, often called 0 in every process."""
    return "SLURM_GPUS_PER_TASK" in env or "gpu" in env.get("SLURM_TRES_PER_TASK", "")
