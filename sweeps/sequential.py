"""Trials of mspt: a phase image of each tilt, then their alignment and a potential, its atoms and their errors.

Each tilt's image is a stage of its own: workers share the tilts of a trial, a run that was killed goes on at the tilt
where it was, and trials that differ in what comes later share the images. Imports JAX, as a worker does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import align, denoise, mspt, ptychography, resolution
from engine.data import DataError, Solution
from engine.diffraction import DiffractionSeries
from engine.euler import matrix
from engine.iterate import Keep
from engine.metrics import nrmse
from sweeps import atomic, crystalline, imported, needs, scanned, stages
from sweeps.patterns import Mspt, Recorded, Scanned, crystal_of
from sweeps.settings import Range, Sweep, dump

SECTIONED = "sections"  # the stage of one tilt in thin slices
FIRST = ("iterations", "slices", "depth", "group", "step", "momentum", "loss", "absorption", "modes", "coupling",
         "refine", "refine_after", "finer", "method")  # settings of the solver that an image follows from
COMMON = 1e-3  # by which axes of turns may differ, as unit vectors
ROUND = 5  # steps of the volume in one of solver.rounds


def evaluate(sweeps: Sequence[Sweep], folder: Path, batch: str) -> list[tuple[Solution, dict[str, Any]]]:
    """Solutions and scores, one after the other; `sweeps.trial` has what a batch is."""
    return [_evaluated(sweep, folder) for sweep in sweeps]


def help_along(sweep: Sweep, folder: Path) -> None:
    """Make images that a trial lacks, beside the worker that has it, until none is missing."""
    _images(sweep, folder, scanned.recorded(sweep, folder))


def about_one_axis(turns: np.ndarray) -> tuple[np.ndarray, float]:
    """Tilts about an axis that lies across the beam, (tilt, 3) Euler angles [deg]: the angles (tilt,) about it, and its
    turn [deg] from x about the beam. DataError for turns about different axes, or one along the beam."""
    if not turns[:, :2].any():
        return turns[:, 2], 0.0
    found, first = [matrix(turn) for turn in turns], matrix(turns[0])
    apart = [turn @ first.T for turn in found]
    axes = np.array([[a[2, 1] - a[1, 2], a[0, 2] - a[2, 0], a[1, 0] - a[0, 1]] for a in apart])  # 2 sin(angle) axis
    longest = axes[np.linalg.norm(axes, axis=1).argmax()]
    length = float(np.linalg.norm(longest))
    if length < COMMON:
        raise DataError("the tilts are one and the same; a tomogram needs several")
    axis = longest / length * (1 if longest[2] >= 0 else -1)  # along +x rather than against it
    if abs(axis[0]) > COMMON or any(np.linalg.norm(a @ axis - axis) > COMMON for a in apart):
        raise DataError("the tilts are not about one axis across the beam; take mset, which takes any")
    inplane = float(np.degrees(np.arctan2(-axis[1], axis[2])))
    across = np.array([0.0, axis[2], -axis[1]])  # the direction across axis and beam, to which +z turns
    beam = np.array([1.0, 0.0, 0.0])
    raw = [np.degrees(np.arctan2(across @ turn @ beam, beam @ turn @ beam)) for turn in found]
    return np.array(raw), inplane


def _evaluated(sweep: Sweep, folder: Path) -> tuple[Solution, dict[str, Any]]:
    solver, data = sweep.solver, sweep.data
    assert isinstance(solver, Mspt) and isinstance(data, Scanned | Recorded)
    if isinstance(data, Recorded):
        imported.tell(data, folder)
    series = scanned.recorded(sweep, folder)
    angles, inplane = about_one_axis(series.angles)
    start = align.Alignment.none(len(angles))
    start = replace(start, inplane=start.inplane + inplane)
    phases, numbers = _images(sweep, folder, series)
    told: list[float] = []
    planted = scanned.planted(data) if isinstance(data, Scanned) else None
    made = mspt.tomogram(phases, angles, 1 / (series.optics.interaction * series.pixel), chain(solver), start=start,
                         reference=planted, observe=lambda *at: told.append(float(np.sqrt((at[2] ** 2).mean()))))
    score, fields = scanned.score_of(sweep, made.volume, series.pixel, numbers | _errors(made, planted))
    if isinstance(data, Scanned):
        score = _compared(sweep, made.volume, series, score, folder)
    score = _crystal(sweep, made, series.pixel, float(np.abs(angles).max()), score)
    fields |= {"alignment": np.column_stack([angles, _table(made.alignment)]), "gauge": made.gauge,
               "images": made.images, "residual": np.stack([made.before, made.residual])}
    fields |= {} if made.mask is None else {"mask": made.mask}
    fields |= {} if planted is None else {"planted": _table(planted)}
    history = np.array([float(np.sqrt((made.before**2).mean())), *told])
    metrics = {**score["metrics"], "iterations": len(told)}
    solution = Solution(made.volume[None].astype(np.float32), {"residual": history},
                        f"aligned in {len(told)} rounds", bool(np.isfinite(made.volume).all()), metrics, fields)
    return solution, score | {"checkpoints": []}


def chain(solver: Mspt) -> mspt.Settings:
    """The engine's settings of what follows the images."""
    levels = tuple(align.Level(level.bins, level.rounds, tuple(level.free)) for level in solver.levels)
    numbers: dict[str, Any] = {name: getattr(solver, name) for name in ("mask", "rounds", "blur")}
    strength, sparsity, clip = (_number(value) for value in (solver.strength, solver.sparsity, solver.clip))
    asked = denoise.Settings(solver.denoise, strength, sparsity)
    if solver.denoise != "none" or asked.sparsity > 0:
        numbers["denoise"] = lambda images: np.stack([denoise.denoise(image, asked) for image in images])
    return mspt.Settings(alignment=align.Settings(levels, solver.steps, clip), **numbers)


def _number(value: float | Range[float]) -> float:
    """A setting of a trial, of which a search has made a number."""
    assert not isinstance(value, Range)
    return float(value)


def _images(sweep: Sweep, folder: Path, series: DiffractionSeries) -> tuple[np.ndarray, dict[str, float]]:
    """(tilt, y, x) phases, each kept as soon as it is there, and the means of their numbers."""
    held = sweep.search.objective == "heldout"
    inputs = _inputs(sweep, folder) | {"folds": sweep.search.folds if held else 0}
    fitted = scanned.left_out(series, sweep.search.folds, sweep.seed) if held else None
    chosen = _ptychography(sweep, series)
    tilts = len(series.angles)
    needs.check_memory(sweep, needs.solve(sweep, elements=1, shape=(series.size,) * 3, haadf_tilts=0, chem_tilts=tilts,
                                          probes=len(series.positions)), 1)

    def made(tilt: int) -> stages.Arrays:
        keep = Keep(folder / "partial" / f"{stages.key('tilt', inputs | {'tilt': tilt})}.npz", "tilt")
        found = mspt.image(series, tilt, chosen, keep=keep, fitted=None if fitted is None else fitted[tilt])
        return {"phase": found.phase, **{name: np.array(value) for name, value in found.numbers.items()}}

    kept = stages.together(folder, "tilt", [inputs | {"tilt": tilt} for tilt in range(tilts)], made)
    means = {name: float(np.mean([each[name] for each in kept])) for name in kept[0] if name != "phase"}
    return np.stack([each["phase"] for each in kept]), means


def _inputs(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """What an image follows from, but for its tilt."""
    return {"data": dump(sweep)["data"], "origin": scanned.origin(sweep, folder), "seed": sweep.seed,
            "solver": {name: getattr(sweep.solver, name) for name in FIRST}}


def _ptychography(sweep: Sweep, series: DiffractionSeries) -> ptychography.Settings:
    """The engine's settings of an image."""
    solver = sweep.solver
    assert isinstance(solver, Mspt)
    given: dict[str, Any] = {name: getattr(solver, name) for name in FIRST if name != "method"}
    given |= {"depth": solver.depth or series.size * series.pixel}
    return ptychography.Settings(**given | ({"slices": 1} if solver.method == "sspt" else {}))


def _sections(sweep: Sweep, series: DiffractionSeries, folder: Path) -> dict[str, float]:
    """Resolution along the beam [nm] of the tilt next to 0 by itself, in thin slices, where that is asked for."""
    solver, data = sweep.solver, sweep.data
    assert isinstance(solver, Mspt) and isinstance(data, Scanned)
    if not solver.sections or solver.method == "sspt":
        return {}
    tilt = int(np.abs(scanned.angles(data)).argmin())
    chosen = replace(_ptychography(sweep, series), slices=solver.sections)

    def made() -> stages.Arrays:
        found = ptychography.reconstruct(series, tilt, chosen)
        if not found.ok:
            raise DataError(f"{SECTIONED} at {scanned.angles(data)[tilt]:g} degrees: {found.status}")
        return {"phase": found.volume[0]}

    inputs = _inputs(sweep, folder) | {"sections": solver.sections, "tilt": tilt}
    phases, sides = stages.stage(folder, SECTIONED, inputs, made)["phase"], mspt.scanned(series)
    true = scanned.sections(data, tilt, solver.sections, chosen.depth)
    found = resolution.plane_correlation(mspt.cut(phases, sides), mspt.cut(true, sides), chosen.depth / solver.sections)
    return {"depth_one_tilt": found.length("0.5")}


def _errors(made: mspt.Tomogram, planted: align.Alignment | None) -> dict[str, float]:
    """Root mean square residual of the images, and, where it is known, what is left of the misalignment."""
    found = {"residual": float(np.sqrt((made.residual**2).mean()))}
    if planted is None:
        return found
    off = made.alignment.less(planted)
    return found | {name: float(np.sqrt((array**2).mean())) for name, array in (
        ("shift_error", off.shifts), ("inplane_error", off.inplane), ("tilt_error", off.tilt),
        ("azimuth_error", off.azimuth))}


def _compared(sweep: Sweep, volume: np.ndarray, series: DiffractionSeries, score: dict[str, Any],
              folder: Path) -> dict[str, Any]:
    """The score with the volume's likeness to the true potential, as a whole and along the beam."""
    assert isinstance(sweep.data, Scanned)
    true = atomic.truth(sweep.data, volume.shape, series.pixel)
    found, along = nrmse(volume, true), resolution.plane_correlation(volume, true, series.pixel).length("0.5")
    told = {"nrmse": found, "depth_tomogram": along} | _sections(sweep, series, folder)
    score["metrics"] |= {name: value for name, value in told.items() if np.isfinite(value)}
    score["elements"]["nrmse"] = {"potential": found}
    if sweep.search.objective == "nrmse":
        score |= {"objective": found, "status": "ok"}
    return score


def _crystal(sweep: Sweep, made: mspt.Tomogram, voxel: float, highest: float,
             score: dict[str, Any]) -> dict[str, Any]:
    """The score with what the volume tells of the specimen's lattice, if it is said to have one."""
    assert isinstance(sweep.data, Scanned | Recorded)
    name, objective = crystal_of(sweep.data), sweep.search.objective
    if name is None:
        return score
    try:
        whole, each = crystalline.found(name, made.volume, voxel, made.mask, highest)
    except DataError as error:
        return score | ({"status": crystalline.refused(error)} if objective == "missing_sites" else {})
    score["metrics"] |= whole
    score["elements"] |= each
    return score | ({"objective": whole["missing_sites"], "status": "ok"} if objective == "missing_sites" else {})


def _table(alignment: align.Alignment) -> np.ndarray:
    """(tilt, 5): shift y, x [pixel], turns about the beam, the tilt axis and across [deg]."""
    return np.column_stack([alignment.shifts, alignment.inplane, alignment.tilt, alignment.azimuth])
