"""4D-STEM tilt series on disk, as Zarr that xarray opens; written and read tilt by tilt, cropped and binned on the way.

A group holds `patterns` (tilt, probe, qy, qx), frequency 0 at n // 2, `angles` (tilt, 3) [deg], `positions` (probe, 2)
[nm], perhaps `adf` (tilt, probe), and as attributes the pixel, the electrons of a probe and the optics. Counts are
stored as the smallest unsigned integers that hold them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engine.data import DataError
from engine.diffraction import DiffractionSeries, counted
from engine.files import reading
from engine.multislice import Optics

DIMENSIONS = {"patterns": ("tilt", "probe", "qy", "qx"), "angles": ("tilt", "euler"), "positions": ("probe", "yx"),
              "adf": ("tilt", "probe")}
UNITS = {"patterns": "electrons", "angles": "deg", "positions": "nm", "adf": "1"}
CHUNK = 2**22  # bytes of a chunk of patterns, at least one of them


def save(path: str | Path, series: DiffractionSeries) -> None:
    """Write a series, aside first; one that is there is replaced only when the new one is whole."""
    import zarr

    path = Path(path)
    aside, kind = path.with_name(path.name + ".partial"), _smallest(series.patterns)
    shutil.rmtree(aside, ignore_errors=True)
    group = zarr.open_group(aside, mode="w", zarr_format=3)
    group.attrs.update({"pixel_nm": series.pixel, "electrons": series.electrons, "optics": asdict(series.optics)})
    tilts, count, size = series.patterns.shape[:3]
    chunk = (1, max(1, min(count, CHUNK // (size**2 * kind.itemsize))), size, size)
    stored = group.create_array("patterns", shape=series.patterns.shape, dtype=kind, chunks=chunk,
                                dimension_names=DIMENSIONS["patterns"], attributes={"units": UNITS["patterns"]})
    for tilt in range(tilts):
        stored[tilt] = series.patterns[tilt].astype(kind)
    for name in ("angles", "positions", "adf"):
        array = getattr(series, name)
        if array is not None:
            group.create_array(name, data=np.asarray(array, np.float64), dimension_names=DIMENSIONS[name],
                               attributes={"units": UNITS[name]})
    if path.exists():
        shutil.rmtree(path)
    os.replace(aside, path)


class Streamed:
    """Patterns that stay on disk; indexing reads one tilt, (probe, qy, qx), cropped and binned, and checks it.

    stored: (tilt, probe, qy, qx) of the file. chosen: the tilts to show. gather: (new, old) as `_binning` has it.
    """

    def __init__(self, path: str | Path, stored: Any, chosen: np.ndarray, gather: np.ndarray) -> None:
        self.path, self.stored, self.chosen, self.gather = path, stored, chosen, gather
        self.shape = (len(chosen), stored.shape[1], len(gather), len(gather))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, tilt: int) -> np.ndarray:
        number = int(self.chosen[tilt])
        with reading(self.path):
            read = self.stored[number].astype(np.float32)
        return counted(self.gather @ read @ self.gather.T, f"{self.path}: tilt {number}")


def load(path: str | Path, *, tilts: Sequence[int] | None = None, crop: int | None = None, bins: int = 1,
         most: float = float("inf")) -> DiffractionSeries:
    """Read a series, or some of its tilts; only what is kept is ever in memory, and one tilt as it is stored.

    Patterns of more than `most` bytes are not read at all, but streamed: they are read where they are needed. (So are
    they again in each iteration of a solve.)
    crop: pixels of the detector that are kept along an edge, about frequency 0: fewer make the pixels of the field
    larger. bins: pixels along an edge of the squares that are added up to one: more make the field narrower, and
    every probe must lie in it.
    """
    import zarr

    with reading(path):
        group: Any = zarr.open_group(path, mode="r")
        missing = {"patterns", "angles", "positions"} - set(group)
        lacking = {"pixel_nm", "electrons", "optics"} - set(group.attrs)
        if missing or lacking:
            raise DataError(f"{path}: is no 4D-STEM series, as it has no {', '.join(sorted(missing | lacking))}; write "
                            "it with engine.scans.save")
        stored, attributes = group["patterns"], dict(group.attrs)
        chosen = _chosen(path, tilts, stored.shape[0])
        gather = _binning(path, stored.shape[2], crop, bins)
        patterns: Any = Streamed(path, stored, chosen, gather)
        if 4 * np.prod(patterns.shape, dtype=np.float64) <= most:
            patterns = np.stack([patterns[k] for k in range(len(patterns))])
        angles, positions = group["angles"][:][chosen], group["positions"][:]
        adf = group["adf"][:][chosen] if "adf" in group else None
        # What is as wide on the detector is as fine in the field: n pixels of it hold 1 / (pixel of the field).
        pixel = attributes["pixel_nm"] * stored.shape[2] / (bins * len(gather))
        return DiffractionSeries(patterns, angles, positions, pixel, Optics(**attributes["optics"]),
                                 attributes["electrons"], adf)


def _smallest(patterns: np.ndarray) -> np.dtype:
    """The type to store patterns in: unsigned integers for counts, else single precision."""
    if not all((tilt == np.rint(tilt)).all() for tilt in patterns):
        return np.dtype(np.float32)
    return np.min_scalar_type(int(patterns.max()))


def _chosen(path: str | Path, tilts: Sequence[int] | None, count: int) -> np.ndarray:
    chosen = np.arange(count) if tilts is None else np.asarray(tilts, int)
    if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= count:
        raise DataError(f"{path}: has tilts 0 to {count - 1}; {list(map(int, chosen))} are not all among them")
    return chosen


def _binning(path: str | Path, size: int, crop: int | None, bins: int) -> np.ndarray:
    """(new, old) share of each pixel of the detector in each new one, frequency 0 in the middle of both.

    An even number of pixels is centred on one by halving the two at its ends, which neighbours share.
    """
    kept = size if crop is None else crop
    if not (0 < kept <= size and 0 < bins <= kept):
        raise DataError(f"{path}: patterns of {size} pixels cannot be cropped to {kept} and binned by {bins}")
    number = kept // bins
    old, new = np.arange(size) - size // 2, bins * (np.arange(number) - number // 2)[:, None]
    overlap = np.minimum(old + 0.5, new + bins / 2) - np.maximum(old - 0.5, new - bins / 2)
    return np.clip(overlap, 0, 1).astype(np.float32)
