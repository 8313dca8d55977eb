"""`python -m tests.bench_solver`: seconds of whole solves on this machine's cores, and where they go.

The first table is what `tomoatlas check` reads for its core-hours (its GPU-hours come from `tests.bench_gpu`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine import coupling, fused3d, model, simulate
from engine.data import MultiModal, Solution
from engine.penalties import tv_dual
from engine.phantoms import ELEMENTS, FIELD_NM, phantom
from sweeps.defaults import SNR
from tests.bench import apart, publish
from tests.bench_projector import REPEATS, touch, within

COLUMNS = "| size | elements | haadf tilts | chem tilts | ms per iteration | s per solve |"
WEIGHTS = {"lambda_model": 1.0, "lambda_chem": 1.0, "lambda_tv": 1.0}
ITERATIONS = 60
FEW, MANY = 2, 12  # iterations of the two solves whose difference is the time of an iteration
CELLS = ((48, 17, 9), (64, 47, 9), (128, 47, 9))  # the first is the quickstart's middle cell


def specimen(size: int, haadf: int = 47, chem: int = 9) -> MultiModal:
    """The reference specimen at F3's signal-to-noise ratios."""
    elements = ELEMENTS["cocuo"]
    span = (-70.0, 70.0)
    return simulate.multimodal(
        phantom("cocuo", (size,) * 3, FIELD_NM / size), tuple(elements.values()), tuple(elements),
        pixel_size=FIELD_NM / size, haadf_angles=simulate.spread(span, haadf),
        chem_angles=simulate.chemical_angles(span, haadf, chem), snr=SNR["cocuo"])


def timed(data: MultiModal, iterations: int, repeats: int = REPEATS, slabs: int = 1) -> tuple[float, float]:
    """Median (wall, core) seconds of a solve that is compiled already."""
    settings = fused3d.Settings(iterations=iterations, tolerance=0.0, devices=slabs, **WEIGHTS)
    times = []
    for _ in range(repeats + 1):
        wall, core = time.perf_counter(), time.process_time()
        fused3d.reconstruct(data, settings)
        times.append((time.perf_counter() - wall, time.process_time() - core))
    wall, core = np.median(times[1:], axis=0)
    return float(wall), float(core)


def per_iteration(data: MultiModal, slabs: int = 1) -> tuple[float, float]:
    """(wall, core) seconds of one iteration."""
    few, many = (timed(data, count, slabs=slabs) for count in (FEW, MANY))
    return (many[0] - few[0]) / (MANY - FEW), (many[1] - few[1]) / (MANY - FEW)


def solves() -> str:
    """The table of `check`, in core time."""
    lines = [f"cocuo at F3's SNRs, four TV steps per iteration, {ITERATIONS} iterations without a stopping rule, "
             "coarse solves before; milliseconds and seconds of core time (CPU time over all threads), median of "
             f"{REPEATS}.", "", COLUMNS,
             "|---|---|---|---|---|---|"]
    ends = []
    for size, haadf, chem in CELLS:
        data = specimen(size, haadf, chem)
        each, whole = per_iteration(data)[1], timed(data, ITERATIONS, 1)[1]
        lines.append(f"| {size} | {len(data.chem.elements)} | {haadf} | {chem} | {1e3 * each:.1f} | {whole:.2f} |")
        seconds, solution = stopped(data)
        ends.append(f"{size}^3 {seconds:.2f} s ({solution.status})")
    return "\n".join([*lines, "", "As they come, with the stopping rule, in core seconds: " + "; ".join(ends) + "."])


def stopped(data: MultiModal) -> tuple[float, Solution]:
    """Core seconds of a solve that ends by itself, and what it found."""
    begun = time.process_time()
    solution = fused3d.reconstruct(data, fused3d.Settings(**WEIGHTS))
    return time.process_time() - begun, solution


def parts(data: MultiModal) -> dict[str, float]:
    """Core milliseconds of an iteration's parts, each run by itself several times within one program."""
    problem = model.build(data, gamma=1.6, weights="z_gamma", inner=4, **WEIGHTS)
    state, _ = jax.jit(partial(fused3d.start, counts=True))(problem)
    x, rate = state.x, 1 / (state.metric.volume + 1)
    block = coupling.Block(x, 0.1 * x[0], 0.1 * x, state.metric.volume, problem.contrast, problem.gamma, jnp.float32(1),
                           jnp.float32(1), jnp.float32(model.FLOOR))

    def coupled(operator: Callable) -> Callable[[Any], Any]:
        return lambda v: operator(block._replace(x=v), state.tv_dual)[0]

    named: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "HAADF: projection": (lambda v: model.project_images(problem, v), x[0]),
        "HAADF: back projection": (lambda p: model.backproject_images(problem, p), state.image_dual),
        "maps: projection, likelihood": (lambda v: model.misfit(problem, v, True).slope, x),
        "maps: back projection": (lambda p: model.backproject_maps(problem, p), state.map_dual),
        "filters of both duals": (lambda p: fused3d._map_step(problem, state._replace(signal=p), True), state.signal),
        "coupling of the elements: TV's target": (coupled(coupling.target), x),
        "coupling of the elements: the next volume": (coupled(coupling.minimiser), x)}
    found = {name: within(operator, start, 5, touch)[1] for name, (operator, start) in named.items()}
    steps = partial(tv_dual, x, problem.lambda_tv, rate, steps=4, floor=model.FLOOR)
    return found | {"TV: four steps": within(lambda dual: steps(dual=dual), state.tv_dual, 5)[1]}


def where() -> str:
    """Where an iteration's time goes."""
    columns = {}
    for size, haadf, chem in (CELLS[0], CELLS[-1]):
        data = specimen(size, haadf, chem)
        columns[f"{size}^3, {haadf} + {chem} tilts"] = (parts(data), 1e3 * per_iteration(data)[1])
    lines = [f"Core milliseconds of one iteration, four elements, median of {REPEATS}. The rest is costs, updates of "
             "the state, and what the parts gain or lose by standing alone.", "",
             f"| part | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in next(iter(columns.values()))[0]:
        lines.append(f"| {name} | " + " | ".join(
            f"{found[name]:.1f} ({found[name] / total:.0%})" for found, total in columns.values()) + " |")
    rest = (total - sum(found.values()) for found, total in columns.values())
    lines += ["| rest | " + " | ".join(f"{value:.1f}" for value in rest) + " |",
              "| iteration | " + " | ".join(f"**{total:.1f}**" for _, total in columns.values()) + " |"]
    return "\n".join(lines)


def slabs() -> str:
    """Wall time of an iteration with the cores as one device and as several."""
    cores = len(os.sched_getaffinity(0))
    lines = [f"Wall milliseconds of an iteration at {CELLS[-1][0]}^3 x 4 elements on {cores} cores, median of "
             f"{REPEATS}, each row in a process of its own.", "", "| devices | threads of each | ms | against one |",
             "|---|---|---|---|"]
    alone = None
    for count, threads in ((1, 1), (1, cores), (cores, 1)):
        code = (f"from tests import bench_solver as b; import json; "
                f"print(json.dumps(b.per_iteration(b.specimen({CELLS[-1][0]}), {count})))")
        told = apart(code, max(threads, count), count)
        wall = 1e3 * json.loads(told.splitlines()[-1])[0]
        alone = alone or wall
        lines.append(f"| {count} | {threads} | {wall:.0f} | {alone / wall:.2f} times as fast |")
    return "\n".join(lines)


def main() -> None:
    """Write the sections."""
    publish("CPU: solves", solves())
    publish("CPU: where an iteration's time goes", where())
    publish("Slabs: one reconstruction over several devices", slabs())


if __name__ == "__main__":
    main()

