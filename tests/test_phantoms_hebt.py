"""HEBT's particle and its signals: what it is made of, in what proportion it shines, what dose and detector do."""

from dataclasses import replace

import numpy as np
import pytest

from engine import phantoms_hebt, physics, signals
from engine.data import DataError
from tests.specimens import distance

LINES = physics.emissions(phantoms_hebt.ELEMENTS, phantoms_hebt.BEAM_KEV, phantoms_hebt.LINES)


def counts(truth, **more):
    return signals.bimodal(truth, LINES, pixel_size=1.5, **{"chem_angles": phantoms_hebt.ANGLES, "noise": False} | more)


def test_core_and_shell_have_the_papers_fractions():
    """Fig. 1: the core 80 wt% Au, the shell 80 wt% Ag, 97 x 97 pixels of 1.5 nm, vacuum around."""
    truth = phantoms_hebt.phantom(97, planes=1)
    assert truth.shape == (2, 97, 97, 1) and phantoms_hebt.FIELD_NM / 97 == 1.5
    share = phantoms_hebt.fractions(truth)
    total = truth.sum(0)
    assert total[0].max() == total[:, 0].max() == total[-1].max() == total[:, -1].max() == 0
    core, shell = (np.isclose(share[0], content["Ag"], atol=1e-5) & (total > 0) for content in
                   (phantoms_hebt.CORE, phantoms_hebt.SHELL))
    assert 0.2 < core.sum() / (core | shell).sum() < 0.4
    np.testing.assert_allclose(total[core].max(), phantoms_hebt.density(phantoms_hebt.CORE), rtol=1e-5)
    assert (core | shell).sum() / (total > 0).sum() > 0.9  # the rest is shared between core and shell


def test_a_profile_crosses_shell_core_and_shell():
    for size, planes in ((97, 1), (48, 9)):
        y, values = phantoms_hebt.profile(phantoms_hebt.fractions(phantoms_hebt.phantom(size, planes)))
        gold = values[1]
        assert values.shape == (2, size) and y[0] == -y[-1] and gold[0] == gold[-1] == 0
        assert gold[np.abs(y + 4).argmin()] == pytest.approx(0.8, abs=1e-5)  # the core's middle, at y = -4 nm
        assert all(gold[np.abs(y - place).argmin()] == pytest.approx(0.2, abs=1e-5) for place in (-38, 30))


def test_one_specimen_at_every_size():
    masses = [phantoms_hebt.phantom(size).sum((1, 2, 3), dtype=float) / size**3 for size in (24, 48)]
    np.testing.assert_allclose(*masses, rtol=5e-3)
    middle = phantoms_hebt.phantom(31)[..., 15]
    assert distance(middle, phantoms_hebt.phantom(31, planes=1)[..., 0]) < 0.1


def test_counts_are_the_papers():
    """About 35 (Ag) and 28 (Au) per pixel of the object, at which its optima appear."""
    maps = counts(phantoms_hebt.phantom(97, planes=1)).chem.projections
    inside = maps.sum(0) > 0.5
    np.testing.assert_allclose(maps[:, inside].mean(1), (35, 28), rtol=0.1)


def test_signals_follow_dose_detector_and_cross_sections():
    """Eqs. 4 and 13: linear in all of them, each modality in its own."""
    truth = phantoms_hebt.phantom(24, planes=1)
    plain = counts(truth)
    for more, chem, haadf in (({"dose": 3 * signals.DOSE}, 3, 1), ({"haadf_dose": 2e5}, 1, 2),
                              ({"collected": 0.1}, 1, 2), ({"solid_angle": 0.1}, 0.25, 1),
                              ({"efficiency": 0.5}, 0.5, 1)):
        other = counts(truth, **more)
        assert distance(other.chem.projections, chem * plain.chem.projections) < 1e-6
        assert distance(other.haadf.projections, haadf * plain.haadf.projections) < 1e-6
        np.testing.assert_allclose(other.sensitivity, chem * plain.sensitivity)
    brighter = signals.bimodal(truth, [replace(line, elastic=2 * line.elastic) for line in LINES], pixel_size=1.5,
                               chem_angles=phantoms_hebt.ANGLES, noise=False)
    assert distance(brighter.haadf.projections, 2 * plain.haadf.projections) < 1e-6
    assert distance(brighter.chem.projections, plain.chem.projections) < 1e-6


def test_haadf_is_the_weighted_sum_of_the_maps():
    """Eqs. 15 and 16, with the doses."""
    data = counts(phantoms_hebt.phantom(24, planes=1))
    ratios = [signals.HAADF_DOSE * signals.COLLECTED * line.z / (
        signals.DOSE * signals.SOLID_ANGLE / (4 * np.pi) * line.f()) for line in LINES]
    assert distance(np.tensordot(ratios, data.chem.projections, 1), data.haadf.projections[0]) < 1e-5


def test_noise_is_poissons_and_follows_the_seed():
    truth = phantoms_hebt.phantom(48, planes=4)
    clean, one, same, other = (counts(truth, noise=noise, seed=seed, background=2.0)
                               for noise, seed in ((False, 0), (True, 1), (True, 1), (True, 2)))
    assert (one.chem.projections == same.chem.projections).all()
    assert (one.chem.projections != other.chem.projections).any()
    assert clean.chem.projections.min() == pytest.approx(2)
    for noisy, expected in ((one.chem, clean.chem), (one.haadf, clean.haadf)):
        bright = expected.projections > 1
        deviation = (noisy.projections - expected.projections)[bright] / np.sqrt(expected.projections[bright])
        assert np.mean(deviation**2) == pytest.approx(1, abs=0.05)
    with pytest.raises(DataError, match="one each"):
        signals.bimodal(truth, LINES[:1], pixel_size=1.5, chem_angles=phantoms_hebt.ANGLES)
