"""One trial: settings in, a row out; the data depend on what they should depend on, and on nothing else."""

import json
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import zarr

from engine import estimate, fused2d, fused3d, heldout, iterate, metrics
from engine.data import Solution
from sweeps import needs, specimens, stages, trial
from sweeps.schema import Fused3D
from sweeps.settings import dump, load

KEYS = {"cell", "trial", "attempt", "status", "objective", "metrics", "elements", "checkpoints", "iterations",
        "seconds", "batch", "worker", "volume", "notes"}
ELEMENTS = ("Co", "Cu", "O", "Au")


def settings(**changes):
    """A sweep without a grid and with nothing to search, at the size of the fixture `tiny`."""
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    data = {"phantom": "cocuo", "size": 16, "haadf_tilts": 9, "chem_tilts": 5}
    solver = {"iterations": 10, "lambda_model": 1.0, "lambda_tv": 0.3}
    return load({"name": "t", "data": data, "solver": solver, "output": {"save": "all"}}, overrides)


def message(folder, *sweeps, number=0, attempt=0):
    """A batch of trials, numbered from `number`."""
    asked = {"attempt": attempt, "kind": "search", "params": {}}
    return {"cell": "all", "folder": str(folder), "trials": [
        {"trial": number + k, **asked, "settings": dump(sweep)} for k, sweep in enumerate(sweeps or [settings()])]}


def run(sent):
    """The row of a message of one trial."""
    row, = trial.run(sent)
    return row


def evaluate(folder, number=0, **changes):
    """The row of a trial, after the journey through JSON that messages and rows make."""
    result = run(json.loads(json.dumps(message(folder, settings(**changes), number=number))))
    return json.loads(json.dumps(result))


@pytest.fixture(autouse=True)
def nothing_in_memory(monkeypatch):
    """Each test reads its data anew, as a fresh worker does."""
    monkeypatch.setattr(specimens, "_kept", {})


def maps(folder, **changes):
    """(maps, images) that a trial reconstructs."""
    data = trial.prepared(settings(**changes), folder)
    return data.chem.projections, data.haadf.projections


def test_row_of_a_trial(tmp_path):
    row = evaluate(tmp_path, number=7)
    assert set(row) == KEYS
    assert (row["cell"], row["trial"], row["attempt"], row["status"]) == ("all", 7, 0, "ok")
    assert row["iterations"] == 10 and row["seconds"] > 0
    assert row["checkpoints"] == []
    assert 0 < row["objective"] < 1.3 and row["metrics"]["nrmse"] == row["objective"]
    assert set(row["elements"]["nrmse"]) == set(row["elements"]["scale_error"]) == set(ELEMENTS)
    assert row["objective"] == pytest.approx(np.mean(list(row["elements"]["nrmse"].values())))


def test_volume_is_written_and_is_the_one_that_was_scored(tmp_path):
    row = evaluate(tmp_path)
    group = zarr.open_group(tmp_path / row["volume"], mode="r")
    assert group.metadata.zarr_format == 3
    volume = group["volume"][:]
    assert volume.shape == (4, 16, 16, 16) and volume.dtype == np.float32
    truth = stages.truth(tmp_path, settings().data)
    assert metrics.nrmse_elements(volume, truth).mean() == pytest.approx(row["objective"])
    assert group.attrs["elements"] == list(ELEMENTS) and group.attrs["voxel_nm"] == 150 / 16
    assert group.attrs["status"] == "finished 10 iterations"
    for term in ("model", "chem", "tv", "total"):
        assert group[f"history_{term}"].shape == (11,)


def test_nothing_is_written_where_nothing_is_kept(tmp_path):
    assert evaluate(tmp_path, output__save="none")["volume"] is None
    assert not list(tmp_path.glob("volumes/*"))


def test_volumes_of_trials_do_not_collide(tmp_path):
    names = {run(message(tmp_path, number=number, attempt=attempt))["volume"]
             for number in (0, 1) for attempt in (0, 1)}
    assert len(names) == 4 and all((tmp_path / name).is_dir() for name in names)


def test_the_same_message_gives_the_same_row(tmp_path):
    """In one folder, in another, and after the data were read back from stages/."""
    rows = [evaluate(folder) for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b")]
    for row in rows[1:]:
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in rows[0].items() if k != "seconds"}


def test_noise_depends_on_the_data_and_on_nothing_else(tmp_path):
    first = maps(tmp_path)
    same = [{"solver__lambda_model": 5}, {"solver__method": "chem_tv"}, {"solver__iterations": 3},
            {"search__trials": 3}, {"output__save": "none"}, {"name": "other"}]
    for changes in same:
        np.testing.assert_array_equal(maps(tmp_path, **changes)[0], first[0])
        np.testing.assert_array_equal(maps(tmp_path, **changes)[1], first[1])
    for changes in ({"data__replicate": 1}, {"seed": 1}):
        for before, after in zip(first, maps(tmp_path, **changes), strict=True):
            assert (before != after).mean() > 0.2


def test_searching_gamma_does_not_simulate_anew(tmp_path):
    first = maps(tmp_path, data__gamma=1.6)
    again = maps(tmp_path, data__gamma=1.6, solver__gamma=1.3)
    for before, after in zip(first, again, strict=True):
        np.testing.assert_array_equal(before, after)
    assert (maps(tmp_path, solver__gamma=1.3)[1] != first[1]).mean() > 0.5


def test_snr_of_chem_scales_the_counts_of_all_elements(tmp_path):
    snr = "{Co: 1.9, Cu: 2.9, O: 2.7, Au: 2.0, haadf: 2000, chem: %d}"
    once, four_times = (maps(tmp_path, data__snr=snr % factor)[0].mean((1, 2, 3)) for factor in (1, 4))
    np.testing.assert_allclose(four_times / once, 4, rtol=0.1)


def test_data_are_kept_in_stages_and_a_torn_file_is_made_again(tmp_path):
    first = maps(tmp_path)
    kept = sorted(tmp_path.glob("stages/simulate-*.npz"))
    assert len(kept) == 1 and len(list(tmp_path.glob("stages/truth-*.npz"))) == 1
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    specimens._kept.clear()
    again = maps(tmp_path)
    np.testing.assert_array_equal(first[0], again[0])
    assert not list(tmp_path.glob("stages/*.partial"))


def test_checkpoints_are_scored(tmp_path):
    row = evaluate(tmp_path, solver__record=[2, 5, 10])
    assert [stop["iterations"] for stop in row["checkpoints"]] == [2, 5, 10]
    assert row["checkpoints"][-1]["objective"] == row["objective"]
    assert row["checkpoints"][-1]["elements"] == row["elements"]
    assert row["checkpoints"][0]["objective"] == evaluate(tmp_path, solver__iterations=2)["objective"]


def test_ml_is_scored_at_its_best_iteration(tmp_path):
    row = evaluate(tmp_path, solver__method="ml", solver__iterations=30, solver__record=list(range(1, 31)))
    objectives = [stop["objective"] for stop in row["checkpoints"]]
    assert row["objective"] == min(objectives) < objectives[-1]
    assert row["metrics"]["best_iteration"] == 1 + int(np.argmin(objectives))
    volume = zarr.open_group(tmp_path / row["volume"], mode="r")["volume"][:]
    truth = stages.truth(tmp_path, settings().data)
    assert metrics.nrmse_elements(volume, truth).mean() == pytest.approx(row["objective"], rel=1e-5)


@pytest.mark.parametrize("method", ["fused", "ml"])
def test_heldout_reports_its_folds(tmp_path, method):
    row = evaluate(tmp_path, search__objective="heldout", search__folds=5, solver__method=method,
                   solver__record=[5, 10])
    folds = [row["metrics"][f"heldout_fold_{k}"] for k in range(5)]
    if method == "fused":
        assert row["objective"] == row["checkpoints"][-1]["objective"]
    assert row["status"] == "ok" and row["objective"] == row["metrics"]["heldout"] == pytest.approx(np.mean(folds))
    assert row["metrics"]["heldout_se"] == pytest.approx(np.std(folds, ddof=1) / np.sqrt(5))
    # The truth is known too, and told, but not minimised. Unseen maps at one count per pixel: above 1, yet not far.
    assert row["metrics"]["nrmse"] != row["objective"] and 0.9 < row["objective"] < 3
    assert [stop["iterations"] for stop in row["checkpoints"]] == [5, 10]


def test_heldout_counts_are_a_share_of_all_tilts(tmp_path):
    """More folds than tilts can be had; the parts are the counts, drawn once."""
    row = evaluate(tmp_path, search__objective="heldout", search__heldout="counts", search__folds=7)
    folds = [row["metrics"][f"heldout_fold_{k}"] for k in range(7)]
    assert row["status"] == "ok" and row["objective"] == pytest.approx(np.mean(folds))
    assert row["objective"] == evaluate(tmp_path, search__objective="heldout", search__heldout="counts",
                                        search__folds=7)["objective"]
    # A seventh of few counts: single ones, of which the deviance of a right expectation is below 1.
    assert 0.3 < row["objective"] < 1


def test_a_score_does_not_know_the_scale_that_weights_have_given_a_volume(tiny):
    """Neither the folds over tilts nor those over counts; a volume of another form is worse."""
    out = (0, 4)
    training, test = heldout.thinned(tiny, 4, 0)[0]
    told = Solution(tiny.truth, {}, "", metrics={f"sensitivity_{e}": 0.75 * s for e, s in zip(
        tiny.chem.elements, tiny.sensitivity)})
    whole = replace(told, metrics={name: value / 0.75 for name, value in told.metrics.items()})
    for fold, solution in ((trial._Fold("", tiny, tiny, out), whole),
                           (trial._Fold("", training, test, tuple(range(5)), 0.75, 1 / 3), told)):
        scales = np.array([0.5, 2.0, 0.7, 1.2], np.float32)[:, None, None, None]
        right = fold.score(tiny.truth, solution)
        assert fold.score(scales * tiny.truth, solution) == pytest.approx(right, rel=1e-4)
        assert fold.score(np.roll(tiny.truth, 3, 2), solution) > 1.02 * right


def test_heldout_prefers_the_truth_to_noise(tmp_path, tiny):
    def at(volume):
        return trial.deviance(tiny, volume, tiny.sensitivity, (1, 3))

    assert at(tiny.truth) < at(0 * tiny.truth) and at(tiny.truth) < at(np.roll(tiny.truth, 4, 1))
    assert at(tiny.truth) < at(1.5 * tiny.truth)


# ---- Measured data


@pytest.fixture
def measured(tmp_path, tiny):
    """A message about the maps and images of `tiny` in a file, without and with a truth."""
    np.savez(tmp_path / "series.npz", maps=tiny.chem.projections - tiny.chem.background,
             images=tiny.haadf.projections[0], truth=tiny.truth, map_angles=tiny.chem.angles,
             image_angles=tiny.haadf.angles)

    def make(path="series.npz", **changes):
        data = {
            "root": str(tmp_path), "pixel_size": 150 / 16, "crop": None,
            "chem": {"path": path, "key": "maps", "axes": ["element", "tilt", "y", "x"], "angles": "key:map_angles",
                     "units": "net_counts",
                     "elements": dict(zip(ELEMENTS, tiny.numbers, strict=True))},
            "haadf": {"path": path, "key": "images", "axes": ["tilt", "y", "x"], "angles": "key:image_angles"}}
        sweep = {"name": "t", "data": data | changes, "solver": {"iterations": 10}, "output": {"save": "all"},
                 "search": {"objective": "nrmse" if "truth" in changes else "heldout", "folds": 5}}
        return message(tmp_path, load(sweep))

    return make


def test_measured_data_are_scored_by_heldout_maps(measured):
    row = run(measured())
    assert row["status"] == "ok" and np.isfinite(row["objective"]) and row["elements"] == {}
    assert "nrmse" not in row["metrics"]


def test_measured_data_with_a_truth_are_scored_against_it(measured, tiny):
    truth = {"path": "series.npz", "key": "truth", "axes": ["element", "z", "y", "x"]}
    known = dict(zip(ELEMENTS, map(float, tiny.sensitivity), strict=True))
    row = run(measured(truth=truth, sensitivity=known))
    assert row["status"] == "ok" and 0 < row["objective"] < 1.2
    assert set(row["elements"]["nrmse"]) == set(ELEMENTS)


def test_data_that_cannot_be_read_give_a_status(measured):
    row = run(measured(path="missing.npz"))
    assert row["objective"] is None and row["volume"] is None and row["seconds"] > 0
    assert "missing.npz" in row["status"]


def failing(monkeypatch, which):
    """One member of every batch fails."""
    solved = fused3d.reconstruct_batch

    def fails(*args, **kwargs):
        solutions = solved(*args, **kwargs)
        object.__setattr__(solutions[which], "ok", False)
        object.__setattr__(solutions[which], "status", "stopped at iteration 3: the cost is not finite")
        return solutions

    monkeypatch.setattr(fused3d, "reconstruct_batch", fails)


def test_a_solve_that_fails_gives_a_status(tmp_path, monkeypatch):
    failing(monkeypatch, 0)
    row = run(message(tmp_path))
    assert row["status"] == "stopped at iteration 3: the cost is not finite"
    assert row["objective"] is None and row["volume"] is None


@pytest.mark.parametrize("trials", [1, 3])
def test_trials_that_do_not_fit_are_refused_with_the_arithmetic(tmp_path, monkeypatch, trials):
    """A limit just above what the trials of a batch need lets them pass, one just below refuses them all."""
    sweeps = [settings(solver__lambda_tv=0.1 * (k + 1), solver__iterations=2) for k in range(trials)]
    need = sum(estimate.solve(system="fused3d", method="fused", elements=4, shape=(16, 16, 16), haadf_tilts=9,
                              chem_tilts=5, iterations=2, inner=4).bytes.values())
    for limit, passes in ((trials * need, True), (trials * need - 1, False)):
        monkeypatch.setattr(needs, "_memory_free", lambda limit=limit: limit)
        rows = trial.run(message(tmp_path, *sweeps))
        assert [row["status"] == "ok" for row in rows] == [passes] * trials
    many = "3 trials at once need 3 times " if trials == 3 else "the trial needs "
    assert rows[0]["status"].startswith(f"{many}{estimate.size(need)} (")
    assert "working memory of a step" in rows[0]["status"] and "lower data.size or search.batch" in rows[0]["status"]


def test_a_solve_that_was_cut_off_goes_on_in_the_next_attempt(tmp_path, monkeypatch):
    """The worker dies at the first state it leaves; the trial then ends with fewer iterations to do."""
    monkeypatch.setattr(trial, "Keep", partial(iterate.Keep, seconds=0.0))
    saved = iterate._save

    def dies(*args):
        saved(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(iterate, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        run(message(tmp_path))
    assert len(list((tmp_path / "partial").glob("*.npz"))) == 1
    monkeypatch.setattr(iterate, "_save", saved)
    row, alone = run(message(tmp_path)), run(message(tmp_path / "alone"))
    assert row["objective"] == pytest.approx(alone["objective"], rel=1e-5)
    assert not list((tmp_path / "partial").iterdir())


# ---- Batches


def test_a_batch_gives_the_rows_that_its_trials_give_alone(tmp_path):
    chosen = [settings(solver__lambda_tv=tv) for tv in (0.1, 0.3, 1.0)]
    together = trial.run(message(tmp_path, *chosen))
    for k, (row, sweep) in enumerate(zip(together, chosen, strict=True)):
        alone = run(message(tmp_path / "alone", sweep, number=k))
        assert (row["trial"], row["batch"], alone["batch"], row["status"]) == (k, 3, 1, "ok")
        assert row["objective"] == pytest.approx(alone["objective"], rel=1e-4)
        volumes = [zarr.open_group(folder / each["volume"], mode="r")["volume"][:]
                   for folder, each in ((tmp_path, row), (tmp_path / "alone", alone))]
        np.testing.assert_allclose(*volumes, atol=1e-3)
    assert len({row["objective"] for row in together}) == 3


def test_only_trials_that_differ_in_traced_numbers_are_solved_together(tmp_path):
    chosen = [settings(), settings(solver__lambda_tv=1.0), settings(solver__inner=2), settings(solver__gamma=1.4),
              settings(solver__iterations=5)]
    assert [row["batch"] for row in trial.run(message(tmp_path, *chosen))] == [2, 2, 1, 1, 1]
    known = [settings(data__gamma=1.6), settings(data__gamma=1.6, solver__gamma=1.4)]
    assert [row["batch"] for row in trial.run(message(tmp_path, *known))] == [2, 2]


@pytest.mark.parametrize("objective", ["nrmse", "heldout"])
def test_a_solve_that_fails_does_not_fail_its_batch(objective, tmp_path, monkeypatch):
    failing(monkeypatch, 1)
    rows = trial.run(message(tmp_path, *(settings(solver__lambda_tv=tv, search__objective=objective)
                                         for tv in (0.1, 0.3, 1.0))))
    assert [row["status"] == "ok" for row in rows] == [True, False, True]
    assert "the cost is not finite" in rows[1]["status"]
    assert rows[1]["objective"] is None and rows[1]["volume"] is None
    assert all(np.isfinite(rows[k]["objective"]) and rows[k]["volume"] for k in (0, 2))


def test_settings_that_are_wrong_do_not_fail_their_batch(tmp_path):
    sent = message(tmp_path, settings(), settings(solver__lambda_tv=1.0))
    sent["trials"][0]["settings"]["solver"]["lambda_tv"] = -1.0
    first, second = trial.run(sent)
    assert "must be above 0" in first["status"] and second["status"] == "ok"


# ---- Names


def test_settings_of_the_solver_are_those_of_the_yaml():
    yaml, engine = Fused3D().model_dump(), {field.name: field.default for field in fields(fused3d.Settings)}
    assert set(yaml) - set(engine) == {"record", "missing", "guide"}
    assert {name: yaml[name] for name in engine} == engine
    assert trial.solver_settings(settings()) == fused3d.Settings(iterations=10, lambda_tv=0.3)
    assert trial.solver_settings(flat(solver__missing="[83]")) == fused2d.Settings(
        weights="z_gamma_linear", lambda_tv=0.3, tolerance=1e-5, missing=[83])


# ---- 2D microscopy


def flat(**changes):
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    data = {"phantom": "coscoo", "size": 32, "snr": {"Co": 5, "S": 5, "O": 5, "haadf": 100, "chem": 1}}
    return load({"name": "t", "system": "fused2d", "data": data,
                 "solver": {"weights": "z_gamma_linear", "lambda_tv": 0.3}, "output": {"save": "all"}}, overrides)


def test_a_map_is_scored_and_written_with_its_errors(tmp_path):
    row = run(message(tmp_path, flat()))
    assert row["status"] == "ok" and row["objective"] == row["metrics"]["nrmse"] < 0.5
    assert {"share_rmse", "average_standard_error", "average_relative_error"} <= row["metrics"].keys()
    assert row["metrics"]["average_relative_error"] == pytest.approx(row["metrics"]["share_rmse"], rel=0.3)
    kept = zarr.open_group(tmp_path / row["volume"], mode="r")
    assert kept["volume"].shape == kept["field_standard_error"].shape == (3, 1, 32, 32)


def test_maps_have_the_noise_of_their_own_cell(tmp_path):
    """The same for every weight and way of solving, another for another SNR; counts of the SNR asked for."""
    def seen(**changes):
        return trial.prepared(flat(**changes), tmp_path)

    first, heavier = seen(), seen(solver__lambda_tv=3.0, solver__weights="z_gamma")
    np.testing.assert_array_equal(first.chem.projections, heavier.chem.projections)
    np.testing.assert_array_equal(first.haadf.projections, heavier.haadf.projections)
    louder = seen(data__snr__chem=10.0)
    np.testing.assert_allclose(louder.chem.projections.mean((1, 2, 3)), 40, rtol=0.05)
    assert first.shape == (1, 32, 32) and not first.chem.angles.any() and first.haadf.units == "counts"


def test_a_batch_of_maps_is_what_its_members_are_alone(tmp_path):
    sweeps = [flat(solver__lambda_tv=weight) for weight in (0.1, 1.0)]
    rows = trial.run(message(tmp_path, *sweeps))
    assert [row["batch"] for row in rows] == [2, 2]
    for row, sweep in zip(rows, sweeps, strict=True):
        assert run(message(tmp_path, sweep))["objective"] == pytest.approx(row["objective"], rel=1e-6)


def test_standard_errors_are_stored_beside_the_volume_and_told(tmp_path):
    row = evaluate(tmp_path, solver__errors="sandwich", solver__error_probes=2)
    group = zarr.open_group(tmp_path / row["volume"], mode="r")
    error = group["field_standard_error"]
    assert error.shape == group["volume"].shape and error.metadata.dimension_names == ("element", "z", "y", "x")
    assert np.nanmin(error[:]) > 0 and row["metrics"]["average_standard_error"] > 0
    assert {"average_relative_error", "error_residual"} <= row["metrics"].keys()
