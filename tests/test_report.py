"""The report says what the journal holds: tables, figures and page from small but real run folders."""

import warnings
from functools import cache
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import zarr

from engine.metrics import nrmse, nrmse_elements
from engine.phantoms import ELEMENTS, FIELD_NM, phantom
from sweeps import coordinator, grid, report, settings, tables
from sweeps.atlas import RunFolder
from sweeps.crew import Event
from sweeps.journal import RunError

RANGE = {"low": 1e-3, "high": 10.0, "scale": "log"}


@cache
def specimen(name, size):
    return phantom(name, (size,) * 3, FIELD_NM / size)


def evaluate(message):
    """A trial without a solver: the phantom under noise that falls with tilts and rises with bad weights."""
    sweep = settings.load(message["settings"])
    data, solver = sweep.data, sweep.solver
    truth = specimen(data.phantom, data.size)
    rng = np.random.default_rng([message["trial"], data.haadf_tilts, data.chem_tilts, data.replicate])
    off = np.log10(solver.lambda_tv / 0.1) ** 2 + np.log10(solver.lambda_model) ** 2 * (solver.method == "fused")
    level = {"fused": 0.2, "chem_tv": 0.5, "ml": 1.0}[solver.method] * (1 + 0.1 * off) + 1 / (data.haadf_tilts + 9)
    volume = (truth + rng.normal(scale=level, size=truth.shape)).astype(np.float32)
    name = f"volumes/{message['cell']}-{message['trial']}-{message['attempt']}.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(Path(message["folder"]) / name, mode="w", zarr_format=3)
        group.create_array("volume", data=volume)
        for k, term in enumerate(("model", "chem", "tv")):
            group.create_array(f"history_{term}", data=10.0 ** (3 - k) * (1 + 5 * np.exp(-np.arange(41) / 9)))
        group.attrs.update({"elements": list(ELEMENTS[data.phantom]), "voxel_nm": FIELD_NM / data.size})
    each = dict(zip(ELEMENTS[data.phantom], nrmse_elements(volume, truth).tolist(), strict=True))
    reached = {
        "objective": nrmse(volume, truth),
        "metrics": {"nrmse": nrmse(volume, truth)},
        "elements": {"nrmse": each},
    }
    stops = [
        {"iterations": n, **reached, "objective": value, "metrics": {"nrmse": value}}
        for n, value in zip(solver.record, np.abs(np.asarray(solver.record) - 30) / 200 + 0.9, strict=True)
    ]
    return {**reached, "checkpoints": stops, "status": "ok", "iterations": 40, "seconds": 0.5, "volume": name}


class Here:
    """One worker inside this process."""

    def __init__(self):
        self.events = []

    def start(self, folder):
        self.folder = folder

    def names(self):
        return ["here"]

    def idle(self):
        return [] if self.events else ["here"]

    def submit(self, worker, message):
        shared = {"cell": message["cell"], "folder": message["folder"]}
        self.events.append(Event(worker, results=[
            {"status": "the volume is not finite", "seconds": 0.1} if asked["kind"] == "search" and asked["trial"] == 3
            else evaluate({**shared, **asked}) for asked in message["trials"]]))

    def poll(self, timeout):
        events, self.events = self.events, []
        return events

    def close(self, *_):
        self.events = []


def made(folder, **changes):
    """A finished run folder of the small sweep with `changes`."""
    plain = {
        "name": "small",
        "data": {"phantom": "cocuo", "size": 24},
        "grid": {"haadf_tilts": [0, 9, 47], "chem_tilts": [5, 9]},
        "solver": {"lambda_model": RANGE, "lambda_tv": RANGE},
        "search": {"trials": 5, "initial": 5},
    }
    sweep = settings.load(plain | changes)
    coordinator.run(sweep, grid.cells(sweep), Here(), RunFolder(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def written(folder):
    return report.write(folder)


def test_table_holds_every_cell_with_its_three_baselines(folder):
    run = tables.read(folder)
    (panel,) = tables.pivot(run)
    assert [line[0] for line in panel.lines] == [47, 9, 0, 0, 0]
    assert panel.lines[2:] == [
        (0, "chemistry + TV, searched"),
        (0, "Poisson ML, best iteration"),
        (0, "Poisson ML, 100 iterations"),
    ]
    assert panel.columns == [5, 9]
    assert len(panel.entries) == 10
    text = tables.table(run)
    for cell in run.cells:
        assert tables.shown(run.winner(cell)["objective"]) in text


def test_winner_is_the_lowest_searched_objective_and_failed_trials_do_not_count(folder):
    run = tables.read(folder)
    for cell in run.cells:
        found = [row["objective"] for row in run.rows(cell) if row["kind"] == "search" and row["status"] == "ok"]
        assert run.winner(cell)["objective"] == min(found)
        assert len(found) == 4


def test_best_iteration_of_a_baseline_is_its_lowest_checkpoint(folder):
    run = tables.read(folder)
    best, last = [score for score in tables.scores(run, run.cells[0]) if score.series.startswith("Poisson")]
    assert (best.iterations, last.iterations) == (30, 100)
    assert best.value == pytest.approx(0.9)
    assert last.value == pytest.approx(1.25)


def test_gain_compares_fused_cells_with_the_best_baseline_of_their_own_maps(folder):
    run = tables.read(folder)
    value = {cell.id: tables.scores(run, cell) for cell in run.cells}
    ratios = [
        value[f"haadf_tilts={h},chem_tilts={c}"][0].value
        / min(score.value for score in value[f"haadf_tilts=0,chem_tilts={c}"])
        for h in (9, 47)
        for c in (5, 9)
    ]
    assert tables.gain(run) == pytest.approx((min(ratios), max(ratios)))


def test_report_draws_all_figures_and_one_page_that_needs_no_other_file(written, folder):
    names = [path.name for path in written]
    assert names == [
        "index.html",
        "map.png",
        "landscape.png",
        "convergence.png",
        "slices-xy.png",
        "slices-yz.png",
        "overlay.png",
        "surfaces.png",
    ]
    for path in written[1:]:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 300
        assert image[..., :3].std() > 0.02, f"{path.name} is blank"
    page = written[0].read_text()
    assert page.count("data:image/png;base64,") == 7
    assert 'src="data' in page and "http" not in page
    assert "lambda_tv" in page and "haadf_tilts=47,chem_tilts=9" in page
    assert not list(Path(folder).glob("*.partial"))


def test_report_can_be_drawn_again_and_leaves_nothing_of_the_old_one(written, folder):
    stale = folder / "report" / "old.png"
    stale.write_bytes(b"")
    assert report.write(folder) == written
    assert not stale.exists()


def test_slices_stand_beside_the_truth_and_the_nearest_conventional_cell(folder):
    run = tables.read(folder)
    chosen = [cell.id for cell in report.compared(run, run.cells)]
    assert chosen[0].startswith("haadf_tilts=0") and chosen[-1].startswith("haadf_tilts=47")
    assert chosen[0].split(",")[1] == chosen[-1].split(",")[1]


def test_replicates_are_averaged_and_their_spread_is_told(tmp_path):
    made(tmp_path / "run", grid={"haadf_tilts": [9, 47], "replicate": [0, 1, 2]})
    run = tables.read(tmp_path / "run")
    (panel,) = tables.pivot(run)
    found = [tables.scores(run, cell)[0].value for cell in run.cells if cell.coordinates["haadf_tilts"] == 47]
    entry = panel.entries[47, "", ""]
    assert (entry.value, entry.deviation, entry.count) == pytest.approx((np.mean(found), np.std(found, ddof=1), 3))
    assert "mean of 3 replicates" in tables.table(run)
    assert [path.name for path in report.write(tmp_path / "run")][:2] == ["index.html", "map.png"]


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"method": ["ml", "chem_tv", "fused"]},
        {"haadf_tilts": [9, 47], "gamma": [1.5, 1.6], "chem_tilts": [5, 9]},
        {"data.snr.haadf": [10.0, 100.0, 2000.0]},
    ],
    ids=["none", "words", "three", "numbers"],
)
def test_any_grid_has_a_table_and_a_report(tmp_path, axes):
    made(tmp_path / "run", grid=axes, solver={"lambda_model": RANGE, "lambda_tv": 0.1})
    text = report.table(tmp_path / "run")
    assert all(cell.id in text for cell in tables.read(tmp_path / "run").cells)
    names = [path.name for path in report.write(tmp_path / "run")]
    assert ("map.png" in names) == bool(axes)
    assert "slices-xy.png" in names


def test_a_sweep_that_has_just_begun_and_one_without_volumes_have_a_report(tmp_path):
    made(tmp_path / "none", output={"save": "none"})
    assert [path.name for path in report.write(tmp_path / "none")] == [
        "index.html",
        "map.png",
        "landscape.png",
    ]
    journal = tmp_path / "none" / "journal.jsonl"
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    assert "no finished trial yet" in report.table(tmp_path / "none")
    assert [path.name for path in report.write(tmp_path / "none")] == ["index.html"]


def test_what_is_no_run_folder_is_answered_by_a_sentence(tmp_path):
    with pytest.raises(RunError, match="is no run folder"):
        report.table(tmp_path)
    with pytest.raises(RunError, match="is no run folder"):
        report.write(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_report_that_cannot_be_written_is_a_sentence_and_leaves_the_old_one(written, folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "map.png")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(RunError, match="map.png: No space left on device; the results are safe"):
        report.write(folder)
    assert all(path.exists() for path in written)
    monkeypatch.undo()
    assert report.write(folder) == written


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.3312, "0.331"),
        (17, "17"),
        (2.13e-5, "2.13e-05"),
        (None, "-"),
        (1.0, "1"),
        ("ml", "ml"),
        ([-70, 70], "-70..70"),
        (1234.5, "1.23e+03"),
    ],
)
def test_numbers_are_shown_with_the_digits_that_count(value, text):
    assert tables.shown(value) == text
