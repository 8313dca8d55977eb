"""`python -m tests.bench_multislice`: time of a probe passing a slice, forth and back, beside abTEM on the same work.

Also what an epoch at the paper's size would take on an H200, counted from the passes over the waves' memory.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.atoms import nanoparticle, potential_slices
from engine.groups import ALL_SLICES, FEWEST, ONE_SLICE
from engine.multislice import Optics, batches, beam, error_and_gradient, far_field, kept_gradient, probes
from tests.bench import publish

SIZE, PIXEL, SLICES, PROBES = 128, 0.04, 64, 64
OPTICS = Optics()
REPEATS = 5
# Passes over a wave's memory, reading or writing, in one slice, where each transform takes four (rows, then columns;
# read and written) and what lies between two transforms is one loop that reads and writes: on the way forth two
# transforms and two loops, and a wave that is kept; on the way back the same for the residual's wave, and a wave that
# is read, or rebuilt likewise.
PASSES = {"forward": 12, "kept": 12 + 1 + 12 + 1, "rebuilt": 12 + 24 + 2}
H200 = 4.8e12  # [bytes/s], as sold
# The paper's series: voxels along an edge, tilts, probes of a tilt.
EDGE, TILTS, SCANNED = 128, 20, 128**2


class Work:
    """One tilt: phases (slice, y, x) of a particle, probes' positions (batch, probe, 2), amplitudes on the detector.

    most: bytes of a batch's waves in front of one slice.
    """

    def __init__(self, size: int, slices: int, count: int, most: int) -> None:
        depth, width = size * PIXEL, size * PIXEL
        self.volts = potential_slices(nanoparticle("cuau", 0.34 * width), size, PIXEL, slices, depth / slices)
        self.beam = beam(size, PIXEL, OPTICS, depth / slices)
        number, each = batches(count, size, most)
        rng = np.random.default_rng(0)
        self.positions = rng.uniform(-width / 4, width / 4, (number, each, 2)).astype(np.float32)
        self.phases = jnp.asarray(OPTICS.interaction * self.volts)
        self.amplitudes = jnp.sqrt(patterns(self.beam, jnp.asarray(self.positions), 0.8 * self.phases))
        self.passed = number * each * slices

    def forward(self) -> jax.Array:
        return patterns(self.beam, jnp.asarray(self.positions), self.phases)

    def backward(self, form: Callable) -> Callable[[], Any]:
        """The error and its gradient in the form of one of the engine's functions, summed over batches."""
        return partial(summed(form), self.beam, jnp.asarray(self.positions), self.phases, self.amplitudes)


@jax.jit
def patterns(made: Any, positions: jax.Array, phases: jax.Array) -> jax.Array:
    """(batch, probe, qy, qx), batch by batch."""
    return jax.lax.map(lambda at: jnp.abs(far_field(probes(made, at), phases, made.propagator)) ** 2, positions)


def summed(form: Callable) -> Callable[..., Any]:
    """Error and gradient of all batches, one after the other, compiled."""

    @jax.jit
    def run(made: Any, positions: jax.Array, phases: jax.Array, amplitudes: jax.Array) -> Any:
        def batch(sums: Any, given: Any) -> Any:
            at, seen = given
            one = form(probes(made, at), phases, made.propagator, seen, jnp.float32(1))[:2]  # not the waves' own
            return jax.tree.map(jnp.add, sums, one), None

        return jax.lax.scan(batch, (jnp.float32(0), jnp.zeros_like(phases)), (positions, amplitudes))[0]

    return run


def spent(function: Callable[[], Any]) -> tuple[float, float]:
    """Median CPU and wall seconds, after a call that compiles or plans."""
    jax.block_until_ready(function())
    found = []
    for _ in range(REPEATS):
        cpu, wall = time.process_time(), time.perf_counter()
        jax.block_until_ready(function())
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return tuple(np.median(found, axis=0).tolist())


def peer(work: Work, threads: int) -> Callable[[], np.ndarray]:
    """abTEM's patterns of the same probes and slices, in Angstrom and eV; its first slice is the entrance face."""
    import abtem

    abtem.config.set({"diagnostics.progress_bar": False, "dask.lazy": False, "fftw.threads": threads})
    thickness, size = SIZE * PIXEL / SLICES, len(work.volts[0])
    potential = abtem.PotentialArray(10 * work.volts, 10 * thickness, sampling=10 * PIXEL)
    probe = abtem.Probe(energy=1e3 * OPTICS.voltage, semiangle_cutoff=OPTICS.aperture, soft=False,
                        defocus=10 * (OPTICS.defocus - thickness / 2))
    scan = abtem.CustomScan(10 * (work.positions.reshape(-1, 2) + (size - 1) / 2 * PIXEL))
    detector = abtem.PixelatedDetector(max_angle=None)
    return lambda: probe.multislice(potential, scan=scan, detectors=detector).array


def table() -> list[str]:
    """CPU and wall microseconds per probe and slice."""
    rows = ["| | CPU µs per probe and slice | wall µs | CPU time in that of our forward model |", "|---|---|---|---|"]
    one, kept = (Work(SIZE, SLICES, PROBES, most) for most in (ONE_SLICE["cpu"], ALL_SLICES["cpu"] // SLICES))
    cases = [("forward", one, one.forward), ("error and gradient, waves rebuilt", one,
                                             one.backward(error_and_gradient))]
    if kept.positions.shape[1] >= FEWEST:  # else the solver rebuilds
        cases.append(("error and gradient, waves kept", kept, kept.backward(kept_gradient)))
    if importlib.util.find_spec("abtem"):
        cases += [(f"abTEM, forward, {n} thread{'s' * (n > 1)} of FFTW", one, peer(one, n)) for n in (1, 2)]
    else:
        rows.insert(0, "abTEM is not installed here; `make bench` installs it.\n")
    least = None
    for name, work, function in cases:
        cpu, wall = (1e6 * seconds / work.passed for seconds in spent(function))
        least = least or cpu
        rows.append(f"| {name} | {cpu:.1f} | {wall:.1f} | {cpu / least:.2f} |")
        print(rows[-1], flush=True)
    return rows


def estimate() -> str:
    """Seconds of an epoch at the paper's size, from memory traffic alone."""
    wave = 8 * EDGE**2
    each = {name: 1e6 * wave * passes / H200 for name, passes in PASSES.items()}
    epochs = {layers: [1e-6 * each[form] * TILTS * SCANNED * EDGE / layers for form in ("kept", "rebuilt")]
              for layers in (1, 4)}
    return (
        f"An estimate, not a measurement (`make bench-gpu` measures it where there is a GPU): {EDGE}^3 voxels, {TILTS} "
        f"tilts, {SCANNED} probes on an H200, whose memory moves {H200 / 1e12:g} TB/s. A wave is {wave / 2**20:g} MiB; "
        f"forward passes over it {PASSES['forward']} times a slice (a transform takes four), {PASSES['kept']} times "
        f"with the gradient and waves kept, {PASSES['rebuilt']} with waves rebuilt: "
        f"{', '.join(f'{name} {us:.2f} µs' for name, us in each.items())} per probe and slice. An epoch: "
        + ", ".join(f"{kept:.0f} s (kept) or {rebuilt:.0f} s (rebuilt) with slices of {0.4 * layers:.1f} Å"
                    for layers, (kept, rebuilt) in epochs.items()) + ".")


def main() -> None:
    """Write the section."""
    publish("Multislice", "\n".join([
        f"{PROBES} probes through {SLICES} slices of {SIZE} x {SIZE} pixels, patterns included, single precision; "
        "compiled and planned before. Ours in batches as the solver takes them; one device, all cores. abTEM cuts "
        "waves off at two thirds of the highest frequency, and also makes and limits the slices' transmission "
        f"functions, {2 * SLICES} transforms for all probes.", "", *table(), "", estimate()]))


if __name__ == "__main__":
    main()
