"""A few atoms' worth of patterns for tests of multislice tomography, made without tables of scattering factors.

As a program it prints, as JSON, relative distances between solves on one device and on two.
"""

from __future__ import annotations

import json
from dataclasses import replace
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np

from engine import scans
from engine.diffraction import DiffractionSeries
from engine.mset import Settings, reconstruct
from engine.multislice import Optics, beam, far_field, probes, slices
from engine.rotation import rotate
from tests.specimens import distance

SIZE, PIXEL = 16, 0.04
OPTICS = Optics(defocus=-8.0)
ANGLES = np.array([-80.0, -50.0, -20.0, 10.0, 40.0, 70.0])
ATOMS = ((0.08, 0.02, -0.1, 900), (-0.12, 0.06, 0.05, 600), (0.02, -0.14, 0.1, 900))  # z, y, x [nm], peak [V]


def truth(strength: float = 1.0) -> np.ndarray:
    """The potential (z, y, x) [V]: three Gaussians that the pixels resolve."""
    axis = (np.arange(SIZE) - (SIZE - 1) / 2) * PIXEL
    volume = np.zeros((SIZE,) * 3, np.float32)
    for *place, height in ATOMS:
        z, y, x = (np.exp(-((axis - p) ** 2) / (2 * 0.05**2)) for p in place)
        volume += strength * height * z[:, None, None] * y[None, :, None] * x[None, None, :]
    return volume


def measured(strength: float = 1.0, finer: int = 1) -> DiffractionSeries:
    """Patterns of 3 x 3 probes at six tilts; finer: waves have so many times the pixels of the detector."""
    made = beam(finer * SIZE, PIXEL / finer, OPTICS, PIXEL)
    step = SIZE * PIXEL / 3
    at = np.stack(np.meshgrid(*[(np.arange(3) - 1) * step] * 2, indexing="ij"), -1).reshape(-1, 2)
    waves = probes(made, jnp.asarray(at, jnp.float32))
    phase = jnp.asarray(OPTICS.interaction * PIXEL * truth(strength))
    angles = jnp.asarray(ANGLES[:, None], jnp.float32)
    fields = np.fft.fftshift(_fields(waves, phase, angles, made.propagator), axes=(2, 3))
    kept = slice((finer - 1) * SIZE // 2, (finer + 1) * SIZE // 2)
    return DiffractionSeries(np.abs(fields[:, :, kept, kept]) ** 2, ANGLES, at, PIXEL, OPTICS)


@jax.jit
def _fields(waves: jax.Array, phase: jax.Array, angles: jax.Array, carry: jax.Array) -> jax.Array:
    def tilted(turn: jax.Array) -> jax.Array:
        return far_field(waves, slices(1, waves.shape[-1], rotate(phase, turn)), carry)

    return jax.lax.map(tilted, angles)


def main() -> None:
    """Compare one device with two, whose shares of 9 probes are not alike, with and without total variation."""
    found = {}
    for name, weight, group in (("plain", 0.0, 0), ("groups", 0.0, 4), ("tv", 5e-6, 0)):
        one, two = (reconstruct(measured(), Settings(iterations=4, lambda_tv=weight, group=group, devices=n))
                    for n in (1, 2))
        found[f"{name} volume"] = distance(two.volume, one.volume)
        found[f"{name} cost"] = distance(two.history["total"], one.history["total"])
    refine = Settings(iterations=4, refine=("probe", "positions"), refine_after=1)
    one, two = (reconstruct(measured(), replace(refine, devices=n)) for n in (1, 2))
    found |= {f"refined {name}": distance(two.fields[name], one.fields[name]) for name in ("probe", "positions")}
    with TemporaryDirectory() as folder:
        scans.save(f"{folder}/a.zarr", measured())
        streamed = scans.load(f"{folder}/a.zarr", most=0)
        again = reconstruct(streamed, replace(refine, devices=2))
    found["streamed"] = distance(again.volume, one.volume)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
