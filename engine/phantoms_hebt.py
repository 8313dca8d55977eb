"""HEBT's specimen: an alloyed Ag-Au particle with a core, 80 wt% Au, and a shell, 80 wt% Ag (after its Fig. 1).

Partial densities [g/cm^3] of a particle of 96 nm in a field of 145.5 nm, described in nm, so that 97 and 256 voxels
show one specimen. The paper's own phantom is the plane x = 0 at 97 voxels: `phantom(97, planes=1)`. Densities are those
of ideal mixtures, so that the core is denser than the shell; weight fractions are density over their sum.
"""

from __future__ import annotations

import numpy as np

ELEMENTS = {"Ag": 47, "Au": 79}
LINES = {"Ag": "La", "Au": "Ma"}
BEAM_KEV = 100.0
FIELD_NM = 97 * 1.5  # edge of the field of view, which is a cube
CORE, SHELL = {"Ag": 0.2, "Au": 0.8}, {"Ag": 0.8, "Au": 0.2}  # weight fractions (HEBT, Fig. 1)
DENSITY = {"Ag": 10.49, "Au": 19.3}  # [g/cm^3]
ANGLES = np.linspace(-75.0, 75.0, 31)  # [deg]
SUBSAMPLES = 4  # per axis and voxel

# HEBT states 3.121e8 electrons per pixel for EDS (0.5 s at 100 pA) and 1e5 for HAADF. With Table 2 and the solid angle
# times efficiency that its response ratios imply, 0.4 sr, that dose would give ten times the 35 (Ag) and 28 (Au) counts
# per pixel of the object at which its optima appear. That dose is therefore one tenth of the paper's.
DOSE, HAADF_DOSE = 3.121e7, 1e5
SOLID_ANGLE = 0.4  # [sr], times efficiency
COLLECTED = 0.05  # of the elastically scattered electrons: half as many as arrive, where it is thickest

_RADIUS = 48.0  # [nm], of the particle, whose outline waves by some nm
_CORE_AXES, _CORE_PLACE = (27.0, 25.0, 26.0), (3.0, -4.0, 2.0)  # (z, y, x) [nm]


def phantom(size: int, planes: int | None = None) -> np.ndarray:
    """Partial densities (element, z, y, x) [g/cm^3], float32, in size x size voxels and so many planes along x.

    planes: None for a cube; 1 is the plane in the middle, as in the paper. An uneven number has that plane.
    """
    voxel, count = FIELD_NM / size, size if planes is None else planes
    steps = (np.arange(SUBSAMPLES) + 0.5) / SUBSAMPLES - 0.5
    fine = ((np.arange(size)[:, None] + steps).ravel() - (size - 1) / 2) * voxel
    z, y = fine[:, None, None], fine[None, :, None]
    volume = np.zeros((len(ELEMENTS), size, size, count), np.float32)
    for plane in range(count):
        # One plane alone is a slice, not a slab.
        x = (plane - (count - 1) / 2 + (steps if count > 1 else np.zeros(1))) * voxel
        core, whole = (inside.reshape(size, SUBSAMPLES, size, SUBSAMPLES, -1).mean((1, 3, 4))
                       for inside in (_in_core(z, y, x), _in_particle(z, y, x)))
        for k, element in enumerate(ELEMENTS):
            volume[k, :, :, plane] = sum(share * density(part) * part[element]
                                         for share, part in ((core, CORE), (whole - core, SHELL)))
    return volume


def density(content: dict[str, float]) -> float:
    """[g/cm^3] of an ideal mixture of so many weight fractions."""
    return 1 / sum(share / DENSITY[element] for element, share in content.items())


def fractions(volume: np.ndarray) -> np.ndarray:
    """Weight fractions (element, z, y, x) of partial densities, 0 where less than half of a voxel is covered."""
    total, filled = volume.sum(0), sum(part / rho for part, rho in zip(volume, DENSITY.values()))
    return np.divide(volume, total, out=np.zeros_like(volume), where=filled >= 0.5)


def core_row(nz: int) -> int:
    """z of the middle of the core, of so many voxels."""
    return round(_CORE_PLACE[0] * nz / FIELD_NM + (nz - 1) / 2)


def profile(volume: np.ndarray, rows: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """y [nm] and values (element, y) of a volume along y through the middle of the core, a mean over some rows of z.

    HEBT's figures S1 to S3 show how sharp the boundaries of core and shell are, and how that falls with alpha.
    """
    _, nz, ny, nx = volume.shape
    first = core_row(nz) - rows // 2
    return (np.arange(ny) - (ny - 1) / 2) * FIELD_NM / ny, volume[:, first:first + rows, :, nx // 2].mean(1)


def _in_particle(z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    radius = np.sqrt(z**2 + y**2 + x**2)
    round_x = np.sqrt(z**2 + y**2) / np.maximum(radius, 1e-9)  # 1 at the equator about x, so that the outline is smooth
    angle = np.arctan2(y, z)
    wave = 1 + round_x**3 * (0.05 * np.sin(3 * angle + 0.4) + 0.03 * np.cos(5 * angle - 1))
    return radius < _RADIUS * wave


def _in_core(z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    distance: np.ndarray = sum((((a - b) / c) ** 2 for a, b, c in zip((z, y, x), _CORE_PLACE, _CORE_AXES)), np.zeros(1))
    return distance < 1
