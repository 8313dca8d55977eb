"""What a solve is said to need, against what XLA says of the compiled loop, and against the benchmarks' page."""

import jax
import numpy as np
import pytest

from engine import descent, estimate, fused3d, hebt, iterate, model
from tests.specimens import simulated

PAGE = f"""# Benchmarks

## GPU: solves

A machine.

{'| size | elements | haadf tilts | chem tilts | ms per iteration | s per solve |'}
|---|---|---|---|---|---|
| 128 | 4 | 47 | 9 | 1.50 | 0.10 |
| 256 | 4 | 47 | 9 | 8.00 | 0.50 |

## Another section

| 64 | 4 | 47 | 9 | 99.0 | 99.0 |
"""


def estimated(method="fused", size=32, haadf=9, chem=5, inner=4, **options):
    return estimate.solve(system="fused3d", method=method, elements=4, shape=(size,) * 3, haadf_tilts=haadf,
                          chem_tilts=chem, iterations=10, inner=inner, **options)


@pytest.mark.parametrize(("method", "size", "haadf", "chem"), [
    ("fused", 32, 9, 5), ("fused", 32, 47, 13), ("chem_tv", 32, 0, 9), ("plain", 24, 9, 5), ("fista", 24, 9, 5),
    ("ml", 32, 0, 9), ("sirt", 32, 0, 5)])
def test_bytes_are_those_of_the_compiled_loop(method, size, haadf, chem):
    """Problem, state and the temporary memory that XLA plans; the estimate may be 15 % off."""
    data = simulated(size, haadf, chem)
    problem = model.build(data, gamma=1.6, lambda_model=1, lambda_chem=1, lambda_tv=0.1, weights="z_gamma", inner=4)
    fused = (fused3d.starter(True), fused3d._STEP[True])
    begin, step = fused if method == "fused" else descent.solver(method, True)[:2]
    state, terms = jax.jit(begin)(problem)
    run = iterate.Run(state, np.int32(0), np.int32(0), np.zeros((65, len(terms)), np.float32))
    loop = jax.jit(iterate._advancing(step, None), donate_argnums=(1,))
    memory = loop.lower(problem, run, np.int32(3), np.float32(0)).compile().memory_analysis()
    planned = sum(a.nbytes for a in jax.tree.leaves((problem, state))) + memory.temp_size_in_bytes
    inner = 0 if method in ("ml", "sirt") else 4
    assert sum(estimated(method, size, haadf, chem, inner).bytes.values()) == pytest.approx(planned, rel=0.15)


@pytest.mark.parametrize(("method", "momentum", "haadf", "chem"), [
    ("hebt", True, 31, 31), ("hebt", True, 47, 13), ("hebt", False, 31, 31), ("eds", True, 0, 5),
    ("eds", False, 0, 13)])
def test_bytes_of_sirt_are_those_of_the_compiled_loop(method, momentum, haadf, chem, monkeypatch):
    data, seen = simulated(32, max(haadf, 5), chem), []

    def spied(advance, problem, begun, iterations, **options):
        seen.append((advance, problem, begun[0]))
        run = iterate.Run(begun[0], np.int32(0), np.int32(0), np.zeros((65, 3), np.float32))
        loop = jax.jit(iterate._advancing(advance, None), donate_argnums=(1,))
        memory = loop.lower(problem, run, np.int32(3), np.float32(0)).compile().memory_analysis()
        seen.append(sum(a.nbytes for a in jax.tree.leaves((problem, begun[0]))) + memory.temp_size_in_bytes)
        return solve(advance, problem, begun, iterations, **options)

    solve = hebt.solve
    monkeypatch.setattr(hebt, "solve", spied)
    form = "preconditioned" if momentum else "paper"
    hebt.reconstruct(data, hebt.Settings(method, form, iterations=1))
    need = estimate.solve(system="hebt", method=method, elements=4, shape=(32,) * 3, haadf_tilts=haadf,
                          chem_tilts=chem, iterations=10, inner=0, momentum=momentum)
    assert sum(need.bytes.values()) == pytest.approx(seen[-1], rel=0.15)


def test_devices_share_the_bytes_and_not_the_seconds():
    one, four = estimated(size=64), estimated(size=64, devices=4)
    assert sum(four.bytes.values()) == pytest.approx(sum(one.bytes.values()) / 4, rel=1e-6)
    assert four.seconds_gpu == one.seconds_gpu


def test_seconds_are_scaled_from_the_nearest_measured_solve():
    rows = estimate.measured(PAGE, "gpu")
    assert [(row.size, row.milliseconds) for row in rows] == [(128, 1.5), (256, 8.0)]
    assert estimate.measured(PAGE, "core") == []
    assert estimated(size=256, haadf=47, chem=9, gpu=rows).seconds_gpu == pytest.approx(0.08)
    assert estimated(size=128, haadf=47, chem=9, gpu=rows).seconds_gpu == pytest.approx(0.015)
    near = estimated(size=240, haadf=47, chem=9, gpu=rows).seconds_gpu
    assert near == pytest.approx(0.08 * (240 / 256) ** 3)


def test_other_systems_are_refused():
    with pytest.raises(ValueError, match="no estimate for system mset"):
        estimate.solve(system="mset", method="fused", elements=1, shape=(8, 8, 8), haadf_tilts=1, chem_tilts=1,
                       iterations=1, inner=0)
