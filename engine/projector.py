"""Parallel-beam projection by Joseph's method and its exact adjoint.

A row of voxels is crossed once by each ray; the ray's value there is interpolated linearly between the two voxels
beside it (P. M. Joseph, IEEE Trans. Med. Imaging 1, 192 (1982)). Written per voxel and per detector pixel at once,
the weight is a hat of half-width m = max(|cos|, |sin|) about the voxel's landing point t* = y cos + z sin:

    A[t, (z, y)] = max(0, 1 - |t - t*| / m) / m

Projection therefore gathers two voxels per ray and row, back projection two pixels per voxel and tilt: nothing
scatters. The last axis, x, is the tilt axis: every plane projects alike and vectorises. Angles are traced, so one
compiled program serves every list of angles of one length; unused tilts carry weight 0.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.forms import fastest


class Geometry(NamedTuple):
    """Where the rays run. angles: (tilt,) [rad]; weight: (tilt,) factor of each projection, 0 for padding."""

    angles: jax.Array
    weight: jax.Array


def geometry(angles: np.ndarray, size: int | None = None) -> Geometry:
    """The geometry of a list of angles [deg], padded to `size` tilts (default: their number)."""
    angles = np.asarray(angles, np.float64)
    pad = (size or len(angles)) - len(angles)
    return Geometry(jnp.asarray(np.pad(np.deg2rad(angles), (0, pad)), jnp.float32),
                    jnp.asarray(np.pad(np.ones(len(angles)), (0, pad)), jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(volume: jax.Array, rays: Geometry, pixels: int) -> jax.Array:
    """Line integrals (..., tilt, pixels, x), in voxel lengths, of volumes (..., z, y, x)."""
    return fastest("project", project_reference, volume, rays, pixels=pixels)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def backproject(projections: jax.Array, rays: Geometry, nz: int, ny: int) -> jax.Array:
    """The exact adjoint of `project`: volumes (..., nz, ny, x) from projections (..., tilt, pixels, x)."""
    return fastest("backproject", backproject_reference, projections, rays, nz=nz, ny=ny)


def project_reference(volume: jax.Array, rays: Geometry, pixels: int) -> jax.Array:
    """`project` in JAX alone, for every platform; the faster forms are tested against it."""
    nz, ny = volume.shape[-3:-1]
    flat, m, cos, sin = _directions(rays)
    t = jnp.arange(pixels) - (pixels - 1) / 2
    rows = max(nz, ny)
    # Steep rays run along y: they cross columns of constant y, flat rays rows of constant z. Both kinds of row stand
    # side by side, so that one gather serves all tilts.
    by_z = _pad_axis(volume, -3, rows)
    by_y = _pad_axis(volume, -2, rows)

    def add_row(total: jax.Array, r: jax.Array) -> tuple[jax.Array, None]:
        row = jnp.concatenate([_index(by_z, r, -3)[..., :ny, :], _index(by_y, r, -2)[..., :nz, :]], axis=-2)
        across = jnp.where(flat, r - (nz - 1) / 2, r - (ny - 1) / 2) * jnp.where(flat, sin, cos)
        length = jnp.where(flat, ny, nz)[:, None]
        place = (t - across[:, None]) / jnp.where(flat, cos, sin)[:, None] + (length - 1) / 2
        first = jnp.floor(place)
        share = place - first
        first = first.astype(jnp.int32)
        scale = (rays.weight / m * jnp.where(flat, r < nz, r < ny))[:, None]
        offset = jnp.where(flat, 0, ny)[:, None]
        for tap, weight in ((first, 1 - share), (first + 1, share)):
            weight = jnp.where((tap >= 0) & (tap < length), weight, 0.0) * scale
            total += weight[..., None] * _take(row, jnp.clip(tap, 0, length - 1) + offset)
        return total, None

    start = jnp.zeros((*volume.shape[:-3], rays.angles.shape[0], pixels, volume.shape[-1]), volume.dtype)
    return jax.lax.scan(add_row, start, jnp.arange(rows))[0]


def backproject_reference(projections: jax.Array, rays: Geometry, nz: int, ny: int) -> jax.Array:
    """`backproject` in JAX alone, for every platform; the faster forms are tested against it."""
    pixels = projections.shape[-2]
    _, m, cos, sin = _directions(rays)
    y = jnp.arange(ny) - (ny - 1) / 2
    by_tilt = jnp.moveaxis(projections, -3, 0)

    def fill_row(_: None, r: jax.Array) -> tuple[None, jax.Array]:
        place = y * cos[:, None] + (r - (nz - 1) / 2) * sin[:, None] + (pixels - 1) / 2
        first = jnp.floor(place)
        share = place - first
        first = first.astype(jnp.int32)
        scale = (rays.weight / m)[:, None]

        def add_tilt(total: jax.Array, tilt: tuple) -> tuple[jax.Array, None]:
            image, first, near, far = tilt
            for tap, weight in ((first, near), (first + 1, far)):
                weight = jnp.where((tap >= 0) & (tap < pixels), weight, 0.0)
                total += weight[:, None] * _take(image, jnp.clip(tap, 0, pixels - 1))
            return total, None

        near = jnp.maximum(0, 1 - share / m[:, None]) * scale
        far = jnp.maximum(0, 1 - (1 - share) / m[:, None]) * scale
        start = jnp.zeros((*projections.shape[:-3], ny, projections.shape[-1]), projections.dtype)
        return None, jax.lax.scan(add_tilt, start, (by_tilt, first, near, far))[0]

    return jnp.moveaxis(jax.lax.scan(fill_row, None, jnp.arange(nz))[1], 0, -3)


def adjoint_error(shape: tuple[int, int, int], pixels: int, rays: Geometry, seed: int = 0) -> float:
    """|<A v, p> - <v, A' p>| relative to |A v| |p| for random v, p: 0 for an exact adjoint."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal(shape)
    p = rng.standard_normal((len(rays.angles), pixels, shape[2]))
    av = np.asarray(project(jnp.asarray(v, jnp.float32), rays, pixels), np.float64)
    ap = np.asarray(backproject(jnp.asarray(p, jnp.float32), rays, shape[0], shape[1]), np.float64)
    return float(abs(np.vdot(av, p) - np.vdot(v, ap)) / (np.linalg.norm(av) * np.linalg.norm(p)))


def _directions(rays: Geometry) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    cos, sin = jnp.cos(rays.angles), jnp.sin(rays.angles)
    return jnp.abs(cos) >= jnp.abs(sin), jnp.maximum(jnp.abs(cos), jnp.abs(sin)), cos, sin


def _pad_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)


def _index(array: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, i, axis % array.ndim, keepdims=False)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    # The indices are in range already; "clip" spares the comparison against the bounds and the fill.
    return jnp.take(rows, index, axis=-2, mode="clip")


# Derivatives: each operator is the other's transpose, so jax.grad never sees the gather.
def _project_fwd(volume, rays, pixels):
    return project(volume, rays, pixels), (rays, volume.shape)


def _project_bwd(pixels, residual, cotangent):
    rays, shape = residual
    return backproject(cotangent, rays, shape[-3], shape[-2]), None


def _backproject_fwd(projections, rays, nz, ny):
    return backproject(projections, rays, nz, ny), (rays, projections.shape)


def _backproject_bwd(nz, ny, residual, cotangent):
    rays, shape = residual
    return project(cotangent, rays, shape[-2]), None


project.defvjp(_project_fwd, _project_bwd)
backproject.defvjp(_backproject_fwd, _backproject_bwd)

# Outside a compiled program (predictions, fitted contrasts) each call would otherwise compile its scan anew.
project = jax.jit(project, static_argnums=2, inline=True)  # type: ignore[assignment]
backproject = jax.jit(backproject, static_argnums=(2, 3), inline=True)  # type: ignore[assignment]
