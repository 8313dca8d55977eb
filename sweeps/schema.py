"""The models of a sweep's YAML. Every field has a description and a unit ("-" where there is none).

A field's own rule stands at the field; rules between settings are in `sweeps.rules`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)

from sweeps.defaults import FLAT, FLAT_DATA, FLAT_SOLVER, SHARED_TRIALS, SNR
from sweeps.yamlio import Document, Keys, dotted, flow, shape, split

BUILT = ("fused3d", "fused2d")
PLANNED = ("hebt", "mset", "mspt")
Number = TypeVar("Number", int, float)


def setting(default: Any, unit: str, text: str, **rules: Any) -> Any:
    """A pydantic field with a unit and a description; `...` as the default makes it required."""
    return Field(default, description=text, json_schema_extra={"unit": unit}, **rules)


def tag(value: Any) -> str:
    """Which member of a union a value is meant for, by its shape: "<a number>", "<a mapping>", ..."""
    return f"<{shape(value)}>"


class Model(BaseModel):
    """Frozen and strict: the YAML reader tells numbers from words, so nothing needs to be guessed here."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    flow: ClassVar[bool] = False  # written on one line


class Range(Model, Generic[Number]):
    """What a search may try for one setting: {low, high, scale} or {choice}."""

    flow: ClassVar[bool] = True
    low: Number | None = setting(None, "as the setting", "lower end of the search, itself included")
    high: Number | None = setting(None, "as the setting", "upper end of the search, itself included")
    scale: Literal["linear", "log"] = setting("linear", "-", "whether differences or ratios count alike")
    choice: list[Number] | None = setting(
        None, "as the setting", "instead of low and high: the values to choose from", min_length=2)

    @model_validator(mode="after")
    def _ends(self) -> Range[Number]:
        if self.choice is not None:
            if self.low is not None or self.high is not None:
                raise ValueError("has a choice and a range; keep {choice: [...]} or {low, high, scale}")
            if len(set(self.choice)) < len(self.choice):
                raise ValueError(f"the choice {flow(self.choice)} holds a value twice")
        elif self.low is None or self.high is None:
            raise ValueError("a search needs {low: , high: , scale: } or {choice: [...]}")
        elif self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        elif self.scale == "log" and self.low <= 0:
            raise ValueError(f"a log scale needs low above 0, not {self.low:g}")
        return self

    @property
    def values(self) -> list[Number]:
        """The extreme values: the ends, or all choices."""
        return self.choice or [end for end in (self.low, self.high) if end is not None]


def ends(value: Any) -> list[Any]:
    """A number, or what a range of it reaches."""
    return value.values if isinstance(value, Range) else [value]


def _weight(value: Any) -> Any:
    if min(ends(value)) <= 0:
        raise ValueError(f"must be above 0, not {min(ends(value)):g}; 1e-6 all but removes its term")
    return value


def _power(value: Any) -> Any:
    if value is not None and not all(1 <= end <= 2 for end in ends(value)):
        raise ValueError(f"must lie in 1 to 2 (F3: 1.4 to 2), not {', '.join(map(str, ends(value)))}")
    return value


def _steps(value: Any) -> Any:
    if min(ends(value)) < 1:
        raise ValueError(f"must be at least 1, not {min(ends(value))}")
    return value


def _degrees(values: list[float]) -> list[float]:
    largest = max(map(abs, values), default=0)
    if largest > 180:
        raise ValueError(f"{largest:g} lies beyond +-180 degrees")
    if len(values) > 1 and 0 < largest <= math.pi + 1e-3:
        raise ValueError(f"looks like radians (no angle exceeds {largest:g}); give degrees")
    return values


def _tilt_range(values: list[float]) -> list[float]:
    low, high = values
    if low >= high:
        raise ValueError(f"{flow(values)} is no interval; the lower end comes first: {flow(sorted(values))}")
    if max(-low, high) > 90:
        raise ValueError(f"{flow(values)} goes beyond +-90 degrees")
    return _degrees(values)


def _interval(values: list[int]) -> list[int]:
    if not 0 <= values[0] < values[1]:
        raise ValueError(f"{flow(values)} is not an interval [from, to) of pixels, with 0 <= from < to")
    return values


def _indices(values: list[int]) -> list[int]:
    if min(values) < 0 or len(set(values)) < len(values):
        raise ValueError("indices count from 0 and come once each")
    return values


def _once(values: list[str]) -> list[str]:
    if len({value.lstrip("-") for value in values}) < len(values):
        raise ValueError(f"{flow(values)} names an axis twice")
    return values


def _checkpoints(values: list[int]) -> list[int]:
    if values and (values[0] < 1 or sorted(set(values)) != values):
        raise ValueError("iterations count from 1 and are given once each, in rising order")
    return values


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
        raise ValueError(f"{flow(name)} is to name a folder: only letters, digits and _ . + -, no sign first")
    return name


def _system(name: Any) -> Any:
    if name in PLANNED:
        raise ValueError(f"{name} is not built yet; built: {', '.join(BUILT)}")
    return name


def _unless(word: str) -> BeforeValidator:
    """`word` in the YAML means that the setting is not given."""
    return BeforeValidator(lambda value: None if value == word else value)


TAGS = ("<a number>", "<a word>", "<a list>", "<a mapping>", "<nothing>", "<Phantom>", "<Measured>")
_NUMBER, _WORD, _LIST, _MAPPING, _NOTHING, _PHANTOM, _MEASURED = map(Tag, TAGS)
_BY_SHAPE = Discriminator(tag)
_PAIR = Field(min_length=2, max_length=2)

Tunable = Annotated[Annotated[float, _NUMBER] | Annotated[Range[float], _MAPPING], _BY_SHAPE]
WholeTunable = Annotated[Annotated[int, _NUMBER] | Annotated[Range[int], _MAPPING], _BY_SHAPE]
Auto = Annotated[Annotated[int, Field(ge=1), _NUMBER] | Annotated[Literal["auto"], _WORD], _BY_SHAPE]
Weight = Annotated[Tunable, AfterValidator(_weight)]
Interval = Annotated[list[int], _PAIR, AfterValidator(_interval)]
TiltRange = Annotated[list[float], _PAIR, AfterValidator(_tilt_range)]
Degrees = Annotated[list[float], Field(min_length=1), AfterValidator(_degrees)]
Indices = Annotated[list[int], Field(min_length=1), AfterValidator(_indices)]
Units = Literal["counts", "net_counts", "atomic_percent", "intensity"]


class Phantom(Model):
    """A simulated specimen, after F3 or F2."""

    phantom: Literal["cocuo", "conio", "coscoo", "ga2o3", "zns_cus"] = setting(
        ..., "-", "specimen: cocuo (CoO, CuO, Au), conio (CoO in NiO); for fused2d coscoo, ga2o3, zns_cus")
    size: int = setting(64, "voxels", "edge of the volume or map; the field of view is one at any size", ge=8)
    snr: dict[str, float] = setting(
        ..., "-", "signal-to-noise ratio of each element and of haadf; chem multiplies all elements' SNR - 1")
    tilt_range: TiltRange = setting([-70.0, 70.0], "degrees", "lowest and highest tilt")
    haadf_tilts: int = setting(47, "images", "HAADF images, evenly spread; 0: conventional tomography", ge=0)
    chem_tilts: int = setting(9, "maps", "chemical maps per element", ge=1)
    chem_angles: Literal["subset", "even"] = setting(
        "subset", "-", "angles of the maps: a subset of those of the images, or even on their own")
    background: float = setting(0.15, "-", "flat background, as a fraction of each map's maximum", ge=0, lt=1)
    background_known: bool = setting(True, "-", "whether the solver is told the background")
    gamma: Annotated[float | None, AfterValidator(_power)] = setting(
        None, "-", "power of Z x in the simulated HAADF; without it solver.gamma")
    replicate: int = setting(0, "-", "number of the noise realisation", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_snr(cls, raw: Any) -> Any:
        """Without `snr` the paper's; without snr.chem the levels as they stand."""
        if not isinstance(raw, dict):
            return raw
        snr = raw.get("snr") or SNR.get(str(raw.get("phantom")), {})
        raw = (FLAT_DATA if raw.get("phantom") in FLAT else {}) | raw
        return raw | {"snr": {"chem": 1.0} | snr} if isinstance(snr, dict) else raw


class Element(Model):
    """An element of a measured series."""

    flow: ClassVar[bool] = True
    number: int = setting(..., "-", "atomic number", ge=1, le=118)
    index: int | None = setting(None, "-", "position along the array's element axis, from 0", ge=0)
    lines: list[str] | None = setting(None, "-", "names in names_key whose maps are summed", min_length=1)


class Background(Model):
    """A background kept as an array beside the counts."""

    flow: ClassVar[bool] = True
    key: str = setting(..., "-", "name of the array of background counts, shaped as the data")
    scale_key: str | None = setting(None, "-", "name of the factors (element, tilt) that scale it")
    smooth: float | None = setting(None, "pixels", "width of a Gaussian over it; without it 5", ge=0)
    factor: dict[str, Annotated[float, Field(ge=0)]] = setting(
        {}, "-", "by element, where a side window holds another element's line")


Shifts = Annotated[
    Annotated[list[Annotated[list[float], _PAIR]], _LIST] | Annotated[str, _WORD]
    | Annotated[None, _NOTHING], _BY_SHAPE, _unless("none")]
KnownBackground = Annotated[
    Annotated[float, Field(ge=0), _NUMBER] | Annotated[list[Annotated[float, Field(ge=0)]], _LIST]
    | Annotated[Background, _MAPPING] | Annotated[None, _NOTHING],
    _BY_SHAPE, _unless("none")]
AtomicNumber = Annotated[
    Annotated[int, Field(ge=1, le=118), _NUMBER] | Annotated[Element, _MAPPING], _BY_SHAPE]


class Source(Model):
    """Where a measured tilt series lies and what its numbers are."""

    path: str = setting(..., "-", "file, relative to data.root")
    key: str | None = setting(None, "-", "name of the array, where a file holds several", examples=["counts"])
    axes: Annotated[list[Literal["element", "tilt", "y", "x"]], AfterValidator(_once)] = setting(
        ..., "-", "the array's axes in its own order, of element, tilt, y, x; x is the tilt axis")
    angles: Annotated[Annotated[Degrees, _LIST] | Annotated[str, _WORD], _BY_SHAPE] = setting(
        ..., "degrees", "one per projection: a list, key:NAME of an array, or a file (.rawtlt, .tlt, .txt)")
    tilts: Indices | None = setting(
        None, "-", "indices of the projections to use, from 0; without it all", examples=["[0, 2, 4, 6]"])
    shifts: Shifts = setting(
        None, "pixels", "known drift of each image: [[dy, dx], ...] or key:NAME", examples=["key:shifts"])
    shift_axes: Annotated[list[Literal["y", "x", "-y", "-x"]], _PAIR, AfterValidator(_once)] = setting(
        ["y", "x"], "-", "order of the two numbers of a shift; -x where it is counted against x")
    background: KnownBackground = setting(
        None, "as the data", "known background: a number, one per projection, or {key: , scale_key: }",
        examples=["0.0"])
    units: Units = setting("intensity", "-", "what the numbers are; only counts are Poisson distributed")


class ChemSource(Source):
    """Chemical maps."""

    elements: dict[str, AtomicNumber] = setting(
        ..., "-", "atomic numbers {Fe: 26, ...} in the array's order, or {Fe: {number: 26, index: 8}, ...}",
        min_length=1)
    names_key: str | None = setting(
        None, "-", "name of an array of names; elements are then found by name", examples=["elements"])
    units: Units = setting("counts", "-", "what the numbers are; only counts are Poisson distributed")


class Crop(Model):
    """A window of the detector."""

    flow: ClassVar[bool] = True
    x: Interval | None = setting(None, "pixels", "[from, to) along x, before binning")
    y: Interval | None = setting(None, "pixels", "[from, to) along y, before binning")


class Volume(Model):
    """The reconstructed volume, where it is not as wide and as deep as the detector is high."""

    flow: ClassVar[bool] = True
    nz: int | None = setting(None, "voxels", "depth along the beam at 0 degrees", ge=1)
    ny: int | None = setting(None, "voxels", "width across the tilt axis", ge=1)
    padding: int = setting(0, "voxels", "added to each side along y, for a slab that leaves the field", ge=0)


class Truth(Model):
    """A known answer, to report NRMSE against; its elements in the order of data.chem.elements."""

    flow: ClassVar[bool] = True
    path: str = setting(..., "-", "file, relative to data.root")
    key: str | None = setting(None, "-", "name of the array, where a file holds several")
    axes: Annotated[list[Literal["element", "z", "y", "x"]], AfterValidator(_once)] = setting(
        ["element", "z", "y", "x"], "-", "the array's axes in its own order, of element, z, y, x")


class Measured(Model):
    """Tilt series from files."""

    root: str = setting(".", "-", "folder of the files, relative to this YAML; with --set, to where you are")
    pixel_size: Annotated[float, Field(gt=0)] | None = setting(
        None, "nm", "size of an unbinned pixel; without it the file's", examples=["1.0"])
    haadf: Source | None = setting(None, "-", "HAADF series; without it conventional chemical tomography")
    chem: ChemSource = setting(..., "-", "chemical maps")
    sensitivity: Annotated[dict[str, Annotated[float, Field(gt=0)]] | None, _unless("fit")] = setting(
        None, "counts", "of each element, per voxel at concentration 1; without it fitted to HAADF",
        examples=["{Co: 1.0, O: 0.5}"])
    crop: Crop | None = setting(
        None, "pixels", "part of the images to use, before binning", examples=["{x: [0, 128], y: [0, 128]}"])
    tilt_axis: float | None = setting(
        None, "pixels", "y of the tilt axis in aligned, uncropped images; without it their centre",
        examples=["127.5"])
    binning: int = setting(1, "pixels", "pixels summed to one along x and y", ge=1)
    volume: Volume | None = setting(
        None, "voxels", "shape of the volume; without it as deep and wide as the images",
        examples=["{nz: 64, ny: 128, padding: 16}"])
    truth: Truth | None = setting(
        None, "-", "known concentrations to compare with",
        examples=["{path: truth.npz, key: volume, axes: [element, z, y, x]}"])
    haadf_tilts: Annotated[int, Field(ge=0)] | None = setting(
        None, "images", "use so many, as evenly spread as can be; 0: conventional tomography")
    chem_tilts: Annotated[int, Field(ge=1)] | None = setting(
        None, "maps", "use so many per element, as evenly spread as can be")


class Fused3D(Model):
    """Fused multi-modal tomography (F3) and microscopy (F2)."""

    method: Literal["fused", "chem_tv", "ml", "sirt", "plain", "fista"] = setting(
        "fused", "-", "fused; plain, fista: the same cost, older solvers; chem_tv, ml, sirt: maps alone")
    weights: Literal["z_gamma", "z", "z_gamma_linear"] = setting(
        "z_gamma", "-", "HAADF is the sum of (Z x)^gamma, of Z x^gamma, or, where thickness varies, of Z^gamma x")
    gamma: Annotated[Tunable, AfterValidator(_power)] = setting(1.6, "-", "power of Z x in the HAADF model")
    iterations: int = setting(60, "-", "iterations of the solver, at most", ge=1)
    coarse: int = setting(
        20, "-", "fused: iterations at each coarser size, which make the start; 0: only EM steps do", ge=0)
    inner: Annotated[WholeTunable, AfterValidator(_steps)] = setting(4, "-", "TV dual steps per iteration")
    lambda_model: Weight = setting(1.0, "-", "weight of the HAADF term; 1 is maximum likelihood")
    lambda_chem: Weight = setting(1.0, "-", "weight of the chemical term; 1 is maximum likelihood")
    lambda_tv: Weight = setting(0.1, "-", "weight of total variation")
    tolerance: float = setting(
        1e-3, "-", "fused: mean relative change of the cost over some iterations that ends the solve; 0: never", ge=0)
    dual_bits: Literal[32, 16] = setting(
        32, "bits", "fused: of the numbers of TV's dual; 16 move fewer bytes on a GPU")
    devices: int = setting(
        1, "devices", "GPUs, or parts of a CPU, that share one reconstruction, each a slab along x", ge=1)
    missing: list[Annotated[int, Field(ge=1, le=118)]] = setting(
        [], "-", "fused2d: atomic numbers of elements that the specimen has and the maps have not")
    errors: Literal["sandwich", "paper", "none"] = setting(
        "sandwich", "-", "fused2d: standard error of each pixel; paper: by F2's Eq. 5 as printed")
    record: Annotated[list[int], AfterValidator(_checkpoints)] = setting(
        [], "-", "iterations at which the volume is scored as well, an axis of the atlas")


class Search(Model):
    """How the weights are searched, in each cell."""

    strategy: Literal["per_cell", "shared"] = setting(
        "per_cell", "-", "per_cell: each cell by itself, as in F3; shared: learns from neighbours and cheap trials")
    trials: int = setting(30, "trials", "budget of the search in each cell; without it, shared takes 15", ge=1)
    initial: int = setting(8, "trials", "first trials, which only spread out; shared: of neighbours together", ge=1)
    acquisition: Literal["gp_hedge", "EI", "LCB", "PI"] = setting("gp_hedge", "-", "what proposes a trial")
    objective: Literal["nrmse", "heldout"] = setting(
        "nrmse", "-", "what is minimised: nrmse against a truth, or the deviance of held-out maps")
    folds: int = setting(4, "-", "heldout: parts the maps are split into, each left out once", ge=2)
    order: Literal["free", "strict"] = setting(
        "free", "-", "free: from all that is known; strict: timing cannot change the atlas")
    trial_timeout: Annotated[float, Field(gt=0)] | None = setting(
        None, "s", "a trial that takes longer is given up, a failed row; times the trials of a batch",
        examples=["600"])
    budget_hours: Annotated[float, Field(gt=0)] | None = setting(
        None, "device hours", "no trial starts once the trials have taken so many, all together",
        examples=["100"])
    in_flight: Auto = setting(
        "auto", "batches", "batches of one cell that run at once, at most; auto: 2, in free order what keeps all "
        "workers busy")
    batch: Auto = setting(
        "auto", "trials", "trials of a cell solved at once on a device; auto: what fills a GPU, else 1")

    @model_validator(mode="before")
    @classmethod
    def _fewer(cls, raw: Any) -> Any:
        """Where cells share, half the trials, a third of them full, are the default."""
        if not isinstance(raw, dict) or raw.get("strategy") != "shared":
            return raw
        return {"trials": SHARED_TRIALS} | raw


class Output(Model):
    """What is kept."""

    save: Literal["none", "best", "all"] = setting("best", "-", "volumes: none, each cell's best, or all")


def _kind(value: Any) -> str:
    """Phantom or Measured: by `phantom:` or by `chem:`, else by the model whose settings it names more of."""
    if isinstance(value, BaseModel):
        return f"<{type(value).__name__}>"
    if not isinstance(value, dict) or "phantom" in value:
        return "<Phantom>"
    named = {model: len(value.keys() & model.model_fields.keys()) for model in (Phantom, Measured)}
    return "<Measured>" if "chem" in value or named[Measured] > named[Phantom] else "<Phantom>"


class Sweep(Model):
    """A whole YAML."""

    name: Annotated[str, AfterValidator(_file_name)] = setting(
        ..., "-", "name of the sweep and of its folder in runs/")
    system: Annotated[Literal["fused3d", "fused2d"], BeforeValidator(_system)] = setting(
        "fused3d", "-", "what reconstructs")
    data: Annotated[Annotated[Phantom, _PHANTOM] | Annotated[Measured, _MEASURED],
                    Discriminator(_kind)] = setting(
        ..., "-", "the specimen: simulated (phantom: ) or measured (chem: )")
    grid: dict[str, list[Any]] = setting({}, "-", "axes of the atlas: settings and their values")
    solver: Fused3D = setting(Fused3D(), "-", "one reconstruction; {low: , high: , scale: } is searched")
    search: Search = setting(Search(), "-", "how to search, in each cell")
    output: Output = setting(Output(), "-", "what to keep")
    seed: int = setting(0, "-", "seed of noise and search", ge=0, lt=2**32)
    _path: Path | None = PrivateAttr(None)
    _document: Document | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, raw: Any) -> Any:
        """`grid:` with nothing below it, or with all of it commented out, is a grid that is not given."""
        if not isinstance(raw, dict):
            return raw
        raw = {key: value for key, value in raw.items() if value is not None}
        if raw.get("system") == "fused2d" and isinstance(solver := raw.get("solver", {}), dict):
            raw["solver"] = FLAT_SOLVER | solver
        return raw

    @property
    def path(self) -> Path | None:
        """The YAML it came from; None for settings from a message or a lock file."""
        return self._path

    def where(self, name: str) -> str:
        """"file.yaml:12: data.chem.path", to begin a sentence about a setting."""
        keys: Keys = split(name)
        return f"{self._document.place(keys)}: {dotted(keys)}" if self._document else dotted(keys)

    def __eq__(self, other: object) -> bool:
        """Equal settings, wherever they came from."""
        return isinstance(other, Sweep) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]
