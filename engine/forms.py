"""Which form of an operator runs.

On a CPU: compiled C (`native`); without a C compiler, the JAX reference. On a GPU of compute capability 8.0 or above
(A100 to H200): one kernel per operator (`kernels`). On an older GPU (V100, T4), and where a process has GPUs of both
kinds: the JAX reference, compiled by XLA for that GPU. All give the same numbers within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from engine import kernels, native


def fastest(name: str, reference: Callable, *arrays: Any, **constants: Any) -> Any:
    """The operator `name` of `native` or `kernels`, or `reference`, applied: all three take the same arguments.

    arrays are traced (or pytrees of such), constants are Python's own.
    """
    def of(room: Any) -> Callable:
        return partial(getattr(room, name), **constants)

    if jax.default_backend() == "cpu" and native.ready():
        return of(native)(*arrays)
    plain = partial(reference, **constants)
    if kernels.available():
        # Decided where the program is lowered, so that a GPU's host can still run it on its CPU.
        return jax.lax.platform_dependent(*arrays, cuda=of(kernels), default=plain)
    return plain(*arrays)
