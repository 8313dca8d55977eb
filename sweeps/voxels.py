"""What many volumes have in common, gathered chunk by chunk: moments of each voxel, and percentiles."""

from __future__ import annotations

import functools

import numpy as np

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BINS = 1 << 16


class Moments:
    """Count, mean, sum of squared deviations and extremes of every voxel, over volumes that come one by one."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = 0
        self.mean, self._squares = np.zeros(shape, "f4"), np.zeros(shape, "f4")
        self.low, self.high = np.full(shape, np.inf, "f4"), np.full(shape, -np.inf, "f4")

    def add(self, volume: np.ndarray) -> None:
        """One more volume (Welford 1962: no difference of large sums)."""
        self.count += 1
        apart = volume - self.mean
        self.mean += apart / np.float32(self.count)
        apart *= volume - self.mean
        self._squares += apart
        np.minimum(self.low, volume, out=self.low)
        np.maximum(self.high, volume, out=self.high)

    def deviation(self) -> np.ndarray:
        """Standard deviation, over the number of volumes."""
        deviation: np.ndarray = np.sqrt(self._squares / np.float32(max(1, self.count)))
        return deviation


def histogram(block: np.ndarray) -> np.ndarray:
    """(1, BINS) voxels by the leading 16 bits of their values, in the order of the values."""
    bits = np.ascontiguousarray(block, "f4").view("u4") >> np.uint32(16)
    counts = np.bincount(bits.ravel(), minlength=BINS)
    # As whole numbers, floats with the sign bit are in falling order after those without.
    return np.concatenate([counts[:BINS // 2 - 1:-1], counts[:BINS // 2]])[None]


@functools.cache
def _edges() -> np.ndarray:
    """The ends of the bins, from the lowest up; what lies beyond the largest number counts as that."""
    infinite = np.uint32(0x7F80)  # by its leading bits; above it are none but NaN
    rising = (np.minimum(np.arange(BINS // 2, dtype="u4"), infinite) << np.uint32(16)).view("f4").astype("f8")
    above = np.append(rising[1:], np.inf)
    edges = np.concatenate([-above[::-1], rising, [np.inf]])
    return edges.clip(-float(np.finfo("f4").max), float(np.finfo("f4").max))


def ranks(counts: np.ndarray) -> np.ndarray:
    """Percentiles of a histogram, within a bin by the share of its voxels."""
    passed = np.concatenate([[0], np.cumsum(counts)])
    wanted = np.asarray(PERCENTILES) / 100 * passed[-1]
    bins = np.searchsorted(passed, wanted, side="left").clip(1, BINS) - 1
    inside = (wanted - passed[bins]) / np.maximum(counts[bins], 1)
    low, high = _edges()[bins], _edges()[bins + 1]
    found = low + inside * (high - low)
    return np.where(np.abs(found) < np.finfo("f4").tiny, 0, found).astype("f4")
