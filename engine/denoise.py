"""Denoising of projections before tomography: non-local means, BM3D, and the Fourier peaks of a single grain.

Romanov et al., Multi-slice electron ptychographic tomography, section 2.2: BM3D, then a Fourier-sparsity constraint,
for a specimen of one grain. BM3D is an extra, `pip install 'tomoatlas[bm3d]'`: its licence (Tampere University) allows
non-commercial use only. Images are (y, x), in any unit; strengths are in units of the noise, 0 changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import fft, ndimage
from skimage.restoration import denoise_nl_means

from engine.data import DataError

Method = Literal["none", "nlm", "bm3d"]

# I. Daubechies' wavelet with two vanishing moments, its high-pass filter: what `skimage.restoration.estimate_sigma`
# takes, which needs PyWavelets for it.
_HIGH = (-0.4829629131445341, 0.8365163037378079, -0.2241438680420134, -0.1294095225512604)
MEDIAN = 0.6744897501960817  # of the modulus of a normal variable of variance 1
PATCH, DISTANCE = 5, 9  # pixels of non-local means: an edge of what is compared, and how far away
LOW = 0.03  # [1/pixel] below which a specimen's outline is, and every frequency is kept
RINGS = 48  # in which the noise of a spectrum is found
NEAR = 3  # frequencies along an edge of what is kept around one that stands out


@dataclass(frozen=True)
class Settings:
    """method: `nlm`, `bm3d` or `none`, and its strength: 1 is what BM3D is made for; of non-local means on a grain at
    26, 16 and 10 dB 0.6 was within 0.5 dB of the best each time, 0.8, which scikit-image advises, within 1.6 dB.
    sparsity: strength of the Fourier threshold afterwards, 1 for the universal one, 0 for none. soft: whether kept
    frequencies are made weaker by the threshold."""

    method: Method = "nlm"
    strength: float = 0.6
    sparsity: float = 0.0
    soft: bool = False


def denoise(image: np.ndarray, settings: Settings | None = None, noise: float | None = None) -> np.ndarray:
    """An image denoised as the settings say. noise: standard deviation in a pixel, estimated where None."""
    settings = settings or Settings()
    methods = {"none": lambda image, *_: _image(image), "nlm": nonlocal_means, "bm3d": bm3d}
    if settings.method not in methods:
        raise DataError(f"{settings.method} is no way to denoise; {', '.join(methods)} are")
    return fourier_sparsity(methods[settings.method](image, settings.strength, noise), settings.sparsity,
                            soft=settings.soft)


def noise_level(image: np.ndarray) -> float:
    """Standard deviation of white noise: the median modulus of the finest diagonal wavelet detail over MEDIAN.

    D. Donoho, I. Johnstone, Biometrika 81, 425 (1994). What the image itself has at such frequencies counts as noise,
    and noise that is correlated between pixels is taken for less.
    """
    detail = ndimage.convolve1d(ndimage.convolve1d(_image(image).astype(np.float64), _HIGH, 0), _HIGH, 1)
    detail = np.abs(detail[2:-2, 2:-2])  # the rim sees the image's mirror
    moving = detail[detail > 0]
    # A frame of zeros, vacuum that was cut away, has no detail and says nothing of the noise.
    return float(np.median(moving)) / MEDIAN if moving.size else 0.0


def nonlocal_means(image: np.ndarray, strength: float = 0.6, noise: float | None = None) -> np.ndarray:
    """Each pixel is the mean of those whose surroundings look alike (A. Buades et al., CVPR 2005), by scikit-image.

    strength: how unlike they may be, in units of the noise.
    """
    image, noise = _image(image), _noise(image, strength, noise)
    if strength * noise == 0:
        return image
    found: np.ndarray = denoise_nl_means(image, PATCH, DISTANCE, h=strength * noise, sigma=noise, preserve_range=True)
    return found.astype(np.float32)


def bm3d(image: np.ndarray, strength: float = 1.0, noise: float | None = None) -> np.ndarray:
    """Alike patches are stacked and shrunk together in a transform (K. Dabov et al., IEEE Trans. Image Process. 16,
    2080 (2007)), by the authors' package. strength: the noise that it is told of, over the noise."""
    image, noise = _image(image), _noise(image, strength, noise)
    if strength * noise == 0:
        return image
    try:
        import bm3d as package
    except ImportError:
        raise DataError("BM3D comes from the package bm3d, which is not installed: pip install 'tomoatlas[bm3d]'. Its "
                        "licence allows non-commercial use only; method nlm is free of that") from None
    low = float(image.min())  # patches are compared by distance alone, so that the offset does not matter
    scale = float(np.ptp(image))
    found: np.ndarray = package.bm3d((image.astype(np.float64) - low) / scale, strength * noise / scale)
    return (found * scale + low).astype(np.float32)


def fourier_sparsity(image: np.ndarray, strength: float = 1.0, noise: float | None = None, *, low: float = LOW,
                     soft: bool = False) -> np.ndarray:
    """Only those frequencies of an image that stand out of the noise, and all below `low` [1/pixel] (section 2.2).

    Of the power in each of RINGS rings the median over ln 2 is the noise's mean, and no more than white noise of
    `noise` in a pixel has, estimated where None: a grain's outline fills inner rings, and is no noise. A frequency
    stands out if its power is strength^2 ln(pixels) times as high, which at strength 1 noise alone reaches once in an
    image; its neighbours, which tell how far the grain reaches, are kept with it. soft: what is kept is made weaker by
    the threshold. The image is taken to be periodic, and so a shift by whole pixels commutes with this.
    """
    image, noise = _image(image), _noise(image, strength, noise)
    if strength == 0:
        return image
    spectrum = fft.fft2(image.astype(np.float64))
    power = np.abs(spectrum) ** 2
    radius = np.hypot(*np.meshgrid(*[fft.fftfreq(n) for n in image.shape], indexing="ij"))
    ring = np.minimum((radius * 2 * RINGS).astype(int), RINGS - 1)  # the corners are one ring
    level = np.maximum(ndimage.median(power, ring, np.arange(RINGS)), 0) / np.log(2)
    level = np.minimum(level, image.size * noise**2)
    threshold = strength**2 * np.log(image.size) * np.nan_to_num(level)[ring]
    kept = ndimage.maximum_filter(power > threshold, NEAR, mode="wrap")
    gain = kept.astype(np.float64)
    if soft:
        gain *= np.maximum(1 - np.sqrt(np.divide(threshold, power, out=np.ones_like(power), where=power > 0)), 0)
    found: np.ndarray = fft.ifft2(np.where(radius < low, 1, gain) * spectrum).real
    return found.astype(np.float32)


def _image(image: np.ndarray) -> np.ndarray:
    found = np.asarray(image, np.float32)
    if found.ndim != 2 or min(found.shape) < 16 or not np.isfinite(found).all():
        raise DataError("denoising needs finite images (y, x) of 16 pixels or more along each axis; this one has shape "
                        f"{found.shape}")
    return found


def _noise(image: np.ndarray, strength: float, noise: float | None) -> float:
    if strength < 0 or (noise is not None and noise < 0):
        raise DataError("a strength or a noise below 0 means nothing; a strength of 0 changes nothing")
    if noise is None:
        return noise_level(image) if strength > 0 else 0.0
    return noise
