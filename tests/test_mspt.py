"""MSPT: from scans to a tomogram; stages that stand, masks that hold the specimen, gauges that are fixed."""

from dataclasses import replace

import numpy as np
import pytest

from engine import align, mspt, ptychography
from engine.align import Alignment, Level
from engine.data import DataError
from engine.diffraction import DiffractionSeries
from engine.metrics import correlation
from engine.multislice import Optics
from tests.specimens import distance
from tests.test_align import ANGLES, RADIUS, SIZE, left, planted, shown
from tests.test_ptychography import DEPTH, measured, specimen

FREE = ("shift", "inplane")
LEVELS = align.Settings((Level(4, 20), Level(2, 20, FREE), Level(1, 20, FREE)))


@pytest.fixture(scope="module")
def true():
    return planted(inplane=1.0)


@pytest.fixture(scope="module")
def made(true):
    return mspt.tomogram(0.01 * shown(true), ANGLES, 100.0, mspt.Settings(alignment=LEVELS), reference=true)


def sphere(radius):
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    return np.linalg.norm(np.stack(np.meshgrid(axis, axis, axis, indexing="ij")), axis=0) < radius


def test_a_tomogram_lies_where_its_reference_has_it(made, true):
    plain = align.reconstructed(shown(Alignment.none(len(ANGLES))), ANGLES, Alignment.none(len(ANGLES)))[0]
    assert correlation(made.volume, plain) > 0.97
    off = made.alignment.less(true)
    assert np.sqrt((off.shifts**2).mean()) < 0.02 and np.sqrt((off.inplane**2).mean()) < 0.05
    assert left(made.alignment, true)["shifts"] == pytest.approx(np.sqrt((off.shifts**2).mean()), abs=1e-3)
    assert made.residual.max() < 0.05 < made.before.min()


def test_volts_follow_from_the_phase(made, true):
    """A phase of 1 rad along a voxel is so many volts, and sums along the beam are those of the images."""
    again = mspt.tomogram(0.01 * shown(true), ANGLES, 1.0, mspt.Settings(alignment=LEVELS), reference=true)
    assert distance(100 * again.volume, made.volume) < 1e-4
    np.testing.assert_allclose(again.volume.sum(), 0.01 * shown(true).sum((1, 2)).mean(), rtol=0.03)


def test_a_mask_holds_what_there_is_and_little_else(made):
    assert made.mask.shape == made.volume.shape and made.mask.min() >= 0 and made.mask.max() <= 1
    assert made.volume[made.mask > 0.1].sum() > 0.95 * made.volume.sum()  # its edge is soft
    assert made.mask[~sphere(RADIUS + 8)].max() < 0.05


def test_what_lies_beside_the_specimen_is_masked_out(true):
    """A film that every image shows evenly, and no volume explains."""
    rng = np.random.default_rng(0)
    images = shown(true)
    spoiled = images + 0.15 * images.max() * rng.random(images.shape).astype(np.float32)
    plain = align.reconstructed(shown(true), ANGLES, true)[0]
    masked, bare = (mspt.tomogram(spoiled, ANGLES, 1.0, mspt.Settings(alignment=LEVELS, mask=share), start=true).volume
                    for share in (0.5, 0.0))
    assert correlation(masked, plain) > correlation(bare, plain)
    assert masked[~sphere(RADIUS + 8)].sum() < 0.5 * bare[~sphere(RADIUS + 8)].sum()


def test_the_shadow_of_a_mask_is_where_beams_pass_it():
    mask = sphere(6).astype(np.float32)
    shadow = mspt.shadow(mask, np.array([0.0, 40.0]))
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    inside = np.hypot(*np.meshgrid(axis, axis, indexing="ij"))
    assert (shadow[:, inside < 5] == 1).all() and (shadow[:, inside > 8] == 0).all()


def test_denoising_comes_before_everything(true):
    images, seen = shown(true), []

    def denoise(given):
        seen.append(given.shape)
        return 2 * given

    twice = mspt.tomogram(images, ANGLES, 1.0, mspt.Settings(alignment=LEVELS, denoise=denoise), reference=true)
    once = mspt.tomogram(2 * images, ANGLES, 1.0, mspt.Settings(alignment=LEVELS), reference=true)
    assert seen == [images.shape]
    np.testing.assert_array_equal(twice.volume, once.volume)


def test_an_image_is_the_phase_of_its_scan():
    phases = specimen()
    series = measured(phases)
    found = mspt.image(series, 0, ptychography.Settings(slices=2, depth=DEPTH, iterations=30, refine=()))
    sides = mspt.scanned(series)
    middle = [slice((have - side) // 2, (have + side) // 2) for have, side in zip(phases.shape[1:], sides)]
    assert found.phase.shape == sides
    assert np.corrcoef(found.phase.ravel(), phases.sum(0)[tuple(middle)].ravel())[0, 1] > 0.98
    assert set(found.numbers) >= {"error", "constant", "ramp_y", "ramp_x"}


@pytest.mark.parametrize(("rows", "columns", "step"), [(8, 8, 0.12), (5, 9, 0.2), (4, 4, 0.04)])
def test_a_scan_covers_its_positions_and_half_a_step_around(rows, columns, step):
    y, x = ((np.arange(n) - (n - 1) / 2) * step for n in (rows, columns))
    positions = np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)
    series = DiffractionSeries(np.ones((1, rows * columns, 16, 16)), np.zeros(1), positions, 0.04, Optics())
    for side, count in zip(mspt.scanned(series), (rows, columns)):
        assert side % 2 == 0 and abs(side - count * step / 0.04) <= 2


def test_what_cannot_be_a_tomogram_is_refused(true):
    with pytest.raises(DataError, match="empty"):
        mspt.outline(np.zeros((4, 4, 4)), 0.5)
    with pytest.raises(DataError, match="are 0 everywhere"):
        mspt.tomogram(-shown(true), ANGLES, 1.0, mspt.Settings(alignment=LEVELS))
    dark = measured(specimen())
    with pytest.raises(DataError, match="empty"):
        mspt.image(replace(dark, patterns=0 * dark.patterns), 0, ptychography.Settings())
