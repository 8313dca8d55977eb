"""system: mspt from its YAML to rows, tables and figures; tilts that stand after a kill; measured series."""

import numpy as np
import pytest

from engine import align, mspt, ptychography, scans
from engine.data import DataError
from engine.euler import euler, matrix
from launch import plan
from sweeps import report, scanned, sequential, settings, tables, trial
from sweeps.settings import SettingsError
from tests.specimens import distance
from tests.test_bimodal import made, solved, volumes

# Eight tilts of a particle of 13 atoms in 24 pixels, 7 x 7 probes, shifted and turned a little.
PLAIN = {"name": "chain", "system": "mspt",
         "data": {"phantom": "cuau", "radius": 0.32, "size": 24, "tilts": 8, "tilt_range": [-70, 70], "probes": 7,
                  "defocus": -8.0, "shift_error": 0.05, "inplane_error": 1.0},
         "solver": {"iterations": 8, "slices": 2, "refine": [],
                    "levels": [{"bins": 2, "rounds": 15}, {"bins": 1, "rounds": 15, "free": ["shift", "inplane"]}]}}


def sweep(**changes):
    """PLAIN with dotted settings changed: solver__slices=3."""
    return settings.replace(settings.load(PLAIN), {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep over the number of slices."""
    return made(tmp_path_factory.mktemp("runs") / "chain", sweep(grid={"method": ["mspt", "sspt"]}))


# ---- Data


def test_a_series_is_simulated_with_its_errors_and_tells_none(tmp_path):
    given = sweep().data
    series, off = scanned.recorded(sweep(), tmp_path), scanned.planted(given)
    np.testing.assert_array_equal(series.angles[:, 2], np.linspace(-70, 70, 8))
    assert not series.angles[:, :2].any()
    assert np.abs(off.shifts).max() <= 0.05 / 0.04 and np.abs(off.inplane).max() <= 1 and not off.tilt.any()
    still = scanned.recorded(sweep(data__shift_error=0.0, data__inplane_error=0.0), tmp_path)
    assert distance(still.patterns, series.patterns) > 1e-3


def test_tilts_about_one_axis_are_told_from_others():
    angles = np.linspace(-60, 60, 7)
    for inplane in (0.0, 25.0, -80.0):
        there, back = matrix([inplane, 0, 0]), matrix([-inplane, 0, 0])
        found, axis = sequential.about_one_axis(np.array([euler(there @ matrix([0, 0, a]) @ back) for a in angles]))
        np.testing.assert_allclose(found, angles, atol=1e-6)
        assert axis == pytest.approx(inplane, abs=1e-6)
    wandering = np.stack([0 * angles, angles / 3, angles], 1)
    with pytest.raises(DataError, match="one axis"):
        sequential.about_one_axis(wandering)
    with pytest.raises(DataError, match="several"):
        sequential.about_one_axis(np.full((3, 3), 10.0))


# ---- Trials


def test_a_trial_is_the_engines_chain(tmp_path):
    row = solved(tmp_path, sweep())
    series, given = scanned.recorded(sweep(), tmp_path), sweep().solver
    asked = ptychography.Settings(slices=2, depth=24 * 0.04, iterations=8, refine=[])
    phases = np.stack([mspt.image(series, tilt, asked).phase for tilt in range(8)])
    volts = 1 / (series.optics.interaction * 0.04)
    found = mspt.tomogram(phases, series.angles[:, 2], volts, sequential.chain(given),
                          reference=scanned.planted(sweep().data))
    kept = volumes(tmp_path, row)
    assert distance(kept["volume"][0], found.volume) < 1e-4
    assert np.allclose(kept["field_alignment"][:, 1:3], found.alignment.shifts, atol=1e-3)
    assert row["metrics"]["nrmse"] == row["objective"] < 1.0
    assert row["metrics"]["shift_error"] < 0.2
    assert row["elements"]["nrmse"] == {"potential": row["objective"]}
    assert set(kept) >= {"field_images", "field_residual", "field_mask", "field_gauge", "field_atoms"}


def test_tilts_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    """Of a run that was killed after three tilts the fourth is the next; what differs later shares all."""
    calls, image = [], mspt.image

    def counted(series, tilt, *args, **more):
        calls.append(tilt)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return image(series, tilt, *args, **more)

    monkeypatch.setattr(mspt, "image", counted)
    with pytest.raises(KeyboardInterrupt):
        solved(tmp_path, sweep())
    assert len(list((tmp_path / "stages").glob("tilt-*.npz"))) == 3
    solved(tmp_path, sweep())
    assert len(calls) == 4 + 5 and set(calls) == set(range(8))
    solved(tmp_path, sweep(solver__blur=0.5, solver__mask=0.0))
    assert len(calls) == 9
    solved(tmp_path, sweep(solver__slices=1))
    assert len(calls) == 17


def test_patterns_that_are_left_out_judge_the_slices(tmp_path):
    rows = [solved(tmp_path, sweep(search__objective="heldout", solver__iterations=n)) for n in (8, 1)]
    assert rows[0]["objective"] == rows[0]["metrics"]["heldout"] < rows[1]["objective"]


def test_what_cannot_be_aligned_is_a_row_with_a_reason(tmp_path):
    scans.save(tmp_path / "series.zarr", scanned.recorded(sweep(), tmp_path))
    given = settings.load({**PLAIN, "data": {"root": str(tmp_path), "scan": "series.zarr"},
                           "search": {"objective": "heldout"}, "solver": {"levels": [{"bins": 20, "rounds": 3}]}})
    asked = {"trial": 0, "attempt": 0, "kind": "search", "params": {}, "settings": settings.dump(given)}
    row, = trial.run({"cell": "all", "folder": str(tmp_path), "trials": [asked]})
    assert "does not fit images" in row["status"] and row["objective"] is None


def test_a_series_in_a_file_is_aligned_without_a_truth(tmp_path):
    scans.save(tmp_path / "series.zarr", scanned.recorded(sweep(), tmp_path))
    given = settings.load({**PLAIN, "data": {"root": str(tmp_path), "scan": "series.zarr", "light": "Cu"},
                           "search": {"objective": "heldout"}})
    row = solved(tmp_path, given)
    assert "nrmse" not in row["metrics"] and row["metrics"]["residual"] < 0.5
    kept = volumes(tmp_path, row)
    found = align.Alignment(kept["field_alignment"][:, 1:3], *kept["field_alignment"][:, 3:].T)
    off, _ = align.ungauged(found.less(scanned.planted(sweep().data)), np.linspace(-70, 70, 8))
    assert np.sqrt((off.shifts**2).mean()) < 0.2
    streamed = solved(tmp_path, settings.replace(given, {"data.stream": "always", "name": "again"}))
    assert streamed["objective"] == pytest.approx(row["objective"], rel=1e-4)


def test_one_tilt_resolves_less_along_the_beam_than_the_tomogram(tmp_path):
    row = solved(tmp_path, sweep(solver__sections=6))
    assert row["metrics"]["depth_one_tilt"] > 3 * row["metrics"]["depth_tomogram"] > 0
    assert len(list((tmp_path / "stages").glob("sections-*.npz"))) == 1
    # Its truth is the slices of what was scanned: all of them together are the projection at that tilt.
    given = sweep().data
    slices = scanned.sections(given, 3, 6, 0.96)
    whole = scanned.sections(given, 3, 1, 0.96)
    np.testing.assert_allclose(slices.sum(0), whole[0], atol=1e-4 * whole.max())


@pytest.mark.parametrize(("changes", "words"), [
    ({"search.objective": "amplitude_error"}, "mspt has rmsd, tracing_error, nrmse, heldout, missing_sites, not"),
    ({"solver.slices": 0}, "must be 1 or more"),
    ({"solver.sections": 1}, "write 2 or more"),
    ({"solver.levels": [{"bins": 7, "rounds": 3}]}, "fewer than 4 x 4 of 24; write 6 at most"),
    ({"data": {"phantom": "cocuo"}}, "mspt takes 4D-STEM"),
    ({"output.haadf": 5}, "is for"),
])
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(SettingsError, match=words):
        settings.replace(settings.load(PLAIN), changes)


# ---- Runs


def test_the_table_and_the_figures_tell_of_both(folder):
    text = report.table(folder)
    assert "MSPT" in text or "method=mspt" in text
    assert "shifts to" in text and "turns in plane to" in text and "many slices / one" in text
    run = tables.read(folder)
    names = {path.name for path in report.write(folder)}
    assert {"map.png", "slices-xy.png", "atoms.png", "alignment.png", "phases.png", "convergence.png"} <= names
    assert all((folder / "report" / f"{cell.id}.xyz").exists() for cell in run.cells)


def test_a_package_that_is_not_there_is_told_before_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    said = list(plan.refusals(plan.plan(sweep(grid={"solver.denoise": ["none", "bm3d"]})), 0, "", tmp_path))
    assert len(said) == 1 and "solver.denoise: bm3d" in said[0] and "tomoatlas[bm3d]" in said[0]
    assert not list(plan.refusals(plan.plan(sweep(solver__denoise="nlm")), 0, "", tmp_path))


def test_the_plan_counts_a_tilts_patterns_twice_at_most():
    found = plan.plan(sweep())
    assert found.costs[0].memory["patterns"] == 4 * 2 * 49 * 24**2
    assert found.costs[0].core_seconds > 0
    assert found.files["prepared data"] >= 8
