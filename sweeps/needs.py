"""What one solve of a sweep needs, by its settings. Imports without JAX."""

from __future__ import annotations

from collections.abc import Sequence

from engine import estimate
from sweeps.fields import ends
from sweeps.grid import CONVENTIONAL_METHODS, MAPS_ONLY
from sweeps.schema import Fused3D
from sweeps.settings import Sweep


def solve(sweep: Sweep, *, elements: int, shape: tuple[int, int, int], haadf_tilts: int, chem_tilts: int,
          method: str = "", iterations: int = 0, gpu: Sequence[estimate.Measured] = (),
          core: Sequence[estimate.Measured] = ()) -> estimate.Estimate:
    """Bytes and seconds of a solve at the sweep's settings, of a searched one at its highest value.

    method, iterations: instead of the sweep's. gpu, core: `estimate.solve`'s.
    """
    solver = sweep.solver
    method = method or solver.method
    own = ({"inner": 0 if method in MAPS_ONLY else max(ends(solver.inner)), "coarse": solver.coarse,
            "dual_bits": solver.dual_bits} if isinstance(solver, Fused3D)
           else {"inner": 0, "momentum": solver.form == "preconditioned"})
    return estimate.solve(system=sweep.system, method=method, elements=elements, shape=shape,
                          haadf_tilts=0 if method in CONVENTIONAL_METHODS else haadf_tilts, chem_tilts=chem_tilts,
                          iterations=iterations or solver.iterations, devices=solver.devices, gpu=gpu, core=core, **own)
