"""Particles in the volumes of a run: how many there are, how large, how thick a shell is. No JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.data import DataError
from engine.morphology import Particles, particles, profile
from sweeps.schema import Grains
from sweeps.tables import Run

COLUMNS = ("z", "y", "x", "diameter", "cut")  # of the particles beside a volume; lengths in nm


def found(given: Grains, volume: np.ndarray, elements: Sequence[str], voxel: float) -> Particles:
    """Particles of a volume (element, z, y, x); DataError where there are none."""
    chosen = [elements.index(name) for name in given.of or elements]
    return particles(volume[chosen].sum(0), voxel, threshold=given.threshold, least=given.least)


def scores(given: Grains, volume: np.ndarray, elements: Sequence[str],
           voxel: float) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Numbers for a row, and arrays beside the volume: `particles` (particle, COLUMNS), `profile` (1 + element, depth)
    with the depth first. Nothing of what a volume does not show."""
    try:
        grains = found(given, volume, elements, voxel)
    except DataError:
        return {"particles": 0.0}, {}
    mean, sigma = grains.spread()
    whole = {"particles": float(len(grains.volumes)), "particles_cut": float(grains.cut.sum()), "diameter": mean,
             "diameter_sigma": sigma}
    arrays = {"particles": np.column_stack([grains.centres, grains.diameters, grains.cut])}
    try:
        inward = profile(volume, grains, voxel)
        arrays["profile"] = np.vstack([inward.depth, inward.values])
        if given.shell and given.core:
            whole["shell"], whole["shell_se"] = inward.shell(elements.index(given.shell), elements.index(given.core))
    except DataError:
        pass
    return {name: value for name, value in whole.items() if np.isfinite(value)}, arrays


def text(run: Run) -> str:
    """What the best trial of each cell shows of particles."""
    lines, given = [], run.sweep.output.particles
    for cell in run.cells:
        best: Mapping[str, Any] = run.winner(cell) or {}
        metrics = best.get("metrics", {})
        if given is None or "particles" not in metrics:
            continue
        words = f"{metrics['particles']:.0f} particles"
        if cut := metrics.get("particles_cut"):
            words += f", {cut:.0f} of them cut off by the field"
        if "diameter" in metrics:
            words += f"; diameter {metrics['diameter']:.3g} ± {metrics['diameter_sigma']:.2g} nm"
        if "true_diameter" in metrics:
            words += (f" (true: {metrics['true_particles']:.0f} of {metrics['true_diameter']:.3g} ± "
                      f"{metrics['true_diameter_sigma']:.2g} nm)")
        if "shell" in metrics:
            words += f"; shell of {given.shell} {metrics['shell']:.3g} ± {metrics['shell_se']:.1g} nm"
        lines.append(f"{cell.id}: {words}")
    return "\n".join(["Particles", *lines]) if lines else ""
