"""Particles of known size, place and shell are found as they are."""

import numpy as np
import pytest

from engine.data import DataError
from engine.morphology import particles, profile
from sweeps import report, settings
from sweeps.yamlio import SettingsError
from tests.test_bimodal import made

VOXEL = 0.5  # nm


def balls(centres, radii, n=64):
    """Coverage of balls [nm], z, y, x from the middle."""
    axis = (np.arange(n) - (n - 1) / 2) * VOXEL
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    far = [np.sqrt((z - c[0])**2 + (y - c[1])**2 + (x - c[2])**2) for c in centres]
    return np.max([np.clip((r - f) / VOXEL + 0.5, 0, 1) for f, r in zip(far, radii)], 0)


CENTRES, RADII = [(-8, -8, -8), (6, 7, -6), (0, -6, 8), (8, -9, -8)], [4.0, 5.0, 3.0, 2.0]


@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_diameters_and_places_are_those_planted(noise):
    volume = balls(CENTRES, RADII) + noise * np.random.default_rng(3).standard_normal((64,) * 3)
    found = particles(volume, VOXEL, least=2.0)
    assert len(found.volumes) == 4 and not found.cut.any()
    nearest = [np.linalg.norm(found.centres - c, axis=1).argmin() for c in CENTRES]
    assert sorted(nearest) == [0, 1, 2, 3]
    np.testing.assert_allclose(found.diameters[nearest], 2 * np.array(RADII), atol=0.25 * VOXEL)
    np.testing.assert_allclose(found.centres[nearest], CENTRES, atol=0.05)
    mean, sigma = found.spread()
    assert mean == pytest.approx(7.0, rel=0.02) and sigma == pytest.approx(np.std([8, 10, 6, 4]), rel=0.05)


def test_balls_that_touch_are_two_and_a_long_one_is_one():
    touching = particles(balls([(0, 0, -4.6), (0, 0, 4.6)], [5.0, 5.0]), VOXEL)
    assert len(touching.volumes) == 2
    np.testing.assert_allclose(touching.diameters, 10.0, rtol=0.02)
    rod = np.zeros((40, 40, 80))
    rod[14:26, 14:26, 10:70] = 1
    assert len(particles(rod, VOXEL).volumes) == 1
    cube = np.zeros((40, 40, 40))
    cube[8:30, 9:31, 10:33] = 1
    assert len(particles(cube, VOXEL).volumes) == 1


def test_what_reaches_the_end_is_cut_and_does_not_count():
    found = particles(balls([(0, 0, 0), (15.9, 0, 0)], [4.0, 5.0]), VOXEL)
    assert sorted(found.cut) == [False, True]
    assert found.spread()[0] == pytest.approx(8.0, rel=0.02) and found.spread()[1] == 0


@pytest.mark.parametrize("thickness", [1.5, 3.0])
def test_a_shell_is_as_thick_as_planted(thickness):
    """Mn around Co, both of a density of one, a little blurred."""
    from scipy.ndimage import gaussian_filter

    whole, core = balls(CENTRES[:2], [6.0, 5.5]), balls(CENTRES[:2], [6.0 - thickness, 5.5 - thickness])
    maps = np.stack([gaussian_filter(core, 0.8), gaussian_filter(whole - core, 0.8)])
    told = profile(maps, particles(maps.sum(0), VOXEL), VOXEL)
    found, error = told.shell(shell=1, core=0)
    assert found == pytest.approx(thickness, abs=0.4 * VOXEL)
    assert error < 0.3
    assert told.values[1, 0] > 5 * told.values[0, 0] and told.values[0, -1] > 5 * told.values[1, -1]
    with pytest.raises(DataError, match="no shell"):
        told.shell(shell=0, core=1)


def test_what_holds_no_particle_is_told():
    with pytest.raises(DataError, match="the same everywhere"):
        particles(np.zeros((8, 8, 8)), VOXEL)
    with pytest.raises(DataError, match="no particle of 9 nm"):
        particles(balls([(0, 0, 0)], [4.0]), VOXEL, least=9.0)
    with pytest.raises(DataError, match="finite volume"):
        particles(np.full((8, 8, 8), np.nan), VOXEL)
    with pytest.raises(DataError, match="all particles reach"):
        profile(np.ones((1, 8, 8, 8)), particles(np.ones((8, 8, 8)), VOXEL, threshold=0.5), VOXEL)


# ---- In a run


RUN = {"name": "grains", "system": "fused3d",
       "data": {"phantom": "conio", "size": 32, "haadf_tilts": 17, "chem_tilts": 5},
       "solver": {"iterations": 30}, "output": {"particles": {"of": ["Co"], "least": 6.0}}}


def test_a_run_tells_the_diameters_of_its_particles_beside_the_true_ones(tmp_path):
    folder = made(tmp_path / "grains", settings.load(RUN))
    line, = [line for line in report.table(folder).splitlines() if "particles; diameter" in line]
    found, true = (float(words.split(" of ")[-1].split()[0]) for words in (
        line.split("diameter ")[1].split(" (true")[0], line.split("(true: ")[1]))
    assert true == pytest.approx(15, abs=2)  # balls of 10 to 18 nm, some of which touch
    assert found == pytest.approx(true, rel=0.15)
    assert "particles.png" in {path.name for path in report.write(folder)}


@pytest.mark.parametrize(("particles", "words"), [
    ({"of": ["Fe"]}, "no maps of Fe; there are Co, Ni, O"), ({"shell": "Ni"}, "give both, or neither"),
    ({"shell": "Ni", "core": "Ni"}, "two elements")])
def test_particles_of_elements_that_are_not_there_are_refused(particles, words):
    with pytest.raises(SettingsError, match=words):
        settings.load({**RUN, "output": {"particles": particles}})
