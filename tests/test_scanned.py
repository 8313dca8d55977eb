"""system: mset from its YAML to rows, tables, figures and lists of atoms; measured series; what is refused."""

import json
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import zarr

from engine import atoms, diffraction, mset, scans
from engine.data import DataError
from launch import plan
from sweeps import atomic, atomic_figures, grid, report, scanned, settings, tables, trial
from sweeps.settings import SettingsError
from tests.specimens import distance
from tests.test_bimodal import made, solved, volumes

# Six tilts of a particle of 13 atoms in 24 voxels, 4 x 4 probes: an error of some pm in a second.
PLAIN = {"name": "atoms", "system": "mset",
         "data": {"phantom": "cuau", "radius": 0.32, "size": 24, "tilts": 6, "probes": 4},
         "solver": {"iterations": 6, "binning": 4}}


def sweep(**changes):
    """PLAIN with dotted settings changed: solver__binning=2."""
    return settings.replace(settings.load(PLAIN), {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep over method and dose."""
    given = {"solver.method": ["mset", "sset"], "data.dose": [1e5, 1e8]}
    return made(tmp_path_factory.mktemp("runs") / "atoms", sweep(grid=given, solver__record=[3, 6]))


# ---- Data


def test_a_dose_counts_the_electrons_of_one_and_the_same_series(tmp_path):
    clean = scanned.recorded(sweep(), tmp_path)
    plain = sweep().data
    again = diffraction.simulate(atomic.specimen(plain), diffraction.Scan(24, probes=4), scanned.angles(plain))
    assert np.array_equal(clean.patterns, again.patterns) and clean.electrons == 1
    counted = scanned.recorded(sweep(data__dose=1e6), tmp_path)
    area = (24 * 0.4) ** 2
    assert counted.electrons == pytest.approx(1e6 * area / (6 * 16))
    assert counted.patterns.sum() == pytest.approx(counted.electrons * clean.patterns.sum(), rel=1e-3)
    assert len(list((tmp_path / "stages").glob("scan-*"))) == 1
    other = scanned.recorded(sweep(data__dose=1e6, data__replicate=1), tmp_path)
    assert not np.array_equal(other.patterns, counted.patterns)
    assert np.array_equal(scanned.recorded(sweep(data__dose=1e6), tmp_path).patterns, counted.patterns)


@pytest.mark.parametrize(("tilts", "low", "high", "expected"), [
    (4, -90.0, 90.0, [-90, -45, 0, 45]), (3, -60.0, 60.0, [-60, 0, 60]), (1, -10.0, 30.0, [10])])
def test_half_a_turn_leaves_its_end_out(tilts, low, high, expected):
    assert scanned.angles(sweep(data__tilts=tilts, data__tilt_range=[low, high]).data) == pytest.approx(expected)


# ---- Trials


def test_a_trial_is_the_engines_solve_and_its_atoms(tmp_path):
    row = solved(tmp_path, sweep(solver__record=[2, 6]))
    series = scanned.recorded(sweep(), tmp_path)
    volume = mset.reconstruct(series, mset.Settings(iterations=6, binning=4)).volume
    kept = volumes(tmp_path, row)
    assert distance(kept["volume"], volume) < 1e-6
    found = atomic.traced(sweep().solver, volume[0], 0.04)
    result = atomic.compared(sweep().data, found)
    assert row["metrics"]["rmsd"] == row["objective"] == pytest.approx(result.rmsd, rel=1e-4)
    assert row["metrics"]["classification"] == pytest.approx(100 * result.classification)
    assert row["elements"]["found"] == {name: count for name, count in result.found.items()}
    symbols = atomic.specimen(sweep().data).symbols.tolist()
    assert row["elements"]["true"] == {name: symbols.count(name) for name in ("Au", "Cu")}
    assert np.allclose(kept["field_atoms"], atomic.table(found), rtol=1e-4)
    assert [stop["iterations"] for stop in row["checkpoints"]] == [2, 6]
    assert row["checkpoints"][1]["metrics"]["rmsd"] == pytest.approx(row["objective"], rel=1e-4)
    assert row["iterations"] == 6 and row["metrics"]["amplitude_error"] < 0.1


def test_one_slice_is_all_layers_in_one(tmp_path):
    ways = {"a": {"solver__method": "sset"}, "b": {"solver__binning": 24}}
    one, other = (volumes(tmp_path / name, solved(tmp_path / name, sweep(search__objective="amplitude_error", **way)))
                  for name, way in ways.items())
    assert distance(one["volume"], other["volume"]) < 1e-6


def test_patterns_that_are_left_out_judge_a_step_without_a_truth(tmp_path):
    series = scanned.recorded(sweep(), tmp_path)
    fitted = scanned.left_out(series, 4, 0)
    assert fitted.shape == (6, 16) and ((~fitted).sum(1) == 4).all()
    assert np.array_equal(fitted, scanned.left_out(series, 4, 0)) and (fitted != scanned.left_out(series, 4, 1)).any()
    rows = [solved(tmp_path, sweep(search__objective="heldout", solver__step=step)) for step in (1.0, 1e-3)]
    assert rows[0]["objective"] == rows[0]["metrics"]["heldout"] < rows[1]["objective"]


def test_what_the_microscope_says_wrongly_is_refined(tmp_path):
    """One and the same patterns, told with a wrong defocus and at wrong places."""
    wrong = {"data__defocus_error": 2.0, "data__position_error": 0.02, "search__objective": "amplitude_error"}
    ways = ([], ["probe", "positions"])
    rows = [solved(tmp_path, sweep(solver__refine=way, solver__iterations=10, **wrong)) for way in ways]
    assert rows[1]["objective"] < 0.7 * rows[0]["objective"]
    assert abs(rows[1]["metrics"]["defocus"] + 20) < 1 and rows[1]["metrics"]["moved"] > 5
    assert set(volumes(tmp_path, rows[1])) >= {"field_probe", "field_positions", "field_atoms"}
    right, told = (scanned.recorded(sweep(**given), tmp_path) for given in ({}, wrong))
    assert np.array_equal(right.patterns, told.patterns) and told.optics.defocus == right.optics.defocus + 2
    off = np.sqrt(((told.positions - right.positions) ** 2).sum(1).mean())
    assert off == pytest.approx(0.02, rel=0.3)


def test_an_empty_volume_is_a_row_with_a_reason(tmp_path):
    asked = {"trial": 0, "attempt": 0, "kind": "search", "params": {}, "settings": settings.dump(
        sweep(solver__threshold=40.0))}
    row, = trial.run({"cell": "all", "folder": str(tmp_path), "trials": [asked]})
    assert row["status"].startswith("no atoms could be traced: 0 atoms stand out") and row["objective"] is None


@pytest.mark.parametrize("method", ["resire", "genfire"])
def test_linear_tomography_has_a_dark_field_scan_of_its_own(method, tmp_path):
    given = sweep(solver__method=method, data__size=16, data__radius=0.2, data__probes=2,
                  search__objective="tracing_error")
    cell, = grid.cells(settings.replace(given, {"solver.step": {"low": 0.1, "high": 1.0}}))
    assert not cell.space  # it has no such step
    cell, = grid.cells(settings.replace(given, {"solver.lambda_tv": {"low": 1e-3, "high": 0.1}}))
    assert list(cell.space) == (["solver.lambda_tv"] if method == "resire" else [])
    assert scanned.dark_field(given, tmp_path).projections.shape == (1, 6, 16, 16)
    asked = {"trial": 0, "attempt": 0, "kind": "search", "params": {}, "settings": settings.dump(given)}
    row, = trial.run({"cell": "all", "folder": str(tmp_path), "trials": [asked]})
    assert row["iterations"] == 100 or row["status"].startswith("no atoms")


# ---- Measured series


@pytest.fixture
def recorded(tmp_path):
    """The plain series in a file, and settings that read it."""
    scans.save(tmp_path / "series.zarr", scanned.recorded(sweep(data__dose=1e8), tmp_path))
    return {**PLAIN, "data": {"root": str(tmp_path), "scan": "series.zarr", "light": "Cu", "heavy": "Au"},
            "search": {"objective": "heldout"}}


def test_a_series_in_a_file_is_solved_as_the_simulated_one(recorded, tmp_path):
    given = settings.load(recorded)
    ours = solved(tmp_path, given)
    theirs = solved(tmp_path, sweep(data__dose=1e8, search__objective="heldout"))
    assert distance(*(volumes(tmp_path, row)["volume"] for row in (ours, theirs))) < 1e-4
    assert "rmsd" not in ours["metrics"] and "rmsd" in theirs["metrics"]
    fewer = settings.replace(given, {"data.tilts": [0, 2, 4]})
    assert len(scanned.recorded(fewer, tmp_path).angles) == 3
    run = tables.read(made(tmp_path / "run", given))
    text = next(path.read_text() for path in report.write(run.folder)[0].parent.glob("*.xyz"))
    assert text.splitlines()[1].startswith('Lattice="9.6 0 0 0 9.6 0 0 0 9.6"') and "Au" in text


def test_a_series_that_stays_in_its_file_gives_the_same_volume(recorded, tmp_path):
    kept, streamed = (settings.replace(settings.load(recorded), {"data.stream": way}) for way in ("never", "always"))
    assert scanned.recorded(streamed, tmp_path).streamed and not scanned.recorded(kept, tmp_path).streamed
    ours, theirs = (solved(tmp_path, given) for given in (kept, streamed))
    assert distance(*(volumes(tmp_path, row)["volume"] for row in (ours, theirs))) < 1e-5
    assert ours["objective"] == pytest.approx(theirs["objective"], rel=1e-4)
    needed = [plan.plan(given).costs[0].memory for given in (kept, streamed)]
    assert needed[1]["patterns"] == needed[0]["patterns"] / 3  # two tilts of six


@pytest.mark.parametrize(("changes", "words"), [
    ({"data.scan": "none.zarr"}, "data.scan: .*none.zarr.* does not exist"),
    ({"data.scan": "stages"}, "data.scan: "),
    ({"data.scan": "empty.zarr"}, "data.scan: .* needs patterns"),
    ({"data.tilts": [0, 9]}, "data.tilts: there is no tilt 9; .*series.zarr has 0 to 5"),
    ({"data.crop": 30}, "data.crop: patterns of 24 pixels cannot be cropped to 30"),
    ({"solver.binning": 5}, "solver.binning: 24 layers of voxels cannot be cut into slices of 5"),
])
def test_a_series_that_does_not_fit_is_told_before_it_runs(changes, words, recorded, tmp_path):
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    with pytest.raises(DataError, match=words):
        plan.plan(settings.replace(settings.load(recorded), changes))


def test_the_plan_of_a_series_has_its_sizes(recorded):
    found = plan.plan(settings.replace(settings.load(recorded), {"data.bins": 2, "solver.binning": 3}))
    extent = found.costs[0].extent
    assert (extent.shape, extent.chem, extent.probes) == ((12,) * 3, 6, 16) and extent.pixel == pytest.approx(0.04)
    assert found.series[0].startswith("data.scan: 6 tilts, 16 probes, 24 x 24 pixels")


# ---- Runs


def test_the_table_tells_the_atoms_and_their_errors(folder):
    run = tables.read(folder)
    text = report.table(folder)
    assert run.metric == "rmsd" and "RMSD [pm]" in text
    true = atomic.specimen(sweep().data)
    for cell in run.cells:
        best = run.winner(cell)
        assert f"{cell.id}: RMSD {best['metrics']['rmsd']:.2f} pm" in text
    assert f"of {(true.symbols == 'Au').sum()} Au" in text
    assert "many slices / best of the others with the same data" in text


def test_figures_and_lists_of_atoms_are_written(folder):
    files = {path.name: path for path in report.write(folder)}
    assert {"map.png", "atoms.png", "intensities.png", "slices-xy.png", "slices-yz.png"} <= set(files)
    image = matplotlib.image.imread(files["atoms.png"])
    assert min(image.shape[:2]) > 200 and image[..., :3].std() > 0.1
    lists = sorted(path.name for path in (folder / "report").glob("*.xyz"))
    run = tables.read(folder)
    assert lists == sorted(f"{cell.id}.xyz" for cell in run.cells)
    cell = run.cells[1]
    lines = (folder / "report" / f"{cell.id}.xyz").read_text().splitlines()
    rows = zarr.open_group(folder / run.winner(cell)["volume"], mode="r")["field_atoms"][:]
    kept = rows[rows[:, 4] > 0]
    assert int(lines[0]) == len(kept) == len(lines) - 2
    places = np.array([line.split()[1:4] for line in lines[2:]], float)
    assert places == pytest.approx(10 * kept[:, [2, 1, 0]] + 9.6 / 2, abs=1e-5)
    kinds = atomic.kinds(cell.sweep, rows)
    assert sum(map(len, kinds.values())) - len(kinds["missing"]) == len(kept)
    true = len(atomic.specimen(cell.sweep.data))
    assert len(kinds["right"]) + len(kinds["wrong element"]) + len(kinds["missing"]) == true
    wrong = len(kinds["false"]) + len(kinds["missing"])
    assert run.winner(cell)["metrics"]["tracing_error"] == pytest.approx(100 * wrong / true)
    assert json.loads((folder / "summary.json").read_text())["best_cell"]


def test_of_several_methods_the_best_of_each_is_drawn():
    def cell(method, number):
        return SimpleNamespace(sweep=SimpleNamespace(solver=SimpleNamespace(method=method)), number=number)

    both = [cell("mset", 0), cell("resire", 1), cell("mset", 2), cell("resire", 3), cell("mset", 4)]
    assert [each.number for each in atomic_figures.chosen(both)] == [3, 4]
    assert [each.number for each in atomic_figures.chosen(both[::2])] == [0, 2, 4]


def test_a_tables_atoms_come_back():
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.random((30, 3)), np.sort(rng.random(30))[::-1], np.zeros(30)])
    found = atomic.from_table(rows)
    assert np.array_equal(atomic.table(found), rows) and isinstance(found.atoms("Cu", "Au"), atoms.Atoms)


# ---- Refusals


@pytest.mark.parametrize(("changes", "words"), [
    ({"data": {"phantom": "cocuo"}}, "mset takes 4D-STEM"),
    ({"system": "fused3d", "solver": {}}, "4D-STEM is for system: mset"),
    ({"system": "fused2d", "solver": {}}, "4D-STEM is for system: mset"),
    ({"solver": {"binning": 5}}, "24 layers of voxels cannot be cut into slices of 5"),
    ({"solver": {"method": "fused"}}, "must be mset, sset, resire or genfire"),
    ({"solver": {"momentum": 1.5}}, "from 0 to 1, not 1.5"),
    ({"solver": {"lambda_tv": -1.0}}, "at least 0"),
    ({"search": {"objective": "nrmse"}}, "mset has rmsd, tracing_error, heldout, amplitude_error, not nrmse"),
    ({"solver": {"method": "resire"}, "search": {"objective": "heldout"}}, "resire fits no patterns"),
    ({"data": {"scan": "a.zarr"}}, "rmsd needs known atoms"),
    ({"data": {"scan": "a.zarr", "heavy": "Gold"}, "search": {"objective": "heldout"}}, "Gold is no element"),
    ({"data": {"scan": "a.zarr"}, "solver": {"method": "genfire"}, "search": {"objective": "amplitude_error"}},
     "measured data take mset"),
    ({"solver": {"step": {"low": 0.1, "high": 1.0}}, "search": {"strategy": "shared"}}, "say nothing of mset"),
    ({"output": {"fractions": {"by": "atoms"}}}, "is for maps of elements"),
    ({"data": {"phantom": "cuau", "dose": 0.0}}, "above 0"),
])
def test_what_does_not_fit_is_refused_in_words(changes, words):
    with pytest.raises(SettingsError, match=words):
        settings.load({**PLAIN, **changes})


def test_a_kind_of_error_of_atoms_is_for_mset_alone():
    with pytest.raises(SettingsError, match="rmsd is for atoms and patterns; write nrmse or heldout"):
        settings.load({"name": "a", "data": {"phantom": "cocuo"}, "search": {"objective": "rmsd"}})
