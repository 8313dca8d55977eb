"""system: hebt from its YAML to rows, tables and figures; fractions of any system's volumes; what is refused."""

import json

import matplotlib.image
import numpy as np
import pytest
import xarray
import zarr

from engine import hebt, metrics, phantoms_hebt, physics, simulate
from sweeps import bimodal, coordinator, fractions, grid, report, settings, stages, tables, trial
from sweeps.atlas import RunFolder
from sweeps.schema import Fractions
from sweeps.settings import SettingsError
from tests.specimens import distance, with_maps
from tests.test_flat import Solving

NAMES = ("Ag", "Au")
PLAIN = {"name": "particle", "system": "hebt", "data": {"phantom": "agau", "size": 24, "planes": 2},
         "solver": {"form": "paper", "iterations": 20}, "output": {"fractions": {"by": "atoms"}}}
STOPS = [2, 5, 10, 20]


def sweep(**changes):
    """PLAIN with dotted settings changed: solver__alpha=0.5."""
    return settings.replace(settings.load(PLAIN), {name.replace("__", "."): value for name, value in changes.items()})


def made(folder, given):
    coordinator.run(given, grid.cells(given), Solving(), RunFolder(folder))
    return folder


def solved(folder, given):
    """The row of one trial."""
    asked = {"trial": 0, "attempt": 0, "kind": "search", "params": {}, "settings": settings.dump(given)}
    row, = trial.run({"cell": "all", "folder": str(folder), "trials": [asked]})
    assert row["status"] == "ok", row
    return row


def volumes(folder, row):
    group = zarr.open_group(folder / row["volume"], mode="r")
    return {name: group[name][:] for name in group.array_keys()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep over dose and alpha."""
    given = {"data.dose": [3e7, 3e8], "solver.alpha": [0, 0.5, 0.8]}
    return made(tmp_path_factory.mktemp("runs") / "alpha", sweep(grid=given, solver__record=STOPS))


# ---- Data


def test_the_particle_is_measured_in_counts_of_its_dose(tmp_path):
    """Concentrations times sensitivity are the counts; ten times the dose, solid angle or efficiency, as many more."""
    data = trial.prepared(sweep(), tmp_path)
    lines = physics.emissions(NAMES, phantoms_hebt.BEAM_KEV, phantoms_hebt.LINES)
    weight = np.array([line.weight for line in lines])
    dense = phantoms_hebt.phantom(24, 2)
    assert data.truth * weight[:, None, None, None] == pytest.approx(dense, rel=1e-5)
    clean = simulate.clean_projections(data.truth, data.chem.angles, 24) * data.sensitivity[:, None, None, None]
    assert data.chem.projections.sum() == pytest.approx(clean.sum(), rel=0.02)
    for name, value, factor in (("dose", 3.121e8, 10), ("solid_angle", 0.04, 0.1), ("efficiency", 0.5, 0.5),
                                ("efficiency", {"Ag": 0.5, "Au": 0.25}, [0.5, 0.25])):
        other = trial.prepared(sweep(**{f"data__{name}": value}), tmp_path)
        assert other.sensitivity / data.sensitivity == pytest.approx(np.broadcast_to(factor, 2))
    assert trial.prepared(sweep(data__planes=None), tmp_path).shape == (24, 24, 24)
    assert trial.prepared(sweep(data__haadf_tilts=0), tmp_path).haadf is None


def test_the_same_specimen_serves_fused3d(tmp_path):
    given = settings.load({**PLAIN, "system": "fused3d", "solver": {
        "weights": "z_gamma_linear", "gamma": 1.33, "iterations": 15, "coarse": 0}})
    row = solved(tmp_path, given)
    assert row["objective"] < 0.5 and set(row["elements"]["weight_mse"]) == set(NAMES)
    assert set(volumes(tmp_path, row)) >= {"field_weight", "field_atomic", "field_specimen"}


# ---- Trials


def test_alpha_0_is_the_maps_alone(tmp_path):
    rows = [solved(tmp_path / str(k), sweep(**changes)) for k, changes in enumerate((
        {"solver__alpha": 0.0}, {"solver__method": "eds"}))]
    ours, theirs = (volumes(tmp_path / str(k), row)["volume"] for k, row in enumerate(rows))
    assert distance(ours, theirs) < 1e-5
    assert [grid.maps_alone(sweep(**each)) for each in (
        {"solver__alpha": 0.0}, {"solver__method": "eds"}, {})] == [True, True, False]


def test_without_images_the_maps_are_alone(tmp_path):
    cell, = grid.cells(sweep(data__haadf_tilts=0, solver__alpha={"low": 0.1, "high": 0.9}))
    assert cell.sweep.solver.method == "eds" and not cell.space and cell.fixed == ({},)
    cell, = grid.cells(sweep(solver__alpha={"low": 0.1, "high": 0.9}, solver__prefilter={"low": 0.0, "high": 2.0}))
    assert cell.space.keys() == {"solver.alpha", "solver.prefilter"}


def test_a_trial_is_kept_at_its_best_n_and_scored_there(tmp_path):
    given = sweep(data__dose=1e6, solver__record=STOPS, solver__alpha=0.0, solver__prefilter=0.0)  # noise wins soon
    row = solved(tmp_path, given)
    stops = {stop["iterations"]: stop for stop in row["checkpoints"]}
    best = min(stops, key=lambda n: stops[n]["objective"])
    assert best == row["metrics"]["best_iteration"] < 20 and row["objective"] == stops[best]["objective"]
    data = trial.prepared(given, tmp_path)
    volume = hebt.reconstruct(data, hebt.Settings(form="paper", alpha=0, prefilter=0, iterations=best)).volume
    kept = volumes(tmp_path, row)
    assert distance(kept["volume"], volume) < 1e-6
    for name, measure in (("ssim", metrics.ssim_structure), ("weight_ssim", None)):
        values = stops[best]["elements"][name]
        assert row["elements"][name] == values
        if measure:
            assert [values[e] for e in NAMES] == pytest.approx(
                [measure(a, b) for a, b in zip(volume, data.truth)], abs=1e-6)
    assert row["elements"]["nrmse"]["Ag"] == pytest.approx(np.sqrt(2 - 2 * row["elements"]["ssim"]["Ag"]), abs=1e-4)


def test_the_images_alone_are_kept_for_reference(tmp_path):
    given = sweep(output__haadf=30)
    kept = volumes(tmp_path, solved(tmp_path, given))
    data = trial.prepared(given, tmp_path)
    shown = np.tensordot([line.elastic for line in physics.emissions(NAMES, 100.0, phantoms_hebt.LINES)], data.truth, 1)
    assert kept["field_haadf"].shape == data.shape
    assert metrics.correlation(kept["field_haadf"], shown) > metrics.correlation(kept["volume"].sum(0), shown) > 0.9


def test_given_ratios_go_to_the_elements_they_are_named_for(tmp_path):
    given = sweep(solver__responses={"Au": 3.0, "Ag": 2.0})
    assert trial.solver_settings(given).responses == (2.0, 3.0)


def test_a_batch_over_alpha_is_its_trials_one_by_one(tmp_path):
    given = [sweep(solver__alpha=alpha, solver__differences=rate, solver__form="preconditioned", solver__iterations=8)
             for alpha, rate in ((0.5, 0.1), (0.9, 0.4))]
    asked = [{"trial": k, "attempt": 0, "kind": "search", "params": {}, "settings": settings.dump(each)}
             for k, each in enumerate(given)]
    rows = trial.run({"cell": "all", "folder": str(tmp_path), "trials": asked})
    assert [row["batch"] for row in rows] == [2, 2]
    assert [row["objective"] for row in rows] == pytest.approx(
        [solved(tmp_path / "alone", each)["objective"] for each in given], rel=1e-5)


def test_held_out_maps_are_predicted_where_the_holder_hides_the_detector(tmp_path):
    """What the solver multiplied the maps by is undone: the truth predicts them as well as without a holder."""
    data = trial.prepared(sweep(), tmp_path)
    hidden = np.linspace(0.4, 1, 31)[None].repeat(2, 0)
    clean = simulate.clean_projections(data.truth, data.chem.angles, 24) * data.sensitivity[:, None, None, None]
    shadowed = with_maps(data, projections=clean * hidden[..., None, None] + 0.5, background=0.5)
    known = (data.truth, data.sensitivity, tuple(range(31)))
    assert trial.deviance(shadowed, *known, 1 / hidden) < 1e-6 < 1 < trial.deviance(shadowed, *known)


def test_held_out_maps_find_alpha_without_a_truth(tmp_path):
    row = solved(tmp_path, sweep(search__objective="heldout", solver__tilts="haadf", solver__record=STOPS))
    assert 0 < row["objective"] < 3 and row["metrics"]["nrmse"] < 1
    assert row["objective"] == row["metrics"]["heldout"]


# ---- Notes


@pytest.fixture
def lacking(tmp_path):
    """Measured data of three elements, of which the heaviest scatters and is not among those that are named."""
    data = trial.prepared(sweep(data__size=16), tmp_path / "phantom")
    weld = np.random.default_rng(0).poisson(30.0 * (np.arange(16) < 4)[:, None] * np.ones((31, 16, 2)))
    counts = np.concatenate([data.chem.projections, weld[None]])
    images = data.haadf.projections[0] + 3000 * weld
    np.savez(tmp_path / "series.npz", images=images, counts=counts, names=np.array(["Ag", "Au", "Pt"]),
             angles=data.chem.angles)
    here = {"path": "series.npz", "angles": "key:angles"}
    return {"root": str(tmp_path), "pixel_size": 1.0, "haadf": {**here, "key": "images", "axes": ["tilt", "y", "x"]},
            "chem": {**here, "key": "counts", "axes": ["element", "tilt", "y", "x"], "names_key": "names",
                     "elements": {"Ag": 47, "Au": 79}, "candidates": {"Pt": 78}}}


def test_the_element_that_is_missing_is_named_once_in_the_row_and_the_table(lacking, tmp_path, capsys):
    given = settings.load({"name": "a", "system": "hebt", "data": lacking, "solver": {"iterations": 3},
                           "search": {"objective": "heldout", "folds": 2}})
    run = tables.read(made(tmp_path / "run", given))
    note, = run.winner(run.cells[0])["notes"]
    assert "HAADF is not a weighted sum of the maps of Ag, Au" in note and "most likely Pt" in note
    text = report.table(run.folder)
    assert f"Warnings\n{note} (1 of 1 trials)" in text and "HAADF per count: Ag" in text
    assert f"DataWarning: {note}" in capsys.readouterr().err
    whole = settings.replace(given, {"data.chem.elements": {"Ag": 47, "Au": 79, "Pt": 78},
                                     "data.chem.candidates": None})
    row = solved(tmp_path / "whole", whole)
    assert row["notes"] == [] and row["metrics"]["r_squared_smooth"] > 0.9
    assert set(row["elements"]["response"]) == {"Ag", "Au", "Pt"}


# ---- Fractions


def test_tables_and_the_users_own_factors_say_the_same_of_the_same_counts(tmp_path):
    """k, zeta and partial cross-sections made of the tables' factors give the tables' fractions (Eqs. 1 to 3, 7)."""
    data = trial.prepared(sweep(), tmp_path)
    lines = physics.emissions(NAMES, 100.0, phantoms_hebt.LINES)
    f = {line.element: line.f() for line in lines}
    own = {"k": {e: f["Ag"] / f[e] for e in NAMES}, "zeta": {e: 7 / f[e] for e in NAMES},
           "partial": {line.element: line.partial(0.3) for line in lines}}
    kinds = [Fractions(by="atoms"), Fractions(by="tables", beam=100.0, lines=dict(phantoms_hebt.LINES))]
    kinds += [Fractions(by=by, factors=factors) for by, factors in own.items()]
    found = [fractions.quantified(kind, data.truth, NAMES, data.sensitivity, 1.0) for kind in kinds]
    true = phantoms_hebt.fractions(phantoms_hebt.phantom(24, 2))
    inside = found[0].mask & (true.sum(0) > 0)
    for each in found:
        assert np.abs(each.weight - found[0].weight).max() < 1e-5
        assert np.abs(each.weight[:, inside] - true[:, inside]).max() < 1e-5
        assert each.weight.sum(0)[each.mask] == pytest.approx(1) and not each.weight[:, ~each.mask].any()


def test_fractions_of_some_elements_are_among_themselves():
    volume = np.random.default_rng(0).random((3, 6, 6, 6)) + 1
    given = Fractions(by="zeta", factors={"C": 1.0, "Co": 1.0, "Zn": 2.0}, over=["Zn", "Co"], threshold=0.1)
    found = fractions.quantified(given, volume, ("C", "Co", "Zn"), np.ones(3), 1.0)
    assert found.weight[0] == pytest.approx(2 * volume[2] / (2 * volume[2] + volume[1]), rel=1e-5)
    whole, each = fractions.scores(found)
    assert whole["specimen_voxels"] == 216 and list(each["weight_percent"]) == ["Zn", "Co"]
    assert sum(each["weight_percent"].values()) == pytest.approx(100)


def test_a_thick_specimen_is_noted(tmp_path):
    given = sweep(solver__iterations=3, output__fractions={"by": "atoms", "take_off": 5.0,
                                                           "lines": dict(phantoms_hebt.LINES)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "voxel", lambda data: 60.0)  # nm: a particle of a micrometre
        row = solved(tmp_path, given)
    assert any("thin-film assumption fails" in note for note in row["notes"])
    assert set(row["elements"]["absorbed"]) == set(NAMES)


# ---- Runs


def test_the_table_says_what_the_paper_says_of_alpha_and_n(folder):
    run = tables.read(folder)
    found = bimodal.curves(run)
    assert [each.words for each in found] == ["dose 3e+07", "dose 3e+08"]
    for each in found:
        assert each.alphas == [0, 0.5, 0.8] and each.stops == STOPS and each.elements == list(NAMES)
        rows = {alpha: run.winner(cell) for alpha, cell in zip(each.alphas, each.cells)}
        for a, alpha in enumerate(each.alphas):
            passed = {stop["iterations"]: stop["elements"] for stop in rows[alpha]["checkpoints"]}
            for metric, table in each.values.items():
                assert table[a] == pytest.approx(np.array([[passed[n][metric][e] for e in NAMES] for n in STOPS]))
        best, n = each.alone("ssim")
        first = each.values["ssim"][0]
        assert best == pytest.approx(first.max(0)) and list(n) == [STOPS[k] for k in first.argmax(0)]
        alpha, stop = each.best()
        assert alpha > 0 and each.values["ssim"][alpha, stop].mean() == each.values["ssim"][1:].mean(2).max()
        least, _ = each.alone("weight_mse")
        assert least == pytest.approx(each.values["weight_mse"][0].min(0))
    text = report.table(folder)
    assert text.count("HEBT against the maps alone") == 2 and "weight fractions: SSIM" in text
    assert f"SSIM {found[0].alone('ssim')[0][0]:.3f} / " in text and "wt%" in text
    assert "HEBT / best of the maps alone: " in text


def test_the_figures_are_drawn_and_the_atlas_has_the_axes(folder):
    made_files = {path.stem: path for path in report.write(folder)}
    assert {"map", "alpha-1", "alpha-2", "profiles-1", "profiles-2", "fractions", "slices-yz"} <= set(made_files)
    assert "slices-xy" not in made_files  # two planes are no picture
    for name in ("alpha-1", "profiles-2", "fractions"):
        image = matplotlib.image.imread(made_files[name])
        assert min(image.shape[:2]) > 200 and image[..., :3].std() > 0.05
    atlas = xarray.open_zarr(folder / "atlas.zarr")
    assert dict(atlas.metric_ssim.sizes) == {"data.dose": 2, "solver.alpha": 3, "iterations": 4, "element": 2}
    assert atlas.metric_weight_mse.attrs["long_name"].startswith("mean squared error of each element's weight")
    cells = json.loads((folder / "summary.json").read_text())["cells"]
    assert atlas.metric_ssim.values[0, 2].max(0) == pytest.approx(
        np.array([[stop for stop in cells["data.dose=30000000.0,solver.alpha=0.8"]["elements"]["ssim"].values()]])[0],
        abs=0.05)


def test_alpha_without_the_maps_alone_still_has_its_curves(tmp_path):
    run = tables.read(made(tmp_path / "run", sweep(grid={"solver.alpha": [0.4, 0.8]}, solver__iterations=5)))
    each, = bimodal.curves(run)
    assert each.alone("ssim") is None and each.stops == [5] and "above the maps alone" not in bimodal.text(run)
    assert {"alpha", "profiles"} <= {path.stem for path in report.write(run.folder)}


# ---- Refusals


@pytest.mark.parametrize(("changes", "words"), [
    ({"system": "fused2d"}, "agau is a tilt series"),
    ({"solver": {"method": "fused"}}, "must be hebt or eds, not fused"),
    ({"solver": {"alpha": 1.2}}, "from 0 to 1, not 1.2"),
    ({"solver": {"alpha": {"low": -0.1, "high": 0.5}}}, "from 0 to 1"),
    ({"solver": {"differences": 0.0}}, "must be above 0, or all elements"),
    ({"solver": {"relaxation": 2.0}}, "must be below 2"),
    ({"solver": {"prefilter": -1.0}}, "at least 0, not -1"),
    ({"solver": {"responses": {"Ag": 1.0}}}, "one number for each of Ag, Au"),
    ({"solver": {"lambda_tv": 1.0}}, "unknown key"),
    ({"solver": {"alpha": {"low": 0.1, "high": 0.5}}, "search": {"strategy": "shared"}}, "say nothing of hebt"),
    ({"data": {"phantom": "ga2o3"}}, "ga2o3 is a map"),
    ({"data": {"phantom": "agau", "snr": {"Ag": 2.0}}}, "unknown key"),
    ({"output": {"fractions": {"by": "k"}}}, "by: k needs a factor for each of Ag, Au"),
    ({"output": {"fractions": {"factors": {"Ag": 1.0, "Au": 1.0}}}}, "not for by: atoms"),
    ({"output": {"fractions": {"by": "tables"}}}, "write beam: 200.0"),
    ({"output": {"fractions": {"over": ["Zn"]}}}, "there are no maps of Zn; there are Ag, Au"),
    ({"output": {"shares": {"peaks": 2}}}, "is for fused2d alone"),
    ({"system": "fused3d", "output": {"haadf": 50}}, "is for hebt alone"),
])
def test_what_does_not_fit_is_refused_in_words(changes, words):
    with pytest.raises(SettingsError, match=words):
        settings.load(PLAIN | {"solver": {}} | changes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"candidates": {"Au": 79}}, "Au is one of data.chem.elements already"),
    ({"names_key": None}, "where is each map"),
    ({"candidates": {"Pt": 79}}, "Pt has atomic number 78"),
])
def test_candidates_are_other_elements_that_can_be_found(lacking, changes, words):
    chem = {key: value for key, value in (lacking["chem"] | changes).items() if value is not None}
    given = {"name": "a", "data": {**lacking, "chem": chem}, "search": {"objective": "heldout"}}
    with pytest.raises(SettingsError, match=words):
        settings.load({**given, "system": "hebt"})
    with pytest.raises(SettingsError, match="is for hebt alone"):
        settings.load({**given, "system": "fused3d"})
