"""Euler angles of a tilted specimen, and what they do to positions (z, y, x). Imports without JAX.

Euler angles (about z, about y, about x): the specimen is turned first about z, then about y, then about x, each axis
fixed in the microscope. A positive angle turns +z toward +y about x, the tilt axis; +x toward +z about y; +y toward
+x about z. A tilt series is (0, 0, tilt): a voxel at (z, y) comes to y' = y cos + z sin, as in `engine.data`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data import DataError

# About x, y and z: the axes (from, to) of a volume (z, y, x) that a positive angle turns into each other.
PLANES = {"x": (0, 1), "y": (2, 0), "z": (1, 2)}
ORDER = "zyx"


def matrix(angles: Sequence[float] | np.ndarray) -> np.ndarray:
    """(3, 3) for positions (z, y, x): what Euler angles [deg] do to them, position' = matrix @ position."""
    found = np.eye(3)
    for axis, angle in zip(ORDER, np.radians(np.asarray(angles, np.float64))):
        start, end = PLANES[axis]
        turn = np.eye(3)
        turn[start, start] = turn[end, end] = np.cos(angle)
        turn[end, start], turn[start, end] = np.sin(angle), -np.sin(angle)
        found = turn @ found
    return found


def euler(turn: np.ndarray) -> np.ndarray:
    """Euler angles [deg] whose `matrix` is the rotation (3, 3) given; where about y is +-90, about x is 0."""
    about_y = np.arcsin(np.clip(-turn[2, 0], -1, 1))
    if abs(turn[2, 0]) < 1 - 1e-12:
        about_x, about_z = np.arctan2(turn[1, 0], turn[0, 0]), np.arctan2(turn[2, 1], turn[2, 2])
    else:
        about_x, about_z = 0.0, np.arctan2(-turn[1, 2], turn[1, 1])
    return np.degrees([about_z, about_y, about_x])


def about(axis: Sequence[float], angle: float) -> np.ndarray:
    """Euler angles [deg] of a turn by `angle` [deg] about any axis (z, y, x); about x it is (0, 0, angle)."""
    length = float(np.linalg.norm(axis))
    if length == 0:
        raise DataError("a rotation about an axis of length 0 means nothing; give a direction (z, y, x)")
    z, y, x = np.asarray(axis, np.float64) / length
    cross = np.array([[0, x, -y], [-x, 0, z], [y, -z, 0]])
    turn = np.radians(angle)
    return euler(np.eye(3) - np.sin(turn) * cross + (1 - np.cos(turn)) * cross @ cross)
