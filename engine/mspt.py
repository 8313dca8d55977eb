"""Multislice ptychographic tomography (MSPT), stage by stage: scans become phase images, images an aligned tomogram.

Romanov et al., Multi-slice electron ptychographic tomography, J. Phys. Mater. 8, 015005 (2025): at each tilt the phases
of the slices that multislice ptychography finds are added up (`image`), as a slice is too thick to tell depths but thin
enough that the wave does not spread in it. The images are denoised, the volume and the alignment of every image are
found together at a low resolution, a mask is made of that volume, and the tomogram at full resolution of the images
inside the mask's shadow (`tomogram`). The phase of an image is the integral of the potential: V = phase / (sigma dz).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from engine import align, ptychography
from engine.data import DataError
from engine.diffraction import DiffractionSeries
from engine.iterate import Keep
from engine.projector import geometry, project

LIT = 0.05  # of the brightest pixel's electrons, from which on a pixel of the phase is trusted
SOFT = 2.0  # [voxel] that a volume is smoothed by before a mask is made of it, and the mask's edge
FIRST = 6  # rounds of the reconstruction that a mask is made of


@dataclass(frozen=True)
class Settings:
    """Numbers of a chain.

    ptychography, alignment: of the two stages. denoise: of images (tilt, y, x), None for none. mask: share of Otsu's
    threshold of the aligned volume above which lies the specimen, 0 for no mask. rounds: of the last reconstruction, of
    five steps each. blur: [voxel] of the Gaussian that its volume is made of, the paper's 0.5; 0 for none.
    """

    ptychography: ptychography.Settings = ptychography.Settings()
    alignment: align.Settings = field(default_factory=align.Settings)
    denoise: Callable[[np.ndarray], np.ndarray] | None = None
    mask: float = 0.5
    rounds: int = 20
    blur: float = 0.0


@dataclass(frozen=True)
class Image:
    """One tilt's phase. phase: (y, x) [rad], 0 in vacuum. numbers: `ptychography.reconstruct`'s metrics, and the
    `constant` [rad] and the slopes `ramp_y`, `ramp_x` [rad/pixel] that were taken off."""

    phase: np.ndarray
    numbers: dict[str, float]


@dataclass(frozen=True)
class Tomogram:
    """volume: (z, y, x) [V]. alignment: of the images to it, its gauge fixed; gauge: (2, 3), the shift (z, y, x)
    [pixel] and turn [deg] that were taken off for that. images: (tilt, y, x) [rad] that were aligned. residual, before:
    (tilt,) what they miss of the volume at last, and missed of the first one, as in `align.Joint`. mask: (z, y, x),
    None for none."""

    volume: np.ndarray
    alignment: align.Alignment
    gauge: np.ndarray
    images: np.ndarray
    residual: np.ndarray
    before: np.ndarray
    mask: np.ndarray | None


def image(series: DiffractionSeries, tilt: int, settings: ptychography.Settings, *, keep: Keep | None = None,
          fitted: np.ndarray | None = None) -> Image:
    """The phase of one tilt, as wide as the scan; DataError where the solve fails.

    fitted: (probe,) False for patterns that are held out.
    """
    found = ptychography.reconstruct(series, tilt, settings, keep=keep, fitted=fitted)
    if not found.ok:
        raise DataError(f"ptychography of tilt {tilt}: {found.status}")
    sides = scanned(series)
    light, phase = (cut(array, sides) for array in (found.fields["light"], found.volume[0].sum(0)))
    phase, plane = ptychography.levelled(phase, light > LIT)
    told = dict(zip(("constant", "ramp_y", "ramp_x"), map(float, plane)))
    return Image(np.where(light > LIT, phase, 0).astype(np.float32), found.metrics | told)


def scanned(series: DiffractionSeries) -> tuple[int, int]:
    """(y, x) pixels of what a scan covers: its positions, and half a step around them; an even number of both."""
    span = np.ptp(series.positions, axis=0) / series.pixel
    step = np.sqrt(max(span.prod(), 1.0) / max(len(series.positions), 1))
    sides = 2 * np.round((span + step) / 2).astype(int)
    return int(sides[0]), int(sides[1])


def tomogram(images: np.ndarray, angles: np.ndarray, volts: float, settings: Settings, *,
             start: align.Alignment | None = None, reference: align.Alignment | None = None,
             observe: Callable[[int, int, np.ndarray], None] | None = None) -> Tomogram:
    """Volume and alignment of phase images (tilt, y, x) [rad] at angles (tilt,) [deg] about x.

    volts: of a phase of 1 rad along a voxel. start: an alignment to begin with. reference: one to whose gauge the found
    one is brought, so that the volume lies as with it; without one, that of `start`. observe: as `align.joint` calls.
    """
    images = np.asarray(images, np.float32)
    if settings.denoise is not None:
        images = np.asarray(settings.denoise(images), np.float32)
    images = np.maximum(images, 0)
    start = start or align.Alignment.none(len(images))
    joint = align.joint(images, angles, settings.alignment, start, observe=observe)
    rest, gauge = align.ungauged(joint.alignment.less(reference or start), angles)
    found, mask, window, begun = rest.plus(reference or start), None, None, None
    if settings.mask > 0:
        begun, _ = align.reconstructed(images, angles, found, rounds=FIRST)
        mask = outline(begun, settings.mask)
        window = shadow(mask, angles + found.tilt)
    volume, residual = align.reconstructed(images, angles, found, rounds=settings.rounds, blur=settings.blur,
                                           start=begun, window=window)
    return Tomogram(volts * volume, found, gauge, images, residual, joint.before, mask)


def outline(volume: np.ndarray, share: float) -> np.ndarray:
    """(z, y, x) where a specimen is, 0 to 1: its volume, smoothed, is above a share of Otsu's threshold between it and
    nothing (the paper's binarisation and blurring)."""
    smooth = ndimage.gaussian_filter(volume, SOFT)
    if not np.ptp(smooth) > 0:
        raise DataError("the aligned volume is empty, so that no mask can be made of it; look at the phase images")
    inside = ndimage.binary_fill_holes(smooth > share * threshold_otsu(smooth)).astype(np.float32)
    return np.clip(ndimage.gaussian_filter(inside, SOFT), 0, 1)


def shadow(mask: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """(tilt, y, x) 1 where a beam passes the mask, falling to 0 over its soft edge."""
    return np.clip(np.asarray(project(jnp.asarray(mask), geometry(angles), mask.shape[1])), 0, 1)


def cut(array: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """The middle of fields (..., y, x) that are as wide or wider, by an even number of pixels."""
    first = [(have - side) // 2 for have, side in zip(array.shape[-2:], sides)]
    return array[..., first[0]:first[0] + sides[0], first[1]:first[1] + sides[1]]
