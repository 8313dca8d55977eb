"""A 4D-STEM tilt series out of the files of a microscope, one of each tilt, into a group of `engine.archives`.

Two passes read the files, a few rows of the scan at a time. The first finds the bright disc; the second cuts the
detector about it, adds pixels up and writes what is left, and measures what tells the scan's turn on the detector.
Patterns are never resampled: the volume lies in the detector's frame, into which the positions of the probes and the
tilt axis are turned. Imports without JAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine import archives, orientation
from engine.data import DataError
from engine.euler import about, euler, matrix
from engine.orientation import STEADY, SURE, Orientation
from engine.physics import wavelength
from engine.stacks import AXES, Misfit, Stack, stack

SAMPLE = 8  # rows and columns of the scan that a survey looks at
RIM = 1.05  # of the disc's radius; what is within is the disc's
BLURRED = 1.5  # a defocused probe's radius, in those of the focused one, from which images of the disc's parts are told
OVERHANG = 1 / 32  # of a window, which may lie beyond the detector, as pixels that are dark
VACUUM = 10  # one probe in so many, those with most electrons, is taken to miss the specimen


@dataclass(frozen=True)
class Recipe:
    """What a series is made of. files: one of each tilt.

    axes: of the arrays, in their order, of scan_y, scan_x, qy, qx; or scan, with all rows, whose (rows, columns) is
    scan_shape. angles: (tilt,) [deg] about an axis at `tilt_axis` [deg] from the scan's x toward y; positive ones turn
    +z toward what lies 90 degrees further. step: (y, x) [nm] of the scan. optics: the fields of `engine.multislice`'s.
    scale: [mrad] of a pixel, centre: (qy, qx) [pixels] of the disc, both found on the mean pattern if None.
    dark: counts of a pixel without electrons; if given, what is below it is 0. gain: counts of an electron.
    electrons: of a probe, found if None. rotation, flip: `engine.orientation`'s, found if None.
    rows, columns: of the scan that are used. crop: pixels that are kept along an edge, about the disc; bins: of them
    that are added up to one, along an edge.
    """

    files: Sequence[Path]
    angles: np.ndarray
    step: tuple[float, float]
    optics: dict[str, float]
    key: str | None = None
    axes: Sequence[str] = AXES
    scan_shape: tuple[int, int] | None = None
    tilt_axis: float = 0.0
    scale: float | None = None
    centre: Sequence[float] | None = None
    dark: float | None = None
    gain: float = 1.0
    electrons: float | None = None
    rotation: float | None = None
    flip: str | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    crop: int | None = None
    bins: int = 1

    @property
    def plain(self) -> bool:
        """Whether counts are electrons as they stand."""
        return self.dark is None and self.gain == 1

    @contextmanager
    def opened(self, tilt: int) -> Iterator[Stack]:
        """The patterns of a tilt."""
        with stack(self.files[tilt], self.key, self.axes, self.scan_shape) as found:
            yield found


@dataclass(frozen=True)
class Survey:
    """What a series will be. scan: rows and columns that are used. detector: its pixels along qy and qx, of `kind`.

    size: pixels of a pattern along an edge. centre, radius: of the disc [pixels of the detector]. scale: [mrad] of a
    pixel of the detector. pixel: [nm] of the field.
    """

    tilts: int
    scan: tuple[int, int]
    detector: tuple[int, int]
    kind: np.dtype
    size: int
    centre: np.ndarray
    radius: float
    scale: float
    pixel: float


def survey(recipe: Recipe) -> Survey:
    """What the series will be, from the files' shapes and a few patterns of the first; raises Misfit."""
    shapes = []
    for tilt, path in enumerate(recipe.files):
        with recipe.opened(tilt) as opened:
            shapes.append(opened.shape)
        if shapes[-1] != shapes[0]:
            raise Misfit("files", f"{path}: has the shape {shapes[-1]} (scan_y, scan_x, qy, qx), and "
                                  f"{recipe.files[0].name} {shapes[0]}; all tilts need the same")
    if len(recipe.angles) != len(recipe.files):
        raise Misfit("angles", f"{len(recipe.angles)} angles for {len(recipe.files)} files, from "
                               f"{recipe.files[0].name} to {recipe.files[-1].name}; give one for each")
    for name, part, size in (("y", recipe.rows, shapes[0][0]), ("x", recipe.columns, shapes[0][1])):
        if (part.stop or size) > size:
            raise Misfit("scan_crop", f"{recipe.files[0]}: has {size} probes along {name}, not {part.stop}")
    with recipe.opened(0) as opened:
        return _surveyed(recipe, opened, _sampled(recipe, opened))


def bring(recipe: Recipe, path: str | Path) -> None:
    """Write the series to a group, if none is there; what was found is in its attribute `found`, doubts in `doubts`."""
    survey(recipe)
    means = [_mean(recipe, tilt) for tilt in range(len(recipe.files))]
    with recipe.opened(0) as opened:
        known = _surveyed(recipe, opened, np.mean(means, 0))
    centres = [_disc(recipe, mean)[0] for mean in means]
    probes = known.scan[0] * known.scan[1]
    kept, sums = np.zeros((len(means), probes)), np.zeros((len(means), probes, 4))
    height, power = _height(recipe, known), []
    shape = (known.tilts, probes, known.size, known.size)
    with archives.created(path, shape, _kind(recipe, known.kind), over=False) as writer:
        for tilt, centre in enumerate(centres):
            first = _window(recipe, known, centre)
            parts, places = orientation.parts(known.detector, centre, known.radius)
            weights, images = _weights(known, centre), np.zeros((probes, len(places)))
            for done, patterns in _patterns(recipe, tilt):
                part = slice(done, done + len(patterns))
                cut = _binned(patterns, first, known.size, recipe.bins)
                writer.patterns[tilt, part] = cut.astype(writer.patterns.dtype)
                kept[tilt, part] = cut.sum((1, 2))
                flat = patterns.reshape(len(patterns), -1).astype(np.float64)
                sums[tilt, part], images[part] = flat @ weights, flat @ parts
            if height is not None:
                power.append(orientation.agreement(images.reshape(*known.scan, -1), height * places, recipe.step))
        lies, doubts = _orientation(recipe, known, sums, np.array(power))
        electrons = recipe.electrons or _vacuum(kept)
        writer.add("positions", _positions(recipe, known, lies.matrix))
        writer.add("angles", _angles(recipe, lies.matrix))
        writer.describe({"pixel_nm": known.pixel, "electrons": electrons, "optics": recipe.optics,
                         "doubts": doubts, "found": _found(known, centres, lies, electrons)})


def _patterns(recipe: Recipe, tilt: int) -> Iterator[tuple[int, np.ndarray]]:
    """The patterns of a tilt in electrons, a few at a time, and the number of the first."""
    with recipe.opened(tilt) as opened:
        for done, patterns in opened.pieces(recipe.rows, recipe.columns):
            if recipe.plain and patterns.dtype.kind == "u":
                yield done, patterns
                continue
            found = patterns.astype(np.float64) - (recipe.dark or 0.0)
            if not np.isfinite(found).all():
                raise DataError(f"{opened.path}: patterns are NaN or infinite; repair that tilt or leave it out")
            if found.min() < 0 and recipe.dark is None:
                raise DataError(f"{opened.path}: patterns are counts and cannot be negative (minimum "
                                f"{found.min():g}); give dark, the counts of a pixel without electrons")
            yield done, np.maximum(found, 0) / recipe.gain


def _kind(recipe: Recipe, kind: np.dtype) -> np.dtype:
    """That holds the sum of bins: of whole numbers the smallest unsigned."""
    if not recipe.plain or kind.kind not in "iub":
        return np.dtype(np.float32)
    most = 1 if kind.kind == "b" else int(np.iinfo(kind).max)
    return np.min_scalar_type(min(most * recipe.bins**2, 2**64 - 1))


def _mean(recipe: Recipe, tilt: int) -> np.ndarray:
    """(qy, qx) of a tilt."""
    total, count = 0.0, 0
    for _, patterns in _patterns(recipe, tilt):
        total, count = total + patterns.sum(0, dtype=np.float64), count + len(patterns)
    return np.asarray(total / count)


def _sampled(recipe: Recipe, opened: Stack) -> np.ndarray:
    """The mean of a few patterns, spread over the scan."""
    at = [[int(k) for k in np.unique(np.linspace(part[0], part[-1], SAMPLE).round())]
          for part in (range(opened.shape[0])[recipe.rows], range(opened.shape[1])[recipe.columns])]
    mean = np.mean([opened.rows(y, y + 1, slice(x, x + 1))[0, 0] for y in at[0] for x in at[1]], 0)
    return np.maximum(mean - (recipe.dark or 0.0), 0)


def _surveyed(recipe: Recipe, opened: Stack, mean: np.ndarray) -> Survey:
    """From the mean pattern of a series."""
    detector, kept = opened.shape[2:], recipe.crop or min(opened.shape[2:])
    if kept > min(detector) or recipe.bins > kept:
        raise Misfit("crop", f"patterns of {detector[0]} x {detector[1]} pixels cannot be cropped to {kept} and binned "
                             f"by {recipe.bins}")
    size = kept // recipe.bins
    centre, radius = _disc(recipe, mean)
    scale = recipe.scale or recipe.optics["aperture"] / radius
    scan = (len(range(opened.shape[0])[recipe.rows]), len(range(opened.shape[1])[recipe.columns]))
    known = Survey(len(recipe.files), scan, detector, opened.array.dtype, size, centre, radius, scale,
                   wavelength(recipe.optics["voltage"]) / (size * recipe.bins * scale * 1e-3))
    if recipe.optics["aperture"] >= scale * size * recipe.bins / 2:
        raise Misfit("crop", f"an aperture of {recipe.optics['aperture']:g} mrad does not fit on "
                             f"{size * recipe.bins} pixels of {scale:.3g} mrad; keep more of them, or check scale")
    _window(recipe, known, centre)
    unknown = next((name for name in ("rotation", "flip") if getattr(recipe, name) is None), None)
    if unknown and min(scan) < orientation.FEWEST and _height(recipe, known) is None:
        raise Misfit(unknown, f"a scan in focus of {scan[0]} x {scan[1]} probes is too small to find it; give it")
    # At any turn the probe that is farthest out lies at least so far along y or x.
    far = np.hypot(*_ends(recipe, known)) / np.sqrt(2) if recipe.rotation is None else np.abs(
        _positions(recipe, known, orientation.turn(recipe.rotation) @ orientation.FLIPS[recipe.flip or "none"])).max()
    _check_field(known, float(far))
    return known


def _check_field(known: Survey, far: float) -> None:
    width = known.size * known.pixel
    if far > width / 2 * (1 + 1e-6):
        raise Misfit("scan_crop", f"a probe lies {far:.3g} nm from the scan's centre, and pixels so coarse have a "
                                  f"field {width:.3g} nm wide; use fewer bins, or give scan_crop")


def _disc(recipe: Recipe, mean: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre and radius [pixels] of the disc, as far as they are not known."""
    radius = None if recipe.scale is None else recipe.optics["aperture"] / recipe.scale
    if recipe.centre is not None and radius is not None:
        return np.asarray(recipe.centre, np.float64), radius
    try:
        centre, found = orientation.disc(mean)
    except DataError as error:
        raise Misfit("centre" if recipe.centre is None else "scale", f"{recipe.files[0]}: {error}") from None
    return np.asarray(centre if recipe.centre is None else recipe.centre, np.float64), radius or found


def _window(recipe: Recipe, known: Survey, centre: np.ndarray) -> tuple[int, int]:
    """The first pixel of the detector along qy and qx, so that frequency 0 comes to lie at size // 2."""
    middle = recipe.bins * (known.size // 2) + (recipe.bins - 1) / 2
    wide = known.size * recipe.bins
    first = [int(np.ceil(at - middle - 0.5 - 1e-9)) for at in centre]
    beyond = max(max(-at, at + wide - edge) for at, edge in zip(first, known.detector, strict=True))
    if beyond > max(1, OVERHANG * wide):
        raise Misfit("crop", f"the bright disc lies about pixel ({centre[0]:.1f}, {centre[1]:.1f}) of "
                             f"{known.detector[0]} x {known.detector[1]}, and {wide} pixels about it end {beyond} "
                             f"beyond the detector; write crop: {max(wide - 2 * beyond, 1)}, or check centre")
    return first[0], first[1]


def _binned(patterns: np.ndarray, first: tuple[int, int], size: int, bins: int) -> np.ndarray:
    """(probe, size, size) of (probe, qy, qx): sums of bins x bins pixels; what lies beyond the detector is dark."""
    wide = size * bins
    if min(first) < 0 or any(at + wide > edge for at, edge in zip(first, patterns.shape[1:], strict=True)):
        reach = [(max(0, -at), max(0, at + wide - edge)) for at, edge in zip(first, patterns.shape[1:], strict=True)]
        patterns = np.pad(patterns, ((0, 0), *reach))
        first = (max(0, first[0]), max(0, first[1]))
    cut = patterns[:, first[0]:first[0] + wide, first[1]:first[1] + wide]
    kind = np.float64 if cut.dtype.kind == "f" else np.uint64
    return cut if bins == 1 else cut.reshape(len(cut), size, bins, size, bins).sum((2, 4), dtype=kind)


def _weights(known: Survey, centre: np.ndarray) -> np.ndarray:
    """(pixel, 4) whose sums over a pattern are its first moments along qy and qx, all in a circle, and in the disc."""
    y, x = (np.arange(edge) - at for edge, at in zip(known.detector, centre, strict=True))
    q2 = y[:, None] ** 2 + x**2
    reach = min(-y[0], y[-1], -x[0], x[-1]) + 0.5
    circle = q2 <= reach**2
    return np.stack([circle * y[:, None], circle * x, circle, q2 <= (RIM * known.radius) ** 2], -1).reshape(-1, 4)


def _height(recipe: Recipe, known: Survey) -> float | None:
    """[nm] by which an image moves for a pixel of the detector: of the beam over the middle of the volume.

    None where the probe is too narrow for that, in focus.
    """
    angle, depth = recipe.optics["aperture"] * 1e-3, known.size * known.pixel
    above = depth / 2 - recipe.optics["defocus"]
    sharp = 0.61 * wavelength(recipe.optics["voltage"]) / angle
    return above * known.scale * 1e-3 if abs(above) * angle > BLURRED * sharp and min(known.scan) > 1 else None


def _orientation(recipe: Recipe, known: Survey, sums: np.ndarray, power: np.ndarray) -> tuple[Orientation, list[str]]:
    """The turn and flip of the scan, and what is doubtful about them."""
    sums, doubts = sums.reshape(known.tilts, *known.scan, 4), []
    fields, large = sums[..., :2] / np.maximum(sums[..., 2:3], 1e-9), min(known.scan) >= orientation.FEWEST
    if power.size:
        lies = orientation.orient_defocused(power, recipe.rotation, recipe.flip)
        # Parallax takes the sign of the defocus at its word; deflections, of a beam narrower than the scan, do not.
        narrow = known.radius * abs(_height(recipe, known) or 0.0) < _ends(recipe, known).min()
        if large and narrow and orientation.orient(
                fields, sums[..., 3], recipe.step, lies.rotation, lies.flip).sign < -SURE:
            doubts.append("the specimen deflects the beam away from itself, as if the scan lay the other way round; "
                          "check the sign of defocus, and rotation if it is given")
    elif large:
        lies = orientation.orient(fields, sums[..., 3], recipe.step, recipe.rotation, recipe.flip)
    else:
        return Orientation(recipe.rotation or 0.0, recipe.flip or "none"), []
    return lies, [*_doubts(recipe, lies), *doubts]


def _doubts(recipe: Recipe, lies: Orientation) -> Iterator[str]:
    """What the data do not say for sure, or say against the settings."""
    other = f"{(lies.rotation + 360) % 360 - 180:.1f} in place of {lies.rotation:.1f} degrees"
    if recipe.rotation is None and lies.error > STEADY:
        yield (f"the rotation of the scan, {lies.rotation:.1f} degrees, is known to {lies.error:.1f} degrees alone; "
               "give rotation")
    if recipe.rotation is None and lies.sign < SURE:
        yield (f"the rotation of the scan may be {other}, which {lies.sign:.1f} standard errors tell apart; give "
               "rotation")
    if recipe.flip is None and lies.hand < SURE:
        yield f"whether the scan is flipped is told by {lies.hand:.1f} standard errors; give flip"
    if recipe.rotation is not None and lies.sign < -SURE:
        yield f"the patterns say that the rotation of the scan is {other}; check rotation and the sign of defocus"
    if recipe.flip is not None and lies.hand < -SURE:
        yield f"the patterns say that flip: {lies.flip} is the wrong handedness; check flip, and then rotation"


def _ends(recipe: Recipe, known: Survey) -> np.ndarray:
    """(y, x) [nm] of the last probe from the scan's centre."""
    return (np.array(known.scan) - 1) / 2 * recipe.step


def _positions(recipe: Recipe, known: Survey, lies: np.ndarray) -> np.ndarray:
    """(probe, 2) [nm] on the detector; the tilt axis passes through the scan's centre."""
    axes = [(np.arange(count) - (count - 1) / 2) * step for count, step in zip(known.scan, recipe.step, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    return np.asarray(grid @ lies.T)


def _angles(recipe: Recipe, lies: np.ndarray) -> np.ndarray:
    """(tilt, 3) Euler angles [deg] in the detector's frame, into which the tilt axis is turned, or mirrored."""
    frame = np.eye(3)
    frame[1:, 1:] = lies
    y, x = orientation.turn(recipe.tilt_axis) @ (0.0, 1.0)
    turns = [frame @ matrix(about((0.0, y, x), angle)) @ frame.T for angle in recipe.angles]
    return np.round([euler(each) for each in turns], 10) + 0.0


def _vacuum(kept: np.ndarray) -> float:
    """Electrons of a probe: the mean over the tilts where it is largest, which misses the specimen if any does."""
    means = np.sort(kept.mean(0))[::-1]
    return float(means[:max(1, len(means) // VACUUM)].mean())


def _found(known: Survey, centres: list[np.ndarray], lies: Orientation, electrons: float) -> dict[str, Any]:
    """What the data say, as attributes: numbers, words and lists."""
    numbers = {"rotation_deg": lies.rotation, "rotation_error_deg": lies.error, "misfit": lies.misfit,
               "misfit_mirrored": lies.mirrored, "sign_standard_errors": lies.sign,
               "flip_standard_errors": lies.hand, "disc_radius_pixels": known.radius, "scale_mrad": known.scale,
               "electrons": electrons}
    return {"flip": lies.flip, "found_by": lies.how,
            "disc_centres_pixels": [[float(at) for at in centre] for centre in centres],
            **{name: float(value) for name, value in numbers.items() if np.isfinite(value)}}
