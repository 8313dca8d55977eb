"""The one loop behind every iterative solver: steps, cost history, checkpoints, a status in words.

A solver is a pure function `step(problem, state, iteration) -> (state, terms, change)`; everything that differs
between trials is traced, so that a sweep compiles once per shape. The loop stays on the device between checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import sharding

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


def solve(step: Step, problem: Any, first: tuple[Any, jax.Array], iterations: int, *, devices: int = 1,
          tolerance: float = 0.0, checkpoints: Sequence[int] = (),
          observe: Callable[[int, Any], None] | None = None) -> Outcome:
    """Iterate until `iterations`, until the change is below `tolerance`, or until a cost is not finite.

    first: the state to start from, which is donated, and its cost terms. devices: over how many slabs the problem and
    the state are spread (`engine.sharding`). observe(iteration, state) is called at each checkpoint reached.
    """
    state, first_terms = first
    capacity = -(-iterations // _CAPACITY) * _CAPACITY + 1
    terms = np.asarray(sharding.one(first_terms, devices))
    history = np.zeros((capacity, len(terms)), np.float32)
    history[0] = terms
    run = Run(state, *sharding.repeated((np.int32(0), np.int32(RUNNING), history), devices))
    advance = sharding.spread(_advancing(step), devices, donate=(1,))
    for stop in sorted({c for c in checkpoints if 0 < c < iterations} | {iterations}):
        run = advance(problem, run, *sharding.repeated((np.int32(stop), np.float32(tolerance)), devices))
        status = int(sharding.one(run.status, devices))
        if observe is not None and stop in checkpoints:
            observe(stop, run.state)
        if status == NON_FINITE:
            break
    done = int(sharding.one(run.iteration, devices))
    sentences = {RUNNING: f"finished {done} iterations",
                 CONVERGED: f"converged after {done} iterations (relative change below {tolerance:g})",
                 NON_FINITE: f"stopped at iteration {done}: the cost is not finite; check the data and the weights"}
    return Outcome(run.state, np.asarray(sharding.one(run.history, devices))[:done + 1], done, sentences[status],
                   status != NON_FINITE)


def settled(state: Any) -> Any:
    """A first state whose arrays are their own, as donation needs, and of the types that steps return."""
    return jax.tree.map(lambda a: jnp.array(a, a.dtype, copy=True), state)


@cache
def _advancing(step: Step) -> Callable[[Any, Run, jax.Array, jax.Array], Run]:
    """The loop for one solver; the same object each time, so that it compiles once per shape."""
    return partial(_advance, step)


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
