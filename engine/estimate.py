"""What a solve will need before it runs: bytes by array and seconds, without JAX, for `check` on a login node."""

from __future__ import annotations

from dataclasses import dataclass

# Time of one iteration, in nanoseconds per unit of work on one core of a 2 x 2.6 GHz AVX-512 machine, measured at
# 64^3 x 4 elements: a projection and its adjoint per voxel and tilt, and a TV dual step per voxel and element.
CORE_PROJECTION_NS = 0.45
CORE_TV_NS = 14.0
CORE_OTHER_NS = 40.0
# An H200 moves 4.8 TB/s: estimated 4 ms per iteration at 256^3 x 4 elements, 47 + 9 tilts, 4 dual steps, bound by the
# traffic of TV. Not measured yet.
GPU_SPEED_UP = 700.0
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
    nanoseconds = CORE_PROJECTION_NS * 2 * projections + (CORE_TV_NS * inner + CORE_OTHER_NS) * volumes
    core = 1e-9 * iterations * nanoseconds
    return Estimate({name: _SINGLE * count for name, count in memory.items() if count}, core / GPU_SPEED_UP, core)
