"""Laws of denoising: nothing comes of nothing, shifts commute, noise goes down and the lattice stays."""

import sys

import numpy as np
import pytest

from engine.data import DataError
from engine.denoise import Settings, bm3d, denoise, fourier_sparsity, noise_level, nonlocal_means

SIZE = 128


def grain(noise, seed=0):
    """Atoms on a lattice inside a round grain, from 0 to 1; the same with noise."""
    y, x = np.meshgrid(*[np.arange(SIZE, dtype=float)] * 2, indexing="ij")
    lattice = sum(np.cos(2 * np.pi * (a * y + b * x)) for a, b in ((0.13, 0.02), (-0.02, 0.13), (0.11, 0.15)))
    inside = 1 / (1 + np.exp(np.hypot(y - 64, x - 60) - 42))
    image = (np.exp(lattice) / np.exp(3) * 0.8 + 0.2) * inside
    return image, image + noise * np.random.default_rng(seed).standard_normal(image.shape)


def psnr(image, truth):
    return 10 * np.log10(1 / np.mean((image - truth) ** 2))


@pytest.mark.parametrize("noise", [0.02, 0.15, 1.0])
def test_noise_is_estimated(noise):
    rng = np.random.default_rng(0)
    assert noise_level(5 + noise * rng.standard_normal((SIZE, SIZE))) == pytest.approx(noise, rel=0.05)
    found = noise_level(grain(noise)[1])
    print(f"noise {noise}: found {found:.4f} beside a lattice")
    assert found == pytest.approx(noise, rel=0.2)  # the lattice's own finest detail is in it


@pytest.mark.parametrize("method", [nonlocal_means, fourier_sparsity])
@pytest.mark.parametrize("noise", [0.05, 0.15, 0.3])
def test_noise_goes_down_on_a_grain(method, noise):
    truth, noisy = grain(noise)
    before, after = psnr(noisy, truth), psnr(method(noisy), truth)
    print(f"{method.__name__}: {before:.1f} dB before, {after:.1f} dB after")
    assert after > before + 5


def test_sparsity_after_non_local_means():
    """The paper's order, at the noise of the notes' figure, 16.5 dB."""
    truth, noisy = grain(0.15)
    one, both = (psnr(denoise(noisy, Settings(sparsity=s)), truth) for s in (0, 1))
    print(f"{psnr(noisy, truth):.1f} dB noisy, {one:.1f} dB by non-local means, {both:.1f} dB with sparsity")
    assert both > one > 26


@pytest.mark.parametrize("method", ["none", "nlm", "bm3d"])
def test_strength_0_is_the_identity(method):
    _, noisy = grain(0.2)
    np.testing.assert_array_equal(denoise(noisy, Settings(method, 0.0)), noisy.astype(np.float32))


def test_constants_stay():
    flat = np.full((40, 32), 7.0)
    for found in (nonlocal_means(flat), bm3d(flat), fourier_sparsity(flat), fourier_sparsity(flat, soft=True)):
        np.testing.assert_allclose(found, 7, rtol=1e-6)


def test_sparsity_commutes_with_shifts_and_gain():
    _, noisy = grain(0.2)
    found = fourier_sparsity(noisy)
    np.testing.assert_allclose(fourier_sparsity(np.roll(noisy, (5, -11), (0, 1))), np.roll(found, (5, -11), (0, 1)),
                               atol=1e-5)
    np.testing.assert_allclose(fourier_sparsity(30 * noisy), 30 * found, atol=3e-4)


def test_non_local_means_commute_with_shifts_inside_and_with_gain_and_offset():
    _, noisy = grain(0.2)
    level = noise_level(noisy)
    found = nonlocal_means(noisy, noise=level)
    moved = nonlocal_means(np.roll(noisy, (6, -4), (0, 1)), noise=level)
    np.testing.assert_allclose(np.roll(moved, (-6, 4), (0, 1))[24:-24, 24:-24], found[24:-24, 24:-24], atol=1e-4)
    np.testing.assert_allclose(nonlocal_means(30 * noisy + 9, noise=30 * level), 30 * found + 9, atol=0.05)


def test_sparsity_removes_noise_and_keeps_waves():
    rng = np.random.default_rng(1)
    y, x = np.meshgrid(*[np.arange(SIZE)] * 2, indexing="ij")
    wave = np.cos(2 * np.pi * (20 * y + 31 * x) / SIZE)
    noise = rng.standard_normal(wave.shape)
    found = fourier_sparsity(wave + noise)
    assert np.mean((found - wave) ** 2) < 0.01
    assert np.std(fourier_sparsity(noise)) < 0.15  # what is left are the frequencies below `low`
    soft = fourier_sparsity(wave + noise, soft=True)
    assert np.vdot(soft, wave) < np.vdot(found, wave)


def test_stronger_is_smoother():
    _, noisy = grain(0.2)
    for method in (nonlocal_means, fourier_sparsity):
        rough = [np.abs(np.diff(method(noisy, s), axis=0)).mean() for s in (0, 0.4, 0.8, 1.6)]
        assert rough == sorted(rough, reverse=True)


def test_the_licence_of_bm3d_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm3d", None)
    with pytest.raises(DataError, match="non-commercial"):
        denoise(grain(0.1)[1], Settings("bm3d", 1.0))


def test_bm3d_where_it_is_installed():
    pytest.importorskip("bm3d")
    truth, noisy = grain(0.15)
    after = psnr(bm3d(noisy), truth)
    print(f"bm3d: {psnr(noisy, truth):.1f} dB before, {after:.1f} dB after")
    assert after > psnr(nonlocal_means(noisy), truth)
    np.testing.assert_allclose(bm3d(40 * noisy + 3), 40 * bm3d(noisy) + 3, atol=0.05)


def test_what_cannot_be_denoised_is_refused():
    with pytest.raises(DataError, match="finite images"):
        denoise(np.ones((4, 32, 32)))
    with pytest.raises(DataError, match="below 0"):
        nonlocal_means(np.ones((32, 32)), -1)
    with pytest.raises(DataError, match="below 0"):
        fourier_sparsity(np.ones((32, 32)), -1)
    with pytest.raises(DataError, match="no way to denoise"):
        denoise(np.ones((32, 32)), Settings("median"))
