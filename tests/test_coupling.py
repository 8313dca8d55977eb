"""The coupling of a voxel's elements: against an active-set method in double precision, and its forms alike."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import lsq_linear

from engine import coupling, kernels, native
from engine.coupling import Block, couple_reference
from tests.specimens import distance

FLOOR = 1e-4
# C handles 1024 voxels at a time, in vectors of 16: below, at and beyond both.
SHAPES = [(4, 3, 5, 70), (2, 4, 8, 128), (1, 1, 1, 3), (7, 2, 3, 130), (2, 2, 7, 200)]


def block_of(shape, gamma=1.6, seed=0):
    """A block with elements on the floor and off it, TV's dual, and its plane in front."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x = jnp.maximum(0.3 + 0.5 * normal(*shape), FLOOR)
    bound, contrast = jnp.exp(normal(*shape)), jnp.exp(-abs(normal(shape[0], 1, 1, 1)))
    numbers = (jnp.float32(v) for v in (gamma, 1.3, 2.0, FLOOR))
    block = Block(x, normal(*shape[1:]), normal(*shape), bound, contrast, *numbers)
    return block, tuple(0.3 * normal(*shape) for _ in range(3)), 0.3 * normal(*shape[:-1], 1)


# Without optimisation: Pallas' interpreter costs more to compile than to run.
jitted = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def compiled(form, **constants):
    """A form for TV's target, and for the minimiser."""
    return tuple(jitted(partial(form, final=final, **constants)) for final in (False, True))


reference = compiled(couple_reference)
FORMS = {"reference": reference, "kernel": compiled(kernels.couple, interpret=True)}
if native.ready():
    FORMS["native"] = compiled(native.couple)
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def in_doubles(block, dual, edge):
    """slope, pull, h, and TV's pull, (element, z, y, x), written down once more."""
    x, contrast, gamma = (np.asarray(a, np.float64) for a in (block.x, block.contrast, block.gamma))
    slope = gamma * contrast * x ** (gamma - 1)
    pull = slope * np.asarray(block.images, np.float64)
    h = float(block.scale) * np.asarray(block.bound, np.float64) + (gamma - 1) * np.maximum(pull, 0) / x
    z, y, x = (np.asarray(d, np.float64) for d in dual)
    back = (np.diff(z, axis=1, prepend=0) + np.diff(y, axis=2, prepend=0)
            + np.diff(x, axis=3, prepend=np.asarray(edge, np.float64)))
    return slope, pull, h, -back


def test_the_minimiser_and_the_target_are_those_of_brute_force():
    block, dual, edge = block_of((5, 4, 4, 4))
    slope, pull, h, back = in_doubles(block, dual, edge)
    x, maps, rho = np.asarray(block.x, np.float64), np.asarray(block.maps, np.float64), float(block.rho)
    expected, target = np.empty_like(x), np.empty_like(x)
    for at in np.ndindex(x.shape[1:]):
        here = (slice(None), *at)
        force, s = (pull + maps + back)[here], slope[here]
        root = np.linalg.cholesky(np.diag(h[here]) + rho * np.outer(s, s))
        step = lsq_linear(root.T, -np.linalg.solve(root, force), (FLOOR - x[here], np.inf), "bvls", tol=1e-14).x
        expected[here] = x[here] + step
        target[here] = x[here] - ((pull + maps)[here] + s * rho * (s @ step)) / h[here]
    assert 0.1 < (expected > FLOOR * 1.01).mean() < 0.9
    new, scatter = reference[1](block, dual, edge)
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)
    contrast = np.asarray(block.contrast, np.float64)
    np.testing.assert_allclose(scatter, (contrast * expected**1.6).sum(0), rtol=1e-5, atol=1e-6)
    start, rate = reference[0](block, dual, edge)
    np.testing.assert_allclose(rate, 1 / h, rtol=1e-5)
    np.testing.assert_allclose(start, target, rtol=1e-5, atol=1e-5)


@forms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_forms_agree(form, shape):
    given = block_of(shape)
    for ours, plain in zip(form, reference):
        assert max(map(distance, ours(*given), plain(*given))) < 1e-6


@forms
@pytest.mark.parametrize("gamma", [1.0, 1.6, 2.2])
def test_powers_are_those_of_double_precision(form, gamma):
    """Without any pull the volume stays and scatters c x^gamma; the slope is seen where the images pull."""
    x = jnp.asarray(np.geomspace(FLOOR, 1e3, 4096).reshape(1, 16, 4, 64), jnp.float32)
    one, nothing = jnp.ones((1, 1, 1, 1)), jnp.zeros_like(x)
    numbers = (jnp.float32(v) for v in (gamma, 1, 1, FLOOR))
    new, scatter = form[1](Block(x, nothing[0], nothing, nothing + 1, one, *numbers), (nothing,) * 3, nothing[..., :1])
    np.testing.assert_array_equal(new, x)
    exact = np.asarray(x[0], np.float64) ** np.float32(gamma)
    # XLA's own rounds the logarithm before the product: its error grows with the exponent.
    np.testing.assert_allclose(scatter, exact, rtol=3e-7 if form is FORMS.get("native") else 3e-6)


@forms
@pytest.mark.parametrize("name", ["x", "images", "maps", "bound"])
def test_a_broken_voxel_is_seen(form, name):
    block, dual, edge = block_of((3, 2, 4, 20))
    array = getattr(block, name)
    place = (1, 3, 17)
    broken = block._replace(**{name: array.at[place if array.ndim == 3 else (1, *place)].set(jnp.nan)})
    (target, _), (new, scatter) = (ours(broken, dual, edge) for ours in form)
    assert np.isnan(target[(1, *place)]) and np.isnan(new[(1, *place)]) and np.isnan(scatter[place])
    assert np.isnan(scatter).sum() == 1


@forms
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_duals_of_16_bits_are_widened(form, dtype):
    block, dual, edge = block_of((2, 3, 4, 9))
    dual, edge = tuple(d.astype(dtype) for d in dual), edge.astype(dtype)
    wide = tuple(d.astype(jnp.float32) for d in dual), edge.astype(jnp.float32)
    for ours in form:
        for short, exact in zip(ours(block, dual, edge), ours(block, *wide)):
            assert short.dtype == jnp.float32
            np.testing.assert_array_equal(short, exact)


@forms
def test_a_batch_is_one_after_the_other(form):
    block, dual, edge = block_of((2, 3, 4, 5))
    gammas = jnp.asarray([1.2, 1.6, 2.0])
    for ours in form:
        together = jitted(jax.vmap(lambda g, ours=ours.__wrapped__: ours(block._replace(gamma=g), dual, edge)))(gammas)
        for k, gamma in enumerate(gammas):
            one = ours(block._replace(gamma=gamma), dual, edge)
            assert max(distance(a[k], b) for a, b in zip(together, one)) < 1e-6


@forms
def test_slabs_are_cut_from_the_whole(form):
    """The second half of a volume, told the dual in front of it."""
    block, dual, edge = block_of((2, 3, 4, 24))
    arrays = {name: getattr(block, name)[..., 11:] for name in ("x", "images", "maps", "bound")}
    for ours in form:
        whole = ours(block, dual, edge)
        part = ours(block._replace(**arrays), tuple(d[..., 11:] for d in dual), dual[2][..., 10:11])
        assert max(distance(a, b[..., 11:]) for a, b in zip(part, whole)) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_it_lowers_for_cuda_as_one_launch(dtype):
    block, dual, edge = jax.eval_shape(lambda: block_of((4, 64, 64, 50)))
    dual, edge = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), (dual, edge))
    for final in (False, True):
        traced = jax.jit(partial(kernels.couple, final=final)).trace(block, dual, edge)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("__gpu$xla.gpu.triton") == 1


def test_alone_nothing_lies_in_front():
    block, dual, edge = block_of((2, 3, 4, 5))
    for function, plain in ((coupling.target, reference[0]), (coupling.minimiser, reference[1])):
        assert max(map(distance, function(block, coupling.Dual(*dual)), plain(block, dual, 0 * edge))) < 1e-6
