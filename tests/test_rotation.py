"""Shear rotations are orthogonal, turn what they should to where they should, and undo each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.data import DataError
from engine.euler import about, euler, matrix
from engine.rotation import rotate, rotate_back, tilt
from tests.specimens import distance

ANGLES = [(0, 0, 30), (0, 0, -75), (0, 0, 90), (0, 0, -180), (0, 0, 44.9), (20, 0, 0), (0, -130, 0), (37, -61, 118)]
turn, back, tilted = jax.jit(rotate), jax.jit(rotate_back), jax.jit(tilt)


def blob(shape, place, sigma=2.0):
    """A Gaussian at (z, y, x) from the centre, in voxels."""
    grids = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    return np.exp(-sum((g - p) ** 2 for g, p in zip(grids, place)) / (2 * sigma**2)).astype(np.float32)


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("angles", ANGLES)
def test_rotation_is_orthogonal(size, angles):
    angles = jnp.asarray(angles, jnp.float32)
    a, b = noise((size,) * 3), noise((size,) * 3, 1)
    assert distance(back(turn(a, angles), angles), a) < 2e-6
    assert distance(turn(back(a, angles), angles), a) < 2e-6
    forth, adjoint = np.vdot(turn(a, angles), b), np.vdot(a, back(b, angles))
    assert abs(forth - adjoint) < 1e-5 * np.linalg.norm(a) * np.linalg.norm(b)


@jax.jit
def derivative(at, along, angles):
    return jax.vjp(lambda v: rotate(v, angles), at)[1](along)[0]


def test_the_derivative_is_the_rotation_back():
    angles, a, b = jnp.asarray([10.0, 50.0, -70.0]), noise((32,) * 3), noise((32,) * 3, 1)
    np.testing.assert_allclose(derivative(a, b, angles), back(b, angles), atol=1e-5)


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("angles", ANGLES)
def test_a_blob_lands_where_the_matrix_says(size, angles):
    place = np.array([5.0, -3.0, 4.0])
    found = turn(blob((size,) * 3, place), jnp.asarray(angles, jnp.float32))
    assert distance(found, blob((size,) * 3, matrix(angles) @ place)) < 3e-4  # tails of the blob that wrap around


def test_a_tilt_turns_as_the_projector_does():
    angle = 25.0
    z, y = 4.0, 2.0
    found = tilted(blob((32,) * 3, (z, y, 0)), jnp.float32(angle)).sum(0)
    at = np.cos(np.radians(angle)) * y + np.sin(np.radians(angle)) * z
    centre = (found.sum(1) * (np.arange(32) - 15.5)).sum() / found.sum()
    assert abs(centre - at) < 1e-3


def test_one_angle_is_about_x():
    a = noise((32,) * 3)
    assert distance(turn(a, jnp.asarray([37.0])), tilted(a, jnp.float32(37))) < 1e-6
    assert distance(back(turn(a, jnp.asarray([37.0])), jnp.asarray([37.0])), a) < 2e-6


def test_quarter_turns_only_permute():
    a = noise((32,) * 3)
    for k in range(4):
        np.testing.assert_array_equal(tilted(a, jnp.float32(90 * k)), np.rot90(a, k, (0, 1)))


def test_two_turns_are_their_sum_and_mass_is_kept():
    a = blob((32,) * 3, (4, 3, -2))
    twice = tilted(tilted(a, jnp.float32(20)), jnp.float32(37))
    assert distance(twice, tilted(a, jnp.float32(57))) < 3e-4
    assert abs(float(twice.sum()) / a.sum() - 1) < 1e-5


@pytest.mark.parametrize("angles", [*ANGLES, (15, 90, 0), (15, -90, 0)])
def test_euler_angles_come_back_from_their_matrix(angles):
    np.testing.assert_allclose(matrix(euler(matrix(angles))), matrix(angles), atol=1e-7)


def test_any_axis_stays_where_it_is():
    axis = np.array([1.0, -2.0, 0.5])
    turned = matrix(about(axis, 73))
    np.testing.assert_allclose(turned @ axis, axis, atol=1e-12)
    assert np.trace(turned) == pytest.approx(1 + 2 * np.cos(np.radians(73)))
    np.testing.assert_allclose(about((0, 0, 2), 40), (0, 0, 40), atol=1e-12)
    np.testing.assert_allclose(matrix(about((0, 1, 0), 40)), matrix((0, 40, 0)), atol=1e-12)
    np.testing.assert_allclose(matrix(about((1, 0, 0), 40)), matrix((40, 0, 0)), atol=1e-12)


def test_what_cannot_be_turned_is_refused():
    with pytest.raises(DataError, match="about x.*pad the shorter"):
        tilt(jnp.zeros((4, 6, 6)), jnp.float32(30))
    with pytest.raises(DataError, match="length 0"):
        about((0, 0, 0), 10)
