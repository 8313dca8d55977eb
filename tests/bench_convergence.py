"""`python -m tests.bench_convergence`: how fast the fused solver converges, against the paper's descent and FISTA.

One specimen, one noise, one TV code; lambda_tv is, per dose, the best of a few for our solver at natural weights and
64^3, and the same for all three. Times are CPU seconds of this process; compilation and scoring are left out.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from engine import fused3d, metrics, simulate
from engine.data import MultiModal
from engine.phantoms import ELEMENTS, FIELD_NM, phantom
from sweeps.defaults import SNR
from tests.bench import PAGE, publish

MODEL_WEIGHTS = (0.1, 1.0, 10.0, 100.0, 1000.0)
TV_WEIGHTS = (0.5, 1.0, 2.0, 5.0)
DOSES = (1, 10)
MARKS = (10, 20, 40, 60, 500)
NAMES = {"plain": "plain (F3)", "fista": "FISTA", "fused": "ours"}
PLAIN_ITERATIONS = 50  # the paper's


@dataclass(frozen=True)
class Plan:
    """What to run: voxels of the figure and of the table, iterations of the rivals, of ours in the figure, and at most.

    tv_size: voxels at which lambda_tv is chosen.
    """

    size: int = 64
    sizes: tuple[int, ...] = (48, 64, 96, 128)
    largest: int = 128
    rivals: int = 100
    ours: int = 60
    end: int = 500
    tv_size: int = 64


@dataclass(frozen=True)
class Track:
    """NRMSE and CPU seconds at the recorded iterations of one solve."""

    nrmse: dict[int, float]
    seconds: dict[int, float]
    per_iteration: float
    iterations: int

    @property
    def last(self) -> float:
        """The NRMSE it ends with."""
        return self.nrmse[max(self.nrmse)]

    def until(self, target: float) -> float | None:
        """CPU seconds until the NRMSE is at or below the target; None if it never is."""
        return next((self.seconds[n] for n in sorted(self.nrmse) if self.nrmse[n] <= target), None)


@cache
def specimen(size: int, dose: int = 1) -> MultiModal:
    """cocuo with 47 images and 9 maps at F3's signal-to-noise ratios, the maps with `dose` times its counts."""
    elements, span = ELEMENTS["cocuo"], (-70.0, 70.0)
    snr = {name: 1 + (dose if name in elements else 1) * (level - 1) for name, level in SNR["cocuo"].items()}
    return simulate.multimodal(
        phantom("cocuo", (size,) * 3, FIELD_NM / size), tuple(elements.values()), tuple(elements),
        pixel_size=FIELD_NM / size, haadf_angles=simulate.spread(span, 47),
        chem_angles=simulate.chemical_angles(span, 47, 9), snr=snr)


def track(data: MultiModal, method: str, iterations: int, lambda_model: float, lambda_tv: float, *,
          marks: tuple[int, ...] = (), tolerance: float = 0.0) -> Track:
    """Solve once, scored every 2 iterations to 20, then ever more rarely, and at `marks`."""
    def settings(count: int) -> fused3d.Settings:
        return fused3d.Settings(method=method, iterations=count, lambda_model=lambda_model,  # type: ignore[arg-type]
                                lambda_tv=lambda_tv, tolerance=tolerance)

    every = {*range(2, 21, 2), *range(25, 61, 5), *range(70, 101, 10), *marks, iterations}
    points = sorted(n for n in every if n <= iterations)
    fused3d.reconstruct(data, settings(1))  # compiles
    nrmse, seconds, spent, since = {}, {}, [0.0], [time.process_time()]

    def observe(n: int, volume: np.ndarray) -> None:
        spent[0] += time.process_time() - since[0]
        seconds[n] = spent[0]
        nrmse[n] = float(metrics.nrmse_elements(volume, data.truth).mean())
        since[0] = time.process_time()

    solution = fused3d.reconstruct(data, settings(iterations), checkpoints=points, observe=observe)
    done = int(solution.metrics["iterations"])
    nrmse[done] = float(metrics.nrmse_elements(solution.volume, data.truth).mean())
    seconds.setdefault(done, spent[0] + time.process_time() - since[0])
    ends = sorted(seconds)
    steps = [(seconds[b] - seconds[a]) / (b - a) for a, b in zip(ends, ends[1:]) if b > a]
    return Track(nrmse, seconds, float(np.median(steps)), done)


@cache
def best_tv(size: int, dose: int) -> float:
    """The lambda_tv that our solver ends best with at natural weights, after 100 iterations."""
    data = specimen(size, dose)
    return min(TV_WEIGHTS, key=lambda tv: track(data, "fused", 100, 1.0, tv, marks=(100,)).last)


def figure(plan: Plan, path: Path) -> str:
    """NRMSE against CPU seconds, a panel per dose and lambda_model; returns the table of what it shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    sheet = Figure(figsize=(15, 6), layout="constrained")
    panels = sheet.subplots(len(DOSES), len(MODEL_WEIGHTS), sharey="row", sharex=True)
    lines = ["| dose | lambda_model | lambda_tv | plain | FISTA | ours after 20 | ours | CPU s: plain | FISTA | ours |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    colours = {"plain": "#7f7f7f", "fista": "#d95f02", "fused": "#1b6ca8"}
    for row, dose in zip(panels, DOSES):
        data, tv = specimen(plan.size, dose), best_tv(plan.tv_size, dose)
        for panel, weight in zip(row, MODEL_WEIGHTS):
            tracks = {m: track(data, m, plan.ours if m == "fused" else plan.rivals, weight, tv) for m in NAMES}
            for method, t in tracks.items():
                order = sorted(t.seconds)
                panel.plot([t.seconds[n] for n in order], [t.nrmse[n] for n in order], color=colours[method],
                           label=NAMES[method])
            panel.set(xscale="log", title=f"lambda_model {weight:g}, dose x {dose}")
            panel.set_xticks((0.2, 0.5, 1, 2, 5), ("0.2", "0.5", "1", "2", "5"))
            panel.xaxis.set_minor_formatter(NullFormatter())  # its labels would run into each other
            panel.grid(alpha=0.3, which="both")
            ours = tracks["fused"]
            lines.append(f"| x {dose} | {weight:g} | {tv:g} | " + " | ".join(
                [f"{tracks['plain'].last:.3f}", f"{tracks['fista'].last:.3f}", f"{ours.nrmse[20]:.3f}",
                 f"{ours.last:.3f}", *(f"{max(t.seconds.values()):.1f}" for t in tracks.values())]) + " |")
        row[0].set_ylabel("NRMSE")
    for panel in panels[-1]:
        panel.set_xlabel("CPU seconds")
    panels[0][0].legend()
    FigureCanvasAgg(sheet)
    sheet.savefig(path, dpi=110)
    return "\n".join(lines)


def sizes(plan: Plan) -> str:
    """NRMSE along the way at natural weights, by size, and where the stopping rule fires."""
    marks = tuple(m for m in MARKS if m < plan.end) + (plan.end,)
    lines = ["| size | dose | " + " | ".join(f"ours {m}" for m in marks)
             + " | ms per iteration | stops after | NRMSE there | against the end | plain | FISTA |",
             "|---" * (len(marks) + 8) + "|"]
    for size in plan.sizes:
        for dose in DOSES if size <= plan.size else DOSES[:1]:
            data, tv = specimen(size, dose), best_tv(plan.tv_size, dose)
            long = track(data, "fused", plan.end, 1.0, tv, marks=marks)
            stopped = track(data, "fused", plan.end, 1.0, tv, tolerance=fused3d.Settings().tolerance)
            rivals = [track(data, m, PLAIN_ITERATIONS, 1.0, tv) for m in ("plain", "fista")]
            lines.append(
                f"| {size} | x {dose} | " + " | ".join(f"{long.nrmse[m]:.4f}" for m in marks)
                + f" | {1e3 * long.per_iteration:.0f} | {stopped.iterations} | {stopped.last:.4f} | "
                + f"{100 * (stopped.last / long.last - 1):+.1f} % | "
                + " | ".join(f"{r.last:.3f}" for r in rivals) + " |")
            if size == plan.largest and dose == 1:
                quality = to_quality(size, long, rivals[0])
    return "\n".join([*lines, "", quality])


def to_quality(size: int, ours: Track, plain: Track) -> str:
    """Seconds to the NRMSE that plain has after the paper's 50 iterations, and to within 2 % of our end."""
    goal, took = plain.last, plain.seconds[PLAIN_ITERATIONS]
    first, near = ours.until(goal), ours.until(1.02 * ours.last)
    assert near is not None
    there = "never" if first is None else f"{first:.1f} s, a {took / first:.0f}th of its {took:.1f} s"
    return (f"Time to quality at {size}^3 x 4 elements, 47 + 9 tilts, natural weights: to NRMSE {goal:.3f}, which "
            f"plain has after {PLAIN_ITERATIONS} iterations: {there}; to within 2 % of our end, {ours.last:.3f}: "
            f"{near:.1f} s.")


def main() -> None:
    """Write the section and the figure; --small shows on a few voxels that it works, and writes neither."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", metavar="PNG", help="a reduced run, its figure at this path, nothing published")
    small = parser.parse_args().small
    plan = Plan(24, (16, 24), 24, 20, 20, 60, 24) if small else Plan()
    picture = Path(small) if small else PAGE.with_name("convergence.png")
    shown = figure(plan, picture)
    body = (f"cocuo x 4 elements, 47 + 9 tilts, HAADF at F3's SNR, maps at F3's SNRs and at ten times their counts; "
            f"lambda_chem 1. lambda_tv: of {', '.join(f'{t:g}' for t in TV_WEIGHTS)} the one our solver ends best with "
            f"at lambda_model 1 and {plan.tv_size}^3, the same for all. CPU seconds without compilation; "
            f"milliseconds per iteration are medians over the scored intervals.\n\n"
            f"{plan.size}^3, plain and FISTA after {plan.rivals} iterations, ours after {plan.ours}:\n\n{shown}\n\n"
            f"![NRMSE against CPU seconds]({picture.name})\n\n"
            f"lambda_model 1; plain and FISTA after {PLAIN_ITERATIONS} iterations; the rule stops at a mean relative "
            f"change below {fused3d.Settings().tolerance:g}:\n\n{sizes(plan)}")
    if small:
        print(body)
    else:
        publish("Fused solver: convergence", body)


if __name__ == "__main__":
    main()
