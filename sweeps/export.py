"""Volumes of a run as files that other programs open: MRC, TIFF, HyperSpy's hspy, OME-Zarr; each knows its voxels.

MRC (Chimera, IMOD, tomviz) and TIFF (Fiji) hold one array (z, y, x), so there is a file of each element; hspy and
OME-Zarr (napari) hold all elements. Arrays beside a volume that lie on its voxels, as its standard errors, go along.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from engine.files import rosetta
from sweeps import tables
from sweeps.atlas import RunFolder, version
from sweeps.journal import RunError
from sweeps.tables import Run

FIELD = "field_"
ANGSTROM = 10.0  # in a nm


@dataclass(frozen=True)
class Array:
    """(element, z, y, x) of a cell's winner: its volume, or a field on the same voxels. voxel: z, y, x [nm]."""

    cell: str
    name: str
    values: np.ndarray
    elements: tuple[str, ...]
    voxel: tuple[float, float, float]

    @property
    def stem(self) -> str:
        """The beginning of its files' names."""
        return self.cell if self.name == "volume" else f"{self.cell}-{self.name}"


def write(folder: Path, kinds: Sequence[str] = ("mrc",), cell: str | None = None, out: Path | None = None,
          ) -> list[Path]:
    """Write the volumes of the winners of a run folder, of all cells or one, into <folder>/export or `out`.

    kinds: of KINDS. Returns the files; those of the same names are replaced. Raises RunError for a kind or a cell that
    there is not, where no volume was kept, and where the disk is full; DataError where a kind needs what is not
    installed.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise RunError(f"--as {','.join(unknown)}: is none of {', '.join(KINDS)}")
    run = tables.read(folder)
    paths = _kept(run, cell)
    target = out or folder / "export"
    made: list[Path] = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            for kind in kinds:
                made += KINDS[kind](name, path, target)
    except OSError as error:
        raise RunError(f"{error.filename or target}: {error.strerror or error}; the run is as it was: make room, or "
                       "choose another --out") from error
    return made


def _kept(run: Run, cell: str | None) -> dict[str, Path]:
    """Groups of the winners' volumes, by cell."""
    known = [each.id for each in run.cells]
    if cell is not None and cell not in known:
        raise RunError(f"--cell {cell}: is none of the {len(known)} cells of this sweep; the first is {known[0]}")
    chosen = known if cell is None else [cell]
    found = {name: RunFolder(run.folder).atlas / "cells" / name for name in chosen}
    found = {name: path for name, path in found.items() if (path / "zarr.json").exists()}
    if not found:
        why = "output.save is none" if run.sweep.output.save == "none" else "no trial has ended well yet"
        raise RunError(f"{run.folder}: holds no volume{'' if cell is None else f' of {cell}'}, as {why}")
    return found


def _arrays(cell: str, path: Path) -> Iterator[Array]:
    group = zarr.open_group(path, mode="r")
    about: dict[str, Any] = group.attrs.asdict()
    first, second, third = np.broadcast_to(np.asarray(about["voxel_nm"], float), 3).tolist()
    volume = group["volume"]
    assert isinstance(volume, zarr.Array)
    for name, array in [("volume", volume), *((n, a) for n, a in group.arrays() if n.startswith(FIELD))]:
        if array.shape == volume.shape:
            yield Array(cell, name.removeprefix(FIELD), np.asarray(array[:], np.float32), tuple(about["elements"]),
                        (first, second, third))


def _mrc(cell: str, path: Path, target: Path) -> Iterator[Path]:
    import mrcfile

    for array in _arrays(cell, path):
        for element, values in zip(array.elements, array.values, strict=True):
            file = target / f"{array.stem}-{element}.mrc"
            with mrcfile.new(file, overwrite=True) as opened:
                opened.set_data(values)
                opened.set_volume()
                opened.voxel_size = tuple(ANGSTROM * edge for edge in reversed(array.voxel))  # x, y, z
                opened.add_label(f"tomoatlas {array.name} {element}"[:79])
            yield file


def _tiff(cell: str, path: Path, target: Path) -> Iterator[Path]:
    import tifffile

    for array in _arrays(cell, path):
        depth, height, width = array.voxel
        for element, values in zip(array.elements, array.values, strict=True):
            file = target / f"{array.stem}-{element}.tif"
            tifffile.imwrite(file, values, imagej=True, resolution=(1 / width, 1 / height),
                             metadata={"axes": "ZYX", "spacing": depth, "unit": "nm"})
            yield file


def _hspy(cell: str, path: Path, target: Path) -> Iterator[Path]:
    for array in _arrays(cell, path):
        file = target / f"{array.stem}.hspy"
        axes: list[dict[str, Any]] = [{"name": "element", "units": "", "scale": 1.0, "offset": 0.0,
                                       "size": len(array.elements), "navigate": True}]
        axes += [{"name": axis, "units": "nm", "scale": edge, "offset": 0.0, "size": size, "navigate": axis == "z"}
                 for axis, edge, size in zip("zyx", array.voxel, array.values.shape[1:])]
        signal = {"data": array.values, "axes": axes, "original_metadata": {"elements": list(array.elements)},
                  "metadata": {"General": {"title": f"{array.stem}: {', '.join(array.elements)}"},
                               "Signal": {"signal_type": ""}, "Sample": {"elements": list(array.elements)}},
                  "attributes": {"_lazy": False}, "tmp_parameters": {}, "learning_results": {}, "models": {},
                  "package_info": {"package": "tomoatlas", "package_version": version()}}
        rosetta(file).file_writer(str(file), signal, show_progressbar=False)
        yield file


def _ome(cell: str, path: Path, target: Path) -> Iterator[Path]:
    """The group as it is in the atlas, which is OME-Zarr already."""
    file = target / f"{cell}.ome.zarr"
    shutil.rmtree(file, ignore_errors=True)
    shutil.copytree(path, file)
    yield file


KINDS: dict[str, Callable[[str, Path, Path], Iterator[Path]]] = {
    "mrc": _mrc, "tiff": _tiff, "hspy": _hspy, "ome-zarr": _ome}
