"""Measured data: each format read as written, what axes, shifts, bins and backgrounds mean, and bad files."""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data import DataError
from engine.files import open_file, read_array
from engine.measured import Recording, read_angles, read_series, read_truth
from engine.regions import prepare

DATA = Path(__file__).parents[2] / "shared" / "data"
ANGLES = [-40.0, -20.0, 0.0, 20.0, 40.0]
rng = np.random.default_rng(0)
COUNTS = rng.poisson(2.0, (3, 5, 12, 10)).astype(np.uint8)  # element, tilt, y, x
ELEMENTS = {"Fe": 26, "O": 8, "Si": 14}
needs_rosetta = pytest.mark.skipif(not importlib.util.find_spec("rsciio"), reason="needs RosettaSciIO")


def write(folder: Path, **arrays: Any) -> str:
    """An .npz with the maps and whatever else a test needs."""
    np.savez(folder / "maps.npz", **{"counts": COUNTS, "angles": np.array(ANGLES), **arrays})
    return str(folder / "maps.npz")


def chem(path: str, **changes: Any) -> Recording:
    given = {"key": "counts", "axes": ["element", "tilt", "y", "x"], "angles": ANGLES, "elements": ELEMENTS}
    return read_series(path, **(given | changes))


def signal(data: np.ndarray, title: str) -> dict[str, Any]:
    """What RosettaSciIO writes: 2 nm pixels, the last two axes those of the image."""
    axes = [{"_type": "UniformDataAxis", "name": f"axis {i}", "size": size, "index_in_array": i,
             "offset": 0.0, "scale": 2.0 if i >= data.ndim - 2 else 1.0, "navigate": i < data.ndim - 2,
             "units": "nm" if i >= data.ndim - 2 else "", "is_binned": False}
            for i, size in enumerate(data.shape)]
    return {"data": data, "axes": axes, "metadata": {"General": {"title": title}, "Signal": {}},
            "original_metadata": {}, "attributes": {"_lazy": False}, "tmp_parameters": {}, "models": {},
            "learning_results": {}, "package_info": {"package": "tests", "package_version": "0"}}


def write_as(suffix: str, folder: Path, images: np.ndarray) -> tuple[Path, str | None]:
    """(tilt, y, x) images in a file of one format, and the key that finds them."""
    path = folder / f"series{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, haadf=images)
        return path, "haadf"
    if suffix == ".npy":
        np.save(path, images)
    elif suffix == ".mrc":
        import mrcfile

        with mrcfile.new(path) as mrc:
            mrc.set_data(images)
            mrc.voxel_size = 20.0  # Angstrom
    elif suffix == ".zarr":
        import zarr

        group = zarr.create_group(path, attributes={"voxel_nm": 2.0})
        group.create_array("haadf/0", data=images)
        return path, "haadf/0"
    else:
        writer = __import__(f"rsciio.{suffix[1:]}", fromlist=["file_writer"]).file_writer
        writer(str(path), signal(images, "HAADF"))
        return path, "HAADF" if suffix == ".hspy" else None
    return path, None


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".mrc", ".zarr",
                                    *(pytest.param(s, marks=needs_rosetta) for s in (".hspy", ".tiff"))])
def test_what_is_written_is_read(suffix: str, tmp_path: Path) -> None:
    images = rng.integers(-300, 3000, (5, 12, 10)).astype(np.int16)
    path, key = write_as(suffix, tmp_path, images)
    np.savetxt(tmp_path / "series.rawtlt", ANGLES, fmt="%.2f")
    recording = read_series(path.name, root=tmp_path, key=key, axes=["tilt", "y", "x"],
                            angles="series.rawtlt", units="intensity")
    np.testing.assert_array_equal(recording.projections[0], images)
    assert recording.projections.dtype == np.int16
    series, = prepare(recording, pixel_size=None if suffix in (".mrc", ".zarr", ".hspy", ".tiff") else 2.0)
    np.testing.assert_array_equal(series.projections[0], images)
    np.testing.assert_array_equal(series.angles, ANGLES)
    assert series.elements == ("HAADF",) and series.pixel_size == pytest.approx(2.0)


def test_big_arrays_are_mapped_and_not_read(tmp_path: Path) -> None:
    for suffix in (".npy", ".mrc"):
        path, _ = write_as(suffix, tmp_path, np.ones((2, 4, 4), np.float32))
        assert isinstance(read_array(path), np.memmap)


def test_order_of_the_axes_does_not_matter(tmp_path: Path) -> None:
    words = ["element", "tilt", "y", "x"]
    for order in itertools.permutations(range(4)):
        path = write(tmp_path, counts=COUNTS.transpose(order))
        read = chem(path, axes=[words[i] for i in order], angles="key:angles")
        np.testing.assert_array_equal(read.projections, COUNTS)
        np.testing.assert_array_equal(read.angles, ANGLES)


def test_elements_are_found_by_order_index_and_name(tmp_path: Path) -> None:
    path = write(tmp_path, names=np.array(["FeK", "O", "Si"]))
    by_index = chem(path, elements={"O": {"number": 8, "index": 1}})
    np.testing.assert_array_equal(by_index.projections, COUNTS[1:2])
    summed = {"Si": 14, "Fe": {"number": 26, "lines": ["FeK", "O"]}}
    read = chem(path, names_key="names", elements=summed, tilts=[4, 1])
    assert read.elements == ("Si", "Fe") and read.angles.tolist() == [-20.0, 40.0]
    used = COUNTS[:, [1, 4]]
    np.testing.assert_array_equal(read.projections, np.stack([used[2], used[0] + used[1]]))


def spots(angles: np.ndarray, y: float, z: float, axis: float, size: int = 61) -> np.ndarray:
    """(tilt, y, x) images of a spot at (y, z) from a tilt axis that stands at `axis` on the detector."""
    at = axis + y * np.cos(np.radians(angles)) + z * np.sin(np.radians(angles))
    profile = np.exp(-((np.arange(size) - at[:, None]) ** 2) / 18)
    return profile[:, :, None] * np.ones(4)


def test_a_region_turns_about_its_own_centre(tmp_path: Path) -> None:
    angles, axis = np.linspace(-60, 60, 25), 24.0
    np.save(tmp_path / "a.npy", spots(angles, y=8.0, z=-5.0, axis=axis))
    read = read_series(tmp_path / "a.npy", axes=["tilt", "y", "x"], angles=angles.tolist(), units="intensity")
    series, = prepare(read, pixel_size=1.0, crop={"y": [15, 50]}, tilt_axis=axis)  # about 32, like the spot
    profiles = series.projections[0, :, :, 0]
    found = profiles @ (np.arange(35) - 17) / profiles.sum(1)
    np.testing.assert_allclose(found, -5.0 * np.sin(np.radians(angles)), atol=0.55)  # rounded to whole pixels


def test_shifts_align(tmp_path: Path) -> None:
    """An image that drifted by (dy, dx) is moved back by (-dy, -dx), however the file counts."""
    still = rng.poisson(5.0, (12, 10))
    drift = rng.integers(-2, 3, (5, 2))
    images = np.stack([np.roll(still, move, (0, 1)) for move in drift])
    np.savez(tmp_path / "d.npz", images=images, yx=-drift, xy=np.stack([drift[:, 1], -drift[:, 0]], 1))
    for key, axes in (("yx", ["y", "x"]), ("xy", ["-x", "y"])):
        read = read_series(tmp_path / "d.npz", key="images", axes=["tilt", "y", "x"], angles=ANGLES,
                           shifts=f"key:{key}", shift_axes=axes)
        series, = prepare(read, pixel_size=1.0)
        assert (series.projections == series.projections[:, :1]).all() and series.projections.shape[3] < 10
        series, = prepare(read, pixel_size=1.0, crop={"y": [3, 9], "x": [2, 8]}, tilt_axis=5.5)
        assert (series.projections[0] == still[3:9, 2:8]).all()


def test_binning_keeps_counts_and_averages_intensities(tmp_path: Path) -> None:
    path = write(tmp_path, counts=np.full((3, 5, 12, 10), 255, np.uint8))
    counts, = prepare(chem(path, background=[1, 2, 3, 4, 5]), pixel_size=1.5, binning=2)
    assert (counts.projections == 1020).all() and counts.projections.shape[2:] == (6, 5)
    assert counts.pixel_size == 3.0
    assert counts.background.ravel().tolist() == [4, 8, 12, 16, 20]
    other, = prepare(chem(path, units="intensity", background=2.0), pixel_size=1.5, binning=3)
    assert (other.projections == 255).all() and other.projections.shape[2:] == (4, 3)
    assert other.background == 2


def test_side_windows_become_a_smooth_background(tmp_path: Path) -> None:
    """Scaled, corrected and evened out: the mean stays, the noise goes, and it is binned with the maps."""
    side = rng.poisson(0.2, (3, 5, 40, 40)).astype(np.uint8)
    scale = np.array([[1.0], [2.0], [0.5]]) * np.ones(5)
    path = write(tmp_path, counts=side + 1, side=side, scale=scale)
    read = chem(path, background={"key": "side", "scale_key": "scale", "factor": {"Si": 0.5}})
    series, = prepare(read, pixel_size=1.0, binning=2)
    assert series.background.shape == series.projections.shape
    expected = 4 * 0.2 * np.array([1.0, 2.0, 0.25])
    np.testing.assert_allclose(series.background.mean((1, 2, 3)), expected, rtol=0.1)
    assert (series.background.std((1, 2, 3)) < 0.25 * expected).all()
    raw = chem(path, background={"key": "side", "smooth": 0.0})
    np.testing.assert_array_equal(raw.background, side)


def test_angles_and_truth(tmp_path: Path) -> None:
    path = write(tmp_path, volume=np.arange(24.0).reshape(2, 3, 4, 1))
    np.testing.assert_array_equal(read_angles("key:angles", path), ANGLES)
    truth = read_truth(path, key="volume", axes=["y", "z", "x", "element"], elements=["Fe"], shape=(3, 2, 4))
    assert truth.shape == (1, 3, 2, 4) and truth[0, 2, 1, 3] == 23 and truth.dtype == np.float32


# --- bad data: what is done, and words of the sentence that answers ---


def torn(folder: Path, suffix: str, keep: float = 0.5) -> Path:
    path, _ = write_as(suffix, folder, rng.integers(0, 100, (5, 12, 10)).astype(np.int16))
    path.write_bytes(path.read_bytes()[:int(keep * path.stat().st_size)])
    return path


def touched(path: Path, text: str = "") -> Path:
    path.write_text(text)
    return path


def other(folder: Path) -> Recording:
    np.save(folder / "haadf.npy", np.ones((5, 8, 10)))
    return read_series(folder / "haadf.npy", axes=["tilt", "y", "x"], angles=ANGLES, units="intensity")


def mapped(folder: Path, value: float, dtype: type = float, where: Any = (0, 0, 0, 0)) -> str:
    counts = COUNTS.astype(dtype)
    counts[where] = value
    return write(folder, counts=counts)


def made(recording: Recording, **settings: Any) -> Any:
    return prepare(recording, **({"pixel_size": 1.0} | settings))


BAD: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing file": (lambda f: (write(f), read_array(f / "map.npz")), ("no such file", "mean maps.npz?")),
    "unknown kind": (lambda f: read_array(touched(f / "a.raw")), ("a.raw", "not known", ".mrc")),
    "torn npz": (lambda f: read_array(torn(f, ".npz"), "haadf"), ("series.npz", "cannot be read", "whole?")),
    "torn npy": (lambda f: read_array(torn(f, ".npy")), ("series.npy", "cannot be read")),
    "torn mrc": (lambda f: read_array(torn(f, ".mrc", 0.9)), ("series.mrc", "bytes", "missing", "copy it")),
    "no mrc": (lambda f: read_array(touched(f / "a.mrc", "x" * 2000)), ("no MRC header",)),
    "folder": (lambda f: ((f / "a.zarr").mkdir(), read_array(f / "a.zarr")), ("without Zarr metadata",)),
    "pickles": (lambda f: read_array(write(f, p=np.array([{}])), "p"), ("maps.npz", "cannot be read")),
    "missing key": (lambda f: chem(write(f), key="count"), ("'count'", "did you mean counts?", "angles")),
    "no key": (lambda f: chem(write(f), key=None), ("maps.npz", "counts, angles", "key")),
    "needless key": (lambda f: open_file(write_as(".npy", f, COUNTS)[0]).array("a"), ("'a'", "leave out")),
    "number of axes": (lambda f: chem(write(f), axes=["tilt", "y", "x"]), ("4 axes", "(3, 5, 12, 10)")),
    "unknown axis": (lambda f: chem(write(f), axes=["element", "tilts", "y", "x"]), ("mean tilt?",)),
    "axis twice": (lambda f: chem(write(f), axes=["element", "tilt", "y", "y"]), ("twice",)),
    "no x": (lambda f: chem(write(f, counts=COUNTS[0]), axes=["element", "tilt", "y"]), ("which axis is x",)),
    "angles": (lambda f: chem(write(f), angles=ANGLES[1:]), ("4 angles for 5 projections",)),
    "radians": (lambda f: chem(write(f), angles=np.radians(ANGLES).tolist()), ("radians", "degrees")),
    "angle nan": (lambda f: chem(write(f), angles=[*ANGLES[1:], np.nan]), ("angle is NaN",)),
    "angles file": (lambda f: chem(write(f), angles="a.rawtlt", root=f), ("a.rawtlt", "no such file")),
    "angles text": (lambda f: chem(write(f), angles=str(touched(f / "a.tlt", "tilt\n1"))), ("a.tlt", "read")),
    "tilts": (lambda f: chem(write(f), tilts=[0, 5]), ("[0, 5]", "from 0 to 4")),
    "few elements": (lambda f: chem(write(f), elements={"Fe": 26}), ("3 maps for 1 elements", "names_key")),
    "index": (lambda f: chem(write(f), elements={"Fe": {"number": 26, "index": 3}}), ("Fe", "no map 3")),
    "map twice": (lambda f: chem(write(f), elements={"Fe": {"index": 1}, "O": {"index": 1}}), ("twice",)),
    "missing element": (lambda f: chem(write(f, names=np.array(["FeK", "O", "Si"])), elements={"FeL": 26},
                                       names_key="names"), ("no map is named 'FeL'", "mean FeK?", "Si")),
    "names": (lambda f: chem(write(f, names=np.array(["Fe"])), names_key="names"), ("1 names for 3 maps",)),
    "several images": (lambda f: chem(write(f), elements=None), ("3 maps where one image",)),
    "complex": (lambda f: chem(mapped(f, 1j, complex)), ("complex128", "real numbers")),
    "nan": (lambda f: made(chem(mapped(f, np.nan))), ("maps.npz[counts]", "1 pixels are NaN")),
    "empty map": (lambda f: made(chem(mapped(f, 0, int, 1))), ("maps.npz", "O: every pixel", "zero")),
    "negative": (lambda f: made(chem(mapped(f, -1, int))), ("maps.npz", "negative", "net_counts")),
    "wrapped": (lambda f: made(chem(mapped(f, 2**32 - 1, np.uint32))), ("unsigned",)),
    "normalised": (lambda f: made(chem(write(f, counts=COUNTS / 100))), ("whole count", "atomic_percent")),
    "units": (lambda f: chem(write(f), units="count"), ("'count'", "did you mean counts?")),
    "pixel size": (lambda f: made(chem(write(f)), pixel_size=None), ("maps.npz", "data.pixel_size in nm")),
    "shifts": (lambda f: chem(write(f), shifts=[[0, 0]]), ("shifts", "(1, 2)", "5 projections")),
    "shift axes": (lambda f: chem(write(f), shifts=[[0, 0]] * 5, shift_axes=["y", "-y"]), ("[y, -y]",)),
    "background": (lambda f: made(chem(write(f), background=[1, 2])), ("background", "5 tilts")),
    "side windows": (lambda f: chem(write(f, b=COUNTS[:2]), background={"key": "b"}), ("(2, 5, 12, 10)",)),
    "scale": (lambda f: chem(write(f, s=np.ones((5, 3))), background={"key": "counts", "scale_key": "s"}),
              ("[s]", "(5, 3)", "(3, 5)")),
    "factor": (lambda f: chem(write(f), background={"key": "counts", "factor": {"S": 1}}), ("factor for S",)),
    "crop": (lambda f: made(chem(write(f)), crop={"y": [4, 13]}), ("crop y [4, 13]", "12 pixels")),
    "crop and shift": (lambda f: made(chem(write(f), shifts=[[0, 3]] * 5), crop={"x": [1, 9]}),
                       ("-40 degrees", "moved by 3 pixels", "x [1, 9]", "[3, 10]")),
    "binning": (lambda f: made(chem(write(f)), binning=0), ("binning 0",)),
    "bins": (lambda f: made(chem(write(f)), binning=4, crop={"x": [0, 3]}), ("x [0, 3]", "bin of 4")),
    "two grids": (lambda f: prepare(other(f), chem(write(f)), pixel_size=1.0), ("haadf.npy", "(8, 10)")),
    "truth": (lambda f: read_truth(write(f), key="counts", elements=["O"], shape=(5, 1, 9)), ("5, 1, 9",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_answered_by_a_sentence(case: str, tmp_path: Path) -> None:
    act, words = BAD[case]
    with pytest.raises(DataError) as caught:
        act(tmp_path)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400
    for word in words:
        assert word in sentence


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rsciio", None)
    with pytest.raises(DataError, match=r"rsciio is not installed; pip install .tomoatlas\[files\]"):
        read_array(touched(tmp_path / "a.bcf"))


# --- the measured series ---


def folder(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent")
    return DATA / name


def test_needle_opens_permissively() -> None:
    read = read_series("HAADF.mrc", root=folder("needle_haadf"), axes=["tilt", "y", "x"],
                       angles="HAADF.rawtlt", units="intensity")
    assert read.projections.shape == (1, 77, 256, 256) and read.projections.min() < 0
    assert read.angles[0] == -76 and read.angles[-1] == 76 and read.pixel_size is None


@needs_rosetta
def test_bruker_file_holds_image_and_spectra() -> None:
    contents = open_file(folder("stem_eds_haadf_map") / "test_TEM.bcf")
    assert contents.array("HAADF").shape == (64, 64) and contents.array("EDX").shape == (64, 64, 2048)
    assert contents.array("EDX").sum() == 26005 and contents.pixels["HAADF"] == pytest.approx(0.771, rel=1e-3)


def test_dust_particle_as_its_yaml_reads_it() -> None:
    from sweeps.settings import load

    root = folder("idp_haadf_edx")
    data = load(Path(__file__).parents[1] / "configs" / "idp.yaml", [f"data.root={root}"]).data
    given = [source.model_dump(exclude={"candidates", "beam"}) for source in (data.haadf, data.chem)]
    read = [read_series(**each, root=root) for each in given]
    haadf, maps = prepare(*read, pixel_size=data.pixel_size, crop=data.crop.model_dump(),
                          binning=data.binning, tilt_axis=data.tilt_axis)
    assert haadf.tilts == maps.tilts == 16 and {"Fe", "Mg", "Si", "O", "S"} <= set(maps.elements)
    assert haadf.projections.shape[2:] == maps.projections.shape[2:] == (56, 48)
    # Every tilt shows the same mass in each plane across the axis, but for the longer path: to 5 %; to 9 %
    # with one sign of a shift wrong, to 15 % with the axes exchanged.
    mass = haadf.projections[0].sum(1) * np.cos(np.radians(haadf.angles))[:, None]
    assert np.median(mass.std(0) / mass.mean(0)) < 0.06
