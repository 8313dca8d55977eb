"""What couples the elements of a voxel in the fused solver: the images see one combination of them.

Per voxel, with slope_e = d/dx_e of c_e x_e^gamma, the fused step minimises over u_e >= floor

    sum_e force_e u_e + h_e (u_e - x_e)^2 / 2  +  rho / 2 (sum_e slope_e (u_e - x_e))^2

where force gathers the pulls of the images' dual, of the maps' dual and of TV's. The minimiser is
u_e = max(x_e - (force_e + slope_e total) / h_e, floor), and `total`, one number per voxel, the root of a concave,
piecewise linear function. The C and GPU forms take all of this in one pass, powers included.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engine import sharding
from engine.forms import fastest
from engine.penalties import Dual, Field, gradient_adjoint


class Block(NamedTuple):
    """The problem of every voxel but for TV's pull."""

    x: jax.Array  # (element, z, y, x), the volume now
    images: jax.Array  # (z, y, x), the images' dual projected back; times the slope it pulls each element
    maps: jax.Array  # (element, z, y, x), the maps' dual projected back
    bound: jax.Array  # (element, z, y, x), h is scale bound + the part of the images' own curvature
    contrast: jax.Array  # (element, 1, 1, 1), c
    gamma: jax.Array
    scale: jax.Array
    rho: jax.Array
    floor: jax.Array


def target(block: Block, dual: Dual) -> tuple[jax.Array, jax.Array]:
    """What TV's operator should start from, and its metric 1 / h, (element, z, y, x).

    TV sees the elements apart: in the target, the pull that couples them is the one for this dual, whose own pull is
    left out. Since h is the smaller metric, that still raises the dual objective.
    """
    return _couple(block, dual, final=False)


def minimiser(block: Block, dual: Dual) -> tuple[jax.Array, jax.Array]:
    """The exact minimiser for this dual, (element, z, y, x), and its sum_e c_e u_e^gamma, (z, y, x)."""
    return _couple(block, dual, final=True)


def scattering(x: jax.Array, contrast: jax.Array, gamma: jax.Array) -> jax.Array:
    """sum_e c_e x_e^gamma per voxel, (z, y, x); x > 0."""
    # Element by element, and by exp and log: XLA's CPU loops vectorise neither a sum over the leading axis nor a power.
    return sum((c * jnp.exp(gamma * jnp.log(x_e)) for c, x_e in zip(contrast, x)), start=jnp.float32(0))


def scattering_slope(x: jax.Array, contrast: jax.Array, gamma: jax.Array) -> jax.Array:
    """Its derivative with respect to x_e: gamma c_e x_e^(gamma - 1), (element, z, y, x)."""
    return gamma * contrast * jnp.exp((gamma - 1) * jnp.log(x))


def couple_reference(block: Block, dual: Field, edge: jax.Array, *, final: bool) -> tuple[jax.Array, jax.Array]:
    """`target` or, if `final`, `minimiser` in JAX alone; the faster forms are tested against it.

    edge: the dual's x component in front of the first plane, (element, z, y, 1).
    """
    x = block.x
    slope = scattering_slope(x, block.contrast, block.gamma)
    pull = slope * block.images
    # x^gamma is convex: where the images push an element down its own curvature adds to the metric.
    rate = 1 / (block.scale * block.bound + (block.gamma - 1) * jnp.maximum(pull, 0) / x)
    plain = x - rate * (pull + block.maps)
    free = plain - rate * gradient_adjoint(Dual(*(d.astype(x.dtype) for d in dual)), edge)
    give = rate * slope
    total = _balance(x, free, give, block.rho * slope, block.floor)
    if not final:
        return plain - give * total, rate
    new = jnp.maximum(free - give * total, block.floor)
    return new, scattering(new, block.contrast, block.gamma)


def _couple(block: Block, dual: Dual, *, final: bool) -> tuple[jax.Array, jax.Array]:
    edge = jnp.zeros_like(dual.x[..., :1])
    if sharding.slabs() > 1:
        edge = sharding.overlap(dual.x, 1, 0)[..., :1]
    block = block._replace(**{name: jnp.asarray(getattr(block, name), jnp.float32)
                              for name in ("gamma", "scale", "rho", "floor")})
    return fastest("couple", couple_reference, block, tuple(dual), edge, final=final)


def _balance(x: jax.Array, free: jax.Array, give: jax.Array, weight: jax.Array, floor: jax.Array) -> jax.Array:
    """rho slope . (u - x), (z, y, x), of the minimiser u = max(free - give total, floor); weight: rho slope.

    The function has a kink per element at most, so that Newton's method ends after one step more than that. A loop, for
    XLA would compute it anew in all that reads it; element by element in there, since sums over the leading axis took
    ten times as long.
    """
    def newton(_: int, total: jax.Array) -> jax.Array:
        excess, curvature = total, jnp.float32(1)
        for e in range(len(x)):
            u = free[e] - give[e] * total
            excess = excess - weight[e] * (jnp.maximum(u, floor) - x[e])
            curvature = curvature + jnp.where(u > floor, weight[e] * give[e], 0)
        return total - excess / curvature

    return jax.lax.fori_loop(0, len(x) + 1, newton, jnp.zeros(x.shape[1:]))
