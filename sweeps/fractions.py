"""Weight and atomic fractions of a sweep's volumes, as `output.fractions` has them. Imports without JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine import physics
from engine.quantify import (
    Film,
    Quantified,
    atom_factors,
    k_factors,
    partial_factors,
    quantify,
    xray_factors,
    zeta_factors,
)
from sweeps.schema import Fractions

FIELDS = ("weight", "atomic", "specimen")  # arrays beside a volume


def factors(given: Fractions, elements: Sequence[str], sensitivity: np.ndarray) -> np.ndarray:
    """(element,) what concentrations are divided by. sensitivity: counts of each per voxel at concentration 1.

    DataError where the tables have no such line.
    """
    if given.by == "atoms":
        return atom_factors(elements)
    own = [(given.factors or {}).get(name, 1.0) for name in elements]
    if given.by == "tables":
        found = xray_factors(emissions(given, elements), ordered(given.efficiency, elements))
    elif given.by == "partial":
        found = partial_factors(own, elements)
    else:
        found = (k_factors if given.by == "k" else zeta_factors)(own)
    return found / sensitivity


def emissions(given: Fractions, elements: Sequence[str]) -> list[physics.Emission]:
    """Lines and cross sections of the elements at the beam's energy."""
    assert given.beam is not None
    return physics.emissions(elements, given.beam, dict(given.lines or {}))


def ordered(values: float | Mapping[str, float], elements: Sequence[str]) -> list[float]:
    """One number per element, 1 where a mapping has none."""
    return [values.get(name, 1.0) if isinstance(values, Mapping) else values for name in elements]


def quantified(given: Fractions, volume: np.ndarray, elements: Sequence[str], sensitivity: np.ndarray, voxel: float,
               threshold: float | None = None) -> Quantified:
    """Fractions of a volume (element, z, y, x). voxel: [nm]. Warns where the film is not thin, if it is to be checked.

    threshold: instead of that of `output.fractions`.
    """
    film = None
    if given.take_off is not None:
        film = Film(voxel, dict(given.lines or {}), given.take_off)
    return quantify(volume, elements, factors(given, elements, sensitivity), over=given.over, film=film,
                    threshold=given.threshold if threshold is None else threshold)


def scores(found: Quantified) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Numbers of the whole and of each element: mean and sigma over the specimen, in percent."""
    whole = {"specimen_voxels": float(found.mask.sum()), "threshold": found.threshold.value,
             "threshold_found": float(found.threshold.ok)}
    each: dict[str, dict[str, float]] = {}
    for name, kind in (("weight_percent", found.weight), ("atomic_percent", found.atomic)):
        inside = [100 * part[found.mask] for part in kind] if found.mask.any() else []
        for word, take in (("", np.mean), ("_sigma", np.std)):
            each[name + word] = {e: float(take(part)) for e, part in zip(found.elements, inside)}
    if found.absorbed:
        each["absorbed"] = dict(found.absorbed)
    return whole, each


def arrays(found: Quantified) -> dict[str, np.ndarray]:
    """What is kept beside the volume: FIELDS."""
    return dict(zip(FIELDS, (found.weight, found.atomic, found.mask.astype(np.uint8)), strict=True))
