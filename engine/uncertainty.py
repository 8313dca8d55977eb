"""Standard errors of fused maps (F2, Methods): how far noise alone moves each pixel, from one measurement.

The maps minimise a weighted objective, so that to first order x - truth = -H^-1 (slope of the objective at the truth),
H the expected Hessian. With F the covariance of that slope, which the noise of the counts and of the image decides,

    Cov(x) = H^-1 F H^-1

for any weights; only at statistical ones is H = F, and Cov the inverse Hessian of F2's Eq. 5. Without a projector both
are blocks of elements, one per pixel:

    H = diag(lambda_chem s^2 w) + P S' S'',             P = lambda_model gain^2 / sigma^2,  w = 1 / variance of a map
    F = diag(lambda_chem^2 s^2 w^2 var(b)) + (P / gain)^2 var(b_H) S' S''

Total variation is left out: it couples pixels and makes them steadier than they are said to be here (an upper bound).
Elements on the bound x = 0 have no standard error (NaN), and the others' is for them held there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.losses import EPSILON
from engine.model import FLOOR, Problem

OBJECT = 0.1  # a pixel belongs to the object where the sum of its maps is above this share of their 99th percentile
_ROWS = 1 << 17  # pixels whose blocks are made at a time


def errors(problem: Problem, volume: np.ndarray, gain: float, counts: bool, image_variance: float | None,
           kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Maps of standard errors by name, and their averages.

    volume: (element, 1, y, x). image_variance: per unit of the image where it is counts; None: the same everywhere.
    kind: "sandwich" or "paper". standard_error is that of the concentrations, relative_error that of each map over the
    sum of maps, in percent and NaN outside of the object. Averages are over elements and pixels in the object that have
    one.
    """
    elements, shape = len(volume), volume.shape
    x = volume.reshape(elements, -1).astype(np.float64)
    error, relative = np.full_like(x, np.nan), np.full_like(x, np.nan)
    for first in range(0, x.shape[1], _ROWS):
        part = slice(first, first + _ROWS)
        blocks = _paper(problem, x, gain, counts, part) if kind == "paper" else _sandwich(
            problem, x, gain, counts, image_variance, part)
        error[:, part], relative[:, part] = _spread(x[:, part], blocks)
    total = x.sum(0)
    inside = total > OBJECT * np.percentile(total, 99)
    relative[:, ~inside] = np.nan
    relative *= 100
    averages = {"average_standard_error": _mean(error[:, inside]), "average_relative_error": _mean(relative)}
    maps = {"standard_error": error, "relative_error": relative}
    return {name: each.reshape(shape).astype(np.float32) for name, each in maps.items()}, averages


def _sandwich(problem: Problem, x: np.ndarray, gain: float, counts: bool, image_variance: float | None,
              part: slice) -> np.ndarray:
    """Covariances (pixel, element, element); rows and columns of elements on the bound are 0."""
    sensitivity, background, contrast = _columns(problem, part)
    held = x[:, part] <= FLOOR
    gamma, scale = float(problem.gamma), float(problem.image_noise)
    slope = np.where(held, 0, gamma * contrast * np.maximum(x[:, part], FLOOR) ** (gamma - 1))
    lambda_model, lambda_chem = float(problem.lambda_model), float(problem.lambda_chem)
    weight = np.broadcast_to(np.asarray(problem.map_weight, np.float64).reshape(-1, 1), held.shape)
    if counts:
        weight = 1 / (sensitivity * x[:, part] + background + EPSILON)
    own = lambda_chem * sensitivity**2 * weight
    precision = lambda_model * (gain / scale) ** 2 if problem.images.shape[0] else 0.0
    variance = np.full(slope.shape[1], scale**2)
    if image_variance is not None:
        seen = contrast * np.maximum(x[:, part], FLOOR) ** gamma
        variance = image_variance * gain * seen.sum(0)
    hessian = _blocks(np.where(held, 1, own), np.full(slope.shape[1], precision), slope)
    fisher = _blocks(np.where(held, 0, lambda_chem * own), (precision / gain) ** 2 * variance, slope)
    inverse = np.linalg.inv(hessian)
    covariance: np.ndarray = inverse @ fisher @ inverse
    return covariance


def _paper(problem: Problem, x: np.ndarray, gain: float, counts: bool, part: slice) -> np.ndarray:
    """The inverse Hessian of F2's Eq. 5 as printed, in which the first term has the wrong sign and the second is not
    symmetric, and which knows no weights; (pixel, element, element)."""
    sensitivity, background, contrast = _columns(problem, part)
    gamma, here = float(problem.gamma), np.maximum(x[:, part], FLOOR)
    maps = np.asarray(problem.maps, np.float64).reshape(len(x), -1)[:, part]
    weight = np.broadcast_to(np.asarray(problem.map_weight, np.float64).reshape(-1, 1), here.shape)
    if counts:
        weight = maps / (sensitivity * here + background + EPSILON) ** 2
    diagonal = sensitivity**2 * weight
    cross = np.zeros((here.shape[1], len(x), len(x)))
    if problem.images.shape[0]:
        image = np.asarray(problem.images, np.float64).reshape(-1)[part] / gain
        precision = (gain / float(problem.image_noise)) ** 2
        residual = image - (contrast * here**gamma).sum(0)
        diagonal = diagonal + precision * gamma * (gamma - 1) * here ** (gamma - 2) * contrast * residual
        left, right = contrast * here ** (gamma - 2), contrast * here ** (gamma - 1)
        cross = precision * gamma**2 * left.T[:, :, None] * right.T[:, None, :]
    inverse: np.ndarray = np.linalg.pinv(cross + diagonal.T[:, :, None] * np.eye(len(x)))
    return inverse


def _columns(problem: Problem, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sensitivity, background and contrast as (element, pixel) or (element, 1)."""
    sensitivity, contrast = (np.asarray(a, np.float64).reshape(-1, 1) for a in (problem.sensitivity, problem.contrast))
    background = np.asarray(problem.background, np.float64)
    flat = background.reshape(len(background), -1)
    return sensitivity, flat[:, part] if flat.shape[1] > 1 else flat, contrast


def _blocks(diagonal: np.ndarray, weight: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """diag(diagonal) + weight slope slope', (pixel, element, element), from arrays (element, pixel)."""
    blocks = weight[:, None, None] * slope.T[:, :, None] * slope.T[:, None, :]
    index = np.arange(len(slope))
    blocks[:, index, index] += diagonal.T
    return blocks


def _spread(x: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors (element, pixel) of x and of x over its sum; NaN on the bound, and for a negative variance."""
    held = x <= FLOOR
    total = np.maximum(x.sum(0), FLOOR)
    # d (x_i / total) = (d x_i - share_i d total) / total
    share = (x / total).T
    own = np.einsum("pii->pi", covariance)
    shared = covariance.sum(2)
    relative = own - share * (shared + covariance.sum(1)) + share**2 * shared.sum(1, keepdims=True)
    relative /= total[:, None] ** 2
    with np.errstate(invalid="ignore"):
        return tuple(np.where(held, np.nan, np.sqrt(variance.T)) for variance in (own, relative))  # type: ignore


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
