"""Laws of the fused solver and of what it is compared with: gradients, costs, symmetries, scales, robustness."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import descent, fused3d, iterate, metrics, model, responses, sharding
from engine.data import DataError, DataWarning
from engine.fused3d import Settings, predict, reconstruct
from tests.specimens import as_net_counts, distance, flipped, simulated, with_images, with_maps

DESCENTS = ("fused", "plain", "fista", "chem_tv")


def settings(**changes):
    return Settings(**{"iterations": 30, "tolerance": 0.0} | changes)


def problem_of(data, gamma=1.6, lambda_model=1.0, lambda_chem=1.0, lambda_tv=0.1):
    return model.build(data, gamma=gamma, lambda_model=lambda_model, lambda_chem=lambda_chem, lambda_tv=lambda_tv,
                       weights="z_gamma", inner=4)


def terms(problem, x, gain, counts=True):
    """The cost terms as every solver reports them: model, chem, tv, total."""
    projected = model.project_images(problem, model.scattering(problem, x))
    return model.cost_terms(problem, x, projected, model.chemistry_value(problem, x, counts), gain)


# ---- Gradients


@partial(jax.jit, static_argnums=3)
def smooth_terms(problem, x, gain, counts):
    """The two smooth terms, model and chem."""
    return terms(problem, x, gain, counts)[:2]


@partial(jax.jit, static_argnums=3)
def slopes(problem, x, gain, counts):
    """Their gradients as the solvers take them, and that of model + 3 chem by automatic differentiation."""
    automatic = jax.grad(lambda x: smooth_terms(problem, x, gain, counts) @ jnp.array([1.0, 3.0]))(x)
    image = descent._image_slope(problem, x, gain) / problem.lambda_model
    return image, model.chemistry(problem, x, counts).slope, automatic


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("gamma", [1.0, 1.6, 2.0])
def test_both_gradients_agree_with_finite_differences(tiny, gamma, counts):
    problem = problem_of(tiny if counts else as_net_counts(tiny), gamma, lambda_model=7.0)
    rng = np.random.default_rng(1)
    x, gain = jnp.asarray(0.3 + 0.5 * rng.random(tiny.truth.shape), jnp.float32), jnp.float32(0.7)
    *own, automatic = (np.asarray(slope, np.float64) for slope in slopes(problem, x, gain, counts))
    for _ in range(4):
        v = rng.normal(size=x.shape).astype(np.float32)
        # Steps of 1 %: the rounding of float32 costs as much as the curvature does.
        ahead, behind = (np.asarray(smooth_terms(problem, x + h * v, gain, counts), float) for h in (0.01, -0.01))
        np.testing.assert_allclose((ahead - behind) / 0.02, [np.vdot(v, slope) for slope in own], rtol=1e-2)
    assert distance(own[0] + 3 * own[1], automatic) < 1e-6


def test_held_out_and_padded_tilts_have_no_gradient_and_no_cost(tiny):
    full, held = problem_of(tiny), model.build(tiny, gamma=1.6, lambda_model=1, lambda_chem=1, lambda_tv=0.1,
                                               weights="z_gamma", inner=4, held_out=tuple(range(5)))
    assert float(model.chemistry(full, full.start, True).value) > 0
    nothing = model.chemistry(held, full.start, True)
    assert float(nothing.value) == 0 and not np.asarray(nothing.slope).any()


# ---- Costs


def test_em_raises_the_likelihood_in_every_iteration(tiny):
    chem = reconstruct(tiny, settings(method="ml")).history["chem"]
    assert (np.diff(chem) <= 1e-5 * chem[0]).all() and chem[-1] < 0.6 * chem[0]


@pytest.mark.parametrize("method", DESCENTS)
@pytest.mark.parametrize("gamma", [1.0, 1.6, 2.0])
def test_cost_ends_below_every_start(tiny, method, gamma):
    for lambda_model, lambda_tv in ((1e-2, 0.1), (1, 0.1), (1, 3)):
        solution = reconstruct(tiny, settings(method=method, gamma=gamma, lambda_model=lambda_model,
                                              lambda_tv=lambda_tv))
        total = solution.history["total"]
        assert solution.ok and len(total) == 31 and total[-1] < total[0]
        weighted = total * 0 + solution.history["chem"] + lambda_tv * solution.history["tv"]
        weighted += lambda_model * solution.history["model"]
        np.testing.assert_allclose(total, weighted, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("lambda_model", [1e-3, 0.1])
def test_convex_case_agrees_with_a_long_descent(lambda_model):
    """gamma = 1 has one minimum: a thousand steps of descent, at the fused solver's own gain, lead there too."""
    problem = problem_of(simulated(16, 9, 5, gamma=1.0), 1.0, lambda_model)
    state, first = fused3d.start(problem, True)
    fused = iterate.solve(fused3d._STEP[True], problem, (state, first), 64).state
    state, first = descent.start_descent(problem, True, True)
    rate = state.rate * jnp.minimum(1, (state.gain / fused.gain) ** 2)
    long = iterate.solve(_with_a_fixed_gain, problem, (state._replace(gain=fused.gain + 0, rate=rate), first), 1000)
    costs = [float(terms(problem, x, fused.gain)[-1]) for x in (fused.best, long.state.x)]
    assert costs[0] == pytest.approx(float(fused.best_cost), rel=1e-4)
    assert costs[0] == pytest.approx(costs[1], rel=0.01)


def _with_a_fixed_gain(problem, state, iteration):
    """FISTA with the paper's cold TV operator, always told an iteration in which the gain is not refitted."""
    step = descent.solver("fista", True)[1]
    return step(problem, state, 0 * iteration)


# ---- What must not matter


@pytest.mark.parametrize("method", ["fused", "plain", "fista"])
def test_detector_gain_changes_nothing(tiny, method):
    chosen = settings(method=method)
    plain = reconstruct(tiny, chosen).volume
    images, noise = tiny.haadf.projections, tiny.haadf.noise
    louder = reconstruct(with_images(tiny, projections=1000 * images, noise=1000 * noise), chosen).volume
    assert distance(louder, plain) < 1e-4
    estimated = reconstruct(with_images(tiny, noise=None), chosen).volume
    louder = reconstruct(with_images(tiny, projections=1000 * images, noise=None), chosen).volume
    assert distance(louder, estimated) < 1e-4


def test_units_of_the_maps_change_nothing(tiny):
    """Maps in another unit, with sensitivity and noise in it: concentrations stay."""
    net = with_maps(as_net_counts(tiny), noise=np.array([1.2, 1.3, 1.1, 1.4]))
    scaled = with_maps(net, projections=50 * net.chem.projections, noise=50 * net.chem.noise)
    scaled = replace(scaled, sensitivity=50 * tiny.sensitivity)
    assert distance(reconstruct(scaled, settings()).volume, reconstruct(net, settings()).volume) < 1e-3


@pytest.mark.parametrize("axis", [2, 3])
def test_mirrored_specimen_gives_the_mirrored_result(tiny, axis):
    mirrored = replace(tiny, chem=flipped(tiny.chem, axis), haadf=flipped(tiny.haadf, axis), truth=None)
    exact = settings(lambda_tv=0.0)
    assert distance(np.flip(reconstruct(mirrored, exact).volume, axis), reconstruct(tiny, exact).volume) < 1e-4
    # Forward differences prefer a corner of each voxel, so that with TV the mirror holds for the cost of the result.
    convex = settings(gamma=1.0, iterations=64)
    costs = [reconstruct(data, convex).history["total"][-1] for data in (mirrored, tiny)]
    assert costs[0] == pytest.approx(costs[1], rel=2e-3)


@pytest.mark.parametrize("counts", [True, False])
def test_held_out_maps_do_not_change_the_solution(tiny, counts):
    data = tiny if counts else as_net_counts(tiny)
    out, maps = (0, 3), data.chem.projections.copy()
    maps[:, out] = np.random.default_rng(0).poisson(5, maps[:, out].shape)
    held = reconstruct(data, settings(), held_out=out).volume
    assert distance(reconstruct(with_maps(data, projections=maps), settings(), held_out=out).volume, held) < 1e-6
    assert distance(reconstruct(data, settings()).volume, held) > 0.05


@pytest.mark.slow
def test_padded_tilts_change_nothing(tiny, monkeypatch):
    padded = reconstruct(tiny, settings()).volume
    monkeypatch.setattr(model, "bucket", lambda tilts: tilts)
    assert distance(reconstruct(tiny, settings()).volume, padded) < 1e-4


def test_no_data_no_weight(tiny):
    """At lambda_model 0 the images say nothing."""
    chosen = settings(lambda_model=0.0, gamma=1.0)
    images = np.random.default_rng(0).random(tiny.haadf.projections.shape)
    other = reconstruct(with_images(tiny, projections=images), chosen).volume
    assert distance(other, reconstruct(tiny, chosen).volume) < 1e-3


# ---- What must come out


@pytest.mark.slow
def test_clean_data_bring_concentrations():
    data = simulated(24, 31, 9, snr=1e4, haadf_snr=1e6)
    for lambda_model in (1e-3, 3e-2, 1):
        solution = reconstruct(data, settings(iterations=256, lambda_model=lambda_model, tolerance=0.0))
        assert np.abs(metrics.scale_error(solution.volume, data.truth)).max() < 0.1
        assert metrics.nrmse_elements(solution.volume, data.truth).mean() < 0.1


def test_fused_beats_what_sees_the_maps_alone(tiny):
    def error(**changes):
        return metrics.nrmse_elements(reconstruct(tiny, settings(**changes)).volume, tiny.truth).mean()

    fused = min(error(lambda_tv=tv) for tv in (0.1, 1))
    rivals = [error(method="chem_tv", lambda_tv=tv) for tv in (0.1, 0.3, 1)]
    assert fused < 0.75 * min(*rivals, error(method="ml"), error(method="sirt"))


@pytest.mark.parametrize("counts", [True, False])
def test_unknown_sensitivities_are_fitted(tiny, counts):
    data = replace(tiny if counts else as_net_counts(tiny), sensitivity=None)
    contrast = np.asarray(problem_of(data).contrast).ravel()
    assert (contrast > 0).all() and contrast.max() == pytest.approx(1)
    solution = reconstruct(data, settings())
    assert solution.ok and np.isfinite(solution.volume).all()
    assert all(solution.metrics[f"sensitivity_{element}"] > 0 for element in data.chem.elements)
    # Chemistry and images together still find the specimen, up to a scale per element.
    assert metrics.nrmse_elements(solution.volume, tiny.truth).mean() < 0.8


def test_a_detector_in_shadow_at_some_tilts_is_made_up_for():
    """Down to two fifths of the counts, many of them: of few, their own noise is more than what the shadow does."""
    data = simulated(24, 17, 9, snr=100.0, haadf_snr=2000)
    visible = 0.7 + 0.3 * np.cos(np.deg2rad(4 * data.chem.angles))[:, None, None]
    expected, even = predict(data, data.truth, data.sensitivity), np.full_like(visible, visible.mean())
    shaded, dimmer = (replace(data, sensitivity=data.sensitivity * visible.mean(), chem=replace(
        data.chem, projections=np.random.default_rng(5).poisson(expected * seen).astype(np.float32),
        background=np.broadcast_to(data.chem.background * seen, expected.shape))) for seen in (visible, even))
    chosen = {"iterations": 60, "lambda_tv": 1.0}
    solution = reconstruct(shaded, settings(**chosen, tilts="haadf"))
    product = solution.fields["tilt_factors"] * visible[:, 0, 0]
    assert np.abs(product / product.mean() - 1).max() < 0.03
    spoilt, mended, best = (metrics.nrmse_elements(volume, data.truth).mean() for volume in (
        reconstruct(shaded, settings(**chosen)).volume, solution.volume,
        reconstruct(dimmer, settings(**chosen)).volume))
    print(f"in shadow {spoilt:.3f}, made up for {mended:.3f}, as many counts without shadow {best:.3f}")
    assert mended < 0.96 * spoilt and mended < 1.08 * best


@pytest.mark.parametrize("method", ["fused", "chem_tv", "ml", "sirt"])
def test_factors_of_one_are_none(tiny, method, monkeypatch):
    """A sensitivity for each tilt, all alike, is that of the element."""
    plain = reconstruct(tiny, settings(method=method))
    monkeypatch.setattr(fused3d.responses, "tilt_factors", lambda data, how: np.ones(data.chem.projections.shape[:2]))
    lit = reconstruct(replace(tiny), settings(method=method, tilts="equal"))
    assert distance(lit.volume, plain.volume) < 2e-3
    assert {k: v for k, v in lit.metrics.items() if "sens" in k} == pytest.approx(
        {k: v for k, v in plain.metrics.items() if "sens" in k})


@pytest.mark.slow
def test_volumes_need_not_be_as_deep_and_wide_as_the_detector(tiny):
    solution = reconstruct(replace(tiny, shape=(12, 20, 16), truth=None), settings())
    assert solution.ok and solution.volume.shape == (4, 12, 20, 16) and np.isfinite(solution.volume).all()
    assert solution.history["total"][-1] < solution.history["total"][0]


def test_prediction_is_the_forward_model_of_the_data(tiny):
    expected = predict(tiny, tiny.truth, tiny.sensitivity)
    assert expected.shape == tiny.chem.projections.shape
    deviance = metrics.poisson_deviance(tiny.chem.projections, expected) / expected.size
    assert deviance == pytest.approx(1, abs=0.25)  # 1.15 at one count per pixel
    empty = predict(tiny, 0 * tiny.truth, tiny.sensitivity)
    np.testing.assert_allclose(empty, np.broadcast_to(tiny.chem.background, empty.shape))


@pytest.mark.parametrize("method", [*DESCENTS, "ml", "sirt"])
def test_checkpoints_show_the_way_to_the_solution(tiny, method):
    seen = {}
    solution = reconstruct(tiny, settings(method=method), checkpoints=[1, 10, 30],
                           observe=lambda n, v: seen.update({n: v}))
    assert list(seen) == [1, 10, 30]
    np.testing.assert_array_equal(seen[30], solution.volume)
    assert distance(seen[1], solution.volume) > distance(seen[10], solution.volume) > 0
    assert solution.volume.dtype == np.float32 and solution.volume.min() >= 0


# ---- What must not go wrong


@pytest.mark.slow
@pytest.mark.parametrize(("method", "counts"), [("fused", False), *((method, True) for method in DESCENTS)])
def test_every_combination_of_weights_over_eight_decades_is_finite(tiny, method, counts):
    data = tiny if counts else as_net_counts(tiny)
    for lambdas in itertools.product((1e-4, 1, 1e4), repeat=3):
        weights = dict(zip(("lambda_model", "lambda_chem", "lambda_tv"), lambdas, strict=True))
        solution = reconstruct(data, settings(method=method, iterations=15, **weights))
        assert solution.ok and np.isfinite(solution.volume).all()
        assert solution.status == "finished 15 iterations"
        assert all(np.isfinite(values).all() for values in solution.history.values())


@pytest.mark.parametrize("method", ["fused", "chem_tv"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_value_that_is_not_finite_stops_with_a_status(tiny, method, value):
    """The data classes refuse such data; should one arise on the way, the solve says so."""
    problem = problem_of(tiny)
    field = "images" if method == "fused" else "maps"
    index = (0,) * getattr(problem, field).ndim
    problem = problem._replace(**{field: getattr(problem, field).at[index].set(value)})
    both = (fused3d.starter(True), fused3d._STEP[True]) if method == "fused" else descent.solver(method, True)[:2]
    outcome = iterate.outcomes(iterate.solve(both[1], problem, sharding.spread(both[0], 1)(problem), 30))[0]
    assert not outcome.ok and outcome.iterations < 30
    assert "not finite" in outcome.status


def test_a_failed_solve_says_so_and_has_no_volume_to_trust(tiny, monkeypatch):
    problem = problem_of(tiny)
    broken = problem._replace(images=problem.images.at[0, 0, 0].set(jnp.inf))
    monkeypatch.setattr(model, "build", lambda *args, **kwargs: broken)
    solution = reconstruct(tiny, settings())
    assert not solution.ok and "not finite" in solution.status


@pytest.mark.parametrize("method", ["fused", "plain", "fista"])
def test_methods_that_need_images_refuse_data_without(tiny, method):
    with pytest.raises(DataError, match="needs HAADF"):
        reconstruct(replace(tiny, haadf=None), settings(method=method))


@pytest.mark.slow
def test_maps_alone_are_reconstructed_as_if_the_images_were_not_there(tiny):
    chosen = settings(method="chem_tv")
    alone = reconstruct(replace(tiny, haadf=None), chosen).volume
    assert distance(alone, reconstruct(tiny, chosen).volume) < 1e-5


def test_thirty_trials_compile_once(tiny):
    """Weights, power, noise, data, and tilt counts of one bucket are all traced."""
    similar = simulated(16, 11, 7, seed=1)
    reconstruct(tiny, settings())
    before = _compiled()
    rng = np.random.default_rng(0)
    for trial in range(30):
        data = with_images(similar if trial % 2 else tiny, noise=np.array([rng.uniform(20, 200)]))
        lambdas = dict(zip(("lambda_model", "lambda_chem", "lambda_tv"), 10 ** rng.uniform(-2, 2, 3), strict=True))
        reconstruct(data, settings(gamma=rng.uniform(1, 2), inner=int(rng.integers(1, 9)), tolerance=1e-9,
                                   iterations=int(rng.integers(2, 12)), **lambdas), held_out=(trial % 5,))
    assert _compiled() == before


def _compiled():
    spread = partial(sharding.spread, devices=1)
    programs = (sharding.spread(iterate._advancing(fused3d._STEP[True], None), 1, donate=(1,)),
                spread(fused3d._batched(fused3d.starter(True), None)), spread(model._starter((16, 16))),
                model.project, model.backproject)
    return [program._cache_size() for program in programs]


# ---- Several at once, and solves that are taken up again


def batch_of(**changes):
    return [settings(lambda_model=lambda_model, lambda_tv=lambda_tv, gamma=gamma, **changes)
            for lambda_model, lambda_tv, gamma in ((1, 0.1, 1.6), (0.01, 1, 1.6), (30, 0.5, 1.4))]


@pytest.mark.parametrize("method", ["fused", "chem_tv"])
def test_a_batch_solves_what_its_members_solve_alone(tiny, method):
    batch, passed = batch_of(method=method, iterations=12, tolerance=0.0), {}
    together = fused3d.reconstruct_batch(tiny, batch, checkpoints=[5],
                                         observe=lambda k, n, volume: passed.update({k: volume}))
    for k, (each, solution) in enumerate(zip(batch, together, strict=True)):
        alone = reconstruct(tiny, each, checkpoints=[5], observe=lambda n, volume: passed.update({"alone": volume}))
        assert distance(solution.volume, alone.volume) < 1e-4
        assert distance(passed[k], passed["alone"]) < 1e-4
        assert solution.status == alone.status
        assert solution.history["total"] == pytest.approx(alone.history["total"], rel=1e-4)


def test_members_of_a_batch_stop_by_themselves(tiny):
    solutions = fused3d.reconstruct_batch(tiny, batch_of(iterations=100, tolerance=2e-2))
    counts = [solution.metrics["iterations"] for solution in solutions]
    assert len(set(counts)) == 3 and sorted(counts)[1] < 100
    for count, solution in zip(counts, solutions, strict=True):
        assert len(solution.history["total"]) == count + 1
        assert ("converged" in solution.status) == (count < 100)


def test_settings_of_a_batch_differ_in_numbers_alone(tiny):
    with pytest.raises(ValueError, match="lambda_tv alone"):
        fused3d.reconstruct_batch(tiny, [settings(), settings(iterations=3)])


def test_a_solve_that_was_cut_off_is_taken_up_again(tiny, tmp_path):
    """The state on the disk is the state of the loop: the rest of the solve is the same, and the file goes."""
    keep = iterate.Keep(tmp_path / "partial" / "state.npz", "this one", seconds=0)
    chosen = settings(iterations=40, tolerance=0.0)
    whole = reconstruct(tiny, chosen)

    class Cut(Exception):
        pass

    def cut(n, volume):
        raise Cut

    with pytest.raises(Cut):
        reconstruct(tiny, chosen, checkpoints=[30], observe=cut, keep=keep)
    assert keep.path.exists()
    seen = []
    rest = reconstruct(tiny, chosen, checkpoints=[1, 35], observe=lambda n, volume: seen.append(n), keep=keep)
    assert seen == [35] and not keep.path.exists()
    assert distance(rest.volume, whole.volume) < 1e-6 and len(rest.history["total"]) == 41
    keep.path.write_bytes(b"torn")
    assert distance(reconstruct(tiny, chosen, keep=keep).volume, whole.volume) < 1e-6


@pytest.mark.slow
def test_duals_of_16_bits_find_the_same_volume():
    """bfloat16 has 8 binary digits: what it loses must not show where the noise is ten times larger."""
    data = simulated(24, 17, 9)
    found = [reconstruct(data, settings(lambda_tv=0.7, dual_bits=bits)) for bits in (32, 16)]
    scores = [float(metrics.nrmse_elements(solution.volume, data.truth).mean()) for solution in found]
    assert 0 < distance(found[1].volume, found[0].volume) < 0.01
    assert scores[1] == pytest.approx(scores[0], rel=2e-3)


def test_images_that_maps_do_not_make_up_are_told_of_once_for_all_trials(monkeypatch):
    """A specimen so thick that its contrast turns over; the fit, which takes long, is made once."""
    data = simulated(24, 17, 9, snr=5.0)
    responses.check(data)  # no warning: they would be errors here
    images = data.haadf.projections
    thick, fits = with_images(data, projections=images * np.exp(-6 * images / images.max())), []
    fit = responses.fit
    monkeypatch.setattr(responses, "fit", lambda given: fits.append(given) or fit(given))
    for _ in range(2):
        with pytest.warns(DataWarning, match=r"HAADF is not a weighted sum of the maps of Co, Cu, O, Au: R\^2 is 0"):
            responses.check(thick)
    assert len(fits) == 1
    responses.check(replace(data, haadf=None))
