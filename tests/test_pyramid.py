"""Coarse to fine: half the resolution is the same objective, about the same axis, and the way back is its inverse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import fused3d, metrics, model, pyramid
from engine.penalties import Dual
from engine.projector import geometry, project
from engine.sizes import SMALLEST, halvings, slab_width
from tests.specimens import as_net_counts, distance, simulated


def problem_of(data, **weights):
    chosen = {"gamma": 1.6, "lambda_model": 1.0, "lambda_chem": 1.0, "lambda_tv": 0.3} | weights
    return model.build(data, weights="z_gamma", inner=4, **chosen)


@pytest.fixture(scope="module")
def smooth():
    """A blob well inside of 31 x 32 x 6 voxels, off the axis."""
    z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (31, 32, 6)), indexing="ij")
    return np.exp(-((z - 3) ** 2 + (y + 2) ** 2) / 30 - x**2 / 20).astype(np.float32)


@pytest.mark.parametrize("nz, ny", [(32, 32), (31, 31), (32, 31), (31, 32)])
def test_the_axis_stays_where_it_is(smooth, nz, ny):
    """Binned projections are half of the projections of the binned volume times two, whatever is odd."""
    volume = smooth[:nz, :ny]
    rays = geometry(np.array([-50.0, 0.0, 20.0, 70.0]))
    coarse = pyramid._halved(pyramid._halved(jnp.asarray(volume), 0), 1)
    assert coarse.shape == (16, 16, 6)
    fine = pyramid._halved(project(jnp.asarray(volume), rays, ny), -2)
    assert distance(2 * project(coarse, rays, 16), fine) < 0.02
    shifted = jnp.roll(fine, 1, axis=-2)
    assert distance(2 * project(coarse, rays, 16), shifted) > 0.2  # a pixel would show


def test_counts_are_kept_and_images_averaged(tiny):
    problem = problem_of(tiny)
    coarse = pyramid.coarser(problem, True)
    assert coarse.maps.shape[-2:] == (8, 8) and coarse.start.shape[1:] == (8, 8, 8) and int(coarse.planes) == 8
    assert float(coarse.maps.sum()) == pytest.approx(float(problem.maps.sum()), rel=1e-5)
    assert float(coarse.images.mean()) == pytest.approx(float(problem.images.mean()), rel=1e-5)
    assert float(coarse.start.mean()) == pytest.approx(float(problem.start.mean()), rel=1e-5)


@pytest.mark.parametrize("counts", [True, False])
def test_half_the_resolution_is_the_same_objective(smooth, counts):
    """Of a smooth volume in its own noise-free data the coarse terms change by a few percent only, duals by scale."""
    data = simulated(32, 9, 5, snr=50.0)
    data = data if counts else as_net_counts(data)
    problem = problem_of(data)
    x = jnp.stack([0.5 + jnp.asarray(np.pad(smooth, ((0, 1), (0, 0), (13, 13))))] * 4)
    coarse = pyramid.coarser(problem, counts)
    small = pyramid._halved(pyramid._paired(pyramid._halved(x, 2), jnp.ones(32)), 1)
    costs, slopes = zip(*(smooth_terms(p, u, counts) for p, u in ((problem, x), (coarse, small))), strict=True)
    np.testing.assert_allclose(costs[1], costs[0], rtol=0.1)
    # The slope of a voxel is that of its eight parts together.
    fine = 8 * pyramid._halved(pyramid._paired(pyramid._halved(slopes[0], 2), jnp.ones(32)), 1)
    assert distance(slopes[1], fine) < 0.1


def smooth_terms(problem, x, counts):
    """The chemical term and its slope at x."""
    value, slope, _ = model.chemistry(problem, x, counts)
    return float(value), slope


@pytest.mark.parametrize("count", [2, 7, 8])
def test_the_way_back_is_linear_interpolation(count):
    """Lines come back as lines, but for the last pixels, and constants everywhere."""
    coarse = pyramid._halved(3 + jnp.arange(float(count)), 0)
    fine = pyramid._doubled(coarse, 0, count)
    inner = slice(2, -2) if count > 4 else slice(0, 0)
    np.testing.assert_allclose(np.asarray(fine)[inner], (3 + np.arange(count))[inner], rtol=1e-6)
    flat = pyramid._doubled(pyramid._halved(jnp.full(count, 7.0), 0), 0, count)
    np.testing.assert_allclose(flat, np.full(count, 7.0), rtol=1e-6)


def test_duals_stay_within_their_bounds_and_off_the_ends(tiny):
    problem = problem_of(tiny)
    coarse = pyramid.coarser(problem, True)
    rng = np.random.default_rng(0)
    dual = [rng.normal(size=coarse.start.shape).astype(np.float32) for _ in range(3)]
    dual = [d * float(coarse.lambda_tv) / np.sqrt(sum(e**2 for e in dual)) for d in dual]
    dual[0][:, -1] = dual[1][:, :, -1] = dual[2][..., -1] = 0
    _, _, fine = pyramid.finer_duals(coarse.images, coarse.maps, Dual(*map(jnp.asarray, dual)), problem, True)
    length = np.sqrt(sum(np.asarray(d) ** 2 for d in fine))
    assert length.max() <= float(problem.lambda_tv) * (1 + 1e-5)
    assert not any(np.asarray(d).take(-1, axis).any() for d, axis in zip(fine, (1, 2, 3), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("counts", [True, False])
def test_a_coarse_start_saves_most_iterations(counts):
    """8 iterations of a volume of 48^3 from a coarse solve are nearer to the truth than 16 from EM's start."""
    data = simulated(48, 17, 9)
    data = data if counts else as_net_counts(data)
    scores = []
    for coarse, iterations in ((20, 8), (0, 16)):
        chosen = fused3d.Settings(iterations=iterations, coarse=coarse, lambda_tv=0.7, tolerance=0.0)
        solution = fused3d.reconstruct(data, chosen)
        scores.append(float(metrics.nrmse_elements(solution.volume, data.truth).mean()))
        assert solution.metrics["iterations"] == iterations == len(solution.history["total"]) - 1
    assert scores[0] < scores[1]


@pytest.mark.slow
def test_a_batch_starts_as_each_would_by_itself():
    data = simulated(48, 9, 5)
    chosen = [fused3d.Settings(iterations=4, coarse=3, tolerance=0.0, lambda_tv=tv) for tv in (0.2, 0.8)]
    together = fused3d.reconstruct_batch(data, chosen)
    for one, own in zip(together, chosen, strict=True):
        assert distance(one.volume, fused3d.reconstruct(data, own).volume) < 1e-4


def test_halvings_and_slabs_by_size():
    assert [halvings(n, n) for n in (1, 46, 47, 48, 95, 96, 128, 256, 512, 2048)] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3]
    assert halvings(48, 300) == 1 and SMALLEST == 24
    assert slab_width(100, 4, 0) == 25 and slab_width(100, 4, 3) == 32 and slab_width(3, 2, 1) == 4


def test_the_state_of_a_refined_start_is_one_that_steps_take():
    """Types and shapes as a step returns them, so that the loop compiles once."""
    problem = problem_of(simulated(16, 9, 5))
    coarse, first = jax.jit(partial(fused3d.start, counts=True))(pyramid.coarser(problem, True))
    state, terms = fused3d.refined(problem, coarse, True)
    plain, plain_terms = fused3d.start(problem, True)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in ((state, terms), (plain, plain_terms))]
    assert shapes[0] == shapes[1] and first.shape == terms.shape
    assert float(state.gain) == pytest.approx(float(coarse.gain) / 2)
    assert np.isfinite(np.asarray(terms)).all()
