"""4D-STEM series out of files of a microscope: a stage that makes a group of them, once. Imports without JAX."""

from __future__ import annotations

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from engine import archives, intake
from engine.data import DataError, DataWarning
from engine.intake import Recipe, Survey
from engine.measured import read_angles
from engine.physics import wavelength
from engine.stacks import Misfit, found
from sweeps import stages
from sweeps.patterns import Files, Recorded
from sweeps.settings import Sweep
from sweeps.sources import Crop

FOLLOW = ("crop", "bins")  # settings of data, not of data.scan


def group(data: Recorded, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where the group of a series is, made if need be, and how it is to be loaded: its tilts, crop and bins."""
    if isinstance(data.scan, str):
        return Path(data.root, data.scan), {"tilts": data.tilts, "crop": data.crop, "bins": data.bins}
    recipe = _recipe(data, data.scan)
    path = folder / "stages" / f"{stages.key('intake', _inputs(data, data.scan, recipe))}.zarr"
    if not path.exists():
        with _alone(path.with_suffix(".lock")):
            if not path.exists():
                intake.bring(recipe, path)
    return path, {"tilts": data.tilts}


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of a machine at a time, where the file system can lock; a dead one holds nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tell(data: Recorded, folder: Path) -> None:
    """What was found in a series of files, and what is doubtful about it, as DataWarnings."""
    if isinstance(data.scan, str):
        return
    with archives.opened(group(data, folder)[0]) as made:
        texts = [_told(data.scan, made.attributes["found"]), *made.attributes["doubts"]]
    for text in filter(None, texts):
        warnings.warn(f"data.scan: {text}", DataWarning, stacklevel=2)


def survey(sweep: Sweep, data: Recorded) -> Survey:
    """What a series in files will be; DataError begins with the line of the YAML."""
    assert isinstance(data.scan, Files)
    try:
        return intake.survey(_recipe(data, data.scan))
    except Misfit as error:
        name = error.setting if error.setting in FOLLOW else f"scan.{error.setting}"
        raise DataError(f"{sweep.where(f'data.{name}')}: {error}") from None
    except DataError as error:
        raise DataError(f"{sweep.where('data.scan.files')}: {error}") from None


def _recipe(data: Recorded, given: Files) -> Recipe:
    """The settings as the engine takes them."""
    optics = {name: getattr(given, name) for name in ("voltage", "aperture", "defocus", "c3", "c5")}
    step = given.step if isinstance(given.step, list) else [given.step] * 2
    part = given.scan_crop or Crop()
    files = found(given.files, data.root)
    try:
        angles = np.array(given.angles) if isinstance(given.angles, list) else read_angles(
            given.angles, files[0], data.root)
    except DataError as error:
        raise Misfit("angles", str(error)) from None
    scale = given.scale
    if scale is not None and given.scale_units == "1/nm":
        scale *= 1e3 * wavelength(given.voltage)
    return Recipe(
        files, angles, (step[0], step[1]), optics, given.key, tuple(given.axes),
        (given.scan_shape[0], given.scan_shape[1]) if given.scan_shape else None, given.tilt_axis, scale, given.centre,
        given.dark, given.counts_per_electron, given.electrons, given.rotation, given.flip, _part(part.y),
        _part(part.x), data.crop, data.bins)


def _part(interval: list[int] | None) -> slice:
    return slice(interval[0], interval[1]) if interval else slice(None)


def _inputs(data: Recorded, given: Files, recipe: Recipe) -> dict[str, Any]:
    """All that the group follows from: settings, angles, and of each file its name, size and time."""
    return {"scan": given.model_dump(), "crop": data.crop, "bins": data.bins, "angles": recipe.angles.tolist(),
            "files": [(str(path), *_state(path)) for path in recipe.files]}


def _state(path: Path) -> tuple[int, int]:
    """Size and time of a file, or of all that lies in a folder."""
    every = [each.stat() for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file()]
    return sum(each.st_size for each in every), max((each.st_mtime_ns for each in every), default=0)


def _told(given: Files, known: dict[str, Any]) -> str:
    """What was found, in words; nothing where all was given."""
    parts = []
    if given.rotation is None:
        parts.append(f"rotation {known['rotation_deg']:.1f} +- {known['rotation_error_deg']:.1f} degrees")
    if given.flip is None:
        parts.append(f"flip {known['flip']}")
    if parts:
        parts[-1] += (f" (by {known['found_by']}: misfit {known['misfit']:.2f}, of the other handedness "
                      f"{known['misfit_mirrored']:.2f})")
    if given.scale is None:
        parts.append(f"scale {known['scale_mrad']:.4g} mrad, from a disc of {known['disc_radius_pixels']:.2f} pixels")
    if given.electrons is None:
        parts.append(f"{known['electrons']:.6g} electrons of a probe")
    return f"found in the patterns: {'; '.join(parts)}" if parts else ""
