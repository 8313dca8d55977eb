"""The figures of an mset run: potentials with the atoms found, missed and invented; intensities (Figs. 3-8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sweeps import atomic, figures
from sweeps.rules import LINEAR
from sweeps.settings import Sweep

SLABS = 4  # along z, which show the atoms in the inner three quarters of the volume
MARKS = {  # what a kind of atom is drawn as: marker, colour
    "right": ("o", "#56B4E9"), "wrong element": ("s", "#E69F00"), "false": ("x", "#D55E00"),
    "missing": ("+", "#FFFFFF"), "light": ("o", "#56B4E9"), "heavy": ("s", "#E69F00")}
CLASSES = (("non-atoms", "0.6"), ("light", "#56B4E9"), ("heavy", "#E69F00"))


def slabs(groups: Mapping[str, tuple[Sweep, Any]]) -> Figure:
    """A row per result: means of slabs along z, each row in its own grey, with the atoms that lie in each slab.

    groups: by title.
    """
    figure = Figure(figsize=(2.5 * SLABS + 0.4, 2.6 * len(groups) + 0.7), layout="constrained")
    axes = figure.subplots(len(groups), SLABS, squeeze=False)
    handles: dict[str, Any] = {}
    for row, (words, (sweep, group)) in zip(axes, groups.items(), strict=True):
        volume, voxel = group["volume"][0], float(np.min(group.attrs["voxel_nm"]))
        kinds = atomic.kinds(sweep, group["field_atoms"][:]) if "field_atoms" in group else {}
        depth = len(volume)
        edges = np.linspace(depth / 8, 7 * depth / 8, SLABS + 1).round().astype(int)
        top = float(np.percentile(volume, 99.9))
        for ax, low, high in zip(row, edges[:-1], edges[1:], strict=True):
            ax.imshow(volume[low:high].mean(0), cmap="gray", norm=Normalize(0, top / 3), origin="lower")
            heights = (low - depth / 2) * voxel, (high - depth / 2) * voxel
            handles |= _marked(ax, kinds, heights, voxel, volume.shape[1:])
            ax.set(xticks=[], yticks=[])
            ax.set_title("z {:.2f} to {:.2f} nm".format(*heights), fontsize=8)
        row[0].set_ylabel(words, fontsize=8)
    figures.scale_bar(axes[0, 0], volume.shape[2], volume.shape[1], voxel)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=8,
                      facecolor="0.4", labelcolor="white")
    return figure


def _marked(ax: Axes, kinds: Mapping[str, np.ndarray], heights: tuple[float, float], voxel: float,
            shape: Sequence[int]) -> dict[str, Any]:
    """Marks of the atoms between two heights [nm]; handles for a legend."""
    handles = {}
    for kind, positions in kinds.items():
        here = positions[(positions[:, 0] >= heights[0]) & (positions[:, 0] < heights[1])]
        marker, colour = MARKS[kind]
        y, x = (here[:, axis] / voxel + (shape[axis - 1] - 1) / 2 for axis in (1, 2))
        handles[kind], = ax.plot(x, y, marker, color=colour, ms=5, mew=1, ls="",
                                 markerfacecolor="none" if marker in "os" else colour)
    return handles


def intensities(tables: Mapping[str, tuple[Sweep, np.ndarray]]) -> Figure:
    """Histograms of the traced peaks' intensities and their three classes. tables: of atoms, by title."""
    across = min(len(tables), 3)
    down = -(-len(tables) // across)
    figure = Figure(figsize=(3.6 * across + 0.4, 2.6 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat[len(tables):]:
        ax.set_axis_off()
    for ax, (words, (sweep, rows)) in zip(axes.flat, tables.items(), strict=False):
        traced = atomic.from_table(rows)
        edges = np.linspace(0, traced.intensities.max() * 1.02, 50)
        for number, (name, colour) in enumerate(CLASSES):
            inside = traced.intensities[traced.classes == number]
            ax.hist(inside, edges, color=colour, label=f"{name}, {len(inside)}")
        ax.set_title(words, fontsize=8)
        ax.set_xlabel("intensity of the dark field" if dark(sweep) else "intensity [V]", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.legend(fontsize=7, frameon=False)
    axes[0, 0].set_ylabel("peaks", fontsize=8)
    return figure


def dark(sweep: Sweep) -> bool:
    """Whether a volume is of the dark field, not a potential."""
    return sweep.solver.method in LINEAR


def chosen(cells: Sequence[Any], limit: int = 4) -> list[Any]:
    """Of cells in order, from the worst: the best of each method; of a single one the worst, the best, some between."""
    best = {cell.sweep.solver.method: cell for cell in cells}
    if len(best) > 1:
        return [cell for cell in cells if cell in best.values()]
    picked = np.unique(np.linspace(0, len(cells) - 1, min(limit, len(cells))).round().astype(int))
    return [cells[k] for k in picked]
