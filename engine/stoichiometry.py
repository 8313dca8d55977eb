"""Concentrations in percent from recovered maps (F2, "Quantifying Chemical Concentration"): shares, regions, peaks.

Imports without JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.data import DataError

EM_STEPS = 200  # of the mixture that the fit to the histogram starts from; it settles in some tens


@dataclass(frozen=True)
class Peak:
    """A Gaussian in a histogram of concentrations: mean and sigma in their unit, share: of all its pixels."""

    mean: float
    sigma: float
    share: float


@dataclass(frozen=True)
class Histogram:
    """Pixels by concentration: `counts` (bin,) between `edges` (bin + 1,), and the Gaussians fitted, by mean."""

    counts: np.ndarray
    edges: np.ndarray
    peaks: tuple[Peak, ...]


def relative(volume: np.ndarray) -> np.ndarray:
    """Each map over the sum of maps, (element, ...), in percent; NaN where there is nothing."""
    x = np.asarray(volume, np.float64)
    total = x.sum(0)
    share: np.ndarray = 100 * x / np.where(total > 0, total, np.nan)
    return share


def region(maps: np.ndarray, low: float = 0.1, high: float = np.inf, *, margin: int = 0) -> np.ndarray:
    """Where the sum of maps (element, ...), or a single map, lies between two shares of its 99th percentile.

    margin: pixels that are taken off at its edge, where two phases share a pixel.
    """
    from scipy.ndimage import binary_erosion

    x = np.asarray(maps, np.float64)
    total = x.sum(0) if x.ndim == 4 else x
    peak = np.percentile(total, 99)
    inside = (total > low * peak) & (total <= high * peak)
    if margin:
        # A plane has no edge along z.
        inside = binary_erosion(inside, np.ones((1, 3, 3), bool), margin, border_value=1)
    if not inside.any():
        raise DataError(f"no pixel lies between {low:g} and {high:g} of the brightest percent; lower the threshold")
    return inside


def histogram(values: np.ndarray, peaks: int = 1, bins: int = 100) -> Histogram:
    """The histogram of some pixels' concentrations, and the Gaussians that fit it best.

    values: any shape; NaN is left out. peaks: how many phases there are. The Gaussians are fitted to the histogram by
    least squares, as in F2: what lies in its tails hardly moves them. DataError where there are too few pixels.
    """
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if known.size < 10 * peaks:
        raise DataError(f"{known.size} pixels are too few to fit {peaks} Gaussians; widen the region")
    middle = np.percentile(known, (25, 75))
    spread = max(middle[1] - middle[0], 1e-9 * max(1.0, abs(middle[0])))
    # Pixels far out would leave a histogram of one bin.
    near = known[(known >= middle[0] - 5 * spread) & (known <= middle[1] + 5 * spread)]
    low, high = near.min(), near.max()
    room = 0.05 * (high - low) + 1e-9 * max(1.0, abs(high))
    counts, edges = np.histogram(near, bins, (low - room, high + room))
    return Histogram(counts, edges, _fitted(counts, edges, _mixture(near, peaks)))


def _mixture(values: np.ndarray, peaks: int) -> np.ndarray:
    """(peak, 3) share, mean and sigma of a Gaussian mixture, by expectation maximisation from even quantiles."""
    mean = np.quantile(values, (np.arange(peaks) + 0.5) / peaks)
    least = 1e-3 * max(values.std(), 1e-12)
    sigma, share = np.full(peaks, max(values.std() / peaks, least)), np.full(peaks, 1 / peaks)
    sample = values if len(values) <= 20000 else np.random.default_rng(0).choice(values, 20000, replace=False)
    for _ in range(EM_STEPS if peaks > 1 else 1):
        log = np.log(share) - np.log(sigma) - (sample[:, None] - mean) ** 2 / (2 * sigma**2)
        part = np.exp(log - log.max(1, keepdims=True))
        part /= part.sum(1, keepdims=True)
        weight = np.maximum(part.sum(0), 1e-9)
        mean = part.T @ sample / weight
        sigma = np.maximum(np.sqrt((part * (sample[:, None] - mean) ** 2).sum(0) / weight), least)
        share = weight / len(sample)
    return np.stack([share, mean, sigma], 1)


def _fitted(counts: np.ndarray, edges: np.ndarray, guess: np.ndarray) -> tuple[Peak, ...]:
    """Gaussians fitted to a histogram by least squares, from a guess; the guess itself where that fails."""
    from scipy.optimize import least_squares
    from scipy.special import ndtr

    whole, width = counts.sum(), edges[-1] - edges[0]

    def misfit(numbers: np.ndarray) -> np.ndarray:
        share, mean, sigma = numbers.reshape(-1, 3).T[:, :, None]
        # Whole bins, not their centres: a phase may be narrower than a bin.
        inside = (share * np.diff(ndtr((edges - mean) / sigma))).sum(0)
        return inside - counts / whole

    low, high = (np.tile(ends, len(guess)) for ends in ((0, edges[0], 1e-4 * width), (1.2, edges[-1], width)))
    room = 1e-9 * (high - low)
    begin = np.clip(guess.ravel(), low + room, high - room)
    found = least_squares(misfit, begin, bounds=(low, high), x_scale=np.tile((1, width, width), len(guess)))
    numbers = (found.x if found.success else begin).reshape(-1, 3)
    peaks = [Peak(float(mean), float(sigma), float(share)) for share, mean, sigma in numbers]
    return tuple(sorted(peaks, key=lambda peak: peak.mean))


def sensitivity_to(found: Sequence[float]) -> float:
    """How far a concentration goes, in its own unit, over settings: half its range.

    F2 adds this variation of solutions in quadrature to a histogram's sigma.
    """
    return (max(found) - min(found)) / 2
