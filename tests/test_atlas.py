"""The journal survives whatever is done to its end, and the atlas follows from it for anyone who opens it."""

import contextlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import xarray
import yaml
import zarr

from sweeps import arrays, atlas, grid, journal, settings
from sweeps.atlas import RunFolder
from sweeps.coordinator import EMPTY
from sweeps.journal import History, Journal, RunError
from tests.coordinate import WEIGHT, coordinate, sweep
from tests.test_coordinator import events, figures


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run with volumes: 2 x 2 cells, one row of them conventional."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    coordinate(folder, sweep(4), "with_volume")
    return RunFolder(folder)


def written(path, count):
    """A journal of `count` events, closed again."""
    with contextlib.closing(Journal(path)) as log:
        for n in range(count):
            log.append({"event": "ask", "cell": "all", "trial": n, "attempt": 0, "params": {"a": n / 3}})


def test_what_is_appended_is_read_again_as_it_was_returned(tmp_path):
    with contextlib.closing(Journal(tmp_path / "j")) as log:
        event, = log.append({"event": "result", "objective": math.nan, "status": "höher\nals",
                            "metrics": {"a": np.float32(0.1), "b": -math.inf},
                            "checkpoints": (np.arange(2), np.int64(7))})
    assert journal.read(tmp_path / "j")[0] == [event]
    assert event["objective"] is event["metrics"]["b"] is None and event["checkpoints"] == [[0, 1], 7]


def test_a_tail_torn_at_any_byte_costs_only_the_last_event(tmp_path):
    path = tmp_path / "j"
    written(path, 3)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        assert len(journal.read(path)[0]) == 2 and path.stat().st_size == cut  # reading repairs nothing
        written(path, 1)
        assert [event["trial"] for event in journal.read(path)[0]] == [0, 1, 0]
    path.write_bytes(whole[:start] + bytes(40) + b"\n")  # a power cut leaves zeros
    assert len(journal.read(path)[0]) == 2


def test_a_torn_middle_is_refused_with_its_line(tmp_path):
    written(tmp_path / "j", 4)
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    for line in (b"{\n", b"\n", b"[]\n", lines[1][:-9], lines[1].replace(b"event", b"even")):
        broken = b"".join([lines[0], line, *lines[2:]])
        (tmp_path / "j").write_bytes(broken)
        with pytest.raises(RunError, match=r"j:2: this line is not an event.* head -n 1"):
            Journal(tmp_path / "j")
        assert (tmp_path / "j").read_bytes() == broken


def test_an_event_that_does_not_fit_leaves_no_trace(tmp_path):
    from tests.test_coordinator import no_file_above

    written(tmp_path / "j", 3)
    before = (tmp_path / "j").read_bytes()
    with no_file_above(len(before) + 20), pytest.raises(RunError, match="j: File too large"):
        written(tmp_path / "j", 1)
    assert (tmp_path / "j").read_bytes() == before


def test_xarray_opens_the_atlas_where_nothing_of_ours_is(done):
    code = """if True:
        import sys, xarray
        atlas = xarray.open_zarr(sys.argv[1]).load()
        trials = xarray.open_zarr(sys.argv[1], group="trials").load()
        cell = xarray.open_zarr(sys.argv[1], group="cells/haadf_tilts=9,chem_tilts=3").load()
        assert not {"sweeps", "engine", "launch"} & set(sys.modules)
        best = atlas.objective.sel(haadf_tilts=9, chem_tilts=3).item()
        print(best, atlas.nrmse_element.sel(element="O").shape)
        print(trials.status.values.tolist().count("ok"), cell.volume.dims, cell.volume.shape)"""
    alone = [sys.executable, "-I", "-W", "error", "-c", code, done.atlas]
    told = subprocess.check_output(alone, cwd="/", text=True)
    best = json.loads(done.summary.read_text())["cells"]["haadf_tilts=9,chem_tilts=3"]["objective"]
    assert told == f"{best} (2, 2)\n18 ('element', 'z', 'y', 'x') (2, 4, 5, 6)\n"


def test_the_atlas_says_what_the_journal_says(done):
    data = xarray.open_zarr(done.atlas, chunks=None)
    for cell in grid.cells(sweep(4)):
        results = {e["trial"]: e for e in events(done.path, "result") if e["cell"] == cell.id}
        params = {e["trial"]: e["params"] for e in events(done.path, "ask") if e["cell"] == cell.id}
        conventional = cell.coordinates["haadf_tilts"] == 0
        best = min((r for r in results.values() if r["objective"] != 2.0), key=lambda r: r["objective"])
        here = data.sel(cell.coordinates)
        assert here.objective == here.nrmse == best["objective"]
        assert here.metric_ssim == best["metrics"]["ssim"]
        assert here.metric_scale_error.sel(element="O") == 0.1
        assert here.nrmse_element.values.tolist() == [best["objective"], 2 * best["objective"]]
        assert here.best_lambda_tv == params[best["trial"]]["solver.lambda_tv"]
        assert np.isnan(here.best_lambda_model) == conventional
        assert here.trials_done == (5 if conventional else 4) and here.failed == 0
        assert bool(np.isclose(here.baseline_ml, 2.0)) == conventional
        assert json.loads(done.summary.read_text())["cells"][cell.id]["objective"] == best["objective"]
    assert data.attrs["name"] == "small" and data.attrs["system"] == "fused3d"
    told = {"objective": "nrmse", "direction": "minimise", "units": "1"}
    assert data.objective.attrs.items() >= told.items()
    assert all("long_name" in data[name].attrs for name in data.variables)
    assert data.chem_tilts.attrs["units"] == "maps" and data.seconds.attrs["units"] == "s"


def test_the_table_of_trials_has_a_row_for_each(done):
    rows = xarray.open_zarr(done.atlas, group="trials", chunks=None)
    rows = rows.drop_dims(["element", "checkpoint"]).to_dataframe()
    assert (rows.groupby("cell").trial.count() == rows.groupby("cell").trial.max() + 1).all()
    for event in events(done.path, "ask"):
        if event["kind"] == "search":
            row = rows[(rows.cell == event["cell"]) & (rows.trial == event["trial"])].iloc[0]
            assert row.lambda_tv == event["params"]["solver.lambda_tv"]
            assert row.method == ("fused" if row.haadf_tilts else "chem_tv")
    ml = rows[rows.kind == "baseline"]
    assert set(ml.method) == {"ml"}
    assert all(json.loads(text)["solver.iterations"] == 100 for text in ml.changes)


def test_the_atlas_follows_from_the_journal_alone(done, tmp_path):
    before, volumes = figures(done.path), list(done.volumes.iterdir())
    best = {path.name: path.read_text() for path in done.best.iterdir()}
    summary = done.summary.read_text()
    for path in [*done.best.iterdir(), done.summary]:
        path.unlink()
    (done.volumes / "torn-9-0.zarr").mkdir()
    (done.path / "atlas.zarr.partial").mkdir()
    (done.path / "summary.json.partial").write_text("{")
    states = [done.path / "partial" / f"haadf_tilts=9,chem_tilts=3-{numbers}.npz" for numbers in ("0", "0-1", "0-999")]
    states[0].parent.mkdir(exist_ok=True)
    for path in states:
        path.touch()
    zarr.open_group(done.atlas, mode="w")
    atlas.rebuild(done)
    assert figures(done.path) == before and done.summary.read_text() == summary
    assert {path.name: path.read_text() for path in done.best.iterdir()} == best
    assert sorted(done.volumes.iterdir()) == sorted(volumes) and not list(done.path.glob("*.partial"))
    assert [path.exists() for path in states] == [False, False, True]  # trial 999 may go on from there
    assert zarr.open_group(done.atlas)["cells/haadf_tilts=9,chem_tilts=3/volume"].shape == (2, 4, 5, 6)


def test_an_atlas_that_grew_equals_one_made_at_once(tmp_path):
    chosen = sweep(3, record=[5, 10])
    coordinate(tmp_path / "r", chosen, "with_volume")
    folder, cells = RunFolder(tmp_path / "r"), grid.cells(chosen)
    log, history = journal.read(folder.journal)[0], History()
    grown = atlas.Atlas(folder, chosen, cells, history)
    grown.rebuild()
    for event in log:
        history.apply(event)
        if event["event"] == "result":
            grown.update({event["cell"]})
    growing = figures(folder.path)
    atlas.rebuild(folder)
    assert figures(folder.path) == growing


def test_winners_are_published_with_the_voxel_size_and_share_their_chunks(done):
    for cell in grid.cells(sweep(4)):
        winner = json.loads(done.summary.read_text())["cells"][cell.id]["trial"]
        group = zarr.open_group(done.atlas / "cells" / cell.id, mode="r")
        assert (group["volume"][:] == 1 + winner).all() and group.attrs["elements"] == ["Co", "O"]
        scales = group.attrs["ome"]["multiscales"][0]
        assert [axis["name"] for axis in scales["axes"]] == list(group["volume"].metadata.dimension_names)
        assert scales["axes"][1]["unit"] == "nanometer" and scales["datasets"][0]["path"] == "volume"
        assert scales["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0, 2.5, 2.5, 2.5]
        assert (done.atlas / "cells" / cell.id / "volume/c/0/0/0/0").stat().st_nlink == 2


@pytest.mark.parametrize("save, kept, published", [("none", 0, 0), ("best", 4, 4), ("all", 18, 4)])
def test_volumes_are_kept_as_asked(save, kept, published, done, tmp_path):
    folder = done
    if save != "best":
        folder = RunFolder(tmp_path / "r")
        coordinate(folder.path, sweep(4, save=save), "with_volume")
    assert len(list(folder.volumes.iterdir())) == kept
    assert len(list(folder.atlas.glob("cells/*/volume"))) == published


def test_the_winner_is_frozen_to_a_yaml_that_repeats_it(done, tmp_path):
    for cell in grid.cells(sweep(4)):
        entry = json.loads(done.summary.read_text())["cells"][cell.id]
        frozen = settings.load(done.best / f"{cell.id}.yaml")
        assert settings.get(frozen, "solver.lambda_tv") == entry["best"]["solver.lambda_tv"]
        assert [only.space for only in grid.cells(frozen)] == [{}] and frozen.name != "small"
    summary = coordinate(tmp_path / "again", frozen, count=1)
    assert summary.figures["best_objective"] == entry["objective"]


def test_a_sweep_without_an_axis_or_a_tunable_is_an_atlas_too(tmp_path):
    coordinate(tmp_path / "r", sweep(3, axes={}, lambda_model=1.0, lambda_tv=0.1), count=1)
    data = xarray.open_zarr(tmp_path / "r/atlas.zarr", chunks=None)
    assert data.objective.dims == () and 0 < data.objective < 1
    assert data.trials_done == 1 and [path.name for path in (tmp_path / "r/best").iterdir()] == ["all.yaml"]


def test_axes_of_words_and_lists_have_labels(tmp_path):
    axes = {"tilt_range": [[-70, 70], [-60, 60]], "method": ["fused", "chem_tv"], "data.snr.haadf": [50, 2e3]}
    coordinate(tmp_path / "r", sweep(3, axes=axes))
    data = xarray.open_zarr(tmp_path / "r/atlas.zarr", chunks=None)
    assert data.objective.sel({"tilt_range": "[-60, 60]", "method": "chem_tv", "data.snr.haadf": 50}) > 0
    assert data.tilt_range.attrs["units"] == "degrees"
    rows = xarray.open_zarr(tmp_path / "r/atlas.zarr", group="trials", chunks=None)
    assert set(rows.tilt_range.values) == {"[-70, 70]", "[-60, 60]"}
    assert xarray.open_datatree(tmp_path / "r/atlas.zarr", engine="zarr")["trials"].sizes["row"] == 24


def test_checkpoints_are_an_axis_of_the_atlas_and_columns_of_the_table(tmp_path):
    coordinate(tmp_path / "r", sweep(4, axes={"chem_tilts": [3, 5]}, record=[2, 5]))
    data = xarray.open_zarr(tmp_path / "r/atlas.zarr", chunks=None)
    assert data.objective.dims == ("chem_tilts", "iterations")
    assert data.iterations.values.tolist() == [2, 5, 10]
    last = data.objective.sel(iterations=10)
    assert np.allclose(data.objective.sel(iterations=2), last + 0.4)
    assert np.allclose(data.objective.sel(iterations=5), last + 0.1)
    assert data.best_lambda_tv.dims == data.objective.dims and data.trials_done.dims == ("chem_tilts",)
    rows = xarray.open_zarr(tmp_path / "r/atlas.zarr", group="trials", chunks=None)
    assert np.allclose(rows.checkpoint_objective.sel(checkpoint=5), rows.objective + 0.1)


def test_cells_without_a_good_trial_are_gaps(tmp_path):
    chosen = sweep(3, axes={"chem_tilts": [3, 5]})
    history = History()
    for trial in range(3):
        place = {"cell": "chem_tilts=3", "trial": trial, "attempt": 0}
        history.apply({"event": "ask", **place, "kind": "search", "params": {"solver.lambda_tv": 1.0}})
        history.apply({**EMPTY, "event": "result", **place, "status": "the cost is not finite"})
    made = arrays.atlas(chosen, grid.cells(chosen), history)
    assert np.isnan(made["objective"].values).all() and made["failed"].values.tolist() == [3, 0]
    rows = arrays.trials(chosen, grid.cells(chosen), history)
    assert rows["status"].values.tolist() == ["the cost is not finite"] * 3 + [""] * 3
    assert rows["attempt"].values.tolist() == [0] * 3 + [-1] * 3
    summary = atlas.summarise(chosen, grid.cells(chosen), history)
    assert summary["best_cell"] is None and summary["failed"] == 3


def test_the_folder_tells_where_its_numbers_come_from(done, tmp_path):
    lock = json.loads(done.lock.read_text())
    assert settings.load(lock["settings"]) == sweep(4)
    assert lock["versions"].keys() >= {"tomoatlas", "python", "jax", "numpy", "scikit-optimize", "zarr"}
    given = {"name": "mine", "data": {"phantom": "cocuo"}, "solver": {"lambda_tv": WEIGHT}}
    (tmp_path / "mine.yaml").write_text("# why I did this\n" + yaml.safe_dump(given))
    for changes, as_given in ([], True), (["data.size=16"], False):
        folder = RunFolder(tmp_path / f"run-{as_given}")
        with folder.open(settings.load(tmp_path / "mine.yaml", changes)):
            pass
        assert folder.sweep.read_text().startswith("# why") == as_given
        assert settings.load(folder.sweep) == folder.settings()


def test_a_damaged_lock_is_a_sentence(done, tmp_path):
    folder = RunFolder(tmp_path / "r")
    with folder.open(sweep(4)):
        pass
    folder.lock.write_text("{}")
    with pytest.raises(RunError, match="lock.json: does not tell the settings of this run"):
        coordinate(folder.path, sweep(4))
