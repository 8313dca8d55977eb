"""Atoms from a reconstructed potential: where they are, of which kind, and how far from the truth (MSET, II E and F).

The numbers that the paper leaves open: the volume is smoothed by 0.03 nm; an atom is a local maximum above 8 % of the
99.95th percentile, at least 0.14 nm from a higher one; its place is the top of a parabola through the logarithms of
the neighbours, axis by axis; its intensity the sum over 5^3 voxels. Three classes of intensity by Otsu's criterion
are non-atom, the lighter and the heavier element. A traced atom is a true one's if it is less than 0.09 nm away; each
is matched once, so that the sum of squared distances is least.

Otsu's criterion makes three classes whatever there is: in a volume without non-atoms it parts the atoms of one element
and calls the weaker ones non-atoms. Two neighbouring classes whose means are within a fifth are therefore one; what is
left is parted in two, the elements. Parts of one element were found at ratios of 0.83 to 0.98, classes at 0.2 to 0.75.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_fill_holes, gaussian_filter, maximum_filter, uniform_filter
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

from engine.atoms import Atoms, xyz_text
from engine.data import DataError

SMOOTH = 0.03  # [nm] standard deviation (the paper's)
APART = 0.14  # [nm]; the closest atoms of CuAu are 0.267 nm apart, those of BaO 0.277 nm
THRESHOLD, PERCENTILE = 0.08, 99.95
BOX = 5  # voxels along an edge of the cube whose sum is an atom's intensity
NEAR = 0.09  # [nm] within which a traced atom is a true one's
ALIKE = 0.8  # ratio of the means of two classes above which they are one
NON_ATOM, LIGHT, HEAVY = 0, 1, 2


@dataclass(frozen=True)
class Traced:
    """positions: (atom, 3), z, y, x [nm] from the volume's centre. intensities: (atom,), brightest first.

    classes: (atom,) of ALIKE = 0.8  # ratio of the means of two classes above which they are one
NON_ATOM, LIGHT, HEAVY. thresholds: the two intensities between the classes.
    """

    positions: np.ndarray
    intensities: np.ndarray
    classes: np.ndarray
    thresholds: tuple[float, float]

    def atoms(self, light: str, heavy: str) -> Atoms:
        """What is left without the non-atoms, under the names of the two elements."""
        kept = self.classes != NON_ATOM
        return Atoms(np.where(self.classes[kept] == HEAVY, heavy, light), self.positions[kept])


def traced_xyz(traced: Traced, width: float, light: str, heavy: str) -> str:
    """Extended XYZ of the atoms in a cube of `width` [nm], without the non-atoms, each with its intensity."""
    return xyz_text(traced.atoms(light, heavy), width, intensity=traced.intensities[traced.classes != NON_ATOM])


@dataclass(frozen=True)
class Comparison:
    """A traced model beside the true one, by the paper's definitions.

    rmsd [pm]: over matched atoms. tracing_error: false positives and atoms not found, over the true number.
    classification: rightly named atoms over the true number. pairs: (match, 2) indices of atoms traced (non-atoms
    left out) and true. right: (match,) whether the element is the true one. found: number found, by element.
    """

    rmsd: float
    tracing_error: float
    classification: float
    pairs: np.ndarray
    right: np.ndarray
    found: dict[str, int]


def trace(volume: np.ndarray, pixel: float, *, smooth: float = SMOOTH, apart: float = APART,
          threshold: float = THRESHOLD, masked: bool = False) -> Traced:
    """Atoms in a potential (z, y, x) with voxels of `pixel` nm, by the rules above.

    masked: keep only peaks inside the particle, by Otsu's threshold, as the paper does for BaO; of the volume smoothed
    by `apart`, in which light atoms beside heavy ones do not stand apart.
    """
    volume = np.asarray(volume, np.float64)
    smoothed = gaussian_filter(volume, smooth / pixel, mode="constant")
    peaks = _peaks(smoothed, apart / pixel, threshold)
    if masked:
        envelope = gaussian_filter(volume, apart / pixel, mode="constant")
        inside = binary_fill_holes(envelope > otsu(envelope, 2)[0])  # a light core in a heavy shell is no hole
        peaks = peaks[inside[tuple(peaks.T)]]
    if len(peaks) < 3:
        raise DataError(f"{len(peaks)} atoms stand out from the volume; three classes need three or more: "
                        "lower the threshold, or reconstruct further")
    sums = uniform_filter(smoothed, BOX, mode="constant")[tuple(peaks.T)] * BOX**3
    order = np.argsort(-sums, kind="stable")
    peaks, sums = peaks[order], sums[order]
    low, high = _thresholds(sums)
    positions = (peaks + _beside(smoothed, peaks) - (np.array(volume.shape) - 1) / 2) * pixel
    return Traced(positions, sums, np.digitize(sums, (low, high), right=True), (low, high))


def compare(traced: Atoms, truth: Atoms, near: float = NEAR) -> Comparison:
    """How a traced model, without its non-atoms, agrees with the true one."""
    if len(truth) == 0:
        raise DataError("the true model has no atoms to compare with")
    pairs = match(traced.positions, truth.positions, near)
    apart = traced.positions[pairs[:, 0]] - truth.positions[pairs[:, 1]]
    rmsd = 1e3 * float(np.sqrt((apart**2).sum(1).mean())) if len(pairs) else float("nan")
    right = traced.symbols[pairs[:, 0]] == truth.symbols[pairs[:, 1]]
    wrong = len(traced) + len(truth) - 2 * len(pairs)
    found = {str(s): int((truth.symbols[pairs[right, 1]] == s).sum()) for s in np.unique(truth.symbols)}
    return Comparison(rmsd, wrong / len(truth), float(right.sum()) / len(truth), pairs, right, found)


def match(a: np.ndarray, b: np.ndarray, near: float) -> np.ndarray:
    """(pair, 2) indices into positions a and b: as many pairs closer than `near` as can be, then the closest."""
    if len(a) == 0 or len(b) == 0:
        return np.zeros((0, 2), int)
    close = cKDTree(a).sparse_distance_matrix(cKDTree(b), near).tocsr()
    used = np.flatnonzero(np.diff(close.indptr))
    # What is too far costs more than all that is near together, so that no near pair is given up for another's sake.
    cost = np.full((len(used), len(b)), (len(a) + 1.0) * near**2)
    for row, i in enumerate(used):
        span = slice(close.indptr[i], close.indptr[i + 1])
        cost[row, close.indices[span]] = close.data[span] ** 2
    rows, columns = linear_sum_assignment(cost)
    kept = cost[rows, columns] < near**2
    return np.stack([used[rows[kept]], columns[kept]], 1)


def otsu(values: np.ndarray, classes: int) -> list[float]:
    """The thresholds between 2 or 3 classes that make the variance between them greatest (N. Otsu, 1979).

    Each is the mean of the values that it parts. All values are tried, or a histogram of 1,024 bins where they are
    more.
    """
    values = np.sort(np.asarray(values, np.float64).ravel())
    counts = np.ones(len(values))
    if len(values) > 1024:
        counts, edges = np.histogram(values, 1024)
        values, counts = (edges[1:] + edges[:-1])[counts > 0] / 2, counts[counts > 0].astype(np.float64)
    if len(values) < classes:
        raise DataError(f"{len(values)} different values cannot be parted into {classes} classes")
    n, total = (np.concatenate([[0], np.cumsum(c)]) for c in (counts, counts * values))
    first = np.arange(1, len(values))

    def weight(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        number = n[end] - n[start]
        return np.where(number > 0, (total[end] - total[start]) ** 2 / np.maximum(number, 1), -np.inf)

    if classes == 2:
        cuts = [int(first[(weight(0 * first, first) + weight(first, 0 * first + len(values))).argmax()])]
    elif classes == 3:
        low, high = first[:, None], first[None, :]
        score = weight(0 * low, low) + weight(low, np.maximum(low, high)) + weight(high, 0 * high + len(values))
        cuts = [int(first[k]) for k in np.unravel_index(np.where(low < high, score, -np.inf).argmax(), score.shape)]
    else:
        raise ValueError("two or three classes")
    return [float(values[c - 1] + values[c]) / 2 for c in cuts]


def _thresholds(intensities: np.ndarray) -> tuple[float, float]:
    """Between non-atoms, the lighter and the heavier element."""
    low, high = otsu(intensities, 3)
    classes = np.digitize(intensities, (low, high), right=True)
    counts = np.bincount(classes, minlength=3)
    means = np.bincount(classes, intensities, 3) / np.maximum(counts, 1)
    if counts.min() == 0 or (means[:-1] > ALIKE * means[1:]).any():
        return 0.0, otsu(intensities, 2)[0]
    return low, high


def _peaks(volume: np.ndarray, apart: float, threshold: float) -> np.ndarray:
    """(peak, 3) voxels: local maxima above the threshold, each the highest within `apart` voxels; none at the edge."""
    level = threshold * np.percentile(volume, PERCENTILE)
    tops = (volume == maximum_filter(volume, 3)) & (volume > level)
    tops[[0, -1]] = tops[:, [0, -1]] = tops[:, :, [0, -1]] = False
    peaks = np.argwhere(tops)
    peaks = peaks[np.argsort(-volume[tuple(peaks.T)], kind="stable")]
    kept = np.ones(len(peaks), bool)
    if len(peaks) > 1:
        neighbours = cKDTree(peaks).query_ball_point(peaks, apart * (1 - 1e-9))
        for k, near in enumerate(neighbours):
            if kept[k]:
                kept[[other for other in near if other > k]] = False
    return peaks[kept]


def _beside(volume: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """(peak, 3) how far, in voxels, the top of a Gaussian through three voxels along each axis lies from the middle."""
    floor = 1e-6 * volume.max()
    offsets = np.zeros(peaks.shape)
    for axis in range(3):
        step = np.eye(3, dtype=int)[axis]
        before, here, behind = (np.log(np.maximum(volume[tuple((peaks + k * step).T)], floor)) for k in (-1, 0, 1))
        bend = before - 2 * here + behind
        offsets[:, axis] = np.where(bend < 0, (before - behind) / (2 * np.where(bend < 0, bend, -1)), 0)
    return np.clip(offsets, -0.5, 0.5)
