"""Sites of a known crystal in a volume: which are seen, how far off, and what it takes to see the lighter ones.

Romanov et al., Multi-slice electron ptychographic tomography, section 3: from every site uphill to a maximum of the
volume; a site is missing where two ways end at one maximum. Positions are z, y, x [nm] from the volume's centre.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import brentq
from scipy.spatial import cKDTree

from engine.atoms import Atoms, scattering_factor
from engine.data import DataError

DIP = 0.263  # of Rayleigh's criterion for a round aperture
WIDTH = 2 * np.sqrt(2 * np.log(2))  # full width at half maximum of a Gaussian over its standard deviation


@dataclass(frozen=True)
class Sites:
    """Where the ways uphill from a crystal's sites end.

    expected: the sites. ends: (site, 3) the maxima [nm]. found: (site,) whether it is the nearest of the sites whose
    ways end at its maximum; the others are missing (section 3).
    """

    expected: Atoms
    ends: np.ndarray
    found: np.ndarray

    def share(self, symbol: str | None = None) -> float:
        """Sites found over sites, of an element or of all."""
        of = self._of(symbol)
        return float(self.found[of].mean()) if of.any() else float("nan")

    def displacement(self, symbol: str | None = None) -> tuple[np.ndarray, float]:
        """Mean over found sites of the distance to the maximum [nm], (3,) along z, y, x, and in space."""
        of = self._of(symbol) & self.found
        if not of.any():
            return np.full(3, np.nan), float("nan")
        apart = self.ends[of] - self.expected.positions[of]
        return np.abs(apart).mean(0), float(np.linalg.norm(apart, axis=1).mean())

    def _of(self, symbol: str | None) -> np.ndarray:
        return np.ones(len(self.expected), bool) if symbol is None else self.expected.symbols == symbol


def climb(volume: np.ndarray, voxel: float, expected: Atoms, *, smooth: float = 0.0, same: float = 0.05) -> Sites:
    """From every site uphill in a volume (z, y, x), by steps along the gradient that only ever rise, to a maximum.

    smooth: [nm] standard deviation of a Gaussian blur beforehand. same: [nm] closer than which two ends are one.
    """
    if len(expected) == 0:
        raise DataError("there are no sites to climb from: the mask holds none of the crystal's")
    smoothed = ndimage.gaussian_filter(np.asarray(volume, np.float64), smooth / voxel, mode="nearest")
    spline = ndimage.spline_filter(smoothed, 3, mode="nearest")
    centre = (np.array(volume.shape) - 1) / 2
    ends = (_uphill(spline, expected.positions / voxel + centre) - centre) * voxel
    apart = np.linalg.norm(ends - expected.positions, axis=1)
    found, tree = np.ones(len(ends), bool), cKDTree(ends)
    for k, others in enumerate(tree.query_ball_point(ends, same)):
        found[k] = all((apart[k], k) <= (apart[n], n) for n in others)
    return Sites(expected, ends, found)


def rayleigh(heavy: str, light: str, apart: float, *, dip: float = DIP, thermal: float = 0.0,
             projected: bool = False) -> float:
    """[nm] full width at half maximum of the widest Gaussian blur at which a light atom beside a heavy one, `apart` nm
    away, is still told apart (section 3): the potential between the two falls by `dip` of the light one's peak.

    thermal: root mean square displacement along each axis [nm]. projected: of potentials along a line of sight, not in
    space. 0 where no blur leaves such a dip.
    """
    x = np.linspace(-0.5 * apart, 1.5 * apart, 2001)
    power = 1.0 if projected else 1.5

    def depth(width: float) -> float:
        spread = 8 * np.pi**2 * (thermal**2 + (width / WIDTH) ** 2)
        profile = np.zeros(len(x))
        for symbol, place in ((heavy, 0.0), (light, apart)):
            a, b = scattering_factor(symbol)
            waves = np.exp(-4 * np.pi**2 * (x[:, None] - place) ** 2 / (b + spread))
            profile += (a * (4 * np.pi / (b + spread)) ** power * waves).sum(1)
        beyond = x > apart / 2
        lighter = np.flatnonzero(beyond[1:-1] & (profile[1:-1] > profile[:-2]) & (profile[1:-1] >= profile[2:])) + 1
        if len(lighter) == 0:
            return 0.0
        return float(1 - profile[(x > 0) & (x < x[lighter[0]])].min() / profile[lighter[0]])

    if depth(0.0) < dip:
        return 0.0
    return float(brentq(lambda width: depth(width) - dip, 0.0, 2 * apart, xtol=1e-5))


def _uphill(spline: np.ndarray, places: np.ndarray, steps: int = 200) -> np.ndarray:
    """(n, 3) [voxel] maxima of a cubic spline, from places (n, 3): a step that does not rise is halved."""
    def at(p: np.ndarray) -> np.ndarray:
        found: np.ndarray = ndimage.map_coordinates(spline, p.T, order=3, prefilter=False, mode="nearest")
        return found

    def rise(p: np.ndarray) -> np.ndarray:
        found = np.stack([at(p + e) - at(p - e) for e in 0.05 * np.eye(3)], 1)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-30)

    places, length = places.copy(), np.full(len(places), 0.4)
    height, way = at(places), rise(places)
    for _ in range(steps):
        moving = np.flatnonzero(length > 2e-3)
        if len(moving) == 0:
            break
        tried = places[moving] + length[moving, None] * way[moving]
        new = at(tried)
        up = new > height[moving]
        risen = moving[up]
        places[risen], height[risen] = tried[up], new[up]
        way[risen] = rise(places[risen])
        length[moving] *= np.where(up, 1.1, 0.5)
    return places
