"""Laws of the standard errors: what they predict is what noise does, for any weights."""

import numpy as np
import pytest

from engine.fused2d import Settings, reconstruct
from engine.metrics import share_rmse
from tests.test_fused2d import measured

DRAWS = 50


def draws(weights, count=DRAWS, *, counted=True, **settings):
    """Volumes of so many noise draws, and the fields of the first; its specimen."""
    volumes, first = [], None
    for seed in range(count):
        data = measured(snr=12.0, haadf=150.0, weights=weights, seed=seed)
        solution = reconstruct(data, Settings(weights=weights, **settings))
        volumes.append(solution.volume)
        first = first or solution
    return np.array(volumes, float), first, data.truth


def ratio(predicted, volumes, inside):
    """Median over pixels of predicted over observed standard deviation."""
    return float(np.nanmedian((predicted / volumes.std(0, ddof=1))[inside]))


@pytest.mark.parametrize("weights", ["z_gamma", "z_gamma_linear"])
@pytest.mark.parametrize("lambda_chem", [1.0, 30.0, 1 / 30])
def test_predicted_errors_are_the_spread_over_noise_draws(weights, lambda_chem):
    volumes, first, truth = draws(weights, lambda_chem=lambda_chem, lambda_tv=1e-6, iterations=80)
    inside = truth > 0.15
    found = ratio(first.fields["standard_error"], volumes, inside)
    share = 100 * volumes / np.maximum(volumes.sum(1, keepdims=True), 1e-6)
    relative = ratio(first.fields["relative_error"], share, inside)
    print(f"{weights}, lambda_chem {lambda_chem:.3g}, without TV: predicted over observed {found:.3f}, "
          f"of shares {relative:.3f}")
    assert 0.8 < found < 1.25 and 0.8 < relative < 1.25


@pytest.mark.parametrize("lambda_chem", [1.0, 30.0, 1 / 30])
def test_with_total_variation_the_prediction_is_an_upper_bound(lambda_chem):
    volumes, first, truth = draws("z_gamma", lambda_chem=lambda_chem, lambda_tv=0.3, iterations=80)
    found = ratio(first.fields["standard_error"], volumes, truth > 0.15)
    print(f"z_gamma, lambda_chem {lambda_chem:.3g}, lambda_tv 0.3: predicted over observed {found:.3f}")
    assert found > 0.9


def test_the_error_of_one_map_alone_is_that_of_its_counts():
    """Without an image the variance of x is that of the counts over s^2, whatever the weight."""
    data = measured(snr=12.0)
    for lambda_chem in (1.0, 20.0):
        solution = reconstruct(data, Settings(method="chem_tv", lambda_chem=lambda_chem, lambda_tv=1e-6))
        expected = np.sqrt(solution.volume / data.sensitivity[:, None, None, None])
        inside = data.truth > 0.15
        np.testing.assert_allclose(solution.fields["standard_error"][inside], expected[inside], rtol=1e-3)


def test_elements_on_the_bound_have_no_error_and_averages_leave_them_out():
    data = measured(snr=3.0)
    solution = reconstruct(data, Settings(lambda_tv=1e-6))
    error, relative = solution.fields["standard_error"], solution.fields["relative_error"]
    assert np.isnan(error[solution.volume == 0]).all() and np.isfinite(error[solution.volume > 0.01]).all()
    assert np.isnan(relative[:, ~(data.truth.sum(0) > 0)]).mean() > 0.9
    assert solution.metrics["average_standard_error"] > 0 and solution.metrics["average_relative_error"] > 0


def test_relative_errors_cancel_where_elements_move_together():
    """Two elements' shares add up to 1, so that they have one and the same error."""
    data = measured("ga2o3", snr=20.0)
    solution = reconstruct(data, Settings(lambda_tv=1e-3))
    relative = solution.fields["relative_error"][:, data.truth.sum(0) > 0.9]
    np.testing.assert_allclose(relative[0], relative[1], rtol=1e-3)


def test_the_average_error_tells_the_rmse_where_the_snr_is_above_10():
    """F2, Fig. 6c: the two are proportional, with a slope near one for errors that are right."""
    found = []
    for haadf in (20.0, 100.0):
        for snr in (13.0, 21.0, 33.0, 51.0):
            data = measured(size=48, snr=snr, haadf=haadf, weights="z_gamma_linear")
            solution = reconstruct(data, Settings(weights="z_gamma_linear", lambda_tv=0.3))
            found.append((share_rmse(solution.volume, data.truth), solution.metrics["average_relative_error"]))
    rmse, predicted = np.array(found).T
    correlation, slope = np.corrcoef(rmse, predicted)[0, 1], (rmse @ predicted) / (rmse @ rmse)
    print(f"average standard error against RMSE: correlation {correlation:.4f}, slope {slope:.3f}")
    assert correlation > 0.9 and 0.8 < slope < 1.2


def test_eq_5_as_printed_is_an_option_and_knows_no_weights():
    """It is finite where its Hessian is, near the sandwich at statistical weights, and the same at others."""
    data = measured(snr=30.0, haadf=100.0)
    printed, own = (reconstruct(data, Settings(lambda_tv=1e-6, errors=kind)) for kind in ("paper", "sandwich"))
    inside = data.truth > 0.15
    found = np.nanmedian((printed.fields["standard_error"] / own.fields["standard_error"])[inside])
    assert 0.5 < found < 2
    np.testing.assert_array_equal(printed.volume, own.volume)
    assert "standard_error" not in reconstruct(data, Settings(errors="none")).fields
