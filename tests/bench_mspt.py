"""`python -m tests.bench_mspt`: ptychography of one scan, alone: what it finds of the true phase, and how fast.

The same patterns go through py4DSTEM where TOMOATLAS_PY4DSTEM names a Python that has it: it needs numpy before 2.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.atoms import Atoms, nanoparticle, potential_slices
from engine.diffraction import BAND, DiffractionSeries, Scan, with_dose
from engine.multislice import beam, far_field, narrowed, probes
from engine.ptychography import Settings, levelled, reconstruct
from tests.bench import PAGE, publish

PIXEL, BATCH = 0.04, 16  # [nm], probes that py4DSTEM takes together
STOPS = (5, 10, 20, 50)
SIMULATED = 0.1  # [nm] thickness of the simulation's slices
WRONG = 3.0  # [nm] by which the told defocus is wrong
ASTRAY = 0.03  # [nm] rms by which each told position is wrong, in the plane
DOSES = (1e5, 1e4)  # [electrons per square Angstrom]
PEER = os.environ.get("TOMOATLAS_PY4DSTEM")
RATE = 0.5  # py4DSTEM's own step size


@dataclass(frozen=True)
class Specimen:
    """Atoms in a scan of probes x probes over size x size pixels, in a box of so much depth [nm]."""

    name: str
    atoms: Atoms
    size: int
    probes: int
    depth: float

    @property
    def scan(self) -> Scan:
        return Scan(self.size, PIXEL, self.probes)

    @cached_property
    def series(self) -> DiffractionSeries:
        """Patterns without noise, on pixels a third as wide and slices of 0.1 nm, whatever the field's depth is."""
        scan, count = self.scan, round(self.depth / SIMULATED)
        wide, pixel, thickness = self.size * scan.finer, PIXEL / scan.finer, self.depth / count
        made = beam(wide, pixel, scan.optics, thickness, band_limit=BAND)
        phases = scan.optics.interaction * potential_slices(self.atoms, wide, pixel, count, thickness, scan.thermal)

        def one_row(at: jax.Array) -> jax.Array:
            intensity = jnp.abs(far_field(probes(made, at), jnp.asarray(phases), made.propagator)) ** 2
            return narrowed(intensity, self.size)

        rows = jnp.asarray(scan.positions.reshape(self.probes, self.probes, 2), jnp.float32)
        patterns = np.asarray(jax.lax.map(jax.jit(one_row), rows)).reshape(1, -1, self.size, self.size)
        return DiffractionSeries(np.fft.fftshift(patterns, axes=(2, 3)), np.zeros(1), scan.positions, PIXEL,
                                 scan.optics)

    def truth(self, shape: Sequence[int], middle: np.ndarray) -> np.ndarray:
        """The summed phase [rad] of a field (y, x) in which the scan's middle lies on this pixel (2,)."""
        wide = max(shape)
        by = np.pad((middle - (wide - 1) / 2) * PIXEL, (1, 0))
        moved = replace(self.atoms, positions=self.atoms.positions + by)
        volts = potential_slices(moved, wide, PIXEL, 1, 2 * self.depth, self.scan.thermal)[0]
        return self.scan.optics.interaction * volts[:shape[0], :shape[1]]

    def scanned(self, shape: Sequence[int], middle: np.ndarray) -> np.ndarray:
        """(y, x) True where the scan went."""
        reach = np.abs(self.series.positions).max() / PIXEL
        return np.logical_and.outer(*(np.abs(np.arange(n) - m) <= reach for n, m in zip(shape, middle)))

    def likeness(self, image: np.ndarray, middle: np.ndarray) -> float:
        """Correlation of a summed phase with the true one inside the scan, each less the plane through its vacuum."""
        inside = self.scanned(image.shape, middle)
        ours, true = (levelled(phase, inside)[0][inside] for phase in (image, self.truth(image.shape, middle)))
        return float(np.corrcoef(ours, true)[0, 1])


@dataclass(frozen=True)
class Told:
    """What a solver is told: a name, patterns and optics, and settings that differ."""

    name: str
    series: DiffractionSeries
    asked: dict[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """What came of one solve: at each of STOPS, and the errors of all iterations that are known."""

    images: list[np.ndarray]
    errors: dict[int, float]
    seconds: float
    says: str = ""


def two_deep() -> Atoms:
    """Two particles, 8 nm apart along the beam, one hiding part of the other."""
    first, second = (nanoparticle("cuau", 0.6, seed=seed) for seed in (0, 1))
    places = first.positions - [4, 0.12, 0.1], second.positions + [4, 0.12, 0.1]
    return Atoms(np.concatenate([first.symbols, second.symbols]), np.concatenate(places))


SPECIMENS = [Specimen("particle", nanoparticle("cuau", 0.65), 48, 16, 1.92),
             Specimen("larger", nanoparticle("cuau", 1.3), 80, 20, 3.2),
             Specimen("two, 8 nm apart", two_deep(), 64, 16, 10.0)]


def cases(specimen: Specimen) -> list[Told]:
    """All that is asked of a specimen; of the larger particle only what needs no noise and no lost probes."""
    true = specimen.series
    off = replace(true, optics=replace(true.optics, defocus=true.optics.defocus + WRONG))
    wrong = [Told("right", true), Told("right, finer: 2", true, {"finer": 2}), Told(f"{WRONG:g} nm off", off),
             Told("probe refined", off, {"refine": ("probe",)})]
    if specimen.name == "larger":
        return wrong
    moves = ASTRAY / np.sqrt(2) * np.random.default_rng(0).standard_normal(true.positions.shape)
    astray = replace(true, positions=true.positions + moves - moves.mean(0))
    noisy = [(dose, with_dose(true, dose)) for dose in DOSES]
    return [*wrong, Told(f"{1e3 * ASTRAY:g} pm astray", astray),
            Told("positions refined", astray, {"refine": ("positions",)}),
            *(Told(f"{dose:.0e} e/A^2, {loss}", counts, {"loss": loss}) for dose, counts in noisy
              for loss in ("amplitude", "poisson"))]


def ours(specimen: Specimen, told: Told, slices: int) -> Found:
    """Our solve; seconds of CPU without compilation."""
    asked: dict[str, Any] = {"refine": (), "slices": slices, "depth": specimen.depth} | told.asked
    reconstruct(told.series, 0, Settings(iterations=1, **asked))  # compiles
    images: list[np.ndarray] = []
    begun = time.process_time()
    solution = reconstruct(told.series, 0, Settings(iterations=STOPS[-1], **asked), checkpoints=STOPS,
                           observe=lambda n, volume: images.append(volume[0].sum(0)))
    seconds = time.process_time() - begun
    # What an iteration meets on its way; the first entry is the start.
    errors = dict(enumerate(solution.history["error"].tolist()))
    says = f"defocus {solution.metrics['defocus']:.2f} nm" if "defocus" in solution.metrics else ""
    if "positions" in solution.fields:
        says = astray(specimen, solution.fields["positions"])
    return Found(images, errors, seconds, says)


def astray(specimen: Specimen, positions: np.ndarray) -> str:
    """How far positions lie from the true ones, less a common shift, which no scan tells of."""
    left = positions - specimen.series.positions
    return f"{1e3 * np.sqrt(((left - left.mean(0)) ** 2).sum(1).mean()):.1f} pm left"


def theirs(specimen: Specimen, told: Told, slices: int) -> Found:
    """py4DSTEM's gradient descent with its own settings and small batches, with which it converges faster."""
    assert PEER is not None
    refine: Sequence[str] = told.asked.get("refine", ())
    optics = told.series.optics
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.npz"), Path(folder, "found.npz")
        np.savez(given, patterns=told.series.patterns[0], positions=told.series.positions, pixel=PIXEL, slices=slices,
                 depth=specimen.depth, voltage=optics.voltage, aperture=optics.aperture, defocus=optics.defocus,
                 step=specimen.size * PIXEL / specimen.probes, stops=STOPS, group=BATCH, rate=RATE,
                 refine_probe="probe" in refine, refine_positions="positions" in refine)
        code = Path(__file__).with_name("ptychography_peer.py")
        subprocess.run([PEER, str(code), str(given), str(found)], check=True)
        with np.load(found) as file:
            result = {name: file[name] for name in file.files}
    says = astray(specimen, result["positions"]) if "positions" in refine else ""
    return Found(list(result["images"]), dict(zip(STOPS, result["errors"].tolist())), float(result["seconds"][-1]),
                 says)


def row(specimen: Specimen, told: Told, who: str, slices: int, found: Found) -> str:
    """A line of the table. py4DSTEM has the scan's middle on pixel n / 2 of an image, we on (n - 1) / 2."""
    middle = (np.array(found.images[0].shape) - (who == "ours")) / 2
    like = [f"{specimen.likeness(image, middle):.4f}" for image in found.images]
    errors = [f"{1e4 * found.errors[n]:.2f}" for n in STOPS]
    line = (f"| {specimen.name} | {told.name} | {who} | {slices} | {' / '.join(like)} | {' / '.join(errors)} | "
            f"{found.says} | {found.seconds:.1f} |")
    print(line, flush=True)
    return line


def beside(specimen: Specimen, told: Told, slices: int) -> bool:
    """Whether py4DSTEM has a go: it knows no Poisson likelihood, and takes a minute for the larger particle."""
    right = told.name == "right"
    return bool(PEER) and (right or slices > 1 and specimen.name != "larger"
                           and not {"loss", "finer"} & told.asked.keys())


def table(specimens: Sequence[Specimen]) -> tuple[list[str], dict[tuple[str, str, str, int], Found]]:
    """All rows, and what they tell of."""
    after = " / ".join(map(str, STOPS))
    rows = [f"| specimen | told | | slices | correlation with the true phase after {after} | error of amplitudes, 1e-4 "
            "| found | CPU s |", "|" + "---|" * 8]
    kept: dict[tuple[str, str, str, int], Found] = {}
    for specimen in specimens:
        for told in cases(specimen):
            for slices in (1, 5):
                solvers = {"ours": ours} | ({"py4DSTEM": theirs} if beside(specimen, told, slices) else {})
                for who, solve in solvers.items():
                    kept[specimen.name, told.name, who, slices] = found = solve(specimen, told, slices)
                    rows.append(row(specimen, told, who, slices, found))
    return rows, kept


def figure(specimen: Specimen, kept: dict[tuple[str, str, str, int], Found], path: Path) -> None:
    """The two particles: truth, what is found of them, and errors against iterations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    off = f"{WRONG:g} nm off"
    shown = {"one slice": ("right", 1), "five slices": ("right", 5), f"five, defocus {off}": (off, 5),
             f"five, {off}, probe refined": ("probe refined", 5)}
    found = {name: kept[specimen.name, told, "ours", slices] for name, (told, slices) in shown.items()}
    shape = found["five slices"].images[-1].shape
    middle = (np.array(shape) - 1) / 2
    inside = specimen.scanned(shape, middle)
    images = {"truth": specimen.truth(shape, middle)} | {name: one.images[-1] for name, one in found.items()}
    images = {name: levelled(image, inside)[0][np.ix_(inside.any(1), inside.any(0))] for name, image in images.items()}
    sheet = Figure(figsize=(11, 7), layout="constrained")
    panels = sheet.subplots(2, 3).ravel()
    for panel, (name, image) in zip(panels, images.items()):
        shade = panel.imshow(image, cmap="magma", vmin=0, vmax=images["truth"].max())
        panel.set(title=name, xticks=[], yticks=[])
    sheet.colorbar(shade, ax=panels[:5], label="phase [rad]", shrink=0.6)
    for name, one in found.items():
        panels[5].plot(list(one.errors)[1:], list(one.errors.values())[1:], label=name)
    peer = kept.get((specimen.name, "right", "py4DSTEM", 5))
    if peer:
        panels[5].plot(list(peer.errors), list(peer.errors.values()), "kx", label="five slices, py4DSTEM")
    panels[5].set(xlabel="iteration", yscale="log", title="error of amplitudes")
    panels[5].grid(alpha=0.3, which="both")
    panels[5].legend(fontsize=8)
    FigureCanvasAgg(sheet)
    sheet.savefig(path, dpi=100)


def told_of() -> str:
    """What the table shows, in words."""
    sizes = "; ".join(f"{s.name}: {len(s.atoms)} atoms in {s.depth:g} nm along the beam, {s.probes} x {s.probes} "
                      f"probes over {s.size} x {s.size} pixels" for s in SPECIMENS)
    optics = SPECIMENS[0].scan.optics
    peer = ("py4DSTEM: version 0.14 needs numpy before 2 and ours a later one, so it ran in an interpreter of its own, "
            f"on the same patterns and the same start, its step size {RATE:g}, batches of {BATCH}; its phases are kept "
            "positive, which ours are not." if PEER else
            "No Python with py4DSTEM was named (TOMOATLAS_PY4DSTEM), so the same patterns went through no other "
            "package: it needs numpy before 2, ours a later one, and so a venv of its own.")
    return (
        f"One scan of CuAu ({sizes}), {PIXEL:g} nm a pixel, {optics.voltage:g} kV, {optics.aperture:g} mrad, defocus "
        f"{optics.defocus:g} nm; simulated on pixels a third as wide and slices of {SIMULATED:g} nm, its detector "
        f"ending where the field's frequencies end. Groups of {Settings().group} probes, nothing refined where nothing "
        "is said; finer 2: waves on half the pixel. Correlation inside the scan, each phase less the plane through its "
        "vacuum; errors are squared, relative to the squared amplitudes, as met during the iteration; CPU s of all "
        "iterations, compiled before; astray, left: "
        f"root mean square distance in the plane, told positions {1e3 * ASTRAY:g} pm. {peer}")


def main() -> None:
    """Write the section and the figure."""
    rows, kept = table(SPECIMENS)
    picture = PAGE.with_name("ptychography.png")
    figure(SPECIMENS[-1], kept, picture)
    publish("Ptychography", "\n".join([told_of(), "", *rows, "", f"![Two particles in depth]({picture.name})"]))


if __name__ == "__main__":
    main()
