"""Standard errors of fused volumes: how far noise alone moves each voxel, from one measurement.

As for maps (`engine.uncertainty`), Cov(x) = H^-1 F H^-1 to first order, for any weights: H the expected Hessian of the
objective, F the covariance of its slope, which the noise of the counts and of the images decides,

    H = lambda_chem s A_c' W A_c s + P S' A_h' A_h S' + lambda_tv T        P = lambda_model gain^2 / sigma^2
    F = lambda_chem^2 s A_c' W^2 var(b) A_c s + (P / gain)^2 S' A_h' var(b_H) A_h S'

with W = 1 / variance of a map's pixel as expected. A projector couples all voxels of a plane, so neither matrix is ever
made. With random signs e, one for each pixel that was measured, u = H^-1 F^(1/2) e has the covariance asked for; the
mean of u^2 over some probes is its diagonal, with an error of sqrt(1 / (2 probes)) of each standard error, whatever the
correlations. u is found by conjugate gradients.

Few maps leave most of a volume to total variation, and the data terms alone are singular (the missing wedge, and what
HAADF does not tell apart). So unlike in 2D, TV stands in H: T is the second derivative at the solution of its sum of
gradient lengths, rounded off below ROUND of the brightest concentrations, which holds flat regions flat and lets edges
stay where they are. What neither data nor TV hold is not moved by noise: conjugate gradients, which start from nothing,
stay among what the noise can move. Errors are those of noise alone; what TV or the missing wedge distort in every draw
alike is not in them. Voxels on the bound x = 0 are held there, and have no error (NaN).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import model, sharding
from engine.data import DataWarning
from engine.model import FLOOR, Problem
from engine.penalties import Dual, gradient, gradient_adjoint
from engine.projector import project
from engine.sizes import halvings
from engine.uncertainty import OBJECT

# Of the brightest concentrations, the share below which a gradient of the solution counts as none. From 0.01 to 0.1
# the median error moved by 2 % (32^3, F3's noise, 47 images and 9 maps).
ROUND = 0.02
LARGE = 0.5  # average error over average concentration above which they are not to be believed
ACCURACY = 0.01  # residual at which conjugate gradients end; 0.02 gave errors 2 % smaller
STEPS = 400  # of theirs at most; at weights that a search finds they take 100 to 150


class Point(NamedTuple):
    """What the Hessian needs of the solution."""

    free: jax.Array  # (element, z, y, x) 1 where a voxel may move
    slope: jax.Array  # (element, z, y, x) S', 0 where held
    maps: jax.Array  # (element, tilt, y, x) lambda_chem W, 0 for tilts that are not fitted
    images: jax.Array  # () P
    image_error: jax.Array  # (tilt, y, x) or smaller: (P / gain) standard deviation of b_H
    edge: Dual  # the gradient over its rounded length, of the widened volume
    stiff: jax.Array  # lambda_tv over that length, of the widened volume
    own: jax.Array  # (element, z, y, x) about the Hessian's diagonal without images
    seen: jax.Array  # (z, y, x) P A_h' 1: the images' part of a voxel's block is about seen S' S''


class Sums(NamedTuple):
    """Over probes: of u^2 and of (u - share of it all)^2; the worst residual, and steps of conjugate gradients."""

    own: jax.Array
    relative: jax.Array
    residual: jax.Array
    steps: jax.Array


def errors(problem: Problem, volume: np.ndarray, gain: float, counts: bool, image_variance: float | None, probes: int,
           slabs: int = 1) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Volumes of standard errors by name, and their averages, as `engine.uncertainty.errors` has them for maps.

    volume: (element, z, y, x). problem: over so many slabs, without images for a method that has not seen them.
    image_variance: per unit of the images where they are counts; None: the same everywhere. error_residual is the
    worst that conjugate gradients left over. Warns (DataWarning) where errors are as large as the concentrations.
    """
    total = volume.sum(0, dtype=np.float64)
    bright = np.percentile(volume, 99, axis=(1, 2, 3)).max()
    cut = jnp.asarray(sharding.split(np.asarray(volume, np.float32), slabs, halvings(*volume.shape[1:3])))
    given = sharding.repeated((np.float32(gain), np.float32(ROUND * bright),
                               np.float32(-1 if image_variance is None else image_variance), np.int32(probes)), slabs)
    sums = sharding.spread(_probed(counts), slabs)(problem, cut, *given)
    own, relative = (sharding.join(a, slabs, volume.shape[-1]) / probes for a in sums[:2])
    held = volume <= FLOOR
    error = np.where(held, np.nan, np.sqrt(own)).astype(np.float32)
    inside = total > OBJECT * np.percentile(total, 99)
    share = np.where(held | ~inside, np.nan, 100 * np.sqrt(relative)).astype(np.float32)
    if np.nanmean(error[:, inside]) > LARGE * volume[:, inside][~held[:, inside]].mean():
        warnings.warn(f"the standard errors average {np.nanmean(error[:, inside]):.2g} where concentrations average "
                      f"{volume[:, inside][~held[:, inside]].mean():.2g}: data and TV do not determine the volume, and "
                      "errors to first order are no measure of it; raise lambda_tv", DataWarning, stacklevel=2)
    residual, steps = sharding.one(sums[2:], slabs)
    averages = {"average_standard_error": float(np.nanmean(error[:, inside])),
                "average_relative_error": float(np.nanmean(share)), "error_residual": float(residual),
                "error_steps": float(steps) / probes}
    return {"standard_error": error, "relative_error": share}, averages


@cache
def _probed(counts: bool) -> Callable:
    """The same object each time, so that it compiles once per shape."""
    return partial(_probe, counts=counts)


def _probe(problem: Problem, x: jax.Array, gain: jax.Array, rounding: jax.Array, variance: jax.Array,
           probes: jax.Array, *, counts: bool) -> Sums:
    """The sums over all probes, one after the other."""
    at = _point(problem, x, gain, rounding, variance, counts)
    whole = jnp.maximum(x.sum(0), FLOOR)
    key = jax.random.key(0)

    def one(k: jax.Array, sums: Sums) -> Sums:
        u, residual, steps = _solved(problem, at, _slope_noise(problem, at, jax.random.fold_in(key, k)))
        relative = (u - x / whole * u.sum(0)) / whole
        return Sums(sums.own + u**2, sums.relative + relative**2, jnp.maximum(sums.residual, residual),
                    sums.steps + steps)

    nothing = jnp.zeros_like(x)
    return jax.lax.fori_loop(0, probes, one, Sums(nothing, nothing, jnp.float32(0), jnp.int32(0)))


def _point(problem: Problem, x: jax.Array, gain: jax.Array, rounding: jax.Array, variance: jax.Array,
           counts: bool) -> Point:
    exist = sharding.present(problem.planes, x.shape[-1])
    free = (x > FLOOR) * exist
    slope = free * model.scattering_slope(problem, jnp.maximum(x, FLOOR))
    signal = problem.sensitivity * project(x, problem.map_rays, problem.maps.shape[-2])
    maps = model.map_seen(problem) * problem.lambda_chem * _precision(problem, signal, counts)
    images, image_error, seen = jnp.float32(0), jnp.zeros_like(problem.images), jnp.zeros_like(x[0])
    if problem.images.shape[0]:
        images = model.image_precision(problem, gain)
        counted = jnp.sqrt(jnp.maximum(variance, 0) * gain * model.project_images(
            problem, model.scattering(problem, jnp.maximum(x, FLOOR))))
        image_error = images / gain * jnp.where(variance < 0, problem.image_noise, counted)
        image_error *= model.image_seen(problem)
        seen = images * model.backproject_images(problem, jnp.ones_like(problem.images))
    first = sharding.first_plane(x.shape[-1]) - 1
    steep = gradient(sharding.overlap(x, 1, 1), (-first, problem.planes - first))
    length = jnp.sqrt(steep.z**2 + steep.y**2 + steep.x**2 + rounding**2)
    stiff = problem.lambda_tv / length
    touching = gradient_adjoint(Dual(stiff, stiff, stiff)) + 6 * stiff  # the diagonal of D' stiff D
    own = model.backproject_maps(problem, problem.sensitivity * maps) + touching[..., 1:-1]
    own = jnp.maximum(own, 1e-4 * sharding.largest(own.max()))
    return Point(free, slope, maps, images, image_error, Dual(*(d / length for d in steep)), stiff, own, seen)


def _precision(problem: Problem, signal: jax.Array, counts: bool) -> jax.Array:
    """1 / variance of a map's pixel, where the maps' signal is `signal`."""
    if not counts:
        return problem.map_weight * jnp.ones_like(signal)
    return model.poisson_curvature(signal + problem.background)


def _hessian(problem: Problem, at: Point, v: jax.Array) -> jax.Array:
    """H v for a v that is 0 where voxels are held, and 0 there again."""
    signal = problem.sensitivity * project(v, problem.map_rays, problem.maps.shape[-2])
    result = model.backproject_maps(problem, at.maps * signal)
    if problem.images.shape[0]:
        seen = at.images * model.image_seen(problem) * model.project_images(problem, (at.slope * v).sum(0))
        result += at.slope * model.backproject_images(problem, seen)
    first = sharding.first_plane(v.shape[-1]) - 1
    step = gradient(sharding.overlap(v, 1, 1), (-first, problem.planes - first))
    along = sum(e * s for e, s in zip(at.edge, step))
    pull = gradient_adjoint(Dual(*(at.stiff * (s - e * along) for e, s in zip(at.edge, step))))
    return at.free * (result + pull[..., 1:-1])


def _preconditioned(at: Point, v: jax.Array) -> jax.Array:
    """v by the inverse of each voxel's block of elements, diag(own) + seen S' S'', which the images couple."""
    apart, give = v / at.own, at.slope / at.own
    return apart - give * at.seen * (at.slope * apart).sum(0) / (1 + at.seen * (at.slope * give).sum(0))


def _slope_noise(problem: Problem, at: Point, key: jax.Array) -> jax.Array:
    """F^(1/2) e: a slope of the objective as noise makes it."""
    keys = jax.random.split(key)
    signs = _signs(keys[0], problem.maps.shape)
    slope = model.backproject_maps(problem, jnp.sqrt(problem.lambda_chem * at.maps) * signs)
    if problem.images.shape[0]:
        signs = _signs(keys[1], problem.images.shape)
        slope += at.slope * model.backproject_images(problem, at.image_error * signs)
    return at.free * slope


def _signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random signs (..., x), each plane's by its own number, however many slabs there are."""
    numbers = jnp.asarray(sharding.first_plane(shape[-1]) + jnp.arange(shape[-1]), jnp.uint32)
    planes = jax.vmap(lambda n: jax.random.rademacher(jax.random.fold_in(key, n), shape[:-1], jnp.float32))(numbers)
    return jnp.moveaxis(planes, 0, -1)


def _solved(problem: Problem, at: Point, right: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """H^-1 right by preconditioned conjugate gradients, the residual relative to `right`, and the steps."""
    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return sharding.total((a * b).sum())

    first = _preconditioned(at, right)
    size = jnp.maximum(dot(right, first), 1e-30)

    def going(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[3] > ACCURACY**2 * size) & (state[4] < STEPS)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        u, left, way, power, k = state
        bent = _hessian(problem, at, way)
        length = power / jnp.maximum(dot(way, bent), 1e-30)
        u, left = u + length * way, left - length * bent
        ahead = _preconditioned(at, left)
        after = dot(left, ahead)
        return u, left, ahead + after / power * way, after, k + 1

    begun: tuple[jax.Array, ...] = (jnp.zeros_like(right), right, first, size, jnp.int32(0))
    u, _, _, power, steps = jax.lax.while_loop(going, step, begun)
    return u, jnp.sqrt(power / size), steps
