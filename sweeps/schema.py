"""The models of a sweep's YAML. Every field has a description and a unit ("-" where there is none).

A field's own rule stands at the field; rules between settings are in `sweeps.rules`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, PrivateAttr, model_validator

from engine.phantoms_hebt import COLLECTED, DOSE, HAADF_DOSE, SOLID_ANGLE
from sweeps.alignment import Align, Misalign
from sweeps.defaults import FLAT, FLAT_DATA, FLAT_SOLVER, SHARED_TRIALS, SNR
from sweeps.fields import (
    BY_SHAPE,
    FUSED3D,
    HEBT,
    MAPPING,
    MEASURED,
    MSET,
    MSPT,
    NUMBER,
    PARTICLE,
    PHANTOM,
    RECORDED,
    SCANNED,
    Auto,
    Model,
    NotNegative,
    Share,
    TiltRange,
    Tunable,
    Weight,
    WholeTunable,
    checkpoints,
    power,
    setting,
    steps,
)
from sweeps.patterns import Found, Mset, Mspt, Recorded, Scanned
from sweeps.sources import Measured
from sweeps.yamlio import Document, Keys, dotted, flow, split


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
        raise ValueError(f"{flow(name)} is to name a folder: only letters, digits and _ . + -, no sign first")
    return name


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
    gamma: Annotated[float | None, AfterValidator(power)] = setting(
        None, "-", "power of Z x in the simulated HAADF; without it solver.gamma")
    replicate: int = setting(0, "-", "number of the noise realisation", ge=0)
    misalign: Misalign | None = setting(
        None, "pixels and degrees", "planted shifts and turn of a series; its images are wider by what they need",
        examples=["{shift: 10.0, axis: 3.0, inplane: 2.0}"])
    align: Align | None = setting(
        None, "-", "stages that align the images, in order; maps move with them",
        examples=["[{stage: centre_of_mass, axes: [y, x]}, match]"])

    @model_validator(mode="before")
    @classmethod
    def _fill_snr(cls, raw: Any) -> Any:
        """Without `snr` the paper's; without snr.chem the levels as they stand."""
        if not isinstance(raw, dict):
            return raw
        snr = raw.get("snr") or SNR.get(str(raw.get("phantom")), {})
        raw = (FLAT_DATA if raw.get("phantom") in FLAT else {}) | raw
        return raw | {"snr": {"chem": 1.0} | snr} if isinstance(snr, dict) else raw


Efficiency = Annotated[
    Annotated[float, Field(gt=0, le=1), NUMBER] | Annotated[dict[str, Annotated[float, Field(gt=0, le=1)]], MAPPING],
    BY_SHAPE]


class Particle(Model):
    """HEBT's core-shell particle: X-rays and HAADF from the same cross sections; concentrations in mol/cm^3."""

    phantom: Literal["agau"] = setting(..., "-", "specimen: agau (Ag-Au core and shell, HEBT's Fig. 1)")
    size: int = setting(97, "voxels", "edge of the field of view, which is 145.5 nm at any size", ge=8)
    planes: Annotated[int, Field(ge=1)] | None = setting(
        None, "voxels", "planes along the tilt axis; 1 is the paper's slice; without it a cube", examples=["1"])
    tilt_range: TiltRange = setting([-75.0, 75.0], "degrees", "lowest and highest tilt")
    haadf_tilts: int = setting(31, "images", "HAADF images, evenly spread; 0: the maps alone", ge=0)
    chem_tilts: int = setting(31, "maps", "chemical maps per element", ge=1)
    chem_angles: Literal["subset", "even"] = setting(
        "subset", "-", "angles of the maps: a subset of those of the images, or even on their own")
    dose: float = setting(DOSE, "electrons", "per pixel and tilt, for the maps; at this one the paper's optima appear",
                          gt=0)
    haadf_dose: float = setting(HAADF_DOSE, "electrons", "per pixel and tilt, for the images", gt=0)
    solid_angle: float = setting(SOLID_ANGLE, "sr", "of the X-ray detector", gt=0, le=12.6)
    efficiency: Efficiency = setting(1.0, "-", "of the X-ray detector: for all lines, or by element",
                                     examples=["{Ag: 0.96, Au: 0.9}"])
    collected: float = setting(COLLECTED, "-", "share of the scattered electrons on the HAADF detector", gt=0, le=1)
    background: float = setting(0.0, "counts", "flat background per pixel of the maps, known to the solver", ge=0)
    replicate: int = setting(0, "-", "number of the noise realisation", ge=0)


class Fused3D(Model):
    """Fused multi-modal tomography (F3) and microscopy (F2)."""

    method: Literal["fused", "chem_tv", "ml", "sirt", "plain", "fista"] = setting(
        "fused", "-", "fused; plain, fista: the same cost, older solvers; chem_tv, ml, sirt: maps alone")
    weights: Literal["z_gamma", "z", "z_gamma_linear"] = setting(
        "z_gamma", "-", "HAADF is the sum of (Z x)^gamma, of Z x^gamma, or, where thickness varies, of Z^gamma x")
    gamma: Annotated[Tunable, AfterValidator(power)] = setting(1.6, "-", "power of Z x in the HAADF model")
    iterations: int = setting(60, "-", "iterations of the solver, at most", ge=1)
    coarse: int = setting(
        20, "-", "fused: iterations at each coarser size, which make the start; 0: only EM steps, or measured maps, do",
        ge=0)
    inner: Annotated[WholeTunable, AfterValidator(steps)] = setting(4, "-", "TV dual steps per iteration")
    lambda_model: Weight = setting(1.0, "-", "weight of the HAADF term; 1 is maximum likelihood")
    lambda_chem: Weight = setting(1.0, "-", "weight of the chemical term; 1 is maximum likelihood")
    lambda_tv: Weight = setting(0.1, "-", "weight of total variation")
    guide: Share = setting(
        0.0, "-", "fused2d, method fused: how much of a map's gradient is free of total variation where it runs along "
        "the image's, 0 (F2's) to 1; .9 suits what varies in thickness")
    tolerance: float = setting(
        1e-3, "-", "fused: mean relative change of the cost over some iterations that ends the solve; 0: never", ge=0)
    dual_bits: Literal[32, 16] = setting(
        32, "bits", "fused: of the numbers of TV's dual; 16 move fewer bytes on a GPU")
    devices: int = setting(
        1, "devices", "GPUs, or parts of a CPU, that share one reconstruction, each a slab along x", ge=1)
    tilts: Literal["as_measured", "equal", "haadf"] = setting(
        "as_measured", "-", "brightness of the maps, which the holder shadows at some tilts; equal: one total, haadf: "
        "what HAADF shows")
    missing: list[Annotated[int, Field(ge=1, le=118)]] = setting(
        [], "-", "fused2d: atomic numbers of elements that the specimen has and the maps have not")
    errors: Literal["sandwich", "paper", "none"] = setting(
        "none", "-", "standard errors by voxel, fused2d's default; in fused3d as long as tens of solves, so set it "
        "for the winner; paper: fused2d's, by F2's Eq. 5 as printed")
    error_probes: int = setting(
        16, "-", "fused3d: random probes of the standard errors; each is then right within sqrt(1 / (2 probes))", ge=2)
    record: Annotated[list[int], AfterValidator(checkpoints)] = setting(
        [], "-", "iterations at which the volume is scored as well, an axis of the atlas")


class Hebt(Model):
    """SIRT of the maps alone, or of maps and HAADF images together (HEBT)."""

    method: Literal["hebt", "eds"] = setting(
        "hebt", "-", "hebt: maps and images together (Eq. 17); eds: the maps alone (Eq. 11)")
    form: Literal["preconditioned", "paper"] = setting(
        "preconditioned", "-", "paper: SIRT of the stacked system; preconditioned: as good in a tenth of the steps")
    alpha: Share = setting(0.8, "-", "weight of HAADF, from 0 (the maps alone) to 1")
    scaling: Literal["row", "plain"] = setting(
        "row", "-", "what alpha weighs: rows as SIRT scales them, 1-a : a/elements, or plain ones, (1-a)^2 : a^2")
    differences: Share = setting(
        0.3, "-", "preconditioned: rate of the elements' differences; their sum has 1. Few counts ask for less")
    iterations: int = setting(20, "-", "n; noise grows with it: 20 preconditioned does what 200 of the paper do", ge=1)
    record: Annotated[list[int], AfterValidator(checkpoints)] = setting(
        [], "-", "iterations at which the volume is scored as well, an axis of the atlas; the best is kept")
    prefilter: NotNegative = setting(0.8, "pixels", "sigma of a Gaussian over the maps")
    responses: dict[str, Annotated[float, Field(gt=0)]] | None = setting(
        None, "HAADF per count", "response ratio of each element; without it by regression",
        examples=["{Ag: 1.0, Au: 1.2}"])
    tilts: Literal["as_measured", "equal", "haadf"] = setting(
        "as_measured", "-", "brightness of the maps over the tilts; equal: one total, haadf: what HAADF shows")
    relaxation: Weight = setting(1.0, "-", "of SIRT's steps, below 2")
    positive: bool = setting(True, "-", "whether negative values are set to 0")
    devices: int = setting(
        1, "devices", "GPUs, or parts of a CPU, that share one reconstruction, each a slab along x", ge=1)


class Search(Model):
    """How the weights are searched, in each cell."""

    strategy: Literal["per_cell", "shared"] = setting(
        "per_cell", "-", "per_cell: each cell by itself, as in F3; shared: learns from neighbours and cheap trials")
    trials: int = setting(30, "trials", "budget of the search in each cell; without it, shared takes 15", ge=1)
    initial: int = setting(8, "trials", "first trials, which only spread out; shared: of neighbours together", ge=1)
    acquisition: Literal["gp_hedge", "EI", "LCB", "PI"] = setting("gp_hedge", "-", "what proposes a trial")
    objective: Literal["nrmse", "heldout", "rmsd", "tracing_error", "amplitude_error", "missing_sites"] = setting(
        "nrmse", "-", "what is minimised: nrmse against a truth, or the deviance of held-out maps; of mset rmsd or "
        "tracing_error of atoms, amplitude_error of patterns, or heldout, that of patterns left out; of mspt all but "
        "amplitude_error, and missing_sites of a crystal")
    folds: int = setting(4, "-", "parts that heldout splits the maps into, each left out once; of patterns one is",
                         ge=2)
    heldout: Literal["tilts", "counts"] = setting(
        "tilts", "-", "what that objective leaves out, every folds-th tilt, or of all tilts a share of the counts, "
        "drawn at random, for series of few maps; of single maps (fused2d) always counts")
    rule: Literal["best", "one_standard_error"] = setting(
        "best", "-", "which trial wins: the one of least objective, or, of those whose held-out deviance is within one "
        "standard error of it, paired over the folds, the one with the largest lambda_tv over lambda_chem")
    atlas: str | None = setting(
        None, "-", "run folder of a simulated sweep, or the atlas in it, relative to this YAML: the search starts from "
        "what that found for the nearest sampling and SNR; with trials: 1 that is the answer",
        examples=["runs/cocuo-sampling"])
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


class Shares(Model):
    """Of which pixels fused2d tells the concentrations in percent, and how."""

    flow: ClassVar[bool] = True
    peaks: int = setting(1, "-", "Gaussians fitted to each histogram: phases of the specimen", ge=1, le=6)
    above: float = setting(0.1, "-", "pixels whose sum of maps exceeds this share of its 99th percentile", ge=0, le=1)
    below: float | None = setting(None, "-", "and does not exceed this one", gt=0)
    margin: int = setting(0, "pixels", "taken off at the edge of the region", ge=0)
    mask: str | None = setting(None, "-", "file of a mask (y, x) that the region is cut with, relative to data.root")


class Fractions(Model):
    """Weight and atomic fractions from the volumes (HEBT, 2.1 and 2.2), and what they are made with."""

    flow: ClassVar[bool] = True
    by: Literal["atoms", "tables", "k", "zeta", "partial"] = setting(
        "atoms", "-", "atoms: concentrations count atoms; of counts, tables: f from cross sections (Eq. 7), "
        "k, zeta, partial: your own factors (Eqs. 1-3)")
    factors: dict[str, Annotated[float, Field(gt=0)]] | None = setting(
        None, "-", "k, zeta or partial: the factor of each element")
    over: Annotated[list[str], Field(min_length=1)] | None = setting(
        None, "-", "elements that are quantified, among themselves; without it all")
    threshold: Annotated[float, Field(ge=0)] | None = setting(
        None, "of the summed map", "above which the specimen is; without it where the volume changes least")
    beam: Annotated[float, Field(gt=0)] | None = setting(None, "keV", "energy of the electrons, for tables")
    lines: dict[str, Literal["Ka", "La", "Ma"]] | None = setting(
        None, "-", "X-ray line of each element; without it the usual one")
    efficiency: Efficiency = setting(1.0, "-", "tables: of the detector, for all lines or by element")
    take_off: Annotated[float, Field(gt=0, le=90)] | None = setting(
        None, "degrees", "of the X-ray detector; with it absorption is checked (package xraylib)")


class Grains(Model):
    """Particles of the volumes: their diameters, a shell, and how they change from the surface inward."""

    flow: ClassVar[bool] = True
    of: Annotated[list[str], Field(min_length=1)] | None = setting(
        None, "-", "elements whose sum shows the particles; without it all")
    threshold: Found = setting(
        None, "-", "of that sum, above which a particle is; auto: Otsu's", examples=["0.5"])
    least: float = setting(0.0, "nm", "diameter below which a particle does not count", ge=0)
    shell: str | None = setting(None, "-", "element of a shell, whose thickness is told with core")
    core: str | None = setting(None, "-", "element below the shell")


class Output(Model):
    """What is kept."""

    save: Literal["none", "best", "all"] = setting("best", "-", "volumes: none, each cell's best, or all")
    shares: Shares = setting(Shares(), "-", "fused2d: region and histogram of the concentrations in percent")
    haadf: int = setting(
        0, "iterations", "hebt: SIRT of the HAADF images alone, kept beside each volume; HEBT has 50; 0: none", ge=0)
    fractions: Fractions | None = setting(
        None, "-", "fused3d and hebt: weight and atomic fractions of the volumes",
        examples=["{by: tables, beam: 200.0}"])
    resolution: bool = setting(
        False, "-", "fused3d and hebt: whether each trial is repeated with two halves of the tilts, which tell how "
        "fine its volumes are resolved; it then takes three times as long")
    particles: Grains | None = setting(
        None, "-", "fused3d and hebt: particles in the volumes and their diameters",
        examples=["{least: 5.0}"])


class Given(dict[str, Any]):
    """`solver:` of a YAML, and the model that its system has for it."""

    model: type[BaseModel]


SOLVERS: dict[str, type[BaseModel]] = {"hebt": Hebt, "mset": Mset, "mspt": Mspt}


def _solver(value: Any) -> str:
    """The solver's model follows from the system."""
    model = value.model if isinstance(value, Given) else type(value)
    return f"<{model.__name__}>" if model in SOLVERS.values() else "<Fused3D>"


# Models of specimens that are no Phantom.
OWN = {"agau": "<Particle>"} | dict.fromkeys(("cuau", "bao", "co3o4", "coo"), "<Scanned>")


def _kind(value: Any) -> str:
    """Which model `data:` is: by `phantom:` or by `chem:`, else by the model whose settings it names more of."""
    if isinstance(value, BaseModel):
        return f"<{type(value).__name__}>"
    if not isinstance(value, dict) or "phantom" in value:
        return OWN.get(str(value["phantom"]), "<Phantom>") if isinstance(value, dict) else "<Phantom>"
    if "scan" in value:
        return "<Recorded>"
    named = {model: len(value.keys() & model.model_fields.keys()) for model in (Phantom, Measured)}
    return "<Measured>" if "chem" in value or named[Measured] > named[Phantom] else "<Phantom>"


class Sweep(Model):
    """A whole YAML."""

    name: Annotated[str, AfterValidator(_file_name)] = setting(
        ..., "-", "name of the sweep and of its folder in runs/")
    system: Literal["fused3d", "fused2d", "hebt", "mset", "mspt"] = setting("fused3d", "-", "what reconstructs")
    data: Annotated[Annotated[Phantom, PHANTOM] | Annotated[Particle, PARTICLE] | Annotated[Scanned, SCANNED]
                    | Annotated[Measured, MEASURED] | Annotated[Recorded, RECORDED], Discriminator(_kind)] = setting(
        ..., "-", "the specimen: simulated (phantom: ) or measured (chem: , of mset and mspt scan: )")
    grid: dict[str, list[Any]] = setting({}, "-", "axes of the atlas: settings and their values")
    solver: Annotated[Annotated[Fused3D, FUSED3D] | Annotated[Hebt, HEBT] | Annotated[Mset, MSET]
                      | Annotated[Mspt, MSPT], Discriminator(_solver)] = setting(
        Fused3D(), "-", "one reconstruction; {low: , high: , scale: } is searched")
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
        if raw.get("system") in SOLVERS and isinstance(solver := raw.get("solver", {}), dict):
            raw["solver"] = Given(solver)
            raw["solver"].model = SOLVERS[raw["system"]]
        if raw.get("system") == "mset" and isinstance(search := raw.get("search", {}), dict):
            raw["search"] = {"objective": "rmsd"} | search
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
