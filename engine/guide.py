"""Directional total variation: TV that leaves a map free to change where the image does, along the image's gradient.

With e = sqrt(strength) grad v / sqrt(|grad v|^2 + noise^2) from the image v, each pixel's gradient g of a map counts as
|g - e (e . g)|: an edge that the image has too costs less, one across it what it costs in plain TV, and an image that
shows nothing gives plain TV (M. J. Ehrhardt, M. M. Betcke, SIAM J. Imaging Sci. 9, 1084 (2016)). Only directions of the
image are used: its scale, a black level and what its detector does to contrast leave the result alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine import penalties
from engine.penalties import Dual

# From 2 to 8 and from 1 to 6, NRMSE of the specimens of engine.phantoms2d changed by a tenth or so.
WIDTH = 4  # binomial filters of one pixel's standard deviation before differences are taken
CLEAR = 3.0  # times its noise: a gradient of the image that gives a direction


def directions(image: jax.Array, noise: jax.Array, strength: jax.Array | float) -> jax.Array:
    """(2, 1, y, x): e along y and x, of length below sqrt(strength), for an image (1, y, x) and its noise per pixel."""
    smooth = jax.lax.optimization_barrier(smoothed(image, WIDTH))
    slope = penalties.gradient(smooth)
    # Of white noise after a Gaussian of variance v: noise^2 / (8 pi v^2) per direction.
    least = CLEAR * noise / (jnp.sqrt(8 * jnp.pi) * WIDTH)
    length = jnp.maximum(jnp.sqrt(slope.y**2 + slope.x**2 + least**2), 1e-20)  # an image may be told to have no noise
    return jnp.sqrt(jnp.float32(strength)) * jnp.stack([slope.y, slope.x]) / length


def steered(field: Dual, guide: jax.Array | None) -> Dual:
    """g - e (e . g) of a field (element, 1, y, x); the field itself without a guide. Its own adjoint."""
    if guide is None:
        return field
    along = guide[0] * field.y + guide[1] * field.x
    return Dual(field.z, field.y - guide[0] * along, field.x - guide[1] * along)


def total_variation(volume: jax.Array, guide: jax.Array) -> jax.Array:
    """Sum over pixels of the length of the steered gradient, (element,)."""
    slope = steered(penalties.gradient(volume), guide)
    return jnp.sqrt(slope.y**2 + slope.x**2).sum((-3, -2, -1))


def tv_dual(volume: jax.Array, weight: jax.Array, metric: jax.Array, dual: Dual, steps: jax.Array,
            floor: jax.Array, guide: jax.Array) -> Dual:
    """As `penalties.tv_dual`, for planes: raises the dual of directional TV, whose `steered` field pulls at the map."""
    metric = jnp.broadcast_to(metric, volume.shape)
    most = metric
    for axis in (-2, -1):
        most = jnp.maximum(most, jnp.roll(metric, -1, axis))
    # Steering shortens, so that the bound of plain TV holds with it.
    rate = jax.lax.optimization_barrier(penalties.relaxation(1) / (6 * (metric + most)))

    def step(_: int, field: Dual) -> Dual:
        slope = steered(penalties.gradient(penalties.primal(volume, metric, steered(field, guide), floor)), guide)
        y, x = field.y + rate * slope.y, field.x + rate * slope.x
        shrink = jnp.minimum(1.0, weight * jax.lax.rsqrt(jnp.maximum(y**2 + x**2, 1e-36)))
        return Dual(field.z, y * shrink, x * shrink)

    return jax.lax.fori_loop(0, steps, step, dual)


def smoothed(images: jax.Array, times: int) -> jax.Array:
    """Images (..., y, x) after `times` binomial filters of one pixel's standard deviation, the last pixels repeated."""
    for axis in (-1, -2):
        for _ in range(times):
            images = jax.lax.optimization_barrier(_filtered(images, axis))
    return images


def _filtered(images: jax.Array, axis: int) -> jax.Array:
    count, widths = images.shape[axis], [(0, 0)] * images.ndim
    widths[axis] = (2, 2)
    padded = jnp.pad(images, widths, mode="edge")
    parts = (weight / 16 * jax.lax.slice_in_dim(padded, k, k + count, 1, axis % images.ndim)
             for k, weight in enumerate((1, 4, 6, 4, 1)))
    return sum(parts, start=jnp.float32(0))
