"""The figures of a hebt run: quality over n and alpha (HEBT, Figs. 4, 8, 13), profiles, weight fractions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from engine import phantoms_hebt
from sweeps import figures, fractions
from sweeps.bimodal import DIRECT, WEIGHT, Curves
from sweeps.rules import elements
from sweeps.schema import Fractions, Particle
from sweeps.settings import Sweep

ROWS = 5  # voxels along z that a profile averages
PROFILES = (0, 0.5, 0.8, 0.95)  # alphas whose profiles are drawn, or the nearest there are
NAMES = {"ssim": "SSIM", "mse": "MSE, to a maximum of 1", "weight_ssim": "SSIM, weight fraction", "weight_mse":
         "MSE, weight fraction"}
ALONE = "#E69F00"  # the maps alone: yellow, as in the paper


def over_alpha(found: Sequence[Curves]) -> Iterator[tuple[str, str, Figure]]:
    """(file stem, caption, figure) of the quality over n and alpha."""
    for stem, each in zip(_stems("alpha", found), found, strict=True):
        words = f" ({each.words})" if each.words else ""
        yield stem, f"Quality over n of the maps alone, and over alpha{words}; HEBT's Figs. 4, 8 and 13.", quality(each)


def across(found: Sequence[Curves], kept: Mapping[str, Any],
           truth: np.ndarray | None) -> Iterator[tuple[str, str, Figure]]:
    """The same of profiles. kept: groups of published volumes by cell. truth: weight fractions, if known."""
    for stem, each in zip(_stems("profiles", found), found, strict=True):
        groups = {alpha: kept[cell.id] for alpha, cell in zip(each.alphas, each.cells, strict=True) if cell.id in kept}
        if not groups or not all("field_weight" in group for group in groups.values()):
            continue
        words = f" ({each.words})" if each.words else ""
        sweep = each.cells[0].sweep
        yield (stem, f"Weight fractions across core and shell{words}, a mean over {ROWS} rows; each alpha at its best "
               "n (HEBT, Figs. S1 to S3).", profiles(groups, quantified(sweep), _row(sweep, groups), truth))


def _stems(name: str, found: Sequence[Curves]) -> list[str]:
    return [name] if len(found) == 1 else [f"{name}-{k}" for k in range(1, len(found) + 1)]


def quantified(sweep: Sweep) -> tuple[str, ...]:
    """The elements whose fractions are told."""
    given = sweep.output.fractions
    return tuple(given.over) if given and given.over else elements(sweep)


def _row(sweep: Sweep, groups: Mapping[float, Any]) -> int:
    """z of the profiles: through the core of HEBT's particle, else through the middle."""
    nz = int(next(iter(groups.values()))["volume"].shape[1])
    return phantoms_hebt.core_row(nz) if isinstance(sweep.data, Particle) else nz // 2


def true_weight(given: Fractions, truth: np.ndarray | None, names: Sequence[str]) -> np.ndarray | None:
    """Weight fractions of true concentrations; None where those do not count atoms."""
    if truth is None or given.by != "atoms":
        return None
    plain = given.model_copy(update={"threshold": None, "take_off": None})
    return fractions.quantified(plain, truth, names, np.ones(len(names)), 1.0).weight


def weights(pictures: Mapping[str, np.ndarray], names: Sequence[str], voxel: float) -> Figure:
    """Weight fractions in the middle plane across the tilt axis, by title: (element, z, y, x) each; 0 outside."""
    chosen = [figures.Picture(words, volume[..., volume.shape[3] // 2], {}) for words, volume in pictures.items()]
    note = "Central plane across the tilt axis: y across, z (the beam at 0 degrees) up.\nColour: weight fraction"
    return figures.slices(chosen, dict.fromkeys(names, 1.0), voxel, note)


def quality(found: Curves) -> Figure:
    """Left the maps alone over n, then each metric over alpha, one colour per n, one line style per element."""
    lines = [metrics for metrics in (DIRECT, WEIGHT) if metrics[0] in found.values]
    figure = Figure(figsize=(10.5, 3.1 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), 3, squeeze=False)
    for row, metrics in zip(axes, lines, strict=True):
        _over_n(row[0], found, metrics[0])
        for ax, metric in zip(row[1:], metrics, strict=True):
            _over_alpha(ax, found, metric)
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        handles |= {text: line for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    across = max(1, len(handles) // len(found.elements))  # a column for each n, a row for each element
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=across, fontsize=8, frameon=False)
    return figure


def _over_n(ax: Any, found: Curves, metric: str) -> None:
    """Only where alpha = 0 is on the grid."""
    if found.alone(metric) is None:
        ax.set_axis_off()
        return
    values = found.values[metric][found.alphas.index(0)]
    for k, element in enumerate(found.elements):
        ax.plot(found.stops, values[:, k], _style(k), color=ALONE, marker="o", ms=3, label=f"maps alone, {element}")
    ax.set(xscale="log", xlabel="iterations n", ylabel=NAMES[metric])
    ax.grid(alpha=0.3)


def _over_alpha(ax: Any, found: Curves, metric: str) -> None:
    values, alone = found.values[metric], found.alone(metric)
    for stop, colour in zip(found.shown, figures.LINES[3:0:-1], strict=False):
        for k, element in enumerate(found.elements):
            ax.plot(found.alphas, values[:, stop, k], _style(k), color=colour, lw=1.3,
                    label=f"n = {found.stops[stop]}, {element}")
    for k, reference in enumerate(alone[0] if alone else []):
        ax.axhline(reference, color=ALONE, linestyle=_style(k), lw=1)
    ax.set(xlabel="alpha, weight of HAADF", ylabel=NAMES[metric])
    shown = values[:, found.shown]
    if metric.endswith("mse") and np.nanmin(shown) > 0:
        ax.set_yscale("log")
    ax.grid(alpha=0.3)


def _style(k: int) -> str:
    return ("-", "--", ":", "-.")[k % 4]


def haadf(volume: np.ndarray, voxel: float) -> Figure:
    """The middle plane across the tilt axis of HAADF per voxel (z, y, x), up to its 99.8th percentile."""
    plane = volume[:, :, volume.shape[2] // 2]
    note = "Central plane across the tilt axis: y across,\nz (the beam at 0 degrees) up.\nColour: HAADF per voxel"
    return figures.slices([figures.Picture("HAADF alone", plane[None], {})],
                          {"": float(np.percentile(plane, 99.8))}, voxel, note)


def profiles(groups: Mapping[float, Any], names: Sequence[str], row: int, truth: np.ndarray | None) -> Figure:
    """Along y, of a few alphas: weight fractions of each element in the middle plane."""
    alphas = np.array(sorted(groups))
    chosen = sorted({float(alphas[np.abs(alphas - wanted).argmin()]) for wanted in PROFILES})
    first = groups[chosen[0]]
    figure = Figure(figsize=(4.6 * len(names), 3.2), layout="constrained")
    for k, (ax, element) in enumerate(zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True)):
        for alpha, colour in zip(chosen, (ALONE, *figures.LINES[3:0:-1]), strict=False):
            ax.plot(*_profile(groups[alpha], groups[alpha]["field_weight"][k], row), color=colour, lw=1.2,
                    label=f"alpha {alpha:g}" if alpha else "maps alone")
        if truth is not None:
            ax.plot(*_profile(first, truth[k], row), "--", color="black", lw=1, label="truth")
        ax.set_title(element, fontsize=9)
        ax.set(xlabel="y [nm]", ylim=(-0.02, 1.02))
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("weight fraction")
    figure.axes[0].legend(fontsize=7, frameon=False)
    return figure


def _profile(group: Any, volume: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
    """y [nm] and the mean over ROWS rows of z about `row` in the middle plane of one element's volume."""
    nz, ny, nx = volume.shape
    first = max(0, min(row - ROWS // 2, nz - ROWS))
    place = (np.arange(ny) - (ny - 1) / 2) * float(np.min(group.attrs["voxel_nm"]))
    return place, volume[first:first + ROWS, :, nx // 2].mean(0)
