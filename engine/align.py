"""Alignment of a tilt series: where each image lies, and how the specimen was turned when it was taken.

An image is the projection of one volume, turned about the beam by `inplane` and shifted; the specimen may have been
turned a little more than the stage says about the tilt axis, `tilt`, and about the axis across it, `azimuth`:

    I = shift . turn_z(inplane) . projection of turn_y(azimuth) turn_x(angle + tilt) V

`joint` goes back and forth between the volume and these five numbers of each image, coarse to fine (Romanov et al.,
Multi-slice electron ptychographic tomography, section 2.2). The volume is never resampled: shifts and turns about the
beam are undone on the images, and how projections change with each of the five follows from the projection of the
volume and of the volume times its height, so that a Gauss-Newton step costs three projections.

No image tells of what a turned and shifted volume would show as well: that part, the gauge, is left to the volume.
Lengths in pixels, angles in degrees. Turns are those of `engine.euler`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from engine.data import DataError
from engine.euler import euler, matrix
from engine.projector import Geometry, backproject, project

FREE = {"shift": (0, 1), "inplane": (2,), "tilt": (3,), "azimuth": (4,)}  # what a level may find, and its columns
ALONG = {"y": (0,), "x": (1,)}  # or of the shift one component
AXIS = "axis"  # and the turn about the beam that all images share: how the tilt axis lies on the detector
LEAST = 1e-3  # voxel lengths: rays and voxels that meet less than that are left alone
FARTHEST = 1.0  # [pixel of a level] that an image moves in a round, or its edge by a turn
MOMENTUM = 0.8  # share of a round's change that the next one begins with: a volume gives way slowly
DAMPING = 1e-3  # of each number, in what an image tells of the one it tells most of


@dataclass(frozen=True)
class Alignment:
    """shifts: (tilt, 2), y and x [pixel] by which an image lies from where the tilt axis is its middle. inplane, tilt,
    azimuth: (tilt,) [deg] of turns beyond the nominal angle, about the beam, the tilt axis and the axis across it."""

    shifts: np.ndarray
    inplane: np.ndarray
    tilt: np.ndarray
    azimuth: np.ndarray

    @classmethod
    def none(cls, tilts: int) -> Alignment:
        """Images as they are."""
        return cls(np.zeros((tilts, 2)), *(np.zeros(tilts) for _ in range(3)))

    def less(self, other: Alignment) -> Alignment:
        """Number by number."""
        return _alignment(_numbers(self) - _numbers(other))

    def plus(self, other: Alignment) -> Alignment:
        """Number by number."""
        return _alignment(_numbers(self) + _numbers(other))

    def turns(self, angles: np.ndarray) -> np.ndarray:
        """(tilt, 3) Euler angles [deg] of the specimen, where `angles` (tilt,) are the stage's."""
        found = [matrix([turn, 0, 0]) @ matrix([0, across, 0]) @ matrix([0, 0, angle + more])
                 for turn, across, angle, more in zip(self.inplane, self.azimuth, angles, self.tilt, strict=True)]
        return np.array([euler(turn) for turn in found])


@dataclass(frozen=True)
class Level:
    """A stage of `joint`. bins: pixels along an edge that become one. rounds: of a volume's steps and one alignment.
    free: of FREE and ALONG, what is found of each image, and AXIS."""

    bins: int
    rounds: int
    free: tuple[str, ...] = ("shift",)


@dataclass(frozen=True)
class Settings:
    """Numbers of a joint alignment.

    levels: coarse to fine. steps: of the volume between two alignments. clip: share of an image's maximum below which
    it is set to 0, as the paper's 0.4 in coarse levels: it makes outlines plain, and is of no use for turns. blur:
    [voxel of the level] of the Gaussian that a volume is made of, which keeps it from frequencies that no image holds,
    the paper's 0.5 at full size; 0 for none. extent: depth and width of the volume, in heights of an image: more width
    where a specimen leaves the field, less depth where it is thin.
    """

    levels: tuple[Level, ...] = (Level(4, 30), Level(2, 30, ("shift", "inplane")), Level(1, 20, tuple(FREE)))
    steps: int = 20
    clip: float = 0.0
    blur: float = 0.0
    extent: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Joint:
    """What `joint` found. volume: (z, y, x) at the finest level. residual, before: (tilt,) root mean square difference
    of an image and its projection, relative to the image's, with this alignment and with the one it began with."""

    alignment: Alignment
    volume: np.ndarray
    residual: np.ndarray
    before: np.ndarray


def joint(images: np.ndarray, angles: np.ndarray, settings: Settings, start: Alignment | None = None, *,
          observe: Callable[[int, int, np.ndarray], None] | None = None) -> Joint:
    """Align images (tilt, y, x), their background at 0, taken at angles (tilt,) [deg].

    start: an alignment to begin with. observe(level, round, residual) is called after each round. Raises DataError for
    images that cannot be aligned, and levels that do not fit them.
    """
    images, angles = np.asarray(images, np.float32), np.asarray(angles, np.float64)
    _checked(images, angles, settings)
    numbers, volume, before = _numbers(start or Alignment.none(len(images))), None, None
    for k, level in enumerate(settings.levels):
        told = None if observe is None else partial(observe, k)
        numbers, volume, first, residual = _at_level(images, np.radians(angles), level, settings, numbers, volume, told)
        before = first if before is None else before
    assert volume is not None and before is not None
    return Joint(_alignment(numbers), volume, residual, before)


def applied(images: np.ndarray, alignment: Alignment) -> tuple[np.ndarray, np.ndarray]:
    """Images (tilt, y, x) with their shifts and turns about the beam undone, once, by cubic splines; and 1 where a
    pixel was measured, 0 where it comes from beyond the edge."""
    filtered = np.stack([ndimage.spline_filter(image, output=np.float32) for image in np.asarray(images, np.float32)])
    return _undone(filtered, _numbers(alignment))


def reconstructed(images: np.ndarray, angles: np.ndarray, alignment: Alignment, *, rounds: int = 20, steps: int = 5,
                  blur: float = 0.0, start: np.ndarray | None = None, window: np.ndarray | None = None,
                  extent: tuple[float, float] = (1.0, 1.0),
                  observe: Callable[[int, np.ndarray], None] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The volume (z, y, x) of images (tilt, y, x) as they are aligned, and what they miss (tilt,), as in `Joint`.

    Accelerated non-negative SIRT in rounds of so many steps. blur: [voxel] of the Gaussian that the volume is made of.
    start: a volume of any size to begin with. window: (tilt, y, x) that aligned images are multiplied by, as with a
    mask's shadow. extent: as in `Settings`. observe(round, volume) is called after each round.
    """
    undone, seen = applied(images, alignment)
    undone = undone if window is None else undone * window
    numbers, shape = _numbers(alignment), _shape(images.shape, extent)
    volume, residual = resized(start, shape), np.zeros(len(images))
    turned = np.radians(angles) + numbers[:, 3]
    for turn in range(rounds):
        volume, _, _, residual = _advanced(volume, undone, seen, turned, numbers[:, 4], steps, blur)
        if observe is not None:
            observe(turn + 1, np.asarray(_blurred(jnp.asarray(volume), blur)))
    return np.asarray(_blurred(jnp.asarray(volume), blur)), np.asarray(residual)


def resized(volume: np.ndarray | None, shape: tuple[int, ...], sums: bool = True) -> np.ndarray:
    """A volume on other voxels of the same field; zeros where there is none. sums: of those along an axis, and so the
    projections, stay what they were; else the values do."""
    if volume is None:
        return np.zeros(shape, np.float32)
    zoomed = ndimage.zoom(volume, np.array(shape) / volume.shape, order=1, grid_mode=True, mode="nearest")
    return zoomed * np.float32(volume.shape[0] / shape[0]) if sums else zoomed


def ungauged(alignment: Alignment, angles: np.ndarray) -> tuple[Alignment, np.ndarray]:
    """The alignment less what a moved and turned volume would show as well, and that: its shift (z, y, x) [pixel] and
    its small turns about z, y and x [deg], (2, 3)."""
    numbers, shown = _numbers(alignment), gauge(np.radians(angles))
    moved, *_ = np.linalg.lstsq(shown, numbers.ravel(), rcond=None)
    rest = numbers - (shown @ moved).reshape(numbers.shape)
    return _alignment(rest), np.stack([moved[:3], np.degrees(moved[3:])])


def gauge(angles: np.ndarray) -> np.ndarray:
    """(5 tilts, 6): the five numbers of each image, in pixels and rad, that show a unit shift of the volume along z, y
    and x, and a unit turn of it about z, y and x. angles: (tilt,) [rad]."""
    small, shown = 1e-4, np.zeros((len(angles), 5, 6))
    for t, angle in enumerate(np.degrees(angles)):
        turn = matrix([0, 0, angle])
        shown[t, :2, :3] = turn[1:]
        for k in range(3):
            change = turn @ matrix(np.degrees(small) * np.eye(3)[k]) @ turn.T
            shown[t, 2:, 3 + k] = np.radians(euler(change))[[0, 2, 1]] / small  # z, x, y: inplane, tilt, azimuth
    return shown.reshape(-1, 6)


def _checked(images: np.ndarray, angles: np.ndarray, settings: Settings) -> None:
    if images.ndim != 3 or angles.shape != (len(images),) or len(images) < 2:
        raise DataError(f"images of shape {images.shape} and {angles.size} angles cannot be aligned; (tilt, y, x) with "
                        "two tilts or more and an angle for each are needed")
    if not np.isfinite(images).all():
        raise DataError("an image has pixels that are NaN or infinite; repair it, or leave its tilt out")
    dark = [t for t, image in enumerate(images) if not image.any()]
    if dark:
        raise DataError(f"images {dark} are 0 everywhere; leave those tilts out")
    for level in settings.levels:
        unknown = set(level.free) - {*FREE, *ALONG, AXIS}
        if unknown or level.rounds < 1 or not 1 <= level.bins <= min(images.shape[1:]) // 4:
            raise DataError(f"a level of {level.bins} pixels in one, {level.rounds} rounds and free {level.free} does "
                            f"not fit images of {images.shape[1]} x {images.shape[2]}: at least 4 x 4 are to remain, "
                            f"and free is of {', '.join([*FREE, *ALONG, AXIS])}")
    if not settings.levels:
        raise DataError("an alignment has no levels; give one or more")


def _numbers(alignment: Alignment) -> np.ndarray:
    """(tilt, 5): shift y, x [pixel], inplane, tilt, azimuth [rad]."""
    turns = np.radians([alignment.inplane, alignment.tilt, alignment.azimuth])
    return np.concatenate([alignment.shifts, turns.T], 1)


def _alignment(numbers: np.ndarray) -> Alignment:
    return Alignment(numbers[:, :2].copy(), *np.degrees(numbers[:, 2:].T))


def binned(images: np.ndarray, bins: int) -> np.ndarray:
    """Means of squares of so many pixels, (tilt, y // bins, x // bins), about the images' middle."""
    if bins == 1:
        return images
    tilts, ny, nx = images.shape
    my, mx = ny // bins, nx // bins
    y, x = (ny - my * bins) // 2, (nx - mx * bins) // 2
    cut = images[:, y:y + my * bins, x:x + mx * bins]
    return cut.reshape(tilts, my, bins, mx, bins).mean((2, 4))


def _at_level(images: np.ndarray, angles: np.ndarray, level: Level, settings: Settings, numbers: np.ndarray,
              volume: np.ndarray | None, observe: Callable | None) -> tuple[Any, ...]:
    """Numbers, the volume in the level's own pixels, and residuals before and after."""
    small = binned(images, level.bins)
    if settings.clip > 0:
        small = np.where(small < settings.clip * small.max((1, 2), keepdims=True), 0, small)
    filtered = np.stack([ndimage.spline_filter(image, output=np.float32) for image in small])
    scale = np.array([level.bins, level.bins, 1, 1, 1])
    numbers, shape = numbers / scale, _shape(small.shape, settings.extent)
    volume = resized(volume, shape)
    columns = sorted({c for name, those in {**FREE, **ALONG}.items() if name in level.free for c in those})
    common, shared = _shown(angles, columns), FREE["inplane"] if AXIS in level.free else ()
    before: Any = None
    change = np.zeros_like(numbers)
    # The first volume of a level is made before anything moves: an empty one tells of no place.
    for turn in range(level.rounds + 1):
        undone, seen = _undone(filtered, numbers)
        volume, normal, right, residual = _advanced(volume, undone, seen, angles + numbers[:, 3], numbers[:, 4],
                                                    settings.steps * (1 if turn else 3), settings.blur)
        if before is None:
            before = np.asarray(residual)
            continue
        change = MOMENTUM * change + _newton(np.asarray(normal, np.float64), np.asarray(right, np.float64), columns,
                                             shared, small.shape[1:])
        change -= (common @ change.ravel()).reshape(change.shape)
        numbers = _moved(numbers, change)
        if observe is not None:
            observe(turn, np.asarray(residual))
    return numbers * scale, np.asarray(_blurred(jnp.asarray(volume), settings.blur)), before, np.asarray(residual)


def _shown(angles: np.ndarray, columns: list[int]) -> np.ndarray:
    """(5 tilts, 5 tilts) projection on the part of changes in `columns` that a moved volume shows as well."""
    shown, fixed = gauge(angles), np.setdiff1d(np.arange(5), columns)
    held = shown.reshape(-1, 5, 6)[:, fixed].reshape(-1, 6)
    # What changes none of the numbers that are held.
    _, sizes, ways = np.linalg.svd(held, full_matrices=True) if len(held) else (None, np.zeros(0), np.eye(6))
    rank = int((sizes > 1e-6).sum())
    basis = shown @ ways[rank:].T
    return basis @ np.linalg.pinv(basis) if basis.size else np.zeros((len(shown), len(shown)))


def _newton(normal: np.ndarray, right: np.ndarray, columns: list[int], shared: tuple[int, ...],
            shape: tuple[int, ...]) -> np.ndarray:
    """(tilt, 5) damped Gauss-Newton steps of the free numbers, none farther than FARTHEST at an image's edge.

    shared: a column that is one number for all images, found beside what each has of its own.
    """
    reach = np.array([1, 1, max(shape) / 2, max(shape) / 2, max(shape) / 2])  # pixels that an edge moves by a unit
    normal, right, change = normal / np.outer(reach, reach), right / reach, np.zeros_like(right)
    own = [c for c in columns if c not in shared]
    inverse = [_damped_inverse(each[np.ix_(own, own)]) for each in normal]
    for c in shared:
        # What is left for the one number where every image's own numbers follow it.
        rest = [each[c, c] - each[c, own] @ inv @ each[own, c] for each, inv in zip(normal, inverse, strict=True)]
        wanted = [r[c] - each[c, own] @ inv @ r[own] for each, inv, r in zip(normal, inverse, right, strict=True)]
        step = sum(wanted) / (sum(rest) + DAMPING * normal[:, c, c].sum() + 1e-30)
        change[:, c] = np.clip(step, -FARTHEST, FARTHEST)
        right = right - normal[:, :, c] * change[:, [c]]
    for t, inv in enumerate(inverse):
        change[t, own] = np.clip(inv @ right[t][own], -FARTHEST, FARTHEST)
    return change / reach


def _damped_inverse(normal: np.ndarray) -> np.ndarray:
    damping = DAMPING * np.trace(normal) / max(1, len(normal)) + 1e-30
    return np.linalg.inv(normal + damping * np.eye(len(normal)))


def _shape(images: tuple[int, ...], extent: tuple[float, float]) -> tuple[int, int, int]:
    """(z, y, x) voxels of the volume of images (tilt, y, x)."""
    depth, width = (max(1, round(part * images[1])) for part in extent)
    return depth, width, images[2]


def _moved(numbers: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Numbers after a change that was found on images whose shifts and turns had been undone."""
    cos, sin = np.cos(numbers[:, 2]), np.sin(numbers[:, 2])
    y, x = change[:, 0] * cos - change[:, 1] * sin, change[:, 0] * sin + change[:, 1] * cos
    return numbers + np.column_stack([y, x, change[:, 2:]])


def _undone(filtered: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images of spline coefficients (tilt, y, x) with shifts and turns about the beam undone, and where they are."""
    shape = np.array(filtered.shape[1:])
    middle, pixels = (shape - 1) / 2, np.indices(filtered.shape[1:]).reshape(2, -1)
    images, seen = np.empty_like(filtered), np.empty_like(filtered)
    for t, (y, x, turn, *_) in enumerate(numbers):
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        offset = middle + [y, x] - rotation @ middle
        images[t] = ndimage.affine_transform(filtered[t], rotation, offset, mode="nearest", prefilter=False)
        places = rotation @ pixels + offset[:, None]
        seen[t] = ((places > -0.5) & (places < shape[:, None] - 0.5)).all(0).reshape(shape)
    return images, seen


@partial(jax.jit, static_argnames=("blur",))
def _advanced(volume: jax.Array, images: jax.Array, seen: jax.Array, angles: jax.Array, azimuth: jax.Array,
              steps: int, blur: float) -> tuple[jax.Array, ...]:
    """What the volume is made of after steps toward the images, and what each image tells of its five numbers: normal
    matrices (tilt, 5, 5), right sides (tilt, 5) and residuals (tilt,)."""
    (nz, ny, _), pixels = volume.shape, images.shape[1]
    rays = Geometry(jnp.asarray(angles, jnp.float32), jnp.ones(len(angles), jnp.float32))
    azimuth = jnp.asarray(azimuth, jnp.float32)[:, None, None]
    rows, columns = project(jnp.ones_like(volume), rays, pixels), backproject(seen, rays, nz, ny)
    rows, columns = (jnp.where(a > LEAST, 1 / jnp.maximum(a, LEAST), 0) for a in (rows, columns))
    heights = jnp.arange(nz) - (nz - 1) / 2, jnp.arange(ny) - (ny - 1) / 2
    heights = heights[0][:, None, None], heights[1][:, None]

    def depth(volume: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The projections, and those of the volume times its height along the beam."""
        each = project(jnp.stack([volume, heights[0] * volume, heights[1] * volume]), rays, pixels)
        cos, sin = (f(rays.angles)[:, None, None] for f in (jnp.cos, jnp.sin))
        return each[0], cos * each[1] - sin * each[2]

    _, moment = depth(_blurred(volume, blur))
    data = images - azimuth * _slope(moment, 2)

    def step(_: int, at: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, ahead, t = at
        misfit = rows * seen * (data - project(_blurred(ahead, blur), rays, pixels))
        new = jnp.maximum(ahead + columns * _blurred(backproject(misfit, rays, nz, ny), blur), 0)
        later = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        return new, new + (t - 1) / later * (new - x), later

    volume = jax.lax.fori_loop(0, steps, step, (volume, volume, jnp.float32(1)))[0]
    shown, moment = depth(_blurred(volume, blur))
    y, x = (jnp.arange(n) - (n - 1) / 2 for n in shown.shape[1:])
    along_y, along_x = _slope(shown, 1), _slope(shown, 2)
    misfit = seen * (images - shown - azimuth * _slope(moment, 2))
    slopes = seen * jnp.stack([-along_y, -along_x, x * along_y - y[:, None] * along_x, -_slope(moment, 1),
                               _slope(moment, 2)])
    normal = jnp.einsum("ityx,jtyx->tij", slopes, slopes)
    residual = jnp.sqrt((misfit**2).sum((1, 2)) / (seen * images**2).sum((1, 2)))
    return volume, normal, jnp.einsum("ityx,tyx->ti", slopes, misfit), residual


def _slope(images: jax.Array, axis: int) -> jax.Array:
    """Central differences along an axis, one-sided at its ends."""
    return jnp.asarray(jnp.gradient(images, axis=axis))


def _blurred(volume: jax.Array, sigma: float) -> jax.Array:
    """The volume smoothed by a Gaussian [voxel], as if it went on at its ends as it began; with 0 as it is."""
    if sigma == 0:
        return volume
    for axis, size in enumerate(volume.shape):
        q = jnp.asarray(np.fft.rfftfreq(size), jnp.float32)
        window = jnp.exp(-2 * (jnp.pi * sigma * q) ** 2).reshape([-1 if a == axis else 1 for a in range(3)])
        volume = jnp.fft.irfft(jnp.fft.rfft(volume, axis=axis) * window, n=size, axis=axis)
    return volume
