"""Atoms: small models of nanoparticles, the potential that they make, and their positions as text.

Positions are (atom, 3), z, y, x in nm from the centre of the volume. Potentials come from the electron scattering
factors that gemmi tabulates: five Gaussians per element, L.-M. Peng, G. Ren, S. L. Dudarev, M. J. Whelan, Acta Cryst.
A52, 257 (1996), International Tables C, Table 4.3.2.2, for sin(theta) / lambda up to 2 / Angstrom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import constants
from scipy.spatial import cKDTree
from scipy.special import erf

from engine.crystals import CRYSTALS, FCC, ROCK_SALT
from engine.data import DataError
from engine.euler import matrix

# h^2 / (2 pi m0 e): what turns a scattering factor [nm] per volume into volts [V nm^2]; 47.88 V Angstrom^2.
VOLTS = constants.h**2 / (2 * np.pi * constants.m_e * constants.e) * 1e18
NEGLIGIBLE = 1e-7  # [nm] part of a scattering factor in a slice that is left out; Au has 1.06 nm in all
CARBON = 2000.0  # [kg m^-3] of amorphous films, which are 1800 to 2200
CARBON_APART = 0.13  # [nm] a little less than the bonds of graphite, 0.142 nm

Model = Literal["cuau", "bao", "co3o4", "coo"]


@dataclass(frozen=True)
class Atoms:
    """symbols: (atom,) of elements. positions: (atom, 3), z, y, x [nm] from the centre of the volume."""

    symbols: np.ndarray
    positions: np.ndarray

    def __post_init__(self) -> None:
        symbols, positions = np.asarray(self.symbols, str), np.asarray(self.positions, np.float64)
        if positions.shape != (*symbols.shape, 3) or symbols.ndim != 1:
            raise DataError(f"{symbols.size} atoms have positions of shape {positions.shape}; (atom, 3) are needed")
        if not np.isfinite(positions).all():
            raise DataError("an atom's position is not finite")
        object.__setattr__(self, "symbols", symbols)
        object.__setattr__(self, "positions", positions)

    def __len__(self) -> int:
        return len(self.symbols)

    def turned(self, angles: np.ndarray) -> Atoms:
        """Turned by Euler angles [deg] as `engine.euler` has them."""
        return replace(self, positions=self.positions @ matrix(angles).T)

    def joined(self, other: Atoms) -> Atoms:
        """These and others."""
        return Atoms(np.concatenate([self.symbols, other.symbols]), np.concatenate([self.positions, other.positions]))

    def shaken(self, amplitude: float, rng: np.random.Generator) -> Atoms:
        """Displaced at random by so many nm (root mean square along each axis)."""
        return replace(self, positions=self.positions + amplitude * rng.standard_normal(self.positions.shape))


def nanoparticle(model: Model = "cuau", radius: float = 1.73, *, disorder: float = 0.02, core: float = 0.71,
                 seed: int = 0) -> Atoms:
    """A particle of random shape and mean radius [nm], its lattice turned at random; co3o4 and coo are `cube`s.

    cuau: FCC, a = 0.378 nm, Cu inside `core` times the distance of the surface and Au outside; 1.73 nm hold the
    paper's 1,600 atoms, and 0.71 its 36 % of Cu. bao: Ba and O as in rock salt, a = 0.554 nm. disorder: root mean
    square displacement [nm] of an atom in space.
    """
    if model in CRYSTALS:
        return cube(model, 2 * radius, disorder=disorder, seed=seed)
    if model not in ("cuau", "bao"):
        raise DataError(f"there is no model of atoms called {model}; cuau, bao, {' and '.join(CRYSTALS)} are there")
    rng = np.random.default_rng([20_230, seed])
    edge = 0.378 if model == "cuau" else 0.554
    surface, lattice = _surface(rng), matrix(rng.uniform(-180, 180, 3))
    kinds = {"cuau": [("Au", FCC)], "bao": [("Ba", FCC), ("O", FCC + ROCK_SALT)]}[model]
    symbols, places = [], []
    for symbol, basis in kinds:
        found = filled(basis, edge, 1.6 * radius) @ lattice.T
        depth = np.linalg.norm(found, axis=1) / (radius * surface(found))
        inside = depth < 1
        kept = np.where(depth[inside] < core, "Cu", symbol) if model == "cuau" else np.full(inside.sum(), symbol)
        symbols.append(kept)
        places.append(found[inside])
    atoms = Atoms(np.concatenate(symbols), np.concatenate(places))
    return replace(atoms, positions=atoms.positions - atoms.positions.mean(0)).shaken(disorder / np.sqrt(3), rng)


def cube(model: str, edge: float, angles: Sequence[float] | None = None, *, disorder: float = 0.0,
         seed: int = 0) -> Atoms:
    """A cube of a crystal in `engine.crystals` with {100} faces, `edge` nm long, about the origin.

    angles: Euler angles [deg] of the lattice and the faces, at random where None. disorder: as in `nanoparticle`. The
    origin of a cell lies on the cube's centre, and so an atom or a symmetry does.
    """
    rng = np.random.default_rng([20_241, seed])
    turn = rng.uniform(-180, 180, 3) if angles is None else np.asarray(angles, np.float64)
    crystal = CRYSTALS[model]
    places = filled(crystal.positions, crystal.edge, edge / 2)
    symbols = np.tile(crystal.symbols, len(places) // len(crystal.symbols))
    inside = np.abs(places).max(1) <= edge / 2 + 1e-9
    atoms = Atoms(symbols[inside], places[inside]).turned(turn)
    return atoms.shaken(disorder / np.sqrt(3), rng)


def film(width: float, thickness: float, top: float, *, density: float = CARBON, seed: int = 0) -> Atoms:
    """A film of amorphous carbon, `width` nm along y and x and `thickness` along z, its face toward +z at `top` nm.

    density [kg m^-3]. Atoms are put at random, none closer than CARBON_APART to another: no bonds are modelled, whose
    rings an electron sees at frequencies beyond 2 / nm.
    """
    count = int(round(density * width**2 * thickness * 1e-27 / (12.011 * constants.atomic_mass)))
    rng = np.random.default_rng([20_242, seed])
    low, size = np.array([top - thickness, -width / 2, -width / 2]), np.array([thickness, width, width])
    places = np.zeros((0, 3))
    for _ in range(1000):
        more = low + size * rng.random((2 * (count - len(places)) + 16, 3))
        places = np.concatenate([places, more])
        first, second = cKDTree(places).query_pairs(CARBON_APART, output_type="ndarray").T
        places = np.delete(places, np.maximum(first, second), axis=0)[:count]
        if len(places) == count:
            return Atoms(np.full(count, "C"), places)
    raise DataError(f"a film of {density:g} kg m^-3 leaves no room for atoms {CARBON_APART} nm apart: make it lighter")


def filled(basis: np.ndarray, edge: float, reach: float) -> np.ndarray:
    """(atom, 3) [nm] of a basis (atom, 3) in all cubic cells of `edge` nm that come within `reach` nm of the origin."""
    cells = int(np.ceil(reach / edge)) + 1
    origins = np.stack(np.meshgrid(*[np.arange(-cells, cells + 1)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    return edge * (origins + basis).reshape(-1, 3)


def _surface(rng: np.random.Generator, roughness: float = 0.08) -> Callable[[np.ndarray], np.ndarray]:
    """A smooth random function of direction about 1: second and third Legendre polynomials about random axes."""
    axes = rng.standard_normal((6, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    weights = roughness * rng.standard_normal(6)

    def distance(positions: np.ndarray) -> np.ndarray:
        cosine = positions @ axes.T / np.maximum(np.linalg.norm(positions, axis=1, keepdims=True), 1e-12)
        bumps = np.where(np.arange(6) < 3, (3 * cosine**2 - 1) / 2, (5 * cosine**3 - 3 * cosine) / 2)
        return np.clip(1 + bumps @ weights, 0.75, 1.25)

    return distance


def scattering_factor(symbol: str) -> tuple[np.ndarray, np.ndarray]:
    """a [nm], b [nm^2] of f(q) = sum a exp(-b q^2 / 4), the electron scattering factor at a frequency q [1/nm]."""
    try:
        import gemmi
    except ImportError:
        raise DataError("scattering factors come from gemmi, which is not installed: "
                        "pip install 'tomoatlas[tables]'") from None
    element = gemmi.Element(symbol)
    if element.atomic_number == 0 or element.c4322 is None:
        raise DataError(f"{symbol}: no element of this name has a tabulated electron scattering factor")
    return np.array(element.c4322.a) / 10, np.array(element.c4322.b) / 100


def potential_slices(atoms: Atoms, size: int, pixel: float, slices: int, thickness: float,
                     thermal: float = 0.0) -> np.ndarray:
    """Projected potentials (slice, y, x) [V nm], float32, of slices that fill slices x thickness [nm] about the centre.

    Each Gaussian is cut between the slices exactly and sampled in Fourier space, so that nothing beyond the pixels'
    frequencies folds back; the field repeats along y and x. thermal: root mean square displacement along each axis
    [nm] whose blur is included, a Debye-Waller factor.
    """
    q = np.fft.fftfreq(size, pixel)
    edges = (np.arange(slices + 1) - slices / 2) * thickness
    terms = [_gaussians(atoms.positions[atoms.symbols == s], s, q, edges, thermal) for s in np.unique(atoms.symbols)]
    shares, ys, xs = (np.concatenate([term[k] for term in terms]) for k in range(3))
    found = np.empty((slices, size, size), np.float32)
    for m in range(slices):
        seen = np.abs(shares[:, m]) > NEGLIGIBLE * VOLTS
        spectrum = (ys[seen] * shares[seen, m, None]).T @ xs[seen]
        found[m] = np.fft.ifft2(spectrum).real / pixel**2
    return found


def _gaussians(positions: np.ndarray, symbol: str, q: np.ndarray, edges: np.ndarray,
               thermal: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every atom and Gaussian: (term, slice) potential in each slice, and (term, q) its transforms along y and x."""
    a, b = scattering_factor(symbol)
    b = b + 8 * np.pi**2 * thermal**2
    sigma = np.sqrt(b / (8 * np.pi**2))
    within = erf((edges - positions[:, 0, None])[:, None, :] / (np.sqrt(2) * sigma[:, None])) / 2
    shares = VOLTS * a[:, None] * np.diff(within, axis=2)
    # Pixel 0 lies (n - 1) / 2 pixels before the centre.
    start = (len(q) - 1) / 2 / (len(q) * (q[1] - q[0]))
    waves = [np.exp(-(q**2) * b[:, None] / 4 - 2j * np.pi * (positions[:, k, None, None] + start) * q) for k in (1, 2)]
    ys, xs = (w.astype(np.complex64).reshape(-1, len(q)) for w in waves)
    return shares.reshape(-1, len(edges) - 1).astype(np.float32), ys, xs


def potential(atoms: Atoms, size: int, pixel: float, thermal: float = 0.0) -> np.ndarray:
    """Mean potential (z, y, x) [V] in the voxels of a cube: what a reconstruction is to find, as far as it resolves."""
    return potential_slices(atoms, size, pixel, size, pixel, thermal) / np.float32(pixel)


def xyz_text(atoms: Atoms, size: float, **columns: np.ndarray) -> str:
    """Extended XYZ of atoms in a cube of `size` [nm], as ASE and OVITO read it: x, y, z in Angstrom from its corner.

    columns: further numbers of each atom by name, one (atom,) array each.
    """
    edge = 10 * size
    names = "".join(f":{name}:R:1" for name in columns)
    lattice = " ".join(f"{v:g}" for v in (edge * np.eye(3)).ravel())
    lines = [str(len(atoms)), f'Lattice="{lattice}" Properties=species:S:1:pos:R:3{names} pbc="F F F"']
    places = 10 * atoms.positions[:, ::-1] + edge / 2
    for symbol, place, *more in zip(atoms.symbols, places, *columns.values()):
        lines.append(" ".join([f"{symbol:2}", *(f"{v:12.6f}" for v in place), *(f"{v:.6g}" for v in more)]))
    return "\n".join(lines) + "\n"
