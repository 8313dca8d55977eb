"""The loop: it stops when it should, says why, keeps its history, and shows checkpoints in order."""

import jax.numpy as jnp
import numpy as np
import pytest

from engine.iterate import outcomes, settled, solve


def halve(goal, state, iteration):
    """Halfway to the goal; the terms are where it is, its distance, and the iteration that the loop says."""
    new = (state + goal) / 2
    terms = jnp.stack([new[0], jnp.abs(new - goal).max(), iteration.astype(jnp.float32)])
    return new, terms, jnp.abs(new - state).max()


def breaks_at_five(goal, state, iteration):
    """A cost that is infinite in its fifth iteration."""
    new, terms, change = halve(goal, state, iteration)
    return new, jnp.where(iteration == 4, jnp.inf, 1.0) * terms, change


def loses_its_way(goal, state, iteration):
    """A change that cannot be told, at finite cost."""
    new, terms, change = halve(goal, state, iteration)
    return new, terms, jnp.where(iteration == 2, jnp.nan, change)


def run(step=halve, iterations=10, **options):
    state = settled(jnp.zeros(3))
    last = solve(step, jnp.float32(8), (state, jnp.array([0.0, 8.0, -1.0])), iterations, **options)
    return outcomes(last, tolerance=options.get("tolerance", 0.0))[0]


def test_all_iterations_are_done_and_history_begins_with_the_start():
    done = run()
    assert done.ok and done.iterations == 10 and done.status == "finished 10 iterations"
    assert done.history.shape == (11, 3)
    np.testing.assert_array_equal(done.history[:, 2], np.arange(-1, 10))
    np.testing.assert_allclose(done.history[:, 1], 8 * 0.5 ** np.arange(11))
    np.testing.assert_allclose(done.state, 8 - 8 * 0.5**10)


def test_tolerance_ends_the_solve():
    done = run(iterations=100, tolerance=0.1)
    assert done.ok and "converged after 7 iterations" in done.status and "0.1" in done.status
    assert done.iterations == 7 and len(done.history) == 8  # the change is 4, 2, ... 0.0625
    assert run(iterations=100, tolerance=0.0).iterations == 100


def test_checkpoints_are_seen_in_order_with_their_state():
    seen = []
    run(checkpoints=[7, 2, 10, 2, 99, 0], observe=lambda n, state: seen.append((n, float(state[0]))))
    assert [n for n, _ in seen] == [2, 7, 10]
    for n, x in seen:
        assert x == pytest.approx(8 - 8 * 0.5**n)


def test_checkpoints_change_nothing():
    plain, watched = run(), run(checkpoints=[3, 4, 9], observe=lambda n, state: None)
    np.testing.assert_array_equal(plain.history, watched.history)
    np.testing.assert_array_equal(plain.state, watched.state)


def test_checkpoints_after_convergence_show_the_final_state():
    """A table with one column per checkpoint has no holes."""
    seen = {}
    done = run(iterations=50, tolerance=0.1, checkpoints=[5, 20, 50], observe=lambda n, s: seen.update({n: s[0]}))
    assert done.iterations == 7 and list(seen) == [5, 20, 50]
    assert seen[20] == seen[50] == done.state[0]


@pytest.mark.parametrize(("step", "iteration"), [(breaks_at_five, 5), (loses_its_way, 3)])
def test_a_value_that_is_not_finite_stops_with_a_sentence(step, iteration):
    seen = []
    done = run(step, iterations=20, checkpoints=[2, 15], observe=lambda n, state: seen.append(n))
    assert not done.ok and done.iterations == iteration
    assert f"stopped at iteration {iteration}" in done.status and "not finite" in done.status
    assert len(done.history) == iteration + 1
    assert 2 in seen


def test_numbers_of_iterations_share_a_program():
    traced = []

    def counted(goal, state, iteration):
        traced.append(iteration)
        return halve(goal, state, iteration)

    run(counted, iterations=50)
    once = len(traced)
    run(counted, iterations=60, tolerance=1e-3, checkpoints=[3])
    assert len(traced) == once > 0
