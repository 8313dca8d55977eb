"""`python -m tests.bench_failures`: what goes wrong where data are not as the model says, and what the user is told.

After the discussion of Schwartz et al., Imaging 3D Chemistry at 1 nm Resolution with Fused Multi-Modal Electron
Tomography.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from engine import metrics, responses, simulate
from engine.data import MultiModal
from engine.fused3d import Settings, reconstruct
from engine.phantoms import ELEMENTS, FIELD_NM, phantom
from sweeps.defaults import SNR
from tests.bench import publish

SIZE, HAADF, CHEM, SEED = 48, 31, 9, 3
CHOSEN = Settings(lambda_tv=1.0)
FAINT = 1e-6  # of a weight: as good as none, and a number that solvers take


@dataclass(frozen=True)
class Case:
    """Data and settings, and what is wrong with them."""

    words: str
    data: MultiModal
    settings: Settings = CHOSEN


def series(name: str = "cocuo", gone: str | None = None) -> MultiModal:
    """A specimen with the counts of F3. gone: an element that scatters but has no map."""
    truth, elements = phantom(name, (SIZE,) * 3, FIELD_NM / SIZE), ELEMENTS[name]
    data = simulate.multimodal(
        truth, tuple(elements.values()), tuple(elements), pixel_size=FIELD_NM / SIZE, snr=SNR[name], gamma=1.6,
        haadf_angles=np.linspace(-70, 70, HAADF), chem_angles=np.linspace(-70, 70, HAADF)[::4][:CHEM], background=0.15,
        background_known=True, weights="z_gamma", seed=[SEED])
    if gone is None:
        return data
    left = [k for k, element in enumerate(elements) if element != gone]
    chem = data.chem
    kept = replace(chem, projections=chem.projections[left], elements=tuple(chem.elements[k] for k in left),
                   background=np.broadcast_to(chem.background, chem.projections.shape)[left])
    assert data.sensitivity is not None
    return MultiModal(kept, data.haadf, tuple(data.numbers[k] for k in left), data.shape, data.sensitivity[left],
                      truth[left])


def faint(data: MultiModal, element: str) -> MultiModal:
    """HAADF as it would be if an element did not scatter."""
    assert data.truth is not None and data.haadf is not None
    dark = data.truth.copy()
    dark[data.chem.elements.index(element)] = 0
    scatter = sum(number**1.6 * x**1.6 for number, x in zip(data.numbers, dark))
    images = simulate.clean_projections(np.asarray(scatter)[None], data.haadf.angles, SIZE)
    images *= data.haadf.projections.mean() / images.mean()
    noise = data.haadf.noise_level()[0] * np.random.default_rng(SEED).standard_normal(images.shape)
    return replace(data, haadf=replace(data.haadf, projections=images + noise))


def thick(data: MultiModal, strength: float) -> MultiModal:
    """Images whose contrast saturates and turns over, as where electrons are scattered beyond the detector."""
    assert data.haadf is not None
    images = data.haadf.projections
    share = strength * images / images.max()
    return replace(data, haadf=replace(data.haadf, projections=images * np.exp(-share)))


def cases() -> Iterator[Case]:
    """The gallery."""
    plain = series()
    yield Case("as the model says", plain)
    for gone in ("Au", "O", "Cu"):
        yield Case(f"{gone} scatters, but has no map", series(gone=gone))
    yield Case("conio: Ni scatters, but has no map", series("conio", gone="Ni"))
    yield Case("O has a map, but does not scatter", faint(plain, "O"))
    for strength in (1.0, 2.0, 4.0):
        yield Case(f"thick: contrast turns over at {1 / strength:g} of the brightest path", thick(plain, strength))
    yield Case("without the HAADF term", plain, replace(CHOSEN, method="chem_tv"))
    yield Case("without the chemical term", plain, replace(CHOSEN, lambda_chem=FAINT))
    yield Case("without total variation", plain, replace(CHOSEN, lambda_tv=FAINT))


def row(case: Case) -> str:
    """A line of the table."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if case.settings.method != "chem_tv":
            responses.check(case.data)
        solution = reconstruct(case.data, case.settings)
    each = metrics.nrmse_elements(solution.volume, case.data.truth)
    found = ", ".join(f"{element} {value:.2f}" for element, value in zip(case.data.chem.elements, each, strict=True))
    told = "; ".join(str(warning.message) for warning in caught) or "nothing"
    told = told if solution.ok else f"{solution.status}; {told}"
    explained = responses.fit(case.data).r_squared_smooth
    line = f"| {case.words} | {each.mean():.3f} | {found} | {explained:.3f} | {told} |"
    print(line, flush=True)
    return line


def main() -> None:
    """Write the section."""
    rows = [row(case) for case in cases()]
    publish("Failures", "\n".join([
        f"Reference specimens at {SIZE}^3, {HAADF} images, {CHEM} maps of F3's counts, lambda_tv = 1, other weights 1; "
        "R^2: of the smoothed images as a sum of the smoothed maps. Below 0.8 the user is told; where other elements "
        "lie where a missing one does, R^2 stays high, and nobody can tell. A weight of 1e-6 stands for none.", "",
        "| what is wrong | NRMSE | of each element | R^2 | what the user is told |", "|---|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
