"""The projector is linear, has its exact adjoint, and agrees with what can be integrated by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.projector import adjoint_error, backproject, geometry, project
from engine.sizes import bucket
from tests.specimens import distance

ANGLES = [-90, -70, -45, -12.3, 0, 1e-3, 30, 45, 63.4, 90]


SHAPE, PIXELS = (10, 12, 3), 14  # one program for most laws


def projected(volume, angles, pixels=PIXELS):
    """(..., tilt, pixels, x); every list of angles is padded to one length."""
    rays = geometry(angles, len(ANGLES))
    return np.asarray(project(jnp.asarray(volume, jnp.float32), rays, pixels))[..., :len(angles), :, :]


def random_volume(shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


@pytest.mark.parametrize(("shape", "pixels"), [
    ((16, 16, 5), 16), ((12, 20, 3), 20), ((20, 12, 3), 12), ((9, 14, 2), 31), ((14, 9, 2), 6), ((7, 8, 1), 9)])
def test_adjoint_is_exact(shape, pixels):
    for angles in (ANGLES, [90], [-45], [45, -45, 0]):  # all of one length, padded: one program
        for seed in range(3):
            assert adjoint_error(shape, pixels, geometry(angles, 12), seed) < 1e-6


def test_adjoint_holds_with_weights():
    rays = geometry(ANGLES, 12)
    assert adjoint_error((12, 20, 3), 20, rays._replace(weight=jnp.linspace(0, 2, 12))) < 1e-6


def test_projection_is_linear():
    a, b = random_volume(SHAPE, 1), random_volume(SHAPE, 2)
    both = projected(2.5 * a - 0.5 * b, ANGLES)
    assert distance(both, 2.5 * projected(a, ANGLES) - 0.5 * projected(b, ANGLES)) < 1e-6


def test_every_plane_and_element_projects_alike():
    volume = random_volume((2, *SHAPE))
    together = projected(volume, ANGLES)
    for e in range(2):
        np.testing.assert_allclose(together[e], projected(volume[e], ANGLES), rtol=1e-6)
        turned = projected(volume[e, :, :, ::-1], ANGLES)
        np.testing.assert_array_equal(turned, projected(volume[e], ANGLES)[..., ::-1])


def test_derivative_of_each_operator_is_the_other():
    rays, volume = geometry(ANGLES), jnp.asarray(random_volume(SHAPE))
    sinogram, back = jax.vjp(lambda v: project(v, rays, PIXELS), volume)
    image = jnp.asarray(random_volume(sinogram.shape, 3))
    np.testing.assert_allclose(back(image)[0], backproject(image, rays, *SHAPE[:2]), rtol=1e-6)
    volume, forward = jax.vjp(lambda p: backproject(p, rays, *SHAPE[:2]), image)
    np.testing.assert_allclose(forward(volume)[0], project(volume, rays, PIXELS), rtol=1e-6)


def test_right_angles_are_sums_along_an_axis():
    volume = random_volume(SHAPE)
    at = projected(volume, [0, 90, -90])
    along_z, along_y = (np.pad(volume.sum(axis), ((pad, pad), (0, 0))) for axis, pad in ((0, 1), (1, 2)))
    assert distance(at[0], along_z) < 1e-6
    assert distance(at[1], along_y) < 1e-5
    assert distance(at[2], along_y[::-1]) < 1e-5


@pytest.mark.parametrize("angle", [-60, -20, 0, 35, 45, 80])
def test_three_blobs_pin_every_axis_and_the_sign_of_the_angle(angle):
    """Unequal blobs at distinct z, y, x: each must land at y' = y cos + z sin, in its own plane, with its mass."""
    blobs = {(5, 17, 0): 1.0, (16, 8, 2): 2.0, (11, 19, 5): 4.0}
    z, y = np.meshgrid(np.arange(25), np.arange(25), indexing="ij")
    volume = np.zeros((25, 25, 7), np.float32)
    for (bz, by, bx), mass in blobs.items():
        blob = np.exp(-((z - bz) ** 2 + (y - by) ** 2) / 5)
        volume[:, :, bx] = mass * blob / blob.sum()
    image = projected(volume, [angle], 41)[0]
    for (bz, by, bx), mass in blobs.items():
        landing = (by - 12) * np.cos(np.deg2rad(angle)) + (bz - 12) * np.sin(np.deg2rad(angle))
        assert image[:, bx].sum() == pytest.approx(mass, rel=5e-3)
        assert (np.arange(41) - 20) @ image[:, bx] / mass == pytest.approx(landing, abs=0.02)
    assert not image[:, [1, 3, 4, 6]].any()


def test_projections_keep_mass():
    """A smooth body that stays in the field has one mass, whichever way it is seen."""
    z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (25, 25, 7)), indexing="ij")
    volume = np.exp(-((z - 1.3) ** 2 + (y + 2.1) ** 2) / (2 * 2.2**2)) * (4 + x)
    sums = projected(volume, ANGLES, 41).sum(1)
    np.testing.assert_allclose(sums, np.broadcast_to(volume.sum((0, 1)), sums.shape), rtol=1e-3)


def test_padded_tilts_are_zero_and_change_nothing():
    volume = random_volume(SHAPE)
    rays = geometry(ANGLES, 16)
    image = np.asarray(project(jnp.asarray(volume), rays, PIXELS))
    np.testing.assert_allclose(image[:10], projected(volume, ANGLES), rtol=1e-6)
    assert not image[10:].any()
    # What stands in padded tilts is never back projected.
    filled = jnp.asarray(image).at[10:].set(7.0)
    short = backproject(jnp.asarray(image[:10]), geometry(ANGLES), *SHAPE[:2])
    np.testing.assert_allclose(backproject(filled, rays, *SHAPE[:2]), short, rtol=1e-6)


def test_buckets_are_few_and_hold_their_tilts_and_waste_little():
    assert len({bucket(tilts) for tilts in range(1, 73)}) <= 10  # the whole range of F3's Fig. 4
    for tilts in range(1, 400):
        assert bucket(tilts) >= tilts and bucket(bucket(tilts)) == bucket(tilts)
        assert bucket(tilts) - tilts <= max(7, tilts / 2)


def test_two_lists_of_angles_are_one_program():
    first = projected(random_volume(SHAPE), [-30, 0, 50, 20])
    compiled = project._cache_size()
    second = projected(random_volume(SHAPE), [-60, -10, 45, 90])
    assert project._cache_size() == compiled
    assert distance(first, second) > 0.1


# ---- Ellipsoids, whose line integrals are known

CENTRE = np.array([0.12, -0.17, 0.05])  # (z, y, x) in units of the field's edge, off-centre
HALF_AXES = np.array([0.29, 0.13, 0.21])


def rotation():
    a, b = 0.6, -0.4
    about_x = np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_z = np.array([[1, 0, 0], [0, np.cos(b), np.sin(b)], [0, -np.sin(b), np.cos(b)]])
    return about_z @ about_x


def to_unit_ball(points, size):
    """Points (..., 3) in voxels from the centre of the field, to where the ellipsoid is the unit ball."""
    return (points / size - CENTRE) @ rotation().T / HALF_AXES


def ellipsoid(size, steps=4):
    """Coverage of each voxel, (z, y, x)."""
    fine = (np.arange(size * steps) + 0.5) / steps - size / 2
    planes = []
    for z in fine.reshape(size, steps):
        points = np.stack(np.meshgrid(z, fine, fine, indexing="ij"), -1)
        inside = (to_unit_ball(points, size) ** 2).sum(-1) <= 1
        planes.append(inside.reshape(steps, size, steps, size, steps).mean((0, 2, 4)))
    return np.array(planes, np.float32)


def line_integrals(size, angles, steps=4):
    """Exact lengths (tilt, y, x) of rays within the ellipsoid, averaged over each pixel as coverage is."""
    fine = (np.arange(size * steps) + 0.5) / steps - size / 2
    t, x = np.meshgrid(fine, fine, indexing="ij")
    images = []
    for angle in np.deg2rad(angles):
        along = np.array([np.cos(angle), -np.sin(angle), 0.0])
        across = np.stack([t * np.sin(angle), t * np.cos(angle), x], -1)
        p, d = to_unit_ball(across, size), to_unit_ball(along, size) - to_unit_ball(0 * along, size)
        a, b, c = d @ d, p @ d, (p**2).sum(-1) - 1
        length = 2 * np.sqrt(np.maximum(b**2 - a * c, 0)) / a
        images.append(length.reshape(size, steps, size, steps).mean((1, 3)))
    return np.array(images)


def test_ellipsoids_agree_with_their_line_integrals():
    errors = [distance(projected(ellipsoid(size), ANGLES, size), line_integrals(size, ANGLES)) for size in (16, 32, 64)]
    assert errors[2] < 0.01
    assert errors[0] > errors[1] > errors[2]
