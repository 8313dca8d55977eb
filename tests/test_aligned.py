"""Alignment in a sweep: stages in the YAML, once for all cells, maps that move with the images, a series alone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import affine_transform

from engine.data import DataWarning
from engine.metrics import nrmse_elements
from sweeps import aligned, alignments, specimens, stages
from sweeps.settings import SettingsError, dump, load
from tests.specimens import blobs
from tests.test_registration import planted, whole

ANGLES = np.linspace(-70, 70, 29)
ROOT = Path(__file__).parent.parent
CROP = {"y": [12, 36], "x": [12, 36]}
PLANTED = {"name": "a", "data": {
    "phantom": "cocuo", "size": 24, "haadf_tilts": 23, "chem_tilts": 7,
    "misalign": {"shift": 4.0, "axis": 1.0, "inplane": 2.0},
    "align": [{"stage": "centre_of_mass", "axes": ["y", "x"]},
              {"stage": "match", "levels": [{"bins": 2, "rounds": 30}, {"bins": 1, "rounds": 20}]}]}}


@pytest.fixture
def files(tmp_path):
    """A HAADF series and maps at every second of its angles, 3 images of which say nothing of the others."""
    true = planted(4.0)
    images = 100 + 50 * blobs(true, ANGLES, *whole())
    images[20] = 0.0
    np.savez(tmp_path / "images.npz", haadf=images, angles=ANGLES)
    counts = np.random.default_rng(0).poisson(4 * blobs(true, ANGLES, *whole()))
    np.savez(tmp_path / "maps.npz", counts=counts[None, ::2], angles=ANGLES[::2])
    return tmp_path, true


def measured(folder: Path, **more):
    source = {"axes": ["tilt", "y", "x"], "angles": "key:angles"}
    return load({"name": "a", "search": {"objective": "heldout"}, "data": {
        "root": str(folder), "pixel_size": 2.0, "crop": CROP,
        "haadf": {"path": "images.npz", "key": "haadf", **source},
        "chem": {"path": "maps.npz", "key": "counts", **source, "axes": ["element", "tilt", "y", "x"],
                 "elements": {"Co": 27}},
        "align": ["background", {"stage": "centre_of_mass", "axes": ["y", "x"]}, "outliers",
                  {"stage": "match", "levels": [{"bins": 2, "rounds": 20}]}]} | more})


def test_maps_move_as_the_images_of_their_angles(files):
    folder, true = files
    with pytest.warns(DataWarning, match="the image at 30 degrees holds nothing"):
        data = specimens.prepared(measured(folder), folder)
    assert 30.0 not in data.haadf.angles and 30.0 not in data.chem.angles
    assert (data.haadf.tilts, data.chem.tilts) == (28, 14)
    assert (data.chem.projections == np.rint(data.chem.projections)).all()
    plain = blobs(planted(0, 0, 0), ANGLES, *whole())
    # Both show the specimen where its centre of mass is the middle.
    centre = whole()[1] @ whole()[0] / whole()[1].sum()
    turn = np.radians(ANGLES)
    moved = blobs(replace(planted(0, 0, 0), shifts=-np.stack(
        [centre[1] * np.cos(turn) + centre[0] * np.sin(turn), np.full(29, centre[2])], 1)), ANGLES, *whole())
    good = np.arange(29) != 20
    off = data.haadf.projections[0] - 50 * moved[good][:, 12:36, 12:36]
    assert np.abs(off).mean() < 0.02 * 50 * plain.max()
    there = moved[::2][np.arange(15) != 10][:, 12:36, 12:36]
    correlation = np.corrcoef(data.chem.projections[0].ravel(), there.ravel())
    assert correlation[0, 1] > 0.8


@pytest.mark.filterwarnings("ignore::engine.data.DataWarning")
def test_an_alignment_is_made_once_and_again_when_a_file_changes(files, monkeypatch):
    folder, _ = files
    made = []
    monkeypatch.setattr(aligned, "aligned", lambda *args, made=made, each=aligned.aligned, **more: (
        made.append(1), each(*args, **more))[1])
    sweep = measured(folder)
    for binning in (1, 1):
        aligned.recordings(sweep.data.model_copy(update={"binning": binning}), folder)
    assert len(made) == 1 and len(alignments.kept(folder)) == 1
    np.savez(folder / "images.npz", haadf=100 + 50 * blobs(planted(2.0), ANGLES, *whole()), angles=ANGLES)
    aligned.recordings(sweep.data, folder)
    assert len(made) == 2


@pytest.mark.filterwarnings("ignore::engine.data.DataWarning")
def test_maps_that_drifted_lie_on_their_images_again(files):
    """Rows that came later lie further on; brighter maps, for the drift is read from counts."""
    folder, true = files
    straight = 30 * blobs(true, ANGLES, *whole())[::2]
    drift = np.array([[1.0, 0.0, 0.0], [0.06, 1.0, 0.5]])
    back = np.linalg.inv(drift[:, :2])
    middle = np.full(2, 23.5)
    drifted = [affine_transform(image, back, middle - back @ (middle + drift[:, 2])) for image in straight]
    angles = ANGLES[::2]
    np.savez(folder / "maps.npz", counts=np.random.default_rng(0).poisson(np.maximum(drifted, 0))[None], angles=angles)
    plain, given = specimens.prepared(measured(folder), folder), dump(measured(folder))
    given["data"]["align"] += [{"stage": "maps", "free": "drift"}]
    righted = specimens.prepared(load(given), folder)
    assert len(alignments.kept(folder)) == 1
    images = plain.haadf.projections[:, ::2][:, :10]
    assert (images.shape, np.allclose(plain.haadf.angles[::2][:10], plain.chem.angles[:10])) == ((1, 10, 24, 24), True)
    before, after = (nrmse_elements(each.chem.projections[:, :10], images)[0] for each in (plain, righted))
    assert after < 0.6 * before


@pytest.mark.filterwarnings("ignore::engine.data.DataWarning")
def test_a_series_alone_is_the_only_map_there_is(files):
    folder, _ = files
    given = dump(measured(folder))
    del given["data"]["chem"]
    sweep = load(given)
    assert sweep.data.alone and list(sweep.data.chem.elements) == ["HAADF"] and sweep.data.chem.units == "intensity"
    assert load(dump(sweep)) == sweep
    data = specimens.prepared(sweep, folder)
    assert data.haadf is None and data.chem.tilts == 28 and data.chem.elements == ("HAADF",)


def test_a_simulated_series_is_brought_to_its_truth(tmp_path):
    """A map of the volume by its own images, and as good as where nothing was planted: counts alone differ."""
    sweep = load(PLANTED)
    data = specimens.prepared(sweep, tmp_path)
    found, = alignments.kept(tmp_path)
    assert (found.error < 0.1).all() and abs(found.turn - 2) < 0.2
    assert found.after < found.before / 3
    perfect = specimens.prepared(load({**PLANTED, "data": PLANTED["data"] | {"misalign": {}, "align": None}}), tmp_path)
    assert data.shape == perfect.shape == (24, 24, 24)
    gap = nrmse_elements(data.haadf.projections, perfect.haadf.projections)
    worse = specimens.prepared(load({**PLANTED, "data": PLANTED["data"] | {"align": None}}), tmp_path)
    assert gap.max() < 0.15 < nrmse_elements(worse.haadf.projections, perfect.haadf.projections).min()


def test_stages_do_not_change_what_is_simulated(tmp_path):
    """Two ways to align, one noise."""
    for stage in ("background", "common_line"):
        specimens.prepared(load({**PLANTED, "data": PLANTED["data"] | {"align": [stage]}}), tmp_path)
    assert len(stages.kept(tmp_path, "simulate")) == 1 and len(alignments.kept(tmp_path)) == 2


@pytest.mark.parametrize(("align", "words"), [
    (["matsch"], "matsch is no stage of an alignment"),
    ([{"stage": "match", "levels": [{"bins": 2, "round": 3}]}], "did you mean rounds?"),
    ([{"stage": "centre_of_mass", "axes": ["z"]}], "must be y or x"), ([], "needs 1 or more")])
def test_a_wrong_stage_is_answered_by_a_sentence(align, words):
    with pytest.raises(SettingsError) as caught:
        load({**PLANTED, "data": PLANTED["data"] | {"align": align}})
    assert words in str(caught.value) and "data.align" in str(caught.value)


@pytest.mark.slow
def test_a_run_tells_its_alignment(tmp_path):
    """Printed, in summary.json and in the report."""
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps({**PLANTED, "solver": {"iterations": 5}}))
    words = ["run", str(path), "--out", str(tmp_path / "run"), "--workers", "1"]
    done = subprocess.run([sys.executable, "-m", "launch.cli", *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert "Alignment of cocuo" in printed and "times less" in printed and "pixels rms along y" in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["align_residual_fold"] > 3 and summary["align_error_y_pixels"] < 0.1
    assert (tmp_path / "run" / "report" / "aligned-1.png").stat().st_size > 10_000
