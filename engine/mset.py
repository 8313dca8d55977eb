"""Multislice electron tomography (MSET): the potential of a specimen straight from a tilt series of 4D-STEM patterns.

    minimise over V >= 0   sum over tilts, probes of | |far field of V| - sqrt(pattern) |^2 + n lambda_tv TV(V)  (Eq. 5)

n is the number of patterns per pixel of the field, so that one lambda_tv suits coarse and fine scans, few and many
tilts. The specimen is turned to a tilt, its slices' gradient (Eq. B5) is taken from a group of that tilt's probes at
once, the volume steps against it and is turned back, and what is negative is set to 0: the paper's Appendix A, with the
sign of its Eq. B6. A slice may hold several layers of voxels; with all in one this is single-slice tomography.

Steps are counted in 1 / (2 x illumination x layers), the inverse of the largest curvature that weak scattering can
have: the illumination is the brightest pixel's share of electrons, from all probes of a group, halfway through.
`paper` takes the probes one by one and searches each step backwards, as the paper does (c = 0, rho = 0.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import gcd
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import sharding
from engine.data import DataError, Solution
from engine.diffraction import DiffractionSeries
from engine.iterate import Keep, Step, outcomes, settled, solve
from engine.multislice import (
    Beam,
    amplitude_error,
    batches,
    beam,
    error_and_gradient,
    kept_gradient,
    probes,
    propagator,
)
from engine.penalties import Dual, prox_tv, total_variation, zero_dual
from engine.rotation import rotate, rotate_back

TERMS = ("amplitude", "tv", "total")
RHO = 0.1  # by which a step that raised the error is shortened (the paper's)
# Bytes of a batch's waves in front of one slice, and of all slices where they are kept; on a CPU, and on a GPU. Kept
# waves took a fifth less time per probe and slice at 48^2, 48 slices and 7 to 28 MB, and more at 57 (2 cores).
ONE_SLICE = {"cpu": 2**21, "gpu": 2**28}
ALL_SLICES = {"cpu": 2**24, "gpu": 2**32}
FIRST = 20.0  # steps that `paper` tries first; at 48^3 as good after 5 iterations as groups of 8 after 15
FEWEST = 4  # probes in a batch below which waves are rebuilt, not kept
SHORTEST = 1e-4  # share of the first step below which the search ends, without a step


@dataclass(frozen=True)
class Settings:
    """Numbers of one solve.

    mode: `groups` takes steps of a given length; `paper` one probe at a time, each step searched backwards from FIRST
    times that length, without momentum. iterations: passes over all tilts. step: in units of the inverse curvature.
    momentum: share of the last change of the volume that is added before each step. group: probes of a tilt in one
    step, far apart, 0 for all: few need fewer iterations, many fill a GPU. binning: layers of voxels in a slice; 0 for
    all in one (SSET); 4 of 0.04 nm were as good as 1 at 48^3, in a quarter of the time. finer: pixels of a wave along a
    voxel's edge; with 1, as in the paper, electrons that miss the detector fold back onto it. positivity: whether
    negative potentials are set to 0. lambda_tv: weight of total variation [1 / V]; 1e-6 halved RMSD at all doses, and
    at low ones keeps noise from passing for atoms; inner: its steps in each iteration. devices: over which the probes
    are spread.
    """

    mode: Literal["groups", "paper"] = "groups"
    iterations: int = 15
    step: float = 1.0
    momentum: float = 0.5
    group: int = 8
    binning: int = 1
    finer: int = 1
    positivity: bool = True
    lambda_tv: float = 0.0
    inner: int = 4
    tolerance: float = 0.0
    devices: int = 1


class Tilt(NamedTuple):
    """Of one tilt, or stacked, of all: groups of probes in batches, the last filled up with weight 0."""

    amplitudes: jax.Array  # (group, batch, probe, qy, qx)
    weights: jax.Array  # (group, batch, probe, 1, 1)
    angles: jax.Array  # (3,), or (1,) where all tilts are about x


class Problem(NamedTuple):
    """What a solve is given. Phases are those of one layer of voxels [rad]."""

    tilts: Tilt
    positions: jax.Array  # (group, batch, probe, 2)
    beam: Beam
    unit: jax.Array  # 1 / curvature
    step: jax.Array
    momentum: jax.Array
    floor: jax.Array  # the least phase: 0, or -inf
    lambda_tv: jax.Array  # per radian
    squares: jax.Array  # sum of the weighted squared amplitudes


class State(NamedTuple):
    """Between two iterations."""

    phase: jax.Array  # (z, y, x)
    before: jax.Array  # and one step ago
    step: jax.Array  # length; halved when the cost has risen
    cost: jax.Array  # of the last iteration
    tv_dual: Dual


def reconstruct(series: DiffractionSeries, settings: Settings, *, checkpoints: Sequence[int] = (),
                observe: Callable[[int, np.ndarray], None] | None = None, keep: Keep | None = None,
                fitted: np.ndarray | None = None) -> Solution:
    """Potential (1, z, y, x) [V] of a cube of the patterns' size.

    observe(iteration, volume) is called at each checkpoint. fitted: (tilt, probe) False for patterns that are held
    out; `held_out_error` is then among the metrics. keep: where a long solve leaves its state, to be taken up again.
    history: `amplitude` is the error as the tilts were met, before their steps, relative to the squared amplitudes.
    A solve that fails returns ok = False.
    """
    devices, volts = _devices(settings, series.size), 1 / (series.optics.interaction * series.pixel)
    layers = _layers(series.size, settings)
    problem = build(series, settings, fitted)

    def volume(state: State) -> np.ndarray:
        return volts * np.asarray(sharding.one(state.phase, devices))[None]

    observed = None if observe is None else lambda n, state: observe(n, volume(state))
    advance = stepper(settings.mode, layers, settings.inner if settings.lambda_tv > 0 else 0)
    run = solve(advance, problem, sharding.spread(_start, devices)(problem), settings.iterations, devices=devices,
                tolerance=settings.tolerance, checkpoints=checkpoints, observe=observed, keep=keep)
    outcome = outcomes(run, devices, settings.tolerance)[0]
    error = sharding.spread(_measure(layers), devices)
    metrics = {"amplitude_error": float(sharding.one(error(problem, run.state.phase), devices))}
    if fitted is not None and not np.all(fitted):
        rest = build(series, settings, ~np.asarray(fitted, bool))
        metrics["held_out_error"] = float(sharding.one(error(rest, run.state.phase), devices))
    return Solution(volume(run.state), dict(zip(TERMS, outcome.history.T)), outcome.status, outcome.ok, metrics)


def build(series: DiffractionSeries, settings: Settings, fitted: np.ndarray | None = None) -> Problem:
    """The problem of a series on its devices, with a leading axis for them where they are several."""
    size, layers = series.size, _layers(series.size, settings)
    fitted = np.ones(series.patterns.shape[:2], bool) if fitted is None else np.asarray(fitted, bool)
    if fitted.shape != series.patterns.shape[:2] or not fitted.any():
        raise DataError(f"the patterns to fit are marked in shape {fitted.shape}; {series.patterns.shape[:2]} "
                        "(tilt, probe) with one or more of them is needed")
    chosen = _grouped(series.positions, size, settings)
    real = (chosen >= 0)[..., None, None]
    amplitudes = np.sqrt(np.fft.ifftshift(series.patterns, axes=(2, 3)) / np.float32(series.electrons))[:, chosen]
    weights = (real * fitted[:, chosen][..., None, None]).astype(np.float32)
    positions = series.positions[chosen].astype(np.float32)
    wide, pixel = settings.finer * size, series.pixel / settings.finer
    made = beam(wide, pixel, series.optics, layers * series.pixel)
    halfway = propagator(wide, pixel, series.optics.wavelength, (size - layers) * series.pixel / 2)
    lit = settings.finer**2 * _illumination(made, positions, real.astype(np.float32), halfway)
    order = _order(len(series.angles)) if settings.mode == "groups" else np.arange(len(series.angles))
    angles = series.angles if series.angles[:, :2].any() else series.angles[:, 2:]
    tilts = (amplitudes[order], weights[order], angles[order].astype(np.float32))
    squares, density = float((weights * amplitudes.astype(np.float64)**2).sum()), float(weights.sum()) / size**2
    if squares == 0:
        raise DataError("every pattern to fit is empty; check the patterns' units and which of them are fitted")
    volts = series.optics.interaction * series.pixel
    floor = 0.0 if settings.positivity else -np.inf
    step, momentum = (FIRST * settings.step, 0.0) if settings.mode == "paper" else (settings.step, settings.momentum)
    numbers = (1 / (2 * lit * size), step, momentum, floor, density * settings.lambda_tv / volts, squares)
    shared = (made, *(np.float32(number) for number in numbers))
    return _spread_out(tilts, positions, shared, settings.devices)


def _spread_out(tilts: tuple[Any, ...], positions: Any, shared: tuple[Any, ...], devices: int) -> Problem:
    """Arrays of the host, their batches dealt to the devices; what is not in batches is alike on all."""
    amplitudes, weights, angles = tilts
    if devices > 1:
        amplitudes, weights, positions = (_dealt(array, axis, devices)
                                          for array, axis in ((amplitudes, 2), (weights, 2), (positions, 1)))
        angles, shared = sharding.repeated((angles, shared), devices)
    return jax.tree.map(jnp.asarray, Problem(Tilt(amplitudes, weights, angles), positions, *shared))


def _dealt(array: np.ndarray, axis: int, devices: int) -> np.ndarray:
    """(device, ...) of an axis whose length the devices divide."""
    return np.moveaxis(array.reshape(*array.shape[:axis], devices, -1, *array.shape[axis + 1:]), axis, 0)


@cache
def stepper(mode: str, layers: int, inner: int) -> Step:
    """The step of one iteration, for slices of so many layers; inner: TV's steps, 0 for no TV."""
    return partial(_iteration, mode, layers, inner)


def _iteration(mode: str, layers: int, inner: int, problem: Problem, state: State,
               _: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    def visit(at: tuple[jax.Array, jax.Array], tilt: Tilt) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        phase, before = at
        ahead = phase + problem.momentum * (phase - before)
        turned = rotate(ahead, tilt.angles)
        stepped, errors = jax.lax.scan(partial(_group, mode, layers, problem, state.step), turned,
                                       (tilt.amplitudes, tilt.weights, problem.positions))
        # What the rotation does not touch is added, not turned back and forth.
        new = jnp.maximum(ahead + rotate_back(stepped - turned, tilt.angles), problem.floor)
        return (new, phase), errors.sum()

    (phase, before), errors = jax.lax.scan(visit, (state.phase, state.before), problem.tilts)
    error, dual, variation = errors.sum() / problem.squares, state.tv_dual, jnp.float32(0)
    if inner:
        phase, dual, variation = _smoothed(problem, phase, dual, state.step, inner)
    cost = error + variation
    # |t| = 1: too long a step makes noise, never infinities. It shows in the cost.
    worse = cost > state.cost
    step = jnp.where(worse & (mode != "paper"), state.step / 2, state.step)
    change = sharding.relative_change(phase, state.phase)
    return (State(phase, jnp.where(worse, phase, before), step, cost, dual), jnp.stack([error, variation, cost]),
            change)


def _group(mode: str, layers: int, problem: Problem, step: jax.Array, turned: jax.Array,
           group: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """One step against the gradient of a group of probes, and their error before it."""
    seen = partial(slices, layers, problem.beam.spectrum.shape[0])
    phases, back = jax.vjp(seen, turned)
    backward = kept_gradient if group[2].shape[1] <= _kept(phases.shape[1], len(phases)) else error_and_gradient
    error, gradient = _summed(backward, problem, phases, group)
    gradient, = back(gradient)
    length = step * problem.unit
    if mode == "paper":

        def worse(length: jax.Array) -> jax.Array:
            risen = _summed(amplitude_error, problem, seen(turned - length * gradient), group) > error
            return risen & (length > SHORTEST * step * problem.unit)

        length = jax.lax.while_loop(worse, lambda length: RHO * length, length)
        length = jnp.where(length > SHORTEST * step * problem.unit, length, 0)
    return turned - length * gradient, error


def _summed(function: Callable, problem: Problem, phases: jax.Array, group: tuple[jax.Array, ...]) -> Any:
    """What a function of (waves, phases, propagator, amplitudes, weights) adds up to over batches and devices."""

    wide = problem.beam.spectrum.shape[0]

    def one(batch: tuple[jax.Array, ...]) -> Any:
        amplitudes, weights, positions = batch
        on_detector = weights * _widened(jnp.ones(amplitudes.shape[-2:], jnp.float32), wide)
        return function(probes(problem.beam, positions), phases, problem.beam.propagator, _widened(amplitudes, wide),
                        on_detector)

    # The first by itself: what there is to add up is then known, and one batch needs no sum.
    sums = one(jax.tree.map(lambda a: a[0], group))
    if group[0].shape[0] > 1:
        rest = jax.tree.map(lambda a: a[1:], group)
        sums = jax.lax.scan(lambda sums, batch: (jax.tree.map(jnp.add, sums, one(batch)), None), sums, rest)[0]
    return jax.tree.map(sharding.total, sums)


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


def _start(problem: Problem) -> tuple[State, jax.Array]:
    """Nothing but empty space, and the error of its patterns: the aperture alone."""
    tilts, slabs = problem.tilts, sharding.slabs()
    size = tilts.amplitudes.shape[-1]
    phase = jnp.zeros((size, size, size), jnp.float32)
    aperture = _narrowed(jnp.abs(problem.beam.spectrum), size)
    error = sharding.total((tilts.weights * (aperture - tilts.amplitudes) ** 2).sum()) / problem.squares
    dual = zero_dual(phase[..., :max(2, -(-size // slabs)) if slabs > 1 else size])
    state = State(phase, phase, problem.step, jnp.float32(np.inf), dual)
    return settled(state), jnp.stack([error, jnp.float32(0), error])


def _misfit(layers: int, problem: Problem, phase: jax.Array) -> jax.Array:
    """The error of all patterns that are fitted, relative to their squared amplitudes."""

    def visit(error: jax.Array, tilt: Tilt) -> tuple[jax.Array, None]:
        phases = slices(layers, problem.beam.spectrum.shape[0], rotate(phase, tilt.angles))
        groups = jax.lax.map(partial(_summed, amplitude_error, problem, phases),
                             (tilt.amplitudes, tilt.weights, problem.positions))
        return error + groups.sum(), None

    return jax.lax.scan(visit, jnp.float32(0), problem.tilts)[0] / problem.squares


@cache
def _measure(layers: int) -> Callable[[Problem, jax.Array], jax.Array]:
    """`_misfit` as one object, so that it compiles once."""
    return partial(_misfit, layers)


def slices(layers: int, wide: int, phase: jax.Array) -> jax.Array:
    """Phases of slices, each the sum of so many layers of voxels, with `wide` pixels along y and x: those between the
    voxels come from the same Fourier series."""
    summed = phase.reshape(-1, layers, *phase.shape[1:]).sum(1)
    size = phase.shape[-1]
    if wide == size:
        return summed
    # The finer pixels' centres are counted from the field's centre too: their first lies before the voxels' first.
    ramp = np.exp(2j * np.pi * np.fft.fftfreq(size) * (size / wide - 1) / 2).astype(np.complex64)
    spectrum = jnp.fft.fft2(summed) * ramp[:, None] * ramp
    return (wide / size) ** 2 * jnp.fft.ifft2(_widened(spectrum, wide)).real


def _widened(array: jax.Array, wide: int) -> jax.Array:
    """(..., qy, qx), frequency 0 first, with zeros at the higher frequencies of a wider detector."""
    size = array.shape[-1]
    if wide == size:
        return array
    half, gap = (size + 1) // 2, [(0, 0)] * (array.ndim - 2)
    middle = jnp.pad(jnp.roll(array, (size - half, size - half), (-2, -1)), [*gap, (0, wide - size), (0, wide - size)])
    return jnp.roll(middle, (half - size, half - size), (-2, -1))


def _narrowed(array: jax.Array, size: int) -> jax.Array:
    """The frequencies that `_widened` keeps."""
    half = (size + 1) // 2
    rolled = jnp.roll(array, (size - half, size - half), (-2, -1))[..., :size, :size]
    return jnp.roll(rolled, (half - size, half - size), (-2, -1))


def _devices(settings: Settings, size: int) -> int:
    """How many devices to use; DataError where there are not so many, or the volume has too few planes for TV."""
    wanted, here = settings.devices, jax.local_device_count()
    if wanted > here:
        raise DataError(f"solver.devices is {wanted}, and JAX sees {here} here: lower it; on a CPU, set XLA_FLAGS="
                        f"--xla_force_host_platform_device_count={wanted} and NPROC=16 before JAX starts")
    if wanted > 1 and size < 2 * wanted:
        raise DataError(f"solver.devices is {wanted}, too many for {size} planes along x: each needs two or more")
    return wanted


def _layers(size: int, settings: Settings) -> int:
    """Layers of voxels in a slice."""
    layers = settings.binning or size
    if layers < 0 or size % layers:
        good = ", ".join(str(k) for k in range(1, size + 1) if size % k == 0)
        raise DataError(f"{size} layers of voxels cannot be cut into slices of {layers}: binning is one of {good}, "
                        "or 0 for a single slice")
    return layers


def _platform() -> str:
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def _kept(size: int, count: int) -> int:
    """Probes in a batch whose waves in front of so many slices can be kept."""
    return ALL_SLICES[_platform()] // (8 * size**2 * count)


def _grouped(positions: np.ndarray, size: int, settings: Settings) -> np.ndarray:
    """(group, batch, probe) indices of probes; -1 fills up.

    The scan is cut into as many cells as a group has probes, and each group takes one probe from the same place of
    each: its probes lie far apart, and light little twice. Groups come in an order drawn at random; `paper` keeps it.
    """
    count = len(positions)
    group = 1 if settings.mode == "paper" else min(settings.group or count, count)
    cells = _cells(positions, group)
    members = np.full((len(cells), max(len(cell) for cell in cells)), -1)
    for row, cell in zip(members, cells):
        row[:len(cell)] = cell
    members = members.T if settings.mode == "paper" else np.random.default_rng(0).permutation(members.T)
    wide = settings.finer * size
    kept = _kept(wide, size // _layers(size, settings))
    most = 8 * wide**2 * kept if kept >= min(FEWEST, group) else ONE_SLICE[_platform()]
    number = -(-batches(group, wide, most)[0] // settings.devices) * settings.devices
    each = -(-group // number)
    filled = np.pad(members, ((0, 0), (0, number * each - group)), constant_values=-1)
    return filled.reshape(len(members), number, each)


def _cells(positions: np.ndarray, cells: int) -> list[np.ndarray]:
    """Indices of probes in each of so many cells of a scan, in rows and columns; each cell's in one and the same order.

    Raster positions are compared to a millionth of a nanometre, so that rounding does not break their rows.
    """
    places = np.round(positions, 6)
    rows = next(r for r in range(int(cells**0.5), 0, -1) if cells % r == 0)
    found = []
    for row in np.array_split(np.lexsort((places[:, 1], places[:, 0])), rows):
        for cell in np.array_split(row[np.lexsort((places[row, 0], places[row, 1]))], cells // rows):
            found.append(cell[np.lexsort((places[cell, 1], places[cell, 0]))])
    return found


def _order(tilts: int) -> np.ndarray:
    """Tilts so that each lies far from the last ones: by steps near the golden section of their number."""
    start = round(tilts * (3 - 5**0.5) / 2)
    stride = next(s for s in range(max(start, 1), 2 * tilts + 2) if gcd(s, tilts) == 1)
    return np.arange(tilts) * stride % tilts


def _illumination(made: Beam, positions: np.ndarray, real: np.ndarray, halfway: np.ndarray) -> float:
    """Electrons on the brightest pixel in the middle of the volume, from all probes of a group; of up to 16 groups."""
    middle = made._replace(spectrum=made.spectrum * jnp.asarray(halfway, jnp.complex64))
    groups = np.unique(np.linspace(0, len(positions) - 1, min(16, len(positions))).astype(int))
    return max(float(sum(_light(middle, at, w) for at, w in zip(positions[g], real[g])).max()) for g in groups)


@jax.jit
def _light(made: Beam, positions: jax.Array, real: jax.Array) -> jax.Array:
    """(y, x) intensity of those probes (probe, 2) that are real (probe, 1, 1)."""
    return (real * jnp.abs(probes(made, positions)) ** 2).sum(0)
