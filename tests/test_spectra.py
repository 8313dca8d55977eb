"""Laws of spectrum images: counts are conserved, backgrounds of known shape are found, bad windows are refused."""

import importlib.util

import numpy as np
import pytest

from engine import spectra
from engine.data import DataError
from engine.measured import read_series
from engine.regions import prepare
from tests.test_files import DATA

ENERGIES = 0.05 + 0.01 * np.arange(400)  # keV
LINE = {"window": [2.0, 2.2], "sides": [[1.7, 1.9], [2.4, 2.7]]}
EDGE = {"window": [2.0, 2.3], "before": [1.4, 1.95]}
BCF = DATA / "stem_eds_haadf_map" / "test_TEM.bcf"


def maps(cube, entry, smooth=0.0, energies=ENERGIES):
    counts, background = spectra.maps(cube, energies, {"Fe": entry}, smooth, "cube")
    return counts[0], background[0]


def laws(*powers, seed=0, shape=(1, 20, 20)):
    """A power law of its own in every pixel, or a sum of them; (tilt, y, x, energy)."""
    amount = np.random.default_rng(seed).uniform(50, 100, (*shape, len(powers)))
    return sum(amount[..., k, None] * (ENERGIES / 2) ** -power for k, power in enumerate(powers))


def test_windows_side_by_side_have_all_counts():
    cube = np.random.default_rng(0).poisson(3, (2, 5, 6, ENERGIES.size))
    ends = [0.045, 0.5, 1.1, 1.11, 3.0, ENERGIES[-1] + 0.005]
    parts = [maps(cube, {"window": [a, b]})[0] for a, b in zip(ends, ends[1:])]
    assert (sum(parts) == cube.sum(-1)).all() and all(part.any() for part in parts)


def test_a_straight_background_is_found_under_a_line():
    slope, line = 40 - 5 * ENERGIES, np.where((ENERGIES > 2.0) & (ENERGIES < 2.19), 30.0, 0.0)
    scale = np.random.default_rng(0).uniform(1, 2, (1, 4, 5, 1))
    counts, background = maps(scale * (slope + line), LINE)
    inside = (ENERGIES >= 2.0) & (ENERGIES < 2.2)
    assert background == pytest.approx(scale[..., 0] * slope[inside].sum(), rel=1e-6)
    assert counts - background == pytest.approx(scale[..., 0] * line[inside].sum(), rel=1e-5)
    # One window alone can only be flat.
    flat = maps(scale * (20 + line), LINE | {"sides": LINE["sides"][:1]})[1]
    assert flat == pytest.approx(scale[..., 0] * 20 * inside.sum(), rel=1e-6)


@pytest.mark.parametrize("power", [0.7, 2.5, 5.0])
def test_a_power_law_is_continued_under_an_edge(power):
    inside = (ENERGIES >= 2.0) & (ENERGIES < 2.3)
    cube = laws(power)
    assert maps(cube, EDGE)[1] == pytest.approx(cube[..., inside].sum(-1), rel=2e-3)


def test_a_linear_combination_of_two_power_laws_is_continued():
    """Where some pixels show each law alone, all mixtures of them are exact."""
    cube = laws(2.0, 4.0)
    cube[:, :4], cube[:, 16:] = laws(2.0)[:, :4], laws(4.0)[:, 16:]
    inside = (ENERGIES >= 2.0) & (ENERGIES < 2.3)
    assert maps(cube, EDGE)[1] == pytest.approx(cube[..., inside].sum(-1), rel=2e-3)


@pytest.mark.parametrize("entry", [LINE, EDGE])
def test_backgrounds_grow_with_the_counts_and_are_right_on_average(entry):
    """Poisson counts of few per pixel: the mean background within 4 standard errors of the truth."""
    cube = laws(3.0, shape=(1, 60, 60)) / 40 if entry is EDGE else np.broadcast_to(2 + 0 * ENERGIES, (1, 60, 60, 400))
    inside = (ENERGIES >= entry["window"][0]) & (ENERGIES < entry["window"][1])
    drawn = np.random.default_rng(1).poisson(cube)
    found, truth = maps(drawn, entry, 4.0)[1], cube[..., inside].sum(-1)
    spread = [maps(np.random.default_rng(k).poisson(cube), entry, 4.0)[1].mean() for k in range(2, 8)]
    assert abs(np.mean(spread) - truth.mean()) < 4 * np.std(spread, ddof=1) / np.sqrt(6) + 0.003 * truth.mean()
    assert found.min() >= 0 and maps(2 * drawn, entry, 4.0)[1] == pytest.approx(2 * found, rel=1e-4)


@pytest.mark.parametrize(("entry", "words"), [
    ({}, "Fe: no window; a spectrum image needs window"),
    ({"window": [5.0, 5.1]}, "5 to 5.1 lies beyond the spectrum's energies, 0.05 to 4.04; check its unit"),
    ({"window": [2000, 2100]}, "check its unit"),
    (LINE | EDGE, "has sides and before; keep sides for EDX or before for EELS"),
    ({"window": [2.0, 2.2], "before": [1.90, 1.92]}, "power laws need a window of 4 channels or more"),
])
def test_windows_that_make_no_sense_are_refused(entry, words):
    with pytest.raises(DataError, match=words):
        maps(np.ones((1, 3, 3, ENERGIES.size)), entry)


def test_empty_spectra_before_an_edge_are_refused():
    with pytest.raises(DataError, match="no counts before the edge"):
        maps(np.where(ENERGIES > 2.0, 1.0, 0.0) * np.ones((1, 3, 3, 1)), EDGE)


def read(path, **changes):
    given = {"key": "cube", "axes": ["y", "x", "energy"], "energy": {"first": 0.05, "step": 0.01}, "smooth": 0.0,
             "elements": {"Fe": {"number": 26, **LINE}, "O": {"number": 8, "window": [0.5, 0.6]}}}
    return read_series(path, **(given | changes))


def test_a_spectrum_image_in_a_file_becomes_maps(tmp_path):
    cube = np.random.default_rng(0).poisson(3, (8, 9, ENERGIES.size)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", cube=cube, moved=cube.transpose(2, 1, 0))
    counts, background = spectra.maps(cube[None], ENERGIES, {"Fe": LINE, "O": {"window": [0.5, 0.6]}}, 0.0, "")
    found = read(tmp_path / "a.npz")
    assert found.elements == ("Fe", "O") and found.angles.tolist() == [0.0] and found.units == "counts"
    assert (found.projections == counts).all() and (found.background == background).all()
    series = prepare(found, pixel_size=1.0, binning=2)[0]
    assert series.projections.sum() == counts[:, :, :, :8].sum() and series.background.max() > 0
    turned = read(tmp_path / "a.npz", key="moved", axes=["energy", "x", "y"])
    assert (turned.projections == counts).all()
    net = read(tmp_path / "a.npz", units="net_counts")
    assert net.projections == pytest.approx(counts - background) and not net.background.any()
    with pytest.raises(DataError, match="states no energies; give energy"):
        read(tmp_path / "a.npz", energy=None)
    with pytest.raises(DataError, match="takes its background from sides or before"):
        read(tmp_path / "a.npz", background=1.0)
    np.savez(tmp_path / "series.npz", cube=np.stack([cube, cube]))
    with pytest.raises(DataError, match="2 projections and no angles; give angles"):
        read(tmp_path / "series.npz", axes=["tilt", "y", "x", "energy"])
    tilted = read(tmp_path / "series.npz", axes=["tilt", "y", "x", "energy"], angles=[-10.0, 10.0])
    assert tilted.projections.shape == (2, 2, 8, 9) and (tilted.projections[:, 1] == counts[:, 0]).all()


@pytest.mark.skipif(not BCF.exists() or not importlib.util.find_spec("rsciio"), reason="needs the file and its reader")
def test_a_bruker_file_states_its_own_energies():
    found = read_series(BCF, key="EDX", axes=["y", "x", "energy"], elements={
        "Ti": {"number": 22, "window": [4.40, 4.63], "sides": [[4.1, 4.3], [5.1, 5.3]]}})
    image = read_series(BCF, key="HAADF", axes=["y", "x"])
    assert found.projections.shape == (1, 1, 64, 64) and image.projections.shape == (1, 1, 64, 64)
    assert found.projections.sum() == 2771 and found.pixel_size == pytest.approx(0.771, abs=1e-3)
    assert 0 < found.background.sum() < 0.2 * found.projections.sum()  # a line of titanium over little background
