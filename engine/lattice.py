"""How a known lattice lies in a volume.

Romanov et al., Multi-slice electron ptychographic tomography, section 3: the rotation from the lattice's Bragg peaks,
the translation from the crystal's potential. Volumes are (z, y, x), positions z, y, x [nm] from the volume's centre,
angles those of `engine.euler`.

A missing wedge cuts through the peaks on its rim and draws the rotation away from them, by up to half a degree for a
crystal of four cells, without any noise; `register(missing=...)` leaves them out.

A rotation is found up to the lattice's symmetry, a translation up to a lattice vector: the crystals of
`engine.crystals` have the Laue group m-3m, under which all 24 turns of a cube are one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import fft, ndimage
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from threadpoolctl import threadpool_limits

from engine.atoms import Atoms, filled, scattering_factor
from engine.crystals import CRYSTALS, Crystal
from engine.data import DataError
from engine.euler import euler, matrix

WEAK = 0.05  # of the strongest structure factor: reflections below are left out
REACH = 5.0  # [deg] between orientations of the search over all, and beyond one that is given
CLEAR = 3.0  # steps of frequency from the rim of a missing wedge, beyond which a peak is whole
KEPT = 12  # orientations of the search that are refined
CELL = 48  # places along an edge of the cell where the translation is tried before it is refined


@dataclass(frozen=True)
class Registered:
    """A crystal that lies in a volume: a site at p [edge] of its cell is at matrix(angles) @ (edge p) + shift [nm].

    shift: as near to the volume's centre as a lattice vector brings it. agreement: correlation of the volume's Bragg
    peaks with the crystal's structure factors, phases included, from 0 to 1. contrast: mean amplitude at the peaks over
    the mean on their spheres, 1 where there is no lattice.
    """

    crystal: Crystal
    angles: np.ndarray
    shift: np.ndarray
    agreement: float
    contrast: float

    def sites(self, mask: np.ndarray, voxel: float) -> Atoms:
        """The crystal's sites in the voxels of a mask (z, y, x)."""
        mask = np.asarray(mask, bool)
        reach = float(np.linalg.norm(mask.shape)) * voxel / 2 + float(np.linalg.norm(self.shift))
        places = filled(self.crystal.positions, self.crystal.edge, reach) @ matrix(self.angles).T + self.shift
        symbols = np.tile(self.crystal.symbols, len(places) // len(self.crystal.symbols))
        index = np.rint(places / voxel + (np.array(mask.shape) - 1) / 2).astype(int)
        inside = ((index >= 0) & (index < mask.shape)).all(1)
        inside[inside] = mask[tuple(index[inside].T)]
        return Atoms(symbols[inside], places[inside])


def register(volume: np.ndarray, voxel: float, crystal: Crystal | str, *, angles: np.ndarray | None = None,
             mask: np.ndarray | None = None, finest: float | None = None, missing: float = 0.0) -> Registered:
    """How a crystal, or one of `engine.crystals` by name, lies in a volume with voxels of `voxel` nm.

    angles: [deg] near which the rotation is, within REACH; all are tried where None. mask: (z, y, x) weights of the
    part that is looked at, 0 to 1 with a soft rim; a Hann window where None. finest: [nm] period below which
    reflections are left out, two voxels where None. missing: [deg] half the angle about z, across x, that the tilts
    left out: 90 less the highest tilt.
    """
    crystal = _named(crystal)
    values = _weighted(volume, mask)
    indices, factors = reflections(crystal, max(2.0 * voxel, finest or 0.0))
    turn, contrast = _rotation(values, voxel, indices / crystal.edge, np.abs(factors), angles, missing)
    with threadpool_limits(1, "blas"):  # threads that wait for each other took up to 4 s on a busy machine, one 0.02 s
        place, agreement = _placed(values, voxel / crystal.edge, indices, factors, turn)
    # Of the lattice's vectors the one that brings the origin nearest to the centre.
    near = (place + crystal.shifts + np.array(np.meshgrid(*[(-1, 0, 1)] * 3)).reshape(3, -1).T[:, None]).reshape(-1, 3)
    place = near[np.argmin((near**2).sum(1))]
    return Registered(crystal, euler(turn), crystal.edge * turn @ place, agreement, contrast)


def misfit(a: np.ndarray, b: np.ndarray) -> float:
    """[deg] between two rotations, given by angles, of a cubic lattice: the least over the 24 turns of a cube."""
    cosines = [(np.trace(matrix(a) @ turn @ matrix(b).T) - 1) / 2 for turn in Rotation.create_group("O").as_matrix()]
    return float(np.degrees(np.arccos(np.clip(max(cosines), -1, 1))))


def reflections(crystal: Crystal, finest: float) -> tuple[np.ndarray, np.ndarray]:
    """(reflection, 3) indices and complex structure factors [nm] with periods of `finest` nm or more, without 0."""
    top = int(crystal.edge / finest)
    indices = np.stack(np.meshgrid(*[np.arange(-top, top + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    q = np.linalg.norm(indices, axis=1) / crystal.edge
    indices, q = indices[(q > 0) & (q <= 1 / finest)], q[(q > 0) & (q <= 1 / finest)]
    if len(indices) == 0:
        raise DataError(f"a cell of {crystal.edge} nm has no reflection with a period of {finest} nm or more: "
                        "take finer voxels")
    factors = np.zeros(len(indices), complex)
    for symbol in np.unique(crystal.symbols):
        a, b = scattering_factor(symbol)
        waves = np.exp(-2j * np.pi * indices @ crystal.positions[crystal.symbols == symbol].T).sum(1)
        factors += waves * (a * np.exp(-b * q[:, None] ** 2 / 4)).sum(1)
    strong = np.abs(factors) > WEAK * np.abs(factors).max()
    return indices[strong], factors[strong]


def _named(crystal: Crystal | str) -> Crystal:
    if isinstance(crystal, Crystal):
        return crystal
    if crystal not in CRYSTALS:
        raise DataError(f"there is no crystal called {crystal}; {' and '.join(CRYSTALS)} are there")
    return CRYSTALS[crystal]


def _weighted(volume: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The volume under the mask or window, its weighted mean taken away."""
    values = np.asarray(volume, np.float32)
    if values.ndim != 3 or not np.isfinite(values).all():
        raise DataError(f"a lattice is looked for in a finite volume (z, y, x); this one has shape {values.shape}")
    if mask is None:
        z, y, x = (np.sin(np.pi * (np.arange(n) + 0.5) / n).astype(np.float32) ** 2 for n in values.shape)
        weight = z[:, None, None] * y[:, None] * x
    else:
        weight = np.asarray(mask, np.float32)
        if weight.shape != values.shape or not weight.sum() > 0:
            raise DataError(f"the mask of shape {weight.shape} does not fit a volume of shape {values.shape}, or is 0")
    found: np.ndarray = (values - np.vdot(weight, values) / weight.sum()) * weight
    return found


def _rotation(values: np.ndarray, voxel: float, g: np.ndarray, weights: np.ndarray,
              angles: np.ndarray | None, missing: float) -> tuple[np.ndarray, float]:
    """The rotation (3, 3) that brings reflections g [1/nm] to where the spectrum is strongest; how much stronger.

    The spectrum's power is blurred so far that the search's steps cannot miss a peak, then less and less.
    """
    half = g[(g @ np.array([1e6, 1e3, 1.0])) > 0]  # q and -q have one power
    weights = weights[(g @ np.array([1e6, 1e3, 1.0])) > 0]
    spectrum = fft.fftshift(fft.fftn(values))
    power = spectrum.real**2 + spectrum.imag**2
    size = np.array(power.shape)
    lengths = np.linalg.norm(half, axis=1)
    low = lengths <= 1.5 * lengths[weights > 0.5 * weights.max()].min()  # few reach far enough to be found coarsely
    blur = max(1.4, np.radians(REACH) / 2 * lengths[low].max() * size.max() * voxel / 2)

    def amplitude(sigma: float) -> np.ndarray:
        return ndimage.spline_filter(np.sqrt(ndimage.gaussian_filter(power, sigma, mode="wrap")), 3, mode="grid-wrap")

    def score(turns: np.ndarray, field: np.ndarray, of: np.ndarray) -> np.ndarray:
        places = np.einsum("nij,gj->ing", turns, half[of]) * (size * voxel)[:, None, None] + (size // 2)[:, None, None]
        found: np.ndarray = ndimage.map_coordinates(field, places, order=3, mode="grid-wrap", prefilter=False)
        return found @ weights[of] / weights[of].sum()

    def rim(of: np.ndarray) -> float:  # [step] how far out the reflections lie
        return float(lengths[of].max() * size.max() * voxel)

    field = amplitude(blur)
    tried = _orientations(REACH) if angles is None else _beside(REACH) @ matrix(angles)
    values_at = np.concatenate([score(part, field, low) for part in np.array_split(tried, 1 + len(tried) // 2000)])
    best = tried[np.argsort(-values_at)[:KEPT]]
    every = np.ones(len(half), bool)
    while blur > 0.7:
        blur = max(blur / 2, 0.7)
        of = every if blur <= 2 else low
        rise = partial(score, field=amplitude(blur), of=of)
        best = np.array([_refined(turn, rise, 0.7 * blur / rim(of)) for turn in best])
    scores = rise(best)
    turn, spheres = best[scores.argmax()], rise(Rotation.random(500, rng=0).as_matrix()).mean()
    if missing > 0:
        z, y = np.abs(half @ turn.T).T[:2]
        whole = y * np.cos(np.radians(missing)) - z * np.sin(np.radians(missing)) > CLEAR / (size.min() * voxel)
        turn = _refined(turn, partial(score, field=amplitude(0.7), of=whole), 0.5 / rim(every))
    return turn, float(scores.max() / spheres)


def _refined(turn: np.ndarray, rise: Callable[[np.ndarray], np.ndarray], reach: float) -> np.ndarray:
    """The rotation near `turn` where `rise` is highest, by Nelder and Mead's simplex, `reach` rad wide at first."""
    start = np.concatenate([np.zeros((1, 3)), np.eye(3)]) * reach
    found = minimize(lambda v: -float(rise((Rotation.from_rotvec(v).as_matrix() @ turn)[None])[0]), np.zeros(3),
                     method="Nelder-Mead",
                     options={"initial_simplex": start, "xatol": 1e-4, "fatol": 0.0, "maxfev": 120})
    refined: np.ndarray = Rotation.from_rotvec(found.x).as_matrix() @ turn
    return refined


def _orientations(step: float) -> np.ndarray:
    """(n, 3, 3): all rotations but for the 24 turns of a cube, no more than about `step` degrees apart.

    Rodrigues' vectors, axis times tan(angle / 2), in a cube without its corners (A. Heinz, P. Neumann, Acta Cryst. A47,
    780 (1991)).
    """
    side = np.tan(np.pi / 8)
    count = int(np.ceil(2 * side / (np.radians(step) / 2)))
    line = (np.arange(count) + 0.5) / count * 2 * side - side
    vectors = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    vectors = vectors[np.abs(vectors).sum(1) <= 1]
    return Rotation.from_quat(np.concatenate([vectors, np.ones((len(vectors), 1))], 1)).as_matrix()


def _beside(reach: float) -> np.ndarray:
    """(n, 3, 3): rotations by up to `reach` degrees about each axis."""
    line = np.radians(np.linspace(-reach, reach, 5))
    return Rotation.from_rotvec(np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)).as_matrix()


def _placed(values: np.ndarray, voxel: float, indices: np.ndarray, factors: np.ndarray,
            turn: np.ndarray) -> tuple[np.ndarray, float]:
    """The place (3,) of the cell's origin, and how well all phases agree there; lengths in cell edges.

    What is made largest is the correlation of the volume with the crystal's potential, summed over reflections.
    """
    seen = np.zeros(len(indices), complex)  # the Fourier transform about the centre, summed, not interpolated
    for part in np.array_split(np.arange(len(indices)), 1 + len(indices) // 128):  # bounds memory
        q = voxel * indices[part] @ turn.T
        waves = [np.exp(-2j * np.pi * np.outer(np.arange(n) - (n - 1) / 2, q[:, k])).astype(np.complex64)
                 for k, n in enumerate(values.shape)]
        seen[part] = (np.einsum("zyg,yg->zg", values @ waves[2], waves[1]) * waves[0]).sum(0)
    products = np.conj(factors) * seen
    grid = np.zeros((CELL,) * 3, complex)
    np.add.at(grid, tuple((indices % CELL).T), products)
    start = np.array(np.unravel_index(fft.ifftn(grid).real.argmax(), grid.shape)) / CELL
    scale = float(np.abs(products).sum()) or 1.0

    def falls(place: np.ndarray) -> tuple[float, np.ndarray]:
        waves = products * np.exp(2j * np.pi * indices @ place)
        return -float(waves.real.sum()) / scale, 2 * np.pi * indices.T @ waves.imag / scale

    best = minimize(falls, start, jac=True, method="BFGS")
    norm = np.linalg.norm(factors) * np.linalg.norm(seen)
    return best.x, float(-best.fun * scale / norm) if norm > 0 else 0.0
