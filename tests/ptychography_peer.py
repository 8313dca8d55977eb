"""`python ptychography_peer.py IN.npz OUT.npz`: py4DSTEM's ptychography of one scan, in an interpreter that has it.

It needs numpy before 2 and ours needs a later one, so it lives in a venv of its own and this file imports nothing of
ours. Lengths come in nm, as ours have them; py4DSTEM takes Angstrom, eV and mrad.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import numpy as np


def prepared(given: dict[str, np.ndarray]) -> Any:
    """A reconstruction that starts from empty space and the probe that the optics make."""
    import matplotlib

    matplotlib.use("Agg")
    import py4DSTEM
    from py4DSTEM.process.phase import MultislicePtychography, SingleslicePtychography

    patterns, positions, pixel = given["patterns"], given["positions"], float(given["pixel"])
    size, rows = patterns.shape[-1], round(len(patterns) ** 0.5)
    slices, thickness = int(given["slices"]), float(given["depth"]) / int(given["slices"])
    # Its first slice lies at the probe's plane, ours half a slice behind the entrance face.
    asked: dict[str, Any] = {
        "energy": 1e3 * float(given["voltage"]), "semiangle_cutoff": float(given["aperture"]), "rolloff": 0.0,
        "polar_parameters": {"defocus": 10 * (float(given["defocus"]) - thickness / 2)},
        "datacube": py4DSTEM.DataCube(patterns.reshape(rows, rows, size, size).astype(np.float32)),
        "initial_scan_positions": 10 * positions, "object_type": "potential", "verbose": False, "device": "cpu"}
    if slices == 1:
        work = SingleslicePtychography(**asked)
    else:
        work = MultislicePtychography(num_slices=slices, slice_thicknesses=10 * thickness, **asked)
    middle = np.full((rows, rows), float(size // 2))
    work.preprocess(plot_center_of_mass=False, plot_rotation=False, plot_probe_overlaps=False, force_com_rotation=0,
                    force_com_transpose=False, force_com_shifts=(middle, middle),
                    force_scan_sampling=10 * float(given["step"]), force_reciprocal_sampling=0.1 / (size * pixel))
    return work


def main() -> None:
    """Write phases (stop, y, x) summed over slices, errors (stop,), CPU seconds (stop,) and positions (probe, 2) [nm]
    from a corner; the scan's middle lies on pixel n / 2 of an image."""
    warnings.filterwarnings("ignore")
    given = dict(np.load(sys.argv[1]))
    work, images, errors, seconds, done = prepared(given), [], [], [], 0
    begun = time.process_time()
    for stop in given["stops"].tolist():
        work.reconstruct(num_iter=stop - done, reset=done == 0, max_batch_size=int(given["group"]), seed_random=0,
                         step_size=float(given["rate"]), fix_probe=not given["refine_probe"],
                         fix_positions=not given["refine_positions"], progress_bar=False)
        done = stop
        seconds.append(time.process_time() - begun)
        found = np.asarray(work._object)
        images.append(found.sum(0) if found.ndim == 3 else found)
        errors.append(float(work.error))
    np.savez(sys.argv[2], images=np.array(images), errors=errors, seconds=seconds, positions=work.positions / 10)


if __name__ == "__main__":
    main()
