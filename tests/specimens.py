"""Simulated data for tests: the reference specimen at any size, and changes of it that laws speak of."""

from dataclasses import replace

import numpy as np

from engine import simulate
from engine.align import Alignment
from engine.data import MultiModal, TiltSeries
from engine.euler import matrix
from engine.phantoms import ELEMENTS, FIELD_NM, phantom

CHEM_SNR, HAADF_SNR = 2.5, 2208.67  # as in F3, with one level for all elements


def simulated(size: int, haadf: int, chem: int, *, snr: float = CHEM_SNR, haadf_snr: float = HAADF_SNR,
              gamma: float = 1.6, seed: int = 0, name: str = "cocuo") -> MultiModal:
    """A reference specimen in `size`^3 voxels, with `haadf` images and `chem` maps between -70 and 70 degrees."""
    elements = ELEMENTS[name]
    return simulate.multimodal(
        phantom(name, (size,) * 3, FIELD_NM / size), tuple(elements.values()), tuple(elements),
        pixel_size=FIELD_NM / size, haadf_angles=simulate.spread((-70, 70), haadf),
        chem_angles=simulate.chemical_angles((-70, 70), haadf, chem),
        snr=dict.fromkeys(elements, snr) | {"haadf": haadf_snr}, gamma=gamma, seed=seed)


def with_maps(data: MultiModal, **changes) -> MultiModal:
    """The same data with fields of the chemical series changed."""
    return replace(data, chem=replace(data.chem, **changes))


def with_images(data: MultiModal, **changes) -> MultiModal:
    """The same data with fields of the HAADF series changed."""
    assert data.haadf is not None
    return replace(data, haadf=replace(data.haadf, **changes))


def as_net_counts(data: MultiModal) -> MultiModal:
    """The maps with their known background subtracted, compared by least squares."""
    return with_maps(data, projections=data.chem.projections - data.chem.background, background=0.0,
                     units="net_counts")


def flipped(series: TiltSeries, axis: int) -> TiltSeries:
    """A series seen in a mirror: along x (3), or along y (2), where angles turn round as well."""
    angles = -series.angles if axis == 2 else series.angles
    return replace(series, projections=np.flip(series.projections, axis), angles=angles)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|, in double precision."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def blobs(alignment: Alignment, angles: np.ndarray, places: np.ndarray, heights: np.ndarray, size: int = 48,
          sigma: float = 1.5) -> np.ndarray:
    """Images (tilt, y, x) of Gaussian blobs at places (blob, z y x) [pixel] that lie as an alignment says: integrals
    along the beam, without any volume."""
    axis, images = np.arange(size) - (size - 1) / 2, []
    for t, angle in enumerate(angles):
        turn = matrix([alignment.inplane[t], 0, 0]) @ matrix([0, alignment.azimuth[t], 0])
        seen = (places @ (turn @ matrix([0, 0, angle + alignment.tilt[t]])).T)[:, 1:] + alignment.shifts[t]
        y, x = (np.exp(-((axis - seen[:, [k]]) ** 2) / (2 * sigma**2)) for k in (0, 1))
        images.append(np.einsum("k,ky,kx->yx", heights, y, x))
    return np.array(images, np.float32) * np.float32(sigma * np.sqrt(2 * np.pi))
