"""The one loop behind every iterative solver: steps, cost history, checkpoints, a status in words.

A solver is a pure function `step(problem, state, iteration) -> (state, terms, change)`; everything that differs
between trials is traced, so that a sweep compiles once per shape. The loop stays on the device between checkpoints.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from engine import sharding

RUNNING, CONVERGED, NON_FINITE = 0, 1, 2
_CAPACITY = 512  # history lengths are multiples of this, so that nearly all solves of a shape are one program

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


class Keep(NamedTuple):
    """Where a long solve leaves its state, every so many seconds, so that a later call goes on from there.

    label: what the state belongs to; a file with another label is left alone and overwritten.
    """

    path: Path
    label: str
    seconds: float = 600.0


def solve(step: Step, problem: Any, first: tuple[Any, jax.Array], iterations: int, *, devices: int = 1,
          axes: Any = None, tolerance: float = 0.0, checkpoints: Sequence[int] = (),
          observe: Callable[[int, Any], None] | None = None, keep: Keep | None = None, compiled: bool = True) -> Run:
    """Iterate until `iterations`, until the change is below `tolerance`, or until a cost is not finite.

    first: the state to start from, which is donated, and its cost terms. devices: over how many slabs the problem and
    the state are spread (`engine.sharding`). axes: for several solves at once, jax.vmap's axes of the problem; the
    state then has a leading axis of solves. observe(iteration, state) is called at each checkpoint reached; a solve
    that is taken up again is not observed at those it had passed. compiled: False for a step that compiles its own
    parts and waits for the disk between them. `outcomes` tells what became of each.
    """
    state, first_terms = first
    terms = np.asarray(sharding.one(first_terms, devices))
    capacity = -(-iterations // _CAPACITY) * _CAPACITY + 1
    history = np.zeros((*terms.shape[:-1], capacity, terms.shape[-1]), np.float32)
    history[..., 0, :] = terms
    counters = (np.zeros(terms.shape[:-1], np.int32), np.full(terms.shape[:-1], RUNNING, np.int32), history)
    last = Run(state, *sharding.repeated(counters, devices))
    if keep is not None:
        last = _taken_up(keep, last)
    advance = (sharding.spread(_advancing(step, axes), devices, donate=(1,)) if compiled else
               partial(_advance_here, step, devices))
    saved, pace = time.monotonic(), 8
    done = int(sharding.one(last.iteration, devices).max())
    marks = sorted({c for c in checkpoints if done < c < iterations} | {iterations})
    while marks:
        stop = marks[0] if keep is None else min(marks[0], done + pace)
        begun = time.monotonic()
        last = advance(problem, last, *sharding.repeated((np.int32(stop), np.float32(tolerance)), devices))
        status = np.asarray(sharding.one(last.status, devices))
        pace = max(1, min(2 * pace, int(pace * 60 / max(time.monotonic() - begun, 1e-3))))  # look about once a minute
        done = stop
        if stop == marks[0]:
            marks.pop(0)
            if observe is not None and stop in checkpoints:
                observe(stop, last.state)
        if (status == NON_FINITE).all() or (keep is not None and not checkpoints and (status != RUNNING).all()):
            break
        if keep is not None and marks and time.monotonic() - saved > keep.seconds:
            _save(keep, last)
            saved = time.monotonic()
    if keep is not None:
        keep.path.unlink(missing_ok=True)
    return last


def outcomes(run: Run, devices: int = 1, tolerance: float = 0.0) -> list[Outcome]:
    """What became of each solve of a run."""
    iterations, status, history = (np.asarray(a) for a in sharding.one(run[1:], devices))
    found = []
    for k in np.ndindex(iterations.shape):
        done = int(iterations[k])
        sentence = {RUNNING: f"finished {done} iterations",
                    CONVERGED: f"converged after {done} iterations (relative change below {tolerance:g})",
                    NON_FINITE: f"stopped at iteration {done}: the cost is not finite; check the data and the "
                                "weights"}[int(status[k])]
        member = jax.tree.map(lambda a, k=k: a[(slice(None), *k) if devices > 1 else k] if k else a, run.state)
        found.append(Outcome(member, history[k][:done + 1], done, sentence, int(status[k]) != NON_FINITE))
    return found


def _save(keep: Keep, run: Run) -> None:
    """Write the whole state aside, then rename: a kill leaves the last one."""
    keep.path.parent.mkdir(parents=True, exist_ok=True)
    aside = keep.path.with_suffix(".partial")
    with aside.open("wb") as file:
        leaves: dict[str, Any] = {f"leaf_{k}": np.asarray(a) for k, a in enumerate(jax.tree.leaves(run))}
        np.savez(file, label=keep.label, **leaves)
    os.replace(aside, keep.path)


def _taken_up(keep: Keep, run: Run) -> Run:
    """The state that an earlier call has left, if it is this solve's and whole; else the one given."""
    leaves, tree = jax.tree.flatten(run)
    try:
        with np.load(keep.path) as kept:
            if str(kept["label"]) != keep.label:
                return run
            found = [kept[f"leaf_{k}"] for k in range(len(leaves))]
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        return run
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(found, leaves)):
        return run
    return jax.tree.unflatten(tree, [jnp.asarray(a) for a in found])


def settled(state: Any) -> Any:
    """A first state whose arrays are their own, as donation needs, and of the types that steps return."""
    return jax.tree.map(lambda a: jnp.array(a, a.dtype, copy=True), state)


@cache
def _advancing(step: Step, axes: Any) -> Callable[[Any, Run, jax.Array, jax.Array], Run]:
    """The loop for one solver; the same object each time, so that it compiles once per shape."""
    loop = partial(_advance, step)
    return loop if axes is None else jax.vmap(loop, in_axes=(axes, 0, None, None))


def _advance(step: Step, problem: Any, run: Run, stop: jax.Array, tolerance: jax.Array) -> Run:
    def going(run: Run) -> jax.Array:
        return (run.iteration < stop) & (run.status == RUNNING)

    def body(run: Run) -> Run:
        return _counted(run, *step(problem, run.state, run.iteration), tolerance)

    return jax.lax.while_loop(going, body, run)


def _advance_here(step: Step, devices: int, problem: Any, run: Run, stop: jax.Array, tolerance: jax.Array) -> Run:
    """`_advance` as a loop of the host's."""
    def now(counter: jax.Array) -> int:
        return int(sharding.one(counter, devices))

    counted = sharding.spread(_counted, devices)
    while now(run.iteration) < now(stop) and now(run.status) == RUNNING:
        run = counted(run, *step(problem, run.state, run.iteration), tolerance)
    return run


def _counted(run: Run, state: Any, terms: jax.Array, change: jax.Array, tolerance: jax.Array) -> Run:
    """The run after one more step."""
    # int32 by name: Python's integers are weakly typed, and a loop that changes its types compiles twice.
    status = jnp.where(change < tolerance, jnp.int32(CONVERGED), jnp.int32(RUNNING))
    finite = jnp.isfinite(terms).all() & jnp.isfinite(change)
    status = jnp.where(finite, status, jnp.int32(NON_FINITE))
    return Run(state, run.iteration + 1, status, run.history.at[run.iteration + 1].set(terms))
