"""The grid: which cells there are, what is searched and fixed in each, what a resumed folder refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sweeps import settings
from sweeps.grid import CONVENTIONAL, Cell, Dimension, axes, cells, space_difference, trials
from sweeps.settings import Sweep

WEIGHTS = {"lambda_model": {"low": 1e-3, "high": 1e3, "scale": "log"},
           "lambda_tv": {"low": 1e-3, "high": 1e1, "scale": "log"}}
CHEM = {"path": "maps.npz", "axes": ["element", "tilt", "y", "x"], "angles": "key:angles",
        "elements": {"Fe": 26, "O": 8}}


def _sweep(**sections: Any) -> Sweep:
    return settings.load({"name": "trial", "data": {"phantom": "cocuo", "gamma": 1.6},
                          "solver": WEIGHTS} | sections)


def _only(**sections: Any) -> Cell:
    cell, = cells(_sweep(**sections))
    return cell


def test_cells_come_in_the_order_of_the_yaml_the_last_axis_fastest() -> None:
    sweep = _sweep(grid={"haadf_tilts": [0, 9], "chem_tilts": [5, 9, 13]})
    made = cells(sweep)
    assert [cell.index for cell in made] == [(i, j) for i in range(2) for j in range(3)]
    assert made[4].coordinates == {"haadf_tilts": 9,
                                   "chem_tilts": 9} and list(made[4].coordinates) == list(sweep.grid)
    assert made[4].id == "haadf_tilts=9,chem_tilts=9"
    assert (made[4].sweep.data.haadf_tilts, made[4].sweep.data.chem_tilts, made[4].sweep.grid) == (9, 9, {})
    assert axes(sweep) == {"haadf_tilts": [0, 9], "chem_tilts": [5, 9, 13]}


def test_without_a_grid_there_is_one_cell() -> None:
    cell = _only()
    assert (cell.id, cell.index, cell.coordinates) == ("all", (), {})
    assert cell.sweep == _sweep()


def test_a_cell_is_a_sweep_that_loads_and_gives_itself() -> None:
    for cell in cells(_sweep(grid={"haadf_tilts": [0, 9], "method": ["fused", "ml"]})):
        again, = cells(settings.load(settings.dump(cell.sweep)))
        assert (again.sweep, again.space) == (cell.sweep, cell.space)


@pytest.mark.parametrize("axis, values, setting", [
    ("haadf_tilts", [0, 5], "data.haadf_tilts"), ("replicate", [0, 1, 2], "data.replicate"),
    ("size", [32, 64], "data.size"), ("tilt_range", [[-70, 70], [-60, 60]], "data.tilt_range"),
    ("gamma", [1.4, 1.6], "solver.gamma"), ("method", ["fused", "plain"], "solver.method"),
    ("data.snr.haadf", [2, 2208.67], "data.snr.haadf"), ("data.snr.chem", [0.25, 1], "data.snr.chem"),
    ("data.background_known", [True, False], "data.background_known"), ("data.gamma", [1.4, None],
                                                                        "data.gamma"),
    ("search.order", ["free", "strict"], "search.order"), ("solver.record", [[], [10, 20]], "solver.record"),
    ("seed", [0, 1], "seed"),
])
def test_any_setting_can_be_an_axis(axis: str, values: list[Any], setting: str) -> None:
    made = cells(_sweep(grid={axis: values}))
    assert [cell.coordinates[axis] for cell in made] == values
    assert [settings.get(cell.sweep, setting) for cell in made] == values
    assert len({cell.id for cell in made}) == len(values)
    assert all(re.fullmatch(r"[A-Za-z0-9_.=,+-]+", cell.id) for cell in made)


def test_ids_stay_unique_where_texts_collide() -> None:
    long = [[*range(1, n)] for n in (40, 41, 42)]
    made = cells(_sweep(grid={"solver.record": long, "haadf_tilts": [5, 9]}))
    assert len({cell.id for cell in made}) == 6 and all(len(cell.id) < 80 for cell in made)
    paths = {"data.chem.path": ["a/b.npz", "a b.npz", "a_b.npz", "ü"]}
    measured = _sweep(data={"chem": CHEM}, grid=paths, search={"objective": "heldout"})
    names = [cell.id for cell in cells(measured)]
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_.=,+-]+", name) for name in names)


def test_the_space_keeps_scales_choices_and_whole_numbers() -> None:
    cell = _only(solver={"lambda_model": {"low": 1, "high": 100, "scale": "log"}, "gamma": {"choice": [1.4,
                                                                                                       1.6,
    2]},
                         "inner": {"low": 3, "high": 6}, "lambda_tv": {"low": 0.5, "high": 1}})
    assert cell.space == {
        "solver.gamma": Dimension(choices=(1.4, 1.6, 2.0)),
        "solver.inner": Dimension(3, 6, "linear", integer=True),
        "solver.lambda_model": Dimension(1.0, 100.0, "log"),
     # whole ends of a real weight search real numbers
        "solver.lambda_tv": Dimension(0.5, 1.0, "linear"),
    }
    assert cell.fixed == () and trials(cell) == 30


@pytest.mark.parametrize("method", ["fused", "plain", "fista", "chem_tv"])
def test_without_images_a_cell_is_conventional_tomography(method: str) -> None:
    solver = WEIGHTS | {"method": method, "gamma": {"low": 1.4, "high": 2.0}}
    first, second = cells(_sweep(solver=solver, grid={"haadf_tilts": [0, 9]}))
    assert first.sweep.solver.method == "chem_tv"
    assert first.space.keys() == {"solver.lambda_tv"}
    assert first.fixed == (CONVENTIONAL,) and trials(first) == 31
    ml = settings.replace(first.sweep, first.fixed[0])
    assert (ml.solver.method, ml.solver.iterations, ml.solver.record) == ("ml", 100, list(range(1, 101)))
    assert second.sweep.solver.method == method and second.fixed == ()
    assert ("solver.lambda_model" in second.space) is (method != "chem_tv")


def test_measured_maps_without_images_are_conventional_too() -> None:
    cell = _only(data={"chem": CHEM}, search={"objective": "heldout"})
    assert cell.sweep.solver.method == "chem_tv" and cell.fixed == (CONVENTIONAL,)


@pytest.mark.parametrize("method", ["ml", "sirt"])
@pytest.mark.parametrize("images", [0, 9])
def test_methods_without_weights_are_one_trial_scored_at_every_iteration(method: str, images: int) -> None:
    cell = _only(solver=WEIGHTS | {"method": method, "iterations": 7}, grid={"haadf_tilts": [images]})
    assert cell.space == {} and cell.fixed == ({},) and trials(cell) == 1
    assert cell.sweep.solver.method == method and cell.sweep.solver.record == [1, 2, 3, 4, 5, 6, 7]
    assert _only(solver={"method": method, "record": [5]}).sweep.solver.record == [5]


def test_nothing_to_search_is_one_reconstruction() -> None:
    cell = _only(solver={"lambda_tv": 0.2})
    assert (cell.space, cell.fixed, trials(cell)) == ({}, ({},), 1)
    bare = _only(solver={"lambda_model": WEIGHTS["lambda_model"]}, grid={"haadf_tilts": [0]})
    assert (bare.space, bare.fixed, trials(bare)) == ({}, (CONVENTIONAL, {}), 2)


@pytest.mark.parametrize("method", ["fused", "plain", "fista", "chem_tv", "ml", "sirt"])
@pytest.mark.parametrize("images", [0, 9])
def test_every_range_left_in_a_cell_is_searched(method: str, images: int) -> None:
    solver = {name: {"low": 1, "high": 2} for name in ("gamma", "inner", "lambda_model", "lambda_chem",
                                                       "lambda_tv")}
    cell = _only(solver=solver | {"method": method}, grid={"haadf_tilts": [images]})
    assert settings.tunables(cell.sweep).keys() == cell.space.keys()
    params = {name: dimension.low for name, dimension in cell.space.items()}
    assert not settings.tunables(settings.replace(cell.sweep, params))


def test_the_budget_of_a_cell_can_be_an_axis() -> None:
    assert [trials(cell) for cell in cells(_sweep(grid={"search.trials": [10, 20]}))] == [10, 20]


GRID = {"haadf_tilts": [0, 9], "chem_tilts": [5, 9]}


@pytest.mark.parametrize("changes", [
    {}, {"name": "other"}, {"output": {"save": "all"}}, {"search": {"trials": 60}},
    {"search": {"in_flight": 5}},
])
def test_a_folder_continues_with_more_trials(changes: dict[str, Any]) -> None:
    assert space_difference(_sweep(grid=GRID), _sweep(**{"grid": GRID} | changes)) == ""


@pytest.mark.parametrize("changes, words", [
    ({"seed": 1}, "seed: was 0, now 1"),
    ({"search": {"trials": 20}}, "may grow, not shrink"),
    ({"search": {"order": "strict"}}, "search.order: was free, now strict"),
    ({"solver": WEIGHTS | {"lambda_tv": 0.1}},
     "solver.lambda_tv: was {low: 0.001, high: 10.0, scale: log}, now 0.1"),
    ({"grid": {"haadf_tilts": [0, 9]}}, "grid.chem_tilts: was [5, 9], now not given"),
    ({"grid": {"chem_tilts": [5, 9], "haadf_tilts": [0, 9]}},
     "the axes were in the order haadf_tilts, chem_tilts"),
    ({"data": {"phantom": "cocuo"}}, "data.gamma: was 1.6, now not given"),
])
def test_a_folder_is_refused_with_the_difference(changes: dict[str, Any], words: str) -> None:
    told = space_difference(_sweep(grid=GRID), _sweep(**{"grid": GRID} | changes))
    assert words in told and len(told.splitlines()) == 1


def test_in_strict_order_the_trials_in_flight_belong_to_the_result() -> None:
    old, new = (_sweep(search={"order": "strict", "in_flight": n}) for n in (2, 3))
    assert space_difference(old, new) == "search.in_flight: was 2, now 3"
