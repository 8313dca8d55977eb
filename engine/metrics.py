"""How far a reconstruction is from the truth, or from data it has not seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
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
    return np.asarray(_compared(volume, truth)[0], np.float64)


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
    return np.asarray(_compared(volume, truth)[1], np.float64)


@jax.jit
def _compared(volume: jax.Array, truth: jax.Array) -> tuple[jax.Array, jax.Array]:
    """NRMSE and scale error of each element, where JAX computes: at 256^3 x 4, double precision on the host takes
    longer than a GPU's solve.

    Sums go axis by axis, which keeps 32 bits exact enough; sqrt(2 - 2 rho) is taken as the distance of the two
    normalised volumes, which keeps its digits where rho is nearly 1.
    """
    def total(a: jax.Array) -> jax.Array:
        return a.sum(-1).sum(-1).sum(-1).reshape(-1, 1, 1, 1)

    def normalised(a: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = a - total(a) / a[0].size
        norm = jnp.sqrt(total(a * a))
        return a / jnp.where(norm > 0, norm, 1), norm > 0

    if volume.shape != truth.shape:
        raise ValueError(f"a volume of {volume.shape} cannot be compared with a truth of {truth.shape}")
    volume, truth = (jnp.asarray(a, jnp.float32).reshape(len(a), -1, *a.shape[-2:]) for a in (volume, truth))
    (v, varies), (t, differs) = normalised(volume), normalised(truth)
    nrmse = jnp.where(varies & differs, jnp.sqrt(total((v - t) ** 2)), np.sqrt(2.0))
    tiny = np.finfo(np.float32).tiny
    scale = total(volume * truth) / jnp.maximum(total(truth * truth), tiny) - 1
    return nrmse.ravel(), scale.ravel()


def poisson_deviance(counts: np.ndarray, expected: np.ndarray) -> float:
    """2 sum(b log(b / m) - b + m) over pixels: 0 for perfect agreement, about 1 per pixel for Poisson noise."""
    b = np.asarray(counts, np.float64)
    m = np.maximum(np.asarray(expected, np.float64), 1e-12)
    return float(2 * (np.where(b > 0, b * np.log(np.where(b > 0, b, 1) / m), 0.0) - b + m).sum())


def share_rmse(volume: np.ndarray, truth: np.ndarray, level: float = 0.1) -> float:
    """Root mean square error of each map over the sum of maps, in percent, inside the specimen (F2, Fig. 6).

    Inside: where the sum of the true maps is above `level` of its 99th percentile. Empty pixels have shares of 0.
    """
    total = truth.sum(0, dtype=np.float64)
    inside = total > level * np.percentile(total, 99)
    shares = [np.divide(x[:, inside], s, out=np.zeros(x[:, inside].shape), where=s > 0)
              for x in (volume, truth) for s in [x[:, inside].sum(0, dtype=np.float64)]]
    return 100 * float(np.sqrt(np.mean((shares[0] - shares[1]) ** 2)))


def peak_rmse(volume: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(element,) root mean square error with both brought to a maximum of 1, on which F2's PSNR is based."""
    def peaked(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64).reshape(len(x), -1)
        top = x.max(1, keepdims=True)
        return x / np.where(top > 0, top, 1)

    found: np.ndarray = np.sqrt(np.mean((peaked(volume) - peaked(truth)) ** 2, axis=1))
    return found


def ssim_structure(volume: np.ndarray, truth: np.ndarray) -> float:
    """The structure term of SSIM over whole volumes of one element, with C = 0 (HEBT, Eq. 19).

    It is Pearson's correlation, so that NRMSE = sqrt(2 - 2 SSIM); HEBT calls it SSIM. `ssim_windowed` is the other one.
    """
    return correlation(volume, truth)


def scaled_mse(volume: np.ndarray, truth: np.ndarray) -> float:
    """Mean squared error with the volume brought to the scale that makes it smallest (HEBT, 3.1.2)."""
    v, t = (np.asarray(a, np.float64).ravel() for a in (volume, truth))
    size = v @ v
    return float(np.mean((v @ t / size * v - t) ** 2)) if size > 0 else float(np.mean(t**2))


def mse(volume: np.ndarray, truth: np.ndarray) -> float:
    """Mean squared error as it is: of fractions, which have a scale of their own."""
    return float(np.mean((np.asarray(volume, np.float64) - np.asarray(truth, np.float64)) ** 2))


def ssim_windowed(volume: np.ndarray, truth: np.ndarray, window: int = 7) -> float:
    """The mean SSIM (Wang et al., 2004) over windows of one element's volume (z, y, x), by scikit-image.

    The volume is brought to the scale of `scaled_mse` first, as HEBT has none. Along axes shorter than the window, a
    single plane's for one, planes are compared one by one.
    """
    from skimage.metrics import structural_similarity

    v, t = np.asarray(volume, np.float64), np.asarray(truth, np.float64)
    size = np.vdot(v, v)
    v = v * (np.vdot(v, t) / size if size > 0 else 1)
    axes = tuple(k for k, count in enumerate(t.shape) if count < window)
    planes = [np.moveaxis(a, axes, range(len(axes))).reshape(-1, *(n for n in t.shape if n >= window)) for a in (v, t)]
    span = float(t.max() - t.min()) or 1.0
    return float(np.mean([structural_similarity(a, b, win_size=window, data_range=span) for a, b in zip(*planes)]))
