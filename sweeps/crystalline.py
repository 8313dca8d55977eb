"""What an mspt run says of a crystal: its resolution along each axis, how its lattice lies, and which sites were found.

Romanov et al., Multi-slice electron ptychographic tomography, section 3. No JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine import lattice, resolution, sites
from engine.data import DataError
from sweeps.tables import Run

AXES = ("z", "y", "x")
INSIDE = 0.5  # of a mask, from which on a site is expected
SMOOTH = 0.02  # [nm] that a volume is blurred by before sites are sought, half a voxel of the paper's


def found(name: str, volume: np.ndarray, voxel: float, mask: np.ndarray | None,
          highest: float) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Numbers of the whole, and of each element, of a crystal's potential (z, y, x) with voxels of `voxel` nm.

    mask: (z, y, x) 0 to 1 where it is; None: everywhere. highest: [deg] tilt, beyond which a wedge is missing.
    resolution_z, _y, _x [nm]: of the last peak of the spectrum (Fig. 5); agreement: of the volume with the lattice;
    missing_sites [%]; displacement [pm], and along each axis (Fig. 4).
    """
    whole = {f"resolution_{axis}": float(length) for axis, length in zip(AXES, resolution.find_peaks(volume, voxel)
                                                                        .length()) if np.isfinite(length)}
    lies = lattice.register(volume, voxel, name, mask=mask, missing=max(0.0, 90.0 - highest))
    there = np.ones(volume.shape, bool) if mask is None else mask > INSIDE
    ends = sites.climb(volume, voxel, lies.sites(there, voxel), smooth=SMOOTH)
    along, apart = ends.displacement()
    whole |= {"agreement": lies.agreement, "missing_sites": 100 * (1 - ends.share()), "displacement": 1e3 * apart}
    whole |= {f"displacement_{axis}": 1e3 * float(value) for axis, value in zip(AXES, along)}
    symbols = sorted({str(symbol) for symbol in ends.expected.symbols})
    each = {"sites": {s: float((ends.expected.symbols == s).sum()) for s in symbols},
            "missing_sites": {s: 100 * (1 - ends.share(s)) for s in symbols},
            "displacement": {s: 1e3 * ends.displacement(s)[1] for s in symbols}}
    return {name: value for name, value in whole.items() if np.isfinite(value)}, each


def text(run: Run) -> str:
    """What the best trial of each cell tells of the crystal."""
    lines = []
    for cell in run.cells:
        best: Mapping[str, Any] = run.winner(cell) or {}
        metrics, elements = best.get("metrics", {}), best.get("elements", {})
        if "missing_sites" not in metrics:
            continue
        lengths = ", ".join(f"{10 * metrics[f'resolution_{axis}']:.2f} A along {axis}" for axis in AXES
                            if f"resolution_{axis}" in metrics)
        seen = ", ".join(f"{count - count * elements['missing_sites'][symbol] / 100:.0f} of {count:.0f} {symbol}"
                         for symbol, count in elements["sites"].items())
        moved = " / ".join(f"{metrics.get(f'displacement_{axis}', np.nan):.0f}" for axis in AXES)
        share, apart = 100 - metrics["missing_sites"], metrics.get("displacement", np.nan)
        lines.append(f"{cell.id}: resolution {lengths or 'of no peak'}; sites found {share:.0f} % ({seen}), displaced "
                     f"by {apart:.0f} pm on average ({moved} along z / y / x); agreement with the lattice "
                     f"{metrics['agreement']:.2f}")
    return "\n".join(["Crystal", *lines]) if lines else ""


def refused(error: DataError) -> str:
    """Why a volume tells of no lattice, for the row of its trial."""
    return f"no lattice was found: {error}"
