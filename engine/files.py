"""Arrays from files: .npz .npy .mrc .zarr, and through RosettaSciIO .hspy .emd .bcf .dm3 .dm4 .tif .ser.

RosettaSciIO is the optional extra `files`, imported when such a file is read. A file that cannot be read is
answered by a DataError: one sentence with the file, the cause and the next step.
"""

from __future__ import annotations

import importlib
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from engine.data import DataError

ROSETTA = (".hspy", ".emd", ".bcf", ".dm3", ".dm4", ".tif", ".tiff", ".ser")
ENERGIES = ("keV", "eV")
NANOMETRES = {"m": 1e9, "mm": 1e6, "µm": 1e3, "μm": 1e3, "um": 1e3, "nm": 1.0, "Å": 0.1, "A": 0.1, "pm": 1e-3}


@dataclass(frozen=True)
class Contents:
    """The arrays of one file by name, read when asked for, and what it states of them by name.

    pixels: sizes [nm]. energies: of a spectrum's first channel, and between channels, in the file's unit.
    An array without a name is called "".
    """

    path: Path
    arrays: Mapping[str, Any]
    pixels: Mapping[str, float]
    energies: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def name(self, key: str | None) -> str:
        """`key`, checked; without it the file's only array."""
        names = list(self.arrays)
        if names == [""]:
            if key:
                raise DataError(f"{self.path}: holds one array, without a name; leave out the key {key!r}")
            return ""
        held = ", ".join(names) or "no array"
        if key is None and len(names) != 1:
            raise DataError(f"{self.path}: holds {held}; say with key which one is meant")
        if key is not None and key not in names:
            raise DataError(f"{self.path}: has no array {key!r}{meant(key, names)}; it holds {held}")
        return key or names[0]

    def array(self, key: str | None = None) -> np.ndarray:
        """An array, memory-mapped where the format allows; DataError where it is absent or torn."""
        name = self.name(key)
        with reading(self.path):
            stored = self.arrays[name]
            return stored if isinstance(stored, np.ndarray) else np.asarray(stored[...])


def read_array(path: str | Path, key: str | None = None) -> np.ndarray:
    """One array of a file, memory-mapped where the format allows (.npy, .mrc)."""
    return open_file(path).array(key)


def open_file(path: str | Path) -> Contents:
    """What a file holds; DataError where it is missing, torn or of an unknown kind."""
    path = Path(path)
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{meant(path.name, beside)}; check the path and data.root")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: files of this kind are not known; convert it to {', '.join(READERS)}")
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old headers, unknown tags: what matters is raised
        return Contents(path, *reader(path))


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever a library raises about a file becomes a sentence."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read ({cause}); is it whole? Copy or convert it again") from error


def meant(word: str, known: Sequence[str]) -> str:
    """" (did you mean ...?)" with the nearest known word, or nothing."""
    close = get_close_matches(word, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


Read = tuple[Mapping[str, Any], dict[str, float]] | tuple[
    Mapping[str, Any], dict[str, float], dict[str, tuple[float, float]]]


class _Npz(Mapping[str, np.ndarray]):
    """Arrays of an .npz, each read when asked for; the file is never left open, not even when it is torn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist()]

    def __getitem__(self, name: str) -> np.ndarray:
        with np.load(self.path) as arrays:
            return arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _npz(path: Path) -> Read:
    return _Npz(path), {}


def _npy(path: Path) -> Read:
    return {"": np.load(path, mmap_mode="r")}, {}


def _mrc(path: Path) -> Read:
    """Permissive, as old files carry no map ID; mapped here, as mrcfile would close its own map."""
    import mrcfile
    from mrcfile.utils import data_dtype_from_header, data_shape_from_header

    words = np.fromfile(path, "<i4", 24)
    extension = min(abs(int(order[-1])) for order in (words, words.byteswap())) if words.size == 24 else 0
    if words.size < 24 or extension > path.stat().st_size:  # mrcfile would set gigabytes aside for it
        raise DataError(f"{path}: has no MRC header; is it another format? Rename, convert or copy it again")
    with mrcfile.open(path, permissive=True, header_only=True) as mrc:
        header = mrc.header.copy()
    dtype, shape = data_dtype_from_header(header), data_shape_from_header(header)
    offset = 1024 + int(header.nsymbt)
    short = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64)) - path.stat().st_size
    if short > 0 or min(shape) < 1:
        raise DataError(f"{path}: {short} bytes of the {shape} pixels that its header announces are missing; "
                        "copy it again")
    size = float(header.cella.x) / float(header.mx) / 10 if header.mx > 0 else 0.0
    # 1 Angstrom exactly is what writers put who do not know.
    known = 0 < size < np.inf and not np.isclose(size, 0.1)
    return {"": np.memmap(path, dtype, "r", offset, shape)}, {"": size} if known else {}


def _zarr(path: Path) -> Read:
    import zarr

    try:
        node = zarr.open(path, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path}: is a folder without Zarr metadata (zarr.json, .zgroup or .zarray); "
                        "name the folder that holds it") from None
    arrays = {"": node} if isinstance(node, zarr.Array) else {
        name: member for name, member in node.members(max_depth=None) if isinstance(member, zarr.Array)}
    size = node.attrs.get("voxel_nm")
    return arrays, dict.fromkeys(arrays, float(size)) if isinstance(size, int | float) else {}


def rosetta(path: Path, among: Sequence[str] = ()) -> Any:
    """The module of RosettaSciIO for such files; DataError without it. among: of these plugins."""
    try:
        from rsciio import IO_PLUGINS

        suffix = path.suffix.lower()[1:]
        plugin = next(plugin for plugin in IO_PLUGINS
                      if suffix in plugin["file_extensions"] and plugin["name"] in (among or [plugin["name"]]))
        return importlib.import_module(plugin["api"])
    except ImportError as error:
        raise DataError(f"{path}: goes through RosettaSciIO, and {error.name} is not installed; "
                        'pip install "tomoatlas[files]"') from None


def _rosetta(path: Path) -> Read:
    """Files of microscopes and of HyperSpy; an array is named by its signal's title."""
    reader = rosetta(path)
    arrays: dict[str, Any] = {}
    pixels: dict[str, float] = {}
    energies: dict[str, tuple[float, float]] = {}
    signals = reader.file_reader(str(path))
    for signal in signals:
        title = signal.get("metadata", {}).get("General", {}).get("title")
        name = title or ("" if len(signals) == 1 else "signal")
        name += f" ({len(arrays) + 1})" if name in arrays else ""
        arrays[name] = signal["data"]
        lengths = [abs(float(axis["scale"])) * NANOMETRES[axis["units"]] for axis in signal["axes"]
                   if axis.get("units") in NANOMETRES]
        pixels |= {name: lengths[-1]} if lengths else {}
        channels = [(float(axis["offset"]), float(axis["scale"])) for axis in signal["axes"]
                    if axis.get("units") in ENERGIES]
        energies |= {name: channels[-1]} if channels else {}
    return arrays, pixels, energies


READERS: dict[str, Callable[[Path], Read]] = {
    ".npz": _npz, ".npy": _npy, ".mrc": _mrc, ".zarr": _zarr, **dict.fromkeys(ROSETTA, _rosetta)}
