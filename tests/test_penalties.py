"""Total variation and its proximal operator, against brute force and the laws that any such operator keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from engine.penalties import Dual, gradient, gradient_adjoint, prox_tv, total_variation, zero_dual
from tests.specimens import distance

_prox = jax.jit(prox_tv)
SHAPE = (6, 6, 6)  # one program for most laws


def prox(volume, weight, metric=1.0, steps=3000, floor=0.0, dual=None):
    volume = jnp.asarray(volume, jnp.float32)
    dual = zero_dual(volume) if dual is None else dual
    metric = jnp.broadcast_to(jnp.asarray(metric, jnp.float32), volume.shape)
    return _prox(volume, jnp.float32(weight), metric, dual, jnp.int32(steps), jnp.float32(floor))


def differences(u):
    """Forward differences (3, z, y, x) in double precision, 0 behind the last voxel."""
    return np.stack([np.diff(u, axis=axis, append=np.take(u, [-1], axis)) for axis in range(3)])


def objective(u, volume, weight, metric, smoothing=0.0):
    """What `prox_tv` minimises, in double precision; TV(u) becomes sum sqrt(|grad u|^2 + smoothing^2)."""
    tv = np.sqrt((differences(u) ** 2).sum(0) + smoothing**2).sum()
    return ((u - volume) ** 2 / (2 * metric)).sum() + weight * tv


def brute_force(volume, weight, metric, floor):
    """The minimiser over u >= floor by a general optimiser, with TV's corner smoothed less and less."""
    u = np.maximum(volume, floor).ravel()
    for smoothing in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        def cost(flat, smoothing=smoothing):
            return objective(flat.reshape(volume.shape), volume, weight, metric, smoothing)

        def slope(flat, smoothing=smoothing):
            u = flat.reshape(volume.shape)
            g = differences(u)
            field = weight * g / np.sqrt((g**2).sum(0) + smoothing**2)
            back = sum(np.diff(field[k], axis=k, prepend=0) for k in range(3))
            return ((u - volume) / metric - back).ravel()

        found = minimize(cost, u, jac=slope, method="L-BFGS-B", bounds=[(floor, None)] * u.size,
                         options={"maxiter": 1000, "maxfun": 2000, "ftol": 1e-14, "gtol": 1e-9})
        u = found.x
    return u.reshape(volume.shape)


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 5, 3), (2, 3, 4, 5)])
def test_gradient_and_its_adjoint(shape):
    rng = np.random.default_rng(0)
    volume = rng.normal(size=shape)
    field = [rng.normal(size=shape) for _ in range(3)]
    for axis, part in zip((-3, -2, -1), field, strict=True):
        np.moveaxis(part, axis, 0)[-1] = 0  # nothing crosses the last face
    g = gradient(jnp.asarray(volume, jnp.float32))
    back = gradient_adjoint(Dual(*(jnp.asarray(f, jnp.float32) for f in field)))
    left = sum(np.vdot(np.asarray(a, np.float64), b) for a, b in zip(g, field, strict=True))
    assert abs(left - np.vdot(volume, np.asarray(back, np.float64))) < 1e-5 * np.linalg.norm(volume) * 10
    for axis, part in zip((-3, -2, -1), g, strict=True):
        assert not np.moveaxis(np.asarray(part), axis, 0)[-1].any()


def test_total_variation_of_a_ball_is_its_mean_surface_and_scales():
    """A ball that fades from 1 at radius 10 to 0 at radius 16: the integral of 4 pi r^2 / 6 between them."""
    radius = np.sqrt(((np.indices((40, 40, 40)) - 19.5) ** 2).sum(0))
    ball = jnp.asarray(np.clip((16 - radius) / 6, 0, 1), jnp.float32)
    assert float(total_variation(ball)) == pytest.approx(4 * np.pi / 18 * (16**3 - 10**3), rel=0.02)
    assert float(total_variation(3 * ball)) == pytest.approx(3 * float(total_variation(ball)), rel=1e-5)
    assert float(total_variation(ball + 7)) == pytest.approx(float(total_variation(ball)), rel=1e-4)
    np.testing.assert_allclose(total_variation(jnp.stack([ball, 2 * ball])), float(total_variation(ball)) * np.r_[1, 2],
                               rtol=1e-5)


@pytest.mark.parametrize(("weight", "floor"), [(0.1, 0.0), (0.4, 0.4), (1.5, 0.0)])
@pytest.mark.parametrize("seed", range(2))
def test_prox_agrees_with_brute_force(seed, weight, floor):
    rng = np.random.default_rng(seed)
    volume, metric = rng.normal(0.3, 1, (2, 3, 2)), 10.0 ** rng.uniform(-1, 1, (2, 3, 2))
    dual = None
    for _ in range(20):  # steps that differ a hundredfold between voxels make for slow convergence in the limit
        u, dual = prox(volume, weight, metric, steps=2000, floor=floor, dual=dual)
    u = np.asarray(u, np.float64)
    best = brute_force(volume, weight, metric, floor)
    assert u.min() >= floor
    assert objective(u, volume, weight, metric) <= objective(best, volume, weight, metric) + 2e-5
    np.testing.assert_allclose(u, best, atol=5e-3)


@pytest.mark.parametrize("size", [1e-3, 1e-1, 1])
def test_no_perturbation_improves_the_prox(size):
    volume, metric, weight = normal(SHAPE, 1), 0.2 + np.random.default_rng(2).random(SHAPE), 0.3
    u = np.asarray(prox(volume, weight, metric)[0], np.float64)
    least = objective(u, volume, weight, metric)
    for seed in range(200):
        moved = np.maximum(u + size * normal(u.shape, seed), 0)
        assert objective(moved, volume, weight, metric) > least - 1e-6 * abs(least)


def test_prox_is_non_expansive_in_its_metric():
    metric = 10.0 ** np.random.default_rng(3).uniform(-1, 1, SHAPE)
    for seed in range(5):
        a, b = normal(metric.shape, seed), normal(metric.shape, seed + 100)
        moved = np.asarray(prox(a, 0.4, metric)[0] - prox(b, 0.4, metric)[0])
        assert np.linalg.norm(moved / np.sqrt(metric)) <= np.linalg.norm((a - b) / np.sqrt(metric)) * (1 + 1e-5)


def test_constant_volumes_stay():
    volume = np.full(SHAPE, 0.7, np.float32)
    np.testing.assert_allclose(prox(volume, 10.0, 2.0, steps=50)[0], volume, rtol=1e-6)
    np.testing.assert_allclose(prox(-volume, 10.0, 2.0, steps=50)[0], 0 * volume)


def test_weight_zero_is_the_projection_onto_the_bound():
    volume = normal(SHAPE, 4).astype(np.float32)
    dual = Dual(*(jnp.asarray(normal(volume.shape, k), jnp.float32) for k in range(3)))
    np.testing.assert_array_equal(prox(volume, 0.0, 0.5, floor=0.1, dual=dual)[0], np.maximum(volume, np.float32(0.1)))


def test_huge_weight_gives_the_mean_in_the_metric():
    volume = np.stack([normal(SHAPE, k) + k for k in (2, 5, 7)])
    metric = 0.5 + np.random.default_rng(7).random(volume.shape)
    u = np.asarray(prox(volume, 1e3, metric)[0])
    mean = (volume / metric).sum((1, 2, 3)) / (1 / metric).sum((1, 2, 3))
    for element in range(3):
        np.testing.assert_allclose(u[element], mean[element], rtol=1e-3)


def test_warm_dual_gives_the_same_answer_in_few_steps():
    volume, metric = normal(SHAPE, 8) + 1, 0.5 + np.random.default_rng(9).random(SHAPE)
    converged, dual = prox(volume, 0.5, metric)
    assert distance(prox(volume, 0.5, metric, steps=2, dual=dual)[0], converged) < 1e-4
    assert distance(prox(volume, 0.5, metric, steps=2)[0], converged) > 1e-2
    # A nearby problem, as in the next iteration of a solver: warm beats cold by far.
    near = volume + 0.01 * normal(volume.shape, 10)
    there = prox(near, 0.5, metric)[0]
    warm, cold = (distance(prox(near, 0.5, metric, steps=3, dual=d)[0], there) for d in (dual, None))
    assert warm < cold / 5


def test_more_steps_come_closer():
    volume = normal(SHAPE, 11) + 1
    end = prox(volume, 1.0)[0]
    errors = [distance(prox(volume, 1.0, steps=n)[0], end) for n in (1, 4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (0, 2, 1)])
def test_no_axis_is_preferred(order):
    volume, metric = normal(SHAPE, 12), 0.5 + np.random.default_rng(13).random(SHAPE)
    turned = prox(volume.transpose(order), 0.4, metric.transpose(order))[0]
    np.testing.assert_allclose(turned, prox(volume, 0.4, metric)[0].transpose(order), atol=1e-4)


def test_scaling_the_problem_scales_the_answer():
    """Volume, and weight times metric, in another unit: the answer is in that unit."""
    volume = normal(SHAPE, 14) + 0.5
    np.testing.assert_allclose(prox(1e3 * volume, 0.3, 1e3)[0], 1e3 * prox(volume, 0.3, 1.0)[0], atol=0.1)


def test_dual_stays_within_its_weight():
    dual = prox(normal(SHAPE, 15), 0.2, 1.5, steps=7)[1]
    assert float(jnp.sqrt(dual.z**2 + dual.y**2 + dual.x**2).max()) <= 0.2 * (1 + 1e-5)


def test_elements_are_independent():
    volume, metric = normal((3, *SHAPE), 16), 0.5 + np.random.default_rng(17).random((3, *SHAPE))
    together = prox(volume, 0.3, metric)[0]
    for e in range(3):
        np.testing.assert_allclose(together[e], prox(volume[e], 0.3, metric[e])[0], atol=1e-6)
