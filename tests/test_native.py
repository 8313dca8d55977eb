"""The C forms of the operators against the JAX reference; how they are compiled, and what if they are not."""

import os
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import native
from engine.penalties import prox_tv_reference
from engine.projector import backproject_reference, geometry, project_reference
from tests.specimens import distance

ANGLES = [-90, -70, -45, -45.001, -12.3, 0, 1e-3, 30, 45, 63.4, 90]
FLOOR = 0.05
# x is handled 64 planes at a time, in vectors of 16: below, at and beyond both; the last has more rows than a tile
# of the projector holds. (shape, pixels)
SIZES = [((5, 9, 1), 7), ((9, 5, 5), 12), ((1, 6, 16), 6), ((6, 1, 37), 9), ((12, 7, 64), 16), ((7, 10, 70), 10),
         ((2, 3, 4, 5, 130), 8), ((70, 66, 3), 70)]

# Without optimisation: the reference costs more to compile than to run.
jitted = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

pytestmark = pytest.mark.skipif(not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))),
                                reason="no C compiler")


@pytest.fixture(autouse=True, scope="module")
def compiled():
    assert native.ready()


def uniform(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


def inner(a, b):
    return float(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)))


# ---- Projector


def tilts(padding=3):
    """Steep, flat, on the axes and on the diagonals, of unequal weight; one held out, some padding."""
    rays = geometry(ANGLES, len(ANGLES) + padding)
    weight = np.r_[np.linspace(0.5, 2, len(ANGLES)), np.zeros(padding)]
    weight[4] = 0
    return rays._replace(weight=jnp.asarray(weight, jnp.float32))


@partial(jitted, static_argnames=("pixels", "plain"))
def operators(volume, images, rays, pixels, plain):
    forward, back = ((project_reference, backproject_reference) if plain else (native.project, native.backproject))
    return forward(volume, rays, pixels), back(images, rays, *volume.shape[-3:-1])


@pytest.mark.parametrize(("shape", "pixels"), SIZES, ids=str)
def test_projector_equals_the_reference_and_is_its_own_adjoint(shape, pixels):
    rays = tilts()
    volume, images = uniform(shape), uniform((*shape[:-3], len(rays.angles), pixels, shape[-1]), 1)
    forward, back = operators(volume, images, rays, pixels, False)
    expected = operators(volume, images, rays, pixels, True)
    assert distance(forward, expected[0]) < 1e-6 and distance(back, expected[1]) < 1e-6
    assert not np.asarray(forward)[..., len(ANGLES):, :, :].any() and not np.asarray(forward)[..., 4, :, :].any()
    assert inner(forward, images) == pytest.approx(inner(volume, back), rel=1e-6)


def test_tilts_without_weight_leave_nothing():
    rays = tilts()._replace(weight=jnp.zeros(len(ANGLES) + 3))
    forward, back = operators(uniform((5, 6, 70)), uniform((len(ANGLES) + 3, 8, 70)), rays, 8, False)
    assert not np.asarray(forward).any() and not np.asarray(back).any()


def test_rays_off_the_grid_see_nothing():
    """A detector far wider than the volume, and one far narrower."""
    rays, volume = tilts(), uniform((6, 4, 5))
    wide, narrow = (np.asarray(native.project(volume, rays, pixels)) for pixels in (200, 2))
    assert not wide[:, :90].any() and not wide[:, 110:].any()
    np.testing.assert_allclose(narrow, wide[:, 99:101], rtol=1e-5, atol=1e-6)
    assert distance(native.backproject(wide, rays, 6, 4), backproject_reference(jnp.asarray(wide), rays, 6, 4)) < 1e-6


def test_projector_under_jit_vmap_and_loops():
    rays, volume = tilts(), uniform((3, 5, 6, 7))

    def normal(volume):
        return native.backproject(native.project(volume, rays, 8), rays, 5, 6) / 1000

    whole = normal(volume)
    one_by_one = jnp.stack([normal(v) for v in volume])
    np.testing.assert_array_equal(whole, one_by_one)
    np.testing.assert_array_equal(jax.jit(jax.vmap(normal))(volume), one_by_one)
    looped = jax.jit(lambda v: jax.lax.fori_loop(0, 3, lambda _, v: normal(v), v))(volume)
    np.testing.assert_allclose(looped, normal(normal(whole)), rtol=1e-6)
    # Over angles too: each volume with its own list.
    turned = rays._replace(angles=jnp.stack([rays.angles, rays.angles + 0.1, -rays.angles]))
    images = jax.vmap(lambda v, a: native.project(v, rays._replace(angles=a), 8))(volume, turned.angles)
    for k in range(3):
        assert distance(images[k], project_reference(volume[k], rays._replace(angles=turned.angles[k]), 8)) < 1e-6


# ---- Total variation


def dual_problem(shape, weight, seed=0):
    """A volume, a metric over two decades, and a dual field within the weight."""
    rng = np.random.default_rng(seed)
    field = rng.normal(size=(3, *shape)) * weight
    field *= np.minimum(1, weight / np.sqrt((field**2).sum(0)))
    return tuple(jnp.asarray(a, jnp.float32) for a in (
        rng.normal(0.3, 1, shape), 10 ** rng.uniform(-1.5, 0.5, shape), *field))


def traced_prox(volume, metric, z, y, x, weight, steps, low, high, plain=False):
    form = prox_tv_reference if plain else partial(native.prox_tv, dual_only=False)
    numbers = jnp.float32(weight), jnp.float32(FLOOR), *(jnp.int32(n) for n in (steps, low, high))
    return form(volume, metric, (z, y, x), *numbers)


prox = jitted(traced_prox, static_argnames="plain")


@pytest.mark.parametrize("shape", [shape for shape, _ in SIZES], ids=str)
def test_tv_equals_the_reference(shape):
    problem, planes = dual_problem(shape, 0.4), shape[-1]
    # Any number of steps, in one pass over memory or several; spans that end inside, at the ends and beyond.
    for steps, low, high in ((0, 0, planes), (1, 1, planes - 1), (3, -7, planes + 9), (7, 0, planes),
                             (13, 2, planes), (18, 0, planes // 2)):
        ours, reference = (prox(*problem, 0.4, steps, low, high, plain=plain) for plain in (False, True))
        assert distance(ours[0], reference[0]) < 2e-6
        assert distance(np.stack(ours[1]), np.stack(reference[1])) < 2e-6
    np.testing.assert_array_equal(prox(*problem, 0, 3, 0, planes)[0], np.maximum(problem[0], np.float32(FLOOR)))


def test_the_dual_is_raised_in_place_but_never_in_the_callers_memory():
    """Inside one program too, where what went in is read once more behind the call."""
    volume, metric, *field = dual_problem((2, 9, 5, 20), 0.4)
    before = [np.array(f) for f in field]
    numbers = jnp.float32(0.4), jnp.float32(FLOOR), *(jnp.int32(n) for n in (3, 0, 20))
    expected = prox(volume, metric, *field, 0.4, 3, 0, 20)[1]
    u, alone = native.prox_tv(volume, metric, tuple(field), *numbers, dual_only=True)
    assert u is None
    kept, within = jax.jit(lambda f: (native.prox_tv(volume, metric, f, *numbers, dual_only=True)[1], f))(tuple(field))
    for k in range(3):
        np.testing.assert_array_equal(field[k], before[k])
        np.testing.assert_array_equal(within[k], before[k])
        np.testing.assert_array_equal(alone[k], expected[k])
        np.testing.assert_array_equal(kept[k], expected[k])


def test_tv_under_vmap_and_loops():
    volume, metric, *field = dual_problem((3, 4, 5, 6), 0.4)
    weights = jnp.asarray([0.05, 0.4, 1.0])

    def smooth(volume, metric, field, weight):
        return traced_prox(volume, metric, *field, weight, 3, 0, 6)

    together = jax.jit(jax.vmap(smooth))(volume, metric, tuple(field), weights)
    for k in range(3):
        one = smooth(volume[k], metric[k], [f[k] for f in field], weights[k])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, k=k: a[k], together), one)
    twice = jax.jit(lambda: jax.lax.fori_loop(
        0, 2, lambda _, field: smooth(volume, metric, field, 0.4)[1], tuple(field)))()
    np.testing.assert_allclose(np.stack(twice), np.stack(prox(volume, metric, *field, 0.4, 6, 0, 6)[1]), atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_a_broken_voxel_is_seen(steps):
    volume, *rest = dual_problem((9, 6, 20), 0.4)
    for z, y, x in ((0, 0, 0), (4, 3, 10), (8, 5, 19)):
        assert np.isnan(prox(volume.at[z, y, x].set(jnp.nan), *rest, 0.4, steps, 0, 20)[0][z, y, x])


@pytest.mark.parametrize("plain", [False, True], ids=["native", "reference"])
@pytest.mark.parametrize(("dtype", "digits"), [(jnp.bfloat16, 8), (jnp.float16, 11)], ids=str)
def test_duals_of_16_bits_lose_their_last_digit_only(dtype, digits, plain):
    volume, metric, *field = dual_problem((4, 5, 6), 0.4)
    field = [f.astype(dtype) for f in field]
    short = prox(volume, metric, *field, 0.4, 3, 0, 6, plain=plain)
    exact = prox(volume, metric, *(f.astype(jnp.float32) for f in field), 0.4, 3, 0, 6, plain=plain)
    np.testing.assert_array_equal(short[0], exact[0])
    for ours, full in zip(short[1], exact[1], strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), full, rtol=2.0**-digits, atol=1e-7)


# ---- Compiling

CHILD = """
import sys
import numpy as np
from engine import native
from engine.penalties import Dual, prox_tv
from engine.projector import backproject, geometry, project
given = np.load(sys.argv[1])
rays = geometry(given["angles"], 16)
images = project(given["volume"], rays, 20)
back = backproject(images, rays, *given["volume"].shape[-3:-1])
smooth, dual = prox_tv(given["volume"], 0.1, np.float32(0.5), Dual(*given["dual"]), 9, 0.05)
np.savez(sys.argv[2], images=images, back=back, smooth=smooth, dual=np.stack(dual), native=native.ready())
"""


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Processes that all start at once: two share an empty cache, one has no compiler."""
    folder = tmp_path_factory.mktemp("native")
    rng = np.random.default_rng(0)
    np.savez(folder / "given.npz", volume=rng.random((2, 40, 18, 70), np.float32), angles=np.asarray(ANGLES),
             dual=np.zeros((3, 2, 40, 18, 70), np.float32))
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "TOMOATLAS_"))}
    settings = {"one thread": {"OMP_NUM_THREADS": "1"}, "three threads": {"OMP_NUM_THREADS": "3"},
                "no compiler": {"CC": "/nonexistent", "XDG_CACHE_HOME": str(folder / "bare")}}
    running = {name: subprocess.Popen([sys.executable, "-c", CHILD, folder / "given.npz", folder / f"{name}.npz"],
                                      env=plain | {"XDG_CACHE_HOME": str(folder / "cache")} | env,
                                      stderr=subprocess.PIPE, text=True) for name, env in settings.items()}
    said = {name: process.communicate(timeout=300)[1] for name, process in running.items()}
    assert all(process.returncode == 0 for process in running.values()), said
    return {name: dict(np.load(folder / f"{name}.npz")) for name in settings}, said, folder


def test_any_number_of_threads_gives_one_answer(children):
    one, three = (children[0][name] for name in ("one thread", "three threads"))
    assert one["native"] and three["native"]
    for kind in ("images", "back", "smooth", "dual"):
        assert distance(three[kind], one[kind]) < 1e-6


def test_processes_that_compile_at_once_leave_one_library(children):
    (kept,) = children[2].joinpath("cache", "tomoatlas").iterdir()
    assert [path.suffix for path in kept.iterdir()] == [".so"]


def test_without_a_compiler_the_reference_answers(children):
    answers, said, _ = children
    assert not answers["no compiler"]["native"]
    for kind in ("images", "back", "smooth", "dual"):
        assert distance(answers["no compiler"][kind], answers["one thread"][kind]) < 2e-6
    assert "RuntimeWarning: the operators in C could not be compiled or loaded: " in said["no compiler"]
    assert said["one thread"] == said["three threads"] == ""


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("TOMOATLAS_NATIVE", "0")
    assert not native.ready.__wrapped__()


@pytest.mark.parametrize(("compiler", "cache", "reason"), [
    ("/nonexistent", "{}", "/nonexistent"), ("false -shared", "{}", "false -shared says: nothing"),
    (None, "/dev/null", "Not a directory"), (None, "{}", "no C compiler was found")])
def test_what_cannot_be_compiled_is_a_warning(compiler, cache, reason, tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TOMOATLAS_NATIVE", raising=False)
    if compiler:
        monkeypatch.setenv("CC", compiler)
    elif cache == "{}":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", cache.format(tmp_path))
    with pytest.warns(RuntimeWarning, match=reason):
        assert not native.ready.__wrapped__()
    assert not list(tmp_path.rglob("*.partial"))
