"""Registration of a measured tilt series: stages in the order given, each a function from `Series` to `Series`.

Images are (tilt, y, x), x the tilt axis, taken at angles (tilt,) [deg]; where they lie is an `align.Alignment`. A stage
looks at images as the stages before left them and adds to the shifts that it was asked for; images are resampled for
looking only, the product takes the sum of all shifts at once (`engine.regions`).

`centre_of_mass` and `common_line` want a specimen that is whole in every image, along y at least; `cross_correlation`
follows what stands out from image to image; `match` compares images with the volume that they make (`align.joint`), and
is what finds the tilt axis: where it lies, by the shifts that all images have in common, and how it is turned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.registration import phase_cross_correlation

from engine import align, resolution
from engine.align import Alignment, Level
from engine.data import DataError

Region = tuple[tuple[int, int], tuple[int, int]]

BORDER = 0.05  # of an image's edges: the frame whose median is the background
FINENESS = 20  # parts of a pixel in which correlations are found
CLOSER = 3  # correlations of a pair of neighbours, each from where the one before puts them
ROUNDS = 5  # of common lines and their mean: no shift of the needle's series changed by 0.05 pixels after the third
WINDOW = 5  # tilts whose median an image's total is held against
AROUND = 9  # tilts whose median an image's misfit is held against: it grows smoothly with the tilt
JUMP = 6.0  # robust standard deviations beyond which a total, or a misfit, is no chance
LEAST_JUMP, LEAST_EXCESS = 0.2, 1.0  # shares below which neither is a reason to leave an image out
SATURATED = 0.01  # share of an image's pixels at the series' highest value, more than its neighbours have
SIRT_ROUNDS, SIRT_STEPS = 2, 25  # of the volumes that residuals are judged by


@dataclass(frozen=True)
class Series:
    """A series as the stages so far left it. images: less their background `level` (tilt,). used: (tilt,), False where
    an image is left out; words: why, by tilt. matched: (tilt,) misfit at the last `match`, NaN where there was none."""

    images: np.ndarray
    angles: np.ndarray
    alignment: Alignment
    level: np.ndarray
    used: np.ndarray
    words: dict[int, str]
    matched: np.ndarray

    def moved(self) -> np.ndarray:
        """Images with their shifts and turns undone, 0 where there are none."""
        undone, seen = align.applied(self.images, self.alignment)
        return undone * seen

    def shifted(self, change: np.ndarray) -> Series:
        """With shifts (tilt, 2) more, found on images that were `moved`."""
        turn = np.radians(self.alignment.inplane)
        y, x = change.T
        turned = np.stack([y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn)], 1)
        return replace(self, alignment=replace(self.alignment, shifts=self.alignment.shifts + turned))

    def without(self, words: Mapping[int, str]) -> Series:
        """With images left out, and why."""
        used = self.used.copy()
        used[list(words)] = False
        return replace(self, used=used, words={**self.words, **words})

    def subset(self, tilts: np.ndarray) -> tuple[np.ndarray, np.ndarray, Alignment]:
        """Images, angles and alignment of some tilts."""
        found = self.alignment
        return self.images[tilts], self.angles[tilts], Alignment(
            found.shifts[tilts], found.inplane[tilts], found.tilt[tilts], found.azimuth[tilts])


@dataclass(frozen=True)
class Registration:
    """Where the images of a series lie.

    alignment: as in `engine.align`; of an image that is left out, from its neighbours. level: (tilt,) background that
    was taken off. used: (tilt,). words: why an image is not, by tilt. residual, before: (tilt,) what SIRT's volume
    leaves of an image unexplained, relative to the image, aligned and as it was measured; NaN where it is left out.
    halves: Fourier shell correlation of volumes from every second image each, in pixels of the images.
    sinograms: (tilt, y) at the middle of x, as measured and aligned.
    """

    alignment: Alignment
    level: np.ndarray
    used: np.ndarray
    words: dict[int, str]
    residual: np.ndarray
    before: np.ndarray
    halves: resolution.ShellCorrelation
    sinograms: tuple[np.ndarray, np.ndarray]


def register(images: np.ndarray, angles: np.ndarray, stages: Sequence[tuple[str, Mapping[str, Any]]], *,
             start: Alignment | None = None, extent: tuple[float, float] = (1.0, 1.0), bins: int = 1) -> Registration:
    """Run stages, (name of STAGES, its settings), over images (tilt, y, x) taken at angles (tilt,) [deg].

    start: shifts that are known already. extent: of the volume, as in `align.Settings`. bins: pixels that become one
    where residuals and half sets are judged. Raises DataError for a stage that the images do not allow.
    """
    images, angles = np.asarray(images, np.float32), np.asarray(angles, np.float64)
    tilts = len(images)
    if tilts < 3:
        raise DataError(f"{tilts} images cannot be aligned with each other; three or more are needed")
    start = start or Alignment.none(tilts)
    series = Series(images, angles, start, np.zeros(tilts), np.ones(tilts, bool), {}, np.full(tilts, np.nan))
    for name, settings in stages:
        series = STAGES[name](series, **settings, **({"extent": extent} if name == "match" else {}))
        if series.used.sum() < 3:
            raise DataError(f"{name} leaves {series.used.sum()} of {tilts} images, and three are needed: "
                            + "; ".join(series.words.values()))
    series = _interpolated(series)
    if "centre_of_mass" not in [name for name, _ in stages]:
        series = _staying(series, start)
    as_measured = replace(series, alignment=start)
    first, last = (_judged(each, extent, bins) for each in (as_measured, series))
    return Registration(series.alignment, series.level, series.used, series.words, last, first,
                        _halves(series, extent, bins), (_sinogram(as_measured), _sinogram(series)))


def background(series: Series, border: float = BORDER, level: float | None = None) -> Series:
    """Take off the median of a frame along each image's edges (F3, Methods: the mean grey level of outer regions), so
    that a specimen may cross the frame; or a level that is known."""
    if level is not None:
        found = np.full(len(series.images), level)
    else:
        ny, nx = series.images.shape[1:]
        y, x = max(1, round(border * ny)), max(1, round(border * nx))
        frame = np.ones((ny, nx), bool)
        frame[y:-y, x:-x] = False
        found = np.median(series.images[:, frame], 1)
    return replace(series, images=series.images - found[:, None, None].astype(np.float32), level=series.level + found)


def centre_of_mass(series: Series, axes: Sequence[str] = ("y",)) -> Series:
    """Bring each image's centre of mass to the middle: the volume's is then on the tilt axis.

    Along y as the sine that a whole specimen's centre follows, of no height; along x as a volume's centre, which no
    tilt moves.
    """
    images, change = np.maximum(series.moved(), 0), np.zeros((len(series.images), 2))
    total = images.sum((1, 2))
    if not (total > 0).all():
        series = series.without({int(t): f"the image at {series.angles[t]:g} degrees holds nothing above its background"
                                 for t in np.flatnonzero(total <= 0)})
    for k, axis in enumerate("yx"):
        if axis in axes:
            place = np.arange(images.shape[k + 1]) - (images.shape[k + 1] - 1) / 2
            change[:, k] = images.sum(2 - k) @ place / np.maximum(total, 1e-30)
    return series.shifted(change)


def common_line(series: Series) -> Series:
    """Align along x by the images' sums along y, which are alike at all tilts where the specimen is whole along y."""
    for _ in range(ROUNDS):
        lines = series.moved().sum(1)
        slopes = np.gradient(ndimage.gaussian_filter1d(lines, 1.0, axis=1), axis=1) * np.hanning(lines.shape[1])
        mean = slopes[series.used].mean(0)
        change = np.zeros((len(lines), 2))
        change[:, 1] = [-phase_cross_correlation(mean, line, upsample_factor=FINENESS, normalization=None)[0][0]
                        for line in slopes]
        series = series.shifted(change - change[series.used].mean(0))
    return series


def cross_correlation(series: Series, axes: Sequence[str] = ("y", "x"), smooth: float = 1.0,
                      stretch: bool = True) -> Series:
    """Correlate each image with its neighbour toward 0 degrees, whose own shift it takes over; by phases alone, and
    anew from where that puts it, so that the window lies on what both have.

    smooth: [pixel] of the Gaussian whose gradient the images are seen through. stretch: whether the steeper image is
    widened across the tilt axis by the ratio of the cosines, as flat specimens look. The image nearest to 0 stays.
    """
    images = series.moved()
    ny, nx = images.shape[1:]
    window = np.hanning(ny)[:, None] * np.hanning(nx)
    order = np.flatnonzero(series.used)
    order = order[np.argsort(series.angles[order])]
    middle, change = int(np.argmin(np.abs(series.angles[order]))), np.zeros((len(images), 2))
    kept = [k for k, axis in enumerate("yx") if axis in axes]

    def seen(image: np.ndarray) -> np.ndarray:
        return window * ndimage.gaussian_gradient_magnitude(image, smooth)

    for way in (order[middle:], order[middle::-1]):
        for near, far in zip(way, way[1:], strict=False):
            cosines = np.maximum(np.cos(np.radians(series.angles[[near, far]])), 0.1)
            part = np.array([cosines[1] / cosines[0] if stretch else 1.0, 1.0])
            goal, change[far] = seen(_laid(images[near], change[near], np.ones(2))), change[near]
            for _ in range(CLOSER):
                back, *_ = phase_cross_correlation(goal, seen(_laid(images[far], change[far], part)),
                                                   upsample_factor=FINENESS, normalization="phase")
                change[far, kept] -= (part * back)[kept]
    return series.shifted(change)


def _laid(image: np.ndarray, shift: np.ndarray, part: np.ndarray) -> np.ndarray:
    """An image with its shift undone, and of which such a part along y and x is as wide as an image."""
    middle = (np.array(image.shape) - 1) / 2
    laid: np.ndarray = ndimage.affine_transform(image, part, middle * (1 - part) + shift, order=1, mode="nearest")
    return laid


def outliers(series: Series) -> Series:
    """Leave out images that are blank, saturated, much brighter or darker than their neighbours, or which the volume of
    the last `match` explains much worse than the others."""
    order = np.argsort(series.angles)
    order = order[series.used[order]]
    images, angles, words = series.images[order], series.angles[order], {}
    total = images.sum((1, 2), dtype=np.float64)
    usual = ndimage.median_filter(total, WINDOW, mode="nearest")
    off = total / np.where(usual == 0, 1, usual) - 1
    spread = images.std((1, 2))
    top = (images >= images.max()).mean((1, 2))
    residual = series.matched[order]
    near = ndimage.median_filter(residual, AROUND, mode="nearest")
    excess = residual / near - 1 if np.isfinite(residual).all() else np.zeros(len(order))
    for k, (tilt, angle) in enumerate(zip(order, angles, strict=True)):
        at = f"the image at {angle:g} degrees"
        if spread[k] < 1e-3 * np.median(spread):
            words[int(tilt)] = f"{at} is blank"
        elif abs(off[k]) > max(LEAST_JUMP, JUMP * _robust(off)):
            words[int(tilt)] = f"{at} is {1 + off[k]:.2g} times as bright as its neighbours"
        elif top[k] > SATURATED + 3 * np.median(top):
            words[int(tilt)] = f"{at} is saturated in {100 * top[k]:.0f} % of its pixels"
        elif excess[k] > max(LEAST_EXCESS, JUMP * _robust(excess)):
            words[int(tilt)] = (f"{at} misses the volume by {residual[k]:.2g}, {1 + excess[k]:.2g} times what its "
                                "neighbours do")
    return series.without(words)


def _robust(values: np.ndarray) -> float:
    """Standard deviation as the median absolute deviation tells it."""
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def match(series: Series, levels: Sequence[Level], steps: int = 20, extent: tuple[float, float] = (1.0, 1.0),
          axes: Sequence[str] = ("y", "x"), region: Region | None = None) -> Series:
    """Projection matching: volume and alignment in turn, coarse to fine (`align.joint`), of images that are used.

    axes: along which they are moved. region: of the aligned images, [from, to) along y and x [pixel]: what is looked
    at, and around it as much as the images move.
    """
    tilts, numbers = np.flatnonzero(series.used), series.alignment
    images, angles, begun = series.subset(tilts)
    if len(set(axes)) < 2:
        levels = [replace(each, free=tuple(axes[0] if name == "shift" else name for name in each.free))
                  for each in levels]
    if region is not None:
        images, off, extent = _looked_at(images, begun, region, extent)
        begun = _about(begun, angles, off, 1)
    scale = float(np.abs(images).mean())
    joined = align.joint(images / scale, angles, align.Settings(tuple(levels), steps, extent=extent), begun)
    found = joined.alignment if region is None else _about(joined.alignment, angles, off, -1)
    matched = np.full(len(series.images), np.nan)
    arrays = {name: getattr(numbers, name).copy() for name in ("shifts", "inplane", "tilt", "azimuth")}
    for name, array in arrays.items():
        array[tilts] = getattr(found, name)
    matched[tilts] = joined.residual
    return replace(series, alignment=Alignment(**arrays), matched=matched)


def _looked_at(images: np.ndarray, begun: Alignment, region: Region,
               extent: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """A part of images that shows a region of the aligned ones, how far its middle lies from theirs, and a volume's
    extent, as deep and as far beyond the images' edges, in its heights."""
    size, room = np.array(images.shape[1:]), np.ceil(np.abs(begun.shifts).max(0)).astype(int)
    low = np.maximum(0, np.array([start for start, _ in region]) - room)
    high = np.minimum(size, np.array([stop for _, stop in region]) + room)
    ratio = size[0] / (high[0] - low[0])
    part = images[:, low[0]:high[0], low[1]:high[1]]
    return part, (low + high - size) / 2, (extent[0] * ratio, 1 + (extent[1] - 1) * ratio)


def _about(alignment: Alignment, angles: np.ndarray, off: np.ndarray, sign: int) -> Alignment:
    """An alignment of images about a middle that lies `off` (y, x) from theirs, of a volume about its own, with sign 1;
    back with -1."""
    cos, sin = np.cos(np.radians(alignment.inplane)), np.sin(np.radians(alignment.inplane))
    y, x = off[0] * np.cos(np.radians(angles)), off[1]
    moved = np.stack([y * cos - x * sin, y * sin + x * cos], 1) - off
    return replace(alignment, shifts=alignment.shifts + sign * moved)


STAGES: dict[str, Callable[..., Series]] = {
    "background": background, "centre_of_mass": centre_of_mass, "common_line": common_line,
    "cross_correlation": cross_correlation, "outliers": outliers, "match": match}


def ungauged(shifts: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Shifts (tilt, 2) less what images of a moved volume would show as well."""
    turn = np.radians(angles)
    shown = np.stack([np.cos(turn), np.sin(turn)], 1)
    y = shifts[:, 0] - shown @ np.linalg.lstsq(shown, shifts[:, 0], rcond=None)[0]
    return np.stack([y, shifts[:, 1] - shifts[:, 1].mean()], 1)


def at(found: Alignment, angles: np.ndarray, others: np.ndarray) -> Alignment:
    """An alignment at other angles [deg]: between its own as straight lines go, beyond them as at the last one."""
    order = np.argsort(angles)

    def between(values: np.ndarray) -> np.ndarray:
        return np.interp(others, angles[order], values[order])

    return Alignment(np.stack([between(found.shifts[:, 0]), between(found.shifts[:, 1])], 1), between(found.inplane),
                     between(found.tilt), between(found.azimuth))


def _interpolated(series: Series) -> Series:
    """With the numbers of images that are left out from their neighbours."""
    _, angles, found = series.subset(np.flatnonzero(series.used))
    return replace(series, alignment=at(found, angles, series.angles)) if not series.used.all() else series


def _staying(series: Series, start: Alignment) -> Series:
    """With the image nearest to 0 degrees where it was: the volume moves along x and y instead."""
    nearest = int(np.argmin(np.where(series.used, np.abs(series.angles), np.inf)))
    moved = start.shifts[nearest] - series.alignment.shifts[nearest]
    cos = np.cos(np.radians(series.angles))
    change = np.stack([moved[0] * cos / cos[nearest], np.full(len(cos), moved[1])], 1)
    return replace(series, alignment=replace(series.alignment, shifts=series.alignment.shifts + change))


def _sinogram(series: Series) -> np.ndarray:
    """(tilt, y) the mean of a few columns about the middle of x."""
    middle = series.images.shape[2] // 2
    undone: np.ndarray = series.moved()[:, :, max(0, middle - 2):middle + 3].mean(2)
    return undone


def _volume(series: Series, tilts: np.ndarray, extent: tuple[float, float],
            bins: int) -> tuple[np.ndarray, np.ndarray]:
    """SIRT's volume of some tilts, binned, and what it leaves of each."""
    images, angles, found = series.subset(tilts)
    scale = float(np.abs(images).mean())
    return align.reconstructed(align.binned(images / scale, bins), angles,
                               replace(found, shifts=found.shifts / bins), rounds=SIRT_ROUNDS, steps=SIRT_STEPS,
                               extent=extent)


def _judged(series: Series, extent: tuple[float, float], bins: int) -> np.ndarray:
    """(tilt,) what the volume of all leaves of each image."""
    tilts, residual = np.flatnonzero(series.used), np.full(len(series.images), np.nan)
    residual[tilts] = _volume(series, tilts, extent, bins)[1]
    return residual


def _halves(series: Series, extent: tuple[float, float], bins: int) -> resolution.ShellCorrelation:
    """Shell correlation of the volumes of every second image each; its frequencies in 1 / pixel of the images."""
    tilts = np.flatnonzero(series.used)
    tilts = tilts[np.argsort(series.angles[tilts])]
    one, other = (_volume(series, part, extent, bins)[0] for part in (tilts[::2], tilts[1::2]))
    # A thin volume has few frequencies along its depth: vacuum around it changes none of them.
    room = [(0, max(0, 2 * resolution.BLOCK - n)) for n in one.shape]
    one, other = np.pad(one, room), np.pad(other, room)
    return resolution.shell_correlation(one, other, float(bins))
