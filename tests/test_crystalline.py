"""What an mspt run says of a crystal: planted lattices, sites that are there and sites that were taken away."""

import numpy as np
import pytest

from engine.atoms import Atoms, cube, potential
from engine.data import DataError
from sweeps import atomic, crystalline, settings
from sweeps.settings import SettingsError

VOXEL, SIZE, THERMAL = 0.05, 56, 0.0085
PLAIN = {"name": "grain", "system": "mspt",
         "data": {"phantom": "coo", "radius": 0.64, "size": 60, "film": 0.3, "disorder": 0.0, "particle": 3}}


@pytest.fixture(scope="module")
def grain():
    """A cube of 3 x 3 x 3 cells of rock salt, and its potential."""
    pytest.importorskip("gemmi")
    atoms = cube("coo", 1.28, [20, 0, 0])
    return atoms, potential(atoms, SIZE, VOXEL, THERMAL)


def ball(radius):
    axis = (np.arange(SIZE) - (SIZE - 1) / 2) * VOXEL
    return (np.linalg.norm(np.stack(np.meshgrid(axis, axis, axis, indexing="ij")), axis=0) < radius).astype(np.float32)


def test_every_site_of_a_whole_crystal_is_found(grain):
    _, volume = grain
    whole, each = crystalline.found("coo", volume, VOXEL, ball(0.55), 90.0)
    assert whole["missing_sites"] == 0 and whole["displacement"] < 10 and whole["agreement"] > 0.8
    assert set(each["sites"]) == {"Co", "O"} and each["missing_sites"] == {"Co": 0, "O": 0}
    assert each["sites"]["Co"] + each["sites"]["O"] > 30


def test_a_site_that_was_taken_away_is_missing(grain):
    atoms, _ = grain
    near = np.argsort(np.linalg.norm(atoms.positions, axis=1))
    kept = np.delete(np.arange(len(atoms)), [k for k in near if atoms.symbols[k] == "O"][:2])
    fewer = potential(Atoms(atoms.symbols[kept], atoms.positions[kept]), SIZE, VOXEL, THERMAL)
    # Without noise nothing leads away from where a site was: its neighbours lie evenly around it.
    fewer += 0.01 * fewer.max() * np.random.default_rng(0).standard_normal(fewer.shape).astype(np.float32)
    _, each = crystalline.found("coo", fewer, VOXEL, ball(0.55), 90.0)
    assert each["missing_sites"]["Co"] == 0
    # By the paper's rule: an empty site with a maximum of noise of its own counts as found.
    assert 0.5 < each["missing_sites"]["O"] * each["sites"]["O"] / 100 < 2.5


def test_a_film_lies_below_the_cube_and_reaches_beyond_the_field():
    pytest.importorskip("gemmi")
    data = settings.load(PLAIN).data
    particle, film = atomic.specimen(data), atomic.substrate(data)
    assert set(film.symbols) == {"C"}
    assert film.positions[:, 0].max() < particle.positions[:, 0].min()
    assert np.ptp(film.positions[:, 0]) <= 0.3 and np.ptp(film.positions[:, 1]) > 3 * 60 * 0.04
    # A cube lies on a face: its layers are parallel to the film.
    assert len(np.unique(np.round(particle.positions[:, 0], 4))) == 7
    assert atomic.substrate(settings.replace(settings.load(PLAIN), {"data.film": 0.0}).data) is None


def test_sites_are_sought_in_crystals_alone():
    with pytest.raises(SettingsError, match="missing_sites needs a crystal"):
        settings.load({**PLAIN, "data": {"phantom": "cuau"}, "search": {"objective": "missing_sites"}})
    assert settings.load({**PLAIN, "search": {"objective": "missing_sites"}}).search.objective == "missing_sites"


def test_a_volume_without_a_lattice_is_told_in_words():
    assert crystalline.refused(DataError("it is empty")).startswith("no lattice was found: ")
