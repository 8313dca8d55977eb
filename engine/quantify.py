"""Weight and atomic fractions from the volumes of any system (HEBT, 2.1 and 2.2). Imports without JAX.

A volume (element, z, y, x) divided by each element's factor gives partial densities, up to one common scale:

    X-ray counts per voxel (EDS)              f     (Eq. 7, 12)    `xray_factors`
    HAADF per voxel (HEBT's X^b)              z     (Eq. 14, 18)   `haadf_factors`
    X-ray counts, the user's own k-factors    1/k   (Eq. 1)        `k_factors`
    X-ray counts, own zeta-factors            1/zeta (Eq. 2)       `zeta_factors`
    X-ray counts, own partial cross sections  sigma/M (Eq. 3)      `partial_factors`
    atoms per voxel                           1/M                  `atom_factors`
    partial densities                         1

A solver that knows its sensitivities returns concentrations: where those are partial densities the factor is 1.
`engine.hebt` returns X^b / r, counts too: the factors of counts suit it, and z suits what `hebt.scattering` gives.
Then C_A = (X_A / f_A) / sum_B (X_B / f_B) over the elements that are asked for, inside the particle.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine import physics
from engine.data import DataError, DataWarning

LOW, HIGH = 0.1, 0.6  # the threshold is sought between these shares of the particle's level
STEPS, SMOOTH = 101, 5.0  # thresholds that are tried, and the sigma, in steps, of the Gaussian over the curve
PLATEAU = 0.5  # a curve that loses more than this share of the volume per unit of the level has no plateau
THIN = 0.1  # by which absorption may change the ratio of two lines before the thin-film assumption is said to fail


@dataclass(frozen=True)
class Threshold:
    """Where the particle begins. value: of the summed map. level: that map inside the particle.

    voxels: above the value. ok: whether the volume has a plateau there; else `status` says what was done instead.
    """

    value: float
    level: float
    voxels: int
    ok: bool
    status: str


@dataclass(frozen=True)
class Quantified:
    """weight, atomic: (element, z, y, x) fractions, which sum to 1 on the mask (z, y, x) and are 0 outside.

    absorbed: share of its X-rays that each element's line loses on the longest path through the particle, estimated;
    empty where it was not asked for.
    """

    elements: tuple[str, ...]
    weight: np.ndarray
    atomic: np.ndarray
    mask: np.ndarray
    threshold: Threshold
    absorbed: dict[str, float]


@dataclass(frozen=True)
class Film:
    """What the thin-film check needs: the voxel's edge [nm], the line of each element, the detector's elevation [deg].

    density: [g/cm^3] of the specimen; None: that of a mixture of the pure elements.
    """

    voxel: float
    lines: Mapping[str, str]
    take_off: float = 22.0
    density: float | None = None


def xray_factors(lines: Sequence[physics.Emission], efficiency: Sequence[float] | float = 1.0) -> np.ndarray:
    """(element,) f of Eq. 7 [barn mol/g]; efficiency: of the detector, for each line."""
    given = np.broadcast_to(np.asarray(efficiency, float), (len(lines),))
    return np.array([line.f(float(e)) for line, e in zip(lines, given)])


def haadf_factors(lines: Sequence[physics.Emission]) -> np.ndarray:
    """(element,) z of Eq. 14 [barn mol/g]."""
    return np.array([line.z for line in lines])


def k_factors(k: Sequence[float]) -> np.ndarray:
    """Factors from Cliff-Lorimer k (Eq. 1): of each element to one common element, whose own k is 1."""
    return 1 / _positive(k, "k-factors")


def zeta_factors(zeta: Sequence[float]) -> np.ndarray:
    """Factors from zeta (Eq. 2), all in one unit."""
    return 1 / _positive(zeta, "zeta-factors")


def partial_factors(partial: Sequence[float], elements: Sequence[str]) -> np.ndarray:
    """Factors from partial cross sections (Eq. 3), all in one unit: per atom, where the others are per mass."""
    return _positive(partial, "partial cross-sections") / physics.atomic_weights(elements)


def atom_factors(elements: Sequence[str]) -> np.ndarray:
    """Factors of volumes whose concentrations count atoms."""
    return 1 / physics.atomic_weights(elements)


def quantify(volume: np.ndarray, elements: Sequence[str], factors: np.ndarray | Sequence[float], *,
             over: Sequence[str] | None = None, threshold: float | None = None, mask: np.ndarray | None = None,
             film: Film | None = None) -> Quantified:
    """Fractions of the elements `over` (default: all), among themselves, from a volume (element, z, y, x).

    over: {Zn, Co} of C, N, Zn, Co gives Zn / (Zn + Co). factors: of each of `elements`.
    threshold: of sum_A X_A / f_A over `over`; default: `edge_spread`. mask: (z, y, x), used instead of a threshold,
    where it and the sum are positive. film: warns (DataWarning) where a line is absorbed by more than 10 %.
    """
    names = tuple(over if over is not None else elements)
    unknown = [name for name in names if name not in elements]
    if unknown or not names:
        raise DataError(f"{', '.join(unknown) or 'no element'} cannot be quantified: the volume has "
                        f"{', '.join(elements)}")
    scale = _positive(factors, "factors")
    if scale.shape != (len(elements),) or len(volume) != len(elements):
        raise DataError(f"{scale.size} factors and {len(volume)} volumes for {len(elements)} elements; give one each")
    index = [list(elements).index(name) for name in names]
    density = np.stack([np.maximum(np.asarray(volume[k], np.float64), 0) / scale[k] for k in index])
    total = density.sum(0)
    found = _found(total, threshold, mask)
    inside = total > found.value if mask is None else np.asarray(mask, bool) & (total > 0)
    weight = np.where(inside, density / np.where(inside, total, 1), 0)
    moles = weight / physics.atomic_weights(names)[(slice(None),) + (None,) * (density.ndim - 1)]
    atomic = moles / np.where(inside, moles.sum(0), 1)
    absorbed = thin_film(weight, names, inside, film) if film is not None and inside.any() else {}
    return Quantified(names, weight.astype(np.float32), atomic.astype(np.float32), inside, found, absorbed)


def edge_spread(total: np.ndarray) -> Threshold:
    """The threshold at which the particle's volume changes least (HEBT, 2.1; after Collins et al., 2019).

    Of a noisy map the curve has no plateau, or one far from the edge. So thresholds are sought from 0.1 to 0.6 of the
    particle's level (the median of voxels above half of the brightest), on a smoothed curve, and where the smallest
    slope lies at an end of that range or is still large, the threshold is `otsu`'s within it, and `ok` is False.
    """
    from scipy.ndimage import gaussian_filter1d

    values = np.sort(np.asarray(total, np.float64), axis=None)
    top = values[max(0, values.size - 1 - values.size // 1000)]
    if not top > 0:
        return Threshold(0.0, 0.0, 0, False, "nothing there: no voxel is above 0")
    level = float(np.median(values[values > top / 2]))
    tried = np.linspace(LOW, HIGH, STEPS)
    volume = values.size - np.searchsorted(values, tried * level, side="right")
    slope = -np.gradient(gaussian_filter1d(volume / volume[0], SMOOTH, mode="nearest"), tried)
    edge = int(2 * SMOOTH)
    best = edge + int(np.argmin(slope[edge:-edge]))
    value = float(tried[best] * level)
    at_end = best in (edge, STEPS - edge - 1) and slope[best] > PLATEAU / 5
    if slope[best] <= PLATEAU and not at_end:
        return Threshold(value, level, int(volume[best]), True,
                         f"the volume changes least at {tried[best]:.2f} of the particle's level")
    value = float(np.clip(otsu(values[values > 0]), LOW * level, HIGH * level))
    return Threshold(value, level, int((values > value).sum()), False,
                     f"the volume has no plateau over the threshold (it loses {slope[best]:.0%} per level at best); "
                     f"Otsu's threshold was taken, {value / level:.2f} of the particle's level: look at the mask")


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """The threshold that parts values into the two classes with the least variance within (N. Otsu, 1979)."""
    counts, edges = np.histogram(values, bins)
    middle = (edges[1:] + edges[:-1]) / 2
    below, mass = np.cumsum(counts)[:-1], np.cumsum(counts * middle)
    above = counts.sum() - below
    between = below * above * (mass[:-1] / np.maximum(below, 1) - (mass[-1] - mass[:-1]) / np.maximum(above, 1)) ** 2
    return float(edges[1:-1][np.argmax(between)])


def thin_film(weight: np.ndarray, elements: Sequence[str], mask: np.ndarray, film: Film) -> dict[str, float]:
    """The share of its X-rays that each element's line loses on half of the longest path through the particle.

    1 - exp(-(mu / rho) rho t / (2 sin(take-off))), t along z, with the particle's mean composition: an estimate, of
    the size and not of the place. Warns (DataWarning) where two lines differ in it by more than 10 %, the thin-film
    criterion of J. Goldstein et al., Scanning Electron Microscopy 1 (1977) 315: what all lose alike, fractions do not
    see.
    """
    mean = weight[:, mask].mean(1)
    mean = mean / mean.sum()
    density = film.density or 1 / sum(c / physics.density(e) for c, e in zip(mean, elements))
    path = mask.sum(0).max() * film.voxel * 1e-7 / (2 * np.sin(np.deg2rad(film.take_off)))
    absorbed = {}
    for element in elements:
        line = film.lines.get(element) or physics.usual_line(physics.atomic_number(element))
        energy = physics.line_energy(element, line)
        mu = sum(c * physics.attenuation(e, energy) for c, e in zip(mean, elements))
        absorbed[element] = float(1 - np.exp(-mu * density * path))
    most, least = (pick(absorbed, key=lambda e: absorbed[e]) for pick in (max, min))
    changed = 1 - (1 - absorbed[most]) / (1 - absorbed[least])
    if changed > THIN:
        warnings.warn(f"the thin-film assumption fails: {most} loses about {absorbed[most]:.0%} of its X-rays on their "
                      f"way out and {least} {absorbed[least]:.0%}, so that the ratio of {most} to {least} comes out up "
                      f"to {changed:.0%} too low; take a line of higher energy, or factors measured on a specimen as "
                      "thick", DataWarning, stacklevel=3)
    return absorbed


def _found(total: np.ndarray, threshold: float | None, mask: np.ndarray | None) -> Threshold:
    if mask is not None:
        if np.shape(mask) != total.shape:
            raise DataError(f"a mask of {np.shape(mask)} does not fit a volume of {total.shape}")
        return Threshold(0.0, 0.0, int((np.asarray(mask, bool) & (total > 0)).sum()), True, "the mask was given")
    if threshold is None:
        return edge_spread(total)
    if not threshold >= 0:
        raise DataError(f"the threshold is {threshold}; give a number of 0 or more, in units of sum X / f")
    return Threshold(float(threshold), 0.0, int((total > threshold).sum()), True, "the threshold was given")


def _positive(numbers: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(numbers, np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise DataError(f"the {name} must be positive numbers, not {', '.join(f'{v:g}' for v in values.ravel())}")
    return values
