"""Multislice: a focused probe passes a specimen slice by slice, and its far field is what a detector sees.

A slice turns the wave's phase, t = exp(i phase), and empty space carries it on to the next, psi <- F^-1 P F t psi
(Lee et al., Multislice Electron Tomography using 4D-STEM, Eq. 4). A slice acts at its middle: the probe starts half a
slice in front of the first, so that thick and thin slices, and one alone, show a specimen at the same height.

|t| = |P| = 1: the wave in front of a slice follows from the one behind it. `error_and_gradient` therefore keeps no
wave on the way forth and rebuilds each on the way back, beside the residual's (Eq. B5). Where memory allows,
`kept_gradient` is faster by a third; a band limit, which waves do not survive, needs it.

Waves are complex64 (probe, y, x) of unit sum of squares; transforms are unitary, and detectors are in the transform's
order, frequency 0 first. Lengths in nm, frequencies in 1/nm, phases in rad.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import constants
from scipy.optimize import minimize_scalar

from engine.data import DataError

_REST = constants.m_e * constants.c**2 / constants.e  # [V] rest energy of an electron
FLOOR = 1e-12  # below it, a far field has no phase worth keeping; a beam's mean amplitude is 1 / n
DAMPING = 1e-5  # of a probe's displacement, in the largest curvature that it can have


@dataclass(frozen=True)
class Optics:
    """What forms the probe: acceleration [kV], semi-angle of the aperture [mrad], aberrations [nm].

    defocus is -C1: at -20 nm the beam's crossover lies 20 nm before the entrance face, where the volume begins.
    """

    voltage: float = 300.0
    aperture: float = 21.0
    defocus: float = -20.0
    c3: float = 0.0
    c5: float = 0.0

    @property
    def wavelength(self) -> float:
        """[nm], relativistic."""
        volts = self.voltage * 1e3
        momentum = np.sqrt(2 * constants.m_e * constants.e * volts * (1 + volts / (2 * _REST)))
        return float(constants.h / momentum * 1e9)

    @property
    def interaction(self) -> float:
        """sigma [rad / (V nm)]: the phase that a volt adds along a nanometre."""
        volts = self.voltage * 1e3
        return 2 * np.pi / (self.wavelength * volts) * (_REST + volts) / (2 * _REST + volts)


class Beam(NamedTuple):
    """spectrum: of the probe at the field's centre, half a slice before the first. propagator: from slice to slice."""

    spectrum: jax.Array  # (y, x), complex64
    propagator: jax.Array  # (y, x), complex64
    pixel: jax.Array  # [nm]


def frequencies(size: int, pixel: float) -> np.ndarray:
    """(y, x) squared lengths [1 / nm^2] of the frequencies of a square field."""
    axis = np.fft.fftfreq(size, pixel)
    return axis[:, None] ** 2 + axis[None, :] ** 2


def propagator(size: int, pixel: float, wavelength: float, distance: float) -> np.ndarray:
    """P = exp(-i pi lambda q^2 dz) of free space (Eq. 4), complex128."""
    return np.exp(-1j * np.pi * wavelength * distance * frequencies(size, pixel))


def aberration(q2: np.ndarray, optics: Optics) -> np.ndarray:
    """chi(q) [rad] (Eq. 3), from squared frequencies."""
    s2 = optics.wavelength**2 * q2
    return 2 * np.pi / optics.wavelength * (-optics.defocus * s2 / 2 + optics.c3 * s2**2 / 4 + optics.c5 * s2**3 / 6)


def beam(size: int, pixel: float, optics: Optics, thickness: float, band_limit: float | None = None) -> Beam:
    """The probe of a field of `size` pixels, and what carries it over slices of `thickness` [nm].

    band_limit: share of the highest frequency of either axis beyond which waves are cut off (2 / 3 is safe from
    aliasing); None for none. Raises DataError where the aperture does not fit the sampling.
    """
    q2 = frequencies(size, pixel)
    edge = (optics.aperture * 1e-3 / optics.wavelength) ** 2
    limit = (band_limit or 1.0) / (2 * pixel)
    if edge >= limit**2:
        raise DataError(f"an aperture of {optics.aperture:g} mrad lets {np.sqrt(edge):.3g} 1/nm pass and pixels of "
                        f"{pixel:g} nm hold {limit:.3g} 1/nm; use smaller pixels or a smaller aperture")
    start = propagator(size, pixel, optics.wavelength, thickness / 2)
    spectrum = (q2 <= edge) * np.exp(-1j * aberration(q2, optics)) * start
    spectrum /= np.linalg.norm(spectrum)
    carry = propagator(size, pixel, optics.wavelength, thickness)
    if band_limit is not None:
        carry = carry * (q2 <= limit**2)
    return Beam(jnp.asarray(spectrum, jnp.complex64), jnp.asarray(carry, jnp.complex64), jnp.float32(pixel))


def probes(beam: Beam, positions: jax.Array) -> jax.Array:
    """Waves (probe, y, x) of probes at positions (probe, 2), y and x [nm] from the field's centre, (n - 1) / 2."""
    along_y, along_x = _ramps(beam, positions)
    return jnp.fft.ifft2(beam.spectrum * along_y[:, :, None] * along_x[:, None, :], norm="ortho")


def _ramps(beam: Beam, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(probe, qy), (probe, qx): the phases that shift a probe from pixel 0 to its position."""
    size = beam.spectrum.shape[0]
    turns = (positions / beam.pixel + (size - 1) / 2)[..., None] * jnp.asarray(np.fft.fftfreq(size), jnp.float32)
    # Whole turns are taken off before the exponential: far positions would cost single precision its digits.
    ramps = jnp.exp(-2j * jnp.pi * (turns - jnp.round(turns)))
    return ramps[:, 0], ramps[:, 1]


def exit_waves(waves: jax.Array, phases: jax.Array, carry: jax.Array) -> jax.Array:
    """Waves (probe, y, x) one slice behind the last of the slices `phases` (slice, y, x)."""

    def passed(psi: jax.Array, phase: jax.Array) -> tuple[jax.Array, None]:
        return jnp.fft.ifft2(carry * jnp.fft.fft2(jnp.exp(1j * phase) * psi)), None

    return jax.lax.scan(passed, waves, phases)[0]


def far_field(waves: jax.Array, phases: jax.Array, carry: jax.Array) -> jax.Array:
    """The complex wave (probe, qy, qx) on the detector."""
    return jnp.fft.fft2(exit_waves(waves, phases, carry), norm="ortho")


def amplitude_error(waves: jax.Array, phases: jax.Array, carry: jax.Array, amplitudes: jax.Array,
                    weights: jax.Array) -> jax.Array:
    """sum w (|far field| - amplitude)^2 over probes and pixels (Eq. 5). weights: broadcastable to amplitudes."""
    return (weights * (jnp.abs(far_field(waves, phases, carry)) - amplitudes) ** 2).sum()


def error_and_gradient(waves: jax.Array, phases: jax.Array, carry: jax.Array, amplitudes: jax.Array,
                       weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`amplitude_error` and its gradient (slice, y, x) with respect to the phases, without keeping waves.

    Third comes (probe, y, x) by which the waves would have to fall to suit the patterns, were their far fields' phases
    right: half the gradient with respect to them. carry: of modulus 1, without a band limit.
    """
    behind = exit_waves(waves, phases, carry)
    error, chi = _residual(behind, amplitudes, weights)
    back = jnp.conj(carry)

    def returned(both: jax.Array, phase: jax.Array) -> tuple[jax.Array, jax.Array]:
        psi, chi = both = jnp.fft.ifft2(back * jnp.fft.fft2(both))
        return jnp.exp(-1j * phase) * both, _overlap(psi, chi)

    entrance, gradient = jax.lax.scan(returned, jnp.stack([behind, chi]), phases, reverse=True)
    return error, gradient, entrance[1]


def kept_gradient(waves: jax.Array, phases: jax.Array, carry: jax.Array, amplitudes: jax.Array,
                  weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`error_and_gradient` that keeps the waves of all slices: four transforms a slice, not six; for any propagator."""

    def passed(psi: jax.Array, phase: jax.Array) -> tuple[jax.Array, jax.Array]:
        psi = jnp.exp(1j * phase) * psi
        return jnp.fft.ifft2(carry * jnp.fft.fft2(psi)), psi

    behind, kept = jax.lax.scan(passed, waves, phases)
    error, chi = _residual(behind, amplitudes, weights)
    back = jnp.conj(carry)

    def returned(chi: jax.Array, slice_: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        phase, psi = slice_
        chi = jnp.fft.ifft2(back * jnp.fft.fft2(chi))
        return jnp.exp(-1j * phase) * chi, _overlap(psi, chi)

    entrance, gradient = jax.lax.scan(returned, chi, (phases, kept), reverse=True)
    return error, gradient, entrance


def spectrum_excess(beam: Beam, positions: jax.Array, excess: jax.Array) -> jax.Array:
    """(y, x) sum over probes of what waves (probe, y, x) exceed, carried back to the field's centre: the adjoint of
    `probes`."""
    along_y, along_x = _ramps(beam, positions)
    spectra = jnp.fft.fft2(excess, norm="ortho")
    return (jnp.conj(along_y[:, :, None] * along_x[:, None, :]) * spectra).sum(0)


def misplacement(beam: Beam, positions: jax.Array, phases: jax.Array, amplitudes: jax.Array,
                 weights: jax.Array) -> jax.Array:
    """(probe, 2) [nm] by which probes would have to move to suit their patterns: a damped Gauss-Newton step.

    Where a probe sees as good as nothing, its pattern says nothing of its place, and it stays.
    """
    size = beam.spectrum.shape[0]
    q = 2 * jnp.pi * jnp.asarray(np.fft.fftfreq(size), jnp.float32) / beam.pixel
    ways = jnp.stack([jnp.broadcast_to(-q[:, None], (size, size)), jnp.broadcast_to(-q, (size, size))])
    misfit, slopes = _slopes(beam, positions, phases, amplitudes, ways)
    normal = jnp.einsum("iprc,jprc->pij", weights * slopes, slopes)
    pull = jnp.einsum("iprc,prc->pi", weights * slopes, misfit)
    damping = DAMPING * (jnp.abs(beam.spectrum) ** 2 * (ways**2).sum(0)).sum()
    return jnp.linalg.solve(normal + damping * jnp.eye(2), pull[..., None])[..., 0]


def aberration_pull(beam: Beam, positions: jax.Array, phases: jax.Array, amplitudes: jax.Array, weights: jax.Array,
                    ways: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Normal matrix (k, k) and right side (k,) of the Gauss-Newton step along phases `ways` (k, y, x) [rad] of the
    probe's spectrum, summed over probes."""
    misfit, slopes = _slopes(beam, positions, phases, amplitudes, ways)
    weighted = weights * slopes
    return jnp.einsum("iprc,jprc->ij", weighted, slopes), jnp.einsum("iprc,prc->i", weighted, misfit)


def _slopes(beam: Beam, positions: jax.Array, phases: jax.Array, amplitudes: jax.Array,
            ways: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What moduli of far fields lack (probe, qy, qx), and how they grow (k, probe, qy, qx) with phases `ways` (k, y, x)
    of the spectrum: a far field is linear in its probe."""
    def seen(spectrum: jax.Array) -> jax.Array:
        return far_field(probes(beam._replace(spectrum=spectrum), positions), phases, beam.propagator)

    field = seen(beam.spectrum)
    length = jnp.abs(field)
    slopes = jax.lax.map(lambda way: (jnp.conj(field) * seen(1j * way * beam.spectrum)).real, ways)
    return amplitudes - length, slopes / jnp.maximum(length, FLOOR)


def _residual(behind: jax.Array, amplitudes: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The error of exit waves, and half its derivative with respect to them (the first factor of Eq. B5)."""
    field = jnp.fft.fft2(behind, norm="ortho")
    length = jnp.abs(field)
    misfit = length - amplitudes
    # A zero has no phase: its residual is left out, as its derivative does not exist.
    ratio = jnp.where(length > FLOOR, weights * misfit / jnp.maximum(length, FLOOR), 0)
    return (weights * misfit**2).sum(), jnp.fft.ifft2(ratio * field, norm="ortho")


def _overlap(psi: jax.Array, chi: jax.Array) -> jax.Array:
    """Re(-2 i conj(t psi_m) chi): a slice's gradient, from the waves just behind it."""
    return 2 * (psi.real * chi.imag - psi.imag * chi.real).sum(0)


def slices(layers: int, wide: int, phase: jax.Array) -> jax.Array:
    """Phases of slices, each the sum of so many layers of voxels, with `wide` pixels along y and x: those between the
    voxels come from the same Fourier series."""
    summed = phase.reshape(-1, layers, *phase.shape[1:]).sum(1)
    size = phase.shape[-1]
    if wide == size:
        return summed
    # The finer pixels' centres are counted from the field's centre too: their first lies before the voxels' first.
    ramp = np.exp(2j * np.pi * np.fft.fftfreq(size) * (size / wide - 1) / 2).astype(np.complex64)
    spectrum = jnp.fft.fft2(summed) * ramp[:, None] * ramp
    return (wide / size) ** 2 * jnp.fft.ifft2(widened(spectrum, wide)).real


def widened(array: jax.Array, wide: int) -> jax.Array:
    """(..., qy, qx), frequency 0 first, with zeros at the higher frequencies of a wider detector."""
    size = array.shape[-1]
    if wide == size:
        return array
    half, gap = (size + 1) // 2, [(0, 0)] * (array.ndim - 2)
    middle = jnp.pad(jnp.roll(array, (size - half, size - half), (-2, -1)), [*gap, (0, wide - size), (0, wide - size)])
    return jnp.roll(middle, (half - size, half - size), (-2, -1))


def narrowed(array: jax.Array, size: int) -> jax.Array:
    """The frequencies that `widened` keeps."""
    if array.shape[-1] == size:
        return array
    half = (size + 1) // 2
    rolled = jnp.roll(array, (size - half, size - half), (-2, -1))[..., :size, :size]
    return jnp.roll(rolled, (half - size, half - size), (-2, -1))


def opened(made: Beam) -> np.ndarray:
    """(y, x) 1 where the probe's spectrum is not 0, and one pixel around, as a measured edge lies between pixels."""
    inside = np.abs(np.asarray(made.spectrum)) > 0
    steps = [(by, axis) for by in (-1, 1) for axis in (0, 1)]
    return np.any([inside, *(np.roll(inside, by, axis) for by, axis in steps)], axis=0).astype(np.float32)


def aberrations(made: Beam) -> np.ndarray:
    """(3, y, x) phases of defocus and of twofold astigmatism along the axes and between them, 1 at the edge."""
    inside = np.abs(np.asarray(made.spectrum)) > 0
    q = np.fft.fftfreq(len(inside))
    y, x = np.meshgrid(q, q, indexing="ij")
    edge = (y**2 + x**2)[inside].max()
    return (inside * np.stack([y**2 + x**2, y**2 - x**2, 2 * y * x]) / edge).astype(np.float32)


def defocus_between(spectrum: np.ndarray, other: np.ndarray, wavelength: float, pixel: float) -> float:
    """By how much [nm] the defocus of another spectrum is larger: the one that brings the two into phase."""
    product, q2 = np.conj(spectrum) * other, frequencies(len(spectrum), pixel)
    inside = np.abs(product) > 0
    product, q2 = product[inside], q2[inside]

    def apart(defocus: float) -> float:
        return -abs(complex((product * np.exp(-1j * np.pi * wavelength * defocus * q2)).sum()))

    # A tenth of a turn at the aperture's edge is a step that misses no peak; whole turns between neighbouring pixels
    # would be another peak, and the search ends halfway there.
    step = 0.2 / (wavelength * q2.max())
    reach = int((len(spectrum) * pixel) ** 2 / (wavelength * step))
    near = min(step * np.arange(-reach, reach + 1), key=apart)
    return float(minimize_scalar(apart, bounds=(near - step, near + step), method="bounded").x)


def batches(probe_count: int, size: int, most: int) -> tuple[int, int]:
    """How many batches, and probes in each, so that a batch's waves take at most so many bytes; the last is padded."""
    each = max(1, min(probe_count, most // (8 * size * size)))
    count = -(-probe_count // each)
    return count, -(-probe_count // count)
