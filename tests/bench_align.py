"""`python -m tests.bench_align`: planted misalignment found again, and what it costs the fused volume.

Shifts up to 10 pixels along both axes, a tilt axis 3 pixels beside the images' middle and turned by 2 degrees, noise as
in F3. Isolated: the reference specimen at 64^3 through the stages of configs/align_planted.yaml, against the same
simulation with nothing planted. Leaving the field: blobs of a slab three times as wide as an image, to 60 degrees; a
thin slab tells little of how the tilt axis is turned, for a turned slab shows nearly the same.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from engine import fused3d, metrics, registration, simulate
from engine.align import Alignment, Level
from engine.data import MultiModal
from sweeps import specimens
from sweeps.alignments import kept
from sweeps.settings import load
from tests.bench import publish
from tests.specimens import HAADF_SNR, blobs

CONFIG = Path(__file__).parent.parent / "configs" / "align_planted.yaml"
PERFECT = ["data.misalign={shift: 0.0}", "data.align=null"]
REPLICATES = 3
FREE = ("shift", "axis")
LEVELS = (Level(4, 60, FREE), Level(2, 60, FREE), Level(1, 40, FREE))
EXTENT = (0.4, 2.2)
TILTS, SIZE = 41, 64
HEADING = "Alignment: planted misalignment"


def isolated(replicate: int, folder: Path) -> tuple[np.ndarray, float, float, float]:
    """Errors along y and x [pixel], of the turn [deg], and the fused NRMSE aligned and where nothing was planted."""
    scores = []
    for changes in ([], PERFECT):
        sweep = load(CONFIG, ["grid={}", f"data.replicate={replicate}", *changes])
        data: MultiModal = specimens.prepared(sweep, folder)
        assert data.truth is not None
        solver = sweep.solver.model_dump()
        settings = fused3d.Settings(**{name: solver[name] for name in fused3d.Settings.__dataclass_fields__})
        volume = fused3d.reconstruct(data, settings).volume
        scores.append(float(metrics.nrmse_elements(volume, data.truth).mean()))
    found = next(each for each in kept(folder) if each.title.split(" (")[0].endswith(f" {replicate}"))
    assert found.error is not None
    return found.error, found.turn - float(found.arrays["planted_inplane"].mean()), scores[0], scores[1]


def leaving(seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Errors along y and x after correlation of neighbours, after matching [pixel], and of the turn [deg]."""
    rng, angles = np.random.default_rng(seed), simulate.spread((-60, 60), TILTS)
    places, none = rng.uniform(-1, 1, (1200, 3)) * [8, 110, 50], np.zeros(TILTS)
    true = Alignment(rng.uniform(-10, 10, (TILTS, 2)) + [3, 0], none + 2, none, none)
    images = blobs(true, angles, places, rng.uniform(0.5, 1.5, len(places)), SIZE)
    gain = (HAADF_SNR - 1) / images.mean()
    noisy = rng.poisson(gain * images) / gain
    stages_of = [("cross_correlation", {}), ("match", {"levels": LEVELS})]
    errors = []
    for count in (1, 2):
        found = registration.register(noisy, angles, stages_of[:count], extent=EXTENT, bins=4).alignment
        off = registration.ungauged(found.shifts - true.shifts, angles)
        errors.append(np.sqrt((off**2).mean(0)))
    return errors[0], errors[1], float(found.inplane.mean() - 2)


def main() -> None:
    """Print the table, and write it to docs/BENCHMARKS.md."""
    rows, begun = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for replicate in range(REPLICATES):
            error, turn, aligned, perfect = isolated(replicate, Path(folder))
            rows.append(f"| isolated, noise {replicate} | {error[0]:.3f} | {error[1]:.3f} | {turn:+.3f} | "
                        f"{aligned:.4f} | {perfect:.4f} | {100 * (aligned / perfect - 1):+.1f} % |")
            print(rows[-1], flush=True)
    for seed in range(REPLICATES):
        before, error, turn = leaving(seed)
        rows.append(f"| leaving the field, {seed} (neighbours alone: {before[0]:.2f}, {before[1]:.2f}) | "
                    f"{error[0]:.3f} | {error[1]:.3f} | {turn:+.3f} | | | |")
        print(rows[-1], flush=True)
    print(f"{time.perf_counter() - begun:.0f} s")
    publish(HEADING, "\n".join([__doc__.split("\n\n")[1], "", HEAD, *rows]))


HEAD = ("| specimen | rms along y [pixel] | along x | turn [degrees] | fused NRMSE, aligned | nothing planted | |\n"
        "|---|---|---|---|---|---|---|")

if __name__ == "__main__":
    main()
