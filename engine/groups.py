"""In what order a 4D-STEM tilt series is met: groups of probes far apart, cut into batches, and tilts far apart.

A group's probes take a step together; a batch's waves fit the memory. `Feed` hands over what is measured, a tilt at a
time, whether it lies in memory or on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import sharding
from engine.diffraction import DiffractionSeries
from engine.multislice import Beam, batches, probes

# Bytes of a batch's waves in front of one slice, and of all slices where they are kept; on a CPU, and on a GPU. Kept
# waves took a fifth less time per probe and slice at 48^2, 48 slices and 7 to 28 MB, and more at 57 (2 cores).
ONE_SLICE = {"cpu": 2**21, "gpu": 2**28}
ALL_SLICES = {"cpu": 2**24, "gpu": 2**32}
FEWEST = 4  # probes in a batch below which waves are rebuilt, not kept


class Tilt(NamedTuple):
    """Of one tilt, or stacked, of all: groups of probes in batches, the last filled up with weight 0."""

    amplitudes: Any  # (group, batch, probe, qy, qx)
    weights: Any  # (group, batch, probe, 1, 1)
    angles: Any  # (3,), or (1,) where all tilts are about x


class Feed:
    """The tilts of a series, in the order in which they are met, their probes as `chosen` (group, batch, probe) has it.

    fitted: (tilt, probe) False for patterns of weight 0. Batches are dealt to devices, a leading axis where they are
    several. Iterating reads a tilt while the one before it is at work, so that two are in memory at a time.
    """

    def __init__(self, series: DiffractionSeries, chosen: np.ndarray, order: Sequence[int], fitted: np.ndarray,
                 devices: int) -> None:
        self.series, self.chosen, self.order, self.fitted, self.devices = series, chosen, order, fitted, devices
        self.angles = series.angles if series.angles[:, :2].any() else series.angles[:, 2:]
        self.real = (chosen >= 0)[..., None, None]

    def __iter__(self) -> Iterator[Tilt]:
        with ThreadPoolExecutor(1) as reader:
            coming: Future = reader.submit(self._tilt, self.order[0])
            for after in [*self.order[1:], None]:
                tilt = coming.result()
                if after is not None:
                    coming = reader.submit(self._tilt, after)
                yield tilt

    def __len__(self) -> int:
        return len(self.order)

    def stacked(self) -> Tilt:
        """All tilts, with an axis of them in front, behind the devices'."""
        return Tilt(*(np.stack(parts, axis=int(self.devices > 1)) for parts in zip(*self)))

    def weights(self) -> np.ndarray:
        """(tilt, group, batch, probe, 1, 1): 1 where a pattern is real and fitted."""
        return np.stack([self._weights(tilt) for tilt in self.order])

    def squares(self) -> float:
        """The sum of the weighted squared amplitudes: the fitted patterns' electrons, a probe's being 1."""
        return sum(float((self.series.patterns[t].sum((1, 2), dtype=np.float64) * self.fitted[t]).sum())
                   for t in self.order) / self.series.electrons

    def ungrouped(self, values: np.ndarray) -> np.ndarray:
        """(tilt, probe, ...) as the series has them, of values (tilt, group, batch, probe, ...) as they are met."""
        found = np.zeros((*self.fitted.shape, *values.shape[4:]), values.dtype)
        real = self.chosen >= 0
        for tilt, one in zip(self.order, values):
            found[tilt, self.chosen[real]] = one[real]
        return found

    def _tilt(self, tilt: int) -> Tilt:
        patterns = np.fft.ifftshift(self.series.patterns[tilt], axes=(1, 2))
        amplitudes = np.sqrt(patterns / np.float32(self.series.electrons))[self.chosen]
        weights, angles = self._weights(tilt), self.angles[tilt].astype(np.float32)
        if self.devices == 1:
            return Tilt(amplitudes, weights, angles)
        return Tilt(dealt(amplitudes, self.devices), dealt(weights, self.devices),
                    sharding.repeated(angles, self.devices))

    def _weights(self, tilt: int) -> np.ndarray:
        return (self.real * self.fitted[tilt][self.chosen][..., None, None]).astype(np.float32)


def dealt(array: np.ndarray, devices: int, axis: int = 1) -> np.ndarray:
    """(device, ...) of an axis of batches, whose length the devices divide; for one device as it is."""
    if devices == 1:
        return array
    return np.moveaxis(array.reshape(*array.shape[:axis], devices, -1, *array.shape[axis + 1:]), axis, 0)


def gathered(array: np.ndarray, devices: int, axis: int = 1) -> np.ndarray:
    """The inverse of `dealt`."""
    if devices == 1:
        return np.asarray(array)
    back = np.moveaxis(np.asarray(array), 0, axis)
    return back.reshape(*back.shape[:axis], -1, *back.shape[axis + 2:])


def grouped(positions: np.ndarray, group: int, wide: int, slices: int, devices: int = 1,
            shuffled: bool = True) -> np.ndarray:
    """(group, batch, probe) indices of probes at positions (probe, 2); -1 fills up.

    group: probes in one, 0 for all. wide, slices: of their waves. The scan is cut into as many cells as a group has
    probes, and each group takes one probe from the same place of each: its probes lie far apart, and light little
    twice. Groups come in an order drawn at random unless shuffled is False.
    """
    count = len(positions)
    group = min(group or count, count)
    cells = _cells(positions, group)
    members = np.full((len(cells), max(len(cell) for cell in cells)), -1)
    for row, cell in zip(members, cells):
        row[:len(cell)] = cell
    members = np.random.default_rng(0).permutation(members.T) if shuffled else members.T
    kept = kept_at_once(wide, slices)
    most = 8 * wide**2 * kept if kept >= min(FEWEST, group) else ONE_SLICE[_platform()]
    number = -(-batches(group, wide, most)[0] // devices) * devices
    each = -(-group // number)
    filled = np.pad(members, ((0, 0), (0, number * each - group)), constant_values=-1)
    return filled.reshape(len(members), number, each)


def kept_at_once(wide: int, slices: int) -> int:
    """Probes in a batch whose waves in front of so many slices can be kept."""
    return ALL_SLICES[_platform()] // (8 * wide**2 * slices)


def tilt_order(tilts: int) -> np.ndarray:
    """Tilts so that each lies far from the last ones: by steps near the golden section of their number."""
    start = round(tilts * (3 - 5**0.5) / 2)
    stride = next(s for s in range(max(start, 1), 2 * tilts + 2) if gcd(s, tilts) == 1)
    return np.arange(tilts) * stride % tilts


def illumination(made: Beam, positions: np.ndarray, real: np.ndarray, halfway: np.ndarray) -> float:
    """Electrons on the brightest pixel in the middle of the volume, from all probes of a group; of up to 16 groups.

    positions: (group, batch, probe, 2); real: (group, batch, probe, 1, 1), 0 for what fills up; halfway: a propagator.
    """
    middle = made._replace(spectrum=made.spectrum * jnp.asarray(halfway, jnp.complex64))
    groups = np.unique(np.linspace(0, len(positions) - 1, min(16, len(positions))).astype(int))
    return max(float(sum(_light(middle, at, w) for at, w in zip(positions[g], real[g])).max()) for g in groups)


def _platform() -> str:
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def _cells(positions: np.ndarray, cells: int) -> list[np.ndarray]:
    """Indices of probes in each of so many cells of a scan, in rows and columns; each cell's in one and the same order.

    Raster positions are compared to a millionth of a nanometre, so that rounding does not break their rows.
    """
    places = np.round(positions, 6)
    rows = next(r for r in range(int(cells**0.5), 0, -1) if cells % r == 0)
    found = []
    for row in np.array_split(np.lexsort((places[:, 1], places[:, 0])), rows):
        for cell in np.array_split(row[np.lexsort((places[row, 0], places[row, 1]))], cells // rows):
            found.append(cell[np.lexsort((places[cell, 1], places[cell, 0]))])
    return found


@jax.jit
def _light(made: Beam, positions: jax.Array, real: jax.Array) -> jax.Array:
    """(y, x) intensity of those probes (probe, 2) that are real (probe, 1, 1)."""
    return (real * jnp.abs(probes(made, positions)) ** 2).sum(0)
