"""What a YAML need not say: levels of noise as in the papers, and what systems take instead of fused3d's defaults."""

from __future__ import annotations

from typing import Any

from engine.phantoms2d import ELEMENTS as FLAT

# F3 gives these for CoO/CuO (Fig. 4); for CoO/NiO it gives none, and nickel takes copper's. F2's atomic maps have an
# SNR of about 5 (Fig. 4).
SNR: dict[str, dict[str, float]] = {
    "cocuo": {"Co": 1.92, "Cu": 2.89, "O": 2.69, "Au": 1.96, "haadf": 2208.67},
    "conio": {"Co": 1.92, "Ni": 2.89, "O": 2.69, "haadf": 2208.67},
    **{name: dict.fromkeys(elements, 5.0) | {"haadf": 100.0} for name, elements in FLAT.items()},
}
SHARED_TRIALS = 15  # docs/BENCHMARKS.md compares the map with that of 30 full trials per cell
FLAT_DATA: dict[str, Any] = {"haadf_tilts": 1, "chem_tilts": 1, "background": 0.0}  # of a 2D specimen
FLAT_SOLVER: dict[str, Any] = {"gamma": 1.7, "iterations": 200, "tolerance": 1e-5, "coarse": 0,
                               "errors": "sandwich"}
