"""In double precision, in a process of its own: how far the stacked system's channels are from SIRT of each alone.

Without x >= 0 the sum of the elements is SIRT of (1 - a) sum_i b_i + a b_H, and what element i has beyond its share
of the sum, x_i - p_i sum x, is SIRT of b_i - p_i sum b at the rate 1 - a, where a is the share of HAADF (HEBT's alpha,
for rows that SIRT scales), or at the rate that is asked for; with momentum in the one where the other has it. p_i is
1 / k in the paper's form. The sum does so for shares that differ from voxel to voxel too.
Run as a program, it prints the largest relative difference for each case.
"""

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "TOMOATLAS_NATIVE": "0"}

import jax
import jax.numpy as jnp
import numpy as np

from engine import sirt
from engine.projector import Geometry
from engine.sirt import Kind, Problem, Scale

TILTS, PIXELS, SHAPE, ELEMENTS, STEPS, RATE = 7, 15, (13, 15), 3, 10, 0.4


def solve(maps, images, alpha, relaxation, rays, kind, shares=0.0):
    """x after STEPS iterations, all in double precision."""
    scale = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), sirt.scale(rays, SHAPE, PIXELS))
    none = Scale(jnp.zeros((0, PIXELS, 1)), jnp.ones((*SHAPE, 1)))
    problem = Problem(images, maps, rays if kind.bimodal else Geometry(jnp.zeros(0), jnp.zeros(0)), rays,
                      scale if kind.bimodal else none, scale, jnp.float64(alpha), jnp.float64(relaxation),
                      jnp.float64(RATE), shares)
    begin, advance = map(jax.jit, sirt.solver(kind))
    state, _ = begin(problem)
    for k in range(STEPS):
        state, _, _ = advance(problem, state, k)
    assert state.x.dtype == jnp.float64
    return np.asarray(state.x)


def distance(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def main():
    rng = np.random.default_rng(0)
    rays = Geometry(jnp.linspace(-1.2, 1.2, TILTS), jnp.ones(TILTS))
    maps = jnp.asarray(rng.random((ELEMENTS, TILTS, PIXELS, 1)))
    images = jnp.asarray(rng.random((TILTS, PIXELS, 1)))
    none = jnp.zeros((0, PIXELS, 1))
    local = jnp.asarray(rng.dirichlet(np.ones(ELEMENTS), SHAPE)).transpose(2, 0, 1)[..., None]
    for alpha in (0.3, 0.9):
        share = {False: alpha, True: ELEMENTS * alpha**2 / ((1 - alpha) ** 2 + ELEMENTS * alpha**2)}
        for plain in (False, True):
            together = (1 - share[plain]) * maps.sum(0, keepdims=True) + share[plain] * images[None]
            for preconditioned in (False, True):
                alone = Kind(False, preconditioned=preconditioned, positive=False)
                rate = RATE if preconditioned else 1 - share[plain]
                p = jnp.asarray([0.6, 0.3, 0.1] if preconditioned else [1 / 3] * 3).reshape(-1, 1, 1, 1)
                total = solve(together, none, 0, 1, rays, alone)[0]
                apart = solve(maps[:1] - p[0] * maps.sum(0), none, 0, rate, rays, alone)[0]
                for shared in (True, False):
                    kind = Kind(True, shared, plain, preconditioned, positive=False)
                    x = solve(maps, images, alpha, 1, rays, kind, p)
                    wild = solve(maps, images, alpha, 1, rays, kind, local) if preconditioned else x
                    print(max(distance(x.sum(0), total), distance(wild.sum(0), total)),
                          distance(x[0] - np.asarray(p[0]) * x.sum(0), apart), kind)


if __name__ == "__main__":
    main()
