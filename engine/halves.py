"""Two halves of the data: each reconstructed as the whole is, they tell how fine its volumes are resolved.

Every other tilt of each series makes one half, the rest the other. Within 30 degrees of z, the beam's direction at tilt
0, lies what the tilts miss, so that it is told apart from the rest. Beside the elements stands the tomogram of HAADF
alone, which is the finest that fusing can bring (Schwartz et al., Imaging 3D Chemistry at 1 nm Resolution with Fused
Multi-Modal Electron Tomography, Fig. 3). What a penalty makes of both halves alike counts as signal: with much TV the
figures are too good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from engine import hebt
from engine.data import DataError, MultiModal, Solution, TiltSeries
from engine.resolution import ShellCorrelation, shell_correlation

ALONE = 50  # SIRT iterations of HAADF alone, as HEBT takes
CONE = 30.0  # [deg] about z
LEAST = 4  # tilts of a series that can be halved
PARTS: dict[str, dict[str, Any]] = {
    "": {"axis": "z", "cone": CONE, "outside": True}, "_z": {"axis": "z", "cone": CONE}}
"""Outside of the cone, and within it, as `resolution.shell_correlation` takes them."""


def halves(data: MultiModal) -> tuple[MultiModal, MultiModal]:
    """Every other tilt of each series, and the rest; DataError where a series has fewer than LEAST."""
    for series in filter(None, (data.chem, data.haadf)):
        if series.tilts < LEAST:
            raise DataError(f"{'/'.join(series.elements)}: half of {series.tilts} tilts makes no volume; two halves "
                            f"need {LEAST} or more")
    first, second = (replace(data, chem=_every_other(data.chem, k), truth=None,
                             haadf=None if data.haadf is None else _every_other(data.haadf, k)) for k in range(2))
    return first, second


def _every_other(series: TiltSeries, first: int) -> TiltSeries:
    """Of the tilts in the order of their angles; the noise is that of all."""
    chosen = np.sort(np.argsort(series.angles, kind="stable")[first::2])
    background = np.asarray(series.background)
    if background.ndim == 4 and background.shape[1] > 1:
        background = background[:, chosen]
    noise = None if series.units == "counts" else series.noise_level()
    return replace(series, projections=series.projections[:, chosen], angles=series.angles[chosen],
                   background=background, noise=noise)


def correlations(data: MultiModal, solve: Callable[[MultiModal], Solution]) -> dict[str, list[ShellCorrelation]]:
    """By name of PARTS, a curve for each element, and one for HAADF alone behind them where there are images.

    solve: reconstructs data. Raises DataError where a half cannot be, and where a solve fails.
    """
    volumes = []
    for part in halves(data):
        solution = solve(part)
        if not solution.ok:
            raise DataError(f"half of the tilts: {solution.status}")
        volume = solution.volume
        if data.haadf is not None:
            alone = hebt.reconstruct(part, hebt.Settings("haadf", "paper", iterations=ALONE)).volume
            volume = np.concatenate([volume, alone])
        volumes.append(volume)
    return {name: [shell_correlation(one, other, data.chem.pixel_size, **where)
                   for one, other in zip(*volumes, strict=True)] for name, where in PARTS.items()}
