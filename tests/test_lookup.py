"""Where a search starts: samplings told from the data, the nearest cell of an atlas, and the law between them."""

import math
from dataclasses import replace

import numpy as np
import pytest

from engine import simulate
from engine.data import TiltSeries
from engine.phantoms import ELEMENTS, FIELD_NM, phantom
from sweeps import grid, lookup, report, settings
from sweeps.journal import RunError
from sweeps.lookup import Entry, Sampling
from tests.coordinate import coordinate, sweep
from tests.specimens import with_images, with_maps
from tests.test_coordinator import events

HERE = Sampling(47, 9, 140.0, 1.0, 2000.0, 64)


def simulated(chosen):
    """The data that settings describe."""
    data, elements = chosen.data, ELEMENTS[chosen.data.phantom]
    span = tuple(data.tilt_range)
    snr = {name: 1 + data.snr["chem"] * (data.snr[name] - 1) for name in elements} | {"haadf": data.snr["haadf"]}
    return simulate.multimodal(
        phantom(data.phantom, (data.size,) * 3, FIELD_NM / data.size), tuple(elements.values()), tuple(elements),
        pixel_size=FIELD_NM / data.size, haadf_angles=simulate.spread(span, data.haadf_tilts),
        chem_angles=simulate.chemical_angles(span, data.haadf_tilts, data.chem_tilts), snr=snr)


@pytest.mark.parametrize(("name", "chem", "haadf"), [("cocuo", 1.0, 2208.67), ("conio", 4.0, 300.0)])
def test_a_sampling_told_from_the_data_is_the_one_they_were_simulated_with(name, chem, haadf):
    chosen = settings.load({"name": "s", "data": {
        "phantom": name, "size": 32, "haadf_tilts": 17, "chem_tilts": 5, "tilt_range": [-60, 70], "snr": {
            **dict.fromkeys(ELEMENTS[name], 2.0), "chem": chem, "haadf": haadf}}})
    data, wanted = simulated(chosen), lookup.of_cell(chosen)
    found = lookup.of_data(data)
    assert replace(found, counts=0, haadf=0) == replace(wanted, counts=0, haadf=0)
    assert found.counts == pytest.approx(wanted.counts, rel=0.02)
    assert found.haadf == pytest.approx(wanted.haadf, rel=0.02)
    told = [lookup.of_data(with_images(data, projections=gain * data.haadf.projections, noise=None)).haadf
            for gain in (1, 1000)]
    # Structure looks like noise, so that the estimate is a lower bound; a detector's gain says nothing.
    assert told[0] < wanted.haadf and told[1] == pytest.approx(told[0], rel=1e-3)
    scaled = lookup.of_data(with_maps(data, projections=7 * data.chem.projections, units="intensity", background=0.0))
    assert scaled.counts > 0 and lookup.of_data(replace(data, haadf=None)).images == 0


def test_noise_that_is_no_structure_is_told_from_the_image():
    """Counts of a smooth scene in any unit, their number told within a tenth."""
    y, x = np.mgrid[:96, :96] / 96
    scene = 50 + 400 * np.exp(-((y - 0.5) ** 2 + (x - 0.4) ** 2) / 0.1)
    counts = np.random.default_rng(0).poisson(scene, (3, *scene.shape)).astype(np.float32)
    series = TiltSeries(0.01 * counts[None], np.zeros(3), ("HAADF",), 1.0, "intensity")
    assert lookup._counts(series)[0] == pytest.approx(scene.mean(), rel=0.1)


def test_the_nearest_cell_is_so_in_ratios():
    entries = [Entry(name, False, replace(HERE, **changes), {}) for name, changes in {
        "double": {"maps": 18}, "half": {"maps": 5}, "same": {"voxels": 256}, "dose": {"counts": 3.0},
        "wedge": {"covered": 120.0}}.items()]
    assert [entry.cell for entry in lookup.nearest(entries, HERE)] == ["same", "wedge", "half", "double", "dose"]


def test_weights_are_brought_to_the_counts_to_the_voxels_and_to_lambda_chem():
    entry = Entry("there", False, replace(HERE, maps=18, counts=2.0, voxels=32), {
        "solver.lambda_model": 2.0, "solver.lambda_chem": 1.0, "solver.lambda_tv": 3.0})
    cell, = grid.cells(sweep(axes={}))
    found = lookup.proposal(cell, entry, HERE)
    assert found == pytest.approx({"solver.lambda_model": 2.0, "solver.lambda_tv": 3.0 / 2 / math.sqrt(2)})
    cell, = grid.cells(sweep(axes={}, lambda_chem=10.0))
    assert lookup.proposal(cell, entry, HERE) == pytest.approx({name: 10 * value for name, value in found.items()})
    cell, = grid.cells(sweep(axes={}, lambda_model={"choice": [0.1, 1.0, 5.0]}, lambda_tv={"low": 2.0, "high": 9.0}))
    assert lookup.proposal(cell, entry, HERE) == {"solver.lambda_model": 1.0, "solver.lambda_tv": 2.0}
    with pytest.raises(RunError, match="tells nothing of solver.inner"):
        lookup.proposal(grid.cells(sweep(axes={}, inner={"low": 2, "high": 6}))[0], entry, HERE)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A run folder with two cells of images and two of maps alone."""
    folder = tmp_path_factory.mktemp("atlas") / "r"
    coordinate(folder, sweep(6))
    return folder


@pytest.mark.parametrize("inside", ["", "atlas.zarr"])
@pytest.mark.parametrize("search", [{}, {"strategy": "shared"}, {"order": "strict"}])
def test_a_search_begins_with_what_the_atlas_has_found_nearby(atlas, tmp_path, inside, search):
    given = {"atlas": str(atlas / inside), **search}
    chosen = sweep(4, axes={"haadf_tilts": [0, 9], "chem_tilts": [4]}, search=given)
    coordinate(tmp_path / "r", chosen)
    asked = {(event["cell"], event["trial"]): event for event in events(tmp_path / "r", "ask")}
    for cell, first, near in (("haadf_tilts=9,chem_tilts=4", 0, "haadf_tilts=9,chem_tilts=5"),
                              ("haadf_tilts=0,chem_tilts=4", 1, "haadf_tilts=0,chem_tilts=5")):
        found = asked[cell, first]
        assert f"in the cell {near} of small" in found["source"]
        best = settings.load(atlas / f"best/{near}.yaml").solver
        wanted = {"solver.lambda_tv": best.lambda_tv * math.sqrt(4 / 5)}
        if first == 0:
            wanted["solver.lambda_model"] = best.lambda_model
        assert found["params"] == pytest.approx(wanted)
        assert "source" in asked[cell, first + 1] and "source" not in asked[cell, first + 2]
    assert "Starts from an atlas" in report.table(tmp_path / "r")


def test_with_one_trial_the_atlas_is_the_answer(atlas, tmp_path):
    chosen = sweep(1, axes={}, search={"atlas": str(atlas), "initial": 8})
    coordinate(tmp_path / "r", chosen)
    asked, = events(tmp_path / "r", "ask")
    frozen = settings.load(tmp_path / "r/best/all.yaml").solver
    assert frozen.lambda_tv == asked["params"]["solver.lambda_tv"] and "source" in asked


def test_what_is_no_atlas_is_refused_with_a_sentence(atlas, tmp_path):
    for path, words in ((tmp_path, "is no atlas"), (tmp_path / "none", "is no atlas")):
        with pytest.raises(RunError, match=words):
            lookup.check(grid.cells(sweep(axes={}, search={"atlas": str(path)})))
    with pytest.raises(settings.SettingsError, match="search.atlas: is for the weights of fused3d"):
        settings.load({"name": "a", "system": "hebt", "data": {"phantom": "agau", "planes": 1},
                       "search": {"atlas": str(atlas)}})
    coordinate(tmp_path / "images", sweep(3, axes={"haadf_tilts": [9]}))
    with pytest.raises(RunError, match="has no finished cell of the maps alone"):
        lookup.check(grid.cells(sweep(axes={"haadf_tilts": [0]}, search={"atlas": str(tmp_path / "images")})))


def test_a_relative_atlas_lies_beside_the_yaml(tmp_path):
    text = settings.to_yaml(sweep(3, axes={})).replace("search:", "search:\n  atlas: runs/a", 1)
    (tmp_path / "s.yaml").write_text(text)
    assert settings.load(tmp_path / "s.yaml").search.atlas == str(tmp_path / "runs/a")


def test_the_weight_of_tv_goes_with_the_root_of_the_counts_of_a_voxel():
    """Nine times the counts in a pixel of the maps, three times the weight; four times the voxels, half."""
    assert replace(HERE, counts=9.0).strength(HERE) == pytest.approx(3)
    assert replace(HERE, voxels=256).strength(HERE) == pytest.approx(0.5)
    assert HERE.strength(HERE) == 1 and HERE.apart(replace(HERE, voxels=256)) == 0
