"""Surfaces of volumes: a sphere has its area and place, columns and rows are volumes and elements."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from sweeps import shape_figures

N, VOXEL, RADIUS = 40, 0.5, 6.0  # voxels, nm, nm


def ball(centre=(0.0, 0.0, 0.0), n=N):
    """Coverage of a ball, z, y, x [nm]."""
    axis = (np.arange(n) - (n - 1) / 2) * VOXEL
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    far = np.sqrt((z - centre[0])**2 + (y - centre[1])**2 + (x - centre[2])**2)
    return np.clip((RADIUS - far) / VOXEL + 0.5, 0, 1)


@pytest.mark.parametrize("n", [40, 100])
def test_a_ball_has_its_area_and_its_place(n):
    """Also where it is drawn on coarser voxels."""
    corners, triangles = shape_figures.surface(ball((1.0, 2.0, -3.0), n), VOXEL)
    first, second, third = (corners[triangles[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(second - first, third - first), axis=1).sum() / 2
    assert area == pytest.approx(4 * np.pi * RADIUS**2, rel=0.03)
    assert (corners.max(0) + corners.min(0)) / 2 == pytest.approx([-3.0, 2.0, 1.0], abs=0.25 * VOXEL)  # x, y, z


def test_what_leaves_the_field_is_closed_and_what_is_flat_has_none():
    corners, _ = shape_figures.surface(np.ones((8, 8, 8)), VOXEL) or (None, None)
    assert corners is None or np.abs(corners).max() <= 4.5 * VOXEL
    assert shape_figures.surface(np.zeros((8, 8, 8)), VOXEL) is None
    half = np.zeros((8, 8, 8))
    half[:4] = 1
    corners, triangles = shape_figures.surface(half, VOXEL)
    edges = np.sort(np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]]), axis=1)
    assert np.all(np.unique(edges, axis=0, return_counts=True)[1] == 2)  # watertight


def test_a_panel_for_each_element_and_all_of_them_of_each_volume():
    volumes = {"truth": np.stack([ball(n=16), np.zeros((16, 16, 16))]), "found": np.stack([ball(n=16)] * 2)}
    figure = shape_figures.surfaces(volumes, ("Co", "O"), VOXEL)
    assert len(figure.axes) == 6 and [ax.get_title() for ax in figure.axes[:3]] == ["Co", "O", "together"]
    assert [len(ax.collections) for ax in figure.axes] == [1, 0, 1, 1, 1, 2]
    assert figure.axes[0].get_xlim() == (-4.0, 4.0)
    assert len(shape_figures.surfaces({"one": ball(n=16)[None]}, ("Co",), VOXEL).axes) == 1


def test_many_elements_go_on_in_the_next_row():
    figure = shape_figures.surfaces({"one": np.stack([ball(n=16)] * 6), "two": np.zeros((6, 16, 16, 16))},
                                    tuple("ABCDEF"), VOXEL)
    assert [ax.get_title() for ax in figure.axes] == 2 * [*"ABCDEF", "together"]
    assert [len(ax.collections) for ax in figure.axes] == [*6 * [1], 6, *7 * [0]]


def test_an_overlay_mixes_the_colours_of_the_elements_that_are_there():
    """One element in one half of x, the other in the upper half of z, so that one quarter has both colours."""
    volume = np.zeros((2, 8, 10, 12))
    volume[0, :, :, 6:], volume[1, 4:] = 2.0, 0.5
    figure = shape_figures.overlay({"found": volume}, ("Co", "O"), VOXEL)
    images = [ax.images[0].get_array() for ax in figure.axes]
    assert [image.shape for image in images] == [(10, 12, 3), (8, 12, 3), (8, 10, 3)]
    first, second = (np.array(to_rgb(colour)) for colour in shape_figures.COLOURS[:2])
    across = images[1]  # z up, x across
    np.testing.assert_allclose(across[0, 0], 0)
    np.testing.assert_allclose(across[0, -1], first, atol=1e-6)
    np.testing.assert_allclose(across[-1, 0], second, atol=1e-6)
    np.testing.assert_allclose(across[-1, -1], (first + second) / 2, atol=1e-6)
