"""The GPU kernels, run by Pallas' interpreter, against the reference in plain JAX; and that they lower for CUDA.

`python -m tests.bench_gpu` compares them on a GPU.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import kernels, native
from engine.penalties import Dual, primal, prox_tv, prox_tv_reference, zero_dual
from engine.projector import Geometry, backproject_reference, geometry, project, project_reference
from tests.specimens import distance

ANGLES = [-90, -70, -45, -45.001, -12.3, 0, 1e-3, 30, 45, 63.4, 90]
FLOOR = 0.05


def interpreted(function):
    """Compiled without optimisation, which takes half the time: most of it goes to compiling the interpreter."""
    return jax.jit(partial(function), compiler_options={"xla_backend_optimization_level": 0})


def uniform(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


# ---- Projector


@interpreted
def kernel_operators(volume, images, rays):
    pixels, (nz, ny) = images.shape[-2], volume.shape[-3:-1]
    return (kernels.project(volume, rays, pixels, interpret=True),
            kernels.backproject(images, rays, nz, ny, interpret=True))


@pytest.mark.parametrize(("shape", "pixels", "tilts"), [
    ((16, 16, 64), 16, 12),  # whole tiles
    ((2, 9, 14, 70), 31, 13),  # elements, nothing divides
    ((7, 5, 1), 3, 16)], ids=str)
def test_projector_equals_the_reference_and_is_its_own_adjoint(shape, pixels, tilts):
    volume, images = uniform(shape), uniform((*shape[:-3], tilts, pixels, shape[-1]), 1)
    weight = np.r_[np.linspace(0.5, 2, len(ANGLES)), np.zeros(tilts - len(ANGLES))]
    weight[4] = 0  # held out
    rays = geometry(ANGLES, tilts)._replace(weight=jnp.asarray(weight, jnp.float32))
    forward, back = kernel_operators(volume, images, rays)
    assert distance(forward, project_reference(volume, rays, pixels)) < 1e-6
    assert distance(back, backproject_reference(images, rays, *shape[-3:-1])) < 1e-6
    assert not np.asarray(forward)[..., len(ANGLES):, :, :].any()
    left, right = (np.vdot(np.asarray(a, np.float64), b) for a, b in ((forward, images), (volume, back)))
    assert left == pytest.approx(right, rel=1e-6)


# ---- Total variation


def dual_problem(shape, weight, seed=0):
    """A volume, a metric over two decades, and a dual field within the weight."""
    rng = np.random.default_rng(seed)
    field = rng.normal(size=(3, *shape)) * weight
    field *= np.minimum(1, weight / np.sqrt((field**2).sum(0)))
    volume, metric, *field = (jnp.asarray(a, jnp.float32) for a in (
        rng.normal(0.3, 1, shape), 10 ** rng.uniform(-1.5, 0.5, shape), *field))
    return volume, metric, tuple(field)


def numbers(weight, steps, low, high):
    """The arguments of the operator behind its arrays."""
    return jnp.float32(weight), jnp.float32(FLOOR), *(jnp.int32(n) for n in (steps, low, high))


kernel_prox = interpreted(partial(kernels.prox_tv, interpret=True))
reference_prox = jax.jit(prox_tv_reference)


def differences(ours, reference):
    """Of the primal, and of the dual."""
    return distance(ours[0], reference[0]), distance(np.stack(ours[1]), np.stack(reference[1]))


@pytest.mark.parametrize(("shape", "weight"), [((2, 3, 5, 70), 0.3), ((4, 8, 64), 2.0), ((1, 1, 3), 0.5)], ids=str)
def test_tv_equals_the_reference(shape, weight):
    volume, metric, dual = dual_problem(shape, weight)
    planes = shape[-1]
    # Any number of steps; spans that end inside, at the ends and beyond; no weight at all.
    for steps, low, high in ((0, 0, planes), (1, 1, planes - 1), (2, -7, planes + 9), (3, 0, planes), (6, 2, planes)):
        asked = numbers(weight, steps, low, high)
        ours, reference = (f(volume, metric, dual, *asked) for f in (kernel_prox, reference_prox))
        assert max(differences(ours, reference)) < 2e-6
    asked = numbers(0, 1, 0, planes)
    np.testing.assert_array_equal(kernel_prox(volume, metric, dual, *asked)[0], np.maximum(volume, np.float32(FLOOR)))


def test_the_dual_can_be_had_alone():
    volume, metric, dual = dual_problem((4, 8, 64), 2.0)
    alone = partial(kernels.prox_tv, interpret=True, dual_only=True)
    u, field = interpreted(alone)(volume, metric, dual, *numbers(2.0, 3, 0, 64))
    assert u is None
    assert distance(np.stack(field), np.stack(reference_prox(volume, metric, dual, *numbers(2.0, 3, 0, 64))[1])) < 2e-6


def test_a_broken_voxel_is_seen():
    volume, metric, dual = dual_problem((4, 8, 64), 2.0)
    for steps in (0, 3):
        spoiled = kernel_prox(volume.at[1, 2, 3].set(jnp.nan), metric, dual, *numbers(2.0, steps, 0, 64))[0]
        assert np.isnan(spoiled[1, 2, 3])


def test_a_batch_over_weights_is_one_after_the_other():
    volume, metric, dual = dual_problem((2, 3, 5), 0.3)
    weights = jnp.asarray([0.05, 0.3, 1.0])
    rest = numbers(0, 3, 0, 5)[1:]
    together = interpreted(jax.vmap(lambda weight: kernels.prox_tv(volume, metric, dual, weight, *rest,
                                                                   interpret=True)))(weights)
    for k, weight in enumerate(weights):
        one = jax.tree.map(lambda a, k=k: a[k], together)
        assert max(differences(one, reference_prox(volume, metric, dual, weight, *rest))) < 2e-6


@pytest.mark.parametrize(("dtype", "digits"), [(jnp.bfloat16, 8), (jnp.float16, 11)], ids=str)
def test_duals_of_16_bits_lose_their_last_digit_only(dtype, digits):
    volume, metric, dual = dual_problem((3, 4, 9), 0.7)
    dual = tuple(d.astype(dtype) for d in dual)
    asked = numbers(0.7, 1, 0, 9)
    ours, reference = kernel_prox(volume, metric, dual, *asked), reference_prox(volume, metric, dual, *asked)
    assert ours[0].dtype == jnp.float32 and all(field.dtype == dtype for field in ours[1])
    exact = reference_prox(volume, metric, tuple(d.astype(jnp.float32) for d in dual), *asked)
    assert distance(np.stack(ours[1]).astype(np.float32), np.stack(exact[1])) < 2.0**-digits
    # The primal belongs to the duals that are handed on.
    assert distance(ours[0], primal(volume, metric, Dual(*(d.astype(jnp.float32) for d in ours[1])), FLOOR)) < 1e-6
    assert max(differences(ours, reference)) < 2.0**-digits


@pytest.mark.parametrize("steps", range(8))
def test_steps_in_pairs_are_the_steps_asked_for(steps):
    assert int(_repeat(jnp.int32(steps))) == 2**steps


@jax.jit
def _repeat(steps):
    return kernels._repeated(lambda n: 2 * n, jnp.int32(1), steps)


# ---- Lowering for CUDA, which needs no GPU

LAUNCH = "__gpu$xla.gpu.triton"


def launches(function, *shapes, platform="cuda"):
    """Kernel launches in the program that a platform would run."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text().count(LAUNCH)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("shape", [(256, 256, 256), (4, 100, 130, 97), (3, 4, 512, 512, 512)], ids=str)
def test_projector_lowers_for_cuda_as_one_launch_each(shape):
    rays = Geometry(array(48), array(48))
    images = array(*shape[:-3], 48, *shape[-2:])
    assert launches(partial(kernels.project, pixels=shape[-2]), array(*shape), rays) == 1
    assert launches(partial(kernels.backproject, nz=shape[-3], ny=shape[-2]), images, rays) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_tv_lowers_for_cuda_as_one_launch_per_step(dtype):
    volume, number, whole = array(4, 256, 256, 250), array(), array(dtype=jnp.int32)
    field = (array(*volume.shape, dtype=dtype),) * 3
    # Two steps in the loop's body, one or two behind it.
    assert launches(kernels.prox_tv, volume, volume, field, number, number, whole, whole, whole) == 2 + 1 + 2


def test_volumes_beyond_32_bit_offsets_are_refused():
    volume = array(1300, 1300, 1300)
    with pytest.raises(ValueError, match="2,197,000,000 values per element"):
        jax.eval_shape(partial(kernels.project, pixels=8), volume, Geometry(array(4), array(4)))
    with pytest.raises(ValueError, match="more devices"):
        asked = array(), array(), *(array(dtype=jnp.int32),) * 3
        jax.eval_shape(kernels.prox_tv, volume, volume, (volume,) * 3, *asked)


# ---- Which form runs


@pytest.fixture
def gpu(monkeypatch):
    """A process that has a GPU, as far as the choice of forms can see; programs of other tests chose without."""
    jax.clear_caches()
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(native, "ready", lambda: False)
    yield
    jax.clear_caches()


def forward(volume, rays):
    return project(volume, rays, 9)


def descent(volume, rays):
    """A loop of gradient steps, as the solvers have."""
    def step(_, volume):
        return volume - 1e-3 * jax.grad(lambda v: (forward(v, rays) ** 2).sum())(volume)

    return jax.lax.fori_loop(0, 3, step, volume)


def smooth(volume, rays):
    """The proximal operator, beside an argument that it has no use for."""
    return prox_tv(volume, 0.1, jnp.ones_like(volume), zero_dual(volume), 4)


@pytest.mark.parametrize(("function", "count"), [
    (forward, 1), (descent, 2), (jax.vmap(forward, (0, None)), 1), (jax.vmap(descent, (0, None)), 2), (smooth, 5)])
def test_one_trace_serves_cpu_and_gpu(function, count, gpu):
    rays, volume = geometry(ANGLES), uniform((2, 7, 8, 3))
    assert launches(function, volume, rays) == count
    assert launches(function, volume, rays, platform="cpu") == 0


def test_a_cpu_never_meets_a_kernel(gpu):
    """Also where the process has a GPU: outside jit, in a loop, and under pmap."""
    rays, volume = geometry(ANGLES), uniform((1, 7, 8, 3))
    expected = project_reference(volume, rays, 9)
    assert distance(forward(volume, rays), expected) < 1e-6
    assert distance(jax.lax.map(lambda v: forward(v, rays), volume), expected) < 1e-6
    assert distance(jax.pmap(lambda v: forward(v, rays))(volume), expected) < 1e-6


@pytest.mark.parametrize(("capabilities", "fit"), [
    (["9.0"], True), (["8.0", "12.0"], True), (["7.0"], False), (["9.0", "7.5"], False), (None, False)])
def test_kernels_need_a_gpu_that_triton_serves(capabilities, fit, monkeypatch):
    def devices(_):
        if capabilities is None:
            raise RuntimeError("no such platform")
        return [SimpleNamespace(compute_capability=c) for c in capabilities]

    monkeypatch.setattr(jax, "devices", devices)
    assert kernels.available.__wrapped__() is fit


def test_without_gpus_no_kernel_is_traced():
    assert not kernels.available()
    assert launches(forward, array(7, 8, 3), geometry(ANGLES)) == 0


def test_the_benchmark_says_what_it_needs(monkeypatch, capsys):
    from tests import bench_gpu

    monkeypatch.setattr("sys.argv", ["bench_gpu"])
    with pytest.raises(SystemExit) as stopped:
        bench_gpu.main()
    assert stopped.value.code == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
