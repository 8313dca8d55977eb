"""Slabs: a volume cut along x, the tilt axis, over devices, and what the slabs have to tell each other.

Every plane projects alike, so that projections need no word between slabs. Sums and maxima over the whole volume do,
and differences along x: `total`, `largest` and `overlap` are all a solver has to call. They know one axis name; inside
`spread` (jax.pmap) they talk to the other devices, anywhere else there is one slab and they return at once.
The last slab is filled up with planes that do not exist: `present` tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.sizes import slab_width

AXIS = "slab"


def slabs() -> int:
    """How many slabs the program that is being traced runs on."""
    try:
        return jax.lax.axis_size(AXIS)
    except NameError:  # not inside `spread`
        return 1


def total(value: jax.Array) -> jax.Array:
    """The sum over all slabs of what each has summed."""
    return jax.lax.psum(value, AXIS) if slabs() > 1 else value


def largest(value: jax.Array) -> jax.Array:
    """The maximum over all slabs."""
    return jax.lax.pmax(value, AXIS) if slabs() > 1 else value


def relative_change(new: jax.Array, old: jax.Array) -> jax.Array:
    """|new - old| / |old| of a whole volume."""
    change, size = total(jnp.stack([((new - old) ** 2).sum(), (old**2).sum()]))
    return jnp.sqrt(change / jnp.maximum(size, 1e-20))


def first_plane(width: int) -> jax.Array | int:
    """Which plane of the whole volume is this slab's first, where a slab has `width`."""
    return jax.lax.axis_index(AXIS) * width if slabs() > 1 else 0


def present(planes: jax.Array | int, width: int) -> jax.Array:
    """(width,) 1 for the planes of this slab that exist, of `planes` in the whole volume; 0 for filling."""
    return (first_plane(width) + jnp.arange(width) < planes).astype(jnp.float32)


def overlap(array: jax.Array, before: int, behind: int) -> jax.Array:
    """A slab (..., x) with so many planes of its neighbours on either side, 0 beyond the volume; <= its width."""
    parts = [_neighbour(array[..., array.shape[-1] - before:], +1)] if before else []
    parts.append(array)
    if behind:
        parts.append(_neighbour(array[..., :behind], -1))
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else array


def spread(function: Callable, devices: int, donate: tuple[int, ...] = ()) -> Callable:
    """`function` compiled: for one device as it is, for several over slabs, its arguments with a leading slab axis.

    The same object for the same arguments, so that nothing compiles twice.
    """
    return _spread(function, devices, donate)


@cache
def _spread(function: Callable, devices: int, donate: tuple[int, ...]) -> Callable:
    if devices == 1:
        return jax.jit(function, donate_argnums=donate)
    return jax.pmap(function, axis_name=AXIS, donate_argnums=donate, devices=jax.local_devices()[:devices])


def split(array: np.ndarray, devices: int, halvings: int = 0) -> np.ndarray:
    """(..., x) as (device, ..., width), filled up with zeros; for one device as it is.

    halvings: how often planes will be taken together in pairs, which no slab's end may part.
    """
    if devices == 1:
        return array
    width = slab_width(array.shape[-1], devices, halvings)
    filled = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, devices * width - array.shape[-1])])
    return np.moveaxis(filled.reshape(*array.shape[:-1], devices, width), -2, 0)


def repeated(tree: Any, devices: int) -> Any:
    """What every slab has alike, once for each."""
    if devices == 1:
        return tree
    return jax.tree.map(lambda a: np.broadcast_to(np.asarray(a), (devices, *np.shape(a))), tree)


def join(array: jax.Array, devices: int, planes: int) -> np.ndarray:
    """The inverse of `split`: (device, ..., width) as (..., planes) in the host's memory."""
    if devices == 1:
        return np.asarray(array)[..., :planes]
    return np.concatenate(list(np.asarray(array)), axis=-1)[..., :planes]


def one(tree: Any, devices: int) -> Any:
    """The first slab's share of what is alike in all."""
    return tree if devices == 1 else jax.tree.map(lambda a: a[0], tree)


def _neighbour(planes: jax.Array, by: int) -> jax.Array:
    """What the slab before (by = 1) or behind (by = -1) has sent; zeros at the ends of the volume."""
    count = slabs()
    if count == 1:
        return jnp.zeros_like(planes)
    pairs = [(k, k + by) for k in range(count) if 0 <= k + by < count]
    return jax.lax.ppermute(planes, AXIS, pairs)
