"""4D-STEM tilt series: diffraction patterns of a scanned probe, and their simulation from atoms.

The simulation shares neither grid nor slices with a reconstruction: finer pixels, slices of 0.1 nm, a band limit of
two thirds, potentials of atoms whose tails are cut at no voxel. Its patterns are what the reconstruction's field
holds, cropped from a wider detector, on which the annular dark field is summed in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.atoms import Atoms, potential_slices
from engine.data import DataError
from engine.multislice import Beam, Optics, batches, beam, far_field, frequencies, probes

BAND = 2 / 3  # of the highest frequency; what is beyond would be aliased
THERMAL = 0.0085  # [nm] along each axis; gold and copper at room temperature


@dataclass(frozen=True)
class DiffractionSeries:
    """Patterns of every tilt and probe, and what made them.

    patterns: (tilt, probe, qy, qx), float32; frequency 0 lies at n // 2. One pixel is 1 / (n x pixel) 1/nm. In place
        of an array, anything of that `shape` that gives a tilt's (probe, qy, qx) for its index, as
        `engine.scans.Streamed` does from disk.
    angles: (tilt, 3) Euler angles [deg] as `engine.euler` has them; of (tilt,), they are about x, the tilt axis.
    positions: (probe, 2), y and x [nm] of the probes, from the field's centre and the tilt axis.
    pixel: [nm] of the field that a pattern holds, a window of as many pixels; of MSET's volume as well.
    electrons: that one probe sends onto the specimen; 1 where patterns are shares of the beam.
    adf: (tilt, probe) share of the beam on an annular detector; None where it was not recorded (`engine.adf`).
    """

    patterns: Any
    angles: np.ndarray
    positions: np.ndarray
    pixel: float
    optics: Optics
    electrons: float = 1.0
    adf: np.ndarray | None = None

    def __post_init__(self) -> None:
        patterns = self.patterns if self.streamed else np.asarray(self.patterns, np.float32)
        angles = np.asarray(self.angles, np.float64)
        if angles.ndim == 1:
            angles = np.stack([0 * angles, 0 * angles, angles], 1)
        positions = np.asarray(self.positions, np.float64)
        if len(patterns.shape) != 4 or patterns.shape[2] != patterns.shape[3] or 0 in patterns.shape:
            raise DataError(f"patterns have shape {patterns.shape}; (tilt, probe, n, n) are needed")
        if angles.shape != (patterns.shape[0], 3):
            raise DataError(f"{len(angles)} angles for patterns of {patterns.shape[0]} tilts")
        if positions.shape != (patterns.shape[1], 2):
            raise DataError(f"{len(positions)} positions for {patterns.shape[1]} probes of each tilt")
        if not (np.isfinite(angles).all() and np.isfinite(positions).all()):
            raise DataError("angles or probe positions are NaN or infinite; repair or leave out those tilts")
        if not self.streamed:
            counted(patterns, "patterns")
        if not (self.pixel > 0 and self.electrons > 0):
            raise DataError(f"the pixel is {self.pixel} nm and a probe has {self.electrons} electrons; "
                            "both must be positive")
        if self.adf is not None and (np.shape(self.adf) != patterns.shape[:2] or not np.isfinite(self.adf).all()):
            raise DataError(f"the dark field has shape {np.shape(self.adf)}; {patterns.shape[:2]} (tilt, probe) finite "
                            "numbers are needed")
        object.__setattr__(self, "patterns", patterns)
        object.__setattr__(self, "angles", angles)
        object.__setattr__(self, "positions", positions)

    @property
    def size(self) -> int:
        """Pixels along an edge of a pattern, and voxels along one of the volume."""
        return self.patterns.shape[2]

    @property
    def streamed(self) -> bool:
        """Whether the patterns are read a tilt at a time, as they are needed."""
        return not isinstance(self.patterns, np.ndarray | list | tuple | jax.Array)


def counted(patterns: np.ndarray, name: str) -> np.ndarray:
    """The patterns (..., qy, qx) themselves; DataError where they cannot be counts of electrons."""
    if not np.isfinite(patterns).all():
        raise DataError(f"{name}: some pixels are NaN or infinite; repair or leave out those tilts")
    if patterns.min() < 0:
        raise DataError(f"{name}: are counts and cannot be negative (minimum {patterns.min():g}); "
                        "subtract no more than the detector's dark level")
    return patterns


@dataclass(frozen=True)
class Scan:
    """What a simulation records.

    size, pixel [nm]: of the patterns' field. probes: along an edge of the square scan, which fills the field.
    finer: the simulation's pixels in one of the field's. slices: at most so thick [nm]. phonons: configurations of
    displaced atoms averaged; with 0 their mean blur is in the potential. thermal: displacement along an axis [nm].
    detector: inner and outer semi-angle [mrad] of the dark field, of which waves fill what lies below `reach`; the
    paper's pixels of 0.0057 nm are 7 in one of 0.04 nm.
    """

    size: int = 48
    pixel: float = 0.04
    probes: int = 8
    optics: Optics = Optics()
    finer: int = 3
    slices: float = 0.1
    phonons: int = 0
    thermal: float = THERMAL
    detector: tuple[float, float] = (40.0, 200.0)

    @property
    def reach(self) -> float:
        """[mrad] the largest angle that waves have, with their band limit of two thirds."""
        return 1e3 * self.optics.wavelength * BAND * self.finer / (2 * self.pixel)

    @property
    def depth(self) -> tuple[int, float]:
        """Number and thickness [nm] of the simulation's slices."""
        width = self.size * self.pixel
        count = int(np.ceil(width / self.slices - 1e-9))
        return count, width / count

    @property
    def positions(self) -> np.ndarray:
        """(probe, 2), y and x [nm] from the field's centre; rows of the scan run along x."""
        step = self.size * self.pixel / self.probes
        axis = (np.arange(self.probes) - (self.probes - 1) / 2) * step
        return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def simulate(atoms: Atoms, scan: Scan, angles: np.ndarray, seed: int = 0,
             shifts: np.ndarray | None = None, around: Atoms | None = None) -> DiffractionSeries:
    """Patterns without noise, as shares of the beam, and the dark field, at angles (tilt,) or (tilt, 3) [deg].

    shifts: (tilt, 2), y and x [nm] by which the specimen lies off the middle of the scan. around: atoms of a film that
    may reach out of the field, where it is cut off. Raises DataError where other atoms lie outside at some tilt.
    """
    angles = np.asarray(angles, np.float64)
    turns = angles if angles.ndim == 2 else np.stack([0 * angles, 0 * angles, angles], 1)
    fine = beam(scan.size * scan.finer, scan.pixel / scan.finer, scan.optics, scan.depth[1], band_limit=BAND)
    patterns = np.zeros((len(turns), scan.probes**2, scan.size, scan.size), np.float32)
    adf = np.zeros(patterns.shape[:2])
    for t, share, volts in potentials(atoms, scan, turns, seed, shifts, around):
        bright, dark = _recorded(fine, scan, volts)
        patterns[t] += share * bright
        adf[t] += share * dark
    seen = scan.reach > scan.detector[0]
    return DiffractionSeries(patterns, turns, scan.positions, scan.pixel, scan.optics, adf=adf if seen else None)


def potentials(atoms: Atoms, scan: Scan, turns: np.ndarray, seed: int = 0,
               shifts: np.ndarray | None = None,
               around: Atoms | None = None) -> Iterator[tuple[int, float, np.ndarray]]:
    """Of every tilt (3,) [deg] and configuration of atoms: which tilt, its share of the tilt's configurations, and its
    potentials (slice, y, x) [V nm], as `simulate` has them."""
    width = scan.size * scan.pixel
    moves = np.zeros((len(turns), 3)) if shifts is None else np.pad(np.asarray(shifts, np.float64), ((0, 0), (1, 0)))
    reach = float(np.linalg.norm(atoms.positions, axis=1).max() + np.abs(moves).max())
    if reach > width / 2:
        raise DataError(f"an atom lies {reach:.3g} nm from the centre of a volume {width:.3g} nm wide; "
                        "use more or larger voxels, or a smaller particle")
    if around is not None:
        atoms = atoms.joined(around)
    rng, configurations = np.random.default_rng([20_231, seed]), max(1, scan.phonons)
    for t, turn in enumerate(turns):
        for _ in range(configurations):
            moved = atoms.shaken(scan.thermal, rng) if scan.phonons else atoms
            places = moved.turned(turn).positions + moves[t]
            inside = (np.abs(places) <= width / 2).all(1)
            placed = Atoms(moved.symbols[inside], places[inside])
            yield t, 1 / configurations, potential_slices(placed, scan.size * scan.finer,
                                                          scan.pixel / scan.finer, *scan.depth,
                                                          0.0 if scan.phonons else scan.thermal)


def with_dose(series: DiffractionSeries, dose: float, seed: int = 0) -> DiffractionSeries:
    """The series as counted, Poisson distributed, at so many electrons per square Angstrom for all tilts together.

    The dose is spread over the field. Takes patterns that are shares of the beam.
    """
    if series.electrons != 1 or dose <= 0:
        raise DataError(f"a dose of {dose:g} e/A^2 is to be positive, and given once: take the series without noise")
    area = (10 * series.size * series.pixel) ** 2
    tilts, count = series.patterns.shape[:2]
    electrons = dose * area / (tilts * count)
    rng = np.random.default_rng([20_232, seed])
    counts = rng.poisson(electrons * np.asarray(series.patterns, np.float64)).astype(np.float32)
    adf = None if series.adf is None else rng.poisson(electrons * series.adf) / electrons
    return replace(series, patterns=counts, electrons=electrons, adf=adf)


def _recorded(fine: Beam, scan: Scan, volts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(probe, qy, qx) of one specimen, frequency 0 at n // 2, and (probe,) on the dark-field detector."""
    size = volts.shape[1]
    phases = jnp.asarray(scan.optics.interaction * volts)
    ring = annulus(scan, size)
    count, each = batches(scan.probes**2, size, 2**24)
    positions = np.resize(scan.positions, (count * each, 2)).astype(np.float32)  # the last batch is filled up
    found = [_detected(fine, jnp.asarray(part), phases, ring, scan.size) for part in np.split(positions, count)]
    bright, dark = (np.concatenate([np.asarray(f[k]) for f in found])[:scan.probes**2] for k in range(2))
    return bright, dark


def annulus(scan: Scan, size: int) -> jax.Array:
    """(y, x) 1 on the dark-field detector, 0 elsewhere, for a field of so many of the simulation's pixels."""
    low, high = ((angle * 1e-3 / scan.optics.wavelength) ** 2 for angle in scan.detector)
    q2 = frequencies(size, scan.pixel / scan.finer)
    return jnp.asarray((q2 >= low) & (q2 <= high), jnp.float32)


def _patterns(fine: Beam, positions: jax.Array, phases: jax.Array, ring: jax.Array,
              size: int) -> tuple[jax.Array, jax.Array]:
    intensity = jnp.abs(far_field(probes(fine, positions), phases, fine.propagator)) ** 2
    first = intensity.shape[1] // 2 - size // 2
    centred = jnp.fft.fftshift(intensity, axes=(1, 2))
    return centred[:, first:first + size, first:first + size], (intensity * ring).sum((1, 2))


_detected = jax.jit(_patterns, static_argnames="size")
