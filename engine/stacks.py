"""Files of 4D-STEM, one of each tilt, read lazily by rows of the scan. Imports without JAX.

.npy, Zarr (.zarr, HyperSpy's .zspy) and HDF5 (.h5, .hdf5, HyperSpy's .hspy) are read as they are; what microscopes
write is read through RosettaSciIO, with h5py the optional extra `files`: .mib .blo .dm3 .dm4 .emd .tvips .prz .nxs,
and EMPAD's .xml.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.archives import HDF5, h5py
from engine.data import DataError
from engine.files import meant, reading, rosetta

AXES = ("scan_y", "scan_x", "qy", "qx")
PLUGINS = ("QuantumDetector", "Blockfile", "DigitalMicrograph", "EMD", "TVIPS", "PantaRhei", "NeXus", "EMPAD")
ZARR = (".zarr", ".zspy")
ROSETTA = (".mib", ".blo", ".dm3", ".dm4", ".emd", ".tvips", ".prz", ".nxs", ".xml")
PIXELS = 2**22  # of the patterns that are in memory at once, at least one row of the scan


class Misfit(DataError):
    """What does not fit between files and settings. setting: the one to blame."""

    def __init__(self, setting: str, text: str) -> None:
        super().__init__(text)
        self.setting = setting


@dataclass(frozen=True)
class Stack:
    """The patterns of one file. axes: of the array, in its own order. scan: (rows, columns) where one axis has all."""

    path: Path
    array: Any
    axes: tuple[str, ...]
    scan: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(scan_y, scan_x, qy, qx), whatever the order in the file."""
        sizes = dict(zip(self.axes, self.array.shape, strict=True))
        rows, columns = self.scan or (sizes["scan_y"], sizes["scan_x"])
        return rows, columns, sizes["qy"], sizes["qx"]

    def rows(self, first: int, last: int, columns: slice = slice(None)) -> np.ndarray:
        """(row, column, qy, qx) of the rows [first, last) of the scan."""
        where = {"scan_y": slice(first, last), "scan_x": columns}
        if self.scan:
            where = {"scan": slice(first * self.scan[1], last * self.scan[1])}
        with reading(self.path):
            found = np.asarray(self.array[tuple(where.get(axis, slice(None)) for axis in self.axes)])
        order = ("scan", "qy", "qx") if self.scan else AXES
        found = found.transpose([self.axes.index(axis) for axis in order])
        return found.reshape(last - first, self.scan[1], *found.shape[1:])[:, columns] if self.scan else found

    def pieces(self, rows: slice, columns: slice) -> Iterator[tuple[int, np.ndarray]]:
        """The patterns (probe, qy, qx) of a part of the scan, row by row, a few at a time, and which is the first."""
        first, last, _ = rows.indices(self.shape[0])
        wide = len(range(*columns.indices(self.shape[1])))
        pixels = wide * self.shape[2] * self.shape[3]
        step, done = max(1, PIXELS // pixels), 0
        for row in range(first, last, step):
            found = self.rows(row, min(last, row + step), columns).reshape(-1, *self.shape[2:])
            for part in np.array_split(found, -(-found.size // PIXELS)):
                yield done, part
                done += len(part)


def found(files: str | Sequence[str], root: str | Path = ".") -> list[Path]:
    """The files of a list, or those that a pattern like tilt_*.hspy names, numbers in their names in order."""
    if isinstance(files, str):
        base = Path(files).anchor or str(root)
        paths = sorted(Path(base).glob(files.removeprefix(Path(files).anchor)), key=_natural)
        if not paths:
            raise Misfit("files", f"no file is named {Path(root, files)}; check the pattern and data.root")
        return paths
    paths = [Path(root, name) for name in files]
    for path in paths:
        if not path.exists():
            beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise Misfit("files", f"{path}: no such file{meant(path.name, beside)}; check the path and data.root")
    return paths


@contextmanager
def stack(path: Path, key: str | None = None, axes: Sequence[str] = AXES,
          scan: tuple[int, int] | None = None) -> Iterator[Stack]:
    """The patterns in a file. key: name of the array, where there are several. Raises Misfit and DataError."""
    with ExitStack() as closing:
        with reading(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old headers, unknown tags: what matters is raised
            arrays = _arrays(path, closing)
        array = _picked(path, arrays, key, len(axes))
        if len(array.shape) != len(axes):
            raise Misfit("axes", f"{path}: the array has the shape {tuple(array.shape)}, and axes [{', '.join(axes)}] "
                                 f"name {len(axes)}; name each of its axes, in its order")
        sizes = dict(zip(axes, array.shape, strict=True))
        if 0 in array.shape:
            raise Misfit("files", f"{path}: is empty, of the shape {tuple(array.shape)}; copy it again")
        if scan and scan[0] * scan[1] != sizes["scan"]:
            raise Misfit("scan_shape", f"{path}: holds {sizes['scan']} patterns, and a scan of {scan[0]} x {scan[1]} "
                                       f"has {scan[0] * scan[1]}")
        yield Stack(path, array, tuple(axes), scan)


def _natural(path: Path) -> list[Any]:
    """Tilt 10 comes after tilt 9; of words and numbers that take turns."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", str(path)))]


def _arrays(path: Path, closing: ExitStack) -> Mapping[str, Any]:
    """Of a file, by name, none of them read; one without a name is ""."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return {"": np.load(path, mmap_mode="r")}
    if suffix in ZARR:  # not RosettaSciIO, whose .zspy (0.15) needs Zarr 2
        import zarr

        node = zarr.open(path if path.is_dir() else closing.enter_context(zarr.storage.ZipStore(path)), mode="r")
        return {"": node} if isinstance(node, zarr.Array) else {
            name: member for name, member in node.members(max_depth=None) if isinstance(member, zarr.Array)}
    if suffix in (*HDF5, ".hspy"):
        return _datasets(closing.enter_context(h5py(path).File(path, "r")))
    if suffix not in ROSETTA:
        known = ", ".join((".npy", *ZARR, *HDF5, ".hspy", *ROSETTA))
        raise Misfit("files", f"{path}: 4D files of this kind are not known; convert it to one of {known}")
    arrays: dict[str, Any] = {}
    for signal in rosetta(path, PLUGINS).file_reader(str(path), lazy=True):
        title = signal.get("metadata", {}).get("General", {}).get("title") or "signal"
        arrays[f"{title} ({len(arrays) + 1})" if title in arrays else title] = signal["data"]
    return arrays


def _datasets(file: Any) -> dict[str, Any]:
    """Of an HDF5 file, by path."""
    arrays: dict[str, Any] = {}
    file.visititems(lambda name, node: arrays.update({name: node} if hasattr(node, "shape") else {}))
    return arrays


def _picked(path: Path, arrays: Mapping[str, Any], key: str | None, axes: int) -> Any:
    """The array of that name; without one the only one, or the only one with so many axes."""
    names = list(arrays)
    held = ", ".join(f"{name} {tuple(arrays[name].shape)}" for name in names) or "no array"
    if key is not None:
        key = key.strip("/")
        if key not in arrays:
            raise Misfit("key", f"{path}: has no array {key!r}{meant(key, names)}; it holds {held}")
        return arrays[key]
    fitting = [name for name in names if len(arrays[name].shape) == axes]
    if len(names) > 1 and len(fitting) != 1 or not names:
        raise Misfit("key", f"{path}: holds {held}; say with key which array has the patterns")
    return arrays[names[0] if len(names) == 1 else fitting[0]]
