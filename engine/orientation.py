"""How a scan lies on its detector, from the patterns alone: the bright disc, and the turn and flip between the two.

In focus, a specimen deflects the beam by the gradient of its potential, seen through the probe; the patterns' centre
of mass, over the scan, is that gradient (I. Lazic, E. Bosch, S. Lazar, Ultramicroscopy 160, 265 (2016)). Turned back
into the scan's frame it has no curl, which finds a flip and the turn but for half of one; the potential is positive,
and where it is, the disc is darker: that finds the half.

Out of focus, each part of the bright disc sees the specimen from its own direction, in an image of its own that is
shifted by the beam's height times that direction (parallax). Shifted back by the right turn, and flip, they agree.
This needs no sign, few electrons and no fine scan. Imports without JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from engine.data import DataError

FLIPS = {"none": np.eye(2), "x": np.diag([1.0, -1.0]), "y": np.diag([-1.0, 1.0]),
         "transpose": np.array([[0.0, 1.0], [1.0, 0.0]])}  # of (y, x)
WIDTHS = (0.7, 1.4)  # [probes] of the Gaussians that smooth the derivatives; the surer one is taken
BANDS = 4  # of rows of the scan in each tilt, left out one after the other to tell the error
SURE = 3.0  # standard errors
STEADY = 5.0  # [deg] standard error of a turn that can be used
FEWEST = 5  # probes along an edge of a scan in focus
PARTS = 6  # of the disc's diameter, squares of which have images of their own
ANGLES = np.arange(0.0, 360.0, 6.0)  # [deg] that are tried; the peak of agreement is 30 wide
WITHIN = 96  # probes along an edge of the scan's middle, whose images are compared
OFFSETS = {"x": 0.0, "y": 180.0, "transpose": -90.0}  # [deg] of a turn after a flip along x that is this flip


@dataclass(frozen=True)
class Orientation:
    """Positions (y, x) on the detector are `matrix` @ those of the scan.

    rotation: [deg] of the scan on the detector, from +x toward +y, after the flip. error: [deg] its standard error,
    of parts of the data that are left out. how: deflection or parallax, by which it was found. misfit: of deflections
    the curl to the divergence, of parallax the power of single images to that of their sum; 0 where all is right, 1
    where nothing is known. mirrored: the same of the best turn with the other handedness. sign, hand: how many
    standard errors tell it from half a turn, and from the other handedness.
    """

    rotation: float
    flip: str
    error: float = 0.0
    how: str = "given"
    misfit: float = 0.0
    mirrored: float = 1.0
    sign: float = np.inf
    hand: float = np.inf

    @property
    def matrix(self) -> np.ndarray:
        """(2, 2), of (y, x)."""
        return turn(self.rotation) @ FLIPS[self.flip]


def turn(angle: float) -> np.ndarray:
    """(2, 2) of (y, x), from +x toward +y by an angle [deg]; quarters of a turn are exact."""
    cosine, sine = (float(np.round(f(np.radians(angle)), 15)) for f in (np.cos, np.sin))
    return np.array([[cosine, sine], [-sine, cosine]])


def disc(pattern: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre (qy, qx) and radius [pixels] of the bright disc of a mean pattern, where it is half as bright as inside.

    DataError where there is none.
    """
    smooth = ndimage.median_filter(pattern, 3)  # pixels that are always bright are no disc
    total = smooth.sum()
    level = (smooth**2).sum() / total if total > 0 else 0.0
    labels, count = ndimage.label(pattern > level / 2)
    if level <= 0 or count == 0:
        raise DataError("the patterns are empty, so there is no bright disc; give centre and scale")
    largest = 1 + int(np.argmax(ndimage.sum_labels(np.ones_like(pattern), labels, range(1, count + 1))))
    inside = ndimage.binary_fill_holes(labels == largest)
    if inside.mean() > 0.9:
        raise DataError("the patterns are as bright everywhere, so there is no bright disc; give centre and scale")
    return np.array(ndimage.center_of_mass(inside)), float(np.sqrt(inside.sum() / np.pi))


def parts(shape: Sequence[int], centre: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """(pixel, part) shares of squares of the disc, each of sum 1, and (part, 2) their places (qy, qx) [pixels]."""
    y, x = np.meshgrid(*(np.arange(edge) - at for edge, at in zip(shape, centre, strict=True)), indexing="ij")
    wide = max(2 * radius / PARTS, 1.0)
    cells = np.floor((y + radius) / wide) * 2**20 + np.floor((x + radius) / wide)
    inside = y**2 + x**2 <= radius**2
    names, where, counts = np.unique(cells[inside], return_inverse=True, return_counts=True)
    shares = np.zeros((y.size, len(names)))
    shares[np.flatnonzero(inside), where] = 1 / counts[where]
    kept = shares[:, counts >= counts.max() / 2]  # slivers at the rim have more noise than image
    return kept, kept.T @ np.stack([y.ravel(), x.ravel()], -1)


def agreement(images: np.ndarray, shifts: np.ndarray, step: Sequence[float]) -> np.ndarray:
    """(2, angle) power of the sum of images that are shifted back, at ANGLES, as they are and flipped along x, in units
    of their own.

    images: (row, column, part), what parts of the disc see over the scan. shifts: (part, 2) [nm] of them along the
    detector's y and x.
    """
    rows, columns = (slice(max(0, (size - WITHIN) // 2), (size + WITHIN) // 2) for size in images.shape[:2])
    images = _flat(images[None, rows, columns])[0]
    wide = [2 * size for size in images.shape[:2]]  # what leaves one side does not come in at the other
    spectra = np.fft.fft2(images, wide, axes=(0, 1)).astype(np.complex64)
    waves = [np.fft.fftfreq(size, length)[:, None] for size, length in zip(wide, step, strict=True)]
    power = np.zeros((2, len(ANGLES)))
    for k, flip in enumerate(("none", "x")):
        for n, angle in enumerate(ANGLES):
            back = shifts @ (turn(angle) @ FLIPS[flip])
            y, x = (np.exp(-2j * np.pi * wave * back[:, axis]).astype(np.complex64) for axis, wave in enumerate(waves))
            power[k, n] = (np.abs(np.einsum("yxs,ys,xs->yx", spectra, y, x, optimize=False)) ** 2).sum()
    return power / max(float((np.abs(spectra) ** 2).sum()), 1e-30)


def orient_defocused(power: np.ndarray, rotation: float | None = None, flip: str | None = None) -> Orientation:
    """The turn and the flip of a scan out of focus, or whichever of them is not given. power: (tilt, 2, angle), of
    `agreement`."""
    whole = power.sum(0)
    flips = [flip] if flip else ["none", "x"] if rotation is None else list(FLIPS)
    found = []
    for name in flips:
        row, offset = int(name != "none"), OFFSETS.get(name, 0.0)
        angle = _peak(whole[row]) - offset if rotation is None else rotation
        found.append((_power(whole[row], angle + offset), angle, name))
    best, angle, name = max(found)
    row, seen = int(name != "none"), angle + OFFSETS.get(name, 0.0)
    other = _peak(whole[1 - row])
    each = _power(power[:, row], seen)
    left = np.array([_peak(whole[row] - one[row]) for one in power])
    off = (left - seen + 180) % 360 - 180
    misfit, mirrored = (float(min(1.0, len(power) / at)) for at in (best, _power(whole[1 - row], other)))
    return Orientation(_within(angle, rotation), name, 0.0 if rotation is not None else _jackknife(off), "parallax",
                       misfit, mirrored, _sure(each - _power(power[:, row], seen + 180)),
                       _sure(each - _power(power[:, 1 - row], other)))


def _power(power: np.ndarray, angle: float) -> Any:
    """Of (..., angle), at any angle [deg], between the two beside it."""
    place = angle % 360 / (360 / len(ANGLES))
    first, share = int(place), place % 1
    return (1 - share) * power[..., first % len(ANGLES)] + share * power[..., (first + 1) % len(ANGLES)]


def _peak(power: np.ndarray) -> float:
    """The angle [deg] of the highest of (angle,), between samples by a parabola."""
    n = int(np.argmax(power))
    before, at, after = (power[(n + k) % len(power)] for k in (-1, 0, 1))
    bend = before - 2 * at + after
    return float(ANGLES[n] + (0.5 * (before - after) / bend if bend < 0 else 0.0) * 360 / len(ANGLES))


def orient(fields: np.ndarray, bright: np.ndarray, step: Sequence[float], rotation: float | None = None,
           flip: str | None = None) -> Orientation:
    """The turn and the flip of a scan, or whichever of them is not given.

    fields: (tilt, row, column, 2) centres of mass, along qy and qx. bright: (tilt, row, column) electrons in the disc.
    step: [nm] of the scan, along y and x. Of all flips, x alone is tried where the rotation is free: the others are it
    and a turn.
    """
    if min(fields.shape[1:3]) < FEWEST:
        raise DataError(f"a scan of {fields.shape[1]} x {fields.shape[2]} probes is too small to find its rotation; "
                        "give rotation and flip")
    level = _flat(bright[..., None])[..., 0]
    measured = [_measure(_flat(fields), level, step, width) for width in WIDTHS]
    found = [_best(each, rotation, flip) for each in measured]
    return min(found, key=lambda each: each.misfit)


@dataclass(frozen=True)
class _Measured:
    """slopes: (block, place, 2, 2) derivatives along y and x of the field's qy and qx. inner: (block, 2, 2) sums of
    the field's components times the slopes of what the disc has lost."""

    slopes: list[np.ndarray]
    inner: np.ndarray


def _flat(fields: np.ndarray) -> np.ndarray:
    """Each tilt's field without its plane: the scan moves the beam on the detector a little."""
    rows, columns = fields.shape[1:3]
    y, x = (axis.ravel() for axis in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    design = np.stack([np.ones(y.size), y - y.mean(), x - x.mean()], 1)
    values = fields.reshape(len(fields), -1, fields.shape[-1])
    return (values - design @ (np.linalg.pinv(design) @ values)).reshape(fields.shape)


def _measure(fields: np.ndarray, bright: np.ndarray, step: Sequence[float], width: float) -> _Measured:
    """Sums over bands of rows of every tilt, without the scan's edge."""
    def smoothed(values: np.ndarray, order: tuple[int, int]) -> np.ndarray:
        axes = (0, *order) + (0,) * (values.ndim - 3)
        sigma = (0, width, width) + (0,) * (values.ndim - 3)
        return ndimage.gaussian_filter(values, sigma, axes, mode="nearest")[:, 1:-1, 1:-1]

    slopes = np.stack([smoothed(fields, order) / length
                       for order, length in zip(((1, 0), (0, 1)), step, strict=True)], -2)
    dark = np.stack([smoothed(-bright, order) / length
                     for order, length in zip(((1, 0), (0, 1)), step, strict=True)], -1)
    inner = smoothed(fields, (0, 0))[..., :, None] * dark[..., None, :]
    bands = min(BANDS, slopes.shape[1])
    blocks = [part.reshape(-1, 2, 2) for part in np.array_split(slopes, bands, 1) for part in part]
    return _Measured(blocks, np.array([part.sum((0, 1)) for part in np.array_split(inner, bands, 1) for part in part]))


def _curls(measured: _Measured, flip: str) -> np.ndarray:
    """(block, 2, 2) the form whose value at (cosine, sine) of a rotation is the sum of squared curls under a flip."""
    forms = []
    for slopes in measured.slopes:
        # v = M^T c in the scan's frame; curl v = d_y v_x - d_x v_y, at rotations by 0 and by 90 degrees.
        turned = [slopes @ (turn(angle) @ FLIPS[flip]) for angle in (0.0, 90.0)]
        curl = np.stack([each[:, 0, 1] - each[:, 1, 0] for each in turned])
        forms.append(curl @ curl.T)
    return np.array(forms)


def _lowest(form: np.ndarray) -> tuple[float, float]:
    """The angle [deg], within half a turn, at which a form is lowest, and its curl to divergence."""
    values, vectors = np.linalg.eigh(form)
    return float(np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0]))), _ratio(values[0], values[1])


def _ratio(curl: float, divergence: float) -> float:
    return float(np.sqrt(max(curl, 0.0) / divergence)) if divergence > 0 else 1.0


def _at(form: np.ndarray, angle: float) -> Any:
    """Squared curl of a form (..., 2, 2) at an angle; squared divergence is that of a quarter turn more."""
    vector = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    return vector @ form @ vector


def _best(measured: _Measured, rotation: float | None, flip: str | None) -> Orientation:
    flips = [flip] if flip else ["none", "x"] if rotation is None else list(FLIPS)
    forms = {name: _curls(measured, name) for name in {*flips, "none", "x"}}
    found = []
    for name in flips:
        whole = forms[name].sum(0)
        angle = _lowest(whole)[0] if rotation is None else rotation
        for half in (angle, angle + 180) if rotation is None else (angle,):
            ratio = _ratio(_at(whole, half), _at(whole, half + 90))
            found.append((ratio, -_sure(_signs(measured, half, name)), half, name))
    positive = [each for each in found if each[1] < 0] or found
    ratio, sign, angle, name = min(positive)
    mirrored = "x" if np.linalg.det(FLIPS[name]) > 0 else "none"
    other, flipped = _lowest(forms[mirrored].sum(0))
    hand = _sure(_at(forms[mirrored], other) - _at(forms[name], angle))
    return Orientation(_within(angle, rotation), name, 0.0 if rotation is not None else _error(forms[name]),
                       "deflection", ratio, flipped, -sign, hand)


def _signs(measured: _Measured, angle: float, flip: str) -> np.ndarray:
    """(block,) whether the field points to where the disc is darker."""
    found: np.ndarray = np.einsum("bij,ij->b", measured.inner, turn(angle) @ FLIPS[flip])
    return found


def _sure(values: np.ndarray) -> float:
    """How many standard errors the sum of values is above 0; of a single one, which has none, SURE."""
    spread = values.std(ddof=1) * np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.sum() / spread) if spread > 0 else float(np.sign(values.sum()) * SURE)


def _error(forms: np.ndarray) -> float:
    """[deg] of the rotation, by leaving each block out."""
    whole = forms.sum(0)
    centre = _lowest(whole)[0]
    angles = np.array([_lowest(whole - form)[0] for form in forms])
    return _jackknife((angles - centre + 90) % 180 - 90)


def _jackknife(off: np.ndarray) -> float:
    """Standard error of what changes by `off` as one part after the other is left out; 0 of a single part."""
    return float(np.sqrt((len(off) - 1) / len(off) * ((off - off.mean()) ** 2).sum()))


def _within(angle: float, given: float | None) -> float:
    """[deg] between -180 and 180, where it was found."""
    return float((angle + 180) % 360 - 180) if given is None else given
