"""Coarse to fine: a problem at half its resolution, and a coarse solution as the start of the finer problem.

Half as many voxels and pixels per axis cost an eighth, and every binned pixel has four times the counts: that is where
a solver finds the large structures fastest. Two pixels become one about the same centre, so that the tilt axis stays
where it is; an odd number grows by half a pixel on either side. Planes along x are taken in pairs, so that slabs of an
even width need not be cut anew.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine import sharding
from engine.model import FLOOR, Problem
from engine.penalties import Dual


def coarser(problem: Problem, counts: bool) -> Problem:
    """The problem of half the voxels per axis: the same objective, but for what is lost between its pixels.

    In voxels of twice the edge paths are half as long and surfaces a quarter; in pixels of a map, which has no depth,
    outlines are half as long. Counts add up; other maps and the images are averaged, which halves their noise.
    """
    path, surface = (2.0, 4.0) if problem.start.shape[1] > 1 else (1.0, 2.0)
    exist = sharding.present(problem.planes, problem.images.shape[-1])
    scale = 4.0 if counts else 1.0

    def binned(a: jax.Array) -> jax.Array:
        return _paired(_halved(a, -2), exist)

    return problem._replace(
        images=binned(problem.images), image_noise=problem.image_noise / 2, maps=scale * binned(problem.maps),
        background=scale * binned(problem.background), map_weight=problem.map_weight * 4 / scale,
        sensitivity=path * scale * problem.sensitivity, start=jnp.maximum(_halved(binned(problem.start), 1), FLOOR),
        lambda_tv=surface * problem.lambda_tv, planes=(problem.planes + 1) // 2)


def finer_volume(coarse: jax.Array, problem: Problem) -> jax.Array:
    """A coarse (element, z, y, x) volume in the voxels of `problem`."""
    nz, ny, nx = problem.start.shape[1:]
    return jnp.maximum(_spread(_doubled(_doubled(coarse, 1, nz), 2, ny), problem.planes, nx), FLOOR)


def finer_duals(images: jax.Array, maps: jax.Array, tv: Dual, problem: Problem,
                counts: bool) -> tuple[jax.Array, jax.Array, Dual]:
    """The duals of a coarse solve, as those of `problem`: of the images, of the maps, of TV."""
    nz, ny, nx = problem.start.shape[1:]
    pixels = problem.maps.shape[-2]

    def spread(a: jax.Array) -> jax.Array:
        return _spread(_doubled(a, -2, pixels), problem.planes, nx)

    z, y, x = (_spread(_doubled(_doubled(d, 1, nz), 2, ny), problem.planes, nx) / 4 for d in tv)
    place = sharding.first_plane(nx) + jnp.arange(nx)
    # An image of twice the pixel has 16 times the precision and half the error, a map that is no count 4 times.
    return (spread(images) / 8, spread(maps) / (1 if counts else 4),
            Dual(z, y, jnp.where(place + 1 < problem.planes, x, 0)))


def _halved(a: jax.Array, axis: int) -> jax.Array:
    """Means of two neighbours along a centred axis; what has one value there keeps it."""
    axis %= a.ndim
    count = a.shape[axis]
    if count == 1:
        return a
    even, odd = (jax.lax.slice_in_dim(a, k, None, 2, axis) for k in (0, 1))
    if count % 2 == 0:
        return (even + odd) / 2
    # Each coarse pixel has one fine pixel in its middle and half of both neighbours.
    widths = [(0, 0)] * a.ndim
    widths[axis] = (1, 1)
    odd = jnp.pad(odd, widths)
    pairs = jax.lax.slice_in_dim(odd, 0, -1, 1, axis) + jax.lax.slice_in_dim(odd, 1, None, 1, axis)
    cover = jnp.full(even.shape[axis], 2.0).at[jnp.array([0, -1])].set(1.5)
    return (even + pairs / 2) / cover.reshape((-1,) + (1,) * (a.ndim - 1 - axis))


def _paired(a: jax.Array, exist: jax.Array) -> jax.Array:
    """Means of the planes 2 j and 2 j + 1 along x, of those of them that exist."""
    if a.shape[-1] == 1 and len(exist) > 1:
        return a
    odd = len(exist) % 2
    a, exist = (jnp.pad(b, [(0, 0)] * (b.ndim - 1) + [(0, odd)]) for b in (a * exist, exist))
    first, second = (b[..., 0::2] + b[..., 1::2] for b in (a, exist))
    return first / jnp.maximum(second, 1)


def _doubled(a: jax.Array, axis: int, count: int) -> jax.Array:
    """The inverse grid of `_halved`, `count` long: linear interpolation, constant beyond the outermost centres."""
    axis %= a.ndim
    ends = [jax.lax.slice_in_dim(a, k, k + 1, 1, axis) for k in (0, a.shape[axis] - 1)]
    before = jnp.concatenate([ends[0], jax.lax.slice_in_dim(a, 0, -1, 1, axis)], axis)
    behind = jnp.concatenate([jax.lax.slice_in_dim(a, 1, None, 1, axis), ends[1]], axis)
    pair = (a, (a + behind) / 2) if count % 2 else ((3 * a + before) / 4, (3 * a + behind) / 4)
    both = jnp.stack(pair, axis + 1)
    return jax.lax.slice_in_dim(both.reshape(*a.shape[:axis], -1, *a.shape[axis + 1:]), 0, count, 1, axis)


def _spread(a: jax.Array, planes: jax.Array, width: int) -> jax.Array:
    """The inverse grid of `_paired`, `width` planes in this slab, of `planes` that exist in all."""
    wide = sharding.overlap(a, 1, 1)
    place = sharding.first_plane(a.shape[-1]) + jnp.arange(a.shape[-1])
    before = jnp.where(place > 0, wide[..., :-2], a)
    behind = jnp.where(place + 1 < (planes + 1) // 2, wide[..., 2:], a)
    both = jnp.stack(((3 * a + before) / 4, (3 * a + behind) / 4), -1)
    return both.reshape(*a.shape[:-1], -1)[..., :width]
