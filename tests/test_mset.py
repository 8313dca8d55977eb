"""MSET: the truth is where it stays, errors fall, and neither batches, devices nor gain change what is found."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from engine import groups, mset, multislice, passes, scans
from engine.atoms import nanoparticle
from engine.data import DataError
from engine.diffraction import DiffractionSeries, Scan, simulate
from engine.iterate import Keep, solve
from engine.metrics import correlation
from engine.mset import Settings, reconstruct
from engine.multislice import Optics
from engine.passes import Way
from engine.tracing import compare, trace
from launch import devices
from tests.specimens import distance
from tests.waves import PIXEL, SIZE, measured, truth

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def series():
    return measured()


@pytest.fixture(scope="module")
def found(series):
    return reconstruct(series, Settings(iterations=25))


@pytest.mark.parametrize("finer", [1, 2])
def test_the_truth_stays_where_it_is(finer, series):
    data = series if finer == 1 else measured(finer=finer)
    problem, way = mset.build(mset.feeding(data, Settings(finer=finer), None), Settings(finer=finer)), Way(
        "groups", SIZE, 1)
    state, terms = passes.start(way, 1, problem), np.ones(3, np.float32)
    phase = data.optics.interaction * PIXEL * truth()
    state = state._replace(phase=jnp.asarray(phase), before=jnp.asarray(phase))
    after = solve(passes.stepper(way), problem, (state, terms), 1)
    assert after.history[1, 0] < 1e-6
    assert distance(after.state.phase, phase) < 1e-3


def test_finer_pixels_see_what_voxels_see():
    """Every third pixel of three lies in the middle of a voxel, and the sum of phases stays what it was."""
    volume = jnp.asarray(truth())
    fine = multislice.slices(2, 3 * SIZE, volume)
    coarse = multislice.slices(2, SIZE, volume)
    assert fine.shape == (SIZE // 2, 3 * SIZE, 3 * SIZE)
    assert distance(fine[:, 1::3, 1::3], coarse) < 1e-5
    assert distance(multislice.slices(2, 2 * SIZE, volume).sum((1, 2)), 4 * coarse.sum((1, 2))) < 1e-5


@pytest.mark.parametrize(("size", "wide"), [(6, 12), (7, 14), (5, 15)])
def test_a_wider_detector_keeps_the_frequencies(size, wide):
    pattern = np.random.default_rng(0).random((2, size, size)).astype(np.float32)
    widened = multislice.widened(pattern, wide)
    np.testing.assert_array_equal(multislice.narrowed(widened, size), pattern)
    found = np.fft.fftshift(widened, axes=(1, 2))
    first = wide // 2 - size // 2
    np.testing.assert_array_equal(found[:, first:first + size, first:first + size],
                                  np.fft.fftshift(pattern, axes=(1, 2)))


def test_errors_fall_and_the_volume_is_found(found):
    assert found.ok and found.volume.shape == (1, SIZE, SIZE, SIZE)
    assert (np.diff(found.history["amplitude"][1:]) < 0).all()
    assert found.metrics["amplitude_error"] < 0.2 * found.history["amplitude"][0]
    assert correlation(found.volume[0], truth()) > 0.9
    assert found.volume.min() == 0


def test_one_slice_is_all_layers_in_one(series):
    one, all_layers = (reconstruct(series, Settings(iterations=2, binning=b)) for b in (0, SIZE))
    np.testing.assert_array_equal(one.volume, all_layers.volume)


def test_one_slice_of_a_thin_specimen_is_many():
    """Where nothing scatters but one layer's worth of phase, slices hardly matter; where much does, they do."""
    def apart(strength):
        thin = measured(strength)
        many, one = (reconstruct(thin, Settings(iterations=3, binning=b)).volume for b in (1, 0))
        return distance(one, many)

    assert apart(0.1) < apart(1.0)


def test_the_papers_search_never_raises_an_error(series):
    found = reconstruct(series, Settings(mode="paper", iterations=4))
    assert (np.diff(found.history["amplitude"][1:]) < 0).all()


def test_groups_of_probes_come_to_the_same_volume(series, found):
    """All at once or some at a time: one fixed point, which data without noise have."""
    all_at_once = reconstruct(series, Settings(iterations=25, group=0))
    assert all_at_once.metrics["amplitude_error"] < 0.2 * all_at_once.history["amplitude"][0]
    assert correlation(found.volume, all_at_once.volume) > 0.95


def test_units_of_the_patterns_change_nothing(series):
    counts = replace(series, patterns=2500 * series.patterns, electrons=2500.0)
    a, b = (reconstruct(s, Settings(iterations=2)).volume for s in (counts, series))
    assert distance(a, b) < 1e-4


@pytest.mark.parametrize(("by", "plane"), [((0, 0, -90.0), (0, 1)), ((-90.0, 0, 0), (1, 2))])
def test_a_turned_series_shows_the_turned_specimen(series, by, plane):
    """Angles less 90 degrees, about x, or about z before the tilts, are the specimen turned by 90."""
    turned = replace(series, angles=series.angles + np.array(by))
    a, b = (reconstruct(s, Settings(iterations=2)).volume[0] for s in (turned, series))
    assert distance(np.rot90(b, 1, plane), a) < 1e-4


def test_held_out_patterns_are_not_seen(series):
    fitted = np.ones(series.patterns.shape[:2], bool)
    fitted[:, 4] = fitted[1] = False
    spoiled = series.patterns.copy()
    spoiled[~fitted] *= np.linspace(0, 2, SIZE, dtype=np.float32)
    a, b = (reconstruct(s, Settings(iterations=3), fitted=fitted)
            for s in (series, replace(series, patterns=spoiled)))
    np.testing.assert_array_equal(a.volume, b.volume)
    assert a.metrics["amplitude_error"] == b.metrics["amplitude_error"]
    assert a.metrics["held_out_error"] < b.metrics["held_out_error"]


def test_total_variation_falls_with_its_weight(series):
    def variation(weight):
        volume = reconstruct(series, Settings(iterations=4, lambda_tv=weight)).volume[0]
        return sum(np.abs(np.diff(volume, axis=axis)).sum() for axis in range(3)), volume.min()

    (none, _), (some, low), (much, _) = (variation(w) for w in (0.0, 5e-6, 5e-5))
    assert much < some < none and low >= 0


def test_the_weight_of_total_variation_is_that_of_any_scan(series):
    """Every tilt measured twice weighs the data twice, and total variation with them."""
    twice = replace(series, patterns=np.repeat(series.patterns, 2, 0), angles=np.repeat(series.angles, 2, 0))
    asked = Settings(lambda_tv=1e-5)
    once, again = (mset.build(mset.feeding(s, asked, None), asked) for s in (series, twice))
    assert float(again.lambda_tv) == pytest.approx(2 * float(once.lambda_tv))
    assert float(again.squares) == pytest.approx(2 * float(once.squares))


def test_negative_potentials_are_free_to_be_where_they_are_allowed(series):
    assert reconstruct(series, Settings(iterations=2, positivity=False)).volume.min() < 0


def test_too_long_a_step_is_shortened(series):
    found = reconstruct(series, Settings(iterations=12, step=30.0))
    assert found.history["amplitude"][-1] < found.history["amplitude"][1:4].max()


def test_checkpoints_show_the_volume_of_shorter_solves(series):
    seen = {}
    reconstruct(series, Settings(iterations=3), checkpoints=[2], observe=lambda n, v: seen.update({n: v}))
    assert distance(seen[2], reconstruct(series, Settings(iterations=2)).volume) < 1e-6


@pytest.mark.parametrize("tilts", range(1, 40))
def test_every_tilt_is_met_once_and_neighbours_apart(tilts):
    order = groups.tilt_order(tilts)
    assert sorted(order) == list(range(tilts))
    if tilts > 6:
        assert np.abs(np.diff(order)).min() > 1


def raster(rows, columns):
    return np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2) / 10


@pytest.mark.parametrize("positions", [raster(1, 1), raster(1, 7), raster(8, 8), raster(10, 7),
                                       np.random.default_rng(0).random((23, 2))])
@pytest.mark.parametrize(("group", "devices"), [(16, 1), (0, 1), (1, 1), (5, 1), (5, 2), (0, 3)])
def test_every_probe_is_in_one_group(positions, group, devices):
    chosen = groups.grouped(positions, group, 256, 256, devices)
    assert chosen.shape[1] % devices == 0
    assert sorted(chosen[chosen >= 0]) == list(range(len(positions)))


def test_a_groups_probes_lie_far_apart():
    positions = raster(8, 8)
    for members in groups.grouped(positions, 4, 16, 16).reshape(16, 4):
        apart = np.linalg.norm(positions[members][:, None] - positions[members][None], axis=2)
        assert apart[apart > 0].min() == pytest.approx(0.4)


def test_the_paper_keeps_the_order_of_the_scan():
    np.testing.assert_array_equal(groups.grouped(raster(3, 4), 1, 16, 16, shuffled=False).ravel(), np.arange(12))


def test_what_cannot_be_solved_is_refused(series):
    with pytest.raises(DataError, match="1, 2, 4, 8, 16"):
        reconstruct(series, Settings(binning=3))
    with pytest.raises(DataError, match="empty"):
        reconstruct(replace(series, patterns=0 * series.patterns), Settings())
    with pytest.raises(DataError, match="tilt, probe"):
        reconstruct(series, Settings(), fitted=np.zeros(3, bool))
    with pytest.raises(DataError, match="in nm from the tilt axis"):
        reconstruct(replace(series, positions=series.positions + 5), Settings())
    with pytest.raises(DataError, match="JAX sees 1"):
        reconstruct(series, Settings(devices=64))


# ---- What the microscope's settings say is corrected


def test_a_defocus_that_was_told_wrongly_is_found(series):
    told = replace(series, optics=replace(series.optics, defocus=series.optics.defocus + 2))
    plain, refined = (reconstruct(told, Settings(iterations=30, refine=what)) for what in ((), ("probe",)))
    assert abs(refined.metrics["defocus"] - series.optics.defocus) < 0.5
    assert refined.metrics["amplitude_error"] < 0.5 * plain.metrics["amplitude_error"]
    assert refined.fields["probe"].shape == (2, SIZE, SIZE)
    assert (refined.fields["probe"][0] ** 2).sum() == pytest.approx(1, rel=1e-4)


def test_a_right_defocus_stays(series):
    found = reconstruct(series, Settings(iterations=15, refine=("probe",)))
    assert found.metrics["defocus"] == pytest.approx(series.optics.defocus, abs=0.2)


def test_probes_that_stood_elsewhere_are_found(series):
    """Their common shift is the volume's own, and stays."""
    moves = 0.02 * np.random.default_rng(1).standard_normal(series.positions.shape)
    told = replace(series, positions=series.positions + moves)
    found = reconstruct(told, Settings(iterations=30, refine=("positions",)))
    off = found.fields["positions"] - series.positions
    assert off.shape == (len(series.angles), 9, 2)
    left = off - off.mean(1, keepdims=True)
    assert np.sqrt((left**2).mean()) < 0.35 * np.sqrt(((moves - moves.mean(0)) ** 2).mean())
    assert found.metrics["moved"] == pytest.approx(1e3 * np.sqrt(((off - moves) ** 2).sum(2).mean()), rel=1e-4)


def test_a_probe_in_empty_space_stays_where_it_is(series):
    empty = replace(series, patterns=np.broadcast_to(series.patterns.mean((0, 1)), series.patterns.shape))
    found = reconstruct(replace(empty, patterns=_aperture(empty)), Settings(iterations=4, refine=("positions",)))
    assert found.metrics["moved"] < 1e-3


def _aperture(series):
    spectrum = np.abs(np.asarray(multislice.beam(SIZE, PIXEL, series.optics, PIXEL).spectrum)) ** 2
    return np.broadcast_to(np.fft.fftshift(spectrum), series.patterns.shape)


def test_what_is_common_to_all_tilts_as_a_shift_is_left_to_the_volume():
    """A shift (z, y, x) shows as y cos + z sin and x; anything else stands for misplaced probes."""
    angles = np.stack([np.zeros(5), np.zeros(5), np.linspace(-60, 60, 5)], 1)
    gauge, turns = mset._gauge(angles), np.radians(angles[:, 2])
    shift = np.stack([0.3 * np.cos(turns) + 0.2 * np.sin(turns), np.full(5, 0.1)], 1).ravel()
    np.testing.assert_allclose(gauge @ shift, shift, atol=1e-6)
    np.testing.assert_allclose(gauge @ gauge, gauge, atol=1e-6)
    assert np.linalg.matrix_rank(gauge, tol=1e-3) == 3


# ---- Patterns on disk


def test_patterns_on_disk_give_the_same_volume(series, tmp_path):
    scans.save(tmp_path / "a.zarr", series)
    streamed = scans.load(tmp_path / "a.zarr", most=0)
    assert streamed.streamed and not series.streamed
    fitted = np.ones(series.patterns.shape[:2], bool)
    fitted[:, 4] = False
    asked = Settings(iterations=4, refine=("probe", "positions"), refine_after=1, lambda_tv=1e-6)
    a, b = (reconstruct(s, asked, fitted=fitted) for s in (series, streamed))
    assert distance(a.volume, b.volume) < 1e-5
    assert distance(a.fields["positions"], b.fields["positions"]) < 1e-5
    for name in a.history:
        np.testing.assert_allclose(a.history[name], b.history[name], rtol=1e-4)
    for name in ("amplitude_error", "held_out_error"):
        assert a.metrics[name] == pytest.approx(b.metrics[name], rel=1e-4)


def test_a_streamed_solve_is_taken_up_again(series, tmp_path):
    """A reader that fails in the third pass leaves the state of the second."""
    scans.save(tmp_path / "a.zarr", series)
    streamed, keep = scans.load(tmp_path / "a.zarr", most=0), Keep(tmp_path / "state.npz", "label", seconds=0.0)
    whole = reconstruct(streamed, Settings(iterations=20))

    class Failing:
        shape, read = streamed.patterns.shape, 0

        def __getitem__(self, tilt):
            Failing.read += 1
            if Failing.read > 15 * len(series.angles):
                raise DataError("the disk is gone")
            return streamed.patterns[tilt]

    with pytest.raises(DataError, match="gone"):
        reconstruct(replace(streamed, patterns=Failing()), Settings(iterations=20), keep=keep)
    assert keep.path.exists()
    again = reconstruct(streamed, Settings(iterations=20), keep=keep)
    assert not keep.path.exists()
    assert distance(again.volume, whole.volume) < 1e-5


@pytest.mark.slow
def test_two_devices_agree_with_one():
    given = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC", "OMP_NUM_THREADS")}
    env = devices.environment(0, 1, {**given, "JAX_PLATFORMS": "cpu"}, share=2)
    told = subprocess.run([sys.executable, "-m", "tests.waves"], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=500, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    assert max(json.loads(told.stdout).values()) < 1e-4


@pytest.mark.slow
def test_atoms_of_an_alloy_are_found_from_their_patterns():
    """Simulated on a finer grid with thinner slices; zero defocus at 2.4 Angstrom steps cannot do it as well.

    Slices of 1.6 Angstrom, with which atoms are found as well as with those of 0.4 (docs/BENCHMARKS.md).
    """
    pytest.importorskip("gemmi")
    atoms = nanoparticle("cuau", 0.65)
    angles = np.linspace(-90, 90, 12, endpoint=False)
    results = {}
    for name, defocus, binning in (("mset", -20.0, 4), ("sset", -20.0, 0), ("focus", 0.0, 4)):
        data: DiffractionSeries = simulate(atoms, Scan(optics=Optics(defocus=defocus)), angles)
        volume = reconstruct(data, Settings(binning=binning)).volume[0]
        results[name] = compare(trace(volume, data.pixel).atoms("Cu", "Au"), atoms)
    assert results["mset"].rmsd < 6 and results["mset"].tracing_error < 0.06
    assert results["mset"].classification > 0.93
    assert results["sset"].rmsd > results["mset"].rmsd
    assert results["focus"].rmsd > 12
