"""Fused multi-modal tomography (F3): chemistry in 3D from many HAADF images and few chemical maps.

    minimise over x >= 0   lambda_model / 2 |A_h sum_i c_i x_i^gamma - b_H|^2 / sigma^2
                         + lambda_chem sum_i KL(b_i, s_i A_c x_i + background_i) + lambda_tv sum_i TV(x_i)      (Eq. 1)

HAADF is precise: its natural weight is far above what gradient descent digests in a hundred steps. `fused` therefore
splits both data terms off into dual variables, p for the images and q for the maps, and steps them in the metric of the
ramp filter, which undoes the 1/|k| of A' A:

    p <- the dual step of lambda_model |. - b_H|^2 / 2 in the metric rho R,           R = ramp / norm(A' ramp A)
    q <- the same for lambda_chem KL, linearised, in c W^1/2 R W^1/2,                 W = its curvature per pixel
    x <- argmin of <S' A_h' p + s A_c' q, x> + lambda_tv TV(x) + |x - x before|^2 / 2 in the metric H + rho S' S''

HAADF sees one combination of the elements per voxel, S'; the exact rank-one block leaves all others free to move, where
its diagonal bound would hold them back as well. Both parts grow with the iterations, so that the split settles.
A solve starts from the volume and the duals of one at half the resolution (`engine.pyramid`), which does the same.
`plain` is the paper's own algorithm; `fista`, `chem_tv`, `ml` and `sirt` are what it is compared with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import coupling, descent, model, pyramid, responses, sharding, uncertainty3d
from engine.data import DataError, MultiModal, Solution
from engine.iterate import Keep, Outcome, outcomes, settled, solve
from engine.model import GAIN_STEPS, Problem
from engine.penalties import Dual, tv_dual, zero_dual
from engine.projector import Geometry, backproject, geometry, project
from engine.sizes import bucket, halvings

Method = Literal["fused", "chem_tv", "ml", "sirt", "plain", "fista"]
TERMS = ("model", "chem", "tv", "total")

# rho: a share of the ratio of the two terms' curvatures, but never more than lets the images' dual step by a small part
# of its own curvature at the highest frequency. At natural weights the first binds at F3's doses, the second from ten
# times them on. After coarse solves a CAP of .03, .1 and .3 gave .127, .123 and .137 after 20 iterations (64^3, ten
# times the dose), and from a cold start .03 was the best; the ratio itself fails at an SNR of 1e4.
RHO, CAP = 1.0, 0.1
SHARE = 0.25  # of the maps' curvature bound that their metric takes; 0.35 measured alike, 0.5 and 1 are slower
GROWTH, GROWN = 0.1, 6.0  # both metrics grow by this share of its first value per iteration, up to so many
WARM = 15  # iterations by which the metrics have grown where a coarser solve came before; 5 and 10 were slower
MEMORY = 0.3  # weight of an iteration in the mean change that ends a solve
RETREAT = 4.0  # a cost this many times the best one is a step that went wrong
TRUST = 0.95  # by which caution fades in each iteration


@dataclass(frozen=True)
class Settings:
    """Numbers of one solve; see the YAML's `solver` for units and meaning. `inner`: TV steps per iteration.

    tilts: whether the maps' brightness is taken to differ between the tilts, since the holder hides the detector at
    some, and how it is found (`responses.tilt_factors`); the factors are then a field of the solution.
    errors: the standard error of every voxel (`engine.uncertainty3d`), from so many random probes; ML and SIRT, which
    stop short of a minimum, have none.
    """

    method: Method = "fused"
    weights: Literal["z_gamma", "z"] = "z_gamma"
    gamma: float = 1.6
    iterations: int = 60
    inner: int = 4
    lambda_model: float = 1.0
    lambda_chem: float = 1.0
    lambda_tv: float = 0.1
    tolerance: float = 1e-3
    coarse: int = 20
    dual_bits: Literal[32, 16] = 32
    devices: int = 1
    errors: Literal["sandwich", "none"] = "none"
    error_probes: int = 16
    tilts: Literal["as_measured", "equal", "haadf"] = "as_measured"


class Metric(NamedTuple):
    """What a solve measures its steps in: H of the volume, R of the images' dual and c R of the maps', by frequency."""

    volume: jax.Array  # (element, z, y, x)
    images: jax.Array  # (y + 1,)
    maps: jax.Array  # (y + 1,)
    rho: jax.Array


class State(NamedTuple):
    """Between two iterations: x and its projections, the duals, the best so far, and how cautious steps have to be."""

    x: jax.Array
    projected: jax.Array  # A_h S(x), and of the x before
    projected_before: jax.Array
    signal: jax.Array  # s A_c x, and of the x before
    signal_before: jax.Array
    image_dual: jax.Array
    map_dual: jax.Array
    tv_dual: Dual
    gain: jax.Array
    age: jax.Array  # iterations by which the metrics have grown
    caution: jax.Array  # factor of the volume's metric; doubled when a step went wrong
    cost: jax.Array
    drift: jax.Array  # the mean relative change of the last costs
    retreat: jax.Array  # whether the last step went wrong, so that the next goes back to the best volume
    best: jax.Array
    best_projected: jax.Array
    best_cost: jax.Array
    metric: Metric


def reconstruct(data: MultiModal, settings: Settings, *, checkpoints: Sequence[int] = (),
                observe: Callable[[int, np.ndarray], None] | None = None,
                held_out: tuple[int, ...] = (), keep: Keep | None = None) -> Solution:
    """Concentrations (element, z, y, x) from a HAADF series and chemical maps.

    observe(iteration, volume) is called at each checkpoint. held_out: chemical tilts that are not fitted. keep: where
    a long solve leaves its state, to be taken up again.
    Raises DataError where the method needs HAADF images and there are none. A solve that fails returns ok = False
    and the best volume it had.
    """
    watch = None if observe is None else lambda _, n, volume: observe(n, volume)
    return reconstruct_batch(data, [settings], checkpoints=checkpoints, observe=watch, held_out=held_out, keep=keep)[0]


def reconstruct_batch(data: MultiModal, settings: Sequence[Settings], *, checkpoints: Sequence[int] = (),
                      observe: Callable[[int, int, np.ndarray], None] | None = None,
                      held_out: tuple[int, ...] = (), keep: Keep | None = None) -> list[Solution]:
    """`reconstruct` for several settings at once, which may differ in the lambdas and in gamma.

    One program solves them all, which fills a GPU where a single small volume does not. observe(which, iteration,
    volume). Raises ValueError for settings that differ in anything else.
    """
    first = settings[0]
    if any(replace(each, **{name: getattr(first, name) for name in BATCHED}) != first for each in settings):
        raise ValueError(f"settings of one batch may differ in {', '.join(BATCHED)} alone")
    if first.method in ("fused", "plain", "fista") and data.haadf is None:
        raise DataError(f"method {first.method} needs HAADF images; without them use chem_tv, ml or sirt")
    factors = _factors(data, first.tilts)
    slabs, counts = _slabs(first.devices, data.shape[2]), data.chem.units == "counts"
    problems = [model.build(data, gamma=each.gamma, lambda_model=each.lambda_model, lambda_chem=each.lambda_chem,
                            lambda_tv=each.lambda_tv, weights=each.weights, inner=each.inner, held_out=held_out,
                            devices=slabs, factors=factors) for each in settings]
    problem, axes = (problems[0], None) if len(problems) == 1 else (_stacked(problems, int(slabs > 1)), _AXES)
    fused: tuple[Callable, Callable, Callable] = (starter(counts, first.dual_bits), _STEP[counts], best_volume)
    begin, advance, extract = fused if first.method == "fused" else descent.solver(first.method, counts)
    observed = None
    if observe is not None:
        def observed(n: int, state: Any) -> None:
            for k in range(len(settings)):
                observe(k, n, sharding.join(extract(_member(state, k, axes, slabs)), slabs, data.shape[2]))

    # The short steps of the others are no sign that they have arrived.
    tolerance = first.tolerance if first.method == "fused" else 0.0
    if first.method == "fused" and first.coarse > 0:
        begun = _coarse_to_fine(problem, first, counts, halvings(*data.shape[:2]), slabs, axes)
    else:
        begun = sharding.spread(_batched(begin, axes), slabs)(problem)
    run = solve(advance, problem, begun, first.iterations, devices=slabs, axes=axes, tolerance=tolerance,
                checkpoints=checkpoints, observe=observed, keep=keep)
    fields = {} if factors is None else {"tilt_factors": factors}
    first_tilt = 1.0 if factors is None else factors[:, 0]
    sensitivity = np.asarray(sharding.one(problem.sensitivity, slabs))[:, 0].ravel() * first_tilt
    fitted = {f"sensitivity_{e}": float(s) for e, s in zip(data.chem.elements, sensitivity)}
    solutions = [replace(_solution(outcome, sharding.join(extract(outcome.state), slabs, data.shape[2]), fitted, slabs),
                         fields=fields) for outcome in outcomes(run, slabs, tolerance)]
    del run, begun  # their memory
    if first.errors == "none" or first.method in ("ml", "sirt"):
        return solutions
    return [_with_errors(*each, first, data, slabs) if each[0].ok else each[0] for each in zip(solutions, problems)]


_kept: deque[tuple[MultiModal, str, np.ndarray]] = deque(maxlen=6)


def _factors(data: MultiModal, how: str) -> np.ndarray | None:
    """`responses.tilt_factors`; the same object each time, by which `model.build` knows what is on the devices."""
    if how == "as_measured":
        return None
    for known, asked, factors in _kept:
        if known is data and asked == how:
            return factors
    _kept.append((data, how, responses.tilt_factors(data, how)))
    return _kept[-1][2]


def _with_errors(solution: Solution, problem: Problem, settings: Settings, data: MultiModal, slabs: int) -> Solution:
    """The solution with its standard errors. Images that the method has not seen make nothing more certain."""
    if settings.method == "chem_tv":
        problem = problem._replace(images=problem.images[..., :0, :, :])
    fields, averages = uncertainty3d.errors(
        problem, solution.volume, solution.metrics["gain"], data.chem.units == "counts", model.image_variance(data),
        settings.error_probes, slabs)
    return replace(solution, fields=solution.fields | fields, metrics=solution.metrics | averages)


def _coarse_to_fine(problem: Problem, settings: Settings, counts: bool, levels: int, slabs: int,
                    axes: Problem | None) -> tuple[State, jax.Array]:
    """The state that a solve of the problem starts from, after a solve at each of so many coarser sizes."""
    problems = [problem]
    for _ in range(levels):
        problems.append(sharding.spread(_coarsening(counts, axes), slabs)(problems[-1]))
    begun = sharding.spread(_batched(starter(counts, settings.dual_bits), axes), slabs)(problems[-1])
    for coarse, finer in zip(reversed(problems), reversed(problems[:-1])):
        state = solve(_STEP[counts], coarse, begun, settings.coarse, devices=slabs, axes=axes).state
        begun = sharding.spread(_refining(counts, axes), slabs)(finer, state)
    return begun


@cache
def _coarsening(counts: bool, axes: Problem | None) -> Callable:
    coarser = partial(pyramid.coarser, counts=counts)
    return coarser if axes is None else jax.vmap(coarser, in_axes=(axes,), out_axes=axes)


@cache
def _refining(counts: bool, axes: Problem | None) -> Callable:
    finer = partial(refined, counts=counts)
    return finer if axes is None else jax.vmap(finer, in_axes=(axes, 0))


def _solution(outcome: Outcome, volume: np.ndarray, fitted: dict[str, float], slabs: int) -> Solution:
    metrics = {"iterations": outcome.iterations, "gain": float(sharding.one(outcome.state.gain, slabs)), **fitted}
    if isinstance(outcome.state, State):
        # The volume is the one of least cost, not always the last: this is its own.
        cost, caution = sharding.one((outcome.state.best_cost, outcome.state.caution), slabs)
        metrics |= {"cost": float(cost), "caution": float(caution)}
    history = {name: outcome.history[:, k] for k, name in enumerate(TERMS)}
    return Solution(volume, history, outcome.status, outcome.ok and bool(np.isfinite(volume).all()), metrics)


BATCHED = ("gamma", "lambda_model", "lambda_chem", "lambda_tv")
_AXES = Problem._make(0 if name in (*BATCHED, "contrast") else None for name in Problem._fields)


def _stacked(problems: Sequence[Problem], axis: int) -> Problem:
    """One problem with a leading axis (behind that of slabs) in the fields that differ."""
    fields: dict[str, Any] = {name: jnp.stack([getattr(problem, name) for problem in problems], axis)
                              for name, batched in _AXES._asdict().items() if batched is not None}
    return problems[0]._replace(**fields)


@cache
def _batched(begin: Callable, axes: Problem | None) -> Callable:
    """A solver's start for one problem or for several; the same object each time."""
    return begin if axes is None else jax.vmap(begin, in_axes=(axes,))


def _member(state: Any, k: int, axes: Problem | None, slabs: int) -> Any:
    """The state of solve k of a batch."""
    if axes is None:
        return state
    return jax.tree.map(lambda a: a[:, k] if slabs > 1 else a[k], state)


def _slabs(devices: int, planes: int) -> int:
    """How many slabs to make of a volume; DataError where there are not enough devices or planes."""
    here = jax.local_device_count()
    if devices > here:
        raise DataError(f"solver.devices is {devices}, and JAX sees {here} here: lower it; on a CPU, set XLA_FLAGS="
                        f"--xla_force_host_platform_device_count={devices} and NPROC=16 before JAX starts")
    if devices > 1 and planes < 2 * devices:
        raise DataError(f"solver.devices is {devices}, too many for {planes} planes along x: each needs two or more")
    return devices


def best_volume(state: State) -> jax.Array:
    """The volume of least cost; voxels on the floor are 0."""
    return jnp.where(state.best > model.FLOOR, state.best, 0.0)


def predict(data: MultiModal, volume: np.ndarray, sensitivity: np.ndarray) -> np.ndarray:
    """Expected maps (element, tilt, y, x), background included, at every chemical angle of `data`."""
    rays = geometry(data.chem.angles, bucket(data.chem.tilts))
    clean = np.asarray(project(jnp.asarray(volume), rays, data.chem.projections.shape[2]))
    return clean[:, :data.chem.tilts] * np.asarray(sensitivity)[:, None, None, None] + data.chem.background


@cache
def starter(counts: bool, bits: int = 32) -> Callable:
    """`start` for maps that are counts or not; the same object each time, so that it compiles once per shape."""
    return partial(start, counts=counts, bits=bits)


def start(problem: Problem, counts: bool, bits: int = 32) -> tuple[State, jax.Array]:
    """The state before the first iteration, with a TV dual of so many bits, and its cost."""
    x, none = problem.start, jnp.zeros_like(problem.images)
    value, slope, signal = model.misfit(problem, x, counts)
    projected = model.project_images(problem, model.scattering(problem, x))
    gain = model.fit_gain(problem, projected, signal)
    duals = (none, problem.lambda_chem * slope, zero_dual(x, bits))
    return _begun(problem, x, (projected, value, signal), gain, duals, 0, counts)


def refined(problem: Problem, coarse: State, counts: bool) -> tuple[State, jax.Array]:
    """The same after a solve of `pyramid.coarser(problem)`, whose last state is `coarse`."""
    x = pyramid.finer_volume(coarse.best, problem)
    value, _, signal = model.misfit(problem, x, counts)
    projected = model.project_images(problem, model.scattering(problem, x))
    duals = pyramid.finer_duals(coarse.image_dual, coarse.map_dual, coarse.tv_dual, problem, counts)
    # Its pixels' paths are half as long, in images that are as bright.
    return _begun(problem, x, (projected, value, signal), coarse.gain / 2, duals, WARM, counts)


def _begun(problem: Problem, x: jax.Array, seen: tuple[jax.Array, jax.Array, jax.Array], gain: jax.Array,
           duals: tuple[jax.Array, jax.Array, Dual], age: int, counts: bool) -> tuple[State, jax.Array]:
    projected, value, signal = seen
    terms = model.cost_terms(problem, x, projected, value, gain)
    state = State(x, projected, projected, signal, signal, *duals, gain, jnp.int32(age), jnp.float32(1),
                  terms[-1], jnp.float32(1), jnp.bool_(False), x, projected, terms[-1],
                  _metric(problem, x, signal, gain, counts))
    return settled(state), terms


def step(problem: Problem, state: State, _: jax.Array, *, counts: bool) -> tuple[State, jax.Array, jax.Array]:
    """One iteration of the ramp-metric primal-dual split; returns the state, its cost terms, the relative change."""
    x, metric = state.x, state.metric
    grown = jnp.minimum(1 + GROWTH * state.age, GROWN)
    rho = grown * metric.rho
    image_dual, map_dual = _image_step(problem, state, rho), _map_step(problem, state, counts)
    block = coupling.Block(
        x, model.backproject_images(problem, image_dual), model.backproject_maps(problem, map_dual), metric.volume,
        problem.contrast, problem.gamma, grown * state.caution, rho * state.caution, jnp.float32(model.FLOOR))
    target, rate = coupling.target(block, state.tv_dual)
    kept = jnp.where(state.retreat, 0.0, 1.0)
    # A retreat drops the duals: below no weight at all they are 0.
    dual = tv_dual(target, kept * problem.lambda_tv, rate, state.tv_dual, problem.inner, model.FLOOR, problem.planes)
    new, scatter = coupling.minimiser(block, dual)
    new, projected = jax.lax.cond(state.retreat, lambda: (state.best, state.best_projected),
                                  lambda: (new, model.project_images(problem, scatter)))
    value, _, signal = model.misfit(problem, new, counts)
    refit = state.age < GAIN_STEPS
    gain = jnp.where(refit, model.fit_gain(problem, projected, signal), state.gain)
    terms = model.cost_terms(problem, new, projected, value, gain)
    # A new gain is a new cost: while it is refitted the last volume counts as the best.
    improved = (terms[-1] <= state.best_cost) | (refit & jnp.isfinite(terms[-1]))
    best_cost = jnp.where(improved, terms[-1], state.best_cost)
    wrong = ~(terms[-1] < RETREAT * best_cost) & ~state.retreat
    # Steps that caution made short are no sign of convergence, and a retreat is none either.
    relative = state.caution * jnp.abs(terms[-1] - state.cost) / jnp.maximum(terms[-1], 1e-20)
    drift = jnp.where(state.retreat, 1.0, state.drift + MEMORY * (relative - state.drift))
    moved = State(
        x=new, projected=projected, projected_before=jnp.where(state.retreat, projected, state.projected),
        signal=signal, signal_before=jnp.where(state.retreat, signal, state.signal),
        image_dual=kept * image_dual, map_dual=map_dual, tv_dual=dual, gain=gain,
        age=state.age + 1, caution=jnp.where(wrong, 2 * state.caution, jnp.maximum(TRUST * state.caution, 1)),
        cost=terms[-1], drift=drift, retreat=wrong, best=jnp.where(improved, new, state.best),
        best_projected=jnp.where(improved, projected, state.best_projected), best_cost=best_cost, metric=metric)
    return moved, terms, moved.drift


_STEP = {counts: partial(step, counts=counts) for counts in (True, False)}


def _image_step(problem: Problem, state: State, rho: jax.Array) -> jax.Array:
    """The dual of lambda_model / 2 |. - b_H|^2 / sigma^2 after a step at the extrapolated projections.

    2 A S(x) - A S(x before) instead of A S(2 x - x before): exact costs without a further projection.
    """
    error = model.image_seen(problem) * (2 * state.projected - state.projected_before - problem.images / state.gain)
    sigma = rho * state.metric.images
    keep = 1 / (1 + sigma / jnp.maximum(model.image_precision(problem, state.gain), 1e-20))
    return _filter(keep, state.image_dual) + _filter(sigma * keep, error)


def _map_step(problem: Problem, state: State, counts: bool) -> jax.Array:
    """The dual of lambda_chem KL, which is linearised at the last projections, with curvature W as there expected.

    In units of W^1/2 both the curvature and the metric are the same for all pixels, and the step is a filter again.
    """
    expected = state.signal + problem.background
    root = jnp.sqrt(jnp.maximum(problem.lambda_chem * model.map_precision(problem, expected, counts), 1e-20))
    slope = problem.lambda_chem * model.likelihood(problem, expected, counts)[1]
    error = slope / root + root * model.map_seen(problem) * (state.signal - state.signal_before)
    keep = 1 / (1 + state.metric.maps)
    return root * (_filter(keep, state.map_dual / root) + _filter(state.metric.maps * keep, error))


def _metric(problem: Problem, x: jax.Array, signal: jax.Array, gain: jax.Array, counts: bool) -> Metric:
    """The metrics of a solve that starts at x, where the maps' signal is `signal`."""
    exist = sharding.present(problem.planes, signal.shape[-1])
    bound = problem.lambda_chem * model.chemical_curvature(problem, signal, counts)
    slope = model.scattering_slope(problem, x)
    rho = RHO * sharding.total((bound * exist).sum()) / sharding.total((slope * slope.sum(0) * exist).sum())
    # H bounds A' W A by A' W A 1; A' W^1/2 R W^1/2 A is bounded by the mean W, which is less by the factor A' A 1.
    path = project(jnp.ones_like(x[:1]), problem.map_rays, problem.maps.shape[-2])
    factor = sharding.total((path**2 * exist).sum()) / (np.prod(x.shape[1:3]) * problem.planes)
    images, maps = (_ramp(problem, rays) for rays in (problem.image_rays, problem.map_rays))
    # A dual that steps further than its own term's curvature lets the volume follow the images slowly.
    rho = jnp.minimum(rho, CAP * model.image_precision(problem, gain) / images.max())
    return Metric(SHARE * bound, images, SHARE * factor * maps, rho)


def _ramp(problem: Problem, rays: Geometry) -> jax.Array:
    """max(|k|, half a frequency step) along the detector, zero-padded to twice its length: (pixels + 1,).

    Divided by the largest eigenvalue of A' ramp A, which power iteration on one plane finds.
    """
    pixels = problem.images.shape[-2]
    ramp = jnp.maximum(jnp.arange(pixels + 1) / (2 * pixels), 0.5 / pixels)
    shape = (*problem.start.shape[1:3], 1)

    def power(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v = state[0] / state[1]
        v = backproject(_filter(ramp, project(v, rays, pixels)), rays, *shape[:2])
        return v, jnp.linalg.norm(v)

    norm = jax.lax.fori_loop(0, 12, power, (jnp.ones(shape), jnp.float32(np.sqrt(shape[0] * shape[1]))))[1]
    return ramp / jnp.maximum(norm, 1e-20)


def _filter(spectrum: jax.Array, images: jax.Array) -> jax.Array:
    """Images (..., tilt, y, x) filtered along y, zero-padded, by a real spectrum (pixels + 1,).

    As a product with the filter's Toeplitz matrix: up to some hundred pixels that beats strided FFTs.
    """
    pixels = images.shape[-2]
    kernel = jnp.fft.irfft(spectrum, 2 * pixels)
    index = jnp.arange(pixels)
    return jnp.einsum("ij,...tjx->...tix", kernel[(index[:, None] - index) % (2 * pixels)], images)
