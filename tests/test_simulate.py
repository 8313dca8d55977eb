"""Specimens are the same at every size; simulated measurements have the noise and background that they claim."""

from functools import cache

import numpy as np
import pytest

from engine import simulate
from engine.data import DataError, estimate_noise
from engine.phantoms import ELEMENTS, FIELD_NM, phantom, specimen
from tests.specimens import distance, simulated

NAMES = ("cocuo", "conio")


@pytest.fixture(scope="module")
def volumes():
    """Both specimens at 32 and 64 voxels."""
    return {(name, size): phantom(name, (size,) * 3, FIELD_NM / size) for name in NAMES for size in (32, 64)}


@pytest.mark.parametrize("name", NAMES)
def test_mass_does_not_depend_on_the_size(volumes, name):
    mass = {size: volumes[name, size].sum((1, 2, 3), dtype=float) * (FIELD_NM / size) ** 3 for size in (32, 64)}
    np.testing.assert_allclose(mass[32], mass[64], rtol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_show_one_specimen(volumes, name):
    fine = volumes[name, 64]
    binned = fine.reshape(len(fine), 32, 2, 32, 2, 32, 2).mean((2, 4, 6))
    assert distance(binned, volumes[name, 32]) < 0.05  # coverage comes in steps of 1/64 of a voxel


def test_cubes_are_whole_and_do_not_overlap(volumes):
    """Every nm^3 of every cube is in the volume: none is cut off by the field or lost to another."""
    bodies = specimen("cocuo")
    volume = dict(zip(ELEMENTS["cocuo"], volumes["cocuo", 64], strict=True))
    for element, count in (("Co", 5), ("Cu", 4)):
        edges = [2 * b.radius / np.sqrt(3) for b in bodies if element in b.content]
        assert len(edges) == count and all(28 <= edge <= 44 for edge in edges)
        mass = volume[element].sum(dtype=float) * (FIELD_NM / 64) ** 3
        assert mass == pytest.approx(np.sum(np.power(edges, 3)), rel=0.01)
    assert (volume["Co"] + volume["Cu"]).max() <= 1 + 1e-6
    np.testing.assert_allclose(volume["O"], volume["Co"] + volume["Cu"], atol=1e-6)


def test_gold_is_on_the_cubes_and_not_in_them(volumes):
    radii = [b.radius for b in specimen("cocuo") if "Au" in b.content]
    assert len(radii) == 4 * 9 and all(4 <= r <= 7 for r in radii)
    volume = dict(zip(ELEMENTS["cocuo"], volumes["cocuo", 64], strict=True))
    mass = volume["Au"].sum(dtype=float) * (FIELD_NM / 64) ** 3
    assert 0.9 < mass / (4 / 3 * np.pi * np.power(radii, 3).sum()) <= 1.01
    assert (volume["Au"] + volume["O"]).max() <= 1 + 1e-6


def test_conio_is_particles_within_a_support(volumes):
    co, ni, o = volumes["conio", 64]
    np.testing.assert_allclose(o, co + ni, atol=1e-6)
    assert o.max() <= 1 + 1e-6 and 0.05 < co.sum() / ni.sum() < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_concentrations_lie_between_0_and_1_and_stay_in_the_field_at_every_tilt(volumes, name):
    volume = volumes[name, 64]
    assert volume.dtype == np.float32 and volume.min() >= 0 and volume.max() <= 1 + 1e-6
    z, y = np.indices((64, 64)) - 31.5
    assert not volume[:, np.hypot(z, y) > 32].any()


def test_specimens_do_not_depend_on_when_they_are_drawn():
    np.random.default_rng().random(7)
    np.testing.assert_array_equal(phantom("cocuo", (12,) * 3, 12.5), phantom("cocuo", (12,) * 3, 12.5))
    wide = phantom("cocuo", (16, 20, 12), 12.5)
    np.testing.assert_allclose(wide[:, 2:14, 4:16], phantom("cocuo", (12,) * 3, 12.5), atol=1e-6)


# ---- Angles


def test_angles_are_spread_evenly():
    np.testing.assert_allclose(simulate.spread((-70, 70), 5), [-70, -35, 0, 35, 70])
    np.testing.assert_allclose(simulate.spread((-60, 70), 1), [5])
    assert simulate.spread((-70, 70), 0).size == 0


@pytest.mark.parametrize(("haadf", "chem"), [(47, 9), (9, 9), (5, 3), (71, 47), (9, 1)])
def test_maps_are_taken_with_images(haadf, chem):
    images = simulate.spread((-70, 70), haadf)
    maps = simulate.chemical_angles((-70, 70), haadf, chem)
    assert len(maps) == len(set(maps)) == chem and set(maps) <= set(images)
    if chem > 1:
        assert maps[0] == -70 and maps[-1] == 70
        assert np.diff(maps).max() - np.diff(maps).min() <= 140 / (haadf - 1) + 1e-9


@pytest.mark.parametrize(("haadf", "chem", "choice"), [(0, 5, "subset"), (5, 9, "subset"), (9, 5, "even")])
def test_maps_spread_on_their_own(haadf, chem, choice):
    maps = simulate.chemical_angles((-70, 70), haadf, chem, choice)
    np.testing.assert_allclose(maps, simulate.spread((-70, 70), chem))


# ---- Noise


@pytest.fixture
def clean():
    """Projections (element, tilt, y, x) of a body before vacuum."""
    image = np.zeros((2, 6, 40, 40))
    image[0, :, 10:30, 8:30] = 2.0
    image[1, :, 15:22, 10:20] = np.linspace(0.1, 1, 10)
    return image


@pytest.mark.parametrize("background", [0.0, 0.15])
def test_mean_counts_are_snr_minus_one(clean, background):
    snr = np.array([1.92, 2208.67])
    counts, gain, offset = simulate.poisson_series(clean, snr, background, np.random.default_rng(0))
    error = np.sqrt((snr - 1) / clean[0].size)
    assert (np.abs(counts.mean((1, 2, 3)) - (snr - 1)) < 5 * error).all()
    # Vacuum holds the background alone: a share of the brightest clean pixel.
    np.testing.assert_allclose(offset, background * gain * clean.max((1, 2, 3)), rtol=1e-6)
    vacuum = counts[:, :, :8].mean((1, 2, 3))
    assert (np.abs(vacuum - offset) <= 5 * np.sqrt(offset / clean[0, :, :8].size)).all()
    # Poisson: the variance is the mean.
    bright = counts[0, :, 10:30, 8:30]
    assert bright.var() == pytest.approx(bright.mean(), rel=0.1)
    assert bright.mean() - offset[0] == pytest.approx(2 * gain[0], rel=0.05)


@pytest.mark.parametrize("snr", [1.0, 0.5, -3.0])
def test_an_snr_that_cannot_be_had_is_refused(clean, snr):
    with pytest.raises(DataError, match="SNR"):
        simulate.poisson_series(clean, np.array([2.0, snr]), 0.15, np.random.default_rng(0))


def test_data_hold_what_the_simulation_knew(tiny):
    """At the truth and with the sensitivities handed over, maps differ from the model by Poisson noise alone."""
    model = simulate.clean_projections(tiny.truth, tiny.chem.angles, 16) * tiny.sensitivity[:, None, None, None]
    expected = model + tiny.chem.background
    np.testing.assert_allclose(tiny.chem.background.ravel(), 0.15 * model.max((1, 2, 3)), rtol=1e-5)
    chi_square = ((tiny.chem.projections - expected) ** 2 / expected).mean()
    assert chi_square == pytest.approx(1, abs=0.1)
    assert tiny.haadf.projections.mean() == pytest.approx(2207.67, rel=0.01)
    assert set(tiny.chem.angles) <= set(tiny.haadf.angles)


def test_haadf_is_the_power_law_of_the_truth(tiny):
    weight = np.array(tiny.numbers) ** 1.6
    scatter = np.tensordot(weight, tiny.truth**1.6, 1)[None].astype(np.float32)
    images = simulate.clean_projections(scatter, tiny.haadf.angles, 16)[0]
    gain = np.vdot(images, tiny.haadf.projections[0]) / np.vdot(images, images)
    assert distance(gain * images, tiny.haadf.projections[0]) < 0.03


def test_seeds_reproduce_and_others_differ():
    first, again, other = (simulated(12, 5, 3, seed=[7, replicate]) for replicate in (0, 0, 1))
    for series in ("chem", "haadf"):
        a, b, c = (getattr(data, series).projections for data in (first, again, other))
        np.testing.assert_array_equal(a, b)
        assert (a != c).mean() > 0.3


def test_an_empty_list_of_images_gives_maps_alone():
    data = simulated(12, 0, 3)
    assert data.haadf is None and data.chem.tilts == 3


# ---- The estimate of the noise, for images that come without one


@pytest.mark.parametrize("sigma", [5.0, 30.0])
def test_noise_of_flat_and_sloping_images_is_found(sigma):
    y, x = np.indices((64, 64))
    images = np.stack([1000.0 + 0 * x, 500 + 20 * x - 7 * y]) + np.random.default_rng(0).normal(0, sigma, (2, 64, 64))
    assert estimate_noise(images) == pytest.approx(sigma, rel=0.05)
    assert estimate_noise(1e3 * images) == pytest.approx(1e3 * estimate_noise(images), rel=1e-6)


@cache
def clean_slab(size, columns):
    """Noise-free images (element, tilt, y, x) of the middle of `cocuo`."""
    truth = phantom("cocuo", (size, size, columns), FIELD_NM / size)
    weight = (np.array(list(ELEMENTS["cocuo"].values())) / 79) ** 1.6
    scatter = np.tensordot(weight, truth**1.6, 1)[None].astype(np.float32)
    return simulate.clean_projections(scatter, [-50, 0, 35], size)


def noisy_slab(size, columns, snr):
    """Images (tilt, y, x), and the noise of their brighter half."""
    clean = clean_slab(size, columns)
    images = simulate.poisson_series(clean, np.array([snr]), 0.0, np.random.default_rng(0))[0][0]
    return images, np.sqrt(images[images > np.median(images)].mean(dtype=float))


@pytest.mark.parametrize("snr", [300.0, 2208.67])
def test_noise_of_an_image_is_found_where_it_is_bright(snr):
    images, noise = noisy_slab(256, 8, snr)
    assert estimate_noise(images) == pytest.approx(noise, rel=0.2)


def test_noise_of_a_coarse_image_is_never_taken_for_less():
    """Where edges are everywhere they pass for noise: too cautious, by a factor of a few."""
    images, noise = noisy_slab(48, 48, 2208.67)
    assert noise < estimate_noise(images) < 5 * noise


def test_a_noise_free_image_still_has_a_level():
    assert estimate_noise(np.full((8, 8), 100.0)) > 0
    assert estimate_noise(np.zeros((8, 8))) > 0
