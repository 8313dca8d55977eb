"""The forward model of fused tomography (F3 Eq. 1) as traced arrays, and what every solver needs of it.

HAADF:      b_H ~ gain * A_h sum_i c_i x_i^gamma, the power taken per voxel, c_i = Z_i^gamma over the largest.
Chemistry:  b_i ~ s_i A_c x_i + background_i, Poisson or, for maps that are not counts, by least squares.

Normalisation: x is concentration, 1 in a pure phase where sensitivities are known. Each term is a negative log
likelihood (images over their own noise), so weights of 1 are maximum likelihood and a detector's gain drops out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import coupling, guide, sharding
from engine.data import MultiModal
from engine.losses import least_squares, poisson, poisson_curvature
from engine.penalties import total_variation
from engine.projector import Geometry, backproject, geometry, project
from engine.sizes import bucket, halvings

# The fused solver refits the gain in each of its first 15 iterations, then freezes it: a cost that keeps moving could
# not be compared with its own past. The descents, which settle late, refit after 5, 10, 20, ... iterations.
GAIN_STEPS, GAIN_EVERY = 15, 5
# A voxel at 0 has no HAADF gradient for gamma > 1 and would never hear that term again: solvers keep this floor.
FLOOR = 1e-4
START_STEPS = 5  # EM steps of the start: measured best between 3 and 5; the converged one is the worst start


class Problem(NamedTuple):
    """One reconstruction's data and weights on the device. Lists of tilts are padded; padded tilts weigh 0."""

    images: jax.Array  # (tilt, y, x), divided by their root mean square
    image_noise: jax.Array  # () in the same unit
    image_rays: Geometry
    maps: jax.Array  # (element, tilt, y, x)
    background: jax.Array  # broadcastable to maps
    map_weight: jax.Array  # (element, 1, 1, 1), 1 / variance for least squares, 1 for counts
    map_rays: Geometry
    sensitivity: jax.Array  # (element, 1, 1, 1), or (element, tilt, 1, 1) where the detector was in shadow
    contrast: jax.Array  # (element, 1, 1, 1), c_i
    start: jax.Array  # (element, z, y, x)
    gamma: jax.Array
    lambda_model: jax.Array
    lambda_chem: jax.Array
    lambda_tv: jax.Array
    inner: jax.Array  # steps of the TV proximal operator
    planes: jax.Array  # how many exist along x, all slabs together
    guide: jax.Array | None = None  # (2, 1, y, x), where the image steers TV (`engine.guide`)


class Chemistry(NamedTuple):
    """The chemical term at some x: value, gradient (element, z, y, x), and the modelled signal without background."""

    value: jax.Array
    slope: jax.Array
    signal: jax.Array


def build(data: MultiModal, *, gamma: float, lambda_model: float, lambda_chem: float, lambda_tv: float,
          weights: str, inner: int, held_out: tuple[int, ...] = (), devices: int = 1,
          factors: np.ndarray | None = None) -> Problem:
    """Data and weights as device arrays. held_out: indices of chemical tilts that are left out of the fit. factors:
    (element, tilt) by which the maps' signal would have to be multiplied to be as bright at each tilt.

    weights: the images are linear in (Z x)^gamma (z_gamma), in Z^gamma x (z_gamma_linear) or in Z x^gamma (z).

    Where sensitivities are unknown, each s_i is set so that the start's brightest percent averages 1, and the c_i are
    fitted to the images by non-negative least squares (a floor of 1e-3 of the largest keeps every element coupled).
    devices: slabs the problem is cut into; with two or more every array has a leading axis of slabs.
    """
    base = _based(data, held_out, devices, factors)
    numbers = np.asarray(data.numbers, np.float64)
    contrast = numbers ** (1.0 if weights == "z" else gamma)
    power = 1.0 if weights == "z_gamma_linear" else gamma
    if data.haadf is not None and data.sensitivity is None:
        scatter = sharding.spread(_scattered(data.chem.projections.shape[2]), devices)
        parts = scatter(base.start, base.image_rays, _alike(np.float32(power), devices))
        images, parts = (sharding.join(a, devices, data.shape[2]) for a in (base.images, parts))
        contrast = fit_contrast(images, parts)
    scalars = {"gamma": power, "lambda_model": lambda_model, "lambda_chem": lambda_chem, "lambda_tv": lambda_tv,
               "contrast": _column(len(data.numbers), contrast / contrast.max())}
    return base._replace(inner=_alike(np.int32(inner), devices), **{
        name: _alike(np.asarray(value, np.float32), devices) for name, value in scalars.items()})


def _based(data: MultiModal, held_out: tuple[int, ...], devices: int, factors: np.ndarray | None) -> Problem:
    """What trials of one cell share, kept on the device: for held-out maps, some sets of them."""
    for kept, lit, *key, problem in _kept:
        if kept is data and lit is factors and key == [held_out, devices]:
            return problem
    problem = _base(data, held_out, devices, factors)
    _kept.append((data, factors, held_out, devices, problem))
    return problem


_kept: deque[tuple[MultiModal, np.ndarray | None, tuple[int, ...], int, Problem]] = deque(maxlen=6)


def _base(data: MultiModal, held_out: tuple[int, ...], devices: int, factors: np.ndarray | None) -> Problem:
    """Data, sensitivities and the start; numbers that the settings decide are 1."""
    chem = data.chem
    size = bucket(chem.tilts)
    map_rays = geometry(chem.angles, size)
    kept = np.asarray(map_rays.weight).copy()
    kept[list(held_out)] = 0

    def slabs(array: np.ndarray) -> jax.Array:
        return jnp.asarray(sharding.split(array, devices, halvings(*data.shape[:2])))

    alike, column = partial(_alike, devices=devices), partial(_column, len(chem.elements))
    map_weight = 1.0 if chem.units == "counts" else 1 / chem.noise_level(held_out) ** 2
    background = np.asarray(chem.background, np.float32)
    background = background.reshape((1,) * (4 - background.ndim) + background.shape)
    if background.shape[1] > 1:
        background = _pad_tilts(background, size)
    level = (slabs if background.shape[-1] > 1 else alike)(background)
    maps = slabs(_pad_tilts(chem.projections, size))
    rays, planes = alike(map_rays._replace(weight=jnp.asarray(kept))), alike(np.int32(data.shape[2]))
    lit = np.float32(1) if factors is None else _pad_tilts(
        (1 / np.asarray(factors))[..., None, None].astype(np.float32), size)
    sensitivity = lit * column(1.0 if data.sensitivity is None else data.sensitivity)
    start = sharding.spread(_starter(data.shape[:2]), devices)(maps, level, alike(sensitivity), rays, planes)
    if data.sensitivity is None:
        peak = np.maximum(_peak(sharding.join(start, devices, data.shape[2])), 1e-12).astype(np.float32)
        sensitivity, start = lit * peak, start / alike(peak)
    images, noise, image_rays = _images(data.haadf, chem.projections.shape[2:])
    one = alike(np.float32(1))
    return Problem(
        images=slabs(images), image_noise=alike(np.float32(noise)), image_rays=alike(image_rays), maps=maps,
        background=level, map_weight=alike(column(map_weight)), map_rays=rays, sensitivity=alike(sensitivity),
        contrast=alike(column(1.0)), start=jnp.maximum(start, FLOOR), gamma=one, lambda_model=one, lambda_chem=one,
        lambda_tv=one, inner=alike(np.int32(1)), planes=planes)


def _alike(tree: Any, devices: int) -> Any:
    """What every slab has alike, on the devices."""
    return jax.tree.map(jnp.asarray, sharding.repeated(tree, devices))


def image_seen(problem: Problem) -> jax.Array:
    """Which pixels of the images there are: (tilt, 1, x), 0 for padded tilts and planes."""
    return problem.image_rays.weight[:, None, None] * sharding.present(problem.planes, problem.images.shape[-1])


def map_seen(problem: Problem) -> jax.Array:
    """The same for the maps, (tilt, 1, x); held-out tilts are 0 as well."""
    return problem.map_rays.weight[:, None, None] * sharding.present(problem.planes, problem.maps.shape[-1])


def chemistry(problem: Problem, x: jax.Array, counts: bool) -> Chemistry:
    """The chemical term (F3 Eq. 1, second sum, and Eq. 3) of concentrations x, not yet weighted by lambda_chem."""
    value, slope, signal = misfit(problem, x, counts)
    return Chemistry(value, backproject_maps(problem, slope), signal)


def chemistry_value(problem: Problem, x: jax.Array, counts: bool) -> jax.Array:
    """The value of the chemical term alone, without its back projection."""
    return misfit(problem, x, counts).value


def misfit(problem: Problem, x: jax.Array, counts: bool) -> Chemistry:
    """The chemical term before its back projection: slope with respect to the modelled maps, (element, tilt, y, x)."""
    signal = problem.sensitivity * project(x, problem.map_rays, problem.maps.shape[-2])
    return Chemistry(*likelihood(problem, signal + problem.background, counts), signal)


def likelihood(problem: Problem, expected: jax.Array, counts: bool) -> tuple[jax.Array, jax.Array]:
    """Value and slope of the chemical term where the maps are expected to be so; held-out tilts have none."""
    weight = map_seen(problem) * problem.map_weight
    value, slope = (poisson if counts else least_squares)(expected, problem.maps, weight)
    return sharding.total(value), slope


def backproject_maps(problem: Problem, maps: jax.Array) -> jax.Array:
    """(s A_c)' of (element, tilt, y, x): (element, z, y, x)."""
    return backproject(problem.sensitivity * maps, problem.map_rays, *problem.start.shape[1:3])


def backproject_twice(problem: Problem, maps: jax.Array) -> jax.Array:
    """s^2 A_c' of (element, tilt, y, x): (element, z, y, x)."""
    squared, shape = problem.sensitivity**2, problem.start.shape[1:3]
    if squared.shape[1] == 1:  # less to read where it is one number
        return squared * backproject(maps, problem.map_rays, *shape)
    return backproject(squared * maps, problem.map_rays, *shape)


def relative(sensitivity: jax.Array) -> jax.Array:
    """What of its brightest tilt the detector saw at each: (element, tilt, 1, 1); 1 where it saw the same at all."""
    if sensitivity.shape[1] == 1:
        return jnp.ones((1, 1, 1, 1))
    return sensitivity / sensitivity.max(1, keepdims=True)


def cost_terms(problem: Problem, x: jax.Array, projected: jax.Array | None, chem: jax.Array,
               gain: jax.Array) -> jax.Array:
    """The three terms of F3 Eq. 1 at weight 1, and their weighted sum: (4,).

    projected: A_h sum c x^gamma; None leaves the HAADF term out.
    """
    model_term = jnp.float32(0)
    if projected is not None:
        misfit = sharding.total((image_seen(problem) * (projected - problem.images / gain) ** 2).sum()) / 2
        model_term = misfit * (gain / problem.image_noise) ** 2
    tv = (total_variation(x, problem.planes) if problem.guide is None else
          guide.total_variation(x, problem.guide)).sum()
    total = problem.lambda_model * model_term + problem.lambda_chem * chem + problem.lambda_tv * tv
    return jnp.stack([model_term, chem, tv, total])


def map_precision(problem: Problem, expected: jax.Array, counts: bool) -> jax.Array:
    """Curvature of the chemical term per pixel of the maps, (element, tilt, y, x)."""
    if not counts:
        return problem.map_weight * jnp.ones_like(problem.maps)
    # Without a background the expected counts of vacuum, and so the step there, would be nothing.
    seen = map_seen(problem)
    count = sharding.total(seen.sum()) * expected.shape[-2]
    mean = sharding.total((seen * expected).sum((1, 2, 3), keepdims=True)) / jnp.maximum(count, 1)
    return poisson_curvature(expected + 0.1 * mean)


def chemical_curvature(problem: Problem, signal: jax.Array, counts: bool) -> jax.Array:
    """A diagonal bound of the chemical term's expected Hessian, s^2 A'(w A 1), where the maps' signal is `signal`."""
    x = problem.start
    path = map_seen(problem) * project(jnp.ones_like(x[:1]), problem.map_rays, problem.maps.shape[-2])
    weight = map_precision(problem, signal + problem.background, counts)
    bound = backproject_twice(problem, weight * path)
    # Voxels that few rays cross would take steps without limit.
    return jnp.maximum(bound, 1e-2 * sharding.largest(bound.max((1, 2, 3), keepdims=True)))


def scattering(problem: Problem, x: jax.Array) -> jax.Array:
    """sum_i c_i x_i^gamma per voxel, (z, y, x); x > 0."""
    return coupling.scattering(x, problem.contrast, problem.gamma)


def scattering_slope(problem: Problem, x: jax.Array) -> jax.Array:
    """Its derivative with respect to x_i: gamma c_i x_i^(gamma - 1), (element, z, y, x)."""
    return coupling.scattering_slope(x, problem.contrast, problem.gamma)


def project_images(problem: Problem, scatter: jax.Array) -> jax.Array:
    """A_h of a (z, y, x) volume: (tilt, y, x)."""
    return project(scatter, problem.image_rays, problem.images.shape[-2])


def backproject_images(problem: Problem, residual: jax.Array) -> jax.Array:
    """A_h' of (tilt, y, x): (z, y, x)."""
    return backproject(residual, problem.image_rays, *problem.start.shape[1:3])


def image_precision(problem: Problem, gain: jax.Array) -> jax.Array:
    """lambda_model / variance of an image pixel, for images divided by the gain."""
    return problem.lambda_model * (gain / problem.image_noise) ** 2


def fit_gain(problem: Problem, projected: jax.Array, signal: jax.Array) -> jax.Array:
    """The HAADF gain for which concentrations keep the scale that the maps give them.

    Least squares alone would fit the gain to a volume whose scale the images have just set, and stall. So the maps say
    by which factor a the volume should be scaled (weighted least squares, one Newton step of the likelihood), and the
    gain is the one that suits a x: <b, P> / <P, P> / a^gamma.
    """
    expected = signal + problem.background
    expected += 1e-3 * sharding.largest(expected.max((1, 2, 3), keepdims=True))  # in the maps' own unit
    weight = problem.map_weight * map_seen(problem) / expected
    wanted, seen = problem.maps - problem.background, image_seen(problem)
    sums = sharding.total(jnp.stack([(weight * signal * wanted).sum(), (weight * signal**2).sum(),
                                     (seen * projected * problem.images).sum(), (seen * projected**2).sum()]))
    factor, gain = sums[0] / jnp.maximum(sums[1], 1e-20), sums[2] / jnp.maximum(sums[3], 1e-20)
    return gain / jnp.clip(factor, 0.1, 10.0) ** problem.gamma


@cache
def _starter(shape: tuple[int, int]) -> Callable:
    return partial(em_start, shape=shape)


@cache
def _scattered(pixels: int) -> Callable:
    return lambda start, rays, gamma: project(start**gamma, rays, pixels)


def em_start(maps: jax.Array, background: jax.Array, sensitivity: jax.Array, rays: Geometry, planes: jax.Array,
             shape: tuple[int, int], steps: int = START_STEPS) -> jax.Array:
    """Concentrations (element, z, y, x) after a few EM steps of the Poisson likelihood from a flat start."""
    counts = jnp.maximum(maps, 0)
    exist = rays.weight[:, None, None] * sharding.present(planes, maps.shape[-1])
    ones = jnp.ones((1, *counts.shape[1:])) * exist
    seen = backproject(relative(sensitivity) * ones, rays, *shape)
    mean = sharding.total(((counts - background) * ones).sum((1, 2, 3), keepdims=True)) / (
        sensitivity.max(1, keepdims=True) * sharding.total(seen.sum((1, 2, 3), keepdims=True)))
    x = jnp.ones((maps.shape[0], *shape, maps.shape[-1])) * jnp.maximum(mean, 1e-6)
    seen = jnp.maximum(seen, 1e-3)
    return jax.lax.fori_loop(0, steps, lambda _, x: em_step(counts, background, sensitivity, rays, seen, x), x)


def em_step(counts: jax.Array, background: jax.Array, sensitivity: jax.Array, rays: Geometry, seen: jax.Array,
            x: jax.Array) -> jax.Array:
    """x A'(r b / (s A x + background)) / seen, seen = A' r, r = `relative(s)`: expectation maximisation (L. Shepp, Y.
    Vardi, 1982)."""
    expected = sensitivity * project(x, rays, counts.shape[-2]) + background
    return x * backproject(relative(sensitivity) * (counts / (expected + 1e-6)), rays, *x.shape[1:3]) / seen


def seen(problem: Problem) -> jax.Array:
    """A' r of the maps: how much each voxel is seen, (1 or element, z, y, x)."""
    nz, ny = problem.start.shape[1:3]
    ones = relative(problem.sensitivity) * jnp.ones_like(problem.maps[:1])
    return backproject(ones, problem.map_rays, nz, ny)


def fit_contrast(images: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """(element,) non-negative c_i with sum_i c_i parts_i ~ images, floored at 1e-3 of the largest.

    parts: A_h x_i^gamma, (element, tilt, y, x).
    """
    from scipy.optimize import nnls

    parts = np.asarray(parts, np.float64).reshape(len(parts), -1)
    gram, right = parts @ parts.T, parts @ np.asarray(images, np.float64).ravel()
    root = np.linalg.cholesky(gram + 1e-9 * np.trace(gram) * np.eye(len(gram)))
    contrast, _ = nnls(root.T, np.linalg.solve(root, right))
    return np.maximum(contrast, 1e-3 * max(contrast.max(), 1e-30))


def image_variance(data: MultiModal) -> float | None:
    """Where the image is counts: the variance of a pixel per unit of the solver's image, which is divided by its level.

    None where the noise is the same everywhere.
    """
    if data.haadf is None or data.haadf.units != "counts":
        return None
    image = data.haadf.projections[0] - np.broadcast_to(data.haadf.background, data.haadf.projections.shape)[0]
    return float(1 / np.sqrt(np.mean(image.astype(np.float64) ** 2)))


def _images(haadf, detector: tuple[int, int]) -> tuple[np.ndarray, float, Geometry]:
    if haadf is None:
        return np.zeros((0, *detector), np.float32), 1.0, geometry(np.zeros(0), 0)
    size = bucket(haadf.tilts)
    images = np.asarray(haadf.projections[0] - np.broadcast_to(haadf.background, haadf.projections.shape)[0])
    level = float(np.sqrt(np.mean(images.astype(np.float64) ** 2)))
    return (_pad_tilts(images[None] / level, size)[0], float(haadf.noise_level()[0] / level),
            geometry(haadf.angles, size))


def _pad_tilts(stack: np.ndarray, size: int) -> np.ndarray:
    return np.pad(stack, ((0, 0), (0, size - stack.shape[1]), (0, 0), (0, 0))).astype(np.float32)


def _column(elements: int, values) -> np.ndarray:
    return np.broadcast_to(np.asarray(values, np.float32), (elements,))[:, None, None, None]


def _peak(x: np.ndarray) -> np.ndarray:
    """(element, 1, 1, 1) mean of the brightest percent of voxels."""
    flat = x.reshape(len(x), -1)
    count = max(1, flat.shape[1] // 100)
    return np.partition(flat, -count, axis=1)[:, -count:].mean(1, dtype=np.float64)[:, None, None, None]
