"""Multislice against abTEM: signs of aberrations, propagator, interaction, heights of slices, potentials of atoms."""

import jax.numpy as jnp
import numpy as np
import pytest

from engine.atoms import nanoparticle, potential_slices
from engine.diffraction import BAND, THERMAL, Scan, annulus
from engine.multislice import Optics, beam, far_field, probes
from tests.specimens import distance

abtem = pytest.importorskip("abtem")

ATOMS = nanoparticle("cuau", 0.65)
AT = np.array([[0, 0], [0.3, -0.17], [-0.41, 0.233]])  # y, x [nm]
OPTICS = [Optics(), Optics(c3=1e4, c5=1e5), Optics(defocus=10.0, c3=-2e4), Optics(voltage=80.0, aperture=30.0)]
SCAN = Scan()  # the simulator's pixels and slices
NO_LIMIT = {"antialias.cutoff": 2.0, "antialias.taper": 0.0}  # abTEM's, in shares of the highest frequency


@pytest.fixture(autouse=True)
def eager():
    with abtem.config.set({"diagnostics.progress_bar": False, "dask.lazy": False}):
        yield


def volts(scan=SCAN, thermal=THERMAL):
    """Potentials (slice, y, x) [V nm] of the particle."""
    return potential_slices(ATOMS, scan.size * scan.finer, scan.pixel / scan.finer, *scan.depth, thermal)


def ours(optics, potential, scan=SCAN, band_limit=BAND):
    """Patterns (probe, qy, qx), frequency 0 first."""
    made = beam(potential.shape[1], scan.pixel / scan.finer, optics, scan.depth[1], band_limit=band_limit)
    waves = probes(made, jnp.asarray(AT, jnp.float32))
    return np.asarray(jnp.abs(far_field(waves, jnp.asarray(optics.interaction * potential), made.propagator)) ** 2)


def abtem_patterns(optics, potential, scan=SCAN):
    """The same from abTEM: its zero is pixel 0, its first slice the entrance face, from which ours is half a slice.

    Lengths in Angstrom, energies in eV; its axes x, y are our y, x.
    """
    size, pixel = potential.shape[1], scan.pixel / scan.finer
    slices = abtem.PotentialArray(np.asarray(10 * potential, np.float32), 10 * scan.depth[1], sampling=10 * pixel)
    probe = abtem.Probe(energy=1e3 * optics.voltage, semiangle_cutoff=optics.aperture, soft=False,
                        defocus=10 * (optics.defocus - scan.depth[1] / 2), C30=10 * optics.c3, C50=10 * optics.c5)
    waves = probe.multislice(slices, scan=abtem.CustomScan(10 * (AT + (size - 1) / 2 * pixel)))
    return np.abs(np.fft.fft2(waves.array)) ** 2


@pytest.mark.parametrize("optics", OPTICS)
def test_patterns_agree_where_nothing_limits_the_band(optics):
    # 1.1e-6; the same with our band limit and abTEM's without taper, which also limits its slices.
    with abtem.config.set(NO_LIMIT):
        assert distance(ours(optics, volts(), band_limit=None), abtem_patterns(optics, volts())) < 1e-5


@pytest.mark.parametrize("optics", OPTICS)
def test_patterns_agree_as_both_programs_limit_the_band(optics):
    """At two thirds of the highest frequency; abTEM's edge is soft, and it limits the transmission functions too."""
    assert distance(ours(optics, volts()), abtem_patterns(optics, volts())) < 2e-3  # up to 9e-4


@pytest.mark.parametrize("wrong", [Optics(defocus=20.0), Optics(c3=-1e4), Optics(defocus=-19.0)])
def test_abtem_tells_the_signs(wrong):
    """The comparison would notice a mirrored convention, and a nanometre of defocus."""
    right = Optics(c3=1e4) if wrong.c3 else Optics()
    assert distance(ours(wrong, volts()), abtem_patterns(right, volts())) > 0.01


def test_abtem_tells_the_height_of_a_slice():
    shifted = np.roll(volts(), 1, axis=0)
    assert distance(ours(Optics(), shifted), abtem_patterns(Optics(), volts())) > 3e-3  # 5e-3


def test_the_dark_field_agrees():
    """Where pixels are fine enough for it: with 5 in a pixel of the field, both lack up to 7 % of this."""
    scan = Scan(finer=8, slices=0.2, detector=(40.0, 80.0))
    potential, optics = volts(scan, 0.0), Optics(defocus=1.0)
    ring = np.asarray(annulus(scan, potential.shape[1]))
    dark, theirs = ((ring * found).sum((1, 2)) for found in (ours(optics, potential, scan),
                                                             abtem_patterns(optics, potential, scan)))
    np.testing.assert_allclose(dark, theirs, rtol=5e-3)


@pytest.mark.parametrize("table", ["lobato", "kirkland"])
def test_patterns_of_the_same_atoms_agree(table):
    """Its own potentials: another table, and each atom whole in one slice, placed between pixels linearly."""
    ase = pytest.importorskip("ase")
    width, size, thickness = SCAN.size * SCAN.pixel, SCAN.size * SCAN.finer, SCAN.depth[1]
    first = np.array([width, width - SCAN.pixel / SCAN.finer, width - SCAN.pixel / SCAN.finer]) / 2
    places = 10 * (ATOMS.positions + first)[:, [1, 2, 0]]
    model = ase.Atoms(list(ATOMS.symbols), places, cell=[10 * width] * 3, pbc=True)
    # A hair thicker: rounding would make one slice more.
    theirs = abtem.Potential(model, gpts=size, slice_thickness=10 * thickness * (1 + 1e-6), parametrization=table)
    potential = theirs.build().array / 10
    still = volts(thermal=0.0)
    assert potential.sum() == pytest.approx(still.sum(), rel=0.01)  # 4e-4 (lobato), 2e-3 (kirkland)
    assert distance(ours(Optics(), still), abtem_patterns(Optics(), potential)) < 0.02  # 1.2e-2
