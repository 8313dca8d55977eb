"""The models of measured data in a sweep's YAML: files, what their numbers are, and which part is used."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from sweeps.alignment import Align
from sweeps.fields import (
    BY_SHAPE,
    LIST,
    MAPPING,
    NOTHING,
    NUMBER,
    PAIR,
    WORD,
    Band,
    Degrees,
    Indices,
    Interval,
    Model,
    Units,
    once,
    setting,
    unless,
)


class Element(Model):
    """An element of a measured series."""

    flow: ClassVar[bool] = True
    number: int = setting(..., "-", "atomic number", ge=1, le=118)
    index: int | None = setting(None, "-", "position along the array's element axis, from 0", ge=0)
    lines: list[str] | None = setting(None, "-", "names in names_key whose maps are summed", min_length=1)
    window: Band | None = setting(None, "energy", "of a spectrum image: [from, to) of the line or edge, in its unit")
    sides: Annotated[list[Band], Field(min_length=1, max_length=2)] | None = setting(
        None, "energy", "EDX: one window beside the line, or one on each side, that hold nothing but background")
    before: Band | None = setting(
        None, "energy", "EELS: window before the edge, to which power laws are fitted as background")


class Background(Model):
    """A background kept as an array beside the counts."""

    flow: ClassVar[bool] = True
    key: str = setting(..., "-", "name of the array of background counts, shaped as the data")
    scale_key: str | None = setting(None, "-", "name of the factors (element, tilt) that scale it")
    smooth: float | None = setting(None, "pixels", "width of a Gaussian over it; without it 5", ge=0)
    factor: dict[str, Annotated[float, Field(ge=0)]] = setting(
        {}, "-", "by element, where a side window holds another element's line")


Shifts = Annotated[
    Annotated[list[Annotated[list[float], PAIR]], LIST] | Annotated[str, WORD]
    | Annotated[None, NOTHING], BY_SHAPE, unless("none")]
KnownBackground = Annotated[
    Annotated[float, Field(ge=0), NUMBER] | Annotated[list[Annotated[float, Field(ge=0)]], LIST]
    | Annotated[Background, MAPPING] | Annotated[None, NOTHING],
    BY_SHAPE, unless("none")]
AtomicNumber = Annotated[
    Annotated[int, Field(ge=1, le=118), NUMBER] | Annotated[Element, MAPPING], BY_SHAPE]


class Energy(Model):
    """The energy axis of a spectrum image: channel k is at first + k step."""

    flow: ClassVar[bool] = True
    first: float = setting(..., "keV or eV", "energy of the first channel")
    step: Annotated[float, Field(gt=0)] = setting(..., "keV or eV", "width of a channel")


class Beam(Model):
    """The electrons that a series cost."""

    flow: ClassVar[bool] = True
    current: float = setting(..., "pA", "of the probe", gt=0)
    dwell: float = setting(..., "us", "at each pixel of an image or a map, all its frames together", gt=0)


class Source(Model):
    """Where a measured image or tilt series lies and what its numbers are."""

    path: str = setting(..., "-", "file, relative to data.root")
    key: str | None = setting(None, "-", "name of the array, where a file holds several", examples=["counts"])
    axes: Annotated[list[Literal["element", "tilt", "y", "x", "energy"]], AfterValidator(once)] = setting(
        ..., "-", "the array's axes in its own order, of element, tilt, y, x, energy; x is the tilt axis")
    angles: Annotated[Annotated[Degrees, LIST] | Annotated[str, WORD] | Annotated[None, NOTHING], BY_SHAPE] = setting(
        None, "degrees", "one per projection: a list, key:NAME of an array, or a file (.rawtlt, .tlt, .txt, .csv); "
        "without it one image at 0 degrees")
    tilts: Indices | None = setting(
        None, "-", "indices of the projections to use, from 0; without it all", examples=["[0, 2, 4, 6]"])
    shifts: Shifts = setting(
        None, "pixels", "known drift of each image: [[dy, dx], ...] or key:NAME", examples=["key:shifts"])
    shift_axes: Annotated[list[Literal["y", "x", "-y", "-x"]], PAIR, AfterValidator(once)] = setting(
        ["y", "x"], "-", "order of the two numbers of a shift; -x where it is counted against x")
    background: KnownBackground = setting(
        None, "as the data", "known background: a number, one per projection, or {key: , scale_key: }",
        examples=["0.0"])
    units: Units = setting("intensity", "-", "what the numbers are; only counts are Poisson distributed")
    beam: Beam | None = setting(None, "-", "what the series cost in electrons; the run then tells the dose",
                                examples=["{current: 115.0, dwell: 24.0}"])


class ChemSource(Source):
    """Chemical maps."""

    elements: dict[str, AtomicNumber] = setting(
        ..., "-", "atomic numbers {Fe: 26, ...} in the array's order, or {Fe: {number: 26, index: 8}, ...}",
        min_length=1)
    candidates: dict[str, AtomicNumber] | None = setting(
        None, "-", "hebt: further elements that may scatter; where HAADF is no sum of the maps, one of them is named",
        examples=["{Pt: {number: 78, index: 2}}"])
    names_key: str | None = setting(
        None, "-", "name of an array of names; elements are then found by name", examples=["elements"])
    energy: Energy | None = setting(
        None, "keV or eV", "energies of a spectrum image; without it the file's", examples=["{first: 0.0, step: 0.01}"])
    smooth: Annotated[float, Field(ge=0)] | None = setting(
        None, "pixels", "width of a Gaussian over the background of a spectrum image; without it 5")
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
    axes: Annotated[list[Literal["element", "z", "y", "x"]], AfterValidator(once)] = setting(
        ["element", "z", "y", "x"], "-", "the array's axes in its own order, of element, z, y, x")


ALONE = 1  # an atomic number for what is none: images on their own are weighed by no power of it


class Measured(Model):
    """Tilt series from files."""

    root: str = setting(".", "-", "folder of the files, relative to this YAML; with --set, to where you are")
    pixel_size: Annotated[float, Field(gt=0)] | None = setting(
        None, "nm", "size of an unbinned pixel; without it the file's", examples=["1.0"])
    haadf: Source | None = setting(None, "-", "HAADF series; without it conventional chemical tomography")
    chem: ChemSource = setting(..., "-", "chemical maps")
    sensitivity: Annotated[dict[str, Annotated[float, Field(gt=0)]] | None, unless("fit")] = setting(
        None, "counts", "of each element, per voxel at concentration 1; without it fitted to HAADF",
        examples=["{Co: 1.0, O: 0.5}"])
    crop: Crop | None = setting(
        None, "pixels", "part of the images to use, before binning", examples=["{x: [0, 128], y: [0, 128]}"])
    tilt_axis: float | None = setting(
        None, "pixels", "y of the tilt axis in aligned, uncropped images; without it their centre",
        examples=["127.5"])
    binning: int = setting(1, "pixels", "pixels summed to one along x and y", ge=1)
    align: Align | None = setting(
        None, "-", "stages that align the images, in order, after their known shifts; maps move with them",
        examples=["[background, cross_correlation, outliers, match]"])
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

    @property
    def alone(self) -> bool:
        """Whether the series of "maps" is one of images, which there are none beside."""
        return self.haadf is None and [*self.chem.elements.values()] == [ALONE]

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, raw: Any) -> Any:
        """A HAADF series without maps is reconstructed as the only map there is: of an element HAADF."""
        if not isinstance(raw, dict) or "chem" in raw or not isinstance(raw.get("haadf"), dict):
            return raw
        series = {"units": "intensity", "elements": {"HAADF": ALONE}} | raw["haadf"]
        return {name: value for name, value in raw.items() if name != "haadf"} | {"chem": series}
