"""`python -m tests.bench_equal_dose`: many slices, one slice and the dark field at equal dose, each at its best weight.

The weights of total variation are chosen on one particle and judged on three others, which are larger.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from engine import adf, diffraction, mset
from engine.data import Solution, TiltSeries
from engine.diffraction import DiffractionSeries, Scan
from engine.tracing import Comparison
from tests.bench import publish
from tests.bench_mset import WINDOW, Case, focused

DOSES = (None, 2e5)
WEIGHTS = (3e-7, 1e-6, 3e-6)  # [1 / V]
DARK_WEIGHTS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2)  # in the images' root mean square; 0.1 was worse at 2e5 e/A^2
METHODS = {"MSET": {"binning": 8, "finer": 2}, "SSET": {"binning": 0, "finer": 2}}
ITERATIONS = {48: 15, 64: 8}  # by the size of the volume; more changed RMSD by 0.02 pm at 2e5 e/A^2
CHOOSING = Case("cuau", 0.65, 48, 12, 8, seed=3)
JUDGING = [Case("cuau", 0.9, 64, 20, 16, seed=seed) for seed in range(3)]


@dataclass(frozen=True)
class Data:
    """What is measured of one particle, without noise."""

    case: Case
    patterns: DiffractionSeries
    images: TiltSeries

    @staticmethod
    def of(case: Case) -> Data:
        scan = Scan(case.size, probes=case.probes)
        return Data(case, diffraction.simulate(case.atoms, scan, case.angles),
                    adf.simulate(case.atoms, focused(case.size), case.angles, WINDOW))


@dataclass(frozen=True)
class Found:
    """One solve and what tracing made of it."""

    weight: float
    atoms: Comparison | None
    seconds: float

    @property
    def rmsd(self) -> float:
        """[pm]; infinite where a tenth of the atoms or more are false or missing."""
        return np.inf if self.atoms is None or self.atoms.tracing_error >= 0.1 else self.atoms.rmsd


def solved(data: Data, method: str, dose: float | None, weight: float) -> Found:
    """One solve; its CPU seconds with compilation."""
    solve: Callable[[], Solution]
    if method in METHODS:
        series = data.patterns if dose is None else diffraction.with_dose(data.patterns, dose)
        asked: dict[str, Any] = {"iterations": ITERATIONS[data.case.size], "lambda_tv": weight, **METHODS[method]}
        solve = partial(mset.reconstruct, series, mset.Settings(**asked))
    else:
        images = data.images if dose is None else adf.with_dose(data.images, dose)
        asked = {"method": method, "lambda_tv": weight}
        solve = partial(adf.reconstruct, images, adf.Settings(**asked))
    begun = time.process_time()
    volume = solve().volume[0]
    found = Found(weight, data.case.scored(volume, data.patterns.pixel), time.process_time() - begun)
    print(method, dose, f"{weight:g} {found.rmsd:.2f} pm {found.seconds:.0f} s", flush=True)
    return found


def weights(method: str) -> tuple[float, ...]:
    """That a method is tried with."""
    return WEIGHTS if method in METHODS else DARK_WEIGHTS if method == "resire" else (0.0,)


def chosen() -> tuple[list[str], dict[tuple[str, float | None], float]]:
    """A table of RMSD over the weights, and the best of each method and dose."""
    data, rows, best = Data.of(CHOOSING), ["| dose [e/Å²] | method | RMSD [pm] at lambda_tv |", "|---|---|---|"], {}
    for dose in DOSES:
        for method in (*METHODS, "resire", "genfire"):
            tried = [solved(data, method, dose, weight) for weight in weights(method)]
            best[method, dose] = min(tried, key=lambda found: found.rmsd).weight
            cells = ", ".join(f"{found.rmsd:.2f} at {found.weight:g}" for found in tried)
            rows.append(f"| {named(dose)} | {method} | {cells} |")
    return rows, best


def judged(best: dict[tuple[str, float | None], float]) -> list[str]:
    """A table over doses and methods: RMSD of each particle and its mean, the worst of the rest."""
    rows = ["| dose [e/Å²] | method | lambda_tv | RMSD [pm] of each particle | mean | tracing error [%] | "
            "classification [%] | CPU s |", "|" + "---|" * 8]
    found: dict[tuple[str, float | None], list[Found]] = {key: [] for key in best}
    for case in JUDGING:
        data = Data.of(case)
        for (method, dose), weight in best.items():
            found[method, dose].append(solved(data, method, dose, weight))
    for (method, dose), each in found.items():
        errors, rightly = ([getattr(f.atoms, name) for f in each if f.atoms is not None]
                           for name in ("tracing_error", "classification"))
        rows.append(f"| {named(dose)} | {method} | {best[method, dose]:g} | "
                    f"{', '.join(f'{f.rmsd:.2f}' for f in each)} | {np.mean([f.rmsd for f in each]):.2f} | "
                    f"{100 * max(errors):.1f} | {100 * min(rightly):.1f} | {np.mean([f.seconds for f in each]):.0f} |")
    return rows


def named(dose: float | None) -> str:
    return "none" if dose is None else f"{dose:.0e}"


def main() -> None:
    """Write the section."""
    begun = time.process_time()
    table, best = chosen()
    result, layers = judged(best), METHODS["MSET"]["binning"]
    publish("Multislice tomography at equal dose", "\n".join([
        "Cu core, Au shell, voxels of 0.4 Å, 300 kV, 21 mrad, defocus -20 nm. MSET with slices of "
        f"{0.4 * layers:.1f} Å, waves of two pixels in a voxel's edge (`finer: 2`), SSET too; {ITERATIONS[48]} "
        f"iterations at 48^3, {ITERATIONS[64]} at 64^3, whose scan has more patterns. resire "
        f"({adf.Settings.iterations} iterations, momentum, TV) and genfire: linear tomography of the dark field. A "
        "dose is of the whole series and alike for all.", "",
        f"The weight of TV is chosen for each method on a particle of {len(CHOOSING.atoms)} atoms in 48^3 voxels, "
        "12 tilts, 8 x 8 probes:", "", *table, "",
        "and judged on three others of "
        f"{', '.join(str(len(case.atoms)) for case in JUDGING)} atoms in 64^3, 20 tilts, 16 x 16 probes (tracing error "
        f"and classification: the worst of the three). {time.process_time() - begun:.0f} CPU s in all; on "
        f"{len(os.sched_getaffinity(0))} core(s).", "", *result]))


if __name__ == "__main__":
    main()
