"""`python -m tests.bench_mset`: multislice tomography of small particles beside one slice and the dark field."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from engine import adf, diffraction, mset
from engine.atoms import Atoms, Model, nanoparticle
from engine.data import DataError, TiltSeries
from engine.diffraction import DiffractionSeries, Scan
from engine.multislice import Optics
from engine.tracing import Comparison, compare, trace
from tests.bench import publish

TV = 1e-6  # [1 / V]
WINDOW = 0.96  # [nm] around a focused probe
HEAD = ("| | dose [e/Å²] | RMSD [pm] | tracing error [%] | classification [%] | heavy / light found | CPU s "
        "|\n" + "|---" * 7 + "|")


@dataclass(frozen=True)
class Case:
    """A particle [nm] in so many voxels of 0.4 Å along an edge, and its series; doses [e/Å^2] of the whole of it.

    more: further rows without noise, with defocus [nm] and probes along an edge.
    """

    model: Model
    radius: float
    size: int
    tilts: int
    probes: int
    doses: tuple[float | None, ...] = ()
    solves: dict[str, dict[str, float]] = field(default_factory=dict)
    more: tuple[tuple[str, float, int], ...] = ()
    seed: int = 0  # of the particle's shape

    @cached_property
    def atoms(self) -> Atoms:
        return nanoparticle(self.model, self.radius, seed=self.seed)

    @property
    def angles(self) -> np.ndarray:
        return np.linspace(-90, 90, self.tilts, endpoint=False)

    def scored(self, volume: np.ndarray, pixel: float) -> Comparison | None:
        """What tracing inside the particle finds; None where no three atoms stand out."""
        light, heavy = {"cuau": ("Cu", "Au"), "bao": ("O", "Ba")}[self.model]
        try:
            return compare(trace(volume, pixel, masked=True).atoms(light, heavy), self.atoms)
        except DataError:
            return None

    def row(self, name: str, dose: float | None, pixel: float, solve: Callable[[], np.ndarray]) -> str:
        """One solve, scored; its CPU seconds with compilation."""
        begun = time.process_time()
        volume = solve()
        seconds = time.process_time() - begun
        found = self.scored(volume, pixel)
        cells = ["-"] * 4 if found is None else [
            f"{found.rmsd:.2f}", f"{100 * found.tracing_error:.1f}", f"{100 * found.classification:.1f}",
            " / ".join(str(found.found[s]) for s in sorted(found.found, key=("Au", "Ba", "Cu", "O").index))]
        line = " | ".join(["", name, "none" if dose is None else f"{dose:.0e}", *cells, f"{seconds:.1f}", ""]).strip()
        print(line, flush=True)
        return line


SOLVES: dict[str, dict[str, float]] = {
    "MSET, slices of 1.6 Å": {"binning": 4}, "MSET, slices of 1.6 Å, TV": {"binning": 4, "lambda_tv": TV},
    "MSET, slices of 1.6 Å, TV, finer 2": {"binning": 4, "lambda_tv": TV, "finer": 2},
    "SSET": {"binning": 0}, "SSET, TV": {"binning": 0, "lambda_tv": TV},
    "SSET, TV, finer 2": {"binning": 0, "lambda_tv": TV, "finer": 2}}
CASES = (Case("cuau", 0.65, 48, 12, 8, (None, 2e6, 2e5, 2e4), SOLVES,
              (("MSET", -20.0, 8), ("MSET, zero defocus", 0.0, 8), ("MSET, zero defocus, steps of 6.4 Å", 0.0, 3))),
         Case("bao", 0.75, 48, 12, 8, (2e6, 2e5), SOLVES))


def patterns(series: DiffractionSeries, settings: dict[str, float]) -> Callable[[], np.ndarray]:
    return lambda: mset.reconstruct(series, mset.Settings(**settings)).volume[0]  # type: ignore[arg-type]


def images(series: TiltSeries, method: str) -> Callable[[], np.ndarray]:
    return lambda: adf.reconstruct(series, adf.Settings(method)).volume[0]  # type: ignore[arg-type]


def focused(size: int) -> Scan:
    """The dark field's own scan: a probe at every voxel, in focus at half depth, of atoms at rest."""
    scan = Scan(size, probes=size, finer=5, slices=0.2, thermal=0.0)
    return replace(scan, optics=Optics(defocus=size * scan.pixel / 2))


def table(case: Case) -> Iterator[str]:
    """How long the simulation of one specimen took, then its rows."""
    atoms, begun = case.atoms, time.process_time()
    series = diffraction.simulate(atoms, Scan(case.size, probes=case.probes), case.angles)
    simulated = time.process_time() - begun
    dark = adf.simulate(atoms, focused(case.size), case.angles, WINDOW)
    print(f"{case.model}, {case.size}^3", flush=True)
    yield (f"{case.model}, {case.size}^3, {case.tilts} tilts, {case.probes} x {case.probes} probes, "
           f"{' + '.join(f'{(atoms.symbols == s).sum()} {s}' for s in np.unique(atoms.symbols))} atoms; simulated in "
           f"{simulated:.0f} CPU s, the dark field in {time.process_time() - begun - simulated:.0f}:\n\n{HEAD}")
    for dose in case.doses:
        counted = series if dose is None else diffraction.with_dose(series, dose)
        bright = dark if dose is None else adf.with_dose(dark, dose)
        for name, settings in case.solves.items():
            yield case.row(name, dose, series.pixel, patterns(counted, settings))
        for method in ("resire", "genfire"):
            yield case.row(f"ADF, {method}", dose, series.pixel, images(bright, method))
    for name, defocus, probes in case.more:
        again = diffraction.simulate(atoms, Scan(case.size, probes=probes, optics=Optics(defocus=defocus)), case.angles)
        yield case.row(name, None, again.pixel, patterns(again, {}))
    yield ""


def main() -> None:
    """Write the section."""
    begun = time.process_time()
    rows = [row for case in CASES for row in table(case)]
    default = mset.Settings()
    publish("Multislice tomography", "\n".join([
        f"Voxels of 0.4 Å, 300 kV, 21 mrad, defocus -20 nm unless it is zero; {default.iterations} iterations, slices "
        f"of 0.4 Å unless said, TV: lambda_tv {TV:g}; finer 2: waves of two pixels in a voxel's edge. ADF: "
        f"{adf.Settings.iterations} iterations as in the paper, resire with momentum; a probe at every voxel, in "
        f"focus, atoms at rest, 40 to {focused(48).reach:.0f} mrad. "
        "A dose is of the whole series and alike for all methods; none: no noise. Atoms are traced inside the "
        "particle, as the paper does for BaO. Found: with the right element. CPU seconds with compilation, "
        f"{time.process_time() - begun:.0f} in all; on "
        f"{len(os.sched_getaffinity(0))} core(s).", "", *rows]))


if __name__ == "__main__":
    main()
