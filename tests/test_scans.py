"""4D data come back from the disk as they were, and crops and bins of them are those of the detector."""

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest
import xarray
import zarr

from engine import archives, scans
from engine.data import DataError
from engine.diffraction import DiffractionSeries, with_dose
from engine.multislice import Optics, beam

needs_h5py = pytest.mark.skipif(not importlib.util.find_spec("h5py"), reason="needs h5py")
SIZE, PIXEL = 12, 0.04
OPTICS = Optics(defocus=-3.0, c3=1e3)


@pytest.fixture
def series():
    rng = np.random.default_rng(0)
    return DiffractionSeries(rng.random((3, 4, SIZE, SIZE)), np.array([-10.0, 0.0, 10.0]),
                             rng.uniform(-0.05, 0.05, (4, 2)), PIXEL, OPTICS, adf=rng.random((3, 4)))


def same(a, b):
    for name in ("patterns", "angles", "positions", "adf"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.pixel, a.electrons, a.optics) == (b.pixel, b.electrons, b.optics)


@pytest.mark.parametrize("name", ["a.zarr", pytest.param("a.h5", marks=needs_h5py)])
def test_a_series_comes_back(name, tmp_path, series):
    path = tmp_path / name
    scans.save(path, series)
    same(scans.load(path), series)
    counted = replace(with_dose(replace(series, patterns=series.patterns / 144), 1e5), adf=series.adf)
    scans.save(path, counted)  # in its place
    same(scans.load(path), counted)
    with archives.opened(path) as group:
        assert group.arrays["patterns"].dtype.kind == "u" and group.arrays["patterns"].chunks[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == [name]
    some = scans.load(path, tilts=[2, 0], crop=8, bins=2)
    np.testing.assert_array_equal(some.angles, series.angles[[2, 0]])
    assert some.size == 4
    streamed = scans.load(path, crop=8, bins=2, most=0)
    assert streamed.streamed
    np.testing.assert_array_equal(np.stack([streamed.patterns[k] for k in (2, 0)]), some.patterns)


@needs_h5py
def test_hdf5_names_its_axes_and_units(tmp_path, series):
    import h5py

    scans.save(tmp_path / "a.hdf5", series)
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert [axis.label for axis in file["patterns"].dims] == ["tilt", "probe", "qy", "qx"]
        assert file["positions"].attrs["units"] == "nm" and file.attrs["pixel_nm"] == PIXEL


@needs_h5py
def test_hdf5_that_is_torn_or_no_series_is_refused(tmp_path, series, monkeypatch):
    import h5py

    scans.save(tmp_path / "a.h5", series)
    (tmp_path / "torn.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:2000])
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["patterns"] = np.zeros(3)
    for name, words in (("torn.h5", "cannot be read"), ("none.h5", "none.h5"), ("other.h5", "angles, positions")):
        with pytest.raises(DataError, match=words):
            scans.load(tmp_path / name)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"h5py is not installed; pip install .tomoatlas\[files\]"):
        scans.load(tmp_path / "a.h5")


def test_without_a_dark_field_there_is_none(tmp_path, series):
    scans.save(tmp_path / "a.zarr", replace(series, adf=None))
    assert scans.load(tmp_path / "a.zarr").adf is None


def test_some_tilts_are_read_alone(tmp_path, series):
    scans.save(tmp_path / "a.zarr", series)
    assert zarr.open_group(tmp_path / "a.zarr")["patterns"].chunks[0] == 1
    some = scans.load(tmp_path / "a.zarr", tilts=[2, 0])
    np.testing.assert_array_equal(some.patterns, series.patterns[[2, 0]])
    np.testing.assert_array_equal(some.angles, series.angles[[2, 0]])
    np.testing.assert_array_equal(some.adf, series.adf[[2, 0]])


def test_xarray_opens_it(tmp_path, series):
    scans.save(tmp_path / "a.zarr", series)
    with xarray.open_zarr(tmp_path / "a.zarr", consolidated=False) as opened:
        assert opened["patterns"].dims == ("tilt", "probe", "qy", "qx")
        assert opened["positions"].attrs["units"] == "nm"
        np.testing.assert_array_equal(opened["patterns"][1], series.patterns[1])


@pytest.mark.parametrize("bins", [1, 2, 3, 4])
@pytest.mark.parametrize("crop", [None, 9, 8])
def test_crops_and_bins_keep_frequency_zero_and_electrons(tmp_path, series, crop, bins):
    """A pattern of one bright pixel at frequency 0 stays one, but where an even bin's ends are shared."""
    one = np.zeros_like(series.patterns)
    one[..., SIZE // 2, SIZE // 2] = 1
    scans.save(tmp_path / "a.zarr", replace(series, patterns=one))
    found = scans.load(tmp_path / "a.zarr", crop=crop, bins=bins)
    size = (crop or SIZE) // bins
    assert found.size == size
    expected = np.zeros((3, 4, size, size))
    expected[..., size // 2, size // 2] = 1
    np.testing.assert_allclose(found.patterns, expected)


def test_what_a_crop_keeps_is_kept_as_it_is(tmp_path, series):
    scans.save(tmp_path / "a.zarr", series)
    np.testing.assert_array_equal(scans.load(tmp_path / "a.zarr", crop=8).patterns, series.patterns[..., 2:10, 2:10])


def test_bins_add_up(tmp_path, series):
    scans.save(tmp_path / "a.zarr", series)
    odd = scans.load(tmp_path / "a.zarr", bins=3).patterns  # 4 bins about pixel 6 of 12: from pixel -1 on
    np.testing.assert_allclose(odd[..., 2, 2], series.patterns[..., 5:8, 5:8].sum((2, 3)), rtol=1e-6)
    even = scans.load(tmp_path / "a.zarr", bins=2).patterns
    share = np.array([0.5, 1, 0.5])
    np.testing.assert_allclose(even[..., 3, 3], (series.patterns[..., 5:8, 5:8] * np.outer(share, share)).sum((2, 3)),
                               rtol=1e-6)


def test_the_aperture_is_as_wide_as_before(tmp_path):
    """The pixel that a crop or bins give to the field has the aperture where the detector shows it."""
    size, pixel = 48, 0.02
    pattern = np.abs(np.fft.fftshift(beam(size, pixel, OPTICS, 0.1).spectrum)) ** 2
    whole = DiffractionSeries(np.tile(pattern, (1, 1, 1, 1)), np.zeros(1), np.zeros((1, 2)), pixel, OPTICS)
    scans.save(tmp_path / "a.zarr", whole)
    cropped = scans.load(tmp_path / "a.zarr", crop=24)
    assert cropped.pixel == pytest.approx(0.04)
    own = np.abs(np.fft.fftshift(beam(24, cropped.pixel, OPTICS, 0.1).spectrum)) ** 2
    np.testing.assert_allclose(cropped.patterns[0, 0], own, atol=1e-6)
    binned = scans.load(tmp_path / "a.zarr", bins=3)
    assert binned.pixel == pytest.approx(pixel) and binned.size == 16


def test_what_is_no_series_is_refused(tmp_path, series):
    with pytest.raises(DataError, match=r"nothing.zarr"):
        scans.load(tmp_path / "nothing.zarr")
    zarr.open_group(tmp_path / "other.zarr", mode="w").create_array("volume", data=np.zeros(3))
    with pytest.raises(DataError, match="patterns"):
        scans.load(tmp_path / "other.zarr")
    scans.save(tmp_path / "a.zarr", series)
    with pytest.raises(DataError, match="tilts 0 to 2"):
        scans.load(tmp_path / "a.zarr", tilts=[3])
    with pytest.raises(DataError, match="cropped to 13"):
        scans.load(tmp_path / "a.zarr", crop=13)
