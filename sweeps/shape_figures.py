"""Surfaces of volumes, drawn without a display, and the particles in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LightSource, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from skimage.measure import marching_cubes
from skimage.transform import downscale_local_mean

from sweeps.figures import scale_bar

FINE = 40  # voxels along an edge at most: finer triangles are smaller than a pixel, and take matplotlib long
WIDE = 5  # panels side by side
REACHED = 99.9  # percentile of a volume that counts as what it reaches
LIGHT = LightSource(azdeg=225, altdeg=50)
VIEW = (22, -58)  # elevation and azimuth [deg]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")

PLANES = {"y up, x across": 1, "z up, x across": 2, "z up, y across": 3}  # and the axis across the plane

Mesh = tuple[np.ndarray, np.ndarray]


def surface(volume: np.ndarray, voxel: float) -> Mesh | None:
    """Where a volume (z, y, x) crosses half of what it reaches: corners (corner, 3), x, y, z [nm] from the middle, and
    triangles (triangle, 3); None where it has no such surface."""
    factor = -(-max(volume.shape) // FINE)
    shown = downscale_local_mean(volume, (factor,) * 3) if factor > 1 else np.asarray(volume)
    level = np.percentile(shown, REACHED) / 2
    if not shown.min() < level < shown.max():
        return None
    padded = np.pad(shown, 1, constant_values=min(0.0, float(shown.min())))  # closed where it leaves the field
    corners, triangles, _, _ = marching_cubes(padded, level)
    at = (corners - 1) * factor + (factor - 1) / 2 - (np.array(volume.shape) - 1) / 2
    return at[:, ::-1] * voxel, triangles


def surfaces(volumes: Mapping[str, np.ndarray], elements: Sequence[str], voxel: float) -> Figure:
    """A row per volume (element, z, y, x), by title; a column per element, and one of all of them together. What is
    too much for one row goes on in the next."""
    columns = [(k,) for k in range(len(elements))] + ([tuple(range(len(elements)))] if len(elements) > 1 else [])
    across = len(columns) if len(columns) <= WIDE else -(-len(columns) // -(-len(columns) // WIDE))
    lines = -(-len(columns) // across) * len(volumes)
    figure = Figure(figsize=(2.7 * across + 0.3, 2.6 * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, across, squeeze=False, subplot_kw={"projection": "3d"}).reshape(len(volumes), -1)
    for ax in axes[:, len(columns):].flat:
        ax.remove()
    for row, (title, volume) in zip(axes[:, :len(columns)], volumes.items(), strict=True):
        meshes = [surface(each, voxel) for each in volume]
        half = np.array(volume.shape[:0:-1]) * voxel / 2  # x, y, z
        for ax, members in zip(row, columns, strict=True):
            for k in members:
                if (mesh := meshes[k]) is not None:
                    ax.add_collection3d(Poly3DCollection(
                        mesh[0][mesh[1]], facecolors=COLOURS[k % len(COLOURS)], shade=True, lightsource=LIGHT,
                        alpha=1.0 if len(members) == 1 else 0.45, edgecolor="none"))
            _box(ax, half)
            ax.set_title(elements[members[0]] if len(members) == 1 else "together", fontsize=9, pad=-4)
        row[0].text2D(-0.02, 0.5, title, transform=row[0].transAxes, rotation=90, va="center", fontsize=8)
    return figure


def _box(ax: Any, half: np.ndarray) -> None:
    """Axes in nm about the middle, of equal scale."""
    for which, edge in zip("xyz", half):
        ax.set(**{f"{which}lim": (-edge, edge), f"{which}label": f"{which} [nm]"})
        ax.tick_params(axis=which, labelsize=6, pad=-3)
        axis = getattr(ax, f"{which}axis")
        axis.set_major_locator(MaxNLocator(5))
        axis.label.set_fontsize(6)
        axis.labelpad = -8
    ax.set_box_aspect(tuple(half))  # a copy: it is scaled in place
    ax.view_init(*VIEW)


def overlay(volumes: Mapping[str, np.ndarray], elements: Sequence[str], voxel: float) -> Figure:
    """A row per volume (element, z, y, x), by title: its three central planes, the elements' colours mixed by how much
    of what it reaches each has there, and as bright as all of them together."""
    ratio = max(volume.shape[1] / volume.shape[2] for volume in volumes.values())
    figure = Figure(figsize=(8.6, 2.8 * len(volumes) * max(1.0, ratio) + 0.5), layout="constrained")
    axes = figure.subplots(len(volumes), len(PLANES), squeeze=False)
    for row, (title, volume) in zip(axes, volumes.items(), strict=True):
        tops = np.percentile(volume, REACHED, axis=(1, 2, 3), keepdims=True)
        shares = np.clip(volume / np.where(tops > 0, tops, 1), 0, 1)
        for ax, (words, axis) in zip(row, PLANES.items(), strict=True):
            plane = np.take(shares, shares.shape[axis] // 2, axis)
            colours = [to_rgb(COLOURS[k % len(COLOURS)]) for k in range(len(elements))]
            mixed = np.tensordot(np.moveaxis(plane, 0, -1), colours, 1) / np.maximum(plane.sum(0), 1)[..., None]
            ax.imshow(mixed, origin="lower", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_title(words, fontsize=8)
            scale_bar(ax, plane.shape[2], plane.shape[1], voxel)
        row[0].set_ylabel(title, fontsize=8)
    marks = [Patch(color=COLOURS[k % len(COLOURS)], label=element) for k, element in enumerate(elements)]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8, frameon=False)
    return figure


def grains(table: np.ndarray, profile: np.ndarray | None, elements: Sequence[str]) -> Figure:
    """Diameters as a histogram, means of elements over depth. table, profile: as `sweeps.grains.scores` has them."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    whole, cut = (table[table[:, 4] == value, 3] for value in (0, 1))
    edges = np.histogram_bin_edges(table[:, 3], bins="auto")
    shown = [("whole", COLOURS[0], whole)] + ([("cut off by the field", "0.7", cut)] if len(cut) else [])
    names, colours, values = zip(*shown, strict=True)
    left.hist(values, bins=edges, stacked=True, color=colours, label=names)
    left.set_xlabel("diameter [nm]", fontsize=8)
    left.set_ylabel("particles", fontsize=8)
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=7, frameon=False)
    if profile is None:
        right.set_axis_off()
    else:
        for k, element in enumerate(elements):
            right.plot(profile[0], profile[1 + k], ".-", color=COLOURS[k % len(COLOURS)], lw=1, label=element)
        right.set_xlabel("depth below the surface [nm]", fontsize=8)
        right.set_ylabel("mean concentration", fontsize=8)
        right.set_ylim(bottom=0)
        right.legend(fontsize=7, frameon=False)
    for ax in (left, right):
        ax.tick_params(labelsize=7)
    return figure


def shells(curves: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Correlation of two halves over frequency, within the cone about z and outside. curves: as `sweeps.halves.scores`
    has them; names: of elements, and of HAADF if it is there."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for ax, part, words in zip(figure.subplots(1, 2, sharey=True), ("", "_z"), ("beyond", "within"), strict=True):
        for k, (name, curve) in enumerate(zip(names, curves[f"fsc{part}"], strict=False)):
            colour = "black" if k == len(names) - 1 and name == "HAADF" else COLOURS[k % len(COLOURS)]
            ax.plot(curves[f"shells{part}"], curve, color=colour, lw=1, label=name)
        ax.axhline(0.143, color="0.5", lw=0.8, ls="--")
        ax.set_title(f"{words} 30 degrees of z", fontsize=8)
        ax.set_xlabel("frequency [1/nm]", fontsize=8)
        ax.set_ylim(-0.2, 1.05)
        ax.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("correlation of two halves", fontsize=8)
    figure.axes[0].legend(fontsize=7, frameon=False)
    return figure
