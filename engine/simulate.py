"""Simulated measurements of a known specimen: clean projections, the paper's background, Poisson noise to an SNR."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from engine.align import Alignment
from engine.data import DataError, MultiModal, TiltSeries, even_subset
from engine.projector import geometry, project
from engine.sizes import bucket


def spread(tilt_range: tuple[float, float], count: int) -> np.ndarray:
    """`count` angles [deg] spread evenly over a range, both ends included; a single one lies in the middle."""
    low, high = tilt_range
    return np.linspace(low, high, count) if count > 1 else np.full(count, (low + high) / 2)


def chemical_angles(tilt_range: tuple[float, float], haadf: int, chem: int, choice: str = "subset") -> np.ndarray:
    """Angles [deg] of the maps: as evenly spread as can be among the HAADF angles, since every real map comes with
    an image; where there are more maps than images, or for `even`, spread evenly on their own."""
    images = spread(tilt_range, haadf)
    if choice == "even" or chem > haadf:
        return spread(tilt_range, chem)
    return images[even_subset(haadf, chem)]


def clean_projections(volume: np.ndarray, angles: np.ndarray, pixels: int) -> np.ndarray:
    """Line integrals (element, tilt, y, x), in voxel lengths, of (element, z, y, x) at angles [deg]."""
    rays = geometry(angles, bucket(len(angles)))
    return np.stack([np.asarray(project(jnp.asarray(v), rays, pixels))[:len(angles)] for v in volume])


Place = Callable[[np.ndarray, np.ndarray], np.ndarray]  # clean images and angles to where the detector has them


def misplaced(clean: np.ndarray, alignment: Alignment, margin: int, fine: int = 1) -> np.ndarray:
    """Clean projections (element, tilt, y, x) as an alignment says that they lie, on a detector that is wider by so
    many pixels on each side.

    fine: pixels of `clean` along the edge of one of the detector's. They are moved along cubic splines, never below 0,
    and then averaged: what a pixel's own width does to a moved image is that of any image.
    """
    edge = fine * margin
    wide = np.pad(clean, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    middle = (np.array(wide.shape[2:]) - 1) / 2
    for tilt, (shift, turn) in enumerate(zip(alignment.shifts, np.radians(alignment.inplane), strict=True)):
        back = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        for image in wide[:, tilt]:
            image[:] = ndimage.affine_transform(image, back, middle - back @ (middle + fine * shift))
    ny, nx = (n // fine for n in wide.shape[2:])
    return np.maximum(wide, 0).reshape(*wide.shape[:2], ny, fine, nx, fine).mean((3, 5))


def poisson_series(clean: np.ndarray, snr: np.ndarray, background: float, rng: np.random.Generator,
                   placed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, counts per unit of `clean`, and the flat background [counts], of projections (element, tilt, y, x).

    The background is a share of each element's brightest clean pixel (F3: 15 %). For Poisson noise the paper's
    SNR = (mu + mu^2) / sigma^2 is 1 + mu, with mu the mean over all pixels and tilts, background included: that
    fixes the dose. placed: the clean projections as they lie on the detector, which is then what is drawn from.
    """
    snr = np.asarray(snr, np.float64)
    if (snr <= 1).any():
        raise DataError(f"an SNR of {snr.min():g} cannot be had: Poisson counts have SNR 1 + mean, above 1")
    offset = background * clean.max((1, 2, 3))
    gain = (snr - 1) / (clean.mean((1, 2, 3), dtype=np.float64) + offset)
    expected = gain[:, None, None, None] * ((clean if placed is None else placed) + offset[:, None, None, None])
    return rng.poisson(expected).astype(np.float32), gain, gain * offset


def multimodal(truth: np.ndarray, numbers: tuple[int, ...], elements: tuple[str, ...], *, pixel_size: float,
               haadf_angles: np.ndarray, chem_angles: np.ndarray, snr: dict[str, float], gamma: float = 1.6,
               background: float = 0.15, background_known: bool = True, weights: str = "z_gamma",
               seed: int | list[int] = 0, place: Place | None = None,
               fine: int = 1) -> MultiModal:
    """A HAADF series and chemical maps of `truth` (element, z, y, x), after F3 (Methods).

    HAADF is linear in sum (Z x)^gamma, taken per voxel, and Poisson distributed without background. An empty
    haadf_angles gives maps alone. snr: by element, and "haadf". background_known: whether the solver is told.
    place: of misaligned series, which are as bright as they would be aligned, and have no truth; `truth` may then have
    voxels of which so many, `fine`, lie along the edge of a pixel.
    """
    pixels = truth.shape[2]
    clean = clean_projections(truth, chem_angles, pixels) / np.float32(fine)
    maps, gain, offset = poisson_series(clean, np.array([snr[e] for e in elements]), background,
                                        np.random.default_rng([1, *np.atleast_1d(seed)]),
                                        None if place is None else place(clean, chem_angles))
    chem = TiltSeries(maps, chem_angles, elements, pixel_size, "counts",
                      offset[:, None, None, None] if background_known else 0.0)
    haadf = None
    if len(haadf_angles):
        weight = np.asarray(numbers, np.float64) ** (gamma if weights == "z_gamma" else 1)
        scatter = np.tensordot(weight / weight.max(), truth.astype(np.float64) ** gamma, 1)[None]
        clean = clean_projections(scatter.astype(np.float32), haadf_angles, pixels) / np.float32(fine)
        images, *_ = poisson_series(clean, np.array([snr["haadf"]]), 0.0,
                                    np.random.default_rng([2, *np.atleast_1d(seed)]),
                                    None if place is None else place(clean, haadf_angles))
        haadf = TiltSeries(images, haadf_angles, ("HAADF",), pixel_size, "intensity",
                           noise=np.sqrt([images.mean()]))
    if place is not None:
        return MultiModal(chem, haadf, numbers, maps.shape[2:3] * 2 + maps.shape[3:], gain)
    return MultiModal(chem, haadf, numbers, truth.shape[1:], gain, truth)


def microscopy(truth: np.ndarray, numbers: tuple[int, ...], elements: tuple[str, ...], *, pixel_size: float,
               snr: dict[str, float] | None = None, dose: float = 0.0, yields: dict[str, float] | None = None,
               gamma: float = 1.7, background: float = 0.0, background_known: bool = True,
               weights: str = "z_gamma_linear", seed: int | list[int] = 0) -> MultiModal:
    """A HAADF image and the maps taken with it, of `truth` (element, 1, y, x), after F2 (Methods).

    snr: by element, and "haadf". Without it dose [electrons per pixel] and yields: counts per electron where an element
    has concentration 1, and of "haadf" where the heaviest has. weights: the image is linear in Z^gamma x, as where
    thickness varies (z_gamma_linear), or in (Z x)^gamma (z_gamma); Poisson distributed counts, without background.
    """
    weight = np.asarray(numbers, np.float64) ** gamma
    power = gamma if weights == "z_gamma" else 1.0
    image = np.tensordot(weight / weight.max(), truth.astype(np.float64) ** power, 1)[None].astype(np.float32)
    drawn = {}
    for k, (clean, offset, names) in enumerate(((truth, background, elements), (image, 0.0, ("haadf",)))):
        if snr is None:
            level = clean.mean((1, 2, 3), dtype=np.float64) + offset * clean.max((1, 2, 3))
            wanted = 1 + dose * np.array([(yields or {})[name] for name in names]) * level
        else:
            wanted = np.array([snr[name] for name in names])
        drawn[names] = poisson_series(clean, wanted, offset, np.random.default_rng([k + 1, *np.atleast_1d(seed)]))
    (maps, gain, level), (images, *_) = drawn.values()
    chem = TiltSeries(maps, np.zeros(1), elements, pixel_size, "counts",
                      level[:, None, None, None] if background_known else 0.0)
    haadf = TiltSeries(images, np.zeros(1), ("HAADF",), pixel_size, "counts", noise=np.sqrt([images.mean()]))
    return MultiModal(chem, haadf, numbers, truth.shape[1:], gain, truth)
