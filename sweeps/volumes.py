"""Statistics and projections of all volumes of an atlas, which together may be larger than memory.

Volumes are read through dask.array, one element of one volume, then one slab of a few volumes at a time, and what
follows from them goes to the disk at once: `volumes.zarr`, with a group for every shape that volumes have, one row of
numbers for each volume and element in `table.csv`, and pages of projections.
"""

from __future__ import annotations

import csv
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from sweeps import tables
from sweeps.arrays import STRING
from sweeps.atlas import RunFolder, consolidate, version
from sweeps.journal import RunError
from sweeps.tables import Run
from sweeps.voxels import BINS, PERCENTILES, Moments, histogram, ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THREADS = 4  # at most: each holds several chunks
WINDOW = 8  # volumes whose slabs are in memory together
PAGE = 24  # volumes on one figure
SHARP = 256  # pixels along the longer side of a projection on a figure
LINES = 24  # rows of the table that are printed
TRIAL = "trial"  # the axis along which the trials of a cell lie
AXES = {"z": ("y", "x"), "y": ("z", "x"), "x": ("z", "y")}  # a projection along an axis, and what is left
WHOLE = "all"
HEAD: list[Any] = ["volume", "group", "shape", "element", "mean", "total",
                   *(f"percentile_{rank}" for rank in PERCENTILES)]
VOXELWISE = {
    "mean": "mean over the volumes of the group",
    "std": "standard deviation over the volumes of the group (divided by their number)",
    "minimum": "smallest value among the volumes of the group",
    "maximum": "largest value among the volumes of the group",
}


@dataclass(frozen=True)
class Source:
    """A volume: its name, its group (volumes that are compared voxel by voxel), and where it lies."""

    name: str
    group: str
    path: Path


@dataclass(frozen=True)
class Stack:
    """Volumes of one shape (z, y, x), the same elements and voxels."""

    name: str
    sources: tuple[Source, ...]
    elements: tuple[str, ...]
    shape: tuple[int, int, int]
    voxel: tuple[float, float, float]

    @property
    def groups(self) -> dict[str, list[int]]:
        """Places of the volumes in `sources`, by group."""
        found: dict[str, list[int]] = {}
        for place, source in enumerate(self.sources):
            found.setdefault(source.group, []).append(place)
        return found


def write(folder: Path, out: Path | None = None, over: str | None = None,
          progress: Callable[[float, str], None] = lambda done, words: None) -> tuple[Path, list[Path], str]:
    """Statistics of all volumes of a run folder; the folder they are in, their files and a table as text.

    out: by default <folder>/statistics; an earlier result there is replaced when the new one is complete.
    over: an axis of the grid: volumes that differ in it alone make a group; "trial": all trials of a cell do. By
    default all volumes of a shape are one group.
    progress: told the share of the work that is done, and at what it is.
    Raises RunError where there are no volumes, no such axis, no room, or no dask.
    """
    try:
        import dask.array  # noqa: F401
    except ImportError as error:
        raise RunError(f"dask.array does not load ({error}): pip install 'tomoatlas[dask]'") from error
    run = tables.read(folder)
    stacks = _stacks(sources(run, over))
    target = out or folder / "statistics"
    if target.is_dir() and any(target.iterdir()) and not (target / "volumes.zarr").is_dir():
        raise RunError(f"{target}: exists and holds other things; choose another --out")
    aside = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        names, text = _write(run, stacks, aside, progress, grouped=over is not None)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"{error.filename or target}: {error.strerror or error}; the atlas is as it was: make room, or "
                       "choose another --out") from error
    return target, [target / name for name in names], text


def groups(target: Path) -> list[str]:
    """Names of the groups of a result, which are shapes."""
    return sorted(name for name, _ in zarr.open_group(target / "volumes.zarr", mode="r").groups())


def sources(run: Run, over: str | None = None) -> list[Source]:
    """The winners' volumes, or all trials', by cell; RunError where there are none or `over` is no axis."""
    axes = [*run.sweep.grid, TRIAL]
    if over is not None and over not in axes:
        raise RunError(f"--over {over}: is no axis of this sweep; its axes are {', '.join(axes)}")
    save, needed = run.sweep.output.save, "all" if over == TRIAL else "best"
    found = list(_trials(run) if over == TRIAL else _winners(run, over))
    if save == "none" or (needed == "all" and save != "all"):
        raise RunError(f"{run.folder}: holds no volumes{' of all trials' if over == TRIAL else ''}, as output.save is "
                       f"{save}: run the sweep into another folder with --set output.save={needed}")
    if not found:
        raise RunError(f"{run.folder}: holds no volumes, for no trial has ended yet")
    return found


def _winners(run: Run, over: str | None) -> Iterator[Source]:
    for cell in run.cells:
        path = RunFolder(run.folder).atlas / "cells" / cell.id
        if (path / "zarr.json").exists():
            rest = [part for part in cell.id.split(",") if not part.startswith(f"{over}=")]
            yield Source(cell.id, (",".join(rest) or WHOLE) if over else WHOLE, path)


def _trials(run: Run) -> Iterator[Source]:
    for cell in run.cells:
        for row in run.rows(cell):
            if row["volume"] and (run.folder / row["volume"] / "zarr.json").exists():
                yield Source(f"{cell.id}-{row['trial']}", cell.id, run.folder / row["volume"])


def _stacks(found: Sequence[Source]) -> list[Stack]:
    """Volumes that can be compared voxel by voxel, together."""
    alike: dict[tuple[Any, ...], list[Source]] = {}
    for source in found:
        group = zarr.open_group(source.path, mode="r")
        about: dict[str, Any] = group.attrs.asdict()
        voxel = tuple(np.broadcast_to(np.asarray(about["voxel_nm"], float), 3).tolist())
        alike.setdefault((_open(source).shape[1:], tuple(about["elements"]), voxel), []).append(source)
    stacks, names = [], set[str]()
    for (shape, elements, voxel), members in alike.items():
        name = "x".join(map(str, shape))
        while name in names:  # the same shape with other elements or voxels
            name += "-more"
        names.add(name)
        stacks.append(Stack(name, tuple(members), elements, shape, voxel))
    return stacks


def _write(run: Run, stacks: Sequence[Stack], folder: Path, progress: Callable[[float, str], None],
           grouped: bool) -> tuple[list[str], str]:
    """All files; their names and the table as text."""
    root = zarr.open_group(folder / "volumes.zarr", mode="w", zarr_format=3)
    root.attrs.update({"name": run.sweep.name, "system": run.sweep.system, "version": version()})
    targets = {stack.name: _targets(root.create_group(stack.name), stack) for stack in stacks}
    steps = [step for stack in stacks for step in _steps(stack, targets[stack.name])]
    for number, (words, work) in enumerate(steps):
        progress(number / len(steps), words)
        work()
    progress(1.0, words)
    consolidate(folder / "volumes.zarr")
    rows = [HEAD, *(row for stack in stacks for row in _rows(stack, targets[stack.name]))]
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    names = ["volumes.zarr", "table.csv"]
    for name, figure in _figures(stacks, targets, grouped):
        figure.savefig(folder / name, dpi=150)
        names.append(name)
    return names, _text(rows)


def _steps(stack: Stack, targets: dict[str, Any]) -> Iterator[tuple[str, Callable[[], None]]]:
    """The work in small pieces, each with the words for it."""
    import dask.array as da

    depth = _depth(stack)
    for k, element in enumerate(stack.elements):
        words = f"{element} of {len(stack.sources)} volumes of {stack.name}"
        volumes = [da.from_zarr(_open(source))[k].rechunk((depth, -1, -1)) for source in stack.sources]
        for place, volume in enumerate(volumes):
            yield words, functools.partial(_volume, volume, targets, (place, k))
        for place, members in enumerate(stack.groups.values()):
            group = [volumes[member] for member in members]
            for start in range(0, stack.shape[0], depth):
                planes = slice(start, min(start + depth, stack.shape[0]))
                yield words, functools.partial(_slab, group, planes, targets, (place, k))


def _targets(group: zarr.Group, stack: Stack) -> dict[str, Any]:
    """Empty arrays for what will be found, with axes, units and names, and their coordinates."""
    sizes = dict(zip("zyx", stack.shape))
    sizes |= {"volume": len(stack.sources), "group": len(stack.groups), "element": len(stack.elements),
              "percentile": len(PERCENTILES)}
    depth = min(_depth(stack), stack.shape[0])
    made = {}

    def add(name: str, dims: Sequence[str], words: str, units: str = "1") -> None:
        chunks = [1 if dim in ("volume", "group", "element") else sizes[dim] for dim in dims]
        if dims[-3:] == ["z", "y", "x"]:
            chunks[-3] = depth
        made[name] = group.create_array(name, shape=[sizes[dim] for dim in dims], dtype="f4", chunks=tuple(chunks),
                                        dimension_names=dims, attributes={"long_name": words, "units": units})

    for name, words in VOXELWISE.items():
        add(name, ["group", "element", "z", "y", "x"], f"concentration: {words}")
    for axis, rest in AXES.items():
        add(f"sum_{axis}", ["volume", "element", *rest], f"concentration, sum along {axis}", "voxel")
        add(f"maximum_{axis}", ["volume", "element", *rest], f"concentration, maximum along {axis}")
    add("volume_mean", ["volume", "element"], "concentration, mean over all voxels")
    add("volume_total", ["volume", "element"], "concentration, sum over all voxels", "voxel")
    add("volume_percentile", ["volume", "element", "percentile"], "concentration below which a share of voxels lies")
    _coordinates(group, stack)
    return made


def _coordinates(group: zarr.Group, stack: Stack) -> None:
    counts = np.array([len(members) for members in stack.groups.values()])
    members = np.array([source.group for source in stack.sources], STRING)
    for name, dim, values, words, units in (
            ("volume", "volume", np.array([source.name for source in stack.sources], STRING), "cell of the volume", ""),
            ("member", "volume", members, "group that the volume belongs to", ""),
            ("group", "group", np.array(list(stack.groups), STRING), "volumes that were compared", ""),
            ("count", "group", counts, "number of volumes in the group", "1"),
            ("element", "element", np.array(stack.elements, STRING), "element", ""),
            ("percentile", "percentile", np.array(PERCENTILES), "share of the voxels", "%"),
            *((axis, axis, (np.arange(size) - (size - 1) / 2) * voxel, f"position along {axis}", "nm")
              for axis, size, voxel in zip("zyx", stack.shape, stack.voxel))):
        group.create_array(name, data=values, dimension_names=[dim], chunks=values.shape,
                           attributes={"long_name": words, **({"units": units} if units else {})})


def _depth(stack: Stack) -> int:
    """Planes along z in a chunk of the volumes."""
    return min(int(_open(source).chunks[1]) for source in stack.sources)


def _open(source: Source) -> zarr.Array:
    array = zarr.open_group(source.path, mode="r")["volume"]
    assert isinstance(array, zarr.Array)
    return array


def _volume(volume: Any, targets: dict[str, Any], place: tuple[int, int]) -> None:
    """Projections, totals and percentiles of one element of one volume, a lazy (z, y, x)."""
    import dask.array as da

    found = {"volume_total": volume.sum(dtype="f8"), "volume_mean": volume.mean(dtype="f8"),
             "volume_percentile": _percentiles(volume)}
    for number, axis in enumerate(AXES):
        found[f"sum_{axis}"] = volume.sum(axis=number, dtype="f8").rechunk(-1)
        found[f"maximum_{axis}"] = volume.max(axis=number).rechunk(-1)
    regions = [tuple(slice(k, k + 1) for k in place)] * len(found)
    da.store([values.astype("f4")[None, None] for values in found.values()], [targets[name] for name in found],
             regions=regions, lock=False, **_here())


def _slab(volumes: Sequence[Any], planes: slice, targets: dict[str, Any], place: tuple[int, int]) -> None:
    """What a group of volumes has in common, voxel by voxel, in some planes."""
    import dask.array as da

    found = Moments(volumes[0][planes].shape)
    for start in range(0, len(volumes), WINDOW):
        for volume in da.stack([volume[planes] for volume in volumes[start:start + WINDOW]]).compute(**_here()):
            found.add(volume)
    for name, values in (("mean", found.mean), ("std", found.deviation()), ("minimum", found.low),
                         ("maximum", found.high)):
        targets[name][place[0], place[1], planes] = values


def _here() -> dict[str, Any]:
    return {"scheduler": "threads", "num_workers": min(THREADS, len(os.sched_getaffinity(0)))}


def _percentiles(volume: Any) -> Any:
    """Percentiles of a volume to better than 1 % of their value: from a histogram over the leading bits of its floats.

    Exact ones would need all voxels at once.
    """
    blocks = volume.numblocks[0]
    counts = volume.map_blocks(histogram, drop_axis=[1, 2], new_axis=[1], dtype="i8", chunks=((1,) * blocks, (BINS,)),
                               meta=np.empty((0, 0), "i8"))
    return counts.sum(axis=0).map_blocks(ranks, chunks=((len(PERCENTILES),),), dtype="f4",
                                                            meta=np.empty(0, "f4"))


def _rows(stack: Stack, found: dict[str, Any]) -> Iterator[list[Any]]:
    """The table below its head: a row for each volume and element."""
    mean, total, ranks = (found[f"volume_{name}"][:] for name in ("mean", "total", "percentile"))
    for place, source in enumerate(stack.sources):
        for k, element in enumerate(stack.elements):
            numbers = [mean[place, k], total[place, k], *ranks[place, k]]
            yield [source.name, source.group, stack.name, element, *(float(f"{number:.6g}") for number in numbers)]


def _text(rows: list[list[Any]]) -> str:
    """The head of the table, aligned."""
    columns = [0, 3, 4, 5, *(6 + PERCENTILES.index(rank) for rank in (5, 50, 95))]
    lines = [[f"{row[column]:.4g}" if isinstance(row[column], float) else row[column] for column in columns]
             for row in rows[:LINES + 1]]
    more = f"\n... and {len(rows) - 1 - LINES} more rows" if len(rows) > LINES + 1 else ""
    return tables.aligned(lines) + more


def _figures(stacks: Sequence[Stack], targets: dict[str, dict[str, Any]],
             grouped: bool) -> Iterator[tuple[str, Figure]]:
    """Pages of projections along the beam: of every volume, or of the mean of every group."""
    from sweeps import figures

    for stack in stacks:
        sums = targets[stack.name]["sum_z"]
        entries = stack.groups if grouped else {source.name: [k] for k, source in enumerate(stack.sources)}
        step = max(1, -(-max(stack.shape[1:]) // SHARP))
        names = list(entries)
        tops = {element: max(float(sums[place, k].max()) for place in range(len(stack.sources)))
                for k, element in enumerate(stack.elements)}
        pages = [names[start:start + PAGE] for start in range(0, len(names), PAGE)]
        for number, page in enumerate(pages, start=1):
            pictures = [_picture(name, sums, entries[name], step, grouped) for name in page]
            head = f"Sum along z (the beam at 0 degrees), {'mean of each group' if grouped else 'each volume'}"
            where = f", page {number} of {len(pages)}" if len(pages) > 1 else ""
            stem = "projections" + ("" if len(stacks) == 1 else f"-{stack.name}") + (f"-{number}" if where else "")
            yield f"{stem}.png", figures.projections(pictures, tops, stack.voxel[2] * step, head + where)


def _picture(name: str, sums: Any, members: Sequence[int], step: int, grouped: bool) -> Any:
    from sweeps import figures

    images = np.mean([np.asarray(sums[member]) for member in members], axis=0)
    high, wide = (size // step * step for size in images.shape[1:])
    small = images[:, :high, :wide].reshape(len(images), high // step, step, wide // step, step).mean(axis=(2, 4))
    words = name.replace(",", "\n") + (f"\nmean of {len(members)}" if grouped else "")
    return figures.Picture(words, small, {})
