"""Run by tests/test_sharding.py in a process of its own: four CPU devices, since JAX counts them only once.

Prints, as JSON, relative distances between one slab and four: of the operators, and of whole solves.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from engine import fused3d, sharding
from engine.penalties import Dual, prox_tv, total_variation
from tests.specimens import distance, simulated

DEVICES = 4


def operators(planes: int, steps: int) -> dict[str, float]:
    """TV's proximal operator, its value, a sum and a maximum, over volumes of so many planes."""
    rng = np.random.default_rng(planes)
    volume, metric = (rng.random((2, 7, 9, planes), np.float32) + 0.1 for _ in range(2))
    dual = Dual(*(0.05 * rng.random(volume.shape, np.float32) for _ in range(3)))
    dual.z[:, -1] = dual.y[:, :, -1] = dual.x[..., -1] = 0  # no difference is taken across the end

    def body(volume, metric, dual, planes, steps):
        exist = sharding.present(planes, volume.shape[-1])
        return (prox_tv(volume, jnp.float32(0.1), metric, dual, steps, 0.2, planes), total_variation(volume, planes),
                sharding.total((volume * exist).sum()), sharding.largest((volume * exist).max()))

    (u, field), *alone = sharding.spread(body, 1)(volume, metric, dual, planes, steps)
    arrays = jax.tree.map(lambda a: sharding.split(a, DEVICES), (volume, metric, dual))
    numbers = sharding.repeated((np.int32(planes), np.int32(steps)), DEVICES)
    (slab_u, slab_field), *shared = sharding.spread(body, DEVICES)(*arrays, *numbers)
    found = {"primal": distance(sharding.join(slab_u, DEVICES, planes), u)}
    for name, a, b in zip("zyx", slab_field, field, strict=True):
        found[f"dual {name}"] = distance(sharding.join(a, DEVICES, planes), b)
    for name, a, b in zip(("total variation", "sum", "maximum"), shared, alone, strict=True):
        found[name] = max(distance(a[k], b) for k in range(DEVICES))
    return found


def solves(planes: int, method: str) -> dict[str, float]:
    """A reconstruction of the reference specimen's first planes, and its last cost."""
    whole = simulated(18, 9, 5)
    chem, haadf = (replace(series, projections=series.projections[..., :planes])
                   for series in (whole.chem, whole.haadf))
    data = replace(whole, chem=chem, haadf=haadf, shape=(*whole.shape[:2], planes), truth=None)
    settings = fused3d.Settings(method=method, iterations=12, lambda_tv=0.5, tolerance=0.0)
    alone = fused3d.reconstruct(data, settings)
    shared = fused3d.reconstruct(data, replace(settings, devices=DEVICES))
    return {f"{method} volume": distance(shared.volume, alone.volume),
            f"{method} cost": distance(shared.history["total"], alone.history["total"])}


def main() -> None:
    """Every comparison, with plane counts that four divides and that it does not."""
    found = {f"{planes} planes, {steps} steps: {name}": value for planes in (16, 18, 33) for steps in (1, 3, 11)
             for name, value in operators(planes, steps).items()}
    for planes in (16, 18, 13):
        for method in ("fused", "plain", "chem_tv", "ml", "sirt"):
            found |= {f"{planes} planes: {name}": value for name, value in solves(planes, method).items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
