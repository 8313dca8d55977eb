"""The common region of a specimen's measured modalities: moved, cropped, binned.

Images whose shifts are known to whole pixels, or by hand, are moved by whole pixels, so that counts stay independent
counts. Where an alignment tells shifts and turns to parts of a pixel (`Recording.turns`), each pixel of the region is
taken once from where it lies in the image: along cubic splines, and of counts from the nearest pixel, which leaves them
counts; that is half a pixel wrong at most, and a turn takes a few pixels twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from engine import warps
from engine.data import DataError, TiltSeries, Units
from engine.measured import Recording

Region = tuple[tuple[int, int], tuple[int, int]]  # [from, to) along y and x in aligned, unbinned pixels


def prepare(*recordings: Recording, pixel_size: float | None = None,
            crop: Mapping[str, Sequence[int] | None] | None = None, binning: int = 1,
            tilt_axis: float | None = None) -> tuple[TiltSeries, ...]:
    """Align, crop and bin the recordings of one specimen, all alike.

    pixel_size: [nm] of an unbinned pixel; without it the file's.
    crop: {y: [from, to), x: [from, to)} in unbinned pixels of the aligned images, trimmed to whole bins at
        the end; without it the largest region, centred on the tilt axis, that every image covers.
    binning: pixels along y and x that become one: counts and their background are summed, the rest averaged.
    tilt_axis: [pixels] its y in the aligned, uncropped images; without it their centre, (ny - 1) / 2.

    Modalities with the same angles and shifts move alike. Nothing from outside an image is made up: a region that an
    image does not cover is refused. A volume turns about its own centre, so where the centre c of the
    region is not the axis, images are moved by a further (c - tilt_axis) (1 - cos(angle)) along y.
    """
    first = recordings[0]
    size = first.projections.shape[2:]
    if binning < 1 or binning > min(size):
        raise DataError(f"{first.where}: binning {binning} for {size} pixels; give 1 to {min(size)}")
    for other in recordings:
        if other.projections.shape[2:] != size:
            raise DataError(f"{other.where}: images of {other.projections.shape[2:]} pixels (y, x), and "
                            f"those of {first.where} have {size}; bring all modalities to one grid of pixels")
    axis = (size[0] - 1) / 2 if tilt_axis is None else float(tilt_axis)
    region = _region(recordings, crop or {}, binning, axis)
    return tuple(_cut(recording, region, _moves(recording, region, axis), binning, pixel_size)
                 for recording in recordings)


def _moves(recording: Recording, region: Region, axis: float) -> np.ndarray:
    """(tilt, 2) pixels along y and x by which each image is moved, the turned axis counted in."""
    off = (sum(region[0]) - 1) / 2 - axis
    turned = (off if abs(off) > 0.5 else 0.0) * (1 - np.cos(np.radians(recording.angles)))
    if recording.turns is None:
        return np.rint(recording.shifts + np.stack([turned, 0 * turned], 1))
    # A move of the turned image, told as one of the image before it is turned.
    turn = np.radians(recording.turns)
    return recording.shifts + np.stack([turned * np.cos(turn), turned * np.sin(turn)], 1)


def places(recording: Recording, region: Region, moves: np.ndarray, tilt: int) -> np.ndarray:
    """(2, y, x) where in the image of a tilt the region's pixels lie."""
    middle = (np.array(recording.projections.shape[2:]) - 1) / 2
    y, x = (np.arange(*each) - m for each, m in zip(region, middle, strict=True))
    turn = 0.0 if recording.turns is None else np.radians(recording.turns[tilt])
    cos, sin = np.cos(turn), np.sin(turn)
    rows = y[:, None] * cos - x * sin + middle[0] - moves[tilt, 0]
    columns = y[:, None] * sin + x * cos + middle[1] - moves[tilt, 1]
    found = np.stack([rows, columns])
    if recording.warps is None:
        return found
    return warps.warped(found, recording.warps[tilt], recording.projections.shape[2:])


def _region(recordings: Sequence[Recording], crop: Mapping[str, Sequence[int] | None], binning: int,
            axis: float) -> Region:
    """Whole bins of the crop, or of what all images cover; refused where an image does not cover it."""
    where, sizes = recordings[0].where, recordings[0].projections.shape[2:]
    shifts = np.concatenate([recording.shifts for recording in recordings])
    turns = [np.abs(recording.turns).max() for recording in recordings if recording.turns is not None]
    lost = np.sin(np.radians(max(turns))) * np.array(sizes[::-1]) / 2 if turns else np.zeros(2)
    bounds = []
    for word, size, moved, edge in zip("yx", sizes, shifts.T, lost, strict=True):
        whole = np.ceil if turns else np.rint
        low, high = int(whole(max(0, moved.max() + edge))), size - int(whole(max(0, edge - moved.min())))
        start, stop = crop.get(word) or (low, high)
        if not 0 <= start < stop <= size:
            raise DataError(f"{where}: crop {word} [{start}, {stop}] lies outside its {size} pixels; "
                            f"the aligned images share about [{low}, {high}]")
        width = (stop - start) // binning * binning
        if not crop.get(word) and word == "y":
            width = max(0, int(2 * min(axis + 0.5 - low, high - axis - 0.5))) // binning * binning
            start = round(axis + 0.5 - width / 2)
        if not width:
            raise DataError(f"{where}: {word} [{start}, {stop}] is narrower than a bin of {binning} pixels; "
                            f"change data.crop, or data.tilt_axis, now {axis:g}")
        bounds.append((start, start + width))
    region = bounds[0], bounds[1]
    for recording in recordings:
        _check_covered(recording, region, _moves(recording, region, axis))
    return region


def _check_covered(recording: Recording, region: Region, moves: np.ndarray) -> None:
    sizes = recording.projections.shape[2:]
    y, x = (max(1, stop - start - 1) for start, stop in region)
    corners = np.array([places(recording, region, moves, tilt)[:, ::y, ::x].reshape(2, -1)
                        for tilt in range(len(moves))])
    for k, (word, (start, stop), size) in enumerate(zip("yx", region, sizes, strict=True)):
        below, above = -corners[:, k].min(1), corners[:, k].max(1) - (size - 1)
        outside = np.flatnonzero(np.maximum(below, above) > 0.5)
        if outside.size:
            tilt = outside[0]
            raise DataError(
                f"{recording.where}: the image at {recording.angles[tilt]:g} degrees, moved by {moves[tilt, k]:.4g} "
                f"pixels, does not cover {word} [{start}, {stop}]; with this centre all images share "
                f"[{max(0, start + np.ceil(below.max())):.0f}, {min(size, stop - np.ceil(above.max())):.0f}]: "
                "change data.crop")


def _cut(recording: Recording, region: Region, moves: np.ndarray, binning: int,
         pixel_size: float | None) -> TiltSeries:
    """The region of every image, binned; the same for its background."""
    size = pixel_size or recording.pixel_size
    if size is None:
        raise DataError(f"{recording.where}: states no pixel size; give data.pixel_size in nm")
    weight = binning**2 if recording.units in ("counts", "net_counts") else 1
    projections = weight * _regions(recording, recording.projections, region, moves, binning)
    background = weight * recording.background
    if background.shape[2] > 1:
        background = weight * _regions(recording, recording.background, region, moves, binning)
    try:
        _check_counts(projections, recording.units)
        return TiltSeries(projections, recording.angles, recording.elements, size * binning, recording.units,
                          background)
    except DataError as error:
        raise DataError(f"{recording.where}: {error}") from None


def _regions(recording: Recording, images: np.ndarray, region: Region, moves: np.ndarray,
             binning: int) -> np.ndarray:
    """(element, tilt, y, x) float32 means over bins of the region of each image."""
    (y0, y1), (x0, x1) = region
    ny, nx = (y1 - y0) // binning, (x1 - x0) // binning
    if recording.turns is None:
        whole = moves.astype(int)
        frames = (images[:, tilt, y0 - dy:y1 - dy, x0 - dx:x1 - dx] for tilt, (dy, dx) in enumerate(whole))
    else:
        frames = (_taken(images[:, tilt], places(recording, region, moves, tilt), recording.units == "counts")
                  for tilt in range(len(moves)))
    blocks = (frame.reshape(len(frame), ny, binning, nx, binning) for frame in frames)
    return np.stack([block.mean((2, 4), dtype=np.float64) for block in blocks], 1).astype(np.float32)


def _taken(images: np.ndarray, where: np.ndarray, counts: bool) -> np.ndarray:
    """(element, y, x) values of images at places (2, y, x) in them."""
    if counts:
        y, x = (np.clip(np.rint(each).astype(int), 0, size - 1)
                for each, size in zip(where, images.shape[1:], strict=True))
        taken: np.ndarray = images[:, y, x]
        return taken
    return np.stack([ndimage.map_coordinates(np.asarray(image, np.float32), where, order=3, mode="nearest")
                     for image in images])


def less(recording: Recording, level: np.ndarray) -> Recording:
    """A recording whose background is known to be higher by `level` (tilt,); of what are no counts it is taken off."""
    level = np.asarray(level, np.float32)[:, None, None]
    if recording.units == "counts":
        return replace(recording, background=recording.background + level[None])
    return replace(recording, projections=recording.projections - level)


def _check_counts(projections: np.ndarray, units: Units) -> None:
    """Poisson statistics need counts: a map divided by its maximum would hardly be believed."""
    largest = projections.max()
    if units == "counts" and 0 < largest < 1:
        raise DataError(f"no pixel holds a whole count (maximum {largest:.3g}), so these are no counts; "
                        "give units: net_counts, atomic_percent or intensity")
    if units == "counts" and largest >= 2**24:
        raise DataError(f"a pixel holds {largest:.3g} counts, more than float32 can tell apart; "
                        "is it a negative number read as unsigned? Repair it, or give units: intensity")
