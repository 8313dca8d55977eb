"""HAADF and X-ray signals of one specimen from one set of cross sections (HEBT, Eq. 4 and 13), with Poisson noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data import DataError, MultiModal, TiltSeries
from engine.phantoms_hebt import COLLECTED, DOSE, HAADF_DOSE, SOLID_ANGLE
from engine.physics import AVOGADRO, Emission, atomic_number
from engine.simulate import clean_projections


def bimodal(truth: np.ndarray, lines: Sequence[Emission], *, pixel_size: float, chem_angles: np.ndarray,
            haadf_angles: np.ndarray | None = None, dose: float = DOSE, haadf_dose: float = HAADF_DOSE,
            solid_angle: float = SOLID_ANGLE, efficiency: float | Sequence[float] = 1.0, collected: float = COLLECTED,
            visible: np.ndarray | float = 1.0, background: float = 0.0, noise: bool = True,
            seed: int | list[int] = 0) -> MultiModal:
    """HAADF images and X-ray maps, in counts, of partial densities `truth` (element, z, y, x) [g/cm^3].

    lines: of each element. pixel_size: [nm]. haadf_angles [deg]: those of the maps by default; empty: no images.
    dose, haadf_dose: electrons per pixel and tilt. solid_angle: [sr]. efficiency: of the detector, for each line.
    collected: share of the elastically scattered electrons on the HAADF detector. visible: share of the X-ray detector
    that the holder does not hide, (tilt,). background: flat and known, in counts per pixel of the maps. noise: Poisson,
    or none. Both signals are linear: thin films, scattered once.
    """
    if len(lines) != len(truth):
        raise DataError(f"{len(lines)} lines for {len(truth)} elements; give one each")
    chem_angles = np.asarray(chem_angles, float)
    haadf_angles = chem_angles if haadf_angles is None else np.asarray(haadf_angles, float)
    per_voxel = AVOGADRO * pixel_size  # of a path of one voxel at 1 g/cm^3
    found = np.broadcast_to(np.asarray(efficiency, float), (len(lines),))
    sensitivity = np.array([dose * solid_angle / (4 * np.pi) * per_voxel * line.f(float(e))
                            for line, e in zip(lines, found)])
    scattered = haadf_dose * collected * per_voxel * np.array([line.z for line in lines])
    seen = np.broadcast_to(np.asarray(visible, float), chem_angles.shape)[:, None, None]
    maps = seen * clean_projections(truth, chem_angles, truth.shape[2]) * _column(sensitivity) + background
    images = np.zeros((1, 0, *maps.shape[2:]))
    if haadf_angles.size:
        images = (clean_projections(truth, haadf_angles, truth.shape[2]) * _column(scattered)).sum(0, keepdims=True)
    if noise:
        maps, images = (np.random.default_rng([k, *np.atleast_1d(seed)]).poisson(np.maximum(clean, 0))
                        for k, clean in enumerate((maps, images), 1))
    names = tuple(line.element for line in lines)
    chem = TiltSeries(maps, chem_angles, names, pixel_size, "counts", background)
    haadf = None
    if haadf_angles.size:
        haadf = TiltSeries(images, haadf_angles, ("HAADF",), pixel_size, "counts", noise=np.sqrt(images.mean()))
    return MultiModal(chem, haadf, tuple(atomic_number(name) for name in names), truth.shape[1:], sensitivity, truth)


def _column(values: np.ndarray) -> np.ndarray:
    return values[:, None, None, None]
