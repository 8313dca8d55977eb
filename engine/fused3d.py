"""Fused multi-modal tomography (F3): chemistry in 3D from many HAADF images and few chemical maps.

    minimise over x >= 0   lambda_model / 2 |A_h sum_i c_i x_i^gamma - b_H|^2 / sigma^2
                         + lambda_chem sum_i KL(b_i, s_i A_c x_i + background_i) + lambda_tv sum_i TV(x_i)      (Eq. 1)

HAADF is precise: its natural weight is far above what gradient descent digests in a hundred steps. `fused` therefore
splits the HAADF residual off into a dual variable q and steps it in the metric of the ramp filter, which undoes the
1/|k| of A_h' A_h; the volume steps in a diagonal metric that knows both terms' curvature. `plain` is the paper's own
algorithm; `fista`, `chem_tv`, `ml` and `sirt` are what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import descent, model
from engine.data import DataError, MultiModal, Solution
from engine.iterate import settled, solve
from engine.model import GAIN_EVERY, GAIN_STEPS, Problem
from engine.penalties import Dual, prox_tv, zero_dual
from engine.projector import backproject, bucket, geometry, project

Method = Literal["fused", "chem_tv", "ml", "sirt", "plain", "fista"]
TERMS = ("model", "chem", "tv", "total")

RELAX = 1.5  # over-relaxation of the primal step; 1.9 diverges
BALANCE_DECAY = 0.93  # rho may change by a factor 2 in iteration 0 and by 2^(0.93^k) in iteration k
RHO_START = 0.01  # of the ratio of the two terms' curvatures: small, since too large a rho lands in a worse minimum
RETREAT = 4.0  # a cost this many times the best one is a step that went wrong
SWING, SLOWER = 1.01, 1.1  # while the cost swings this far above the best, each step is shorter than the last


@dataclass(frozen=True)
class Settings:
    """Numbers of one solve; see the YAML's `solver` for units and meaning. `inner`: TV steps per iteration."""

    method: Method = "fused"
    weights: Literal["z_gamma", "z"] = "z_gamma"
    gamma: float = 1.6
    iterations: int = 60
    inner: int = 4
    lambda_model: float = 1.0
    lambda_chem: float = 1.0
    lambda_tv: float = 0.1
    tolerance: float = 0.0


class State(NamedTuple):
    """Between two iterations: x and what was computed at x, the duals, the split's weight, the best so far."""

    x: jax.Array
    projected: jax.Array  # A_h S(x), and of the x before
    projected_before: jax.Array
    residual: jax.Array  # q, the dual of the HAADF residual
    slope: jax.Array  # of the chemical term at x
    tv_dual: Dual
    rho: jax.Array
    gain: jax.Array
    caution: jax.Array  # divides the step; doubled when a step went wrong
    retreat: jax.Array  # whether the last step went wrong, so that the next goes back to the best volume
    best: jax.Array
    best_cost: jax.Array
    metric: jax.Array  # curvature of the chemical term
    ramp_norm: jax.Array


def reconstruct(data: MultiModal, settings: Settings, *, checkpoints: Sequence[int] = (),
                observe: Callable[[int, np.ndarray], None] | None = None,
                held_out: tuple[int, ...] = ()) -> Solution:
    """Concentrations (element, z, y, x) from a HAADF series and chemical maps.

    observe(iteration, volume) is called at each checkpoint. held_out: chemical tilts that are not fitted.
    Raises DataError where the method needs HAADF images and there are none. A solve that fails returns ok = False
    and the best volume it had.
    """
    if settings.method in ("fused", "plain", "fista") and data.haadf is None:
        raise DataError(f"method {settings.method} needs HAADF images; without them use chem_tv, ml or sirt")
    problem = model.build(data, gamma=settings.gamma, lambda_model=settings.lambda_model,
                          lambda_chem=settings.lambda_chem, lambda_tv=settings.lambda_tv, weights=settings.weights,
                          inner=settings.inner, held_out=held_out)
    counts = data.chem.units == "counts"
    fused: tuple[Callable, Callable, Callable] = (start, _STEPS[counts], best_volume)
    begin, advance, extract = fused if settings.method == "fused" else descent.solver(settings.method, counts)
    state, terms = begin(problem, counts)
    watch = None if observe is None else (lambda n, s: observe(n, np.asarray(extract(s))))
    outcome = solve(advance, problem, state, terms, settings.iterations, tolerance=settings.tolerance,
                    checkpoints=checkpoints, observe=watch)
    volume = np.asarray(extract(outcome.state))
    ok = outcome.ok and bool(np.isfinite(volume).all())
    sensitivity = np.asarray(problem.sensitivity).ravel()
    metrics = {"iterations": outcome.iterations,
               **{f"sensitivity_{e}": float(s) for e, s in zip(data.chem.elements, sensitivity)}}
    if settings.method == "fused":
        # The volume is the one of least cost, not always the last: this is its own.
        metrics["cost"] = float(outcome.state.best_cost)
        metrics["rho"], metrics["caution"] = float(outcome.state.rho), float(outcome.state.caution)
    history = {name: outcome.history[:, k] for k, name in enumerate(TERMS)}
    return Solution(volume, history, outcome.status, ok, metrics)


def best_volume(state: State) -> jax.Array:
    """The volume of least cost; voxels on the floor are 0."""
    return jnp.where(state.best > model.FLOOR, state.best, 0.0)


def predict(data: MultiModal, volume: np.ndarray, sensitivity: np.ndarray) -> np.ndarray:
    """Expected maps (element, tilt, y, x), background included, at every chemical angle of `data`."""
    rays = geometry(data.chem.angles, bucket(data.chem.tilts))
    clean = np.asarray(project(jnp.asarray(volume), rays, data.chem.projections.shape[2]))
    return clean[:, :data.chem.tilts] * np.asarray(sensitivity)[:, None, None, None] + data.chem.background


@partial(jax.jit, static_argnames=("counts",))
def start(problem: Problem, counts: bool) -> tuple[State, jax.Array]:
    """The state before the first iteration, and its cost."""
    x = problem.start
    projected = model.project_images(problem, model.scattering(problem, x))
    chem = model.chemistry(problem, x, counts)
    gain = model.fit_gain(problem, projected, chem.signal)
    metric = problem.lambda_chem * model.chemical_curvature(problem, chem.signal, counts)
    slope = model.scattering_slope(problem, x)
    rho = RHO_START * metric.sum() / (slope * slope.sum(0)).sum()
    terms = model.cost_terms(problem, x, projected, chem.value, gain)
    state = State(x, projected, projected, jnp.zeros_like(problem.images), chem.slope, zero_dual(x), rho, gain,
                  jnp.float32(1), jnp.bool_(False), x, terms[-1], metric, _ramp_norm(problem))
    return settled(state), terms


def step(problem: Problem, state: State, iteration: jax.Array, *, counts: bool) -> tuple[State, jax.Array, jax.Array]:
    """One iteration of the ramp-metric primal-dual split; returns the state, its cost terms, the relative change."""
    x = state.x
    precision = jnp.maximum(model.image_precision(problem, state.gain), 1e-20)
    sigma = state.rho * _ramp(problem) / state.ramp_norm
    keep = 1 / (1 + sigma / precision)
    seen = problem.image_rays.weight[:, None, None]
    # The residual at the extrapolated point, 2 A S(x) - A S(x before): exact costs without a further projection.
    error = seen * (2 * state.projected - state.projected_before - problem.images / state.gain)
    residual = _filter(keep, state.residual) + _filter(sigma * keep, error)

    scatter_slope = model.scattering_slope(problem, x)
    coupling = scatter_slope * scatter_slope.sum(0)
    rate = RELAX / (state.caution * (state.rho * coupling + state.metric))
    slope = scatter_slope * model.backproject_images(problem, residual) + problem.lambda_chem * state.slope
    new, tv_dual = prox_tv(x - rate * slope, problem.lambda_tv, rate, state.tv_dual, problem.inner, model.FLOOR)
    new = jnp.where(state.retreat, state.best, new)

    projected = model.project_images(problem, model.scattering(problem, new))
    chem = model.chemistry(problem, new, counts)
    change = new - x
    rho = _balanced(state, iteration, (change**2 * coupling).sum(), residual - state.residual, sigma)
    refit = (iteration < GAIN_STEPS) & (iteration % GAIN_EVERY == GAIN_EVERY - 1)
    gain = jnp.where(refit, model.fit_gain(problem, projected, chem.signal), state.gain)
    terms = model.cost_terms(problem, new, projected, chem.value, gain)
    # A new gain is a new cost: after a refit the comparison with the best starts afresh.
    improved = (terms[-1] <= state.best_cost) | (refit & jnp.isfinite(terms[-1]))
    best_cost = jnp.where(improved, terms[-1], state.best_cost)
    wrong = ~(terms[-1] < RETREAT * best_cost) & ~state.retreat
    swinging = (terms[-1] > SWING * best_cost) & (iteration >= GAIN_STEPS)
    slower = jnp.where(wrong, 2.0, jnp.where(swinging, SLOWER, 1.0))
    kept = jnp.where(state.retreat, 0.0, 1.0)
    relative = jnp.sqrt((change**2).sum() / jnp.maximum((x**2).sum(), 1e-20))
    moved = State(
        x=new, projected=projected, projected_before=jnp.where(state.retreat, projected, state.projected),
        residual=kept * residual, slope=chem.slope, tv_dual=Dual(*(kept * d for d in tv_dual)),
        rho=jnp.where(wrong, rho / 2, rho), gain=gain, caution=state.caution * slower, retreat=wrong,
        best=jnp.where(improved, new, state.best), best_cost=best_cost, metric=state.metric,
        ramp_norm=state.ramp_norm)
    # A retreat is no progress, and no sign of convergence either.
    return moved, terms, jnp.where(state.retreat, 1.0, relative)


_STEPS = {counts: partial(step, counts=counts) for counts in (True, False)}


def _ramp(problem: Problem) -> jax.Array:
    """max(|k|, half a frequency step) along the detector, zero-padded to twice its length: (pixels + 1,)."""
    pixels = problem.images.shape[-2]
    return jnp.maximum(jnp.arange(pixels + 1) / (2 * pixels), 0.5 / pixels)


def _ramp_norm(problem: Problem) -> jax.Array:
    """The largest eigenvalue of A_h' ramp A_h, by power iteration on one plane."""
    ramp = _ramp(problem)
    shape = (*problem.start.shape[1:3], 1)

    def power(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v = state[0] / state[1]
        v = backproject(_filter(ramp, project(v, problem.image_rays, problem.images.shape[-2])),
                        problem.image_rays, *shape[:2])
        return v, jnp.linalg.norm(v)

    return jax.lax.fori_loop(0, 12, power, (jnp.ones(shape), jnp.float32(np.sqrt(shape[0] * shape[1]))))[1]


def _filter(spectrum: jax.Array, images: jax.Array) -> jax.Array:
    """Images (tilt, y, x) filtered along y, zero-padded, by a real spectrum (pixels + 1,).

    As a product with the filter's Toeplitz matrix: up to some hundred pixels that beats strided FFTs.
    """
    pixels = images.shape[-2]
    kernel = jnp.fft.irfft(spectrum, 2 * pixels)
    index = jnp.arange(pixels)
    return jnp.einsum("ij,tjx->tix", kernel[(index[:, None] - index) % (2 * pixels)], images)


def _balanced(state: State, iteration: jax.Array, primal: jax.Array, change: jax.Array,
              sigma: jax.Array) -> jax.Array:
    """rho for the next iteration: steps of primal and dual of equal size, each in its own metric.

    primal: squared step of x in the metric S'_i sum_j S'_j. The changes fade, so that the split settles.
    """
    primal = jnp.sqrt(state.rho * primal)
    dual = jnp.sqrt(jnp.maximum((change * _filter(1 / sigma, change)).sum(), 0))
    ratio = jnp.clip(dual / jnp.maximum(primal, 1e-20), 0.5, 2.0)
    return state.rho * ratio ** (BALANCE_DECAY**iteration)

