"""Laws of the standard errors in 3D: dense algebra on a tiny problem, and what noise does, draw after draw."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import fused3d, model, uncertainty3d
from engine.data import DataWarning
from engine.fused3d import Settings, reconstruct
from engine.model import FLOOR
from tests.specimens import as_net_counts, simulated, with_images

WEIGHTS = {"lambda_model": 0.5, "lambda_chem": 2.0, "lambda_tv": 0.7}


def dense(function, shape):
    """The matrix of a linear function of arrays of a shape, in double precision."""
    units = jnp.eye(int(np.prod(shape)), dtype=jnp.float32).reshape(-1, *shape)
    return np.asarray(jax.vmap(function)(units), np.float64).reshape(len(units), -1).T


def dense_errors(problem, volume, gain, counts, variance):
    """Standard errors by matrices, TV's second derivative by automatic differentiation."""
    shape, free = volume.shape, (volume > FLOOR).ravel()
    maps = dense(lambda v: problem.sensitivity * model.project(v, problem.map_rays, shape[2]), shape)
    images = dense(lambda v: model.project_images(problem, v), shape[1:])
    seen = np.broadcast_to(np.asarray(model.map_seen(problem)), problem.maps.shape).ravel()
    weight = np.broadcast_to(np.asarray(problem.map_weight), problem.maps.shape).ravel() * seen
    if counts:
        background = np.broadcast_to(np.asarray(problem.background), problem.maps.shape).ravel()
        weight = seen / (maps @ volume.ravel() + background + 1e-5)
    gamma, contrast = float(problem.gamma), np.asarray(problem.contrast, np.float64)
    x = np.maximum(volume.astype(np.float64), FLOOR)
    slope = (gamma * contrast * x ** (gamma - 1)).reshape(len(x), -1)
    images = np.concatenate([images * row for row in slope], axis=1)
    clean = (images.reshape(len(images), len(x), -1) * (x.reshape(len(x), -1) / gamma)).sum((1, 2))
    precision = float(problem.lambda_model) * (gain / float(problem.image_noise)) ** 2
    noise = np.full(len(images), float(problem.image_noise) ** 2) if variance is None else variance * gain * clean
    chem = float(problem.lambda_chem)
    rounding = uncertainty3d.ROUND * np.percentile(volume, 99, axis=(1, 2, 3)).max()

    def variation(flat):
        steps = [jnp.diff(flat.reshape(shape), axis=k, append=jnp.take(flat.reshape(shape), jnp.array([-1]), axis=k))
                 for k in (1, 2, 3)]
        return jnp.sqrt(sum(s**2 for s in steps) + rounding**2).sum()

    bent = np.asarray(jax.hessian(variation)(jnp.asarray(volume.ravel())), np.float64)
    hessian = chem * maps.T * weight @ maps + precision * images.T @ images + float(problem.lambda_tv) * bent
    fisher = chem**2 * maps.T * weight @ maps + (precision / gain) ** 2 * images.T * noise @ images
    inverse = np.linalg.inv(hessian[np.ix_(free, free)])
    found = np.full(free.shape, np.nan)
    found[free] = np.sqrt(np.diag(inverse @ fisher[np.ix_(free, free)] @ inverse))
    return found.reshape(shape)


@pytest.mark.filterwarnings("ignore:the standard errors average")
@pytest.mark.parametrize("kind", ["counts", "net counts", "counted images", "no images"])
def test_probes_agree_with_dense_algebra(kind):
    data = simulated(8, 9, 5, snr=12.0)
    data = as_net_counts(data) if kind == "net counts" else data
    data = with_images(data, units="counts") if kind == "counted images" else data
    counts = data.chem.units == "counts"
    problem = model.build(data, gamma=1.6, weights="z_gamma", inner=4, **WEIGHTS)
    rng = np.random.default_rng(0)
    volume = (data.truth * (0.8 + 0.4 * rng.random(data.truth.shape))).astype(np.float32)
    if kind == "no images":
        problem = problem._replace(images=problem.images[:0])
        wanted = dense_errors(problem._replace(lambda_model=jnp.float32(0), images=jnp.zeros((16, 8, 8))), volume, 0.6,
                              counts, None)
    else:
        wanted = dense_errors(problem, volume, 0.6, counts, model.image_variance(data))
    found, told = uncertainty3d.errors(problem, volume, 0.6, counts, model.image_variance(data), 400)
    ratio = found["standard_error"] / wanted
    print(f"{kind}: median {np.nanmedian(ratio):.4f}, spread {np.nanstd(ratio):.4f}, {told}")
    assert (np.isnan(ratio) == (volume <= FLOOR)).all()
    assert abs(np.nanmedian(ratio) - 1) < 0.02  # the probes' own error is 1 / sqrt(800), voxel by voxel
    assert np.nanstd(ratio) < 0.06 and told["error_residual"] <= uncertainty3d.ACCURACY


@pytest.mark.slow
@pytest.mark.parametrize("lambdas", [{"lambda_tv": 0.3}, {"lambda_tv": 3.0, "lambda_chem": 10.0, "lambda_model": 3.0}])
def test_predicted_errors_are_the_spread_over_noise_draws(lambdas):
    """Also at weights that are not statistical."""
    volumes, errors = [], None
    for seed in range(20):
        data = with_images(simulated(24, 47, 9, seed=seed), units="counts")
        settings = Settings(errors="none" if volumes else "sandwich", tolerance=0.0, iterations=100, **lambdas)
        solution = reconstruct(data, settings)
        errors = solution.fields["standard_error"] if errors is None else errors
        volumes.append(solution.volume)
    ratio = (errors / np.std(volumes, axis=0, ddof=1))[data.truth > 0.5]
    print(f"{lambdas}: predicted over observed {np.nanmedian(ratio):.3f}")
    assert 0.7 < np.nanmedian(ratio) < 1.4


@pytest.mark.filterwarnings("ignore:the standard errors average")
def test_more_counts_make_errors_smaller_and_averages_tell(tiny):
    few, many = (reconstruct(simulated(16, 9, 5, snr=snr), Settings(errors="sandwich", error_probes=4))
                 for snr in (2.5, 16.0))
    for name in ("average_standard_error", "average_relative_error"):
        assert 0 < many.metrics[name] < few.metrics[name]
    assert np.isnan(few.fields["standard_error"][few.volume == 0]).all()
    assert few.fields["relative_error"].shape == few.volume.shape


def test_errors_as_large_as_the_concentrations_are_not_to_be_believed(tiny):
    with pytest.warns(DataWarning, match="do not determine the volume.*raise lambda_tv"):
        reconstruct(tiny, Settings(lambda_tv=1e-6, errors="sandwich", error_probes=2))


@pytest.mark.filterwarnings("ignore:the standard errors average")
def test_errors_change_no_volume_and_methods_that_stop_short_have_none(tiny):
    plain, told = (reconstruct(tiny, Settings(errors=kind, error_probes=2)) for kind in ("none", "sandwich"))
    np.testing.assert_array_equal(plain.volume, told.volume)
    assert plain.fields == {} and set(told.fields) == {"standard_error", "relative_error"}
    assert reconstruct(tiny, Settings(method="ml", errors="sandwich")).fields == {}
    batch = fused3d.reconstruct_batch(tiny, [replace(Settings(errors="sandwich", error_probes=2), lambda_tv=tv)
                                             for tv in (0.1, 0.5)])
    assert [set(each.fields) for each in batch] == 2 * [{"standard_error", "relative_error"}]
    alone = reconstruct(replace(tiny, haadf=None), Settings(method="chem_tv", errors="sandwich", error_probes=2))
    beside = reconstruct(tiny, Settings(method="chem_tv", errors="sandwich", error_probes=2))
    np.testing.assert_allclose(beside.fields["standard_error"], alone.fields["standard_error"], rtol=1e-4)
