"""Laws of resolution: what was planted is found, and noise resolves nothing."""

import numpy as np
import pytest

from engine.data import DataError
from engine.euler import matrix
from engine.resolution import (
    edge_width,
    find_peaks,
    plane_correlation,
    power_cutoff,
    shell_correlation,
    spectral_amplitude,
)

SIZE, VOXEL, EDGE = 64, 0.05, 0.5  # voxels, nm, nm of a cubic lattice
CUT = np.array([4.0, 8.0, 7.0])  # 1/nm along z, y, x


def crystal(noise, wedge, seed):
    """A cubic lattice turned at random, band-limited, its wedge of so many degrees about z missing; its reflections.

    Noise is in units of the lattice's own standard deviation, per voxel.
    """
    rng = np.random.default_rng(seed)
    reach = int(np.ceil(EDGE * np.linalg.norm(CUT)))
    index = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    g = index @ matrix(rng.uniform(-180, 180, 3)).T / EDGE
    kept = (np.abs(g) < CUT).all(1) & index.any(1)
    g = g[kept & (np.abs(g[:, 1]) >= np.abs(g[:, 0]) * np.tan(np.radians(wedge)))]
    place = (np.arange(SIZE) - (SIZE - 1) / 2) * VOXEL
    waves = [np.exp(2j * np.pi * np.outer(g[:, k], place)) for k in range(3)]
    weight = rng.uniform(0.3, 1, len(g)) * np.exp(2j * np.pi * rng.random(len(g)))
    volume = np.einsum("gz,gy,gx->zyx", weight[:, None] * waves[0], waves[1], waves[2], optimize=True).real
    return volume / volume.std() + noise * rng.standard_normal(volume.shape), g


@pytest.mark.parametrize("wedge", [0, 25])
@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_last_peak_is_the_planted_cutoff_within_a_shell(noise, wedge):
    for seed in range(4):
        volume, g = crystal(noise, wedge, seed)
        peaks = find_peaks(volume, VOXEL)
        off = (peaks.cutoff() - np.abs(g).max(0)) / peaks.step
        print(f"noise {noise}, wedge {wedge}, seed {seed}: off by {off.round(2)} shells, {len(peaks.heights)} peaks of "
              f"{len(g) // 2}")
        assert (np.abs(off) <= 1).all()


@pytest.mark.parametrize("noise", [2.0, 4.0])
def test_noise_hides_peaks_and_makes_none(noise):
    """Every peak is a planted reflection, whatever the noise: what it costs is resolution."""
    counts = []
    for seed in range(4):
        volume, g = crystal(noise, 25, seed)
        peaks = find_peaks(volume, VOXEL)
        apart = np.abs(peaks.frequencies[:, None] - g).max(2).min(1)
        counts.append(len(apart))
        assert (apart <= 1.5 * peaks.step[0]).all()
    print(f"noise {noise}: {counts} peaks")


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_crystal_in_vacuum_has_no_peaks_beyond_its_band(noise):
    """A cube of atoms, turned: its faces' streaks are no peaks above what is around them."""
    pytest.importorskip("gemmi")
    from engine.atoms import cube, potential

    q = np.meshgrid(*[np.fft.fftfreq(SIZE, VOXEL)] * 3, indexing="ij", sparse=True)
    band = (np.abs(q[0]) < CUT[0]) & (np.abs(q[1]) < CUT[1]) & (np.abs(q[2]) < CUT[2])
    for seed in range(3):
        spectrum = np.fft.fftn(potential(cube("co3o4", 1.8, seed=seed), SIZE, VOXEL, thermal=0.01)) * band
        volume = np.fft.ifftn(spectrum).real
        volume += noise * volume.std() * np.random.default_rng(seed).standard_normal(volume.shape)
        peaks = find_peaks(volume, VOXEL)
        off = (peaks.cutoff() - CUT) / peaks.step
        print(f"spinel, noise {noise}, seed {seed}: {off.round(2)} shells from the band's end, "
              f"{len(peaks.heights)} peaks")
        assert (off <= 1).all() and (off > -3).all()  # the crystal need not have a reflection at the band's end


def test_noise_alone_has_no_peak():
    rng = np.random.default_rng(3)
    found = [len(find_peaks(rng.standard_normal((48, 64, 40)), VOXEL).heights) for _ in range(20)]
    assert sum(found) == 0  # one in a hundred may have one
    peaks = find_peaks(rng.standard_normal((48, 48, 48)), VOXEL)
    assert np.isnan(peaks.cutoff()).all() and np.isnan(peaks.length()).all()


def test_peaks_do_not_hear_of_gain_and_offset():
    volume, _ = crystal(0.5, 25, 0)
    a, b = find_peaks(volume, VOXEL), find_peaks(50 * volume + 300, VOXEL)
    np.testing.assert_allclose(a.frequencies, b.frequencies)


def test_spectrum_shows_a_wave_where_it_is():
    z, y, x = np.meshgrid(*[np.arange(n) * VOXEL for n in (32, 40, 48)], indexing="ij")
    spectrum = spectral_amplitude(np.cos(2 * np.pi * (5 * z + 3 * y + 2 * x)), VOXEL)
    for axis, q in zip("zyx", (5, 3, 2)):
        top = np.abs(spectrum.frequencies[axis][spectrum.curves[axis].argmax()])
        assert top == pytest.approx(q, abs=0.6 / (32 * VOXEL))
    assert spectrum.planes["zx"].shape == (32, 48)
    np.testing.assert_allclose(spectrum.planes["zx"].sum(0), spectrum.curves["x"], rtol=1e-4)


def blurred(sigma, size=64, seed=0):
    """Points at random, of a flat spectrum on average, under a Gaussian blur (z, y, x) [voxel]; its transfer."""
    rng = np.random.default_rng(seed)
    points = np.zeros((size,) * 3)
    points[tuple(rng.integers(0, size, (3, 3000)))] = 1
    q = np.meshgrid(*[np.fft.fftfreq(size)] * 3, indexing="ij", sparse=True)
    transfer = np.exp(-2 * np.pi**2 * sum((s * f) ** 2 for s, f in zip(sigma, q)))
    return np.fft.ifftn(np.fft.fftn(points) * transfer).real


def planted(sigma, noise, ratio, size=64):
    """[1/voxel] where 3000 points under a blur have `ratio` times the power of white noise per voxel."""
    return np.sqrt(np.log(3000 / (ratio * noise**2 * size**3))) / (2 * np.pi * sigma)


@pytest.mark.parametrize("sigma", [1.2, 2.0])
@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_shells_of_two_halves_find_the_planted_resolution(sigma, noise):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        signal = blurred((sigma,) * 3, seed=seed)
        halves = [signal + noise * rng.standard_normal(signal.shape) for _ in range(2)]
        found = shell_correlation(*halves, VOXEL).cutoff()
        truth = planted(sigma, noise, 0.143 / 0.857) / VOXEL
        half_bit, known = shell_correlation(*halves, VOXEL).cutoff("half-bit"), planted(sigma, noise, 0.2071) / VOXEL
        print(f"blur {sigma}, noise {noise}: 0.143 {found / truth:.3f}, half-bit {half_bit / known:.3f} of the planted")
        assert found == pytest.approx(truth, rel=0.15) and half_bit == pytest.approx(known, rel=0.15)


def test_cones_tell_the_blurred_direction_from_the_sharp_one():
    rng = np.random.default_rng(5)
    signal = blurred((3.0, 1.5, 1.5))
    a, b = (signal + 0.01 * rng.standard_normal(signal.shape) for _ in range(2))
    for axis, sigma in (("z", 3.0), ("y", 1.5), ("x", 1.5)):
        truth = planted(sigma, 0.01, 0.143 / 0.857) / VOXEL
        found = shell_correlation(a, b, VOXEL, axis, 15).cutoff()
        power, known = power_cutoff(a, VOXEL, axis, 15), planted(sigma, 0.01, 1) / VOXEL
        print(f"{axis}: FSC {found / truth:.3f}, power {power / known:.3f} of the planted")
        assert found == pytest.approx(truth, rel=0.15) and power == pytest.approx(known, rel=0.15)
    beyond = shell_correlation(a, b, VOXEL, "z", 60, outside=True).cutoff()
    assert beyond > 1.4 * shell_correlation(a, b, VOXEL, "z", 15).cutoff()


@pytest.mark.parametrize("sigma", [1.2, 2.0])
def test_power_falls_into_the_noise_at_the_planted_frequency(sigma):
    for seed in range(3):
        volume = blurred((sigma,) * 3, seed=seed) + 0.02 * np.random.default_rng(seed).standard_normal((64,) * 3)
        ratio = power_cutoff(volume, VOXEL) * VOXEL / planted(sigma, 0.02, 1)
        print(f"blur {sigma}: {ratio:.3f} of the planted")
        assert ratio == pytest.approx(1, rel=0.15)


def test_noise_resolves_nothing_and_equal_halves_everything():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 32, 32, 32))
    assert np.isnan(power_cutoff(a, VOXEL))
    assert not shell_correlation(a, b, VOXEL).cutoff("half-bit") > 3 / (32 * VOXEL)
    same = shell_correlation(a, 4 * a + 1, VOXEL)
    np.testing.assert_allclose(same.correlation, 1, rtol=1e-4)
    assert same.cutoff() == pytest.approx(0.5 / VOXEL)


@pytest.mark.parametrize("rising", [True, False])
def test_an_edge_is_as_wide_as_its_blur(rising):
    from scipy.special import erf

    x = 0.1 * np.arange(60)
    rng = np.random.default_rng(1)
    for sigma in (0.15, 0.4):
        profile = 5 + (2 if rising else -2) * erf((x - 2.7) / (np.sqrt(2) * sigma)) + 0.05 * rng.standard_normal(60)
        edge = edge_width(profile, 0.1)
        assert edge.width == pytest.approx(2.563 * sigma, rel=0.1)
        assert edge.fwhm == pytest.approx(2.355 * sigma, rel=0.1) and edge.centre == pytest.approx(2.7, abs=0.03)
        assert abs(edge.width - 2.563 * sigma) < 4 * edge.error


def test_what_has_no_resolution_is_refused():
    cube = np.ones((16, 16, 16))
    with pytest.raises(DataError, match="16 voxels or more"):
        find_peaks(np.ones((8, 32, 32)), VOXEL)
    with pytest.raises(DataError, match="no axis"):
        shell_correlation(cube, cube, VOXEL, "w")
    with pytest.raises(DataError, match="cannot be correlated"):
        shell_correlation(cube, np.ones((16, 16, 18)), VOXEL)
    with pytest.raises(DataError, match="half-bit and 0.5 are"):
        shell_correlation(cube + np.eye(16), cube, VOXEL).cutoff("0.2")
    with pytest.raises(DataError, match="not all alike"):
        edge_width(np.ones(20), 0.1)


# ---- Along the beam


@pytest.mark.parametrize("kept", [2, 5])
def test_planes_tell_where_sections_end(kept):
    """Of a volume whose planes beyond a frequency are another's, whatever its gain and a constant in each section."""
    rng = np.random.default_rng(5)
    true, other = rng.standard_normal((2, 16, 24, 20))
    waves = np.fft.fft(true, axis=0)
    beyond = np.abs(np.fft.fftfreq(16) * 16) > kept
    waves[beyond] = np.fft.fft(other, axis=0)[beyond]
    volume = 3 * np.fft.ifft(waves, axis=0).real + rng.standard_normal((16, 1, 1))
    found = plane_correlation(volume, true, 0.2)
    assert found.frequency[:3] == pytest.approx([0, 1 / 3.2, 2 / 3.2])
    assert np.all(found.correlation[:kept + 1] > 0.999) and np.all(found.correlation[kept + 1:] < 0.3)
    assert found.length("0.5") == pytest.approx(3.2 / (kept + 0.5), rel=0.1)
    assert plane_correlation(true, true, 0.2).length("0.5") == pytest.approx(0.4)
