"""Bayesian optimisation with many trials in flight, on scikit-optimize: Matern 5/2 and GP-Hedge (or EI, LCB, PI).

scikit-optimize's optimiser is told real results only, one at a time and in order: it holds what is sequential, the
kernel and the gains of GP-Hedge (Hoffman, Brochu, de Freitas, UAI 2011; each result lowers the gain of an acquisition
by the posterior mean at the point it nominated before). For one `ask` a second process, with that kernel, is told the
pending trials too, searched for the best point of the acquisition that the gains choose, and thrown away. The kernel
is fitted anew at the first results, then each time their number has grown by a seventh.

Numbers are searched on [0, 1] (scikit-optimize measures distances in the user's units, where two weights of 1e-9
would be one point). Objectives are standardised anew at every result, for the gains and EI's margin are in units of y.
Every random number follows from the seed, the number of results told and the trial, so a replay is equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import skopt
from scipy.stats import qmc
from skopt import acquisition as acquisitions
from skopt.learning import GaussianProcessRegressor
from skopt.learning.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from skopt.space import Categorical, Real
from skopt.utils import normalize_dimensions
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from sweeps.grid import Dimension

Params = dict[str, Any]
Point = list[float]  # per dimension: position on [0, 1], or the index of a choice

SAME = 1e-9  # points closer than this along every dimension are one point
# scikit-optimize's own bounds (0.01 to 100, noise up to 1e5) let a few points be explained as noise or spikes: narrower
# ones halved the mean regret at 30 trials with 8 in flight (12 landscapes of tests/bench_optimizer.py).
LENGTHS = (0.1, 3.0)  # of the kernel, in units of a dimension's range
NOISE = (1e-6, 1e-2)  # variance, in units of the objective's
CAP = 5.0  # values this many times farther from the best than the median are lowered to that: tails flatten a GP
CANDIDATES = 1000  # random points scored per proposal; then, thrice, NEAR points around the best
STEPS, NEAR = (0.05, 0.02, 0.005), 150  # their spread, in units of a dimension's range
MARGIN = {"EI": 0.01, "PI": 0.01}  # by which the best is to be beaten, in standard deviations of the objective
KAPPA = 1.96  # of LCB; both as in scikit-optimize
NOMINEES = 500  # points scored per result, for the gains
FITTED, GROWTH = 12, 1.15  # up to so many results each brings a new fit of the kernel; growth between later fits


class SpaceExhausted(Exception):
    """Every point of a finite space has been told or is pending: there is nothing left to propose."""


class Optimizer:
    """Proposes trials that minimise an objective.

    space: dimension by dotted setting. seed: not negative. initial: points of a scrambled Sobol sequence asked
    before the model takes over. acquisition: gp_hedge, EI, LCB or PI.
    """

    def __init__(self, space: Mapping[str, Dimension], seed: int, initial: int = 8,
                 acquisition: str = "gp_hedge") -> None:
        self.space, self.seed, self.initial, self.acquisition = dict(space), seed, initial, acquisition
        self._points: list[Point] = []
        self._objectives: list[float | None] = []
        self._design = np.empty((0, len(self.space)))  # the first points of the Sobol sequence

    def tell(self, params: Mapping[str, Any], objective: float | None) -> None:
        """Record the result of a trial; None, NaN and infinities are failures, as bad as the worst value seen."""
        failed = objective is None or not math.isfinite(objective)
        self._points.append(self._point(params))
        self._objectives.append(None if failed else float(objective))  # type: ignore[arg-type]

    def ask(self, pending: Sequence[Mapping[str, Any]] = (), trial: int = 0) -> Params:
        """What to try next, given the trials that are still running: never the same as a told or pending point.

        A pure function of the results told so far in their order, `pending`, `trial` and the seed.
        Raises SpaceExhausted when a space without real numbers has no point left.
        """
        waiting = [self._point(params) for params in pending]
        taken = np.array(self._points + waiting).reshape(-1, len(self.space))
        for point in self._proposals(waiting, trial):
            point = [_snap(*pair) for pair in zip(self.space.values(), point, strict=True)]
            if not (np.abs(taken - point) < SAME).all(axis=1).any():
                return {key: _value(dimension, place)
                        for (key, dimension), place in zip(self.space.items(), point, strict=True)}
        raise SpaceExhausted(f"all {len(np.unique(taken, axis=0))} points of the search space are tried or "
                             f"running; lower search.trials or widen {', '.join(self.space)}")

    @staticmethod
    def modelled(initial: int, told: int, waiting: int) -> bool:
        """Whether `ask` takes a model, and time, when so many trials are told and pending.

        With many in flight the design is asked long before it is told: half of it is enough for a model.
        """
        return told + waiting >= initial and told >= _enough(initial)

    def state(self) -> dict[str, Any]:
        """Everything that the next `ask` depends on, ready for JSON; equal after a replay of the same results."""
        self._learn()
        models = self._real.models
        return {"seed": self.seed, "initial": self.initial, "acquisition": self.acquisition,
                "space": {key: repr(dimension) for key, dimension in self.space.items()},
                "points": [list(point) for point in self._points], "objectives": list(self._objectives),
                "kernel": kernel_of(models[-1]).theta.tolist() if models else [],
                "gains": list(map(float, getattr(self._real, "gains_", []))),
                "nominees": [list(map(float, x)) for x in getattr(self._real, "next_xs_", [])]}

    def _proposals(self, waiting: list[Point], trial: int) -> Iterator[Point]:
        """Candidates, best first: the design or the model's, then what every search falls back on."""
        if self.modelled(self.initial, len(self._points), len(waiting)):
            yield from self._modelled(waiting, trial)
        else:
            yield self._sobol(len(self._points) + len(waiting))
        yield from self._fallback(trial)

    def _fallback(self, trial: int) -> Iterator[Point]:
        """Random points, then all there are in a space without real numbers."""
        dimensions = self.space.values()
        rng = np.random.default_rng([self.seed, len(self._points), trial])
        for row in rng.random((32, len(self.space))):
            yield [spread(*pair) for pair in zip(dimensions, row, strict=True)]
        if all(dimension.integer or dimension.choices is not None for dimension in dimensions):
            yield from map(list, itertools.product(*map(_places, dimensions)))

    def _sobol(self, index: int) -> Point:
        """Point number `index` of the sequence of this seed."""
        if index >= len(self._design):
            sobol = qmc.Sobol(len(self.space), scramble=True, rng=self.seed)
            self._design = sobol.random_base2(max(4, index.bit_length()))
        return [spread(*pair) for pair in zip(self.space.values(), self._design[index], strict=True)]

    @cached_property
    def _real(self) -> skopt.Optimizer:
        """scikit-optimize's optimiser that is told real results."""
        dimensions = [_skopt_dimension(dimension) for dimension in self.space.values()]
        columns = skopt.Space(normalize_dimensions(dimensions)).transformed_n_dims
        return skopt.Optimizer(
            dimensions, _process(_prior(columns)), n_initial_points=_enough(self.initial),
            acq_func=self.acquisition, acq_optimizer="sampling", acq_optimizer_kwargs={"n_points": NOMINEES},
            model_queue_size=1, random_state=_seed(self.seed))

    def _modelled(self, waiting: list[Point], trial: int) -> list[Point]:
        """The model's proposal, then what the acquisitions nominated at the last result."""
        self._learn()
        real = self._real
        model, nominees = real.models[-1], real.space.inverse_transform(np.array(real.next_xs_))
        y = [*real.yi, *self._lies(model, waiting)]
        rng = np.random.default_rng([self.seed, len(self._points), trial, 2])
        with one_thread():
            again = _process(kernel_of(model), optimizer=None).fit(real.space.transform(self._points + waiting), y)
            return [self._best(again, real.space.transform, min(y), self._chosen(trial), rng), *nominees]

    def _best(self, model: Any, rows: Callable[[list[Point]], np.ndarray], incumbent: float, acquisition: str,
              rng: np.random.Generator) -> Point:
        """The point that an acquisition likes best. rows: the model's inputs at points."""
        points = [[spread(*pair) for pair in zip(self.space.values(), row, strict=True)]
                  for row in rng.random((CANDIDATES, len(self.space)))]
        best = points[int(_score(acquisition, model, rows(points), incumbent).argmax())]
        for step in STEPS:
            points = [best, *(self._moved(best, step * move) for move in rng.normal(size=(NEAR, len(best))))]
            best = points[int(_score(acquisition, model, rows(points), incumbent).argmax())]
        return best

    def _moved(self, point: Point, move: np.ndarray) -> Point:
        """A point near another: numbers move, choices stay."""
        return [place if dimension.choices is not None else min(max(place + by, 0.0), 1.0)
                for dimension, place, by in zip(self.space.values(), point, move.tolist(), strict=True)]

    def _chosen(self, trial: int) -> str:
        """The acquisition of one proposal: GP-Hedge draws it, the likelier the higher its gains."""
        if self.acquisition != "gp_hedge":
            return self.acquisition
        odds = np.exp(self._real.eta * (self._real.gains_ - self._real.gains_.max()))
        rng = np.random.default_rng([self.seed, len(self._points), trial, 1])
        return str(rng.choice(self._real.cand_acq_funcs_, p=odds / odds.sum()))

    def _lies(self, model: Any, waiting: list[Point]) -> list[float]:
        """Stand-ins for the results of the pending trials, in standardised units: what the model expects there.

        One constant for all (the liar of Ginsbourger et al. 2010) bends the model where nothing was measured: its
        row in docs/BENCHMARKS.md shows the price. The model's own mean only takes the doubt away.
        """
        return model.predict(self._real.space.transform(waiting)).tolist() if waiting else []

    def _learn(self) -> None:
        """Tell scikit-optimize, one by one, the results that it does not know: its gains depend on the order."""
        real = self._real
        with one_thread():
            for told in range(len(real.Xi) + 1, len(self._points) + 1):
                *real.yi, newest = standardised(self._objectives[:told])
                real.rng = np.random.RandomState(_seed(self.seed, told))
                if real.models:
                    fixed = {} if refitted(told) else {"optimizer": None}
                    kernel = kernel_of(real.models[-1]) if fixed else _prior(real.space.transformed_n_dims)
                    real.base_estimator_ = _process(kernel, **fixed)
                real.tell(self._points[told - 1], newest)

    def _point(self, params: Mapping[str, Any]) -> Point:
        return [place_of(dimension, params[key]) for key, dimension in self.space.items()]


def refitted(told: int) -> bool:
    """Whether the result number `told` brings a new fit of the kernel."""
    due = FITTED
    while due < told:
        due = math.ceil(GROWTH * due)
    return told <= FITTED or due == told


def _enough(initial: int) -> int:
    return max(2, (initial + 1) // 2)


def _prior(columns: int) -> Any:
    return (ConstantKernel(1.0, (0.01, 1000.0))
            * Matern(np.ones(columns), [LENGTHS] * columns, nu=2.5) + WhiteKernel(1e-3, NOISE))


def _process(kernel: Any, **options: Any) -> Any:
    return GaussianProcessRegressor(kernel, noise="gaussian", n_restarts_optimizer=1, random_state=0, **options)


def _score(acquisition: str, model: Any, rows: np.ndarray, incumbent: float) -> np.ndarray:
    """How much each row promises; higher is better."""
    if acquisition == "LCB":
        return -np.asarray(acquisitions.gaussian_lcb(rows, model, KAPPA))
    if acquisition == "PI":
        return np.asarray(acquisitions.gaussian_pi(rows, model, incumbent, MARGIN["PI"]))
    return np.asarray(acquisitions.gaussian_ei(rows, model, incumbent, MARGIN["EI"]))


def standardised(objectives: Sequence[float | None]) -> list[float]:
    """Mean 0 and spread 1, failures at the worst value. Rounded, so that y and a y + b give the same bits."""
    real = np.array([y for y in objectives if y is not None])
    if not len(real) or np.ptp(real / np.abs(real).max(initial=1e-300)) == 0:
        return [0.0] * len(objectives)
    values = np.array([real.max() if y is None else y for y in objectives]) / np.abs(real).max()
    best, median = values.min(), np.median(values)
    if median > best:
        values = np.minimum(values, best + CAP * (median - best))
    return np.round((values - values.mean()) / values.std(), 9).tolist()


def kernel_of(model: Any) -> Any:
    """The fitted kernel with its noise, which scikit-optimize's regressor takes out after the fit."""
    return model.kernel_.k1 + WhiteKernel(model.noise_, NOISE)


def _skopt_dimension(dimension: Dimension) -> Any:
    return Real(0.0, 1.0) if dimension.choices is None else Categorical(list(range(len(dimension.choices))))


def place_of(dimension: Dimension, value: Any) -> float:
    """Where a value lies: on [0, 1] along the scale, or its index among the choices."""
    if dimension.choices is not None:
        return dimension.choices.index(value)
    low, high, value = (math.log(x) if dimension.scale == "log" else x
                        for x in (dimension.low, dimension.high, value))
    place = (value - low) / (high - low) if high > low else 0.0
    if not -SAME <= place <= 1 + SAME:
        raise ValueError(f"a trial lies outside the search space {dimension.low} to {dimension.high}")
    return min(max(place, 0.0), 1.0)


def _value(dimension: Dimension, place: float) -> Any:
    """The value at a place: the inverse of `place_of`, never outside the bounds."""
    if dimension.choices is not None:
        return dimension.choices[int(place)]
    low, high = dimension.low, dimension.high
    value = low * (high / low) ** place if dimension.scale == "log" else low + (high - low) * place
    value = float(min(max(value, low), high))
    return round(value) if dimension.integer else value


def _snap(dimension: Dimension, place: float) -> float:
    """The nearest place that has a value of its own: whole numbers lie on a lattice."""
    return place_of(dimension, _value(dimension, place)) if dimension.integer else place


def spread(dimension: Dimension, uniform: float) -> float:
    """A place from a number on [0, 1)."""
    return float(uniform) if dimension.choices is None else int(uniform * len(dimension.choices))


def _places(dimension: Dimension) -> Sequence[float] | Iterator[float]:
    """Every place of a dimension without real numbers."""
    if dimension.choices is not None:
        return range(len(dimension.choices))
    return [place_of(dimension, value) for value in range(int(dimension.low), int(dimension.high) + 1)]


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread() -> Any:
    """Matrices of tens of rows are slower on many threads, and their sums would depend on how many."""
    return _pools().limit(limits=1)
