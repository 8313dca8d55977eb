"""The projector against ASTRA's `linear` projector, which is Joseph's method too: axis, sign, centre and weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from engine.projector import geometry, project
from tests.specimens import distance

astra = pytest.importorskip("astra")

NZ, NY, PIXELS = 20, 26, 40
ANGLES = [-90, -71.5, -45, -30, 0, 12.5, 45, 60, 90]


def astra_linear(plane, angles):
    """(tilt, pixel) line integrals of a plane (z, y).

    ASTRA's rows run against its second axis, and its detector lies along (cos, sin): our +z is its -y, so an angle
    that turns our +z toward +y is negative there.
    """
    volume = astra.create_vol_geom(*plane.shape)
    rays = astra.create_proj_geom("parallel", 1.0, PIXELS, np.deg2rad(-np.asarray(angles, float)))
    projector = astra.create_projector("linear", rays, volume)
    identifier, sinogram = astra.create_sino(plane, projector)
    astra.data2d.delete(identifier)
    astra.projector.delete(projector)
    return sinogram


@pytest.fixture
def plane():
    """Random values within a margin, off-centre: the two codes treat the volume's outermost rim differently."""
    plane = np.zeros((NZ, NY), np.float32)
    plane[3:15, 5:22] = np.random.default_rng(4).random((12, 17))
    return plane


def test_joseph_agrees_with_astra(plane):
    ours = np.asarray(project(jnp.asarray(plane)[..., None], geometry(ANGLES), PIXELS))[..., 0]
    theirs = astra_linear(plane, ANGLES)
    for k in range(len(ANGLES)):
        assert distance(ours[k], theirs[k]) < 1e-4


def test_astra_tells_the_sign_of_the_angle(plane):
    """The comparison would notice a mirrored convention."""
    ours = np.asarray(project(jnp.asarray(plane)[..., None], geometry([30]), PIXELS))[..., 0]
    assert distance(ours, astra_linear(plane, [-30])) > 0.05
