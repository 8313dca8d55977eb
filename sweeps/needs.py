"""What one solve of a sweep needs, by its settings, and whether a device has it. Imports without JAX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import estimate
from engine.data import DataError
from sweeps.fields import ends
from sweeps.grid import CONVENTIONAL_METHODS, MAPS_ONLY
from sweeps.patterns import Mset, Mspt
from sweeps.rules import LINEAR
from sweeps.schema import Fused3D
from sweeps.settings import Sweep


def solve(sweep: Sweep, *, elements: int, shape: tuple[int, int, int], haadf_tilts: int, chem_tilts: int,
          method: str = "", iterations: int = 0, probes: int = 1, gpu: Sequence[estimate.Measured] = (),
          core: Sequence[estimate.Measured] = (), streamed: bool = False) -> estimate.Estimate:
    """Bytes and seconds of a solve at the sweep's settings, of a searched one at its highest value.

    method, iterations: instead of the sweep's. probes: of a tilt, for mset, and streamed: whether its patterns stay on
    disk, but for two tilts. gpu, core: `estimate.solve`'s.
    """
    solver = sweep.solver
    method, iterations = method or solver.method, iterations or solver.iterations
    if isinstance(solver, Mset):
        slices = 1 if method == "sset" else shape[0] // min(ends(solver.binning))
        return estimate.multislice(size=shape[2], tilts=chem_tilts, probes=0 if method in LINEAR else probes,
                                   slices=slices, iterations=iterations, finer=solver.finer, devices=solver.devices,
                                   held=2 if streamed else None, moving="positions" in solver.refine)
    if isinstance(solver, Mspt):
        return estimate.multislice(size=shape[2], tilts=chem_tilts, probes=probes, iterations=iterations, held=2,
                                   finer=solver.finer, slices=1 if method == "sspt" else max(ends(solver.slices)),
                                   moving="positions" in solver.refine)
    if isinstance(solver, Fused3D):
        inner = 0 if method in MAPS_ONLY else max(ends(solver.inner))
        coarse, bits, momentum = solver.coarse, solver.dual_bits, False
        told = sweep.system == "fused3d" and solver.errors != "none" and method not in MAPS_ONLY
        draws = solver.error_probes if told else 0
    else:
        inner, coarse, bits, momentum, draws = 0, 0, 32, solver.form == "preconditioned", 0
    return estimate.solve(system=sweep.system, method=method, elements=elements, shape=shape, inner=inner,
                          haadf_tilts=0 if method in CONVENTIONAL_METHODS else haadf_tilts, chem_tilts=chem_tilts,
                          iterations=iterations, coarse=coarse, dual_bits=bits, momentum=momentum,
                          devices=solver.devices, probes=draws, gpu=gpu, core=core)


def check_memory(sweep: Sweep, need: estimate.Estimate, trials: int) -> None:
    """DataError, with the arithmetic, where the device that will solve has not the memory for so many trials."""
    import jax

    solver = sweep.solver
    device = jax.local_devices()[0]
    limit = _limit(device)
    shared = solver.devices if device.platform == "cpu" else 1
    if 0 < limit < trials * shared * sum(need.bytes.values()):
        many = f"{trials} trials at once need {trials} times " if trials > 1 else "the trial needs "
        raise DataError(f"{many}{estimate.arithmetic(need.bytes)} on each of {solver.devices} devices, and the "
                        f"{device.platform} has {estimate.size(limit)}: lower data.size or search.batch, or raise "
                        "solver.devices")


def room() -> float:
    """Bytes of 4D-STEM patterns that can stay in memory: half of a GPU's, a quarter of the host's, which keeps them
    beside their amplitudes; without end where neither is known."""
    import jax

    device = jax.local_devices()[0]
    limits = [_memory_free() / 4, _limit(device) / (4 if device.platform == "cpu" else 2)]
    return min((limit for limit in limits if limit > 0), default=float("inf"))


def _limit(device: Any) -> int:
    """Bytes that a device has to give; 0 where it does not tell."""
    return (device.memory_stats() or {}).get("bytes_limit", 0) if device.platform != "cpu" else _memory_free()


def _memory_free() -> int:
    """Bytes that this machine can still give; 0 where it does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)
