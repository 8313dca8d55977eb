"""Measured tilt series: what an array of a file means.

`read_series` describes a series as it lies in its file; `engine.regions` moves, crops and bins several together.
What does not fit is answered by a DataError: one sentence with the file, the cause and the next step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy.ndimage import gaussian_filter

from engine.data import DataError, Units
from engine.files import Contents, meant, open_file, reading
from engine.spectra import maps as maps_of

ORDER = ("element", "tilt", "y", "x")
SPECTRAL = ("tilt", "y", "x", "energy")
# A side window holds a tenth of a count per pixel: one pixel of it says nothing about its own background. For
# seven lines of an interplanetary dust particle, Gaussians of 3 to 6 pixels over half the counts of the side
# windows predicted the other half best, by 580 to 6,800 of Poisson deviance better than each image's mean.
SMOOTHING = 5.0


@dataclass(frozen=True)
class Recording:
    """A tilt series before it is aligned.

    projections: (element, tilt, y, x) in the file's own type, a view of the file where possible.
    angles: (tilt,) [deg].
    shifts: (tilt, 2), how far each image is moved along y and x to align it [pixels].
    background: (1 or element, 1 or tilt, 1 or y, 1 or x), per pixel, in `units`.
    pixel_size: [nm], None where the file states none.
    where: the file and array, for messages.
    turns: (tilt,) [deg] by which the moved image is turned back about the beam, where shifts and turns are known to
        parts of a pixel (`engine.registration`); None: images move by whole pixels.
    warps: (tilt, 2, 3) how maps lie on the images whose shifts and turns these are (`engine.warps`), where turns are.
    """

    projections: np.ndarray
    angles: np.ndarray
    elements: tuple[str, ...]
    units: Units
    shifts: np.ndarray
    background: np.ndarray
    pixel_size: float | None
    where: str
    turns: np.ndarray | None = None
    warps: np.ndarray | None = None


def read_series(
    path: str | Path, *, axes: Sequence[str], angles: Sequence[float] | str | None = None, key: str | None = None,
    root: str | Path = ".", tilts: Sequence[int] | None = None, elements: Mapping[str, Any] | None = None,
    names_key: str | None = None, shifts: Sequence[Sequence[float]] | str | None = None,
    shift_axes: Sequence[str] = ("y", "x"), background: Any = None, units: Units = "counts",
    energy: Mapping[str, float] | None = None, smooth: float | None = None,
) -> Recording:
    """An image, a tilt series, or maps out of spectrum images, from a file.

    path: the file, relative to `root`. key: the array in it.
    axes: the array's axes in its own order, of element, tilt, y, x; x is the tilt axis. Of a spectrum image: of
        tilt, y, x, energy; then every element has a window {Fe: {window: [6.3, 6.5], sides: [[6.0, 6.2], ...]}}
        (`engine.spectra`).
    angles: [deg] a list, "key:NAME" of an array, or a file (.rawtlt, .tlt, .txt, .csv) relative to `root`; None: one
        image at 0 degrees.
    tilts: indices of the projections to use; angles, shifts and backgrounds are given for all of them.
    elements: None for HAADF. With `names_key`, the name of an array of names, a map is found by its element's
        name, or several are summed: {Pt: {lines: [PtL, PtM]}}. Without it maps are in the order of the
        elements, or {Fe: {index: 8}}. An atomic number in place of the mapping is accepted and not looked at.
    shifts: (tilt, 2) or "key:NAME" [pixels]: an image is moved by +shift to align it.
    shift_axes: along what; "-x" for a shift that is counted against x.
    background: a number, one per tilt, (element, tilt) numbers, or {key, scale_key, smooth, factor} for side
        windows of a spectrum.
    energy: {first, step} of a spectrum image's channels, in the unit of the windows; without it the file's.
    smooth: [pixels] of the Gaussian over a spectrum image's background; without it SMOOTHING.
    """
    if units not in get_args(Units):
        raise DataError(f"{path}: units {units!r}{meant(units, get_args(Units))} are not known; "
                        f"give one of {', '.join(get_args(Units))}")
    contents = open_file(Path(root, path))
    name = contents.name(key)
    where = _where(contents, name)
    names = tuple(elements) if elements else ("HAADF",)
    if "energy" in axes:
        array, level = _of_spectra(contents, name, axes, elements or {}, energy, smooth, background, where)
        if units != "counts":
            array, level = array - level, np.zeros((1, 1, 1, 1), np.float32)
        groups = [[k] for k in range(len(names))]
    else:
        array = arrange(_numbers(contents, name), axes, ORDER, where)
        groups = _groups(elements, _names(contents, names_key, len(array)), len(array), where)
        level = _background(background, contents, axes, array.shape, groups, names)
    count = array.shape[1]
    used = _used(tilts, count, where)
    if angles is None and count > 1:
        raise DataError(f"{where}: {count} projections and no angles; give angles, in degrees")
    return Recording(
        projections=_pick(array, groups, used),
        angles=read_angles([0.0] if angles is None else angles, contents, root, count)[used],
        elements=names, units=units, shifts=_shifts(shifts, shift_axes, contents, count)[used],
        background=level[:, used] if level.shape[1] == count else level,
        pixel_size=contents.pixels.get(name), where=where)


def read_angles(angles: Sequence[float] | str, source: Contents | str | Path, root: str | Path = ".",
                count: int | None = None) -> np.ndarray:
    """(tilt,) [deg] from a list, "key:NAME" of an array of the source, or a file relative to `root`."""
    if isinstance(angles, str) and not angles.startswith("key:"):
        where = str(Path(root, angles))
        if not Path(where).is_file():
            raise DataError(f"{where}: no such file of angles; check data.root, or give a list or key:NAME")
        with reading(where):
            values = np.loadtxt(where, dtype=np.float64, ndmin=1,
                                delimiter="," if where.endswith(".csv") else None)
    else:
        contents = source if isinstance(source, Contents) else open_file(source)
        where = f"{contents.path}: angles"
        values = _floats(angles, contents)
    if values.ndim != 1 or count not in (None, values.size):
        raise DataError(f"{where}: {values.size} angles for {count} projections; give one for each")
    if not np.isfinite(values).all():
        raise DataError(f"{where}: an angle is NaN or infinite; repair the list")
    if values.size > 2 and 0 < np.abs(values).max() <= np.pi + 1e-3:
        raise DataError(f"{where}: look like radians (at most {np.abs(values).max():.3g}); give degrees")
    return values


def read_truth(path: str | Path, *, elements: Sequence[str], shape: tuple[int, int, int],
               key: str | None = None, axes: Sequence[str] = ("element", "z", "y", "x"),
               root: str | Path = ".") -> np.ndarray:
    """(element, z, y, x) concentrations, elements as given, of the reconstruction's `shape` (z, y, x)."""
    contents = open_file(Path(root, path))
    where = _where(contents, contents.name(key))
    truth = arrange(_numbers(contents, key), axes, ("element", "z", "y", "x"), where)
    if truth.shape != (len(elements), *shape):
        raise DataError(f"{where}: the truth has shape {truth.shape} (element, z, y, x) and the "
                        f"reconstruction {(len(elements), *shape)}; change data.crop or data.volume")
    if not np.isfinite(truth).all():
        raise DataError(f"{where}: the truth holds NaN or infinite values; repair or leave out data.truth")
    return np.ascontiguousarray(truth, dtype=np.float32)


def arrange(array: np.ndarray, axes: Sequence[str], order: Sequence[str], where: str) -> np.ndarray:
    """A view with the axes in `order`; an axis that is not named has length 1. y and x must be named."""
    axes, given = list(axes), f"axes [{', '.join(axes)}]"
    for word in axes:
        if word not in order:
            raise DataError(f"{where}: {given}: {word!r} is not known{meant(word, order)}; "
                            f"the words are {', '.join(order)}")
    if len(set(axes)) < len(axes):
        raise DataError(f"{where}: {given} name an axis twice; name each once, in the array's order")
    if array.ndim != len(axes):
        raise DataError(f"{where}: the array has {array.ndim} axes, shape {array.shape}, and {given} name "
                        f"{len(axes)}; name every axis of the array, in its order")
    missing = [word for word in ("y", "x") if word in order and word not in axes]
    if missing:
        raise DataError(f"{where}: {given} do not say which axis is {' and '.join(missing)}; name every axis")
    moved = array.transpose([axes.index(word) for word in order if word in axes])
    return np.expand_dims(moved, [i for i, word in enumerate(order) if word not in axes])


def _of_spectra(contents: Contents, key: str, axes: Sequence[str], elements: Mapping[str, Any],
                energy: Mapping[str, float] | None, smooth: float | None, background: Any,
                where: str) -> tuple[np.ndarray, np.ndarray]:
    """Counts and background (element, tilt, y, x) of a spectrum image."""
    if background is not None:
        raise DataError(f"{where}: a spectrum image takes its background from sides or before of each element; leave "
                        "out background")
    spectra = arrange(_numbers(contents, key), axes, SPECTRAL, where)
    first, step = (energy["first"], energy["step"]) if energy else contents.energies.get(key, (0.0, 0.0))
    if step <= 0:
        raise DataError(f"{where}: states no energies; give energy: {{first: , step: }} of its channels")
    entries = {name: entry if isinstance(entry, Mapping) else {} for name, entry in elements.items()}
    return maps_of(spectra, first + step * np.arange(spectra.shape[-1]), entries,
                   SMOOTHING if smooth is None else smooth, where)


def _where(contents: Contents, name: str) -> str:
    return f"{contents.path}[{name}]" if name else str(contents.path)


def _numbers(contents: Contents, key: str | None) -> np.ndarray:
    array = contents.array(key or None)
    if array.dtype.kind not in "uif":
        raise DataError(f"{_where(contents, key or '')}: holds {array.dtype}, not real numbers; "
                        "convert it, or name another key")
    return array


def _floats(values: Any, contents: Contents) -> np.ndarray:
    """Numbers given as such, or as "key:NAME" of an array."""
    if isinstance(values, str):
        values = _numbers(contents, values.removeprefix("key:"))
    return np.asarray(values, dtype=np.float64)


def _names(contents: Contents, names_key: str | None, count: int) -> list[str] | None:
    if names_key is None:
        return None
    names = [str(name) for name in np.ravel(contents.array(names_key))]
    if len(names) != count:
        raise DataError(f"{_where(contents, names_key)}: {len(names)} names for {count} maps; "
                        "name the array that goes with the maps")
    return names


def _groups(elements: Mapping[str, Any] | None, names: list[str] | None, count: int,
            where: str) -> list[list[int]]:
    """Positions of each element's maps along the element axis: several where lines are summed."""
    if not elements:
        if count != 1:
            raise DataError(f"{where}: {count} maps where one image per tilt is needed; name another key")
        return [[0]]
    groups = []
    for place, (element, entry) in enumerate(elements.items()):
        entry = entry if isinstance(entry, Mapping) else {}
        if entry.get("index") is not None:
            groups.append([int(entry["index"])])
        elif names is not None:
            groups.append([_find(line, names, where) for line in entry.get("lines") or [element]])
        elif len(elements) == count and not entry.get("lines"):
            groups.append([place])
        else:
            raise DataError(f"{where}: {count} maps for {len(elements)} elements ({', '.join(elements)}); "
                            "list all in the file's order, give each an index, or give names_key")
        if max(groups[-1]) >= count:
            raise DataError(f"{where}: {element}: no map {max(groups[-1])}; the {count} maps count from 0")
    used = sum(groups, [])
    twice = next((i for i in used if used.count(i) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: map {twice} is taken twice (elements {', '.join(elements)}); "
                        "give every element its own")
    return groups


def _find(name: str, names: list[str], where: str) -> int:
    if name not in names:
        raise DataError(f"{where}: no map is named {name!r}{meant(name, names)}; it has {', '.join(names)}")
    return names.index(name)


def _pick(array: np.ndarray, groups: list[list[int]], tilts: np.ndarray) -> np.ndarray:
    """Maps of the elements, lines summed, at the tilts used; the array itself where that is all of it."""
    if tilts.size < array.shape[1]:
        array = array[:, tilts]
    if max(map(len, groups)) > 1:
        return np.stack([array[group].sum(0, dtype=np.float32) for group in groups])
    order = sum(groups, [])
    return array if order == list(range(len(array))) else array[order]


def _used(tilts: Sequence[int] | None, count: int, where: str) -> np.ndarray:
    used = np.arange(count) if tilts is None else np.unique(np.asarray(tilts, dtype=np.int64))
    if not used.size or used[0] < 0 or used[-1] >= count or tilts is not None and used.size < len(tilts):
        raise DataError(f"{where}: tilts {list(tilts or [])} are not indices of its {count} projections; "
                        f"give each once, from 0 to {count - 1}")
    return used


def _shifts(shifts: Any, axes: Sequence[str], contents: Contents, count: int) -> np.ndarray:
    """(tilt, 2) along y and x."""
    where = f"{contents.path}: shifts"
    values = np.zeros((count, 2)) if shifts is None else _floats(shifts, contents)
    if values.shape != (count, 2):
        raise DataError(f"{where} of shape {values.shape} for {count} projections; give a pair for each")
    if not np.isfinite(values).all():
        raise DataError(f"{where} hold NaN or infinite values; repair them")
    words = [axis.removeprefix("-") for axis in axes]
    if sorted(words) != ["x", "y"]:
        raise DataError(f"{where}: shift_axes [{', '.join(axes)}] must name y and x, once each")
    signed = values * [-1 if axis.startswith("-") else 1 for axis in axes]
    return signed[:, [words.index("y"), words.index("x")]]


def _background(background: Any, contents: Contents, axes: Sequence[str], shape: tuple[int, ...],
                groups: list[list[int]], elements: tuple[str, ...]) -> np.ndarray:
    """(1 or element, 1 or tilt, 1 or y, 1 or x) per pixel."""
    if isinstance(background, Mapping):
        return _side_windows(contents, axes, shape, groups, elements, **background)
    values = np.asarray(0.0 if background is None else background, dtype=np.float32)
    if values.shape not in ((), (shape[1],), (len(elements), shape[1])):
        raise DataError(f"{contents.path}: a background of shape {values.shape}; give a number, one for each "
                        f"of {shape[1]} tilts, or {len(elements)} x {shape[1]} for (element, tilt)")
    return values.reshape((1,) * (2 - values.ndim) + values.shape + (1, 1))


def _side_windows(contents: Contents, axes: Sequence[str], shape: tuple[int, ...], groups: list[list[int]],
                  elements: tuple[str, ...], *, key: str, scale_key: str | None = None,
                  smooth: float | None = None, factor: Mapping[str, float] | None = None) -> np.ndarray:
    """(element, tilt, y, x) background from counts in windows beside a line.

    scale_key: (element, tilt) factors that bring them into the window of the line.
    smooth: [pixels] width of the Gaussian; without it SMOOTHING.
    factor: by element, for a side window that holds another element's line.
    """
    side = arrange(_numbers(contents, key), axes, ORDER, _where(contents, key))
    if side.shape != shape:
        raise DataError(f"{_where(contents, key)}: the background has shape {side.shape} and the data "
                        f"{shape}, (element, tilt, y, x); name the array that goes with the data")
    scale = np.ones(shape[:2])
    if scale_key:
        flat = [word for word in axes if word in ORDER[:2]]
        given = arrange(_numbers(contents, scale_key), flat, ORDER[:2], _where(contents, scale_key))
        if given.shape != shape[:2]:
            raise DataError(f"{_where(contents, scale_key)}: factors of shape {given.shape} for images "
                            f"{shape[:2]}, (element, tilt); name another scale_key")
        scale = given
    for element in factor or {}:
        if element not in elements:
            raise DataError(f"{contents.path}: a background factor for {element}, which is no element here"
                            f"{meant(element, elements)}; there are {', '.join(elements)}")
    factors = [(factor or {}).get(element, 1.0) for element in elements]
    summed = np.stack([each * sum(scale[line][:, None, None] * side[line] for line in group)
                       for each, group in zip(factors, groups, strict=True)])
    width = SMOOTHING if smooth is None else smooth
    return gaussian_filter(summed, (0, 0, width, width), output=np.float32, mode="nearest")
