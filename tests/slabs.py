"""Run by tests/test_sharding.py in a process of its own: four CPU devices, since JAX counts them only once.

Prints, as JSON, relative distances between one slab and four: of the operators, and of whole solves.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from engine import fused3d, model, pyramid, sharding, uncertainty3d
from engine.data import MultiModal
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


def halved(planes: int) -> dict[str, float]:
    """A problem at half its resolution, and a volume and duals brought back from there."""
    problems = [model.build(sliced(18, planes), gamma=1.6, lambda_model=1.0, lambda_chem=1.0, lambda_tv=0.1,
                            weights="z_gamma", inner=4, devices=devices) for devices in (1, DEVICES)]

    def body(problem):
        coarse = pyramid.coarser(problem, True)
        x = coarse.start
        return (coarse, pyramid.finer_volume(x, problem),
                pyramid.finer_duals(coarse.images, coarse.maps, Dual(x, x, x), problem, True))

    (alone, x, duals), (slabs, slab_x, slab_duals) = (
        sharding.spread(body, devices)(problem) for devices, problem in zip((1, DEVICES), problems, strict=True))
    found = {name: (getattr(slabs, name), getattr(alone, name)) for name in ("images", "maps", "start")}
    pairs = {name: (sharding.join(a, DEVICES, (planes + 1) // 2), b) for name, (a, b) in found.items()}
    finer = zip(("volume", "image dual", "map dual", *(f"dual {d}" for d in "zyx")),
                (slab_x, *slab_duals[:2], *slab_duals[2]), (x, *duals[:2], *duals[2]), strict=True)
    pairs |= {f"finer {name}": (sharding.join(a, DEVICES, planes), b) for name, a, b in finer}
    return {name: distance(a, b) for name, (a, b) in pairs.items()}


def sliced(size: int, planes: int) -> MultiModal:
    """The reference specimen's first planes."""
    whole = simulated(size, 9, 5)
    chem, haadf = (replace(series, projections=series.projections[..., :planes])
                   for series in (whole.chem, whole.haadf))
    return replace(whole, chem=chem, haadf=haadf, shape=(*whole.shape[:2], planes), truth=None)


def solves(planes: int, method: str, size: int = 18) -> dict[str, float]:
    """A reconstruction of the reference specimen's first planes, and its last cost."""
    data = sliced(size, planes)
    settings = fused3d.Settings(method=method, iterations=12, lambda_tv=0.5, tolerance=0.0)
    alone = fused3d.reconstruct(data, settings)
    shared = fused3d.reconstruct(data, replace(settings, devices=DEVICES))
    return {f"{method} volume": distance(shared.volume, alone.volume),
            f"{method} cost": distance(shared.history["total"], alone.history["total"])}


def errors(planes: int) -> dict[str, float]:
    """Standard errors of one volume: the same probes, however many slabs there are, solved with more care."""
    uncertainty3d.ACCURACY = 1e-4
    data = sliced(18, planes)
    volume = fused3d.reconstruct(data, fused3d.Settings(iterations=12)).volume
    found = []
    for devices in (1, DEVICES):
        problem = model.build(data, gamma=1.6, lambda_model=1.0, lambda_chem=1.0, lambda_tv=0.5, weights="z_gamma",
                              inner=4, devices=devices)
        found.append(uncertainty3d.errors(problem, volume, 0.6, True, None, 3, devices)[0])
    return {name: distance(*(np.nan_to_num(each[name]) for each in found)) for name in found[0]}


def main() -> None:
    """Every comparison, with plane counts that four divides and that it does not."""
    found = {f"{planes} planes, {steps} steps: {name}": value for planes in (16, 18, 33) for steps in (1, 3, 11)
             for name, value in operators(planes, steps).items()}
    for planes in (16, 18, 13):
        for method in ("fused", "plain", "chem_tv", "ml", "sirt"):
            found |= {f"{planes} planes: {name}": value for name, value in solves(planes, method).items()}
    for planes in (16, 13):
        found |= {f"{planes} planes, halved: {name}": value for name, value in halved(planes).items()}
    for planes in (16, 13):
        found |= {f"{planes} planes, probed: {name}": value for name, value in errors(planes).items()}
    # Large enough for a coarse solve, in planes of which one slab has none.
    found |= {f"{planes} planes: coarse to fine, {name}": value for planes in (16, 17)
              for name, value in solves(planes, "fused", 48).items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
