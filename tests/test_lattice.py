"""Laws of lattices: planted crystals are found as they lie; of their sites, those that are there are seen."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.spatial import cKDTree

from engine.atoms import Atoms, cube, film, nanoparticle, potential
from engine.crystals import CRYSTALS
from engine.data import DataError
from engine.euler import matrix
from engine.lattice import misfit, reflections, register
from engine.sites import climb, rayleigh

SIZE, VOXEL = 64, 0.05


@pytest.fixture(autouse=True)
def tables():
    pytest.importorskip("gemmi")


def without(volume, wedge):
    """The volume without the frequencies in a wedge of so many degrees about z."""
    z, y = np.fft.fftfreq(len(volume))[:, None, None], np.fft.fftfreq(len(volume))[:, None]
    seen = np.abs(y) >= np.abs(z) * np.tan(np.radians(wedge))
    return np.fft.ifftn(np.fft.fftn(volume) * seen).real


def planted(seed, *, model="co3o4", edge=1.7, noise=0.0, wedge=0, size=SIZE, angles=None, more=None):
    """A cube of a crystal, turned and shifted at random; noise in standard deviations of its potential."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-180, 180, 3) if angles is None else np.array(angles)
    atoms = cube(model, edge, angles)
    atoms = replace(atoms, positions=atoms.positions + rng.uniform(-0.1, 0.1, 3))
    volume = potential(atoms, size, VOXEL, thermal=0.01).astype(float)
    deviation = volume.std()
    if more is not None:
        volume = volume + potential(more, size, VOXEL, thermal=0.01)
    return without(volume + noise * deviation * rng.standard_normal(volume.shape), wedge), atoms, angles


def apart(registered, atoms, size=SIZE):
    """(atom,) [nm] from each to the nearest site of its kind: 0 if rotation and translation are right."""
    sites = registered.sites(np.ones((size,) * 3, bool), VOXEL)
    return np.concatenate([cKDTree(sites.positions[sites.symbols == s]).query(atoms.positions[atoms.symbols == s])[0]
                           for s in np.unique(atoms.symbols)])


@pytest.mark.parametrize("model, edge, size, noise",
                         [(m, 1.7, SIZE, n) for m in ("co3o4", "coo") for n in (0.0, 1.0, 2.0)] +
                         [pytest.param(m, 2.6, 96, 6.0, marks=pytest.mark.slow) for m in ("co3o4", "coo")])
def test_a_planted_crystal_is_found_where_it_lies(model, edge, size, noise):
    """The rotation within 0.2 degrees, the translation within 0.1 voxel, with a missing wedge of 2 x 25 degrees."""
    for seed in range(3):
        volume, atoms, angles = planted(seed, model=model, edge=edge, size=size, noise=noise, wedge=25)
        found = register(volume, VOXEL, model, missing=25)
        off, way = misfit(found.angles, angles), apart(found, atoms, size) / VOXEL
        print(f"{model}, {edge} nm, noise {noise}: rotation off by {off:.3f} deg, sites by {way.mean():.3f} voxel "
              f"(most {way.max():.3f}); agreement {found.agreement:.2f}, contrast {found.contrast:.2f}")
        assert off < 0.2 and way.mean() < 0.1


def test_what_a_wedge_cuts_is_left_out():
    """Peaks on the rim of the wedge draw the rotation away; without noise that is all that does."""
    volume, _, angles = planted(0, model="coo", wedge=25)
    every, whole = (misfit(register(volume, VOXEL, "coo", missing=m).angles, angles) for m in (0, 25))
    print(f"rotation off by {every:.3f} deg with the peaks that the wedge cuts, {whole:.3f} deg without")
    assert whole < 0.05 and whole < every / 3


def test_a_rough_rotation_and_a_mask_are_enough_beside_a_film():
    """A cube on amorphous carbon of its own thickness."""
    edge, under = 1.7, film(SIZE * VOXEL, 0.6, -0.95)
    volume, atoms, angles = planted(4, edge=edge, noise=2.0, wedge=25, angles=(10, 3, -4), more=under)
    z, y, x = np.meshgrid(*[(np.arange(SIZE) - (SIZE - 1) / 2) * VOXEL] * 3, indexing="ij")
    mask = 1 / (1 + np.exp((np.maximum(np.maximum(abs(z), abs(y)), abs(x)) - edge / 2) / 0.08))
    for given in (None, np.array([13.0, 1.0, -2.0])):
        found = register(volume, VOXEL, "co3o4", angles=given, mask=mask, missing=25)
        way = apart(found, atoms) / VOXEL
        print(f"with a film: rotation off by {misfit(found.angles, angles):.3f} deg, sites by {way.mean():.3f} voxel")
        assert misfit(found.angles, angles) < 0.2 and way.mean() < 0.1


def test_noise_has_no_lattice():
    clean = register(planted(0, noise=6.0)[0], VOXEL, "co3o4")
    noise = register(np.random.default_rng(0).standard_normal((SIZE,) * 3), VOXEL, "co3o4")
    print(f"contrast: lattice {clean.contrast:.2f}, noise {noise.contrast:.2f}")
    assert noise.contrast < 1.35 < clean.contrast and noise.agreement < 0.5 * clean.agreement


def test_a_turned_volume_has_a_turned_lattice():
    volume, _, _ = planted(5)
    a, b = register(volume, VOXEL, "co3o4"), register(np.rot90(volume, 1, (0, 1)).copy(), VOXEL, "co3o4")
    quarter = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])  # rot90 brings +z to +y
    turned = matrix(a.angles)
    assert min(np.abs(quarter @ turned - matrix(b.angles) @ t).max() for t in _cube_turns()) < 2e-3


def _cube_turns():
    from scipy.spatial.transform import Rotation

    return Rotation.create_group("O").as_matrix()


def test_a_cube_turned_by_its_symmetry_is_not_turned():
    for turn in _cube_turns():
        from engine.euler import euler

        a = np.array([20.0, -30.0, 50.0])
        assert misfit(a, euler(matrix(a) @ turn)) < 1e-5
    assert misfit([0, 0, 0], [0, 0, 3.0]) == pytest.approx(3)


def test_structure_factors_of_spinel_and_rock_salt():
    """Glide planes and centring put some out; Co and O scatter against each other where h, k, l are odd (rock salt)."""
    every, _ = reflections(CRYSTALS["co3o4"], 0.15)
    assert (np.ptp(every % 2, axis=1) == 0).all()  # all even or all odd
    assert not any(sorted(abs(h)) == [0, 0, 2] for h in every)  # d glide
    indices, factors = reflections(CRYSTALS["coo"], 0.12)
    size = {tuple(h): abs(f) for h, f in zip(indices, factors)}
    assert size[2, 0, 0] > 2 * size[1, 1, 1]
    spinel = CRYSTALS["co3o4"]
    assert (spinel.symbols == "Co").sum() == 24 and (spinel.symbols == "O").sum() == 32


def test_all_sites_are_found_where_all_can_be_seen():
    volume, atoms, _ = planted(1)
    sites = climb(volume, VOXEL, atoms)
    axes, mean = sites.displacement()
    print(f"found {sites.share('Co'):.3f} of Co and {sites.share('O'):.3f} of O, {1e3 * mean:.1f} pm away")
    assert sites.share() == 1 and mean < 0.01 and (axes < 0.01).all()


def test_steps_end_on_maxima_and_come_back_from_beside():
    volume, atoms, _ = planted(2)
    cobalt = replace(atoms, symbols=atoms.symbols[atoms.symbols == "Co"],
                     positions=atoms.positions[atoms.symbols == "Co"])
    moved = np.random.default_rng(0).uniform(-0.03, 0.03, cobalt.positions.shape)
    sites = climb(volume, VOXEL, replace(cobalt, positions=cobalt.positions + moved))
    assert np.linalg.norm(sites.ends - cobalt.positions, axis=1).max() < 0.012
    axes, mean = sites.displacement("Co")
    np.testing.assert_allclose(axes, np.abs(moved).mean(0), atol=0.004)


def test_a_site_is_missing_when_two_ways_end_at_one_maximum():
    volume, atoms, _ = planted(3, model="coo", edge=1.6)
    middle = np.linalg.norm(atoms.positions - atoms.positions.mean(0), axis=1)
    lost = np.flatnonzero((middle < 0.5) & (atoms.symbols == "O"))
    kept = np.delete(np.arange(len(atoms)), lost)
    less = potential(Atoms(atoms.symbols[kept], atoms.positions[kept]), SIZE, VOXEL, thermal=0.01)
    sites = climb(less, VOXEL, atoms, smooth=0.04)  # what sharp atoms ring with between the voxels is no maximum
    assert not sites.found[lost].any()
    assert sites.found[kept].all()
    assert sites.share("O") == pytest.approx(1 - len(lost) / (atoms.symbols == "O").sum())


def test_blur_along_z_costs_oxygen_before_cobalt():
    """As Fig. 4: with 0.2 nm along one axis cobalt is told apart and oxygen is not."""
    from scipy.ndimage import gaussian_filter

    volume, atoms, _ = planted(0, angles=(0, 0, 0))
    volume = gaussian_filter(volume, (0.07 / VOXEL, 0.02 / VOXEL, 0.02 / VOXEL))
    noise = 2.0 * volume.std() * np.random.default_rng(0).standard_normal(volume.shape)
    sites = climb(volume + noise, VOXEL, atoms, smooth=0.03)
    axes, mean = sites.displacement("Co")
    print(f"blurred along z: Co {sites.share('Co'):.2f}, O {sites.share('O'):.2f} found; Co off by "
          f"{(1e3 * axes).round(1)} pm along z, y, x, {1e3 * mean:.1f} pm in space")
    assert sites.share("Co") > sites.share("O") and axes[0] > 1.2 * axes[1:].max()


def test_rayleigh_of_equal_points_is_the_closed_form():
    """Far apart, where atoms are points: 2 exp(-d^2 / 8 s^2) = 0.737 (1 + exp(-d^2 / 2 s^2))."""
    sigma = brentq(lambda s: 2 * np.exp(-1 / (8 * s**2)) - 0.737 * (1 + np.exp(-1 / (2 * s**2))), 0.2, 0.5)
    found = rayleigh("O", "O", 1.0)
    assert found == pytest.approx(2.3548 * sigma, rel=0.02)


def test_rayleigh_of_oxygen_beside_cobalt():
    """The paper needs about 0.1 nm for atoms 0.1558 nm apart, where cobalt's peak is 2.7 times as high."""
    found, projected = rayleigh("Co", "O", 0.1558), rayleigh("Co", "O", 0.1558, projected=True)
    true = rayleigh("Co", "O", 0.1922)
    print(f"Co-O at 0.1558 nm: {found:.4f} nm, projected {projected:.4f} nm; at the crystal's 0.1922 nm {true:.4f} nm")
    assert found == pytest.approx(0.089, rel=0.02)
    assert rayleigh("Co", "O", 0.2) > found > rayleigh("Au", "O", 0.1558)
    assert rayleigh("Co", "O", 0.1558, thermal=0.01) < found
    assert rayleigh("Co", "O", 0.1558, thermal=0.08) == 0


def test_cubes_are_the_tabulated_crystals():
    atoms = nanoparticle("co3o4", 1.2, disorder=0, seed=3)
    tree = cKDTree(atoms.positions[atoms.symbols == "Co"])
    nearest = np.unique(tree.query(atoms.positions[atoms.symbols == "O"])[0].round(3))
    np.testing.assert_allclose(nearest[:2], [0.192, 0.193], atol=1e-3)  # octahedral and tetrahedral
    flat = cube("coo", 2.1, (0, 0, 0))
    assert np.abs(flat.positions).max() <= 1.05 and (flat.symbols == "Co").mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(cube("coo", 2.1, (0, 0, 30)).positions, flat.turned((0, 0, 30)).positions)


def test_a_film_has_its_density_and_no_close_atoms():
    carbon = film(4.0, 1.5, -0.5, density=2000)
    mass = len(carbon) * 12.011 * 1.66053907e-27
    assert mass / (4.0 * 4.0 * 1.5 * 1e-27) == pytest.approx(2000, rel=1e-3)
    assert cKDTree(carbon.positions).query(carbon.positions, 2)[0][:, 1].min() >= 0.13
    assert carbon.positions[:, 0].max() <= -0.5 and carbon.positions[:, 0].min() >= -2.0
    assert np.abs(carbon.positions[:, 1:]).max() <= 2.0
    with pytest.raises(DataError, match="make it lighter"):
        film(1.0, 1.0, 0.0, density=20000)


def test_what_is_no_lattice_is_refused():
    cube_of_ones = np.ones((16,) * 3)
    with pytest.raises(DataError, match="co3o4 and coo"):
        register(cube_of_ones, VOXEL, "nacl")
    with pytest.raises(DataError, match="finer voxels"):
        register(cube_of_ones, 0.5, "co3o4")
    with pytest.raises(DataError, match="does not fit"):
        register(cube_of_ones, VOXEL, "co3o4", mask=np.ones((8,) * 3))
    with pytest.raises(DataError, match="no sites"):
        climb(cube_of_ones, VOXEL, Atoms([], np.zeros((0, 3))))
