"""Laws of the optimiser: pure proposals, equal replays, no point twice, harmless failures, units that do not matter."""

import copy
import json
import math
import warnings

import numpy as np
import pytest

from sweeps.grid import Dimension
from sweeps.optimizer import Optimizer, SpaceExhausted, standardised
from tests.bench_optimizer import SPACE, Landscape, Listed, search

MIXED = {"weight": Dimension(1e-9, 1e-5, "log"), "inner": Dimension(2, 9, integer=True),
         "method": Dimension(choices=("fused", "plain", None)), "only": Dimension(choices=(4.0,))}
ACQUISITIONS = ("gp_hedge", "EI", "LCB", "PI")


def bowl(params):
    """Least at lambda_model 1, lambda_tv 0.1, gamma 1.6."""
    return math.log10(params["lambda_model"]) ** 2 + (math.log10(params["lambda_tv"]) + 1) ** 2 \
        + 4 * (params["gamma"] - 1.6) ** 2


def told(optimizer, objective, trials):
    """Serial search."""
    for trial in range(trials):
        params = optimizer.ask([], trial)
        optimizer.tell(params, objective(params))
    return optimizer


def results(trials=12, seed=3):
    """Points and values as another optimiser might have left them, one of them failed."""
    source = Optimizer(SPACE, seed, trials)
    points: list[dict[str, float]] = []
    for trial in range(trials):
        points.append(source.ask(points, trial))
    return [(params, None if k == 4 else bowl(params)) for k, params in enumerate(points)]


@pytest.mark.parametrize("acquisition", ACQUISITIONS)
def test_a_replay_is_equal_after_every_prefix(acquisition):
    live, log = Optimizer(SPACE, 1, 4, acquisition), []
    for trial in range(7):
        params = live.ask([], trial)
        log.append((params, None if trial == 2 else bowl(params)))
        live.tell(*log[-1])
        again = Optimizer(SPACE, 1, 4, acquisition)
        for params, objective in json.loads(json.dumps(log)):
            again.tell(params, objective)
        assert again.state() == live.state() == json.loads(json.dumps(live.state()))
        assert again.ask([], trial + 1) == live.ask([], trial + 1)


def test_asking_changes_nothing_and_depends_only_on_what_it_is_given():
    history = results()
    often, once = Optimizer(SPACE, 5, 4), Optimizer(SPACE, 5, 4)
    for k, (params, objective) in enumerate(history):
        often.tell(params, objective)
        if k % 3 == 0:
            often.ask([params], 99)
        once.tell(params, objective)
    pending = [{"lambda_model": 2.0, "lambda_tv": 0.2, "gamma": 1.5}]
    before = copy.deepcopy(once.state())
    assert once.ask(pending, 12) == often.ask(pending, 12) == once.ask(pending, 12)
    assert once.state() == often.state() == before
    assert once.ask([once.ask([], 12)], 12) != once.ask([], 12)
    other = Optimizer(SPACE, 6, 4)
    assert other.ask([], 0) != Optimizer(SPACE, 5, 4).ask([], 0)


def test_no_two_trials_are_the_same_with_eight_in_flight():
    asked = []

    class Noted(Optimizer):
        def ask(self, pending, trial):
            asked.append(super().ask(pending, trial))
            assert all(params in asked for params in pending) and len(pending) <= 8
            return asked[-1]

    values, _ = search(Noted(SPACE, 2, 8), bowl, 2, trials=18)
    assert len(asked) == len({tuple(sorted(params.items())) for params in asked}) == len(values) == 18


@pytest.mark.parametrize("space, size", [
    ({"n": Dimension(1, 12, integer=True)}, 12),
    ({"n": Dimension(1, 24, "log", integer=True)}, 24),
    ({"n": Dimension(1, 4, integer=True), "method": Dimension(choices=("a", "b", "c"))}, 12),
    ({"method": Dimension(choices=("a", "b"))}, 2),
])
def test_a_finite_space_is_searched_to_its_last_point_and_then_says_so(space, size):
    optimizer, running, seen = Optimizer(space, 0, 4), [], set()
    for trial in range(size):
        if len(running) == min(8, size - 1):
            params = running.pop(0)
            optimizer.tell(params, math.sin(trial))
        params = optimizer.ask(running, trial)
        assert type(params.get("n", 1)) is int
        seen.add(tuple(params.values()))
        running.append(params)
    assert len(seen) == size
    with pytest.raises(SpaceExhausted, match=f"all {size} points .* lower search.trials"):
        optimizer.ask(running, size)


@pytest.mark.parametrize("failure", [None, math.nan, math.inf, -math.inf])
def test_a_failure_counts_as_the_worst_value_seen(failure):
    history = sorted(((params, bowl(params)) for params, _ in results(10)), key=lambda row: -row[1])
    failed, worst = Optimizer(SPACE, 4, 4), Optimizer(SPACE, 4, 4)
    for k, (params, objective) in enumerate(history):
        failed.tell(params, failure if k in (4, 7) else objective)
        worst.tell(params, history[0][1] if k in (4, 7) else objective)
    assert failed.ask([], 10) == worst.ask([], 10)
    assert failed.state()["objectives"][4] is None
    assert all(math.isfinite(x) for x in failed.state()["gains"])


def test_a_later_worse_value_is_the_failures_value_too():
    values = standardised([1.0, None, 2.0, 2.5])
    assert values[1] == values[3] == max(values) and np.mean(values) == pytest.approx(0, abs=1e-8)
    assert standardised([None, None]) == standardised([3.0, None]) == [0.0, 0.0]


def test_an_optimiser_that_has_seen_nothing_but_failures_goes_on():
    optimizer = told(Optimizer(SPACE, 0, 4), lambda params: None, 8)
    told(optimizer, bowl, 3)
    assert all(math.isfinite(x) for x in optimizer.state()["gains"])


@pytest.mark.parametrize("scale, shift", [(1e6, 0.0), (1e-6, 3e-6), (7.0, -400.0), (1e300, 0.0)])
def test_the_units_of_the_objective_do_not_matter(scale, shift):
    plain, other = Optimizer(SPACE, 7, 4), Optimizer(SPACE, 7, 4)
    for params, objective in results():
        plain.tell(params, objective)
        other.tell(params, None if objective is None else scale * objective + shift)
    pending = [{"lambda_model": 2.0, "lambda_tv": 0.2, "gamma": 1.5}]
    assert plain.ask(pending, 12) == other.ask(pending, 12)


def test_a_log_dimension_is_a_linear_one_in_the_logarithm():
    log, linear = Optimizer({"x": Dimension(1e-3, 1e3, "log")}, 3, 4), Optimizer({"x": Dimension(-3, 3)}, 3, 4)
    for trial in range(9):
        a, b = log.ask([], trial)["x"], linear.ask([], trial)["x"]
        assert math.log10(a) == pytest.approx(b, abs=1e-4)
        log.tell({"x": 10**b}, (b - 1) ** 2)
        linear.tell({"x": b}, (b - 1) ** 2)


@pytest.mark.parametrize("acquisition", ACQUISITIONS)
def test_proposals_keep_bounds_and_types_on_a_mixed_space(acquisition):
    optimizer = Optimizer(MIXED, 1, 4, acquisition)
    for trial in range(10):
        params = optimizer.ask([], trial)
        assert list(params) == list(MIXED)
        assert type(params["weight"]) is float and 1e-9 <= params["weight"] <= 1e-5
        assert type(params["inner"]) is int and 2 <= params["inner"] <= 9
        assert params["method"] in MIXED["method"].choices and params["only"] == 4.0
        optimizer.tell(params, -params["inner"] + math.log10(params["weight"]))  # pulls into a corner


def test_points_outside_the_space_are_refused():
    with pytest.raises(ValueError, match="outside the search space 1.0 to 2.0"):
        Optimizer(SPACE, 0).tell({"lambda_model": 1.0, "lambda_tv": 0.1, "gamma": 2.5}, 1.0)


def test_warnings_of_others_are_left_alone():
    optimizer = told(Optimizer(SPACE, 0, 2), bowl, 4)
    filters = list(warnings.filters)
    optimizer.ask([], 4)
    assert warnings.filters == filters


@pytest.mark.parametrize("acquisition", ACQUISITIONS)
def test_it_finds_the_bottom_of_a_bowl(acquisition):
    optimizer = told(Optimizer(SPACE, 11, 6, acquisition), bowl, 22)
    assert min(optimizer.state()["objectives"]) < 0.05


def test_it_beats_random_points_on_the_landscape():
    ours, random = [], []
    for seed in range(100, 103):
        cube = np.random.default_rng(seed).random((26, 3))
        ours.append(search(Optimizer(SPACE, seed, 8), Landscape(seed), seed, 26, 4)[0][-1])
        random.append(search(Listed(cube), Landscape(seed), seed, 26, 4)[0][-1])
    assert np.mean(ours) < np.mean(random) - 0.05
