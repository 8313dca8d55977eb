"""Specimens of 2D microscopy are the same at every size, and measured with the noise that was asked for."""

import numpy as np
import pytest

from engine import simulate
from engine.data import DataError
from engine.phantoms2d import ELEMENTS, FIELD_NM, phantom
from tests.specimens import distance

YIELDS = {"Ga": 2e-4, "O": 1e-4, "haadf": 0.05}  # counts per electron


@pytest.mark.parametrize("name", list(ELEMENTS))
def test_sizes_show_one_specimen(name):
    fine, coarse = phantom(name, 128), phantom(name, 64)
    binned = fine.reshape(len(fine), 1, 64, 2, 64, 2).mean((3, 5))
    # Each size has its own largest pixel.
    assert distance(binned * np.vdot(binned, coarse) / np.vdot(binned, binned), coarse) < 0.05
    assert fine.shape == (len(ELEMENTS[name]), 1, 128, 128) and fine.dtype == np.float32
    assert fine.min() >= 0 and fine.max() <= 1


def test_a_core_of_cos_lies_in_a_shell_of_coo():
    cobalt, sulphur, oxygen = phantom("coscoo", 96)[:, 0]
    np.testing.assert_allclose(cobalt, sulphur + oxygen, atol=1e-6)
    assert (cobalt[sulphur > 0] > sulphur[sulphur > 0]).all()  # shell above and below the core
    assert cobalt.max() == 1 and not cobalt[[0, -1]].any() and not cobalt[:, [0, -1]].any()


def test_the_film_is_gallium_oxide():
    gallium, oxygen = phantom("ga2o3", 96)[:, 0]
    np.testing.assert_allclose(3 * gallium, 2 * oxygen, atol=1e-6)
    assert gallium.max() == pytest.approx(0.4) and 0.3 < (gallium > 0).mean() < 0.6


def test_the_lattice_has_two_phases_and_a_sharp_interface():
    copper, sulphur, zinc = phantom("zns_cus", 160)[:, 0]
    left, right = np.s_[:, :76], np.s_[:, 108:]
    assert zinc[left].sum() / sulphur[left].sum() == pytest.approx(1, rel=0.03)
    assert copper[right].sum() / sulphur[right].sum() == pytest.approx(64 / 36, rel=0.03)
    assert copper[left].sum() < 0.06 * copper.sum() and zinc[right].sum() < 1e-3 * zinc.sum()
    # The step: the interface lies at another column in the other half.
    upper, lower = (np.argmax(np.cumsum(half.sum(0)) > 0.02 * half.sum()) for half in (copper[:72], copper[88:]))
    assert lower - upper > 10


def test_noise_is_of_the_snr_asked_for():
    elements = ELEMENTS["ga2o3"]
    data = simulate.microscopy(phantom("ga2o3", 128), tuple(elements.values()), tuple(elements), pixel_size=1.0,
                               snr={"Ga": 3.0, "O": 5.0, "haadf": 50.0}, seed=3)
    np.testing.assert_allclose(data.chem.projections.mean((1, 2, 3)), [2, 4], rtol=0.03)
    assert data.haadf.projections.mean() == pytest.approx(49, rel=0.02) and data.haadf.units == "counts"
    expected = data.truth * data.sensitivity[:, None, None, None]
    assert np.mean((data.chem.projections - expected) ** 2) == pytest.approx(expected.mean(), rel=0.05)


def test_noise_is_of_the_dose_asked_for():
    """Ten times the electrons are ten times the counts, at yields that do not depend on what lies elsewhere."""
    elements = ELEMENTS["ga2o3"]
    for dose in (1e4, 1e5):
        data = simulate.microscopy(phantom("ga2o3", 64), tuple(elements.values()), tuple(elements), pixel_size=1.0,
                                   dose=dose, yields=YIELDS, gamma=1.7)
        np.testing.assert_allclose(data.sensitivity, [dose * YIELDS["Ga"], dose * YIELDS["O"]], rtol=1e-6)
        image = data.truth[0] + (8 / 31) ** 1.7 * data.truth[1]
        assert data.haadf.projections.sum() == pytest.approx(dose * YIELDS["haadf"] * image.sum(), rel=0.01)


def test_where_the_power_is_taken_is_the_simulators_choice():
    elements = ELEMENTS["coscoo"]
    truth = phantom("coscoo", 64)
    images = {}
    for weights, power in (("z_gamma_linear", 1.0), ("z_gamma", 1.7)):
        data = simulate.microscopy(truth, tuple(elements.values()), tuple(elements), pixel_size=1.0, weights=weights,
                                   snr=dict.fromkeys(elements, 5.0) | {"haadf": 1e5})
        image = np.tensordot(np.array([27.0, 16, 8]) ** 1.7, truth**power, 1)
        found = data.haadf.projections[0].astype(float)
        assert distance(found * np.vdot(found, image) / np.vdot(found, found), image) < 0.01
        images[weights] = found
    assert distance(*images.values()) > 0.1


def test_background_is_a_share_of_the_brightest_pixel_and_told():
    elements = ELEMENTS["ga2o3"]
    data = simulate.microscopy(phantom("ga2o3", 64), tuple(elements.values()), tuple(elements), pixel_size=1.0,
                               snr={"Ga": 9.0, "O": 9.0, "haadf": 50.0}, background=0.15)
    vacuum = ~(data.truth > 0).any(0)
    level = 0.15 * data.sensitivity * [0.4, 0.6]
    np.testing.assert_allclose(np.ravel(data.chem.background), level, rtol=1e-5)
    np.testing.assert_allclose(data.chem.projections[:, vacuum].mean(1), level, rtol=0.1)


def test_noise_follows_from_its_seed_and_an_snr_of_1_is_refused():
    elements = ELEMENTS["ga2o3"]

    def maps(seed, snr=4.0):
        return simulate.microscopy(phantom("ga2o3", 32), tuple(elements.values()), tuple(elements), pixel_size=1.0,
                                   snr={"Ga": snr, "O": 4.0, "haadf": 50.0}, seed=seed).chem.projections

    np.testing.assert_array_equal(maps([1, 2]), maps([1, 2]))
    assert (maps([1, 2]) != maps([1, 3])).any()
    with pytest.raises(DataError, match="SNR"):
        maps(0, 1.0)


def test_fields_of_view_hold_whole_specimens():
    assert FIELD_NM.keys() == ELEMENTS.keys()
    for name in ("coscoo", "ga2o3"):
        maps = phantom(name, 64)
        assert not maps[..., [0, -1], :].any() and not maps[..., [0, -1]].any()
