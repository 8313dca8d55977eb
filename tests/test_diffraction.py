"""Simulated 4D-STEM: a share of one beam, the same whatever the grid, counted as electrons are."""

import dataclasses

import numpy as np
import pytest

from engine.atoms import Atoms
from engine.data import DataError
from engine.diffraction import DiffractionSeries, Scan, simulate, with_dose
from engine.multislice import Optics
from tests.specimens import distance

SCAN = Scan(size=24, pixel=0.04, probes=3, finer=2, optics=Optics(defocus=-10))
PAIR = Atoms(["Au", "Cu"], [[0.1, 0.05, -0.1], [-0.15, -0.1, 0.12]])


@pytest.fixture(scope="module")
def series():
    pytest.importorskip("gemmi")
    return simulate(PAIR, SCAN, np.array([0.0, 60.0]))


def test_patterns_are_shares_of_the_beam(series):
    share = series.patterns.sum((2, 3))
    assert series.patterns.shape == (2, 9, 24, 24)
    assert share.max() < 1 + 1e-5 and share.min() > 0.9
    assert series.adf is None  # no wave of these pixels reaches 40 mrad


def test_the_dark_field_is_a_share_of_the_beam():
    """Of what the pattern's field, which ends at 35 mrad, does not hold, where waves reach far enough."""
    pytest.importorskip("gemmi")
    found = simulate(PAIR, dataclasses.replace(SCAN, finer=3, detector=(36, 200)), np.array([0.0]))
    assert found.adf.min() > 0 and (found.adf + found.patterns.sum((2, 3)) < 1 + 1e-4).all()


def test_the_dark_field_is_brightest_at_the_atoms():
    pytest.importorskip("gemmi")
    focused = dataclasses.replace(SCAN, optics=Optics(defocus=0), finer=3)
    found = simulate(Atoms(["Au"], [[0.0, 0.32, -0.32]]), focused, np.array([0.0]))
    assert found.adf[0].argmax() == 6  # the last row, the first column of 3 x 3


def test_without_atoms_in_the_way_a_pattern_is_the_aperture(series):
    """No wave is turned or mirrored: at 0 degrees a probe beside the atoms keeps the round, even disc."""
    away = simulate(Atoms(["O"], [[0, 0, 0.0]]), dataclasses.replace(SCAN, probes=1), np.zeros(1)).patterns[0, 0]
    q = np.hypot(*np.meshgrid(np.arange(24) - 12, np.arange(24) - 12)) / (24 * 0.04)
    edge = 21e-3 / SCAN.optics.wavelength
    assert away[q < edge - 1].min() > 5 * away[q > edge + 1].max()


def test_finer_grids_show_the_same(series):
    finer = simulate(PAIR, dataclasses.replace(SCAN, finer=4, slices=0.05), np.array([0.0, 60.0]))
    assert distance(np.sqrt(finer.patterns), np.sqrt(series.patterns)) < 0.01


def test_atoms_turned_by_hand_show_the_same(series):
    turned = simulate(PAIR.turned((0, 0, 60)), SCAN, np.array([0.0]))
    np.testing.assert_allclose(turned.patterns[0], series.patterns[1], atol=1e-7)


def test_frozen_phonons_blur_but_keep_electrons(series):
    shaken = simulate(PAIR, dataclasses.replace(SCAN, phonons=2), np.array([0.0, 60.0]))
    np.testing.assert_allclose(shaken.patterns.sum((2, 3)), series.patterns.sum((2, 3)), atol=0.02)
    assert 1e-4 < distance(shaken.patterns, series.patterns) < 0.2
    again = simulate(PAIR, dataclasses.replace(SCAN, phonons=2), np.array([0.0, 60.0]), seed=1)
    assert distance(again.patterns, shaken.patterns) > 1e-5


def test_dose_is_of_the_whole_series(series):
    counted = with_dose(series, 1e4, seed=3)
    expected = 1e4 * (10 * 24 * 0.04) ** 2
    assert counted.electrons * 2 * 9 == pytest.approx(expected)
    assert counted.patterns.sum() == pytest.approx(expected * series.patterns.sum() / 18, rel=0.01)
    assert (counted.patterns == np.rint(counted.patterns)).all()
    spread = (counted.patterns - counted.electrons * series.patterns) ** 2
    assert spread.sum() == pytest.approx(counted.patterns.sum(), rel=0.1)


def made(**changes):
    settings = dict(patterns=np.ones((2, 3, 8, 8)), angles=np.array([0.0, 10.0]), positions=np.zeros((3, 2)),
                    pixel=0.04, optics=Optics())
    return DiffractionSeries(**{**settings, **changes})


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"patterns": np.ones((2, 3, 8, 7))}, "n, n"),
    ({"angles": np.zeros(3)}, "3 angles for patterns of 2"),
    ({"positions": np.zeros((4, 2))}, "4 positions for 3"),
    ({"patterns": np.full((2, 3, 8, 8), np.nan)}, "NaN"),
    ({"patterns": np.full((2, 3, 8, 8), -1.0)}, "negative"),
    ({"pixel": 0.0}, "positive"),
    ({"adf": np.zeros((2, 4))}, "dark field"),
])
def test_what_cannot_be_a_series_is_refused(changes, sentence):
    with pytest.raises(DataError, match=sentence):
        made(**changes)


def test_single_angles_are_about_the_tilt_axis():
    np.testing.assert_array_equal(made().angles, [[0, 0, 0], [0, 0, 10]])


def test_what_cannot_be_simulated_is_refused(series):
    with pytest.raises(DataError, match="larger voxels"):
        simulate(Atoms(["Cu"], [[0, 0, 0.6]]), SCAN, np.zeros(1))
    with pytest.raises(DataError, match="once"):
        with_dose(with_dose(series, 1e4), 1e4)
