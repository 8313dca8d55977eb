"""How far a reconstruction is from the truth, or from data it has not seen."""

from __future__ import annotations

import numpy as np


def nrmse(volume: np.ndarray, truth: np.ndarray) -> float:
    """Normalised root mean square error of one element's volume (F3, Methods).

    Both volumes are brought to zero mean and unit standard deviation, so that only their correlation rho counts:
    the value is sqrt(2 - 2 rho), 0 for a perfect and sqrt(2) for an unrelated volume. A constant volume has
    correlation 0.
    """
    return float(np.sqrt(2 - 2 * correlation(volume, truth)))


def nrmse_elements(volume: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`nrmse` of each first index of volumes (element, z, y, x); F3 quotes their mean."""
    return np.array([nrmse(v, t) for v, t in zip(volume, truth, strict=True)])


def correlation(volume: np.ndarray, truth: np.ndarray) -> float:
    """Pearson's correlation over all voxels, summed in double precision."""
    v = np.asarray(volume, np.float64).ravel()
    t = np.asarray(truth, np.float64).ravel()
    v = v - v.mean()
    t = t - t.mean()
    norm = np.linalg.norm(v) * np.linalg.norm(t)
    return float(np.clip(v @ t / norm, -1, 1)) if norm > 0 else 0.0


def scale_error(volume: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(element,) relative error of the concentration that NRMSE cannot see: least-squares scale of the truth, less 1.

    The scale is <volume, truth> / <truth, truth>, so 0.1 means that concentrations come out 10 % too large.
    """
    v = np.asarray(volume, np.float64).reshape(len(volume), -1)
    t = np.asarray(truth, np.float64).reshape(len(truth), -1)
    return (v * t).sum(1) / np.maximum((t * t).sum(1), np.finfo(float).tiny) - 1


def poisson_deviance(counts: np.ndarray, expected: np.ndarray) -> float:
    """2 sum(b log(b / m) - b + m) over pixels: 0 for perfect agreement, about 1 per pixel for Poisson noise."""
    b = np.asarray(counts, np.float64)
    m = np.maximum(np.asarray(expected, np.float64), 1e-12)
    return float(2 * (np.where(b > 0, b * np.log(np.where(b > 0, b, 1) / m), 0.0) - b + m).sum())
