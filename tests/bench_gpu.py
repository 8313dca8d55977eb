"""`python -m tests.bench_gpu`: the kernels and whole solves on a GPU; writes three sections of docs/BENCHMARKS.md.

Everything that needs a GPU in one command: the kernels against the reference on the CPU, their times as a share of the
device's copy bandwidth, against the plain JAX form and ASTRA on the same GPU, whole solves, and a solve of the CPU;
then multislice tomography, its epoch at the paper's size from a part of the probes.
Batches of weights are solved at once. Where there is no GPU that runs the kernels it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from engine import fused3d, groups, kernels, metrics, mset, simulate
from engine.coupling import couple_reference
from engine.data import MultiModal
from engine.diffraction import DiffractionSeries
from engine.multislice import beam, error_and_gradient, kept_gradient
from engine.penalties import Field, prox_tv_reference
from engine.phantoms import ELEMENTS, FIELD_NM
from engine.projector import Geometry, backproject_reference, geometry, project_reference
from engine.sizes import bucket
from sweeps.defaults import SNR
from tests.bench import publish
from tests.bench_multislice import EDGE, OPTICS, PASSES, PIXEL, SCANNED, TILTS, Work
from tests.bench_solver import WEIGHTS, specimen
from tests.test_coupling import block_of
from tests.test_kernels import dual_problem, numbers

REPEATS = 5
HAADF, CHEM, ITERATIONS, SHORT = 47, 9, 60, 10
BATCH_SIZE, BATCHES = 64, (2, 4, 8)
SPAN = (-70.0, 70.0)
# The header that `tomoatlas check` looks for; one row per solve below it.
COLUMNS = "| size | elements | haadf tilts | chem tilts | ms per iteration | s per solve |"
DUALS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
NAMES = {"forward": "forward", "rebuilt": "gradient, waves rebuilt", "kept": "gradient, waves kept"}
PART, FEW = (2, 2048), 2  # tilts and probes of multislice tomography that are measured; iterations
SOLVE = fused3d.Settings(iterations=ITERATIONS, tolerance=0.0, **WEIGHTS)


def main() -> None:
    """Measure, print, write; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512], help="edges in voxels")
    parser.add_argument("--cpu-size", type=int, default=128, help="the solve that a CPU repeats; 0: none")
    parser.add_argument("--multislice", type=int, default=EDGE, help="edge of multislice tomography's field; 0: none")
    sizes = (options := parser.parse_args()).sizes
    if not kernels.available():
        print("bench_gpu needs an NVIDIA GPU of compute capability 8.0 or above and JAX with CUDA "
              "(pip install 'jax[cuda12]'); JAX found neither or only one of them here", file=sys.stderr)
        raise SystemExit(2)
    device = jax.devices()[0]
    name = f"{device.device_kind}, {memory(device) / 2**30:.0f} GiB for JAX"
    bandwidth = copy_bandwidth()
    parts = [f"{name}; copies at {bandwidth:.2f} TB/s, read and write counted.", check_kernels(),
             operator_table([s for s in sizes if s <= 256], bandwidth), tv_table(sizes, bandwidth), dual_table(),
             coupling_table([s for s in sizes if s <= 256], bandwidth)]
    publish("GPU: kernels", "\n\n".join(parts))
    parts = [f"{name}; cocuo, F3's SNRs, {ITERATIONS} iterations of {SOLVE.inner} TV steps.",
             solve_table(sizes, device), batch_table()]
    if options.cpu_size:
        parts.append(against_cpu(options.cpu_size))
    publish("GPU: solves", "\n\n".join(filter(None, parts)))
    if options.multislice:
        work = multislice_table(options.multislice, bandwidth), epoch_table(options.multislice)
        publish("GPU: multislice", "\n\n".join([f"{name}; copies at {bandwidth:.2f} TB/s.", *work]))


def note(text: str) -> None:
    """What is being measured, since some of it takes minutes."""
    print(f"... {text}", file=sys.stderr, flush=True)


def memory(device: jax.Device) -> int:
    """Bytes of the device that JAX may use."""
    return int((device.memory_stats() or {}).get("bytes_limit", 0))


def milliseconds(function: Callable, *args: object) -> float:
    """Median over repeats of the mean of as many calls as last 50 ms; compilation is left out."""
    jax.block_until_ready(function(*args))
    calls, times = 1, []
    while len(times) < REPEATS:
        begun = time.perf_counter()
        for _ in range(calls):
            done = function(*args)
        jax.block_until_ready(done)
        lasted = time.perf_counter() - begun
        if lasted < 0.05 and not times:
            calls *= 2
        else:
            times.append(1e3 * lasted / calls)
    return float(np.median(times))


def copy_bandwidth() -> float:
    """TB/s of reading and writing a gigabyte."""
    array = jnp.ones(2**28, jnp.float32)
    return 2 * array.nbytes / milliseconds(jax.jit(lambda a: a + 1), array) / 1e9


def rays_of(tilts: int) -> Geometry:
    """Tilts spread evenly, padded as the solver pads them."""
    return geometry(simulate.spread(SPAN, tilts), bucket(tilts))


def check_kernels() -> str:
    """The largest differences to the reference on the CPU, relative to the largest value."""
    note("kernels against the CPU reference")
    rng, cpu = np.random.default_rng(0), jax.devices("cpu")[0]
    worst: dict[str, float] = {"projection": 0.0, "back projection": 0.0}
    for shape, pixels in (((2, 64, 64, 64), 64), ((3, 50, 70, 33), 91), ((96, 40, 130), 64)):
        volume = rng.random(shape, np.float32)
        images = rng.random((*shape[:-3], 16, pixels, shape[-1]), np.float32)
        rays = geometry(np.r_[np.linspace(-90, 90, 11), 45, -45], 16)
        at_home = [jax.device_put(a, cpu) for a in (volume, images)]
        there = jax.device_put(rays, cpu)
        pairs = {"projection": (kernels.project(jnp.asarray(volume), rays, pixels),
                                project_reference(at_home[0], there, pixels)),
                 "back projection": (kernels.backproject(jnp.asarray(images), rays, *shape[-3:-1]),
                                     backproject_reference(at_home[1], there, *shape[-3:-1]))}
        for kind, (ours, reference) in pairs.items():
            worst[kind] = max(worst[kind], largest(ours, reference))
    problem = (*dual_problem((2, 40, 50, 77), 0.3), *numbers(0.3, 5, 3, 70))
    ours, dual = kernels.prox_tv(*problem)
    reference, dual_there = prox_tv_reference(*jax.device_put(problem, cpu))
    worst["TV"], worst["its dual"] = largest(ours, reference), largest(np.stack(dual), np.stack(dual_there))
    for final, name in ((False, "coupling, target"), (True, "coupling, volume")):
        state = block_of((4, 40, 50, 77))
        pairs = zip(kernels.couple(*state, final=final), couple_reference(*jax.device_put(state, cpu), final=final))
        worst[name] = max(largest(ours, reference) for ours, reference in pairs)
    for kind, difference in worst.items():
        assert difference < 1e-4, f"{kind}: the kernel differs from the reference by {difference:.1e}"
    return ("Largest difference to the reference on the CPU, relative to the largest value: "
            + ", ".join(f"{kind} {difference:.1e}" for kind, difference in worst.items()) + ".")


def coupling_table(sizes: list[int], bandwidth: float) -> str:
    """Both calls of the coupling in an iteration, four elements."""
    lines = ["| size | elements | coupling | ms | share of copy bandwidth | plain JAX, ms | times ours |",
             "|---|---|---|---|---|---|---|"]
    for size in sizes:
        state = block_of((4,) + (size,) * 3)
        for final, name, volumes in ((False, "target", 33), (True, "volume", 30)):  # moved: 4 per array of elements
            note(f"coupling, {size}^3 x 4, {name}")
            ms, slow = (milliseconds(jax.jit(partial(form, final=final)), *state)
                        for form in (kernels.couple, couple_reference))
            lines.append(f"| {size} | 4 | {name} | {ms:.3f} | {4 * volumes * size**3 / ms / 1e9 / bandwidth:.2f} | "
                         f"{slow:.2f} | {slow / ms:.0f} |")
    return "\n".join(lines)


def largest(ours: object, reference: object) -> float:
    """max |ours - reference| / max |reference|."""
    a, b = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def operator_table(sizes: list[int], bandwidth: float) -> str:
    """Projections and back projections: HAADF's and the maps' at each size."""
    lines = ["| size | volumes | tilts | | ms | share of copy bandwidth | plain JAX, ms | times ours |",
             "|---|---|---|---|---|---|---|---|"]
    peers = []
    for size in sizes:
        spent = {}
        for count, tilts in ((1, HAADF), (4, CHEM)):
            rays = rays_of(tilts)
            volume = jax.random.uniform(jax.random.key(0), (count,) + (size,) * 3)
            images = jax.random.uniform(jax.random.key(1), (count, len(rays.angles), size, size))
            least = 4 * count * (size**3 + tilts * size**2)
            for kind, ours, plain, array in (
                    ("projection", partial(kernels.project, pixels=size), partial(project_reference, pixels=size),
                     volume),
                    ("back projection", partial(kernels.backproject, nz=size, ny=size),
                     partial(backproject_reference, nz=size, ny=size), images)):
                note(f"{kind}, {size}^3 x {count}, {tilts} tilts")
                ms = spent[kind, tilts] = milliseconds(jax.jit(ours), array, rays)
                slow = milliseconds(jax.jit(plain), array, rays)
                lines.append(f"| {size} | {count} | {tilts} | {kind} | {ms:.3f} | {least / ms / 1e9 / bandwidth:.2f} "
                             f"| {slow:.2f} | {slow / ms:.0f} |")
        both = spent["projection", HAADF] + spent["back projection", HAADF]
        peers.append(astra_sentence(size, both))
    return "\n".join(lines) + "\n\n" + "\n".join(filter(None, peers))


def astra_sentence(size: int, ours: float) -> str:
    """ASTRA's 3D kernels on the same work: the time of one more SIRT iteration, whose data stay on the GPU."""
    try:
        import astra
    except ImportError:
        return "No GPU peer: astra-toolbox is not installed here."
    if not astra.use_cuda():
        return "No GPU peer: astra-toolbox is installed here without CUDA."
    note(f"ASTRA, {size}^3")
    volume = astra.create_vol_geom(size, size, size)
    rays = astra.create_proj_geom("parallel3d", 1.0, 1.0, size, size, np.deg2rad(simulate.spread(SPAN, HAADF)))
    ids = [astra.data3d.create("-vol", volume), astra.data3d.create("-sino", rays, 1.0)]
    algorithm = astra.algorithm.create({"type": "SIRT3D_CUDA", "ReconstructionDataId": ids[0],
                                        "ProjectionDataId": ids[1]})

    def seconds(iterations: int) -> float:
        begun = time.perf_counter()
        astra.algorithm.run(algorithm, iterations)
        return time.perf_counter() - begun

    seconds(5)
    few, many = 5, 55
    ms = 1e3 * float(np.median([seconds(many) - seconds(few) for _ in range(REPEATS)])) / (many - few)
    astra.algorithm.delete(algorithm)
    astra.data3d.delete(ids)
    return (f"ASTRA {astra.__version__}, SIRT3D_CUDA at {size}^3 and {HAADF} tilts: {ms:.2f} ms per iteration (one "
            f"projection, one back projection, updates); ours: {ours:.2f} ms for the two operators, "
            f"{ms / ours:.1f} times less.")


def tv_table(sizes: list[int], bandwidth: float) -> str:
    """TV steps of four elements, and the proximal operator of 3 and of 4 steps with its primal."""
    lines = ["| size | volumes | dual | ms per TV step | share of copy bandwidth | 3 steps and primal, ms | 4 steps | "
             "plain JAX, 4 steps |", "|---|---|---|---|---|---|---|---|"]
    plain = jax.jit(prox_tv_reference)
    for size in sizes:
        shape = (4 if size < 512 else 1,) + (size,) * 3
        volume, metric = (jax.random.uniform(jax.random.key(k), shape) for k in range(2))
        for name, dtype in DUALS.items():
            note(f"TV, {size}^3 x {shape[0]}, {name}")
            field = (jnp.zeros(shape, dtype),) * 3
            spent = {steps: milliseconds(_prox, volume, metric, field, *numbers(0.1, steps, 0, size))
                     for steps in (3, 4, 5, 25)}
            slow = milliseconds(plain, volume, metric, field, *numbers(0.1, 4, 0, size))
            ms = (spent[25] - spent[5]) / 20
            least = (8 + 6 * jnp.dtype(dtype).itemsize) * volume.size
            lines.append(f"| {size} | {shape[0]} | {name} | {ms:.3f} | {least / ms / 1e9 / bandwidth:.2f} | "
                         f"{spent[3]:.3f} | {spent[4]:.3f} | {slow:.2f} |")
            del field
    return "\n".join(lines)


_prox = jax.jit(kernels.prox_tv)


def dual_table() -> str:
    """What 16-bit duals cost: the distance to the converged answer after so many steps."""
    note("16-bit duals")
    volume, *_ = dual_problem((48, 48, 48), 0.3)
    metric = jnp.full_like(volume, 0.5)
    lines = ["Distance of the proximal operator of noise (48^3, weight 0.3, metric 0.5) to the converged one:", "",
             "| dual | 5 steps | 20 steps | 100 steps | 500 steps |", "|---|---|---|---|---|"]

    def answer(steps: int, dtype: type) -> np.ndarray:
        zero: Field = (jnp.zeros_like(volume, dtype),) * 3
        return np.asarray(_prox(volume, metric, zero, *numbers(0.3, steps, 0, volume.shape[-1]))[0], np.float64)

    best = answer(20000, jnp.float32)
    for name, dtype in DUALS.items():
        errors = [np.linalg.norm(answer(steps, dtype) - best) / np.linalg.norm(best) for steps in (5, 20, 100, 500)]
        lines.append(f"| {name} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")
    return "\n".join(lines)


def solve_table(sizes: list[int], device: jax.Device) -> str:
    """Milliseconds per iteration and seconds per solve, four elements, 47 + 9 tilts."""
    lines, remarks = [COLUMNS, "|---|---|---|---|---|---|"], []
    for size in sizes:
        note(f"the specimen at {size}^3")
        data = specimen(size, HAADF, CHEM) if size <= 256 else enlarged(size)
        note(f"solves at {size}^3")
        try:
            whole, short = seconds_per_solve(data, SOLVE), seconds_per_solve(data, replace(SOLVE, iterations=SHORT))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            remarks.append(f"{size}^3 does not fit: {str(error).splitlines()[0]}")
            continue
        ms = 1e3 * (whole - short) / (ITERATIONS - SHORT)
        lines.append(f"| {size} | {len(data.numbers)} | {HAADF} | {CHEM} | {ms:.2f} | {whole:.3f} |")
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        asked = replace(SOLVE, tolerance=fused3d.Settings().tolerance)
        stopped, half = (seconds_per_solve(data, replace(asked, dual_bits=bits)) for bits in (32, 16))
        remarks.append(f"{size}^3: {peak / 2**30:.1f} GiB at most so far; "
                       f"{whole - ITERATIONS * ms / 1e3:.3f} s of a solve are its coarse solves, transfers and end. As "
                       f"it comes, with the stopping rule: {stopped:.3f} s "
                       f"({fused3d.reconstruct(data, asked).status}), with TV duals of 16 bits {half:.3f} s.")
    return "\n".join(lines) + "\n\n" + "\n".join(remarks)


def enlarged(size: int) -> MultiModal:
    """The specimen of 128^3 with each voxel repeated: drawing a sharp one takes longer than all of the rest."""
    truth = np.asarray(specimen(128, 2, 1).truth)
    for axis in (1, 2, 3):
        truth = np.repeat(truth, size // 128, axis)
    elements = ELEMENTS["cocuo"]
    return simulate.multimodal(
        truth, tuple(elements.values()), tuple(elements), pixel_size=FIELD_NM / size,
        haadf_angles=simulate.spread(SPAN, HAADF), chem_angles=simulate.chemical_angles(SPAN, HAADF, CHEM),
        snr=SNR["cocuo"])


def batch_table() -> str:
    """Several weights of one data set solved at once."""
    data = specimen(BATCH_SIZE, HAADF, CHEM)
    alone = seconds_per_solve(data, SOLVE)
    lines = [f"Batches of lambda_tv at {BATCH_SIZE}^3, solved at once; one alone takes {alone:.3f} s:", "",
             "| batch | s per batch | s per solve | times one alone |", "|---|---|---|---|"]
    for count in BATCHES:
        note(f"a batch of {count} at {BATCH_SIZE}^3")
        batch = [replace(SOLVE, lambda_tv=SOLVE.lambda_tv * 1.2**k) for k in range(count)]
        seconds = median_seconds(lambda batch=batch: fused3d.reconstruct_batch(data, batch))
        lines.append(f"| {count} | {seconds:.3f} | {seconds / count:.3f} | {alone * count / seconds:.2f} |")
    return "\n".join(lines)


def seconds_per_solve(data: MultiModal, settings: fused3d.Settings) -> float:
    """Median wall time of a whole solve, from data on the host to the volume there."""
    return median_seconds(lambda: fused3d.reconstruct(data, settings))


def median_seconds(work: Callable) -> float:
    """Median wall time over repeats, after one call that compiles."""
    times = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))


def against_cpu(size: int) -> str:
    """One solve on both: NRMSE, and how far the volumes are apart."""
    note(f"one solve on the CPU at {size}^3, which takes minutes")
    data = specimen(size, HAADF, CHEM)
    ours = fused3d.reconstruct(data, SOLVE).volume
    with jax.default_device(jax.devices("cpu")[0]):
        begun = time.perf_counter()
        reference = fused3d.reconstruct(data, SOLVE).volume
        lasted = time.perf_counter() - begun
    errors = [float(metrics.nrmse_elements(v, data.truth).mean()) for v in (ours, reference)]
    apart = float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
    return (f"{size}^3, {ITERATIONS} iterations: NRMSE {errors[0]:.4f} on the GPU, {errors[1]:.4f} on the CPU of the "
            f"same machine ({lasted:.0f} s with compilation); the volumes differ by {apart:.1e} of their norm, "
            f"{largest(ours, reference):.1e} of the largest value at most.")


def multislice_table(size: int, bandwidth: float) -> str:
    """Microseconds per probe and slice, of slices as thick as a voxel."""
    lines = ["| size | slices | probes at once | | µs per probe and slice | share of copy bandwidth |",
             "|---|---|---|---|---|---|"]
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    one, kept = groups.ONE_SLICE[platform], groups.ALL_SLICES[platform] // size
    for kind, most, form in (("forward", one, None), ("rebuilt", one, error_and_gradient),
                             ("kept", kept, kept_gradient)):
        note(f"multislice at {size}^2, {kind}")
        work = Work(size, size, most // (8 * size**2), most)
        us = 1e3 * milliseconds(work.forward if form is None else work.backward(form)) / work.passed
        share = 8 * size**2 * PASSES[kind] / us / 1e6 / bandwidth
        lines.append(f"| {size} | {size} | {work.positions.shape[1]} | {NAMES[kind]} | {us:.3f} | {share:.2f} |")
    return "\n".join(lines)


def epoch_table(size: int) -> str:
    """Seconds of a pass over all tilts and probes of the paper's series, from whole iterations of a part of it."""
    lines = [f"{size}^3, {TILTS} tilts, {SCANNED} probes, from {PART[0]} tilts and {PART[1]} probes, all in one group:",
             "", "| slices [Å] | s per iteration of the part | s per epoch |", "|---|---|---|"]
    made = beam(size, PIXEL, OPTICS, PIXEL)
    vacuum = np.fft.fftshift(np.abs(np.asarray(made.spectrum)) ** 2)
    places = np.random.default_rng(0).uniform(-size * PIXEL / 4, size * PIXEL / 4, (PART[1], 2))
    series = DiffractionSeries(np.broadcast_to(vacuum, (*PART, size, size)).copy(), np.linspace(-60, 60, PART[0]),
                               places, PIXEL, OPTICS)
    for layers in (1, 4):
        note(f"multislice tomography at {size}^3, {layers} layers in a slice")
        chosen = mset.Settings(group=0, binning=layers, iterations=FEW)
        few, more = (median_seconds(lambda n=n, chosen=chosen: mset.reconstruct(series, replace(chosen, iterations=n)))
                     for n in (FEW, 3 * FEW))
        each = (more - few) / (2 * FEW)
        lines.append(f"| {10 * layers * PIXEL:.1f} | {each:.3f} | {each * TILTS * SCANNED / np.prod(PART):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
