"""Linear tomography of annular dark-field images (ADF), which multislice tomography is compared with.

An image is taken for a projection of one volume, b = A x, though scattering is not linear. Two solvers of that:
`resire` descends in real space, x <- max(0, x - step A' (A x - b)) (M. Pham et al., RESIRE, Sci. Rep. 13, 5624 (2023)),
and here may take total variation into its cost, |A x - b|^2 / 2 + n lambda_tv TV(x) with n tilts;
`genfire` goes back and forth between the box with x >= 0 and the measured part of its Fourier space (A. Pryor et al.,
GENFIRE, Sci. Rep. 7, 10409 (2017)). Volumes (1, z, y, x) are shares of the beam per voxel length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import sharding
from engine.atoms import Atoms
from engine.data import DataError, Solution, TiltSeries
from engine.diffraction import BAND, DiffractionSeries, Scan, annulus, potentials
from engine.iterate import Step, outcomes, settled, solve
from engine.multislice import Beam, batches, beam, probes
from engine.penalties import Dual, prox_tv, zero_dual
from engine.projector import Geometry, backproject, geometry, project

NAME = "HAADF"
NEAREST = 1e-3  # [pixel of Fourier space] a plane that is closer to a point weighs no more than one so far away


@dataclass(frozen=True)
class Settings:
    """Numbers of one solve.

    method: `resire` or `genfire`. iterations: 100 in the paper. momentum: Nesterov's, in resire; the paper has none.
    oversampling: size of genfire's padded field in that of the images. radius: [pixels of the padded Fourier space]
    from a measured plane within which points are known, in genfire. positivity: whether negative values are set to 0.
    lambda_tv: weight of total variation in resire, in the images' root mean square; the paper has none. inner: its
    steps in each iteration.
    """

    method: Literal["resire", "genfire"] = "resire"
    iterations: int = 100
    momentum: bool = True
    oversampling: int = 3
    radius: float = 0.3
    positivity: bool = True
    lambda_tv: float = 0.0
    inner: int = 4


class Descent(NamedTuple):
    """What `resire` is given."""

    images: jax.Array  # (tilt, y, x)
    rays: Geometry
    step: jax.Array
    floor: jax.Array  # 0 or -inf
    momentum: jax.Array  # 1 or 0
    weight: jax.Array  # of total variation
    squares: jax.Array  # sum of the squared images


class Descended(NamedTuple):
    """Between two iterations of `resire`: ahead is where the next gradient is taken, t Nesterov's."""

    x: jax.Array  # (z, y, x)
    ahead: jax.Array
    t: jax.Array
    tv_dual: Dual


class Measured(NamedTuple):
    """What `genfire` is given: the volume's transform at points of the padded (kz, ky), frequency 0 first."""

    points: jax.Array  # (point,) in the flattened field
    values: jax.Array  # (point, kx), the half of kx that a real volume needs
    floor: jax.Array
    total: jax.Array  # sum of the moduli of the values


class Alternated(NamedTuple):
    """Between two iterations of `genfire`."""

    x: jax.Array  # (z, y, x)


def simulate(atoms: Atoms, scan: Scan, angles: np.ndarray, window: float | None = None, seed: int = 0) -> TiltSeries:
    """Images without noise, shares of the beam, of a scan so dense that its patterns would fill the memory.

    angles: (tilt,) [deg] about x. window: [nm] around each probe in which its wave is followed; None: the field. The
    beam should be narrow in it: a defocus of half the depth focuses on the middle.
    """
    if scan.reach <= scan.detector[0]:
        raise DataError(f"waves reach {scan.reach:.3g} mrad and the detector begins at {scan.detector[0]:g} mrad; "
                        "take a larger scan.finer, or a smaller inner angle")
    angles, fine = np.asarray(angles, np.float64), scan.pixel / scan.finer
    size = scan.size * scan.finer
    wide = size if window is None else min(size, round(window / fine))
    made = beam(wide, fine, scan.optics, scan.depth[1], band_limit=BAND)
    # A window begins at a whole pixel; what is left of the probe's position is its own.
    first = scan.positions / fine + (size - wide) / 2
    corners = np.round(first)
    count, each = batches(scan.probes**2, wide, 2**21)
    filled = np.resize(np.arange(scan.probes**2), (count, each))  # the last batch is filled up
    places = jnp.asarray(((first - corners) * fine)[filled], jnp.float32)
    starts = jnp.asarray(corners.astype(np.int32)[filled] + wide)
    found = np.zeros((len(angles), scan.probes**2))
    for t, share, volts in potentials(atoms, scan, np.stack([0 * angles, 0 * angles, angles], 1), seed):
        around = np.pad(scan.optics.interaction * volts, [(0, 0), (wide, wide), (wide, wide)], mode="wrap")
        dark = _scanned(made, places, starts, jnp.asarray(around), annulus(scan, wide))
        found[t] += share * np.asarray(dark).ravel()[:scan.probes**2]
    step = scan.size * scan.pixel / scan.probes
    return TiltSeries(found.reshape(1, -1, scan.probes, scan.probes), angles, (NAME,), step, "intensity")


@jax.jit
def _scanned(made: Beam, places: jax.Array, starts: jax.Array, phases: jax.Array, ring: jax.Array) -> jax.Array:
    """(batch, probe) on the detector, for windows of phases (slice, y, x) that start at (batch, probe, 2)."""
    wide, through = ring.shape[0], jnp.exp(1j * phases)

    def batch(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        at, corners = given

        def passed(psi: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
            seen = jax.vmap(lambda corner: jax.lax.dynamic_slice(layer, corner, (wide, wide)))(corners)
            return jnp.fft.ifft2(made.propagator * jnp.fft.fft2(seen * psi)), None

        psi = jax.lax.scan(passed, probes(made, at), through)[0]
        return (ring * jnp.abs(jnp.fft.fft2(psi, norm="ortho")) ** 2).sum((1, 2))

    return jax.lax.map(batch, (places, starts))


def images(series: DiffractionSeries) -> TiltSeries:
    """The dark-field images of a series whose probes lie on a square raster, rows along x; a pixel is a scan step."""
    if series.adf is None:
        raise DataError("the series has no dark field; record one, or simulate with finer pixels, whose waves reach "
                        "the detector")
    if series.angles[:, :2].any():
        raise DataError("linear tomography takes tilts about x alone; some tilts are also turned about y or z")
    rows = round(len(series.positions) ** 0.5)
    if rows < 2 or rows**2 != len(series.positions):
        raise DataError(f"{len(series.positions)} probes are no square raster; scan n x n of them")
    raster = series.positions.reshape(rows, rows, 2)
    step = raster[0, 1, 1] - raster[0, 0, 1]
    even = step * (np.stack(np.meshgrid(*[np.arange(rows) - (rows - 1) / 2] * 2, indexing="ij"), -1))
    if step <= 0 or np.abs(raster - even).max() > 0.01 * step:
        raise DataError("the probes are no even raster about the field's centre, rows along x; resample the images")
    return TiltSeries(series.adf.reshape(1, -1, rows, rows), series.angles[:, 2], (NAME,), step, "intensity")


def with_dose(series: TiltSeries, dose: float, seed: int = 0) -> TiltSeries:
    """Images, shares of the beam, as counted at so many electrons per square Angstrom for all tilts together."""
    if not dose > 0:
        raise DataError(f"a dose of {dose:g} e/A^2 makes no image; give a positive one")
    electrons = dose * (10 * series.pixel_size) ** 2 / series.tilts
    counts = np.random.default_rng([20_233, seed]).poisson(electrons * np.asarray(series.projections, np.float64))
    return replace(series, projections=counts / electrons)


def reconstruct(series: TiltSeries, settings: Settings, *, checkpoints: Sequence[int] = (),
                observe: Callable[[int, np.ndarray], None] | None = None) -> Solution:
    """Volume (1, z, y, x), as deep as the images are high, its voxels as wide as their pixels.

    observe(iteration, volume) is called at each checkpoint. history: `residual` before each step, of the images
    relative to their root mean square, or of genfire's values relative to their mean modulus (its R factor).
    """
    depth, planes = series.projections.shape[2:]
    step: Step
    problem: Descent | Measured
    if settings.method == "resire":
        inner = settings.inner if settings.lambda_tv > 0 else 0
        problem, step = descent(series, settings), _descending(inner)
        first = partial(_from_zero, Descended, depth, planes)
    else:
        problem, step = measured(series, settings), _alternating(settings.oversampling * depth)
        first = partial(_from_zero, Alternated, depth, planes)
    observed = None if observe is None else lambda n, state: observe(n, np.asarray(state.x)[None])
    run = solve(step, problem, first(), settings.iterations, checkpoints=checkpoints, observe=observed)
    outcome = outcomes(run)[0]
    residual = outcome.history[:, 0]
    return Solution(np.asarray(run.state.x)[None], {"residual": residual}, outcome.status, outcome.ok,
                    {"residual": float(residual[-1])})


def _from_zero(kind: type, depth: int, planes: int) -> tuple[Descended | Alternated, jax.Array]:
    """An empty volume, and its residual, 1."""
    x = jnp.zeros((depth, depth, planes), jnp.float32)
    state = kind(x, x, jnp.float32(1), zero_dual(x)) if kind is Descended else kind(x)
    return settled(state), jnp.ones(1)


def descent(series: TiltSeries, settings: Settings) -> Descent:
    """The least squares of `resire`, with the longest step that is safe."""
    stack = series.projections[0]
    tilts, pixels, _ = stack.shape
    rays = geometry(series.angles)
    # |A|^2 is at most the largest row sum times the largest column sum; every plane along x is alike.
    longest = project(jnp.ones((pixels, pixels, 1)), rays, pixels).max()
    most = backproject(jnp.ones((tilts, pixels, 1)), rays, pixels, pixels).max()
    squares = (stack.astype(np.float64) ** 2).sum()
    numbers = (1 / (longest * most), 0 if settings.positivity else -np.inf, settings.momentum,
               tilts * settings.lambda_tv * np.sqrt(squares / stack.size), squares)
    return Descent(jnp.asarray(stack), rays, *(jnp.float32(number) for number in numbers))


@cache
def _descending(inner: int) -> Step:
    """The step of `resire` with so many of TV's, 0 for no TV; the same object each time, so that it compiles once."""
    return partial(_descend, inner)


def _descend(inner: int, problem: Descent, state: Descended,
             _: jax.Array) -> tuple[Descended, jax.Array, jax.Array]:
    nz, ny, _planes = state.x.shape
    misfit = project(state.ahead, problem.rays, ny) - problem.images
    x, dual = state.ahead - problem.step * backproject(misfit, problem.rays, nz, ny), state.tv_dual
    if inner:
        x, dual = prox_tv(x, problem.weight, problem.step, dual, inner, problem.floor)
    else:
        x = jnp.maximum(x, problem.floor)
    t = (1 + jnp.sqrt(1 + 4 * state.t**2)) / 2
    ahead = x + problem.momentum * (state.t - 1) / t * (x - state.x)
    residual = jnp.sqrt((misfit**2).sum() / problem.squares)
    return Descended(x, ahead, t, dual), residual[None], sharding.relative_change(x, state.x)


def measured(series: TiltSeries, settings: Settings) -> Measured:
    """What the images say of the padded Fourier space: near their planes, means weighted by 1 / distance.

    An image's transform at frequency f along y is the volume's at (kz, ky) = f (sin, cos). Each point takes it from
    the nearest place of a plane, where it is summed exactly (the paper's discrete Fourier transform).
    """
    stack = series.projections[0]
    pixels = stack.shape[1]
    wide = settings.oversampling * pixels
    k = np.fft.fftfreq(wide, 1 / wide)
    kz, ky = (a.ravel() for a in np.meshgrid(k, k, indexing="ij"))
    y = np.arange(pixels) - (pixels - 1) / 2
    values, weights = np.zeros((wide**2, stack.shape[2] // 2 + 1), np.complex128), np.zeros(wide**2)
    for image, angle in zip(np.fft.rfft(stack.astype(np.float64), axis=2), np.radians(series.angles)):
        apart = np.abs(kz * np.cos(angle) - ky * np.sin(angle))
        near = np.flatnonzero((apart < settings.radius) & (np.hypot(kz, ky) < wide / 2))
        along = ky[near] * np.cos(angle) + kz[near] * np.sin(angle)
        weight = 1 / np.maximum(apart[near], NEAREST)
        values[near] += weight[:, None] * (np.exp(-2j * np.pi / wide * along[:, None] * y) @ image)
        weights[near] += weight
    points = np.flatnonzero(weights)
    # The volume lies in the padded field's first corner, its own centre (n - 1) / 2 voxels from there.
    shift = np.exp(-1j * np.pi * (pixels - 1) / wide * (kz[points] + ky[points]))
    known = values[points] / weights[points, None] * shift[:, None]
    return Measured(jnp.asarray(points), jnp.asarray(known, jnp.complex64),
                    jnp.float32(0 if settings.positivity else -np.inf), jnp.float32(np.abs(known).sum()))


@cache
def _alternating(wide: int) -> Step:
    """The step of `genfire` in a padded field; the same object each time, so that it compiles once."""
    return partial(_alternate, wide)


def _alternate(wide: int, problem: Measured, state: Alternated,
               _: jax.Array) -> tuple[Alternated, jax.Array, jax.Array]:
    nz, ny, planes = state.x.shape
    spectrum = jnp.fft.rfftn(jnp.pad(state.x, [(0, wide - nz), (0, wide - ny), (0, 0)])).reshape(wide**2, -1)
    residual = jnp.abs(spectrum[problem.points] - problem.values).sum() / problem.total
    spectrum = spectrum.at[problem.points].set(problem.values).reshape(wide, wide, -1)
    x = jnp.maximum(jnp.fft.irfftn(spectrum, (wide, wide, planes))[:nz, :ny], problem.floor)
    return Alternated(x), residual[None], sharding.relative_change(x, state.x)
