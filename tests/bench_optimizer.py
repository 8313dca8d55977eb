"""`python -m tests.bench_optimizer`: our search with 8 trials in flight against random, Sobol and serial search.

One cheap landscape per seed, on a simulated clock. Everybody is measured by its best value after a budget of 30
and of 60 trials: the first 30 are what a sweep of 30 trials would have asked.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Protocol

import numpy as np
import skopt
from scipy.stats import qmc
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from sweeps.grid import Dimension
from sweeps.optimizer import Optimizer, Params
from tests.bench import publish

SPACE = {
    "lambda_model": Dimension(1e-3, 1e3, "log"),
    "lambda_tv": Dimension(1e-3, 1e1, "log"),
    "gamma": Dimension(1.0, 2.0),
}
SEEDS, TRIALS, WORKERS, INITIAL = range(20), 60, 8, 8


class Landscape:
    """Like NRMSE over two weights and gamma: a curved valley, one optimum near 0.3, plateaus near 1.2, a ripple."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 77])
        self.centre = rng.uniform(-1.5, 1.5), rng.uniform(-2, 0), rng.uniform(1.25, 1.75)
        self.slope, self.bend = rng.uniform(-0.3, 0.3), rng.uniform(0.08, 0.2) * rng.choice([-1, 1])
        self.phases, self.floor = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.28, 0.32)

    def __call__(self, params: Params) -> float:
        x = np.log10(params["lambda_model"]), np.log10(params["lambda_tv"]), params["gamma"]
        u, v, w = np.subtract(x, self.centre)
        q = (u / 1.6) ** 2 + ((v - self.slope * u - self.bend * u**2) / 0.9) ** 2 + (w / 0.45) ** 2
        ripple = np.prod(np.sin(np.multiply((7, 9, 12), x) + self.phases))
        return float(self.floor + 0.9 * q / (1 + q) + 0.002 * (1 + ripple))


class Searcher(Protocol):
    """Whatever proposes trials and hears their results."""

    def ask(self, pending: Sequence[Params], trial: int) -> Params:
        """What to try as number `trial`."""

    def tell(self, params: Params, objective: float) -> None:
        """One result."""


class Listed:
    """A search that never listens: points on the unit cube, decided beforehand."""

    def __init__(self, points: np.ndarray) -> None:
        self.points = points

    def ask(self, pending: Sequence[Params], trial: int) -> Params:
        """Point number `trial`."""
        return from_unit(self.points[trial])

    def tell(self, params: Params, objective: float) -> None:
        """Ignored."""


class Serial:
    """scikit-optimize as it comes, one trial at a time."""

    def __init__(self, seed: int) -> None:
        self.search = skopt.Optimizer([(0.0, 1.0)] * len(SPACE), "GP", n_initial_points=INITIAL, random_state=seed)

    def ask(self, pending: Sequence[Params], trial: int) -> Params:
        """Its proposal."""
        return from_unit(self.search.ask())

    def tell(self, params: Params, objective: float) -> None:
        """Passed on."""
        self.search.tell(np.clip(to_unit(params), 0, 1).tolist(), objective)


class ConstantLiar(Optimizer):
    """Ours, with the worst value seen as the lie for every pending trial instead of the model's own mean."""

    def _lies(self, model: Any, waiting: list[list[float]]) -> list[float]:
        return [max(self._real.yi)] * len(waiting)


def from_unit(point: Sequence[float]) -> Params:
    """Settings at a point of the unit cube."""
    return {key: d.low * (d.high / d.low) ** x if d.scale == "log" else d.low + x * (d.high - d.low)
            for (key, d), x in zip(SPACE.items(), map(float, point), strict=True)}


def to_unit(params: Params) -> np.ndarray:
    """The inverse of `from_unit`."""
    return np.array([np.log(params[key] / d.low) / np.log(d.high / d.low) if d.scale == "log"
                     else (params[key] - d.low) / (d.high - d.low) for key, d in SPACE.items()])


def search(searcher: Searcher, landscape: Callable[[Params], float], seed: int, trials: int = TRIALS,
           workers: int = WORKERS) -> tuple[np.ndarray, np.ndarray]:
    """Best value after each trial in the order of asking, and CPU seconds each trial cost the searcher.

    Workers run on a simulated clock, trials take lognormal times. Two trials the same are an error.
    """
    lengths = np.random.default_rng([seed, 5]).lognormal(0.0, 0.5, trials)
    running: list[tuple[float, int, Params]] = []
    values, seconds, asked, now = np.full(trials, np.inf), np.zeros(trials), np.empty((0, len(SPACE))), 0.0
    for trial in range(trials + workers):
        if trial >= workers and running:
            now, done, params = heapq.heappop(running)
            values[done] = landscape(params)
            start = time.process_time()
            searcher.tell(params, values[done])
            seconds[min(trial, trials - 1)] += time.process_time() - start
        if trial < trials:
            pending = [params for _, _, params in sorted(running, key=lambda job: job[1])]
            start = time.process_time()
            params = searcher.ask(pending, trial)
            seconds[trial] += time.process_time() - start
            point = to_unit(params)
            assert not (np.abs(asked - point) < 1e-9).all(axis=1).any(), f"trial {trial} was asked before"
            asked = np.vstack([asked, point])
            heapq.heappush(running, (now + lengths[trial], trial, params))
    return np.minimum.accumulate(values), seconds


RIVALS: dict[str, tuple[Callable[[int], Searcher], int]] = {
    "random": (lambda seed: Listed(np.random.default_rng([seed, 1]).random((TRIALS, len(SPACE)))), WORKERS),
    "Sobol": (lambda seed: Listed(qmc.Sobol(len(SPACE), rng=seed + 1000).random(64)), WORKERS),
    "scikit-optimize, serial": (Serial, 1),
    "constant liar (worst)": (lambda seed: ConstantLiar(SPACE, seed, INITIAL), WORKERS),
    "**ours**": (lambda seed: Optimizer(SPACE, seed, INITIAL), WORKERS),
}


def measure(job: tuple[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """One rival on the landscape of one seed."""
    make, workers = RIVALS[job[0]]
    with threadpool_limits(1):
        return search(make(job[1]), Landscape(job[1]), job[1], workers=workers)


def section() -> str:
    """The table, in markdown."""
    jobs = [(name, seed) for name in RIVALS for seed in SEEDS]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        done = dict(zip(jobs, pool.map(measure, jobs), strict=True))
    best = {name: np.array([done[name, seed][0] for seed in SEEDS]) for name in RIVALS}
    rows = []
    for name, values in best.items():
        seconds = np.mean([done[name, seed][1] for seed in SEEDS], axis=0)
        figures = [f(values[:, n - 1]) for n in (30, 60) for f in (np.median, np.max)]
        wins = [int((values[:, n - 1] < best["Sobol"][:, n - 1]).sum()) for n in (30, 60)]
        rows.append(f"| {name} | {RIVALS[name][1]} | " + " | ".join(f"{x:.3f}" for x in figures)
                    + f" | {wins[0]} | {wins[1]} | {seconds.mean():.3f} | {seconds[25:35].mean():.3f} |")
    return "\n".join([
        f"Best value so far on a smooth 3-D landscape (optimum about 0.30, plateaus about 1.2), {len(SEEDS)} seeds, "
        "each with its own landscape.", "No point was proposed twice (asserted).", "",
        "| search | in flight | median at 30 | worst at 30 | median at 60 | worst at 60 | better than Sobol at 30 "
        "| at 60 | CPU s per trial | around trial 30 |", "|" + "---|" * 10, *rows])


def main() -> None:
    """Write the section."""
    publish("Optimiser: best value after 30 and 60 trials", section())


if __name__ == "__main__":
    main()
