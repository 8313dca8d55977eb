"""Laws of counts that are set aside: nothing is lost, parts know nothing of each other, only counts can be parted."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from engine import fused2d, heldout, metrics
from engine.data import DataError
from engine.fused2d import Settings
from launch import resources
from sweeps import settings, stages, trial
from tests import predictions
from tests.specimens import as_net_counts, simulated
from tests.test_fused2d import measured
from tests.test_spectra import BCF


def test_parts_are_all_the_counts_and_each_is_tested_once():
    data = measured(snr=6.0, background=0.2)
    folds = heldout.thinned(data, 4, seed=3)
    assert sum(test.chem.projections for _, test in folds) == pytest.approx(data.chem.projections)
    for training, test in folds:
        assert training.chem.projections + test.chem.projections == pytest.approx(data.chem.projections)
        for part, share in ((training, 0.75), (test, 0.25)):
            assert part.sensitivity == pytest.approx(share * data.sensitivity)
            assert part.chem.background == pytest.approx(share * np.asarray(data.chem.background))
            assert part.chem.projections.sum() == pytest.approx(share * data.chem.projections.sum(), rel=0.02)
            assert part.haadf is data.haadf
    again = heldout.thinned(data, 4, seed=3)
    assert (again[2][1].chem.projections == folds[2][1].chem.projections).all()
    assert (heldout.thinned(data, 4, seed=4)[2][1].chem.projections != folds[2][1].chem.projections).any()


def test_training_and_test_counts_are_independent():
    """Of one pixel: the covariance of the parts of a Poisson count is 0, of a count that is fixed it is not."""
    base, shape = measured(), (3, 1, 200, 200)

    def correlation(counts):
        maps = replace(base.chem, projections=counts, background=0.0)
        data = replace(base, chem=maps, haadf=None, truth=None, shape=shape[1:])
        training, test = heldout.thinned(data, 3, seed=1)[0]
        return [float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
                for a, b in zip(training.chem.projections, test.chem.projections)]

    assert max(map(abs, correlation(np.random.default_rng(0).poisson(5.0, shape)))) < 4 / 200
    assert max(correlation(np.full(shape, 5))) < -0.99


def test_counts_of_a_tilt_series_are_parted_as_those_of_a_map():
    data = simulated(16, 9, 5)
    folds = heldout.thinned(data, 3, seed=3)
    assert sum(test.chem.projections for _, test in folds) == pytest.approx(data.chem.projections)
    assert all(training.chem.tilts == 5 and training.haadf is data.haadf for training, _ in folds)


@pytest.mark.parametrize("counts", [True, False])
def test_scales_are_those_of_maximum_likelihood(counts):
    """At the fitted factors the slope of the likelihood is 0, and they are the ones that made the data."""
    rng, true = np.random.default_rng(0), np.array([0.4, 1.0, 3.0])
    signal, level = 5 * rng.random((3, 2, 40, 40)), np.array([0.5, 0.1, 0.0])[:, None, None, None]
    expected = true[:, None, None, None] * signal + level
    maps = rng.poisson(expected) if counts else rng.normal(expected, 1.0)
    found = heldout.scales(signal, level, maps, counts)
    np.testing.assert_allclose(found, true, rtol=0.05)
    model = found[:, None, None, None] * signal + level
    slope = signal * ((1 - maps / np.maximum(model, 1e-9)) if counts else (model - maps))
    assert np.abs(slope.sum((1, 2, 3)) / np.abs(slope).sum((1, 2, 3))).max() < 1e-3


def test_the_weight_of_tv_goes_with_the_root_of_the_counts():
    assert heldout.weight(2.0, 0.25) == 1.0 and heldout.weight(2.0, 1.0) == 2.0


def test_the_best_tv_for_a_share_of_the_counts_is_the_one_that_the_root_foretells():
    """Against a truth, one map without an image: a ninth of the counts wants a third of the weight."""
    weights = np.geomspace(2, 30, 9)

    def best(snr):
        errors = [np.mean([metrics.nrmse_elements(fused2d.reconstruct(data, Settings(
            method="chem_tv", lambda_tv=float(tv), errors="none", tolerance=1e-5)).volume, data.truth).mean()
            for data in (measured(size=32, snr=snr, seed=seed) for seed in range(2))]) for tv in weights]
        return weights[int(np.argmin(errors))]

    assert 2 <= best(1 + 27.0) / best(1 + 3.0) <= 5


def test_only_whole_counts_can_be_parted():
    with pytest.raises(DataError, match="only whole counts can be parted"):
        heldout.thinned(as_net_counts(measured()), 2, seed=0)


def test_the_right_weight_predicts_unseen_counts_better_than_too_little_and_too_much():
    data = measured(size=48, snr=3.0)

    def score(strength):
        found = []
        for training, test in heldout.thinned(data, 2, seed=0):
            solution = fused2d.reconstruct(training, Settings(lambda_tv=strength, errors="none",
                                                              weights="z_gamma_linear"))
            found.append(trial.deviance(test, solution.volume, trial.sensitivities(solution, data), (0,)))
        return np.mean(found)

    least, right, most = map(score, (1e-4, 0.3, 100.0))
    assert right < least and right < most


@pytest.mark.slow
@pytest.mark.skipif(not BCF.exists() or not importlib.util.find_spec("rsciio"), reason="needs the file and its reader")
def test_measured_counts_are_predicted_better_than_by_the_raw_map_by_smoothing_and_by_tv():
    """Each at its best strength, on the same parts; in standard errors of the paired difference over the partings."""
    sweep = settings.load(resources.configs()["fused2d_measured"], [f"data.root={BCF.parent}"])
    fixed = settings.replace(sweep, {"solver.lambda_model": 1.0, "solver.lambda_tv": 0.1})
    found = predictions.compared(stages.measured_data(sweep.data, flat=True), trial.solver_settings(fixed), partings=2,
                                 tv=(8.0, 12.6, 40.0, 120.0), model=(1e-5, 1e-3))
    for name in ("raw map", "Gaussian", "TV alone", "fused, TV"):
        apart = found[name].partings - found["fused, guided TV"].partings
        assert apart.min() > 0, name
