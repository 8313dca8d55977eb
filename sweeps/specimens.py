"""A cell's data: simulated, or read from files, once for all its trials. Imports JAX: for `sweeps.trial` alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engine import phantoms2d, phantoms_hebt, physics, signals, simulate
from engine.data import MultiModal, TiltSeries
from engine.phantoms import ELEMENTS
from sweeps import aligned, fractions, stages
from sweeps.schema import Fused3D, Particle, Phantom
from sweeps.settings import Sweep, dump
from sweeps.sources import Measured


def prepared(sweep: Sweep, folder: Path) -> MultiModal:
    """A cell's data: simulated or read once, then kept in memory and, simulated, under stages/."""
    data, given = sweep.data, inputs(sweep)
    if isinstance(data, Measured):
        measured = data
        return recent("measured", given, lambda: stages.measured_data(
            measured, aligned.recordings(measured, folder), flat=sweep.system == "fused2d"))
    assert isinstance(data, Phantom | Particle)
    simulated = data
    return recent("simulated", given, lambda: _simulated(simulated, folder, given))


def candidates(sweep: Sweep, folder: Path) -> TiltSeries | None:
    """Maps of `data.chem.candidates`, aligned as those of the elements are; None where there are none."""
    data = sweep.data
    if not isinstance(data, Measured) or data.chem.candidates is None:
        return None
    update = {"elements": data.chem.candidates, "candidates": None}
    others = data.model_copy(update={"chem": data.chem.model_copy(update=update), "sensitivity": None, "truth": None})
    return prepared(sweep.model_copy(update={"data": others}), folder).chem


def inputs(sweep: Sweep) -> dict[str, Any]:
    """All that a cell's data follow from."""
    given = {"data": dump(sweep)["data"], "seed": sweep.seed}
    if not isinstance(sweep.data, Phantom):
        return given
    # The HAADF of a phantom of F3 is made as the solver has it; HEBT's has no powers, and takes F3's.
    solver = sweep.solver if isinstance(sweep.solver, Fused3D) else Fused3D()
    gamma = sweep.data.gamma if sweep.data.gamma is not None else solver.gamma
    return given | {"gamma": gamma, "weights": phantoms2d.WEIGHTS.get(sweep.data.phantom, solver.weights)}


KEPT = 3  # cells' data in memory: trials of a cell stick to a worker, so a few are enough
_kept: dict[str, Any] = {}
Data = TypeVar("Data")


def recent(name: str, given: dict[str, Any], make: Callable[[], Data]) -> Data:
    """What is kept under a name and all that it follows from, made if need be; the oldest goes."""
    key = stages.key(name, given)
    if key not in _kept:
        while len(_kept) >= KEPT:
            _kept.pop(next(iter(_kept)))
        _kept[key] = make()
    found: Data = _kept[key]
    return found


def _simulated(data: Phantom | Particle, folder: Path, given: dict[str, Any]) -> MultiModal:
    """A simulated measurement; its noise follows from the sweep's seed and the data settings alone."""
    elements = phantoms_hebt.ELEMENTS if isinstance(data, Particle) else ELEMENTS[data.phantom]
    truth = stages.truth(folder, data)
    flat = data.phantom in phantoms2d.ELEMENTS
    pixel = stages.voxel(data)
    low, high = (0.0, 0.0) if flat else data.tilt_range
    haadf = simulate.spread((low, high), data.haadf_tilts)
    chem = simulate.chemical_angles((low, high), data.haadf_tilts, data.chem_tilts, data.chem_angles)
    given = aligned.unaligned(given)
    seed = [given["seed"], data.replicate, zlib.crc32(stages.key("noise", given).encode())]

    def make() -> stages.Arrays:
        if isinstance(data, Particle):
            made = _measured(data, truth, pixel, chem, haadf, seed)
        else:
            series: dict[str, Any] = {} if flat else {"haadf_angles": haadf, "chem_angles": chem}
            specimen = truth
            if data.misalign is not None:
                series |= {"place": aligned.placed(data), "fine": aligned.FINE}
                specimen = stages.truth(folder, data, aligned.FINE)
            made = _noisy(data, given, specimen, pixel, series, seed)
        arrays = {"maps": made.chem.projections, "background": np.asarray(made.chem.background),
                  "sensitivity": np.asarray(made.sensitivity)}
        if made.haadf is not None:
            arrays |= {"images": made.haadf.projections, "noise": np.asarray(made.haadf.noise)}
        return arrays

    arrays = stages.stage(folder, "simulate", given, make)
    maps = TiltSeries(arrays["maps"], chem, tuple(elements), pixel, "counts", arrays["background"])
    images = None
    if "images" in arrays:
        images = TiltSeries(arrays["images"], haadf, ("HAADF",), pixel,
                            "counts" if flat or isinstance(data, Particle) else "intensity", noise=arrays["noise"])
    if isinstance(data, Phantom) and (data.misalign is not None or data.align is not None):
        maps, images = aligned.simulated(data, folder, given, maps, images)
    return MultiModal(maps, images, tuple(elements.values()), truth.shape[1:], arrays["sensitivity"], truth)


def _noisy(data: Phantom, given: dict[str, Any], truth: np.ndarray, pixel: float, series: dict[str, Any],
           seed: list[int]) -> MultiModal:
    """Counts of a given SNR."""
    elements = ELEMENTS[data.phantom]
    # snr.chem scales the mean counts, and so SNR - 1, of all elements together.
    snr = {element: 1 + data.snr["chem"] * (data.snr[element] - 1) for element in elements}
    return (simulate.multimodal if series else simulate.microscopy)(
        truth, tuple(elements.values()), tuple(elements), pixel_size=pixel, snr=snr | {"haadf": data.snr["haadf"]},
        gamma=given["gamma"], background=data.background, background_known=data.background_known,
        weights=given["weights"], seed=seed, **series)


def _measured(data: Particle, truth: np.ndarray, pixel: float, chem: np.ndarray, haadf: np.ndarray,
              seed: list[int]) -> MultiModal:
    """Counts of a given dose; concentrations are in mol/cm^3, of which the sensitivities are told."""
    weight = physics.atomic_weights(tuple(phantoms_hebt.ELEMENTS))
    lines = physics.emissions(tuple(phantoms_hebt.ELEMENTS), phantoms_hebt.BEAM_KEV, phantoms_hebt.LINES)
    made = signals.bimodal(
        truth * weight[:, None, None, None].astype(np.float32), lines, pixel_size=pixel, chem_angles=chem,
        haadf_angles=haadf, dose=data.dose, haadf_dose=data.haadf_dose, solid_angle=data.solid_angle,
        efficiency=fractions.ordered(data.efficiency, tuple(phantoms_hebt.ELEMENTS)), collected=data.collected,
        background=data.background, seed=seed)
    assert made.sensitivity is not None
    return replace(made, sensitivity=made.sensitivity * weight, truth=truth)
