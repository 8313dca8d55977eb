"""The report's figures: pure functions from numbers to matplotlib figures, drawn without a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, StrMethodFormatter

from sweeps.grid import Cell, Dimension
from sweeps.tables import Panel, good, shown, title

# Bright is worse, as on F3 Fig. 4a; viridis keeps its order in grey and for colour-blind readers.
MAP = "viridis"
SLICES = "inferno"
# Okabe and Ito's colours, told apart by colour-blind readers; black first.
LINES = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
TERMS = {"model": "λ HAADF", "chem": "λ chemistry", "tv": "λ TV", "total": "total", "haadf": "HAADF images", "eds":
         "X-ray maps"}
TICKS = [step * 10.0**power for power in range(-3, 4) for step in (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)]
WIDE = 34  # letters above a panel
GAP = 0.35  # of a tile, between the fused cells and the conventional rows


def sampling_map(panels: Sequence[Panel], metric: str) -> Figure:
    """The metric over two axes of the grid, one tile per cell, numbers in the tiles (F3 Fig. 4a)."""
    wide, high = max(len(panel.columns) for panel in panels), max(len(panel.lines) for panel in panels)
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    names = max(len(_line_name(line)) for panel in panels for line in panel.lines)
    figure = Figure(
        figsize=(across * (0.62 * wide + 0.06 * names + 1.4) + 0.5, down * (0.4 * high + 1.2)),
        layout="constrained",
    )
    axes = figure.subplots(down, across, squeeze=False)
    norm, ticks = _norm([entry.value for panel in panels for entry in panel.entries.values()])
    for ax, panel in zip(axes.flat, panels, strict=False):
        _tiles(ax, panel, norm)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    bar = figure.colorbar(scale(norm, MAP), ax=axes, aspect=25, pad=0.02, format="%g")
    bar.set_label(f"{title(metric)}\n(brighter is worse)", fontsize=9)
    if ticks:
        bar.set_ticks(ticks)
        bar.minorticks_off()
    return figure


def _norm(values: Sequence[float]) -> tuple[Normalize, list[float]]:
    """A colour scale and its ticks; none where matplotlib may choose them.

    Logarithmic where values are positive and span a factor of 2 to 1000, so that equal ratios look alike.
    """
    low, high = min(values), max(values)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    if 0 < 2 * low < high < 1000 * low and ticks:
        return LogNorm(low, high), ticks
    return Normalize(low, high if high > low else low + 1), []


def _tiles(ax: Axes, panel: Panel, norm: Normalize) -> None:
    """Tiles from the top line down; baselines stand apart below a gap."""
    heights, y = [], 0.0
    for k, (value, series) in enumerate(panel.lines):
        if k and bool(series) != bool(panel.lines[k - 1][1]) or (k and series and value != panel.lines[k - 1][0]):
            y += GAP
        heights.append(y)
        y += 1.0
    colours = colormaps[MAP]
    for (value, series), top in zip(panel.lines, heights, strict=True):
        for column, at in enumerate(panel.columns):
            entry = panel.entries.get((value, series, at))
            if entry is None:
                continue
            colour = colours(norm(entry.value))
            ax.add_patch(Rectangle((column - 0.5, top - 0.5), 1, 1, facecolor=colour, edgecolor="white", lw=0.8))
            text = f"{entry.value:.2f}" if 0.01 <= abs(entry.value) < 1000 else f"{entry.value:.1e}"
            spread = f"\n±{entry.deviation:.2g}" if entry.deviation else ""
            ax.text(
                column,
                top,
                text + spread,
                ha="center",
                va="center",
                fontsize=8 if not spread else 7,
                color="black" if _luminance(colour) > 0.45 else "white",
            )
    ax.set_xlim(-0.5, len(panel.columns) - 0.5)
    ax.set_ylim(y - 0.5, -0.5)
    ax.set_xticks(range(len(panel.columns)), [shown(column) for column in panel.columns])
    ax.set_yticks(heights, [_line_name(line) for line in panel.lines])
    for tick, (_, series) in zip(ax.get_yticklabels(), panel.lines, strict=True):
        tick.set_fontsize(8 if series else 10)
    ax.tick_params(length=0)
    ax.set_xlabel(title(panel.column_axis))
    ax.set_ylabel(title(panel.row_axis))
    ax.set_title(panel.title, fontsize=10)
    for side in ax.spines.values():
        side.set_visible(False)


def _line_name(line: tuple[Any, str]) -> str:
    return f"{shown(line[0])}: {line[1]}" if line[1] else shown(line[0])


def _luminance(colour: Sequence[float]) -> float:
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


def scale(norm: Normalize, name: str) -> ScalarMappable:
    """What a colour bar is drawn from."""
    return ScalarMappable(norm, name)


def sampling_line(panels: Sequence[Panel], metric: str) -> Figure:
    """The metric along the only axis of a grid, baselines as series of their own."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = figure.subplots()
    panel = panels[0]
    numeric = all(isinstance(value, (int, float)) for value, _ in panel.lines)
    places = {value: value if numeric else k for k, value in enumerate(dict.fromkeys(v for v, _ in panel.lines))}
    series = list(dict.fromkeys(name for _, name in panel.lines))
    for k, name in enumerate(series):
        points = sorted(
            (
                places[value],
                panel.entries[value, name, column].value,
                panel.entries[value, name, column].deviation,
            )
            for value, other in panel.lines
            if other == name
            for column in panel.columns
        )
        x, y, spread = zip(*points, strict=True)
        style = "-" if numeric and not name else ""
        ax.errorbar(
            x,
            y,
            spread if any(spread) else None,
            marker=MARKERS[k % 7],
            color=LINES[k % 7],
            capsize=3,
            linestyle=style,
            label=name or "best trial",
        )
    if not numeric:
        ax.set_xticks(list(places.values()), [shown(value) for value in places])
        ax.set_xlim(-0.5, len(places) - 0.5)
    ax.set_xlabel(title(panel.row_axis))
    ax.set_ylabel(title(metric))
    ax.grid(alpha=0.3)
    if len(series) > 1:
        ax.legend(fontsize=8)
    return figure


def landscape(cells: Sequence[Cell], rows: Mapping[str, list[dict[str, Any]]], objective: str, across: int) -> Figure:
    """Every searched trial of each cell in the plane of its first two weights; colour: objective / best."""
    across = min(len(cells), across)
    down = -(-len(cells) // across)
    figure = Figure(figsize=(max(2.3 * across, 3.6) + 1.2, max(2.2 * down, 2.6) + 0.5), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    found = [_worth([row for row in _searched(rows.get(cell.id, [])) if good(row)]) for cell in cells]
    # Held-out deviances differ by little: three quarters of the trials are told apart by colour.
    norm = Normalize(1.0, float(np.clip(np.quantile(np.concatenate([[1.01], *found]), 0.75), 1.01, 2.0)))
    for ax, cell in zip(axes.flat, cells, strict=False):
        _trials(ax, cell, rows.get(cell.id, []), objective, norm)
    for ax in axes.flat[len(cells) :]:
        ax.set_axis_off()
    if any(len(cell.space) > 1 for cell in cells):
        bar = figure.colorbar(scale(norm, MAP), ax=axes, extend="max", aspect=25, pad=0.02)
        bar.set_label(f"{title(objective)}\n/ best of its panel", fontsize=9)
    figure.supxlabel("Each point is a trial; star: the best of its panel; cross: failed", fontsize=8)
    return figure


def _searched(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "search"]


def _worth(fine: list[dict[str, Any]]) -> list[float]:
    """Objectives over the best of them; above it, by how much, where that is 0."""
    best = min((row["objective"] for row in fine), default=0.0)
    return [row["objective"] / best if best > 0 else 1 + row["objective"] - best for row in fine]


def _trials(ax: Axes, cell: Cell, rows: list[dict[str, Any]], objective: str, norm: Normalize) -> None:
    names = _plane(cell.space)
    searched = _searched(rows)
    fine = [row for row in searched if good(row)]
    words = ", ".join(f"{title(axis)} {shown(value)}" for axis, value in cell.coordinates.items())
    ax.set_title(_wrapped(words or cell.id), fontsize=8)
    ax.tick_params(labelsize=7)
    if not fine:
        ax.text(0.5, 0.5, "no trial yet", transform=ax.transAxes, ha="center", va="center", fontsize=8)
        return
    best = min(fine, key=lambda row: row["objective"])
    x = [_place(row["params"][names[0]], cell.space[names[0]]) for row in fine]
    if len(names) > 1:
        y = [_place(row["params"][names[1]], cell.space[names[1]]) for row in fine]
        ax.scatter(x, y, c=_worth(fine), cmap=MAP, norm=norm, s=22, edgecolor="0.3", linewidth=0.3)
        failed = [row["params"] for row in searched if not good(row)]
        ax.plot(
            [_place(p[names[0]], cell.space[names[0]]) for p in failed],
            [_place(p[names[1]], cell.space[names[1]]) for p in failed],
            "x",
            color="0.5",
            markersize=5,
        )
        mark = (
            _place(best["params"][names[0]], cell.space[names[0]]),
            _place(best["params"][names[1]], cell.space[names[1]]),
        )
        _axis(ax, "y", cell.space[names[1]], names[1])
    else:
        order = np.argsort(x)
        ax.plot(
            np.asarray(x)[order],
            np.asarray([row["objective"] for row in fine])[order],
            "o-",
            color=LINES[1],
            ms=3,
            lw=0.8,
        )
        mark = (_place(best["params"][names[0]], cell.space[names[0]]), best["objective"])
        ax.set_ylabel(title(objective), fontsize=8)
        ax.grid(alpha=0.3)
    ax.plot(*mark, marker="*", color="#D55E00", markeredgecolor="white", markersize=13)
    _axis(ax, "x", cell.space[names[0]], names[0])


def _plane(space: Mapping[str, Dimension]) -> list[str]:
    """At most two searched settings: those on log scales first, in the order of the YAML."""
    return sorted(space, key=lambda name: (space[name].choices is not None, space[name].scale != "log"))[:2]


def _place(value: Any, dimension: Dimension) -> float:
    return float(dimension.choices.index(value)) if dimension.choices else float(value)


def _axis(ax: Axes, which: str, dimension: Dimension, name: str) -> None:
    """Scale, limits (the searched range, a little wider) and label of a searched setting."""
    low, high = (0, len(dimension.choices) - 1) if dimension.choices else (dimension.low, dimension.high)
    log = dimension.scale == "log" and not dimension.choices
    if log:
        span = (high / low) ** 0.05
        getattr(ax, f"set_{which}scale")("log")
        ax.minorticks_off()
        getattr(ax, f"set_{which}lim")(low / span, high * span)
    else:
        getattr(ax, f"set_{which}lim")(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
    if dimension.choices:
        getattr(ax, f"set_{which}ticks")(range(len(dimension.choices)), [shown(choice) for choice in dimension.choices])
    getattr(ax, f"set_{which}label")(title(name), fontsize=8)


def convergence(histories: Mapping[str, Mapping[str, np.ndarray]], across: int) -> Figure:
    """The terms of the cost over the iterations of each winner. histories: {title: {term: (iteration,)}}."""
    across = min(len(histories), across)
    down = -(-len(histories) // across)
    figure = Figure(figsize=(max(2.6 * across, 4.0), max(2.2 * down, 2.8) + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    terms = list(dict.fromkeys([*TERMS, *(term for history in histories.values() for term in history)]))
    for ax, (words, history) in zip(axes.flat, histories.items(), strict=False):
        for term, values in history.items():
            k = terms.index(term)
            ax.plot(
                np.arange(len(values)),
                values,
                color=LINES[k % 7],
                label=TERMS.get(term, term),
                linestyle=("-", "--", "-.", ":")[k % 4],
                lw=1.3,
            )
        _log_axis(ax, np.concatenate([np.asarray(values) for values in history.values()]))
        ax.set_title(_wrapped(words), fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(histories) :]:
        ax.set_axis_off()
    figure.supxlabel("iteration", fontsize=9)
    figure.supylabel("weighted term of the cost", fontsize=9)
    handles = {text: handle for ax in axes.flat for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    shown_terms = [TERMS.get(term, term) for term in terms if TERMS.get(term, term) in handles]
    figure.legend(
        [handles[words] for words in shown_terms],
        shown_terms,
        loc="outside upper center",
        ncols=len(handles),
        fontsize=8,
        frameon=False,
    )
    return figure


def _wrapped(words: str) -> str:
    """Coordinates on lines of their own where they would run into the next panel."""
    return words.replace(", ", "\n") if len(words) > WIDE else words


def _log_axis(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic y axis for positive values, with more than one number on it also within a decade."""
    if not (values > 0).all():
        return
    ax.set_yscale("log")
    ax.minorticks_off()
    if values.max() < 30 * values.min():
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.0e}"))


@dataclass(frozen=True)
class Picture:
    """A plane of one volume: images (element, row, column), a title, and a score of each element."""

    title: str
    images: np.ndarray
    scores: Mapping[str, float]


def slices(pictures: Sequence[Picture], tops: Mapping[str, float], voxel: float, caption: str) -> Figure:
    """Every element of every volume, one colour scale per element; scale bar in nm.

    tops: the upper end of each element's scale, which starts at 0. voxel: [nm]. Elements are rows, or columns where
    the figure would be twice as tall as wide.
    """
    high, wide = pictures[0].images.shape[1:]
    turned = len(tops) * high > 2 * len(pictures) * wide
    rows, across = (len(pictures), len(tops)) if turned else (len(tops), len(pictures))
    width = 2.0 * min(1.6, max(0.5, (wide / high) ** 0.5))
    size = (max(width * across + 1.0, 5.5), (width * high / wide + 0.22) * rows + (1.2 if turned else 0.8))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False)
    tiles = axes.T if turned else axes  # (element, picture)
    for line, (element, top), k in zip(tiles, tops.items(), range(len(tops)), strict=True):
        norm = Normalize(0.0, top or 1.0)
        for ax, picture in zip(line, pictures, strict=True):
            ax.set(xticks=[], yticks=[])
            ax.imshow(picture.images[k], cmap=SLICES, norm=norm, interpolation="nearest", origin="lower")
            if element in picture.scores:
                ax.set_title(f"NRMSE {picture.scores[element]:.2f}", fontsize=8, pad=3)
        bar = figure.colorbar(
            scale(norm, SLICES), ax=line, location="bottom" if turned else "right", shrink=0.85, aspect=14, pad=0.01
        )
        bar.ax.tick_params(labelsize=7)
    heads, sides = (list(tops), [picture.title for picture in pictures])[:: 1 if turned else -1]
    for ax, head in zip(axes[0], heads, strict=True):
        lower = ax.get_title()
        ax.set_title(head + (f"\n{lower}" if lower else ""), fontsize=8 if lower else 9, pad=3)
    for ax, side in zip(axes[:, 0], sides, strict=True):
        ax.set_ylabel(
            side,
            fontsize=9 if turned else 11,
            rotation=90 if turned or len(side) > 2 else 0,
            labelpad=6 if turned or len(side) > 2 else 14,
            va="baseline" if turned or len(side) > 2 else "center",
        )
    scale_bar(axes[0, 0], wide, high, voxel)
    figure.supxlabel(caption, fontsize=8)
    return figure


def scale_bar(ax: Axes, wide: int, high: int, voxel: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten nanometres, at most a third of the image wide."""
    target = wide * voxel / 3
    power = 10.0 ** np.floor(np.log10(target))
    length = power * max(step for step in (1, 2, 5) if step * power <= target)
    left, low = 0.06 * wide, 0.06 * high
    ax.add_patch(Rectangle((left, low), length / voxel, max(0.02 * high, 0.8), facecolor="white", edgecolor="black"))
    words = ax.text(
        left + length / voxel / 2,
        0.1 * high,
        f"{length:g} nm",
        color="white",
        ha="center",
        va="bottom",
        fontsize=7,
    )
    words.set_path_effects([withStroke(linewidth=2, foreground="black")])  # legible on bright voxels, too


def projections(pictures: Sequence[Picture], tops: Mapping[str, float], voxel: float, caption: str) -> Figure:
    """Every element of every volume in blocks of a row per element, at most eight volumes to a block.

    tops: the upper end of each element's scale, which starts at 0. voxel: [nm].
    """
    blocks = -(-len(pictures) // 8)
    across = -(-len(pictures) // blocks)
    high, wide = pictures[0].images.shape[1:]
    lines = max(len(picture.title.splitlines()) for picture in pictures)
    tall = 1.5 * min(2.0, max(0.4, high / wide))
    size = (1.6 * across + 0.9, blocks * (len(tops) * (tall + 0.06) + 0.13 * lines + 0.1) + 0.6)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(max(size[0], 4.2), size[1]), layout=layout)
    axes = figure.subplots(blocks * len(tops), across, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for place, picture in enumerate(pictures):
        block, column = divmod(place, across)
        for k, (element, top) in enumerate(tops.items()):
            ax = axes[block * len(tops) + k, column]
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            ax.imshow(picture.images[k], cmap=SLICES, norm=Normalize(0.0, top or 1.0), interpolation="nearest",
                      origin="lower")
            if k == 0:
                ax.set_title(picture.title, fontsize=7, pad=3)
            if column == 0:
                ax.set_ylabel(element, fontsize=9, rotation=0, labelpad=10, va="center")
    scale_bar(axes[0, 0], wide, high, voxel)
    scales = ", ".join(f"{element} 0 to {top:.3g}" for element, top in tops.items())
    figure.supxlabel(f"{caption}; y up, x (tilt axis) across\nscale of each element: {scales} voxels", fontsize=8)
    return figure
