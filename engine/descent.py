"""What the fused solver is compared with: the paper's proximal gradient (F3, Methods), FISTA, chemistry + TV,
Poisson maximum likelihood and SIRT, all as steps of `iterate.solve` on the same problem and the same costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import model, sharding
from engine.iterate import settled
from engine.model import GAIN_EVERY, Problem
from engine.penalties import Dual, prox_tv, total_variation, zero_dual
from engine.projector import backproject, project

PAPER_INNER = 20  # cold steps of the TV proximal operator in the paper's algorithm
_POWER_STEPS = 15


class State(NamedTuple):
    """x, the point that gradients are taken at, the TV dual, FISTA's t, the gain, and the step per voxel.

    ML and SIRT keep A' 1 where the others have the step, and nothing in the fields that they do not need.
    """

    x: jax.Array
    ahead: jax.Array
    tv_dual: Dual
    momentum: jax.Array
    gain: jax.Array
    rate: jax.Array
    cost: jax.Array


def solver(method: str, counts: bool) -> tuple[Callable, Callable, Callable]:
    """(start, step, volume of a state) of a method; the same objects each time, so that nothing compiles twice."""
    return _START[method, counts], _STEP[method, counts], _volume


def start_descent(problem: Problem, counts: bool, fused: bool) -> tuple[State, jax.Array]:
    """The EM start, and one step size: 1 / L for the two smooth terms, L by power iteration.

    With gamma > 1 the curvature grows as x does; twice its value at the start covers the way to the solution.
    """
    x = problem.start
    signal = model.chemistry(problem, x, counts).signal
    gain = jnp.float32(1)
    if fused:
        gain = model.fit_gain(problem, _projected(problem, x), signal)
        rate = jnp.ones((1, 1, 1, 1)) / (2 * _lipschitz(problem, x, gain, signal, counts))
    else:
        rate = 1 / jnp.maximum(problem.lambda_chem * model.chemical_curvature(problem, signal, counts), 1e-20)
    terms = _cost(problem, x, gain, counts, fused)
    state = State(x, x, zero_dual(x), jnp.float32(1), gain, rate, terms[-1])
    return settled(state), terms


def step_descent(problem: Problem, state: State, iteration: jax.Array, *, counts: bool, fused: bool,
                 momentum: bool, cold: bool) -> tuple[State, jax.Array, jax.Array]:
    """x <- prox of TV and x >= 0 at y - rate * gradient(y), with FISTA's momentum or without.

    cold: the paper's operator, 20 steps from nothing; else warm duals. Momentum starts anew when the cost rises.
    """
    y = state.ahead
    slope = problem.lambda_chem * model.chemistry(problem, y, counts).slope
    if fused:
        slope += _image_slope(problem, y, state.gain)
    dual = zero_dual(y) if cold else state.tv_dual
    new, dual = prox_tv(y - state.rate * slope, problem.lambda_tv, state.rate, dual,
                        PAPER_INNER if cold else problem.inner, model.FLOOR, problem.planes)
    terms = _cost(problem, new, state.gain, counts, fused)
    t, push = jnp.float32(1), jnp.float32(0)
    if momentum:
        rising = terms[-1] > state.cost
        t = jnp.where(rising, 1.0, (1 + jnp.sqrt(1 + 4 * state.momentum**2)) / 2)
        push = jnp.where(rising, 0.0, (state.momentum - 1) / t)
    gain = state.gain
    if fused:
        # After 5, 10, 20, 40, ... iterations: these methods settle late, and a gain frozen early is 1.3 to 1.5 times
        # the true one.
        fives, rest = jnp.divmod(iteration + 1, GAIN_EVERY)
        refit = (rest == 0) & (fives & (fives - 1) == 0)
        gain = jax.lax.cond(refit, lambda: _gain(problem, new, counts), lambda: gain)
    change = sharding.relative_change(new, state.x)
    ahead = jnp.maximum(new + push * (new - state.x), model.FLOOR)
    return State(new, ahead, dual, t, gain, state.rate, terms[-1]), terms, change


def start_simple(problem: Problem, counts: bool) -> tuple[State, jax.Array]:
    """A flat start for ML and SIRT."""
    exist = sharding.present(problem.planes, problem.start.shape[-1])
    voxels = float(np.prod(problem.start.shape[1:3])) * problem.planes
    mean = sharding.total((problem.start * exist).sum((1, 2, 3), keepdims=True)) / voxels
    x = jnp.ones_like(problem.start) * mean * exist
    terms = _likelihood(problem, x, counts)
    one, seen = jnp.float32(1), model.seen(problem)
    return settled(State(x, one, Dual(one, one, one), one, one, seen, terms[-1])), terms


def step_em(problem: Problem, state: State, iteration: jax.Array, *,
            counts: bool) -> tuple[State, jax.Array, jax.Array]:
    """One EM step of the Poisson likelihood; for maps that are not counts, of their positive part."""
    maps = jnp.maximum(problem.maps, 0)
    new = model.em_step(maps, problem.background, problem.sensitivity, problem.map_rays,
                        jnp.maximum(state.rate, 1e-3), state.x)
    return _simple(problem, state, new, counts)


def step_sirt(problem: Problem, state: State, iteration: jax.Array, *,
              counts: bool) -> tuple[State, jax.Array, jax.Array]:
    """x + C A' R (b - background - A x) / s with row and column sums R, C, kept above 0 (P. Gilbert, 1972)."""
    pixels, shape = problem.maps.shape[-2], state.x.shape[1:3]
    path = project(jnp.ones_like(state.x[:1]), problem.map_rays, pixels)
    wanted = (problem.maps - problem.background) / problem.sensitivity
    error = wanted - project(state.x, problem.map_rays, pixels)
    error *= model.map_seen(problem) / jnp.maximum(path, 1e-3)
    new = jnp.maximum(state.x + backproject(error, problem.map_rays, *shape) / jnp.maximum(state.rate, 1e-3), 0)
    return _simple(problem, state, new, counts)


def _simple(problem: Problem, state: State, new: jax.Array, counts: bool) -> tuple[State, jax.Array, jax.Array]:
    terms = _likelihood(problem, new, counts)
    change = sharding.relative_change(new, state.x)
    return state._replace(x=new, cost=terms[-1]), terms, change


def _cost(problem: Problem, x: jax.Array, gain: jax.Array, counts: bool, fused: bool) -> jax.Array:
    """The three terms of F3 Eq. 1 at weight 1, and their weighted sum."""
    chem = model.chemistry_value(problem, x, counts)
    return model.cost_terms(problem, x, _projected(problem, x) if fused else None, chem, gain)


def _likelihood(problem: Problem, x: jax.Array, counts: bool) -> jax.Array:
    """ML and SIRT know no weights: their cost is the chemical term alone."""
    chem = model.chemistry_value(problem, x, counts)
    return jnp.stack([jnp.float32(0), chem, total_variation(x, problem.planes).sum(), chem])


def _projected(problem: Problem, x: jax.Array) -> jax.Array:
    return model.project_images(problem, model.scattering(problem, x))


def _image_slope(problem: Problem, x: jax.Array, gain: jax.Array) -> jax.Array:
    """lambda_model times the gradient of the HAADF term (F3 Eq. 2, with its sign put right)."""
    error = model.image_seen(problem) * (_projected(problem, x) - problem.images / gain)
    back = model.backproject_images(problem, error)
    return model.image_precision(problem, gain) * model.scattering_slope(problem, x) * back


def _gain(problem: Problem, x: jax.Array, counts: bool) -> jax.Array:
    return model.fit_gain(problem, _projected(problem, x), model.chemistry(problem, x, counts).signal)


def _lipschitz(problem: Problem, x: jax.Array, gain: jax.Array, signal: jax.Array, counts: bool) -> jax.Array:
    """The largest eigenvalue of the Gauss-Newton Hessian of both smooth terms at x, by power iteration."""
    slope = model.scattering_slope(problem, x)
    seen = model.image_seen(problem)
    weight = model.map_precision(problem, signal + problem.background, counts) * model.map_seen(problem)

    def hessian(v: jax.Array) -> jax.Array:
        images = seen * model.project_images(problem, (slope * v).sum(0))
        maps = weight * project(v, problem.map_rays, problem.maps.shape[-2])
        chem = model.backproject_twice(problem, maps)
        back = slope * model.backproject_images(problem, images)
        return model.image_precision(problem, gain) * back + problem.lambda_chem * chem

    def power(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v = hessian(state[0] / state[1])
        return v, jnp.maximum(norm(v), 1e-30)

    def norm(v: jax.Array) -> jax.Array:
        return jnp.sqrt(sharding.total((v**2).sum()))

    return jax.lax.fori_loop(0, _POWER_STEPS, power, (slope, norm(slope)))[1]


def _volume(state: State) -> jax.Array:
    return jnp.where(state.x > model.FLOOR, state.x, 0.0)


_DESCENTS: dict[str, dict[str, Any]] = {
    "plain": {"fused": True, "momentum": False, "cold": True},
    "fista": {"fused": True, "momentum": True, "cold": True},
    "chem_tv": {"fused": False, "momentum": True, "cold": False},
}
_START = {(name, counts): partial(start_descent, counts=counts, fused=kind["fused"])
          for name, kind in _DESCENTS.items() for counts in (True, False)}
_START |= {(name, counts): partial(start_simple, counts=counts) for name in ("ml", "sirt") for counts in (True, False)}
_STEP = {(name, counts): partial(step_descent, counts=counts, **kind)
         for name, kind in _DESCENTS.items() for counts in (True, False)}
_STEP |= {(name, counts): partial(step, counts=counts)
          for name, step in (("ml", step_em), ("sirt", step_sirt)) for counts in (True, False)}
