"""Isotropic total variation of volumes (..., z, y, x) with a non-negativity bound, and its proximal operator."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_AXES = (-3, -2, -1)


class Dual(NamedTuple):
    """The dual field of TV: one array of the volume's shape per direction, |dual| <= weight at each voxel."""

    z: jax.Array
    y: jax.Array
    x: jax.Array


def zero_dual(volume: jax.Array) -> Dual:
    """The dual field to start from when nothing is known."""
    return Dual(jnp.zeros_like(volume), jnp.zeros_like(volume), jnp.zeros_like(volume))


def gradient(volume: jax.Array) -> Dual:
    """Forward differences along z, y, x; 0 behind the last voxel."""
    return Dual(*(jnp.where(_crossed(volume, axis), _shifted(volume, axis, 1) - volume, 0) for axis in _AXES))


def gradient_adjoint(dual: Dual) -> jax.Array:
    """The adjoint of `gradient` (minus the divergence) of a field that is 0 behind the last voxel."""
    z, y, x = (_shifted(field, axis, -1) - field for field, axis in zip(dual, _AXES))
    return z + y + x


def total_variation(volume: jax.Array) -> jax.Array:
    """Sum over voxels of the length of the gradient, per leading index: (...)."""
    g = gradient(volume)
    return jnp.sqrt(g.z**2 + g.y**2 + g.x**2).sum((-3, -2, -1))


def prox_tv(volume: jax.Array, weight: jax.Array, metric: jax.Array, dual: Dual, steps: int | jax.Array,
            floor: jax.Array | float = 0.0) -> tuple[jax.Array, Dual]:
    """argmin over u >= floor of  |u - volume|^2 / (2 metric) + weight TV(u), and its dual field.

    metric: step size per voxel, of the volume's shape or broadcastable to it. dual: where to start; the field of the
    last call makes two to four steps enough. Fast gradient projection on the dual (A. Beck, M. Teboulle,
    IEEE Trans. Image Process. 18, 2419 (2009)), with a step per voxel: row sums bound the curvature K D K' of the
    dual by 6 (D here + D there), which is their 12 where the metric is constant.
    """
    metric = jnp.broadcast_to(metric, volume.shape)
    if volume.ndim > 3:
        # Elements one at a time: their ten arrays stay in the cache, which nearly halves the time at 64^3.
        def one(element: tuple) -> tuple[jax.Array, Dual]:
            return prox_tv(element[0], weight, element[1], element[2], steps, floor)

        return jax.lax.map(one, (volume, metric, dual))
    ahead = [_shifted(metric, axis, 1) for axis in _AXES]
    rate = 1 / (6 * (metric + jnp.maximum(jnp.maximum(ahead[0], ahead[1]), jnp.maximum(ahead[2], metric))))

    def primal(field: Dual) -> jax.Array:
        return jnp.maximum(volume - metric * gradient_adjoint(field), floor)

    def step(_: int, state: tuple[Dual, Dual, jax.Array]) -> tuple[Dual, Dual, jax.Array]:
        last, ahead, t = state
        slope = gradient(primal(ahead))
        raised = Dual(*(a + rate * s for a, s in zip(ahead, slope)))
        shrink = _shrink(raised, weight)
        new = Dual(*(r * shrink for r in raised))
        t_new = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        push = (t - 1) / t_new
        return new, Dual(*(n + push * (n - o) for n, o in zip(new, last))), t_new

    shrink = _shrink(dual, weight)
    start = Dual(*(d * shrink for d in dual))
    field, _, _ = jax.lax.fori_loop(0, steps, step, (start, start, jnp.float32(1)))
    return primal(field), field


def _shrink(field: Dual, weight: jax.Array) -> jax.Array:
    """The factor that brings each voxel's vector to a length of at most `weight`."""
    square = field.z**2 + field.y**2 + field.x**2
    return jnp.minimum(1.0, weight * jax.lax.rsqrt(jnp.maximum(square, 1e-36)))


def _shifted(a: jax.Array, axis: int, by: int) -> jax.Array:
    """a at the next (by = 1) or previous (by = -1) voxel; 0 beyond the volume. One pad, which fuses."""
    widths = [(0, 0, 0)] * a.ndim
    widths[axis] = (-by, by, 0)
    return jax.lax.pad(a, jnp.zeros((), a.dtype), widths)


def _crossed(a: jax.Array, axis: int) -> jax.Array:
    """Where a forward difference along `axis` exists: everywhere but at the last voxel."""
    axis %= a.ndim
    return jax.lax.broadcasted_iota(jnp.int32, a.shape, axis) < a.shape[axis] - 1
