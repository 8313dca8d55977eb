"""What the alignments of a run say: their table, and their figures for summary.json. Imports without JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.resolution import ShellCorrelation
from sweeps import stages

ACROSS = 3  # tilts side by side in the table


@dataclass(frozen=True)
class Alignment:
    """An alignment that a run's cells share, as `sweeps.aligned` keeps it. arrays: by the names given there."""

    title: str
    arrays: stages.Arrays

    @property
    def before(self) -> float:
        """Mean residual of an image before anything was aligned."""
        return float(np.nanmean(self.arrays["before"]))

    @property
    def after(self) -> float:
        """And after."""
        return float(np.nanmean(self.arrays["residual"]))

    @property
    def turn(self) -> float:
        """Turn of the tilt axis about the beam [deg]: the images' mean."""
        return float(self.arrays["inplane"][self.arrays["used"]].mean())

    @property
    def halves(self) -> ShellCorrelation:
        """Shell correlation of two half sets, frequencies in 1/nm."""
        found = self.arrays
        return ShellCorrelation(found["shell_frequency"] / float(found["pixel"]), found["shell_correlation"],
                                found["shell_number"])

    @property
    def error(self) -> np.ndarray | None:
        """Root mean square error along y and x [pixel], less what a moved volume shows; None where nothing is known."""
        if "apart" not in self.arrays:
            return None
        off: np.ndarray = np.sqrt((self.arrays["apart"][self.arrays["used"]] ** 2).mean(0))
        return off


def kept(folder: Path) -> list[Alignment]:
    """The alignments of a run folder, in the order of their titles."""
    found = sorted(stages.kept(folder, "align"), key=lambda arrays: str(arrays["title"]))
    titles = [str(arrays["title"]) for arrays in found]
    return [Alignment(title if titles.count(title) == 1 else f"{title}, {titles[:k].count(title) + 1}", arrays)
            for k, (title, arrays) in enumerate(zip(titles, found, strict=True))]


def summary(folder: Path) -> dict[str, Any]:
    """What summary.json says of them: of each by its title, and their means."""
    found = {each.title: _numbers(each) for each in kept(folder)}
    if not found:
        return {}
    means = {f"align_{name}": float(np.mean([each[name] for each in found.values()]))
             for name in next(iter(found.values())) if all(name in each for each in found.values())}
    return means | {"alignments": found}


def _numbers(each: Alignment) -> dict[str, float]:
    numbers = {"residual_before": each.before, "residual_after": each.after, "residual_fold": each.before / each.after,
               "axis_turn_degrees": each.turn, "left_out": float((~each.arrays["used"]).sum()),
               "half_sets_nm": each.halves.length()}
    if each.error is not None:
        numbers |= {"error_y_pixels": float(each.error[0]), "error_x_pixels": float(each.error[1]),
                    "error_turn_degrees": each.turn - float(each.arrays["planted_inplane"].mean())}
    return {name: value for name, value in numbers.items() if np.isfinite(value)}


def text(folder: Path) -> str:
    """How each alignment went, and shifts and residuals of every tilt."""
    return "\n\n".join(f"{_words(each)}\n{_tilts(each)}" for each in kept(folder))


def _words(each: Alignment) -> str:
    used, halves = each.arrays["used"], each.halves
    resolved = halves.length()
    last = np.isclose(halves.cutoff(), halves.frequency[-1])
    lines = [f"Alignment of {each.title}: {used.sum()} of {used.size} images",
             f"residual of an image, mean: {each.before:.4g} before, {each.after:.4g} after, "
             f"{each.before / each.after:.1f} times less; the tilt axis is turned by {each.turn:.2f} degrees",
             "volumes of every second image each agree (Fourier shells, 0.143) "
             + (f"to {resolved:.4g} nm{', the last shell there is' if last else ''}" if np.isfinite(resolved)
                else "in no shell")]
    if each.error is not None:
        turn = each.turn - each.arrays["planted_inplane"].mean()
        lines.append(f"error, less what a moved volume shows: {each.error[0]:.3f} pixels rms along y, "
                     f"{each.error[1]:.3f} along x; turn {turn:+.3f} degrees")
    return "\n".join([*lines, *(f"left out: {words}" for words in each.arrays["words"])])


def _tilts(each: Alignment) -> str:
    """Angle, how far the image was moved along y and x [pixel], residual before and after; several side by side."""
    found = each.arrays
    order = np.argsort(found["angles"])
    residuals = [found["before"], found["residual"]]
    cells = [[f"{found['angles'][t]:g}", *(f"{round(-move, 2) + 0.0:.2f}" for move in found["shifts"][t]),
              *(f"{each[t]:.4f}" if found["used"][t] else "-" for each in residuals)] for t in order]
    rows = -(-len(cells) // ACROSS)
    head = ["degrees", "y", "x", "before", "after"]
    blank = [""] * len(head)
    body = [sum((cells[k + rows * n] if k + rows * n < len(cells) else blank for n in range(ACROSS)), [])
            for k in range(rows)]
    return "\n".join("".join(f"{cell:>10}" for cell in row).rstrip() for row in [head * ACROSS, *body])
