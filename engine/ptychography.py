"""Multislice ptychography: a specimen's slices and the probe from one scan of overlapping diffraction patterns.

    minimise   sum over probes of | sqrt(sum over modes |far field|^2) - sqrt(pattern) |^2,   or Poisson's likelihood,

over the slices' transmission exp(i phase - absorption) and the modes of the probe (Romanov et al., Multi-slice electron
ptychographic tomography, section 2.1; the forward model is `engine.multislice`'s). The field is wider than a pattern's
window: each probe sees the window around it. Groups of probes that lie far apart take a step together, its length at a
pixel the inverse of the curvature that the group's electrons there can make. Slices are smoothed toward each other
along the beam, where a scan tells least.

The phase is known up to a constant and a ramp, which shift nothing but the patterns: `levelled` removes what a plane
through the vacuum around a specimen says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from skimage.filters import threshold_otsu

from engine import sharding
from engine.data import DataError, Solution
from engine.diffraction import DiffractionSeries
from engine.groups import grouped
from engine.iterate import Keep, outcomes, settled, solve
from engine.multislice import FLOOR, Beam, aberrations, beam, defocus_between, narrowed, opened, probes, propagator

TERMS = ("error",)
MODEST = 0.1  # share of the brightest pixel's electrons below which a step grows no further
EMPTY = 1e-9  # share of a probe's electrons that Poisson's likelihood adds to every pixel, so that none is impossible
OTHERS = 0.02  # share of the electrons that each further mode of the probe begins with
UPDATES = 10  # steps that a refined probe takes in an iteration, each as long as its share of the patterns allows
PROBE_MOMENTUM = 0.9  # share of an iteration's change of the probe that is added before the next
TRUST = 1e-3  # damps aberrations by what this share of the electrons would tell of them
DAMPING = 1e-5  # damps displacements by what this share of the largest curvature would tell
FARTHEST = 0.5  # [pixel] that a position moves in an iteration
LEVELS = 50  # fits of a plane to the vacuum, at most
PARTED = 0.7  # of the variance between two classes from which on they are two; of one normal distribution it is 0.64
MARGIN = 2  # pixels of the field around the outermost windows


@dataclass(frozen=True)
class Settings:
    """Numbers of one solve.

    slices: how many; depth: [nm] that they fill together, from the entrance face. iterations: passes over all patterns.
    group: probes in one step, 0 for all; few overstep: with 16 the error stalls sooner than with 64. step: in units of
    the inverse curvature. momentum: share of an iteration's change that is added before the next. loss: `amplitude`, or
    `poisson` for few counts. absorption: whether slices absorb as well. modes: incoherent ones of the probe. coupling:
    of neighbouring slices, which each iteration smooths by (1 + coupling D' D)^-1. refine: `probe` and `positions` are
    corrected after so many iterations, `refine_after`. finer: pixels of a wave along a pixel's edge; with 1 electrons
    that miss the detector fold back onto it, and what the fit makes of them is noise.
    """

    slices: int = 5
    depth: float = 15.0
    iterations: int = 30
    group: int = 64
    step: float = 1.0
    momentum: float = 0.5
    loss: Literal["amplitude", "poisson"] = "amplitude"
    absorption: bool = False
    modes: int = 1
    coupling: float = 0.0
    refine: Sequence[Literal["probe", "positions"]] = ("probe",)
    refine_after: int = 2
    finer: int = 1
    tolerance: float = 0.0


@dataclass(frozen=True)
class Way:
    """What a solve's program is compiled for. field: pixels (y, x)."""

    field: tuple[int, int]
    slices: int
    modes: int
    loss: str
    absorption: bool
    refine: tuple[str, ...]


class Problem(NamedTuple):
    """What a solve is given."""

    amplitudes: jax.Array  # (group, batch, probe, n, n), frequency 0 first
    weights: jax.Array  # (group, batch, probe, 1, 1); 0 for what fills up
    corners: jax.Array  # (group, batch, probe, 2) where a window begins in the field [pixel]
    places: jax.Array  # (group, batch, probe, 2) [nm] of the probe from the window's middle
    beam: Beam
    halfway: jax.Array  # (n, n) propagator from the entrance to the middle of the specimen
    aperture: jax.Array  # (n, n) 1 where a refined spectrum may be
    aberrations: jax.Array  # (3, n, n) [rad] of defocus and astigmatism
    smooth: jax.Array  # (slice, slice)
    step: jax.Array
    momentum: jax.Array
    squares: jax.Array  # sum of the weighted squared amplitudes
    refine_after: jax.Array


class State(NamedTuple):
    """Between two iterations."""

    object: jax.Array  # (part, slice, y, x): phase, and absorption where there is any
    before: jax.Array  # and one iteration ago
    step: jax.Array  # share of the length; halved when the error has risen
    error: jax.Array
    modes: jax.Array  # (mode, n, n) spectra
    modes_before: jax.Array  # and one iteration ago
    places: jax.Array  # (group, batch, probe, 2) [nm] from the middles of the windows


def reconstruct(series: DiffractionSeries, tilt: int, settings: Settings, *, checkpoints: Sequence[int] = (),
                observe: Callable[[int, np.ndarray], None] | None = None, keep: Keep | None = None,
                fitted: np.ndarray | None = None) -> Solution:
    """Phases (1, slice, y, x) [rad] of a field that holds every window of a tilt's scan, its centre the tilt axis.

    observe(iteration, volume) is called at each checkpoint. fitted: (probe,) False for patterns that are held out;
    `held_out_error` is then among the metrics. fields: `light` (y, x), electrons of all patterns that met a pixel, in
    those of the brightest; `probe` (mode, part, n, n), amplitude and phase [rad] of its spectra, frequency 0 at n // 2;
    `positions` (probe, 2) [nm]; `absorption` (slice, y, x). metrics: `error`, of the amplitudes, squared, relative to
    their squares; `defocus` [nm] and `moved` [pm] where they were refined. history: `error` as the groups were met,
    before their steps.
    """
    patterns = series.patterns[tilt]
    way, problem, chosen = build(series, patterns, settings, fitted)
    first, wrong = jax.jit(_bound(_start, way))(problem), jax.jit(_bound(_misfit, way))
    observed = None if observe is None else lambda n, state: observe(n, _merged(state.object[:1], settings.finer))
    run = solve(_bound(_iteration, way), problem, (first, wrong(problem, first)[None]), settings.iterations,
                tolerance=settings.tolerance, checkpoints=checkpoints, observe=observed, keep=keep)
    outcome = outcomes(run, tolerance=settings.tolerance)[0]
    metrics = {"error": float(wrong(problem, run.state))}
    if fitted is not None and not np.all(fitted):
        rest = build(series, patterns, settings, ~np.asarray(fitted, bool))[1]
        metrics["held_out_error"] = float(wrong(rest, run.state))
    fields, told = _found(way, series, problem, chosen, run.state, settings.finer)
    return Solution(_merged(run.state.object[:1], settings.finer), dict(zip(TERMS, outcome.history.T)),
                    outcome.status, outcome.ok, metrics | told, fields)


def build(series: DiffractionSeries, patterns: np.ndarray, settings: Settings,
          fitted: np.ndarray | None = None) -> tuple[Way, Problem, np.ndarray]:
    """The problem of a tilt's patterns, what it is compiled for, and which probe is where (group, batch, probe)."""
    count, size = patterns.shape[:2]
    fitted = np.ones(count, bool) if fitted is None else np.asarray(fitted, bool)
    if fitted.shape != (count,) or not fitted.any():
        raise DataError(f"the patterns to fit are marked in shape {fitted.shape}; ({count},) with one or more of them "
                        "is needed")
    _checked(settings)
    if settings.slices < 1 or settings.depth <= 0:
        raise DataError(f"{settings.slices} slices of {settings.depth:g} nm together hold no specimen; give one or "
                        "more, and a depth above 0")
    wide, pixel = settings.finer * size, series.pixel / settings.finer
    field, corners, places = windows(series.positions, wide, pixel, settings.finer)
    chosen = grouped(series.positions, settings.group, wide, settings.slices)
    weights = ((chosen >= 0) & fitted[chosen])[..., None, None].astype(np.float32)
    amplitudes = np.sqrt(np.fft.ifftshift(patterns, axes=(1, 2)) / np.float32(series.electrons))[chosen]
    squares = float((weights * amplitudes.astype(np.float64) ** 2).sum())
    if squares == 0:
        raise DataError("every pattern to fit is empty; check the patterns' units and which of them are fitted")
    thickness = settings.depth / settings.slices
    made = beam(wide, pixel, series.optics, thickness)
    halfway = propagator(wide, pixel, series.optics.wavelength, (settings.depth - thickness) / 2)
    drop = np.diff(np.eye(settings.slices), axis=0)
    smooth = np.linalg.inv(np.eye(settings.slices) + settings.coupling * drop.T @ drop)
    numbers = map(np.float32, (settings.step, settings.momentum, squares, settings.refine_after))
    parts: Any = (amplitudes, weights, corners[chosen], places[chosen], made, halfway.astype(np.complex64),
                  opened(made), aberrations(made), smooth.astype(np.float32), *numbers)
    way = Way(field, settings.slices, settings.modes, settings.loss, settings.absorption, tuple(settings.refine))
    return way, jax.tree.map(jnp.asarray, Problem(*parts)), chosen


def _checked(settings: Settings) -> None:
    unknown = set(settings.refine) - {"probe", "positions"}
    if isinstance(settings.refine, str) or unknown or settings.loss not in ("amplitude", "poisson"):
        raise DataError(f"refine {settings.refine!r} and loss {settings.loss!r}: refine is a list of probe and "
                        "positions, loss is amplitude or poisson")
    least = min(settings.finer, settings.modes, settings.iterations)
    if least < 1 or settings.group < 0 or not settings.step > 0:
        raise DataError(f"{settings.iterations} iterations, steps of {settings.step:g}, groups of {settings.group} and "
                        f"{settings.modes} modes: one iteration and mode, and a step above 0, are the least; a group "
                        "of 0 is all probes")


def windows(positions: np.ndarray, size: int, pixel: float,
            finer: int = 1) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """The field [pixel] (y, x) that holds the windows of all probes, its centre that of the coordinates; where each
    window begins (probe, 2); and where each probe lies [nm] from its window's middle. finer: pixels that are to become
    one, of which the field has an even number."""
    reach = np.abs(positions).max(0) / pixel
    field = 2 * finer * np.ceil((np.ceil(reach).astype(int) + (size + 1) // 2 + MARGIN) / finer).astype(int)
    first = positions / pixel + (field - size) / 2
    corners = np.round(first).astype(np.int32)
    return (int(field[0]), int(field[1])), corners, ((first - corners) * pixel).astype(np.float32)


def levelled(phase: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A phase image (y, x) less the plane through the vacuum in it, and that plane's value at the centre and slopes per
    pixel along y and x (3,).

    seen: (y, x) where the scan tells of the phase. Vacuum is what Otsu's threshold parts from the specimen; where it
    parts nothing, as on a film that fills the field, the plane goes through all.
    """
    y, x = (np.arange(n) - (n - 1) / 2 for n in phase.shape)
    basis, seen = np.stack([np.ones(phase.shape), *np.meshgrid(y, x, indexing="ij")], -1), seen.astype(bool)
    if not seen.any():
        raise DataError("the scan tells of no pixel of the phase; give the area that its probes have lit")
    plane = np.linalg.lstsq(basis[seen], phase[seen], rcond=None)[0]
    for turn in range(LEVELS):
        rest = (phase - basis @ plane)[seen]
        low = rest < threshold_otsu(rest) if np.ptp(rest) > 0 else rest < 0
        between = low.mean() * (1 - low.mean()) * (rest[low].mean() - rest[~low].mean()) ** 2 if low.any() else 0
        if turn == 0 and between < PARTED * rest.var():
            break
        if turn > 0:
            # Noise lies on both sides of the plane, and what is thin on one: the other tells the noise.
            low = np.abs(rest) <= 2.5 * np.sqrt((rest[low & (rest < 0)] ** 2).mean()) if (rest < 0).any() else low
        plane, last = np.linalg.lstsq(basis[seen][low], phase[seen][low], rcond=None)[0], plane
        if np.allclose(plane, last, atol=1e-7):
            break
    return (phase - basis @ plane).astype(np.float32), plane


@cache
def _bound(function: Callable, way: Way) -> Any:
    """The same object for the same way, so that it compiles once."""
    return partial(function, way)


def _start(way: Way, problem: Problem) -> State:
    """Empty space, seen by the probe that the optics make.

    Further modes are that probe times 1, qy, qx, qy^2, ..., made orthogonal: what a source of some width mixes in.
    """
    spectrum = problem.beam.spectrum
    q = jnp.asarray(np.fft.fftfreq(len(spectrum)), jnp.float32)
    powers = [(degree - k, k) for degree in range(way.modes) for k in range(degree + 1)][:way.modes]
    shapes = jnp.stack([(spectrum * q[:, None] ** i * q**j).ravel() for i, j in powers], 1)
    modes = jnp.linalg.qr(shapes)[0].T.reshape(way.modes, *spectrum.shape)
    modes = jnp.sqrt(OTHERS) * modes.at[0].set(spectrum * jnp.sqrt(1 / OTHERS - (way.modes - 1)))
    empty = jnp.zeros((1 + way.absorption, way.slices, *way.field), jnp.float32)
    return settled(State(empty, empty, jnp.float32(problem.step), jnp.float32(np.inf), modes, jnp.array(modes),
                         problem.places))


def _iteration(way: Way, problem: Problem, state: State, n: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    ahead = state.object + problem.momentum * (state.object - state.before)
    ready = n >= problem.refine_after
    groups = (problem.amplitudes, problem.weights, problem.corners, state.places)
    modes = state.modes + PROBE_MOMENTUM * (state.modes - state.modes_before)
    (new, modes), errors = jax.lax.scan(partial(_group, way, problem, state.step, ready), (ahead, modes), groups)
    new = jnp.einsum("st,ptyx->psyx", problem.smooth, new)
    error, places = errors.sum() / problem.squares, state.places
    if "probe" in way.refine:
        modes = jnp.where(ready, _focused(way, problem, new, modes, groups), modes)
    if "positions" in way.refine:
        moves = jax.lax.map(lambda group: jax.lax.map(partial(_moves, way, problem, new, modes), group), groups)
        places = jnp.where(ready, places + moves - moves.mean((0, 1, 2)), places)
    # As |t| <= 1, too long a step makes noise, never infinities: it shows in the error.
    worse = error > state.error
    step = jnp.where(worse, state.step / 2, state.step)
    before = jnp.where(worse, new, state.object)
    change = sharding.relative_change(new, state.object)
    modes_before = jnp.where(worse, modes, state.modes)
    return State(new, before, step, error, modes, modes_before, places), error[None], change


def _group(way: Way, problem: Problem, step: jax.Array, ready: jax.Array, at: tuple[jax.Array, jax.Array],
           group: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """One step of the slices against a group of probes, and of the modes, and the group's error before it."""
    slices, modes = at

    def batch(sums: Any, given: tuple[jax.Array, ...]) -> tuple[Any, None]:
        gradient = jax.value_and_grad(partial(_loss, way, problem), argnums=(0, 1), has_aux=True)
        (_, error), (of_slices, of_modes) = gradient(slices, modes, given)
        return jax.tree.map(jnp.add, sums, (error, of_slices, of_modes, _light(way, problem, modes, given))), None

    zero = (jnp.float32(0), jnp.zeros_like(slices), jnp.zeros_like(modes), jnp.zeros(way.field, jnp.float32))
    (error, of_slices, of_modes, light), _ = jax.lax.scan(batch, zero, group)
    sharp = 4 if way.loss == "poisson" else 2  # curvature of the loss in a wave
    # Slices that change alike add up: their number is the largest eigenvalue of what couples them.
    curvature = way.slices * sharp * jnp.maximum(light, MODEST * light.max())
    new = slices - step * of_slices / jnp.maximum(curvature, FLOOR)
    if way.absorption:
        new = new.at[1].max(0)
    if "probe" in way.refine:
        number = jnp.maximum(problem.weights.sum() / UPDATES, group[1].sum())
        corrected = problem.aperture * (modes - jnp.conj(of_modes) / (sharp * number))
        modes = jnp.where(ready, corrected / jnp.linalg.norm(corrected), modes)
    return (new, modes), error


def _loss(way: Way, problem: Problem, slices: jax.Array, modes: jax.Array,
          batch: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """What a batch of probes contributes to the loss, and its squared error of amplitudes."""
    amplitudes, weights, corners, places = batch
    everywhere = (jnp.abs(_far_fields(way, problem, slices, modes, corners, places)) ** 2).sum(0)
    intensity = narrowed(everywhere, amplitudes.shape[-1])  # what the detector sees
    lengths = jnp.sqrt(intensity + FLOOR**2)
    error = (weights * (lengths - amplitudes) ** 2).sum()
    if way.loss == "amplitude":
        return error, error
    return (weights * (intensity - amplitudes**2 * jnp.log(intensity + EMPTY))).sum(), error


def _far_fields(way: Way, problem: Problem, slices: jax.Array, modes: jax.Array, corners: jax.Array,
                places: jax.Array) -> jax.Array:
    """(mode, probe, n, n) waves on the detector."""
    waves = jax.vmap(lambda mode: probes(problem.beam._replace(spectrum=mode), places))(modes)

    def passed(psi: jax.Array, parts: jax.Array) -> tuple[jax.Array, None]:
        seen = jax.vmap(lambda corner: _window(parts, corner, modes.shape[-1]), out_axes=1)(corners)
        through = jnp.exp(1j * seen[0] - seen[1]) if way.absorption else jnp.exp(1j * seen[0])
        return jnp.fft.ifft2(problem.beam.propagator * jnp.fft.fft2(through * psi)), None

    return jnp.fft.fft2(jax.lax.scan(passed, waves, slices.swapaxes(0, 1))[0], norm="ortho")


def _window(parts: jax.Array, corner: jax.Array, size: int) -> jax.Array:
    """(part, n, n) of a slice's (part, y, x)."""
    return jax.lax.dynamic_slice(parts, (0, corner[0], corner[1]), (len(parts), size, size))


def _light(way: Way, problem: Problem, modes: jax.Array, batch: tuple[jax.Array, ...]) -> jax.Array:
    """(y, x) electrons on each pixel of the field in the middle of the specimen, were it empty."""
    _, weights, corners, places = batch
    waves = jax.vmap(lambda mode: probes(problem.beam._replace(spectrum=mode * problem.halfway), places))(modes)
    seen = (weights * jnp.abs(waves) ** 2).sum(0)
    size = modes.shape[-1]
    spread = jax.linear_transpose(lambda field: jax.vmap(lambda corner: jax.lax.dynamic_slice(
        field, (corner[0], corner[1]), (size, size)))(corners), jax.ShapeDtypeStruct(way.field, jnp.float32))
    return spread(seen)[0]


def _lit(way: Way, problem: Problem, state: State) -> jax.Array:
    """`_light` of all probes."""
    groups = (problem.amplitudes, problem.weights, problem.corners, state.places)

    def more(sums: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return sums + jax.lax.map(partial(_light, way, problem, state.modes), group).sum(0), None

    return jax.lax.scan(more, jnp.zeros(way.field, jnp.float32), groups)[0]


def _focused(way: Way, problem: Problem, slices: jax.Array, modes: jax.Array,
             groups: tuple[jax.Array, ...]) -> jax.Array:
    """The modes, their defocus and astigmatism set right by a Gauss-Newton step: their own steps find them slowly."""
    def pull(batch: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        misfit, slopes = _slopes(way, problem, slices, modes, batch, problem.aberrations)
        weighted = batch[1] * slopes
        return jnp.einsum("iprc,jprc->ij", weighted, slopes), jnp.einsum("iprc,prc->i", weighted, misfit)

    normal, right = (a.sum((0, 1)) for a in jax.lax.map(lambda group: jax.lax.map(pull, group), groups))
    damped = normal + TRUST * problem.weights.sum() * jnp.eye(len(right))
    return modes * jnp.exp(1j * jnp.einsum("k,kyx->yx", jnp.linalg.solve(damped, right), problem.aberrations))


def _moves(way: Way, problem: Problem, slices: jax.Array, modes: jax.Array, batch: tuple[jax.Array, ...]) -> jax.Array:
    """(probe, 2) [nm] by which a batch's probes move in one iteration: damped Gauss-Newton steps."""
    size = modes.shape[-1]
    q = 2 * jnp.pi * jnp.asarray(np.fft.fftfreq(size), jnp.float32) / problem.beam.pixel
    ways = jnp.stack([jnp.broadcast_to(-q[:, None], (size, size)), jnp.broadcast_to(-q, (size, size))])
    misfit, slopes = _slopes(way, problem, slices, modes, batch, ways)
    normal = jnp.einsum("iprc,jprc->pij", batch[1] * slopes, slopes)
    right = jnp.einsum("iprc,prc->pi", batch[1] * slopes, misfit)
    damping = DAMPING * (jnp.abs(modes) ** 2 * (ways**2).sum(0)).sum()
    farthest = FARTHEST * problem.beam.pixel
    return jnp.clip(jnp.linalg.solve(normal + damping * jnp.eye(2), right[..., None])[..., 0], -farthest, farthest)


def _slopes(way: Way, problem: Problem, slices: jax.Array, modes: jax.Array, batch: tuple[jax.Array, ...],
            ways: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What amplitudes of far fields lack (probe, n, n), and how they grow (k, probe, n, n) with phases `ways` (k, n, n)
    of all modes' spectra: far fields are linear in them."""
    amplitudes, _, corners, places = batch
    size = amplitudes.shape[-1]
    field = narrowed(_far_fields(way, problem, slices, modes, corners, places), size)
    length = jnp.maximum(jnp.sqrt((jnp.abs(field) ** 2).sum(0)), FLOOR)

    def grown(along: jax.Array) -> jax.Array:
        change = narrowed(_far_fields(way, problem, slices, 1j * along * modes, corners, places), size)
        return (jnp.conj(field) * change).real.sum(0) / length

    return amplitudes - length, jax.lax.map(grown, ways)


def _misfit(way: Way, problem: Problem, state: State) -> jax.Array:
    """The squared error of the fitted amplitudes, relative to their squares."""
    def batch(given: tuple[jax.Array, ...]) -> jax.Array:
        return _loss(way, problem, state.object, state.modes, given)[1]

    groups = (problem.amplitudes, problem.weights, problem.corners, state.places)
    return jax.lax.map(lambda group: jax.lax.map(batch, group), groups).sum() / problem.squares


def _merged(fine: jax.Array, finer: int) -> np.ndarray:
    """Means (..., y, x) of so many pixels along y and x."""
    array = np.asarray(fine)
    *rest, ny, nx = array.shape
    return array.reshape(*rest, ny // finer, finer, nx // finer, finer).mean((-3, -1)) if finer > 1 else array


def _found(way: Way, series: DiffractionSeries, problem: Problem, chosen: np.ndarray, state: State,
           finer: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What a solve has found beside the phases, as fields and in numbers."""
    modes, real = np.fft.fftshift(np.asarray(state.modes), axes=(1, 2)), chosen >= 0
    pixel = series.pixel / finer
    _, corners, places = windows(series.positions, modes.shape[-1], pixel, finer)
    light = _merged(jax.jit(_bound(_lit, way))(problem, state), finer)
    fields = {"light": light / light.max(), "probe": np.stack([np.abs(modes), np.angle(modes)], 1).astype(np.float32)}
    told: dict[str, float] = {}
    if way.absorption:
        fields["absorption"] = _merged(state.object[1], finer)
    if "probe" in way.refine:
        begun, first = np.asarray(problem.beam.spectrum), np.asarray(state.modes[0])
        told["defocus"] = series.optics.defocus + defocus_between(begun, first, series.optics.wavelength, pixel)
    if "positions" in way.refine:
        moved = np.zeros_like(places)
        moved[chosen[real]] = np.asarray(state.places)[real] - places[chosen[real]]
        fields["positions"] = series.positions + moved
        told["moved"] = 1e3 * float(np.sqrt((moved**2).sum(1).mean()))
    return fields, told
