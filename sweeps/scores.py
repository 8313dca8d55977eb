"""How good a trial's volume is, and what it says of the specimen. Imports JAX: for `sweeps.trial` alone."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from engine import fused2d, fused3d, hebt, metrics, stoichiometry
from engine.data import DataError, MultiModal, Solution
from engine.quantify import Quantified
from sweeps import dose, flat, fractions, grains
from sweeps.schema import Fractions
from sweeps.settings import Sweep

SYSTEMS: dict[str, Any] = {"fused3d": fused3d, "fused2d": fused2d, "hebt": hebt}
Score = dict[str, Any]  # {"objective": float | None, "metrics": {...}, "elements": {name: {element: float}}}
# What a solution tells of itself that an atlas keeps, and, as `name`_Co, of each element.
TOLD = ("average_standard_error", "average_relative_error", "error_residual", "r_squared", "r_squared_smooth")
TOLD_OF_EACH = ("response",)


def sensitivities(solution: Solution, data: MultiModal) -> np.ndarray:
    """(element,) counts per voxel at concentration 1, as given or as the solver fitted them."""
    return np.array([solution.metrics[f"sensitivity_{element}"] for element in data.chem.elements])


class Judge:
    """Scores of the volumes of one batch: `sweep` is any of it, since its trials differ in numbers of the solver."""

    def __init__(self, sweep: Sweep, data: MultiModal) -> None:
        self.sweep, self.data, self.system = sweep, data, SYSTEMS[sweep.system]
        self.elements = data.chem.elements

    def score(self, solution: Solution) -> Score:
        """All there is to say at the end of a solve."""
        found = self.against_truth(solution.volume)
        told = solution.metrics
        found["metrics"] |= {name: told[name] for name in TOLD if np.isfinite(told.get(name, np.nan))}
        for name in TOLD_OF_EACH:
            each = {e: told[f"{name}_{e}"] for e in self.elements if np.isfinite(told.get(f"{name}_{e}", np.nan))}
            found["elements"] |= {name: each} if each else {}
        if self.sweep.system == "fused2d":
            found["elements"] |= self._shares(solution)
        if quantified := self._quantified(solution):
            whole, each = fractions.scores(quantified)
            found["metrics"] |= whole
            found["elements"] |= each
        if self.sweep.system == "hebt" and self.data.truth is not None:
            found["elements"]["ssim_windowed"] = self._each(metrics.ssim_windowed, solution.volume, self.data.truth)
        found["metrics"] |= dose.metrics(self.sweep, self.data) | self._particles(solution.volume)[0]
        return found

    def against_truth(self, volume: np.ndarray) -> Score:
        """The score of a volume, also of one that is not finished: nothing where there is no truth."""
        truth = self.data.truth
        if truth is None:
            return {"objective": None, "metrics": {}, "elements": {}}
        each, scale = metrics.nrmse_elements(volume, truth), metrics.scale_error(volume, truth)
        mean, known = float(each.mean()), {}
        if self.data.shape[0] == 1:
            known["share_rmse"] = metrics.share_rmse(volume, truth)
        found = {"nrmse": self._named(each), "scale_error": self._named(scale)}
        if self.sweep.system == "hebt":
            found |= {"ssim": self._each(metrics.ssim_structure, volume, truth),
                      "mse": self._each(lambda v, t: metrics.scaled_mse(v, t / t.max()), volume, truth)}
        return {"objective": mean if np.isfinite(mean) else None, "metrics": {"nrmse": mean, **known},
                "elements": found | self._fractions_against_truth(volume)}

    def arrays(self, solution: Solution) -> dict[str, np.ndarray]:
        """What is kept beside the volume because the sweep asks for it."""
        found = self._quantified(solution)
        return (fractions.arrays(found) if found else {}) | self._haadf_alone | self._particles(solution.volume)[1]

    @cached_property
    def _haadf_alone(self) -> dict[str, np.ndarray]:
        """SIRT of the images, (z, y, x) of HAADF per voxel, for reference (HEBT, Fig. 7)."""
        count = self.sweep.output.haadf
        if not count or self.data.haadf is None:
            return {}
        return {"haadf": hebt.reconstruct(self.data, hebt.Settings("haadf", "paper", iterations=count)).volume[0]}

    def _particles(self, volume: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Numbers and arrays of the particles in a volume, and numbers of the true ones."""
        given = self.sweep.output.particles
        if given is None or not np.isfinite(volume).all():
            return {}, {}
        whole, arrays = grains.scores(given, volume, self.elements, self.data.chem.pixel_size)
        return whole | self._true_particles, arrays

    @cached_property
    def _true_particles(self) -> dict[str, float]:
        given, truth = self.sweep.output.particles, self.data.truth
        if given is None or truth is None:
            return {}
        known = grains.scores(given.model_copy(update={"threshold": None}), truth, self.elements,
                              self.data.chem.pixel_size)[0]
        return {f"true_{name}": known[name] for name in ("particles", "diameter", "diameter_sigma") if name in known}

    def _quantified(self, solution: Solution) -> Quantified | None:
        """Fractions of a solution; None where they are not asked for, or nothing can be told."""
        given = self.sweep.output.fractions
        if given is None or not np.isfinite(solution.volume).all():
            return None
        return self._fractions(given, solution.volume, sensitivities(solution, self.data))

    def _fractions(self, given: Fractions, volume: np.ndarray, sensitivity: np.ndarray) -> Quantified:
        return fractions.quantified(given, volume, self.elements, sensitivity, self.data.chem.pixel_size)

    @cached_property
    def _true_fractions(self) -> Quantified | None:
        """Those of the truth, where it and the sensitivities, that is the unit of concentrations, are known."""
        given, data = self.sweep.output.fractions, self.data
        if given is None or data.truth is None or data.sensitivity is None:
            return None
        plain = given.model_copy(update={"threshold": None, "take_off": None})
        return self._fractions(plain, data.truth, data.sensitivity)

    def _fractions_against_truth(self, volume: np.ndarray) -> dict[str, dict[str, float]]:
        """SSIM and mean squared error of weight fractions (HEBT, Fig. 13)."""
        true, given, sensitivity = self._true_fractions, self.sweep.output.fractions, self.data.sensitivity
        if true is None or given is None or sensitivity is None or not np.isfinite(volume).all():
            return {}
        thick = given.model_copy(update={"take_off": None})
        ours = self._fractions(thick, volume, sensitivity).weight
        return {name: {e: measure(a, b) for e, a, b in zip(true.elements, ours, true.weight, strict=True)}
                for name, measure in (("weight_ssim", metrics.ssim_structure), ("weight_mse", metrics.mse))}

    def _named(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self.elements, map(float, values), strict=True))

    def _each(self, measure: Any, volume: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return {e: measure(a, b) for e, a, b in zip(self.elements, volume, truth, strict=True)}

    def _shares(self, solution: Solution) -> dict[str, dict[str, float]]:
        """Mean and sigma of each element's share in percent, of the result and of the maps as measured (flat.SHARES).

        Of several phases the one with most pixels. Nothing where there are too few pixels, the solve failed, or the
        elements' sensitivities are not known: their maps are then not on one scale.
        """
        if self.data.sensitivity is None:
            return {}
        try:
            inside = flat.region(self.sweep, solution.volume)
            found: dict[str, dict[str, float]] = {name: {} for name in flat.SHARES}
            for words, volume in (("", solution.volume), ("_measured", np.maximum(solution.fields["measured"], 0))):
                for element, values in zip(self.elements, stoichiometry.relative(volume), strict=True):
                    peaks = stoichiometry.histogram(values[inside], self.sweep.output.shares.peaks).peaks
                    peak = max(peaks, key=lambda peak: peak.share)
                    found[f"share{words}"][element] = peak.mean
                    found[f"share_sigma{words}"][element] = peak.sigma
        except DataError:
            return {}
        return found
