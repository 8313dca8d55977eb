"""4D-STEM tilt series in files: what a simulation has made or an import, written and read tilt by tilt.

`engine.archives` has the layout, of Zarr that xarray opens, or of HDF5 where a path ends in .h5 or .hdf5. Series are
cropped and binned as they are read. Counts are stored as the smallest unsigned integers that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engine import archives
from engine.data import DataError
from engine.diffraction import DiffractionSeries, counted
from engine.multislice import Optics


def save(path: str | Path, series: DiffractionSeries) -> None:
    """Write a series, aside first; one that is there is replaced only when the new one is whole."""
    kind = _smallest(series.patterns)
    with archives.created(path, series.patterns.shape, kind) as writer:
        for tilt, patterns in enumerate(series.patterns):
            writer.patterns[tilt] = patterns.astype(kind)
        for name in ("angles", "positions", "adf"):
            array = getattr(series, name)
            if array is not None:
                writer.add(name, np.asarray(array))
        writer.describe({"pixel_nm": series.pixel, "electrons": series.electrons, "optics": asdict(series.optics)})


class Streamed:
    """Patterns that stay on disk; indexing reads one tilt, (probe, qy, qx), cropped and binned, and checks it.

    probes: of a tilt. chosen: the tilts to show. gather: (new, old) as `_binning` has it. The file is opened for each
    tilt, and does not stay open.
    """

    def __init__(self, path: str | Path, probes: int, chosen: np.ndarray, gather: np.ndarray) -> None:
        self.path, self.chosen, self.gather = path, chosen, gather
        self.shape = (len(chosen), probes, len(gather), len(gather))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, tilt: int) -> np.ndarray:
        number = int(self.chosen[tilt])
        with archives.opened(self.path) as group:
            read = group.arrays["patterns"][number].astype(np.float32)
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
    with archives.opened(path) as group:
        stored, attributes = group.arrays["patterns"], group.attributes
        chosen = _chosen(path, tilts, stored.shape[0])
        gather = _binning(path, stored.shape[2], crop, bins)
        patterns: Any = Streamed(path, stored.shape[1], chosen, gather)
        if 4 * np.prod(patterns.shape, dtype=np.float64) <= most:
            patterns = np.stack([patterns[k] for k in range(len(patterns))])
        angles, positions = group.arrays["angles"][:][chosen], group.arrays["positions"][:]
        adf = group.arrays["adf"][:][chosen] if "adf" in group.arrays else None
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
