"""HAADF-EDS bimodal tomography (HEBT): every element's map from its X-rays and the HAADF images together, by SIRT.

    minimise over x >= 0    sum_i |(1 - alpha) (r_i b_i - W x_i)|^2 + |alpha (b_H - W sum_i x_i)|^2          (Eq. 17)

b_i are X-ray counts less their known background, r_i the response ratios that make HAADF of them (`engine.responses`),
x_i = X^b the HAADF of element i per voxel. SIRT has no minimum to arrive at that is wanted: after n iterations noise
begins to dominate, and n is as much a setting as alpha. `eds` is the same of the maps alone (Eq. 11), `haadf` of the
images alone, for reference. Fractions of weight come from `engine.quantify`.

What is returned is X^b / r in counts per voxel, or, where the sensitivities are known, in concentrations, so that the
volumes of all methods and systems are in one unit; `scattering` gives X^b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from engine import responses, sharding, sirt
from engine.data import DataError, MultiModal, Solution, TiltSeries
from engine.iterate import Keep, outcomes, solve
from engine.projector import Geometry, geometry
from engine.responses import Responses, smoothed
from engine.sirt import TERMS, Kind, Problem
from engine.sizes import bucket

BATCHED = ("alpha", "relaxation", "differences")  # what settings of one batch may differ in
# What the shares of the elements are taken from: few counts must not decide where an element is. 8 iterations of the
# maps alone, smoothed by 1.5 pixels: its mistakes are corrected by the maps themselves, at the rate of the differences.
GUIDE_ITERATIONS, GUIDE_SMOOTHING = 8, 1.5
GUIDE_FLOOR = 1e-3  # of the brightest voxel: below it, shares are those of the whole specimen
_AXES = Problem._make(0 if name in BATCHED else None for name in Problem._fields)


@dataclass(frozen=True)
class Settings:
    """Numbers of one solve.

    alpha: the weight of HAADF, from 0 (the maps alone) to 1. scaling says of what: of the `row`s as SIRT scales them,
    where maps and images weigh (1 - alpha) : alpha / k for k elements, or of the `plain` rows of Eq. 17 in least
    squares, (1 - alpha)^2 : alpha^2. The paper's best alpha of 0.8 in the one is 0.59 in the other, for two elements.
    form: `paper` is SIRT of the stacked system. `preconditioned` (`engine.sirt`) gives what HAADF says to the elements
    that are there, lets their differences, which HAADF does not see, go at their own rate, and has momentum.
    differences: that rate, of the sum's; in the paper's form it is 1 - alpha. More needs fewer iterations, but the
    sum, that is the shape, has then less time. 0.3 with alpha 0.8 and n = 20 is better than the paper's n = 200 at its
    counts (SSIM .982 / .981 against .978 / .980); with ten times fewer counts take n = 10, with ten times more 40.
    prefilter: [pixels] sigma of a Gaussian over the maps, along y and x. responses: by element, HAADF per count;
    empty: by regression. tilts: whether maps are brought to one brightness over the tilts, since the holder hides the
    detector at some, and how (`responses.tilt_factors`); the factors are a field of the solution, and what a solution
    predicts of a map is to be divided by them. relaxation: of SIRT's steps, below 2. positive: keeps x >= 0.
    """

    method: Literal["hebt", "eds", "haadf"] = "hebt"
    form: Literal["paper", "preconditioned"] = "preconditioned"
    differences: float = 0.3
    scaling: Literal["row", "plain"] = "row"
    alpha: float = 0.8
    iterations: int = 20
    prefilter: float = 0.8
    responses: tuple[float, ...] | list[float] = ()
    tilts: Literal["as_measured", "equal", "haadf"] = "as_measured"
    relaxation: float = 1.0
    positive: bool = True
    devices: int = 1


@dataclass(frozen=True)
class _Prepared:
    """A problem on the device, what it is compiled for, and (element, 1, 1, 1) what its volume is multiplied by."""

    problem: Problem
    kind: Kind
    unit: np.ndarray
    responses: Responses | None


def reconstruct(data: MultiModal, settings: Settings, *, checkpoints: Sequence[int] = (),
                observe: Callable[[int, np.ndarray], None] | None = None, held_out: tuple[int, ...] = (),
                candidates: TiltSeries | None = None, keep: Keep | None = None) -> Solution:
    """Concentrations (element, z, y, x) from maps and HAADF images; of `haadf` (1, z, y, x), HAADF per voxel.

    observe(iteration, volume) is called at each checkpoint: a sweep over n is one solve. held_out: chemical tilts that
    are not fitted. candidates: maps of elements that may be missing, at the same angles. keep: where a long solve
    leaves its state. Warns (DataWarning) where HAADF is not a sum of the maps. Raises DataError for what cannot be.
    """
    watch = None if observe is None else lambda _, n, volume: observe(n, volume)
    return reconstruct_batch(data, [settings], checkpoints=checkpoints, observe=watch, held_out=held_out,
                             candidates=candidates, keep=keep)[0]


def reconstruct_batch(data: MultiModal, settings: Sequence[Settings], *, checkpoints: Sequence[int] = (),
                      observe: Callable[[int, int, np.ndarray], None] | None = None, held_out: tuple[int, ...] = (),
                      candidates: TiltSeries | None = None, keep: Keep | None = None) -> list[Solution]:
    """`reconstruct` for several settings at once, which may differ in BATCHED. observe(which, iteration, volume)."""
    first, many = settings[0], len(settings) > 1
    if any(replace(each, **{name: getattr(first, name) for name in BATCHED}) != first for each in settings):
        raise ValueError(f"settings of one batch may differ in {', '.join(BATCHED)} alone")
    for each in settings:
        _check(data, each)
    slabs, factors = first.devices, responses.tilt_factors(data, first.tilts)
    if first.tilts != "as_measured":
        data, candidates = responses.scaled(data, factors), candidates and responses.scaled_maps(candidates, factors)
    ready = _prepare(data, first, held_out, candidates)
    numbers: dict[str, Any] = {name: jnp.asarray([getattr(each, name) for each in settings], jnp.float32)
                               for name in BATCHED}
    numbers = {name: value if many else value[0] for name, value in numbers.items()}
    problem = ready.problem._replace(**sharding.repeated(numbers, slabs))
    begin, advance = sirt.solver(ready.kind)
    axes = _AXES if many else None
    begun = sharding.spread(_batched(begin, axes), slabs)(problem)

    def volume(x: jax.Array) -> np.ndarray:
        return sharding.join(x, slabs, data.shape[2]) * ready.unit

    observed = None
    if observe is not None:
        def observed(n: int, state: sirt.State) -> None:
            for k in range(len(settings)):
                observe(k, n, volume(state.x if not many else state.x[:, k] if slabs > 1 else state.x[k]))

    run = solve(advance, problem, begun, first.iterations, devices=slabs, axes=axes, checkpoints=checkpoints,
                observe=observed, keep=keep)
    found, fields = _metrics(data, ready), {"tilt_factors": factors} if first.tilts != "as_measured" else {}
    return [_solution(outcome, volume(outcome.state.x), found, fields) for outcome in outcomes(run, slabs)]


def scattering(solution: Solution, elements: Sequence[str]) -> np.ndarray:
    """X^b of Eq. 17, the HAADF of each element per voxel, from a solution of `hebt`: what Eq. 18 divides by z."""
    unit = [solution.metrics[f"response_{e}"] * solution.metrics[f"sensitivity_{e}"] for e in elements]
    return solution.volume * np.asarray(unit, np.float32)[:, None, None, None]


def _check(data: MultiModal, settings: Settings) -> None:
    here = jax.local_device_count()
    if settings.method != "eds" and data.haadf is None:
        raise DataError(f"method {settings.method} needs HAADF images; without them use method: eds")
    if not 0 <= settings.alpha <= 1:
        raise DataError(f"alpha is {settings.alpha:g}; it is a share of HAADF, from 0 to 1")
    if not 0 < settings.relaxation < 2:
        raise DataError(f"the relaxation is {settings.relaxation:g}; SIRT needs one above 0 and below 2")
    if not 0 < settings.differences <= 1:
        raise DataError(f"the rate of the differences is {settings.differences:g}; it is above 0 and at most 1")
    if settings.responses and (len(settings.responses) != len(data.chem.elements)
                               or not min(settings.responses) > 0):
        raise DataError(f"{len(settings.responses)} response ratios for {len(data.chem.elements)} elements; give one "
                        "positive number for each, or none, and they are found by regression")
    if settings.devices > here:
        raise DataError(f"solver.devices is {settings.devices}, and JAX sees {here} here: lower it; on a CPU, set "
                        f"XLA_FLAGS=--xla_force_host_platform_device_count={settings.devices} before JAX starts")


def _prepare(data: MultiModal, settings: Settings, held_out: tuple[int, ...],
             candidates: TiltSeries | None) -> _Prepared:
    """The problem in units in which the data are about 1: of HAADF for both kinds together, else of each map."""
    chem, bimodal = data.chem, settings.method == "hebt"
    if settings.method == "haadf":
        assert data.haadf is not None
        chem, held_out = data.haadf, ()
    maps = smoothed(_net(chem), 0 if settings.method == "haadf" else settings.prefilter)
    scale, images, found = np.array([_level(each) for each in maps]), np.zeros((0, *maps.shape[2:])), None
    angles, count = np.zeros(0), len(chem.elements)
    if bimodal:
        assert data.haadf is not None
        images, angles = _net(data.haadf)[0], data.haadf.angles
        found = _responses(data, settings, held_out, candidates)
        scale = _level(images) / found.values
        images = images / _level(images)
    sensitivity = np.ones(count) if settings.method == "haadf" or data.sensitivity is None else data.sensitivity
    shared = bimodal and not held_out and np.array_equal(angles, chem.angles)
    kind = Kind(bimodal, shared, settings.scaling == "plain", settings.form == "preconditioned", settings.positive)
    problem = _on_device(data.shape, maps / _column(scale), chem.angles, held_out, images, angles, settings.devices)
    if found is not None and kind.preconditioned:
        shares = _shares(data, settings, held_out, found)
        problem = problem._replace(shares=jnp.asarray(sharding.split(shares, settings.devices)))
    return _Prepared(problem, kind, _column(scale / sensitivity), found)


def _shares(data: MultiModal, settings: Settings, held_out: tuple[int, ...], found: Responses) -> np.ndarray:
    """(element, z, y, x) of HAADF that each element has, as the maps alone tell it; they add up to 1."""
    given = Settings("eds", "paper", iterations=GUIDE_ITERATIONS, devices=settings.devices,
                     prefilter=max(settings.prefilter, GUIDE_SMOOTHING))
    counts = reconstruct(replace(data, sensitivity=None), given, held_out=held_out).volume
    bright = counts * _column(found.values)
    everywhere = bright.sum((1, 2, 3), dtype=np.float64)
    bright += GUIDE_FLOOR * bright.sum(0).max() * _column(everywhere / everywhere.sum())
    shares: np.ndarray = bright / bright.sum(0)
    return shares


def _on_device(shape: tuple[int, int, int], maps: np.ndarray, map_angles: np.ndarray, held_out: tuple[int, ...],
               images: np.ndarray, image_angles: np.ndarray, slabs: int) -> Problem:
    """Both stacks padded to a few numbers of tilts and cut into slabs; what is in BATCHED is filled in later."""
    def on_device(tree: Any) -> Any:
        return jax.tree.map(jnp.asarray, sharding.repeated(tree, slabs))

    def kind(stack: np.ndarray, angles: np.ndarray, out: tuple[int, ...]) -> tuple[jax.Array, Geometry, sirt.Scale]:
        rays = geometry(angles, bucket(len(angles)) if len(angles) else 0)
        padding = [(0, 0)] * (stack.ndim - 3) + [(0, len(rays.angles) - len(angles)), (0, 0), (0, 0)]
        weight = np.asarray(rays.weight).copy()
        weight[list(out)] = 0
        rays = Geometry(rays.angles, jnp.asarray(weight))
        filled = jnp.asarray(sharding.split(np.pad(stack, padding).astype(np.float32), slabs))
        return filled, on_device(rays), on_device(sirt.scale(rays, shape[:2], stack.shape[-2]))

    images_on, image_rays, image_scale = kind(images, image_angles, ())
    maps_on, map_rays, map_scale = kind(maps, map_angles, held_out)
    one = jnp.float32(1)
    return Problem(images_on, maps_on, image_rays, map_rays, image_scale, map_scale, one, one, one, on_device(one))


def _responses(data: MultiModal, settings: Settings, held_out: tuple[int, ...],
               candidates: TiltSeries | None) -> Responses:
    """By regression; where the settings have them, only their R^2 is looked at."""
    given = np.asarray(settings.responses, float) if settings.responses else None
    if given is not None and not responses.common(data, held_out)[0].size:
        return Responses(given, np.nan, np.nan, {})
    found = responses.fit(data, prefilter=settings.prefilter, without=held_out, candidates=candidates, values=given)
    responses.warn(found, data.chem.elements, given is not None, stacklevel=5)
    return found


def _metrics(data: MultiModal, ready: _Prepared) -> dict[str, Any]:
    """What a report tells beside the volume: sensitivities, and of both kinds together the ratios and R^2."""
    names, found = data.chem.elements, ready.responses
    sensitivity = np.ones(len(names)) if data.sensitivity is None else data.sensitivity
    metrics = {f"sensitivity_{name}": float(value) for name, value in zip(names, sensitivity)}
    if found is not None:
        metrics |= {f"response_{name}": float(value) for name, value in zip(names, found.values)}
        if np.isfinite(found.r_squared):
            metrics |= {"r_squared": found.r_squared, "r_squared_smooth": found.r_squared_smooth}
    return metrics


def _solution(outcome: Any, volume: np.ndarray, metrics: dict[str, Any], fields: dict[str, np.ndarray]) -> Solution:
    history = {name: outcome.history[:, k] for k, name in enumerate(TERMS)}
    return Solution(volume, history, outcome.status, outcome.ok and bool(np.isfinite(volume).all()),
                    {"iterations": outcome.iterations, "cost": float(history["total"][-1])} | metrics, fields)


@cache
def _batched(begin: Callable, axes: Problem | None) -> Callable:
    """A solver's start for one problem or for several; the same object each time."""
    return begin if axes is None else jax.vmap(begin, in_axes=(axes,))


def _net(series: TiltSeries) -> np.ndarray:
    """Without the known background."""
    return series.projections - np.broadcast_to(series.background, series.projections.shape)


def _level(stack: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.asarray(stack, np.float64) ** 2))) or 1.0


def _column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None, None]
