"""4D-STEM out of a microscope's files: what axes, crops, bins and counts mean, and where scan and detector lie."""

import importlib.util
import shutil
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import zarr

from engine import archives, diffraction, intake, orientation, scans, stacks
from engine.atoms import nanoparticle
from engine.data import DataError
from engine.diffraction import Scan, with_dose
from engine.euler import euler, matrix
from engine.intake import Recipe
from engine.multislice import Optics
from engine.orientation import FLIPS, turn
from engine.physics import wavelength
from engine.stacks import AXES, Misfit, found, stack
from tests.test_files import DATA, signal

needs_files = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("rsciio", "h5py"))),
                                 reason="needs RosettaSciIO and h5py")
SIZE, PIXEL, PROBES = 24, 0.04, 20
ANGLES = [-50.0, -10.0, 30.0, 60.0]
OPTICS = Optics(defocus=0.0)
SCALE = 1e3 * OPTICS.wavelength / (SIZE * PIXEL)  # [mrad] of a pixel
STEP = 0.7 / PROBES


class Turned(Scan):
    """A scan that lies on the detector turned and flipped, and is smaller than the field."""

    lies = np.eye(2)

    @property
    def positions(self):
        axis = (np.arange(self.probes) - (self.probes - 1) / 2) * 0.7 / self.probes
        return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2) @ self.lies.T


@cache
def turned(rotation=0.0, flip="none", defocus=0.0, probes=PROBES):
    """A series of a particle of 13 atoms in the detector's frame, tilted about the scan's x axis."""
    frame = np.eye(3)
    frame[1:, 1:] = turn(rotation) @ FLIPS[flip]
    scan = Turned(SIZE, PIXEL, probes, replace(OPTICS, defocus=defocus), finer=2, slices=0.2)
    object.__setattr__(scan, "lies", frame[1:, 1:])
    return diffraction.simulate(nanoparticle("cuau", 0.3, seed=0), scan,
                                np.array([euler(frame @ matrix([0, 0, angle]) @ frame.T) for angle in ANGLES]))


@pytest.fixture(scope="module")
def straight():
    return turned()


def blocks(series, probes=PROBES):
    """(tilt, scan_y, scan_x, qy, qx)."""
    return series.patterns.reshape(len(series.angles), probes, probes, series.size, series.size)


def kept(folder, series, probes=PROBES, axes=AXES):
    """The series as files, one of each tilt, with axes in an order."""
    for tilt, patterns in enumerate(blocks(series, probes)):
        np.save(folder / f"tilt{tilt}.npy", np.ascontiguousarray(patterns.transpose([AXES.index(a) for a in axes])))
    return [folder / f"tilt{tilt}.npy" for tilt in range(len(series.angles))]


def recipe(files, **changes):
    optics = {"voltage": 300.0, "aperture": 21.0, "defocus": 0.0, "c3": 0.0, "c5": 0.0}
    return Recipe(**{"files": files, "angles": np.array(ANGLES[:len(files)]), "step": (STEP, STEP), "optics": optics,
                     "scale": SCALE, "rotation": 0.0, "flip": "none", **changes})


def brought(folder, given):
    shutil.rmtree(folder / "made.zarr", ignore_errors=True)
    intake.bring(given, folder / "made.zarr")
    with archives.opened(folder / "made.zarr") as group:
        return scans.load(folder / "made.zarr"), group.attributes


# ---- Files


def written(suffix, folder, patterns):
    """Patterns (scan_y, scan_x, qy, qx) in a file of one format, and the key that finds them."""
    path, key = folder / f"tilt{suffix}", None
    if suffix == ".npy":
        np.save(path, patterns)
    elif suffix == ".h5":
        import h5py

        with h5py.File(path, "w") as file:
            file["entry/data"], file["entry/dark"], key = patterns, np.zeros((1, 2, 3, 4)), "entry/data"
    elif suffix == ".zarr":
        zarr.open_group(path, mode="w").create_array("data", data=patterns, chunks=(1, *patterns.shape[1:]))
    elif suffix.endswith(".zspy"):  # as HyperSpy lays it out
        store = zarr.storage.ZipStore(path, mode="w") if suffix.startswith(".zip") else path
        experiment = zarr.open_group(store, mode="w", zarr_format=2).create_group("Experiments/patterns")
        experiment.create_array("data", data=patterns, chunks=(1, *patterns.shape[1:]))
        if not isinstance(store, Path):
            store.close()
    else:
        from engine.files import rosetta

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made, options = signal(patterns, "patterns"), {}
            if suffix == ".blo":
                options = {"intensity_scaling": None, "navigator": np.zeros(patterns.shape[:2], np.uint8)}
                for axis in made["axes"]:
                    axis["units"] = "nm" if axis["navigate"] else "cm"
            rosetta(path).file_writer(str(path), made, show_progressbar=False, **options)
    return path, key


@needs_files
@pytest.mark.parametrize("suffix", [".npy", ".h5", ".zarr", ".hspy", ".zspy", ".zip.zspy", ".blo"])
def test_every_format_is_read_as_it_was_written(suffix, tmp_path):
    patterns = np.random.default_rng(0).poisson(3.0, (4, 5, 6, 6)).astype(np.uint8)
    path, key = written(suffix, tmp_path, patterns)
    with stack(path, key) as read:
        assert read.shape == patterns.shape and read.array.dtype == np.uint8
        np.testing.assert_array_equal(read.rows(0, 4), patterns)
        np.testing.assert_array_equal(read.rows(1, 3, slice(2, 4)), patterns[1:3, 2:4])
        pieces = list(read.pieces(slice(1, 4), slice(0, 3)))
        np.testing.assert_array_equal(np.concatenate([part for _, part in pieces]), patterns[1:4, :3].reshape(9, 6, 6))


@needs_files
def test_a_merlin_file_is_read_lazily():
    path = DATA / "stem_eds_haadf_map" / "001_4x2_6bit.mib"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with stack(path) as read:
        assert read.shape == (2, 4, 256, 256) and not isinstance(read.array, np.ndarray)
        assert read.rows(1, 2, slice(0, 2)).sum((2, 3)).tolist() == [[450760, 453755]]


@needs_files
def test_a_merlin_file_becomes_a_series(tmp_path):
    """Two tilts of eight probes, binned; its disc lies at the detector's edge, so that a part about it is used."""
    path = DATA / "stem_eds_haadf_map" / "001_4x2_6bit.mib"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    given = recipe([path, path], scale=0.9, step=(0.01, 0.01), bins=4, centre=(112.0, 28.0))
    with pytest.raises(Misfit, match=r"about pixel \(112.0, 28.0\) of 256 x 256, .* write crop: 5"):
        intake.survey(given)
    series, _ = brought(tmp_path, replace(given, crop=48))
    with stack(path) as read:
        counts = read.rows(0, 2)[:, :, 86:134, 2:50].reshape(8, 12, 4, 12, 4).sum((2, 4))
    np.testing.assert_array_equal(series.patterns, np.stack([counts, counts]))
    assert series.electrons == pytest.approx(counts.sum((1, 2)).max(), rel=0.02)


@pytest.mark.parametrize("axes", [("qy", "qx", "scan_y", "scan_x"), ("scan_x", "scan_y", "qx", "qy"),
                                  ("scan_y", "qx", "qy", "scan_x")])
def test_the_order_of_axes_is_that_of_the_file(axes, tmp_path):
    patterns = np.random.default_rng(0).random((4, 5, 6, 7))
    np.save(tmp_path / "a.npy", patterns.transpose([AXES.index(axis) for axis in axes]))
    with stack(tmp_path / "a.npy", axes=axes) as read:
        np.testing.assert_array_equal(read.rows(1, 4, slice(1, 3)), patterns[1:4, 1:3])


def test_all_probes_may_lie_along_one_axis(tmp_path):
    patterns = np.random.default_rng(0).random((4, 5, 6, 7))
    np.save(tmp_path / "a.npy", patterns.reshape(20, 6, 7))
    with stack(tmp_path / "a.npy", None, ("scan", "qy", "qx"), (4, 5)) as read:
        assert read.shape == patterns.shape
        np.testing.assert_array_equal(read.rows(1, 3, slice(1, 4)), patterns[1:3, 1:4])
    with pytest.raises(Misfit, match="holds 20 patterns, and a scan of 4 x 4 has 16"), stack(
            tmp_path / "a.npy", None, ("scan", "qy", "qx"), (4, 4)):
        pass


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    for module, name in (("rsciio", "a.mib"), ("h5py", "a.h5"), ("h5py", "a.hspy")):
        (tmp_path / name).touch()
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(DataError, match=rf"{module} is not installed; pip install .tomoatlas\[files\]"), stack(
                tmp_path / name):
            pass


def test_files_of_a_pattern_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 1):
        (tmp_path / f"tilt_{number}.npy").touch()
    assert [path.name for path in found("tilt_*.npy", tmp_path)] == ["tilt_1.npy", "tilt_9.npy", "tilt_10.npy"]
    assert found(str(tmp_path / "tilt_?.npy")) == found(["tilt_1.npy", "tilt_9.npy"], tmp_path)
    with pytest.raises(Misfit, match="no file is named"):
        found("other*.npy", tmp_path)
    with pytest.raises(Misfit, match=r"no such file \(did you mean tilt_9.npy\?\)"):
        found(["tilt_8.npy"], tmp_path)


# ---- Counts


@pytest.mark.parametrize("bins", [1, 2, 3])
def test_bins_keep_all_counts_and_the_disc_in_the_middle(bins, tmp_path):
    """A disc off the middle of a wide detector; whole numbers stay whole."""
    rng, wide, centre, radius = np.random.default_rng(0), (72, 80), (33.0, 42.0), 13.0
    q2 = sum(np.meshgrid(*[(np.arange(n) - c) ** 2 for n, c in zip(wide, centre)], indexing="ij"))
    patterns = rng.poisson(20.0 * (q2 <= radius**2), (6, 6, *wide)).astype(np.uint16)
    np.save(tmp_path / "a.npy", patterns)
    series, attributes = brought(tmp_path, recipe([tmp_path / "a.npy"], scale=None, crop=48, bins=bins,
                                                  step=(0.01, 0.01)))
    assert series.patterns.shape == (1, 36, 48 // bins, 48 // bins)
    np.testing.assert_array_equal(series.patterns[0].sum((1, 2)), patterns.sum((2, 3)).ravel())
    middle, _ = orientation.disc(series.patterns[0].mean(0))
    assert np.abs(middle - 48 // bins // 2).max() <= 0.5 / bins + 0.05
    told = attributes["found"]
    assert told["disc_centres_pixels"][0] == pytest.approx(centre, abs=0.1)
    assert told["disc_radius_pixels"] == pytest.approx(radius, rel=0.02)
    assert series.electrons == pytest.approx(patterns.sum((2, 3)).mean(), rel=0.05)
    # n pixels of the detector are one over the pixel of the field, whatever the bins
    assert series.pixel == pytest.approx(wavelength(300) / (48e-3 * told["scale_mrad"]))
    assert zarr.open_group(tmp_path / "made.zarr")["patterns"].dtype.kind == "u"


def test_dark_counts_and_gain_give_electrons(tmp_path):
    electrons = np.random.default_rng(0).poisson(4.0, (5, 5, SIZE, SIZE))
    np.save(tmp_path / "a.npy", (7 * electrons + 100).astype(np.float32))
    given = recipe([tmp_path / "a.npy"], dark=100.0, gain=7.0, centre=(12.0, 12.0))
    series, _ = brought(tmp_path, given)
    np.testing.assert_allclose(series.patterns[0], electrons.reshape(25, SIZE, SIZE), atol=1e-4)
    assert brought(tmp_path, replace(given, electrons=5e3))[0].electrons == 5e3
    np.save(tmp_path / "a.npy", electrons - 1.0)
    with pytest.raises(DataError, match=r"a.npy: patterns are counts and cannot be negative \(minimum -1\); give dark"):
        brought(tmp_path, replace(given, dark=None, gain=1.0))
    np.save(tmp_path / "a.npy", np.where(electrons > 9, np.nan, electrons))
    with pytest.raises(DataError, match="a.npy: patterns are NaN or infinite"):
        brought(tmp_path, given)
    assert not list(tmp_path.glob("made*"))  # nothing half-written


def test_a_part_of_the_scan_lies_about_its_own_centre(straight, tmp_path):
    given = recipe(kept(tmp_path, straight)[:2], rows=slice(3, 12), columns=slice(5, 10), step=(STEP, 0.03))
    series, _ = brought(tmp_path, given)
    np.testing.assert_array_equal(series.patterns, blocks(straight)[:2, 3:12, 5:10].reshape(2, 45, SIZE, SIZE))
    assert series.positions[0] == pytest.approx([-4 * STEP, -2 * 0.03])
    assert np.abs(series.positions.mean(0)).max() < 1e-9


def test_what_is_in_memory_at_once_changes_nothing(straight, tmp_path, monkeypatch):
    """Rows of the scan one by one, and each in pieces."""
    given, whole = recipe(kept(tmp_path, straight), rotation=None, flip=None), []
    for pixels in (stacks.PIXELS, 5 * SIZE**2):
        monkeypatch.setattr(stacks, "PIXELS", pixels)
        whole.append(brought(tmp_path, given))
    pieces = stacks.Stack(Path("a"), blocks(straight)[0], AXES).pieces(slice(None), slice(None))
    sizes = [len(part) for _, part in pieces]
    assert sum(sizes) == PROBES**2 and max(sizes) <= 5
    np.testing.assert_array_equal(whole[0][0].patterns, whole[1][0].patterns)
    np.testing.assert_allclose(whole[0][0].positions, whole[1][0].positions, atol=1e-6)
    assert whole[0][0].electrons == pytest.approx(whole[1][0].electrons)


def test_wavelengths_are_those_of_the_optics():
    assert wavelength(80) == Optics(80.0).wavelength and wavelength(300) == Optics().wavelength


# ---- Scan and detector


def test_a_series_comes_back_from_its_files_as_it_was(straight, tmp_path):
    series, attributes = brought(tmp_path, recipe(kept(tmp_path, straight, axes=("qx", "scan_y", "qy", "scan_x")),
                                                  axes=("qx", "scan_y", "qy", "scan_x"), electrons=1.0))
    np.testing.assert_array_equal(series.patterns, straight.patterns)
    np.testing.assert_allclose(series.positions, straight.positions, atol=1e-12)
    np.testing.assert_allclose(series.angles, straight.angles, atol=1e-9)
    assert not series.angles[:, :2].any()
    assert series.pixel == pytest.approx(straight.pixel) and series.optics == straight.optics
    assert attributes["doubts"] == []


@pytest.mark.parametrize(("rotation", "flip"), [(0.0, "none"), (37.0, "none"), (-120.0, "none"), (80.0, "x")])
def test_the_turn_and_the_flip_are_found_in_the_patterns(rotation, flip, tmp_path):
    series = turned(rotation, flip)
    counted = with_dose(series, 4e4 * len(series.positions) * 4 / (10 * SIZE * PIXEL) ** 2)  # 4e4 electrons a probe
    for given, tolerance in ((series, 0.3), (counted, 1.0)):
        found_, attributes = brought(tmp_path, recipe(kept(tmp_path, given), rotation=None, flip=None))
        told = attributes["found"]
        assert told["flip"] == flip and abs((told["rotation_deg"] - rotation + 180) % 360 - 180) < tolerance
        assert attributes["doubts"] == []
        assert told["misfit"] < 0.3 < 0.6 < told["misfit_mirrored"]
        lie = turn(told["rotation_deg"]) @ FLIPS[flip]
        np.testing.assert_allclose(found_.positions, turned_positions(lie), atol=1e-9)
        np.testing.assert_allclose([matrix(a) for a in found_.angles], [matrix(a) for a in series.angles], atol=0.02)


@pytest.mark.parametrize(("rotation", "flip", "defocus"), [(37.0, "none", -20.0), (-120.0, "x", -8.0),
                                                           (37.0, "x", 20.0)])
def test_out_of_focus_few_probes_and_electrons_tell_it(rotation, flip, defocus, tmp_path):
    """8 x 8 probes of 2,000 electrons, which hardly overlap in focus, and the sign of the defocus."""
    series = turned(rotation, flip, defocus, probes=8)
    counted = with_dose(series, 2e3 * 64 * 4 / (10 * SIZE * PIXEL) ** 2)
    given = recipe(kept(tmp_path, counted, 8), rotation=None, flip=None, step=(0.7 / 8, 0.7 / 8))
    given = replace(given, optics=given.optics | {"defocus": defocus})
    found_, attributes = brought(tmp_path, given)
    told = attributes["found"]
    assert (told["found_by"], told["flip"], attributes["doubts"]) == ("parallax", flip, [])
    assert abs((told["rotation_deg"] - rotation + 180) % 360 - 180) < 2
    assert told["misfit"] < 0.7 * told["misfit_mirrored"]
    # A sign that is wrong is told from the other way round.
    _, attributes = brought(tmp_path, replace(given, rotation=rotation + 180, flip=flip))
    assert any("say that the rotation" in text for text in attributes["doubts"])
    _, attributes = brought(tmp_path, replace(given, rotation=rotation, flip="none" if flip == "x" else "x"))
    assert any("wrong handedness" in text for text in attributes["doubts"])


def test_a_defocus_of_the_wrong_sign_is_doubted(tmp_path):
    """Parallax then finds half a turn too much, and the deflections contradict it."""
    series = turned(37.0, "none", -6.0)
    given = recipe(kept(tmp_path, series), rotation=None, flip=None)
    for defocus, rotation in ((-6.0, 37.0), (7.0, -143.0)):
        _, attributes = brought(tmp_path, replace(given, optics=given.optics | {"defocus": defocus}))
        told = attributes["found"]
        assert told["found_by"] == "parallax" and told["rotation_deg"] == pytest.approx(rotation, abs=1)
        assert ["check the sign of defocus" in text for text in attributes["doubts"]] == [True] * (defocus > 0)


def turned_positions(lie):
    scan = Turned(SIZE, PIXEL, PROBES, OPTICS)
    return scan.positions @ lie.T


def test_a_flip_is_found_at_a_rotation_that_is_known(tmp_path):
    series = turned(80.0, "x")
    for flip, rotation in (("x", 80.0), ("y", -100.0), ("transpose", 170.0)):
        np.testing.assert_allclose(turn(rotation) @ FLIPS[flip], turn(80.0) @ FLIPS["x"], atol=1e-12)
        _, attributes = brought(tmp_path, recipe(kept(tmp_path, series), rotation=rotation, flip=None))
        assert attributes["found"]["flip"] == flip and attributes["doubts"] == []


def test_what_noise_hides_is_doubted(straight, tmp_path):
    counted = with_dose(straight, 20 * len(straight.positions) * 4 / (10 * SIZE * PIXEL) ** 2)
    _, attributes = brought(tmp_path, recipe(kept(tmp_path, counted), rotation=None, flip=None, scale=SCALE))
    assert any("give rotation" in text for text in attributes["doubts"])


def test_a_tilt_axis_along_y_is_turned_into_the_frame(straight, tmp_path):
    """A positive tilt turns +z toward what lies 90 degrees beyond the axis; a flip mirrors that."""
    files = kept(tmp_path, straight)[:1]
    for axis in (0.0, 90.0, 30.0):
        for rotation, flip in ((0.0, "none"), (50.0, "x")):
            series, _ = brought(tmp_path, recipe(files, tilt_axis=axis, rotation=rotation, flip=flip,
                                                 angles=np.array([20.0])))
            toward = turn(rotation) @ FLIPS[flip] @ turn(axis + 90) @ (0.0, 1.0)
            expected = [np.cos(np.radians(20)), *(np.sin(np.radians(20)) * toward)]
            np.testing.assert_allclose(matrix(series.angles[0]) @ (1.0, 0.0, 0.0), expected, atol=1e-9)
