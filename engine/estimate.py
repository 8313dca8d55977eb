"""What a solve will need before it runs: bytes by array and seconds, without JAX, for `check` on a login node."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.sizes import bucket, halvings, slab_width

_SINGLE = 4  # bytes of a number
# Volumes (all elements) that XLA keeps beside state and problem while a step runs: its memory analysis of the compiled
# loop at 32^3 to 48^3, which tests/test_estimate.py repeats. A GPU's fusions may need less.
_WORKING = {"fused": 3.0, "chem_tv": 2.1, "plain": 4.4, "fista": 3.3, "ml": 2.9, "sirt": 3.0}
_ERRORS = 20  # volumes that the standard errors of fused3d take, and steps of conjugate gradients for a probe
_ERROR_STEPS = 120
# Relative work: of a projection or back projection per voxel and tilt, a TV step per voxel and element, the rest of an
# iteration per voxel and element. In nanoseconds, on one core with AVX-512 (docs/BENCHMARKS.md has the measurement).
_CORE_NS = {"projection": 0.07, "tv": 0.8, "rest": 9.0}
# An H200 that nobody has measured: from its 4.8 TB/s, about 5 ms per iteration at 256^3 x 4 elements, 47 + 9 tilts.
_GPU_NS = {"projection": 3.5e-4, "tv": 8e-3, "rest": 3.5e-2}

# Of a wave's pixel through a slice, forth and back: 26 s of CPU for 15 iterations of 12 tilts, 64 probes, 48 slices of
# 48 x 48 pixels on one core; on an H200 65 s were estimated for 20 tilts, 128^2 probes and 128^3 voxels.
_WAVE_NS = {"core": 20.0, "gpu": 0.1}
ROTATION = 10  # pixels of a wave that a voxel's rotation is worth, forth and back

SECTIONS = {"gpu": "GPU: solves", "core": "CPU: solves"}  # of docs/BENCHMARKS.md
_ROW = re.compile(r"^\|" + r"\s*([\d.]+)\s*\|" * 6 + r"\s*$", re.M)


@dataclass(frozen=True)
class Measured:
    """One row of a benchmark: size^3 voxels, numbers of elements and tilts, milliseconds of an iteration."""

    size: int
    elements: int
    haadf_tilts: int
    chem_tilts: int
    milliseconds: float


@dataclass(frozen=True)
class Estimate:
    """bytes: on the device, by array; seconds on one GPU, and on one CPU core."""

    bytes: dict[str, int]
    seconds_gpu: float
    seconds_cpu_core: float


def measured(page: str, kind: str) -> list[Measured]:
    """The measured solves of a page of benchmarks. kind: "gpu" or "core"; none where the section is missing."""
    section = page.partition(f"## {SECTIONS[kind]}\n")[2].partition("\n## ")[0]
    return [Measured(int(size), int(elements), int(haadf), int(chem), float(milliseconds))
            for size, elements, haadf, chem, milliseconds, _ in _ROW.findall(section)]


def solve(*, system: str, method: str, elements: int, shape: tuple[int, int, int], haadf_tilts: int, chem_tilts: int,
          iterations: int, inner: int, coarse: int = 0, dual_bits: int = 32, momentum: bool = False, devices: int = 1,
          probes: int = 0, gpu: Sequence[Measured] = (), core: Sequence[Measured] = ()) -> Estimate:
    """An estimate of one solve. shape: (nz, ny, nx) voxels. haadf_tilts 0: conventional. inner 0: without TV.

    coarse: iterations at each coarser size before. dual_bits: of TV's dual numbers. momentum: of hebt, whether it has
    (its form `preconditioned`). probes: of the standard errors in 3D, if any. devices: over how many it is spread; the
    bytes are those of one of them, the seconds those of all together.
    gpu, core: solves measured on such machines; the nearest in size is scaled by the work. Without any, the seconds
    come from a model of the hardware. Raises ValueError for a system that is not built.
    """
    if system not in ("fused3d", "fused2d", "hebt"):
        raise ValueError(f"no estimate for system {system}; built: fused3d, fused2d, hebt")
    nz, ny, nx = (1, *shape[1:]) if system == "fused2d" else shape
    fused, levels = method == "fused", halvings(nz, ny)
    width = nx if devices == 1 else slab_width(nx, devices, levels)
    voxels, plane = nz * ny * width, ny * width
    volumes = elements * voxels
    images, maps = bucket(haadf_tilts) * plane if haadf_tilts else 0, elements * bucket(chem_tilts) * plane
    memory = (_sirt_bytes(volumes, voxels, images, maps, method, momentum) if system == "hebt"
              else _fused_bytes(volumes, voxels, images, maps, method, inner, dual_bits))
    if probes:
        memory["standard errors"] = _ERRORS * volumes + 2 * (images + maps)
    now = {"elements": elements, "voxels": nz * ny * nx, "haadf": haadf_tilts, "chem": chem_tilts, "inner": inner}
    # A coarser iteration has an eighth of the work.
    full = iterations + (coarse * sum(8.0**-k for k in range(1, levels + 1)) if fused else 0)
    full += probes * _ERROR_STEPS
    seconds = [full * _iteration(rows, default, **now) for rows, default in ((gpu, _GPU_NS), (core, _CORE_NS))]
    return Estimate({name: _SINGLE * count for name, count in memory.items() if count}, *seconds)


def multislice(*, size: int, tilts: int, probes: int, slices: int, iterations: int, finer: int = 1,
               devices: int = 1, held: int | None = None, moving: bool = False) -> Estimate:
    """An estimate of one solve of mset. probes: of a tilt; 0: linear tomography of images instead. held: tilts in
    memory at a time; without it all. moving: whether scan positions are refined, which costs as much again."""
    patterns = (tilts if held is None else held) * probes * size**2 // devices
    memory = {"patterns": patterns, "volume, its rotations and gradient": 8 * size**3,
              "waves of a group": 2**22 if probes else 0, "images": 0 if probes else 4 * tilts * size**2}
    passed = (1 + moving) * iterations * tilts * (probes * slices * (finer * size) ** 2 + ROTATION * size**3) / devices
    return Estimate({name: _SINGLE * count for name, count in memory.items() if count}, 1e-9 * _WAVE_NS["gpu"] * passed,
                    1e-9 * _WAVE_NS["core"] * passed)


def _fused_bytes(volumes: int, voxels: int, images: int, maps: int, method: str, inner: int,
                 dual_bits: int) -> dict[str, int]:
    """Numbers that the losses' solvers keep, by what they are."""
    fused = method == "fused"
    return {
        "start, volume" + (", best volume" if fused else ", extrapolated volume" if inner else ""):
            (3 if fused or inner else 2) * volumes,
        "TV duals": 3 * volumes * dual_bits // 32 if inner else 0,
        "step per voxel": volumes if fused or method == "chem_tv" else voxels if not inner else 0,
        "HAADF images, their projections and duals": (5 if fused else 1) * images,
        "maps, their projections and duals": (4 if fused else 1) * maps,
        "working memory of a step": int(_WORKING[method] * volumes) + (3 * maps if fused else 0),
    }


def _sirt_bytes(volumes: int, voxels: int, images: int, maps: int, method: str, momentum: bool) -> dict[str, int]:
    """Numbers that SIRT keeps. With momentum there is the iteration before; a step works on a second set of all."""
    times = 4 if momentum else 2
    return {
        "volumes": times * volumes,
        "shares of the elements": volumes if momentum and method == "hebt" else 0,
        "HAADF images and their projections": (times + 1) * images,
        "maps and their projections": (times + 1) * maps,
        "back projection of HAADF": voxels if method == "hebt" else 0,
    }


def _iteration(rows: Sequence[Measured], costs: dict[str, float], **now: int) -> float:
    """Seconds of an iteration: the model's, brought to scale by the measured solve that is nearest in work."""
    seconds = _modelled(costs, **now)
    if not rows:
        return seconds

    def modelled(row: Measured) -> float:
        return _modelled(costs, elements=row.elements, voxels=row.size**3, haadf=row.haadf_tilts,
                         chem=row.chem_tilts, inner=4)

    near = min(rows, key=lambda row: max(modelled(row) / seconds, seconds / modelled(row)))
    return seconds * 1e-3 * near.milliseconds / modelled(near)


def _modelled(costs: dict[str, float], *, elements: int, voxels: int, haadf: int, chem: int, inner: int) -> float:
    work = {"projection": 2 * voxels * (haadf + elements * chem), "tv": inner * elements * voxels,
            "rest": elements * voxels}
    return 1e-9 * sum(costs[part] * count for part, count in work.items())


def arithmetic(bytes_by_array: dict[str, int]) -> str:
    """"5.2 GiB (working memory 3.1 GiB + ...)", the largest array first."""
    parts = sorted(bytes_by_array.items(), key=lambda item: -item[1])
    whole = sum(bytes_by_array.values())
    return f"{size(whole)} ({' + '.join(f'{name} {size(count)}' for name, count in parts)})"


def size(count: float) -> str:
    """Bytes as a reader wants them: "5.3 GiB", "812 MiB"."""
    for unit, amount in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= amount:
            return f"{count / amount:.3g} {unit}" if count / amount < 100 else f"{count / amount:.0f} {unit}"
    return f"{count:.0f} B"
