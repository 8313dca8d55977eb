"""What a microscope delivers and what a solver returns: frozen records, checked when they are made.

Arrays are C-ordered float32. Volumes are (element, z, y, x), projections (element, tilt, y, x). x is the tilt
axis. The beam runs along z at 0 degrees; a positive angle turns the specimen's +z toward +y, so a voxel lands on
the detector at y' = y cos(angle) + z sin(angle), with coordinates counted from the array's centre, i - (n - 1) / 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Units = Literal["counts", "net_counts", "atomic_percent", "intensity"]


class DataError(ValueError):
    """Data that cannot be reconstructed; the message is one sentence: what is wrong, where, and the next step."""


class DataWarning(UserWarning):
    """What can be reconstructed, but should not be believed in every respect."""


@dataclass(frozen=True)
class TiltSeries:
    """The projections of one modality.

    projections: (element, tilt, y, x), float32, in `units`; HAADF has the single element "HAADF".
    angles: (tilt,) in degrees.
    elements: one name per first index.
    pixel_size: [nm].
    units: `counts` are Poisson distributed; everything else is compared by least squares.
    background: broadcastable to projections, in `units`; a known part of the model, not subtracted.
    noise: (element,) standard deviation of one pixel, in `units`; None where it is not known
        (then it is estimated from the images by `noise_level`).
    """

    projections: np.ndarray
    angles: np.ndarray
    elements: tuple[str, ...]
    pixel_size: float
    units: Units = "counts"
    background: np.ndarray | float = 0.0
    noise: np.ndarray | None = None

    def __post_init__(self) -> None:
        name = "/".join(self.elements)
        projections = np.ascontiguousarray(self.projections, dtype=np.float32)
        angles = np.asarray(self.angles, dtype=np.float64)
        if projections.ndim != 4:
            raise DataError(f"{name}: projections have {projections.ndim} axes; (element, tilt, y, x) are needed")
        if projections.shape[0] != len(self.elements):
            raise DataError(f"{name}: {projections.shape[0]} stacks of projections for {len(self.elements)} elements")
        if angles.shape != (projections.shape[1],):
            raise DataError(f"{name}: {angles.size} angles for {projections.shape[1]} projections")
        if projections.shape[1] == 0 or 0 in projections.shape[2:]:
            raise DataError(f"{name}: there are no projections (shape {projections.shape})")
        if not np.isfinite(projections).all():
            bad = int((~np.isfinite(projections)).sum())
            raise DataError(f"{name}: {bad} pixels are NaN or infinite; mask or repair them first")
        if not np.isfinite(angles).all() or np.abs(angles).max() > 180:
            raise DataError(f"{name}: angles must be finite and within +-180 degrees")
        if self.pixel_size <= 0 or not np.isfinite(self.pixel_size):
            raise DataError(f"{name}: the pixel size is {self.pixel_size} nm; it must be positive")
        if self.units == "counts" and projections.min() < 0:
            raise DataError(f"{name}: counts cannot be negative (minimum {projections.min():g}); "
                            "give units: net_counts if a background was subtracted")
        for element, stack in zip(self.elements, projections):
            if not stack.any():
                raise DataError(f"{element}: every pixel of its maps is zero; leave the element out")
        background = np.asarray(self.background, dtype=np.float32)
        try:
            np.broadcast_shapes(background.shape, projections.shape)
        except ValueError:
            raise DataError(f"{name}: a background of shape {background.shape} does not fit projections "
                            f"of shape {projections.shape}") from None
        if background.size and (not np.isfinite(background).all() or background.min() < 0):
            raise DataError(f"{name}: the background must be finite and not negative")
        object.__setattr__(self, "projections", projections)
        object.__setattr__(self, "angles", angles)
        object.__setattr__(self, "background", background)
        if self.noise is not None:
            noise = np.broadcast_to(np.asarray(self.noise, dtype=np.float64), (len(self.elements),))
            if not (np.isfinite(noise).all() and (noise > 0).all()):
                raise DataError(f"{name}: the noise must be positive")
            object.__setattr__(self, "noise", noise)

    @property
    def tilts(self) -> int:
        return self.projections.shape[1]

    def noise_level(self, without: tuple[int, ...] = ()) -> np.ndarray:
        """(element,) standard deviation of one pixel's noise: as given, else `estimate_noise` of the images.

        without: tilts that the estimate must not see.
        """
        if self.noise is not None:
            return np.asarray(self.noise)
        return np.array([estimate_noise(np.delete(stack, without, 0)) for stack in self.projections])


def estimate_noise(images: np.ndarray) -> float:
    """Standard deviation of the pixel noise of images (..., y, x), from 2 x 2 diagonal differences.

    (a - b - c + d) / 2 has the noise's own variance and cancels every plane. Its median size over the pixels brighter
    than the median tells the noise where the signal is, and edges, being few, hardly move it.
    """
    images = np.asarray(images, dtype=np.float64)
    corners = images[..., :-1, :-1], images[..., :-1, 1:], images[..., 1:, :-1], images[..., 1:, 1:]
    detail = np.abs(corners[0] - corners[1] - corners[2] + corners[3]) / 2
    level = sum(corners)
    bright = detail[level > np.median(level)]
    sigma = 1.4826 * float(np.median(bright)) if bright.size else 0.0
    # A noise-free image has no level of its own: a thousandth of its mean is finer than any detector.
    return max(sigma, 1e-3 * float(np.abs(images).mean()), float(np.finfo(np.float32).tiny))


def even_subset(total: int, count: int) -> np.ndarray:
    """Indices of `count` of `total` items, as evenly spread as can be, ends included."""
    if count == 1:
        return np.array([(total - 1) // 2])
    return np.round(np.linspace(0, total - 1, count)).astype(int)


@dataclass(frozen=True)
class MultiModal:
    """A HAADF series and chemical maps of one specimen, on one detector grid.

    haadf: None for conventional chemical tomography.
    numbers: atomic number of each element of `chem`.
    sensitivity: (element,) counts per pixel that a path of one voxel at concentration 1 gives; None where unknown
        (then the solver fits it from the HAADF series).
    shape: (nz, ny, nx) of the volume; voxels have the size of a pixel.
    truth: (element, z, y, x) concentrations, for simulated data; None where unknown.
    """

    chem: TiltSeries
    haadf: TiltSeries | None
    numbers: tuple[int, ...]
    shape: tuple[int, int, int]
    sensitivity: np.ndarray | None = None
    truth: np.ndarray | None = None

    def __post_init__(self) -> None:
        elements = self.chem.elements
        if len(self.numbers) != len(elements):
            raise DataError(f"{len(self.numbers)} atomic numbers for {len(elements)} elements")
        if self.haadf is not None:
            if len(self.haadf.elements) != 1:
                raise DataError("HAADF must be a single series of images")
            if self.haadf.projections.shape[2:] != self.chem.projections.shape[2:]:
                raise DataError(f"HAADF images are {self.haadf.projections.shape[2:]} pixels (y, x) and maps are "
                                f"{self.chem.projections.shape[2:]}; crop or bin them to one grid")
            if not np.isclose(self.haadf.pixel_size, self.chem.pixel_size, rtol=1e-3):
                raise DataError(f"HAADF pixels are {self.haadf.pixel_size} nm and map pixels "
                                f"{self.chem.pixel_size} nm; bin them to one size")
        if self.shape[2] != self.chem.projections.shape[3]:
            raise DataError(f"the volume has {self.shape[2]} planes along the tilt axis x, the maps have "
                            f"{self.chem.projections.shape[3]} pixels")
        if self.sensitivity is not None:
            sensitivity = np.asarray(self.sensitivity, dtype=np.float64)
            if sensitivity.shape != (len(elements),) or not (sensitivity > 0).all():
                raise DataError("the sensitivity must be one positive number per element")
            object.__setattr__(self, "sensitivity", sensitivity)
        if self.truth is not None:
            truth = np.ascontiguousarray(self.truth, dtype=np.float32)
            if truth.shape != (len(elements), *self.shape):
                raise DataError(f"the truth has shape {truth.shape}; the reconstruction has "
                                f"{(len(elements), *self.shape)}")
            object.__setattr__(self, "truth", truth)


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    volume: (element, z, y, x) concentrations; where sensitivities are unknown, in units stated by `metrics`.
    fields: further arrays by name (standard error, shifts, ...).
    history: cost terms by name, (iteration,), the start first.
    metrics: scalars by name.
    status: a sentence; `ok` says whether the volume may be used.
    """

    volume: np.ndarray
    history: dict[str, np.ndarray]
    status: str
    ok: bool = True
    metrics: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, np.ndarray] = field(default_factory=dict)
