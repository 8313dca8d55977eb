"""Trials of mset: a 4D-STEM tilt series in, a potential, its atoms and their errors out. Imports JAX, as a worker does.

The data of a specimen are simulated without noise once, and counted anew for each dose.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine import adf, align, diffraction, mset, scans
from engine.atoms import Atoms, potential_slices
from engine.data import DataError, Solution, TiltSeries
from engine.diffraction import DiffractionSeries, Scan
from engine.iterate import Keep
from engine.multislice import Optics
from sweeps import atomic, imported, needs, stages
from sweeps.patterns import Mset, Mspt, Recorded, Scanned
from sweeps.scores import Score
from sweeps.settings import Sweep, dump
from sweeps.specimens import recent

DARK = 100  # iterations that linear tomography takes at least (the paper's)
WINDOW = 0.96  # [nm] around a focused probe in which its wave is followed
# Settings that change the counts of one and the same series, or what the solver is told of it.
AFTERWARDS = ("dose", "replicate", "defocus_error", "position_error")


NAMES = {"held_out_error": "heldout", "error": "amplitude_error"}  # of the solvers, in a row
TOLD = ("amplitude_error", "heldout", "defocus", "moved", "residual", "shift_error", "inplane_error", "tilt_error",
        "azimuth_error")  # what a row tells beside the atoms


def evaluate(sweeps: Sequence[Sweep], folder: Path, batch: str) -> list[tuple[Solution, dict[str, Any]]]:
    """Solutions and scores, one after the other; `sweeps.trial` has what a batch is."""
    return [_evaluated(sweep, folder, f"{batch}-{k}" if len(sweeps) > 1 else batch) for k, sweep in enumerate(sweeps)]


def described(sweep: Sweep, folder: Path) -> tuple[tuple[str, ...], float]:
    """What a volume is of, and the edge of its voxels [nm]."""
    data = sweep.data
    return ("potential",), data.pixel if isinstance(data, Scanned) else recorded(sweep, folder).pixel


def recorded(sweep: Sweep, folder: Path) -> DiffractionSeries:
    """The patterns of a cell, with their noise."""
    data = sweep.data
    if isinstance(data, Recorded):
        path, chosen = imported.group(data, folder)
        most = {"always": 0.0, "never": np.inf, "auto": needs.room()}[data.stream]
        given = {"path": str(path), **chosen, "stream": data.stream}
        return recent("recorded", given, lambda: scans.load(path, **chosen, most=most))
    assert isinstance(data, Scanned)
    clean = recent("scanned", _clean(data), lambda: _scanned(data, folder))
    counted = clean if data.dose is None else diffraction.with_dose(clean, data.dose, _seed(sweep))
    return _mistold(counted, data)


def _mistold(series: DiffractionSeries, data: Scanned) -> DiffractionSeries:
    """The series with the errors that its defocus and positions are planted with."""
    optics = replace(series.optics, defocus=series.optics.defocus + data.defocus_error)
    draws = np.random.default_rng([20_241, data.replicate]).standard_normal(series.positions.shape)
    edge = series.size * series.pixel / 2
    told = np.clip(series.positions + data.position_error / np.sqrt(2) * draws, -edge, edge)
    return replace(series, optics=optics, positions=told)


def dark_field(sweep: Sweep, folder: Path) -> TiltSeries:
    """The images of a focused scan with a probe at every voxel, at the same dose."""
    data = sweep.data
    assert isinstance(data, Scanned)
    clean = recent("dark field", _clean(data), lambda: _dark_field(data, folder))
    return clean if data.dose is None else adf.with_dose(clean, data.dose, _seed(sweep))


def left_out(series: DiffractionSeries, folds: int, seed: int) -> np.ndarray:
    """(tilt, probe) False for one of `folds` equal parts of each tilt's patterns, drawn at random."""
    tilts, count = series.patterns.shape[:2]
    parts = max(1, count // folds)
    rng, fitted = np.random.default_rng([20_240, seed]), np.ones((tilts, count), bool)
    for row in fitted:
        row[rng.choice(count, parts, replace=False)] = False
    return fitted


def _evaluated(sweep: Sweep, folder: Path, batch: str) -> tuple[Solution, dict[str, Any]]:
    given = sweep.solver
    assert isinstance(given, Mset)
    passed: dict[int, Score] = {}
    _, voxel = described(sweep, folder)

    def observe(n: int, volume: np.ndarray) -> None:
        passed[n] = score_of(sweep, volume[0], voxel, {})[0]

    solution = _solver(sweep, folder, batch)(checkpoints=given.record, observe=observe)
    if not solution.ok:
        return solution, {"objective": None, "metrics": {}, "elements": {}, "checkpoints": []}
    score, fields = score_of(sweep, solution.volume[0], voxel, solution.metrics)
    solution = replace(solution, fields=solution.fields | fields, metrics=solution.metrics | {
        "iterations": len(next(iter(solution.history.values()))) - 1})
    return solution, score | {"checkpoints": [{"iterations": n, **passed[n]} for n in sorted(passed)]}


def _solver(sweep: Sweep, folder: Path, batch: str) -> Any:
    """The solve of a trial; it takes checkpoints and observe."""
    given, record = sweep.solver, sweep.solver.record
    assert isinstance(given, Mset)
    if given.method == "resire" or given.method == "genfire":
        assert isinstance(given.lambda_tv, float)
        images = dark_field(sweep, folder)
        return partial(adf.reconstruct, images, adf.Settings(
            given.method, max(DARK, given.iterations), positivity=given.positivity, lambda_tv=given.lambda_tv,
            inner=given.inner))
    if isinstance(sweep.data, Recorded):
        imported.tell(sweep.data, folder)
    series, values = recorded(sweep, folder), given.model_dump()
    needs.check_memory(sweep, needs.solve(
        sweep, elements=1, shape=(series.size,) * 3, haadf_tilts=0, chem_tilts=len(series.angles),
        probes=len(series.positions), streamed=series.streamed), 1)
    chosen = mset.Settings(**{name: values[name] for name in mset.Settings.__dataclass_fields__})
    chosen = replace(chosen, binning=0) if given.method == "sset" else chosen
    fitted = left_out(series, sweep.search.folds, sweep.seed) if sweep.search.objective == "heldout" else None
    keep = Keep(folder / "partial" / f"{batch}.npz", stages.key("solve", {"sweep": dump(sweep)}))
    return partial(mset.reconstruct, series, chosen, keep=None if record else keep, fitted=fitted)


def score_of(sweep: Sweep, volume: np.ndarray, voxel: float,
             metrics: dict[str, Any]) -> tuple[Score, dict[str, np.ndarray]]:
    """The score of a potential (z, y, x), and the atoms in it, as fields; a volume without atoms has a status."""
    solver, objective = sweep.solver, sweep.search.objective
    assert isinstance(solver, Mset | Mspt)
    told = {NAMES.get(name, name): value for name, value in metrics.items()}
    found: Score = {"objective": None, "metrics": {name: told[name] for name in TOLD if name in told}, "elements": {}}
    fields: dict[str, np.ndarray] = {}
    try:
        traced = atomic.traced(solver, volume, voxel)
        fields["atoms"] = atomic.table(traced)
        if isinstance(sweep.data, Scanned):
            whole, each = atomic.scores(sweep.data, atomic.compared(sweep.data, traced))
            found["metrics"] |= whole
            found["elements"] |= each
    except DataError as error:
        if objective in ("rmsd", "tracing_error"):
            found["status"] = atomic.known(error)
    found["objective"] = found["metrics"].get(objective)
    if metrics and found["objective"] is None:
        found.setdefault("status", "no traced atom lies near a true one")
    return found, fields


def _clean(data: Scanned) -> dict[str, Any]:
    """What a series without noise follows from."""
    return data.model_dump(exclude=set(AFTERWARDS))


def _seed(sweep: Sweep) -> int:
    """Of the noise: from the sweep's seed and the data settings alone."""
    return zlib.crc32(stages.key("noise", {"data": dump(sweep)["data"], "seed": sweep.seed}).encode())


def planted(data: Scanned) -> align.Alignment:
    """By how much each scan of the series is off, which a solver is not told."""
    rng, tilts = np.random.default_rng([20_242, data.particle]), data.tilts
    shifts = rng.uniform(-1, 1, (tilts, 2)) * data.shift_error / data.pixel
    turns = (rng.uniform(-1, 1, tilts) * most for most in (data.inplane_error, data.tilt_error, data.azimuth_error))
    return align.Alignment(shifts, *turns)


def sections(data: Scanned, tilt: int, slices: int, depth: float) -> np.ndarray:
    """True potentials (slice, y, x) [V nm] of what is scanned at a tilt, in slices that fill `depth` [nm]."""
    off, atoms, around = planted(data), atomic.specimen(data), atomic.substrate(data)
    atoms = atoms if around is None else atoms.joined(around)
    turned = atoms.turned(off.turns(angles(data))[tilt])
    places = turned.positions + data.pixel * np.array([0, *off.shifts[tilt]])
    inside = (np.abs(places) <= data.size * data.pixel / 2).all(1)
    return potential_slices(Atoms(turned.symbols[inside], places[inside]), data.size, data.pixel, slices,
                            depth / slices, atomic.THERMAL)


def origin(sweep: Sweep, folder: Path) -> str:
    """What tells a recorded series from another of the same settings: its file, and when that was written."""
    if isinstance(sweep.data, Scanned):
        return ""
    assert isinstance(sweep.data, Recorded)
    path, _ = imported.group(sweep.data, folder)
    file = path / "zarr.json" if path.is_dir() else path
    return f"{path} {file.stat().st_mtime_ns if file.exists() else 0}"


def _optics(data: Scanned) -> Optics:
    return Optics(data.voltage, data.aperture, data.defocus, data.c3, data.c5)


def angles(data: Scanned) -> np.ndarray:
    """(tilt,) [deg]; of half a turn the end is left out, which shows what the start shows."""
    low, high = data.tilt_range
    if data.tilts == 1:
        return np.array([(low + high) / 2])
    return np.linspace(low, high, data.tilts, endpoint=high - low < 180)


def _scanned(data: Scanned, folder: Path) -> DiffractionSeries:
    scan = Scan(data.size, data.pixel, data.probes, _optics(data), phonons=data.phonons)

    def make() -> stages.Arrays:
        off = planted(data)
        made = diffraction.simulate(atomic.specimen(data), scan, off.turns(angles(data)),
                                    shifts=data.pixel * off.shifts, around=atomic.substrate(data))
        return {"patterns": made.patterns} | ({} if made.adf is None else {"adf": made.adf})

    arrays = stages.stage(folder, "scan", _clean(data), make)
    return DiffractionSeries(arrays["patterns"], angles(data), scan.positions, data.pixel, scan.optics,
                             adf=arrays.get("adf"))


def _dark_field(data: Scanned, folder: Path) -> TiltSeries:
    """In focus at half depth, of atoms at rest."""
    optics = replace(_optics(data), defocus=data.size * data.pixel / 2)
    scan = Scan(data.size, data.pixel, data.size, optics, finer=5, slices=0.2, thermal=0.0)

    def make() -> stages.Arrays:
        return {"images": adf.simulate(atomic.specimen(data), scan, angles(data), WINDOW).projections}

    arrays = stages.stage(folder, "dark", _clean(data), make)
    return TiltSeries(arrays["images"], angles(data), (adf.NAME,), data.pixel, "intensity")
