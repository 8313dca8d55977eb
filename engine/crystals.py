"""Cubic crystals by name: the edge of the cell, and what sits where in it. Imports without JAX.

co3o4: spinel, Fd-3m with its origin at -3m (choice 2), a = 0.8084 nm, u = 0.263: Co2+ on 8a (1/8, 1/8, 1/8), Co3+ on
16d (1/2, 1/2, 1/2), O2- on 32e (u, u, u). W. L. Smith, A. D. Hobson, Acta Cryst. B29, 362 (1973): a = 8.084 A,
u = 0.263. coo: rock salt, Fm-3m, a = 0.426 nm, Co on 4a and O on 4b (R. W. G. Wyckoff, Crystal Structures, vol. 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FCC = np.array([(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]) / 2
ROCK_SALT = np.array([0.5, 0, 0])  # from one kind of atom to the other
# Fd-3m, origin choice 2: the sites of 8a, 16d and 32e without the centring translations (International Tables A, 227).
_8A = np.array([(1, 1, 1), (7, 3, 3)]) / 8
_16D = np.array([(2, 2, 2), (1, 3, 0), (3, 0, 1), (0, 1, 3)]) / 4


def _32e(u: float) -> np.ndarray:
    """The eight positions of 32e, (u, u, u), beside which the centring puts the others."""
    signs = np.array([(1, 1, 1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1)])
    shifts = np.array([(0, 0, 0), (3, 1, 2), (1, 2, 3), (2, 3, 1)]) / 4
    four = signs * u + shifts
    return np.concatenate([four, -four])


@dataclass(frozen=True)
class Crystal:
    """edge: of the cubic cell [nm]. symbols: (atom,); positions: (atom, 3), in edges, within [0, 1). shift: of a
    lattice that translates the crystal into itself, (translation, 3) in edges: those of the centring."""

    edge: float
    symbols: np.ndarray
    positions: np.ndarray
    shifts: np.ndarray


def _crystal(edge: float, **sites: np.ndarray) -> Crystal:
    symbols, positions = [], []
    for name, places in sites.items():
        every = ((places[:, None] + FCC) % 1).reshape(-1, 3)
        symbols += [name.split("_")[0]] * len(every)
        positions.append(every)
    return Crystal(edge, np.array(symbols), np.concatenate(positions), FCC)


CRYSTALS = {
    "co3o4": _crystal(0.8084, Co_8a=_8A, Co_16d=_16D, O_32e=_32e(0.263)),
    "coo": _crystal(0.426, Co_4a=np.zeros((1, 3)), O_4b=ROCK_SALT[None]),
}
