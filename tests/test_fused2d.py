"""Laws of fused 2D microscopy: gradients, costs, an independent optimiser, scales, doses, refusals."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from engine import fused2d, model, phantoms2d, pyramid, simulate
from engine.data import DataError
from engine.fused2d import DataWarning, Settings, reconstruct
from engine.metrics import peak_rmse
from tests.specimens import as_net_counts, distance, with_images, with_maps

SIZE = 32


def measured(name="coscoo", *, size=SIZE, snr=10.0, haadf=100.0, weights="z_gamma", seed=0, **more):
    """A specimen of 2D microscopy at one SNR for all its maps."""
    elements, pixel = phantoms2d.ELEMENTS[name], phantoms2d.FIELD_NM[name] / size
    return simulate.microscopy(
        phantoms2d.phantom(name, size), tuple(elements.values()), tuple(elements), pixel_size=pixel,
        snr=dict.fromkeys(elements, snr) | {"haadf": haadf}, weights=weights, seed=seed, **more)


@pytest.fixture(scope="module")
def data():
    return measured()


def problem_of(data, gamma=1.7, weights="z_gamma", lambda_model=1.0, lambda_chem=1.0, lambda_tv=0.3):
    return model.build(data, gamma=gamma, lambda_model=lambda_model, lambda_chem=lambda_chem, lambda_tv=lambda_tv,
                       weights=weights, inner=4)


def error(solution, data):
    return float(np.sqrt(np.mean((solution.volume - data.truth) ** 2, dtype=float)))


# ---- Gradients


@partial(jax.jit, static_argnums=3)
def smooth_cost(problem, x, gain, counts):
    """The two smooth terms with their weights."""
    pull = fused2d._pull(problem, x, model.scattering(problem, x), counts)
    terms = fused2d._cost(problem, x, pull, gain, True)
    return problem.lambda_model * terms[0] + problem.lambda_chem * terms[1]


@partial(jax.jit, static_argnums=3)
def slope(problem, x, gain, counts):
    """Its gradient as the solver takes it."""
    pull = fused2d._pull(problem, x, model.scattering(problem, x), counts)
    return pull.slope + model.scattering_slope(problem, x) * fused2d._image_pull(problem, pull, gain, True)


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize(("gamma", "weights"), [(1.0, "z_gamma"), (1.7, "z_gamma"), (2.0, "z_gamma"),
                                                (1.7, "z_gamma_linear"), (1.7, "z")])
def test_the_gradient_agrees_with_finite_differences(data, gamma, weights, counts):
    problem = problem_of(data if counts else as_net_counts(data), gamma, weights, 7.0, 0.5)
    rng = np.random.default_rng(1)
    x, gain = jnp.asarray(0.3 + 0.5 * rng.random(data.truth.shape), jnp.float32), jnp.float32(0.7)
    own = np.asarray(slope(problem, x, gain, counts), np.float64)
    assert distance(own, jax.grad(smooth_cost, 1)(problem, x, gain, counts)) < 1e-5
    for _ in range(4):
        v = rng.normal(size=x.shape).astype(np.float32)
        ahead, behind = (float(smooth_cost(problem, x + h * v, gain, counts)) for h in (0.01, -0.01))
        assert (ahead - behind) / 0.02 == pytest.approx(np.vdot(v, own), rel=1e-2)


def test_weights_are_what_they_are_called(data):
    """The image of a unit of each element: Z^gamma, Z^gamma and Z, each over the largest; the power 1 where linear."""
    numbers = np.array(data.numbers)
    for weights, contrast, power in (("z_gamma", numbers**1.7, 1.7), ("z_gamma_linear", numbers**1.7, 1.0),
                                     ("z", numbers, 1.7)):
        problem = problem_of(data, weights=weights)
        np.testing.assert_allclose(np.ravel(problem.contrast), contrast / contrast.max(), rtol=1e-6)
        assert float(problem.gamma) == pytest.approx(power)


# ---- Costs


@pytest.mark.parametrize("weights", ["z_gamma", "z_gamma_linear"])
@pytest.mark.parametrize("snr", [1.5, 10.0])
def test_the_cost_never_rises_once_the_gain_is_frozen(weights, snr):
    data = measured(snr=snr, weights=weights)
    for lambda_model, lambda_tv in ((1, 0.3), (100, 0.3), (0.01, 3), (1, 10)):
        solution = reconstruct(data, Settings(weights=weights, lambda_model=lambda_model, lambda_tv=lambda_tv,
                                              iterations=80))
        total = solution.history["total"]
        assert solution.ok and (np.diff(total[15:]) <= 3e-6 * total[-1]).all() and total[-1] < total[0]
        weighted = lambda_model * solution.history["model"] + solution.history["chem"]
        np.testing.assert_allclose(total, weighted + lambda_tv * solution.history["tv"], rtol=1e-4)


def independent(data, problem, gain, weights, smoothing=1e-4):
    """The cost in NumPy and double precision, total variation rounded off by `smoothing`: value and gradient."""
    images, noise = np.asarray(problem.images, float)[0] / gain, float(problem.image_noise) / gain
    contrast = np.array(data.numbers, float)
    contrast = (contrast / contrast.max()).reshape(-1, 1, 1)
    maps, s = data.chem.projections[:, 0].astype(float), data.sensitivity.reshape(-1, 1, 1)

    def cost(flat_x):
        x = flat_x.reshape(maps.shape)
        error = (contrast * x).sum(0) - images
        m = s * x + 1e-5
        y_step, x_step = (np.diff(x, axis=axis, append=np.take(x, [-1], axis)) for axis in (1, 2))
        length = np.sqrt(y_step**2 + x_step**2 + smoothing**2)
        value = (weights[0] / 2 * ((error / noise) ** 2).sum() + weights[2] * (length - smoothing).sum()
                 + weights[1] * (m - maps + maps * np.log(np.where(maps > 0, maps / m, 1))).sum())
        y_pull, x_pull = y_step / length, x_step / length
        bend = -(np.diff(y_pull, axis=1, prepend=0) + np.diff(x_pull, axis=2, prepend=0))
        gradient = (weights[0] * contrast * error / noise**2 + weights[1] * s * (1 - maps / m) + weights[2] * bend)
        return value, gradient.ravel()

    return cost


@pytest.mark.parametrize("lambda_tv", [1e-6, 0.3, 3.0])
def test_the_convex_case_agrees_with_an_independent_optimiser(lambda_tv):
    """gamma = 1 has one minimum, and L-BFGS-B with bounds finds it too, within 1 %."""
    data = measured(size=24)
    settings = Settings(gamma=1.0, lambda_tv=lambda_tv, lambda_model=2.0, lambda_chem=0.7, iterations=400)
    solution = reconstruct(data, settings)
    problem = problem_of(data, 1.0, "z_gamma", 2.0, 0.7, lambda_tv)
    cost = independent(data, problem, solution.metrics["gain"], (2.0, 0.7, lambda_tv))
    begin = np.full(solution.volume.size, 0.3)
    found = minimize(cost, begin, jac=True, method="L-BFGS-B", bounds=[(1e-4, None)] * begin.size,
                     options={"maxiter": 3000, "maxfun": 6000, "ftol": 1e-12, "gtol": 1e-7})
    own = cost(np.maximum(solution.volume, 1e-4).astype(float).ravel())[0]
    assert own == pytest.approx(found.fun, rel=1e-2)
    assert own == pytest.approx(solution.metrics["cost"], rel=1e-3)
    assert distance(solution.volume.ravel(), found.x) < 0.02


def test_other_solvers_find_the_same_minimum(data):
    costs = [reconstruct(data, Settings(method=method, gamma=1.0, iterations=n)).metrics["cost"]
             for method, n in (("fused", 200), ("fista", 600))]
    assert costs[0] == pytest.approx(costs[1], rel=1e-2)


# ---- What must not matter


@pytest.mark.parametrize("method", ["fused", "fista"])
def test_detector_gain_changes_nothing(data, method):
    data = with_images(data, units="intensity")
    plain = reconstruct(data, Settings(method=method))
    louder = with_images(data, projections=1000 * data.haadf.projections, noise=1000 * data.haadf.noise)
    louder = reconstruct(louder, Settings(method=method))
    assert distance(louder.volume, plain.volume) < 1e-3
    inside = data.truth > 0.2  # elsewhere rounding decides what is on the bound
    np.testing.assert_allclose(*(each.fields["standard_error"][inside] for each in (louder, plain)), rtol=1e-2)


def test_units_of_the_maps_change_nothing(data):
    net = with_maps(as_net_counts(data), noise=np.array([3.2, 3.3, 3.1]))
    scaled = with_maps(net, projections=50 * net.chem.projections, noise=50 * net.chem.noise)
    scaled = replace(scaled, sensitivity=50 * data.sensitivity)
    plain, scaled = (reconstruct(each, Settings()) for each in (net, scaled))
    assert distance(scaled.volume, plain.volume) < 1e-3
    inside = data.truth > 0.2
    np.testing.assert_allclose(*(each.fields["standard_error"][inside] for each in (scaled, plain)), rtol=1e-2)


@pytest.mark.parametrize("axis", [2, 3])
def test_a_mirrored_specimen_gives_the_mirrored_maps(data, axis):
    def flipped(series):
        return replace(series, projections=np.flip(series.projections, axis))

    mirrored = replace(data, chem=flipped(data.chem), haadf=flipped(data.haadf))
    plain, mirrored = (reconstruct(each, Settings(iterations=300)).volume for each in (data, mirrored))
    assert distance(np.flip(mirrored, axis), plain) < 1e-2  # forward differences are not symmetric


# ---- What must come out


@pytest.mark.parametrize("weights", ["z_gamma", "z_gamma_linear"])
def test_more_counts_bring_less_error(weights):
    errors = []
    for snr, haadf in ((2, 10), (5, 40), (20, 200), (80, 1000)):
        data = measured(snr=snr, haadf=haadf, weights=weights)
        solution = reconstruct(data, Settings(weights=weights, lambda_tv=0.5))
        errors.append((error(solution, data), solution.metrics["average_standard_error"]))
    assert (np.diff(errors, axis=0) < 0).all()


def test_clean_data_bring_concentrations():
    data = measured(snr=3000.0, haadf=30000.0)
    solution = reconstruct(data, Settings(lambda_tv=1e-3))
    assert distance(solution.volume, data.truth) < 0.02


def test_fused_beats_what_sees_the_maps_alone():
    data = measured("zns_cus", size=48, snr=5.0, haadf=200.0, weights="z_gamma_linear")
    raw = data.chem.projections / data.sensitivity[:, None, None, None]
    fused, alone = (min(error(reconstruct(data, Settings(method=method, weights="z_gamma_linear", lambda_tv=tv)), data)
                        for tv in (0.1, 0.3, 1, 3, 10)) for method in ("fused", "chem_tv"))
    assert fused < 0.8 * alone < 0.8 * float(np.sqrt(np.mean((raw - data.truth) ** 2)))


def test_at_atomic_resolution_the_error_falls_four_times():
    """F2's gain in SNR of 300 %: the error of peak-normalised maps at SNR 5, as a mean over the elements."""
    data = measured("zns_cus", size=128, snr=5.0, haadf=1000.0, weights="z_gamma_linear")
    solution = reconstruct(data, Settings(weights="z_gamma_linear", lambda_tv=4.0))
    raw = peak_rmse(data.chem.projections / data.sensitivity[:, None, None, None], data.truth)
    gain = raw / peak_rmse(solution.volume, data.truth)
    decibels = 20 * np.log10(gain)
    print("; ".join(f"{e} {g:.2f} times, {d:.1f} dB" for e, g, d in zip(data.chem.elements, gain, decibels)))
    assert gain.mean() > 4 and gain.min() > 1.5


def test_where_thickness_varies_the_power_is_of_z_alone():
    """A noise-free CoS/CoO particle misses the image of (Z x)^gamma by 10 to 15 %; that of Z^gamma x fits."""
    truth = phantoms2d.phantom("coscoo", 64)
    contrast = np.array([27.0, 16, 8]) ** 1.7
    image = np.tensordot(contrast, truth, 1)
    scatter = np.tensordot(contrast, truth**1.7, 1)
    gain = np.vdot(image, scatter) / np.vdot(scatter, scatter)
    assert 0.10 < distance(gain * scatter, image) < 0.15


def test_a_map_without_counts_is_refused_and_vacuum_stays_empty(data):
    vacuum = ~(data.truth > 0).any(0)
    solution = reconstruct(data, Settings(lambda_tv=0.3))
    assert (solution.volume[:, vacuum] <= 0.02).all()
    with pytest.raises(DataError, match="leave the element out"):
        with_maps(data, projections=data.chem.projections * np.array([1, 0, 1])[:, None, None, None])


def test_an_element_without_a_map_is_allowed_with_a_warning(data):
    """F2's manganite: the maps that there are still gain from the image, though sulphur has none."""
    part = replace(data, chem=replace(data.chem, projections=data.chem.projections[[0, 2]], elements=("Co", "O"),
                                      background=0.0),
                   numbers=(27, 8), sensitivity=data.sensitivity[[0, 2]], truth=data.truth[[0, 2]])
    with pytest.warns(DataWarning, match="16 .* have no map"):
        fused = reconstruct(part, Settings(missing=(16,), lambda_tv=0.3))
    alone = reconstruct(part, Settings(method="chem_tv", lambda_tv=0.3))
    assert fused.ok and error(fused, part) < error(alone, part)


def test_checkpoints_show_the_way(data):
    seen = {}
    reconstruct(data, Settings(tolerance=0.0, iterations=30), checkpoints=[5, 20], observe=seen.__setitem__)
    assert list(seen) == [5, 20]
    assert distance(seen[20], reconstruct(data, Settings(tolerance=0.0, iterations=20)).volume) < 1e-5


@pytest.mark.parametrize("weights", ["z_gamma", "z_gamma_linear"])
def test_every_combination_of_weights_over_eight_decades_is_finite(data, weights):
    for lambda_model in (1e-4, 1.0, 1e4):
        for lambda_tv in (1e-4, 1.0, 1e4):
            solution = reconstruct(data, Settings(weights=weights, lambda_model=lambda_model, lambda_tv=lambda_tv,
                                                  iterations=40))
            assert solution.ok and solution.history["total"][-1] <= solution.history["total"][0]


# ---- Refusals


def test_what_is_no_plane_is_refused(data, tiny):
    with pytest.raises(DataError, match="system: fused3d"):
        reconstruct(tiny, Settings())
    tilted = replace(data, chem=replace(data.chem, angles=np.array([10.0])))
    with pytest.raises(DataError, match="0 degrees"):
        reconstruct(tilted, Settings())


def test_methods_that_need_an_image_refuse_data_without(data):
    with pytest.raises(DataError, match="chem_tv"):
        reconstruct(replace(data, haadf=None), Settings())
    assert reconstruct(replace(data, haadf=None), Settings(method="chem_tv")).ok


# ---- Coarse to fine


@pytest.mark.parametrize("counts", [True, False])
def test_a_coarser_problem_has_the_same_costs(counts):
    """A map that is even over blocks of 2 x 2 pixels costs the same in pixels of twice the edge, term by term."""
    data = measured(size=64)
    problem = problem_of(data if counts else as_net_counts(data), weights="z_gamma_linear")
    coarse = pyramid.coarser(problem, counts)
    # Stripes: an isotropic TV sees the corners of blocks in its own way.
    stripes = jnp.broadcast_to(coarse.start.mean(-1, keepdims=True), coarse.start.shape)
    even = jnp.kron(stripes, jnp.ones((1, 1, 2, 2)))
    maps = jnp.kron(coarse.maps, jnp.ones((1, 1, 2, 2))) / (4 if counts else 1)
    fine = problem._replace(maps=maps, images=jnp.kron(coarse.images, jnp.ones((1, 2, 2))))
    costs = []
    for each, x in ((fine, even), (coarse, stripes)):
        pull = fused2d._pull(each, x, model.scattering(each, x), counts)
        terms = fused2d._cost(each, x, pull, jnp.float32(0.9), True)
        costs.append([float(each.lambda_model * terms[0]), float(each.lambda_chem * terms[1]),
                      float(each.lambda_tv * terms[2])])
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)


def test_a_start_from_half_the_resolution_is_as_good_and_clears_spurious_atoms():
    """F2's remedy at atomic resolution: counts off the columns fall, and the error does not rise."""
    data = measured("zns_cus", size=96, snr=3.0)
    off = data.truth.sum(0) < np.quantile(data.truth.sum(0), 0.2)
    given = Settings(lambda_tv=0.1, weights="z_gamma_linear", errors="none")
    found = {coarse: reconstruct(data, replace(given, coarse=coarse)).volume for coarse in (0, 40)}
    spurious = {coarse: float(volume[:, off].mean()) for coarse, volume in found.items()}
    wrong = {coarse: float(peak_rmse(volume, data.truth).mean()) for coarse, volume in found.items()}
    assert spurious[40] <= spurious[0] * 1.02 and wrong[40] < 1.02 * wrong[0]
