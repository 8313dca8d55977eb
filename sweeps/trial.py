"""The one function that runs on a worker: settings in, rows of the atlas out."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import fused3d, heldout, metrics, programs, responses
from engine.data import DataError, DataWarning, MultiModal, Solution
from engine.halves import correlations
from engine.iterate import Keep
from engine.sizes import bucket
from sweeps import halves, needs, scanned, sequential, stages
from sweeps.grid import STOPPED, maps_alone
from sweeps.patterns import OF_PATTERNS
from sweeps.rules import elements
from sweeps.scores import SYSTEMS, Judge, Score, sensitivities
from sweeps.settings import SettingsError, Sweep, dump, load
from sweeps.specimens import candidates, inputs, prepared, recent

Message = dict[str, Any]
VOLUME_AXES = ("element", "z", "y", "x")
EMPTY: dict[str, Any] = {"status": "ok", "objective": None, "metrics": {}, "elements": {}, "checkpoints": [],
                         "iterations": 0, "seconds": 0.0, "batch": 1, "worker": "", "volume": None, "notes": []}


def run(message: Message) -> list[dict[str, Any]]:
    """Evaluate trials of one cell: the message is what `sweeps.coordinator` submits, a result a row of its journal.

    Trials that a solver can take together are solved together, and share its seconds. A solve that fails, and data
    that cannot be read, give a row whose status is the sentence; nothing is raised. Of a message that asks for `help`
    only what the trials are made of is made.
    """
    programs.share()
    trials = message["trials"]
    if message.get("help"):
        return [_helped(trial["settings"], Path(message["folder"])) for trial in trials]
    rows = [{"cell": message["cell"], **{key: trial[key] for key in ("trial", "attempt")}, **EMPTY} for trial in trials]
    batches: dict[str, list[tuple[int, Sweep]]] = {}
    for k, trial in enumerate(trials):
        try:
            sweep = load(trial["settings"])
            batches.setdefault(_alike(sweep), []).append((k, sweep))
        except SettingsError as error:
            rows[k]["status"] = str(error)
    for batch in batches.values():
        begun = time.perf_counter()
        numbers, sweeps = zip(*batch, strict=True)
        with _noted() as notes:
            found = _rows(sweeps, Path(message["folder"]), [_volume_name(rows[k]) for k in numbers],
                          f"{message['cell']}-{'-'.join(str(rows[k]['trial']) for k in numbers)}")
        seconds = (time.perf_counter() - begun) / len(batch)
        for k, row in zip(numbers, found, strict=True):
            rows[k] |= {**row, "seconds": seconds, "batch": len(batch), "notes": list(notes)}
    return rows


def _helped(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What became of helping with another worker's trial; that one's row will tell more."""
    begun, status = time.perf_counter(), "ok"
    try:
        sequential.help_along(load(settings), folder)
    except DataError as error:
        status = str(error)
    return {"status": status, "seconds": time.perf_counter() - begun}


@contextmanager
def _noted() -> Iterator[list[str]]:
    """What is said of the data meanwhile (DataWarning), once each; every warning goes to the log as well."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        yield notes
    for each in caught:
        sys.stderr.write(warnings.formatwarning(each.message, each.category, each.filename, each.lineno))
        if isinstance(each.message, DataWarning) and str(each.message) not in notes:
            notes.append(str(each.message))


def _rows(sweeps: Sequence[Sweep], folder: Path, names: Sequence[str], batch: str) -> list[dict[str, Any]]:
    """What a batch gives, trial by trial; where its data cannot be had, nothing but a status each.

    batch: a name of its own, the same in every attempt.
    """
    try:
        rows, evaluate = [], {"mset": scanned.evaluate, "mspt": sequential.evaluate}.get(sweeps[0].system, _evaluate)
        for sweep, name, (solution, scored) in zip(sweeps, names, evaluate(sweeps, folder, batch), strict=True):
            row = {"status": "ok", **scored, "iterations": int(solution.metrics["iterations"])}
            if not solution.ok:
                row |= {"status": solution.status, "objective": None}
            elif row["status"] == "ok" and sweep.output.save != "none":
                row["volume"] = _write_volume(folder, name, sweep, solution)
            rows.append(row)
        return rows
    except DataError as error:
        return [{"status": str(error)} for _ in sweeps]


def _alike(sweep: Sweep) -> str:
    """Equal for trials that share data and differ in numbers that a compiled solver takes as they come."""
    settings = dump(sweep)
    settings["solver"] |= dict.fromkeys(SYSTEMS[sweep.system].BATCHED if sweep.system in SYSTEMS else ())
    return str((settings, stages.key("data", inputs(sweep))))


def _evaluate(sweeps: Sequence[Sweep], folder: Path, batch: str) -> list[tuple[Solution, dict[str, Any]]]:
    """Solutions and scores of trials that are `_alike`.

    A solve of many minutes leaves its state under partial/, and the next attempt goes on from there. One that records
    checkpoints does not: their scores would be lost.
    """
    sweep = sweeps[0]
    data = prepared(sweep, folder)
    if sweep.search.objective == "nrmse" and data.truth is None:
        raise DataError("the objective nrmse needs a truth; give data.truth, or search.objective: heldout")
    need = needs.solve(sweep, elements=len(data.chem.elements), shape=data.shape, chem_tilts=data.chem.tilts,
                       haadf_tilts=data.haadf.tilts if data.haadf else 0)
    needs.check_memory(sweep, need, len(sweeps))
    programs.about(f"{sweep.solver.method} {data.shape} {bucket(data.haadf.tilts if data.haadf else 0)} "
                   f"{bucket(data.chem.tilts)} {len(sweeps)}")
    passed: list[dict[int, Score]] = [{} for _ in sweeps]
    more = {"candidates": candidates(sweep, folder)} if sweep.system == "hebt" else {}
    chosen, record = [solver_settings(each) for each in sweeps], sweep.solver.record
    judge = Judge(sweep, data)
    if sweep.system == "fused3d" and not maps_alone(sweep):
        responses.check(data)
    keep = Keep(folder / "partial" / f"{batch}.npz", stages.key("solve", {"data": inputs(sweep), "solver": chosen}))
    solutions = SYSTEMS[sweep.system].reconstruct_batch(
        data, chosen, checkpoints=record, keep=None if record else keep,
        observe=lambda k, n, volume: passed[k].update({n: judge.against_truth(volume)}), **more)
    ends = [judge.score(solution) for solution in solutions]
    # What there is to say of the data has been said by now.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return _finished(judge, sweeps, chosen, solutions, ends, passed)


def _finished(judge: Judge, sweeps: Sequence[Sweep], chosen: list[Any], solutions: list[Solution], ends: list[Score],
              passed: list[dict[int, Score]]) -> list[tuple[Solution, dict[str, Any]]]:
    """Solutions and scores with what held-out maps say, stopped where they are best."""
    sweep, data = judge.sweep, judge.data
    if sweep.search.objective == "heldout":
        for k, (held, stopped) in enumerate(_held_out(sweeps, data)):
            ends[k] = _merged(ends[k], held)
            passed[k] = {n: _merged(passed[k][n], stopped[n]) for n in sorted(passed[k].keys() & stopped.keys())}
    return [_stopped(judge, *each) for each in zip(chosen, solutions, ends, passed, strict=True)]


def _stopped(judge: Judge, chosen: Any, solution: Solution, score: Score,
             stops: dict[int, Score]) -> tuple[Solution, dict[str, Any]]:
    """A trial's solution and score with its checkpoints, and what is kept beside its volume.

    SIRT and ML are as good as the iteration they are stopped at: their volume and score are the best one's.
    """
    scored = [n for n in stops if stops[n]["objective"] is not None]
    if chosen.method in STOPPED and scored:
        best = min(scored, key=lambda n: stops[n]["objective"])
        held = stops[best]
        if best < solution.metrics["iterations"]:
            early = judge.system.reconstruct(judge.data, replace(chosen, iterations=best))
            solution, score = replace(solution, volume=early.volume), judge.score(early)
        score = {**held, "metrics": score["metrics"] | held["metrics"] | {"best_iteration": best},
                 "elements": score["elements"] | held["elements"]}
    arrays = judge.arrays(solution)
    if judge.sweep.output.resolution and solution.ok:
        run = replace(_quiet(chosen), iterations=int(score["metrics"].get("best_iteration", chosen.iterations)))
        told, curves = halves.scores(correlations(judge.data, lambda half: judge.system.reconstruct(half, run)),
                                     judge.elements)
        score = score | {name: score[name] | told[name] for name in told}
        arrays |= curves
    solution = replace(solution, fields=solution.fields | arrays)
    return solution, {**score, "checkpoints": [{"iterations": n, **stops[n]} for n in sorted(stops)]}


def _quiet(chosen: Any) -> Any:
    """A solver's settings, without the standard errors that nobody will look at."""
    return replace(chosen, errors="none") if hasattr(chosen, "errors") else chosen


def _merged(truth: Score, held: Score) -> Score:
    """The score against a truth, if there is one, with the held-out deviance as the objective."""
    return {**held, "metrics": truth["metrics"] | held["metrics"], "elements": truth["elements"]}


@dataclass(frozen=True)
class _Fold:
    """A part of the maps that a solve does not see: other tilts of the same data, or other counts of all tilts.

    share: of the counts that the fit would have without it. exposure: sensitivity of the test over the training's.
    """

    without: str
    training: MultiModal
    test: MultiModal
    left_out: tuple[int, ...]
    share: float = 1.0
    exposure: float = 1.0

    def solve(self, system: Any, chosen: Sequence[Any], **options: Any) -> list[Solution]:
        """`reconstruct_batch` of the training part, TV's weight as fits its counts."""
        if self.training is self.test:
            options["held_out"] = self.left_out
        elif hasattr(chosen[0], "lambda_tv"):
            chosen = [replace(each, lambda_tv=heldout.weight(each.lambda_tv, self.share)) for each in chosen]
        found: list[Solution] = system.reconstruct_batch(self.training, chosen, **options)
        return found

    def score(self, volume: np.ndarray, solution: Solution) -> float:
        """The deviance of the part left out, at the scale that the training part gives the volume's elements."""
        chem, sensitivity = self.training.chem, sensitivities(solution, self.training)
        factors = solution.fields.get("tilt_factors", 1)
        unseen = self.left_out if self.training is self.test else ()
        fitted = [tilt for tilt in range(chem.tilts) if tilt not in unseen]
        signal, level = (a[:, fitted] for a in _expected(self.training, volume, sensitivity, factors))
        scale = heldout.scales(signal, level, chem.projections[:, fitted], chem.units == "counts")
        return deviance(self.test, volume, self.exposure * scale * sensitivity, self.left_out, factors)


def _folds(sweep: Sweep, data: MultiModal) -> Iterator[_Fold]:
    """Every k-th tilt in turn, k = search.folds, or in turn the k-th part of the counts."""
    count = sweep.search.folds
    if sweep.system == "fused2d" or sweep.search.heldout == "counts":
        parts = recent("thinned", inputs(sweep) | {"folds": count}, lambda: heldout.thinned(data, count, sweep.seed))
        for k, (training, test) in enumerate(parts):
            yield _Fold(f"part {k} of the counts", training, test, tuple(range(data.chem.tilts)), 1 - 1 / count,
                        1 / (count - 1))
    else:
        for fold in range(count):
            out = tuple(range(fold, data.chem.tilts, count))
            yield _Fold(f"maps {', '.join(map(str, out))}", data, data, out)


def _held_out(sweeps: Sequence[Sweep], data: MultiModal) -> list[tuple[Score, dict[int, Score]]]:
    """Per trial: the deviance per pixel of maps that the solve has not seen, at the end and at each checkpoint.

    A trial with a fold that fails has that as its status.
    """
    record, chosen = sweeps[0].solver.record, [_quiet(solver_settings(sweep)) for sweep in sweeps]
    last: list[list[float]] = [[] for _ in sweeps]
    found: list[dict[int, list[float]]] = [{n: [] for n in record} for _ in sweeps]
    wrong: dict[int, str] = {}
    for fold in _folds(sweeps[0], data):
        volumes: list[dict[int, np.ndarray]] = [{} for _ in sweeps]

        def keep(k: int, n: int, volume: np.ndarray, into: list[dict[int, np.ndarray]] = volumes) -> None:
            into[k][n] = volume

        system = SYSTEMS[sweeps[0].system]
        for k, solution in enumerate(fold.solve(system, chosen, checkpoints=record, observe=keep)):
            if not solution.ok:
                wrong.setdefault(k, f"without {fold.without}: {solution.status}")
            for n, volume in volumes[k].items():
                found[k][n].append(fold.score(volume, solution))
            last[k].append(fold.score(solution.volume, solution))
    failed: Score = {"objective": None, "metrics": {}, "elements": {}}
    return [({**failed, "status": wrong[k]}, {}) if k in wrong
            else (_summary(last[k]), {n: _summary(values) for n, values in found[k].items()})
            for k in range(len(sweeps))]


def _summary(folds: list[float]) -> Score:
    """The mean over folds, its standard error, and each fold, for paired comparisons."""
    mean = float(np.mean(folds))
    error = float(np.std(folds, ddof=1) / np.sqrt(len(folds)))
    single = {f"heldout_fold_{k}": value for k, value in enumerate(folds)}
    return {"objective": mean, "metrics": {"heldout": mean, "heldout_se": error, **single}, "elements": {}}


def deviance(data: MultiModal, volume: np.ndarray, sensitivity: np.ndarray, tilts: tuple[int, ...],
             factors: np.ndarray | float = 1) -> float:
    """Deviance per pixel of the maps at some tilts: Poisson for counts, squared error over variance otherwise.

    factors: (element, tilt) that the solver multiplied the maps by.

    Counts are expected everywhere, FAINT of a map's mean at least: else a pixel where none are would decide alone.
    """
    index = list(tilts)
    signal, background = _expected(data, volume, sensitivity, factors)
    expected, maps = (signal + background)[:, index], data.chem.projections[:, index]
    if data.chem.units == "counts":
        expected = np.maximum(expected, heldout.FAINT * expected.mean((1, 2, 3), keepdims=True))
        return metrics.poisson_deviance(maps, expected) / maps.size
    noise = data.chem.noise_level()[:, None, None, None]
    return float(np.mean(((maps - expected) / noise) ** 2))


def _expected(data: MultiModal, volume: np.ndarray, sensitivity: np.ndarray,
              factors: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """What the maps are expected to be, (element, tilt, y, x): the signal, and the background."""
    expected = fused3d.predict(data, volume, sensitivity)
    background = np.broadcast_to(data.chem.background, expected.shape)
    return (expected - background) / np.broadcast_to(factors, expected.shape[:2])[..., None, None], background


def solver_settings(sweep: Sweep) -> Any:
    """The engine's settings for the sweep's system: the YAML's `solver`, less what only a sweep knows."""
    values, kind = sweep.solver.model_dump(), SYSTEMS[sweep.system].Settings
    if values.get("responses"):
        values["responses"] = tuple(values["responses"][name] for name in elements(sweep))
    return kind(**{name: values[name] for name in kind.__dataclass_fields__})


def _axes(field: str, shape: tuple[int, ...], volume: tuple[int, ...]) -> tuple[str, ...]:
    """Names of a field's axes: the volume's where it has them, in front perhaps fewer elements."""
    count = len(shape)
    if shape == volume[-count:]:
        return VOLUME_AXES[-count:]
    if shape[1:] == volume[1:]:
        return (f"{field}_element", *VOLUME_AXES[1:])
    return tuple(f"{field}_{axis}" for axis in range(count))


def _volume_name(row: dict[str, Any]) -> str:
    return f"volumes/{row['cell']}-{row['trial']}-{row['attempt']}.zarr"


def _write_volume(folder: Path, name: str, sweep: Sweep, solution: Solution) -> str:
    """The solution as a Zarr group of one trial alone; returns its path within the run folder."""
    import zarr

    group = zarr.open_group(folder / name, mode="w", zarr_format=3)
    volume = solution.volume
    slab = (1, stages.planes(volume.shape[1:]), *volume.shape[2:])
    group.create_array("volume", data=volume, chunks=slab, dimension_names=VOLUME_AXES)
    for field, array in solution.fields.items():
        alike = array.shape[-3:] == volume.shape[1:]
        group.create_array(f"field_{field}", data=array, chunks=slab[-array.ndim:] if alike else array.shape,
                           dimension_names=_axes(field, array.shape, volume.shape))
    for term, values in solution.history.items():
        group.create_array(f"history_{term}", data=values.astype(np.float64), dimension_names=("iteration",))
    if sweep.system in OF_PATTERNS:
        elements, voxel = scanned.described(sweep, folder)
    else:
        chem = prepared(sweep, folder).chem
        elements, voxel = chem.elements, chem.pixel_size
    tops = [float(top) or 1.0 for top in volume.max((1, 2, 3))]  # for viewers, whose window is not empty
    group.attrs.update({"elements": list(elements), "voxel_nm": voxel, "metrics": solution.metrics, "maxima": tops,
                        "status": solution.status})
    return name
