"""Settings of 2D microscopy: their own defaults, and refusals of what belongs to tomography."""

from pathlib import Path

import pytest

from sweeps import settings
from sweeps.settings import SettingsError


def test_the_template_of_fused2d_loads_with_its_own_defaults(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(settings.template("fused2d"))
    sweep = settings.load(path)
    assert (sweep.system, sweep.data.phantom, sweep.data.haadf_tilts, sweep.data.chem_tilts) == (
        "fused2d", "coscoo", 1, 1)
    assert sweep.solver.gamma == 1.7 and sweep.solver.coarse == 0 and settings.load(settings.dump(sweep)) == sweep
    path.write_text(settings.template("fused2d", measured=True))
    sweep = settings.load(path)
    assert sweep.data.chem.axes == ["y", "x", "energy"] and sweep.data.chem.elements["Co"].window == [6.8, 7.05]


@pytest.mark.parametrize(("system", "section", "value", "words"), [
    ("fused2d", "data", {"phantom": "cocuo"}, "cocuo is a volume; fused2d has coscoo, ga2o3, zns_cus"),
    ("fused2d", "data", {"phantom": "ga2o3", "chem_tilts": 3}, "one map per element, not 3"),
    ("fused2d", "solver", {"method": "sirt"}, "sirt is for tomography"),
    ("fused2d", "solver", {"devices": 2}, "is for fused3d alone"),
    ("fused3d", "data", {"phantom": "ga2o3"}, "ga2o3 is a map; write system: fused2d"),
    ("fused3d", "solver", {"missing": [83]}, "is for fused2d alone"),
    ("fused3d", "solver", {"guide": 0.9}, "is for fused2d alone"),
    ("fused2d", "solver", {"guide": 1.2}, "is a share, from 0 to 1"),
    ("fused3d", "output", {"shares": {"peaks": 2}}, "is for fused2d alone"),
    ("fused2d", "output", {"shares": {"mask": "m.npy"}}, "is for measured data alone"),
])
def test_systems_take_what_is_theirs(system: str, section: str, value: dict, words: str) -> None:
    data = {"phantom": "coscoo" if system == "fused2d" else "cocuo"}
    with pytest.raises(SettingsError, match=words):
        settings.load({"name": "a", "system": system, "data": data} | {section: value})


SPECTRA = {"path": "a.bcf", "key": "EDX", "axes": ["y", "x", "energy"],
           "elements": {"Ti": {"number": 22, "window": [4.4, 4.6], "sides": [[4.1, 4.3]]}}}
IMAGE = {"path": "a.bcf", "key": "HAADF", "axes": ["y", "x"]}


@pytest.mark.parametrize(("chem", "haadf", "objective", "words"), [
    ({"elements": {"Ti": 22}}, {}, "heldout", "a spectrum image needs Ti: {number: , window:"),
    ({"elements": {"Ti": {"number": 22, "window": [4.6, 4.4]}}}, {}, "heldout", "is no window; the lower end comes"),
    ({"elements": {"Ti": SPECTRA["elements"]["Ti"] | {"before": [4.0, 4.3]}}}, {}, "heldout", "keep sides for EDX"),
    ({}, {"axes": ["y", "x", "energy"]}, "heldout", "HAADF images have no axis energy"),
    ({"axes": ["y", "energy"]}, {}, "heldout", "lacks x"),
    ({"units": "net_counts"}, {}, "heldout", "net_counts cannot be parted"),
    ({}, {}, "nrmse", "nrmse needs data.truth"),
])
def test_measured_maps_are_checked(chem: dict, haadf: dict, objective: str, words: str) -> None:
    whole = {"name": "a", "system": "fused2d", "search": {"objective": "heldout"},
             "data": {"pixel_size": 1.0, "chem": SPECTRA, "haadf": IMAGE}}
    assert settings.load(whole).data.chem.angles is None
    wrong = {"chem": SPECTRA | chem, "haadf": IMAGE | haadf, "pixel_size": 1.0}
    with pytest.raises(SettingsError, match=words):
        settings.load(whole | {"data": wrong, "search": {"objective": objective}})
