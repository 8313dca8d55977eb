"""Multislice electron tomography (MSET): the potential of a specimen straight from a tilt series of 4D-STEM patterns.

    minimise over V >= 0   sum over tilts, probes of | |far field of V| - sqrt(pattern) |^2 + n lambda_tv TV(V)  (Eq. 5)

n is the number of patterns per pixel of the field, so that one lambda_tv suits coarse and fine scans, few and many
tilts. The specimen is turned to a tilt, its slices' gradient (Eq. B5) is taken from a group of that tilt's probes at
once, the volume steps against it and is turned back, and what is negative is set to 0: the paper's Appendix A, with the
sign of its Eq. B6. A slice may hold several layers of voxels; with all in one this is single-slice tomography.

Steps are counted in 1 / (2 x illumination x layers), the inverse of the largest curvature that weak scattering can
have: the illumination is the brightest pixel's share of electrons, from all probes of a group, halfway through.
`paper` takes the probes one by one and searches each step backwards, as the paper does (c = 0, rho = 0.1).

`refine` corrects what the microscope's settings say of the probe and of where it stood, once a tilt. The probe's
spectrum falls by what the waves of that tilt exceed on average: the step that cannot raise the error, as all that
follows is unitary. Its defocus and astigmatism, which such steps approach slowly, take a Gauss-Newton step, and so does
each position (`multislice.misplacement`). All start when the volume tells more than an empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from engine import sharding
from engine.data import DataError, Solution
from engine.diffraction import DiffractionSeries
from engine.euler import matrix
from engine.groups import Feed, dealt, gathered, grouped, illumination, tilt_order
from engine.iterate import Keep, Step, outcomes, solve
from engine.multislice import aberrations, beam, defocus_between, opened, propagator
from engine.passes import TERMS, Problem, State, Way, misfit, start, stepper, streaming

FIRST = 20.0  # steps that `paper` tries first; at 48^3 as good after 5 iterations as groups of 8 after 15


@dataclass(frozen=True)
class Settings:
    """Numbers of one solve.

    mode: `groups` takes steps of a given length; `paper` one probe at a time, each step searched backwards from FIRST
    times that length, without momentum. iterations: passes over all tilts. step: in units of the inverse curvature.
    momentum: share of the last change of the volume that is added before each step. group: probes of a tilt in one
    step, far apart, 0 for all: few need fewer iterations, many fill a GPU. binning: layers of voxels in a slice; 0 for
    all in one (SSET); 4 of 0.04 nm were as good as 1 at 48^3, in a quarter of the time. finer: pixels of a wave along a
    voxel's edge; with 1, as in the paper, electrons that miss the detector fold back onto it; 2 brought RMSD from 2.6
    to 1.5 pm at 48^3, 2e5 e/A^2 and lambda_tv 1e-6, in three times the time. positivity: whether negative potentials
    are set to 0. lambda_tv: weight of total variation [1 / V]; 1e-6 halved RMSD at all doses, and at low ones keeps
    noise from passing for atoms; inner: its steps in each iteration. refine: `probe`, one for all tilts, and
    `positions`, each tilt's own, are corrected after so many iterations, `refine_after`. devices: over which the probes
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
    refine: Sequence[Literal["probe", "positions"]] = ()
    refine_after: int = 2
    tolerance: float = 0.0
    devices: int = 1


def reconstruct(series: DiffractionSeries, settings: Settings, *, checkpoints: Sequence[int] = (),
                observe: Callable[[int, np.ndarray], None] | None = None, keep: Keep | None = None,
                fitted: np.ndarray | None = None) -> Solution:
    """Potential (1, z, y, x) [V] of a cube of the patterns' size.

    Patterns that are no array, but read from disk a tilt at a time (`engine.scans`), are streamed. observe(iteration,
    volume) is called at each checkpoint. fitted: (tilt, probe) False for patterns that are held out; `held_out_error`
    is then among the metrics. keep: where a long solve leaves its state, to be taken up again. history: `amplitude` is
    the error as the tilts were met, before their steps, relative to the squared amplitudes. What was refined is among
    the fields: `probe` (part, qy, qx), its amplitude and the phase [rad] that was added, frequency 0 at n // 2;
    `positions` (tilt, probe, 2) [nm]; and among the metrics: `defocus` [nm], `moved`, of positions [pm, rms].
    A solve that fails returns ok = False.
    """
    devices, volts = _devices(settings, series.size), 1 / (series.optics.interaction * series.pixel)
    way = Way(settings.mode, series.size, _layers(series.size, settings),
              settings.inner if settings.lambda_tv > 0 else 0, tuple(settings.refine))
    feed = feeding(series, settings, fitted)
    streamed = feed if series.streamed else None
    problem = build(feed, settings)

    def volume(state: State) -> np.ndarray:
        return volts * np.asarray(sharding.one(state.phase, devices))[None]

    observed = None if observe is None else lambda n, state: observe(n, volume(state))
    first, error = start(way, devices, problem), partial(misfit, way, devices)
    empty = np.float32(sharding.one(error(problem, first, streamed), devices))
    advance: Step = stepper(way) if streamed is None else partial(streaming, way, streamed, devices)
    terms = sharding.repeated(np.array([empty, 0, empty]), devices)
    run = solve(advance, problem, (first, terms), settings.iterations, devices=devices, tolerance=settings.tolerance,
                checkpoints=checkpoints, observe=observed, keep=keep, compiled=streamed is None)
    outcome = outcomes(run, devices, settings.tolerance)[0]
    metrics = {"amplitude_error": float(sharding.one(error(problem, run.state, streamed), devices))}
    if fitted is not None and not np.all(fitted):
        rest, others = _instead(problem, feeding(series, settings, ~np.asarray(fitted, bool)), streamed is not None)
        metrics["held_out_error"] = float(sharding.one(error(rest, run.state, others), devices))
    fields, told = _refined(way, feed, problem, run.state)
    return Solution(volume(run.state), dict(zip(TERMS, outcome.history.T)), outcome.status, outcome.ok,
                    metrics | told, fields)


def feeding(series: DiffractionSeries, settings: Settings, fitted: np.ndarray | None = None) -> Feed:
    """The tilts of a series in the order and the groups of a solve."""
    shape = series.patterns.shape[:2]
    fitted = np.ones(shape, bool) if fitted is None else np.asarray(fitted, bool)
    if fitted.shape != shape or not fitted.any():
        raise DataError(f"the patterns to fit are marked in shape {fitted.shape}; {shape} (tilt, probe) with one or "
                        "more of them is needed")
    farthest, width = np.abs(series.positions).max(), series.size * series.pixel
    if farthest > width / 2:
        raise DataError(f"a probe lies {farthest:.3g} nm from the centre of a field {width:.3g} nm wide, as wide as "
                        "patterns of these pixels hold; give positions in nm from the tilt axis, or a smaller scan")
    paper, tilts = settings.mode == "paper", len(series.angles)
    chosen = grouped(series.positions, 1 if paper else settings.group, settings.finer * series.size,
                     series.size // _layers(series.size, settings), settings.devices, shuffled=not paper)
    return Feed(series, chosen, [*range(tilts)] if paper else [*map(int, tilt_order(tilts))], fitted, settings.devices)


def build(feed: Feed, settings: Settings) -> Problem:
    """The problem of a feed on its devices, with a leading axis for them where they are several."""
    series, layers = feed.series, _layers(feed.series.size, settings)
    size, squares = series.size, feed.squares()
    if squares == 0:
        raise DataError("every pattern to fit is empty; check the patterns' units and which of them are fitted")
    positions = series.positions[feed.chosen].astype(np.float32)
    wide, pixel = settings.finer * size, series.pixel / settings.finer
    made = beam(wide, pixel, series.optics, layers * series.pixel)
    halfway = propagator(wide, pixel, series.optics.wavelength, (size - layers) * series.pixel / 2)
    lit = settings.finer**2 * illumination(made, positions, feed.real.astype(np.float32), halfway)
    density = float(feed.weights().sum()) / size**2
    volts = series.optics.interaction * series.pixel
    step, momentum = (FIRST * settings.step, 0.0) if settings.mode == "paper" else (settings.step, settings.momentum)
    floor = 0.0 if settings.positivity else -np.inf
    numbers = (1 / (2 * lit * size), step, momentum, floor, density * settings.lambda_tv / volts, squares,
               settings.refine_after)
    shared: Any = (made, opened(made), aberrations(made), _gauge(series.angles[feed.order]),
                   *map(np.float32, numbers))
    tilts = None if series.streamed else feed.stacked()
    cut: Any = [dealt(array, settings.devices, axis=1) for array in (positions, feed.real[..., 0])]
    return jax.tree.map(jnp.asarray, Problem(tilts, *cut, *sharding.repeated(shared, settings.devices)))


def _refined(way: Way, feed: Feed, problem: Problem, state: State) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What a solve has refined, as fields, and in numbers: the defocus [nm], and how far positions moved [pm]."""
    fields: dict[str, np.ndarray] = {}
    told: dict[str, float] = {}
    series, devices = feed.series, feed.devices
    if "probe" in way.refine:
        begun, found = (np.asarray(sharding.one(a, devices)) for a in (problem.beam.spectrum, state.spectrum))
        turned = np.fft.fftshift(found * np.conj(begun) / np.maximum(np.abs(begun), 1e-12))
        fields["probe"] = np.stack([np.abs(np.fft.fftshift(found)), np.angle(turned)]).astype(np.float32)
        more = defocus_between(begun, found, series.optics.wavelength, float(sharding.one(problem.beam.pixel, devices)))
        told["defocus"] = series.optics.defocus + more
    if "positions" in way.refine:
        fields["positions"] = feed.ungrouped(gathered(np.asarray(state.positions), devices, axis=2))
        told["moved"] = 1e3 * float(np.sqrt(((fields["positions"] - series.positions) ** 2).sum(2).mean()))
    return fields, told


def _gauge(angles: np.ndarray) -> np.ndarray:
    """(2 tilts, 2 tilts) projection on the displacements (tilt, (y, x)) that a shift of the volume makes."""
    shown = np.concatenate([matrix(turn)[1:] for turn in angles])
    return (shown @ np.linalg.pinv(shown)).astype(np.float32)


def _instead(problem: Problem, feed: Feed, streamed: bool) -> tuple[Problem, Feed | None]:
    """The problem of other patterns of the same series; what is in memory stays there."""
    problem = problem._replace(squares=jnp.broadcast_to(jnp.float32(feed.squares()), problem.squares.shape))
    if streamed:
        return problem, feed
    assert problem.tilts is not None
    weights = dealt(feed.weights(), feed.devices, axis=2)
    return problem._replace(tilts=problem.tilts._replace(weights=jnp.asarray(weights))), None


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


