"""`python -m tests.bench_errors3d`: standard-error volumes against what noise does, over draws of it."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace

import numpy as np

from engine import fused3d
from engine.data import DataWarning, MultiModal
from tests.bench import publish
from tests.specimens import CHEM_SNR, simulated, with_images

SIZE, DRAWS, PROBES = 48, 20, 16
OBJECT = 0.5  # of a concentration: voxels in the specimen


@dataclass(frozen=True)
class Case:
    """Which measurement, and which solve of it."""

    words: str
    settings: fused3d.Settings
    chem: int = 9
    snr: float = CHEM_SNR
    size: int = SIZE

    def data(self, seed: int) -> MultiModal:
        """A draw; the images are said to be the counts that they are."""
        return with_images(simulated(self.size, 47, self.chem, snr=self.snr, seed=seed), units="counts")


STATISTICAL = fused3d.Settings(iterations=100, tolerance=0.0, lambda_tv=0.3, error_probes=PROBES)
CASES = (
    Case("fused, TV 0.3", STATISTICAL),
    Case("fused, TV 1", replace(STATISTICAL, lambda_tv=1.0)),
    Case("fused, all weights times 10", replace(STATISTICAL, lambda_model=10.0, lambda_chem=10.0, lambda_tv=3.0)),
    Case("fused, HAADF times 0.1", replace(STATISTICAL, lambda_model=0.1)),
    Case("chem_tv, TV 0.3", replace(STATISTICAL, method="chem_tv", iterations=300)),
    Case("fused, TV 0.03", replace(STATISTICAL, lambda_tv=0.03)),
    Case("fused, without TV", replace(STATISTICAL, lambda_tv=1e-6)),
    Case("fused, without TV, 47 maps of SNR 25", replace(STATISTICAL, lambda_tv=1e-6, iterations=300), 47, 25.0, 32),
)


def row(case: Case) -> str:
    """Predicted over observed, in the specimen's voxels and for each element."""
    volumes, begun = [], time.perf_counter()
    for seed in range(DRAWS):
        volumes.append(fused3d.reconstruct(case.data(seed), case.settings).volume)
    solve = (time.perf_counter() - begun) / DRAWS
    data, begun = case.data(0), time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", DataWarning)
        told = fused3d.reconstruct(data, replace(case.settings, errors="sandwich"))
    probed = time.perf_counter() - begun - solve
    assert data.truth is not None
    inside, spread = data.truth > OBJECT, np.std(volumes, axis=0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = told.fields["standard_error"] / spread
    low, middle, high = np.nanpercentile(ratio[inside], (10, 50, 90))
    each = ", ".join(f"{e} {np.nanmedian(r[i]):.2f}" for e, r, i in zip(data.chem.elements, ratio, inside))
    observed = np.sqrt(np.mean(spread[inside] ** 2))
    truth = np.sqrt(np.mean((told.volume - data.truth)[inside] ** 2))
    return (f"| {case.words} | {case.size} | {middle:.2f} | {low:.2f} to {high:.2f} | {each} | {observed:.3f} | "
            f"{truth:.3f} | {told.metrics['error_steps']:.0f} | {told.metrics['error_residual']:.3f} | "
            f"{solve:.1f} | {probed:.1f} | {'yes' if warned else 'no'} |")


def main() -> None:
    """Write the section."""
    rows = ["| solve | size | predicted / observed, median | 10 % to 90 % | by element | observed spread, rms | "
            "distance from the truth, rms | steps per probe | worst residual | s per solve | s for the errors | "
            "warns |",
            "|" + "---|" * 12]
    publish("Standard errors in 3D", "\n".join([
        f"cocuo, 47 images (SNR 2208) and, unless said otherwise, 9 maps (SNR {CHEM_SNR:g}), standard errors of one "
        f"solve from {PROBES} probes against the standard deviation over {DRAWS} draws of noise, voxel by voxel where "
        f"the truth is above {OBJECT:g}. At these numbers of draws and probes a right prediction would have ratios of "
        "0.73 to 1.36 (10 % to 90 %). An error is of noise alone: what TV and the missing wedge distort alike in every "
        "draw is in the distance from the truth. Without TV the maps do not determine the volume: the bound x >= 0 "
        "and where the solver stops decide, errors to first order exceed the concentrations, and a warning says so.",
        "", *rows, *map(row, CASES)]))


if __name__ == "__main__":
    main()
