"""Rotation of volumes (z, y, x) by Fourier shears: no blur, and the inverse is the adjoint.

A turn of a plane is a number of quarter turns, which only permute voxels, and a rest of at most 45 degrees, which is
three shears (M. Unser, P. Thevenaz, L. Yaroslavsky, IEEE Trans. Image Process. 4, 1371 (1995)): each shifts lines by
amounts that grow with their distance from the centre, (n - 1) / 2. Shifts are periodic, so what lies within 0.46 n of
the axis stays whole, and what lies farther out wraps around.

Euler angles are those of `engine.euler`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine.data import DataError
from engine.euler import ORDER, PLANES


def rotate(volume: jax.Array, angles: jax.Array) -> jax.Array:
    """The volume (z, y, x) turned by Euler angles (3,) [deg], or by one (1,) about x alone, which compiles sooner.

    Axes that turn into each other must be of one length.
    """
    for axis, angle in zip(ORDER[-len(angles):], angles, strict=True):
        volume = _turned(volume, axis, angle)
    return volume


def rotate_back(volume: jax.Array, angles: jax.Array) -> jax.Array:
    """Inverse and adjoint of `rotate`."""
    for axis, angle in zip(ORDER[::-1], angles[::-1]):
        volume = _turned(volume, axis, angle, back=True)
    return volume


def tilt(volume: jax.Array, angle: jax.Array) -> jax.Array:
    """`rotate` about x alone; z and y must be of one length."""
    return _turned(volume, "x", angle)


def _turned(volume: jax.Array, axis: str, angle: jax.Array, back: bool = False) -> jax.Array:
    start, end = PLANES[axis]
    if volume.shape[start] != volume.shape[end]:
        raise DataError(f"a volume of shape {volume.shape} (z, y, x) cannot be turned about {axis}: the two axes "
                        "across it must be of one length; pad the shorter")
    quarters = jnp.round(angle / 90)
    rest = jnp.radians(angle - 90 * quarters)
    quarters = quarters.astype(jnp.int32)
    if back:  # in reverse order: shears along other axes are other shears, though the turn is the same
        return _quarter(_sheared(volume, -rest, start, end), -quarters % 4, start, end)
    return _sheared(_quarter(volume, quarters % 4, start, end), rest, start, end)


def _quarter(volume: jax.Array, quarters: jax.Array, start: int, end: int) -> jax.Array:
    """So many quarter turns, each of which brings +start to +end."""
    volume = jnp.where(quarters % 2 == 1, jnp.rot90(volume, 1, (start, end)), volume)
    return jnp.where(quarters >= 2, jnp.flip(volume, (start, end)), volume)


def _sheared(volume: jax.Array, angle: jax.Array, start: int, end: int) -> jax.Array:
    """A turn by at most 45 degrees: shears along end, start and end. One by 0 costs nothing."""

    def turned(volume: jax.Array) -> jax.Array:
        half, full = jnp.tan(angle / 2), jnp.sin(angle)
        volume = _shear(volume, half, along=end, by=start)
        volume = _shear(volume, -full, along=start, by=end)
        return _shear(volume, half, along=end, by=start)

    return jax.lax.cond(angle == 0, lambda v: v, turned, volume)


def _shear(volume: jax.Array, slope: jax.Array, along: int, by: int) -> jax.Array:
    """Lines along one axis, shifted by slope times their distance from the centre along another."""
    size = volume.shape[along]
    shift = slope * (jnp.arange(volume.shape[by]) - (volume.shape[by] - 1) / 2)
    ramp = jnp.exp(-2j * jnp.pi * shift[:, None] * jnp.arange(size // 2 + 1) / size)
    if size % 2 == 0:
        # Half of the highest frequency's phases are lost in real numbers: it keeps its size, so that shears stay
        # orthogonal, and takes the sign of the nearest whole shift.
        ramp = ramp.at[:, -1].set(jnp.where(jnp.round(shift) % 2 == 0, 1.0, -1.0))
    shape = [1, 1, 1]
    shape[by], shape[along] = ramp.shape
    ramp = (ramp if by < along else ramp.T).reshape(shape)
    return jnp.fft.irfft(jnp.fft.rfft(volume, axis=along) * ramp, n=size, axis=along)
