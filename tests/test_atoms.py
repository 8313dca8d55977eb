"""Models of atoms are what they claim to be, and their potentials add up to what scattering factors say."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.atoms import VOLTS, Atoms, nanoparticle, potential, potential_slices, scattering_factor, xyz_text
from engine.data import DataError
from engine.rotation import rotate
from tests.specimens import distance

ONE = Atoms(["Au"], [[0.03, -0.11, 0.2]])


@pytest.fixture
def tables():
    pytest.importorskip("gemmi")


def nearest(positions):
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    return apart[apart > 0].reshape(len(positions), -1).min(1)


def test_the_alloy_is_a_core_of_copper_in_a_shell_of_gold():
    atoms = nanoparticle("cuau", 1.73)
    assert 1300 < len(atoms) < 2000
    assert 0.25 < (atoms.symbols == "Cu").mean() < 0.45
    height = np.linalg.norm(atoms.positions, axis=1)
    assert height[atoms.symbols == "Cu"].max() < height.max()
    assert height[atoms.symbols == "Cu"].mean() < height[atoms.symbols == "Au"].mean()


def test_lattices_are_the_tabulated_ones():
    cuau, bao = nanoparticle("cuau", 1.0, disorder=0), nanoparticle("bao", 1.2, disorder=0)
    np.testing.assert_allclose(nearest(cuau.positions), 0.378 / np.sqrt(2), rtol=1e-9)
    np.testing.assert_allclose(nearest(bao.positions), 0.554 / 2, rtol=1e-9)
    assert abs((bao.symbols == "O").mean() - 0.5) < 0.1


def test_disorder_is_the_rms_displacement():
    still, moved = (nanoparticle("cuau", 1.73, disorder=d).positions for d in (0, 0.02))
    assert np.sqrt(((moved - still) ** 2).sum(1).mean()) == pytest.approx(0.02, rel=0.1)


def test_a_seed_is_a_particle():
    a, b, c = (nanoparticle("bao", 0.8, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(a.positions, b.positions)
    assert len(a) != len(c) or not np.allclose(a.positions, c.positions)


def test_projected_potential_integrates_to_the_scattering_factor(tables):
    v = potential_slices(ONE, 48, 0.04, 20, 0.1)
    total = VOLTS * scattering_factor("Au")[0].sum()
    assert v.sum() * 0.04**2 == pytest.approx(total, rel=2e-3)  # tails beyond the volume along z
    assert scattering_factor("Au")[0].sum() == pytest.approx(1.057, rel=1e-3)  # [nm] f(0), as tabulated


def test_potential_is_the_analytic_one(tables):
    """Along z, away from the others' grid: the three-dimensional Gaussians, averaged over a thin slice."""
    a, b = scattering_factor("Au")
    b = b + 8 * np.pi**2 * 0.05**2  # wide enough that the pixels hold every frequency
    v = potential_slices(Atoms(["Au"], [[0, 0, 0]]), 65, 0.03, 101, 0.02, thermal=0.05) / 0.02
    y = (np.arange(65) - 32) * 0.03
    by_hand = VOLTS * (a * (4 * np.pi / b) ** 1.5 * np.exp(-4 * np.pi**2 * y[:, None] ** 2 / b)).sum(1)
    assert distance(v[50, :, 32], by_hand) < 0.01


def test_thin_slices_add_up_to_thick_ones(tables):
    fine, coarse = potential_slices(ONE, 32, 0.05, 16, 0.1), potential_slices(ONE, 32, 0.05, 4, 0.4)
    assert distance(fine.reshape(4, 4, 32, 32).sum(1), coarse) < 1e-4


def test_turned_atoms_are_the_turned_potential(tables):
    """The volume's rotation and the atoms' have one sense and one centre."""
    atoms, turn = Atoms(["Cu", "Au", "Cu"], [[0.3, 0.1, -0.2], [-0.1, 0.25, 0.2], [0, -0.3, 0.1]]), (30.0, -50.0, 65.0)
    volume = potential(atoms, 40, 0.05, thermal=0.1)
    by_hand = potential(atoms.turned(turn), 40, 0.05, thermal=0.1)
    assert distance(jax.jit(rotate)(jnp.asarray(volume), jnp.asarray(turn)), by_hand) < 0.02


def test_xyz_is_read_back():
    atoms = Atoms(["Cu", "O"], [[0.1, 0.2, 0.3], [-0.1, 0, 0.05]])
    lines = xyz_text(atoms, 2.0, intensity=np.array([3.0, 1.5])).splitlines()
    assert lines[0] == "2" and len(lines) == 4
    assert 'Lattice="20 0 0 0 20 0 0 0 20"' in lines[1]
    assert "Properties=species:S:1:pos:R:3:intensity:R:1" in lines[1]
    symbol, *numbers = lines[2].split()
    assert symbol == "Cu"
    np.testing.assert_allclose([float(v) for v in numbers], [13, 12, 11, 3])


def test_what_is_no_model_is_refused(monkeypatch):
    with pytest.raises(DataError, match="cuau, bao, co3o4 and coo"):
        nanoparticle("gold")
    with pytest.raises(DataError, match="positions of shape"):
        Atoms(["Cu"], [[0, 0]])
    with pytest.raises(DataError, match="not finite"):
        Atoms(["Cu"], [[0, 0, np.nan]])
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(DataError, match="pip install"):
        scattering_factor("Cu")


def test_an_unknown_element_is_refused(tables):
    with pytest.raises(DataError, match="Qq"):
        scattering_factor("Qq")
