"""Named stages of preparing a cell, each kept under `stages/` by the hash of its inputs.

Cells that share inputs share the result: noise is drawn once, a phantom is rasterised once, for all trials and all
workers. A stage is a function of its inputs alone and returns arrays; it imports without JAX.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from engine import measured, phantoms2d, phantoms_hebt, physics, regions
from engine.data import DataError, MultiModal, even_subset
from engine.phantoms import FIELD_NM, phantom
from sweeps.schema import Particle, Phantom
from sweeps.sources import Measured, Source, Volume

Arrays = dict[str, np.ndarray]
CHUNK = 1 << 23  # voxels: few files, and slabs of many volumes fit into memory together (sweeps.volumes)


def key(name: str, inputs: dict[str, Any]) -> str:
    """The name under which a stage's result is kept: equal inputs, equal name."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def stage(folder: Path, name: str, inputs: dict[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a stage, from `folder`/stages or newly made; what another worker makes just now is waited for."""
    return together(folder, name, [inputs], lambda _: make())[0]


def together(folder: Path, name: str, inputs: Sequence[dict[str, Any]], make: Callable[[int], Arrays],
             ) -> list[Arrays]:
    """The arrays of several stages, of which each worker makes its share. make(k): of inputs[k].

    What another worker makes just now is left to it until nothing else is missing, then waited for; if that worker
    dies, it is made here. A file that a kill left torn is made again.
    """
    paths = [folder / "stages" / f"{key(name, given)}.npz" for given in inputs]
    found: dict[int, Arrays] = {}
    for wait in (False, True):
        for k, path in enumerate(paths):
            if k not in found and (kept := _kept(path)) is not None:
                found[k] = kept
            elif k not in found:
                with _reserved(path.with_suffix(".lock"), wait) as ours:
                    if ours:
                        kept = _kept(path)  # perhaps since
                        found[k] = _written(path, make(k)) if kept is None else kept
    return [found[k] for k in range(len(inputs))]


def _kept(path: Path) -> Arrays | None:
    """What a file holds; None without one, and without a torn one from then on."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as opened, np.load(opened) as kept:
            return dict(kept)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        path.unlink(missing_ok=True)
        return None


def _written(path: Path, arrays: Arrays) -> Arrays:
    """The arrays, after they have gone into a file, as a whole."""
    aside = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        with aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return arrays


@contextmanager
def _reserved(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this worker alone holds a lock meanwhile, which ends with its process.

    Where a file system has no locks it is taken to hold one: two workers may then make the same, and both write it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)  # whoever waits for it finds the result, and whoever comes later, too


def kept(folder: Path, name: str) -> list[Arrays]:
    """The arrays of every stage of a name that a run folder keeps."""
    found = (_kept(path) for path in sorted((folder / "stages").glob(f"{name}-*.npz")))
    return [arrays for arrays in found if arrays is not None]


def truth(folder: Path, data: Phantom | Particle, fine: int = 1) -> np.ndarray:
    """The concentrations (element, z, y, x) of a simulated specimen; of a Particle in mol/cm^3. fine: of a phantom in
    3D, voxels along the edge of one."""
    size = fine * data.size
    inputs: dict[str, Any] = {"phantom": data.phantom, "size": size}
    if isinstance(data, Particle):
        inputs["planes"] = data.planes

    def make() -> Arrays:
        if isinstance(data, Particle):
            weight = physics.atomic_weights(tuple(phantoms_hebt.ELEMENTS)).astype(np.float32)
            return {"volume": phantoms_hebt.phantom(data.size, data.planes) / weight[:, None, None, None]}
        if data.phantom in phantoms2d.ELEMENTS:
            return {"volume": phantoms2d.phantom(data.phantom, data.size)}
        return {"volume": phantom(data.phantom, (size,) * 3, FIELD_NM / size)}

    return stage(folder, "truth", inputs, make)["volume"]


def planes(shape: tuple[int, ...]) -> int:
    """How many planes along z of a volume (z, y, x) one file of it holds."""
    return max(1, min(shape[0], CHUNK // (shape[1] * shape[2])))


def extent(data: Phantom | Particle) -> tuple[int, int, int]:
    """(nz, ny, nx) voxels of a simulated specimen."""
    if isinstance(data, Particle):
        return data.size, data.size, data.planes or data.size
    return 1 if data.phantom in phantoms2d.ELEMENTS else data.size, data.size, data.size


def voxel(data: Phantom | Particle) -> float:
    """Edge of its voxels [nm]."""
    known = {**phantoms2d.FIELD_NM, "agau": phantoms_hebt.FIELD_NM}
    return known.get(data.phantom, FIELD_NM) / data.size


def recordings(data: Measured, where: Callable[[str], str] = lambda name: name) -> dict[str, measured.Recording]:
    """The series of a measured specimen, "chem" first, as they lie in their files.

    where: what a complaint about a setting begins with, file and line. Raises DataError.
    """
    sources: dict[str, tuple[Source, int | None]] = {"chem": (data.chem, data.chem_tilts)}
    if data.haadf is not None and data.haadf_tilts != 0:
        sources["haadf"] = (data.haadf, data.haadf_tilts)
    opened = {}
    for name, (source, count) in sources.items():
        try:
            opened[name] = _recording(data, source, count)
        except DataError as error:
            given = "haadf" if data.alone else name  # a HAADF series alone is reconstructed as the one map there is
            raise DataError(f"{where(f'data.{given}.path')}: {error}") from None
    return opened


def measured_data(data: Measured, opened: dict[str, measured.Recording] | None = None,
                  flat: bool = False) -> MultiModal:
    """Measured series (`recordings` of `data`), aligned, cropped and binned to one grid. flat: of a single plane."""
    opened = opened or recordings(data)
    crop = None if data.crop is None else data.crop.model_dump()
    chem, *haadf = regions.prepare(*opened.values(), pixel_size=data.pixel_size, crop=crop, binning=data.binning,
                                    tilt_axis=None if data.align else data.tilt_axis)
    elements = data.chem.elements
    numbers = tuple(e if isinstance(e, int) else e.number for e in elements.values())
    ny, nx = chem.projections.shape[2:]
    volume = data.volume or Volume()
    shape = (1, ny, nx) if flat else (volume.nz or ny, (volume.ny or ny) + 2 * volume.padding, nx)
    truth = None
    if data.truth is not None:
        truth = measured.read_truth(data.truth.path, key=data.truth.key, axes=data.truth.axes, root=data.root,
                                    elements=tuple(elements), shape=shape)
    known = data.sensitivity
    sensitivity = None if known is None else np.array([known[e] for e in elements])
    return MultiModal(chem, haadf[0] if haadf else None, numbers, shape, sensitivity, truth)


def align_inputs(data: Measured) -> dict[str, Any]:
    """All that the alignment of a measured series follows from: the files as they are, too."""
    source = data.haadf if data.haadf is not None and data.haadf_tilts != 0 else data.chem
    given = data.model_dump(exclude_none=True)
    names = ("root", "tilt_axis", "crop", "volume", "binning")
    wanted: dict[str, Any] = {name: given[name] for name in names if name in given}
    wanted["align"] = [step for step in given["align"] if step["stage"] != "maps"]
    count = data.haadf_tilts if source is data.haadf else data.chem_tilts
    return wanted | {"tilts": count} | file_inputs(data, source)


def file_inputs(data: Measured, source: Source) -> dict[str, Any]:
    """A source, and its file as it is."""
    path = Path(data.root, source.path)
    stat = path.stat() if path.exists() else None
    given = source.model_dump(exclude_none=True, exclude={"beam"})
    return {"source": given, "file": [stat.st_size, stat.st_mtime_ns] if stat else None}


def align_inputs_simulated(data: Phantom, given: dict[str, Any]) -> dict[str, Any]:
    """The same for a simulated series that follows from `given`, which does not say how it is aligned."""
    return {"simulated": given, "align": data.model_dump(exclude_none=True)["align"]}


def _recording(data: Measured, source: Source, count: int | None) -> measured.Recording:
    given = source.model_dump(exclude={"candidates", "beam"})
    if count is not None:
        total = len(measured.read_series(**given, root=data.root).angles)
        chosen = given["tilts"] or list(range(total))
        given["tilts"] = [chosen[i] for i in even_subset(len(chosen), count)]
    return measured.read_series(**given, root=data.root)
