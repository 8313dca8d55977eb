"""4D-STEM series on disk, in Zarr or in HDF5, of one layout; written part by part. Imports without JAX.

A group holds `patterns` (tilt, probe, qy, qx), frequency 0 at n // 2, `angles` (tilt, 3) [deg], `positions` (probe, 2)
[nm], perhaps `adf` (tilt, probe), and as attributes the pixel, the electrons of a probe and the optics. In HDF5,
attributes that are no number and no text are JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data import DataError
from engine.files import reading

DIMENSIONS = {"patterns": ("tilt", "probe", "qy", "qx"), "angles": ("tilt", "euler"), "positions": ("probe", "yx"),
              "adf": ("tilt", "probe")}
UNITS = {"patterns": "electrons", "angles": "deg", "positions": "nm", "adf": "1"}
ATTRIBUTES = ("pixel_nm", "electrons", "optics")
CHUNK = 2**22  # bytes of a chunk of patterns, at least one of them
HDF5 = (".h5", ".hdf5")


@dataclass(frozen=True)
class Group:
    """arrays: by name, read where they are indexed. attributes: what else the file says."""

    arrays: Mapping[str, Any]
    attributes: dict[str, Any]


class Writer:
    """A group that is being written; `patterns` takes what is assigned to its parts."""

    def __init__(self, group: Any, patterns: Any) -> None:
        self._group, self.patterns = group, patterns

    def add(self, name: str, array: np.ndarray) -> None:
        """Another of the arrays of DIMENSIONS."""
        _labelled(_new(self._group, name, np.shape(array), np.dtype(np.float64), None), name)[...] = array

    def describe(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes: numbers, text, or what JSON holds."""
        text = {} if _zarr(self._group) else {k: json.dumps(v) for k, v in attributes.items() if not _plain(v)}
        self._group.attrs.update({**attributes, **text})


@contextmanager
def opened(path: str | Path) -> Iterator[Group]:
    """A group to read from; DataError where it is no 4D-STEM series."""
    with reading(path):
        if Path(path).suffix.lower() in HDF5:
            with h5py(path).File(path, "r") as file:
                yield _checked(path, file, {name: _value(value) for name, value in file.attrs.items()})
        else:
            import zarr

            group: Any = zarr.open_group(path, mode="r")
            yield _checked(path, group, dict(group.attrs))


@contextmanager
def created(path: str | Path, shape: tuple[int, ...], kind: np.dtype, over: bool = True) -> Iterator[Writer]:
    """A new group for patterns of a shape and type; it takes its place only when it is whole.

    over: whether it takes that of another; else one that has come meanwhile stays, as it may be read already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial{path.suffix}")
    chunks = _chunks(shape, kind)
    try:
        with _begun(aside) as group:
            yield Writer(group, _labelled(_new(group, "patterns", shape, kind, chunks), "patterns"))
        if over:
            _remove(path)
        try:
            os.rename(aside, path)
        except OSError:
            if over or not path.exists():
                raise
    finally:
        _remove(aside)


def count(shape: tuple[int, ...], kind: np.dtype) -> int:
    """How many files a new group in Zarr has."""
    return shape[0] * -(-shape[1] // _chunks(shape, kind)[1]) + 2 * len(DIMENSIONS)


def h5py(path: str | Path) -> Any:
    """The library that reads HDF5, an optional one; DataError where it is not installed."""
    try:
        import h5py as library
    except ImportError:
        raise DataError(f'{path}: is HDF5, and h5py is not installed; pip install "tomoatlas[files]"') from None
    return library


@contextmanager
def _begun(path: Path) -> Iterator[Any]:
    if path.suffix.lower() in HDF5:
        with h5py(path).File(path, "w") as file:
            yield file
    else:
        import zarr

        yield zarr.open_group(path, mode="w", zarr_format=3)


def _checked(path: str | Path, group: Any, attributes: dict[str, Any]) -> Group:
    arrays = {name: group[name] for name in group if hasattr(group[name], "shape")}
    missing = [name for name in ("patterns", "angles", "positions") if name not in arrays]
    missing += [name for name in ATTRIBUTES if name not in attributes]
    if missing or len(arrays["patterns"].shape) != 4:
        raise DataError(f"{path}: is no 4D-STEM series, as engine.scans.save writes them; it needs patterns (tilt, "
                        f"probe, qy, qx) and has no {', '.join(missing) or 'such array'}")
    return Group(arrays, attributes)


def _chunks(shape: tuple[int, ...], kind: np.dtype) -> tuple[int, ...]:
    probes, size = shape[1:3]
    return 1, max(1, min(probes, CHUNK // (size**2 * kind.itemsize))), size, size


def _zarr(group: Any) -> bool:
    return type(group).__module__.startswith("zarr")


def _new(group: Any, name: str, shape: tuple[int, ...], kind: np.dtype, chunks: tuple[int, ...] | None) -> Any:
    if _zarr(group):
        return group.create_array(name, shape=shape, dtype=kind, chunks=chunks or shape,
                                  dimension_names=DIMENSIONS[name])
    packed = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if chunks else {}
    return group.create_dataset(name, shape=shape, dtype=kind, chunks=chunks, **packed)


def _labelled(array: Any, name: str) -> Any:
    array.attrs["units"] = UNITS[name]
    for k, label in enumerate(() if _zarr(array) else DIMENSIONS[name]):
        array.dims[k].label = label
    return array


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _value(value: Any) -> Any:
    """An attribute of HDF5 as it was before it was written."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        return json.loads(value)
    return value.item() if isinstance(value, np.generic) else value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
