"""Which trial wins: the least objective, or the most regularised that cannot be told from it; the same everywhere."""

import json

import numpy as np
import pytest
import xarray

from sweeps import grid, journal, settings, tables, winners
from sweeps.journal import History
from tests.coordinate import WEIGHT, coordinate, sweep


def cell(rule="one_standard_error", **solver):
    return grid.cells(sweep(axes={}, search={"objective": "heldout", "folds": 3, "rule": rule}, **solver))[0]


def entry(folds, tv, chem=None):
    params = {"solver.lambda_tv": tv, "solver.lambda_model": 1.0} | ({"solver.lambda_chem": chem} if chem else {})
    return {"objective": None if folds is None else float(np.mean(folds)), "params": params,
            "metrics": {f"heldout_fold_{k}": value for k, value in enumerate(folds or [])}}


BEST = entry([1.0, 2.0, 3.0], 0.1)
ALIKE = entry([1.3, 1.9, 3.0], 1.0)  # worse by .3, -.1, 0: .067 +- .12
WORSE = entry([1.1, 2.1, 3.1], 10.0)  # by a tenth on every fold, which is no accident
UNSEEN = entry(None, 100.0)


def test_of_trials_that_cannot_be_told_from_the_best_the_most_regularised_wins():
    entries = [WORSE, BEST, UNSEEN, ALIKE, entry([2.0, 1.5, 2.8], 0.5)]
    assert winners.choose(cell(), entries) == 3
    assert winners.choose(cell("best"), entries) == 1


def test_pairs_count_and_not_the_scatter_of_the_folds():
    """A plain standard error of the best's folds, 0.58, would let the worse one win."""
    assert winners.choose(cell(), [BEST, WORSE]) == 0


def test_only_the_ratio_of_the_weights_regularises_and_equals_are_told_by_their_objective():
    both = cell(lambda_chem=WEIGHT)
    near = [entry([1.0, 2.0, 3.0], 0.1, 1.0), entry([1.3, 1.9, 3.0], 0.5, 10.0), entry([1.2, 1.9, 3.0], 0.5, 1.0),
            entry([1.3, 1.9, 3.0], 0.5, 1.0)]
    assert winners.choose(both, near) == 2
    assert winners.choose(both, [near[0], near[3], near[3]]) == 1
    assert winners.choose(both, near[:2]) == 0


def test_the_winner_does_not_depend_on_the_order_of_results_and_cheap_trials_never_win():
    given = cell()
    entries = [WORSE, BEST, ALIKE]
    events = [{"event": "ask", "cell": given.id, "trial": k, "attempt": 0, "kind": "search", "params": each["params"],
               "fidelity": 1.0} for k, each in enumerate(entries)]
    events.append({**events[2], "trial": 3, "fidelity": 0.1})
    results = [{"event": "result", "cell": given.id, "trial": k, "attempt": 0, "status": "ok", **each}
               for k, each in enumerate([*entries, BEST])]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        history = History([*events, *(results[k] for k in order)])
        assert winners.winner(given, history.cell(given.id)).ask["trial"] == 2
    assert winners.winner(given, History(events).cell(given.id)) is None


def test_journal_atlas_yaml_summary_and_tables_have_one_winner(tmp_path):
    search = {"objective": "heldout", "folds": 3, "rule": "one_standard_error"}
    chosen = sweep(12, axes={"chem_tilts": [3, 5]}, search=search)
    coordinate(tmp_path / "r", chosen, "folded")
    run = tables.read(tmp_path / "r")
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    different = 0
    with xarray.open_zarr(tmp_path / "r/atlas.zarr", chunks=None) as atlas:
        for found in grid.cells(chosen):
            history = History(journal.read(tmp_path / "r/journal.jsonl")[0]).cell(found.id)
            won = winners.winner(found, history)
            different += won.ask["trial"] != history.winner(True).ask["trial"]
            assert summary["cells"][found.id]["trial"] == won.ask["trial"] == run.winner(found)["trial"]
            tv = won.ask["params"]["solver.lambda_tv"]
            assert atlas.best_lambda_tv.sel(chem_tilts=found.coordinates["chem_tilts"]).item() == tv
            assert atlas.objective.sel(chem_tilts=found.coordinates["chem_tilts"]).item() == won.objective
            frozen = settings.load(tmp_path / f"r/best/{found.id}.yaml", ["search.objective=nrmse"])
            assert frozen.solver.lambda_tv == tv
    assert different


@pytest.mark.parametrize(("changes", "words"), [
    ({"rule": "one_standard_error"}, "write objective: heldout"),
    ({"rule": "best one"}, "must be best or one_standard_error")])
def test_a_rule_that_cannot_act_is_refused(changes, words):
    with pytest.raises(settings.SettingsError, match=words):
        sweep(axes={}, search=changes)
