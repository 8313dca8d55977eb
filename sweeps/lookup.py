"""Where a search starts: the weights that an atlas, made by simulation, has found for a sampling like the data's.

Samplings are compared by the ratios of their numbers: images, maps, the range of tilts, the counts of a map's pixel
(SNR - 1) and HAADF's. What still differs from the nearest cell's is made up for by a law: total variation has to hold
down noise, so that lambda_tv goes with the square root of the counts that there are for each voxel
(`engine.heldout.weight`). A pixel's are shared out over the voxels of its ray: maps x counts / voxels across. The best
lambda_tv of cocuo went with the power 0.56 of maps x counts (20-fold, at 32^3) and -0.46 of the voxels (24 to 64).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from engine.data import DataError, MultiModal, TiltSeries, estimate_noise
from sweeps import grid, settings, stages
from sweeps.grid import Cell, Dimension
from sweeps.journal import RunError
from sweeps.schema import Fused3D, Phantom
from sweeps.settings import SettingsError, Sweep
from sweeps.sources import Measured

STARTS = 3  # nearest cells, at most, whose weights a search begins with
# In the distance, of images, maps, range, counts, HAADF's counts and voxels. HAADF's noise is told from pixels that
# structure sets apart as well (a simulated 2208 counts were told as 55 at 32^3 and as 382 at 64^3), and matters least.
WEIGHTS = (1.0, 1.0, 1.0, 1.0, 0.1, 0.0)
NONE = 1e-3  # stands for no images, and for no HAADF counts, where ratios are taken


@dataclass(frozen=True)
class Sampling:
    """What was measured. counts: mean of a map's pixel, SNR - 1 (the geometric mean of the elements); haadf: of an
    image's. covered: [deg] from the lowest tilt to the highest. voxels: across the volume."""

    images: int
    maps: int
    covered: float
    counts: float
    haadf: float
    voxels: int

    def __str__(self) -> str:
        return (f"{self.images} images, {self.maps} maps, over {self.covered:g} degrees, at {self.counts:.3g} counts "
                f"in a pixel of the maps and {self.haadf:.3g} in one of the images")

    def apart(self, other: Sampling) -> float:
        """Distance between two samplings, in logarithms; the voxels are only a way to write them down."""
        pairs = zip(astuple(self), astuple(other), WEIGHTS, strict=True)
        return math.hypot(*(weight * math.log(max(a, NONE) / max(b, NONE)) for a, b, weight in pairs))

    def strength(self, other: Sampling) -> float:
        """The factor on lambda_tv that leads from the other sampling to this one."""
        here, there = (each.maps * max(each.counts, NONE) / each.voxels for each in (self, other))
        return math.sqrt(here / there)


@dataclass(frozen=True)
class Entry:
    """What an atlas has found in a cell. weights: by dotted setting, also those that it has not searched."""

    cell: str
    alone: bool  # whether from the maps alone
    sampling: Sampling
    weights: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """Weights to try first, and a sentence that says where they are from."""

    params: dict[str, Any]
    source: str


def starts(cell: Cell) -> tuple[Start, ...]:
    """The first proposals of a cell whose search has an atlas, the nearest first; RunError where it has none for it."""
    path = cell.sweep.search.atlas
    if path is None or not cell.space:
        return ()
    name, entries = _read(Path(path))
    here, alone = of_cell(cell.sweep), grid.maps_alone(cell.sweep)
    found: dict[str, Start] = {}
    for entry in nearest([entry for entry in entries if entry.alone == alone], here):
        params = proposal(cell, entry, here)
        found.setdefault(json.dumps(params), Start(params, f"as in the cell {entry.cell} of {name} ({entry.sampling}), "
                                                           f"for {here}"))
    if not found:
        raise RunError(f"search.atlas: {path} has no finished cell {'of the maps alone' if alone else 'with images'}; "
                       f"simulate one like {cell.id}, or leave search.atlas out")
    return tuple(found.values())[:STARTS]


def check(cells: Sequence[Cell]) -> None:
    """RunError, before anything runs, where a cell's first proposals cannot be had."""
    for cell in cells:
        starts(cell)


def nearest(entries: Sequence[Entry], here: Sampling) -> list[Entry]:
    """The entries, those of the most similar sampling first."""
    return sorted(entries, key=lambda entry: (entry.sampling.apart(here), entry.cell))


def proposal(cell: Cell, entry: Entry, here: Sampling) -> dict[str, Any]:
    """An entry's weights for a cell's search: brought to its counts and to its lambda_chem, and into its ranges."""
    weights, solver = dict(entry.weights), cell.sweep.solver
    assert isinstance(solver, Fused3D)
    weights["solver.lambda_tv"] *= here.strength(entry.sampling)
    if "solver.lambda_chem" not in cell.space:  # only the weights' ratios matter
        assert isinstance(solver.lambda_chem, float)
        ratio = solver.lambda_chem / weights["solver.lambda_chem"]
        weights |= {name: ratio * weights[name] for name in ("solver.lambda_model", "solver.lambda_tv")}
    missing = [name for name in cell.space if name not in weights]
    if missing:
        raise RunError(f"search.atlas: {cell.sweep.search.atlas} tells nothing of {', '.join(missing)}; fix it, or "
                       "leave search.atlas out")
    return {name: _within(dimension, weights[name]) for name, dimension in cell.space.items()}


def of_cell(sweep: Sweep) -> Sampling:
    """The sampling of a cell's data: as it is simulated, or as estimated from what was measured."""
    data = sweep.data
    if isinstance(data, Measured):
        return _of_files(data.model_dump_json(), sweep.system == "fused2d")
    assert isinstance(data, Phantom)
    counts = [data.snr["chem"] * (snr - 1) for name, snr in data.snr.items() if name not in ("chem", "haadf")]
    low, high = data.tilt_range
    haadf = data.snr["haadf"] - 1 if data.haadf_tilts else 0.0
    return Sampling(data.haadf_tilts, data.chem_tilts, high - low, _mean(counts), haadf, data.size)


def of_data(data: MultiModal) -> Sampling:
    """The sampling of measured data: SNR - 1 is the mean count of Poisson maps, and of others what noise says."""
    angles = np.concatenate([data.chem.angles, [] if data.haadf is None else data.haadf.angles])
    return Sampling(0 if data.haadf is None else data.haadf.tilts, data.chem.tilts, float(np.ptp(angles)),
                    _mean(_counts(data.chem)), 0.0 if data.haadf is None else _counts(data.haadf)[0], data.shape[1])


def _counts(series: TiltSeries) -> list[float]:
    """Mean count of a pixel of each element; where the unit is another, of the counts that such noise would have."""
    if series.units == "counts":
        return [float(stack.mean(dtype=np.float64)) for stack in series.projections]
    means = [max(float(stack.mean(dtype=np.float64)), 0.0) for stack in series.projections]
    if series.noise is not None:
        return [mean**2 / float(noise) ** 2 for mean, noise in zip(means, series.noise, strict=True)]
    # The estimate is of the brighter pixels: where a count is g units, the square of their noise is g times their mean.
    bright = [max(float(stack[stack > np.median(stack)].mean(dtype=np.float64)), 0.0) for stack in series.projections]
    return [each * mean / estimate_noise(stack) ** 2
            for each, mean, stack in zip(bright, means, series.projections, strict=True)]


@cache
def _of_files(given: str, flat: bool) -> Sampling:
    """Once for all cells that share the data."""
    try:
        return of_data(stages.measured_data(Measured.model_validate_json(given), flat=flat))
    except DataError as error:
        raise RunError(f"search.atlas: the sampling cannot be told: {error}") from None


@cache
def _read(path: Path) -> tuple[str, list[Entry]]:
    """The name of an atlas, and what it has found, from a run folder or from the atlas in it."""
    inside = path / "atlas.zarr"
    try:
        root = zarr.open_group(inside if inside.is_dir() else path, mode="r")
        sweep = settings.load(json.loads(str(root.attrs["settings"])))
        return sweep.name, list(_entries(root, sweep))
    except (OSError, KeyError, ValueError, SettingsError) as error:
        raise RunError(f"search.atlas: {path} is no atlas of this version, nor a run folder with one ({error}); give "
                       "the folder of a finished `tomoatlas run`") from None


def _entries(root: zarr.Group, sweep: Sweep) -> Iterator[Entry]:
    """The cells of an atlas that have a winner; with checkpoints at the last of them."""
    for cell in grid.cells(sweep):
        if not isinstance(cell.sweep.data, Phantom) or not isinstance(cell.sweep.solver, Fused3D):
            raise ValueError("it holds no simulated fused tomography")
        if np.isfinite(_at(root, "objective", cell)):
            weights = {f"solver.{name}": value for name, value in cell.sweep.solver.model_dump().items()
                       if isinstance(value, int | float)}
            weights |= {name: _at(root, f"best_{name.rpartition('.')[2]}", cell) for name in cell.space}
            yield Entry(cell.id, grid.maps_alone(cell.sweep), of_cell(cell.sweep), weights)


def _at(root: zarr.Group, name: str, cell: Cell) -> float:
    array = root[name]
    assert isinstance(array, zarr.Array)
    values = np.asarray(array[cell.index])
    return float(values if values.ndim == 0 else values[-1])


def _within(dimension: Dimension, value: float) -> Any:
    """The value in a range, or the choice, that is nearest."""
    if dimension.choices is not None:
        return min(dimension.choices, key=lambda choice: abs(choice - value))
    value = min(max(value, dimension.low), dimension.high)
    return round(value) if dimension.integer else value


def _mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(math.fsum(math.log(max(value, NONE)) for value in values) / len(values))
