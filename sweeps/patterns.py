"""The models of 4D-STEM in a sweep's YAML: scanned particles of atoms, series in files, the solvers MSET and MSPT."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from sweeps.fields import (
    BY_SHAPE,
    LIST,
    MAPPING,
    NOTHING,
    NUMBER,
    PAIR,
    WORD,
    Degrees,
    Indices,
    Model,
    NotNegative,
    Share,
    TiltRange,
    Tunable,
    Weight,
    WholeTunable,
    checkpoints,
    once,
    setting,
    steps,
    unless,
)
from sweeps.sources import Crop

OF_PATTERNS = ("mset", "mspt")  # systems that take 4D-STEM
Axis = Literal["scan", "scan_y", "scan_x", "qy", "qx"]
Positive = Annotated[float, Field(gt=0)]
Found = Annotated[Annotated[Positive, NUMBER] | Annotated[None, NOTHING], BY_SHAPE, unless("auto")]
Place = Annotated[Annotated[list[float], PAIR, LIST] | Annotated[None, NOTHING], BY_SHAPE, unless("auto")]
Dose = Annotated[Annotated[float, Field(gt=0)] | None, unless("none")]


class Scanned(Model):
    """A particle of atoms and the 4D-STEM tilt series that is simulated of it, on a finer grid than the solver's."""

    phantom: Literal["cuau", "bao", "co3o4", "coo"] = setting(
        ..., "-", "atoms: cuau (Cu core, Au shell), bao (rock salt); cubes: co3o4 (spinel), coo (rock salt)")
    radius: float = setting(0.65, "nm", "mean radius of the particle, whose shape is random; of a cube half its edge",
                            gt=0)
    disorder: float = setting(0.02, "nm", "root mean square displacement of the atoms", ge=0)
    particle: int = setting(0, "-", "number of the random shape and orientation; a cube lies on a face", ge=0)
    film: float = setting(0.0, "nm", "thickness of an amorphous carbon film below the particle; 0: none", ge=0)
    size: int = setting(48, "voxels", "edge of the volume, and pixels of a pattern", ge=8)
    pixel: float = setting(0.04, "nm", "edge of a voxel", gt=0)
    tilts: int = setting(12, "tilts", "about the x axis", ge=1)
    tilt_range: TiltRange = setting(
        [-90.0, 90.0], "degrees", "lowest and highest tilt; of half a turn the last, which is the first, is left out")
    probes: int = setting(8, "probes", "along an edge of the square scan, which fills the field", ge=1)
    dose: Dose = setting(None, "electrons/A^2", "of the whole series; none: without noise", examples=["2.0e5"])
    voltage: float = setting(300.0, "kV", "that the electrons are accelerated by", gt=0)
    aperture: float = setting(21.0, "mrad", "semi-angle of the probe", gt=0)
    defocus: float = setting(-20.0, "nm", "-C1; negative: the crossover lies before the entrance face")
    c3: float = setting(0.0, "nm", "spherical aberration")
    c5: float = setting(0.0, "nm", "spherical aberration of fifth order")
    defocus_error: float = setting(0.0, "nm", "by which the defocus that the solver is told differs from the true one")
    position_error: float = setting(
        0.0, "nm", "root mean square distance of the probes from where the solver is told they are", ge=0)
    shift_error: float = setting(0.0, "nm", "largest distance along y and x of the specimen from the middle of a scan",
                                 ge=0)
    inplane_error: float = setting(0.0, "degrees", "largest turn of a tilt about the beam that nobody is told of", ge=0)
    tilt_error: float = setting(0.0, "degrees", "largest such turn about the tilt axis", ge=0)
    azimuth_error: float = setting(0.0, "degrees", "largest such turn about the axis across the two", ge=0)
    phonons: int = setting(0, "-", "configurations of shaken atoms that are averaged; 0: their mean blur", ge=0)
    replicate: int = setting(0, "-", "number of the noise realisation", ge=0)


class Files(Model):
    """A 4D-STEM tilt series as a microscope leaves it: a file of each tilt, and what is known of the microscope."""

    files: Annotated[Annotated[list[str], Field(min_length=1), LIST] | Annotated[str, WORD], BY_SHAPE] = setting(
        ..., "-", "one of each tilt, relative to data.root: a list, or a pattern whose numbers count in order")
    key: str | None = setting(
        None, "-", "name of the array, where a file holds several", examples=["entry/data"])
    axes: Annotated[list[Axis], Field(min_length=3, max_length=4), AfterValidator(once)] = setting(
        ["scan_y", "scan_x", "qy", "qx"], "-",
        "the array's axes in its own order, of scan_y, scan_x, qy, qx; or of scan, row by row, qy, qx")
    scan_shape: Annotated[list[Annotated[int, Field(ge=1)]], PAIR] | None = setting(
        None, "probes", "rows and columns of the scan, where one axis has all of them")
    scan_crop: Crop | None = setting(
        None, "probes", "part of the scan to use; the tilt axis passes through its centre",
        examples=["{x: [0, 5], y: [0, 5]}"])
    angles: Annotated[Annotated[Degrees, LIST] | Annotated[str, WORD], BY_SHAPE] = setting(
        ..., "degrees", "one for each file: a list, or a file (.rawtlt, .tlt, .txt, .csv)")
    tilt_axis: float = setting(
        0.0, "degrees", "direction of the tilt axis, from the scan's x toward its y; positive tilts turn +z toward "
        "what lies 90 degrees further")
    step: Annotated[Annotated[Positive, NUMBER] | Annotated[list[Positive], PAIR, LIST], BY_SHAPE] = setting(
        ..., "nm", "of the scan: a number, or [along y, along x]")
    voltage: float = setting(300.0, "kV", "that the electrons are accelerated by", gt=0)
    aperture: float = setting(..., "mrad", "semi-angle of the probe", gt=0)
    defocus: float = setting(..., "nm", "-C1; negative: the crossover lies before the entrance face, of a volume as "
                             "deep as the patterns' field is wide")
    c3: float = setting(0.0, "nm", "spherical aberration")
    c5: float = setting(0.0, "nm", "spherical aberration of fifth order")
    scale: Found = setting(
        None, "scale_units", "of a pixel of the detector; auto: the bright disc is as large as the aperture, to a "
        "percent or so where it has few pixels", examples=["auto"])
    scale_units: Literal["mrad", "1/nm"] = setting("mrad", "-", "what scale is given in")
    centre: Place = setting(
        None, "pixels", "of the bright disc along qy and qx, from 0; auto: found at each tilt", examples=["auto"])
    dark: float | None = setting(
        None, "counts", "of a pixel without electrons, to be subtracted; what is below is 0", examples=["0.0"])
    counts_per_electron: Positive = setting(1.0, "counts", "that the detector has for an electron")
    electrons: Found = setting(
        None, "electrons", "of a probe; auto: of the tenth of all probes that loses fewest", examples=["auto"])
    rotation: Annotated[Annotated[float, NUMBER] | Annotated[None, NOTHING], BY_SHAPE, unless("auto")] = setting(
        None, "degrees", "of the scan on the detector, from +x toward +y, after the flip; auto: found from the "
        "patterns, by how the specimen deflects them, or by parallax out of focus", examples=["auto"])
    flip: Annotated[Literal["none", "x", "y", "transpose"] | None, unless("auto")] = setting(
        None, "-", "what mirrors the scan on the detector: none, x, y, or transpose (x and y exchanged); auto: found "
        "likewise", examples=["auto"])


class Recorded(Model):
    """A 4D-STEM tilt series: in a group, as engine.scans writes it, or in the files of a microscope."""

    root: str = setting(".", "-", "folder of the files, relative to this YAML; with --set, to where you are")
    scan: Annotated[Annotated[str, WORD] | Annotated[Files, MAPPING], BY_SHAPE] = setting(
        ..., "-", "a group in Zarr or HDF5: patterns (tilt, probe, qy, qx), angles, positions, and its optics; or "
        "{files: , ...}, a file of each tilt, of which such a group is made once")
    tilts: Indices | None = setting(
        None, "-", "indices of the tilts to use, from 0; without it all", examples=["[0, 2, 4, 6]"])
    crop: Annotated[int, Field(ge=1)] | None = setting(
        None, "pixels", "of the detector that are kept along an edge, about the bright disc; without it all",
        examples=["48"])
    bins: int = setting(1, "pixels", "of the detector along an edge that are added up to one", ge=1)
    stream: Literal["auto", "always", "never"] = setting(
        "auto", "-", "whether patterns are read from the file in each iteration; auto: where memory cannot hold them")
    crystal: Literal["co3o4", "coo"] | None = setting(
        None, "-", "whose lattice and sites mspt seeks in the volume", examples=["co3o4"])
    light: str | None = setting(None, "-", "symbol of the lighter element, for the traced atoms", examples=["Cu"])
    heavy: str | None = setting(None, "-", "symbol of the heavier element", examples=["Au"])


def crystal_of(data: Scanned | Recorded) -> str | None:
    """The name of the crystal that a specimen is; None where it is none, or not said to be."""
    if isinstance(data, Recorded):
        return data.crystal
    return data.phantom if data.phantom in ("co3o4", "coo") else None


class Mset(Model):
    """Multislice electron tomography, and what it is compared with."""

    method: Literal["mset", "sset", "resire", "genfire"] = setting(
        "mset", "-", "mset; sset: all in one slice; resire, genfire: linear tomography of a dark-field scan of its own")
    mode: Literal["groups", "paper"] = setting(
        "groups", "-", "groups of probes and steps of a given length; paper: probe by probe, each step searched")
    iterations: int = setting(15, "-", "passes over all tilts; resire and genfire take 100 at least", ge=1)
    step: Weight = setting(1.0, "1/curvature", "length of a step")
    momentum: Share = setting(0.5, "-", "groups: share of the last change that is added before each step")
    group: int = setting(8, "probes", "groups: probes of a tilt in one step; 0: all", ge=0)
    binning: Annotated[WholeTunable, AfterValidator(steps)] = setting(
        1, "voxels", "layers of voxels in a slice, a divisor of data.size")
    finer: int = setting(1, "pixels", "of a wave along a voxel's edge; above 1, what misses the detector stays away",
                         ge=1)
    positivity: bool = setting(True, "-", "whether negative potentials are set to 0")
    lambda_tv: NotNegative = setting(
        0.0, "1/V", "weight of total variation; with resire in the root mean square of its images; genfire has none")
    inner: int = setting(4, "-", "TV dual steps per iteration", ge=1)
    refine: list[Literal["probe", "positions"]] = setting(
        [], "-", "what is corrected from the patterns: the probe, one for all tilts; each tilt's scan positions",
        examples=["[probe, positions]"])
    refine_after: int = setting(2, "-", "iterations before anything is refined", ge=0)
    tolerance: float = setting(0.0, "-", "mean relative change of the cost that ends the solve; 0: never", ge=0)
    threshold: Tunable = setting(0.08, "-", "peaks above this share of the 99.95th percentile are atoms")
    inside: bool = setting(True, "-", "whether atoms are sought inside the particle alone, told by Otsu's threshold")
    record: Annotated[list[int], AfterValidator(checkpoints)] = setting(
        [], "-", "iterations at which the volume is scored as well, an axis of the atlas")
    devices: int = setting(1, "devices", "GPUs, or parts of a CPU, that share one reconstruction, by probes", ge=1)


class Level(Model):
    """A stage of an alignment, coarse to fine."""

    flow: ClassVar[bool] = True
    bins: int = setting(..., "pixels", "of an image along an edge that become one", ge=1)
    rounds: int = setting(..., "-", "of a few steps of the volume and one of the alignment", ge=1)
    free: list[Literal["shift", "inplane", "tilt", "azimuth"]] = setting(
        ["shift"], "-", "what is found of each image: its shift, its turns about the beam, the tilt axis, and across")


class Mspt(Model):
    """Multislice ptychographic tomography: a phase image of each tilt, then alignment and tomography together."""

    method: Literal["mspt", "sspt"] = setting("mspt", "-", "mspt; sspt: ptychography in a single slice")
    iterations: int = setting(20, "-", "ptychography: passes over a tilt's patterns", ge=1)
    slices: WholeTunable = setting(5, "slices", "ptychography: of a tilt, of one thickness")
    sections: int = setting(
        0, "slices", "of the tilt next to 0, by itself, whose resolution along the beam is told beside the tomogram's; "
        "0: none. For simulated specimens, whose truth it is compared with", ge=0)
    depth: Found = setting(None, "nm", "that the slices fill; auto: as much as the patterns' field is wide",
                           examples=["auto"])
    group: int = setting(64, "probes", "that take a step together; 0: all", ge=0)
    step: Weight = setting(1.0, "1/curvature", "length of a step")
    momentum: Share = setting(0.5, "-", "share of an iteration's change that is added before the next")
    loss: Literal["amplitude", "poisson"] = setting("amplitude", "-", "what is minimised; poisson: for few counts")
    absorption: bool = setting(False, "-", "whether slices absorb as well")
    finer: int = setting(1, "pixels", "of a wave along a pixel's edge; above 1, what misses the detector stays away",
                         ge=1)
    modes: int = setting(1, "-", "incoherent modes of the probe", ge=1)
    coupling: NotNegative = setting(0.0, "-", "by which neighbouring slices are smoothed toward each other")
    refine: list[Literal["probe", "positions"]] = setting(
        ["probe"], "-", "what is corrected at each tilt: the probe; the scan positions", examples=["[]"])
    refine_after: int = setting(2, "-", "iterations before anything is refined", ge=0)
    denoise: Literal["none", "nlm", "bm3d"] = setting(
        "none", "-", "of phase images: nlm, non-local means; bm3d, an extra for non-commercial use")
    strength: NotNegative = setting(0.6, "noise", "of denoise; 0 changes nothing")
    sparsity: NotNegative = setting(
        0.0, "noise", "of a single grain: Fourier peaks below it go; 1 is the universal threshold; 0: none go")
    levels: Annotated[list[Level], Field(min_length=1)] = setting(
        [Level(bins=4, rounds=20), Level(bins=2, rounds=30, free=["shift", "inplane"]),
         Level(bins=1, rounds=20, free=["shift", "inplane"])], "-", "of the alignment, coarse to fine")
    steps: int = setting(20, "-", "alignment: of the volume in a round", ge=1)
    clip: Share = setting(0.0, "-", "alignment: share of an image's maximum below which it is 0; the paper's is 0.4")
    mask: NotNegative = setting(0.5, "-", "share of Otsu's threshold above which lies the specimen; 0: no mask")
    rounds: int = setting(20, "-", "of five steps each of the last reconstruction", ge=1)
    blur: NotNegative = setting(0.0, "voxels", "of the Gaussian that the volume is made of; the paper's is 0.5")
    threshold: Tunable = setting(0.08, "-", "peaks above this share of the 99.95th percentile are atoms")
    inside: bool = setting(True, "-", "whether atoms are sought inside the particle alone, told by Otsu's threshold")

    @property
    def record(self) -> list[int]:
        """No checkpoints: a volume is there at the end alone."""
        return []

    @property
    def devices(self) -> int:
        """Tilts, not devices, share the work."""
        return 1
