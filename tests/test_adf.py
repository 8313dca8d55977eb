"""Linear dark-field tomography: exact projections are understood, and a scan's images are what its probes see."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from engine import adf
from engine.adf import Settings, reconstruct
from engine.atoms import Atoms
from engine.data import DataError, TiltSeries
from engine.diffraction import DiffractionSeries, Scan, simulate
from engine.metrics import correlation
from engine.multislice import Optics
from engine.penalties import total_variation, zero_dual
from engine.projector import geometry, project
from tests.specimens import distance

SIZE, PIXEL = 20, 0.04
ANGLES = np.linspace(-90, 90, 24, endpoint=False)
BLOBS = ((4.0, 1.0, -3.0, 1.0), (-3.0, 5.0, 2.0, 2.0), (0.0, -5.0, 5.0, 1.5))  # z, y, x [voxel], height
WIDTH = 1.6  # [voxel] standard deviation
METHODS = [Settings("resire"), Settings("resire", momentum=False), Settings("genfire"),
           Settings("resire", lambda_tv=1e-3)]


def drawn(blobs=BLOBS):
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    volume = np.zeros((SIZE,) * 3, np.float32)
    for *place, height in blobs:
        z, y, x = (np.exp(-((axis - p) ** 2) / (2 * WIDTH**2)) for p in place)
        volume += height * z[:, None, None] * y[None, :, None] * x[None, None, :]
    return volume


def seen(angles=ANGLES):
    """Analytic projections: a Gaussian's is a Gaussian where its centre lands."""
    turns = np.radians(angles)
    images = [sum(height * np.sqrt(2 * np.pi) * WIDTH * drawn([(0, y * np.cos(t) + z * np.sin(t), x, 1)])[SIZE // 2]
                  / np.exp(-0.125 / WIDTH**2) for z, y, x, height in BLOBS) for t in turns]
    return TiltSeries(np.stack(images)[None], angles, ("HAADF",), PIXEL, "intensity")


@pytest.fixture(scope="module")
def series():
    return seen()


def test_the_projector_sees_the_same(series):
    """But for its linear interpolation, which blurs a Gaussian of 1.6 voxels by two per cent."""
    found = project(jnp.asarray(drawn()), geometry(ANGLES), SIZE)
    assert distance(found, series.projections[0]) < 0.04


@pytest.mark.parametrize("settings", METHODS)
def test_a_volume_is_found_from_its_projections(series, settings):
    found = reconstruct(series, settings)
    assert found.ok and found.volume.shape == (1, SIZE, SIZE, SIZE) and found.volume.min() >= 0
    assert distance(found.volume[0], drawn()) < (0.05 if settings.momentum else 0.1)
    assert found.metrics["residual"] < 0.1 * found.history["residual"][0]


def test_plain_descent_never_climbs(series):
    assert (np.diff(reconstruct(series, METHODS[1]).history["residual"]) < 1e-6).all()


@pytest.mark.parametrize("settings", METHODS)
def test_the_bound_can_be_lifted(series, settings):
    noisy = replace(series, projections=series.projections + np.random.default_rng(0).normal(0, 0.2, (24, 20, 20)))
    assert reconstruct(noisy, replace(settings, iterations=5)).volume.min() == 0
    assert reconstruct(noisy, replace(settings, iterations=5, positivity=False)).volume.min() < 0


@pytest.mark.parametrize("settings", METHODS)
def test_brightness_is_a_factor(series, settings):
    a, b = (reconstruct(replace(series, projections=gain * series.projections), replace(settings, iterations=5)).volume
            for gain in (1, 1000))
    assert distance(b, 1000 * a) < 1e-4


def test_what_is_measured_of_fourier_space_is_the_volumes_transform(series):
    """The central slice theorem, with the array's centre and the sense of the angles."""
    known = adf.measured(series, Settings("genfire", radius=0.01))
    wide = 3 * SIZE
    whole = np.fft.rfftn(np.pad(drawn(), [(0, wide - SIZE), (0, wide - SIZE), (0, 0)])).reshape(wide**2, -1)
    assert len(known.points) > 100
    assert distance(*(np.stack([a.real, a.imag]) for a in (np.asarray(known.values), whole[known.points]))) < 0.01


def test_the_exact_volume_stays_where_it_is():
    """What agrees with its own projections is a fixed point of the descent."""
    truth = drawn()
    own = TiltSeries(np.asarray(project(jnp.asarray(truth), geometry(ANGLES), SIZE))[None], ANGLES, ("HAADF",), PIXEL,
                     "intensity")
    x = jnp.asarray(truth)
    state = adf.Descended(x, x, jnp.float32(1), zero_dual(x))
    after, residual, _ = adf._descend(0, adf.descent(own, Settings()), state, jnp.int32(0))
    assert residual[0] < 1e-5 and distance(after.x, truth) < 1e-5


def test_total_variation_lowers_its_cost_and_the_noise(series):
    """To the least of |A x - b|^2 / 2 + n lambda TV in the images' root mean square, by values near the answer."""
    noisy = adf.with_dose(replace(series, projections=series.projections / 50), 3e4)
    plain, smooth = (reconstruct(noisy, Settings(lambda_tv=weight)).volume[0] for weight in (0.0, 0.02))
    assert distance(smooth, drawn() / 50) < 0.6 * distance(plain, drawn() / 50)
    images = jnp.asarray(noisy.projections[0])
    weight = len(ANGLES) * 0.02 * jnp.sqrt((images**2).mean())

    def cost(volume):
        misfit = project(jnp.asarray(volume), geometry(ANGLES), SIZE) - images
        return float((misfit**2).sum() / 2 + weight * total_variation(jnp.asarray(volume)))

    assert cost(smooth) < min(cost(plain), cost(0.95 * smooth), cost(1.05 * smooth), cost(0.9 * smooth + 0.1 * plain))


@pytest.mark.parametrize("settings", METHODS)
def test_checkpoints_show_shorter_solves(series, settings):
    found = {}
    reconstruct(series, replace(settings, iterations=3), checkpoints=[2], observe=lambda n, v: found.update({n: v}))
    assert distance(found[2], reconstruct(series, replace(settings, iterations=2)).volume) < 1e-6


def test_counts_of_a_dose_spread_as_poisson_says(series):
    share = replace(series, projections=0.1 * series.projections / series.projections.max())
    counted = adf.with_dose(share, 1e6, seed=3)
    electrons = 1e6 * (10 * PIXEL) ** 2 / 24  # of the whole series, in one pixel of one image
    off = electrons * (counted.projections - share.projections)
    assert (off**2).sum() == pytest.approx(electrons * share.projections.sum(), rel=0.1)


SCAN = Scan(size=24, pixel=0.04, probes=6, finer=3, optics=Optics(defocus=0.4), detector=(25, 45))
PAIR = Atoms(["Au", "Cu"], [[0.1, 0.05, -0.1], [-0.15, -0.1, 0.12]])


def test_the_images_are_those_of_the_same_multislice_run():
    """Whole fields are the same waves; a window of them nearly so."""
    pytest.importorskip("gemmi")
    own = adf.images(simulate(PAIR, SCAN, np.array([0.0, 60.0])))
    assert own.pixel_size == pytest.approx(0.16)
    whole = adf.simulate(PAIR, SCAN, np.array([0.0, 60.0]))
    assert distance(whole.projections, own.projections) < 1e-3
    part = adf.simulate(PAIR, SCAN, np.array([0.0, 60.0]), window=0.72)
    assert correlation(part.projections, own.projections) > 0.99


def made(**changes):
    at = np.stack(np.meshgrid([-0.1, 0.1], [-0.1, 0.1], indexing="ij"), -1).reshape(-1, 2)
    given = dict(patterns=np.ones((2, 4, 8, 8)), angles=np.array([0.0, 10.0]), positions=at, pixel=0.04,
                 optics=Optics(), adf=np.arange(8.0).reshape(2, 4))
    return DiffractionSeries(**{**given, **changes})


def test_rows_of_the_scan_are_rows_of_the_images():
    np.testing.assert_array_equal(adf.images(made()).projections[0], np.arange(8).reshape(2, 2, 2))


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"adf": None}, "no dark field"),
    ({"angles": np.array([[0, 0, 0], [5, 0, 10.0]])}, "about x alone"),
    ({"positions": np.array([[-0.1, -0.1], [-0.1, 0.1], [0.1, -0.1], [0.1, 0.12]])}, "no even raster"),
])
def test_what_has_no_images_is_refused(changes, sentence):
    with pytest.raises(DataError, match=sentence):
        adf.images(made(**changes))


def test_what_cannot_be_seen_is_refused(series):
    with pytest.raises(DataError, match="larger scan.finer"):
        adf.simulate(PAIR, replace(SCAN, finer=2, detector=(40, 200)), np.zeros(1))
    with pytest.raises(DataError, match="positive"):
        adf.with_dose(series, 0)
