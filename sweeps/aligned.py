"""Measured and simulated series aligned as `data.align` says, once for all cells that share it. Imports JAX."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import regions, registration, simulate, warps
from engine.align import Alignment, Level
from engine.data import DataError, DataWarning, TiltSeries
from engine.measured import Recording
from sweeps import stages
from sweeps.alignment import AlignMaps, AlignMatch, AlignStage
from sweeps.schema import Phantom
from sweeps.sources import Crop, Measured, Volume

SAME = 0.05  # [deg] within which an image and a map were taken at one tilt
FINE = 3  # voxels of the specimen along a pixel's edge where a misaligned series is simulated
FINEST = 2  # pixels that become one where nothing is matched, for residuals and half sets


def recordings(data: Measured, folder: Path) -> dict[str, Recording]:
    """The series of a measured specimen, with shifts and turns as `data.align` finds them on the HAADF images, or on
    the sum of the maps where there are none; tilts that it leaves out are gone."""
    opened = stages.recordings(data)
    if data.align is None:
        return opened
    name = "haadf" if "haadf" in opened else "chem"
    found = stages.stage(folder, "align", stages.align_inputs(data), lambda: _found(data, opened[name]))
    say(found)
    step = next((step for step in data.align if isinstance(step, AlignMaps)), None)
    if step is not None and name == "haadf":
        opened["chem"] = _on_images(data, opened["chem"], opened["haadf"], found["used"], step, folder)
    return {each: _moved(recording, found, each == name) for each, recording in opened.items()}


def _on_images(data: Measured, maps: Recording, images: Recording, used: np.ndarray, step: AlignMaps,
               folder: Path) -> Recording:
    """Maps with how they lie on the images of their tilts that are used; what has none lies as an image would."""
    pairs = [(m, i) for m, angle in enumerate(maps.angles) for i, other in enumerate(images.angles)
             if abs(angle - other) < SAME and used[i]]
    alone = len(maps.angles) - len(pairs)
    if alone:
        warnings.warn(f"{alone} of {len(maps.angles)} maps have no HAADF image at their angle that could be used: "
                      "stage maps leaves them as they are", DataWarning, stacklevel=3)

    def make() -> stages.Arrays:
        found = warps.identity(len(maps.angles))
        summed = (maps.projections - maps.background).sum(0, dtype=np.float32)
        of_maps, of_images = ([pair[k] for pair in pairs] for k in (0, 1))
        try:
            if pairs:
                there = images.projections[0, of_images]
                found[of_maps] = warps.fitted(summed[of_maps], there, step.free, step.smooth)
        except DataError as error:
            raise DataError(f"{maps.where}: data.align: {error}") from None
        return {"warps": found, "angles": maps.angles}

    given = {"chem": stages.file_inputs(data, data.chem), "chem_tilts": data.chem_tilts, "step": step.model_dump()}
    made = stages.stage(folder, "maps", stages.align_inputs(data) | given, make)
    return replace(maps, warps=made["warps"])


def say(found: stages.Arrays) -> None:
    """What was left out, and why."""
    for words in found["words"]:
        warnings.warn(f"{words}: it is left out of the alignment and the reconstruction", DataWarning, stacklevel=2)


def aligned(images: np.ndarray, angles: np.ndarray, chain: Sequence[AlignStage], *, moves: np.ndarray | None = None,
            extent: tuple[float, float] = (1.0, 1.0), crop: Crop | None = None) -> stages.Arrays:
    """`registration.register` of images (tilt, y, x) as arrays that a stage keeps; the names are those of its fields.

    moves: (tilt, 2) known shifts that align the images [pixels].
    """
    start = None if moves is None else replace(Alignment.none(len(images)), shifts=-moves)
    bins = min((level.bins for step in chain if isinstance(step, AlignMatch) for level in step.levels), default=FINEST)
    ny, nx = images.shape[1:]
    crop = crop or Crop()
    region = tuple(crop.y or (0, ny)), tuple(crop.x or (0, nx))
    steps = [_stage(step, region) for step in chain if not isinstance(step, AlignMaps)]
    made = registration.register(images, angles, steps, start=start, extent=extent, bins=bins)
    words = [made.words[tilt] for tilt in sorted(made.words)]
    found, halves = made.alignment, made.halves
    return {"angles": np.asarray(angles, np.float64), "shifts": found.shifts, "inplane": found.inplane,
            "level": made.level, "used": made.used, "words": np.array(words, dtype=str), "residual": made.residual,
            "before": made.before, "shell_frequency": halves.frequency, "shell_correlation": halves.correlation,
            "shell_number": halves.number, "line_before": made.sinograms[0], "line_after": made.sinograms[1]}


def _stage(step: AlignStage, region: Any) -> tuple[str, Mapping[str, Any]]:
    """A stage as `registration.register` takes it."""
    given = step.model_dump(exclude={"stage", "within"})
    if isinstance(step, AlignMatch) and step.within == "crop":
        given["region"] = region
    if isinstance(step, AlignMatch):
        given["levels"] = tuple(Level(each.bins, each.rounds, tuple(each.free)) for each in step.levels)
    return step.stage, given


def _found(data: Measured, recording: Recording) -> stages.Arrays:
    """The alignment of a recording: of the sum of its maps, less their background."""
    images = (recording.projections - recording.background).sum(0, dtype=np.float32)
    ny, volume = images.shape[1], data.volume or Volume()
    depth = 1.0 if volume.nz is None else volume.nz * data.binning / ny
    width = 1 + 2 * volume.padding * data.binning / ny
    try:
        source = data.haadf if recording.elements == ("HAADF",) and data.haadf is not None else data.chem
        return _told(Path(source.path).name, data.align or [], data.pixel_size or recording.pixel_size) | aligned(
            images, recording.angles, data.align or [], moves=_known(data, recording), extent=(depth, width),
            crop=data.crop)
    except DataError as error:
        raise DataError(f"{recording.where}: data.align: {error}") from None


def _known(data: Measured, recording: Recording) -> np.ndarray:
    """(tilt, 2) known shifts that align the images and, where its place is known, bring the tilt axis to their middle,
    which is where stages look for it."""
    middle = (recording.projections.shape[2] - 1) / 2
    off = 0.0 if data.tilt_axis is None else middle - data.tilt_axis
    moved = off * (1 - np.cos(np.radians(recording.angles)))
    return recording.shifts + np.stack([moved, 0 * moved], 1)


def _told(title: str, chain: Sequence[AlignStage], pixel: float | None) -> stages.Arrays:
    """What a report needs beside the numbers. pixel: [nm]."""
    names = ", ".join(step.stage for step in chain)
    return {"title": np.array(f"{title} ({names})"), "pixel": np.array(1.0 if pixel is None else pixel)}


def _moved(recording: Recording, found: stages.Arrays, itself: bool) -> Recording:
    """A recording with the alignment of the HAADF images at its angles: between them where they differ.

    itself: whether it is the series that was aligned, whose background is known now.
    """
    angles = found["angles"]
    alignment = Alignment(found["shifts"], found["inplane"], *np.zeros((2, len(angles))))
    there = registration.at(alignment, angles, recording.angles)
    if itself and len(recording.elements) == 1:
        recording = regions.less(recording, found["level"])
    apart = np.abs(recording.angles[:, None] - angles[~found["used"]])
    kept = np.flatnonzero(~(apart < SAME).any(1))
    if not kept.size:
        raise DataError(f"{recording.where}: data.align leaves none of its images; change its stages")
    level = recording.background
    return replace(recording, projections=recording.projections[:, kept], angles=recording.angles[kept],
                   shifts=-there.shifts[kept], turns=there.inplane[kept],
                   warps=None if recording.warps is None else recording.warps[kept],
                   background=level[:, kept] if level.shape[1] == len(recording.angles) else level)


def unaligned(given: dict[str, Any]) -> dict[str, Any]:
    """All that a simulated series follows from: not how it is aligned afterwards."""
    return given | {"data": {name: value for name, value in given["data"].items() if name != "align"}}


def planted(data: Phantom, angles: np.ndarray) -> Alignment:
    """Where the images of a simulated series were put; maps lie as images of their angles do."""
    if data.misalign is None:
        return Alignment.none(len(angles))
    images = simulate.spread((data.tilt_range[0], data.tilt_range[1]), data.haadf_tilts)
    images = images if len(images) else angles
    rng, most = np.random.default_rng([3, data.misalign.seed]), data.misalign.shift
    shifts = rng.uniform(-most, most, (len(images), 2)) + [data.misalign.axis, 0]
    none = np.zeros(len(images))
    return registration.at(Alignment(shifts, none + data.misalign.inplane, none, none), images, angles)


def placed(data: Phantom) -> simulate.Place:
    """What puts clean projections where `data.misalign` says."""
    return lambda clean, angles: simulate.misplaced(clean, planted(data, angles), _margin(data), FINE)


def _margin(data: Phantom) -> int:
    """Pixels by which the images of a misaligned series are wider on each side."""
    given = data.misalign
    if given is None:
        return 0
    turn = np.sin(np.radians(abs(given.inplane))) * data.size
    return int(np.ceil(given.shift + abs(given.axis) + turn)) + 3


def simulated(data: Phantom, folder: Path, given: dict[str, Any], maps: TiltSeries,
              images: TiltSeries | None) -> tuple[TiltSeries, TiltSeries | None]:
    """A simulated series as `data.align` aligns it, cut to the specimen's field; without stages just cut.

    The volume is where the truth is: what a moved volume would show as well is told apart by what was planted.
    """
    series = {"haadf": images, "chem": maps} if images is not None else {"chem": maps}
    opened = {name: _recorded(each) for name, each in series.items() if each is not None}
    if data.align is not None:
        first = next(iter(opened.values()))
        found = stages.stage(folder, "align", stages.align_inputs_simulated(data, given),
                             lambda: _found_again(data, first))
        say(found)
        found = found | {"shifts": found["planted_shifts"] + found["apart"]}
        opened = {name: _moved(recording, found, recording is first) for name, recording in opened.items()}
    low, high = _margin(data), _margin(data) + data.size
    cut = regions.prepare(*opened.values(), crop={"y": [low, high], "x": [low, high]})
    known = {name: replace(each, noise=np.sqrt([each.projections.mean()]) if name == "haadf" else None)
             for name, each in zip(opened, cut, strict=True)}
    return known["chem"], known.get("haadf")


def _found_again(data: Phantom, recording: Recording) -> stages.Arrays:
    """The alignment of a simulated recording beside what was planted: apart, (tilt, 2), less a moved volume's."""
    images = (recording.projections - recording.background).sum(0, dtype=np.float32)
    found, true = aligned(images, recording.angles, data.align or []), planted(data, recording.angles)
    title = f"{data.phantom}, noise realisation {data.replicate}"
    return found | _told(title, data.align or [], recording.pixel_size) | {
        "planted_shifts": true.shifts, "planted_inplane": true.inplane,
                    "apart": registration.ungauged(found["shifts"] - true.shifts, recording.angles)}


def _recorded(series: TiltSeries) -> Recording:
    """A simulated series as if it had been read."""
    background = np.asarray(series.background, np.float32)
    return Recording(series.projections, series.angles, series.elements, series.units, np.zeros((series.tilts, 2)),
                     background.reshape((1,) * (4 - background.ndim) + background.shape), series.pixel_size,
                     "simulated")
