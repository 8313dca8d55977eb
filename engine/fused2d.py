"""Fused multi-modal microscopy (F2): chemical maps from one HAADF image and the maps taken with it.

    minimise over x >= 0   lambda_model / 2 |sum_i c_i x_i^gamma - b_H|^2 / sigma^2
                         + lambda_chem sum_i KL(b_i, s_i x_i + background_i) + lambda_tv sum_i TV(x_i)        (Eq. 1)

It is fused tomography of one plane at one angle, where the projector is the identity: a map of n x n pixels is a volume
(element, 1, n, n). F2's lambda_1 is lambda_chem / lambda_model here, and its lambda_2 is lambda_tv / lambda_model, but
each term carries its statistical weight: 1 and 1 are maximum likelihood, whatever the units of the maps.

Without a projector the elements of a pixel are one small problem, and `fused` solves it nearly at once. Each step
minimises, by the operators of the 3D solver (`engine.coupling`, `engine.penalties`),

    <slope, u> + TV  +  sum_i h_i (u_i - x_i)^2 / 2  +  P (S'(x) . (u - x))^2 / 2          over u >= floor

with h the Fisher information of the maps, P = lambda_model gain^2 / sigma^2 the image's, and S(x) = sum c_i x_i^gamma.
TV is F2's or, with `guide`, knows the image's edges (`engine.guide`).
The cost never rises: a step that would raise it is not taken, but the dual of TV is kept, so that the next one is
closer to the minimiser; where the pixel's own curvature was the cause, h grows there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import coupling, descent, guide, model, pyramid, uncertainty
from engine.data import DataError, DataWarning, MultiModal, Solution
from engine.iterate import Keep, outcomes, settled, solve
from engine.model import FLOOR, GAIN_STEPS, Problem
from engine.penalties import Dual, tv_dual, zero_dual
from engine.sizes import halvings

TERMS = ("model", "chem", "tv", "total")
BATCHED = ("gamma", "lambda_model", "lambda_chem", "lambda_tv", "guide")  # what settings of one batch may differ in
SLACK = 1e-6  # of the cost: what float32 rounds is no rise
MEMORY = 0.3  # weight of an iteration in the mean change that ends a solve
MISTRUST = 1.2  # a pixel whose curvature was this many times the one assumed had a part in a rise
FADE = 0.7  # by which caution fades in each step taken


@dataclass(frozen=True)
class Settings:
    """Numbers of one solve. `inner`: TV steps per iteration; `missing`: atomic numbers of elements without a map.

    coarse: iterations at each coarser size, whose maps are where the finer solve starts: F2's remedy for spurious atoms
    at atomic resolution. 0: it starts from the measured maps.
    weights: the image is linear in (Z x)^gamma (F2), in Z^gamma x, which holds where thickness varies, or in Z x^gamma.
    guide: how much of a map's gradient along the image's own is free of TV, 0 to 1 (`engine.guide`); 0 is plain TV. For
    method fused.
    errors: the standard error of every pixel, right for any weights, by F2's Eq. 5 as printed, or none.
    """

    method: Literal["fused", "chem_tv", "plain", "fista"] = "fused"
    weights: Literal["z_gamma", "z_gamma_linear", "z"] = "z_gamma"
    gamma: float = 1.7
    iterations: int = 200
    inner: int = 4
    lambda_model: float = 1.0
    lambda_chem: float = 1.0
    lambda_tv: float = 0.1
    guide: float = 0.0
    coarse: int = 0
    tolerance: float = 1e-6
    missing: tuple[int, ...] | list[int] = ()
    errors: Literal["sandwich", "paper", "none"] = "sandwich"


class Pull(NamedTuple):
    """What the maps' term is at some x: value, signal and slope; and what x scatters."""

    value: jax.Array
    signal: jax.Array  # (element, 1, y, x), without background
    slope: jax.Array  # (element, 1, y, x), lambda_chem d KL / d x
    scatter: jax.Array  # (1, y, x), S(x)


class State(NamedTuple):
    """Between two iterations: x, what it would give, and the dual of TV."""

    x: jax.Array  # (element, 1, y, x)
    pull: Pull
    tv_dual: Dual
    gain: jax.Array
    caution: jax.Array  # (1, y, x), factor of h
    terms: jax.Array  # of the cost, at this gain
    drift: jax.Array  # the mean relative change of the last costs


def reconstruct(data: MultiModal, settings: Settings, *, checkpoints: Sequence[int] = (),
                observe: Callable[[int, np.ndarray], None] | None = None, keep: Keep | None = None) -> Solution:
    """Concentrations (element, 1, y, x), and their standard errors as `fields`, from a HAADF image and maps.

    observe(iteration, volume) is called at each checkpoint. keep: where a long solve leaves its state.
    Warns (DataWarning) of elements without a map. Raises DataError for a tilt series, and where the method needs an
    image and there is none.
    """
    _check(data, settings)
    counts, fused = data.chem.units == "counts", settings.method == "fused"
    problem = model.build(data, gamma=settings.gamma, lambda_model=settings.lambda_model,
                          lambda_chem=settings.lambda_chem, lambda_tv=settings.lambda_tv, weights=settings.weights,
                          inner=settings.inner)
    if data.haadf is not None and (settings.missing or data.sensitivity is None):
        problem = problem._replace(contrast=_fitted(problem))
    if settings.method == "fused" and settings.guide:
        problem = _guided(problem, settings.guide)
    begin, advance, extract = solver(settings.method, counts)
    observed = None if observe is None else lambda n, state: observe(n, np.asarray(extract(state)))
    # The short steps of the others are no sign that they have arrived.
    tolerance = settings.tolerance if fused or settings.method == "chem_tv" else 0.0
    kind = (settings.method, counts)
    begun = _coarse_to_fine(problem, kind, settings, data) if kind in _REFINE and settings.coarse else (
        _compiled(begin)(problem))
    run = solve(advance, problem, begun, settings.iterations, tolerance=tolerance, checkpoints=checkpoints,
                observe=observed, keep=keep)
    outcome = outcomes(run, 1, tolerance)[0]
    volume, gain = np.asarray(_compiled(extract)(outcome.state)), float(outcome.state.gain)
    history = {name: outcome.history[:, k] for k, name in enumerate(TERMS)}
    metrics: dict[str, Any] = {"iterations": outcome.iterations, "gain": gain, "cost": float(history["total"][-1])}
    for name in ("sensitivity", "contrast"):
        values = np.asarray(getattr(problem, name)).ravel()
        metrics |= {f"{name}_{e}": float(value) for e, value in zip(data.chem.elements, values)}
    ok = outcome.ok and bool(np.isfinite(volume).all())
    fields = _as_measured(data, problem)
    if ok and settings.errors != "none":
        # An image that the method has not seen makes nothing more certain.
        used = problem if settings.method != "chem_tv" else problem._replace(images=problem.images[:0])
        maps, found = uncertainty.errors(used, volume, gain, counts, model.image_variance(data), settings.errors)
        fields, metrics = fields | maps, metrics | found
    return Solution(volume, history, outcome.status, ok, metrics, fields)


def reconstruct_batch(data: MultiModal, settings: Sequence[Settings], *, checkpoints: Sequence[int] = (),
                      observe: Callable[[int, int, np.ndarray], None] | None = None,
                      keep: Keep | None = None) -> list[Solution]:
    """`reconstruct` for several settings, one after the other: a map fills a device by itself, or is done in no time.

    observe(which, iteration, volume).
    """
    watches = [None if observe is None else partial(observe, k) for k in range(len(settings))]
    return [reconstruct(data, each, checkpoints=checkpoints, observe=watch, keep=keep if len(settings) == 1 else None)
            for each, watch in zip(settings, watches)]


def solver(method: str, counts: bool) -> tuple[Callable, Callable, Callable]:
    """(start, step, volume of a state) of a method; the same objects each time, so that nothing compiles twice."""
    if method in ("plain", "fista"):
        return descent.solver(method, counts)
    return _START[method, counts], _STEP[method, counts], volume_of


def volume_of(state: State) -> jax.Array:
    """The volume of a state; pixels on the floor are 0."""
    return jnp.where(state.x > FLOOR, state.x, 0.0)


def _as_measured(data: MultiModal, problem: Problem) -> dict[str, np.ndarray]:
    """What was measured, to lay beside the result: maps as concentrations (element, 1, y, x), and the image (y, x)."""
    maps = (data.chem.projections - data.chem.background) / np.asarray(problem.sensitivity).reshape(-1, 1, 1, 1)
    image = {} if data.haadf is None else {"image": data.haadf.projections[0, 0]}
    return {"measured": maps.astype(np.float32)} | image


def _check(data: MultiModal, settings: Settings) -> None:
    """Data that are one plane, with an image where the method needs one; a warning for elements without a map."""
    images = data.haadf.tilts if data.haadf is not None else 1
    if (data.shape[0], data.chem.tilts, images) != (1, 1, 1) or data.shape[1] != data.chem.projections.shape[2]:
        raise DataError(f"fused2d takes one image and one map per element, not {images} and {data.chem.tilts} for a "
                        f"volume of {data.shape} voxels; for a tilt series write system: fused3d")
    angles = [data.chem.angles[0], *(data.haadf.angles if data.haadf is not None else ())]
    if any(angles):
        raise DataError(f"fused2d needs maps at 0 degrees, not {angles[0]:g}: a plane has no tilt")
    if data.haadf is None and settings.method != "chem_tv":
        raise DataError(f"method {settings.method} needs a HAADF image; without one use chem_tv")
    if settings.missing:
        warnings.warn(f"elements {', '.join(map(str, settings.missing))} (atomic numbers) have no map: the share that "
                      f"each of {', '.join(data.chem.elements)} has in the HAADF image is fitted to the maps, and "
                      "concentrations are relative to these elements alone", DataWarning, stacklevel=3)


@jax.jit
def _guided(problem: Problem, strength: float) -> Problem:
    return problem._replace(guide=guide.directions(problem.images, problem.image_noise, strength))


def _fitted(problem: Problem) -> jax.Array:
    """(element, 1, 1, 1) contrasts that fit the image best, for elements that stand for others or have no known scale.

    From maps smoothed by 2 pixels: the noise of a map looks like a contrast that the image has not. Of elements that go
    together in all of the specimen (Ga and O in Ga2O3) only the sum is determined; the maps alone tell them apart.
    """
    images, maps = (guide.smoothed(each, 4) for each in (problem.images, problem.start))
    contrast = model.fit_contrast(np.asarray(images), np.asarray(maps ** problem.gamma))
    return jnp.asarray(contrast / contrast.max(), jnp.float32).reshape(problem.contrast.shape)


def start(problem: Problem, *, counts: bool, fused: bool) -> tuple[State, jax.Array]:
    """The state before the first iteration, which has the measured maps (F2, Methods), and its cost.

    Smoothed a little: for gamma > 1 a pixel without counts hears nothing of the image, and would stay without. At
    chemical SNR 1.5 and 3 the cost ended at 2359 and 1545 from the maps as measured, at 1031 and 1046 so (64 x 64).
    """
    x = jnp.maximum(guide.smoothed(problem.start, 1), FLOOR)
    pull = _pull(problem, x, model.scattering(problem, x), counts)
    gain = model.fit_gain(problem, pull.scatter, pull.signal) if fused else jnp.float32(1)
    return _begun(problem, x, pull, gain, fused)


def refined(problem: Problem, coarse: State, *, counts: bool, fused: bool) -> tuple[State, jax.Array]:
    """The state before the first iteration, which has the maps of half the resolution, and its cost."""
    x = pyramid.finer_volume(coarse.x, problem)
    return _begun(problem, x, _pull(problem, x, model.scattering(problem, x), counts), coarse.gain, fused)


def _begun(problem: Problem, x: jax.Array, pull: Pull, gain: jax.Array, fused: bool) -> tuple[State, jax.Array]:
    terms = _cost(problem, x, pull, gain, fused)
    return settled(State(x, pull, zero_dual(x), gain, jnp.ones_like(x[0]), terms, jnp.float32(1))), terms


def _coarse_to_fine(problem: Problem, kind: tuple[str, bool], settings: Settings,
                    data: MultiModal) -> tuple[State, jax.Array]:
    """What a solve starts from, after a solve at each coarser size."""
    problems = [problem]
    for _ in range(halvings(*data.shape[1:])):
        coarse = _coarser(problems[-1]._replace(guide=None), kind[1])
        problems.append(coarse if problem.guide is None else _guided(coarse, settings.guide))
    begun = _compiled(_START[kind])(problems[-1])
    for coarse, finer in zip(reversed(problems), reversed(problems[:-1])):
        begun = _compiled(_REFINE[kind])(finer, solve(_STEP[kind], coarse, begun, settings.coarse).state)
    return begun


def step(problem: Problem, state: State, iteration: jax.Array, *, counts: bool,
         fused: bool) -> tuple[State, jax.Array, jax.Array]:
    """One step to the minimiser of the quadratic model, taken if the cost does not rise."""
    x, pull, gain = state.x, state.pull, state.gain
    fisher = problem.lambda_chem * problem.sensitivity**2 * precision(problem, pull.signal, counts)
    rho = model.image_precision(problem, gain) if fused else jnp.float32(0)
    block = coupling.Block(x, _image_pull(problem, pull, gain, fused), pull.slope, state.caution * fisher,
                           problem.contrast, problem.gamma, jnp.float32(1), rho, jnp.float32(FLOOR))
    target, rate = coupling.target(block, guide.steered(state.tv_dual, problem.guide))
    dual = _raised(problem, target, rate, state.tv_dual)
    new, scatter = coupling.minimiser(block, guide.steered(dual, problem.guide))
    ahead = _pull(problem, new, scatter, counts)
    terms = _cost(problem, new, ahead, gain, fused)
    taken = terms[-1] <= (1 + SLACK) * state.terms[-1]
    caution = jax.lax.cond(
        taken, lambda: jnp.maximum(FADE * state.caution, 1),
        lambda: jnp.where(_misjudged(problem, block, pull, ahead, new, gain, fused), 4, 1) * state.caution)
    relative = jnp.abs(terms[-1] - state.terms[-1]) / jnp.maximum(state.terms[-1], 1e-20)
    drift = jnp.where(taken, state.drift + MEMORY * (relative - state.drift), state.drift)
    new, pull, terms = jax.tree.map(lambda a, b: jnp.where(taken, a, b), (new, ahead, terms), (x, pull, state.terms))
    if fused:
        def refitted() -> tuple[jax.Array, jax.Array, jax.Array]:
            fitted = model.fit_gain(problem, pull.scatter, pull.signal)
            return fitted, _cost(problem, new, pull, fitted, fused), jnp.float32(1)

        gain, terms, drift = jax.lax.cond(iteration < GAIN_STEPS, refitted, lambda: (gain, terms, drift))
    return State(new, pull, dual, gain, caution, terms, drift), terms, drift


def precision(problem: Problem, signal: jax.Array, counts: bool) -> jax.Array:
    """Fisher information of a map's pixel where its signal is `signal`: 1 / variance."""
    if not counts:
        return problem.map_weight * jnp.ones_like(signal)
    return model.poisson_curvature(signal + problem.background)


def _pull(problem: Problem, x: jax.Array, scatter: jax.Array, counts: bool) -> Pull:
    signal = problem.sensitivity * x
    value, slope = model.likelihood(problem, signal + problem.background, counts)
    pull = Pull(value, signal, problem.lambda_chem * problem.sensitivity * slope, scatter)
    return jax.lax.optimization_barrier(pull)  # or XLA would make it anew in all that reads it


def _image_pull(problem: Problem, pull: Pull, gain: jax.Array, fused: bool) -> jax.Array:
    """(1, y, x): times S' it is the slope of the image's term."""
    if not fused:
        return jnp.zeros_like(pull.scatter)
    return model.image_precision(problem, gain) * (pull.scatter - problem.images / gain)


def _raised(problem: Problem, target: jax.Array, rate: jax.Array, dual: Dual) -> Dual:
    """TV's dual after a few steps."""
    if problem.guide is None:
        return tv_dual(target, problem.lambda_tv, rate, dual, problem.inner, FLOOR, problem.planes)
    return guide.tv_dual(target, problem.lambda_tv, rate, dual, problem.inner, jnp.float32(FLOOR), problem.guide)


def _cost(problem: Problem, x: jax.Array, pull: Pull, gain: jax.Array, fused: bool) -> jax.Array:
    return model.cost_terms(problem, x, pull.scatter if fused else None, pull.value, gain)


def _misjudged(problem: Problem, block: coupling.Block, pull: Pull, ahead: Pull, new: jax.Array, gain: jax.Array,
               fused: bool) -> jax.Array:
    """(1, y, x) where the slope has changed by more, along the step, than the quadratic model says."""
    move = new - block.x
    before, after = (model.scattering_slope(problem, x) for x in (block.x, new))
    images = _image_pull(problem, ahead, gain, fused)
    changed = (move * (ahead.slope - pull.slope + after * images - before * block.images)).sum(0)
    own = block.bound + (block.gamma - 1) * jnp.maximum(before * block.images, 0) / block.x
    return changed > MISTRUST * ((own * move**2).sum(0) + block.rho * (before * move).sum(0) ** 2)


_compiled = cache(jax.jit)  # wrapping anew at each call took longer than the smallest maps' steps
_coarser = jax.jit(pyramid.coarser, static_argnums=1)
_KINDS = [(name, counts) for name in ("fused", "chem_tv") for counts in (True, False)]
_START = {(name, counts): partial(start, counts=counts, fused=name == "fused") for name, counts in _KINDS}
_REFINE = {(name, counts): partial(refined, counts=counts, fused=name == "fused") for name, counts in _KINDS}
_STEP = {(name, counts): partial(step, counts=counts, fused=name == "fused") for name, counts in _KINDS}
