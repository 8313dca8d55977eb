"""The figure of an alignment: sinograms before and after, shifts and residuals against the tilt, half sets."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sweeps.alignments import Alignment

COLOURS = ("#0072B2", "#D55E00")
LEAST = 0.2  # [deg] that the panel of turns spans: less is nothing, and no trend


def drawn(each: Alignment) -> Figure:
    """Six panels; crosses are what was planted."""
    found, figure = each.arrays, Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    order = np.argsort(found["angles"])
    _sinograms(axes[0, 0], axes[0, 1], each, order)
    angles, used = found["angles"][order], found["used"][order]
    moves = -found["shifts"][order]
    for k, name in enumerate("yx"):
        axes[0, 2].plot(angles[used], moves[used, k], "o-", ms=3, lw=0.7, color=COLOURS[k], label=f"along {name}")
        axes[0, 2].plot(angles[~used], moves[~used, k], "o", ms=4, mfc="none", color="0.6")
        if "apart" in found:
            axes[0, 2].plot(angles, moves[:, k] + found["apart"][order, k], "x", ms=4, color=COLOURS[k])
    axes[0, 2].set_ylabel("moved by [pixel]")
    for name, words, colour in (("before", "before", "0.6"), ("residual", "after", COLOURS[0])):
        axes[1, 0].semilogy(angles[used], found[name][order][used], ".-", color=colour, lw=1, label=words)
    axes[1, 0].set_ylabel("residual of an image")
    axes[1, 1].plot(angles, found["inplane"][order], ".-", lw=1, color=COLOURS[0])
    axes[1, 1].set_ylabel("turn about the beam [degrees]")
    low, high = axes[1, 1].get_ylim()
    spread = max(high - low, LEAST)
    axes[1, 1].set_ylim((low + high - spread) / 2, (low + high + spread) / 2)
    halves = each.halves
    axes[1, 2].plot(halves.frequency, halves.correlation, lw=1.2, color=COLOURS[0], label="two half sets")
    axes[1, 2].plot(halves.frequency, halves.threshold(), "--", lw=0.8, color="0.5", label="0.143")
    lowest = min(0, halves.correlation.min())
    axes[1, 2].set(xlabel="frequency [1/nm]", ylabel="Fourier shell correlation", ylim=(lowest, 1.02))
    for ax in (axes[0, 2], *axes[1]):
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)
    for ax in (axes[0, 2], axes[1, 0], axes[1, 1]):
        ax.set_xlabel("tilt [degrees]")
    figure.suptitle(each.title, fontsize=10)
    return figure


def _sinograms(first: Axes, second: Axes, each: Alignment, order: np.ndarray) -> None:
    """Rows are tilts as they follow each other, whatever their distance."""
    pictures = [each.arrays[name][order] for name in ("line_before", "line_after")]
    top = float(np.percentile(pictures[1], 99.8))
    for ax, picture, words in zip((first, second), pictures, ("as measured", "aligned"), strict=True):
        ax.imshow(picture, aspect="auto", cmap="magma", vmin=0, vmax=top, origin="lower", interpolation="nearest")
        ticks = np.unique(np.linspace(0, len(order) - 1, 5).round().astype(int))
        ax.set_yticks(ticks, [f"{each.arrays['angles'][order][k]:g}" for k in ticks])
        ax.set_xlabel("y [pixel]")
        ax.set_title(f"sinogram at the middle of x, {words}", fontsize=9)
    first.set_ylabel("tilt [degrees]")
