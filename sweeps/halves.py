"""How fine a run's volumes are resolved, as two halves of the tilts tell (`engine.halves`), in numbers and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.resolution import ShellCorrelation
from sweeps.tables import Run

HEAD = "Resolution [nm], two halves of the tilts correlated to 0.143 (within 30 degrees of z, which the tilts miss)"


def scores(found: Mapping[str, Sequence[ShellCorrelation]],
           elements: Sequence[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """For a row: `resolved` and `resolved_z` [nm] of each element, `resolved_haadf` and `resolved_haadf_z` of HAADF,
    where they resolve anything. Beside the volume: `fsc` and `fsc_z` (element and HAADF, shell) over `shells` and
    `shells_z` (shell,) [1/nm]."""
    score: dict[str, Any] = {"metrics": {}, "elements": {}}
    arrays: dict[str, np.ndarray] = {}
    for part, curves in found.items():
        ends = [curve.cutoff() for curve in curves]
        lengths = {name: 1 / end for name, end in zip(elements, ends) if np.isfinite(end)}
        score["elements"] |= {f"resolved{part}": lengths} if lengths else {}
        if len(ends) > len(elements) and np.isfinite(ends[-1]):
            score["metrics"][f"resolved_haadf{part}"] = 1 / ends[-1]
        arrays[f"fsc{part}"] = np.stack([curve.correlation for curve in curves])
        arrays[f"shells{part}"] = curves[0].frequency
    return score, arrays


def text(run: Run) -> str:
    """The resolutions of each cell in words."""
    lines = []
    for cell in run.cells:
        best: Mapping[str, Any] = run.winner(cell) or {}
        all_round, along = (_lengths(best, part) for part in ("", "_z"))
        if all_round:
            words = [f"{name} {length:.3g} ({format(along[name], '.3g') if name in along else 'none'})"
                     for name, length in all_round.items()]
            lines.append(f"{cell.id}: {', '.join(words)}")
    return "\n".join([HEAD, *lines]) if lines else ""


def _lengths(row: Mapping[str, Any], part: str) -> dict[str, float]:
    """[nm] by element, and of HAADF alone."""
    found = dict(row.get("elements", {}).get(f"resolved{part}", {}))
    haadf = row.get("metrics", {}).get(f"resolved_haadf{part}")
    return found | ({} if haadf is None else {"HAADF alone": haadf})
