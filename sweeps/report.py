"""The report of a run folder: figures as PNG, and one HTML page with them, the tables and the settings."""

from __future__ import annotations

import base64
import html
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.measured import read_truth
from sweeps import alignments, atomic, bimodal, crystalline, dose, grains, grid, halves, settings, stages, tables
from sweeps.atlas import RunFolder, resolved
from sweeps.grid import Cell
from sweeps.journal import RunError
from sweeps.patterns import OF_PATTERNS, Scanned
from sweeps.settings import Hebt, Measured, Particle, Phantom, Sweep
from sweeps.tables import METHODS, REPLICATE, Run, shown, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = 30  # panels on one figure
DPI = 150
THIN = 4  # voxels: a plane as narrow is no picture
TERMS = ("model", "chem", "tv", "haadf", "eds", "total")
# What the two central planes show, and how they are cut from (element, z, y, x).
PLANES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "xy": (
        "Central plane, seen along the beam at 0 degrees: x (tilt axis) across, y up",
        lambda volume: volume[:, volume.shape[1] // 2],
    ),
    "yz": (
        "Central plane across the tilt axis: y across, z (the beam at 0 degrees) up",
        lambda volume: volume[..., volume.shape[3] // 2],
    ),
}


def write(folder: Path) -> list[Path]:
    """Draw everything a run folder has results for into its report/; the files' paths, index.html first.

    Raises RunError where the folder is no run folder, or cannot be written. The old report stays until the new one
    is complete.
    """
    run = tables.read(folder)
    target = RunFolder(folder).report
    try:
        names = _write_aside(run, target.with_name("report.partial"))
        shutil.rmtree(target, ignore_errors=True)
        target.with_name("report.partial").rename(target)
    except OSError as error:
        raise RunError(
            f"{error.filename or target}: {error.strerror or error}; the results are safe, only the "
            f"report is missing: make room, then tomoatlas report {folder}"
        ) from error
    return [target / name for name in names]


def _write_aside(run: Run, folder: Path) -> list[str]:
    """A new report in `folder`; the names of its files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = []
    for name, words, figure in _figures(run):
        figure.savefig(folder / f"{name}.png", dpi=DPI)
        made.append((words, f"{name}.png"))
    for name, words in _texts(run):
        (folder / name).write_text(words, "utf-8")
    text = page(run, [(words, (folder / name).read_bytes()) for words, name in made])
    (folder / "index.html").write_text(text, "utf-8")
    return ["index.html", *(name for _, name in made)]


def table(folder: Path) -> str:
    """The tables of a run folder as plain text; RunError where the folder is no run folder."""
    return _text(tables.read(folder))


def _text(run: Run) -> str:
    own = {"hebt": (bimodal.text,), "mset": (atomic.text,), "mspt": (atomic.text, crystalline.text)}
    parts = (tables.table(run), alignments.text(run.folder), dose.text(run), grains.text(run), halves.text(run),
             *(words(run) for words in own.get(run.sweep.system, ())))
    return "\n\n".join(part for part in parts if part)


def _figures(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """(file stem, caption, figure) of each figure that the results so far allow."""
    from sweeps import figures

    panels = [panel for panel in tables.pivot(run) if panel.entries]
    words = f"{title(run.metric)}{' (mean over elements)' if run.metric == 'nrmse' else ''} along the grid"
    if panels and panels[0].column_axis:
        yield (
            "map",
            words + "; rows without HAADF are the conventional baselines.",
            figures.sampling_map(panels, run.metric),
        )
    elif panels and panels[0].row_axis:
        yield "map", words + ".", figures.sampling_line(panels, run.metric)
    for name, cells in _pages("landscape", [cell for cell in run.cells if cell.space and run.rows(cell)]):
        rows = {cell.id: run.rows(cell) for cell in cells}
        yield (
            name,
            "Where the search looked and what it found, one panel per cell.",
            figures.landscape(cells, rows, run.sweep.search.objective, _across(run)),
        )
    for name, cells in _pages("convergence", [cell for cell in run.cells if _history(run, cell)]):
        yield (
            name,
            "Weighted terms of the cost of each cell's winner; smooth decay is a sign of a reliable result.",
            figures.convergence({_words(cell): _history(run, cell) for cell in cells}, _across(run)),
        )
    yield from _aligned(run)
    yield from {"fused2d": _flat, "mset": _atoms, "mspt": _chain}.get(run.sweep.system, _solid)(run)


def _pages(stem: str, cells: list[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """Cells by the page: ("landscape", [...]) or ("landscape-1", [...]), ("landscape-2", [...])."""
    pages = [cells[k : k + PAGE] for k in range(0, len(cells), PAGE)]
    for k, part in enumerate(pages, start=1):
        yield (stem if len(pages) == 1 else f"{stem}-{k}"), part


def _across(run: Run) -> int:
    """Panels side by side: as many as the last axis has values, so that panels stand as in the table."""
    counts = [len(values) for name, values in run.sweep.grid.items() if name != REPLICATE]
    return counts[-1] if counts and 2 <= counts[-1] <= 6 else 4


def _words(cell: Cell) -> str:
    return ", ".join(f"{title(axis)} {shown(value)}" for axis, value in cell.coordinates.items()) or cell.id


def _group(run: Run, cell: Cell) -> Any | None:
    """The published volume of a cell's winner: a zarr group, or None."""
    import zarr

    path = RunFolder(run.folder).atlas / "cells" / cell.id
    return zarr.open_group(path, mode="r") if (path / "zarr.json").exists() else None


def _history(run: Run, cell: Cell) -> dict[str, np.ndarray]:
    """{term: (iteration,)} of the winner's cost, each with its weight; empty where no volume was kept."""
    group, best = _group(run, cell), run.winner(cell)
    if group is None or best is None:
        return {}
    solver = resolved(cell, best["params"]).solver
    terms = {name.removeprefix("history_"): group[name][:] for name in group.array_keys() if "history_" in name}
    if cell.sweep.solver.method in grid.MAPS_ONLY:
        terms.pop("tv", None)  # is told, but is no part of the cost
    known = [name for name in TERMS if name in terms]
    weights = _shares(solver, len(group.attrs["elements"])) if isinstance(solver, Hebt) else {}
    return {
        name: terms[name] * weights.get(name, getattr(solver, f"lambda_{name}", 1.0))
        for name in [*known, *sorted(terms.keys() - set(known))]
        if terms[name].any()
    }


def _shares(solver: Hebt, elements: int) -> dict[str, float]:
    """What SIRT weighs the rows of maps and of images with; maps alone are as they are."""
    if solver.method == "eds" or not isinstance(solver.alpha, float):
        return {}
    if solver.scaling == "plain":
        return {"eds": (1 - solver.alpha) ** 2, "haadf": solver.alpha**2}
    return {"eds": 1 - solver.alpha, "haadf": solver.alpha / elements}


def _aligned(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """How the series of the run were aligned."""
    from sweeps import alignment_figures

    for k, each in enumerate(alignments.kept(run.folder), start=1):
        words = (f"Alignment of {each.title}: sinograms, how far each image was moved, what the volume leaves of it "
                 "unexplained, its turn, and volumes of every second image each. Crosses are what was planted.")
        yield f"aligned-{k}", words, alignment_figures.drawn(each)


def _flat(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """What a fused2d run shows in place of planes of volumes, first the error of concentrations (F2, Fig. 6a)."""
    from sweeps import figures, flat_figures

    judged = replace(run, metric="share_rmse")
    panels = [panel for panel in tables.pivot(judged) if panel.entries and panel.column_axis]
    if panels and any("share_rmse" in ((run.winner(cell) or {}).get("metrics") or {}) for cell in run.cells):
        yield ("shares-map", "RMSE of the concentrations in percent along the grid (F2, Fig. 6a).",
               figures.sampling_map(panels, judged.metric))
    kept = {cell.id: group for cell in run.cells if (group := _group(run, cell)) is not None}
    chosen = compared(run, [cell for cell in run.cells if cell.id in kept])
    if chosen:
        best = kept[chosen[-1].id]
        truth = _truth(run, chosen[-1].sweep, tuple(best.attrs["elements"]), best["volume"].shape[1:])
        yield from flat_figures.drawn(run, kept, chosen, truth)


def _solid(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """Planes of volumes; of HEBT also how alpha and n matter; weight fractions where they were asked for."""
    from sweeps import bimodal_figures, shape_figures

    kept = {cell.id: group for cell in run.cells if (group := _group(run, cell)) is not None}
    chosen, found = compared(run, [cell for cell in run.cells if cell.id in kept]), bimodal.curves(run)
    yield from bimodal_figures.over_alpha(found)
    if not chosen:
        return
    best, given = kept[chosen[-1].id], run.sweep.output.fractions
    shape, elements = best["volume"].shape, tuple(best.attrs["elements"])
    chosen = [cell for cell in chosen if kept[cell.id]["volume"].shape == shape
              and tuple(kept[cell.id].attrs["elements"]) == elements]
    truth = _truth(run, chosen[-1].sweep, elements, shape[1:])
    yield from _slices(run, kept, chosen, truth)
    shown = ({} if truth is None else {"truth": truth}) | {_caption(run, chosen[-1]): best["volume"][:]}
    if len(elements) > 1:
        yield ("overlay", "Central planes, the colours of the elements mixed; the best cell.",
               shape_figures.overlay(shown, elements, float(np.min(best.attrs["voxel_nm"]))))
    yield ("surfaces", "Where each element's concentration crosses half of what it reaches; the best cell.",
           shape_figures.surfaces(shown, elements, float(np.min(best.attrs["voxel_nm"]))))
    if "field_fsc" in best:
        curves = {name: best[f"field_{name}"][:] for name in ("fsc", "fsc_z", "shells", "shells_z")}
        yield ("resolution", "Correlation of two halves of the tilts; the best cell, and HAADF alone.",
               shape_figures.shells(curves, (*elements, "HAADF")))
    if "field_particles" in best:
        yield ("particles", "Diameters of the particles of the best cell, and their composition below the surface.",
               shape_figures.grains(best["field_particles"][:], best["field_profile"][:] if "field_profile" in best
                                    else None, elements))
    if "field_haadf" in best:
        yield ("haadf", f"SIRT of the HAADF images alone, {run.sweep.output.haadf} iterations (HEBT, Fig. 7).",
               bimodal_figures.haadf(best["field_haadf"][:], float(np.min(best.attrs["voxel_nm"]))))
    weight = bimodal_figures.true_weight(given, truth, elements) if given else None
    if given and "field_weight" in best:
        pictures = {"truth": weight} if weight is not None else {}
        pictures |= {_caption(run, cell): kept[cell.id]["field_weight"][:] for cell in chosen}
        yield ("fractions", "Weight fractions; the winner of each cell.",
               bimodal_figures.weights(pictures, given.over or elements, float(np.min(best.attrs["voxel_nm"]))))
    yield from bimodal_figures.across(found, kept, weight)


def _atoms(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """What an mset run shows: planes of potentials, the atoms in them and how they were told apart."""
    from sweeps import atomic_figures

    kept = {cell.id: group for cell in run.cells if (group := _group(run, cell)) is not None}
    reached = {cell.id: found[0].value for cell in run.cells if (found := tables.scores(run, cell))}
    cells = sorted((cell for cell in run.cells if cell.id in kept and cell.id in reached),
                   key=lambda cell: reached[cell.id], reverse=True)
    alike = [cell for cell in cells if kept[cell.id]["volume"].shape == kept[cells[-1].id]["volume"].shape]
    if not alike:
        return
    picked = atomic_figures.chosen(alike)
    yield from _slices(run, kept, picked, None)
    words = ("the best cell of each method" if len({cell.sweep.solver.method for cell in picked}) > 1
             else "the worst cell first, the best last")
    yield ("atoms", f"Means of slabs, and the atoms that lie in them; {words}. Right: a true atom, rightly named.",
           atomic_figures.slabs({_atoms_caption(run, cell): (cell.sweep, kept[cell.id]) for cell in picked}))
    traced = {_caption(run, cell): (cell.sweep, kept[cell.id]["field_atoms"][:]) for cell in picked
              if "field_atoms" in kept[cell.id]}
    if traced:
        yield ("intensities", "Intensities of the traced peaks, and the classes that they fall into.",
               atomic_figures.intensities(traced))


def _atoms_caption(run: Run, cell: Cell) -> str:
    """Method and coordinates, and how many atoms were found where they are known."""
    found = (run.winner(cell) or {}).get("elements", {}).get("found")
    data = cell.sweep.data
    return _caption(run, cell) + (f"\n{atomic.named(data, found)}" if found and isinstance(data, Scanned) else "")


def _chain(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """What an mspt run shows: phase images and where they lie, then what an mset run shows."""
    from sweeps import sequential_figures

    kept = {_caption(run, cell): group for cell in run.cells[:PAGE] if (group := _group(run, cell)) is not None}
    if kept:
        yield ("phases", "Phase images of some tilts, as they were aligned.", sequential_figures.phases(kept))
        yield ("alignment", "How each tilt's image lies: shifts, turns and what it misses of the volume; crosses are "
               "what was planted.", sequential_figures.alignment(kept))
        yield ("spectra", "Spectral amplitude on the axes and the planes; circles are the last peaks above the noise.",
               sequential_figures.spectra(kept))
    yield from _atoms(run)


def _texts(run: Run) -> Iterator[tuple[str, str]]:
    """(file name, text): of an mset run the atoms of each cell's winner, as extended XYZ."""
    for cell in run.cells if run.sweep.system in OF_PATTERNS else []:
        group = _group(run, cell)
        if group is not None and "field_atoms" in group:
            width = group["volume"].shape[3] * float(np.min(group.attrs["voxel_nm"]))
            yield f"{cell.id}.xyz", atomic.xyz(cell.sweep, group["field_atoms"][:], width)


def _slices(run: Run, kept: Mapping[str, Any], chosen: list[Cell],
            truth: np.ndarray | None) -> Iterator[tuple[str, str, Figure]]:
    """Central planes: the truth where there is one, conventional, the worst and the best fused result."""
    from sweeps import atomic_figures, figures

    best = kept[chosen[-1].id]
    elements = best.attrs["elements"]
    for plane, (words, cut) in PLANES.items():
        if min(cut(best["volume"]).shape[1:]) < THIN:
            continue
        pictures = [] if truth is None else [figures.Picture("truth", cut(truth), {})]
        for cell in chosen:
            scores = (run.winner(cell) or {}).get("elements", {}).get("nrmse", {})
            pictures.append(figures.Picture(_caption(run, cell), cut(kept[cell.id]["volume"]), scores))
        if truth is not None:
            tops, top = truth.max((1, 2, 3)), "the maximum of the truth"
        else:
            # A bright pixel of noise must not darken everything else.
            tops, top = np.percentile(pictures[-1].images, 99.8, (1, 2)), "the 99.8th percentile of the last"
        if run.sweep.system == "mset" and any(atomic_figures.dark(cell.sweep) for cell in chosen):
            # Potentials and dark fields have no unit in common.
            pictures = [replace(each, images=each.images / np.percentile(each.images, 99.8)) for each in pictures]
            tops, colour = np.ones(1), "each in its own 99.8th percentile"
        else:
            what = "potential [V]" if run.sweep.system in OF_PATTERNS else "concentration"
            colour = f"{what}, one scale per element, up to {top}"
        note = f"{words}.\nColour: {colour}."
        note += " NRMSE: of the whole volume." if run.metric == "nrmse" else ""
        voxel = float(np.min(best.attrs["voxel_nm"]))
        yield (
            f"slices-{plane}",
            f"{words}; the winner of each cell.",
            figures.slices(pictures, dict(zip(elements, tops.tolist(), strict=True)), voxel, note),
        )


def _truth(run: Run, sweep: Sweep, elements: tuple[str, ...], shape: tuple[int, int, int]) -> np.ndarray | None:
    """(element, z, y, x) concentrations that results are compared with; None where they are not known."""
    if isinstance(sweep.data, Phantom | Particle):
        return stages.truth(run.folder, sweep.data)
    if not isinstance(sweep.data, Measured) or sweep.data.truth is None:
        return None
    return read_truth(elements=elements, shape=shape, root=sweep.data.root, **sweep.data.truth.model_dump())


def compared(run: Run, cells: list[Cell]) -> list[Cell]:
    """The cells worth seeing side by side: the best fused one last, before it the worst fused one.

    First come the conventional ones that share most of the best one's coordinates, at most two.
    """
    reached = {cell.id: found[0].value for cell in cells if (found := tables.scores(run, cell))}
    cells = sorted((cell for cell in cells if cell.id in reached), key=lambda cell: reached[cell.id], reverse=True)
    fused = [cell for cell in cells if not grid.maps_alone(cell.sweep)]
    others = [cell for cell in cells if cell not in fused]
    if not fused:
        return others[-3:]
    best = fused[-1]

    def shared(cell: Cell) -> int:
        return sum(best.coordinates[axis] == value for axis, value in cell.coordinates.items())

    nearest = [cell for cell in others if shared(cell) == max(map(shared, others))][:2]
    return [*nearest, *(fused[:1] if len(fused) > 1 else []), best]


def _caption(run: Run, cell: Cell) -> str:
    """Method and coordinates in few words, for a narrow column: "fused\\n47 HAADF, 9 chemical tilts"."""
    method, at = cell.sweep.solver.method, dict(cell.coordinates)
    words = METHODS["eds" if method == "hebt" and grid.maps_alone(cell.sweep) else method]
    if method in grid.STOPPED and (best := run.winner(cell)):
        words += f", {best['metrics'].get('best_iteration', best['iterations']):g} iterations"
    parts = []
    if {"haadf_tilts", "chem_tilts"} <= set(at):
        parts.append(f"{at.pop('haadf_tilts')} HAADF, {at.pop('chem_tilts')} chemical tilts")
    parts += [f"{title(axis)} {shown(value)}" for axis, value in at.items() if not axis.endswith("method")]
    return "\n".join(part for part in (words, ", ".join(parts)) if part)


def page(run: Run, figures: list[tuple[str, bytes]]) -> str:
    """The report as one HTML file, images inside: (caption, PNG bytes) each."""
    done = sum(len(run.rows(cell)) for cell in run.cells)
    parts = [
        f"<h1>{html.escape(run.sweep.name)}</h1>",
        f"<p>System {html.escape(run.sweep.system)}; {len(run.cells)} cells, {done} finished trials.</p>",
        f"<pre>{html.escape(_text(run))}</pre>",
    ]
    for words, image in figures:
        data = base64.b64encode(image).decode()
        caption = html.escape(words)
        parts.append(FIGURE.format(caption=caption, data=data))
    parts.append(f"<h2>Settings</h2><pre>{html.escape(settings.to_yaml(run.sweep))}</pre>")
    return STYLE.format(title=html.escape(run.sweep.name), body="\n".join(parts))


FIGURE = """<figure><img alt="{caption}" src="data:image/png;base64,{data}">
<figcaption>{caption}</figcaption></figure>"""
STYLE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }}
pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto; font-size: 13px; line-height: 1.35 }}
figure {{ margin: 2rem 0 }}
img {{ max-width: 100%; height: auto }}
figcaption {{ color: #555; font-size: 14px }}
</style></head><body>
{body}
</body></html>
"""
