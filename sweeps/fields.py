"""What the models of a sweep's YAML are made of: fields with a unit and a description, ranges, kinds of numbers."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from sweeps.yamlio import flow, shape

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


def _not_negative(value: Any) -> Any:
    if min(ends(value)) < 0:
        raise ValueError(f"must be at least 0, not {min(ends(value)):g}")
    return value


def _share(value: Any) -> Any:
    """A share between 0 and 1, or a range of it."""
    if not all(0 <= end <= 1 for end in ends(value)):
        raise ValueError(f"is a share, from 0 to 1, not {', '.join(f'{end:g}' for end in ends(value))}")
    return value


def power(value: Any) -> Any:
    """A power of Z x between 1 and 2, or a range of it."""
    if value is not None and not all(1 <= end <= 2 for end in ends(value)):
        raise ValueError(f"must lie in 1 to 2 (F3: 1.4 to 2), not {', '.join(map(str, ends(value)))}")
    return value


def steps(value: Any) -> Any:
    """A number of steps, at least one, or a range of it."""
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


def _band(values: list[float]) -> list[float]:
    if values[0] >= values[1]:
        raise ValueError(f"{flow(values)} is no window; the lower end comes first: {flow(sorted(values))}")
    return values


def _indices(values: list[int]) -> list[int]:
    if min(values) < 0 or len(set(values)) < len(values):
        raise ValueError("indices count from 0 and come once each")
    return values


def once(values: list[str]) -> list[str]:
    """Axes, none of them named twice."""
    if len({value.lstrip("-") for value in values}) < len(values):
        raise ValueError(f"{flow(values)} names an axis twice")
    return values


def checkpoints(values: list[int]) -> list[int]:
    """Iterations in rising order."""
    if values and (values[0] < 1 or sorted(set(values)) != values):
        raise ValueError("iterations count from 1 and are given once each, in rising order")
    return values


def unless(word: str) -> BeforeValidator:
    """`word` in the YAML means that the setting is not given."""
    return BeforeValidator(lambda value: None if value == word else value)


TAGS = ("<a number>", "<a word>", "<a list>", "<a mapping>", "<nothing>", "<Phantom>", "<Particle>", "<Measured>",
        "<Scanned>", "<Recorded>", "<Fused3D>", "<Hebt>", "<Mset>", "<Mspt>", "<AlignBackground>", "<AlignMass>",
        "<AlignLine>", "<AlignNeighbours>", "<AlignOutliers>", "<AlignMatch>", "<AlignMaps>")
(NUMBER, WORD, LIST, MAPPING, NOTHING, PHANTOM, PARTICLE, MEASURED, SCANNED, RECORDED, FUSED3D, HEBT, MSET, MSPT,
 *ALIGNING) = map(Tag, TAGS)
BY_SHAPE = Discriminator(tag)
PAIR = Field(min_length=2, max_length=2)

Tunable = Annotated[Annotated[float, NUMBER] | Annotated[Range[float], MAPPING], BY_SHAPE]
WholeTunable = Annotated[Annotated[int, NUMBER] | Annotated[Range[int], MAPPING], BY_SHAPE]
Auto = Annotated[Annotated[int, Field(ge=1), NUMBER] | Annotated[Literal["auto"], WORD], BY_SHAPE]
Weight = Annotated[Tunable, AfterValidator(_weight)]
Share = Annotated[Tunable, AfterValidator(_share)]
NotNegative = Annotated[Tunable, AfterValidator(_not_negative)]
Interval = Annotated[list[int], PAIR, AfterValidator(_interval)]
TiltRange = Annotated[list[float], PAIR, AfterValidator(_tilt_range)]
Degrees = Annotated[list[float], Field(min_length=1), AfterValidator(_degrees)]
Band = Annotated[list[float], PAIR, AfterValidator(_band)]
Indices = Annotated[list[int], Field(min_length=1), AfterValidator(_indices)]
Units = Literal["counts", "net_counts", "atomic_percent", "intensity"]
