"""How fine a volume resolves: the last lattice peak above the noise, two half data sets, the width of an edge.

Volumes are (z, y, x), lengths nm, frequencies 1/nm. A resolution is a frequency, or its inverse, a full period.

Peaks (Romanov et al., Multi-slice electron ptychographic tomography, section 3 and Fig. 5, which reads the last peak of
the spectral amplitude by eye): the power of noise, and of an amorphous film, at one frequency is distributed as
exp(-power / mean). The mean is found from the spectrum itself, as median / ln 2 of cubes of BLOCK frequencies, the
highest of a cube and its neighbours, so that the rim of a missing wedge does not count as quiet. A peak is a local
maximum that noise alone would reach in one spectrum of a hundred.

Shells: M. van Heel, M. Schatz, Fourier shell correlation threshold criteria, J. Struct. Biol. 151, 250 (2005), for the
half-bit curve; P. Rosenthal, R. Henderson, J. Mol. Biol. 333, 721 (2003), for 0.143.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import fft, ndimage
from scipy.optimize import curve_fit
from scipy.signal import get_window
from scipy.special import erf

from engine.data import DataError

AXES = ("z", "y", "x")
BLOCK = 8  # frequencies along an edge of a cube whose median is the noise there; a peak fills 5^3 of them in part
RIM = (3.5, 4.5)  # steps: beyond a peak of the window, or of a crystal that fills half of the volume
ALARM = 0.01  # spectra of noise alone in which a peak is found
RANGE = 1e-9  # of the strongest peak's power: below, numbers are rounded
WINDOW = "hann"  # a four-term Blackman-Harris found a fifth fewer peaks at equal noise and none beyond
SEVENTH, HALF = 0.143, 0.5
TEN_TO_NINETY = 2.563103131089201  # width from 10 to 90 % of a Gaussian's integral over its standard deviation

Criterion = Literal["0.143", "half-bit", "0.5"]


@dataclass(frozen=True)
class Spectrum:
    """Spectral amplitude summed over all other frequencies (Fig. 5).

    frequencies: of z, y and x, rising, 0 in the middle [1/nm]. curves: (frequency,) for each axis. planes: maps for the
    pairs (z, y), (z, x), (y, x) by these names joined.
    """

    frequencies: dict[str, np.ndarray]
    curves: dict[str, np.ndarray]
    planes: dict[str, np.ndarray]


@dataclass(frozen=True)
class Peaks:
    """Peaks of a spectrum above the noise, one of each pair at +-q.

    frequencies: (peak, 3), z, y, x [1/nm], strongest first. heights: (peak,) power over the mean power of the noise
    there. threshold: the height from which on a maximum is a peak. step: (3,) width of a shell [1/nm].
    """

    frequencies: np.ndarray
    heights: np.ndarray
    threshold: float
    step: np.ndarray

    def cutoff(self) -> np.ndarray:
        """(3,) highest frequency [1/nm] of a peak along z, y, x, as Fig. 5 integrates; NaN where there is no peak.

        A peak's component along an axis counts wherever the peak lies; none may lie on the axis itself.
        """
        return np.abs(self.frequencies).max(0) if len(self.frequencies) else np.full(3, np.nan)

    def length(self) -> np.ndarray:
        """(3,) the resolution along z, y, x [nm]."""
        return 1 / self.cutoff()


@dataclass(frozen=True)
class ShellCorrelation:
    """frequency [1/nm], correlation and number of independent frequencies of each shell, or plane."""
    frequency: np.ndarray
    correlation: np.ndarray
    number: np.ndarray

    def threshold(self, criterion: Criterion = "0.143") -> np.ndarray:
        """(shell,) what the correlation is held against: of two halves 0.143, or the half-bit curve (van Heel and
        Schatz, Eq. 17); of a volume and the truth 0.5, which says the same as 0.143 (Rosenthal and Henderson)."""
        if criterion in ("0.143", "0.5"):
            return np.full(len(self.frequency), SEVENTH if criterion == "0.143" else HALF)
        if criterion != "half-bit":
            raise DataError(f"{criterion} is no criterion of resolution; 0.143, half-bit and 0.5 are")
        root = 1 / np.sqrt(self.number)
        return (0.2071 + 1.9102 * root) / (1.2071 + 0.9102 * root)

    def cutoff(self, criterion: Criterion = "0.143") -> float:
        """[1/nm] where the correlation first falls below; the last shell where it never does, NaN where it never rose.

        Shells of fewer than 12 frequencies are passed over: two volumes agree in them by chance.
        """
        above = self.correlation - self.threshold(criterion)
        usable = np.flatnonzero(self.number >= 12)
        if len(usable) == 0 or above[usable[0]] <= 0:
            return float("nan")
        below = usable[above[usable] <= 0]
        if len(below) == 0:
            return float(self.frequency[usable[-1]])
        end = below[0]
        start = usable[np.searchsorted(usable, end) - 1]
        share = above[start] / (above[start] - above[end])
        return float(self.frequency[start] + share * (self.frequency[end] - self.frequency[start]))

    def length(self, criterion: Criterion = "0.143") -> float:
        """The resolution [nm]."""
        return 1 / self.cutoff(criterion)


@dataclass(frozen=True)
class Edge:
    """An error function through a profile. width: from 10 to 90 % of the step; fwhm: of the blur that makes it; centre:
    of the step from the profile's first point, all [nm]. error: standard error of the width. low, high: the plateaus.
    """

    width: float
    fwhm: float
    centre: float
    error: float
    low: float
    high: float


def spectral_amplitude(volume: np.ndarray, voxel: float, window: str = WINDOW) -> Spectrum:
    """The modulus of the volume's spectrum, integrated onto the three axes and the three planes (Fig. 5).

    window: any of scipy's, along each axis, so that the volume's faces make no cross.
    """
    amplitude = np.sqrt(_power(volume, window))
    spaced = dict(zip(AXES, _frequencies(amplitude.shape, voxel)))
    curves = {AXES[k]: amplitude.sum(tuple(n for n in range(3) if n != k)) for k in range(3)}
    planes = {AXES[a] + AXES[b]: amplitude.sum(3 - a - b) for a, b in ((0, 1), (0, 2), (1, 2))}
    return Spectrum(spaced, curves, planes)


def find_peaks(volume: np.ndarray, voxel: float, window: str = WINDOW) -> Peaks:
    """Lattice peaks that stand out from the noise, by the rule above: for specimens with a lattice.

    Frequencies within BLOCK / 2 steps of 0 are the specimen's outline and are left out; a step is one over the volume's
    length, and RIM wants a length of five cells or more: of reflections closer than that the stronger one is seen.
    """
    power = _power(volume, window)
    noise = _noise(power)
    frequencies = _frequencies(power.shape, voxel)
    index = np.meshgrid(*[np.arange(n) - n // 2 for n in power.shape], indexing="ij", sparse=True)
    outline = np.maximum(np.maximum(abs(index[0]), abs(index[1])), abs(index[2])) <= BLOCK // 2
    threshold = float(np.log(power.size / 2 / ALARM))
    power[outline] = 0
    seen = (power > threshold * noise) & (power > RANGE * power.max())
    tops = np.argwhere(seen)
    tops = tops[power[seen] >= ndimage.maximum_filter(power, 3, mode="wrap")[seen]]
    tops = tops[power[tuple(tops.T)] > 2 * _around(power, tops)]
    places = np.stack([f[tops[:, k]] for k, f in enumerate(frequencies)], 1)
    # One of a pair: the first component that is not 0 is positive.
    first = np.where(places[:, 0] != 0, places[:, 0], np.where(places[:, 1] != 0, places[:, 1], places[:, 2]))
    tops, places = tops[first > 0], places[first > 0]
    height = power[tuple(tops.T)] / np.maximum(noise[tuple(tops.T)], np.finfo(np.float32).tiny)
    order = np.argsort(-power[tuple(tops.T)], kind="stable")
    return Peaks(places[order], height[order], threshold, 1 / (np.array(power.shape) * voxel))


def shell_correlation(a: np.ndarray, b: np.ndarray, voxel: float, axis: str | None = None, cone: float = 30.0,
                      outside: bool = False) -> ShellCorrelation:
    """Correlation of two volumes of half the data each in shells of frequency, one frequency step wide.

    axis, cone: only frequencies within so many degrees of the axis z, y or x; outside: only those beyond. The direction
    that a tilt series misses is the beam's at tilt 0, z.
    """
    a, b = (_checked(v) for v in (a, b))
    if a.shape != b.shape:
        raise DataError(f"two half volumes of shapes {a.shape} and {b.shape} cannot be correlated")
    first, second = (fft.fftn(v - v.mean()) for v in (a, b))
    q = np.meshgrid(*[fft.fftfreq(n, voxel) for n in a.shape], indexing="ij", sparse=True)
    radius = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2)
    step = 1 / (min(a.shape) * voxel)
    kept = (radius > step / 2) & (radius <= 0.5 / voxel)
    if axis is not None:
        kept &= (np.abs(q[_axis(axis)]) >= np.cos(np.radians(cone)) * radius) != outside
    shell = np.rint(radius[kept] / step).astype(int)
    products = (first * second.conj()).real, np.abs(first) ** 2, np.abs(second) ** 2
    cross, power_a, power_b = (np.bincount(shell, v[kept])[1:] for v in products)
    number = np.bincount(shell)[1:] / 2  # q and -q say the same
    both = np.sqrt(power_a * power_b)
    correlation = np.divide(cross, both, out=np.zeros_like(cross), where=both > 0)
    filled = number > 0
    return ShellCorrelation((1 + np.arange(len(number)))[filled] * step, correlation[filled], number[filled])


def plane_correlation(volume: np.ndarray, truth: np.ndarray, spacing: float) -> ShellCorrelation:
    """Correlation of two volumes (z, y, x) in planes of one frequency along z, summed over all others but 0.

    spacing: [nm] along z. A scan that is not tilted tells hardly anything along z itself, but more the further off: the
    sum over a plane says how fine its sections are.
    """
    volume, truth = (np.asarray(v, np.float64) for v in (volume, truth))
    if volume.shape != truth.shape or volume.ndim != 3 or len(volume) < 2:
        raise DataError(f"volumes of shapes {volume.shape} and {truth.shape} cannot be correlated plane by plane")
    first, second = fft.fftn(volume), fft.fftn(truth)
    first[:, 0, 0] = second[:, 0, 0] = 0
    count = len(volume)
    plane = np.abs(np.rint(fft.fftfreq(count) * count)).astype(int)  # q and -q are one
    cross, power, other = (np.bincount(plane, v.sum((1, 2))) for v in (
        (first * second.conj()).real, np.abs(first) ** 2, np.abs(second) ** 2))
    both = np.sqrt(power * other)
    correlation = np.divide(cross, both, out=np.zeros_like(cross), where=both > 0)
    number = np.bincount(plane) * (volume[0].size - 1) / 2
    return ShellCorrelation(np.arange(len(cross)) / (count * spacing), correlation, number)


def power_cutoff(volume: np.ndarray, voxel: float, axis: str | None = None, cone: float = 30.0) -> float:
    """[1/nm] from which on the mean power in shells is less signal than noise; NaN where it is noise throughout.

    For specimens without a lattice. The noise is the median over the shells beyond 0.8 of the highest frequency, and so
    must be white, and the volume sampled finer than it is resolved. axis, cone: as in `shell_correlation`.
    """
    power = _power(volume, "hann")
    q = np.meshgrid(*_frequencies(power.shape, voxel), indexing="ij", sparse=True)
    radius = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2)
    step = 1 / (min(power.shape) * voxel)
    kept = (radius > 2.5 * step) & (radius <= 0.5 / voxel)  # two frequencies beside 0 are the window's
    if axis is not None:
        kept &= np.abs(q[_axis(axis)]) >= np.cos(np.radians(cone)) * radius
    shell = np.rint(radius[kept] / step).astype(int)
    number = np.bincount(shell)
    filled = np.flatnonzero(number)
    mean = np.bincount(shell, power[kept])[filled] / number[filled]
    excess = mean / np.median(mean[filled >= 0.8 * filled[-1]]) - 2
    below = np.flatnonzero(excess <= 0)
    if len(below) == 0 or below[0] == 0:
        return float("nan") if len(below) else float(filled[-1] * step)
    k = below[0]
    share = excess[k - 1] / (excess[k - 1] - excess[k])
    return float((filled[k - 1] + share * (filled[k] - filled[k - 1])) * step)


def edge_width(profile: np.ndarray, spacing: float) -> Edge:
    """The width of an edge in a line profile whose points are `spacing` nm apart: least squares to an error function.

    The profile holds one edge, rising or falling, with some of the plateau on either side.
    """
    values = np.asarray(profile, np.float64)
    if values.ndim != 1 or len(values) < 6 or not np.isfinite(values).all() or np.ptp(values) == 0:
        raise DataError("an edge's width needs a profile of six or more finite points that are not all alike")
    x = spacing * np.arange(len(values))
    few = max(2, len(values) // 8)
    low, high = values[:few].mean(), values[-few:].mean()
    middle = x[np.argmax(np.cumsum(np.abs(np.diff(values))) >= np.abs(np.diff(values)).sum() / 2)] + spacing / 2

    def step(x: np.ndarray, centre: float, sigma: float, low: float, high: float) -> np.ndarray:
        return low + (high - low) * (1 + erf((x - centre) / (np.sqrt(2) * sigma))) / 2

    try:
        best, covariance = curve_fit(step, x, values, (middle, 2 * spacing, low, high),
                                     bounds=((x[0], 0.05 * spacing, -np.inf, -np.inf), (x[-1], x[-1], np.inf, np.inf)))
    except RuntimeError:
        raise DataError("no error function fits the profile: give it one edge, with a plateau on either side") from None
    sigma = float(best[1])
    return Edge(TEN_TO_NINETY * sigma, 2 * np.sqrt(2 * np.log(2)) * sigma, float(best[0]),
                TEN_TO_NINETY * float(np.sqrt(covariance[1, 1])), float(best[2]), float(best[3]))


def _checked(volume: np.ndarray) -> np.ndarray:
    found = np.asarray(volume, np.float32)
    if found.ndim != 3 or min(found.shape) < 2 * BLOCK or not np.isfinite(found).all():
        raise DataError(f"a spectrum needs a finite volume (z, y, x) of {2 * BLOCK} voxels or more along each axis; "
                        f"this one has shape {found.shape}")
    return found


def _axis(name: str) -> int:
    if name not in AXES:
        raise DataError(f"{name} is no axis of a volume; z, y and x are")
    return AXES.index(name)


def _frequencies(shape: Sequence[int], voxel: float) -> list[np.ndarray]:
    return [fft.fftshift(fft.fftfreq(n, voxel)) for n in shape]


def _power(volume: np.ndarray, window: str) -> np.ndarray:
    """Squared modulus of the spectrum under the window, 0 in the middle; the mean under the window is taken away."""
    volume = _checked(volume)
    windows = [get_window(window, n, fftbins=True).astype(np.float32) for n in volume.shape]
    weight = windows[0][:, None, None] * windows[1][:, None] * windows[2]
    flat = volume - np.vdot(weight, volume) / weight.sum()
    spectrum = fft.fftshift(fft.fftn(flat * weight))
    return (spectrum.real**2 + spectrum.imag**2).astype(np.float64)


def _around(power: np.ndarray, tops: np.ndarray) -> np.ndarray:
    """(top,) the highest power on the rim around each; a spectrum is periodic."""
    reach = int(np.ceil(RIM[1]))
    offsets = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    distance = np.linalg.norm(offsets, axis=1)
    highest = np.zeros(len(tops))
    for offset in offsets[(distance >= RIM[0]) & (distance < RIM[1])]:
        highest = np.maximum(highest, power[tuple(((tops + offset) % power.shape).T)])
    return highest


def _noise(power: np.ndarray) -> np.ndarray:
    """Mean power of the noise at each frequency: medians of cubes, of neighbours the highest, linear in between."""
    count = [n // BLOCK for n in power.shape]
    edges = [np.linspace(0, n, c + 1).astype(int) for n, c in zip(power.shape, count)]
    middle = np.array([[[np.median(power[a:b, c:d, e:f]) for e, f in zip(edges[2], edges[2][1:])]
                        for c, d in zip(edges[1], edges[1][1:])] for a, b in zip(edges[0], edges[0][1:])])
    highest = ndimage.maximum_filter(middle, 3) / np.log(2)
    found = highest
    for axis, (n, c) in enumerate(zip(power.shape, count)):
        place = np.clip((np.arange(n) + 0.5) * c / n - 0.5, 0, c - 1)
        low = np.minimum(place.astype(int), max(c - 2, 0))
        share = np.moveaxis((place - low)[:, None, None], 0, axis)
        found = (1 - share) * found.take(low, axis) + share * found.take(np.minimum(low + 1, c - 1), axis)
    return found
