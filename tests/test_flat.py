"""What a fused2d run says of itself: how errors agree, shares, tables, figures; measured data."""

import json

import matplotlib.image
import numpy as np
import pytest
import zarr

from engine.data import DataError
from sweeps import coordinator, flat, grid, report, settings, tables, trial
from sweeps.atlas import RunFolder
from sweeps.crew import Event
from tests.test_report import Here
from tests.test_spectra import ENERGIES

DOSES = {"data.snr.haadf": [20, 100], "data.snr.chem": [3, 10]}


class Solving(Here):
    """One worker inside this process, with the real solver."""

    def submit(self, worker, message):
        self.events.append(Event(worker, results=trial.run(message)))


def made(folder, **changes):
    plain = {"name": "maps", "system": "fused2d", "data": {"phantom": "coscoo", "size": 32}, "grid": DOSES,
             "solver": {"weights": "z_gamma_linear", "lambda_tv": 0.3}}
    sweep = settings.load(plain | changes)
    coordinator.run(sweep, grid.cells(sweep), Solving(), RunFolder(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs") / "maps")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_agreement_is_a_correlation_and_a_slope_through_zero():
    error = np.array([1.0, 2.0, 3.0, 5.0])
    assert flat.agreement(list(zip(error, 0.9 * error))) == pytest.approx((1.0, 0.9))
    assert flat.agreement(list(zip(error, error[::-1])))[0] < 0
    assert flat.agreement([(1.0, 1.0), (2.0, 2.0)]) is None and flat.agreement([(1.0, 1.0)] * 3) is None


def test_the_summary_compares_predicted_and_true_errors(folder):
    found = summary(folder)
    pairs = np.array([[cell["metrics"][name] for name in ("average_relative_error", "share_rmse")]
                      for cell in found["cells"].values()])
    assert found["error_correlation"] == pytest.approx(np.corrcoef(pairs.T)[0, 1])
    assert found["error_slope"] == pytest.approx((pairs[:, 0] @ pairs[:, 1]) / (pairs[:, 0] ** 2).sum())
    # SNR 1 + 3 (5 - 1) = 13 and more: every cell is clear.
    assert found["error_slope_clear"] == found["error_slope"] and 0.7 < found["error_slope"] < 1.3
    assert not any(flat.clear(cell) for cell in grid.cells(settings.load(
        {"name": "a", "system": "fused2d", "data": {"phantom": "coscoo"}, "grid": {"data.snr.chem": [0.5, 2]}})))


def test_shares_are_in_the_atlas_and_in_the_table(folder):
    atlas = zarr.open_group(folder / "atlas.zarr", mode="r")
    share, raw = atlas["metric_share"], atlas["metric_share_sigma_measured"]
    assert share.attrs["units"] == "%" and share.shape == (2, 2, 3)
    cobalt = list(atlas["element"][:]).index("Co")
    assert abs(share[..., cobalt] - 50).max() < 5  # half of either phase is cobalt
    assert (atlas["metric_share_sigma"][..., cobalt] < raw[..., cobalt]).all()  # a single Gaussian: both phases have it
    text = tables.table(tables.read(folder))
    assert "RMSE of concentrations over average standard error, SNR > 10: correlation" in text
    assert f"Co in data.snr.haadf=100,data.snr.chem=10: {share[1, 1, cobalt]:.2f} ± " in text


def test_the_report_shows_maps_errors_and_concentrations(folder):
    names = {path.name for path in report.write(folder)}
    assert {"errors.png", "shares-map.png", "maps-best.png", "maps-worst.png", "shares-best.png",
            "profiles-best.png"} <= names
    assert not any(name.startswith("slices") for name in names)
    for name in names - {"index.html"}:
        picture = matplotlib.image.imread(folder / "report" / name)
        assert picture.shape[0] > 200 and picture[..., :3].std() > 0.02, name


def test_what_solver_settings_do_to_the_shares_is_told(tmp_path):
    found = summary(made(tmp_path / "r", grid={"solver.gamma": [1.4, 2.0], "data.snr.chem": [3, 10]}))
    cells = [found["cells"][f"solver.gamma={gamma},data.snr.chem={chem}"]["elements"]["share"]
             for chem in (3, 10) for gamma in (1.4, 2.0)]
    for name, spread in found["share_sensitivity"].items():
        apart = [abs(cells[k][name] - cells[k + 1][name]) / 2 for k in (0, 2)]
        assert spread == pytest.approx(max(apart))


@pytest.fixture
def spectra(tmp_path):
    """A spectrum image of two lines over a background, with an image, in a file."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:24, :20]
    maps = {"Fe": 4.0 * (np.hypot(y - 12, x - 10) < 8), "O": 3.0 * (x > 6)}
    cube = np.full((24, 20, ENERGIES.size), 0.02)
    for centre, rate in ((2.1, maps["Fe"]), (0.55, maps["O"])):
        line = np.exp(-((ENERGIES - centre) ** 2) / (2 * 0.03**2))
        cube += rate[..., None] * line / line.sum()
    np.savez(tmp_path / "a.npz", cube=rng.poisson(cube).astype(np.uint8), mask=x > 2,
             image=maps["Fe"] * 26**1.7 + maps["O"] * 8**1.7 + rng.normal(size=y.shape))
    return {"root": str(tmp_path), "pixel_size": 1.0, "haadf": {"path": "a.npz", "key": "image", "axes": ["y", "x"]},
            "chem": {"path": "a.npz", "key": "cube", "axes": ["y", "x", "energy"],
                     "energy": {"first": 0.05, "step": 0.01}, "elements": {
                         "Fe": {"number": 26, "window": [2.0, 2.2], "sides": [[1.7, 1.9], [2.4, 2.7]]},
                         "O": {"number": 8, "window": [0.45, 0.65], "sides": [[0.8, 1.0]]}}}}


def test_a_spectrum_image_is_reconstructed_and_its_weights_are_found_without_a_truth(tmp_path, spectra):
    weights = {"low": 0.1, "high": 10.0, "scale": "log"}
    folder = made(tmp_path / "r", data=spectra, grid={}, solver={"weights": "z_gamma_linear", "lambda_tv": weights},
                  search={"objective": "heldout", "trials": 4, "initial": 4, "folds": 3})
    found = summary(folder)["cells"]["all"]
    assert found["failed"] == 0 and found["objective"] == found["metrics"]["heldout"] < 1.5
    assert found["elements"] == {}  # no sensitivity: counts of two elements are on no common scale
    names = {path.name for path in report.write(folder)}
    assert "maps-best.png" in names and not any("shares" in name or name == "errors.png" for name in names)
    fields = set(zarr.open_group(folder / "atlas.zarr" / "cells" / "all", mode="r").array_keys())
    assert {"volume", "field_standard_error", "field_relative_error", "field_measured", "field_image"} <= fields


def test_a_mask_cuts_the_region_and_must_fit(tmp_path, spectra):
    np.save(tmp_path / "mask.npy", np.arange(20) > 12 + np.zeros((24, 1)))
    known = {"sensitivity": {"Fe": 1.0, "O": 1.0}}
    given = {"name": "a", "system": "fused2d", "data": spectra | known, "search": {"objective": "heldout"}}
    volume = np.ones((2, 1, 24, 20))
    cut = settings.load(given | {"output": {"shares": {"mask": "mask.npy"}}})
    assert flat.region(settings.load(given), volume).sum() == 480 and flat.region(cut, volume).sum() == 24 * 7
    with pytest.raises(DataError, match=r"a mask of shape \(24, 20\) for maps of \(20, 20\)"):
        flat.region(cut, volume[:, :, :20])
