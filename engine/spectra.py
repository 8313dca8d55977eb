"""Spectrum images: the counts in a window of energy, and the background that is expected there.

EDX: background from windows beside a line, interpolated to it. EELS: two power laws fitted before an edge and
continued under it, a linear combination of power laws (F2, Methods: "modeled using a linear combination of power
laws"). Counts stay whole and the background is a part of the model, so that the noise stays Poisson's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from engine.data import DataError

EXPONENTS = np.linspace(0.0, 12.0, 1201)  # of the power laws that are looked at; edges have 2 to 6
ENDS = (5, 95)  # percentiles of the exponents over the pixels that the two power laws have
ALIKE = 0.02  # exponents closer than that are one

Band = Sequence[float]


def maps(spectra: np.ndarray, energies: np.ndarray, elements: Mapping[str, Mapping[str, Any]], smooth: float,
         where: str) -> tuple[np.ndarray, np.ndarray]:
    """Counts in the window of each element and the background expected there, both (element, tilt, y, x).

    spectra: (tilt, y, x, energy) counts. energies: (energy,) of the channels, in the unit of the windows.
    elements: {Fe: {window: [from, to), sides: [[from, to), ...] or before: [from, to)}}; with neither there is no
    background. smooth: [pixels] of the Gaussian over spectra that a background is taken from.
    where: file and array, for messages. Raises DataError for windows without channels.
    """
    counts, backgrounds = [], []
    for name, given in elements.items():
        place = f"{where}: {name}"
        if given.get("window") is None:
            raise DataError(f"{place}: no window; a spectrum image needs window: [from, to] for every element")
        if given.get("sides") and given.get("before"):
            raise DataError(f"{place}: has sides and before; keep sides for EDX or before for EELS")
        window = channels(energies, given["window"], place)
        counts.append(_sum(spectra, window))
        if given.get("sides"):
            sides = [channels(energies, side, place) for side in given["sides"]]
            backgrounds.append(beside(spectra, energies, window, sides, smooth))
        elif given.get("before"):
            before = channels(energies, given["before"], place)
            backgrounds.append(before_edge(spectra, energies, window, before, smooth, place))
        else:
            backgrounds.append(np.zeros(counts[-1].shape, np.float32))
    return np.stack(counts), np.stack(backgrounds)


def channels(energies: np.ndarray, band: Band, where: str) -> slice:
    """The channels whose energies lie in [from, to)."""
    inside = np.flatnonzero((energies >= band[0]) & (energies < band[1]))
    step = energies[1] - energies[0]
    if not inside.size or band[0] < energies[0] - step or band[1] > energies[-1] + step:
        raise DataError(f"{where}: the window {band[0]:g} to {band[1]:g} lies beyond the spectrum's energies, "
                        f"{energies[0]:g} to {energies[-1]:g}; check its unit")
    return slice(int(inside[0]), int(inside[-1]) + 1)


def beside(spectra: np.ndarray, energies: np.ndarray, window: slice, sides: Sequence[slice],
           smooth: float) -> np.ndarray:
    """(tilt, y, x) background in a window, from the counts per channel of one or two windows beside it."""
    density = [_smoothed(_sum(spectra, side), smooth) / (side.stop - side.start) for side in sides]
    if len(sides) == 2:
        middle, low, high = (energies[part].mean() for part in (window, *sides))
        share = (middle - low) / (high - low) if high != low else 0.5
        # Beyond both windows a line through them would run away with their noise.
        share = min(max(share, 0.0), 1.0)
        density = [(1 - share) * density[0] + share * density[1]]
    return (density[0] * (window.stop - window.start)).astype(np.float32)


def before_edge(spectra: np.ndarray, energies: np.ndarray, window: slice, before: slice, smooth: float,
                where: str) -> np.ndarray:
    """(tilt, y, x) background under an edge: two power laws of energy, the same in all pixels but for their amounts.

    Their exponents are the ends of the distribution over pixels of the exponent that fits best. Amounts are not
    negative, fitted by least squares weighted with the counts.
    """
    if energies[before][0] <= 0 or before.stop - before.start < 4:
        raise DataError(f"{where}: power laws need a window of 4 channels or more at energies above 0, before the edge")
    half = (before.start + before.stop) // 2
    parts = slice(before.start, half), slice(half, before.stop)
    low, high = (_smoothed(_sum(spectra, part), smooth) for part in parts)
    laws = energies[None, before] ** -EXPONENTS[:, None]
    ratio = laws[:, :half - before.start].sum(1) / laws.sum(1)  # share of the lower half; rises with the exponent
    seen = low + high > 0
    if not seen.any():
        raise DataError(f"{where}: there are no counts before the edge; check the window and its unit")
    exponent = np.interp((low[seen] / (low[seen] + high[seen])), ratio, EXPONENTS)
    steep = np.percentile(exponent, ENDS)
    powers = steep if steep[1] - steep[0] > ALIKE else steep.mean(keepdims=True)
    # Two halves hold all that two amounts can be fitted to; their noise is the counts'.
    design = np.array([[(energies[part] ** -power).sum() for power in powers] for part in parts])
    target = np.array([(energies[window] ** -power).sum() for power in powers])
    return _continued(design, target, np.stack([low, high]))


def _continued(design: np.ndarray, target: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What amounts >= 0 that fit counts (part, ...) best give for the target; design (part, law), target (law,)."""
    weight = 1 / np.maximum(counts, 1e-6 * counts.max())
    alone = [(weight * law[:, None, None, None] * counts).sum(0) / (weight * law[:, None, None, None] ** 2).sum(0)
             for law in design.T]
    guesses = [amount * under for amount, under in zip(alone, target)]
    if len(target) == 1:
        return guesses[0].astype(np.float32)
    both = np.einsum("lp,p...->l...", np.linalg.inv(design), counts)
    misfits = [(weight * (amount * law[:, None, None, None] - counts) ** 2).sum(0)
               for amount, law in zip(alone, design.T)]
    single = np.where(misfits[0] <= misfits[1], guesses[0], guesses[1])
    return np.where((both >= 0).all(0), np.einsum("l,l...->...", target, both), single).astype(np.float32)


def _sum(spectra: np.ndarray, part: slice) -> np.ndarray:
    total: np.ndarray = spectra[..., part].sum(-1, dtype=np.float64)
    return total


def _smoothed(images: np.ndarray, width: float) -> np.ndarray:
    smoothed: np.ndarray = gaussian_filter(images, (0, width, width), mode="nearest")
    return smoothed
