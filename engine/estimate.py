"""What a solve will need before it runs: bytes by array and seconds, without JAX, for `check` on a login node."""

from __future__ import annotations

from dataclasses import dataclass

# Nanoseconds per unit of work: a projection or back projection per voxel and tilt, a TV dual step per voxel and
# element, and the rest of an iteration per voxel and element.
# One core with AVX-512 at 2.6 GHz, measured at 64^3 x 4 elements, 47 + 9 tilts: 52 ms per iteration with 4 TV steps.
# Volumes that leave the cache take up to twice as long.
CORE_NS = {"projection": 0.2, "tv": 9.0, "rest": 8.0}
# An H200, not measured: from its 4.8 TB/s, about 4 ms per iteration at 256^3 x 4 elements, bound by the traffic of TV.
GPU_NS = {"projection": 0.001, "tv": 0.012, "rest": 0.01}
_SINGLE = 4  # bytes of a float32


@dataclass(frozen=True)
class Estimate:
    """bytes: on the device, by array; seconds on one GPU of the H200's class, and on one CPU core."""

    bytes: dict[str, int]
    seconds_gpu: float
    seconds_cpu_core: float


def solve(*, system: str, elements: int, shape: tuple[int, int, int], haadf_tilts: int, chem_tilts: int,
          iterations: int, inner: int) -> Estimate:
    """An estimate of one solve. shape: (nz, ny, nx) voxels. haadf_tilts 0: conventional. inner 0: without TV.

    Raises ValueError for a system that is not built.
    """
    if system != "fused3d":
        raise ValueError(f"no estimate for system {system}; built: fused3d")
    voxels = shape[0] * shape[1] * shape[2]
    volumes = elements * voxels
    images, maps = (tilts * shape[1] * shape[2] for tilts in (haadf_tilts, elements * chem_tilts))
    memory = {
        "volume, best, start, slope": 4 * volumes,
        "TV duals": (3 if inner else 0) * 3 * volumes,
        "step and curvature": 3 * volumes,
        "HAADF images, duals and their projections": 6 * images,
        "maps, model and background": 3 * maps,
        "scattering and its slope": (2 if haadf_tilts else 0) * voxels + (volumes if haadf_tilts else 0),
    }
    projections = voxels * haadf_tilts + volumes * chem_tilts
    work = {"projection": 2 * projections, "tv": inner * volumes, "rest": volumes}
    core, gpu = (1e-9 * iterations * sum(cost[part] * count for part, count in work.items())
                 for cost in (CORE_NS, GPU_NS))
    return Estimate({name: _SINGLE * count for name, count in memory.items() if count}, gpu, core)
