"""The run folder and the atlas in it: what follows from the journal, in files that anyone can open."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.errors import ZarrUserWarning

from sweeps import alignments, arrays, flat, grid, settings, winners
from sweeps.arrays import Variables
from sweeps.grid import Cell
from sweeps.journal import SAFE, Clock, History, Journal, Row, RunError, plain
from sweeps.settings import SettingsError, Sweep

PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "scikit-learn", "scikit-optimize", "xarray", "zarr")
HUES = ("0072B2", "D55E00", "009E73", "CC79A7", "E69F00", "56B4E9", "F0E442")  # of elements in viewers


@cache
def version() -> str:
    """The installed version of tomoatlas; "unknown" in a checkout that is not installed."""
    return _versions(["tomoatlas"]).get("tomoatlas", "unknown")


@cache
def commit() -> str:
    """The git commit of the checkout this runs from, "+" if it was changed since; "" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    with contextlib.suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_aside(path: Path, text: str) -> None:
    """Replace a file in one step: a reader finds the old text or the new one."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def resolved(cell: Cell, params: Mapping[str, Any], fidelity: float = 1.0) -> Sweep:
    """The settings of one trial. What a baseline does not feel takes its default instead of a range.

    A fidelity below 1 is that share of the iterations; as no cheap trial wins, its volume is kept only with all.
    """
    fields = type(cell.sweep.solver).model_fields
    changes = {name: fields[name.removeprefix("solver.")].default for name in cell.space} | dict(params)
    if fidelity < 1:
        iterations = max(1, round(fidelity * cell.sweep.solver.iterations))
        changes |= {"solver.iterations": iterations,
                    "solver.record": [stop for stop in cell.sweep.solver.record if stop <= iterations],
                    "output.save": "all" if cell.sweep.output.save == "all" else "none"}
    return settings.replace(cell.sweep, changes)


class RunFolder:
    """The folder of a run. `open` makes it or continues it; readers (status, report) need only its names."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.sweep = self.path / "sweep.yaml"  # as given
        self.lock = self.path / "lock.json"  # resolved settings, versions, commit
        self.journal = self.path / "journal.jsonl"
        self.atlas = self.path / "atlas.zarr"
        self.summary = self.path / "summary.json"
        self.best = self.path / "best"
        self.logs = self.path / "logs"
        self.jobs = self.path / "jobs"  # scripts and logs of a cluster's jobs
        self.report = self.path / "report"
        self.stages = self.path / "stages"
        self.volumes = self.path / "volumes"

    @contextlib.contextmanager
    def open(self, sweep: Sweep, clock: Clock = time) -> Iterator[Journal]:
        """Make the folder, or check that `sweep` continues what is there; yield its locked journal.

        Raises RunError, and has changed nothing then, if the folder holds other things or the results of
        other settings, or if another coordinator is at work in it.
        """
        self.agree(sweep)
        try:
            for folder in (self.path, self.best, self.logs, self.stages, self.volumes):
                folder.mkdir(parents=True, exist_ok=True)
            journal = Journal(self.journal, clock)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be made ({error.strerror}); choose another --out") from error
        with contextlib.closing(journal):
            self.agree(sweep)  # nobody else can change it now
            with _sentence(self.path):
                self._describe(sweep)
            yield journal

    def settings(self) -> Sweep:
        """The resolved settings of the run."""
        try:
            return settings.load(json.loads(self.lock.read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, KeyError, SettingsError) as error:
            raise RunError(f"{self.lock}: does not tell the settings of this run ({error}): it is damaged or "
                           "of another version; choose another --out") from error

    def agree(self, sweep: Sweep) -> None:
        """RunError if the folder holds other things than a run, or the results of other settings."""
        strangers = set(self.path.iterdir()) - set(vars(self).values()) if self.path.is_dir() else ()
        if strangers and not self.journal.exists():
            raise RunError(f"{self.path}: is no run folder and not empty; choose another --out")
        if not self.lock.exists():
            return
        difference = grid.space_difference(self.settings(), sweep)
        if difference:
            lines = "\n".join(f"  {line}" for line in difference.splitlines())
            raise RunError(f"{self.path}: holds the results of other settings:\n{lines}\n"
                           "Change them back to continue, or choose another name or --out")

    def _describe(self, sweep: Sweep) -> None:
        """Write sweep.yaml, as given unless overrides made it say something else, and lock.json."""
        text = settings.to_yaml(sweep)
        with contextlib.suppress(OSError, SettingsError):
            if sweep.path is not None and settings.load(sweep.path) == sweep:
                text = sweep.path.read_text(encoding="utf-8")
        write_aside(self.sweep, text)
        lock = {"settings": settings.dump(sweep), "commit": commit(), "command": sys.argv,
                "versions": {"tomoatlas": version(), "python": sys.version.split()[0], **_versions(PACKAGES)}}
        write_aside(self.lock, json.dumps(plain(lock), indent=1))


class Atlas:
    """The part of a run folder that follows from its journal, kept up to date by the coordinator alone.

    atlas.zarr, best/<cell>.yaml, summary.json, and of volumes/ what output.save keeps. It is made anew from
    the journal when a run starts, so nothing in it can be stale.
    """

    def __init__(self, folder: RunFolder, sweep: Sweep, cells: Sequence[Cell], history: History,
                 clock: Clock = time) -> None:
        self._clock = clock
        self.folder, self.sweep, self.cells, self.history = folder, sweep, cells, history
        self.summary: dict[str, Any] = {}
        self._seen: dict[str, np.ndarray] = {}
        self._published: dict[str, str] = {}  # volume by cell
        self._won: dict[str, tuple[int, int] | None] = {}  # trial and attempt that best/ holds, by cell
        self._took, self._when = 0.0, 0.0

    def due(self) -> bool:
        """Whether it is time for an update: they may take a twentieth of the coordinator's time."""
        return self._clock.monotonic() - self._when > max(1.0, 20 * self._took)

    def rebuild(self) -> None:
        """Make everything anew beside the old atlas, then put it in its place."""
        with _sentence(self.folder.path):
            aside, old = (self.folder.path / f"{name}.partial" for name in ("atlas.zarr", "old.zarr"))
            self._clean()
            self._update(aside, self.cells)
            if self.folder.atlas.exists():
                self.folder.atlas.rename(old)
            aside.rename(self.folder.atlas)
            shutil.rmtree(old, ignore_errors=True)

    def update(self, changed: set[str]) -> None:
        """Bring the cells `changed` up to date, and empty the set."""
        with _sentence(self.folder.path):
            self._update(self.folder.atlas, [cell for cell in self.cells if cell.id in changed])
            changed.clear()

    def _update(self, path: Path, cells: Sequence[Cell]) -> None:
        started = self._clock.monotonic()
        root = zarr.open_group(path, mode="a", zarr_format=3)
        root.require_group("cells")
        grown = not self._seen
        for cell in cells:
            grown |= self._publish(path, cell)
        tables = {"": arrays.atlas(self.sweep, self.cells, self.history),
                  "trials/": arrays.trials(self.sweep, self.cells, self.history)}
        for prefix, variables in tables.items():
            grown |= self._write(root.require_group(prefix) if prefix else root, prefix, variables)
        if grown:
            root.attrs.update({"name": self.sweep.name, "system": self.sweep.system, "version": version(),
                               "commit": commit(), "settings": json.dumps(settings.dump(self.sweep))})
            consolidate(path)
        self.summary = summarise(self.sweep, self.cells, self.history) | alignments.summary(self.folder.path)
        write_aside(self.folder.summary, json.dumps(plain(self.summary), indent=1))
        self._when = self._clock.monotonic()
        self._took = self._when - started

    def _write(self, group: zarr.Group, prefix: str, variables: Variables) -> bool:
        """Write the arrays that have changed; whether any array is new."""
        new = False
        for name, variable in variables.items():
            values, before = variable.values, self._seen.get(prefix + name)
            if before is None or before.shape != values.shape:
                group.create_array(name, data=values, dimension_names=variable.dims, overwrite=True,
                                   chunks=values.shape or "auto", attributes=dict(variable.attributes),
                                   fill_value=np.nan if values.dtype.kind == "f" else None)
                new = True
            elif not np.array_equal(before, values, equal_nan=values.dtype.kind == "f"):
                array = group[name]
                assert isinstance(array, zarr.Array)
                array[...] = values
            self._seen[prefix + name] = values
        return new

    def _publish(self, path: Path, cell: Cell) -> bool:
        """Freeze a cell's winner to YAML, publish its volume, delete the losers'; whether a volume is new."""
        rows = self.history.cell(cell.id)
        winner = winners.winner(cell, rows)
        frozen, volume = self.folder.best / f"{cell.id}.yaml", None
        won = None if winner is None else (winner.ask["trial"], winner.ask["attempt"])
        if winner is None or winner.result is None:
            frozen.unlink(missing_ok=True)
        else:
            if self._won.get(cell.id) != won:  # writing YAML takes milliseconds, and most results win nothing
                write_aside(frozen, freeze(cell, winner))
            volume = winner.result["volume"] if self.sweep.output.save != "none" else None
        self._won[cell.id] = won
        new = volume is not None and self._published.get(cell.id) != volume
        if volume is not None and new and (self.folder.path / volume).is_dir():
            _link(self.folder.path / volume, path / "cells" / cell.id, self.folder.path / "cell.partial")
            _describe_volume(path / "cells" / cell.id, cell)
            self._published[cell.id] = volume
        if self.sweep.output.save != "all":
            losers = {row.result["volume"] for row in rows.rows.values() if row.result} - {volume, None}
            for loser in losers:
                shutil.rmtree(self.folder.path / loser, ignore_errors=True)
        return new

    def _clean(self) -> None:
        """Delete what earlier runs left half done: asides, volumes of trials without a result, states of those with."""
        rows = [row for cell in self.cells for row in self.history.cell(cell.id).rows.values()]
        known = {row.result["volume"] for row in rows if row.result}
        left = [path for path in self.folder.volumes.iterdir() if f"volumes/{path.name}" not in known]
        left += [path for path in self.folder.path.glob("partial/*.npz") if self._ended(path.stem)]
        for path in [*left, *self.folder.path.glob("*.partial"), *self.folder.best.glob("*.partial")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _ended(self, batch: str) -> bool:
        """Whether all trials of a batch, <cell>-<trial>-<trial>, have results."""
        for cell in self.cells:
            numbers = batch.removeprefix(f"{cell.id}-").split("-")
            if batch.startswith(f"{cell.id}-") and all(number.isdecimal() for number in numbers):
                rows = self.history.cell(cell.id).rows
                return all(int(number) in rows and rows[int(number)].result for number in numbers)
        return False


def rebuild(folder: RunFolder) -> None:
    """Make atlas.zarr, best/ and summary.json anew from the journal; RunError while a coordinator works."""
    sweep = folder.settings()
    with contextlib.closing(Journal(folder.journal)) as journal:
        Atlas(folder, sweep, grid.cells(sweep), History(journal.events)).rebuild()


def freeze(cell: Cell, winner: Row) -> str:
    """The YAML of a cell's winner: one reconstruction, which `tomoatlas run` repeats."""
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", f"{cell.sweep.name}-{cell.id}")
    sweep = settings.replace(resolved(cell, winner.ask["params"]), {"name": name})
    reached = "" if winner.objective is None else f" ({cell.sweep.search.objective} {winner.objective:.6g})"
    return (f"# Trial {winner.ask['trial']} of the cell {cell.id} of {cell.sweep.name}{reached}; "
            f"`tomoatlas run` repeats it.\n{settings.to_yaml(sweep)}")


def summarise(sweep: Sweep, cells: Sequence[Cell], history: History) -> dict[str, Any]:
    """The figures of a run: flat ones for the whole, and one entry per cell."""
    entries = {cell.id: _cell_summary(cell, history) for cell in cells}
    reached = {name: entry["objective"] for name, entry in entries.items() if entry["objective"] is not None}
    best = min(reached, key=lambda name: reached[name], default=None)
    return {
        "name": sweep.name, "system": sweep.system, "version": version(), "commit": commit(),
        "objective": sweep.search.objective,
        "trials": sum(entry["trials"] for entry in entries.values()),
        "failed": sum(entry["failed"] for entry in entries.values()),
        "seconds": sum(entry["seconds"] for entry in entries.values()),
        "best_cell": best, "best_objective": reached[best] if best is not None else None,
        "worst_objective": max(reached.values(), default=None),
        "mean_objective": sum(reached.values()) / len(reached) if reached else None,
        **(flat.summary(cells, entries) if sweep.system == "fused2d" else {}),
        "cells": entries,
    }


def _cell_summary(cell: Cell, history: History) -> dict[str, Any]:
    rows = history.cell(cell.id).rows
    results = [row.result for row in rows.values() if row.result is not None]
    winner = winners.winner(cell, history.cell(cell.id))
    found = winner.result if winner and winner.result else {"objective": None, "metrics": {}, "elements": {}}
    return {
        "coordinates": cell.coordinates,
        "objective": found["objective"], "nrmse": found["metrics"].get("nrmse"),
        "best": winner.ask["params"] if winner else {}, "trial": winner.ask["trial"] if winner else None,
        "metrics": found["metrics"], "elements": found["elements"],
        "trials": len(results), "failed": sum(result["status"] != "ok" for result in results),
        "seconds": sum(result["seconds"] or 0.0 for result in results),
        "baselines": {arrays.method(cell, row): arrays.last_and_best(row) for row in rows.values()
                      if row.ok and not row.own(bool(cell.space))},
    }


def consolidate(path: Path) -> None:
    """Copy all metadata into the root: `xarray.open_zarr(path)` is quiet and quick only then."""
    with warnings.catch_warnings():
        # It is no part of the Zarr 3 specification yet, says zarr; readers that do not know it ignore it.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(path)


def _link(source: Path, target: Path, aside: Path) -> None:
    """Make `target` a copy of a finished volume, by way of `aside`; files are shared where that can be."""
    shutil.copytree(source, aside, copy_function=_link_file)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _describe_volume(path: Path, cell: Cell) -> None:
    """Add OME-Zarr 0.5 attributes, so that napari, Fiji and neuroglancer know the axes and the voxel size."""
    group = zarr.open_group(path, mode="r+")
    sizes = np.broadcast_to(np.asarray(group.attrs["voxel_nm"], float), 3).tolist()
    axes: list[Any] = [{"name": "element", "type": "channel"},
                       *({"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx")]
    scale: Any = {"type": "scale", "scale": [1.0, *sizes]}
    datasets: list[Any] = [{"path": "volume", "coordinateTransformations": [scale]}]
    elements: Any = group.attrs["elements"]
    tops: Any = group.attrs.get("maxima") or [1.0] * len(elements)
    channels: list[Any] = [
        {"label": element, "color": HUES[k % len(HUES)], "active": True, "coefficient": 1, "family": "linear",
         "window": {"min": 0.0, "max": top, "start": 0.0, "end": top}}
        for k, (element, top) in enumerate(zip(elements, tops, strict=True))]
    group.attrs["ome"] = {"version": "0.5", "omero": {"name": cell.id, "channels": channels},
                          "multiscales": [{"name": cell.id, "axes": axes, "datasets": datasets}]}


@contextlib.contextmanager
def _sentence(path: Path) -> Iterator[None]:
    """A disk that is full or gone ends the run with a sentence; the journal has everything."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or path}: {error.strerror or error}; {SAFE}") from error
