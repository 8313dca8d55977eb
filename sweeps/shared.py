"""Proposals for a cell that learns from its neighbours and from cheap trials: `search.strategy: shared`.

One Gaussian process (Matern 5/2) holds the results of the cells around: over the searched settings, the cell's place
on the grid, and the fidelity of the trial. How far a result tells about another cell, and a cheap trial about a full
one, are lengths that it learns. The acquisition then looks at one cell and one fidelity alone.
Nothing is sequential here: a proposal follows from the results known, the trials pending and the seed, so a replay
is equal. At a dozen trials per cell the gains of GP-Hedge have nothing to learn from, and gp_hedge means EI.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from skopt.learning import GaussianProcessRegressor
from skopt.learning.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from sweeps.grid import Dimension
from sweeps.optimizer import (
    LENGTHS,
    NEAR,
    Optimizer,
    Point,
    kernel_of,
    one_thread,
    spread,
    standardised,
)

APART = (0.3, 10.0)  # lengths of the kernel over places and fidelity, each on about [0, 1]
# Where the fit of the lengths starts, and a tenth of the noise that a search of one cell may see: with all ones and
# the wider noise the mean error above the optimum was 1.7 % instead of 0.8 % (6 valleys, narrower than those of
# tests/test_search.py, 3 and 4 seeds).
NARROW, WIDE = 0.4, 3.0
NOISE = (1e-6, 1e-3)  # variance, in units of the objective's


@dataclass(frozen=True)
class Elsewhere:
    """A trial of another cell, or of another fidelity: where, what, and its objective (None: failed or pending)."""

    place: tuple[float, ...]
    params: Mapping[str, Any]
    objective: float | None = None


class SharedOptimizer(Optimizer):
    """Proposes trials of one fidelity in one cell.

    place: the cell's coordinates and the fidelity, each on about [0, 1]. number: of the cell among the `cells` that
    share: their first trials are points of one Sobol sequence. initial: results known before the model takes over.
    """

    def __init__(self, space: Mapping[str, Dimension], seed: int, initial: int = 8, acquisition: str = "gp_hedge",
                 place: Sequence[float] = (), number: int = 0, cells: int = 1) -> None:
        super().__init__(space, seed, initial, acquisition)
        self.place, self.number, self.cells = tuple(place), number, cells
        self._others: list[tuple[tuple[float, ...], Point, float | None]] = []
        self._pending: list[tuple[tuple[float, ...], Point, float | None]] = []

    def learn(self, trials: Sequence[Elsewhere]) -> None:
        """Record results of other cells, or of other fidelities."""
        self._others += map(self._elsewhere, trials)

    def expect(self, trials: Sequence[Elsewhere]) -> None:
        """Trials of other cells, or of other fidelities, that still run."""
        self._pending = [self._elsewhere(trial) for trial in trials]

    @staticmethod
    def modelled(initial: int, told: int, waiting: int) -> bool:
        """Whether `ask` takes a model: as soon as enough is known of all the cells around."""
        return told >= initial

    def state(self) -> dict[str, Any]:
        """Everything that the next `ask` depends on, ready for JSON."""
        others, pending = ([[list(place), point, y] for place, point, y in rows]
                           for rows in (self._others, self._pending))
        return {"seed": self.seed, "initial": self.initial, "acquisition": self.acquisition,
                "space": {key: repr(dimension) for key, dimension in self.space.items()},
                "place": list(self.place), "number": self.number, "cells": self.cells,
                "points": [list(point) for point in self._points], "objectives": list(self._objectives),
                "others": others, "pending": pending}

    def _elsewhere(self, trial: Elsewhere) -> tuple[tuple[float, ...], Point, float | None]:
        return trial.place, self._point(trial.params), trial.objective

    def _proposals(self, waiting: list[Point], trial: int) -> Iterator[Point]:
        """Candidates, best first: the design or the model's, then what every search falls back on."""
        if not self.modelled(self.initial, len(self._points) + len(self._others), 0):
            yield self._sobol(trial * self.cells + self.number)
        else:
            with one_thread(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lengths at the ends of their bounds are no news
                yield self._promising(waiting, trial)
        yield from self._fallback(trial)

    def _promising(self, waiting: list[Point], trial: int) -> Point:
        """The point of this cell, at this fidelity, that the acquisition likes best."""
        known = [(self.place, point) for point in self._points] + [(place, point) for place, point, _ in self._others]
        y = np.array(standardised([*self._objectives, *(objective for _, _, objective in self._others)]))
        running = [(self.place, point) for point in waiting] + [(place, point) for place, point, _ in self._pending]
        model = self._model(self._rows(known), y, self._rows(running))
        rng = np.random.default_rng([self.seed, self.number, len(known), trial])

        def rows(points: list[Point]) -> np.ndarray:
            return self._rows([(self.place, point) for point in points])

        random = [[spread(*pair) for pair in zip(self.space.values(), row, strict=True)]
                  for row in rng.random((NEAR, len(self.space)))]
        incumbent = min(y[:len(self._points)], default=model.predict(rows(random)).min())
        acquisition = "EI" if self.acquisition == "gp_hedge" else self.acquisition
        return self._best(model, rows, incumbent, acquisition, rng)

    def _model(self, rows: np.ndarray, y: np.ndarray, running: np.ndarray) -> Any:
        """The process, fitted to results; what it expects of running trials takes the doubt away there."""
        own = rows.shape[1] - len(self.place)
        lengths = [LENGTHS] * own + [APART] * len(self.place)
        start = np.array([NARROW] * own + [WIDE] * len(self.place))
        kernel = ConstantKernel(1.0, (0.01, 1000.0)) * Matern(start, lengths, nu=2.5) + WhiteKernel(1e-3, NOISE)
        model = GaussianProcessRegressor(kernel, noise="gaussian", n_restarts_optimizer=0, random_state=0).fit(rows, y)
        if not len(running):
            return model
        again = GaussianProcessRegressor(kernel_of(model), noise="gaussian", optimizer=None, random_state=0)
        return again.fit(np.vstack([rows, running]), np.hstack([y, model.predict(running)]))

    def _rows(self, trials: Sequence[tuple[tuple[float, ...], Point]]) -> np.ndarray:
        """The model's inputs: a column per number, one per choice, and the place."""
        rows = [[*self._columns(point), *place] for place, point in trials]
        return np.array(rows, float)

    def _columns(self, point: Point) -> Iterator[float]:
        for dimension, place in zip(self.space.values(), point, strict=True):
            if dimension.choices is None:
                yield place
            else:
                yield from (float(place == k) for k in range(len(dimension.choices)))
