"""One pass of multislice tomography over a tilt series: what `engine.mset` compiles.

A tilt is visited group by group; after the last come total variation, the cost and the length of the next steps. Tilts
that are in memory are one scan on the device, those on disk are handed over one by one to the same visit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import sharding
from engine.groups import Feed, Tilt, kept_at_once
from engine.iterate import Step, settled
from engine.multislice import (
    Beam,
    aberration_pull,
    amplitude_error,
    error_and_gradient,
    kept_gradient,
    misplacement,
    probes,
    slices,
    spectrum_excess,
    widened,
)
from engine.penalties import Dual, prox_tv, total_variation, zero_dual
from engine.rotation import rotate, rotate_back

TERMS = ("amplitude", "tv", "total")
RHO = 0.1  # by which a step that raised the error is shortened (the paper's)
SHORTEST = 1e-4  # share of the first step below which the search ends, without a step
TRUST = 1e-3  # damps aberrations of the probe by what this share of the electrons would tell of them
FARTHEST = 0.5  # [pixel] that a position moves in an iteration


@dataclass(frozen=True)
class Way:
    """What a solve's program is compiled for. size: voxels along an edge. layers: of them in a slice. inner: TV's
    steps; 0 for no TV."""

    mode: str
    size: int
    layers: int
    inner: int = 0
    refine: tuple[str, ...] = ()


class Problem(NamedTuple):
    """What a solve is given. Phases are those of one layer of voxels [rad]."""

    tilts: Tilt | None  # all of them; None where a feed hands them over
    positions: jax.Array  # (group, batch, probe, 2)
    real: jax.Array  # (group, batch, probe, 1); 0 for what fills up
    beam: Beam
    aperture: jax.Array  # (y, x) 1 where a refined spectrum may be
    aberrations: jax.Array  # (3, y, x) [rad] of defocus and astigmatism, up to 1
    gauge: jax.Array  # (2 tilts, 2 tilts) of each tilt's mean displacement, the part that a moved volume shows as well
    unit: jax.Array  # 1 / curvature
    step: jax.Array
    momentum: jax.Array
    floor: jax.Array  # the least phase: 0, or -inf
    lambda_tv: jax.Array  # per radian
    squares: jax.Array  # sum of the weighted squared amplitudes
    refine_after: jax.Array


class State(NamedTuple):
    """Between two iterations."""

    phase: jax.Array  # (z, y, x)
    before: jax.Array  # and one step ago
    step: jax.Array  # length; halved when the cost has risen
    cost: jax.Array  # of the last iteration
    tv_dual: Dual
    spectrum: jax.Array  # of the probe
    positions: jax.Array  # (tilt, group, batch, probe, 2)


class Midway(NamedTuple):
    """Between two tilts."""

    phase: jax.Array
    before: jax.Array
    spectrum: jax.Array
    error: jax.Array  # of the tilts so far


def stepper(way: Way) -> Step:
    """The step of one iteration over tilts in memory."""
    return _bound(_iteration, way)


def start(way: Way, devices: int, problem: Problem) -> State:
    """Nothing but empty space, seen with the probe and from the positions that were given."""
    return sharding.spread(_bound(_start, way), devices)(problem)


def misfit(way: Way, devices: int, problem: Problem, state: State, feed: Feed | None) -> jax.Array:
    """The error of all patterns that are fitted, relative to their squared amplitudes; of a feed's, where one is."""
    if feed is None:
        return sharding.spread(_bound(_error, way), devices)(problem, state)
    one, axis = sharding.spread(_bound(_tilt_error, way), devices), int(devices > 1)
    return sum(one(problem, state, tilt, jnp.take(state.positions, k, axis=axis))
               for k, tilt in enumerate(feed)) / problem.squares


@cache
def _bound(function: Callable, way: Way) -> Callable:
    """The same object for the same way, so that it compiles once."""
    return partial(function, way)


def _iteration(way: Way, problem: Problem, state: State, n: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    def visit(at: Midway, given: tuple[Tilt, jax.Array]) -> tuple[Midway, jax.Array]:
        return _visit(way, problem, state.step, n, at, *given)

    assert problem.tilts is not None
    begun = Midway(state.phase, state.before, state.spectrum, jnp.float32(0))
    at, positions = jax.lax.scan(visit, begun, (problem.tilts, state.positions))
    return _ended(way, problem, state, at, positions)


def streaming(way: Way, feed: Feed, devices: int, problem: Problem, state: State,
              n: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    """An iteration over tilts that a feed hands over."""
    visit, axis = sharding.spread(_bound(_visit, way), devices), int(devices > 1)
    at, moved = Midway(state.phase, state.before, state.spectrum, jnp.zeros_like(state.step)), []
    for k, tilt in enumerate(feed):
        at, positions = visit(problem, state.step, n, at, tilt, jnp.take(state.positions, k, axis=axis))
        moved.append(positions)
    return sharding.spread(_bound(_ended, way), devices)(problem, state, at, jnp.stack(moved, axis=axis))


def _visit(way: Way, problem: Problem, step: jax.Array, n: jax.Array, at: Midway, tilt: Tilt,
           positions: jax.Array) -> tuple[Midway, jax.Array]:
    """Steps against one tilt's groups of probes, and its positions, refined."""
    phase, before, spectrum, error = at
    problem = problem._replace(beam=problem.beam._replace(spectrum=spectrum))
    ahead = phase + problem.momentum * (phase - before)
    turned = rotate(ahead, tilt.angles)
    none = [jnp.zeros_like(spectrum)] if "probe" in way.refine else []
    (stepped, excess), errors = jax.lax.scan(partial(_group, way, problem, step), (turned, none),
                                             (tilt.amplitudes, tilt.weights, positions))
    # What the rotation does not touch is added, not turned back and forth.
    new = jnp.maximum(ahead + rotate_back(stepped - turned, tilt.angles), problem.floor)
    ready = n >= problem.refine_after
    phases = _seen(way, problem)(stepped)
    if "probe" in way.refine:
        corrected = _corrected(problem, phases, excess[0], (tilt.amplitudes, tilt.weights, positions))
        spectrum = jnp.where(ready, corrected, spectrum)
    if "positions" in way.refine:
        moves = jax.lax.map(lambda group: jax.lax.map(partial(_moves, problem, phases), group),
                            (tilt.amplitudes, tilt.weights, positions))
        positions = jnp.where(ready, positions + moves, positions)
    return Midway(new, phase, spectrum, error + errors.sum()), positions


def _corrected(problem: Problem, phases: jax.Array, excess: jax.Array, tilt: tuple[jax.Array, ...]) -> jax.Array:
    """The probe's spectrum, less what one tilt's waves exceed on average, its defocus and astigmatism set right."""
    amplitudes, weights, positions = tilt
    number = jnp.maximum(sharding.total(weights.sum()), 1)

    def pull(beam: Beam, positions: jax.Array, amplitudes: jax.Array,
             weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        return aberration_pull(beam, positions, phases, amplitudes, weights, problem.aberrations)

    sums = jax.lax.map(partial(_summed, pull, problem), (amplitudes, weights, positions))
    normal, right = (a.sum(0) for a in sums)
    damped = normal + TRUST * number * jnp.eye(len(right))
    angles = jnp.einsum("k,kyx->yx", jnp.linalg.solve(damped, right), problem.aberrations)
    corrected = problem.aperture * jnp.exp(1j * angles) * (problem.beam.spectrum - excess / number)
    return corrected / jnp.linalg.norm(corrected)


def _ended(way: Way, problem: Problem, state: State, at: Midway,
           positions: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    """After the last tilt: total variation, the cost, and the step that follows from it."""
    phase, dual, variation = at.phase, state.tv_dual, jnp.float32(0)
    error = at.error / problem.squares
    if way.inner:
        phase, dual, variation = _smoothed(problem, phase, dual, state.step, way.inner)
    if "positions" in way.refine:
        positions = positions - _common(problem, positions)
    cost = error + variation
    # |t| = 1: too long a step makes noise, never infinities. It shows in the cost.
    worse = cost > state.cost
    step = jnp.where(worse & (way.mode != "paper"), state.step / 2, state.step)
    change = sharding.relative_change(phase, state.phase)
    return (State(phase, jnp.where(worse, phase, at.before), step, cost, dual, at.spectrum, positions),
            jnp.stack([error, variation, cost]), change)


def _group(way: Way, problem: Problem, step: jax.Array, at: tuple[jax.Array, list[jax.Array]],
           group: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, list[jax.Array]], jax.Array]:
    """One step against the gradient of a group of probes, and their error before it.

    Beside the turned volume goes what the probe's spectrum exceeds, if it is refined; else nothing.
    """
    turned, excess = at
    seen = _seen(way, problem)
    phases, back = jax.vjp(seen, turned)
    backward = kept_gradient if group[2].shape[1] <= kept_at_once(phases.shape[1], len(phases)) else error_and_gradient

    def both(beam: Beam, positions: jax.Array, *given: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        error, gradient, exceeding = backward(probes(beam, positions), phases, beam.propagator, *given)
        return error, gradient, [spectrum_excess(beam, positions, exceeding)] if excess else []

    error, gradient, more = _summed(both, problem, group)
    gradient, = back(gradient)
    length = step * problem.unit
    if way.mode == "paper":

        def worse(length: jax.Array) -> jax.Array:
            tried = seen(turned - length * gradient)
            return (_errors(problem, tried, group) > error) & (length > SHORTEST * step * problem.unit)

        length = jax.lax.while_loop(worse, lambda length: RHO * length, length)
        length = jnp.where(length > SHORTEST * step * problem.unit, length, 0)
    return (turned - length * gradient, jax.tree.map(jnp.add, excess, more)), error


def _seen(way: Way, problem: Problem) -> Callable[[jax.Array], jax.Array]:
    """From a turned volume to the phases of its slices."""
    return partial(slices, way.layers, problem.beam.spectrum.shape[0])


def _errors(problem: Problem, phases: jax.Array, group: tuple[jax.Array, ...]) -> jax.Array:
    """The error of a group of probes."""
    return _summed(lambda beam, positions, *given: amplitude_error(probes(beam, positions), phases, beam.propagator,
                                                                   *given), problem, group)


def _summed(function: Callable, problem: Problem, group: tuple[jax.Array, ...]) -> Any:
    """What a function of (beam, positions, amplitudes, weights) adds up to over batches and devices."""

    def one(batch: tuple[jax.Array, ...]) -> Any:
        return function(problem.beam, *_on_detector(problem, batch))

    # The first by itself: what there is to add up is then known, and one batch needs no sum.
    sums = one(jax.tree.map(lambda a: a[0], group))
    if group[0].shape[0] > 1:
        rest = jax.tree.map(lambda a: a[1:], group)
        sums = jax.lax.scan(lambda sums, batch: (jax.tree.map(jnp.add, sums, one(batch)), None), sums, rest)[0]
    return jax.tree.map(sharding.total, sums)


def _on_detector(problem: Problem, batch: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Positions, amplitudes and weights of a batch, for waves that reach beyond the detector."""
    amplitudes, weights, positions = batch
    wide = problem.beam.spectrum.shape[0]
    seen = weights * widened(jnp.ones(amplitudes.shape[-2:], jnp.float32), wide)
    return positions, widened(amplitudes, wide), seen


def _moves(problem: Problem, phases: jax.Array, batch: tuple[jax.Array, ...]) -> jax.Array:
    """(probe, 2) [nm] by which a batch's probes move in one iteration."""
    positions, amplitudes, weights = _on_detector(problem, batch)
    farthest = FARTHEST * problem.beam.pixel
    return jnp.clip(misplacement(problem.beam, positions, phases, amplitudes, weights), -farthest, farthest)


def _common(problem: Problem, positions: jax.Array) -> jax.Array:
    """The part of all displacements (tilt, 1, 1, 1, 2) that a shifted volume would show."""
    moved = positions - problem.positions
    mean = sharding.total((problem.real * moved).sum((1, 2, 3))) / sharding.total(problem.real.sum())
    return (problem.gauge @ mean.ravel()).reshape(-1, 1, 1, 1, 2)


def _smoothed(problem: Problem, phase: jax.Array, dual: Dual, step: jax.Array,
              inner: int) -> tuple[jax.Array, Dual, jax.Array]:
    """The volume after TV's proximal step, the dual field, and TV's part of the cost; slabs along x on each device."""
    planes, slabs = phase.shape[-1], sharding.slabs()
    width = dual.x.shape[-1]
    filled = jnp.pad(phase, [(0, 0), (0, 0), (0, slabs * width - planes)])
    slab = jax.lax.dynamic_slice_in_dim(filled, sharding.first_plane(width), width, axis=2)
    slab, dual = prox_tv(slab, problem.lambda_tv, step * problem.unit, dual, inner, problem.floor, planes)
    variation = problem.lambda_tv * total_variation(slab, planes) / problem.squares
    if slabs > 1:
        slab = jax.lax.all_gather(slab, sharding.AXIS, axis=2, tiled=True)
    return slab[..., :planes], dual, variation


def _start(way: Way, problem: Problem) -> State:
    slabs, tilts = sharding.slabs(), len(problem.gauge) // 2
    phase = jnp.zeros((way.size,) * 3, jnp.float32)
    dual = zero_dual(phase[..., :max(2, -(-way.size // slabs)) if slabs > 1 else way.size])
    positions = jnp.broadcast_to(problem.positions, (tilts, *problem.positions.shape))
    return settled(State(phase, phase, problem.step, jnp.float32(np.inf), dual, problem.beam.spectrum, positions))


def _error(way: Way, problem: Problem, state: State) -> jax.Array:
    each = jax.lax.map(lambda given: _tilt_error(way, problem, state, *given), (problem.tilts, state.positions))
    return each.sum() / problem.squares


def _tilt_error(way: Way, problem: Problem, state: State, tilt: Tilt, positions: jax.Array) -> jax.Array:
    problem = problem._replace(beam=problem.beam._replace(spectrum=state.spectrum))
    phases = _seen(way, problem)(rotate(state.phase, tilt.angles))
    return jax.lax.map(partial(_errors, problem, phases), (tilt.amplitudes, tilt.weights, positions)).sum()
