"""What a sweep will cost, before it runs: cells, trials, solves, bytes and hours, and whether it fits."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine import estimate
from engine.estimate import size
from launch import devices, resources
from sweeps import grid, needs
from sweeps.fields import ends
from sweeps.grid import Cell
from sweeps.patterns import OF_PATTERNS, Mset, Recorded, Scanned
from sweeps.rules import elements
from sweeps.settings import Sweep, get, tunables
from sweeps.sources import Measured
from sweeps.tables import shown, title

if TYPE_CHECKING:
    from engine.measured import Recording

GIB = 2**30


@dataclass(frozen=True)
class Extent:
    """The sizes that rule a solve. shape: (nz, ny, nx); haadf, chem: numbers of projections; pixel: [nm].

    probes: patterns at each tilt; 0 where there are images. files: that a group of them has, where one is to be made.
    """

    elements: tuple[str, ...]
    shape: tuple[int, int, int]
    haadf: int
    chem: int
    pixel: float
    probes: int = 0
    files: int = 0

    @property
    def volume(self) -> int:
        """Bytes of one volume of all elements, float32."""
        nz, ny, nx = self.shape
        return 4 * len(self.elements) * nz * ny * nx

    @property
    def projections(self) -> int:
        """Bytes of the prepared data of a cell, float32."""
        _, ny, nx = self.shape
        return 4 * (self.haadf + len(self.elements) * self.chem * max(1, self.probes)) * ny * nx


@dataclass(frozen=True)
class Cost:
    """One cell. solves: reconstructions in all trials; memory: {array: bytes} on the device for one solve."""

    cell: Cell
    extent: Extent
    solves: int
    memory: dict[str, int]
    gpu_seconds: float
    core_seconds: float


@dataclass(frozen=True)
class Plan:
    """A sweep's costs. series: a line for each measured series; kept, stages: bytes on the disk.

    files: what the folder of a finished run holds at most, by kind.
    """

    sweep: Sweep
    costs: list[Cost]
    series: list[str]
    kept: int
    stages: int
    files: dict[str, int]

    @property
    def trials(self) -> int:
        return sum(grid.trials(cost.cell) for cost in self.costs)

    @property
    def largest(self) -> Cost:
        """The cell that needs most memory."""
        return max(self.costs, key=lambda cost: sum(cost.memory.values()))


def plan(sweep: Sweep) -> Plan:
    """The plan of a sweep; DataError where measured files do not hold what the settings say."""
    cells = grid.cells(sweep)
    series: dict[str, None] = {}
    opened: dict[str, tuple[Extent, list[str]]] = {}
    costs = []
    for cell in cells:
        extent, lines = _extent(cell.sweep, opened)
        series |= dict.fromkeys(lines)
        costs.append(_cost(cell, extent))
    kept = {"none": 0, "best": len(cells), "all": sum(map(grid.trials, cells))}[sweep.output.save]
    largest = max(cost.extent.volume for cost in costs)
    truths = 0 if isinstance(sweep.data, Measured) else largest
    stages = sum(cost.extent.projections for cost in costs) + truths
    volumes = kept * (1 + _fields(sweep)[0]) * largest
    return Plan(sweep, costs, list(series), volumes, stages, _files(sweep, costs, kept))


TABLES = 60  # arrays of atlas.zarr besides those of axes, tunables and folds, of which there are up to two and two more
FRACTIONS = 28  # of them, that weight fractions add
# Arrays beside each volume: of a number for each voxel and element, and others; of a system, and of weight fractions.
FIELDS = {"fused3d": (0, 0), "fused2d": (3, 1), "hebt": (0, 1), "mset": (0, 1), "mspt": (1, 6), "fractions": (2, 1)}
HISTORIES = 4  # of a solve's cost, in every volume
FIXED = 20  # journal, summary, settings, the report and its figures; of mset a list of atoms for each cell


def _fields(sweep: Sweep) -> tuple[int, int]:
    """How many arrays lie beside a volume, of its size at most and of a few numbers."""
    large, small = FIELDS[sweep.system]
    more = FIELDS["fractions"] if sweep.output.fractions else (0, 0)
    refined = len(sweep.solver.refine) if isinstance(sweep.solver, Mset) else 0
    told = 4 * sweep.output.resolution + 2 * (sweep.output.particles is not None)
    errors = 2 if sweep.system == "fused3d" and getattr(sweep.solver, "errors", "none") != "none" else 0
    return large + errors + more[0] + bool(sweep.output.haadf), small + more[1] + refined + told


def _files(sweep: Sweep, costs: list[Cost], kept: int) -> dict[str, int]:
    """How many files a run leaves at most. An array is its metadata and one file for each element and slab, or one.

    A winner's volume lies in the atlas and in volumes/, where a disk can as one file of two names.
    """
    from sweeps import stages

    each = max(len(cost.extent.elements) * -(-cost.extent.shape[0] // stages.planes(cost.extent.shape))
               for cost in costs)
    large, small = _fields(sweep)
    volume = 1 + (1 + large) * (1 + each) + 2 * (small + HISTORIES)
    published = len(costs) if kept else 0
    folds = sweep.search.folds + 2 if sweep.search.objective == "heldout" else 0
    told = (8 if sweep.output.resolution else 0) + (18 if sweep.output.particles else 0)
    made = sum({(cost.extent.shape, cost.extent.pixel): cost.extent.files for cost in costs}.values())
    if sweep.system == "mspt":  # a phase image of each tilt, for each way to make it
        made += sum(cost.extent.chem * max(1, round(grid.effort(cost.cell))) for cost in costs)
    sizes = {(cost.extent.elements, cost.extent.shape) for cost in costs}
    varied = len(grid.axes(sweep)) + len(list(tunables(sweep)))
    return {
        "volumes": (kept + published) * volume,
        "tables": 2 * (TABLES + (FRACTIONS if sweep.output.fractions else 0) + told + 2 * (varied + folds)),
        "prepared data": 0 if isinstance(sweep.data, Measured) else len(costs) + len(sizes) + made,
        "best settings": len(costs),
        "others": FIXED + (len(costs) if sweep.system in OF_PATTERNS and kept else 0),
    }


def _cost(cell: Cell, extent: Extent) -> Cost:
    """Searched trials, and the fixed ones at their own method and iterations.

    A held-out objective solves each trial once per fold and once with all maps; output.resolution each half once.
    """
    sweep = cell.sweep
    gpu_rows, core_rows = (_measured_solves(kind) for kind in ("gpu", "core"))
    several = sweep.search.objective == "heldout" and sweep.system not in OF_PATTERNS
    each = (sweep.search.folds + 1 if several else 1) + 2 * sweep.output.resolution
    planned = [(fixed, 1.0) for fixed in cell.fixed] + ([({}, grid.effort(cell))] if cell.space else [])
    memory: dict[str, int] = {}
    gpu = core = 0.0
    for params, count in planned:
        method, iterations = params.get("solver.method", ""), params.get("solver.iterations", 0)
        solve = needs.solve(
            sweep,
            elements=len(extent.elements),
            shape=extent.shape,
            haadf_tilts=extent.haadf,
            chem_tilts=extent.chem,
            method=method,
            iterations=iterations,
            probes=extent.probes,
            gpu=gpu_rows,
            core=core_rows,
            streamed=isinstance(sweep.data, Recorded) and sweep.data.stream == "always",
        )
        gpu += count * each * solve.seconds_gpu
        core += count * each * solve.seconds_cpu_core
        memory = max(memory, solve.bytes, key=lambda arrays: sum(arrays.values()))
    return Cost(cell, extent, each * grid.trials(cell), memory, gpu, core)


@cache
def _measured_solves(kind: str) -> list[estimate.Measured]:
    """The solves that docs/BENCHMARKS.md has for "gpu" or "core"."""
    page = resources.folder("docs") / "BENCHMARKS.md"
    return estimate.measured(page.read_text(), kind) if page.exists() else []


def _extent(sweep: Sweep, opened: dict[str, tuple[Extent, list[str]]]) -> tuple[Extent, list[str]]:
    """Sizes of a cell's problem and, for measured data, a line about each series.

    opened: what is known of measured data already, since the cells of a sweep mostly share it.
    """
    from sweeps import stages

    data = sweep.data
    if isinstance(data, Measured):
        key = data.model_dump_json()
        if key not in opened:
            opened[key] = _measured(sweep, data)
        return opened[key]
    if isinstance(data, Scanned):
        return Extent(elements(sweep), (data.size,) * 3, 0, data.tilts, data.pixel, data.probes**2), []
    if isinstance(data, Recorded):
        return _recorded(sweep, data)
    return Extent(elements(sweep), stages.extent(data), data.haadf_tilts, data.chem_tilts,
                  stages.voxel(data)), []


def _recorded(sweep: Sweep, data: Recorded) -> tuple[Extent, list[str]]:
    """Of a series in files, without its patterns; DataError names the line of the YAML."""
    from engine.data import DataError

    if isinstance(data.scan, str):
        (tilts, probes, stored, _), pixel = _grouped(sweep, Path(data.root, data.scan))
        if (data.crop or stored) > stored or data.bins > (data.crop or stored):
            raise DataError(f"{sweep.where('data.crop')}: patterns of {stored} pixels cannot be cropped to "
                            f"{data.crop or stored} and binned by {data.bins}")
        size, files = (data.crop or stored) // data.bins, 0
        pixel *= stored / (size * data.bins)
        name = str(Path(data.root, data.scan))
        line = f"{tilts} tilts, {probes} probes, {stored} x {stored} pixels, from {name}"
    else:
        from engine import archives
        from sweeps import imported

        seen = imported.survey(sweep, data)
        tilts, probes, size, pixel = seen.tilts, seen.scan[0] * seen.scan[1], seen.size, seen.pixel
        files = archives.count((tilts, probes, size, size), np.dtype(np.float32))
        (rows, columns), (qy, qx), name = seen.scan, seen.detector, "the series"
        line = (f"{tilts} tilts, {rows} x {columns} probes (y, x), {qy} x {qx} pixels of {seen.scale:.4g} mrad, bright "
                f"disc of {seen.radius:.1f} pixels about ({seen.centre[0]:.1f}, {seen.centre[1]:.1f})")
    if data.tilts and max(data.tilts) >= tilts:
        raise DataError(f"{sweep.where('data.tilts')}: there is no tilt {max(data.tilts)}; "
                        f"{name} has 0 to {tilts - 1}")
    if isinstance(sweep.solver, Mset) and sweep.solver.method == "mset":
        wrong = [end for end in ends(sweep.solver.binning) if size % end]
        if wrong:
            raise DataError(f"{sweep.where('solver.binning')}: {size} layers of voxels cannot be cut into slices of "
                            f"{wrong[0]}")
    extent = Extent(elements(sweep), (size,) * 3, 0, len(data.tilts or range(tilts)), pixel, probes, files)
    return extent, [f"data.scan: {line}"]


def _grouped(sweep: Sweep, path: Path) -> tuple[tuple[int, ...], float]:
    """The shape of a group's patterns, and their pixel [nm]."""
    from engine import archives
    from engine.data import DataError

    try:
        with archives.opened(path) as group:
            return group.arrays["patterns"].shape, float(group.attributes["pixel_nm"])
    except DataError as error:
        raise DataError(f"{sweep.where('data.scan')}: {error}") from None


def _measured(sweep: Sweep, data: Measured) -> tuple[Extent, list[str]]:
    """Opens the files; DataError names the line of the YAML."""
    from engine.data import DataError
    from sweeps import stages

    series = stages.recordings(data, sweep.where)
    try:
        whole = stages.measured_data(data, series, flat=sweep.system == "fused2d")
    except DataError as error:
        raise DataError(f"{sweep.where('data')}: {error}") from None
    haadf = whole.haadf.tilts if whole.haadf else 0
    lines = [_line(name, recording, data.binning) for name, recording in series.items()]
    return Extent(whole.chem.elements, whole.shape, haadf, whole.chem.tilts, whole.chem.pixel_size), lines


def _line(name: str, recording: Recording, binning: int) -> str:
    """A measured series in words, as it lies in its file."""
    _, tilts, ny, nx = recording.projections.shape
    angles = recording.angles
    pixel = f" of {recording.pixel_size:.4g} nm" if recording.pixel_size else ""
    maps = "" if name == "haadf" else f"{len(recording.elements)} elements, "
    binned = f", binned by {binning}" if binning > 1 else ""
    return (
        f"data.{name}: {maps}{tilts} projections from {angles.min():g} to {angles.max():g} degrees, "
        f"{ny} x {nx} pixels (y, x){pixel}{binned}, {recording.units}, from {recording.where}"
    )


def memory_here(workers: int) -> tuple[int, str]:
    """Bytes one worker may fill on this machine, the smallest GPU, else its share of the memory."""
    if devices.visible_gpus(os.environ):
        try:
            answer = subprocess.run(
                ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            ).stdout
            return int(min(float(line) for line in answer.split()) * 2**20 * devices.GPU_MEMORY), "on the GPU"
        except (OSError, ValueError, subprocess.SubprocessError):
            pass
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    return free // max(
        1, workers
    ), f"in this machine's memory for each of {workers} workers" if workers > 1 else "in memory"


def warnings(plan: Plan) -> Iterator[str]:
    """What a user should know before the sweep runs, though it can."""
    data = plan.sweep.data
    if isinstance(data, Measured) and data.chem.units != "counts" and not data.alone:
        yield (f"warning: {plan.sweep.where('data.chem.units')}: maps in {data.chem.units} are compared by least "
               "squares, with one noise level per element; give counts and their background for Poisson statistics")


def refusals(plan: Plan, available: int, where: str, folder: Path) -> Iterator[str]:
    """Why the sweep cannot run, with the arithmetic. available: bytes for one trial, 0 where unknown."""
    worst = plan.largest
    need = sum(worst.memory.values())
    if 0 < available < need:
        yield (
            f"{plan.sweep.name}: one trial of the cell {worst.cell.id} needs {estimate.arithmetic(worst.memory)}, and "
            f"{size(available)} are free {where}: lower {_smaller(plan)}, raise solver.devices, use fewer "
            "workers, or say with --memory how many GiB the machine has that it will run on"
        )
    asked = {getattr(cost.cell.sweep.solver, "denoise", "") for cost in plan.costs}
    if "bm3d" in asked and find_spec("bm3d") is None:
        yield (f"{plan.sweep.where('solver.denoise')}: bm3d comes from a package of that name, which is not installed: "
               "pip install 'tomoatlas[bm3d]' (for non-commercial use), or write nlm")
    free = disk_free(folder)
    if plan.kept + plan.stages > free:
        yield (
            f"{folder}: the atlas needs {size(plan.kept)} for volumes and {size(plan.stages)} for prepared "
            f"data, and {size(free)} are free there: choose another --out, or output.save: none or best"
        )


def _smaller(plan: Plan) -> str:
    return "data.crop or raise data.binning" if isinstance(plan.sweep.data, Measured) else "data.size"


def disk_free(folder: Path) -> int:
    """Free bytes where a folder lies or will lie."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def text(plan: Plan, available: int, where: str, folder: Path) -> str:
    """The plan in words and numbers, for `tomoatlas check`."""
    sweep, worst = plan.sweep, plan.largest
    axes = (
        " x ".join(f"{len(values)} {title(axis)}" for axis, values in grid.axes(sweep).items()) or "no grid"
    )
    fixed = sum(len(cost.cell.fixed) for cost in plan.costs)
    solves = sum(cost.solves for cost in plan.costs)
    searched = list(tunables(sweep))
    ranges = ", ".join(f"{name} {_range(sweep, name)}" for name in searched) or "nothing"
    shapes = sorted({cost.extent.shape for cost in plan.costs})
    volumes = ", ".join(" x ".join(map(str, shape)) for shape in shapes)
    pixels = " or ".join(f"{pixel:.4g}" for pixel in sorted({cost.extent.pixel for cost in plan.costs}))
    rows = [
        ["sweep", f"{sweep.name}, system {sweep.system}"],
        ["cells", f"{len(plan.costs):,} ({axes})"],
        ["trials", f"{plan.trials:,} ({plan.trials - fixed:,} searched, {fixed:,} fixed), {solves:,} solves"],
        ["searched", ranges],
        [
            "volume",
            f"{volumes} voxels (z, y, x) of {pixels} nm; {len(worst.extent.elements)} elements: "
            f"{', '.join(worst.extent.elements)}",
        ],
        *([line.partition(": ")[0], line.partition(": ")[2]] for line in plan.series),
        [
            "memory",
            f"{size(sum(worst.memory.values()))} for a trial of the cell {worst.cell.id}"
            + (f"; {size(available)} {where}" if available else ""),
        ],
        *(["", f"{size(value):>9} {name}"] for name, value in worst.memory.items()),
        [
            "disk",
            f"{size(plan.kept)} volumes (output.save: {sweep.output.save}) + {size(plan.stages)} prepared "
            f"data; {size(disk_free(folder))} free",
        ],
        [
            "files",
            f"{sum(plan.files.values()):,} at most ({', '.join(f'{n:,} {kind}' for kind, n in plan.files.items())}), "
            "a log for each local worker or node, and one for each job",
        ],
        [
            "time",
            f"{hours(sum(cost.gpu_seconds for cost in plan.costs))} GPU-hours "
            + _source("gpu", "on one H200, estimated from its bandwidth; make bench-gpu measures one", sweep),
        ],
        [
            "",
            f"or {hours(sum(cost.core_seconds for cost in plan.costs))} core-hours without a GPU "
            + _source("core", "estimated; make bench measures them", sweep),
        ],
    ]
    return "\n".join(f"{name:<12}{words}" for name, words in rows)


def _source(kind: str, otherwise: str, sweep: Sweep) -> str:
    if sweep.system in OF_PATTERNS:
        return "(on one H200, estimated)" if kind == "gpu" else "(estimated from a solve of 48^3)"
    return f"({'scaled from the solves measured in docs/BENCHMARKS.md' if _measured_solves(kind) else otherwise})"


def _range(sweep: Sweep, name: str) -> str:
    value = get(sweep, name)
    low, *_, high = ends(value)
    return f"{shown(low)} to {shown(high)}" + (" (log)" if getattr(value, "scale", "") == "log" else "")


def hours(seconds: float) -> str:
    """Hours with two digits that count."""
    value = seconds / 3600
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
