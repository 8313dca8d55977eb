"""Data terms of one modality: value, gradient and curvature with respect to the modelled projections.

Both leave out pixels of weight 0 (padded or held-out tilts) and are 0 where the model meets the data.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Added to the expected counts wherever they are divided by or logged, as F3 Eq. 1 has it. It stands in the value and in
# the gradient alike, so that one is the other's derivative and the fixed point is A x + background = b - EPSILON.
EPSILON = 1e-5  # [counts]


def poisson(expected: jax.Array, counts: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Half the Poisson deviance, sum(m - b + b log(b / m)) with m = expected + EPSILON, and its gradient 1 - b / m.

    It is F3's second term, sum(A x - b log(A x + eps)), less its value at a perfect fit.
    """
    m = expected + EPSILON
    ratio = counts / m
    value = m - counts + counts * jnp.log(jnp.where(counts > 0, ratio, 1.0))
    return (weight * value).sum(), weight * (1 - ratio)


def poisson_curvature(expected: jax.Array) -> jax.Array:
    """The expected second derivative (Fisher information) of `poisson` per pixel: 1 / m."""
    return 1 / (expected + EPSILON)


def least_squares(expected: jax.Array, values: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sum(w (m - b)^2) / 2 and its gradient w (m - b); w = 1 / variance makes it a likelihood."""
    residual = expected - values
    return (weight * residual**2).sum() / 2, weight * residual
