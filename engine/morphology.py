"""Particles in a volume: how many, how large, and how their composition changes from the surface inward.

Volumes are (z, y, x), lengths nm. A particle is what is connected above a threshold; particles that touch are parted
where the distance to the surface has a waist (a watershed on it). No JAX.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from engine.data import DataError
from engine.resolution import edge_width

LEAST = 8  # voxels of a particle at least
WAIST = 0.75  # of the smaller particle's half width, that a waist is below where two are told apart
FEW = 20  # voxels of a depth that a profile is told from


@dataclass(frozen=True)
class Particles:
    """labels: (z, y, x), 0 outside, the particle's number from 1 on inside. centres: (particle, 3), z, y, x [nm] from
    the middle of the volume. volumes: (particle,) [nm^3]. cut: (particle,) True where it reaches the volume's end.
    threshold: above which they lie."""

    labels: np.ndarray
    centres: np.ndarray
    volumes: np.ndarray
    cut: np.ndarray
    threshold: float

    @property
    def diameters(self) -> np.ndarray:
        """(particle,) [nm] of balls of the same volume."""
        found: np.ndarray = np.cbrt(6 / np.pi * self.volumes)
        return found

    def spread(self) -> tuple[float, float]:
        """Mean and standard deviation of the diameters [nm] of whole particles; NaN where there are none."""
        whole = self.diameters[~self.cut]
        return (float(whole.mean()), float(whole.std())) if len(whole) else (float("nan"), float("nan"))


@dataclass(frozen=True)
class Profile:
    """Mean composition below the surface of whole particles. depth: (bin,) [nm], from 0 at the surface inward.
    values: (element, bin). number: (bin,) voxels."""

    depth: np.ndarray
    values: np.ndarray
    number: np.ndarray

    def shell(self, shell: int, core: int) -> tuple[float, float]:
        """Thickness [nm] of a shell and its standard error: the depth at which its share of the two elements has
        fallen halfway. DataError where it does not fall."""
        both = self.values[[shell, core]]
        usable = both.sum(0) > 0
        share = both[0, usable] / both[:, usable].sum(0)
        if len(share) < 5:
            raise DataError(f"the particles are {len(share)} voxels deep; a shell shows in 5 or more")
        edge = edge_width(share, float(self.depth[1] - self.depth[0]))
        first, last = share[:2].mean(), share[-2:].mean()
        if not first > last or not 0 < edge.centre < self.depth[usable][-1] - self.depth[usable][0]:
            raise DataError("the outer element does not fall inward; there is no shell of it")
        return float(self.depth[usable][0] + edge.centre), edge.error


def particles(volume: np.ndarray, voxel: float, *, threshold: float | None = None, least: float = 0.0) -> Particles:
    """Particles above a threshold, by default Otsu's. voxel: [nm]. least: [nm] diameter below which they do not count.

    Raises DataError where there are none.
    """
    volume = np.asarray(volume, np.float64)
    if volume.ndim != 3 or not np.isfinite(volume).all():
        raise DataError(f"particles are sought in a finite volume (z, y, x), not in one of shape {volume.shape}")
    if threshold is None:
        if volume.min() == volume.max():
            raise DataError("the volume is the same everywhere; there is no particle in it")
        threshold = float(threshold_otsu(volume))
    inside = volume > threshold
    labels = _parted(inside)
    counts = np.bincount(labels.ravel())[1:]
    kept = 1 + np.flatnonzero(counts * voxel**3 >= max(LEAST * voxel**3, np.pi / 6 * least**3))
    if not len(kept):
        raise DataError(f"no particle of {least:g} nm or more lies above {threshold:.3g}")
    renamed = np.zeros(len(counts) + 1, int)
    renamed[kept] = 1 + np.arange(len(kept))
    labels = renamed[labels]
    middle = (np.array(volume.shape) - 1) / 2
    centres = (np.array(ndimage.center_of_mass(labels > 0, labels, 1 + np.arange(len(kept)))) - middle) * voxel
    rim = np.ones(volume.shape, bool)
    rim[1:-1, 1:-1, 1:-1] = False
    cut = np.isin(1 + np.arange(len(kept)), labels[rim])
    return Particles(labels, centres, counts[kept - 1] * voxel**3, cut, float(threshold))


def _parted(inside: np.ndarray) -> np.ndarray:
    """Numbers of the parts, which touch at waists alone."""
    depth = ndimage.distance_transform_edt(inside)
    if not inside.any():
        return np.zeros(inside.shape, int)
    smooth = ndimage.gaussian_filter(depth, 1.0)
    connected, _ = ndimage.label(inside)
    tops = peak_local_max(smooth, labels=connected, min_distance=2, exclude_border=False)
    tops = tops[np.argsort(-smooth[tuple(tops.T)], kind="stable")]
    kept: list[np.ndarray] = []
    for top in tops:
        if all(connected[tuple(top)] != connected[tuple(other)] or _waist(smooth, top, other) for other in kept):
            kept.append(top)
    seeds = np.zeros(inside.shape, int)
    for number, top in enumerate(kept, 1):
        seeds[tuple(top)] = number
    found: np.ndarray = watershed(-smooth, seeds, mask=inside)
    return found


def _waist(depth: np.ndarray, lower: np.ndarray, higher: np.ndarray) -> bool:
    """Whether the way from one top to another passes a place much nearer to the surface."""
    steps = 2 * int(np.abs(lower - higher).max()) + 1
    way = np.linspace(lower, higher, steps).T
    return bool(ndimage.map_coordinates(depth, way, order=1).min() < WAIST * depth[tuple(lower)])


def profile(volumes: np.ndarray, found: Particles, voxel: float) -> Profile:
    """Means of elements (element, z, y, x) at each depth below the surfaces of whole particles, a voxel apart.

    Raises DataError where all particles are cut.
    """
    whole = np.isin(found.labels, 1 + np.flatnonzero(~found.cut))
    if not whole.any():
        raise DataError("all particles reach the end of the volume; no profile can be told")
    depth = (ndimage.distance_transform_edt(whole)[whole] - 0.5) * voxel
    index = np.floor(depth / voxel).astype(int)
    number = np.bincount(index)
    last = int(np.flatnonzero(number >= FEW)[-1]) + 1 if (number >= FEW).any() else len(number)
    sums = np.stack([np.bincount(index, each[whole])[:last] for each in np.asarray(volumes, np.float64)])
    mean_depth = np.bincount(index, depth)[:last] / np.maximum(number[:last], 1)
    filled = number[:last] > 0
    even = (np.arange(last) + 0.5) * voxel
    depths = np.where(filled, mean_depth, even)
    values = np.stack([np.interp(even, depths[filled], (each / np.maximum(number[:last], 1))[filled]) for each in sums])
    return Profile(even, values, number[:last])
