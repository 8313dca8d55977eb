"""How well unseen counts are predicted: by fused maps, and by what one would do without the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from engine import fused2d, heldout, metrics
from engine.data import MultiModal
from engine.fused2d import Settings
from sweeps import trial

FLOORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # counts in an empty pixel of the raw map
WIDTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0)  # [pixels]
TV = tuple(float(x) for x in np.geomspace(2, 400, 12))
MODEL = tuple(float(x) for x in np.geomspace(1e-6, 1e-2, 5))


@dataclass(frozen=True)
class Best:
    """Deviance per pixel of unseen counts at the strength where it is least; of each parting, for paired comparisons.

    A parting's is the mean over its folds, in which every count is unseen once.
    """

    strength: str
    partings: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.partings.mean())


def compared(data: MultiModal, settings: Settings, *, folds: int = 4, partings: int = 4, tv: Sequence[float] = TV,
             model: Sequence[float] = MODEL) -> dict[str, Best]:
    """The best of each method on the same parts of the counts, which are parted anew several times.

    tv, model: the weights of total variation and of the image that are tried.
    """
    pairs = [(image, weight) for image in model for weight in tv]
    parts = [part for seed in range(partings) for part in heldout.thinned(data, folds, seed)]
    share = 1 / (folds - 1)

    def best(strengths: Sequence[object], predict: Callable[[MultiModal, object], np.ndarray]) -> Best:
        found = []
        for strength in strengths:
            scores = []
            for training, test in parts:
                expected = share * predict(training, strength)
                expected = np.maximum(expected, heldout.FAINT * expected.mean((1, 2, 3), keepdims=True))
                scores.append(metrics.poisson_deviance(test.chem.projections, expected) / expected.size)
            words = ", ".join(f"{x:.3g}" for x in np.atleast_1d(strength))  # type: ignore[arg-type]
            found.append(Best(words, np.reshape(scores, (partings, folds)).mean(1)))
        return min(found, key=lambda each: each.mean)

    def solved(training: MultiModal, method: str, weights: tuple[float, float], guide: float = 0.0) -> np.ndarray:
        given = replace(settings, method=method, lambda_model=weights[0], lambda_tv=weights[1],  # type: ignore[arg-type]
                        guide=guide, errors="none")
        solution = fused2d.reconstruct(training, given)
        sensitivity = trial.sensitivities(solution, training)[:, None, None, None]
        return sensitivity * solution.volume + training.chem.background

    return {
        "raw map": best(FLOORS, lambda training, floor: np.maximum(training.chem.projections, floor)),
        "Gaussian": best(WIDTHS, lambda training, width: gaussian_filter(
            training.chem.projections, (0, 0, width, width), mode="nearest")),
        "TV alone": best([(1.0, weight) for weight in tv], lambda training, pair: solved(training, "chem_tv", pair)),
        "fused, TV": best(pairs, lambda training, pair: solved(training, "fused", pair)),
        "fused, guided TV": best(pairs, lambda training, pair: solved(training, "fused", pair, settings.guide)),
    }
