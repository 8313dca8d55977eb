"""The one loop behind every iterative solver: steps, cost history, checkpoints, a status in words.

A solver is a pure function `step(problem, state, iteration) -> (state, terms, change)`; everything that differs
between trials is traced, so that a sweep compiles once per shape. The loop stays on the device between checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RUNNING, CONVERGED, NON_FINITE = 0, 1, 2
_CAPACITY = 64  # history lengths are multiples of this, so that 50 and 60 iterations are one program

Step = Callable[[Any, Any, jax.Array], tuple[Any, jax.Array, jax.Array]]


class Run(NamedTuple):
    """What the loop carries: the solver's state, how far it is, and (capacity, terms) of history."""

    state: Any
    iteration: jax.Array
    status: jax.Array
    history: jax.Array


class Outcome(NamedTuple):
    """state: the solver's last. history: (iterations + 1, terms), the start first. status: a sentence."""

    state: Any
    history: np.ndarray
    iterations: int
    status: str
    ok: bool


def solve(step: Step, problem: Any, state: Any, first_terms: jax.Array, iterations: int, *, tolerance: float = 0.0,
          checkpoints: Sequence[int] = (), observe: Callable[[int, Any], None] | None = None) -> Outcome:
    """Iterate until `iterations`, until the relative change is below `tolerance`, or until a cost is not finite.

    state is donated: do not use it afterwards. observe(iteration, state) is called at each checkpoint reached.
    """
    capacity = -(-iterations // _CAPACITY) * _CAPACITY + 1
    history = jnp.zeros((capacity, first_terms.shape[0]), jnp.float32).at[0].set(first_terms)
    run = Run(state, jnp.int32(0), jnp.int32(RUNNING), history)
    for stop in sorted({c for c in checkpoints if 0 < c < iterations} | {iterations}):
        run = _advance(step, problem, run, jnp.int32(stop), jnp.float32(tolerance))
        if observe is not None and stop in checkpoints:
            observe(stop, run.state)
        if int(run.status) == NON_FINITE:
            break
    done, status = int(run.iteration), int(run.status)
    sentences = {RUNNING: f"finished {done} iterations",
                 CONVERGED: f"converged after {done} iterations (relative change below {tolerance:g})",
                 NON_FINITE: f"stopped at iteration {done}: the cost is not finite; check the data and the weights"}
    return Outcome(run.state, np.asarray(run.history)[:done + 1], done, sentences[status], status != NON_FINITE)


def settled(state: Any) -> Any:
    """A first state whose arrays are their own, as donation needs, and of the types that steps return."""
    return jax.tree.map(lambda a: jnp.array(a, a.dtype, copy=True), state)


@partial(jax.jit, static_argnames=("step",), donate_argnames=("run",))
def _advance(step: Step, problem: Any, run: Run, stop: jax.Array, tolerance: jax.Array) -> Run:
    def going(run: Run) -> jax.Array:
        return (run.iteration < stop) & (run.status == RUNNING)

    def body(run: Run) -> Run:
        state, terms, change = step(problem, run.state, run.iteration)
        # int32 by name: Python's integers are weakly typed, and a loop that changes its types compiles twice.
        status = jnp.where(change < tolerance, jnp.int32(CONVERGED), jnp.int32(RUNNING))
        finite = jnp.isfinite(terms).all() & jnp.isfinite(change)
        status = jnp.where(finite, status, jnp.int32(NON_FINITE))
        return Run(state, run.iteration + 1, status, run.history.at[run.iteration + 1].set(terms))

    return jax.lax.while_loop(going, body, run)
