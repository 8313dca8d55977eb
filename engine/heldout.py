"""Counts set aside to test a solution with, for measured maps that have no truth.

A Poisson count, parted at random, gives independent Poisson counts (binomial thinning): what was fitted to one part
has not seen the noise of the other, though both have all pixels and all tilts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.data import DataError, MultiModal

FAINT = 0.01  # share of a map's mean that is expected everywhere: else a pixel where nothing is would decide alone
SCALES = 0.1, 10.0  # of a fitted volume, at the outside
NEWTON = 10


def thinned(data: MultiModal, folds: int, seed: int) -> list[tuple[MultiModal, MultiModal]]:
    """(training, test) by fold: the counts are parted at random into `folds` parts, each the test of one fold.

    Sensitivity and background are parted with them, so that concentrations stay the same. Images are in both: they are
    not what is tested. DataError where the maps are not whole counts, or a part of a map would be empty.
    """
    maps = data.chem
    counts = np.rint(maps.projections).astype(np.int64)
    if maps.units != "counts" or np.abs(counts - maps.projections).max() > 1e-3:
        raise DataError(f"{'/'.join(maps.elements)}: only whole counts can be parted for the objective heldout; give "
                        "counts (units: counts), without binning to means")
    rng = np.random.default_rng([seed, folds])
    left, parts = counts, list[np.ndarray]()
    for fold in range(folds - 1):
        parts.append(rng.binomial(left, 1 / (folds - fold)))
        left = left - parts[-1]
    parts.append(left)
    return [(_share(data, counts - part, 1 - 1 / folds), _share(data, part, 1 / folds)) for part in parts]


def _share(data: MultiModal, counts: np.ndarray, share: float) -> MultiModal:
    """The data with a share of their counts."""
    sensitivity = None if data.sensitivity is None else share * np.asarray(data.sensitivity)
    maps = replace(data.chem, projections=counts, background=share * np.asarray(data.chem.background))
    return replace(data, chem=maps, sensitivity=sensitivity)


def weight(lambda_tv: float, share: float) -> float:
    """lambda_tv for a fit to a share of the counts, where the full counts would have `lambda_tv`.

    The Poisson term of a share of the counts is, on average, that share of the full one, so that TV moves
    concentrations by lambda_tv / share. It has to move them by a fixed multiple of their scatter to hold the noise
    down, and that goes with 1 / sqrt(share): so lambda_tv goes with the square root. The weight of the images, which
    are not thinned, stays: each term keeps its own statistical weight.
    """
    return lambda_tv * float(np.sqrt(share))


def scales(signal: np.ndarray, background: np.ndarray | float, maps: np.ndarray, counts: bool) -> np.ndarray:
    """(element,) factors by which modelled signals (element, tilt, y, x) fit maps best, Poisson counts or others.

    Total variation draws concentrations together, and more weight means less contrast: a score that took the volume at
    that scale would choose too little TV, for what it loses most is a factor that NRMSE does not see and that one
    number sets right. In the searches of docs/BENCHMARKS.md it chose a third of the best lambda_tv.
    """
    signal, wanted = signal.astype(np.float64), maps.astype(np.float64)
    level = np.broadcast_to(np.asarray(background, np.float64), signal.shape)
    power = np.maximum((signal**2).sum((1, 2, 3)), 1e-30)
    found = np.clip(((wanted - level) * signal).sum((1, 2, 3)) / power, *SCALES)
    if not counts:
        return found
    least = FAINT * np.maximum(wanted.mean((1, 2, 3), keepdims=True), 1e-30)
    for _ in range(NEWTON):
        expected = np.maximum(found[:, None, None, None] * signal + level, least)
        slope = (signal * (1 - wanted / expected)).sum((1, 2, 3))
        curvature = np.maximum((signal**2 * wanted / expected**2).sum((1, 2, 3)), 1e-30)
        found = np.clip(found - slope / curvature, np.maximum(SCALES[0], found / 2), np.minimum(SCALES[1], 2 * found))
    return found
