"""4D-STEM files from a YAML to a trial: made into a series once, told about, and refused in words."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine import intake, scans, tracing
from engine.atoms import nanoparticle
from engine.data import DataError
from engine.stacks import found
from launch import plan
from sweeps import atomic, scanned, settings
from sweeps.settings import SettingsError
from tests.specimens import distance
from tests.test_bimodal import solved, volumes
from tests.test_intake import ANGLES, PIXEL, SCALE, SIZE, kept, recipe, turned

FEW = 14  # probes along an edge


def yaml(folder, **changes):
    """Settings that read tilt*.npy of a folder; dotted ones changed."""
    given = {"name": "atoms", "system": "mset", "solver": {"iterations": 4, "binning": 4}, "search": {
        "objective": "amplitude_error"}, "data": {"root": str(folder), "light": "Cu", "heavy": "Au", "scan": {
            "files": "tilt*.npy", "angles": "tilts.rawtlt", "step": 0.7 / FEW, "aperture": 21.0, "defocus": 0.0,
            "scale": SCALE}}}
    return settings.replace(settings.load(given), {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def few():
    return turned(probes=FEW)


@pytest.fixture
def files(few, tmp_path):
    return stored(tmp_path, few)


def stored(folder, series, angles=ANGLES):
    kept(folder, series, FEW)
    np.savetxt(folder / "tilts.rawtlt", angles)
    return folder


def test_a_trial_of_files_is_that_of_the_series(files, few):
    """The group is made once; what was found stands in the row."""
    scans.save(files / "whole.zarr", few)
    straight_ = {"data__scan__rotation": 0.0, "data__scan__flip": "none"}
    row = solved(files, yaml(files, **straight_))
    whole = solved(files, yaml(files, data__scan="whole.zarr"))
    assert distance(*(volumes(files, each)["volume"] for each in (row, whole))) < 1e-3
    made, = (files / "stages").glob("intake-*.zarr")
    born = made.stat().st_mtime_ns
    assert not whole["notes"] and [note[:40] for note in row["notes"]] == ["data.scan: found in the patterns: 0.9997"]
    assert len(scanned.recorded(yaml(files, **straight_, data__tilts=[0, 2]), files).angles) == 2
    assert made.stat().st_mtime_ns == born and len(list((files / "stages").glob("intake-*.zarr"))) == 1
    np.save(files / "tilt0.npy", np.load(files / "tilt0.npy") * 2)  # another measurement
    scanned.recorded(yaml(files, **straight_), files)
    assert len(list((files / "stages").glob("intake-*.zarr"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("rotation", "flip", "defocus"), [(37.0, "none", -8.0), (-120.0, "x", -20.0)])
def test_atoms_are_as_well_placed_where_the_scan_lies_turned(rotation, flip, defocus, tmp_path):
    """A turn and a flip that nobody told cost no more than some picometres beside the true places of the probes."""
    series, errors = turned(rotation, flip, defocus, probes=FEW), []
    scans.save(stored(tmp_path, series) / "true.zarr", series)
    for given in (yaml(tmp_path, data__scan__defocus=defocus), yaml(tmp_path, data__scan="true.zarr")):
        row = solved(tmp_path, settings.replace(given, {"solver.iterations": 8}))
        told = [] if given.data.scan == "true.zarr" else [True]
        assert [f"flip {flip} (by parallax" in note for note in row["notes"]] == told
        traced = atomic.traced(given.solver, volumes(tmp_path, row)["volume"][0], PIXEL)
        errors.append(tracing.compare(traced.atoms("Cu", "Au"), nanoparticle("cuau", 0.3, seed=0)))
    print([f"{each.rmsd:.2f} pm" for each in errors])
    assert [len(each.pairs) for each in errors] == [13, 13]
    assert errors[0].rmsd < errors[1].rmsd + 3


@pytest.mark.parametrize(("changes", "words"), [
    ({"data__scan__files": ["tilt0.npy", "tilt9.npy"]}, r"data.scan.files: .*tilt9.npy: no such file \(did you mean"),
    ({"data__scan__files": "tilt?.hspy"}, "data.scan.files: no file is named"),
    ({"data__scan__files": ["tilt0.npy", "small.npy"]}, r"data.scan.files: .*small.npy: has the shape \(3, 3, 4, 4\)"),
    ({"data__scan__files": ["torn.npy"]}, "data.scan.files: .*torn.npy: cannot be read"),
    ({"data__scan__files": ["tilts.rawtlt"]}, "data.scan.files: .*files of this kind are not known"),
    ({"data__scan__files": ["tilt0.npy", "tilt1.npy"]}, "data.scan.angles: 4 angles for 2 files, from tilt0.npy to"),
    ({"data__scan__angles": "none.tlt"}, "data.scan.angles: .*no such file of angles"),
    ({"data__scan__key": "data"}, "data.scan.key: .*has no array 'data'; it holds"),
    ({"data__scan__axes": ["scan", "qy", "qx"], "data__scan__scan_shape": [9, 9]},
     "data.scan.axes: .*has the shape .* name 3"),
    ({"data__scan__scan_crop": {"x": [0, 50]}}, "data.scan.scan_crop: .*has 14 probes along x, not 50"),
    ({"data__scan__step": 0.2}, "data.scan.scan_crop: a probe lies 1.3 nm from the scan's centre"),
    ({"data__crop": 30}, "data.crop: patterns of 24 x 24 pixels cannot be cropped to 30"),
    ({"data__crop": 16}, "data.crop: an aperture of 21 mrad does not fit on 16 pixels"),
    ({"data__scan__centre": [16.0, 12.0]}, "data.crop: the bright disc lies about pixel .*; write crop: 16"),
    ({"data__scan__scan_crop": {"y": [0, 4]}, "data__scan__flip": "none"},
     "data.scan.rotation: a scan in focus of 4 x 14 probes is too small to find it; give it"),
    ({"data__tilts": [0, 9]}, "data.tilts: there is no tilt 9; the series has 0 to 3"),
    ({"solver__binning": 5}, "solver.binning: 24 layers of voxels cannot be cut into slices of 5"),
])
def test_what_does_not_fit_is_told_before_it_runs(changes, words, files):
    np.save(files / "small.npy", np.zeros((3, 3, 4, 4)))
    (files / "torn.npy").write_bytes((files / "tilt0.npy").read_bytes()[:5000])
    with pytest.raises(DataError, match=words):
        plan.plan(yaml(files, **changes))


@pytest.mark.parametrize(("changes", "words"), [
    ({"axes": ["scan_y", "scan_x", "qy"]}, "data.scan.axes: .* is neither of scan_y, scan_x, qy, qx nor of scan"),
    ({"axes": ["scan", "qy", "qx"]}, "data.scan.scan_shape: is given with the axis scan"),
    ({"files": ["a.npy"], "angles": [0.0, 10.0]}, "data.scan.angles: 2 angles for 1 files"),
    ({"flip": "z"}, "data.scan.flip: must be"),
    ({"step": 0.0}, "data.scan.step: must be above 0"),
    ({"apperture": 3.0}, r"data.scan.apperture: unknown key \(did you mean aperture"),
])
def test_settings_that_do_not_fit_have_a_sentence(changes, words, files):
    with pytest.raises(SettingsError, match=words):
        yaml(files, **{f"data__scan__{name}": value for name, value in changes.items()})


def test_the_plan_of_files_has_their_sizes_and_their_disc(files):
    seen = plan.plan(yaml(files, data__crop=22, solver__binning=2, data__scan__scale="auto"))
    extent = seen.costs[0].extent
    assert (extent.shape, extent.chem, extent.probes) == ((22,) * 3, 4, FEW**2)
    assert extent.pixel == pytest.approx(PIXEL * SIZE / 22, rel=0.02)
    assert seen.series[0].startswith("data.scan: 4 tilts, 14 x 14 probes (y, x), 24 x 24 pixels of 2.0")
    assert "bright disc of 10.3 pixels about (12.0, 12.0)" in seen.series[0]


def test_workers_that_need_a_group_at_once_make_one(files):
    """Each in a process of its own; what one has made is not taken from it."""
    (files / "a.yaml").write_text(settings.to_yaml(yaml(files)))
    code = ("import sys; from pathlib import Path; from sweeps import imported, settings;"
            "folder = Path(sys.argv[1]); data = settings.load(folder / 'a.yaml').data;"
            "path, _ = imported.group(data, folder); print(path.stat().st_ino)")
    runs = [subprocess.Popen([sys.executable, "-c", code, str(files)], stdout=subprocess.PIPE, text=True,
                             cwd=Path(__file__).parents[1]) for _ in range(3)]
    told = [run.communicate(timeout=300)[0] for run in runs]
    assert len(set(told)) == 1 and told[0]
    group, = (files / "stages").glob("intake-*.zarr")
    given = recipe(found("tilt*.npy", files), step=(0.7 / FEW, 0.7 / FEW))
    born = group.stat().st_ino
    intake.bring(given, group)  # too late
    assert group.stat().st_ino == born and not list((files / "stages").glob("*.partial*"))
