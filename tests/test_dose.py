"""Doses: those that the paper prints, and what a run tells of measured series."""

import numpy as np
import pytest

from engine import simulate
from engine.physics import fluence
from sweeps import report, settings
from sweeps.yamlio import SettingsError
from tests.test_bimodal import made

ELEMENTS = {"Co": 27, "O": 8}


@pytest.mark.parametrize(("current", "dwell", "pixel", "tilts", "printed"), [
    (115, 24, 0.64, 41, 1.72e4), (115, 3000, 0.64, 9, 4.73e5),  # Au-Fe3O4, HAADF and EELS
    (115, 24, 0.779, 41, 1.16e4), (115, 677, 0.779, 9, 7.21e4),  # Co3O4-Mn3O4
])
def test_the_papers_doses(current, dwell, pixel, tilts, printed):
    """Schwartz et al., 3D chemistry, Methods: -60 to 60 degrees by 3 and by 15."""
    assert tilts * fluence(current, dwell, pixel) == pytest.approx(printed, rel=0.01)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A YAML of a series in a file: 9 images, 3 maps, pixels of 0.5 nm that are binned."""
    folder = tmp_path_factory.mktemp("data")
    truth = np.zeros((2, 16, 16, 16), np.float32)
    truth[0, 4:12, 4:12, 4:12], truth[1, 5:11, 5:11, 3:13] = 1, 0.5
    haadf, chem = np.linspace(-60, 60, 9), np.linspace(-60, 60, 3)
    data = simulate.multimodal(truth, tuple(ELEMENTS.values()), tuple(ELEMENTS), pixel_size=0.5, haadf_angles=haadf,
                               chem_angles=chem, snr={"Co": 5.0, "O": 5.0, "haadf": 500.0}, gamma=1.6, background=0.0,
                               background_known=True, weights="z_gamma", seed=[1])
    np.savez(folder / "series.npz", maps=data.chem.projections, images=data.haadf.projections[0])
    return {"name": "dosed", "data": {
        "root": str(folder), "pixel_size": 0.5, "binning": 2,
        "haadf": {"path": "series.npz", "key": "images", "axes": ["tilt", "y", "x"], "angles": haadf.tolist(),
                  "beam": {"current": 100.0, "dwell": 10.0}},
        "chem": {"path": "series.npz", "key": "maps", "axes": ["element", "tilt", "y", "x"], "angles": chem.tolist(),
                 "elements": ELEMENTS, "beam": {"current": 100.0, "dwell": 1000.0}}},
        "solver": {"iterations": 2}, "search": {"objective": "heldout", "folds": 3}, "output": {"save": "none"}}


def test_a_run_tells_what_it_cost_and_what_maps_at_every_tilt_would_have(measured, tmp_path):
    folder = made(tmp_path / "dosed", settings.load(measured))
    one = fluence(100.0, 10.0, 0.5)  # 250 electrons per square Angstrom
    assert one == pytest.approx(249.66, rel=1e-4)
    text = report.table(folder)
    dose, = [line for line in text.splitlines() if "conventional scheme" in line]
    assert f"{9 * one + 300 * one:.3g} (HAADF {9 * one:.3g}, maps {300 * one:.3g})" in dose
    assert f"{900 * one:.3g}, {900 / 309:.3g} times as much" in dose


def test_half_a_beam_is_refused(measured):
    changed = {**measured, "data": {**measured["data"], "chem": {**measured["data"]["chem"], "beam": {"dwell": 3.0}}}}
    with pytest.raises(SettingsError, match=r"data\.chem\.beam\.current"):
        settings.load(changed)
