"""Two halves of the tilts: what they are made of, and that a coarser specimen is resolved as coarsely as it is."""

import numpy as np
import pytest

from engine import simulate
from engine.data import DataError, MultiModal
from engine.halves import correlations, halves
from sweeps import report, settings
from sweeps.yamlio import SettingsError
from tests.test_bimodal import made

RUN = {"name": "halves", "system": "fused3d",
       "data": {"phantom": "cocuo", "size": 32, "haadf_tilts": 16, "chem_tilts": 8},
       "solver": {"iterations": 30}, "output": {"resolution": True}}


def data(haadf=9, chem=5):
    """A cube of Co and O."""
    truth = np.zeros((2, 16, 16, 16), np.float32)
    truth[:, 5:11, 4:12, 4:12] = 1
    return simulate.multimodal(
        truth, (27, 8), ("Co", "O"), pixel_size=0.5, haadf_angles=np.linspace(60, -60, haadf),
        chem_angles=np.linspace(60, -60, chem), snr={"Co": 5.0, "O": 5.0, "haadf": 500.0}, gamma=1.6, background=0.1,
        background_known=True, weights="z_gamma", seed=[1])


def test_halves_share_no_tilt_and_leave_none_out():
    given = data()
    first, second = halves(given)
    for whole, one, other in ((given.haadf, first.haadf, second.haadf), (given.chem, first.chem, second.chem)):
        assert sorted([*one.angles, *other.angles]) == sorted(whole.angles)
        assert abs(one.tilts - other.tilts) <= 1
        assert np.abs(np.diff(one.angles)).min() > 1.5 * np.abs(np.diff(whole.angles)).max()
        for series in (one, other):
            for angle, image in zip(series.angles, np.moveaxis(series.projections, 1, 0)):
                np.testing.assert_array_equal(image, whole.projections[:, np.flatnonzero(whole.angles == angle)[0]])
    np.testing.assert_allclose(first.haadf.noise_level(), given.haadf.noise_level())
    with pytest.raises(DataError, match="half of 3 tilts makes no volume"):
        halves(data(chem=3))


@pytest.mark.parametrize("sigma", [1.5, 2.5])
def test_a_planted_blur_is_the_resolution_within_15_percent(sigma):
    """Volumes of a specimen blurred to sigma voxels in noise: 0.143 is where signal is a sixth of the noise."""
    rng, size = np.random.default_rng(7), 64
    q = np.stack(np.meshgrid(*[np.fft.fftfreq(size)] * 3, indexing="ij"))
    transfer = np.exp(-2 * (np.pi * sigma) ** 2 * (q**2).sum(0))
    specimen = np.fft.ifftn(np.fft.fftn(rng.standard_normal((size,) * 3)) * transfer).real
    level = 0.02
    given: MultiModal = data()

    class Solved:
        def __init__(self, volume):
            self.volume, self.ok, self.status = volume, True, "ok"

    draws = iter([specimen + level * rng.standard_normal((size,) * 3) for _ in range(2)])
    halved = MultiModal(given.chem, None, (27, 8), given.shape, given.sensitivity)
    curves = correlations(halved, lambda half: Solved(np.stack([next(draws)] * 2)))
    # Signal power |transfer|^2 over noise power level^2 is c / (1 - c) at correlation c.
    planted = np.sqrt(-np.log(level**2 * 0.143 / (1 - 0.143)) / (4 * np.pi**2 * sigma**2))
    for part in curves.values():
        for curve in part:
            assert curve.length() == pytest.approx(given.chem.pixel_size / planted, rel=0.15)


def test_a_run_tells_the_resolution_of_its_elements_and_of_haadf_alone(tmp_path):
    folder = made(tmp_path / "halves", settings.load(RUN))
    text = report.table(folder)
    assert "HAADF alone" in text and "two halves of the tilts" in text
    assert "resolution.png" in {path.name for path in report.write(folder)}


def test_what_has_no_tilts_has_no_halves():
    with pytest.raises(SettingsError, match=r"output\.resolution: is for fused3d and hebt"):
        settings.load({"name": "flat", "system": "fused2d", "data": {"phantom": "coscoo"},
                       "output": {"resolution": True}})
