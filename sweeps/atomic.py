"""Atoms of an mset run: the true ones of a specimen, those that were traced, and what a run says of them. No JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.atoms import Atoms, cube, film, nanoparticle, potential
from engine.data import DataError
from engine.tracing import HEAVY, LIGHT, NON_ATOM, Comparison, Traced, compare, trace, traced_xyz
from sweeps.patterns import Mset, Mspt, Recorded, Scanned, crystal_of
from sweeps.settings import Sweep
from sweeps.tables import Run

SYMBOLS = {"cuau": ("Cu", "Au"), "bao": ("O", "Ba"), "co3o4": ("O", "Co"), "coo": ("O", "Co")}  # light, heavy
BOND = 0.15  # [nm] between a particle and its film
WIDE = 4  # widths of the field that a film is wide: it fills the field up to tilts of 75 degrees
THERMAL = 0.0085  # [nm] along each axis, of the atoms' mean blur, as it is simulated
COLUMNS = ("z", "y", "x", "intensity", "class")  # of the atoms beside a volume; lengths in nm


def specimen(data: Scanned) -> Atoms:
    """The particle that is scanned; a cube lies on a face, turned about the beam at random."""
    if crystal_of(data):
        turn = np.random.default_rng([20_243, data.particle]).uniform(-45, 45)
        return cube(data.phantom, 2 * data.radius, [turn, 0, 0], disorder=data.disorder, seed=data.particle)
    return nanoparticle(data.phantom, data.radius, disorder=data.disorder, seed=data.particle)


def substrate(data: Scanned) -> Atoms | None:
    """The film below the particle, wide enough to fill the field at any tilt, and cut off where that ends."""
    if data.film == 0:
        return None
    lowest = float(specimen(data).positions[:, 0].min())
    return film(WIDE * data.size * data.pixel, data.film, lowest - BOND, seed=data.particle)


def truth(data: Scanned, shape: tuple[int, ...], voxel: float) -> np.ndarray:
    """The particle's mean potential (z, y, x) [V] in the voxels [nm] of a volume, whose y and x are of one length."""
    whole = potential(specimen(data), max(shape), voxel, THERMAL)
    first = [(max(shape) - side) // 2 for side in shape]
    return whole[tuple(slice(start, start + side) for start, side in zip(first, shape))]


def symbols(data: Scanned | Recorded) -> tuple[str, str]:
    """Of the light and the heavy element; of measured data as they were given, or X and Y."""
    if isinstance(data, Scanned):
        return SYMBOLS[data.phantom]
    return data.light or "X", data.heavy or "Y"


def traced(given: Mset | Mspt, volume: np.ndarray, voxel: float) -> Traced:
    """Atoms in a potential (z, y, x); DataError where hardly any stand out. voxel: [nm]."""
    assert isinstance(given.threshold, float)
    return trace(volume, voxel, threshold=given.threshold, masked=given.inside)


def compared(data: Scanned, found: Traced) -> Comparison:
    """Traced atoms beside the true ones."""
    return compare(found.atoms(*symbols(data)), specimen(data))


def scores(data: Scanned, found: Comparison) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Numbers of the whole, errors in pm and percent, and of each element: how many atoms were found, and there are."""
    whole = {"rmsd": found.rmsd, "tracing_error": 100 * found.tracing_error,
             "classification": 100 * found.classification}
    return ({name: value for name, value in whole.items() if np.isfinite(value)},
            {"found": {symbol: float(count) for symbol, count in found.found.items()},
             "true": {symbol: float(count) for symbol, count in true_counts(data).items()}})


def true_counts(data: Scanned) -> dict[str, int]:
    """How many atoms of each element the particle has."""
    return {str(symbol): int(count) for symbol, count in zip(*np.unique(specimen(data).symbols, return_counts=True))}


def named(data: Scanned, found: Mapping[str, float]) -> str:
    """How many atoms of each element were found and named rightly: "44 of 44 Ba, 40 of 41 O"."""
    return ", ".join(f"{found.get(symbol, 0):g} of {count} {symbol}" for symbol, count in true_counts(data).items())


def table(found: Traced) -> np.ndarray:
    """(atom, COLUMNS), as it is kept beside a volume."""
    return np.column_stack([found.positions, found.intensities, found.classes]).astype(np.float64)


def from_table(rows: np.ndarray) -> Traced:
    """The other way; the thresholds are the largest intensities below them."""
    intensities, classes = rows[:, 3], rows[:, 4].astype(int)
    low, high = (float(intensities[classes < above].max(initial=0.0)) for above in (LIGHT, HEAVY))
    return Traced(rows[:, :3], intensities, classes, (low, high))


def xyz(sweep: Sweep, rows: np.ndarray, width: float) -> str:
    """Extended XYZ of the traced atoms. width: of the volume [nm]."""
    assert isinstance(sweep.data, Scanned | Recorded)
    return traced_xyz(from_table(rows), width, *symbols(sweep.data))


def text(run: Run) -> str:
    """What the best trial of each cell found of the atoms."""
    lines = []
    for cell in run.cells:
        best: Mapping[str, Any] = run.winner(cell) or {}
        metrics, found = best.get("metrics", {}), best.get("elements", {}).get("found", {})
        if "rmsd" not in metrics or not isinstance(cell.sweep.data, Scanned):
            continue
        told = {"defocus": "{:.2f} nm defocus", "moved": "positions moved by {:.1f} pm (rms)",
                "shift_error": "shifts to {:.3f} pixel (rms)", "inplane_error": "turns in plane to {:.3f} degrees"}
        refined = [words.format(metrics[name]) for name, words in told.items() if name in metrics]
        lines.append(f"{cell.id}: RMSD {metrics['rmsd']:.2f} pm, tracing error {metrics['tracing_error']:.1f} %, "
                     f"classification {metrics['classification']:.1f} %; found and named rightly: "
                     f"{named(cell.sweep.data, found)}" + (f"; refined: {', '.join(refined)}" if refined else ""))
        if "depth_one_tilt" in metrics:
            one, all_tilts = metrics["depth_one_tilt"], metrics["depth_tomogram"]
            lines.append(f"{cell.id}: resolution along the beam, where planes correlate by half with the truth: one "
                         f"tilt {one:.2g} nm, tomogram {all_tilts:.2g} nm, {one / all_tilts:.3g} times finer")
    return "\n".join(["Atoms", *lines]) if lines else ""


def kinds(sweep: Sweep, rows: np.ndarray) -> dict[str, np.ndarray]:
    """(atom, 3) positions [nm] by what they are: true and rightly named, wrongly named, false, missing.

    Without known atoms: light and heavy.
    """
    found, data = from_table(rows), sweep.data
    kept = found.positions[found.classes != NON_ATOM]
    if not isinstance(data, Scanned):
        heavy = found.classes[found.classes != NON_ATOM] == HEAVY
        return {"light": kept[~heavy], "heavy": kept[heavy]}
    result, true = compared(data, found), specimen(data)
    pairs, right = result.pairs, result.right
    return {"right": kept[pairs[right, 0]], "wrong element": kept[pairs[~right, 0]],
            "false": np.delete(kept, pairs[:, 0], 0), "missing": np.delete(true.positions, pairs[:, 1], 0)}


def known(error: DataError) -> str:
    """Why a volume has no atoms, for the row of its trial."""
    return f"no atoms could be traced: {error}"
