"""Registration of measured series: planted shifts are found, bad images are left out, and counts stay counts."""

from dataclasses import replace

import numpy as np
import pytest

from engine import regions, registration
from engine.align import Alignment, Level, joint
from engine.data import DataError
from engine.measured import Recording
from engine.registration import Series, register, ungauged
from tests.specimens import blobs

ANGLES = np.linspace(-70, 70, 29)
LEVELS = (Level(4, 20, ("shift", "axis")), Level(2, 20, ("shift", "axis")), Level(1, 20, ("shift", "axis")))


def planted(shift=6.0, axis=2.0, turn=2.0, seed=1):
    rng, none = np.random.default_rng(seed), np.zeros(len(ANGLES))
    return Alignment(rng.uniform(-shift, shift, (len(ANGLES), 2)) + [axis, 0], none + turn, none, none)


def whole(seed=0, count=25):
    """Places of blobs that no shift of `planted` brings to an image's edge, and their heights."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-8, 8, (count, 3)), rng.uniform(0.5, 1.5, count)


def slab(seed=0):
    """Blobs of a slab far wider than an image."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (700, 3)) * [6, 90, 40], rng.uniform(0.5, 1.5, 700)


def series(images, alignment=None):
    tilts = len(images)
    return Series(np.asarray(images, np.float32), ANGLES, alignment or Alignment.none(tilts), np.zeros(tilts),
                  np.ones(tilts, bool), {}, np.full(tilts, np.nan))


def apart(found, true):
    """Root mean square error along y and x [pixel], less what a moved volume shows."""
    return np.sqrt((ungauged(found.shifts - true.shifts, ANGLES) ** 2).mean(0))


@pytest.fixture(scope="module")
def seen():
    """An isolated specimen's images, misaligned."""
    true = planted()
    return true, blobs(true, ANGLES, *whole())


def test_centres_of_mass_bring_a_whole_specimen_to_the_axis(seen):
    true, images = seen
    found = registration.centre_of_mass(series(images), ("y", "x"))
    assert (apart(found.alignment, replace(true, inplane=true.inplane * 0)) < 0.35).all()  # 2 degrees of turn are left
    moved = found.moved()
    places = np.arange(48) - 23.5
    assert np.abs((moved.sum(2) @ places) / moved.sum((1, 2))).max() < 0.05


def test_common_lines_align_along_the_axis_alone(seen):
    true = planted(turn=0.0)
    found = registration.common_line(series(blobs(true, ANGLES, *whole())))
    assert apart(found.alignment, true)[1] < 0.06 and not found.alignment.shifts[:, 0].any()


def test_neighbours_of_a_slab_that_leaves_the_field_are_correlated():
    true = planted(turn=0.0)
    found = registration.cross_correlation(series(blobs(true, ANGLES, *slab())))
    # Within what the slab's thickness shows; the axis is found later.
    assert (apart(found.alignment, replace(true, shifts=true.shifts - [2, 0])) < 0.8).all()


def test_a_turned_axis_is_one_number_for_all_images(seen):
    true, images = seen
    begun = registration.centre_of_mass(series(images), ("y", "x")).alignment
    found = registration.match(series(images, begun), LEVELS).alignment
    assert np.ptp(found.inplane) < 1e-9
    assert abs(found.inplane[0] - 2) < 0.05 and (apart(found, true) < 0.05).all()


def test_a_match_along_one_axis_moves_along_it_alone():
    true = planted(1.5, turn=0.0)
    begun = replace(true, shifts=true.shifts * [0, 1])
    found = registration.match(series(blobs(true, ANGLES, *whole()), begun), [Level(2, 20)], axes=("y",)).alignment
    np.testing.assert_array_equal(found.shifts[:, 1], true.shifts[:, 1])
    assert apart(found, true)[0] < 0.1


def test_a_match_looks_at_a_region_alone():
    """Where all of the specimen lies in a part of the images, that part tells the same."""
    true, off = planted(2.0, axis=1.0), np.array([0.0, 4.0, -5.0])
    places, heights = whole()
    images = blobs(true, ANGLES, places * 0.8 + off, heights)
    begun = series(images, replace(true, shifts=true.shifts + np.random.default_rng(5).uniform(-1, 1, (29, 2)),
                                   inplane=0 * ANGLES))
    found = registration.match(begun, LEVELS, region=((16, 42), (8, 34)))
    assert (apart(found.alignment, true) < 0.05).all() and abs(found.alignment.inplane[0] - 2) < 0.1


def test_every_image_moved_by_a_pixel_moves_every_shift_by_one(seen):
    _, images = seen
    stages = [("centre_of_mass", {"axes": ("y", "x")}), ("match", {"levels": LEVELS})]
    one = register(images, ANGLES, stages, bins=2)
    other = register(np.roll(images, (1, 2), (1, 2)), ANGLES, stages, bins=2)
    np.testing.assert_allclose(other.alignment.shifts - one.alignment.shifts, np.tile([1.0, 2.0], (29, 1)), atol=0.05)
    assert one.residual.mean() < one.before.mean() / 3


def test_gain_and_background_change_no_shift(seen):
    _, images = seen
    stages = [("background", {}), ("centre_of_mass", {"axes": ("y", "x")}), ("common_line", {})]
    one, other = (register(each, ANGLES, stages, bins=4) for each in (images, 300 * images - 31000))
    np.testing.assert_allclose(one.alignment.shifts, other.alignment.shifts, atol=0.06)
    np.testing.assert_allclose(other.level, -31000, atol=1)


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda image: image * 0, "blank"), (lambda image: image * 3, "3 times as bright"),
    (lambda image: image * 0.5, "0.5 times as bright")])
def test_a_bad_image_is_left_out_with_a_word(seen, spoil, words):
    _, images = seen
    images = images.copy()
    images[11] = spoil(images[11])
    found = registration.outliers(series(images))
    assert np.flatnonzero(~found.used).tolist() == [11]
    assert words in found.words[11] and f"{ANGLES[11]:g} degrees" in found.words[11]


def test_an_image_that_the_volume_does_not_explain_is_left_out(seen):
    _, images = seen
    images = images.copy()
    images[20] = np.flip(images[20], 0)  # as bright as it was
    stages = [("centre_of_mass", {"axes": ("y", "x")}), ("match", {"levels": LEVELS[:1]}), ("outliers", {})]
    found = register(images, ANGLES, stages, bins=2)
    assert np.flatnonzero(~found.used).tolist() == [20] and "misses the volume" in found.words[20]
    assert np.isnan(found.residual[20]) and np.isfinite(found.alignment.shifts).all()


def test_a_good_series_loses_no_image(seen):
    assert registration.outliers(series(seen[1])).used.all()


def test_too_few_images_are_refused(seen):
    with pytest.raises(DataError, match="three"):
        register(seen[1][:2], ANGLES[:2], [("background", {})])


def test_shifts_between_angles_lie_between():
    true = planted()
    there = registration.at(true, ANGLES, np.array([-90.0, ANGLES[3], (ANGLES[3] + ANGLES[4]) / 2]))
    np.testing.assert_allclose(there.shifts, [true.shifts[0], true.shifts[3], true.shifts[3:5].mean(0)])


def test_a_wide_volume_explains_a_slab_that_leaves_the_field():
    """Where a volume ends at the field's edge, what enters it at high tilts is unexplained."""
    images = blobs(planted(0, 0, 0), ANGLES, *slab())
    narrow, wide = (joint(images, ANGLES, registration.align.Settings((Level(2, 1),), extent=extent)).before.mean()
                    for extent in ((1.0, 1.0), (1.0, 3.0)))
    assert wide < narrow / 1.5


def recording(images, true, units):
    none = np.zeros((1, 1, 1, 1), np.float32)
    return Recording(np.asarray(images)[None], ANGLES, ("HAADF",), units, -true.shifts, none, 1.0, "a test",
                     true.inplane)


def test_images_are_taken_once_from_where_they_lie(seen):
    true, images = seen
    crop = {"y": [14, 34], "x": [14, 34]}
    taken, = regions.prepare(recording(images, true, "intensity"), crop=crop)
    plain = blobs(planted(0, 0, 0), ANGLES, *whole())[:, 14:34, 14:34]
    assert np.abs(taken.projections[0] - plain).max() < 5e-3 * plain.max()


def test_counts_are_taken_from_the_nearest_pixel(seen):
    true, images = seen
    counts = np.random.default_rng(0).poisson(images)
    taken, = regions.prepare(recording(counts, true, "counts"), crop={"y": [14, 34], "x": [14, 34]})
    assert (taken.projections == np.rint(taken.projections)).all()
    straight, rounded = replace(true, inplane=0 * ANGLES), replace(true, shifts=np.rint(true.shifts))
    for unturned in (straight, replace(straight, shifts=rounded.shifts)):
        fine = recording(counts, unturned, "counts")
        one, = regions.prepare(fine, crop={"y": [14, 34], "x": [14, 34]})
        other, = regions.prepare(replace(fine, turns=None), crop={"y": [14, 34], "x": [14, 34]})
        np.testing.assert_array_equal(one.projections, other.projections)


def test_a_region_that_a_turned_image_does_not_cover_is_refused(seen):
    true, images = seen
    with pytest.raises(DataError, match="does not cover"):
        regions.prepare(recording(images, true, "intensity"), crop={"y": [2, 46], "x": [14, 34]})
    largest, = regions.prepare(recording(images, true, "intensity"))
    assert 20 < largest.projections.shape[2] < 36
