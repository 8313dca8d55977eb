"""How a spectrum image lies on the HAADF image of its tilt: moved, drifted while it was scanned, or stretched.

A spectrum image takes minutes, and the specimen drifts meanwhile, linearly in time: rows, scanned one after the other
along y, are moved in proportion to their number, which shears and stretches the map (F3, Methods). A warp is a matrix
(2, 3): the pixel at p of the image, from its middle, lies at W[:, :2] p + W[:, 2] in the map, from the map's middle.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import ndimage

from engine.data import DataError

Kind = Literal["translation", "drift", "affine"]
# Columns of (W_yy, W_yx, W_xy, W_xx, b_y, b_x) that each kind finds; drift moves by what grows with y.
FREE: dict[str, list[int]] = {"translation": [4, 5], "drift": [0, 2, 4, 5], "affine": [0, 1, 2, 3, 4, 5]}
COARSE = (4.0, 2.0, 1.0)  # widths of the Gaussian, in the finest one, one after the other
STEPS = 15  # of Gauss and Newton at each width; a planted drift of 4 pixels was found in 6
EDGE = 0.04  # of a map at each edge that does not count
SAME = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])


def identity(tilts: int) -> np.ndarray:
    """(tilt, 2, 3) warps that change nothing."""
    return np.tile(_matrix(SAME), (tilts, 1, 1))


def fitted(maps: np.ndarray, images: np.ndarray, kind: Kind = "drift", smooth: float = 2.0) -> np.ndarray:
    """(tilt, 2, 3) warps of maps (tilt, y, x) onto images of the same tilts, both smoothed by a Gaussian [pixel].

    Least squares of each warped map to a gain and an offset of its image, coarse to fine. Raises DataError where a map
    shows nothing of its image.
    """
    return np.stack([_fit(a, b, kind, smooth, t) for t, (a, b) in enumerate(zip(maps, images, strict=True))])


def warped(places: np.ndarray, warp: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Places (2, ...) in an image of `shape` as places in the map."""
    middle = ((np.array(shape) - 1) / 2).reshape(2, *[1] * (places.ndim - 1))
    moved: np.ndarray = np.tensordot(warp[:, :2], places - middle, 1) + middle
    return moved + warp[:, 2].reshape(middle.shape)


def _fit(counts: np.ndarray, image: np.ndarray, kind: Kind, smooth: float, tilt: int) -> np.ndarray:
    ny, nx = image.shape
    pixels = np.indices((ny, nx)).astype(np.float64)
    y, x = (each - (n - 1) / 2 for each, n in zip(pixels, (ny, nx), strict=True))
    inside = (np.abs(y) < (0.5 - EDGE) * ny) & (np.abs(x) < (0.5 - EDGE) * nx)
    found, free, match = SAME.copy(), FREE[kind], 0.0
    scale = np.array([ny, nx, ny, nx, 2, 2])[free] / 2  # pixels that an edge moves by a unit
    for width in np.array(COARSE) * smooth:
        near, goal = (ndimage.gaussian_filter(np.asarray(each, np.float64), width) for each in (counts, image))
        slopes = np.gradient(near)
        for _ in range(STEPS):
            there = warped(pixels, _matrix(found), image.shape)
            now, down, across = (ndimage.map_coordinates(each, there, order=1, mode="nearest")[inside]
                                 for each in (near, *slopes))
            moves = np.stack([down * y[inside], down * x[inside], across * y[inside], across * x[inside], down, across])
            # The image's gain and offset are found with the warp, in one linear system.
            system = np.stack([*(moves[free] / scale[:, None]), -goal[inside], -np.ones(inside.sum())], 1)
            step, *_ = np.linalg.lstsq(system, -now, rcond=None)
            found[free] += np.clip(step[:len(free)], -width, width) / scale
            spread = now.std() * goal[inside].std()
            match = float(np.cov(now, goal[inside], ddof=0)[0, 1] / spread) if spread > 0 else 0.0
    if not match > 0.1:
        raise DataError(f"map {tilt} shows nothing of the image of its tilt (correlation {match:.2f}); leave out the "
                        "stage that registers maps, or that tilt")
    return _matrix(found)


def _matrix(numbers: np.ndarray) -> np.ndarray:
    return np.column_stack([numbers[:4].reshape(2, 2), numbers[4:]])
