"""SIRT with non-negativity, of one kind of projections or of HEBT's two kinds together, as a step for `iterate.solve`.

The stacked system (HEBT, Eq. 17): (1 - alpha) W_c x_i = (1 - alpha) b_i for each of k elements, and
alpha W_h sum_i x_i = alpha b_H. With e the residuals, R one over the row sums of W, s its column sums, SIRT is

    x_i += [u W_c' R_c e_i + v W_h' R_h e_H] / (u s_c + k v s_h),  then x >= 0

u = 1 - alpha, v = alpha / k is SIRT's own row scaling of the stacked rows, `row`; u = (1 - alpha)^2, v = alpha^2 are
their weights in least squares, `plain`. Without the bound x >= 0, and at equal angles, this falls apart: the sum of
the x_i is SIRT of the sum of the data at rate 1, every difference x_i - x_j SIRT of b_i - b_j at the rate
u / (u + k v), which for `row` is 1 - alpha. The images have no say in the differences, which settle 1 / (1 - alpha)
times later than SIRT of the maps alone.

Least squares corrects all elements alike by what the images say, in units of HAADF, also one that is not there or
hardly scatters, and of that one the counts then change most. `preconditioned` has shares p_i of it per voxel, which
add up to 1, and a rate d of its own for what the elements have apart from that; g_c = sum_i W_c' R_c e_i:

    x_i += d (W_c' R_c e_i - p_i g_c) / s_c + p_i (u g_c + k v W_h' R_h e_H) / (u s_c + k v s_h)

Again the sum goes at rate 1. All channels have Nesterov's momentum, n iterations of which do what about n^2 / 4 do
without. Data that agree have the same solution in both forms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from engine import sharding
from engine.iterate import settled
from engine.projector import Geometry, backproject, project

TERMS = ("haadf", "eds", "total")
_LEAST = 1e-3  # voxel lengths: rays and voxels that meet less than that are left alone


class Scale(NamedTuple):
    """One over the row sums of a projector, (tilt, pixel, 1), 0 for tilts that are not used, and its column sums."""

    rows: jax.Array
    columns: jax.Array  # (z, y, 1)


class Problem(NamedTuple):
    """What SIRT fits, in one unit. Lists of tilts are padded; padded and held-out tilts have no rows."""

    images: jax.Array  # (tilt, y, x); of one kind alone (0, y, x)
    maps: jax.Array  # (element, tilt, y, x)
    image_rays: Geometry
    map_rays: Geometry
    image_scale: Scale
    map_scale: Scale
    alpha: jax.Array
    relaxation: jax.Array
    differences: jax.Array  # d, preconditioned
    shares: jax.Array  # p, (element, z, y, x), preconditioned


class Kind(NamedTuple):
    """What is compiled in. shared: images and maps have the same tilts."""

    bimodal: bool
    shared: bool = False
    plain: bool = False
    preconditioned: bool = False
    positive: bool = True


class State(NamedTuple):
    """x and its projections, the same one iteration before where there is momentum, and Nesterov's t."""

    x: jax.Array
    signal: jax.Array  # W_c x, (element, tilt, y, x)
    image: jax.Array  # W_h sum x, (tilt, y, x)
    before: jax.Array
    signal_before: jax.Array
    image_before: jax.Array
    t: jax.Array


@partial(jax.jit, static_argnums=(1, 2))
def scale(rays: Geometry, shape: tuple[int, int], pixels: int) -> Scale:
    """Row and column sums of the projector of (nz, ny) voxels; every plane along x is alike."""
    if not rays.angles.size:
        return Scale(jnp.zeros((0, pixels, 1)), jnp.ones((*shape, 1)))
    used = rays.weight[:, None, None]
    path = project(jnp.ones((*shape, 1)), rays, pixels)
    columns = backproject(jnp.ones((rays.angles.shape[0], pixels, 1)), rays, *shape)
    return Scale(used / jnp.maximum(path, _LEAST), jnp.maximum(columns, _LEAST))


def weights(alpha: jax.Array, elements: int, plain: bool) -> tuple[jax.Array, jax.Array]:
    """u of the maps' rows and v of the images' in the update of one element."""
    return ((1 - alpha) ** 2, alpha**2) if plain else (1 - alpha, alpha / elements)


@cache
def solver(kind: Kind) -> tuple[Callable, Callable]:
    """(start, step) of a kind; the same objects each time, so that nothing compiles twice."""
    return partial(start, kind=kind), partial(step, kind=kind)


def start(problem: Problem, kind: Kind) -> tuple[State, jax.Array]:
    """Nothing, and its cost."""
    shape = (problem.maps.shape[0], *problem.map_scale.columns.shape[:2], problem.maps.shape[-1])
    x, signal, image = jnp.zeros(shape), jnp.zeros_like(problem.maps), jnp.zeros_like(problem.images)
    past = (x, signal, image) if kind.preconditioned else (jnp.float32(0),) * 3
    return settled(State._make((x, signal, image, *past, jnp.float32(1)))), _cost(problem, signal, image, kind)


def step(problem: Problem, state: State, _: jax.Array, *, kind: Kind) -> tuple[State, jax.Array, jax.Array]:
    """One iteration; returns the state, its cost terms, the relative change."""
    x, signal, image = state[:3]
    t, past = state.t, state[3:6]
    if kind.preconditioned:
        t = (1 + jnp.sqrt(1 + 4 * state.t**2)) / 2
        past = (x, signal, image)
        x, signal, image = (now + (state.t - 1) / t * (now - before) for now, before in zip(past, state[3:6]))
    maps_error = problem.map_scale.rows * (problem.maps - signal)
    if kind.bimodal:
        image_error = problem.image_scale.rows * (problem.images - image)
        together = _shared if kind.shared and not kind.preconditioned else _separate
        x += problem.relaxation * together(problem, maps_error, image_error, kind)
    else:
        x += problem.relaxation * _back(problem, maps_error) / problem.map_scale.columns
    if kind.positive:
        x = jnp.maximum(x, 0)
    signal = project(x, problem.map_rays, problem.maps.shape[-2])
    if kind.bimodal:
        image = signal.sum(0) if kind.shared else project(x.sum(0), problem.image_rays, problem.images.shape[-2])
    terms = _cost(problem, signal, image, kind)
    return State._make((x, signal, image, *past, t)), terms, sharding.relative_change(x, state.x)


def _shared(problem: Problem, maps: jax.Array, images: jax.Array, kind: Kind) -> jax.Array:
    """The paper's update where both kinds have the same rays: one back projection per element."""
    u, v = weights(problem.alpha, maps.shape[0], kind.plain)
    return _back(problem, u * maps + v * images) / ((u + maps.shape[0] * v) * problem.map_scale.columns)


def _separate(problem: Problem, maps: jax.Array, images: jax.Array, kind: Kind) -> jax.Array:
    """The update of either form, for any rays."""
    count = maps.shape[0]
    u, v = weights(problem.alpha, count, kind.plain)
    columns = u * problem.map_scale.columns + count * v * problem.image_scale.columns
    own, seen = _back(problem, maps), backproject(images, problem.image_rays, *columns.shape[:2])
    if not kind.preconditioned:
        return (u * own + v * seen) / columns
    whole = own.sum(0)
    apart = problem.differences * (own - problem.shares * whole) / problem.map_scale.columns
    return apart + problem.shares * (u * whole + count * v * seen) / columns


def _back(problem: Problem, maps: jax.Array) -> jax.Array:
    return backproject(maps, problem.map_rays, *problem.map_scale.columns.shape[:2])


def _cost(problem: Problem, signal: jax.Array, image: jax.Array, kind: Kind) -> jax.Array:
    """Half the squared residuals of images and maps over the rays' lengths, and their sum as SIRT weighs it."""
    def half(scale: Scale, measured: jax.Array, expected: jax.Array) -> jax.Array:
        return sharding.total((scale.rows * (measured - expected) ** 2).sum()) / 2

    maps, images = half(problem.map_scale, problem.maps, signal), jnp.float32(0)
    u, v = jnp.float32(1), jnp.float32(0)
    if kind.bimodal:
        images = half(problem.image_scale, problem.images, image)
        u, v = weights(problem.alpha, problem.maps.shape[0], kind.plain)
    return jnp.stack([images, maps, u * maps + v * images])
