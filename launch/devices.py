"""The environment that JAX and the BLAS read once, at import: threads, devices, memory, compilation cache.

What the user or the launcher has set stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

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
                gpus: list[str] | None = None) -> dict[str, str]:
    """`env` with what worker `index` of the `workers` on this machine needs before JAX is imported.

    threads: by default an equal part of the cores this process may run on.
    gpus: GPUs the workers share, named as in CUDA_VISIBLE_DEVICES; by default those visible here.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // workers) if threads is None else threads
    gpus = visible_gpus(env) if gpus is None else gpus
    chosen = {"JAX_COMPILATION_CACHE_DIR": str(cache_folder(env)), **_threads(threads, env)}
    shared = _share(index, workers, gpus) if gpus else {}
    # GPUs are narrowed within what was given; everything else that was given stands.
    narrowed = {name: value for name, value in shared.items() if name == "CUDA_VISIBLE_DEVICES"}
    return {**chosen, **shared, **env, **narrowed}


def _threads(count: int, env: Mapping[str, str]) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    # XLA's CPU pool has NPROC threads (jax 0.10.2; --xla_cpu_multi_thread_eigen=false leaves one per core).
    # Several devices forced on one CPU wait for each other in collectives, and hang with fewer than 16.
    forced = "xla_force_host_platform_device_count" in env.get("XLA_FLAGS", "")
    return {**dict.fromkeys(names, str(count)), "NPROC": "16" if forced else str(count)}


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


def cache_folder(env: Mapping[str, str]) -> Path:
    """Where compiled programs are kept, for one kind of processor.

    A cluster's nodes share the home folder, and code compiled for one processor may not run on another.
    """
    root = env.get("XDG_CACHE_HOME") or Path(env.get("HOME", "/tmp"), ".cache")
    return Path(root, "tomoatlas", "jax", f"{platform.machine()}-{_processor()}")


def _processor() -> str:
    """A short name for this processor's instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
