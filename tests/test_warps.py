"""Maps on their images: planted drift and stretch are found in counts, and undone with the alignment."""

from dataclasses import replace

import numpy as np
import pytest

from engine import regions, warps
from engine.data import DataError
from engine.measured import Recording

SIZE = 64
NONE = warps.identity(1)[0]


def drawn(warp=NONE, seed=0):
    """The picture of blobs as a map with a warp shows it: a value at p of the picture lies at W p."""
    rng = np.random.default_rng(seed)
    places, heights = rng.uniform(-22, 22, (40, 2)), rng.uniform(0.5, 1.5, 40)
    grid = np.indices((SIZE, SIZE)) - (SIZE - 1) / 2
    back = np.linalg.inv(warp[:, :2])
    seen = np.tensordot(back, grid - warp[:, 2][:, None, None], 1)
    return sum(h * np.exp(-((seen - p[:, None, None]) ** 2).sum(0) / 18) for p, h in zip(places, heights, strict=True))


PLANTED = {
    "translation": np.array([[1, 0, 1.7], [0, 1, -2.3]]), "drift": np.array([[1.03, 0, 0.8], [0.05, 1, -1.2]]),
    "affine": np.array([[1.03, 0.02, 0.8], [-0.04, 0.98, -1.2]])}


def off(found, true):
    """Root mean square distance of where the two put pixels [pixel]."""
    places = np.indices((SIZE, SIZE)).astype(float)
    one, other = (warps.warped(places, each, (SIZE, SIZE)) for each in (found, true))
    return np.sqrt(((one - other) ** 2).sum(0).mean())


@pytest.mark.parametrize("kind", list(PLANTED))
def test_a_planted_warp_is_found_in_counts(kind):
    true, image = PLANTED[kind], drawn()
    counts = np.random.default_rng(1).poisson(3 * drawn(true) + 0.2)
    found, = warps.fitted(counts[None], 500 * image[None] + 60, kind)
    assert off(found, true) < 0.25 < off(NONE, true)


def test_gain_and_offset_of_the_image_change_nothing():
    counts = np.random.default_rng(1).poisson(3 * drawn(PLANTED["drift"]))
    one, other = (warps.fitted(counts[None], image[None]) for image in (drawn(), 70 * drawn() - 500))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_map_that_shows_nothing_is_refused():
    noise = np.random.default_rng(2).poisson(1.0, (1, SIZE, SIZE))
    with pytest.raises(DataError, match="shows nothing"):
        warps.fitted(-drawn()[None] + noise * 0, drawn()[None])


def test_a_warp_is_undone_where_a_region_is_taken():
    true = PLANTED["affine"]
    recording = Recording(drawn(true)[None, None], np.zeros(1), ("Co",), "intensity", np.zeros((1, 2)),
                          np.zeros((1, 1, 1, 1), np.float32), 1.0, "a test", np.zeros(1), true[None])
    crop = {"y": [10, 54], "x": [10, 54]}
    taken, = regions.prepare(recording, crop=crop)
    assert np.abs(taken.projections[0, 0] - drawn()[10:54, 10:54]).max() < 5e-3
    plain, = regions.prepare(replace(recording, warps=None), crop=crop)
    assert np.abs(plain.projections[0, 0] - drawn()[10:54, 10:54]).max() > 0.1
