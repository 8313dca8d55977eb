"""Directional total variation: laws of the operator, its proximal operator by brute force, what it does for maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from engine import guide, metrics, penalties, phantoms2d, simulate
from engine.fused2d import Settings, reconstruct
from engine.penalties import Dual, zero_dual
from tests.specimens import distance

RNG = np.random.default_rng(4)
SHAPE = (2, 1, 12, 9)


def fields():
    return Dual(jnp.zeros(SHAPE), *(jnp.asarray(RNG.normal(size=SHAPE), jnp.float32) for _ in range(2)))


def scene(size=32):
    """An image with edges in all directions, (1, y, x)."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    return jnp.asarray(np.sqrt(np.maximum(0.16 - x**2 - y**2, 0))[None] + 0.3 * (x + y > 0.1), jnp.float32)


@pytest.fixture(scope="module")
def some():
    return guide.directions(jnp.asarray(RNG.normal(size=SHAPE[1:]), jnp.float32), jnp.float32(0.05), 0.8)


def dot(a, b):
    return float(sum((np.asarray(p, np.float64) * np.asarray(q)).sum() for p, q in zip(a, b)))


def test_steering_is_its_own_adjoint_and_never_lengthens(some):
    a, b = fields(), fields()
    assert dot(guide.steered(a, some), b) == pytest.approx(dot(a, guide.steered(b, some)), rel=1e-5)
    turned = guide.steered(a, some)
    assert (np.hypot(turned.y, turned.x) <= np.hypot(a.y, a.x) * (1 + 1e-6)).all()
    assert distance(jnp.stack(turned), jnp.stack(a)) > 0.1


@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_a_map_with_the_images_edges_keeps_one_minus_the_strength_of_its_variation(strength):
    image = guide.smoothed(scene(), 4)  # as smooth as what directions are taken from, so that its edges stay in place
    way = guide.directions(image, jnp.float32(1e-6), strength)
    smooth = guide.smoothed(image, guide.WIDTH)[None]
    kept = guide.total_variation(smooth, way)[0] / penalties.total_variation(smooth)[0]
    assert float(kept) == pytest.approx(1 - strength, abs=1e-3)
    # Across the image's edges nothing is free: a gradient at right angles counts whole.
    slope = penalties.gradient(smooth)
    across = Dual(slope.z, -slope.x, slope.y)
    assert distance(jnp.stack(guide.steered(across, way)), jnp.stack(across)) < 1e-4


def test_the_images_scale_level_and_sign_do_not_matter():
    image, noise = scene(), 0.02
    found = guide.directions(image, jnp.float32(noise), 0.9)
    field = Dual(*(jnp.asarray(RNG.normal(size=(1, 1, 32, 32)), jnp.float32) for _ in range(3)))
    for factor, level in ((50.0, 0.0), (1.0, 3.0), (-2.0, 1.0)):
        other = guide.directions(factor * image + level, jnp.float32(abs(factor) * noise), 0.9)
        assert distance(jnp.stack(guide.steered(field, other)), jnp.stack(guide.steered(field, found))) < 1e-4


@pytest.mark.parametrize("case", ["no strength", "an image of noise", "a flat image", "flat and without noise"])
def test_without_edges_it_is_total_variation(case):
    strength = 0.0 if case == "no strength" else 0.9
    image = jnp.full((1, 64, 64), 3.0) if "flat" in case else jnp.asarray(
        RNG.normal(size=(1, 64, 64)), jnp.float32)
    noise = jnp.float32({"no strength": 0.1, "flat and without noise": 0.0}.get(case, 1.0))
    volume = jnp.asarray(RNG.random((1, 1, 64, 64)), jnp.float32)
    ratio = guide.total_variation(volume, guide.directions(image, noise, strength)) / penalties.total_variation(volume)
    # Noise passes for a weak edge: a tenth of the variation at most.
    assert float(ratio[0]) == pytest.approx(1, abs=0.1 if case == "an image of noise" else 1e-5)


def test_the_proximal_operator_agrees_with_brute_force(some):
    volume, metric = (jnp.asarray(RNG.random(SHAPE), jnp.float32) for _ in range(2))
    metric, weight, floor = 0.3 + metric, 0.4, 0.1
    dual = guide.tv_dual(volume, jnp.float32(weight), metric, zero_dual(volume), jnp.int32(4000), floor, some)
    assert float(jnp.hypot(dual.y, dual.x).max()) <= weight * (1 + 1e-5)
    own = penalties.primal(volume, metric, guide.steered(dual, some), floor)

    @jax.jit
    def cost(u, soft):
        slope = guide.steered(penalties.gradient(u.reshape(SHAPE)), some)
        length = jnp.sqrt(slope.y**2 + slope.x**2 + soft**2)
        return ((u.reshape(SHAPE) - volume) ** 2 / (2 * metric)).sum() + weight * length.sum()

    with jax.enable_x64(True):
        slope = jax.jit(jax.value_and_grad(cost))
        best = np.asarray(volume, np.float64).ravel()
        for soft in (1e-2, 1e-3, 1e-4):
            best = minimize(lambda u, soft=soft: tuple(np.asarray(a, np.float64) for a in slope(u, soft)), best,
                            jac=True, method="L-BFGS-B", bounds=[(floor, None)] * best.size,
                            options={"maxiter": 3000, "maxfun": 9000, "ftol": 1e-14, "gtol": 1e-9}).x
    assert float(cost(own.ravel(), 0.0)) <= float(cost(jnp.asarray(best, jnp.float32), 0.0)) * (1 + 1e-4)
    assert distance(own, best.reshape(SHAPE)) < 5e-3


def test_x_and_y_are_alike():
    image, volume = scene(), jnp.asarray(RNG.random((1, 1, 32, 32)), jnp.float32)
    upright, turned = (float(guide.total_variation(v, guide.directions(i, jnp.float32(0.01), 0.9))[0])
                       for v, i in ((volume, image), (volume.swapaxes(-1, -2), image.swapaxes(-1, -2))))
    assert turned == pytest.approx(upright, rel=1e-5)


def test_guided_maps_of_a_particle_are_nearer_the_truth_than_tv_alone_can_be():
    """Each at its best weight of five; a core in a shell, whose thickness the image shows."""
    names = phantoms2d.ELEMENTS["coscoo"]
    data = simulate.microscopy(phantoms2d.phantom("coscoo", 64), tuple(names.values()), tuple(names), pixel_size=1.0,
                               snr=dict.fromkeys(names, 5.0) | {"haadf": 100.0}, weights="z_gamma_linear")

    def error(tv, strength):
        given = Settings(weights="z_gamma_linear", lambda_tv=tv, guide=strength, errors="none", tolerance=0.0)
        return metrics.nrmse_elements(reconstruct(data, given).volume, data.truth).mean()

    plain, guided = (min(error(tv, strength) for tv in (3.0, 6.0, 12.0, 25.0, 50.0)) for strength in (0.0, 0.9))
    print(f"NRMSE {plain:.4f} by total variation, {guided:.4f} guided by the image")
    assert guided < 0.75 * plain


def test_guided_solves_end_lower_than_they_begin_and_start_from_coarse_ones(tmp_path):
    names = phantoms2d.ELEMENTS["ga2o3"]
    data = simulate.microscopy(phantoms2d.phantom("ga2o3", 48), tuple(names.values()), tuple(names), pixel_size=1.0,
                               snr=dict.fromkeys(names, 5.0) | {"haadf": 100.0})
    for coarse in (0, 5):
        solution = reconstruct(data, Settings(guide=0.9, lambda_tv=5.0, coarse=coarse, errors="none"))
        after = solution.history["total"][16:]
        assert solution.ok and (np.diff(after) <= 1e-5 * after[0]).all()
