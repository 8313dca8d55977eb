"""Counts set aside to test a solution with, for measured maps that have no truth.

A Poisson count, parted at random, gives independent Poisson counts (binomial thinning): what was fitted to one part
has not seen the noise of the other, though both have all pixels and all tilts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.data import DataError, MultiModal


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
