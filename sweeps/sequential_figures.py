"""The figures of an mspt run: phase images of tilts, and how each was found to lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine import resolution
from sweeps import figures

SHOWN = 6  # phase images of a cell
TURNS = ("about the beam", "about the tilt axis", "across")
COLOURS = ("#0072B2", "#D55E00", "#009E73")


def phases(groups: Mapping[str, Any]) -> Figure:
    """A row per result: phase images of tilts from the lowest to the highest. groups: by title."""
    figure = Figure(figsize=(1.9 * SHOWN + 0.6, 2.1 * len(groups) + 0.6), layout="constrained")
    axes = figure.subplots(len(groups), SHOWN, squeeze=False)
    for row, (words, group) in zip(axes, groups.items(), strict=True):
        images, angles = group["field_images"][:], group["field_alignment"][:, 0]
        top = float(np.percentile(images, 99.8))
        picked = np.unique(np.linspace(0, len(images) - 1, SHOWN).round().astype(int))
        for ax in row:
            ax.set_axis_off()
        for ax, tilt in zip(row, picked):
            ax.set_axis_on()
            shown = ax.imshow(images[tilt], cmap="gray", vmin=0, vmax=top, origin="lower")
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{angles[tilt]:g}°", fontsize=8)
        row[0].set_ylabel(words, fontsize=8)
        figure.colorbar(shown, ax=list(row), label="phase [rad]", pad=0.01).ax.tick_params(labelsize=7)
    voxel = float(np.min(group.attrs["voxel_nm"]))
    figures.scale_bar(axes[0, 0], images.shape[2], images.shape[1], voxel)
    return figure


def alignment(groups: Mapping[str, Any]) -> Figure:
    """A row per result: shifts, turns and residuals of all tilts; crosses are what was planted. groups: by title."""
    figure = Figure(figsize=(11, 2.5 * len(groups) + 0.5), layout="constrained")
    axes = figure.subplots(len(groups), 3, squeeze=False)
    for row, (words, group) in zip(axes, groups.items(), strict=True):
        angles, numbers = group["field_alignment"][:, 0], group["field_alignment"][:, 1:]
        planted = group["field_planted"][:] if "field_planted" in group else None
        for k, name in enumerate(("along y", "along x")):
            _points(row[0], angles, numbers[:, k], None if planted is None else planted[:, k], name, COLOURS[k])
        for k, name in enumerate(TURNS):
            if numbers[:, 2 + k].any() or (planted is not None and planted[:, 2 + k].any()):
                _points(row[1], angles, numbers[:, 2 + k], None if planted is None else planted[:, 2 + k], name,
                        COLOURS[k])
        for residual, name, colour in zip(group["field_residual"][:], ("before", "after"), ("0.6", "#0072B2")):
            row[2].semilogy(angles, residual, ".-", color=colour, label=name, lw=1)
        row[0].set_title(words, fontsize=8, loc="left")
        for ax, label in zip(row, ("shift [pixel]", "turn [degrees]", "residual of an image")):
            ax.set_ylabel(label, fontsize=8)
            ax.tick_params(which="both", labelsize=7)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=7, frameon=False)
    for ax in axes[-1]:
        ax.set_xlabel("tilt [degrees]", fontsize=8)
    return figure


def _points(ax: Axes, angles: np.ndarray, found: np.ndarray, planted: np.ndarray | None, name: str,
            colour: str) -> None:
    ax.plot(angles, found, "o", color=colour, ms=3.5, mfc="none", label=name)
    if planted is not None:
        ax.plot(angles, planted, "x", color=colour, ms=4)


def spectra(groups: Mapping[str, Any]) -> Figure:
    """A row per result: its spectral amplitude on the axes, with the last peak of each, and on the planes (Fig. 5)."""
    figure = Figure(figsize=(12, 2.9 * len(groups) + 0.4), layout="constrained")
    axes = figure.subplots(len(groups), 4, squeeze=False, width_ratios=(1.5, 1, 1, 1))
    for row, (words, group) in zip(axes, groups.items(), strict=True):
        volume, voxel = group["volume"][0], float(np.min(group.attrs["voxel_nm"]))
        shown, last = resolution.spectral_amplitude(volume, voxel), resolution.find_peaks(volume, voxel).cutoff()
        for axis, colour, end in zip(("z", "y", "x"), COLOURS, last):
            frequencies = shown.frequencies[axis]
            half = frequencies > 0
            row[0].semilogy(frequencies[half] / 10, shown.curves[axis][half], color=colour, lw=1, label=axis)
            if np.isfinite(end):
                at = np.abs(frequencies - end).argmin()
                row[0].plot(frequencies[at] / 10, shown.curves[axis][at], "o", color=colour, ms=5, mfc="none")
        row[0].set_title(words, fontsize=8, loc="left")
        row[0].set_ylabel("spectral amplitude", fontsize=8)
        row[0].legend(fontsize=7, frameon=False, title="along; circle: last peak", title_fontsize=7)
        for ax, (pair, values) in zip(row[1:], shown.planes.items(), strict=True):
            up, right = (shown.frequencies[axis] / 10 for axis in pair)
            ax.imshow(np.log(values + 1e-6 * values.max()), cmap="magma", origin="lower",
                      extent=(right[0], right[-1], up[0], up[-1]), vmin=np.log(np.percentile(values, 20)))
            ax.set_xlabel(f"along {pair[1]} [1/Å]", fontsize=8)
            ax.set_ylabel(f"along {pair[0]} [1/Å]", fontsize=8)
        for ax in row:
            ax.tick_params(which="both", labelsize=7)
    axes[-1, 0].set_xlabel("frequency [1/Å]", fontsize=8)
    return figure
