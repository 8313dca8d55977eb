"""The models of `data.align`: how a measured tilt series is aligned, stage by stage, in order; and `data.misalign`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field

from sweeps.fields import ALIGNING, Model, once, setting
from sweeps.yamlio import flow

Axes = Annotated[list[Literal["y", "x"]], Field(min_length=1), AfterValidator(once)]


class AlignBackground(Model):
    """A grey level taken off each image."""

    flow: ClassVar[bool] = True
    stage: Literal["background"] = setting(..., "-", "off each image goes the median of a frame along its edges")
    border: float = setting(0.05, "of the image", "width of the frame", gt=0, lt=0.5)
    level: float | None = setting(None, "as the data", "a known level, instead of the frame's")


class AlignMass(Model):
    """Centres of mass to the tilt axis."""

    flow: ClassVar[bool] = True
    stage: Literal["centre_of_mass"] = setting(..., "-", "for a specimen that is whole in every image along these axes")
    axes: Axes = setting(["y"], "-", "along which images are moved; x is the tilt axis")


class AlignLine(Model):
    """Sums along y, which no tilt changes."""

    flow: ClassVar[bool] = True
    stage: Literal["common_line"] = setting(..., "-", "moves images along x, for a specimen that is whole along y")


class AlignNeighbours(Model):
    """Correlation of neighbours."""

    flow: ClassVar[bool] = True
    stage: Literal["cross_correlation"] = setting(..., "-", "each image with its neighbour, from 0 degrees outward")
    axes: Axes = setting(["y", "x"], "-", "along which images are moved; x is the tilt axis")
    smooth: float = setting(1.0, "pixels", "of the Gaussian through which edges are seen", gt=0)
    stretch: bool = setting(True, "-", "whether the steeper image is widened as a flat specimen would be")


class AlignOutliers(Model):
    """Bad projections."""

    flow: ClassVar[bool] = True
    stage: Literal["outliers"] = setting(..., "-", "leaves out images that are blank, saturated, of another brightness "
                                         "than their neighbours, or far from the volume of the match before")


class MatchLevel(Model):
    """A level of projection matching."""

    flow: ClassVar[bool] = True
    bins: int = setting(..., "pixels", "of an image along an edge that become one", ge=1)
    rounds: int = setting(20, "-", "of a few steps of the volume and one of the alignment", ge=1)
    free: list[Literal["shift", "axis", "inplane"]] = setting(
        ["shift", "axis"], "-", "what is found: each image's shift, how the tilt axis is turned about the beam, one "
        "number for the series, or each image's own turn", min_length=1)


class AlignMatch(Model):
    """Projection matching."""

    flow: ClassVar[bool] = True
    stage: Literal["match"] = setting(..., "-", "images against the volume that they make, coarse to fine; finds the "
                                      "tilt axis as well")
    axes: Axes = setting(["y", "x"], "-", "along which images are moved; x is the tilt axis")
    levels: Annotated[list[MatchLevel], Field(min_length=1)] = setting(
        [MatchLevel(bins=8, rounds=40), MatchLevel(bins=4, rounds=30), MatchLevel(bins=2, rounds=20)], "-",
        "coarse to fine")
    steps: int = setting(20, "-", "SIRT steps of the volume between two alignments", ge=1)
    within: Literal["images", "crop"] = setting(
        "images", "-", "what is looked at: whole images, or of measured data data.crop and what shifts need around it")


class AlignMaps(Model):
    """Spectrum images on the HAADF images of their tilts."""

    flow: ClassVar[bool] = True
    stage: Literal["maps"] = setting(
        ..., "-", "measured data: the sum of a tilt's maps onto the HAADF image of that tilt, after all other stages")
    free: Literal["translation", "drift", "affine"] = setting(
        "drift", "-", "what is found of each: a shift, also a drift that is linear in time, or an affine map")
    smooth: float = setting(2.0, "pixels", "of the Gaussian over both", gt=0)


_STAGES = {"background": "<AlignBackground>", "centre_of_mass": "<AlignMass>", "common_line": "<AlignLine>",
           "cross_correlation": "<AlignNeighbours>", "outliers": "<AlignOutliers>", "match": "<AlignMatch>",
           "maps": "<AlignMaps>"}


def _kind(value: Any) -> str | None:
    """Which stage's model."""
    return f"<{type(value).__name__}>" if isinstance(value, BaseModel) else _STAGES[value["stage"]]


def _spelled(value: Any) -> Any:
    """A word stands for the stage with its defaults."""
    if isinstance(value, BaseModel):
        return value
    name = value.get("stage") if isinstance(value, dict) else value
    if name not in _STAGES:
        raise ValueError(f"{flow(name)} is no stage of an alignment; write stage: {', '.join(_STAGES)}")
    return value if isinstance(value, dict) else {"stage": name}


AlignStage = Annotated[
    Annotated[AlignBackground, ALIGNING[0]] | Annotated[AlignMass, ALIGNING[1]] | Annotated[AlignLine, ALIGNING[2]]
    | Annotated[AlignNeighbours, ALIGNING[3]] | Annotated[AlignOutliers, ALIGNING[4]]
    | Annotated[AlignMatch, ALIGNING[5]] | Annotated[AlignMaps, ALIGNING[6]],
    Discriminator(_kind), BeforeValidator(_spelled)]
Align = Annotated[list[AlignStage], Field(min_length=1)]


class Misalign(Model):
    """Planted misalignment of a simulated series; its maps lie as the images of their angles do."""

    flow: ClassVar[bool] = True
    shift: float = setting(0.0, "pixels", "largest shift of an image along y and along x, drawn evenly", ge=0)
    axis: float = setting(0.0, "pixels", "by which the tilt axis lies beside the images' middle")
    inplane: float = setting(0.0, "degrees", "turn of the tilt axis about the beam", ge=-10, le=10)
    seed: int = setting(0, "-", "of the shifts", ge=0)
