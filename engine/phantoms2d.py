"""Specimens of 2D microscopy, described in nm, so that 64 and 256 pixels show one and the same specimen.

`coscoo`: a CoS core in a CoO shell, a 3D model projected (after F2, Fig. 6). `ga2o3`: overlapping films of Ga and O of
equal thickness (Fig. 5). `zns_cus`: columns of ZnS and Cu0.64S0.36 at atomic resolution, with a sharp interface that
has a step edge (Fig. 3). A pixel's value is a mean over its area, in concentration times thickness; the largest of
`coscoo` and of `zns_cus` is 1, and in `ga2o3` Ga and O have 0.4 and 0.6.
"""

from __future__ import annotations

import numpy as np

ELEMENTS: dict[str, dict[str, int]] = {
    "coscoo": {"Co": 27, "S": 16, "O": 8},
    "ga2o3": {"Ga": 31, "O": 8},
    "zns_cus": {"Cu": 29, "S": 16, "Zn": 30},
}
FIELD_NM = {"coscoo": 150.0, "ga2o3": 100.0, "zns_cus": 4.0}  # edge of the field of view
# Where the power is taken in the simulated image: F2 has (Z x)^gamma for the film (Fig. 5); thickness adds up.
WEIGHTS = {"coscoo": "z_gamma_linear", "ga2o3": "z_gamma", "zns_cus": "z_gamma_linear"}
SUBSAMPLES = 4  # per axis and pixel
_SPACING, _WIDTH = 0.27, 0.07  # [nm] between columns (ZnS along [110] has 0.27 and 0.19), and a column's sigma


def phantom(name: str, size: int) -> np.ndarray:
    """Maps (element, 1, y, x), float32, of a specimen in size x size pixels; elements in the order of ELEMENTS."""
    pixel = FIELD_NM[name] / size
    axis = ((np.arange(size * SUBSAMPLES) + 0.5) / SUBSAMPLES - size / 2) * pixel
    fine = {"coscoo": _coscoo, "ga2o3": _ga2o3, "zns_cus": _zns_cus}[name](axis[:, None], axis[None, :])
    maps = fine.reshape(len(fine), size, SUBSAMPLES, size, SUBSAMPLES).mean((2, 4))
    return (maps if name == "ga2o3" else maps / maps.max()).astype(np.float32)[:, None]


def _coscoo(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Co, S, O: paths through an ellipsoid of CoS inside one of CoO, which is 12 nm or more thick."""
    core = _chord(y - 3, x + 4, (38, 42, 36))
    shell = _chord(y, x, (52, 60, 54)) - core
    return np.stack([core + shell, core, shell])


def _chord(y: np.ndarray, x: np.ndarray, axes: tuple[float, float, float]) -> np.ndarray:
    """Paths along z [nm] through an ellipsoid of semi-axes (z, y, x) [nm]."""
    return 2 * axes[0] * np.sqrt(np.maximum(1 - (y / axes[1]) ** 2 - (x / axes[2]) ** 2, 0))


def _ga2o3(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Ga, O: a film with a wavy edge."""
    angle = np.arctan2(y, x)
    film = np.hypot(y, x) < 38 + 3 * np.sin(3 * angle) + 2 * np.cos(7 * angle + 1)
    return np.stack([0.4 * film, 0.6 * film])


def _zns_cus(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Cu, S, Zn: metal columns and sulphur columns between them; ZnS left of an interface with a step, copper right.

    Integrated over a region, ZnS has Zn : S = 50 : 50 and Cu0.64S0.36 has Cu : S = 64 : 36.
    """
    maps = np.zeros((3, y.size, x.size))
    reach = int(2.2 / _SPACING) + 2
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            place = (row * _SPACING, (column + 0.5 * (row % 2)) * _SPACING)
            copper = place[1] > (0.0 if place[0] < 0 else 2 * _SPACING)
            maps[0 if copper else 2] += _column(y - place[0], x - place[1])
            maps[1] += (36 / 64 if copper else 1.0) * _column(y - place[0] - _SPACING / 2, x - place[1])
    return maps


def _column(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.exp(-(y**2) / (2 * _WIDTH**2)) * np.exp(-(x**2) / (2 * _WIDTH**2))
