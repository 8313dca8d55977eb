"""`python -m tests.bench_projector`: projections against ASTRA's, and a TV step against the memory's copy bandwidth.

Core time is CPU time over all threads. Ours is run several times within one compiled program, as a solve does; ASTRA
projects plane by plane, its 'linear' kernel being the same Joseph's method.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine import native
from engine.penalties import Dual, prox_tv_reference, tv_dual, zero_dual
from engine.projector import (
    backproject,
    backproject_reference,
    geometry,
    project,
    project_reference,
)
from tests.bench import apart, publish

SIZE = 256
REPEATS = 5
ASTRA_PLANES = 64  # of SIZE: every plane costs the same
TV_STEPS = 3
FLOOR_BYTES = 32  # of a TV step per voxel: read volume, metric and three duals, write three


def core_ms(function: Callable[[], Any]) -> tuple[float, float]:
    """(wall, core) milliseconds: medians after one call that compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(REPEATS):
        wall, core = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        times.append((time.perf_counter() - wall, time.process_time() - core))
    wall, core = 1e3 * np.median(times, axis=0)
    return float(wall), float(core)


def within(operator: Callable[[Any], Any], start: Any, calls: int, feed: Callable[[Any, Any], Any] | None = None,
           ) -> tuple[float, float]:
    """(wall, core) milliseconds of one call, of `calls` in one program.

    feed(argument, result) makes the next argument; without it the result is the next argument.
    """
    @jax.jit
    def run(start: Any) -> Any:
        if feed is None:
            return jax.lax.fori_loop(0, calls, lambda _, state: operator(state), start)

        def body(_: int, state: tuple[Any, Any]) -> tuple[Any, Any]:
            out = operator(state[0])
            return feed(state[0], out), out

        shape = jax.eval_shape(operator, start)
        empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
        return jax.lax.fori_loop(0, calls, body, (start, empty))[1]

    wall, core = core_ms(lambda: run(start))
    return wall / calls, core / calls


def touch(argument: jax.Array, out: jax.Array) -> jax.Array:
    """The argument, changed by next to nothing in one place, so that no call can be left out."""
    return argument.at[(0,) * argument.ndim].add(1e-9 * out[(0,) * out.ndim])


def astra_ms(volume: np.ndarray, angles: np.ndarray) -> dict[str, float] | None:
    """Core milliseconds of ASTRA's 'linear' projector for the whole volume, scaled from some of its planes."""
    try:
        import astra
    except ImportError:
        return None
    size = volume.shape[0]
    box = astra.create_vol_geom(size, size)
    rays = astra.create_proj_geom("parallel", 1.0, size, np.deg2rad(angles))
    projector = astra.create_projector("linear", rays, box)
    planes = [np.ascontiguousarray(volume[:, :, k]) for k in range(ASTRA_PLANES)]
    sinograms = []

    def forward() -> None:
        sinograms.clear()
        for plane in planes:
            number, sinogram = astra.create_sino(plane, projector)
            sinograms.append(sinogram)
            astra.data2d.delete(number)

    def back() -> None:
        for sinogram in sinograms:
            number, _ = astra.create_backprojection(sinogram, projector)
            astra.data2d.delete(number)

    found = {"project": core_ms(forward)[1], "back": core_ms(back)[1]}
    astra.projector.delete(projector)
    return {name: value * volume.shape[2] / ASTRA_PLANES for name, value in found.items()}


def projector_section() -> str:
    """The table for 47 and 9 tilts."""
    volume = jnp.asarray(np.random.default_rng(0).random((SIZE, SIZE, SIZE)), jnp.float32)
    lines = [f"{SIZE} planes of {SIZE} x {SIZE}, 'linear' (Joseph) in every code; milliseconds of core time, wall time "
             f"in brackets, median of {REPEATS}; the ratio is of core times.", "",
             "| tilts | code | projection | back projection | against ASTRA |", "|---|---|---|---|---|"]
    for tilts in (47, 9):
        angles = np.linspace(-70, 70, tilts)
        rays = geometry(angles)
        peer = astra_ms(np.asarray(volume), angles)
        if peer is None:
            lines.append(f"| {tilts} | ASTRA (not installed: extra `oracles`) | - | - | - |")
        else:
            lines.append(f"| {tilts} | ASTRA, one core | {peer['project']:.0f} | {peer['back']:.0f} | 1 |")
        forms = {"JAX form (the reference)": (project_reference, backproject_reference)}
        if native.ready():
            forms["**ours** (compiled C)"] = (project, backproject)
        for name, (forward, back) in forms.items():
            images = forward(volume, rays, SIZE)
            there = within(partial(forward, rays=rays, pixels=SIZE), volume, 3, touch)
            again = within(partial(back, rays=rays, nz=SIZE, ny=SIZE), images, 3, touch)
            ratio = f"{peer['project'] / there[1]:.0f}, {peer['back'] / again[1]:.0f}" if peer else "-"
            lines.append(f"| {tilts} | {name} | {there[1]:.0f} ({there[0]:.0f}) | {again[1]:.0f} ({again[0]:.0f}) | "
                         f"{ratio} |")
    return "\n".join(lines)


def copy_bandwidth(voxels: int) -> float:
    """GB/s read and written by numpy's copy between two arrays that are there already, on one core."""
    source = np.ones(voxels, np.float32)
    target = source.copy()
    calls = max(1, 2**26 // voxels)
    _, core = core_ms(lambda: [np.copyto(target, source) for _ in range(calls)])
    return 8 * voxels * calls / core * 1e-6


def _by_product(volume: jax.Array, metric: jax.Array, dual: Dual) -> Dual:
    return tv_dual(volume, 0.1, metric, dual, TV_STEPS)


def _by_reference(volume: jax.Array, metric: jax.Array, dual: Dual) -> Dual:
    weights, spans = (jnp.float32(v) for v in (0.1, 0)), (jnp.int32(v) for v in (TV_STEPS, 0, volume.shape[-1]))
    return Dual(*prox_tv_reference(volume, metric, tuple(dual), *weights, *spans, dual_only=True)[1])


def tv_section() -> str:
    """A TV step at several sizes."""
    lines = [f"One element, {TV_STEPS} steps in a call, the dual alone, as a solve asks for it; nanoseconds per voxel "
             f"and step on one core, median of {REPEATS}. The floor is {FLOOR_BYTES} bytes per voxel and step at one "
             "core's copy bandwidth; the compiled form takes all steps in one pass, and so can pass below it.",
             "",
             "| size | copy, GB/s | floor | JAX form | compiled C | times the floor |", "|---|---|---|---|---|---|"]
    for size in (64, 128, 256):
        rng = np.random.default_rng(0)
        volume, metric = (jnp.asarray(rng.random((size,) * 3) + 0.1, jnp.float32) for _ in range(2))
        copied = copy_bandwidth(size**3)
        floor = FLOOR_BYTES / copied
        found = {}
        for name, form in (("jax", _by_reference), ("c", _by_product)):
            operator = partial(form, volume, metric)
            found[name] = within(operator, zero_dual(volume), 10)[1] * 1e6 / size**3 / TV_STEPS
        compiled = f"{found['c']:.2f} | {found['c'] / floor:.1f}" if native.ready() else "- | -"
        lines.append(f"| {size}^3 | {copied:.0f} | {floor:.2f} | {found['jax']:.2f} | {compiled} |")
    return "\n".join(lines)


def main() -> None:
    """Write both sections."""
    publish("Projector: core time at 256^3", projector_section())
    code = "from tests.bench_projector import tv_section; print(tv_section())"
    publish("Total variation: one inner step", apart(code, threads=1))


if __name__ == "__main__":
    main()
