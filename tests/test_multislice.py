"""Multislice conserves electrons, agrees with what can be written by hand, and its adjoint is JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.data import DataError
from engine.multislice import (
    Optics,
    aberration,
    amplitude_error,
    batches,
    beam,
    error_and_gradient,
    exit_waves,
    far_field,
    frequencies,
    kept_gradient,
    probes,
    propagator,
)
from tests.specimens import distance as real_distance

SIZE, PIXEL, SLICE = 32, 0.04, 0.1  # [nm]
OPTICS = Optics()
POSITIONS = jnp.asarray([[-0.2, 0.1], [0.0, 0.0], [0.123, 0.31]], jnp.float32)


def distance(a, b):
    """|a - b| / |b| of complex arrays too."""
    return real_distance(*(np.stack([np.real(c), np.imag(c)]) for c in (a, b)))


def phases(slices=5, strength=0.3, seed=0):
    return jnp.asarray(strength * np.random.default_rng(seed).random((slices, SIZE, SIZE)), jnp.float32)


def setup(slices=5, **settings):
    made = beam(SIZE, PIXEL, OPTICS, SLICE, **settings)
    return probes(made, POSITIONS), phases(slices), made.propagator


def measured(waves, carry, seed=7):
    return jnp.abs(far_field(waves, phases(seed=seed), carry))


def test_wavelength_and_interaction_are_the_tabulated_ones():
    # E. J. Kirkland, Advanced Computing in Electron Microscopy, Table 2.2: 300 kV and 100 kV.
    assert OPTICS.wavelength == pytest.approx(0.0019687, rel=1e-4)
    assert OPTICS.interaction == pytest.approx(0.0065262, rel=1e-4)
    assert Optics(voltage=100).wavelength == pytest.approx(0.0037014, rel=1e-4)
    assert Optics(voltage=100).interaction == pytest.approx(0.0092440, rel=1e-4)


def test_aberrations_follow_equation_3():
    optics = Optics(defocus=7.0, c3=1e3, c5=1e6)
    s = optics.wavelength * 5.0
    by_hand = 2 * np.pi / optics.wavelength * (-7.0 * s**2 / 2 + 1e3 * s**4 / 4 + 1e6 * s**6 / 6)
    assert aberration(np.array(25.0), optics) == pytest.approx(by_hand)


def test_defocus_is_a_way_through_empty_space():
    """A beam focused 3 nm before the entrance face is one focused on it, 3 nm on."""
    near, far = (beam(SIZE, PIXEL, Optics(defocus=d), SLICE).spectrum for d in (0.0, -3.0))
    assert distance(far, near * propagator(SIZE, PIXEL, OPTICS.wavelength, 3.0)) < 1e-6


def test_probes_are_of_one_electron_and_lie_where_they_are_put():
    focus = Optics(defocus=SLICE / 2)  # undoes the half slice in front of the first
    waves = np.asarray(probes(beam(SIZE, PIXEL, focus, SLICE), POSITIONS))
    np.testing.assert_allclose((np.abs(waves) ** 2).sum((1, 2)), 1, rtol=1e-5)
    on_pixels = jnp.asarray([[1.5, -2.5], [0.5, 7.5]], jnp.float32) * PIXEL  # SIZE is even
    peaks = np.abs(probes(beam(SIZE, PIXEL, focus, SLICE), on_pixels)).reshape(2, -1).argmax(1)
    np.testing.assert_array_equal(np.stack(np.unravel_index(peaks, (SIZE, SIZE))), [[17, 16], [13, 23]])


def test_electrons_are_conserved():
    waves, v, carry = setup()
    np.testing.assert_allclose((jnp.abs(far_field(waves, v, carry)) ** 2).sum((1, 2)), 1, rtol=1e-5)
    waves, v, carry = setup(band_limit=0.9)
    assert (jnp.abs(far_field(waves, v, carry)) ** 2).sum((1, 2)).max() < 1


def test_a_band_limit_leaves_nothing_beyond_it():
    waves, v, carry = setup(band_limit=0.9)
    beyond = frequencies(SIZE, PIXEL) > (0.9 / (2 * PIXEL)) ** 2
    assert np.abs(np.asarray(far_field(waves, v, carry)))[:, beyond].max() < 1e-6


def test_an_empty_specimen_shows_the_aperture():
    made = beam(SIZE, PIXEL, OPTICS, SLICE)
    pattern = jnp.abs(far_field(probes(made, POSITIONS), jnp.zeros((4, SIZE, SIZE)), made.propagator))
    np.testing.assert_allclose(pattern, np.broadcast_to(np.abs(made.spectrum), pattern.shape), atol=1e-6)


def test_the_way_back_returns_the_wave():
    waves, v, carry = setup()
    psi = exit_waves(waves, v, carry)
    for phase in v[::-1]:
        psi = jnp.exp(-1j * phase) * jnp.fft.ifft2(jnp.conj(carry) * jnp.fft.fft2(psi))
    assert distance(psi, waves) < 1e-5


def test_propagation_and_transmission_have_their_adjoints():
    waves, v, carry = setup()
    forth = exit_waves(waves, v, carry)
    rng = np.random.default_rng(3)
    other = rng.standard_normal((*forth.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
    back = jnp.asarray(other)
    for phase in v[::-1]:
        back = jnp.exp(-1j * phase) * jnp.fft.ifft2(jnp.conj(carry) * jnp.fft.fft2(back))
    assert abs(np.vdot(other, forth) - np.vdot(back, waves)) < 1e-5 * np.linalg.norm(other)


oracle_gradient = jax.value_and_grad(amplitude_error, argnums=1)


@pytest.mark.parametrize(("slices", "gradient_of", "band_limit"), [
    (1, error_and_gradient, None), (5, error_and_gradient, None), (5, kept_gradient, None), (5, kept_gradient, 0.9)])
def test_gradients_are_jax_own(slices, gradient_of, band_limit):
    waves, v, carry = setup(slices, band_limit=band_limit)
    target = measured(waves, carry)
    weights = jnp.asarray(np.random.default_rng(5).random((SIZE, SIZE)), jnp.float32)
    error, gradient, _ = jax.jit(gradient_of)(waves, v, carry, target, weights)
    oracle_error, oracle = jax.jit(oracle_gradient)(waves, v, carry, target, weights)
    assert float(error) == pytest.approx(float(oracle_error), rel=1e-5)
    assert distance(gradient, oracle) < 1e-5


def test_the_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        waves, v, carry = (jnp.asarray(np.asarray(a), d) for a, d in zip(setup(), ("complex128", "float64",
                                                                                   "complex128")))
        target, weights = jnp.asarray(np.asarray(measured(waves, carry)), "float64"), jnp.ones((), "float64")
        carry = carry / jnp.abs(carry)
        gradient = jax.jit(error_and_gradient)(waves, v, carry, target, weights)[1]
        way = jnp.asarray(np.random.default_rng(9).standard_normal(v.shape))
        up, down = (jax.jit(amplitude_error)(waves, v + s * way, carry, target, weights) for s in (1e-5, -1e-5))
        assert float((gradient * way).sum()) == pytest.approx(float(up - down) / 2e-5, rel=1e-6)


def test_the_error_falls_along_its_negative_gradient():
    """The paper's pseudocode has the other sign, and would climb."""
    waves, v, carry = setup()
    target = measured(waves, carry)
    weights = jnp.ones((SIZE, SIZE))
    error, gradient, _ = jax.jit(error_and_gradient)(waves, v, carry, target, weights)
    assert jax.jit(amplitude_error)(waves, v - 0.1 * gradient, carry, target, weights) < error


def test_a_dark_pattern_gives_a_finite_gradient():
    waves, v, carry = setup()
    dark, weights = jnp.ones((3, SIZE, SIZE)), jnp.ones((SIZE, SIZE))
    error, gradient, _ = jax.jit(error_and_gradient)(0 * waves, v, carry, dark, weights)
    assert np.isfinite(gradient).all() and float(error) == 3 * SIZE**2


def test_the_way_back_takes_less_memory():
    made = beam(SIZE, PIXEL, OPTICS, SLICE)
    waves, v = probes(made, jnp.zeros((8, 2))), phases(26)
    target = jnp.abs(waves)
    taken = [jax.jit(f).lower(waves, v, made.propagator, target, jnp.ones(())).compile().memory_analysis()
             .temp_size_in_bytes for f in (error_and_gradient, oracle_gradient)]
    assert taken[1] > 5 * taken[0]


def test_every_probe_is_in_some_batch():
    for count, size in [(1, 8), (64, 48), (65, 48), (1000, 512), (7, 4096)]:
        number, each = batches(count, size, 2**21)
        assert count <= number * each < count + number
        assert each == 1 or each * size**2 * 8 <= 2**21


def test_an_aperture_beyond_the_sampling_is_refused():
    with pytest.raises(DataError, match="smaller pixels"):
        beam(SIZE, PIXEL, OPTICS, SLICE, band_limit=0.5)
    with pytest.raises(DataError, match="21 mrad"):
        beam(SIZE, 0.06, OPTICS, SLICE)
