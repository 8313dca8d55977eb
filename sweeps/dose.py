"""What measured series cost in electrons per square Angstrom, and what the conventional scheme would have.

Fused tomography takes a map at a few of its tilts alone; the conventional scheme one at each (Schwartz et al., Imaging
3D Chemistry at 1 nm Resolution with Fused Multi-Modal Electron Tomography, Methods, whose doses these formulas give).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.data import MultiModal
from engine.physics import fluence
from sweeps.settings import Sweep
from sweeps.sources import Beam, Measured
from sweeps.tables import Run


def metrics(sweep: Sweep, data: MultiModal) -> dict[str, float]:
    """Doses [e/A^2] of the tilts that are used, for a row: dose_chem, dose_haadf, dose_total and dose_conventional, as
    far as the beam is known; nothing for simulated data."""
    if not isinstance(sweep.data, Measured):
        return {}
    pixel = data.chem.pixel_size / sweep.data.binning
    chem, haadf = sweep.data.chem.beam, sweep.data.haadf.beam if sweep.data.haadf else None
    found = {"dose_chem": _dose(chem, pixel, data.chem.tilts),
             "dose_haadf": _dose(haadf, pixel, data.haadf.tilts if data.haadf else 0)}
    found = {name: value for name, value in found.items() if value > 0}
    if found:
        found["dose_total"] = sum(found.values())
    if chem is not None and data.haadf is not None and data.haadf.tilts > data.chem.tilts:
        found["dose_conventional"] = _dose(chem, pixel, data.haadf.tilts)
    return found


def _dose(beam: Beam | None, pixel: float, tilts: int) -> float:
    return 0.0 if beam is None else tilts * fluence(beam.current, beam.dwell, pixel)


def text(run: Run) -> str:
    """The doses of each cell in words."""
    lines = []
    for cell in run.cells:
        best: Mapping[str, Any] = run.winner(cell) or {}
        found = best.get("metrics", {})
        if "dose_total" not in found:
            continue
        parts = [f"{words} {found[name]:.3g}" for words, name in (("HAADF", "dose_haadf"), ("maps", "dose_chem"))
                 if name in found]
        saved = found.get("dose_conventional", 0.0) / found["dose_total"]
        more = (f"; a map at every tilt, the conventional scheme, {found['dose_conventional']:.3g}, {saved:.3g} times "
                "as much" if saved else "")
        lines.append(f"{cell.id}: {found['dose_total']:.3g} ({', '.join(parts)}){more}")
    return "\n".join(["Dose [electrons per square Angstrom]", *lines]) if lines else ""
