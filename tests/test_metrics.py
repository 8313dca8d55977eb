"""NRMSE exactly as F3 defines it, and the measures that see what it cannot."""

import numpy as np
import pytest

from engine.metrics import (
    correlation,
    mse,
    nrmse,
    nrmse_elements,
    peak_rmse,
    poisson_deviance,
    scale_error,
    scaled_mse,
    share_rmse,
    ssim_structure,
    ssim_windowed,
)


@pytest.fixture
def truth():
    return np.random.default_rng(0).random((3, 12, 12, 12)).astype(np.float32)


def test_nrmse_is_the_distance_of_z_scores(truth):
    v, t = truth[0] + 0.5 * truth[1], truth[0]
    z = [(a.astype(float) - a.mean(dtype=float)) / a.std(dtype=float) for a in (v, t)]
    assert nrmse(v, t) == pytest.approx(np.sqrt(np.mean((z[0] - z[1]) ** 2)), rel=1e-6)
    rho = np.corrcoef(v.ravel().astype(float), t.ravel().astype(float))[0, 1]
    assert correlation(v, t) == pytest.approx(rho, rel=1e-9)
    assert nrmse(v, t) == pytest.approx(np.sqrt(2 - 2 * rho), rel=1e-6)


@pytest.mark.parametrize(("a", "b"), [(1, 0), (1e-3, 5), (1e4, -7)])
def test_nrmse_knows_no_scale_and_no_offset(truth, a, b):
    assert nrmse(a * truth[0].astype(float) + b, truth[0]) == pytest.approx(0, abs=1e-6)
    v = truth[0] + truth[1]
    assert nrmse(a * v.astype(float) + b, truth[0]) == pytest.approx(nrmse(v, truth[0]), rel=1e-6)


def test_nrmse_of_unrelated_negated_and_constant_volumes(truth):
    t = truth[0]
    unrelated = np.random.default_rng(1).random(t.shape)
    assert nrmse(unrelated, t) == pytest.approx(np.sqrt(2), rel=0.05)
    assert nrmse(-t, t) == pytest.approx(2)
    assert nrmse(np.full_like(t, 0.3), t) == pytest.approx(np.sqrt(2))
    assert nrmse(np.zeros_like(t), t) == pytest.approx(np.sqrt(2))


def test_nrmse_is_symmetric_and_per_element(truth):
    v = truth + np.random.default_rng(2).normal(size=truth.shape)
    assert nrmse(v[0], truth[0]) == pytest.approx(nrmse(truth[0], v[0]))
    each = [nrmse(a, b) for a, b in zip(v, truth, strict=True)]
    np.testing.assert_allclose(nrmse_elements(v, truth), each, rtol=1e-5)
    with pytest.raises(ValueError):
        nrmse_elements(v[:2], truth)


def test_a_million_equal_voxels_do_not_drown_the_rest():
    """Sums are in double precision: a faint signal on a large constant is found."""
    t = np.random.default_rng(3).random((100, 100, 100)).astype(np.float32)
    assert nrmse(1000 + t, t) < 1e-3


def test_scale_error_is_what_nrmse_does_not_see(truth):
    factors = np.array([0.5, 1.0, 1.1])
    np.testing.assert_allclose(scale_error(factors[:, None, None, None] * truth, truth), factors - 1, atol=1e-6)
    assert np.isfinite(scale_error(truth, 0 * truth)).all()


def test_deviance_is_zero_at_equality_only():
    rng = np.random.default_rng(4)
    counts = rng.poisson(3.0, 1000)
    assert poisson_deviance(counts, counts) == pytest.approx(0, abs=1e-8)
    for factor in (0.5, 0.99, 1.01, 2):
        assert poisson_deviance(counts, factor * counts) > 0
    assert poisson_deviance(counts, rng.random(1000) * 10) > 0


def test_deviance_is_one_per_pixel_for_poisson_noise():
    rng = np.random.default_rng(5)
    expected = rng.uniform(50, 200, 20000)
    assert poisson_deviance(rng.poisson(expected), expected) / 20000 == pytest.approx(1, abs=0.05)


def test_deviance_is_least_at_the_true_mean():
    counts = np.random.default_rng(6).poisson(2.0, 5000)
    at = [poisson_deviance(counts, np.full(5000, m)) for m in (1.5, counts.mean(), 2.5)]
    assert at[1] == min(at)


def test_deviance_of_an_impossible_model_is_large_but_finite():
    assert 10 < poisson_deviance(np.array([1.0]), np.array([0.0])) < 100
    assert poisson_deviance(np.array([0.0]), np.array([0.0])) == pytest.approx(0, abs=1e-9)


def test_shares_are_compared_inside_the_specimen_and_know_no_scale():
    truth = np.zeros((2, 1, 20, 20))
    truth[:, 0, 5:15, 5:15] = np.array([0.4, 0.6])[:, None, None]
    wrong = truth + 0
    wrong[:, 0, 5:15, 5:15] = np.array([0.5, 0.5])[:, None, None]
    noise = np.zeros_like(truth)
    noise[0, 0, :3] = 5  # far from it
    assert share_rmse(7 * truth + noise, truth) == pytest.approx(0, abs=1e-9)
    assert share_rmse(wrong, truth) == pytest.approx(10)
    assert share_rmse(0 * truth, truth) == pytest.approx(100 * np.sqrt((0.4**2 + 0.6**2) / 2))


def test_peak_normalised_error_is_of_maps_with_a_maximum_of_1():
    truth = np.random.default_rng(0).random((2, 1, 9, 9))
    truth[:, 0, 0, 0] = 1
    np.testing.assert_allclose(peak_rmse(3 * truth, truth), 0, atol=1e-12)
    half = truth.copy()
    half[:, 0, 1, 1] -= 0.9
    np.testing.assert_allclose(peak_rmse(half, truth), 0.1)


# ---- HEBT's measures


def test_the_structure_term_is_the_correlation_and_tells_the_nrmse(truth):
    """HEBT Eq. 19 with C = 0, written out; NRMSE = sqrt(2 - 2 SSIM)."""
    v, t = (truth[0] + 0.7 * truth[1]).astype(float).ravel(), truth[0].astype(float).ravel()
    dv, dt = v - v.mean(), t - t.mean()
    count = t.size - 1
    written = (dv @ dt / count) / (np.sqrt(dv @ dv / count) * np.sqrt(dt @ dt / count))
    found = ssim_structure(v, t)
    assert found == pytest.approx(written, rel=1e-12) == np.corrcoef(v, t)[0, 1]
    assert nrmse(v, t) == pytest.approx(np.sqrt(2 - 2 * found), rel=1e-9)


def test_scaled_mse_is_the_least_of_all_scales(truth):
    v, t = truth[0] + truth[1], truth[0]
    found = scaled_mse(v, t)
    assert found == pytest.approx(scaled_mse(1e6 * v, t), rel=1e-5)
    best = min(mse(a * v, t) for a in np.linspace(0, 2, 2001))
    assert found <= best == pytest.approx(found, rel=1e-4)
    assert scaled_mse(3 * t, t) == pytest.approx(0, abs=1e-12) and scaled_mse(0 * t, t) == pytest.approx(mse(0 * t, t))


def test_the_windowed_ssim_is_1_for_equals_and_sees_what_the_structure_term_does_not(truth):
    t = truth[0]
    assert ssim_windowed(5 * t, t) == pytest.approx(1)
    noise = np.random.default_rng(0).normal(size=t.shape)
    falling = [ssim_windowed(t + a * noise, t) for a in (0.1, 0.3, 1.0)]
    assert 1 > falling[0] > falling[1] > falling[2]
    plane = t[:, :, :1]
    assert ssim_windowed(plane, plane) == pytest.approx(1)
    # A particle in much vacuum: an offset of the whole volume is no change of structure, and no longer the same image.
    t = np.pad(t, 12)
    assert ssim_structure(t + 0.3, t) == pytest.approx(1, abs=1e-6) and ssim_windowed(t + 0.3, t) < 0.7
