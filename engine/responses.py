"""Response ratios: how bright HAADF is where a map has one count (HEBT, Eq. 15), by linear regression.

HEBT stands or falls with the images being a weighted sum of the maps. An element that scatters and has no map breaks
that: R^2 falls, and every volume takes over something that is not its own.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.data import DataError, DataWarning, MultiModal, TiltSeries

SMOOTHING = 2.0  # [pixels] of the Gaussian over images and maps before the regression: single counts tell nothing
ENOUGH = 0.8  # R^2 of the smoothed data below which an element is likely to be missing
ROUNDS = 5  # of response ratios and tilt factors in turn
LEVEL, TILTS = "a level where there is nothing", "a factor for each tilt"
OTHERS = {LEVEL: "give it as data.haadf.background",
          TILTS: "the holder hides the detector at some, so take solver.tilts: haadf"}
SAME = 0.05  # [deg] between the angles of an image and a map that go together
FLOOR = 1e-3  # of the largest contribution: an element that HAADF does not see keeps that much


@dataclass(frozen=True)
class Responses:
    """values: (element,) HAADF per count, per unit of each map.

    r_squared: of images as measured against maps smoothed as the solver's are; what HEBT quotes. r_squared_smooth: of
    both after the regression's own smoothing, less what noise then still adds; that one tells whether elements are
    missing.
    gains: where that is low, or candidates are given: how much each adds to it; LEVEL is HAADF where there is nothing,
    TILTS a factor of the maps at each tilt.
    """

    values: np.ndarray
    r_squared: float
    r_squared_smooth: float
    gains: dict[str, float]

    @property
    def missing(self) -> str | None:
        """The candidate that explains most of what is left: an element, a tenth of it; others, half."""
        left = 1 - self.r_squared_smooth
        able = {name: gain for name, gain in self.gains.items() if gain > (0.5 if name in OTHERS else 0.1) * left}
        return max(able, key=lambda name: able[name], default=None)


def fit(data: MultiModal, *, prefilter: float = 0.0, without: tuple[int, ...] = (),
        candidates: TiltSeries | None = None, values: Sequence[float] | np.ndarray | None = None) -> Responses:
    """Non-negative least squares over all pixels of the tilts that both have.

    Noise in the maps, the regressors, would bring the ratios down and share them out wrongly. Maps and images are
    smoothed alike, and what noise is left is taken off the squares: of counts it is known.
    prefilter: [pixels] as the solver's. without: tilts of the maps that are not looked at. candidates: maps of further
    elements, at the same angles as `data.chem`. values: ratios that are known, so that only R^2 is found. DataError
    where images and maps have no tilt in common.
    """
    ours, theirs = common(data, without)
    assert data.haadf is not None
    if not ours.size:
        raise DataError("no map was taken at the angle of a HAADF image, so that their ratio cannot be found; give "
                        "solver.responses, or chem_angles: subset")
    images = _net(data.haadf)[0][theirs]
    chem = _net(data.chem)[:, ours]
    blurred = smoothed(images, SMOOTHING)
    parts, noise = smoothed(chem, SMOOTHING), _noise(data.chem, ours)
    ratios = _regressed(blurred, parts, noise) if values is None else np.asarray(values, np.float64)
    smooth, gains = r_squared(blurred, parts, ratios, noise), {}
    if smooth < ENOUGH or candidates is not None:
        further, more = {LEVEL: np.ones(blurred.shape)}, {LEVEL: 0.0}
        if candidates is not None:
            further |= dict(zip(candidates.elements, smoothed(_net(candidates)[:, ours], SMOOTHING)))
            more |= dict(zip(candidates.elements, _noise(candidates, ours)))
        for name, part in further.items():
            both = np.concatenate([parts, part[None]])
            found = _regressed(blurred, both, np.append(noise, more[name]))
            gains[name] = r_squared(blurred, both, found, np.append(noise, more[name])) - smooth
        gains[TILTS] = _by_tilt(blurred, np.tensordot(ratios, parts, 1), ratios**2 @ noise) - smooth
    return Responses(ratios, r_squared(images, smoothed(chem, prefilter), ratios), smooth, gains)


_kept: deque[tuple[MultiModal, Responses]] = deque(maxlen=3)


def check(data: MultiModal, stacklevel: int = 3) -> None:
    """`warn`, where maps and images have angles in common; what is found is kept for further trials of these data."""
    if data.haadf is None or not common(data)[0].size:
        return
    known = next((found for each, found in _kept if each is data), None)
    if known is None:
        known = fit(data)
        _kept.append((data, known))
    warn(known, data.chem.elements, stacklevel=stacklevel + 1)


def warn(found: Responses, elements: tuple[str, ...], given: bool = False, stacklevel: int = 3) -> None:
    """A DataWarning where the maps do not make up the images, with the element that is most likely missing.

    given: the ratios are not those of a regression, and may be what is wrong.
    """
    if found.r_squared_smooth >= ENOUGH:
        return
    name, likely = found.missing, "most likely a heavy one (of the grid, a weld, a support)"
    if name:
        likely = f"most likely {name}, whose map would bring it to {found.r_squared_smooth + found.gains[name]:.2f}"
    cause = f"so that an element that scatters is not among them, {likely}; add its map, or crop it out of the field"
    if name in OTHERS:
        cause = f"and would be {found.r_squared_smooth + found.gains[name]:.2f} with {name}; {OTHERS[name]}"
    if given:
        cause = "so that the ratios given are wrong; leave out solver.responses, and they are found by regression"
    warnings.warn(f"HAADF is not a weighted sum of the maps of {', '.join(elements)}: R^2 is "
                  f"{found.r_squared_smooth:.2f} after smoothing, {cause}", DataWarning, stacklevel=stacklevel)


def tilt_factors(data: MultiModal, how: str) -> np.ndarray:
    """(element, tilt) by which maps are multiplied, since the holder hides the detector at some tilts.

    `equal`: to one total of each element (HEBT 3.2.1; T. Slater et al., J. Phys. Conf. Ser. 522 (2014) 012025), for a
    specimen that never leaves the field. `haadf`: to what HAADF shows at each tilt, one factor for all elements, which
    suits slabs too; tilts without an image have those of their neighbours. `as_measured`: 1.
    """
    factors = np.ones(data.chem.projections.shape[:2])
    totals = _net(data.chem).sum((2, 3), dtype=np.float64)
    if how == "equal":
        if not (totals > 0).all():
            empty, tilt = np.argwhere(totals <= 0)[0]
            raise DataError(f"{data.chem.elements[empty]} has no counts above its background at "
                            f"{data.chem.angles[tilt]:g} degrees; take tilts: haadf")
        return totals.mean(1, keepdims=True) / totals
    if how == "haadf":
        ours, theirs = common(data)
        if not ours.size or data.haadf is None:
            raise DataError("tilts: haadf needs maps at the angles of HAADF images; take tilts: equal")
        shown, order = _net(data.haadf)[0][theirs].sum((1, 2), dtype=np.float64), np.argsort(data.chem.angles[ours])
        for _ in range(ROUNDS):
            expected = fit(scaled(data, factors)).values @ (factors * totals)[:, ours]
            ratio = shown / np.maximum(expected, 1e-9 * expected.max())
            every = np.interp(data.chem.angles, data.chem.angles[ours][order], (ratio / ratio.mean())[order])
            factors = factors * every
    return factors


def scaled(data: MultiModal, factors: np.ndarray) -> MultiModal:
    """The same with its maps and their background multiplied, (element, tilt)."""
    return replace(data, chem=scaled_maps(data.chem, factors))


def scaled_maps(series: TiltSeries, factors: np.ndarray) -> TiltSeries:
    """Maps and their background times (element, tilt) factors; maps of other elements than those, times their mean."""
    by = (factors if len(factors) == len(series.elements) else factors.mean(0, keepdims=True))[:, :, None, None]
    background = np.broadcast_to(series.background, series.projections.shape) * by
    return replace(series, projections=series.projections * by, background=background)


def r_squared(images: np.ndarray, parts: np.ndarray, values: np.ndarray, noise: np.ndarray | float = 0.0) -> float:
    """Share of the images' variance that the weighted sum of the maps explains.

    noise: (element,) what it adds to the squares of the maps; so much is not held against them.
    """
    images = np.asarray(images, np.float64)
    left = images - np.tensordot(values, np.asarray(parts, np.float64), 1)
    unexplained = max((left**2).sum() - (np.asarray(values) ** 2 * noise).sum(), 0.0)
    return float(1 - unexplained / max(((images - images.mean()) ** 2).sum(), 1e-300))


def _by_tilt(images: np.ndarray, model: np.ndarray, noise: float) -> float:
    """R^2 with the factor of the modelled images that suits each tilt best; noise: of the model."""
    factor = (model * images).sum((1, 2)) / np.maximum((model**2).sum((1, 2)), 1e-300)
    return r_squared(images, (factor[:, None, None] * model)[None], np.ones(1), noise)


def smoothed(stack: np.ndarray, sigma: float) -> np.ndarray:
    """Images (..., y, x) after a Gaussian of so many pixels along y and x."""
    from scipy.ndimage import gaussian_filter

    if sigma <= 0:
        return stack
    found: np.ndarray = gaussian_filter(np.asarray(stack, np.float32), sigma, axes=(-2, -1))
    return found


def common(data: MultiModal, without: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the tilts of maps and images at the same angle, but for maps `without`."""
    if data.haadf is None:
        raise DataError("response ratios need HAADF images; without them use method: eds")
    apart = np.abs(data.chem.angles[:, None] - data.haadf.angles)
    ours = np.array([k for k in range(len(apart)) if k not in without and apart[k].min() < SAME], int)
    return ours, apart[ours].argmin(1)


def _net(series: TiltSeries) -> np.ndarray:
    """Without the background."""
    return series.projections - np.broadcast_to(series.background, series.projections.shape)


def _noise(series: TiltSeries, tilts: np.ndarray) -> np.ndarray:
    """(element,) what noise adds to the sum of squares of the smoothed maps."""
    from scipy.ndimage import gaussian_filter1d

    impulse = np.zeros(129)
    impulse[64] = 1
    along = float((gaussian_filter1d(impulse, SMOOTHING) ** 2).sum())
    kept = along ** sum(count > 1 for count in series.projections.shape[2:])
    if series.units == "counts":
        return kept * series.projections[:, tilts].sum((1, 2, 3), dtype=np.float64)
    return kept * series.noise_level() ** 2 * series.projections[0, tilts].size


def _regressed(images: np.ndarray, parts: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Non-negative r with sum_i r_i parts_i ~ images, the parts' noise taken off their squares."""
    from scipy.optimize import nnls

    flat = np.asarray(parts, np.float64).reshape(len(parts), -1)
    gram, right = flat @ flat.T, flat @ np.asarray(images, np.float64).ravel()
    unit = np.sqrt(np.diag(gram))
    unit[unit == 0] = 1
    gram, right, noise = gram / np.outer(unit, unit), right / unit, noise / unit**2
    share = 1.0
    while share > 1e-3 and np.linalg.eigvalsh(gram - share * np.diag(noise))[0] < 1e-2:
        share /= 2  # maps with hardly a count: their noise is nearly all there is
    gram = gram - share * np.diag(noise) if share > 1e-3 else gram + 1e-9 * np.eye(len(gram))
    root = np.linalg.cholesky(gram)
    found, _ = nnls(root.T, np.linalg.solve(root, right))
    values: np.ndarray = np.maximum(found, FLOOR * max(found.max(), 1e-30)) / unit
    return values
