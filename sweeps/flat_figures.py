"""The figures of a fused2d run: maps with their standard errors, predicted against true error, concentrations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from engine import stoichiometry
from engine.data import DataError
from sweeps import figures, flat
from sweeps.grid import Cell
from sweeps.tables import Run, shown, title

ERRORS = "viridis"
BAND = 10  # rows that a profile averages, as in F2's Fig. 4d
MARGIN = 0.3  # of the range, beside the pixels that are looked at


def drawn(run: Run, kept: Mapping[str, Any], chosen: list[Cell],
          truth: np.ndarray | None) -> Iterator[tuple[str, str, Figure]]:
    """(file stem, caption, figure). kept: groups of published maps by cell. chosen: the cells to show, best last."""
    entries = {cell.id: {"metrics": (run.winner(cell) or {}).get("metrics", {})} for cell in run.cells}
    pairs = flat.errors(run.cells, entries)
    if flat.agreement(list(pairs.values())):
        clear = [cell.id for cell in run.cells if flat.clear(cell) and cell.id in pairs]
        yield ("errors", "Average standard error, known without a truth, against the RMSE (F2, Fig. 6c): a point is a "
               "cell.", errors(pairs, clear))
    words = {"best": chosen[-1]} | ({"worst": chosen[0]} if len(chosen) > 1 else {})
    for word, cell in words.items():
        name = ", ".join(f"{title(axis)} {shown(value)}" for axis, value in cell.coordinates.items())
        group = kept[cell.id]
        arrays, elements = {field: group[field][:] for field in group.array_keys()}, group.attrs["elements"]
        yield (f"maps-{word}", f"Maps of the {word} cell{f' ({name})' if name else ''}, as measured and recovered, "
               "with their standard errors.", maps(arrays, elements, float(np.min(group.attrs["voxel_nm"])), truth))
        yield (f"profiles-{word}", f"Profiles through the middle of the {word} cell over {BAND} rows (F2, Fig. 4d).",
               profiles(arrays, elements, float(np.min(group.attrs["voxel_nm"])), truth))
        if "share" not in (run.winner(cell) or {}).get("elements", {}):
            continue
        try:
            inside = flat.region(cell.sweep, arrays["volume"])
            found = {kind: stoichiometry.relative(np.maximum(arrays[field], 0))[:, inside]
                     for kind, field in (("as measured", "field_measured"), ("fused", "volume"))}
            yield (f"shares-{word}", f"Concentrations in the region of the {word} cell, and the Gaussians fitted.",
                   shares(found, elements, cell.sweep.output.shares.peaks))
        except DataError:
            continue


def errors(pairs: Mapping[str, tuple[float, float]], clear: list[str]) -> Figure:
    """RMSE of the shares over their average standard error, both in percent; filled: SNR above 10 throughout."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    ax = figure.subplots()
    blue = figures.LINES[1]
    for words, names, face in (("SNR > 10", clear, blue), ("others", [k for k in pairs if k not in clear], "none")):
        if names:
            ax.plot(*np.array([pairs[name] for name in names]).T, "o", ms=5, color=blue, markerfacecolor=face,
                    label=words)
    low, high = np.min(list(pairs.values())), np.max(list(pairs.values()))
    ax.plot([low, high], [low, high], "--", color="0.5", lw=1, label="equal")
    ax.set(xscale="log", yscale="log", xlabel="average standard error [%]", ylabel="RMSE of concentrations [%]")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    lines = []
    for words, names in (("all", list(pairs)), ("SNR > 10", clear)):
        if agreed := flat.agreement([pairs[name] for name in names]):
            lines.append(f"{words}: correlation {agreed[0]:.3f}, slope {agreed[1]:.2f}")
    ax.set_title("\n".join(lines), fontsize=9)
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8, frameon=False)
    return figure


def maps(arrays: Mapping[str, np.ndarray], elements: list[str], pixel: float, truth: np.ndarray | None) -> Figure:
    """A row per element: truth, as measured, fused on one scale, and the standard error on its own; the image first."""
    columns = {} if truth is None else {"truth": truth}
    columns |= {"as measured": arrays["field_measured"], "fused": arrays["volume"]}
    error, image = arrays.get("field_standard_error"), arrays.get("field_image")
    count = len(columns) + (image is not None) + (error is not None)
    high, wide = arrays["volume"].shape[2:]
    tile = 1.75
    figure = Figure(figsize=(tile * count + 1.3, tile * high / wide * len(elements) + 0.6), layout="constrained")
    axes = figure.subplots(len(elements), count, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    first = int(image is not None)
    if image is not None:
        axes[0, 0].imshow(image, cmap="gray", origin="lower", interpolation="nearest")
        axes[0, 0].set_title("HAADF", fontsize=9)
        figures.scale_bar(axes[0, 0], wide, high, pixel)
    for k, element in enumerate(elements):
        # A pixel of noise must not darken everything else.
        best = truth[k] if truth is not None else arrays["volume"][k]
        norm = Normalize(0, float(np.percentile(best, 99.8)) or 1.0)
        row = axes[k, first:]
        for ax, (words, found) in zip(row, columns.items(), strict=False):
            ax.imshow(found[k, 0], cmap=figures.SLICES, norm=norm, origin="lower", interpolation="nearest")
            ax.set_title(f"{element}, {words}", fontsize=9)
        _bar(figure, row[len(columns) - 1], norm, figures.SLICES)
        if error is not None:
            known = error[k, 0][np.isfinite(error[k, 0])]
            scale = Normalize(0, float(np.percentile(known, 99)) if known.size else 1.0)
            row[-1].imshow(error[k, 0], cmap=ERRORS, norm=scale, origin="lower", interpolation="nearest")
            row[-1].set_title(f"{element}, standard error", fontsize=9)
            _bar(figure, row[-1], scale, ERRORS)
    return figure


def profiles(arrays: Mapping[str, np.ndarray], elements: list[str], pixel: float, truth: np.ndarray | None) -> Figure:
    """Along x, the mean over the rows in the middle: truth, as measured, and fused with its standard error."""
    figure = Figure(figsize=(3.4 * len(elements) + 0.4, 2.8), layout="constrained")
    ny, nx = arrays["volume"].shape[2:]
    rows = slice(max(0, ny // 2 - BAND // 2), ny // 2 + BAND // 2)
    place = (np.arange(nx) - (nx - 1) / 2) * pixel
    error = arrays.get("field_standard_error")
    for k, (ax, element) in enumerate(zip(figure.subplots(1, len(elements), squeeze=False)[0], elements, strict=True)):
        fused = arrays["volume"][k, 0, rows].mean(0)
        ax.plot(place, arrays["field_measured"][k, 0, rows].mean(0), color="0.65", lw=1, label="as measured")
        ax.plot(place, fused, color=figures.LINES[1], lw=1.4, label="fused")
        if error is not None:
            # Pixels err independently as far as noise goes.
            known = np.nan_to_num(error[k, 0, rows])
            band = np.sqrt((known**2).sum(0)) / len(known)
            ax.fill_between(place, fused - band, fused + band, color=figures.LINES[1], alpha=0.25, lw=0)
        if truth is not None:
            ax.plot(place, truth[k, 0, rows].mean(0), "--", color="black", lw=1, label="truth")
        ax.set_title(element, fontsize=9)
        ax.set_xlabel("x [nm]", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("concentration", fontsize=8)
    figure.axes[0].legend(fontsize=7, frameon=False)
    return figure


def _bar(figure: Figure, ax: Any, norm: Normalize, name: str) -> None:
    bar = figure.colorbar(figures.scale(norm, name), ax=ax, shrink=0.8, aspect=14, pad=0.02)
    bar.ax.tick_params(labelsize=7)


def shares(found: Mapping[str, np.ndarray], elements: list[str], peaks: int) -> Figure:
    """Histograms of concentrations in percent, (element, pixel) by kind, with the Gaussians fitted to them."""
    figure = Figure(figsize=(3.0 * len(elements) + 0.4, 2.9), layout="constrained")
    for k, (ax, element) in enumerate(zip(figure.subplots(1, len(elements), squeeze=False)[0], elements, strict=True)):
        low, high = np.nanpercentile(np.concatenate([each[k] for each in found.values()]), (1, 99))
        room = MARGIN * (high - low) + 0.5
        edges = np.linspace(max(0.0, low - room), min(100.0, high + room), 120)
        lines = [element]
        for colour, (kind, values) in zip(("0.6", figures.LINES[1]), found.items(), strict=False):
            ax.hist(values[k], edges, color=colour, alpha=0.6, label=kind)
            known = np.isfinite(values[k]).sum()
            for peak in stoichiometry.histogram(values[k], peaks).peaks:
                height = peak.share * known * (edges[1] - edges[0]) / (math.sqrt(2 * math.pi) * peak.sigma)
                ax.plot(edges, height * np.exp(-((edges - peak.mean) ** 2) / (2 * peak.sigma**2)),
                        color="black" if kind == "fused" else "0.4", lw=1)
                lines.append(f"{kind} {peak.mean:.1f} ± {peak.sigma:.2g} %")
        ax.set_title("\n".join(lines), fontsize=8)
        ax.set_xlabel("concentration [%]", fontsize=8)
        ax.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("pixels", fontsize=8)
    figure.axes[0].legend(fontsize=7, frameon=False)
    return figure
