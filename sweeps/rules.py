"""Rules between the settings of one cell: what no single field can know."""

from __future__ import annotations

from collections.abc import Iterator

from engine import phantoms_hebt
from engine.phantoms import ELEMENTS
from engine.physics import SYMBOLS
from sweeps.defaults import FLAT
from sweeps.fields import Range, ends
from sweeps.patterns import Files, Mset, Mspt, Recorded, Scanned, crystal_of
from sweeps.schema import Fractions, Fused3D, Grains, Hebt, Output, Particle, Phantom, Shares, Sweep
from sweeps.sources import ChemSource, Element, Measured, Source
from sweeps.yamlio import Keys, flow

Problem = tuple[Keys, str]
"""Where in the YAML, and a sentence without its place."""

HAADF_METHODS = ("fused", "plain", "fista", "hebt")
LINEAR = ("resire", "genfire")  # of mset: of dark-field images
LEAST = 4  # pixels along an edge of an image that engine.align aligns


def elements(sweep: Sweep) -> tuple[str, ...]:
    """Names of the elements that the maps have, or of what a volume of one quantity is."""
    data = sweep.data
    if isinstance(data, Measured):
        return tuple(data.chem.elements)
    if isinstance(data, Scanned | Recorded):
        return ("potential",)
    return tuple(phantoms_hebt.ELEMENTS if isinstance(data, Particle) else ELEMENTS[data.phantom])


def tunables(sweep: Sweep) -> dict[str, Range]:
    """The searched settings of the solver, by dotted name."""
    values = {f"solver.{name}": getattr(sweep.solver, name) for name in type(sweep.solver).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, Range)}


def conflicts(sweep: Sweep) -> Iterator[Problem]:
    """What does not fit together in a sweep without a grid."""
    data, solver, search = sweep.data, sweep.solver, sweep.search
    yield from {"fused2d": _flat, "mset": _scanned, "mspt": _scanned}.get(sweep.system, _solid)(sweep)
    if isinstance(data, Phantom):
        yield from _phantom(data, sweep)
    elif isinstance(data, Measured):
        yield from _measured(data, sweep)
    if isinstance(solver, Hebt):
        yield from _hebt(solver, elements(sweep))
    elif sweep.output.haadf:
        yield ("output", "haadf"), "is for hebt alone"
    if sweep.output.fractions is not None:
        yield from _fractions(sweep.output.fractions, elements(sweep))
    if sweep.output.particles is not None:
        yield from _particles(sweep.output.particles, elements(sweep))
    if (tunables(sweep) and search.strategy == "per_cell" and search.trials < search.initial
            and search.atlas is None):
        yield ("search", "trials"), (f"{search.trials} trials end before the {search.initial} initial ones; "
                                     f"write initial: {max(1, search.trials // 2)}")
    if tunables(sweep) and search.strategy == "shared" and not isinstance(solver, Fused3D):
        yield ("search", "strategy"), (f"shared's cheap trials, of few iterations, say nothing of {sweep.system}; "
                                       "write strategy: per_cell")
    together = search.batch if isinstance(search.batch, int) else 1
    if tunables(sweep) and search.strategy == "shared" and search.trials < 3 * together:
        words = "trial" if together == 1 else f"batch of {together}"
        yield ("search", "trials"), (f"{search.trials} trials leave no full one: with strategy shared every third "
                                     f"{words} is; write trials: {max(15, 3 * together)}")
    if solver.record and solver.record[-1] > solver.iterations:
        yield ("solver", "record", len(solver.record) - 1), (
            f"iteration {solver.record[-1]} is never reached; solver.iterations is {solver.iterations}")
    yield from _heldout(sweep)
    maps = None
    if sweep.system != "fused2d" and not isinstance(data, Scanned | Recorded):
        maps = data.chem_tilts or (_projections(data.chem) if isinstance(data, Measured) else None)
    if search.objective == "heldout" and search.heldout == "tilts" and maps is not None and search.folds > maps:
        yield ("search", "folds"), (f"{search.folds} folds need as many chemical maps, and there are {maps}"
                                    + (f"; write folds: {maps}, or heldout: counts" if maps > 1 else ""))


def _heldout(sweep: Sweep) -> Iterator[Problem]:
    """What can be left out, and which trials can be compared by their folds."""
    data, search, solver = sweep.data, sweep.search, sweep.solver
    flat = sweep.system == "fused2d"
    if isinstance(data, Scanned | Recorded):
        if search.heldout != "tilts":
            yield ("search", "heldout"), "counts is for maps of elements; of patterns whole ones are left out"
    elif search.objective == "heldout" and (flat or search.heldout == "counts"):
        if isinstance(data, Measured) and data.chem.units != "counts":
            yield ("search", "objective" if flat else "heldout"), (
                f"heldout parts the counts of a map, and {data.chem.units} cannot be parted; "
                "give data.chem.units: counts where they are")
    if search.atlas is not None and (not isinstance(solver, Fused3D) or isinstance(data, Particle)):
        yield ("search", "atlas"), "is for the weights of fused3d and fused2d; leave it out"
    if search.rule == "one_standard_error" and tunables(sweep):
        if search.objective != "heldout" or not isinstance(solver, Fused3D):
            yield ("search", "rule"), ("one_standard_error compares the folds of a fused search by heldout; write "
                                       "objective: heldout, or rule: best")


def _flat(sweep: Sweep) -> Iterator[Problem]:
    """What fused2d does not take: tilt series, and what only tomography has."""
    data, solver = sweep.data, sweep.solver
    assert isinstance(solver, Fused3D)
    if sweep.search.objective not in ("nrmse", "heldout"):
        yield ("search", "objective"), f"{sweep.search.objective} is for atoms and patterns; write nrmse or heldout"
    if isinstance(data, Scanned | Recorded):
        yield ("data",), "fused2d takes an image and maps; 4D-STEM is for system: mset or mspt"
        return
    if isinstance(data, Phantom) and data.phantom not in FLAT:
        yield ("data", "phantom"), f"{data.phantom} is a volume; fused2d has {', '.join(FLAT)}"
    elif isinstance(data, Particle):
        yield ("data", "phantom"), f"{data.phantom} is a tilt series; write system: hebt or fused3d"
    elif isinstance(data, Phantom):
        for name in ("haadf_tilts", "chem_tilts"):
            if getattr(data, name) != 1:
                yield ("data", name), f"fused2d takes one image and one map per element, not {getattr(data, name)}"
    if solver.method in ("ml", "sirt"):
        yield ("solver", "method"), f"{solver.method} is for tomography: at one angle the maps are its answer already"
    for name, wanted in (("devices", 1), ("dual_bits", 32), ("error_probes", 16), ("tilts", "as_measured")):
        if getattr(solver, name) != wanted:
            yield ("solver", name), f"is for fused3d alone; leave it out, or write {name}: {wanted}"
    if sweep.output.shares.mask is not None and not isinstance(data, Measured):
        yield ("output", "shares", "mask"), "is for measured data alone; give above, below and margin"
    if sweep.output.fractions is not None:
        yield ("output", "fractions"), "is for fused3d and hebt; of maps, output.shares tells the concentrations"
    if sweep.output.particles is not None:
        yield ("output", "particles"), "is for fused3d and hebt: maps have no volumes"
    if sweep.output.resolution:
        yield ("output", "resolution"), "is for fused3d and hebt, whose tilts make two halves"


def _scanned(sweep: Sweep) -> Iterator[Problem]:
    """What mset and mspt do not take."""
    data, solver, objective = sweep.data, sweep.solver, sweep.search.objective
    assert isinstance(solver, Mset | Mspt)
    if not isinstance(data, Scanned | Recorded):
        yield ("data",), f"{sweep.system} takes 4D-STEM: phantom: cuau or bao, or scan: a series in a file"
        return
    atoms = ("rmsd", "tracing_error", *(("nrmse",) if isinstance(solver, Mspt) else ()))
    known = (*atoms, "heldout", "missing_sites" if isinstance(solver, Mspt) else "amplitude_error")
    if objective not in known:
        yield ("search", "objective"), f"{sweep.system} has {', '.join(known)}, not {objective}"
    elif isinstance(data, Recorded) and objective in atoms:
        yield ("search", "objective"), f"{objective} needs known atoms; write {' or '.join(known[len(atoms):])}"
    if objective == "missing_sites" and crystal_of(data) is None:
        yield ("search", "objective"), "missing_sites needs a crystal: phantom: co3o4 or coo, or data.crystal"
    if isinstance(solver, Mset):
        yield from _linear(solver, data, objective)
    else:
        yield from _chain(solver, data)
    for name in ("light", "heavy") if isinstance(data, Recorded) else ():
        if getattr(data, name) not in (None, *SYMBOLS):
            yield ("data", name), f"{getattr(data, name)} is no element; give its symbol, as in Au"
    if isinstance(data, Recorded) and isinstance(data.scan, Files):
        yield from _files(data.scan, data.tilts)
    for name in ("shares", "fractions", "haadf", "particles", "resolution"):
        if getattr(sweep.output, name) != getattr(Output(), name):
            yield ("output", name), f"is for maps of elements, which {sweep.system} has not"


def _linear(solver: Mset, data: Scanned | Recorded, objective: str) -> Iterator[Problem]:
    """What a method of mset does not take."""
    linear = solver.method in LINEAR
    if linear and objective not in ("rmsd", "tracing_error"):
        yield ("search", "objective"), f"{solver.method} fits no patterns; write objective: rmsd or tracing_error"
    if linear and isinstance(data, Recorded):
        yield ("solver", "method"), f"{solver.method} simulates a dark-field scan of its own; measured data take mset"
    if isinstance(data, Scanned) and solver.method == "mset":
        wrong = [end for end in ends(solver.binning) if data.size % end]
        if wrong:
            yield ("solver", "binning"), f"{data.size} layers of voxels cannot be cut into slices of {wrong[0]}"


def _chain(solver: Mspt, data: Scanned | Recorded) -> Iterator[Problem]:
    """What the stages of mspt do not take."""
    if min(ends(solver.slices)) < 1:
        yield ("solver", "slices"), "must be 1 or more"
    if solver.sections == 1:
        yield ("solver", "sections"), "a single one has no depth; write 2 or more, or 0 for none"
    if isinstance(data, Recorded):
        if solver.sections:
            yield ("solver", "sections"), "are compared with the truth, which measured data have not; write sections: 0"
        return
    most = data.size // LEAST
    for k, level in enumerate(solver.levels):
        if level.bins > most:
            yield ("solver", "levels", k, "bins"), (f"{level.bins} pixels in one leave fewer than {LEAST} x {LEAST} of "
                                                    f"{data.size}; write {most} at most")


def _files(given: Files, tilts: list[int] | None) -> Iterator[Problem]:
    """What does not fit together in a series in files, before they are looked at."""
    keys: Keys = ("data", "scan")
    whole = {"scan", "qy", "qx"} if "scan" in given.axes else {"scan_y", "scan_x", "qy", "qx"}
    if set(given.axes) != whole:
        yield (*keys, "axes"), f"{flow(given.axes)} is neither of scan_y, scan_x, qy, qx nor of scan, qy, qx"
    elif ("scan" in given.axes) != (given.scan_shape is not None):
        yield (*keys, "scan_shape"), "is given with the axis scan, and needed there: [rows, columns]"
    count = len(given.files) if isinstance(given.files, list) else None
    if count is not None and isinstance(given.angles, list) and len(given.angles) != count:
        yield (*keys, "angles"), f"{len(given.angles)} angles for {count} files; give one for each"
    if count is not None and tilts and max(tilts) >= count:
        yield ("data", "tilts"), f"there is no tilt {max(tilts)}; {count} files count from 0"


def _solid(sweep: Sweep) -> Iterator[Problem]:
    """What fused3d and hebt do not take."""
    if isinstance(sweep.data, Scanned | Recorded):
        yield ("data",), f"{sweep.system} takes tilt series of images and maps; 4D-STEM is for system: mset or mspt"
        return
    if sweep.search.objective not in ("nrmse", "heldout"):
        yield ("search", "objective"), f"{sweep.search.objective} is for atoms and patterns; write nrmse or heldout"
    if isinstance(sweep.data, Phantom) and sweep.data.phantom in FLAT:
        yield ("data", "phantom"), f"{sweep.data.phantom} is a map; write system: fused2d"
    if isinstance(sweep.solver, Fused3D) and sweep.solver.missing:
        yield ("solver", "missing"), "is for fused2d alone"
    if isinstance(sweep.solver, Fused3D) and sweep.solver.guide:
        yield ("solver", "guide"), "is for fused2d alone; leave it out"
    if isinstance(sweep.solver, Fused3D) and sweep.solver.errors == "paper":
        yield ("solver", "errors"), "paper is F2's, for fused2d alone; write errors: sandwich"
    if sweep.output.shares != Shares():
        yield ("output", "shares"), "is for fused2d alone"


def _hebt(solver: Hebt, names: tuple[str, ...]) -> Iterator[Problem]:
    if solver.responses is not None and solver.responses.keys() != set(names):
        yield ("solver", "responses"), f"needs one number for each of {', '.join(names)}"
    if max(ends(solver.relaxation)) >= 2:
        yield ("solver", "relaxation"), f"must be below 2, or SIRT diverges, not {max(ends(solver.relaxation)):g}"
    if min(ends(solver.differences)) == 0:
        yield ("solver", "differences"), "must be above 0, or all elements come out alike"


def _fractions(given: Fractions, names: tuple[str, ...]) -> Iterator[Problem]:
    """Factors that belong to how the fractions are made, for elements that there are."""
    place: Keys = ("output", "fractions")
    own = given.by in ("k", "zeta", "partial")
    if own and (given.factors is None or given.factors.keys() != set(names)):
        yield (*place, "factors"), f"by: {given.by} needs a factor for each of {', '.join(names)}"
    if not own and given.factors is not None:
        yield (*place, "factors"), f"are for by: k, zeta or partial, not for by: {given.by}"
    if given.by == "tables" and given.beam is None:
        yield (*place, "beam"), "by: tables needs the energy of the electrons; write beam: 200.0"
    efficiency = given.efficiency if isinstance(given.efficiency, dict) else {}
    for key, told in (("over", given.over or ()), ("lines", given.lines or ()), ("efficiency", efficiency)):
        unknown = [name for name in told if name not in names]
        if unknown:
            yield (*place, key), f"there are no maps of {', '.join(unknown)}; there are {', '.join(names)}"


def _particles(given: Grains, names: tuple[str, ...]) -> Iterator[Problem]:
    """Particles of elements that there are."""
    place: Keys = ("output", "particles")
    for key, told in (("of", given.of or ()), ("shell", (given.shell,)), ("core", (given.core,))):
        unknown = [name for name in told if name is not None and name not in names]
        if unknown:
            yield (*place, key), f"there are no maps of {', '.join(unknown)}; there are {', '.join(names)}"
    if (given.shell is None) != (given.core is None) or (given.shell is not None and given.shell == given.core):
        yield (*place, "shell"), "shell and core are two elements; give both, or neither"


def _phantom(data: Phantom, sweep: Sweep) -> Iterator[Problem]:
    solver = sweep.solver
    for name in ("misalign", "align"):
        if getattr(data, name) is not None and data.phantom in FLAT:
            yield ("data", name), f"is for tilt series, and {data.phantom} is a single map"
    for k, step in enumerate(data.align or []):
        if step.stage == "maps":
            yield ("data", "align", k), "stage maps is for measured data: simulated maps lie on their images already"
    seen = data.haadf_tilts and solver.method in HAADF_METHODS
    if data.gamma is None and isinstance(solver, Fused3D) and seen and isinstance(solver.gamma, Range):
        yield ("data", "gamma"), ("is needed where solver.gamma is searched, else each trial would simulate "
                                  "images of its own; write data: {gamma: 1.6}")
    levels = [*ELEMENTS[data.phantom], "haadf"]
    for name, snr in data.snr.items():
        keys: Keys = ("data", "snr", name)
        if name not in [*levels, "chem"]:
            yield keys, f"{data.phantom} has no {name}; it has {', '.join(ELEMENTS[data.phantom])}"
        elif name == "chem" and snr <= 0:
            yield keys, f"the factor on SNR - 1 must be above 0, not {snr:g}"
        elif name != "chem" and snr <= 1:
            yield keys, f"must be above 1, not {snr:g}: Poisson counts have an SNR of 1 + their mean"
    missing = [name for name in levels if name not in data.snr]
    if missing:
        yield ("data", "snr"), f"lacks {', '.join(missing)}; {data.phantom} needs {', '.join(levels)}"


def _measured(data: Measured, sweep: Sweep) -> Iterator[Problem]:
    if sweep.search.objective == "nrmse" and data.truth is None:
        yield ("search", "objective"), "nrmse needs data.truth; without a truth write objective: heldout"
    yield from _source("chem", data.chem, data.chem_tilts)
    if data.haadf:
        yield from _source("haadf", data.haadf, data.haadf_tilts)
    elif data.haadf_tilts:
        yield ("data", "haadf_tilts"), "there is no data.haadf to take images from"
    yield from _elements(data.chem.elements)
    for k, step in enumerate(data.align or []):
        if step.stage == "maps" and (data.haadf is None or data.haadf_tilts == 0):
            yield ("data", "align", k), "stage maps needs data.haadf, on which the maps are to lie"
        elif step.stage == "maps" and data.chem.candidates is not None:
            yield ("data", "align", k), "stage maps cannot tell how the maps of data.chem.candidates lie; leave out one"
    if data.chem.candidates is not None:
        yield from _candidates(data.chem, sweep.system)
    if data.sensitivity is not None and data.sensitivity.keys() != data.chem.elements.keys():
        yield ("data", "sensitivity"), f"needs one number for each of {', '.join(data.chem.elements)}"


def _candidates(source: ChemSource, system: str) -> Iterator[Problem]:
    keys: Keys = ("data", "chem", "candidates")
    assert source.candidates is not None
    both = [name for name in source.candidates if name in source.elements]
    if system != "hebt":
        yield keys, "is for hebt alone, whose HAADF is the sum of the maps"
    if both:
        yield keys, f"{', '.join(both)} is one of data.chem.elements already"
    items = source.candidates.values()
    if source.names_key is None and any(isinstance(item, int) or item.index is None and not item.window
                                        for item in items):
        yield keys, "where is each map? Give its index or its window, or data.chem.names_key"
    yield from _elements(source.candidates, "candidates")


def _elements(elements: dict[str, int | Element], place: str = "elements") -> Iterator[Problem]:
    keys: Keys = ("data", "chem", place)
    for name, item in elements.items():
        number = item.number if isinstance(item, Element) else item
        if name in SYMBOLS and SYMBOLS.index(name) + 1 != number:
            yield (*keys, name), f"{name} has atomic number {SYMBOLS.index(name) + 1}, not {number}"
    indices = [item.index for item in elements.values() if isinstance(item, Element)]
    given = [index for index in indices if index is not None]
    if given and len(set(given)) < len(elements):
        yield keys, "give every element an index of its own, or none of them"


def _source(name: str, source: Source, wanted: int | None) -> Iterator[Problem]:
    keys: Keys = ("data", name)
    spectral, single = "energy" in source.axes, source.angles is None or len(source.angles) == 1
    several = isinstance(source, ChemSource) and len(source.elements) > 1 and not spectral
    needed = {"element": several, "tilt": not single, "y": True, "x": True}
    missing = [axis for axis, is_needed in needed.items() if is_needed and axis not in source.axes]
    if missing:
        yield (*keys, "axes"), f"{flow(source.axes)} lacks {', '.join(missing)}"
    if "element" in source.axes and not isinstance(source, ChemSource):
        yield (*keys, "axes"), "HAADF images have no axis element; name the array with key"
    if spectral and isinstance(source, ChemSource):
        yield from _windows(source)
    elif spectral:
        yield (*keys, "axes"), "HAADF images have no axis energy; name the array with key"
    angles = source.angles if isinstance(source.angles, list) else None
    if angles and source.tilts and max(source.tilts) >= len(angles):
        yield (*keys, "tilts"), f"there is no index {max(source.tilts)}; {len(angles)} angles count from 0"
    for field in ("shifts", "background"):
        value = getattr(source, field)
        if isinstance(value, list) and angles and len(value) != len(angles):
            yield (*keys, field), f"has {len(value)} entries for {len(angles)} angles; give one for each"
    there = _projections(source)
    if there is not None and wanted is not None and wanted > there:
        yield ("data", f"{name}_tilts"), f"wants {wanted} projections, and there are {there}"


def _windows(source: ChemSource) -> Iterator[Problem]:
    """Every element of a spectrum image has a window, and at most one kind of background."""
    for name, item in source.elements.items():
        keys: Keys = ("data", "chem", "elements", name)
        if isinstance(item, int) or item.window is None:
            yield keys, f"a spectrum image needs {name}: {{number: , window: [from, to]}}, in the unit of its energies"
        elif item.sides and item.before:
            yield keys, "has sides and before; keep sides for EDX, before for EELS"


def _projections(source: Source) -> int | None:
    """How many projections a source uses, where the YAML tells."""
    listed = source.tilts or source.angles
    return len(listed) if isinstance(listed, list) else None
