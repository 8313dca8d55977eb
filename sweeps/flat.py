"""Figures of fused2d in numbers: how well the predicted error tells the true one (F2, Fig. 6c), shares and what they
depend on. Imports without JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import stoichiometry
from engine.data import DataError
from engine.files import read_array
from sweeps.grid import Cell
from sweeps.schema import Phantom
from sweeps.settings import Sweep, setting_of
from sweeps.sources import Measured

CLEAR = 10.0  # SNR of the image and of every map above which F2 trusts the average standard error (Fig. 6c)
SHARES = ("share", "share_sigma", "share_measured", "share_sigma_measured")  # per element, in percent
Entries = Mapping[str, Mapping[str, Any]]


def region(sweep: Sweep, volume: np.ndarray) -> np.ndarray:
    """(1, y, x) of bool: the pixels whose shares are told (`output.shares`). DataError where there are none."""
    given = sweep.output.shares
    inside = stoichiometry.region(volume, given.above, math.inf if given.below is None else given.below,
                                  margin=given.margin)
    if given.mask is not None and isinstance(sweep.data, Measured):
        mask = read_array(Path(sweep.data.root, given.mask))
        if mask.shape != inside.shape[1:]:
            raise DataError(f"{given.mask}: a mask of shape {mask.shape} for maps of {inside.shape[1:]} pixels (y, x)")
        inside = inside & (mask != 0)
    return inside


def clear(cell: Cell) -> bool:
    """Whether the image and all maps of a simulated cell have an SNR above CLEAR."""
    data = cell.sweep.data
    if not isinstance(data, Phantom):
        return False
    maps = [1 + data.snr["chem"] * (snr - 1) for name, snr in data.snr.items() if name not in ("chem", "haadf")]
    return data.snr["haadf"] > CLEAR and min(maps) > CLEAR


def errors(cells: Sequence[Cell], entries: Entries) -> dict[str, tuple[float, float]]:
    """(average standard error, RMSE) of the shares, in percent, of the cells that have both."""
    found = {}
    for cell in cells:
        metrics = entries[cell.id]["metrics"]
        pair = metrics.get("average_relative_error"), metrics.get("share_rmse")
        if all(value is not None and math.isfinite(value) for value in pair):
            found[cell.id] = pair
    return found


def agreement(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Correlation of error and RMSE, and the slope of RMSE over error through 0; None for fewer than 3 cells."""
    if len(pairs) < 3:
        return None
    error, rmse = np.array(pairs).T
    if np.ptp(error) == 0 or np.ptp(rmse) == 0:
        return None
    return float(np.corrcoef(error, rmse)[0, 1]), float(error @ rmse / (error @ error))


def summary(cells: Sequence[Cell], entries: Entries) -> dict[str, Any]:
    """What summary.json says of a fused2d run beside what it says of all."""
    pairs = errors(cells, entries)
    found: dict[str, Any] = {}
    for name, chosen in (("", cells), ("_clear", [cell for cell in cells if clear(cell)])):
        if agreed := agreement([pairs[cell.id] for cell in chosen if cell.id in pairs]):
            found |= {f"error_correlation{name}": agreed[0], f"error_slope{name}": agreed[1]}
    spread = sensitivity(cells, entries)
    return found | ({"share_sensitivity": spread} if spread else {})


def sensitivity(cells: Sequence[Cell], entries: Entries) -> dict[str, float]:
    """By element, in percent: half the range of its share over the grid's solver settings, where that is largest."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for cell in cells:
        own = {axis: value for axis, value in cell.coordinates.items() if not setting_of(axis).startswith("solver.")}
        if len(own) < len(cell.coordinates) and (shares := entries[cell.id]["elements"].get("share")):
            groups.setdefault(str(own), []).append(shares)
    names = dict.fromkeys(name for group in groups.values() for shares in group for name in shares)
    return {name: max(stoichiometry.sensitivity_to([shares[name] for shares in group]) for group in groups.values())
            for name in names}
