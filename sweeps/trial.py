"""The one function that runs on a worker: settings in, a row of the atlas out."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import fused3d, metrics, simulate
from engine.data import DataError, MultiModal, Solution, TiltSeries
from engine.phantoms import ELEMENTS, FIELD_NM
from sweeps import stages
from sweeps.grid import MAPS_ONLY
from sweeps.schema import Measured, Phantom
from sweeps.settings import SettingsError, Sweep, dump, load

Message = dict[str, Any]
VOLUME_AXES = ("element", "z", "y", "x")
Score = dict[str, Any]  # {"objective": float | None, "metrics": {...}, "elements": {name: {element: float}}}


def run(message: Message) -> dict[str, Any]:
    """Evaluate one trial: the message is what `sweeps.coordinator` submits, the result one of its journal's rows.

    A solve that fails, and data that cannot be read, give a row whose status is the sentence; nothing is raised.
    """
    begun = time.perf_counter()
    result: dict[str, Any] = {key: message[key] for key in ("cell", "trial", "attempt")}
    result |= {"status": "ok", "objective": None, "metrics": {}, "elements": {}, "checkpoints": [], "iterations": 0,
               "seconds": 0.0, "worker": "", "volume": None}
    try:
        sweep = load(message["settings"])
        solution, scored = _evaluate(sweep, Path(message["folder"]))
        result |= scored
        result["iterations"] = int(solution.metrics["iterations"])
        if not solution.ok:
            result |= {"status": solution.status, "objective": None}
        elif sweep.output.save != "none":
            result["volume"] = _write_volume(message, sweep, solution)
    except (DataError, SettingsError) as error:
        result["status"] = str(error)
    result["seconds"] = time.perf_counter() - begun
    return result


def _evaluate(sweep: Sweep, folder: Path) -> tuple[Solution, dict[str, Any]]:
    data = prepared(sweep, folder)
    if sweep.search.objective == "nrmse" and data.truth is None:
        raise DataError("the objective nrmse needs a truth; give data.truth, or search.objective: heldout")
    stops: dict[int, Score] = {}
    solution = fused3d.reconstruct(data, solver_settings(sweep), checkpoints=sweep.solver.record,
                                   observe=lambda n, volume: stops.update({n: _against_truth(volume, data)}))
    score = _against_truth(solution.volume, data)
    if sweep.search.objective == "heldout":
        held, stopped = _held_out(sweep, data)
        score = _merged(score, held)
        stops = {n: _merged(stops[n], stopped[n]) for n in sorted(stops.keys() & stopped.keys())}
    scored = [n for n in stops if stops[n]["objective"] is not None]
    if sweep.solver.method in MAPS_ONLY and scored:
        # ML and SIRT are as good as the iteration they are stopped at: the volume and the score are the best one's.
        best = min(scored, key=lambda n: stops[n]["objective"])
        score = {**stops[best], "metrics": {**stops[best]["metrics"], "best_iteration": best}}
        if best < solution.metrics["iterations"]:
            early = fused3d.reconstruct(data, replace(solver_settings(sweep), iterations=best))
            solution = replace(solution, volume=early.volume)
    return solution, {**score, "checkpoints": [{"iterations": n, **stops[n]} for n in sorted(stops)]}


def _merged(truth: Score, held: Score) -> Score:
    """The score against a truth, if there is one, with the held-out deviance as the objective."""
    return {"objective": held["objective"], "metrics": truth["metrics"] | held["metrics"],
            "elements": truth["elements"]}


def _held_out(sweep: Sweep, data: MultiModal) -> tuple[Score, dict[int, Score]]:
    """Deviance per pixel of maps that the solve has not seen, at the end and at each checkpoint.

    Every k-th tilt in turn is left out, k = search.folds.
    """
    folds = sweep.search.folds
    found: dict[int, list[float]] = {n: [] for n in sweep.solver.record}
    last: list[float] = []
    for fold in range(folds):
        out = tuple(range(fold, data.chem.tilts, folds))
        volumes: dict[int, np.ndarray] = {}
        solution = fused3d.reconstruct(data, solver_settings(sweep), checkpoints=sweep.solver.record,
                                       observe=volumes.__setitem__, held_out=out)
        if not solution.ok:
            raise DataError(f"without maps {', '.join(map(str, out))}: {solution.status}")
        sensitivity = sensitivities(solution, data)
        for n, volume in volumes.items():
            found[n].append(deviance(data, volume, sensitivity, out))
        last.append(deviance(data, solution.volume, sensitivity, out))
    return _summary(last), {n: _summary(values) for n, values in found.items()}


def _summary(folds: list[float]) -> Score:
    """The mean over folds, its standard error, and each fold, for paired comparisons."""
    mean = float(np.mean(folds))
    error = float(np.std(folds, ddof=1) / np.sqrt(len(folds)))
    single = {f"heldout_fold_{k}": value for k, value in enumerate(folds)}
    return {"objective": mean, "metrics": {"heldout": mean, "heldout_se": error, **single}, "elements": {}}


def deviance(data: MultiModal, volume: np.ndarray, sensitivity: np.ndarray, tilts: tuple[int, ...]) -> float:
    """Deviance per pixel of the maps at some tilts: Poisson for counts, squared error over variance otherwise."""
    index = list(tilts)
    expected = fused3d.predict(data, volume, sensitivity)[:, index]
    maps = data.chem.projections[:, index]
    if data.chem.units == "counts":
        return metrics.poisson_deviance(maps, expected) / maps.size
    noise = data.chem.noise_level()[:, None, None, None]
    return float(np.mean(((maps - expected) / noise) ** 2))


def sensitivities(solution: Solution, data: MultiModal) -> np.ndarray:
    """(element,) counts per voxel at concentration 1, as given or as the solver fitted them."""
    return np.array([solution.metrics[f"sensitivity_{element}"] for element in data.chem.elements])


def _against_truth(volume: np.ndarray, data: MultiModal) -> Score:
    if data.truth is None:
        return {"objective": None, "metrics": {}, "elements": {}}
    each = metrics.nrmse_elements(volume, data.truth)
    scale = metrics.scale_error(volume, data.truth)
    mean = float(each.mean())
    elements = data.chem.elements
    return {"objective": mean if np.isfinite(mean) else None, "metrics": {"nrmse": mean},
            "elements": {"nrmse": dict(zip(elements, map(float, each), strict=True)),
                         "scale_error": dict(zip(elements, map(float, scale), strict=True))}}


def solver_settings(sweep: Sweep) -> fused3d.Settings:
    """The engine's settings: the YAML's `solver`, less what only a sweep knows."""
    values = sweep.solver.model_dump()
    return fused3d.Settings(**{name: values[name] for name in fused3d.Settings.__dataclass_fields__})


def prepared(sweep: Sweep, folder: Path) -> MultiModal:
    """A cell's data: simulated or read once, then kept in memory and, simulated, under stages/."""
    data = sweep.data
    inputs = {"data": dump(sweep)["data"], "seed": sweep.seed}
    if isinstance(data, Measured):
        return _Recent.get(stages.key("measured", inputs), lambda: stages.measured_data(data))
    simulated = data
    gamma = simulated.gamma if simulated.gamma is not None else sweep.solver.gamma
    inputs |= {"gamma": gamma, "weights": sweep.solver.weights}
    return _Recent.get(stages.key("simulated", inputs), lambda: _simulate(simulated, folder, inputs))


class _Recent:
    """The last cells' data: trials of a cell stick to a worker, so a few are enough."""

    kept: dict[str, MultiModal] = {}
    limit = 3

    @classmethod
    def get(cls, name: str, make: Callable[[], MultiModal]) -> MultiModal:
        """What is kept under a name, made if need be; the oldest goes."""
        if name not in cls.kept:
            while len(cls.kept) >= cls.limit:
                cls.kept.pop(next(iter(cls.kept)))
            cls.kept[name] = make()
        return cls.kept[name]


def _simulate(data: Phantom, folder: Path, inputs: dict[str, Any]) -> MultiModal:
    """A simulated measurement; its noise follows from the sweep's seed and the data settings alone."""
    elements = ELEMENTS[data.phantom]
    volume = stages.truth(folder, data)
    low, high = data.tilt_range
    haadf = simulate.spread((low, high), data.haadf_tilts)
    chem = simulate.chemical_angles((low, high), data.haadf_tilts, data.chem_tilts, data.chem_angles)
    # snr.chem scales the mean counts, and so SNR - 1, of all elements together.
    snr = {element: 1 + data.snr["chem"] * (data.snr[element] - 1) for element in elements}
    seed = [inputs["seed"], data.replicate, zlib.crc32(stages.key("noise", inputs).encode())]

    def make() -> stages.Arrays:
        made = simulate.multimodal(
            volume, tuple(elements.values()), tuple(elements), pixel_size=FIELD_NM / data.size, haadf_angles=haadf,
            chem_angles=chem, snr=snr | {"haadf": data.snr["haadf"]}, gamma=inputs["gamma"],
            background=data.background, background_known=data.background_known, weights=inputs["weights"], seed=seed)
        arrays = {"maps": made.chem.projections, "background": np.asarray(made.chem.background),
                  "sensitivity": np.asarray(made.sensitivity)}
        if made.haadf is not None:
            arrays |= {"images": made.haadf.projections, "noise": np.asarray(made.haadf.noise)}
        return arrays

    arrays = stages.stage(folder, "simulate", inputs, make)
    pixel = FIELD_NM / data.size
    maps = TiltSeries(arrays["maps"], chem, tuple(elements), pixel, "counts", arrays["background"])
    images = None
    if "images" in arrays:
        images = TiltSeries(arrays["images"], haadf, ("HAADF",), pixel, "intensity", noise=arrays["noise"])
    return MultiModal(maps, images, tuple(elements.values()), (data.size,) * 3, arrays["sensitivity"], volume)


def _write_volume(message: Message, sweep: Sweep, solution: Solution) -> str:
    """The solution as a Zarr group of this trial alone; returns its path within the run folder."""
    import zarr

    name = f"volumes/{message['cell']}-{message['trial']}-{message['attempt']}.zarr"
    group = zarr.open_group(Path(message["folder"]) / name, mode="w", zarr_format=3)
    volume = solution.volume
    group.create_array("volume", data=volume, chunks=(1, *volume.shape[1:]),
                       dimension_names=VOLUME_AXES)
    for field, array in solution.fields.items():
        names = VOLUME_AXES[-array.ndim:] if array.shape == volume.shape[-array.ndim:] else (
            f"{field}_{axis}" for axis in range(array.ndim))
        group.create_array(f"field_{field}", data=array, dimension_names=tuple(names))
    for term, values in solution.history.items():
        group.create_array(f"history_{term}", data=values.astype(np.float64), dimension_names=("iteration",))
    data = prepared(sweep, Path(message["folder"]))
    group.attrs.update({"elements": list(data.chem.elements), "voxel_nm": data.chem.pixel_size,
                        "metrics": solution.metrics, "status": solution.status})
    return name
