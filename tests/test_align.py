"""Alignment: planted shifts and turns of blobs, whose projections are known exactly, are found again."""

from dataclasses import replace

import numpy as np
import pytest

from engine import align
from engine.align import FREE, Alignment, Level, Settings, applied, gauge, joint, ungauged
from engine.data import DataError
from engine.euler import matrix
from tests.specimens import distance

SIZE, SIGMA, RADIUS = 48, 2.0, 15.0  # [pixel]
ANGLES = np.linspace(-75, 75, 36)
ALL = tuple(FREE)


def blobs(seed=0):
    """Places (blob, 3) in a sphere about the centre, and heights."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(-1, 1, (80, 3))
    places = RADIUS * places[np.linalg.norm(places, axis=1) < 1][:30]
    return places, rng.uniform(0.5, 1.5, len(places))


def shown(alignment, angles=ANGLES, places=None, heights=None):
    """Images (tilt, y, x) of Gaussian blobs: integrals along the beam, without any volume."""
    if places is None:
        places, heights = blobs()
    axis, images = np.arange(SIZE) - (SIZE - 1) / 2, []
    for t, angle in enumerate(angles):
        turn = (matrix([alignment.inplane[t], 0, 0]) @ matrix([0, alignment.azimuth[t], 0])
                @ matrix([0, 0, angle + alignment.tilt[t]]))
        seen = (places @ turn.T)[:, 1:] + alignment.shifts[t]
        y, x = (np.exp(-((axis - seen[:, [k]]) ** 2) / (2 * SIGMA**2)) for k in (0, 1))
        images.append(np.einsum("k,ky,kx->yx", heights, y, x))
    return np.array(images, np.float32) * SIGMA * np.sqrt(2 * np.pi)


def planted(shift=3.0, inplane=0.0, tilt=0.0, azimuth=0.0, seed=1):
    rng, tilts = np.random.default_rng(seed), len(ANGLES)
    return Alignment(rng.uniform(-shift, shift, (tilts, 2)), *(rng.uniform(-v, v, tilts)
                                                               for v in (inplane, tilt, azimuth)))


def left(found, true):
    """Root mean square errors of shifts [pixel] and turns [deg], less what a moved volume shows as well."""
    names = ("shifts", "inplane", "tilt", "azimuth")
    off, _ = ungauged(Alignment(*(getattr(found, name) - getattr(true, name) for name in names)), ANGLES)
    return {name: float(np.sqrt((getattr(off, name) ** 2).mean())) for name in names}


def levels(free, last=60):
    return Settings((Level(4, 20), Level(2, 30, free), Level(1, last, free)))


@pytest.mark.parametrize(("true", "free"), [
    (planted(), ("shift",)), (planted(inplane=1.0), ("shift", "inplane")),
    (planted(inplane=1.0, tilt=0.5, azimuth=0.5), ALL)])
def test_planted_shifts_and_turns_are_found(true, free):
    found = joint(shown(true), ANGLES, levels(free, 100))
    off = left(found.alignment, true)
    assert off["shifts"] < 0.02
    assert max(off[name] for name in ("inplane", "tilt", "azimuth")) < 0.05
    assert found.residual.max() < 0.01 < 0.1 < found.before.min()


def test_an_aligned_series_stays_where_it_is():
    found = joint(shown(Alignment.none(36)), ANGLES, levels(ALL, 20))
    off = left(found.alignment, Alignment.none(36))
    assert off["shifts"] < 0.01 and max(off[name] for name in ("inplane", "tilt", "azimuth")) < 0.1


def test_with_noise_errors_are_near_the_least_that_any_method_has():
    """Cramer and Rao's bound for each image beside a volume that is known."""
    true, plain = planted(inplane=1.0), shown(Alignment.none(36))
    sigma = 0.1 * plain.max()
    noise = sigma * np.random.default_rng(0).standard_normal(plain.shape).astype(np.float32)
    off = left(joint(shown(true) + noise, ANGLES, levels(("shift", "inplane"), 20)).alignment, true)
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    along_y, along_x = np.gradient(plain, axis=(1, 2))
    slopes = np.stack([along_y, along_x, axis * along_y - axis[:, None] * along_x])
    least = np.linalg.inv(np.einsum("ityx,jtyx->tij", slopes, slopes) / sigma**2)
    shift, _, turn = np.sqrt(np.diagonal(least, axis1=1, axis2=2).mean(0))
    assert off["shifts"] < 1.7 * shift and off["inplane"] < 1.7 * np.degrees(turn)


def test_a_turned_specimen_gives_a_turned_volume():
    """Every angle 90 degrees more, and the specimen 90 degrees less: the same images, a volume turned about x."""
    images = shown(planted(inplane=0.5))
    settings = levels(("shift", "inplane"), 10)
    one, other = (joint(images, angles, settings) for angles in (ANGLES, ANGLES + 90))
    # +z goes toward +y: what was along y is now along z.
    assert distance(np.rot90(other.volume, -1, (1, 0)), one.volume) < 0.02
    np.testing.assert_allclose(one.alignment.shifts, other.alignment.shifts, atol=0.02)


def test_what_a_moved_volume_shows_is_the_gauge():
    """Blobs that are shifted and turned a little give the images that the gauge says."""
    places, heights = blobs()
    for k, moved in enumerate([*np.eye(3), *np.radians(0.2) * np.eye(3)]):
        change = gauge(np.radians(ANGLES))[:, k].reshape(-1, 5) * moved[k % 3]
        there = places + moved if k < 3 else places @ matrix(np.degrees(moved)).T
        told = Alignment(change[:, :2], *np.degrees(change[:, 2:].T))
        np.testing.assert_allclose(shown(told), shown(Alignment.none(36), places=there, heights=heights), atol=0.02)
        rest, found = ungauged(told, ANGLES)
        assert np.abs(rest.shifts).max() < 1e-6 and np.abs(rest.inplane).max() < 1e-6
        np.testing.assert_allclose(np.concatenate([found[0], np.radians(found[1])])[k], moved[k % 3], rtol=1e-3)


def test_undone_shifts_and_turns_show_the_image_as_it_was():
    true = planted(inplane=3.0)
    images, seen = applied(shown(true), true)
    plain = shown(Alignment.none(36))
    assert distance(images * seen, plain * seen) < 2e-3
    assert seen.min() == 0 and seen[:, 10:-10, 10:-10].all()


def test_turns_are_those_of_the_specimen():
    true = planted(inplane=2.0, tilt=1.0, azimuth=1.0)
    turns = true.turns(ANGLES)
    places, heights = blobs()
    for t in (0, 17, 35):
        seen = places @ matrix(turns[t]).T
        alone = Alignment(*(getattr(true, name)[t:t + 1] for name in ("shifts", "inplane", "tilt", "azimuth")))
        still = Alignment(alone.shifts, *np.zeros((3, 1)))
        np.testing.assert_allclose(shown(still, np.zeros(1), seen, heights), shown(alone, ANGLES[t:t + 1]), atol=1e-4)


def test_a_start_near_the_end_needs_fewer_rounds():
    true = planted()
    images = shown(true)
    near = replace(true, shifts=true.shifts + 0.1)
    short = Settings((Level(1, 10),))
    assert left(joint(images, ANGLES, short, near).alignment, true)["shifts"] < 0.1 * left(
        joint(images, ANGLES, short).alignment, true)["shifts"]


def test_clipped_outlines_are_enough_for_shifts():
    true = planted()
    found = joint(shown(true), ANGLES, Settings((Level(4, 20), Level(2, 20)), clip=0.4))
    assert left(found.alignment, true)["shifts"] < 0.5


def test_each_round_is_told():
    told = []
    joint(shown(planted()), ANGLES, Settings((Level(4, 3), Level(2, 2))),
          observe=lambda level, turn, residual: told.append((level, turn, residual.shape)))
    assert told == [(0, 1, (36,)), (0, 2, (36,)), (0, 3, (36,)), (1, 1, (36,)), (1, 2, (36,))]


@pytest.mark.parametrize(("images", "angles", "settings", "words"), [
    (np.ones((3, 8, 8)), np.zeros(2), Settings(), "an angle for each"),
    (np.full((2, 8, 8), np.nan), np.zeros(2), Settings(), "NaN"),
    (np.stack([np.ones((8, 8)), np.zeros((8, 8))]), np.zeros(2), Settings(), r"images \[1\] are 0"),
    (np.ones((2, 8, 8)), np.zeros(2), Settings((Level(4, 3),)), "does not fit"),
    (np.ones((2, 8, 8)), np.zeros(2), Settings((Level(1, 3, ("twist",)),)), "free is of shift, inplane"),
    (np.ones((2, 8, 8)), np.zeros(2), Settings(()), "no levels"),
])
def test_what_cannot_be_aligned_is_refused(images, angles, settings, words):
    with pytest.raises(DataError, match=words):
        joint(images, angles, settings)


def test_binned_pixels_lie_about_the_middle():
    image = np.arange(7 * 9, dtype=float).reshape(1, 7, 9)
    small = align.binned(image, 2)
    assert small.shape == (1, 3, 4) and small[0, 0, 0] == image[0, :2, :2].mean()
