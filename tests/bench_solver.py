"""`python -m tests.bench_solver`: CPU seconds to one quality, for the paper's descent, FISTA and our solver.

One specimen, one noise, one set of weights, one TV code. The target is the NRMSE that the plain proximal gradient
(step 1/L by power iteration, 20 cold TV steps) has after 400 iterations.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from engine import fused3d, metrics, simulate
from engine.data import MultiModal
from engine.phantoms import ELEMENTS, FIELD_NM, phantom
from sweeps.schema import SNR
from tests.bench import publish

PLAIN_ITERATIONS = 400
REPEATS = 5
WEIGHTS = {"lambda_model": 0.1, "lambda_chem": 1.0, "lambda_tv": 0.5}


@dataclass(frozen=True)
class Track:
    """NRMSE at each iteration recorded, CPU seconds of one iteration and of the start."""

    nrmse: dict[int, float]
    per_iteration: float
    start: float

    def reaches(self, target: float) -> int | None:
        """The first recorded iteration at or below a NRMSE."""
        return next((n for n, value in sorted(self.nrmse.items()) if value <= target), None)

    def cpu(self, iterations: int) -> float:
        """CPU seconds of a solve of so many iterations."""
        return self.start + iterations * self.per_iteration


def specimen(size: int, haadf: int = 47, chem: int = 9) -> MultiModal:
    """The reference specimen at F3's signal-to-noise ratios."""
    elements = ELEMENTS["cocuo"]
    span = (-70.0, 70.0)
    return simulate.multimodal(
        phantom("cocuo", (size,) * 3, FIELD_NM / size), tuple(elements.values()), tuple(elements),
        pixel_size=FIELD_NM / size, haadf_angles=simulate.spread(span, haadf),
        chem_angles=simulate.chemical_angles(span, haadf, chem), snr=SNR["cocuo"])


def track(data: MultiModal, method: str, iterations: int, every: int) -> Track:
    """Run a method once for its quality, then short solves for its time; compilation is left out."""
    settings = fused3d.Settings(method=method, iterations=iterations, **WEIGHTS)  # type: ignore[arg-type]
    nrmse: dict[int, float] = {}
    fused3d.reconstruct(data, settings, checkpoints=range(every, iterations + 1, every),
                        observe=lambda n, v: nrmse.update({n: float(metrics.nrmse_elements(v, data.truth).mean())}))
    few, many = 2, 12
    return Track(nrmse, (_cpu(data, settings, many) - _cpu(data, settings, few)) / (many - few),
                 _cpu(data, settings, few) - few * (_cpu(data, settings, many) - _cpu(data, settings, few))
                 / (many - few))


def _cpu(data: MultiModal, settings: fused3d.Settings, iterations: int) -> float:
    """Median CPU seconds, over all threads, of a whole solve."""
    short = fused3d.Settings(**{**settings.__dict__, "iterations": iterations})
    times = []
    for _ in range(REPEATS + 1):
        begun = time.process_time()
        fused3d.reconstruct(data, short)
        times.append(time.process_time() - begun)
    return float(np.median(times[1:]))


def section(size: int) -> str:
    """The table for one size."""
    data = specimen(size)
    tracks = {"plain": track(data, "plain", PLAIN_ITERATIONS, 10), "fista": track(data, "fista", 200, 5),
              "fused": track(data, "fused", 60, 1)}
    target = tracks["plain"].nrmse[PLAIN_ITERATIONS]
    names = {"plain": "plain proximal gradient (F3), 20 cold TV steps", "fista": "FISTA, 20 cold TV steps",
             "fused": "ours: ramp-metric primal-dual, 4 warm TV steps"}
    reached = {name: t.reaches(target) for name, t in tracks.items()}
    ours = tracks["fused"].cpu(reached["fused"]) if reached["fused"] else float("nan")
    lines = [f"cocuo, {size}^3 x 4 elements, 47 + 9 tilts, F3's SNRs, "
             f"lambda_model {WEIGHTS['lambda_model']}, lambda_tv {WEIGHTS['lambda_tv']}; "
             f"target NRMSE {target:.3f}, which plain has after {PLAIN_ITERATIONS} iterations.", "",
             "| solver | ms per iteration | iterations to target | CPU s to target | times ours | NRMSE at the end |",
             "|---|---|---|---|---|---|"]
    for name, t in tracks.items():
        end = max(t.nrmse)
        if reached[name] is None:
            lines.append(f"| {names[name]} | {1e3 * t.per_iteration:.0f} | not in {end} | - | - | {t.nrmse[end]:.3f} |")
            continue
        seconds = t.cpu(reached[name])
        lines.append(f"| {names[name]} | {1e3 * t.per_iteration:.0f} | {reached[name]} | {seconds:.1f} | "
                     f"{seconds / ours:.1f} | {t.nrmse[end]:.3f} after {end} |")
    return "\n".join(lines)


def main() -> None:
    """Write the section."""
    publish("Fused solver: CPU time to one quality", section(64))


if __name__ == "__main__":
    main()
